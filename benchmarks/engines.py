# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of the engine share: models of real geometry, unseen images, and engines in
processes of their own that are asked line by line, so that what is compared can take turns.

    python benchmarks/engines.py llava-1.5-7b FOLDER    # writes such a model, to serve it with
    vllm-ficoco serve FOLDER --load-format dummy        # random weights
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_ficoco.tiny_llava import CHECKPOINT as SHIPPED
from vllm_ficoco.vision.layout import Layout, Window

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "projection_dim": 768,
}
"""LLaVA-1.5's tower: 576 patches, 23 layers run."""


def decoder(layers: int, width: int, mlp: int, heads: int) -> dict[str, int]:
    """A text configuration; heads are of the size that the width leaves them."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
    }


CUT_TOWER = {
    **CLIP_L,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
}
"""As many patches and layers, a sixteenth of the weights: five tiles of the whole one take a CPU
half a minute."""

DECODERS = {
    "1b": decoder(20, 2048, 5504, 16),
    "llava-1.5-7b": decoder(32, 4096, 11008, 32),
    "llava-1.5-13b": decoder(40, 5120, 13824, 40),
    "llava-next-cut": decoder(8, 1024, 2816, 8),
    "llava-next-7b": decoder(32, 4096, 11008, 32),
}
"""Behind LLaVA-1.5's tower, or LLaVA-NeXT's, which is the same and runs for every tile. Those that
are cut down are for CPUs, where the prefill still takes most of the time to first token."""

TILINGS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
"""LLaVA-NeXT's, rows and columns of tiles."""


def is_tiled(name: str) -> bool:
    """Whether one of :data:`DECODERS` stands behind tiles."""
    return name.startswith("llava-next")


def layout(name: str, side: int) -> Layout:
    """Of the images of :func:`prompts`, behind a tower that makes side x side patches."""
    grid = side, side
    return (
        Layout(grid, (2, 2), Window(0, 0, 2 * side, 2 * side)) if is_tiled(name) else Layout(grid)
    )


def geometry(name: str) -> tuple[dict[str, int], dict[str, int]]:
    """What :func:`checkpoint` needs for one of :data:`DECODERS`, or for the shipped model's own."""
    tower = CUT_TOWER if name == "llava-next-cut" else CLIP_L
    return ({}, {}) if name == "shipped" else (tower, DECODERS[name])


def checkpoint(
    folder: Path, vision: dict[str, int], text: dict[str, int], tiled: bool = False
) -> Path:
    """A LLaVA of this geometry with the shipped model's few words, and no weights (vLLM's dummy
    loader makes some).

    Args:
        folder: where to write it.
        vision: what differs in the tower's configuration.
        text: in the decoder's.
        tiled: LLaVA-NeXT, else LLaVA-1.5.
    """
    config = json.loads((SHIPPED / "config.json").read_text())
    config["vision_config"].update(vision)
    config["text_config"].update(text)
    side = config["vision_config"]["image_size"]
    config["image_seq_length"] = (side // config["vision_config"]["patch_size"]) ** 2
    processor = json.loads((SHIPPED / "processor_config.json").read_text())
    processor["image_processor"]["crop_size"] = {"height": side, "width": side}
    processor["image_processor"]["size"] = {"shortest_edge": side}
    if tiled:
        pinpoints = [[side * rows, side * columns] for rows, columns in TILINGS]
        config["text_config"]["max_position_embeddings"] = 4096
        config |= {
            "model_type": "llava_next",
            "architectures": ["LlavaNextForConditionalGeneration"],
            "image_grid_pinpoints": pinpoints,
        }
        processor["processor_class"] = "LlavaNextProcessor"
        processor["image_processor"] |= {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": pinpoints,
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SHIPPED / name, folder)
    return folder


def prompts(seed: int, count: int, words: int = 3, side: int = 168) -> list[dict[str, Any]]:
    """Requests with one unseen image each, so that no cache hides the prefill.

    Args:
        seed: of the images.
        count: of requests.
        words: of a question.
        side: of an image, in pixels; 672 is 2 x 2 tiles in LLaVA-NeXT.
    """
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    text = f"USER: <image> {' '.join(['there'] * words)} ? ASSISTANT:"
    return [
        {
            "prompt": text,
            "multi_modal_data": {
                "image": Image.fromarray(
                    generator.integers(0, 255, (side, side, 3), dtype=np.uint8)
                )
            },
        }
        for _ in range(count)
    ]


class Child:
    """An engine in a process of its own: what is asked goes in as a line of JSON, and so comes
    the answer.

    The process says ``ready`` once, then ``answer ...`` to every line; other output is passed over.
    """

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read("ready")

    def __call__(self, asked: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self._read("answer"))

    def _read(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise SystemExit("the engine ended")

    def close(self) -> None:
        """The end of its lines; killed, it would leave its workers behind."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def serve(engine: Any) -> None:
    """The other side of :class:`Child`: calls ``engine`` with what is asked."""
    print("ready", flush=True)
    for line in sys.stdin:
        print("answer", json.dumps(engine(json.loads(line))), flush=True)


def in_turn(children: Sequence[Child], rounds: int) -> list[tuple[Any, ...]]:
    """What each answers to a seed, in every round but the first two; who goes first changes."""
    answers = []
    for i in range(rounds + 2):
        order = [(i + j) % len(children) for j in range(len(children))]
        given = {which: children[which](i) for which in order}
        answers.append(tuple(given[which] for which in range(len(children))))
    for child in children:
        child.close()
    return answers[2:]


def environment() -> None:
    """What every process of a benchmark runs with, unless it is set already."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def conditions() -> dict[str, Any]:
    """Under what a figure was measured."""
    import torch
    import vllm

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit or None,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "gpu": gpu,
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {cpu_name()}",
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
    }


def cpu_name() -> str:
    """As Linux says it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    _, name, folder = sys.argv
    checkpoint(Path(folder), *geometry(name), is_tiled(name))

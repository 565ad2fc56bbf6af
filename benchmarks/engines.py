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
from typing import Any, NamedTuple

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

QWEN_CUT_TOWER = {
    "depth": 32,
    "hidden_size": 320,
    "intermediate_size": 856,
    "num_heads": 4,
    "out_hidden_size": 1024,
}
"""Qwen2.5-VL's layers, a sixteenth of the weights."""

QWEN_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
}

DECODERS = {
    "1b": decoder(20, 2048, 5504, 16),
    "1b-cut": decoder(20, 2048, 5504, 16),
    "llava-1.5-7b": decoder(32, 4096, 11008, 32),
    "llava-1.5-13b": decoder(40, 5120, 13824, 40),
    "llava-next-cut": decoder(8, 1024, 2816, 8),
    "llava-next-7b": decoder(32, 4096, 11008, 32),
    "qwen2.5-vl-cut": decoder(8, 1024, 2816, 8),
    "qwen2.5-vl-7b": {**decoder(28, 3584, 18944, 28), "num_key_value_heads": 4},
}
"""Behind LLaVA-1.5's tower, LLaVA-NeXT's, which is the same and runs for every tile, or
Qwen2.5-VL's. Those that are cut down are for CPUs, where the prefill still takes most of the time
to first token; of 1b-cut that is the tower alone."""

TILINGS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
"""LLaVA-NeXT's, rows and columns of tiles."""


class Family(NamedTuple):
    """What a benchmark asks of a model."""

    name: str
    side: int
    """Pixels of a side of its images."""
    context: int
    """Tokens that hold such an image and a question."""
    image: str = "<image>"
    """Stands for one in a prompt."""


LLAVA = Family("llava", 168, 1024)
LLAVA_NEXT = Family("llava-next", 672, 3072)
"""2 x 2 tiles."""
QWEN = Family("qwen2.5-vl", 896, 1536, "<|vision_start|><|image_pad|><|vision_end|>")
"""32 x 32 tokens."""


def family(name: str) -> Family:
    """Of one of :data:`DECODERS`."""
    return next((f for f in (LLAVA_NEXT, QWEN) if name.startswith(f.name)), LLAVA)


def layout(name: str, side: int) -> Layout:
    """Of the images of :func:`prompts`, behind a tower that makes side x side patches."""
    if family(name) is QWEN:
        return Layout((QWEN.side // 28, QWEN.side // 28))
    grid = side, side
    tiled = family(name) is LLAVA_NEXT
    return Layout(grid, (2, 2), Window(0, 0, 2 * side, 2 * side)) if tiled else Layout(grid)


def geometry(name: str) -> tuple[dict[str, int], dict[str, int]]:
    """What :func:`checkpoint` needs for one of :data:`DECODERS`, or for the shipped model's own."""
    towers = {
        "1b-cut": CUT_TOWER,
        "llava-next-cut": CUT_TOWER,
        "qwen2.5-vl-cut": QWEN_CUT_TOWER,
        "qwen2.5-vl-7b": QWEN_TOWER,
    }
    return ({}, {}) if name == "shipped" else (towers.get(name, CLIP_L), DECODERS[name])


def checkpoint(
    folder: Path, vision: dict[str, int], text: dict[str, int], kind: Family = LLAVA
) -> Path:
    """A model of this geometry with the shipped model's few words, and no weights (vLLM's dummy
    loader makes some).

    Args:
        folder: where to write it.
        vision: what differs in the tower's configuration.
        text: in the decoder's.
        kind: its family.
    """
    if kind is QWEN:
        return _qwen(folder, vision, text)
    config = json.loads((SHIPPED / "config.json").read_text())
    config["vision_config"].update(vision)
    config["text_config"].update(text)
    side = config["vision_config"]["image_size"]
    config["image_seq_length"] = (side // config["vision_config"]["patch_size"]) ** 2
    processor = json.loads((SHIPPED / "processor_config.json").read_text())
    processor["image_processor"]["crop_size"] = {"height": side, "width": side}
    processor["image_processor"]["size"] = {"shortest_edge": side}
    if kind is LLAVA_NEXT:
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


def _qwen(folder: Path, vision: dict[str, int], text: dict[str, int]) -> Path:
    from transformers import AutoTokenizer, Qwen2_5_VLConfig

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    marks = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    start, image, video, end = tokenizer.convert_tokens_to_ids(marks)
    tokenizer.chat_template = (SHIPPED / "chat_template.jinja").read_text()
    tokenizer.chat_template = tokenizer.chat_template.replace(LLAVA.image, QWEN.image)
    tokenizer.save_pretrained(folder)
    step = vision["depth"] // 4
    config = Qwen2_5_VLConfig(
        vision_config={
            **vision,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [*range(step - 1, vision["depth"], step)],
        },
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
            "tie_word_embeddings": False,
        },
        vision_start_token_id=start,
        image_token_id=image,
        video_token_id=video,
        vision_end_token_id=end,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    pixels = {"shortest_edge": 4 * 28**2, "longest_edge": 16384 * 28**2}
    shape = {"size": pixels, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    image_ = {**shape, "image_processor_type": "Qwen2VLImageProcessor"}
    video_ = {**shape, "video_processor_type": "Qwen2VLVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image_))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video_))
    processor = {"processor_class": "Qwen2_5_VLProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def prompts(
    seed: int, count: int, words: int = 3, side: int = 168, image: str = LLAVA.image
) -> list[dict[str, Any]]:
    """Requests with one unseen image each, so that no cache hides the prefill.

    Args:
        seed: of the images.
        count: of requests.
        words: of a question.
        side: of an image, in pixels.
        image: what stands for it.
    """
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    text = f"USER: {image} {' '.join(['there'] * words)} ? ASSISTANT:"
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
    checkpoint(Path(folder), *geometry(name), family(name))

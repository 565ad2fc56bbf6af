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
import statistics
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

ONEVISION_CUT_TOWER = {
    "hidden_size": 144,
    "intermediate_size": 538,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "image_size": 384,
    "patch_size": 14,
}
"""SigLIP-so400m's patches, 27 x 27, in 8 of its 26 layers, an eighth as wide: it runs for 16
frames."""

QWEN_VIDEO_TOWER = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 2,
    "out_hidden_size": 512,
}
"""Small, as that of a server is not that is bound by its decoder."""

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
    "llava-onevision-video-cut": decoder(8, 1024, 2816, 8),
    "llava-onevision-video-small": decoder(4, 512, 1408, 4),
    "qwen2.5-vl-video-cut": decoder(8, 512, 1408, 4),
    "qwen3-vl-video-cut": decoder(8, 512, 1408, 4),
}
"""Behind LLaVA-1.5's tower, LLaVA-NeXT's, which is the same and runs for every tile, or
Qwen2.5-VL's; and behind towers of models that are shown videos. Those that are cut down are for
CPUs, where the prefill still takes most of the time to first token; of 1b-cut that is the tower
alone."""

TILINGS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
"""LLaVA-NeXT's, rows and columns of tiles."""


class Family(NamedTuple):
    """What a benchmark asks of a model."""

    name: str
    side: int
    """Pixels of a side of its images, or of the frames of its videos."""
    context: int
    """Tokens that hold such an image or video and a question."""
    image: str = "<image>"
    """Stands for one in a prompt."""
    frames: int = 0
    """Of videos in place of images."""

    @property
    def limits(self) -> dict[str, int]:
        """vLLM's ``limit_mm_per_prompt``."""
        return {"video": 1, "image": 0} if self.frames else {"image": 1}


LLAVA = Family("llava", 168, 1024)
LLAVA_NEXT = Family("llava-next", 672, 3072)
"""2 x 2 tiles."""
QWEN = Family("qwen2.5-vl", 896, 1536, "<|vision_start|><|image_pad|><|vision_end|>")
"""32 x 32 tokens."""
ONEVISION_VIDEO = Family("llava-onevision-video", 384, 3328, "<video>", 16)
"""16 frames of 14 x 14 tokens, of 27 x 27 patches each."""
PLAYED = "<|vision_start|><|video_pad|><|vision_end|>"
QWEN_VIDEO = Family("qwen2.5-vl-video", 224, 768, PLAYED, 16)
"""8 frames of 8 x 8 tokens; the tower makes one of two."""
QWEN_3_VIDEO = Family("qwen3-vl-video", 256, 1024, PLAYED, 16)
"""The same, with timestamps between them."""


def family(name: str) -> Family:
    """Of one of :data:`DECODERS`."""
    others = (QWEN_VIDEO, QWEN_3_VIDEO, ONEVISION_VIDEO, LLAVA_NEXT, QWEN)
    return next((f for f in others if name.startswith(f.name)), LLAVA)


def layout(name: str, side: int) -> Layout:
    """Of the images of :func:`prompts`, behind a tower that makes side x side patches."""
    kind = family(name)
    if kind is ONEVISION_VIDEO:
        return Layout((-(-side // 2), -(-side // 2)), frames=kind.frames, closed=True)
    if kind in (QWEN_VIDEO, QWEN_3_VIDEO):
        return Layout((8, 8), frames=kind.frames // 2)
    if kind is QWEN:
        return Layout((QWEN.side // 28, QWEN.side // 28))
    grid = side, side
    tiled = kind is LLAVA_NEXT
    return Layout(grid, (2, 2), Window(0, 0, 2 * side, 2 * side)) if tiled else Layout(grid)


def geometry(name: str) -> tuple[dict[str, int], dict[str, int]]:
    """What :func:`checkpoint` needs for one of :data:`DECODERS`, or for the shipped model's own."""
    towers = {
        "1b-cut": CUT_TOWER,
        "llava-next-cut": CUT_TOWER,
        "qwen2.5-vl-cut": QWEN_CUT_TOWER,
        "qwen2.5-vl-7b": QWEN_TOWER,
        "llava-onevision-video-cut": ONEVISION_CUT_TOWER,
        "llava-onevision-video-small": {**ONEVISION_CUT_TOWER, "num_hidden_layers": 2},
        "qwen2.5-vl-video-cut": QWEN_VIDEO_TOWER,
        "qwen3-vl-video-cut": QWEN_VIDEO_TOWER,
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
    if kind in (QWEN, QWEN_VIDEO, QWEN_3_VIDEO):
        return _qwen(folder, vision, text, kind)
    if kind is ONEVISION_VIDEO:
        return _onevision(folder, vision, text)
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


def _onevision(folder: Path, vision: dict[str, int], text: dict[str, int]) -> Path:
    from transformers import AutoTokenizer, LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokenizer.add_special_tokens({"additional_special_tokens": [ONEVISION_VIDEO.image]})
    tokenizer.save_pretrained(folder)
    side = vision["image_size"]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=Qwen2Config(
            **text,
            vocab_size=len(tokenizer),
            max_position_embeddings=32768,
            use_sliding_window=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(LLAVA.image),
        video_token_index=tokenizer.convert_tokens_to_ids(ONEVISION_VIDEO.image),
        image_grid_pinpoints=[[side, side]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
        architectures=["LlavaOnevisionForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    square = {"size": {"height": side, "width": side}}
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_processor": {
            **square,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": config.image_grid_pinpoints,
        },
        "video_processor": {**square, "video_processor_type": "LlavaOnevisionVideoProcessor"},
        "image_token": LLAVA.image,
        "video_token": ONEVISION_VIDEO.image,
        "num_image_tokens": (side // vision["patch_size"]) ** 2,
        "vision_feature_select_strategy": "full",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    shutil.copy(SHIPPED / "chat_template.jinja", folder)
    return folder


def _qwen(folder: Path, vision: dict[str, int], text: dict[str, int], kind: Family) -> Path:
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen3VLConfig

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    marks = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    start, image, video, end = tokenizer.convert_tokens_to_ids(marks)
    tokenizer.chat_template = (SHIPPED / "chat_template.jinja").read_text()
    tokenizer.chat_template = tokenizer.chat_template.replace(LLAVA.image, QWEN.image)
    tokenizer.save_pretrained(folder)
    of_3, step = kind is QWEN_3_VIDEO, vision["depth"] // 4
    patch = 16 if of_3 else 14
    of_tower: dict[str, Any] = {
        "window_size": 112,
        "fullatt_block_indexes": [*range(step - 1, vision["depth"], step)],
    }
    rope: dict[str, Any] = {"mrope_section": [16, 24, 24]}
    if of_3:
        of_tower = {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 2]}
        rope = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    config = (Qwen3VLConfig if of_3 else Qwen2_5_VLConfig)(
        vision_config={
            **vision,
            "patch_size": patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **of_tower,
        },
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **rope},
            "tie_word_embeddings": False,
        },
        vision_start_token_id=start,
        image_token_id=image,
        video_token_id=video,
        vision_end_token_id=end,
        architectures=[f"{'Qwen3VL' if of_3 else 'Qwen2_5_VL'}ForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    token = (2 * patch) ** 2
    pixels = {"shortest_edge": 4 * token, "longest_edge": 16384 * token}
    shape = {"size": pixels, "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    image_ = {**shape, "image_processor_type": "Qwen2VLImageProcessor"}
    video_ = {**shape, "video_processor_type": f"Qwen{3 if of_3 else 2}VLVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image_))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video_))
    processor = {"processor_class": f"{'Qwen3VL' if of_3 else 'Qwen2_5_VL'}Processor"}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def prompts(
    seed: int,
    count: int,
    words: int = 3,
    side: int = 168,
    image: str = LLAVA.image,
    frames: int = 0,
) -> list[dict[str, Any]]:
    """Requests with one unseen image or video each, so that no cache hides the prefill.

    Args:
        seed: of the images.
        count: of requests.
        words: of a question.
        side: of an image or frame, in pixels.
        image: what stands for it.
        frames: of a video, two a second, in place of an image.
    """
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    text = f"USER: {image} {' '.join(['there'] * words)} ? ASSISTANT:"

    def unseen() -> dict[str, Any]:
        noise = generator.integers(0, 255, (frames or 1, side, side, 3), dtype=np.uint8)
        if not frames:
            return {"image": Image.fromarray(noise[0])}
        of_file = {
            "fps": 2.0,
            "duration": frames / 2,
            "total_num_frames": frames,
            "frames_indices": [*range(frames)],
            "do_sample_frames": False,
        }
        return {"video": [(noise, of_file)]}

    return [{"prompt": text, "multi_modal_data": unseen()} for _ in range(count)]


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


def notched(ratios: Sequence[float]) -> str:
    """Their median, and how far medians of such rounds must be apart to differ (McGill, Tukey and
    Larsen 1978, notches of box plots: 1.57 quartile distances over the square root of rounds)."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} +- {1.57 * (high - low) / len(ratios) ** 0.5:.3f}"


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

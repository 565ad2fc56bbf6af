# SPDX-License-Identifier: Apache-2.0
"""Whether newline tokens of images in tiles should stay: the shipped model, made a LLaVA-NeXT.

    python benchmarks/newlines.py --questions 200      # about 20 minutes on a CPU

Its tower, projector and decoder see a scene twice as large as those it was taught with: as a
thumbnail and 2 x 2 tiles, 144 + 576 + 24 tokens. The newline is the mean of all words, as it was
taught none. That makes unreduced images hard for it, and says what newlines cost, not what they
are worth to a model that knows them.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy import Question, Scene, held_out
from engines import LLAVA_NEXT, checkpoint, environment, geometry
from vllm_ficoco.tiny_llava import CHECKPOINT as SHIPPED


def tiled(folder: Path) -> Path:
    """The shipped checkpoint as a LLaVA-NeXT, in this folder."""
    from safetensors.torch import load_file, save_file

    checkpoint(folder, *geometry("shipped"), LLAVA_NEXT)
    shutil.copy(SHIPPED / "generation_config.json", folder)
    weights = load_file(SHIPPED / "model.safetensors")
    words = next(weight for name, weight in weights.items() if "embed_tokens" in name)
    weights["image_newline"] = words.float().mean(0).to(words.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def right(llm: Any, asked: Sequence[tuple[Scene, Question]], reduction: Any) -> list[bool]:
    """Which questions are answered rightly."""
    from PIL import Image
    from vllm import SamplingParams

    extra = {"mm_processor_kwargs": {"reduction": reduction}} if reduction else {}
    prompts = [
        {
            "prompt": f"USER: <image> {question.text} ASSISTANT:",
            "multi_modal_data": {"image": scene.image.resize((336, 336), Image.Resampling.BICUBIC)},
            **extra,
        }
        for scene, question in asked
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    return [
        output.outputs[0].text.strip() == question.answer
        for output, (_, question) in zip(outputs, asked, strict=True)
    ]


def main() -> None:
    """``python benchmarks/newlines.py``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--questions", type=int, default=200)
    add("--methods", default="topk,visionzip,ficoco-v,globalcom2,hired", help="with commas")
    add("--budgets", default="240,120,60", help="with commas")
    args = parser.parse_args()
    environment()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    asked = held_out(args.questions)
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            model=str(tiled(Path(folder))),
            max_model_len=1024,
            dtype="float32",
            enforce_eager=True,
            limit_mm_per_prompt={"image": 1},
        )
        whole = right(llm, asked, None)
        print(f"unreduced: {100 * sum(whole) / len(whole):.1f} %\n")
        print("| setting | none, % | all, % | sigma |\n| --- | --- | --- | --- |")
        for method in args.methods.split(","):
            for budget in map(int, args.budgets.split(",")):
                none, every = (
                    right(
                        llm,
                        asked,
                        {"method": method, "budget": budget, "options": {"newlines": newlines}},
                    )
                    for newlines in ("none", "all")
                )
                won = sum(a and not b for a, b in zip(none, every, strict=True))
                lost = sum(b and not a for a, b in zip(none, every, strict=True))
                sigma = (won - lost) / math.sqrt(max(won + lost, 1))
                shares = (f"{100 * sum(some) / len(some):.1f}" for some in (none, every))
                print(f"| {method}@{budget} | {' | '.join(shares)} | {sigma:.1f} |", flush=True)


if __name__ == "__main__":
    main()

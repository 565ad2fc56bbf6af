# SPDX-License-Identifier: Apache-2.0
"""Fits the recipe of the method ``fitprune``: how many tokens of an image each stage can spare.

    python -m vllm_ficoco.fitprune MODEL --stages 2,6,15 --budget 192 --questions FILE

Ye et al., arXiv 2409.10197. For a few images with questions, Hugging Face's model says what every
visual token receives of attention, from the image and from the text, in the layer at which a
stage begins. For a share alpha, a stage drops what belongs to the least looked at by both: what is
dropped may have had no more than alpha of all that the image's tokens received from the image, and
no more than alpha of what they received from the text. The smallest alpha for which a layer holds
no more than the budget is found by halving, and the counts, on average over the images, are printed
as what to put into a request.

Deviations: statistics are those of the whole image (the authors' code runs the model anew for
every alpha, on what is left); attention is the mean over heads (there, the largest); the budget is
of tokens, not FLOPs; tokens leave at stages alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from vllm_ficoco.schedule import average_over_layers, spans
from vllm_ficoco.tiny_llava import CHECKPOINT

HALVINGS = 30
"""Of the range of alpha: finer than a token of any image."""


def least(received: Tensor, left: Tensor, alpha: float) -> Tensor:
    """(n,) bool: the least looked at of those that are left, as many as may go.

    Args:
        received: (n,) attention.
        left: (n,) bool, what earlier stages have left.
        alpha: which share of all of it may be gone then.
    """
    order = received.masked_fill(~left, -1.0).argsort(stable=True)
    ascending = received[order]
    gone = torch.where(left[order], ascending, 0.0).cumsum(0) + received[~left].sum()
    may_go = (gone <= alpha * received.sum()) & left[order]
    return torch.zeros_like(left).scatter(0, order, may_go)


def recipe(statistics: Sequence[Tensor], alpha: float) -> list[int]:
    """Tokens that are left from each stage on, on average over the images, rounded up.

    Args:
        statistics: of each image (stages, 2, n), see :func:`look`.
        alpha: see above.
    """
    totals = [0] * len(statistics[0])
    for image in statistics:
        left = torch.ones(image.shape[-1], dtype=torch.bool)
        for stage, (from_image, from_text) in enumerate(image):
            left &= ~(least(from_image, left, alpha) & least(from_text, left, alpha))
            totals[stage] += int(left.sum())
    return [-(-total // len(statistics)) for total in totals]


def fit(statistics: Sequence[Tensor], starts: Sequence[int], layers: int, budget: int) -> list[int]:
    """The recipe whose average over layers is within a budget and comes nearest to it.

    Args:
        statistics: of each image (stages, 2, n), n the same for all.
        starts: first layer of every stage.
        layers: of the decoder.
        budget: tokens that a layer may hold on average.

    Raises:
        ValueError: no recipe is within the budget, or images differ in size.
    """
    tokens = statistics[0].shape[-1]
    if any(image.shape[-1] != tokens for image in statistics):
        raise ValueError("a recipe counts tokens: take images that have equally many")

    def held(alpha: float) -> list[int]:
        return [tokens, *recipe(statistics, alpha)]

    by_stage = spans(starts, layers)
    if average_over_layers(held(1.0), by_stage) > budget:
        raise ValueError(f"with these stages the budget must be more than {budget}")
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        alpha = (low + high) / 2
        if average_over_layers(held(alpha), by_stage) > budget:
            low = alpha
        else:
            high = alpha
    return held(high)[1:]


@torch.no_grad()
def look(model: Any, processor: Any, image: Any, question: str, starts: Sequence[int]) -> Tensor:
    """(stages, 2, n): what the image's tokens receive from each other and from the text behind
    them, in the first layer of every stage; mean over heads and over who gives.

    Args:
        model: of Hugging Face, with attention that is written out ("eager").
        processor: its.
        image: PIL's.
        question: put behind it.
        starts: first layer of every stage.
    """
    config = model.config
    if getattr(processor, "chat_template", None):
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": parts}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    else:
        prompt = f"USER: <image> {question} ASSISTANT:"
    inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(model.device)
    found = model(**inputs, output_attentions=True, use_cache=False).attentions
    token = getattr(config, "image_token_id", None) or config.image_token_index
    visual = (inputs["input_ids"][0] == token).nonzero()[:, 0]
    text = slice(int(visual[-1]) + 1, None)
    seen = []
    for start in starts:
        attention = found[start][0].float().mean(0).cpu()
        seen.append(
            torch.stack([attention[giving][:, visual].mean(0) for giving in (visual, text)])
        )
    return torch.stack(seen)


def examples(path: str, count: int) -> Iterable[tuple[Any, str]]:
    """Images and questions: of a file, else of the world that the shipped model knows."""
    if not path:
        # Drawn with what the extra `eval` installs.
        from vllm_ficoco.tiny_llava.scenes import SceneMaker

        maker = SceneMaker(seed=0, test=False)
        for _ in range(count):
            scene = maker.scene()
            yield scene.image, next(iter(maker.questions(scene))).text
        return
    from PIL import Image

    with Path(path).open() as lines:
        for line in islice(lines, count):
            asked = json.loads(line)
            image = Image.open(Path(path).parent / asked["image"]).convert("RGB")
            yield image, asked["text"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_ficoco.fitprune", description="Fits counts for the method fitprune."
    )
    parser.add_argument("model", help="a folder, a name that Hugging Face knows, or tiny-llava")
    parser.add_argument("--stages", required=True, help="as the server's --reduction-stages")
    parser.add_argument("--budget", required=True, type=int, help="tokens of a layer on average")
    parser.add_argument(
        "--questions",
        default="",
        help='lines {"image": path beside the file, "text": question}; default: generated scenes',
    )
    parser.add_argument("--images", type=int, default=32, help="how many to look at")
    given = parser.parse_args(arguments)
    starts = [int(start) for start in given.stages.split(",")]
    path = str(CHECKPOINT) if given.model == "tiny-llava" else given.model
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype="auto", attn_implementation="eager"
    ).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(path)
    statistics = [
        look(model, processor, image, question, starts)
        for image, question in examples(given.questions, given.images)
    ]
    layers = model.config.get_text_config().num_hidden_layers
    try:
        tokens = fit(statistics, starts, layers, given.budget)
    except ValueError as error:
        parser.error(str(error))
    found = {"method": "fitprune", "options": {"tokens": tokens}}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

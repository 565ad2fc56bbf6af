# SPDX-License-Identifier: Apache-2.0
"""The reference for images in tiles is Hugging Face's own model where nothing is reduced.

What it makes of reduced images is put together from the same parts: with all of them kept, it is
the same again.
"""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import random_llava_next, random_llava_onevision
from tests.engine.conftest import NEW_TOKENS, picture
from tests.reference.llava import one_thread
from tests.reference.tiles import ReferenceTiles

SHAPES = {
    "square": (112, 112),
    "wide": (160, 70),
    "tall": (40, 200),
    "tiny": (5, 7),
    "padded": (90, 113),
    "huge": (1400, 900),
    "shrunk by OneVision": (600, 800),
    "rows alone": (2, 1400),
    "nothing of the tiles": (1400, 2),
}
"""Width and height."""


@pytest.fixture(scope="module", params=["clip", "siglip", "onevision"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "onevision":
        return ReferenceTiles(str(random_llava_onevision(path)))
    return ReferenceTiles(str(random_llava_next(path, request.param)))


@pytest.mark.parametrize("shapes", [[shape] for shape in SHAPES] + [["tiny", "tall"]])
@one_thread()
def test_unreduced_it_is_transformers(reference: ReferenceTiles, shapes: list[str]) -> None:
    """Sixteen greedy tokens and the length of the prompt."""
    images = [picture(seed, SHAPES[shape]) for seed, shape in enumerate(shapes)]
    prompt = f"USER: {'<image> ' * len(images)}what color is the circle ? ASSISTANT:"
    inputs = reference.processor(text=[prompt], images=images, return_tensors="pt")
    with torch.no_grad():
        output = reference.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
    visual = [reference.visual_tokens(image) for image in images]
    made, length = reference.generate(prompt, visual, NEW_TOKENS)
    assert inputs["input_ids"].shape[1] == length
    assert output[0, length:].tolist() == made


@pytest.mark.parametrize("shape", SHAPES)
@one_thread()
def test_with_all_parts_kept_it_is_transformers(reference: ReferenceTiles, shape: str) -> None:
    width, height = SHAPES[shape]
    whole = reference.visual_tokens(picture(1, (width, height)))
    spots = reference.spots
    window, parts = reference.layout([height, width])
    count = sum(len(part.among) for part in parts) + window.rows
    if len(whole) < count:
        pytest.skip("OneVision shrinks this image")
    with torch.no_grad():
        tokens = reference._reduced(window, parts, "topk", count, {})
    torch.testing.assert_close(torch.stack([t.hidden for t in tokens]), whole, rtol=0, atol=1e-5)
    assert [reference._spot(token, window) for token in tokens] == spots

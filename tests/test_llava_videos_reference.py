# SPDX-License-Identifier: Apache-2.0
"""The reference for videos is Hugging Face's own model where nothing is reduced.

What it makes of reduced videos is put together from the same frames: with all of them kept, it is
the same again.
"""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import random_llava_next_video, random_llava_onevision
from tests.engine.conftest import NEW_TOKENS, picture
from tests.reference.llava import one_thread
from tests.reference.llava_videos import ReferenceVideos
from tests.videos import filmed


@pytest.fixture(scope="module", params=["onevision", "clip", "siglip"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    """Of OneVision with frames of 7 x 7 patches and 4 x 4 tokens."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "onevision":
        return ReferenceVideos(str(random_llava_onevision(path, side=7)))
    return ReferenceVideos(str(random_llava_next_video(path, request.param)))


@pytest.mark.parametrize("shown", [[1], [5], [(70, 90), 3]], ids=str)
@one_thread()
def test_unreduced_it_is_transformers(reference: ReferenceVideos, shown: list) -> None:
    """Sixteen greedy tokens and the prompt's length, of images by size and videos by length."""
    if len(shown) > 1 and not reference.has_newline:
        pytest.skip("vLLM shows it one video a prompt")
    images = [picture(0, size) for size in shown if isinstance(size, tuple)]
    videos = [filmed(frames) for frames in shown if isinstance(frames, int)]
    prompt = f"USER: {'<image> ' * len(images)}{'<video> ' * len(videos)}what is there ? ASSISTANT:"
    inputs = reference.processor(
        text=[prompt], images=images or None, videos=videos, return_tensors="pt"
    )
    with torch.no_grad():
        output = reference.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
    visual = [reference.visual_tokens(image) for image in images]
    visual += [reference.video_tokens(video) for video in videos]
    made, length = reference.generate(prompt, visual, NEW_TOKENS)
    assert inputs["input_ids"].shape[1] == length
    assert output[0, length:].tolist() == made


@one_thread()
def test_with_all_of_its_frames_kept_it_is_transformers(reference: ReferenceVideos) -> None:
    whole = reference.video_tokens(filmed(3))
    with torch.no_grad():
        frames = [reference._projected(reference.frame(x).tokens) for x in reference.pixels]
    made = torch.cat(frames)
    torch.testing.assert_close(made, whole[: len(made)], rtol=0, atol=1e-5)
    assert len(whole) == len(made) + reference.has_newline

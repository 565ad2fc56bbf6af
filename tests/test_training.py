# SPDX-License-Identifier: Apache-2.0
"""The shipped model's training: what is taught is true, a stopped run goes on, the result loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vllm_ficoco.tiny_llava import CHECKPOINT
from vllm_ficoco.tiny_llava.lessons import NOTHING, PATCH, PHRASES, Lessons, make_lesson, phrase_of
from vllm_ficoco.tiny_llava.muon import Muon
from vllm_ficoco.tiny_llava.scenes import SceneMaker
from vllm_ficoco.tiny_llava.train import main

VOCABULARY = json.loads((CHECKPOINT / "tokenizer.json").read_text())["model"]["vocab"]
WORDS = {number: word for word, number in VOCABULARY.items()}


@pytest.mark.parametrize("grid", [12, 24])
def test_a_lesson_tells_the_truth_about_its_scenes(grid: int) -> None:
    maker = SceneMaker(5, side=grid * PATCH)
    scenes = [maker.scene() for _ in range(6)]
    asked = [list(maker.questions(scene)) for scene in scenes]
    lesson = make_lesson(scenes, asked, VOCABULARY, grid)
    for row, scene in enumerate(scenes):
        shown = lesson.patch_phrase[row].view(grid, grid)
        for thing in scene.things:
            # Half a thing's mask or more covers the patch of its centre, rings aside.
            if thing.name not in ("ring", "0") and thing.kind != "word":
                at = int(thing.y // PATCH), int(thing.x // PATCH)
                assert shown[at] in (phrase_of(thing), NOTHING), thing
                assert lesson.centre[row].view(grid, grid)[at]
            assert (shown == phrase_of(thing)).any(), thing
        assert set(shown.unique().tolist()) <= {
            NOTHING,
            len(PHRASES),
            *map(phrase_of, scene.things),
        }
        assert lesson.present[row].sum() == len(scene.things)
        packed = {}
        for number in range(1, int(lesson.segment[row].max()) + 1):
            here = lesson.segment[row] == number
            words = [WORDS[int(word)] for word in lesson.words[row, here]]
            answer = [WORDS[int(w)] for w in lesson.target[row, here] if w != NOTHING]
            packed[" ".join(words[: words.index("ASSISTANT:")])] = " ".join(answer)
        assert packed == {question.text: f"{question.answer} </s>" for question in asked[row]}
    named = 0
    for (row, word), things in zip(lesson.mention.tolist(), lesson.mentioned, strict=True):
        name = WORDS[int(lesson.words[row, word])]
        if name in {thing.name for thing in scenes[row].things}:  # not "object" or "printed"
            found = {scenes[row].things[int(index)].name for index in things.nonzero()}
            assert found <= {name}
            named += len(found)
    assert named > 10


def test_batches_depend_on_seed_and_number_alone() -> None:
    one, other = (Lessons(VOCABULARY, 3, 2, 12, seed=9)[2] for _ in range(2))
    assert torch.equal(one.pixels, other.pixels)
    assert torch.equal(one.words, other.words)
    assert not torch.equal(one.pixels, Lessons(VOCABULARY, 3, 2, 12, seed=9)[1].pixels)


def test_muon_makes_a_matrix_orthogonal_steps() -> None:
    """Whatever the gradient's scale, all singular values of a step are about the rate."""
    torch.manual_seed(0)
    for shape in ((32, 64), (64, 32)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = 1000 * torch.randn(shape)
        Muon([{"params": [weight], "lr": 0.1}], 0.1).step()
        scale = max(1, shape[0] / shape[1]) ** 0.5
        values = torch.linalg.svdvals(weight.detach()) / (0.1 * scale)
        assert values.min() > 0.5 and values.max() < 1.5
        assert (weight.grad * weight).sum() < 0  # downhill


def test_a_stopped_run_goes_on_to_the_same_model(tmp_path: Path) -> None:
    """The steps behind the stop go where they would have gone; sums over threads may round."""
    options = ["--see-images=2", "--images=6", "--batch=2", "--no-compile", "--workers=0"]
    options += ["--exam-images=2", "--device=cpu", f"--init={CHECKPOINT}"]
    main(["train", "--out", str(tmp_path / "once"), *options])
    stopped = main_until(tmp_path / "twice", options, steps=2)
    assert stopped["step"] == 2 and stopped["stage"] == 1
    main(["train", "--out", str(tmp_path / "twice"), *options])
    once, twice = (weights_in_training(tmp_path / name) for name in ("once", "twice"))
    assert once.keys() == twice.keys() == stopped["pupil"].keys()
    moved = sum(float((once[name] - stopped["pupil"][name]).square().sum()) for name in once)
    apart = sum(float((once[name] - twice[name]).square().sum()) for name in once)
    assert moved > 0
    assert apart < 0.1**2 * moved
    names = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("once", "twice")]
    assert names[0] == names[1] == load_file(CHECKPOINT / "model.safetensors").keys()


def weights_in_training(out: Path) -> dict[str, torch.Tensor]:
    """Not rounded to the checkpoint's bfloat16, in which a step or two would not show."""
    state: dict[str, Any] = torch.load(out / "training.pt", weights_only=True)
    return {name: weight.float() for name, weight in state["pupil"].items()}


def main_until(out: Path, options: list[str], steps: int) -> dict[str, Any]:
    """Train, and be stopped after so many steps of the second stage."""
    from vllm_ficoco.tiny_llava import train

    written = torch.save

    class Stopped(Exception):
        pass

    def save_and_stop(state: dict[str, Any], file: Path) -> None:
        if out.joinpath("training.pt").exists():
            last = torch.load(out / "training.pt", weights_only=True)
            if (last["stage"], last["step"]) == (1, steps):
                raise Stopped
        written(state, file)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train.torch, "save", save_and_stop)
        main(["train", "--out", str(out), "--save-every=0", *options])
    state: dict[str, Any] = torch.load(out / "training.pt", weights_only=True)
    return state


def test_a_larger_grid_trains_from_nothing(tmp_path: Path) -> None:
    """The checkpoint loads, and its configuration and processor agree on the image's size."""
    options = ["--see-images=2", "--images=2", "--batch=2", "--no-compile", "--workers=0"]
    options += ["--exam-images=2", "--device=cpu", "--grid=16"]
    main(["train", f"--out={tmp_path}", *options])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 224
    assert config["image_seq_length"] == 256
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    assert processor["image_processor"]["crop_size"] == {"height": 224, "width": 224}
    weights = load_file(tmp_path / "model.safetensors")
    assert len(weights["vision_tower.vision_model.embeddings.position_embedding.weight"]) == 257
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    prepare = AutoProcessor.from_pretrained(tmp_path)
    picture = SceneMaker(1, side=224).scene().image
    inputs = prepare(images=picture, text="USER: <image> what", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 256
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()
    # And a checkpoint of one grid is not taken for one of another.
    with pytest.raises(ValueError, match=r"position_embedding.* grid of 16"):
        main(["train", f"--out={tmp_path}/other", *options, f"--init={CHECKPOINT}"])


def test_show_finds_the_shipped_model_as_good_as_its_card_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["show", "--exam-images=32", "--device=cpu"])
    said = capsys.readouterr().out
    average = float(said.split("average")[1].split("%")[0])
    assert average > 90, said

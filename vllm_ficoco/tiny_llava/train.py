# SPDX-License-Identifier: Apache-2.0
"""Trains the shipped model: a CLIP tower that sees, then a decoder that answers from what it saw.

    python -m vllm_ficoco.tiny_llava train --out runs/tiny-llava

The model is Hugging Face's LLaVA itself. Small heads are trained along and thrown away:

1. The tower alone. [CLS] is contrasted with what is on the image, as in CLIP, also half-way up:
   methods that read its attention there must find something. Patches tell what they show.
2. Everything. A decoder this small does not find out by itself where to look: some of its heads
   are shown the things that a question mentions, and its middle must tell how many those are,
   what, where, and how two of them lie to each other. It first sees only the patches with most on
   them, later all, and now and then a random part, so that fewer tokens are nothing new to it.

Batches depend on seed and step alone, so a stopped run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from vllm_ficoco.tiny_llava import CHECKPOINT
from vllm_ficoco.tiny_llava.lessons import NOTHING, Lesson, Lessons
from vllm_ficoco.tiny_llava.muon import Muon
from vllm_ficoco.tiny_llava.pupil import Pupil
from vllm_ficoco.tiny_llava.scenes import TASKS

TRAINING_SEED = 1_000_000
"""Of the first batch; the evaluation's scenes have smaller ones."""
SEEN = (16, 32, 48, 72)
"""How many patches the decoder sees when it does not see all (144-patch grid; scaled to others)."""


# --- Making and saving the model ----------------------------------------------------------------


def new_llava(grid: int, init: Path | None, seed: int) -> tuple[Any, dict[str, int]]:
    """A LLaVA of the shipped model's shape, and the number of every word.

    Args:
        grid: patches along an image's side.
        init: a checkpoint to start from; its vocabulary may lack the last words.
        seed: of fresh weights.

    Raises:
        ValueError: ``init`` is of another shape, such as of another grid.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, LlavaForConditionalGeneration

    vocabulary = json.loads((CHECKPOINT / "tokenizer.json").read_text())["model"]["vocab"]
    config = AutoConfig.from_pretrained(CHECKPOINT)
    config.dtype = torch.float32
    config.vision_config.image_size = grid * config.vision_config.patch_size
    config.image_seq_length = grid**2
    torch.manual_seed(seed)
    llava = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    if init is None:
        with torch.no_grad():  # quicker than CLIP's and LLaMA's own scale for so small a model
            for name, weight in llava.named_parameters():
                if weight.dim() == 2 and "position" not in name:
                    weight.normal_(std=0.02 if weight.shape[1] >= 256 else 0.03)
    else:
        weights = load_file(init / "model.safetensors")
        for name, weight in llava.state_dict().items():
            given = weights[published_name(name)]
            by_word = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            if given.shape[1:] != weight.shape[1:] or (
                len(given) > len(weight) if by_word else len(given) != len(weight)
            ):
                raise ValueError(
                    f"{init} cannot be taken up: {published_name(name)} is {tuple(given.shape)} "
                    f"there, and {tuple(weight.shape)} with a grid of {grid}"
                )
            weight[: len(given)] = given.float()
    return llava, vocabulary


def published_name(name: str) -> str:
    """A weight's name in LLaVA's published checkpoints, which vLLM reads too."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and "vision_model" not in name:
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    name = name.replace("lm_head", "language_model.lm_head")
    if name.startswith("language_model.") and "lm_head" not in name:
        name = name.replace("language_model.", "language_model.model.")
    return name


@torch.no_grad()
def whiten(pupil: Pupil, lesson: Lesson) -> None:
    """Starts the patch embedding from the principal components of patches, all of equal size."""
    size = pupil.tower.embeddings.patch_embedding.weight.shape[-1]
    pixels = (lesson.pixels.float() / 255 - 0.45) / 0.27
    patches = F.unfold(pixels, size, stride=size).mT.flatten(0, 1)
    on = (lesson.covers.sum(1) > 0.05).flatten()
    covariance = sum(x.T @ x / len(x) for x in (patches[on], patches[~on])) / 2
    values, vectors = torch.linalg.eigh(covariance.double())
    weight = pupil.tower.embeddings.patch_embedding.weight
    width = len(weight)
    values, vectors = values[-width:], vectors[:, -width:]
    basis = (vectors / (values + values.mean() * 0.02 + 1e-3).sqrt()).T.float()
    turn = torch.linalg.qr(torch.randn(width, width))[0]
    weight.copy_((turn @ basis).view_as(weight))
    pupil.tower.embeddings.position_embedding.weight.normal_(std=0.15)
    pupil.tower.embeddings.class_embedding.normal_(std=0.5)
    keep_places(pupil)


@torch.no_grad()
def keep_places(pupil: Pupil) -> None:
    """Gives a patch's place four directions of the tower's width that nothing else is written to.

    What a patch shows is several times as large as where it is; without room of its own, things
    lose their place on the way up, and with it every question about left and right. Each
    coordinate is an angle from 0 to pi, which a layer norm leaves alone.
    """
    tower, grid = pupil.tower, pupil.grid
    position = tower.embeddings.position_embedding.weight
    width = position.shape[1]
    room = torch.randn(width, 4, device=position.device)
    room = torch.linalg.qr(room - room.mean(0))[0]  # a layer norm takes means away
    others = torch.eye(width, device=position.device) - room @ room.T
    for layer in tower.encoder.layers:
        for writes in (layer.self_attn.out_proj, layer.mlp.fc2):
            writes.weight.copy_(others @ writes.weight)
            writes.bias.copy_(others @ writes.bias)
    patch = tower.embeddings.patch_embedding.weight
    patch.copy_((others @ patch.flatten(1)).view_as(patch))
    position.copy_(position @ others)
    tower.embeddings.class_embedding.copy_(others @ tower.embeddings.class_embedding)
    number = torch.arange(grid**2, device=position.device)
    column, row = ((x + 0.5) / grid * torch.pi for x in (number % grid, number // grid))
    place = torch.stack([column.cos(), column.sin(), row.cos(), row.sin()], 1)
    position[1:] += 6 * place @ room.T


def save(llava: Any, out: Path) -> None:
    """Writes a folder that vLLM and Hugging Face load, in bfloat16."""
    from safetensors.torch import save_file

    config = copy.deepcopy(llava.config)
    for part in (config, config.vision_config, config.text_config):
        part.dtype = torch.bfloat16
    config.save_pretrained(out)
    weights = {
        published_name(name): weight.to("cpu", torch.bfloat16).contiguous()
        for name, weight in llava.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        shutil.copy(CHECKPOINT / name, out)
    processor = json.loads((CHECKPOINT / "processor_config.json").read_text())
    side = config.vision_config.image_size
    processor["image_processor"]["crop_size"] = {"height": side, "width": side}
    processor["image_processor"]["size"] = {"shortest_edge": side}
    (out / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


# --- Training -----------------------------------------------------------------------------------


def choose(lesson: Lesson, progress: float, focus: float) -> Tensor | None:
    """The patches that the decoder sees in a batch: (B, K) in raster order, or None for all.

    Args:
        lesson: the batch.
        progress: of the whole stage, 0 to 1.
        focus: until where it sees only the patches with most on them.
    """
    lot = random.Random(int(torch.randint(2**31, ())))
    patches = lesson.covers.shape[-1]
    covered = lesson.covers.sum(1)
    chance = torch.rand(covered.shape, device=covered.device)
    if progress < focus:
        # Background among them, or it would never learn to pass it over.
        score, count = covered + 1e-4 * chance + (chance > 0.93) * 2 * chance, 40
    elif lot.random() < 0.45:
        score, count = chance, lot.choice(SEEN)
        if lot.random() < 0.5:
            score = chance + (covered > 0.05)
    else:
        return None
    count = count * patches // 144
    return score.topk(count, dim=1).indices.sort(1).values


def optimisers(
    pupil: Pupil, tower_rate: float, stage: str, rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of all layers, AdamW for the rest.

    Args:
        pupil: whose weights.
        tower_rate: the tower's learning rate as a share of the others'; 0 leaves it as it is.
        stage: "see" leaves the decoder's layers alone, "answer" trains all.
        rate: AdamW's; Muon's is ten times that.
    """
    matrices: dict[float, list[Tensor]] = {}
    others: dict[tuple[float, float], list[Tensor]] = {}
    for name, weight in pupil.named_parameters():
        share = tower_rate if "vision_tower" in name else 1.0
        decoder = "language_model" in name and "embed_tokens" not in name
        learns = share > 0 if stage == "answer" else not (decoder or "lm_head" in name)
        weight.requires_grad_(learns)
        if not weight.requires_grad:
            continue
        if ".layers." in name and weight.dim() == 2:
            matrices.setdefault(share, []).append(weight)
        else:
            decayed = weight.dim() > 1 and "emb" not in name
            others.setdefault((share, 0.05 if decayed else 0.0), []).append(weight)
    adam = torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": decay, "lr": rate * share}
            for (share, decay), weights in others.items()
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    muon = Muon([{"params": w, "lr": 10 * rate * s} for s, w in matrices.items()], 10 * rate)
    for optimiser in (adam, muon):
        for group in optimiser.param_groups:
            group["highest"] = group["lr"]
    return [adam, muon]


@torch.no_grad()
def examine(
    pupil: Pupil, vocabulary: dict[str, int], images: int, device: torch.device
) -> dict[str, float]:
    """Accuracy per task on so many held-out scenes, with all tokens."""
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    size = min(32, images)
    lessons = Lessons(vocabulary, images // size, size, pupil.grid, 0, test=True, every_task=True)
    for number in range(len(lessons)):
        lesson = lessons[number].to(device)
        patches, *_ = pupil.see(lesson.pixels)
        _, said = pupil.answer_losses(lesson, patches, None)
        good = (said == lesson.target) & (lesson.target != NOTHING)
        for row, word in (lesson.task >= 0).nonzero().tolist():
            task = list(TASKS)[int(lesson.task[row, word])]
            right[task].append(bool(good[row, word]))
    return {task: sum(r) / max(len(r), 1) for task, r in right.items()}


@torch.no_grad()
def cls_attention(pupil: Pupil, lesson: Lesson) -> tuple[list[float], float]:
    """How much of [CLS]'s attention to patches falls on things, per layer, and their area."""
    on = (lesson.covers.sum(1) > 0.05).float()
    x = pupil.embed(lesson.pixels)
    shares = []
    for layer in pupil.tower.encoder.layers:
        attention, h = layer.self_attn, layer.layer_norm1(x)
        heads = (len(x), -1, attention.num_heads, attention.head_dim)
        query, key = attention.q_proj(h[:, :1]).view(heads), attention.k_proj(h[:, 1:]).view(heads)
        scores = torch.einsum("bqhd,bkhd->bhk", query, key) * attention.scale
        shares.append(float((scores.softmax(-1).mean(1) * on).sum(1).mean()))
        x = layer(x, None)
    return shares, float(on.mean())


def show(args: argparse.Namespace) -> None:
    """Prints what the model card says of a checkpoint."""
    vision = json.loads((args.checkpoint / "config.json").read_text())["vision_config"]
    grid = vision["image_size"] // vision["patch_size"]
    llava, vocabulary = new_llava(grid, args.checkpoint, 0)
    device = torch.device(args.device)
    pupil = Pupil(llava, vocabulary).to(device)
    accuracy = examine(pupil, vocabulary, args.exam_images, device)
    for task, share in accuracy.items():
        print(f"{task:24}{100 * share:6.1f} %")
    print(f"{'average':24}{100 * sum(accuracy.values()) / len(accuracy):6.1f} %")
    lesson = Lessons(vocabulary, 1, 128, grid, 0, test=True)[0].to(device)
    shares, area = cls_attention(pupil, lesson)
    print(f"\nthings cover {100 * area:.0f} % of the patches; of [CLS]'s attention, they have")
    for number, share in enumerate(shares):
        print(f"  in layer {number}: {100 * share:4.0f} %")


def train(args: argparse.Namespace) -> None:
    """Both stages, from the last checkpoint in the folder on."""
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # vanishing attention would cost time
    llava, vocabulary = new_llava(args.grid, args.init, args.seed)
    pupil = Pupil(llava, vocabulary).to(device)
    first = TRAINING_SEED * (1 + args.seed)
    if args.init is None:
        whiten(pupil, Lessons(vocabulary, 1, 256, args.grid, first - 1)[0].to(device))
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # one for every number of visible patches
        for layer in (*pupil.tower.encoder.layers, *pupil.decoder.layers):
            layer.compile(dynamic=False)
    file = args.out / "training.pt"
    saved: dict[str, Any] = {"stage": 0, "step": 0}
    if file.exists():
        saved = torch.load(file, weights_only=True)
    if saved["stage"] > 1:
        print(f"{args.out} is trained to its end: for another run, choose another --out")
    if "pupil" in saved:
        pupil.load_state_dict(saved["pupil"])
    for stage, (name, images) in enumerate((("see", args.see_images), ("answer", args.images))):
        if stage < saved["stage"]:
            continue
        steps, seed = images // args.batch, first + stage * TRAINING_SEED // 2
        tools = optimisers(pupil, 1.0 if name == "see" else args.tower_rate, name, args.rate)
        for tool, state in zip(tools, saved.pop("tools", ()), strict=False):
            tool.load_state_dict(state)
        lessons = Lessons(vocabulary, steps, args.batch, args.grid, seed)
        rest = Subset(lessons, range(saved["step"], steps))
        loader = DataLoader(rest, batch_size=None, num_workers=args.workers)
        means: dict[str, float] = {}
        saved_at = time.monotonic()
        bar = tqdm(loader, name, total=steps, initial=saved["step"], unit="step", smoothing=0.05)
        for step, batch in enumerate(bar, saved["step"]):
            progress = step / steps
            for tool in tools:
                for group in tool.param_groups:
                    group["lr"] = (
                        group["highest"] * min(1, (step + 1) / 100) * (1 - 0.98 * progress)
                    )
            torch.manual_seed(seed + step)
            losses = learn(pupil, batch.to(device), tools, name, progress, args.focus)
            for key, value in losses.items():
                means[key] = means.get(key, value) * 0.95 + value * 0.05
            done = step + 1 == steps
            if done or (step + 1) % 50 == 0:
                bar.set_postfix({key: f"{value:.2f}" for key, value in means.items()})
                row: dict[str, Any] = {"stage": name, "step": step + 1, **means}
                if name == "answer" and (done or (step + 1) % 250 == 0):
                    row["accuracy"] = examine(pupil, vocabulary, args.exam_images, device)
                    row["mean"] = sum(row["accuracy"].values()) / len(row["accuracy"])
                with (args.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
            if done or time.monotonic() - saved_at > args.save_every:
                state = (
                    {"stage": stage + 1, "step": 0} if done else {"stage": stage, "step": step + 1}
                )
                if not done:
                    state["tools"] = [tool.state_dict() for tool in tools]
                # First: once the state says "finished", nothing is done again.
                save(llava, args.out)
                torch.save({**state, "pupil": pupil.state_dict()}, file.with_suffix(".new"))
                file.with_suffix(".new").replace(file)  # never half a file
                saved_at = time.monotonic()
        saved = {"stage": stage + 1, "step": 0}


def learn(
    pupil: Pupil,
    lesson: Lesson,
    tools: Sequence[torch.optim.Optimizer],
    stage: str,
    progress: float,
    focus: float,
) -> dict[str, float]:
    """One step; the losses by name."""
    device = lesson.pixels.device.type
    tower_learns = next(pupil.tower.parameters()).requires_grad
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        with torch.set_grad_enabled(tower_learns):
            patches, early, classes = pupil.see(lesson.pixels)
        losses: dict[str, Tensor] = {}
        if tower_learns:
            losses |= pupil.tower_losses(lesson, patches, early, classes)
        if stage == "answer":
            chosen = choose(lesson, progress, focus)
            losses |= pupil.answer_losses(lesson, patches, chosen)[0]
        loss = torch.stack([value.float() for value in losses.values()]).sum()
    loss.backward()
    adams = [weight for group in tools[0].param_groups for weight in group["params"]]
    nn.utils.clip_grad_norm_(adams, 1.0)  # Muon's steps have a size of their own
    for tool in tools:
        tool.step()
        tool.zero_grad()
    return {name: float(value) for name, value in losses.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of training."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/tiny-llava"), help="also where to go on from")
    add("--init", type=Path, help="start from this checkpoint instead of from nothing")
    add("--see-images", type=int, default=60_000, help="of the first stage")
    add("--images", type=int, default=72_000, help="of the second stage")
    add("--batch", type=int, default=32)
    add("--rate", type=float, default=1e-3, help="AdamW's; Muon's is ten times that")
    add("--tower-rate", type=float, default=0.3, help="its share of that in the second stage")
    add("--focus", type=float, default=0.6, help="share of the second stage on few patches")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=1, help="processes that draw scenes")
    add("--no-compile", dest="compile", action="store_false", help="needs no C++ compiler")
    add("--save-every", type=float, default=300, help="seconds")


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m vllm_ficoco.tiny_llava``."""
    parser = argparse.ArgumentParser("python -m vllm_ficoco.tiny_llava")
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="train the shipped model again, or a larger one")
    training.set_defaults(run=train)
    showing = commands.add_parser("show", help="accuracy and [CLS] attention of a checkpoint")
    showing.set_defaults(run=show)
    training.add_argument("--grid", type=int, default=12, help="12 is 168 px, 24 is 336 px")
    for command in (training, showing):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--exam-images", type=int, default=256, help="held out")
    add_arguments(training)
    showing.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    args = parser.parse_args(arguments)
    args.run(args)

# SPDX-License-Identifier: Apache-2.0
"""Videos: many at once, beside vLLM's own pruning; and what is left of an event.

    python benchmarks/video.py load qwen2.5-vl-video-cut --methods vidcom2,uniform-frames
    python benchmarks/video.py load qwen3-vl-video-cut --prune evs,vidcom2 --methods uniform
    python benchmarks/video.py load llava-onevision-video-small --prune '' --rates '' \
        --budgets 785,314
    python benchmarks/video.py scenes --videos 100 --budgets 547,288,115

``load``: requests/s with so many requests at once, each with an unseen video, random weights, on a
CPU. Engines take turns in one run, each in a process of its own: vLLM without this package, vLLM
with ``--video-pruning-rate`` (one engine a rate and method, as it holds for a server) and this
package, with budgets of the tokens that vLLM keeps at these rates. Each figure is the median of the
rounds; ratios are taken within a round, against vLLM with whole videos.

``scenes``: videos of the shipped model's scenes. Nothing happens in them, but that in one frame
there is one more thing, of a colour that nothing else has. They go through the shipped model's
tower, frame by frame, and lose tokens by every method. What is counted: how much of the budget the
event's frame gets, how many of the patches that show the thing stay, and how often the shipped
model, an image model, can tell its shape by what is left of that frame. The model was never shown
videos: this is about the tokens that methods keep, and says nothing of a video model's answers.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accuracy import SEED
from budgets import known, numbers, spread, table
from engines import (
    DECODERS,
    SHIPPED,
    Child,
    checkpoint,
    conditions,
    environment,
    family,
    geometry,
    layout,
    prompts,
    serve,
)
from vllm_ficoco.methods import METHODS, Evidence
from vllm_ficoco.settings import Reduction, SettingsError
from vllm_ficoco.tiny_llava.scenes import COLOURS, SHAPES, SIZE, SceneMaker, _shape_mask
from vllm_ficoco.vision.frames import reduce_frames
from vllm_ficoco.vision.geometry import geometry_of
from vllm_ficoco.vision.layout import Layout

# --- Many at once -------------------------------------------------------------------------------

AT_ONCE = 4096
"""Tokens of a step, of every engine."""


class Batches:
    """An engine in this process that serves a batch for every seed.

    Args:
        folder: of the checkpoint.
        name: of its geometry, one of ``DECODERS``.
        options: of ``vllm.LLM``.
    """

    def __init__(self, folder: str, name: str, options: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all its CPU time is this process's
        from vllm import LLM

        self.kind = family(name)
        self.llm = LLM(
            model=folder,
            dtype="float32",
            load_format="dummy",
            enforce_eager=True,
            max_model_len=self.kind.context,
            max_num_seqs=32,
            max_num_batched_tokens=AT_ONCE,
            limit_mm_per_prompt=self.kind.limits,
            enable_prefix_caching=False,
            block_size=32,
            **options,
        )
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        # As vLLM's runner for GPUs finds it; the one for CPUs does not look, and fails at a video.
        runner.is_multimodal_pruning_enabled = "video_pruning_rate" in options
        config = self.llm.model_config.hf_config
        self.video = getattr(config, "video_token_id", None) or config.video_token_index

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Serves a batch.

        Args:
            asked: ``seed``, ``batch``, ``tokens`` of each answer, ``reduction`` or None.

        Returns:
            ``seconds`` and ``cpu_seconds`` of the whole batch, visual tokens ``kept`` of a request
            and its ``prompt`` tokens.
        """
        from vllm import SamplingParams

        kind = self.kind
        requests = prompts(asked["seed"], asked["batch"], 3, kind.side, kind.image, kind.frames)
        if asked["reduction"]:
            said = {"mm_processor_kwargs": {"reduction": asked["reduction"]}}
            requests = [{**request, **said} for request in requests]
        params = SamplingParams(
            max_tokens=asked["tokens"], temperature=0, ignore_eos=True, detokenize=False
        )
        start, cpu = time.perf_counter(), time.process_time()
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        of_prompts = [list(output.prompt_token_ids or ()) for output in outputs]
        (kept,) = {tokens.count(self.video) for tokens in of_prompts}
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "kept": kept,
            "prompt": len(of_prompts[0]),
        }


def kept_by_vllm(method: str, rate: float, video: Layout) -> int:
    """How many visual tokens of a video vLLM keeps."""
    from vllm.multimodal.video_prune import evs, vidcom2

    count = {"evs": evs, "vidcom2": vidcom2}[method].compute_retained_tokens_count
    rows, columns = video.grid
    return int(count(tokens_per_frame=rows * columns, num_frames=video.frames, q=rate))


class Row(NamedTuple):
    """What is asked of an engine."""

    name: str
    engine: str
    reduction: dict[str, Any] | None = None


def load(args: argparse.Namespace) -> None:
    """All rows in turn, round by round."""
    video = layout(args.model, 27)
    engines: dict[str, tuple[str, dict[str, Any]]] = {"vLLM": ("", {})}
    rows, budgets = [Row("vLLM", "vLLM")], {*args.budgets}
    for rate in args.rates:
        for method in args.prune:
            name = f"vLLM, {method}, rate {rate}"
            options = {"video_pruning_rate": rate, "video_pruning_method": method}
            engines[name] = "", options
            rows.append(Row(name, name))
            budgets |= {kept_by_vllm(method, rate, video), int(video.tokens * (1 - rate))}
    engines["ours"] = "vllm_ficoco", {}
    rows.append(Row("whole", "ours"))
    for budget in sorted(budgets, reverse=True):
        for method in args.methods:
            reduction = Reduction(method=method, budget=budget).model_dump()
            rows.append(Row(f"{method}@{budget}", "ours", reduction))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), *geometry(args.model), family(args.model))
        probe = [__file__, "probe", args.model, "--folder", folder, "--options"]
        children = {
            name: Child(*probe, json.dumps(options), VLLM_PLUGINS=plugins)
            for name, (plugins, options) in engines.items()
        }
        answers: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
        seed = time.time_ns() % 2**31
        for number in range(args.rounds + 1):
            first = number * len(rows) // args.rounds  # another one in every round
            for name, engine, reduction in rows[first:] + rows[:first]:
                seed += 1
                batch = args.requests if number else 2  # a first request's set-up is not measured
                asked = {"seed": seed, "batch": batch, "tokens": args.tokens}
                answer = children[engine]({**asked, "reduction": reduction})
                if number:
                    answers[name].append(answer)
        for child in children.values():
            child.close()
    print("".join(f"- {key}: {value}\n" for key, value in conditions().items()))
    off = answers[rows[0].name]
    lines = [["", "visual tokens kept", "requests/s", "by CPU time", "times vLLM's", "by CPU time"]]
    for name, mine in answers.items():

        def times(key: str, mine: Sequence[dict[str, Any]] = mine) -> list[float]:
            return [o[key] / m[key] for m, o in zip(mine, off, strict=True)]

        each = [args.requests / median(m[key] for m in mine) for key in ("seconds", "cpu_seconds")]
        lines.append(
            [name, str(mine[0]["kept"]), *(f"{x:.3g}" for x in each),
             *(spread(times(key)) for key in ("seconds", "cpu_seconds"))]
        )  # fmt: skip
    print(table(lines))


# --- What is left of an event -------------------------------------------------------------------

FRAMES, PATCH = 8, 14
PLAYS = {"still": 0, "panned": 3}
"""How many pixels the camera moves between two frames."""
GRAIN = 4.0
"""Standard deviation of what every frame has of its own, of 255."""


@dataclass(frozen=True)
class Event:
    """A video in which something appears in one frame."""

    frames: NDArray[np.uint8]
    """(F, side, side, 3)."""
    at: int
    """Which one."""
    shown: NDArray[np.bool_]
    """(patches,): in that frame, where it is seen."""
    question: str
    answer: str


def film(maker: SceneMaker, step: int) -> Event | None:
    """One video; None where there is no room for the thing, or no colour left."""
    lot, scene = maker.random, maker.scene()
    colours = [c for c in COLOURS if all(thing.colour != c for thing in scene.things)]
    boxes = []
    for thing in scene.things:
        height, width = thing.mask.shape
        boxes.append((int(thing.x - width / 2), int(thing.y - height / 2), width, height))
    colour, name, at = lot.choice(colours), lot.choice(SHAPES), lot.randrange(FRAMES)
    mask = _shape_mask(name, lot.randint(18, 28), 0)
    canvas = np.asarray(scene.image).astype(np.float32)
    changed = canvas.copy()
    place = maker._paste(changed, mask, colour, boxes)
    if place is None:
        return None
    opaque = np.zeros(canvas.shape[:2], np.float32)
    (x, y), (height, width) = place, mask.shape
    opaque[y : y + height, x : x + width] = mask / 255.0
    frames = []
    for frame in range(FRAMES):
        seen = np.roll(changed if frame == at else canvas, frame * step, 1)
        seen = seen + maker.numbers.standard_normal(seen.shape[:2])[..., None] * GRAIN
        frames.append(np.clip(np.rint(seen), 0, 255).astype(np.uint8))
    side = SIZE // PATCH
    covered = np.roll(opaque, at * step, 1).reshape(side, PATCH, side, PATCH).mean((1, 3))
    question = f"what shape is the {colour} object ?"
    return Event(np.stack(frames), at, covered.flatten() > 0.1, question, name)


class Watcher:
    """The shipped model on plain Hugging Face modules."""

    def __init__(self) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model: Any = AutoModelForImageTextToText.from_pretrained(SHIPPED, dtype=torch.float32)
        self.processor: Any = AutoProcessor.from_pretrained(SHIPPED)
        tower = self.model.model.vision_tower
        self.tower: Any = getattr(tower, "vision_model", tower)
        config = self.model.config
        # As a model has it whose videos are reduced.
        self.geometry = geometry_of(config)._replace(
            by_image=True, offers=frozenset({"attention"}), videos="reduced"
        )
        self.layout = Layout(self.geometry.grid, frames=FRAMES)
        self.looked: dict[str, Tensor] = {}
        attention = self.tower.encoder.layers[self.geometry.layers - 1].self_attn
        self.heads = attention.num_heads
        for name in ("q_proj", "k_proj"):
            getattr(attention, name).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(_: object, __: object, output: Tensor) -> None:
            self.looked[name] = output.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        return keep

    def see(self, frames: NDArray[np.uint8]) -> tuple[Tensor, Evidence]:
        """(1, F * n, D) of the tower, and what methods may look at."""
        pixels = self.processor.image_processor(list(frames), return_tensors="pt")["pixel_values"]
        layer = self.model.config.vision_feature_layer
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        query, key = self.looked["q_proj"], self.looked["k_proj"]
        evidence = Evidence(
            query, key, query.shape[-1] ** -0.5, self.geometry.grid, has_cls=True, pixels=pixels
        )
        return hidden.flatten(0, 1)[None], evidence

    def ask(self, tokens: Tensor, question: str) -> str:
        """What it says to tokens (k, D) of its tower."""
        text = f"USER: <image> {question} ASSISTANT:"
        ids = self.processor.tokenizer(text, return_tensors="pt")["input_ids"][0]
        words = self.model.get_input_embeddings()(ids)
        (at,) = (ids == self.model.config.image_token_id).nonzero()[0].tolist()
        visual = self.model.model.multi_modal_projector(tokens[None])[0]
        embedded = torch.cat([words[:at], visual, words[at + 1 :]])[None]
        output = self.model.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long),
            max_new_tokens=4,
            do_sample=False,
        )
        return str(self.processor.tokenizer.decode(output[0], skip_special_tokens=True)).strip()


def settings(methods: Sequence[str], budgets: Sequence[int]) -> Iterator[Reduction]:
    """Every method at every budget; those that share by what they see, that way, too."""
    for budget in budgets:
        for method in methods:
            yield Reduction(method=method, budget=budget)
            if "frames" in METHODS[method].options.model_fields:
                yield Reduction(method=method, budget=budget, options={"frames": "unique"})


@torch.inference_mode()
def scenes(args: argparse.Namespace) -> None:
    """A table for either way of the camera."""
    watcher = Watcher()
    every = [*settings(args.methods, args.budgets)]
    for play, step in PLAYS.items():
        maker, events = SceneMaker(SEED), list[Event]()
        while len(events) < args.videos:
            if event := film(maker, step):
                events.append(event)
        found: dict[str, list[tuple[float, float, float, bool]]] = {}
        each = watcher.layout.grid[0] * watcher.layout.grid[1]
        for event in events:
            hidden, evidence = watcher.see(event.frames)
            own = hidden[0, event.at * each : (event.at + 1) * each]
            right = watcher.ask(own, event.question) == event.answer
            found.setdefault("whole", []).append((1.0, 1.0, 1.0, right))
            for reduction in every:
                try:
                    plans = watcher.geometry.parts(reduction, layout=watcher.layout)
                except SettingsError:
                    continue
                kept, place = reduce_frames(hidden, evidence, reduction, watcher.layout, plans)
                inside = place[0] // each == event.at
                at = (place[0][inside] % each).numpy()
                share = len(at) * FRAMES / len(place[0])
                stays = event.shown[at].sum() / event.shown.sum()
                right = watcher.ask(kept[0][inside], event.question) == event.answer
                unique = ", unique" * (reduction.options.get("frames") == "unique")
                name = f"{reduction.method}{unique}@{reduction.budget}"
                found.setdefault(name, []).append((share, stays, float(stays == 1), right))
        print(f"\n{play}: {len(events)} videos\n")
        lines = [["", "of an equal share", "patches of the event kept", "all of them", "right, %"]]
        for name, rows in found.items():
            share, stays, whole, right = (mean(column) for column in zip(*rows, strict=True))
            lines.append(
                [name, f"{share:.2f}", f"{100 * stays:.1f} %", f"{100 * whole:.1f} %",
                 f"{100 * right:.1f}"]
            )  # fmt: skip
        print(table(lines))


def main() -> None:
    """``python benchmarks/video.py``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_load = commands.add_parser("load")
    add = of_load.add_argument
    add("model", choices=[name for name in DECODERS if family(name).frames])
    add("--prune", type=lambda t: t.split(",") if t else [], default=["evs"])
    add("--rates", type=lambda t: [*map(float, t.split(","))] if t else [], default=[0.75, 0.9])
    add("--methods", type=known, default=["vidcom2"], help="with commas")
    add("--budgets", type=numbers, default=[], help="beside what vLLM keeps, with commas")
    add("--requests", type=int, default=16, help="at once")
    add("--tokens", type=int, default=16, help="of every answer")
    add("--rounds", type=int, default=3)
    probe = commands.add_parser("probe")
    probe.add_argument("model")
    probe.add_argument("--folder")
    probe.add_argument("--options", type=json.loads)
    of_scenes = commands.add_parser("scenes")
    add = of_scenes.add_argument
    alone = [name for name, method in METHODS.items() if method.for_videos_alone]
    add("--videos", type=int, default=200)
    add("--methods", type=known, default=[*alone, "score", "topk", "uniform"], help="with commas")
    add("--budgets", type=numbers, default=[288, 115], help="with commas")
    args = parser.parse_args()
    environment()
    if args.command == "probe":
        serve(Batches(args.folder, args.model, args.options))
    elif args.command == "load":
        load(args)
    else:
        scenes(args)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What a budget buys in the engine: time, KV cache and memory, beside what counts alone promise.

    python benchmarks/budgets.py --decoder 1b --dtype float32             # on a CPU
    python benchmarks/budgets.py --decoder llava-1.5-7b --batch 1,8,32 \
        --cudagraph-mode FULL_DECODE_ONLY --compilation-mode 0            # on a GPU
    python benchmarks/budgets.py --decoder 1b-cut --dtype float32 --no-stock --cpu-time \
        --methods fastv,k-norm,ficoco-l                   # prefills inside the decoder, on a CPU
    python benchmarks/budgets.py --decoder llava-next-cut --dtype float32 --budgets 640,320,160 \
        --methods score,topk,visionzip,ficoco-v,globalcom2,hired,fastv --stages 2  # tiles, on a CPU
    python benchmarks/budgets.py --decoder qwen2.5-vl-cut --dtype float32 --budgets 512,256,128 \
        --methods score,topk,visionzip,prumerge,ficoco-v,resize                  # Qwen-VL, on a CPU
    python benchmarks/budgets.py --decoder llava-onevision-video-cut --dtype float32 --no-stock \
        --cpu-time --budgets 1490,785,314 --methods vidcom2,dycoke,uniform-frames,fastvid,score
                                                                          # videos, on a CPU

LLaVA-1.5's, LLaVA-NeXT's (images of 2 x 2 tiles), Qwen2.5-VL's (32 x 32 tokens) or, of 16 frames,
LLaVA-OneVision's tower (16 x 14 x 14) with a
decoder of real geometry and random weights. Three engines take turns in one run, in processes of
their own: vLLM without this package, with it, and with it and decoder stages. Every image is
unseen, so no cache hides a prefill. Each figure is the median of the rounds; ratios are taken
within a round, against vllm-ficoco with reduction off.

Ideals come from :mod:`vllm_ficoco.cost`: FLOPs for tower and prefill, bytes of weights and KV cache
for a decode step. ``of ideal`` is the measured speed-up of a prefill over the promised one. What a
machine makes of so few rows is no fault of a reduction: with ``--words``, ``of words`` is the time
of a prefill of as many words, without any image, over that of the prefill, where every layer of the
decoder has as many rows.

All engines run with equal flags. With decoder stages on a GPU these must be flags that stages
allow (:mod:`vllm_ficoco.engine.checks`); "off, on a server with stages" against "off" is then what
stages cost that nobody uses. To time stages of reduction the host must wait for the device around
each: on a GPU that is done in a round of its own, of which nothing else is taken.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from engines import (
    DECODERS,
    QWEN,
    Child,
    Family,
    checkpoint,
    conditions,
    environment,
    family,
    geometry,
    layout,
    prompts,
    serve,
)
from vllm_ficoco.cost import Decoder, attention_flops, mlp_flops, prefill_flops
from vllm_ficoco.engine.checks import SCHEDULER
from vllm_ficoco.engine.gaps import Plan, Run, held_of
from vllm_ficoco.methods import METHODS
from vllm_ficoco.packed import packed_of
from vllm_ficoco.schedule import parts
from vllm_ficoco.settings import NO_REDUCTION, Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry, geometry_of
from vllm_ficoco.vision.layout import Layout

WORDS = 54
"""Of a question: with what surrounds it, about the 60 text tokens that papers count with."""
POOL = 4 * 2**30
"""Bytes of KV cache that requests are counted into."""
STOCK, OFF, STAGED_OFF = "stock vLLM", "off", "off, on a server with stages"

ENGINE_OPTIONS = ("attention_backend", "cudagraph_mode", "compilation_mode")

Answer = dict[str, Any]


class Probe:
    """An engine in this process that says where the time of a batch went.

    Args:
        model: folder of the checkpoint.
        dtype: of weights and cache.
        starts: first layers of the decoder's stages; none for vLLM's own scheduler and cache.
        batch: requests that must fit into one step.
        kind: the model's family.
        cpu_time: count the process's CPU seconds: of one thread on a machine that others use, too.
        options: of ``vllm.LLM``.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        starts: Sequence[int],
        batch: int,
        kind: Family,
        cpu_time: bool,
        options: dict[str, Any],
    ) -> None:
        import torch

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model must be in reach
        from vllm import LLM

        gpu = torch.cuda.is_available()
        options = {**options, **({} if gpu else {"block_size": 32, "enforce_eager": True})}
        if starts:
            options["scheduler_cls"] = SCHEDULER
            options["hf_overrides"] = {"reduction_stages": list(starts)}
        self.kind, context = kind, kind.context
        self.engine = LLM(
            model=model,
            dtype=dtype,
            load_format="dummy",
            max_model_len=context,
            max_num_seqs=max(batch, 2),
            max_num_batched_tokens=context * max(batch, 2),
            limit_mm_per_prompt=kind.limits,
            enable_prefix_caching=False,
            async_scheduling=False,  # an output is then of the step that made it
            **options,
        ).llm_engine
        self.wait: Callable[[], None] = torch.cuda.synchronize if gpu else lambda: None
        self.memory = GPUMemory() if gpu else CPUMemory()
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.clock = time.process_time if cpu_time else time.perf_counter
        self.spent: Counter[str] = Counter()
        self.timed_stages = True
        model_ = self.engine.model_executor.driver_worker.worker.model_runner.model
        self._time(model_, "embed_multimodal", "tower_s")
        self._time(model_, "forward", "prefill_s")
        if tower := getattr(model_, "reducing_tower", None):
            tower.timer = lambda _: self._timed("tower_reduction_s")
        if decoder := getattr(model_, "staged_decoder", None):
            self._time(decoder, "_reduce", "decoder_reduction_s")

    def _time(self, owner: Any, name: str, kind: str) -> None:
        run = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._timed(kind):
                return run(*args, **kwargs)

        setattr(owner, name, timed)

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        if "reduction" in kind and not self.timed_stages:
            yield
            return
        self.wait()
        start = self.clock()
        yield
        self.wait()
        self.spent[kind] += self.clock() - start

    def __call__(self, asked: dict[str, Any]) -> Answer:
        """Serves a batch.

        Args:
            asked: ``seed``, ``batch``, ``tokens`` of each answer, ``reduction`` or None, whether to
                time its ``stages``, and whether a prefill of as many ``words``, too.

        Returns:
            Seconds of tower and prefill and, where asked, of the reduction within each, of the
            whole batch; ``ttft_s`` of every request; ``decode_s`` of a step; ``kv_bytes`` of a
            request; rows of every decoder layer; KV blocks held and computed; ``peak_bytes``.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=asked["tokens"], temperature=0, ignore_eos=True, detokenize=False
        )
        extra = (
            {"mm_processor_kwargs": {"reduction": asked["reduction"]}} if asked["reduction"] else {}
        )
        kind = self.kind
        requests = prompts(asked["seed"], asked["batch"], WORDS, kind.side, kind.image, kind.frames)
        self.spent.clear()
        self.timed_stages = asked["stages"]
        self.memory.start()
        answer: Answer = {}
        begin, first, steps = self.clock(), dict[str, float](), list[float]()
        for number, request in enumerate(requests):
            self.engine.add_request(f"{asked['seed']}-{number}", {**request, **extra}, params)
        layout = self.layout()
        while self.engine.has_unfinished_requests():
            start = self.clock()
            outputs = self.engine.step()
            end = self.clock()
            if len(first) == asked["batch"]:
                steps.append(end - start)
                continue
            for output in outputs:
                first.setdefault(output.request_id, end - begin)
            if len(first) == asked["batch"]:
                answer.update(self.spent)
                answer["peak_bytes"] = self.memory.peak()
                answer["kv_bytes"] = self.held_bytes() / asked["batch"]
        rows = {*layout["rows"]}
        if asked["words"] and len(rows) == 1:
            answer["words_s"] = self.words(asked["batch"], *rows)
        return {
            "tower_reduction_s": 0.0,
            "decoder_reduction_s": 0.0,
            **answer,
            **layout,
            "ttft_s": median(first.values()),
            "decode_s": median(steps),
        }

    def words(self, batch: int, count: int) -> float:
        """Seconds of a prefill of a batch of prompts of so many words."""
        from vllm import SamplingParams

        self.spent.clear()
        for number in range(batch):
            prompt = {"prompt_token_ids": [5 + (number + i) % 32 for i in range(count)]}
            self.engine.add_request(f"words-{number}", prompt, SamplingParams(max_tokens=1))
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return self.spent["prefill_s"]

    def held_bytes(self) -> float:
        """KV cache that all requests hold now."""
        pool = self.scheduler.kv_cache_manager.block_pool
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is the null block
        return held * self.block_bytes

    @property
    def block_bytes(self) -> float:
        """Of one entry of the pool: what the largest group needs."""
        groups = self.scheduler.kv_cache_config.kv_cache_groups
        return max(len(g.layer_names) * g.kv_cache_spec.page_size_bytes for g in groups)

    def layout(self) -> Answer:
        """What the arithmetic says of a queued request: rows by layer, bytes in whole blocks."""
        request = next(iter(self.scheduler.requests.values()))
        place = request.mm_features[0].mm_position
        run = Run(place.offset, place.offset + place.length)
        prompt, cache = request.num_prompt_tokens, self.engine.vllm_config.cache_config
        size, packed = cache.block_size, cache.effective_attention_block_size is None
        geometry = geometry_of(self.engine.vllm_config.model_config.hf_config)
        asked, layout, *_ = packed_of(request.mm_features[0].data)
        keep = [place.length] * len(geometry.starts)
        if asked is not None:
            keep = geometry.held(asked, layout=layout)[1:]
        plan = Plan.of([run], [keep], size, prompt, False)
        blocks, rows = 0, [prompt] * geometry.spans[0]
        for part in parts(geometry.spans, size, packed):
            whole = -(-prompt // part.block)
            blocks += whole - plan.left_out(part.stage, 0, whole)
            if part.stage:
                held = held_of(run, keep[part.stage - 1], size, prompt)
                rows += [prompt - place.length + held] * part.layers
        return {"rows": rows, "kv_bytes_computed": blocks * self.block_bytes}


class CPUMemory:
    """Resident memory of this process above what it had at the start."""

    def start(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # or what an earlier batch has left would hide this one's
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self.rest = self._read("VmRSS")

    def peak(self) -> int:
        return self._read("VmHWM") - self.rest

    def _read(self, name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition(f"{name}:")[2].split()[0])


class GPUMemory:
    """Allocated memory of the GPU above what was allocated at the start."""

    def start(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()
        self.rest = torch.cuda.memory_allocated()

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() - self.rest


# --- What counts alone promise ------------------------------------------------------------------


def cost_of(text: Any, bytes_per_element: int, mlp_matrices: int = 3) -> Decoder:
    """A Hugging Face configuration as the cost model reads it."""
    heads = text.num_attention_heads
    return Decoder(
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
        heads,
        getattr(text, "num_key_value_heads", heads),
        getattr(text, "head_dim", None) or text.hidden_size // heads,
        bytes_per_element,
        mlp_matrices,
    )


def tower_flops(
    geometry: Geometry, tower: Decoder, reduction: Reduction | None, layout: Layout
) -> int:
    """Of all layers that run, with the tokens that each has before and behind its reduction."""
    plans = geometry.parts(reduction, layout=layout) if reduction else []
    in_tower = (
        reduction is not None and geometry.place_of(reduction.spec, layout.is_video) == "tower"
    )
    if layout.is_video:  # all of its frames, whatever stays of them
        plans = []
    flops, cls = 0, int(geometry.has_cls)
    for plan in plans or [None] * layout.inputs:
        keep_after = dict(plan.stages) if plan and in_tower else {}
        left = geometry.tokens
        for layer in range(geometry.layers):
            flops += attention_flops(left + cls, tower)
            left = keep_after.get(layer, left)
            flops += mlp_flops(left + cls, tower)
    return flops


def native_flops(vision: Any, layout: Layout) -> int:
    """Of Qwen2.5-VL's tower, its merger left out: most layers attend within windows."""
    tower = Decoder(
        vision.depth,
        vision.hidden_size,
        vision.intermediate_size,
        vision.num_heads,
        vision.num_heads,
        vision.hidden_size // vision.num_heads,
    )
    patches = layout.tokens * vision.spatial_merge_size**2
    window = (vision.window_size // vision.patch_size) ** 2
    flops = vision.depth * mlp_flops(patches, tower)
    for layer in range(vision.depth):
        seen = patches if layer in vision.fullatt_block_indexes else window
        flops += patches // seen * attention_flops(seen, tower)
    return flops


def scaled(layout: Layout, reduction: Reduction | None) -> Layout:
    """A square image's layout, scaled to the largest square within the budget where it is to be."""
    if reduction is None or reduction.spec.place != "input":
        return layout
    side = math.isqrt(reduction.budget or 0)
    return Layout((side, side), original=layout.tokens)


def decode_bytes(rows: Sequence[int], decoder: Decoder, batch: int) -> int:
    """What a decode step reads: the decoder's weights, and the cache of every request."""
    weights = decoder.layers * (decoder.projection_weights + decoder.mlp_weights)
    return (
        weights * decoder.kv_bytes_per_element
        + batch * sum(rows) * decoder.kv_bytes_per_token // decoder.layers
    )


# --- Taking turns -------------------------------------------------------------------------------


def settings(
    geometry: Geometry, methods: Sequence[str], budgets: Sequence[int], layout: Layout
) -> Iterator[tuple[str, str, Reduction]]:
    """(name, engine, reduction) of everything that can be asked; what cannot be is printed."""
    for method in methods:
        for budget in budgets:
            reduction = Reduction(method=method, budget=budget)
            try:
                geometry.kept(reduction, layout=layout)
            except SettingsError as error:
                print(f"left out: {method}@{budget}: {error}")
                continue
            engine = "staged" if reduction.spec.decoder else "ours"
            yield f"{method}@{budget}", engine, reduction


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All settings in turn, round by round; written to the file after every round."""
    from tqdm import tqdm
    from transformers import AutoConfig

    checkpoint(folder, *geometry(args.decoder), family(args.decoder))
    config = AutoConfig.from_pretrained(folder)
    if not any(METHODS[method].decoder for method in args.methods):
        args.stages = []
    config.reduction_stages = args.stages
    places = geometry_of(config)
    image = layout(args.decoder, places.grid[0])
    every = list(settings(places, args.methods, args.budgets, image))
    staged = any(engine == "staged" for _, engine, _ in every)
    if staged and args.cudagraph_mode is None:
        args.cudagraph_mode = "FULL_DECODE_ONLY"  # the most that stages allow
    asked: list[tuple[str, str, Reduction | None]] = [
        *([] if args.no_stock else [(STOCK, "stock", None)]),
        (OFF, "ours", None),
        *([(STAGED_OFF, "staged", None)] if staged else []),
        *every,
    ]
    command = [__file__, "--probe", str(folder), "--dtype", args.dtype]
    command += ["--batch", ",".join(map(str, args.batch)), "--decoder", args.decoder]
    command += [*(["--eager"] if args.eager else []), *(["--cpu-time"] if args.cpu_time else [])]
    for name in ENGINE_OPTIONS:
        if (value := getattr(args, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    how: dict[str, tuple[list[str], str]] = {
        "stock": (["--stages", ""], ""),
        "ours": (["--stages", ""], "vllm_ficoco"),
        "staged": (["--stages", ",".join(map(str, args.stages))], "vllm_ficoco"),
    }
    engines = dict.fromkeys(engine for _, engine, _ in asked)
    command += ["--memory", f"{0.9 / len(engines):.2f}"]  # of a GPU, which they share
    children = {
        engine: Child(*command, *how[engine][0], VLLM_PLUGINS=how[engine][1]) for engine in engines
    }
    element = {"float32": 4}.get(args.dtype, 2)
    decoder = cost_of(config.text_config, element)

    def flops_of_tower(reduction: Reduction | None) -> int:
        if family(args.decoder) is QWEN:
            return native_flops(config.vision_config, scaled(image, reduction))
        tower = cost_of(config.vision_config, element, mlp_matrices=2)
        return tower_flops(places, tower, reduction, image)

    results: dict[str, Any] = {
        "conditions": {
            **conditions(),
            "decoder": args.decoder,
            "dtype": args.dtype,
            "stages": args.stages,
            "eager": args.eager,
            "cpu_time": args.cpu_time,
            **{name: getattr(args, name) for name in ENGINE_OPTIONS},
            "kv_cache_bytes_per_token": decoder.kv_bytes_per_token,
        },
        "tower_flops": {name: flops_of_tower(reduction) for name, _, reduction in asked},
        "rounds": [],
    }
    seed = time.time_ns() % 2**31
    # Not measured: what a first request sets up; on a GPU that is kernels for every shape.
    warm_up = asked if results["conditions"]["gpu"] else [a for a in asked if a[2] is None]
    # On a CPU to time stages costs nothing, on a GPU a round more.
    apart = results["conditions"]["gpu"]
    rounds = args.rounds + apart
    total = (rounds * len(asked) + len(warm_up)) * len(args.batch)
    with tqdm(total=total, unit="batch") as bar:
        for number in range(rounds + 1):
            here: dict[str, dict[str, Answer]] = {}
            first = number * len(asked) // max(rounds, 1)  # another one in every round
            turned = asked[first:] + asked[:first] if number else warm_up
            stages = number > args.rounds or not apart
            for batch in args.batch:
                answers = here[str(batch)] = {}
                for name, engine, reduction in turned:
                    bar.set_description(f"{name} x {batch}")
                    seed += 1
                    given = reduction.model_dump() if reduction else None
                    question = {"seed": seed, "batch": batch, "tokens": args.tokens}
                    question |= {"reduction": given, "stages": stages, "words": args.words}
                    answer = children[engine](question)
                    answer["prefill_flops"] = prefill_flops(answer["rows"], decoder)
                    answer["decode_bytes"] = decode_bytes(answer["rows"], decoder, batch)
                    answers[name] = answer
                    bar.update()
            if stages and apart:
                results["stages"] = here
            if 0 < number <= args.rounds:
                results["rounds"].append(here)
            if number:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(results))
    for child in children.values():
        child.close()
    return results


# --- Tables -------------------------------------------------------------------------------------


TIMES = (
    "setting",
    "tower, ms",
    "of off",
    "ideal",
    "reduction / tower of off",
    "prefill, ms",
    "speed-up",
    "ideal",
    "of ideal",
    "of words",
    "reduction / prefill",
    "TTFT, ms",
    "of off",
    "decode step, ms",
    "of off",
    "ideal",
)
MEMORY = (
    "setting",
    "tokens a layer",
    "KV MiB a request",
    "held / computed",
    f"requests in {POOL // 2**30} GiB",
    "of off",
    "peak, MiB",
)


def ms(answers: Sequence[Answer], key: str) -> str:
    """Median in milliseconds."""
    return f"{1000 * median(answer[key] for answer in answers):.4g}"


def spread(ratios: Sequence[float]) -> str:
    """Median, lowest and highest."""
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def times_of(
    name: str,
    mine: Sequence[Answer],
    off: Sequence[Answer],
    tower: float,
    stages: tuple[Sequence[Answer], Sequence[Answer]],
) -> list[str]:
    """A row of the table of times.

    Args:
        name: of the setting.
        mine: its answers, one a round.
        off: those with reduction off, of the same rounds.
        tower: FLOPs of its tower over those of off.
        stages: both, of rounds in which stages of reduction were timed.
    """

    def against(key: str) -> list[float]:
        return [m[key] / o[key] for m, o in zip(mine, off, strict=True)]

    speed_up = median(1 / ratio for ratio in against("prefill_s"))
    ideal = off[0]["prefill_flops"] / mine[0]["prefill_flops"]
    of_ideal = [1 / ratio / ideal for ratio in against("prefill_s")]
    timed = list(zip(*stages, strict=True))
    in_tower = median(m["tower_reduction_s"] / o["tower_s"] for m, o in timed)
    of_words = [m["words_s"] / m["prefill_s"] for m in mine if "words_s" in m]
    in_prefill = median(m["decoder_reduction_s"] / m["prefill_s"] for m, _ in timed)
    return [
        name,
        ms(mine, "tower_s"),
        spread(against("tower_s")),
        f"{tower:.3f}",
        f"{in_tower:.4f}",
        ms(mine, "prefill_s"),
        f"{speed_up:.2f}",
        f"{ideal:.2f}",
        spread(of_ideal),
        spread(of_words) if of_words else "-",
        f"{in_prefill:.4f}",
        ms(mine, "ttft_s"),
        spread(against("ttft_s")),
        ms(mine, "decode_s"),
        spread(against("decode_s")),
        f"{mine[0]['decode_bytes'] / off[0]['decode_bytes']:.3f}",
    ]


def memory_of(name: str, mine: Sequence[Answer], off: Sequence[Answer]) -> list[str]:
    """A row of the table of memory; arguments as of :func:`times_of`."""
    one, fit, fit_off = mine[0], POOL // mine[0]["kv_bytes"], POOL // off[0]["kv_bytes"]
    return [
        name,
        f"{sum(one['rows']) / len(one['rows']):.1f}",
        f"{one['kv_bytes'] / 2**20:.1f}",
        f"{one['kv_bytes'] / one['kv_bytes_computed']:.3f}",
        f"{fit:.0f}",
        f"{fit / fit_off:.2f}",
        f"{median(m['peak_bytes'] for m in mine) / 2**20:.0f}",
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def report(results: dict[str, Any]) -> str:
    """Markdown: one table of times and one of memory for every batch size."""
    rounds, flops = results["rounds"], results["tower_flops"]
    said = "\n".join(f"- {key}: {value}" for key, value in results["conditions"].items())
    parts = [f"{said}\n- rounds: {len(rounds)}; medians (lowest to highest)"]
    for batch in rounds[0]:
        times, memory = [TIMES], [MEMORY]
        for name in flops:
            mine, off = ([r[batch][which] for r in rounds] for which in (name, OFF))
            # Stages are timed in every round, or in one of their own.
            timed = [results["stages"]] if "stages" in results else rounds
            mine_timed, off_timed = ([r[batch][which] for r in timed] for which in (name, OFF))
            times.append(
                times_of(name, mine, off, flops[name] / flops[OFF], (mine_timed, off_timed))
            )
            memory.append(memory_of(name, mine, off))
        parts += [f"### {batch} at once", table(times), table(memory)]
    return "\n\n".join(parts) + "\n"


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between."""
    return [int(n) for n in text.split(",") if n]


def known(text: str) -> list[str]:
    """Names of methods with commas between."""
    names = text.split(",")
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METHODS)}")
    return names


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of a run say to ``vllm.LLM``, the same of every engine; nothing on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    modes = {"cudagraph_mode": args.cudagraph_mode, "mode": args.compilation_mode}
    given = {name: value for name, value in modes.items() if value is not None}
    return {
        "enforce_eager": args.eager,
        "gpu_memory_utilization": args.memory,
        **({"compilation_config": given} if given and not args.eager else {}),
        **(
            {"attention_config": {"backend": args.attention_backend}}
            if args.attention_backend
            else {}
        ),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """``python benchmarks/budgets.py``."""
    names = [n for n, m in METHODS.items() if n != NO_REDUCTION and not m.for_videos_alone]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--decoder", default="1b", choices=[*DECODERS, "shipped"])
    add("--dtype", default="bfloat16", help="float32 for CPUs without bf16 units")
    add("--methods", type=known, default=names, help="with commas; all by default")
    add("--budgets", type=numbers, default=[192, 128, 64], help="with commas")
    add("--stages", type=numbers, default=[2, 8, 14], help="first layers of the decoder's stages")
    add("--batch", type=numbers, default=[1], help="requests that come together, with commas")
    add("--tokens", type=int, default=8, help="of every answer")
    add("--rounds", type=int, default=3)
    add("--eager", action="store_true", help="no torch.compile and no CUDA graphs on a GPU")
    add("--attention-backend", help="of every engine on a GPU, as vLLM names it")
    add("--cudagraph-mode", help="of every engine; FULL_DECODE_ONLY where there are stages")
    add("--compilation-mode", type=int, help="of every engine on a GPU, as vLLM counts them")
    add("--cpu-time", action="store_true", help="CPU seconds of the process: a shared machine's")
    add("--words", action="store_true", help="time prefills of as many words, too")
    add("--no-stock", action="store_true", help="an engine less, where memory is short")
    add("--out", type=Path, default=Path("reports/budgets.json"))
    add("--probe", help=argparse.SUPPRESS)
    add("--memory", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    environment()
    if args.probe:
        where = args.dtype, args.stages, max(args.batch), family(args.decoder), args.cpu_time
        serve(Probe(args.probe, *where, options_of(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print("\n" + report(measure(args, Path(folder))))


if __name__ == "__main__":
    main()

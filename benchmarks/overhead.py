# SPDX-License-Identifier: Apache-2.0
"""What the plugin costs: against vLLM without it, and against the vision tower.

    python benchmarks/overhead.py off     # reduction off: requests through stock vLLM and ours
    python benchmarks/overhead.py off --native    # the same, a tiny Qwen2.5-VL
    python benchmarks/overhead.py tower   # the tower with each method, beside vLLM's own
    python benchmarks/overhead.py stages  # decode steps with decoder stages that nobody uses
    python benchmarks/overhead.py images  # a stream while a prompt of many reduced images comes
    python benchmarks/overhead.py front   # CPU time of the API server's process for a request

``off`` takes the shipped model, whose forward passes are short, so that what the plugin adds per
request shows most. ``tower`` takes LLaVA-1.5's: CLIP-L at 336 px, 576 tokens, 23 layers, random
weights. ``stages`` takes a decoder of 32 small layers. ``images`` takes the shipped model, with
vLLM's encoder cache manager and with ours. ``front`` takes the shipped model, too, and needs Linux
(:mod:`front`). What is compared runs interleaved in one
run; medians of the rounds and their spread are printed, and ratios are what to quote.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines import (
    CLIP_L,
    LLAVA,
    QWEN,
    SHIPPED,
    Child,
    checkpoint,
    decoder,
    environment,
    in_turn,
    notched,
    prompts,
    serve,
)
from front import front
from vllm_ficoco.engine.checks import SCHEDULER
from vllm_ficoco.models.config import ENCODER_CACHE_MANAGER
from vllm_ficoco.schedule import parts, spans

BUDGETS = (192, 64)
REQUESTS = 32


def engine(model: Path, **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        model=str(model),
        enforce_eager=True,
        max_model_len=1024,
        enable_prefix_caching=False,
        **{"limit_mm_per_prompt": {"image": 1}, **options},
    )


def batch_child(folder: str | None) -> None:
    """Serves a batch of requests for every seed it reads, by the shipped model or a Qwen2.5-VL."""
    from vllm import SamplingParams

    options: dict[str, Any] = {"load_format": "dummy"} if folder else {}
    llm = engine(Path(folder or SHIPPED), dtype="float32", max_num_seqs=REQUESTS, **options)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    image = QWEN.image if folder else LLAVA.image

    def seconds(seed: int) -> float:
        asked = prompts(seed, REQUESTS, image=image)
        start = time.perf_counter()
        llm.generate(asked, params, use_tqdm=False)
        return time.perf_counter() - start

    serve(seconds)


TINY_QWEN = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "out_hidden_size": 256,
}


def off(rounds: int, folder: Path | None) -> None:
    """Requests with one image each, through vLLM without and with the plugin, in turn."""
    of_model: list[str] = []
    if folder is not None:
        checkpoint(folder, TINY_QWEN, decoder(4, 256, 640, 2), QWEN)
        of_model = ["--folder", str(folder)]
    stock, ours = (
        Child(__file__, "batch-child", *of_model, VLLM_PLUGINS=name) for name in ("", "vllm_ficoco")
    )
    times = in_turn((stock, ours), rounds)
    ratios = sorted(b / a for a, b in times)
    print(f"\n| | seconds for {REQUESTS} requests | ratio to stock |\n| --- | --- | --- |")
    print(f"| stock vLLM | {statistics.median(a for a, _ in times):.3f} | 1 |")
    print(
        f"| vllm-ficoco, reduction off | {statistics.median(b for _, b in times):.3f} | "
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) |"
    )


STEPS, LASTS = 6, 32  # steps of a round, and rounds of a batch


def decode_child(folder: str, starts: list[int], requests: int) -> None:
    """Answers with the median of a few decode steps of a batch that reduces nothing.

    The batch goes on from one answer to the next, so that rounds are short: what else a machine
    does changes over seconds. On a CPU in CPU time: ``OMP_NUM_THREADS=1`` keeps idle threads from
    being counted as busy.
    """
    import torch
    from vllm import SamplingParams

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    options: dict[str, Any] = {"load_format": "dummy", "max_num_seqs": requests}
    if starts:
        options["scheduler_cls"] = SCHEDULER
        options["hf_overrides"] = {"reduction_stages": starts}
    llm = engine(
        Path(folder), dtype="float32", max_num_batched_tokens=1024, block_size=32, **options
    ).llm_engine
    params = SamplingParams(max_tokens=8 + STEPS * LASTS, temperature=0, ignore_eos=True)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def step_seconds(seed: int) -> float:
        if seed % LASTS == 0:
            while llm.has_unfinished_requests():
                llm.step()
            for i, prompt in enumerate(prompts(seed, requests)):
                llm.add_request(f"{seed}-{i}", prompt, params)
            for _ in range(8):  # all decode after that
                llm.step()
        steps = []
        for _ in range(STEPS):
            start = clock()
            llm.step()
            steps.append(clock() - start)
        return statistics.median(steps)

    serve(step_seconds)


def stages(folder: Path, rounds: int, requests: int) -> None:
    """Decode steps without stages and with several layouts, in turn."""
    import torch

    checkpoint(folder, {}, decoder(32, 256, 640, 4))
    layouts: list[list[int]] = [[], [16], [8, 16, 24], [4], [2]]
    names = [",".join(map(str, starts)) for starts in layouts]
    children = [
        Child(
            __file__,
            "decode-child",
            "--folder",
            str(folder),
            "--starts",
            n,
            "--batch",
            str(requests),
        )
        for n in names
    ]
    times = in_turn(children, rounds)
    packed = torch.cuda.is_available()
    print("\n| `--reduction-stages` | KV cache groups | decode step, ms | ratio to none |")
    print("| --- | --- | --- | --- |")
    for i, (starts, name) in enumerate(zip(layouts, names, strict=True)):
        print(
            f"| {name or 'none'} | {len(parts(spans(starts, 32), 32, packed))} | "
            f"{1000 * statistics.median(row[i] for row in times):.2f} | "
            f"{notched([row[i] / row[0] for row in times])} |"
        )


MANAGERS = {
    "what they keep (vLLM)": "vllm.v1.core.encoder_cache_manager.EncoderCacheManager",
    "what the tower makes (ours)": ENCODER_CACHE_MANAGER,
}
IMAGES = 200


def stream_child(manager: str) -> None:
    """Answers with the longest wait of a stream while a prompt of many images of one token each
    comes, and that prompt's time to its first token."""
    from vllm import SamplingParams

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = engine(
        SHIPPED,
        dtype="float32",
        max_num_batched_tokens=2048,
        limit_mm_per_prompt={"image": IMAGES},
        ec_manager_config={"encoder_cache_manager_cls": manager},
    ).llm_engine

    def waits(seed: int) -> tuple[float, float]:
        pictures = [one["multi_modal_data"]["image"] for one in prompts(seed, IMAGES)]
        many = {
            "prompt": f"USER: {'<image> ' * IMAGES} there ? ASSISTANT:",
            "multi_modal_data": {"image": pictures},
            "mm_processor_kwargs": {"visual_token_budget": 1},
        }
        stream = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
        llm.add_request(f"stream{seed}", "USER: there ? ASSISTANT:", stream)
        llm.step()
        llm.add_request(f"many{seed}", many, SamplingParams(max_tokens=1))
        start = last = time.perf_counter()
        longest = first = 0.0
        while llm.has_unfinished_requests():
            outputs = {output.request_id for output in llm.step()}
            now = time.perf_counter()
            if f"stream{seed}" in outputs:
                longest, last = max(longest, now - last), now
            if f"many{seed}" in outputs:
                first = now - start
        return longest, first

    serve(waits)


def images(rounds: int) -> None:
    """One stream and one prompt of many images, however their work is counted."""
    children = [Child(__file__, "stream-child", "--manager", m) for m in MANAGERS.values()]
    times = in_turn(children, rounds)
    print("\n| images count by | longest wait of the stream, s | first token of the prompt, s |")
    print("| --- | --- | --- |")
    for i, name in enumerate(MANAGERS):
        columns = [sorted(row[i][part] for row in times) for part in (0, 1)]
        print(f"| {name} | " + " | ".join(_spread(column) for column in columns) + " |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def tower(folder: Path, rounds: int, batch: int, dtype: str, methods: list[str]) -> None:
    """vLLM's tower, ours with each method and budget, and what of it the reduction takes."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    from vllm_ficoco.methods import METHODS
    from vllm_ficoco.packed import PACKED_FIELD, pack
    from vllm_ficoco.settings import Reduction

    options: dict[str, Any] = {"load_format": "dummy", "max_num_batched_tokens": 576 * batch + 64}
    llm = engine(folder, dtype=dtype, max_num_seqs=8, **options)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    model = worker.model_runner.model
    device = next(model.parameters()).device
    spent = 0.0

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def timer(_: str) -> Iterator[None]:
        nonlocal spent
        wait()
        start = time.perf_counter()
        yield
        wait()
        spent += time.perf_counter() - start

    model.reducing_tower.timer = timer
    pixels = torch.randn(batch, 3, 336, 336, device=device).to(getattr(torch, dtype))
    settings = [
        Reduction(method=name, budget=budget)
        for name, method in METHODS.items()
        if name != "none" and method.decoder is None and method.place != "input"
        if not method.for_videos_alone
        if not methods or name in methods
        for budget in BUDGETS
    ]

    def run(reduction: Reduction | None) -> tuple[float, float]:
        nonlocal spent
        spent = 0.0
        wait()
        start = time.perf_counter()
        with torch.inference_mode():
            if reduction is None:
                LlavaForConditionalGeneration.embed_multimodal(model, pixel_values=pixels)
            else:
                packed = [pack(reduction)] * batch
                model.embed_multimodal(pixel_values=pixels, **{PACKED_FIELD: packed})
        wait()
        return time.perf_counter() - start, spent

    kinds: list[Reduction | None] = [None, *settings]
    times: dict[int, list[tuple[float, float]]] = {i: [] for i in range(len(kinds))}
    for round_ in range(rounds + 1):
        for i, reduction in enumerate(kinds):
            taken = run(reduction)
            if round_:
                times[i].append(taken)
    stock = statistics.median(t for t, _ in times[0])
    print(f"\nbatch {batch}: vLLM's tower and projector {stock * 1000:.0f} ms\n")
    print("| method | budget | tower with reduction / vLLM's | reduction alone / vLLM's |")
    print("| --- | --- | --- | --- |")
    for i, reduction in enumerate(kinds):
        if reduction is not None:
            whole = sorted(t / stock for t, _ in times[i])
            alone = statistics.median(s for _, s in times[i]) / stock
            print(
                f"| {reduction.method} | {reduction.budget} | {statistics.median(whole):.3f} "
                f"({whole[0]:.3f} to {whole[-1]:.3f}) | {alone:.4f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = ["off", "tower", "stages", "images", "front"]
    commands += ["batch-child", "decode-child", "stream-child"]
    parser.add_argument("what", choices=commands, metavar="{off,tower,stages,images,front}")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="of the tower (CPUs may lack bf16)")
    parser.add_argument("--methods", default="", help="tower: these alone, with commas")
    parser.add_argument("--native", action="store_true", help="off: a tiny Qwen2.5-VL")
    parser.add_argument(
        "--options", action="append", default=[], help="front: a server more, with these of vLLM's"
    )
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--starts", default="", help=argparse.SUPPRESS)
    parser.add_argument("--manager", help=argparse.SUPPRESS)
    args = parser.parse_args()
    environment()
    if args.what == "batch-child":
        batch_child(args.folder)
    elif args.what == "decode-child":
        decode_child(args.folder, [int(n) for n in args.starts.split(",") if n], args.batch)
    elif args.what == "stream-child":
        stream_child(args.manager)
    elif args.what == "off":
        with tempfile.TemporaryDirectory() as folder:
            off(args.rounds, Path(folder) if args.native else None)
    elif args.what == "images":
        images(args.rounds)
    elif args.what == "front":
        front(args.rounds, options=args.options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            if args.what == "stages":
                stages(Path(folder) / "model", args.rounds, args.batch)
            else:
                small = checkpoint(Path(folder), CLIP_L, decoder(4, 1024, 2816, 16))
                methods = [name for name in args.methods.split(",") if name]
                tower(small, args.rounds, args.batch, args.dtype, methods)


if __name__ == "__main__":
    main()

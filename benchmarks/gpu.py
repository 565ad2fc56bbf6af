# SPDX-License-Identifier: Apache-2.0
"""The steps of ``benchmarks/gpu.sh`` that are neither tests nor other benchmarks.

    python benchmarks/gpu.py device                    # does anything run here at all
    python benchmarks/gpu.py agree                     # FlashAttention in graphs against Triton
    python benchmarks/gpu.py load --decoder llava-1.5-7b   # requests/s of prefills, beside stock's
    python benchmarks/gpu.py tower                     # a tower with each method, in graphs or not
    python benchmarks/gpu.py server FOLDER             # `vllm-ficoco serve` under load
    python benchmarks/gpu.py metadata FOLDER           # entry points where pip cannot install

Without a GPU each runs on the CPU as far as that goes and says what it leaves out; ``--small`` does
so with the shipped model's geometry. A step whose bar is missed ends with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from statistics import mean, median
from typing import Any

from engines import (
    CLIP_L,
    Child,
    checkpoint,
    decoder,
    environment,
    family,
    geometry,
    layout,
    prompts,
    serve,
)

ROOT = Path(__file__).parents[1]
PLUGINS = {"vllm.general_plugins": "vllm_ficoco", "vllm.endpoint_plugins": "ficoco_server"}
GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
"""Graphs of decode steps and nothing compiled: what decoder stages allow, and quick to start."""

missed: list[str] = []
"""Bars that this run is below."""


def bar(what: str, value: float, limit: float, *, least: bool = False) -> None:
    """Says whether a figure is where it should be."""
    met = value >= limit if least else value <= limit
    sign = "at least" if least else "at most"
    print(f"{'met' if met else 'MISSED'}: {what} {value:.3f}, {sign} {limit}")
    if not met:
        missed.append(what)


def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# --- device -------------------------------------------------------------------------------------


def device(small: bool) -> None:
    """Entry points, kernels, FlashAttention: without them nothing that follows says anything."""
    absent = [
        f"{name} ({group})"
        for group, name in PLUGINS.items()
        if name not in entry_points(group=group).names
    ]
    if absent:
        sys.exit(
            f"no entry point {', '.join(absent)}: vLLM would load plain LLaVA without a word. "
            "Install the package (pip install --no-deps -e .); or where that cannot be done, write "
            "its metadata into a folder of PYTHONPATH: python benchmarks/gpu.py metadata site"
        )
    import pytest  # noqa: F401 - most steps are tests
    import torch
    import vllm

    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, vLLM {vllm.__version__}")
    if not gpu():
        if not small:
            sys.exit("no GPU that torch can use (--dry-run does without)")
        print("skipped, needs a GPU: kernels, FlashAttention")
        return
    about = torch.cuda.get_device_properties(0)
    print(f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}")

    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    x, weight = (torch.randn(n, device="cuda", dtype=torch.bfloat16) for n in (4096, 1024))
    x, made = x.view(4, 1024), x.new_empty(4, 1024)
    ops.rms_norm(made, x, weight, 1e-6)
    want = torch.nn.functional.rms_norm(x.float(), (1024,), weight.float(), 1e-6)
    torch.testing.assert_close(made.float(), want, atol=0.05, rtol=0.02)
    print("rms_norm of vLLM's own kernels: right")

    from vllm.vllm_flash_attn import flash_attn_varlen_func

    version = get_flash_attn_version(head_size=128)
    q, k, v = torch.randn(3, 48, 8, 128, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([0, 48], dtype=torch.int32, device="cuda")
    made = flash_attn_varlen_func(q, k, v, 48, ends, 48, ends, causal=True, fa_version=version)
    heads = (t.float().transpose(0, 1) for t in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    torch.testing.assert_close(made.float(), want.transpose(0, 1), atol=0.05, rtol=0.02)
    print(f"FlashAttention {version}: right")


def metadata(folder: Path) -> None:
    """What an installation would leave for ``importlib.metadata`` to find."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = project["name"].replace("-", "_")
    within = folder / f"{name}-0.dist-info"
    within.mkdir(parents=True, exist_ok=True)
    (within / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n"
    )
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in points.items()))
    ]
    (within / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (within / "RECORD").write_text("")
    print(f"{within}: now PYTHONPATH={folder.resolve()}${{PYTHONPATH:+:$PYTHONPATH}}")


# --- agree --------------------------------------------------------------------------------------


def agree_child(folder: Path, small: bool) -> None:
    """Answers with [token, logits of all words] of every step of every request, and replays."""
    from tests.engine import replays
    from tests.engine.conftest import make_engine
    from tests.engine.test_decoder_stages import STAGED, VOCABULARY, asks_of_every_kind

    replays.count()
    with contextmanager(make_engine)(folder, **STAGED, enable_prefix_caching=False) as engine:

        def answers(_: object) -> Any:
            said = []
            asks = asks_of_every_kind()[:: 8 if small else 1]
            alone = asks[::8]  # few rows: piecewise graphs
            for ask in asks + alone:
                ask.sampling["logprobs"] = VOCABULARY
                methods = {(given or {}).get("method", "none") for given in ask.settings}
                said.append([sorted(methods), ask])
            outputs = engine.generate(asks)
            for ask in alone:
                outputs += engine.generate([ask])
            steps = [
                [
                    [word, [given[n].logprob for n in range(VOCABULARY)]]
                    for word, given in zip(output.token_ids, output.logprobs, strict=True)
                ]
                for output in (o.outputs[0] for o in outputs)
            ]
            names = [methods for methods, _ in said]
            groups = engine.scheduler.kv_cache_config.kv_cache_groups
            return {
                "requests": [*zip(names, steps, strict=True)],
                "replays": replays.COUNT[0],
                "groups": [[g.kv_cache_spec.block_size, len(g.layer_names)] for g in groups],
            }

        serve(answers)


SAME = {"none", "random-decoder"}
"""Methods that keep the same tokens whatever the rounding: a token more or less is no rounding."""


def agree(small: bool) -> None:
    """The same requests in bfloat16: FlashAttention, compiled and in graphs as vLLM does where
    nothing is said of it, and Triton without."""
    import torch

    from tests.checkpoints import random_llava

    on_gpu = gpu()
    ways: dict[str, dict[str, Any]] = {
        "TRITON_ATTN, eager": {"attention_config": {"backend": "TRITON_ATTN"}},
        "FLASH_ATTN, graphs": {
            "attention_config": {"backend": "FLASH_ATTN"},
            "enforce_eager": False,
            "compilation_config": {"max_cudagraph_capture_size": 256},  # an image fits
        },
    }
    if not on_gpu:
        print("skipped, needs a GPU: FlashAttention and graphs; here are two ways of a CPU")
        ways = {"steps of all": {}, "steps of half": {"max_num_seqs": 16}}
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        random_llava(Path(folder), decoder_layers=6)
        for options in ways.values():
            dtype = "bfloat16" if on_gpu else "float32"
            given = json.dumps({**options, "dtype": dtype})
            flags = ["--small"] if small else []
            child = Child(__file__, "agree-child", folder, *flags, FICOCO_TEST_ENGINE=given)
            answers.append(child(None))
            child.close()
    differences: dict[bool, list[float]] = {True: [], False: []}
    parted, far = 0, 0
    requests = [answer["requests"] for answer in answers]
    for (methods, mine), (_, other) in zip(*requests, strict=True):
        strict = {*methods} <= SAME
        one, two = (torch.tensor(steps[0][1]) for steps in (mine, other))
        differences[strict].append(float((one - two).abs().mean() / one.std()))
        for (word, logits), (another, _) in zip(mine, other, strict=True):
            if word != another:  # what follows is another text
                gap = (logits[word] - logits[another]) / float(torch.tensor(logits).std())
                parted += 1
                far += strict and gap > 0.1
                break
    for strict, found in differences.items():
        which = "the same tokens kept" if strict else "any method"
        print(f"{len(found)} requests, {which}: {median(found):.4f} (to {max(found):.4f})")
    print(f"KV cache groups, tokens of a block and layers: {answers[1]['groups']}")
    print(f"{parted} of {len(requests[0])} texts part; replays: {answers[1]['replays']}")
    bar("mean difference of logits by their deviation", mean(differences[True]), 0.02)
    bar("the same, median of any method", median(differences[False]), 0.02)
    bar("texts that part where it is no near-tie", far, 0)
    if on_gpu:
        bar("replays of graphs", answers[1]["replays"], 1, least=True)


# --- load ---------------------------------------------------------------------------------------


def load_child(args: argparse.Namespace) -> None:
    """Answers with requests/s: 32 under way at once, all rendered before the clock starts."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    kind = family(args.decoder)
    options: dict[str, Any] = {"block_size": 32, "enforce_eager": True}
    if gpu():
        options = {**GRAPHS, "gpu_memory_utilization": args.memory}
        options["attention_config"] = {"backend": args.attention_backend}
    llm = LLM(
        model=args.folder,
        dtype=args.dtype,
        load_format="dummy",
        max_model_len=kind.context,
        max_num_seqs=args.at_once,
        max_num_batched_tokens=8192,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        **options,
    )
    engine = llm.llm_engine
    params = SamplingParams(
        max_tokens=args.tokens, temperature=0, ignore_eos=True, detokenize=False
    )

    def rate(asked: dict[str, Any]) -> float:
        extra = (
            {"mm_processor_kwargs": {"reduction": asked["reduction"]}} if asked["reduction"] else {}
        )
        requests = [
            llm._preprocess_cmpl_one({**request, **extra})
            for request in prompts(asked["seed"], args.requests, 54, kind.side, kind.image)
        ]
        begin = time.perf_counter()
        for number, request in enumerate(requests):
            engine.add_request(f"{asked['seed']}-{number}", request, params)
        while engine.has_unfinished_requests():
            engine.step()
        return args.requests / (time.perf_counter() - begin)

    serve(rate)


def load(args: argparse.Namespace) -> None:
    """Prefill-bound: answers of a few tokens. Stock vLLM, off, and a ninth of the tokens."""
    from transformers import AutoConfig

    from vllm_ficoco.vision.geometry import geometry_of

    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), *geometry(args.decoder), family(args.decoder))
        side = geometry_of(AutoConfig.from_pretrained(folder)).grid[0]
        budget = layout(args.decoder, side).tokens // 9
        asked: list[tuple[str, str, dict[str, Any] | None]] = [
            ("stock vLLM", "", None),
            ("off", "vllm_ficoco", None),
            *(
                (f"{method}@{budget}", "vllm_ficoco", {"method": method, "budget": budget})
                for method in args.methods
            ),
        ]
        flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in LOAD_FLAGS]
        seeds = iter(range(time.time_ns() % 2**31, 2**32))
        rates: dict[str, list[float]] = {name: [] for name, _, _ in asked}

        def rounds(children: dict[str, Child]) -> None:
            """The first one warms up; another setting begins in each."""
            mine = [a for a in asked if a[1] in children]
            for number in range(args.rounds + 1):
                first = number % len(mine)
                for name, plugins, reduction in mine[first:] + mine[:first]:
                    question = {"seed": next(seeds), "reduction": reduction}
                    rate = children[plugins](question)
                    if number:
                        rates[name].append(rate)
            for child in children.values():
                child.close()

        def start(plugins: str, memory: float) -> Child:
            own = [folder, *flags, f"--memory={memory}"]
            return Child(__file__, "load-child", *own, VLLM_PLUGINS=plugins)

        if args.alone:  # two of them would not fit
            for plugins in ("", "vllm_ficoco"):
                rounds({plugins: start(plugins, 0.9)})
        else:
            rounds({plugins: start(plugins, 0.45) for plugins in ("", "vllm_ficoco")})
    print(f"{args.decoder}, {args.dtype}: {args.requests} requests a run, {args.at_once} at once, ")
    print(f"{args.tokens} tokens out; {args.rounds} rounds, median (lowest to highest)\n")
    print("| setting | requests/s | of stock |\n| --- | --- | --- |")
    stock = rates["stock vLLM"]
    of_stock = {}
    for name, found in rates.items():
        ratios = sorted(a / b for a, b in zip(found, stock, strict=True))
        of_stock[name] = median(ratios)
        lowest, highest = min(found), max(found)
        print(
            f"| {name} | {median(found):.2f} ({lowest:.2f} to {highest:.2f}) | "
            f"{of_stock[name]:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) |"
        )
    print()
    if gpu():
        bar("time of off, of stock's", 1 / of_stock["off"], 1.01)
        if args.decoder.startswith("llava-1.5"):
            best = max((n for n in rates if "@" in n), key=lambda n: of_stock[n])
            bar(f"requests/s of {best}, of stock's", of_stock[best], 3, least=True)


LOAD_FLAGS = ("decoder", "dtype", "requests", "at_once", "tokens", "attention_backend")
"""What engines of ``load`` must know."""


# --- tower --------------------------------------------------------------------------------------


def tower(args: argparse.Namespace) -> None:
    """Tower and projector as vLLM calls them, with events around a call and nothing inside."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    from vllm_ficoco.packed import PACKED_FIELD, pack
    from vllm_ficoco.settings import Reduction
    from vllm_ficoco.vision.geometry import geometry_of

    on_gpu = gpu()
    size = ({}, {}) if args.small else (CLIP_L, decoder(4, 1024, 2816, 16))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), *size)
        options: dict[str, Any] = {"block_size": 32, "enforce_eager": True}
        if on_gpu:
            config = {**GRAPHS["compilation_config"], "cudagraph_mm_encoder": True}
            declared = [f"{method}@{args.budget}" for method in args.methods]
            options = {
                "compilation_config": config,
                "hf_overrides": {"reduction_graphs": declared},
                "gpu_memory_utilization": 0.5,
            }
        llm = LLM(
            model=folder,
            dtype=args.dtype,
            load_format="dummy",
            max_model_len=1024,
            max_num_seqs=8,
            max_num_batched_tokens=576 * max(args.batch) + 64,
            enable_prefix_caching=False,
            **options,
        )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model = runner.model
    place = geometry_of(model.config)
    side = model.config.vision_config.image_size
    where = next(model.parameters()).device
    # On Model Runner V2 the first, on V1 the second.
    encoder = getattr(getattr(runner, "model_state", None), "encoder_runner", None)
    graphs = getattr(encoder, "cudagraph_manager", None)
    graphs = graphs or getattr(runner, "encoder_cudagraph_manager", None)
    if graphs is None:
        assert not on_gpu, "no CUDA graphs of the encoder"
        print("skipped, needs a GPU: CUDA graphs of the tower")
    kinds: dict[str, Reduction | None] = {"off": None}
    for method in args.methods:
        kinds[f"{method}@{args.budget}"] = Reduction(method=method, budget=args.budget)

    def seconds(run: Callable[[], Any]) -> float:
        if not on_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()  # behind what is timed
        return begin.elapsed_time(end) / 1000

    print(f"{place.tokens} tokens, {args.dtype}, {args.rounds} rounds in turns; ms a batch\n")
    print("| images | setting | without graphs | of vLLM's | in graphs | of vLLM's |")
    print("| --- | --- | --- | --- | --- | --- |")
    shares: dict[str, float] = {}
    apart: dict[str, float] = {}
    for batch in args.batch:
        pixels = torch.randn(batch, 3, side, side, device=where).to(getattr(torch, args.dtype))
        runs: dict[tuple[str, bool], Callable[[], Any]] = {
            ("vLLM", False): lambda pixels=pixels: LlavaForConditionalGeneration.embed_multimodal(
                model, pixel_values=pixels
            )
        }
        for name, reduction in kinds.items():
            given = {"pixel_values": pixels, PACKED_FIELD: [pack(reduction)] * batch}
            runs[name, False] = lambda given=given: model.embed_multimodal(**given)
            if graphs is not None:
                runs[name, True] = lambda given=given: graphs.execute(dict(given))
        times: dict[tuple[str, bool], list[float]] = {run: [] for run in runs}
        with torch.inference_mode():
            for name in kinds if graphs is not None else ():
                pairs = [*zip(runs[name, False](), runs[name, True](), strict=True)]
                apart[name] = max(float((a - b).abs().max() / b.std()) for a, b in pairs)
            for number in range(args.rounds + 2):
                for run, call in runs.items():
                    taken = seconds(call)
                    if number > 1:
                        times[run].append(taken)
        stock = median(times["vLLM", False])
        for name in ("vLLM", *kinds):
            cells = []
            for graphed in (False, True):
                found = times.get((name, graphed))
                cells += (
                    ["", ""]
                    if found is None
                    else [f"{1000 * median(found):.3f}", f"{median(found) / stock:.3f}"]
                )
                if found is not None and batch == max(args.batch) and name != "vLLM":
                    shares[f"{name}{', in graphs' if graphed else ''}"] = median(found) / stock
            print(f"| {batch} | {name} | {' | '.join(cells)} |")
    print()
    if on_gpu:
        for name, difference in apart.items():
            bar(f"{name}: largest difference in graphs, by the deviation", difference, 0.05)
        for name, share in shares.items():
            bar(f"{name}: tower of {max(args.batch)} images, of vLLM's", share, 1.05)


# --- server -------------------------------------------------------------------------------------


def server(args: argparse.Namespace) -> None:
    """``vllm-ficoco serve`` with random weights, and the load test against it."""
    url = f"http://127.0.0.1:{args.port}"
    kind = family(args.decoder)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), *geometry(args.decoder), kind)
        command = [sys.executable, "-m", "ficoco_server.cli", "serve", folder]
        command += ["--load-format=dummy", f"--dtype={args.dtype}", f"--port={args.port}"]
        command += [f"--max-model-len={kind.context}", "--no-enable-prefix-caching"]
        process = subprocess.Popen([*command, *args.flags], stdout=sys.stderr)
        try:
            for _ in range(300):
                if process.poll() is not None:
                    sys.exit("the server ended")
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            test = [sys.executable, "-m", "loadtest", f"--base-url={url}"]
            test += [f"--methods={','.join(args.methods)}", f"--budgets={args.budgets}"]
            test += [f"--image-size={kind.side}", f"--concurrency={args.concurrency}"]
            test += [f"--requests={args.requests}", "--repeat=1", "--output-tokens=32"]
            if subprocess.run([*test, f"--out={args.folder}"], check=False).returncode:
                missed.append("load test")
        finally:
            process.terminate()
            process.wait(120)


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between."""
    return [int(n) for n in text.split(",") if n]


def names(text: str) -> list[str]:
    """Words with commas between."""
    return [name for name in text.split(",") if name]


def main(arguments: Sequence[str] | None = None) -> None:
    """``python benchmarks/gpu.py``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    steps = ("device", "metadata", "agree", "load", "tower", "server", "agree-child", "load-child")
    add = parser.add_argument
    add("step", choices=steps, metavar="{device,agree,load,tower,server,metadata}")
    add(
        "folder", nargs="?", help="metadata: where to write it; server: for the load test's figures"
    )
    add("--decoder", default="llava-1.5-7b", help="a geometry of benchmarks/engines.py, or shipped")
    add("--dtype", default="bfloat16")
    add("--methods", type=names, default=["score"], help="with commas")
    add("--small", action="store_true", help="for a CPU: smaller, and without a GPU's part")
    add("--budget", type=int, default=64, help="tower")
    add("--budgets", default="576,192,64", help="server")
    add("--batch", type=numbers, default=[1, 8], help="tower: images, with commas")
    add("--rounds", type=int, default=3)
    add("--requests", type=int, default=96, help="load, server: of a run")
    add("--at-once", type=int, default=32, help="load")
    add("--concurrency", default="1,32", help="server")
    add("--tokens", type=int, default=4, help="load: of every answer")
    add("--attention-backend", default="FLASH_ATTN", help="load: of both engines")
    add("--alone", action="store_true", help="load: engines one after another, of large models")
    add("--port", type=int, default=8123, help="server")
    add("--flags", nargs="*", default=[], help="server: more of them")
    add("--memory", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    environment()
    run: dict[str, Callable[[], None]] = {
        "device": lambda: device(args.small),
        "metadata": lambda: metadata(Path(args.folder)),
        "agree": lambda: agree(args.small),
        "agree-child": lambda: agree_child(Path(args.folder), args.small),
        "load": lambda: load(args),
        "load-child": lambda: load_child(args),
        "tower": lambda: tower(args),
        "server": lambda: server(args),
    }
    run[args.step]()
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    main()

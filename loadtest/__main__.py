# SPDX-License-Identifier: Apache-2.0
"""Load test of a server with visual token budgets.

    python -m loadtest --base-url http://127.0.0.1:8000 --methods score --budgets 144,48,16

Every setting at every concurrency, in turns, with images (or videos: ``--videos 16``) that no cache
has seen and answers of a fixed length; /metrics is read meanwhile, and a server that kept another
number of visual tokens than asked is an error. Each run is a line in ``runs.jsonl`` at once: Ctrl-C
leaves what was measured, and the same command goes on. Report and pictures are made from all lines.
``python -m loadtest plan`` says from them how many replicas traffic needs.

Needs the package's extra ``eval``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tqdm import tqdm

from loadtest import replicas
from loadtest.bench import Load, send
from loadtest.report import write
from loadtest.traffic import FULL, Mix, Setting, messages
from loadtest.watch import NotKept, Watch, check, client

PERCENTILES = (50, 90, 99)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m loadtest", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--base-url", required=True, help="of the server; /v1 may be left out")
    add("--model", help="its name there; the first one by default")
    add("--methods", default="score", help="with commas")
    add("--budgets", default="576,192,128,64",
        help="with commas; an image's own number: unreduced; '': mixes alone")  # fmt: skip
    add("--mix", action="append", default=[], type=Mix.parse, metavar="text=1,none=2,score@64=4",
        help="mixed traffic, settings by weight, or `default` for requests that say nothing; "
             "may be given several times")  # fmt: skip
    add("--concurrency", default="1,4,16,32,64", help="requests under way at once, with commas")
    add("--rate", type=float, default=math.inf, help="requests per second that arrive")
    add("--burstiness", type=float, default=1.0, help="of --rate: 1 is Poisson, less is in bursts")
    add("--disconnects", type=float, default=0.0, help="clients per second that leave early")
    add("--requests", type=int, default=64, help="of each run")
    add("--output-tokens", type=int, default=32, help="of every answer")
    add("--image-size", type=int, default=336, help="pixels")
    add("--videos", type=int, default=0, metavar="FRAMES",
        help="videos of so many frames (and pixels) in place of images")  # fmt: skip
    add("--repeat", type=int, default=3, help="runs of every setting")
    add("--goodput", nargs="*", default=[], metavar="ttft:500", help="ttft, tpot, e2el within ms")
    add("--accuracy", type=Path, help="results.json of benchmarks/accuracy.py, to plot against")
    add("--note", default="", help="goes into every line: hardware, flags of the server")
    add("--out", type=Path, default=Path("reports/loadtest"))
    args = parser.parse_args(arguments)
    args.base_url = args.base_url.rstrip("/").removesuffix("/v1")
    try:
        args.concurrency = [int(n) for n in args.concurrency.split(",")]
        args.budgets = [int(n) for n in args.budgets.split(",") if n]
        args.goodput = {k: float(v) for k, v in (slo.split(":") for slo in args.goodput)}
    except ValueError as error:
        parser.error(str(error))
    if any(len(mix.parts) > args.requests for mix in args.mix):
        parser.error(f"--requests {args.requests} are fewer than the settings of a --mix")
    if max(args.concurrency) > args.requests and math.isinf(args.rate):
        parser.error(
            f"--requests {args.requests} cannot be --concurrency {max(args.concurrency)} at once"
        )
    if args.goodput.keys() - {"ttft", "tpot", "e2el"}:
        parser.error("--goodput knows ttft, tpot and e2el")
    if args.accuracy and not args.accuracy.exists():
        parser.error(f"--accuracy {args.accuracy} is not there")
    return args


def mixes(args: argparse.Namespace, visual_tokens: int) -> list[Mix]:
    """All that is to be measured: every method at every budget, then mixed traffic."""

    def asked(setting: Setting) -> Setting:
        whole = setting.budget is not None and setting.budget >= visual_tokens
        return Setting(FULL) if whole else setting

    settings = [
        asked(Setting(method, budget))
        for method in args.methods.split(",")
        for budget in args.budgets
    ]
    mixed = [Mix(tuple((asked(one), weight) for one, weight in mix.parts)) for mix in args.mix]
    return [Mix(((setting, 1.0),)) for setting in dict.fromkeys(settings)] + mixed


async def about(http: httpx.AsyncClient, side: int, frames: int = 0) -> dict[str, Any]:
    """What the server is, and how many visual tokens it makes of images, or videos, of so many
    pixels."""
    answers = {}
    for name, path in (("reduction", "/v1/reduction"), ("version", "/version")):
        answer = await http.get(path)
        if answer.status_code != 200:
            raise SystemExit(f"{http.base_url}{path} says {answer.status_code}: is it our server?")
        answers[name] = answer.json()
    model = answers["reduction"]["model"]
    if not model["supported"]:
        raise SystemExit(f"the server cannot reduce visual tokens: {model['reason']}")
    if frames and "video" not in model["modalities"]:
        raise SystemExit("the server cannot reduce videos")
    fixed = model["layout"] == "fixed"
    return {
        "model": model["id"],
        "visual_tokens": model["visual_tokens"] if fixed else await tokens_of(http, side, frames),
        "decoder_stages": model["decoder_stages"],
        "kv_block_size": model["kv_block_size"],
        "in_decoder": [m["name"] for m in answers["reduction"]["methods"] if m["decoder_stages"]],
        "scaling": [m["name"] for m in answers["reduction"]["methods"] if "input" in m["places"]],
        "kv_cache_bytes_per_token": model["kv_cache_bytes_per_token"],
        "vllm": answers["version"]["version"],
    }


async def tokens_of(http: httpx.AsyncClient, side: int, frames: int) -> int:
    """How many visual tokens an image or a video has, by the report of a request with one."""
    said = messages(Setting("any"), side, [time.time_ns()], frames)
    body = {"messages": said, "max_tokens": 1}
    answer = await http.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    tokens: int = answer.json()["reduction"]["visual_tokens_before"]
    return tokens


async def disconnect(
    http: httpx.AsyncClient, model: str, mix: Mix, load: Load, rate: float
) -> None:
    """Clients that go away after their first token, so many per second, until this is cancelled."""
    lot = random.Random()

    async def come_and_go() -> None:
        settings, weights = zip(*mix.parts, strict=True)
        setting = lot.choices(settings, weights)[0]
        said = messages(setting, load.side, [lot.randrange(2**32)], load.frames)
        long = {"max_tokens": 64, "ignore_eos": True}  # it must not end before the client leaves
        body = {"model": model, "messages": said, "stream": True, **long, **setting.body}
        with contextlib.suppress(httpx.TransportError):
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                async for _ in answer.aiter_bytes():
                    break

    async with asyncio.TaskGroup() as clients:  # all of them end with this one
        while True:
            await asyncio.sleep(lot.expovariate(rate))
            clients.create_task(come_and_go())


def timings(result: dict[str, Any], rate: float) -> list[dict[str, float]]:
    """Milliseconds of each request that succeeded, from its arrival.

    Where requests arrive at a rate, that may be before one of the places was free.
    """
    names = ("ttfts", "latencies", "queue_times", "output_lens", "errors")
    rows = []
    for first, total, queued, tokens, error in zip(*(result[n] for n in names), strict=True):
        if not error:
            waited = queued if math.isfinite(rate) else 0.0
            row = {"ttft": 1000 * (first + waited), "e2el": 1000 * (total + waited)}
            if tokens > 1:
                row["tpot"] = 1000 * (total - first) / (tokens - 1)
            rows.append(row)
    return rows


def figures(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    values = {name: [r[name] for r in rows if name in r] for name in ("ttft", "tpot", "e2el")}
    return {
        f"p{p}_{name}_ms": round(float(np.percentile(some, p)), 3)
        for name, some in values.items()
        for p in PERCENTILES
        if some
    }


def goodput(
    rows: Sequence[dict[str, float]], objectives: dict[str, float], seconds: float
) -> float | None:
    """Requests a second that met all objectives, in milliseconds; None where there are none."""
    good = [all(row.get(name, 0.0) <= most for name, most in objectives.items()) for row in rows]
    return round(sum(good) / seconds, 4) if objectives else None


async def measure(
    http: httpx.AsyncClient, args: argparse.Namespace, server: dict[str, Any], mix: Mix, load: Load
) -> dict[str, Any]:
    """One run, and its line.

    Raises:
        NotKept: the server kept something else than asked for.
        RuntimeError: requests failed.
    """
    seed = [time.time_ns()]
    settings = mix.draw(args.requests, args.requests)
    watch = Watch(http)
    await watch.idle()
    async with watch.watching():
        gone = (
            asyncio.create_task(disconnect(http, server["model"], mix, load, args.disconnects))
            if args.disconnects
            else None
        )
        result = await send(args.base_url, server["model"], settings, load, seed)
        if gone is not None:
            gone.cancel()
            await asyncio.wait([gone])
    if result["failed"]:
        error = next(error for error in result["errors"] if error).strip()
        raise RuntimeError(f"{result['failed']} of {len(settings)} requests failed: {error}")
    rows = timings(result, load.rate)
    summary = watch.summary()
    check(
        summary["visual_tokens_kept"],
        mix,
        server["visual_tokens"],
        server["in_decoder"],
        server["kv_block_size"],
        server["scaling"],
    )
    return {
        "requests": len(settings),
        "duration_s": round(result["duration"], 3),
        "requests_per_s": round(result["request_throughput"], 4),
        "output_tokens_per_s": round(result["output_throughput"], 3),
        "goodput_per_s": goodput(rows, args.goodput, result["duration"]),
        **figures(rows),
        "watch": summary,
    }


def plan(args: argparse.Namespace, what: Sequence[Mix]) -> Iterator[tuple[int, int, Mix]]:
    """(round, concurrency, mix): each setting once a round, in an order that turns."""
    for number in range(args.repeat):
        for concurrency in args.concurrency:
            turned = [*what[number % len(what) :], *what[: number % len(what)]]
            for mix in turned:
                yield number, concurrency, mix


async def run(args: argparse.Namespace) -> None:
    """Everything that is not there yet."""
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "runs.jsonl"
    async with client(args.base_url) as http:
        server = await about(http, args.image_size, args.videos)
        if args.model:
            server["model"] = args.model
        conditions = {
            **{k: value for k, value in server.items() if k not in ("in_decoder", "scaling")},
            "rate": args.rate if math.isfinite(args.rate) else None,
            "burstiness": args.burstiness,
            "disconnects": args.disconnects,
            "output_tokens": args.output_tokens,
            "image_size": args.image_size,
            **({"video_frames": args.videos} if args.videos else {}),
            "requests_a_run": args.requests,
            "goodput": args.goodput,
            "note": args.note,
        }
        text = file.read_text() if file.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        if any(line["conditions"] != conditions for line in lines):
            raise SystemExit(f"{file} is of other conditions: choose another --out")
        there = {(line["round"], line["concurrency"], line["setting"]) for line in lines}
        what = mixes(args, server["visual_tokens"])
        todo = [row for row in plan(args, what) if (row[0], row[1], str(row[2])) not in there]
        shape = (args.rate, args.burstiness, args.output_tokens, args.image_size, args.videos)
        warm: set[str] = set()
        with tqdm(todo, unit="run") as bar, file.open("a") as out:
            for number, concurrency, mix in bar:
                bar.set_description(f"{mix} x {concurrency}")
                load = Load(concurrency, *shape)
                if str(mix) not in warm:  # not measured: what a first request makes a server set up
                    first = mix.draw(max(*args.concurrency, len(mix.parts)), 0)
                    hot = Load(max(args.concurrency), *shape)
                    await send(args.base_url, server["model"], first, hot, [time.time_ns()])
                    warm.add(str(mix))
                measured = await measure(http, args, server, mix, load)
                line = {
                    "setting": str(mix),
                    "concurrency": concurrency,
                    "round": number,
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "client": platform.platform(),
                    "conditions": conditions,
                    **measured,
                }
                out.write(json.dumps(line) + "\n")
                out.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m loadtest``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["plan"]:
        return replicas.main(arguments[1:])
    args = parse(arguments)
    try:
        asyncio.run(run(args))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
    except (NotKept, RuntimeError, httpx.HTTPError) as error:
        raise SystemExit(f"loadtest: {error}") from error
    finally:
        if (args.out / "runs.jsonl").exists():
            print(write(args.out, args.accuracy))


if __name__ == "__main__":
    main()

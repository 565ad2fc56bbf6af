# SPDX-License-Identifier: Apache-2.0
"""Sends requests with the load generator that comes with vLLM, ``vllm bench serve``.

The only file here that knows vLLM, which it imports when something is to be sent. It calls the
function behind that command, not the command, because each request has its own settings, and
because the command takes longer to start than many a run takes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from loadtest.traffic import Setting, messages


class Load(NamedTuple):
    """How requests are sent."""

    concurrency: int
    rate: float
    """Requests per second; infinite for one after another at each of the places."""
    burstiness: float
    """1 for a Poisson process, less for bursts."""
    output_tokens: int
    """Of every answer; the end-of-text token is ignored."""
    side: int
    """Pixels of an image."""
    frames: int = 0
    """Of a video in place of the image."""


async def send(
    url: str, model: str, settings: Sequence[Setting], load: Load, seed: Sequence[int]
) -> dict[str, Any]:
    """One request for every setting.

    Args:
        url: of the server, without /v1.
        model: its name there.
        settings: of the requests.
        load: how to send them.
        seed: of the images, which are all different.

    Returns:
        vLLM's result: lists of ``ttfts``, ``latencies``, ``queue_times``, ``output_lens``,
        ``errors`` by request, and ``completed``, ``failed``, ``duration``, ...
    """
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    requests = [
        SampleRequest(
            prompt="",
            prompt_len=0,
            expected_output_len=load.output_tokens,
            request_id=f"load-{'-'.join(map(str, seed))}-{number}",
            chat_messages=messages(setting, load.side, [*seed, number], load.frames),
            request_overrides=setting.body,
        )
        for number, setting in enumerate(settings)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a report; ours has all runs
        return await benchmark(
            task_type=TaskType.GENERATION,
            endpoint_type="openai-chat",
            api_url=f"{url}/v1/chat/completions",
            base_url=url,
            model_id=model,
            model_name=model,
            tokenizer=None,  # the server says how many tokens it made
            input_requests=requests,
            logprobs=None,
            request_rate=load.rate,
            burstiness=load.burstiness,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=[],
            selected_percentiles=[],
            ignore_eos=True,
            goodput_config_dict={},
            max_concurrency=load.concurrency,
            lora_modules=None,
            extra_headers=None,
            extra_body={"temperature": 0},
            ready_check_timeout_sec=0,
        )

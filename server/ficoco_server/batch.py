# SPDX-License-Identifier: Apache-2.0
"""vLLM's ``run-batch``, a file of requests, with our requests and handlers in it.

vLLM's runner takes no plugin: it drops what its schema does not know, and one line that breaks the
schema ends the run. Here a line of chat completions is what a request to our server is, and is
refused alone; the endpoints, the form of the files and the rest are vLLM's.
"""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any

from prometheus_client import start_http_server
from pydantic import field_validator
from pydantic_core.core_schema import ValidationInfo
from starlette.datastructures import State
from vllm.entrypoints.launchers import run_batch as vllm_batch
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.serve import create_error_response
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry

from ficoco_server.protocol import ChatRequest
from ficoco_server.serving import install

CHAT = "/v1/chat/completions"
# Of vLLM's registry; all but the first need models of other kinds than ours.
URLS = (
    CHAT,
    "/v1/embeddings",
    "/score",
    "/rerank",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)


class Line(vllm_batch.BatchRequestInput):
    """A line of the input."""

    @field_validator("body", mode="plain")
    @classmethod
    def check_type_for_url(cls, value: Any, info: ValidationInfo) -> Any:
        """The body as the request that its URL says: ours for chat completions."""
        if info.data.get("url") == CHAT:
            return ChatRequest.model_validate(value)
        return vllm_batch.BatchRequestInput.check_type_for_url(value, info)


def run(args: Namespace) -> None:
    """Answer the input file of vLLM's arguments into the output file."""
    if args.enable_metrics:
        address = args.host or args.url
        start_http_server(port=args.port, addr=address, registry=get_prometheus_registry())
    asyncio.run(_run(args))


async def _run(args: Namespace) -> None:
    vllm_batch.validate_run_batch_args(args)
    context = UsageContext.OPENAI_BATCH_RUNNER
    async with build_async_engine_client(args, usage_context=context) as engine_client:
        endpoints = await vllm_batch.build_endpoint_registry(engine_client, args)
        create = endpoints["completions"]["handler_getter"]()
        if create is not None:  # a model that generates
            state = State({"openai_serving_chat": create.__self__})
            install(engine_client, state)
            ours = state.openai_serving_chat.create_chat_completion
            endpoints["completions"]["handler_getter"] = lambda: ours
        tracker = vllm_batch.BatchProgressTracker()
        text = await vllm_batch.read_file(args.input_file)
        work = [answer(line, endpoints, tracker) for line in text.split("\n") if line.strip()]
        with tracker.pbar():
            answers = await asyncio.gather(*work)
        await vllm_batch.write_file(args.output_file, answers, args.output_tmp_dir)
        if engine_client.errored:
            raise EngineDeadError


def answer(
    text: str, endpoints: dict[str, dict[str, Any]], tracker: Any
) -> Awaitable[vllm_batch.BatchRequestOutput]:
    """What will be the output of a line.

    Args:
        text: the line.
        endpoints: vLLM's registry, keyword arguments of its ``handle_endpoint_request``.
        tracker: vLLM's, told of lines that run.
    """
    try:
        line = Line.model_validate_json(text)
    except Exception as error:
        return _refuse(text, error)
    if getattr(line.body, "stream", None):
        # vLLM says the same, but after the prompt has been rendered, for nothing.
        message = "Request must not be sent in stream mode"
        return vllm_batch.make_async_error_request_output(line, message)
    for endpoint in endpoints.values():
        output = vllm_batch.handle_endpoint_request(line, tracker, **endpoint)
        if output is not None:
            return output
    message = f"URL {line.url} was used. Supported endpoints: {', '.join(URLS)}."
    return vllm_batch.make_async_error_request_output(line, message)


async def _refuse(text: str, error: Exception) -> vllm_batch.BatchRequestOutput:
    """The output of a line that is not what it should be, named if it has a name."""
    try:
        name = json.loads(text)["custom_id"]
    except (ValueError, TypeError, KeyError):
        name = ""
    # As vLLM words it, whose schema takes a number for no name.
    line = SimpleNamespace(custom_id=name if isinstance(name, str) else json.dumps(name))
    output = vllm_batch.make_error_request_output(line, "")
    output.error = create_error_response(error)
    output.response.status_code = output.error.error.code
    return output

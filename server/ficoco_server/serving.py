# SPDX-License-Identifier: Apache-2.0
"""The adapter to vLLM's handlers: settings in before a prompt is rendered, the report out with it.

Our classes take over the state of the handlers that vLLM has built, so that they do not depend on
how those are constructed. A request that did not come through our routes runs as in vLLM.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing
from copy import copy
from typing import Any, TypeVar

import vllm.envs as envs
from openai.types.responses import ResponseOutputMessage
from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, PromptTokenUsageInfo
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.renderers.chat_utils import parse_chat_messages_async
from vllm.renderers.online_renderer import OnlineRenderer

from ficoco_server.load import busy, watch
from ficoco_server.media import load_images_with_ours
from ficoco_server.metrics import LOWERED
from ficoco_server.plugin import MODEL_PLUGIN, NAME
from ficoco_server.policy import Policy, PolicyError
from ficoco_server.preview import Previews, obstacle, shown
from ficoco_server.protocol import ReductionFields, modality_of
from ficoco_server.reducer import Reducer, reported
from ficoco_server.scale_out import ReductionTokens
from ficoco_server.sent import remember_what_is_sent
from vllm_ficoco.engine.checks import SCHEDULER
from vllm_ficoco.models.processing import SIZES_KEY, RefusedImage, RefusedPositions
from vllm_ficoco.preview import PREVIEW_KEY
from vllm_ficoco.settings import MODALITIES, REDUCTION_KEY, OfLadder, SettingsError
from vllm_ficoco.vision.geometry import GRAPHS_KEY, STAGES_KEY

T = TypeVar("T")


def install(engine_client: Any, state: Any) -> None:
    """Put our handlers over vLLM's in the state of its server.

    Raises:
        PolicyError: the server must not start like this.
    """
    # Endpoint plugins load only if VLLM_PLUGINS names them, so it is set; the model plugin is
    # then needed in it as well, or budgets would reach a model that does not know them.
    if MODEL_PLUGIN not in (envs.VLLM_PLUGINS or [MODEL_PLUGIN]):
        raise PolicyError(f"VLLM_PLUGINS names {NAME} but not {MODEL_PLUGIN}: it needs both")
    processor = engine_client.renderer.mm_processor
    # vLLM lets a step encode as much as its encoder cache holds, and of one image or video all.
    room = engine_client.input_processor.mm_encoder_cache_size
    policy = Policy.from_environment()
    reducer = Reducer(engine_client.vllm_config, policy, processor, room)
    reducer.pressure = watch(engine_client, policy)
    LOWERED.labels(policy.default_method)  # from the start, or a first increase would not be seen
    _check_stages(os.environ.get("FICOCO_STAGES", ""), reducer.geometry.starts)
    _check_graphs(policy, engine_client.vllm_config.model_config.hf_config)
    chat = state.openai_serving_chat
    renderer = _adopt(ReductionRenderer, chat.online_renderer)
    renderer.reducer = reducer
    renderer.trusting = copy(chat.online_renderer)
    renderer.trusting.trust_request_mm_kwargs = True
    remember_what_is_sent(engine_client)
    load_images_with_ours()
    state.openai_serving_chat = _adopt(ReductionChat, chat)
    state.openai_serving_chat.online_renderer = renderer
    if hasattr(state, "openai_serving_responses"):  # not in a batch
        state.openai_serving_responses = _adopt(ReductionResponses, state.openai_serving_responses)
        state.openai_serving_responses.online_renderer = renderer
    if (tokens := getattr(state, "serving_tokens", None)) is not None:
        state.serving_tokens = _adopt(ReductionTokens, tokens)
        state.serving_tokens.reducer = reducer
    reducer.no_previews = obstacle(engine_client.vllm_config, reducer)
    state.ficoco = reducer
    no_time = (lambda: True) if reducer.no_previews else busy(engine_client, reducer.pressure)
    state.ficoco_previews = Previews(reducer, engine_client, no_time)


def _check_stages(said: str, starts: Sequence[int]) -> None:
    """Refuse to run without the stages that the environment names: our command alone reads them."""
    stages = ",".join(map(str, starts))
    if said and said.replace(" ", "") != stages:
        raise PolicyError(
            f"FICOCO_STAGES={said}, but the decoder's stages are {stages or 'none'}: only "
            f"`vllm-ficoco serve` reads it; with `vllm serve`, give --scheduler-cls {SCHEDULER} "
            f"--hf-overrides '{{\"{STAGES_KEY}\": [{said}]}}' (and on a CPU --block-size 32)"
        )


def _check_graphs(policy: Policy, config: Any) -> None:
    """Refuse to run where the engine has not heard of FICOCO_GRAPHS: our command alone reads it."""
    if policy.graphs and not hasattr(config, GRAPHS_KEY):
        said = json.dumps({GRAPHS_KEY: policy.graphed()})
        raise PolicyError(
            f"FICOCO_GRAPHS={','.join(policy.graphs)}, but the engine does not know: only "
            f"`vllm-ficoco` reads it; with `vllm serve`, give --hf-overrides '{said}'"
        )


def _adopt(cls: type[T], original: Any) -> T:
    """An object of our class with the state of vLLM's."""
    ours = cls.__new__(cls)
    ours.__dict__.update(original.__dict__)
    return ours


class ReductionRenderer(OnlineRenderer):
    """Hands the settings of a request to the multimodal processor, and checks what it made."""

    reducer: Reducer
    trusting: OnlineRenderer
    """vLLM's renderer, which lets kwargs pass: those of clients are checked before."""

    async def preprocess_chat(
        self, request: Any, messages: Any, *args: Any, **kwargs: Any
    ) -> tuple[list[Any], list[Any]]:
        """As in vLLM; chat completions and responses both render their prompts here."""
        if not _is_ours(request):
            return await super().preprocess_chat(request, messages, *args, **kwargs)
        pressure = self.reducer.pressure
        with pressure.entering():
            if request._lowers is None:  # once, even if its prompt is rendered again after a tool
                request._lowers = pressure.look()
            try:
                return await self._preprocess(request, messages, *args, **kwargs)
            except VLLMValidationError:
                waiting = (isinstance(image.reduction, OfLadder) for image in request._settled)
                if not request._lowers or not any(waiting):
                    raise
            # Nothing is refused for the load. The method that reduces what would have stayed whole
            # may not go with what else the request wants.
            request._lowers = False
            return await self._preprocess(request, messages, *args, **kwargs)

    async def _preprocess(
        self, request: Any, messages: Any, *args: Any, **kwargs: Any
    ) -> tuple[list[Any], list[Any]]:
        try:
            settings = self.reducer.settle(request, messages)
        except VLLMValidationError as refused:
            try:
                whole = self.reducer.geometry.videos == "whole"  # perhaps the model takes none
                known = ("image",) if whole else MODALITIES
                await _check_parts(messages, self.model_config, known)
            except (VLLMClientError, ValueError):
                raise
            except Exception:  # a video that does not come, say
                raise refused from None
            raise
        request._seen.expect(settings)
        theirs = request.mm_processor_kwargs
        if any(settings) or request._mark:
            validate_request_mm_kwargs(
                mm_processor_kwargs=theirs,
                media_io_kwargs=request.media_io_kwargs,
                trust_request_mm_kwargs=self.trust_request_mm_kwargs,
            )
            # As they are: what waits for the image has no form that a client could send.
            said = self.reducer.by_modality(request, settings)
            mark = {PREVIEW_KEY: request._mark} if request._mark else {}
            request.mm_processor_kwargs = {**(theirs or {}), REDUCTION_KEY: said, **mark}
            render = self.trusting.preprocess_chat
        else:
            render = super().preprocess_chat
        try:
            rendered = await render(request, messages, *args, **kwargs)
        except RefusedImage as refused:
            raise self.reducer.refused(request, refused) from None
        except RefusedPositions as refused:
            raise self.reducer.too_far(request, refused) from None
        except AssertionError as error:  # vLLM has not found an image's place in the prompt
            cut = _cut_off(request) if settings else None
            raise cut or error from error
        finally:
            request.mm_processor_kwargs = theirs
        (engine_input,) = rendered[1]
        images, seen = request._settled, request._seen  # pydantic looks for what is private, long
        embeds = [image.embeds for image in images]
        settings = self.reducer.fit(request, engine_input)
        seen.expect(settings)
        self.reducer.refuse_too_long(request, settings, embeds, engine_input)
        self.reducer.refuse_too_many(request, settings, embeds, engine_input)
        asked = [image.reduction for image in images]
        report = self.reducer.report(settings, embeds, engine_input, asked)
        request._report = report
        if request._mark:
            request._shown = shown(self.reducer, engine_input, SIZES_KEY)
        seen.describe(
            self.reducer.prefilled(report),
            any("lowered_by" in image for _, image in reported(report)),
        )
        return rendered

    async def render_responses(self, request: Any, **kwargs: Any) -> Any:
        """As in vLLM, which takes for granted that an earlier answer begins with text."""
        for i, item in enumerate(request.input if isinstance(request.input, list) else ()):
            if not isinstance(item, ResponseOutputMessage):
                continue
            if not hasattr(next(iter(item.content), None), "text"):
                said = [part.model_dump() for part in item.content[:1]]
                raise _refused(f"input[{i}].content", said, "a list that begins with text")
        return await super().render_responses(request, **kwargs)


class ReductionChat(OpenAIServingChat):
    """vLLM's chat completions with the report in the answer, and observed for the metrics."""

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        """As in vLLM."""
        work = super().create_chat_completion(request, raw_request)
        if not _is_ours(request):
            return await work
        return await request._seen.watch(_refuse_harmony(self, request, work))

    async def chat_completion_full_generator(
        self, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The answer in one piece."""
        full = super().chat_completion_full_generator
        if not _is_ours(request):
            return await full(request, result_generator, *args, **kwargs)
        seen = request._seen
        results = seen.results(result_generator, streaming=False)
        response = await seen.watch(full(request, results, *args, **kwargs))
        if not isinstance(response, ErrorResponse):
            if report := request._report:
                response.reduction = report
                details = response.usage.prompt_tokens_details or PromptTokenUsageInfo()
                response.usage.prompt_tokens_details = PromptTokenUsageInfo(
                    **_with_visual(details.model_dump(), report)
                )
            seen.finish("success")
        return response

    def chat_completion_stream_generator(
        self, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        """The answer in chunks; the last one before [DONE] bears the report, among others."""
        stream = super().chat_completion_stream_generator
        if not _is_ours(request):
            return stream(request, result_generator, *args, **kwargs)
        results = request._seen.results(result_generator, streaming=True)
        return _with_report(request, stream(request, results, *args, **kwargs))


class ReductionResponses(OpenAIServingResponses):
    """vLLM's responses API with the report in the response, and observed for the metrics."""

    async def create_responses(self, request: Any, raw_request: Any = None) -> Any:
        """As in vLLM."""
        work = super().create_responses(request, raw_request)
        if not _is_ours(request):
            return await work
        return await request._seen.watch(_refuse_harmony(self, request, work))

    async def responses_full_generator(
        self,
        request: Any,
        sampling_params: Any,
        result_generator: AsyncIterator[Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The response in one piece; a stream makes its last event of it too."""
        full = super().responses_full_generator
        if not _is_ours(request):
            return await full(request, sampling_params, result_generator, *args, **kwargs)
        seen = request._seen
        results = seen.results(result_generator, streaming=bool(request.stream))
        response = await seen.watch(full(request, sampling_params, results, *args, **kwargs))
        if not isinstance(response, ErrorResponse):
            if request._report:
                response.reduction = request._report
                details = response.usage.input_tokens_details
                for name, figure in _figures(request._report).items():
                    setattr(details, name, figure)
            seen.finish("success")
        return response

    async def responses_stream_generator(
        self,
        request: Any,
        sampling_params: Any,
        result_generator: AsyncIterator[Any],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[Any, None]:
        """The response in events."""
        stream = super().responses_stream_generator
        ours = _is_ours(request)
        results = request._seen.results(result_generator, True) if ours else result_generator
        events = stream(request, sampling_params, results, *args, **kwargs)
        try:
            async with aclosing(events):
                async for event in events:
                    yield event
        except Exception:
            if ours:
                request._seen.finish("error")
            raise
        finally:
            if ours:  # what has ended well is counted by now
                request._seen.finish("error" if request._seen.failed else "cancelled")


def _is_ours(request: Any) -> bool:
    """Whether a request came through our routes."""
    return isinstance(request, ReductionFields)


def _cut_off(request: Any) -> VLLMValidationError | None:
    """Why a prompt that was to be cut short has lost an image; None where none was to be."""
    field = "truncate_prompt_tokens" if hasattr(request, "truncate_prompt_tokens") else "truncation"
    said = getattr(request, field)
    if said in (None, "disabled"):
        return None
    return _refused(
        field, said, "left out, or so large that all images and videos stay in the prompt"
    )


def _refused(field: str, value: object, allowed: str) -> VLLMValidationError:
    return VLLMValidationError(str(SettingsError(field, value, allowed)), parameter=field)


async def _check_parts(messages: Any, model_config: Any, known: Collection[str]) -> None:
    """Let vLLM refuse messages that it could not render, whatever is said of their images.

    A part of a form that it does not take is no image to us, which we would complain about. What is
    of a known modality is left out, so that it is not loaded.
    """
    empty = {"type": "text", "text": ""}
    without_known = [
        {**message, "content": [empty if modality_of(part) in known else part for part in content]}
        if (content := message.get("content")) and not isinstance(content, str)
        else message
        for message in messages
    ]
    await parse_chat_messages_async(without_known, model_config, content_format="string")


async def _refuse_harmony(handler: Any, request: ReductionFields, work: Any) -> Any:
    """Harmony models have a renderer of their own, without images: settings would be lost."""
    if handler.online_renderer.use_harmony:
        try:
            handler.online_renderer.reducer.settle(request, [])
        except VLLMValidationError:
            work.close()
            raise
    return await work


def _with_visual(details: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """``usage.prompt_tokens_details`` with the figures of a report."""
    by_modality = details.get("multimodal_tokens") or {}
    return {
        **details,
        "multimodal_tokens": {**by_modality, **_in_prompt(report)},
        **_figures(report),
    }


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report stands in the usage, too: gateways and clients drop other fields."""
    return {
        **{f"{modality}_tokens": count for modality, count in _in_prompt(report).items()},
        "reduction_method": report["method"],
        **{
            name: report[name]
            for name in ("visual_tokens_before", "visual_tokens_kept", "kv_cache_bytes_saved")
        },
    }


def _in_prompt(report: dict[str, Any]) -> dict[str, int]:
    """Visual tokens among those of the prompt, by modality: what enters the decoder."""
    tokens = Counter[str]()
    for modality, item in reported(report):
        by_stage = item.get("visual_tokens_by_stage", [item["visual_tokens_kept"]])
        tokens[modality] += by_stage[0]
    return dict(tokens)


async def _with_report(
    request: Any, chunks: AsyncGenerator[str, None]
) -> AsyncGenerator[str, None]:
    """The chunks of a stream, the report in the last one and in those with a finish_reason.

    Inside of a text these patterns cannot occur, because JSON escapes their quotation marks.
    """
    seen, report = request._seen, request._report
    failed = False
    try:
        async for chunk in chunks:
            failed = failed or chunk.startswith('data: {"error"')
            bears = '"finish_reason":"' in chunk or '"choices":[]' in chunk
            yield _add_report(chunk, report) if report and bears else chunk
        seen.finish("error" if failed or seen.failed else "success")
    finally:
        await chunks.aclose()
        seen.finish("cancelled")


def _add_report(chunk: str, report: dict[str, Any]) -> str:
    """A chunk with the report on it, and with the visual tokens in its usage where it has one."""
    data = json.loads(chunk.removeprefix("data: "))
    if data.get("usage"):
        details = data["usage"].get("prompt_tokens_details") or {}
        data["usage"]["prompt_tokens_details"] = _with_visual(details, report)
    data["reduction"] = report
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

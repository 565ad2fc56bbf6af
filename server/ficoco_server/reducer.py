# SPDX-License-Identifier: Apache-2.0
"""What one server knows about reductions: its policy, its model, and what a token costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from ficoco_server.metrics import INVALID, MIXED, Prefilled
from ficoco_server.policy import Policy
from ficoco_server.protocol import ReductionFields, count_images
from ficoco_server.resolve import Level, settle
from vllm_ficoco import schedule
from vllm_ficoco.cost import Decoder, prefill_flops_ratio
from vllm_ficoco.engine.checks import needs_whole_prompt
from vllm_ficoco.engine.gaps import Run, held_of
from vllm_ficoco.methods import METHODS
from vllm_ficoco.plugin import MODELS
from vllm_ficoco.settings import NO_REDUCTION, Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry, UnsupportedModel, geometry_of


class Reducer:
    """What is known at the start: the policy, the model's geometry and what a token costs."""

    def __init__(self, vllm_config: Any, policy: Policy) -> None:
        model = vllm_config.model_config
        self.policy = policy
        self.model_name = model.served_model_name
        self.block_size = vllm_config.cache_config.block_size
        self.encoder_tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.context: int = model.max_model_len
        self.geometry: Geometry | UnsupportedModel
        try:
            if model.architecture not in MODELS:
                raise UnsupportedModel(
                    f"visual tokens can be reduced in {', '.join(MODELS)}, not in "
                    f"{model.architecture}"
                )
            self.geometry = geometry_of(model.hf_config)
        except UnsupportedModel as error:
            self.geometry = error
        multimodal = model.multimodal_config
        self.shared_memory = multimodal and multimodal.mm_processor_cache_type == "shm"
        vision = getattr(model.hf_config, "vision_config", None)
        self.image_size: int = getattr(vision, "image_size", 0)
        policy.check_model(self.geometry)
        cache_dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model)
        text = model.hf_text_config
        # Of the whole model, however many ranks share it. Types below a byte count as one.
        self.decoder = Decoder(
            layers=model.get_total_num_hidden_layers(),
            hidden_size=model.get_hidden_size(),
            intermediate_size=getattr(text, "intermediate_size", 0) or 0,
            heads=getattr(text, "num_attention_heads", 0) or 0,
            kv_heads=model.get_total_num_kv_heads(),
            head_size=model.get_head_size(),
            kv_bytes_per_element=cache_dtype.itemsize,
        )

    def settle(self, request: ReductionFields, messages: Any) -> list[Reduction | None]:
        """The settings of every image of a request.

        Args:
            request: with what was said on it and on its images.
            messages: as they will be rendered; they may begin with those of earlier turns, whose
                images follow the request.

        Raises:
            VLLMValidationError: they cannot be used.
        """
        try:
            self._refuse_hidden(request)
            images = request._asked.images
            earlier = max(count_images(messages) - len(images), 0)
            settings = settle(
                self.policy, request.level, [Level()] * earlier + [*images], self.geometry
            )
            if any(r and r.spec.decoder for r in settings):
                _refuse_prompt_logprobs(request)
            return settings
        except SettingsError as error:
            request._seen.method = INVALID
            raise VLLMValidationError(str(error), parameter=error.field) from None

    @staticmethod
    def _refuse_hidden(request: ReductionFields) -> None:
        """Refuse settings in places where they would do nothing, or pass by the policy."""
        if request._asked.misplaced is not None:
            raise request._asked.misplaced

    def refuse_too_long(
        self,
        request: ReductionFields,
        settings: Sequence[Reduction | None],
        embeds: Sequence[bool],
        engine_input: Any,
    ) -> None:
        """Refuse a prompt with images that the model cannot take, and say which budget would do.

        vLLM refuses it a step later; but it knows nothing of budgets.

        Raises:
            VLLMValidationError: the prompt is too long.
        """
        prompt = len(engine_input["prompt_token_ids"])
        if prompt < self.context or not settings:
            return
        places = (engine_input.get("mm_placeholders") or {}).get("image", [])
        visual = sum(place.length for place in places)
        whole = sum(place.length for place, given in zip(places, embeds, strict=False) if given)
        images = len(places) - sum(embeds)
        message = (
            f"The prompt is too long: {prompt} tokens, {visual} of them visual tokens of "
            f"{_counted(len(places), 'image')}, and this model takes {self.context}, with at least "
            "one of the answer among them."
        )
        if images and not isinstance(self.geometry, UnsupportedModel):
            room = self.context - 1 - (prompt - visual) - whole
            message += f" {self._what_would_fit(settings, images, room)}"
        raise VLLMValidationError(message, parameter=request.turns)

    def refuse_too_many(
        self,
        request: ReductionFields,
        settings: Sequence[Reduction | None],
        embeds: Sequence[bool],
        engine_input: Any,
    ) -> None:
        """Refuse images that would wait for one another for ever.

        Where a method reads the question, all images of the prompt must run in the step that the
        question runs in, and how many images a step encodes is limited.

        Raises:
            VLLMValidationError: they are more.
        """
        reading = [
            r.method for r in settings if r and (d := r.spec.decoder) and d.looks_at_question
        ]
        if not reading or isinstance(self.geometry, UnsupportedModel):
            return
        fit, tokens = self.geometry.images_at_once(self.encoder_tokens), self.geometry.tokens
        places, hashes = (engine_input[key]["image"] for key in ("mm_placeholders", "mm_hashes"))
        encoded = {  # an image that comes twice is encoded once, embeddings are not
            one: place.length if given else tokens
            for one, place, given in zip(hashes, places, embeds, strict=True)
        }
        if sum(encoded.values()) > fit * tokens:
            error = SettingsError(
                request.turns,
                _counted(len(encoded), "image"),
                f"{_counted(fit, 'image')} or fewer with method {reading[0]}, which reads the "
                "question: they are encoded in one step (--max-num-batched-tokens of the server)",
            )
            raise VLLMValidationError(str(error), parameter=error.field)

    def _what_would_fit(self, settings: Sequence[Reduction | None], images: int, room: int) -> str:
        """The largest budget of images that have so many tokens of a prompt to share, in words."""
        policy = self.policy
        late = [r.method for r in settings if r and r.spec.decoder]
        early = [name for name in policy.methods if METHODS[name].place != "nowhere"]
        early = [name for name in early if METHODS[name].decoder is None]
        if not early:
            return f"{images} images that keep all their tokens do not fit; send fewer."
        method = policy.default_method if policy.default_method in early else early[0]
        budget = min(room // images, policy.max_budget or room)
        if budget < policy.min_budget:
            most = max(room, 0) // policy.min_budget
            return (
                f"At the smallest budget of this server, {policy.min_budget}, at most "
                f"{_counted(most, 'image')} would fit."
            )
        if late or method != policy.default_method:
            said = f'reduction {{"method": "{method}", "budget": {budget}}}'
        else:
            said = f"visual_token_budget {budget}"
        why = (
            f" {late[0]} reduces inside the decoder: images enter it with more tokens than their "
            "budget, or with all."
            if late
            else ""
        )
        return f"With {said} or less for every image it would fit.{why}"

    def report(
        self, settings: Sequence[Reduction | None], embeds: Sequence[bool], engine_input: Any
    ) -> dict[str, Any] | None:
        """What the engine was given, read from its input; None for a request without images.

        Raises:
            RuntimeError: it is not what the settings say.
        """
        placeholders = (engine_input.get("mm_placeholders") or {}).get("image", [])
        entering = [placeholder.length for placeholder in placeholders]
        geometry = None if isinstance(self.geometry, UnsupportedModel) else self.geometry
        if geometry is None and len(entering) != len(settings):
            return None  # a model that calls its images something else; none of them is reduced
        expected = [
            count if geometry is None or is_embeds else geometry.kept(reduction)
            for reduction, is_embeds, count in zip(settings, embeds, entering, strict=False)
        ]
        if len(entering) != len(settings) or entering != expected:
            raise RuntimeError(
                f"{expected} visual tokens were due, but the engine was given {entering}"
            )
        if not entering:
            return None
        prompt = len(engine_input["prompt_token_ids"])
        before = [
            geometry.tokens if reduction and geometry else count
            for reduction, count in zip(settings, entering, strict=True)
        ]
        spans = self._spans
        by_stage = [
            self._held_in_stages(reduction, place, prompt)
            for reduction, place in zip(settings, placeholders, strict=True)
        ]
        kept = [math.ceil(schedule.average_over_layers(held, spans)) for held in by_stage]
        images: list[dict[str, Any]] = [
            {
                "method": reduction.method if reduction else NO_REDUCTION,
                "budget": reduction.budget if reduction else None,
                "visual_tokens_before": had,
                "visual_tokens_kept": on_average,
                **({"visual_tokens_by_stage": held} if len(spans) > 1 else {}),
            }
            for reduction, had, on_average, held in zip(
                settings, before, kept, by_stage, strict=True
            )
        ]
        methods, budgets = ({image[key] for image in images} for key in ("method", "budget"))
        text, layers = prompt - sum(entering), self.decoder.layers
        in_layers = sum(schedule.total_over_layers(held, spans) for held in by_stage)
        per_layer = self.decoder.kv_bytes_per_token // layers
        ratio = 1.0
        if in_layers < sum(before) * layers:
            of_layer = [
                text + sum(stage)
                for stage, count in zip(zip(*by_stage, strict=True), spans, strict=True)
                for _ in range(count)
            ]
            ratio = prefill_flops_ratio(of_layer, text + sum(before), self.decoder)
        return {
            "method": methods.pop() if len(methods) == 1 else MIXED,
            "budget": budgets.pop() if len(budgets) == 1 else None,
            "visual_tokens_before": sum(before),
            "visual_tokens_kept": sum(kept),
            "kv_cache_bytes_held": in_layers * per_layer,
            "kv_cache_bytes_saved": (sum(before) * layers - in_layers) * per_layer,
            "estimated_prefill_flops_ratio": round(ratio, 4),
            "images": images,
        }

    @property
    def _spans(self) -> list[int]:
        """Layers of every stage of the decoder."""
        geometry = self.geometry
        if isinstance(geometry, UnsupportedModel) or not geometry.starts:
            return [self.decoder.layers]
        return geometry.spans

    def prefilled(self, report: dict[str, Any] | None) -> list[Prefilled]:
        """What the images of a report add to the metrics, once they are in the KV cache."""
        spans, layers = self._spans, self.decoder.layers
        groups, starts = schedule.groups(spans), [0, *accumulate(spans[:-1])]
        per_layer = self.decoder.kv_bytes_per_token // layers
        images = []
        for image in report["images"] if report else ():
            before, kept = image["visual_tokens_before"], image["visual_tokens_kept"]
            by_stage = image.get("visual_tokens_by_stage", [kept])
            tokens = {"input": before, "kept": kept}
            if len(spans) > 1:
                tokens |= {f"layer_{n}": held for n, held in zip(starts, by_stage, strict=True)}
            left = [before - held for held in by_stage]
            images.append(
                Prefilled(
                    image["method"],
                    tokens,
                    schedule.total_over_layers(left, spans) * per_layer,
                    schedule.total_over_layers(left, groups) / self.block_size,
                )
            )
        return images

    def _held_in_stages(self, reduction: Reduction | None, place: Any, prompt: int) -> list[int]:
        """Visual tokens of an image in every stage of the decoder, in whole blocks."""
        if reduction is None or reduction.spec.decoder is None:
            stages = () if isinstance(self.geometry, UnsupportedModel) else self.geometry.starts
            return [place.length] * (1 + len(stages))
        assert not isinstance(self.geometry, UnsupportedModel)
        run = Run(place.offset, place.offset + place.length)
        return [
            place.length,
            *(
                held_of(run, keep, self.block_size, prompt)
                for keep in self.geometry.held(reduction)[1:]
            ),
        ]

    def describe(self) -> dict[str, Any]:
        """The answer to ``GET /v1/reduction``."""
        geometry, policy = self.geometry, self.policy
        stages = len(getattr(geometry, "starts", ()))
        if isinstance(geometry, UnsupportedModel):
            support: dict[str, Any] = {"supported": False, "reason": str(geometry)}
            details: dict[str, Any] = {"low": None, "high": None}
        else:
            support = {
                "supported": True,
                "grid": list(geometry.grid),
                "visual_tokens": geometry.tokens,
                "tower_layers": geometry.layers,
                "has_cls": geometry.has_cls,
                "decoder_stages": list(geometry.starts),
                "kv_block_size": self.block_size,
                "kv_cache_groups": schedule.groups(self._spans),
            }
            details = {"low": policy.low(geometry), "high": policy.high()}
        return {
            "object": "reduction",
            "model": {
                "id": self.model_name,
                **support,
                "kv_cache_bytes_per_token": self.decoder.kv_bytes_per_token,
            },
            "defaults": {
                "method": policy.default_method,
                "budget": policy.default_budget,
                "detail": details,
            },
            "policy": {
                "methods": [
                    name
                    for name, method in METHODS.items()
                    if name in (*policy.methods, NO_REDUCTION)
                    and (method.decoder is None or method.decoder.least_stages <= stages)
                ],
                "min_budget": policy.min_budget,
                "max_budget": policy.max_budget,
            },
            "methods": [
                {
                    "name": method.name,
                    "idea": method.idea,
                    "paper": method.paper or None,
                    "places": method.places,
                    "decoder_stages": method.decoder.least_stages if method.decoder else 0,
                    "options": method.options.model_json_schema(),
                }
                for method in METHODS.values()
            ],
        }


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _refuse_prompt_logprobs(request: Any) -> None:
    """Refuse what becomes a parameter that needs whole prompts, whatever field it comes from.

    Raises:
        SettingsError: names the field, found by leaving out one after the other.
    """
    named = needs_whole_prompt(_sampling_params(request))
    if named is None:
        return
    fields, without = type(request).model_fields, request
    for field in sorted(request.model_fields_set & fields.keys()):
        if fields[field].is_required():
            continue
        default = fields[field].get_default(call_default_factory=True)
        without = without.model_copy(update={field: default})
        if needs_whole_prompt(_sampling_params(without)) is None:
            named = field
            break
    value = getattr(request, named, None)
    raise SettingsError(named, value, "left out where tokens leave inside the decoder")


def _sampling_params(request: Any) -> SamplingParams:
    """What the engine will be given, but for the number of tokens to generate."""
    return request.to_sampling_params(max(1, getattr(request, "min_tokens", 1)), {})

# SPDX-License-Identifier: Apache-2.0
"""What one server knows about reductions: its policy, its model, and what a token costs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from ficoco_server.metrics import INVALID, MIXED, Prefilled
from ficoco_server.policy import Policy
from ficoco_server.pressure import Pressure
from ficoco_server.protocol import ReductionFields, count_items
from ficoco_server.resolve import Level, Settled, as_written, fit, settled
from vllm_ficoco import schedule
from vllm_ficoco.cost import Decoder, mlp_width, prefill_flops_ratio
from vllm_ficoco.engine.checks import needs_whole_prompt
from vllm_ficoco.engine.gaps import Run, held_of
from vllm_ficoco.methods import METHODS
from vllm_ficoco.models.processing import (
    COUNTS_KEYS,
    LOWERED_KEY,
    RefusedImage,
    RefusedPositions,
)
from vllm_ficoco.packed import Packed
from vllm_ficoco.plugin import MODELS
from vllm_ficoco.settings import (
    AUTO,
    BUDGET_KEY,
    MODALITIES,
    NO_REDUCTION,
    AutoBudget,
    OfLadder,
    Reduction,
    SettingsError,
    ShareOfTokens,
)
from vllm_ficoco.vision.geometry import Geometry, UnsupportedModel, geometry_of
from vllm_ficoco.vision.layout import Layout


class _Held(NamedTuple):
    """What an image or a video holds in the KV cache."""

    said: dict[str, Any]
    """The same in the report; not to be changed."""
    in_layers: int
    """Tokens in all layers together."""


class Reducer:
    """What is known at the start: the policy, the model's geometry and what a token costs."""

    def __init__(
        self, vllm_config: Any, policy: Policy, processor: Any, encoder_tokens: int
    ) -> None:
        """
        Args:
            vllm_config: of the server.
            policy: of the server.
            processor: the model's, of vLLM's renderer; None where it takes no images.
            encoder_tokens: visual tokens that a step may put through the tower.

        Raises:
            PolicyError: the model cannot do what the policy says.
        """
        model = vllm_config.model_config
        self.policy, self.processor, self.encoder_tokens = policy, processor, encoder_tokens
        self.model_name = model.served_model_name
        self.block_size = vllm_config.cache_config.block_size
        self.context: int = model.max_model_len
        try:
            if model.architecture not in MODELS:
                raise UnsupportedModel(
                    f"visual tokens can be reduced in {', '.join(MODELS)}, not in "
                    f"{model.architecture}"
                )
            self.geometry = geometry_of(model.hf_config)
        except UnsupportedModel as error:
            self.geometry = Geometry.none(str(error))
        multimodal = model.multimodal_config
        self.shared_memory = multimodal and multimodal.mm_processor_cache_type == "shm"
        self.vocabulary = range(model.get_vocab_size())
        vision = getattr(model.hf_config, "vision_config", None)
        self.image_size: int = getattr(vision, "image_size", 0)
        """Pixels of a side of what the tower takes in: an image, or a tile of it."""
        if self.geometry.by_image and processor is None:
            self.geometry = Geometry.none("this server takes no images")
        limits = processor.info.allowed_mm_limits if processor is not None else {}
        self.modalities = [
            modality
            for modality in MODALITIES
            if limits.get(modality) and self.geometry.methods(modality == "video")
        ]
        """What can be reduced."""
        self.largest: Layout | None = None
        """Of the image that has most tokens; None where nothing can be reduced."""
        self.no_previews = ""
        """Why there are none; empty where there are."""
        self.pressure = Pressure()
        """On the server."""
        self.most_inputs = 1
        """Thumbnail and tiles of the image that has most."""
        if self.geometry.by_image:
            self.largest = processor.largest_layout
            pinpoints = getattr(model.hf_config, "image_grid_pinpoints", ())
            inputs = [processor.layout_of(w, h).inputs for h, w in pinpoints]
            self.most_inputs = max(inputs, default=1)
        elif not self.geometry.unsupported:
            self.largest = self.geometry.layout
        policy.check_model(self.geometry, self.largest)
        cache_dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model)
        text = model.hf_text_config
        # Of the whole model, however many ranks share it. Types below a byte count as one.
        self.decoder = Decoder(
            layers=model.get_total_num_hidden_layers(),
            hidden_size=model.get_hidden_size(),
            intermediate_size=mlp_width(text),
            heads=getattr(text, "num_attention_heads", 0) or 0,
            kv_heads=model.get_total_num_kv_heads(),
            head_size=model.get_head_size(),
            kv_bytes_per_element=cache_dtype.itemsize,
        )
        # The engine is another process. When it is ready it tells the block size of its groups,
        # or none where they have several.
        packed = vllm_config.cache_config.effective_attention_block_size is None
        self.parts = schedule.parts(self._spans, self.block_size, packed)

    def settle(self, request: ReductionFields, messages: Any) -> list[Reduction | None]:
        """The settings of every image of a request, then of every video: in this order they are
        everywhere in here.

        Args:
            request: with what was said on it and on its images and videos.
            messages: as they will be rendered; they may begin with those of earlier turns, whose
                images and videos follow the request.

        Raises:
            VLLMValidationError: they cannot be used.
        """
        try:
            asked = request._asked
            if asked.misplaced is not None:  # settings that would do nothing, or pass by the policy
                raise asked.misplaced
            there, levels = count_items(messages), list[Level]()
            for modality, said in zip(MODALITIES, (asked.images, asked.videos), strict=True):
                earlier = max(there[modality] - len(said), 0)
                levels += [Level(modality=modality)] * earlier + [*said]
            budget, lower = request.visual_token_budget, bool(request._lowers)
            if (
                levels
                and request.reduction is None
                and isinstance(budget, int | str | None)
                and not any(level.said for level in levels)
            ):
                images = [
                    self._of_budget(budget, at.embeds, at.named, at.modality, lower)
                    for at in levels
                ]
            else:
                images = settled(self.policy, request.level, levels, self.geometry, lower)
            request._settled = images
            settings = [image.reduction for image in images]
            # Not by what is in an image: of a ladder, whatever it comes to.
            waiting = [r for r in settings if isinstance(r, OfLadder)]
            _refuse_whole_prompts(request, waiting if self.geometry.by_image else settings)
            return settings
        except SettingsError as error:
            raise _refusal(request, error) from None

    @cached_property
    def _of_budget(self) -> Callable[..., Settled]:
        """As :meth:`_settle_alike`, which a request after the other asks."""
        return lru_cache(maxsize=1024, typed=True)(self._settle_alike)

    def _settle_alike(
        self, budget: int | str | None, embeds: bool, named: bool, modality: str, lower: bool
    ) -> Settled:
        """What holds for an item of a request that says a budget, or nothing, of all its items.

        Args:
            budget: of the request.
            embeds: the item comes as embeddings.
            named: it has a uuid.
            modality: of the item.
            lower: as of :func:`settled`.

        Raises:
            SettingsError: it cannot be used.
        """
        said = {} if budget is None else {BUDGET_KEY: budget}
        item = Level(embeds=embeds, named=named, modality=modality)
        return settled(self.policy, Level(said=said), [item], self.geometry, lower)[0]

    def fit(self, request: ReductionFields, engine_input: Any) -> list[Reduction | None]:
        """The settings of every image, once the prompt is rendered and their sizes are known.

        Raises:
            VLLMValidationError: those of an image cannot be used.
        """
        images, made = request._settled, self.made(engine_input)
        if not self.geometry.by_image:  # all but what waits for the image was seen to at once
            if not any(isinstance(image.reduction, OfLadder) for image in images):
                return [image.reduction for image in images]
            return [packed.reduction for packed in made]
        try:
            settings = [
                packed.layout
                and fit(self.policy, image, self.geometry, packed.layout, packed.reduction)
                for image, packed in zip(images, made, strict=False)
            ]
            _refuse_whole_prompts(request, settings)
            return settings
        except SettingsError as error:
            raise _refusal(request, error) from None

    @staticmethod
    def too_far(request: ReductionFields, refused: RefusedPositions) -> VLLMValidationError:
        """What the processor says of positions that the model has not, where its images stand."""
        request._seen.method = INVALID
        return VLLMValidationError(str(refused.args[0]), parameter=request.turns)

    @staticmethod
    def refused(request: ReductionFields, refused: RefusedImage) -> VLLMValidationError:
        """What the processor says of an item's settings, in the words of its client."""
        alike = [one for one in request._settled if one.modality == refused.modality]
        return _refusal(request, as_written(alike[refused.image], refused.error))

    @staticmethod
    def by_modality(request: ReductionFields, settings: Sequence[Reduction | None]) -> Any:
        """The settings of a request's items as the processor takes them."""
        images = [one.modality for one in request._settled].count("image")
        if images == len(settings):
            return [*settings]
        return {"image": [*settings[:images]], "video": [*settings[images:]]}

    @staticmethod
    def made(engine_input: Any) -> list[Packed]:
        """What the processor says that it has made of every item."""
        return [packed for key in COUNTS_KEYS.values() for packed in engine_input.get(key, ())]

    def _layouts(self, embeds: Sequence[bool], engine_input: Any) -> list[Layout | None]:
        """Of every item; None for embeddings, and where nothing can be reduced."""
        if self.geometry.unsupported:
            return [None] * len(embeds)
        if self.geometry.by_image:
            return [packed.layout for packed in self.made(engine_input)]
        return [None if given else self.geometry.layout for given in embeds]

    def too_large(self, layout: Layout) -> bool:
        """Whether an image that comes rendered has more tokens than the tower has room for.

        Those in tiles go through it some tiles at a time.
        """
        return self.geometry.is_native and layout.encoded > self.encoder_tokens

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
        by_modality = engine_input.get("mm_placeholders") or {}
        lengths = [*map(_tokens, _flat(by_modality))]
        visual = sum(lengths)
        found = self._layouts(embeds, engine_input)
        whole = sum(n for n, layout in zip(lengths, found, strict=False) if layout is None)
        layouts = [layout for layout in found if layout]
        message = (
            f"The prompt is too long: {prompt} tokens, {visual} of them visual tokens of "
            f"{_counted_items(by_modality)}, and this model takes {self.context}, with at least "
            "one of the answer among them."
        )
        if layouts:
            room = self.context - 1 - (prompt - visual) - whole
            message += f" {self._what_would_fit(settings, layouts, room)}"
        raise VLLMValidationError(message, parameter=request.turns)

    def refuse_too_many(
        self,
        request: ReductionFields,
        settings: Sequence[Reduction | None],
        embeds: Sequence[bool],
        engine_input: Any,
    ) -> None:
        """Refuse images and videos that would wait for one another for ever.

        Where a method reads the question, all of them must run in the step that the question runs
        in, and how much a step encodes is limited.

        Raises:
            VLLMValidationError: they are more.
        """
        reading = [
            r.method for r in settings if r and (d := r.spec.decoder) and d.looks_at_question
        ]
        if not reading:
            return
        places, hashes = engine_input["mm_placeholders"], engine_input["mm_hashes"]
        layouts = self._layouts(embeds, engine_input)
        encoded = {  # what comes twice is encoded once, embeddings are not
            one: max(_tokens(place), min(layout.encoded, self.encoder_tokens))
            if layout
            else _tokens(place)
            for one, place, layout in zip(_flat(hashes), _flat(places), layouts, strict=True)
        }
        fit = self.geometry.images_at_once(self.encoder_tokens)
        most = fit * self.geometry.tokens
        once = {kind: {*hashes[kind]} for kind in hashes}
        value, allowed = _counted_items(once), _counted(fit, "image")
        if self.geometry.by_image:
            most = self.encoder_tokens
            value += f" of {sum(encoded.values())} visual tokens in the tower"
            padding = "" if self.geometry.is_native else ", padding of tiles included"
            what = "images and videos" if "video" in once else "images"
            allowed = f"{what} of {most} visual tokens there{padding},"
        # One alone is always encoded.
        if sum(encoded.values()) > most:
            error = SettingsError(
                request.turns,
                value,
                f"{allowed} or fewer with method {reading[0]}, which reads the "
                "question: they are encoded in one step (--max-num-batched-tokens of the server)",
            )
            raise VLLMValidationError(str(error), parameter=error.field)

    def _what_would_fit(
        self, settings: Sequence[Reduction | None], layouts: Sequence[Layout], room: int
    ) -> str:
        """The largest budget of images and videos that have so many tokens of a prompt to share, in
        words."""
        policy = self.policy
        late = [r.method for r in settings if r and r.spec.decoder]
        kinds = sorted({layout.kind for layout in layouts})
        early = [
            name
            for name in policy.methods
            if all(name in self.geometry.methods(kind == "video") for kind in kinds)
            and METHODS[name].place != "nowhere"
            and METHODS[name].decoder is None
        ]
        several = " and ".join(f"{kind}s" for kind in kinds)
        if not early:
            return f"{len(layouts)} {several} that keep all their tokens do not fit; send fewer."

        def held(budget: int) -> list[int]:
            """Tokens of every item at a budget; a small one has fewer."""
            return [min(budget, layout.sent) for layout in layouts]

        largest = policy.max_budget if "image" in kinds else None
        budgets = range(1 + max(held(largest or room)))
        budget = bisect_right(budgets, room, key=lambda budget: sum(held(budget))) - 1
        if budget < policy.min_budget:
            most = sum(n <= room for n in accumulate(sorted(held(policy.min_budget))))
            what = several if most != 1 else " or ".join(kinds)
            return (
                f"At the smallest budget of this server, {policy.min_budget}, at most {most} "
                f"{what} would fit."
            )
        early.sort(key=lambda name: name != policy.default_method)
        method = next((name for name in early if self._reaches(name, budget, layouts)), early[0])
        if late or method != policy.default_method:
            said = f'reduction {{"method": "{method}", "budget": {budget}}}'
        else:
            said = f"visual_token_budget {budget}"
        why = (
            f" {late[0]} reduces inside the decoder: {several} enter it with more tokens than "
            "their budget, or with all."
            if late
            else ""
        )
        return f"With {said} or less for every {' and '.join(kinds)} it would fit.{why}"

    def _reaches(self, method: str, budget: int, layouts: Sequence[Layout]) -> bool:
        """Whether a method can keep so few tokens of all these images and videos."""
        reduction = Reduction(method=method, budget=budget)
        try:
            for layout in layouts:
                self.geometry.kept(reduction, layout=layout)
        except SettingsError:
            return False
        return True

    def report(
        self,
        settings: Sequence[Reduction | None],
        embeds: Sequence[bool],
        engine_input: Any,
        asked: Sequence[Reduction | None] = (),
    ) -> dict[str, Any] | None:
        """What the engine was given, read from its input; None for a request without images and
        videos.

        Args:
            settings: of every item.
            embeds: which of them come as embeddings.
            engine_input: what the processor has made of the prompt.
            asked: the settings before their images were seen, to name those that waited for them.

        Raises:
            RuntimeError: it is not what the settings say.
        """
        by_modality = engine_input.get("mm_placeholders") or {}
        placeholders = _flat(by_modality)
        entering = [*map(_tokens, placeholders)]
        geometry, layouts = self.geometry, self._layouts(embeds, engine_input)
        if geometry.unsupported and len(entering) != len(settings):
            return None  # a model that calls its images something else; none of them is reduced
        expected = [
            geometry.kept(reduction, layout=layout) if layout else count
            for reduction, layout, count in zip(settings, layouts, entering, strict=False)
        ]
        if len(entering) != len(settings) or entering != expected:
            raise RuntimeError(
                f"{expected} visual tokens were due, but the engine was given {entering}"
            )
        given = [packed.reduction for packed in self.made(engine_input)]
        if given and given != settings:
            raise RuntimeError(f"{settings} were due, but the engine was given {given}")
        if not entering:
            return None
        prompt = len(engine_input["prompt_token_ids"])
        before = [
            layout.sent if layout else count
            for layout, count in zip(layouts, entering, strict=True)
        ]
        by_stage = [
            tuple(self._held_in_stages(reduction, layout, place, prompt))
            for reduction, layout, place in zip(settings, layouts, placeholders, strict=True)
        ]
        held = [*map(self._of_item, settings, before, by_stage)]
        items = [dict(of.said) for of in held]
        for item, waited in zip(items, asked, strict=False):
            if isinstance(waited, AutoBudget):
                item["requested"] = AUTO
        for item, less in zip(items, engine_input.get(LOWERED_KEY, ()), strict=False):
            if less:  # an image, and those come first
                item["lowered_by"] = "pressure"
        methods, budgets = ({item[key] for item in items} for key in ("method", "budget"))
        text, layers = prompt - sum(entering), self.decoder.layers
        had, in_layers = sum(before), sum(of.in_layers for of in held)
        per_layer = self.decoder.kv_bytes_per_token // layers
        ratio = 1.0
        if in_layers < had * layers:
            of_stage = tuple(text + sum(stage) for stage in zip(*by_stage, strict=True))
            ratio = _flops_ratio(of_stage, tuple(self._spans), text + had, self.decoder)
        images = len(by_modality.get("image", ()))
        return {
            "method": methods.pop() if len(methods) == 1 else MIXED,
            "budget": budgets.pop() if len(budgets) == 1 else None,
            "visual_tokens_before": had,
            "visual_tokens_kept": sum(of.said["visual_tokens_kept"] for of in held),
            "kv_cache_bytes_held": in_layers * per_layer,
            "kv_cache_bytes_saved": (had * layers - in_layers) * per_layer,
            "estimated_prefill_flops_ratio": ratio,
            "images": items[:images],
            **({"videos": items[images:]} if images < len(items) else {}),
        }

    @cached_property
    def _of_item(self) -> Callable[..., _Held]:
        """As :meth:`_describe_item`, likewise."""
        return lru_cache(maxsize=4096)(self._describe_item)

    def _describe_item(
        self, reduction: Reduction | None, before: int, by_stage: tuple[int, ...]
    ) -> _Held:
        """What an item holds.

        Args:
            reduction: its settings.
            before: its visual tokens, unreduced.
            by_stage: what it holds in every stage of the decoder.
        """
        spans = self._spans
        said = {
            "method": reduction.method if reduction else NO_REDUCTION,
            "budget": reduction.budget if reduction else None,
            "visual_tokens_before": before,
            "visual_tokens_kept": math.ceil(schedule.average_over_layers(by_stage, spans)),
            **({"visual_tokens_by_stage": [*by_stage]} if len(spans) > 1 else {}),
        }
        return _Held(said, schedule.total_over_layers(by_stage, spans))

    @property
    def _spans(self) -> list[int]:
        """Layers of every stage of the decoder."""
        return self.geometry.spans if self.geometry.starts else [self.decoder.layers]

    def prefilled(self, report: dict[str, Any] | None) -> list[Prefilled]:
        """What the images and videos of a report add to the metrics, once they are in the KV
        cache."""
        spans, layers = self._spans, self.decoder.layers
        starts = [0, *accumulate(spans[:-1])]
        per_layer = self.decoder.kv_bytes_per_token // layers
        prefilled = []
        for modality, image in reported(report):
            before, kept = image["visual_tokens_before"], image["visual_tokens_kept"]
            by_stage = image.get("visual_tokens_by_stage", [kept])
            tokens = {"input": before, "kept": kept}
            if len(spans) > 1:
                tokens |= {f"layer_{n}": held for n, held in zip(starts, by_stage, strict=True)}
            left = [before - held for held in by_stage]
            rung = ""
            if image.get("requested") == AUTO:
                rung = self.policy.auto().rung_name(image["budget"] or before, before)
            prefilled.append(
                Prefilled(
                    image["method"],
                    tokens,
                    schedule.total_over_layers(left, spans) * per_layer,
                    sum(left[part.stage] / part.block for part in self.parts),
                    rung,
                    modality,
                )
            )
        return prefilled

    def _held_in_stages(
        self, reduction: Reduction | None, layout: Layout | None, place: Any, prompt: int
    ) -> list[int]:
        """Visual tokens of an item in every stage of the decoder, in whole blocks."""
        if reduction is None or reduction.spec.decoder is None:
            return [_tokens(place)] * (1 + len(self.geometry.starts))
        run = Run(place.offset, place.offset + place.length)
        return [
            _tokens(place),
            *(
                held_of(run, keep, self.block_size, prompt)
                for keep in self.geometry.held(reduction, layout=layout)[1:]
            ),
        ]

    def _able(self, modality: str) -> list[str]:
        """The methods that server and model allow, where there are enough stages for them."""
        stages = len(self.geometry.starts)
        return [
            name
            for name in self.geometry.methods(modality == "video")
            if modality in self.modalities
            and name in (*self.policy.methods, NO_REDUCTION)
            and ((part := METHODS[name].decoder) is None or part.least_stages <= stages)
        ]

    def describe(self) -> dict[str, Any]:
        """The answer to ``GET /v1/reduction``."""
        geometry, policy = self.geometry, self.policy
        if self.largest is None:
            support: dict[str, Any] = {"supported": False, "reason": geometry.unsupported}
            details: dict[str, Any] = {"low": None, "high": None}
        else:
            support = {
                "supported": True,
                "layout": "by image" if geometry.by_image else "fixed",
                "grid": "by image" if geometry.is_native else list(geometry.grid),
                "visual_tokens": self.largest.tokens,
                "modalities": self.modalities,
                "tower_layers": geometry.layers,
                "has_cls": geometry.has_cls,
                "decoder_stages": list(geometry.starts),
                "kv_block_size": self.block_size,
                "kv_block_sizes": list({part.stage: part.block for part in self.parts}.values()),
                "kv_cache_groups": list(Counter(part.stage for part in self.parts).values()),
            }
            low = policy.low(geometry)
            share = f"N / {low.share}" if isinstance(low, ShareOfTokens) else low
            details = {"low": share, "high": policy.high()}
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
            "auto": {
                "budgets": [
                    schedule.rung_name(schedule.rung(entry)).replace("/", " / ")
                    for entry in policy.auto_budgets
                ],
                "meaning": "one of these for each image, by what is in it, within the policy's "
                "limits; N is what it has unreduced",
            },
            "policy": {
                "methods": self._able("image"),
                "video_methods": self._able("video"),
                "min_budget": policy.min_budget,
                "max_budget": policy.max_budget,
            },
            "pressure": self.pressure.describe(),
            "preview": {"enabled": not self.no_previews, "reason": self.no_previews or None},
            "methods": [
                {
                    "name": method.name,
                    "idea": method.idea,
                    "paper": method.paper or None,
                    "places": [
                        geometry.place_of(method) if place == method.place else place
                        for place in method.places
                    ],
                    "decoder_stages": method.decoder.least_stages if method.decoder else 0,
                    "options": method.options.model_json_schema(),
                }
                for method in METHODS.values()
            ],
        }


@lru_cache(maxsize=1024)
def _flops_ratio(
    of_stage: tuple[int, ...], spans: tuple[int, ...], before: int, decoder: Decoder
) -> float:
    """What a prefill of so many tokens in the stages costs, as the report says it."""
    of_layer = [tokens for tokens, count in zip(of_stage, spans, strict=True) for _ in range(count)]
    return round(prefill_flops_ratio(of_layer, before, decoder), 4)


def _refusal(request: ReductionFields, error: SettingsError) -> VLLMValidationError:
    """Settings that cannot be used, as vLLM refuses; the metrics will say so."""
    request._seen.method = INVALID
    return VLLMValidationError(str(error), parameter=error.field)


def reported(report: Mapping[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a report says of every image and every video, and which of them it is."""
    for modality in MODALITIES:
        for item in (report or {}).get(f"{modality}s", ()):
            yield modality, item


def _flat(by_modality: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Of images, then of videos."""
    return [one for modality in MODALITIES for one in by_modality.get(modality, ())]


def _tokens(place: Any) -> int:
    """Visual tokens among those of an item's place in a prompt: text may stand between frames."""
    count: int = place.get_num_embeds()
    return count


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _counted_items(by_modality: Mapping[str, Collection[Any]]) -> str:
    """How many images and videos, in words."""
    there = [m for m in MODALITIES if by_modality.get(m)]
    return " and ".join(_counted(len(by_modality[m]), m) for m in there)


def _refuse_whole_prompts(request: Any, settings: Sequence[Reduction | None]) -> None:
    """As :func:`_refuse_prompt_logprobs`, where tokens leave inside the decoder.

    Raises:
        SettingsError: names the field.
    """
    if any(reduction and reduction.spec.decoder for reduction in settings):
        _refuse_prompt_logprobs(request)


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

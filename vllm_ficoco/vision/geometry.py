# SPDX-License-Identifier: Apache-2.0
"""What of a checkpoint's configuration a reduction depends on, and which ones are supported."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_ficoco import schedule
from vllm_ficoco.schedule import Stage
from vllm_ficoco.settings import Reduction, SettingsError

STAGES_KEY = "reduction_stages"
"""Of a model's configuration: see :func:`decoder_stages`."""


class UnsupportedModel(ValueError):
    """A model whose visual tokens cannot be reduced; the message says why."""


class Geometry(NamedTuple):
    """A LLaVA as a reduction sees it: the tower's grid and layers, the decoder's stages."""

    grid: tuple[int, int]
    """Rows and columns of patches."""
    layers: int
    """Layers of the tower that run: up to the one whose output LLaVA takes."""
    has_cls: bool
    decoder_layers: int = 1
    starts: tuple[int, ...] = ()
    """First layer of every stage of the decoder at which tokens can leave."""

    @property
    def tokens(self) -> int:
        """Visual tokens of one unreduced image."""
        return self.grid[0] * self.grid[1]

    def images_at_once(self, encoder_tokens: int) -> int:
        """How many images a step of the engine may encode, by what vLLM lets its encoder do."""
        return max(1, encoder_tokens // self.tokens)

    @property
    def spans(self) -> list[int]:
        """Layers of every stage of the decoder, those before the first included."""
        return schedule.spans(self.starts, self.decoder_layers)

    def decoder_stages(self, reduction: Reduction, field: str = "budget") -> tuple[int, ...]:
        """At which stages of the decoder, counted from 1, tokens of an image leave.

        Raises:
            SettingsError: the method needs more stages than the server has.
        """
        part = reduction.spec.decoder
        if part is None:
            return ()
        wanted = part.layers[: part.least_stages]
        if len(self.starts) < len(wanted):
            needed: list[int] = []
            for layer in wanted:
                as_deep = schedule.same_depth(layer, 32, self.decoder_layers)
                needed.append(max(as_deep, needed[-1] + 1 if needed else 1))
            raise SettingsError(
                _beside(field, "method"),
                reduction.method,
                "left out here: it reduces inside the decoder, for which the server must be "
                f"started with stages, such as --reduction-stages {','.join(map(str, needed))}",
            )
        if part.every_stage:
            return tuple(range(1, 1 + len(self.starts)))
        return schedule.nearest_stages(self.starts, self.decoder_layers, wanted, 32)

    def held(self, reduction: Reduction | None, field: str = "budget") -> list[int]:
        """Visual tokens of an image in every stage of the decoder, those before the first included.

        Stages hold whole KV blocks, so it can become some more inside the decoder
        (:func:`vllm_ficoco.engine.gaps.held_of`).

        Raises:
            SettingsError: the method cannot reach the budget, or not with these stages.
        """
        count = 1 + len(self.starts)
        active = reduction.for_tokens(self.tokens) if reduction else None
        if active is None:
            return [self.tokens] * count
        part, budget = active.spec.decoder, active.budget or 0
        if part is None:
            return [budget] * count
        stages = self.decoder_stages(active, field)
        least = int(active.spec.place != "nowhere")  # of an image, something enters the decoder
        if least:
            stages = (0, *stages)
        given = active.options.get("tokens")
        if given is not None and (len(given) != len(stages) or given[0] < least):
            raise SettingsError(
                _beside(field, "options.tokens"),
                given,
                f"{len(stages)} numbers, one for each place where {active.method} reduces here"
                + (", the first above 0" if least else ""),
            )

        def kept(first: int) -> list[int]:
            """In every stage, where the first place of reduction keeps ``first``."""
            at_places = given or part.shares(self.tokens, max(first, least), len(stages))
            by_stage = dict(zip(stages, at_places, strict=True))
            left, held = self.tokens, []
            for stage in range(count):
                left = min(left, by_stage.get(stage, left))
                held.append(left)
            return held

        if given is not None:
            return kept(0)
        try:
            return schedule.within_average(budget, self.spans, self.tokens, kept)
        except ValueError as error:
            raise SettingsError(field, active.budget, str(error)) from None

    def stages(self, reduction: Reduction, field: str = "budget") -> list[Stage]:
        """Where tokens leave in this tower; empty where none do.

        Raises:
            SettingsError: the method cannot reach the budget in this tower, or as :meth:`held`.
        """
        active = reduction.for_tokens(self.tokens)
        if active is None:
            return []
        into_decoder = self.held(active, field)[0]
        if into_decoder >= self.tokens:
            return []
        try:
            return active.spec.schedule(
                self.tokens, into_decoder, self.layers, active.parsed_options()
            )
        except ValueError as error:
            raise SettingsError(field, active.budget, str(error)) from None

    def kept(self, reduction: Reduction | None, field: str = "budget") -> int:
        """Visual tokens that enter the decoder: the placeholders and the rows the model returns.

        Raises:
            SettingsError: as :meth:`stages`.
        """
        stages = self.stages(reduction, field) if reduction else []
        return stages[-1].keep if stages else self.tokens


def _beside(field: str, name: str) -> str:
    """The path of another part of the settings, given that of their budget."""
    beside = field == "budget" or field.endswith(".budget")
    return field.removesuffix("budget") + name if beside else field


def geometry_of(config: Any) -> Geometry:
    """The geometry of a Hugging Face ``LlavaConfig``.

    Raises:
        UnsupportedModel: there is no way to reduce for this configuration.
    """
    vision = getattr(config, "vision_config", None)
    kind = getattr(vision, "model_type", None)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if getattr(config, "model_type", None) != "llava" or vision is None:
        raise UnsupportedModel(
            f"visual tokens can be reduced for LLaVA models, not for {config.model_type!r}"
        )
    # [CLS] must be there for CLIP to drop, and must not be there for SigLIP to keep all.
    wanted = {"clip_vision_model": "default", "siglip_vision_model": "full"}
    if kind not in wanted:
        raise UnsupportedModel(
            f"visual tokens can be reduced in CLIP and SigLIP towers, not in {kind!r}"
        )
    if strategy != wanted[kind]:
        raise UnsupportedModel(
            f"a {kind!r} tower is supported with vision_feature_select_strategy = "
            f"{wanted[kind]!r}, not {strategy!r}"
        )
    side = vision.image_size // vision.patch_size
    chosen = config.vision_feature_layer
    # As vLLM: the deepest of the layers; a negative index counts from the output of the last.
    deepest = max(
        layer if layer >= 0 else vision.num_hidden_layers + layer + 1
        for layer in ([chosen] if isinstance(chosen, int) else chosen)
    )
    return Geometry(
        (side, side),
        deepest,
        kind == "clip_vision_model",
        config.text_config.num_hidden_layers,
        decoder_stages(config),
    )


def decoder_stages(config: Any) -> tuple[int, ...]:
    """The first layers of the decoder stages that a server has been started with.

    They are said with ``--hf-overrides``, as a part of the model's configuration, which every
    process of vLLM has; ``vllm-ficoco serve --reduction-stages`` puts them there.

    Raises:
        ValueError: they are not layers of this decoder in ascending order.
    """
    starts, layers = getattr(config, STAGES_KEY, ()), config.text_config.num_hidden_layers
    valid = all(type(start) is int and 0 < start < layers for start in starts)
    if not valid or list(starts) != sorted({*starts}):
        raise ValueError(
            f"{STAGES_KEY} = {starts} is not valid: it must be layers of the decoder, from 1 to "
            f"{layers - 1}, in ascending order"
        )
    return tuple(starts)

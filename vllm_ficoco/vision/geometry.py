# SPDX-License-Identifier: Apache-2.0
"""What of a checkpoint's configuration a reduction depends on, and which ones are supported."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_ficoco.schedule import Stage
from vllm_ficoco.settings import Reduction, SettingsError


class UnsupportedModel(ValueError):
    """A model whose visual tokens cannot be reduced; the message says why."""


class Geometry(NamedTuple):
    """The vision side of a LLaVA as a reduction sees it."""

    grid: tuple[int, int]
    """Rows and columns of patches."""
    layers: int
    """Layers of the tower that run: up to the one whose output LLaVA takes."""
    has_cls: bool

    @property
    def tokens(self) -> int:
        """Visual tokens of one unreduced image."""
        return self.grid[0] * self.grid[1]

    def stages(self, reduction: Reduction, field: str = "budget") -> list[Stage]:
        """Where tokens leave in this tower; empty where the image is not reduced.

        Raises:
            SettingsError: the method cannot reach the budget in this tower.
        """
        active = reduction.for_tokens(self.tokens)
        if active is None:
            return []
        try:
            return active.spec.schedule(
                self.tokens, active.budget, self.layers, active.parsed_options()
            )
        except ValueError as error:
            raise SettingsError(field, active.budget, str(error)) from None

    def kept(self, reduction: Reduction | None) -> int:
        """Visual tokens that an image holds: the placeholders and the rows the model returns.

        Raises:
            SettingsError: as :meth:`stages`.
        """
        stages = self.stages(reduction) if reduction else []
        return stages[-1].keep if stages else self.tokens


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
    return Geometry((side, side), deepest, kind == "clip_vision_model")

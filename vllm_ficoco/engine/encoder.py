# SPDX-License-Identifier: Apache-2.0
"""vLLM's encoder cache area: a step encodes no more images than without reductions.

vLLM lets a step encode as many visual tokens as ``--max-num-batched-tokens`` says, and counts what
an image holds in the prompt. The tower takes in the whole image, however few tokens come out of
it: hundreds of images that keep one token each would go through the tower in one step, and nobody
else would get a token meanwhile. So here an image that is reduced counts with all its tokens, and
one in tiles with those of all its tiles, padding included, whether it is reduced or not.

The encoder cache manager is asked, image by image, whether one more can be encoded now. It is
chosen by ``--ec-manager-config`` (:mod:`vllm_ficoco.models.config` does), whatever the scheduler.
Memory is still counted by what images hold.
"""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from vllm_ficoco.packed import packed_of
from vllm_ficoco.vision.geometry import geometry_of


class TowerBudget(EncoderCacheManager):
    """vLLM's manager, which also minds what the tower does.

    Args:
        cache_size: vLLM's.
        tokens: that the tower makes of an image, where all images are alike; else 0, and each
            says so by its layout.
    """

    def __init__(self, cache_size: int, tokens: int) -> None:
        super().__init__(cache_size)
        self.tokens = tokens
        self.asked = 0
        """Beyond what they hold, the tower makes so many tokens of the images that may be encoded
        for the request that is looked at."""
        self.spent = 0
        """The same for those that will be encoded in this step."""

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: VllmConfig) -> TowerBudget:
        geometry = geometry_of(vllm_config.model_config.hf_config)
        return cls(cache_size, 0 if geometry.by_image else geometry.tokens)

    def encoded(self, feature: MultiModalFeatureSpec) -> int:
        """Visual tokens that the tower makes for an image or a video, as far as a step can.

        What comes as embeddings passes by the tower; a video without a layout, in a model whose
        videos stay whole, is counted as in vLLM.
        """
        held = feature.mm_position.get_num_embeds()
        if f"{feature.modality}_embeds" in (feature.data or ()):
            return held
        layout = packed_of(feature.data).layout
        of_image = self.tokens if feature.modality == "image" else held
        tokens = layout.encoded if layout is not None else of_image
        # vLLM lets a step encode as much as the cache holds: an image of more tiles runs alone.
        return max(held, min(tokens, self.cache_size))

    def _left_in_tower(self, request: Request, input_id: int) -> int:
        """Tokens of an image that do not come out of the tower."""
        feature = request.mm_features[input_id]
        return self.encoded(feature) - feature.mm_position.get_num_embeds()

    def can_allocate(
        self,
        request: Request,
        input_id: int,
        encoder_compute_budget: int,
        num_embeds_to_schedule: int,
    ) -> bool:
        """As vLLM's, of what the tower can still do in this step."""
        if not num_embeds_to_schedule:  # the first of a request
            self.asked = 0
        left = self._left_in_tower(request, input_id)
        encoder_compute_budget -= self.spent + self.asked + left
        if not super().can_allocate(
            request, input_id, encoder_compute_budget, num_embeds_to_schedule
        ):
            return False
        self.asked += left
        return True

    def allocate(self, request: Request, input_id: int) -> None:
        """As vLLM's: the image will be encoded in this step."""
        super().allocate(request, input_id)
        self.spent += self._left_in_tower(request, input_id)

    def get_freed_mm_hashes(self) -> list[str]:
        """As vLLM's, which asks when a step is complete."""
        self.spent = 0
        return super().get_freed_mm_hashes()

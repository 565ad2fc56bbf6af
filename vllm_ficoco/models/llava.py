# SPDX-License-Identifier: Apache-2.0
"""LLaVA for vLLM with a visual token budget per image.

Two halves that must agree on how many tokens an image keeps, and both ask
:meth:`vllm_ficoco.vision.geometry.Geometry.kept`: the multimodal processor, which lays out the
placeholders in the prompt, and the model, which returns the embeddings that fill them.

Everything of vLLM's multimodal area that this package depends on is in this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    tensor_model_parallel_all_reduce,
)
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalHashes
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava import (
    BaseLlavaProcessingInfo,
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
    PixtralHFMultiModalProcessor,
    PixtralHFProcessingInfo,
    _build_llava_or_pixtral_hf_info,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    PromptReplacement,
    PromptUpdate,
)
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.sequence import IntermediateTensors

from vllm_ficoco.settings import (
    BUDGET_KEY,
    REDUCTION_KEY,
    Reduction,
    SettingsError,
    pack,
    per_image,
    unpack,
)
from vllm_ficoco.vision.geometry import Geometry, UnsupportedModel, geometry_of
from vllm_ficoco.vision.timing import StageTimer
from vllm_ficoco.vision.tower import ReducingTower, rows

if TYPE_CHECKING:  # a server without stages loads nothing of them
    from vllm_ficoco.engine.decoder import StagedDecoder

PACKED_FIELD = "packed_reduction"
"""The field beside ``pixel_values`` that carries an image's settings to the model."""


_KEPT = "-kept"
"""Before the number of its visual tokens in the hash of a reduced image."""


def tokens_by_hash(mm_hash: str, geometry: Geometry) -> int:
    """Visual tokens of an image in a cache of vLLM's that is found by this hash; never fewer."""
    kept = mm_hash.rpartition(_KEPT)[2] if _KEPT in mm_hash else ""
    counts = map(str, range(1, geometry.tokens))  # a client's uuid may end in any number
    return int(kept) if kept in counts else geometry.tokens


def _without_ours(kwargs: Mapping[str, object]) -> dict[str, object]:
    """What the Hugging Face processor may see."""
    return {k: v for k, v in kwargs.items() if k not in (BUDGET_KEY, REDUCTION_KEY)}


class ReducingProcessorMixin:
    """Reads the settings of every image, and makes placeholders, hashes and data follow them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.info.get_hf_config()  # type: ignore[attr-defined]
        self.geometry: Geometry | None = None
        self.unsupported = ""
        try:
            self.geometry = geometry_of(config)
        except UnsupportedModel as error:
            self.unsupported = str(error)
        server_wide = self.info.ctx.get_mm_config().mm_processor_kwargs or {}  # type: ignore[attr-defined]
        for key in (BUDGET_KEY, REDUCTION_KEY):
            if key in server_wide:
                raise ValueError(
                    f"{key} in --mm-processor-kwargs has no effect: a budget belongs to a "
                    "request, or to the defaults of `vllm-ficoco serve`"
                )

    def _settings(
        self, kwargs: Mapping[str, object], items: MultiModalDataItems
    ) -> list[Reduction | None]:
        """Settings of every image; None for one that is not reduced.

        Raises:
            VLLMValidationError: they cannot be used; vLLM answers with a 400.
        """
        images = items.get_all_counts().get("image", 0)
        key = BUDGET_KEY if kwargs.get(REDUCTION_KEY) is None else REDUCTION_KEY
        value = kwargs.get(key)
        try:
            asked = per_image(kwargs, images)
            if not any(asked):
                return asked
            if self.geometry is None:
                raise SettingsError(key, value, self.unsupported)
            if isinstance(items["image"], ImageEmbeddingItems):
                raise SettingsError(key, value, "left out with image_embeds inputs")
            for image, reduction in enumerate(asked):
                field = f"{key}[{image}]" if isinstance(value, Sequence) else key
                self.geometry.kept(reduction, field if key == BUDGET_KEY else f"{field}.budget")
            tokens = self.geometry.tokens
            return [reduction and reduction.for_tokens(tokens) for reduction in asked]
        except SettingsError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from None

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        """An image's hash depends on its own settings, not on those of its neighbours.

        An unreduced image has the hash that vLLM gives it, so its cached data are shared.
        """
        settings = self._settings(inputs.hf_processor_mm_kwargs, inputs.mm_data_items)
        ours = inputs.hf_processor_mm_kwargs
        inputs.hf_processor_mm_kwargs = _without_ours(ours)
        try:
            hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        finally:
            inputs.hf_processor_mm_kwargs = ours
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm  # type: ignore[attr-defined]
        if any(settings):
            hashes["image"] = [
                MultiModalHasher.hash_kwargs(algorithm, image=plain, reduction=reduction.key)
                + f"{_KEPT}{self.geometry.kept(reduction)}"
                if reduction and self.geometry
                else plain
                for plain, reduction in zip(hashes["image"], settings, strict=True)
            ]
        return hashes

    def _get_cache_missing_items(
        self, cache: Any, mm_data_items: MultiModalDataItems, mm_hashes: MultiModalHashes
    ) -> Any:
        """As vLLM's, which does not say that an image is known by its uuid and its settings.

        Raises:
            VLLMValidationError: an image came as a uuid alone, and is not known.
        """
        for image, image_hash in enumerate(mm_hashes.get("image", ())):
            if mm_data_items["image"][image] is None and not cache.is_cached_item(image_hash):
                raise VLLMValidationError(
                    f"Image {image} has a uuid and no data, and is not known: an image is kept by "
                    "its uuid together with its budget, method and options, and not for ever. Send "
                    "its data again.",
                    parameter="uuid",
                )
        return super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)  # type: ignore[misc]

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, object]:
        """Settings of the images that are not in the processor cache."""
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)  # type: ignore[misc]
        settings = self._settings(kwargs, inputs.mm_data_items)
        cached = mm_is_cached.get("image", [])
        missing = [s for s, hit in zip(settings, cached, strict=True) if not hit]
        return _without_ours(kwargs) | ({REDUCTION_KEY: missing} if any(missing) else {})

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        """The Hugging Face processor's output and one packed setting an image."""
        processed = super()._call_hf_processor(hf_data, _without_ours(hf_kwargs))  # type: ignore[misc]
        pixels = processed.get("pixel_values")
        if self.geometry is not None and pixels is not None:
            settings = per_image(hf_kwargs, len(pixels))
            tokens = self.geometry.tokens
            processed[PACKED_FIELD] = [pack(s and s.for_tokens(tokens)) for s in settings]
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        # On the CPU: the model reads the settings to lay out its work, and must not wait for them.
        return {**fields, PACKED_FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, _without_ours(hf_processor_mm_kwargs), out_mm_kwargs
        )
        settings = self._settings(hf_processor_mm_kwargs, mm_items)
        if not any(settings) or self.geometry is None:
            return updates
        geometry, image_token = self.geometry, self.info.get_hf_config().image_token_index  # type: ignore[attr-defined]

        def placeholders(image: int) -> list[int]:
            return [image_token] * geometry.kept(settings[image])

        return [PromptReplacement(modality="image", target=[image_token], replacement=placeholders)]


class ReducingLlavaProcessor(ReducingProcessorMixin, LlavaMultiModalProcessor):
    """LLaVA with a CLIP or SigLIP tower."""


class ReducingPixtralProcessor(ReducingProcessorMixin, PixtralHFMultiModalProcessor):
    """LLaVA with a Pixtral tower: as in vLLM, and a budget is refused."""


def _processor(
    info: BaseLlavaProcessingInfo, dummy_inputs: BaseDummyInputsBuilder
) -> BaseMultiModalProcessor:
    if isinstance(info, PixtralHFProcessingInfo):
        return ReducingPixtralProcessor(info, dummy_inputs)
    assert isinstance(info, LlavaProcessingInfo)
    return ReducingLlavaProcessor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    _processor,
    info=_build_llava_or_pixtral_hf_info,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class ReducingLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """vLLM's LLaVA, whose images come out of the tower with as many tokens as they were given.

    A batch in which nothing is reduced takes vLLM's own path; so do, in a mixed batch, the images
    that are not reduced.
    """

    # A LoRA on the tower maps rows to adapters once per image; rows that leave break the map.
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.staged_decoder: StagedDecoder | None = None
        try:
            geometry = geometry_of(self.config)
        except UnsupportedModel:
            return  # the processor refuses settings, so none can come
        if geometry.starts:
            from vllm_ficoco.engine.checks import check
            from vllm_ficoco.engine.decoder import StagedDecoder

            check(vllm_config)
            self.staged_decoder = StagedDecoder(
                self.language_model.model,
                geometry,
                vllm_config,
                tensor_model_parallel_all_reduce,
            )
        # Every rank does the same work; the time of one of them is enough.
        timer = {"timer": StageTimer()} if get_tensor_model_parallel_rank() == 0 else {}
        self.reducing_tower = ReducingTower(
            self.vision_tower.vision_model, geometry, tensor_model_parallel_all_reduce, **timer
        )
        self.geometry = geometry
        # A step has no more of them (vllm_ficoco.engine.encoder) unless vLLM was given an encoder
        # cache manager of another make; what memory was set aside for holds all the same.
        self.images_at_once = geometry.images_at_once(
            vllm_config.scheduler_config.max_num_encoder_input_tokens
        )

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Visual tokens of a batch of images, possibly of several requests.

        Args:
            **kwargs: the processor's fields: ``pixel_values`` (B, 3, height, width) and the packed
                settings of every image.

        Returns:
            One tensor (kept, hidden size of the decoder) an image.
        """
        packed: Any = kwargs.pop(PACKED_FIELD, None)
        settings = [] if packed is None else [unpack(p) for p in packed]
        if not any(settings):
            return super().embed_multimodal(**kwargs)
        image_input = self._parse_and_validate_image_input(**kwargs)
        assert image_input is not None and image_input["type"] == "pixel_values"
        pixels = image_input["pixel_values"]
        whole = [i for i, r in enumerate(settings) if r is None or not self.geometry.stages(r)]
        reduced = [(i, r) for i, r in enumerate(settings) if r is not None and i not in whole]
        outputs: dict[int, torch.Tensor] = {}
        if whole:
            unreduced = super().embed_multimodal(pixel_values=rows(pixels, whole))
            outputs.update(zip(whole, unreduced, strict=True))
        features: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Equal settings side by side: they run as one batch.
        reduced.sort(key=lambda image: image[1].key)
        for start in range(0, len(reduced), self.images_at_once):
            index, part = zip(*reduced[start : start + self.images_at_once], strict=True)
            features += self.reducing_tower(rows(pixels, list(index)), part)
        if features:
            # One projector call for all groups: it works token by token.
            hidden, places = zip(*features, strict=True)
            embedded = self.multi_modal_projector(torch.cat(hidden)).split([*map(len, hidden)])
            outputs.update(zip([i for i, _ in reduced], embedded, strict=True))
        if self.staged_decoder is not None:
            in_tower = dict(zip([i for i, _ in reduced], places if features else (), strict=True))
            for i, reduction in enumerate(settings):
                outputs[i] = self.staged_decoder.mark(
                    outputs[i], reduction, in_tower.get(i), pixels[i : i + 1]
                )
        return [outputs[i] for i in range(len(settings))]

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's; the staged decoder is told which rows are images that it is to reduce."""
        if self.staged_decoder is not None:
            multimodal_embeddings = self.staged_decoder.unmark(
                multimodal_embeddings or (), is_multimodal
            )
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        if self.staged_decoder is None:
            return super().forward(
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )
        return self.staged_decoder(input_ids, positions, inputs_embeds)

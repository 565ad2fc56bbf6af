# SPDX-License-Identifier: Apache-2.0
"""vLLM's model area: images come out of the tower with as many tokens as they were given.

How many that is, is decided by :mod:`vllm_ficoco.models.processing`; both ask
:meth:`vllm_ficoco.vision.geometry.Geometry.kept`, and the packed field says of which image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_ficoco.methods.paradigm import on_device
from vllm_ficoco.packed import Packed
from vllm_ficoco.vision.geometry import Geometry, UnsupportedModel, geometry_of
from vllm_ficoco.vision.timing import StageTimer
from vllm_ficoco.vision.tower import Timer, no_timer

if TYPE_CHECKING:  # a server without stages loads nothing of them
    from vllm_ficoco.engine.decoder import StagedDecoder


class ReducingModel:
    """The mixin for vLLM's models: their tower, and the stages of their decoder."""

    # A LoRA on the tower maps rows to adapters once per image; rows that leave break the map.
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.staged_decoder: StagedDecoder | None = None
        # A step has no more of them (vllm_ficoco.engine.encoder) unless vLLM was given an encoder
        # cache manager of another make; what memory was set aside for holds all the same.
        self.images_at_once = vllm_config.scheduler_config.max_num_encoder_input_tokens
        try:
            geometry = geometry_of(self.config)  # type: ignore[attr-defined]
        except UnsupportedModel as error:
            self.geometry = Geometry.none(str(error))
            return  # the processor refuses settings, so none can come
        self.images_at_once = geometry.images_at_once(self.images_at_once)
        if geometry.starts:
            from vllm_ficoco.engine.checks import check
            from vllm_ficoco.engine.decoder import StagedDecoder

            check(vllm_config)
            self.staged_decoder = StagedDecoder(
                self.language_model.model,  # type: ignore[attr-defined]
                geometry,
                vllm_config,
                tensor_model_parallel_all_reduce,
            )
        # Every rank does the same work; the time of one of them is enough.
        first = get_tensor_model_parallel_rank() == 0
        self.reducing_tower = self.make_tower(geometry, StageTimer() if first else no_timer)
        self.geometry = geometry

    def make_tower(self, geometry: Geometry, timer: Timer) -> Any:
        """The tower that reduces, over vLLM's."""
        raise NotImplementedError

    @cached_property
    def _words(self) -> VocabParallelEmbedding:
        """The language model's table, without an adapter's rows: those follow a step's tokens."""
        modules = self.get_language_model().modules()  # type: ignore[attr-defined]
        return next(m for m in modules if isinstance(m, VocabParallelEmbedding))

    def embed_questions(self, images: Sequence[Packed]) -> Tensor | None:
        """(images, C): see :attr:`Evidence.question`. None where no method of theirs asks."""
        if not any(i.reduction is not None and i.reduction.spec.asks_question for i in images):
            return None
        table = self._words
        words = [word for image in images for word in image.question]
        none = torch.zeros(table.embedding_dim, device=table.weight.device)
        if not words:
            return none.expand(len(images), -1)
        rows = table(on_device(words, none.device)).float()
        rows = torch.nn.functional.normalize(rows, dim=-1)
        by_image = rows.split([len(image.question) for image in images])
        return torch.stack([own.mean(0) if len(own) else none for own in by_image])

    state_cls: Any = DefaultModelState
    """Of Model Runner V2."""

    def get_model_state_cls(self) -> Any:
        """For Model Runner V2: what it knows of the model's requests."""
        if self.staged_decoder is None:
            return self.state_cls
        from vllm_ficoco.engine.state import staged

        return staged(self.state_cls)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """As vLLM's; the staged decoder is told which rows are images that it is to reduce."""
        if self.staged_decoder is not None:
            multimodal_embeddings = self.staged_decoder.unmark(
                multimodal_embeddings or (), is_multimodal
            )
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        if self.staged_decoder is None:
            return super().forward(  # type: ignore[misc]
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )
        # Qwen3-VL has set them aside in a buffer of its own when it made the embeddings.
        levels = None
        if self.geometry.deepstack and inputs_embeds is not None:
            levels = self._get_deepstack_input_embeds(len(inputs_embeds))  # type: ignore[attr-defined]
        hidden = self.staged_decoder(input_ids, positions, inputs_embeds, levels)
        if levels is not None and inputs_embeds is not None:
            self._clear_deepstack_input_embeds(len(inputs_embeds))  # type: ignore[attr-defined]
        return hidden

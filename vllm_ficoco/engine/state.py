# SPDX-License-Identifier: Apache-2.0
"""vLLM's model state area (Model Runner V2): what the host knows of a batch's gaps.

A plan is a function of a request's prompt and settings, so the worker makes it again, from what
comes with the request, and need not read the block table on the device to learn which rows lie in
gaps. Model Runner V1 has no such place; there the host reads the table.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from vllm_ficoco.engine.gaps import Plan
from vllm_ficoco.engine.plans import plan_of
from vllm_ficoco.vision.geometry import geometry_of


class Gaps(ModelSpecificAttnMetadata):
    """Hands the plans of a batch's requests to the metadata builders of later stages."""

    def __init__(self, plans: Sequence[Plan | None]) -> None:
        self.plans = plans

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        takes = getattr(attn_metadata_builder, "takes_plans", False)
        return {"plans": self.plans} if takes else {}


@functools.cache
def staged(base: type[Any]) -> type[Any]:
    """A model state that also keeps the plans of the requests that the worker holds."""

    class StagedState(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.geometry = geometry_of(self.model_config.hf_config)
            self.plans: dict[int, Plan] = {}
            self.indices: dict[str, int] = {}

        def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
            super().add_request(req_index, new_req_data)
            plan = plan_of(
                new_req_data.mm_features,
                new_req_data.prompt_len,
                self.geometry,
                self.vllm_config.cache_config.block_size,
            )
            if plan is not None:
                self.plans[req_index] = plan
                self.indices[new_req_data.req_id] = req_index

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            if req_id in self.indices:
                del self.plans[self.indices.pop(req_id)]

        def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            if input_batch.has_prefill:  # no dummy has one
                plans = [self.plans.get(int(index)) for index in input_batch.idx_mapping_np]
                kwargs["model_specific_attn_metadata"] = Gaps(plans)
            prepared: dict[str, Any] = super().prepare_attn(input_batch, *args, **kwargs)
            return prepared

    return StagedState

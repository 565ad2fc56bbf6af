# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler area: plans the gaps of a request before any block is allocated for it.

Turned on with ``--scheduler-cls vllm_ficoco.engine.scheduler.make_scheduler``, which
``vllm-ficoco serve --reduction-stages`` does; :mod:`vllm_ficoco.engine.checks` says what it needs.
"""

from __future__ import annotations

import hashlib
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from vllm_ficoco import schedule
from vllm_ficoco.engine.checks import needs_whole_prompt
from vllm_ficoco.engine.encoder import TowerBudget
from vllm_ficoco.engine.gaps import Plan
from vllm_ficoco.engine.kv import GapManager, PlannedHashes
from vllm_ficoco.engine.plans import plan_of
from vllm_ficoco.vision.geometry import geometry_of

logger = init_logger(__name__)


class _Planning:
    """The mixin for both of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.geometry = geometry_of(self.vllm_config.model_config.hf_config)  # type: ignore[attr-defined]
        managers = self.kv_cache_manager.coordinator.single_type_managers  # type: ignore[attr-defined]
        strange = [type(m).__name__ for m in managers if not isinstance(m, GapManager)]
        if strange:
            raise ValueError(
                f"reduction stages need a KV cache of decoder layers alone, not also {strange}"
            )
        self.managers: tuple[GapManager, ...] = managers
        groups = self.kv_cache_config.kv_cache_groups  # type: ignore[attr-defined]
        self.parts = [
            schedule.Part(manager.stage, len(group.layer_names), manager.block_size)
            for manager, group in zip(managers, groups, strict=True)
        ]
        packed = schedule.blocks_differ(self.parts)
        block = self.vllm_config.cache_config.block_size  # type: ignore[attr-defined]
        due = schedule.parts(self.geometry.spans, block, packed)
        if self.parts != due:
            raise ValueError(f"KV cache groups: {self.parts}, but {due} were due")
        self.plans: dict[str, Plan] = {}
        self.refused: set[str] = set()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, but a worker gets all images of a new request.

        vLLM 0.32 leaves out those that a prefix hit covers (``strip_covered_mm_data``). If such a
        request is preempted and its prefix evicted, Model Runner V1 has nothing to encode again,
        and the engine dies with "Encoder cache miss". The soak test runs into it.
        """
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        for new in output.scheduled_new_reqs:
            new.mm_features = self.requests[new.req_id].mm_features  # type: ignore[attr-defined]
        return output

    def add_request(self, request: Request) -> None:
        plan = self._plan(request)
        if plan is not None:
            self.plans[request.request_id] = plan
            for manager in self.managers:
                if plan.gaps[manager.stage]:
                    manager.plans[request.request_id] = plan
        super().add_request(request)  # type: ignore[misc]
        if plan is not None:
            # Rows that leave have no logprobs, and a plan is of a whole prompt, whose images run
            # in one step where the method reads the question. Our front end has refused the first
            # and the last; a request that comes another way ends in an error.
            wrong = {
                "prompt_logprobs": needs_whole_prompt(request.sampling_params) is not None,
                "prompts that come in pieces": request.resumable,
                "more images than a step can encode": (
                    plan.looks_at_question
                    and self._encoded(request) > self.max_num_encoder_input_tokens  # type: ignore[attr-defined]
                ),
            }
            for what in (name for name, present in wrong.items() if present):
                logger.error("%s: no %s with decoder stages", request.request_id, what)
                self.refused.add(request.request_id)

    def _encoded(self, request: Request) -> int:
        """Visual tokens that the tower makes for a request, as far as it is asked to count them."""
        manager = self.encoder_cache_manager  # type: ignore[attr-defined]
        if not isinstance(manager, TowerBudget):
            return 0
        once = {feature.identifier: feature for feature in request.mm_features}
        return sum(map(manager.encoded, once.values()))

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """As vLLM's, but refused requests end here, before what they computed is put out."""
        ended = self.finish_requests(self.refused, RequestStatus.FINISHED_ERROR)  # type: ignore[attr-defined]
        self.refused.clear()
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        for request in ended:
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs

    def _plan(self, request: Request) -> Plan | None:
        """The plan of a request; None where the decoder reduces nothing of it.

        Its prefix hashes are made such that its blocks are found by requests that reduce alike,
        and by no other.
        """
        plan = plan_of(
            request.mm_features,
            request.num_prompt_tokens,
            self.geometry,
            self.parts[-1].block,
        )
        if plan is None:
            return None
        salt = _salt(request, plan)
        if salt:
            request.cache_salt = f"{request.cache_salt or ''}|{salt}"
            request.block_hashes.clear()
            request.update_block_hashes()
        request.block_hashes = PlannedHashes(request.block_hashes, plan)
        return plan

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kw: Any
    ) -> Any:
        """As vLLM's, which may cut a prefill short; but never where a method cannot bear it.

        vLLM's own ``disable_chunked_mm_input`` does not do: it lets a prefill stop inside an image
        that begins where the last one stopped.
        """
        plan = self.plans.get(request.request_id)
        if plan is not None:
            num_new_tokens = _clipped(plan, num_computed_tokens, num_new_tokens)
        answer = super()._try_schedule_encoder_inputs(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens, *args, **kw
        )
        if plan is None or answer[1] == num_new_tokens:
            return answer
        # Cut short before an image that cannot be encoded now: that may be between two images.
        inputs, cut, *rest = answer
        return inputs, _clipped(plan, num_computed_tokens, cut), *rest

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)  # type: ignore[misc]
        self.plans.pop(request.request_id, None)
        for manager in self.managers:
            manager.plans.pop(request.request_id, None)


def _clipped(plan: Plan, start: int, count: int) -> int:
    return plan.last_stop(start, start + count) - start


def _salt(request: Request, plan: Plan) -> str:
    """What the KV of a reduced prompt depends on beside the tokens and images up to there.

    A block's hash has in it the images up to its end, and an image's has its settings. Where the
    text behind an image chooses its tokens, that text has seen all images before it: those that
    come after the block are needed, too.
    """
    parts = []
    if plan.looks_at_question:
        images = [feature.identifier for feature in request.mm_features]
        whole = repr((list(request.prompt_token_ids), images))
        parts.append(hashlib.sha256(whole.encode()).hexdigest())
    if plan.runs[-1].end == plan.prompt:  # its gap may be a block shorter, see gap_of
        parts.append("image at the end")
    return "|".join(parts)


class PlanningScheduler(_Planning, Scheduler):
    """vLLM's scheduler, with gaps."""


class PlanningAsyncScheduler(_Planning, AsyncScheduler):
    """vLLM's scheduler for asynchronous scheduling, with gaps."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> SchedulerInterface:
    """The scheduler for ``--scheduler-cls``: vLLM has two, and picks by ``async_scheduling``."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    cls = PlanningAsyncScheduler if asynchronous else PlanningScheduler
    return cls(vllm_config=vllm_config, **kwargs)

# SPDX-License-Identifier: Apache-2.0
"""What vLLM's configuration of an engine says for our models where nothing else was said."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_ficoco.vision.geometry import geometry_of

logger = init_logger(__name__)

ENCODER_CACHE_MANAGER = "vllm_ficoco.engine.encoder.TowerBudget"
"""For ``--ec-manager-config``."""

ENCODER_TOKENS_KEY = "reduction_encoder_tokens"
"""Of a model's configuration: visual tokens of a step, which its processor cannot see otherwise."""


class ReducingConfig(VerifyAndUpdateConfig):
    """Images are scheduled by what the tower does, see :mod:`vllm_ficoco.engine.encoder`."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        try:
            geometry_of(vllm_config.model_config.hf_config)
        except ValueError:
            return  # nothing can be reduced, or the model will say what is wrong
        setattr(  # every process of vLLM has the model's configuration
            vllm_config.model_config.hf_config,
            ENCODER_TOKENS_KEY,
            vllm_config.scheduler_config.max_num_batched_tokens,
        )
        config = vllm_config.ec_manager_config
        if config.encoder_cache_manager_cls is None:
            config.encoder_cache_manager_cls = ENCODER_CACHE_MANAGER
        elif config.encoder_cache_manager_cls != ENCODER_CACHE_MANAGER:
            logger.warning_once(
                "The encoder cache manager %s counts images by the tokens that they keep: a step "
                "can put any number of strongly reduced ones through the vision tower.",
                config.encoder_cache_manager_cls,
            )

# SPDX-License-Identifier: Apache-2.0
"""What vLLM's configuration of an engine says for our models where nothing else was said."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_ficoco.preview import WORKER_EXTENSION
from vllm_ficoco.vision.geometry import (
    GRAPHS_KEY,
    PRUNED_KEY,
    Geometry,
    UnsupportedModel,
    geometry_of,
    graphed,
)

logger = init_logger(__name__)

ENCODER_CACHE_MANAGER = "vllm_ficoco.engine.encoder.TowerBudget"
"""For ``--ec-manager-config``."""

ENCODER_TOKENS_KEY = "reduction_encoder_tokens"
"""Of a model's configuration: visual tokens of a step, which its processor cannot see otherwise."""


class ReducingConfig(VerifyAndUpdateConfig):
    """Images are scheduled by what the tower does, see :mod:`vllm_ficoco.engine.encoder`."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        geometry: Geometry | None = None
        multimodal = vllm_config.model_config.multimodal_config
        if multimodal is not None and multimodal.is_multimodal_pruning_enabled():
            setattr(vllm_config.model_config.hf_config, PRUNED_KEY, True)
        try:
            geometry = geometry_of(vllm_config.model_config.hf_config)
        except UnsupportedModel:
            pass  # nothing can be reduced
        except ValueError:
            return  # the model will say what is wrong
        settle_graphs(vllm_config, geometry)
        if geometry is None:
            return
        setattr(  # every process of vLLM has the model's configuration
            vllm_config.model_config.hf_config,
            ENCODER_TOKENS_KEY,
            vllm_config.scheduler_config.max_num_batched_tokens,
        )
        if not vllm_config.parallel_config.worker_extension_cls:  # else there are no previews
            vllm_config.parallel_config.worker_extension_cls = WORKER_EXTENSION
        config = vllm_config.ec_manager_config
        if config.encoder_cache_manager_cls is None:
            config.encoder_cache_manager_cls = ENCODER_CACHE_MANAGER
        elif config.encoder_cache_manager_cls != ENCODER_CACHE_MANAGER:
            logger.warning_once(
                "The encoder cache manager %s counts images by the tokens that they keep: a step "
                "can put any number of strongly reduced ones through the vision tower.",
                config.encoder_cache_manager_cls,
            )


def settle_graphs(vllm_config: VllmConfig, geometry: Geometry | None) -> None:
    """CUDA graphs of the vision tower: who names settings for them has them, and is told.

    Raises:
        ValueError: the settings are wrong, or for another model.
    """
    model, compilation = vllm_config.model_config, vllm_config.compilation_config
    if geometry is None or geometry.by_image:
        if hasattr(model.hf_config, GRAPHS_KEY):
            raise ValueError(
                f"{GRAPHS_KEY} (--reduction-graphs, or cudagraph_mm_encoder given to vllm-ficoco) "
                "must be left out: CUDA graphs of the vision tower are there for LLaVA-1.5 with a "
                f"CLIP or SigLIP tower, not for {model.hf_config.model_type} as it is here"
            )
        if geometry is None:  # as vLLM's own, which has no such graphs
            compilation.cudagraph_mm_encoder = False
        return
    names = graphed(model.hf_config, geometry)
    able = current_platform.is_cuda() and not model.enforce_eager
    if names and able and not model.get_multimodal_config().language_model_only:
        compilation.cudagraph_mm_encoder = True
    if able and compilation.cudagraph_mm_encoder:
        logger.info_once(
            "The vision tower runs in CUDA graphs (cudagraph_mm_encoder) with images that are not "
            "reduced%s; others run without.",
            "".join(f", {name}" for name in names),
        )
    elif names:
        logger.warning_once(
            "%s: the vision tower runs without CUDA graphs here (no CUDA, --enforce-eager or "
            "--language-model-only).",
            GRAPHS_KEY,
        )

# SPDX-License-Identifier: Apache-2.0
"""The registry of methods: one file and one line each. CONTRIBUTING.md says how to add one."""

from __future__ import annotations

from vllm_ficoco.methods.a_score import A_SCORE
from vllm_ficoco.methods.apet import APET
from vllm_ficoco.methods.cdpruner import CDPRUNER
from vllm_ficoco.methods.dart import DART
from vllm_ficoco.methods.dpp import DPP
from vllm_ficoco.methods.dycoke import DYCOKE
from vllm_ficoco.methods.evit import EVIT
from vllm_ficoco.methods.fastv import FASTV
from vllm_ficoco.methods.fastvid import FASTVID
from vllm_ficoco.methods.ficoco_k import FICOCO_K
from vllm_ficoco.methods.ficoco_l import FICOCO_L
from vllm_ficoco.methods.ficoco_v import FICOCO_V
from vllm_ficoco.methods.ficoco_vl import FICOCO_VL
from vllm_ficoco.methods.fitprune import FITPRUNE
from vllm_ficoco.methods.globalcom2 import GLOBALCOM2
from vllm_ficoco.methods.hired import HIRED
from vllm_ficoco.methods.k_norm import K_NORM
from vllm_ficoco.methods.mustdrop import MUSTDROP
from vllm_ficoco.methods.none import NONE
from vllm_ficoco.methods.paradigm import Evidence, Method, Options, Tokens
from vllm_ficoco.methods.pooling import POOLING
from vllm_ficoco.methods.prumerge import PRUMERGE
from vllm_ficoco.methods.pyramiddrop import PYRAMIDDROP
from vllm_ficoco.methods.random import RANDOM
from vllm_ficoco.methods.random_decoder import RANDOM_DECODER
from vllm_ficoco.methods.recoverable import RECOVERABLE
from vllm_ficoco.methods.resize import RESIZE
from vllm_ficoco.methods.scope import SCOPE
from vllm_ficoco.methods.score import SCORE
from vllm_ficoco.methods.sieve import SIEVE
from vllm_ficoco.methods.sparsevlm import SPARSEVLM
from vllm_ficoco.methods.tome import TOME
from vllm_ficoco.methods.topk import TOPK
from vllm_ficoco.methods.tops import TOPS
from vllm_ficoco.methods.uniform import UNIFORM
from vllm_ficoco.methods.uniform_frames import UNIFORM_FRAMES
from vllm_ficoco.methods.v_norm import V_NORM
from vllm_ficoco.methods.vidcom2 import VIDCOM2
from vllm_ficoco.methods.visionzip import VISIONZIP
from vllm_ficoco.methods.vitcop import VITCOP

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        NONE,
        FICOCO_V,
        FICOCO_K,
        TOME,
        EVIT,
        SCORE,
        DPP,
        SCOPE,
        APET,
        CDPRUNER,
        RECOVERABLE,
        TOPK,
        VISIONZIP,
        PRUMERGE,
        GLOBALCOM2,
        HIRED,
        POOLING,
        UNIFORM,
        RANDOM,
        RESIZE,
        VIDCOM2,
        DYCOKE,
        FASTVID,
        UNIFORM_FRAMES,
        FICOCO_L,
        FICOCO_VL,
        FASTV,
        SPARSEVLM,
        PYRAMIDDROP,
        DART,
        VITCOP,
        SIEVE,
        TOPS,
        MUSTDROP,
        FITPRUNE,
        K_NORM,
        V_NORM,
        A_SCORE,
        RANDOM_DECODER,
    )
}

__all__ = ["METHODS", "Evidence", "Method", "Options", "Tokens"]

# SPDX-License-Identifier: Apache-2.0
"""FiCoCo-VL: FiCoCo-V in the tower, FiCoCo-L in the decoder on what is left.

Han et al., arXiv 2411.17686, section 3.2. The paper does not say how the two share a budget: here
every place of reduction, the tower first, leaves the same share of what it finds.
"""

from __future__ import annotations

from dataclasses import replace

from vllm_ficoco.methods.ficoco_l import FICOCO_L, FiCoCoLOptions
from vllm_ficoco.methods.ficoco_v import FICOCO_V, FiCoCoVOptions


class FiCoCoVLOptions(FiCoCoVOptions, FiCoCoLOptions):
    """Options of both; those of one name hold for both."""


FICOCO_VL = replace(
    FICOCO_V,
    name="ficoco-vl",
    idea="FiCoCo-V in the tower, then FiCoCo-L at decoder stages",
    options=FiCoCoVLOptions,
    decoder=FICOCO_L.decoder,
)

# SPDX-License-Identifier: Apache-2.0
"""A SigLIP tower without [CLS], split over two ranks, gives what one rank's reference gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.conftest import Ask, Engine
from tests.engine.test_generation import REDUCING, check
from tests.reference.llava import ReferenceLlava

pytestmark = pytest.mark.engine


def test_two_ranks_generate_what_the_reference_does(
    two_rank_engine: Engine, siglip_checkpoint: Path
) -> None:
    reference = ReferenceLlava(str(siglip_checkpoint))
    asks = [Ask([1], [None])]
    for i, name in enumerate(REDUCING):
        asks.append(Ask([i], [{"method": name, "budget": 40 + i}]))
    options = {"attention": "probabilities"}
    asks.append(Ask([2], [{"method": "ficoco-v", "budget": 40, "options": options}]))
    asks.append(Ask([2], [{"budget": 40}]))
    for ask, output in zip(asks, two_rank_engine.generate(asks), strict=True):
        check(reference, ask, output)

# SPDX-License-Identifier: Apache-2.0
"""The plan of a request, by what scheduler and worker both know of it."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.multimodal.inputs import MultiModalFeatureSpec

from vllm_ficoco.engine.gaps import Plan, Run
from vllm_ficoco.packed import packed_of
from vllm_ficoco.vision.geometry import Geometry


def plan_of(
    features: Sequence[MultiModalFeatureSpec] | None,
    prompt: int,
    geometry: Geometry,
    block_size: int,
) -> Plan | None:
    """What every stage keeps of a request's images; None where the decoder reduces none of them.

    Args:
        features: its images and videos, with their settings.
        prompt: tokens of its prompt.
        geometry: of the checkpoint, with the stages.
        block_size: tokens of a KV cache block, the same in all stages from 1 on.
    """
    runs, keep, settings = [], [], []
    for feature in features or ():
        reduction, layout, *_ = packed_of(feature.data)
        place = feature.mm_position
        runs.append(Run(place.offset, place.offset + place.length))
        keep.append(
            geometry.held(reduction, layout=layout)[1:]
            if reduction is not None and reduction.spec.decoder is not None
            else [place.length] * len(geometry.starts)  # text between a video's frames included
        )
        settings.append(reduction)
    parts = [r.spec.decoder for r in settings if r is not None and r.spec.decoder is not None]
    if not parts:
        return None
    return Plan.of(runs, keep, block_size, prompt, any(part.looks_at_question for part in parts))

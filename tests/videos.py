# SPDX-License-Identifier: Apache-2.0
"""Films of which tests know what happens in them, and the bytes of files with them."""

from __future__ import annotations

import base64
import tempfile
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def filmed(
    frames: int, size: tuple[int, int] = (112, 84), seed: int = 0, event: int | None = None
) -> np.ndarray:
    """A film, (frames, height, width, 3) of 8 bits: a square moves over coarse noise that stays.

    Args:
        frames: how many.
        size: width and height of each.
        seed: of what is seen.
        event: of one frame the lower half is something else.
    """
    lot, (width, height) = np.random.default_rng(seed), size
    coarse = lot.integers(0, 255, (2, 6, 8, 3), dtype=np.uint8)
    scene, other = (
        np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.NEAREST))
        for cells in coarse
    )
    colour, side = lot.integers(0, 255, 3, dtype=np.uint8), min(size) // 4
    film = np.repeat(scene[None], frames, 0)
    for i, frame in enumerate(film):
        if i == event:
            frame[height // 2 :] = other[height // 2 :]
        x, y = ((room - side) * i // max(frames - 1, 1) for room in (width, height))
        frame[y : y + side, x : x + side] = colour
    return film


def mp4(film: np.ndarray, fps: float = 2) -> bytes:
    """A film of even sides as a file, as cameras make them; its colours are near what they were.

    Of a file with one frame vLLM's decoder finds none, here and in :func:`gif`.
    """
    _, height, width, _ = film.shape
    with tempfile.TemporaryDirectory() as folder:  # OpenCV writes to paths alone
        path = Path(folder, "film.mp4")
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
        assert writer.isOpened()
        for frame in film:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
        return path.read_bytes()


def gif(film: np.ndarray, fps: float = 2) -> bytes:
    """A film as a file that keeps the colours of :func:`filmed`, which are few, as they are."""
    first, *others = (
        Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in film
    )
    file = BytesIO()
    first.save(
        file, "GIF", save_all=True, append_images=others, duration=1000 / fps, optimize=False
    )
    return file.getvalue()


def data_url(file: bytes) -> str:
    """A file of :func:`mp4` or :func:`gif` as a ``video_url`` has it."""
    kind = "image/gif" if file.startswith(b"GIF") else "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"

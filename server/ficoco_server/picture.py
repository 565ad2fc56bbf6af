# SPDX-License-Identifier: Apache-2.0
"""``vllm-ficoco preview``: a picture of what a running server keeps of an image.

A client of ``POST /v1/reduction/preview``. It needs Pillow and nothing of vLLM's.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import mimetypes
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

DIMMED = 0.2
"""What is left of the light of patches that are not kept."""


def kept_of(image: Image.Image, grid: Mapping[str, Any], kept: Collection[int]) -> Image.Image:
    """An image whose kept patches are clear, and all that the grid does not keep is dimmed.

    Args:
        image: the picture.
        grid: one of a preview's grids.
        kept: places.
    """
    rows, columns, first = grid["rows"], grid["columns"], grid["first"]
    cells = Image.new("L", (columns, rows))
    cells.putdata([255 if first + place in kept else 0 for place in range(rows * columns)])
    left, top, right, bottom = grid["area"]
    width, height = image.size
    # Where in the cells a pixel of the picture lies.
    across, down = columns / ((right - left) * width), rows / ((bottom - top) * height)
    mask = cells.transform(
        image.size,
        Image.Transform.AFFINE,
        (across, 0, -left * width * across, 0, down, -top * height * down),
        Image.Resampling.NEAREST,
    )
    image = image.convert("RGB")
    return Image.composite(image, image.point(lambda light: int(light * DIMMED)), mask)


def draw(image: Image.Image, preview: Mapping[str, Any], stage: int | None = None) -> Image.Image:
    """What a preview keeps of an image; of one in tiles, thumbnail and tiles side by side.

    Args:
        image: that the preview is of.
        preview: the server's answer.
        stage: behind which of its stages, from 0; default the last one.
    """
    kept = {*(preview["kept"] if stage is None else preview["stages"][stage]["kept"])}
    panels = [kept_of(image, grid, kept) for grid in preview["grids"]]
    gap = 8
    width = len(panels) * (image.width + gap) - gap
    drawn = Image.new("RGB", (width, image.height), "white")
    for number, panel in enumerate(panels):
        drawn.paste(panel, (number * (image.width + gap), 0))
    return drawn


def ask(base_url: str, api_key: str | None, body: Mapping[str, Any]) -> Any:
    """A server's answer.

    Raises:
        SystemExit: with what it says, or that there is none.
    """
    url = f"{base_url.rstrip('/').removesuffix('/v1')}/v1/reduction/preview"
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(said)["error"]["message"]
        sys.exit(f"vllm-ficoco preview: {error.code}: {said}")
    except OSError as error:
        sys.exit(f"vllm-ficoco preview: no answer from {url}: {error}")


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="vllm-ficoco preview",
        description="Draw what a running server keeps of an image: kept patches clear, the others "
        "dimmed.",
    )
    parser.add_argument("image", type=Path, help="file of the image")
    parser.add_argument("--out", type=Path, required=True, help="file to draw to")
    parser.add_argument("--budget", help="visual tokens to keep, or auto")
    parser.add_argument("--method", help="default: the server's")
    parser.add_argument("--options", help="of the method, in JSON")
    parser.add_argument("--question", default="", help="for methods that read it")
    parser.add_argument(
        "--stage", type=int, metavar="N", help="draw what is left behind stage N, from 0 on"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answer there, too")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    args = parser.parse_args(arguments)
    try:
        data = args.image.read_bytes()
        image = ImageOps.exif_transpose(Image.open(args.image))
        options = json.loads(args.options) if args.options else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    kind = mimetypes.guess_type(args.image.name)[0] or "image/png"
    body: dict[str, Any] = {
        "image": f"data:{kind};base64,{base64.b64encode(data).decode()}",
        "question": args.question,
    }
    budget = int(args.budget) if (args.budget or "").isdecimal() else args.budget
    if args.method or options is not None:
        body["reduction"] = {"method": args.method, "budget": budget, "options": options}
    else:
        body["visual_token_budget"] = budget
    preview = ask(args.base_url, args.api_key, body)
    if args.stage is not None and args.stage not in range(len(preview["stages"])):
        parser.error(f"--stage {args.stage}: there are {len(preview['stages'])} stages")
    draw(image, preview, args.stage).save(args.out)
    if args.json:
        args.json.write_text(json.dumps(preview))
    report = preview["reduction"]
    print(
        f"{report['method']}: {report['visual_tokens_kept']} of "
        f"{report['visual_tokens_before']} visual tokens kept; drawn to {args.out}"
    )
    if preview["note"]:
        print(preview["note"])

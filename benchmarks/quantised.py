# SPDX-License-Identifier: Apache-2.0
"""Quantised weights and reduced images together: arithmetic for LLaVA-1.5-7B, and the accuracy of
the shipped model.

    python -m benchmarks.quantised                          # arithmetic: the paper's table 8
    python -m benchmarks.quantised none w8a8 fp8 w4a16 awq  # asks the shipped model in each

The arithmetic is of FLOPs as ``vllm_ficoco/cost.py`` counts them, which no weights change, of the
bytes of weights and their scales, and of the KV cache of one prompt in 16 bits, which vLLM keeps in
16 bits whatever the weights are. The shipped model runs with W8A8 and FP8 through vLLM's kernels;
with 4 bits it has what its weights are worth, in float32, which is what the formats mean.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_ficoco.cost import Decoder, prefill_flops
from vllm_ficoco.engine.gaps import Run, held_of
from vllm_ficoco.settings import Reduction
from vllm_ficoco.tiny_llava import CHECKPOINT
from vllm_ficoco.vision.geometry import FAMILIES, Geometry

DECODER = Decoder(
    layers=32, hidden_size=4096, intermediate_size=11008, heads=32, kv_heads=32, head_size=128
)
"""Of LLaVA-1.5-7B."""
GEOMETRY = Geometry((24, 24), 23, True, decoder_layers=32, starts=(3,), offers=FAMILIES["llava"])
TEXT = 60
"""Words beside an image, as in the paper."""
IMAGE = Run(35, 35 + 576)
BLOCK = 16
OTHER_WEIGHTS = 2 * 32_064 * 4096 + 303_507_456 + 20_979_712
"""Embeddings and head, CLIP-L at 336 pixels, projector: they stay in 16 bits."""
GROUP = 128
MEMORY, WORKING = 24e9, 2e9
"""Of a card, and what of it is left for activations."""


class Weights(NamedTuple):
    """How the decoder's projections are stored."""

    name: str
    bits: int

    @property
    def bytes(self) -> int:
        """Of the whole model."""
        d, h = DECODER.hidden_size, DECODER.intermediate_size
        width = DECODER.heads * DECODER.head_size
        outputs = 3 * width + 2 * h + 2 * d  # of a layer
        weights = DECODER.layers * (DECODER.projection_weights + DECODER.mlp_weights)
        scales = {16: 0, 8: DECODER.layers * outputs, 4: weights // GROUP}[self.bits]
        return weights * self.bits // 8 + 2 * scales + 2 * OTHER_WEIGHTS


WEIGHTS = (Weights("16 bits", 16), Weights("W8A8, FP8", 8), Weights("W4A16, AWQ, GPTQ", 4))
REDUCTIONS = ("none", "ficoco-v", "ficoco-l", "ficoco-vl")
BUDGET = 64
PUBLISHED = {
    16: ((8.5, 22.4, 333), (1.5, 14.4, 65.0), (1.5, 14.3, 64.2), (1.5, 13.0, 60.8)),
    8: ((4.3, 11.2, 167), (0.8, 7.8, 32.5), (0.8, 7.2, 32.1), (0.7, 6.5, 30.4)),
    4: ((2.1, 6.2, 83.4), (0.4, 4.4, 16.3), (0.4, 3.3, 16.1), (0.4, 3.3, 15.2)),
}
"""The paper's table 8: TFLOPs, total memory in GB, KV cache in MB."""


COLUMNS = (
    "weights",
    "method",
    "TFLOPs",
    "x bits / 16",
    "the paper's",
    "weights, GB",
    "KV, MB",
    "weights and KV, GB",
    "the paper's total",
    "prompts in 24 GB",
)


def rows_by_layer(method: str) -> list[int]:
    """Tokens of a prompt in every layer, whole KV blocks inside the decoder."""
    if method == "none":
        return [TEXT + GEOMETRY.tokens] * DECODER.layers
    reduction = Reduction.parse({"method": method, "budget": BUDGET})
    entered, *later = GEOMETRY.held(reduction)
    run = Run(IMAGE.start, IMAGE.start + entered)
    held = [entered, *(held_of(run, n, BLOCK, TEXT + entered) for n in later)]
    return [
        TEXT + tokens
        for tokens, layers in zip(held, GEOMETRY.spans, strict=True)
        for _ in range(layers)
    ]


def arithmetic() -> str:
    """The table."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for weights in WEIGHTS:
        for method, (tflops, total, _) in zip(REDUCTIONS, PUBLISHED[weights.bits], strict=True):
            rows = rows_by_layer(method)
            flops = prefill_flops(rows, DECODER) / 1e12
            kv = sum(rows) * DECODER.kv_bytes_per_token // DECODER.layers
            fit = math.floor(max(0, MEMORY - WORKING - weights.bytes) / kv)
            budget = "" if method == "none" else f"@{BUDGET}"
            cells = [
                weights.name,
                method + budget,
                f"{flops:.1f}",
                f"{flops * weights.bits / 16:.1f}",
                f"{tflops}",
                f"{weights.bytes / 1e9:.1f}",
                f"{kv / 1e6:.1f}",
                f"{(weights.bytes + kv) / 1e9:.1f}",
                f"{total}",
                f"{fit:,}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# --- The shipped model --------------------------------------------------------------------------

STAGES, TOKENS = (2,), 48
ASKED: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("none", 144, {}),
    ("score", 48, {}),
    ("score", 16, {}),
    ("ficoco-v", 48, {}),
    ("ficoco-v", 16, {}),
    ("fastv", 0, {"tokens": [TOKENS]}),
    ("a-score", 0, {"tokens": [TOKENS]}),
    ("ficoco-l", 0, {"tokens": [TOKENS]}),
    ("ficoco-vl", 0, {"tokens": [80, TOKENS]}),
)
"""Methods, budgets and options: before the decoder, at layer 2 of 6, and both."""


def measured(name: str, questions: int) -> str:
    """A row: accuracy of every setting, visual tokens held, bytes of the file.

    Args:
        name: of a format, or none.
        questions: how many of the held-out ones.
    """
    from benchmarks.accuracy import Answer, Engine, Setting, held_out, summarise
    from tests.quantised import FORMATS, quantise

    asked, answers = held_out(questions), {}
    with tempfile.TemporaryDirectory() as folder:
        model = stored = CHECKPOINT
        if name != "none":
            model = stored = quantise(Path(folder) / "stored", name)
            if FORMATS[name].activations is None:
                model = quantise(Path(folder) / "worth", name, dequantised=True)
        size = (stored / "model.safetensors").stat().st_size
        engine = Engine.start(str(model), STAGES, 32)
        for method, budget, options in ASKED:
            setting = Setting(method, budget, options)
            given: dict[int, Answer] = {}
            batch = [(index, *question) for index, question in enumerate(asked)]
            for start in range(0, len(batch), 128):
                engine.ask(batch[start : start + 128], setting, given.__setitem__)
            answers[setting.name] = given
    found = summarise(answers, asked)
    averages = [f"{100 * result['average']:.1f}" for result in found.values()]
    held = [str(max(result["visual_tokens_kept"])) for result in found.values()]
    return f"| {name} | {size / 1e6:.1f} | {' | '.join(averages)} | {', '.join(held)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("formats", nargs="*", help="to ask the shipped model in; none: as it is")
    parser.add_argument("--questions", type=int, default=1000)
    given = parser.parse_args(arguments)
    if not given.formats:
        print(arithmetic(), end="")
        return
    names = [
        f"{method} {'/'.join(map(str, options.get('tokens', [budget])))}"
        for method, budget, options in ASKED
    ]
    print(f"| weights | file, MB | {' | '.join(names)} | visual tokens held |")
    print("| --- " * (len(names) + 3) + "|")
    for name in given.formats:
        print(measured(name, given.questions), flush=True)


if __name__ == "__main__":
    main()

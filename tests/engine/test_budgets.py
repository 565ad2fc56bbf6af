# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/budgets.py`` on the shipped model: what it writes holds together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ficoco.cost import Decoder, prefill_flops

BENCHMARK = Path(__file__).parents[2] / "benchmarks/budgets.py"
DECODER = Decoder(6, 256, 640, 4, 4, 64, kv_bytes_per_element=4)


@pytest.mark.engine
def test_what_the_engine_benchmark_writes(tmp_path: Path) -> None:
    out = tmp_path / "budgets.json"
    run = subprocess.run(
        [
            *(sys.executable, BENCHMARK, "--decoder", "shipped", "--dtype", "float32"),
            *("--methods", "ficoco-v,fastv", "--budgets", "64,48,16", "--stages", "2,4"),
            *("--rounds", "1", "--batch", "2", "--tokens", "3", "--out", out),
        ],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "left out: fastv@16" in run.stdout  # two of six layers hold all 144
    (answers,) = (r["2"] for r in json.loads(out.read_text())["rounds"])
    for name, answer in answers.items():
        assert answer["kv_bytes"] == answer["kv_bytes_computed"], name
        assert answer["prefill_flops"] == prefill_flops(answer["rows"], DECODER)
        assert (answer["tower_reduction_s"] > 0) == name.startswith("ficoco-v"), name
        assert (answer["decoder_reduction_s"] > 0) == name.startswith("fastv"), name
        assert 0 < answer["tower_s"] + answer["prefill_s"] < answer["ttft_s"]
        assert f"\n| {name} | " in run.stdout
    whole = answers["off"]["rows"]
    assert answers["stock vLLM"]["rows"] == whole and len({*whole}) == 1
    assert answers["off, on a server with stages"]["rows"] == whole
    assert answers["ficoco-v@48"]["rows"] == [whole[0] - 144 + 48] * 6
    assert answers["ficoco-v@48"]["kv_bytes"] < answers["off"]["kv_bytes"]
    in_decoder = answers["fastv@64"]["rows"]
    assert in_decoder[:2] == whole[:2] and max(in_decoder[2:]) < whole[0]

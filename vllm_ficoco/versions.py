# SPDX-License-Identifier: Apache-2.0
"""Which versions of vLLM this package works with."""

from __future__ import annotations

import re

TESTED = "0.32"
"""All tests run with it."""

COMPARED = "0.33"
"""What is used of vLLM is there and has the same parameters, and tests that start no engine pass
(``tests/next_vllm.py``). There is no build for CPUs, so no engine of it has run."""


def check() -> str:
    """The minor version of the vLLM that is installed; warns where it is not the tested one.

    Raises:
        RuntimeError: it is none of these.
    """
    from vllm.logger import init_logger
    from vllm.version import __version__

    found = re.match(r"(\d+\.\d+)\.", __version__)
    minor = found[1] if found else __version__
    if minor not in (TESTED, COMPARED):
        raise RuntimeError(
            f"vllm-ficoco does not know vLLM {__version__}: it is tested with {TESTED}, and "
            f"compared with the sources of {COMPARED}. Install one of these; or, to serve without "
            "budgets, name the plugins to load in VLLM_PLUGINS, vllm_ficoco not among them."
        )
    if minor == COMPARED:
        init_logger("vllm.vllm_ficoco").warning_once(
            "vllm-ficoco is tested with vLLM %s. Of %s it knows the sources: nothing of it has "
            "run, so look at answers and counts before you rely on them.",
            TESTED,
            COMPARED,
        )
    return minor

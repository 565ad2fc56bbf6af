# SPDX-License-Identifier: Apache-2.0
"""Entry of ``python -m vllm_ficoco.tiny_llava``."""

from vllm_ficoco.tiny_llava.train import main

main()

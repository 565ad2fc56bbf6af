# SPDX-License-Identifier: Apache-2.0
"""vllm-ficoco: serve LLaVA on vLLM with a visual token budget per request and per image."""

__version__ = "0.1.0"

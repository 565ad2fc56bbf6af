# SPDX-License-Identifier: Apache-2.0
"""The front end: visual token budgets on vLLM's own OpenAI-compatible server."""

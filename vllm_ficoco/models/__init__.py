# SPDX-License-Identifier: Apache-2.0
"""Model classes that take the place of vLLM's own; thin, they only call the methods."""

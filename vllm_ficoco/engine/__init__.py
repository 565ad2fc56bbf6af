# SPDX-License-Identifier: Apache-2.0
"""Reduction inside the decoder: stages whose layers run on fewer rows and hold fewer KV blocks."""

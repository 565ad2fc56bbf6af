# SPDX-License-Identifier: Apache-2.0
"""Slow, literal transcriptions of the formulas, to hold the package against."""

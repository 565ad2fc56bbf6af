# SPDX-License-Identifier: Apache-2.0
"""Tests of the front end: policy and protocol alone, then over HTTP through a real server."""

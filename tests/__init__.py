# SPDX-License-Identifier: Apache-2.0
"""Tests: fast ones at the top, ``engine/`` and ``server/`` start what their names say."""

# SPDX-License-Identifier: Apache-2.0
"""Tests through the real engine, one engine per configuration."""

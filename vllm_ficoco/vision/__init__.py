# SPDX-License-Identifier: Apache-2.0
"""The vision tower that reduces as it runs."""

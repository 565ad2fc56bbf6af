# SPDX-License-Identifier: Apache-2.0
"""Load tests of a server with visual token budgets: what a budget buys, under concurrency."""

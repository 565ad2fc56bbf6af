# SPDX-License-Identifier: Apache-2.0
"""Entry point of the ``vllm.endpoint_plugins`` group: puts the front end into vLLM's server."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

NAME = "ficoco_server"
MODEL_PLUGIN = "vllm_ficoco"


class EndpointPlugin:
    """What vLLM calls twice while it builds its server: for the routes, then for their state."""

    name = NAME
    required_tasks = ("generate",)

    # The imports wait, because vLLM lists and loads plugins before it knows whether it needs them.

    def attach_router(self, app: FastAPI) -> None:
        """Put our routes over vLLM's of the same path, and a door before them all."""
        from ficoco_server import api_router, lifecycle, page
        from ficoco_server.policy import Policy

        lifecycle.attach(app)
        api_router.attach(app)
        if Policy.from_environment().page:
            page.attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Read the policy and put our handlers over vLLM's; any mistake stops the start-up."""
        from ficoco_server import lifecycle, serving

        serving.install(engine_client, state)
        lifecycle.watch(engine_client, state)

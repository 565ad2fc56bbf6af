# SPDX-License-Identifier: Apache-2.0
"""What the environment says of images where no front end of ours reads it.

``LLM(...)``, and servers that build their own front end over vLLM's engine, have none: there an
image of which its prompt says nothing gets ``FICOCO_DEFAULT_BUDGET``, by ``FICOCO_DEFAULT_METHOD``
and, for ``auto``, among ``FICOCO_AUTO_BUDGETS``, as if the prompt had said so. Where a front end
is, it has settled what holds before a prompt gets here, and an image without settings stays whole.

The rest of the policy (limits, names, pressure) is a front end's. Who has set it and has no front
end is told.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache

import vllm.envs as envs
from vllm.logger import init_logger

from vllm_ficoco.settings import Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout

logger = init_logger(__name__)

BUDGET, METHOD, RUNGS = "FICOCO_DEFAULT_BUDGET", "FICOCO_DEFAULT_METHOD", "FICOCO_AUTO_BUDGETS"
FRONT_END = "ficoco_server"
"""Our front end in ``VLLM_PLUGINS``."""
DIRECT = "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"

_LOST = (
    "visual_token_budget, reduction and detail of requests are IGNORED, and so is the policy but "
    f"for {BUDGET}, {METHOD} and {RUNGS}; there is no report, no /v1/reduction and no metric of it."
)
_CURE = (
    f"The front end is there under `vllm-ficoco serve`, under `vllm serve` with VLLM_PLUGINS="
    f"vllm_ficoco,{FRONT_END}, and in Ray Serve LLM where Serve is started with {DIRECT}=1 and "
    "RAY_SERVE_ENABLE_HA_PROXY=1."
)

_settled = False


def leave_to_front_end() -> None:
    """From now on a front end in this process settles what holds for an image."""
    global _settled
    _settled = True


def left_to_front_end() -> bool:
    """Whether one does."""
    return _settled


def front_end_expected() -> bool:
    """Whether the environment names our front end. It need not be attached for that."""
    return FRONT_END in (envs.VLLM_PLUGINS or ())


def from_environment(geometry: Geometry, largest: Callable[[], Layout]) -> Reduction | None:
    """The settings of an image of which nobody says anything; None where it keeps all its tokens.

    Args:
        geometry: of the model.
        largest: gives the layout of its image with most tokens.

    Raises:
        ValueError: a variable is wrong, or the model cannot do what they say.
    """
    # Not at the top: it knows nothing of servers, but is with ours.
    from ficoco_server.policy import Policy, check_reachable

    held = (BUDGET, METHOD, RUNGS)
    policy = Policy.from_environment({name: os.environ.get(name, "") for name in held})
    method, budget = policy.default_method, policy.default_budget
    if budget is None:
        return None
    if geometry.unsupported:
        raise ValueError(f"{BUDGET} cannot be kept with this model: {geometry.unsupported}")
    if isinstance(budget, str):
        reduction: Reduction = policy.auto()
    else:
        reduction = Reduction(method=method, budget=budget)
    try:
        check_reachable(reduction, geometry, largest())
    except SettingsError as error:
        said = f"{BUDGET}={budget} by {method} ({METHOD})"
        raise ValueError(f"{said} is not possible with this model: {error}") from None
    return reduction


def useless() -> list[str]:
    """The variables that are set and do nothing without a front end."""
    from ficoco_server.policy import ENVIRONMENT_PREFIX, Policy

    known = [f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in (*Policy.model_fields, "stages")]
    held = (BUDGET, METHOD, RUNGS)
    return [name for name in known if os.environ.get(name, "").strip() and name not in held]


@cache
def tell_at_start() -> None:
    """Log, once, what is known to do nothing, or may do nothing, when an engine is made.

    Our front end comes later, if it comes, and Ray Serve decides in another process.
    """
    names = useless()
    if names and not front_end_expected():
        _tell(names)
    elif front_end_expected() and "ray.serve" in sys.modules and not os.environ.get(DIRECT):
        logger.warning(
            "This is Ray Serve, whose default ingress attaches no front end of a plugin. With it, "
            "%s %s",
            _LOST,
            _CURE,
        )


@cache
def tell_of_no_front_end() -> None:
    """Log, once, that no front end of ours is here, when the first prompt with an image is.

    By then whoever serves it has long been built. Where nobody has asked for a front end, there is
    nothing to tell.
    """
    names = useless()
    if front_end_expected():
        _tell([f"VLLM_PLUGINS={','.join(envs.VLLM_PLUGINS or ())}", *names])
    elif names:
        tell_at_start()


def _tell(names: list[str]) -> None:
    logger.error(
        "No front end of vllm-ficoco is attached to this engine, though there is %s: %s %s",
        ", ".join(names),
        _LOST,
        _CURE,
    )

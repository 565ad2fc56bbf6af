# SPDX-License-Identifier: Apache-2.0
"""When a server is under pressure: budgets that nobody has said then yield by a rung.

The load is the share of a server that is asked for (:func:`load`). At the high mark pressure is
on, below the low one it is off, and between them it stays what it was, so that a load that hovers
about one mark does not change the budget with every request.

There is no time in it. A server that does nothing tells nothing, and what it told last may be old:
an engine sends its figures with its steps, and makes none to forget requests whose clients have
left. But the front end knows how many requests are under way. Where there are none, nothing is
asked for, whatever was told last; where there are some, the engine works on them, and its last
figures are what it has, however long a step takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ficoco_server.metrics import LOAD, PRESSURE
from ficoco_server.policy import Marks


class Engine(NamedTuple):
    """What an engine has told of its last step."""

    kv_cache_usage: float = 0.0
    """Share of its blocks that requests hold."""
    running: int = 0
    """Requests that hold them."""
    waiting: int = 0
    """Requests that hold none yet."""


def load(engines: Sequence[Engine], places: int, requests: int, entering: int = 0) -> float:
    """The share of a server that is asked for; above 1, some have to wait.

    Of the KV cache: what runs holds so much of it, and all others will want as much, a request for
    a request. Use alone would show less than that with a queue before it, because the first that
    waits may want more than is free. And of the places for requests that run at once.

    Args:
        engines: of the server.
        places: of all engines, ``--max-num-seqs`` each.
        requests: that the engines have been given, running or not.
        entering: that they will be given next.
    """
    asking = requests + entering
    used = sum(engine.kv_cache_usage for engine in engines) / len(engines)
    running = sum(engine.running for engine in engines)
    # Without requests, figures of any are old.
    wanted = used * asking / running if requests and running else 0.0
    return max(wanted, asking / places)


class Pressure:
    """Whether a server is under pressure.

    Args:
        marks: of the policy; None where there is never any.
        measure: the load, given how many requests the engines do not know of yet.
    """

    def __init__(
        self, marks: Marks | None = None, measure: Callable[[int], float] | None = None
    ) -> None:
        self.marks, self._measure = marks, measure
        self.on, self.load = False, 0.0
        self._entering = 0

    @contextmanager
    def entering(self) -> Iterator[None]:
        """While a prompt is made of a request: many may come at once, before an engine has one."""
        self._entering += 1
        try:
            yield
        finally:
            self._entering -= 1

    def look(self) -> bool:
        """Whether it is on now."""
        if self.marks is None or self._measure is None:
            return False
        self.load = self._measure(self._entering)
        self.on = self.load >= (self.marks.low if self.on else self.marks.high)
        LOAD.set(self.load)
        PRESSURE.set(self.on)
        return self.on

    def describe(self) -> dict[str, float | bool] | None:
        """For ``GET /v1/reduction``; None where there is never any."""
        on = self.look()
        return self.marks and {**self.marks._asdict(), "on": on, "load": round(self.load, 4)}

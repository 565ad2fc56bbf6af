# SPDX-License-Identifier: Apache-2.0
"""The adapter to vLLM's statistics: from them, how much of a server is asked for.

vLLM has a plugin group for loggers of statistics. A plugin of it is not told whether it is wanted,
and one that is installed turns statistics on where ``--disable-log-stats`` has turned them off. So
ours joins the loggers of a server that runs, if it needs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from ficoco_server.policy import Policy, PolicyError
from ficoco_server.pressure import Engine, Pressure, load


class Listener(AggregateStatLoggerBase):
    """Remembers what every engine has told last.

    Args:
        engine_indexes: of the engines.
        heard: called after every step.
    """

    def __init__(
        self, engine_indexes: list[int], heard: Callable[[], object] = lambda: None
    ) -> None:
        self.engines = {index: Engine() for index in engine_indexes}
        self._heard = heard

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """As vLLM calls it, after the answers of a step have been handed on."""
        if scheduler_stats is not None:
            self.engines[engine_idx] = Engine(
                scheduler_stats.kv_cache_usage,
                scheduler_stats.num_running_reqs,
                scheduler_stats.num_waiting_reqs,
            )
            self._heard()

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def watch(engine_client: Any, policy: Policy) -> Pressure:
    """The pressure on a server, by its policy.

    Args:
        engine_client: vLLM's.

    Raises:
        PolicyError: its load cannot be known.
    """
    if policy.pressure is None:
        return Pressure()
    loggers, config = engine_client.logger_manager, engine_client.vllm_config
    for obstacle, there in (
        ("--disable-log-stats", loggers is None),
        # vLLM gives the figures of a step to one of them: to that of the request that has run
        # longest, as it is. The others would hear nothing for as long as it runs.
        ("--api-server-count above 1", config.parallel_config._api_process_count > 1),
        # Its loggers are made anew when it grows, and ours would be forgotten.
        ("--enable-elastic-ep", config.parallel_config.enable_elastic_ep),
    ):
        if there:
            raise PolicyError(
                f"--reduction-pressure (FICOCO_PRESSURE) is not possible with {obstacle}: the "
                "server would not know its load"
            )
    processor = engine_client.output_processor
    places = config.scheduler_config.max_num_seqs * len(loggers.engine_indexes)

    def measure(entering: int) -> float:
        requests = processor.get_num_unfinished_requests()
        return load([*listener.engines.values()], places, requests, entering)

    pressure = Pressure(policy.pressure, measure)
    listener = Listener(loggers.engine_indexes, pressure.look)
    loggers.stat_loggers.append(listener)
    return pressure


def busy(engine_client: Any, pressure: Pressure) -> Callable[[], bool]:
    """Whether a server has no time for what can wait: there is pressure, or requests wait.

    How many wait, the engine alone knows, and it tells those who listen after every step. Where
    nobody may listen, it is known how many there are, and how many can run.

    Args:
        engine_client: vLLM's.
        pressure: on the server.
    """
    config, processor = engine_client.vllm_config, engine_client.output_processor
    loggers, scheduler = engine_client.logger_manager, config.scheduler_config
    places = scheduler.max_num_seqs * config.parallel_config.data_parallel_size
    listener = Listener([])
    if loggers is not None and not config.parallel_config.enable_elastic_ep:
        listener = Listener(loggers.engine_indexes)
        loggers.stat_loggers.append(listener)

    def is_busy() -> bool:
        requests = processor.get_num_unfinished_requests()
        # Without requests, figures of any are old.
        waiting = sum(engine.waiting for engine in listener.engines.values()) if requests else 0
        return pressure.look() or waiting > 0 or requests >= places

    return is_busy

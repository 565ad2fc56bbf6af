# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-ficoco`` command: vLLM's ``serve`` and ``run-batch`` with our plugins and defaults,
and a client.

Everything that vLLM and prometheus_client read from the environment while they are imported must
be set before, so neither is imported at the top.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, MutableMapping, Sequence
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any

from ficoco_server.plugin import MODEL_PLUGIN, NAME

TINY = "tiny-llava"
"""Name of the model that comes with the package."""

ENDPOINT_GROUP = "vllm.endpoint_plugins"
SHUTDOWN_TIMEOUT = 90
"""Seconds for requests in flight after a signal, where the command line says nothing of it."""

DESCRIPTION = """\
Serve a vision language model with a visual token budget per request, or run a file of requests.

The server is vLLM's own OpenAI-compatible one, and so is the batch runner: every flag of `vllm
serve` and of `vllm run-batch` works, and this command adds those below. Try it with the model that
comes with the package:

  vllm-ficoco serve tiny-llava
"""
FLAGS = (
    ("default-method", "METHOD", "method where a request names none (default: score)"),
    ("default-budget", "TOKENS", "or auto, where a request has none (default: the largest or all)"),
    ("min-budget", "TOKENS", "smallest budget that a request may ask for (default: 1)"),
    ("max-budget", "TOKENS", "largest; images may then not stay unreduced (default: no limit)"),
    ("methods", "NAMES", "methods that a request may name, with commas (default: all)"),
    ("low-budget", "TOKENS", 'budget of "detail": "low" (default: a ninth of the tokens)'),
    ("high-budget", "TOKENS", 'budget of "detail": "high" (default: no reduction)'),
    ("auto-budgets", "LIST", "among which auto chooses (default: 1,1/3,2/9,1/9 of the tokens)"),
    ("graphs", "LIST", "settings in CUDA graphs of LLaVA-1.5's tower, as in score@64,score@1/9"),
    ("pressure", "HIGH:LOW", "loads at which budgets begin and end to yield (default: never)"),
)  # fmt: skip

# Removed when this process ends, not when one of its children does.
_metrics_directory: tempfile.TemporaryDirectory[str] | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return
    if arguments[0] in ("-v", "--version"):
        from vllm_ficoco import __version__

        print(f"vllm-ficoco {__version__}")
        return
    if arguments[0] == "preview":  # a client
        from ficoco_server import picture

        return picture.main(arguments[1:])
    commands = {"serve": serve, "run-batch": run_batch}
    if arguments[0] not in commands:
        there = ", ".join([*commands, "preview"])
        parser.error(f"unknown command {arguments[0]!r}; there are: {there}")
    flags, rest = parser.parse_known_args(arguments[1:])
    said = flags.__dict__.pop("stages") or os.environ.get("FICOCO_STAGES")
    for name in ("page", "preview"):
        if flags.__dict__.pop(f"no_{name}"):
            os.environ[f"FICOCO_{name.upper()}"] = "0"
    stages = _layers(parser, said)
    if stages:  # so that the server can tell that it has them
        os.environ["FICOCO_STAGES"] = ",".join(map(str, stages))
    if flags.alias:
        flags.alias = ";".join(flags.alias)
    for name, value in vars(flags).items():
        if value is not None:
            os.environ[f"FICOCO_{name.upper()}"] = value
    prepare(os.environ, rest)
    from vllm_ficoco import versions

    try:
        minor = versions.check()
    except RuntimeError as error:
        parser.error(str(error))
    from ficoco_server.policy import Policy, PolicyError

    try:
        policy = Policy.from_environment()
    except PolicyError as error:
        parser.error(str(error))
    if policy.pressure and arguments[0] == "run-batch":
        parser.error("--reduction-pressure (FICOCO_PRESSURE) is for servers: nobody waits here")
    if minor != versions.TESTED and arguments[0] == "run-batch":
        parser.error(f"run-batch works with vLLM {versions.TESTED}, not with {minor}")
    commands[arguments[0]](rest, stages)


def _layers(parser: argparse.ArgumentParser, said: str | None) -> list[int]:
    """The layers named with --reduction-stages."""
    if not said:
        return []
    try:
        return [int(layer) for layer in said.split(",")]
    except ValueError:
        parser.error(f"--reduction-stages {said!r} is not valid: layers of the decoder, as in 2,22")


def prepare(environment: MutableMapping[str, str], rest: Sequence[str]) -> None:
    """Set what must be in the environment before vLLM is imported."""
    environment["VLLM_PLUGINS"] = ",".join(_plugins(environment.get("VLLM_PLUGINS")))
    if "PROMETHEUS_MULTIPROC_DIR" not in environment:
        # Workers observe the reduction's time, and this is how another process gets to see it.
        global _metrics_directory
        _metrics_directory = tempfile.TemporaryDirectory(prefix="vllm-ficoco-metrics-")
        environment["PROMETHEUS_MULTIPROC_DIR"] = _metrics_directory.name
        # With several API servers vLLM warns of what an earlier run may have left in a folder
        # that it has not made. This one is new.
        logging.getLogger("vllm.v1.metrics.prometheus").addFilter(_not_about_the_folder)
    # prometheus_client does not make it, and fails at its import.
    Path(environment["PROMETHEUS_MULTIPROC_DIR"]).mkdir(parents=True, exist_ok=True)
    if _serves_tiny(rest):
        environment.setdefault("HF_HUB_OFFLINE", "1")
        # GiB, and only read on a CPU; vLLM's default there is a large part of the machine.
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def _not_about_the_folder(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Found PROMETHEUS_MULTIPROC_DIR was set by user")


def _serves_tiny(rest: Sequence[str]) -> bool:
    """Whether vLLM's arguments name the shipped model as the model."""
    named = [value for flag, value in pairwise(rest) if flag == "--model"]
    return TINY in rest[:1] or TINY in named or f"--model={TINY}" in rest


def _plugins(allowed: str | None) -> list[str]:
    """The plugins to name to vLLM, ours among them.

    Without VLLM_PLUGINS vLLM loads all plugins but endpoint plugins. To name one of these makes it
    a list of what is allowed, so all others must be in it too.
    """
    if allowed is None:
        installed = entry_points()
        names: Iterable[str] = (
            entry.name
            for group in sorted(installed.groups)
            if group.startswith("vllm.") and group != ENDPOINT_GROUP
            for entry in installed.select(group=group)
        )
    else:
        names = filter(None, allowed.split(","))
    return list(dict.fromkeys([*names, MODEL_PLUGIN, NAME]))


def serve(rest: Sequence[str], stages: Sequence[int] = ()) -> None:
    """Run vLLM's ``serve`` in this process, which is what its own command does.

    Args:
        rest: its arguments.
        stages: layers of the decoder at which visual tokens can leave.

    Raises:
        SystemExit: with 1, the engine has died.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand

    command = ServeSubcommand()
    parser, args = _parse(command, rest, stages, "MODEL", shutdown_timeout=SHUTDOWN_TIMEOUT)
    if args.grpc or os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0":
        parser.error("budgets need vLLM's HTTP server in Python: not --grpc, not the Rust frontend")
    command.validate(args)
    command.cmd(args)
    from ficoco_server import lifecycle

    if lifecycle.has_failed():  # vLLM returns as if all were well
        sys.exit("vllm-ficoco: the engine has died")


def run_batch(rest: Sequence[str], stages: Sequence[int] = ()) -> None:
    """Run vLLM's ``run-batch``, a file of requests, with what a request to our server can say.

    Args:
        rest: its arguments.
        stages: layers of the decoder at which visual tokens can leave.
    """
    from vllm.entrypoints.cli.run_batch import RunBatchSubcommand

    _, args = _parse(RunBatchSubcommand(), rest, stages, "-i INPUT -o OUTPUT --model MODEL")
    from ficoco_server import batch

    batch.run(args)


def _parse(
    command: Any, rest: Sequence[str], stages: Sequence[int], usage: str, **defaults: Any
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """A parser for one of vLLM's commands, and its arguments with what is ours worked in.

    Args:
        command: vLLM's.
        rest: its arguments.
        stages: layers of the decoder at which visual tokens can leave.
        usage: what the command needs.
        defaults: of its options, where ours are others.
    """
    try:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    except ImportError:  # since 0.33
        from vllm.entrypoints.common.startup import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if any(word.startswith(("-h", "--help")) for word in rest):
        print(_parser().format_help())
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm-ficoco")
    options = command.subparser_init(parser.add_subparsers(dest="subparser"))
    parser.usage = options.usage = f"vllm-ficoco {command.name} {usage} [options]"
    options.set_defaults(enable_prompt_tokens_details=True, **defaults)
    args = parser.parse_args([command.name, *rest])
    _resolve_tiny(args)
    if stages:
        from vllm.platforms import current_platform

        from vllm_ficoco.engine.checks import SCHEDULER
        from vllm_ficoco.vision.geometry import STAGES_KEY

        if args.scheduler_cls is not None:
            parser.error("--reduction-stages brings a scheduler of its own: not --scheduler-cls")
        args.scheduler_cls = SCHEDULER
        args.hf_overrides = {**(args.hf_overrides or {}), STAGES_KEY: list(stages)}
        if args.block_size is None and current_platform.is_cpu():
            args.block_size = 32  # vLLM's choice for CPUs, 128, is most of an image
    _name_graphs(args)
    configure_logging_from_args(args)
    if stages:
        _for_stages_on_gpus(args)
    return parser, args


def _for_stages_on_gpus(args: argparse.Namespace) -> None:
    """Name an attention backend where vLLM would choose one that stages refuse
    (``engine/checks.py``), and the command line says nothing of it."""
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    unsaid = args.attention_backend is None and args.attention_config.backend is None
    if not (unsaid and current_platform.is_cuda()):
        return
    if current_platform.is_device_capability_family(100):  # vLLM's choice there is FlashInfer
        args.attention_backend = "TRITON_ATTN" if "float32" in str(args.dtype) else "FLASH_ATTN"
        init_logger("vllm.ficoco_server").info(
            "decoder stages: --attention-backend %s", args.attention_backend
        )


def _name_graphs(args: Any) -> None:
    """Tell the engine which settings' images run in CUDA graphs, where somebody asks for these.

    It says in its log what it makes of them (:func:`vllm_ficoco.models.config.settle_graphs`).
    """
    from ficoco_server.policy import Policy
    from vllm_ficoco.vision.geometry import GRAPHS_KEY

    policy = Policy.from_environment()
    if policy.graphs or args.compilation_config.cudagraph_mm_encoder:
        args.hf_overrides = {GRAPHS_KEY: policy.graphed(), **(args.hf_overrides or {})}


def _resolve_tiny(args: Any) -> None:
    """Let the shipped model be called by its name."""
    tag = getattr(args, "model_tag", None)  # of `serve` alone
    if TINY not in (tag, args.model) or Path(TINY).exists():
        return
    from vllm_ficoco.tiny_llava import CHECKPOINT

    args.model = str(CHECKPOINT)
    if tag:
        args.model_tag = args.model
    args.served_model_name = args.served_model_name or [TINY]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-ficoco",
        usage="vllm-ficoco serve MODEL [options] [any option of `vllm serve`]\n"
        "       vllm-ficoco run-batch -i INPUT -o OUTPUT --model MODEL [any of `vllm run-batch`]\n"
        "       vllm-ficoco preview IMAGE --out FILE [--budget TOKENS] [--help]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="vLLM's own options: vllm-ficoco serve --help=all, vllm-ficoco run-batch --help=all",
        allow_abbrev=False,
        add_help=False,
    )
    group = parser.add_argument_group("reduction", "Each is also read from FICOCO_<NAME>.")
    group.add_argument(
        "--reduction-stages",
        dest="stages",
        metavar="LAYERS",
        help="decoder layers at which its methods reduce, as in 2,22 (default: none)",
    )
    group.add_argument(
        "--reduction-alias",
        dest="alias",
        action="append",
        metavar="NAME=BUDGET",
        help='a name of the model with this default, or with NAME={"method": ..., "budget": ...}; '
        "may be repeated (in FICOCO_ALIAS with semicolons)",
    )
    for name, metavar, text in FLAGS:
        group.add_argument(
            f"--reduction-{name}", dest=name.replace("-", "_"), metavar=metavar, help=text
        )
    group.add_argument("--no-page", action="store_true", help="no page at / (FICOCO_PAGE=0)")
    group.add_argument(
        "--no-preview", action="store_true", help="no /v1/reduction/preview (FICOCO_PREVIEW=0)"
    )
    return parser


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-ficoco`` command: ``vllm serve`` with our plugins and defaults switched on.

Everything that vLLM and prometheus_client read from the environment while they are imported must
be set before, so neither is imported at the top.
"""

from __future__ import annotations

import argparse
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
DESCRIPTION = """\
Serve a vision language model with a visual token budget per request.

The server is vLLM's own OpenAI-compatible one: every flag of `vllm serve` works, and this command
adds those below. Try it with the model that comes with the package:

  vllm-ficoco serve tiny-llava
"""
FLAGS = (
    ("default-method", "METHOD", "method where a request names none (default: ficoco-v)"),
    ("default-budget", "TOKENS", "budget where a request has none (default: the largest, or all)"),
    ("min-budget", "TOKENS", "smallest budget that a request may ask for (default: 1)"),
    ("max-budget", "TOKENS", "largest; images may then not stay unreduced (default: no limit)"),
    ("methods", "NAMES", "methods that a request may name, with commas (default: all)"),
    ("low-budget", "TOKENS", 'budget of "detail": "low" (default: a ninth of the tokens)'),
    ("high-budget", "TOKENS", 'budget of "detail": "high" (default: no reduction)'),
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
    if arguments[0] != "serve":
        parser.error(f"unknown command {arguments[0]!r}; there is: serve")
    flags, rest = parser.parse_known_args(arguments[1:])
    said = flags.__dict__.pop("stages") or os.environ.get("FICOCO_STAGES")
    stages = _layers(parser, said)
    if stages:  # so that the server can tell that it has them
        os.environ["FICOCO_STAGES"] = ",".join(map(str, stages))
    for name, value in vars(flags).items():
        if value is not None:
            os.environ[f"FICOCO_{name.upper()}"] = value
    prepare(os.environ, rest)
    from ficoco_server.policy import Policy, PolicyError

    try:
        Policy.from_environment()
    except PolicyError as error:
        parser.error(str(error))
    serve(rest, stages)


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
    # prometheus_client does not make it, and fails at its import.
    Path(environment["PROMETHEUS_MULTIPROC_DIR"]).mkdir(parents=True, exist_ok=True)
    if _serves_tiny(rest):
        environment.setdefault("HF_HUB_OFFLINE", "1")
        # GiB, and only read on a CPU; vLLM's default there is a large part of the machine.
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


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
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if any(word.startswith(("-h", "--help")) for word in rest):
        print(_parser().format_help())
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm-ficoco")
    command = ServeSubcommand()
    options = command.subparser_init(parser.add_subparsers(dest="subparser"))
    parser.usage = options.usage = "vllm-ficoco serve MODEL [options]"
    options.set_defaults(enable_prompt_tokens_details=True)
    args = parser.parse_args(["serve", *rest])
    if args.grpc or os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0":
        parser.error("budgets need vLLM's HTTP server in Python: not --grpc, not the Rust frontend")
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
        if current_platform.is_cuda():  # the one way that is known to work, see engine/checks.py
            args.enforce_eager = True
            if args.attention_backend is None and args.attention_config.backend is None:
                args.attention_backend = "TRITON_ATTN"
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)


def _resolve_tiny(args: Any) -> None:
    """Let the shipped model be called by its name."""
    if TINY not in (args.model_tag, args.model) or Path(TINY).exists():
        return
    from vllm_ficoco.tiny_llava import CHECKPOINT

    path = str(CHECKPOINT)
    args.model = path
    args.model_tag = args.model_tag and path
    args.served_model_name = args.served_model_name or [TINY]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-ficoco",
        usage="vllm-ficoco serve MODEL [options] [any option of `vllm serve`]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="vLLM's own options: vllm-ficoco serve --help=all",
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
    for name, metavar, text in FLAGS:
        group.add_argument(
            f"--reduction-{name}", dest=name.replace("-", "_"), metavar=metavar, help=text
        )
    return parser


if __name__ == "__main__":
    main()

"""The command ``engram-kernels``: train a model on task after task; predict by it; describe the installation.

Exit codes: 0 done; 1 some runs of a comparison or some of several seeds failed; 2 the user's input can't be used (one
line on stderr has the value and what was expected); 130 interrupted (the results so far are written).
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence

from .. import __version__
from ..continual.compare import end_with_parent
from ..continual.progress import JsonProgress
from ..continual.streams import readable, standard_streams
from . import compare, info, pack, predict, train
from .console import EXIT_INTERRUPTED, EXIT_USER_ERROR, PROGRAM, Parser, message_of, print_error

COMMANDS = (train, compare, predict, pack, info)


def build_parser() -> argparse.ArgumentParser:
    """All options of the command line."""
    parser = Parser(prog=PROGRAM, description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None, *, reports: JsonProgress | None = None) -> int:
    """Run the command line; returns the exit code (argparse itself exits with 0 or 2).

    ``reports`` is the progress of a process that `compare` began, see :func:`train_for_comparison`.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with standard_streams() as (stdout, _):
        code = _run(arguments, reports)
        stdout.flush()
        if stdout.failure is not None:
            print_error(f"standard output can't be written ({stdout.failure})")
            code = code or EXIT_USER_ERROR
        return code


def train_for_comparison(arguments: Sequence[str]) -> int:
    """``train`` in a process that `compare` began and that ends with it.

    Its standard output is the channel of its reports (see `JsonProgress`) and carries nothing else. Damaged files of an
    earlier run make it begin anew, since nobody is there to ask.
    """
    end_with_parent()
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        return main(["train", *arguments], reports=JsonProgress(channel))


def _run(arguments: list[str], reports: JsonProgress | None) -> int:
    options = build_parser().parse_args(arguments)
    options.command_line = readable(shlex.join([PROGRAM, *arguments]))
    options.reports = reports
    try:
        code: int = options.run(options)
        return code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if (message := message_of(error)) is None:
            raise
        if reports is not None:
            reports.failed(message)
        print_error(message)
        return EXIT_USER_ERROR

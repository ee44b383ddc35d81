"""Exit codes, errors and warnings of every command."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from ..continual.extras import MissingExtraError
from ..continual.methods import TrainingError

PROGRAM = "engram-kernels"
EXIT_FAILURES = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others of this program."""

    def error(self, message: str) -> NoReturn:
        """Exits with the code of a user's error."""
        self.exit(EXIT_USER_ERROR, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def message_of(error: Exception) -> str | None:
    """One line for an error that the user can do something about; None for a fault of this program."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "not enough memory" in str(error):
        return "not enough memory: " + one_line(error)
    if isinstance(error, (ValueError, OSError, TrainingError, MissingExtraError)):
        return one_line(error)
    return None


def one_line(error: BaseException) -> str:
    """The message of an error, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def warn(message: str) -> None:
    """Writes a warning to stderr."""
    print(f"{PROGRAM}: warning: {message}", file=sys.stderr)


def print_error(message: str) -> None:
    """Writes an error to stderr."""
    print(f"{PROGRAM}: error: {message}", file=sys.stderr, flush=True)

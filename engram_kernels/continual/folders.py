"""Which folder a run writes to: one that no other run is in, and none that a run with other options has left."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..files import DamagedFileError, FolderLock, reason
from . import report
from .checkpoint import Checkpoint, OtherOptionsError, check_same_options, plain


def numbered(path: Path) -> Iterator[Path]:
    """The path, and then ``path-2``, ``path-3`` and so on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def check_free(folder: Path, config: dict[str, Any]) -> None:
    """Whether a run with the options ``config`` may write to a folder; files too damaged to tell are no hindrance.

    Raises:
        OtherOptionsError: it holds a run with other options.
        OSError: a file can't be read.
    """
    with contextlib.suppress(DamagedFileError):
        Checkpoint(folder, config).tasks_completed()
    with contextlib.suppress(DamagedFileError):
        metrics = report.read_metrics(folder)
        if metrics is not None:
            check_same_options(metrics["config"], plain(config), folder / report.METRICS_FILE)


class InUseError(ValueError):
    """Another process writes to a folder."""


class Claim:
    """Folders that this process alone writes to, until :meth:`release` or its end; made where they are missing.

    Args:
        folders: of runs, each with every option that the numbers of its run follow from; None for one of no run.
        wait_seconds: how long to wait for another process to leave one of them.

    Raises:
        ValueError: a folder can't be written.
        InUseError: another process writes to one.
        OtherOptionsError: one holds a run with other options.
        OSError: a file in one can't be read.
    """

    def __init__(self, folders: Mapping[Path, dict[str, Any] | None], wait_seconds: float = 0.0) -> None:
        self._locks: list[FolderLock] = []
        try:
            for folder, config in folders.items():
                _prepare(folder)
                self._locks.append(lock := FolderLock(folder))
                if not lock.acquire(wait_seconds):
                    raise InUseError(
                        f"output: {folder} is in use by another run; wait for its end or give another --output"
                    )
                if config is not None:
                    check_free(folder, config)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Lets others have the folders."""
        for lock in self._locks:
            lock.release()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def _prepare(folder: Path) -> None:
    """Make a folder, and a file in it for a moment: better refused now than after training.

    Raises:
        ValueError: it can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output: expected a directory that can be written, got {folder} ({reason(error)})") from None


def claim(
    folder: Path,
    own: bool,
    of: Callable[[Path], Mapping[Path, dict[str, Any] | None]],
    wait_seconds: float = 0.0,
) -> tuple[Path, Claim]:
    """A folder and the claim on it: the one that was named, or the first free one of its numbers.

    Args:
        folder: the one to begin with.
        own: whether it was named on the command line: the results then go there or nowhere.
        of: the folders to claim of a folder, as for :class:`Claim`.
        wait_seconds: as for :class:`Claim`.

    Raises: as :class:`Claim` for a folder that was named, ValueError for one that can't be written.
    """
    for candidate in numbered(folder):
        try:
            return candidate, Claim(of(candidate), wait_seconds)
        except (InUseError, OtherOptionsError):
            if own:
                raise
    raise AssertionError("there is always another number")

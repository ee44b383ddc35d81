"""A run kept after each of its tasks, so that one that was interrupted or killed goes on instead of beginning anew."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_FILE = "checkpoint.pt"

# Where files lie says nothing about what is learned from them, and data may move between two parts of a run.
_FREE_OPTIONS = ("data_dir",)


class Checkpoint:
    """The file ``checkpoint.pt`` of one run: written after every task but the last, removed when the run is done.

    The last task needs none, since its results are written at once. Tensors go from where they lie into the file,
    without a copy in memory. The file is written beside its place and renamed into it; one that was cut off by the
    end of its process is overwritten by the next.

    Args:
        directory: the run's, which exists.
        options: every option that a run's numbers follow from; those of the file must be the same.
        resume: whether :meth:`load` gives what an earlier process left.
    """

    def __init__(self, directory: str | os.PathLike[str], options: dict[str, Any], *, resume: bool = False) -> None:
        self.path = Path(directory) / CHECKPOINT_FILE
        self.resume = resume
        self._options = plain(options)
        self._partial = self.path.with_name(f".{CHECKPOINT_FILE}.partial")

    def tasks_completed(self) -> int | None:
        """Tasks learned in the file; None without a file. Its tensors are not read into memory.

        Raises:
            ValueError: the file is damaged, or of a run with other options; the message names the first of them.
        """
        state = self._read(mmap=True)
        return None if state is None else int(state["tasks_completed"])

    def load(self) -> dict[str, Any] | None:
        """What :meth:`save` was given last; None without a file, and unless ``resume``.

        Raises:
            ValueError: as from :meth:`tasks_completed`.
        """
        return self._read() if self.resume else None

    def save(self, state: dict[str, Any]) -> None:
        """Write tensors and plain values, with ``tasks_completed`` among them, in place of what was written before.

        Raises:
            OSError: the directory is missing, not writable or full.
        """
        try:
            try:
                # By its name: torch copies a tensor on its way to a Python stream.
                torch.save({**state, "options": self._options}, self._partial)
            except RuntimeError as error:  # how torch tells that a file can't be written
                raise OSError(f"checkpoint: {self.path} can't be written ({str(error).splitlines()[0]})") from None
            os.replace(self._partial, self.path)
        except BaseException:
            self._partial.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Leave nothing behind."""
        for path in (self.path, self._partial):
            path.unlink(missing_ok=True)

    def _read(self, mmap: bool = False) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:  # torch does not look at the checksums
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            state = torch.load(self.path, weights_only=True, map_location="cpu", mmap=mmap)
            options, _ = state["options"], state["tasks_completed"]
        except (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"checkpoint: {self.path} is damaged ({reason}); without --resume training begins anew"
            ) from None
        check_same_options(options, self._options, self.path)
        return dict(state)


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON holds them: tuples as lists, and infinity by its name."""

    def number(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [number(item) for item in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return dict(json.loads(json.dumps({name: number(value) for name, value in options.items()}, default=str)))


def check_same_options(earlier: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Whether a run may go on from what one with ``earlier`` options left at ``path``.

    Raises:
        ValueError: names the first option that differs, what it was and what it is.
    """
    for name in (*earlier, *(name for name in now if name not in earlier)):
        if name not in _FREE_OPTIONS and earlier.get(name) != now.get(name):
            raise ValueError(
                f"{name}: expected {earlier.get(name)} as in {path}, got {now.get(name)}; without --resume training "
                "begins anew"
            )

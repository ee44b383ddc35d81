"""A run kept after each of its tasks, so that one that was interrupted or killed goes on instead of beginning anew."""

from __future__ import annotations

import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..files import DamagedFileError, reason, replacing, sweep
from .streams import readable

CHECKPOINT_FILE = "checkpoint.pt"

# The folder of the data has no part in the results, and may change between two parts of a run.
_FREE_OPTIONS = ("data_dir",)


class OtherOptionsError(ValueError):
    """A folder holds a run with other options; the message names the first that differs."""


class Checkpoint:
    """The file ``checkpoint.pt`` of one run: written after every task but the last, removed when the run is done.

    The last task needs none, since its results are written at once. Tensors go from where they lie into the file,
    without a copy in memory. The file is written beside its place and renamed into it.

    Args:
        directory: the run's, which exists.
        options: every option that a run's numbers follow from; those of the file must be the same.
        resume: whether :meth:`load` gives the state of an earlier process.
    """

    def __init__(self, directory: str | os.PathLike[str], options: dict[str, Any], *, resume: bool = False) -> None:
        self.path = Path(directory) / CHECKPOINT_FILE
        self.resume = resume
        self._options = plain(options)

    def tasks_completed(self) -> int | None:
        """Tasks learned in the file; None without a file. Its tensors are not read into memory.

        Raises:
            DamagedFileError: the file is no checkpoint, or a damaged one.
            OtherOptionsError: it is of a run with other options.
            OSError: it can't be read.
        """
        state = self._read(mmap=True)
        return None if state is None else int(state["tasks_completed"])

    def load(self) -> dict[str, Any] | None:
        """The state that :meth:`save` was given last; None without a file, and unless ``resume``.

        Raises: as :meth:`tasks_completed`.
        """
        return self._read() if self.resume else None

    def damaged(self, why: str) -> DamagedFileError:
        """The error for a file that is no checkpoint of this run."""
        return DamagedFileError(
            f"checkpoint: {self.path} is damaged or of another version ({why}); without --resume training begins anew"
        )

    def save(self, state: dict[str, Any]) -> None:
        """Write tensors and plain values, with ``tasks_completed`` among them, in place of the state before.

        Raises:
            OSError: the directory is missing, not writable or full; the message names the file.
        """
        try:
            with replacing(self.path) as partial:
                try:
                    # By its name: torch copies a tensor on its way to a Python stream.
                    torch.save({**state, "options": self._options}, partial)
                except RuntimeError as error:  # of torch, for a file that can't be written; the reason is missing
                    with open(partial, "ab") as stream:  # a further write names it
                        stream.write(bytes(2**16))
                    raise OSError(str(error).splitlines()[0]) from None
        except OSError as error:
            raise OSError(f"checkpoint: {error}") from None

    def remove(self) -> None:
        """Leave nothing behind, neither of this process nor of one that was killed."""
        self.path.unlink(missing_ok=True)
        sweep(self.path.parent)

    def _read(self, mmap: bool = False) -> dict[str, Any] | None:
        try:
            check_archive(self.path)
            state = torch.load(self.path, weights_only=True, map_location="cpu", mmap=mmap)
            _check_fields(state)
        except FileNotFoundError:
            return None
        except (PermissionError, IsADirectoryError) as error:
            raise OSError(f"checkpoint: {self.path} can't be read ({reason(error)})") from None
        except MemoryError:
            raise
        except Exception as error:  # zipfile, pickle and torch have many kinds of errors for damaged files
            raise self.damaged(reason(error).split(". ")[0]) from None
        check_same_options(state["options"], self._options, self.path)
        return dict(state)


def check_archive(path: Path) -> None:
    """Checks sizes and checksums, which torch does not look at before it reads a file.

    Raises:
        zipfile.BadZipFile: a checksum is wrong, or a member is packed, as torch's never are.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise zipfile.BadZipFile("a compressed member")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise zipfile.BadZipFile("members that are larger than the file")
        if (wrong := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {wrong}")


def _check_fields(state: Any) -> None:
    """Raises ValueError unless the fields that every checkpoint has are there, and of their kinds."""
    if not isinstance(state, dict) or not isinstance(state.get("options"), dict):
        raise ValueError("no options of a run")
    tasks = state.get("tasks_completed")
    if type(tasks) is not int or tasks < 1:
        raise ValueError(f"tasks_completed: expected an integer >= 1, got {tasks!r}")


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON holds them: tuples as lists, infinity by its name, text whatever the locale it came by."""

    def number(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [number(item) for item in value]
        if isinstance(value, str):
            return readable(value)
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return dict(json.loads(json.dumps({name: number(value) for name, value in options.items()}, default=str)))


def check_same_options(earlier: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Checks that a run may go on from one with ``earlier`` options at ``path``, or write over it.

    Raises:
        OtherOptionsError: names the first option that differs, with both values.
    """
    for name in (*earlier, *(name for name in now if name not in earlier)):
        if name not in _FREE_OPTIONS and earlier.get(name) != now.get(name):
            raise OtherOptionsError(
                f"{name}: expected {earlier.get(name)} as in {path}, got {now.get(name)}; give the same options or "
                "another --output"
            )

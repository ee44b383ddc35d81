"""Files: written whole or not at all, read within bounds, in a folder that one process at a time writes."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_PARTIAL = ".partial"  # the end of the name of a file that is being written
_LOCK_FILE = ".lock"  # on Windows, where a folder can't be locked itself
_LOCK_RETRY_SECONDS = 0.05


class DamagedFileError(ValueError):
    """A file holds something else than it should; the message names it and a remedy."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, renamed to it at the end: a reader never sees half of one.

    Its name is its own, so that two processes never write the same one. What the end of a process leaves of it is
    removed by :func:`sweep`.

    Raises:
        OSError: the folder is missing, not writable or full; the message names ``path``.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} can't be written ({reason(error)})") from None
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        OSError: as from :func:`replacing`.
    """
    with replacing(Path(path)) as partial:
        partial.write_bytes(content)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that it is there whole or not at all.

    Raises:
        OSError: as from :func:`replacing`.
    """
    with replacing(Path(path)) as partial:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from None


def sweep(directory: Path) -> None:
    """Remove partial files of killed processes from a directory; the caller holds its :class:`FolderLock`."""
    for path in directory.glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def read_within(path: Path, largest: int) -> bytes:
    """The content of a file of at most ``largest`` bytes.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it is larger.
        OSError: it can't be read; the message names it.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read(largest + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{path} can't be read ({reason(error)})") from None
    if len(content) > largest:
        raise DamagedFileError(f"{path} has more than {largest} bytes")
    return content


def reason(error: BaseException) -> str:
    """The message of an error, in one line."""
    message = getattr(error, "strerror", None) or str(error)
    return " ".join(str(message).split()) or type(error).__name__


class FolderLock:
    """A folder that is this process's own to write, until :meth:`release` or the end of the process, however it ends.

    Where the file system knows no locks (some network drives), every lock is granted.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._handle: int | None = None

    def acquire(self, wait_seconds: float = 0.0) -> bool:
        """Whether the folder, which exists, is this process's now; waits so long for another one to leave it."""
        until = time.monotonic() + wait_seconds
        while not self._try():
            if time.monotonic() >= until:
                return False
            time.sleep(_LOCK_RETRY_SECONDS)
        return True

    def release(self) -> None:
        """Lets others have the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _try(self) -> bool:
        try:
            handle = _open_and_lock(self.directory)
        except BlockingIOError:
            return False
        except OSError:
            return True
        self._handle = handle
        return True


def _open_and_lock(directory: Path) -> int:
    """A handle that holds the lock as long as it is open.

    Raises:
        BlockingIOError: another process holds it.
        OSError: there are no locks here.
    """
    if sys.platform == "win32":
        handle = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT)
    else:
        handle = os.open(directory, os.O_RDONLY)  # the folder itself, so that no file is left behind
    try:
        if sys.platform == "win32":
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            except PermissionError:  # on Windows: another process has it
                raise BlockingIOError(f"{directory} is locked") from None
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return handle

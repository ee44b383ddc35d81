"""Standard output and error in the surroundings that users have: closed, cut off, of few characters, narrow."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import TextIO, cast

from ..files import reason

# Nobody reads any more: a pipe or a terminal whose other end is gone, or a handle that was closed.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
# Characters beyond ASCII that this package writes, for streams that lack them.
_PLAIN = {"±": "+-"}


class Stream(io.TextIOBase):
    r"""A text stream that no character, no closed pipe and no full disk makes raise: results come before messages.

    Characters that the stream's encoding lacks are written as escapes (``\u65e5``). Text is dropped once its reader
    has gone.

    Attributes:
        failure: why it could not be written, for another reason than that its reader has gone; None if it could.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: str | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return self._stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        """Writes; a character that the encoding lacks becomes an escape."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self._write_encodable(text)
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return self._stream.isatty()
        except ValueError:  # closed
            return False

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Always."""
        return True

    def _write_encodable(self, text: str) -> None:
        errors = getattr(self._stream, "errors", None) or "strict"

        def encodable(character: str) -> str:
            try:
                character.encode(self.encoding, errors)
                return character
            except UnicodeEncodeError:
                return _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode()

        try:
            self._stream.write("".join(map(encodable, text)))
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno not in _GONE and self.failure is None:
            self.failure = reason(error)
        # Buffered text still goes to the handle, at the latest when Python ends.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            finally:
                os.close(nowhere)


@contextlib.contextmanager
def standard_streams() -> Iterator[tuple[Stream, Stream]]:
    """Has ``sys.stdout`` and ``sys.stderr`` be a :class:`Stream` each, also where a process has none."""
    _occupy_standard_handles()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        streams = tuple(Stream(nowhere if stream is None else stream) for stream in before)
        sys.stdout, sys.stderr = cast("tuple[TextIO, TextIO]", streams)
        try:
            yield streams[0], streams[1]
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = before


def _occupy_standard_handles() -> None:
    """Opens the closed ones of handles 0 to 2, so that no file of a run gets one of them and a library's messages."""
    handle = os.open(os.devnull, os.O_RDWR)
    while handle <= 2:
        handle = os.open(os.devnull, os.O_RDWR)
    os.close(handle)


def readable(text: str) -> str:
    """Text as its bytes have it in UTF-8, whatever the locale it came by (file names and arguments, PEP 383)."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # half a character that stands for no byte
        return text.encode("utf-8", "replace").decode("utf-8")


def terminal_width(stream: object) -> int | None:
    """Columns of the terminal that a stream is, or the value of COLUMNS; None if it is no terminal."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return None
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() and int(given) else columns or None


def cells(text: str) -> int:
    """Columns that a text takes on a terminal: two for a wide character, none for one that joins another."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "FW" else 1
        for character in text
    )


def fitted(text: str, width: int) -> str:
    """A text cut to at most so many columns."""
    while cells(text) > width:
        text = text[:-1]
    return text


def padded(text: str, width: int) -> str:
    """A text filled with blanks to at least so many columns."""
    return text + " " * (width - cells(text))

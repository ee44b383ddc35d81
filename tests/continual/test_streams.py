"""Standard streams in the surroundings that users have."""

import errno
import io
import os
import subprocess
import sys

import pytest

from engram_kernels.continual import streams
from engram_kernels.continual.streams import Stream

TEXT = "日本 ± é"


@pytest.mark.parametrize(
    ("encoding", "errors", "wanted"),
    [
        ("utf-8", "strict", TEXT),
        ("ascii", "strict", r"\u65e5\u672c +- \xe9"),
        ("cp1252", "strict", r"\u65e5\u672c ± é"),
        ("latin-1", "replace", "?? ± é"),
        ("ascii", "surrogateescape", r"\u65e5\u672c +- \xe9"),
    ],
)
def test_characters_that_an_encoding_lacks_are_escaped(encoding, errors, wanted):
    raw = io.BytesIO()
    stream = Stream(io.TextIOWrapper(raw, encoding=encoding, errors=errors))
    assert stream.write(TEXT) == len(TEXT)
    stream.write("\udcff half a character\n")
    stream.flush()
    assert raw.getvalue().decode(encoding, "replace").startswith(wanted)
    assert raw.getvalue().endswith(b"half a character\n")
    assert stream.encoding == encoding
    assert stream.failure is None


def test_a_reader_that_has_gone_is_no_failure():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as file:
        stream = Stream(file)
        for _ in range(3):
            stream.write("x" * 100_000)
            stream.flush()
        assert stream.failure is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_told_and_raises_nothing():
    with open("/dev/full", "w") as file:
        stream = Stream(file)
        for _ in range(3):
            stream.write("x" * 100_000)
            stream.flush()
        assert stream.failure == os.strerror(errno.ENOSPC)


def test_a_closed_stream_raises_nothing():
    file = io.StringIO()
    file.close()
    stream = Stream(file)
    stream.write("x")
    stream.flush()
    assert not stream.isatty()
    assert streams.terminal_width(stream) is None


def test_a_process_without_streams_has_some_and_no_file_gets_their_handles(tmp_path):
    code = """
import os, sys
from engram_kernels.continual.streams import standard_streams
with standard_streams() as (out, err):
    print("x"), print("x", file=sys.stderr)
    with open("file", "w") as file:
        file.write(str(file.fileno()))
    assert out.failure is None and err.failure is None
open("done", "w").close()
"""
    closed = {0: "<&-", 1: ">&-", 2: "2>&-"}
    script = " ".join(["exec", '"$0"', "-c", '"$1"', *closed.values()])
    root = os.path.dirname(os.path.dirname(os.path.dirname(streams.__file__)))
    subprocess.run(["sh", "-c", script, sys.executable, code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root})
    assert (tmp_path / "done").exists()
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.skipif(os.name != "posix", reason="POSIX terminals")
def test_a_terminal_says_how_wide_it_is_and_columns_says_it_better(monkeypatch):
    import fcntl
    import pty
    import struct
    import termios

    monkeypatch.delenv("COLUMNS", raising=False)
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 37, 0, 0))
    try:
        with open(inner, "w") as terminal:
            assert streams.terminal_width(terminal) == 37
            assert streams.terminal_width(Stream(terminal)) == 37
            assert Stream(terminal).isatty()
            for columns, width in (("50", 50), ("0", 37), ("many", 37), ("", 37)):
                monkeypatch.setenv("COLUMNS", columns)
                assert streams.terminal_width(terminal) == width
    finally:
        os.close(outer)
    monkeypatch.setenv("COLUMNS", "50")
    assert streams.terminal_width(io.StringIO()) is None, "a file is as wide as it gets"


@pytest.mark.parametrize(("text", "width"), [("", 0), ("abc", 3), ("日本", 4), ("e\u0301", 1), ("ｶﾞ", 2), ("a日", 3)])
def test_wide_characters_take_two_columns(text, width):
    assert streams.cells(text) == width
    assert streams.padded(text, 6) == text + " " * (6 - width)
    assert streams.padded(text, 0) == text
    for columns in range(8):
        fitted = streams.fitted(text, columns)
        assert text.startswith(fitted)
        assert streams.cells(fitted) <= columns
    assert streams.fitted(text, width) == text


def test_names_are_readable_whatever_the_locale_they_came_by():
    assert streams.readable("日本") == "日本"
    assert streams.readable("日本".encode().decode("ascii", "surrogateescape")) == "日本"
    assert streams.readable(b"\xff.npz".decode("utf-8", "surrogateescape")) == "\ufffd.npz"
    assert streams.readable("\ud83d half") == "? half"

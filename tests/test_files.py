"""Files: whole or not there, named when they fail, and a folder that is one process's own."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from engram_kernels import files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    files.write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"metrics\.json can't be written \(disk full\)"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_files_are_as_readable_as_any_other(tmp_path):
    files.write_atomically(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")}
    assert len(modes) == 1


def test_two_writers_of_one_file_write_two(tmp_path):
    with files.replacing(tmp_path / "file") as one, files.replacing(tmp_path / "file") as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
        assert one != other
    assert (tmp_path / "file").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["file"]


def test_what_killed_writers_left_is_swept(tmp_path):
    code = """
import os, pathlib, signal, sys
from engram_kernels.files import replacing
with replacing(pathlib.Path(sys.argv[1]) / "file") as partial:
    partial.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".file.")
    (tmp_path / "file").write_bytes(b"whole")
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX limits")
def test_a_full_disk_names_the_file(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"metrics\.json can't be written \(File too large\)"):
            files.write_atomically(tmp_path / "metrics.json", bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_what_is_read_is_bounded(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        files.read_within(path, 3)
    path.write_bytes(b"abc")
    assert files.read_within(path, 3) == b"abc"
    with pytest.raises(files.DamagedFileError, match=r"file has more than 2 bytes"):
        files.read_within(path, 2)
    with pytest.raises(OSError, match=r"can't be read \(Is a directory\)"):
        files.read_within(tmp_path, 2)


HOLDER = """
import pathlib, sys, time
from engram_kernels.files import FolderLock
print(FolderLock(pathlib.Path(sys.argv[1])).acquire(), flush=True)
time.sleep(60)
"""


def test_a_folder_is_one_processs_own_until_it_ends_however_it_ends(tmp_path):
    lock = files.FolderLock(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        assert not lock.acquire()
        assert not lock.acquire(wait_seconds=0.1)
        process.send_signal(signal.SIGKILL)
        assert lock.acquire(wait_seconds=20)
    assert not files.FolderLock(tmp_path).acquire()
    lock.release()
    with files.FolderLock(tmp_path) as again:
        assert again.acquire()
    assert files.FolderLock(tmp_path).acquire()
    assert os.listdir(tmp_path) == []


def test_where_there_are_no_locks_none_is_in_the_way(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr(files, "_open_and_lock", refuse)
    assert files.FolderLock(tmp_path).acquire()
    assert files.FolderLock(tmp_path).acquire()

"""Which folder a run gets: never one that holds another's results or that another process writes to."""

import os
from pathlib import Path

import pytest

from engram_kernels.continual import folders, report
from engram_kernels.continual.checkpoint import Checkpoint, OtherOptionsError
from engram_kernels.continual.training import TrainingResult
from engram_kernels.files import FolderLock

CONFIG = {"method": "engram", "seed": 0}


def leave(folder, config, what):
    """What an earlier run may have left."""
    folder.mkdir()
    if what == "metrics":
        result = TrainingResult([[0.9]], True, 1, 10, 1.5, 2**20, 2**28, 3.0)
        report.write_metrics(folder, report.metrics_of(result, config))
    elif what == "checkpoint":
        Checkpoint(folder, config).save({"tasks_completed": 1})
    elif what == "damaged":
        (folder / "metrics.json").write_text("{")
        (folder / "checkpoint.pt").write_bytes(b"PK")


def claimed(folder, own, config=CONFIG):
    path, claim = folders.claim(folder, own, lambda path: {path: config})
    claim.release()
    return path


@pytest.mark.parametrize("what", ["nothing", "metrics", "checkpoint", "damaged"])
@pytest.mark.parametrize("own", [False, True])
def test_what_a_run_with_the_same_options_left_is_its_own(tmp_path, what, own):
    leave(tmp_path / "run", CONFIG, what)
    assert claimed(tmp_path / "run", own) == tmp_path / "run"


@pytest.mark.parametrize("what", ["metrics", "checkpoint"])
def test_what_a_run_with_other_options_left_stays(tmp_path, what):
    leave(tmp_path / "run", CONFIG | {"epochs": 3}, what)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(OtherOptionsError, match="epochs: expected 3 as in .*run.*another --output"):
        claimed(tmp_path / "run", own=True)
    assert claimed(tmp_path / "run", own=False) == tmp_path / "run-2"
    leave_again = tmp_path / "run-2"
    leave_again.rmdir()
    leave(leave_again, CONFIG | {"epochs": 4}, what)
    assert claimed(tmp_path / "run", own=False) == tmp_path / "run-3"
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_folder_in_use_is_left_to_its_user(tmp_path):
    _, first = folders.claim(tmp_path / "run", True, lambda path: {path / "a": CONFIG, path / "b": None})
    with pytest.raises(folders.InUseError, match="run/b is in use by another run; wait for its end or give another"):
        claimed(tmp_path / "run" / "b", own=True)
    assert claimed(tmp_path / "run" / "b", own=False) == tmp_path / "run" / "b-2"
    with pytest.raises(folders.InUseError), folders.Claim({tmp_path / "c": None, tmp_path / "run" / "a": None}):
        pass
    with FolderLock(tmp_path / "c") as lock:
        assert lock.acquire(), "what was claimed before the refusal is free"
    first.release()
    assert claimed(tmp_path / "run" / "b", own=True) == tmp_path / "run" / "b"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for own in (False, True):
            with pytest.raises(ValueError, match=r"output: expected a directory that can be written, got .*file"):
                claimed(path, own)
    assert os.listdir(tmp_path) == ["file"]


def test_numbers_begin_with_none():
    paths = folders.numbered(Path("runs") / "a.b")
    assert [str(next(paths)) for _ in range(3)] == ["runs/a.b", "runs/a.b-2", "runs/a.b-3"]

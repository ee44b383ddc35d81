"""The file a run goes on from: whole or not there, checked, and no cost to what is measured."""

import math
import os

import pytest
import torch

from engram_kernels.continual.checkpoint import Checkpoint, check_same_options, plain
from engram_kernels.continual.memory import MemoryMeter

OPTIONS = {"method": "engram", "hidden": [32], "lr": (0.1, 0.2), "ste_window": math.inf, "rate": None, "data_dir": "a"}


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint = Checkpoint(tmp_path, OPTIONS, resume=True)
    assert checkpoint.tasks_completed() is None
    assert checkpoint.load() is None
    state = {"tasks_completed": 2, "weight": torch.randn(3, 4), "seed": torch.arange(2), "rows": [[0.1, None]]}
    checkpoint.save(state)
    assert checkpoint.tasks_completed() == 2
    loaded = checkpoint.load()
    assert torch.equal(loaded["weight"], state["weight"])
    assert torch.equal(loaded["seed"], state["seed"])
    assert loaded["rows"] == state["rows"]
    assert Checkpoint(tmp_path, OPTIONS).load() is None
    checkpoint.remove()
    assert os.listdir(tmp_path) == []
    checkpoint.remove()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path, OPTIONS, resume=True)
    checkpoint.save({"tasks_completed": 1})

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save({"tasks_completed": 2})
    assert checkpoint.tasks_completed() == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    with pytest.raises(OSError, match=r"checkpoint: .*missing.checkpoint\.pt can't be written"):
        Checkpoint(tmp_path / "missing", OPTIONS).save({"tasks_completed": 1})


def test_what_a_killed_process_was_writing_is_overwritten_and_removed(tmp_path):
    (tmp_path / ".checkpoint.pt.partial").write_bytes(b"half")
    checkpoint = Checkpoint(tmp_path, OPTIONS, resume=True)
    assert checkpoint.tasks_completed() is None
    checkpoint.save({"tasks_completed": 1})
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    (tmp_path / ".checkpoint.pt.partial").write_bytes(b"half")
    checkpoint.remove()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("hidden", [32, 32], r"hidden: expected \[32\] as in .*checkpoint\.pt, got \[32, 32\]"),
        ("lr", 0.1, r"lr: expected \[0.1, 0.2\] .*, got 0.1"),
        ("ste_window", 1.0, "ste_window: expected inf .*, got 1.0"),
        ("rate", 0.5, "rate: expected None .*, got 0.5"),
        ("epochs", 3, "epochs: expected None .*, got 3"),
    ],
)
def test_other_options_are_named(tmp_path, name, value, wanted):
    Checkpoint(tmp_path, OPTIONS).save({"tasks_completed": 1})
    with pytest.raises(ValueError, match=wanted):
        Checkpoint(tmp_path, {**OPTIONS, name: value}).tasks_completed()


def test_data_may_lie_elsewhere(tmp_path):
    check_same_options(plain(OPTIONS), plain({**OPTIONS, "data_dir": "b"}), tmp_path)


@pytest.mark.parametrize("damage", ["cut", "changed", "no archive"])
def test_damage_is_found(tmp_path, damage):
    checkpoint = Checkpoint(tmp_path, OPTIONS, resume=True)
    checkpoint.save({"tasks_completed": 1, "weight": torch.ones(1000)})
    content = bytearray(checkpoint.path.read_bytes())
    if damage == "changed":
        content[content.index(bytes(torch.ones(4).numpy())) + 1234] ^= 1  # within the numbers
    checkpoint.path.write_bytes({"cut": content[:-1], "changed": content, "no archive": b"text"}[damage])
    with pytest.raises(ValueError, match=r"checkpoint: .*checkpoint\.pt is damaged"):
        checkpoint.load()


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"options": plain(OPTIONS), "tasks_completed": 1, "method": Harm()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is damaged"):
        Checkpoint(tmp_path, OPTIONS).tasks_completed()
    assert not (tmp_path / "harm").exists()


def test_neither_saving_nor_looking_copies_the_tensors(tmp_path):
    weight = torch.ones(16 * 2**20)  # 64 MiB
    checkpoint = Checkpoint(tmp_path, OPTIONS)
    checkpoint.save({"tasks_completed": 1})  # modules that saving loads are none of its tensors
    meter = MemoryMeter()
    if not meter.can_reset:
        pytest.skip("this system does not let a process reset its peak")
    checkpoint.save({"tasks_completed": 1, "weight": weight})
    assert checkpoint.tasks_completed() == 1
    assert meter.peak_above_start() < weight.nbytes / 8

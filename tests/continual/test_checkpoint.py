"""The file a run goes on from: whole or not there, checked, and no cost to what is measured."""

import math
import os
import tracemalloc
import zipfile

import pytest
import torch

from engram_kernels.continual.checkpoint import Checkpoint, check_same_options, plain
from engram_kernels.continual.memory import MemoryMeter
from engram_kernels.files import DamagedFileError

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


def test_what_a_killed_process_was_writing_is_in_nobodys_way_and_removed(tmp_path):
    left = tmp_path / ".checkpoint.pt.1-00.partial"
    left.write_bytes(b"half")
    checkpoint = Checkpoint(tmp_path, OPTIONS, resume=True)
    assert checkpoint.tasks_completed() is None
    checkpoint.save({"tasks_completed": 1})
    assert checkpoint.tasks_completed() == 1
    assert left.read_bytes() == b"half", "another process may be writing it"
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


def test_a_bit_flipped_anywhere_gives_what_was_saved_or_a_line_that_names_the_file(tmp_path):
    checkpoint = Checkpoint(tmp_path, OPTIONS, resume=True)
    saved = {"tasks_completed": 3, "weight": torch.arange(5.0), "names": {"a": [1, None, True, 0.5]}}
    checkpoint.save(saved)
    content, refused = checkpoint.path.read_bytes(), 0
    for place in range(0, 8 * len(content), 13):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        checkpoint.path.write_bytes(changed)
        try:
            loaded = checkpoint.load()
        except DamagedFileError as error:
            assert str(checkpoint.path) in str(error)
            assert "without --resume training begins anew" in str(error)
            assert "\n" not in str(error)
            refused += 1
        else:
            assert torch.equal(loaded.pop("weight"), saved["weight"])
            assert loaded == {"tasks_completed": 3, "names": saved["names"], "options": plain(OPTIONS)}
    assert refused > 200


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {"tasks_completed": 1},
        {"options": None, "tasks_completed": 1},
        {"options": [], "tasks_completed": 1},
        {"options": {}, "tasks_completed": None},
        {"options": {}, "tasks_completed": "1"},
        {"options": {}, "tasks_completed": True},
        {"options": {}, "tasks_completed": 0},
        {"options": {}, "tasks_completed": torch.ones(2)},
    ],
    ids=str,
)
def test_another_file_of_torch_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(DamagedFileError, match=r"checkpoint: .*checkpoint\.pt is damaged or of another version"):
        Checkpoint(tmp_path, {}).tasks_completed()


def test_a_packed_member_is_not_unpacked(tmp_path):
    """torch packs none; 64 MiB of zeros would be 64 KiB."""
    with zipfile.ZipFile(tmp_path / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("checkpoint/data.pkl", bytes(2**26))
    tracemalloc.start()
    with pytest.raises(DamagedFileError, match=r"damaged or of another version \(a compressed member\)"):
        Checkpoint(tmp_path, OPTIONS).tasks_completed()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_a_directory_in_its_place_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(OSError, match=r"checkpoint: .*checkpoint\.pt can't be read \(Is a directory\)"):
        Checkpoint(tmp_path, OPTIONS).tasks_completed()


@pytest.mark.skipif(os.name != "posix", reason="POSIX limits")
@pytest.mark.parametrize("limit", [100, 2**16, 2**20])
def test_a_file_that_is_too_large_to_write_is_named_and_why(tmp_path, limit):
    """As on a full disk; what was there before stays, and nothing else."""
    import resource

    checkpoint = Checkpoint(tmp_path, OPTIONS)
    checkpoint.save({"tasks_completed": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match=r"\Acheckpoint: .*checkpoint\.pt can't be written \(File too large\)\Z"):
            checkpoint.save({"tasks_completed": 2, "weight": torch.zeros(2**18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.tasks_completed() == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_what_torch_cannot_write_for_reasons_of_its_own_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534\nmore")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"checkpoint\.pt can't be written \(\[enforce .* 534\)\Z"):
        Checkpoint(tmp_path, OPTIONS).save({"tasks_completed": 1})
    assert os.listdir(tmp_path) == []


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

"""`engram-kernels predict`: every kind of saved model, every kind of file, every refusal."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

import engram_kernels as ek
from engram_kernels import cli
from engram_kernels.cli.predict import KINDS
from engram_kernels.continual import report, scenarios, training
from engram_kernels.continual.data import load_npz
from engram_kernels.continual.methods import METHODS

LABELS = np.array([3, 5, 9])
UNITS = np.array([1e3, 1.0, 1e-3, 1.0, 5.0])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory with two data sets, whose labels have holes: images of bytes, and a table."""
    monkeypatch.chdir(tmp_path)
    random = np.random.RandomState(0)
    part = {}
    centres = random.randint(0, 256, (3, 8, 8))
    for name, samples in (("train", 90), ("test", 30)):
        y = np.arange(samples) % 3
        part[f"x_{name}"] = np.clip(centres[y] + random.randint(-20, 21, (samples, 8, 8)), 0, 255).astype(np.uint8)
        part[f"y_{name}"] = LABELS[y]
    np.savez("images.npz", **part)
    table = {name: array if name[0] == "y" else array[:, 0, :5] * UNITS for name, array in part.items()}
    np.savez("table.npz", **table)


def train(dataset, *options):
    common = ["--hidden", "64", "--classes-per-task", "1", "--quiet", "--output", "run"]
    return cli.main(["train", "--dataset", f"{dataset}.npz", *common, *options])


def predict(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["predict", *map(str, arguments)]) == 0
    return np.array(capsys.readouterr().out.split(), dtype=int)


def refused(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["predict", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    return printed.err


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", ["images", "table"])
def test_the_saved_model_of_every_method_predicts_what_was_measured(capsys, dataset, method):
    assert train(dataset, "--method", method, "--epochs", "2", "--save-model") == 0
    file = Path("run", METHODS[method].config.model_file)
    assert f"wrote {file}, the model: engram-kernels predict {file} FILE" in capsys.readouterr().out
    data = np.load(f"{dataset}.npz")
    labels = predict(capsys, "run", f"{dataset}.npz")
    assert set(labels) <= set(LABELS)
    assert (labels == data["y_test"]).mean() == pytest.approx(report.read_metrics("run")["average_accuracy"])
    assert (predict(capsys, file, f"{dataset}.npz", "--threads", "1") == labels).all()


@pytest.mark.parametrize("method", ["engram", "joint", "replay", "classifier"])
def test_the_checkpoint_of_an_interrupted_run_predicts_the_classes_so_far(capsys, monkeypatch, method):
    evaluate, rows = training.evaluate, []

    def stopped(*arguments):
        rows.append(None)
        if len(rows) > 6:  # in the evaluation after the last of three tasks
            raise KeyboardInterrupt
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", stopped)
        assert train("table", "--method", method) == 130
    assert [path.name for path in Path("run").glob("*.pt")] == ["checkpoint.pt"]
    labels = predict(capsys, "run", "table.npz")
    y = np.load("table.npz")["y_test"]
    assert method != "classifier" or set(labels) <= {3, 5}
    assert (labels == y)[y != 9].mean() > 0.7


def test_the_newest_model_of_a_folder_is_taken(capsys):
    assert train("images", "--method", "classifier", "--save-model") == 0
    newer = Path("run/model.pt")
    newer.write_bytes(b"PK\5\6" + bytes(18))
    assert "model.pt" in refused(capsys, "run", "images.npz")
    newer.unlink()
    assert len(predict(capsys, "run", "images.npz")) == 30


@pytest.fixture
def text_model():
    data = np.load("images.npz")
    model = ek.EngramClassifier(256).fit(data["x_train"].reshape(90, -1), data["y_train"].astype(str))
    model.save("model.safetensors")
    return data["x_test"], model.predict(data["x_test"].reshape(30, -1))


def test_pretrained_folders_predict(capsys):
    x = np.load("images.npz")["x_test"]
    flat = torch.from_numpy(x.reshape(30, 64)).float()
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)), ek.BinaryEngramConv2d(1, 8, 3, padding=1, binary_input=False),
        torch.nn.BatchNorm2d(8), ek.BinaryEngramConv2d(8, 8, (3, 2), stride=2, engram=ek.StochasticEngram(0.5)),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4),
    )  # fmt: skip
    for model in (network, ek.EngramMLP((64, 32, 10))):
        ek.save_pretrained(model, "folder")
        expected = model.eval()(flat).argmax(dim=1).numpy()
        assert (predict(capsys, "folder", "images.npz") == expected).all()
    np.save("narrow.npy", np.zeros((3, 9)))
    assert "samples: expected samples that the model takes, got 9 features" in refused(capsys, "folder", "narrow.npy")
    ek.save_pretrained(torch.nn.Unflatten(1, (8, 8)), "images")
    assert "model: expected one that gives scores of shape (samples, classes)" in refused(
        capsys, "images", "images.npz"
    )
    Path("folder/model.safetensors").unlink()
    assert "expected model.safetensors in folder, found none" in refused(capsys, "folder", "images.npz")


def test_a_pretrained_classifier_predicts(capsys, text_model):
    x, labels = text_model
    ek.save_pretrained(ek.EngramClassifier.load("model.safetensors"), "folder")
    assert (predict(capsys, "folder", "images.npz").astype(str) == labels).all()


def test_files_of_every_kind_are_read(capsys, text_model):
    x, labels = text_model
    np.save("x.npy", x.astype(np.int32))
    np.save("floats.npy", x.reshape(30, 64).astype(np.float64))
    np.savez("one.npz", anything=x)
    np.savez_compressed("several.npz", x=x, y=np.zeros(30))
    np.savetxt("x.csv", x.reshape(30, 64), delimiter=",")
    Path("named.csv").write_text("﻿" + ",".join(f"pixel {i}" for i in range(64)) + "\n" + Path("x.csv").read_text())
    idx = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in x.shape) + x.tobytes()
    Path("x-idx3-ubyte").write_bytes(idx)
    Path("x-idx3-ubyte.gz").write_bytes(gzip.compress(idx))
    for file in ("images.npz", "x.npy", "floats.npy", "one.npz", "several.npz", "x.csv", "named.csv", "x-idx3-ubyte",
                 "x-idx3-ubyte.gz"):  # fmt: skip
        assert (predict(capsys, "model.safetensors", file).astype(str) == labels).all(), file
    assert cli.main(["predict", "model.safetensors", "x.npy", "--out", "labels.txt"]) == 0
    assert capsys.readouterr().out == ""
    assert Path("labels.txt").read_text().split() == labels.tolist()


def test_files_that_hold_no_samples_are_refused_by_name(capsys, text_model):
    x, _ = text_model
    np.savez("several.npz", a=x, b=x)
    np.savez("objects.npz", x=np.array([None], dtype=object))
    np.save("row.npy", x[0].reshape(-1))
    np.save("narrow.npy", x[:, :3])
    np.save("nan.npy", np.full((2, 64), np.nan))
    np.save("cut.npy", x)
    Path("cut.npy").write_bytes(Path("cut.npy").read_bytes()[:-5])
    Path("words.csv").write_text("a,b\n1,2\n3,four\n")
    Path("empty.csv").write_text("")
    Path("bad.gz").write_bytes(b"\x1f\x8b\x08 and no more")
    Path("notes.txt").write_text("hello")
    for file, wanted in {
        "absent.npz": "samples: expected an .npz file, but absent.npz does not exist",
        "absent.csv": "absent.csv",
        "several.npz": "samples: expected one array in several.npz, or one of the name x or x_test, got a, b",
        "objects.npz": "x: expected an array of numbers, got Python objects in objects.npz",
        "row.npy": "samples: expected real numbers of shape (samples, ...) in row.npy, got uint8 of shape (64,)",
        "narrow.npy": "X has 24 features, but EngramClassifier is expecting 64 features as input. (in narrow.npy)",
        "nan.npy": "X: expected finite numbers, got NaN at row 0, column 0 (in nan.npy)",
        "cut.npy": "samples: damaged in cut.npy",
        "words.csv": "samples: expected lines of numbers between commas in words.csv, got",
        "empty.csv": "samples: expected at least one line of numbers in empty.csv, got none",
        "bad.gz": "bad.gz: truncated or damaged",
        "notes.txt": "samples: expected a .npz, .npy, .csv or IDX file, got notes.txt",
    }.items():
        assert wanted in refused(capsys, "model.safetensors", file), file


def test_files_that_hold_no_model_are_refused_by_name(capsys, text_model):
    from safetensors.torch import save_file

    whole = Path("model.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-5])
    save_file({"a": torch.zeros(3)}, "foreign.safetensors", {"format": "pt"})
    Path("empty").write_bytes(b"")
    Path("nothing").mkdir()
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    assert train("images", "--method", "finetune", "--epochs", "1", "--save-model") == 0
    damaged = bytearray(Path("run/model.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    Path("damaged.pt").write_bytes(damaged)
    one_of = f"model: expected {', '.join(kind.name for kind in KINDS)}, got "
    for file, wanted in {
        "absent": "model: expected a file or a folder, but absent does not exist",
        "nothing": "model: expected model.pt or model.safetensors or checkpoint.pt in nothing, got none of them",
        "cut.safetensors": "cut.safetensors: expected a whole safetensors file",
        "foreign.safetensors": one_of + "foreign.safetensors",
        "empty": one_of + "empty",
        "foreign.pt": "model: expected the model of a training run in foreign.pt",
        "images.npz": "model: expected the model of a training run in images.npz",
        "damaged.pt": "model: expected the model of a training run in damaged.pt",
    }.items():
        assert wanted in refused(capsys, file, "images.npz"), file
    assert "threads: expected an integer >= 1, got 0" in refused(capsys, "run", "images.npz", "--threads", "0")
    assert "can't be written" in refused(capsys, "run", "images.npz", "--out", "absent/labels.txt")
    np.save("narrow.npy", np.zeros((3, 9)))
    assert "samples: expected 64 features per sample, got 9 (in narrow.npy)" in refused(capsys, "run", "narrow.npy")


def test_new_samples_become_inputs_as_those_of_the_scenario_did():
    for name in ("images", "table"):
        dataset = load_npz(f"{name}.npz")
        for encoded in (True, False):
            scenario = scenarios.make_scenario("class", dataset, classes_per_task=3, encoded=encoded)
            x, _ = next(scenario.test_stream[0].batches(100))
            new, _ = next(scenarios.new_samples(dataset.x_test, scenario.data()).batches(100))
            assert torch.equal(x, new)
            if not encoded:
                assert torch.equal(x, dataset.x_test)

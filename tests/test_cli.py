"""The command as a person meets it: what it prints, what it writes, how it says no, how it stops."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import engram_kernels as ek
from engram_kernels import cli
from engram_kernels.cli.train import can_draw
from engram_kernels.continual.methods import METHODS, GradientConfig
from engram_kernels.files import FolderLock

KEYS = {
    "accuracy_matrix", "average_accuracy", "backward_transfer", "forgetting", "peak_memory_bytes",
    "step_milliseconds", "config",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are too small to share: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def npz(tmp_path, monkeypatch):
    """A small data set of four separable classes of 4 x 4 pixels; the working directory is an empty one."""
    monkeypatch.chdir(tmp_path)
    write_npz("small.npz")
    return "small.npz"


def write_npz(path, classes=4, side=4, seed=0):
    random = np.random.RandomState(seed)
    centres = random.randn(classes, side, side)
    part = {}
    for name, samples in (("train", 80), ("test", 40)):
        y = np.arange(samples) % classes
        part[f"x_{name}"] = (centres[y] + 0.3 * random.randn(samples, side, side)).astype(np.float32)
        part[f"y_{name}"] = y
    np.savez(path, **part)


def train(npz, *options):
    """Run in this process, with a small network."""
    datasets = [npz] if isinstance(npz, str) else npz
    return cli.main(["train", "--dataset", *datasets, "--hidden", "32", "--epochs", "2", *options])


def read(path):
    return json.loads(Path(path).read_text())


def refused(capsys, wanted):
    """Exit code 2 goes with one line on stderr that names the argument."""
    error = capsys if isinstance(capsys, str) else capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("engram-kernels: error:")]
    assert len(lines) == 1
    assert error.splitlines()[-1] == lines[0]
    assert "Traceback" not in error
    for piece in [wanted] if isinstance(wanted, str) else wanted:
        assert piece in lines[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scenario", ["class", "permuted", "rotated"])
def test_train_writes_metrics_and_prints_the_table(npz, capsys, method, scenario):
    assert train(npz, "--method", method, "--scenario", scenario, "--tasks", "2", "--seed", "5") == 0
    folder = f"runs/small-{scenario}-{method}-seed5"
    metrics = read(f"{folder}/metrics.json")
    assert set(metrics) >= KEYS
    assert metrics["completed"] is True
    assert np.array(metrics["accuracy_matrix"]).shape == (2, 2)
    assert metrics["config"]["method"] == method
    assert metrics["config"]["seed"] == 5
    assert metrics["config"]["epochs"] == 2
    assert metrics["step_milliseconds"] > 0
    printed = capsys.readouterr()
    for piece in (
        "after task 2",
        "average accuracy",
        "backward transfer",
        "forgetting",
        "ms",
        "peak memory",
        folder,
    ):
        assert piece in printed.out
    assert "task 2/2 learned" in printed.err


def test_options_reach_the_run(npz):
    assert train(
        npz, "--lr", "0.001", "0.002", "--metaplasticity", "0.7", "--rate", "0.5", "--temperature", "inf",
        "--ste-window", "2", "--loss", "all", "--batch-size", "7", "--classes-per-task", "1", "--shuffle-classes",
        "--train-hidden", "--output", "out", "--weight-decay", "1e-6", "--weight-bound", "0.5", "inf", "--quiet",
    ) == 0  # fmt: skip
    config = read("out/metrics.json")["config"]
    wanted = {
        "lr": [0.001, 0.002], "metaplasticity": 0.7, "rate": 0.5, "temperature": "inf", "ste_window": 2.0,
        "loss": "all", "batch_size": 7, "classes_per_task": 1, "shuffle_classes": True, "tasks": 4, "hidden": [32],
        "weight_decay": 1e-6, "weight_bound": [0.5, "inf"],
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted


def test_a_stream_of_data_sets(npz, capsys):
    write_npz("other.npz", seed=1)
    assert train([npz, "other.npz"], "--scenario", "domain", "--samples-per-task", "30", "--validation", "20") == 0
    metrics = read("runs/small+other-domain-engram-seed0/metrics.json")
    assert np.array(metrics["accuracy_matrix"]).shape == (2, 2)
    assert metrics["steps"] == 2 * 2 * 1, "two epochs of two tasks of 30 samples, in batches of 100"
    assert -0.25 <= metrics["forward_transfer"] <= 0.75
    wanted = {
        "dataset": [npz, "other.npz"], "scenario": "domain", "tasks": 2, "samples_per_task": 30, "validation": 20,
        "max_degrees": None, "classes_per_task": 4,
    }  # fmt: skip
    assert {key: metrics["config"][key] for key in wanted} == wanted
    assert (
        "small+other: 120 training (at most 30 per task) and 40 validation samples of 16 features, 4 classes"
        in capsys.readouterr().out
    )


def test_rotation_and_validation_reach_the_run(npz, capsys):
    options = ("--scenario", "rotated", "--tasks", "3", "--batch-size", "10", "--quiet")
    assert train(npz, *options, "--max-degrees", "90", "--validation", "16", "--output", "a") == 0
    assert "64 training and 16 validation samples" in capsys.readouterr().out
    assert train(npz, *options, "--output", "b") == 0
    assert "80 training and 40 test samples" in capsys.readouterr().out
    one, other = (read(f"{output}/metrics.json") for output in "ab")
    assert (one["steps"], other["steps"]) == (2 * 3 * 7, 2 * 3 * 8)
    for metrics, degrees, validation in ((one, 90.0, 16), (other, 180.0, None)):
        config = metrics["config"]
        assert (config["dataset"], config["max_degrees"], config["validation"]) == (npz, degrees, validation)


@pytest.mark.parametrize(
    ("datasets", "options", "wanted"),
    [
        (["small.npz"], ["--scenario", "domain"], ["dataset", "at least 2", "got 1"]),
        (["small.npz", "small.npz"], [], ["dataset", "one with scenario class", "got 2"]),
        (["small.npz", "wide.npz"], ["--scenario", "domain"], ["dataset", "16 features", "25 in wide (data set 2)"]),
        (["small.npz", "few.npz"], ["--scenario", "domain"], ["dataset", "4 labels", "label 3 in few (data set 2)"]),
        (["small.npz", "none.npz"], ["--scenario", "domain"], ["none.npz", "does not exist"]),
    ],
)
def test_data_sets_that_make_no_stream(npz, capsys, datasets, options, wanted):
    write_npz("wide.npz", side=5)
    write_npz("few.npz", classes=3)
    assert train(datasets, *options) == 2
    refused(capsys, wanted)


def test_the_same_seed_gives_the_same_numbers(npz):
    matrices = []
    for output, seed in (("a", 1), ("b", 1)):
        assert train(npz, "--seed", str(seed), "--output", output) == 0
        matrices.append(read(f"{output}/metrics.json")["accuracy_matrix"])
    assert matrices[0] == matrices[1]


def test_several_seeds(npz, capsys):
    assert train(npz, "--seeds", "0", "1", "2", "--output", "out") == 0
    values = [read(f"out/seed{seed}/metrics.json")["average_accuracy"] for seed in range(3)]
    summary = read("out/summary.json")
    assert summary["average_accuracy"]["values"] == values
    assert summary["average_accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert summary["average_accuracy"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert "deviation" in capsys.readouterr().out


def test_the_model_is_saved_on_request(npz):
    assert train(npz, "--save-model", "--output", "out") == 0
    saved = torch.load("out/model.pt", weights_only=True)
    assert saved["config"]["hidden"] == [32]
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values() if value.is_floating_point())


def test_a_picture_is_drawn(npz):
    pytest.importorskip("matplotlib")
    assert train(npz, "--output", "out") == 0
    assert Path("out/report.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_that_fails_is_a_warning_and_later_seeds_run(npz, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no font\nanywhere")

    monkeypatch.setattr("engram_kernels.continual.plots.write_picture", fail)
    assert train(npz, "--seeds", "0", "1", "--output", "out", "--quiet") == 0
    warnings = [f"out/seed{seed}/report.png can't be drawn (no font anywhere)" for seed in (0, 1)]
    error = capsys.readouterr().err
    assert all(f"engram-kernels: warning: {warning}" in error for warning in warnings)
    assert [read(f"out/seed{seed}/metrics.json")["completed"] for seed in (0, 1)] == [True, True]
    assert len(read("out/summary.json")["average_accuracy"]["values"]) == 2


def test_a_seed_that_fails_leaves_the_others_their_results(npz, capsys, monkeypatch):
    from engram_kernels.continual import training

    observe = training._step

    def fail(method, *arguments, **named):
        if torch.initial_seed() == 1:
            raise training.TrainingError("loss: expected a finite number, got nan")
        return observe(method, *arguments, **named)

    monkeypatch.setattr(training, "_step", fail)
    assert train(npz, "--seeds", "0", "1", "2", "--output", "out", "--quiet") == 1
    assert "engram-kernels: error: loss: expected a finite number, got nan (seed 1)" in capsys.readouterr().err
    assert [os.path.exists(f"out/seed{seed}/metrics.json") for seed in range(3)] == [True, False, True]
    assert len(read("out/summary.json")["average_accuracy"]["values"]) == 2


def test_without_matplotlib_the_numbers_are_still_written(npz, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train(npz, "--output", "out") == 0
    assert sorted(os.listdir("out")) == ["metrics.json"]
    error = capsys.readouterr().err
    assert "needs matplotlib" in error
    assert "pip install 'engram-kernels[train]'" in error


def test_without_scikit_learn_digits_say_how_to_get_it(npz, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["train"]) == 2
    refused(capsys, ["digits", "scikit-learn", "pip install 'engram-kernels[train]'"])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--rate", "0"], ["rate", "(0, 1]", "0.0"]),
        (["--rate", "1.1"], ["rate", "(0, 1]", "1.1"]),
        (["--temperature", "-1"], ["temperature", ">= 0", "-1.0"]),
        (["--lr", "nan"], ["lr", "nan"]),
        (["--lr", "1", "2", "3", "4"], ["lr", "got 4"]),
        (["--metaplasticity", "-1"], ["metaplasticity", "-1.0"]),
        (["--epochs", "0"], ["epochs", "got 0"]),
        (["--batch-size", "0"], ["batch_size", "got 0"]),
        (["--threads", "0"], ["threads", "got 0"]),
        (["--hidden", "0"], ["hidden", "[0]"]),
        (["--hidden", "-5"], ["hidden", "[-5]"]),
        (["--tasks", "9"], ["tasks", "got 9"]),
        (["--classes-per-task", "0"], ["classes_per_task", "got 0"]),
        (["--seed", "-1"], ["seed", "got -1"]),
        (["--seeds", "1", "1"], ["seeds", "different", "1 1"]),
        (["--method", "bnn", "--rate", "0.1"], ["rate", "bnn"]),
        (["--scenario", "permuted", "--classes-per-task", "2"], ["classes_per_task", "permuted"]),
        (["--scenario", "permuted", "--max-degrees", "90"], ["max_degrees", "rotated", "permuted"]),
        (["--scenario", "rotated", "--max-degrees", "360"], ["max_degrees", "(0, 360)", "360.0"]),
        (["--scenario", "rotated", "--shuffle-classes"], ["shuffle_classes", "class", "rotated"]),
        (["--scenario", "rotated", "--samples-per-task", "0"], ["samples_per_task", "got 0"]),
        (["--samples-per-task", "9"], ["samples_per_task", "permuted, rotated, domain", "class"]),
        (["--scenario", "domain", "--tasks", "2"], ["tasks", "domain"]),
        (["--validation", "0"], ["validation", "1 to 79", "small", "got 0"]),
        (["--validation", "3"], ["validation", "label 0 among"]),
        (["--dataset", "missing.npz"], ["missing.npz", "does not exist"]),
        (["--dataset", "cifar"], ["dataset", "'cifar'"]),
        (["--dataset", "mnist", "--data-dir", "nowhere"], ["train-images-idx3-ubyte", "nowhere/MNIST/raw"]),
    ],
)
def test_bad_values(npz, capfd, options, wanted):
    assert train(npz, *options) == 2
    printed = capfd.readouterr()
    assert printed.out == "", "an answer before anything else is printed"
    refused(printed.err, wanted)
    assert not any(name.endswith(".json") for _, _, names in os.walk(".") for name in names)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["train", "--method", "magic"], "magic"),
        (["train", "--hidden", "many"], "many"),
        (["train", "--wings", "2"], "--wings"),
    ],
)
def test_bad_command_lines(capsys, arguments, wanted):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    refused(capsys, wanted)


def test_damaged_files(npz, capsys):
    Path("cut.npz").write_bytes(Path(npz).read_bytes()[:-30])
    assert train("cut.npz") == 2
    refused(capsys, "cut.npz")


def test_an_output_that_cannot_be_written(npz, capsys):
    Path("file").touch()
    assert train(npz, "--output", "file") == 2
    refused(capsys, ["output", "file"])
    assert train(npz, "--output", "file/below") == 2
    refused(capsys, ["output", "file/below"])
    if os.geteuid() != 0:  # root may write anywhere
        os.mkdir("sealed", 0o500)
        assert train(npz, "--output", "sealed") == 2
        refused(capsys, ["output", "sealed", "Permission denied"])


def test_a_loss_that_is_not_finite(npz, capsys, monkeypatch):
    losses = "engram_kernels.continual.methods.base.LOSSES"
    monkeypatch.setattr(losses, {"all": lambda scores, y: scores.sum() * float("nan")})
    assert train(npz, "--readout", "linear", "--loss", "all") == 2
    refused(capsys, ["loss", "nan", "task 1"])


def test_a_network_larger_than_memory(npz, capsys):
    assert train(npz, "--hidden", str(10**13)) == 2
    refused(capsys, "memory")


def test_interrupt_writes_what_was_learned(npz):
    """For real: a process, a SIGINT while it trains."""
    command = [sys.executable, "-m", "engram_kernels.cli", "train", "--dataset", npz, "--hidden", "32"]
    process = subprocess.Popen(
        [*command, "--epochs", "20", "--batch-size", "2", "--scenario", "permuted", "--tasks", "300",
         "--threads", "1", "--output", "out"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )  # fmt: skip
    try:
        for line in process.stderr:
            if "task 1/300 learned" in line:
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        printed, error = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "interrupted" in error
    metrics = read("out/metrics.json")
    assert metrics["completed"] is False
    assert metrics["accuracy_matrix"][0][0] is not None
    assert metrics["accuracy_matrix"][-1] == [None] * 300
    assert metrics["average_accuracy"] > 0
    assert "average accuracy" in printed


FOUR_TASKS = ["--scenario", "permuted", "--tasks", "4", "--batch-size", "10"]
KILLED = """
import os, signal, sys
from engram_kernels import cli
from engram_kernels.continual import training

steps, step = 0, training._step

def killed(*arguments, **named):
    global steps
    steps += 1
    if steps == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments, **named)

training._step = killed
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--fuse-backward", "--state-dtype", "bfloat16", "--weight-dtype", "bfloat16"],
        ["--readout", "dendritic", "--segments", "3", "--train-hidden", "--loss", "batch", "--temperature", "1"],
        ["--readout", "ridge", "--batch-size", "5"],  # one pass
        pytest.param(["--state-dtype", "int8"], marks=pytest.mark.slow),
        pytest.param(["--method", "mbnn", "--fuse-backward", "--state-dtype", "int8"], marks=pytest.mark.slow),
        pytest.param(["--readout", "dendritic", "--segments", "3"], marks=pytest.mark.slow),
        pytest.param(["--readout", "prototype", "--batch-size", "5"], marks=pytest.mark.slow),  # one pass
    ],
    ids=" ".join,
)
def test_a_killed_run_goes_on_to_the_numbers_of_an_unbroken_one(npz, capsys, options):
    """For real: a process that dies in the third of four tasks of 16 steps."""
    options = [
        "--scenario",
        "permuted",
        "--tasks",
        "4",
        "--batch-size",
        "10",
        "--save-model",
        "--threads",
        "1",
        *options,
    ]
    command = ["train", "--dataset", npz, "--hidden", "32", "--epochs", "2", *options]
    process = subprocess.run([sys.executable, "-c", KILLED, *command, "--output", "broken"], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert os.listdir("broken") == ["checkpoint.pt"]
    assert train(npz, *options, "--output", "broken", "--resume") == 0
    printed = capsys.readouterr()
    assert "resuming broken after task 2 of 4" in printed.out
    assert "resumed after task 2/4\n" in printed.err
    assert "task 2/4 learned" not in printed.err
    assert "checkpoint.pt" not in os.listdir("broken")

    assert train(npz, *options, "--output", "whole") == 0
    broken, whole = read("broken/metrics.json"), read("whole/metrics.json")
    for name in ("accuracy_matrix", "average_accuracy", "steps", "tasks_completed", "completed", "config"):
        assert broken[name] == whole[name]
    weights = [torch.load(f"{folder}/model.pt", weights_only=True)["state_dict"] for folder in ("broken", "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


def interrupted(npz, monkeypatch, *options, step=40):
    """Ctrl-C at a step of a run of four tasks of 16 steps."""
    from engram_kernels.continual import training

    steps, observe = 0, training._step

    def stopped(*arguments, **named):
        nonlocal steps
        steps += 1
        if steps == step:
            raise KeyboardInterrupt
        return observe(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", stopped)
        return train(npz, *FOUR_TASKS, *options)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_after_its_last_finished_task(npz, capsys, monkeypatch, method):
    options = ["--method", method]
    if isinstance(METHODS[method].config, GradientConfig):
        options += ["--loss", "all"]
    if not METHODS[method].config.takes_steps:  # one pass, half as many steps
        options += ["--batch-size", "5"]
    assert interrupted(npz, monkeypatch, *options, "--output", "out") == 130
    assert "--resume" in capsys.readouterr().err
    assert read("out/metrics.json")["tasks_completed"] == (1 if method == "joint" else 2)  # its tasks grow
    assert train(npz, *FOUR_TASKS, *options, "--output", "out", "--resume") == 0
    assert train(npz, *FOUR_TASKS, *options, "--output", "whole") == 0
    assert read("out/metrics.json")["accuracy_matrix"] == read("whole/metrics.json")["accuracy_matrix"]


def test_nothing_to_resume_is_said(npz, capsys, monkeypatch):
    assert train(npz, "--output", "out", "--resume") == 0
    assert "nothing to resume in out: starting from the beginning" in capsys.readouterr().out
    assert interrupted(npz, monkeypatch, "--output", "early", step=5) == 130
    assert train(npz, *FOUR_TASKS, "--output", "early", "--resume") == 0
    assert "nothing to resume in early" in capsys.readouterr().out


def test_a_finished_run_is_complete(npz, capsys, monkeypatch):
    assert train(npz, "--output", "out") == 0
    before, table = Path("out/metrics.json").read_bytes(), capsys.readouterr().out.split("\n\n")[1]
    Path("out/report.png").unlink(missing_ok=True)
    monkeypatch.setattr("engram_kernels.continual.training.train", None)
    assert train(npz, "--output", "out", "--resume") == 0
    printed = capsys.readouterr().out
    assert "out is complete: nothing is left to train" in printed
    assert table in printed
    assert Path("out/metrics.json").read_bytes() == before
    assert cli.train.can_draw() == Path("out/report.png").exists()
    assert train(npz, "--output", "out", "--resume", "--save-model") == 2
    refused(capsys, ["save_model", "out"])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--hidden", "48"], ["hidden", "expected [32]", "got [48]"]),
        (["--seed", "3"], ["seed", "expected 0", "got 3"]),
        (["--lr", "0.1", "0.2"], ["lr", "got [0.1, 0.2]"]),
        (["--tasks", "5"], ["tasks", "expected 4", "got 5"]),
        (["--method", "mbnn"], ["method", "expected engram", "got mbnn"]),
    ],
)
def test_resuming_with_other_options_is_refused(npz, capsys, monkeypatch, options, wanted):
    """Of what was interrupted, and of what is complete."""
    assert interrupted(npz, monkeypatch, "--output", "out") == 130
    for file in ("checkpoint.pt", "metrics.json"):
        capsys.readouterr()
        assert train(npz, *FOUR_TASKS, "--output", "out", "--resume", *options) == 2
        refused(capsys, [*wanted, f"out/{file}"])
        assert train(npz, *FOUR_TASKS, "--output", "out", "--resume") == 0


def test_without_resume_training_begins_anew(npz, capsys, monkeypatch):
    assert interrupted(npz, monkeypatch, "--output", "out") == 130
    Path("out/.metrics.json.1-00.partial").write_text("of a process that was killed")
    assert train(npz, *FOUR_TASKS, "--output", "out") == 0
    assert sorted(os.listdir("out")) == ["metrics.json", "report.png"]
    assert "task 1/4 learned" in capsys.readouterr().err.rsplit("--resume goes on", 1)[1]
    assert read("out/metrics.json")["completed"] is True


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other"])
def test_a_damaged_checkpoint(npz, capsys, monkeypatch, damage):
    assert interrupted(npz, monkeypatch, "--output", "out") == 130
    path = Path("out/checkpoint.pt")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda member: member.file_size))
    middle = content.index(largest) + len(largest) // 2
    path.write_bytes({
        "cut": content[:-100],
        "changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
        "other": b"PK of something else",
    }[damage])  # fmt: skip
    assert train(npz, *FOUR_TASKS, "--output", "out", "--resume") == 2
    refused(capsys, ["checkpoint", "out/checkpoint.pt", "damaged"])


def test_damaged_metrics(npz, capsys):
    Path("out").mkdir()
    Path("out/metrics.json").write_text('{"completed": true}')
    assert train(npz, "--output", "out", "--resume") == 2
    refused(capsys, ["metrics", "out/metrics.json"])


def test_a_run_with_other_options_keeps_the_earlier_one(npz, capsys):
    assert train(npz, "--quiet") == 0
    folder = Path("runs/small-class-engram-seed0")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert train(npz, "--quiet", "--rate", "0.5") == 0
    other = Path(f"{folder}-2")
    assert f"{folder} holds a run with other options, or one in progress: this one goes to {other}" in (
        capsys.readouterr().out
    )
    assert read(other / "metrics.json")["config"]["rate"] == 0.5
    assert train(npz, "--quiet", "--rate", "0.5", "--output", str(folder)) == 2
    refused(capsys, ["rate: expected", "got 0.5", "another --output", str(folder)])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert train(npz, "--quiet", "--rate", "0.5") == 0, "the same options again write over their own"
    assert sorted(os.listdir("runs")) == [folder.name, other.name]


def test_a_folder_in_use_is_left_to_its_user(npz, capsys):
    """One that was named is refused, another one gets a number."""
    folder = Path("runs/small-class-engram-seed0")
    folder.mkdir(parents=True)
    with FolderLock(folder) as lock:
        assert lock.acquire()
        assert train(npz, "--quiet", "--output", str(folder)) == 2
        refused(capsys, ["output", f"{folder} is in use by another run"])
        assert train(npz, "--quiet") == 0
    assert os.listdir(folder) == []
    assert read(f"{folder}-2/metrics.json")["completed"]
    Path("out").mkdir()
    with FolderLock(Path("out")) as lock:
        assert lock.acquire()
        assert compare(npz, "--methods", "bnn", "--output", "out") == 2
        refused(capsys, ["output", "out is in use by another run"])
    assert os.listdir("out") == []


@pytest.mark.skipif(os.name != "posix", reason="POSIX limits")
def test_a_full_disk_names_the_file(npz, capsys):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for options, file in (([], "checkpoint.pt"), (["--classes-per-task", "4"], "metrics.json")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            assert train(npz, "--quiet", "--output", "out", *options) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        refused(capsys, f"out/{file} can't be written (File too large)")
        assert os.listdir("out") == []


def test_resuming_several_seeds_skips_the_finished(npz, capsys, monkeypatch):
    seeds = ["--seeds", "0", "1", "2"]
    assert interrupted(npz, monkeypatch, "--output", "out", *seeds, step=64 + 40) == 130
    first = Path("out/seed0/metrics.json").read_bytes()
    capsys.readouterr()
    assert train(npz, *FOUR_TASKS, "--output", "out", "--resume", *seeds) == 0
    printed = capsys.readouterr().out
    for piece in ("out/seed0 is complete", "resuming out/seed1 after task 2 of 4", "nothing to resume in out/seed2"):
        assert piece in printed
    assert Path("out/seed0/metrics.json").read_bytes() == first
    assert train(npz, *FOUR_TASKS, "--output", "whole", *seeds) == 0
    values = [read(f"{folder}/summary.json")["average_accuracy"] for folder in ("out", "whole")]
    assert values[0] == values[1]


def compare(npz, *options):
    """Run in this process; the runs are processes of their own."""
    return cli.main(["compare", "--dataset", npz, "--hidden", "32", "--epochs", "2", "--threads", "1", *options])


def test_compare_runs_methods_and_shows_them_on_one_page(npz, capsys):
    Path("gzip.py").write_text("open('EXECUTED', 'w'); raise ImportError('not the standard gzip')")
    methods = ["--methods", "few=engram --readout dendritic --segments 3", "wild=bnn --lr 1e38"]
    assert compare(npz, *methods, "--seeds", "0", "3", "--output", "out") == 1
    printed = capsys.readouterr()
    for piece in ("wild, seed 0: failed", "few, seed 3: 2 of 2 tasks", "few, seed 0: complete"):
        assert piece in printed.err
    for piece in ("accuracy in %", "out/report.html", "out/compare.json"):
        assert piece in printed.out
    content = read("out/compare.json")
    assert [method["label"] for method in content["methods"]] == ["few", "wild"]
    assert content["methods"][0]["config"]["segments"] == 3
    assert content["command"].startswith("engram-kernels compare --dataset small.npz")
    alone = read("out/few/seed3/metrics.json")
    assert content["methods"][0]["runs"][1]["metrics"] == alone
    assert alone["config"]["readout"] == "dendritic"
    assert alone["threads"] == 1
    assert not Path("EXECUTED").exists(), "a file of the current folder is no module of a run"
    page = Path("out/report.html").read_text()
    for piece in ("few", "wild", f"{100 * content['methods'][0]['summary']['average_accuracy']['mean']:.1f}"):
        assert piece in page

    # again, without what can't succeed: nothing is left to run
    assert compare(npz, *methods[:-1], "--seeds", "0", "3", "--output", "out", "--quiet") == 0
    assert read("out/few/seed3/metrics.json")["train_seconds"] == alone["train_seconds"]
    assert capsys.readouterr().err == ""


def test_an_interrupted_comparison_goes_on(npz, capsys):
    """For real: a process with two runs in progress, and a SIGINT to it alone."""
    options = [
        "compare", "--methods", "mbnn", "bnn", "--dataset", npz, "--hidden", "32", "--epochs", "2", "--batch-size", "4",
        "--scenario", "permuted", "--tasks", "16", "--jobs", "2", "--output", "out",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "engram_kernels.cli", *options],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        heard = set()
        for line in process.stderr:
            if " of 16 tasks" in line:
                heard.add(line.split(",")[0])
            if len(heard) == 2:
                break
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    for label in ("mbnn", "bnn"):
        assert f"{label}, seed 0: interrupted" in error
        assert (Path("out") / label / "seed0" / "checkpoint.pt").exists()
    assert "was interrupted after" in Path("out/report.html").read_text()
    assert cli.main(options) == 0
    assert "mbnn, seed 0: complete in" in capsys.readouterr().err
    before = {label: read(f"out/{label}/seed0/metrics.json") for label in ("mbnn", "bnn")}
    whole = [*options[4:-4], "--method", "mbnn", "--threads", "1", "--output", "whole"]
    assert cli.main(["train", *whole]) == 0
    assert read("whole/metrics.json")["accuracy_matrix"] == before["mbnn"]["accuracy_matrix"]
    assert before["bnn"]["threads"] == 1


def children_of(process):
    return [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def running(number):
    """Whether a process is there and not only its exit code."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_a_comparison_that_is_killed_takes_its_runs_along(npz):
    """For real: SIGKILL to the one process that was started by hand."""
    process = subprocess.Popen(
        [sys.executable, "-m", "engram_kernels.cli", "compare", "--methods", "bnn", "--dataset", npz, "--hidden", "32",
         "--batch-size", "2", "--epochs", "1", "--scenario", "permuted", "--tasks", "500", "--evaluation", "new",
         "--output", "out"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        for line in process.stderr:
            if " of 500 tasks" in line:
                break
        children = children_of(process)
        assert len(children) == 1 and running(*children)
    finally:
        process.kill()
        process.wait()
    until = time.monotonic() + 20
    while any(map(running, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(running, children))
    with FolderLock(Path("out")) as lock:
        assert lock.acquire()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--methods", "engram", "engram"], ["methods", "'engram' twice"]),
        (["--methods", "a=bnn", "a=mbnn"], ["methods", "'a' twice"]),
        (["--methods", "engram --rate 'x"], ["methods", "as in a shell"]),
        (["--methods", "bnn", "e=engram --rate 7"], ["rate", "7.0", "method 'e'"]),
        (["--methods", "bnn", "mbnn", "--rate", "0.5"], ["rate", "method 'bnn'"]),
        (["--jobs", "0"], ["jobs", "got 0"]),
        (["--seeds", "1", "1"], ["seeds", "1 1"]),
        (["--dataset", "missing.npz"], ["missing.npz", "does not exist"]),
    ],
)
def test_bad_comparisons_are_refused_before_the_first_run(npz, capsys, options, wanted):
    assert compare(npz, *options) == 2
    refused(capsys, wanted)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("fly", "fly"),
        ("bnn --wings 2", "--wings"),
        ("bnn --seed 2", "--seed"),
        ("bnn --output x", "--output"),
        ("", "method"),
    ],
)
def test_bad_methods_of_a_comparison(npz, capsys, method, wanted):
    with pytest.raises(SystemExit) as caught:
        compare(npz, "--methods", method)
    assert caught.value.code == 2
    refused(capsys, wanted)


def test_options_of_a_comparison_reach_every_run_as_they_are():
    """All kinds that argparse has: values, lists, flags, flags with a negative; own ones win."""
    common = [
        "--hidden", "5", "6", "--shuffle-classes", "--no-balanced", "--ste-window", "inf", "--lr", "1e-05", "0.3",
        "--weight-decay", "1e-07", "--train-hidden", "--state-dtype", "int8", "--threads", "3", "--save-model",
    ]  # fmt: skip
    own = ["--hidden", "7", "--balanced", "--ste-window", "2.5"]
    options = cli.build_parser().parse_args(["compare", *common, "--methods", f"x=engram {' '.join(own)}"])
    plan = cli.compare.plans_of(options)["x"]
    run = ["train", *plan.arguments, "--threads", str(plan.threads), "--seed", "0"]
    wanted, got = (
        vars(cli.build_parser().parse_args(a)) for a in (["train", *common, *own, "--method", "engram"], run)
    )
    assert got == wanted


def test_info(capsys, monkeypatch):
    monkeypatch.setenv("ENGRAM_SOMETHING", "1")
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    names = ("engram-kernels", "python", "numpy", "triton", "instruction set", "in use", "threads", "cuda")
    for piece in (*names, torch.__version__, "ENGRAM_SOMETHING"):
        assert piece in printed


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["compare", "--help"], ["info", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    assert "usage: engram-kernels" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"engram-kernels {ek.__version__}\n"


COMMAND = [sys.executable, "-m", "engram_kernels.cli", "train", "--hidden", "32", "--epochs", "1", "--threads", "1"]


def in_surroundings(redirections="", variables=(), dataset="日本.npz"):
    """A shell's ``engram-kernels train`` of two seeds; what it printed is what comes out of its pipes."""
    write_npz(dataset)
    arguments = [*COMMAND, "--dataset", dataset, "--seeds", "0", "1", "--output", "out"]
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirections}', "bash", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(ek.__file__).parents[1])} | dict(variables),
        capture_output=True,
        timeout=120,
    )


def learned():
    return [read(f"out/seed{seed}/metrics.json")["completed"] for seed in (0, 1)] == [True, True]


@pytest.mark.skipif(os.name != "posix", reason="POSIX shells and locales")
@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}, r"\u65e5\u672c"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "日本"),
    ],
    ids=["ascii and Jupyter", "C locale"],
)
def test_encodings_and_locales_stop_nothing(npz, variables, name):
    result = in_surroundings(variables=variables)
    assert result.returncode == 0, result.stderr
    assert learned()
    assert f"{name}: 80 training and 40 test samples" in result.stdout.decode()
    assert b"warning" not in result.stderr
    assert Path("out/seed1/report.png").exists() == can_draw()


@pytest.mark.skipif(os.name != "posix", reason="POSIX shells")
def test_a_reader_that_has_gone_stops_nothing(npz):
    result = in_surroundings("--quiet | head -1; exit ${PIPESTATUS[0]}")
    assert (result.returncode, result.stderr) == (0, b"")
    assert len(result.stdout.splitlines()) == 1
    assert learned()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_standard_output_that_is_full_is_told_and_stops_nothing(npz, capsys, monkeypatch):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert train(npz, "--quiet", "--seeds", "0", "1", "--output", "out") == 2
    refused(capsys, "standard output can't be written (No space left on device)")
    assert learned()


@pytest.mark.parametrize("missing", [["stderr"], ["stdout"], ["stdout", "stderr"]])
def test_without_standard_streams_a_run_is_a_run(npz, monkeypatch, missing):
    for name in missing:
        monkeypatch.setattr(sys, name, None)
    assert train(npz, "--output", "out") == 0
    assert read("out/metrics.json")["completed"]
    assert train(npz, "--output", "out", "--rate", "7") == 2


@pytest.mark.parametrize("width", [36, 50, 80])
def test_tables_fit_narrow_terminals(npz, capsys, monkeypatch, width):
    monkeypatch.setattr("engram_kernels.cli.train.terminal_width", lambda stream: width)
    assert train(npz, "--scenario", "permuted", "--tasks", "12", "--epochs", "1", "--quiet", "--output", "out") == 0
    _, table, summary, _ = capsys.readouterr().out.split("\n\n")
    lines = [line for line in (table + "\n" + summary).splitlines() if not line.startswith("wrote ")]
    assert len(lines) > 10
    assert max(map(len, lines)) <= width


def test_importing_the_command_loads_no_optional_package():
    code = (
        "import sys, torch; before = set(sys.modules);"  # torch itself may import tqdm
        "import engram_kernels.cli, engram_kernels.continual;"
        "print([name for name in ('matplotlib', 'sklearn', 'tqdm') if name in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

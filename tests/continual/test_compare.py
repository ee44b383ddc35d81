"""Side by side: every run its own process, what fails stops nothing, what is complete stays."""

import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque

import pytest

from engram_kernels.continual import compare, report
from engram_kernels.continual.checkpoint import Checkpoint
from engram_kernels.continual.training import TrainingResult

# In place of engram-kernels train: quick, and it does what its label says.
STAND_IN = """
import json, os, pathlib, signal, sys, time

arguments = sys.argv[1:]
folder = pathlib.Path(arguments[arguments.index("--output") + 1])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "calls", "a") as calls:
    calls.write(" ".join(arguments) + "\\n")
what = folder.parent.name

def say(line):
    print(line, file=sys.stderr, flush=True)

def report(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)

def learned(tasks):
    report("step", task=tasks - 1, loss=None, accuracy=None, count=5)
    report("learned", task=tasks - 1, accuracies=[0.8, 0.8])

report("begin", tasks=2, steps=10)

def write(completed):
    metrics = json.loads(pathlib.Path(os.environ["METRICS"]).read_text())
    metrics["config"] = {"method": what, "seed": int(arguments[arguments.index("--seed") + 1])}
    metrics["completed"] = completed
    (folder / "metrics.json").write_text(json.dumps(metrics))

if what.startswith("stop"):
    try:
        learned(1)  # from here on it may be interrupted
        time.sleep(60)
    except KeyboardInterrupt:
        if what == "stop-deaf":
            time.sleep(60)
        write(False)
        sys.exit(130)
learned(1)
if what == "error":
    say("a warning: error: of no weight")
    report("failed", message="loss: expected a finite number, got nan")
    say("engram-kernels: error: loss: expected a finite number, got nan")
    sys.exit(2)
if what == "crash":
    say("Traceback (most recent call last):")
    raise RuntimeError("at the end")
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "silent":
    sys.exit(3)
if what == "liar":
    sys.exit(0)
if what.startswith("meet"):  # succeeds only beside another
    until = time.monotonic() + 20
    while sum((other / "seed0" / "calls").exists() for other in folder.parent.parent.glob("meet*")) < 2:
        if time.monotonic() > until:
            sys.exit("alone")
        time.sleep(0.01)
learned(2)
write(True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Run compare with the stand-in for train."""
    script, metrics = tmp_path / "train.py", tmp_path / "template.json"
    script.write_text(STAND_IN)
    result = TrainingResult([[0.9, 0.0], [0.7, 0.9]], True, 2, 10, 1.5, 2**20, 2**28, 3.0)
    metrics.write_text(json.dumps(report.metrics_of(result, {})))
    monkeypatch.setattr(compare, "_TRAIN", (sys.executable, str(script)))
    monkeypatch.setenv("METRICS", str(metrics))


def runs_of(folder, *labels, seeds=(0,), threads=None):
    return [
        compare.Run(
            label, seed, folder / label / f"seed{seed}", ["--method", label], {"method": label, "seed": seed}, threads
        )
        for label in labels
        for seed in seeds
    ]


def run_all(runs, jobs=1, display=None):
    stream, changes = io.StringIO(), []
    done = compare.run_all(runs, jobs, display or compare.Display(stream), lambda: changes.append(1))
    return done, stream.getvalue(), len(changes)


def calls(run):
    path = run.folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_every_run_is_made_and_shown(tmp_path, stand_in):
    runs = runs_of(tmp_path, "a", "b", seeds=(0, 1))
    done, shown, changes = run_all(runs)
    assert done
    assert changes == 4
    assert [run.status for run in runs] == ["complete"] * 4
    assert calls(runs[1]) == [f"--method a --seed 1 --output {runs[1].folder}"]
    for piece in (
        "a, seed 0: 1 of 2 tasks, 80.0% on them; 0 s, 0 s remain",
        "b, seed 1: complete in",
        "accuracy 80.0%",
    ):
        assert piece in shown


@pytest.mark.parametrize(
    ("label", "error"),
    [
        ("error", "loss: expected a finite number, got nan"),
        ("crash", "RuntimeError: at the end"),
        ("killed", "killed by SIGKILL"),
        ("silent", "it gave no reason"),
    ],
)
def test_a_failing_run_stops_no_other(tmp_path, stand_in, label, error):
    runs = runs_of(tmp_path, label, "fine")
    done, shown, _ = run_all(runs)
    assert done
    assert [run.status for run in runs] == ["failed", "complete"]
    assert runs[0].error == error
    assert f"{label}, seed 0: failed: {error}" in shown
    (failed, fine) = compare.content_of(runs, {})["methods"]
    assert failed["runs"][0]["error"] == error
    assert failed["summary"]["average_accuracy"]["mean"] is None
    assert fine["summary"]["average_accuracy"]["mean"] == pytest.approx(0.8)
    assert ("Traceback" in failed["runs"][0]["output"]) == (label == "crash")


def test_what_was_there_before_is_not_taken_for_the_result_of_a_run(tmp_path, stand_in):
    """Of a process that says it is done and wrote nothing, where a run with other options lies."""
    run_all(runs_of(tmp_path, "fine"))
    shutil.copytree(tmp_path / "fine", tmp_path / "liar")
    (run,) = runs_of(tmp_path, "liar")
    run_all([run])
    assert run.status == "failed"
    assert "method: expected fine" in run.error
    assert run.metrics is None


def test_a_program_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_TRAIN", (str(tmp_path / "missing"),))
    (run,) = runs_of(tmp_path, "a")
    with pytest.raises(FileNotFoundError):
        run_all([run])


def test_jobs_run_side_by_side(tmp_path, stand_in):
    runs = runs_of(tmp_path, "meet1", "meet2")
    run_all(runs, jobs=2)
    assert [run.status for run in runs] == ["complete", "complete"]


def test_what_is_complete_is_not_run_again(tmp_path, stand_in):
    run_all(runs_of(tmp_path, "a", "error", threads=1))
    runs = runs_of(tmp_path, "a", "error", "b")
    _, shown, changes = run_all(runs)
    assert changes == 2
    assert [len(calls(run)) for run in runs] == [1, 2, 1]
    assert [run.kept for run in runs] == [True, False, False]
    assert "a, seed 0: complete from before, average accuracy 80.0%" in shown


def test_with_other_options_or_damaged_it_is_run_again(tmp_path, stand_in):
    run_all(runs_of(tmp_path, "a"))
    (run,) = runs_of(tmp_path, "a")
    run.config["epochs"] = 5
    run.keep()
    assert run.status == "waiting"
    (run,) = runs_of(tmp_path, "a", threads=1234)
    run.keep()
    assert run.status == "waiting"
    (run,) = runs_of(tmp_path, "a")
    (run.folder / "metrics.json").write_text("{")
    run_all([run])
    assert len(calls(run)) == 2
    assert run.status == "complete"


@pytest.mark.parametrize("left", ["same", "other", "damaged"])
def test_what_was_interrupted_goes_on_if_its_options_are_the_same(tmp_path, stand_in, left):
    (run,) = runs_of(tmp_path, "a")
    run.folder.mkdir(parents=True)
    checkpoint = Checkpoint(run.folder, {**run.config, **({"epochs": 3} if left == "other" else {})})
    checkpoint.save({"tasks_completed": 1})
    if left == "damaged":
        checkpoint.path.write_bytes(b"")
    run_all([run])
    assert ("--resume" in calls(run)[0]) == (left == "same")


class Interrupter(compare.Display):
    """Ctrl-C, as often as asked, once all that is to run has said something."""

    def __init__(self, times=1, running=1):
        super().__init__(io.StringIO())
        self.left, self.wanted = times, running

    def redraw(self, running):
        if self.left and len(running) == self.wanted and all(run.progress.tasks_learned for run in running):
            self.left -= 1
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_is_handed_on_and_starts_nothing_more(tmp_path, stand_in):
    runs = runs_of(tmp_path, "stop1", "stop2", "later")
    done, _, _ = run_all(runs, jobs=2, display=Interrupter(running=2))
    assert not done
    assert [run.status for run in runs] == ["interrupted", "interrupted", "waiting"]
    assert runs[0].metrics["completed"] is False
    assert calls(runs[2]) == []


def test_a_second_interrupt_kills(tmp_path, stand_in):
    runs = runs_of(tmp_path, "stop-deaf")
    begun = time.monotonic()
    done, _, _ = run_all(runs, display=Interrupter(times=2))
    assert not done
    assert runs[0].status == "interrupted"
    assert runs[0].metrics is None
    assert time.monotonic() - begun < 30


def test_without_the_main_thread_it_runs_too(tmp_path, stand_in):
    runs = runs_of(tmp_path, "a")
    thread = threading.Thread(target=run_all, args=(runs,))
    thread.start()
    thread.join(30)
    assert runs[0].status == "complete"


def test_bars_are_drawn_for_what_runs_and_lines_for_what_ended(tmp_path):
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    display = compare.BarDisplay(stream)
    runs = runs_of(tmp_path, "a", "b")
    display.begin(runs)
    for run in runs:
        run.status, run.started = "running", time.monotonic()
    display.redraw(runs)
    assert "starting" in stream.getvalue()
    for line in (
        '{"event": "begin", "tasks": 4, "steps": 40}',
        '{"event": "step", "task": 0, "loss": 0.1, "accuracy": null, "count": 10}',
        '{"event": "learned", "task": 0, "accuracies": [0.5, null, null, null]}',
    ):
        runs[0].report(line)
    display.redraw(runs)
    shown = stream.getvalue()
    for piece in ("a, seed 0:  25%", "10/40", "1 of 4 tasks, 50.0% on them", "runs:   0%", "0/2"):
        assert piece in shown
    runs[0].status, runs[0].error = "failed", "why"
    display.over(runs[0])
    display.redraw(runs[1:])
    ended = stream.getvalue()[len(shown) :]
    assert "a, seed 0: failed: why\n" in ended
    assert "1/2" in ended
    display.end()


@pytest.mark.parametrize("line", ["Traceback", "[1]", '{"event": "fly"}', '{"event": "begin", "tasks": 2}', "task 1/2"])
def test_a_line_that_is_no_report_is_kept_as_text(tmp_path, line):
    (run,) = runs_of(tmp_path, "a")
    assert run.report(line) is None
    assert list(run.output) == [line]
    assert run.progress.tasks == 0


def test_quiet_shows_failures_only(tmp_path, stand_in):
    stream = io.StringIO()
    run_all(runs_of(tmp_path, "a", "error"), display=compare.Display(stream, quiet=True))
    assert stream.getvalue() == "error, seed 0: failed: loss: expected a finite number, got nan\n"


def test_both_files_are_written(tmp_path, stand_in):
    runs = runs_of(tmp_path, "a", seeds=(0, 1))
    run_all(runs)
    about = {"dataset": "d", "seeds": [0, 1], "jobs": 1, "facts": [], "command": "c", "created": "now"}
    content = compare.content_of(runs, {**about, "processor": "p"})
    paths = compare.write(tmp_path, content)
    assert [path.name for path in paths] == ["report.html", "compare.json"]
    assert json.loads(paths[1].read_text()) == content
    assert content["methods"][0]["runs"][1]["metrics"]["config"]["seed"] == 1
    assert content["environment"]["processor"] == "p"
    assert "torch" in content["environment"]
    table = compare.table(content)
    assert "80.0 ± 0.0" in table
    assert "1.50" in table


def test_folders_have_names_that_file_systems_take():
    names = compare.folder_names(["engram", "Engram", "a/b: c", "../..", "", "数", "x" * 300])
    assert names[:3] == ["engram", "engram-2", "a-b-c"]
    assert len(set(names)) == len(names)
    assert all(name and "/" not in name and not name.startswith(".") and len(name) < 80 for name in names)


def test_only_the_last_lines_are_kept(tmp_path):
    (run,) = runs_of(tmp_path, "a")
    assert isinstance(run.output, deque)
    assert run.output.maxlen == 20

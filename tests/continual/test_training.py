"""The loop: deterministic, interruptible, and it stops where numbers do."""

import io
import math

import pytest
import torch
from torch import nn

from engram_kernels.continual.data import Dataset
from engram_kernels.continual.memory import MemoryMeter
from engram_kernels.continual.methods import METHODS, BinaryConfig, GradientConfig, Method, build
from engram_kernels.continual.progress import BarProgress, LineProgress, NoProgress, RunningMean
from engram_kernels.continual.scenarios import SCENARIOS, Experience, class_scenario, make_scenario
from engram_kernels.continual.training import TrainingError, evaluate, run, train

OF_EACH_KIND = ("engram", "ewc", "joint", "classifier")  # in every scenario; the others, by default, in one


def clusters(classes=4, features=25, train=160, test=60, spread=0.3):
    """Well separated classes: whatever learns at all gets them right."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, features, generator=generator)

    def part(samples):
        y = torch.arange(samples) % classes
        return centres[y] + spread * torch.randn(samples, features, generator=generator), y

    side = math.isqrt(features)
    return Dataset("clusters", *part(train), *part(test), classes=tuple(range(classes)), sample_shape=(side, side))


def linear_method(dataset, lr=0.05, epochs=2, **config):
    """A plain float model: the loop must not care."""
    torch.manual_seed(0)
    model = nn.Linear(dataset.features, dataset.num_classes)
    config = GradientConfig(lr=lr, batch_size=10, epochs=epochs, **config)
    return Method(config, model, torch.optim.Adam(model.parameters(), lr=lr))


class StopAfter(NoProgress):
    """Ctrl-C at a given step."""

    def __init__(self, steps):
        self.steps, self.heard = steps, []

    def step(self, task, loss, accuracy):
        self.steps -= 1
        if self.steps == 0:
            raise KeyboardInterrupt

    def interrupted(self):
        self.heard.append("interrupted")

    def end(self):
        self.heard.append("end")


def equal(a, b):
    """The states of two models, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("scenario", "method"),
    [
        pytest.param(scenario, method, marks=[] if method in OF_EACH_KIND or scenario == "class" else pytest.mark.slow)
        for scenario in SCENARIOS
        for method in METHODS
    ],
)
def test_a_run_learns_and_is_reproducible(method, scenario):
    options = {
        "scenario": scenario, "method": method, "hidden": (96, 64), "epochs": 5, "batch_size": 10, "loss": "all",
        "lr": 0.005, **({} if scenario == "domain" else {"tasks": 2}),
    }  # fmt: skip
    if isinstance(METHODS[method].config, BinaryConfig):
        options["train_hidden"] = True
    if not isinstance(METHODS[method].config, GradientConfig):
        del options["lr"], options["loss"]
    data = [clusters(), clusters(spread=0.4)] if scenario == "domain" else clusters()
    (model, first), (same_model, again), (other_model, _) = (run(data, seed=seed, **options) for seed in (3, 3, 4))
    assert first.completed
    assert first.tasks_completed == 2
    assert first.accuracy_matrix[0][0] > (0.7 if scenario == "class" else 0.45)
    assert first.accuracy_matrix == again.accuracy_matrix
    tasks_trained_on = 1 + 2 if method == "joint" else 2
    passes = 1 if method == "classifier" else 5
    assert first.steps == tasks_trained_on * passes * (80 if scenario == "class" else 160) / 10
    assert first.step_milliseconds > 0
    weights, same, other = (m.model.state_dict() for m in (model, same_model, other_model))
    assert equal(weights, same)
    assert not equal(weights, other)


def test_the_matrix_is_the_accuracy_after_each_task():
    """Against a separate evaluation of the model at those times."""
    dataset = clusters()
    scenario = class_scenario(dataset)
    method = linear_method(dataset)
    rows = []

    class Check(NoProgress):
        def learned(self, task, accuracies):
            rows.append([])
            for experience in scenario.test_stream:
                x, y = next(experience.batches(len(experience)))
                rows[-1].append(float((method.model(x).argmax(1) == y).double().mean()))

    result = train(scenario, method, progress=Check())
    assert result.accuracy_matrix == [pytest.approx(row) for row in rows]
    assert result.accuracy_matrix[0][0] == 1.0


@pytest.mark.parametrize(
    ("evaluation", "filled"),
    [("all", [[1, 1, 1], [1, 1, 1], [1, 1, 1]]), ("seen", [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
     ("new", [[1, 0, 0], [0, 1, 0], [1, 1, 1]])],
)  # fmt: skip
def test_long_streams_need_not_be_evaluated_on_everything(evaluation, filled):
    scenario = make_scenario("permuted", clusters(), tasks=3)
    matrices = [train(scenario, linear_method(clusters()), evaluation=e).accuracy_matrix for e in ("all", evaluation)]
    for whole, part, wanted in zip(*matrices, filled, strict=True):
        assert part == [value if f else None for value, f in zip(whole, wanted, strict=True)]


def test_an_interrupted_stream_is_evaluated_on_all_that_it_saw():
    scenario = make_scenario("permuted", clusters(), tasks=3)
    result = train(scenario, linear_method(clusters()), evaluation="new", progress=StopAfter(40))
    assert [value is not None for value in result.accuracy_matrix[1]] == [True, True, False]


def test_unknown_evaluation():
    with pytest.raises(ValueError, match="evaluation: expected one of all, seen, new, got 'none'"):
        train(class_scenario(clusters()), linear_method(clusters()), evaluation="none")


def test_evaluation_does_not_depend_on_the_batch_size_and_leaves_the_model_alone():
    """Nor on the company a sample is in: no statistics over the test batch."""
    torch.manual_seed(0)
    dataset = clusters()
    method = build("engram", METHODS["engram"].config, dataset.features, (64, 48), dataset.num_classes)
    train(class_scenario(dataset), method)
    before = {key: value.clone() for key, value in method.model.state_dict().items()}
    whole = Experience(dataset.x_test, dataset.y_test, (0, 1, 2, 3))
    assert len({evaluate(method.model, whole, batch_size) for batch_size in (1, 7, 60, 500)}) == 1
    after = method.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not method.model.training


@pytest.mark.parametrize("stop", [1, 10, 16, 17, 25])
def test_an_interrupt_returns_what_was_learned_so_far(stop):
    """Two tasks of 16 steps each."""
    dataset = clusters()
    progress = StopAfter(stop)
    result = train(class_scenario(dataset), linear_method(dataset), progress=progress)
    assert not result.completed
    assert result.steps == stop
    assert result.tasks_completed == (stop > 16)
    rows_filled = [all(value is not None for value in row) for row in result.accuracy_matrix]
    assert rows_filled == [True, stop > 16]
    assert progress.heard == ["interrupted", "end"]


def test_a_second_interrupt_skips_the_evaluation():
    dataset = clusters()
    method = linear_method(dataset)

    class Impatient(StopAfter):
        def interrupted(self):
            def stop(*_):
                raise KeyboardInterrupt

            method.model.register_forward_pre_hook(stop)

    result = train(class_scenario(dataset), method, progress=Impatient(20))
    assert not result.completed
    assert result.tasks_completed == 1
    assert result.accuracy_matrix[1] == [None, None]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_training_before_the_update(bad):
    dataset = clusters()
    method = linear_method(dataset)
    with torch.no_grad():
        method.model.bias[0] = bad
    weight = method.model.weight.detach().clone()
    with pytest.raises(TrainingError, match="loss: expected a finite number, got nan in task 1, epoch 1"):
        train(class_scenario(dataset), method)
    assert torch.equal(method.model.weight, weight)


def test_a_nan_that_the_loss_does_not_see_is_found():
    """As in a hidden weight, whose sign is a number all the same."""
    dataset = clusters()
    method = linear_method(dataset)
    method.model.register_parameter("hidden_weight", nn.Parameter(torch.tensor([1.0, math.nan])))
    with pytest.raises(TrainingError, match=r"hidden_weight: expected finite weights, .* after task 1, epoch 1"):
        train(class_scenario(dataset), method)


def test_a_nan_that_an_operator_refuses_is_a_training_error():
    dataset = clusters()
    method = build("engram", METHODS["engram"].config, dataset.features, [16], dataset.num_classes)
    method.model.readout.weight.data[0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"NaN.* in task 1, epoch 1; a lower lr may help"):
        train(class_scenario(dataset), method)


def test_bad_options_are_refused_before_training():
    class Untouched(NoProgress):
        def begin(self, tasks, steps):
            raise AssertionError("training began")

    for options in (
        {"rate": 2.0}, {"scenario": "none"}, {"hidden": ()}, {"tasks": 9}, {"seed": -1}, {"scenario": "domain"},
        {"max_degrees": 9.0}, {"samples_per_task": 9},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            run(clusters(), progress=Untouched(), **options)


def test_options_reach_the_scenario():
    options = {"hidden": [8], "epochs": 1, "batch_size": 10, "seed": 1}
    _, whole = run(clusters(), scenario="rotated", tasks=2, **options)
    _, capped = run(clusters(), scenario="rotated", tasks=3, max_degrees=90.0, samples_per_task=20, **options)
    assert (whole.steps, capped.steps) == (2 * 16, 3 * 2)
    with pytest.raises(ValueError, match="max_degrees: .* got 400"):
        run(clusters(), scenario="rotated", max_degrees=400.0, **options)


def test_memory_grows_with_what_is_kept():
    meter = MemoryMeter()
    if meter.peak_total() is None:
        pytest.skip("this system does not tell a process its memory")
    before = meter.peak_above_start()
    kept = torch.ones(16 * 2**20)  # 64 MiB
    assert meter.peak_above_start() - before > 0.9 * kept.nbytes or meter.peak_above_start() > 0.9 * kept.nbytes
    assert meter.peak_total() >= meter.peak_above_start()


def test_a_peak_before_the_meter_does_not_count():
    """Linux only: elsewhere the earlier peak can't be told apart."""
    before = torch.ones(32 * 2**20)  # 128 MiB
    size = before.nbytes
    del before
    meter = MemoryMeter()
    if not meter.can_reset:
        pytest.skip("this system does not let a process reset its peak")
    assert meter.peak_above_start() < size / 2
    assert meter.peak_total() > size


@pytest.mark.parametrize("kind", [LineProgress, BarProgress])
def test_progress_without_a_terminal_does_not_flood(kind):
    if kind is BarProgress:
        pytest.importorskip("tqdm")
    stream = io.StringIO()
    scenario = make_scenario("permuted", clusters(), tasks=3)
    train(scenario, linear_method(clusters(), epochs=5), progress=kind(stream))
    text = stream.getvalue()
    lines = [line for line in text.splitlines() if "learned" in line]
    assert len(lines) == 3
    assert "task 3/3" in lines[2]
    assert len(text) < 20_000
    if kind is LineProgress:
        assert len(text.splitlines()) == 3


def test_the_bar_shows_task_accuracy_and_remaining_time():
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    bar = BarProgress(stream)
    bar.begin(2, 10)
    for _ in range(4):
        bar.step(1, 0.5, 0.75)
    bar._bar.refresh()
    bar.end()
    shown = stream.getvalue()
    for piece in ("task 2/2", "accuracy 75.0%", "loss 0.500", "4/10", "<"):
        assert piece in shown


def test_running_mean_follows_and_starts_anew_with_a_task():
    mean = RunningMean()
    for value in (0.0, 1.0):
        mean.add(0, value)
    assert mean.value == pytest.approx(0.5, abs=0.01)
    for _ in range(500):
        mean.add(0, 1.0)
    assert mean.value == pytest.approx(1.0, abs=0.001)
    mean.add(1, 0.25)
    assert mean.value == 0.25

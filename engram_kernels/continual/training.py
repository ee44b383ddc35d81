"""The training loop: one experience after another, evaluated on every task after each."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .data import Dataset, joined_name
from .memory import MemoryMeter
from .methods import Method, TrainingError, build, method_config
from .progress import NoProgress, Progress
from .scenarios import Samples, Scenario, make_scenario, seeded_generator

EVALUATION_BATCH = 500
EVALUATIONS = ("all", "seen", "new")


class Predictor(Protocol):
    """All that evaluation may use of a model: inputs to scores. There is no room here for a task label."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Float32 (B, features) -> scores (B, classes)."""
        ...


@dataclass
class TrainingResult:
    """What a run leaves behind.

    Attributes:
        accuracy_matrix: T rows of T values, ``[i][j]`` the accuracy (0 to 1) on task j after learning task i;
            rows never reached hold None.
        completed: False if the run was interrupted. The last filled row is then that of a task learned in
            part.
        tasks_completed: tasks learned to their end.
        steps: optimizer steps taken.
        step_milliseconds: median time of forward, loss, backward and update of one step; nan without steps.
        peak_memory_bytes: peak resident memory above that at the start of training (model, optimizer state
            and activations; not the interpreter, torch and the data). None where the system does not tell.
        total_memory_bytes: peak resident memory of the whole process so far; None as above.
        train_seconds: of the whole run, evaluation included.
    """

    accuracy_matrix: list[list[float | None]]
    completed: bool = False
    tasks_completed: int = 0
    steps: int = 0
    step_milliseconds: float = math.nan
    peak_memory_bytes: int | None = None
    total_memory_bytes: int | None = None
    train_seconds: float = 0.0


def evaluate(predict: Predictor, experience: Samples, batch_size: int = EVALUATION_BATCH) -> float:
    """Accuracy of ``predict`` on an experience, from 0 to 1, in minibatches and without gradients.

    ``predict`` is given the inputs and nothing else: neither labels nor which task they are from.
    """
    correct = 0
    with torch.no_grad():
        for x, y in experience.batches(batch_size):
            correct += int((predict(x).argmax(dim=1) == y).sum())
    return correct / len(experience)


def train(
    scenario: Scenario,
    method: Method,
    *,
    seed: int = 0,
    evaluation: str = "all",
    progress: Progress | None = None,
    memory: MemoryMeter | None = None,
) -> TrainingResult:
    """Train ``method`` on the train stream; after each experience evaluate it on the test stream.

    The order of the samples comes from ``seed`` alone; engrams are drawn from torch's global generator. A
    KeyboardInterrupt ends training: the half-learned state is evaluated too (a second interrupt skips that)
    and what there is is returned with ``completed`` False.

    Args:
        scenario: the streams.
        method: what to train; its model is left in evaluation mode.
        seed: of the order of the samples.
        evaluation: on which tasks after each: ``all``; ``seen``, those learned so far; ``new``, the one just learned,
            and all at the end, since the time of the others grows with the square of the number of tasks.
        progress: told about steps and results; by default nobody is.
        memory: started before the model was built, to count it too; by default it starts here.

    Raises:
        ValueError: unknown ``evaluation``.
        TrainingError: the loss or a weight became nan or infinite.
    """
    if evaluation not in EVALUATIONS:
        raise ValueError(f"evaluation: expected one of {', '.join(EVALUATIONS)}, got {evaluation!r}")
    progress = NoProgress() if progress is None else progress
    memory = MemoryMeter() if memory is None else memory
    tasks, config = len(scenario), method.config
    result = TrainingResult([[None] * tasks for _ in range(tasks)])
    order = seeded_generator(seed, "sample order")
    step_seconds: list[float] = []
    started = time.perf_counter()
    task = 0

    def evaluate_row(last: bool) -> list[float | None]:
        method.model.eval()
        first = task if evaluation == "new" and not last else 0
        stop = tasks if evaluation == "all" else task + 1
        row: list[float | None] = [None] * tasks
        row[first:stop] = [evaluate(method.model, experience) for experience in scenario.test_stream[first:stop]]
        result.accuracy_matrix[task] = row
        return row

    passes = [-(-samples // config.batch_size) for samples in method.samples_of(scenario.train_stream)]
    total = config.epochs * sum(passes)
    progress.begin(tasks, total)
    try:
        for task, new in enumerate(scenario.train_stream):
            method.model.train()
            experience = method.before_training_exp(new)
            for epoch in range(config.epochs):
                for x, y in experience.batches(config.batch_size, order):
                    begun = time.perf_counter()
                    loss, accuracy = _step(method, x, y, where=f"task {task + 1}, epoch {epoch + 1}")
                    step_seconds.append(time.perf_counter() - begun)
                    progress.step(task, loss, accuracy)
                _check_weights(method, where=f"task {task + 1}, epoch {epoch + 1}")
            method.after_training_exp(experience)
            row = evaluate_row(last=task + 1 == tasks)
            result.tasks_completed = task + 1
            progress.learned(task, row)
        result.completed = True
    except KeyboardInterrupt:
        progress.interrupted()
        try:
            if step_seconds and result.tasks_completed <= task:
                evaluate_row(last=True)
        except KeyboardInterrupt:
            pass
    finally:
        progress.end()
    result.train_seconds = time.perf_counter() - started
    result.steps = len(step_seconds)
    result.step_milliseconds = 1e3 * statistics.median(step_seconds) if step_seconds else math.nan
    result.peak_memory_bytes, result.total_memory_bytes = memory.peak_above_start(), memory.peak_total()
    return result


def run(
    dataset: Dataset | Sequence[Dataset],
    *,
    scenario: str = "class",
    method: str = "engram",
    hidden: Sequence[int] = (2048, 2048),
    seed: int = 0,
    tasks: int | None = None,
    classes_per_task: int | None = None,
    shuffle_classes: bool = False,
    max_degrees: float | None = None,
    samples_per_task: int | None = None,
    evaluation: str = "all",
    progress: Progress | None = None,
    memory: MemoryMeter | None = None,
    **overrides: Any,
) -> tuple[Method, TrainingResult]:
    """Everything from a data set (scenario domain: a list of them) to a result, as ``engram-kernels train`` does it.

    Deterministic under ``seed``. Seeds torch's global generator. Several runs in one process should share
    ``memory``: a later run reuses what an earlier one gave back, and would seem to need less. ``overrides``
    are fields of `methods.MethodConfig`; None keeps the default.

    Raises:
        ValueError: an option out of range (before any training).
        TrainingError: the loss or a weight became nan or infinite.
    """
    datasets = [dataset] if isinstance(dataset, Dataset) else list(dataset)
    config = method_config(method, scenario, joined_name(datasets), **overrides)
    streams = make_scenario(
        scenario,
        datasets,
        tasks=tasks,
        classes_per_task=classes_per_task,
        shuffle_classes=shuffle_classes,
        max_degrees=max_degrees,
        samples_per_task=samples_per_task,
        seed=seed,
    )
    memory = MemoryMeter() if memory is None else memory
    torch.manual_seed(seed)
    learner = build(method, config, streams.features, hidden, streams.num_classes)
    return learner, train(streams, learner, seed=seed, evaluation=evaluation, progress=progress, memory=memory)


def _step(method: Method, x: Tensor, y: Tensor, where: str) -> tuple[float | None, float | None]:
    """One step; the loss and the accuracy on the batch before it."""
    try:
        return method.observe(x, y)
    except RuntimeError as error:
        if not isinstance(error, TrainingError) and "NaN" not in str(error):  # the operators refuse NaN themselves
            raise
        raise TrainingError(f"{str(error).splitlines()[0]} in {where}; a lower lr may help") from None


def _check_weights(method: Method, where: str) -> None:
    """Binarization hides a nan weight from the loss (its sign is a number), so look at the weights."""
    for name, parameter in method.model.named_parameters():
        extremes = torch.aminmax(parameter.detach())  # nan propagates; isfinite would need copies of the weights
        if not (torch.isfinite(extremes.min) and torch.isfinite(extremes.max)):
            raise TrainingError(f"{name}: expected finite weights, got nan or inf after {where}; a lower lr may help")

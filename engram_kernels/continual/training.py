"""The training loop: one experience after another, evaluated on every task after each."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files import reason
from . import processes
from .checkpoint import Checkpoint
from .data import Dataset, joined_name
from .memory import MemoryMeter
from .methods import Method, TrainingError, build, method_config, preset_of, steps_of
from .metrics import average_accuracy
from .progress import NoProgress, Progress
from .scenarios import Samples, Scenario, make_scenario, seeded_generator, task_samples

EVALUATION_BATCH = 128  # so that evaluation takes no more memory than training
EVALUATIONS = ("all", "seen", "new")


class Predictor(Protocol):
    """All that evaluation may use of a model: inputs to scores. There is no room here for a task label."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Float32 (B, features) -> scores (B, classes)."""
        ...


@dataclass
class TrainingResult:
    """The result of a run.

    Attributes:
        accuracy_matrix: T rows of T values, ``[i][j]`` the accuracy (0 to 1) on task j after learning task i;
            rows never reached hold None.
        completed: False if the run was interrupted. The last filled row is then that of a task learned in
            part.
        tasks_completed: tasks learned to their end.
        steps: optimizer steps taken.
        step_milliseconds: median time of forward, loss, backward and update of one step; nan without steps.
        peak_memory_bytes: peak resident memory above that at the start of training (model, optimizer state
            and activations; not the interpreter, torch and the data). None where the system does not provide it.
        total_memory_bytes: peak resident memory of the whole process so far; None as above.
        train_seconds: of the whole run, evaluation included.
        data: all that predicting for new samples needs to know of the data set, see `Scenario.data`.
    """

    accuracy_matrix: list[list[float | None]]
    completed: bool = False
    tasks_completed: int = 0
    steps: int = 0
    step_milliseconds: float = math.nan
    peak_memory_bytes: int | None = None
    total_memory_bytes: int | None = None
    train_seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)


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
    checkpoint: Checkpoint | None = None,
) -> TrainingResult:
    """Train ``method`` on the train stream; after each experience evaluate it on the test stream.

    The processes of torch.distributed's default group, if there is one, share every minibatch and take the steps that
    one process would take, but for the order in which gradients are summed; each calls this with the same arguments.
    The first of them reports progress and writes checkpoints, which all read.

    The order of the samples comes from ``seed`` alone; engrams are drawn from torch's global generator. A
    KeyboardInterrupt ends training: the half-learned state is evaluated too (a second interrupt skips that)
    and the result so far is returned with ``completed`` False.

    Args:
        scenario: the streams.
        method: the one to train; its model is left in evaluation mode.
        seed: of the order of the samples.
        evaluation: on which tasks after each: ``all``; ``seen``, those learned so far; ``new``, the one just learned,
            and all at the end, since the time of the others grows with the square of the number of tasks.
        progress: gets steps and results; by default they are not shown.
        memory: started before the model was built, to count it too; by default it starts here.
        checkpoint: written after every task but the last; training goes on from the loaded state. The accuracies are
            then those of a run without a break, to the last bit.

    Raises:
        ValueError: unknown ``evaluation``, ``fuse_backward`` with several processes, or a checkpoint that can't be gone
            on from.
        TrainingError: the loss or a weight became nan or infinite.
        OSError: the checkpoint can't be written.
    """
    if evaluation not in EVALUATIONS:
        raise ValueError(f"evaluation: expected one of {', '.join(EVALUATIONS)}, got {evaluation!r}")
    if processes.size() > 1 and getattr(method.config, "fuse_backward", False):
        raise ValueError(
            "fuse_backward: expected False with several processes, which average gradients before the update, got True"
        )
    leads = processes.rank() == 0
    progress = NoProgress() if progress is None or not leads else progress
    memory = MemoryMeter() if memory is None else memory
    tasks, config = len(scenario), method.config
    result = TrainingResult([[None] * tasks for _ in range(tasks)], data=scenario.data())
    order = seeded_generator(seed, "sample order")
    step_seconds: list[float] = []
    started = time.perf_counter()
    task = 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        step_seconds = _restore(state, method, result, order, checkpoint)
        del state
        memory.restart()  # for a moment, the loaded state was there twice
    # the loaded state shows at the first step whether it fits
    doubted = checkpoint if result.tasks_completed else None
    earlier_seconds, earlier_peaks = result.train_seconds, (result.peak_memory_bytes, result.total_memory_bytes)

    def evaluate_row(last: bool) -> list[float | None]:
        method.model.eval()
        first = task if evaluation == "new" and not last else 0
        stop = tasks if evaluation == "all" else task + 1
        own = range(first + processes.rank(), stop, processes.size())
        row: list[float | None] = [None] * tasks
        for accuracies in processes.gathered({j: evaluate(method.model, scenario.test_stream[j]) for j in own}):
            for j, accuracy in accuracies.items():
                row[j] = accuracy
        result.accuracy_matrix[task] = row
        return row

    def measure() -> None:
        result.train_seconds = earlier_seconds + time.perf_counter() - started
        result.peak_memory_bytes = _larger(earlier_peaks[0], memory.peak_above_start())
        result.total_memory_bytes = _larger(earlier_peaks[1], memory.peak_total())

    total = config.passes * sum(steps_of(config, samples) for samples in method.samples_of(scenario.train_stream))
    progress.begin(tasks, total)
    if result.tasks_completed:
        progress.resumed(result.tasks_completed, len(step_seconds))
    try:
        for task, new in enumerate(scenario.train_stream):
            if task < result.tasks_completed:
                continue
            method.model.train()
            with _as_damage(doubted):
                experience = method.before_training_exp(new)
                next(experience.batches(config.batch_size))
            for epoch in range(config.passes):
                for x, y in experience.batches(config.batch_size, order):
                    begun = time.perf_counter()
                    with _as_damage(doubted):
                        loss, accuracy = _step(method, x, y, where=f"task {task + 1}, epoch {epoch + 1}")
                    step_seconds.append(time.perf_counter() - begun)
                    doubted = None
                    progress.step(task, loss, accuracy)
                _check_weights(method, where=f"task {task + 1}, epoch {epoch + 1}")
            method.after_training_exp(experience)
            row = evaluate_row(last=task + 1 == tasks)
            result.tasks_completed = task + 1
            if checkpoint is not None and task + 1 < tasks:
                measure()  # before the writing, which is no part of training
                if leads:
                    checkpoint.save(_state(method, result, order, step_seconds))
            progress.learned(task, row)
        result.completed = True
    except KeyboardInterrupt:
        progress.interrupted()
        if processes.size() > 1:  # the others may be elsewhere in the run, and can't be waited for
            raise
        try:
            if step_seconds and result.tasks_completed <= task:
                evaluate_row(last=True)
        except KeyboardInterrupt:
            pass
    finally:
        progress.end()
    measure()
    result.steps = len(step_seconds)
    result.step_milliseconds = 1e3 * statistics.median(step_seconds) if step_seconds else math.nan
    return result


def run(
    dataset: Dataset | Sequence[Dataset],
    *,
    scenario: str = "class",
    method: str = "engram",
    hidden: Sequence[int] = (2048,),
    seed: int = 0,
    tasks: int | None = None,
    classes_per_task: int | None = None,
    shuffle_classes: bool = False,
    max_degrees: float | None = None,
    samples_per_task: int | None = None,
    evaluation: str = "all",
    progress: Progress | None = None,
    memory: MemoryMeter | None = None,
    checkpoint: Checkpoint | None = None,
    **overrides: Any,
) -> tuple[Method, TrainingResult]:
    """Everything from a data set (scenario domain: a list of them) to a result, as ``engram-kernels train`` does it.

    Deterministic under ``seed``, whatever the process's default dtype and device and, for binary methods, the number
    of threads; full-precision methods use torch's products, whose last bits may depend on it. Seeds torch's global
    generator. Several runs in one process should share ``memory``: a later run reuses memory that an earlier one freed,
    and would seem to need less. ``checkpoint`` is that of `train`. ``overrides`` are fields of `methods.MethodConfig`;
    None keeps the default, which for ``epochs`` rises where a task is small (`methods.method_config`).

    Raises:
        ValueError: an option out of range, or a checkpoint that can't be gone on from (before any training).
        TrainingError: the loss or a weight became nan or infinite.
        OSError: the checkpoint can't be written.
    """
    datasets = [dataset] if isinstance(dataset, Dataset) else list(dataset)
    streams = make_scenario(
        scenario,
        datasets,
        tasks=tasks,
        classes_per_task=classes_per_task,
        shuffle_classes=shuffle_classes,
        max_degrees=max_degrees,
        samples_per_task=samples_per_task,
        seed=seed,
        encoded=not preset_of(method).config.takes_features,
    )
    samples = task_samples(scenario, datasets, classes_per_task)
    config = method_config(method, scenario, joined_name(datasets), task_samples=samples, **overrides)
    memory = MemoryMeter() if memory is None else memory
    torch.manual_seed(seed)
    with torch.device("cpu"):  # where the data lie, whatever device the process makes its tensors on by default
        learner = build(method, config, streams.features, hidden, streams.num_classes)
        return learner, train(
            streams, learner, seed=seed, evaluation=evaluation, progress=progress, memory=memory, checkpoint=checkpoint
        )


def _state(method: Method, result: TrainingResult, order: torch.Generator, step_seconds: list[float]) -> dict[str, Any]:
    """The state from which a later process goes on as this one does; all but the tensors is small."""
    return {
        "method": method.state_dict(),
        "data": result.data,
        "tasks_completed": result.tasks_completed,
        "accuracy_matrix": result.accuracy_matrix[: result.tasks_completed],
        "step_seconds": torch.tensor(step_seconds, dtype=torch.float64, device="cpu"),
        "train_seconds": result.train_seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "total_memory_bytes": result.total_memory_bytes,
        "random": torch.get_rng_state(),
        "sample_order": order.get_state(),
    }


def _restore(
    state: dict[str, Any], method: Method, result: TrainingResult, order: torch.Generator, checkpoint: Checkpoint
) -> list[float]:
    """Restores the state from :func:`_state`; returns the times of the steps so far, in seconds."""
    with _as_damage(checkpoint):
        method.load_state_dict(state["method"])
        tasks, rows, tasks_in_all = state["tasks_completed"], state["accuracy_matrix"], len(result.accuracy_matrix)
        if tasks >= tasks_in_all or [len(row) for row in rows] != [tasks_in_all] * tasks:
            raise ValueError(f"accuracy_matrix: expected {tasks} rows of {tasks_in_all} values")
        if any(type(value) not in (float, type(None)) for row in rows for value in row):
            raise TypeError("accuracy_matrix: expected numbers")
        average_accuracy(rows)  # which refuses other numbers
        result.tasks_completed, result.accuracy_matrix[:tasks] = tasks, rows
        result.train_seconds = _kind(state, "train_seconds", float)
        result.peak_memory_bytes = _kind(state, "peak_memory_bytes", int, type(None))
        result.total_memory_bytes = _kind(state, "total_memory_bytes", int, type(None))
        step_seconds = _kind(state, "step_seconds", Tensor)
        if step_seconds.dtype != torch.float64 or step_seconds.dim() != 1:
            raise ValueError(f"step_seconds: expected float64 (steps,), got {step_seconds.dtype}")
        torch.set_rng_state(state["random"])
        order.set_state(state["sample_order"])
    times: list[float] = step_seconds.tolist()
    return times


def _kind(state: dict[str, Any], name: str, *kinds: type) -> Any:
    if type(state[name]) not in kinds:
        raise TypeError(f"{name}: expected {kinds[0].__name__}, got {type(state[name]).__name__}")
    return state[name]


@contextlib.contextmanager
def _as_damage(checkpoint: Checkpoint | None) -> Iterator[None]:
    """What is raised within is the checkpoint's fault, if there is one: it holds other names, kinds or shapes.

    Raises:
        DamagedFileError: instead of any other error.
    """
    try:
        yield
    except (MemoryError, TrainingError):
        raise
    except Exception as error:
        if checkpoint is None or "allocate memory" in str(error):
            raise
        raise checkpoint.damaged(reason(error)) from None


def _larger(earlier: int | None, now: int | None) -> int | None:
    return max((value for value in (earlier, now) if value is not None), default=None)


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

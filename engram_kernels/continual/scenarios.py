"""Continual-learning scenarios: a data set cut into a stream of experiences.

The words are Avalanche's (Lomonaco et al. 2021): an *experience* is what the learner sees at one time, a
*stream* is experiences in order. No experience tells a model which one it is: `Samples.batches` yields
inputs and labels only, and `training.evaluate` hands on the inputs alone.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from .data import Dataset, standardize

SCENARIOS = ("class", "permuted")
DEFAULT_CLASSES_PER_TASK = 2
DEFAULT_PERMUTED_TASKS = 10
MAX_SEED = 2**31 - 1


class Samples(ABC):
    """What training may ask of an experience, or of several joined."""

    classes: tuple[int, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, y)`` of the given samples, x float32 (B, features) standardised per sample, y int64 (B,).

        Shapes: ``rows`` (B,) int64, each from 0 to len(self) - 1.
        """

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Minibatches as from `samples`, each sample once.

        With a ``generator`` in an order drawn from it, else in the order of the data set. The last batch
        holds the remainder.
        """
        order = None if generator is None else torch.randperm(len(self), generator=generator)
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            yield self.samples(torch.arange(start, stop) if order is None else order[start:stop])


@dataclass(frozen=True)
class Experience(Samples):
    """One task's samples, drawn lazily from the data set that all experiences share.

    Shapes: ``x`` (n, features) uint8 or float32 and ``y`` (n,) int64 are the whole data set; ``indices``
    (samples,) int64 selects this experience's rows, None all of them; ``permutation`` (features,) int64
    reorders the input units, None leaves them. ``classes`` are the labels (indices into ``Dataset.classes``)
    that occur in it.

    Permutation and standardisation are done on the minibatch: no task ever has a copy of the data.
    """

    x: Tensor
    y: Tensor
    classes: tuple[int, ...]
    indices: Tensor | None = None
    permutation: Tensor | None = None

    def __len__(self) -> int:
        """Samples in this experience."""
        return self.y.shape[0] if self.indices is None else self.indices.shape[0]

    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Samples.samples`."""
        if self.indices is not None:
            rows = self.indices[rows]
        x = self.x[rows]
        if self.permutation is not None:
            x = x[:, self.permutation]
        return standardize(x), self.y[rows]


@dataclass(frozen=True)
class Joint(Samples):
    """Several experiences as one, without a copy of their data: all data so far (Avalanche's Cumulative).

    Sample ``row`` is that of the experiences laid end to end. ``classes`` are those of all, sorted.

    Raises:
        ValueError: no experience.
    """

    experiences: tuple[Experience, ...]
    classes: tuple[int, ...] = field(init=False)
    _ends: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if not self.experiences:
            raise ValueError("experiences: expected at least one, got none")
        classes = sorted({label for experience in self.experiences for label in experience.classes})
        object.__setattr__(self, "classes", tuple(classes))  # the dataclass is frozen
        object.__setattr__(self, "_ends", torch.tensor([*accumulate(map(len, self.experiences))]))

    def __len__(self) -> int:
        """Samples in all experiences together."""
        return int(self._ends[-1])

    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Samples.samples`."""
        x, y = torch.empty(len(rows), self.experiences[0].x.shape[1]), torch.empty(len(rows), dtype=torch.int64)
        source = torch.bucketize(rows, self._ends, right=True)
        for index in source.unique().tolist():
            mine, experience = source == index, self.experiences[index]
            x[mine], y[mine] = experience.samples(rows[mine] - (self._ends[index] - len(experience)))
        return x, y


@dataclass(frozen=True)
class Scenario:
    """A train stream and a test stream of equal length, experience by experience about the same task."""

    name: str
    dataset: Dataset
    train_stream: tuple[Experience, ...]
    test_stream: tuple[Experience, ...]

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self.train_stream)


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """A random stream of its own for each purpose of a run: drawing more for one never shifts another.

    Raises:
        ValueError: ``seed`` outside [0, 2**31).
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: expected an integer from 0 to {MAX_SEED}, got {seed}")
    # Hashed to 32 bits because torch's CPU generator ignores the bits above.
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def class_scenario(
    dataset: Dataset,
    *,
    classes_per_task: int = DEFAULT_CLASSES_PER_TASK,
    tasks: int | None = None,
    shuffle_classes: bool = False,
    seed: int = 0,
) -> Scenario:
    """Class-incremental learning ("Split"): every task brings new classes, one head serves them all.

    Args:
        dataset: the data to cut.
        classes_per_task: new classes per task; the last task takes what remains.
        tasks: stop after so many tasks; by default all classes are used.
        shuffle_classes: order the classes at random by ``seed`` instead of by label.
        seed: used with ``shuffle_classes`` only.

    Raises:
        ValueError: ``classes_per_task`` outside [1, classes], more ``tasks`` than there are classes for.
    """
    classes = dataset.num_classes
    if not 1 <= classes_per_task <= classes:
        raise ValueError(f"classes_per_task: expected an integer from 1 to {classes}, got {classes_per_task}")
    available = -(-classes // classes_per_task)
    if tasks is None:
        tasks = available
    if not 1 <= tasks <= available:
        raise ValueError(
            f"tasks: expected an integer from 1 to {available} ({classes} classes, {classes_per_task} per "
            f"task), got {tasks}"
        )
    order = torch.arange(classes)
    if shuffle_classes:
        order = torch.randperm(classes, generator=seeded_generator(seed, "class order"))
    groups = [
        tuple(sorted(order[start : start + classes_per_task].tolist()))
        for start in range(0, tasks * classes_per_task, classes_per_task)
    ]
    return Scenario(
        name="class",
        dataset=dataset,
        train_stream=tuple(_with_classes(dataset.x_train, dataset.y_train, group) for group in groups),
        test_stream=tuple(_with_classes(dataset.x_test, dataset.y_test, group) for group in groups),
    )


def permuted_scenario(dataset: Dataset, *, tasks: int = DEFAULT_PERMUTED_TASKS, seed: int = 0) -> Scenario:
    """Domain-incremental learning ("Permuted"): every task has its own order of the pixels.

    All classes are in every task. The first task is left unpermuted; the permutation of task t depends on
    ``seed`` and t only, so a longer stream begins with the shorter one. (Goodfellow et al. 2013;
    Kirkpatrick et al. 2017.)

    Raises:
        ValueError: ``tasks`` < 1.
    """
    if tasks < 1:
        raise ValueError(f"tasks: expected an integer >= 1, got {tasks}")
    generator = seeded_generator(seed, "permutations")
    permutations = [None] + [torch.randperm(dataset.features, generator=generator) for _ in range(tasks - 1)]
    classes = tuple(range(dataset.num_classes))
    return Scenario(
        name="permuted",
        dataset=dataset,
        train_stream=tuple(Experience(dataset.x_train, dataset.y_train, classes, None, p) for p in permutations),
        test_stream=tuple(Experience(dataset.x_test, dataset.y_test, classes, None, p) for p in permutations),
    )


def make_scenario(
    name: str,
    dataset: Dataset,
    *,
    tasks: int | None = None,
    classes_per_task: int | None = None,
    shuffle_classes: bool = False,
    seed: int = 0,
) -> Scenario:
    """A scenario by its name on the command line; None takes the scenario's default.

    Raises:
        ValueError: unknown name, an option of another scenario, or a value out of range.
    """
    if name == "class":
        return class_scenario(
            dataset,
            classes_per_task=DEFAULT_CLASSES_PER_TASK if classes_per_task is None else classes_per_task,
            tasks=tasks,
            shuffle_classes=shuffle_classes,
            seed=seed,
        )
    if name == "permuted":
        if classes_per_task is not None or shuffle_classes:
            option = "classes_per_task" if classes_per_task is not None else "shuffle_classes"
            raise ValueError(f"{option}: expected only with scenario class, got it with scenario permuted")
        return permuted_scenario(dataset, tasks=DEFAULT_PERMUTED_TASKS if tasks is None else tasks, seed=seed)
    raise ValueError(f"scenario: expected one of {', '.join(SCENARIOS)}, got {name!r}")


def _with_classes(x: Tensor, y: Tensor, classes: tuple[int, ...]) -> Experience:
    return Experience(x, y, classes, torch.isin(y, torch.tensor(classes)).nonzero().flatten())

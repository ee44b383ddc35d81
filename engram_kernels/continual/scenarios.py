"""Continual-learning scenarios: data sets cut into a stream of experiences.

The terms are Avalanche's (Lomonaco et al. 2021): an *experience* holds the samples available at one time, a
*stream* is experiences in order. No experience tells a model which one it is: `Samples.batches` yields
inputs and labels only, and `training.evaluate` passes the inputs alone.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoding import FIRST_SAMPLES, as_inputs, inputs_of, mean_of, scale_of, standardize
from .data import Dataset, common_shape

DEFAULT_CLASSES_PER_TASK = 2
DEFAULT_PERMUTED_TASKS = 10
DEFAULT_ROTATED_TASKS = 10
DEFAULT_MAX_DEGREES = 180.0
MAX_SEED = 2**31 - 1

_CPU = torch.device("cpu")  # where data sets lie, whatever device a process makes its tensors on by default

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Permutation:
    """Reorders the input units of a minibatch (B, features): output unit k is input unit ``order[k]``.

    Raises:
        ValueError: ``order`` is not an int64 permutation of 0 to n - 1; called, other than n features.
    """

    order: Tensor

    def __post_init__(self) -> None:
        """Raises ValueError."""
        order = self.order
        counted = torch.arange(order.numel(), device=order.device)
        if order.dtype != torch.int64 or order.ndim != 1 or not order.sort().values.equal(counted):
            raise ValueError(
                f"order: expected an int64 permutation of 0 to n - 1, got {order.dtype} of shape {tuple(order.shape)}"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """(B, n) of any dtype -> the same, reordered."""
        if x.shape[1] != len(self.order):
            raise ValueError(f"x: expected {len(self.order)} features, as many as are permuted, got {x.shape[1]}")
        return x[:, self.order]


@dataclass(frozen=True)
class Rotation:
    """Rotates the square images of a minibatch counter-clockwise about their centre.

    Bilinear; pixels from outside the image are 0. Multiples of 90 degrees move pixels and change none.

    Raises:
        ValueError: ``degrees`` not finite, ``side`` < 1; called, other than side * side features.
    """

    degrees: float
    side: int

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if not math.isfinite(self.degrees):
            raise ValueError(f"degrees: expected a finite number, got {self.degrees}")
        if self.side < 1:
            raise ValueError(f"side: expected an integer >= 1, got {self.side}")

    def __call__(self, x: Tensor) -> Tensor:
        """(B, side * side) -> the same shape; float32, or the input's dtype at multiples of 90 degrees."""
        side = self.side
        if x.shape[1] != side * side:
            raise ValueError(f"x: expected {side * side} features, an image of {side} x {side}, got {x.shape[1]}")
        images = x.reshape(-1, side, side)
        turns, rest = divmod(self.degrees, 90.0)
        if rest == 0.0:
            return torch.rot90(images, int(turns) % 4, (1, 2)).reshape(x.shape)
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        matrix = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]], dtype=torch.float32, device=x.device)
        # The samples are the channels of one image, so that one grid serves them all.
        grid = F.affine_grid(matrix, [1, 1, side, side], align_corners=False)
        return F.grid_sample(images[None].to(torch.float32), grid, align_corners=False).reshape(x.shape)


class Samples(ABC):
    """The samples of an experience, or of several joined, as training gets them."""

    classes: tuple[int, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, y)`` of the given samples: inputs of a network, float32 (B, features), and labels, int64 (B,).

        Shapes: ``rows`` (B,) int64, each from 0 to len(self) - 1.
        """

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Minibatches as from `samples`, each sample once.

        With a ``generator`` in an order drawn from it, else in the order of the data set. The last batch
        holds the remainder.
        """
        order = None if generator is None else _permutation(len(self), generator)
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            yield self.samples(torch.arange(start, stop, device=_CPU) if order is None else order[start:stop])


@dataclass(frozen=True)
class Experience(Samples):
    """One task's samples, drawn lazily from a data set that other experiences may share.

    Shapes: ``x`` (n, features) uint8 or float32 and ``y`` (n,) int64 are the whole data set; ``indices``
    (samples,) int64 selects this experience's rows, None all of them; ``transform`` maps a raw minibatch
    (B, features) to one of the same shape, None leaves it. ``classes`` are the labels (indices into
    ``Dataset.classes``) that occur in it. Images are standardised per sample; of a table, whose features have units of
    their own, ``offset`` and ``scale`` (features,) say how each is scaled before the transform
    (`engram_kernels.InputEncoding`), which its inputs then code. With ``encoded`` False `samples`
    gives the features themselves, uint8 or float32. ``sample_shape`` is then that of a sample in the
    data set, () where a permutation has undone it.

    All this is done on the minibatch: no task ever has a copy of the data.
    """

    x: Tensor
    y: Tensor
    classes: tuple[int, ...]
    indices: Tensor | None = None
    transform: Transform | None = None
    offset: Tensor | None = None
    scale: Tensor | None = None
    encoded: bool = True
    sample_shape: tuple[int, ...] = ()

    @property
    def features(self) -> int:
        """Values of a sample as `samples` gives it."""
        raw = self.x.shape[1]
        return raw if self.scale is None else inputs_of(raw)

    def __len__(self) -> int:
        """Samples in this experience."""
        return self.y.shape[0] if self.indices is None else self.indices.shape[0]

    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Samples.samples`."""
        if self.indices is not None:
            rows = self.indices[rows]
        x = self.x[rows]
        if self.offset is not None and self.scale is not None:
            x = (x.float() - self.offset) / self.scale
        if self.transform is not None:
            x = self.transform(x)
        if self.encoded:
            x = standardize(x) if self.scale is None else as_inputs(x)
        return x, self.y[rows]


# Experiences may be part of a method's state, which is loaded with weights_only=True.
torch.serialization.add_safe_globals([Experience, Permutation, Rotation])


@dataclass(frozen=True)
class Joint(Samples):
    """Several experiences as one, without a copy of their data: all data so far (Avalanche's Cumulative).

    Sample ``row`` is that of the experiences laid end to end. ``classes`` are those of all, sorted.

    Raises:
        ValueError: no experience, or experiences of different numbers of features.
    """

    experiences: tuple[Experience, ...]
    classes: tuple[int, ...] = field(init=False)
    _ends: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if not self.experiences:
            raise ValueError("experiences: expected at least one, got none")
        features = [experience.features for experience in self.experiences]
        if len(set(features)) > 1:
            raise ValueError(f"experiences: expected the same number of features in each, got {features}")
        classes = sorted({label for experience in self.experiences for label in experience.classes})
        object.__setattr__(self, "classes", tuple(classes))  # the dataclass is frozen
        object.__setattr__(self, "_ends", torch.tensor([*accumulate(map(len, self.experiences))], device=_CPU))

    def __len__(self) -> int:
        """Samples in all experiences together."""
        return int(self._ends[-1])

    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Samples.samples`."""
        x = torch.empty(len(rows), self.experiences[0].features, dtype=torch.float32, device=_CPU)
        y = torch.empty(len(rows), dtype=torch.int64, device=_CPU)
        source = torch.bucketize(rows, self._ends, right=True)
        for index in source.unique().tolist():
            mine, experience = source == index, self.experiences[index]
            x[mine], y[mine] = experience.samples(rows[mine] - (self._ends[index] - len(experience)))
        return x, y


@dataclass(frozen=True)
class Scenario:
    """A train stream and a test stream of equal length, experience by experience about the same task.

    ``features`` and ``num_classes`` are the input and output units of a network for all of them; ``labels`` are the
    classes as the data set names them.
    """

    name: str
    features: int
    num_classes: int
    train_stream: tuple[Experience, ...]
    test_stream: tuple[Experience, ...]
    labels: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self.train_stream)

    def data(self) -> dict[str, Any]:
        """All that predicting for new samples needs to know: plain values and tensors, see :func:`new_samples`."""
        first = self.test_stream[0]
        return {
            "features": first.x.shape[1],
            "labels": list(self.labels),
            "encoded": first.encoded,
            "offset": first.offset,
            "scale": first.scale,
        }


def new_samples(x: Tensor, data: Mapping[str, Any]) -> Experience:
    """Samples without labels, uint8 or float32 (n, features), that become inputs as those of the scenario did.

    ``data`` is that of :meth:`Scenario.data`. Samples are taken as they are, neither permuted nor rotated.
    Raises: ValueError for another number of features.
    """
    if x.shape[1] != data["features"]:
        raise ValueError(f"samples: expected {data['features']} features per sample, got {x.shape[1]}")
    unknown = torch.zeros(len(x), dtype=torch.int64, device=_CPU)
    return Experience(x, unknown, (), offset=data["offset"], scale=data["scale"], encoded=data["encoded"])


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """A random stream of its own for each purpose of a run: drawing more for one never shifts another.

    Raises:
        ValueError: ``seed`` outside [0, 2**31).
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: expected an integer from 0 to {MAX_SEED}, got {seed}")
    # Hashed to 32 bits because torch's CPU generator ignores the bits above.
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator(_CPU).manual_seed(int.from_bytes(digest[:4], "little"))


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
        classes_per_task: new classes per task; the last task takes the rest.
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
    order = torch.arange(classes, device=_CPU)
    if shuffle_classes:
        order = _permutation(classes, seeded_generator(seed, "class order"))
    groups = [
        tuple(sorted(order[start : start + classes_per_task].tolist()))
        for start in range(0, tasks * classes_per_task, classes_per_task)
    ]
    return Scenario(
        name="class",
        features=dataset.features,
        num_classes=dataset.num_classes,
        train_stream=tuple(_with_classes(dataset.x_train, dataset.y_train, group) for group in groups),
        test_stream=tuple(_with_classes(dataset.x_test, dataset.y_test, group) for group in groups),
    )


def permuted_scenario(
    dataset: Dataset, *, tasks: int = DEFAULT_PERMUTED_TASKS, samples_per_task: int | None = None, seed: int = 0
) -> Scenario:
    """Domain-incremental learning ("Permuted"): every task has its own order of the pixels.

    All classes are in every task. The first task is left unpermuted; the permutation of task t depends on
    ``seed`` and t only, so a longer stream begins with the shorter one. (Goodfellow et al. 2013;
    Kirkpatrick et al. 2017.)

    Args:
        dataset: the data that every task holds.
        tasks: number of tasks.
        samples_per_task: train each task on at most so many samples, drawn by ``seed`` and task.
        seed: of permutations and samples.

    Raises:
        ValueError: ``tasks`` or ``samples_per_task`` < 1.
    """
    if tasks < 1:
        raise ValueError(f"tasks: expected an integer >= 1, got {tasks}")
    generator = seeded_generator(seed, "permutations")
    orders = [_permutation(dataset.features, generator) for _ in range(tasks - 1)]
    return _domains(
        "permuted", [dataset] * tasks, [None, *(Permutation(order) for order in orders)], samples_per_task, seed
    )


def rotated_scenario(
    dataset: Dataset,
    *,
    tasks: int = DEFAULT_ROTATED_TASKS,
    max_degrees: float = DEFAULT_MAX_DEGREES,
    samples_per_task: int | None = None,
    seed: int = 0,
) -> Scenario:
    """Domain-incremental learning ("Rotated"): every task turns the images by another angle.

    All classes are in every task. Task t is turned by ``max_degrees * t / (tasks - 1)``, counter-clockwise: the
    first is left as it is and the last turned by ``max_degrees``. Lopez-Paz and Ranzato 2017 draw their angles
    from 0 to 180 degrees; evenly spread ones make every seed's stream equally hard.

    Args:
        dataset: square images, samples of shape (side, side) whose background is 0; axes of extent 1 aside.
        tasks: number of tasks.
        max_degrees: angle of the last task.
        samples_per_task: train each task on at most so many samples, drawn by ``seed`` and task.
        seed: used with ``samples_per_task`` only.

    Raises:
        ValueError: samples of another shape, ``tasks`` or ``samples_per_task`` < 1, ``max_degrees`` outside (0, 360).
    """
    shape = [extent for extent in dataset.sample_shape if extent != 1] or [1, 1]
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            "dataset: expected square images with scenario rotated, x_train and x_test of shape (samples, side, side), "
            f"got samples of shape {dataset.sample_shape} in {dataset.name}"
        )
    side = shape[0]
    if tasks < 1:
        raise ValueError(f"tasks: expected an integer >= 1, got {tasks}")
    if not 0.0 < max_degrees < 360.0:
        raise ValueError(f"max_degrees: expected a number of degrees in (0, 360), got {max_degrees}")
    rotations = [Rotation(max_degrees * task / (tasks - 1), side) for task in range(1, tasks)]
    return _domains("rotated", [dataset] * tasks, [None, *rotations], samples_per_task, seed)


def domain_scenario(datasets: Sequence[Dataset], *, samples_per_task: int | None = None, seed: int = 0) -> Scenario:
    """Domain-incremental learning: every task is another data set with the same labels.

    MNIST and then Fashion-MNIST, for one (Laborieux et al. 2021), or the same labels under other conditions.

    Args:
        datasets: the tasks in order, alike in labels and in the shape of their samples (or in features, where one
            holds plain rows).
        samples_per_task: train each task on at most so many samples, drawn by ``seed`` and task.
        seed: used with ``samples_per_task`` only.

    Raises:
        ValueError: fewer than two data sets, one that differs from the first in shape or labels (the message
            names it and the difference), ``samples_per_task`` < 1.
    """
    if len(datasets) < 2:
        raise ValueError(f"dataset: expected at least 2 with scenario domain, got {len(datasets)}")
    first = datasets[0]
    for number, dataset in enumerate(datasets[1:], start=2):
        where = f"in {dataset.name} (data set {number})"
        if dataset.features != first.features:
            raise ValueError(
                f"dataset: expected {first.features} features per sample as in {first.name}, the first data set, "
                f"got {dataset.features} {where}"
            )
        if common_shape(first.sample_shape, dataset.sample_shape) is None:
            raise ValueError(
                f"dataset: expected samples of shape {first.sample_shape} as in {first.name}, the first data set, "
                f"got {dataset.sample_shape} {where}"
            )
        lacking = sorted(set(first.classes) - set(dataset.classes))
        unknown = sorted(set(dataset.classes) - set(first.classes))
        if lacking or unknown:
            difference = f"no label {lacking[0]}" if lacking else f"label {unknown[0]} besides"
            raise ValueError(
                f"dataset: expected the {first.num_classes} labels of {first.name}, the first data set, "
                f"got {difference} {where}"
            )
    return _domains("domain", datasets, [None] * len(datasets), samples_per_task, seed)


class ScenarioKind(NamedTuple):
    """A row of `SCENARIOS`.

    Attributes:
        make: builds it of its data set, its options and a seed.
        help: one sentence about its tasks.
        defaults: of the options it takes besides the seed; None for one that follows from the data.
        several: whether it is built of a list of data sets.
        splits_classes: whether a task has some of the classes alone.
    """

    make: Callable[..., Scenario]
    help: str
    defaults: dict[str, Any]
    several: bool = False
    splits_classes: bool = False


SCENARIOS: dict[str, ScenarioKind] = {
    "class": ScenarioKind(
        class_scenario,
        "every task brings new classes",
        {"tasks": None, "classes_per_task": DEFAULT_CLASSES_PER_TASK, "shuffle_classes": False},
        splits_classes=True,
    ),
    "permuted": ScenarioKind(
        permuted_scenario,
        "every task has its own order of the pixels",
        {"tasks": DEFAULT_PERMUTED_TASKS, "samples_per_task": None},
    ),
    "rotated": ScenarioKind(
        rotated_scenario,
        "every task turns the images by another angle",
        {"tasks": DEFAULT_ROTATED_TASKS, "max_degrees": DEFAULT_MAX_DEGREES, "samples_per_task": None},
    ),
    "domain": ScenarioKind(
        domain_scenario,
        "every task is another data set with the same labels",
        {"samples_per_task": None},
        several=True,
    ),
}


def make_scenario(
    name: str,
    dataset: Dataset | Sequence[Dataset],
    *,
    tasks: int | None = None,
    classes_per_task: int | None = None,
    shuffle_classes: bool = False,
    max_degrees: float | None = None,
    samples_per_task: int | None = None,
    seed: int = 0,
    encoded: bool = True,
) -> Scenario:
    """A scenario by its name on the command line; None takes the scenario's default.

    ``dataset`` is one (or a list of one), with scenario domain a list of at least two. With ``encoded`` False the
    experiences give the features of the data set rather than the inputs of a network.

    Raises:
        ValueError: unknown name, several data sets for a scenario of one, an option of another scenario, or a value
            out of range.
    """
    if name not in SCENARIOS:
        raise ValueError(f"scenario: expected one of {', '.join(SCENARIOS)}, got {name!r}")
    kind = SCENARIOS[name]
    given: dict[str, Any] = {
        "tasks": tasks,
        "classes_per_task": classes_per_task,
        "shuffle_classes": shuffle_classes or None,
        "max_degrees": max_degrees,
        "samples_per_task": samples_per_task,
    }
    given = {option: value for option, value in given.items() if value is not None}
    for option in given:
        if option not in kind.defaults:
            takers = [other for other, each in SCENARIOS.items() if option in each.defaults]
            raise ValueError(f"{option}: expected only with scenario {', '.join(takers)}, got it with scenario {name}")
    datasets = [dataset] if isinstance(dataset, Dataset) else list(dataset)
    if not kind.several and len(datasets) != 1:
        raise ValueError(f"dataset: expected one with scenario {name}, got {len(datasets)} (several: scenario domain)")
    scenario = kind.make(datasets if kind.several else datasets[0], seed=seed, **given)
    scenario = replace(scenario, labels=datasets[0].classes)
    if encoded:
        return _scaled(scenario) if any(dataset.is_table for dataset in datasets) else scenario
    shape = datasets[0].sample_shape
    for other in datasets[1:]:
        shape = common_shape(shape, other.sample_shape) or (scenario.features,)
    if any(isinstance(experience.transform, Permutation) for experience in scenario.train_stream):
        shape = ()  # of all tasks, the first too: the code of what was learned can't change with a later one
    return _with_streams(scenario, lambda experience: replace(experience, encoded=False, sample_shape=shape))


def _scaled(scenario: Scenario) -> Scenario:
    """Has all experiences scale their features by the first samples of the stream, whatever their labels."""
    first = scenario.train_stream[0]
    x = first.x[:FIRST_SAMPLES] if first.indices is None else first.x[first.indices[:FIRST_SAMPLES]]
    x = x.float()
    offset = mean_of(x)
    scale = scale_of(offset, x.amin(dim=0), x.amax(dim=0))
    scenario = _with_streams(scenario, lambda experience: replace(experience, offset=offset, scale=scale))
    return replace(scenario, features=inputs_of(len(offset)))


def _with_streams(scenario: Scenario, change: Callable[[Experience], Experience]) -> Scenario:
    """The scenario with all its experiences changed."""
    train, test = (tuple(map(change, stream)) for stream in (scenario.train_stream, scenario.test_stream))
    return replace(scenario, train_stream=train, test_stream=test)


def task_samples(name: str, dataset: Dataset | Sequence[Dataset], classes_per_task: int | None = None) -> int:
    """Training samples of a task of a scenario, on average, whatever the seed and before any cap of them."""
    datasets = [dataset] if isinstance(dataset, Dataset) else list(dataset)
    samples = min(len(dataset.y_train) for dataset in datasets)
    if not SCENARIOS[name].splits_classes:
        return samples
    classes = datasets[0].num_classes
    return round(samples * min(1.0, (classes_per_task or DEFAULT_CLASSES_PER_TASK) / classes))


def _permutation(n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator, device=generator.device)


def _with_classes(x: Tensor, y: Tensor, classes: tuple[int, ...]) -> Experience:
    return Experience(x, y, classes, torch.isin(y, torch.tensor(classes, device=y.device)).nonzero().flatten())


def _domains(
    name: str,
    datasets: Sequence[Dataset],
    transforms: Sequence[Transform | None],
    samples_per_task: int | None,
    seed: int,
) -> Scenario:
    """A task for each data set and transform, of all its classes."""
    if samples_per_task is not None and samples_per_task < 1:
        raise ValueError(f"samples_per_task: expected an integer >= 1, got {samples_per_task}")
    classes = tuple(range(datasets[0].num_classes))
    train_stream, test_stream = [], []
    for task, (dataset, transform) in enumerate(zip(datasets, transforms, strict=True)):
        indices, present = None, classes
        if samples_per_task is not None and samples_per_task < len(dataset.y_train):
            generator = seeded_generator(seed, f"samples of task {task}")
            indices = _permutation(len(dataset.y_train), generator)[:samples_per_task].sort().values
            present = tuple(dataset.y_train[indices].unique().tolist())
        train_stream.append(Experience(dataset.x_train, dataset.y_train, present, indices, transform))
        test_stream.append(Experience(dataset.x_test, dataset.y_test, classes, None, transform))
    return Scenario(name, datasets[0].features, datasets[0].num_classes, tuple(train_stream), tuple(test_stream))

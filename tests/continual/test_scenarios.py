"""Streams: every sample once, in the right task, and nothing that tells a model which task it is in."""

import functools
import inspect
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.continual.data import Dataset, from_arrays
from engram_kernels.continual.scenarios import (
    SCENARIOS,
    Experience,
    Joint,
    Permutation,
    Rotation,
    class_scenario,
    domain_scenario,
    make_scenario,
    permuted_scenario,
    rotated_scenario,
    seeded_generator,
)
from engram_kernels.continual.training import evaluate
from engram_kernels.encoding import standardize


@functools.cache
def small_dataset(classes=5, features=9, train=47, test=23, name="small", seed=0):
    """Every sample is recognisable: its row number is its first feature."""
    generator = torch.Generator().manual_seed(seed)

    def part(samples):
        x = torch.randint(0, 256, (samples, features), generator=generator, dtype=torch.uint8)
        x[:, 0] = torch.arange(samples)
        return x, torch.arange(samples) % classes

    side = math.isqrt(features)
    shape = (side, side) if side * side == features else ()
    return Dataset(name, *part(train), *part(test), classes=tuple(range(classes)), sample_shape=shape)


def make(name, dataset=None, **options):
    """Any scenario, with another data set beside ``dataset`` where one is not enough."""
    dataset = small_dataset() if dataset is None else dataset
    if name == "domain":
        other = small_dataset(dataset.num_classes, dataset.features, 31, 17, "other", seed=1)
        return make_scenario(name, [dataset, other], **options)
    return make_scenario(name, dataset, **options)


def whole(experience):
    """All samples, as one batch."""
    return experience.samples(torch.arange(len(experience)))


@given(st.integers(2, 9), st.data())
@settings(deadline=None)
def test_class_scenario_partitions_the_data_by_class(classes, draw):
    dataset = small_dataset(classes)
    per_task = draw.draw(st.integers(1, classes))
    scenario = class_scenario(dataset, classes_per_task=per_task, shuffle_classes=draw.draw(st.booleans()))
    assert len(scenario) == len(scenario.test_stream) == -(-classes // per_task)
    for stream, y in ((scenario.train_stream, dataset.y_train), (scenario.test_stream, dataset.y_test)):
        everything = torch.cat([experience.indices for experience in stream])
        assert torch.equal(everything.sort().values, torch.arange(len(y)))
        for experience in stream:
            assert set(y[experience.indices].tolist()) == set(experience.classes)
        assert all(len(experience.classes) == per_task for experience in stream[:-1])
    assert [e.classes for e in scenario.train_stream] == [e.classes for e in scenario.test_stream]


def test_class_order_is_by_label_or_by_seed():
    dataset = small_dataset(classes=6)
    assert [e.classes for e in class_scenario(dataset).train_stream] == [(0, 1), (2, 3), (4, 5)]
    orders = [
        [e.classes for e in class_scenario(dataset, shuffle_classes=True, seed=seed).train_stream]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert orders[0] == orders[1]
    assert len({str(order) for order in orders}) > 2


def test_fewer_tasks_are_the_first_ones():
    dataset = small_dataset()
    scenario = class_scenario(dataset, tasks=2)
    assert [e.classes for e in scenario.train_stream] == [(0, 1), (2, 3)]


def test_permuted_scenario_permutes_the_same_samples():
    dataset = small_dataset()
    scenario = permuted_scenario(dataset, tasks=4, seed=3)
    plain = standardize(dataset.x_test)
    for task, experience in enumerate(scenario.test_stream):
        x, y = next(experience.batches(len(experience)))
        assert torch.equal(y, dataset.y_test)
        if task == 0:
            assert torch.equal(x, plain)
        else:
            permutation = experience.transform.order
            assert torch.equal(permutation.sort().values, torch.arange(dataset.features))
            # Standardisation and permutation commute up to the rounding of sums in another order.
            torch.testing.assert_close(x, plain[:, permutation])
        assert experience.x is dataset.x_test, "no copy of the data per task"
    for train, test in zip(scenario.train_stream, scenario.test_stream, strict=True):
        assert train.transform is test.transform


def test_permutations_depend_on_the_seed_and_the_task_only():
    dataset = small_dataset(features=50)
    long, short = (permuted_scenario(dataset, tasks=tasks, seed=1).train_stream for tasks in (6, 3))
    other = permuted_scenario(dataset, tasks=6, seed=2).train_stream
    for task in (1, 2):
        assert torch.equal(long[task].transform.order, short[task].transform.order)
        assert not torch.equal(long[task].transform.order, other[task].transform.order)
    assert not torch.equal(long[1].transform.order, long[2].transform.order)


def rotated(image, degrees):
    """One pixel at a time: where it comes from, and the four pixels around that; double precision."""
    side = len(image)
    centre, cos, sin = (side - 1) / 2, math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    result = np.zeros((side, side))
    for row in range(side):
        for column in range(side):
            right, up = column - centre, centre - row
            source_row = centre - (cos * up - sin * right)
            source_column = centre + (cos * right + sin * up)
            for r in (math.floor(source_row), math.floor(source_row) + 1):
                for c in (math.floor(source_column), math.floor(source_column) + 1):
                    if 0 <= r < side and 0 <= c < side:
                        share = (1 - abs(source_row - r)) * (1 - abs(source_column - c))
                        result[row, column] += share * float(image[r, c])
    return result


@given(st.integers(1, 9), st.floats(-400, 400), st.integers(0, 3), st.booleans(), st.integers(0, 2**31))
@settings(deadline=None)
def test_rotation_against_a_direct_computation(side, degrees, samples, as_bytes, seed):
    images = torch.randint(0, 256, (samples, side, side), generator=torch.Generator().manual_seed(seed)).float() / 255
    if as_bytes:
        images = (255 * images).to(torch.uint8)
    actual = Rotation(degrees, side)(images.flatten(1))
    assert actual.shape == (samples, side * side)
    for image, result in zip(images, actual, strict=True):
        expected = rotated(image.numpy(), degrees)
        np.testing.assert_allclose(result.reshape(side, side).numpy(), expected, atol=1e-2 if as_bytes else 5e-5)


@given(st.integers(1, 9), st.integers(-5, 5), st.sampled_from([torch.uint8, torch.float32]))
@settings(deadline=None)
def test_quarter_turns_move_pixels_and_change_none(side, quarters, dtype):
    images = torch.arange(2 * side * side).reshape(2, side, side).to(dtype)
    actual = Rotation(90.0 * quarters, side)(images.reshape(2, -1)).reshape(2, side, side)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual.numpy(), np.rot90(images.numpy(), quarters, (1, 2)))


def test_rotated_scenario_spreads_the_angles_evenly():
    dataset = small_dataset()
    scenario = rotated_scenario(dataset, tasks=5, max_degrees=120)
    assert scenario.train_stream[0].transform is None
    assert [e.transform.degrees for e in scenario.train_stream[1:]] == [30, 60, 90, 120]
    assert rotated_scenario(dataset, tasks=3).train_stream[2].transform == Rotation(180.0, 3)
    assert len(rotated_scenario(dataset, tasks=1)) == 1
    for stream, x, y in (
        (scenario.train_stream, dataset.x_train, dataset.y_train),
        (scenario.test_stream, dataset.x_test, dataset.y_test),
    ):
        for task, experience in enumerate(stream):
            got_x, got_y = whole(experience)
            assert torch.equal(got_x, standardize(Rotation(30.0 * task, 3)(x)))
            assert torch.equal(got_y, y)
            assert experience.x is x, "no copy of the data per task"


def shaped(*shape, name="own"):
    """A data set whose samples have a shape."""
    random = np.random.RandomState(0)
    parts = {"x_train": random.rand(12, *shape), "x_test": random.rand(6, *shape)}
    return from_arrays(name, **parts, y_train=np.arange(12) % 3, y_test=np.arange(6) % 3)


@pytest.mark.parametrize("shape", [(64,), (4, 16), (4, 4, 4), (64, 1), (2, 2, 16), (3, 8, 8), (8, 8, 3), (4, 2, 8)])
def test_what_is_no_square_image_is_not_turned(shape):
    """Whatever the number of its values: 64 features of a table are no image of 8 x 8."""
    with pytest.raises(
        ValueError, match=rf"shape \(samples, side, side\), got samples of shape {re.escape(str(shape))}"
    ):
        rotated_scenario(shaped(*shape))
    assert len(permuted_scenario(shaped(*shape), tasks=2)) == 2


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (8, 8, 1), (8, 1, 8), (1, 1), (1,)])
def test_axes_of_extent_one_do_not_change_an_image(shape):
    dataset = shaped(*shape)
    side = math.isqrt(dataset.features)
    experience = rotated_scenario(dataset, tasks=3).test_stream[1]
    turned = np.rot90(dataset.x_test.reshape(-1, side, side).numpy(), 1, (1, 2)).reshape(-1, side * side)
    np.testing.assert_array_equal(experience.transform(dataset.x_test).numpy(), turned)


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        (((4, 16), (4, 16)), True),
        (((4, 16), (1, 4, 16)), True),
        (((64,), (8, 8)), True),
        (((8, 8), (64,)), True),
        (((4, 16), (8, 8)), False),
        (((4, 16), (16, 4)), False),
    ],
)
def test_data_sets_of_other_shapes_make_no_stream(shapes, fits):
    datasets = [shaped(*shape, name=name) for shape, name in zip(shapes, ("one", "other"), strict=True)]
    if fits:
        assert len(domain_scenario(datasets)) == 2
        return
    first, second = (re.escape(str(shape)) for shape in shapes)
    with pytest.raises(ValueError, match=rf"shape {first} as in one, .* got {second} in other \(data set 2\)"):
        domain_scenario(datasets)


def test_domain_scenario_is_one_data_set_after_the_other():
    datasets = [small_dataset(), small_dataset(train=31, test=17, seed=1), small_dataset(seed=2)]
    scenario = domain_scenario(datasets)
    assert (len(scenario), scenario.features, scenario.num_classes) == (3, 9, 5)
    for dataset, train, test in zip(datasets, scenario.train_stream, scenario.test_stream, strict=True):
        assert (train.x is dataset.x_train, train.y is dataset.y_train) == (True, True), "no copy"
        assert (test.x is dataset.x_test, test.y is dataset.y_test) == (True, True), "no copy"
        assert (len(train), len(test)) == (len(dataset.y_train), len(dataset.y_test))
        assert train.classes == test.classes == tuple(range(5))


@pytest.mark.parametrize("name", ["permuted", "rotated", "domain"])
@given(st.integers(1, 60), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=20)
def test_a_cap_of_samples_is_a_fixed_subset_of_each_task(name, cap, seed):
    full, capped, again = (make(name, samples_per_task=c, seed=seed) for c in (None, cap, cap))
    larger = make(name, samples_per_task=cap + 5, seed=seed)
    for every, some, same, more in zip(
        full.train_stream, capped.train_stream, again.train_stream, larger.train_stream, strict=True
    ):
        assert len(some) == min(cap, len(every))
        assert some.x is every.x, "no copy of the data"
        assert set(some.classes) == set(whole(some)[1].tolist())
        assert torch.equal(whole(some)[0], whole(same)[0])
        if some.indices is not None:
            assert some.indices.unique().equal(some.indices), "each once, in the order of the data set"
            assert set(some.indices.tolist()) <= set(
                range(len(every)) if more.indices is None else more.indices.tolist()
            )
    assert [len(test) for test in capped.test_stream] == [len(test) for test in full.test_stream]


@pytest.mark.parametrize("name", ["permuted", "domain"])
def test_a_longer_stream_begins_with_the_shorter_one(name):
    datasets = [small_dataset(seed=seed) for seed in range(5)]
    if name == "permuted":
        long, short = (permuted_scenario(datasets[0], tasks=tasks, samples_per_task=9, seed=1) for tasks in (5, 3))
    else:
        long, short = (domain_scenario(datasets[:tasks], samples_per_task=9, seed=1) for tasks in (5, 3))
    for one, other in zip(long.train_stream, short.train_stream, strict=False):
        for left, right in zip(whole(one), whole(other), strict=True):
            assert torch.equal(left, right)
    assert not torch.equal(long.train_stream[0].indices, long.train_stream[1].indices)


@given(st.integers(1, 4), st.integers(1, 60), st.booleans(), st.sampled_from(sorted(SCENARIOS)), st.booleans())
@settings(deadline=None)
def test_a_joint_experience_holds_every_sample_of_each_once(tasks, batch_size, shuffled, name, capped):
    options = {"samples_per_task": 7} if capped and name != "class" else {}
    experiences = make(name, **options).train_stream[:tasks]
    joint = Joint(experiences)
    assert len(joint) == sum(map(len, experiences))
    assert joint.classes == tuple(sorted(set().union(*(e.classes for e in experiences))))
    x, y = (torch.cat(parts) for parts in zip(*map(whole, experiences), strict=True))
    order = torch.arange(len(y))
    if shuffled:
        order = torch.randperm(len(y), generator=seeded_generator(4, "order"))
    batches = list(joint.batches(batch_size, seeded_generator(4, "order") if shuffled else None))
    assert all(len(batch) == batch_size for _, batch in batches[:-1])
    torch.testing.assert_close(torch.cat([batch for batch, _ in batches]), x[order])
    assert torch.equal(torch.cat([batch for _, batch in batches]), y[order])
    assert [part.shape[0] for part in joint.samples(torch.arange(0))] == [0, 0]


def test_a_joint_experience_is_lazy():
    scenario = permuted_scenario(small_dataset(), tasks=3)
    drawn = []

    def watch(x):
        drawn.append(len(x))
        return x

    first = scenario.train_stream[0]
    watched = Experience(first.x, first.y, first.classes, None, watch)
    joint = Joint((first, watched))
    assert all(mine is its for mine, its in zip(joint.experiences, (first, watched), strict=True))
    joint.samples(torch.tensor([3, len(first), 5, len(first) + 2]))
    joint.samples(torch.tensor([0, 1]))
    assert drawn == [2], "only what is asked for is read"


def test_joint_of_nothing_or_of_different_widths():
    with pytest.raises(ValueError, match="experiences: expected at least one, got none"):
        Joint(())
    streams = [permuted_scenario(small_dataset(features=features)).train_stream for features in (9, 16)]
    with pytest.raises(ValueError, match=r"the same number of features in each, got \[9, 16\]"):
        Joint((streams[0][0], streams[1][0]))


@pytest.mark.parametrize("name", SCENARIOS)
def test_streams_can_be_pickled(name):
    scenario = make(name)
    for one, other in zip(scenario.train_stream, pickle.loads(pickle.dumps(scenario)).train_stream, strict=True):
        for left, right in zip(whole(one), whole(other), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("transform", "wanted"),
    [
        (lambda: Rotation(math.nan, 3), "degrees: expected a finite number, got nan"),
        (lambda: Rotation(10.0, 0), "side: expected an integer >= 1, got 0"),
        (lambda: Rotation(10.0, 3)(torch.zeros(2, 10)), "x: expected 9 features, an image of 3 x 3, got 10"),
        (lambda: Permutation(torch.tensor([0, 2])), r"order: expected an int64 permutation .* shape \(2,\)"),
        (lambda: Permutation(torch.tensor([0.0, 1.0])), "order: expected an int64 permutation .* torch.float32"),
        (lambda: Permutation(torch.tensor([1, 0]))(torch.zeros(2, 3)), "x: expected 2 features, .* got 3"),
    ],
)
def test_bad_transforms(transform, wanted):
    with pytest.raises(ValueError, match=wanted):
        transform()


@given(st.integers(1, 60), st.booleans(), st.sampled_from(sorted(SCENARIOS)))
@settings(deadline=None)
def test_batches_hold_every_sample_once(batch_size, shuffled, name):
    dataset = small_dataset()
    for experience in make(name, dataset).train_stream:
        generator = seeded_generator(0, "order") if shuffled else None
        batches = list(experience.batches(batch_size, generator))
        assert all(len(y) == batch_size for _, y in batches[:-1])
        assert all(x.dtype == torch.float32 and x.shape == (len(y), dataset.features) for x, y in batches)
        x = torch.cat([x for x, _ in batches])
        expected, _ = next(experience.batches(len(experience)))
        order = [tensor[:, 0].argsort(stable=True) for tensor in (x, expected)]
        torch.testing.assert_close(x[order[0]].sum(0), expected[order[1]].sum(0), atol=1e-4, rtol=1e-4)
        assert sum(len(y) for _, y in batches) == len(experience)


def test_order_is_the_generators():
    experience = class_scenario(small_dataset()).train_stream[0]
    first, again, other = (
        torch.cat([x for x, _ in experience.batches(4, seeded_generator(seed, "order"))]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_seed_gives_each_purpose_its_own_numbers():
    drawn = {
        tuple(torch.randint(0, 2**31, (4,), generator=seeded_generator(seed, purpose)).tolist())
        for seed in (0, 1, 2**31 - 1)
        for purpose in ("a", "b")
    }
    assert len(drawn) == 6


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_method_can_see_the_task_at_test(name):
    """By construction: what evaluation calls is given the inputs, a plain float tensor, and nothing else."""
    scenario = make(name)
    calls = []

    def predict(*arguments, **named):
        calls.append((arguments, named))
        return torch.zeros(len(arguments[0]), 5)

    for experience in scenario.test_stream:
        evaluate(predict, experience)
    assert len(calls) == len(scenario) > 1
    for arguments, named in calls:
        assert len(arguments) == 1
        assert not named
        assert type(arguments[0]) is torch.Tensor
        assert arguments[0].shape[1] == 9
        assert not vars(arguments[0])
    assert list(inspect.signature(evaluate).parameters) == ["predict", "experience", "batch_size"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_experience_offers_a_batch_no_task(name):
    stream = make(name).test_stream
    for samples in (stream[1], Joint(stream)):
        for batch in (next(samples.batches(4)), samples.samples(torch.arange(3))):
            assert [(type(part), part.dtype) for part in batch] == [
                (torch.Tensor, torch.float32), (torch.Tensor, torch.int64)
            ]  # fmt: skip
    for kind in (Experience, Joint):
        assert not any("task" in name for name in kind.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("split", {}, "scenario: expected one of class, permuted, rotated, domain, got 'split'"),
        ("class", {"classes_per_task": 0}, "classes_per_task: expected an integer from 1 to 5, got 0"),
        ("class", {"classes_per_task": 6}, "classes_per_task: expected an integer from 1 to 5, got 6"),
        ("class", {"tasks": 4}, r"tasks: expected an integer from 1 to 3 \(5 classes, 2 per task\), got 4"),
        ("class", {"tasks": 0}, "tasks: expected an integer from 1 to 3"),
        ("permuted", {"tasks": 0}, "tasks: expected an integer >= 1, got 0"),
        ("permuted", {"classes_per_task": 2}, "classes_per_task: expected only with scenario class"),
        ("permuted", {"shuffle_classes": True}, "shuffle_classes: expected only with scenario class"),
        ("permuted", {"seed": -1}, "seed: expected an integer from 0 to 2147483647, got -1"),
        ("permuted", {"seed": 2**31}, "seed: expected an integer from 0"),
        ("permuted", {"max_degrees": 90.0}, "max_degrees: expected only with scenario rotated, .* scenario permuted"),
        ("permuted", {"samples_per_task": 0}, "samples_per_task: expected an integer >= 1, got 0"),
        ("class", {"samples_per_task": 5}, "samples_per_task: expected only with scenario permuted, rotated, domain"),
        ("rotated", {"tasks": 0}, "tasks: expected an integer >= 1, got 0"),
        ("rotated", {"max_degrees": 0.0}, r"max_degrees: expected .* in \(0, 360\), got 0.0"),
        ("rotated", {"max_degrees": 360.0}, "max_degrees: .* got 360.0"),
        ("rotated", {"max_degrees": math.nan}, "max_degrees: .* got nan"),
        ("rotated", {"samples_per_task": -1}, "samples_per_task: expected an integer >= 1, got -1"),
        ("rotated", {"classes_per_task": 2}, "classes_per_task: expected only with scenario class"),
        ("domain", {"tasks": 2}, "tasks: expected only with scenario class, permuted, rotated, .* scenario domain"),
        ("domain", {"samples_per_task": 0}, "samples_per_task: expected an integer >= 1, got 0"),
    ],
)
def test_bad_options(name, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        make(name, **options)


@pytest.mark.parametrize(
    ("name", "datasets", "wanted"),
    [
        ("domain", [small_dataset()], "dataset: expected at least 2 with scenario domain, got 1"),
        ("domain", [], "dataset: expected at least 2 with scenario domain, got 0"),
        ("class", [small_dataset()] * 2, "dataset: expected one with scenario class, got 2"),
        ("rotated", [], "dataset: expected one with scenario rotated, got 0"),
        (
            "rotated",
            [small_dataset(features=10, name="wide")],
            r"dataset: expected square images .* \(samples, side, side\), got samples of shape \(10,\) in wide",
        ),
        (
            "domain",
            [small_dataset(), small_dataset(), small_dataset(features=16, name="wide")],
            r"dataset: expected 9 features per sample as in small, .* got 16 in wide \(data set 3\)",
        ),
        (
            "domain",
            [small_dataset(), small_dataset(classes=4, name="few")],
            r"dataset: expected the 5 labels of small, the first data set, got no label 4 in few \(data set 2\)",
        ),
        (
            "domain",
            [small_dataset(), small_dataset(classes=6, name="many")],
            r"dataset: expected the 5 labels of small, .* got label 5 besides in many \(data set 2\)",
        ),
    ],
)
def test_bad_data_sets(name, datasets, wanted):
    with pytest.raises(ValueError, match=wanted):
        make_scenario(name, datasets)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_table_has_the_options_and_defaults_of_what_builds_a_scenario(name):
    signature = inspect.signature(SCENARIOS[name].make).parameters.values()
    keywords = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY and p.name != "seed"}
    assert SCENARIOS[name].defaults == keywords

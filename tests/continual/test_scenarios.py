"""Streams: every sample once, in the right task, and nothing that tells a model which task it is in."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.continual.data import Dataset, standardize
from engram_kernels.continual.scenarios import (
    SCENARIOS,
    Experience,
    class_scenario,
    make_scenario,
    permuted_scenario,
    seeded_generator,
)
from engram_kernels.continual.training import evaluate


def small_dataset(classes=5, features=6, train=47, test=23):
    """Every sample is recognisable: its row number is its first feature."""
    generator = torch.Generator().manual_seed(0)

    def part(samples):
        x = torch.randint(0, 256, (samples, features), generator=generator, dtype=torch.uint8)
        x[:, 0] = torch.arange(samples)
        return x, torch.arange(samples) % classes

    return Dataset("small", *part(train), *part(test), classes=tuple(range(classes)))


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
            permutation = experience.permutation
            assert torch.equal(permutation.sort().values, torch.arange(dataset.features))
            # Standardisation and permutation commute up to the rounding of sums in another order.
            torch.testing.assert_close(x, plain[:, permutation])
        assert experience.x is dataset.x_test, "no copy of the data per task"
    for train, test in zip(scenario.train_stream, scenario.test_stream, strict=True):
        assert train.permutation is test.permutation


def test_permutations_depend_on_the_seed_and_the_task_only():
    dataset = small_dataset(features=50)
    long, short = (permuted_scenario(dataset, tasks=tasks, seed=1).train_stream for tasks in (6, 3))
    other = permuted_scenario(dataset, tasks=6, seed=2).train_stream
    for task in (1, 2):
        assert torch.equal(long[task].permutation, short[task].permutation)
        assert not torch.equal(long[task].permutation, other[task].permutation)
    assert not torch.equal(long[1].permutation, long[2].permutation)


@given(st.integers(1, 60), st.booleans(), st.sampled_from(SCENARIOS))
@settings(deadline=None)
def test_batches_hold_every_sample_once(batch_size, shuffled, name):
    dataset = small_dataset()
    for experience in make_scenario(name, dataset).train_stream:
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
    scenario = make_scenario(name, small_dataset())
    calls = []

    def predict(*arguments, **named):
        calls.append((arguments, named))
        return torch.zeros(len(arguments[0]), 5)

    for experience in scenario.test_stream:
        evaluate(predict, experience)
    for arguments, named in calls:
        assert len(arguments) == 1
        assert not named
        assert type(arguments[0]) is torch.Tensor
        assert arguments[0].shape[1] == 6
        assert not vars(arguments[0])
    assert list(inspect.signature(evaluate).parameters) == ["predict", "experience", "batch_size"]


def test_the_experience_offers_a_batch_no_task():
    batch = next(class_scenario(small_dataset()).test_stream[1].batches(4))
    assert len(batch) == 2
    assert "task" not in {field for field in Experience.__dataclass_fields__}


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("split", {}, "scenario: expected one of class, permuted, got 'split'"),
        ("class", {"classes_per_task": 0}, "classes_per_task: expected an integer from 1 to 5, got 0"),
        ("class", {"classes_per_task": 6}, "classes_per_task: expected an integer from 1 to 5, got 6"),
        ("class", {"tasks": 4}, r"tasks: expected an integer from 1 to 3 \(5 classes, 2 per task\), got 4"),
        ("class", {"tasks": 0}, "tasks: expected an integer from 1 to 3"),
        ("permuted", {"tasks": 0}, "tasks: expected an integer >= 1, got 0"),
        ("permuted", {"classes_per_task": 2}, "classes_per_task: expected only with scenario class"),
        ("permuted", {"shuffle_classes": True}, "shuffle_classes: expected only with scenario class"),
        ("permuted", {"seed": -1}, "seed: expected an integer from 0 to 2147483647, got -1"),
        ("permuted", {"seed": 2**31}, "seed: expected an integer from 0"),
    ],
)
def test_bad_options(name, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        make_scenario(name, small_dataset(), **options)

"""Replay: a bounded, balanced buffer, and minibatches that are half old."""

import math

import torch
from full_precision import random_dataset, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.continual.methods import ReplayConfig
from engram_kernels.continual.methods.replay import Replay, ReplayBuffer
from engram_kernels.continual.scenarios import class_scenario


@given(st.integers(1, 30), st.lists(st.lists(st.integers(0, 5), max_size=25), min_size=1, max_size=6), seeds)
@settings(deadline=None)
def test_the_buffer_is_bounded_balanced_and_holds_what_was_shown(size, stream, seed):
    torch.manual_seed(seed)
    buffer = ReplayBuffer(size, 2)
    shown = []
    for labels in stream:
        y = torch.tensor(labels, dtype=torch.int64)
        numbers = torch.arange(len(shown), len(shown) + len(y))
        shown += labels
        buffer.add(torch.stack([numbers, y], dim=1).float(), y)  # every sample is recognisable
        assert len(buffer) == min(size, len(shown))
        assert torch.equal(buffer.x[:, 1], buffer.y.float())
        numbers = buffer.x[:, 0].long()
        assert len(numbers.unique()) == len(buffer)
        assert [shown[number] for number in numbers.tolist()] == buffer.y.tolist()
        kept = buffer.y.bincount(minlength=6)
        for label in range(6):
            # a class with less than another has given all that it ever showed
            assert kept[label] >= kept.max() - 1 or kept[label] == shown.count(label)


def test_the_buffer_is_a_uniform_sample_whatever_the_order():
    counts = torch.zeros(12)
    trials = 3000
    for _ in range(trials):
        buffer = ReplayBuffer(3, 1)
        for start, stop in ((0, 2), (2, 9), (9, 12)):
            buffer.add(torch.arange(start, stop).float()[:, None], torch.zeros(stop - start, dtype=torch.int64))
        counts[buffer.x[:, 0].long()] += 1
    expected, deviation = trials / 4, math.sqrt(trials * 0.25 * 0.75)
    assert ((counts - expected).abs() < 5 * deviation).all()


def test_replayed_samples_are_of_earlier_experiences_only_and_as_many_as_new_ones(monkeypatch):
    method = Replay.build(ReplayConfig(lr=0.1, buffer_size=8), 7, [8], 6)
    batches, drawn = [], []
    method.model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    draw = method.buffer.draw
    monkeypatch.setattr(method.buffer, "draw", lambda n: drawn.append(draw(n)) or drawn[-1])
    stream = class_scenario(random_dataset()).train_stream
    earlier = set()
    for experience in stream:
        batches.clear(), drawn.clear()
        samples = method.before_training_exp(experience)
        for x, y in samples.batches(6):
            _, scores = method.loss(x, y)
            assert len(scores) == len(y)
            method.observe(x, y)
        new = [6, 6, 6, 6, 6, 6, 2, 2]  # each minibatch of 20 samples twice: loss, and the step
        assert batches == (new if not earlier else [2 * n for n in new])
        assert {int(label) for _, y in drawn for label in y} == earlier
        method.after_training_exp(samples)
        earlier |= set(experience.classes)
    everything = class_scenario(random_dataset(), classes_per_task=6).train_stream[0]
    known = {tuple(row) for row in next(everything.batches(60))[0].tolist()}
    assert {tuple(row) for row in method.buffer.x.tolist()} <= known

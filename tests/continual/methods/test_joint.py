"""Joint training sees the samples of all experiences so far."""

import io

import pytest
import torch
from full_precision import random_dataset

from engram_kernels.continual.methods import FullPrecisionConfig
from engram_kernels.continual.methods.joint import JointTraining
from engram_kernels.continual.scenarios import SCENARIOS, class_scenario, make_scenario, permuted_scenario


@pytest.mark.parametrize("scenario", [class_scenario, permuted_scenario])
def test_joint_training_sees_all_samples_so_far(scenario):
    method = JointTraining.build(FullPrecisionConfig(lr=0.1), 7, [8], 6)
    stream = scenario(random_dataset(), tasks=3).train_stream
    wanted = []
    for experience in stream:
        wanted += [(*x.tolist(), int(y)) for xs, ys in experience.batches(10) for x, y in zip(xs, ys, strict=True)]
        samples = method.before_training_exp(experience)
        batches = list(samples.batches(7, torch.Generator().manual_seed(0)))
        found = [(*x.tolist(), int(y)) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
        assert sorted(found) == sorted(wanted)
        assert len(samples) == len(wanted)
        assert set(samples.classes) == {label for *_, label in wanted}
        method.after_training_exp(samples)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_joint_training_remembers_the_experiences_of_every_scenario(scenario):
    """Through a file that is read without running what is in it."""
    data, options = random_dataset(shape=(3, 3)), {} if scenario == "domain" else {"tasks": 3}
    stream = make_scenario(scenario, [data] * (3 if scenario == "domain" else 1), **options).train_stream
    method, other = (JointTraining.build(FullPrecisionConfig(lr=0.1), 9, [8], 6) for _ in range(2))
    for experience in stream[:2]:
        method.after_training_exp(method.before_training_exp(experience))
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    wanted, found = (list(learner.before_training_exp(stream[2]).batches(10)) for learner in (method, other))
    assert len(wanted) == len(found)
    for batch, same_batch in zip(wanted, found, strict=True):
        assert all(map(torch.equal, batch, same_batch))

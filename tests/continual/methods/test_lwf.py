"""Learning without forgetting: the loss as its formula says, and a teacher that stays as it was."""

import math

import torch
from full_precision import double, random_dataset, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.continual.methods import LwFConfig
from engram_kernels.continual.methods.finetune import MLP
from engram_kernels.continual.methods.lwf import LwF, SeenClassesMLP
from engram_kernels.continual.scenarios import class_scenario


@given(strength=st.floats(0, 10), temperature=st.floats(0.5, 8), loss=st.sampled_from(["all", "batch"]), seed=seeds)
@settings(deadline=None, max_examples=30)
def test_distillation_is_what_its_formula_says(strength, temperature, loss, seed):
    """Spelled out with probabilities: the old network's over the classes seen before, the new one's over all so far."""
    torch.manual_seed(seed)
    config = LwFConfig(lr=0.1, strength=strength, distillation_temperature=temperature, loss=loss)
    method = double(LwF.build(config, 7, [8], 6), lr=0.01)
    stream = class_scenario(random_dataset()).train_stream
    active, before = [], []
    for experience in stream:
        samples = method.before_training_exp(experience)
        before, active = active, [*active, *experience.classes]
        x, y = next(samples.batches(9, torch.Generator().manual_seed(seed)))
        x = x.double()
        frozen = MLP([7, 8, 6]).double()
        if before:
            frozen.load_state_dict({k: v for k, v in method.teacher.state_dict().items() if k != "seen"})
        found, scores = method.loss(x, y)
        assert (scores[:, active] > -math.inf).all()
        assert (scores[:, [c for c in range(6) if c not in active]] == -math.inf).all()
        classes = active if loss == "all" else sorted(set(y.tolist()))
        p = scores[:, classes].softmax(1)
        wanted = -p[torch.arange(len(y)), [classes.index(c) for c in y.tolist()]].log().mean()
        if before:
            target = (frozen(x)[:, before] / temperature).softmax(1)
            own = (scores[:, active] / temperature).softmax(1)[:, [active.index(c) for c in before]]
            wanted = wanted - strength * (target * own.log()).sum(1).mean()
        else:
            assert method.teacher is None
        torch.testing.assert_close(found, wanted)
        for x, y in samples.batches(10):
            method.observe(x.double(), y)


def test_the_teacher_is_the_network_before_and_does_not_learn():
    method = LwF.build(LwFConfig(lr=0.1), 7, [8], 6)
    stream = class_scenario(random_dataset()).train_stream
    for experience in stream:
        kept = {key: value.clone() for key, value in method.model.state_dict().items()}
        samples = method.before_training_exp(experience)
        for x, y in samples.batches(5):
            method.observe(x, y)
        if experience is not stream[0]:
            assert all(torch.equal(kept[key], value) for key, value in method.teacher.state_dict().items())
    assert isinstance(method.teacher, SeenClassesMLP)
    assert method.teacher.seen.tolist() == [True] * 4 + [False] * 2

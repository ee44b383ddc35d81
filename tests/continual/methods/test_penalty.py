"""The quadratic penalty of `ewc` and `si`, against autograd of the loss with the penalty."""

import pytest
import torch
import torch.nn.functional as F
from full_precision import double, random_dataset, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.continual.methods import EWCConfig, FullPrecisionConfig, PenaltyConfig
from engram_kernels.continual.methods.ewc import EWC
from engram_kernels.continual.methods.finetune import FullPrecisionMethod
from engram_kernels.continual.methods.si import SynapticIntelligence
from engram_kernels.continual.scenarios import class_scenario


@pytest.mark.parametrize(("kind", "factor"), [(EWC, 0.5), (SynapticIntelligence, 1.0)])
@given(strength=st.floats(0, 100), seed=seeds)
@settings(deadline=None, max_examples=20)
def test_the_penalty_pulls_as_its_formula_says(kind, factor, strength, seed):
    """Against autograd of the loss with the penalty; what is reported is the loss without it."""
    torch.manual_seed(seed)
    config = (EWCConfig if kind is EWC else PenaltyConfig)(lr=0.1, strength=strength)
    method = double(kind.build(config, 5, [6], 4))
    parameters = list(method.model.parameters())
    method.anchors = [torch.randn_like(p) for p in parameters]
    method.importance = [torch.rand_like(p) for p in parameters]
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(4, (8,))
    task = F.cross_entropy(method.model(x), y)
    penalty = sum(
        (importance * (p - anchor) ** 2).sum()
        for importance, p, anchor in zip(method.importance, parameters, method.anchors, strict=True)
    )
    gradients = torch.autograd.grad(task + factor * strength * penalty, parameters)
    wanted = [p.detach() - gradient for p, gradient in zip(parameters, gradients, strict=True)]
    loss, _ = method.observe(x, y)
    assert loss == pytest.approx(task.item())
    for parameter, expected in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), expected)
        assert parameter.grad is None


@pytest.mark.parametrize("kind", [EWC, SynapticIntelligence])
def test_nothing_is_held_before_an_experience_has_ended(kind):
    """The same steps as without the penalty, to the bit."""
    config = (EWCConfig if kind is EWC else PenaltyConfig)(lr=0.1, strength=1e9)
    torch.manual_seed(0)
    method = kind.build(config, 7, [8], 6)
    torch.manual_seed(0)
    plain = FullPrecisionMethod.build(FullPrecisionConfig(lr=0.1), 7, [8], 6)
    experience = class_scenario(random_dataset()).train_stream[0]
    for learner in (method, plain):
        for x, y in learner.before_training_exp(experience).batches(5):
            learner.observe(x, y)
    assert all(map(torch.equal, method.model.parameters(), plain.model.parameters()))

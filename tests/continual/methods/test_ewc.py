"""Elastic weight consolidation: the Fisher information is that of single samples, summed over experiences."""

import pytest
import torch
from full_precision import double, random_dataset, seeds, widths
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.continual.methods import EWCConfig
from engram_kernels.continual.methods import ewc as ewc_module
from engram_kernels.continual.methods.ewc import EWC, fisher_diagonal
from engram_kernels.continual.methods.finetune import MLP
from engram_kernels.continual.scenarios import Experience, class_scenario, permuted_scenario


@given(st.integers(1, 9), widths, st.integers(2, 5), st.data())
@settings(deadline=None, max_examples=30)
def test_fisher_is_that_of_single_samples(samples, hidden, classes, draw):
    """Against one backward pass for each sample and label."""
    torch.manual_seed(draw.draw(seeds))
    model = MLP([4, *hidden, classes]).double()
    x = torch.randn(samples, 4, dtype=torch.float64)
    labels = draw.draw(st.none() | st.sets(st.integers(0, classes - 1), min_size=1).map(sorted))
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    for row in x:
        scores = model(row[None])[0]
        scores = scores if labels is None else scores[labels]
        for log_p in scores.log_softmax(0):
            gradients = torch.autograd.grad(log_p, list(model.parameters()), retain_graph=True)
            for total, gradient in zip(wanted, gradients, strict=True):
                total += log_p.exp().detach() * gradient**2 / samples
    for found, expected in zip(fisher_diagonal(model, x, labels), wanted, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", ["all", "batch"])
def test_fisher_of_an_experience_and_of_those_before(loss):
    """More samples than are looked at together, the last chunk smaller; then the earlier Fisher, decayed."""
    scenario = class_scenario(random_dataset(samples=2310))
    config = EWCConfig(lr=0.1, loss=loss, decay=0.7)
    method = double(EWC.build(config, 7, [8, 5], 6))
    wanted = [torch.zeros_like(p) for p in method.model.parameters()]
    for experience in scenario.train_stream:
        with torch.no_grad():
            for parameter in method.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        x, _ = next(experience.batches(len(experience)))
        fisher = fisher_diagonal(method.model, x.double(), experience.classes if loss == "batch" else None)
        wanted = [0.7 * old + new for old, new in zip(wanted, fisher, strict=True)]
        double_samples = Experience(experience.x, experience.y, experience.classes, experience.indices)
        object.__setattr__(double_samples, "samples", lambda rows, e=experience: (e.samples(rows)[0].double(), None))
        method.after_training_exp(double_samples)
        for parameter, anchor in zip(method.model.parameters(), method.anchors, strict=True):
            assert torch.equal(parameter, anchor)
    for found, expected in zip(method.importance, wanted, strict=True):
        torch.testing.assert_close(found, expected)


def test_fisher_looks_at_a_bounded_number_of_samples(monkeypatch):
    monkeypatch.setattr(ewc_module, "FISHER_SAMPLES", 40)
    monkeypatch.setattr(ewc_module, "_CHUNK", 15)
    seen = []

    def count(model, x, classes):
        seen.append(x)
        return [torch.ones_like(p) for p in model.parameters()]

    monkeypatch.setattr(ewc_module, "fisher_diagonal", count)
    method = EWC.build(EWCConfig(lr=0.1), 7, [8], 6)
    method.after_training_exp(permuted_scenario(random_dataset(), tasks=1).train_stream[0])
    assert [len(x) for x in seen] == [15, 15, 10]
    assert len(torch.cat(seen).unique(dim=0)) == 40
    for fisher in method.importance:
        torch.testing.assert_close(fisher, torch.ones_like(fisher))

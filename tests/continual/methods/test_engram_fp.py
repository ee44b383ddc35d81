"""The full-precision twin of the engram network, against its formula and the binary read-out's loss."""

import pytest
import torch
import torch.nn.functional as F
from full_precision import seeds
from hypothesis import given, settings
from hypothesis import strategies as st

import engram_kernels as ek
from engram_kernels.continual.methods import FloatTwinConfig
from engram_kernels.continual.methods.engram_fp import FloatTwin, FloatTwinMethod


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.floats(0.01, 1.0), seeds)
@settings(deadline=None, max_examples=50)
def test_the_twin_is_its_formula(hidden, rate, seed):
    torch.manual_seed(seed)
    model = FloatTwin([5, *hidden, 3], rate, segments=4)
    x = torch.randn(6, 5)
    h = x
    for weight in model.hidden_weights:
        z = F.layer_norm(h @ weight.T, weight.shape[:1])
        recruited = ek.StochasticEngram(rate).recruited(z.shape[1])
        gate = torch.zeros_like(z).scatter(1, z.argsort(dim=1, descending=True, stable=True)[:, :recruited], 1.0)
        h = z.relu() * gate
    torch.testing.assert_close(model.features(x), h)
    cosines = F.cosine_similarity(h[:, None], model.weight[None], dim=2)
    torch.testing.assert_close(model.activations(x), 10.0 * cosines.view(6, 3, 4), rtol=1e-4, atol=1e-4)
    assert torch.equal(model(x), model.activations(x).amax(2))
    model.top_segments = 3
    torch.testing.assert_close(model(x), model.activations(x).sort(dim=2).values[:, :, 1:].mean(2))


def test_the_twin_starts_gaussian_and_keeps_its_hidden_layers():
    method = FloatTwinMethod.build(FloatTwinConfig(lr=0.1, loss="local", segments=3), 100, [400, 300], 6)
    first, second = method.model.hidden_weights
    assert (first * 10).std() == pytest.approx(1.0, abs=0.02)
    assert (second * 20).std() == pytest.approx(1.0, abs=0.02)
    assert method.model.weight.abs().max() <= 0.05
    before = {key: value.clone() for key, value in method.model.state_dict().items()}
    method.observe(torch.randn(9, 100), torch.arange(9) % 6)
    after = method.model.state_dict()
    assert sorted(key for key in before if not torch.equal(before[key], after[key])) == ["weight", "wins"]


@pytest.mark.parametrize("training", [True, False])
def test_the_twin_is_trained_by_the_loss_of_the_binary_read_out(training):
    config = FloatTwinConfig(lr=0.1, loss="local", segments=3, top_segments=2, conscience=2.0)
    method = FloatTwinMethod.build(config, 7, [20], 6)
    method.model.train(training)
    method.model.wins.random_(1, 9)
    readout = ek.DendriticReadout(20, 6, 3, engram=ek.StochasticEngram(0.1), conscience=2.0).train(training)
    readout.wins.copy_(method.model.wins)
    x, y = torch.randn(9, 7), torch.tensor([0, 1, 1, 2, 2, 2, 4, 4, 5])
    loss, scores = method.loss(x, y)
    assert loss == readout.local_loss(method.model.activations(x), y)
    assert torch.equal(scores, method.model(x))
    assert torch.equal(method.model.wins, readout.wins)
    loss.backward()
    moved = method.model.weight.grad.view(6, 3, 20).abs().sum(2) > 0
    assert not moved[3].any(), "no sample of this class"
    assert moved[[0, 1, 2, 4, 5]].any(1).all()


@pytest.mark.parametrize("loss", ["all", "batch"])
def test_the_twin_takes_the_other_losses(loss):
    method = FloatTwinMethod.build(FloatTwinConfig(lr=0.1, loss=loss, segments=3), 7, [20], 6)
    x, y = torch.randn(9, 7), torch.arange(9) % 3
    scores = method.model(x)
    wanted = F.cross_entropy(scores if loss == "all" else scores[:, :3], y)
    torch.testing.assert_close(method.loss(x, y)[0], wanted)

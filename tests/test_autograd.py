"""Gradients by torch.func: per-sample gradients, ensembles and Jacobians are those of a loop."""

import pytest
import torch
from test_layers import unscaled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn import functional

import engram_kernels as ek
from engram_kernels import autograd

X, Y = torch.randn(6, 20, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 2, 1, 3, 0])
MODELS = {
    "real-valued input": lambda: ek.BinaryEngramLinear(20, 4, binary_input=False),
    "binary input": lambda: ek.BinaryEngramLinear(20, 4, engram=ek.StochasticEngram(0.4), ste_window=0.9),
    "network": lambda: ek.EngramMLP((20, 70, 30, 4), engram=ek.StochasticEngram(0.3), readout="linear"),
    "bfloat16 gradients": lambda: ek.EngramMLP(
        (20, 30, 4), engram=None, readout="linear", backward_dtype=torch.bfloat16
    ),
    "dendritic readout": lambda: ek.DendriticReadout(20, 4, 3, engram=ek.StochasticEngram(0.3), ste_window=0.5),
}


def of_loop(model, x, y):
    """Gradients of each sample alone, by backward()."""
    gradients = []
    for i in range(len(x)):
        model.zero_grad()
        functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    return {name: torch.stack([each[name] for each in gradients]) for name in gradients[0]}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_per_sample_gradients_are_those_of_a_loop(make):
    torch.manual_seed(0)
    model = make().eval()

    def loss(parameters, x, y):
        return functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients, expected = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, X, Y), of_loop(model, X, Y)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert not gradient.requires_grad and expected[name].abs().max() > 0
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inputs", [None, 0], ids=["one input", "an input each"])
def test_ensembles_are_a_loop_over_their_members(inputs):
    torch.manual_seed(0)
    members = [
        ek.EngramMLP((20, 70, 30, 4), engram=ek.StochasticEngram(0.3), readout="linear").eval() for _ in range(3)
    ]
    parameters, buffers = stack_module_state(members)
    x = X if inputs is None else torch.stack([X, X + 1, 1 - X])

    def loss(parameters, buffers, x):
        logits = functional_call(members[0], (parameters, buffers), (x,))
        return functional.cross_entropy(logits, Y), logits

    gradients, logits = vmap(grad(loss, has_aux=True), in_dims=(0, 0, inputs))(parameters, buffers, x)
    for i, member in enumerate(members):
        own = member(x if inputs is None else x[i])
        torch.testing.assert_close(logits[i], own)
        functional.cross_entropy(own, Y).backward()
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(gradients[name][i], parameter.grad, rtol=1e-4, atol=1e-6)


def test_jacobians():
    torch.manual_seed(0)
    model = ek.EngramMLP((20, 70, 30, 4), engram=ek.StochasticEngram(0.3), readout="linear", ste_window=2.0).eval()
    x = X[:1].clone().requires_grad_()
    rows = [torch.autograd.grad(model(x)[0, c], x)[0][0] for c in range(4)]
    assert torch.stack(rows).abs().max() > 0
    torch.testing.assert_close(jacrev(model)(X[:1])[0, :, 0], torch.stack(rows), rtol=1e-4, atol=1e-6)


def test_engrams_of_a_batch_of_models_follow_the_randomness_that_vmap_is_told():
    layer = unscaled(200, 50, engram=ek.StochasticEngram(0.1, temperature=float("inf")))
    x = torch.randn(1, 200).expand(4, 3, 200).contiguous()
    with pytest.raises(RuntimeError, match="random operation while in randomness error mode"):
        vmap(layer)(x)
    torch.manual_seed(3)
    same = vmap(layer, randomness="same")(x)
    torch.manual_seed(3)
    assert all(torch.equal(own, layer(x[0])) for own in same[:1]) and torch.equal(same, same[:1].expand(4, -1, -1))
    torch.manual_seed(3)
    different = vmap(layer, randomness="different")(x)
    torch.manual_seed(3)
    draws = [ek.ops.draw_seed() for _ in range(4)]
    for own, seed in zip(different, draws, strict=True):
        gate = ek.ops.sample_engram(x[0], seed, 0.1, temperature=float("inf"))
        bits = ek.ops.pack_signs(x[0])
        assert torch.equal(own, ek.ops.binary_matmul(bits, layer.weight.sign_bits(), 200, gate).float())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_second_derivative_says_why_there_is_none(make):
    model = make().eval()
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expected a first derivative of a binary layer, got a second one"):
        dx.square().sum().backward()
    with pytest.raises(RuntimeError, match="expected a first derivative of a binary layer, got a second one"):
        grad(lambda x: grad(lambda x: model(x).square().sum())(x).square().sum())(X)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters):
        return functional_call(model, parameters, (X,)).square().sum()

    def penalty(parameters):
        return sum(gradient.square().sum() for gradient in grad(loss)(parameters).values())

    with pytest.raises(RuntimeError, match="expected a first derivative of a binary layer, got a second one"):
        grad(penalty)(parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("samples", [0, 1, 300])
def test_the_gradient_of_a_bias_is_the_sum_over_samples(dtype, samples):
    torch.manual_seed(0)
    layer = ek.BinaryEngramLinear(20, 70, bias=True, dtype=dtype)
    d = torch.randn(samples, 70).to(dtype)
    layer(torch.randn(samples, 20).to(dtype)).backward(d)
    assert layer.bias.grad.dtype == dtype
    torch.testing.assert_close(layer.bias.grad, d.double().sum(0).to(dtype), rtol=1e-5, atol=1e-5)


def test_a_bias_has_no_second_derivative():
    layer = ek.BinaryEngramLinear(20, 4, bias=True).requires_grad_(False)
    layer.bias.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(X).square().sum(), layer.bias, create_graph=True)
    with pytest.raises(RuntimeError, match="backward: expected a first derivative of a binary layer"):
        gradient.sum().backward()


ONE_CALL = {
    "real-valued input": dict(binary_input=False),
    "binary input": dict(),
    "window": dict(ste_window=0.7),
    "gate": dict(engram=ek.StochasticEngram(0.4)),
    "gate is the mask": dict(engram=ek.StochasticEngram(0.4), ste_window=float("inf")),
    "no scale, no bias": dict(scaled=False, bias=False),
    "no bias": dict(bias=False),
}


@pytest.mark.parametrize("samples", [0, 1, 9, 150])
@pytest.mark.parametrize("settings", ONE_CALL.values(), ids=ONE_CALL)
def test_one_call_a_layer_gives_the_bits_of_the_operators_that_it_stands_for(isa, settings, samples, monkeypatch):
    layer = ek.BinaryEngramLinear(130, 37, **settings)
    torch.nn.init.normal_(layer.weight)
    x, d = torch.randn(samples, 130), torch.randn(37, samples).T  # not contiguous
    results = []
    for one_call in (True, False):
        if not one_call:
            monkeypatch.setattr(autograd, "_in_one_call", lambda *_: False)
        torch.manual_seed(3)
        own = x.clone().requires_grad_()
        y = layer(own)
        inputs = [own, *layer.parameters()]
        results.append([y, *torch.autograd.grad(y, inputs, d)])
        layer.requires_grad_(False)  # gradients that are not needed
        results[-1] += torch.autograd.grad(layer(own), own, d)
        layer.requires_grad_(True)
        results[-1] += [layer(x), *torch.autograd.grad(layer(x), [*layer.parameters()], d)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_tensors_without_data_pass_a_layer():
    with FakeTensorMode():
        layer, x = ek.BinaryEngramLinear(20, 4), torch.randn(3, 20, requires_grad=True)
        real = ek.BinaryEngramLinear(20, 4, binary_input=False)
        (layer(x) + real(x)).sum().backward()
        assert x.grad.shape == (3, 20) and layer.weight.grad.shape == (4, 20) and real.bias.grad.shape == (4,)

import copy
import functools
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrizations, parametrize, prune

import engram_kernels as ek
from engram_kernels.reference import _unpack

ENGRAMS = {
    "none": lambda: None,
    "stochastic": lambda: ek.StochasticEngram(0.2),
    "bernoulli": lambda: ek.BernoulliEngram(0.2),
    "context": lambda: with_context(ek.ContextEngram(2, 0.2)),
}


def with_context(engram):
    engram.context = 1
    return engram


def sign(v):
    return torch.where(v >= 0, 1.0, -1.0)


# the integers themselves
unscaled = functools.partial(ek.BinaryEngramLinear, bias=False, scaled=False)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, window):
        ctx.save_for_backward(v.abs() <= window)
        return sign(v)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def plain_layer(x, weight, gate, window=1.0):
    """The layer restated in float autograd, gate given as 0 and 1."""
    return (_StraightThrough.apply(x, window) * gate) @ _StraightThrough.apply(weight, float("inf")).T


@pytest.mark.parametrize("engram", ENGRAMS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 3, 31), (100, 65, 129), (7, 300, 784)])
@pytest.mark.parametrize("window", [1.0, float("inf")])
def test_outputs_and_gradients_agree_with_float_autograd(isa, engram, shape, window):
    m, n, k = shape
    layer = unscaled(k, n, engram=ENGRAMS[engram](), ste_window=window)
    x = torch.randn(m, k, requires_grad=True)
    upstream = torch.randn(m, n)
    torch.manual_seed(3)
    y = layer(x)
    y.backward(upstream)

    torch.manual_seed(3)
    gate_bits = None if layer.engram is None else layer.engram(x.detach()).gate_bits
    gate = 1.0 if gate_bits is None else _unpack(gate_bits, k).float()
    x2 = x.detach().clone().requires_grad_()
    w2 = layer.weight.detach().clone().requires_grad_()
    y2 = plain_layer(x2, w2, gate, window)
    y2.backward(upstream)
    assert torch.equal(y, y2)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, w2.grad, rtol=1e-4, atol=1e-4)


def test_real_valued_input_agrees_with_float_autograd(isa):
    layer = unscaled(129, 65, binary_input=False)
    x = torch.randn(10, 129, requires_grad=True)
    upstream = torch.randn(10, 65)
    layer(x).backward(upstream)
    x2, w2 = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    y2 = x2 @ _StraightThrough.apply(w2, float("inf")).T
    y2.backward(upstream)
    torch.testing.assert_close(layer(x), y2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, w2.grad, rtol=1e-4, atol=1e-4)


def test_unrecruited_units_contribute_nothing_and_get_no_gradient():
    layer = unscaled(200, 30, engram=with_context(ek.ContextEngram(2, 0.1)))
    off = ~_unpack(layer.engram(torch.empty(1, 200)).gate_bits, 200)
    x = torch.randn(16, 200, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert (x.grad[:, off] == 0).all() and (layer.weight.grad[:, off] == 0).all()
    assert (layer.weight.grad[:, ~off] != 0).any()
    changed = torch.where(off, -x.detach(), x.detach())
    assert torch.equal(layer(changed), y)


@pytest.mark.parametrize("dims", [(20,), (3, 20), (2, 3, 20), (2, 1, 3, 20), (0, 20)])
def test_inputs_of_any_dimension(dims):
    layer, linear = unscaled(20, 5, bias=True), nn.Linear(20, 5)
    x = torch.randn(*dims)
    assert layer(x).shape == linear(x).shape
    flat = layer(x.reshape(-1, 20))
    assert torch.equal(layer(x).reshape(-1, 5), flat)


@pytest.mark.parametrize("bias", [True, False])
def test_drops_in_for_linear(bias):
    linear = nn.Linear(20, 5, bias)
    layer = ek.BinaryEngramLinear(20, 5, bias)
    assert {n: p.shape for n, p in linear.state_dict().items()} == {n: p.shape for n, p in layer.state_dict().items()}
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(3, 20)
    expected = sign(x) @ sign(linear.weight).T / math.sqrt(20) + (linear.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected)
    linear.load_state_dict(layer.state_dict())
    assert [name for name, _ in ek.BinaryEngramLinear(20, 5).named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("engram", [None, *ENGRAMS])
def test_outputs_of_random_signs_have_unit_variance(engram):
    engram = None if engram is None else ENGRAMS[engram]()
    layer = ek.BinaryEngramLinear(400, 300, engram=engram)
    y = layer(torch.randn(50, 400))
    assert 0.85 < y.var().item() < 1.15
    layer.scaled = False
    assert y.var() < layer(torch.randn(50, 400)).var() / 2
    assert 0.85 < ek.BinaryEngramLinear(400, 300, binary_input=False)(torch.randn(50, 400)).var().item() < 1.15


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, ek.MetaplasticAdam])
def test_any_optimizer_trains_it(make):
    torch.manual_seed(0)
    x = torch.randn(64, 40)
    target = sign(x) @ sign(torch.randn(40, 3))
    layer = unscaled(40, 3)
    optimizer = make(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_copies_pickles_and_moves():
    layer = unscaled(70, 9, bias=True, engram=ek.StochasticEngram(0.5)).eval()
    x = torch.randn(4, 70)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert isinstance(other.weight, ek.HiddenWeight)
        assert torch.equal(other(x), expected)
        other.weight.data.neg_()
        assert torch.equal(other(x) - other.bias, -(expected - layer.bias))
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer.to("cpu")(x), expected)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)
        assert isinstance(half.weight, ek.HiddenWeight) and half(x.to(dtype)).dtype == dtype
    meta = unscaled(70, 9, device="meta")
    assert meta(torch.empty(4, 70, device="meta")).shape == (4, 9)


def test_assigned_weights_become_hidden_weights():
    layer = unscaled(6, 4)
    parameter = nn.Parameter(torch.randn(4, 6))
    layer.weight = parameter
    assert layer.weight is parameter and isinstance(layer.weight, ek.HiddenWeight)
    x = torch.randn(2, 6)
    assert torch.equal(layer(x), sign(x) @ sign(parameter.detach()).T)
    swapped = torch.randn(4, 6)
    assert torch.equal(torch.func.functional_call(layer, {"weight": swapped}, x), sign(x) @ sign(swapped).T)


def converted(layer, how):
    if how == "meta and back":
        with torch.device("meta"):
            layer = unscaled(70, 9)
        layer.to_empty(device="cpu").reset_parameters()
        return layer
    switch = getattr(torch.__future__, f"set_{how}_module_params_on_conversion")
    switch(True)
    try:
        return layer.to(torch.bfloat16).to(torch.float32)
    finally:
        switch(False)


@pytest.mark.parametrize("how", ["meta and back", "overwrite", "swap"])
def test_weights_stay_hidden_weights_through_conversions(how):
    layer = converted(unscaled(70, 9), how)
    layer(torch.randn(4, 70)).sum().backward()
    assert isinstance(layer.weight, ek.HiddenWeight)
    with torch.no_grad():
        layer.weight.mul_(100)
    before = layer.weight.detach().clone()
    layer.weight.grad = before.clone()
    ek.MetaplasticAdam(layer.parameters(), metaplasticity=1e4).step()  # every step would shrink |W|: none may
    torch.testing.assert_close(layer.weight.detach(), before)


class _Masked(nn.Module):
    """A mask as a parametrization: half the synapses are 0."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return weight * self.mask


def _prune(layer):
    return prune.random_unstructured(layer, "weight", 0.5)


def _parametrize(layer):
    parametrize.register_parametrization(layer, "weight", _Masked((torch.rand(layer.weight.shape) > 0.5).float()))
    return layer


def _hook(layer):
    real, mask = layer.weight.detach().clone(), (torch.rand(layer.weight.shape) > 0.5).float()
    del layer.weight
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", real * mask))
    return layer


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mask", [_prune, _parametrize, _hook])
@pytest.mark.parametrize(
    "make",
    [
        lambda: unscaled(70, 9),
        lambda: unscaled(70, 9, binary_input=False),
        lambda: ek.DendriticReadout(70, 3, 3, engram=ek.StochasticEngram(0.5)),
    ],
)
def test_pruned_synapses_are_refused(make, mask, compiled):
    """As signs they would all count +1."""
    layer, x = mask(make()), torch.randn(4, 70)
    if compiled:
        layer = torch.compile(layer, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"weight: expected no exact zeros from what computes it .*prune"):
        layer(x)


def test_zeros_of_a_weight_itself_are_signs():
    layer = unscaled(70, 9)
    nn.init.zeros_(layer.weight)
    x = torch.randn(4, 70)
    assert torch.equal(layer(x), sign(x).sum(1, keepdim=True).expand(4, 9))
    swapped = torch.func.functional_call(layer, {"weight": torch.zeros(9, 70)}, x)
    assert torch.equal(swapped, layer(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: unscaled(70, 9),
        lambda: unscaled(70, 9, binary_input=False),
        lambda: ek.DendriticReadout(70, 3, 3, engram=ek.StochasticEngram(0.5)),
    ],
)
def test_nan_in_weights_and_nan_in_the_input_are_told_apart(make):
    layer, x = make(), torch.randn(4, 70)
    nan = torch.full((), math.nan)
    if getattr(layer, "binary_input", True):
        with pytest.raises(RuntimeError, match=r"\A(x|score): expected"):
            layer(x * nan)
    with torch.no_grad():
        layer.weight[1, 2] = nan
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"\Aweight: expected numbers, got NaN"):
            layer(x)
    with torch.no_grad():
        layer.weight[1, 2] = 1.0
    assert layer(x).isfinite().all()


def test_a_parametrized_layer_moves_and_trains():
    unpruned = prune.random_unstructured(unscaled(70, 9), "weight", 0)
    parametrized = parametrizations.orthogonal(unscaled(70, 9))
    for layer in (unpruned, parametrized):
        layer = layer.to(torch.float32)
        x = torch.randn(4, 70)
        y = layer(x)
        assert torch.equal(y, sign(x) @ sign(layer.weight.detach()).T)
        y.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


def test_layers_made_in_inference_mode_infer():
    with torch.inference_mode():
        layer = unscaled(70, 9)
        x = torch.randn(4, 70)
        assert torch.equal(layer(x), sign(x) @ sign(layer.weight).T)
    assert layer(torch.randn(4, 70)).shape == (4, 9)


def test_backward_after_a_step_is_refused():
    layer = unscaled(70, 9)
    x = torch.randn(4, 70, requires_grad=True)
    y = layer(x).sum()
    layer(x).square().sum().backward()
    ek.MetaplasticAdam(layer.parameters()).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x)


def test_weight_norm_trains_its_factors():
    layer = nn.utils.parametrizations.weight_norm(unscaled(70, 9))
    x = torch.randn(4, 70)
    y = layer(x)
    assert torch.equal(y, sign(x) @ sign(layer.weight.detach()).T)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_autograd_keeps_bits():
    m, n, k = 128, 256, 2048
    layer = unscaled(k, n, engram=ek.StochasticEngram(0.1))
    x = torch.randn(m, k, requires_grad=True)
    w_bits, kept = layer.weight.sign_bits(), []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert w_bits in [t if t is w_bits else None for t in kept]
    activations = [t for t in kept if t is not w_bits]
    assert all(t.dtype == torch.int64 for t in activations)
    # signs, gate and straight-through window: three bits a unit against 32 of the float input
    assert sum(t.nbytes for t in activations) == 3 * x.nbytes // 32
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_train_float32_weights(dtype):
    layer = unscaled(70, 9, engram=ek.StochasticEngram(0.5))
    x = torch.randn(4, 70, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype and x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_graph_breaks_a_network_draws_and_learns_as_eagerly(backend):
    torch._dynamo.reset()
    model = ek.EngramMLP((20, 64, 64, 5), engram=ek.StochasticEngram(0.2), readout="linear")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(8, 20)
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    model.train()
    torch.manual_seed(1)
    eager = [model(x) for _ in range(2)]
    sum(y.square().sum() for y in eager).backward()
    gradients = [p.grad for p in model.parameters()]
    state = torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(1)
    drawn = [compiled(x) for _ in range(2)]
    sum(y.square().sum() for y in drawn).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*eager)
    torch.testing.assert_close(drawn, eager)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_a_network_as_it_comes_compiles_in_evaluation_and_training():
    torch._dynamo.reset()
    model = ek.EngramMLP((784, 64, 5))
    x, y = torch.randn(8, 784), torch.arange(8) % 5
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    expected = model.loss(x, y)
    expected.backward()
    gradient = model.readout.weight.grad.clone()
    model.zero_grad()
    nn.init.ones_(model.readout.wins)
    actual = loss(x, y)
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(model.readout.weight.grad, gradient)
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_draw_each_for_itself(backend):
    torch._dynamo.reset()
    heads = nn.ModuleList(unscaled(100, 30, engram=ek.BernoulliEngram(0.1)) for _ in range(4))
    heads.load_state_dict({f"{i}.weight": heads[0].weight.detach().clone() for i in range(4)})
    compiled = torch.compile(lambda x: torch.stack([head(x) for head in heads]), fullgraph=True, backend=backend)
    x = torch.randn(3, 100)
    torch.manual_seed(1)
    drawn = compiled(x)
    assert len({tuple(own.flatten().tolist()) for own in drawn}) == 4
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.stack([head(x) for head in heads]))


@pytest.mark.parametrize(
    "error, call, message",
    [
        (ValueError, lambda: unscaled(0, 3), "in_features: expected at least 1, got 0"),
        (ValueError, lambda: unscaled(3, 3, ste_window=0), "ste_window: expected above 0, got 0"),
        (
            ValueError,
            lambda: unscaled(3, 3, engram=ek.BernoulliEngram(0.1), binary_input=False),
            "engram: expected None with binary_input=False",
        ),
        (
            ValueError,
            lambda: ek.EngramMLP((3, 3), logit_scale=0),
            "logit_scale: expected a finite number above 0, got 0",
        ),
        (
            RuntimeError,
            lambda: unscaled(3, 4)(torch.randn(2, 5)),
            r"input: expected shape \(\*, 3\), got \(2, 5\)",
        ),
        (RuntimeError, lambda: unscaled(3, 4)(torch.tensor(1.0)), r"input: .*got \(\)"),
        (RuntimeError, lambda: unscaled(3, 4)(torch.zeros(2, 3).long()), "x: expected float32"),
        (RuntimeError, lambda: unscaled(3, 4)(torch.full((2, 3), float("nan"))), "x: .*NaN"),
        (RuntimeError, lambda: unscaled(3, 4).double()(torch.randn(2, 3)), "got float64"),
    ],
)
def test_bad_input_is_named(error, call, message):
    with pytest.raises(error, match=message):
        call()


def test_a_first_layer_takes_images_as_they_come(isa):
    layer = unscaled(65, 33, binary_input=False)
    images = torch.randint(0, 256, (7, 65), dtype=torch.uint8)
    y = layer(images)
    assert y.dtype == torch.float32
    expected = images.float() @ torch.where(layer.weight.detach() >= 0, 1.0, -1.0).T
    assert torch.equal(y, expected)  # integers below 2^24
    d = torch.randn(7, 33)
    y.backward(d)
    torch.testing.assert_close(layer.weight.grad, d.T @ images.float(), rtol=1e-5, atol=1e-3)
    with pytest.raises(RuntimeError, match="x: expected float32"):
        unscaled(65, 33)(images)


def test_bfloat16_backward_rounds_the_factors_of_the_first_gradient():
    x, d = torch.randn(20, 65), torch.randn(20, 33)
    layer = unscaled(65, 33, binary_input=False, backward_dtype=torch.bfloat16)
    layer(x).backward(d)
    expected = d.bfloat16().double().T @ x.bfloat16().double()
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=2**-7, atol=2**-7)
    assert not torch.equal(layer.weight.grad, d.T @ x)
    fused = unscaled(65, 33, binary_input=False, backward_dtype=torch.bfloat16)
    fused.load_state_dict(layer.state_dict())
    ek.MetaplasticAdam(layer.parameters()).step()
    optimizer = ek.MetaplasticAdam(fused.parameters(), fuse_backward=True)
    fused(x).backward(d)
    optimizer.step()
    torch.testing.assert_close(fused.weight, layer.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [dict(), dict(binary_input=False, backward_dtype=torch.float16)])
def test_unsupported_backward_dtypes_are_named(settings):
    with pytest.raises(ValueError, match="backward_dtype: expected None, or torch.bfloat16"):
        unscaled(3, 3, **{"backward_dtype": torch.bfloat16} | settings)

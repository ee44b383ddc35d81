"""Convolutions of bits: the operators against the reference, the layer against float autograd and nn.Conv2d."""

import copy
import io

import pytest
import torch
from test_ops import FLOATS, assert_close, fake_refuses
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.library import opcheck
from torch.nn.utils import parametrizations, prune

import engram_kernels as ek
from engram_kernels import ops, reference, unfolding
from engram_kernels.reference import Window, words_for

GATES = ["none", "shared", "per sample"]
# size, channels, kernel, stride, padding (top, bottom, left, right), dilation, groups, outputs
WINDOWS = {
    "one pixel": ((1, 1, 1), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 1),
    "3 channels": ((7, 9, 3), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 5),
    "64 channels": ((6, 5, 64), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 33),
    "65 channels": ((5, 6, 65), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 17),
    "130 channels, 1x1": ((4, 4, 130), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 20),
    "5x1, stride 2": ((11, 6, 3), (5, 1), (2, 1), (2, 2, 0, 0), (1, 1), 1, 4),
    "stride 2, dilation 2": ((9, 10, 20), (3, 3), (2, 2), (3, 3, 3, 3), (2, 2), 1, 6),
    "uneven padding": ((5, 5, 7), (2, 4), (1, 1), (0, 1, 1, 2), (1, 1), 1, 3),
    "stride past the kernel": ((8, 8, 5), (2, 2), (3, 3), (0, 0, 0, 0), (1, 1), 1, 3),
    "all padding at the corners": ((2, 2, 3), (2, 2), (1, 1), (3, 3, 3, 3), (1, 1), 1, 2),
    "2 groups": ((5, 5, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2, 8),
    "a group a channel": ((6, 4, 5), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 5, 10),
    "groups of 64": ((4, 4, 128), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2, 34),
    "no dilation": ((3, 3, 9), (4, 5), (1, 1), (1, 0, 0, 1), (0, 0), 1, 2),
}


def window_of(name):
    size, kernel, stride, padding, dilation, groups, outputs = WINDOWS[name]
    return Window(*size, *kernel, *stride, *padding, *dilation, groups), outputs


def bits_of(rows, k, rate=0.5):
    return reference._pack(torch.rand(rows, k) < rate)


def gate_of(kind, rows, k, rate=0.4):
    if kind == "none":
        return None
    return bits_of(rows, k, rate) if kind == "per sample" else bits_of(1, k, rate)[0]


@pytest.fixture(params=[name for name in WINDOWS if name != "no dilation"])
def window(request):
    return request.param


# ---- operators


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("samples", [0, 1, 3])
def test_unfolded_bits_are_the_taps(isa, window, samples):
    w, _ = window_of(window)
    bits = bits_of(samples, w.units)
    for group in range(w.groups):
        expected = reference.unfold_bits(bits, w, group)
        assert torch.equal(ops.unfold_bits(bits, w, group), expected)


@pytest.mark.parametrize("rows, k", [(1, 1), (3, 49), (64, 64), (65, 100), (130, 1025), (64, 16)])
def test_interleaved_bits_are_exact(isa, rows, k):
    bits = bits_of(3 * rows, k)
    expected = reference.interleave_bits(bits, rows, k)
    assert torch.equal(ops.interleave_bits(bits, rows, k), expected)
    assert torch.equal(expected, reference.pack_signs(reference.unpack_signs(bits, k).view(3, rows, k).mT.flatten(1)))
    assert ops.interleave_bits(bits[:0], rows, k).shape == (0, words_for(rows * k))


@pytest.mark.parametrize("gate", GATES)
def test_convolutions_are_exact(isa, window, gate):
    w, outputs = window_of(window)
    for samples in (0, 1, 4):
        x, filters = bits_of(samples, w.units), bits_of(outputs, w.group_units)
        gate_bits = gate_of(gate, samples, w.units)
        y = ops.binary_conv2d(x, filters, w, gate_bits)
        expected = reference.binary_conv2d(x, filters, w, gate_bits)
        assert y.dtype == torch.float32 and torch.equal(y, expected)
        assert torch.equal(ops.binary_conv2d(x, filters, w, gate_bits, 0.3), expected * torch.tensor(0.3))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_are_those_of_the_reference(isa, window, gate, dtype):
    w, outputs = window_of(window)
    for samples, rate in ((0, 0.4), (1, 0.9), (4, 0.05)):
        x, filters = bits_of(samples, w.units), bits_of(outputs, w.group_units)
        d = torch.randn(samples, w.out_height, w.out_width, outputs).to(dtype)
        gate_bits = gate_of(gate, samples, w.units, rate)
        mask = bits_of(samples, w.units) if gate_bits is None else gate_bits
        dx = ops.masked_conv2d_input_grad(d, filters, w, mask, 0.5)
        assert_close(
            dx, reference.masked_conv2d_input_grad(d, filters, w, mask, 0.5), w.kernel_h * w.kernel_w * outputs
        )
        dw = ops.gated_conv2d_weight_grad(d, x, w, gate_bits, 0.5)
        assert_close(dw, reference.gated_conv2d_weight_grad(d, x, w, gate_bits, 0.5), d.numel() / outputs + 1)


def test_gradients_of_whole_numbers_are_exact(isa, window):
    w, outputs = window_of(window)
    d = torch.randint(-8, 9, (3, w.out_height, w.out_width, outputs)).float()
    x, filters, mask = bits_of(3, w.units), bits_of(outputs, w.group_units), bits_of(3, w.units)
    dx = ops.masked_conv2d_input_grad(d, filters, w, mask)
    assert torch.equal(dx, reference.masked_conv2d_input_grad(d, filters, w, mask))
    for gate_bits in (None, mask):
        dw = ops.gated_conv2d_weight_grad(d, x, w, gate_bits)
        assert torch.equal(dw, reference.gated_conv2d_weight_grad(d, x, w, gate_bits))


def test_more_pixels_than_are_unfolded_at_once(isa):
    """Several blocks of the gradient of the filters, whose sums are added."""
    w = Window(64, 64, 200, 3, 3, 1, 1, 1, 1, 1, 1)
    x, d = bits_of(3, w.units), torch.randint(-3, 4, (3, 64, 64, 3)).float()
    filters, mask = bits_of(3, w.group_units), bits_of(3, w.units)
    assert torch.equal(ops.gated_conv2d_weight_grad(d, x, w), reference.gated_conv2d_weight_grad(d, x, w))
    dx = ops.masked_conv2d_input_grad(d, filters, w, mask)
    assert torch.equal(dx, reference.masked_conv2d_input_grad(d, filters, w, mask))
    assert torch.equal(ops.binary_conv2d(x, filters, w), reference.binary_conv2d(x, filters, w))


@pytest.mark.parametrize("samples", [1, 7])
def test_results_do_not_depend_on_the_number_of_threads(isa, samples):
    w = Window(13, 12, 70, 3, 3, 1, 1, 1, 1, 1, 1)
    x, filters, gate = bits_of(samples, w.units), bits_of(30, w.group_units), bits_of(samples, w.units)
    d = torch.randn(samples, w.out_height, w.out_width, 30)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(
            [
                ops.binary_conv2d(x, filters, w, gate),
                ops.masked_conv2d_input_grad(d, filters, w, gate),
                ops.gated_conv2d_weight_grad(d, x, w),
                ops.gated_conv2d_weight_grad(d, x, w, gate),
            ]
        )
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_bits_in_the_padding_of_rows_do_not_count(isa):
    w = Window(5, 4, 7, 3, 3, 1, 1, 1, 1, 1, 1)
    padding, filter_padding = (~reference._pack(torch.ones(k, dtype=torch.bool)) for k in (w.units, w.group_units))
    x, filters, gate = bits_of(2, w.units), bits_of(3, w.group_units), bits_of(2, w.units)
    d = torch.randn(2, 5, 4, 3)
    for gate_bits in (None, gate):
        padded = None if gate_bits is None else gate_bits | padding
        y = ops.binary_conv2d(x | padding, filters | filter_padding, w, padded)
        assert torch.equal(y, ops.binary_conv2d(x, filters, w, gate_bits))
        dw = ops.gated_conv2d_weight_grad(d, x | padding, w, padded)
        assert torch.equal(dw, ops.gated_conv2d_weight_grad(d, x, w, gate_bits))
    dx = ops.masked_conv2d_input_grad(d, filters | filter_padding, w, gate | padding)
    assert torch.equal(dx, ops.masked_conv2d_input_grad(d, filters, w, gate))


@pytest.mark.parametrize("gate", GATES)
def test_the_composition_that_cuda_takes_is_the_same(window, gate, monkeypatch):
    """Its parts are operators that the emulator checks; here they run on the CPU, one sample at a time."""
    monkeypatch.setattr(unfolding, "_UNFOLDED_BYTES", 1)
    w, outputs = window_of(window)
    x, filters, gate_bits = bits_of(3, w.units), bits_of(outputs, w.group_units), gate_of(gate, 3, w.units)
    d = torch.randint(-8, 9, (3, w.out_height, w.out_width, outputs)).float()
    mask = bits_of(3, w.units) if gate_bits is None else gate_bits
    y = unfolding.binary_conv2d(x, filters, list(w), gate_bits, 0.3)
    assert torch.equal(y, ops.binary_conv2d(x, filters, w, gate_bits, 0.3))
    dx = unfolding.masked_conv2d_input_grad(d, filters, list(w), mask)
    assert torch.equal(dx, ops.masked_conv2d_input_grad(d, filters, w, mask))
    dw = unfolding.gated_conv2d_weight_grad(d, x, list(w), gate_bits)
    assert torch.equal(dw, ops.gated_conv2d_weight_grad(d, x, w, gate_bits))


@pytest.mark.slow
def test_operators_pass_opcheck():
    o, w = torch.ops.engram_kernels, list(Window(5, 4, 7, 3, 3, 1, 1, 1, 1, 1, 1))
    x, filters, gate, d = bits_of(2, 140), bits_of(3, 63), bits_of(2, 140), torch.randn(2, 5, 4, 3)
    tests = ("test_schema", "test_faketensor")
    opcheck(o.unfold_bits.default, (x, w), test_utils=tests)
    opcheck(o.interleave_bits.default, (x, 2, 140), test_utils=tests)
    opcheck(o.binary_conv2d.default, (x, filters, w, gate, 0.5), test_utils=tests)
    opcheck(o.masked_conv2d_input_grad.default, (d, filters, w, gate), test_utils=tests)
    opcheck(o.gated_conv2d_weight_grad.default, (d, x, w, gate), test_utils=tests)


def test_operators_name_what_is_wrong():
    o, w = torch.ops.engram_kernels, Window(5, 4, 7, 3, 3, 1, 1, 1, 1, 1, 1)
    x, filters, d = bits_of(2, 140), bits_of(3, 63), torch.randn(2, 5, 4, 3)
    wide = bits_of(2, 300)
    for operator, name, *arguments in (
        (o.unfold_bits, "bits", wide, w),
        (o.unfold_bits, "group", x, w, 1),
        (o.interleave_bits, "bits", x, 3, 140),
        (o.interleave_bits, "rows", x, 0, 140),
        (o.binary_conv2d, "x_bits", wide, filters, w),
        (o.binary_conv2d, "w_bits", x, wide, w),
        (o.binary_conv2d, "gate_bits", x, filters, w, wide),
        (o.masked_conv2d_input_grad, "d", d[:, :3], filters, w, x),
        (o.masked_conv2d_input_grad, "d", d.double(), filters, w, x),
        (o.masked_conv2d_input_grad, "mask_bits", d, filters, w, x[:1]),
        (o.gated_conv2d_weight_grad, "x_bits", d, x[:1], w),
        (o.gated_conv2d_weight_grad, "d", d[0], x, w),
        (o.gated_conv2d_weight_grad, "d", d[..., :0], x, w),
        (o.binary_conv2d, "w_bits", x, filters[:0], w),
        (o.gated_conv2d_weight_grad, "gate_bits", d, x, w, wide),
    ):
        fake_refuses(operator, name, *arguments)
    for changed in (
        {"height": 0}, {"stride_h": 0}, {"top": -1}, {"dilation_w": 0}, {"groups": 2}, {"groups": 0},
        {"kernel_h": 8}, {"kernel_w": 7}, {"height": 2**31 - 1}, {"channels": 2**31 - 1},
    ):  # fmt: skip
        fake_refuses(o.binary_conv2d, "window", x, filters, list(w._replace(**changed)))
    fake_refuses(o.unfold_bits, "window", x, list(w)[:13])
    fake_refuses(o.unfold_bits, "window", x, list(w._replace(kernel_h=2**31 - 1, dilation_h=0)))


# ---- the layer


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, window):
        ctx.save_for_backward(v.abs() <= window)
        return torch.where(v >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def plain_layer(layer, x, weight, gate=1.0):
    """The layer in float autograd, gate (B, C, height, width) of 0 and 1."""
    plain = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.groups, bias=False,
    )  # fmt: skip
    signs = _StraightThrough.apply(weight, float("inf"))
    image = _StraightThrough.apply(x, layer.ste_window) * gate if layer.binary_input else x
    return torch.func.functional_call(plain, {"weight": signs}, (image,))


SETTINGS = {
    "3x3": dict(in_channels=3, out_channels=5, kernel_size=3, padding=1),
    "64 channels": dict(in_channels=64, out_channels=16, kernel_size=3, padding="same"),
    "valid": dict(in_channels=5, out_channels=4, kernel_size=(2, 3), padding="valid"),
    "same, even kernel": dict(in_channels=5, out_channels=4, kernel_size=(2, 4), padding="same", dilation=(1, 2)),
    "strided": dict(in_channels=7, out_channels=4, kernel_size=(5, 1), stride=(2, 3), padding=(3, 0)),
    "groups": dict(in_channels=6, out_channels=9, kernel_size=3, groups=3, padding=2, dilation=2),
    "depthwise": dict(in_channels=4, out_channels=4, kernel_size=3, groups=4, padding=1),
}
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


def layer_of(settings, **more):
    return ek.BinaryEngramConv2d(**SETTINGS[settings], **({"bias": False, "scaled": False} | more))


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_outputs_and_gradients_agree_with_float_autograd(isa, settings, layout, binary_input):
    layer = layer_of(settings, binary_input=binary_input, ste_window=0.8)
    x = torch.randn(3, layer.in_channels, 10, 11).to(memory_format=LAYOUTS[layout]).requires_grad_()
    plain_x, weight = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    y, expected = layer(x), plain_layer(layer, plain_x, weight)
    d = torch.randint(-4, 5, expected.shape).float()
    y.backward(d)
    expected.backward(d)
    if binary_input:
        assert torch.equal(y, expected) and torch.equal(x.grad, plain_x.grad)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(layer.weight.grad, weight.grad)
    else:
        for own, wanted in ((y, expected), (x.grad, plain_x.grad), (layer.weight.grad, weight.grad)):
            torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-4)
    assert layer.weight.grad.shape == layer.weight.shape


@pytest.mark.parametrize("gates", ["channels", "units"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engram", ["stochastic", "bernoulli", "context"])
def test_engrams_gate_channels_or_units(engram, layout, gates):
    rules = {"stochastic": ek.StochasticEngram(0.4), "bernoulli": ek.BernoulliEngram(0.4)}
    rule = rules[engram] if engram in rules else ek.ContextEngram(2, 0.4)
    if engram == "context":
        rule.context = 1
    layer = layer_of("3x3", engram=rule, gates=gates)
    x = torch.randn(4, 3, 6, 5).to(memory_format=LAYOUTS[layout]).requires_grad_()
    state = torch.get_rng_state()
    y = layer(x)
    torch.set_rng_state(state)
    scores = x.detach().mean((2, 3)) if gates == "channels" else x.detach().permute(0, 2, 3, 1).flatten(1)
    gate = (ops.unpack_signs(rule(scores).gate_bits, scores.shape[1]) > 0).float()
    gate = gate.view(-1, 3, 1, 1) if gates == "channels" else gate.view(-1, 6, 5, 3).permute(0, 3, 1, 2)
    plain_x, weight = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    expected = plain_layer(layer, plain_x, weight, gate)
    d = torch.randint(-4, 5, y.shape).float()
    y.backward(d)
    expected.backward(d)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, plain_x.grad) and torch.equal(layer.weight.grad, weight.grad)


def test_random_signs_give_outputs_of_unit_variance():
    for engram, gates in (
        (None, "channels"),
        (ek.StochasticEngram(0.25), "channels"),
        (ek.StochasticEngram(0.25), "units"),
    ):
        layer = layer_of("64 channels", scaled=True, engram=engram, gates=gates)
        inside = layer(torch.randn(20, 64, 12, 12))[:, :, 1:-1, 1:-1]
        assert 0.8 < inside.std() < 1.2
    layer = layer_of("64 channels", scaled=True, engram=ek.BernoulliEngram(0.25)).eval()
    ungated = layer_of("64 channels")
    ungated.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64, 5, 5)
    torch.testing.assert_close(layer(x), ungated(x) * 0.25 / (64 * 9 * 0.25) ** 0.5)


def test_it_takes_the_place_of_torchs_layer():
    plain = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
    layer = ek.BinaryEngramConv2d(6, 8, 3, stride=2, padding=1, groups=2)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight) and layer.bias.shape == (8,)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 9, 9)
    assert layer(x).shape == plain(x).shape and layer(x[0]).shape == plain(x[0]).shape
    torch.testing.assert_close(layer(x)[0], layer(x[0]))
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 2 * 25.0))
    assert layer(x[:0]).shape == (0, 8, 5, 5)
    for dtype in FLOATS[1:]:
        half = copy.deepcopy(layer).to(dtype)
        z = half(x.to(dtype).requires_grad_())
        z.sum().backward()
        assert z.dtype == half.weight.grad.dtype == dtype


def test_only_bits_are_kept_for_backward():
    layer, x = layer_of("64 channels"), torch.randn(8, 64, 16, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert all(t.dtype == torch.int64 for t in kept)
    assert sum(t.nbytes for t in kept) < x.nbytes / 10


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("settings", ["3x3", "groups"])
def test_metaplastic_adam_updates_rows_and_keeps_the_signs_fresh(settings, state_dtype):
    """fuse_backward, the operator on rows, and filters that lie channels first: all the same numbers."""
    layers = [layer_of(settings) for _ in range(3)]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    layers[2].weight.data = layers[2].weight.data.contiguous()
    optimizers = [
        ek.MetaplasticAdam(layer.parameters(), lr=0.05, state_dtype=state_dtype, fuse_backward=i == 1)
        for i, layer in enumerate(layers)
    ]
    before = layers[0].weight.detach().clone()
    for _ in range(3):
        x = torch.randn(4, layers[0].in_channels, 8, 8)
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    assert layers[1].weight.grad is None and not torch.equal(layers[0].weight, before)
    for layer in layers:
        assert torch.equal(layer.weight, layers[0].weight)
        rows = layer.weight.detach().permute(0, 2, 3, 1).flatten(1)
        assert torch.equal(layer.weight.sign_bits(), reference.pack_signs(rows))
    assert optimizers[0].state[layers[0].weight]["exp_avg"].shape == rows.shape


def test_an_update_is_that_of_the_operator_on_rows():
    layer = layer_of("3x3")
    rows = layer.weight.detach().permute(0, 2, 3, 1).flatten(1).clone()
    optimizer = ek.MetaplasticAdam([layer.weight], lr=0.01, metaplasticity=2.0)
    layer(torch.randn(4, 3, 8, 8)).square().mean().backward()
    grad = layer.weight.grad.permute(0, 2, 3, 1).flatten(1)
    settings = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, metaplasticity=2.0, step=1)
    moments = torch.zeros(2, *rows.shape)
    ops.metaplastic_adam_(rows, grad, moments[0], moments[1], None, lr=0.01, **settings)
    optimizer.step()
    assert torch.equal(layer.weight.detach().permute(0, 2, 3, 1).flatten(1), rows)


def test_checkpoints_copies_and_conversions_keep_the_weight_hidden():
    layer = layer_of("groups")
    optimizer = ek.MetaplasticAdam(layer.parameters(), state_dtype=torch.int8)
    layer(torch.randn(2, 6, 8, 8)).sum().backward()
    optimizer.step()
    other = ek.MetaplasticAdam(layer.parameters(), state_dtype=torch.int8)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[layer.weight]["exp_avg"], optimizer.state[layer.weight]["exp_avg"])
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = layer_of("groups")
    loaded.load_state_dict(torch.load(file), assign=True)
    for copied in (copy.deepcopy(layer), loaded, copy.deepcopy(layer).double().float()):
        assert isinstance(copied.weight, ek.HiddenWeight) and torch.equal(copied.weight, layer.weight)
        assert torch.equal(copied.weight.sign_bits(), layer.weight.sign_bits())


def test_convert_replaces_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.ReLU(), nn.Conv2d(8, 4, (3, 1), 2))
    weight = model[2].weight
    x = torch.randn(2, 3, 9, 9)
    expected = plain_layer(layer := ek.BinaryEngramConv2d(8, 4, (3, 1), 2), x.new_ones(2, 8, 9, 9), weight.detach())
    converted = ek.convert(model, lambda name, layer: name == "2", scaled=False)
    assert type(converted[0]) is nn.Conv2d and type(converted[2]) is ek.BinaryEngramConv2d
    assert converted[2].weight is weight and isinstance(weight, ek.HiddenWeight)
    assert torch.equal(converted[2](torch.ones(2, 8, 9, 9)), expected + converted[2].bias.view(-1, 1, 1))
    assert converted(x).shape == (2, 4, 4, 5) and layer.stride == (2, 2)
    with pytest.raises(ValueError, match="padding_mode: expected 'zeros', got 'reflect'"):
        ek.convert(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))


def test_summary_counts_operations_and_bits():
    layer = ek.BinaryEngramConv2d(64, 32, 3, padding=1, bias=False, engram=ek.StochasticEngram(0.5))
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    own = ek.summary(layer, x)
    assert own.layers[0].binary_operations == 2 * 64 * 64 * 9 * 32
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert own.saved_bytes == sum(t.nbytes for t in kept if t.data_ptr() != layer.weight.sign_bits().data_ptr())
    assert own.hidden_bytes == layer.weight.nbytes and own.sign_bytes == 32 * 16 * 5
    first = ek.BinaryEngramConv2d(3, 8, 3, binary_input=False)
    assert ek.summary(first, torch.randn(2, 3, 8, 8)).layers[0].real_operations == 2 * 36 * 27 * 8


def test_gradients_by_torch_func_are_those_of_a_loop():
    second = ek.BinaryEngramConv2d(5, 4, 3, padding=1, engram=ek.StochasticEngram(0.5))
    model = nn.Sequential(layer_of("3x3", binary_input=False), second).eval()
    x = torch.randn(3, 3, 6, 6)

    def loss(parameters, x):
        return functional_call(model, parameters, (x[None],)).square().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name][i], p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_and_exported_layers_give_the_same():
    model = nn.Sequential(
        ek.BinaryEngramConv2d(3, 8, 3, padding=1, binary_input=False), nn.BatchNorm2d(8),
        ek.BinaryEngramConv2d(8, 4, 3, stride=2, engram=ek.StochasticEngram(0.5)),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), expected)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((3, 4, 0), ValueError, "kernel_size: expected at least 1, got 0"),
        ((3, 4, "3"), TypeError, "kernel_size: expected a whole number or two of them, got '3'"),
        ((3, 4, (3, 3, 3)), TypeError, r"kernel_size: expected a whole number or two of them, got \(3, 3, 3\)"),
        ((3, 4, 3, 0), ValueError, "stride: expected at least 1, got 0"),
        ((3, 4, 3, 1, -1), ValueError, "padding: expected at least 0, got -1"),
        ((3, 4, 3, 1, "full"), ValueError, "padding: expected a number, two of them, 'valid' or 'same', got 'full'"),
        ((3, 4, 3, 2, "same"), ValueError, r"padding: expected a number or 'valid' with stride \(2, 2\), got 'same'"),
        ((3, 4, 3, 1, 0, 1, 2), ValueError, "in_channels: expected a multiple of 2 groups, got 3"),
        ((4, 3, 3, 1, 0, 1, 2), ValueError, "out_channels: expected a multiple of 2 groups, got 3"),
        ((3, 4, 3, 1, 0, 1, 1, True, "circular"), ValueError, "padding_mode: expected 'zeros', got 'circular'"),
        ((0, 4, 3), ValueError, "in_channels: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ek.BinaryEngramConv2d(*arguments)


def test_bad_settings_and_inputs_are_named():
    for settings, error, message in (
        ({"gates": "pixels"}, ValueError, "gates: expected 'channels' or 'units', got 'pixels'"),
        ({"engram": 0.1}, TypeError, "engram: expected an engram"),
        ({"engram": ek.BernoulliEngram(0.1), "binary_input": False}, ValueError, "engram: expected None"),
        ({"dtype": torch.float64}, ValueError, "dtype: expected float32, bfloat16 or float16"),
        ({"ste_window": 0}, ValueError, "ste_window: expected above 0"),
    ):
        with pytest.raises(error, match=message):
            layer_of("3x3", **settings)
    layer = layer_of("valid")
    with pytest.raises(RuntimeError, match=r"input: expected shape \(B, 5, height, width\)"):
        layer(torch.randn(2, 4, 9, 9))
    with pytest.raises(RuntimeError, match="a kernel that fits into the padded height 1, got one of 2"):
        layer(torch.randn(2, 5, 1, 9))
    with pytest.raises(RuntimeError, match="x: expected numbers, got NaN"):
        layer(torch.full((2, 5, 9, 9), float("nan")))
    with pytest.raises(RuntimeError, match="x: expected float32, bfloat16 or float16"):
        layer(torch.randn(2, 5, 9, 9).double())
    with pytest.raises(ValueError, match="weight: expected 4 dimensions"):
        layer.weight = nn.Parameter(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="first derivative"):
        x = torch.randn(2, 5, 9, 9, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()
    assert "kernel_size=(2, 3)" in repr(layer) and "padding='valid'" in repr(layer)


def test_weights_that_are_computed_and_pruned():
    layer = layer_of("3x3")
    prune.custom_from_mask(layer, "weight", torch.arange(135).view(5, 3, 3, 3) % 2)
    with pytest.raises(RuntimeError, match="weight: expected no exact zeros"):
        layer(torch.randn(1, 3, 5, 5))
    layer = layer_of("3x3")
    parametrizations.weight_norm(layer)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(layer(x), plain_layer(layer, x, layer.weight))

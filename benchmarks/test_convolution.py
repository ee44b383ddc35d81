"""Binary convolutions beside torch's: forward, in training, and what they keep. Middle layers of small networks."""

import pytest
import report
import torch
from convolution_probe import peak_bytes_in_fresh_process
from torch import nn

import engram_kernels as ek

BATCH = 32
SIZES = [(64, 32), (128, 16), (128, 32), (256, 16)]  # channels, height and width
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def _pair(channels, size, layout, **settings):
    """Ours and torch's layer, and an input for them."""
    x = torch.randn(BATCH, channels, size, size).to(memory_format=LAYOUTS[layout])
    plain = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=LAYOUTS[layout])
    return ek.BinaryEngramConv2d(channels, channels, 3, padding=1, bias=False, **settings), plain, x


def _work(channels, size):
    return BATCH * size * size * 9 * channels * channels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels, size", SIZES)
def test_convolution_forward(side_by_side, target, threads, channels, size, layout):
    layer, plain, x = _pair(channels, size, layout)
    with torch.no_grad():
        side_by_side(
            f"conv 3x3 {channels} channels, {BATCH}x{size}x{size} {layout}", target, lambda: layer(x),
            {"nn.Conv2d fp32": lambda: plain(x)}, work=_work(channels, size), rate_unit="GMAC/s",
        )  # fmt: skip


@pytest.mark.parametrize("rate", [None, 0.25], ids=["ungated", "rate0.25"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels, size", SIZES)
def test_convolution_forward_and_backward(side_by_side, target, threads, channels, size, layout, rate):
    engram = None if rate is None else ek.StochasticEngram(rate)
    layer, plain, x = _pair(channels, size, layout, engram=engram)
    x.requires_grad_()
    gradients = {own: torch.randn_like(own(x)) for own in (layer, plain)}  # in the layout of the outputs

    def train(own):
        x.grad = own.weight.grad = None
        own(x).backward(gradients[own])

    gates = "" if rate is None else f", channels at rate {rate}"
    side_by_side(
        f"conv 3x3 {channels} channels, {BATCH}x{size}x{size} {layout}{gates}", target, lambda: train(layer),
        {"nn.Conv2d fp32": lambda: train(plain)}, work=3 * _work(channels, size), rate_unit="GMAC/s",
    )  # fmt: skip


@pytest.mark.parametrize("channels, size", SIZES)
def test_convolution_kept_for_backward(channels, size):
    """What a layer keeps, in bytes: at most a third of what torch's keeps. Exact, so no timing."""
    layer, plain, x = _pair(channels, size, "NHWC", engram=ek.StochasticEngram(0.25))
    x.requires_grad_()

    def kept_by(own):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            own(x)
        return sum(kept.values())

    assert 3 * kept_by(layer) <= kept_by(plain)


@pytest.mark.parametrize("layers", [1, 8, 24])
@pytest.mark.parametrize("channels, size", [(64, 32), (256, 16)])
@pytest.mark.parametrize("update", [False, True])
def test_convolution_peak_memory(benchmark, target, channels, size, layers, update):
    """Of a training step of a stack; what one layer keeps grows with the stack, images under way do not."""
    ours = benchmark.pedantic(peak_bytes_in_fresh_process, ("signs", channels, size, layers, update), rounds=1)
    theirs = peak_bytes_in_fresh_process("floats", channels, size, layers, update)
    name = f"{layers} conv 3x3, {channels} channels, {BATCH}x{size}x{size}" + (", with the update" if update else "")
    row = report.Row("convolution peak memory above import", name, target.isa, 2, peak_bytes=ours)
    row.baselines.append(report.Baseline("nn.Conv2d fp32", theirs / ours if ours else None, peak_bytes=theirs))
    report.add(row, benchmark)

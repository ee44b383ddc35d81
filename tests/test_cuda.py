"""Operators, layers and training on a CUDA device; tests/emulator runs the same kernels without one."""

import copy
import itertools

import pytest
import torch
from torch.library import opcheck

import engram_kernels as ek
from engram_kernels import ops, reference
from engram_kernels.reference import Window

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 5, 31), (8, 64, 300), (9, 7, 128), (33, 65, 127), (100, 512, 784), (257, 130, 1030)]
GATES = ["none", "shared", "per sample"]
WINDOWS = [  # of convolutions, and their outputs
    (Window(7, 9, 3, 3, 3, 1, 1, 1, 1, 1, 1), 5),
    (Window(9, 10, 20, 3, 3, 2, 2, 3, 3, 3, 3, 2, 2), 6),
    (Window(4, 4, 128, 3, 3, 1, 1, 1, 1, 1, 1, groups=2), 34),
    (Window(11, 6, 65, 5, 1, 2, 1, 2, 2), 17),
]


def bits_of(rows, k):
    return reference.pack_signs(torch.randn(rows, k))


def gate_of(kind, m, k, rate=0.3):
    if kind == "none":
        return None
    gate = reference._pack(torch.rand(m, k) < rate)
    return gate[0].contiguous() if kind == "shared" else gate


def on_cuda(*arguments):
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]


def assert_close(actual, expected, terms):
    """Agreement to what float32 accumulation of `terms` numbers of order 1 allows, and rounding to the result."""
    assert actual.is_cuda and actual.dtype == expected.dtype and actual.shape == expected.shape
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual.cpu().float(), expected.float(), rtol=4 * eps, atol=4 * terms**0.5 * (eps + 1e-6))


def test_without_a_usable_device_the_state_of_cuda_is_told():
    error = torch.ops.engram_kernels._cuda_error(0)
    if torch.cuda.is_available() and ops.build_info()["cuda"] == "yes":
        assert error == ""
    elif ops.build_info()["cuda"] == "yes":
        assert "driver" in error or "device" in error
    else:
        assert error.startswith("this build of engram_kernels has no CUDA kernels")


# ---- operators


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 31, 64, 127, 128, 784, 1001])
def test_packing_is_exact(k, dtype):
    x = torch.randn(37, k).to(dtype)
    x[0, 0], x[1, 0] = 0.0, -0.0
    bits = reference.pack_signs(x)
    assert torch.equal(ops.pack_signs(x.cuda()).cpu(), bits)
    for out in (*FLOATS, torch.float64, torch.int8, torch.int32):
        assert torch.equal(ops.unpack_signs(bits.cuda(), k, out).cpu(), reference.unpack_signs(bits, k, out))
    for kind in GATES:
        gate = gate_of(kind, 37, k)
        assert torch.equal(ops.pack_window(*on_cuda(x, 0.5, gate)).cpu(), reference.pack_window(x, 0.5, gate))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 31, 128, 1001, 4096])
def test_standardised_samples_have_the_same_bits(n, dtype):
    y, d = (torch.randn(37, n) + 1).to(dtype), torch.randn(37, n).to(dtype)
    expected = ops.standardise(y)  # on the CPU, tested against the reference elsewhere
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ops.standardise(y.cuda()), expected, strict=True))
    dy = ops.standardise_grad(*on_cuda(d, y, expected[1]))
    assert torch.equal(dy.cpu(), ops.standardise_grad(d, y, expected[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("m, n, k", [*SHAPES, (1024, 2048, 4096), (1, 4096, 4096), (8, 4096, 4096)])
def test_binary_products_are_exact(m, n, k, gate):
    arguments = bits_of(m, k), bits_of(n, k), k
    gate_bits = gate_of(gate, m, k)
    expected = ops.binary_matmul(*arguments, gate_bits)  # on the CPU, tested against the reference elsewhere
    assert torch.equal(ops.binary_matmul(*on_cuda(*arguments, gate_bits)).cpu(), expected)
    threshold, flip = torch.randint(-9, 9, (n,), dtype=torch.int32), torch.rand(n) < 0.5
    packed = ops.binary_threshold(*on_cuda(*arguments, threshold, flip, gate_bits))
    assert torch.equal(packed.cpu(), reference._pack((expected >= threshold) != flip))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_products_with_numbers_agree(m, n, k, dtype):
    x, d, w, signs = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), bits_of(n, k), bits_of(m, k)
    assert_close(ops.sign_matmul(*on_cuda(d, w, k)), reference.sign_matmul(d, w, k), n)
    assert_close(ops.sign_matmul_t(*on_cuda(x, w, k)), reference.sign_matmul_t(x, w, k), k)
    assert_close(ops.real_weight_grad(*on_cuda(d, x)), reference.real_weight_grad(d, x), m)
    for gate in GATES:
        gate_bits = gate_of(gate, m, k)
        expected = reference.gated_input_grad(d, w, x, gate_bits)
        assert_close(ops.gated_input_grad(*on_cuda(d, w, x, gate_bits)), expected, n)
        expected = reference.gated_weight_grad(d, signs, k, gate_bits)
        assert_close(ops.gated_weight_grad(*on_cuda(d, signs, k, gate_bits)), expected, m)


@pytest.mark.gpu
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_the_product_of_images_is_exact(m, n, k):
    images, w = torch.randint(0, 256, (m, k), dtype=torch.uint8), bits_of(n, k)
    assert torch.equal(ops.sign_matmul_t(*on_cuda(images, w, k)).cpu(), reference.sign_matmul_t(images, w, k))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("window, outputs", WINDOWS)
def test_convolutions_are_those_of_the_cpu(window, outputs, gate):
    """Bits and sums exact, gradients of whole numbers too."""
    x, w = bits_of(3, window.units), bits_of(outputs, window.group_units)
    gate_bits = gate_of(gate, 3, window.units)
    mask = bits_of(3, window.units) if gate_bits is None else gate_bits
    d = torch.randint(-8, 9, (3, window.out_height, window.out_width, outputs)).float()
    for group in range(window.groups):
        assert torch.equal(ops.unfold_bits(*on_cuda(x), window, group).cpu(), ops.unfold_bits(x, window, group))
    for operator, arguments in (
        (ops.binary_conv2d, (x, w, window, gate_bits)),
        (ops.masked_conv2d_input_grad, (d, w, window, mask)),
        (ops.gated_conv2d_weight_grad, (d, x, window, gate_bits)),
    ):
        assert torch.equal(operator(*on_cuda(*arguments)).cpu(), operator(*arguments)), operator.__name__


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 5, 128, 1001, 4096])
def test_engrams_are_those_of_the_cpu(k):
    score, seed = torch.randn(33, k), torch.tensor([987654321012345, 3])
    score[::2] = score[::2].round()  # ties
    rules = [("bernoulli", 1.0), ("gumbel_top_k", 1.0), ("gumbel_top_k", 0.0), ("gumbel_top_k", float("inf"))]
    for (rule, temperature), rate, first_row in itertools.product(rules, (0.05, 0.5, 1.0), (0, 2**33)):
        arguments = seed, rate, rule, temperature, first_row, 3
        expected = ops.sample_engram(score, *arguments)
        assert torch.equal(ops.sample_engram(score.cuda(), *arguments).cpu(), expected)


@pytest.mark.gpu
def test_the_same_call_gives_the_same_bits():
    d, w, x = torch.randn(100, 512).cuda(), bits_of(512, 784).cuda(), bits_of(100, 784).cuda()
    gate = gate_of("per sample", 100, 784).cuda()
    for call in (lambda: ops.masked_input_grad(d, w, 784, gate), lambda: ops.gated_weight_grad(d, x, 784, gate)):
        first = call()
        assert all(torch.equal(first, call()) for _ in range(20))


@pytest.mark.gpu
def test_operators_keep_to_their_stream_and_device():
    x = torch.randn(64, 4096).cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = torch.ones_like(x).mul_(x.sign())
        bits = ops.pack_signs(late)
    side.synchronize()
    assert torch.equal(bits.cpu(), reference.pack_signs(x.cpu()))
    before = torch.cuda.current_device()
    ops.pack_signs(torch.randn(3, 5, device=f"cuda:{torch.cuda.device_count() - 1}"))
    assert torch.cuda.current_device() == before


@pytest.mark.gpu
def test_operators_are_captured_in_graphs():
    x, w = torch.randn(64, 784).cuda(), bits_of(256, 784).cuda()
    ops.binary_matmul(ops.pack_signs(x), w, 784)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.binary_matmul(ops.pack_signs(x), w, 784)
    x.neg_()
    graph.replay()
    assert torch.equal(y.cpu(), ops.binary_matmul(reference.pack_signs(x.cpu()), w.cpu(), 784))


@pytest.mark.gpu
def test_nan_is_reported_by_a_later_call():
    ops.pack_signs(torch.tensor([[1.0, float("nan")]]).cuda())
    with pytest.raises(RuntimeError, match="x: expected numbers, got NaN, which has no sign .in an earlier pack_signs"):
        ops.check_numbers()
    ops.check_numbers()


@pytest.mark.gpu
def test_tensors_on_two_devices_are_refused():
    with pytest.raises(RuntimeError, match="w_bits: expected a tensor on cuda:0 .*got one on cpu"):
        ops.binary_matmul(bits_of(3, 64).cuda(), bits_of(3, 64), 64)


@pytest.mark.gpu
def test_opcheck_on_cuda():
    x, w, d, gate = torch.randn(3, 70), bits_of(4, 70), torch.randn(3, 4), gate_of("per sample", 3, 70)
    namespace = torch.ops.engram_kernels
    opcheck(namespace.pack_signs.default, (x.cuda(),))
    opcheck(namespace.binary_matmul.default, (*on_cuda(bits_of(3, 70), w, 70), gate.cuda()))
    opcheck(namespace.sign_matmul.default, (d.cuda().requires_grad_(), w.cuda(), 70))
    opcheck(namespace.sign_matmul_t.default, (x.cuda().requires_grad_(), w.cuda(), 70))
    opcheck(namespace.gated_weight_grad.default, (*on_cuda(d, bits_of(3, 70), 70), gate.cuda()))


# ---- layers and training


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, dict(state_dtype=torch.int8), dict(fuse_backward=True)], ids=str)
def test_training_follows_the_cpu(settings):
    """Same seeds, same engrams, and hidden weights within what sums in another order differ by."""
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = ek.EngramMLP((784, 256, 256, 10), engram=ek.StochasticEngram(0.2), readout="linear")
        x, y = torch.randn(200, 784), torch.randint(10, (200,))
        model, x, y = model.to(device), x.to(device), y.to(device)
        opt = ek.MetaplasticAdam(model.parameters(), lr=1e-3, **settings)
        losses[device] = []
        for _ in range(5):
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            losses[device].append(loss.item())
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-2)
    assert losses["cuda"][-1] < losses["cuda"][0]


@pytest.mark.gpu
@pytest.mark.parametrize("gates", ["channels", "units"])
def test_convolutional_layers_follow_the_cpu(gates):
    """Outputs of equal draws to the last bit, gradients but for the order of sums."""
    layer = ek.BinaryEngramConv2d(32, 16, 3, padding=1, engram=ek.ContextEngram(2, 0.5), gates=gates)
    layer.engram.context = 1
    x, results = torch.randn(4, 32, 9, 8), []
    for device in ("cpu", "cuda"):
        own, inputs = copy.deepcopy(layer).to(device), x.to(device).requires_grad_()
        y = own(inputs)
        y.square().mean().backward()
        results.append([t.detach().cpu() for t in (y, inputs.grad, own.weight.grad, own.bias.grad)])
    assert torch.equal(results[0][0], results[1][0])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_signs_are_kept_between_calls_on_cuda():
    layer = ek.BinaryEngramLinear(128, 64, device="cuda")
    assert layer.weight.sign_bits() is layer.weight.sign_bits()
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(layer.weight.sign_bits().cpu(), reference.pack_signs(layer.weight.detach().cpu()))


@pytest.mark.gpu
def test_a_checkpoint_moves_between_devices(tmp_path):
    torch.manual_seed(0)
    model = ek.EngramMLP((20, 64, 5), engram=None, readout="linear").cuda()
    opt = ek.MetaplasticAdam(model.parameters(), state_dtype=torch.int8)
    model(torch.randn(8, 20).cuda()).sum().backward()
    opt.step()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "both.pt")
    saved = torch.load(tmp_path / "both.pt", map_location="cuda")
    for device in ("cpu", "cuda"):
        copy = ek.EngramMLP((20, 64, 5), engram=None, readout="linear").to(device)
        other = ek.MetaplasticAdam(copy.parameters(), state_dtype=torch.int8)
        copy.load_state_dict(saved["model"])
        other.load_state_dict(saved["opt"])
        copy(torch.randn(8, 20, device=device)).sum().backward()
        other.step()

"""Every operator under torch.vmap is a loop over the batch, bit for bit where results are integers."""

import itertools

import pytest
import torch

import engram_kernels as ek

B, M, N, K = 3, 4, 5, 140
F = torch.Generator().manual_seed(0)


def floats(*shape):
    return torch.randn(*shape, generator=F)


def bits(*shape):
    return ek.ops.pack_signs(floats(*shape, K))


# operator -> its tensor arguments without a batch, as functions of leading dimensions, and the rest
X, W, D, GATE, SHARED = (
    lambda *b: bits(*b, M),
    lambda *b: bits(*b, N),
    lambda *b: floats(*b, M, N),
    lambda *b: bits(*b, M),
    lambda *b: bits(*b),
)
WINDOW = ek.reference.Window(4, 5, 7, 3, 3, 1, 1, 1, 1, 1, 1)
IMAGE_GRAD, FILTERS = (
    lambda *b: floats(*b, M, 4, 5, N),
    lambda *b: ek.ops.pack_signs(floats(*b, N, WINDOW.group_units)),
)
PACKED_WEIGHT = bits(N)
assert WINDOW.units == K  # the rows of images are those of the other operators
CALLS = {
    "pack_signs": (lambda x: ek.ops.pack_signs(x), [lambda *b: floats(*b, M, K)]),
    "pack_signs of a vector": (lambda x: ek.ops.pack_signs(x), [lambda *b: floats(*b, K)]),
    "kept_sign_bits": (lambda w: torch.ops.engram_kernels.kept_sign_bits(w), [lambda *b: floats(*b, N, K)]),
    "kept_sign_bits of filters": (
        lambda w: torch.ops.engram_kernels.kept_sign_bits(w, True),
        [lambda *b: floats(*b, N, 7, 3, 2)],
    ),
    "unpack_signs": (lambda x: ek.ops.unpack_signs(x, K), [X]),
    "transpose_bits": (lambda x: ek.ops.transpose_bits(x, K), [X]),
    "pack_window": (lambda x, g: ek.ops.pack_window(x, 0.7, g), [lambda *b: floats(*b, M, K), GATE]),
    "pack_window without a gate": (lambda x: ek.ops.pack_window(x, 0.7), [lambda *b: floats(*b, M, K)]),
    "binary_matmul": (lambda x, w, g: ek.ops.binary_matmul(x, w, K, g), [X, W, GATE]),
    "binary_matmul without a gate": (lambda x, w: ek.ops.binary_matmul(x, w, K), [X, W]),
    "binary_matmul with a shared gate": (lambda x, w, g: ek.ops.binary_matmul(x, w, K, g), [X, W, SHARED]),
    "binary_threshold": (
        lambda x, w, t, f, g: ek.ops.binary_threshold(x, w, K, t, f, g),
        [X, W, lambda *b: floats(*b, N).mul(9).int(), lambda *b: floats(*b, N) > 0, GATE],
    ),
    "sign_matmul": (lambda a, w: ek.ops.sign_matmul(a, w, K), [D, W]),
    "sign_matmul_t": (lambda x, w: ek.ops.sign_matmul_t(x, w, K), [lambda *b: floats(*b, M, K), W]),
    "gated_input_grad": (
        lambda d, w, x, g: ek.ops.gated_input_grad(d, w, x, g),
        [D, W, lambda *b: floats(*b, M, K), GATE],
    ),
    "masked_input_grad": (lambda d, w, g: ek.ops.masked_input_grad(d, w, K, g), [D, W, GATE]),
    "real_weight_grad": (lambda d, x: ek.ops.real_weight_grad(d, x), [D, lambda *b: floats(*b, M, K)]),
    "gated_weight_grad": (lambda d, x, g: ek.ops.gated_weight_grad(d, x, K, g), [D, X, GATE]),
    "standardise": (lambda y: ek.ops.standardise(y)[0], [lambda *b: floats(*b, M, K)]),
    "standardise and its moments": (lambda y: ek.ops.standardise(y)[1], [lambda *b: floats(*b, M, K)]),
    "standardise_grad": (
        lambda d, y, m: ek.ops.standardise_grad(d, y, m),
        [lambda *b: floats(*b, M, K), lambda *b: floats(*b, M, K), lambda *b: floats(*b, M, 2).double()],
    ),
    "value_signs": (
        lambda y, t, f: ek.ops.value_signs(y, t, f),
        [lambda *b: floats(*b, M, K).mul(9).int(), lambda *b: floats(*b, K).mul(9).int(), lambda *b: floats(*b, K) > 0],
    ),
    "value_signs by the mean": (lambda y: ek.ops.value_signs(y), [lambda *b: floats(*b, M, K).mul(9).int()]),
    "top_units": (lambda y: ek.ops.top_units(y, 7), [lambda *b: floats(*b, M, K).mul(9).int()]),
    "packed_network": (
        lambda x: ek.ops.packed_network(x, None, [0, K, 0, 3, 2, 0], [], [PACKED_WEIGHT]),
        [X],
    ),
    "patch_excitability": (
        lambda x, w: ek.ops.patch_excitability(x, w, torch.arange(0, 12, 2), 9.0, 2),
        [
            lambda *b: floats(*b, 5, 4, 5, 1).mul(99).abs().to(torch.uint8),
            lambda *b: floats(*b, 2, 2, 2).sign().to(torch.int8),
        ],
    ),
    "unfold_bits": (lambda x: ek.ops.unfold_bits(x, WINDOW), [X]),
    "interleave_bits": (lambda x: ek.ops.interleave_bits(x, 2, K), [X]),
    "binary_conv2d": (lambda x, w, g: ek.ops.binary_conv2d(x, w, WINDOW, g), [X, FILTERS, GATE]),
    "masked_conv2d_input_grad": (
        lambda d, w, g: ek.ops.masked_conv2d_input_grad(d, w, WINDOW, g),
        [IMAGE_GRAD, FILTERS, GATE],
    ),
    "gated_conv2d_weight_grad": (
        lambda d, x, g: ek.ops.gated_conv2d_weight_grad(d, x, WINDOW, g),
        [IMAGE_GRAD, X, GATE],
    ),
    "sample_engram": (
        lambda x, s: ek.ops.sample_engram(x, s, 0.2),
        [lambda *b: floats(*b, M, K), lambda *b: torch.randint(9, (*b, 2), generator=F)],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_is_a_loop(name):
    call, makers = CALLS[name]
    for batched in itertools.product([True, False], repeat=len(makers)):
        if not any(batched):
            continue
        arguments = [make(B) if has else make() for make, has in zip(makers, batched, strict=True)]
        loop = [call(*(a[i] if has else a for a, has in zip(arguments, batched, strict=True))) for i in range(B)]
        for dim in (0, 1):  # where the batch stands
            moved = [
                a.movedim(0, dim).contiguous() if has and a.dim() > 1 else a
                for a, has in zip(arguments, batched, strict=True)
            ]
            dims = tuple(dim if has else None for has in batched)
            batch = torch.vmap(call, in_dims=dims)(*moved)
            if batch.is_floating_point():  # sums of another number of samples may go in another order
                torch.testing.assert_close(batch, torch.stack(loop), rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(batch, torch.stack(loop)), (batched, dim)


def test_batches_of_batches():
    call, makers = CALLS["binary_matmul"]
    x, w, gate = (make(2, B) for make in makers)
    whole = torch.vmap(torch.vmap(call))(x, w, gate)
    assert torch.equal(whole[1, 2], call(x[1, 2], w[1, 2], gate[1, 2])) and whole.shape == (2, B, M, N)


def test_every_operator_without_side_effects_has_a_rule():
    names = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("engram_kernels::")
    }
    in_place = {"metaplastic_adam_", "gated_metaplastic_adam_", "real_metaplastic_adam_"}
    tested = {name.split()[0] for name in CALLS} | {"draw_seed"}
    assert {name for name in names if not name.startswith("_")} - in_place == tested


def test_errors_are_those_of_the_operator():
    short = bits(N)[:, :-1]
    with pytest.raises(RuntimeError, match="w_bits: expected"):
        torch.vmap(lambda x: ek.ops.binary_matmul(x, short, K))(bits(B, M))

import copy

import pytest
import torch

import engram_kernels as ek
from engram_kernels.encoding import FIRST_SAMPLES


def test_features_of_any_scale_and_offset_have_one_code():
    x = torch.randn(200, 70)
    scales = torch.logspace(-9, 9, 70)
    scales = scales[torch.randperm(70)]
    one, other = ek.InputEncoding(70), ek.InputEncoding(70)
    unequal = x * torch.logspace(-2, 2, 70)  # no common unit, so that each feature has its own scale
    expected = one(unequal)
    torch.testing.assert_close(other(unequal * scales), expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).min() > 0.1 and expected.std(0).max() < 1


def test_few_features_get_several_inputs_each():
    for features, inputs in ((1, 64), (4, 64), (13, 65), (63, 126), (64, 64), (784, 784)):
        encoding = ek.InputEncoding(features)
        y = encoding(torch.randn(100, features))
        assert encoding.inputs == inputs and y.shape == (100, inputs)
    encoding = ek.InputEncoding(2)
    y = encoding(torch.stack([torch.linspace(-5, 5, 101), torch.zeros(101)], dim=1)).unflatten(1, (2, 32))
    assert (y[1:, 0] >= y[:-1, 0]).all() and (y[0, 0] < y[-1, 0]).sum() > 20  # each input rises with its feature
    assert y.abs().max() <= 1 and torch.equal(y[:, 1], y[:1, 1].expand(101, -1))


def test_the_first_samples_decide_and_no_later_ones():
    encoding, x = ek.InputEncoding(70), torch.randn(3, 40, 70)
    encoding(x[0])
    before = encoding.scale.clone()
    encoding(9 * x[1])
    assert int(encoding.samples) == 80 >= FIRST_SAMPLES and not torch.equal(encoding.scale, before)
    kept = encoding.state_dict()
    kept = {name: value.clone() for name, value in kept.items()}
    seen = torch.cat([x[0], 9 * x[1]])
    torch.testing.assert_close(kept["mean"], seen.mean(0))
    assert torch.equal(kept["low"], seen.amin(0)) and torch.equal(kept["high"], seen.amax(0))
    encoding(100 * x[2])
    assert all(torch.equal(value, kept[name]) for name, value in encoding.state_dict().items())
    other = ek.InputEncoding(70)
    other.load_state_dict(kept)
    assert torch.equal(other(x[2]), encoding(x[2])) and torch.equal(other.scale, kept["scale"])


def test_evaluation_learns_nothing():
    encoding = ek.InputEncoding(70).eval()
    before = {name: value.clone() for name, value in encoding.state_dict().items()}
    encoding(torch.randn(100, 70))
    assert all(torch.equal(value, before[name]) for name, value in encoding.state_dict().items())


def test_pixels_keep_their_proportions_and_images_their_type():
    images = torch.randint(0, 256, (100, 784), dtype=torch.uint8)
    images[:, :100] = 0
    images[:, 100:200] //= 200
    encoding = ek.InputEncoding(784)
    assert encoding(images) is images
    y = encoding(images.float() / 255)
    torch.testing.assert_close(y, (images / 255.0) - (images / 255.0).mean(0))


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-30, 1e30])
def test_constant_features_stay_finite(value):
    x = torch.randn(100, 70) * torch.logspace(-3, 3, 70)
    x[:, 3] = value
    encoding = ek.InputEncoding(70)
    assert encoding(x).isfinite().all() and (encoding(x)[:, 3].abs() < 1e-5).all()
    x[:, 3] = 2 * value + 1
    assert encoding(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_floats_keep_their_dtype(dtype):
    assert ek.InputEncoding(5)(torch.randn(4, 5).to(dtype)).dtype == dtype


def test_empty_batches_pass():
    encoding = ek.InputEncoding(5)
    assert encoding(torch.randn(0, 5)).shape == (0, 65) and int(encoding.samples) == 0


def test_bad_input_is_named_and_changes_nothing():
    encoding = ek.InputEncoding(3)
    with pytest.raises(RuntimeError, match=r"input: expected shape \(M, 3\), got \(2, 4\)"):
        encoding(torch.randn(2, 4))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match="input: expected finite numbers, got NaN, infinity"):
            encoding(torch.tensor([[1.0, 2.0, bad], [0.0, 0.0, 0.0]]))
        assert int(encoding.samples) == 0 and encoding.scale.eq(1).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda own, other: own.load_state_dict(other.state_dict()),
        lambda own, other: own.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
        lambda own, other: [buffer.copy_(other.get_buffer(name)) for name, buffer in own.named_buffers()],
        lambda own, other: [buffer.data.copy_(other.get_buffer(name)) for name, buffer in own.named_buffers()],
        lambda own, other: [setattr(own, name, other.get_buffer(name).clone()) for name in dict(own.named_buffers())],
        lambda own, other: own.samples.numpy().fill(0),
    ],
)
@pytest.mark.parametrize("seen", [(0, 100), (100, 0), (100, 30), (30, 100)])
def test_first_samples_are_those_that_the_buffers_count(change, seen):
    own, other = ek.InputEncoding(70), ek.InputEncoding(70)
    for encoding, count in zip((own, other), seen, strict=True):
        encoding(torch.randn(count, 70) * (1 + count))
    change(own, other)
    fresh = ek.InputEncoding(70)
    fresh.load_state_dict(own.state_dict())
    x = torch.randn(50, 70) * 7
    assert torch.equal(own(x), fresh(x))
    for name, buffer in fresh.named_buffers():
        assert torch.equal(own.get_buffer(name), buffer), name


def test_the_mean_of_many_samples_is_the_same_in_any_number_of_threads():
    x, before, found = torch.randn(4000, 100), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            encoding = ek.InputEncoding(100)
            found.append((encoding(x), encoding.mean.clone()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))

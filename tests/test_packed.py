"""Packed models give what the models that they are made of give, bit for bit; a file that can't be used says why."""

import itertools
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

import engram_kernels as ek
from engram_kernels.cli import main
from engram_kernels.continual import class_scenario
from engram_kernels.continual.data import load
from engram_kernels.encoding import SampleStandardisation
from engram_kernels.packed.layers import KINDS, decode_hidden, encode_hidden, least_integer_that_reaches
from engram_kernels.reference import decode_first_moment, decode_second_moment, encode_first_moment, rounding_draws

ENGRAMS = {
    "none": lambda: None,
    "value": lambda: ek.StochasticEngram(0.3),
    "magnitude": lambda: ek.StochasticEngram(0.3, score="magnitude"),
    "bernoulli": lambda: ek.BernoulliEngram(0.4),
    "context": lambda: with_context(ek.ContextEngram(3, 0.3), 1),
}


def with_context(engram, context):
    engram.context = context
    return engram


def batch_norm(units):
    """As training leaves it, with factors below and above 0, and one of 0."""
    norm = nn.BatchNorm1d(units)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.weight.data[0] = 0.0
    norm.running_mean.normal_(0, 3)
    norm.running_var.uniform_(0.5, 60)
    return norm


def exact_norm(units):
    return ek.ExactLayerNorm(units)


def images(samples, features):
    """With many zeros, as images have them."""
    return (torch.randint(256, (samples, features)) * (torch.rand(samples, features) < 0.4)).to(torch.uint8)


def sequential(sizes, norm, engram, scaled, bias, first_binary=False):
    """First layer, hidden layers with norms between, and a last layer."""
    layers = [ek.BinaryEngramLinear(sizes[0], sizes[1], bias, binary_input=first_binary, scaled=scaled)]
    for k, n in itertools.pairwise(sizes[1:]):
        if norm is not None:
            layers.append(norm(k))
        layers.append(ek.BinaryEngramLinear(k, n, bias, engram=ENGRAMS[engram](), scaled=scaled))
    for layer in layers:
        if isinstance(layer, ek.BinaryEngramLinear) and bias:
            nn.init.normal_(layer.bias)
    return nn.Sequential(*layers).eval()


def assert_same(model, packed, x):
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


# ---- predictions


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 140), min_size=3, max_size=4),
    samples=st.integers(0, 9),
    norm=st.sampled_from([None, batch_norm, exact_norm]),
    engram=st.sampled_from(sorted(ENGRAMS)),
    scaled=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_scores_are_those_of_the_model(sizes, samples, norm, engram, scaled, bias, seed):
    torch.manual_seed(seed)
    if norm is exact_norm:  # whose rounding decides ties where a scale or a bias comes before
        scaled = bias = False
        engram = "none" if engram == "bernoulli" else engram  # its rate is a scale
    model = sequential(sizes, norm, engram, scaled, bias)
    packed = ek.pack(model)
    x = images(samples, sizes[0])
    assert_same(model, packed, x)
    assert_same(model, packed, x.float() / 255)
    assert_same(model, packed, torch.randn(samples, sizes[0]))


@pytest.mark.parametrize("engram", ENGRAMS)
def test_a_first_layer_may_take_signs(engram):
    model = sequential((70, 33, 10), batch_norm, engram, True, True, first_binary=True)
    packed = ek.pack(model)
    assert_same(model, packed, torch.randn(20, 70))
    with pytest.raises(
        RuntimeError, match="input: expected float32, of which the first layer takes the signs, got uint8"
    ):
        packed(images(2, 70))


@pytest.mark.parametrize("readout", ["linear", "dendritic", "prototype", "ridge"])
@pytest.mark.parametrize("sizes", [(784, 256, 10), (5, 100, 130, 3)])
@pytest.mark.parametrize("encode", [True, False])
def test_every_read_out_of_a_network(readout, sizes, encode):
    model = ek.EngramMLP(sizes, readout=readout, encode=encode)
    x = images(100, sizes[0])
    if encode:
        model.encoding(x.float())
    if readout in ("prototype", "ridge"):
        model.observe(x, torch.randint(sizes[-1] - 1, (100,)))  # one class is never seen
    packed = ek.pack(model)
    assert model.training and not packed.training
    assert_same(model.eval(), packed, x)
    assert_same(model, packed, torch.randn(40, sizes[0]))


@pytest.mark.parametrize("readout", ["linear", "dendritic", "prototype", "ridge"])
def test_one_operator_gives_what_the_layers_give(readout, isa):
    """From bytes, and from the signs that floats become."""
    model = ek.EngramMLP((100, 300, 200, 10), readout=readout, engram=ek.StochasticEngram(0.2, score="magnitude"))
    x = images(300, 100)
    if readout in ("prototype", "ridge"):
        model.observe(x, torch.randint(9, (300,)))
    packed = ek.pack(model)
    for y in (x, x.float(), x[:1], x[:0]):
        state = packed._begin(y)
        for layer in packed.layers:
            state = layer(state)
        assert torch.equal(packed(y), state.y)


@pytest.mark.slow
@pytest.mark.parametrize("readout", ["linear", "dendritic", "prototype", "ridge"])
def test_every_test_image_of_mnist_is_predicted_as_the_model_does(readout):
    folder = Path(os.environ.get("ENGRAM_DATA_DIR", "nowhere"))
    if not (folder / "mnist").is_dir():
        pytest.skip("MNIST's four files are not in ENGRAM_DATA_DIR/mnist")
    data = load("mnist", folder)
    x, y = data.x_train[:5000], data.y_train[:5000].long()
    model = ek.EngramMLP((784, 512, 512, 10), readout=readout)
    model.encoding(x.float())
    if readout in ("prototype", "ridge"):
        model.observe(x, y)
    packed = ek.pack(model)
    assert len(data.x_test) == 10_000 and data.x_test.dtype == torch.uint8
    assert_same(model.eval(), packed, data.x_test)


def test_layers_without_a_stage_run_one_by_one():
    """A normalisation of floats, whose rounding is torch's."""
    norm = exact_norm(64)
    model = sequential((60, 64, 10), lambda _: nn.Sequential(batch_norm(64), norm), "value", True, False)
    packed = ek.pack(model)
    assert [start for start, _ in packed._programs] == [len(packed.layers) - 2]
    assert_same(model, packed, images(50, 60))


def test_several_segments_speak_for_a_class():
    engram = ek.StochasticEngram(0.2, score="magnitude")
    readout = ek.DendriticReadout(64, 3, segments=7, top_segments=3, engram=engram)
    model = ek.EngramMLP((20, 64, 3), readout=readout, engram=engram).eval()
    assert_same(model, ek.pack(model), torch.randn(50, 20))


def test_no_engram_and_no_encoding():
    model = ek.EngramMLP((100, 150, 150, 7), readout="linear", engram=None, encode=False, logit_scale=0.3).eval()
    assert_same(model, ek.pack(model), images(50, 100))


def test_layers_without_effect_are_left_out():
    first, last = ek.BinaryEngramLinear(64, 32, binary_input=False), ek.BinaryEngramLinear(32, 10)
    norm = batch_norm(32)
    model = nn.Sequential(
        nn.Flatten(), nn.Sequential(first, nn.Identity(), norm, nn.Hardtanh()), nn.Dropout(0.5), last
    ).eval()
    packed = ek.pack(model)
    assert [layer.kind for layer in packed.layers] == ["product", "sign", "product", "affine"]
    x = images(20, 64)
    assert torch.equal(packed(x.reshape(20, 8, 8)), model(x))


def test_the_mean_of_a_sample_is_met_exactly():
    """Ties with the mean, which float32 rounding would decide in nn.LayerNorm."""
    model = sequential((60, 64, 10), exact_norm, "none", False, False)
    x = torch.randint(3, (500, 60), dtype=torch.uint8)
    y = model[0](x).detach()
    assert int((y * 64 == y.sum(1, keepdim=True)).sum()) > 10
    assert_same(model, ek.pack(model), x)


def test_predictions_after_torchs_layer_norm_differ_by_rounding_alone():
    model = sequential((60, 256, 10), lambda n: nn.LayerNorm(n, elementwise_affine=False), "none", False, False)
    x = images(500, 60)
    with torch.no_grad():
        same = (ek.pack(model)(x) == model(x)).all(dim=1)
    y = model[0](x).detach()
    whole_mean = y.sum(1) % 256 == 0
    assert bool((same | whole_mean).all())


def test_a_threshold_beyond_every_product_is_never_and_always_reached():
    model = sequential((16, 8, 4), batch_norm, "none", False, False)
    model[1].bias.data = torch.tensor([1e30, -1e30] * 4)
    model[1].weight.data.abs_()
    assert_same(model, ek.pack(model), images(20, 16))
    assert_same(model, ek.pack(model), torch.randn(20, 16) * 1e3)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_least_integer_that_reaches_a_threshold(thresholds):
    t = torch.tensor(thresholds, dtype=torch.float32)
    least = least_integer_that_reaches(t)
    inside = (least > -(2**31)) & (least < 2**31 - 1)
    assert bool((least.float() >= t)[inside].all())
    assert bool(((least.long() - 1).float() < t)[inside].all())
    assert bool((least[t == math.inf] == 2**31 - 1).all() and (least[t == -math.inf] == -(2**31)).all())


def test_no_float_weight_is_left():
    packed = ek.pack(ek.EngramMLP((784, 256, 256, 10), readout="linear"))
    floats = [tensor for tensor in packed.buffers() if tensor.dtype.is_floating_point and tensor.dim() > 1]
    assert not floats and not list(packed.parameters())


def test_the_model_is_left_as_it_was():
    model = ek.EngramMLP((20, 64, 3))
    model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    ek.pack(model)
    assert before == {name: module.training for name, module in model.named_modules()}


# ---- what has no packed form


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.Linear(3, 2)), "0: expected a binary layer, .* got Linear"),
        (nn.Sequential(nn.Flatten()), "model: expected a binary layer, got none"),
        (nn.Sequential(ek.BinaryEngramLinear(3, 2), nn.ReLU()), "1: expected a binary layer, .* got ReLU"),
        (
            nn.Sequential(ek.BinaryEngramLinear(3, 2), nn.LayerNorm(2)),
            "1: expected a LayerNorm of one dimension without",
        ),
        (
            nn.Sequential(ek.BinaryEngramLinear(3, 2), ek.ExactLayerNorm(2)),
            "1: expected a binary layer or a read-out after",
        ),
        (
            nn.Sequential(ek.BinaryEngramLinear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)),
            "1: expected a BatchNorm1d with running statistics",
        ),
        (
            nn.Sequential(*[ek.BinaryEngramLinear(2, 2, binary_input=False) for _ in range(2)]),
            "1: expected binary_input=True after the first layer",
        ),
        (
            nn.Sequential(
                ek.BinaryEngramLinear(3, 2),
                ek.BinaryEngramLinear(2, 2, engram=ek.BernoulliEngram(0.5, sample_at_eval=True)),
            ),
            "1: expected a StochasticEngram, ContextEngram or BernoulliEngram, got BernoulliEngram",
        ),
        (
            nn.Sequential(ek.BinaryEngramLinear(3, 2), ek.BinaryEngramLinear(2, 2, engram=ek.ContextEngram(2, 0.5))),
            "1: expected one context for all samples, got None",
        ),
        (
            nn.Sequential(
                ek.BinaryEngramLinear(3, 2), ek.ExactLayerNorm(2), nn.BatchNorm1d(2), ek.BinaryEngramLinear(2, 2)
            ),
            "2: expected a binary layer or a read-out after a LayerNorm, got BatchNorm1d",
        ),
        (nn.Sequential(ek.BinaryEngramLinear(3, 2), nn.Hardtanh(1, 2)), "1: expected a Hardtanh of a range around 0"),
    ],
)
def test_what_has_no_packed_form_is_named(model, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ek.pack(model)


def test_a_batch_norm_of_nan_is_named():
    model = sequential((16, 8, 4), batch_norm, "none", False, False)
    model[1].bias.data[3] = math.nan
    with pytest.raises(ValueError, match="1: expected a BatchNorm1d of finite float32 numbers"):
        ek.pack(model)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(2, 64, dtype=torch.float64), "input: expected uint8 or float32, got torch.float64"),
        (torch.zeros(2, 63), r"input: expected shape \(M, 64\), got \(2, 63\)"),
        (torch.zeros(64), r"input: expected shape \(M, 64\), got \(64,\)"),
        (torch.full((2, 64), math.nan), "expected numbers, got NaN"),
    ],
)
def test_a_wrong_input_is_named(x, message):
    packed = ek.pack(sequential((64, 32, 10), batch_norm, "value", True, False))
    with pytest.raises(RuntimeError, match=message):
        packed(x)


@pytest.mark.parametrize(
    "labels, error, message",
    [(["a"], ValueError, "labels: expected 3"), ([1.5] * 3, TypeError, "labels: expected integers or texts")],
)
def test_wrong_labels_are_named(labels, error, message):
    with pytest.raises(error, match=message):
        ek.pack(ek.EngramMLP((20, 64, 3)), labels=labels)


# ---- learning


@pytest.mark.parametrize("readout", ["prototype", "ridge"])
def test_a_counted_read_out_goes_on_learning_from_its_file(readout, tmp_path):
    model = ek.EngramMLP((30, 100, 4), readout=readout)
    x, y = images(90, 30), torch.randint(4, (90,))
    model.encoding(x.float())
    model.eval().observe(x[:40], y[:40].clamp(max=2))
    ek.pack(model, learning=True).save(tmp_path / "model")
    packed = ek.load_packed(tmp_path / "model")
    assert packed.partial_fit(x[40:], y[40:]) is packed
    model.observe(x[40:], y[40:])
    assert_same(model, packed, x)
    packed.save(tmp_path / "model")  # in place of the file that is mapped
    assert_same(model, ek.load_packed(tmp_path / "model"), x)


def test_a_read_out_that_is_not_counted_says_so():
    x, y = torch.zeros(2, 20), torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"layer 3 \(dendritic\): expected a read-out that is counted"):
        ek.pack(ek.EngramMLP((20, 64, 3))).partial_fit(x, y)
    with pytest.raises(TypeError, match="partial_fit: expected a prototype, ridge or dendritic read-out, got affine"):
        ek.pack(ek.EngramMLP((20, 64, 3), readout="linear")).partial_fit(x, y)
    model = ek.EngramMLP((20, 64, 3), readout="ridge")
    model.observe(torch.randn(10, 20), torch.randint(3, (10,)))
    with pytest.raises(RuntimeError, match=r"pack\(model, learning=True\)"):
        ek.pack(model).partial_fit(x, y)
    with pytest.raises(ValueError, match="y: expected labels in"):
        ek.pack(model, learning=True).partial_fit(x, torch.tensor([0, 3]))


def dendritic_model(k=30, classes=4, segments=5, **settings):
    """A model with a dendritic read-out of two steps, and its optimizer."""
    model = ek.EngramMLP((k, 100, classes), readout="dendritic")
    model.readout = ek.DendriticReadout(100, classes, segments, engram=ek.StochasticEngram(0.2, temperature=0))
    optimizer = ek.MetaplasticAdam([model.readout.weight], **settings)
    x, y = images(60, k), torch.randint(classes, (60,))
    model.encoding(x.float())
    model.eval()
    for _ in range(2):
        learn(model, optimizer, x, y)
    return model, optimizer


def learn(model, optimizer, x, y):
    """A step of the read-out, as training takes it."""
    model.readout.train()
    with torch.no_grad():
        features = model.features(x)
    optimizer.zero_grad()
    model.readout.local_loss(model.readout.activations(features), y).backward()
    optimizer.step()
    model.readout.eval()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_dendritic_read_out_takes_the_step_of_its_optimizer(state_dtype, tmp_path):
    """From hidden weights that 8 bits hold, one step leaves the signs, and the wins, that training leaves."""
    model, optimizer = dendritic_model(lr=0.5, metaplasticity=0.5, weight_bound=2.0, state_dtype=state_dtype)
    packed = ek.pack(model, learning=optimizer)
    held = packed.layers[-1]
    with torch.no_grad():
        model.readout.weight.copy_(decode_hidden(held.hidden, held.hidden_scale))
    if state_dtype != torch.int8:  # moments that 8 bits hold
        state = optimizer.state[model.readout.weight]
        for name, decode in (("exp_avg", decode_first_moment), ("exp_avg_sq", decode_second_moment)):
            state[name].copy_(decode(getattr(held, name), getattr(held, f"{name}_scale")))
    x, y = images(50, 30), torch.randint(4, (50,))
    assert_same(model, packed, x)
    learn(model, optimizer, x, y)
    assert packed.partial_fit(x, y) is packed
    assert held.step == 3
    assert torch.equal(held.wins, model.readout.wins)
    assert torch.equal(held.weight, model.readout.signed_weight()[1])
    assert_same(model, packed, x)
    packed.save(tmp_path / "model")
    with safe_open(tmp_path / "model", "pt") as file:
        assert file.metadata()["version"] == "2"
    loaded = ek.load_packed(tmp_path / "model")
    packed.partial_fit(x, y)
    loaded.partial_fit(x, y)
    for name, tensor in held.tensors().items():
        assert torch.equal(tensor, getattr(loaded.layers[-1], name)), name


def test_learning_with_8_bits_keeps_up_with_floats():
    """Digits, two classes at a time, in one pass."""
    scenario = class_scenario(load("digits"))
    model = ek.EngramMLP((64, 512, 10), readout="dendritic")
    optimizer = ek.MetaplasticAdam([model.readout.weight])
    model.encoding(next(iter(scenario.train_stream[0].batches(100)))[0].float())
    model.eval()
    packed = ek.pack(model, learning=optimizer)
    for task in scenario.train_stream:
        for x, y in task.batches(25):
            learn(model, optimizer, x, y)
            packed.partial_fit(x, y)
    of_task = [batch for task in scenario.test_stream for batch in task.batches(500)]
    floats, bits = (
        sum(int((m(x).argmax(1) == y).sum()) for x, y in of_task) / sum(len(y) for _, y in of_task)
        for m in (model, packed)
    )
    assert floats > 0.7 and abs(floats - bits) < 0.03, (floats, bits)


def test_codes_of_hidden_weights_keep_their_signs():
    weight = torch.randn(7, 130) * 10.0 ** torch.randint(-12, 3, (7, 130))
    weight[0] = 0.0
    codes, scale = encode_hidden(weight, torch.tensor([1, 5]), first_row=3)
    draws = rounding_draws(torch.tensor([1, 5]), 7, 65, 3)
    noise = torch.stack([draws & 0xFFFF, draws >> 16], dim=2).flatten(1)
    expected, expected_scale = encode_first_moment(weight, noise)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, torch.where((expected == 0) & (weight < 0), -1, expected))
    assert torch.equal(codes >= 0, weight >= 0)
    assert torch.equal(decode_hidden(codes, scale), decode_first_moment(codes, scale))


def test_a_dendritic_read_out_without_what_it_learns_with_is_refused(tmp_path):
    model, optimizer = dendritic_model()
    x, y = images(2, 30), torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"dendritic.*learning=optimizer"):
        ek.pack(model, learning=True).partial_fit(x, y)
    with pytest.raises(ValueError, match="learning: expected the optimizer that has the weight"):
        ek.pack(model, learning=dendritic_model()[1])
    with pytest.raises(TypeError, match="learning: expected a bool or a MetaplasticAdam, got Adam"):
        ek.pack(model, learning=torch.optim.Adam(model.readout.parameters()))
    packed = ek.pack(model, learning=optimizer)
    with pytest.raises(ValueError, match="y: expected labels in"):
        packed.partial_fit(x, torch.tensor([0, 4]))
    layer = packed.layers[-1]
    fields = {name: getattr(layer, name) for name in layer.fields}
    kind = type(layer)
    for name in ("hidden", "exp_avg_sq_scale", "wins"):
        tensors = layer.tensors()
        del tensors[name]
        with pytest.raises(ValueError, match=rf"layer 9 \(learning dendritic\), {name}: expected"):
            kind("layer 9", fields, tensors)
    with pytest.raises(ValueError, match="hidden: expected numbers with the signs of weight"):
        kind("layer 9", fields, layer.tensors() | {"hidden": -1 - layer.hidden})
    with pytest.raises(ValueError, match="wins: expected finite numbers above 0"):
        kind("layer 9", fields, layer.tensors() | {"wins": torch.zeros_like(layer.wins)})
    with pytest.raises(ValueError, match="exp_avg_scale: expected finite numbers"):
        kind("layer 9", fields, layer.tensors() | {"exp_avg_scale": layer.exp_avg_scale * math.nan})
    for name in ("lr", "beta1", "step", "weight_bound"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            kind("layer 9", fields | {name: -1}, layer.tensors())


# ---- files


@pytest.fixture
def packed():
    return ek.pack(
        sequential((64, 32, 10), batch_norm, "value", True, True), labels=list("abcdefghij"), settings={"a": 1}
    )


def test_a_file_gives_the_same_model(packed, tmp_path):
    packed.save(tmp_path / "model")
    loaded = ek.load_packed(tmp_path / "model")
    x = images(20, 64)
    assert torch.equal(loaded(x), packed(x)) and loaded.predict(x) == packed.predict(x)
    assert (loaded.labels, loaded.settings) == (packed.labels, packed.settings)
    assert set(loaded.predict(x)) <= set("abcdefghij")
    assert os.listdir(tmp_path) == ["model"]


def test_without_labels_a_class_is_its_number():
    packed = ek.pack(sequential((64, 32, 10), batch_norm, "value", True, True))
    assert all(isinstance(label, int) for label in packed.predict(images(5, 64)))


def test_tensors_of_a_file_are_mapped(packed, tmp_path):
    packed.save(tmp_path / "model")
    loaded = ek.load_packed(tmp_path / "model")
    with open("/proc/self/maps") as maps:
        assert str(tmp_path / "model") in maps.read()
    del loaded


def test_a_network_of_test_imagestakes_less_than_800_kilobytes(tmp_path):
    ek.pack(sequential((784, 2048, 2048, 10), batch_norm, "none", True, False)).save(tmp_path / "model")
    assert (tmp_path / "model").stat().st_size < 800_000


def edited(path, metadata=None, tensors=None):
    """The file with other metadata and tensors."""
    with safe_open(path, "pt") as file:
        old_metadata = file.metadata()
        old = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file({**old, **(tensors or {})}, path, {**old_metadata, **(metadata or {})})


def network_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["network"])


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.write_bytes(b""), "expected a whole packed model"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "expected a whole packed model"),
    (lambda path: path.write_bytes(path.read_bytes()[:100]), "expected a whole packed model"),
    (lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"x" * 100), "expected a whole packed model"),
    (lambda path: path.write_bytes(b"\x80\x04" + os.urandom(100)), "expected a whole packed model"),
    (lambda path: save_file({"a": torch.zeros(1)}, path), "expected a packed model, .* without a format"),
    (lambda path: edited(path, {"format": "pt"}), "expected a packed model, format engram_kernels.packed, got pt"),
    (lambda path: edited(path, {"version": "3"}), "expected version 2 .* got 3; a newer engram_kernels wrote it"),
    (lambda path: edited(path, {"version": "one"}), "expected a version of the format from 1 on, got 'one'"),
    (lambda path: edited(path, {"network": "{"}), "expected a description of the network as JSON"),
    (lambda path: edited(path, {"network": "[]"}), "expected a description of the network as an object"),
    (lambda path: edited(path, {"network": '{"layers": []}'}), "layers: expected a list of layers"),
    (lambda path: edited(path, tensors={"9.weight": torch.zeros(1)}), "expected names of the .* got 9.weight"),
    (lambda path: edited(path, tensors={"0.bias": torch.zeros(1)}), "layer 0 .*, tensors: expected weight, got bias"),
    (
        lambda path: edited(path, tensors={"0.weight": torch.zeros(32, 1, dtype=torch.int64)}),
        r"layer 0 \(product\), weight: expected torch.int64 \(32, 2\), got torch.int64 \(32, 1\)",
    ),
])  # fmt: skip
def test_a_damaged_foreign_or_newer_file_is_refused_by_name(packed, tmp_path, damage, message):
    path = tmp_path / "model"
    packed.save(path)
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        ek.load_packed(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("change, message", [
    (lambda network: network.update(features=63), "units: expected 63, as the layer before gives, got 64"),
    (lambda network: network.update(features="64"), "features: expected an integer of at least 1, got '64'"),
    (lambda network: network.update(labels=["a"]), "labels: expected 10, one for each class, got 1"),
    (lambda network: network.update(labels=3), "labels: expected a list or null, got 3"),
    (lambda network: network.update(settings=3), "settings: expected an object, got 3"),
    (lambda network: network["layers"].pop(), "tensors: expected names of the"),
    (lambda network: network["layers"].append({"kind": "sigh"}), "expected a kind of encode, .* got {'kind': 'sigh'}"),
    (lambda network: network["layers"][0].update(inputs=0), r"layer 0 \(product\), inputs: expected"),
    (lambda network: network["layers"][0].update(more=1), "layer 0 .*, fields: expected inputs, outputs, real"),
    (lambda network: network["layers"][0].update(real=False), "layer 0 .*, order: expected a layer before it that"),
    (lambda network: network["layers"][4].update(recruited=33), r"layer 4 \(recruit\), recruited: expected at most 32"),
])  # fmt: skip
def test_layers_that_make_no_network_are_refused_by_name(packed, tmp_path, change, message):
    path = tmp_path / "model"
    packed.save(path)
    network = network_of(path)
    change(network)
    edited(path, {"network": json.dumps(network)})
    with pytest.raises(ValueError, match=message):
        ek.load_packed(path)


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        ek.load_packed(tmp_path / "none")
    with pytest.raises(OSError):
        ek.pack(ek.EngramMLP((20, 64, 3))).save(tmp_path / "none" / "model")


def test_every_kind_of_layer_is_in_the_page_of_the_format():
    page = (Path(__file__).parent.parent / "docs/packed-format.md").read_text()
    for kind, layer in KINDS.items():
        rows = [line for line in page.splitlines() if line.startswith(f"| `{kind}` | ")]
        assert any(all(f"`{field}`" in row for field in layer.fields) for row in rows), kind


# ---- ONNX


def run_onnx(path, x):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.fixture
def onnx():
    return pytest.importorskip("onnx", reason="onnx is not installed (extra onnx)")


@pytest.mark.parametrize("norm", [batch_norm, exact_norm, None])
@pytest.mark.parametrize("engram", ENGRAMS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_onnx_of_a_sequential_gives_the_same_scores(onnx, norm, engram, dtype, tmp_path):
    model = sequential((70, 90, 50, 10), norm, engram, norm is not exact_norm, norm is batch_norm)
    ek.export_onnx(model, tmp_path / "model.onnx", input_dtype=dtype)
    x = images(40, 70).to(dtype)  # whole numbers, which sum without rounding in any order
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", x), ek.pack(model)(x), rtol=1e-5, atol=1e-5)
    assert {node.domain for node in onnx.load(tmp_path / "model.onnx").graph.node} == {""}


@pytest.mark.parametrize("readout", ["linear", "dendritic", "prototype", "ridge"])
@pytest.mark.parametrize("sizes", [(784, 256, 10), (5, 130, 3)])
def test_onnx_of_every_read_out_gives_the_same_scores(onnx, readout, sizes, tmp_path):
    model = ek.EngramMLP(sizes, readout=readout)
    x = images(100, sizes[0])
    model.encoding(x.float())
    if readout in ("prototype", "ridge"):
        model.observe(x, torch.randint(sizes[-1] - 1, (100,)))
    packed = ek.pack(model)
    ek.export_onnx(packed, tmp_path / "model.onnx")
    scores = run_onnx(tmp_path / "model.onnx", x)
    torch.testing.assert_close(scores, packed(x), rtol=1e-4, atol=1e-4)


def test_onnx_of_several_segments(onnx, tmp_path):
    engram = ek.StochasticEngram(0.2)
    readout = ek.DendriticReadout(64, 3, segments=7, top_segments=3, engram=engram)
    packed = ek.pack(ek.EngramMLP((100, 64, 3), readout=readout, engram=engram))
    ek.export_onnx(packed, tmp_path / "model.onnx")
    x = images(50, 100)
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", x), packed(x), rtol=1e-5, atol=1e-5)


def test_onnx_of_another_input_is_refused(onnx, tmp_path):
    with pytest.raises(ValueError, match="input_dtype: expected torch.uint8 or torch.float32, got torch.int8"):
        ek.export_onnx(ek.EngramMLP((20, 64, 3)), tmp_path / "model.onnx", input_dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_samples_standardised_as_in_a_training_run(onnx, dtype, tmp_path):
    model = nn.Sequential(
        SampleStandardisation(100), ek.EngramMLP((100, 90, 10), readout="linear", encode=False)
    ).eval()
    packed, x = ek.pack(model), images(50, 100).to(dtype)
    x[0] = 0
    assert_same(model, packed, x)
    ek.export_onnx(packed, tmp_path / "model.onnx", input_dtype=dtype)
    same = (run_onnx(tmp_path / "model.onnx", x).argmax(1) == packed(x).argmax(1)).float().mean()
    assert same > 0.9  # the first product is one of floats, rounded in another order


# ---- the command line


def test_a_run_is_packed_and_predicts_the_same(tmp_path, capsys):
    run, samples = tmp_path / "run", tmp_path / "samples.npy"
    np.save(samples, load_digits().data[:200].astype(np.uint8))
    train = ["train", "--quiet", "--save-model", "--hidden", "256", "--epochs", "1", "--output", str(run)]
    assert main(train) == 0 and main(["pack", str(run)]) == 0
    assert (run / "packed.safetensors").stat().st_size < (run / "model.pt").stat().st_size / 20
    capsys.readouterr()
    labels = []
    for name in ("model.pt", "packed.safetensors"):
        assert main(["predict", str(run / name), str(samples)]) == 0
        labels.append(capsys.readouterr().out)
    assert labels[0] == labels[1] and len(labels[0].splitlines()) == 200


def test_what_can_not_be_packed_is_one_line(tmp_path, capsys):
    train = ["train", "--quiet", "--save-model", "--method", "finetune", "--hidden", "32", "--epochs", "1"]
    assert main([*train, "--output", str(tmp_path / "run")]) == 0
    assert main(["pack", str(tmp_path / "run")]) == 2
    assert "model: expected a binarized network in" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "none")]) == 2


# ---- compiled and exported


FRESH = """
import sys, torch
import engram_kernels
x = torch.load(sys.argv[2])
load = torch._inductor.aoti_load_package if sys.argv[3] == "aoti" else lambda path: torch.export.load(path).module()
torch.save(load(sys.argv[1])(x), sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.parametrize("readout", ["linear", "dendritic", "prototype", "ridge"])
@pytest.mark.parametrize("way", ["compile", "export", "aoti"])
def test_compiled_and_exported_models_give_the_same_scores(readout, way, tmp_path):
    model = ek.EngramMLP((784, 100, 10), readout=readout)
    x = images(20, 784)
    if readout in ("prototype", "ridge"):
        model.observe(x, torch.randint(9, (20,)))
    packed = ek.pack(model)
    if way == "compile":
        scores = torch.compile(packed, fullgraph=True)(x)
    else:
        samples = torch.export.Dim("samples", min=1, max=1024)
        program = torch.export.export(packed, (x,), dynamic_shapes=({0: samples},))
        if way == "export":
            torch.export.save(program, tmp_path / "model.pt2")
        else:
            torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.save(x, tmp_path / "x")
        arguments = [tmp_path / "model.pt2", tmp_path / "x", way, tmp_path / "scores"]
        subprocess.run([sys.executable, "-c", FRESH, *map(str, arguments)], check=True)
        scores = torch.load(tmp_path / "scores")
    torch.testing.assert_close(scores, packed(x), rtol=1e-5, atol=1e-5)  # compiled sums round in another order


@pytest.mark.slow
@pytest.mark.parametrize("way", ["export", "aoti"])
def test_a_process_that_lacks_the_package_is_told_which(way, tmp_path):
    program = torch.export.export(ek.pack(ek.EngramMLP((64, 100, 10))), (images(3, 64),))
    if way == "export":
        torch.export.save(program, tmp_path / "model.pt2")
    else:
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save(images(3, 64), tmp_path / "x")
    without = FRESH.replace("import engram_kernels\n", "")
    arguments = [tmp_path / "model.pt2", tmp_path / "x", way, tmp_path / "scores"]
    done = subprocess.run(
        [sys.executable, "-c", without, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "engram_kernels" in done.stderr, done.stderr


def test_a_program_holds_bits_and_packs_signs_of_values_alone():
    packed = ek.pack(sequential((64, 100, 50, 10), batch_norm, "value", False, False))
    program = torch.export.export(packed, (images(3, 64),))
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    called = [str(node.target) for graph in graphs for node in graph.nodes if "engram_kernels" in str(node.target)]
    assert called == ["engram_kernels.packed_network.default"]
    floats = [t for t in program.state_dict.values() if t.dtype.is_floating_point and t.dim() > 1]
    assert not floats


# ---- convolutions


def image_norm(channels):
    """As training leaves it, with factors below and above 0, and one of 0."""
    norm = nn.BatchNorm2d(channels)
    norm.load_state_dict(batch_norm(channels).state_dict())
    return norm


def convolution(inputs, outputs, kernel=3, **settings):
    layer = ek.BinaryEngramConv2d(inputs, outputs, kernel, **settings)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def assert_same_images(model, packed, x):
    """By one operator and layer by layer."""
    assert_same(model.eval(), packed, x)
    state = packed._begin(x)
    for layer in packed.layers:
        state = layer(state)
    assert torch.equal(state.y.float(), packed(x))


def whole_images(samples, shape):
    return torch.randint(256, (samples, *shape), dtype=torch.uint8)


@settings(deadline=None, max_examples=60)
@given(
    channels=st.lists(st.sampled_from([1, 3, 8, 20, 64, 70, 128]), min_size=3, max_size=3),
    size=st.tuples(st.integers(5, 12), st.integers(5, 12)),
    kernel=st.sampled_from([1, 2, 3, (3, 1)]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    pool=st.sampled_from(["none", "before the norm", "after the norm", "twice"]),
    scaled=st.booleans(),
    bias=st.booleans(),
    samples=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_scores_of_convolutions_are_those_of_the_model(
    channels, size, kernel, stride, padding, dilation, pool, scaled, bias, samples, seed
):
    torch.manual_seed(seed)
    first, second, third = channels
    real = {"padding": 1, "scaled": scaled, "bias": bias, "binary_input": False}
    own = {"stride": stride, "padding": padding, "dilation": dilation, "scaled": scaled, "bias": bias}
    pools = {
        "none": [image_norm(third)],
        "before the norm": [nn.MaxPool2d(2, 1), image_norm(third)],
        "after the norm": [image_norm(third), nn.MaxPool2d(2, stride=1, padding=1)],
        "twice": [nn.MaxPool2d(2, 1), image_norm(third), nn.Hardtanh(), nn.MaxPool2d((1, 2), 1), image_norm(third)],
    }
    layers = [
        convolution(first, second, 3, **real),
        image_norm(second),
        convolution(second, third, kernel, **own),
        *pools[pool],
        nn.Flatten(),
    ]
    try:
        units = nn.Sequential(*layers).eval()(torch.zeros(1, first, *size, dtype=torch.uint8)).shape[1]
    except RuntimeError:  # an image smaller than the kernel
        return
    model = nn.Sequential(*layers, ek.BinaryEngramLinear(units, 10, scaled=scaled))
    packed = ek.pack(model, sample_shape=(first, *size))
    for x in (whole_images(samples, (first, *size)), torch.randn(samples, first, *size)):
        assert_same_images(model, packed, x)


@pytest.mark.parametrize("sums_to_zero", [False, True])
def test_ties_of_convolutions(sums_to_zero, isa):
    """Thresholds that sums often meet, and maxima of equal values."""
    norm, sign = nn.BatchNorm2d(70, affine=sums_to_zero), -1.0 if sums_to_zero else 1.0
    if sums_to_zero:
        nn.init.constant_(norm.weight, sign)
    model = nn.Sequential(
        convolution(4, 70, 1, bias=False, scaled=False, binary_input=False), nn.BatchNorm2d(70),
        convolution(70, 70, 2, bias=False, scaled=False), nn.MaxPool2d(2), norm, nn.Flatten(),
        ek.BinaryEngramLinear(70 * 9, 3, False, scaled=False),
    ).eval()  # fmt: skip
    x = torch.randint(3, (50, 4, 7, 7), dtype=torch.uint8)
    y = model[:3](x)
    assert int((y == 0).sum()) > 100
    assert_same_images(model, ek.pack(model, sample_shape=(4, 7, 7)), x)


@pytest.mark.parametrize("shape", [(1, 9, 8), (6, 7, 5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_first_convolution_may_take_signs(shape, groups):
    model = nn.Sequential(
        nn.Unflatten(1, shape), convolution(shape[0], 8, groups=groups if shape[0] > 1 else 1), nn.Flatten()
    )
    packed = ek.pack(model)
    assert_same_images(model, packed, torch.randn(7, math.prod(shape)))
    with pytest.raises(RuntimeError, match="of which the first layer takes the signs, got uint8"):
        packed(torch.zeros(1, math.prod(shape), dtype=torch.uint8))


@pytest.mark.parametrize("gates", ["channels", "units"])
@pytest.mark.parametrize("engram", ["value", "magnitude", "bernoulli", "context"])
@pytest.mark.parametrize("scaled", [False, True])
def test_engrams_of_convolutions(engram, gates, scaled):
    model = nn.Sequential(
        convolution(3, 20, padding=1, binary_input=False), image_norm(20),
        convolution(20, 12, padding=1, groups=2, engram=ENGRAMS[engram](), gates=gates, scaled=scaled), image_norm(12),
        nn.Flatten(), ek.BinaryEngramLinear(12 * 30, 5, engram=ENGRAMS[engram]()),
    )  # fmt: skip
    if gates == "channels" and engram in ("value", "magnitude"):
        with pytest.raises(ValueError, match=r"2: expected gates='units' of a StochasticEngram"):
            ek.pack(model, sample_shape=(3, 6, 5))
        return
    assert_same_images(model, ek.pack(model, sample_shape=(3, 6, 5)), whole_images(9, (3, 6, 5)))


@pytest.mark.parametrize("by_unit", [False, True])
@pytest.mark.parametrize("norm", [None, batch_norm, exact_norm])
@pytest.mark.parametrize("engram", ["none", "value"])
def test_norms_after_the_flattening(by_unit, norm, engram):
    layers = [] if norm is None else [norm(8 * 30)]
    if by_unit:
        layers.append(nn.Hardtanh())
    model = nn.Sequential(
        convolution(1, 8, padding=1, bias=False, scaled=norm is not exact_norm, binary_input=False), nn.Flatten(),
        *([] if engram != "none" and by_unit and norm is not None else layers),
        ek.BinaryEngramLinear(8 * 30, 5, engram=ENGRAMS[engram]()),
    )  # fmt: skip
    if by_unit and norm is None and engram == "value":
        with pytest.raises(ValueError, match="2: expected a BatchNorm before an engram"):
            ek.pack(model, sample_shape=(1, 6, 5))
        return
    assert_same_images(model, ek.pack(model, sample_shape=(1, 6, 5)), whole_images(9, (1, 6, 5)))


@pytest.mark.parametrize("readout", [ek.RidgeReadout, ek.PrototypeReadout])
def test_a_read_out_counts_what_a_convolution_gives(readout, tmp_path):
    torch.manual_seed(0)
    features = nn.Sequential(convolution(3, 20, padding=1, binary_input=False, scaled=False), nn.Flatten()).eval()
    head = readout(20 * 30, 4, engram=ek.StochasticEngram(0.2)).eval()
    x, y = whole_images(80, (3, 6, 5)), torch.randint(4, (80,))
    with torch.no_grad():
        head.observe(features(x[:40]), y[:40])
    packed = ek.pack(nn.Sequential(features, head), sample_shape=(3, 6, 5), learning=True)
    packed.save(tmp_path / "model")
    packed = ek.load_packed(tmp_path / "model").partial_fit(x[40:], y[40:])
    with torch.no_grad():
        head.observe(features(x[40:]), y[40:])
    assert_same(nn.Sequential(features, head), packed, x)


@pytest.fixture
def image_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 12, 12)), convolution(1, 64, 5, padding=2, binary_input=False), image_norm(64),
        convolution(64, 20, padding=1), nn.MaxPool2d(2), image_norm(20), nn.Flatten(), nn.Dropout(0.2),
        ek.BinaryEngramLinear(20 * 36, 10),
    ).eval()  # fmt: skip


def test_a_file_of_convolutions_gives_the_same_model(image_model, tmp_path):
    packed, x = ek.pack(image_model, labels=list("abcdefghij")), whole_images(20, (144,))
    packed.save(tmp_path / "model")
    loaded = ek.load_packed(tmp_path / "model")
    assert torch.equal(loaded(x), packed(x)) and loaded.predict(x) == packed.predict(x)
    weights = sum(weight.numel() for weight in image_model.parameters() if weight.dim() > 1)
    assert (tmp_path / "model").stat().st_size < weights / 8 + 8000  # bits, thresholds of channels and the header


@pytest.mark.parametrize("layers, message", [
    (lambda c: [c(1, 4, 3)], "sample_shape: expected .* begins with a convolution, 0, got None"),
    (lambda c: [nn.Unflatten(1, (1, 6, 6)), c(2, 4, 3)], "1: expected images of 2 channels, got 1"),
    (lambda c: [nn.Unflatten(1, (6, 6)), c(1, 4, 3)], r"0: expected nn.Unflatten\(1, \(channels, height, width\)\)"),
    (lambda c: [nn.Unflatten(1, (1, 6, 6)), c(1, 4, 7)], "window: expected a kernel that fits into the padded height"),
    (lambda c: [nn.Unflatten(1, (1, 6, 6)), c(1, 4, 3)], "the end of the model: expected nn.Flatten"),
    (lambda c: [nn.Unflatten(1, (1, 6, 6)), c(1, 4, 3), nn.MaxPool2d(2), nn.Flatten()], "2: expected signs after Max"),
    (
        lambda c: [nn.Unflatten(1, (1, 6, 6)), c(1, 4, 3), ek.BinaryEngramLinear(4, 2)],
        r"2: expected nn.Flatten\(\) before it, got images of \(4, 4, 4\)",
    ),
    (
        lambda c: [nn.Unflatten(1, (1, 6, 6)), c(1, 4, 3), nn.Flatten(), c(4, 4, 3)],
        "3: expected images before a convolution, got flat values",
    ),
    (lambda c: [nn.Unflatten(1, (1, 6, 6)), nn.MaxPool2d(2), c(1, 4, 3)], "1: expected a convolution before MaxPool2d"),
    (
        lambda c: [nn.Unflatten(1, (1, 6, 6)), c(1, 4, 3), nn.MaxPool2d(2, ceil_mode=True), c(4, 4, 1)],
        "2: expected a MaxPool2d without ceil_mode",
    ),
    (
        lambda c: [nn.Unflatten(1, (1, 6, 6)), c(1, 4, 3), nn.BatchNorm1d(4), c(4, 4, 1)],
        r"2: expected a BatchNorm2d of images of \(4, 4, 4\), got BatchNorm1d",
    ),
    (
        lambda c: [nn.Unflatten(1, (1, 6, 6)), c(1, 4, 3), nn.AvgPool2d(2), c(4, 4, 1)],
        "2: expected a binary layer, .* got AvgPool2d",
    ),
    (
        lambda c: [nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 4, 3), c(4, 4, 1)],
        "1: expected a binary layer, .* got Conv2d",
    ),
    (
        lambda c: [
            nn.Unflatten(1, (1, 6, 6)), c(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(),
            ek.BinaryEngramLinear(16, 3, engram=ek.StochasticEngram(0.5)),
        ],
        "2: expected signs after MaxPool2d, got values that 4 needs",
    ),
    (
        lambda c: [nn.Unflatten(1, (1, 6, 6)), c(1, 4, 3, binary_input=False), c(4, 4, 3, binary_input=False)],
        "2: expected binary_input=True after the first layer",
    ),
    (
        lambda c: [nn.Unflatten(1, (2, 6, 6)), c(2, 4, 3, binary_input=False, groups=2), nn.Flatten()],
        "window: expected one group of real inputs, got 2",
    ),
])  # fmt: skip
def test_networks_of_convolutions_without_a_packed_form_are_refused_by_name(layers, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ek.pack(nn.Sequential(*layers(ek.BinaryEngramConv2d)))


@pytest.mark.parametrize("sample_shape", [(28, 28), (1, 0, 28), 28, (1, 2.0, 3)])
def test_a_shape_that_is_none_is_refused(sample_shape):
    with pytest.raises(ValueError, match=r"sample_shape: expected \(channels, height, width\), got"):
        ek.pack(nn.Sequential(convolution(1, 2), nn.Flatten()), sample_shape=sample_shape)


@pytest.mark.parametrize("change, message", [
    (lambda layers: layers[0]["window"].update(stride_h=0), r"layer 0 \(convolution\), window: expected 1 to"),
    (lambda layers: layers[0]["window"].update(kernel_h=99), r"layer 0 .*, weight: expected torch.int64 \(64, 8\)"),
    (lambda layers: layers[0]["window"].pop("top"), r"layer 0 \(convolution\), window: expected a window of this kind"),
    (lambda layers: layers[2]["window"].update(height=11), r"layer 2 \(convolution\), units: expected 9216"),
    (lambda layers: layers[3].update(units=2881), r"layer 3 \(sign\), threshold: expected a size that divides 2881"),
    (lambda layers: layers[4]["window"].update(groups=2), r"layer 4 \(max_pool\), window: expected one group, got 2"),
    (lambda layers: layers[5].update(real=True), r"layer 5 \(product\), real: expected false after the first product"),
])  # fmt: skip
def test_convolutions_that_make_no_network_are_refused_by_name(image_model, tmp_path, change, message):
    path = tmp_path / "model"
    ek.pack(image_model).save(path)
    network = network_of(path)
    assert [layer["kind"] for layer in network["layers"][:6]] == [
        "convolution", "sign", "convolution", "sign", "max_pool", "product"
    ]  # fmt: skip
    change(network["layers"])
    edited(path, {"network": json.dumps(network)})
    with pytest.raises(ValueError, match=message):
        ek.load_packed(path)


def test_onnx_of_convolutions_is_refused_by_name(onnx, image_model, tmp_path):
    with pytest.raises(TypeError, match=r"model: expected a network without layers on images, got layer 0 \(convol"):
        ek.export_onnx(image_model, tmp_path / "model.onnx")


def test_an_exported_convolution_is_one_operator(image_model):
    x = whole_images(3, (144,))
    samples = torch.export.Dim("samples", min=1, max=1024)
    program = torch.export.export(ek.pack(image_model), (x,), dynamic_shapes=({0: samples},))
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    called = [str(node.target) for graph in graphs for node in graph.nodes if "engram_kernels" in str(node.target)]
    assert called == ["engram_kernels.packed_network.default"]
    x = whole_images(7, (144,))
    assert torch.equal(program.module()(x), ek.pack(image_model)(x))


@pytest.mark.slow
def test_a_compiled_convolution_gives_the_same_scores(image_model):
    packed = ek.pack(image_model)
    for x in (whole_images(3, (144,)), torch.randn(3, 144)):
        torch.testing.assert_close(torch.compile(packed, fullgraph=True)(x), packed(x))

"""Folders of models: what comes back is what was saved, and nothing else is read."""

import json

import pytest
import torch
from torch import nn

import engram_kernels as ek
from engram_kernels import pretrained

pytest.importorskip("safetensors", reason="safetensors is not installed")


def stochastic(temperature=0.5):
    return ek.StochasticEngram(0.2, temperature)


def shared():
    engram = ek.ContextEngram(3, 0.4)
    layer = ek.BinaryEngramLinear(20, 20, engram=engram)
    return nn.Sequential(layer, nn.LayerNorm(20), layer, ek.BinaryEngramLinear(20, 4, engram=engram))


def nested():
    hidden = nn.Sequential(ek.BinaryEngramLinear(20, 33, binary_input=False), nn.BatchNorm1d(33, affine=False))
    head = ek.BinaryEngramLinear(33, 4, bias=False, engram=ek.BernoulliEngram(0.3), ste_window=float("inf"))
    return nn.Sequential(hidden, nn.Dropout(0.1), head)


def frozen_half():
    model = ek.EngramMLP((20, 40, 30, 4), readout="linear", engram=ek.BernoulliEngram(0.3, sample_at_eval=True))
    model.layers[0].requires_grad_(False)
    return model


MODELS = {
    "as it comes": lambda: ek.EngramMLP((20, 40, 4)),
    "ridge": lambda: ek.EngramMLP((100, 40, 4), readout="ridge", engram=0.3, encode=False),
    "prototype": lambda: ek.EngramMLP((20, 40, 4), readout="prototype"),
    "read-out of its own": lambda: ek.EngramMLP(
        (20, 40, 4), readout=ek.DendriticReadout(40, 4, 7, engram=stochastic(), top_segments=3, conscience=2.0)
    ),
    "paper": lambda: ek.EngramMLP((20, 40, 30, 4), readout="linear", logit_scale=2.5, ste_window=3.0),
    "frozen half": frozen_half,
    "nested": nested,
    "shared": shared,
    "bfloat16": lambda: nested().to(torch.bfloat16),
    "a read-out": lambda: ek.RidgeReadout(20, 4, engram=stochastic(), penalty=0.3),
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, padding="same"), nn.MaxPool2d(2), nn.Flatten(), ek.BinaryEngramLinear(3 * 4, 4)
    ),
    "sizes without a hidden layer": lambda: ek.EngramMLP((20, 4), readout="linear", engram=None, encode=False),
}


def inputs(model, count=5):
    if isinstance(model, ek.EngramMLP):
        return torch.randn(count, model.sizes[0])
    if isinstance(model, nn.Sequential) and isinstance(model[0], nn.Conv2d):
        return torch.randn(count, 1, 4, 4)
    return torch.randn(count, 20, dtype=next((p.dtype for p in model.parameters()), torch.float32))


def learn_a_little(model):
    """So that statistics, counts and wins are not those of a new model."""
    model.train()
    for module in model.modules():
        if isinstance(module, ek.ContextEngram):
            module.context = 1
    x, y = inputs(model, 80), torch.arange(80) % 4
    readout = getattr(model, "readout", model)
    if isinstance(readout, (ek.RidgeReadout, ek.PrototypeReadout)):
        model.observe(x, y)
    elif isinstance(model, ek.EngramMLP):
        loss = model.loss(x, y)
        loss.backward()
        ek.MetaplasticAdam([p for p in model.parameters() if p.requires_grad]).step()
    else:
        model(x)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_as_it_was(tmp_path, name):
    torch.manual_seed(0)
    model = MODELS[name]()
    learn_a_little(model)
    model.eval()
    ek.save_pretrained(model, tmp_path / "folder" / "model")
    again = ek.from_pretrained(tmp_path / "folder" / "model")
    assert type(again) is type(model) and not again.training
    for module in again.modules():
        if isinstance(module, ek.ContextEngram):
            module.context = 1  # a setting of the moment
    own, other = model.state_dict(), again.state_dict()
    assert own.keys() == other.keys()
    assert all(own[key].dtype == other[key].dtype and torch.equal(own[key], other[key]) for key in own)
    assert str(again) == str(model)
    frozen = [[key for key, p in m.named_parameters() if not p.requires_grad] for m in (model, again)]
    assert frozen[0] == frozen[1]
    x = inputs(model)
    for training in (False, True):  # in training, with the gradients of its window and the noise of its engrams
        results = []
        for each in (model.train(training), again.train(training)):
            torch.manual_seed(7)
            each.zero_grad()
            y = each(x)
            if y.requires_grad:
                y.square().sum().backward()
            results.append([y, *(p.grad for p in each.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1])
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_modules_that_were_shared_are(tmp_path):
    ek.save_pretrained(shared(), tmp_path)
    again = ek.from_pretrained(tmp_path)
    assert again[0] is again[2] and again[0].engram is again[3].engram


def test_a_classifier_comes_back(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    x, y = torch.randn(60, 5).numpy(), (torch.arange(60) % 3).numpy()
    model = ek.EngramClassifier(n_units=256, random_state=0).fit(x, y)
    ek.save_pretrained(model, tmp_path)
    again = ek.from_pretrained(tmp_path)
    assert (again.predict(x) == model.predict(x)).all()


def test_a_second_model_replaces_the_first_and_leaves_other_files(tmp_path):
    (tmp_path / "README.md").write_text("about it")
    ek.save_pretrained(ek.EngramMLP((20, 40, 4)), tmp_path)
    ek.save_pretrained(nested(), tmp_path)
    assert isinstance(ek.from_pretrained(tmp_path), nn.Sequential)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


class OwnNetwork(ek.EngramMLP):
    pass


def pruned():
    layer = ek.BinaryEngramLinear(20, 4)
    nn.utils.parametrizations.weight_norm(layer)
    return layer


def tied():
    one, two = ek.BinaryEngramLinear(20, 20), ek.BinaryEngramLinear(20, 20)
    two.weight = one.weight
    return nn.Sequential(one, two)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: OwnNetwork((20, 40, 4)),
            TypeError,
            "model: expected one of .*EngramMLP.*, got OwnNetwork, whose code",
        ),
        (lambda: nn.Sequential(nn.Bilinear(2, 2, 2)), TypeError, "model.0: expected one of .*, got Bilinear"),
        (lambda: ek.EngramMLP((4, 8, 2), readout=nn.Bilinear(2, 2, 2)), TypeError, "model.readout: .*got Bilinear"),
        (pruned, TypeError, "got ParametrizedBinaryEngramLinear"),
        (tied, ValueError, "1.weight: expected a tensor of one module alone, got that of 0.weight"),
    ],
)
def test_what_cannot_come_back_is_not_saved(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        ek.save_pretrained(make(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def saved(folder):
    ek.save_pretrained(nested(), folder)
    return folder / pretrained.CONFIG_FILE, folder / pretrained.WEIGHTS_FILE


def edit(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


DAMAGE = {
    "no config": (lambda config, weights: config.unlink(), FileNotFoundError, "expected config.json in .*, found none"),
    "no weights": (lambda config, weights: weights.unlink(), FileNotFoundError, "expected model.safetensors in"),
    "no JSON": (lambda config, weights: config.write_text("{"), ValueError, "config.json: expected JSON"),
    "a list": (lambda config, weights: config.write_text("[]"), ValueError, "of another library"),
    "another library": (
        lambda config, weights: edit(config, lambda c: c.update(model_type="bert")),
        ValueError,
        "expected model_type engram_kernels",
    ),
    "newer": (
        lambda config, weights: edit(config, lambda c: c.update(version=2)),
        ValueError,
        "expected version 1 at most, got 2",
    ),
    "truncated": (
        lambda config, weights: weights.write_bytes(weights.read_bytes()[:-40]),
        ValueError,
        "expected a whole safetensors file",
    ),
    "foreign class": (
        lambda config, weights: edit(config, lambda c: c["modules"][0].update({"class": "os.system"})),
        ValueError,
        "class: expected one of .*got 'os.system'",
    ),
    "other sizes": (
        lambda config, weights: edit(config, lambda c: c["modules"][0]["settings"].update(out_features=34)),
        ValueError,
        r"expected \(34,.*got \(33,",
    ),
    "a setting out of range": (
        lambda config, weights: edit(config, lambda c: c["modules"][0]["settings"].update(ste_window=-1.0)),
        ValueError,
        "ste_window: expected above 0, got -1.0",
    ),
    "an unknown setting": (
        lambda config, weights: edit(config, lambda c: c["modules"][0]["settings"].update(colour=1)),
        ValueError,
        "expected config.json and model.safetensors of one model .*colour",
    ),
    "no modules": (lambda config, weights: edit(config, lambda c: c.pop("modules")), ValueError, "of one model"),
    "a module that comes later": (
        lambda config, weights: edit(config, lambda c: c["modules"].reverse()),
        ValueError,
        "of one model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_by_name(tmp_path, damage):
    inflict, error, message = DAMAGE[damage]
    inflict(*saved(tmp_path))
    with pytest.raises(error, match=message):
        ek.from_pretrained(tmp_path)


def test_a_tensor_too_many_or_too_few_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    _, weights = saved(tmp_path)
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if name != "2.weight"}, weights)
    with pytest.raises(ValueError, match="2.weight: expected in both files or in none"):
        ek.from_pretrained(tmp_path)
    save_file(tensors | {"more": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match="more: expected in both files or in none"):
        ek.from_pretrained(tmp_path)

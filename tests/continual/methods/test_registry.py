"""The registry: every method has what defines it, options are checked, and all methods keep the same promises."""

import dataclasses
import io
import math
import runpy

import pytest
import torch

from engram_kernels.continual.checkpoint import plain
from engram_kernels.continual.data import Dataset
from engram_kernels.continual.methods import METHODS, GradientConfig, build, config_of, method_config
from engram_kernels.continual.scenarios import SCENARIOS, class_scenario
from engram_kernels.continual.training import evaluate


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("dataset", ["digits", "mnist", "own"])
def test_every_method_has_what_defines_it(scenario, dataset):
    configs = {name: method_config(name, scenario, dataset) for name in METHODS}
    assert configs["engram"].rate is not None
    assert configs["mbnn"].rate is None
    assert configs["bnn"].rate is None
    assert configs["bnn"].metaplasticity == 0
    assert configs["engram-fp"].loss == "local"
    assert all(configs[name].strength > 0 for name in ("ewc", "si", "lwf"))
    compared = ("finetune", "ewc", "si", "lwf", "replay", "joint")
    assert len({(configs[name].lr, configs[name].batch_size, configs[name].epochs) for name in compared}) == 1


def test_overrides_win_and_none_keeps_the_default():
    default = method_config("engram", "class", "digits")
    assert method_config("engram", "class", "digits", lr=None, rate=None) == default
    changed = method_config("engram", "class", "digits", lr=(0.1, 0.2, 0.3), rate=0.3, epochs=7, loss="all")
    assert changed == dataclasses.replace(default, lr=(0.1, 0.2, 0.3), rate=0.3, epochs=7, loss="all")


@pytest.mark.parametrize(
    ("method", "options", "wanted"),
    [
        ("magic", {}, "method: expected one of engram, mbnn, bnn, finetune, .*, engram-fp, classifier, got 'magic'"),
        ("engram", {"rate": 0.0}, r"rate: expected a number in \(0, 1\], got 0.0"),
        ("engram", {"rate": 1.5}, r"rate: expected a number in \(0, 1\], got 1.5"),
        ("engram", {"rate": math.nan}, r"rate: expected a number in \(0, 1\], got nan"),
        ("engram", {"temperature": -1.0}, "temperature: expected a number >= 0, got -1.0"),
        ("engram", {"temperature": math.nan}, "temperature: expected a number >= 0, got nan"),
        ("engram", {"temperature": 1e-9}, "temperature: expected 0 or at least 1e-6"),
        ("engram", {"ste_window": 0.0}, "ste_window: expected a number > 0, got 0.0"),
        ("engram", {"lr": 0.0}, "lr: expected a finite number > 0, got 0.0"),
        ("engram", {"lr": (0.1, math.nan, 0.1)}, "lr: expected a finite number > 0, got nan"),
        ("engram", {"metaplasticity": -0.5}, "metaplasticity: expected a finite number >= 0, got -0.5"),
        ("engram", {"weight_decay": -1.0}, "weight_decay: expected a finite number >= 0, got -1.0"),
        ("engram", {"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ("engram", {"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ("engram", {"state_dtype": "int4"}, "state_dtype: expected one of float32, bfloat16, int8, got 'int4'"),
        ("engram", {"weight_dtype": "int8"}, "weight_dtype: expected one of float32, bfloat16, got 'int8'"),
        ("engram", {"loss": "hinge"}, "loss: expected one of all, batch, local, got 'hinge'"),
        (
            "engram",
            {"readout": "linear", "loss": "local"},
            "loss: expected local only with readout dendritic, got it with linear",
        ),
        ("engram", {"strength": 1.0}, "strength: expected only with methods that have it, got it with method engram"),
        ("mbnn", {"rate": 0.1}, "rate: expected only with a method that has engram gates, .* method mbnn"),
        ("bnn", {"temperature": 1.0}, "temperature: expected only with a method that has engram gates"),
        ("bnn", {"metaplasticity": 1.0}, r"metaplasticity: expected 0 with method bnn, got 1.0 \(that is method mbnn"),
        ("finetune", {"strength": 1.0}, "strength: expected only with methods that have it, .* method finetune"),
        ("finetune", {"metaplasticity": 1.0}, "metaplasticity: expected only with methods that have it"),
        ("finetune", {"lr": (0.1, 0.2)}, r"lr: expected one value with a full-precision method, got \(0.1, 0.2\)"),
        ("finetune", {"lr": math.inf}, "lr: expected a finite number > 0, got inf"),
        ("finetune", {"loss": "local"}, "loss: expected all or batch with a full-precision method, got local"),
        ("ewc", {"strength": -1.0}, "strength: expected a finite number >= 0, got -1.0"),
        ("ewc", {"decay": 1.1}, r"decay: expected a number in \[0, 1\], got 1.1"),
        ("ewc", {"decay": math.nan}, r"decay: expected a number in \[0, 1\], got nan"),
        ("ewc", {"buffer_size": 5}, "buffer_size: expected only with methods that have it, got it with method ewc"),
        ("si", {"strength": math.inf}, "strength: expected a finite number >= 0, got inf"),
        ("si", {"decay": 0.5}, "decay: expected only with methods that have it, got it with method si"),
        ("lwf", {"strength": math.nan}, "strength: expected a finite number >= 0, got nan"),
        ("lwf", {"distillation_temperature": 0.0}, "distillation_temperature: expected a finite number > 0, got 0.0"),
        ("lwf", {"distillation_temperature": math.inf}, "distillation_temperature: expected a finite number > 0, got"),
        ("replay", {"buffer_size": 0}, "buffer_size: expected an integer >= 1, got 0"),
        ("engram-fp", {"rate": 0.0}, r"rate: expected a number in \(0, 1\], got 0.0"),
        ("engram-fp", {"segments": 0}, "segments: expected an integer >= 1, got 0"),
        ("engram-fp", {"top_segments": 101}, "top_segments: expected an integer from 1 to segments = 100, got 101"),
        (
            "engram",
            {"segments": 3, "top_segments": 0},
            "top_segments: expected an integer from 1 to segments = 3, got 0",
        ),
        ("engram-fp", {"conscience": -1.0}, "conscience: expected a finite number >= 0, got -1.0"),
        ("engram-fp", {"lr": (0.1, 0.2)}, "lr: expected one value with a full-precision method"),
        ("classifier", {"lr": 0.1}, "lr: expected only with methods that have it, got it with method classifier"),
        ("classifier", {"rate": 1.0}, r"rate: expected a number in \(0, 1\), got 1.0"),
        ("classifier", {"readout": "linear"}, "readout: expected one of ridge, prototype, dendritic, got 'linear'"),
        ("classifier", {"penalty": 0.0}, "penalty: expected a finite number > 0, got 0.0"),
    ],
)
def test_bad_options(method, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        build(method, method_config(method, "class", "mnist", **options), 8, [16, 16], 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scenario", ["class", "permuted"])
def test_hyper_parameters_come_back_from_the_options_of_a_file(method, scenario):
    config = method_config(method, scenario, "mnist")
    options = plain({"method": method, "hidden": [5], **dataclasses.asdict(config)})
    assert config_of(options) == config


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hidden", [[], [0], [16, -1]])
def test_bad_widths(method, hidden):
    with pytest.raises(ValueError, match="hidden: expected at least one layer width, each >= 1"):
        build(method, METHODS[method].config, 8, hidden, 3)


# What every method promises


def dataset(classes=6, features=12, train=240, test=120):
    """Separable classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, features, generator=generator)

    def part(samples):
        y = torch.arange(samples) % classes
        return centres[y] + 0.3 * torch.randn(samples, features, generator=generator), y

    return Dataset("separable", *part(train), *part(test), classes=tuple(range(classes)))


def small(method, seed=0):
    """A method for `dataset`, with a learning rate that suits so few steps."""
    torch.manual_seed(seed)
    options = {"batch_size": 10}
    if isinstance(METHODS[method].config, GradientConfig):
        options["lr"] = 0.01
    if method == "engram-fp":
        options |= {"segments": 5}
    return build(method, method_config(method, "class", "separable", **options), 12, [48, 32], 6)


def learn(method, experience, epochs=3, seed=0):
    """What the training loop does with one experience."""
    method.model.train()
    order = torch.Generator().manual_seed(seed)
    samples = method.before_training_exp(experience)
    for _ in range(epochs):
        for x, y in samples.batches(method.config.batch_size, order):
            method.observe(x, y)
    method.after_training_exp(samples)


def same(a, b):
    """Equal to the bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    return a == b


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("hidden", [[33], [40, 24]])
def test_a_built_method_maps_inputs_to_scores(name, hidden):
    scores = build(name, METHODS[name].config, 9, hidden, 4).model(torch.randn(12, 9))
    assert scores.shape == (12, 4)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_its_first_task_and_is_reproducible(name):
    scenario = class_scenario(dataset())
    methods = [small(name, seed) for seed in (3, 3, 4)]
    for method, seed in zip(methods, (3, 3, 4), strict=True):
        torch.manual_seed(seed)
        learn(method, scenario.train_stream[0], epochs=10)
        learn(method, scenario.train_stream[1], epochs=1)
    assert same(methods[0].state_dict(), methods[1].state_dict())
    assert not same(methods[0].model.state_dict(), methods[2].model.state_dict())
    method = small(name)
    learn(method, scenario.train_stream[0], epochs=10)
    assert evaluate(method.model.eval(), scenario.test_stream[0]) > 0.9


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("learned", [0, 1, 2])
def test_a_method_goes_on_from_its_saved_state_to_the_bit(name, learned, within):
    """After an experience, or within one; into a method that has learned something else meanwhile."""
    stream = class_scenario(dataset()).train_stream
    method, other = small(name, seed=1), small(name, seed=2)
    for experience in stream[:learned]:
        learn(method, experience)
    learn(other, stream[2], epochs=1)
    samples = stream[learned]
    if within:
        samples = method.before_training_exp(samples)
        for x, y in samples.batches(10):
            method.observe(x, y)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    random_state = torch.get_rng_state()

    def go_on(learner):
        torch.set_rng_state(random_state)
        if not within:
            learn(learner, samples)
        else:
            for x, y in samples.batches(10):
                learner.observe(x, y)
            learner.after_training_exp(samples)
        for experience in stream[learned + 1 :]:
            learn(learner, experience)
        return learner.state_dict()

    wanted = go_on(method)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(go_on(other), wanted)


@pytest.mark.parametrize("name", METHODS)
def test_loading_a_state_shares_no_memory_with_it(name):
    """Or training on would change what was saved. (torch's own optimizers do share theirs.)"""
    stream = class_scenario(dataset()).train_stream
    method, other = small(name), small(name)
    learn(method, stream[0])
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other.load_state_dict(method.state_dict())
    learn(other, stream[1])
    now, saved = method.state_dict(), torch.load(file, weights_only=True)
    assert now.keys() == saved.keys()
    assert all(same(now[key], saved[key]) for key in now if key != "optimizer")


def test_the_table_of_hyper_parameters_is_printed_for_the_documentation(capsys):
    runpy.run_module("engram_kernels.continual.methods", run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[2:]
    names = dict.fromkeys(field.name for preset in METHODS.values() for field in dataclasses.fields(preset.config))
    assert [row.split("`")[1] for row in rows] == list(names)

"""A hyper-parameter is stated once: its check, its option and its row of the table say the same."""

import argparse
import math
from dataclasses import dataclass

import numpy as np
import pytest

from engram_kernels import cli
from engram_kernels.continual.methods import METHODS
from engram_kernels.continual.parameters import (
    PerLayer,
    add_options,
    check_parameters,
    documented,
    given,
    markdown_table,
    merged,
    parameter,
    parameters_of,
)

STATED = merged(type(preset.config) for preset in METHODS.values())


@documented
@dataclass(frozen=True)
class Config:
    """Hyper-parameters of nothing."""

    steps: PerLayer = parameter("step size", above=0, below=math.inf)
    share: float | None = parameter("100 % of it", None, above=0, at_most=1)
    decay: float = parameter("factor", 1.0, at_least=0, at_most=1)
    width: float = parameter("window", 1.0, at_least=0)
    units: int = parameter("number", 3, at_least=1)
    kind: str = parameter("way", "a", choices=("a", "b"))
    trained: bool = parameter("whether", True)

    def __post_init__(self):
        check_parameters(self)


RANGES = {
    "steps": "a finite number > 0", "share": "a number in (0, 1]", "decay": "a number in [0, 1]",
    "width": "a number >= 0", "units": "an integer >= 1", "kind": "one of a, b", "trained": "True or False",
}  # fmt: skip
ALLOWED = {
    "steps": [1, 0.1, (0.1, 2), np.float32(0.5)], "share": [None, 1, 1e-9], "decay": [0, 1.0], "width": [0, math.inf],
    "units": [1, 10**400 // 10**399, np.int64(2)], "kind": ["b"], "trained": [False],
}  # fmt: skip
REFUSED = {
    "steps": [0, -1.0, math.inf, math.nan, (0.1, 0.0), [0.1], "0.1", None, True], "share": [0, 1.1, math.nan, "1"],
    "decay": [-0.1, 1.1, None, (0.5, 0.5)], "width": [-1, math.nan], "units": [0, 1.0, True, None, "1"],
    "kind": ["c", None, 1], "trained": [0, 1, None, "True"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ALLOWED.items() for value in values])
def test_values_in_the_range_are_taken(name, value):
    assert getattr(Config(**{"steps": 1.0, name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_other_values_are_refused_by_name_range_and_value(name, value):
    with pytest.raises(ValueError) as caught:
        Config(**{"steps": 1.0, name: value})
    got = 0.0 if value == (0.1, 0.0) else value
    assert str(caught.value) == f"{name}: expected {RANGES[name]}, got {got!r}"


def test_the_docstring_and_the_table_have_every_range():
    table = markdown_table({"one": Config(1.0), "two": Config((0.1, 0.2), units=7)})
    for name, words in RANGES.items():
        assert f"{name}: {parameters_of(Config)[name].help}; {words}." in Config.__doc__
        (row,) = (line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        assert words in row
    assert "1 (one); 0.1 0.2 (two)" in table
    assert "3 (one); 7 (two)" in table
    assert "| none (one, two) |" in table


def test_options_are_read_as_a_config_takes_them():
    parser = argparse.ArgumentParser()
    add_options(parser.add_argument_group("all"), parameters_of(Config))
    assert given(vars(parser.parse_args([])), parameters_of(Config)) == {}
    options = vars(
        parser.parse_args(["--steps", "0.1", "2", "--share", "0.5", "--units", "2", "--kind", "b", "--no-trained"])
    )
    wanted = {"steps": (0.1, 2.0), "share": 0.5, "units": 2, "kind": "b", "trained": False}
    assert given(options, parameters_of(Config)) == wanted
    assert Config(**given(options, parameters_of(Config))).steps == (0.1, 2.0)
    assert given(vars(parser.parse_args(["--steps", "3"])), parameters_of(Config)) == {"steps": 3.0}
    assert "a number in (0, 1]" in " ".join(parser.format_help().split())


@pytest.mark.parametrize("command", ["train", "compare"])
def test_every_hyper_parameter_of_every_method_is_an_option(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, stated in STATED.items():
        assert f"--{name.replace('_', '-')}" in printed
        assert stated.help in printed

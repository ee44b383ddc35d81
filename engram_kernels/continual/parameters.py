"""A hyper-parameter is stated once: a dataclass field with its name, type, default, help and range.

The checks, the options of the command line and the table of the documentation follow from the fields. Python's own
dataclasses and argparse suffice. tyro and jsonargparse make a command line of one dataclass; ours is that of several,
where an option that is not given has the default of the method, the scenario and the data set. pydantic checks ranges,
but makes neither options nor errors of one line. Each would be one more dependency of the kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

PerLayer = float | tuple[float, ...]

_KEY = "parameter"
_Config = TypeVar("_Config")


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter but for its name.

    Attributes:
        help: its meaning.
        default: its value unless one is given; dataclasses.MISSING if one must be.
        above: every value is larger.
        at_least: every value is as large or larger.
        below: every value is smaller.
        at_most: every value is as large or smaller.
        choices: the values of a text; empty for a number.
        group: the group of options that it belongs to.
        kind: type of one value: int, float, str or bool.
        several: whether a tuple of values is one too.
        optional: whether None is one too.
    """

    help: str
    default: Any = dataclasses.MISSING
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    group: str = "hyper-parameters"
    kind: type = float
    several: bool = False
    optional: bool = False

    @property
    def range(self) -> str:
        """Its values, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "True or False"
        noun = "an integer" if self.kind is int else "a finite number" if self.below == math.inf else "a number"
        open_below, lowest = self.above is not None, self.at_least if self.above is None else self.above
        open_above, highest = self.at_most is None, self.below if self.at_most is None else self.at_most
        if lowest is not None and highest not in (None, math.inf):
            return f"{noun} in {'(' if open_below else '['}{lowest}, {highest}{')' if open_above else ']'}"
        return noun if lowest is None else f"{noun} {'>' if open_below else '>='} {lowest}"

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError unless it may have ``value``: ``name``, what was expected and what was got."""
        if value is None and self.optional:
            return
        for one in value if self.several and isinstance(value, tuple) else (value,):
            if not self._allows(one):
                raise ValueError(f"{name}: expected {self.range}, got {one!r}")

    def _allows(self, value: Any) -> bool:
        if self.kind in (bool, str):
            return type(value) is self.kind and (not self.choices or value in self.choices)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if self.kind is int else numbers.Real):
            return False
        number = float(value)
        return (
            not math.isnan(number)
            and (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.below is None or number < self.below)
            and (self.at_most is None or number <= self.at_most)
        )


def parameter(help: str, default: Any = dataclasses.MISSING, **stated: Any) -> Any:
    """A dataclass field that is a hyper-parameter: ``stated`` are fields of `Parameter`; the annotation is its type."""
    return dataclasses.field(default=default, metadata={_KEY: Parameter(help, default, **stated)})


def parameters_of(config: type) -> dict[str, Parameter]:
    """The hyper-parameters of a dataclass by name, in order."""
    annotations = typing.get_type_hints(config)
    found = {}
    for field in dataclasses.fields(config):
        kinds = typing.get_args(annotations[field.name]) or (annotations[field.name],)
        tuples = [kind for kind in kinds if typing.get_origin(kind) is tuple]
        (kind,) = set(kinds) - {*tuples, types.NoneType}
        found[field.name] = dataclasses.replace(
            field.metadata[_KEY], kind=kind, several=bool(tuples), optional=types.NoneType in kinds
        )
    return found


def check_parameters(config: Any) -> None:
    """Raises ValueError unless every hyper-parameter of a dataclass's instance is in its range."""
    for name, stated in parameters_of(type(config)).items():
        stated.check(name, getattr(config, name))


def documented(config: type[_Config]) -> type[_Config]:
    """Adds the hyper-parameters of a dataclass to its docstring."""
    lines = (f"\n        {name}: {stated.help}; {stated.range}." for name, stated in parameters_of(config).items())
    config.__doc__ = f"{(config.__doc__ or '').rstrip()}\n\n    Attributes:{''.join(lines)}\n    "
    return config


def merged(configs: Iterable[type]) -> dict[str, Parameter]:
    """The hyper-parameters of several dataclasses: of those with the same name the first."""
    found: dict[str, Parameter] = {}
    for config in configs:
        for name, stated in parameters_of(config).items():
            found.setdefault(name, stated)
    return found


def add_options(group: argparse._ArgumentGroup, parameters: Mapping[str, Parameter]) -> None:
    """Adds an option for each hyper-parameter; one that is not given leaves no trace in what is parsed.

    The option only reads a number; its range is checked with the hyper-parameter's, where the method is known.
    """
    for name, stated in parameters.items():
        settings: dict[str, Any] = {}
        text = stated.help
        if stated.kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif stated.choices:
            settings["choices"] = stated.choices
        else:
            settings |= {"type": stated.kind, "metavar": "N" if stated.kind is int else "X"}
            text += f"; {stated.range}"
        if stated.several:
            settings["nargs"] = "+"
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **settings)


def given(options: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """The hyper-parameters among parsed options, as a config takes them: a tuple only for several values."""
    found = {name: options[name] for name in parameters if name in options}
    return {
        name: value if not isinstance(value, list) else tuple(value) if len(value) > 1 else value[0]
        for name, value in found.items()
    }


def markdown_table(methods: Mapping[str, Any]) -> str:
    """The hyper-parameters of methods as a table: name, range, defaults, help.

    ``methods`` are configurations by the names of their methods. Methods with the same default share an entry.
    """
    lines = ["| hyper-parameter | values | default | |", "| --- | --- | --- | --- |"]
    for name, stated in merged(map(type, methods.values())).items():
        defaults: dict[str, list[str]] = {}
        for method, config in methods.items():
            if name in parameters_of(type(config)):
                defaults.setdefault(_in_words(getattr(config, name)), []).append(method)
        several = "; or several" if stated.several else ""
        default = "; ".join(f"{value} ({', '.join(names)})" for value, names in defaults.items())
        lines.append(f"| `{name}` | {stated.range}{several} | {default} | {stated.help} |")
    return "\n".join(lines) + "\n"


def _in_words(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_in_words, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

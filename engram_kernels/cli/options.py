"""The options of a run, which `train` and every method of `compare` have, and the plan that follows from them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from ..continual import data, scenarios, training
from ..continual.data import Dataset
from ..continual.methods import METHODS, MethodConfig, check_build, method_config
from ..continual.methods.config import HYPER_PARAMETER_GROUP, MEMORY_GROUP, READOUT_GROUP
from ..continual.parameters import add_options, given, merged
from ..continual.scenarios import SCENARIOS, Scenario

HYPER_PARAMETERS = merged(type(preset.config) for preset in METHODS.values())
_GROUPS = {
    HYPER_PARAMETER_GROUP: "hyper-parameters (the default depends on method, scenario and dataset)",
    MEMORY_GROUP: "memory (default: float32 throughout)",
}


def add_training_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Adds the options of a run to a parser; returns them."""
    before = len(parser._actions)
    group = parser.add_argument_group("data and network")
    group.add_argument(
        "--dataset", nargs="+", default=["digits"], metavar="NAME",
        help=f"{', '.join(data.DATASETS)}, or the path of an .npz file with x_train, y_train, x_test, y_test; "
        "with --scenario domain two or more",
    )  # fmt: skip
    group.add_argument(
        "--data-dir", metavar="DIR", default=argparse.SUPPRESS,
        help="where the IDX files are (default: $ENGRAM_DATA_DIR, else ./data)",
    )  # fmt: skip
    group.add_argument(
        "--scenario", choices=tuple(SCENARIOS), default="class",
        help="; ".join(f"{name}: {kind.help}" for name, kind in SCENARIOS.items()),
    )  # fmt: skip
    _add_hyper_parameters(group, READOUT_GROUP)
    group.add_argument("--hidden", type=int, nargs="+", default=[2048], metavar="N", help="hidden layer widths")
    group.add_argument(
        "--tasks", type=int, metavar="N", default=argparse.SUPPRESS,
        help=f"number of tasks (default: all classes; permuted: {scenarios.DEFAULT_PERMUTED_TASKS}; "
        f"rotated: {scenarios.DEFAULT_ROTATED_TASKS}; domain: always one per data set)",
    )  # fmt: skip
    group.add_argument(
        "--classes-per-task", type=int, metavar="N", default=argparse.SUPPRESS,
        help=f"new classes per task, scenario class (default: {scenarios.DEFAULT_CLASSES_PER_TASK})",
    )  # fmt: skip
    group.add_argument(
        "--shuffle-classes", action="store_true", help="order the classes by the seed instead of by label"
    )
    group.add_argument(
        "--max-degrees", type=float, metavar="X", default=argparse.SUPPRESS,
        help=f"angle of the last task, scenario rotated (default: {scenarios.DEFAULT_MAX_DEGREES})",
    )  # fmt: skip
    group.add_argument(
        "--samples-per-task", type=int, metavar="N", default=argparse.SUPPRESS,
        help="train each task on at most N samples; not with scenario class (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--validation", type=int, metavar="N", default=argparse.SUPPRESS,
        help="test on the last N training samples and train on the rest, to choose hyper-parameters",
    )  # fmt: skip
    for name, title in _GROUPS.items():
        _add_hyper_parameters(parser.add_argument_group(title), name)
    group = parser.add_argument_group("training")
    group.add_argument(
        "--evaluation", choices=training.EVALUATIONS, default="all",
        help="after each task test on all, on those seen so far, or on the new one (and on all at the end)",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=int, metavar="N", default=argparse.SUPPRESS, help="CPU threads (default: torch's)"
    )
    group.add_argument("--save-model", action="store_true", help="also write the model, for predict")
    return parser._actions[before:]


def _add_hyper_parameters(group: argparse._ArgumentGroup, name: str) -> None:
    add_options(group, {option: stated for option, stated in HYPER_PARAMETERS.items() if stated.group == name})


def as_arguments(action: argparse.Action, value: Any) -> list[str]:
    """The words on a command line that give an option a value; none if it has that value by default."""
    if value == action.default:
        return []
    option = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [option if value else action.option_strings[1]]
    if action.nargs == 0:
        return [option]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [f"{option}={value}"]


class Plan(NamedTuple):
    """A run for each of several seeds, all of it checked."""

    datasets: list[Dataset]
    data_name: str
    scenario: Scenario  # of the first seed
    arguments: dict[str, Any]  # of training.run, besides data sets and seed
    seeds: list[int]
    config: dict[str, Any]  # for metrics.json; the seed is each run's own
    output: Path
    method_config: MethodConfig
    epochs_chosen: bool  # for the number of steps, against the method's default

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.scenario.num_classes

    def folder(self, seed: int, output: Path | None = None) -> Path:
        """Where a seed's results go, below ``output`` if not below the one planned."""
        output = self.output if output is None else output
        return output / f"seed{seed}" if len(self.seeds) > 1 else output

    def config_of(self, seed: int) -> dict[str, Any]:
        """Every option that a seed's numbers follow from."""
        return {**self.config, "seed": seed}


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan that parsed options ask for; everything that can be wrong is found before the first minute of training.

    Raises:
        ValueError: names the option, what was expected and what was got.
    """
    chosen = vars(options)
    seeds: list[int] = chosen.get("seeds") or [options.seed]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: expected different seeds, got {' '.join(map(str, seeds))}")
    for seed in seeds:
        scenarios.seeded_generator(seed, "check")
    if (threads := chosen.get("threads")) is not None and threads < 1:
        raise ValueError(f"threads: expected an integer >= 1, got {threads}")
    overrides = given(chosen, HYPER_PARAMETERS)
    tasks: dict[str, Any] = {
        name: chosen.get(name)
        for name in ("tasks", "classes_per_task", "shuffle_classes", "max_degrees", "samples_per_task")
    }
    datasets = [data.load(name, chosen.get("data_dir")) for name in options.dataset]
    if (validation := chosen.get("validation")) is not None:
        datasets = [data.hold_out(dataset, validation) for dataset in datasets]
    data_name = data.joined_name(datasets)
    default = method_config(options.method, options.scenario, data_name, **overrides)
    check_build(options.method, default, options.hidden)
    scenario = scenarios.make_scenario(
        options.scenario, datasets, seed=seeds[0], encoded=not default.takes_features, **tasks
    )
    samples = scenarios.task_samples(options.scenario, datasets, tasks["classes_per_task"])
    config = method_config(options.method, options.scenario, data_name, task_samples=samples, **overrides)
    several = "s" if len(seeds) > 1 else ""
    name = f"{data_name}-{options.scenario}-{options.method}-seed{several}{'-'.join(map(str, seeds))}"
    return Plan(
        datasets=datasets,
        data_name=data_name,
        scenario=scenario,
        arguments={
            "scenario": options.scenario,
            "method": options.method,
            "hidden": options.hidden,
            "evaluation": options.evaluation,
            **tasks,
            **overrides,
        },
        seeds=seeds,
        config={
            "dataset": options.dataset if len(datasets) > 1 else options.dataset[0],
            "data_dir": chosen.get("data_dir"),
            "scenario": options.scenario,
            "tasks": len(scenario),
            "classes_per_task": len(scenario.test_stream[0].classes),
            "shuffle_classes": options.shuffle_classes,
            "max_degrees": chosen.get("max_degrees", SCENARIOS[options.scenario].defaults.get("max_degrees")),
            "samples_per_task": chosen.get("samples_per_task"),
            "validation": validation,
            "evaluation": options.evaluation,
            "method": options.method,
            "hidden": options.hidden,
            **dataclasses.asdict(config),
        },
        output=Path(chosen.get("output", Path("runs") / name)),
        method_config=config,
        epochs_chosen=config.epochs != default.epochs,
    )

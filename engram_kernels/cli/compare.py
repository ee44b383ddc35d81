"""`engram-kernels compare`: several methods side by side, on one page."""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ..continual import compare, folders, processes
from ..continual.methods import METHODS
from ..continual.streams import readable, terminal_width
from .console import EXIT_FAILURES, EXIT_INTERRUPTED, PROGRAM, Parser, one_line, warn
from .info import processor
from .options import add_training_options, as_arguments, plan_of


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        "compare",
        help="train several methods side by side and show them on one page",
        description="Train several methods, each run in a process of its own, and write report.html and compare.json. "
        "The same command again goes on with what is not complete.",
        epilog="A method may have options of its own and a label: "
        "--methods mbnn 'dendrites=engram --readout dendritic --segments 50'. All other options are those of train and "
        "hold for every method that has none of its own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = parser.add_argument_group("runs")
    group.add_argument(
        "--methods", nargs="+", default=list(METHODS), metavar="METHOD",
        help="METHOD, 'METHOD --OPTION VALUE...' or 'LABEL=METHOD --OPTION VALUE...'",
    )  # fmt: skip
    group.add_argument("--seeds", type=int, nargs="+", metavar="S", default=[0], help="every method runs with each")
    add_training_options(parser)
    group = parser.add_argument_group("processes and results")
    group.add_argument(
        "--output", metavar="DIR", default=argparse.SUPPRESS,
        help="where the results go (default: runs/compare-DATASET-SCENARIO)",
    )  # fmt: skip
    group.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once; with more than one, each has --threads 1"
    )
    group.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compares; returns the exit code."""
    if options.jobs < 1:
        raise ValueError(f"jobs: expected an integer >= 1, got {options.jobs}")
    if (started := processes.launched()) > 1:
        raise ValueError(
            f"compare: expected one process, got {started} of torchrun; its runs are independent of each other, and "
            f"--jobs {started} makes {started} of them at a time"
        )
    plans = plans_of(options)
    first = next(iter(plans.values()))
    planned = Path(vars(options).get("output", Path("runs") / f"compare-{first.dataset}-{options.scenario}"))
    output, claim = folders.claim(planned, own="output" in options, of=lambda output: {output: None})
    with claim:
        if output != planned:
            print(f"{planned} is in use by another comparison: this one goes to {output}")
        return _compare(output, plans, options)


def _compare(output: Path, plans: dict[str, _MethodPlan], options: argparse.Namespace) -> int:
    first = next(iter(plans.values()))
    configs = {label: {seed: {**plan.config, "seed": seed} for seed in options.seeds} for label, plan in plans.items()}
    runs = [
        compare.Run(
            label=label,
            seed=seed,
            folder=folder / f"seed{seed}",
            arguments=plan.arguments,
            config=configs[label][seed],
            threads=plan.threads,
        )
        for (label, plan), folder in zip(plans.items(), compare.folders(output, configs), strict=True)
        for seed in options.seeds
    ]
    sizes = " or ".join(dict.fromkeys("-".join(map(str, plan.config["hidden"])) for plan in plans.values()))
    about = {
        "dataset": readable(first.dataset),
        "chance": first.chance,
        "seeds": options.seeds,
        "jobs": options.jobs,
        "facts": [
            f"{options.scenario} scenario",
            f"{first.config['tasks']} tasks",
            f"hidden layers {sizes}",
            f"{len(options.seeds)} seed{'s' if len(options.seeds) > 1 else ''}",
        ],
        "command": options.command_line,
        "processor": processor(),
    }

    def write() -> list[Path]:
        now = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
        return compare.write(output, compare.content_of(runs, {**about, "created": now}))

    def rewrite() -> None:
        try:
            write()
        except OSError as error:  # a page that can't be written stops no run
            warn(one_line(error))

    write()  # early: a page that can't be written is an error now, and one that can is there to look at
    done = compare.run_all(runs, options.jobs, compare.default_display(options.quiet), rewrite)
    print(compare.table(compare.content_of(runs, about), terminal_width(sys.stdout)), flush=True)
    written = write()
    print("\n" + "\n".join(f"wrote {path}" for path in written))
    if not done:
        print(f"{PROGRAM}: interrupted; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_FAILURES if any(run.status != "complete" for run in runs) else 0


class _MethodPlan(NamedTuple):
    """A method of `compare`, all of it checked."""

    dataset: str
    chance: float  # of guessing right
    config: dict[str, Any]
    arguments: list[str]  # of train, but for seed, output and threads
    threads: int | None


def plans_of(options: argparse.Namespace) -> dict[str, _MethodPlan]:
    """Every method by its label, checked before the first of them runs.

    Raises:
        ValueError: names the method, the option, what was expected and what was got.
    """
    parser = Parser(prog=f"{PROGRAM} compare", add_help=False, allow_abbrev=False)
    parser.add_argument("method", choices=tuple(METHODS))
    actions = add_training_options(parser)
    shared = {action.dest for action in actions} & vars(options).keys()
    plans: dict[str, _MethodPlan] = {}
    for text in options.methods:
        named = re.fullmatch(r"\s*((?:(?!--)[^=])+?)\s*=(.*)", text, re.DOTALL)
        label, method = (named[1], named[2]) if named else (text.strip(), text)
        if label in plans:
            raise ValueError(f"methods: expected a label for each, got {label!r} twice")
        try:
            words = shlex.split(method)
        except ValueError as error:
            raise ValueError(f"methods: expected words as in a shell, got {method!r} ({error})") from None
        own = parser.parse_args(words, argparse.Namespace(**{name: getattr(options, name) for name in shared}))
        threads = getattr(own, "threads", 1 if options.jobs > 1 else None)
        arguments = ["--method", own.method]
        for action in actions:
            if action.dest != "threads" and hasattr(own, action.dest):
                arguments += as_arguments(action, getattr(own, action.dest))
        own.seeds = options.seeds
        try:
            plan = plan_of(own)
        except ValueError as error:
            raise ValueError(f"{error} (method {label!r})") from None
        # the data stay behind: a process that only waits for others needs none
        plans[label] = _MethodPlan(plan.data_name, 1 / plan.scenario.num_classes, plan.config, arguments, threads)
    return plans

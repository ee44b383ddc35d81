"""The evaluation, on test sets: one command for each experiment.

    python benchmarks/continual/experiments.py EXPERIMENT [...] --data-dir DIR

Results go to results/EXPERIMENT.json, each with the command that repeats it; ``report.py`` makes RESULTS.md and the
pictures of them. Hyper-parameters stand in `engram_kernels.continual.methods` or here, and come from ``search.py``.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from jobs import RESULTS, Job, run_jobs

FIVE, THREE = (0, 1, 2, 3, 4), (0, 1, 2)


class Experiment(NamedTuple):
    """Jobs and the seeds that each is run with."""

    jobs: list[Job]
    seeds: tuple[int, ...]


def engram(readout: str, hidden: str = "2048") -> str:
    """Options of a network with fixed hidden layers."""
    return f"--method engram --hidden {hidden} --readout {readout}"


def split(dataset: str) -> dict[str, Experiment]:
    """Class-incremental: ours and what else is binary, with five seeds; full precision below."""
    common = f"--dataset {dataset} --evaluation seen"
    binary = {
        "engram, 10-way output": engram("dendritic --segments 1 --rate 0.05"),
        "engram, 100 segments": engram("dendritic --segments 100"),
        "engram, 100 segments, two speak": engram("dendritic --segments 100 --top-segments 2"),
        "engram, 400 segments, two speak, 4096 units, two passes": engram(
            "dendritic --segments 400 --top-segments 2 --epochs 2", "4096"
        ),
        "engram, prototypes": engram("prototype"),
        "engram, ridge": engram("ridge --penalty 0.01", "4096"),
        "classifier": "--method classifier --hidden 2048",
        "classifier, 8192 units": "--method classifier --hidden 8192",
        "engram, two trained hidden layers": "--method engram --hidden 2048 2048 --readout linear",
        "engram, two trained hidden layers, 100 segments": (
            "--method engram --hidden 2048 2048 --readout dendritic --train-hidden --cross-entropy-weight 1 "
            "--lr 1e-6 3e-6 5e-3 --ste-window inf --logit-scale 0.3"
        ),
        "mbnn": "--method mbnn --hidden 2048 2048",
        "mbnn, loss over the batch's classes": "--method mbnn --hidden 2048 2048 --loss batch",
        "bnn": "--method bnn --hidden 2048 2048",
    }
    twin = {
        "engram-fp, 10-way output": "--method engram-fp --hidden 2048 --segments 1 --rate 0.05",
        "engram-fp, 100 segments": "--method engram-fp --hidden 2048 --segments 100",
        "engram-fp, 100 segments, two speak": "--method engram-fp --hidden 2048 --segments 100 --top-segments 2",
    }
    full = {
        "finetune": "--method finetune --hidden 2048 2048",
        "finetune, loss over the batch's classes": "--method finetune --hidden 2048 2048 --loss batch",
        "ewc": "--method ewc --hidden 2048 2048",
        "si": "--method si --hidden 2048 2048",
        "lwf": "--method lwf --hidden 2048 2048 --strength 3",
        "replay, 200 samples": "--method replay --hidden 2048 2048 --buffer-size 200",
        "joint": "--method joint --hidden 2048 2048",
    }
    jobs = [Job(label, f"{common} {options}") for label, options in (binary | twin | full).items()]
    return {f"split-{dataset}": Experiment(jobs, FIVE)}


def permuted() -> dict[str, Experiment]:
    """Domain-incremental: ten orders of the pixels, 20000 images each, one pass."""
    common = "--dataset mnist --scenario permuted --tasks 10 --samples-per-task 20000 --evaluation new"
    rows = {
        "engram, 100 segments": engram("dendritic"),
        "engram, 100 segments, no metaplasticity": f"{engram('dendritic')} --metaplasticity 0",
        "engram, 100 segments, fixed hidden layer": (
            f"{engram('dendritic')} --no-train-hidden --lr 2e-3 --metaplasticity 0"
        ),
        "engram, two trained hidden layers": "--method engram --hidden 2048 2048 --readout linear",
        "classifier": "--method classifier --hidden 2048",
        "finetune": "--method finetune --hidden 2048 2048",
        "ewc": "--method ewc --hidden 2048 2048 --strength 300",
        "si": "--method si --hidden 2048 2048 --strength 100",
        "bnn": "--method bnn --hidden 2048 2048",
        "mbnn": "--method mbnn --hidden 2048 2048 --metaplasticity 20",
        "joint": "--method joint --hidden 2048 2048",
    }
    return {"permuted": Experiment([Job(label, f"{common} {options}") for label, options in rows.items()], THREE)}


def domain() -> dict[str, Experiment]:
    """MNIST and Fashion-MNIST one after the other, same ten outputs."""
    rows = {
        "engram, segments": engram("dendritic --segments 100"),
        "classifier": "--method classifier --hidden 2048",
        "mbnn": "--method mbnn --hidden 2048 2048 --metaplasticity 100",
        "finetune": "--method finetune --hidden 2048 2048",
        "ewc": "--method ewc --hidden 2048 2048 --strength 100000",
        "si": "--method si --hidden 2048 2048 --strength 100",
    }
    return {
        f"domain-{first}-first": Experiment(
            [
                Job(label, f"--dataset {first} {second} --scenario domain --samples-per-task 20000 {options}")
                for label, options in rows.items()
            ],
            THREE,
        )
        for first, second in (("mnist", "fashion-mnist"), ("fashion-mnist", "mnist"))
    }


def published_baselines() -> dict[str, Experiment]:
    """The baselines on settings close to those they were published with, smaller networks than ours."""
    split = "--dataset mnist --hidden 400 400 --epochs 2 --evaluation seen"
    permuted = (
        "--dataset mnist --scenario permuted --tasks 10 --samples-per-task 20000 --hidden 1000 1000 --evaluation new"
    )
    rows = {
        f"{split} --method finetune": "split, finetune",
        f"{split} --method ewc": "split, ewc",
        f"{split} --method si": "split, si",
        f"{split} --method lwf": "split, lwf",
        f"{split} --method replay --buffer-size 1000": "split, replay, 1000 samples",
        f"{split} --method joint": "split, joint",
        f"{permuted} --method finetune": "permuted, finetune",
        f"{permuted} --method ewc --strength 300": "permuted, ewc",
        f"{permuted} --method si --strength 100": "permuted, si",
        f"{permuted} --method lwf": "permuted, lwf",
    }
    return {"published-baselines": Experiment([Job(label, options) for options, label in rows.items()], THREE)}


def long_streams() -> dict[str, Experiment]:
    """Many orders of the pixels, 10000 images each: does the network go on learning?"""
    fixed, trained = "--no-train-hidden --lr 2e-3 --metaplasticity", "--metaplasticity"
    rows = {
        "fixed hidden layer, m 0": f"{fixed} 0",
        "fixed hidden layer, m 5": f"{fixed} 5",
        "fixed hidden layer, m 5, |W| at most 0.3": f"{fixed} 5 --weight-bound 0.3",
        "trained hidden layer, m 0": f"{trained} 0",
        "trained hidden layer, m 30": f"{trained} 30 30 0",
        "trained hidden layer, m 30, |W| at most 0.05": f"{trained} 30 30 0 --weight-bound 0.05 0.05 inf",
        "trained more slowly, m 0": f"{trained} 0 --lr 1e-4 1e-4 2e-3",
    }
    return {
        f"long-{tasks}": Experiment(
            [
                Job(
                    label,
                    f"--dataset mnist --scenario permuted --tasks {tasks} --samples-per-task 10000 --evaluation new "
                    f"{engram('dendritic --segments 80')} {options}",
                )
                for label, options in rows.items()
            ],
            (0,),
        )
        for tasks in (50, 100)
    }


def ablation() -> dict[str, Experiment]:
    """Split-MNIST: one part of the recipe changed at a time; two trained hidden layers, and 100 segments."""
    common = "--dataset mnist --evaluation seen"
    trained = {
        "two trained hidden layers": "",
        "loss over all classes": "--loss all",
        "no metaplasticity": "--metaplasticity 0",
        "no gate": "--rate 1",
        "gate drawn without regard to the input": "--temperature inf",
        "gate without noise": "--temperature 0",
        "temperature 1": "--temperature 1",
        "rate 0.05": "--rate 0.05",
        "rate 0.3": "--rate 0.3",
        "no gate, no metaplasticity": "--rate 1 --metaplasticity 0",
    }
    segments = {
        "100 segments": "",
        "100 segments, no metaplasticity": "--metaplasticity 0",
        "100 segments, temperature 0.1": "--temperature 0.1",
        "100 segments, temperature 1": "--temperature 1",
        "100 segments, rate 0.02": "--rate 0.02",
        "100 segments, rate 0.5": "--rate 0.5",
        "100 segments, no conscience": "--conscience 0",
        "100 segments, cross-entropy beside": "--cross-entropy-weight 1",
        "100 segments, two fixed hidden layers": "--hidden 2048 2048",
    }
    jobs = [
        Job(label, f"{common} --method engram --hidden 2048 2048 --readout linear {options}")
        for label, options in trained.items()
    ]
    jobs += [
        # what is said again later on a command line counts
        Job(label, f"{common} {engram('dendritic --segments 100')} {options}")
        for label, options in segments.items()
    ]
    return {"ablation": Experiment(jobs, THREE)}


def compact() -> dict[str, Experiment]:
    """Accuracy with moments in 16 and 8 bits and hidden weights in 16: two trained hidden layers."""
    kinds = (
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("int8", "float32"),
        ("float32", "bfloat16"),
        ("int8", "bfloat16"),
    )
    jobs = [
        Job(
            f"moments {state}, hidden weights {weight}",
            "--dataset mnist --evaluation seen --method engram --hidden 2048 2048 --readout linear "
            f"--state-dtype {state} --weight-dtype {weight}",
        )
        for state, weight in kinds
    ]
    return {"compact": Experiment(jobs, THREE)}


def memory() -> dict[str, Experiment]:
    """Peak memory and time of a step: two tasks of 5000 images. To be run with one process on an idle machine."""
    common = "--dataset mnist --scenario permuted --tasks 2 --samples-per-task 5000 --evaluation new"
    compact = "--state-dtype int8 --weight-dtype bfloat16 --fuse-backward"
    rows = {
        "engram, 10-way output": engram("dendritic --segments 1"),
        "engram, 100 segments": engram("dendritic --segments 100"),
        "engram, 100 segments, compact": f"{engram('dendritic --segments 100')} {compact}",
        "engram, prototypes": engram("prototype"),
        "engram, ridge": engram("ridge --penalty 0.01", "4096"),
        "classifier": "--method classifier --hidden 2048",
        "engram, two trained hidden layers": "--method engram --hidden 2048 2048 --readout linear",
        "engram, two trained hidden layers, compact": f"--method engram --hidden 2048 2048 --readout linear {compact}",
        "bnn": "--method bnn --hidden 2048 2048",
        "mbnn": "--method mbnn --hidden 2048 2048",
        "engram-fp, 100 segments": "--method engram-fp --hidden 2048 --segments 100",
        "finetune": "--method finetune --hidden 2048 2048",
        "ewc": "--method ewc --hidden 2048 2048",
        "si": "--method si --hidden 2048 2048",
        "lwf": "--method lwf --hidden 2048 2048",
        "replay, 200 samples": "--method replay --hidden 2048 2048 --buffer-size 200",
    }
    return {"memory": Experiment([Job(label, f"{common} {options}") for label, options in rows.items()], THREE)}


EXPERIMENTS: dict[str, Experiment] = (
    split("mnist")
    | split("fashion-mnist")
    | permuted()
    | domain()
    | published_baselines()
    | long_streams()
    | ablation()
    | compact()
    | memory()
)


def main() -> None:
    """Runs what the results do not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiments", nargs="+", choices=EXPERIMENTS, metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}"
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for name in options.experiments:
        experiment = EXPERIMENTS[name]
        run_jobs(
            experiment.jobs, experiment.seeds, RESULTS / f"{name}.json",
            data_dir=options.data_dir, processes=options.processes, threads=options.threads,
        )  # fmt: skip


if __name__ == "__main__":
    main()

"""How the hyper-parameters were chosen: on the last 5000 training images and on seeds that no result uses.

    python benchmarks/continual/search.py [GRID ...] --data-dir DIR

A grid goes on until its best value is not at an edge, or the edge changes nothing. What was measured is in
results/search/GRID.json, and as a table in SEARCH.md.
"""

from __future__ import annotations

import argparse
import statistics

from jobs import RESULTS, Job, run_jobs

SEEDS = (100,)
SPLIT = "--dataset mnist --scenario class --validation 5000"
PERMUTED = "--dataset mnist --scenario permuted --tasks 10 --samples-per-task 20000 --evaluation new --validation 5000"
DOMAIN = "--dataset mnist fashion-mnist --scenario domain --samples-per-task 20000 --validation 5000"
LONG = (
    "--dataset mnist --scenario permuted --tasks 50 --samples-per-task 10000 --evaluation new --validation 5000 "
    "--method engram --hidden 2048 --readout dendritic --segments 80"
)


def grid(common: str, option: str, values: list[float]) -> list[Job]:
    """One job for each value of an option."""
    return [Job(f"{option} {value:g}", f"{common} --{option} {value:g}") for value in values]


ENGRAM = f"{SPLIT} --method engram --hidden 2048 --readout"
GRIDS: dict[str, list[Job]] = {
    "permuted-ewc": grid(f"{PERMUTED} --method ewc --hidden 2048 2048", "strength", [10, 100, 300, 1000, 10000]),
    "permuted-si": grid(f"{PERMUTED} --method si --hidden 2048 2048", "strength", [1, 10, 100, 1000]),
    "domain-ewc": grid(f"{DOMAIN} --method ewc --hidden 2048 2048", "strength", [100, 1000, 10000, 100000, 1000000]),
    "domain-si": grid(f"{DOMAIN} --method si --hidden 2048 2048", "strength", [10, 100, 1000, 10000]),
    "permuted-mbnn": grid(f"{PERMUTED} --method mbnn --hidden 2048 2048", "metaplasticity", [5, 20, 50, 100, 500]),
    "domain-mbnn": grid(f"{DOMAIN} --method mbnn --hidden 2048 2048", "metaplasticity", [1.35, 5, 20, 100, 500]),
    "long-hidden": [
        Job(label, f"{LONG} {options}")
        for label, options in (
            ("m 30, hidden lr 0.0003, at most 0.05", "--metaplasticity 30 30 0 --weight-bound 0.05 0.05 inf"),
            ("m 0, hidden lr 0.0001", "--metaplasticity 0 --lr 1e-4 1e-4 2e-3"),
            ("m 0, hidden lr 0.00003", "--metaplasticity 0 --lr 3e-5 3e-5 2e-3"),
            (
                "m 30, hidden lr 0.0001, at most 0.05",
                "--metaplasticity 30 30 0 --lr 1e-4 1e-4 2e-3 --weight-bound 0.05 0.05 inf",
            ),
        )
    ],
    "permuted-segments-hidden": [
        Job(label, f"{PERMUTED} --method engram --hidden {hidden} --readout dendritic {options}")
        for label, hidden, options in (
            ("fixed", "2048", "--no-train-hidden --lr 0.002 --metaplasticity 0"),
            ("lr 0.001, m 10", "2048", "--lr 1e-3 1e-3 2e-3 --metaplasticity 10 10 0"),
            ("lr 0.001, m 30", "2048", "--lr 1e-3 1e-3 2e-3 --metaplasticity 30 30 0"),
            ("lr 0.001, m 100", "2048", "--lr 1e-3 1e-3 2e-3 --metaplasticity 100 100 0"),
            ("lr 0.0003, m 30", "2048", "--lr 3e-4 3e-4 2e-3 --metaplasticity 30 30 0"),
            ("lr 0.0001, m 30", "2048", "--lr 1e-4 1e-4 2e-3 --metaplasticity 30 30 0"),
            ("lr 0.0003, m 0", "2048", "--lr 3e-4 3e-4 2e-3 --metaplasticity 0 0 0"),
            ("lr 0.001, m 30, rate 0.1", "2048", "--lr 1e-3 1e-3 2e-3 --metaplasticity 30 30 0 --rate 0.1"),
            ("two hidden layers, lr 0.0003, m 30", "2048 2048", "--lr 3e-4 3e-4 2e-3 --metaplasticity 30 30 0"),
        )
    ],
    "split-segments-rate": grid(f"{ENGRAM} dendritic --segments 100", "rate", [0.05, 0.1, 0.15, 0.2, 0.3]),
    "split-segments-lr": grid(f"{ENGRAM} dendritic --segments 100", "lr", [0.002, 0.01]),
    "split-segments-number": grid(f"{ENGRAM} dendritic", "segments", [50, 200]),
    "split-segments-metaplasticity": grid(f"{ENGRAM} dendritic --segments 100", "metaplasticity", [0, 20]),
    "split-output-rate": grid(f"{ENGRAM} dendritic --segments 1", "rate", [0.02, 0.05, 0.1, 0.2]),
    "split-segments-width": [
        Job(label, f"{SPLIT} --method engram --hidden {hidden} --readout dendritic {options}")
        for label, hidden, options in (
            ("2048, 100 segments", "2048", "--segments 100"),
            ("2048 2048, 100 segments", "2048 2048", "--segments 100"),
            ("4096, 100 segments", "4096", "--segments 100"),
            ("4096, 100 segments, rate 0.05", "4096", "--segments 100 --rate 0.05"),
            ("4096, 200 segments", "4096", "--segments 200"),
            ("4096, 200 segments, 2 epochs", "4096", "--segments 200 --epochs 2"),
            ("2048, 100 segments, 2 epochs", "2048", "--segments 100 --epochs 2"),
        )
    ],
    "split-segments-top": [
        Job(label, f"{SPLIT} --method engram --readout dendritic {options}")
        for label, options in (
            ("2048, 100 segments, 1 speaks", "--hidden 2048 --segments 100"),
            ("2048, 100 segments, 2 speak", "--hidden 2048 --segments 100 --top-segments 2"),
            ("2048, 100 segments, 3 speak", "--hidden 2048 --segments 100 --top-segments 3"),
            ("4096, 400 segments, 2 epochs, 1 speaks", "--hidden 4096 --segments 400 --epochs 2"),
            ("4096, 400 segments, 2 epochs, 2 speak", "--hidden 4096 --segments 400 --epochs 2 --top-segments 2"),
            ("4096, 400 segments, 2 epochs, 3 speak", "--hidden 4096 --segments 400 --epochs 2 --top-segments 3"),
        )
    ],
    "split-prototype-rate": grid(f"{ENGRAM} prototype", "rate", [0.02, 0.05, 0.1]),
    "split-ridge-rate": grid(f"{ENGRAM} ridge --penalty 0.01", "rate", [0.1, 0.2, 0.3, 0.4]),
    "split-ridge-width": [
        Job(f"{units} units", f"{SPLIT} --method engram --hidden {units} --readout ridge --penalty 0.01")
        for units in (1024, 2048, 4096)
    ],
    "split-ewc": grid(f"{SPLIT} --method ewc --hidden 2048 2048", "strength", [1, 100, 10000]),
    "split-si": grid(f"{SPLIT} --method si --hidden 2048 2048", "strength", [1, 10, 100]),
    "split-lwf": grid(f"{SPLIT} --method lwf --hidden 2048 2048", "strength", [0.3, 1, 3, 10, 30, 100]),
}


def main() -> None:
    """Runs the grids asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="*", metavar="GRID", help=f"of {', '.join(GRIDS)}; default: all")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    for name in options.grids or GRIDS:
        path = RESULTS / "search" / f"{name}.json"
        rows = run_jobs(GRIDS[name], SEEDS, path, data_dir=options.data_dir, processes=options.processes)
        for job in GRIDS[name]:
            found = [100 * row["average_accuracy"] for row in rows if row["label"] == job.label and "error" not in row]
            print(f"{name:<24}{job.label:<40}{statistics.fmean(found) if found else float('nan'):.2f} %")


if __name__ == "__main__":
    main()

"""Everything that the first hour on a GPU should tell, in one command of under ten minutes.

    python -m benchmarks.gpu_report --output DIR
    python -m benchmarks.gpu_report --output DIR --dry-run    # the same program on the CPU, few tests, to try it

Runs the tests and the benchmarks that are marked ``gpu``, times every kernel beside its prediction
(:mod:`benchmarks.gpu_prediction`, where nvcc is installed), profiles a training step, and writes ``report.md`` and the
log of each part to DIR. Each part has a limit of time; one that fails or meets its limit is told in the report, and the
others go on. Exits with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import engram_kernels as ek

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))
from measure import SAMPLE_SECONDS, environment, seconds_of  # noqa: E402
from steps import BATCH, COMPACT, EXACT, batch, initial_state, make_step, sizes_of  # noqa: E402

M, N, K = 100, 4096, 4096
ROUNDS = 7
LIMITS = {"tests": 240, "benchmarks": 240, "kernels": 60, "profile": 40}  # seconds; 580 together
DRY_TESTS = "tests/test_cuda.py"


@dataclass
class Part:
    """What a part of the report found: its lines, and whether it failed."""

    title: str
    lines: list[str]
    failed: bool = False


def refusal(dry_run: bool) -> str | None:
    """Why no report can be made here, or None."""
    if dry_run:
        return None
    if not torch.cuda.is_available():
        return (
            f"device: expected a CUDA device that torch {torch.__version__} can use, got none; "
            "--dry-run tries the program on the CPU"
        )
    if ek.ops.build_info()["cuda"] != "yes":
        return "engram_kernels: expected a build with CUDA kernels, got one without: ENGRAM_CUDA=1 pip install ."
    error = torch.ops.engram_kernels._cuda_error(torch.cuda.current_device())
    return f"device: expected one that the kernels run on, got: {error}" if error else None


def machine() -> Part:
    """What the figures depend on."""
    lines = [f"- {name}: {value}" for name, value in (environment() | ek.ops.build_info()).items()]
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True)
        lines += ["", "```", done.stdout.strip() or done.stderr.strip(), "```"]
    return Part("Machine", lines)


def command(title: str, arguments: list[str], limit: float, log: Path) -> Part:
    """A part that is a program: its last lines, the whole in ``log``."""
    environment_of_run = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment_of_run, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            status = f"exit status {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"stopped at its limit of {limit:.0f} s"
    lines = [
        f"`python {' '.join(arguments)}`: {status} after {time.perf_counter() - start:.0f} s; {log.name}",
        "",
        "```",
    ]
    lines += [*log.read_text(errors="replace").splitlines()[-40:], "```"]
    return Part(title, lines, failed=process.returncode != 0)


def tests(output: Path, dry_run: bool) -> Part:
    chosen = [DRY_TESTS] if dry_run else ["-m", "gpu", "tests"]
    arguments = ["-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *chosen]
    return command("Tests", arguments, LIMITS["tests"], output / "tests.log")


def benchmarks(output: Path, dry_run: bool) -> Part:
    chosen = ["benchmarks/test_kernels.py", "-k", "call_overhead"] if dry_run else ["benchmarks", "-m", "gpu"]
    arguments = ["-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *chosen, "--benchmark-only"]
    arguments += ["--report", str(output)]
    return command("Benchmarks", arguments, LIMITS["benchmarks"], output / "benchmarks.log")


def calls(device: str) -> dict[str, Callable[[], object]]:
    """A call for each row of the prediction that is an operator of its own, by the row's name."""
    ops = ek.ops
    w_bits = ops.pack_signs(torch.randn(N, K, device=device))
    first_bits = ops.pack_signs(torch.randn(N, 784, device=device))
    found: dict[str, Callable[[], object]] = {}

    def product(m: int, gated: bool) -> Callable[[], object]:
        x = torch.randn(m, K, device=device)
        x_bits = ops.pack_signs(x)
        gate = ops.sample_engram(x, ops.draw_seed(), 0.1) if gated else None
        return lambda: ops.binary_matmul(x_bits, w_bits, K, gate)

    for m in (1, 8, M, 1024):
        found[f"binary_matmul {m}x{N}x{K}"] = product(m, False)
        found[f"binary_matmul {m}x{N}x{K}, gate per sample"] = product(m, True)
    images = torch.randint(256, (M, 784), dtype=torch.uint8, device=device)
    pixels, x, d = images.float(), torch.randn(M, K, device=device), torch.randn(M, N, device=device)
    x_bits, seed = ops.pack_signs(x), ops.draw_seed()
    mask = ops.pack_window(x)
    found |= {
        f"sign_matmul_t {M}x{N}x784, float32": lambda: ops.sign_matmul_t(pixels, first_bits, 784),
        f"sign_matmul_t {M}x{N}x784, uint8": lambda: ops.sign_matmul_t(images, first_bits, 784),
        f"masked_input_grad {M}x{N}x{K}": lambda: ops.masked_input_grad(d, w_bits, K, mask),
        f"gated_weight_grad {M}x{N}x{K}": lambda: ops.gated_weight_grad(d, x_bits, K),
        f"pack_signs {M}x{K}, float32": lambda: ops.pack_signs(x),
        f"pack_window {M}x{K}": lambda: ops.pack_window(x, 1.0, mask),
        f"unpack_signs {N}x{K}, float32": lambda: ops.unpack_signs(w_bits, K),
        f"sample_engram {M}x{K}, bernoulli": lambda: ops.sample_engram(x, seed, 0.1, "bernoulli"),
        f"sample_engram {M}x{K}, gumbel_top_k": lambda: ops.sample_engram(x, seed, 0.1, temperature=0.1),
    }
    for what, weight_dtype, state, second in (
        ("update of 16 M weights, float32", torch.float32, torch.float32, torch.float32),
        ("the same, bfloat16 moments", torch.float32, torch.bfloat16, torch.bfloat16),
        ("the same, int8 moments", torch.float32, torch.int8, torch.uint8),
        ("the same, int8 moments, bfloat16 weights", torch.bfloat16, torch.int8, torch.uint8),
    ):
        found[what] = update(device, weight_dtype, state, second)
    return found


def update(device: str, weight_dtype: torch.dtype, state: torch.dtype, second: torch.dtype) -> Callable[[], object]:
    """An update of N x K weights, whose tensors its first call makes."""
    settings: dict[str, Any] = dict(
        lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, metaplasticity=1.35, step=3
    )
    seed = ek.ops.draw_seed()

    @functools.cache
    def tensors() -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        weight = torch.empty(N, K, device=device, dtype=weight_dtype).uniform_(-0.05, 0.05)
        moments = (torch.zeros(N, K, device=device, dtype=dtype) for dtype in (state, second))
        names = ("exp_avg_scale", "exp_avg_sq_scale") if state == torch.int8 else ()
        scales = {name: torch.zeros(N, -(-K // 64), device=device) for name in names}
        return (weight, torch.randn(N, K, device=device), *moments, ek.ops.pack_signs(weight)), scales

    def call() -> None:
        own, scales = tensors()
        ek.ops.metaplastic_adam_(*own, **settings, **scales, seed=seed)

    return call


def kernels(output: Path, dry_run: bool) -> Part:
    """Each kernel's median time, launch included, beside its predictions."""
    device = "cpu" if dry_run else "cuda"
    predicted, note = predictions()
    lines = [note, "", "| operator | us | " + " | ".join(f"predicted {name}" for name in predicted) + " |"]
    lines.append("| --- |" + " --- |" * (1 + len(predicted)))
    torch.manual_seed(0)
    deadline = time.perf_counter() + LIMITS["kernels"]
    for what, call in calls(device).items():
        if time.perf_counter() > deadline:
            return Part("Kernels", [*lines, "", f"stopped at its limit of {LIMITS['kernels']} s"], failed=True)
        seconds_of(call, device)
        repeat = max(1, min(1000, round(SAMPLE_SECONDS / seconds_of(call, device))))
        times = sorted(seconds_of(call, device, repeat) for _ in range(1 if dry_run else ROUNDS))
        cells = [f"{1e6 * by_name[what]:.1f}" if what in by_name else "-" for by_name in predicted.values()]
        lines.append(f"| {what} | " + " | ".join([f"{1e6 * times[len(times) // 2]:.1f}", *cells]) + " |")
    return Part("Kernels", lines)


def predictions() -> tuple[dict[str, dict[str, float]], str]:
    """Seconds by operator and device, and a sentence on them; none without the compilers."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import gpu_prediction as prediction

    reason = prediction.mc.missing("nvcc", "ptxas", "nvdisasm")
    if reason:
        return {}, f"Without predictions: {reason}."
    found = {}
    for device in prediction.DEVICES:
        rows = [*prediction.kernel_predictions(device), *prediction.update_predictions(device)]
        found[device.name] = {row.what: row.seconds for row in rows}
    return found, "Measured times include the launch; predictions are lower bounds without it."


def profile(output: Path, dry_run: bool) -> Part:
    """Where a training step spends its time, exact and compact, by torch's profiler."""
    device, hidden = ("cpu", 512) if dry_run else ("cuda", 4096)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    lines = []
    for name in (next(iter(EXACT)), next(iter(COMPACT))):
        step = make_step(name, sizes_of(hidden), initial_state(sizes_of(hidden), device), device)
        x, y = batch(device)
        for _ in range(3):
            step(x, y)
        seconds = seconds_of(lambda step=step, x=x, y=y: step(x, y), device, 5)
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(5):
                step(x, y)
        order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
        text = profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60)
        log = output / f"profile-{name.replace(', ', '-').replace(' ', '-')}.txt"
        log.write_text(text)
        profiler.export_chrome_trace(str(log.with_suffix(".json")))
        lines += [f"`{name}`, 784-{hidden}-{hidden}-10, batch {BATCH}: {1e3 * seconds:.2f} ms a step; {log.name}", ""]
    return Part("Profile of a training step", lines)


def guarded(part: Callable[[Path, bool], Part], output: Path, dry_run: bool) -> Part:
    """The part; an error becomes a failed one, since the others are worth having."""
    try:
        return part(output, dry_run)
    except Exception as error:
        return Part(part.__name__.capitalize(), [f"{type(error).__name__}: {error}"], failed=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, few tests, to try the program")
    options = parser.parse_args(arguments)
    reason = refusal(options.dry_run)
    if reason is not None:
        print(f"gpu_report: {reason}", file=sys.stderr)
        return 2
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    parts = [machine()]
    for part in (tests, kernels, profile, benchmarks):
        print(f"{part.__name__} ...", flush=True)
        parts.append(guarded(part, output, options.dry_run))
    title = "# GPU report" + (", dry run on the CPU: times mean nothing" if options.dry_run else "")
    text = [title, ""]
    for each in parts:
        text += [f"## {each.title}" + (": FAILED" if each.failed else ""), "", *each.lines, ""]
    (output / "report.md").write_text("\n".join(text))
    print(f"wrote {output / 'report.md'}")
    return int(any(each.failed for each in parts))


if __name__ == "__main__":
    sys.exit(main())

"""Whole training steps by name: ours in every configuration, *published*, and *compiled* as it is fastest here.

The network is K-H-H-10 with batch normalisation after every layer, a real-valued first input and signs elsewhere.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from baselines import SETTINGS, CompiledStep, PublishedStep, SimulatedMLP, batch_norm
from measure import Contender, alternate
from torch import Tensor, nn

import engram_kernels as ek

Step = Callable[[Tensor, Tensor], Tensor]

INPUTS, CLASSES, BATCH = 784, 10, 100
RATE = 0.1

# Same mathematics as published: no gate, window 1, float32 throughout.
EXACT = {
    "exact": dict(),
    "exact, fused": dict(fuse_backward=True),
}
# The units that an engram recruits by excitability lie outside |x| <= 1: window infinity, as the README says.
COMPACT = {
    "compact bfloat16": dict(rate=RATE, fuse_backward=True, state_dtype=torch.bfloat16),
    "compact int8": dict(rate=RATE, fuse_backward=True, state_dtype=torch.int8),
    "compact int8, bfloat16 weights": dict(
        rate=RATE, fuse_backward=True, state_dtype=torch.int8, weight_dtype=torch.bfloat16
    ),
}
CONFIGURATIONS = EXACT | COMPACT
WAYS = {
    "compiled fp32": dict(),
    "compiled fp32, network too": dict(compile_network=True),
    "compiled bf16": dict(bfloat16=True),
    "compiled bf16, network too": dict(bfloat16=True, compile_network=True),
}
NAMES = ["published", *WAYS, *CONFIGURATIONS]


class EngramStep:
    """One training step of ours."""

    def __init__(
        self,
        sizes: Sequence[int],
        state_dict: dict[str, Tensor] | None = None,
        device: str = "cpu",
        *,
        rate: float | None = None,
        weight_dtype: torch.dtype = torch.float32,
        **options,
    ) -> None:
        engram = None if rate is None else ek.StochasticEngram(rate=rate, temperature=0.1)
        window = 1.0 if rate is None else float("inf")
        self.model = nn.ModuleDict({"layers": nn.ModuleList(), "norms": nn.ModuleList()})
        for i, (k, n) in enumerate(pairwise(sizes)):
            gate = dict(engram=engram, ste_window=window) if i > 0 else dict(binary_input=False)
            self.model["layers"].append(
                ek.BinaryEngramLinear(k, n, bias=False, scaled=False, device=device, dtype=weight_dtype, **gate)
            )
            self.model["norms"].append(batch_norm(n).to(device))
        if state_dict is not None:
            self.model.load_state_dict(state_dict)
        self.optimizer = ek.MetaplasticAdam(self.model.parameters(), **SETTINGS, **options)

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        for layer, norm in zip(self.model["layers"], self.model["norms"], strict=True):
            x = norm(layer(x))
        loss = F.cross_entropy(x, target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def sizes_of(hidden: int) -> tuple[int, ...]:
    return INPUTS, hidden, hidden, CLASSES


def initial_state(sizes: Sequence[int], device: str = "cpu", bias_range: float = 0.0) -> dict[str, Tensor]:
    """Hidden weights as published, uniform in [-0.05, 0.05]; biases of the normalisation as asked for."""
    state = SimulatedMLP(sizes, device).state_dict()
    for name, value in state.items():
        if name.startswith("layers"):
            value.uniform_(-0.05, 0.05)
        elif name.endswith("bias"):
            value.uniform_(-bias_range, bias_range)
    return state


def make_step(
    name: str, sizes: Sequence[int], state: dict[str, Tensor] | None = None, device: str = "cpu", **options
) -> Step:
    """A step by its name in :data:`NAMES`, from ``state`` or each layer's own initialisation.

    ``options`` override those of a configuration of ours.
    """
    if name == "published":
        return PublishedStep(sizes, state, device)
    if name in WAYS:
        return CompiledStep(sizes, state, device, **WAYS[name])
    return EngramStep(sizes, state, device, **(CONFIGURATIONS[name] | options))


def batch(device: str = "cpu", samples: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, INPUTS, device=device), torch.randint(CLASSES, (samples,), device=device)


def seconds_of_ways(names: Iterable[str], hidden: int, device: str) -> dict[str, float]:
    """Median seconds of the float simulation in each of these ways. Raises: RuntimeError if one does not run."""
    state = initial_state(sizes_of(hidden), device)
    contenders = {}
    for name in names:
        step = make_step(name, sizes_of(hidden), state, device)
        contenders[name] = Contender(functools.partial(step, *batch(device)), device=device)
        step(*batch(device))  # compiles
    alternate(contenders.values(), 3)
    for name, contender in contenders.items():
        if contender.error:
            raise RuntimeError(f"{name}: {contender.error}")
    return {name: statistics.median(contender.samples) for name, contender in contenders.items()}


@functools.cache
def promising_ways(device: str) -> tuple[str, ...]:
    """Those of :data:`WAYS` less than three times slower than the fastest in a small network.

    Without units for bfloat16 a processor takes seconds for a step of a large network.
    """
    seconds = seconds_of_ways(WAYS, 512, device)
    return tuple(name for name in WAYS if seconds[name] < 3 * min(seconds.values()))


@functools.cache
def fastest_way(hidden: int, device: str = "cpu") -> str:
    """The fastest of :data:`WAYS` for a network of this size."""
    seconds = seconds_of_ways(promising_ways(device), hidden, device)
    return min(seconds, key=seconds.__getitem__)

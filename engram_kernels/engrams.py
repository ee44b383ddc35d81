"""Stochastic engrams: rules that recruit a sparse set of a layer's input units for each sample.

An engram is called with the layer's input (M, K), the units' excitabilities, and answers with a :class:`Recruitment`.
The paper's own rule is public only as an abstract (arXiv 2503.21436); these are ours, named by what they do.
Draws come from torch's CPU generator, so ``torch.manual_seed`` governs them on every device; they do not depend on the
number of threads, nor, with the same generator in all processes, on how a batch is shared out among processes.

The draws of a sample go by its number in the whole batch. Within torch.distributed's default group, sample i of rank r
of W processes is number ``r + W i``, the order of torch's DistributedSampler, so that a rank draws what a single
process would have drawn for the same samples. Where processes share a batch otherwise, or do not share it at all, an
engram's ``first_row`` says the number of this process's first sample: number ``first_row + i`` for sample i.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .checks import check_flag, check_number, check_size
from .reference import recruited_units


class Recruitment(NamedTuple):
    """Who takes part: ``gate_bits`` (M, words) or (words,), None for every unit; ``scale`` multiplies the output.

    >>> gate_bits, scale = ek.BernoulliEngram(0.5).eval()(torch.zeros(2, 6))
    >>> gate_bits is None, scale  # every unit takes part
    (True, 0.5)
    """

    gate_bits: Tensor | None
    scale: float = 1.0


def check_rate(rate: float) -> float:
    """The rate itself. Raises ValueError if it is outside (0, 1]."""
    if isinstance(rate, bool) or not (isinstance(rate, (int, float)) and 0.0 < rate <= 1.0):
        raise ValueError(f"rate: expected a number in (0, 1], got {rate!r}")
    return float(rate)


class Engram(nn.Module):
    """Base of the gate rules. ``rate`` is the fraction of units recruited.

    ``first_row``: the number of this process's first sample in the whole batch, if its samples are contiguous there;
    None, as it is at first: every W-th sample of the batch, as DistributedSampler shares it out among the W processes
    of torch.distributed's default group.

    >>> class EveryUnit(ek.Engram):
    ...     def forward(self, x):
    ...         return ek.Recruitment(None)
    >>> ek.BinaryEngramLinear(4, 2, engram=EveryUnit(1.0))(torch.zeros(1, 4)).shape
    torch.Size([1, 2])
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = check_rate(rate)
        self.first_row: int | None = None

    def recruited(self, k: int) -> int:
        """Units recruited per sample out of ``k``: ``max(1, round(rate * k))`` (the mean, for Bernoulli gates)."""
        return recruited_units(self.rate, k)

    def numbering(self) -> dict[str, Any]:
        """``first_row`` and ``row_step`` of this process's samples, for :func:`engram_kernels.ops.sample_engram`.

        >>> ek.BernoulliEngram(0.5).numbering()  # a single process
        {'first_row': 0, 'row_step': 1}
        """
        if self.first_row is not None:
            return {"first_row": self.first_row, "row_step": 1}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return {"first_row": torch.distributed.get_rank(), "row_step": torch.distributed.get_world_size()}
        return {"first_row": 0, "row_step": 1}

    def forward(self, x: Tensor) -> Recruitment:
        """Recruits units for the samples ``x``, floats (M, K)."""
        raise TypeError(f"{type(self).__name__}: an engram defines forward(x) -> Recruitment")


class BernoulliEngram(Engram):
    """Every unit of every sample is recruited independently with probability ``rate``.

    At evaluation all units take part and the output is scaled by ``rate``, which preserves its expectation (Srivastava
    et al. 2014); with ``sample_at_eval=True`` gates are drawn there too.
    Raises: ValueError if ``rate`` is outside (0, 1].

    >>> gate_bits = ek.BernoulliEngram(0.3)(torch.zeros(1000, 100)).gate_bits
    >>> round((ek.ops.unpack_signs(gate_bits, 100) > 0).float().mean().item(), 1)
    0.3
    """

    def __init__(self, rate: float, *, sample_at_eval: bool = False) -> None:
        super().__init__(rate)
        self.sample_at_eval = check_flag("sample_at_eval", sample_at_eval)

    def forward(self, x: Tensor) -> Recruitment:
        """Floats (M, K), of which only the shape counts."""
        if not self.training and not self.sample_at_eval:
            return Recruitment(None, self.rate)
        gate = ops.sample_engram(x.detach(), ops.draw_seed(), self.rate, "bernoulli", **self.numbering())
        return Recruitment(gate)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"rate={self.rate}, sample_at_eval={self.sample_at_eval}"


class StochasticEngram(Engram):
    """Exactly ``max(1, round(rate * K))`` units per sample, drawn by excitability: Gumbel-top-k.

    Units are drawn without replacement with probabilities softmax(score / temperature) (Kool et al. 2019). The score is
    the unit's pre-activation, or its magnitude with ``score="magnitude"``. ``temperature=inf`` is a uniformly random
    engram, 0 is k-winners-take-all. At evaluation the most excitable units are taken, without noise.
    Raises: ValueError if ``rate`` is outside (0, 1], ``temperature`` is negative or in (0, 1e-6), or ``score`` unknown.

    >>> engram = ek.StochasticEngram(rate=0.5, temperature=0)
    >>> ek.ops.unpack_signs(engram(torch.tensor([[0.1, 2.0, -3.0, 0.7]])).gate_bits, 4).tolist()  # +1: recruited
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    def __init__(self, rate: float, temperature: float = 1.0, *, score: str = "preactivation") -> None:
        super().__init__(rate)
        if temperature != 0:
            check_number("temperature", temperature, "0 or at least 1e-6", above=math.nextafter(1e-6, 0), infinite=True)
        if score not in ("preactivation", "magnitude"):
            raise ValueError(f"score: expected 'preactivation' or 'magnitude', got {score!r}")
        self.temperature = float(temperature)
        self.score = score

    def forward(self, x: Tensor) -> Recruitment:
        """Floats (M, K): the pre-activations."""
        score = x.detach().abs() if self.score == "magnitude" else x.detach()
        temperature = self.temperature if self.training else 0.0
        # without noise nothing is drawn, so that an evaluation leaves the training after it as it would have been
        seed = ops.draw_seed() if temperature > 0 else torch.zeros(2, dtype=torch.int64)
        gate = ops.sample_engram(score, seed, self.rate, temperature=temperature, **self.numbering())
        return Recruitment(gate)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"rate={self.rate}, temperature={self.temperature}, score={self.score!r}"


class ContextEngram(Engram):
    """A fixed random subset of ``max(1, round(rate * K))`` units per context (XdG, Masse et al. 2018).

    Set :attr:`context` before each forward pass: a context's number for the whole batch, or int64 (M,) of one number
    per sample. The subsets follow from the ``seed`` buffer, drawn at construction and kept in ``state_dict``.
    Raises: ValueError if ``rate`` is outside (0, 1], ``num_contexts`` below 1 or ``context`` out of range; RuntimeError
    in a forward pass before ``context`` is set.

    >>> engram = ek.ContextEngram(num_contexts=3, rate=0.2)
    >>> engram.context = 1
    >>> int((ek.ops.unpack_signs(engram(torch.zeros(1, 100)).gate_bits, 100) > 0).sum())
    20
    """

    seed: Tensor

    def __init__(self, num_contexts: int, rate: float) -> None:
        super().__init__(rate)
        self.num_contexts = check_size("num_contexts", num_contexts)
        self.register_buffer("seed", ops.draw_seed())
        self._context: int | Tensor | None = None
        self._gates: dict[tuple[int, torch.device], tuple[Tensor, Any, Tensor]] = {}

    @property
    def context(self) -> int | Tensor | None:
        """The context in force: its number, int64 (M,) for one per sample, or None before one is set."""
        return self._context

    @context.setter
    def context(self, value: int | Tensor) -> None:
        numbers = torch.as_tensor(value)
        if numbers.dtype != torch.int64 or numbers.dim() > 1:
            raise ValueError(f"context: expected an int or int64 (M,), got {numbers.dtype} {tuple(numbers.shape)}")
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.num_contexts:
            raise ValueError(f"context: expected numbers in [0, {self.num_contexts}), got {value!r}")
        self._context = int(numbers) if numbers.dim() == 0 else numbers

    @torch.inference_mode(False)  # the gates serve later calls, which may need gradients
    def gates(self, k: int, device: torch.device) -> Tensor:
        """The gates of all contexts over ``k`` units, bits (num_contexts, words)."""
        seed, sizes = self.seed.cpu(), (self.num_contexts, self.rate)
        cached = self._gates.get((k, device))
        if cached is None or not torch.equal(cached[0], seed) or cached[1] != sizes:
            score = torch.zeros(self.num_contexts, k, dtype=torch.float32, device=device)
            gates = ops.sample_engram(score, seed, self.rate, temperature=float("inf"))
            cached = self._gates[k, device] = seed.clone(), sizes, gates  # a clone: a write to the seed must show
        return cached[2]

    def forward(self, x: Tensor) -> Recruitment:
        """Floats (M, K), of which only the shape counts."""
        if self._context is None:
            raise RuntimeError("context: set the engram's context before a forward pass")
        if isinstance(self._context, Tensor) and self._context.shape[0] != x.shape[0]:
            raise ValueError(f"context: expected {x.shape[0]} numbers, one per sample, got {self._context.shape[0]}")
        return Recruitment(self.gates(x.shape[1], x.device)[self._context])

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"num_contexts={self.num_contexts}, rate={self.rate}"

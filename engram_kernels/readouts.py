"""Read-outs: what turns the engram of the last hidden layer into a decision.

Each stands in the place of a network's last layer (``EngramMLP(readout=...)``), takes the excitabilities of that
layer's input units, floats (M, K), recruits an engram by them, and gives scores (M, classes). The input of the read-out
is the *centred engram code* ``h = g - rate``, the gate less its mean, so that what all engrams share says nothing.

    DendriticReadout   trained by gradients, binary weights, several segments per class
    PrototypeReadout   counts which units each class recruits; binary; the order of the samples leaves no trace
    RidgeReadout       streaming second moments, solved on demand; real-valued; no trace of the order either
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .autograd import CodeProduct
from .checks import check_hidden_dtype, check_number, check_size
from .engrams import StochasticEngram
from .fused_backward import gradient_consumer
from .hidden_weight import HiddenWeight
from .layers import INIT_RANGE, HiddenWeightModule
from .moments import add_pairs_


def _outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """As ``torch.compiler.disable``, which would import the compiler, a second of time, for those who never compile."""
    disabled: Callable[..., Any] | None = None  # not functools.cache, which Dynamo warns of

    @functools.wraps(function)
    def outside(*arguments: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*arguments)
            disabled = torch.compiler.disable(function)
        return disabled(*arguments)

    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    return outside


def check_labels(samples: int, y: Tensor, num_classes: int) -> None:
    """Raises: ValueError unless ``y`` is int64 (samples,) with numbers in [0, num_classes)."""
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != (samples,):
        got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y: expected int64 ({samples},), got {got}")
    if torch.compiler.is_compiling():  # a graph has no values to look at before it runs
        torch._assert_async(((y >= 0) & (y < num_classes)).all(), "y: expected labels in [0, num_classes)")
    elif y.numel() and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
        raise ValueError(f"y: expected labels in [0, {num_classes}), got {int(y.min())} to {int(y.max())}")


class _Readout(nn.Module):
    """What the read-outs share: sizes, the engram, and the check of what comes in."""

    def __init__(self, in_features: int, num_classes: int, engram: StochasticEngram) -> None:
        super().__init__()
        self.in_features = check_size("in_features", in_features)
        self.num_classes = check_size("num_classes", num_classes)
        if not isinstance(engram, StochasticEngram):  # others recruit without regard to the input
            raise ValueError(f"engram: expected a StochasticEngram, got {type(engram).__name__}")
        self.engram = engram

    @property
    def rate(self) -> float:
        """The mean of a gate: recruited units of all."""
        return self.engram.recruited(self.in_features) / self.in_features

    def recruit(self, x: Tensor) -> Tensor:
        """Excitabilities, floats (M, K) -> gates, bits (M, words)."""
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise RuntimeError(f"input: expected shape (M, {self.in_features}), got {tuple(x.shape)}")
        gate_bits = self.engram(x).gate_bits
        assert gate_bits is not None
        return gate_bits

    def check_labels(self, samples: int, y: Tensor) -> None:
        """Raises: ValueError unless ``y`` is int64 (samples,) with numbers of classes."""
        check_labels(samples, y, self.num_classes)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"in_features={self.in_features}, num_classes={self.num_classes}"


class DendriticReadout(HiddenWeightModule, _Readout):
    """A binary output layer with several dendritic segments per class; the most active ones speak for their class.

    ``s[m, c, j] = sum_k (g[m, k] - rate) sign(weight[c S + j, k]) / sqrt(recruited)``,
    ``logit[m, c] = max_j s[m, c, j]``, or the mean of the ``top_segments`` largest

    One segment per class is a plain binary output layer on the centred code. :meth:`local_loss` trains a class without
    pushing any other down: only the segment that won for the true class moves, towards the engram, so what was
    learned of other classes stays. That makes each segment a binarised prototype of the engrams it won, found by
    gradients. (Dendritic segments: Iyer et al. 2022, "Active Dendrites"; conscience: DeSieno 1988. The rule is ours.)

    Args:
        in_features: K, at least 1.
        num_classes: C, at least 1.
        segments: S per class, at least 1.
        engram: a :class:`~engram_kernels.StochasticEngram`.
        top_segments: how many of the most active segments speak for their class, 1 to S. More than one average out
            the coarseness of binary weights, as k nearest neighbours do that of a sample.
        conscience: how much of an advantage in ``s`` a segment that never wins has over one that wins as often as the
            mean of its class, at least 0. Without it few segments win everything.
        ste_window: gradient reaches recruited units whose excitability lies at most this far above that of the weakest
            recruited one; above 0, inf for all of them.
        device: of the parameters.
        dtype: of the parameters: float32, bfloat16 or float16.

    Attributes: ``weight`` hidden weights (C S, K), uniform in [-0.05, 0.05] at first; ``wins`` float32 (C, S), how
    often each segment won in training, from 1.

    Shapes: excitabilities, floats (M, K) -> logits (M, C) in the same dtype.
    Raises: ValueError for a setting out of range; RuntimeError if the input is not (M, K), or contains NaN.

    >>> readout = ek.DendriticReadout(256, 10, segments=4, engram=ek.StochasticEngram(0.1, temperature=0))
    >>> activations = readout.activations(torch.randn(5, 256))
    >>> readout.local_loss(activations, torch.tensor([0, 1, 2, 3, 4])).backward()
    >>> activations.shape, readout.scores(activations).shape
    (torch.Size([5, 10, 4]), torch.Size([5, 10]))
    """

    wins: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        segments: int = 100,
        *,
        engram: StochasticEngram,
        top_segments: int = 1,
        conscience: float = 5.0,
        ste_window: float = math.inf,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, engram)
        self.segments = check_size("segments", segments)
        if isinstance(top_segments, bool) or not isinstance(top_segments, int) or not 1 <= top_segments <= segments:
            raise ValueError(f"top_segments: expected 1 to segments = {segments}, got {top_segments!r}")
        self.top_segments = top_segments
        finite = "a finite number of at least 0"
        self.conscience = 0.0 if conscience == 0 else check_number("conscience", conscience, finite, above=0.0)
        self.ste_window = check_number("ste_window", ste_window, "above 0", above=0.0, infinite=True)
        dtype = check_hidden_dtype(dtype)
        self.weight = HiddenWeight(torch.empty(num_classes * segments, in_features, device=device, dtype=dtype))
        self.register_buffer("wins", torch.ones(num_classes, segments, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Hidden weights uniform in [-0.05, 0.05], every segment with one win."""
        nn.init.uniform_(self.weight, -INIT_RANGE, INIT_RANGE)
        nn.init.ones_(self.wins)

    def activations(self, x: Tensor) -> Tensor:
        """Excitabilities, floats (M, K) -> activations of all segments (M, C, S)."""
        gate_bits = self.recruit(x)
        mask_bits = None
        if x.requires_grad and self.ste_window < math.inf:
            recruited = ops.unpack_signs(gate_bits, self.in_features, x.dtype) > 0
            weakest = x.detach().masked_fill(~recruited, math.inf).amin(dim=1, keepdim=True)
            mask_bits = ops.pack_window(x.detach() - weakest, self.ste_window, gate_bits)
        weight, w_bits = self.signed_weight()
        consumed = gradient_consumer(weight) is not None
        y = CodeProduct.apply(x, weight, w_bits, gate_bits, mask_bits, self.rate, consumed)
        y = y / math.sqrt(self.engram.recruited(self.in_features))
        return y.reshape(-1, self.num_classes, self.segments)

    def forward(self, x: Tensor) -> Tensor:
        """Excitabilities, floats (M, K) -> logits (M, C)."""
        return self.scores(self.activations(x))

    def scores(self, activations: Tensor) -> Tensor:
        """Activations of all segments (M, C, S) -> logits (M, C)."""
        return segment_scores(activations, self.top_segments)

    def local_loss(self, activations: Tensor, y: Tensor) -> Tensor:
        """``-mean over m of s[m, y[m], winner]``.

        ``winner = argmax_j (s[m, y, j] + conscience (1 - wins[y, j] / mean_j wins[y]))``. In training mode the wins
        are counted. Activations (M, C, S) from :meth:`activations`, labels int64 (M,) -> scalar; 0 if M is 0.
        Raises: RuntimeError for activations of another shape; ValueError for labels that are none.
        """
        if activations.dim() != 3 or activations.shape[1:] != (self.num_classes, self.segments):
            wanted, got = f"(M, {self.num_classes}, {self.segments})", tuple(activations.shape)
            raise RuntimeError(f"activations: expected shape {wanted}, as activations(x) gives, got {got}")
        self.check_labels(len(activations), y)
        return pull_loss(activations, y, self.wins, self.conscience, count=self.training)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        own = f"segments={self.segments}, top_segments={self.top_segments}, conscience={self.conscience}"
        return f"{super().extra_repr()}, {own}"


class PrototypeReadout(_Readout):
    """Binary prototypes: the units that a class recruits more often than the classes do on average.

    With ``f[c, k]`` the share of the samples of class c that recruit unit k, ``f[k]`` its mean over the classes seen,
    ``W[c, k] = +1 if f[c, k] >= f[k] else -1`` and ``score[m, c] = sum_k (g[m, k] - f[k]) W[c, k] / sqrt(recruited)``;
    -inf for a class never seen.

    :meth:`observe` counts; there is nothing to train. Counts are integers, so neither the order of the samples nor
    their division into batches and tasks leaves a trace.

    Shapes: excitabilities, floats (M, K) -> scores (M, C) in the same dtype.
    Raises: ValueError for sizes below 1 or another engram; RuntimeError if the input is not (M, K), or contains NaN.

    >>> readout = ek.PrototypeReadout(4, 2, engram=ek.StochasticEngram(0.5, temperature=0))
    >>> x = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]])
    >>> readout.observe(x, torch.tensor([0, 1]))
    >>> readout(x).argmax(1).tolist()
    [0, 1]
    """

    counts: Tensor
    samples: Tensor

    def __init__(self, in_features: int, num_classes: int, *, engram: StochasticEngram) -> None:
        super().__init__(in_features, num_classes, engram)
        self.register_buffer("counts", torch.zeros(num_classes, in_features, dtype=torch.int64))
        self.register_buffer("samples", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: Tensor, y: Tensor) -> None:
        """Counts the units that samples recruit. Excitabilities, floats (M, K), labels int64 (M,)."""
        self.observe_engrams(self.recruit(x), y)

    @torch.no_grad()
    def observe_engrams(self, gate_bits: Tensor, y: Tensor) -> None:
        """:meth:`observe` of engrams that were recruited elsewhere, bits (M, words)."""
        self.check_labels(len(gate_bits), y)
        _count(gate_bits, y, self.counts, self.samples)

    @torch.no_grad()
    def prototypes(self) -> tuple[Tensor, Tensor]:
        """The prototypes, bits (C, words), and what is taken off their products, ``sum_k f[k] W[c, k]``, (C,)."""
        shares = self.counts.double() / self.samples.clamp(min=1)[:, None]
        mean = shares.sum(0) / (self.samples > 0).sum().clamp(min=1)
        above = shares - mean > -1e-12  # equal shares may differ from their mean in its last bit
        offset = torch.where(above, mean, -mean).sum(1).float()
        return ops.pack_signs(above.float() - 0.5), offset

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Excitabilities, floats (M, K) -> scores (M, C)."""
        return self.engram_scores(self.recruit(x), *self.prototypes()).to(x.dtype)

    def engram_scores(self, gate_bits: Tensor, prototype_bits: Tensor, offset: Tensor) -> Tensor:
        """Scores, float32 (M, C), of engrams, bits (M, words), by what :meth:`prototypes` gives."""
        y = ops.binary_matmul(gate_bits, prototype_bits, self.in_features, gate_bits) - offset
        y = y / math.sqrt(self.engram.recruited(self.in_features))
        return y.masked_fill(self.samples == 0, -math.inf)


class _Solution(NamedTuple):
    """A solution, and what it was derived from."""

    weight: Tensor
    bias: Tensor
    penalty: float
    gram: weakref.ref[Tensor]
    gram_version: int
    gram_diagonal: Tensor
    counts: Tensor
    samples: Tensor


class RidgeReadout(_Readout):
    """Ridge regression on the engram code from streaming second moments, solved when it is asked.

    With ``G`` the covariance of the gates and ``mu_c`` their mean in class c, the scores are
    ``g · w_c - w_c · mu_c / 2``, ``w_c = (G + penalty * mean of G's diagonal * I)^-1 mu_c``: the directions of ridge
    regression, with biases that do not depend on how many samples each class has, as in linear discriminants
    (streaming: Hayes and Kanan 2020). The Gram matrix of binary features is counted by the popcount kernel, exactly, so
    neither the order of the samples nor their division into batches and tasks leaves a trace.

    The moments may be changed from outside, as by ``load_state_dict``, or by ``torch.distributed.all_reduce`` of all
    three, which adds up what processes have seen: the solution is derived anew. Only writes past torch's version
    counter to ``gram`` alone that leave its diagonal as it was go unnoticed.

    Memory: K² + C K + C integers of 4 and 8 bytes: 16 MiB for K = 2048.

    Args:
        in_features: K, at least 1.
        num_classes: C, at least 1.
        engram: a :class:`~engram_kernels.StochasticEngram`.
        penalty: of the regression, as a share of the features' mean variance, above 0.

    Shapes: excitabilities, floats (M, K) -> scores (M, C) in the same dtype; -inf for a class never seen.
    Raises: ValueError for a setting out of range, another engram, or more than 2³¹ - 1 samples; RuntimeError if the
    input is not (M, K), or contains NaN, and for moments that are not of the same samples.

    >>> readout = ek.RidgeReadout(4, 2, engram=ek.StochasticEngram(0.5, temperature=0))
    >>> x = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]])
    >>> readout.observe(x, torch.tensor([0, 1]))
    >>> readout(x).argmax(1).tolist()
    [0, 1]
    """

    gram: Tensor
    counts: Tensor
    samples: Tensor

    def __init__(self, in_features: int, num_classes: int, *, engram: StochasticEngram, penalty: float = 0.1) -> None:
        super().__init__(in_features, num_classes, engram)
        self.penalty = check_number("penalty", penalty, "a finite number above 0", above=0.0)
        self.register_buffer("gram", torch.zeros(in_features, in_features, dtype=torch.int32))
        self.register_buffer("counts", torch.zeros(num_classes, in_features, dtype=torch.int64))
        self.register_buffer("samples", torch.zeros(num_classes, dtype=torch.int64))
        self._solution: _Solution | None = None

    @torch.no_grad()
    def observe(self, x: Tensor, y: Tensor) -> None:
        """Adds samples to the moments. Excitabilities, floats (M, K), labels int64 (M,). Best in large batches."""
        self.observe_engrams(self.recruit(x), y)

    @torch.no_grad()
    def observe_engrams(self, gate_bits: Tensor, y: Tensor) -> None:
        """:meth:`observe` of engrams that were recruited elsewhere, bits (M, words)."""
        self.check_labels(len(gate_bits), y)
        if int(self.samples.sum()) + len(y) > torch.iinfo(torch.int32).max:
            raise ValueError("samples: expected at most 2**31 - 1 in all, since the Gram matrix is counted in int32")
        add_pairs_(self.gram, gate_bits, _count(gate_bits, y, self.counts, self.samples))

    @_outside_of_graphs  # which can't tell whether the moments have changed
    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights (C, K) and biases (C,) on gates, float32, from all that was observed."""
        if self._solution is None or not self._is_of_these_moments(self._solution):
            self._check_moments()
            n = max(1, int(self.samples.sum()))
            mean = self.counts.sum(0).double() / n
            covariance = self.gram.double().div_(n).addr_(mean, mean, alpha=-1)  # in place: k² of 8 bytes
            variance = covariance.diagonal()
            variance += self.penalty * float(variance.mean()) + 1e-12  # a unit that all samples share has none
            class_means = self.counts.double() / self.samples.clamp(min=1)[:, None]
            with _one_thread():
                factor = torch.linalg.cholesky(covariance)
                del covariance, variance  # before the solution copies the factor
                weight = torch.cholesky_solve(class_means.T, factor).T
                bias = -0.5 * (weight * class_means).sum(1)
            self._solution = _Solution(
                weight.float(), bias.float(), self.penalty, weakref.ref(self.gram), _version(self.gram),
                self.gram.diagonal().clone(), self.counts.clone(), self.samples.clone(),
            )  # fmt: skip
        return self._solution.weight, self._solution.bias

    def _is_of_these_moments(self, solution: _Solution) -> bool:
        """Whether nothing has changed since, by identity, version and, for writes that no version counts, values.

        ``all_reduce`` counts none. Of the Gram matrix the diagonal, ``counts`` summed over the classes, stands for all.
        """
        return (
            solution.penalty == self.penalty
            and solution.gram() is self.gram
            and solution.gram_version == _version(self.gram)
            and torch.equal(solution.gram_diagonal, self.gram.diagonal())
            and torch.equal(solution.counts, self.counts)
            and torch.equal(solution.samples, self.samples)
        )

    def _check_moments(self) -> None:
        """Raises: RuntimeError unless all three are of the same samples, which it finds in sums that are always equal.

        Some of them summed over processes, and some forgotten, would make a wrong solution.
        """
        recruited = self.engram.recruited(self.in_features)
        if not torch.equal(self.gram.diagonal().long(), self.counts.sum(0)):
            wrong = "a gram whose diagonal is not the sum of counts"
        elif not torch.equal(self.counts.sum(1), recruited * self.samples):
            wrong = f"counts that are not {recruited} units a sample"
        else:
            return
        raise RuntimeError(f"gram, counts, samples: expected moments of the same samples, got {wrong}")

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles solve for themselves."""
        return self.__dict__ | {"_solution": None}

    def forward(self, x: Tensor) -> Tensor:
        """Excitabilities, floats (M, K) -> scores (M, C)."""
        scores = regression_scores(self.recruit(x), *self.solve())
        return scores.to(x.dtype).masked_fill(self.samples == 0, -math.inf)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For LAPACK, the last bits of whose results depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _version(tensor: Tensor) -> int:
    """Torch's count of writes; tensors made in inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version


def regression_scores(gate_bits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``g @ weight.T + bias``: engrams, bits (M, words), floats (C, K) and (C,) -> float32 (M, C)."""
    # a gate is half the sum of its sign and 1
    return 0.5 * (ops.sign_matmul_t(weight, gate_bits, weight.shape[1]).T + weight.sum(1)) + bias


def segment_scores(activations: Tensor, top_segments: int) -> Tensor:
    """The mean of the most active segments of each class: (M, C, S) -> (M, C)."""
    if top_segments == 1:
        return activations.amax(dim=2)
    return activations.topk(top_segments, dim=2, sorted=False).values.mean(dim=2)


def pull_loss(activations: Tensor, y: Tensor, wins: Tensor, conscience: float, *, count: bool) -> Tensor:
    """`DendriticReadout.local_loss` of segments of any kind.

    Activations (M, C, S), labels int64 (M,) -> scalar; ``wins`` (C, S) are counted in place where ``count`` is True.
    """
    own = activations[torch.arange(len(y), device=y.device), y]
    winner = winning_segments(own.detach(), y, wins, conscience, count=count)
    return -own.gather(1, winner.unsqueeze(1)).sum() / max(1, len(y))


@torch.no_grad()
def winning_segments(own: Tensor, y: Tensor, wins: Tensor, conscience: float, *, count: bool) -> Tensor:
    """The winner of each sample's class, int64 (M,): :meth:`DendriticReadout.local_loss`.

    Activations of the segments of that class (M, S), labels int64 (M,); ``wins`` (C, S) are counted in place where
    ``count`` is True.
    """
    own_wins = wins[y]
    winner = (own + conscience * (1.0 - own_wins / own_wins.mean(dim=1, keepdim=True))).argmax(dim=1)
    if count:
        wins.index_put_((y, winner), torch.ones_like(own_wins[:, 0]), accumulate=True)
    return winner


def _count(gate_bits: Tensor, y: Tensor, counts: Tensor, samples: Tensor) -> Tensor:
    """Adds to ``counts`` (C, K) how often each unit was recruited for each class, to ``samples`` (C,) the samples.

    Returns how often each was recruited at all, int32 (K,).
    """
    chosen = nn.functional.one_hot(y, len(samples)).float()
    recruited = ops.gated_weight_grad(chosen, gate_bits, counts.shape[1], gate_bits).round()
    counts += recruited.to(torch.int64)
    samples += chosen.sum(0).to(torch.int64)
    return recruited.sum(0).to(torch.int32)

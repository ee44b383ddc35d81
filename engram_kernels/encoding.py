"""Input units from features of any scale and offset, few or many."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_size

FIRST_SAMPLES = 64  # from which mean and range are taken
_FEWEST_INPUTS = 64  # +1 and -1 make too few different weighted sums of fewer
_SAME_UNIT = 0.25  # median range over the largest from which on all features share one scale
_CLIP = 3.0  # ranges from the mean: a feature may leave by far the range of the first samples


def inputs_of(features: int) -> int:
    """Input units that so many features get: one each, or several each where they are few."""
    return features * -(-_FEWEST_INPUTS // features)


def mean_of(x: Tensor) -> Tensor:
    """The mean of samples, float32 (M, features) -> (features,): in float64, whose sums round alike in all threads."""
    return x.mean(dim=0, dtype=torch.float64).float()


def scale_of(mean: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What features are divided by, from their mean, smallest and largest values, all (features,)."""
    spread = high - low
    # what has not varied yet: its own magnitude is all that is known of its unit
    own = torch.where(spread > 0, spread, torch.where(mean != 0, mean.abs(), torch.ones_like(mean)))
    if inputs_of(len(mean)) > len(mean):
        return own
    largest = spread.max()
    varying = torch.where(spread > 0, spread, torch.full_like(spread, math.nan))
    alike = (largest > 0) & (varying.nanmedian() >= _SAME_UNIT * largest)
    return torch.where(alike, largest, own)


def as_inputs(z: Tensor) -> Tensor:
    """Scaled features, float32 (M, features) -> inputs (M, `inputs_of` features): clipped, or coded where few."""
    features = z.shape[1]
    units = inputs_of(features) // features
    if units == 1:
        return z.clamp(-_CLIP, _CLIP)
    u = (torch.arange(units, dtype=torch.float32, device=z.device) + 0.5) / units
    thresholds = torch.tan(math.pi * (u - 0.5))
    return (2.0 * (z[:, :, None] - 0.3 * thresholds)).clamp(-1.0, 1.0).flatten(1)


def standardize(x: Tensor) -> Tensor:
    """Per-sample standardisation, ``(x - mean) / std``, of one minibatch.

    Shapes: (B, features) uint8 or float32 -> (B, features) float32. The mean and the (population) deviation
    are over the features of each sample; a constant sample becomes zeros. Nothing is learned from other
    samples, so a test sample is treated alike whatever came before or beside it.
    """
    x = x.to(torch.float32)
    # Scaling to [-1, 1] first keeps the variance inside float32 for data of any magnitude.
    peak = x.abs().amax(dim=1, keepdim=True)
    x = x / torch.where(peak > 0, peak, 1.0)
    x -= x.mean(dim=1, keepdim=True)
    deviation = x.square().mean(dim=1, keepdim=True).sqrt()
    # Below this the deviation of a constant sample is rounding noise, which must not be amplified.
    x /= torch.where(deviation > 1e-5, deviation, torch.inf)
    return x


class SampleStandardisation(nn.Module):
    """`standardize` as a module, which :func:`~engram_kernels.pack` takes before a network trained on such inputs."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = check_size("features", features)

    def forward(self, x: Tensor) -> Tensor:
        """Floats or uint8 (M, features) -> float32 (M, features)."""
        return standardize(x)


class InputEncoding(nn.Module):
    """Scales features by their mean and range, and gives few features several input units each.

    ``z = (x - mean) / range``, clipped to [-3, 3]. Mean and range are those of the first samples of the stream, 64 or
    more, seen in training mode; then they stay, since another scale would change the code of all that was learned
    before. No label is used. Features that share a unit keep their proportions: where the median of the ranges is at
    least a quarter of the largest one, as for pixels or embeddings, all are divided by the largest.

    Fewer than 64 features get ``n = ceil(64 / features)`` inputs each, a population code:
    ``u[j] = clip(2 (z - 0.3 t[j]), -1, 1)``, thresholds t[j] at the quantiles ``(j + 1/2) / n`` of the Cauchy
    distribution, whose tails reach what later classes may bring.

    uint8 with at least 64 features, images, passes as it is: its unit is shared already, and the first layer is exact
    and faster with it.

    Args:
        features: F, at least 1.

    Attributes: ``inputs``: F times n, the units that come out. Buffers ``samples`` (), int64; ``mean``, ``low``,
    ``high``, ``scale`` (F,), float32.

    Shapes: floats or uint8 (M, F) -> (M, inputs), floats in the input's dtype, float32 for uint8.
    Raises: ValueError for a size below 1; RuntimeError for another shape, or for NaN or infinity in the first samples.

    >>> encoding = ek.InputEncoding(4)
    >>> encoding(torch.randn(100, 4)).shape
    torch.Size([100, 64])
    """

    samples: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor
    scale: Tensor

    def __init__(self, features: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.features = check_size("features", features)
        self.inputs = inputs_of(features)
        self._seen = 0  # that of ``samples``, which a compiled graph could not branch on
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64, device=device))
        for name, value in (("mean", 0.0), ("low", 0.0), ("high", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((features,), value, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Floats or uint8 (M, features) -> (M, inputs)."""
        if x.dim() != 2 or x.shape[1] != self.features:
            raise RuntimeError(f"input: expected shape (M, {self.features}), got {tuple(x.shape)}")
        if x.dtype == torch.uint8 and self.inputs == self.features:
            return x
        values = x.float()
        if self.training and self._samples_seen() < FIRST_SAMPLES and x.shape[0]:
            self._observe(values.detach())
        z = as_inputs((values - self.mean) / self.scale)
        return z if x.dtype == torch.uint8 else z.to(x.dtype)

    def _samples_seen(self) -> int:
        """What ``samples`` says, whoever changed it; on other devices, where reading waits, what it said last."""
        if not torch.compiler.is_compiling() and self.samples.device.type == "cpu":
            self._seen = int(self.samples)
        return self._seen

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        seen, new = self._seen, x.shape[0]
        low, high = x.amin(dim=0), x.amax(dim=0)
        mean = mean_of(x)
        if seen:
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
            mean = self.mean + (mean - self.mean) * (new / (seen + new))
        if not torch.compiler.is_compiling() and not bool((high - low).isfinite().all()):
            raise RuntimeError("input: expected finite numbers, got NaN, infinity or a range beyond float32")
        self.mean.copy_(mean)
        self.low.copy_(low)
        self.high.copy_(high)
        self.scale.copy_(scale_of(mean, low, high))
        self._seen = seen + new
        self.samples.fill_(self._seen)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._seen = int(self.samples) if self.samples.device.type != "meta" else 0

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"features={self.features}, inputs={self.inputs}"

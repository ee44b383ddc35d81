"""Normalisation whose signs are exact."""

from __future__ import annotations

from torch import Tensor, nn

from .autograd import Standardisation
from .checks import check_number, check_size


class ExactLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` without parameters, the sign of whose outputs is that of ``y - mean``, ties included.

    ``z[m, n] = (y[m, n] - mean[m]) / sqrt(variance[m] + eps)``

    Sums of signs are integers, and often one equals their mean. ``nn.LayerNorm`` rounds the mean to float32 in an order
    that depends on the processor, so that rounding decides the sign of such units. Here it is +1 on every processor,
    as in a packed model, which compares integers.

    Args:
        units: N, at least 1.
        eps: added to the variance.

    Shapes: floats (*, N) -> (*, N) in the same dtype.
    Raises: TypeError or ValueError for a size or ``eps`` that is none; RuntimeError if the last dimension is not N.
    Source: Ba et al. 2016.

    >>> ek.ExactLayerNorm(4)(torch.tensor([[1.0, 2.0, 2.0, 3.0]])).sign().tolist()
    [[-1.0, 0.0, 0.0, 1.0]]
    """

    def __init__(self, units: int, eps: float = 1e-5) -> None:
        positive = check_number("eps", eps, "a finite number above 0", above=0.0)
        super().__init__(check_size("units", units), positive, elementwise_affine=False)

    def forward(self, input: Tensor) -> Tensor:
        """Floats (*, N) -> (*, N)."""
        units = self.normalized_shape[0]
        if input.dim() < 1 or input.shape[-1] != units:
            raise RuntimeError(f"input: expected shape (*, {units}), got {tuple(input.shape)}")
        return standardise(input.reshape(-1, units), self.eps).reshape(input.shape)


def standardise(y: Tensor, eps: float = 1e-5) -> Tensor:
    """`ExactLayerNorm` as a function of floats (M, N)."""
    z: Tensor = Standardisation.apply(y, eps)[0]
    return z

"""Drop-in layers whose weights and activations are signs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .autograd import SignProduct, gated_sign_product
from .checks import check_flag, check_hidden_dtype, check_number, check_size
from .engrams import Engram
from .fused_backward import gradient_consumer
from .hidden_weight import HiddenWeight, as_hidden_weight, layers_with_hidden_weights, sign_bits_of

INIT_RANGE = 0.05  # hidden weights start uniform in [-0.05, 0.05] (Laborieux et al. 2021)


class HiddenWeightModule(nn.Module):
    """A module with a hidden ``weight``, which whatever is assigned to it becomes."""

    weight: HiddenWeight
    weight_dims = 2

    def __new__(cls, *arguments: Any, **settings: Any) -> HiddenWeightModule:
        """Notes the layer among those alive, whether it is made, copied or unpickled."""
        layer: HiddenWeightModule = super().__new__(cls)
        layers_with_hidden_weights.add(layer)
        return layer

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Makes whatever is assigned to ``weight`` a hidden weight."""
        if name == "weight" and param is not None:
            param = as_hidden_weight(param, self.weight_dims)
        super().register_parameter(name, param)

    def _apply(self, fn, recurse=True):
        """Moves and converts like any module; torch may make a plain parameter of the weight on the way."""
        super()._apply(fn, recurse)
        weight = self._parameters.get("weight")  # pruning and parametrization keep it elsewhere
        if weight is not None:
            self._parameters["weight"] = as_hidden_weight(weight, self.weight_dims)
        return self

    def signed_weight(self) -> tuple[Tensor, Tensor]:
        """The weight in force, a plain tensor where torch.func or a parametrization puts one, and its packed signs.

        Raises: RuntimeError if it contains NaN, or zeros where something computes it.
        """
        weight: Tensor = self.weight
        if type(weight) is nn.Parameter:  # swapped in past every hook
            weight = as_hidden_weight(weight, self.weight_dims)
        if "weight" not in self._parameters:
            _refuse_zeros(weight)
        return weight, sign_bits_of(weight)


def _refuse_zeros(weight: Tensor) -> None:
    """Raises: RuntimeError for a computed weight with zeros, as pruning and other masks make them."""
    whole = (weight != 0).all()
    message = (
        "weight: expected no exact zeros from what computes it (torch.nn.utils.prune, a parametrization, a hook), got "
        "some; a sign has no zero, so each would count +1, after prune.remove too; to leave units out use an engram"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(whole, message)
    elif not (weight.is_meta or torch._C._are_functorch_transforms_active() or whole):
        raise RuntimeError(message)


class BinaryEngramLinear(HiddenWeightModule):
    """Drop-in for ``nn.Linear`` whose weights and inputs are signs, gated by an engram.

    ``y[m, n] = sum over recruited k of sign(x[m, k]) * sign(weight[n, k]) / sqrt(recruited)`` (+ bias), sign(0) = +1

    Shapes: input (*, in_features), output (*, out_features) in the input's dtype (float32, bfloat16 or float16).
    ``weight`` is the real-valued hidden weight (Courbariaux et al. 2016); ``weight`` and ``bias`` have the names and
    shapes of those in ``nn.Linear``, so that a float checkpoint loads. Any optimizer works;
    :class:`~engram_kernels.MetaplasticAdam` updates hidden weights by the metaplastic rule. Their packed signs are kept
    between calls and never stale. Gradients are straight-through: the weight's passes unchanged, the input's only to
    recruited units with ``|x| <= ste_window`` (``inf``: to all recruited units).

    Outputs and gradients depend neither on the number of threads nor on torch.set_flush_denormal. With
    ``binary_input=False`` the weight's gradient is torch's product, whose factors torch.set_float32_matmul_precision
    rounds on some processors.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        bias: adds a real-valued bias (N,).
        scaled: divides the sums by the square root of the recruited units, so that the outputs of random signs have
            unit variance; False leaves the integers, as before a norm.
        engram: rule that recruits input units, for instance :class:`~engram_kernels.StochasticEngram`; None: all units.
        binary_input: False takes the input as it is, real-valued, as a first layer does; excludes ``engram``. Such a
            layer takes uint8 as well, as images come, and gives float32: exact, and faster.
        ste_window: half-width of the straight-through window, above 0.
        backward_dtype: bfloat16 rounds both factors of the weight gradient of a real-valued input, the one product of
            the backward pass that multiplies, and so uses the processor's bfloat16 units (slow where it has none).
            Excludes ``binary_input``, whose products are sums.
        device: of the parameters.
        dtype: of the parameters: float32, bfloat16 or float16.

    Raises: TypeError for an argument of another type; ValueError for sizes below 1, a window of 0 or less, an engram on
    a real-valued input, or a dtype that is not supported; RuntimeError if the input's last dimension is not
    ``in_features``, its dtype is not one of the three, or it or the weight contains NaN, and if something
    that computes the weight, such as torch.nn.utils.prune, makes zeros, which have no sign.

    >>> layer = ek.BinaryEngramLinear(4, 1, bias=False, scaled=False)
    >>> _ = layer.load_state_dict({"weight": torch.tensor([[0.3, -0.1, 0.2, -0.4]])})
    >>> layer(torch.tensor([[2.0, -1.0, 0.0, 5.0]])).tolist()  # 1 + 1 + 1 - 1, since sign(0) = +1
    [[2.0]]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scaled: bool = True,
        engram: Engram | None = None,
        binary_input: bool = True,
        ste_window: float = 1.0,
        backward_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        self.binary_input = check_flag("binary_input", binary_input)
        self.ste_window = check_number("ste_window", ste_window, "above 0", above=0.0, infinite=True)
        self.scaled = check_flag("scaled", scaled)
        check_flag("bias", bias)
        if engram is not None and not isinstance(engram, Engram):
            raise TypeError(f"engram: expected an engram such as StochasticEngram(0.1), or None, got {engram!r}")
        dtype = check_hidden_dtype(dtype)
        if engram is not None and not binary_input:
            raise ValueError("engram: expected None with binary_input=False, since a gate recruits binary units")
        if backward_dtype not in (None, torch.bfloat16) or (backward_dtype is not None and binary_input):
            raise ValueError(
                f"backward_dtype: expected None, or torch.bfloat16 with binary_input=False, got {backward_dtype}"
            )
        self.backward_dtype = backward_dtype
        self.engram = engram
        self.weight = HiddenWeight(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Hidden weights uniform in [-0.05, 0.05], bias 0."""
        nn.init.uniform_(self.weight, -INIT_RANGE, INIT_RANGE)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Floats (*, in_features) -> (*, out_features)."""
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise RuntimeError(f"input: expected shape (*, {self.in_features}), got {tuple(x.shape)}")
        weight, w_bits = self.signed_weight()
        consumed = gradient_consumer(weight) is not None
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        engram, scale = self.engram, 1.0
        if self.binary_input:
            gate_bits, scale = (None, 1.0) if engram is None else engram(rows)
        if self.scaled:
            scale /= math.sqrt(self.in_features if engram is None else engram.recruited(self.in_features))
        if self.binary_input:
            y = gated_sign_product(rows, weight, self.bias, w_bits, gate_bits, self.ste_window, scale, consumed)
        else:
            y = SignProduct.apply(rows, weight, self.bias, w_bits, scale, consumed, self.backward_dtype)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text = text if self.scaled else text + ", scaled=False"
        return text if self.binary_input else text + ", binary_input=False"


@torch.no_grad()
def balance_(weight: Tensor) -> None:
    """Gives each unit of ``weight`` (N, K), in place, as many negative signs as others (one fewer where K is odd).

    Magnitudes stay; which synapses are negative is drawn from torch's generator. Without it the units that happen to
    have more positive signs are the most excitable ones for every input whose mean is not 0.
    """
    k = weight.shape[1]
    for rows in weight.split(256):  # the order of a draw takes 8 bytes a synapse
        negative = torch.rand(rows.shape, dtype=torch.float32, device=rows.device).argsort(dim=1) < k // 2
        rows.copy_(torch.where(negative, -rows.abs(), rows.abs()))

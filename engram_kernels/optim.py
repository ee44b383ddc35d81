"""Optimizers with the metaplastic rule for hidden weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from . import ops
from .hidden_weight import HiddenWeight


class MetaplasticAdam(Optimizer):
    """Adam whose steps consolidated hidden weights resist (Laborieux et al. 2021, and their published optimizer).

    For the hidden weights of binary layers, with ``mu``, ``v`` the moments and coupled decay::

        mu' = mu (1 - tanh^2(metaplasticity |W|))   if the step would shrink |W|, else mu
        W  -= lr sqrt(1 - beta2^t) / (1 - beta1^t) * mu' / (sqrt(v) + eps)

    in one pass over memory that also refreshes the packed signs. Every other parameter gets torch's Adam.

    Args:
        params: parameters, or groups of them, each with settings of its own if wanted (``metaplasticity`` may differ
            from layer to layer).
        lr: step size, at least 0.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: coupled L2 decay, at least 0.
        metaplasticity: m, per unit of ``|W|``, at least 0; 0 is plain Adam.
        state_dtype: of the moments of hidden weights; float32 is the only one so far.

    Raises: ValueError for a setting out of range; RuntimeError for a hidden weight or gradient that is not float32, for
    sparse gradients, and if a weight becomes NaN.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        metaplasticity: float = 1.35,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        if state_dtype != torch.float32:
            raise ValueError(f"state_dtype: expected torch.float32, got {state_dtype}")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, metaplasticity=metaplasticity)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, its settings checked."""
        settings = self.defaults | param_group
        for name in ("lr", "eps", "weight_decay", "metaplasticity"):
            if not (settings[name] >= 0 and settings[name] < float("inf")):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {settings[name]!r}")
        if len(settings["betas"]) != 2 or not all(0 <= beta < 1 for beta in settings["betas"]):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {settings['betas']!r}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            others = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("grad: expected a dense gradient, got a sparse one")
                self._state_of(parameter)["step"] += 1
                if isinstance(parameter, HiddenWeight):
                    self._update_hidden(parameter, group)
                else:
                    others.append(parameter)
            self._update_others(others, group)
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _update_hidden(self, weight: HiddenWeight, group: dict[str, Any]) -> None:
        state, (beta1, beta2), grad = self.state[weight], group["betas"], weight.grad
        assert grad is not None
        weight.updated_in_place(
            lambda sign_bits: ops.metaplastic_adam_(
                weight,
                grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                sign_bits,
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                metaplasticity=group["metaplasticity"],
                step=int(state["step"]),
            )
        )

    def _update_others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        adam(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] - 1 for state in states],  # torch counts the step itself
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

"""Optimizers with the metaplastic rule for hidden weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from . import ops
from .hidden_weight import HiddenWeight
from .reference import SCALE_BLOCK

_SECOND_MOMENT = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.int8: torch.uint8}


def _place(name: str, parameter: Tensor) -> torch.device:
    """Where an entry of the state lies: seeds and counts on the CPU."""
    return torch.device("cpu") if name in ("seed", "step") else parameter.device


def _apply_gradient(grad: Tensor, weight: Tensor, *state: Tensor, **settings: Any) -> None:
    ops.metaplastic_adam_(weight, grad, *state, **settings)


class MetaplasticAdam(Optimizer):
    """Adam whose steps consolidated hidden weights resist (Laborieux et al. 2021, and their published optimizer).

    For the hidden weights of binary layers, with ``mu``, ``v`` the moments and coupled decay::

        mu' = mu (1 - tanh^2(metaplasticity |W|))   if the step would shrink |W|, else mu
        W  -= lr sqrt(1 - beta2^t) / (1 - beta1^t) * mu' / (sqrt(v) + eps)
        W   = min(max(W, -weight_bound), weight_bound)

    in one pass over memory that also refreshes the packed signs. Every other parameter gets torch's Adam.

    Args:
        params: parameters, or groups of them, each with settings of its own if wanted (``metaplasticity`` may differ
            from layer to layer).
        lr: step size, at least 0.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: coupled L2 decay, at least 0.
        metaplasticity: m, per unit of ``|W|``, at least 0; 0 is plain Adam.
        weight_bound: largest ``|W|`` of hidden weights, above 0; infinity bounds nothing. Consolidation,
            ``tanh^2(m |W|)``, grows with every step that agrees with a weight's sign: on a long stream more and more
            weights become too rigid to learn what is new. Bounded, it never exceeds ``tanh^2(m weight_bound)``, so that
            ``weight_bound / (lr (1 - tanh^2(m weight_bound)))`` opposed steps of full size flip any weight, and the
            oldest is forgotten first, as by bounded synapses. BinaryConnect (Courbariaux et al. 2015)
            clips to 1 for another reason: what lies beyond changes no sign. bfloat16 weights are clipped before they
            are rounded; they keep to a bound that bfloat16 represents, and to any other rounded up.
        state_dtype: of the moments of hidden weights: float32; bfloat16, rounded stochastically; or int8, which keeps
            each moment in 8 bits, rounded stochastically, with a scale for every 64 units of a row.
        fuse_backward: consumes the gradient of a hidden weight within ``backward()``, block by block as it is made, so
            that no (N, K) gradient ever exists: ``backward()`` updates the hidden weights, ``step()`` everything else.
            The numbers are the same as without, for float32 weights of binary layers to the last bit. Excludes whatever
            needs gradients as a whole or twice: clipping by norm, loss scaling, accumulation, a penalty on the weights,
            a weight shared by two layers, hooks on weights, averaging over processes and whole-graph torch.compile;
            each raises an error. Learning rates must be set before ``backward()``. Gradients asked for by
            ``torch.autograd.grad`` are returned as ever and update nothing. A weight belongs to this optimizer until
            another MetaplasticAdam takes it or this one is deleted. After a ``backward()`` that failed half-way,
            :meth:`abandon_step`.

    Hidden weights are float32 or, rounded stochastically, bfloat16. Random bits come from torch's default CPU
    generator, one number per compact parameter when the optimizer is made.

    Raises: ValueError for a setting out of range and for a ``state_dict`` of another ``state_dtype``; RuntimeError for
    a hidden weight in another dtype, for sparse gradients, and if a weight becomes NaN.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        metaplasticity: float = 1.35,
        weight_bound: float = float("inf"),
        state_dtype: torch.dtype = torch.float32,
        fuse_backward: bool = False,
    ) -> None:
        if state_dtype not in _SECOND_MOMENT:
            raise ValueError(f"state_dtype: expected torch.float32, torch.bfloat16 or torch.int8, got {state_dtype}")
        self.state_dtype, self.fuse_backward = state_dtype, fuse_backward
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            metaplasticity=metaplasticity,
            weight_bound=weight_bound,
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, its settings checked."""
        settings = self.defaults | param_group
        for name in ("lr", "eps", "weight_decay", "metaplasticity"):
            if not (settings[name] >= 0 and settings[name] < float("inf")):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {settings[name]!r}")
        if not settings["weight_bound"] > 0:
            raise ValueError(f"weight_bound: expected a number above 0, got {settings['weight_bound']!r}")
        if len(settings["betas"]) != 2 or not all(0 <= beta < 1 for beta in settings["betas"]):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {settings['betas']!r}")
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if isinstance(parameter, HiddenWeight):
                self._take(parameter)

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
                if self._ends_consuming(parameter) and parameter.grad is not None:
                    raise RuntimeError(
                        "grad: a hidden weight got a gradient besides the one that its layer consumed, from a penalty "
                        "on it perhaps, which needs fuse_backward=False"
                    )
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("grad: expected a dense gradient, got a sparse one")
                if isinstance(parameter, HiddenWeight):
                    self._update_hidden(parameter, group, functools.partial(_apply_gradient, parameter.grad))
                else:
                    self._state_of(parameter)["step"] += 1
                    others.append(parameter)
            self._update_others(others, group)
        return loss

    def consume(self, weight: HiddenWeight, update: Callable[..., None]) -> None:
        """Applies a gradient during the backward pass that makes it.

        ``update`` takes the arguments of :func:`engram_kernels.ops.metaplastic_adam_` less ``grad``.
        """
        group = next((group for group in self.param_groups if any(weight is p for p in group["params"])), None)
        if group is None:
            raise RuntimeError("fuse_backward: expected a hidden weight that is still in param_groups")
        weight.begin_consuming()
        self._update_hidden(weight, group, update)

    def abandon_step(self) -> None:
        """Begins anew after a ``backward()`` that failed with ``fuse_backward=True``; updates already made stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._ends_consuming(parameter)

    def _ends_consuming(self, parameter: Tensor) -> bool:
        if not isinstance(parameter, HiddenWeight):
            return False
        consumer = parameter.gradient_consumer()
        return consumer is not None and getattr(consumer, "__self__", None) is self and parameter.end_consuming()

    def _take(self, weight: HiddenWeight) -> None:
        """Readies a hidden weight. Its random bits are drawn here, since gradients may come in any order."""
        weight.send_gradient_to(self.consume if self.fuse_backward else None)
        rounds = self.state_dtype != torch.float32 or weight.dtype != torch.float32
        if rounds and "seed" not in self.state[weight]:
            self.state[weight]["seed"] = ops.draw_seed()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy take; torch's own knows of nothing beyond its three attributes."""
        return super().__getstate__() | {"state_dtype": self.state_dtype, "fuse_backward": self.fuse_backward}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores, or takes from the state of another Adam, and readies the hidden weights."""
        super().__setstate__(state)
        self.defaults.setdefault("weight_bound", float("inf"))  # pickled before there was one
        for group in self.param_groups:
            group.setdefault("metaplasticity", self.defaults["metaplasticity"])
            group.setdefault("weight_bound", self.defaults["weight_bound"])
            for parameter in group["params"]:
                if isinstance(parameter, HiddenWeight):
                    self._take(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every state keeps its dtype, which torch would make the parameter's."""
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        states = [state_dict["state"].get(key, {}) for key in saved]
        for parameter, state in zip(parameters, states, strict=False):
            if isinstance(parameter, HiddenWeight) and "exp_avg" in state:
                dtype = state["exp_avg"].dtype
                if dtype != self.state_dtype:
                    raise ValueError(f"state_dict: expected moments in {self.state_dtype} as state_dtype, got {dtype}")
        super().load_state_dict(state_dict)
        for parameter, state in zip(parameters, states, strict=True):
            if isinstance(parameter, HiddenWeight):
                self.state[parameter].update(
                    {
                        name: value.to(_place(name, parameter), copy=True)
                        for name, value in state.items()
                        if isinstance(value, Tensor)
                    }
                )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if "step" in state:
            return state
        state["step"] = torch.zeros(())
        if not isinstance(parameter, HiddenWeight):
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            return state
        n, k = parameter.shape
        state["exp_avg"] = torch.zeros(n, k, dtype=self.state_dtype, device=parameter.device)
        state["exp_avg_sq"] = torch.zeros(n, k, dtype=_SECOND_MOMENT[self.state_dtype], device=parameter.device)
        if self.state_dtype == torch.int8:
            blocks = -(-k // SCALE_BLOCK)
            state["exp_avg_scale"] = torch.zeros(n, blocks, device=parameter.device)
            state["exp_avg_sq_scale"] = torch.zeros(n, blocks, device=parameter.device)
        return state

    def _update_hidden(self, weight: HiddenWeight, group: dict[str, Any], update: Callable[..., None]) -> None:
        state, (beta1, beta2) = self._state_of(weight), group["betas"]
        state["step"] += 1
        step, seed = int(state["step"]), state.get("seed")
        if seed is None and weight.dtype != torch.float32:  # converted since it was taken
            seed = state["seed"] = ops.draw_seed()
        if seed is not None:
            seed[1] = step % 2**32
        weight.updated_in_place(
            lambda sign_bits: update(
                weight,
                state["exp_avg"],
                state["exp_avg_sq"],
                sign_bits,
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                metaplasticity=group["metaplasticity"],
                weight_bound=group["weight_bound"],
                step=step,
                exp_avg_scale=state.get("exp_avg_scale"),
                exp_avg_sq_scale=state.get("exp_avg_sq_scale"),
                seed=seed,
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

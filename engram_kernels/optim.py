"""Optimizers with the metaplastic rule for hidden weights."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adam import adam

from . import ops, shards
from .fused_backward import FusedBackward, LayerGradient, gradient_consumer
from .hidden_weight import HiddenWeight, from_rows, is_hidden_weight, is_sharded, lies_in_rows, row_shape, rows_of
from .library import operators
from .reference import SCALE_BLOCK

_SECOND_MOMENT = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.int8: torch.uint8}
_HASHED_WEIGHTS = 1 << 14  # of a weight, to tell it from others


def _count(value: Any = 0) -> Tensor:
    """A number of steps, whatever it was saved as (older versions kept floats), as the state keeps it: int64 ()."""
    value = value.item() if isinstance(value, Tensor) else value
    if not (0 <= value < 2**63 and value == int(value)):
        raise ValueError(f"state_dict: expected a whole number of at least 0 as step, got {value!r}")
    return torch.tensor(int(value), dtype=torch.int64, device="cpu")


def _seed_of(weight: Tensor, position: int) -> Tensor:
    """A seed as :func:`ops.draw_seed` gives, derived from a weight's first values and its position.

    Data-parallel processes hold the same weights and must round them alike, whatever their generators have drawn.
    """
    rows = weight.detach()[: max(1, _HASHED_WEIGHTS // max(1, row_shape(weight)[1]))]
    if is_sharded(rows):  # the first rows may lie in other processes
        rows = rows.full_tensor()  # type: ignore[attr-defined]
    rows = rows_of(rows)
    values = rows.contiguous().cpu().clone().view(torch.uint8).numpy()  # NumPy marks the memory that it sees as shared
    digest = hashlib.blake2b(values.tobytes(), digest_size=8, salt=position.to_bytes(8, "little")).digest()
    return torch.tensor([int.from_bytes(digest, "little") >> 1, 0], dtype=torch.int64, device="cpu")


def _shard_kind(parameter: Tensor) -> str | None:
    """What sharding has made of a parameter, if that is something that can't be updated."""
    if is_sharded(parameter) and is_hidden_weight(parameter) and not shards.of_whole_rows(parameter):  # type: ignore[arg-type]
        return f"a DTensor of parts of rows, {parameter.placements}"  # type: ignore[attr-defined]
    if getattr(parameter, "_is_flat_param", False):
        return "a flat parameter, as FullyShardedDataParallel (FSDP1) makes it"
    if isinstance(parameter, HiddenWeight) and parameter.dim() not in (2, 4):
        return "a hidden weight that is neither a matrix nor filters, as FullyShardedDataParallel (FSDP1) makes it"
    return None


def _in_one_call(parameter: Tensor, grad: Any) -> bool:
    """Whether the operators of whole steps take a parameter and its gradient: float32 on the CPU, updated in place."""
    values: Any = parameter
    if is_sharded(parameter):
        if is_hidden_weight(parameter):
            return False
        values, grad = shards.local(parameter), shards.local(grad)
    if not (values.dtype == grad.dtype == torch.float32 and values.is_cpu):
        return False
    return lies_in_rows(values) if is_hidden_weight(values) else values.is_contiguous()


def _settings(group: dict[str, Any]) -> tuple[float, ...]:
    """Of a group, in the order in which the operators of whole steps take them."""
    lr = float(group["lr"])
    return (
        lr,
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        group["metaplasticity"],
        group["weight_bound"] if lr > 0 else float("inf"),  # as in _update_hidden
    )


def _apply_gradient(grad: Tensor, weight: Tensor, *state: Tensor, **settings: Any) -> None:
    ops.metaplastic_adam_(weight, rows_of(shards.local(grad)), *state, **settings)  # type: ignore[arg-type]


class MetaplasticAdam(Optimizer):
    """Adam whose steps consolidated hidden weights resist (Laborieux et al. 2021, and their published optimizer).

    For the hidden weights of binary layers, with ``mu``, ``v`` the moments and coupled decay::

        mu' = mu (1 - tanh^2(metaplasticity |W|))   if the step would shrink |W|, else mu
        W  -= lr sqrt(1 - beta2^t) / (1 - beta1^t) * mu' / (sqrt(v) + eps)
        W   = min(max(W, -weight_bound), weight_bound)

    in one pass over memory that also refreshes the packed signs. Every other parameter gets torch's Adam: in float32 on
    the CPU in the same call as the hidden weights, equal to torch's up to the rounding of the last bit, elsewhere by
    torch's own.

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
            each raises an error. That of torch.amp.GradScaler comes from ``scaler.step`` or ``unscale_``, after the
            first ``backward()`` has applied a scaled gradient: a scaled loss looks like any other before. Go back to
            weights and state from before it. Learning rates must be set before ``backward()``. Gradients asked for by
            ``torch.autograd.grad`` are returned as ever and update nothing. A weight belongs to this optimizer until
            another MetaplasticAdam takes it or this one is deleted. After a ``backward()`` that failed half-way,
            :meth:`abandon_step`.

    Hidden weights are float32 or, rounded stochastically, bfloat16. Random bits are counter-based; their key comes from
    a weight's values at its first step and its position in ``params``, and none from torch's generators, so that
    processes that hold the same weights round them alike. A weight that is not contiguous (filters: not channels last)
    is copied, updated and copied back in every step.

    A step whose gradient would make a weight NaN raises and writes no NaN: such weights keep their values and their
    moments (those in 8 bits are coded anew), all others of that hidden weight take the step, which is not counted.
    Hidden weights come first: those before it in ``params`` have been updated, those after it and all other parameters
    have not. With ``fuse_backward=True``, ``backward()`` raises; :meth:`abandon_step` then. On CUDA a later call
    raises, as ever.

    Checkpoints: ``state_dict`` and torch.distributed.checkpoint. Data-parallel training: DistributedDataParallel, with
    ZeroRedundancyOptimizer if wanted, or fully_shard (FSDP2), before which no optimizer is made: a process then updates
    the rows that it has, and from the same gradients all of them together do what one process does, bit for bit. A step
    with ``lr`` 0 changes moments only, not even to keep to ``weight_bound``.

    Raises: ValueError for a setting out of range and for a ``state_dict`` of another ``state_dtype``; RuntimeError for
    a hidden weight in another dtype, for sparse gradients, and if a weight would become NaN; NotImplementedError for
    hidden weights that are shared out otherwise than in whole rows (FullyShardedDataParallel, tensor parallelism), and
    for any DTensor with ``fuse_backward=True``.
    Warns: UserWarning if no parameter is a hidden weight, which makes this torch's Adam, and if in a distributed
    process a step finds no gradient at all, as where FSDP has replaced the parameters.

    >>> layer = ek.BinaryEngramLinear(8, 4)
    >>> optimizer = ek.MetaplasticAdam(layer.parameters(), lr=0.01, metaplasticity=1.35)
    >>> layer(torch.randn(5, 8)).square().mean().backward()
    >>> optimizer.step()
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
        if not any(is_hidden_weight(parameter) for parameter in self._parameters()):
            warnings.warn(
                "params: expected the hidden weights of binary layers among them, got none, so that metaplasticity, "
                "weight_bound, state_dtype and fuse_backward do nothing: every parameter gets torch's Adam",
                stacklevel=2,
            )

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
        try:
            for parameter in self.param_groups[-1]["params"]:
                self._check_updatable(parameter)
        except RuntimeError:
            self.param_groups.pop()
            raise
        self._take(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch._C.DisableTorchFunctionSubclass():  # hidden weights answer slowly, and what is asked here is known
            self._step()
        return loss

    def _step(self) -> None:
        consumed: set[int] = set()
        if self.fuse_backward:
            consumed.update(id(parameter) for parameter in self._parameters() if self._ends_consuming(parameter))
        to_update = []
        for group in self.param_groups:
            hidden: list[Tensor] = []
            others: list[Tensor] = []
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                if consumed and id(parameter) in consumed:
                    raise RuntimeError(
                        "grad: a hidden weight got a gradient besides the one that its layer consumed, from a penalty "
                        f"on it perhaps, which needs fuse_backward=False ({self._place_of(parameter)})"
                    )
                if grad.is_sparse:
                    place = self._place_of(parameter)
                    raise RuntimeError(f"grad: expected a dense gradient, got a sparse one ({place})")
                self._check_updatable(parameter)
                (hidden if is_hidden_weight(parameter) else others).append(parameter)
            to_update.append((group, hidden, others))
        if not consumed and not any(hidden or others for _, hidden, others in to_update):
            self._warn_of_replaced_parameters()
        for group, hidden, others in to_update:  # first, since these may find that gradients are NaN
            # with those of a single group in one call
            self._update_group(hidden, others if len(to_update) == 1 else [], group)
        if len(to_update) > 1:
            for group, _, others in to_update:
                self._update_group([], others, group)

    def _update_group(self, hidden: list[Tensor], others: list[Tensor], group: dict[str, Any]) -> None:
        """Updates parameters of a group, hidden weights first: in one call what :func:`_in_one_call` allows."""
        together = [parameter for parameter in others if _in_one_call(parameter, parameter.grad)]
        if self.state_dtype == torch.float32 and all(_in_one_call(weight, weight.grad) for weight in hidden):
            self._update_list(hidden, together, group)
        else:
            for parameter in hidden:
                assert parameter.grad is not None
                self._update_hidden(parameter, group, functools.partial(_apply_gradient, parameter.grad))
            self._update_list([], together, group)
        if len(together) < len(others):
            kept = set(map(id, together))
            self._update_by_torch([parameter for parameter in others if id(parameter) not in kept], group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. Raises: RuntimeError if a gradient has been consumed since the last step."""
        parameters = list(self._parameters())
        for parameter in parameters:
            if type(parameter) is nn.Parameter:  # which isinstance takes longer to tell
                continue
            if isinstance(parameter, HiddenWeight) and parameter.fused_backward is not None:
                parameter.fused_backward.refuse_access_to_gradient()
        with torch._C.DisableTorchFunctionSubclass():
            if not set_to_none:
                super().zero_grad(set_to_none)
                return
            for parameter in parameters:  # torch's reports to the profiler, which takes longer
                parameter.grad = None

    def consume(self, weight: HiddenWeight, update: Callable[..., None]) -> None:
        """Applies a gradient during the backward pass that makes it.

        ``update`` takes the arguments of :func:`engram_kernels.ops.metaplastic_adam_` less ``grad``.
        """
        group = self._group_of(weight)
        self._check_updatable(weight)
        assert weight.fused_backward is not None
        weight.fused_backward.begin(weight)
        plain = self.state_dtype == torch.float32
        if plain and isinstance(update, LayerGradient) and _in_one_call(weight, update.d):
            self._update_from_layer(weight, group, update)
        else:
            self._update_hidden(weight, group, update)

    def abandon_step(self) -> None:
        """Begins anew after a ``backward()`` that failed with ``fuse_backward=True``; updates already made stay."""
        for parameter in self._parameters():
            self._ends_consuming(parameter)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch.amp.GradScaler asks before it unscales the gradients and calls :meth:`step`."""
        if self.fuse_backward:
            raise RuntimeError(
                "fuse_backward: expected False with torch.amp.GradScaler, got True: backward() has applied the scaled "
                "gradients to the hidden weights; go back to weights and state from before it"
            )
        return False

    def _group_of(self, weight: HiddenWeight) -> dict[str, Any]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter is weight:
                    return group
        raise RuntimeError("fuse_backward: expected a hidden weight that is still in param_groups")

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _place_of(self, parameter: Tensor) -> str:
        """Which parameter it is, for messages."""
        for index, group in enumerate(self.param_groups):
            for own_index, own in enumerate(group["params"]):
                if own is parameter:
                    name = group["param_names"][own_index] if "param_names" in group else f"params[{own_index}]"
                    return f"{name} of shape {tuple(parameter.shape)} in group {index}"
        raise AssertionError("a parameter of this optimizer")

    def _check_updatable(self, parameter: Tensor) -> None:
        """Raises: NotImplementedError for a shard; RuntimeError for a hidden weight whose dtype has no kernel."""
        if type(parameter) is HiddenWeight and parameter.dtype == torch.float32 and parameter.dim() == 2:
            return
        kind = _shard_kind(parameter)
        if kind is not None:
            raise NotImplementedError(
                "params: expected hidden weights in one piece, or in whole rows as fully_shard (FSDP2) shares them "
                f"out, got {kind} ({self._place_of(parameter)})"
            )
        if self.fuse_backward and is_sharded(parameter):
            raise NotImplementedError(
                "fuse_backward: expected False with parameters that fully_shard or tensor parallelism has shared out, "
                f"got True ({self._place_of(parameter)}): gradients are averaged between backward() and the update"
            )
        if is_hidden_weight(parameter) and parameter.dtype not in (torch.float32, torch.bfloat16):
            raise RuntimeError(
                f"weight: expected float32 or bfloat16 with MetaplasticAdam, got {parameter.dtype} "
                f"({self._place_of(parameter)}); any other optimizer takes layers of another dtype"
            )

    def _warn_of_replaced_parameters(self) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and any(parameter.requires_grad for parameter in self._parameters()):
            warnings.warn(
                "step: expected the gradient of at least one parameter, got none; if fully_shard or "
                "FullyShardedDataParallel has replaced the parameters since, nothing is learned: make the optimizer "
                "after fully_shard",
                stacklevel=5,
            )

    def _ends_consuming(self, parameter: Tensor) -> bool:
        if type(parameter) is nn.Parameter:  # which isinstance takes longer to tell
            return False
        if not isinstance(parameter, HiddenWeight) or parameter.fused_backward is None:
            return False
        consumer = gradient_consumer(parameter)
        if getattr(consumer, "__self__", None) is not self:
            return False
        return parameter.fused_backward.end()

    def _take(self, group: dict[str, Any]) -> None:
        """Has the gradients of a group's hidden weights come where ``fuse_backward`` wants them."""
        for parameter in group["params"]:
            if isinstance(parameter, HiddenWeight):
                parameter.fused_backward = FusedBackward(self.consume) if self.fuse_backward else None

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
            self._take(group)
        for parameter in self._parameters():
            own = self.state.get(parameter, {})
            if "step" in own:
                own["step"] = _count(own["step"])
            else:  # older versions kept a seed from the start, at which torch.distributed.checkpoint makes no state
                self.state.pop(parameter, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every state keeps its dtype, which torch would make the parameter's."""
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        states = [state_dict["state"].get(key, {}) for key in saved]
        for parameter, state in zip(parameters, states, strict=False):
            if is_hidden_weight(parameter) and "exp_avg" in state:
                dtype = state["exp_avg"].dtype
                if dtype != self.state_dtype:
                    raise ValueError(f"state_dict: expected moments in {self.state_dtype} as state_dtype, got {dtype}")
        super().load_state_dict(state_dict)
        for parameter, state in zip(parameters, states, strict=True):
            if is_hidden_weight(parameter) and "step" in state:
                for name, value in state.items():
                    if isinstance(value, Tensor) and name != "step":
                        device = torch.device("cpu") if name == "seed" else parameter.device
                        own = value.to(device, copy=True, memory_format=torch.contiguous_format)
                        self.state[parameter][name] = own

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if "step" in state:
            return state
        state["step"] = _count()
        if not is_hidden_weight(parameter):
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            return state

        n, k = row_shape(parameter)

        def zeros(columns: int, dtype: torch.dtype) -> Tensor:
            if is_sharded(parameter):
                return shards.like(parameter, columns, dtype)  # type: ignore[arg-type]
            return torch.zeros(n, columns, dtype=dtype, device=parameter.device)

        state["exp_avg"] = zeros(k, self.state_dtype)
        state["exp_avg_sq"] = zeros(k, _SECOND_MOMENT[self.state_dtype])
        if self.state_dtype == torch.int8:
            for name in ("exp_avg_scale", "exp_avg_sq_scale"):
                state[name] = zeros(-(-k // SCALE_BLOCK), torch.float32)
        return state

    def _update_hidden(self, weight: Tensor, group: dict[str, Any], update: Callable[..., None]) -> None:
        state, (beta1, beta2) = self._state_of(weight), group["betas"]
        step, lr = int(state["step"]) + 1, float(group["lr"])
        if "seed" not in state and (self.state_dtype != torch.float32 or weight.dtype != torch.float32):
            position = next(i for i, parameter in enumerate(self._parameters()) if parameter is weight)
            state["seed"] = _seed_of(weight, position)
        seed = state["seed"].clone() if "seed" in state else None
        if seed is not None:
            seed[1] = step % 2**32

        own = {name: shards.local(value) for name, value in state.items()}

        def apply(sign_bits: Tensor | None, weight: Tensor = weight, **place: int) -> None:
            in_place = lies_in_rows(weight)
            values = rows_of(weight.detach()) if in_place else rows_of(weight.detach()).contiguous()
            try:
                update(
                    values,
                    own["exp_avg"],
                    own["exp_avg_sq"],
                    sign_bits,
                    lr=lr,
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    metaplasticity=group["metaplasticity"],
                    # torch.distributed.checkpoint makes fresh state by a step with lr 0, which may not move weights
                    weight_bound=group["weight_bound"] if lr > 0 else float("inf"),
                    step=step,
                    exp_avg_scale=own.get("exp_avg_scale"),
                    exp_avg_sq_scale=own.get("exp_avg_sq_scale"),
                    seed=seed,
                    **place,
                )
            finally:
                if not in_place:
                    weight.copy_(from_rows(values, weight.shape))

        try:
            if isinstance(weight, HiddenWeight):
                weight.updated_in_place(apply)
            elif (rows := weight.to_local()).numel():  # type: ignore[attr-defined]
                apply(None, rows, first_row=shards.first_row(weight))  # type: ignore[arg-type]
        except RuntimeError as error:
            if weight.is_cuda or type(error) is not RuntimeError:  # CUDA may report another weight's NaN
                raise
            raise RuntimeError(f"{error} ({self._place_of(weight)})") from error
        state["step"] += 1
        if seed is not None:
            state["seed"] = seed

    def _update_from_layer(self, weight: HiddenWeight, group: dict[str, Any], gradient: LayerGradient) -> None:
        """:meth:`_update_hidden` of a weight in float32 on the CPU by one call, which reads and counts the steps."""
        state = self._state_of(weight)
        exp_avg, exp_avg_sq, sign_bits = state["exp_avg"], state["exp_avg_sq"], weight.begin_update()
        try:
            operators._update_from_layer(
                gradient.d,
                gradient.x,
                gradient.gate_bits,
                rows_of(weight),
                exp_avg,
                exp_avg_sq,
                sign_bits,
                state["step"],
                *_settings(group),
            )
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            raise RuntimeError(f"{error} ({self._place_of(weight)})") from error
        torch.autograd.graph.increment_version([weight, exp_avg, exp_avg_sq, sign_bits])
        weight.end_update()

    def _update_list(self, hidden: list[Tensor], others: list[Tensor], group: dict[str, Any]) -> None:
        """Updates parameters of the CPU in float32 by one call."""
        parameters = hidden + others
        if not parameters:
            return
        states = [self._state_of(parameter) for parameter in parameters]
        tensors: list[list[Any]] = [
            [*map(rows_of, hidden), *others],
            [*[rows_of(weight.grad) for weight in hidden], *[other.grad for other in others]],  # type: ignore[arg-type]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
        ]
        if any(map(is_sharded, others)):
            tensors = [[*map(shards.local, own)] for own in tensors]
        weights, grads, exp_avgs, exp_avg_sqs = tensors
        sign_bits = [weight.begin_update() for weight in hidden]  # type: ignore[attr-defined]
        failed = operators._update_all(
            weights,
            grads,
            exp_avgs,
            exp_avg_sqs,
            sign_bits,
            [state["step"] for state in states],
            *_settings(group),
        )
        torch.autograd.graph.increment_version([*weights, *exp_avgs, *exp_avg_sqs, *sign_bits])
        for weight in hidden if failed < 0 else hidden[:failed]:
            weight.end_update()  # type: ignore[attr-defined]
        if failed >= 0:
            for parameter in parameters[failed + 1 :]:
                if self.state[parameter]["step"] == 0:  # made for this step
                    del self.state[parameter]
            raise RuntimeError(
                "grad: expected finite steps, got NaN or infinity; those weights were left as they were "
                f"({self._place_of(parameters[failed])})"
            )

    def _update_by_torch(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if not parameters:
            return
        states = [self._state_of(parameter) for parameter in parameters]
        adam(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"].double() for state in states],  # torch adds the step to floats only
            # neither the fused Adam nor the one of lists, which round otherwise: shards would differ from the whole
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        torch._foreach_add_([state["step"] for state in states], 1)

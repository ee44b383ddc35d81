"""What a user of these networks runs today, written from the publications' sequence of operations.

*published*: the eager code of Laborieux et al. 2021. The hidden weight is kept beside the parameter, which holds its
signs during the forward and backward pass and the hidden weight during the update, a chain of whole-tensor operations.
Left out, since its user would: the second sign of activations that are signs already, the copy of a bias that no layer
has, and tensors of ones.

*compiled*: the same mathematics as an ordinary network: signs by a straight-through function, products by ``F.linear``
and an update that ``torch.compile`` makes one pass of; float32 or bfloat16 autocast, the network eager or compiled too.

All of them hold parameters of the same names, so that one ``state_dict`` starts them alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

# A size of network each: past the limit torch would run the network uncompiled.
torch._dynamo.config.recompile_limit = 64

SETTINGS = dict(lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-7, metaplasticity=1.35)


class SignActivation(torch.autograd.Function):
    """Sign, whose gradient passes where ``|x| <= 1``."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad.masked_fill(x.abs() > 1, 0)


class SignWeight(torch.autograd.Function):
    """Sign, whose gradient passes everywhere."""

    @staticmethod
    def forward(ctx, weight):
        return weight.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


def batch_norm(units: int) -> nn.BatchNorm1d:
    """As published: affine, with the statistics of the batch only."""
    return nn.BatchNorm1d(units, affine=True, track_running_stats=False)


class SimulatedMLP(nn.Module):
    """Binary layers, each followed by batch normalisation, with a sign between them; the first input is real-valued."""

    def __init__(self, sizes: Sequence[int], device: str = "cpu") -> None:
        super().__init__()
        layers = [nn.Linear(k, n, bias=False, device=device) for k, n in pairwise(sizes)]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(batch_norm(n).to(device) for n in sizes[1:])

    def product(self, x: Tensor, weight: nn.Parameter) -> Tensor:
        return F.linear(x, SignWeight.apply(weight))

    def forward(self, x: Tensor) -> Tensor:
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = norm(self.product(x if i == 0 else SignActivation.apply(x), layer.weight))
        return x


# ---- published


class PublishedMLP(SimulatedMLP):
    """The parameter's data are signs while the network runs; ``weight.hidden`` keeps the hidden weight."""

    def product(self, x: Tensor, weight: nn.Parameter) -> Tensor:
        if not hasattr(weight, "hidden"):
            weight.hidden = weight.detach().clone()
        weight.data = weight.hidden.sign()
        return F.linear(x, weight)


class PublishedStep:
    """One training step as published: signs out, hidden weights in, update, hidden weights kept."""

    def __init__(self, sizes: Sequence[int], state_dict: dict[str, Tensor] | None = None, device: str = "cpu") -> None:
        self.model = PublishedMLP(sizes, device)
        if state_dict is not None:
            self.model.load_state_dict(state_dict)
        self.parameters = list(self.model.parameters())
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.steps = 0

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        loss = F.cross_entropy(self.model(x), target)
        loss.backward()
        with torch.no_grad():
            for parameter in self.parameters:
                if hasattr(parameter, "hidden"):
                    parameter.data.copy_(parameter.hidden)
            self._update(**SETTINGS)
            for parameter in self.parameters:
                if hasattr(parameter, "hidden"):
                    parameter.hidden.copy_(parameter.data)
        return loss.detach()

    def _update(self, lr, betas, eps, weight_decay, metaplasticity) -> None:
        self.steps += 1
        beta1, beta2 = betas
        step_size = lr * math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        for parameter, (exp_avg, exp_avg_sq) in zip(self.parameters, self.moments, strict=True):
            weight, grad = parameter.data, parameter.grad
            grad.add_(weight, alpha=weight_decay)
            exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = exp_avg_sq.sqrt().add_(eps)
            if weight.dim() == 1:  # batch normalisation
                weight.addcdiv_(exp_avg, denominator, value=-step_size)
                continue
            shrinks = weight.sign() * exp_avg > 0
            consolidated = (1 - torch.tanh(metaplasticity * weight.abs()).pow(2)) * exp_avg
            weight.addcdiv_(torch.where(shrinks, consolidated, exp_avg), denominator, value=-step_size)


# ---- compiled


@torch.compile(dynamic=True)  # over flat tensors: one compilation serves every layer of every size
def compiled_update(weight, grad, exp_avg, exp_avg_sq, step_size):
    beta1, beta2 = SETTINGS["betas"]
    grad = grad + SETTINGS["weight_decay"] * weight
    exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * grad)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * grad * grad)
    consolidated = (1 - torch.tanh(SETTINGS["metaplasticity"] * weight.abs()) ** 2) * exp_avg
    step_avg = torch.where(weight.sign() * exp_avg > 0, consolidated, exp_avg)
    weight.sub_(step_size * step_avg / (exp_avg_sq.sqrt() + SETTINGS["eps"]))


class CompiledStep:
    """One training step of the float simulation, its update compiled."""

    def __init__(
        self,
        sizes: Sequence[int],
        state_dict: dict[str, Tensor] | None = None,
        device: str = "cpu",
        *,
        bfloat16: bool = False,
        compile_network: bool = False,
    ) -> None:
        self.model = SimulatedMLP(sizes, device)
        if state_dict is not None:
            self.model.load_state_dict(state_dict)
        self.network = torch.compile(self.model) if compile_network else self.model
        self.device, self.bfloat16 = device, bfloat16
        self.hidden = [layer.weight for layer in self.model.layers]
        self.moments = [(torch.zeros_like(w).view(-1), torch.zeros_like(w).view(-1)) for w in self.hidden]
        adam = {name: SETTINGS[name] for name in ("lr", "betas", "eps", "weight_decay")}
        self.optimizer = torch.optim.Adam(self.model.norms.parameters(), **adam)
        # 0-dimensional, since torch.compile would compile anew for every value of a Python number
        self.step_size = torch.zeros((), device=device)
        self.steps = 0

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        self.model.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            loss = F.cross_entropy(self.network(x), target)
        loss.backward()
        self.steps += 1
        beta1, beta2 = SETTINGS["betas"]
        self.step_size.fill_(SETTINGS["lr"] * math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps))
        with torch.no_grad():
            for weight, (exp_avg, exp_avg_sq) in zip(self.hidden, self.moments, strict=True):
                compiled_update(weight.view(-1), weight.grad.view(-1), exp_avg, exp_avg_sq, self.step_size)
        self.optimizer.step()
        return loss.detach()

"""The whole training step: forward, backward and update of 784-H-H-10 at batch 100, on two threads."""

import functools

import pytest
import torch
from baselines import SETTINGS
from steps import (
    BATCH,
    COMPACT,
    CONFIGURATIONS,
    EXACT,
    INPUTS,
    WAYS,
    batch,
    fastest_way,
    initial_state,
    make_step,
    sizes_of,
)

AGREEMENT_STEPS = 20
# Products of signs are exact in all of them, and rounding is all that differs, as long as it flips no sign: hence a
# small learning rate. Metaplasticity and decay are large for their effect to be seen.
AGREEMENT_SETTINGS = dict(lr=1e-4, metaplasticity=30.0, weight_decay=1e-3)
# Relative, of the loss. bfloat16 rounds the sums of signs themselves.
AGREEMENT_TOLERANCE = {name: 0.3 if "bf16" in name else 1e-4 for name in (*EXACT, *WAYS)}


@pytest.fixture(scope="module")
def same_losses():
    """Before anything is timed: ours, published and compiled compute the same from the same weights.

    Biases of the normalisation start off 0, since sums of signs do meet their mean, and then sign(0) would differ: 0 in
    the baselines, +1 in ours. Each class has its own mean image, so that there is something to learn.
    """
    torch.manual_seed(0)
    sizes, state = sizes_of(512), initial_state(sizes_of(512), bias_range=0.1)
    targets = torch.randint(10, (AGREEMENT_STEPS, BATCH))
    images = torch.randn(AGREEMENT_STEPS, BATCH, INPUTS) + 2 * torch.randn(10, INPUTS)[targets]

    def losses(name):
        step = make_step(name, sizes, state)
        return torch.stack([step(*pair) for pair in zip(images, targets, strict=True)])

    with pytest.MonkeyPatch.context() as patch:
        for name, value in AGREEMENT_SETTINGS.items():
            patch.setitem(SETTINGS, name, value)
        expected = losses("published")
        assert expected[-1] < 0.5 * expected[0], f"published: expected the loss to halve, got {expected.tolist()}"
        for name, tolerance in AGREEMENT_TOLERANCE.items():
            worst = ((losses(name) - expected) / expected).abs().max().item()
            assert worst <= tolerance, f"{name}: losses differ from published by {worst:.1e}, more than {tolerance:.0e}"
    torch.compiler.reset()  # settings that have changed once would be variables of the compiled update from now on


@functools.lru_cache(maxsize=1)  # of one size at a time
def baselines(hidden, device):
    """*published* and the fastest *compiled*, shared by all configurations of a size."""
    way = fastest_way(hidden, device)
    state = initial_state(sizes_of(hidden), device)
    steps = {name: make_step(name, sizes_of(hidden), state, device) for name in ("published", way)}
    calls = {name: functools.partial(step, *batch(device)) for name, step in steps.items()}
    for call in calls.values():
        call()  # compiles, which a warm-up would take for slowness
    return calls


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("hidden", [2048, 4096])
def test_training_step(same_losses, side_by_side, target, two_threads, hidden, name):
    sizes = sizes_of(hidden)
    step = make_step(name, sizes, initial_state(sizes, target.device), target.device)
    what = f"step H={hidden}, {name}" + (f", engram rate {CONFIGURATIONS[name]['rate']}" if name in COMPACT else "")
    side_by_side(
        what,
        target,
        functools.partial(step, *batch(target.device)),
        baselines(hidden, target.device),
        rounds=5,
        peak=False,  # of the whole training: test_memory.py
    )

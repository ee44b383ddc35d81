"""Synaptic intelligence: the path integral, computed again by hand."""

import torch
from full_precision import double, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.continual.methods import PenaltyConfig
from engram_kernels.continual.methods.si import SI_DAMPING, SynapticIntelligence


@given(strength=st.floats(0, 5), seed=seeds)
@settings(deadline=None, max_examples=20)
def test_omega_is_the_path_integral_of_the_task_loss(strength, seed):
    """Three experiences, each a quadratic with a minimum of its own; everything computed again by hand."""
    torch.manual_seed(seed)
    method = double(SynapticIntelligence.build(PenaltyConfig(lr=0.1, strength=strength), 2, [2], 2), lr=0.05)
    parameters = list(method.model.parameters())
    theta = torch.cat([p.detach().flatten() for p in parameters]).clone()
    anchor, omega, held = theta.clone(), torch.zeros_like(theta), False
    for _ in range(3):
        curvature, minimum = torch.rand_like(theta) + 0.5, torch.randn_like(theta)

        def loss(x, y, curvature=curvature, minimum=minimum):
            now = torch.cat([p.flatten() for p in parameters])
            return 0.5 * (curvature * (now - minimum) ** 2).sum(), x

        method.loss = loss
        path, first = torch.zeros_like(theta), 0.5 * curvature * (theta - minimum) ** 2
        for _ in range(40):
            method.observe(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
            gradient = curvature * (theta - minimum)
            step = -0.05 * (gradient + 2.0 * strength * omega * (theta - anchor))
            path -= gradient * step
            theta = theta + step
        if not held:  # without a penalty the path is, up to the size of a step, by how much the loss fell
            fell = first - 0.5 * curvature * (theta - minimum) ** 2
            torch.testing.assert_close(path, fell, rtol=0.1, atol=1e-12)
        method.after_training_exp(None)
        omega = (omega + path / ((theta - anchor) ** 2 + SI_DAMPING)).clamp(min=0.0)
        anchor, held = theta.clone(), True
        for found, expected in ((method.importance, omega), (method.anchors, anchor), (parameters, theta)):
            torch.testing.assert_close(torch.cat([f.detach().flatten() for f in found]), expected)
        assert all((path == 0).all() for path in method.path)

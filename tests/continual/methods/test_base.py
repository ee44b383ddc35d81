"""The losses that methods share are what they say."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.continual.methods.base import batch_cross_entropy


@given(st.integers(1, 20), st.integers(2, 12), st.integers(0, 2**31))
@settings(deadline=None)
def test_batch_loss_is_cross_entropy_over_the_classes_of_the_batch(samples, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(classes, (samples,), generator=generator)
    loss = batch_cross_entropy(logits, y)
    present, index = y.unique(return_inverse=True)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, present], index))
    (gradient,) = torch.autograd.grad(loss, logits)
    absent = torch.ones(classes, dtype=torch.bool).index_fill_(0, present, False)
    assert (gradient[:, absent] == 0).all()
    assert torch.isfinite(gradient).all()

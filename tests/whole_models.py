"""Trains a whole model and its fused twin side by side."""

import copy

import torch

from cbam_fused import fuse


def train(model, x, loss_of, steps=10):
    """Loss before each of `steps` steps of SGD, and after the last."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    losses = []
    model.train()
    for i in range(steps + 1):
        loss = loss_of(model, x)
        losses.append(loss.item())
        if i < steps:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return losses


def assert_trains_alike(model, x, loss_of, count):
    """One model and its fused twin, in float64, where what differs is not rounding that training amplifies."""
    expected = copy.deepcopy(model)
    report = fuse(model)
    assert len(report.swapped) == count, str(report)
    assert not report.left, str(report)
    for m in (model, expected):
        m.eval()
    with torch.no_grad():
        a, b = model(x), expected(x)
    for u, v in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (a, b))):
        if isinstance(u, torch.Tensor):
            assert (u - v).abs().max() <= 1e-10 * v.abs().max()
    losses, wanted = train(model, x, loss_of), train(expected, x, loss_of)
    assert losses[-1] != losses[0]
    # Ten steps amplify a difference of 1e-15 some thousandfold; a wrong gradient shows in the second loss.
    assert all(abs(p - q) <= 1e-8 * abs(q) for p, q in zip(losses, wanted)), (losses, wanted)

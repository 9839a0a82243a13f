"""Trains a whole model and its fused twin side by side; and a CBAM in no known dialect."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

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
    for m in (model, expected):
        m.train()
        loss_of(m, x).backward()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).abs().max() <= 1e-8 * q.grad.abs().max() + 1e-12, name
    losses, wanted = train(model, x, loss_of), train(expected, x, loss_of)
    assert losses[-1] != losses[0]
    # Ten steps amplify a difference of 1e-15 some thousandfold.
    assert all(abs(p - q) <= 1e-8 * abs(q) for p, q in zip(losses, wanted)), (losses, wanted)


class Renamed(nn.Module):
    """A CBAM whose names no dialect has."""

    def __init__(
        self, channels=24, act=nn.ReLU, gate=torch.sigmoid, residual=False, reverse=False, split=False
    ):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, 6, 1)
        self.act = act()
        self.excite = nn.Conv2d(6, channels, 1)
        self.where = nn.Conv2d(2, 1, 5, padding=2)
        self.gate, self.residual, self.reverse, self.split = gate, residual, reverse, split

    def forward(self, x):
        top = x.amax((2, 3), keepdim=True) if self.split else F.adaptive_max_pool2d(x, 1)
        pools = [x.mean((2, 3), keepdim=True), top]
        y = x * self.gate(sum(self.excite(self.act(self.squeeze(p))) for p in pools))
        q = [y.amax(1, keepdim=True) if self.split else y.max(1, keepdim=True)[0], y.mean(1, keepdim=True)]
        y = y * torch.sigmoid(self.where(torch.cat(q[::-1] if self.reverse else q, 1)))
        return y + x if self.residual else y

"""First and second derivatives in fp64 against finite differences, over the option grid."""

import pytest
import torch
from oracle import OPTIONS, Options, leaves, make_problem
from torch.autograd import gradcheck, gradgradcheck

from cbam_fused import FusedCBAM, _ops
from cbam_fused._config import Parameters
from cbam_fused.functional import run

SMALL = {name: options for name, options in OPTIONS.items() if options.kernel <= 7}


def _function(options: Options, shape, target, layout="contiguous"):
    """f and its inputs: x, the parameters, and the norm's weight and bias."""
    problem = make_problem(shape, options, torch.float64, target.device, layout)
    x, p, norm = leaves(problem)
    present = [i for i, t in enumerate(p) if t is not None]
    affine = [] if norm is None else [norm.weight, norm.bias]

    def f(x, *rest):
        weights = [None] * 6
        for i, t in zip(present, rest):
            weights[i] = t
        called = norm
        if norm is not None:
            # The norm as a module, so that the path of a module is taken, but with the given tensors.
            called = type(norm)(1).to(norm.weight).train(norm.training)
            called.running_mean.copy_(norm.running_mean)
            called.running_var.copy_(norm.running_var)
            for name, t in zip(("weight", "bias"), rest[len(present) :]):
                delattr(called, name)
                setattr(called, name, t)
        return run(x, Parameters(*weights), problem.c, called, target.backend)

    return f, (x, *(p[i] for i in present), *(t.detach().requires_grad_() for t in affine))


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL.keys())
def test_gradcheck(target, options):
    for shape, layout in (((2, 3, 3, 4), "contiguous"), ((1, 4, 5), "channels_last")):
        f, inputs = _function(options, shape, target, layout)
        assert gradcheck(f, inputs, fast_mode=False, nondet_tol=0.0)


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL.keys())
def test_gradgradcheck(target, options):
    f, inputs = _function(options, (2, 3, 2, 3), target)
    assert gradgradcheck(f, inputs, fast_mode=True, nondet_tol=0.0, atol=1e-4)
    # Of the first gradients as that path has them, which are not those of a plain backward.
    once, twice = (
        torch.autograd.grad(f(*inputs).square().sum(), inputs, create_graph=create)
        for create in (False, True)
    )
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["plain", "norm-train", "norm-eval", "residual-norm-train", "spatial-only"])
def test_gradgradcheck_in_full(target, name):
    f, inputs = _function(OPTIONS[name], (2, 2, 2, 2), target)
    assert gradgradcheck(f, inputs)


def _penalised_gradients(module, x, backend):
    """Gradients of y.sum() + |dy/dx|^2, as in WGAN-GP."""
    module.channel_gate.backend = module.backend = backend
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x).square()
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (y.sum() + dx.square().sum()).backward()
    return [x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_gradient_penalty(target, training, residual):
    module = FusedCBAM(8, 2, residual=residual, dtype=torch.float64, device=target.device).train(training)
    x = torch.randn(3, 8, 5, 6, dtype=torch.float64, device=target.device)
    want = _penalised_gradients(module, x, "reference")
    for a, b in zip(_penalised_gradients(module, x, target.backend), want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["plain", "norm-train", "norm-eval"])
def test_double_backward_where_only_some_inputs_want_gradients(target, name):
    """A frozen backbone (x wants none) and a frozen module (only x does)."""
    f, inputs = _function(OPTIONS[name], (2, 3, 3, 2), target)
    for wanted in (slice(0, 1), slice(1, None), slice(2, 3)):
        chosen = [t.detach() for t in inputs]
        for t in chosen[wanted]:
            t.requires_grad_()
        assert gradcheck(f, chosen)
        assert gradgradcheck(f, chosen, fast_mode=True, atol=1e-4)


def test_double_backward_in_low_precision_stays_finite(target):
    x = torch.randn(2, 8, 7, 7, device=target.device, dtype=torch.bfloat16, requires_grad=True)
    module = FusedCBAM(8, 2, backend=target.backend, device=target.device)
    (dx,) = torch.autograd.grad(module(x).float().square().sum(), x, create_graph=True)
    dx.float().square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_every_op_namespace_is_defined():
    for backend in _ops.BACKENDS:
        for op in _ops.SCHEMAS:
            assert _ops.get(backend, op)._schema.name == f"cbam_fused_{backend}::{op}"

"""torch.func's transforms and forward-mode AD: `auto` computes them, a backend by name says why it cannot."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from cbam_fused import FusedCBAM

X = (2, 6, 5, 4)
# None of them sets the batch's statistics, which the transforms themselves forbid.
FORMS = {
    "plain": {"spatial_norm": False},
    "channel-only": {"spatial": False},
    "pools": {"spatial_norm": False, "pool_types": ("avg", "max", "lp", "lse"), "residual": True},
    "split": {"spatial_norm": False, "ties": "split"},
    "parallel": {"spatial_norm": False, "arrangement": "parallel"},
}


def pair(form, device):
    """One block under "auto", and its twin on the reference, in float64."""
    twins = [
        FusedCBAM(6, 2, 3, dtype=torch.float64, device=device, backend=b, **FORMS[form])
        for b in ("auto", "reference")
    ]
    twins[1].load_state_dict(twins[0].state_dict())
    return twins


def draw(device, *shape):
    return torch.randn(shape or X, dtype=torch.float64, device=device)


def loss(module):
    return lambda x: module(x).square().sum()


@pytest.mark.parametrize("form", FORMS)
def test_grad(form, device):
    module, plain = pair(form, device)
    x = draw(device)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(plain)(leaf), leaf)
    torch.testing.assert_close(grad(loss(module))(x), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_vmap(form, device):
    module, plain = pair(form, device)
    x = draw(device, 3, *X)
    torch.testing.assert_close(vmap(module)(x), torch.stack([plain(part) for part in x]))


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_reverse_agree(form, device):
    """<u, J t> is the same by jvp, by vjp and by forward-mode AD, and is the slope that a step along t shows."""
    module, _ = pair(form, device)
    x, t, u = draw(device), draw(device), draw(device)
    y, forward = jvp(module, (x,), (t,))
    (backward,) = vjp(module, x)[1](u)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(module(forward_ad.make_dual(x, t)))
    torch.testing.assert_close(y, module(x))
    torch.testing.assert_close((u * forward).sum(), (backward * t).sum())
    torch.testing.assert_close(dual.tangent, forward)
    step = 1e-7
    slope = ((module(x + step * t) - module(x - step * t)) / (2 * step) * u).sum()
    torch.testing.assert_close(slope, (u * forward).sum(), rtol=1e-5, atol=1e-5)


def test_jacobians_and_hessian(device):
    module, plain = pair("plain", device)
    x = draw(device, 1, 6, 2, 2)
    torch.testing.assert_close(jacfwd(module)(x), jacrev(module)(x))
    wanted = torch.autograd.functional.hessian(loss(plain), x)
    torch.testing.assert_close(hessian(loss(module))(x), wanted)


def test_gradients_sample_by_sample(device):
    module, plain = pair("plain", device)
    x = draw(device)

    def one(parameters, sample):
        return functional_call(module, parameters, (sample[None],)).square().sum()

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    found = vmap(grad(one), (None, 0))(parameters, x)
    for n, sample in enumerate(x):
        wanted = torch.autograd.grad(loss(plain)(sample[None]), list(plain.parameters()))
        for name, g in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(found[name][n], g)


@pytest.mark.parametrize("way", ["torch.func", "forward"])
def test_a_backend_by_name_says_why(fused, way):
    module = FusedCBAM(6, 2, 3, spatial_norm=False, backend=fused.backend, device=fused.device)
    x = torch.randn(X, device=fused.device)
    who = "the transforms of torch.func have" if way == "torch.func" else "forward-mode AD has"
    with pytest.raises(RuntimeError) as error:
        if way == "torch.func":
            grad(loss(module))(x)
        else:
            with forward_ad.dual_level():
                module(forward_ad.make_dual(x, x))
    assert str(error.value) == (
        f'backend="{fused.backend}" cannot run: {who} rules for plain PyTorch operations alone; use "auto" or "reference"'
    )


def test_a_transform_around_a_compiled_block(device):
    module, plain = pair("plain", device)
    x = draw(device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: grad(loss(module))(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), grad(loss(plain))(x))

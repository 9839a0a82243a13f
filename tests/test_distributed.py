"""Two processes that train one network: DistributedDataParallel and fully_shard, on the CPU over gloo."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn as nn

from cbam_fused import FusedCBAM

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

SAMPLES, WORLD, STEPS = 4, 2, 3


def _network(norm):
    torch.manual_seed(0)
    # In eval the norm is folded into the kernels, and its scale and shift still learn.
    block = FusedCBAM(16, 4, spatial_norm=norm).eval()
    return nn.Sequential(nn.Conv2d(3, 16, 3), block, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 6 * 6, 3))


def _steps(network, x):
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


def _train(rank, store, way, norm):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    x = torch.randn(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network, alone = _network(norm), _network(norm)
    if way == "replicated":
        wrapped = nn.parallel.DistributedDataParallel(network)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        fully_shard(network[1], mesh=mesh)
        wrapped = fully_shard(network, mesh=mesh)
    before = [p.detach().clone() for p in alone.parameters()]
    share = SAMPLES // WORLD
    _steps(wrapped, x[rank * share : (rank + 1) * share])
    _steps(alone, x)
    for p, q, start in zip(network.parameters(), alone.parameters(), before, strict=True):
        p = p.detach().full_tensor() if way == "sharded" else p.detach()
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(q.detach(), start)
    dist.destroy_process_group()


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_two_processes_train_as_one(way, norm, tmp_path):
    """Each has half of the batch; after a few steps the weights are those of one process that had all of it."""
    multiprocessing.spawn(_train, (str(tmp_path / "store"), way, norm), nprocs=WORLD)

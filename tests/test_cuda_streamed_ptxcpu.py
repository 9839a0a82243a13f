"""The streamed tier's compiled PTX, forward and backward, run on the CPU by ptxcpu, an optional sibling directory."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import cuda_ptx
import numpy as np
import pytest
import torch

if cuda_ptx.unavailable() is not None:
    pytest.skip(str(cuda_ptx.unavailable()), allow_module_level=True)
if shutil.which("g++") is None:
    pytest.skip("there is no g++ to compile the translated kernels with", allow_module_level=True)

import cuda_streamed as cs  # noqa: E402
from oracle import Options, check, make_problem, run_problem  # noqa: E402

# The instantiation of most tests: vectors of 8 in rows.
DTYPE = torch.bfloat16
TRAITS = "cbam::BFloat16, 8, cbam::kContiguous, cbam::kWhole"
# An element, of PTX, whatever a thread's mask is; a tenth above what (64, 28, 28) takes, where a quarter of the lanes
# is beside the map and the convolution's share is large.
INSTRUCTIONS = {"cbam_forward": 84, "cbam_backward": 122}


@pytest.fixture(scope="module", autouse=True)
def translated() -> None:
    """Both translations at once, each in a compiler of its own."""

    def translate(direction: str) -> None:
        kernel = cuda_ptx.STREAMED.format(direction, TRAITS)
        module = cuda_ptx._module(f"streamed_{direction}.cuh", kernel)
        module.compile(*module.mod.funcs)

    with ThreadPoolExecutor() as pool:
        list(pool.map(translate, ("forward", "backward")))


class Watched(cuda_ptx.PtxMachine):
    """Few multiprocessors, so that a block draws many items; notes the launches of each op.

    By itself ptxcpu raises for an access that is out of bounds or not aligned, for warps that race for shared
    memory and for barriers that not all reach; what was never written reads as NaN.
    """

    def __init__(self, **options):
        super().__init__(**{"multiprocessors": 3, "l2": 1 << 15, "shared": 99 << 10, **options})

    def execute(self, call, arrays) -> None:
        super().execute(call, arrays)
        assert self.result.race_exact and not self.result.races, self.result.race_lines


def test_outputs_and_every_gradient(monkeypatch):
    """Within the budget of the specification, whatever the order of blocks and warps, twice on the same counters."""
    problem = make_problem(
        (4, 16, 8, 15), Options(norm="eval", residual=True, conv_bias=True), DTYPE, wide=True
    )
    results = []
    for seed in (1, 2):
        ops = cs.HostOps(Watched(seed=seed, launches=2)).installed(monkeypatch)
        results.append(run_problem(problem, "cuda"))
        for report in ops.reports.values():
            assert report["vector"] == 8 and report["fold"] == 1 and report["units"] > 1
    assert all(torch.equal(a, b) for a, b in zip(*results))
    check(problem, "cuda")


def test_chained_samples(monkeypatch):
    """A block takes a sample through the whole backward, and keeps scratch in shared memory."""
    problem = make_problem((4, 16, 8, 8), Options(norm="eval", residual=True), DTYPE, wide=True)
    results = []
    for seed in (1, 2):
        ops = cs.HostOps(Watched(seed=seed, launches=2)).installed(monkeypatch)
        results.append(run_problem(problem, "cuda"))
        assert ops.reports["cbam_backward"]["chained"]
    assert all(torch.equal(a, b) for a, b in zip(*results))
    check(problem, "cuda")


EVERYTHING = Options(
    pools=("avg", "max", "lp", "lse"), ties="split", norm="eval", residual=True, conv_bias=True
)
# What each of the other instantiations is, the vector, how many channels a row of vectors has and whether rows end
# within vectors.
OTHERS = {
    "channels-last": ((3, 16, 7, 9), torch.float16, "channels_last", EVERYTHING, (8, 1, 0)),
    "ragged": ((3, 6, 13, 57), torch.float32, "contiguous", EVERYTHING, (4, 1, 1)),
    "folded": ((3, 40, 7, 7), torch.bfloat16, "contiguous", Options(residual=True), (8, 8, 0)),
    "by element": ((3, 5, 6, 11), torch.float64, "channels_last", Options(norm="eval"), (1, 1, 0)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_instantiations(monkeypatch, name):
    """Rows of all kinds, other dtypes and layouts, and the rarer options, in compiled PTX."""
    shape, dtype, layout, options, (vector, fold, ragged) = OTHERS[name]
    problem = make_problem(shape, options, dtype, layout=layout)
    results = []
    for seed in (1, 2):
        ops = cs.HostOps(Watched(seed=seed, launches=2)).installed(monkeypatch)
        results.append(run_problem(problem, "cuda"))
        for report in ops.reports.values():
            assert (report["vector"], report["fold"], report["ragged"]) == (vector, fold, ragged)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    check(problem, "cuda")


def test_a_store_beyond_an_output_is_reported():
    """That the checks are on: y is eight elements too short."""

    class Short(Watched):
        def execute(self, call, arrays) -> None:
            y = arrays[cs.ORDER.index("y")]
            y.data = y.data.reshape(-1)[:-8].copy()
            super().execute(call, arrays)

    problem = make_problem((4, 16, 8, 15), Options(norm="eval"), DTYPE)
    with pytest.raises(
        cuda_ptx._ptxcpu().KernelError, match="invalid global store of 16 bytes .* from start of buffer"
    ):
        cs.cbam_forward(problem.x, problem.p, problem.c, machine=Short())


SMALL_SHARE = 3 << 19  # an H100's of L2 for each of four multiprocessors


# A plan leaves half of L2 free, of which small tensors, an eighth of x here, take a part.
@pytest.mark.parametrize(
    "samples, l2, modelled",
    ((40, 3 << 20, 3 << 20), (20, SMALL_SHARE, SMALL_SHARE), (20, SMALL_SHARE, SMALL_SHARE * 5 // 8)),
    ids=("much L2", "less L2", "less than is planned for"),
)
def test_dram_and_bank_conflicts(samples, l2, modelled):
    """A batch larger than L2, by the bars of benchmarks/cuda_bytes.py; weights and saved small tensors apart.

    The loops over x read shared memory without conflicts; what an item sets up and sums at its end does not
    always, and must stay the smaller part.
    """
    problem = make_problem((samples, 64, 28, 28), Options(hidden=4), DTYPE)
    x, machine = problem.x, Watched(multiprocessors=4, l2=l2, modelled_l2=modelled)
    size = x.numel() * x.element_size()
    assert size > machine.l2
    saved = cs.cbam_forward(x, problem.p, problem.c, machine=machine)
    small = sum(t.numel() * t.element_size() for name, t in saved.items() if name != "y")
    assert machine.dram_bytes - small <= 1.05 * 2 * size
    cs.cbam_backward(problem.dy, x, problem.p, problem.c, saved, machine=machine)
    assert machine.dram_bytes - small <= 1.08 * 3 * size
    for op, limit in INSTRUCTIONS.items():
        assert machine.instructions(op) <= limit * x.numel(), op
    for result in machine.log:
        for kind in ("ld", "st"):
            assert result.stats[f"sh_{kind}_wf"] <= 2 * result.stats[f"sh_{kind}_ideal"], kind


def test_a_norm_in_training_finds_in_l2_what_its_first_half_left():
    """x read twice and y written forward, and x, dy and dx backward: 3 S and 5 S, less what L2 keeps from the first
    operation to the second, which goes through the samples the other way."""
    problem = make_problem((20, 64, 28, 28), Options(hidden=4), DTYPE)
    x, p, machine = problem.x, problem.p, Watched(multiprocessors=4, l2=SMALL_SHARE, keep=True)
    size = x.numel() * x.element_size()
    assert machine.l2 < size < 1.5 * machine.l2

    def moved(*operations):
        return sum(machine.dram(op) - machine.small_bytes[op] for op in operations) / size

    out = cs.attention_forward(x, p, problem.c, machine)
    scaled = cs.scale_forward(x, out["channel_gate"], out["z"], False, machine)
    back = cs.scale_backward(problem.dy, x, out["channel_gate"], scaled["spatial_gate"], machine)
    gradients = back["dz_out"], back["dchannel_gate"]
    cs.attention_backward(
        problem.dy, x, p, problem.c, out, scaled["spatial_gate"], *gradients, machine=machine
    )
    assert moved("attention_forward", "scale_forward") < 2.5
    assert moved("scale_backward", "attention_backward") < 4.5


def test_the_modelled_caches_know_which_lines_go_first(tmp_path):
    """That they honor evict-first, on which the figures rest: what streams through with it leaves the rest in L2."""
    source = tmp_path / "stream.cu"
    source.write_text(
        """extern "C" __global__ void stream(const float* kept, const float* passing, float* out, int n) {
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += __ldcg(kept + i);
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * n; i += blockDim.x) {
    sum += LOAD(passing + i);
    STORE(out + i, sum);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += __ldcg(kept + i);
  out[threadIdx.x] = sum;
}"""
    )
    ptxcpu, compiled = cuda_ptx._ptxcpu(), str(tmp_path / "stream.ptx")
    n = 1 << 12  # 16 KiB that are kept, and 256 KiB each of what passes through an L2 of 64 KiB
    dram = {}
    for load, store in (
        ("__ldcg", "__stcg"),
        ("__ldcs", "__stcg"),
        ("__ldcg", "__stcs"),
        ("__ldcs", "__stcs"),
    ):
        flags = [f"-arch={cuda_ptx.TARGET}", f"-DLOAD={load}", f"-DSTORE={store}"]
        subprocess.run([cuda_ptx.nvcc(), *flags, "-ptx", str(source), "-o", compiled], check=True)
        module = ptxcpu.PtxModule(compiled)
        out = ptxcpu.dempty((16 * n,), np.float32)
        kept, passing = ptxcpu.dempty((n,), np.float32, 0), ptxcpu.dempty((16 * n,), np.float32, 0)
        arguments = [kept, passing, out, np.int32(n)]
        r = module.launch("stream", grid=(1,), block=(256,), args=arguments, l2=64 << 10, nsm=1)
        dram[load, store] = r.stats["dram_read_bytes"] // (4 * n)
    assert dram == {
        ("__ldcg", "__stcg"): 18, ("__ldcs", "__stcg"): 18, ("__ldcg", "__stcs"): 18, ("__ldcs", "__stcs"): 17,
    }  # fmt: skip

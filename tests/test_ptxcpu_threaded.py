"""Threaded code does what ptxcpu's own C++ does, and counts the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import cuda_ptx
import numpy as np
import ptxcpu_runtime
import ptxcpu_threaded
import pytest

if cuda_ptx.unavailable() is not None:
    pytest.skip(str(cuda_ptx.unavailable()), allow_module_level=True)
if shutil.which("g++") is None:
    pytest.skip("there is no g++", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import cuda_instructions  # noqa: E402

# Loops whose lanes part, predicated steps, barriers, shuffles, votes, atomics, shared and local memory, vectors of
# four, constants of every type, negative offsets, and conversions to and from half and double precision.
KERNEL = r"""
#include <cuda_fp16.h>
extern "C" __global__ void mixture(const float4* x, double* sums, int* counts, __half* halves, int n, int which) {
  __shared__ float row[256];
  __shared__ int ticket;
  float own[4] = {0.5f, -1.25f, 3e-7f, 0.f};
  int t = threadIdx.x, votes = 0;
  if (t == 0) ticket = atomicAdd(counts, 1);
  double sum = -0.1;
  for (int i = blockIdx.x * blockDim.x + t; i < n; i += gridDim.x * blockDim.x) {
    float4 v = x[i];
    own[(i + which) & 3] += v.x * 0.3f - v.w;
    for (int k = 0; k < (t & 7); k++) sum += sqrt(fabs((double)v.y)) / (k + 1.5);
    votes += __popc(__ballot_sync(~0u, v.z > 0.f));
    row[t] = v.z;
    __syncthreads();
    sum += row[t ? t - 1 : 255] * 2.0;
    halves[i] = __float2half(v.x + __half2float(__ushort_as_half(0x3c01)));
    __syncthreads();
  }
  float all = own[which & 3] + own[(which + 1) & 3];
  for (int step = 16; step; step >>= 1) all += __shfl_xor_sync(~0u, all, step);
  if ((t & 31) == 5) atomicAdd(counts + 1 + (t >> 5), votes - 3);
  long long wide = (long long)t * 5000000011ll - 7;
  sums[blockIdx.x * 256 + t] = sum + all + (double)(wide % 1013) + ticket * 0;
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("threaded")
    (folder / "mixture.cu").write_text(KERNEL)
    command = [
        cuda_ptx.nvcc(),
        "-ptx",
        "-lineinfo",
        f"-arch={cuda_ptx.TARGET}",
        "-o",
        "mixture.ptx",
        "mixture.cu",
    ]
    subprocess.run(command, check=True, cwd=folder)
    return str(folder / "mixture.ptx")


def _run(ptxcpu, compiled: str, n: int, n_buffer: int):
    module = ptxcpu.PtxModule(compiled, opt="-O1")
    x = ptxcpu.dempty((n_buffer, 4), np.float32)
    x[...] = np.random.default_rng(0).standard_normal(x.shape)
    sums, counts = ptxcpu.dempty((4 * 256,), np.float64), ptxcpu.dempty((9,), np.int32, 0)
    halves = ptxcpu.dempty((n,), np.float16)
    arguments = [x, sums, counts, halves, np.int32(n), np.int32(2)]
    # all blocks at a time, in an order of the seed's
    result = module.launch(
        "mixture", grid=(4,), block=(256,), args=arguments, coop=True, maxres=4, seed=3, nsm=2, l2=1 << 14
    )
    return module, result.stats, (sums, counts, halves)


def test_the_same_results_and_the_same_counts(compiled):
    n = 4096
    module, stats, outputs = _run(ptxcpu_runtime.load("plain", ()), compiled, n, n)
    plain = ptxcpu_runtime.load("as_it_comes", (), as_threaded_code=False)
    plain_module, plain_stats, plain_outputs = _run(plain, compiled, n, n)
    for a, b in zip(outputs, plain_outputs):
        np.testing.assert_array_equal(a, b)
    assert stats == plain_stats and stats["ld_bytes"] == 16 * n
    source, plain_source = (m.compile("mixture")[0].src for m in (module, plain_module))
    assert "OPERANDS" in source and "OPERANDS" not in plain_source


def test_the_same_report_of_a_bad_access(compiled):
    reports = []
    for ptxcpu in (
        ptxcpu_runtime.load("plain", ()),
        ptxcpu_runtime.load("as_it_comes", (), as_threaded_code=False),
    ):
        with pytest.raises(ptxcpu.KernelError, match="invalid global load of 16 bytes at PTX line") as caught:
            _run(ptxcpu, compiled, 4096, 4000)
        # all but the address, which is another one in each run
        reports.append(str(caught.value).split("address")[0])
    assert reports[0] == reports[1]


def test_instructions_are_counted_by_line_of_source(compiled):
    """What benchmarks/cuda_instructions.py prints: 32 warps that go through 4 strides of 1024 elements each."""
    module, _, _ = _run(ptxcpu_runtime.load("counting", (), counting=True), compiled, 4096, 4096)
    opcodes, by_line = cuda_instructions.counted(module)

    def ran(text: str) -> dict:
        (number,) = (i for i, line in enumerate(KERNEL.split("\n"), 1) if text in line)
        return by_line[(f"mixture.cu:{number}",)]

    assert ran("sums[blockIdx.x")["st.global.f64"] == 32
    assert ran("float4 v = x[i]")["ld.global.v4.f32"] == ran("votes +=")["popc.b32"] == 4 * 32
    assert opcodes["bar.sync"] == 2 * 4 * 32


def test_another_text_is_refused(compiled):
    plain = ptxcpu_runtime.load("as_it_comes", (), as_threaded_code=False)
    module = plain.PtxModule(compiled)
    source, _ = plain.Gen(module.mod, module.mod.funcs["mixture"]).build()
    for mine, theirs in (
        ("  switch (pc) {", "  switch (at) {"),
        ("  case 1: {", "  case 2: {"),
        ("int npc;", ""),
    ):
        with pytest.raises(RuntimeError, match="ptxcpu's"):
            ptxcpu_threaded.threaded(source.replace(mine, theirs, 1))

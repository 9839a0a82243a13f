"""Every kernel in every configuration of the pinned table, compiled ahead of time for five devices.

The real launchers run on meta tensors and their launches are recorded, so what is compiled is what a
GPU would get. Shapes and options are chosen so that every row of the table is launched.
"""

from __future__ import annotations

import os
import re
from typing import Dict, Tuple

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile in this process", allow_module_level=True)

from triton_recording import DEVICES, TARGETS, Launch, disassemble, make_inputs, recording, resources, run_ops

from cbam_fused._config import Config
from cbam_fused.triton_kernels import configurations

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
# A map of each class whose size is a multiple of every vector, and whose blocks are all full.
SHAPES = {"large": (16, 256, 56, 56), "small": (16, 1024, 16, 16)}
OTHERS = (
    Config(pools=15, spatial=2, ties=1, residual=True),
    Config(pools=19, spatial=3),
    Config(pools=1, spatial=0),
    Config(pools=0),
)
# Kernels whose hot loop over x is the only reader of 16-byte vectors of its dtype.
READERS = {
    "channel_pool_forward_kernel",
    "spatial_pool_forward_kernel",
    "scale_forward_kernel",
    "scale_backward_kernel",
    "attention_backward_kernel",
    "input_backward_kernel",
}


def launches(generation: str, dtypes=DTYPES, configs=(Config(),)) -> Dict[Tuple, Launch]:
    """Distinct compilations by their key."""
    found: Dict[Tuple, Launch] = {}
    for config in configs:
        for dtype in dtypes:
            for shape in SHAPES.values():
                for channels_last in (False, True):
                    hidden = 0 if config.pools == 1 else None
                    x, weights, bn = make_inputs(shape, dtype, config, hidden, channels_last=channels_last)
                    with recording(DEVICES[generation]) as recorded:
                        run_ops(x, weights, bn, config)
                    found.update({launch.key(): launch for launch in recorded})
    return found


def check(launch: Launch, target: str):
    compiled = launch.compile(target)
    used = resources(compiled, target)
    where = f"{launch.name} {dict(launch.meta)} for {target}"
    assert used["spilled"] == 0, f"{where} spills: {used}"
    assert used["shared"] <= TARGETS[target][3], f"{where} needs {used['shared']} bytes of shared memory"
    return compiled


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration(target):
    for launch in launches(target).values():
        compiled = check(launch, target)
        if target == "gfx942":
            wide = re.search(r"global_load_dwordx4|buffer_load_dwordx4", compiled.asm["amdgcn"])
        else:
            wide = re.search(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64", compiled.asm["ptx"])
        assert wide or launch.name not in READERS, (
            f"{launch.name} {dict(launch.meta)} for {target} reads narrow"
        )


def test_loads_are_wide_in_machine_code():
    for launch in launches("sm_90", (torch.bfloat16,)).values():
        if launch.name in READERS:
            assert "LDG.E" in (sass := disassemble(launch.compile("sm_90")))
            assert re.search(r"LDG\.E[\w.]*\.128", sass), f"{launch.name} has no 128-bit load"


@pytest.mark.parametrize("config", OTHERS, ids=str)
def test_other_options(config):
    for launch in launches("sm_90", (torch.bfloat16,), (config,)).values():
        check(launch, "sm_90")


def test_odd_maps_compile():
    """P = 49 and C = 65 vectorise nowhere; they must compile all the same."""
    for channels_last in (False, True):
        x, weights, bn = make_inputs((32, 65, 7, 7), torch.bfloat16, channels_last=channels_last)
        with recording(DEVICES["sm_90"]) as recorded:
            run_ops(x, weights, bn, Config())
        for launch in recorded:
            check(launch, "sm_90")


def test_every_row_is_launched():
    """The tests above miss no row: each answers some look-up that they make."""
    answered = set()
    for generation in DEVICES:
        for kernel in configurations.KERNELS:
            for layout in ("contiguous", "channels_last"):
                for size in ("small", "large"):
                    for itemsize in (2, 4, 8):
                        found = configurations._look_up(kernel, generation, layout, size, itemsize)
                        answered.add((kernel, tuple(found.meta.items()), found.warps, found.fill))
    for row in configurations.pinned_rows():
        if row.get("device") != "interpreter":
            assert (row["kernel"], tuple(row["meta"].items()), row["warps"], row["fill"]) in answered, row


def test_interpreter_has_a_row_for_everything():
    for kernel in configurations.KERNELS:
        for size in ("small", "large"):
            for itemsize in (2, 4, 8):
                assert configurations._look_up(kernel, "interpreter", "contiguous", size, itemsize)

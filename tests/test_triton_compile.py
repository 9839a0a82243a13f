"""Every kernel in every configuration of the pinned table, compiled ahead of time for five devices.

What comes on top of that, other shapes and dtypes, is compiled for FURTHER_TARGETS, and with --every-device for all.
The real launchers run on meta tensors and their launches are recorded, so what is compiled is what a
GPU would get. Shapes and options are chosen so that every row of the table is launched.
"""

from __future__ import annotations

import itertools
import os
import re
from typing import Iterator, List

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile in this process", allow_module_level=True)

from triton_recording import (
    DEVICES,
    TARGETS,
    Launch,
    cuobjdump,
    inspect_all,
    make_inputs,
    recording,
    run_ops,
    run_split_ops,
)

from cbam_fused._config import Config
from cbam_fused.triton_kernels import arguments, configurations

# One of each vendor; a compilation takes a second of a processor, and there are hundreds for each device.
FURTHER_TARGETS = [
    target if target in ("sm_90", "gfx942") else pytest.param(target, marks=pytest.mark.every_device)
    for target in TARGETS
]
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
# A map of each class whose size is a multiple of every vector, and with so many channels and hidden units that no
# block of the table is cut; the thin one is wide enough for tiles of several rows, and the last has samples enough for
# a program each.
SHAPES = {
    "large": (16, 512, 28, 28),
    "small": (16, 1024, 16, 16),
    "tiny": (16, 2048, 8, 8),
    "thin": (16, 64, 32, 256),
    "samples": (128, 2048, 8, 8),
}
# In float64 only these are so small that a program each fits the L2 of a device that cuts batches into chunks; 128
# hidden units, as SHAPES have.
FLOAT64_SAMPLES = (128, 1032, 6, 6)
# Maps so large that sums join in groups of tiles, of so few samples that channels-last has segments.
LONG_SHAPES = {"thin": (4, 64, 320, 320), "large": (1, 80, 320, 320)}
OTHERS = (
    Config(pools=15, spatial=2, ties=1, residual=True),
    Config(pools=19, spatial=3),
    Config(pools=1, spatial=0),
    Config(pools=0),
)
# Kernels with a hot loop over x, which must read it in vectors of 16 bytes.
READERS = {
    "channel_pool_forward_kernel",
    "spatial_pool_forward_kernel",
    "scale_forward_kernel",
    "scale_backward_kernel",
    "attention_backward_kernel",
    "input_backward_kernel",
    "whole_backward_kernel",
}


def inference(x, weights, bn, config) -> None:
    run_ops(x, weights, bn, config, save=False, backward=False)


def cut_at_the_norm(x, weights, bn, config) -> None:
    run_split_ops(x, weights, bn, config)


def launched(
    generation: str,
    dtypes=DTYPES,
    configs=(Config(),),
    shapes=None,
    runs=(run_ops,),
    kernel=(7, 7),
    parameters=None,
) -> Iterator[Launch]:
    """Every launch of a forward and a backward, or of other runs."""
    for config in configs:
        for dtype in dtypes:
            for shape in shapes or SHAPES.values():
                for channels_last in (False, True):
                    hidden = 0 if config.pools == 1 else {64: 32, 1032: 128}.get(shape[1])
                    x, weights, bn = make_inputs(
                        shape,
                        dtype,
                        config,
                        hidden,
                        kernel=kernel,
                        channels_last=channels_last,
                        parameters=parameters,
                    )
                    for run in runs:
                        with recording(DEVICES[generation]) as recorded:
                            run(x, weights, bn, config)
                        yield from recorded


def launches(*arguments, **keywords) -> List[Launch]:
    """Distinct compilations."""
    return list({launch.key(): launch for launch in launched(*arguments, **keywords)}.values())


def check(some: List[Launch], target: str, wide: bool = False) -> None:
    for launch, used in zip(some, inspect_all(some, target), strict=True):
        where = f"{launch.name} {dict(launch.meta)} for {target}"
        assert used.spilled == 0, f"{where} spills: {used}"
        assert not used.atomics, f"{where} has atomics"
        assert used.shared <= TARGETS[target][3], f"{where} needs {used.shared} bytes of shared memory"
        if wide and launch.name in READERS:
            assert used.wide_loop, f"{where} has no 16-byte load in a loop"
        # It streams two tensors, and reads nothing else of 2 bytes: the one's wide loads do not stand for the other's.
        if wide and launch.name == "scale_backward_kernel":
            assert not used.narrow_loop, f"{where} has 2-byte loads in a loop"


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration(target):
    check(launches(target), target, wide=True)
    whole = launches(target, (torch.float64,), shapes=(FLOAT64_SAMPLES,))
    assert any(launch.name == "whole_backward_kernel" for launch in whole)
    check(whole, target)


@pytest.mark.parametrize("target", FURTHER_TARGETS)
def test_float32_parameters(target):
    """What autocast calls: x in 16 bits, and no parameter."""
    some = launches(target, (torch.float16,), parameters=torch.float32)
    dtypes = {t.dtype for launch in some for t in launch.args if isinstance(t, torch.Tensor)}
    assert dtypes >= {torch.float16, torch.float32} and {launch.name for launch in some} >= READERS
    check(some, target, wide=True)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_reader_has_narrow_loads_in_its_loops(target, monkeypatch):
    """A wide load in a loop may be of a weight. Beside float32 parameters and, for this test, 32-bit indices, only x, dy
    and what is written are of 2 bytes: no load in a loop is. dx of averages and of first maxima needs no x, of others it
    does."""
    monkeypatch.setattr(arguments, "index_dtype", lambda extent: torch.int32)
    some = []
    shapes = (SHAPES["large"], SHAPES["samples"])
    for config, readers in (
        (Config(), READERS),
        (OTHERS[0], {"input_backward_kernel", "whole_backward_kernel"}),
    ):
        for shape, channels_last in itertools.product(shapes, (False, True)):
            x, *parameters = make_inputs(shape, torch.bfloat16, config, channels_last=channels_last)
            weights, bn = ([torch.empty_like(t, dtype=torch.float32) for t in ts] for ts in parameters)
            with recording(DEVICES[target]) as recorded:
                run_ops(x, weights, bn, config)
            some += [launch for launch in recorded if launch.name in readers]
    some = [*{launch.key(): launch for launch in some}.values()]
    assert {launch.name for launch in some} == READERS
    for launch, used in zip(some, inspect_all(some, target), strict=True):
        where = f"{launch.name} {dict(launch.meta)} for {target}"
        assert used.wide_loop and not used.narrow_loop, f"{where}: {used}"


def test_machine_code_has_the_loads_of_the_ptx():
    """What the other tests read in PTX: ptxas does not split wide loads."""
    wanted = {
        (launch.name, launch.meta["CHANNELS_LAST"]): launch
        for launch in launches("sm_90", (torch.bfloat16,), shapes=(SHAPES["large"],))
        if launch.name in READERS
    }
    of_large_maps = READERS - {"whole_backward_kernel"}
    assert wanted.keys() == set(itertools.product(of_large_maps, (False, True)))
    for which, launch in wanted.items():
        compiled = launch.compile("sm_90")
        ptx = len(re.findall(r"\bld\.global\S*\.v4\.b32", compiled.asm["ptx"]))
        sass = len(re.findall(r"\bLDG\.E\S*\.128", cuobjdump(compiled, "-sass")))
        assert 0 < ptx <= sass, which


@pytest.mark.parametrize("target", FURTHER_TARGETS)
def test_inference_and_a_norm_in_training(target):
    """What these launch and a forward and a backward in one do not."""
    dtypes, runs = (torch.bfloat16, torch.float32), (inference, cut_at_the_norm)
    known = {launch.key() for launch in launched(target, dtypes)}
    some = [launch for launch in launches(target, dtypes, runs=runs) if launch.key() not in known]
    assert {launch.name for launch in some} >= {
        "channel_pool_forward_kernel",
        "spatial_pool_forward_kernel",
        "scale_forward_kernel",
        "whole_backward_kernel",
    }
    # With no y only the logits are written, from maps: nothing of the size of x is read.
    parts = {True: [], False: []}
    for launch in some:
        parts[launch.name == "scale_forward_kernel" and launch.args[1] is None].append(launch)
    assert parts[True]
    check(parts[True], target)
    check(parts[False], target, wide=True)


# Thin maps whose tiles are stretches (channels-last some are blocks), whether the fourth launch convolves or not; and
# samples with a program each that fit the L2 of every device.
FURTHER = ((64, 64, 56, 56), (2, 64, 16, 256), (128, 1024, 8, 8))


@pytest.mark.parametrize("target", FURTHER_TARGETS)
def test_further_shapes(target):
    dtypes = (torch.bfloat16, torch.float32)
    known = {launch.key() for launch in launched(target, dtypes)}
    found = launches(target, dtypes, shapes=FURTHER)
    last = [launch for launch in found if launch.name == "input_backward_kernel" and launch.meta["BP"] > 64]
    given = {launch.args[launch.kernel.arg_names.index("dmaps")] is None for launch in last}
    assert {launch.meta["TW"] for launch in last} == {0, 32} and given == {False, True}
    assert any(launch.name == "whole_backward_kernel" for launch in found)
    check([launch for launch in found if launch.key() not in known], target, wide=True)


@pytest.mark.parametrize("target", FURTHER_TARGETS)
def test_large_maps_of_few_samples(target):
    known = {launch.key() for launch in launches(target)}
    some = [launch for launch in launches(target, shapes=LONG_SHAPES.values()) if launch.key() not in known]
    pools = [launch.meta for launch in some if launch.name == "channel_pool_forward_kernel"]
    for option in ("LONG", "SEGMENTED"):
        assert {meta[option] for meta in pools} == {False, True}
    for size, shape in LONG_SHAPES.items():
        assert configurations.map_class(shape[2] * shape[3], shape[1]) == size
        assert any(launch.meta.get("SEGMENTED") for launch in launched(target, shapes=(shape,)))
    check(some, target, wide=True)


def test_other_options():
    shapes = (SHAPES["large"], SHAPES["tiny"], SHAPES["samples"], SHAPES["thin"])
    check(launches("sm_90", (torch.bfloat16,), OTHERS, shapes), "sm_90")
    check(launches("sm_90", (torch.bfloat16,), OTHERS[:1], LONG_SHAPES.values()), "sm_90")


# What differs from all else that is compiled by the dtype, the number of dimensions or the kernel alone; and the options
# beside the default ones in another dtype and on another vendor's device.
LARGE = (SHAPES["large"],)
VARIANTS = {
    "float16": ("sm_90", dict(dtypes=(torch.float16,), shapes=LARGE)),
    "float16, gfx942": ("gfx942", dict(dtypes=(torch.float16,), shapes=LARGE)),
    "one dimension": ("sm_90", dict(dtypes=(torch.bfloat16,), shapes=((16, 512, 784),), kernel=(7,))),
    "three dimensions": (
        "sm_90",
        dict(dtypes=(torch.bfloat16,), shapes=((4, 64, 8, 16, 16),), kernel=(3, 3, 3)),
    ),
    "kernel 9": ("sm_90", dict(dtypes=(torch.bfloat16,), shapes=LARGE, kernel=(9, 9))),
    "other options, float32": ("sm_90", dict(dtypes=(torch.float32,), configs=OTHERS[:2], shapes=LARGE)),
    "other options, gfx942": ("gfx942", dict(dtypes=(torch.bfloat16,), configs=OTHERS, shapes=LARGE)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    target, what = VARIANTS[name]
    known = {launch.key() for launch in launched(target, (torch.bfloat16, torch.float32))}
    some = [launch for launch in launches(target, **what) if launch.key() not in known]
    wide = not name.startswith("other")
    convolving = {"scale_forward_kernel", "attention_backward_kernel", "sample_backward_kernel"}
    assert convolving <= {launch.name for launch in some}
    if "float16" in name:
        assert any(
            t.dtype == torch.float16 for launch in some for t in launch.args if isinstance(t, torch.Tensor)
        )
    check(some, target, wide=wide)


@pytest.mark.parametrize("target", FURTHER_TARGETS)
def test_odd_maps(target):
    """Where rows of a map end within vectors: no spills, and what takes them as one stretch has whole vectors."""
    dtypes = (torch.bfloat16, torch.float32)
    shapes = ((32, 65, 7, 7), (32, 2048, 7, 7), (128, 65, 7, 7), (128, 2048, 7, 7), (32, 1024, 14, 14))
    some = launches(target, dtypes, shapes=shapes)
    stretches = [launch for launch in some if launch.meta.get("FLAT")]
    assert {launch.name for launch in stretches} == {
        "scale_forward_kernel",
        "input_backward_kernel",
        "whole_backward_kernel",
    }
    check([launch for launch in stretches if launch.meta["CV"] > 1], target, wide=True)
    # The other kernels differ little between devices.
    if target == "sm_90":
        check(some, target)


def test_every_row_is_launched():
    """test_every_configuration misses no row on any device that uses it, and compiles each as it is pinned, with no block
    cut to a size."""
    used = []
    for generation in DEVICES:
        seen = set()
        for launch in itertools.chain(
            launched(generation), launched(generation, (torch.float64,), shapes=(FLOAT64_SAMPLES,))
        ):
            found = launch.found
            assert all(launch.meta.get(block, size) == size for block, size in found.meta.items())
            seen.add((launch.name, *found.meta.items(), found.warps, found.fill))
        layouts = ("contiguous", "channels_last")
        for layout, size, itemsize in itertools.product(layouts, configurations.MAPS, (2, 4, 8)):
            for kernel in configurations.kernels(size):
                row = configurations._look_up(kernel, generation, layout, size, itemsize)
                used.append((kernel, *row.meta.items(), row.warps, row.fill))
                assert any(name.startswith(kernel) and rest == [*used[-1][1:]] for name, *rest in seen), (
                    generation,
                    row,
                )
    for row in configurations.pinned_rows():
        if row.get("device") != "interpreter":
            assert (row["kernel"], *row["meta"].items(), row["warps"], row["fill"]) in used, row


def test_interpreter_has_a_row_for_everything():
    for size in configurations.MAPS:
        for kernel in configurations.kernels(size):
            for itemsize in (2, 4, 8):
                assert configurations._look_up(kernel, "interpreter", "contiguous", size, itemsize)

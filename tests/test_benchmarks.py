"""The benchmark's own promises: a wrong candidate is never timed, and what it counts is right."""

from __future__ import annotations

import contextlib
import csv
import mmap
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from conftest import runs_on_gpu  # noqa: E402
from oracle import Target  # noqa: E402

from benchmarks import bars, bench, gpu  # noqa: E402
from benchmarks.gate import Gate, make_inputs  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    Step,
    candidate_step,
    copy_step,
    kept_bytes,
    peak_bytes,
    time_interleaved,  # noqa: E402
)
from benchmarks.providers import Candidate, EagerCBAM, build, make_weights  # noqa: E402
from benchmarks.report import FIELDS, CsvLog, make_row, summary_table, warnings  # noqa: E402
from benchmarks.shapes import MODES, SETS, Case  # noqa: E402

SHAPE = (24, 7, 9)
FAST = ["--rounds", "5", "--seconds", "0.2", "--threads", "1"]


def case(mode: str = "train", **options) -> Case:
    return Case("test", 3, SHAPE, mode, **options)


def read(path) -> list:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_a_run_writes_tidy_rows_and_a_picture(tmp_path):
    out = tmp_path / "run.csv"
    command = [
        sys.executable,
        os.path.join(ROOT, "benchmarks", "bench.py"),
        "--shape",
        "24,7,9",
        "--batch",
        "3",
    ]
    command += ["--layout", "contiguous", "channels_last", "--providers", "eager", "timm", "fused", *FAST]
    run = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = read(out)
    assert tuple(rows[0]) == FIELDS
    has_timm = "timm" in {r["provider"] for r in rows}
    assert has_timm or "timm: not installed" in run.stdout
    providers = {"copy", "eager", "fused"} | ({"timm"} if has_timm else set())
    expected = {(m, lay, p) for m in MODES for lay in ("contiguous", "channels_last") for p in providers}
    assert {(r["mode"], r["layout"], r["provider"]) for r in rows} == expected and len(rows) == len(expected)
    size = 3 * 24 * 7 * 9 * 4
    for r in rows:
        assert (r["op"], r["shape"], r["dtype"], r["threads"]) == ("cbam", "3x24x7x9", "float32", "1")
        assert 0 < float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"])
        assert int(r["x_bytes"]) == size
        assert int(r["floor_bytes"]) == (2 if r["mode"] == "infer" else 5) * size
        assert int(r["peak_bytes"]) >= size  # y, or dx
        assert (r["kept_bytes"] != "") == (r["mode"] == "train" and r["provider"] != "copy")
        assert r["provider"] == "copy" or 0 <= float(r["gate"]) <= 1
    assert "Summary" in run.stdout and "geometric mean" in run.stdout
    picture = out.with_suffix(".png")
    if picture.exists():
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 10_000
    else:
        assert "no picture: matplotlib is not installed" in run.stdout


def _off_by(share: float, field: str):
    """FusedCBAM whose output, or gradient of x, is off by a share."""
    from cbam_fused import FusedCBAM

    class Wrong(FusedCBAM):
        def forward(self, x):
            if field == "y":
                return super().forward(x) * (1 + share)
            x = x + 0
            if x.requires_grad:
                x.register_hook(lambda g: g * (1 + share))
            return super().forward(x)

    return Wrong


@pytest.mark.parametrize("mode, field", [("infer", "y"), ("train", "dx")])
def test_a_red_gate_reports_no_speed(monkeypatch, tmp_path, capsys, mode, field):
    out = tmp_path / "run.csv"
    arguments = ["--shape", "24,7,9", "--batch", "3", "--mode", mode, "--providers", "eager", "fused", *FAST]
    monkeypatch.setattr("benchmarks.providers.FusedCBAM", _off_by(1e-4, field))
    assert bench.main([*arguments, "--backend", "reference", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert f"RED GATE, nothing about its speed is reported: fused: {field} is off by" in printed
    assert "p50" not in printed and "Summary" not in printed and not out.exists()


def test_a_baseline_that_computes_something_else_leaves_the_race(monkeypatch):
    class Wrong(EagerCBAM):
        def forward(self, x):
            return super().forward(x) * 1.01

    monkeypatch.setattr("benchmarks.providers.EagerCBAM", Wrong)
    settings = bench.Settings(["eager", "fused"], "reference", rounds=5, seconds=0.1)
    result = bench.measure_case(case("infer"), settings)
    assert [r["provider"] for r in result.rows] == ["copy", "fused"]
    assert result.missing["eager"].startswith("left out, computes something else: y is off by")


def test_a_baseline_that_fails_leaves_the_race(monkeypatch):
    class Failing(EagerCBAM):
        def forward(self, x):
            raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr("benchmarks.providers.EagerCBAM", Failing)
    settings = bench.Settings(["eager", "fused"], "reference", rounds=5, seconds=0.1)
    result = bench.measure_case(case(), settings)
    assert result.missing == {"eager": "failed: RuntimeError: no compiler"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_all_implementations_pass_the_gate_with_the_same_weights(mode, norm, dtype):
    c = case(mode, norm=norm, dtype=dtype)
    weights = make_weights(c)
    x, dy = make_inputs(c, weights)
    candidates, _ = build(c, ["eager", "timm", "fused"], weights, "reference")
    gate = Gate(c, weights, x, dy)
    assert {k for k in gate.exact} == ({"y"} if mode == "infer" else {"y", "dx"} | _parameter_names(norm))
    for candidate in candidates:
        verdict = gate.check(candidate)
        assert verdict.green, f"{candidate.provider}: {verdict}"


def _parameter_names(norm: bool) -> set:
    return {"dw1", "db1", "dw2", "db2", "dconv"} | ({"dbn_weight", "dbn_bias"} if norm else set())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_gate_is_red_for_numbers_that_are_not_finite(value):
    c = case("infer")
    weights = make_weights(c)
    x, dy = make_inputs(c, weights)
    module = torch.nn.Identity()
    poisoned = Candidate("fused", lambda t: torch.full_like(t, value), module, 1)
    verdict = Gate(c, weights, x, dy).check(poisoned)
    assert not verdict.green and verdict.name == "y"


def test_inputs_hold_no_maximum_that_rounding_could_move():
    from benchmarks.gate import _parameters
    from cbam_fused._config import Config
    from cbam_fused.reference import channel_gate_reference

    c = Case("test", 2, (512, 32, 32), "train")
    weights = make_weights(c)
    x, _ = make_inputs(c, weights)
    gate = channel_gate_reference(x.double(), _parameters(weights, torch.float64), Config())
    top = (x.double() * gate[:, :, None, None]).topk(2, dim=1).values
    gap = (top[:, 0] - top[:, 1]) / top[:, 0].abs()
    assert gap.min().item() > 64 * torch.finfo(torch.float32).eps


def test_peak_is_the_running_maximum_of_what_a_call_holds():
    n = 1 << 16

    def call():
        a = torch.empty(n)
        b = torch.empty(2 * n)
        del a
        torch.empty(n // 2)
        del b

    assert peak_bytes("cpu", Step("call", call, 1)) == 3 * n * 4


def test_copies_hold_one_tensor_each():
    for mode in MODES:
        c = case(mode)
        x, dy = make_inputs(c, make_weights(c))
        assert peak_bytes(c.device, copy_step(c, x, dy)) == c.x_bytes


def test_kept_bytes_count_each_storage_once_and_neither_x_nor_parameters():
    c = case()

    class Keeps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            squared = x * x  # keeps x
            return (squared * self.scale).mul(squared.view_as(squared))  # keeps squared, scale, the product

    module = Keeps()
    x, _ = make_inputs(c, make_weights(c))
    assert kept_bytes(Candidate("fused", module, module, 1), x) == 2 * c.x_bytes


def test_a_training_step_leaves_no_gradient_behind():
    c = case()
    weights = make_weights(c)
    x, dy = make_inputs(c, weights)
    (candidate,), _ = build(c, ["eager"], weights)
    candidate_step(c, candidate, x, dy).call()
    assert all(p.grad is None for p in candidate.owner.parameters()) and x.grad is None


def test_candidates_take_turns_round_by_round():
    order = []
    steps = [Step(name, lambda name=name: order.append(name), torch.get_num_threads()) for name in "abc"]
    c = case("infer", threads=torch.get_num_threads())
    time_interleaved(c, steps, rounds=6, seconds=60)
    assert [len(s.samples) for s in steps] == [6, 6, 6]
    runs = "".join(name for i, name in enumerate(order) if i == 0 or order[i - 1] != name)
    # Calibration, a round that warms up, and six that count.
    assert runs == "abc" + "abcbcacab" * 2 + "abc"
    assert steps[0].percentile(0) <= steps[0].median <= steps[0].percentile(1)


def test_percentiles_are_interpolated():
    step = Step("s", lambda: None, 1, samples=[5.0, 1.0, 2.0, 3.0, 4.0])
    assert [step.percentile(q) for q in (0, 0.2, 0.5, 0.8, 1)] == pytest.approx([1, 1.8, 3, 4.2, 5])


def test_floor_counts_the_passes_of_each_mode():
    assert case("infer").floor_bytes == 2 * case().x_bytes
    assert case("train").floor_bytes == 5 * case().x_bytes
    assert case("train", norm=True).floor_bytes == 8 * case().x_bytes
    assert case("train", dtype="bfloat16").floor_bytes * 2 == case("train").floor_bytes


def _rows(c: Case, times: dict, **columns) -> list:
    base = {"x_bytes": 1000, "peak_bytes": 1000, "kept_bytes": 10, "threads": c.threads, **columns}
    return [{**base, "provider": provider, "p50_ms": ms} for provider, ms in times.items()]


def test_bars_are_judged_by_what_was_measured(capsys):
    plan = bars.plan("cpu")
    assert len({c for c, _, _ in plan}) == len(plan)
    good = {"copy": 1.0, "fused": 1.0, "eager": 10.0, "compile": 10.0}
    groups = []
    for c, needed, others in plan:
        rows = _rows(c, {k: v for k, v in good.items() if k == "copy" or k in needed})
        for r in rows:
            r["peak_bytes"] = 3000 if r["provider"] == "eager" else 1000
        rows += [{**rows[-1], "provider": "fused", "threads": t, "p50_ms": 1.9} for t in others]
        groups.append((c, rows))
    assert bars.judge(groups, "cpu") == 0
    assert "FAIL" not in capsys.readouterr().out
    # Twice as slow: every bar on time fails that asks for more than 2 copies, or 5 times faster.
    for _, rows in groups:
        for r in rows:
            r["p50_ms"] *= 2 if r["provider"] == "fused" else 1
    expected = sum(
        len(b.shapes)
        for b in bars.BARS
        if (b.metric == "copy" and b.limit < 2) or (b.metric in ("eager", "compile") and b.limit > 5)
    )
    assert bars.judge(groups, "cpu") == expected > 0
    assert capsys.readouterr().out.count("FAIL") == expected
    assert bars.judge([], "cpu") == sum(len(b.shapes) for b in bars.BARS)
    assert "not measured" in capsys.readouterr().out


def test_every_named_set_makes_cases():
    for name, chosen in SETS.items():
        made = bench.make_cases(bench.parse(["--set", name, "--mode", "infer"]))
        assert [c.shape for c in made] == list(chosen.shapes) and {c.batch for c in made} == {chosen.batch}
    made = bench.make_cases(bench.parse(["--shape", "3,4,5", "--norm", "off", "on", "--threads", "1", "2"]))
    assert len(made) == 2 * 2 * 2 and {c.shape for c in made} == {(3, 4, 5)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "3,4"], "shape must be C,H,W, got 3,4"),
        (["--shape", "3,0,4"], "shape must have sizes of at least 1, got 3,0,4"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--set", "vgg"], "invalid choice: 'vgg'"),
    ],
)
def test_bad_options_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert message in capsys.readouterr().err


def test_rows_are_appended_and_the_header_written_once(tmp_path):
    path = str(tmp_path / "a" / "run.csv")
    row = dict.fromkeys(FIELDS, 1)
    CsvLog(path).add([row])
    CsvLog(path).add([row, row])
    assert len(read(path)) == 3


def test_rows_do_not_join_a_file_of_other_columns(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text(",".join(FIELDS[1:]) + "\n")
    with pytest.raises(SystemExit, match="run.csv has other columns"):
        CsvLog(str(path))


def test_page_faults_are_counted_and_told():
    """Of a step whose pages are new each time, and of one that touches none."""
    pages = 1024

    def touch() -> None:
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as fresh:
            with contextlib.suppress(AttributeError, OSError):  # a huge page would be one fault
                fresh.madvise(mmap.MADV_NOHUGEPAGE)
            for at in range(0, len(fresh), mmap.PAGESIZE):
                fresh[at] = 1

    steps = [
        Step("touch", touch, torch.get_num_threads()),
        Step("rest", lambda: None, torch.get_num_threads()),
    ]
    time_interleaved(case("infer", threads=torch.get_num_threads()), steps, rounds=5, seconds=60)
    touched, rest = (make_row(case(), s, s.label, "", None, None, None) for s in steps)
    assert touched["faults"] == pytest.approx(pages, rel=0.1) and rest["faults"] < 10
    rows = [{**r, "p20_ms": 1, "p80_ms": 1} for r in (touched, rest)]
    assert [w for w in warnings(rows) if "touch " in w and "rest" not in w] == warnings(rows) != []


@pytest.mark.parametrize("cold, calls", [(False, "many"), (True, "one")])
def test_a_cold_sample_is_one_call(cold, calls):
    step = Step("nothing", lambda: None, 1)
    time_interleaved(case(), [step], rounds=5, seconds=60, cold=cold)
    assert len(step.samples) == 5 and (step.repeat == 1) == (calls == "one")


def test_the_bars_of_the_gpu_are_measured_where_they_are_judged(monkeypatch):
    """The same code as on a GPU, on the CPU, with a compilation that does nothing."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options) or module)
    monkeypatch.setattr(gpu, "ROUNDS", 5)
    ratios = gpu.measure(case("infer", dtype="bfloat16"), backend="auto")
    assert ratios.keys() == gpu.BARS["cuda"].keys() > gpu.BARS["triton"].keys()
    assert all(0 < r < 1000 for r in ratios.values())
    assert [o["mode"] for o in asked] == ["max-autotune"] * 2


def test_each_backend_of_the_gpu_is_judged_by_its_own_bars(monkeypatch, capsys):
    ratios = {"cuda": dict.fromkeys(gpu.BARS["cuda"], 4.9), "triton": dict.fromkeys(gpu.BARS["cuda"], 4.9)}
    monkeypatch.setattr(gpu, "measure", lambda case, backend: ratios[backend])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda _: "a GPU")
    for backend, misses in (("cuda", 2), ("triton", 0)):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--skip", "tests", "sanitizer", "--backends", backend])
        with pytest.raises(SystemExit) as stop:
            gpu.main()
        out = capsys.readouterr().out
        assert stop.value.code == (misses > 0) and out.count("FAIL  ") == misses
        assert out.count("pass  ") == len(gpu.BARS[backend]) - misses


def test_the_sanitizers_run_every_test_that_launches_kernels(monkeypatch):
    """Once as a user would, and once with the resident tier wherever it fits."""
    commands, tiers = [], []

    class Done:
        returncode = 0

    def run(command, env, **_):
        commands.append(command)
        tiers.append(env.get("CBAM_FUSED_TIER"))
        return Done

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--skip", "bars"])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 0
    tests, resident, *sanitized = commands
    assert tests[1:] == ["-m", "pytest", "-q"] and resident == [*tests, "-m", "gpu"]
    assert [c[2] for c in sanitized] == [tool for tool in gpu.TOOLS for _ in range(2)]
    for command in sanitized:
        what = [*tests, "tests", "-m", "gpu", "-k", "not resident_tier_runs"]
        assert command[command.index(sys.executable) :] == what
    assert tiers == [None, "resident"] * (1 + len(gpu.TOOLS))


def test_what_runs_on_a_gpu_is_marked():
    assert runs_on_gpu({"fused": Target("triton", "cuda")}) and runs_on_gpu({"device": "cuda", "n": 3})
    assert not runs_on_gpu({"fused": Target("cpu", "cpu")}) and not runs_on_gpu({"backend": "triton"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_a_case_on_the_gpu_is_measured():
    settings = bench.Settings(["eager", "fused"], rounds=5, seconds=1)
    result = bench.measure_case(case(device="cuda"), settings)
    assert [r["provider"] for r in result.rows] == ["copy", "eager", "fused"]
    assert all(r["p50_ms"] > 0 and r["peak_bytes"] > 0 for r in result.rows)


@pytest.mark.parametrize("network", ["small CNN", "ResNet-18"])
def test_the_twin_of_a_network_computes_the_same(network):
    from benchmarks.networks import ResNet18, SmallCNN, fused_twin
    from cbam_fused import FusedCBAM

    plain = (SmallCNN(8) if network == "small CNN" else ResNet18()).double()
    twin = fused_twin(plain, "reference")
    assert sum(isinstance(m, FusedCBAM) for m in twin.modules()) == (1 if network == "small CNN" else 8)
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in plain.parameters())
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for mode in (True, False):
        a, b = plain.train(mode)(x), twin.train(mode)(x)
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(a, a[:1].expand_as(a))


def test_plain_and_fused_learn_the_same_from_real_digits(threads):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from benchmarks import train

    threads(1)  # such small steps gain nothing from a second one, and lose much on a busy machine
    rows = train.train(train.Plan("small CNN", 8, 32, 60, 0.01, seconds=600), "cpu", "auto")
    plain, fused, control = (train.of(rows, "small CNN", name) for name in ("plain", "fused", "control"))
    assert len(plain) == len(fused) == len(control) == 60
    # The losses differ by rounding alone, as those of the control do, which is plain with a last bit changed:
    # so little that one weight's missing gradient shows.
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(plain, control)) < 5e-6
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(plain, fused)) < 5e-6
    assert plain[-1]["loss"] < 0.7 * plain[0]["loss"]
    assert fused[0]["test_accuracy"] > 0.5 and fused[0]["peak_bytes"] > 0
    assert "small CNN at 8 x 8, fused" in train.summary(rows)


def test_a_training_run_writes_rows_and_both_pictures(threads, monkeypatch, tmp_path, capsys):
    """benchmarks/train.py from its arguments to its files, with short trainings."""
    for package in ("sklearn", "skimage", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from benchmarks import train

    plans = tuple(replace(plan, size=8, batch=8, steps=6) for plan in train.PLANS[True])
    monkeypatch.setattr(train, "PLANS", {True: plans})
    monkeypatch.setattr(train, "PATCH_STEPS", {True: 2})
    threads(torch.get_num_threads())  # put back after what main sets
    path = tmp_path / "train.csv"
    assert train.main(["--quick", "--threads", "1", "--out", str(path)]) == 0
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    groups = {(r["network"], r["variant"]) for r in rows}
    assert groups == {(p.network, v) for p in plans for v in ("plain", "fused", "control")}
    assert len(rows) == 6 * len(groups) and all(float(r["loss"]) > 0 and float(r["ms"]) > 0 for r in rows)
    assert all(r["threads"] == "1" and r["commit"] and int(r["peak_bytes"]) > 0 for r in rows)
    for name in ("train.png", "train-attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "ResNet-18 at 8 x 8, fused" in out and out.count("picture: ") == 2


def test_a_summary_of_the_reference_says_so():
    """Where no kernel is built, or another copy of the package was imported, "fused" is plain PyTorch."""
    row = dict(
        mode="infer", shape="8x4x4x4", dtype="float32", layout="contiguous", norm=False, threads=1, p50_ms=1.0, peak_bytes=1,
        kept_bytes=None, x_bytes=1,
    )  # fmt: skip
    rows = [{**row, "provider": p, "backend": b} for p, b in (("copy", ""), ("eager", ""), ("fused", "cpu"))]
    assert "plain PyTorch" not in summary_table([rows])
    rows[-1]["backend"] = "reference"
    assert "\n1 of these are plain PyTorch under the name of fused" in summary_table([rows])

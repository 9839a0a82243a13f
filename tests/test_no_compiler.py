"""The package where nothing is compiled and Triton is absent: it runs, warns once, and says why."""

import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

from cbam_fused import _backends, backends
from cbam_fused._config import Config

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A copy of the package without its native modules."""
    place = tmp_path_factory.mktemp("bare")
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "cbam_fused", place / "cbam_fused", ignore=ignore)
    return place


def _python(code, path, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments] if code else [sys.executable, *arguments],
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(path), "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


NO_TRITON = "import sys; sys.modules['triton'] = None\n"

CODE = """
import warnings, torch, cbam_fused
assert cbam_fused.__file__.startswith(sys.argv[1]), cbam_fused.__file__
table = cbam_fused.backends()
assert table["reference"] is True
assert "cbam_fused._C is not built" in table["cpu"], table
assert "C++ compiler" in table["cpu"], table
assert "cbam_fused._C_cuda is not built" in table["cuda"], table
assert "Triton does not import" in table["triton"], table
module = cbam_fused.FusedCBAM(8, 2)
x = torch.randn(2, 8, 5, 5, requires_grad=True)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        module(x).sum().backward()
    cbam_fused.FusedCBAM(8, 2)(x)
mine = [w for w in seen if "cbam_fused" in str(w.message)]
assert len(mine) == 1, [str(w.message) for w in seen]
assert mine[0].category is RuntimeWarning
assert str(mine[0].message) == f"cbam_fused runs on the plain PyTorch reference: {table['cpu']}"
assert x.grad.isfinite().all() and x.grad.abs().max() > 0
for name in ("cpu",):
    try:
        cbam_fused.FusedCBAM(8, 2, backend=name)(x)
    except RuntimeError as error:
        assert str(error) == f'backend="{name}" cannot run: {table[name]}', error
    else:
        raise AssertionError("a backend that is not built has run")
with warnings.catch_warnings():
    warnings.simplefilter("error")
    cbam_fused.FusedCBAM(8, 2, backend="reference")(x)
print("done")
"""


def test_package_without_native_modules_and_triton(bare):
    result = _python(NO_TRITON + CODE, bare, str(bare))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


def test_asking_for_the_reference_never_warns(bare):
    code = "import torch, cbam_fused\ncbam_fused.FusedCBAM(8, backend='reference')(torch.zeros(1, 8, 3, 3))"
    result = _python(NO_TRITON + code, bare)
    assert result.returncode == 0 and "cbam_fused" not in result.stderr, result.stderr


def test_a_native_module_that_does_not_load_is_a_reason_and_no_crash(bare, tmp_path):
    shutil.copytree(bare / "cbam_fused", tmp_path / "cbam_fused")
    (tmp_path / "cbam_fused" / "_C.abi3.so").write_bytes(b"not a library")
    code = """
import torch, cbam_fused
reason = cbam_fused.backends()["cpu"]
assert reason.startswith("the native module cbam_fused._C does not load: "), reason
cbam_fused.FusedCBAM(8)(torch.zeros(1, 8, 3, 3))
"""
    result = _python(NO_TRITON + code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("RuntimeWarning") == 1


def test_import_loads_nothing_heavy(bare):
    """Importing the package must not import Triton, matplotlib or numpy-based extras by itself."""
    code = """
import sys, torch
before = set(sys.modules)
import cbam_fused
new = {m.split(".")[0] for m in set(sys.modules) - before}
assert not new & {"triton", "matplotlib", "timm", "ultralytics", "torchvision"}, new
"""
    result = _python(code, bare)
    assert result.returncode == 0, result.stderr


def test_main_reports_and_passes_with_only_the_reference(bare):
    result = _python(None, bare, "-m", "cbam_fused")
    assert result.returncode == 0, result.stderr
    assert "cbam_fused._C is not built" in result.stdout
    assert "reference available" in " ".join(result.stdout.split())


def test_main_checks_every_available_backend():
    from oracle import FUSED

    result = _python(None, ROOT, "-m", "cbam_fused")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout
    lines = result.stdout.split("self-check", 1)[1].splitlines()
    for backend in {t.backend for t in FUSED if t.device == "cpu"}:
        assert any(line.split()[:2] == [backend, "ok:"] for line in lines), result.stdout


@pytest.mark.skipif(
    os.environ.get("CBAM_FUSED_CPU") == "0" or not shutil.which("c++"),
    reason="the kernels were not to be built",
)
def test_where_there_is_a_compiler_there_are_kernels():
    """Without them every test of a backend would be skipped."""
    assert backends()["cpu"] is True


def test_a_gpu_without_kernels_is_told_of_once(monkeypatch):
    """A fake tensor is enough: nothing is computed."""
    monkeypatch.setattr(_backends, "_state", {})
    monkeypatch.setattr(_backends, "unavailable", lambda name: f"no {name} here")
    with FakeTensorMode():
        x = torch.empty(2, 4, 3, 3, device="cuda")
        with pytest.warns(
            RuntimeWarning, match="plain PyTorch reference: no cuda here; no triton here"
        ) as said:
            assert [_backends.select("auto", x, Config()) for _ in range(2)] == ["reference"] * 2
    assert len(said) == 1
    # With one of them there, a call that it does not cover is nothing to warn of.
    monkeypatch.setattr(
        _backends, "unavailable", lambda name: None if name == "triton" else f"no {name} here"
    )
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backends.select("auto", torch.empty(2, 4, device="cuda"), Config()) == "reference"


def test_main_fails_on_a_wrong_result(monkeypatch, capsys):
    """The self-check is no decoration: a gradient that is off by a thousandth makes it exit with 1."""
    from cbam_fused import __main__ as command

    real = command._results

    def wrong(module, x, dy, backend):
        found = real(module, x, dy, "reference")
        return {**found, "dx": found["dx"] * 1.001} if backend == "cpu" else found

    monkeypatch.setattr(command, "_results", wrong)
    monkeypatch.setattr(command, "backends", lambda: dict(cuda="no", triton="no", cpu=True, reference=True))
    monkeypatch.setattr(command, "OPTIONS", command.OPTIONS[:1])
    assert command.main([]) == 1
    assert "dx is" in capsys.readouterr().out


def test_setup_without_a_compiler(tmp_path):
    """setup.py on a machine with no C++ compiler: one line, no extension, exit status 0."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "cbam_fused", tmp_path / "cbam_fused", ignore=shutil.ignore_patterns("*.so"))
    environment = {"PATH": str(tmp_path), "CXX": "", "CC": "", "PYTHONPATH": ""}
    result = _python(None, tmp_path, "setup.py", "-q", "build", **environment)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("cbam_fused:")]
    assert said == [
        "cbam_fused: no C++ compiler (c++, g++, clang++ or $CXX) found: built without native kernels"
    ]
    assert not list(tmp_path.glob("build/**/*.so"))
    assert list(tmp_path.glob("build/lib*/cbam_fused/py.typed"))

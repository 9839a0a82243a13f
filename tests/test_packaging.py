"""Files that must agree with each other: versions, pins, and what is shipped."""

import pathlib
import re
import sys

import pytest

import cbam_fused

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cuda_resources  # noqa: E402

TOML = (ROOT / "pyproject.toml").read_text()


def test_linters_have_the_same_versions_everywhere():
    pins = dict(re.findall(r'"([a-z-]+)==([\d.]+)"', TOML.split("lint = ", 1)[1].split("]", 1)[0]))
    hooks = re.findall(r'"([a-z-]+)==([\d.]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert {name for name, _ in hooks} >= {"ruff", "clang-format"}
    for name, version in hooks:
        assert pins[name] == version, name


def test_changelog_has_this_version():
    assert f"## {cbam_fused.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_package_is_typed():
    assert (pathlib.Path(cbam_fused.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_documents_name_existing_files(name):
    """Relative links and `make` targets in the documents lead somewhere."""
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / link).exists(), f"{name} links to {link}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"`make ([a-z]+)", text):
        assert target in targets, f"{name} names make {target}"


def test_ci_runs_what_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test" in script and "make lint" in script
    assert "make test" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 130])
def test_every_gpu_has_code_by_default(capability):
    """What a device runs: code of its generation and not above it, of its own where that has an "a", or older PTX."""
    lists = cuda_resources.architecture_lists()
    assert len(lists) == 2
    for architectures in lists:
        runs = []
        for name in architectures.split(";"):
            number, own, ptx = re.fullmatch(r"([\d.]+)(a?)(\+PTX)?", name).groups()
            found = int(number.replace(".", ""))
            exact = found == capability
            runs.append(exact or not own and found <= capability and (ptx or found // 10 == capability // 10))
        assert any(runs), architectures

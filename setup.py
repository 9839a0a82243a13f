"""Builds the native modules: `cbam_fused._C` for the CPU and, where nvcc is found, `cbam_fused._C_cuda`.

Both use the LibTorch stable ABI and no Python API: one binary serves torch 2.10 and newer and every
CPython from 3.10. What cannot be built is left out with one line that says why; the package then runs
on its other backends, at the least on the plain PyTorch reference.

Environment: CBAM_FUSED_CPU=0 leaves `_C` out. CBAM_FUSED_CUDA=0 leaves `_C_cuda` out, =1 makes its
absence an error. CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS have their usual meaning.
"""

import glob
import logging
import os
import re
import shutil
import subprocess
import sys

from setuptools import setup

ROOT = os.path.dirname(os.path.abspath(__file__))
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10
COMMON = [*STABLE_ABI, "-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]
# Newest first: the toolkit from which on an architecture list can be compiled. Code for 9.0a and 10.0a runs on nothing
# else, PTX on everything newer: that of 8.0 serves 10.3 and 11.0 with the streamed tier.
ARCHITECTURES = [
    ((12, 8), "8.0+PTX;8.6;8.9;9.0a;10.0a;12.0+PTX"),
    ((11, 8), "8.0+PTX;8.6;8.9;9.0a"),
]


def say(text: str) -> None:
    print(f"cbam_fused: {text}", file=sys.stderr, flush=True)


def sources(folder: str, *endings: str) -> list:
    # Relative to this file: setuptools derives the objects' paths from them.
    found = [p for e in endings for p in glob.glob(os.path.join("csrc", folder, e))]
    return sorted(found)


def headers() -> list:
    return sorted(p for e in ("h", "hpp", "cuh", "inl") for p in glob.glob(f"csrc/**/*.{e}", recursive=True))


def find_compiler() -> bool:
    """Puts a C++ compiler into CXX; False without one."""
    if os.environ.get("CXX"):
        return shutil.which(os.environ["CXX"].split()[0]) is not None
    for cxx, cc in (("c++", "cc"), ("g++", "gcc"), ("clang++", "clang")):
        if shutil.which(cxx):
            os.environ["CXX"] = cxx
            if shutil.which(cc):
                os.environ.setdefault("CC", cc)
            return True
    return False


def find_cuda_home() -> str:
    """The toolkit's folder, known by its headers: an `nvcc` on the PATH may be a wrapper elsewhere."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc:
        candidates += [os.path.dirname(os.path.dirname(p)) for p in (nvcc, os.path.realpath(nvcc))]
    candidates += ["/usr/local/cuda", "/opt/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    for home in candidates:
        if home and os.path.exists(os.path.join(home, "bin", "nvcc")):
            for include in ("include", os.path.join("targets", "x86_64-linux", "include")):
                if os.path.exists(os.path.join(home, include, "cuda_runtime.h")):
                    return home
    return ""


def cuda_refusal(torch) -> str:
    """Sets CUDA_HOME and the architectures; says why `_C_cuda` cannot be built, or nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    home = find_cuda_home()
    if not home:
        return "no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) found; set CUDA_HOME"
    text = subprocess.run(
        [os.path.join(home, "bin", "nvcc"), "--version"], capture_output=True, text=True
    ).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if not match:
        return f"nvcc in {home} does not tell its version"
    version = (int(match[1]), int(match[2]))
    if match[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {match[1]}.{match[2]} and torch is built with CUDA {torch.version.cuda}"
    architectures = next((a for least, a in ARCHITECTURES if version >= least), None)
    if architectures is None:
        return f"nvcc {match[1]}.{match[2]} is older than 11.8"
    os.environ["CUDA_HOME"] = home
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures)
    return ""


def cpu_extension(torch_extension):
    files = sources("cpu", "*.cpp")
    if not files or os.environ.get("CBAM_FUSED_CPU") == "0":
        return None
    return torch_extension.CppExtension(
        "cbam_fused._C",
        files,
        depends=headers(),
        extra_compile_args=COMMON,
        py_limited_api=True,
    )


def cuda_extension(torch):
    wish = os.environ.get("CBAM_FUSED_CUDA", "")
    files = sources("cuda", "*.cu", "*.cpp")
    if not files:
        return None
    reason = "CBAM_FUSED_CUDA=0" if wish == "0" else cuda_refusal(torch)
    if reason:
        if wish == "1":
            raise SystemExit(f"cbam_fused: CBAM_FUSED_CUDA=1, but {reason}")
        say(f"built without the CUDA kernels: {reason}")
        return None
    # Imported after CUDA_HOME is set: the module looks it up once, at import.
    from torch.utils import cpp_extension

    architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
    say(
        f"the CUDA kernels are compiled for {architectures}; this takes minutes (CBAM_FUSED_CUDA=0 leaves them out)"
    )
    return cpp_extension.CUDAExtension(
        "cbam_fused._C_cuda",
        files,
        depends=headers(),
        extra_compile_args={
            "cxx": [*COMMON, "-DUSE_CUDA"],
            "nvcc": [*STABLE_ABI, "-DUSE_CUDA", "-O3", "-std=c++17", "-Xcompiler", "-fvisibility=hidden"],
        },
        py_limited_api=True,
    )


def native() -> dict:
    """The arguments of setup() that the native modules need; none where nothing can be built."""
    if os.name == "nt":
        say("the native kernels are not built on Windows; the package runs on Triton or the reference")
        return {}
    if not find_compiler():
        say("no C++ compiler (c++, g++, clang++ or $CXX) found: built without native kernels")
        return {}
    try:
        import torch
    except ImportError as error:
        say(f"torch does not import ({error}): built without native kernels")
        return {}
    # At import it looks for CUDA itself and warns of a machine without a GPU, which is no fault here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    cuda = cuda_extension(torch)
    from torch.utils import cpp_extension

    extensions = [e for e in (cpu_extension(cpp_extension), cuda) if e is not None]
    if not extensions:
        return {}

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # pip gives every editable build a fresh temporary folder; a fixed one keeps the objects.
            self.build_temp = os.path.join(ROOT, "build", "objects")

        def get_export_symbols(self, ext) -> list:
            return []  # loaded by torch.ops.load_library; there is no PyInit to export

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())

"""Flags of whoever builds change no arithmetic: NaN, ±0 and denormals survive -ffast-math.

One module is built with all of them at once, for each compiler that is here. What -ffast-math makes
of the same lines without CMakeLists.txt's last word is shown too, so that the checks can fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import harmonizer_ext as hx
from harmonizer_ext import __main__ as report
from harmonizer_ext import backends

ROOT = Path(__file__).resolve().parent.parent

#: By where they come from; those that only one of the compilers knows are left out for the other.
FLAGS = {
    "CXXFLAGS": (
        "-Ofast -ffast-math -funsafe-math-optimizations -ffinite-math-only -fno-signed-zeros "
        "-fassociative-math -freciprocal-math -fno-trapping-math -ffp-contract=off"
    ),
    "LDFLAGS": "-Ofast -ffast-math -funsafe-math-optimizations",
    "CFLAGS": "-ffast-math",
}
OWN_FLAGS = {
    "g++": "-fsingle-precision-constant -mrecip -mdaz-ftz",
    "clang++": (
        "-ffp-model=fast -fno-honor-nans -fno-honor-infinities -fapprox-func "
        "-fdenormal-fp-math=preserve-sign -mdaz-ftz"
    ),
}
#: As arguments of CMake, with blanks in one of them.
CMAKE_ARGS = "-DCMAKE_CXX_FLAGS_RELEASE='-O3 -ffast-math' -DCMAKE_MODULE_LINKER_FLAGS=\"-Ofast {}\""

#: What nvcc says of a C++ compiler that is newer than itself.
NVCC = """#!/bin/sh
case "$1" in
--version) echo Cuda compilation tools, release 12.0, V12.0.140;;
--list-gpu-code) echo sm_80; echo sm_90;;
*) echo "#error -- unsupported GNU version! gcc versions later than 12 are not supported" >&2
   exit 1;;
esac
"""

#: Run in a process of its own, where nothing has loaded the module or anything like it.
CHECKS = """
import sys
def keeps_denormals():
    return sys.float_info.min / 2 > 0
assert keeps_denormals(), "before"
import torch
import harmonizer_ext as hx
from harmonizer_ext import __main__ as report, backends
assert keeps_denormals(), "before the native module is loaded"
native = backends.get("cpu").native()
assert native.__file__.startswith(sys.argv[1]), native.__file__
assert keeps_denormals(), "after"
assert float(torch.full((), 1e-40) * 0.5) > 0
for name in ("baseline", "avx2", "avx512"):
    if native.cpu_use_instruction_set(name):
        assert report._lost("cpu", "cpu") == [], name
        assert report._self_test("cpu", "cpu").startswith("ok"), name
maps = torch.randn(2, 3, 33, 40)
maps[0, 1, 3, 5] = torch.nan
rows = hx.harmonization_loss(maps.requires_grad_(), torch.rand(2, 33, 40), reduction="none")
(grad,) = torch.autograd.grad(rows.sum(), maps)
assert rows[0].isnan() and rows[1].isfinite(), rows
assert grad[0].isnan().all() and grad[1].isfinite().all()
try:
    hx.harmonization_loss(maps, torch.rand(2, 33, 40), torch.tensor([1.0, -1.0]))
except ValueError:
    pass
else:
    raise AssertionError("a negative token")
tokens = torch.tensor([0.0, torch.nan])
rows = hx.harmonization_loss(maps, torch.rand(2, 33, 40), tokens, reduction="none")
assert rows[0] == 0 and rows[1].isnan(), rows
assert keeps_denormals(), "after the kernels ran"
print("all is well")
"""


def _known(compiler: str, flags: str) -> str:
    """The flags among these that the compiler takes."""
    command = [compiler, "-fsyntax-only", "-Werror", "-x", "c++", os.devnull]
    taken = [
        flag
        for flag in flags.split()
        if subprocess.run([*command, flag], capture_output=True).returncode == 0
    ]
    return " ".join(taken)


def _compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian: apt install {name.rstrip('+')})")
    return path


@pytest.fixture(params=OWN_FLAGS)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a package that was built with every flag."""
    pytest.importorskip("setuptools", reason="setup.py needs setuptools to run by itself")
    pytest.importorskip("pybind11", reason="setup.py needs pybind11 to build")
    compiler = _compiler(request.param)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"{tool} is not installed (pip install harmonizer-ext[test])")
    environment = os.environ | FLAGS
    environment["CXXFLAGS"] += f" {_known(compiler, OWN_FLAGS[request.param])}"
    environment["CMAKE_ARGS"] = CMAKE_ARGS.format(_known(compiler, "-mdaz-ftz"))
    # And an nvcc that takes no compiler of this machine, which must cost the CUDA kernels alone.
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    environment |= {"CXX": compiler, "PATH": path, "CUDACXX": str(nvcc), "HARMONIZER_NATIVE": "1"}
    environment |= {"HARMONIZER_CUDA": "", "HARMONIZER_CUDA_ARCHS": ""}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert f"did not build with CUDA kernels ({nvcc}" in result.stderr
    assert "installing without the CUDA kernels" in result.stderr
    (module,) = tmp_path.glob("lib*/harmonizer_ext/_native*.so")
    return module.parent.parent


def _run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_a_module_that_was_built_with_fast_math(built: Path) -> None:
    result = _run(built, "-c", CHECKS, str(built))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all is well\n"
    result = _run(built, "-m", "harmonizer_ext")
    assert result.returncode == 0, result.stdout
    assert re.search(r"^  cpu +ok: within", result.stdout, re.MULTILINE), result.stdout
    why = (
        r"CUDA C\+\+ no: the native module was built without CUDA kernels: the module did not build"
    )
    assert re.search(why, result.stdout), result.stdout


@pytest.mark.parametrize("compiler", OWN_FLAGS)
def test_the_last_word_is_needed(compiler: str, tmp_path: Path) -> None:
    """The flags alone do what they are feared for, so that the test above shows something."""
    source = tmp_path / "few.cpp"
    source.write_text('extern "C" int is_nan(float x) { return x != x; }\n')
    module = tmp_path / "few.so"
    path = _compiler(compiler)
    command = [path, "-Ofast", "-ffast-math", "-shared", "-fPIC", str(source), "-o", str(module)]
    subprocess.run(command, check=True)
    script = (
        "import ctypes, sys; few = ctypes.CDLL(sys.argv[1]); "
        "few.is_nan.argtypes = [ctypes.c_float]; "
        "print(few.is_nan(float('nan')), sys.float_info.min / 2 > 0)"
    )
    result = subprocess.run([sys.executable, "-c", script, module], capture_output=True, text=True)
    nan, keeps = result.stdout.split()
    version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True).stdout
    # Newer compilers leave the start-up code out of shared libraries.
    assert keeps == "False" or int(version.split(".")[0]) > 12
    assert nan == "0"


def _broken(lose: str) -> dict[str, object]:
    """Functions of the ``cpu`` backend that lose something, by name."""
    cpu = backends.get("cpu")

    def harmonization(saliency: Tensor, *options: object) -> tuple[Tensor, ...]:
        return cpu._kernels.harmonization(saliency.nan_to_num(0), *options)

    def standardize(maps: Tensor) -> Tensor:
        return cpu._kernels.standardize_cut(maps.nan_to_num(0))

    def pyramid(maps: Tensor, levels: int) -> list[Tensor]:
        normal = torch.finfo(torch.float32).smallest_normal
        return [
            level.where(level.abs() >= normal, 0) for level in cpu._kernels.pyramid(maps, levels)
        ]

    def spearman(a: Tensor, b: Tensor) -> Tensor:
        spread = [x + x.signbit() * -1e-6 for x in (a, b)]
        return kept(*spread)

    kept = cpu.spearman
    functions = {
        "a NaN (released)": {"harmonization": harmonization},
        "a NaN (standardize_cut)": {"standardize_cut": standardize},
        "a denormal number": {"pyramid": pyramid},
        "the tie of 0 and -0": {"spearman": spearman},
    }
    return functions[lose]


@pytest.mark.skipif(
    backends.why_not("cpu", "cpu") is not None, reason=f"cpu: {backends.why_not('cpu', 'cpu')}"
)
@pytest.mark.parametrize(
    "lose",
    ["a NaN (released)", "a NaN (standardize_cut)", "a denormal number", "the tie of 0 and -0"],
)
def test_the_self_test_sees_what_is_lost(lose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report._lost("cpu", "cpu") == []
    for name, function in _broken(lose).items():
        monkeypatch.setattr(backends.get("cpu"), name, function)
    assert lose in report._lost("cpu", "cpu")
    line = report._self_test("cpu", "cpu")
    assert line.startswith("WRONG: within")
    assert lose in line


def test_the_self_test_sees_flushed_denormals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "_self_test", lambda *_: "ok: within 0")
    assert report.main() == 0
    assert torch.set_flush_denormal(True)
    try:
        assert report.main() == 1
    finally:
        torch.set_flush_denormal(False)
    assert "WRONG: this process flushes denormal numbers" in capsys.readouterr().out
    assert hx.available_backends("cpu")

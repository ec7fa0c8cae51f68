"""The native code itself: sanitizers, and what it may and may not depend on."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harmonizer_ext import backends

ROOT = Path(__file__).resolve().parent.parent

needs_native = pytest.mark.skipif(
    backends.why_not("cpu", "cpu") is not None, reason=f"cpu: {backends.why_not('cpu', 'cpu')}"
)


def _tool(name: str) -> str:
    """Path of a build tool, from this environment first."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed (pip install harmonizer-ext[test])")
    return path


def test_kernels_under_address_and_undefined_sanitizers(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="CMakeLists.txt needs pybind11")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    cmake, ninja = _tool("cmake"), _tool("ninja")
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=None",
        "-DHARMONIZER_SANITIZE=address,undefined",
        "-DHARMONIZER_CUDA=OFF",
    ]
    subprocess.run(configure, check=True, capture_output=True)
    build = [cmake, "--build", str(tmp_path), "--target", "check_kernels"]
    subprocess.run(build, check=True, capture_output=True)
    result = subprocess.run([tmp_path / "check_kernels"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(r"[123] instruction sets, 0 failures\n", result.stdout)


def test_native_code_knows_neither_pytorch_nor_python() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(sources) > 8
    for source in sources:
        includes = re.findall(r"#include [<\"](.+)[>\"]", source.read_text())
        forbidden = [i for i in includes if re.match(r"torch|ATen|c10", i)]
        assert not forbidden, f"{source.name} includes {forbidden}"
        if source.name != "bindings.cpp":
            python = [i for i in includes if re.match(r"pybind11|Python", i)]
            assert not python, f"{source.name} includes {python}"


@needs_native
def test_module_links_nothing_of_pytorch() -> None:
    module = Path(backends.get("cpu").native().__file__)
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed (binutils)")
    dynamic = subprocess.run([readelf, "-d", module], check=True, capture_output=True, text=True)
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic.stdout)
    assert any(name.startswith("libstdc++") for name in needed)
    assert not [name for name in needed if re.search(r"torch|c10|cuda", name)]


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_one_openmp_runtime_in_the_process() -> None:
    # Two would mean two thread pools that fight for the same cores.
    script = (
        "import torch, harmonizer_ext as hx\n"
        "maps = torch.rand(4, 1, 64, 64, requires_grad=True)\n"
        "hx.harmonization_loss(maps, torch.rand(4, 64, 64)).backward()\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(eval(result.stdout)) == 1, result.stdout


def test_setup_without_a_compiler_leaves_out_the_module_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setup.py needs setuptools to run by itself")
    environment = os.environ | {"CXX": "/nowhere/c++", "HARMONIZER_NATIVE": ""}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler found (looked for /nowhere/c++)" in result.stderr
    assert list(tmp_path.rglob("harmonizer_ext/loss.py"))
    assert not list(tmp_path.rglob("_native*"))
    environment["HARMONIZER_NATIVE"] = "1"
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "HARMONIZER_NATIVE=1, but no C++ compiler found" in result.stderr


def test_failing_build_is_a_loud_error(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setup.py needs setuptools to run by itself")
    pytest.importorskip("pybind11", reason="setup.py needs pybind11 to build")
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    path = f"{Path(_tool('cmake')).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"CXX": str(broken), "PATH": path, "HARMONIZER_NATIVE": ""}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert str(broken) in result.stdout + result.stderr


def _script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("wanted", "release", "options", "said"),
    [
        ("", None, "-DHARMONIZER_CUDA=OFF", "no CUDA compiler found (looked for {nvcc})"),
        (
            "1",
            None,
            None,
            "HARMONIZER_CUDA=1, but no CUDA compiler found (looked for {nvcc})",
        ),
        ("0", "12.8", "-DHARMONIZER_CUDA=OFF", ""),
        ("", "12.8", "-DHARMONIZER_CUDA=ON -DHARMONIZER_CUDA_ARCHS=80 90 -DCMAKE_CUDA_COMP", ""),
        ("1", "12.8", "-DHARMONIZER_CUDA=ON -DHARMONIZER_CUDA_ARCHS=80 90 -DCMAKE_CUDA_COMP", ""),
        (
            "",
            "11.4",
            "-DHARMONIZER_CUDA=OFF",
            "{nvcc} is of CUDA 11.4, older than 11.8",
        ),
        ("1", "11.4", None, "HARMONIZER_CUDA=1, but {nvcc} is of CUDA 11.4, older than 11.8"),
        ("yes", "12.8", None, "HARMONIZER_CUDA: expected 0, 1 or nothing, got 'yes'"),
    ],
)
def test_setup_chooses_the_cuda_compiler(
    wanted: str, release: str | None, options: str | None, said: str, tmp_path: Path
) -> None:
    pytest.importorskip("setuptools", reason="setup.py needs setuptools to run by itself")
    pytest.importorskip("pybind11", reason="setup.py needs pybind11 to build")
    # A CMake that writes down what it was asked for: what it makes of it is built everywhere else.
    calls = tmp_path / "calls"
    _script(tmp_path / "bin" / "cmake", f'echo "$*" >> {calls}')
    _script(tmp_path / "bin" / "ninja", "")
    nvcc = str(tmp_path / "nvcc")
    if release is not None:
        _script(Path(nvcc), f"echo Cuda compilation tools, release {release}, V{release}.61")
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "CXX": sys.executable,  # any program that is there
        "CUDACXX": nvcc,
        "HARMONIZER_NATIVE": "",
        "HARMONIZER_CUDA": wanted,
        "HARMONIZER_CUDA_ARCHS": "80 90",
    }
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert said.format(nvcc=nvcc) in result.stderr
    assert (result.returncode == 0) is (options is not None), result.stderr
    if options is None:
        assert not calls.exists()
    else:
        assert options in calls.read_text()
        # Left out in silence only where it was asked for.
        assert said or "installing without" not in result.stderr


def test_every_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = (path.parent for path in (ROOT / "harmonizer_ext").rglob("__init__.py"))
    assert set(listed) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_report() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "harmonizer_ext"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    version = importlib.import_module("harmonizer_ext").__version__
    assert result.stdout.startswith(f"harmonizer_ext {version}\n")
    cuda = backends.get("cuda").description()
    assert f"\n  CUDA C++ {cuda}\n" in result.stdout
    for name in backends.names():
        assert re.search(rf"^  {name} +(ok: within|no: )", result.stdout, re.MULTILINE)

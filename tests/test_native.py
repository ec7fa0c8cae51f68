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
        ("", "12.8", "-DHARMONIZER_CUDA=ON -DHARMONIZER_CUDA_LEFT_OUT= -DCMAKE_CUDA_COMP", ""),
        ("1", "12.8", "-DHARMONIZER_CUDA=ON -DHARMONIZER_CUDA_LEFT_OUT= -DCMAKE_CUDA_COMP", ""),
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
    nvcc = str(tmp_path / "nvcc")
    if release is not None:
        _script(Path(nvcc), f"echo Cuda compilation tools, release {release}, V{release}.61")
    result, calls = _setup_with_fakes(
        tmp_path, CUDACXX=nvcc, HARMONIZER_CUDA=wanted, HARMONIZER_CUDA_ARCHS="80 90"
    )
    assert said.format(nvcc=nvcc) in result.stderr
    assert (result.returncode == 0) is (options is not None), result.stderr
    if options is None:
        assert not calls
    else:
        assert options in " ".join(calls[0])
        assert "-DHARMONIZER_CUDA_ARCHS=80 90" in calls[0]
        # Left out in silence only where it was asked for.
        assert said or "installing without" not in result.stderr
        # And the module itself will say why.
        left_out = [word for word in calls[0] if word.startswith("-DHARMONIZER_CUDA_LEFT_OUT=")]
        assert said.format(nvcc=nvcc) in left_out[-1]
        assert left_out[-1].endswith("=") is ("CUDA=ON" in options)


def _setup_with_fakes(
    folder: Path, cmake: str = "", prelude: str = "", **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Runs setup.py with a CMake that writes down its arguments, each call's in turn.

    What CMake makes of them is built everywhere else. ``cmake`` is what else it does, in shell;
    ``prelude`` what Python does before setup.py.
    """
    pytest.importorskip("setuptools", reason="setup.py needs setuptools to run by itself")
    pytest.importorskip("pybind11", reason="setup.py needs pybind11 to build")
    log = folder / "calls"
    write = f'echo call >> {log}; for word in "$@"; do printf "%s\\n" "+$word" >> {log}; done'
    _script(folder / "bin" / "cmake", f"{write}\n{cmake}")
    _script(folder / "bin" / "ninja", "")
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "CXX": sys.executable,  # any program that is there
        "HARMONIZER_NATIVE": "",
        "HARMONIZER_CUDA_ARCHS": "",
    }
    for name in ("CUDAHOSTCXX", "NVCC_CCBIN", "NVCC_APPEND_FLAGS", "CMAKE_ARGS"):
        environment.pop(name, None)
    options = ["-q", "build", "--build-base", str(folder / "build")]
    command = [sys.executable, "setup.py", *options]
    if prelude:
        script = f"import runpy, sys; sys.argv[1:] = {options!r}; {prelude}; "
        command = [sys.executable, "-c", f"{script}runpy.run_path('setup.py')"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment | variables, capture_output=True, text=True
    )
    calls: list[list[str]] = []
    for line in log.read_text().splitlines() if log.exists() else ():
        if line == "call":
            calls.append([])
        else:
            calls[-1].append(line[1:])
    return result, calls


def _nvcc(path: Path, otherwise: str = "exit 0") -> str:
    """One of CUDA 12.0, which knows two GPUs; what it does when it is to compile, in shell."""
    return _script(
        path,
        'case "$1" in\n'
        "--version) echo Cuda compilation tools, release 12.0, V12.0.140;;\n"
        "--list-gpu-code) echo sm_80; echo sm_90;;\n"
        f"*) {otherwise};;\n"
        "esac",
    )


#: A CMake that fails where it is to compile CUDA kernels.
NO_CUDA = 'case "$*" in *HARMONIZER_CUDA=ON*) exit 1;; esac'


@pytest.mark.parametrize("host", ["", "NVCC_CCBIN", "CUDAHOSTCXX"])
@pytest.mark.parametrize("wanted", ["", "1"])
def test_setup_without_kernels_that_do_not_compile(wanted: str, host: str, tmp_path: Path) -> None:
    nvcc = _nvcc(tmp_path / "nvcc")
    named = {host: "g++-11"} if host else {}
    result, calls = _setup_with_fakes(
        tmp_path, NO_CUDA, CUDACXX=nvcc, HARMONIZER_CUDA=wanted, **named
    )
    said = f"the module did not build with CUDA kernels ({nvcc}"
    asked = [[word for word in call if "CUDA" in word and "ARCHS" not in word] for call in calls]
    with_cuda = ["-DHARMONIZER_CUDA=ON", "-DHARMONIZER_CUDA_LEFT_OUT="]
    with_cuda.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    # nvcc's own choice first, and another only where nobody has named one.
    assert asked[0] == with_cuda
    others = [] if host else [[*with_cuda, f"-DCMAKE_CUDA_HOST_COMPILER={sys.executable}"]]
    assert asked[1 : 1 + len(others)] == others
    rest = asked[1 + len(others) :]
    if wanted:
        assert result.returncode != 0
        assert f"HARMONIZER_CUDA=1, but {said}" in result.stderr
        assert not rest
    else:
        assert result.returncode == 0, result.stderr
        assert f"harmonizer_ext: {said}" in result.stderr
        assert "installing without the CUDA kernels" in result.stderr
        assert rest[0][0] == "-DHARMONIZER_CUDA=OFF"
        assert rest[0][1].startswith(f"-DHARMONIZER_CUDA_LEFT_OUT={said}")


def test_setup_where_another_host_compiler_helps(tmp_path: Path) -> None:
    only = f'case "$*" in *CUDA_HOST_COMPILER={sys.executable}*) ;; *--build*) ;; *) exit 1;; esac'
    result, calls = _setup_with_fakes(
        tmp_path, only, CUDACXX=_nvcc(tmp_path / "nvcc"), HARMONIZER_CUDA="1"
    )
    assert result.returncode == 0, result.stderr
    assert [call[0] for call in calls] == ["-S", "-S", "--build"]
    assert "installing without" not in result.stderr


def test_setup_with_an_nvcc_that_does_not_run(tmp_path: Path) -> None:
    nvcc = _script(tmp_path / "nvcc", "echo no licence >&2; exit 3")
    result, calls = _setup_with_fakes(tmp_path, CUDACXX=nvcc, HARMONIZER_CUDA="")
    assert result.returncode == 0, result.stderr
    assert f"{nvcc} --version ended with exit status 3" in result.stderr
    assert "-DHARMONIZER_CUDA=OFF" in calls[0]
    result, _ = _setup_with_fakes(tmp_path, CUDACXX=nvcc, HARMONIZER_CUDA="1")
    assert result.returncode != 0


@pytest.mark.parametrize("wanted", ["", "1"])
def test_setup_refuses_a_gpu_that_nvcc_does_not_know(wanted: str, tmp_path: Path) -> None:
    nvcc = _nvcc(tmp_path / "nvcc")
    result, calls = _setup_with_fakes(
        tmp_path, CUDACXX=nvcc, HARMONIZER_CUDA=wanted, HARMONIZER_CUDA_ARCHS="80, 900"
    )
    assert result.returncode != 0
    assert "HARMONIZER_CUDA_ARCHS: expected numbers of 75 and more out of 80 90" in result.stderr
    assert not calls


def test_setup_splits_the_arguments_of_cmake_as_a_shell_does(tmp_path: Path) -> None:
    arguments = "-DCMAKE_CXX_FLAGS='-O2 -g' \"-DA=b c\" -DD=e\\ f  -GNinja"
    result, calls = _setup_with_fakes(tmp_path, HARMONIZER_CUDA="0", CMAKE_ARGS=arguments)
    assert result.returncode == 0, result.stderr
    assert calls[0][-4:] == ["-DCMAKE_CXX_FLAGS=-O2 -g", "-DA=b c", "-DD=e f", "-GNinja"]
    result, calls = _setup_with_fakes(tmp_path, HARMONIZER_CUDA="0", CMAKE_ARGS="-DA='b c")
    assert result.returncode != 0
    assert 'CMAKE_ARGS: expected words quoted as in a shell, got "-DA=\'b c"' in result.stderr


def test_setup_has_the_last_word_of_nvcc(tmp_path: Path) -> None:
    told = tmp_path / "told"
    cmake = f"printenv NVCC_APPEND_FLAGS >> {told}; true"
    nvcc = _nvcc(tmp_path / "nvcc")
    _setup_with_fakes(tmp_path, cmake, CUDACXX=nvcc, NVCC_APPEND_FLAGS="-ccbin g++-11 -ftz=true")
    last = "-ccbin g++-11 -ftz=true --ftz=false --prec-div=true --prec-sqrt=true"
    assert told.read_text().splitlines() == [last, last]


@pytest.mark.parametrize("there", [False, True])
def test_setup_without_python_h_says_so(there: bool, tmp_path: Path) -> None:
    include = tmp_path / "include"
    include.mkdir()
    if there:
        (include / "Python.h").touch()
    result, calls = _setup_with_fakes(
        tmp_path,
        "exit 1",
        f"import sysconfig; sysconfig.get_path = lambda *_: {str(include)!r}",
        HARMONIZER_CUDA="0",
    )
    assert result.returncode != 0
    assert len(calls) == 1
    assert "the native module did not build, see above" in result.stderr
    for word in ("python3-dev", "HARMONIZER_NATIVE=0", f"Python.h is not in {include}"):
        assert (word in result.stderr) is not there


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

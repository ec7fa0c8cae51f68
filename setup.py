"""Builds the native module with CMake and ninja; everything declarative is in pyproject.toml.

Environment variables:
    HARMONIZER_NATIVE: "1" makes a missing C++ compiler an error, "0" builds no native module;
        unset, the module is built where a compiler is found.
    HARMONIZER_CUDA: "1" makes a missing CUDA compiler (nvcc) an error, "0" builds no CUDA kernels;
        unset, they are built where nvcc is found.
    HARMONIZER_CUDA_ARCHS: the GPUs to compile for, such as "80 90", instead of the whole list of
        CMakeLists.txt; fewer build faster.
    CXX, CUDACXX: the C++ and the CUDA compiler, as for CMake.

PyTorch is not needed here: the module links nothing of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
#: The first CUDA whose runtime launches thread-block clusters; CMakeLists.txt has it too.
MINIMUM_CUDA = (11, 8)


def find_compiler() -> str | None:
    """Path of the C++ compiler that CMake will use, or None."""
    wanted = os.environ.get("CXX")
    if wanted:
        return shutil.which(wanted.split()[0])
    return next((path for path in map(shutil.which, COMPILERS) if path), None)


def find_nvcc() -> tuple[str | None, str]:
    """Path of the CUDA compiler, or None; and where it was looked for."""
    wanted = os.environ.get("CUDACXX")
    if wanted:
        return shutil.which(wanted), wanted
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    folders = [str(Path(home) / "bin") for home in (*homes, "/usr/local/cuda")]
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *folders))
    return shutil.which("nvcc", path=path), f"nvcc on PATH and in {', '.join(folders)}"


def choice(name: str) -> str:
    """The value of an environment variable that is "0", "1" or nothing."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name}: expected 0, 1 or nothing, got {value!r}")
    return value


def leave_out(name: str, what: str, message: str, remedy: str) -> None:
    """Says aloud what an installation will lack; an error where the variable demands it."""
    if choice(name) == "1":
        sys.exit(f"{name}=1, but {message}; {remedy}")
    print(
        f"harmonizer_ext: {message}; installing without {what}. "
        f"`python -m harmonizer_ext` lists what is left.",
        file=sys.stderr,
    )


def wants_native() -> bool:
    """Whether to build the module."""
    if choice("HARMONIZER_NATIVE") == "0":
        if choice("HARMONIZER_CUDA") == "1":
            sys.exit("HARMONIZER_CUDA=1, but HARMONIZER_NATIVE=0 builds no module; unset one")
        return False
    if find_compiler():
        return True
    names = os.environ.get("CXX") or ", ".join(COMPILERS)
    leave_out(
        "HARMONIZER_NATIVE",
        "the native CPU and CUDA backends",
        f"no C++ compiler found (looked for {names})",
        "install one, such as g++",
    )
    return False


def cuda_compiler() -> str | None:
    """The CUDA compiler to build with, or None for a module without CUDA kernels."""
    if choice("HARMONIZER_CUDA") == "0":
        return None
    nvcc, where = find_nvcc()
    minimum = ".".join(map(str, MINIMUM_CUDA))
    if nvcc is None:
        message = f"no CUDA compiler found (looked for {where})"
    else:
        said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True)
        version = re.search(r"release (\d+)\.(\d+)", said.stdout)
        if version is None:
            sys.exit(
                f"{nvcc} --version: expected a CUDA release, got {said.stdout!r}; set CUDACXX to "
                f"NVIDIA's nvcc, or HARMONIZER_CUDA=0 to build without the CUDA kernels"
            )
        if (int(version[1]), int(version[2])) >= MINIMUM_CUDA:
            return nvcc
        message = f"{nvcc} is of CUDA {version[1]}.{version[2]}, older than {minimum}"
    leave_out(
        "HARMONIZER_CUDA",
        "the CUDA kernels",
        message,
        f"install the CUDA toolkit, {minimum} or later, or set CUDACXX to its nvcc",
    )
    return None


class CMakeBuild(build_ext):
    """One configure and one build; a failure ends the installation with CMake's own words."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake")
        ninja = shutil.which("ninja")
        if cmake is None or ninja is None:
            sys.exit(
                "cmake and ninja: expected both on PATH (pip installs them unless "
                "--no-build-isolation is given); pip install cmake ninja"
            )
        nvcc = cuda_compiler()
        # Always given: the cache of an earlier build may hold another choice.
        cuda = [
            f"-DHARMONIZER_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DHARMONIZER_CUDA_ARCHS={os.environ.get('HARMONIZER_CUDA_ARCHS', '')}",
        ]
        if nvcc:
            cuda.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *cuda,
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            hint = "; HARMONIZER_CUDA=0 builds without the CUDA kernels" if nvcc else ""
            sys.exit(f"harmonizer_ext: the native module did not build, see above{hint} ({error})")


native = [Extension("harmonizer_ext._native", sources=[])] if wants_native() else []

setup(ext_modules=native, cmdclass={"build_ext": CMakeBuild})

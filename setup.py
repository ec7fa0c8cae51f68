"""Builds the native module with CMake and ninja; everything declarative is in pyproject.toml.

Environment variables:
    HARMONIZER_NATIVE: "1" makes a missing C++ compiler an error, "0" builds no native module;
        unset, the module is built where a compiler is found.
    CXX: the C++ compiler, as for CMake.

PyTorch is not needed here: the module links nothing of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")


def find_compiler() -> str | None:
    """Path of the C++ compiler that CMake will use, or None."""
    wanted = os.environ.get("CXX")
    if wanted:
        return shutil.which(wanted.split()[0])
    return next((path for path in map(shutil.which, COMPILERS) if path), None)


def wants_native() -> bool:
    """Whether to build; says aloud what a build without the module will lack."""
    choice = os.environ.get("HARMONIZER_NATIVE", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"HARMONIZER_NATIVE: expected 0, 1 or nothing, got {choice!r}")
    if choice == "0":
        return False
    if find_compiler():
        return True
    names = os.environ.get("CXX") or ", ".join(COMPILERS)
    message = f"no C++ compiler found (looked for {names})"
    if choice == "1":
        sys.exit(f"HARMONIZER_NATIVE=1, but {message}; install one, such as g++")
    print(
        f"harmonizer_ext: {message}; installing without the native CPU backend. "
        f"`python -m harmonizer_ext` lists what is left.",
        file=sys.stderr,
    )
    return False


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
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)


native = [Extension("harmonizer_ext._native", sources=[])] if wants_native() else []

setup(ext_modules=native, cmdclass={"build_ext": CMakeBuild})

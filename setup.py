"""Builds the native module with CMake and ninja; everything declarative is in pyproject.toml.

Environment variables:
    HARMONIZER_NATIVE: "1" makes a missing C++ compiler an error, "0" builds no native module;
        unset, the module is built where a compiler is found.
    HARMONIZER_CUDA: "1" makes a missing CUDA compiler (nvcc), or kernels that do not compile, an
        error, "0" builds no CUDA kernels; unset, they are built where nvcc is found and compiles
        them.
    HARMONIZER_CUDA_ARCHS: the GPUs to compile for, such as "80 90", instead of the whole list of
        CMakeLists.txt; fewer build faster.
    CXX, CUDACXX: the C++ and the CUDA compiler, as for CMake.
    CUDAHOSTCXX, NVCC_CCBIN: the C++ compiler that nvcc uses; unset, its default, and where that
        does not do, CXX.
    CMAKE_ARGS: more arguments of CMake, quoted as in a shell.
    CXXFLAGS, LDFLAGS, CUDAFLAGS, NVCC_APPEND_FLAGS: as for CMake and nvcc; what of them would
        change arithmetic (-ffast-math, --use_fast_math) is taken back.

PyTorch is not needed here: the module links nothing of it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
#: The first CUDA whose runtime launches thread-block clusters; CMakeLists.txt has it too.
MINIMUM_CUDA = (11, 8)


def words(name: str) -> list[str]:
    """The words of an environment variable, as a shell reads them."""
    value = os.environ.get(name, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        sys.exit(f"{name}: expected words quoted as in a shell, got {value!r} ({error})")


def find_compiler() -> str | None:
    """Path of the C++ compiler that CMake will use, or None."""
    wanted = words("CXX")
    if wanted:
        return shutil.which(wanted[0])
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


def leave_out(name: str, what: str, message: str, remedy: str) -> str:
    """Says aloud what an installation will lack; an error where the variable demands it."""
    if choice(name) == "1":
        sys.exit(f"{name}=1, but {message}; {remedy}")
    print(
        f"harmonizer_ext: {message}; installing without {what}. "
        f"`python -m harmonizer_ext` lists what is left.",
        file=sys.stderr,
    )
    return message


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


def check_architectures(nvcc: str) -> None:
    """Ends the installation where a GPU is named that nvcc does not know.

    CMakeLists.txt says the same, but there it could be taken for kernels that do not compile.
    """
    wanted = re.findall(r"[^\s,;]+", os.environ.get("HARMONIZER_CUDA_ARCHS", ""))
    said = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    known = re.findall(r"sm_(\d+)", said.stdout)
    for architecture in wanted:
        if known and (architecture not in known or int(architecture) < 75):
            sys.exit(
                f"HARMONIZER_CUDA_ARCHS: expected numbers of 75 and more out of "
                f"{' '.join(known)}, which {nvcc} knows, such as '80 90'; got {architecture}"
            )


def cuda_compiler() -> tuple[str | None, str]:
    """The CUDA compiler to build with; or None, for a module without CUDA kernels, and why."""
    if choice("HARMONIZER_CUDA") == "0":
        return None, "HARMONIZER_CUDA=0 was set when it was built"
    nvcc, where = find_nvcc()
    minimum = ".".join(map(str, MINIMUM_CUDA))
    if nvcc is None:
        message = f"no CUDA compiler found (looked for {where})"
    else:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        version = re.search(r"release (\d+)\.(\d+)", said.stdout)
        if said.returncode != 0:
            message = f"{nvcc} --version ended with exit status {said.returncode}: {said.stderr!r}"
        elif version is None:
            sys.exit(
                f"{nvcc} --version: expected a CUDA release, got {said.stdout!r}; set CUDACXX to "
                f"NVIDIA's nvcc, or HARMONIZER_CUDA=0 to build without the CUDA kernels"
            )
        elif (int(version[1]), int(version[2])) >= MINIMUM_CUDA:
            check_architectures(nvcc)
            return nvcc, ""
        else:
            message = f"{nvcc} is of CUDA {version[1]}.{version[2]}, older than {minimum}"
    why = leave_out(
        "HARMONIZER_CUDA",
        "the CUDA kernels",
        message,
        f"install the CUDA toolkit, {minimum} or later, or set CUDACXX to its nvcc",
    )
    return None, why


def host_compilers() -> list[str | None]:
    """C++ compilers for nvcc to try, one after the other; None is the one that nvcc takes itself.

    Which that is, NVCC_CCBIN and CUDAHOSTCXX say, and else nvcc: every release refuses compilers
    that are newer than itself, and whoever installed it may have given it one that it takes.
    """
    if os.environ.get("CUDAHOSTCXX") or os.environ.get("NVCC_CCBIN"):
        return [None]
    default, ours = shutil.which("g++"), find_compiler()
    same = default and ours and Path(default).resolve() == Path(ours).resolve()
    return [None] if same else [None, ours]


def build_environment() -> dict[str, str]:
    """The environment of CMake and the compilers.

    nvcc appends one variable to whatever it is told, CMakeLists.txt's last word included, so that
    the last word about arithmetic goes there as well.
    """
    environment = dict(os.environ)
    if environment.get("NVCC_APPEND_FLAGS"):
        environment["NVCC_APPEND_FLAGS"] += " --ftz=false --prec-div=true --prec-sqrt=true"
    return environment


def missing_header() -> str | None:
    """What to do where Python's own header is not there, which a package of its own brings."""
    folders = {sysconfig.get_path(name) for name in ("include", "platinclude")}
    folders |= set(os.environ.get("CPLUS_INCLUDE_PATH", "").split(os.pathsep))
    folders |= set(os.environ.get("CPATH", "").split(os.pathsep))
    if any(folder and (Path(folder) / "Python.h").exists() for folder in folders):
        return None
    return (
        f"Python.h is not in {sysconfig.get_path('include')}: install it (Debian, Ubuntu: apt "
        f"install python3-dev; Fedora: dnf install python3-devel), or set HARMONIZER_NATIVE=0 to "
        f"install without the native module"
    )


def check_arithmetic(module: Path) -> None:
    """Ends the installation where loading the module changes what a process computes.

    CMakeLists.txt takes back the flags that are known to do that, of this compiler and this linker.
    """
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_native', sys.argv[1])\n"
        "before = sys.float_info.min / 2 > 0\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print('flushes' if before and not sys.float_info.min / 2 > 0 else 'keeps')\n"
    )
    # What cannot be loaded here, because it was built for another machine, is not judged here.
    result = subprocess.run(
        [sys.executable, "-c", script, str(module)], capture_output=True, text=True
    )
    if result.stdout.strip() == "flushes":
        flags = ", ".join(
            f"{name}={os.environ[name]!r}"
            for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS")
            if os.environ.get(name)
        )
        sys.exit(
            f"harmonizer_ext: loading {module.name} makes a process flush denormal numbers to "
            f"zero, in all of its libraries; remove what links crtfastmath.o from {flags or 'CXX'}"
        )


class CMakeBuild(build_ext):
    """One configure and one build; a failure ends the installation with CMake's own words.

    Unless it can be that of the CUDA kernels and nobody demands those: then another build without.
    """

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        path = Path(self.get_ext_fullpath(ext.name)).resolve()
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
            str(Path(self.build_temp).resolve()),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={path.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DHARMONIZER_CUDA_ARCHS={os.environ.get('HARMONIZER_CUDA_ARCHS', '')}",
        ]
        nvcc, why = cuda_compiler()
        if nvcc is None or not self.build_with_cuda(configure, nvcc):
            if nvcc is not None:
                why = leave_out(
                    "HARMONIZER_CUDA",
                    "the CUDA kernels",
                    f"the module did not build with CUDA kernels ({nvcc}), pip install -v says why",
                    "set NVCC_CCBIN to a C++ compiler that it takes, or CUDACXX to another nvcc",
                )
            # Always given: the cache of an earlier build may hold another choice.
            error = self.run_cmake(
                [*configure, "-DHARMONIZER_CUDA=OFF", f"-DHARMONIZER_CUDA_LEFT_OUT={why}"]
            )
            if error is not None:
                sys.exit(f"harmonizer_ext: the native module did not build, see above ({error})")
        if path.exists():
            check_arithmetic(path)

    def build_with_cuda(self, configure: list[str], nvcc: str) -> bool:
        """Whether it builds with CUDA kernels, with one of the C++ compilers that nvcc may take."""
        cuda = ["-DHARMONIZER_CUDA=ON", "-DHARMONIZER_CUDA_LEFT_OUT="]
        cuda.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        for host in host_compilers():
            if host is not None:
                print(f"harmonizer_ext: once more, with {host} for nvcc", file=sys.stderr)
            chosen = [] if host is None else [f"-DCMAKE_CUDA_HOST_COMPILER={host}"]
            if self.run_cmake([*configure, *cuda, *chosen]) is None:
                return True
            # What CMake remembers of a compiler that failed goes; objects may stay.
            build = Path(self.build_temp)
            (build / "CMakeCache.txt").unlink(missing_ok=True)
            for folder in build.glob("CMakeFiles/[0-9]*"):
                shutil.rmtree(folder)
        return False

    def run_cmake(self, configure: list[str]) -> subprocess.CalledProcessError | None:
        """Configures and builds; returns the failure, if any."""
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        environment = build_environment()
        try:
            subprocess.run([*configure, *words("CMAKE_ARGS")], check=True, env=environment)
            subprocess.run([configure[0], "--build", str(build)], check=True, env=environment)
        except subprocess.CalledProcessError as error:
            if header := missing_header():
                sys.exit(f"harmonizer_ext: the native module did not build, see above: {header}")
            return error
        return None


native = [Extension("harmonizer_ext._native", sources=[])] if wants_native() else []

setup(ext_modules=native, cmdclass={"build_ext": CMakeBuild})

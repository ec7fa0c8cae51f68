"""The machine code in the installed module: for which GPUs, and what each kernel costs there.

Read with cuobjdump, which is in the CUDA toolkit and in Triton's package, from the module that the
other tests import: nothing is compiled again, and no GPU is needed. A change that passes a budget
is either a mistake or a decision: then the table changes with it. What every kernel costs, and the
most by name, to make budgets from, is printed by

    python tests/test_cuda_compile.py
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from harmonizer_ext import backends

#: What every command line of nvcc says about arithmetic after all that came from elsewhere.
LAST_WORD = ["--ftz=false", "--prec-div=true", "--prec-sqrt=true", "--fmad=true"]

ROOT = Path(__file__).resolve().parent.parent
SOURCES = tuple((ROOT / "csrc" / "cuda").glob("*.cu"))

#: What a module that serves everybody holds at least: data centres' Ampere, Hopper and Blackwell.
GPUS = ("sm_80", "sm_90", "sm_100")
#: Those without thread-block clusters; files named loss_cluster* are not compiled for them.
WITHOUT_CLUSTERS = ("sm_75", "sm_80", "sm_86", "sm_89")

#: Registers a thread and bytes of stack a thread, which is where spilled registers go: the most of
#: all types, template arguments and GPUs. Registers are what the threads that should share a
#: multiprocessor leave each other of its 65,536, so that another compiler has some room: 64 for
#: 1,024 threads, 80 for 768, 96 for 640, 104 for 600. A name with its template arguments, as the
#: failure prints them, goes before the name alone.
BUDGETS: dict[str, tuple[int, int]] = {
    "loss_coarse_paper": (128, 0),  # one block of 512 threads; shared memory allows no second
    "loss_coarse_released": (64, 0),
    "loss_finish": (64, 0),
    "loss_level_down": (96, 0),
    "loss_level_up": (64, 0),
    "loss_merge": (64, 0),
    "loss_moments": (64, 0),
    "positive_part_derivatives": (104, 0),
    "positive_part_rows": (64, 0),
    "positive_part_squares": (80, 0),
    "pyramid_level": (64, 0),
    "pyramid_small_levels": (80, 8),
    "standardize_apply": (80, 0),
    "standardize_held": (104, 0),
    "standardize_moments": (80, 0),
    "standardize_slopes": (80, 0),
}
#: The same for the kernels of loss_cluster*.cu, whose launch bounds ask for as many blocks a
#: multiprocessor as their names say: what exceeds the registers is on the stack. Two of the paper's
#: put a few words there, for three blocks in place of two. Three released ones, none of them chosen
#: by itself, need all of their 128 registers, and two words of the stack where CUDA 12.4 compiles
#: them; 11.8, 12.9 and 13.0 do without.
_PLAN = "harmonizer::cuda::ClusterPlan"
_RELEASED = "loss_released<harmonizer::cuda::ReleasedKernel<harmonizer::cuda::ClusterPlan"
CLUSTER_BUDGETS: dict[str, tuple[int, int]] = {
    "loss_released": (168, 0),
    f"{_RELEASED}<224, 4, 14, 2, 2>, 4u> >": (128, 8),
    f"{_RELEASED}<224, 4, 14, 2, 3>, 0u> >": (128, 8),
    f"{_RELEASED}<448, 8, 14, 1, 3>, 0u> >": (128, 8),
    "loss_paper": (255, 0),
    f"loss_paper<{_PLAN}<112, 2, 14, 3, 2> >": (168, 32),
    f"loss_paper<{_PLAN}<224, 8, 14, 3, 2> >": (168, 32),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one GPU."""

    gpu: str
    name: str
    arguments: str  # of its template, in angle brackets
    registers: int
    stack: int
    shared: int

    def __str__(self) -> str:
        return (
            f"{self.name}{self.arguments} on {self.gpu}: {self.registers} registers, "
            f"{self.stack} bytes of stack, {self.shared} bytes of static shared memory"
        )

    @property
    def budget(self) -> tuple[int, int] | None:
        budgets = BUDGETS | CLUSTER_BUDGETS
        return budgets.get(f"{self.name}{self.arguments}", budgets.get(self.name))


def _find(name: str) -> str | None:
    folders = [str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")]
    try:
        import triton

        folders += [str(path.parent) for path in Path(triton.__file__).parent.rglob(f"bin/{name}")]
    except ModuleNotFoundError:
        pass  # it carries the tool and is otherwise not needed
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def _tool(name: str, where: str) -> str:
    path = _find(name)
    if path is None:
        pytest.skip(f"{name} is not installed ({where})")
    return path


@pytest.fixture(scope="module")
def module() -> Path:
    """The native module with CUDA kernels."""
    reason = backends.get("cuda").why_not_built()
    if reason is not None:
        if _find("nvcc") is not None and os.environ.get("HARMONIZER_CUDA") != "0":
            pytest.fail(f"nvcc is here, but {reason}; or set HARMONIZER_CUDA=0 to want it so")
        pytest.skip(reason)
    return _module_path()


def _module_path() -> Path:
    return Path(backends.get("cuda").native().__file__)


def _cuobjdump(module: Path, *options: str) -> str:
    tool = _tool("cuobjdump", "in the CUDA toolkit and in Triton's package: pip install triton")
    return subprocess.run(
        [tool, *options, module], check=True, capture_output=True, text=True
    ).stdout


def _split(signature: str) -> tuple[str, str]:
    """Name and template arguments of "void a::b::name<x, y>(z)"."""
    depth, end = 0, len(signature)
    for i, character in enumerate(signature):
        if character == "(" and depth == 0 and not signature.startswith("(anonymous", i):
            end = i
            break
        depth += (character in "<(") - (character in ">)")
    name, _, arguments = signature[:end].partition("<")
    return re.split(r"::|\s", name)[-1], f"<{arguments}" if arguments else ""


@functools.cache
def compiled_kernels(module: Path) -> tuple[Kernel, ...]:
    """Every kernel for every GPU in the module."""
    text = _cuobjdump(module, "--dump-resource-usage")
    demangle = [_tool("c++filt", "binutils")]
    text = subprocess.run(demangle, input=text, check=True, capture_output=True, text=True).stdout
    found, gpu = [], ""
    line = r"arch = (sm_\w+)|Function (.+):\n +REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for match in re.finditer(line, text):
        if match[1]:
            gpu = match[1]
        else:
            registers, stack, shared, local = map(int, match.groups()[2:])
            found.append(Kernel(gpu, *_split(match[2]), registers, max(stack, local), shared))
    return tuple(found)


def _skip_unless_built_for(gpu: str) -> None:
    built = backends.get("cuda").native().cuda_architectures
    if gpu not in built.split():
        pytest.skip(f"this module is built for {built} (HARMONIZER_CUDA_ARCHS)")


@pytest.mark.parametrize("gpu", GPUS)
def test_every_source_is_compiled_for(gpu: str, module: Path) -> None:
    _skip_unless_built_for(gpu)
    assert len(SOURCES) > 4
    names = re.findall(r"(\w+)\.(sm_\w+)\.cubin", _cuobjdump(module, "--list-elf"))
    ptx = re.findall(r"(\w+)\.sm_\w+\.ptx", _cuobjdump(module, "--list-ptx"))
    for source in SOURCES:
        left_out = source.stem.startswith("loss_cluster") and gpu in WITHOUT_CLUSTERS
        assert ((source.stem, gpu) in names) is not left_out, f"{source.name} for {gpu}"
        # For GPUs that come later.
        assert source.stem in ptx, f"no PTX of {source.name}"


def test_every_kernel_is_within_its_budget(module: Path) -> None:
    wrong = []
    for kernel in compiled_kernels(module):
        if kernel.budget is None:
            wrong.append(f"no budget for {kernel}")
        elif kernel.registers > kernel.budget[0] or kernel.stack > kernel.budget[1]:
            wrong.append(f"budget {kernel.budget} exceeded by {kernel}")
        # From sm_90 on a kernel with shared memory has 1 KiB for the system.
        elif kernel.shared > (1024 if int(kernel.gpu[3:]) >= 90 else 0):
            wrong.append(f"shared memory that is not asked for at launch in {kernel}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("gpu", GPUS)
def test_every_budget_has_its_kernel(gpu: str, module: Path) -> None:
    _skip_unless_built_for(gpu)
    assert BUDGETS
    assert CLUSTER_BUDGETS
    kernels = [kernel for kernel in compiled_kernels(module) if kernel.gpu == gpu]
    names = {kernel.name for kernel in kernels} | {f"{k.name}{k.arguments}" for k in kernels}
    assert not BUDGETS.keys() - names, f"not in the module for {gpu}"
    if gpu in WITHOUT_CLUSTERS:
        assert not CLUSTER_BUDGETS.keys() & names, f"empty kernels for {gpu}"
    else:
        assert not CLUSTER_BUDGETS.keys() - names, f"not in the module for {gpu}"


def test_links_no_cuda_library(module: Path) -> None:
    readelf = _tool("readelf", "binutils")
    dynamic = subprocess.run([readelf, "-d", module], check=True, capture_output=True, text=True)
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic.stdout)
    assert needed
    assert not [name for name in needed if re.search(r"cuda|nv", name)]


@pytest.mark.parametrize(
    ("wanted", "expected", "flags"),
    [
        ("", {"80", "90", "100"}, ""),
        ("120, 80 90", {"80", "90", "120"}, "--use_fast_math -ftz=true --prec-div=false"),
    ],
)
def test_flags_of_the_build(
    wanted: str, expected: set[str], flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDAFLAGS", flags)
    result = _configure(tmp_path, wanted)
    assert result.returncode == 0, result.stderr
    commands = {
        Path(entry["file"]).name: entry["command"].partition(" -c ")[0]
        for entry in json.loads((tmp_path / "compile_commands.json").read_text())
        if entry["file"].endswith(".cu")
    }
    assert commands.keys() == {source.name for source in SOURCES}
    for name, options in commands.items():
        # What the user said comes first, and nvcc takes the last of two.
        _, before, last = options.partition(f" {flags} ") if flags else ("", "", options)
        assert bool(before) is bool(flags), options
        assert not re.search(r"use_fast|(ftz|fmad)=true.*=false|math=", last), options
        assert re.findall(r"--(?:ftz|prec-div|prec-sqrt|fmad)=\w+", last) == LAST_WORD
        compiled = set(re.findall(r"[\[,]sm_(\d+)", options))
        if name.startswith("loss_cluster"):
            assert compiled.isdisjoint(gpu.removeprefix("sm_") for gpu in WITHOUT_CLUSTERS)
            assert compiled >= {number for number in expected if int(number) >= 90}
        else:
            assert compiled >= expected
            assert not wanted or compiled == expected
        assert re.findall(r"[\[,]compute_(\d+)", options) == [max(compiled, key=int)]


@pytest.mark.parametrize("flags", ["", "--use_fast_math", "-ftz=true -prec-div=false"])
@pytest.mark.parametrize("appended", ["", "-ftz=true -prec-sqrt=false", "--use_fast_math"])
def test_the_last_word_about_arithmetic_is_obeyed(
    flags: str, appended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The instructions of a small kernel show it, as both build files have nvcc called."""
    nvcc = _tool("nvcc", "in the CUDA toolkit")
    kernel = tmp_path / "kernel.cu"
    kernel.write_text("__global__ void k(float* p) { p[0] = p[1] / p[2] + sqrtf(p[3]) * p[4]; }\n")
    ptx = tmp_path / "kernel.ptx"

    def instructions(last: list[str], appended: str) -> set[str]:
        monkeypatch.setenv("NVCC_APPEND_FLAGS", appended)
        command = [nvcc, "-arch=compute_80", *flags.split(), *last, "-ptx", str(kernel), "-o", ptx]
        subprocess.run(command, check=True, capture_output=True)
        return set(re.findall(r"\b(?:div|sqrt|fma)\.\S*", ptx.read_text()))

    as_written = {"div.rn.f32", "sqrt.rn.f32", "fma.rn.f32"}
    more = setup_environment({"NVCC_APPEND_FLAGS": appended})["NVCC_APPEND_FLAGS"]
    assert instructions(LAST_WORD, more) == as_written
    # Without it the flags do what they are feared for.
    assert (instructions([], appended) == as_written) is not bool(flags + appended)


def setup_environment(variables: dict[str, str]) -> dict[str, str]:
    """The environment in which setup.py would build."""
    source = (ROOT / "setup.py").read_text().partition("native = [Extension(")[0]
    names: dict[str, object] = {"__file__": str(ROOT / "setup.py")}
    pytest.importorskip("setuptools", reason="setup.py imports it")
    exec(compile(source, "setup.py", "exec"), names)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        environment = names["build_environment"]()  # type: ignore[operator]
    assert isinstance(environment, dict)
    return environment


def test_unknown_gpu_is_an_error(tmp_path: Path) -> None:
    result = _configure(tmp_path, "80 9000")
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert re.search(r"HARMONIZER_CUDA_ARCHS: expected .* 80 .* 90 .*; got 9000", message), message


@pytest.mark.skipif(
    not os.environ.get("HARMONIZER_TEST_NVCC"),
    reason="HARMONIZER_TEST_NVCC names no nvcc of another CUDA, such as 11.8, the oldest",
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_another_nvcc_compiles(source: Path, tmp_path: Path) -> None:
    # For the first GPUs with clusters, which have all the code there is; NVCC_CCBIN names a C++
    # compiler that the other nvcc takes.
    options = ["-std=c++17", "-O3", "-arch=sm_90", "-DHARMONIZER_CUDA_CLUSTERS", *LAST_WORD]
    command = [os.environ["HARMONIZER_TEST_NVCC"], *options, "-c", source, "-o", tmp_path / "o"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:4000]


def _configure(build: Path, architectures: str) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11", reason="CMakeLists.txt needs pybind11")
    nvcc = _tool("nvcc", "in the CUDA toolkit")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None or ninja is None:
        pytest.skip("cmake and ninja are not installed (pip install harmonizer-ext[test])")
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        "-DHARMONIZER_CUDA=ON",
        f"-DHARMONIZER_CUDA_ARCHS={architectures}",
    ]
    return subprocess.run(configure, capture_output=True, text=True)


if __name__ == "__main__":
    most: dict[str, tuple[int, int]] = {}
    for each in compiled_kernels(_module_path()):
        print(each)
        so_far = most.get(each.name, (0, 0))
        most[each.name] = max(so_far[0], each.registers), max(so_far[1], each.stack)
    for name, cost in sorted(most.items()):
        print(f'    "{name}": {cost},')

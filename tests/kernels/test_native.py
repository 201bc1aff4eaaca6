"""The compiled operators: built by every way, clean under the sanitizers, within a GPU's resources, and never required."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels" / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
NVCC, CMAKE = shutil.which("nvcc"), shutil.which("cmake")
FLAGS = ("-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-Wall", "-Wextra", "-Werror")


def run(command: Sequence[object], **more: object) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **more)  # type: ignore
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr + done.stdout


SANITIZED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}")
DRIVERS = (
    ("adamw_ema", 1),
    ("adamw_ema", 2),
    ("adamw_ema", 3),
    ("video_view", 0),
    ("video_view", 1),
)  # threads; blurred or not


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("name", "argument"), DRIVERS)
def test_sanitizers_find_nothing(name: str, argument: int, tmp_path: Path) -> None:
    """Red if a number beyond a segment or a picture is read or written, an integer overflows, or an odd size goes wrong."""
    program = tmp_path / "sanitized"
    driver = Path(__file__).with_name(f"{name}_sanitized.cpp")
    run([COMPILER, *FLAGS, "-O1", *SANITIZED, driver, SOURCES / f"{name}_cpu.cpp", "-o", program])
    run([program, argument], env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1"})


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "right", "planted"),
    [
        ("adamw_ema", "i < count; ++i)\n        teacher[i] +=", "i <= count; ++i)\n        teacher[i] +="),
        ("video_view", "std::min(size, static_cast", "std::min(size + 1, static_cast"),  # the resize reads a pixel too many
        ("video_view", "if (rows > 3)", "if (rows > 2)"),  # a row below the view is written
    ],
)
def test_sanitizers_would_find_a_number_too_far(name: str, right: str, planted: str, tmp_path: Path) -> None:
    """Red if the run above could not fail: with a bug planted, it must."""
    source = (SOURCES / f"{name}_cpu.cpp").read_text()
    broken = source.replace(right, planted)
    assert broken != source
    (tmp_path / "broken.cpp").write_text(broken)
    driver, program = Path(__file__).with_name(f"{name}_sanitized.cpp"), tmp_path / "broken"
    run([COMPILER, *FLAGS, "-O1", *SANITIZED, driver, tmp_path / "broken.cpp", "-o", program])
    done = subprocess.run([program, "2"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.cu")), ids=lambda path: path.name)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_cuda_sources_compile_without_spilling(source: Path, capability: int, tmp_path: Path) -> None:
    """Red if a kernel does not compile for a GPU, warns, spills registers, or takes so many that half of a GPU lies idle."""
    code = f"arch=compute_{capability},code=sm_{capability}"
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", "-gencode", code, "-c", source]
    told = run([*command, "-o", tmp_path / "kernel.o"])
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", told)]
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", told)]
    kernels = source.read_text().count("__global__") + source.read_text().count("template <bool")
    assert len(registers) == kernels and len(spills) == 2 * kernels
    assert not any(spills)
    assert max(registers) <= 64, "fewer than 1024 threads per multiprocessor"


PROGRAM = """
import json, sys, torch, warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from xkd_kernels import Segments, choose, ema_, squared_norms
    choice = choose("adamw_ema", torch.device("cpu"), torch.float32, "")
    for _ in range(2):
        norms = squared_norms([torch.full((40_000,), 2.0)], Segments([0], [0], [40_000]))
    teacher = torch.zeros(70)
    ema_([teacher], [torch.ones(70)], [0.25])
    said = [str(warning.message) for warning in told if "adamw_ema" in str(warning.message)]
print(json.dumps([choice.backend, choice.reason, said, norms.tolist(), teacher.sum().item()]))
"""


def answers(native: Path) -> list:
    """What the operators say and do in a fresh process with the libraries of a folder."""
    environment = {**os.environ, "XKD_NATIVE": str(native), "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, env=environment, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_a_library_pytorch_computes_and_says_so_once(tmp_path: Path) -> None:
    """Red if a missing, broken or outdated library is an error, is fallen back from in silence, or is told of at every step."""
    backend, reason, said, norms, total = answers(tmp_path)
    assert backend == "torch" and "has not been built" in reason and (norms, total) == ([160_000.0], 17.5)
    assert len(said) == 1 and "runs by PyTorch's operators, which is slower" in said[0] and "cmake" in said[0]
    (tmp_path / "libxkd_kernels_cpu.so").write_text("no library")
    backend, reason, said, *_ = answers(tmp_path)
    assert backend == "torch" and "cannot be loaded" in reason and len(said) == 1


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_library_of_other_sources_is_refused(tmp_path: Path) -> None:
    """Red if a library with another table is called: it would read pointers where numbers are."""
    (tmp_path / "old.cpp").write_text('extern "C" int xkd_abi(void) { return 0; }')
    run([COMPILER, "-shared", "-fPIC", tmp_path / "old.cpp", "-o", tmp_path / "libxkd_kernels_cpu.so"])
    backend, reason, *_ = answers(tmp_path)
    assert backend == "torch" and "was built from other sources (interface 0, wanted 2); build it again" in reason


@pytest.mark.skipif(COMPILER is None or CMAKE is None, reason="needs cmake and a C++ compiler")
def test_cmake_builds_what_the_package_loads(tmp_path: Path) -> None:
    """Red if CMakeLists.txt builds nothing usable by hand, or the compiled operators do not do what PyTorch's do."""
    run([CMAKE, "-S", ROOT, "-B", tmp_path, "-DXKD_CUDA=OFF"])
    run([CMAKE, "--build", tmp_path])
    backend, _, said, norms, total = answers(tmp_path)
    assert (backend, said) == ("native", []) and (norms, total) == ([160_000.0], 17.5)


OLDER = """#!{python}
import subprocess, sys
sources = [each for each in sys.argv[1:] if each.endswith((".cpp", ".cxx", ".cc"))]
definitions = [each for each in sys.argv[1:] if each.startswith(("-D", "-I"))]
if sources:
    seen = subprocess.run(["{compiler}", "-E", "-std=c++17", *definitions, *sources], capture_output=True, text=True).stdout
    if "{unknown}" in seen:
        sys.exit("error: {unknown} is not known")
sys.exit(subprocess.call(["{compiler}", *sys.argv[1:]]))
"""


@pytest.mark.skipif(COMPILER is None or CMAKE is None, reason="needs cmake and a C++ compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
@pytest.mark.parametrize(("unknown", "clones"), [("x86-64-v4", 3), ("target_clones", 0), ("nothing at all", 3)])
def test_compilers_that_know_fewer_instruction_sets_build_too(unknown: str, clones: int, tmp_path: Path) -> None:
    """Red if GCC 11, Clang before 18, or a system without functions chosen at load time (musl) gets no operators at all."""
    compiler = tmp_path / "c++"
    compiler.write_text(OLDER.format(python=sys.executable, compiler=COMPILER, unknown=unknown))
    compiler.chmod(0o755)
    run([CMAKE, "-S", ROOT, "-B", tmp_path / "build", "-DXKD_CUDA=OFF", f"-DCMAKE_CXX_COMPILER={compiler}"])
    run([CMAKE, "--build", tmp_path / "build"])
    backend, _, _, norms, total = answers(tmp_path / "build")
    assert (backend, norms, total) == ("native", [160_000.0], 17.5)
    if nm := shutil.which("nm"):
        symbols = run([nm, "-C", tmp_path / "build" / "libxkd_kernels_cpu.so"])
        versions = {line.split("[clone", 1)[1] for line in symbols.splitlines() if "::ema(" in line and "clone" in line}
        assert len([each for each in versions if "resolver" not in each]) == clones


FAKE_CMAKE = """#!/bin/sh
case "$*" in
  *"--target xkd_kernels_cpu"*) exit 1;;
  *"--target xkd_kernels_cuda"*) touch "$2/libxkd_kernels_cuda.so";;
esac
"""


def test_what_cannot_be_compiled_costs_nothing_else(tmp_path: Path) -> None:
    """Red if a failing build for the CPU loses the one for GPUs, or a library of an earlier build passes for a new one."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "xkd_fast", source / "xkd_fast")
    shutil.copytree(ROOT / "configs", source / "configs")
    shutil.copytree(ROOT / "kernels", source / "kernels", ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "build" / "native").mkdir(parents=True)
    (source / "build" / "native" / "libxkd_kernels_cpu.so").write_text("of an earlier build")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cmake").write_text(FAKE_CMAKE)
    (tmp_path / "bin" / "cmake").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    told = run([sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "out"], cwd=source, env=environment)
    assert [path.name for path in (tmp_path / "out" / "xkd_kernels").glob("*.so*")] == ["libxkd_kernels_cuda.so"]
    assert "xkd_kernels_cpu cannot be compiled" in told


@pytest.mark.skipif(COMPILER is None or CMAKE is None, reason="needs cmake and a C++ compiler")
@pytest.mark.slow
def test_a_wheel_carries_the_libraries_and_can_be_built_without_a_compiler(tmp_path: Path) -> None:
    """Red if the wheel leaves the libraries out, is bound to one Python, or needs a compiler to be built at all."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "runs", "build", ".venv", "*.egg-info", "*.so"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", source]
    run([*command, "-w", tmp_path / "with"])
    (wheel,) = (tmp_path / "with").glob("*.whl")
    assert re.fullmatch(r"xkd_fast-[^-]+-py3-none-\w+\.whl", wheel.name) and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "xkd_kernels/libxkd_kernels_cpu.so" in archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    assert answers(tmp_path / "unpacked" / "xkd_kernels")[0] == "native"
    shutil.rmtree(source / "build", ignore_errors=True)
    run([*command, "-w", tmp_path / "without"], env={**os.environ, "CXX": "/nowhere/c++", "CUDACXX": "/nowhere/nvcc"})
    (wheel,) = (tmp_path / "without").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]

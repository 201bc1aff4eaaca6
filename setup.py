"""What to install, compiled operators among it; name and requirements: pyproject.toml, version: xkd_fast/__init__.py.

The operators of ``kernels/csrc`` are built by CMake where it finds a C++ compiler (and for GPUs nvcc). Nothing requires them:
where they cannot be built the installation says so and goes on without.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildOperators(build_ext):
    """Builds the libraries into the package ``xkd_kernels``: of the wheel, or of a checkout that is installed in place."""

    def run(self) -> None:
        """Build; a failure is told and survived."""
        cmake = shutil.which("cmake")
        if cmake is None:
            print("xkd_kernels: cmake is not found, so its compiled operators are left out", file=sys.stderr)
            return
        work = ROOT / "build" / "native"
        for old in work.glob("libxkd_kernels_*.so"):
            old.unlink()
        configure = [cmake, "-S", str(ROOT), "-B", str(work), "--fresh"]
        # neither a CUDA compiler that is of no use nor a failure for one kind of device may cost the operators for the other
        if self._succeeds("they", [*configure, "-DXKD_CUDA=ON"]) or self._succeeds("they", [*configure, "-DXKD_CUDA=OFF"]):
            for target in ("xkd_kernels_cpu", "xkd_kernels_cuda"):
                self._succeeds(target, [cmake, "--build", str(work), "--target", target])
        package = ROOT / "kernels" / "xkd_kernels" if self.inplace else Path(self.build_lib) / "xkd_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for library in work.glob("libxkd_kernels_*.so"):
            aside = package / f"{library.name}.new"  # a running process keeps the file that it has mapped
            shutil.copy2(library, aside)
            aside.replace(package / library.name)

    @staticmethod
    def _succeeds(what: str, command: list[str]) -> bool:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            print(f"xkd_kernels: of its operators {what} cannot be compiled ({error})", file=sys.stderr)
            return False
        return True

    def get_outputs(self) -> list[str]:
        """What was built into the wheel's folder."""
        return [str(path) for path in Path(self.build_lib, "xkd_kernels").glob("libxkd_kernels_*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is linked from elsewhere: in place, the libraries lie in the package."""
        return {}


class PlatformWheel(bdist_wheel):
    """One wheel serves every Python of a platform: the libraries have a C interface."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3 on this platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages(include=["xkd_fast", "xkd_fast.*"]), "xkd_fast.configs", "xkd_kernels"],
    # The wheel carries configs/ inside the package; a checkout reads the folder at the top (xkd_fast.config.shipped_configs).
    package_dir={"xkd_fast.configs": "configs", "xkd_kernels": "kernels/xkd_kernels"},
    package_data={
        "xkd_fast": ["py.typed", "model/*.json"],
        "xkd_fast.configs": ["*.yaml", "*.json"],
        "xkd_kernels": ["py.typed", "*.json"],
    },
    ext_modules=[Extension("xkd_kernels.native", sources=[])],  # what it is built from, CMakeLists.txt says
    cmdclass={"build_ext": BuildOperators, "bdist_wheel": PlatformWheel},
)

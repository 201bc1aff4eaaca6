"""What an installation consists of: metadata, pinned versions, shipped files."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

import xkd_fast
import xkd_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def constraints(python_version: str) -> dict[str, str]:
    """Pinned versions that hold for a Python version, by normalised name."""
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate(
            {**default_environment(), "python_version": python_version}
        ):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name not in pins, f"{name} is pinned twice for Python {python_version}"
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "+" not in specifier.version, line
        pins[name] = specifier.version
    return pins


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_is_pinned_within_its_range(python_version):
    """Catches a requirement added or raised without its pin: the demo would then install whatever is newest that day."""
    pins = constraints(python_version)
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + [line for extra in ("cuda13", "test", "dev") for line in extras[extra]]
    for line in wanted:
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{name} is not in constraints.txt"
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} does not satisfy {line}"


def test_every_import_is_required():
    """Catches a package that the code imports and that only happens to be installed here, such as one of torch's own needs."""
    required = {re.sub(r"[-_.]+", "-", Requirement(line).name).lower() for line in PROJECT["dependencies"]}
    distributions = {"yaml": "pyyaml", "sklearn": "scikit-learn"}
    optional = {"nvidia", "wandb", "xformers", "apex", "triton"}  # extras, and what is tried at run time
    for folder in ("xkd_fast", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    names = [node.module]
                for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - optional:
                    if name not in ("xkd_fast", "xkd_kernels"):
                        assert distributions.get(name, name) in required, f"{path.relative_to(ROOT)} imports {name}"


def test_names_that_are_not_the_real_thing_are_never_required():
    """Catches `nvidia-dali` and `apex` as requirements: those names on the package index belong to others."""
    extras = PROJECT["optional-dependencies"]
    names = {Requirement(line).name.lower() for line in [*PROJECT["dependencies"], *(x for e in extras.values() for x in e)]}
    assert names.isdisjoint({"nvidia-dali", "apex"})
    assert {"cuda12", "cuda13", "xformers", "wandb", "test", "dev"} <= set(extras)


def test_kernels_import_under_their_own_name_and_version():
    """Catches a package_dir that maps xkd_kernels elsewhere, and versions that drift apart."""
    assert Path(xkd_kernels.__file__).parent.name == "xkd_kernels"
    assert xkd_kernels.__version__ == xkd_fast.__version__


def test_make_refuses_a_path_with_spaces(tmp_path):
    """Catches a checkout under `My Projects` that fails with a riddle half way through the installation."""
    folder = tmp_path / "my projects"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    made = subprocess.run(["make", "demo"], cwd=folder, capture_output=True, text=True)
    assert made.returncode == 2
    assert "holds spaces" in made.stderr and not (folder / ".venv").exists()


def test_make_clean_removes_environments_alone(tmp_path):
    """Catches `make clean VENV=DIR` that deletes a folder of something else, or leaves an environment that was half made."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name, file in (("thesis", "chapter1"), ("env", "pyvenv.cfg"), (".venv", "half")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    codes = {}
    for name in ("thesis", "env", ".venv"):
        codes[name] = subprocess.run(["make", "clean", f"VENV={name}"], cwd=tmp_path, capture_output=True).returncode
    assert codes == {"thesis": 2, "env": 0, ".venv": 0}
    assert (tmp_path / "thesis" / "chapter1").exists() and not (tmp_path / "env").exists() and not (tmp_path / ".venv").exists()


def test_a_wheel_carries_packages_and_configurations(tmp_path):
    """Catches an installed `xkd-fast train` that finds no demo.yaml, and packages missing from the wheel."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "configs", "kernels", "xkd_fast"):
        (source / name).symlink_to(ROOT / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = source.glob("*.whl")
    assert wheel.name.startswith(f"xkd_fast-{xkd_fast.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "xkd_fast").rglob("*.py")}
    expected |= {f"xkd_fast/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    expected |= {f"xkd_kernels/{path.name}" for path in (ROOT / "kernels" / "xkd_kernels").glob("*.py")}
    assert expected <= names
    assert not any(name.startswith(("tests/", "configs/", "kernels/")) for name in names)
    entry_points = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "xkd-fast = xkd_fast.cli:main" in entry_points

"""Who may import whom: the order of the packages, and what runs with torch alone; the map is CONTRIBUTING.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From left to right. A module imports from its own layer and from layers to its left, nothing else of ours.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("xkd_kernels",),
    ("xkd_fast.errors", "xkd_fast.files", "xkd_fast.yaml_text", "xkd_fast.amounts", "xkd_fast.model.options"),
    ("xkd_fast.data",),
    ("xkd_fast.objective",),
    ("xkd_fast.model", "xkd_fast.reference", "xkd_fast.weights"),
    ("xkd_fast.config",),
    ("xkd_fast.engine",),
    ("xkd_fast.evaluate",),
    ("xkd_fast.analysis",),
    ("xkd_fast.train", "xkd_fast.demo", "xkd_fast.doctor", "xkd_fast.interruption", "xkd_fast.cli"),
)

# Read by everyone, so they may not lean on their neighbours: the contract between data and model.
LEAVES = (*LAYERS[1], "xkd_fast.data.views")

# Objectives and models run wherever torch runs.
TORCH_ALONE = ("xkd_fast.objective", "xkd_fast.model", "xkd_fast.reference", "xkd_fast.weights", "xkd_kernels")
BLOCKED = ("pydantic", "yaml", "nvidia.dali", "deepspeed", "sklearn", "av", "rich", "matplotlib")


def sources() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module of ours."""
    for base, package in ((ROOT, "xkd_fast"), (ROOT / "kernels", "xkd_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def layer(module: str) -> int:
    """Place of a module in the order; the longest matching name counts. The bare package (the version) is leftmost."""
    if module == "xkd_fast":
        return 0
    matches = [
        (len(name), place)
        for place, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert matches, f"{module} stands in no layer; give it its place in {Path(__file__).name}, on purpose"
    return max(matches)[1]


def imports(source: str, module: str, is_package: bool, known: set[str]) -> set[str]:
    """Modules of ours that a source text imports, at any depth; not those under ``if TYPE_CHECKING``."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = package[: len(package) - node.level + 1]
                origin = ".".join([*base, *([origin] if origin else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found.add(inner if inner in known else origin)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return {name for name in found if name.split(".")[0] in ("xkd_fast", "xkd_kernels")}


MODULES = dict(sources())


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", set(MODULES))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_its_left(module):
    """Catches a dependency that runs against the data flow, such as a model that reads the configuration."""
    for imported in imports_of(module):
        if imported in LEAVES and module not in LEAVES:
            continue
        assert layer(imported) <= layer(module), f"{module} imports {imported}, which stands to its right"
    if module in LEAVES:
        assert imports_of(module) <= {"xkd_fast.model.options"}, (
            f"{module} is read by everyone; it may import model.options alone"
        )


def test_the_kernels_know_nothing_of_the_trainer():
    """Catches an import from xkd_fast in the package of kernels, which others use on its own."""
    for module in MODULES:
        if module.startswith("xkd_kernels"):
            assert all(name.startswith("xkd_kernels") for name in imports_of(module)), module


def test_the_import_reader_sees_every_form():
    """Catches a reader that misses relative or local imports: the order above would then hold for the wrong reason."""
    source = (
        "import xkd_fast.config as c\nfrom xkd_fast import errors\nfrom . import views\nfrom ..model.options import option\n"
        "def f():\n    from xkd_fast.engine.ema import Teachers\n"
        "if TYPE_CHECKING:\n    from xkd_fast.train import main\nelse:\n    import xkd_kernels\n"
    )
    known = {"xkd_fast.errors", "xkd_fast.data.views", "xkd_fast.model.options", "xkd_fast.engine.ema"}
    assert imports(source, "xkd_fast.data.pipeline", False, known) == {
        "xkd_fast.config",
        "xkd_fast.errors",
        "xkd_fast.data.views",
        "xkd_fast.model.options",
        "xkd_fast.engine.ema",
        "xkd_kernels",
    }
    assert imports("from .views import Views", "xkd_fast.data", True, known) == {"xkd_fast.data.views"}


def run_without(blocked: tuple[str, ...], statement: str) -> None:
    """Run a statement in a fresh Python in which some packages cannot be imported."""
    program = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if any(name == b or name.startswith(b + '.') for b in {blocked!r}):\n"
        "            raise ImportError('blocked: ' + name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n" + statement
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_models_objectives_and_kernels_need_torch_alone():
    """Catches pydantic, DALI, DeepSpeed and the like reaching the code that users take elsewhere."""
    modules = [m for m in MODULES if any(m == name or m.startswith(f"{name}.") for name in TORCH_ALONE)]
    assert len(modules) >= 6
    run_without(BLOCKED, "import importlib\n" + "".join(f"importlib.import_module({m!r})\n" for m in modules))


def test_the_configuration_needs_no_decoder_and_no_trainer():
    """Catches DALI, PyAV or DeepSpeed imported at the top of a module: reading a configuration would need them all."""
    run_without(("nvidia.dali", "deepspeed", "sklearn", "av", "matplotlib"), "import xkd_fast.config")


def test_the_command_line_starts_without_torch():
    """Catches a heavy import at the top of the command line: `xkd-fast --help` would take seconds."""
    heavy = ("torch", "numpy", "pydantic", "yaml", *BLOCKED)
    run_without(
        heavy, "from xkd_fast.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code"
    )

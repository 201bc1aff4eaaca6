"""What a figure says of itself: the commit, and whether the code was that commit's."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from xkd_fast.analysis import provenance


def git(root: Path, *arguments: str) -> str:
    """What git prints in ``root``."""
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *who, *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def checkout(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that holds the module, a result and a README, all committed."""
    module = root / "xkd_fast" / "analysis" / "provenance.py"
    for path in (module, root / "README.md", root / "benchmarks" / "results" / "step.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("as committed\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "all of it")
    monkeypatch.setattr(provenance, "__file__", str(module))
    return root


def test_only_changed_code_makes_a_figure_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a figure of changed code passes for the commit's, or a run that writes its result makes the next one dirty."""
    root = checkout(tmp_path / "checkout", monkeypatch)
    (root / "README.md").write_text("with the table of the last run\n")
    (root / "benchmarks" / "results" / "step.json").write_text("written by the last run\n")
    (root / "notes.txt").write_text("not tracked\n")
    found = provenance.provenance()
    assert (found["commit"], found["dirty"]) == (git(root, "rev-parse", "HEAD"), False)
    (root / "xkd_fast" / "analysis" / "provenance.py").write_text("changed\n")
    assert provenance.provenance()["dirty"] is True


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if an installed package, or a machine without git, ends the demo instead of saying that it knows no commit."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.provenance()["commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.provenance()["commit"] is None


def test_device_and_versions_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if the figures of a GPU are told as the processor's or the other way round, or a version is another package's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 37)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    found = provenance.provenance()
    assert found["device"].endswith(f"({torch.backends.cpu.get_cpu_capability()}), 37 threads")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert provenance.provenance()["device"].endswith("(AMX), 37 threads")
    assert (found["torch"], found["packages"]["numpy"]) == (torch.__version__, metadata.version("numpy"))
    assert None not in found["packages"].values()
    json.dumps(found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert provenance.provenance()["device"] == "a GPU"


def test_a_copied_tree_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a figure measured on a copy without history carries the commit of whatever history lies around it."""
    monkeypatch.setenv("XKD_BENCHMARK_COMMIT", "0123abc")
    told = provenance.provenance()
    assert told["commit"] == "0123abc" and told["dirty"] is False

"""An audit for the eye: a table for the terminal, and a picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from xkd_fast.data.audit import Audit
from xkd_fast.errors import UserError
from xkd_fast.files import replace_with

SHOWN = 6  # values of a kind in the table, and bars in a panel; the rest are summed up
TITLES = {
    "container": "containers",
    "video": "video codecs",
    "pixels": "pixel formats",
    "side": "short sides, pixels",
    "fps": "frames/s",
    "audio": "audio codecs",
    "sample_rate": "sample rates, Hz",
    "channels": "channels",
    "sound": "sound",
}
PANELS = ("video", "side", "fps", "sample_rate", "channels")
LIMITS = "Pictures that are lacking or damaged inside a file are seen by prepare alone, which decodes all of them."
FORMATS = ("png", "svg", "pdf")


def _most(counter: Counter[str]) -> list[tuple[str, int]]:
    most = counter.most_common(SHOWN)
    rest = counter.total() - sum(count for _, count in most)
    return most + ([("others", rest)] if rest else [])


def _length(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h" if seconds >= 3600 else f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.3g} s"


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def audit_table(found: Audit) -> Table:
    """The figures for a terminal."""
    told = found.summary()
    parts = f", named {told['sources']} times" if told["sources"] - told["missing"] != told["files"] else ""
    table = Table(title=f"{told['files']} files{parts}, {_size(told['bytes'])}", show_header=False, caption=LIMITS)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("readable", str(told["readable"]))
    reasons = Counter(found.unreadable.values())
    table.add_row("unreadable", "; ".join(f"{count} × {escape(reason)}" for reason, count in _most(reasons)) or "0")
    if told["missing"]:
        table.add_row("missing", str(told["missing"]))
    for kind, counter in found.counts().items():
        table.add_row(TITLES[kind], ", ".join(f"{escape(name)} {count}" for name, count in _most(counter)) or "–")
    lengths = told["seconds"]
    if lengths["of_files"]:
        span = f"{_length(lengths['shortest'])} to {_length(lengths['longest'])}, median {_length(lengths['median'])}"
        table.add_row("lengths", f"{span}; {_length(lengths['total'])} in all")
    twins = told["duplicates"]
    table.add_row("the same bytes twice", f"{twins['surplus_files']} surplus files, {_size(twins['surplus_bytes'])}")
    if found.not_compared:
        reasons = Counter(found.not_compared.values())
        why = "; ".join(f"{count} × {escape(reason)}" for reason, count in _most(reasons))
        table.add_row("not compared, for they cannot be read through", why)
    if found.estimate is not None:
        estimate = found.estimate
        skipped = ", ".join(f"{count} {reason}" for reason, count in estimate.skipped.items())
        table.add_row(
            "as shards, about",
            f"{_size(estimate.bytes)} in {_length(estimate.seconds)} with {estimate.workers} workers (from {estimate.tried} "
            f"sources, converted and thrown away{'; skipped: ' + skipped if skipped else ''})",
        )
    return table


def plot_format(path: Path) -> str:
    """The kind of picture that a file's name asks for.

    Raises:
        UserError: an ending that is no picture's.
    """
    form = path.suffix.lower().lstrip(".")
    if form not in FORMATS:
        raise UserError(f"--plot {path} must end in {', '.join(f'.{name}' for name in FORMATS)}")
    return form


def plot_audit(found: Audit, path: Path) -> None:
    """Draw lengths, and the most frequent codecs, sizes and rates; replaces ``path`` in one step.

    Raises:
        UserError: an ending that is no picture's.
    """
    form = plot_format(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    counts = found.counts()
    axes[0].hist(found.seconds or [0.0], bins=30, color="tab:blue")
    axes[0].set(title="lengths", xlabel="seconds", ylabel="files")
    for panel, kind in zip(axes[1:], PANELS, strict=True):
        _bars(panel, _most(counts[kind]), TITLES[kind])
    told = found.summary()
    figure.suptitle(
        f"{told['files']} files, {told['unreadable']} unreadable, {told['sound'].get('none', 0)} without sound, "
        f"{told['sound'].get('silent', 0)} silent, {told['duplicates']['surplus_files']} surplus copies"
    )
    replace_with(path, lambda temporary: figure.savefig(temporary, format=form, dpi=120))


def _bars(panel: Any, values: list[tuple[str, int]], title: str) -> None:
    panel.bar([name for name, _ in values], [count for _, count in values], color="tab:blue")
    panel.set(title=title, ylabel="files")
    panel.tick_params(axis="x", labelrotation=30)

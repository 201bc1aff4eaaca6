"""Lines of annotation files, and what is said of those that are not as published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from xkd_fast.data.sources import csv_rows, read_text
from xkd_fast.errors import UserError

_YOUTUBE_ID = re.compile(r"[\w-]{11}", re.ASCII)


def table_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a csv with a header.

    Raises:
        UserError: naming the line, if a column is lacking or a row is longer or shorter than the header.
    """
    rows = csv_rows(path, read_text(path, "an annotation file"))
    number, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    lacking = [name for name in columns if name not in names]
    if lacking:
        known = ",".join([*columns, *optional])
        raise UserError(
            f"{path}, line {number}: the header {','.join(names)!r} lacks {', '.join(lacking)}; the official file has {known}"
        )
    for number, row in rows:
        if len(row) != len(names):
            raise UserError(f"{path}, line {number}: {len(row)} cells where the header has {len(names)}; fetch the file again")
        yield number, {name: cell.strip() for name, cell in zip(names, row, strict=True)}


def plain_rows(path: Path, columns: str, count: int, *, skip_spaces: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and rows, cells stripped, of a csv without a header; lines that begin with ``#`` are passed over.

    Args:
        path: the file.
        columns: what its cells are, in words, for the error.
        count: how many there are.
        skip_spaces: whether quotes may follow on a comma and a space.

    Raises:
        UserError: naming the line, if a row has another number of cells.
    """
    for number, row in csv_rows(path, read_text(path, "an annotation file"), skip_spaces=skip_spaces):
        if row[0].startswith("#"):
            continue
        if len(row) != count:
            raise wrong(path, number, f"{len(row)} cells where {columns} belong")
        yield number, [cell.strip() for cell in row]


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines that are not blank."""
    for number, line in enumerate(read_text(path, "an annotation file").splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def wrong(path: Path, line: int, problem: str) -> UserError:
    """The error for a line of an annotation file."""
    return UserError(f"{path}, line {line}: {problem}; take the official file, or mend the line")


def one_of(path: Path, line: int, what: str, text: str, choices: Sequence[str]) -> str:
    """A word that must be one of a few.

    Raises:
        UserError: naming the line.
    """
    if text not in choices:
        raise wrong(path, line, f"{what} {text!r} must be one of {', '.join(choices)}")
    return text


def number_in(path: Path, line: int, what: str, text: str) -> float:
    """A number of 0 or more.

    Raises:
        UserError: naming the line.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise wrong(path, line, f"{what} {text!r} is no number of 0 or more")
    return value


def whole_number(text: str) -> int:
    """A whole number of at most 9 digits; -1 where the text is something else, so that it equals no number of a list."""
    return int(text) if len(text) <= 9 and text.isdecimal() else -1


def youtube_id(path: Path, line: int, text: str) -> str:
    """A video's name on YouTube: 11 letters, digits, ``-`` or ``_``.

    Raises:
        UserError: naming the line.
    """
    if not _YOUTUBE_ID.fullmatch(text):
        raise wrong(path, line, f"{text!r} is no YouTube id, which has 11 letters, digits, - or _")
    return text


def span(path: Path, line: int, start: str, end: str) -> tuple[float, float]:
    """Start and end of a clip, seconds.

    Raises:
        UserError: naming the line.
    """
    first, last = number_in(path, line, "start", start), number_in(path, line, "end", end)
    if last <= first:
        raise wrong(path, line, f"the end {last:g} does not come after the start {first:g}")
    return first, last

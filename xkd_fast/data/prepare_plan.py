"""The plan of a prepare, noted in the folder of its shards: what a later call must agree with to go on there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from xkd_fast.data.prepare_options import PrepareOptions
from xkd_fast.data.shards import FORMAT, MANIFEST, index_path, read_json
from xkd_fast.data.sources import Source, SourceSet
from xkd_fast.data.video_codecs import AUTO, AUTO_REASON, CODECS
from xkd_fast.errors import UserError
from xkd_fast.files import aside, write_aside

PLAN = "prepare.json"
REPORT = "report.csv"
REPLACEABLE = "replaceable"  # in a plan: a later call with replace=True may remove the shards
CONVERTER = 3  # of the code that turns a source into a sample; another one gives other samples, pictures or sound


def shuffle(sources: list[Source], seed: int) -> list[Source]:
    """The sources in an order that depends on their names and the seed alone."""

    def rank(source: Source) -> bytes:
        return hashlib.sha256(f"{seed}\n{source.name}".encode("utf-8", "surrogateescape")).digest()

    return sorted(sources, key=rank)


def plan_of(sources: SourceSet, options: PrepareOptions) -> dict[str, Any]:
    """What identifies a run: its options and its sources. A folder is only continued by the same plan.

    What the files hold is no part of it: whether they have changed is asked shard by shard.
    """
    ordered = shuffle(sources.sources, options.seed)
    plan: dict[str, Any] = {"format": FORMAT, "converter": CONVERTER, "options": options.content()}
    plan |= {"sources": len(ordered), "names": _digest(source.name for source in ordered)}
    if missing := [source.name for source in ordered if source.missing]:
        plan["missing"] = _digest(missing)
    if sources.about:  # in a folder the names tell the classes
        labels = _digest("\0".join(source.classes) for source in ordered)
        plan |= {"about": sources.about, "labels": _digest([labels, *sources.classes])}
    return plan


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def check_plan(destination: Path, plan: dict[str, Any]) -> None:
    """Note the plan in a folder that is empty, or refuse a folder that belongs to another one.

    Raises:
        UserError: naming what differs.
    """
    path = destination / PLAN
    if path.is_file():
        stored = read_json(path, "the plan of an earlier prepare", "choose another folder, or delete this one")
        if stored.get("format") != plan["format"]:
            raise UserError(
                f"{destination} was prepared in format {stored.get('format')!r}, this version writes format {plan['format']}; "
                "choose another folder, or delete this one"
            )
        if stored.get("converter", 1) != plan["converter"]:
            raise UserError(
                f"{destination} was prepared by another version, whose samples differ from this one's (a whole set can be "
                "trained on as it is); choose another folder, or delete this one"
            )
        options, usual = stored.get("options"), PrepareOptions(codec="mjpeg").content()  # codec and quality were always noted
        for name, value in plan["options"].items():
            earlier = options.get(name, usual[name]) if isinstance(options, dict) else None
            if earlier != value:
                raise UserError(
                    f"{destination} was prepared with {name} = {earlier}, this call asks for {value}; "
                    "choose another folder, or delete this one"
                )
        if stored.get("about") != plan.get("about"):
            raise UserError(
                f"{destination} was prepared from {_told(stored.get('about'))}, this call names {_told(plan.get('about'))}; "
                "choose another folder, or delete this one"
            )
        if any(stored.get(name) != plan.get(name) for name in {*plan, "missing"} - {REPLACEABLE, "options"}):
            folder = "about" not in plan
            now = "the source folder now holds" if folder else "this call names"
            raise UserError(
                f"{destination} was prepared from {stored.get('sources')} videos, and {now} {plan['sources']} or others, by "
                f"{'name' if folder else 'name or class'}; prepare new ones by themselves into another folder "
                "(data.train takes several), or delete this one"
            )
        return
    if any(entry.name != aside(path).name for entry in destination.iterdir()):  # that one is of a call that was cut off here
        raise UserError(f"{destination} holds files that are not shards of prepare; choose an empty or a new folder")
    write_aside(path, json.dumps(plan, indent=2).encode())


def _told(about: object) -> str:
    return "a folder of videos" if about is None else json.dumps(about, ensure_ascii=False)


def choose_codec(options: PrepareOptions, destination: Path | None) -> tuple[PrepareOptions, str]:
    """Options with a codec in the place of ``auto``, and why this one; as they are, without a word, where one is named."""
    if options.codec != "auto":
        return options, ""
    if destination is not None and (begun := _begun_with(destination)):
        return replace(options, codec=begun), f"codec auto: {begun}, which {destination} was begun with"
    return replace(options, codec=AUTO), f"codec auto: {AUTO}, {AUTO_REASON}"


def _begun_with(destination: Path) -> Any:
    """The codec of the plan in a folder; None where there is none, or none that makes sense."""
    try:
        codec = json.loads((destination / PLAN).read_text(encoding="utf-8"))["options"]["codec"]
        return codec if codec in CODECS else None
    except (OSError, ValueError, KeyError, TypeError):  # what is damaged, `check_plan` refuses
        return None


def begin(destination: Path, plan: dict[str, Any], *, anew: bool, changed: Callable[[], bool]) -> str:
    """Note the plan in a folder, unless it is there already; returns a sentence where shards of another plan were removed.

    That is done where ``anew`` asks for it and the folder was prepared so itself, then too where sources of its shards have
    ``changed``; and where not one sample stands in it.

    Raises:
        UserError: the folder holds something else.
    """
    told = ""
    if not continues(destination, plan):
        if holds_no_sample(destination):
            _remove_shards(destination)
            told = f"{destination} was begun with other sources or options, and holds no sample; it is prepared anew"
        elif anew and _is_replaceable(destination):
            _remove_shards(destination)
    elif anew and _is_replaceable(destination) and changed():
        _remove_shards(destination)
    check_plan(destination, plan)
    return told


def holds_no_sample(destination: Path) -> bool:
    """Whether a folder is prepare's own, and nothing is lost where it is begun anew: all of its shards are empty."""
    try:
        plan = json.loads((destination / PLAN).read_text(encoding="utf-8"))
        if not isinstance(plan, dict) or "names" not in plan:
            return False
        return all(
            json.loads(index_path(tar).read_text(encoding="utf-8"))["samples"] == [] for tar in destination.glob("shard-*.tar")
        )
    except (OSError, ValueError, KeyError, TypeError):  # such as a tar whose index was not written yet
        return False


def _is_replaceable(destination: Path) -> bool:
    """Whether a folder says that a later prepare may replace what it holds; what users prepared by themselves never does."""
    try:
        return json.loads((destination / PLAN).read_text(encoding="utf-8")).get(REPLACEABLE) is True
    except (OSError, ValueError, AttributeError):
        return False


def continues(destination: Path, plan: dict[str, Any]) -> bool:
    """Whether a folder holds this plan; one without any plan, or another's, does not."""
    try:
        if not (destination / PLAN).is_file():
            return False
        check_plan(destination, plan)
    except UserError:
        return False
    return True


def _remove_shards(destination: Path) -> None:
    """Remove what prepare wrote, the plan last: cut off in between, the folder is still prepare's own."""
    parts = (*destination.glob("shard-[0-9]*"), *destination.glob(".shard-[0-9]*.partial"))
    for path in (*parts, *(destination / name for name in (REPORT, MANIFEST, PLAN))):
        path.unlink(missing_ok=True)

"""The command line: ``xkd-fast COMMAND …``. Each command reads its own arguments, and imports what it needs when it runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from xkd_fast import __version__
from xkd_fast.amounts import amount_of, count_of, lasting
from xkd_fast.errors import UserError

EXAMPLES = """\
a first run, from nothing to a trained model:
  xkd-fast demo                                                 all of the following, and a report
  xkd-fast render runs/videos --clips-per-class 50              render labelled videos to play with
  xkd-fast prepare runs/videos runs/shards --short-side 32      turn a folder of videos into shards
  xkd-fast train 'data.train=[runs/shards]' output=runs/first   pretrain the demo's model on them
  xkd-fast evaluate svm --checkpoint runs/first --data runs/shards --train-clips 2

more:
  xkd-fast train --config xkd_base_k400 --print-config          every option of a recipe, explained
  xkd-fast profile --config xkd_base_k400 --clips 4             where a step's time goes
  xkd-fast doctor                                               what this machine has, and what it lacks
  xkd-fast COMMAND --help                                       a command's arguments
"""


@dataclass(frozen=True)
class Command:
    """One command: what it does, in a line, and the function that reads the arguments and does it."""

    summary: str
    run: Callable[[list[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a wrong input, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not given:
        parser.print_help(sys.stderr)
        return 2
    command = COMMANDS[parser.parse_args(given[:1]).command]
    try:
        return command.run(given[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `xkd-fast … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a file or folder that cannot be read or written
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="xkd-fast",
        usage="xkd-fast COMMAND [arguments]",
        description=f"Pretrain XKD on audio-visual clips.\n\ncommands:\n{commands}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xkd-fast {__version__}", help="show the version and exit")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"xkd-fast {name}",
        description=textwrap.fill(description, 78),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# --------------------------------------------------------------------------------------------- options dataclasses as arguments


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """One ``--argument`` per field of an options dataclass, with the field's documentation and default."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        flag = f"--{field.name.replace('_', '-')}"
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        documentation = f"{field.metadata.get('doc', '')} (default: {shown})".replace("%", "%%")
        parser.add_argument(
            flag, dest=field.name, default=argparse.SUPPRESS, help=documentation, **_argument_form(hints[field.name])
        )


def _argument_form(kind: Any) -> dict[str, Any]:
    """How argparse reads a value of a type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is Literal:
        return {"choices": inner, "type": type(inner[0])}
    if origin is tuple:
        variable = inner[-1] is Ellipsis
        return {"nargs": "+" if variable else len(inner), "type": inner[0], "metavar": _metavar(inner[0])}
    if origin in (typing.Union, types.UnionType):
        (base,) = (part for part in inner if part is not type(None))
        return {"type": lambda text: None if text == "none" else base(text), "metavar": f"{_metavar(base)}|none"}
    return {"type": kind, "metavar": _metavar(kind)}


def _metavar(kind: type) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")


def read_options(arguments: argparse.Namespace, options: type) -> Any:
    """The options dataclass that the arguments describe; raises ``UserError`` with the dataclass's own sentence."""
    hints = typing.get_type_hints(options)
    given = {}
    for field in dataclasses.fields(options):
        if hasattr(arguments, field.name):
            value = getattr(arguments, field.name)
            given[field.name] = tuple(value) if typing.get_origin(hints[field.name]) is tuple else value
    try:
        return options(**given)
    except ValueError as error:
        raise UserError(str(error)) from error


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, or plain lines where that is no terminal; yields what takes (done, in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_progress(title)
        return
    progress = Progress(*columns, console=console)
    task = progress.add_task(title, total=None)

    def show(done: int, total: int) -> None:
        progress.start()  # not before there is something to show: wrong input gets its error alone
        progress.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        progress.stop()


def _plain_progress(title: str) -> Callable[[int, int], None]:
    """Takes (done, in all); prints a line on standard error at the first call and at every further tenth."""
    told = -1

    def show(done: int, total: int) -> None:
        nonlocal told
        if 10 * done // total > told:
            told = 10 * done // total
            print(f"{title}: {done} of {total}", file=sys.stderr, flush=True)

    return show


# ------------------------------------------------------------------------------------------------------------------- commands


def render(arguments: list[str]) -> int:
    """Render labelled audio-visual events to video files in class folders."""
    from xkd_fast.data.synthetic import SyntheticOptions, render_dataset
    from xkd_fast.data.synthetic.events import EVENTS

    events = "\n".join(f"  {name:<10}{(event.__doc__ or '').splitlines()[0]}" for name, event in EVENTS.items())
    parser = _command_parser(
        "render",
        "Render labelled audio-visual events to real video files, one folder per class, to try the other commands on. What is "
        "heard follows from what is seen, so pictures tell the class, sound tells it, and each tells of the other. The same "
        "seed gives the same clips, another seed others of the same classes. What is complete is kept.",
        "  xkd-fast render runs/videos --clips-per-class 50 --workers 4\n"
        "  xkd-fast render runs/easy --classes bounce orbit --distractors 0 --background 0     easier to tell apart\n"
        "  xkd-fast render runs/test --seed 1 --clips-per-class 10                             others, to test on\n"
        "  xkd-fast prepare runs/videos runs/shards --short-side 32                            what comes next\n\n"
        f"classes:\n{events}",
    )
    parser.add_argument("destination", help="folder to write; empty, or rendered before with the same options")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per processor)"
    )
    add_options(parser, SyntheticOptions)
    given = parser.parse_args(arguments)
    options = read_options(given, SyntheticOptions)
    with progress_bar("rendering") as progress:
        rendered = render_dataset(given.destination, options, workers=given.workers, progress=progress)
    total = options.clips_per_class * len(options.classes)
    print(f"{given.destination}: {total} clips of {len(options.classes)} classes, {rendered} of them rendered now")
    return 0


def prepare(arguments: list[str]) -> int:
    """Turn videos into a shard set, or tell what that would come to."""
    from rich.console import Console

    from xkd_fast.data.datasets import DATASETS, describe
    from xkd_fast.data.prepare import REPORT, PrepareOptions, standing_samples
    from xkd_fast.data.prepare import prepare as prepare_shards
    from xkd_fast.interruption import terminated_like_interrupted

    parser = _command_parser(
        "prepare",
        "Turn videos into shards for training and evaluation: constant frame rate, small frames, mono sound. The folders "
        "inside SOURCE are the classes, unless a list or a known data set names files and classes. Videos that cannot be used "
        "are skipped, counted and listed with the reason. Called again after an interruption, it goes on.",
        "  xkd-fast prepare VIDEOS --audit                              what a pile holds, before hours are spent\n"
        "  xkd-fast prepare VIDEOS SHARDS --dry-run                     what would be done, and how long and large\n"
        "  xkd-fast prepare /data/kinetics/train /data/k400/train       class folders\n"
        "  xkd-fast prepare --list clips.csv SHARDS                     a csv: path[,label[,start[,end]]]\n"
        "  xkd-fast prepare --dataset ucf101 UCF-101 SHARDS --split test --fold 1\n"
        "  xkd-fast prepare VIDEOS SHARDS --fps 4 --short-side 64 --workers 2\n\n"
        f"data sets (--dataset NAME; the first split is the default):\n{describe()}",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", help="folder of videos; not with --list")
    add("destination", metavar="DESTINATION", nargs="?",
        help="folder of the shards; empty, or begun before by the same command; not with --audit")  # fmt: skip
    where = parser.add_argument_group("where samples come from")
    where.add_argument("--list", metavar="FILE", help="csv of path[,label[,start[,end]]], or one path a line; paths count from "
        "its folder; several classes as A|B; start and end are seconds: only that part is taken")  # fmt: skip
    where.add_argument("--dataset", metavar="NAME", choices=DATASETS, help="a known data set, see below")
    where.add_argument("--split", help="split of the data set (default: its first)")
    where.add_argument("--fold", type=int, metavar="N", help="which of its splits, from 1 (default: 1)")
    where.add_argument("--annotations", metavar="DIR", help="folder of its annotation files (default: in or beside SOURCE)")
    where.add_argument("--subset", action="store_true", help="its lists are shorter than the official ones on purpose; without "
        "this such lists are refused, since they may have been cut off")  # fmt: skip
    where.add_argument("--id-files", choices=("auto", "clips", "videos"), default="auto",
        help="audioset, vggsound: what files named by a YouTube id alone hold, the clips or the whole videos (default: auto, "
        "by the lengths of some)")  # fmt: skip
    add("--retry", action="store_true", help="try again what an earlier call could not read in time, crashed on or found "
        "unreadable, and what it skipped for any other reason if the file's size has changed since; without such a change, "
        "truncated, no_video and no_audio are never tried again; shards that get a sample by that are written again as a whole"
        )  # fmt: skip
    look = parser.add_argument_group("look before you leap (nothing is converted to shards)")
    look.add_argument("--dry-run", action="store_true", help="tell what would be done, and write nothing")
    look.add_argument("--audit", action="store_true", help="open every file that would be prepared, and count what the pile "
        "holds; sound is judged as by prepare, but pictures lacking inside a file are seen by prepare alone")  # fmt: skip
    look.add_argument("--json", metavar="FILE", help="with --audit: write the figures, and what was found of every file")
    look.add_argument("--plot", metavar="FILE", help="with --audit: write a picture of them (png, svg, pdf)")
    add_options(parser, PrepareOptions)
    given = parser.parse_intermixed_args(arguments)
    _check_prepare_arguments(given)
    defaults = dict(DATASETS[given.dataset].options) if given.dataset else {}
    for name, value in defaults.items():
        if not hasattr(given, name):
            setattr(given, name, value)
    options, console = read_options(given, PrepareOptions), Console(stderr=True)
    sources = _sources(given, options)
    for warning in sources.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if given.audit:
        return _audit(given, sources, options)
    if given.dry_run:
        return _dry_run(given, sources, options)
    with terminated_like_interrupted() as received:
        try:
            report = prepare_shards(sources, given.destination, options, retry=given.retry, console=console)
        except KeyboardInterrupt:
            samples, standing = standing_samples(given.destination)
            print(
                f"stopped by {received[0] if received else 'SIGINT'}: {samples} samples in {standing} shards stand in "
                f"{given.destination}; the same command again goes on from there",
                file=sys.stderr,
            )
            return 143 if received else 130
    print(
        f"{given.destination}: {count_of(report.written, 'sample')} in {count_of(report.shards, 'shard')}, "
        f"{count_of(report.converted_now, 'video')} handled now"
    )
    if given.retry:
        print(f"tried again what was skipped before: {count_of(report.retried, 'video')}, {report.recovered} gave a sample")
    if report.rewritten:
        print(f"{count_of(report.rewritten, 'shard')} written again: a training that has begun on the set cannot go on exactly")
    if report.skipped:
        reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in report.skipped.most_common())
        print(
            f"{report.skipped.total()} of {count_of(report.sources, 'video')} skipped ({reasons}); "
            f"listed in {given.destination}/{REPORT}{_ways_out(report.skipped, options)}"
        )
    for count, lacking, other in ((report.without_audio, "sound", "video"), (report.without_video, "picture", "audio")):
        if count:
            have = "has" if count == 1 else "have"
            print(f"{count_of(count, 'sample')} {have} no {lacking}: for the evaluation of {other} alone, and no training")
    return 0


def _ways_out(skipped: typing.Mapping[str, int], options: Any) -> str:
    """Which options make samples of what was skipped."""
    ways = []
    if skipped.get("no_audio", 0) + skipped.get("silent_audio", 0) and options.missing_audio == "skip":
        ways.append("--missing-audio keep-as-video-only, with another DESTINATION, keeps videos without sound")
    if skipped.get("timed_out"):
        limit = f"--seconds-per-file {min(86400.0, 10 * options.seconds_per_file):g} --retry"
        ways.append(f"{limit}, with this DESTINATION, gives what timed out more time")
    return "".join(f"; {way}" for way in ways)


def _check_prepare_arguments(given: argparse.Namespace) -> None:
    """Refuse combinations that mean nothing; with --list alone, the first place is the destination."""
    for name in ("source", "destination", "list", "annotations"):
        if getattr(given, name) == "":
            raise UserError(f"{name.upper()} is empty, such as of a shell variable that is not set; write . for this folder")
    if given.list is not None:
        if given.dataset is not None:
            raise UserError("--list and --dataset both say where samples come from; leave one of them out")
        if given.destination is not None:
            raise UserError(
                f"--list {given.list} names the sources, so {given.source} is one place too many; "
                "write xkd-fast prepare --list FILE DESTINATION"
            )
        given.source, given.destination = None, given.source
    elif given.source is None:
        raise UserError("no source is named: write xkd-fast prepare SOURCE DESTINATION, or --list FILE DESTINATION")
    for name, unset in (("split", None), ("fold", None), ("annotations", None), ("subset", False), ("id_files", "auto")):
        value = getattr(given, name)
        if given.dataset is None and value != unset:
            option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise UserError(f"{option} says something of a data set; name it with --dataset")
    if given.retry and (given.audit or given.dry_run):
        raise UserError("--retry converts, --audit and --dry-run only look; leave one of them out")
    if given.audit and given.dry_run:
        raise UserError("--audit and --dry-run are two questions; ask one at a time")
    if given.audit and given.destination is not None:
        raise UserError(f"--audit writes no shards, so {given.destination} is one place too many; leave it out")
    if not given.audit and given.destination is None and not given.dry_run:
        raise UserError("no DESTINATION is named: name the folder of the shards, or ask with --dry-run or --audit")
    for name in ("json", "plot"):
        value = getattr(given, name)
        if value is not None and not given.audit:
            raise UserError(f"--{name} {value} goes with --audit")
        if value is not None:
            _require_writable(f"--{name}", value)
    if given.json is not None:
        if os.path.splitext(given.json)[1].lower() != ".json":
            raise UserError(f"--json {given.json} must end in .json, so that no video is taken for it and overwritten")
        if given.list is not None and os.path.realpath(given.json) == os.path.realpath(given.list):
            raise UserError(f"--json {given.json} is the list itself; name another file")


def _require_writable(option: str, file: str) -> None:
    folder = os.path.dirname(os.path.abspath(file))
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise UserError(f"{option} {file} cannot be written: {folder} is no folder that one may write to")
    if os.path.isdir(file):
        raise UserError(f"{option} {file} is a folder; name a file")


def _sources(given: argparse.Namespace, options: Any) -> Any:
    """The sources that the arguments of prepare name."""
    from pathlib import Path

    from xkd_fast.data.datasets import open_dataset
    from xkd_fast.data.sources import find_sources, read_list

    if given.list is not None:
        return read_list(Path(given.list))
    if given.dataset is not None:
        asked = {name: getattr(given, name) for name in ("split", "fold", "annotations", "subset", "id_files")}
        return open_dataset(given.dataset, given.source, **asked)
    return find_sources(Path(given.source), options.suffixes)


def _dry_run(given: argparse.Namespace, sources: Any, options: Any) -> int:
    """Print what prepare would do."""
    from pathlib import Path

    from xkd_fast.data.estimate import estimate
    from xkd_fast.data.prepare import standing_shards

    destination = Path(given.destination) if given.destination else None
    standing = standing_shards(sources, destination, options) if destination is not None else 0
    found = estimate(sources, options, destination=destination)
    several = sum(len(source.classes) > 1 for source in sources.sources)
    parts = sum(source.start is not None or source.end is not None for source in sources.sources)
    unlabelled = sum(not source.classes for source in sources.sources)
    print(
        f"{count_of(found.sources, 'source')} in {count_of(len(sources.classes), 'class', 'classes')}: "
        f"{count_of(found.shards, 'shard')} of at most {count_of(options.samples_per_shard, 'sample')}, "
        f"{standing} of which {'is' if standing == 1 else 'are'} there already"
    )
    for count, one, more in (
        (len(sources.missing), "file is missing", "files are missing"),
        (parts, "is a part of a file", "are parts of files"),
        (several, "has several classes", "have several classes"),
        (unlabelled, "has no class", "have no class"),
    ):
        if count:
            print(f"  {count_of(count, one, more)}")
    print(f"  {amount_of(sum(source.size for source in sources.present if source.size > 0))} to read")
    print(
        f"by {found.tried} of them, converted and thrown away: about {amount_of(found.bytes)} of shards in "
        f"{lasting(found.seconds)} with {count_of(found.workers, 'worker')}"
    )
    if found.skipped:
        reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in found.skipped.items())
        print(f"  {sum(found.skipped.values())} of these {found.tried} would be skipped: {reasons}")
    print("nothing was written")
    return 0


def _audit(given: argparse.Namespace, sources: Any, options: Any) -> int:
    """Count what the sources hold, show and write it."""
    from pathlib import Path

    from rich.console import Console

    from xkd_fast.data.audit import audit, write_json
    from xkd_fast.data.audit_figures import audit_table, plot_audit, plot_format

    if given.plot is not None:
        plot_format(Path(given.plot))
    with progress_bar("auditing") as progress:
        found = audit(sources, options, progress=progress)
    Console().print(audit_table(found))
    for path, reason in found.unreadable.items():
        print(f"unreadable: {path!r}: {reason}")
    if given.json is not None:
        write_json(found, Path(given.json))
    if given.plot is not None:
        plot_audit(found, Path(given.plot))
    return 0


def train(arguments: list[str]) -> int:
    """Pretrain, in this process alone; `deepspeed xkd_fast/train.py` and `torchrun` take the same arguments."""
    from xkd_fast.train import main as run

    return run(arguments, program="xkd-fast train")


def profile(arguments: list[str]) -> int:
    """Take a training step apart: time, arithmetic, tokens and memory of each part."""
    from pathlib import Path

    parser = _command_parser(
        "profile",
        "Take a training step on random views apart: time, FLOPs, tokens and kept memory of each part, and the share of this "
        "machine's measured matrix-product peak that the step reaches. One process, no data.",
        "  xkd-fast profile --config xkd_base_k400 --clips 32 --trace runs/step.json\n"
        "  xkd-fast profile --config demo --clips 16 model.implementation=reference train.precision=bfloat16\n"
        "  nsys profile xkd-fast profile --config xkd_base_k400 --nvtx",
    )
    parser.add_argument("--config", default="demo", help="YAML file, or the name of a shipped one (default: demo)")
    parser.add_argument("--clips", type=int, help="clips per step (default: the configuration's train.micro_batch)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: 5)")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="write a Chrome trace of one step, for Perfetto")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON")
    parser.add_argument("--nvtx", action="store_true", help="mark every range for Nsight Systems")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="options that differ from the file")
    given = parser.parse_intermixed_args(arguments)
    from rich.console import Console

    from xkd_fast.analysis.profile import profile as profile_step
    from xkd_fast.analysis.profile import profile_table, write_json
    from xkd_fast.config import load_config

    config = load_config(given.config, given.overrides)
    for option, path in (("--trace", given.trace), ("--json", given.json)):
        if path is not None and not (path.absolute().parent.is_dir() and os.access(path.absolute().parent, os.W_OK)):
            raise UserError(f"{option} {path} cannot be written: {path.absolute().parent} is no folder that one may write to")
        if path is not None and path.exists() and not path.is_file():
            raise UserError(f"{option} {path} is a folder, a device or a pipe; name a file")
    if given.trace is not None and given.json is not None and os.path.realpath(given.trace) == os.path.realpath(given.json):
        raise UserError(f"--trace and --json both name {given.json}; one would replace the other: name two files")
    console = Console()
    clips = config.train.clips_per_pass(1) if given.clips is None else given.clips
    result = profile_step(config, clips=clips, steps=given.steps, trace=given.trace, nvtx=given.nvtx, say=console.log)
    console.print(profile_table(result))
    if given.json is not None:
        write_json(result, given.json)
    return 0


def doctor(arguments: list[str]) -> int:
    """Tell what this machine has of what XKD uses."""
    parser = _command_parser(
        "doctor",
        "Tell what this machine has of what XKD uses, and what follows from what it lacks; or read shards through and list the "
        "shards that are missing and samples whose bytes are not the ones that were written (exit code 1 where there are any).",
        "  xkd-fast doctor --json\n  xkd-fast doctor --shards /data/k400/train /data/k400/test",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--shards", nargs="+", metavar="FOLDER",
        help="check the shards in these folders, or at these http(s):// addresses, not the machine")  # fmt: skip
    given = parser.parse_args(arguments)
    from xkd_fast.doctor import check_shards, examine

    if given.shards:
        return check_shards(given.shards, as_json=given.json)

    findings = examine()
    if given.json:
        import json

        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="What this machine has")
    for column in ("part", "", "version, or what follows"):
        table.add_column(column, overflow="fold")
    colours = {"found": "green", "missing": "yellow", "broken": "red"}
    for finding in findings:
        told = ": ".join(part for part in (finding.detail, finding.consequence) if part)
        table.add_row(escape(finding.name), f"[{colours[finding.status]}]{finding.status}[/]", escape(told))
    Console().print(table)
    return 0


def evaluate(arguments: list[str]) -> int:
    """Measure what a checkpoint has learnt."""
    from xkd_fast.evaluate import average_precision, svm
    from xkd_fast.evaluate.options import add_arguments

    parser = _command_parser(
        "evaluate",
        "Measure what a checkpoint has learnt, by linear SVMs on its frozen features of video, audio and both. `svm`: "
        "accuracy, for samples of one class. `map`: mean average precision, for samples of several classes.",
        "  xkd-fast evaluate svm --checkpoint runs/k400 --data /data/ucf101/train1 --test-data /data/ucf101/test1\n"
        "  xkd-fast evaluate svm --checkpoint runs/demo --data runs/demo/shards/train --train-clips 2 --untrained\n"
        "  xkd-fast evaluate map --checkpoint runs/k400 --data /data/fsd50k/dev --test-data /data/fsd50k/test --train-clips 4",
    )
    protocols = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    for name, module, measure in (
        ("svm", svm, "accuracy of linear SVMs on frozen features"),
        ("map", average_precision, "mean average precision of linear SVMs on frozen features, one for each class"),
    ):
        protocol = protocols.add_parser(name, help=measure, description=f"{measure[0].upper()}{measure[1:]}.")
        add_arguments(protocol, module.FILE)
        protocol.set_defaults(run=module.run)
    given = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = given.run
    return run(given)


def demo(arguments: list[str]) -> int:
    """Render videos, prepare shards, pretrain, evaluate and report."""
    from xkd_fast.demo import add_arguments, run

    parser = _command_parser(
        "demo",
        "Render videos with sound, prepare shards, pretrain with DeepSpeed, evaluate frozen features against the same model "
        "untrained, and write report.html. Called again, it goes on where it stopped.",
        "  xkd-fast demo\n  xkd-fast demo --processes 4 output=runs/longer train.epochs=60",
    )
    add_arguments(parser)
    return run(parser.parse_intermixed_args(arguments))


COMMANDS = {
    "render": Command("render labelled videos to play with", render),
    "prepare": Command("turn a folder of videos into shards", prepare),
    "train": Command("pretrain a model", train),
    "evaluate": Command("measure what a checkpoint has learnt", evaluate),
    "demo": Command("all of it on a small rendered data set, with a report", demo),
    "profile": Command("take a training step apart: time, FLOPs, tokens and memory of each part", profile),
    "doctor": Command("tell what this machine has, and what follows from what it lacks", doctor),
}


if __name__ == "__main__":
    sys.exit(main())

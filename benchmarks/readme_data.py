"""The README's paragraphs on data, from the JSON of `test_data`, `test_prepare` and `test_codecs`."""

from __future__ import annotations

import json
import math
from typing import Any

from benchmarks import record

Result = dict[str, Any]
VIEWS_BY = {"native": "the compiled pass", "torch": "PyTorch's operators"}


def results(kind: str) -> list[Result]:
    """What was measured, by machine."""
    return [json.loads(path.read_text()) for path in sorted(record.RESULTS.glob(f"{kind}_*.json"))]


def ranged(ratio: dict[str, float]) -> str:
    """A ratio with its range."""
    return f"{ratio['median']:.2g} × ({ratio['min']:.2g}-{ratio['max']:.2g})"


def choice_paragraph() -> str:
    """Which codec to choose when, by what was measured on CPUs."""
    found = results("data")
    if not found:
        return "Not measured yet."
    lines = []
    for result in found:
        shards = {row["name"]: row for row in result["rows"] if "stage_seconds" in row}
        fidelity = {row["codec"]: row["psnr"] for other in results("codecs") for row in other["rows"]}
        speed = {name: row["clips_per_second"]["median"] for name, row in shards.items()}
        size = {name: row["bytes_read_per_clip"] for name, row in shards.items()}
        fastest, smallest = max(speed, key=speed.__getitem__), min(size, key=size.__getitem__)
        lossless = max((name for name in shards if name in fidelity), key=fidelity.__getitem__, default=fastest)

        def told(name: str, speed: dict[str, float] = speed, size: dict[str, int] = size) -> str:
            return f"{speed[name]:.0f} clips/s with all augmentation, {size[name] / 1e3:.0f} kB read a clip"

        lines += [
            f"On {result['device']} (`benchmarks/results/data_*.json`, `codecs_*.json`):",
            "",
            "| what is short | codec | measured |",
            "|---|---|---|",
            f"| processors | `{fastest}` | {told(fastest)} |",
        ]
        if smallest != fastest:
            even = speed[smallest] * size[fastest] / 1e6
            lines.append(
                f"| disk, or a network of less than {even:.0f} MB/s for these {result['threads']} threads | `{smallest}` | "
                f"{told(smallest)} |"
            )
        lines.append(f"| players: any program is to show the files | `mjpeg` | {told('mjpeg')} |")
        psnr = f", {fidelity[lossless]:.1f} dB" if lossless in fidelity else ""
        lines += [f"| nothing but fidelity | `{lossless}` | {told(lossless)}{psnr} |", ""]
    return "\n".join(lines[:-1])


def data_paragraph() -> str:
    """Clips per second, from shards and without."""
    found = results("data")
    if not found:
        return "Not measured yet."
    lines: list[str] = []
    for result in found:
        machines = list(result["step_clips_per_second"])
        rate = result["step_clips_per_second"]
        source = result["source"]
        lines += [
            f"All views of `{result['config']}` with all augmentation, {result['batch']} clips a batch, in turns, on",
            f"{result['device']} (`benchmarks/results/data_*.json`). Sources: {source['name']}, {source['seconds']:g} s of 25",
            "frames/s, H.264 and AAC; rendered, in the page cache. Medians; ratios over rounds, with their range. Last: how",
            "many processors like these the fastest measured step of the base model would need, were the figure to scale",
            f"({'; '.join(f'{name}: {rate[name]:.3g} clips/s' for name in machines)}).",
            "",
            "| from | clips/s | with pictures by PyTorch's operators | decoded alone | on one thread "
            "| processor ms a clip | against the DataLoader | in processor time | kB read | "
            + " | ".join(f"for {name.split(',')[0]}" for name in machines)
            + " |",
            "|---|---|---|---|---|---|---|---|---|" + "---|" * len(machines),
        ]
        for row in result["rows"]:
            name = f"shards, {row['name']}" if "stage_seconds" in row else row["name"]
            decoded, one = (row.get(f"{key}_clips_per_second") for key in ("decode", "one_thread"))
            speed = row["clips_per_second"]["median"]
            cells = [name.replace("DataLoader", "a plain DataLoader, PyAV"), f"{speed:.3g}"]
            torchs = row["by_torch"]["clips_per_second"] if "by_torch" in row else None
            cells += [f"{found['median']:.3g}" if found else "–" for found in (torchs, decoded, one)]
            cells.append(f"{1e3 * row['processor_seconds_per_clip']['median']:.1f}")
            for key in ("against_loader", "against_loader_in_processor_time"):
                cells.append(ranged(row[key]) if key in row else "1 ×")
            cells.append(f"{row['bytes_read_per_clip'] / 1e3:.0f}")
            used = row["processor_seconds_per_clip"]["median"]
            cells += [_processors(rate[machine] * used) for machine in machines]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [
            "",
            f"Processor time of a clip, ms, and its share; pictures by {VIEWS_BY[result.get('views_by', 'torch')]}:",
            "",
            "| shards | read | decode | pictures | sound | pictures by PyTorch's operators, instead |",
            "|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            if stages := row.get("stage_seconds"):
                whole = sum(stages.values())
                cells = [f"{1e3 * seconds:.2f} ({seconds / whole:.0%})" for seconds in stages.values()]
                cells.append(f"{1e3 * row['by_torch']['pictures_seconds']:.2f}" if "by_torch" in row else "–")
                lines.append(f"| {row['name']} | {' | '.join(cells)} |")
        for name, reason in result["absent"].items():
            lines += ["", f"Not measured: {name}: {reason}."]
        lines += [f"Decoders: {', '.join(f'{name} {_version(version)}' for name, version in result['decoders'].items())}.", ""]
    return "\n".join(lines[:-1])


def feeding_paragraph() -> str:
    """Steps from shards beside steps on the same views."""
    found = results("feeding")
    if not found:
        return "Not measured yet."
    lines = [
        "Whole training steps fed from shards, and fed with the same views again and again, stretches in turns in one process",
        "(`benchmarks/results/feeding_*.json`; medians, ratios with their range over stretches):",
        "",
        "| model | on | shards, decoded by | clips a step | from shards, clips/s "
        "| the same views, clips/s | ratio | waiting for data |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in found:
        for row in result["rows"]:
            ratio, fed, same, share = (
                row[key]
                for key in (
                    "shards_against_synthetic",
                    "shards_clips_per_second",
                    "synthetic_clips_per_second",
                    "data_wait_share",
                )
            )
            cells = [
                f"{row['config']}, {row['precision']}",
                result["device"],
                f"{row['codec']}, the {row['decode'].upper()}",
                str(row["clips"]),
                f"{fed['median']:.3g}",
                f"{same['median']:.3g}",
                f"{ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})",
                f"{share['median']:.1%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    for result in found:
        for title in result.get("left_out", ()):
            lines += ["", f"Not reached on {result['device']}: {title}."]
        for title, reason in result.get("failed", {}).items():
            lines += ["", f"Failed on {result['device']}: {title}: {reason}."]
    return "\n".join(lines)


def _version(told: str) -> str:
    return told.removeprefix("By torchcodec ").rstrip(".")


def _processors(number: float) -> str:
    return f"{number:.1g}" if number < 1 else str(math.ceil(number))


def prepare_paragraph() -> str:
    """Source files per second."""
    found = results("prepare")
    if not found:
        return "Not measured yet."
    lines: list[str] = []
    for result in found:
        lines += [
            f"`prepare --codec mjpeg` with {result['workers']} workers beside loops that make the same of every file",
            f"(8 frames/s, short side 128, Motion JPEG, FLAC of 16 kHz), in turns on {result['device']};",
            result["ffmpeg"] or "no ffmpeg program was there",
            "(`benchmarks/results/prepare_*.json`; medians, ratios over rounds with their range):",
            "",
            "| sources | by | files/s | `prepare` is faster |",
            "|---|---|---|---|",
        ]
        for pile in result["piles"]:
            source = pile["source"]
            for row in pile["rows"]:
                ratio = "" if row["name"] == "prepare" else ranged(row["prepare_against"])
                cells = [
                    f"{source['name']}, {source['seconds']:g} s",
                    row["name"],
                    f"{row['files_per_second']['median']:.3g}",
                    ratio,
                ]
                lines.append(f"| {' | '.join(cells)} |")
        peak = max(pile["prepare_peak_bytes_of_a_process"] for pile in result["piles"]) / 2**20
        all_ = max(pile["prepare_peak_bytes_together"] for pile in result["piles"]) / 2**20
        lines += ["", f"No process of `prepare` held more than {peak:.0f} MiB, all of them together {all_:.0f} MiB.", ""]
    return "\n".join(lines[:-1])

"""Keeps the README's results true: they are generated from JSON files in ``benchmarks/results/``.

``python -m benchmarks.readme RUN`` takes up the demo run in the folder RUN (``runs/demo``) as ``demo_cpu.json`` and rewrites
the README's tables; without RUN it rewrites the tables from the JSON that is there.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.adopt import switches
from benchmarks.race import Row, untimed
from benchmarks.readme_data import choice_paragraph, data_paragraph, feeding_paragraph, prepare_paragraph
from xkd_fast.analysis.flops import PARTS, savings, step_flops, total
from xkd_fast.model.options import ModelOptions

README = Path(__file__).parent.parent / "README.md"
DEMO = "demo_cpu"


def collect(run: Path) -> dict[str, Any]:
    """What a demo run came to: accuracies, speed, sizes.

    Raises:
        ValueError: it was interrupted in between, so that its time is not known.
    """
    reports = {name: json.loads((run / "svm" / name / "svm.json").read_text()) for name in ("pretrained", "untrained")}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "demo.json").read_text())
    if summary["is_continued"]:
        raise ValueError(f"{run} was gone on with by several calls; its time is that of the last one: run the demo afresh")
    return {
        **summary,
        "chance": reports["pretrained"]["chance"],
        "top1": {name: report["top1"] for name, report in reports.items()},
        "samples": reports["pretrained"]["samples"],
        "steps": int(rows[-1]["step"]),
        "clips_per_second": statistics.median(row["clips_per_second"] for row in rows),
        "data_wait_share": statistics.median(row["data_wait_share"] for row in rows),
        "teacher_entropy": {m: rows[-1][f"{m}_teacher_entropy"] for m in ("video", "audio")},
    }


def demo_paragraph() -> str:
    """About the demo run."""
    result = json.loads((record.RESULTS / f"{DEMO}.json").read_text())
    evaluation = result["evaluation"]
    lines = [
        "One run of `make demo`, one seed: top-1 accuracy, in per cent, of linear SVMs on frozen features of",
        f"{result['samples']['test']} videos not seen in training, beside the same model at initialisation. Features of the",
        f"{evaluation['network']}s (the teachers of so short a run lag behind), {evaluation['train_clips']} training clip per",
        f"video, C of {', '.join(f'{c:g}' for c in evaluation['svm_c'])}.",
        "Data and schedule were chosen on clips of another seed than the test's.",
        "",
        "| features | pretrained | untrained | chance |",
        "|---|---|---|---|",
    ]
    for modality in result["top1"]["pretrained"]:
        cells = [result["top1"][name][modality] for name in ("pretrained", "untrained")] + [result["chance"]]
        lines.append(f"| {modality} | " + " | ".join(f"{100 * cell:.1f}" for cell in cells) + " |")
    behind = [m for m, accuracy in result["top1"]["pretrained"].items() if accuracy <= result["top1"]["untrained"][m]]
    if behind:
        lines += ["", f"A run this short does not improve {' and '.join(behind)} features yet."]
    share = f"{result['data_wait_share']:.0%} of the time waiting for data"
    time = f"The whole of it took {result['seconds']:.0f} s with {result['processes']} processes of"
    time += f" {result['threads_per_process']} thread:"
    speed = f"{result['steps']} steps at {result['clips_per_second']:.0f} clips/s (median), {share},"
    lines += ["", time, speed, f"on {result['device']}, torch {result['torch']} (`benchmarks/results/{DEMO}.json`)."]
    return "\n".join(lines)


def step_paragraph() -> str:
    """About the full training step, every measured one."""
    results = [json.loads(path.read_text()) for path in sorted(record.RESULTS.glob("step_*.json"))]
    if not results:
        return "Not measured yet."
    lines = [
        "The full step (forward, backward, per-tensor clipping, AdamW, teachers, centres), contestants in turns; ratios are",
        "medians over rounds, with their range; kept: bytes for the backward pass, over the reference's",
        "(`benchmarks/results/step_*.json`).",
        "",
        "| model | precision | clips | on | switches | fast, clips/s | against the reference | against the strong one | kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["rows"]:
            told = [against(row, name) for name in ("reference", "strong")]
            plain = "strong" in row["fast_against"] and not result.get("strong_is_compiled", True)
            told[1] += ", not compiled" if plain else ""
            costs, speed = row["costs"], row["clips_per_second"].get("fast")
            both = {"fast", "reference"} <= costs.keys()
            kept = f"{costs['fast']['saved_bytes'] / costs['reference']['saved_bytes']:.2f} ×" if both else "–"
            place = result["device"].split(",")[0]
            case = [result["model"], result["precision"], row["clips"], place]
            rows = [[*case, "off", f"{speed:.3g}" if speed else "–", *told, kept]]
            if taken := taken_by_auto(result, row):
                rows.append([*case, ", ".join(taken), *speeds_with(row, taken), "–"])
            lines += [f"| {' | '.join(map(str, cells))} |" for cells in rows]
    if any(taken_by_auto(result, row) for result in results for row in result["rows"]):
        lines += [
            "",
            "With switches on, which is what `auto` takes there, a step was timed in turns with that of all switches off: its",
            "ratios are quotients of median speeds, without a range. What it keeps for the backward pass was not counted.",
        ]
    slow = [
        f"{result['model']} in {result['precision']} on {result['device'].split(',')[0]}"
        for result in results
        for speeds in [[row["clips_per_second"] for row in result["rows"]]]
        if any(speed.get("strong", inf) < speed.get("reference", 0) for speed in speeds)
    ]
    if slow:
        lines += ["", f"The strong contestant is slower than the reference for {', '.join(slow)}:"]
        lines += ["its fused attention is made for GPUs."]
    machines = sorted({f"{result['device']}, torch {result['torch']}" for result in results})
    return "\n".join([*lines, "", f"On {'; '.join(machines)}."])


def taken_by_auto(result: dict[str, Any], row: Row) -> list[str]:
    """The fast model's switches that ``auto`` turns on for a row measured on a GPU; none elsewhere."""
    if not result.get("gpu"):
        return []
    return switches([{**result, "rows": [row]}])[result["gpu"]][result["precision"]][str(row["clips"])]


def speeds_with(row: Row, taken: Sequence[str]) -> list[str]:
    """Clips/s with these switches on, and how many times those of the reference and of the strong one they are."""
    speeds = row["clips_per_second"]
    own = speeds[" + ".join(("fast", *taken))]
    return [f"{own:.3g}", *(f"{own / speeds[name]:.2f} ×" if name in speeds else "–" for name in ("reference", "strong"))]


def against(row: Row, name: str) -> str:
    """The fast model's speed over a rival's, or why there is no such figure."""
    ratio = row["fast_against"].get(name)
    if ratio is None:
        return untimed(row).get(name, "not measured")
    short = ", memory was short" if row["allocation_retries"].get(name) else ""
    return f"{ratio['median']:.2f} × ({ratio['min']:.2f}-{ratio['max']:.2f}){short}"


def optimizer_paragraph() -> str:
    """About the optimiser's step alone."""
    results = [json.loads(path.read_text()) for path in sorted(record.RESULTS.glob("optimizer_*.json"))]
    if not results:
        return "Not measured yet."
    names = {"foreach": "PyTorch's multi-tensor operators throughout", "fused": "`torch.optim.AdamW(fused=True)` and those"}
    lines = [
        "The optimiser's step on the base model's tensors (clipping, AdamW, teachers and their bfloat16 copies), in turns with",
        "PyTorch's; medians, ratios with their range (`benchmarks/results/optimizer_*.json`).",
        "",
        "| device | backend | ms | floor, ms | against | their ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        floor = 1e3 * result["floor"]["bytes"] / result["floor"]["bytes_per_second_in_place"]
        for name, rival in result["rivals"].items():
            own, other = (1e3 * rival["seconds"][each]["median"] for each in ("xkd", name))
            ratio = f"{rival['ratio']['median']:.2f} × ({rival['ratio']['min']:.2f}-{rival['ratio']['max']:.2f})"
            cells = [result["device"], result["backend"], f"{own:.0f}", f"{floor:.0f}", names[name], f"{other:.0f}", ratio]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Floor: what has to be read and written, at the speed of scaling a large tensor in place."])


def flops_paragraph() -> str:
    """About the base model's arithmetic, part by part."""
    steps = {name: step_flops(ModelOptions(implementation=name)) for name in ("reference", "fast")}
    lines = [
        "Matrix products of the base model's step, forward and backward, GFLOP per clip (`xkd_fast/analysis/flops.py`):",
        "",
        "| part | reference | fast |",
        "|---|---|---|",
    ]
    for part in PARTS:
        lines.append(f"| {part} | " + " | ".join(f"{step[part].total / 1e9:.2f}" for step in steps.values()) + " |")
    lines.append("| all | " + " | ".join(f"{total(step).total / 1e9:.2f}" for step in steps.values()) + " |")
    listed = [f"{reason} {amount / 1e9:+.2f}" for reason, amount in savings(ModelOptions()).items()]
    note = "The method's description counts 440.16: refinement's outer products too, which are elementwise here."
    return "\n".join([*lines, "", f"Saved (+) and spent (-): {'; '.join(listed)}. {note}"])


def seeds_paragraph() -> str:
    """About training in bfloat16 by the fast model beside training in float32 by the reference, and with teachers in FP8."""
    told = [
        "Does it train as the reference does? The demo's run, the reference in float32 and the fast model in bfloat16.",
        *seeds_table("seeds_cpu", ("reference, float32", "fast, bfloat16")),
    ]
    if (record.RESULTS / "seeds_fast_fp8_cpu.json").is_file():
        told += ["", "The same with teachers in FP8 (`model.teacher_precision=fp8`), which a CPU emulates number by number."]
        told += seeds_table("seeds_fast_fp8_cpu", ("fast, bfloat16", "teachers in FP8"))
    return "\n".join(told)


def seeds_table(name: str, titles: tuple[str, str]) -> list[str]:
    """Lines about two kinds of runs, the first what the second is held against."""
    result = json.loads((record.RESULTS / f"{name}.json").read_text())
    seeds, noise = len(result["seeds"]), {m: row["expected_difference"] for m, row in result["top1"].items()}
    lines = [
        f"{seeds} seeds of each (`benchmarks/results/{name}.json`): top-1 accuracy by seed, the difference of the means,",
        "and the standard deviation that seeds alone give such a difference:",
        "",
        f"| features | {titles[0]} | {titles[1]} | difference | noise |",
        "|---|---|---|---|---|",
    ]
    beyond = []
    for modality, expected in noise.items():
        plain, other = (accuracies[modality] for accuracies in result["top1_by_seed"].values())
        difference = statistics.mean(other) - statistics.mean(plain)
        shown = [" ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies) for accuracies in (plain, other)]
        lines.append(f"| {modality} | {shown[0]} | {shown[1]} | {100 * difference:+.1f} | {100 * expected:.1f} |")
        if abs(difference) > 2 * expected > 0:
            beyond.append(modality)
    losses = [f"{term} {row['difference']:.3f} ({row['expected_difference']:.3f})" for term, row in result["losses"].items()]
    silent = ", ".join(f"`{modality}`" for modality, expected in noise.items() if expected == 0)
    told = f"Beyond two deviations: {', '.join(beyond)}" if beyond else "All lie within two deviations"
    told += f", but for {silent}, where seeds agree by chance and tell no deviation." if silent else "."
    curves = f"Losses over the run, difference of the mean curves (from seeds alone), root mean squares: {', '.join(losses)}."
    return [*lines, "", told, curves]


def objectives_paragraph() -> str:
    """About heads, refinement and losses by themselves."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(record.RESULTS.glob("objectives_*.json"))}
    if not results:
        return "Not measured yet."
    names = {"plain": "the reference's code", "torch": "ours, by PyTorch's operators", "kernels": "ours, by our kernels"}
    lines = [
        "Heads, refinement and losses of the base model by themselves, forward and backward, and their share of the fast",
        "model's whole step with them (`benchmarks/results/objectives_*.json`; ratios are medians over rounds, with ranges).",
        "In brackets, shares of what the whole step launches and keeps: the reference's of the reference's step, ours of ours",
        "(`step_*.json`).",
        "",
        "| device | precision | clips | code | ms | share of a step | faster | launches | kept, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for file, result in results.items():
        for row in result["rows"]:
            costs = costs_of_step(file.replace("objectives", "step"), row)
            for name, seconds in row["seconds"].items():
                step = row["step_seconds"]["plain" if name == "plain" else "torch"]["median"]
                ratio, share = row["plain_against"][name], seconds["median"] / step
                faster = "" if name == "plain" else f"{ratio['median']:.2f} × ({ratio['min']:.2f}-{ratio['max']:.2f})"
                whole = costs.get("reference" if name == "plain" else "fast", {})
                shares = {kind: f" ({row[kind][name] / count:.0%})" for kind, count in whole.items() if kind in row}
                launches = f"{row['launches'][name]}{shares.get('launches', '')}"
                kept = f"{row['saved_bytes'][name] / 2**20:.0f}{shares.get('saved_bytes', '')}"
                cells = [result["device"], row["precision"], row["clips"], names[name], f"{1e3 * seconds['median']:.0f}"]
                cells += [f"{share:.1%}", faster, launches, kept]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def costs_of_step(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """What XKD's whole step costs by contestant, as counted in the place, type and batch size of ``row``; empty if nowhere."""
    path = record.RESULTS / f"{name}_xkd_{row['precision']}.json"
    steps = json.loads(path.read_text())["rows"] if path.is_file() else []
    return next((step["costs"] for step in steps if step["clips"] == row["clips"]), {})


def ablation_paragraph() -> str:
    """About what every technique is worth."""
    results = [json.loads(path.read_text()) for path in sorted(record.RESULTS.glob("ablation_*.json"))]
    if not results:
        return "What each technique is worth by itself (`bash benchmarks/gpu.sh --ablate`) has not been measured yet."
    lines = [
        "The fast model's step without one technique, over the step with all of them, and what is then kept for the backward",
        "pass (`benchmarks/results/ablation_*.json`). Last, techniques that are off by default: the step with them.",
    ]
    for result in results:
        for row in result["rows"]:
            fast = row["costs"].get("fast", {}).get("saved_bytes")
            machine = f"{result['precision']}, {row['clips']} clips, {result['device']}"
            lines += ["", f"| {machine} | time | kept |", "|---|---|---|"]
            for kind in ("without", "with"):
                for name in result[kind]:
                    ratio = row["fast_against"].get(name)
                    time = (
                        f"{ratio['median']:.2f} × ({ratio['min']:.2f}-{ratio['max']:.2f})"
                        if ratio
                        else untimed(row).get(name, "–")
                    )
                    costs = row["costs"].get(name)
                    kept = f"{costs['saved_bytes'] / fast:.2f} ×" if costs and fast else "–"
                    lines.append(f"| {kind} {name.removeprefix('fast + ')} | {time} | {kept} |")
    return "\n".join(lines)


def codecs_paragraph() -> str:
    """About the codecs of shards on CPUs."""
    results = [json.loads(path.read_text()) for path in sorted(record.RESULTS.glob("codecs_*.json"))]
    if not results:
        return "Not measured yet."
    lines = []
    for result in results:
        lines += [
            f"Clips of {result['frames']} frames of {result['height']} × {result['width']} out of {result['videos']} rendered "
            "videos of ten seconds, decoded in turns",
            f"with their sound on {result['device']} (`benchmarks/results/codecs_*.json`; ratios are medians over rounds, with",
            "their range; cameras' pictures come to other sizes and fidelities):",
            "",
            "| codec | quality | kB a clip | PSNR, dB | encoding, ms a frame | decoding on the CPU, clips/s | against mjpeg |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            size, encoding = f"{row['bytes_per_clip'] / 1e3:.0f}", f"{1e3 * row['encode_seconds_per_frame']:.2f}"
            speed, ratio = row.get("clips_per_second"), row.get("against_mjpeg")
            decoding = f"{speed['median']:.0f}" if speed else "–"
            against = f"{ratio['median']:.2f} × ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "–"
            cells = [row["codec"], row["quality"] or "–", size, f"{row['psnr']:.1f}", encoding, decoding, against]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


PARAGRAPHS = {
    "choice": choice_paragraph,
    "codecs": codecs_paragraph,
    "data": data_paragraph,
    "feeding": feeding_paragraph,
    "prepare": prepare_paragraph,
    "seeds": seeds_paragraph,
    "flops": flops_paragraph,
    "demo": demo_paragraph,
    "step": step_paragraph,
    "optimizer": optimizer_paragraph,
    "objectives": objectives_paragraph,
    "ablation": ablation_paragraph,
}


def with_paragraph(readme: str, name: str, paragraph: str) -> str:
    """The README's text with a paragraph in the place that carries its name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{paragraph}\n{end}{after}"


def main(arguments: list[str]) -> None:
    """Take up a run, if one is named, and rewrite the README."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        sys.exit(__doc__)
    if arguments and not (Path(arguments[0]) / "demo.json").exists():
        sys.exit(f"error: {arguments[0]} holds no finished demo run: demo.json is missing")
    if arguments:
        record.write(DEMO, collect(Path(arguments[0])))
    text = README.read_text()
    for name, paragraph in PARAGRAPHS.items():
        text = with_paragraph(text, name, paragraph())
    README.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])

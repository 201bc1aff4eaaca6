"""``report.html``: what a run learnt and how, in pictures, as one file that needs no network.

Loss curves, the entropy of the teachers' distributions (a flat line at ln K means that distillation teaches nothing), clips
with their masked input and reconstruction for video and spectrogram, and the evaluation's table.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xkd_fast.errors import UserError
from xkd_fast.files import write_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from xkd_fast.config import Config
    from xkd_fast.data.views import MaskNoise, Views
    from xkd_fast.reference import XKD

PANELS = (
    ("Total loss", ("total",)),
    ("Masked reconstruction", ("video_reconstruction", "audio_reconstruction")),
    ("Cross-modal distillation", ("video_to_audio_distillation", "audio_to_video_distillation")),
    ("Domain alignment (MMD)", ("student_alignment", "teacher_alignment")),
    ("Entropy of the teachers (nats)", ("video_teacher_entropy", "audio_teacher_entropy")),
    ("Learning rate", ("learning_rate",)),
)


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a sentence, and its content in HTML."""

    title: str
    text: str
    content: str


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.jsonl``; a torn last line is left out.

    Raises:
        UserError: if there are none.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; train first, with log.jsonl = true")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    if not rows:
        raise UserError(f"{path} holds no metrics yet")
    return rows


def unpatchify(patches: Tensor, grid: Sequence[int], patch: Sequence[int], channels: int) -> Tensor:
    """The inverse of ``patchify``: [B, N, P] → [B, C, *sizes] (sizes = grid × patch)."""
    batch, axes = patches.shape[0], len(grid)
    x = patches.reshape(batch, *grid, *patch, channels)
    order = [0, 1 + 2 * axes] + [position for axis in range(axes) for position in (1 + axis, 1 + axes + axis)]
    return x.permute(order).reshape(batch, channels, *(g * p for g, p in zip(grid, patch, strict=True)))


@torch.no_grad()
def reconstruct(model: XKD, modality: str, clip: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A clip's masked input (hidden patches are NaN) and its reconstruction (visible patches as they were), like ``clip``.

    The decoder predicts each patch normalised by its own mean and variance; both are put back from the clip, as masked
    autoencoders are usually shown.
    """
    from xkd_fast.reference import TARGET_EPS, patchify

    options = model.options.video if modality == "video" else model.options.audio
    predicted, order, _ = model.autoencode(modality, clip, noise)
    patches = patchify(clip, options.patch)
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    hidden = torch.ones(patches.shape[:2], dtype=torch.bool).scatter(1, order[:, : options.keep], False).unsqueeze(-1)
    restored = torch.where(hidden, predicted * (variance + TARGET_EPS).sqrt() + mean, patches)
    masked = patches.masked_fill(hidden, float("nan"))
    shape = (options.grid, options.patch, clip.shape[1])
    return unpatchify(masked, *shape), unpatchify(restored, *shape)


def curves(rows: list[dict[str, float]], prototypes: int) -> Figure:
    """Metrics over steps, a panel a kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    steps = [row["step"] for row in rows]
    for axis, (title, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name in names:
            values = [row.get(name, math.nan) for row in rows]
            marker = "o" if sum(map(math.isfinite, values)) == 1 else ""  # one point alone draws no line
            axis.plot(steps, values, marker=marker, label=name.replace("_", " "), linewidth=1.2)
        if "entropy" in names[0]:
            axis.axhline(math.log(prototypes), color="grey", linestyle=":", label=f"uniform: ln {prototypes}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimiser step", fontsize=8)
        axis.grid(alpha=0.25)
        if len(names) > 1:
            axis.legend(fontsize=7)
    return figure


def to_pixels(frames: Tensor, config: Config) -> np.ndarray:
    """Normalised frames [3, T, H, W] → [T, H, W, 3] in 0-1; hidden (NaN) pixels become mid-grey."""
    video = config.model.video
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (video.pixel_mean, video.pixel_std))
    return torch.nan_to_num(frames * std + mean, nan=0.5).clamp(0, 1).permute(1, 2, 3, 0).numpy()


def video_pictures(config: Config, clip: Tensor, masked: Tensor, restored: Tensor, title: str, shown: int = 8) -> Figure:
    """Frames of one clip: as it is, masked, reconstructed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.45 * shown, 4.8), layout="constrained")
    times = np.linspace(0, clip.shape[1] - 1, shown).round().astype(int)
    axes = figure.subplots(3, shown)
    for row, (label, frames) in enumerate((("clip", clip), ("masked", masked), ("restored", restored))):
        pixels = to_pixels(frames, config)
        for column, time in enumerate(times):
            axis = axes[row, column]
            axis.imshow(pixels[time])
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(f"{time / config.data.fps:.2f} s", fontsize=8)
        axes[row, 0].set_ylabel(label, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def audio_pictures(config: Config, clip: Tensor, masked: Tensor, restored: Tensor, title: str) -> Figure:
    """The log-mel spectrogram of one clip: as it is, masked, reconstructed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.6, 2.6), layout="constrained")
    low, high = float(clip.min()), float(clip.max())
    for axis, (label, image) in zip(
        figure.subplots(1, 3), (("clip", clip), ("masked", masked), ("restored", restored)), strict=True
    ):
        seconds = clip.shape[-1] * config.mel.hop / config.data.sample_rate
        extent = (0, seconds, 0, clip.shape[-2])
        axis.set_facecolor("0.5")
        axis.imshow(image[0].numpy(), origin="lower", aspect="auto", vmin=low, vmax=high, extent=extent, cmap="magma")
        axis.set_title(label, fontsize=9)
        axis.set_xlabel("seconds", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def embed(figure: Figure) -> str:
    """A figure as an HTML image with its data inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=95)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def reconstruction_section(config: Config, model: XKD, views: Views, masks: MaskNoise, titles: Sequence[str]) -> Section:
    """Masked input and reconstruction of every clip in ``views``."""
    pictures = []
    video = (views.video_global, *reconstruct(model, "video", views.video_global, masks.video))
    audio = (views.audio_global, *reconstruct(model, "audio", views.audio_global, masks.audio))
    for index, title in enumerate(titles):
        pictures.append(embed(video_pictures(config, video[0][index], video[1][index], video[2][index], title)))
        pictures.append(embed(audio_pictures(config, audio[0][index], audio[1][index], audio[2][index], title)))
    shares = f"{config.model.video.mask_ratio:.0%} of the video and {config.model.audio.mask_ratio:.0%} of the audio tokens"
    text = f"Clips the model has not seen in training. {shares} are hidden from the encoder (grey)."
    return Section("What the model sees and what it restores", text, "\n".join(pictures))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def summary_section(config: Config, rows: list[dict[str, float]]) -> Section:
    """What was trained, in a few figures."""
    last, model = rows[-1], config.model
    facts: list[tuple[str, Any]] = [
        ("variant", f"{model.variant}, {model.implementation} implementation"),
        ("encoder", f"{model.encoder.depth} blocks × {model.encoder.width}, {model.encoder.heads} heads"),
        ("video view", f"{model.video.frames} frames of {model.video.size}×{model.video.size} pixels"),
        ("audio view", f"log-mel, {model.audio.mel_bins} bins × {model.audio.frames} frames"),
        ("optimiser steps", f"{last['step']:.0f} of {config.train.global_batch} clips"),
        ("speed", f"{np.median([row['clips_per_second'] for row in rows]):.1f} clips/s (median)"),
        ("waiting for data", f"{np.median([row['data_wait_share'] for row in rows]):.1%} of the time (median)"),
        ("final loss", f"{last['total']:.4f}"),
    ]
    return Section("The run", "", table(("", ""), [(name, str(value)) for name, value in facts]))


def curve_section(config: Config, rows: list[dict[str, float]]) -> Section:
    """Loss curves."""
    text = (
        "Every logged step; averages over all ranks. Distillation is a cross entropy with targets that the teachers make and "
        "sharpen as they learn: it, and the total with it, may rise while the features get better."
    )
    return Section("Training", text, embed(curves(rows, config.model.head.prototypes)))


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } img { max-width: 100% }
table { border-collapse: collapse; margin: .6rem 0 }
td, th { padding: .25rem .9rem; border-bottom: 1px solid #ddd; text-align: left }
"""


def write_report(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page; replaces ``path`` in one step."""
    parts = [f"<h2>{html.escape(s.title)}</h2><p>{html.escape(s.text)}</p>{s.content}" for s in sections]
    page = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    page += f"</head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, page.encode())

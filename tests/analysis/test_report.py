"""The report: pictures show what they say, and the page stands alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import random_batch, tiny_options
from xkd_fast.analysis import report
from xkd_fast.config import load_config
from xkd_fast.errors import UserError
from xkd_fast.reference import XKD, patchify


@pytest.mark.parametrize(("grid", "patch", "channels"), [((4, 6, 5), (2, 2, 3), 3), ((4, 6), (2, 5), 1)])
def test_unpatchify_undoes_patchify(grid: tuple[int, ...], patch: tuple[int, ...], channels: int) -> None:
    """Red if an axis is swapped: pictures would look scrambled."""
    clip = torch.randn(2, channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    assert torch.equal(report.unpatchify(patchify(clip, patch), grid, patch, channels), clip)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_reconstruction_hides_and_keeps_the_right_patches(modality: str) -> None:
    """Red if visible patches are repainted, or the hidden ones are others than the model's."""
    options = tiny_options()
    model = XKD(options).double()
    views, masks = random_batch(options, 2)
    clip, noise = (views.video_global, masks.video) if modality == "video" else (views.audio_global, masks.audio)
    part = options.video if modality == "video" else options.audio
    masked, restored = report.reconstruct(model, modality, clip, noise)
    hidden = patchify(masked, part.patch).isnan().all(-1)
    assert torch.equal(hidden, patchify(masked, part.patch).isnan().any(-1))
    threshold = noise.sort(dim=1).values[:, part.keep - 1 : part.keep]
    assert torch.equal(hidden, noise > threshold)
    seen = ~masked.isnan()
    assert torch.equal(masked[seen], clip[seen])
    assert torch.equal(restored[seen], clip[seen])
    assert not torch.isclose(restored[~seen], clip[~seen]).all()


def test_perfect_prediction_restores_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if mean and variance are not put back: restored pictures would have wrong colours."""
    options = tiny_options()
    model = XKD(options).double()
    views, masks = random_batch(options, 2)
    patches = patchify(views.video_global, options.video.patch)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    order = masks.video.argsort(dim=1)
    monkeypatch.setattr(model, "autoencode", lambda *arguments: (target, order, None))
    _, restored = report.reconstruct(model, "video", views.video_global, masks.video)
    assert torch.allclose(restored, views.video_global, atol=1e-9)


def test_metrics_of_an_interrupted_run_are_read(tmp_path: Path) -> None:
    """Red if a torn last line is fatal, or a missing file gives a traceback."""
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match="train first"):
        report.read_metrics(path)
    path.write_text('{"step": 1}\n{"step": 2, "to')
    assert report.read_metrics(path) == [{"step": 1}]
    path.write_text("")
    with pytest.raises(UserError, match="no metrics"):
        report.read_metrics(path)


def test_one_logged_step_is_a_point_in_every_panel() -> None:
    """Red if the curves of a short run are blank."""
    names = [name for _, group in report.PANELS for name in group]
    figure = report.curves([{"step": 1, **dict.fromkeys(names, 0.5)}], prototypes=8)
    drawn = {line.get_label(): line.get_marker() for axis in figure.axes for line in axis.lines}
    assert {drawn[name.replace("_", " ")] for name in names} == {"o"}


def test_page_stands_alone(tmp_path: Path) -> None:
    """Red if the page needs a file or a network beside it, or text is not escaped."""
    config = load_config("demo", [])
    model_options = replace(config.model, encoder=tiny_options().encoder, decoder=tiny_options().decoder)
    model = XKD(model_options)
    views, masks = random_batch(model_options, 1, dtype=torch.float32)
    names = [name for _, group in report.PANELS for name in group] + ["clips_per_second", "data_wait_share"]
    rows = [{"step": step, **dict.fromkeys(names, 0.5 / (1 + step))} for step in range(5)]
    sections = [
        report.Section("<b>", "a < b", report.table(("x",), [("<i>",)])),
        report.summary_section(config, rows),
        report.curve_section(config, rows),
        report.reconstruction_section(config, model, views, masks, ["pendulum"]),
    ]
    page = tmp_path / "deep" / "report.html"
    report.write_report(page, "demo", sections)
    text = page.read_text()
    assert text.count('src="data:image/png;base64,') == 3 and text.count("<img") == 3
    assert "http" not in text and "<b>" not in text and "<i>" not in text and json.dumps("a &lt; b")[1:-1] in text
    assert list(page.parent.iterdir()) == [page]

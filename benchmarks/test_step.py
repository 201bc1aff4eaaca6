"""The plain reference's full training step: forward, backward, clip, AdamW, teachers, centres. The baseline of all claims."""

from __future__ import annotations

import time

import torch

from benchmarks import record
from xkd_fast import reference
from xkd_fast.data.views import Views
from xkd_fast.model.options import AudioOptions, DecoderOptions, EncoderOptions, HeadOptions, ModelOptions, VideoOptions

TINY = ModelOptions(
    video=VideoOptions(frames=8, size=32, local_frames=4, local_size=16),
    audio=AudioOptions(mel_bins=16, frames=64, local_frames=32),
    encoder=EncoderOptions(32, 2, 2),
    decoder=DecoderOptions(16, 1, 2),
    head=HeadOptions(32, 16, 64),
)


def synthetic_views(options: ModelOptions, clips: int, device: torch.device) -> Views:
    """Random views of the model's sizes."""
    video, audio = options.video, options.audio
    local = (clips, video.channels, video.local_frames, video.local_size, video.local_size)
    return Views(
        video_global=torch.randn(clips, video.channels, video.frames, video.size, video.size, device=device),
        audio_global=torch.randn(clips, 1, audio.mel_bins, audio.frames, device=device),
        video_locals=[torch.randn(local, device=device) for _ in range(video.local_views)],
        audio_locals=[
            torch.randn(clips, 1, audio.mel_bins, audio.local_frames, device=device) for _ in range(audio.local_views)
        ],
    )


def reference_step(model: reference.XKD, optimizer: torch.optim.Optimizer, views: Views) -> float:
    """One whole step; returns the loss, which waits for the device."""
    losses = model(views)
    optimizer.zero_grad()
    losses.total.backward()
    reference.clip_gradients(model, 0.3)
    optimizer.step()
    reference.update_teachers(model, 0.997, 0.997)
    reference.update_centres(model, losses.outputs.teacher_means)
    return float(losses.total.detach())


def test_reference_step(measuring: bool) -> None:
    """Times the base model's step; at smoke size checks that repeated steps on one batch lower the loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    options = ModelOptions() if measuring else TINY
    sizes = ((32, 128) if device.type == "cuda" else (2,)) if measuring else (4,)
    model = reference.XKD(options).to(device)
    optimizer = torch.optim.AdamW(reference.parameter_groups(model, 0.3), lr=1e-4 if measuring else 3e-3, betas=(0.9, 0.95))
    rows = []
    for clips in sizes:
        views = synthetic_views(options, clips, device)
        losses, seconds = [], []
        for _ in range(6):
            start = time.perf_counter()
            losses.append(reference_step(model, optimizer, views))
            seconds.append(time.perf_counter() - start)
        assert all(loss == loss for loss in losses)
        if not measuring:
            assert min(losses[-2:]) < losses[0]
        timing = record.spread(seconds[1:])
        rows.append({"clips": clips, "seconds": timing, "clips_per_second": clips / timing["median"]})
        print(f"reference, float32, {clips} clips: {rows[-1]['clips_per_second']:.2f} clips/s")
    if measuring:
        record.write(f"reference_step_{device.type}", {"model": "xkd base", "precision": "float32", "rows": rows})

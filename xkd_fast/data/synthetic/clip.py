"""One clip: rendered in memory, written as a video file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from xkd_fast.data.synthetic.events import EVENTS
from xkd_fast.data.synthetic.options import CLASSES, SyntheticOptions
from xkd_fast.data.synthetic.picture import render_frames
from xkd_fast.data.synthetic.scene import Clip, Scene
from xkd_fast.data.synthetic.sounds import render_sound
from xkd_fast.errors import UserError


def render_clip(class_name: str, index: int, options: SyntheticOptions) -> Clip:
    """Render one clip in memory.

    Args:
        class_name: one of ``CLASSES``.
        index: number of the clip within its class, 0 or more.
        options: sizes, rates, seed and difficulty; ``clips_per_class`` and ``classes`` have no influence.

    Returns:
        Clip: frames [T, H, W, 3] uint8, waveform [samples] float32, event times in seconds.

    Raises:
        UserError: unknown class name.
    """
    if class_name not in CLASSES:
        raise UserError(f"class {class_name!r} is not one of: {', '.join(CLASSES)}")
    rng = np.random.default_rng([options.seed, CLASSES.index(class_name), index])
    frames = round(rng.uniform(*options.seconds) * options.fps)
    low, high = options.radius
    size = rng.uniform(low, high)
    scene = Scene(
        rng=rng,
        options=options,
        frame_times=np.arange(frames) / options.fps,
        sample_times=np.arange(round(frames * options.sample_rate / options.fps)) / options.sample_rate,
        size=size,
        register=float(np.clip((high - size) / (high - low) + rng.normal(0, 0.08), 0, 1)),
    )
    event = EVENTS[class_name](scene)
    return Clip(render_frames(scene, event), render_sound(scene, event), np.asarray(event.times, np.float64))


# With pixel noise a clip of 95 frames takes 0.05 s to encode so, against 0.13 s at x264's "veryfast" and crf 20.
_H264 = {"preset": "superfast", "crf": "24", "threads": "1"}


def write_clip(path: str | os.PathLike[str], clip: Clip, *, fps: int, sample_rate: int) -> None:
    """Write a clip as H.264 and AAC in an MP4 file; sound and picture start together.

    Args:
        path: the file; it appears only when it is complete.
        clip: frames [T, H, W, 3] uint8 and waveform [samples] float32.
        fps: frames per second.
        sample_rate: audio samples per second.
    """
    import av

    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    _, height, width, _ = clip.frames.shape
    try:
        with av.open(str(part), "w", format="mp4") as container:
            video: Any = container.add_stream("libx264", rate=fps, options=_H264)
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            audio: Any = container.add_stream("aac", rate=sample_rate, layout="mono", options={"aac_coder": "fast"})
            audio.bit_rate = 64000
            for second in range(math.ceil(len(clip.frames) / fps)):  # interleaved a second at a time
                for image in clip.frames[second * fps : (second + 1) * fps]:
                    container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                start = second * sample_rate
                sound = clip.waveform[start : start + sample_rate]
                if len(sound):
                    block = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound)[None], format="fltp", layout="mono")
                    block.sample_rate, block.pts = sample_rate, start
                    container.mux(audio.encode(block))
            container.mux(video.encode(None))
            container.mux(audio.encode(None))
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

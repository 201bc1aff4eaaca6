"""From encoded clips to views with a given number of threads: what the pipeline runs, and what calibration times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xkd_fast.data.augment import ViewMaker
from xkd_fast.data.beside import moved
from xkd_fast.data.decode import ENGINE_SHARE, ClipDecoder
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.data.prefetch import single_threaded_pool
from xkd_fast.data.views import AugmentOptions, ClipDraw, Views, ViewShape

CLIPS_TOGETHER = 32  # whose views a GPU makes in one go; a CPU makes those of each clip in a thread


@dataclass(frozen=True)
class Setting:
    """How fast batches are made, and nothing of what they hold."""

    threads: int  # that decode, and as many that augment on a CPU
    prefetch: int  # finished micro-batches kept ahead of the step
    engine_share: float = ENGINE_SHARE  # of JPEGs, 0-1, that a GPU's JPEG engine decodes


class BatchMaker:
    """Decoder, threads and augmentation.

    Args:
        setting: how many threads.
        files: decoded at a time, at most.
        codec: of all videos.
        decode_on: where pictures are decoded.
        device: where views are made.
        shape: sizes of the clip and its views.
        augment: how views are made.
        mel: the log-mel front end.
    """

    def __init__(
        self,
        setting: Setting,
        files: int,
        codec: str,
        decode_on: torch.device,
        device: torch.device,
        shape: ViewShape,
        augment: AugmentOptions,
        mel: MelOptions,
    ) -> None:
        self.decoder = ClipDecoder(files, setting.threads, codec, decode_on, setting.engine_share)
        self.pool = single_threaded_pool(setting.threads)
        self.maker = ViewMaker(shape, augment, mel, device=device)
        self.device = device
        self.together = device.type != "cpu"  # whether clips are augmented as a batch, rather than one in each thread

    def moved(self, clips: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Frames [T, H, W, 3] uint8 and sounds [samples] float32 of clips where their views are made."""
        return [(moved(frames, self.device), moved(sound, self.device)) for frames, sound in clips]

    def views(self, clips: Sequence[tuple[Tensor, Tensor]], draws: Sequence[ClipDraw]) -> Views:
        """Views, each [clips, ...] as of `ViewMaker.empty`, of clips that are `moved` already."""
        views = self.maker.empty(len(clips))

        def fill(start: int, stop: int) -> None:
            frames, sounds = zip(*clips[start:stop], strict=True)
            self.maker.fill(views, slice(start, stop), frames, sounds, draws[start:stop])

        if self.together:
            for start in range(0, len(clips), CLIPS_TOGETHER):
                fill(start, min(start + CLIPS_TOGETHER, len(clips)))
        else:
            list(self.pool.map(lambda row: fill(row, row + 1), range(len(clips))))
        return views

    def close(self) -> None:
        """End its threads."""
        self.pool.shutdown()

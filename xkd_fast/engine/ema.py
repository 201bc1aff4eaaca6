"""Teachers follow their students: θ_t ← m·θ_t + (1 − m)·θ_s, in float32, after the optimiser's step (XKD.md section 8)."""

from __future__ import annotations

import torch
from torch import nn


class TeacherUpdate:
    """The update of both teachers as a few multi-tensor operations.

    A teacher stack shared by the modalities (XKD-MATS) moves once, with the product of both momenta.
    """

    def __init__(self, video_pair: tuple[nn.Module, nn.Module], audio_pair: tuple[nn.Module, nn.Module]) -> None:
        """Each pair is (student, teacher), two modules of the same structure."""
        video = {id(t): (s, t) for s, t in zip(*(m.parameters() for m in video_pair), strict=True)}
        audio = {id(t): (s, t) for s, t in zip(*(m.parameters() for m in audio_pair), strict=True)}
        shared = video.keys() & audio.keys()
        self._video = [pair for key, pair in video.items() if key not in shared]
        self._audio = [pair for key, pair in audio.items() if key not in shared]
        self._shared = [video[key] for key in shared]

    @torch.no_grad()
    def __call__(self, video_momentum: float, audio_momentum: float) -> None:
        """Move every teacher parameter toward its student's."""
        momenta = (video_momentum, audio_momentum, video_momentum * audio_momentum)
        for pairs, momentum in zip((self._video, self._audio, self._shared), momenta, strict=True):
            if pairs:
                students, teachers = zip(*pairs, strict=True)
                torch._foreach_lerp_(list(teachers), list(students), 1 - momentum)

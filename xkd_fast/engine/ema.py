"""Teachers follow their students: θ_t ← m·θ_t + (1 − m)·θ_s, in float32, after the optimiser's step (XKD.md section 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from xkd_kernels import ema_


@dataclass(frozen=True)
class Follower:
    """A teacher's tensor, how far it follows its student (1 − momentum), and its copy in a half type, where one is kept."""

    teacher: Tensor
    weight: float
    copy: Tensor | None


class HalfCopies(Protocol):
    """A model that keeps its teachers' weights in a half type as well."""

    def halves(self) -> dict[int, Tensor]:
        """The copies that an update should bring up to date, by ``id`` of the original."""

    def teachers_moved(self, *, copied: bool) -> None:
        """Called after the teachers have moved, and those copies with them if ``copied``."""


class Teachers:
    """Both teachers, their momenta, and which of their tensors follow which of their students'.

    A teacher stack shared by the modalities (XKD-MATS) moves once, with the product of both momenta. Where ZeRO 3 has cut the
    tensors into shares (``share_of``), each rank moves its shares, and the copies are made when the whole is there again.

    Attributes:
        share_of: gives a tensor's share; None where tensors are whole.
        backend: of ``ema_``, which see.
    """

    def __init__(
        self,
        video_pair: tuple[nn.Module, nn.Module],
        audio_pair: tuple[nn.Module, nn.Module],
        half: HalfCopies | None = None,
    ) -> None:
        """Each pair is (student, teacher), two modules of the same structure."""
        video = {id(t): (s, t) for s, t in zip(*(m.parameters() for m in video_pair), strict=True)}
        audio = {id(t): (s, t) for s, t in zip(*(m.parameters() for m in audio_pair), strict=True)}
        kinds = {
            key: "shared" if key in video and key in audio else "video" if key in video else "audio" for key in video | audio
        }
        self._pairs = [(*pair, kinds[key]) for key, pair in (video | audio).items()]
        self._half = half
        students = [id(student) for student, _, _ in self._pairs]  # in XKD-MAS two teachers follow a shared student
        self._only = {id(s): (teacher, kind) for s, teacher, kind in self._pairs if students.count(id(s)) == 1}
        self._follow = {"video": 0.0, "audio": 0.0, "shared": 0.0}
        self._moved: set[int] = set()
        self.share_of: Callable[[Tensor], Tensor] | None = None
        self.backend = "auto"

    def set_momenta(self, video: float, audio: float) -> None:
        """The momenta of the coming update."""
        self._follow = {"video": 1 - video, "audio": 1 - audio, "shared": 1 - video * audio}

    def follower(self, student: Tensor) -> Follower | None:
        """What follows a student's tensor, if one alone does: an update moves it on its way, and then tells :meth:`moved`."""
        found = self._only.get(id(student))
        if found is None:
            return None
        teacher, kind = found
        return Follower(teacher, self._follow[kind], self._halves().get(id(teacher)))

    def moved(self, students: Sequence[Tensor]) -> None:
        """The followers of these have moved already in this update."""
        self._moved.update(id(student) for student in students if id(student) in self._only)

    def pairs(self, modality: str) -> list[tuple[Tensor, Tensor]]:
        """(student, teacher) tensors of a modality, those shared with the other one included; shares of them under ZeRO 3."""
        own = [(student, teacher) for student, teacher, kind in self._pairs if kind in (modality, "shared")]
        return [(self._share(student), self._share(teacher)) for student, teacher in own]

    def _share(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if self.share_of is None else self.share_of(tensor)

    def __call__(self, video_momentum: float, audio_momentum: float) -> None:
        """Move every teacher by these momenta."""
        self.set_momenta(video_momentum, audio_momentum)
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Move every teacher tensor toward its student's, but those that have moved on the way; then the copies are fresh."""
        rest = [pair for pair in self._pairs if id(pair[0]) not in self._moved]
        halves = self._halves()
        ema_(
            [self._share(teacher) for _, teacher, _ in rest],
            [self._share(student) for student, _, _ in rest],
            [self._follow[kind] for _, _, kind in rest],
            copies=[halves.get(id(teacher)) for _, teacher, _ in rest],
            backend=self.backend,
        )
        self._moved.clear()
        if self._half is not None:
            self._half.teachers_moved(copied=bool(halves))

    def _halves(self) -> dict[int, Tensor]:
        return {} if self._half is None or self.share_of is not None else self._half.halves()

"""XKD as users train it: the reference's parameters and numbers, another way through them.

What differs from ``reference.XKD``: only visible patches are gathered and embedded; all student tokens of a modality (in
XKD-MAS and XKD-MATS of both) pass the blocks as one packed matrix; attention is fused; teachers keep no graph and never form
an attention matrix; the decoder's last projections exist at masked positions only, the targets inside the loss alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xkd_fast import reference
from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.model.attention import choose
from xkd_fast.model.autoencoder import decode_masked
from xkd_fast.model.components import component
from xkd_fast.model.fp8 import fp8_layers
from xkd_fast.model.graphs import RecordedPass, Recorder, record
from xkd_fast.model.half import HalfCopy
from xkd_fast.model.head import project
from xkd_fast.model.kernels import require_kernels
from xkd_fast.model.options import AudioOptions, ModelOptions, VideoOptions
from xkd_fast.model.packing import Group, added, pack, unpack
from xkd_fast.model.precision import as_written
from xkd_fast.model.streams import SideStream
from xkd_fast.model.tokens import check_views, embed
from xkd_fast.model.vit import BlockRunner
from xkd_fast.objective.alignment import align
from xkd_fast.objective.distillation import distil
from xkd_fast.objective.losses import Distilled, Losses
from xkd_fast.objective.reconstruction import reconstruction_loss
from xkd_fast.reference import MODALITIES, Block, Network
from xkd_kernels import refine


class XKD(reference.XKD):
    """Drop-in for ``reference.XKD``: same options, state names, initial weights, arguments and losses."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        self.attention = choose(options.attention)
        require_kernels(options.kernels)
        how = {"compiled": options.compile is True, "checkpointed": options.checkpointing}  # auto that nobody settled is off
        self.runner = BlockRunner(self.attention, options.kernels, **how)
        self._half: HalfCopy | None = None
        self._recorded: RecordedPass | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without what was made of the weights, of which a copy could not tell that it is old: its versions count anew."""
        return {**self.__dict__, "_half": None, "_recorded": None}

    def forward(self, views: Views, masks: MaskNoise | None = None) -> Losses:
        """Losses of one batch. ``masks`` fixes the mask noise, for replay and for exact resume.

        Raises:
            ValueError: views or mask noise that are not what the options say.
        """
        check_views(views, masks, self.options)
        masks = masks or self.draw_masks(views)
        if self.options.cuda_graph is True and views.video_global.device.type == "cuda" and torch.is_grad_enabled():
            return self.recorded_losses(views, masks)
        return self.losses(views, masks)

    def recorded_losses(self, views: Views, masks: MaskNoise, record: Recorder = record) -> Losses:
        """Losses of one batch by the recording of the first one, as long as shapes and autocast stay the same.

        Other batches are computed here and now: a second recording would meet gradients of the first on another stream.
        """
        device = views.video_global.device
        if self._recorded is None:
            parameters: list[Tensor] = [parameter for parameter in self.parameters() if parameter.requires_grad]
            self._recorded = RecordedPass(
                self.losses, parameters, views, masks, prepare=lambda: self.teachers_for(device), record=record
            )
        return self._recorded(views, masks) if self._recorded.fits(views, masks) else self.losses(views, masks)

    def losses(self, views: Views, masks: MaskNoise) -> Losses:
        """Losses of one batch, computed here and now."""
        clips = {"video": [views.video_global, *views.video_locals], "audio": [views.audio_global, *views.audio_locals]}
        order = {m: noise.argsort(dim=1, stable=True) for m, noise in (("video", masks.video), ("audio", masks.audio))}

        side = SideStream(views.video_global.device, wanted=self.options.teacher_stream is True)
        with side, torch.no_grad(), component("teachers"):
            teacher_logits, weights = self.teach(self.teacher_clips(views))
        with component("students"):
            encoded = self.encode_students(clips, order)
        predicted, student_logits = {}, {}
        for modality in MODALITIES:
            with component("decoders"):
                tokens = encoded[modality][0]
                predicted[modality] = decode_masked(self.decoder(modality), tokens, order[modality], self.runner)
            with component("heads"):
                student = self.student(modality)
                pooled = [student.encoder.patch_tokens(tokens).mean(dim=1) for tokens in encoded[modality]]
                student_logits[modality] = project(student.head, torch.cat(pooled), self.options.kernels)

        side.join([*teacher_logits.values(), *weights.values()])
        with component("objectives"), as_written(views.video_global.device):
            return self.masked_objectives(clips, predicted, order, student_logits, teacher_logits, weights)

    def encode_students(self, clips: dict[str, list[Tensor]], order: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """Both students on all their views, the first one masked: [B, (1 +) n, D] per view and modality."""
        visible, kernels = {m: order[m][:, : self.keep(m)] for m in MODALITIES}, self.options.kernels
        embedded = {m: embed(self.student(m).encoder, clips[m], visible=visible[m], kernels=kernels) for m in MODALITIES}
        encoded: dict[str, list[Tensor]] = {}
        for together in self.passes("student"):
            x, groups = pack([tokens for m in together for tokens in embedded[m]])
            x = added(*self.runner.blocks(self.student(together[0]).encoder.blocks, x, groups))  # type: ignore[arg-type]
            rows = x.split([sum(tokens.shape[0] * tokens.shape[1] for tokens in embedded[m]) for m in together])
            for modality, part in zip(together, rows, strict=True):
                normed = self.student(modality).encoder.norm(part)
                views = [Group(*tokens.shape[:2]) for tokens in embedded[modality]]
                encoded[modality] = unpack(normed, views)
        return encoded

    def passes(self, role: str) -> list[tuple[str, ...]]:
        """Which modalities of a role go through the blocks together: both where they share them."""
        shared = ("mas", "mats") if role == "student" else ("mats",)
        return [MODALITIES] if self.options.variant in shared else [(modality,) for modality in MODALITIES]

    def teacher_clips(self, views: Views) -> dict[str, Tensor]:
        """What the teachers see."""
        if self.options.teacher_view == "local":
            return {"video": views.video_locals[0], "audio": views.audio_locals[0]}
        return {"video": views.video_global, "audio": views.audio_global}

    @torch.no_grad()
    def teach(
        self, clips: dict[str, Tensor], teachers: dict[str, Network] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both teachers on unmasked views: refined logits [B, K] and refinement weights [B, N] by modality.

        ``teachers``: those to run; None = those of :meth:`teachers_for`.
        """
        tokens, attention = {}, {}
        teachers = teachers or self.teachers_for(clips["video"].device)
        for together in self.passes("teacher"):
            embedded = [embed(teachers[m].encoder, [clips[m]], visible=None, kernels=self.options.kernels)[0] for m in together]
            x, groups = pack(embedded)
            blocks = teachers[together[0]].encoder.blocks
            x, branch = self.runner.blocks(blocks[:-1], x, groups)  # type: ignore[arg-type]
            last: Block = blocks[-1]  # type: ignore[assignment]
            x, probabilities = self.runner.last_block(last, x, branch, groups, has_cls=self.options.cls_token)
            if len(probabilities) < len(together):  # both modalities of equal length share a group
                probabilities = list(probabilities[0].split([len(part) for part in embedded]))
            rows = x.split([part.shape[0] * part.shape[1] for part in embedded])
            for modality, part, own, rest in zip(together, embedded, probabilities, rows, strict=True):
                encoder = teachers[modality].encoder
                tokens[modality] = encoder.patch_tokens(encoder.norm(rest).view_as(part))
                attention[modality] = own
        return self.refined_logits(teachers, tokens, attention)

    def refined_logits(
        self, teachers: dict[str, Network], tokens: dict[str, Tensor], attention: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logits [B, K] and refinement weights [B, N] from both teachers' tokens [B, N, D] and attention [B, h, N]."""
        logits, weights = {}, {}
        for own, other in (("video", "audio"), ("audio", "video")):
            looks = attention[own], attention[other]
            pooled, weights[own] = refine(tokens[own], *looks, self.options.refinement, backend=self.options.kernels)
            logits[own] = project(teachers[own].head, pooled, self.options.kernels)
        return logits, weights

    def teachers_for(self, device: torch.device) -> dict[str, Network]:
        """The teachers to run: under autocast, or where they compute in FP8, copies whose linear weights are cast already."""
        originals = {modality: self.teacher(modality) for modality in MODALITIES}
        is_half, is_fp8 = torch.is_autocast_enabled(device.type), self.options.teacher_precision == "fp8"
        if not (is_half or is_fp8):
            return originals
        weight = originals["video"].head.linear1.weight
        dtype = torch.get_autocast_dtype(device.type) if is_half else weight.dtype
        if self._half is None or not self._half.follows(weight, dtype):
            fp8 = fp8_layers(originals.values(), self.options.kernels) if is_fp8 else ()
            self._half = HalfCopy(nn.ModuleDict(originals), dtype, fp8)
        copies = self._half.fresh()
        return {modality: copies[modality] for modality in MODALITIES}  # type: ignore[misc]

    def prepare_halves(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the copies that :meth:`teachers_for` would make under autocast in ``dtype``, before a wrapper adds its hooks."""
        with torch.autocast(device.type, dtype):
            self.teachers_for(device)

    def halves(self) -> dict[int, Tensor]:
        """The teachers' weights in bfloat16 by ``id`` of their originals: an update may write both."""
        return self._half.halves() if self._half is not None and self._half.dtype == torch.bfloat16 else {}

    def teachers_moved(self, *, copied: bool) -> None:
        """To be called after an update of the teachers, which has written :meth:`halves` too if ``copied``."""
        if self._half is not None:
            (self._half.settle if copied else self._half.expire)()

    def masked_objectives(
        self,
        clips: dict[str, list[Tensor]],
        predicted: dict[str, Tensor],
        order: dict[str, Tensor],
        student: dict[str, Tensor],
        teacher: dict[str, Tensor],
        weights: dict[str, Tensor],
    ) -> Losses:
        """The reference's objectives, given predictions [B, N − keep, P] of masked patches alone."""
        options: dict[str, VideoOptions | AudioOptions] = {"video": self.options.video, "audio": self.options.audio}
        kernels = self.options.kernels
        masked = {m: order[m][:, self.keep(m) :] for m in MODALITIES}
        recon = {m: reconstruction_loss(predicted[m], clips[m][0], masked[m], options[m], kernels) for m in MODALITIES}
        return self.combine(recon, student, teacher, weights)

    def distil(self, source: str, teacher: Tensor, student: Tensor) -> Distilled:
        """The reference's, in one pass over the logits."""
        centre, temperature = self.get_buffer(f"{source}_centre"), self.get_buffer(f"{source}_teacher_temperature")
        student_temperature = self.options.objective.student_temperature
        return distil(teacher, student, centre, temperature, student_temperature, self.options.kernels)

    def align(self, video: Tensor, audio: Tensor) -> Tensor:
        """The reference's, by exact distances."""
        return align(video, audio, self.options.objective.mmd_gammas, self.options.kernels)

"""XKD as plainly as it can be said: the yardstick for correctness and speed.

Source: Sarkar and Etemad, "XKD: Cross-modal Knowledge Distillation with Domain Alignment for Video Representation
Learning", AAAI 2024 (arXiv 2211.13929). No kernels, no packing, nothing clever. The order below is the paper's: blocks,
encoder, decoder, head, the three objectives, the model, and the four things that happen around the optimiser.

Legend: B clips, N tokens (CLS not counted), D width, h heads, K prototypes, P numbers of a patch.
Precision: modules run in the caller's type or autocast; objectives run in float32 or wider, never in autocast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.model.options import AudioOptions, ModelOptions, ObjectiveOptions, VideoOptions
from xkd_fast.objective.losses import Distilled, Losses, Outputs

LAYER_NORM_EPS = 1e-5
TARGET_EPS = 1e-6
CLIP_EPS = 1e-6
MODALITIES = ("video", "audio")


# ---------------------------------------------------------------------------------------------------------------- patches


def patchify(clip: Tensor, patch: Sequence[int]) -> Tensor:
    """Cut a clip into flattened patches, in grid order.

    Video [B, C, T, H, W] → [B, N, P] with tokens in (time, height, width) and numbers in (time, height, width, channel)
    order; audio [B, 1, F, T] → [B, N, P] with tokens and numbers in (mel, time) order.
    """
    batch, channels, *sizes = clip.shape
    split = [length for size, extent in zip(sizes, patch, strict=True) for length in (size // extent, extent)]
    axes = len(patch)
    grid_axes = [2 + 2 * axis for axis in range(axes)]
    inner_axes = [3 + 2 * axis for axis in range(axes)]
    tokens = math.prod(split[0::2])
    return clip.reshape(batch, channels, *split).permute(0, *grid_axes, *inner_axes, 1).reshape(batch, tokens, -1)


def normalised_pixels(pixels: Tensor, video: VideoOptions, *, axis: int) -> Tensor:
    """8-bit pixels to 0-1, less the mean of their channel along ``axis``, over its deviation; any other type as it is."""
    if pixels.dtype != torch.uint8:
        return pixels
    shape = [-1 if place == axis % pixels.ndim else 1 for place in range(pixels.ndim)]
    scaled = pixels / 255
    # filled in place: a copy from the host would wait for the device
    mean, std = (
        torch.cat([scaled.new_full((1,), x) for x in values]).view(shape) for values in (video.pixel_mean, video.pixel_std)
    )
    return (scaled - mean) / std


def interpolate_position(table: Tensor, grid: Sequence[int], target: Sequence[int]) -> Tensor:
    """Resample a position table from ``grid`` to ``target``: [1, N, D] → [1, N', D] (XKD.md section 2).

    The scale factors carry the released code's extra 0.1, which sets the sampling grid. Video: trilinear; audio: bicubic
    over time, its mel axis kept.
    """
    if tuple(grid) == tuple(target):
        return table
    width = table.shape[-1]
    volume = table.reshape(1, *grid, width).movedim(-1, 1)
    if len(grid) == 3:
        scale, mode = [(n + 0.1) / size for n, size in zip(target, grid, strict=True)], "trilinear"
    else:
        scale, mode = [1.0, (target[1] + 0.1) / grid[1]], "bicubic"
    resampled = F.interpolate(volume, scale_factor=scale, mode=mode, align_corners=False)
    return resampled.movedim(1, -1).reshape(1, -1, width)


# ----------------------------------------------------------------------------------------------------- transformer blocks


class Block(nn.Module):
    """A pre-norm transformer block: attention without qkv bias, MLP with exact GELU."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] → the block's output [B, N, D] and its attention probabilities [B, h, N, N]."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)))), attention


def make_blocks(width: int, depth: int, heads: int, mlp_ratio: float) -> nn.ModuleList:
    """A stack of ``depth`` blocks."""
    return nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))


class Encoder(nn.Module):
    """Vision transformer over the patches of one modality; ``blocks`` may be shared with another encoder."""

    def __init__(self, options: ModelOptions, clip: VideoOptions | AudioOptions, blocks: nn.ModuleList) -> None:
        super().__init__()
        width = options.encoder.width
        self.grid, self.patch, self.has_cls = clip.grid, clip.patch, options.cls_token
        self.clip = clip
        self.patch_embedding = nn.Linear(clip.patch_numbers, width)
        if self.has_cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, int(self.has_cls) + clip.tokens, width))
        self.blocks = blocks
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, clip: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode a clip, or only its ``visible`` tokens ([B, keep] token numbers).

        Returns the normalised tokens [B, (1 +) N, D] and the last block's attention [B, h, (1 +) N, (1 +) N].
        """
        grid = [size // extent for size, extent in zip(clip.shape[2:], self.patch, strict=True)]
        first = int(self.has_cls)
        x = self.patch_embedding(patchify(clip, self.patch))
        x = x + interpolate_position(self.position[:, first:], self.grid, grid)
        if visible is not None:
            x = x.gather(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        if self.has_cls:
            cls_token = self.cls_token + self.position[:, :1]
            x = torch.cat([cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x, attention = block(x)
        return self.norm(x), attention

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens without CLS: [B, (1 +) N, D] → [B, N, D]."""
        return tokens[:, int(self.has_cls) :]

    def patch_attention(self, attention: Tensor) -> Tensor:
        """How much each head looks at each patch: [B, h, (1 +) N, (1 +) N] → [B, h, N].

        The row of CLS with its own column dropped, not renormalised; without CLS the mean over all query tokens.
        """
        return attention[:, :, 0, 1:] if self.has_cls else attention.mean(dim=2)


class Decoder(nn.Module):
    """Reconstructs all patches of a clip from its visible tokens."""

    def __init__(self, options: ModelOptions, clip: VideoOptions | AudioOptions) -> None:
        super().__init__()
        width, decoder = options.encoder.width, options.decoder
        self.first = int(options.cls_token)
        same_in, same_out = width == decoder.width, decoder.width == clip.patch_numbers
        self.project_in = nn.Identity() if same_in else nn.Linear(width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.position = nn.Parameter(torch.zeros(1, self.first + clip.tokens, decoder.width))
        self.blocks = make_blocks(decoder.width, decoder.depth, decoder.heads, options.mlp_ratio)
        self.project_out = nn.Identity() if same_out else nn.Linear(decoder.width, clip.patch_numbers)

    def forward(self, encoded: Tensor, order: Tensor) -> Tensor:
        """Visible tokens [B, (1 +) keep, D] and the order [B, N] that put the visible first → patches [B, N, P]."""
        x = self.project_in(encoded)
        cls_token, visible = x[:, : self.first], x[:, self.first :]
        masked = self.mask_token.to(x.dtype).expand(len(x), order.shape[1] - visible.shape[1], -1)
        shuffled = torch.cat([visible, masked], dim=1)
        in_grid = shuffled.gather(1, order.argsort(dim=1).unsqueeze(-1).expand_as(shuffled))
        x = torch.cat([cls_token, in_grid], dim=1) + self.position
        for block in self.blocks:
            x, _ = block(x)
        return self.project_out(x[:, self.first :])


class Head(nn.Module):
    """Projection head: a 3-layer MLP, L2 normalisation, weight-normalised prototypes, LayerNorm without affine."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        head = options.head
        self.linear1 = nn.Linear(options.encoder.width, head.hidden)
        self.norm = nn.LayerNorm(head.hidden, eps=LAYER_NORM_EPS)  # one module, used after both hidden layers
        self.linear2 = nn.Linear(head.hidden, head.hidden)
        self.linear3 = nn.Linear(head.hidden, head.bottleneck)
        self.prototypes = nn.Parameter(torch.zeros(head.prototypes, head.bottleneck))
        self.prototype_scale = nn.Parameter(torch.ones(head.prototypes, 1), requires_grad=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, D] → logits [B, K]."""
        x = F.gelu(self.norm(self.linear1(pooled)))
        x = F.gelu(self.norm(self.linear2(x)))
        x = F.normalize(self.linear3(x), dim=-1)
        x = F.linear(x, self.prototype_scale * F.normalize(self.prototypes, dim=-1))
        return F.layer_norm(wide(x), x.shape[-1:], eps=LAYER_NORM_EPS)


class Network(nn.Module):
    """A student or a teacher: encoder and head."""

    def __init__(self, options: ModelOptions, clip: VideoOptions | AudioOptions, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.encoder = Encoder(options, clip, blocks)
        self.head = Head(options)

    def features(self, clip: Tensor) -> Tensor:
        """The representation used downstream, the mean of the patch tokens: clip → [B, D]."""
        return self.encoder.patch_tokens(self.encoder(clip)[0]).mean(dim=1)


# ------------------------------------------------------------------------------------------------------------- objectives


def wide(x: Tensor) -> Tensor:
    """float32, or the tensor's own type where that is wider."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def reconstruction_loss(predicted: Tensor, patches: Tensor, masked: Tensor) -> Tensor:
    """Mean squared error to the per-patch normalised pixels, over masked patches (XKD.md section 4).

    predicted, patches: [B, N, P]; masked: [B, N − keep] token numbers. The variance is the unbiased one.
    """
    index = masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    return patch_error(predicted.gather(1, index), patches.gather(1, index))


def patch_error(predicted: Tensor, patches: Tensor) -> Tensor:
    """Mean squared error of predictions to patches normalised one by one: both [B, n, P]."""
    predicted, patches = wide(predicted), wide(patches)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True, unbiased=True) + TARGET_EPS).sqrt()
    return (predicted - target).square().mean()


def refinement_weights(own: Tensor, other: Tensor, mode: str) -> Tensor:
    """Weights of a teacher's patch tokens from both teachers' attention (XKD.md section 5).

    own: [B, h, N]; other: [B, h, M]. Returns [B, N].
    """
    own, other = wide(own), wide(other)
    cross_modal_map = own.unsqueeze(3) * other.unsqueeze(2)  # [B, h, N, M]
    averaged = cross_modal_map.mean(dim=3)
    weights = averaged.softmax(dim=-1) if mode == "softmax" else averaged / own.mean(dim=-1, keepdim=True)
    return weights.mean(dim=1)


def refine(tokens: Tensor, weights: Tensor) -> Tensor:
    """Re-weight patch tokens [B, N, D] by [B, N], keeping each clip's pooled energy."""
    tokens = wide(tokens)
    weighted = weights.unsqueeze(-1) * tokens
    energy = tokens.mean(dim=1).square().sum(dim=-1)
    weighted_energy = weighted.mean(dim=1).square().sum(dim=-1)
    return (energy / weighted_energy).sqrt()[:, None, None] * weighted


def distillation_loss(
    teacher: Tensor, student: Tensor, centre: Tensor, teacher_temperature: Tensor, student_temperature: float
) -> Tensor:
    """Cross entropy from the teacher's to every student view's distribution (XKD.md section 6).

    teacher: [B, K]; student: [views·B, K]; centre: [1, K]. Mean over views and clips.
    """
    teacher, student = wide(teacher), wide(student)
    target = ((teacher - centre) / teacher_temperature).softmax(dim=-1)
    log_probabilities = (student / student_temperature).log_softmax(dim=-1).reshape(-1, *teacher.shape)
    return -(target * log_probabilities).sum(dim=-1).mean()


def mmd_loss(x: Tensor, y: Tensor, gammas: Sequence[float]) -> Tensor:
    """Squared maximum mean discrepancy of two sets of rows, biased estimator (XKD.md section 7).

    x: [n, K]; y: [m, K]. Distances come from differences, not from the expanded square, which float32 cannot hold.
    """

    def kernel_mean(a: Tensor, b: Tensor) -> Tensor:
        distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square().clamp_min(1e-30)
        return torch.stack([torch.exp(-gamma * distance) for gamma in gammas]).sum(dim=0).mean()

    x, y = wide(x), wide(y)
    return kernel_mean(x, x) + kernel_mean(y, y) - 2 * kernel_mean(x, y)


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows, differentiable: [n, K] → [world·n, K], for a loss that every rank computes alike from all of them.

    The ranks' losses then have one gradient for these rows, which is multiplied by the number of ranks here because the
    usual average over ranks divides by it. Nothing is sent in the backward pass.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    world = dist.get_world_size()
    gathered = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(gathered, rows.detach().contiguous())
    own = gathered[dist.get_rank()] = rows.clone()
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * world)
    return torch.cat(gathered)


# -------------------------------------------------------------------------------------------------------------- the model


class XKD(nn.Module):
    """XKD and its modality-agnostic variants: students, teachers, decoders and centres.

    ``XKD(options)(views, masks)`` computes one step's :class:`Losses`. Without ``masks`` the mask noise is drawn from
    torch's default generator. Around the optimiser's step, call :func:`clip_gradients`, :func:`update_teachers` and
    :func:`update_centres`.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        encoder, variant = options.encoder, options.variant
        clips: dict[str, VideoOptions | AudioOptions] = {"video": options.video, "audio": options.audio}

        def stack() -> nn.ModuleList:
            return make_blocks(encoder.width, encoder.depth, encoder.heads, options.mlp_ratio)

        for role, is_shared in (("student", variant in ("mas", "mats")), ("teacher", variant == "mats")):
            video_blocks = stack()
            audio_blocks = video_blocks if is_shared else stack()
            self.add_module(f"video_{role}", Network(options, clips["video"], video_blocks))
            self.add_module(f"audio_{role}", Network(options, clips["audio"], audio_blocks))
        for modality in MODALITIES:
            self.add_module(f"{modality}_decoder", Decoder(options, clips[modality]))
            self.register_buffer(f"{modality}_centre", torch.zeros(1, options.head.prototypes))
            start = getattr(options.objective, f"{modality}_teacher_temperature").start
            self.register_buffer(f"{modality}_teacher_temperature", torch.tensor(start, dtype=torch.float64), persistent=False)
        self.initialise()

    def student(self, modality: str) -> Network:
        """The student of a modality."""
        return self.get_submodule(f"{modality}_student")  # type: ignore[return-value]

    def teacher(self, modality: str) -> Network:
        """The teacher of a modality."""
        return self.get_submodule(f"{modality}_teacher")  # type: ignore[return-value]

    def decoder(self, modality: str) -> Decoder:
        """The decoder of a modality."""
        return self.get_submodule(f"{modality}_decoder")  # type: ignore[return-value]

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights (XKD.md section 2) from torch's default generator; teachers start equal to their students."""
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("cls_token", "mask_token"):
                parameter.normal_(std=0.02)
            elif leaf == "position" or (".head." in name and parameter.ndim == 2 and leaf != "prototype_scale"):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif parameter.ndim == 2 and leaf != "prototype_scale":
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for modality in MODALITIES:
            self.teacher(modality).load_state_dict(self.student(modality).state_dict())
            self.teacher(modality).requires_grad_(False)

    def set_teacher_temperatures(self, video: float, audio: float) -> None:
        """Set this epoch's teacher temperatures; on a GPU without waiting for it."""
        self.get_buffer("video_teacher_temperature").fill_(video)
        self.get_buffer("audio_teacher_temperature").fill_(audio)

    def draw_masks(self, views: Views) -> MaskNoise:
        """Fresh mask noise for a batch, float32."""
        size, device, options = views.batch_size, views.video_global.device, self.options
        video = torch.rand(size, options.video.tokens, device=device)
        return MaskNoise(video, torch.rand(size, options.audio.tokens, device=device))

    def forward(self, views: Views, masks: MaskNoise | None = None) -> Losses:
        """Losses of one batch. ``masks`` fixes the mask noise, for replay and for exact resume."""
        masks = masks or self.draw_masks(views)
        video_global, *video_locals = (
            normalised_pixels(clip, self.options.video, axis=1) for clip in (views.video_global, *views.video_locals)
        )
        global_views = {"video": video_global, "audio": views.audio_global}
        local_views = {"video": video_locals, "audio": views.audio_locals}
        noise = {"video": masks.video, "audio": masks.audio}

        predicted, order, student_logits = {}, {}, {}
        for modality in MODALITIES:
            student = self.student(modality)
            predicted[modality], order[modality], encoded = self.autoencode(modality, global_views[modality], noise[modality])
            pooled = [student.encoder.patch_tokens(encoded).mean(dim=1)]
            pooled += [student.features(view) for view in local_views[modality]]
            student_logits[modality] = student.head(torch.cat(pooled))

        local_teacher = self.options.teacher_view == "local"
        teacher_views = {m: local_views[m][0] if local_teacher else global_views[m] for m in MODALITIES}
        teacher_logits, weights = self.teach(teacher_views)

        with torch.autocast(views.video_global.device.type, enabled=False):
            return self.objectives(global_views, predicted, order, student_logits, teacher_logits, weights)

    def autoencode(self, modality: str, clip: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masked autoencoding of a global view.

        Returns predicted patches [B, N, P], the token order [B, N] that puts the visible first, and the student's tokens.
        """
        order = noise.argsort(dim=1, stable=True)
        encoded, _ = self.student(modality).encoder(clip, visible=order[:, : self.keep(modality)])
        return self.decoder(modality)(encoded, order), order, encoded

    def keep(self, modality: str) -> int:
        """Visible tokens of a modality's masked global view."""
        return (self.options.video if modality == "video" else self.options.audio).keep

    @torch.no_grad()
    def teach(self, clips: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both teachers on unmasked views: refined logits [B, K] and refinement weights [B, N] by modality."""
        tokens, attention, logits, weights = {}, {}, {}, {}
        for modality in MODALITIES:
            encoder = self.teacher(modality).encoder
            encoded, full_attention = encoder(clips[modality])
            tokens[modality], attention[modality] = encoder.patch_tokens(encoded), encoder.patch_attention(full_attention)
        for own, other in (("video", "audio"), ("audio", "video")):
            weights[own] = refinement_weights(attention[own], attention[other], self.options.refinement)
            logits[own] = self.teacher(own).head(refine(tokens[own], weights[own]).mean(dim=1))
        return logits, weights

    def objectives(
        self,
        clips: dict[str, Tensor],
        predicted: dict[str, Tensor],
        order: dict[str, Tensor],
        student: dict[str, Tensor],
        teacher: dict[str, Tensor],
        weights: dict[str, Tensor],
    ) -> Losses:
        """The three objectives and their weighted mean."""
        patch = {"video": self.options.video.patch, "audio": self.options.audio.patch}
        recon = {
            m: reconstruction_loss(predicted[m], patchify(clips[m], patch[m]), order[m][:, self.keep(m) :]) for m in MODALITIES
        }
        return self.combine(recon, student, teacher, weights)

    def combine(
        self, recon: dict[str, Tensor], student: dict[str, Tensor], teacher: dict[str, Tensor], weights: dict[str, Tensor]
    ) -> Losses:
        """All losses, from the reconstruction's by modality, logits and refinement weights."""
        objective: ObjectiveOptions = self.options.objective
        others = (("video", "audio"), ("audio", "video"))
        distil = {source: self.distil(source, teacher[source], student[target]) for source, target in others}
        everyone = gather_rows if objective.mmd_scope == "global" else lambda rows: rows
        align = {
            name: self.align(everyone(rows["video"]), everyone(rows["audio"]))
            for name, rows in (("student", student), ("teacher", teacher))
        }
        distillation = {source: direction.loss for source, direction in distil.items()}
        terms = [(a + b) / 2 for a, b in (recon.values(), distillation.values(), align.values())]
        term_weights = (objective.reconstruction_weight, objective.distillation_weight, objective.alignment_weight)
        weighted = [weight * term for weight, term in zip(term_weights, terms, strict=True)]
        total = (weighted[0] + weighted[1] + weighted[2]) / sum(term_weights)
        return Losses(
            total=total,
            reconstruction=terms[0],
            distillation=terms[1],
            alignment=terms[2],
            video_reconstruction=recon["video"],
            audio_reconstruction=recon["audio"],
            video_to_audio_distillation=distillation["video"],
            audio_to_video_distillation=distillation["audio"],
            student_alignment=align["student"],
            teacher_alignment=align["teacher"],
            outputs=Outputs(
                student_logits={m: student[m].detach() for m in MODALITIES},
                teacher_logits=teacher,
                refinement_weights=weights,
                teacher_means={m: distil[m].teacher_mean for m in MODALITIES},
                teacher_entropies={m: each for m in MODALITIES if (each := distil[m].teacher_entropy) is not None},
                student_entropies={m: each for m, other in others if (each := distil[other].student_entropy) is not None},
            ),
        )

    def distil(self, source: str, teacher: Tensor, student: Tensor) -> Distilled:
        """Distillation from a modality's teacher, logits [B, K], to the other one's student, [views·B, K]."""
        centre, temperature = self.get_buffer(f"{source}_centre"), self.get_buffer(f"{source}_teacher_temperature")
        student_temperature = self.options.objective.student_temperature
        loss = distillation_loss(teacher, student, centre, temperature, student_temperature)
        return Distilled(loss, wide(teacher).mean(dim=0))

    def align(self, video: Tensor, audio: Tensor) -> Tensor:
        """Alignment of both modalities' rows, [n, K] and [m, K]."""
        return mmd_loss(video, audio, self.options.objective.mmd_gammas)


# --------------------------------------------------------------------------------------------------- around the optimiser


def parameter_groups(model: XKD, weight_decay: float) -> list[dict[str, object]]:
    """AdamW's groups: no decay on biases and 1-D tensors (XKD.md section 8)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim == 1], "weight_decay": 0.0},
    ]


def clipped_parameters(model: XKD) -> Iterator[nn.Parameter]:
    """The parameters whose gradients are clipped: the students', not the autoencoders' own."""
    return (p for name, p in model.named_parameters() if p.requires_grad and "_student." in name)


@torch.no_grad()
def clip_gradients(model: XKD, max_norm: float) -> None:
    """Scale each student parameter's gradient by min(1, max_norm / (norm + 1e-6)), tensor by tensor."""
    for parameter in clipped_parameters(model):
        if parameter.grad is not None:
            parameter.grad.mul_((max_norm / (parameter.grad.norm() + CLIP_EPS)).clamp(max=1.0))


@torch.no_grad()
def update_teachers(model: XKD, video_momentum: float, audio_momentum: float) -> None:
    """θ_t ← m·θ_t + (1 − m)·θ_s after the optimiser's step; MATS's shared teacher stack moves with both momenta's product."""
    momenta = {"video": video_momentum, "audio": audio_momentum}
    shared = {id(p) for p in model.teacher("video").parameters()} & {id(p) for p in model.teacher("audio").parameters()}
    moved: set[int] = set()
    for modality in MODALITIES:
        students, teachers = model.student(modality).parameters(), model.teacher(modality).parameters()
        for student, teacher in zip(students, teachers, strict=True):
            if id(teacher) in moved:
                continue
            moved.add(id(teacher))
            momentum = video_momentum * audio_momentum if id(teacher) in shared else momenta[modality]
            teacher.mul_(momentum).add_(student, alpha=1 - momentum)


@torch.no_grad()
def update_centres(model: XKD, teacher_means: dict[str, Tensor]) -> None:
    """c ← 0.9·c + 0.1·(mean teacher logits of the global batch), after the loss has used the old centre."""
    momentum = model.options.objective.centre_momentum
    for modality in MODALITIES:
        model.get_buffer(f"{modality}_centre").mul_(momentum).add_(teacher_means[modality], alpha=1 - momentum)

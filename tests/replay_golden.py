"""Replay a golden file: three training steps of the released model, recomputed and compared.

``python -m tests.replay_golden FILE --impl reference`` prints one JSON object with the largest relative error
(max|x − y| / max|y|, over the tensors of a kind) and exits with 1 above the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xkd_fast import reference
from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.model import options as opt
from xkd_fast.model.build import build_model
from xkd_fast.weights import from_released, released_names

GOLDEN = Path(__file__).parent / "golden"
FILES = ("xkd_global", "xkd_local", "mas_global", "mats_global")
STEPS = 3
LOSS_NAMES = {
    "loss": "total",
    "recon_loss": "reconstruction",
    "cmkd_loss": "distillation",
    "alignment_loss": "alignment",
    "vid_recon_loss": "video_reconstruction",
    "aud_recon_loss": "audio_reconstruction",
    "vt2as_kd_loss": "video_to_audio_distillation",
    "at2vs_kd_loss": "audio_to_video_distillation",
    "as2vs_align_loss": "student_alignment",
    "vt2at_align_loss": "teacher_alignment",
}


@dataclass
class Golden:
    """One golden file: its tensors and its settings."""

    tensors: dict[str, Tensor]
    settings: dict

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Read a file; metadata that is JSON is parsed."""
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata()
        settings = {}
        for key, value in metadata.items():
            try:
                settings[key] = json.loads(value)
            except json.JSONDecodeError:
                settings[key] = value
        return cls(tensors, settings)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix``, without it."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def options(self) -> opt.ModelOptions:
        """The model that the file was made with."""
        s, g = self.settings, self.settings["geometry"]
        video_local, audio_local = (self.tensors[f"step0.input.{m}.local0"].shape for m in ("video", "audio"))
        temperature = {m: opt.TemperatureOptions(t, t) for m, t in s["teacher_temp"].items()}
        return opt.ModelOptions(
            variant={"XKD": "xkd", "XKD_MAS": "mas", "XKD_MATS": "mats"}[s["variant"]],
            teacher_view=s["teacher_view"],
            refinement=s["refinement"],
            cls_token=s["cls_token"],
            video=opt.VideoOptions(
                frames=g["num_frames"],
                size=g["frame_size"][1],
                channels=g["frame_size"][0],
                local_views=s["local_views_video"],
                local_frames=video_local[2],
                local_size=video_local[3],
                patch_frames=g["vid_patch_temporal"],
                patch_size=g["vid_patch_spatial"][0],
                mask_ratio=s["mask_ratio_video"],
            ),
            audio=opt.AudioOptions(
                mel_bins=g["spec_size"][0],
                frames=g["spec_size"][1],
                local_views=s["local_views_audio"],
                local_frames=audio_local[3],
                patch_bins=g["spec_patch_spatial"][0],
                patch_frames=g["spec_patch_spatial"][1],
                mask_ratio=s["mask_ratio_audio"],
            ),
            encoder=opt.EncoderOptions(s["encoder"]["embed_dim"], s["encoder"]["depth"], s["encoder"]["num_heads"]),
            decoder=opt.DecoderOptions(s["decoder"]["embed_dim"], s["decoder"]["depth"], s["decoder"]["num_heads"]),
            head=opt.HeadOptions(s["head"]["hidden_dim"], s["head"]["bottleneck_dim"], s["head"]["out_dim"]),
            objective=opt.ObjectiveOptions(
                reconstruction_weight=s["loss_weights"]["recon"],
                distillation_weight=s["loss_weights"]["distill"],
                alignment_weight=s["loss_weights"]["align"],
                video_teacher_temperature=temperature["video"],
                audio_teacher_temperature=temperature["audio"],
                student_temperature=s["student_temp"]["video"],
                centre_momentum=s["center_momentum"],
                mmd_gammas=tuple(s["mmd_gammas"]),
            ),
        )

    def inputs(self, step: int, dtype: torch.dtype) -> tuple[Views, MaskNoise]:
        """Views and mask noise of a step."""
        get = {key: value.to(dtype) for key, value in self.group(f"step{step}.input.").items()}
        count = {m: self.settings[f"local_views_{m}"] for m in ("video", "audio")}
        views = Views(
            video_global=get["video.global"],
            audio_global=get["audio.global"],
            video_locals=[get[f"video.local{i}"] for i in range(count["video"])],
            audio_locals=[get[f"audio.local{i}"] for i in range(count["audio"])],
        )
        noise = self.group(f"step{step}.mask_noise.")
        return views, MaskNoise(noise["video"], noise["audio"])


class Errors:
    """The largest relative error of each kind, and the tensor it belongs to."""

    def __init__(self) -> None:
        self.worst: dict[str, tuple[float, str]] = defaultdict(lambda: (0.0, "none"))
        self.compared: dict[str, int] = defaultdict(int)
        self.near_eps = 0  # numbers that count as weights_of_gradients_near_eps only

    def compare(self, kind: str, name: str, ours: Tensor, theirs: Tensor) -> None:
        """Compare one tensor; NaN counts as infinitely wrong."""
        ours, theirs = ours.detach().double(), theirs.double()
        if ours.shape != theirs.shape:
            raise ValueError(f"{kind} {name}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}")
        scale = theirs.abs().max().item()
        error = (ours - theirs).abs().max().item() / scale if scale else float(ours.abs().max().item() > 0)
        error = error if error == error else float("inf")
        self.compared[kind] += 1
        if error >= self.worst[kind][0]:
            self.worst[kind] = (error, name)


def final_kind(name: str) -> str:
    """Which kind a final tensor (ours) counts as."""
    return "centres" if name.endswith("_centre") else "teachers" if "_teacher." in name else "weights"


def replay(
    golden: Golden, dtype: torch.dtype = torch.float64, implementation: str = "reference", kernels: str = "torch"
) -> Errors:
    """Recompute the three steps of a golden file and compare everything it holds.

    Kernels: who computes the fast model's operators, attention among them: "torch" or "triton".
    """
    errors, settings = Errors(), golden.settings
    attention = "triton" if kernels == "triton" else "auto"
    options = replace(golden.options(), implementation=implementation, attention=attention, kernels=kernels)
    model = reference.XKD(options) if implementation == "reference" else build_model(options, seed=0)
    model.load_state_dict(from_released(golden.group("init.")))
    model.to(dtype)
    temperature = settings["teacher_temp"]
    model.set_teacher_temperatures(temperature["video"], temperature["audio"])
    optimizer = torch.optim.AdamW(
        reference.parameter_groups(model, settings["weight_decay"]),
        betas=tuple(settings["betas"]),
        eps=settings["adam_eps"],
    )
    near_eps: dict[str, Tensor] = {}
    for step in range(STEPS):
        views, noise = golden.inputs(step, dtype)
        losses = model(views, noise)
        for released, name in LOSS_NAMES.items():
            errors.compare("losses", name, getattr(losses, name), golden.tensors[f"step{step}.loss.{released}"])
        optimizer.zero_grad()
        losses.total.backward()
        if step == 0:
            compare_first_step(errors, golden, model, losses.outputs)
        reference.clip_gradients(model, settings["clip"])
        if step == 0 and dtype == torch.float32:
            near_eps = undecided(model, settings["adam_eps"])
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"][step]
        optimizer.step()
        reference.update_teachers(model, settings["ema_video"][step], settings["ema_audio"][step])
        reference.update_centres(model, losses.outputs.teacher_means)
    state = model.state_dict()
    for name, theirs in from_released(golden.group("final.")).items():
        ours, kind = state[name], final_kind(name)
        if name in near_eps:
            errors.compare("weights_of_gradients_near_eps", name, ours, theirs)
            errors.near_eps += int(near_eps[name].sum())
            ours = torch.where(near_eps[name], theirs.to(dtype), ours)
        errors.compare(kind, name, ours, theirs)
    return errors


def undecided(model: torch.nn.Module, eps: float) -> dict[str, Tensor]:
    """Where a clipped gradient is below ten times AdamW's eps: there float32's rounding decides the first update.

    That update is g / (|g| + eps), and g is good to 1e-7 of its tensor's largest number at best.
    """
    near = {name: p.grad.abs() < 10 * eps for name, p in model.named_parameters() if p.grad is not None}
    return {name: places for name, places in near.items() if places.any() and not places.all()}


def compare_first_step(errors: Errors, golden: Golden, model: torch.nn.Module, outputs) -> None:
    """Gradients before clipping, logits and refinement weights of step 0."""
    gradients = golden.group("step0.grad.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            errors.compare("gradients", name, parameter.grad, gradients.pop(released_names(name)[0]))
    if gradients:
        raise ValueError(f"gradients in the file but not in the model: {', '.join(gradients)}")
    for modality in ("video", "audio"):
        for role, logits in (("student", outputs.student_logits), ("teacher", outputs.teacher_logits)):
            name = f"{role}.{modality}"
            errors.compare("logits", name, logits[modality], golden.tensors[f"step0.logits.{name}"])
        theirs = golden.tensors[f"step0.refinement_weight.{modality}"]
        errors.compare("refinement_weights", modality, outputs.refinement_weights[modality], theirs)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.replay_golden", description=__doc__)
    parser.add_argument("file", type=Path, help="a golden file, or the bare name of one in tests/golden")
    parser.add_argument("--impl", choices=("reference", "fast"), default="reference", help="which implementation to replay")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument(
        "--kernels",
        choices=("torch", "triton"),
        default="torch",
        help="who computes the fast model's operators; triton needs float32, and without a GPU TRITON_INTERPRET=1",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest error allowed of any kind; default: losses 1e-9 (MAS, MATS 1e-8) and the rest 1e-6; in float32 "
        "2e-4, but 1e-3 where AdamW's eps decides an update",
    )
    args = parser.parse_args(arguments)
    path = args.file if args.file.exists() else GOLDEN / f"{args.file.name.removesuffix('.safetensors')}.safetensors"
    if not path.exists():
        parser.error(f"{args.file} does not exist, nor does {path}; golden files: {', '.join(FILES)}")
    if args.kernels == "triton" and (args.impl, args.dtype) != ("fast", "float32"):
        parser.error("--kernels triton needs --impl fast --dtype float32: the reference has none, and they compute in float32")
    try:
        golden = Golden.read(path)
    except (OSError, SafetensorError) as error:
        parser.error(f"{path} is no golden file: {error}")
    errors = replay(golden, getattr(torch, args.dtype), args.impl, args.kernels)
    usual = {"float64": 1e-6, "float32": 2e-4}[args.dtype] if args.tolerance is None else args.tolerance
    tolerance = dict.fromkeys(errors.worst, usual)
    if args.tolerance is None and args.dtype == "float64":  # MAS and MATS: the released second clipping pass is ~1e-9
        tolerance["losses"] = 1e-9 if golden.settings["variant"] == "XKD" else 1e-8
    if args.tolerance is None and "weights_of_gradients_near_eps" in tolerance:
        tolerance["weights_of_gradients_near_eps"] = 1e-3
    report = {
        "file": path.name,
        "implementation": args.impl,
        "kernels": args.kernels,
        "dtype": args.dtype,
        "tolerance": tolerance,
        "passed": all(error <= tolerance[kind] for kind, (error, _) in errors.worst.items()),
        "errors": {kind: error for kind, (error, _) in errors.worst.items()},
        "worst": {kind: name for kind, (_, name) in errors.worst.items()},
        "compared": dict(errors.compared),
        "numbers_of_gradients_near_eps": errors.near_eps,
    }
    print(json.dumps(report, indent=2))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""Fused operators for transformers on packed tokens and patches, usable without the trainer: needs torch and Triton alone."""

from xkd_kernels.adamw_ema import Segments, adamw_ema_, ema_, naive_adamw_ema, naive_squared_norms, squared_norms
from xkd_kernels.backends import BACKENDS, BackendError, Choice, choose, obstacle
from xkd_kernels.bias_gelu import bias_gelu, naive_bias_gelu
from xkd_kernels.cls_attention import cls_attention, naive_cls_attention
from xkd_kernels.distillation_loss import Distillation, distillation_loss, naive_distillation_loss
from xkd_kernels.fp8_linear import fp8_linear, missing_scaled_product, naive_fp8_linear
from xkd_kernels.gather_patches import gather_patches, naive_gather_patches
from xkd_kernels.masked_patch_loss import masked_patch_loss, naive_masked_patch_loss
from xkd_kernels.mmd_loss import mmd_loss, naive_mmd_loss
from xkd_kernels.packed_attention import naive_packed_attention, packed_attention
from xkd_kernels.quantise import (
    bias_gelu_fp8,
    naive_bias_gelu_fp8,
    naive_quantise_rows,
    naive_residual_layer_norm_fp8,
    quantise_rows,
    residual_layer_norm_fp8,
)
from xkd_kernels.refine import naive_refine, refine
from xkd_kernels.residual_layer_norm import naive_residual_layer_norm, residual_layer_norm
from xkd_kernels.unit_rows import naive_unit_rows, unit_rows

__version__ = "0.1.0"
__all__ = [
    "BACKENDS",
    "BackendError",
    "Choice",
    "Distillation",
    "Segments",
    "adamw_ema_",
    "bias_gelu",
    "bias_gelu_fp8",
    "choose",
    "cls_attention",
    "distillation_loss",
    "ema_",
    "fp8_linear",
    "gather_patches",
    "masked_patch_loss",
    "missing_scaled_product",
    "mmd_loss",
    "naive_adamw_ema",
    "naive_bias_gelu",
    "naive_bias_gelu_fp8",
    "naive_cls_attention",
    "naive_distillation_loss",
    "naive_fp8_linear",
    "naive_gather_patches",
    "naive_masked_patch_loss",
    "naive_mmd_loss",
    "naive_packed_attention",
    "naive_quantise_rows",
    "naive_refine",
    "naive_residual_layer_norm",
    "naive_residual_layer_norm_fp8",
    "naive_squared_norms",
    "naive_unit_rows",
    "obstacle",
    "packed_attention",
    "quantise_rows",
    "refine",
    "residual_layer_norm",
    "residual_layer_norm_fp8",
    "squared_norms",
    "unit_rows",
]

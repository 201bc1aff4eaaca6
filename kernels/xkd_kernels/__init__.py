"""Fused operators for transformers on packed tokens and patches, usable without the trainer: needs torch and Triton alone."""

from xkd_kernels.backends import BACKENDS, BackendError, Choice, choose, obstacle
from xkd_kernels.bias_gelu import bias_gelu, naive_bias_gelu
from xkd_kernels.cls_attention import cls_attention, naive_cls_attention
from xkd_kernels.gather_patches import gather_patches, naive_gather_patches
from xkd_kernels.packed_attention import naive_packed_attention, packed_attention
from xkd_kernels.residual_layer_norm import naive_residual_layer_norm, residual_layer_norm

__version__ = "0.1.0"
__all__ = [
    "BACKENDS",
    "BackendError",
    "Choice",
    "bias_gelu",
    "choose",
    "cls_attention",
    "gather_patches",
    "naive_bias_gelu",
    "naive_cls_attention",
    "naive_gather_patches",
    "naive_packed_attention",
    "naive_residual_layer_norm",
    "obstacle",
    "packed_attention",
    "residual_layer_norm",
]

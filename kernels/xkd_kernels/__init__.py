"""Kernels of xkd_fast: fused operators for PyTorch, each with its plain twin beside it. Needs torch alone."""

__version__ = "0.1.0"

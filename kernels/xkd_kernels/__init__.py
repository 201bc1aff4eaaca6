"""The place of xkd_fast's own kernels, usable without the trainer. It holds none yet: PyTorch's operators compute the model."""

__version__ = "0.1.0"

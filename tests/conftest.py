"""Before anything imports Triton: without a GPU its kernels are interpreted, so that the tests run the very same code."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

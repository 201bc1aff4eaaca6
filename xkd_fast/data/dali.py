"""NVIDIA DALI as it is used here: pipelines that are fed by hand and run when they are called, on the CPU or on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xkd_fast.errors import UserError

CPU = torch.device("cpu")


def require_dali() -> None:
    """Make sure that DALI is there, best before hours go into data.

    Raises:
        UserError: saying what to install.
    """
    try:
        importlib.import_module("nvidia.dali.pipeline")
    except ImportError as error:
        raise UserError(
            "NVIDIA DALI, which decodes the shards, is not installed; install xkd-fast[cuda13] (on a machine without a GPU "
            f"too) or xkd-fast[cuda12] ({error})"
        ) from error


def reason_of(error: BaseException) -> str:
    """What DALI says was wrong, without where its operator stands."""
    # DALI's message ends with the cause after this word; the rest is where the operator stands in our source
    text = str(error).rsplit("encountered:", 1)[-1].strip()
    text = text.split("C++ context")[0].replace("Current pipeline object is no longer valid.", "")
    return " ".join(text.split())[:300]


def placed(device: torch.device) -> dict[str, Any]:
    """Arguments of a decoder for pictures, of which a GPU's takes encoded bytes from the host's memory ("mixed").

    Its threads are pinned to no core: those of all ranks of a machine would be pinned to the same ones.
    """
    return {"device": "mixed" if device.type == "cuda" else "cpu", "affine": False}


def encoded_input(name: str) -> Any:
    """A node that is fed encoded files, [bytes] uint8 each."""
    from nvidia.dali import fn, types

    return fn.external_source(name=name, ndim=1, dtype=types.DALIDataType.UINT8)


def number_input(name: str) -> Any:
    """A node that is fed one int32 for each sample."""
    from nvidia.dali import fn, types

    return fn.external_source(name=name, ndim=0, dtype=types.DALIDataType.INT32)


class HandFed:
    """A pipeline that runs when it is called, in the caller's thread (other Python threads go on); nothing is in flight after.

    Outputs on a GPU are ready in the order of the caller's current stream, without a wait of the host; the memory is DALI's,
    shared through DLPack without a copy, and lives as long as the tensor. So all work on them belongs on that stream, and they
    must be kept until it is done.

    Args:
        define: makes the nodes and returns the outputs.
        batch_size: samples of a call, at most.
        threads: of the pipeline; on a GPU also how many videos are decoded at the same time.
        device: where pictures are decoded.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, define: Callable[[], Sequence[Any]], batch_size: int, threads: int, device: torch.device = CPU) -> None:
        require_dali()
        from nvidia.dali.pipeline import Pipeline

        self._device = device
        self._pipeline: Any = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=None if device.type == "cpu" else device.index,
            prefetch_queue_depth=1,
            exec_dynamic=True,  # outputs own their memory
        )
        with self._pipeline:
            self._pipeline.set_outputs(*define())
        self._pipeline.build()

    def __call__(self, inputs: Mapping[str, Sequence[NDArray[Any]]]) -> list[list[Tensor]]:
        """The tensors of each output, one for each sample.

        Raises:
            RuntimeError: DALI cannot process a sample; the pipeline must be made anew.
        """
        count = 0
        for name, samples in inputs.items():
            self._pipeline.feed_input(name, samples)
            count = len(samples)
        stream = [] if self._device.type == "cpu" else [torch.cuda.current_stream(self._device)]
        outputs = self._pipeline.run(*stream)
        return [[torch.from_dlpack(output[place]) for place in range(count)] for output in outputs]


def numbers(values: Sequence[int]) -> list[NDArray[np.int32]]:
    """What a `number_input` is fed."""
    return [np.array(value, np.int32) for value in values]


def sound_output() -> Any:
    """The node of the waveforms [samples] float32 of the files fed to "audio"; sound is decoded on the CPU alone."""
    from nvidia.dali import fn, types

    waveform, _ = fn.decoders.audio(encoded_input("audio"), downmix=True, dtype=types.DALIDataType.FLOAT)
    return waveform

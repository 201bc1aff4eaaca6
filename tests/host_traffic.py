"""Notes what would make the host wait for a GPU, without one."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from torch.utils._python_dispatch import TorchDispatchMode


class HostTraffic(TorchDispatchMode):
    """Notes operators that wait for a device's result, or copy a new tensor to it: neither can be recorded."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique", "lift_fresh", "item", "equal")

    def __init__(self, *, allowed: Sequence[str] = ()) -> None:
        super().__init__()
        self.met: list[str] = []
        self.places: list[str] = []  # where each was met: file and line of the caller
        self._allowed = allowed

    def __torch_dispatch__(self, function, types: Sequence[type], args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        if name.startswith(self.FORBIDDEN) and name not in self._allowed:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "host_traffic" not in f.filename]
            self.met.append(name)
            self.places.append(f"{name} {frames[-1].filename}:{frames[-1].lineno}")
        return function(*args, **(kwargs or {}))

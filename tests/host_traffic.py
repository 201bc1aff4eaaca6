"""Notes what would make the host wait for a GPU, without one."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any, ClassVar

from torch.utils._python_dispatch import TorchDispatchMode


class HostTraffic(TorchDispatchMode):
    """Notes operators that wait for a device's result, or copy a new tensor to it: neither can be recorded."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique", "lift_fresh", "item", "equal")

    _active: ClassVar[list[HostTraffic]] = []

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []
        self.places: list[str] = []  # where each was met: file and line of the caller

    def __enter__(self) -> HostTraffic:
        self._active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._active.remove(self)

    @classmethod
    def note(cls, name: str) -> None:
        """Whatever else waits, and is no operator, may call this."""
        for traffic in cls._active:
            traffic._meet(name)

    def __torch_dispatch__(self, function, types: Sequence[type], args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        if name.startswith(self.FORBIDDEN):
            self._meet(name)
        return function(*args, **(kwargs or {}))

    def _meet(self, name: str) -> None:
        own = ("host_traffic", "traffic_ranks")
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and not any(o in f.filename for o in own)]
        frames = frames or traceback.extract_stack()
        self.met.append(name)
        self.places.append(f"{name} {frames[-1].filename}:{frames[-1].lineno}")

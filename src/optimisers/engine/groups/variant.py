"""A program of a group, and what runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...arrays import Untraceable
from ..graph.program import Program
from ..kernels.backend import Host, Kernels
from ..kernels.cuda.devices import warn_once
from ..kernels.cuda.kernels import Device, DeviceKernels
from ..kernels.cuda.nvrtc import CompilationFailed


class Refusal(NamedTuple):
    """Why no program could be made, for the numbers for which the guards of an empty one hold."""

    program: Program
    reason: str


class Variant:
    """A program and its loops, or its kernels on a device.

    ``scalars`` are the numbers of the state that lie on the device.
    """

    def __init__(self, program: Program, device: Device | None = None, scalars: Sequence[str] = ()) -> None:
        self.program, self.device = program, device
        self._scalars = tuple(scalars)
        self._host = Host(program)
        self._on_device: DeviceKernels | Untraceable | None = None

    def loops(self, elements: int) -> Kernels:
        """The loops for a step of so many elements on the host."""
        return self._host.kernels(elements)

    def kernels(self) -> DeviceKernels:
        """The kernels on its device, made when they are asked for first; Untraceable, with one warning, if there are none."""
        if self._on_device is None:
            device: Any = self.device
            try:
                self._on_device = DeviceKernels(self.program, self._scalars, device)
            except CompilationFailed as reason:
                warn_once(device.device, str(reason))
                self._on_device = Untraceable(str(reason))
            except Untraceable as reason:
                self._on_device = reason
        if isinstance(self._on_device, Untraceable):
            raise self._on_device
        return self._on_device

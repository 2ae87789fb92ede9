"""The accelerator ``accel_xla``: whatever devices the XLA runtime has."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.accelerators.registry import _AcceleratorRegistry
from lightning.pytorch.accelerators import Accelerator
from typing_extensions import override

from lightning_accel.core.xla.report import programs_compiled
from lightning_accel.core.xla.runtime import is_installed, require_torch_xla, start


class AccelXLAAccelerator(Accelerator):
    """All devices of the XLA runtime (PJRT): TPUs, GPUs, or virtual devices of the CPU.

    Which of them these are is said by ``PJRT_DEVICE`` in the environment. A program runs on all of them, and Lightning
    counts them as one: there is one process, which has the global batch. Lightning's own ``XLAAccelerator`` knows TPUs
    only, and works with Lightning's own strategies only.

    Raises:
        ModuleNotFoundError: If torch_xla is not installed.
        ImportError: If it was built for another torch.

    """

    def __init__(self) -> None:
        require_torch_xla()

    @override
    def setup_device(self, device: torch.device) -> None:
        """Start XLA, unless that has been done."""
        start()

    @override
    def teardown(self) -> None:
        """Nothing: XLA runs until the process ends."""

    @staticmethod
    @override
    def parse_devices(devices: Any) -> int:
        """The number of devices, which is that of all there are.

        Args:
            devices: What the Trainer was given.

        Raises:
            ValueError: If it is another number, or some of the devices.

        """
        count = AccelXLAAccelerator.auto_device_count()
        everything = ("auto", -1, "-1", count, str(count), list(range(count)))
        if isinstance(devices, bool) or devices not in everything:
            raise ValueError(
                f"Expected devices to be 'auto' or {count}, got {devices!r}: a program runs on all XLA devices. Leave"
                " devices out; how many there are is for the environment to say, on a CPU CPU_NUM_DEVICES=4, say."
            )
        return count

    @staticmethod
    @override
    def get_parallel_devices(devices: int) -> list[torch.device]:
        """One for each, of which torch knows the first, as all of them."""
        return [torch.device("xla", index) for index in range(devices)]

    @staticmethod
    @override
    def auto_device_count() -> int:
        """The number of devices; XLA is started."""
        return start()

    @staticmethod
    @override
    def is_available() -> bool:
        """Whether torch_xla is installed; what it finds is known when it has started."""
        return is_installed()

    @override
    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """What ``DeviceStatsMonitor`` logs: the number of programs that were compiled in this process."""
        return {"programs_compiled": float(programs_compiled())}

    @staticmethod
    @override
    def name() -> str:
        """As it is registered."""
        return "accel_xla"

    @classmethod
    @override
    def register_accelerators(cls, accelerator_registry: _AcceleratorRegistry) -> None:
        """Make the name known."""
        if cls.name() not in accelerator_registry:
            accelerator_registry.register(cls.name(), cls, description=cls.__name__)

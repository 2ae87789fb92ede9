"""What rests on the devices, and what was compiled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class XLAReport:
    """Bytes on one device by kind of state, and how much was compiled."""

    row: str
    """Name of the placement row."""
    devices: int
    """Of all hosts."""
    shard_size: int
    """How many of them divide a copy of the model state."""
    at_rest: dict[str, int]
    """Bytes on one device between steps, padding included: ``parameters``, ``frozen_parameters``, ``gradients``,
    ``optimizer_state``, ``buffers``."""
    steps: int
    """Optimizer steps so far."""
    compilations: int
    """Programs compiled in this process since the engine was made. A number that grows with the steps says that shapes
    change from batch to batch, or that values are read in between."""

    def __str__(self) -> str:
        lines = [
            f"accel_xla, row {self.row}, {self.devices} devices ({self.shard_size} divide a copy), after {self.steps}"
            f" optimizer steps, {self.compilations} programs compiled",
            f"  {'bytes at rest on one device':<32}{'bytes':>16}",
        ]
        lines += [f"    {kind.replace('_', ' '):<30}{size:>16,}" for kind, size in self.at_rest.items()]
        lines.append(f"    {'total':<30}{sum(self.at_rest.values()):>16,}")
        return "\n".join(lines)


def programs_compiled() -> int:
    """Programs compiled in this process."""
    from torch_xla.debug import metrics

    found = metrics.metric_data("CompileTime")
    return int(found[0]) if found else 0

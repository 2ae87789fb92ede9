"""What a precision means for the engine and for the tensors of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lightning_accel.core.placement import Rest, Row

_ALIASES = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")


@dataclass(frozen=True)
class Precision:
    """One of Lightning's precisions, as the strategies of this package carry it out."""

    name: str
    dtype: torch.dtype
    """What is computed with."""
    mixed: bool
    """Whether parameters keep their dtype, and are rounded to compute with them."""

    @staticmethod
    def of(name: str | int) -> Precision:
        """A precision by Lightning's name for it.

        Raises:
            ValueError: If it is not known.

        """
        full = _ALIASES.get(str(name), str(name))
        if full not in PRECISIONS:
            raise ValueError(f"Expected precision to be one of {', '.join(PRECISIONS)}, got {name!r}.")
        width, kind = full.split("-")
        return Precision(full, _DTYPES[width], kind == "mixed")

    def rounded(self, row: Row) -> torch.dtype | None:
        """The engine's ``param_dtype`` for a row; None: parameters stay as they are."""
        return self.dtype if self.mixed and row.optimizer_state is Rest.SHARDED else None

    def kept(self, dtype: torch.dtype) -> torch.dtype:
        """What a parameter, buffer or input of a dtype is converted to before anything else."""
        return dtype if self.mixed or self.name == "32-true" or not dtype.is_floating_point else self.dtype

    @contextmanager
    def computing(self, device: str) -> Iterator[None]:
        """Within it, forward computes as under this precision."""
        if self.mixed:
            with torch.autocast(device, self.dtype):
                yield
            return
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

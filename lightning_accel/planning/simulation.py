"""One rank's training steps, without memory and without the other ranks.

The engine itself runs, on fake tensors and among ranks that are not there (core/simulated.py), and a ledger
(planning/ledger.py) notes what it allocates. Two steps: the first makes the optimizer's state, and the engine learns
orders in it; the second is as all that follow, and is what is reported.

[Note: on which device]
Simulated tensors are on the CPU, whatever the run's device: a build of torch without CUDA cannot differentiate others.
Kernels of CUDA that keep other things for backward than those of the CPU are not seen.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_leaves

from lightning_accel.core.engine import Engine
from lightning_accel.core.partition import Units
from lightning_accel.core.placement import Row
from lightning_accel.core.recompute import recompute
from lightning_accel.core.report import Report
from lightning_accel.core.simulated import simulated
from lightning_accel.planning.ledger import Course, Kind, Ledger
from lightning_accel.planning.precision import Precision
from lightning_accel.planning.subject import Subject

DEVICE = "cpu"
"""See [Note: on which device]."""
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model would be trained."""

    row: Row
    ranks: int
    shard_size: int | None = None
    """For hybrid rows."""
    precision: Precision
    checkpointing: bool = False
    units: Units | None = None
    bucket_cap_mb: float = 25.0
    round_vectors: bool = False
    """As for the engine, where the precision is a mixed one and the row has parameters rounded; so is the next."""
    grad_dtype: torch.dtype | None = None
    steps: int = 2
    """The last one is what is noted."""


@dataclass(frozen=True)
class Outcome:
    """What one rank allocates and sends."""

    report: Report
    """The engine's own, after the last step."""
    course: Course
    """Of the last step."""
    at_rest: dict[Kind, int]
    """Live bytes after the last step."""


def simulate(subject: Subject, setting: Setting) -> Outcome:
    """Train a copy of a model for some steps without memory.

    Args:
        subject: What is trained.
        setting: How.

    Raises:
        ValueError: If the model needs the values of tensors, or there is no way to train it so.

    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = subject.copied(mode, setting.precision, setting.ranks)
    batch = subject.batch_copied(mode, setting.precision)
    module.train()
    with simulated(setting.ranks), mode, Ledger() as ledger:
        ledger.label([t for t in tree_leaves(batch) if isinstance(t, Tensor)], "temporary")
        ledger.label(module.buffers(), "buffers")
        ledger.label(module.parameters(), "parameters")  # those that get no unit; the others get memory of the engine's
        rounded = setting.precision.rounded(setting.row)
        engine = Engine(
            module,
            setting.row,
            units=setting.units,
            bucket_cap_mb=setting.bucket_cap_mb,
            shard_size=setting.shard_size if setting.row.hybrid else None,
            param_dtype=rounded,
            round_vectors=setting.round_vectors and rounded is not None,
            grad_dtype=None if rounded is None else setting.grad_dtype,
        )
        if setting.checkpointing:
            engine.at_close.callback(recompute(engine.blocks.values()))
        optimizers = subject.optimizers(module)
        for optimizer in optimizers:
            engine.add_optimizer(optimizer)
        engine.build()

        def step() -> None:
            # In the Trainer's order: gradients of the last step are there until this forward has ended.
            ledger.enter("forward")
            with _explained("a model whose forward"), setting.precision.computing(DEVICE), engine.forward_context():
                outputs = subject.outputs(module, batch)
            loss = subject.loss(outputs)
            del outputs
            for optimizer in optimizers:
                optimizer.zero_grad()
            ledger.enter("backward")
            with _explained("a model whose backward"):
                engine.backward(loss)
            del loss
            ledger.enter("step")
            for optimizer in optimizers:
                with _explained("an optimizer whose step"):
                    optimizer.step()
                state = [value for values in optimizer.state.values() for value in values.values()]
                ledger.label([value for value in state if isinstance(value, Tensor)], "optimizer_state")
            engine.wait()
            ledger.enter("rest")

        with warnings.catch_warnings():
            # Of self.log without a Trainer, and of LR schedulers.
            warnings.simplefilter("ignore")
            for _ in range(setting.steps - 1):
                step()
            with ledger.recording() as courses:
                step()
        report, at_rest = engine.report(), ledger.now
        engine.close()
    return Outcome(report, courses[0], at_rest)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say where values are needed that are not there, and what else went wrong in the user's code.

    Args:
        what: Whose code it is, for messages.

    Raises:
        ValueError: Instead of any other error.

    """
    try:
        yield
    except _DATA_DEPENDENT as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = Path(__file__).parent.parent, Path(torch.__file__).parent
        users = [f for f in frames if not any(Path(f.filename).is_relative_to(folder) for folder in ours)]
        where = f"{users[-1].filename}:{users[-1].lineno}: {users[-1].line}" if users else "torch"
        raise ValueError(
            f"Expected {what} needs no values of tensors, but {_operation(error)} does ({where}). While it is planned"
            " tensors have shapes only. Leave out what looks at values (.item(), `if tensor:`, masks as indices,"
            " metrics), or plan for the part of the model that does not."
        ) from error
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"Expected {what} runs without values of tensors, but it raised {type(error).__name__}:"
            f" {_first_line(error)}."
            " Is the batch what one training step gets?"
        ) from error


def _operation(error: Exception) -> str:
    return str(getattr(error, "func", None) or _first_line(error))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")

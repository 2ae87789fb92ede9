"""The flat buffers of one unit, and the life of its gradients.

A unit is a set of parameters of one dtype whose gradients are reduced together and whose updated values are gathered
together. Its memory::

    flat    |======== parameters, padded =======|   every parameter's data is a view of it, see ParameterMemory
    grad    |======== gradients ================|   this rank's contributions, for rows that add them up locally;
                                                    borrowed for one backward from a pool otherwise
    rest    |=================|                     where reduced gradients rest on this rank: all of ``grad``, this
                                                    rank's part of it, or a buffer of that part's size

[Note: one write per gradient]
Autograd hands a leaf's gradient over without a copy when ``leaf.grad`` is None. It is therefore hidden during
backward, and each arriving gradient is written once: ``mul(out=)`` into its slot for the first contribution, ``add_``
for the later ones. Both multiply by 1/N on the way, so that the sum over ranks is the mean, at no extra pass, and no
buffer is ever zeroed as a whole.

[Note: one copy's sum]
With several copies of the state, the gradients of micro-batches are summed over the ranks of one copy only, and over
the copies at the accumulation boundary: what travels between machines does so once a step.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial

import torch
from torch import Tensor, nn

from lightning_accel.core.collectives import Pending
from lightning_accel.core.layout import Layout
from lightning_accel.core.low_rank import Compression
from lightning_accel.core.memory import taken, zeros
from lightning_accel.core.mesh import Mesh
from lightning_accel.core.parameter_memory import Gauge, ParameterMemory
from lightning_accel.core.placeholder import ShardedGradient
from lightning_accel.core.placement import Rest, Row
from lightning_accel.core.pool import BufferPool
from lightning_accel.core.wire import Wire

_POLL_S = 1e-4


class Content(Enum):
    """What a parameter's gradient slot holds."""

    NONE = auto()
    """Nothing: ``parameter.grad`` is None."""
    LOCAL = auto()
    """This rank's contributions, times 1/N (in mixed precision not yet), not yet added to the others'."""
    REDUCED = auto()
    """The mean over ranks, in the place where the row lets it rest."""


# To look an enum's member up takes as long as the half of what is done with a small gradient.
_NONE, _LOCAL, _REDUCED = Content.NONE, Content.LOCAL, Content.REDUCED


class Phase(Enum):
    """Where a unit is within one backward."""

    FILLING = auto()
    """Gradients are arriving."""
    REDUCING = auto()
    """The reduction is under way; a gradient that still arrives is late."""
    DONE = auto()
    """The reduction has been waited for."""


_FILLING = Phase.FILLING


class Unit:
    """One unit: parameters in a flat buffer, and where their gradients are.

    Args:
        name: For messages and reports.
        parameters: The parameters, in the order of the layout's indices.
        names: Their names in the module.
        layout: Where they lie and how the ranks divide them.
        row: Where gradients rest.
        mesh: The ranks.
        pool: Lends gradient buffers to rows that keep none.
        gauge: Told about memory of gathered parameters.
        block: The module that all of the parameters belong to; None if that is just the whole model.
        on_host: Keep this rank's part of parameters that rest sharded in host memory.
        dtype: What the model computes with, if not the parameters' own.
        reduce_dtype: What gradients travel in; by default what they are computed in or, where they are added up on each
            rank, what they rest in. Complex ones always do.
        grad_dtype: What gradients rest in where there are master values; by default the dtype of these.
        compression: Of gradients that all ranks have whole, if they are to be.

    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        names: Sequence[str],
        layout: Layout,
        row: Row,
        mesh: Mesh,
        pool: BufferPool,
        gauge: Gauge,
        block: nn.Module | None = None,
        on_host: bool = False,
        dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        grad_dtype: torch.dtype | None = None,
        compression: Compression | None = None,
    ) -> None:
        self.name = name
        self._compression = compression
        self.layout = layout
        self.block = block
        self.parameters = [parameters[slot.index] for slot in layout.slots]
        self.names = [names[slot.index] for slot in layout.slots]
        self._row = row
        self._mesh = mesh
        self._pool = pool
        self.content = [Content.NONE] * len(self.parameters)
        self.phase = Phase.FILLING
        self.arrivals = [0] * len(self.parameters)
        self.expected = [1] * len(self.parameters)
        self._missing = len(self.parameters)
        self._reduction: Pending | None = None
        self._late: dict[int, Tensor] = {}
        self._aside: Tensor | None = None  # reduced gradients kept while new ones are added up
        self._kept: set[int] = set()
        self._inside = False  # see [Note: one copy's sum]
        self.writes = 0
        self.is_muted = False
        """Whether arriving gradients count as zeros."""

        self.memory = ParameterMemory(self.parameters, self.names, layout, row, mesh.shard, gauge, on_host, dtype)
        self.rest_dtype = self.memory.master_dtype
        """Of reduced gradients."""
        # To what arrives or, if that is not precise enough, to what was added up in a wider dtype.
        self._scale, self._scale_of_sum = 1.0 / mesh.world.ranks, 1.0
        if self.memory.has_master:
            self._scale, self._scale_of_sum = self._scale_of_sum, self._scale
            self.rest_dtype = grad_dtype or self.rest_dtype
        # What is added up over micro-batches is as precise as what it will update, unless the user wants it smaller.
        self._grad_dtype = self.rest_dtype
        self._wire: Wire | None = None
        if not self.memory.dtype.is_floating_point:
            reduce_dtype = None
        if row.accumulating is Rest.SHARDED:
            self._grad_dtype = reduce_dtype or self.memory.dtype
        elif reduce_dtype not in (None, self._grad_dtype) and mesh.shard.ranks > 1:
            self._wire = Wire(reduce_dtype, layout, mesh.shard, pool)
        self._sum: Tensor | None = None  # what is reduced now, if neither ``grad`` nor ``rest`` has room for it
        self.grad: Tensor | None = None
        self._borrowed: Tensor | None = None
        self._grad_views: list[Tensor] = []
        self.rest: Tensor | None = None
        self.factor = 1.0
        """What reduced gradients are still to be multiplied by. See core/gradients.py."""
        self.edits = 0
        """How often the user has changed what rests."""
        self._placeholders: dict[int, ShardedGradient] = {}
        self._shown_dtype: torch.dtype | None = None  # of all of them

    # ------------------------------------------------------------------ memory

    @property
    def flat(self) -> Tensor:
        """The buffer of the parameters; it may have no memory just now."""
        return self.memory.buffer

    @property
    def part(self) -> tuple[int, int]:
        """The range of the buffer that this rank updates."""
        return self.memory.part

    @property
    def borrows(self) -> bool:
        """Whether a reduction borrows memory while it is under way."""
        return self._row.accumulating is Rest.SHARDED or self._wire is not None

    @property
    def gradient_padding(self) -> int:
        """Elements of the gradient memory at rest that belong to no parameter."""
        if self._row.accumulating is Rest.REPLICATED:
            return self.layout.padding
        start, stop = self.part
        return stop - start - sum(piece.stop - piece.start for piece in self.layout.pieces(start, stop))

    def view(self, buffer: Tensor, position: int) -> Tensor:
        """The slot of the parameter at ``position``, shaped and strided as the parameter is."""
        return self.memory.view(buffer, position)

    def release(self, *, abandon: bool = False) -> None:
        """Give the parameters memory of their own again and drop all gradients; see ``ParameterMemory.release``."""
        self.drop_gradients()
        self.memory.release(abandon=abandon)

    def drop_gradients(self) -> None:
        """Forget all gradients and free their memory."""
        for parameter in self.parameters:
            parameter.grad = None
        self.content = [Content.NONE] * len(self.parameters)
        self._kept.clear()
        self.grad = self.rest = self._aside = None
        self._grad_views = []
        self.factor = 1.0

    def _open_buffers(self) -> None:
        """Have a full-size gradient buffer and a resting place."""
        if self.grad is not None:
            return
        if self._row.accumulating is Rest.REPLICATED:
            self.grad = taken(zeros(self.layout.total, self._grad_dtype, self.flat.device), "gradients")
            self.rest = self.grad[slice(*self.part)]
        else:
            self._borrowed = self._pool.borrow(self.layout.total, self._grad_dtype, self.flat.device)
            self.grad = self._borrowed[: self.layout.total]
            if self.rest is None:
                start, stop = self.part
                self.rest = taken(self.flat.new_zeros(stop - start, dtype=self.rest_dtype), "gradients")
        self._grad_views = self.memory.views_of(self.grad)

    def _close_buffers(self) -> None:
        """Give the borrowed gradient buffer back."""
        assert self._borrowed is not None
        self._pool.give_back(self._borrowed)
        self.grad = self._borrowed = None
        self._grad_views = []

    # ---------------------------------------------------- what the user sees

    def reconcile(self) -> None:
        """Take over what was done to ``parameter.grad`` since it was shown.

        It may have been set to None, or to another tensor, which is taken to be the same on every rank.
        """
        content, kept = self.content, self._kept
        for position, parameter in enumerate(self.parameters):
            shown = parameter.grad
            if shown is None:
                content[position] = _NONE
                if kept:
                    kept.discard(position)
            elif shown is not self._placeholders.get(position) and not self._is_view(shown, position):
                self._take_over(position, shown)

    def drop_unused(self) -> None:
        """Free the memory of gradients that were all set to None, in rows that are chosen for their memory."""
        resting = self._row.parameters is Rest.SHARDED and self.grad is None  # not just a part of a whole buffer
        if resting and all(parameter.grad is None for parameter in self.parameters):
            self.reconcile()
            self.rest = None
            self.factor = 1.0

    def _is_view(self, shown: Tensor, position: int) -> bool:
        return bool(self._grad_views) and shown is self._grad_views[position]

    def _take_over(self, position: int, value: Tensor) -> None:
        """Put a whole gradient to rest as if it had been reduced."""
        if value.layout is not torch.strided:
            raise ValueError(f"Expected a dense gradient of {self.names[position]!r}, got layout {value.layout}.")
        if Content.REDUCED not in self.content:
            self._inside = False
        self.apply_factor()
        self.edits += 1
        self._open_buffers()
        assert self.rest is not None
        slot = self.layout.slots[position]
        whole = value.new_empty(slot.numel, dtype=self.rest_dtype)
        whole.as_strided(value.shape, self.memory.strides[position]).copy_(value)
        start, stop = self.part
        begin, end = max(slot.start, start), min(slot.stop, stop)
        if begin < end:
            self.rest[begin - start : end - start].copy_(whole[begin - slot.start : end - slot.start])
            if self._inside:
                self.rest[begin - start : end - start].mul_(1.0 / self._mesh.copies)
        self._kept.discard(position)
        self.content[position] = Content.REDUCED
        if self._row.accumulating is Rest.SHARDED:
            self._close_buffers()

    def hide(self) -> None:
        """Set every ``parameter.grad`` to None for backward. See [Note: one write per gradient]."""
        self.reconcile()
        self.apply_factor()
        for parameter in self.parameters:
            parameter.grad = None
        self.phase = Phase.FILLING
        self.arrivals = [0] * len(self.parameters)
        self._missing = sum(parameter.requires_grad for parameter in self.parameters)

    def apply_factor(self) -> None:
        """Multiply reduced gradients by what they are still to be multiplied by."""
        if self.factor != 1.0 and Content.REDUCED in self.content:
            assert self.rest is not None
            assert Content.LOCAL not in self.content, "factors are for what is about to be stepped with"
            self.rest.mul_(self.factor)
        self.factor = 1.0

    def show(self) -> None:
        """Set every ``parameter.grad`` to what its slot holds."""
        # Torch has a gradient be of the parameter's dtype, which master values have another one of.
        local_is_seen = not self.memory.has_master
        reduced_is_seen = local_is_seen and self._row.gradients is Rest.REPLICATED
        if self.parameters[0].dtype != self._shown_dtype:
            self._placeholders.clear()
            self._shown_dtype = self.parameters[0].dtype
        kept, views = self._kept, self._grad_views
        for position, (parameter, content) in enumerate(zip(self.parameters, self.content, strict=True)):
            in_place = reduced_is_seen if content is _REDUCED else local_is_seen
            if kept and position in kept:  # some of it is here, some elsewhere
                parameter.grad = self._placeholder(position)
            elif content is _NONE:
                parameter.grad = None
            elif in_place:
                parameter.grad = views[position]
            else:
                parameter.grad = self._placeholder(position)

    def _placeholder(self, position: int) -> ShardedGradient:
        known = self._placeholders.get(position)
        if known is None:
            known = ShardedGradient(self.parameters[position], self.names[position], _zeroing(self, position))
            self._placeholders[position] = known
        return known

    def zero_gradient(self, position: int) -> None:
        """Set the reduced gradient of one parameter to zero where it rests."""
        self.edits += 1
        assert self.rest is not None
        start, _ = self.part
        slot = self.layout.slots[position]
        place = self.rest if self._aside is None else self._aside
        place[max(slot.start - start, 0) : max(slot.stop - start, 0)].zero_()
        if self.content[position] is Content.LOCAL:
            self._grad_views[position].zero_()

    # -------------------------------------------------------------- gradients

    def write(self, position: int, gradient: Tensor) -> bool:
        """Add one arriving gradient to what this rank contributes.

        Returns:
            Whether the unit now has all gradients that it expects in this backward.

        """
        self.arrivals[position] += 1
        if self.phase is not _FILLING:
            if self.is_muted:
                return False
            gradient = gradient * self._scale
            late = self._late.get(position)
            self._late[position] = gradient if late is None else late.add_(gradient)
            return False
        if self.grad is None:
            self._open_buffers()
        contents = self.content
        if contents[position] is _REDUCED:
            self._leave_rest()
        view, content = self._grad_views[position], contents[position]
        if self.is_muted:
            if content is not _LOCAL:
                view.zero_()
        elif content is _LOCAL:
            view.add_(gradient, alpha=self._scale)
        elif self._scale == 1.0:
            view.copy_(gradient)
        else:
            torch.mul(gradient, self._scale, out=view)
        self.writes += 1
        contents[position] = _LOCAL
        if self.arrivals[position] == self.expected[position]:
            self._missing -= 1
        return self._missing == 0 and self.is_ready

    @property
    def contributes(self) -> list[bool]:
        """For each parameter, whether this rank has something for the reduction."""
        return [content is _LOCAL for content in self.content]

    @property
    def is_inside(self) -> bool:
        """Whether reduced gradients are one copy's sum only. See [Note: one copy's sum]."""
        return self._inside and Content.REDUCED in self.content

    @property
    def is_ready(self) -> bool:
        """Whether all gradients that are expected in this backward have arrived and no reduction was started."""
        return self._missing == 0 and self.phase is Phase.FILLING and any(self.arrivals)

    @property
    def is_late(self) -> bool:
        """Whether a gradient arrived after the reduction had started."""
        return bool(self._late)

    def _leave_rest(self) -> None:
        """Make room for new contributions where reduced gradients rest, without losing those."""
        if _REDUCED not in self.content:
            return
        reduced = {position for position, content in enumerate(self.content) if content is _REDUCED}
        assert self.grad is not None
        assert self.rest is not None
        if self._row.gradients is Rest.REPLICATED:
            # Every rank has the same mean: a share of it from each adds up to it again.
            for position in reduced:
                self._grad_views[position].mul_(self._scale)
                self.content[position] = Content.LOCAL
            return
        self._kept |= reduced
        if self._aside is None:
            in_place = self._row.accumulating is Rest.REPLICATED
            self._aside = self.rest.clone() if in_place else self.rest
        elif self._aside is not self.rest:
            start, stop = self.part
            for piece in self.layout.pieces(start, stop):
                if piece.slot in reduced:
                    where = slice(piece.start - start, piece.stop - start)
                    self._aside[where].copy_(self.rest[where])
        for position in reduced:
            self.content[position] = Content.NONE

    def reduce(self, *, boundary: bool) -> None:
        """Start the reduction.

        Args:
            boundary: Whether an optimizer step may follow.

        """
        assert self.phase is Phase.FILLING
        self._open_buffers()
        assert self.grad is not None
        assert self.rest is not None
        self._leave_rest()
        for position, content in enumerate(self.content):
            if content is _NONE:
                slot = self.layout.slots[position]
                self.grad[slot.start : slot.stop].zero_()
        self.phase = Phase.REDUCING
        if self._row.gradients is Rest.REPLICATED:
            self._reduction = self._all_reduce(self.grad) if self._compression is None else self._compress()
        else:
            # Straight to the resting place, unless gradients already there must be added to.
            out = self.rest if self._aside is None else self.grad[slice(*self.part)]
            if out.dtype != self.rest_dtype:
                out = self._sum = taken(torch.empty_like(self.rest), "gradients")
            self._reduction = self._reduce_scatter(self.grad, out)
            if self._scale_of_sum != 1.0:
                self._reduction = Pending([self._reduction], partial(_scale, out, self._scale_of_sum))
            if self._mesh.replicate is not None:
                self._reduce_across(boundary)

    def _all_reduce(self, gradients: Tensor) -> Pending:
        if self._wire is not None:
            return self._wire.all_reduce(gradients)
        return self._mesh.shard.all_reduce(gradients, self.layout)

    def _compress(self) -> Pending:
        assert self._compression is not None
        assert self.grad is not None
        return self._compression.all_reduce(
            self.grad, self.layout, self._grad_views, self.contributes, self.parameters, self.names
        )

    def _reduce_scatter(self, gradients: Tensor, out: Tensor) -> Pending:
        if self._wire is not None:
            return self._wire.reduce_scatter(gradients, out)
        return self._mesh.shard.reduce_scatter(gradients, self.layout, out)

    def _reduce_across(self, boundary: bool) -> None:
        """Sum over the copies what is being summed over the ranks of one. See [Note: one copy's sum]."""
        assert self._reduction is not None
        assert self.rest is not None
        if self._aside is not None and not self._inside:
            # Every copy has the same mean: a share of it from each adds up to it again.
            self._aside.mul_(1.0 / self._mesh.copies)
        self._inside = not boundary
        if boundary:
            inside = self._reduction
            if self._aside is not None:
                inside = Pending([inside], self._merge_aside)
            self._reduction = self._mesh.reduce_across(inside, self.rest)

    def advance(self) -> None:
        """Let a reduction of several phases enter the next."""
        assert self._reduction is not None
        self._reduction.advance()

    def advance_if_ready(self) -> bool:
        """The same, unless that would mean to wait; whether it did not."""
        assert self._reduction is not None
        ready = self._reduction.is_ready()
        if ready:
            self._reduction.advance()
        return ready

    def wait_briefly(self, seconds: float) -> bool:
        """Wait for a reduction no longer than ``seconds``. On CUDA nothing has to be waited for.

        Returns:
            Whether ``finish`` does not block now.

        """
        assert self._reduction is not None
        if self.flat.device.type != "cpu":
            return True
        end = time.monotonic() + seconds
        while not self._reduction.is_ready():
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_S)
        return True

    def finish(self) -> None:
        """Wait for the reduction and put its result to rest."""
        assert self.phase is Phase.REDUCING
        assert self._reduction is not None
        self._reduction.wait()
        self._reduction = None
        self.phase = Phase.DONE
        if self._wire is not None:
            self._wire.close()
        if self._aside is not None:
            self._merge_aside()
        if self._row.accumulating is Rest.SHARDED:
            self._close_buffers()

    def _merge_aside(self) -> None:
        """Add gradients that were reduced earlier to those reduced now."""
        assert self.grad is not None
        assert self.rest is not None
        assert self._aside is not None
        start, stop = self.part
        now = self.grad[start:stop] if self._sum is None else self._sum
        for piece in self.layout.pieces(start, stop):
            where = slice(piece.start - start, piece.stop - start)
            if piece.slot in self._kept:
                torch.add(self._aside[where], now[where], out=self.rest[where])
            else:
                self.rest[where].copy_(now[where])
        self._aside = self._sum = None

    def settle(self, used: Sequence[bool]) -> None:
        """Note which gradients there are after a reduction.

        Args:
            used: For each parameter, whether any rank contributed.

        """
        assert self.phase is Phase.DONE
        self.content = [
            # Locally there without a flag: reduced earlier, and every rank's share of it was added up again.
            _REDUCED if flag or content is _LOCAL or position in self._kept else _NONE
            for position, (flag, content) in enumerate(zip(used, self.content, strict=True))
        ]
        self._kept.clear()

    def reduce_late(self, *, boundary: bool) -> None:
        """Reduce the gradients that arrived after the reduction had started, and add them. All ranks take part."""
        assert self.phase is Phase.DONE
        assert self.rest is not None
        late = torch.zeros(self.layout.total, dtype=self._grad_dtype, device=self.flat.device)
        for position, gradient in self._late.items():
            self.view(late, position).copy_(gradient)
        self._late.clear()
        if self._row.gradients is Rest.REPLICATED:
            self._all_reduce(late).wait()
            self.rest.add_(late)
        else:
            out = late[slice(*self.part)]
            reduction = self._reduce_scatter(late, out)
            (self._mesh.reduce_across(reduction, out) if boundary else reduction).wait()
            self.rest.add_(out, alpha=self._scale_of_sum)
        if self._wire is not None:
            self._wire.close()

    def learn(self) -> None:
        """Expect as many gradients of each parameter in the next backward as came in this one."""
        self.expected = [count or before for count, before in zip(self.arrivals, self.expected, strict=True)]

    def full_gradient(self, position: int) -> Tensor | None:
        """The whole reduced gradient of one parameter. All ranks take part."""
        if self.content[position] is not Content.REDUCED or self._inside:
            return None
        assert self.rest is not None
        full = torch.zeros(self.layout.total, dtype=self.rest_dtype, device=self.flat.device)
        full[slice(*self.part)] = self.rest * self.factor
        if self._row.gradients is Rest.SHARDED:
            self._mesh.shard.all_gather(full, self.layout).wait()
        return self.view(full, position).clone()

    def local_gradient(self, start: int, stop: int) -> Tensor:
        """Reduced gradients of a range of this rank's part, as a 1-D view."""
        assert self.rest is not None
        first, _ = self.part
        return self.rest[start - first : stop - first]


def _scale(tensor: Tensor, factor: float) -> None:
    tensor.mul_(factor)


def _zeroing(unit: Unit, position: int) -> Callable[[], None]:
    """Zero one gradient of a unit, without keeping the unit alive."""
    reference = weakref.ref(unit)

    def zero() -> None:
        found = reference()
        if found is not None:
            found.zero_gradient(position)

    return zero

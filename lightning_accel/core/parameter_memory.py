"""Where the parameters of one unit lie, and when they are there.

::

                rests replicated                     rests sharded
    buffer      |==== every parameter ====|          |= every parameter =| while HERE, no memory while AWAY
    mine              |====|  a view of it                 |====|          memory of its own, always there

Every parameter's data is a view of ``buffer`` at all times. Freeing and filling the buffer changes its storage in place
(``resize_``), so that the views, and the tensors that autograd saved for backward, stay what they are.

[Note: master values]
Where the model computes in another dtype than the one it came with, ``buffer`` is of that dtype, and so is what is
gathered. ``mine`` is memory of its own in every row then and keeps the dtype that the model came with: these are the
master values. The optimizer updates them, and ``after_update`` rounds them to this rank's part of what is computed
with. Whoever asks for whole parameters between steps (checkpoints do) is shown master values. (Micikevicius et al.,
"Mixed Precision Training", 2018.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto

import torch
from torch import Tensor, nn

from lightning_accel.core.absent import AbsentParameter, arrive, depart
from lightning_accel.core.collectives import Collectives, Pending, Published
from lightning_accel.core.layout import Layout
from lightning_accel.core.memory import taken, zeros
from lightning_accel.core.offload import host_memory
from lightning_accel.core.placement import Rest, Row
from lightning_accel.core.watching import PARAMETERS


class Presence(Enum):
    """Whether a unit's parameters have their values on this rank."""

    AWAY = auto()
    """Only this rank's part is here; the buffer has no memory."""
    COMING = auto()
    """Being gathered."""
    HERE = auto()
    """All of them."""


class Gauge:
    """Bytes of gathered parameters: now, and at most."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def change(self, size: int) -> None:
        """Note that memory was taken (or, if negative, freed)."""
        self.now += size
        self.peak = max(self.peak, self.now)


class ParameterMemory:
    """The parameters of one unit in one flat buffer.

    Args:
        parameters: In the order of the layout's slots. Their data becomes views of the buffer.
        names: Their names.
        layout: Where each lies, and which part is whose.
        row: Whether they rest sharded.
        collectives: Gathers them.
        gauge: Told about memory of parameters that rest sharded.
        on_host: Keep this rank's part of parameters that rest sharded in host memory.
        dtype: What the model computes with, if not the parameters' own. See [Note: master values].

    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        names: Sequence[str],
        layout: Layout,
        row: Row,
        collectives: Collectives,
        gauge: Gauge,
        on_host: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._on_host = on_host
        self.master_dtype = parameters[0].dtype
        """Of what the optimizer updates."""
        self.dtype = dtype or self.master_dtype
        """Of what the model computes with."""
        self.has_master = self.dtype != self.master_dtype
        """Whether the two differ."""
        self.parameters = list(parameters)
        self.names = list(names)
        self.layout = layout
        self.strides = [_dense_strides(parameter) for parameter in parameters]
        self._places = [
            (parameter.shape, strides, slot.start)
            for parameter, strides, slot in zip(parameters, self.strides, layout.slots, strict=True)
        ]
        # A single rank's part is the whole.
        self.is_sharded = row.parameters is Rest.SHARDED and collectives.ranks > 1
        self.presence = Presence.HERE
        self._row = row
        self._collectives = collectives
        self._gauge = gauge
        self._coming: Pending | None = None
        self.buffer: Tensor
        """All parameters, end to end; it may have no memory just now."""
        self.views: list[Tensor]
        """The slots of the buffer, shaped as the parameters are."""
        self.mine: Tensor
        """This rank's part: what its optimizer updates."""
        self.shared: Tensor
        """This rank's part of what the model computes with: the same memory, unless there are master values."""
        self.source: Published
        """The same, as the other ranks know it; set once it is published."""
        self._rounded: tuple[Tensor, list[Tensor]] | None = None  # while master values are shown: what is not
        self._shown = 0  # by how many they are
        self._written = 0  # by how many of those who want their changes to be kept
        self._stepped = False  # whether they were updated meanwhile
        self.is_open = False
        """Whether there is a buffer. (Parameters without values get theirs later: see core/materialise.py.)"""
        if not any(parameter.is_meta for parameter in self.parameters):
            self.open()
            self.seal()
        elif self.is_sharded:
            # Before any buffer that comes and goes, so that those use the same memory one after the other.
            self.mine = self._new_part(self.master_dtype)

    def open(self) -> None:
        """Give the parameters their places in the buffer, and those that have values keep them there."""
        assert not self.is_open
        self.is_open = True
        self.buffer = self._new_buffer(self.master_dtype)
        self._bytes = self.buffer.untyped_storage().nbytes()
        if self.is_sharded:
            self._gauge.change(self._bytes)
        self.views = [self.view(self.buffer, position) for position in range(len(self.parameters))]
        with torch.no_grad():
            for view, parameter in zip(self.views, self.parameters, strict=True):
                if parameter.is_meta:
                    give_memory(parameter, view)
                else:
                    view.copy_(parameter)
                    parameter.data = view

    def seal(self) -> None:
        """All parameters have their values: keep this rank's part where they rest sharded, and free the rest."""
        part = self.buffer[slice(*self.part)]
        if not self.is_sharded and not self.has_master:
            self.mine = self.shared = part
            return
        if not hasattr(self, "mine"):
            self.mine = self._new_part(self.master_dtype)
        self.mine.copy_(part)
        self.shared = self.mine
        if self.has_master:
            self._round()
        if self.is_sharded:
            self.free()

    def _round(self) -> None:
        """Have a buffer of what the model computes with."""
        rounded = self._new_buffer(self.dtype)
        rounded.copy_(self.buffer)
        before, self._bytes = self._bytes, rounded.untyped_storage().nbytes()
        if self.is_sharded:
            self._gauge.change(self._bytes - before)
        self._look_at(rounded, [self.view(rounded, position) for position in range(len(self.parameters))])
        if self.is_sharded:
            self.shared = self._new_part(self.dtype)
            self.shared.copy_(self.mine)
        else:
            self.shared = self.buffer[slice(*self.part)]

    def _look_at(self, buffer: Tensor, views: list[Tensor]) -> None:
        self.buffer, self.views = buffer, views
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view

    def _new_buffer(self, dtype: torch.dtype) -> Tensor:
        device = self._collectives.device
        if self.is_sharded:  # memory that can be freed and filled again
            return taken(torch.zeros(self.layout.total, dtype=dtype, device=device), "gathered")
        return taken(zeros(self.layout.total, dtype, device), "parameters")

    def _new_part(self, dtype: torch.dtype) -> Tensor:
        start, stop = self.part
        device = self._collectives.device
        if self._on_host and device.type != "cpu":
            return host_memory(stop - start, dtype)
        is_master = self.has_master and dtype == self.master_dtype
        part = torch.empty(stop - start, dtype=dtype, device=device)
        return taken(part, "master_parameters" if is_master else "parameters")

    @property
    def part(self) -> tuple[int, int]:
        """The range of the buffer that this rank updates: all of it unless optimizer state rests sharded."""
        if self._row.optimizer_state is Rest.SHARDED:
            return self.layout.part(self._collectives.rank)
        return 0, self.layout.total

    @property
    def resting(self) -> Tensor:
        """What is kept between steps of what the model computes with."""
        return self.shared if self.is_sharded else self.buffer

    def view(self, buffer: Tensor, position: int) -> Tensor:
        """The slot of the parameter at ``position``, shaped and strided as the parameter is."""
        slot = self.layout.slots[position]
        return buffer.as_strided(
            self.parameters[position].shape, self.strides[position], buffer.storage_offset() + slot.start
        )

    def views_of(self, buffer: Tensor) -> list[Tensor]:
        """The slots of all parameters."""
        offset = buffer.storage_offset()
        return [buffer.as_strided(shape, strides, offset + start) for shape, strides, start in self._places]

    def own(self, start: int, stop: int) -> Tensor:
        """The values of a range of the buffer that lies in this rank's part, as a 1-D view."""
        first, _ = self.part
        return self.mine[start - first : stop - first]

    # ------------------------------------------------------------ master values

    def before_update(self) -> None:
        """Call before ``mine`` is updated: the update starts from master values that were changed to be kept."""
        if self._written:
            self.mine.copy_(self.buffer[slice(*self.part)])

    def after_update(self) -> None:
        """Call when ``mine`` has changed: round it to this rank's part of what the model computes with.

        Where master values are shown, all ranks call it together.
        """
        if not self.has_master:
            return
        self.shared.copy_(self.mine)
        if self.shows_master:
            self._gather_master()
            self._stepped = True

    @property
    def shows_master(self) -> bool:
        """Whether the parameters show their master values just now."""
        return self._rounded is not None

    @torch.no_grad()
    def show_master(self, *, writeback: bool) -> None:
        """Have all parameters show their master values. All ranks take part.

        Args:
            writeback: Keep changes that are made to them, the same ones on every rank.

        """
        self._shown += 1
        self._written += writeback
        if self._shown > 1:
            return
        self.wait()
        if self.presence is Presence.AWAY:
            for parameter in self.parameters:
                arrive(parameter)
        self._rounded = self.buffer, self.views
        whole = torch.zeros(self.layout.total, dtype=self.master_dtype, device=self._collectives.device)
        taken(whole, "gathered")
        self._look_at(whole, [self.view(whole, position) for position in range(len(self.parameters))])
        self._gather_master()

    def _gather_master(self) -> None:
        self.buffer[slice(*self.part)].copy_(self.mine)
        self._collectives.all_gather(self.buffer, self.layout).wait()

    @torch.no_grad()
    def hide_master(self, *, writeback: bool) -> None:
        """End what ``show_master`` began, with the same argument."""
        if writeback:
            self.mine.copy_(self.buffer[slice(*self.part)])
        self._shown -= 1
        self._written -= writeback
        if self._shown:
            return
        assert self._rounded is not None
        whole = self.buffer
        self._look_at(*self._rounded)
        self._rounded = None
        self.shared.copy_(self.mine)
        if self.presence is Presence.AWAY:
            for parameter, name in zip(self.parameters, self.names, strict=True):
                depart(parameter, name)
        elif writeback or self._stepped:
            self.buffer.copy_(whole)
        self._stepped = False

    # -------------------------------------------------------------- other values

    @contextmanager
    def standing_in(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Within it, the parameters have other tensors' values, which may be of another dtype and on another device.

        Nothing may be under way, and the parameters are not to be used for anything but to look at them.

        Args:
            values: One for each parameter, of its shape.

        """
        away = any(isinstance(parameter, AbsentParameter) for parameter in self.parameters)
        for parameter in self.parameters if away else ():
            arrive(parameter)
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, view in zip(self.parameters, self.views, strict=True):
                parameter.data = view
            for parameter, name in zip(self.parameters, self.names, strict=True) if away else ():
                depart(parameter, name)

    # ------------------------------------------------------- sharded parameters

    def fetch(self) -> None:
        """Start to gather the parameters, if they are away."""
        if self.presence is not Presence.AWAY:
            return
        self.buffer.untyped_storage().resize_(self._bytes)
        self._gauge.change(self._bytes)
        self._coming = self._collectives.fetch(self.source, self.layout, self.buffer)
        self.presence = Presence.COMING

    def wait(self) -> None:
        """Wait for parameters that were fetched."""
        if self.presence is not Presence.COMING:
            return
        assert self._coming is not None
        with self._collectives.phases.within(PARAMETERS):
            self._coming.wait()
        self._coming = None
        for parameter in self.parameters:
            arrive(parameter)
        self.presence = Presence.HERE

    def free(self) -> None:
        """Free the memory of parameters that rest sharded, if it is there; this rank's part stays."""
        self.wait()
        if not self.is_sharded or self.presence is Presence.AWAY:
            return
        for parameter, name in zip(self.parameters, self.names, strict=True):
            depart(parameter, name)
        self.buffer.untyped_storage().resize_(0)
        self._gauge.change(-self._bytes)
        self.presence = Presence.AWAY

    def store(self) -> None:
        """Keep this rank's part of values that were changed in the gathered parameters."""
        assert self.presence is Presence.HERE
        if self.is_sharded:
            self.mine.copy_(self.buffer[slice(*self.part)])

    def release(self, *, abandon: bool) -> None:
        """Give the parameters memory of their own again. All ranks take part where they rest sharded.

        Args:
            abandon: Do not ask other ranks: parameters that rest sharded become NaN.

        """
        if self.is_sharded and abandon:
            if self.presence is not Presence.HERE:
                self._coming = None
                for parameter in self.parameters:
                    arrive(parameter)
            for parameter in self.parameters:
                parameter.data = (
                    torch.full((), torch.nan, device=parameter.device).to(self.master_dtype).expand(parameter.shape)
                )
            return
        if self.has_master and not abandon:
            self.show_master(writeback=False)
        else:
            self.fetch()
            self.wait()
        with torch.no_grad():
            for parameter, strides in zip(self.parameters, self.strides, strict=True):
                parameter.data = torch.empty_strided(
                    parameter.shape, strides, dtype=self.master_dtype, device=parameter.device
                ).copy_(parameter)
        if self.is_sharded:  # one unit's at a time
            self.buffer = self.buffer.new_empty(0)
            self.views = []
            if not self.has_master or self.presence is Presence.HERE:
                self._gauge.change(-self._bytes)
        self._rounded = None


def give_memory(tensor: Tensor, memory: Tensor) -> None:
    """Move a parameter or buffer from the meta device to ``memory``. It stays the same object, wherever it is held."""
    # They live in what is swapped away, too; set again, they are installed anew.
    hooks, post_hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    tensor._backward_hooks = tensor._post_accumulate_grad_hooks = None  # type: ignore[assignment]
    # What torch.utils.swap_tensors does, without its fear of weak references: they should follow the object, too.
    torch._C._swap_tensor_impl(tensor, memory.new_empty(0).requires_grad_(tensor.requires_grad))
    tensor.data = memory  # and not a view: it would share the version that autograd counts with all of the unit
    tensor._backward_hooks, tensor._post_accumulate_grad_hooks = hooks, post_hooks


def _dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Strides to lay a parameter out with.

    Its own if its elements fill one block of memory (channels-last, transposed), else those of a contiguous tensor.
    """
    expected = 1
    for size, stride in sorted(zip(parameter.shape, parameter.stride(), strict=True), key=lambda pair: pair[::-1]):
        if size > 1:
            if stride != expected:
                return torch.empty(parameter.shape, device="meta").stride()
            expected *= size
    return parameter.stride()

"""When the parameters of rows that rest sharded are gathered and freed.

For blocks b0, b1, b2 of a model, full shard (``computing`` SHARDED)::

    forward    gather root, b0 | b0, prefetch b1 | free b0 | b1, prefetch b2 | free b1 | b2 | free b2
    backward   gather b2 | b2, prefetch b1 | free b2 | b1, prefetch b0 | free b1 | b0 | free b0, root

At most two blocks are there at once, and what belongs to no block ("root"). With ``computing`` REPLICATED nothing is
freed in between: each block is gathered once a step.

[Note: one block's backward]
It begins when the first gradient of an output arrives: a hook on the outputs gathers the block. It has ended when the
gradients of all inputs that need one are there; whatever is not freed by then is freed at the end of backward. If a
block's output hides its tensors (in an object that pytree does not know), its parameters stay until then. A block may
be called several times, even on its own output, where the backward of one call begins before that of the other is known
to have ended: calls are counted.

[Note: recomputation]
Activation checkpointing runs a block's forward again within backward. It finds the parameters there, as backward has
gathered them or is the first to; it frees nothing, because the backward that follows needs them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_accel.core.collectives import Collectives
from lightning_accel.core.lockstep import Lockstep
from lightning_accel.core.module_hook import Hook
from lightning_accel.core.parameter_memory import Presence
from lightning_accel.core.placement import Rest, Row
from lightning_accel.core.unit import Unit
from lightning_accel.core.watching import PARAMETERS


class _Call:
    """One call of a block in forward, and how far its backward has come."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.inputs = 0  # how many need a gradient
        self.begun = 0  # number of the backward that has begun it
        self.arrived: tuple[int, int] = 0, 0  # number of a backward, and how many inputs have their gradients in it


class Residency:
    """Gathers and frees the units of one model.

    Args:
        module: The model.
        blocks: Its modules whose parameters are gathered together, by name.
        row: Where parameters rest.
        collectives: The ranks.
        prepare: Called before each forward of the module that nobody has announced.

    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Mapping[str, nn.Module],
        row: Row,
        collectives: Collectives,
        prepare: Callable[[], None],
    ) -> None:
        self._prepare = prepare
        self._module = module
        self._row = row
        self._collectives = collectives
        self.is_active = row.parameters is Rest.SHARDED and collectives.ranks > 1
        """Whether there is anything to gather and free."""
        self._lockstep = Lockstep(collectives, is_gathered=self.is_active)
        self._units: dict[nn.Module | None, list[Unit]] = {}
        self._depth = 0
        self.in_backward = False
        self.holds = False
        """Whether nothing is freed for now, because the next micro-batch needs it."""
        self._orders: dict[bool, list[nn.Module]] = {False: [], True: []}
        """The blocks in the order in which the last forward (False) and backward (True) needed them."""
        self._running: list[nn.Module] = []
        self._calls: list[_Call] = []  # of blocks that are in forward just now, the innermost last
        self._backwards = 0
        self._open: Counter[nn.Module] = Counter()  # calls whose backward has begun and not ended
        self._postponed: nn.Module | None = None  # a block in backward, whose successor is yet to be prefetched
        self._held: Counter[Unit] = Counter()  # by those who are in ``everything``; their forwards free nothing
        self._written: Counter[Unit] = Counter()  # those of them whose changes are to be kept
        self._hooks: list[Any] = []
        if self.is_active:
            for block in blocks.values():
                self._hooks.append(block.register_forward_pre_hook(Hook(self._enter), prepend=True, with_kwargs=True))
                self._hooks.append(block.register_forward_hook(Hook(self._leave)))
            # Registered later, so run earlier: a root that is a block itself must find the rest there.
            self._hooks.append(module.register_forward_pre_hook(Hook(self._enter_module), prepend=True))
            self._hooks.append(module.register_forward_hook(Hook(self._leave_module), always_call=True))

    def attach(self, units: Sequence[Unit]) -> None:
        """Take over the units of a new layout; all of them are away."""
        self._units = {}
        for unit in units:
            self._units.setdefault(unit.block, []).append(unit)

    def detach(self) -> None:
        """Leave the model alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._units = {}

    # ----------------------------------------------------------------- forward

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Within it, parameters that belong to no block are there."""
        try:
            self._enter_root()
            yield
        finally:
            self._leave_root()

    def _enter_module(self, *_: Any) -> None:
        self._enter_root(self._prepare)

    def _leave_module(self, *_: Any) -> None:
        self._leave_root()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter_root(self, prepare: Callable[[], None] | None = None) -> None:
        self._depth += 1  # first: whatever is raised here, the root is left again
        if self._depth == 1:
            if prepare is not None:
                prepare()
            if self.is_active:
                self._running = []
                if not self.in_backward:
                    self._lockstep.enter("forward")
        self._bring(None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave_root(self) -> None:
        self._depth -= 1
        if self.is_active and self._depth == 0 and not self.in_backward:
            self._calls.clear()  # of calls that an exception ended
            if self._running:
                self._orders[False] = self._running
            if not torch.is_grad_enabled():
                self._let_go(self._all())

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        if block not in self._units:
            return
        self._bring(block)
        if not self._recomputing:
            self._running.append(block)
            self._prefetch(block, backward=False)
        call = _Call(block)
        self._calls.append(call)
        if torch.is_grad_enabled():
            inputs = {id(tensor): tensor for tensor in _needing_gradients((args, kwargs))}.values()
            call.inputs = len(inputs)
            # Not torch's hook for several tensors: it keeps the graph alive, in a circle that only gc breaks.
            for tensor in inputs:
                tensor.register_hook(partial(_input_arrived, weakref.ref(self), call))  # type: ignore[no-untyped-call]

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        if block not in self._units:
            return
        call = self._calls.pop()
        while call.block is not block:  # one that was left by an exception, as early-stopping recomputation does
            call = self._calls.pop()
        if torch.is_grad_enabled():
            outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            for tensor in outputs:
                if tensor.requires_grad:
                    tensor.register_hook(  # type: ignore[no-untyped-call]
                        partial(_output_arrived, weakref.ref(self), call)
                    )
            if not outputs or self._row.computing is Rest.REPLICATED:
                return  # see [Note: one block's backward]
        if not self._recomputing:  # see [Note: recomputation]
            self._let_go(self._units.get(block, ()))

    @property
    def _recomputing(self) -> bool:
        """Whether a forward is within backward, be it one of ``torch.autograd.grad`` within a step."""
        return self.in_backward or torch._C._current_graph_task_id() != -1

    # ---------------------------------------------------------------- backward

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Within it, recomputed forwards free nothing; at its end all is freed that no forward still needs."""
        if self.is_active:
            self._lockstep.enter("backward")
        self.in_backward = True
        self._backwards += 1
        self._open.clear()
        self._postponed = None
        self._running = []
        try:
            yield
        finally:
            self.in_backward = False
            self._calls.clear()  # recomputation may stop early
            if self._running:
                self._orders[True] = self._running
            self._running = []
        self._let_go(unit for unit in self._all() if unit.block is not None or self._depth == 0)

    def _backward_begins(self, call: _Call) -> None:
        if not self.in_backward:
            self._bring(call.block)  # torch.autograd.grad within a step; freed with the rest at the end of backward
        elif call.begun < self._backwards:
            call.begun = self._backwards
            self._open[call.block] += 1
            self._running.append(call.block)
            self._bring(call.block)
            self._postponed = call.block
            if not any(count for block, count in self._open.items() if block is not call.block):
                self._prefetch_postponed()
            # Else the block before may be about to hear that this same gradient, of its input, is there. It is freed
            # first, or three blocks would be there for a moment.

    def _input_has_gradient(self, call: _Call) -> None:
        number, count = call.arrived
        count = count + 1 if number == self._backwards else 1
        call.arrived = self._backwards, count
        if call.begun == self._backwards and count == call.inputs:
            self._open[call.block] -= 1
            if not self._open[call.block] and self.in_backward:
                self._let_go(self._units.get(call.block, ()))
        self._prefetch_postponed()

    def _prefetch_postponed(self) -> None:
        block, self._postponed = self._postponed, None
        if block is not None and self.in_backward:
            self._prefetch(block, backward=True)

    # -------------------------------------------------------------------- step

    def before_update(self, doing: str = "an update") -> None:
        """Call before this rank's parts are changed: nobody reads them any more."""
        if self.is_active:
            self._lockstep.enter(doing)
            self._store([unit for unit in self._all() if self._written[unit]], doing)  # the update starts from them
            for unit in self._all():  # held or not: the whole values are the old ones from now on
                unit.memory.free()
            with self._collectives.phases.within(PARAMETERS):
                self._collectives.fence(doing).wait()

    def after_update(self) -> None:
        """Call when this rank's parts have been changed."""
        if self.is_active:
            self._collectives.fence("the end of an update")
            self._have([unit for unit in self._all() if self._held[unit]])  # a step within ``everything``
            if self._depth:
                self._bring(None)  # a training_step with several optimizer steps goes on

    # ------------------------------------------------------------------ access

    def enter(self, doing: str) -> None:
        """Call before something that all ranks do together with the values of parameters between steps.

        Raises:
            RuntimeError: If this is within forward or backward.

        """
        if self.in_backward or self._calls:
            raise RuntimeError(
                f"Expected {doing} to be used between steps, got it within the model's forward or backward: parameters"
                " are gathered and freed there as they are needed."
            )
        if self.is_active:
            self._lockstep.enter(doing)

    def shows(self, unit: Unit) -> bool:
        """Whether this is within ``everything``, and a unit's whole values are there on all ranks."""
        memory = unit.memory
        return memory.shows_master or (self._held[unit] > 0 and memory.presence is Presence.HERE)

    @contextmanager
    def everything(self, units: Sequence[Unit], *, writeback: bool) -> Iterator[None]:
        """Within it, the parameters of ``units`` are there. All ranks enter and leave it together."""
        self.enter("full_parameters()")
        masters = [unit for unit in units if unit.memory.has_master]
        units = [unit for unit in units if not unit.memory.has_master]
        before = [unit for unit in units if unit.memory.presence is not Presence.AWAY]
        written = units if writeback and self.is_active else ()
        self._have(units)
        self._held.update(units)
        self._written.update(written)
        for unit in masters:
            unit.memory.show_master(writeback=writeback)
        try:
            yield
        finally:
            self._held.subtract(units)
            self._written.subtract(written)
            # A count of zero would keep the unit, and its memory.
            self._held, self._written = +self._held, +self._written
            if writeback and self.is_active:
                doing = "the end of full_parameters(writeback=True)"
                self._lockstep.enter(doing)
                self._collectives.fence(doing).wait()
                for unit in units:
                    if unit.memory.presence is Presence.HERE:  # not if a step failed
                        unit.memory.store()
            for unit in masters:
                unit.memory.hide_master(writeback=writeback)
            if writeback and self.is_active:
                self._collectives.fence("the end of writing values back")
            brought = [unit for unit in units if unit not in before]
            if not (self._depth and torch.is_grad_enabled()):  # else the backward to come may need them
                self._free(brought)
                if torch.is_grad_enabled():
                    # A graph that was made here is an error in backward, and not a crash on freed memory.
                    for unit in brought:
                        with torch._C.DisableTorchFunctionSubclass():
                            torch.autograd.graph.increment_version(unit.parameters)

    def settle(self) -> None:
        """Wait for all that is being gathered."""
        for unit in self._all():
            unit.memory.wait()

    def _all(self) -> list[Unit]:
        return [unit for units in self._units.values() for unit in units]

    def _bring(self, block: nn.Module | None) -> None:
        self._have(self._units.get(block, ()))

    def _have(self, units: Sequence[Unit]) -> None:
        self._fetch(units)
        for unit in units:
            unit.memory.wait()

    def _fetch(self, units: Iterable[Unit]) -> None:
        for unit in units:
            if unit.memory.presence is Presence.AWAY:
                self._lockstep.note(unit.name)
                unit.memory.fetch()

    def _store(self, units: Sequence[Unit], doing: str) -> None:
        """Keep this rank's parts of values that were changed, when nobody reads the old ones any more."""
        if units:
            self._collectives.fence(doing).wait()
            for unit in units:
                unit.memory.store()

    def _prefetch(self, block: nn.Module, *, backward: bool) -> None:
        """Start to gather what the last pass needed after ``block``."""
        if self._row.computing is Rest.REPLICATED and backward:
            return
        order = self._orders[backward]
        place = len(self._running) - 1
        if place < len(order) - 1 and order[place] is block:
            self._fetch(self._units.get(order[place + 1], ()))

    def _let_go(self, units: Iterable[Unit]) -> None:
        if not self.holds:
            self._free(units)

    def _free(self, units: Iterable[Unit]) -> None:
        for unit in units:
            if not self._held[unit]:
                unit.memory.free()


def _output_arrived(residency: weakref.ref[Residency], call: _Call, _: Tensor) -> None:
    found = residency()
    if found is not None:
        found._backward_begins(call)


def _input_arrived(residency: weakref.ref[Residency], call: _Call, _: Tensor) -> None:
    found = residency()
    if found is not None:
        found._input_has_gradient(call)


def _needing_gradients(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.requires_grad]

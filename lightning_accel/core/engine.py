"""The schedule: what is reduced and gathered, and when.

One training step of a row, with units u2, u1, u0 in launch order (the order in which backward completes them)::

    forward    wait for each unit's gather at the first touch of a parameter
    backward   gradients of u2 arrive -> reduce u2 -> ... u1 ... u0       (overlaps with the rest of backward)
    agree      which parameters did any rank use? which gradients came late, which buffers changed?
    step       the user's optimizer on this rank's segments               (core/optimizer.py)
    gather     u0, u1, u2 start; nobody waits                             (rows whose optimizer state rests sharded)

What happens within backward is in core/reduction.py.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.core.agreement import BufferVersions, synchronise
from lightning_accel.core.arrivals import Arrivals
from lightning_accel.core.clipping import clip_grad_norm, clip_grad_value, grad_norm
from lightning_accel.core.collectives import Collectives
from lightning_accel.core.dtypes import Dtypes
from lightning_accel.core.full_state import collected
from lightning_accel.core.hooks import GradientHooks, hang_on_module
from lightning_accel.core.loss_weight import LossWeights
from lightning_accel.core.low_rank import Compression
from lightning_accel.core.materialise import InitFn, Materialiser, has_meta
from lightning_accel.core.memory import keep_freed_memory
from lightning_accel.core.mesh import Mesh, ranks_of_node
from lightning_accel.core.offload import Offload, OffloadKind
from lightning_accel.core.optimizer import EngineOptimizer
from lightning_accel.core.partition import Units, find_blocks
from lightning_accel.core.placement import Rest, Row, find_row
from lightning_accel.core.pool import BufferPool
from lightning_accel.core.power_sgd import PowerSGD
from lightning_accel.core.reduction import Reduction
from lightning_accel.core.registry import engines_of, register
from lightning_accel.core.report import Report, StepCounts, measure
from lightning_accel.core.residency import Residency
from lightning_accel.core.roster import Roster
from lightning_accel.core.structure import Structure, is_compiled
from lightning_accel.core.unit import Unit
from lightning_accel.core.watching import BACKWARD, FORWARD, GRADIENTS


class Engine:
    """Trains one module on all ranks of a process group.

    Args:
        module: The model, on its device, with the same structure on every rank. Its parameters stay the same objects;
            their memory becomes the engine's, and rank 0's values are what all ranks train.
        row: The placement row, or its name (``"ddp"``, ``"zero2"``, ``"fsdp"``, …).
        units: Names or classes of modules whose parameters are reduced and gathered together. Default: the members of
            the model's repeated block class.
        bucket_cap_mb: Neighbouring units are joined up to this size, in MiB.
        group: The process group; the default one if not given.
        shard_size: For hybrid rows, how many neighbouring ranks divide a copy of the model state; by default those of
            one machine.
        param_init_fn: Sets the values of a module on the meta device, in place. It is called with each part of it that
            has parameters or buffers of its own; by default their ``reset_parameters`` is. See core/materialise.py.
        device: Where a module on the meta device is to live; the CPU if not given.
        offload: ``"optimizer"``: optimizer state is kept in host memory and the step runs there. ``"parameters"``: this
            rank's part of the parameters as well.
        offload_dir: A folder for files that optimizer state is kept in, instead of memory.
        param_dtype: What forward and backward compute with instead of parameters of a wider dtype and two or more
            dimensions, and what is gathered. The optimizer updates this rank's part in the dtype that parameters came
            with. For rows that shard optimizer state. See core/dtypes.py.
        round_vectors: Have ``param_dtype`` mean parameters of less dimensions as well: for models that compute without
            autocast.
        reduce_dtype: What gradients travel in; by default what they are computed in, or rest in for rows that add them
            up on each rank. They are added up in the dtype that parameters came with. See core/wire.py.
        grad_dtype: What gradients of parameters that ``param_dtype`` rounds are added up and rest in instead; the
            optimizer gets them in the dtype that parameters came with. Less precise, and what the ZeRO paper counts.
        gradient_compression: For row ``ddp``: matrices of gradients travel as products of thin ones. Needs more than
            one rank. See core/low_rank.py.

    Raises:
        ValueError: If the row or a unit does not exist, the ranks' models differ, ``shard_size`` does not divide the
            number of ranks, there is no way to set the values of what is on the meta device, the row or the folder
            does not allow the offload, or the row cannot do with the dtypes or the compression.
        RuntimeError: If torch.distributed is not initialised.

    Example::

        engine = Engine(module, "zero2")
        engine.add_optimizer(optimizer)
        for batch in batches:
            optimizer.zero_grad()
            engine.backward(module(batch))
            engine.clip_grad_norm_(optimizer, 1.0)
            optimizer.step()

    """

    def __init__(
        self,
        module: nn.Module,
        row: Row | str,
        *,
        units: Units | None = None,
        bucket_cap_mb: float = 25.0,
        group: dist.ProcessGroup | None = None,
        shard_size: int | None = None,
        param_init_fn: InitFn | None = None,
        device: torch.device | None = None,
        offload: OffloadKind | None = None,
        offload_dir: str | os.PathLike[str] | None = None,
        param_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        round_vectors: bool = False,
        grad_dtype: torch.dtype | None = None,
        gradient_compression: PowerSGD | None = None,
    ) -> None:
        if not bucket_cap_mb > 0:
            raise ValueError(f"Expected bucket_cap_mb to be positive, got {bucket_cap_mb}.")
        self.row = row if isinstance(row, Row) else find_row(row)
        if shard_size is not None and not self.row.hybrid:
            raise ValueError(f"Expected shard_size for hybrid rows only, got {shard_size} for row {self.row.name!r}.")
        self.offload = Offload.of(offload, offload_dir, self.row)
        """What is kept away from the device."""
        dtypes = Dtypes.checked(param_dtype, reduce_dtype, self.row, vectors=round_vectors, grad=grad_dtype)
        if gradient_compression is not None:
            gradient_compression.require_suitable(self.row, reduce_dtype)
        self.module = module
        for former in engines_of(module):
            former.close()  # as when a cell of a notebook is run again
        self.collectives: Collectives = synchronise(module, group, device)
        """All ranks."""
        size = self.collectives.ranks
        if self.row.hybrid:
            size = ranks_of_node(self.collectives) if shard_size is None else shard_size
        self.phases = self.collectives.phases
        """What steps consist of, for those who time them (``engine.phases.time_steps()``) or count in them."""
        self.phases.follow(module)
        self.mesh = Mesh.connect(self.collectives, size)
        """Which of them divide the model state."""
        if self.collectives.device.type == "cpu":
            keep_freed_memory()
        self.blocks = find_blocks(module, units)
        """The modules that form units, by name."""

        self.began_without_values = has_meta(module)
        """Whether the model came on the meta device: it may be too large for one rank."""
        materialiser = Materialiser(module, self.collectives, param_init_fn) if self.began_without_values else None
        self.at_close = contextlib.ExitStack()
        """What ``close`` takes back besides the engine's own doings."""
        self.at_close.callback(self.phases.close)
        self.is_compiled = False
        """Whether the module is called by compiled code that is not part of it."""
        self.optimizers: list[EngineOptimizer] = []
        self._structure = Structure(module)
        self._pool = BufferPool(keeps=self.row.parameters is Rest.REPLICATED)
        cap_bytes = int(bucket_cap_mb * 2**20)
        on_host = self.offload.parameters
        self.compression = Compression.of(gradient_compression, self.mesh.shard)
        """What PowerSGD keeps, if it is used."""
        self._roster = Roster(
            self.row,
            self.blocks,
            cap_bytes,
            self.mesh,
            self._pool,
            module=module,
            on_host=on_host,
            dtypes=dtypes,
            compression=self.compression,
        )
        self._residency = Residency(module, self.blocks, self.row, self.mesh.shard, self.before_forward)
        if materialiser is not None:
            self._roster.rebuild(self.names, [], materialiser.run)
        self._buffers = BufferVersions(module)
        self._reduction = Reduction(self.row, self._roster, self.collectives, self._buffers)
        self._arrivals = Arrivals(self.mesh.shard, self._note_compiled)
        self._weights = LossWeights(self.collectives)
        self._hooks = GradientHooks(self)
        self._counts = StepCounts()
        self._stale = True  # units do not match the optimizers, or what is trainable
        self._closed = False
        self._broken = False
        self._synchronise = True
        self._in_backward = False
        self.backwards = 0
        """How many backwards there were."""
        self._watchers: list[weakref.WeakMethod[Callable[[], None]]] = []  # told of new layouts
        if dtypes.param is not None and not self._residency.is_active:
            hang_on_module(self)
        register(self)

    # ------------------------------------------------------------------ set-up

    @property
    def names(self) -> dict[nn.Parameter, str]:
        """The name of each parameter of the module."""
        return self._structure.names

    @property
    def units(self) -> list[Unit]:
        """The units, in launch order."""
        return self._roster.units

    @property
    def places(self) -> Mapping[nn.Parameter, tuple[Unit, int]]:
        """The unit of each parameter that is in one, and the position in it."""
        return self._roster.places

    def units_of(self, optimizer: EngineOptimizer) -> list[Unit]:
        """The units whose parameters an optimizer updates, in the order in which forward uses them."""
        return [unit for unit in reversed(self.units) if self._roster.owner[unit] is optimizer]

    def add_optimizer(self, optimizer: Optimizer) -> EngineOptimizer:
        """Have ``optimizer.step`` update this rank's part of the parameters.

        The optimizer is changed in place: its ``step``, ``state_dict``, ``load_state_dict`` and ``add_param_group``
        become the engine's. ``param_groups`` go on showing the module's parameters.

        Raises:
            ValueError: If it holds parameters that are not the module's or that another optimizer holds, or if it
                cannot work on a part of the parameters.

        """
        self._require_open()
        added = EngineOptimizer(self, optimizer)
        self.optimizers.append(added)
        self.mark_stale()
        return added

    def find_optimizer(self, optimizer: Optimizer) -> EngineOptimizer:
        """The engine's side of an optimizer that was added.

        Raises:
            ValueError: If it was not added.

        """
        for added in self.optimizers:
            if added.optimizer is optimizer:
                return added
        raise ValueError(
            f"Expected an optimizer that was given to this engine, got another {type(optimizer).__name__}. Call"
            " engine.add_optimizer(optimizer) first (Trainer and Fabric do so in setup)."
        )

    def mark_stale(self) -> None:
        """Have the units laid out anew before they are used next."""
        self._stale = True

    def build(self) -> None:
        """Lay trainable parameters out in units. Happens by itself when needed; all ranks must get here together.

        Units that belong to an optimizer stay. Other trainable parameters, among them those that were thawed or came
        in a new parameter group since the last time, are laid out anew.
        """
        if not self._stale:
            return
        self._require_open()
        assert not self._in_backward
        self.wait()
        with torch.inference_mode(False):  # the first forward may be one of evaluation
            self._roster.rebuild(self.names, self.optimizers)
            for optimizer in self.optimizers:
                optimizer.lay_out()
        self._stale = False
        self._reduction.relearn()
        if self._residency.is_active:
            self._residency.attach(self.units)
        self._hooks.attach(self._roster.places)
        for watcher in self._watchers:
            if (told := watcher()) is not None:
                told()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Have a bound method called after each new layout of the units, on all ranks. Its object is not kept alive."""
        self._watchers.append(weakref.WeakMethod(watcher))

    def dismiss_optimizers(self) -> None:
        """Drop gradients and let go of all optimizers, which can still save; others may be added. All ranks take part.

        Parameters stay where they rest: a model that is too large for one rank is never whole.
        """
        self._require_open()
        self.build()
        self.wait()
        for unit in self.units:
            unit.drop_gradients()
            unit.memory.free()  # a forward that no backward followed has left it there
            self._roster.owner[unit] = None
        for optimizer in self.optimizers:
            optimizer.release()
        self.optimizers.clear()
        self._pool.clear()
        self.mark_stale()
        self.build()  # now, while all take part: afterwards ranks may evaluate as often as they like

    def close(self, *, abandon: bool = False) -> None:
        """Finish what is under way and give the module its parameters' memory back. Optimizers can still save.

        Args:
            abandon: Do not wait for other ranks, because one of them has failed.

        """
        if self._closed:
            return
        if abandon:
            self._arrivals.abandon()
            self.mesh.close()  # the others are told at once
        else:
            self._residency.before_update("the end")  # others may read this rank's parts until here
        self.wait()
        self._hooks.remove()
        self._roster.views.clear()  # they keep the memory of units
        for unit in self.units:
            unit.release(abandon=abandon)
        self._residency.detach()
        self.at_close.close()
        if not abandon:
            self._residency.before_update("the end")
        for optimizer in self.optimizers:
            optimizer.release()
        self._pool.clear()
        self.mesh.close()
        self._closed = True

    def __reduce__(self) -> Any:
        raise TypeError(
            "Expected what is pickled or copied to hold no engine, as what fabric.setup returned and Trainers do. Save"
            " the module that you made, or better its state_dict(): on every rank, within `with"
            " engine.full_parameters():`. Or use trainer.save_checkpoint(...) or fabric.save(...)."
        )

    @property
    def is_fetched_from(self) -> bool:
        """Whether other ranks read this one's part of the parameters when they need it."""
        return self._residency.is_active

    @property
    def is_usable(self) -> bool:
        """Whether it is open and no backward was cut short."""
        return not (self._closed or self._broken)

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def _note_compiled(self) -> None:
        self.is_compiled = True

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("Expected an open engine; this one was closed. Set the model up again to train on.")
        if self._broken:
            raise RuntimeError(
                "Expected every backward to end, but one was cut short by an exception: gradients are incomplete and"
                " other ranks may be ahead. Restart from a checkpoint."
            )

    # ----------------------------------------------------------------- forward

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Within it, the module may be called and any part of it used. All ranks enter and leave it together.

        Calling the module itself, outside of it, is right as well.

        Raises:
            RuntimeError: As ``before_forward``.

        """
        self.before_forward()
        with self.phases.within(FORWARD), self._residency.forward():
            yield

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_forward(self) -> None:
        """Call before each forward of the module, to have what happened since the last one looked at.

        Raises:
            RuntimeError: If there are new parameters to train, or parameters changed their type.

        """
        self._require_open()
        if torch.is_grad_enabled():
            self._structure.require_unchanged(self._roster.views)
            self._refresh()
            if not self._in_backward:
                for unit in self.units:
                    unit.drop_unused()
        self.build()

    def _refresh(self) -> None:
        """Lay out what was thawed, or came into an optimizer by itself, since the last time."""
        for optimizer in self.optimizers:
            optimizer.refresh()
        if any(p.requires_grad for p in self._roster.frozen):
            self._stale = True
        self.build()

    def wait(self) -> None:
        """Wait until all parameters have the values of the last optimizer step."""
        self._arrivals.wait()
        self._residency.settle()

    def full_parameters(
        self, module: nn.Module | None = None, *, writeback: bool = False
    ) -> AbstractContextManager[None]:
        """Within it, parameters have all of their values, whatever the row. All ranks enter and leave it together.

        An optimizer step within it is as on one device: it starts from values that were changed for ``writeback``, and
        the parameters have its result.

        Args:
            module: A part of the model, of which (and of whose units) the parameters are needed; all by default.
            writeback: Keep changes that are made to the values. They must be the same on every rank.

        Raises:
            RuntimeError: On entering, if this is within forward or backward and parameters rest sharded.

        """
        self._require_open()
        self.build()
        self.wait()
        wanted = set((module or self.module).parameters())
        units = [unit for unit in self.units if not wanted.isdisjoint(unit.parameters)]
        return self._residency.everything(units, writeback=writeback)

    def collected_parameters(self) -> AbstractContextManager[bool]:
        """Within it, rank 0 may save the module: parameters have their whole values there, in host memory.

        What is at rest on all ranks stays where it is. All else is sent to rank 0, one parameter at a time; no other
        rank has it. See core/full_state.py. All ranks enter and leave it together.

        Returns:
            A context manager that tells whether the values are right on this rank. If not, they are zeros.

        Raises:
            RuntimeError: If this is within forward or backward.

        Example::

            with engine.collected_parameters() as is_whole:
                state = module.state_dict()
            if is_whole:  # on rank 0, and if all parameters rest replicated on every rank
                ...

        """
        self._require_open()
        self.build()
        self.wait()
        self._residency.enter("collected_parameters()")
        return collected(self.units, self.mesh, self._residency.shows)

    # ---------------------------------------------------------------- backward

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """``loss.backward(**kwargs)``, with gradients reduced as the row says.

        Args:
            loss: This rank's loss. Gradients are averaged over ranks, or over what ``set_loss_weight`` counts.
            kwargs: As for ``Tensor.backward``.

        """
        loss = self.weigh(loss)
        with self.backward_context():
            loss.backward(**kwargs)  # type: ignore[no-untyped-call]

    def set_loss_weight(self, weight: float | Tensor) -> None:
        """Say how much the loss of the next backward counts: how many tokens, say, it is the mean of.

        With weights, the gradients that an optimizer steps with are those of the weighted mean of all losses since the
        last step, of all ranks: of one loss on all batches in one. So losses must not be divided by the number of
        micro-batches. Every loss that an optimizer gets gradients from must have a weight then; losses that it gets
        none from on this rank do not count for it. Only ratios of weights matter. A batch on which the loss is
        undefined (no token of it counts) has weight 0, on which NaN is left out.

        Args:
            weight: A number, or a tensor of one.

        Raises:
            ValueError: If it is not finite, or negative.

        """
        self._weights.set(weight)

    @property
    def loss_weight(self) -> float | None:
        """What ``set_loss_weight`` has set for the next backward."""
        return self._weights.next

    @property
    def share(self) -> float | None:
        """What losses without a weight are multiplied by, where some ranks have run out of batches.

        0 on those: whatever they compute counts as zeros, also where losses have weights. None, as ever, elsewhere.
        ``lightning_accel.data.joined`` sets it.
        """
        return self._weights.share

    @share.setter
    def share(self, share: float | None) -> None:
        assert share is None or share >= 0.0
        self._weights.share = share

    def weigh(self, loss: Tensor) -> Tensor:
        """A loss times its weight, if it has one: what is to be differentiated within ``backward_context``."""
        weight, share = self._weights.next, self._weights.share
        if weight is None:
            weight = share
        if weight is None or weight == 1.0 or share == 0.0:  # no product of what counts as zeros: it may be NaN
            return loss
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * weight  # 16 bits would round the weight

    @contextmanager
    def backward_context(self) -> Iterator[None]:
        """Within it, gradients may arrive. All ranks must enter and leave it together, once for each backward."""
        self._require_open()
        assert not self._in_backward, "backward within backward"
        self._refresh()
        for unit in self.units:
            unit.hide()
        counts = self._weights.begin(self.optimizers)
        for unit in self.units:
            unit.is_muted = not counts
        self._in_backward = True
        self.backwards += 1
        self._reduction.begin(boundary=self._synchronise)
        try:
            with self.phases.within(BACKWARD), self._residency.backward():
                yield
            with self.phases.within(GRADIENTS):
                told = self._reduction.finish(self._weights.end(self.optimizers))
            if self._residency.is_active:
                self.mesh.trim()  # rows that are chosen for their memory keep none that the next backward can take anew
            for unit in self.units:
                unit.learn()
                unit.show()
            self._in_backward = False
            if told:
                self._weights.agreed(self.optimizers, told, boundary=self._synchronise)
        except BaseException:
            self._broken = True
            raise
        finally:
            self._in_backward = False

    @property
    def is_boundary(self) -> bool:
        """Whether an optimizer step may follow the next backward: unless this is within ``no_sync``."""
        return self._synchronise

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, rows whose gradients accumulate on each rank send nothing; others reduce each backward anyway.

        Hybrid rows sum over the ranks of one copy, and leave the sum over copies to the first backward outside of it.
        Where gradients accumulate on each rank, parameters that rest sharded stay gathered.
        """
        before = self._synchronise, self._residency.holds
        self._synchronise, self._residency.holds = False, self.row.accumulating is Rest.REPLICATED
        try:
            yield
        finally:
            self._synchronise, self._residency.holds = before

    def gradient_arrived(self, parameter: nn.Parameter) -> None:
        """Called by autograd when ``parameter.grad`` is there.

        Raises:
            RuntimeError: If it is not one that can be reduced.

        """
        if torch.is_grad_enabled():  # within ``backward(create_graph=True)``; to enter this each time takes longest
            with torch.no_grad():
                self.gradient_arrived(parameter)
            return
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        unit, position = self._roster.places[parameter]
        if not self._in_backward:
            raise RuntimeError(
                f"A gradient of {unit.names[position]!r} arrived outside of the engine's backward: it would not be"
                " reduced over the ranks. Instead of loss.backward() use self.manual_backward(loss) in a"
                " LightningModule, fabric.backward(loss) with Fabric, engine.backward(loss) otherwise."
            )
        if gradient.layout is not torch.strided:
            raise RuntimeError(
                f"Expected dense gradients, got one of layout {gradient.layout} for {unit.names[position]!r}. Build the"
                " embedding with sparse=False."
            )
        if unit.write(position, gradient):
            self._reduction.ready(unit)

    # -------------------------------------------------------------------- step

    def before_step(self) -> None:
        """Called by optimizers before they use gradients."""
        self._require_open()
        assert not self._in_backward, "optimizer step within backward"
        self._refresh()
        # An update in place must not overtake the gather of the values it starts from.
        self.wait()

    def before_update(self) -> None:
        """Called by optimizers before they change this rank's parts."""
        self._residency.before_update()
        for unit in self.units:
            unit.memory.before_update()

    def after_step(self, optimizer: EngineOptimizer) -> None:
        """Called by optimizers after the update: start to gather what other ranks have updated."""
        if optimizer.sharded or not optimizer.direct:
            # The update went through other tensors. A graph made before it must not be used after it.
            for unit in optimizer.used_units:
                with torch._C.DisableTorchFunctionSubclass():
                    torch.autograd.graph.increment_version(unit.parameters)
        self._announce(optimizer.used_units)
        self._counts.close_step(self)

    def _announce(self, units: Sequence[Unit]) -> None:
        """Let the other ranks have what this one has changed in its parts of some units."""
        for unit in units:
            unit.memory.after_update()
        if self.row.parameters is Rest.SHARDED:
            self._residency.after_update()
        elif self.row.optimizer_state is Rest.SHARDED:
            self._arrivals.start(unit for unit in units if not unit.memory.shows_master)
            if self.is_compiled or is_compiled(self.module):
                self.wait()  # compiled code sees no classes, and would be compiled again if they differed

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within it, the parts of the parameters that this rank updates may be changed. For all ranks, together.

        That is ``unit.memory.mine`` of each unit. The other ranks get the new values as after an optimizer step.

        Raises:
            RuntimeError: If this is within backward.

        """
        self._require_open()
        if self._in_backward:
            raise RuntimeError("Expected parameters to be changed between steps, got a change within backward.")
        self.build()
        self.wait()
        self._residency.before_update()
        with torch.no_grad():
            yield
        for unit in self.units:
            with torch._C.DisableTorchFunctionSubclass():
                torch.autograd.graph.increment_version(unit.parameters)
        self._announce(self.units)

    def clip_grad_norm_(
        self, optimizer: Optimizer, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Clip the gradients of an optimizer's parameters by their global norm, as ``torch.nn.utils.clip_grad_norm_``.

        All ranks must call this together.

        Args:
            optimizer: The user's optimizer.
            max_norm: The largest norm to leave.
            norm_type: p of the p-norm; may be ``inf``.
            error_if_nonfinite: Raise, on every rank, if the norm is infinite or NaN. Otherwise such gradients are set
                to zero with a warning, or left to the gradient scaler that will skip their step.

        Returns:
            The norm before clipping: what a single device would have found on the global batch. If gradients are
            scaled, unscale them first.

        Raises:
            ValueError: If ``max_norm`` or ``norm_type`` is not positive, or the optimizer was not added.
            RuntimeError: If ``error_if_nonfinite`` and the norm is not finite.

        """
        added = self.find_optimizer(optimizer)
        return clip_grad_norm(
            added.gradients,
            float(max_norm),
            float(norm_type),
            error_if_nonfinite,
            added.sharded,
            self.mesh.shard,
            added.norm_dtype,
            skipped=added.overflowed,
        )

    def grad_norm(self, optimizer: Optimizer, norm_type: float = 2.0) -> Tensor:
        """The global norm of the gradients of an optimizer's parameters. All ranks must call this together.

        Args:
            optimizer: The user's optimizer.
            norm_type: p of the p-norm; may be ``inf``.

        """
        added = self.find_optimizer(optimizer)
        return grad_norm(added.gradients, float(norm_type), added.sharded, self.mesh.shard, added.norm_dtype)

    def clip_grad_value_(self, optimizer: Optimizer, clip_value: float) -> None:
        """Clamp the gradients of an optimizer's parameters, as ``torch.nn.utils.clip_grad_value_``.

        Raises:
            ValueError: If ``clip_value`` is not positive, or the optimizer was not added.

        """
        clip_grad_value(self.find_optimizer(optimizer).gradients, float(clip_value))

    def full_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """A copy of a parameter's whole reduced gradient, or None if it has none. All ranks must call this together.

        Raises:
            ValueError: If the parameter is not trained by this engine.

        """
        self.build()
        if parameter not in self._roster.places:
            raise ValueError("Expected a trainable parameter of the module, got another tensor.")
        unit, position = self._roster.places[parameter]
        unit.reconcile()
        return unit.full_gradient(position)

    # ------------------------------------------------------------------ report

    def report(self, *, all_ranks: bool = False) -> Report:
        """Bytes at rest by kind of state, and what the last optimizer step sent, as really allocated and sent.

        After ``engine.phases.time_steps()`` also where the time of the steps since the last report went.

        Args:
            all_ranks: Have the times of the slowest rank as well. All ranks must call this together then.

        """
        counts, times, other = self._counts, *self.phases.times(self.collectives.gather_objects if all_ranks else None)
        return measure(self, counts, self._pool.peak_bytes, self._roster.gauge.peak, times, other)

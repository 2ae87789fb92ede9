"""The user's optimizer at work on this rank's part of the parameters.

[Note: param_groups]
``optimizer.param_groups`` shows the module's own Parameters at all times but one: while ``step`` runs, the groups hold
this rank's *segments*, plain 1-D tensors that view the flat buffers. Neighbouring parameters of one group are one
segment, so that an optimizer has a handful of large tensors to update instead of hundreds of small ones. LR schedulers
and everything else that edits the groups' dicts sees and changes the same dicts as ever. Optimizer state is keyed by
the segments; ``state_dict`` and ``load_state_dict`` speak of whole parameters, see core/optimizer_state.py.

[Note: whole tensors]
Cutting a parameter is right only for optimizers that treat each element by itself. Those are listed; any other, and
any subclass of them, gets whole tensors: its own rank's share of them where optimizer state rests sharded, all of them
otherwise.
"""

from __future__ import annotations

import functools
import operator
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.core import optimizer_state
from lightning_accel.core.gradients import RestingGradients
from lightning_accel.core.loss_weight import Window
from lightning_accel.core.placement import Rest
from lightning_accel.core.segment import Segment
from lightning_accel.core.unanimous import unanimous
from lightning_accel.core.unit import Content, Unit

if TYPE_CHECKING:
    from lightning_accel.core.collecting import Collecting
    from lightning_accel.core.engine import Engine

_ELEMENTWISE: set[type[Optimizer]] = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
}
_DEEPSPEED_CPU_ADAM = ("deepspeed.ops.adam.cpu_adam", "DeepSpeedCPUAdam")
"""Elementwise, too. Known by its name: importing deepspeed takes seconds, and most users do not have it."""
_BY_TENSOR: set[type[Optimizer]] = {
    getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name)
}
"""Known to update each parameter from that parameter alone; others of torch.optim are not."""


def register_elementwise(*classes: type[Optimizer]) -> None:
    """Declare that optimizer classes treat each element by itself, so that parameters may be cut at any element.

    Args:
        classes: Optimizers whose update of an element depends on that element's value, gradient and state, and on
            numbers that are the same for all elements, only.

    """
    _ELEMENTWISE.update(classes)


def register_by_tensor(*classes: type[Optimizer]) -> None:
    """Declare that optimizer classes update each parameter from that parameter alone, and need it whole.

    Others get whole tensors as well, with a warning, as they may mix parameters.

    Args:
        classes: Optimizers whose update of a parameter depends on that parameter's values, gradient and state, and on
            numbers that are the same for all parameters, only; and that may be called for one parameter at a time.

    """
    _BY_TENSOR.update(classes)


class EngineOptimizer:
    """The engine's side of one of the user's optimizers. Made by ``Engine.add_optimizer``.

    Args:
        engine: The engine whose parameters it updates.
        optimizer: The user's optimizer.

    """

    def __init__(self, engine: Engine, optimizer: Optimizer) -> None:
        former = getattr(optimizer, "_engine_optimizer", None)
        if former is not None:
            former.give_up()
        self.engine = engine
        self.optimizer = optimizer
        self.sharded = engine.row.optimizer_state is Rest.SHARDED
        kind = type(optimizer)
        self.is_deepspeeds = (kind.__module__, kind.__qualname__) == _DEEPSPEED_CPU_ADAM
        self.whole = kind not in _ELEMENTWISE and not self.is_deepspeeds
        self.segments: list[Segment] = []
        self._offload = engine.offload
        self._units: list[Unit] = []
        self._require_supported()
        self._require_owned(optimizer.param_groups)
        self._members = self._current_members()
        self._original_step = optimizer.step
        self._original_state_dict = optimizer.state_dict
        self._original_load = optimizer.load_state_dict
        self._original_add_group = optimizer.add_param_group
        self._original_unscaling = getattr(optimizer, "_step_supports_amp_scaling", None)
        self.gradients = RestingGradients(self)
        """What it is to step with."""
        self.window = Window()
        """What they were accumulated from."""
        self.overflowed = False
        """Whether a gradient scaler has found that the gradients are not finite: it will skip their step."""
        self._install()
        self._released = False
        self.waiting_state: dict[nn.Parameter, dict[str, Any]] = {}
        """State of whole parameters that are in no unit: not laid out yet, or frozen."""
        if not self.direct:  # it may have stepped or loaded a checkpoint before
            self.waiting_state = {p: v for p, v in optimizer.state.items() if isinstance(p, nn.Parameter)}
            for parameter in self.waiting_state:
                del optimizer.state[parameter]

    @property
    def direct(self) -> bool:
        """Whether the optimizer simply runs on the module's parameters."""
        return self.whole and not self.sharded

    @property
    def _is_unknown(self) -> bool:
        """Whether nothing is known about how the optimizer works: it may count its steps, say."""
        return self.whole and type(self.optimizer) not in _BY_TENSOR

    @property
    def units(self) -> list[Unit]:
        """The units whose parameters it updates, in the order in which forward uses them."""
        return self._units

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of all groups."""
        for members in self._members:
            yield from members

    def group_of(self) -> dict[nn.Parameter, int]:
        """The parameter group of each parameter."""
        return {parameter: index for index, members in enumerate(self._members) for parameter in members}

    # ------------------------------------------------------------------ checks

    def _require_supported(self) -> None:
        kind = type(self.optimizer)
        if isinstance(self.optimizer, torch.optim.SparseAdam):
            raise ValueError("Expected an optimizer for dense gradients, got SparseAdam. Use Adam.")
        if self.is_deepspeeds and not self._offload.optimizer and self.engine.collectives.device.type != "cpu":
            raise ValueError(
                "Expected offload='optimizer' for DeepSpeedCPUAdam, which updates on the CPU only, got parameters on"
                f" {self.engine.collectives.device}. Pass it to the strategy, or use torch.optim.AdamW."
            )
        if self._offload.optimizer and self.direct:
            raise ValueError(
                f"Expected an elementwise optimizer for offload with row {self.engine.row.name!r}, got"
                f" {type(self.optimizer).__name__}. Use a row that shards optimizer state, such as accel_zero2."
            )
        if not (self.whole and self.sharded):
            return
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise ValueError(
                "Expected an optimizer that can update parameters independently of each other, got LBFGS, which needs"
                " all of them at once. Use strategy='accel_ddp'."
            )
        if callable(getattr(kind, "train", None)) and callable(getattr(kind, "eval", None)):
            # Schedule-free ones turn parameters into their averages there, by a state that no parameter has here.
            raise ValueError(
                f"Expected an optimizer that changes parameters in step() only, got {kind.__name__}, which has train()"
                " and eval() for that: outside of step() they would find no state, and change nothing. Use"
                " strategy='accel_ddp'."
            )
        if self._is_unknown:
            warnings.warn(
                f"{kind.__name__} is not known to lightning_accel: each rank updates its share of whole parameters."
                " That is right if the update of a parameter depends on that parameter alone:"
                " lightning_accel.core.register_by_tensor(...) says so. If it treats each element alone,"
                " register_elementwise(...) balances it better; if it mixes parameters, use strategy='accel_ddp'.",
                stacklevel=2,
            )

    def _require_owned(self, groups: Sequence[dict[str, Any]]) -> None:
        names = self.engine.names
        mine = set(self.parameters()) if hasattr(self, "_members") else set()
        for index, group in enumerate(groups):
            for position, parameter in enumerate(group["params"]):
                if parameter not in names:
                    near = [n for p, n in names.items() if p.shape == parameter.shape]
                    hint = f" The module's {near[0]!r} has that shape: was it replaced or copied?" if near else ""
                    raise ValueError(
                        f"Expected every parameter of {type(self.optimizer).__name__} to belong to the"
                        f" {type(self.engine.module).__name__} that was set up, but parameter {position} of group"
                        f" {index} (shape {tuple(parameter.shape)}) does not.{hint} Create the optimizer from the"
                        " parameters of the module that is passed to setup. One optimizer for several modules: set"
                        " them up as one, such as torch.nn.ModuleDict({...})."
                    )
                for other in self.engine.optimizers:
                    if parameter in set(other.parameters()) and (other is not self or parameter in mine):
                        raise ValueError(
                            f"Expected each parameter in one optimizer, but {names[parameter]!r} is in a"
                            f" {type(other.optimizer).__name__} already. To go on with another optimizer, set the"
                            " module up anew together with it."
                        )

    def _current_members(self) -> list[list[nn.Parameter]]:
        return [list(group["params"]) for group in self.optimizer.param_groups]

    def refresh(self) -> None:
        """Take note of parameters that were put into the groups by other ways than ``add_param_group``.

        Raises:
            RuntimeError: If parameters were taken out or moved to another group.

        """
        current = self._current_members()
        if len(current) == len(self._members) and all(
            len(now) == len(then) and all(map(operator.is_, now, then))
            for now, then in zip(current, self._members, strict=True)
        ):
            return
        then, now = self.group_of(), {p: index for index, members in enumerate(current) for p in members}
        if any(now.get(parameter) != index for parameter, index in then.items()):
            raise RuntimeError(
                "Expected the optimizer's param_groups to hold the parameters they were set up with; they were changed"
                " in place. Use optimizer.add_param_group(...), which is taken note of."
            )
        self._require_owned([{"params": [p for p in members if p not in then]} for members in current])
        self._members = current
        self.engine.mark_stale()

    # ------------------------------------------------------------------ set-up

    def _install(self) -> None:
        """Make the optimizer's methods the engine's."""
        optimizer = self.optimizer

        # An LR scheduler may have wrapped ``step`` already or may do so later: both want a bound method.
        @functools.wraps(self._original_step)
        def step(_: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            return self.step(closure, **kwargs)

        def add_param_group(_: Optimizer, group: dict[str, Any]) -> None:
            self.add_param_group(group)

        optimizer._engine_optimizer = self  # type: ignore[attr-defined]
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        optimizer.add_param_group = types.MethodType(add_param_group, optimizer)  # type: ignore[method-assign]
        if self._original_unscaling is not None:
            # Fused optimizers may unscale while they step. Here scalers do it before, so that clipping is possible.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        optimizer.load_state_dict = self.load_state_dict  # type: ignore[method-assign]
        if not self.direct:
            optimizer.state_dict = self.state_dict  # type: ignore[method-assign]

    def give_up(self) -> None:
        """Make the optimizer what it was before, with its state by whole parameters. All ranks take part.

        Raises:
            ValueError: If its engine still trains it.

        """
        if not self._released:
            raise ValueError(
                f"Expected an optimizer that no engine has, got a {type(self.optimizer).__name__} that was set up"
                " already. Set each optimizer up once."
            )
        optimizer = self.optimizer
        if not self.direct:
            full = optimizer_state.gather(self)
            parameters = list(self.parameters())
            if self.sharded:
                mine = None if full is None else [full.get(parameter) for parameter in parameters]
                everyone = self.engine.mesh.shard.gather_objects(mine)
                full = {p: values for p, values in zip(parameters, everyone[0], strict=True) if values is not None}
            assert full is not None
            for key in [key for key in optimizer.state if isinstance(key, Tensor)]:
                del optimizer.state[key]
            for parameter, values in full.items():
                optimizer.state[parameter] = values
        optimizer.step = self._original_step  # type: ignore[method-assign]
        optimizer.add_param_group = self._original_add_group  # type: ignore[method-assign]
        optimizer.state_dict = self._original_state_dict  # type: ignore[method-assign]
        optimizer.load_state_dict = self._original_load  # type: ignore[method-assign]
        if self._original_unscaling is not None:
            optimizer._step_supports_amp_scaling = self._original_unscaling  # type: ignore[attr-defined]
        del optimizer._engine_optimizer  # type: ignore[attr-defined]

    def add_param_group(self, group: dict[str, Any]) -> None:
        """As ``Optimizer.add_param_group``; the parameters must be the module's.

        Raises:
            ValueError: If a parameter is not the module's, or in an optimizer already.

        """
        given = group["params"]
        group["params"] = [given] if isinstance(given, Tensor) else list(given)
        self._require_owned([group])
        self._original_add_group(group)
        self._members = self._current_members()
        self.engine.mark_stale()

    def lay_out(self) -> None:
        """Make segments for those of this optimizer's units that have none."""
        self._units = self.engine.units_of(self)
        if self.direct:
            return
        done = {segment.unit for segment in self.segments}
        groups = self.group_of()
        for unit in self._units:
            if unit in done:
                continue
            pieces = unit.layout.pieces(*unit.part)
            if self.whole:
                added = [
                    Segment(unit, [p], groups[unit.parameters[p.slot]], whole=True, on_host=self._offload.optimizer)
                    for p in pieces
                ]
            else:
                labelled = [(groups[unit.parameters[piece.slot]], piece) for piece in pieces]
                added = Segment.runs(unit, labelled, on_host=self._offload.optimizer)
            state = {p: self.waiting_state.pop(p) for p in unit.parameters if p in self.waiting_state}
            self.segments += optimizer_state.scatter(self, state, added)

    @property
    def is_released(self) -> bool:
        """Whether the engine has let go of it: it can save, but step no more."""
        return self._released

    def gather(self, value: Any) -> list[Any]:
        """Objects of all ranks that divide the state. All of them take part, even after the engine was closed."""
        return self.engine.mesh.shard.gather_objects(value)

    def release(self) -> None:
        """Free the parameters' memory that segments view. State stays, and can be saved; no step can follow."""
        self._released = True
        for segment in self.segments:
            segment.release()

    # -------------------------------------------------------------------- step

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """One optimizer step, as ``Optimizer.step``: returns what the closure returns.

        Raises:
            RuntimeError: If gradients were accumulated but not reduced, the groups were changed in place, or the engine
                has let go of the optimizer.

        """
        if self._released:
            self.engine.before_step()  # says so if it was closed
            raise RuntimeError(
                f"Expected an optimizer that the engine has, got a {type(self.optimizer).__name__} of a fit that has"
                " ended. Set the model up again, with its optimizers, to train on."
            )
        if self.direct:
            return self._step_direct(closure, **kwargs)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        self._refine_segments()
        active = [s for s in self.segments if s.unit.content[s.pieces[0].slot] is Content.REDUCED]
        self.engine.before_update()
        # What users hang on the end of a step wants the module's parameters, on every rank.
        hooks, self.optimizer._optimizer_step_post_hooks = self.optimizer._optimizer_step_post_hooks, OrderedDict()
        before = self.optimizer._optimizer_step_pre_hooks
        try:
            if self._offload.optimizer and not self._is_unknown:
                for segment in active:  # see [Note: where a step runs]
                    self._run([segment], **kwargs)
                    self.optimizer._optimizer_step_pre_hooks = OrderedDict()  # once a step
                    self.keep_state([segment])
            if not active or not self._offload.optimizer or self._is_unknown:
                self._run(active, **kwargs)
                self.keep_state(active)
        finally:
            self.optimizer._optimizer_step_pre_hooks = before
            self.optimizer._optimizer_step_post_hooks = hooks
        self.gradients.end_step()
        self._finish_step()
        for hook in hooks.values():
            hook(self.optimizer, (), kwargs)
        return loss

    def _step_direct(self, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        def checked() -> Any:
            assert closure is not None
            loss = closure()
            self._prepare()
            return loss

        if closure is None:
            self._prepare()
            result = self._original_step(**kwargs)
        else:
            result = self._original_step(checked, **kwargs)
        self._finish_step()
        return result

    def _finish_step(self) -> None:
        self.window.is_over = True
        self.engine.after_step(self)

    def _prepare(self) -> None:
        self.engine.phases.begin_update()
        self.engine.before_step()
        for unit in self._units:
            unit.reconcile()
        self.gradients.require_reduced()
        for unit in self._units:
            unit.show()  # a gradient that was assigned by hand now lies in its slot

    def _refine_segments(self) -> None:
        """Cut segments so that each is either updated as a whole or not at all in this step."""
        if all(content is Content.REDUCED for unit in self._units for content in unit.content):
            return
        refined: list[Segment] = []
        for segment in self.segments:
            labels = [segment.unit.content[piece.slot] is Content.REDUCED for piece in segment.pieces]
            refined += segment.split(labels, self.optimizer.state)
        self.segments = refined

    def _run(self, active: Sequence[Segment], **kwargs: Any) -> None:
        """Run the user's step on segments."""
        groups = self.optimizer.param_groups
        shown = [group["params"] for group in groups]
        # On the CPU torch's fused kernels take one pass over memory where others take many.
        unfused = []
        if self._offload.optimizer and not any(segment.tensor.is_complex() for segment in active):
            unfused = [group for group in groups if _may_be_fused(group)]
        try:
            for index, group in enumerate(groups):
                group["params"] = [segment.tensor for segment in active if segment.group == index]
            for group in unfused:
                group["fused"] = True
            # A group that has nothing here must not reach an optimizer that takes groups to be non-empty.
            self.optimizer.param_groups = [group for group in groups if group["params"]]
            with self.gradients.multiplied(active):
                for segment in active:
                    segment.bring()
                if active:
                    self._original_step(**kwargs)
                else:
                    self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what LR schedulers look at
        finally:
            self.optimizer.param_groups = groups
            for group, parameters in zip(groups, shown, strict=True):
                group["params"] = parameters
            for group in unfused:
                group["fused"] = None
            for segment in active:
                segment.put_back()

    def keep_state(self, segments: Sequence[Segment]) -> None:
        """Have the state of segments where it is to be kept."""
        if self._offload.folder is None:
            return
        for segment in segments:
            values = self.optimizer.state.get(segment.tensor, {})
            for key, value in values.items():
                if isinstance(value, Tensor):
                    values[key] = self._offload.keep(value)

    @property
    def norm_dtype(self) -> torch.dtype:
        """The dtype that the norm of all gradients has: on every rank the same."""
        return functools.reduce(
            torch.promote_types, [u.memory.master_dtype.to_real() for u in self.used_units], torch.float32
        )

    @property
    def used_units(self) -> list[Unit]:
        """Units of which any parameter has a gradient: on every rank the same."""
        return [unit for unit in self._units if Content.REDUCED in unit.content]

    # ------------------------------------------------------------------- state

    def state_dict(self, later: Collecting | None = None) -> dict[str, Any]:
        """The optimizer's state by whole parameters, in torch's format: it loads in any optimizer of the class.

        Where optimizer state rests sharded, all ranks must call this together; rank 0 gets the state, others ``{}``.

        Args:
            later: Tensors that rest sharded are put together when their values are asked for.

        """
        if not self._released:
            self.refresh()
            self.engine.build()
        # Other copies of the model state have the same.
        is_asked = self.engine.mesh.is_first_copy or not self.sharded or later is not None
        full = optimizer_state.gather(self, later) if is_asked else None
        if full is None:
            return {}
        # Some optimizers keep values of their own under names.
        shown: dict[Any, Any] = {key: value for key, value in self.optimizer.state.items() if isinstance(key, str)}
        shown.update(full)
        kept, self.optimizer.state = self.optimizer.state, shown  # type: ignore[assignment]
        try:
            return self._original_state_dict()
        finally:
            self.optimizer.state = kept

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, under any row and number of ranks.

        Every rank passes the full state, or, where optimizer state rests sharded, the others ``{}``. Parameters may be
        called by their names instead of torch's numbers, as checkpoint directories do.

        Raises:
            ValueError: If it does not fit; everything that does not is listed, and nothing was changed.

        """
        self.prepare_load(state_dict)()

    def prepare_load(self, state_dict: dict[str, Any]) -> Callable[[], None]:
        """The first half of ``load_state_dict``, which changes nothing: it finds out whether the state fits.

        Returns:
            The second half, which loads it.

        Raises:
            ValueError: If it does not fit; everything that does not is listed.

        """
        if not self.direct:
            self.refresh()
            self.engine.build()
        if self.sharded:
            given = self.engine.collectives.gather_objects(bool(state_dict))
            if any(given) and not all(given):  # as state_dict() gives it: on one rank only
                source = given.index(True)
                mine = state_dict if self.engine.collectives.rank == source else None
                state_dict = self.engine.collectives.gather_objects(mine)[source]
        fitting = optimizer_state.by_number(self, state_dict)
        if not self.direct or "param_groups" in fitting:  # else of a format of the optimizer's own
            optimizer_state.require_fit(self, fitting)
        load = functools.partial(self._original_load if self.direct else self._load, fitting)
        compression = self.engine.compression
        return load if compression is None else functools.partial(compression.start_anew, load, self.parameters)

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Load a state that fits."""
        parameters = list(self.parameters())
        saved = state_dict["state"]
        state = {parameters[index]: values for index, values in saved.items() if isinstance(index, int)}
        self.optimizer.state.clear()
        self._original_load({**state_dict, "state": {k: v for k, v in saved.items() if not isinstance(k, int)}})
        if self.is_deepspeeds:  # torch's Adam saves no bias_correction, without which a step would fail
            for group in self.optimizer.param_groups:
                group.setdefault("bias_correction", self.optimizer.defaults["bias_correction"])
        self._members = self._current_members()
        placed = {parameter for unit in self._units for parameter in unit.parameters}

        def load() -> None:
            # Copies: what was loaded may be a file that is looked into.
            self.waiting_state = {
                p: {key: optimizer_state.copied(value) for key, value in values.items()}
                for p, values in state.items()
                if p not in placed
            }
            self.segments = optimizer_state.scatter(self, state, self.segments)

        if self.sharded:
            unanimous("loading an optimizer's state", load, self.engine.collectives.gather_objects)
        else:
            load()


def _may_be_fused(group: dict[str, Any]) -> bool:
    others = ("foreach", "differentiable", "capturable")
    return group.get("fused", False) is None and not any(group.get(name) for name in others)

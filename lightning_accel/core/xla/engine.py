"""The rows on XLA: what rests where is said to the compiler, which finds out what has to be sent.

One process (of each host) computes on the global batch, as if there were one device; XLA divides the program::

    forward     on a batch that is cut over all devices; parameters that rest sharded are gathered (gathering.py)
    backward    gradients, annotated with where they rest: the compiler reduces them, or reduce-scatters them
    step        the user's optimizer; its state, annotated with where it rests: each device updates its part
                the updated parameters, annotated with where they rest: the compiler gathers them if they are whole

Everything is recorded until it is cut off and run: after the step, and after each backward that no step follows.
Annotations have to be there before. A loss is thus what it is on one device, and so are clipping and accumulation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.core.partition import Units, find_blocks
from lightning_accel.core.placement import Rest, Row, find_row
from lightning_accel.core.xla.gathering import Unit, gather_in_units
from lightning_accel.core.xla.moving import replace_tensors, to_host
from lightning_accel.core.xla.placing import Placing
from lightning_accel.core.xla.recompute import recompute_on_devices
from lightning_accel.core.xla.report import XLAReport, programs_compiled
from lightning_accel.core.xla.shardings import Spec, replicated, sharded


class XLAEngine:
    """Trains one module on all XLA devices.

    It moves the module there, with host 0's values if there are several hosts. XLA tensors are of another kind than
    those of the CPU, so the module gets new parameters: optimizers are made after the engine. Parameters that several
    modules share stay shared.

    Args:
        module: The model.
        row: The placement row, or its name (``"ddp"``, ``"zero2"``, ``"fsdp"``, …).
        units: Names or classes of modules whose parameters are gathered together, for rows whose parameters rest
            sharded. Default: the members of the model's repeated block class.
        shard_size: For hybrid rows, how many neighbouring devices divide a copy of the model state; by default those
            of one host.

    Raises:
        ValueError: If the row or a unit does not exist, ``shard_size`` does not divide the number of devices, parts of
            the model are on the meta device, or the models of several hosts differ in more than their values.
        ImportError: If torch_xla is not installed, or does not fit torch.
        RuntimeError: If XLA cannot start any more; see core/xla/runtime.py.

    Example::

        engine = XLAEngine(module, "fsdp")
        optimizer = torch.optim.AdamW(module.parameters())
        engine.add_optimizer(optimizer)
        for batch in batches:
            optimizer.zero_grad()
            engine.backward(module(engine.put_batch(batch)))
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()

    """

    def __init__(
        self, module: nn.Module, row: Row | str, *, units: Units | None = None, shard_size: int | None = None
    ) -> None:
        self.row = row if isinstance(row, Row) else find_row(row)
        if shard_size is not None and not self.row.hybrid:
            raise ValueError(f"Expected shard_size for hybrid rows only, got {shard_size} for row {self.row.name!r}.")
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_meta:
                raise ValueError(f"Expected a model with values, got {name!r} on the meta device. Make it on the CPU.")
        if self.row.hybrid and shard_size is None:
            shard_size = _devices_of_host()
        self.placing = Placing(shard_size)
        """The devices."""
        self.module = module
        self.steps = 0
        """Optimizer steps so far."""
        self.backwards = 0
        """Backwards so far."""
        self._optimizers: list[Optimizer] = []
        self.is_closed = False
        """Whether it leaves the module and the optimizers alone."""
        self._synchronise = True
        blocks = find_blocks(module, units).values()  # before anything has changed: it may raise
        self._within_units = {part for block in blocks for part in block.modules()}
        self.placing.hosts.take_first_values(module)
        self._compiled_before = programs_compiled()
        replace_tensors(module, lambda tensor: self.placing.put(tensor.detach().cpu(), self._spec_of_value(tensor)))
        self._undo = [gather_in_units(module, units, self.placing)] if self.row.parameters is Rest.SHARDED else []

    def _spec(self, tensor: Tensor, rest: Rest) -> Spec:
        if rest is Rest.REPLICATED:
            return replicated(tensor.shape)
        return sharded(tensor.shape, self.placing.shard_size)

    def _spec_of_value(self, tensor: Tensor) -> Spec:
        is_parameter = isinstance(tensor, nn.Parameter)
        return self._spec(tensor, self.row.parameters if is_parameter else Rest.REPLICATED)

    # ---------------------------------------------------------------- training

    def recompute(self, modules: Iterable[nn.Module]) -> None:
        """Have modules compute their activations again in backward: activation checkpointing.

        Parameters that rest sharded are gathered again for that. See core/xla/recompute.py.

        Args:
            modules: Of the engine's module.

        """
        self._undo.append(recompute_on_devices([(module, self._unit_of(module)) for module in modules]))

    def _unit_of(self, module: nn.Module) -> Unit | None:
        """What gathers the parameters that no module within this one would gather by itself."""
        if self.row.parameters is not Rest.SHARDED:
            return None
        unit = Unit(self.placing, module.modules() if module in self._within_units else [module])
        return unit if unit.parts else None

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Have an optimizer's state and what it updates rest as the row says.

        Args:
            optimizer: Any of torch's, or one that is written like those.

        Raises:
            ValueError: If it has parameters that are not the module's, or is ``fused``, which XLA does not have.

        """
        ours = set(self.module.parameters())
        for index, group in enumerate(optimizer.param_groups):
            if not ours.issuperset(group["params"]):
                raise ValueError(
                    f"Expected an optimizer of the module's parameters, but group {index} of {type(optimizer).__name__}"
                    " has others. The engine gives the module new ones, on the devices: make the optimizer after it."
                )
            if group.get("fused"):
                raise ValueError(
                    f"Expected {type(optimizer).__name__} without fused=True: XLA has no such kernels, and fuses by"
                    " itself. Leave it out."
                )
        self._optimizers.append(optimizer)
        self._undo.append(optimizer.register_step_post_hook(self._after_step).remove)

    def put_batch(self, batch: Any) -> Any:
        """A batch in host memory, on the devices: tensors are cut along their first dimension, scalars are whole.

        Args:
            batch: This host's part of the global batch, on one host all of it: tensors of shape (samples, …), or on
                one host scalars, in any nesting. On all hosts the shapes are the same.

        Raises:
            ValueError: If the number of samples is no multiple of the number of this host's devices, or there are
                several hosts and a tensor is a scalar.

        """
        return self.placing.put_batch(batch)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """``loss.backward(**kwargs)``, with gradients divided as the row says.

        Args:
            loss: Of the global batch.
            kwargs: As for ``Tensor.backward``.

        """
        with self.backward_context():
            loss.backward(**kwargs)  # type: ignore[no-untyped-call]

    @contextmanager
    def backward_context(self, *, cut: bool = True) -> Iterator[None]:
        """Within it, gradients may arrive.

        Args:
            cut: Have what was recorded run afterwards if no step follows; with False the caller does so, when other
                engines have said where their gradients rest, too.

        """
        self.backwards += 1
        yield
        rest = self.row.gradients if self._synchronise else self.row.accumulating
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                self.placing.annotate(parameter.grad, self._spec(parameter, rest))
        if cut and not self._synchronise:
            self.cut()

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that were added."""
        return list(self._optimizers)

    @property
    def is_boundary(self) -> bool:
        """Whether an optimizer step may follow the next backward: unless this is within ``no_sync``."""
        return self._synchronise

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around each backward that no optimizer step follows.

        Gradients are reduced nevertheless: there is one program for all devices, in which a gradient is a sum over
        all of them. Rows whose gradients accumulate on each rank keep them whole on every device until the boundary.
        """
        before, self._synchronise = self._synchronise, False
        try:
            yield
        finally:
            self._synchronise = before

    def cut(self) -> None:
        """Have what was recorded be compiled, unless that was done before, and run. It does not wait for results."""
        import torch_xla

        torch_xla.sync()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.placing.annotate(parameter, self._spec(parameter, self.row.parameters))
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.device.type == "xla":
                        self.placing.annotate(value, self._spec(value, self.row.optimizer_state))
        self.steps += 1
        self.cut()

    # ------------------------------------------------------------------ values

    def settle(self) -> None:
        """Have the module's values rest where the row says, after something else than an optimizer wrote to them."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            self.placing.annotate(tensor, self._spec_of_value(tensor))
        self.cut()

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """``optimizer.load_state_dict(state)``, and its values rest where the row says.

        Args:
            optimizer: One of those that were added.
            state: Of whole parameters, in host memory; the same on all hosts.

        """
        optimizer.load_state_dict(state)
        for values in optimizer.state.values():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.device.type == "xla":
                    values[name] = self.placing.put(value, self._spec(value, self.row.optimizer_state))

    def bring_home(self) -> None:
        """Close, and move the module to host memory, whole. It gets new parameters, and the optimizers follow."""
        self.close()
        states = [
            (values, name, value)
            for optimizer in self._optimizers
            for values in optimizer.state.values()
            for name, value in values.items()
            if isinstance(value, Tensor)
        ]
        tensors = list(dict.fromkeys((*self.module.parameters(), *self.module.buffers())))
        fetched = to_host([*tensors, *(value for _, _, value in states)])
        values_of = dict(zip(tensors, fetched, strict=False))
        homes = replace_tensors(self.module, values_of.__getitem__)
        for (values, name, _), value in zip(states, fetched[len(tensors) :], strict=True):
            values[name] = value
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["params"] = [homes[parameter] for parameter in group["params"]]
            former = dict(optimizer.state)
            optimizer.state.clear()
            optimizer.state.update({homes.get(parameter, parameter): values for parameter, values in former.items()})

    # ------------------------------------------------------------------ report

    @property
    def compilations(self) -> int:
        """Programs compiled in this process since the engine was made."""
        return programs_compiled() - self._compiled_before

    def report(self) -> XLAReport:
        """What rests on one device, and what was compiled."""
        trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        kinds: dict[str, list[Tensor]] = {
            "parameters": list(trainable),
            "frozen_parameters": [parameter for parameter in self.module.parameters() if not parameter.requires_grad],
            "gradients": [parameter.grad for parameter in trainable if parameter.grad is not None],
            "optimizer_state": [
                value
                for optimizer in self._optimizers
                for state in optimizer.state.values()
                for value in state.values()
                if isinstance(value, Tensor) and value.device.type == "xla"
            ],
            "buffers": list(self.module.buffers()),
        }
        return XLAReport(
            row=self.row.name,
            devices=self.placing.devices,
            shard_size=self.placing.shard_size,
            at_rest={kind: sum(map(self.placing.bytes_on_one, tensors)) for kind, tensors in kinds.items()},
            steps=self.steps,
            compilations=self.compilations,
        )

    def close(self) -> None:
        """Leave the module and the optimizers alone from now on. The module stays on the devices."""
        self.is_closed = True
        while self._undo:
            self._undo.pop()()


def _devices_of_host() -> int:
    from torch_xla import runtime

    from lightning_accel.core.xla.runtime import start

    start()
    return int(runtime.addressable_runtime_device_count())

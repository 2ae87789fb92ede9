"""A step of our rows on XLA devices beside torch_xla's own ways: ``python -m benchmarks.xla``. Needs torch_xla.

One process holds all contestants, on the devices there are (four virtual ones of the CPU, unless the environment says
otherwise), with the same weights, batches and optimizer, and visits them in turns. A visit is one lead-in step and then
some timed ones; recording a step, sending its batch and running it are all within. ``hand_*`` is torch_xla as its guide
has users write it, ``torch_xla_fsdp`` its ``SpmdFullyShardedDataParallel``.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment, page
from benchmarks.config import Config
from benchmarks.models import MODELS, Batches, build_model
from benchmarks.models.gpt import Block
from benchmarks.stats import COMPARED_STEPS, TOLERANCES, LossCheck, Spread, check_losses, ratios, visiting_order
from lightning_accel.core.xla import XLAEngine, start
from lightning_accel.core.xla.report import programs_compiled

PEERS = {"accel_ddp": "hand_ddp", "accel_zero1": "hand_zero", "accel_zero2": "hand_zero", "accel_fsdp": "hand_fsdp"}
"""Our rows, and by hand the same placement."""
WRAPPER = "torch_xla_fsdp"
"""What ``accel_fsdp`` is compared with as well."""
_WARMUP = 4
"""Optimizer state is made in the first step, and torch_xla may change its mind about shardings in the second."""

Spec = tuple[str | None, ...]


@dataclass(frozen=True)
class Contestant:
    """Something that trains one model."""

    model: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    put: Callable[[Tensor], Tensor]
    """A batch from host memory to the devices."""
    backward: Callable[[Tensor], None]
    finish: Callable[[], None]
    """What is left to do after the optimizer step."""

    def step(self, tokens: Tensor) -> Tensor:
        """One training step on tokens (batch, sequence + 1); returns the loss, which may not be there yet."""
        self.optimizer.zero_grad()
        loss = self.model(self.put(tokens))
        self.backward(loss)
        self.optimizer.step()
        self.finish()
        return loss.detach()

    def bytes_on_one(self) -> int:
        """Bytes of parameters and optimizer state on the first device."""
        import torch_xla

        (groups,) = (group["params"] for group in self.optimizer.param_groups)
        state = [value for parameter in groups for value in self.optimizer.state[parameter].values()]
        tensors = [tensor for tensor in (*groups, *state) if tensor.device.type == "xla"]
        parts = (torch_xla._XLAC._get_local_shards([tensor])[0][0][0] for tensor in tensors)
        return sum(part.numel() * part.element_size() for part in parts)


def accel(row: str, config: Config) -> Contestant:
    """Our engine under one row."""
    model = build_model(config)
    engine = XLAEngine(model, row)
    optimizer = _optimizer(model, config)
    engine.add_optimizer(optimizer)
    return Contestant(model, optimizer, engine.put_batch, engine.backward, lambda: None)


def by_hand(kind: str, config: Config) -> Contestant:
    """Sharding annotations by hand: of the batch alone, of optimizer state as well, or of parameters."""
    import torch_xla
    from torch_xla.distributed import spmd

    mesh = _mesh("data")
    model = build_model(config).to("xla")
    if kind == "fsdp":
        for parameter in model.parameters():
            spmd.mark_sharding(parameter, mesh, _cut(parameter))
    torch_xla.sync()
    optimizer = _optimizer(model, config)

    def annotate(tensor: Tensor, spec: Spec) -> None:
        torch_xla._XLAC._xla_annotate_custom_sharding(tensor, mesh.get_op_sharding(spec))

    def backward(loss: Tensor) -> None:
        loss.backward()
        if kind == "zero":
            for parameter in model.parameters():
                assert parameter.grad is not None
                annotate(parameter.grad, _cut(parameter))

    def finish() -> None:
        if kind == "zero":
            for parameter in model.parameters():
                annotate(parameter, (None,) * parameter.dim())
                for value in optimizer.state[parameter].values():
                    if value.device.type == "xla":
                        annotate(value, _cut(value))
        torch_xla.sync()

    return Contestant(model, optimizer, functools.partial(_put, mesh), backward, finish)


def torch_xla_fsdp(config: Config) -> Contestant:
    """``SpmdFullyShardedDataParallel`` around each block and around the model."""
    import torch_xla
    from torch_xla.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from torch_xla.experimental.spmd_fully_sharded_data_parallel import SpmdFullyShardedDataParallel

    mesh = _mesh("fsdp")
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Block})
    model = SpmdFullyShardedDataParallel(build_model(config), mesh=mesh, auto_wrap_policy=policy)
    torch_xla.sync()
    optimizer = _optimizer(model, config)
    return Contestant(model, optimizer, functools.partial(_put, mesh), lambda loss: loss.backward(), torch_xla.sync)


def _mesh(axis: str) -> Any:
    import numpy
    from torch_xla.distributed import spmd

    return spmd.Mesh(numpy.arange(start()), (start(),), (axis,))


def _cut(tensor: Tensor) -> Spec:
    """Along the longest dimension."""
    longest = tensor.shape.index(max(tensor.shape))
    return tuple("data" if dimension == longest else None for dimension in range(tensor.dim()))


def _put(mesh: Any, tokens: Tensor) -> Tensor:
    from torch_xla.distributed import spmd

    placed = tokens.to("xla")
    spmd.mark_sharding(placed, mesh, (mesh.axis_names[0], None))
    return placed


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, eps=config.epsilon)


MAKERS: dict[str, Callable[[Config], Contestant]] = {
    **{f"hand_{kind}": functools.partial(by_hand, kind) for kind in ("ddp", "zero", "fsdp")},
    WRAPPER: torch_xla_fsdp,
    **{name: functools.partial(accel, name.removeprefix("accel_")) for name in PEERS},
}


@dataclass
class Figures:
    """What was measured of a contestant."""

    seconds: list[float] = field(default_factory=list)
    """Of a step, by round."""
    compiled: int = 0
    """Programs that were compiled while it was timed: none, or the times mean nothing."""
    losses: list[float] = field(default_factory=list)
    """Of the first steps."""
    bytes_on_one: int = 0
    """Of parameters and optimizer state, on one device."""
    check: LossCheck | None = None
    """Whether the losses are those of plain torch on the CPU."""

    @property
    def problem(self) -> str | None:
        """Why the times mean nothing, if so."""
        if self.check is None or not self.check.passed:
            return "invalid: losses differ" + (f" by {self.check.difference:.1e}" if self.check else "")
        return f"invalid: {self.compiled} programs compiled meanwhile" if self.compiled else None


def measure(config: Config, names: Sequence[str]) -> dict[str, Figures]:
    """Visit each of these contestants so many times."""
    from torch_xla.core import xla_model

    batches = [batch for index in range(16) for (batch,) in Batches(config).of_all_ranks(index)]
    made = {name: MAKERS[name](config) for name in names}
    taken = {name: _taken(contestant, batches) for name, contestant in made.items()}
    losses = {name: [next(steps) for _ in range(_WARMUP)] for name, steps in taken.items()}
    found = {name: Figures() for name in made}
    for index in range(config.rounds):
        for place in visiting_order(len(names), index):
            name, before = names[place], programs_compiled()
            losses[name].append(next(taken[name]))
            xla_model.wait_device_ops()
            begin = time.perf_counter()
            losses[name] += [next(taken[name]) for _ in range(config.steps)]
            xla_model.wait_device_ops()
            found[name].seconds.append((time.perf_counter() - begin) / config.steps)
            found[name].compiled += programs_compiled() - before
            del losses[name][COMPARED_STEPS:]
    expected = _on_cpu(config, batches, len(losses[names[0]]))
    for name, figures in found.items():
        figures.losses = [float(loss) for loss in losses[name]]
        figures.check = check_losses([figures.losses], expected, TOLERANCES["32-true"])
        figures.bytes_on_one = made[name].bytes_on_one()
    return found


def _taken(contestant: Contestant, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The losses of its steps, one after the other."""
    while True:
        yield from map(contestant.step, batches)


def _on_cpu(config: Config, batches: Sequence[Tensor], steps: int) -> list[float]:
    """The losses of plain torch."""
    model = build_model(config)
    optimizer = _optimizer(model, config)
    contestant = Contestant(model, optimizer, lambda batch: batch, lambda loss: loss.backward(), lambda: None)
    taken = _taken(contestant, batches)
    return [float(next(taken)) for _ in range(steps)]


def against(found: dict[str, Figures], name: str, other: str) -> Spread | None:
    """A contestant's times over another's of the same round; None if either's mean nothing."""
    if found[name].problem or found[other].problem:
        return None
    return Spread.of(ratios(found[name].seconds, found[other].seconds))


def comparisons(found: dict[str, Figures], name: str) -> dict[str, Spread | None]:
    """What is compared: our rows with the same by hand, and the one that torch_xla has a wrapper for with that."""
    others = [PEERS[name]] if name in PEERS else []
    others += [WRAPPER] if PEERS.get(name) == "hand_fsdp" else []
    return {other: against(found, name, other) for other in others if other in found}


def report(found: dict[str, Figures], situation: str) -> str:
    """A table: milliseconds of a step, and our rows' ratios to their peers in the same round."""
    lines = [situation, "", f"{'':16} {'ms':>8} {'quartiles':>18} {'KiB on one':>11}  over its peers [quartiles]"]
    for name, figures in found.items():
        spread = Spread.of([seconds * 1e3 for seconds in figures.seconds])
        quartiles = f"[{spread.lower_quartile:.2f}, {spread.upper_quartile:.2f}]"
        told = [
            f"{ratio.median:.3f} [{ratio.lower_quartile:.3f}, {ratio.upper_quartile:.3f}] {other}"
            for other, ratio in comparisons(found, name).items()
            if ratio is not None
        ]
        text = figures.problem or ", ".join(told)
        row = f"{name:16} {spread.median:8.2f} {quartiles:>18} {figures.bytes_on_one / 1024:11.0f}  {text}"
        lines.append(row.rstrip())
    return "\n".join(lines)


def records(found: dict[str, Figures]) -> dict[str, Any]:
    """All that was measured, by contestant."""
    made: dict[str, Any] = {}
    for name, figures in found.items():
        told = {other: spread and asdict(spread) for other, spread in comparisons(found, name).items()}
        made[name] = {"status": figures.problem or "valid", "ratios": told, **asdict(figures)}
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write it with all rounds where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.xla", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--model",
        choices=[name for name in MODELS if name.startswith("gpt")],
        default="gpt-tiny",
        help="(default: %(default)s)",
    )
    add(
        "--only",
        metavar="A,B,C",
        default=",".join(MAKERS),
        help="each is compiled for half a minute (default: %(default)s)",
    )
    add("--rounds", type=int, default=15, metavar="N", help="timed visits to each (default: %(default)s)")
    add("--steps", type=int, default=8, metavar="N", help="timed steps of a visit (default: %(default)s)")
    page.add_out(parser)
    chosen = parser.parse_args(arguments)
    names = chosen.only.split(",")
    if unknown := set(names).difference(MAKERS):
        parser.error(f"expected --only to name some of {', '.join(MAKERS)}, got {', '.join(sorted(unknown))}")
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    if os.environ["PJRT_DEVICE"] == "CPU":
        os.environ.setdefault("CPU_NUM_DEVICES", "4")
    devices = start()
    torch.set_num_threads(1)
    config = Config(model=chosen.model, ranks=devices, rounds=chosen.rounds, steps=chosen.steps, warmup=_WARMUP)
    header = environment.describe("benchmarks.xla") | {"devices": devices, "config": config.public()}
    found = measure(config, names)
    situation = (
        f"{config.model}, {devices} XLA devices; a step, medians of {config.rounds} rounds of {config.steps} steps"
    )
    print(report(found, situation))
    if chosen.out is not None:
        page.write(chosen.out, "xla", report(found, situation), records(found), header)
    return int(any(figures.problem for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())

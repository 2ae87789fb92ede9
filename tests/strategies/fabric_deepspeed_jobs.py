"""What the ranks of `test_fabric_deepspeed` do, in one job: DeepSpeed keeps its process groups as long as a process.

Models are float32, as DeepSpeed's master values are; SGD shows wrong scales of gradients, which Adam hides.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed_jobs import ACCUMULATE, BATCHES, CLIPPING, STAGES, STEPS, import_quietly
from lightning.fabric import Fabric
from models import Net, Samples, loader
from torch import Tensor, nn


def fabric_for(strategy: Any, **settings: Any) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=1 if strategy == "auto" else 2, strategy=strategy, **settings)
    fabric.launch()
    return fabric


def deepspeed(stage: int = 2, **file: Any) -> Any:
    """The strategy, with a file that clips and accumulates."""
    from lightning_accel.strategies.fabric import AccelDeepSpeedStrategy

    told = {"gradient_clipping": CLIPPING, "gradient_accumulation_steps": ACCUMULATE, **file}
    return AccelDeepSpeedStrategy(config={"zero_optimization": {"stage": stage}, **told})


def new_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5)


class Loop:
    """A loop as Fabric's documentation has it."""

    def __init__(self, fabric: Fabric, net: nn.Module | None = None) -> None:
        self.fabric = fabric
        self.net = Net(dtype=torch.float32) if net is None else net
        bare = new_optimizer(self.net)
        schedule = torch.optim.lr_scheduler.ExponentialLR(bare, 0.97)
        self.model, self.optimizer, self.schedule = fabric.setup(self.net, bare, scheduler=schedule)
        self.steps = 0
        self.losses: list[float] = []

    def train(self, steps: int) -> list[float]:
        """Go on for some steps; the losses of their micro-batches."""
        batches = list(loader(size=8 * BATCHES, dtype=torch.float32))
        losses = []
        for _ in range(steps):
            for micro in range(ACCUMULATE):
                _, x, y = batches[(self.steps * ACCUMULATE + micro) % BATCHES]
                with self.fabric.no_backward_sync(self.model, enabled=micro < ACCUMULATE - 1):
                    loss = nn.functional.mse_loss(self.model(x), y)
                    self.fabric.backward(loss / ACCUMULATE)
                losses.append(loss.item())
            if self.fabric.world_size == 1:
                self.fabric.clip_gradients(self.model, self.optimizer, max_norm=CLIPPING)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.steps += 1
        return losses

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "steps": self.steps}


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def trained(strategy: Any, **settings: Any) -> dict[str, Any]:
    loop = Loop(fabric_for(strategy, **settings))
    kind = type(loop.optimizer).__name__, isinstance(loop.optimizer, torch.optim.SGD)
    losses = loop.train(STEPS)
    found = {"losses": losses, "kind": kind, "lr": loop.optimizer.param_groups[0]["lr"]}
    if strategy != "auto":
        (engine,) = loop.fabric.strategy.engines
        found["norm"] = float(engine.get_global_grad_norm() or 0.0)
        found["told"] = (engine.gradient_clipping(), engine.gradient_accumulation_steps(), engine.global_steps)
        loop.fabric.strategy.teardown()
        found["hooks"] = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in loop.net.modules())
        found["released"] = type(loop.optimizer.optimizer) is torch.optim.SGD
    found["values"] = values(loop.net)
    found["dtype"] = str(loop.net.first.weight.dtype)
    return found


def counted(stage: int) -> dict[str, int]:
    """How often DeepSpeed clips and steps in 20 steps."""
    loop = Loop(fabric_for(deepspeed(stage)))
    (engine,) = loop.fabric.strategy.engines
    found = {"clippings": 0, "steps": 0}

    def count(owner: Any, name: str, key: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[key] += 1
            return inner(*args, **kwargs)

        setattr(owner, name, call)

    count(engine.optimizer, "unscale_and_clip_grads", "clippings")
    count(engine.basic_optimizer, "step", "steps")
    loop.train(STEPS)
    return found


def saved_and_loaded(stage: int, folder: str) -> dict[str, Any]:
    from lightning_accel.convert import convert

    place = f"{folder}/fabric {stage}"
    loop = Loop(fabric_for(deepspeed(stage)))
    loop.train(9)
    loop.fabric.save(place, loop.state)
    found: dict[str, Any] = {"whole": loop.train(STEPS - 9)}

    other = Loop(fabric_for(deepspeed(stage)), Net(seed=1, dtype=torch.float32))
    other.train(2)
    state = other.state
    rest = other.fabric.load(place, state)
    other.steps = state["steps"]
    found["rest"] = sorted(rest)
    found["continued"] = other.train(STEPS - 9)

    plain = Net(seed=2, dtype=torch.float32)
    fabric = fabric_for(deepspeed(stage))
    evaluated = fabric.setup(plain)
    fabric.load(place, {"model": evaluated, "steps": 0})
    found["values"] = values(plain)
    if dist.get_rank() == 0:
        convert(place, f"{place}.ckpt")
        found["converted"] = torch.load(f"{place}.ckpt", weights_only=True)["state_dict"]
    dist.barrier()
    found["refused"] = {
        "other stage": refused(lambda: Loop(fabric_for(deepspeed((stage + 1) % 4))), lambda new: load(new, place)),
        "without the optimizer": refused(lambda: loop, lambda it: it.fabric.save(place, {"model": it.model})),
        "names": refused(lambda: loop, lambda it: it.fabric.save(place, {**it.state, "module": 1})),
        "remote": refused(lambda: loop, lambda it: it.fabric.save("s3://x/y", it.state)),
        "not there": refused(lambda: loop, lambda it: load(it, f"{place}/nothing")),
        "a file": refused(lambda: loop, lambda it: load(it, f"{place}.ckpt")),
        "no such key": refused(lambda: loop, lambda it: it.fabric.load(place, {**it.state, "epoch": 1})),
        "with gradients": refused(lambda: backward(loop), lambda it: load(it, place)),
        "raw": refused(lambda: loop, lambda it: it.fabric.load_raw(f"{place}.ckpt", it.model)),
    }
    return found


def load(loop: Loop, place: str) -> None:
    loop.fabric.load(place, loop.state)


def refused(make: Any, call: Any) -> str:
    made = make()
    try:
        call(made)
    except (ValueError, RuntimeError, FileNotFoundError, KeyError) as error:
        return str(error)
    return "accepted"


def backward(loop: Loop, times: int = 1) -> Loop:
    _, x, y = next(iter(loader(dtype=torch.float32)))
    for _ in range(times):
        loop.fabric.backward(nn.functional.mse_loss(loop.model(x), y))
    return loop


def refusals() -> dict[str, str]:
    def fresh(**settings: Any) -> Any:
        return lambda: Loop(fabric_for(deepspeed(**settings)))

    def two(loop: Loop) -> None:
        net = Net(dtype=torch.float32)
        loop.fabric.setup(net, new_optimizer(net), new_optimizer(net))

    def apart(loop: Loop) -> None:
        net = Net(dtype=torch.float32)
        loop.fabric.setup_module(net)
        loop.fabric.setup_optimizers(new_optimizer(net))

    def double(loop: Loop) -> None:
        net = Net()
        loop.fabric.setup(net, new_optimizer(net))

    def without_model(loop: Loop) -> None:
        Loop(loop.fabric)
        backward(loop)

    return {
        "clips": refused(fresh(), lambda it: it.fabric.clip_gradients(it.model, it.optimizer, max_norm=0.5)),
        "by value": refused(fresh(), lambda it: it.fabric.clip_gradients(it.model, it.optimizer, clip_val=0.5)),
        "took back": refused(fresh(), lambda it: backward(it).optimizer.zero_grad()),
        "too early": refused(fresh(), lambda it: backward(it).optimizer.step()),
        "too late": refused(fresh(), lambda it: backward(it, 3)),
        "two": refused(fresh(), two),
        "apart": refused(fresh(), apart),
        "float64": refused(fresh(), double),
        "which": refused(fresh(), without_model),
        "batches": refused(lambda: fresh(train_batch_size=33, train_micro_batch_size_per_gpu=4), lambda make: make()),
        "optimizer state": refused(fresh(), lambda it: it.optimizer.state_dict()),
        "optimizer's loading": refused(fresh(), lambda it: it.optimizer.load_state_dict({})),
        "model state": refused(fresh(stage=3), lambda it: it.model.state_dict()),
        "model's loading": refused(fresh(), lambda it: it.model.load_state_dict(Net().state_dict())),
        "by itself": refused(fresh(), lambda it: it.model(torch.ones(1, 5)).sum().backward()),
    }


def two_models() -> dict[str, Any]:
    """One after the other through the same Fabric, each with an engine."""
    fabric = fabric_for(deepspeed(gradient_accumulation_steps=1))
    first, second = Loop(fabric), Loop(fabric, Net(seed=1, dtype=torch.float32))
    found = {}
    for name, loop in (("first", first), ("second", second)):
        losses = []
        for _, x, y in loader(dtype=torch.float32):
            loss = nn.functional.mse_loss(loop.model(x), y)
            fabric.backward(loss, model=loop.model)
            loop.optimizer.step()
            losses.append(loss.item())
        found[name] = losses
    return found


def alone_with(seed: int) -> list[float]:
    """What `two_models` should show for one."""
    fabric = fabric_for("auto")
    net = Net(seed=seed, dtype=torch.float32)
    model, optimizer = fabric.setup(net, new_optimizer(net))
    losses = []
    for _, x, y in loader(dtype=torch.float32):
        loss = nn.functional.mse_loss(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def of_all_ranks() -> dict[str, Any]:
    fabric = fabric_for("accel_deepspeed")
    mine = torch.tensor(fabric.global_rank)
    return {
        "mean": fabric.all_reduce(mine).item(),
        "sum": fabric.all_reduce(mine.clone(), reduce_op="sum").item(),
        "gathered": fabric.all_gather(mine).tolist(),
        "stage": fabric.strategy.stage,  # type: ignore[attr-defined]
    }


def evaluated_in_bf16() -> tuple[float, float, str]:
    """A model without an optimizer is what it is, beside one that is trained in bf16."""
    fabric = fabric_for(deepspeed(stage=1), precision="bf16-mixed")
    loop = Loop(fabric)
    net = Net(dtype=torch.float32)
    model = fabric.setup(net)
    x = Samples(dtype=torch.float32).x
    output = loop.model(x)
    return (model(x) - net(x)).abs().max().item(), (output - net(x)).abs().max().item(), str(output.dtype)


def everything(folder: str) -> dict[str, Any]:
    import_quietly()
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[f"stage {stage}"] = trained(deepspeed(stage))
        found[f"saved {stage}"] = saved_and_loaded(stage, folder)
    found["counts"] = counted(2)
    found["unclipped"] = trained(deepspeed(gradient_clipping=0.0))["losses"]
    for precision in ("bf16-mixed", "bf16-true"):
        found[precision] = trained(deepspeed(3 if precision == "bf16-mixed" else 1), precision=precision)
    found["refused"] = refusals()
    found["two models"] = two_models()
    found["of all ranks"] = of_all_ranks()
    found["evaluated"] = evaluated_in_bf16()
    return found

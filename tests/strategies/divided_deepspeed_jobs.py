"""What the ranks of `test_accel_deepspeed_tensors` do: a model that is divided by AutoTP.

A job of each number of ranks: DeepSpeed keeps its process groups as long as a process.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from deepspeed_jobs import ACCUMULATE, CLIPPING, STEPS, import_quietly, trainer
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchmetrics import SumMetric

SAMPLES, BATCH, LENGTH, TOKENS, WIDTH, HEADS = 40, 8, 6, 16, 16, 4
STAGES = (0, 1, 2, 3)
SPECS = [
    {"patterns": [r".*(q|k|v|up)_proj\.weight$"], "partition_type": "column"},
    {"patterns": [r".*(o|down)_proj\.weight$"], "partition_type": "row"},
]
DIVIDED = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": SPECS}}


class Attention(nn.Module):
    """With as many heads as its own projections have features for."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = [each(x).unflatten(-1, (self.num_heads, -1)) for each in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.norm = nn.LayerNorm(WIDTH)
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x))
        return x + self.down_proj(nn.functional.gelu(self.up_proj(x)))


class Language(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embed = nn.Embedding(TOKENS, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.dropout = nn.Dropout(dropout)
            self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = self.dropout(block(x))
        return self.head(x)


class Text(Dataset[tuple[int, Tensor]]):
    def __init__(self) -> None:
        self.tokens = torch.randint(TOKENS, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.tokens[index]


def loss_of(net: Any, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def new_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.5)  # which shows wrong scales of gradients


class Speaker(pl.LightningModule):
    """Notes its losses, its samples and what it logged."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = Language(dropout)
        self.count = SumMetric()
        self.losses: list[float] = []
        self.samples: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, tokens = batch
        loss = loss_of(self.net, tokens)
        self.losses.append(loss.item())
        self.samples.append(index.tolist())
        self.log("mean", loss, sync_dist=True, on_epoch=True, on_step=False)
        self.log("sum", float(len(index)), sync_dist=True, reduce_fx="sum", on_epoch=True, on_step=False)
        self.count(float(len(index)))
        self.log("count", self.count, on_epoch=True, on_step=False)
        return loss

    def on_train_start(self) -> None:
        self.shapes = {name: tuple(getattr(one, "ds_shape", one.shape)) for name, one in self.net.named_parameters()}

    def configure_optimizers(self) -> Any:
        optimizer = new_optimizer(self)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data(replicas: int) -> DataLoader:
    """Batches of 8 over all replicas; with several ranks the sampler is Lightning's own."""
    if not dist.is_initialized():
        return DataLoader(Text(), batch_size=BATCH, sampler=DistributedSampler(Text(), 1, 0, shuffle=True))
    return DataLoader(Text(), batch_size=BATCH // replicas, shuffle=True)


def fitted(module: Speaker, strategy: Any, replicas: int = 1, **arguments: Any) -> dict[str, Any]:
    devices = dist.get_world_size() if dist.is_initialized() else 1
    used = trainer(strategy, devices=devices, use_distributed_sampler=devices > 1, **arguments)
    used.fit(module, data(replicas))
    return {
        "losses": module.losses,
        "samples": module.samples,
        "logged": {name: float(value) for name, value in used.logged_metrics.items()},
        "values": {name: value.detach().clone() for name, value in module.net.state_dict().items()},
        "shapes": module.shapes,
        "heads": module.net.blocks[0].self_attn.num_heads,
        "kinds": sorted({type(part).__name__ for part in module.net.modules()}),
    }


def divided(stage: int = 2, **file: Any) -> Any:
    from lightning_accel.strategies import AccelDeepSpeedStrategy

    return AccelDeepSpeedStrategy(config={"zero_optimization": {"stage": stage}, "tensor_parallel": DIVIDED, **file})


def stopped_and_continued(stage: int, folder: str, replicas: int) -> dict[str, Any]:
    place = f"{folder}/{stage}"
    keeper = pl.callbacks.ModelCheckpoint(place, "{step}", every_n_epochs=1, save_top_k=-1)
    found = fitted(Speaker(), divided(stage), replicas, enable_checkpointing=True, callbacks=[keeper])
    module = Speaker()
    devices = dist.get_world_size()
    trainer(divided(stage), devices=devices).fit(module, data(replicas), ckpt_path=f"{place}/step=9.ckpt")
    found["continued"] = module.losses
    found["values continued"] = {name: value.detach().clone() for name, value in module.net.state_dict().items()}
    return found


def dropped(replicas: int) -> dict[str, Any]:
    """Dropout, with every rank's random numbers its own before."""
    torch.manual_seed(100 + dist.get_rank())
    return fitted(Speaker(dropout=0.3), divided(1), replicas)


def fabric_loop(folder: str, strategy: Any, replicas: int) -> dict[str, Any]:
    """Twenty steps of two batches with Fabric, and the last eleven once more from a checkpoint."""

    def begun(strategy: Any) -> Any:
        fabric = Fabric(accelerator="cpu", devices=2 * replicas if folder else 1, strategy=strategy)
        fabric.launch()
        net = Language()
        model, optimizer = fabric.setup(net, new_optimizer(net))
        loader = fabric.setup_dataloaders(data(replicas), use_distributed_sampler=bool(folder))
        return fabric, model, optimizer, loader

    def train(fabric: Any, model: Any, optimizer: Any, loader: Any, first: int, last: int) -> None:
        for _step in range(first, last):
            for _, (index, tokens) in zip(range(ACCUMULATE), loader, strict=False):
                found["samples"].append(index.tolist())
                loss = loss_of(model, tokens)
                fabric.backward(loss / ACCUMULATE)
                found["losses"].append(float(fabric.all_reduce(loss.detach())))
            if not folder:
                fabric.clip_gradients(model, optimizer, max_norm=CLIPPING)
            optimizer.step()
            optimizer.zero_grad()

    found: dict[str, Any] = {"losses": [], "samples": []}
    fabric, model, optimizer, loader = begun(strategy())
    train(fabric, model, optimizer, loader, 0, 9)
    if folder:
        fabric.save(f"{folder}/fabric", {"model": model, "optimizer": optimizer, "steps": 9})
        fabric, model, optimizer, loader = begun(strategy())
        state = {"model": model, "optimizer": optimizer, "steps": 0}
        fabric.load(f"{folder}/fabric", state)
        assert state["steps"] == 9
    else:  # Fabric's loaders count epochs by themselves, and begin anew
        loader = fabric.setup_dataloaders(data(1), use_distributed_sampler=False)
    train(fabric, model, optimizer, loader, 9, STEPS)
    return found


def divided_in_fabric() -> Any:
    from lightning_accel.strategies.fabric import AccelDeepSpeedStrategy

    told = {"gradient_clipping": CLIPPING, "gradient_accumulation_steps": ACCUMULATE}
    return AccelDeepSpeedStrategy(config={"zero_optimization": {"stage": 1}, "tensor_parallel": DIVIDED, **told})


class OwnSampler(Speaker):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Text(), batch_size=4, sampler=DistributedSampler(Text(), shuffle=False))


def refused(strategy: Any, folder: str | None = None, **arguments: Any) -> str:
    used = trainer(strategy, devices=dist.get_world_size(), **arguments)
    try:
        used.fit(OwnSampler(), ckpt_path=folder)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "accepted"


def with_tensors_divided(folder: str) -> dict[str, Any]:
    import_quietly()
    ranks = dist.get_world_size()
    replicas = ranks // 2
    found: dict[str, Any] = {}
    for stage in STAGES if ranks == 2 else (1,):
        found[f"stage {stage}"] = stopped_and_continued(stage, folder, replicas)
    found["dropped"] = dropped(replicas)
    found["fabric"] = fabric_loop(folder, divided_in_fabric, replicas)
    found["refused"] = {
        "own sampler": refused(divided(1), use_distributed_sampler=False),
        "batches": refused(divided(1, train_batch_size=2 * 4 * ranks)),
    }
    if ranks == 2:
        undivided = {**DIVIDED, "autotp_size": 1}
        found["refused"]["other layout"] = refused(
            divided(1, tensor_parallel=undivided), folder=f"{folder}/1/step=9.ckpt"
        )
    return found

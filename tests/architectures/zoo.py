"""Models as people train them, small and with random weights, and how the tests of this folder train each.

Everything is float64: what differs from a single process by more than rounding is a bug. A case's loss is computed
from the model's outputs, because transformers' own losses round logits to float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_accel.core import Engine
from lightning_accel.core.partition import find_blocks

STEPS, ACCUMULATE = 20, 2
MAX_NORM = 0.1  # below every gradient norm that occurs: each step clips
VOCABULARY, LENGTH = 61, 10
# float64 carries 53 bits: 1.1e-16 an operation. 20 steps whose sums are taken in another order than in a single process
# leave 1e-15 to 1e-13 of it, more in models that amplify what they are given (BatchNorm of four samples); a lost
# gradient or a wrong factor leaves 1e-3 and more.
TOLERANCE = 1e-12
ROWS = ["ddp", "zero2", "fsdp", "fsdp_partial"]


def grid(names: Sequence[str], everyday: Sequence[str] = ()) -> list[Any]:
    """Models × rows: two rows of the ``everyday`` models, one of the others; the rest is marked ``matrix``."""
    return [
        (name, row)
        if row == "fsdp" or (name in everyday and row == "zero2")
        else pytest.param(name, row, marks=pytest.mark.matrix)
        for name in names
        for row in ROWS
    ]


@dataclass(frozen=True)
class Case:
    """A model, its data, and its loss.

    Args:
        make: Builds the model; its weights are random.
        batch: The micro-batch of a number that a rank sees.
        loss: The mean over a micro-batch.
        joined: Whether the single process takes the micro-batches of all ranks as one. If not it runs them one by one
            and averages the losses: where what a model does with one sample depends on the batch it comes in.
        units: What the engine shards as one, and FSDP2, too.
        fsdp2: What FSDP2 shards as one instead, where ranks use the model unevenly: each of its groups must be called
            on every rank or on none, or ranks wait for different collectives for ever. The rest is in the root's group.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    joined: bool = True
    units: Sequence[type[nn.Module]] | None = None
    fsdp2: Sequence[type[nn.Module]] | None = None


def generator(number: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * number + rank)


# ------------------------------------------------------------------ transformers


def gpt2() -> GPT2LMHeadModel:
    """The output layer is tied to the token embedding."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=24, n_embd=12, n_layer=3, n_head=2, **ends, **off)
    )


def llama() -> LlamaForCausalLM:
    """Two query heads share one head of keys and values."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            intermediate_size=19,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=24,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            intermediate_size=19,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=24,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def tokens(number: int, rank: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (2, LENGTH), generator=generator(number, rank))


def next_token(module: nn.Module, batch: Tensor) -> Tensor:
    logits = module(input_ids=batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def padded(number: int, rank: int) -> dict[str, Tensor]:
    """Texts of different lengths, and three tokens of each that are to be found."""
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (2, 1), generator=generator(number, rank))
    return {"ids": tokens(number, rank), "mask": (torch.arange(LENGTH) < lengths).long()}


def masked_tokens(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    hidden = batch["ids"].clone()
    hidden[:, 1:4] = 0
    logits = module(input_ids=hidden, attention_mask=batch["mask"]).logits
    return F.cross_entropy(logits[:, 1:4].flatten(0, 1), batch["ids"][:, 1:4].flatten())


# ------------------------------------------------------------------------- torch


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        same = stride == 1 and channels == out
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU())
        self.blocks = nn.Sequential(Residual(5, 5, 1), Residual(5, 7, 2), Residual(7, 9, 2))
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def images(number: int, rank: int) -> tuple[Tensor, Tensor]:
    random = generator(number, rank)
    x = torch.randn(4, 3, 8, 8, generator=random, dtype=torch.float64)
    return x, torch.randint(4, (4,), generator=random)


def classify(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


class Recurrent(nn.Module):
    """Recurrent layers keep a list of their parameters, beside ``_parameters``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 7)
        self.lstm = nn.LSTM(7, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 9, batch_first=True)
        self.head = nn.Linear(9, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(self.embedding(ids))[0])[0])


def tag(module: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(module(batch).flatten(0, 1), batch.flip(1).flatten())


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class TwoTowers(nn.Module):
    """One tower for each kind of input; a batch may have inputs of one kind only."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(Layer(7), Layer(7), Layer(7))
        self.right = nn.Sequential(Layer(7), Layer(7))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        found = [tower(x) for tower, x in ((self.left, left), (self.right, right)) if x is not None]
        return found[0] * found[1] * self.scale if len(found) == 2 else found[0]


USES = [("left right", "left right"), ("left", "left right"), ("right", "left"), ("left", "left"), ("right", "right")]
"""What the two ranks use, one micro-batch after another: of five. With two micro-batches a step every step differs."""


def pairs(number: int, rank: int) -> dict[str, Tensor | None]:
    random = generator(number, rank)
    x, y, target = (torch.randn(3, 7, generator=random, dtype=torch.float64) for _ in range(3))
    uses = USES[number // ACCUMULATE % len(USES)][rank % 2] if number % 4 < 3 else "left"
    return {"left": x if "left" in uses else None, "right": y if "right" in uses else None, "target": target}


def towers(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(module(batch["left"], batch["right"]), batch["target"])


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Mixture(nn.Module):
    """Sends each token to one of eight experts; those that get none are not called."""

    def __init__(self, width: int, experts: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            where = (chosen == number).nonzero().squeeze(-1)
            if len(where):
                out = out.index_add(0, where, expert(x[where]) * weights[where].unsqueeze(-1))
        return x + out


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Mixture(5), Mixture(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def clusters(number: int, rank: int) -> tuple[Tensor, Tensor]:
    """Samples near one point, which differs between ranks and micro-batches: most experts get none of them."""
    random = generator(number, rank)
    centre = torch.randn(1, 5, generator=generator(rank + number % 5, 17), dtype=torch.float64)
    x = 2 * centre + 0.3 * torch.randn(6, 5, generator=random, dtype=torch.float64)
    return x, torch.randn(6, 3, generator=random, dtype=torch.float64)


def regress(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[1])


CASES = {
    "gpt2": Case(gpt2, tokens, next_token),
    "llama": Case(llama, tokens, next_token),
    "bert": Case(bert, padded, masked_tokens),
    "resnet": Case(ResNet, images, classify, joined=False),
    "recurrent": Case(Recurrent, tokens, tag, units=(nn.LSTM, nn.GRU)),
    "two_towers": Case(TwoTowers, pairs, towers, joined=False, fsdp2=()),
    "experts": Case(MixtureOfExperts, clusters, regress, joined=False, units=(Expert,), fsdp2=(Mixture,)),
}


# ---------------------------------------------------------------------- training


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model in double precision. What starts as zeros gets values too: an error relative to zero says nothing."""
    torch.manual_seed(seed)
    module = make().double().train()
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return module


def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW with an epsilon far above rounding.

    The gradient of a key bias is zero but for rounding: under the usual 1e-8 AdamW would divide noise by noise.
    """
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-4)


@dataclass
class Trained:
    """What a run ends with: by name, and the gradient norms before clipping."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    norms: list[float] = field(default_factory=list)


def snapshot(module: nn.Module, norms: list[float]) -> Trained:
    return Trained(
        {name: parameter.detach().clone() for name, parameter in module.named_parameters()},
        {name: buffer.clone() for name, buffer in module.named_buffers()},
        norms,
    )


def shares(case: Case, number: int, ranks: int) -> list[Any]:
    """What the single process runs for a micro-batch of all ranks: one batch, or one of each rank."""
    found = [case.batch(number, rank) for rank in range(ranks)]
    return [tree_map(lambda *parts: torch.cat(parts), *found)] if case.joined else found


def run_alone(module: nn.Module, case: Case, ranks: int) -> list[float]:
    """Train on the global batches in plain torch. Buffers are those that the first rank's samples leave, as in DDP."""
    optimizer, norms = make_optimizer([p for p in module.parameters() if p.requires_grad]), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(step * ACCUMULATE, (step + 1) * ACCUMULATE):
            parts = shares(case, number, ranks)
            kept = None
            for part in parts:
                (case.loss(module, part) / len(parts) / ACCUMULATE).backward()
                kept = kept or {name: buffer.clone() for name, buffer in module.named_buffers()}
            for name, buffer in module.named_buffers():
                buffer.copy_(kept[name])
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)))
        optimizer.step()
    return norms


@functools.cache
def alone(name: str, ranks: int) -> Trained:
    """The single process."""
    module = build(CASES[name].make)
    start = snapshot(module, []).parameters
    trained = snapshot(module, run_alone(module, CASES[name], ranks))
    change = {key: float((trained.parameters[key] - value).norm() / value.norm()) for key, value in start.items()}
    still = {key: size for key, size in change.items() if size < 1e-3}
    # Experts that no sample was sent to keep their values to the last bit: not even weight decay touches them.
    assert not any(still.values()), f"{still}: what hardly changed is void in a comparison"
    assert all(".experts." in key for key in still), f"{still}: never trained"
    assert min(trained.norms) > MAX_NORM, f"not all steps clip: {trained.norms}"
    return trained


def run_engine(engine: Engine, optimizer: torch.optim.Optimizer, case: Case) -> list[float]:
    """Train one rank's share."""
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(ACCUMULATE):
            batch = case.batch(step * ACCUMULATE + micro, dist.get_rank())
            with engine.forward_context():
                loss = case.loss(engine.module, batch) / ACCUMULATE
            with engine.no_sync() if micro < ACCUMULATE - 1 else contextlib.nullcontext():
                engine.backward(loss)
        norms.append(float(engine.clip_grad_norm_(optimizer, MAX_NORM)))
        optimizer.step()
    return norms


def set_up(module: nn.Module, row: str, **options: Any) -> tuple[Engine, torch.optim.Optimizer]:
    """An engine and its optimizer; only rank 0 has the right weights."""
    if dist.get_rank() > 0:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
    engine = Engine(module, row, **options)
    optimizer = make_optimizer([p for p in module.parameters() if p.requires_grad])
    engine.add_optimizer(optimizer)
    return engine, optimizer


def with_engine(name: str, row: str, **options: Any) -> Trained:
    case = CASES[name]
    engine, optimizer = set_up(build(case.make), row, units=case.units, **options)
    norms = run_engine(engine, optimizer, case)
    with engine.full_parameters():
        trained = snapshot(engine.module, norms)
    engine.close()
    return trained


def with_fsdp2(name: str, shard_size: int | None = None) -> Trained:
    """The same with torch's own FSDP2: the same units if all ranks call them, the rest in the root.

    Args:
        name: The case.
        shard_size: How many neighbouring ranks divide a copy; all by default.
    """
    case = CASES[name]
    module = build(case.make)
    shapes = {key: parameter.shape for key, parameter in module.named_parameters()}
    for parameter in module.parameters():
        if not parameter.dim():
            parameter.data = parameter.data.view(1)  # it refuses scalars; broadcasting makes no difference
    ranks = dist.get_world_size()
    shard_size = shard_size or ranks
    mesh = init_device_mesh("cpu", (ranks // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))
    if shard_size == ranks:
        mesh = mesh["shard"]
    if case.fsdp2 is None:
        blocks = list(find_blocks(module, case.units).values())
    else:
        blocks = [part for part in module.modules() if isinstance(part, tuple(case.fsdp2))]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if case.fsdp2 is not None:
        module.set_reduce_scatter_unused_params(True)  # else ranks would send gradients of different parameters
    optimizer, norms = make_optimizer(module.parameters()), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(step * ACCUMULATE, (step + 1) * ACCUMULATE):
            (case.loss(module, case.batch(number, dist.get_rank())) / ACCUMULATE).backward()
        if case.fsdp2 is not None:
            drop_zero_gradients(module)
        norm = nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
    full = {
        key: p.full_tensor().detach().view(shapes[key])
        for key, p in module.named_parameters()
        if isinstance(p, DTensor)
    }
    return Trained(full, {key: buffer.clone() for key, buffer in module.named_buffers()}, norms)


def drop_zero_gradients(module: nn.Module) -> None:
    """Take the gradients away that are zero on all ranks: those of parameters that no rank has used.

    Asked for zeros where a rank has no gradient, FSDP2 makes them where no rank has one, too. One device has None
    there, and AdamW leaves alone what has None: zeros would have it decay the value and the moments.
    """
    parameters = list(module.parameters())
    used = torch.stack([parameter.grad.to_local().any() for parameter in parameters]).int()
    dist.all_reduce(used, dist.ReduceOp.MAX)
    for parameter, flag in zip(parameters, used.tolist(), strict=True):
        if not flag:
            parameter.grad = None


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the norm of the second, and where."""
    assert ours.keys() == theirs.keys()
    return max((float((ours[k] - theirs[k]).norm() / theirs[k].norm().clamp_min(1e-30)), k) for k in theirs)


def require_equal(ours: Trained, theirs: Trained, *, buffers: bool = True) -> None:
    """Fail unless parameters, gradient norms and buffers agree to rounding."""
    error, where = worst(ours.parameters, theirs.parameters)
    assert error < TOLERANCE, f"{where} differs by {error}"
    for step, (norm, expected) in enumerate(zip(ours.norms, theirs.norms, strict=True)):
        assert abs(norm - expected) < TOLERANCE * expected, f"norm of step {step}: {norm}, expected {expected}"
    floating = {key: value for key, value in theirs.buffers.items() if value.is_floating_point()}
    if buffers and floating:
        error, where = worst({key: ours.buffers[key] for key in floating}, floating)
        assert error < TOLERANCE, f"buffer {where} differs by {error}"

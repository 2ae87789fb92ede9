"""The model, its tokens and its optimizer: the same for every peer, all drawn from `Config.seed`."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from benchmarks.config import Config

# The tokens of this many steps are made once and reused in a circle, so that making them costs a timed step nothing.
STEPS_IN_BANK = 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of a GPT and of one micro-batch of one rank."""

    vocabulary: int
    dim: int
    layers: int
    heads: int
    sequence: int
    micro_batch: int


MODELS = {
    # 4,096 tokens make the two untied tables 4.2M parameters, which brings six blocks of 3.15M to 23.2M.
    "gpt-23m": Shape(vocabulary=4096, dim=512, layers=6, heads=8, sequence=128, micro_batch=4),
    "gpt-80m": Shape(vocabulary=4096, dim=768, layers=10, heads=12, sequence=128, micro_batch=4),
    "gpt-tiny": Shape(vocabulary=256, dim=64, layers=2, heads=4, sequence=32, micro_batch=2),
}


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(shape.dim)
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim)
        self.project = nn.Linear(shape.dim, shape.dim)
        self.norm_mlp = nn.LayerNorm(shape.dim)
        self.up = nn.Linear(shape.dim, 4 * shape.dim)
        self.down = nn.Linear(4 * shape.dim, shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Activations (batch, sequence, dim) to the same shape."""
        batch, sequence, dim = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, sequence, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, sequence, dim))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    """A plain GPT whose ``forward`` returns the loss, so that every peer wraps and calls exactly one module."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.dim)
        self.position = nn.Embedding(shape.sequence, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, shape.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean next-token loss of `tokens` (batch, sequence + 1), a scalar in nats."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.token(inputs) + self.position.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build_model(config: Config) -> GPT:
    """The model with the initial weights that every rank of every peer starts from."""
    torch.manual_seed(config.seed)
    return GPT(MODELS[config.model])


def build_optimizer(parameters: Iterable[nn.Parameter], config: Config) -> torch.optim.AdamW:
    """The optimizer that every peer runs, torch's fused AdamW."""
    return torch.optim.AdamW(parameters, lr=config.learning_rate, eps=config.epsilon, fused=True)


class Tokens:
    """The tokens of the whole job, of which a rank takes its own micro-batches.

    As in text, few of the tokens are frequent (here a sixteenth of them, and no others occur), and the next one
    depends on the last. The first is learnt within a few steps, so the losses move, and move elsewhere where a peer
    trains wrongly.
    """

    def __init__(self, config: Config) -> None:
        shape = MODELS[config.model]
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        size = (STEPS_IN_BANK, config.accumulate, config.ranks, shape.micro_batch)
        used = shape.vocabulary // 16
        column = torch.randint(used, size, generator=generator)
        columns = [column]
        for _ in range(shape.sequence):
            column = (5 * column + 17 + torch.randint(4, size, generator=generator)) % used
            columns.append(column)
        self.bank = torch.stack(columns, dim=-1)
        """int64, (steps, micro-batches, ranks, rows of a micro-batch, sequence + 1)."""

    def of_rank(self, step: int) -> list[Tensor]:
        """This rank's micro-batches (rows, sequence + 1) of optimizer step `step`."""
        return list(self.bank[step % STEPS_IN_BANK, :, self.config.rank])

    def of_all_ranks(self, step: int) -> list[Tensor]:
        """The micro-batches (ranks * rows, sequence + 1) that all ranks together see in optimizer step `step`."""
        return list(self.bank[step % STEPS_IN_BANK].flatten(1, 2))

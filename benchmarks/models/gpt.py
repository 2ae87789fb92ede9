"""A plain GPT and its tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from benchmarks.models.recompute import Recomputable


@dataclass(frozen=True, kw_only=True)
class GPTTask:
    """The size of a GPT and of one micro-batch of one rank.

    As in text, few of the tokens are frequent (here a sixteenth of them, and no others occur), and the next one
    depends on the last. The first is learnt within a few steps, so the losses move, and move elsewhere where a peer
    trains wrongly.
    """

    vocabulary: int
    dim: int
    layers: int
    heads: int
    sequence: int
    micro_batch: int
    unit: str = "tokens"

    @property
    def units_per_row(self) -> int:
        """The tokens that are predicted."""
        return self.sequence

    def build(self, *, recompute: bool) -> "GPT":
        """A GPT of this size."""
        return GPT(self, recompute=recompute)

    def draw(self, size: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor]:
        """Tokens (…, sequence + 1), int64."""
        used = self.vocabulary // 16
        column = torch.randint(used, size, generator=generator)
        columns = [column]
        for _ in range(self.sequence):
            column = (5 * column + 17 + torch.randint(4, size, generator=generator)) % used
            columns.append(column)
        return (torch.stack(columns, dim=-1),)


class Block(Recomputable):
    """One pre-norm transformer block."""

    def __init__(self, task: GPTTask, *, recompute: bool) -> None:
        super().__init__(recompute)
        self.heads = task.heads
        self.norm_attention = nn.LayerNorm(task.dim)
        self.qkv = nn.Linear(task.dim, 3 * task.dim)
        self.project = nn.Linear(task.dim, task.dim)
        self.norm_mlp = nn.LayerNorm(task.dim)
        self.up = nn.Linear(task.dim, 4 * task.dim)
        self.down = nn.Linear(4 * task.dim, task.dim)

    def compute(self, x: Tensor) -> Tensor:
        """Activations (batch, sequence, dim) to the same shape."""
        batch, sequence, dim = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, sequence, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, sequence, dim))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    """A plain GPT whose ``forward`` returns the loss, so that every peer wraps and calls exactly one module."""

    def __init__(self, task: GPTTask, *, recompute: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(task.vocabulary, task.dim)
        self.position = nn.Embedding(task.sequence, task.dim)
        self.blocks = nn.ModuleList(Block(task, recompute=recompute) for _ in range(task.layers))
        self.norm = nn.LayerNorm(task.dim)
        self.head = nn.Linear(task.dim, task.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean next-token loss of `tokens` (batch, sequence + 1), an fp32 scalar in nats."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.token(inputs) + self.position.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()  # where they were computed in bf16, the loss is not
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

"""A small GPT, as a plain ``nn.Module`` and as a LightningModule.

Nothing here knows how many processes train it or what they shard: that is the strategy's business.
"""

import math
from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F


def rotary_angles(time: int, head_dim: int, device: torch.device) -> Tensor:
    """Angles of rotary position embedding (RoPE), float32 ``[time, head_dim / 2]``, in radians."""
    positions = torch.arange(time, device=device, dtype=torch.float32)
    pairs = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
    return torch.outer(positions, 10000.0 ** (-2 * pairs / head_dim))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs ``(x[..., i], x[..., i + head_dim / 2])`` of ``[..., time, head_dim]`` by their angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and inside a residual connection (pre-norm).

    Args:
        dim: Width of the residual stream.
        heads: Number of attention heads; ``dim / heads`` is an even number.
        dropout: Probability of dropping an element of either branch's output.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, 4 * dim, bias=False)
        self.mlp_out = nn.Linear(4 * dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal self-attention, ``[batch, time, dim]`` to ``[batch, time, dim]``."""
        batch, time, dim = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, is_causal=True)
        return self.attention_out(y.transpose(1, 2).reshape(batch, time, dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One block, ``[batch, time, dim]`` to ``[batch, time, dim]``."""
        x = x + self.dropout(self.attend(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")))


class GPT(nn.Module):
    """Decoder-only transformer with rotary positions.

    Args:
        vocab_size: Number of different tokens.
        dim: Width of the residual stream.
        layers: Number of blocks.
        heads: Attention heads per block; ``dim / heads`` is an even number.
        dropout: Dropout probability in the blocks and after the embedding.
        tie: Let the output layer be the token embedding (one parameter, used twice).
    """

    def __init__(
        self, vocab_size: int, dim: int, layers: int, heads: int, dropout: float = 0.0, tie: bool = False
    ) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.embedding = nn.Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(dim, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        if tie:
            self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What writes to the residual stream starts smaller, so that its variance does not grow with depth.
                writes = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score the next token at every place.

        Args:
            tokens: Token numbers, int64 ``[batch, time]``.

        Returns:
            Logits ``[batch, time, vocab_size]``.
        """
        # Computed, not kept: there is no buffer to broadcast, cast or save, and it costs a millionth of a block.
        angles = rotary_angles(tokens.shape[1], self.head_dim, tokens.device)
        cos, sin = angles.cos(), angles.sin()
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def next_token_loss(model: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """Mean cross-entropy of predicting each token from those before it.

    Args:
        model: Maps tokens ``[batch, time]`` to logits ``[batch, time, vocab_size]``.
        windows: Token numbers, int64 ``[batch, block_size + 1]``.

    Returns:
        A scalar, in nats per token.
    """
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms and biases (fewer than two dimensions) alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def warmup_cosine(
    optimizer: torch.optim.Optimizer, warmup: int, steps: int, floor: float = 0.05
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate that rises linearly for ``warmup`` steps, then falls along a cosine to ``floor`` of its peak."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: Tensor,
    new_tokens: int,
    block_size: int,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> Tensor:
    """Continue a text, one sampled token at a time.

    Args:
        model: Maps tokens ``[1, time]`` to logits ``[1, time, vocab_size]``.
        prompt: Token numbers, int64 ``[1, time]`` with ``time >= 1``.
        new_tokens: How many to add.
        block_size: How many of the last tokens the model looks at.
        temperature: Divides the logits; small values make likely tokens likelier still.
        top_k: Sample among this many of the likeliest tokens.
        seed: The same on every rank gives the same text, and so the same number of forward passes, on every rank.

    Returns:
        Prompt and continuation, int64 ``[1, time + new_tokens]``.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt
    for _ in range(new_tokens):
        logits = model(tokens[:, -block_size:])[:, -1].float().cpu() / temperature
        values, indices = logits.topk(min(top_k, logits.shape[-1]))
        chosen = torch.multinomial(values.softmax(dim=-1), 1, generator=generator)
        tokens = torch.cat((tokens, indices.gather(1, chosen).to(tokens.device)), dim=1)
    return tokens


class LitGPT(L.LightningModule):
    """The GPT with its loss, its optimizer and its learning-rate schedule.

    Args:
        vocab_size: See :class:`GPT`, as ``dim``, ``layers``, ``heads``, ``dropout`` and ``tie``.
        dim: Width.
        layers: Depth.
        heads: Attention heads.
        dropout: Dropout probability.
        tie: Tie input and output embedding.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay of the matrices.
        warmup: Steps until the peak learning rate.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
        tie: bool = False,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        warmup: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = GPT(vocab_size, dim, layers, heads, dropout, tie)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, time, vocab_size]`` of tokens ``[batch, time]``."""
        return self.model(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of windows ``[batch, block_size + 1]``."""
        loss = next_token_loss(self, batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss of windows ``[batch, block_size + 1]``, averaged over all batches of all ranks."""
        loss = next_token_loss(self, batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and a schedule that ends where the Trainer does."""
        optimizer = adamw(self, self.hparams["lr"], self.hparams["weight_decay"])
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = warmup_cosine(optimizer, self.hparams["warmup"], steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

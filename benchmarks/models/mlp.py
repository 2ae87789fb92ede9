"""A perceptron whose sizes divide by nothing, and numbers with labels."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from benchmarks.models.recompute import Recomputable


@dataclass(frozen=True, kw_only=True)
class MLPTask:
    """The size of a perceptron and of one micro-batch of one rank; a label is which centre is near."""

    inputs: int
    hidden: int
    layers: int
    outputs: int
    micro_batch: int
    unit: str = "samples"
    units_per_row: int = 1

    def build(self, *, recompute: bool) -> "MLP":
        """A perceptron of this size."""
        return MLP(self, recompute=recompute)

    def draw(self, size: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Numbers (…, inputs) and labels (…)."""
        labels = torch.randint(self.outputs, size, generator=generator)
        centres = torch.randn(self.outputs, self.inputs, generator=generator)
        return torch.randn(*size, self.inputs, generator=generator) + centres[labels], labels


class Layer(Recomputable):
    """One hidden layer, added to its input."""

    def __init__(self, task: MLPTask, *, recompute: bool) -> None:
        super().__init__(recompute)
        self.linear = nn.Linear(task.hidden, task.hidden)

    def compute(self, x: Tensor) -> Tensor:
        """Activations (batch, hidden) to the same shape."""
        return x + F.gelu(self.linear(x))


class MLP(nn.Module):
    """Layers between a linear map in and a linear map out; ``forward`` returns the loss."""

    def __init__(self, task: MLPTask, *, recompute: bool) -> None:
        super().__init__()
        self.into = nn.Linear(task.inputs, task.hidden)
        self.blocks = nn.ModuleList(Layer(task, recompute=recompute) for _ in range(task.layers))
        self.out = nn.Linear(task.hidden, task.outputs)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of `x` (batch, inputs) with `labels` (batch), an fp32 scalar in nats."""
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.out(x).float(), labels)

"""A residual convolutional network, and images with labels."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from benchmarks.models.recompute import Recomputable

_GROUPS = 8


@dataclass(frozen=True, kw_only=True)
class ResNetTask:
    """The size of a network and of one micro-batch of one rank; a label is a colour that an image has more of."""

    widths: tuple[int, ...]
    blocks_per_width: int
    side: int
    classes: int
    micro_batch: int
    unit: str = "samples"
    units_per_row: int = 1

    def build(self, *, recompute: bool) -> "ResNet":
        """A network of this size."""
        return ResNet(self, recompute=recompute)

    def draw(self, size: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (…, 3, side, side) and labels (…)."""
        labels = torch.randint(self.classes, size, generator=generator)
        tint = torch.randn(self.classes, 3, 1, 1, generator=generator)
        return torch.randn(*size, 3, self.side, self.side, generator=generator) + tint[labels], labels


class Block(Recomputable):
    """Two convolutions beside a shortcut.

    Groups are normalised, not batches: what batch norm computes depends on how the batch is cut over ranks, and no
    peer could have the losses of a single process.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, recompute: bool) -> None:
        super().__init__(recompute)
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm_first = nn.GroupNorm(_GROUPS, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm_second = nn.GroupNorm(_GROUPS, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def compute(self, x: Tensor) -> Tensor:
        """Images (batch, inputs, side, side) to (batch, outputs, side / stride, side / stride)."""
        y = F.relu(self.norm_first(self.first(x)))
        return F.relu(self.norm_second(self.second(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, blocks that halve the side whenever the width changes, and a classifier; ``forward`` returns the loss."""

    def __init__(self, task: ResNetTask, *, recompute: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, task.widths[0], 3, padding=1)
        blocks = []
        inputs = task.widths[0]
        for width in task.widths:
            for _ in range(task.blocks_per_width):
                blocks.append(Block(inputs, width, stride=1 if inputs == width else 2, recompute=recompute))
                inputs = width
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(inputs, task.classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of `images` (batch, 3, side, side) with `labels` (batch), an fp32 scalar in nats."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.out(x.mean((2, 3))).float(), labels)

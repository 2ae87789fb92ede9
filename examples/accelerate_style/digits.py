"""Handwritten digits and a small network for them, shared by the scripts of this folder."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, TensorDataset, random_split


def split_digits() -> tuple[Dataset, Dataset]:
    """1438 and 359 pairs of an image ``[1, 8, 8]``, float32 in 0..1, and its label, int64 in 0..9."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, val = random_split(TensorDataset(images, torch.tensor(labels)), [0.8, 0.2], torch.Generator().manual_seed(0))
    return train, val


def make_net() -> nn.Sequential:
    """Three convolutions and a linear layer: logits ``[batch, 10]`` of images ``[batch, 1, 8, 8]``."""
    layers: list[nn.Module] = []
    channels = 1
    for out, stride in ((32, 1), (64, 2), (64, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1), nn.GroupNorm(8, out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4, 10))

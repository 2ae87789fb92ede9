"""A GAN that draws handwritten digits: two optimizers under manual optimization, sharded over the ranks.

The digits come with scikit-learn: 1797 grey images of 8 x 8 pixels. How well it draws is the Fréchet distance between
drawn and real images, over their main components: 0 if both have the same mean and covariance.

    python examples/gan.py                                   # two CPU ranks, about a minute
    python examples/gan.py --strategy accel_zero1 --max-epochs 200
"""

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from common import add_machine_arguments, describe_memory, not_negative, positive, share_cores
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import StrategyRegistry
from matplotlib.figure import Figure
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel  # noqa: F401  registers the strategies

PIXELS = 64
COMPONENTS = 20  # of the images that are compared: nine tenths of their variance
DRAWN = 900  # images to compare; there are as many real ones in each half


class Layer(nn.Sequential):
    """A linear layer, normalised or thinned out."""

    def __init__(self, width: int, out: int, dropout: float | None) -> None:
        after = nn.BatchNorm1d(out) if dropout is None else nn.Dropout(dropout)
        super().__init__(nn.Linear(width, out), nn.LeakyReLU(0.2), after)


class GAN(L.LightningModule):
    """A generator that draws, and a discriminator that tells drawn images from real ones.

    Args:
        width: Of the hidden layers.
        noise: Numbers that an image is drawn from.
        lr: Learning rate of both Adams.
    """

    def __init__(self, width: int, noise: int, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.noise = noise
        self.lr = lr
        self.generator = nn.Sequential(
            nn.Sequential(*(Layer(noise if first else width, width, None) for first in (True, False, False))),
            nn.Linear(width, PIXELS),
            nn.Sigmoid(),
        )
        self.discriminator = nn.Sequential(
            nn.Sequential(*(Layer(PIXELS if first else width, width, 0.3) for first in (True, False))),
            nn.Linear(width, 1),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Images ``[images, 64]`` in 0..1 from noise ``[images, noise]``."""
        return self.generator(noise)

    def on_train_start(self) -> None:
        torch.manual_seed(torch.initial_seed() + self.global_rank)  # each rank draws images of its own

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        (real,) = batch
        draw, judge = self.optimizers()
        noise = torch.randn(len(real), self.noise, device=self.device)

        # Only the toggled optimizer's parameters require gradients, on every rank alike.
        self.toggle_optimizer(judge)
        with torch.no_grad():
            drawn = self(noise)
        # One batch and one forward for both: half of it is real.
        scores = self.discriminator(torch.cat([real, drawn])).squeeze(-1)
        truth = torch.cat([torch.full((len(real),), 0.9), torch.zeros(len(real))]).to(scores)  # 0.9: never quite sure
        judged = F.binary_cross_entropy_with_logits(scores, truth)
        self.update(judge, judged)
        self.untoggle_optimizer(judge)

        self.toggle_optimizer(draw)
        fooled = F.softplus(-self.discriminator(self(noise))).mean()
        self.update(draw, fooled)
        self.untoggle_optimizer(draw)
        self.log_dict({"judge": judged.detach(), "draw": fooled.detach()}, prog_bar=True)

    def update(self, optimizer: Any, loss: Tensor) -> None:
        """One optimizer step."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(part.parameters(), lr=self.lr, betas=(0.5, 0.99))
            for part in (self.generator, self.discriminator)
        ]


class Critic:
    """Compares drawn images with real ones that the GAN was not shown.

    Args:
        shown: Images the GAN trains with, float32 ``[images, 64]``, and their digits.
        held_out: Other images.
    """

    def __init__(self, shown: np.ndarray, digits: np.ndarray, held_out: np.ndarray) -> None:
        self.components = PCA(COMPONENTS, random_state=0).fit(held_out)
        self.real = self.components.transform(held_out)
        self.reader = LogisticRegression(max_iter=1000).fit(shown, digits)
        self.floor = self.distance(shown)
        """The distance of other real images: nobody draws better."""

    def distance(self, images: np.ndarray) -> float:
        """Fréchet distance to the held-out images."""
        ours = self.components.transform(images)
        means = ours.mean(0) - self.real.mean(0)
        covariances = np.cov(ours, rowvar=False), np.cov(self.real, rowvar=False)
        mixed = np.real(sqrtm(covariances[0] @ covariances[1]))
        return float(means @ means + np.trace(covariances[0] + covariances[1] - 2 * mixed))

    def describe(self, images: np.ndarray) -> str:
        """How good and how varied the images are."""
        counts = np.bincount(self.reader.predict(images), minlength=10)
        return f"distance {self.distance(images):.2f}, {int((counts >= len(images) / 50).sum())} of 10 digits"


class Recorder(L.Callback):
    """Draws before and after, and compares.

    Args:
        out: Folder for ``samples.png``.
        ranks_here: Ranks on this machine, which share its cores.
        critic: Knows real images.
        real: Some of them.
    """

    def __init__(self, out: Path, ranks_here: int, critic: Critic, real: np.ndarray) -> None:
        self.out = out
        self.ranks_here = ranks_here
        self.critic = critic
        self.drawn: dict[str, np.ndarray] = {"real": real}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        share_cores(self.ranks_here)

    def draw(self, module: L.LightningModule) -> np.ndarray:
        """Images from always the same noise. Every rank must call this: the generator may rest sharded."""
        noise = torch.randn(DRAWN, module.noise, generator=torch.Generator().manual_seed(1)).to(module.device)
        module.eval()
        with torch.no_grad():
            images = module(noise.to(module.dtype)).float().cpu().numpy()
        module.train()
        return images

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.drawn["before"] = self.draw(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.drawn["after"] = self.draw(pl_module)
        # The engine is closed when training is torn down, so this is the last moment to ask it.
        engine = getattr(trainer.strategy, "engine", None)
        memory = "" if engine is None else describe_memory(engine.report(), pl_module.all_gather)
        if trainer.is_global_zero:
            self.plot()
            print(f"\n{memory}")
            for when in ("before", "after"):
                print(f"{when}: {self.critic.describe(self.drawn[when])}")
            print(f"other real images have distance {self.critic.floor:.2f}")
            print(f"wrote samples.png to {self.out}")

    def plot(self) -> None:
        """Write ``samples.png``: 8 x 8 images of each kind."""
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        for axes, (title, images) in zip(figure.subplots(1, 3), self.drawn.items(), strict=True):
            framed = np.pad(images[:64].reshape(64, 8, 8), ((0, 0), (1, 1), (1, 1)))
            grid = framed.reshape(8, 8, 10, 10).transpose(0, 2, 1, 3).reshape(80, 80)
            axes.imshow(grid, cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(title)
            axes.set_axis_off()
        self.out.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.out / "samples.png", dpi=120)


def main() -> None:
    """Read the command line, train, compare."""
    parser = argparse.ArgumentParser(
        description="Draw handwritten digits with a GAN under any Lightning strategy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_machine_arguments(parser, StrategyRegistry.available_strategies(), "runs/gan")
    parser.set_defaults(strategy="accel_fsdp")
    group = parser.add_argument_group("training")
    group.add_argument("--max-epochs", type=positive, default=100, help="passes over the training images")
    group.add_argument("--batch-size", type=positive, default=32, help="real images per rank")
    group.add_argument("--width", type=positive, default=128, help="of the hidden layers")
    group.add_argument("--noise", type=positive, default=24, help="numbers that an image is drawn from")
    group.add_argument("--lr", type=not_negative, default=1e-3, help="learning rate")
    args = parser.parse_args()

    share_cores(args.devices)
    L.seed_everything(args.seed, verbose=False)
    pixels, digits = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32)
    shown, held_out = images[:DRAWN], images[DRAWN:]
    critic = Critic(shown, digits[:DRAWN], held_out)
    trainer = L.Trainer(
        strategy=args.strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        precision=args.precision,
        max_epochs=args.max_epochs,
        logger=False,
        enable_checkpointing=False,
        callbacks=[Recorder(args.out, args.devices, critic, shown), TQDMProgressBar(refresh_rate=10)],
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(torch.from_numpy(shown)), args.batch_size, shuffle=True, drop_last=True)
    trainer.fit(GAN(args.width, args.noise, args.lr), loader)


if __name__ == "__main__":
    main()

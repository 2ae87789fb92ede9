"""Training loaders that have different numbers of batches on different ranks: an error, unless they are joined.

Every backward is something all ranks do together. A rank that has run out would go on to something else, and the others
would wait for it in a backward, or take what it sends for something that it is not.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch.distributed as dist

from lightning_accel.core import Engine
from lightning_accel.data.joining import JoinedLoader

_REMEDY = (
    "Give every rank as many (Lightning's own sampler does), use limit_train_batches, or return"
    " lightning_accel.data.joined(loader) from train_dataloader: ranks that have run out then wait for the others."
)


def adopt(loader: object, engine: Engine | None) -> None:
    """Have a joined loader know what is trained with its batches. All ranks take part."""
    if isinstance(loader, JoinedLoader) and engine is not None:
        loader.joining.models = [engine]
        loader.measure()


def require_even(trainer: pl.Trainer) -> None:
    """Call as training starts. All ranks take part.

    Raises:
        ValueError: On every rank, if they would train with different numbers of batches, or a joined loader has no
            length.

    """
    combined = trainer.fit_loop._combined_loader
    loaders = [] if combined is None else combined.flattened
    for loader in loaders:
        if isinstance(loader, JoinedLoader) and not _has_length(loader):
            raise ValueError(
                "Expected what a Trainer goes through as a joined loader to have a length on every rank, but it has"
                " none. Define __len__ on its dataset: Lightning fetches batches ahead where it does not know when an"
                " epoch ends."
            )
    if not (dist.is_available() and dist.is_initialized()) or trainer.world_size == 1:
        return
    counts: list[float] = [0.0] * trainer.world_size
    dist.all_gather_object(counts, float(trainer.num_training_batches))
    enough = 0 <= trainer.max_steps * trainer.accumulate_grad_batches <= min(counts)
    if len(set(counts)) > 1 and not enough:
        raise ValueError(
            "Expected as many training batches on every rank, got"
            f" {[int(count) if count < float('inf') else 'unknown' for count in counts]} by rank. {_REMEDY}"
        )


def _has_length(loader: JoinedLoader) -> bool:
    try:
        len(loader)
    except TypeError:
        return False
    return True

"""Loaders for ranks that share their batches."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_accel.core import rng
from lightning_accel.core.data_position import generators_of, set_generators, takes_in_order
from lightning_accel.data.dealing import ShardedBatches, ShardedStream, require_divisible
from lightning_accel.data.loader import LoaderView, ShardedLoader, SkippedLoader, Watcher
from lightning_accel.data.passes import Feed, OwnFeed, SentFeed, is_iterable
from lightning_accel.data.shuffling import Alike, SeededSampler, draws_from_generator, is_steady
from lightning_accel.data.wire import Wire, host_group


def prepare_data_loader(
    loader: DataLoader[Any],
    *,
    rank: int,
    ranks: int,
    device: torch.device | str | None = None,
    split_batches: bool = False,
    even_batches: bool = True,
    dispatch_batches: bool | None = None,
    put_on_device: bool = True,
    non_blocking: bool = False,
    seed: int | None = None,
    group: dist.ProcessGroup | None = None,
    watcher: Watcher | None = None,
) -> ShardedLoader:
    """Have ranks share a loader's batches. All of them call this together, with loaders of the same data.

    See docs/data.md for the samples that each rank gets. The loader is not changed.

    Args:
        loader: Of all samples, without a sampler that divides them. Batch samplers of the user's own are used as they
            are; what they draw from torch's, Python's or numpy's random numbers is made the same on all ranks.
        rank: This rank.
        ranks: How many there are.
        device: Where batches are brought.
        split_batches: Split each batch over the ranks. Otherwise whole ones are dealt to them in turns.
        even_batches: Complete the last round of an epoch with samples from its start, so that all ranks have equally
            many batches of the same size. Otherwise ranks may have batches that others have not, see
            ``join_uneven_inputs``.
        dispatch_batches: Have rank 0 load, and send the others their batches. Default: for iterable datasets, if there
            is a process group.
        put_on_device: Whether batches are brought to ``device``.
        non_blocking: Do not wait for that; for loaders with ``pin_memory=True``.
        seed: What orders depend on, besides the epoch. Default: that of the sampler's generator, or one that rank 0
            draws.
        group: The process group of the ranks; the default one if not given.
        watcher: Who is told when iterations begin and end.

    Returns:
        The loader of this rank.

    Raises:
        TypeError: If ``loader`` is no ``DataLoader``.
        ValueError: If it is prepared already or divided already, batches that are to be split cannot be, or the ranks'
            datasets differ in length.

    """
    _require_whole(loader, ranks)
    if not 0 <= rank < ranks:
        raise ValueError(f"Expected a rank of {ranks} ranks, got {rank}.")
    connected = ranks > 1 and dist.is_available() and dist.is_initialized()
    if dispatch_batches is None:
        dispatch_batches = is_iterable(loader) and connected
    if dispatch_batches and ranks > 1 and not connected:
        raise ValueError("Expected a process group for dispatch_batches=True, got none. Initialise torch.distributed.")
    sent = dispatch_batches and ranks > 1
    size = _batch_size(loader)
    if split_batches:
        require_divisible(size, ranks)
    seed = _agree(loader, seed, ranks, group, sent) if connected else _own_seed(loader, seed)
    inner, shuffled = _seeded(loader, seed)
    dealing = {"split_batches": split_batches, "even_batches": even_batches}
    feed: Feed
    if is_iterable(loader):
        if sent:
            feed = SentFeed(inner, None, Wire(group), batch_size=size, **dealing)
        else:
            feed = _own_stream(inner, rank, ranks, seed, shuffled, **dealing)
    else:
        source, batched = _source(inner)
        steady = None
        if not (takes_in_order(source) and is_steady(source.sampler)) and not is_steady(source):
            steady = Alike(seed)
            shuffled.append(steady)
        dealt = ShardedBatches(
            source,
            rank=0 if sent else rank,
            ranks=1 if sent else ranks,
            split_batches=split_batches and not sent,
            even_batches=even_batches,
            takes_in_order=batched and takes_in_order(source),
            batched=batched,
            steady=steady,
        )
        _put(inner, dealt, batched=inner.batch_sampler is not None)
        feed = SentFeed(inner, dealt, Wire(group), batch_size=size, **dealing) if sent else OwnFeed(inner, dealt)
    per_round = 1 if split_batches else ranks
    return ShardedLoader(
        feed,
        rank=rank,
        ranks=ranks,
        seed=seed,
        dataset=loader.dataset,
        shuffled=shuffled,
        device=torch.device(device) if put_on_device and device is not None else None,
        non_blocking=non_blocking,
        total_batch_size=None if size is None else size * per_round,
        watcher=watcher,
    )


def skip_first_batches(loader: DataLoader[Any], num_batches: int = 0) -> SkippedLoader:
    """A loader whose next iteration leaves out the first batches, as when an interrupted epoch is gone on with.

    It goes on in the order of the loader's present epoch, and both count epochs together: no sample of this epoch comes
    twice, and the next iteration, of either, is the whole next epoch. Samples that have indices are not loaded.

    Args:
        loader: A prepared loader, or any.
        num_batches: How many of this rank's batches are left out.

    Returns:
        A loader with the attributes of ``loader``.

    Raises:
        TypeError: If ``loader`` is no ``DataLoader``.
        ValueError: If ``num_batches`` is negative.

    """
    if num_batches < 0:
        raise ValueError(f"Expected a number of batches to skip, got {num_batches}.")
    if not isinstance(loader, LoaderView):
        loader = prepare_data_loader(loader, rank=0, ranks=1)
    if isinstance(loader, SkippedLoader):
        return SkippedLoader(loader.viewed, loader.left_out + num_batches)
    return SkippedLoader(loader, num_batches)


def _require_whole(loader: Any, ranks: int) -> None:
    if not isinstance(loader, DataLoader):
        raise TypeError(f"Expected a torch.utils.data.DataLoader, got {type(loader).__name__}.")
    if isinstance(loader, LoaderView):
        raise ValueError("Expected a loader that is not prepared yet, got one whose batches are divided already.")
    for sampler in (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
        replicas = getattr(sampler, "num_replicas", 1)
        if isinstance(sampler, DistributedSampler) or replicas > 1:
            raise ValueError(
                f"Expected a loader of all samples, got one with a {type(sampler).__name__}, which gives each of"
                f" {replicas} ranks a part: of that each of {ranks} ranks would get a part again. Leave the sampler out"
                " and say shuffle=True or False."
            )


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """Samples of a global batch; None if batches differ, or are single samples."""
    if is_iterable(loader):
        return loader.batch_size
    source, batched = _source(loader)
    return getattr(source, "batch_size", None) if batched else None


def _source(loader: DataLoader[Any]) -> tuple[Any, bool]:
    """What a loader takes its indices from, and whether these are batches."""
    if loader.batch_sampler is not None:
        return loader.batch_sampler, True
    return loader.sampler, isinstance(loader.sampler, BatchSampler)


def _shuffler(loader: DataLoader[Any]) -> Any:
    """The sampler of single indices."""
    source, _ = _source(loader)
    return getattr(source, "sampler", source)


def _own_seed(loader: DataLoader[Any], seed: int | None) -> int:
    """A seed for the orders of a loader, unless one is given."""
    if seed is not None:
        return seed
    if not is_iterable(loader) and is_steady(_shuffler(loader)):
        return 0  # and nothing is drawn for it
    generator = None if is_iterable(loader) else getattr(_shuffler(loader), "generator", None)
    if isinstance(generator, torch.Generator):
        return generator.initial_seed()
    return int(torch.empty((), dtype=torch.int64).random_().item())


def _agree(loader: DataLoader[Any], seed: int | None, ranks: int, group: dist.ProcessGroup | None, sent: bool) -> int:
    """Rank 0's seed, if all ranks have the same data and a seed that was given is the same everywhere.

    Generators of samplers and datasets of the user's own get the states of rank 0's.
    """
    try:
        length = len(loader.dataset)  # type: ignore[arg-type]
    except TypeError:  # an iterable dataset need have none
        length = None
    drawing = _drawing(loader)
    states = [rng.generator_state(generator) for generator in generators_of(drawing)]
    told = (length, _batch_size(loader), seed, _own_seed(loader, seed), states)
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, told, group=host_group(group))
    names = ("a dataset of the same length", "the same batch size", "the same seed")
    for position, name in enumerate(names):
        values = [one[position] for one in everyone]
        if len(set(values)) > 1 and not (sent and position == 0):
            raise ValueError(
                f"Expected {name} on every rank, got {values} by rank. Each rank takes its share of the same order of"
                " samples: make the loader from the same data on all of them."
            )
    set_generators(drawing, everyone[0][4])
    agreed: int = everyone[0][3]
    return agreed


def _drawing(loader: DataLoader[Any]) -> Any:
    """What draws an order from generators of its own, if it has any; None if these are seeded for each epoch."""
    if is_iterable(loader):
        return loader.dataset
    source, _ = _source(loader)
    return None if is_steady(_shuffler(loader)) or draws_from_generator(_shuffler(loader)) else source


def _seeded(loader: DataLoader[Any], seed: int) -> tuple[DataLoader[Any], list[SeededSampler | Alike]]:
    """A copy of a loader whose sampler, if it shuffles, depends on the seed and the epoch alone."""
    inner = copy.copy(loader)
    inner.__dict__["_iterator"] = None  # workers are each loader's own
    if is_iterable(loader) or not draws_from_generator(_shuffler(loader)):
        return inner, []
    sampler = SeededSampler(_shuffler(loader), seed)
    source, batched = _source(loader)
    if batched:
        source = copy.copy(source)
        source.sampler = sampler
        _put(inner, source, batched=loader.batch_sampler is not None)
    if loader.batch_sampler is None and not batched:
        _put(inner, sampler, batched=False)
    return inner, [sampler]


def _put(loader: DataLoader[Any], sampler: Any, *, batched: bool) -> None:
    """Give a loader another sampler, which torch refuses to do of one that users have."""
    if batched:
        loader.__dict__["batch_sampler"] = sampler
        loader.__dict__["sampler"] = getattr(sampler, "sampler", sampler)
        loader.__dict__["batch_size"] = getattr(sampler, "batch_size", None)
    else:
        loader.__dict__["sampler"] = sampler


def _own_stream(
    loader: DataLoader[Any], rank: int, ranks: int, seed: int, shuffled: list[Any], **dealing: Any
) -> OwnFeed:
    """Every rank goes through an iterable dataset and keeps its own samples."""
    if ranks == 1:
        return OwnFeed(loader, None)
    steady = Alike(seed)
    shuffled.append(steady)
    size = loader.batch_size or 1
    stream = ShardedStream(
        loader.dataset, rank=rank, ranks=ranks, batch_size=size, drop_last=loader.drop_last, steady=steady, **dealing
    )
    loader.__dict__["dataset"] = stream
    if dealing["split_batches"]:
        loader.__dict__["batch_size"] = size // ranks
        loader.__dict__["batch_sampler"] = BatchSampler(loader.sampler, size // ranks, loader.drop_last)
    return OwnFeed(loader, stream)

"""What the ranks tell each other outside of training: tensors in nested structures, and objects.

[Note: compared first]
gloo and NCCL wait for ever, or give each other's bytes away, if ranks come with tensors of different shapes. So before
tensors travel the ranks compare one number, a digest of what they are about to do and of the dtypes and shapes. Only if
it differs do they tell each other what they have, and all of them raise. With ``ACCEL_DEBUG_MODE=1`` operations that
have no shapes to compare (objects, barriers) compare what they are.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_accel.data.batches import joined_samples
from lightning_accel.manual.operations import described, leaves, map_leaves, map_tensors, padded, require_tensors

REDUCTIONS = ("sum", "mean", "max", "min", "none")


class Peers:
    """All ranks. Every rank calls the same methods in the same order.

    Args:
        device: This rank's.
        debug: Compare every operation.

    """

    def __init__(self, device: torch.device, *, debug: bool = False) -> None:
        self.device = device
        self.debug = debug
        self.rank = dist.get_rank()
        self.ranks = dist.get_world_size()

    # ----------------------------------------------------------------- tensors

    @torch.no_grad()
    def gather(self, data: Any) -> Any:
        """The ranks' tensors, one after the other along their first dimension, on every rank.

        Args:
            data: Tensors of any shape, the same on each rank; a 0-dim one counts as one of shape ``[1]``.

        Returns:
            The same structure; each tensor of shape ``[n, ...]`` has become one of ``[ranks * n, ...]``.

        Raises:
            ValueError: If the ranks' shapes, dtypes or structures differ; on every rank.
            TypeError: If there is anything but tensors.

        """
        self._require_alike("gather", data, hint=" Make them alike with accelerator.pad_across_processes(...) first.")
        require_tensors("gather", data)
        return map_tensors(data, self._gather)

    def _gather(self, tensor: Tensor) -> Tensor:
        own = torch.atleast_1d(tensor.detach().to(self.device)).contiguous()
        if self.ranks == 1:
            return own
        # As bytes: not every back end knows every dtype.
        flat = own.reshape(-1).view(torch.uint8)
        whole = flat.new_empty(self.ranks * flat.numel())
        if flat.numel():
            dist.all_gather(list(whole.view(self.ranks, -1).unbind()), flat)
        return whole.view(own.dtype).view(self.ranks * own.shape[0], *own.shape[1:])

    def gather_uneven(self, data: Any, *, as_objects: bool) -> Any:
        """The samples of ranks that have different numbers of them, on every rank. By way of the host.

        Args:
            data: Tensors of shape ``[n, ...]`` in a structure; None if this rank has no samples.
            as_objects: They are objects instead, in a list.

        """
        mine = data if as_objects else map_tensors(data, lambda tensor: torch.atleast_1d(tensor.detach().cpu()))
        there = [one for one in self.gather_objects(mine, "gather_for_metrics") if one is not None]
        if as_objects:
            return [entry for one in there for entry in (one if isinstance(one, list) else [one])]
        return map_tensors(joined_samples(there), lambda tensor: tensor.to(self.device))

    @torch.no_grad()
    def reduce(self, data: Any, reduction: str, scale: float) -> Any:
        """Element by element, over the ranks. The inputs stay as they are.

        Args:
            data: Tensors of any shape, the same on each rank.
            reduction: ``"sum"``, ``"mean"``, ``"max"``, ``"min"`` or ``"none"``. The mean of integers is a fraction.
            scale: What results are multiplied by.

        Raises:
            ValueError: If there is no such reduction, or as ``gather``.
            TypeError: If there is anything but tensors.

        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"Expected reduction to be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}.")
        self._require_alike(f"reduce ({reduction})", data)
        require_tensors("reduce", data)
        return map_tensors(data, lambda tensor: self._reduce(tensor, reduction, scale))

    def _reduce(self, tensor: Tensor, reduction: str, scale: float) -> Tensor:
        result = tensor.detach().to(self.device, copy=True, memory_format=torch.contiguous_format)
        is_bool = result.dtype is torch.bool
        if is_bool:
            result = result.to(torch.int64 if reduction in ("sum", "mean") else torch.uint8)
        own = result.dtype
        if reduction == "mean" and self.ranks > 1:  # the sum of what a mean is of may be out of range
            if own in (torch.float16, torch.bfloat16):
                result = result.float()
            elif not (own.is_floating_point or own.is_complex):
                result = result.long()
        if reduction != "none" and self.ranks > 1 and result.numel():
            kinds = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
            real = torch.view_as_real(result) if result.is_complex() else result
            dist.all_reduce(real, op=kinds.get(reduction, dist.ReduceOp.SUM))
        if reduction == "mean":
            result = result / self.ranks  # true division: of integers, too
            result = result.to(own) if own.is_floating_point else result
        if is_bool and reduction in ("max", "min", "none"):
            result = result.bool()
        return result if scale == 1.0 else result * scale

    def pad(self, data: Any, dim: int, value: float, *, first: bool) -> Any:
        """Tensors as long along one dimension as the longest of any rank's.

        Args:
            data: Tensors that differ in that dimension at most.
            dim: Which one; may be negative.
            value: What is added.
            first: Add before instead of after.

        Raises:
            ValueError: If they differ in anything else, or lack the dimension; on every rank.
            TypeError: If there is anything but tensors.

        """
        mine = {path: list(leaf.shape) if isinstance(leaf, Tensor) else None for path, leaf in leaves(data).items()}
        everyone = self.gather_objects(mine, "pad_across_processes")
        require_tensors("pad", data)
        for path, shape in mine.items():
            shapes = [other.get(path) for other in everyone]
            dims = {None if other is None else len(other) for other in shapes}
            if len(dims) > 1 or not -len(shape or ()) <= dim < len(shape or ()):
                said = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(shapes))
                raise ValueError(
                    f"Expected tensors with a dimension {dim} on all ranks to pad, got the shapes {said}"
                    f"{' at ' + path if path else ''}."
                )
        if any(other.keys() != mine.keys() for other in everyone):
            raise ValueError(f"Expected the same structure on all ranks to pad, got {[list(o) for o in everyone]}.")

        def pad(path: str, tensor: Tensor) -> Tensor:
            size = max(other[path][dim] for other in everyone)
            return padded(tensor, size, dim, value, first=first)

        return map_leaves(data, pad)

    @torch.no_grad()
    def broadcast(self, data: Any, source: int) -> Any:
        """The tensors of one rank, on every rank. All come with some of the same shapes and dtypes.

        Raises:
            ValueError: If there is no such rank, or as ``gather``.
            TypeError: If there is anything but tensors.

        """
        self.require_rank(source)
        self._require_alike(f"broadcast from {source}", data)
        require_tensors("broadcast", data)

        def broadcast(tensor: Tensor) -> Tensor:
            result = tensor.detach().to(self.device, copy=True, memory_format=torch.contiguous_format)
            if self.ranks > 1 and result.numel():
                dist.broadcast(result.reshape(-1).view(torch.uint8), src=source)
            return result

        return map_tensors(data, broadcast)

    # ----------------------------------------------------------------- objects

    def gather_objects(self, value: Any, doing: str = "gather_object") -> list[Any]:
        """An object of every rank that can be pickled, by rank."""
        self.compare(doing)
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def broadcast_objects(self, values: list[Any], source: int) -> list[Any]:
        """Overwrite a list, in place, with that of one rank; it has as many entries on all of them."""
        self.require_rank(source)
        self.compare(f"broadcast_object_list of {len(values)} from {source}")
        if self.ranks > 1 and values:
            dist.broadcast_object_list(values, src=source, device=self.device)
        return values

    def any(self, flagged: bool) -> bool:
        """Whether any rank has set a flag."""
        if self.ranks == 1:
            return flagged
        told = torch.tensor(int(flagged), device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told.item())

    # -------------------------------------------------------------- comparison

    def require_rank(self, rank: int) -> None:
        """Raise if there is no such rank.

        Raises:
            ValueError: Says which there are.

        """
        if not 0 <= rank < self.ranks:
            raise ValueError(f"Expected a process from 0 to {self.ranks - 1}, got {rank}.")

    def compare(self, doing: str) -> None:
        """With ``debug``, raise if other ranks are about to do something else.

        Raises:
            ValueError: Says what, by rank; on every rank.

        """
        if self.debug:
            self._require_alike(doing, ())

    def _require_alike(self, doing: str, data: Any, hint: str = "") -> None:
        """See [Note: compared first]."""
        if self.ranks == 1:
            return
        mine = doing, described(data)
        digest = int.from_bytes(hashlib.blake2b(repr(mine).encode(), digest_size=8).digest(), "little") >> 2
        told = torch.tensor([digest, -digest], device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        highest, negated = told.tolist()
        if highest == -negated:
            return
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, mine)
        if len({other for other, _ in everyone}) > 1:
            said = "; ".join(f"rank {rank}: {other}" for rank, (other, _) in enumerate(everyone))
            raise ValueError(f"Expected all ranks to do the same, got {said}. Have every rank make the same calls.")
        paths = dict.fromkeys(path for _, have in everyone for path in have)
        differing = next(path for path in paths if len({have.get(path) for _, have in everyone}) > 1)
        said = "; ".join(f"rank {rank}: {have.get(differing, 'nothing')}" for rank, (_, have) in enumerate(everyone))
        raise ValueError(
            f"Expected the same dtypes and shapes on all ranks to {doing}, got {said}"
            f"{' at ' + differing if differing else ''}.{hint}"
        )

"""torch.distributed's own collectives: NCCL and every other back end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_accel.core.collectives import (
    Collectives,
    Pending,
    real,
    sent_gathering,
    sent_reducing,
    sent_scattering,
)
from lightning_accel.core.layout import Layout


class TorchCollectives(Collectives):
    """torch.distributed's own collectives: NCCL and every other back end."""

    _stream: torch.Stream | None = None

    @property
    def _scatters_in_one(self) -> bool:
        """Whether to use the back end's own reduce_scatter where that does.

        On the CPU backward asks whether it is done, and gloo's does not tell before it is waited for.
        """
        return self.device.type != "cpu"

    @override
    def reduce_scatter(self, buffer: Tensor, layout: Layout, out: Tensor) -> Pending:
        self.traffic.add("reduce_scatter", sent_scattering(buffer, layout, self.rank))
        if layout.is_even and out.dtype == buffer.dtype and self._scatters_in_one:
            return Pending([_reduce_scatter_single(real(out), real(buffer), group=self.group, async_op=True)])
        # Every part to its rank, then a local sum: any back end can do that with parts of different sizes, and it adds
        # up in any dtype.
        start, stop = layout.part(self.rank)
        received = buffer.new_empty((self.ranks, stop - start))
        work = dist.all_to_all_single(
            real(received.view(-1)),
            real(buffer),
            [stop - start] * self.ranks,
            [end - begin for begin, end in map(layout.part, range(self.ranks))],
            group=self.group,
            async_op=True,
        )

        def add_up() -> None:
            torch.sum(received, 0, dtype=out.dtype, out=out)

        return Pending([work], add_up)

    @override
    def all_gather(self, buffer: Tensor, layout: Layout) -> Pending:
        self.traffic.add("all_gather", sent_gathering(buffer, layout, self.rank))
        if layout.is_even:
            mine = real(buffer[slice(*layout.part(self.rank))])
            return Pending([_all_gather_single(real(buffer), mine, group=self.group, async_op=True)])
        parts = [real(buffer[slice(*layout.part(peer))]) for peer in range(self.ranks)]
        return Pending(
            [
                dist.broadcast(part, group=self.group, group_src=peer, async_op=True)
                for peer, part in enumerate(parts)
                if part.numel()
            ]
        )

    @override
    def gather(self, part: Tensor, layout: Layout, whole: Tensor | None) -> None:
        self._count_gather(part)
        messages = {0: part}
        if whole is not None:
            whole[slice(*layout.part(0))].copy_(part)
            messages = {peer: whole[slice(*layout.part(peer))] for peer in range(1, self.ranks)}
        kind: Callable[..., Any] = dist.isend if whole is None else dist.irecv
        batch = [
            dist.P2POp(kind, real(tensor), group=self.group, group_peer=peer)
            for peer, tensor in messages.items()
            if tensor.numel()
        ]
        if batch:  # in one call: NCCL would connect each pair of ranks anew otherwise
            Pending(dist.batch_isend_irecv(batch)).wait()

    @override
    def all_reduce(self, buffer: Tensor, layout: Layout) -> Pending:
        self.traffic.add("all_reduce", sent_reducing(buffer, layout, self.rank))
        return Pending([dist.all_reduce(real(buffer), group=self.group, async_op=True)])

    @override
    def all_reduce_after(self, first: Pending, buffer: Tensor, layout: Layout) -> Pending:
        if self.device.type == "cpu":
            return super().all_reduce_after(first, buffer, layout)
        # A stream of its own waits for the first: neither the host does, nor what computes meanwhile.
        if self._stream is None:
            self._stream = torch.Stream(self.device)
        with self._stream:
            first.wait()
            return self.all_reduce(buffer, layout)


# The ``*_tensor`` names are deprecated from torch 2.13 on, the ``*_single`` names do not exist before.
_reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

"""The reductions of PowerSGD: each matrix of gradients travels as a product of two thin ones.

On each of N ranks, M is the rank's contribution (a share of 1/N of the mean) plus what earlier reductions left out of
its contributions; Q, of orthonormal columns, is the same on all ranks::

    first message     sum of P = M Q over ranks; what travels whole; a number for each matrix: do ranks use it?
    locally           P becomes orthonormal columns that span the same space
    second message    sum of Q = M' P over ranks
    locally           the gradient is P Q'; left out is M - P Q' / N, of which the ranks' sum is all that is missing

[Note: second messages]
All ranks must start the same messages in one order, and a first message may be there earlier on one rank than on
another. So second ones start when backward is over, in the order of the first ones. They are small.

[Note: commit]
If a gradient of any parameter overflows, loss scaling skips the step: what the others' reductions have found will not
be applied, and must not be taken for applied. So what is left out (and Q) changes only when the first messages of all
units have been looked at, and stays as it was if anything in them is not finite. All compressed gradients are NaN then.
These messages are sums that all ranks have bit for bit: so all come to the same conclusion, and no host waits for it.
A number for each matrix says whether ranks have a gradient for it, and is NaN if that is not finite (M Q may not show
it). If no rank has one the optimizer will leave the parameter alone: what was left out stays for later. Late gradients
(see core/reduction.py) travel whole and come after this.

[Note: scaled gradients]
What is left out is of gradients times the loss scale. The scaler makes itself known when it unscales; before the next
reduction its scale is compared with that of the last. Weights of losses are not divided by before gradients have
travelled: what is left out is a share of the weighted sum, and counts as such in the next one.

[Note: alike on all ranks]
Q, P and their product are computed on each rank, from the same numbers at the same places, by the same library: they
are the same bits on ranks of like hardware and number of threads, as under torch's own hook.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_accel.core.collectives import Collectives, Pending
from lightning_accel.core.layout import Layout, even_cuts
from lightning_accel.core.power_sgd import PowerSGD


@dataclass
class Memory:
    """What is kept of one parameter between reductions."""

    seen: int = 0
    """How many reductions there were."""
    error: Tensor | None = None
    """What they left out of this rank's contributions, ``[n, m]``."""
    directions: Tensor | None = None
    """Q of the last one, ``[m, rank]``, orthonormal; None if it is drawn."""
    scale: float | None = None
    """The loss scale that ``error`` is multiplied by, if that is known."""
    scale_now: Callable[[], float] | None = None
    """Tells the present one."""

    def follow_scale(self) -> None:
        """Have the error multiplied by the present loss scale. See [Note: scaled gradients]."""
        if self.scale_now is None:
            return
        scale = self.scale_now()
        if self.error is not None and self.scale is not None and self.scale != scale:
            self.error.mul_(scale / self.scale)
        self.scale = scale


class Compression:
    """What PowerSGD keeps of all parameters of a model, whatever units they are in.

    Args:
        settings: The user's.
        collectives: The ranks.

    """

    def __init__(self, settings: PowerSGD, collectives: Collectives) -> None:
        self.settings = settings
        self._collectives = collectives
        self._memories: dict[nn.Parameter, Memory] = {}
        self._reductions: list[LowRank] = []  # of this backward
        self._whole: list[Tensor] = []  # what travelled whole in it
        self._has_warned = False

    @staticmethod
    def of(settings: PowerSGD | None, collectives: Collectives) -> Compression | None:
        """That of some settings; None without any, and where nothing travels."""
        return None if settings is None or collectives.ranks == 1 else Compression(settings, collectives)

    def memory(self, parameter: nn.Parameter) -> Memory:
        """What is kept of a parameter."""
        return self._memories.setdefault(parameter, Memory())

    @property
    def memories(self) -> Mapping[nn.Parameter, Memory]:
        """What is kept, of parameters that were reduced."""
        return self._memories

    def tensors(self) -> list[Tensor]:
        """All that is kept between steps."""
        kept = [tensor for memory in self._memories.values() for tensor in (memory.error, memory.directions)]
        return [tensor for tensor in kept if tensor is not None]

    def note_scale(self, parameters: Iterable[nn.Parameter], scale_now: Callable[[], float]) -> None:
        """Say who scales the losses of some parameters; the last backward was with the present scale."""
        for parameter in parameters:
            memory = self.memory(parameter)
            memory.scale_now = scale_now
            if memory.scale is None:
                memory.scale = scale_now()

    def start_anew(self, load: Callable[[], None], parameters: Callable[[], Iterable[nn.Parameter]]) -> None:
        """Load an optimizer's state, and forget what is kept of its parameters. Warns, once and on rank 0.

        Args:
            load: Loads it.
            parameters: Gives them, afterwards.

        """
        load()
        for parameter in parameters():
            self._memories.pop(parameter, None)
        if self._collectives.rank == 0 and not self._has_warned:
            warnings.warn(
                "Optimizer state was loaded, and what PowerSGD keeps is in no checkpoint: it starts anew, with"
                f" {self.settings.start_powerSGD_iter} whole reductions (start_powerSGD_iter). Steps differ from those"
                " of a run that goes on.",
                stacklevel=2,
            )
        self._has_warned = True

    def all_reduce(
        self,
        gradients: Tensor,
        layout: Layout,
        views: Sequence[Tensor],
        contributes: Sequence[bool],
        parameters: Sequence[nn.Parameter],
        names: Sequence[str],
    ) -> Pending:
        """Start to replace a unit's gradients by their sum over ranks. ``commit`` must follow.

        Args:
            gradients: This rank's contributions, 1-D.
            layout: How the ranks divide them.
            views: Those of each parameter, of its shape.
            contributes: Whether this rank has one for it; zeros otherwise.
            parameters: The parameters.
            names: Their names, the same on every rank.

        """
        matrices, whole = [], []
        for view, flag, parameter, name in zip(views, contributes, parameters, names, strict=True):
            memory, rank = self.memory(parameter), self.settings.rank_of(view.shape, view.dtype)
            memory.seen += 1
            if rank and memory.seen > self.settings.start_powerSGD_iter:
                matrices.append(_Matrix(view, flag, memory, name, rank, self.settings, self._collectives.ranks))
            else:
                whole.append(view)
        if not matrices:
            self._whole.append(gradients)
            return self._collectives.all_reduce(gradients, layout)
        self._reductions.append(LowRank(matrices, whole, self._collectives))
        return self._reductions[-1]

    def commit(self) -> None:
        """Put the sums in place, when all reductions of a backward have been waited for. See [Note: commit]."""
        reductions, whole = self._reductions, self._whole
        self._reductions, self._whole = [], []
        if reductions:
            verdicts = [torch.isfinite(total).all() for total in whole]
            finite = torch.stack([*verdicts, *(reduction.is_finite() for reduction in reductions)]).all()
            for reduction in reductions:
                reduction.commit(finite)


class _Matrix:
    """One parameter within one reduction."""

    def __init__(
        self, view: Tensor, flag: bool, memory: Memory, name: str, rank: int, settings: PowerSGD, ranks: int
    ) -> None:
        self.view = view
        self.memory = memory
        self.rank = rank
        self._settings = settings
        self._share = 1.0 / ranks
        memory.follow_scale()
        matrix = view.reshape(view.shape[0], -1)
        if settings.use_error_feedback:
            if memory.error is None:
                memory.error = torch.zeros_like(matrix, memory_format=torch.contiguous_format)
            matrix = matrix.add_(memory.error)
        self.values = matrix
        """This rank's, ``[n, m]``: the gradient's memory, unless the parameter is strided otherwise."""
        self.flag = torch.linalg.vector_norm(matrix, torch.inf) * 0.0 + float(flag)
        """See [Note: commit]."""
        self.right = memory.directions if memory.directions is not None else self._drawn(name)
        """Q, ``[m, rank]``."""

    def _drawn(self, name: str) -> Tensor:
        """Random directions, alike on all ranks and different for each parameter and reduction."""
        key = f"{self._settings.random_seed} {self.memory.seen} {name}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.values.shape[1], self.rank, generator=generator, dtype=torch.float64)
        return orthonormal(drawn).to(self.values)

    def commit(self, left: Tensor, right: Tensor, used: Tensor, finite: Tensor) -> None:
        """Put the sum in place of the gradient, and keep what it leaves out.

        Args:
            left: P, orthonormal, ``[n, rank]``.
            right: The ranks' sum of M' P, ``[m, rank]``.
            used: Whether any rank has a gradient; 0-dim.
            finite: Whether all of the backward's are finite; 0-dim.

        """
        total, applied = left @ right.T, finite & used
        memory = self.memory
        if memory.error is not None:
            torch.where(applied, self.values.sub_(total, alpha=self._share), memory.error, out=memory.error)
        if self._settings.warm_start:
            kept = memory.directions if memory.directions is not None else self.right
            memory.directions = torch.where(applied, orthonormal(right), kept)
        total = torch.where(finite, torch.where(used, total, 0.0), torch.nan)
        self.view.copy_(total.view(self.view.shape))


class LowRank(Pending):
    """The reduction of one unit that is under way.

    Args:
        matrices: What travels as products.
        whole: What travels as it is.
        collectives: The ranks.

    """

    def __init__(self, matrices: Sequence[_Matrix], whole: Sequence[Tensor], collectives: Collectives) -> None:
        super().__init__([])
        self._matrices = matrices
        self._whole = whole
        self._collectives = collectives
        lefts = [matrix.values @ matrix.right for matrix in matrices]
        self._first = torch.cat(
            [*(part.reshape(-1) for part in [*whole, *lefts]), torch.stack([matrix.flag for matrix in matrices])]
        )
        self._pending: Pending | None = self._start(self._first)
        self._second: Tensor | None = None
        self._lefts: list[Tensor] = []

    def _start(self, message: Tensor) -> Pending:
        ranks = self._collectives.ranks
        return self._collectives.all_reduce(message, Layout((), even_cuts(message.numel(), ranks)))

    @override
    def is_ready(self) -> bool:
        """Not before the second message has started. See [Note: second messages]."""
        return self._second is not None and (self._pending is None or self._pending.is_ready())

    @override
    def advance(self) -> None:
        if self._second is not None:
            if self._pending is not None:
                self._pending.advance()
            return
        assert self._pending is not None
        self._pending.wait()
        begin = 0
        for view in self._whole:
            view.copy_(self._first[begin : begin + view.numel()].view(view.shape))
            begin += view.numel()
        for matrix in self._matrices:
            size = matrix.values.shape[0] * matrix.rank
            self._lefts.append(orthonormal(self._first[begin : begin + size].view(-1, matrix.rank)))
            begin += size
        rights = [matrix.values.T @ left for matrix, left in zip(self._matrices, self._lefts, strict=True)]
        self._second = torch.cat([right.reshape(-1) for right in rights])
        self._pending = self._start(self._second)

    @override
    def wait(self) -> None:
        if self._second is None:
            self.advance()
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def is_finite(self) -> Tensor:
        """Whether all sums are, as a 0-dim tensor; the same on all ranks."""
        assert self._second is not None
        return torch.isfinite(self._first).all() & torch.isfinite(self._second).all()

    def commit(self, finite: Tensor) -> None:
        """Put the sums in place and keep what they leave out, unless ``finite`` says no."""
        assert self._second is not None
        begin, used = 0, self._first[-len(self._matrices) :] > 0
        for position, (matrix, left) in enumerate(zip(self._matrices, self._lefts, strict=True)):
            size = matrix.values.shape[1] * matrix.rank
            right = self._second[begin : begin + size].view(-1, matrix.rank)
            matrix.commit(left, right, used[position], finite)
            begin += size


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns that span at least what those of a tall matrix span; of zeros and dependent ones, too."""
    wide = columns if columns.dtype.itemsize >= 4 else columns.float()
    found: Tensor = torch.linalg.qr(wide).Q
    return found.to(columns.dtype).contiguous()

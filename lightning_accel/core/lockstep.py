"""Ranks that gather parameters by messages must all do the same: this finds out when they do not.

[Note: lockstep]
Where ranks cannot read each other's memory, a gather needs every rank. One that calls the model once more than the
others would wait for ever, and two that gather different units would take each other's values for their own. So before
each forward, backward, update, ... all ranks compare what they are about to do and which units they have gathered
since the last comparison: one number each, over a process group on which nothing else travels. If they differ all ranks
raise, before anything was trained with it. A rank that never comes (it is in a collective of somebody else's) is
reported when the process group's timeout has passed: until then nobody can know.
"""

from __future__ import annotations

import hashlib
import weakref

import torch.distributed as dist

from lightning_accel.core.collectives import Collectives

_REMEDY = (
    "Ranks that share no memory must call a model whose parameters rest sharded equally often, and use the same parts"
    " of it each time. Give every rank as many batches (Lightning's sampler does; with loaders of your own pad the"
    " shorter ones, or use limit_predict_batches and its like), or use accel_zero2, which gathers nothing in forward."
)


class Lockstep:
    """Compares what the ranks do. See [Note: lockstep].

    Args:
        collectives: The ranks that gather from each other. All of them make one together.
        is_gathered: Whether there is anything to gather in forward at all.

    """

    def __init__(self, collectives: Collectives, *, is_gathered: bool = True) -> None:
        self.is_needed = is_gathered and collectives.ranks > 1 and not collectives.is_one_sided
        """Whether the ranks depend on each other in forward."""
        self._collectives = collectives
        self._gathered: list[str] = []
        self._group = _group_beside(collectives) if self.is_needed else None

    def note(self, unit: str) -> None:
        """Take note that a unit is about to be gathered."""
        if self.is_needed:
            self._gathered.append(unit)

    def enter(self, doing: str) -> None:
        """Compare with the other ranks before something that all must do together.

        Args:
            doing: What comes now.

        Raises:
            RuntimeError: On every rank, if they do not do the same, or if some do not come here at all.

        """
        if not self.is_needed:
            return
        told = (doing, self._gathered)
        self._gathered = []
        digest = hashlib.blake2b(repr(told).encode(), digest_size=7).digest()
        mine = int.from_bytes(digest, "big")
        assert self._group is not None
        try:
            codes = self._collectives.gather_numbers(mine, self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"Expected all ranks to come to {doing} of a model whose parameters rest sharded; some did not, or have"
                f" ended. {_REMEDY}"
            ) from error
        if any(code != mine for code in codes):
            everyone: list[tuple[str, list[str]]] = [told] * len(codes)
            dist.all_gather_object(everyone, told, group=self._group)
            raise RuntimeError(_difference(everyone))


def _difference(everyone: list[tuple[str, list[str]]]) -> str:
    first, gathered = everyone[0]
    for rank, (doing, units) in enumerate(everyone):
        if doing != first:
            return (
                f"Expected all ranks to do the same, but rank 0 came to {first} and rank {rank} to {doing}. {_REMEDY}"
            )
        for a, b in zip([*gathered, "nothing more"], [*units, "nothing more"], strict=False):
            if a != b:
                return (
                    f"Expected all ranks to gather the same parameters, but before {doing} rank 0 gathered {a!r} where"
                    f" rank {rank} gathered {b!r}. {_REMEDY}"
                )
    raise AssertionError("the ranks told the same, but their numbers differ")


_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()
"""Those made so far: process groups cannot be ended safely, so they are used again."""


def _group_beside(collectives: Collectives) -> dist.ProcessGroup:
    """A group of the same ranks for messages of the host."""
    whole = collectives.group or dist.group.WORLD
    assert whole is not None
    if whole not in _groups:
        _groups[whole] = collectives.beside()
    return _groups[whole]

"""The batch arithmetic: a step's samples are those of a micro-batch, times accumulation, times ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batches:
    """Sizes of batches that agree."""

    ranks: int
    """How many processes train."""
    train: int
    """Samples of one optimizer step, over all ranks."""
    micro: int
    """Samples of one forward and backward on one rank."""
    accumulation: int
    """How many of these make a step."""

    @staticmethod
    def of(ranks: int, train: int | None, micro: int | None, accumulation: int | None, where: str) -> Batches:
        """Sizes that agree; what is not given follows from the others as it does in DeepSpeed.

        Args:
            ranks: How many processes train.
            train: ``train_batch_size``, if given, likewise the next two.
            micro: ``train_micro_batch_size_per_gpu``.
            accumulation: ``gradient_accumulation_steps``; 1 if it does not follow from both others.
            where: The file, for messages.

        Raises:
            ValueError: If they do not add up, or too few are given.

        """
        given = {"micro-batch": micro is not None, "accumulation": accumulation is not None}
        if train is None:
            if micro is None:
                raise ValueError(
                    f"Expected train_batch_size or train_micro_batch_size_per_gpu in {where}, got neither."
                )
            accumulation = accumulation or 1
            return Batches(ranks, micro * accumulation * ranks, micro, accumulation)
        if accumulation is None:
            accumulation = 1 if micro is None else max(train // (micro * ranks), 1)
        if micro is None:
            micro = max(train // (ranks * accumulation), 1)
        total = micro * accumulation * ranks
        if total != train:
            found = [name for name, is_given in given.items() if not is_given]
            note = f" ({' and '.join(found)} computed from the others)" if found else ""
            raise ValueError(
                "Expected train_batch_size = train_micro_batch_size_per_gpu × gradient_accumulation_steps × ranks in"
                f" {where}, got {train} = {micro} × {accumulation} × {ranks}?"
                f" {micro} × {accumulation} × {ranks} = {total}{note}."
            )
        return Batches(ranks, train, micro, accumulation)

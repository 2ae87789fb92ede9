"""Pure arithmetic of DeepSpeed's flat tensors: where the elements of each parameter are.

[Note: where DeepSpeed keeps parameters]
Each parameter group is one flat fp32 tensor, cut into a part per rank; so are the optimizer's moments. Stages 1 and 2
cut the group as a whole, parameters end to end::

    param_shapes[group]        | a        | b  | c       |pad|
    rank 0, rank 1             |0000000000000|1111111111111111|     pad: at the end, and after parameters where
                                                                    param_alignment_paddings says so

Stage 3 cuts each parameter, padded to a multiple of the number of ranks; a rank has its parts end to end::

    rank 0                     | a 0.. | b 0. | c 0.. |
    rank 1                     | a ..1 | b .1 | c .1p |

The order of ``param_shapes`` is that of the flat tensor. With ``round_robin_gradients`` it is not the optimizer's, and
``param_slice_mappings``, by which DeepSpeed itself looks for its parameters, has wrong offsets (0.19.8:
``safe_get_full_fp32_param`` and ``ds_to_universal.py`` exchange values then). Hence the former is what counts here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]
"""Of the parameters of a group, in order."""

Places = dict[str, list[tuple[int, int, int]]]
"""Where the elements of each parameter are, in order: ranks, and starts and lengths in their flat tensors."""


def cut_by_group(shapes: Shapes, lengths: Sequence[int], paddings: Sequence[int]) -> Places:
    """Stages 1 and 2. See [Note: where DeepSpeed keeps parameters].

    Args:
        shapes: Of a group.
        lengths: Elements of each rank's part of the group. The last one's may be without what pads it.
        paddings: Elements after each parameter that are nothing's.

    Raises:
        ValueError: If these are not parts of such a group.

    """
    needed = sum(map(math.prod, shapes.values())) + sum(paddings)
    # At most 2 x ranks - 1 elements pad the group's end, of which the last rank drops what it has.
    if not needed <= sum(lengths) < needed + 2 * len(lengths):
        raise _does_not_fit(needed, sum(lengths))
    places: Places = {}
    at = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        end = at + math.prod(shape)
        places[name] = []
        first = 0
        for rank, length in enumerate(lengths):
            start, stop = max(at, first), min(end, first + length)
            if start < stop:
                places[name].append((rank, start - first, stop - start))
            first += length
        at = end + padding
    return places


def cut_by_parameter(shapes: Shapes, lengths: Sequence[int]) -> Places:
    """Stage 3. See [Note: where DeepSpeed keeps parameters].

    Args:
        shapes: Of a group.
        lengths: Elements of each rank's part of the group.

    Raises:
        ValueError: If these are not parts of such a group.

    """
    ranks = len(lengths)
    needed = sum(math.ceil(math.prod(shape) / ranks) for shape in shapes.values())
    if any(length != needed for length in lengths):
        raise _does_not_fit(needed * ranks, sum(lengths))
    places: Places = {}
    at = 0
    for name, shape in shapes.items():
        places[name] = [(rank, at, length) for rank, length in enumerate(parts_of(math.prod(shape), ranks))]
        at += math.ceil(math.prod(shape) / ranks)
    return places


def parts_of(numel: int, ranks: int) -> list[int]:
    """How many elements of a parameter each rank has under stage 3, without what pads it."""
    part = math.ceil(numel / ranks)
    return [max(0, min(part, numel - rank * part)) for rank in range(ranks)]


def given_order(names: Sequence[str], ranks: int) -> list[str]:
    """The order of a group before ``round_robin_gradients`` dealt its parameters out to the ranks one after another."""
    dealt = [index for rank in range(ranks) for index in range(rank, len(names), ranks)]
    return [name for _, name in sorted(zip(dealt, names, strict=True))]


def _does_not_fit(needed: int, found: int) -> ValueError:
    return ValueError(
        f"Expected the flat tensors of a parameter group to have {needed} elements over all ranks, as its shapes say,"
        f" got {found}. Were files of different checkpoints mixed, or only some of them copied?"
    )

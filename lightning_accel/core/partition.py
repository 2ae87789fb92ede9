"""Which parameters form a unit: the members of the repeated block class, and the rest by size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_accel.core.layout import pack

Units = Sequence[str | type[nn.Module]]
"""What users may name units by: module names or classes of the model."""


@dataclass(frozen=True)
class NamedParameter:
    """A parameter with the first of its names in the module."""

    name: str
    parameter: nn.Parameter

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.parameter.numel() * self.parameter.element_size()


def trainable_parameters(module: nn.Module) -> list[NamedParameter]:
    """The parameters that require gradients, each once, in registration order."""
    return [NamedParameter(name, p) for name, p in module.named_parameters() if p.requires_grad]


def find_blocks(module: nn.Module, units: Units | None) -> dict[str, nn.Module]:
    """The modules whose parameters stay together, by name.

    Args:
        module: The model.
        units: Module names or classes. If not given: the members of the largest ModuleList or Sequential whose members
            are all of one class, and of its like elsewhere in the model.

    Raises:
        ValueError: If a name or class matches nothing, or one unit lies within another.

    """
    blocks = _repeated_blocks(dict(module.named_modules())) if units is None else find_modules(module, units, "units")
    for name in blocks:
        for other in blocks:
            if other != name and name.startswith(f"{other}." if other else ""):
                raise ValueError(
                    f"Expected units that do not overlap, but {name!r} lies within {other!r}. Name only one of them."
                )
    return blocks


def find_modules(module: nn.Module, wanted: Collection[str | type[nn.Module]], argument: str) -> dict[str, nn.Module]:
    """The modules that a user names, by name.

    Args:
        module: The model.
        wanted: Module names or classes.
        argument: What the user knows them as, for messages.

    Raises:
        ValueError: If a name or class matches nothing.

    """
    if isinstance(wanted, str | type):
        raise ValueError(
            f"Expected `{argument}` to be a list of module names or classes, got {wanted!r}. Put it in brackets."
        )
    modules = dict(module.named_modules())
    matches = {}
    for one in wanted:
        if isinstance(one, str):
            found = {one: modules[one]} if one in modules else {}
        else:
            found = {name: member for name, member in modules.items() if isinstance(member, one)}
        if not found:
            classes = Counter(type(member).__name__ for member in modules.values())
            raise ValueError(
                f"Expected `{argument}` to name modules or module classes of the model, but {one!r} matches nothing."
                f" The model has modules of the classes {', '.join(classes)}."
            )
        matches.update(found)
    return matches


def _repeated_blocks(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    lists: list[tuple[int, type[nn.Module], dict[str, nn.Module]]] = []
    for name, container in modules.items():
        if not isinstance(container, nn.ModuleList | nn.Sequential) or len(container) < 2:
            continue
        prefix = f"{name}." if name else ""
        members = {f"{prefix}{child}": member for child, member in container.named_children()}
        kinds = {type(member) for member in members.values()}
        if len(kinds) == 1:
            lists.append((sum(p.numel() for p in container.parameters()), kinds.pop(), members))
    size, kind, _ = max(lists, key=lambda found: found[0], default=(0, nn.Module, {}))
    if size == 0:
        return {}
    blocks = {name: block for _, other, members in lists if other is kind for name, block in members.items()}
    # Blocks of a class that contains its own kind: the outer ones.
    return {name: block for name, block in blocks.items() if not any(name.startswith(f"{o}.") for o in blocks)}


@dataclass(frozen=True)
class Group:
    """Parameters that become one unit, or one for each of their kinds."""

    name: str
    members: list[NamedParameter]
    block: str | None
    """The block that all of them belong to, if it is one."""


def partition(
    parameters: Sequence[NamedParameter], blocks: dict[str, nn.Module], cap_bytes: int, *, join_blocks: bool = True
) -> list[Group]:
    """Group parameters into units, in the order in which the parameters are registered.

    Each block's parameters stay together; small neighbouring blocks are joined, and parameters outside of blocks are
    packed, up to ``cap_bytes``. A parameter that two blocks share belongs to neither (it is needed in both).

    Args:
        parameters: What to group.
        blocks: The modules whose parameters stay together.
        cap_bytes: Size up to which small groups are joined.
        join_blocks: Whether blocks may be joined with their neighbours.

    """
    holders: dict[int, list[str]] = {}
    for name, block in blocks.items():
        for parameter in {id(p): p for p in block.parameters()}.values():
            holders.setdefault(id(parameter), []).append(name)
    groups: list[tuple[str | None, list[NamedParameter]]] = []
    index: dict[str, int] = {}
    for named in parameters:
        holder = holders.get(id(named.parameter), [])
        if len(holder) == 1 and holder[0] in index:
            groups[index[holder[0]]][1].append(named)
            continue
        if len(holder) == 1:
            index[holder[0]] = len(groups)
        groups.append((holder[0] if len(holder) == 1 else None, [named]))
    runs: list[list[tuple[str | None, list[NamedParameter]]]] = [[]]
    for group in groups:
        apart = not join_blocks and (group[0] is not None or (runs[-1] and runs[-1][-1][0] is not None))
        if apart and runs[-1]:
            runs.append([])
        runs[-1].append(group)
    found = []
    for run in runs:
        for packed in pack([sum(named.nbytes for named in group) for _, group in run], cap_bytes):
            members = [named for position in packed for named in run[position][1]]
            first, last = run[packed[0]], run[packed[-1]]
            names = [first[0] or first[1][0].name, last[0] or last[1][-1].name]
            name = names[0] if names[0] == names[1] else f"{names[0]} … {names[1]}"
            found.append(Group(name, members, first[0] if len(packed) == 1 else None))
    return found

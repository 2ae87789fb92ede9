"""A configuration file as names and values, with the keys checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_accel.deepspeed_config.keys import KEYS, SECTIONS, Key, Kind
from lightning_accel.deepspeed_config.types import NOT_OFFERED, OPTIMIZERS, SCHEDULES, find_schedule
from lightning_accel.deepspeed_config.values import AUTO
from lightning_accel.launching.settings import describe_unknown


def load(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Names and values as they stand in a file, and the file's name for messages.

    Args:
        source: A path to a JSON file, or what would be in it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON, not names and values, or has a name twice.
        TypeError: If it is neither a path nor names and values.

    """
    if isinstance(source, Mapping):
        return dict(source), "config"
    if not isinstance(source, (str, Path)):
        raise TypeError(f"Expected config to be a path or a dict, got {type(source).__name__}.")
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"Expected config to be a DeepSpeed JSON file, got {str(source)!r}: there is none.")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Expected JSON in {source}, got an error at line {error.lineno}, column {error.colno}: {error.msg}."
            " Comments and commas after the last value are not JSON."
        ) from error
    except ValueError as error:
        raise ValueError(f"Expected JSON in {source}: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"Expected names and values in {source}, got a {type(found).__name__}.")
    return found, str(source)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"each key once, got {', '.join(sorted({n for n in names if names.count(n) > 1}))} twice")
    return found


def checked(found: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Key]]:
    """The values of a file by name, checked, and the keys that they have.

    Args:
        found: Its names and values.
        where: The file, for messages.

    Returns:
        Values, without those that are null, and keys; a section's name and a dot stand before each of its own.

    Raises:
        ValueError: If a key is unknown or removed from DeepSpeed, or a value is none of its kind.

    """
    known = known_keys({part: _type(found, part, where) for part in ("optimizer", "scheduler")}, where)
    values: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in _flat(found, "", where):
        if name not in known:
            unknown.append(_nearest(name, known))
        elif value is not None:
            values[name] = value
    if unknown:
        raise ValueError(f"Expected keys of DeepSpeed in {where}, got {', '.join(unknown)}.")
    removed = [name for name in values if known[name].kind is Kind.REMOVED and not _is_off(values[name])]
    if removed:
        raise ValueError(
            f"Expected keys of DeepSpeed 0.19 in {where}, got what was removed from it: "
            + "; ".join(f"{name} ({known[name].why})" for name in removed)
            + "."
        )
    for name, value in values.items():
        if value != AUTO:
            values[name] = known[name].check(value, name, where)
    return values, {name: known[name] for name in values}


def known_keys(types: Mapping[str, str | None], where: str) -> dict[str, Key]:
    """All keys that a file may have.

    Args:
        types: The types of its ``"optimizer"`` and ``"scheduler"``; None if it has none.
        where: The file, for messages.

    Raises:
        ValueError: If there is no such type.

    """
    known = dict(KEYS)
    for part, kind in types.items():
        if kind is not None:
            known |= {f"{part}.params.{name}": key for name, key in _parameters(part, kind, where).items()}
    return known


def _type(found: Mapping[str, Any], part: str, where: str) -> str | None:
    section = found.get(part)
    if not isinstance(section, Mapping):
        return None
    kind = section.get("type")
    if kind is None and section.get("params"):
        raise ValueError(f"Expected {part}.type in {where}, got {part}.params alone.")
    if not isinstance(kind, str | None):
        raise ValueError(f"Expected {part}.type in {where} to be a text, got {kind!r}.")
    return kind


def _parameters(part: str, kind: str, where: str) -> Mapping[str, Key]:
    """The keys of ``params`` of an optimizer or a schedule."""
    if part == "optimizer":
        return OPTIMIZERS[kind.lower()] if kind.lower() in OPTIMIZERS else _of_torch(kind, where)
    name = find_schedule(kind)
    if name is None:
        raise ValueError(
            f"Expected scheduler.type in {where} to be one of {', '.join(SCHEDULES)}, got"
            f" {describe_unknown([kind], [*SCHEDULES])}."
        )
    return SCHEDULES[name]


def _of_torch(kind: str, where: str) -> dict[str, Key]:
    """The parameters of an optimizer that DeepSpeed takes from torch.optim."""
    why = NOT_OFFERED.get(kind.lower())
    if why is not None:
        raise ValueError(f"Expected another optimizer.type in {where}, got {kind!r}: {why}.")
    import inspect

    import torch

    found = getattr(torch.optim, kind, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        names = ["Adam", "AdamW", "Lamb", "Lion", "Adagrad", "SGD", "Muon"]
        raise ValueError(
            f"Expected optimizer.type in {where} to be one of {', '.join(names)}, or the name of one in torch.optim,"
            f" got {describe_unknown([kind], [*names, *dir(torch.optim)])}."
        )
    accepted = list(inspect.signature(found).parameters)[1:]
    return {name: Key(Kind.HONOURED, f"passed on to torch.optim.{kind}") for name in accepted}


def _flat(found: Mapping[str, Any], section: str, where: str) -> Iterator[tuple[str, Any]]:
    for key, value in found.items():
        name = f"{section}.{key}" if section else str(key)
        if name not in SECTIONS:
            yield name, value
        elif isinstance(value, Mapping):
            yield from _flat(value, name, where)
        elif name == "zero_optimization" and isinstance(value, bool):
            raise ValueError(
                f"Expected names and values as zero_optimization in {where}, got {value}, which is how files of long"
                f' ago say it. Use {{"stage": {int(value)}}}.'
            )
        elif value is not None:
            raise ValueError(f"Expected names and values as {name} in {where}, got {value!r}.")


def _nearest(name: str, known: Mapping[str, Key]) -> str:
    section, _, own = name.rpartition(".")
    prefix = f"{section}." if section else ""
    names = {*known, *SECTIONS}
    siblings = [other[len(prefix) :] for other in names if other.startswith(prefix)]
    told = describe_unknown([own], [sibling for sibling in siblings if "." not in sibling])
    if "did you mean" not in told:
        # Written one level too high or too deep?
        elsewhere = sorted(other for other in known if other.rpartition(".")[2] == own)
        if elsewhere:
            return f"{name!r} (did you mean {elsewhere[0]!r}?)"
    return f"{prefix}{told}" if not prefix else told.replace(repr(own), repr(name), 1)


def _is_off(value: Any) -> bool:
    return value in (False, None, "auto", {}, []) or (isinstance(value, Mapping) and value.get("enabled") is False)

"""What a value of a configuration file may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
"""What stands in a file for a value that the script knows."""


@dataclass(frozen=True)
class Check:
    """A kind of value."""

    what: str
    """What is expected, for messages."""
    read: Callable[[Any], Any]
    """The value as it is used; raises ValueError if it is none of the kind."""

    def __call__(self, value: Any, name: str, where: str) -> Any:
        """The value as it is used.

        Args:
            value: What the file has.
            name: Its key, for messages.
            where: The file, for messages.

        Raises:
            ValueError: If it is none of the kind.

        """
        try:
            return self.read(value)
        except ValueError as error:
            detail = f": {error}" if str(error) else ""
            raise ValueError(f"Expected {name} in {where} to be {self.what}, got {value!r}{detail}.") from None


def _anything(value: Any) -> Any:
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _pair(value: Any) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError
    first, second = map(_number, value)
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError
    return first, second


ANYTHING = Check("anything", _anything)
FLAG = Check("true or false", _flag)
TEXT = Check("a text", _text)
BETAS = Check("two numbers from 0 to below 1", _pair)


def whole(least: int = 0, most: int | None = None) -> Check:
    """A whole number; JSON's ``5e8`` is one, too."""
    span = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def read(value: Any) -> int:
        number = _number(value)
        if number != int(number) or number < least or (most is not None and number > most):
            raise ValueError
        return int(number)

    return Check(span, read)


def _interval(value: Any) -> int | None:
    return None if value == math.inf else whole(1).read(value)


INTERVAL = Check("a whole number of at least 1, or Infinity", _interval)


def number(least: float = 0.0, most: float = math.inf, *, above: bool = False) -> Check:
    """A finite number; with ``above`` it must not be ``least`` itself."""
    span = f"a number {'above' if above else 'of at least'} {least:g}"
    if most != math.inf:
        span += f" and at most {most:g}"

    def read(value: Any) -> float:
        found = _number(value)
        if not least <= found <= most or (above and found == least):
            raise ValueError
        return found

    return Check(span, read)


ANY_NUMBER = Check("a finite number", _number)


def numbers(each: Check) -> Check:
    """One number, or a list with one for each group of parameters."""

    def read(value: Any) -> Any:
        return [each.read(part) for part in value] if isinstance(value, (list, tuple)) else each.read(value)

    return Check(f"{each.what}, or a list of such", read)


def one_of(*names: str) -> Check:
    """One of some words, in whatever case."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in names:
            raise ValueError
        return value.lower()

    return Check(f"one of {', '.join(map(repr, names))}", read)


def only(wanted: Any, otherwise: str) -> Check:
    """One value; with any other, training would be another one than the file describes."""

    def read(value: Any) -> Any:
        if value != wanted or isinstance(value, bool) is not isinstance(wanted, bool):
            raise ValueError(otherwise)
        return value

    return Check(repr(wanted).lower() if isinstance(wanted, bool) else repr(wanted), read)

"""Numbers of bytes, as people write them."""

from __future__ import annotations

_UNITS = ("B", "KB", "MB", "GB", "TB")


def parse_size(text: int | str) -> int:
    """Bytes, from a number of them or from ``"5GB"``: decimal units, as Hugging Face counts them.

    Raises:
        ValueError: If it is neither, or not positive.

    """
    if isinstance(text, int):
        size = text
    else:
        number = text.strip().upper()
        unit = next((unit for unit in reversed(_UNITS) if number.endswith(unit)), "")
        try:
            size = int(float(number.removesuffix(unit)) * 1000 ** _UNITS.index(unit or "B"))
        except (ValueError, OverflowError):
            size = 0
    if size <= 0:
        raise ValueError(f"Expected a size such as '5GB', '500MB' or a positive number of bytes, got {text!r}.")
    return size


def format_size(size: int) -> str:
    """Bytes for people: ``1.23 GB``."""
    value, unit = float(size), _UNITS[0]
    for following in _UNITS[1:]:
        if value < 1000:
            break
        value, unit = value / 1000, following
    return f"{size} B" if unit == "B" else f"{value:.2f} {unit}"

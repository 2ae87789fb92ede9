"""docs/from-deepspeed.md has every key, with what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from lightning_accel.deepspeed_config.keys import KEYS, Key, Kind
from lightning_accel.deepspeed_config.types import NOT_OFFERED, OPTIMIZERS, SCHEDULES

PAGE = Path(__file__).parents[2] / "docs" / "from-deepspeed.md"


def rows(keys: Mapping[str, Key], kind: Kind) -> list[str]:
    """The rows of the page's table of one kind: keys that share a reason share a row."""
    reasons: dict[str, list[str]] = {}
    for name, key in keys.items():
        if key.kind is kind:
            reasons.setdefault(key.why, []).append(f"`{name}`")
    return [f"| {', '.join(names)} | {why} |" for why, names in reasons.items()]


@pytest.mark.parametrize("kind", list(Kind))
def test_every_key_is_there(kind: Kind) -> None:
    missing = [row for row in rows(KEYS, kind) if row not in PAGE.read_text()]
    assert not missing, "\n".join(missing)


def test_every_type_is_there() -> None:
    text = PAGE.read_text().lower()
    missing = [name for name in (*OPTIMIZERS, *SCHEDULES, *NOT_OFFERED) if f"`{name.lower()}`" not in text]
    assert not missing
    for table in (*OPTIMIZERS.values(), *SCHEDULES.values()):
        assert not [name for name, key in table.items() if key.kind is not Kind.HONOURED and f"`{name}`" not in text]

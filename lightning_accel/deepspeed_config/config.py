"""A DeepSpeed configuration that was read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning_accel.deepspeed_config.keys import KEYS, Key, Kind
from lightning_accel.deepspeed_config.reading import checked, known_keys, load
from lightning_accel.deepspeed_config.values import AUTO

_Z = "zero_optimization"
SIZES = ("zero_hpz_partition_size", "mics_shard_size")
"""Keys of ``zero_optimization`` that say over how many ranks a copy is divided."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What a DeepSpeed configuration says.

    ``config["zero_optimization.stage"]`` is a value, or DeepSpeed's default if the file does not have it; ``name in
    config`` says whether it does.
    """

    where: str
    """The file's name, for messages."""
    values: Mapping[str, Any]
    """What the file has, by name; a section's name and a dot stand before each of its own."""
    keys: Mapping[str, Key]
    """What becomes of each."""

    @staticmethod
    def read(source: str | Path | Mapping[str, Any] | DeepSpeedConfig) -> DeepSpeedConfig:
        """Read a configuration.

        Args:
            source: A path to a JSON file, or what would be in it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not JSON (with line and column), has keys that DeepSpeed does not know (with the
                nearest ones) or has removed, or values that are none of their kind or contradict each other.
            TypeError: If it is neither a path nor names and values.

        """
        if isinstance(source, DeepSpeedConfig):
            return source
        found, where = load(source)
        values, keys = checked(found, where)
        config = DeepSpeedConfig(where, MappingProxyType(values), MappingProxyType(keys))
        _require_consistent(config)
        return config

    def __reduce__(self) -> tuple[Any, ...]:
        """Processes that are spawned get what the file says; the table of keys they have."""
        return _made_again, (self.where, dict(self.values))

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        if name in self.values:
            return self.values[name]
        return KEYS[name].default if name in KEYS else None

    def given(self, name: str) -> Any:
        """A value if the file has it, and it is not ``"auto"``; None otherwise."""
        value = self.values.get(name)
        return None if value == AUTO else value

    def params(self, part: str) -> dict[str, Any]:
        """The honoured parameters of the ``"optimizer"`` or the ``"scheduler"``, by their own names."""
        prefix = f"{part}.params."
        return {
            name[len(prefix) :]: value
            for name, value in self.values.items()
            if name.startswith(prefix) and self.keys[name].kind is Kind.HONOURED
        }

    @property
    def automatic(self) -> tuple[str, ...]:
        """The honoured keys whose value is still to be filled in."""
        return tuple(
            name for name, value in self.values.items() if value == AUTO and self.keys[name].kind is Kind.HONOURED
        )

    @property
    def left_out(self) -> dict[Kind, dict[str, tuple[str, ...]]]:
        """The file's keys that are not honoured: by kind, and by reason."""
        found: dict[Kind, dict[str, tuple[str, ...]]] = {}
        for name in self.values:
            key = self.keys[name]
            if key.kind is not Kind.HONOURED:
                reasons = found.setdefault(key.kind, {})
                reasons[key.why] = (*reasons.get(key.why, ()), name)
        return found

    def describe_left_out(self) -> str | None:
        """One message about all of the file's keys that are not honoured; None if all are."""
        found = self.left_out
        if not found:
            return None
        lines = [f"{self.where}: these keys of DeepSpeed's are not taken over."]
        for kind in (Kind.NOT_OFFERED, Kind.NO_CONSEQUENCE, Kind.REMOVED):
            for why, names in found.get(kind, {}).items():
                lines.append(f"  {kind.value}: {', '.join(names)}: {why}.")
        return "\n".join(lines)

    def with_values(self, changes: Mapping[str, Any]) -> DeepSpeedConfig:
        """The same with other values of keys that the file has.

        Raises:
            ValueError: If a value is none of its kind, or now contradicts another.

        """
        assert all(name in self.values for name in changes)
        values = {**self.values}
        for name, value in changes.items():
            values[name] = self.keys[name].check(value, name, self.where)
        config = DeepSpeedConfig(self.where, MappingProxyType(values), self.keys)
        _require_consistent(config)
        return config


def _made_again(where: str, values: dict[str, Any]) -> DeepSpeedConfig:
    known = known_keys({part: values.get(f"{part}.type") for part in ("optimizer", "scheduler")}, where)
    return DeepSpeedConfig(where, MappingProxyType(values), MappingProxyType({name: known[name] for name in values}))


def _require_consistent(config: DeepSpeedConfig) -> None:
    where, stage = config.where, config[f"{_Z}.stage"]
    if stage == AUTO:
        raise ValueError(f"Expected zero_optimization.stage 0, 1, 2 or 3 in {where}, got 'auto'.")
    bf16 = "bf16" if any(name.startswith("bf16.") for name in config.values) else "bfloat16"
    on = [name for name in ("fp16", bf16, "torch_autocast") if config[f"{name}.enabled"] is True]
    if len(on) > 1:
        raise ValueError(
            f"Expected one of fp16, bf16 and torch_autocast to be enabled in {where}, got {' and '.join(on)}."
        )
    for part, older, least in (("offload_optimizer", "cpu_offload", 1), ("offload_param", "cpu_offload_param", 3)):
        device = config[f"{_Z}.{part}.device"]
        if config[f"{_Z}.{older}"] is True:
            if device != "none":
                raise ValueError(f"Expected {part} or its older name {older} in {where}, got both. Leave out {older}.")
            device = "cpu"
        if device not in ("none", AUTO) and stage < least:
            shards = {0: "nothing", 1: "optimizer state", 2: "gradients and optimizer state"}[stage]
            raise ValueError(
                f"Expected zero_optimization.stage {least}{'' if least == 3 else ' to 3'} for {part} in {where}, got"
                f" {stage}, which shards {shards}."
            )
    if config[f"{_Z}.offload_optimizer.device"] == "nvme" and f"{_Z}.offload_optimizer.nvme_path" not in config:
        raise ValueError(
            f"Expected {_Z}.offload_optimizer.nvme_path in {where} with device 'nvme', got none. Say which folder."
        )
    sizes = {name: size for name in SIZES if (size := config[f"{_Z}.{name}"]) not in (AUTO, -1, 0, 1)}
    if sizes and stage != 3:
        raise ValueError(
            f"Expected zero_optimization.stage 3 for {' and '.join(sizes)} in {where}, got {stage}: only parameters"
            " that rest sharded have copies."
        )
    if len({*sizes.values()}) > 1:
        raise ValueError(
            f"Expected one number of ranks that divide a copy in {where}, got"
            f" {' and '.join(f'{name}={size}' for name, size in sizes.items())}."
        )
    if config["fp16.loss_scale"] == 0 and config["fp16.enabled"] is True:
        first, least = config["fp16.initial_scale_power"], config["fp16.min_loss_scale"]
        if AUTO not in (first, least) and least > 2**first:
            raise ValueError(
                f"Expected fp16.min_loss_scale to be at most 2^initial_scale_power in {where}, got {least} and"
                f" 2^{first}."
            )

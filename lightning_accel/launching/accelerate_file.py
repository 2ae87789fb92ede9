"""Configuration files of Hugging Face Accelerate: what they mean here.

Each key is one of three: taken over, of no consequence here (the engine does it anyway, or it is off), or left out,
which is said. Files that ask for another kind of training altogether are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_accel.launching.settings import describe_unknown

_MARKS = ("compute_environment", "distributed_type")
"""Keys that only Accelerate's files have."""

_SAME = ("debug", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
"""What has one name and one meaning in both."""

_REFUSED = {
    "XLA": "TPUs by torch_xla are not launched by this command",
    "TPU": "TPUs by torch_xla are not launched by this command",
    "MEGATRON_LM": "tensor and pipeline parallelism of Megatron-LM are not offered",
}
_ROW_OF_TYPE = {"NO": None, "MULTI_CPU": "accel_ddp", "MULTI_GPU": "accel_ddp"}
_ROW_OF_SHARDING = {
    "FULL_SHARD": "accel_fsdp",
    "SHARD_GRAD_OP": "accel_fsdp_partial",
    "NO_SHARD": "accel_ddp",
    "HYBRID_SHARD": "accel_fsdp_hybrid",
    "HYBRID_SHARD_ZERO2": "accel_fsdp_hybrid",
}
_ROW_OF_STAGE = {0: "accel_ddp", 1: "accel_zero1", 2: "accel_zero2", 3: "accel_zero3"}

# Nothing is lost without these: they say how something is done that is done otherwise, or always, or not at all.
_NO_CONSEQUENCE = {
    *("compute_environment", "same_network", "main_training_function"),
    *("tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env", "command_file", "commands"),
}
_FSDP_NO_CONSEQUENCE = {
    *("version", "backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states", "state_dict_type"),
    *("cpu_ram_efficient_loading", "limit_all_gathers"),
}
_DEEPSPEED_NO_CONSEQUENCE = {
    *("zero3_init_flag", "zero3_save_16bit_model"),
    *("offload_optimizer_nvme_path", "offload_param_nvme_path"),
}

_SHARD_SIZE = "lightning_accel.strategies.AccelFSDPStrategy(sharding='hybrid', shard_size=...) in the script says it"
_OFFLOAD = "say it in the script: AccelZeROStrategy(offload=...) or AccelFSDPStrategy(offload=...)"
_EACH = "run accel launch on each machine"
_FSDP_SAY = {
    "offload_params": _OFFLOAD,
    "activation_checkpointing": "say it in the script: AccelFSDPStrategy(activation_checkpointing=True)",
    "activation_checkpointing_offload": "activations are not offloaded",
    "auto_wrap_policy": "units are found by themselves; AccelFSDPStrategy(units=[...]) names others",
    "transformer_layer_cls_to_wrap": "units are found by themselves; AccelFSDPStrategy(units=[...]) names others",
    "min_num_params": "units are found by themselves; AccelFSDPStrategy(bucket_cap_mb=...) sets their size",
}
_SAY = {
    "downcast_bf16": "it is for TPUs",
    "enable_cpu_affinity": "ranks are not bound to cores",
    "fp8_config": "mixed_precision fp8 is by torchao, with its own settings",
    "dynamo_config": "say it in the script: compile=True of any strategy",
    "ipex_config": "there is nothing of Intel's extension for PyTorch here",
    "mpirun_config": "ranks are started by torchrun's agent on each machine",
    "rdzv_backend": "machines meet at main_process_ip and main_process_port",
}


@dataclass(frozen=True)
class Translated:
    """What a file means."""

    settings: dict[str, Any]
    """Ours, by name; not checked yet."""
    left_out: tuple[str, ...]
    """What has no place in them, one sentence for each."""


def is_one(found: Mapping[str, Any]) -> bool:
    """Whether a file is Accelerate's."""
    return any(mark in found for mark in _MARKS)


def translate(found: Mapping[str, Any], where: str) -> Translated:
    """What a file of Accelerate's means.

    Args:
        found: Its contents.
        where: Its name, for messages.

    Raises:
        ValueError: If it asks for what this package does not do, or has keys that Accelerate does not know.

    """
    return _Translation(found, where).result()


class _Translation:
    def __init__(self, found: Mapping[str, Any], where: str) -> None:
        self.found = found
        self.where = where
        kind = found.get("distributed_type", "NO")
        self.kind = "NO" if kind is False else str(kind).upper()  # YAML reads a bare NO as false
        self.settings: dict[str, Any] = {}
        self.left_out: list[str] = []

    def result(self) -> Translated:
        self._refuse()
        self.settings |= {name: self.found[name] for name in _SAME if self.found.get(name) is not None}
        if self.settings.get("main_process_port") == 0 and self.settings.get("num_machines", 1) == 1:
            del self.settings["main_process_port"]  # any that is free, as if nothing were said
        self._take_processes()
        self._take_precision()
        self._take_strategy()
        self._name_the_rest()
        return Translated(self.settings, tuple(self.left_out))

    def _refuse(self) -> None:
        environment = self.found.get("compute_environment", "LOCAL_MACHINE")
        if environment != "LOCAL_MACHINE":
            raise ValueError(f"Expected compute_environment LOCAL_MACHINE in {self.where}, got {environment}.")
        if self.kind not in (*_ROW_OF_TYPE, "FSDP", "DEEPSPEED"):
            why = _REFUSED.get(self.kind, "there is no such kind of training here")
            raise ValueError(
                f"Expected distributed_type {', '.join(_ROW_OF_TYPE)}, FSDP or DEEPSPEED in {self.where}, got"
                f" {self.kind}: {why}."
            )
        known = {*_MARKS, *_SAME, *_NO_CONSEQUENCE, *_SAY, *_TAKEN}
        unknown = [str(key) for key in self.found if key not in known]
        if unknown:
            raise ValueError(f"Expected keys of Accelerate in {self.where}, got {describe_unknown(unknown, known)}.")
        for name, value in self._part("parallelism_config").items():
            if name.endswith(("tp_size", "cp_size", "sp_size")) and value not in (None, 1):
                raise ValueError(
                    f"Expected {name} 1 in {self.where}, got {value}: tensor, context and sequence parallelism are not"
                    " offered."
                )

    def _take_processes(self) -> None:
        processes = self.found.get("num_processes", 1 if self.kind == "NO" else None)
        if processes not in (None, -1):  # -1: the command line says it
            self.settings["num_processes"] = processes
        if self.kind == "MULTI_CPU" or self.found.get("use_cpu"):
            self.settings["cpu"] = True
        gpus = self.found.get("gpu_ids")
        if gpus is not None and not self.settings.get("cpu"):
            self.settings["gpu_ids"] = str(gpus)

    def _take_precision(self) -> None:
        precision = self.found.get("mixed_precision", "fp16" if self.found.get("fp16") else None)
        if precision is not None:
            # YAML reads a bare no as false.
            self.settings["mixed_precision"] = "no" if precision is False else precision

    def _take_strategy(self) -> None:
        if self.kind == "FSDP":
            row: str | None = self._fsdp()
        elif self.kind == "DEEPSPEED":
            row = self._deepspeed()
        else:
            row = _ROW_OF_TYPE[self.kind]
        if row is not None:
            self.settings["strategy"] = row

    def _fsdp(self) -> str:
        config = {name.removeprefix("fsdp_"): value for name, value in self._part("fsdp_config").items()}
        version = config.get("version") or 1
        older, asked = config.pop("sharding_strategy", None), config.pop("reshard_after_forward", None)
        sharding = older if asked is None else asked
        if str(version) == "2" or isinstance(sharding, bool):
            row = "accel_fsdp_partial" if str(sharding).lower() == "false" else "accel_fsdp"
            row = self._copies(row)
        else:
            name = "FULL_SHARD" if sharding is None else str(sharding).upper()
            if name.isdigit() and 1 <= int(name) <= len(_ROW_OF_SHARDING):  # older files count them from 1
                name = [*_ROW_OF_SHARDING][int(name) - 1]
            if name not in _ROW_OF_SHARDING:
                raise ValueError(
                    f"Expected fsdp_sharding_strategy in {self.where} to be one of {', '.join(_ROW_OF_SHARDING)}, got"
                    f" {sharding!r}."
                )
            row = _ROW_OF_SHARDING[name]
            if name == "HYBRID_SHARD_ZERO2":
                self.left_out.append(f"{name}: taken as HYBRID_SHARD, whose parameters are gathered again in backward.")
        self._name("fsdp_", config, _FSDP_NO_CONSEQUENCE, _FSDP_SAY)
        return row

    def _copies(self, row: str) -> str:
        config = {name.removeprefix("parallelism_config_"): v for name, v in self._part("parallelism_config").items()}
        copies, shard = config.get("dp_replicate_size") or 1, config.get("dp_shard_size") or 1
        if not isinstance(copies, int) or not isinstance(shard, int):
            raise ValueError(
                f"Expected whole numbers as dp_replicate_size and dp_shard_size in {self.where}, got {copies!r} and"
                f" {shard!r}."
            )
        if copies == 1:
            return row
        if shard == 1:
            return "accel_ddp"
        processes, machines = self.found.get("num_processes"), self.found.get("num_machines") or 1
        if processes != shard * machines:
            self.left_out.append(f"dp_shard_size={shard}: a copy is divided over one machine; {_SHARD_SIZE}.")
        return "accel_fsdp_hybrid"

    def _deepspeed(self) -> str | None:
        config = self._part("deepspeed_config")
        for key in ("offload_optimizer_device", "offload_param_device"):
            if str(config.get(key) or "none").lower() == "none":
                config.pop(key, None)
        if config.get("deepspeed_multinode_launcher") == "standard":  # which is that
            del config["deepspeed_multinode_launcher"]
        launchers = dict.fromkeys(("deepspeed_multinode_launcher", "deepspeed_hostfile"), _EACH)
        path = config.pop("deepspeed_config_file", None)
        if path not in (None, "none"):
            self.settings["deepspeed_config"] = path
            says = dict.fromkeys(config, f"{path} says it") | launchers
            self._name("", config, _DEEPSPEED_NO_CONSEQUENCE, says)
            return None
        stage = config.pop("zero_stage", 2)
        if not isinstance(stage, int) or stage not in _ROW_OF_STAGE:
            raise ValueError(f"Expected zero_stage 0 to 3 in {self.where}, got {stage!r}.")
        for ours in ("gradient_accumulation_steps", "gradient_clipping"):
            value = config.pop(ours, None)
            if value not in (None, "auto", 0, 0.0):
                self.settings[ours] = value
        if "gradient_clipping" in self.settings:
            self.left_out.append(
                f"gradient_clipping={self.settings['gradient_clipping']}: taken over for Lightning's Trainer; a loop"
                " of its own calls clip_grad_norm_."
            )
        say = dict.fromkeys(("offload_optimizer_device", "offload_param_device"), _OFFLOAD)
        self._name("", config, _DEEPSPEED_NO_CONSEQUENCE, say | launchers)
        return _ROW_OF_STAGE[stage]

    def _name_the_rest(self) -> None:
        rest = {key: value for key, value in self.found.items() if key in _SAY}
        if rest.get("rdzv_backend") == "static":
            del rest["rdzv_backend"]
        backend = self.found.get("dynamo_backend")
        if backend not in (None, False, "no", "NO"):
            rest["dynamo_config"] = {"dynamo_backend": backend}
        compiler = rest.get("dynamo_config")
        if isinstance(compiler, dict) and str(compiler.get("dynamo_backend", "no")).lower() in ("no", "false"):
            del rest["dynamo_config"]
        intel = rest.get("ipex_config")
        if isinstance(intel, dict) and not any(intel.values()):
            del rest["ipex_config"]
        self._name("", rest, set(), _SAY)

    def _name(self, prefix: str, config: Mapping[str, Any], no_consequence: set[str], say: Mapping[str, str]) -> None:
        for name, value in config.items():
            if name in no_consequence or value in (None, False, "no", "NO_WRAP", {}, []):
                continue
            why = say.get(name, "it is not known here")
            shown = "" if isinstance(value, (dict, list)) else f"={value}"
            self.left_out.append(f"{prefix}{name}{shown}: {why}.")

    def _part(self, name: str) -> dict[str, Any]:
        return _names_and_values(self.found.get(name), name, self.where)


def _names_and_values(part: object, name: str, where: str) -> dict[str, Any]:
    """A copy of a part of a file; what is empty may be missing."""
    if not part:
        return {}
    if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
        raise ValueError(f"Expected names and values as {name} in {where}, got {part!r}.")
    return dict(part)


_TAKEN: tuple[str, ...] = (
    *("num_processes", "use_cpu", "gpu_ids", "mixed_precision", "fp16", "dynamo_backend"),
    *("fsdp_config", "deepspeed_config", "parallelism_config", "megatron_lm_config"),
)
"""What has a place in our settings, under another name or within."""

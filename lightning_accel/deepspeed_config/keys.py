"""Every key that DeepSpeed 0.19.8 knows, and what becomes of it here.

Each is one of four. Honoured: it means the same here, or as near to it as the table says. Of no consequence: what it
sets is done always, or otherwise, or not at all, with the same result. Not offered: what it asks for is not done.
Removed: DeepSpeed itself refuses it. `docs/from-deepspeed.md` is held against this table by a test.

Sections that nothing is taken from (pipelines, autotuning, ...) have one entry, and what is in them is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lightning_accel.deepspeed_config.values import ANYTHING, FLAG, INTERVAL, TEXT, Check, number, one_of, only, whole


class Kind(Enum):
    """What becomes of a key."""

    HONOURED = "honoured"
    NO_CONSEQUENCE = "of no consequence here"
    NOT_OFFERED = "not offered here"
    REMOVED = "removed from DeepSpeed"


@dataclass(frozen=True)
class Key:
    """What becomes of one key."""

    kind: Kind
    why: str
    """What it becomes here, or why it does not."""
    check: Check = ANYTHING
    default: Any = None
    """What DeepSpeed takes where it is not given."""


KEYS: dict[str, Key] = {}
"""By name; what is in a section has the section's name and a dot before its own."""


def _honoured(name: str, why: str, check: Check, default: Any = None) -> None:
    KEYS[name] = Key(Kind.HONOURED, why, check, default)


def _many(kind: Kind, why: str, section: str, names: str | Iterable[str], check: Check = ANYTHING) -> None:
    for name in names.split() if isinstance(names, str) else names:
        KEYS[f"{section}.{name}" if section else name] = Key(kind, why, check)


def _no_consequence(why: str, section: str, names: str, check: Check = ANYTHING) -> None:
    _many(Kind.NO_CONSEQUENCE, why, section, names, check)


def _not_offered(why: str, section: str, names: str, check: Check = ANYTHING) -> None:
    _many(Kind.NOT_OFFERED, why, section, names, check)


# ------------------------------------------------------------------------------------------------------ batches
_honoured("train_batch_size", "must be micro-batch × accumulation × ranks", whole(1))
_honoured("train_micro_batch_size_per_gpu", "must be the DataLoader's batch size", whole(1))
_honoured("gradient_accumulation_steps", "the Trainer's accumulate_grad_batches", whole(1))
_honoured("gradient_clipping", "the Trainer's gradient_clip_val, by norm; 0 is none", number(), 1.0)
_no_consequence(
    "Lightning counts micro-batches, and a short last window is the mean of what was there",
    "",
    "managed_gradient_accumulation",
)

# ---------------------------------------------------------------------------------------- optimizer, scheduler
_honoured("optimizer.type", "the optimizer's class, if configure_optimizers gives none", TEXT)
_no_consequence("it chooses between kernels of DeepSpeed's", "optimizer", "legacy_fusion")
_honoured("scheduler.type", "the schedule's class, if configure_optimizers gives none", TEXT)
_no_consequence(
    "any optimizer is accepted; the engine says if one cannot be divided",
    "",
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
)

# ---------------------------------------------------------------------------------------------------- precision
_honoured("fp16.enabled", "fp16 to compute with and fp32 master values", FLAG, False)
_honoured("fp16.loss_scale", "a static loss scale; 0: a dynamic one", number(), 0.0)
_honoured("fp16.initial_scale_power", "init_scale = 2^this", whole(0, 126), 16)
_honoured("fp16.loss_scale_window", "growth_interval of the scaler", whole(1), 1000)
_honoured("fp16.hysteresis", "hysteresis of the scaler", whole(1), 2)
_honoured("fp16.consecutive_hysteresis", "consecutive_hysteresis of the scaler", FLAG, False)
_honoured("fp16.min_loss_scale", "min_scale of the scaler; an overflow there is an error", whole(1), 1)
_no_consequence("inputs are converted to what is computed in always", "fp16", "auto_cast", FLAG)
_not_offered("master values are fp32", "fp16", "fp16_master_weights_and_grads", FLAG)
for _section in ("bf16", "bfloat16"):
    _honoured(f"{_section}.enabled", "bf16 to compute with and fp32 master values", FLAG, False)
    _honoured(f"{_section}.check_grad_overflow", "steps with gradients that are not finite are skipped", FLAG, True)
    _no_consequence("gradients are added up as they come always", _section, "immediate_grad_update", FLAG)
    _not_offered("master values are fp32", _section, "bf16_master_weights_and_grads", FLAG)
    _not_offered("optimizer state is of the master values' dtype", _section, "bf16_optimizer_states", FLAG)
    _no_consequence("the older name of check_grad_overflow, which DeepSpeed ignores", _section, "check_overflow")
_honoured("torch_autocast.enabled", "torch.autocast instead of a model of 16 bits", FLAG, False)
_honoured(
    "torch_autocast.dtype",
    "what autocast computes in",
    one_of("bfloat16", "bf16", "torch.bfloat16", "float16", "fp16", "half", "torch.float16"),
    "bfloat16",
)
_not_offered("torch.autocast decides by operation", "torch_autocast", "lower_precision_safe_modules")
_honoured("communication_data_type", "reduce_dtype", one_of("fp32", "fp16", "bf16"))
_not_offered("the accumulation dtype is that of the master values", "data_types", "grad_accum_dtype")
_not_offered("say it with AccelPrecision", "data_types", "param_dtype buffer_dtype keep_in_fp32_modules")
_not_offered("sequence parallelism is not offered", "", "seq_parallel_communication_data_type")
_no_consequence(
    "the mean over ranks is the same; only roundings differ",
    "",
    "prescale_gradients gradient_predivide_factor",
)
_honoured(
    "gradient_allreduce_op",
    "gradients are the mean over ranks",
    only("mean", "gradients are averaged over ranks; multiply the loss by their number for a sum"),
    "mean",
)

# --------------------------------------------------------------------------------------------------------- ZeRO
_Z = "zero_optimization"
_honoured(f"{_Z}.stage", "0: ddp, 1: zero1, 2: zero2, 3: fsdp", whole(0, 3), 0)
_honoured(f"{_Z}.zero_hpz_partition_size", "fsdp_hybrid with this shard_size", whole(0), 1)
_honoured(f"{_Z}.mics_shard_size", "fsdp_hybrid with this shard_size (removed from DeepSpeed)", whole(-1), -1)
_honoured(f"{_Z}.reduce_bucket_size", "elements; bucket_cap_mb, which it lowers and never raises", whole(1))
_honoured(f"{_Z}.allgather_bucket_size", "as reduce_bucket_size, at stages 1 and 2", whole(0))
for _name in ("stage3_prefetch_bucket_size", "prefetch_bucket_size"):
    _honoured(f"{_Z}.{_name}", "as reduce_bucket_size, at stage 3: one bucket is gathered ahead", whole(0))
_honoured(f"{_Z}.cpu_offload", "offload='optimizer' (older name)", FLAG, False)
_honoured(f"{_Z}.cpu_offload_param", "offload='parameters' (older name)", FLAG, False)
for _part, _becomes in (("offload_optimizer", "offload='optimizer'"), ("offload_param", "offload='parameters'")):
    _honoured(f"{_Z}.{_part}.device", f"cpu and nvme: {_becomes}", one_of("none", "cpu", "nvme"), "none")
    _no_consequence("host memory is pinned where there is a device", f"{_Z}.{_part}", "pin_memory", FLAG)
    _no_consequence("files are mapped; there is no pool of buffers", f"{_Z}.{_part}", "buffer_count", whole(0))
_honoured(f"{_Z}.offload_optimizer.nvme_path", "offload_dir, with device nvme", TEXT)
_no_consequence("parameters stay in host memory", f"{_Z}.offload_param", "nvme_path buffer_size max_in_cpu")
_no_consequence(
    "the system reads and writes mapped files by itself",
    f"{_Z}.offload_optimizer",
    "pipeline_read pipeline_write pipeline fast_init",
)
_not_offered("all of the state is offloaded", f"{_Z}.offload_optimizer", "ratio", number(0.0, 1.0))
_not_offered("it is for one kind of machine", f"{_Z}.offload_optimizer", "super_offload cpuadam_cores_perc")
_no_consequence("host memory is pinned where there is a device", _Z, "cpu_offload_use_pin_memory")
_no_consequence("gradients are views of flat buffers always", _Z, "contiguous_gradients", FLAG)
_no_consequence("the row says what is reduced and how", _Z, "reduce_scatter use_multi_rank_bucket_allreduce", FLAG)
_no_consequence("one gather for each bucket always", _Z, "allgather_partitions stage3_allgather_sequential", FLAG)
_no_consequence("one gather for each bucket always", _Z, "allgather_sequential", FLAG)
_no_consequence("reductions overlap backward always", _Z, "overlap_comm")
_no_consequence("the norm is computed where clipping wants it", _Z, "compute_grad_norm", FLAG)
_no_consequence("checkpoints hold the fp32 master values", _Z, "load_from_fp32_weights", FLAG)
_no_consequence("every checkpoint loads at any number of ranks", _Z, "elastic_checkpoint", FLAG)
_no_consequence("offloaded state is updated segment by segment", _Z, "sub_group_size")
_no_consequence(
    "small parameters travel together with their unit",
    _Z,
    "stage3_param_persistence_threshold param_persistence_threshold stage3_model_persistence_threshold"
    " model_persistence_threshold",
)
_no_consequence(
    "parameters of a unit are freed after it",
    _Z,
    "stage3_max_live_parameters max_live_parameters stage3_max_reuse_distance max_reuse_distance",
)
_no_consequence(
    "checkpoints are sharded, and accel convert makes one file of them",
    _Z,
    "stage3_gather_16bit_weights_on_model_save gather_16bit_weights_on_model_save"
    " stage3_gather_fp16_weights_on_model_save",
)
_no_consequence(
    "units=[...] of the strategy says what is gathered together",
    _Z,
    "stage3_module_granularity_threshold module_granularity_threshold leaf_module",
)
_no_consequence(
    "a unit's parameters are gathered in one operation always",
    _Z,
    "stage3_use_all_reduce_for_fetch_params use_all_reduce_for_fetch_params",
)
_no_consequence("unused parameters are always found", _Z, "ignore_unused_parameters", FLAG)
_no_consequence("there is one way to do it", _Z, "legacy_stage1 round_robin_gradients parameter_alignment")
_no_consequence("layers are left as they are", _Z, "memory_efficient_linear override_module_apply")
_no_consequence(
    "it is for DeepSpeed's own checks and files",
    _Z,
    "log_trace_cache_warnings enable_sanity_checks pipeline_loading_checkpoint save_muon_momentum_buffer_in_memory",
)
_not_offered(
    "nothing is quantised on the wire; reduce_dtype halves it",
    _Z,
    "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients",
)
_not_offered("state is updated by the step that it belongs to", _Z, "zenflow")

# -------------------------------------------------------------------------------------- activation checkpointing
_A = "activation_checkpointing"
_honoured(f"{_A}.number_checkpoints", "if not 0, each block's activations are computed again", whole(0))
_honoured(f"{_A}.partition_activations", "each block's activations are computed again", FLAG, False)
_honoured(f"{_A}.cpu_checkpointing", "each block's activations are computed again; none are offloaded", FLAG, False)
_no_consequence(
    "torch.utils.checkpoint manages its memory",
    _A,
    "contiguous_memory_optimization synchronize_checkpoint_boundary profile",
)

# ----------------------------------------------------------------------------------------- reports, checkpoints
_SHOWN = "the engine's report (bytes at rest, the last step's messages) is shown at the end of a fit"
_honoured("memory_breakdown", _SHOWN, FLAG, False)
_honoured("comms_logger.enabled", _SHOWN, FLAG, False)
_no_consequence("all operations are counted, on every rank", "comms_logger", "verbose prof_all prof_ops debug")
_honoured(
    "wall_clock_breakdown",
    "that report has the times of forward, backward, update and waiting, too, of this rank and the slowest",
    FLAG,
    False,
)
_F = "flops_profiler"
_honoured(f"{_F}.enabled", "operations are counted as they run, by module, and the next step is timed", FLAG, False)
_honoured(f"{_F}.profile_step", "how many steps of this run come before the one that is counted", whole(0), 1)
_honoured(f"{_F}.module_depth", "of the innermost modules that are listed; -1: of all", whole(-1), -1)
_honoured(f"{_F}.top_modules", "how many modules of each depth are named as the largest", whole(1), 1)
_honoured(f"{_F}.detailed", "whether modules are listed one by one", FLAG, True)
_honoured(f"{_F}.output_file", "where rank 0 writes it, instead of to the screen", TEXT)
_no_consequence("what is computed again is counted as it runs", _F, "recompute_fwd_factor", number())
_honoured("steps_per_print", "steps between such reports; without one of the three it does nothing", INTERVAL)
_no_consequence("the progress bar and loggers tell", "", "dump_state log_level")
_no_consequence("Lightning's progress bar tells", "timers", "throughput")
for _section in ("tensorboard", "wandb", "csv_monitor", "comet"):
    _not_offered("Trainer(logger=...) says it", "", _section)
_not_offered(
    "checkpoints are the Trainer's or Fabric's; async_save=True of the strategy", "", "checkpoint datastates_ckpt"
)
_no_consequence("files are mapped, by the system", "", "aio")

# -------------------------------------------------------------------------------------------------------- others
_no_consequence("the DataLoader says it", "", "dataloader_drop_last", FLAG)
_no_consequence("it is a hint of DeepSpeed's", "", "vocabulary_size disable_python_gc")
_no_consequence("updated parameters are gathered always", "", "disable_allgather allgather_size")
_not_offered("compile=True of the strategy", "", "compile")
_not_offered(
    "tensor, sequence, expert and pipeline parallelism are not offered",
    "",
    (
        "tensor_parallel expert_parallel pipeline sequence_parallel_size data_parallel_size"
        " use_data_before_expert_parallelism"
    ),
)
_not_offered("it is another program's work", "", "autotuning hybrid_engine weight_quantization")
_not_offered("the DataLoader and its sampler say it", "", "data_efficiency")

# ------------------------------------------------------------------------------------------------------- removed
for _name, _instead in {
    "amp": "use fp16 or bf16, or torch_autocast",
    "elasticity": "use train_batch_size, train_micro_batch_size_per_gpu and gradient_accumulation_steps",
    "compression_training": "leave it out",
    "sparse_gradients": "leave it out: gradients are dense",
    "quantize_training": "leave it out",
    "eigenvalue": "leave it out",
    "sparse_attention": "leave it out: attention is the model's",
    "progressive_layer_drop": "leave it out: layers are the model's",
    "curriculum_learning": "leave it out: the DataLoader and its sampler say it",
    "graph_harvesting": "leave it out",
    "nebula": "leave it out: checkpoints are the Trainer's or Fabric's",
    f"{_Z}.mics_hierarchical_params_gather": "leave it out",
    f"{_Z}.zeropp_loco_param": "leave it out",
}.items():
    KEYS[_name] = Key(Kind.REMOVED, _instead)

SECTIONS = frozenset(
    {name[:place] for name in KEYS for place, sign in enumerate(name) if sign == "."}
    | {"optimizer.params", "scheduler.params"}
)
"""What has names and values in it; ``params`` those of the chosen type."""

"""What files of Hugging Face Accelerate mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_accel.launching.settings_file import Found, read

# As `accelerate config` writes them.
BASE = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: {kind}
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: {precision}
num_machines: 1
num_processes: {processes}
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: {cpu}
"""
FSDP1 = """
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_cpu_ram_efficient_loading: true
  fsdp_forward_prefetch: false
  fsdp_offload_params: true
  fsdp_sharding_strategy: SHARD_GRAD_OP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_sync_module_states: true
  fsdp_transformer_layer_cls_to_wrap: BertLayer
  fsdp_use_orig_params: true
"""
FSDP2 = """
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: NO_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: {reshard}
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_version: 2
"""
DEEPSPEED = """
deepspeed_config:
  gradient_accumulation_steps: 4
  gradient_clipping: 1.0
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: {stage}
"""


def found(folder: Path, text: str) -> Found:
    (folder / "accelerate.yaml").write_text(text)
    return read(folder / "accelerate.yaml")


def base(kind: str, precision: str = "'no'", processes: int = 2, cpu: str = "false") -> str:
    return BASE.format(kind=kind, precision=precision, processes=processes, cpu=cpu)


def test_several_cpus(tmp_path: Path) -> None:
    result = found(tmp_path, base("MULTI_CPU", cpu="true"))
    assert result.settings.changed() == {
        "num_processes": 2,
        "cpu": True,
        "mixed_precision": "no",
        "strategy": "accel_ddp",
    }
    assert result.left_out == ()


def test_one_process(tmp_path: Path) -> None:
    settings = found(tmp_path, "distributed_type: 'NO'\nmixed_precision: no\ngpu_ids: all\n").settings
    assert settings.changed() == {"num_processes": 1, "mixed_precision": "no"}


def test_several_machines_with_gpus(tmp_path: Path) -> None:
    text = base("MULTI_GPU", "bf16", 8).replace("num_machines: 1", "num_machines: 2").replace("_rank: 0", "_rank: 1")
    text = (
        text.replace("debug: false", "debug: true")
        + "gpu_ids: 0,1,2,3\nmain_process_ip: 10.0.0.1\nmain_process_port: 29501\n"
    )
    assert found(tmp_path, text).settings.changed() == {
        "num_processes": 8,
        "num_machines": 2,
        "machine_rank": 1,
        "main_process_ip": "10.0.0.1",
        "main_process_port": 29_501,
        "gpu_ids": "0,1,2,3",
        "mixed_precision": "bf16",
        "strategy": "accel_ddp",
        "debug": True,
    }


def test_first_fsdp(tmp_path: Path) -> None:
    result = found(tmp_path, base("FSDP", "fp16") + FSDP1)
    assert (result.settings.strategy, result.settings.mixed_precision) == ("accel_fsdp_partial", "fp16")
    named = [sentence.partition(":")[0] for sentence in result.left_out]
    assert named == [
        "fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
        "fsdp_offload_params=True",
        "fsdp_transformer_layer_cls_to_wrap=BertLayer",
    ]


@pytest.mark.parametrize(
    ("sharding", "row"),
    [
        ("FULL_SHARD", "accel_fsdp"),
        ("1", "accel_fsdp"),
        ("2", "accel_fsdp_partial"),
        ("NO_SHARD", "accel_ddp"),
        ("HYBRID_SHARD", "accel_fsdp_hybrid"),
        ("HYBRID_SHARD_ZERO2", "accel_fsdp_hybrid"),
    ],
)
@pytest.mark.parametrize("key", ["fsdp_sharding_strategy", "fsdp_reshard_after_forward"])
def test_kinds_of_sharding(tmp_path: Path, key: str, sharding: str, row: str) -> None:
    result = found(tmp_path, base("FSDP") + f"fsdp_config:\n  {key}: {sharding}\n")
    assert result.settings.strategy == row
    assert bool(result.left_out) == (sharding == "HYBRID_SHARD_ZERO2")


@pytest.mark.parametrize(("reshard", "row"), [("true", "accel_fsdp"), ("false", "accel_fsdp_partial")])
def test_second_fsdp(tmp_path: Path, reshard: str, row: str) -> None:
    result = found(tmp_path, base("FSDP") + FSDP2.format(reshard=reshard))
    assert result.settings.strategy == row
    assert result.left_out == (
        "fsdp_activation_checkpointing=True: say it in the script: AccelFSDPStrategy(activation_checkpointing=True).",
    )


@pytest.mark.parametrize(
    ("sizes", "row", "said"),
    [
        ({"dp_replicate_size": 1, "dp_shard_size": 8}, "accel_fsdp", False),
        ({"dp_replicate_size": 8, "dp_shard_size": 1}, "accel_ddp", False),
        ({"dp_replicate_size": 2, "dp_shard_size": 4}, "accel_fsdp_hybrid", True),
    ],
)
def test_copies(tmp_path: Path, sizes: dict[str, int], row: str, said: bool) -> None:
    config = {f"parallelism_config_{name}": size for name, size in sizes.items()}
    text = base("FSDP", processes=8) + FSDP2.format(reshard="true") + yaml.safe_dump({"parallelism_config": config})
    result = found(tmp_path, text)
    assert result.settings.strategy == row
    assert any("dp_shard_size=4: a copy is divided over one machine" in text for text in result.left_out) == said


@pytest.mark.parametrize(
    ("stage", "row"), [(0, "accel_ddp"), (1, "accel_zero1"), (2, "accel_zero2"), (3, "accel_zero3")]
)
def test_deepspeed(tmp_path: Path, stage: int, row: str) -> None:
    result = found(tmp_path, base("DEEPSPEED", "bf16") + DEEPSPEED.format(stage=stage))
    settings = result.settings
    assert (settings.strategy, settings.mixed_precision) == (row, "bf16")
    assert (settings.gradient_accumulation_steps, settings.gradient_clipping) == (4, 1.0)
    clipping, offload = result.left_out
    assert clipping.startswith("gradient_clipping=1.0: taken over for Lightning's Trainer")
    assert offload.startswith("offload_optimizer_device=cpu: say it in the script: AccelZeROStrategy(offload=")


def test_a_file_of_deepspeed_is_passed_on(tmp_path: Path) -> None:
    text = base("DEEPSPEED", "bf16") + "deepspeed_config:\n  deepspeed_config_file: ds.json\n  zero3_init_flag: true\n"
    result = found(tmp_path, text)
    assert (result.settings.deepspeed_config, result.settings.strategy) == ("ds.json", None)
    assert result.settings.mixed_precision == "bf16"
    assert not any("deepspeed" in sentence or "zero" in sentence for sentence in result.left_out)
    beside = found(tmp_path, text + "  zero_stage: 3\n  offload_param_device: none\n").left_out
    assert [sentence for sentence in beside if "ds.json" in sentence] == ["zero_stage=3: ds.json says it."]


def test_what_cannot_be_taken_over_is_named(tmp_path: Path) -> None:
    text = base("MULTI_GPU").replace("static", "c10d")
    text += "dynamo_config:\n  dynamo_backend: INDUCTOR\nmpirun_config: {}\nfp8_config: {backend: TE}\n"
    named = {sentence.partition(":")[0] for sentence in found(tmp_path, text).left_out}
    assert named == {"rdzv_backend=c10d", "dynamo_config", "fp8_config"}
    assert found(tmp_path, base("MULTI_GPU") + "dynamo_config:\n  dynamo_backend: 'NO'\n").left_out == ()


def test_launchers_and_extensions_are_named(tmp_path: Path) -> None:
    text = base("DEEPSPEED") + DEEPSPEED.format(stage=2) + "  deepspeed_hostfile: hosts\n"
    result = found(tmp_path, text + "  deepspeed_multinode_launcher: pdsh\nipex_config: {ipex: true}\n")
    assert "deepspeed_multinode_launcher=pdsh: run accel launch on each machine." in result.left_out
    assert "deepspeed_hostfile=hosts: run accel launch on each machine." in result.left_out
    assert any(sentence.startswith("ipex_config:") for sentence in result.left_out)
    quiet = "  deepspeed_multinode_launcher: standard\nipex_config: {ipex: false, use_xpu: false}\n"
    result = found(tmp_path, base("DEEPSPEED") + DEEPSPEED.format(stage=2) + quiet)
    assert not any("launcher" in sentence or "ipex" in sentence for sentence in result.left_out)


def test_what_yaml_and_accelerate_write_in_other_ways(tmp_path: Path) -> None:
    settings = found(tmp_path, "distributed_type: NO\nmain_process_port: 0\nmixed_precision: no\n").settings
    assert settings.changed() == {"num_processes": 1, "mixed_precision": "no"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (base("DEEPSPEED") + "deepspeed_config: {zero_stage: [2]}\n", "Expected zero_stage 0 to 3"),
        (base("MULTI_GPU", precision="[bf16]"), "Expected mixed_precision to be one of no, fp16, bf16, fp8, got"),
        (base("MULTI_GPU") + "main_process_ip: [a]\n", "Expected main_process_ip to be text, got ['a']"),
        (
            base("FSDP") + FSDP2.format(reshard="true") + "parallelism_config: {dp_replicate_size: [2]}\n",
            "Expected whole numbers as dp_replicate_size and dp_shard_size",
        ),
        (base("MEGATRON_LM"), "got MEGATRON_LM: tensor and pipeline parallelism of Megatron-LM are not offered"),
        (base("XLA"), "got XLA: TPUs by torch_xla are not launched by this command"),
        (base("MULTI_NPU"), "got MULTI_NPU: there is no such kind of training here"),
        ("compute_environment: AMAZON_SAGEMAKER\n", "Expected compute_environment LOCAL_MACHINE"),
        (base("MULTI_GPU") + "num_procesess: 3\n", "got 'num_procesess' (did you mean 'num_processes'?)"),
        (base("FSDP") + "fsdp_config: {fsdp_sharding_strategy: HALF}\n", "to be one of FULL_SHARD, SHARD_GRAD_OP"),
        (base("DEEPSPEED") + "deepspeed_config: {zero_stage: 4}\n", "Expected zero_stage 0 to 3"),
        (
            base("DEEPSPEED") + "deepspeed_config: {deepspeed_config_file: [a]}\n",
            "Expected deepspeed_config to be text",
        ),
        (base("FSDP") + "fsdp_config: 3\n", "Expected names and values as fsdp_config"),
        (base("FSDP") + "parallelism_config: {parallelism_config_tp_size: 2}\n", "tensor, context and sequence"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        found(tmp_path, text)
    assert message in str(caught.value)


def test_every_key_that_accelerate_writes_is_known(tmp_path: Path) -> None:
    """A new release of it may have more."""
    config_args = pytest.importorskip("accelerate.commands.config.config_args", reason="needs accelerate")
    names = set(config_args.ClusterConfig.__dataclass_fields__)
    for name in names - {"compute_environment", "distributed_type"}:
        found(tmp_path, f"distributed_type: 'NO'\n{name}: null\n")

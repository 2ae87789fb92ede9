"""What accel_deepspeed says before DeepSpeed is asked: DeepSpeed need not be installed for these."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import StrategyRegistry
from models import Regression

from lightning_accel.strategies import AccelDeepSpeedStrategy, deepspeed_installed, fabric
from lightning_accel.strategies.deepspeed_precision import EnginePrecision, EngineRounding
from lightning_accel.strategies.deepspeed_told import EngineFile

KINDS = (AccelDeepSpeedStrategy, fabric.AccelDeepSpeedStrategy)


@pytest.fixture
def installed() -> Any:
    """Has the strategies believe that DeepSpeed is there."""
    with patch.object(deepspeed_installed, "version", lambda _: "0.19.8"):
        yield


def in_fabric(strategy: Any = "accel_deepspeed", **arguments: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, strategy=strategy, **arguments)


def trainer(strategy: Any = "accel_deepspeed", **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, **quiet, **arguments)


def test_without_deepspeed_the_strategy_says_what_to_install() -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    with patch.object(deepspeed_installed, "version", missing):
        for make in (AccelDeepSpeedStrategy, trainer, fabric.AccelDeepSpeedStrategy, in_fabric):
            with pytest.raises(ModuleNotFoundError, match=r"deepspeed>=0\.19\.8 .* found none.*lightning-accel\[deep"):
                make()
    with (
        patch.object(deepspeed_installed, "version", lambda _: "0.18.2"),
        pytest.raises(ModuleNotFoundError, match="0.18.2"),
    ):
        AccelDeepSpeedStrategy()


def test_names() -> None:
    for suffix in ("", "_spawn", "_fork", "_notebook"):
        assert f"accel_deepspeed{suffix}" in StrategyRegistry
        assert f"accel_deepspeed{suffix}" in STRATEGY_REGISTRY


@pytest.mark.parametrize("kind", KINDS, ids=["trainer", "fabric"])
@pytest.mark.usefixtures("installed")
def test_files_and_stages(tmp_path: Path, kind: type[Any]) -> None:
    assert kind().stage == 2
    assert kind(config={"zero_optimization": {"stage": 3}}).stage == 3
    path = tmp_path / "ds.json"
    with pytest.raises(FileNotFoundError, match="there is none"):
        kind(config=path)
    path.write_text('{\n  "zero_optimization": {"stage": 2},\n}')
    with pytest.raises(ValueError, match="line 3, column 1|line 2, column"):
        kind(config=path)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"stage": 4}, "from 0 to 3, got 4"),
        ({"stage": 1, "config": {"zero_optimization": {"stage": 2}}}, "got stage=1 and zero_optimization.stage 2"),
        ({"config": {"gradient_cliping": 1}}, "did you mean 'gradient_clipping'"),
        ({"config": {"expert_parallel": {"autoep_size": 2}}}, "tensor or pipeline parallelism in config, got expert_p"),
        ({"config": {"sequence_parallel_size": 2}}, "got sequence_parallel_size"),
        ({"config": {"zero_optimization": {"stage": 1, "overlap_comm": True}}}, "overlap_comm to be false at stage 1"),
        ({"start_method": "thread"}, "'popen', 'spawn' or 'fork'"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            kind(**arguments)
    with pytest.raises(TypeError, match="'stages' is unknown. Did you mean 'stage'.*process_group_backend"):
        kind(stages=2)


def test_sizes_of_parallelism() -> None:
    assert EngineFile({"tensor_parallel": {"autotp_size": 2}}, None).tensor_parallel_size == 2
    for silent in ({}, {"tensor_parallel": {}}, {"tensor_parallel": {"autotp_size": 0}}, {"pipeline": {}}):
        assert EngineFile(silent, None).tensor_parallel_size == 1


def steered(config: dict[str, Any], replicas: int, **arguments: Any) -> tuple[int, EngineFile, float | None]:
    used = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **arguments)
    used.strategy.connect(Regression())
    file = EngineFile(config, 1)
    return file.steer_pipeline(used, replicas), file, used.gradient_clip_val


def test_a_pipeline_counts_micro_batches() -> None:
    micro_batches, file, clipping = steered(
        {"gradient_accumulation_steps": 4, "gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}, 2
    )
    assert (micro_batches, clipping) == (4, 0.5)
    file.require_pipeline_batches(8, 4, 2)
    with pytest.raises(ValueError, match="that are 4 micro-batches, as config says, got .* batch_size=10"):
        file.require_pipeline_batches(10, 4, 2)
    sizes = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    micro_batches, file, clipping = steered(sizes, 2, gradient_clip_val=0.5)
    assert (micro_batches, clipping) == (4, 0.5)
    with pytest.raises(ValueError, match="4 micro-batches of 2 samples"):
        file.require_pipeline_batches(4, 4, 2)
    with pytest.raises(ValueError, match="accumulate_grad_batches=1 with a PipelineModule, got 2"):
        steered(sizes, 2, accumulate_grad_batches=2)


@pytest.mark.usefixtures("installed")
def test_precision() -> None:
    for name, dtype in (("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("bf16-mixed", torch.bfloat16)):
        plugin = trainer(precision=name).precision_plugin
        assert isinstance(plugin, EnginePrecision)
        assert plugin.rounded(torch.zeros(1)).dtype is dtype
        weight = plugin.convert_module(torch.nn.Linear(1, 1)).weight
        assert weight.dtype is (torch.bfloat16 if name == "bf16-true" else torch.float32)
    assert trainer(AccelDeepSpeedStrategy(config={"bf16": {"enabled": True}})).precision == "bf16-mixed"
    assert trainer(AccelDeepSpeedStrategy(config={"bf16": {"enabled": "auto"}})).precision == "32-true"
    autocast = trainer(AccelDeepSpeedStrategy(config={"torch_autocast": {"enabled": True}})).precision_plugin
    assert isinstance(autocast, EnginePrecision)
    assert autocast.rounded(torch.zeros(1)).dtype is torch.float32
    with pytest.raises(ValueError, match="fp16, which DeepSpeed has for CUDA only"):
        trainer(precision="16-mixed")
    with pytest.raises(ValueError, match="fp16, which DeepSpeed has for CUDA only"):
        trainer(AccelDeepSpeedStrategy(config={"fp16": {"enabled": True}}))
    with pytest.raises(ValueError, match="one of '32-true', .* got '64-true'"):
        trainer(precision="64-true")
    with pytest.raises(ValueError, match="got '32-true'|got 'DeepSpeed"):
        trainer(plugins=[DeepSpeedPrecision("32-true")])
    with pytest.raises(ValueError, match="got 'bf16-mixed' and fp16 in config"):
        trainer(AccelDeepSpeedStrategy(config={"fp16": {"enabled": True}}), precision="bf16-mixed")


@pytest.mark.usefixtures("installed")
def test_precision_in_fabric() -> None:
    for name, dtype in (("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("bf16-mixed", torch.bfloat16)):
        plugin = in_fabric(precision=name)._precision
        assert isinstance(plugin, EngineRounding)
        assert plugin.rounded(torch.zeros(1)).dtype is dtype
        # A model without an engine is rounded if it comes in 16 bits only.
        assert plugin.convert_input(torch.zeros(1)).dtype is (dtype if name == "bf16-true" else torch.float32)
        assert plugin.convert_output(torch.zeros(1, dtype=dtype)).dtype is torch.float32
    assert (
        in_fabric(fabric.AccelDeepSpeedStrategy(config={"bf16": {"enabled": True}}))._precision.precision
        == "bf16-mixed"
    )
    with pytest.raises(ValueError, match="fp16, which DeepSpeed has for CUDA only"):
        in_fabric(precision="16-mixed")
    with pytest.raises(ValueError, match="one of '32-true', .* got '64-true'"):
        in_fabric(precision="64-true")
    with pytest.raises(ValueError, match="got 'bf16-mixed' and fp16 in config"):
        in_fabric(fabric.AccelDeepSpeedStrategy(config={"fp16": {"enabled": True}}), precision="bf16-mixed")


@pytest.mark.usefixtures("installed")
def test_what_a_loop_with_fabric_cannot_do() -> None:
    strategy, net = in_fabric().strategy, torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"Expected fabric.setup\(model, optimizer\)"):
        strategy.setup_optimizer(optimizer)
    with pytest.raises(ValueError, match="got it for none"):
        strategy.backward(net(torch.ones(1, 1)).sum(), None)
    with pytest.raises(ValueError, match="set up together with its model"):
        strategy.optimizer_step(optimizer)
    with pytest.raises(ValueError, match="by norm by fabric.clip_gradients. Say gradient_clipping in the file"):
        strategy.clip_gradients_norm(net, optimizer, max_norm=1.0)


def loop_of(config: dict[str, Any]) -> tuple[int | None, float | None]:
    file = EngineFile(config, None)
    return file.begin_loop(2), file.clipping


def test_what_a_file_says_to_a_loop_with_fabric() -> None:
    assert loop_of({}) == (None, None)
    assert loop_of({"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}) == (None, None)
    assert loop_of({"gradient_accumulation_steps": 3, "gradient_clipping": 0.5}) == (3, 0.5)
    assert loop_of({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}) == (2, None)
    with pytest.raises(ValueError, match="got 33"):
        loop_of({"train_batch_size": 33, "train_micro_batch_size_per_gpu": 4})
    with pytest.warns(UserWarning, match="optimizer.type, scheduler.type are left to the loop"):
        loop_of({"optimizer": {"type": "Adam"}, "scheduler": {"type": "WarmupLR"}, "gradient_clipping": 0.5})


def told(config: dict[str, Any] | None, precision: str = "32-true", **arguments: Any) -> dict[str, Any]:
    """What DeepSpeed would be told on two ranks."""
    used = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **arguments)
    module = Regression()
    used.strategy.connect(module)
    file = EngineFile(config, None)
    plugin = trainer("auto", precision=precision).precision_plugin
    name, _ = file.computes_in(plugin)
    file.steer(used, 2)
    given = {"accumulation": used.accumulate_grad_batches, "clipping": used.gradient_clip_val}
    return file.told(2, module, name, **given)


def test_what_deepspeed_is_told() -> None:
    silent = told(None)
    assert silent == {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
    }
    config = {
        "train_batch_size": 24,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": "auto",
            "offload_param": {"device": "nvme", "nvme_path": "/x"},
        },
        "aio": {"block_size": 8},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    found = told(config, "bf16-mixed", accumulate_grad_batches=3, gradient_clip_val=0.5)
    assert found["zero_optimization"] == {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (24, 4)
    assert (found["gradient_accumulation_steps"], found["gradient_clipping"]) == (3, 0.5)
    assert found["bf16"] == {"enabled": True}
    assert found["aio"] == {"block_size": 8}
    assert "optimizer" not in found


def test_files_are_used_where_deepspeed_gets_them_right(recwarn: pytest.WarningsRecorder) -> None:
    in_files = {"device": "nvme", "nvme_path": "/x"}
    zero: dict[str, Any] = {"stage": 3, "offload_optimizer": in_files}
    assert told({"zero_optimization": zero})["zero_optimization"] == {**zero, "sub_group_size": 1}
    assert not [warning for warning in recwarn if "sub_group_size" in str(warning.message)]
    with pytest.warns(UserWarning, match="sub_group_size=1000 is taken for 1"):
        found = told({"zero_optimization": {**zero, "sub_group_size": 1000}})
    assert found["zero_optimization"]["sub_group_size"] == 1
    memory = {"stage": 3, "sub_group_size": 1000, "offload_optimizer": {"device": "cpu"}}
    assert told({"zero_optimization": memory})["zero_optimization"] == memory
    with pytest.raises(ValueError, match=r"Expected offload_param.device: cpu .*'32-true', got nvme"):
        told({"zero_optimization": {"stage": 3, "offload_param": in_files}})


def test_the_file_and_the_trainer_must_agree() -> None:
    assert told({"gradient_clipping": 0.5}, gradient_clip_val=0.5)["gradient_clipping"] == 0.5
    assert told({"gradient_accumulation_steps": 3})["gradient_accumulation_steps"] == 3
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"gradient_clipping": 1.0}, {"gradient_clip_val": 0.5}, "gradient_clip_val=0.5"),
        ({"gradient_accumulation_steps": 2}, {"accumulate_grad_batches": 4}, "accumulate_grad_batches=4"),
        ({"train_batch_size": 33, "gradient_accumulation_steps": 2}, {}, "got 33"),
        ({}, {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, "by norm only"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, {}, "hidden_size"),
    ]
    for config, arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            told(config, **arguments)


@pytest.mark.usefixtures("installed")
def test_saving_outside_of_fit() -> None:
    used = trainer()
    used.strategy.connect(Regression())
    with pytest.raises(ValueError, match="during fit"):
        used.strategy.save_checkpoint({}, "x.ckpt")

"""Lightning Trainer strategies; their Fabric twins are in :mod:`lightning_accel.strategies.fabric`."""

from lightning.fabric.accelerators import ACCELERATOR_REGISTRY
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightning_accel.plugins.xla_accelerator import AccelXLAAccelerator
from lightning_accel.strategies import fabric
from lightning_accel.strategies.auto import AccelAutoStrategy
from lightning_accel.strategies.ddp import AccelDDPStrategy
from lightning_accel.strategies.deepspeed_engine import AccelDeepSpeedStrategy
from lightning_accel.strategies.float8 import offer_float8
from lightning_accel.strategies.float16 import keep_float16_on_cpu
from lightning_accel.strategies.fsdp import AccelFSDPStrategy
from lightning_accel.strategies.standalone import refuse
from lightning_accel.strategies.stock import teach
from lightning_accel.strategies.trainer import AccelStrategy
from lightning_accel.strategies.xla import AccelXLAStrategy
from lightning_accel.strategies.xla_choice import join_xla
from lightning_accel.strategies.zero import AccelZeROStrategy

__all__ = [
    "AccelAutoStrategy",
    "AccelDDPStrategy",
    "AccelDeepSpeedStrategy",
    "AccelFSDPStrategy",
    "AccelXLAStrategy",
    "AccelZeROStrategy",
    "register",
]


def register() -> None:
    """Make the names of strategies and of the accelerator known to the Trainer and to Fabric."""
    for kind in (
        AccelDDPStrategy,
        AccelZeROStrategy,
        AccelFSDPStrategy,
        AccelAutoStrategy,
        AccelDeepSpeedStrategy,
        AccelXLAStrategy,
    ):
        kind.register_strategies(StrategyRegistry)
    for twin in (
        fabric.AccelDDPStrategy,
        fabric.AccelZeROStrategy,
        fabric.AccelFSDPStrategy,
        fabric.AccelDeepSpeedStrategy,
        fabric.AccelXLAStrategy,
    ):
        twin.register_strategies(STRATEGY_REGISTRY)
    AccelXLAAccelerator.register_accelerators(AcceleratorRegistry)
    AccelXLAAccelerator.register_accelerators(ACCELERATOR_REGISTRY)
    keep_float16_on_cpu(
        (AccelStrategy, AccelDeepSpeedStrategy), (fabric.AccelFabricStrategy, fabric.AccelDeepSpeedStrategy)
    )
    offer_float8(AccelStrategy, fabric.AccelFabricStrategy)
    join_xla()
    teach()
    refuse(name for name in StrategyRegistry if name.startswith("accel_"))


register()

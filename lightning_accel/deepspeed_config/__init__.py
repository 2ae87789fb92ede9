"""DeepSpeed's configuration files: what they say, and what it means for this engine.

``DeepSpeedConfig.read`` checks a file or dict; ``fill`` puts values in place of ``"auto"``; ``Meaning.of``,
``Computing.of``, ``bucket_cap_mb``, ``grad_scaler`` and :mod:`lightning_accel.deepspeed_config.making` say what it is
here. ``docs/from-deepspeed.md`` has every key.
"""

from lightning_accel.deepspeed_config.batches import Batches
from lightning_accel.deepspeed_config.config import DeepSpeedConfig
from lightning_accel.deepspeed_config.filling import Known, fill, rates_of
from lightning_accel.deepspeed_config.meaning import Computing, Meaning, bucket_cap_mb, grad_scaler, says_fp32

__all__ = [
    "Batches",
    "Computing",
    "DeepSpeedConfig",
    "Known",
    "Meaning",
    "bucket_cap_mb",
    "fill",
    "grad_scaler",
    "rates_of",
    "says_fp32",
]

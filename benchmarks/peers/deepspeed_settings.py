"""DeepSpeed's JSON, for all peers that read it: DeepSpeed itself, and ours.

What is set away from its defaults, which are made for billions of parameters on GPUs:

- `gradient_clipping` is 0.0; 1.0 is the default.
- Buckets hold as much as DDP's, 25 MiB, instead of 5e8 elements; in stage 3 nothing stays gathered for its next use
  (`stage3_max_reuse_distance` 0, 1e9 elements by default), so that parameters do rest sharded in a model of this size,
  and parameters of up to 1e4 elements stay whole, instead of 1e5.
- torch's fused AdamW is the optimizer, for which `zero_force_ds_cpu_optimizer` is off.
"""

from typing import Any

from benchmarks.config import Config
from benchmarks.models import MODELS

BUCKET_ELEMENTS = 25 * 2**20 // 4


def settings(config: Config, stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": MODELS[config.model].micro_batch,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16-mixed"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 2 * BUCKET_ELEMENTS,
            "stage3_max_reuse_distance": 0,
        },
    }

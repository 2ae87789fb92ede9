"""The environment variables by which ``accel launch`` tells the ranks of a script what it was given.

An argument of ``lightning_accel.Accelerator`` takes precedence over the variable.
"""

STRATEGY = "ACCEL_STRATEGY"
DEEPSPEED_CONFIG = "ACCEL_DEEPSPEED_CONFIG"
"""The DeepSpeed file for ``Accelerator``, and for Trainers and Fabrics without a strategy."""
MIXED_PRECISION = "ACCEL_MIXED_PRECISION"
CPU = "ACCEL_CPU"
ACCUMULATION = "ACCEL_GRADIENT_ACCUMULATION_STEPS"
DEBUG = "ACCEL_DEBUG_MODE"
LAUNCHER = "ACCEL_LAUNCHER_PID"
"""Which process has started the ranks: they end with it."""

"""``python -m lightning_accel.cli`` is ``accel``."""

from lightning_accel.cli.main import main

main()

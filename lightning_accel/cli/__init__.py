"""The ``accel`` command: one file for each of its subcommands."""

"""Lightning plugins that know the engine."""

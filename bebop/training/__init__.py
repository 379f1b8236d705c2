"""Training runs: configuration, trainer, checkpoints, metrics."""

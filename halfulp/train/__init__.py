"""Training runs: the configuration, the loop, checkpoints and the processes that share the work."""

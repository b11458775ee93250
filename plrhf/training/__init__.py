"""Training: trainer, checkpoints, loggers, processes, ZeRO, memory plan."""

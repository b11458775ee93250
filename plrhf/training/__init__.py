"""How a model is trained: trainer, checkpoints, loggers, processes, ZeRO, plan."""

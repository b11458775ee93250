"""What a model is worth: metrics, probes, predictions, few-shot curves, judges."""

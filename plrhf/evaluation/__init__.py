"""Evaluation of a trained model: metrics, leak probes, predictions, few-shot curves, judges."""

"""Aggregators: they let the user vector act on the text."""

from plrhf.aggregators.base import Aggregator
from plrhf.aggregators.film import FiLM
from plrhf.aggregators.none import NoAggregator
from plrhf.aggregators.soft_prompt import ConcatSoftPrompt

__all__ = ["Aggregator", "ConcatSoftPrompt", "FiLM", "NoAggregator"]

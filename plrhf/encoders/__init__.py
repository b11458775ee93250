"""User encoders: they compute a vector for each user."""

from plrhf.encoders.base import UserEncoder
from plrhf.encoders.cluster import ClusterMixtureEncoder
from plrhf.encoders.context import ContextEncoder
from plrhf.encoders.ensemble import EnsembleEncoder
from plrhf.encoders.features import FeatureMLPEncoder
from plrhf.encoders.hybrid import HybridEncoder
from plrhf.encoders.lookup import LookupEncoder
from plrhf.encoders.none import NoneEncoder
from plrhf.encoders.odd import OddEncoder
from plrhf.encoders.pair_reader import PairReader
from plrhf.encoders.pair_tokens import PairTokenEncoder
from plrhf.encoders.uniform import UniformEncoder

__all__ = [
    "ClusterMixtureEncoder",
    "ContextEncoder",
    "EnsembleEncoder",
    "FeatureMLPEncoder",
    "HybridEncoder",
    "LookupEncoder",
    "NoneEncoder",
    "OddEncoder",
    "PairReader",
    "PairTokenEncoder",
    "UniformEncoder",
    "UserEncoder",
]

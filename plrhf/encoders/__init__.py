"""User encoders: who is this user -> vector."""

from plrhf.encoders.base import UserEncoder
from plrhf.encoders.cluster import ClusterMixtureEncoder
from plrhf.encoders.features import FeatureMLPEncoder
from plrhf.encoders.lookup import LookupEncoder
from plrhf.encoders.none import NoneEncoder
from plrhf.encoders.uniform import UniformEncoder

__all__ = [
    "ClusterMixtureEncoder",
    "FeatureMLPEncoder",
    "LookupEncoder",
    "NoneEncoder",
    "UniformEncoder",
    "UserEncoder",
]

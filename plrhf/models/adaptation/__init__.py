"""Adaptation rules: they compute a new user's vector from a few of the user's pairs."""

from plrhf.models.adaptation.base import Adaptation, AdaptedUsers
from plrhf.models.adaptation.basis import Basis
from plrhf.models.adaptation.encode import Encode
from plrhf.models.adaptation.gradient import Gradient
from plrhf.models.adaptation.mixture import Mixture
from plrhf.models.adaptation.new_user import NewUser, adapt
from plrhf.models.adaptation.posterior import Posterior
from plrhf.models.adaptation.reweight import Reweight

__all__ = [
    "Adaptation",
    "AdaptedUsers",
    "Basis",
    "Encode",
    "Gradient",
    "Mixture",
    "NewUser",
    "Posterior",
    "Reweight",
    "adapt",
]

"""Personalised RLHF: user models learned together with reward models and policies.

The names below are imported when they are first used, so that `import plrhf` is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plrhf.aggregators import Aggregator
    from plrhf.encoders import UserEncoder
    from plrhf.models.adaptation import adapt
    from plrhf.models.enrolment import enrol, forget
    from plrhf.models.grpo import PersonalGRPOPolicy
    from plrhf.models.hub import push_to_hub
    from plrhf.models.inference import load
    from plrhf.models.policy import PersonalDPOPolicy
    from plrhf.models.reward import PersonalRewardModel

__all__ = [
    "Aggregator",
    "PersonalDPOPolicy",
    "PersonalGRPOPolicy",
    "PersonalRewardModel",
    "UserEncoder",
    "adapt",
    "enrol",
    "forget",
    "load",
    "push_to_hub",
]
MODULES = {
    "Aggregator": "plrhf.aggregators",
    "PersonalDPOPolicy": "plrhf.models.policy",
    "PersonalGRPOPolicy": "plrhf.models.grpo",
    "PersonalRewardModel": "plrhf.models.reward",
    "UserEncoder": "plrhf.encoders",
    "adapt": "plrhf.models.adaptation",
    "enrol": "plrhf.models.enrolment",
    "forget": "plrhf.models.enrolment",
    "load": "plrhf.models.inference",
    "push_to_hub": "plrhf.models.hub",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in MODULES:
        raise AttributeError(f"module 'plrhf' has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(MODULES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

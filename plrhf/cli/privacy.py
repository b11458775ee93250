"""Differential privacy of a run: which settings allow it, and what it comes to."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from plrhf.core.errors import bad_value
from plrhf.data.module import PreferenceData
from plrhf.data.samplers import PoissonUserSampler
from plrhf.models.privacy import PrivateGradient

if TYPE_CHECKING:
    from plrhf.cli.config import RunConfig
    from plrhf.models.base import PersonalModule

NEEDED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("trainer.devices", (1,), "as one process draws the noise"),
    ("trainer.num_nodes", (1,), "as one process draws the noise"),
    ("trainer.zero3", (None,), "as one process draws the noise"),
    ("trainer.accumulate_grad_batches", (1,), "as noise is added once a batch"),
    ("trainer.gradient_clip_val", (None,), "which would add up gradients of all users' own rows"),
    ("trainer.patience", (None,), "as val pairs are of the same people"),
    ("data.max_users", (None,), "as who is left out depends on the others"),
    ("data.shuffle_users", (False,), "as a person would have others' rows"),
    ("model.reduce", ("pairs", None), "as weights would depend on how many pairs others have"),
    ("model.start", ("random", None), "as start values would be computed from all pairs"),
    ("model.inner", (None,), "as its users are found anew from all pairs at the end"),
    ("encoder.shrinkage", ("fixed", None), "as it is learned from everybody's number of pairs"),
    ("encoder.sparse", (False, None), "as gradients of tables are dense"),
    ("aggregator.shrinkage", ("fixed", None), "as it is learned from the number of all pairs"),
    ("aggregator.text_residual", (False, None), "as it learns of texts that several people judged"),
)
"""Settings that private runs need, with the allowed values (None: also a part without it), and why."""

ENCODERS = ("none", "uniform", "lookup", "cluster", "odd", "context", "pair_tokens")
"""Encoders whose shared parameters learn by gradients alone, and which read no features of users."""


def check_private_settings(config: RunConfig) -> None:
    """Raise a ValueError if differential privacy is asked for where it would not hold."""
    if config.privacy.noise is None:
        return
    for field, allowed, why in NEEDED:
        section, name = field.split(".")
        part: Any = getattr(config, section)
        value = part.get(name) if isinstance(part, dict) else getattr(part, name)
        if value not in allowed:
            good = {None: "null", False: "false"}.get(allowed[0], allowed[0])
            _refuse(field, value, f"{good} with privacy.noise, {why}", f"Set {field}={good}")
    for section, names in (("model", ("reward", "dpo")), ("encoder", ENCODERS)):
        name = getattr(config, section).get("name")
        if name not in names:
            allowed_names = f"one of {', '.join(names)} with privacy.noise"
            _refuse(
                section, name, allowed_names, f"Set {section}={names[0]}, or privacy.noise=null"
            )
    if config.backbone.path is None:
        why = "a model that never saw these rows, with privacy.noise: the tiny one is made of them"
        _refuse("backbone.path", None, why, "Give the directory of another model")
    if config.data.users_per_batch is None:
        why = "a number with privacy.noise, as whole users are drawn"
        _refuse("data.users_per_batch", None, why, "Set data.users_per_batch=100")
    if find_spec("opacus") is None:
        why = "null, as opacus is not installed"
        cure = "Install it: pip install -c constraints.txt '.[privacy]'"
        _refuse("privacy.noise", config.privacy.noise, why, cure)


def _refuse(field: str, value: object, allowed: str, cure: str) -> None:
    raise bad_value(field, value, allowed, cure)


def make_private(config: RunConfig, model: PersonalModule, data: PreferenceData) -> None:
    """Let a model be trained privately where ``privacy.noise`` asks for it, and print epsilon.

    Raises:
        ValueError: what rows say of their choices would be shared without noise, or delta is too large.
    """
    privacy, users_per_batch = config.privacy, config.data.users_per_batch
    if privacy.noise is None or users_per_batch is None:
        return
    train = data.datasets["train"]
    if train.feedback is not None or train.groups is not None:
        kind = "weights, strengths or ties" if train.groups is None else "groups of pairs"
        allowed = "null with such rows, whose means or batches depend on several people"
        raise bad_value(
            "privacy.noise", f"{privacy.noise} on rows with {kind}", allowed, "Leave them out"
        )
    if privacy.delta >= 1 / data.n_users:
        allowed = f"below 1 / {data.n_users:,}, as it may reveal one person in 1 / delta"
        raise bad_value("privacy.delta", privacy.delta, allowed, "Set privacy.delta=1e-6")
    data.secret_sampling = True
    model.private = PrivateGradient(privacy, users_per_batch=users_per_batch)
    found = spent(config, data, planned_steps(config, data))
    if found is not None:
        print(privacy_line(found))


def spent(config: RunConfig, data: PreferenceData, steps: int) -> dict[str, Any] | None:
    """Return what so many steps cost in privacy, for results.json; None for a run without it."""
    if config.privacy.noise is None:
        return None
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, PoissonUserSampler)
    rate = sampler.sample_rate
    return {
        "epsilon": config.privacy.epsilon(sample_rate=rate, steps=steps),
        "delta": config.privacy.delta,
        "unit": "all rows of a user",
        "released": "parameters that all users share",
        "noise": config.privacy.noise,
        "clip": config.privacy.clip,
        "sample_rate": rate,
        "steps": steps,
    }


def planned_steps(config: RunConfig, data: PreferenceData) -> int:
    """Return the number of steps after which training ends."""
    limits = [config.trainer.max_steps] if config.trainer.max_steps != -1 else []
    if config.trainer.max_epochs is not None:
        limits.append(config.trainer.max_epochs * len(data.train_dataloader()))
    return min(limits)


def privacy_line(found: dict[str, Any]) -> str:
    """Word what a run costs in privacy."""
    return (
        f"differential privacy for each user: epsilon {found['epsilon']:.2f} at delta {found['delta']:g} "
        f"(noise {found['noise']:g}, clip {found['clip']:g}, {found['steps']:,} steps, each with "
        f"{100 * found['sample_rate']:.3g}% of the users)"
    )

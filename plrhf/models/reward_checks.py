"""Checks that the settings of a reward model go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plrhf.core.errors import bad_value
from plrhf.core.losses import reward_hinge
from plrhf.encoders import EnsembleEncoder
from plrhf.models.answers import Errors, refuse_choices
from plrhf.models.heads import BasisHead, RewardHead
from plrhf.models.start import build_start

if TYPE_CHECKING:
    from plrhf.data.dataset import PairDataset
    from plrhf.models.reward import PersonalRewardModel


def check_user_acts(model: PersonalRewardModel) -> None:
    """Raise a ValueError if users have no effect in head and aggregator, or the head lacks an input."""
    acts = model.aggregator.user_acts or model.head.reads_user
    if model.has_user_vectors and not acts:
        raise bad_value(
            "aggregator",
            type(model.aggregator).__name__,
            "one in which users act, with a reward head that does not read them",
            "Set aggregator=film, model.head=basis, or encoder=none",
        )
    if model.head.reads_user and not model.has_user_vectors:
        raise bad_value(
            "model.head",
            type(model.head).__name__,
            "one that reads no user with encoder=none",
            "Set encoder=uniform, or model.head=linear",
        )
    mixes_losses = isinstance(model.head, BasisHead) and model.head.mixes == "losses"
    if (
        mixes_losses
        and model.head.weights == "raw"
        and not isinstance(model.encoder, EnsembleEncoder)
    ):
        allowed = (
            "softmax where losses are mixed, unless encoder=ensemble gives weights that sum to 1"
        )
        raise bad_value("model.head.weights", "raw", allowed, "Set model.head.weights=softmax")
    if model.head.reads_prompt and (
        model.aggregator.user_acts or model.aggregator.residual is not None
    ):
        raise bad_value(
            "aggregator",
            type(model.aggregator).__name__,
            "none without residuals of texts, with a reward head that reads the prompt",
            "Set aggregator=none aggregator.text_residual=false",
        )
    if model.aggregator.residual is not None and not model.needs_only_pooled:
        raise bad_value(
            "aggregator.text_residual",
            True,
            "false unless the backbone is frozen and users act behind it",
            "Set backbone.trainable=frozen aggregator.site=last",
        )


def check_answers(model: PersonalRewardModel) -> None:
    """Raise a ValueError if what is learned of users' answers does not go with other settings."""
    if model.noise is not None and not model.encoder.personal:
        allowed = "none with an encoder that does not tell users apart"
        name = type(model.noise).__name__.lower()
        raise bad_value("model.noise", name, allowed, "Set model.noise=none, or encoder=lookup")
    is_hinge = model.choice_loss is reward_hinge
    reads_pairs = build_start(model.start).reads_pairs or model.encoder.reads_context
    clashes = {
        "model.ties": (
            model.log_tie is not None,
            {
                "model.loss=hinge": is_hinge,
                "model.target_margin": model.target_margin > 0,
                "model.start or an encoder that reads pairs": reads_pairs,
                "model.rating_scale": model.thresholds is not None,
            },
        ),
        "model.rating_scale": (
            model.thresholds is not None,
            {
                "model.noise": model.noise is not None,
                "model.start or an encoder that reads pairs": reads_pairs,
                "aggregator.text_residual": model.aggregator.residual is not None,
            },
        ),
    }
    for name, (is_set, others) in clashes.items():
        for setting in (one for one, is_other_set in others.items() if is_set and is_other_set):
            cure = f"Set {name} to its default, or change that setting"
            raise bad_value(name, "a value", f"its default with {setting}", cure)


def check_choices(model: PersonalRewardModel) -> None:
    """Raise a ValueError if a choice among several responses has no likelihood with these settings."""
    refuse_choices(
        [
            ("model.ties", model.log_tie is not None),
            ("model.noise", isinstance(model.noise, Errors)),
            ("model.loss", model.choice_loss is reward_hinge),
            ("model.inner", model.inner is not None),
            ("model.head", type(model.head).compare is not RewardHead.compare),
        ]
    )


def check_has_ratings(model: PersonalRewardModel, train: PairDataset) -> None:
    """Raise a ValueError if a model that learns from ratings has pairs alone."""
    feedback = train.feedback
    if model.thresholds is not None and (feedback is None or feedback.rating is None):
        allowed = "null where train rows are pairs and no ratings"
        cure = "Set model.rating_scale=null, or give a file of ratings"
        raise bad_value("model.rating_scale", model.rating_scale, allowed, cure)

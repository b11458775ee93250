"""Figures and tables of users.json: user vectors, clusters, and soft prompts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context

from plrhf.core.stats import as_text
from plrhf.evaluation.metrics import USER_KINDS
from plrhf.evaluation.users import LearnedUser, LearnedUsers
from plrhf.reporting.drawing import (
    INK,
    KIND_MARKERS,
    SERIES,
    STYLE,
    Drawing,
    drawing,
    panel,
    with_hover,
)
from plrhf.reporting.runs import Run
from plrhf.reporting.tables import Cell, Table

SMALL_MAP = 0.1
"""Half the width of a map of vectors that are nearly the same; a hundredth of it counts as none."""

OTHERS, EVERYBODY = "other", "users"


@rc_context(STYLE)
def user_map(run: Run, learned: LearnedUsers) -> Drawing:
    """Draw user vectors on their first two principal components.

    A mark shows its user's id, profile and accuracy when the mouse points at it.
    """
    users, groups = learned.users, groups_of(learned.users)
    accuracies = _accuracies(run)
    figure, axes = panel(9.6, 4.6)
    hover: dict[str, list[str]] = {}
    for number, group in enumerate(dict.fromkeys(_in_colour_order(groups))):
        for kind in USER_KINDS:
            at = [
                place
                for place, user in enumerate(users)
                if groups[place] == group and user["user_kind"] == kind
            ]
            if len(at) == 0:
                continue
            name = f"users-{number}-{kind}"
            hover[name] = [_hover_text(users[place], accuracies) for place in at]
            places = np.array([users[place]["at"] for place in at])
            axes.scatter(
                places[:, 0],
                places[:, 1],
                s=34 if len(users) <= 300 else 14,
                color=SERIES[number % len(SERIES)],
                marker=KIND_MARKERS[kind],
                alpha=0.8,
                linewidth=0,
                label=group if kind == "seen" else f"{group}, unseen",
                gid=name,
            )
    x, y = learned.generic["at"]
    axes.scatter(x, y, s=80, color=INK, marker="X", label="generic user")
    shares = [
        f"component {n + 1}: {share:.0%} of variance" for n, share in enumerate(learned.explained)
    ]
    axes.set(xlabel=shares[0], ylabel=shares[1])
    note = map_note(learned)
    if note is not None:
        axes.set(xlim=(-SMALL_MAP, SMALL_MAP), ylim=(-SMALL_MAP, SMALL_MAP))
    figure.legend(loc="outside right upper", labelcolor=INK)
    n_seen = sum(user["user_kind"] == "seen" for user in users)
    unseen = f" and {len(users) - n_seen:,} unseen ones" if n_seen < len(users) else ""
    shown = f"{n_seen:,} of {learned.n_users:,} train users{unseen}"
    caption = f"{shown}. Point at a mark to see who it is. {note or ''}".rstrip()
    made = drawing(figure, "User map", caption=caption, wide=True)
    for name, words in hover.items():
        made = with_hover(made, name, words)
    return made


def map_note(learned: LearnedUsers) -> str | None:
    """Return a sentence if all users have nearly the same vector, or else None.

    A map that is scaled to such vectors would show chance as if it were people.
    """
    places = np.array([one["at"] for one in (*learned.users, learned.generic)])
    farthest = float(np.linalg.norm(places - places.mean(axis=0), axis=1).max())
    if farthest >= SMALL_MAP / 100:
        return None
    apart = f"at most {farthest:.0e} from their mean"
    return f"All vectors are nearly the same, {apart}: there is nothing to see."


def groups_of(users: Sequence[LearnedUser]) -> list[str]:
    """Return the group of each user, by which a map is coloured.

    This is the group that the source knows (such as a type), or else the user's largest cluster.
    If there are more groups than colours, the rarest ones are joined.
    """
    if any(user["group"] is not None for user in users):
        found = ["unknown" if user["group"] is None else user["group"] for user in users]
    elif any(user["weights"] is not None for user in users):
        leading = [
            None if user["weights"] is None else np.argmax(user["weights"]) for user in users
        ]
        found = ["a vector of their own" if at is None else f"cluster {at}" for at in leading]
    else:
        found = [EVERYBODY] * len(users)
    common = [group for group, _ in Counter(found).most_common()]
    if len(common) <= len(SERIES):
        return found
    kept = set(common[: len(SERIES) - 1])
    return [group if group in kept else OTHERS for group in found]


def _in_colour_order(groups: Sequence[str]) -> list[str]:
    """Sort groups by name, joined groups last, so that colours are the same from run to run."""
    return sorted(groups, key=lambda group: (group == OTHERS, group))


def _accuracies(run: Run) -> dict[str, str]:
    """Return a text on the test accuracy of each user, by user id."""
    words: dict[str, str] = {}
    for kind in USER_KINDS:
        personal = run.outcomes(kind)
        if len(personal) > 0:
            sums = personal.sums
            names = np.unique(as_text(personal.user_id))  # in the order of the sums
            for name, correct, count in zip(names, sums.correct, sums.count, strict=True):
                words[name] = f"accuracy {correct / count:.0%} of {count:.0f} pairs"
    return words


def _hover_text(user: LearnedUser, accuracies: Mapping[str, str]) -> str:
    """Return what a mark of the map says about its user, one fact a line."""
    facts = [user["user_id"], user["group"], user["profile"], accuracies.get(user["user_id"])]
    if user["weights"] is not None:
        best = int(np.argmax(user["weights"]))
        facts.append(f"cluster {best} weighs {user['weights'][best]:.2f}")
    return "\n".join(fact for fact in facts if fact is not None)


def with_weights(learned: LearnedUsers) -> list[LearnedUser]:
    """Leave out users who were enrolled by a vector alone, and belong to no cluster."""
    return [user for user in learned.users if user["weights"] is not None]


@rc_context(STYLE)
def weight_bars(learned: LearnedUsers) -> Drawing:
    """Draw the cluster weights of each user as a stacked column, users sorted by cluster."""
    weights = np.array([user["weights"] for user in with_weights(learned)])  # [U, K]
    n_users, n_clusters = weights.shape
    leading = weights.argmax(axis=1)
    weights = weights[np.lexsort((-weights.max(axis=1), leading))]
    figure, axes = panel(9.6, 2.4)
    below = np.zeros(n_users)
    for cluster in range(n_clusters):
        above = below + weights[:, cluster]
        axes.stairs(
            above,
            np.arange(n_users + 1),
            baseline=below,
            fill=True,
            color=SERIES[cluster % len(SERIES)],
            alpha=1 if cluster < len(SERIES) else 0.5,
            linewidth=0,
            label=f"cluster {cluster}",
        )
        below = above
    axes.set(xlim=(0, n_users), ylim=(0, 1), ylabel="weight")
    axes.set_title("Cluster weights, one column a user")
    axes.set_xticks([])
    axes.grid(visible=False)
    figure.legend(loc="outside right upper", labelcolor=INK)
    return drawing(figure, "Cluster weights", wide=True)


def cluster_table(learned: LearnedUsers) -> Table:
    """Return a table of each cluster: its weights, and the users whose largest cluster it is."""
    users = with_weights(learned)
    groups = [user["group"] for user in users]
    known = groups_of(users) if any(group is not None for group in groups) else []
    columns = list(dict.fromkeys(_in_colour_order(known)))
    weights = np.array([user["weights"] for user in users])
    leading = weights.argmax(axis=1)
    of_generic = learned.generic["weights"] or []
    rows = []
    for cluster, mean in enumerate(weights.mean(axis=0)):
        led = np.flatnonzero(leading == cluster)
        rows.append(
            [
                Cell(f"cluster {cluster}"),
                Cell(f"{of_generic[cluster]:.3f}"),
                Cell(f"{mean:.3f}"),
                Cell(f"{len(led):,}"),
                *(Cell(f"{sum(known[at] == column for at in led):,}") for column in columns),
            ]
        )
    heads = ["", "generic user's weight", "mean weight", "users led by it", *columns]
    return Table(heads, [("", rows)])


def token_table(learned: LearnedUsers) -> Table:
    """Return a table of the tokens nearest to each soft prompt vector, one column for each owner.

    Owners are the generic user, and the clusters or users of users.json.
    """
    owners = learned.nearest_tokens
    rows = []
    for at in range(len(owners[0]["vectors"])):
        cells = [_token_cell(owner["vectors"][at]) for owner in owners]
        rows.append([Cell(f"vector {at + 1}"), *cells])
    heads = ["", *(owner["owner"] for owner in owners)]
    return Table(heads, [("", rows)], tuple(range(len(heads))))


def _token_cell(nearest: Sequence[tuple[str, float]]) -> Cell:
    """Format the nearest token with its cosine, and the next ones. Quotes make spaces visible."""
    (first, cosine), *others = nearest
    quoted = [json.dumps(token, ensure_ascii=False) for token, _ in others]
    return Cell(
        f"{json.dumps(first, ensure_ascii=False)} {cosine:.2f}", "then " + ", ".join(quoted)
    )

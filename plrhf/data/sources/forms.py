"""Recognises the forms in which judgments are published, and turns their records into rows.

A file whose records have the columns of a row needs none of this. Otherwise the first form that knows
the columns converts it: responses in order (`rankings`), one of several options (`options`), two
responses and a winner (`comparisons`), one response and a rating (`ratings`), or the exports of
annotation tools (`annotation_tools`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from plrhf.data.sources import annotation_tools, comparisons, options, rankings, ratings
from plrhf.data.sources.formats import Record

Records = Iterator[tuple[int, Record]]


@dataclass(frozen=True)
class Form:
    """A form in which judgments are published.

    Attributes:
        name: shown to the user.
        knows: whether records with these columns are of this form.
        rows: converts numbered records to numbered rows and refusals.
    """

    name: str
    knows: Callable[[Collection[str]], bool]
    rows: Callable[[Records], Records]


FORMS = (
    Form("label_studio", annotation_tools.is_label_studio, annotation_tools.label_studio_rows),
    Form(
        "label_studio_minimal",
        annotation_tools.is_label_studio_minimal,
        annotation_tools.label_studio_minimal_rows,
    ),
    Form("argilla", annotation_tools.is_argilla, annotation_tools.argilla_rows),
    Form("comparisons", comparisons.is_comparison, comparisons.rows),
    Form("ratings", ratings.is_rating, ratings.rows),
    # Last, as other forms may have such columns.
    Form("options", options.is_choice_of_options, options.rows),
    Form("rankings", rankings.is_ranking, rankings.rows),
)


def form_of(names: Collection[str]) -> Form | None:
    """Return the form of records with these columns, named as row fields where mapped; None: rows."""
    if {"chosen", "rejected"} <= set(names):
        return None
    return next((form for form in FORMS if form.knows(names)), None)

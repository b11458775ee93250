"""Runs that differ in seed alone as one: the pairs of all seeds together, and which encoder wins.

A bootstrap over the users of all seeds says how a figure would move with other users; how it moves
with the seed itself is shown beside it, one value a seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from plrhf.comparison import BESIDE_THE_DATA, comparison_frame, p_cell, read_estimate
from plrhf.finished import Run
from plrhf.metrics import USER_KINDS, summarise
from plrhf.stats import Estimate, paired_difference, same_pairs
from plrhf.sweeps import curves, flattened
from plrhf.tables import Cell, Table, estimate_cell, percent, points

"""How much the tests of this folder do: FAULTS=full does as much as docs/trust.md reports."""

from __future__ import annotations

import os

IS_FULL = os.environ.get("FAULTS") == "full"


def size(few: int, many: int) -> int:
    """How often something is tried, `many` times with FAULTS=full."""
    return many if IS_FULL else few

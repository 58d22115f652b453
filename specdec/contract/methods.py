"""The names of methods: one drafter, several drafters that guess side by side, or "none"."""

from __future__ import annotations

import re
from collections.abc import Sequence

PLAIN = "none"
"""The method of plain decoding, without a drafter (K = 0)."""
LOOKUP_FAMILIES = ("ngram-lm", "ngram")
"""Drafter families that look continuations up and run no model, the better guesser first."""
AUTO = "auto"
"""The default method that stands for the best method available."""
_SEPARATOR = "+"
"""Joins the names of drafters whose proposals are merged. A drafter's name cannot contain it."""

_DRAFTER_NAME = re.compile(r"[\w.-]{1,64}")
_RESERVED = (PLAIN, AUTO)


def is_drafter_name(name: str) -> bool:
    """Return whether a drafter may have the name: 1 to 64 letters, digits, dots, hyphens and underscores."""
    return bool(_DRAFTER_NAME.fullmatch(name)) and name not in _RESERVED


def drafters_of(method: str) -> tuple[str, ...]:
    """Return the drafters that a method names; plain decoding names none."""
    return () if method == PLAIN else tuple(method.split(_SEPARATOR))


def method_of(drafters: Sequence[str]) -> str:
    """Return the method that merges the given drafters' proposals; without drafters it is plain decoding."""
    return _SEPARATOR.join(drafters) if drafters else PLAIN

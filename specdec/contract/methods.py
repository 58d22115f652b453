"""Names of methods: a drafter, several drafters that guess side by side, or none."""

from __future__ import annotations

import re
from collections.abc import Sequence

PLAIN = "none"
"""Plain decoding: no drafter, K = 0."""
LOOKUP_FAMILIES = ("ngram-lm", "ngram")
"""Families that look continuations up and compute nothing, the better guesser first."""
AUTO = "auto"
"""As a default: the best of what there is."""
_SEPARATOR = "+"
"""Between the drafters of a method that merges their proposals; no drafter's name contains it."""

_DRAFTER_NAME = re.compile(r"[\w.-]{1,64}")
_RESERVED = (PLAIN, AUTO)


def is_drafter_name(name: str) -> bool:
    """Whether a drafter may be called that: 1 to 64 letters, digits, dots, hyphens and underscores."""
    return bool(_DRAFTER_NAME.fullmatch(name)) and name not in _RESERVED


def drafters_of(method: str) -> tuple[str, ...]:
    """The drafters a method names, none for plain decoding."""
    return () if method == PLAIN else tuple(method.split(_SEPARATOR))


def method_of(drafters: Sequence[str]) -> str:
    """The method that merges these drafters' proposals; with none, plain decoding."""
    return _SEPARATOR.join(drafters) if drafters else PLAIN

"""The names of methods: one drafter, several drafters that guess side by side, or "none"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from specdec.contract.errors import InvalidArgumentError

PLAIN = "none"
"""The method of plain decoding, without a drafter (K = 0)."""
MAX_DRAFTERS = 8
"""Most drafters that a method names."""
LOOKUP_FAMILIES = ("ngram-lm", "ngram")
"""Drafter families that look continuations up and run no model, the better guesser first."""
AUTO = "auto"
"""The method that stands for whichever pays best, chosen round by round."""
_SEPARATOR = "+"
"""Joins the names of drafters whose proposals are merged. A drafter's name cannot contain it."""

_MAX_NAME = 64
_DRAFTER_NAME = re.compile(rf"[\w.-]{{1,{_MAX_NAME}}}")
_RESERVED = (PLAIN, AUTO)


def is_drafter_name(name: str) -> bool:
    """Return whether a drafter may have the name: 1 to 64 letters, digits, dots, hyphens and underscores."""
    return bool(_DRAFTER_NAME.fullmatch(name)) and name not in _RESERVED


def drafters_of(method: str) -> tuple[str, ...]:
    """Return the drafters that a method names; PLAIN and AUTO name none."""
    return () if method in _RESERVED else tuple(method.split(_SEPARATOR))


def validate_method(method: str) -> tuple[str, ...]:
    """Return the drafters of a method as a request names it, whether they exist or not.

    Raises:
        InvalidArgumentError: it is no name of a method.
    """
    # What is too long is not looked at any further.
    most = MAX_DRAFTERS * (_MAX_NAME + len(_SEPARATOR))
    names = drafters_of(method) if len(method) <= most else ("",)
    if len(names) > MAX_DRAFTERS or not all(is_drafter_name(name) for name in names):
        raise InvalidArgumentError(
            f"{method[:80]!r} is not a method: it is {PLAIN!r}, {AUTO!r}, a drafter, or up to {MAX_DRAFTERS} "
            f"drafters joined by {_SEPARATOR!r}.",
            field="method",
            reason="UNKNOWN_METHOD",
        )
    if len(set(names)) < len(names):
        raise InvalidArgumentError(f"{method!r} names a drafter twice.", field="method")
    return names


def method_of(drafters: Sequence[str]) -> str:
    """Return the method that merges the given drafters' proposals; without drafters it is plain decoding."""
    return _SEPARATOR.join(drafters) if drafters else PLAIN

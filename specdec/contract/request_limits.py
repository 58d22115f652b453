"""Limits of a request that do not depend on a model; a gateway and its stand-in in tests refuse the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from specdec.contract.bounds import MAX_NUMBER, bound_passed
from specdec.contract.errors import InvalidArgumentError

ROLES = ("system", "user", "assistant")
"""Who may say a turn of a conversation."""
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_MESSAGES = 4096
"""Most turns of a conversation."""
MAX_NEW_TOKENS = MAX_NUMBER
MAX_CACHE_KEY_LENGTH = 256
"""Most characters of a cache salt and of a caller's key."""
MAX_LISTS_BYTES = 2**18
"""What a request has besides its prompt takes fewer bytes, with every list and text at its longest."""


def validate_max_new_tokens(max_new_tokens: int) -> None:
    """Refuse an answer without tokens, or longer than a session can be.

    Raises:
        InvalidArgumentError: the number is out of range.
    """
    if passed := bound_passed(max_new_tokens, 1, MAX_NEW_TOKENS):
        raise InvalidArgumentError(
            f"max_new_tokens is {max_new_tokens}; it must be {passed}.", field="max_new_tokens"
        )


def validate_stop_strings(stop_strings: Sequence[str]) -> None:
    """Refuse empty, long or too many stop strings.

    Raises:
        InvalidArgumentError: a limit is exceeded; the message names it.
    """
    if len(stop_strings) > MAX_STOP_STRINGS:
        raise InvalidArgumentError(f"At most {MAX_STOP_STRINGS} stop strings.", field="stop_strings")
    for stop in stop_strings:
        if not 0 < len(stop) <= MAX_STOP_STRING_LENGTH:
            raise InvalidArgumentError(
                f"A stop string must have 1 to {MAX_STOP_STRING_LENGTH} characters.", field="stop_strings"
            )


def validate_length(name: str, length: int, most: int) -> None:
    """Refuse a list that is too long, before anything is made of it.

    Raises:
        InvalidArgumentError: it is too long; the error names its field.
    """
    if length > most:
        raise InvalidArgumentError(f"{name} has {length} entries; at most {most} are taken.", field=name)


def validate_roles(roles: Iterable[str]) -> None:
    """Refuse a conversation with turns of somebody who has no part in it.

    Raises:
        InvalidArgumentError: a role is unknown.
    """
    for role in roles:
        if role not in ROLES:
            raise InvalidArgumentError(
                f"Unknown role {role!r}; use {', '.join(ROLES)}.", field="chat.messages.role"
            )


def validate_cache_key(name: str, key: str) -> None:
    """Refuse a cache salt or a caller's key that is too long to be kept with every session.

    Raises:
        InvalidArgumentError: the key is too long; the error names its field.
    """
    if len(key) > MAX_CACHE_KEY_LENGTH:
        raise InvalidArgumentError(
            f"{name} has {len(key)} characters; at most {MAX_CACHE_KEY_LENGTH} are taken.", field=name
        )

"""Names in PromQL: which metrics a query reads, and which labels it takes them to have."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'')
_RANGE = re.compile(r"\[[^\]]*\]")
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\b\s*(?:\(([^)]*)\))?")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)?\s*\{([^}]*)\}")
_NAME = re.compile(r"(?<![\w:.$])([a-zA-Z_:][\w:]*)(?!\s*\()(?![\w:])")
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


@dataclass
class Query:
    """What a query names."""

    selected: list[tuple[str, set[str]]] = field(default_factory=list)
    """Metric names, each with the labels it is selected by."""
    grouped: set[str] = field(default_factory=set)
    """Labels it groups or matches by."""

    @property
    def metrics(self) -> set[str]:
        """Names of the metrics."""
        return {metric for metric, _ in self.selected}


def parse(text: str) -> Query:
    """Return the names in a query whose syntax is right.

    Raises:
        ValueError: a selector without a metric name.
    """
    query = Query()
    rest = _RANGE.sub("", _STRING.sub("''", text))
    for _, labels in _GROUPING.findall(rest):
        query.grouped |= {label.strip() for label in labels.split(",") if label.strip()}
    rest = _GROUPING.sub(" ", rest)
    for metric, matchers in _SELECTOR.findall(rest):
        if not metric:
            raise ValueError(f"A selector names no metric: {text}")
        query.selected.append((metric, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))))
    rest = _SELECTOR.sub(" ", rest)
    query.selected += [(name, set()) for name in _NAME.findall(rest) if name.lower() not in _WORDS]
    return query

"""Filters on a record's fields, as SourceConfig.where spells them. Nothing is evaluated as code.

    max_stars_count >= 5          numbers: == != < <= > >=
    lang == "Python"              text: == and !=; quotes are optional
    lang in Python, SQL           one of; of a list: it is not empty and all its items are
    licenses not in GPL-3.0       none of
    tags has tutorial             a list that holds it, a text that contains it
    meta.lang == en               dotted names look inside

All clauses must hold. A field that is null fulfils only `!=` and `not in`; a record without the
field is a bad record, so that a misspelt name cannot remove everything.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CLAUSE = re.compile(
    r"\s*(?P<field>[A-Za-z_][\w.\-]*)\s*"
    r"(?P<operator>==|!=|>=|<=|>|<|\bnot\s+in\b|\bin\b|\bhas\b)\s*(?P<value>\S.*?)\s*"
)


class FieldError(ValueError):
    """A record's field is absent, or not of the type that a filter needs."""


@dataclasses.dataclass(frozen=True)
class Clause:
    """One condition: `field operator value`; `values` has one item but for in and not in."""

    field: str
    operator: str
    values: tuple[Any, ...]

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether a record fulfils it. Raises FieldError when the field is absent or misfit."""
        value = look_up(record, self.field)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if value is None:
            return self.operator in ("!=", "not in")
        if self.operator == "has":
            return self.values[0] in (value if isinstance(value, (list, tuple)) else str(value))
        if self.operator in ("in", "not in"):
            items = value if isinstance(value, (list, tuple)) else [value]
            inside = [item in self.values or str(item) in self.values for item in items]
            return bool(items) and all(inside) if self.operator == "in" else not any(inside)
        expected = self.values[0]
        if self.operator in ("==", "!="):
            same = value == expected or str(value) == str(expected)
            return same == (self.operator == "==")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FieldError(
                f"{self.field!r} is {value!r:.60}, not a number as {self.spell()} needs"
            )
        return _COMPARE[self.operator](value, expected)

    def spell(self) -> str:
        """The clause as one writes it."""
        return f"{self.field} {self.operator} {', '.join(map(str, self.values))}"


def parse(clauses: Sequence[str], who: str) -> tuple[tuple[Clause, ...], list[str]]:
    """Clauses of `SourceConfig.where`, and what is wrong with them."""
    parsed, problems = [], []
    for text in clauses:
        match = _CLAUSE.fullmatch(text)
        if match is None:
            problems.append(
                f"{who}={text!r} is not FIELD OPERATOR VALUE with one of == != < <= > >=, in, "
                "not in, has; e.g. 'max_stars_count >= 5' or 'lang in Python, SQL'"
            )
            continue
        name = " ".join(match["operator"].split())
        spelled = match["value"].split(",") if name in ("in", "not in") else [match["value"]]
        values = tuple(_value(value, number=name in ("<", "<=", ">", ">=")) for value in spelled)
        if None in values:
            problems.append(f"{who}={text!r}: {name} needs a number, not {match['value']!r}")
        parsed.append(Clause(match["field"], name, values))
    return tuple(parsed), problems


def _value(spelled: str, number: bool) -> Any:
    spelled = spelled.strip()
    if number:
        try:
            value = float(spelled)
        except ValueError:
            return None
        return value if value == value else None
    if len(spelled) >= 2 and spelled[0] == spelled[-1] and spelled[0] in "\"'":
        return spelled[1:-1]
    try:
        return int(spelled)
    except ValueError:
        return spelled


def look_up(record: Mapping[str, Any], name: str) -> Any:
    """Value of a field; a dotted name looks inside. Raises FieldError when it is absent."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise FieldError(f"has no field {name!r} (found {known})")
        value = value[part]
    return value

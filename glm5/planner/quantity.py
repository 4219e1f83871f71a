"""`Quantity`: a number that carries its unit and the formula it came from.

The formula is the computation: `derive` evaluates the very text that `--explain` prints, so that a shown formula cannot
disagree with its number. A formula may use numbers, other quantities, `+ - * / ** ( )`, `min`, `max`, `ceil`, `floor`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

_FUNCTIONS: dict[str, Any] = {"min": min, "max": max, "ceil": math.ceil, "floor": math.floor}
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Quantity:
    """A named value with unit, formula and the numbers that went in; `float(quantity)` is the value."""

    name: str
    value: float
    unit: str
    formula: str = ""
    inputs: tuple[tuple[str, float], ...] = ()
    source: str = ""
    """Where a given (not derived) number comes from, or what a derived one means."""

    def __float__(self) -> float:
        return self.value

    @property
    def text(self) -> str:
        """The value for people: scaled units for bytes, tokens per second, money."""
        return show(self.value, self.unit)

    @property
    def substituted(self) -> str:
        """The formula with its numbers in place of the names."""
        values = dict(self.inputs)
        return _NAME.sub(lambda m: number(values[m[0]]) if m[0] in values else m[0], self.formula)

    def explain(self) -> str:
        """Name, value, formula and substituted formula, one per line; the source at the end when there is one."""
        lines = [f"{self.name}: {self.text}" + (f"  ({self.source})" if self.source else "")]
        if self.formula:
            lines += [f"    = {self.formula}", f"    = {self.substituted}"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        values: dict[str, Any] = {"name": self.name, "value": self.value, "unit": self.unit}
        if self.formula:
            values.update(formula=self.formula, inputs=dict(self.inputs))
        if self.source:
            values["source"] = self.source
        return values


def given(name: str, value: float, unit: str, source: str = "") -> Quantity:
    """A number that is not derived here: a measurement, a datasheet value, a count."""
    return Quantity(name, value, unit, source=source)


def derive(
    name: str, unit: str, formula: str, computed: Mapping[str, float | Quantity] | None = None, /, *, source: str = "",
    **inputs: float | Quantity,
) -> Quantity:  # fmt: skip
    """Evaluates `formula` over `inputs` (and `computed`, for names that are made in a loop).

    Formulas are literals of this package, never text of a user.
    """
    named = {**(computed or {}), **inputs}
    values = {key: value.value if isinstance(value, Quantity) else value for key, value in named.items()}
    result = eval(_compiled(formula), {"__builtins__": {}}, _FUNCTIONS | values)
    return Quantity(name, float(result), unit, formula, tuple(values.items()), source)


@cache
def _compiled(formula: str) -> CodeType:
    return compile(formula, "<formula>", "eval")


def quantities(thing: object) -> Iterator[Quantity]:
    """Every quantity inside nested dataclasses and tuples, in the order of their fields."""
    if isinstance(thing, Quantity):
        yield thing
    elif isinstance(thing, tuple):
        for item in thing:
            yield from quantities(item)
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield from quantities(getattr(thing, field.name))


def plain(thing: object) -> Any:
    """Nested dataclasses as JSON-able values."""
    if isinstance(thing, Quantity):
        return thing.to_dict()
    if isinstance(thing, list | tuple):
        return [plain(item) for item in thing]
    if dataclasses.is_dataclass(thing):
        return {field.name: plain(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
    return thing


def number(value: float) -> str:
    """A number inside a formula: whole ones in full, others to four digits."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "_") if abs(value) >= 10_000 else str(int(value))
    return f"{value:.4g}"


def show(value: float, unit: str) -> str:
    """A value with its unit as people read it (bytes in decimal GB, as datasheets count)."""
    if unit in ("B", "FLOP", "B/token"):
        for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= limit and not (unit == "B" and limit == 1e12 and abs(value) < 1e13):
                return f"{value / limit:,.4g} {prefix}{unit}"
        return f"{value:,.4g} {unit}"
    if unit == "s":
        return f"{value * 1e3:,.3g} ms" if abs(value) < 1 else f"{value:,.4g} s"
    if unit.startswith("$"):
        return f"${value:,.{2 if value >= 1 else 3}f}{unit[1:]}"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f} {unit}".rstrip()
    return f"{value:,.4g} {unit}".rstrip()

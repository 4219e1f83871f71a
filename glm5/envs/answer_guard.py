"""What may be shown to verifiers that evaluate the model's answer as Python or with sympy, which is no sandbox.

Some verifiers of reasoning-gym do, so that `__import__("os").system(...)` would run and `9**9**9**9` would never end.
Such an answer is wrong without being shown to them. Literals (lists, texts, numbers) pass where lists are expected;
where a formula is, arithmetic over names and a few functions passes while its size stays small: digits, terms and
degree are bounded before anything is computed.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

LITERALS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
FORMULAS = frozenset(
    {
        "coin_flip",
        "countdown",
        "intermediate_integration",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
    }
)
LONGEST = 2000
DIGITS, DEGREE, NAMES = 300, 64, 4
FUNCTIONS = frozenset(
    {"Abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "cot", "csc", "exp", "ln", "log", "sec",
     "sin", "sinh", "sqrt", "tan", "tanh"}
)  # fmt: skip
_VAST_EXPONENT = re.compile(r"[\d.]e[+-]?[\d_]{4,}", re.IGNORECASE)
"""Of a number that Python reads as 0 or infinity, and sympy and `Fraction` with all its digits."""
_PLAIN = (
    ast.Expression,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Dict,
    ast.Set,
    ast.UnaryOp,
    ast.USub,
)

_DOING: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def may_be_shown(answer: str, task: str) -> bool:
    """Whether the verifier of the task may see the answer; always true for verifiers that evaluate nothing."""
    if task not in LITERALS and task not in FORMULAS:
        return True
    try:
        tree = ast.parse(answer.strip(), mode="eval") if len(answer) <= LONGEST else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return task in LITERALS  # Python refuses it as well; sympy might still read something into it
    if tree is None:
        return False
    if task in LITERALS:
        return all(isinstance(node, _PLAIN) for node in ast.walk(tree))
    if _VAST_EXPONENT.search(answer):
        return False
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - FUNCTIONS
    try:
        return len(names) <= NAMES and all(map(_is_letter, names)) and _size(tree.body) is not None
    except (_TooMuch, ArithmeticError, RecursionError):
        return False


class _TooMuch(Exception):
    """The formula is larger than allowed, or no formula."""


def _is_letter(name: str) -> bool:
    return len(name) <= 5 and name.isalpha()


def _size(node: ast.expr) -> tuple[float, float]:
    """(decimal digits of its numbers, degree) when all is multiplied out, at most; raises `_TooMuch`."""
    digits, degree = _raw_size(node)
    if not digits <= DIGITS or not degree <= DEGREE:
        raise _TooMuch
    return digits, degree


def _raw_size(node: ast.expr) -> tuple[float, float]:
    if isinstance(node, ast.Constant):
        return _digits(node.value), 0.0
    if isinstance(node, ast.Name):
        return 1.0, 1.0
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        return _size(node.operand)
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
        if not named or len(node.args) != 1 or node.keywords:
            raise _TooMuch
        return 1.0, max(1.0, _size(node.args[0])[1])
    if not isinstance(node, ast.BinOp):
        raise _TooMuch
    (digits, degree), (right_digits, right_degree) = _size(node.left), _size(node.right)
    if isinstance(node.op, ast.Add | ast.Sub):
        return max(digits, right_digits) + 1, max(degree, right_degree)
    if isinstance(node.op, ast.Mult | ast.Div):
        return digits + right_digits, degree + right_degree
    if isinstance(node.op, ast.Pow):
        power = abs(_exponent(node.right))
        return (digits + 1) * power, max(degree * power, right_degree)
    raise _TooMuch


def _digits(value: object) -> float:
    """Of a number, the places behind its point included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _TooMuch
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _TooMuch
        return 17.0 + abs(math.log10(abs(value))) if value else 1.0
    return value.bit_length() * math.log10(2) + 1


def _exponent(node: ast.expr) -> float:
    """The value of an exponent, names taken as 1: what cancels out does so at every value of them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        _digits(node.value)
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _exponent(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Name):
        return 1.0
    if isinstance(node, ast.BinOp) and type(node.op) in _DOING:
        return _DOING[type(node.op)](_exponent(node.left), _exponent(node.right))
    raise _TooMuch

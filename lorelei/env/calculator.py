"""The built-in tool: arithmetic, read as a syntax tree and never run as Python."""

from __future__ import annotations

import ast
from collections.abc import Callable
from fractions import Fraction

MAX_LENGTH = 200  # characters
MAX_BITS = 2048  # of a numerator or denominator: bounds the time that an expression can take

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
    ast.FloorDiv: Fraction.__floordiv__,
    ast.Mod: Fraction.__mod__,
}


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** and brackets, such as (12 + 3) * 4.
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression is longer than {MAX_LENGTH} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is not arithmetic") from error
    value = _value(tree.body)
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            value = _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            value = _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            value = Fraction(_OPERATORS[type(op)](_value(left), _value(right)))
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not arithmetic; use + - * / // % ** ( )")
    _check_size(_bits(value))
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("only whole exponents are allowed")
    _check_size(_bits(base) * abs(exponent.numerator))
    return Fraction(base**exponent.numerator)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _check_size(bits: int) -> None:
    if bits > MAX_BITS:
        raise ValueError("the numbers grow too large")

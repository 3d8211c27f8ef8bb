"""Filters as Arrow expressions: comparisons and arithmetic over columns, and functions of
``pyarrow.compute``.

A filter is parsed as Python, of which a small part is allowed; nothing is executed.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ....schemas import InputError

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.Not: operator.invert,
    ast.USub: lambda value: pc.negate(value) if isinstance(value, pc.Expression) else -value,
    ast.In: lambda value, options: value.isin(options),
    ast.NotIn: lambda value, options: ~value.isin(options),
    ast.Is: lambda value, _none: value.is_null(),
    ast.IsNot: lambda value, _none: value.is_valid(),
}


def parse_filter(text: str) -> tuple[pc.Expression, set[str]]:
    """The expression of a filter, and the columns that it uses.

    Examples: ``num_tokens <= 64 and style in ["photo", "art"]``, ``aesthetic is not None``,
    ``not match_substring(text, "logo")``. Names are columns; calls are scalar functions of
    ``pyarrow.compute``, with options by name.

    Raises:
        InputError: a part is not understood; the message names it.
    """
    columns: set[str] = set()

    def refuse(node: ast.AST, why: str) -> InputError:
        part = ast.get_source_segment(text, node) or text
        return InputError(f"filter {text!r}: {part!r} {why}")

    def build(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [build(item) for item in items]
            case ast.Name(id=name):
                columns.add(name)
                return pc.field(name)
            case ast.BoolOp(op=op, values=[first, *others]):
                combined = build(first)
                for other in others:
                    combined = apply(node, op, combined, build(other))
                return combined
            case ast.UnaryOp(op=op, operand=operand):
                return apply(node, op, build(operand))
            case ast.BinOp(left=left, op=op, right=right):
                return apply(node, op, build(left), build(right))
            case ast.Compare(left=left, ops=ops, comparators=rights):
                combined, value = None, build(left)  # a < b < c is a < b and b < c
                for sign, right in zip(ops, map(build, rights), strict=True):
                    one = apply(node, sign, value, right)
                    combined, value = one if combined is None else combined & one, right
                return combined
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=options):
                return call(node, name, arguments, options)
        raise refuse(node, "is not a comparison, column, value or function")

    def apply(node: ast.AST, op: ast.AST, *values: Any) -> Any:
        if type(op) not in _OPERATORS:
            raise refuse(node, f"has an operator that Arrow does not have ({type(op).__name__})")
        if isinstance(op, ast.Is | ast.IsNot) and values[1] is not None:
            raise refuse(node, "is not understood: only None may follow is")
        try:
            return _OPERATORS[type(op)](*values)
        except (TypeError, AttributeError, pa.ArrowException) as error:
            raise refuse(node, f"is not an Arrow expression: {error}") from error

    def call(node: ast.Call, name: str, arguments: list[ast.expr], options: list[Any]) -> Any:
        if name not in pc.list_functions() or pc.get_function(name).kind != "scalar":
            raise refuse(node, f"calls {name}, which is not a scalar function of pyarrow.compute")
        try:
            named = {option.arg: ast.literal_eval(option.value) for option in options}
            return getattr(pc, name)(*map(build, arguments), **named)
        except (TypeError, AttributeError, ValueError, pa.ArrowException) as error:
            if isinstance(error, InputError):
                raise
            raise refuse(node, f"cannot be called: {error}") from error

    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise InputError(f"filter {text!r} is not understood: {error}") from error
    expression = build(tree.body)
    if not isinstance(expression, pc.Expression):
        raise InputError(f"filter {text!r} uses no column")
    return expression, columns

"""Sums, differences and products of integers, computed from text: a tool for policies, and a check of
their answers."""

import ast
import operator
import warnings

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
MAX_MAGNITUDE = 10**9  # a number above it is an error: a policy may ask for anything
MAX_EXPRESSION_LENGTH = 100  # characters of an expression


def expression_value(expression: str) -> str:
    """The value of an expression of integers, +, -, * and brackets, or "error"."""
    try:
        if len(expression) > MAX_EXPRESSION_LENGTH:
            raise ValueError(expression)
        with warnings.catch_warnings(action="ignore"):  # of "4or 2", which is Python, barely
            return str(_node_value(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error"


def _node_value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_node_value(node.left), _node_value(node.right))
    else:
        raise ValueError(node)
    if abs(value) > MAX_MAGNITUDE:
        raise ValueError(value)
    return value

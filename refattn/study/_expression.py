"""Masks as text, such as ``causal & window(64, 0)``: what the command line is given."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from refattn import masks
from refattn.masks import Mask

KNOWN: Mapping[str, Any] = {
    name: getattr(masks, name)
    for name in (
        "block_local",
        "causal",
        "dilated",
        "fixed",
        "global_tokens",
        "lengths",
        "prefix",
        "segmented",
        "segments",
        "strided",
        "window",
    )
}


def mask(text: str) -> Mask:
    """Return the mask that an expression says: functions of `refattn.masks`, integers, lists and None, and ``& | ~``.

    Raises
    ------
    ValueError
        Another expression, or arguments that a mask does not take. Nothing is evaluated but these functions.

    Examples
    --------
    >>> mask("causal & ~window(2, None) | prefix(1)")
    ((causal() & ~window(2, None)) | lengths(1))
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"mask is {text!r}; expected an expression such as 'causal & window(64, 0)'") from None
    try:
        return _mask(tree, text)
    except TypeError as error:
        raise ValueError(f"mask is {text!r}: {error}") from None
    except RecursionError:
        raise ValueError(
            f"mask has {len(text)} characters; expected an expression that is not nested so deep"
        ) from None


def _mask(node: ast.expr, text: str) -> Mask:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _mask(left, text) & _mask(right, text)
        case ast.BinOp(left, ast.BitOr(), right):
            return _mask(left, text) | _mask(right, text)
        case ast.UnaryOp(ast.Invert(), inner):
            return ~_mask(inner, text)
        case ast.Name(name) if name in KNOWN:
            return KNOWN[name]()
        case ast.Call(ast.Name(name), values, keywords) if name in KNOWN and all(word.arg for word in keywords):
            given = {str(word.arg): _value(word.value, text) for word in keywords}
            return KNOWN[name](*(_value(value, text) for value in values), **given)
        case _:
            part = ast.unparse(node)
            raise ValueError(f"mask is {text!r}, with {part!r}; expected masks of {', '.join(KNOWN)} joined by & | ~")


def _value(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"mask is {text!r}, with {ast.unparse(node)!r}; expected integers, lists or None") from None

"""JSONPath (RFC 9535) for bodies that strangers write: one pass, whatever the body.

An expression is the operator's, the body is the caller's. What could take more time than the body is long (two `..`,
several selectors in one segment, queries inside filters that select more than one value, regular expressions) is
refused when the resource is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from jsonpath import JSONPath, JSONPathEnvironment, JSONPathError
from jsonpath.filter import BaseExpression, FilterQuery, FunctionExtension
from jsonpath.segments import JSONPathRecursiveDescentSegment
from jsonpath.selectors import Filter

_ENVIRONMENT: Final = JSONPathEnvironment(strict=True, filter_caching=False)
_FUNCTIONS: Final = ("length", "value")


@lru_cache(maxsize=256)
def compile_json_path(text: str) -> JSONPath:
    """Return the compiled expression.

    Raises: ValueError that says what is wrong with it.
    """
    try:
        path = _ENVIRONMENT.compile(text)
    except JSONPathError as exc:
        reason = str(exc).partition("\n")[0]
        raise ValueError(f"{text!r} is not a JSONPath: {reason}") from None
    except RecursionError:
        raise ValueError(f"{text!r} is nested too deep") from None
    if not isinstance(path, JSONPath):
        raise ValueError(f"{text!r} is not one JSONPath")
    if (excess := next(_excesses(path), None)) is not None:
        raise ValueError(f"{text!r} {excess}")
    return path


def _excesses(path: JSONPath) -> Iterator[str]:
    if sum(isinstance(segment, JSONPathRecursiveDescentSegment) for segment in path.segments) > 1:
        yield "has more than one `..`, which takes too long on large bodies"
    for segment in path.segments:
        if len(segment.selectors) != 1:
            yield "selects several things in one pair of brackets; use one extractor for each"
        for selector in segment.selectors:
            if isinstance(selector, Filter):
                yield from _filter_excesses(selector.expression)


def _filter_excesses(expression: BaseExpression) -> Iterator[str]:
    if isinstance(expression, FilterQuery) and not expression.path.singular_query():
        yield "has a filter that looks at more than one value"
    if isinstance(expression, FunctionExtension) and expression.name not in _FUNCTIONS:
        yield f"uses {expression.name}(); filters may use {' and '.join(f'{name}()' for name in _FUNCTIONS)}"
    for child in expression.children():
        yield from _filter_excesses(child)

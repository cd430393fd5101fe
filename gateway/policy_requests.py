"""What a request may mean to a server beside what its first line says. Pure.

Servers and frameworks let headers and parameters replace the method (`X-HTTP-Method-Override`: Rails, Symfony,
Express' method-override, Google APIs) and the path (`X-Original-URL`: IIS, Symfony, Zend). Whether this one does,
nobody knows, so where a request is judged by its method or path it has to be allowed in each meaning. A `_method`
field in a form's body is not looked at: a rule that narrows the methods of a server that honours it has to narrow the
paths as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Final
from urllib.parse import parse_qsl

from clrk.core.wire import IPAddress
from clrk.gateway.interpret import RequestHead
from clrk.gateway.policy import EgressPolicy, Verdict

_METHODS: Final = frozenset(("x-http-method-override", "x-http-method", "x-method-override", "http-method-override"))
_PATHS: Final = frozenset(("x-original-url", "x-rewrite-url", "x-original-uri", "x-override-url"))
_PARAMETERS: Final = _METHODS | {"_method"}
_MAX_MEANINGS: Final = 32  # more than these no honest request has


def judge_request(
    policy: EgressPolicy, name: str | None, address: IPAddress | None, head: RequestHead
) -> tuple[Verdict, str]:
    """Return the verdict on what a request may mean, and the method that it means then: the first denial, if any."""
    written = policy.request(name, address, head.port, head.method, head.path)
    for method, path in other_meanings(head) if written.allowed else ():
        verdict = policy.request(name, address, head.port, method, path)
        if not verdict.allowed:
            return verdict, method
    return written, head.method


def other_meanings(head: RequestHead) -> Iterator[tuple[str, str]]:
    """Yield each (method, path) that a server may understand beside the one that is written."""
    methods, paths = [head.method], [head.path]
    for name, value in head.headers:
        plain = name.lower().replace("_", "-")  # `_` is `-` to CGI and WSGI
        if plain in _METHODS:
            methods += _upper(value)
        elif plain in _PATHS:
            paths.append(_path(value))
    if "method" in head.query.lower() or "%" in head.query:
        for name, value in parse_qsl(head.query, keep_blank_values=True, errors="replace"):
            if name.lower() in _PARAMETERS:
                methods += _upper(value)
    meanings = list(product(dict.fromkeys(methods), dict.fromkeys(paths)))
    yield from meanings[1:_MAX_MEANINGS]
    if len(meanings) > _MAX_MEANINGS:
        yield head.method, ""  # no rule allows that


def _upper(value: str) -> list[str]:
    """Return the methods in a value: servers differ in case, and in what they make of a list."""
    return [part.strip().upper() for part in value.split(",") if part.strip()]


def _path(value: str) -> str:
    """Return the path in a value that may be a whole URL; what is no path fits no rule."""
    scheme, found, rest = value.strip().partition("://")
    if found and scheme.isalpha():
        return "/" + rest.partition("/")[2]
    return value.strip()

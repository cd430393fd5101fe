"""What is wrong with a document, in the words of its author: field paths as written, nearest valid names."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator
from ipaddress import ip_network
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from clrk.core.resources import KINDS, NOT_YET_FIELDS
from clrk.runtime.config.nodes import Document, Finding, Path

_PLAIN = {
    "missing": "is missing",
    "string_type": "not text; numbers and yes/no need quotes",
    "list_type": "not a list; begin each entry with `- `",
    "too_short": "is empty",
    "dict_type": "not a mapping of names to values",
    "model_type": "not a mapping of fields",
    "model_attributes_type": "not a mapping of fields",
    "int_type": "not a whole number",
    "int_from_float": "not a whole number",
    "int_parsing": "not a whole number",
    "bool_type": "not true or false",
    "bool_parsing": "not true or false",
}
PATTERNS = {
    r"^\$": "not a JSONPath; it begins with $",
    "^[a-z][a-z0-9_]{0,62}$": "not a field name: a-z, 0-9 and _, a letter first, at most 63 characters",
    r"^[a-z0-9.+-]+/([a-z0-9.+-]+|\*)$": "not a media type, such as application/json or text/*",
    "^/": "not an absolute path; it begins with /",
    "^[A-Z]+(?:-[A-Z]+)*$": "not a method in capitals, such as GET",
    "^[A-Za-z_][A-Za-z0-9_]*$": "not a variable name: letters, digits and _, no digit first",
    "^/[^?#]*$": "not a path of a URL: it begins with /, and has neither ? nor #",
    "^[/*][^?#]*$": "not a path of a URL, or a glob of one: it begins with / or *, and has neither ? nor #",
    r"^https?://[^/?#@\s]+/?$": (  # what is written is not shown: it may hold a password
        "not the URL of a proxy, such as http://proxy.corp.example:3128; credentials stand in the Secret of secretRef"
    ),
    r"^(agent|route|identity\.[a-z][a-z0-9_]{0,62})$": "not a key; valid: agent, route, identity.FIELD of an extractor",
    "^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}$": "not the name of a header, such as Authorization",
    "^[A-Za-z0-9._~-]{1,128}$": "not the name of a query parameter: letters, digits, and . _ ~ -",
    r"^[\t\x20-\x7e]*$": "not printable ASCII",
    "^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$": "not a host name in small letters, such as llm.internal",
    "^[a-z0-9-]{1,64}$": "not the name of an AWS service, such as bedrock",
    "^([a-z0-9-]{1,32})?$": "not the name of an AWS region, such as eu-central-1",
}


def format_path(path: Path) -> str:
    """Return `spec.template.spec.env[0].value`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `; did you mean "x"?`, else the valid names, else nothing."""
    choices = sorted(set(valid))
    folded = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{folded[close[0]]}"?'
    return f"; valid: {', '.join(choices)}" if choices and len(choices) <= 20 else ""


def describe_kind(kind: str) -> str:
    """Return why kind is none."""
    return f"unknown kind {kind!r}{nearest(kind, KINDS)}"


def describe_errors(model: type[BaseModel], document: Document, error: ValidationError) -> Iterator[Finding]:
    """Yield one finding for each place that pydantic complained about."""
    seen: set[Path] = set()
    for detail in error.errors(include_url=False):
        path = _written_path(model, detail["loc"], document)
        if path in seen:  # one value tried against several types of a union
            continue
        seen.add(path)
        yield Finding(document.line_of(path), path, _describe(model, path, detail, document))


def _written_path(model: type[BaseModel], loc: Path, document: Document) -> Path:
    """Cut from loc what pydantic adds and the author never wrote: the branch names of unions."""
    loc = _without_tags(loc, document.value)
    existing = document.nearest(loc)
    if len(existing) < len(loc) and any(loc[len(existing)] == name for name in _fields_at(model, existing, document)):
        return loc[: len(existing) + 1]  # a missing field, named although it is not there
    return existing


def _without_tags(loc: Path, value: Any) -> Path:
    """Leave out the names of the branches that `type` chose."""
    path: Path = ()
    for part in loc:
        if isinstance(value, dict) and part not in value and part == value.get("type"):
            continue
        path = (*path, part)
        value = _value_at(value, part)
    return path


def _value_at(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None


def _describe(model: type[BaseModel], path: Path, detail: ErrorDetails, document: Document) -> str:
    code = detail["type"]
    if code == "extra_forbidden":
        return _describe_unknown(model, path, document)
    if code == "union_tag_invalid":
        valid = re.findall(r"'([^']*)'", detail["ctx"]["expected_tags"])
        return f"type {detail['ctx']['tag']!r} is not allowed{nearest(detail['ctx']['tag'], valid)}"
    if code == "union_tag_not_found":
        return "type is missing"
    if code.startswith(("ip_v4_network", "ip_v6_network")):
        return _describe_network(detail["input"])
    if code in ("literal_error", "enum"):
        valid = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        given = detail["input"]
        return (
            f"{given!r} is not allowed{nearest(str(given), valid)}" if isinstance(given, str) else _PLAIN["string_type"]
        )
    if code == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    if code == "string_pattern_mismatch":
        pattern = detail["ctx"]["pattern"]
        return PATTERNS.get(pattern) or f"must match {pattern}"
    return _PLAIN.get(code) or re.sub("^(?:Input|String) should", "must", detail["msg"])


def _describe_network(given: object) -> str:
    try:
        meant = ip_network(str(given), strict=False)
    except ValueError:
        return f"{given!r} is not a network; write for example 10.0.0.0/8 or fd00::/8"
    return f'{given!r} is an address in a network; did you mean "{meant}", or "{str(given).partition("/")[0]}"?'


def _describe_unknown(model: type[BaseModel], path: Path, document: Document) -> str:
    name = str(path[-1])
    dotted = ".".join(part for part in path[1:] if isinstance(part, str))
    later = NOT_YET_FIELDS.get(model.__name__, ()) if path[0] == "spec" else ()
    if any(field == dotted or field.startswith(f"{dotted}.") for field in later):
        return "is part of the contract but not in this version; remove it"
    return f"unknown field{nearest(name, _fields_at(model, path[:-1], document))}"


def _fields_at(model: type[BaseModel], path: Path, document: Document) -> tuple[str, ...]:
    """Return the field names, as written in YAML, of the model that describes the value at path."""
    current: Any = model
    value = document.value
    for part in path:
        value = _value_at(value, part)
        if isinstance(part, int):
            current = _branch_of(_first_argument(current), value)
            continue
        inner = _model_of(current)
        if inner is None:
            current = _first_argument(current)
            continue
        named = [info for name, info in inner.model_fields.items() if part in (info.alias, name)]
        if not named:
            return ()
        current = _branch_of(named[0].annotation, value)
    inner = _model_of(current)
    return tuple(info.alias or name for name, info in inner.model_fields.items()) if inner else ()


def _branch_of(annotation: Any, value: Any) -> Any:
    """Return the member of a union that the value's `type` chooses."""
    union = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    if get_origin(union) not in (Union, types.UnionType) or not isinstance(value, dict):
        return annotation
    for member in get_args(union):
        inner = _model_of(member)
        field = inner.model_fields.get("type") if inner is not None else None
        if field is not None and value.get("type") in get_args(field.annotation):
            return member
    return annotation


def _first_argument(annotation: Any) -> Any:
    """Return T of list[T], V of dict[K, V]."""
    annotation = _strip(annotation)
    arguments = get_args(annotation)
    return arguments[-1] if arguments else None


def _model_of(annotation: Any) -> type[BaseModel] | None:
    annotation = _strip(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _strip(annotation: Any) -> Any:
    """Unwrap Annotated[T, ...] and T | None."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
        else:
            return annotation

"""Where a credential goes into a request: whatever the agent wrote there, the real one is the only one left."""

from __future__ import annotations

from urllib.parse import parse_qsl

from clrk.gateway.credentials import drop_parameters, fold_header, replace_header, replace_parameter


def credential_query(data: bytes) -> None:
    """One value is left, for servers that split at `&` and those that split at `;` too; the rest keeps its bytes."""
    query = data.decode("latin-1")
    replaced = replace_parameter(query, "key", "real")
    for separator in ("&", ";"):
        found = parse_qsl(replaced.replace(separator, "&"), keep_blank_values=True, encoding="latin-1")
        assert [value for name, value in found if name.strip().lower() in ("key", "key[]")] == ["real"], replaced
    rest = drop_parameters(query, ("key",))
    assert drop_parameters(rest, ("key",)) == rest
    pieces = iter(query.replace(";", "&").split("&"))
    assert all(part in pieces for part in rest.replace(";", "&").split("&") if part), rest


def credential_headers(data: bytes) -> None:
    """One value is left, and the others keep their order."""
    lines = [line.partition(":") for line in data.decode("latin-1").split("\n")]
    headers = [(name, value) for name, _, value in lines]
    replaced = replace_header(headers, "X-Api-Key", "real")
    assert [value for name, value in replaced if fold_header(name) == "x_api_key"] == ["real"]
    others = [one for one in headers if fold_header(one[0]) != "x_api_key"]
    assert [one for one in replaced if fold_header(one[0]) != "x_api_key"] == others


TARGETS = {"credential_query": credential_query, "credential_headers": credential_headers}

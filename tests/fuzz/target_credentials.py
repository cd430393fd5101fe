"""Where a credential goes into a request: whatever the agent wrote there, the real one is the only one left."""

from __future__ import annotations

from base64 import b64encode
from urllib.parse import parse_qsl, quote, quote_plus, unquote, unquote_plus

from clrk.core.route_resources import QueryParamTarget
from clrk.gateway.credentials import Credential, Filled, drop_parameters, replace_header, replace_parameter
from clrk.gateway.egress.echo import withhold
from clrk.gateway.egress.http1 import Response
from clrk.gateway.header_names import fold_header

SECRET = "r3al/key of+mine"
SENT = (
    Filled(Credential("p", "s", ("k",), (), QueryParamTarget(type="QueryParam", query_param_name="k")), {"k": SECRET}),
)
CODED = b64encode(SECRET.encode()).decode()
FORMS = (
    SECRET,
    quote(SECRET),
    quote(SECRET, safe=""),
    quote(quote(SECRET, safe=""), safe=""),
    quote_plus(SECRET),
    CODED,
)


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


def credential_echo(data: bytes) -> None:
    """A value in a head does not reach the agent, in whatever form and among whatever; what frames the body stays."""
    around = data.decode("latin-1")
    for form in FORMS:
        told = f"{around}{form}{around}"
        shown = withhold(Response(1, 200, told, (("Location", told), ("Content-Length", "3"))), SENT)
        for text in (shown.reason, shown.headers[0][1]):
            for reading in (text, unquote(text), unquote(unquote(text)), unquote_plus(text)):
                assert SECRET not in reading, text
                assert CODED[2:-4] not in reading, text
        assert shown.headers[1] == ("Content-Length", "3")


TARGETS = {
    "credential_query": credential_query,
    "credential_headers": credential_headers,
    "credential_echo": credential_echo,
}

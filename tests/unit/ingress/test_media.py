"""Media types, and when an event is sent as application/cloudevents+json."""

import pytest

from clrk.gateway.media import parse_media_type, prefers_structured

CE = "application/cloudevents+json"


@pytest.mark.parametrize(
    ("accept", "structured"),
    [
        ("", False),
        ("*/*", False),
        ("application/*", False),
        (CE, True),
        (CE.upper(), True),
        (f"{CE}; charset=utf-8", True),
        (f"{CE};q=0", False),
        (f"{CE};q=0.0", False),
        (f"{CE};q=bogus", False),
        (f"{CE};q=0.5, */*;q=0.1", True),
        (f"*/*, {CE}", True),  # equal: the one that is named
        (f"{CE};q=0.5, */*", False),
        (f"{CE};q=0.5, text/plain", False),
        (f"{CE};q=0.5, text/*;q=0.4", True),
        (f"text/plain;q=0, {CE};q=0.1", True),
        (f"text/html, {CE};q=0.9", True),  # the raw body is text/plain: not acceptable
        (f"text/plain;q=0.2, */*, {CE};q=0.3", True),  # the more specific range decides
        (f'text/plain;x="{CE}"', False),
        (f'text/html;x=",", {CE}', True),
        ('"' * 5000, False),
        ("," * 5000, False),
    ],
)
def test_prefers_structured(accept, structured):
    assert prefers_structured(accept, "text/plain") is structured


def test_parameters():
    media = parse_media_type('Text/Plain; Charset="a\\"b" ;x=1;')
    assert media is not None
    assert media.essence == "text/plain"
    assert media.parameters == {"charset": 'a"b', "x": "1"}


@pytest.mark.parametrize("text", ["", "text", "text/", "/plain", "text/plain junk", "text/plain; =x", 'a/b;c="open'])
def test_not_a_media_type(text):
    assert parse_media_type(text) is None

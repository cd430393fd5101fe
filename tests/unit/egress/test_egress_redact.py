"""Nothing that a gateway knows to be secret is on a span, whoever wrote it there and in whatever place."""

from __future__ import annotations

import base64

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream

from clrk.gateway.egress.record import full_url
from clrk.gateway.interpret import Facts, RequestHead
from clrk.gateway.llm import values
from clrk.gateway.redact import KNOWN_SECRETS

RULES = [{"hostnames": ["tools.internal"], "http": {"paths": ["/open"]}}]
SECRET = "uN-gu3ssable/value 17"
KEY = "ghp_aB3dE5gH7jK9mN1pQ3sT5vX7zA9cE1gH3jL5"


def spec(port: int) -> dict:
    return {
        **aliased(port, "tools.internal"),
        "upstreamProxy": {"url": "http://127.0.0.1:1", "secretRef": {"name": "upstream"}},
        "redact": {"patterns": ["EMP-[0-9]+"]},
        "otlp": {"endpoint": "http://127.0.0.1:4318", "captureBody": {}},
    }


class Echo:
    """An interpreter that believes what it reads."""

    wants_whole_request = False

    def __getattr__(self, name):
        return lambda *args, **_: args[0] if args else b""

    def facts(self):
        return Facts(
            f"tools/call EMP-77 {KEY}", {"mcp.resource.uri": f"file:///{SECRET}", "gen_ai.response.model": KEY},
            "tool_error", f"failed with EMP-78 and {KEY}",
        )  # fmt: skip


async def _echo(reader, writer) -> None:
    await read_request(reader)
    coded = base64.b64encode(b"user:" + SECRET.encode()).decode()
    body = f'{{"sent": "{SECRET}", "coded": "{coded}", "staff": "EMP-1"}}'.encode()
    writer.write(answer(body, headers=f"Content-Type: application/json\r\nX-Echo: {SECRET} EMP-2 {KEY}\r\n"))
    await writer.drain()


def test_a_host_is_redacted_in_a_url_too() -> None:
    """What an agent looks up may be what it wants to tell somebody."""
    head = RequestHead("GET", "https", "glpat-ab3de5gh7jk9.tools.internal", 8443, "/open", "", ())
    assert full_url(head, KNOWN_SECRETS) == "https://REDACTED.tools.internal:8443/open"


@pytest.mark.parametrize("cut", range(200, 257))
def test_no_text_is_cut_inside_a_secret(cut: int) -> None:
    """A half of it may be none that anybody knows any more, and says enough."""
    told = "x " * (cut // 2) + KEY + " and more of it" * 9
    for found in (values.text(told), values.message(told)):
        assert not any(KEY[at : at + 5] in KNOWN_SECRETS.text(found or "") for at in range(len(KEY) - 5))
        assert (found or "").startswith("x x x")


@pytest.mark.parametrize("path", [f"/open/EMP-3/{KEY}?q=EMP-4&s=uN-gu3ssable%2Fvalue%2017", f"/closed/EMP-5/{KEY}"])
async def test_secrets_of_a_gateway_are_on_no_span(path: str) -> None:
    secrets = {"default/upstream": {"password": SECRET}}
    async with (
        upstream(_echo) as port,
        laboratory(gateway=spec(port), rules=RULES, secrets=secrets, recognise=lambda _: Echo()) as lab,
    ):
        wire = await lab.dial("tools.internal", 80)
        head = f"GET {path} HTTP/1.1\r\nHost: tools.internal\r\nX-Note: {SECRET} EMP-6\r\n"
        got = await wire.ask(f"{head}Content-Length: 11\r\nConnection: close\r\n\r\nI am EMP-79".encode())
        assert (SECRET.encode() in got) is path.startswith("/open")  # the agent gets what the upstream said
        (span,) = await lab.recorder.wait()
        begun = lab.recorder.begun
    shown = repr((span, begun))
    for secret in (SECRET, "gu3ssable", KEY, "EMP-"):
        assert secret not in shown
    assert "REDACTED" in span.attributes["url.full"]

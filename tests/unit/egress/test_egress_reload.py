"""Other rules for a run that goes on: the next request is judged by them, and no connection is lost that they allow."""

from __future__ import annotations

import asyncio

import dns.asyncquery
import dns.message
import dns.rcode
from egress_lab import Lab, aliased, answer, laboratory, read_request, upstream

from clrk.core.egress_resources import EgressGateway, EgressL4Route

NAME, OTHER = "tools.internal", "other.internal"
GET = b"GET /a HTTP/1.1\r\nHost: %b\r\n\r\n"


def reload(lab: Lab, *rules: dict, **spec) -> None:
    """What a reload does to a daemon's run."""
    route = {"kind": "EgressL4Route", "metadata": {"name": "out"}, "spec": {"rules": list(rules)}}
    gateway = EgressGateway.model_validate(
        lab.config.gateways[0].model_dump(by_alias=True)
        | {"spec": lab.config.gateways[0].spec.model_dump(by_alias=True) | spec}
    )
    routes = [EgressL4Route.model_validate(route)] if rules else []
    lab.service.reconfigure(lab.config.model_copy(update={"gateways": [gateway], "routes": routes}))
    lab.egress.reconfigure(gateway)


async def serve(reader, writer) -> None:
    while True:
        await read_request(reader)
        writer.write(answer(b"hello"))


async def echo(reader, writer) -> None:
    while data := await reader.read(100):
        writer.write(data)


async def resolves(lab: Lab, name: str) -> bool:
    host, port = lab.sockets.dns_udp.getsockname()
    reply = await dns.asyncquery.udp(dns.message.make_query(name, "A"), host, port=port, timeout=5)
    return reply.rcode() == dns.rcode.NOERROR


async def said(wire, data: bytes) -> bytes:
    wire.writer.write(data)
    async with asyncio.timeout(25):
        return await wire.reader.readexactly(len(data))


async def test_the_next_request_of_a_connection_is_judged_by_the_new_rules() -> None:
    rule = {"hostnames": [NAME]}
    async with upstream(serve) as port, laboratory(gateway=aliased(port, NAME, OTHER), rules=[rule]) as lab:
        wire = await lab.dial(NAME, 80)
        for rules in ([rule], [rule, {"hostnames": [OTHER]}], [{**rule, "http": {"methods": ["GET"]}}]):
            wire.writer.write(GET % NAME.encode())
            assert (await wire.response())[1] == b"hello"
            reload(lab, *rules)
        assert not await resolves(lab, OTHER)
        wire.writer.write(GET % NAME.encode())
        assert (await wire.response())[1] == b"hello"  # the same connection, through three reloads
        wire.writer.write(
            GET.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 0\r\n\r\n") % NAME.encode()
        )
        head, _ = await wire.response()
        assert head.startswith(b"HTTP/1.1 403")
        spans = await lab.recorder.wait(6)
    names = [span.name for span in spans]
    assert names == ["GET tools.internal"] * 3 + ["egress.dns.denied", "GET tools.internal", "egress.dial.denied"]


async def test_new_names_and_connections_are_judged_by_the_new_rules() -> None:
    async with upstream(serve) as port, laboratory(gateway=aliased(port, NAME, OTHER), rules=[]) as lab:
        assert not await resolves(lab, OTHER)
        reload(lab, {"hostnames": [OTHER]})
        wire = await lab.dial(OTHER, 80)
        wire.writer.write(GET % OTHER.encode())
        assert (await wire.response())[1] == b"hello"
        reload(lab, mode="Shadow")
        wire = await lab.dial(NAME, 80)
        wire.writer.write(GET % NAME.encode())
        assert (await wire.response())[1] == b"hello"
        reload(lab)
        assert not await resolves(lab, NAME)


async def test_tunnels_that_are_still_allowed_stay_and_the_others_end_with_a_span() -> None:
    rules = [{"hostnames": [NAME], "ports": [5432]}, {"hostnames": [OTHER], "ports": [5432]}]
    async with upstream(echo) as port, laboratory(gateway=aliased(port, NAME, OTHER), rules=rules) as lab:
        kept, lost = await lab.dial(NAME, 5432), await lab.dial(OTHER, 5432)
        assert await said(kept, b"\0one") == b"\0one"
        assert await said(lost, b"\0two") == b"\0two"
        reload(lab, {"hostnames": [NAME]})
        async with asyncio.timeout(25):
            try:
                assert await lost.reader.read(10) == b""
            except ConnectionResetError:
                pass  # that is how it is told
        (span,) = await lab.recorder.wait()
        assert (span.name, span.attributes["error.type"]) == ("egress.tcp", "policy_changed")
        assert span.attributes["clrk.dst.name"] == OTHER
        assert span.attributes["clrk.req.bytes"] == 4
        assert await said(kept, b"three") == b"three"
        reload(lab, {"hostnames": [NAME], "http": {"methods": ["GET"]}})  # no tunnel any more
        _, second = await lab.recorder.wait(2)
    assert (second.attributes["clrk.dst.name"], second.attributes["error.type"]) == (NAME, "policy_changed")
    assert second.attributes["clrk.req.bytes"] == 9


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: tools.internal\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


async def _socket(reader, writer) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    await echo(reader, writer)


async def test_a_web_socket_ends_when_its_request_is_allowed_no_more() -> None:
    rule = {"hostnames": [NAME], "http": {"paths": ["/ws"]}}
    async with upstream(_socket) as port, laboratory(gateway=aliased(port, NAME), rules=[rule]) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(UPGRADE)
        async with asyncio.timeout(25):
            assert (await wire.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        assert await said(wire, b"frame") == b"frame"
        reload(lab, {**rule, "ports": [80]})
        assert await said(wire, b"frame") == b"frame"
        reload(lab, {**rule, "http": {"paths": ["/other"]}})
        (span,) = await lab.recorder.wait()
    assert span.attributes["error.type"] == "policy_changed"
    assert span.attributes["http.response.status_code"] == 101


async def test_a_tunnel_that_was_dialled_while_the_rules_changed_does_not_open() -> None:
    held = asyncio.Event()

    async with upstream(echo) as port:
        spec = aliased(port, NAME)
        async with laboratory(gateway=spec, rules=[{"hostnames": [NAME]}]) as lab:
            dial = lab.egress._acceptor.way_out.upstream.dial

            async def late(target):
                await held.wait()
                return await dial(target)

            lab.egress._acceptor.way_out.upstream.dial = late
            wire = await lab.dial(NAME, 5432)
            wire.writer.write(b"\0one")
            await asyncio.sleep(0.05)
            reload(lab)
            held.set()
            (span,) = await lab.recorder.wait()
    assert span.attributes["error.type"] == "policy_changed"
    assert span.attributes["clrk.req.bytes"] == 0


async def test_the_end_of_a_run_is_no_change_of_policy() -> None:
    async with upstream(echo) as port, laboratory(gateway=aliased(port, NAME), rules=[{"hostnames": [NAME]}]) as lab:
        wire = await lab.dial(NAME, 5432)
        assert await said(wire, b"\0one") == b"\0one"
        reload(lab)
        await lab.egress.close()
        (span,) = lab.spans
    assert span.attributes["error.type"] == "cancelled"

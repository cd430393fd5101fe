"""One exchange through the relay: an upstream that answers with given replies, and an agent that asks."""

from __future__ import annotations

from egress_lab import aliased, laboratory, read_request, upstream

NAME = "tools.internal"
ALLOW = [{"hostnames": [NAME, "api.example.com"]}]
GET = b"GET / HTTP/1.1\r\nHost: tools.internal\r\nConnection: close\r\n\r\n"


def replying(*replies: bytes, seen: list | None = None):
    """An upstream that answers each request with the next reply, keeps what it saw, and closes."""

    async def handle(reader, writer):
        for reply in replies:
            request = await read_request(reader)
            if seen is not None:
                seen.append(request)
            writer.write(reply)
            await writer.drain()

    return handle


async def through(reply: bytes, request: bytes = GET):
    """One exchange: what the agent got, and the span."""
    async with upstream(replying(reply)) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(request)
        spans = await lab.recorder.wait()
        assert len(spans) == 1
    return raw, spans[0]

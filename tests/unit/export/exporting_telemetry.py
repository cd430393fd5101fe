"""Telemetry that exports to a receiver of the tests, and what of it is stored."""

import asyncio
import json

from span_samples import config, gateway

from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.query import SpanFilter


def exporting(receiver, name="default", **otlp):
    return gateway(receiver.endpoint, name=name, protocol=receiver.protocol, **otlp)


def opened(tmp_path, receiver, **otlp):
    return Telemetry.open(tmp_path, config([exporting(receiver, **otlp)]))


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def stored(telemetry):
    await telemetry.flush()
    return [json.loads(span.json) async for page in telemetry.store.spans(SpanFilter()) for span in page]

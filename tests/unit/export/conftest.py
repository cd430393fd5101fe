"""What exports in these tests tries again at once; the receiver is the independent one, over both protocols."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
from otlp_receiver import Receiver

from clrk.gateway.telemetry import export_task


@pytest.fixture(autouse=True)
def fast_backoff(monkeypatch):
    monkeypatch.setattr(export_task, "_FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(export_task, "_BATCH_DELAY_S", 0.01)


@pytest.fixture(params=["http/protobuf", "grpc"])
async def receiver(request):
    async with Receiver(request.param) as started:
        yield started

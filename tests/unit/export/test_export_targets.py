"""Who gets what: each backend its own spans with its own headers, where its endpoint says, also when that changes."""

import logging
import time

import pytest
from exporting_telemetry import exporting, opened, stored, until
from otlp_receiver import Failure, Receiver
from span_samples import config, identity, record

from clrk.core.ids import new_span_id, new_trace_id
from clrk.gateway.telemetry.export_target import grpc_authority, signal_url
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.spans import TraceContext


async def test_each_gateway_gets_its_own_spans_and_history_is_not_sent(tmp_path):
    async with Receiver() as first, Receiver("grpc") as second:
        telemetry = Telemetry.open(tmp_path, config())
        record(telemetry, identity(), "history", start_ns=time.time_ns() - 10**9)
        await telemetry.flush()
        telemetry.reconfigure(config([exporting(first), exporting(second, name="other")]))
        # What began before and ends after the configuration is wanted.
        record(telemetry, identity(), "a", start_ns=time.time_ns() - 10**9, length_ns=2 * 10**9)
        record(telemetry, identity(gateway_name="other"), "b")
        record(telemetry, identity(gateway_name="third"), "c")
        record(telemetry, identity(gateway_name=""), "d")
        await first.wait(lambda: "a" in first.names)
        await second.wait(lambda: "b" in second.names)
        await telemetry.close()
        assert (first.names, second.names) == (["a"], ["b"])


async def test_headers_go_to_their_own_backend_and_into_no_log(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    async with Receiver() as first, Receiver("grpc") as second, Receiver() as standard:
        second.fail = lambda signal, message: Failure(503)
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": standard.endpoint,
            "OTEL_EXPORTER_OTLP_HEADERS": "x-env=s3cret-environment",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "authorization=Bearer%20s3cret-traces",
        }
        gateways = [
            exporting(first, headers={"Authorization": "Bearer s3cret-first"}),
            exporting(second, name="other", headers={"Authorization": "Bearer s3cret-second"}),
        ]
        telemetry = Telemetry.open(tmp_path, config(gateways, environment=environment))
        record(telemetry, identity(), "a")
        record(telemetry, identity(gateway_name="other"), "b")
        record(telemetry, identity(gateway_name="plain"), "c")
        telemetry.record_log(identity(gateway_name="plain"), "stdout", b"line", time.time_ns())
        await first.wait(lambda: first.names == ["a"])
        await standard.wait(lambda: standard.names == ["c"] and standard.logs)
        await second.wait(lambda: second.refused)
        status = await telemetry.export_status()
        await telemetry.close()
        by_backend = {
            "first": [one.metadata for one in first.requests],
            "second": [one.metadata for one in second.refused],
            "standard": [one.metadata for one in standard.requests],
        }
    secrets = {
        backend: {
            value.split()[-1] for metadata in all_metadata for value in metadata.values() if "s3cret" in str(value)
        }
        for backend, all_metadata in by_backend.items()
    }
    assert secrets == {
        "first": {"s3cret-first"}, "second": {"s3cret-second"}, "standard": {"s3cret-traces", "s3cret-environment"},
    }  # fmt: skip
    logs = next(one.metadata for one in standard.requests if one.signal == "logs")
    assert "Authorization" not in logs
    assert "s3cret" not in caplog.text
    assert "s3cret" not in repr(status)


async def test_unsampled_spans_stay_in_the_store(tmp_path, receiver):
    telemetry = opened(tmp_path, receiver)
    unsampled = identity()
    object.__setattr__(unsampled, "context", TraceContext(new_trace_id(), new_span_id(), flags=0))
    record(telemetry, unsampled, "quiet")
    telemetry.record_log(unsampled, "stdout", b"but said", time.time_ns())
    record(telemetry, identity(), "loud")
    await receiver.wait(lambda: receiver.names == ["loud"] and receiver.logs)
    assert {document["name"] for document in await stored(telemetry)} == {"quiet", "loud"}
    await telemetry.close()
    assert (receiver.logs[0].body.string_value, receiver.logs[0].flags) == ("but said", 0)


async def test_a_target_that_changes_goes_on_where_the_old_one_stopped(tmp_path):
    async with Receiver() as old, Receiver("grpc") as new:
        telemetry = opened(tmp_path, old)
        record(telemetry, identity(), "one")
        await until(lambda: telemetry.store.counters["exported_spans"] == 1)
        telemetry.reconfigure(config([exporting(new)]))
        record(telemetry, identity(), "two")
        await new.wait(lambda: new.names == ["two"])
        await until(lambda: telemetry.store.counters["exported_spans"] == 2)
        telemetry.reconfigure(config())
        record(telemetry, identity(), "meanwhile")
        await telemetry.flush()
        telemetry.reconfigure(config([exporting(old)]))
        await old.wait(lambda: old.names == ["one", "meanwhile"])
        await telemetry.close()
        assert (old.names, new.names) == (["one", "meanwhile"], ["two"])


async def test_a_store_that_was_replaced_is_exported_from_its_beginning(tmp_path, receiver):
    telemetry = opened(tmp_path, receiver)
    for index in range(20):
        record(telemetry, identity(), f"old{index}")
    await until(lambda: telemetry.store.counters["exported_spans"] == 20)
    await telemetry.close()
    for path in tmp_path.iterdir():
        if path.name.startswith("traces.db"):
            path.unlink()
    telemetry = opened(tmp_path, receiver)
    record(telemetry, identity(), "new")
    await receiver.wait(lambda: "new" in receiver.names)
    await telemetry.close()
    assert receiver.names == [*(f"old{index}" for index in range(20)), "new"]


@pytest.mark.parametrize(
    ("endpoint", "signal", "url"),
    [
        ("http://c:4318", "traces", "http://c:4318/v1/traces"),
        ("http://c:4318/", "logs", "http://c:4318/v1/logs"),
        ("https://c/otlp", "metrics", "https://c/otlp/v1/metrics"),
        ("https://c/v1/traces", "traces", "https://c/v1/traces"),
        ("https://c/v1/traces", "logs", "https://c/v1/logs"),
        ("https://c/v1/traces/?k=v", "traces", "https://c/v1/traces?k=v"),
    ],
)
def test_a_base_endpoint_gets_the_path_of_the_signal(endpoint, signal, url):
    assert signal_url(endpoint, signal) == url


@pytest.mark.parametrize(
    ("endpoint", "insecure", "authority"),
    [
        ("http://c:4317", False, ("c:4317", False)),
        ("https://c:4317/ignored", False, ("c:4317", True)),
        ("https://c", True, ("c:443", True)),
        ("http://[::1]", False, ("[::1]:80", False)),
        ("c:4317", False, ("c:4317", True)),
        ("c:4317", True, ("c:4317", False)),
    ],
)
def test_the_forms_of_a_grpc_endpoint(endpoint, insecure, authority):
    assert grpc_authority(endpoint, insecure=insecure) == authority

"""The standard variables, as the OpenTelemetry specification has them: one row per rule."""

import pytest
from tls_material import Authority

from clrk.gateway.telemetry.export_target import environment_targets, metric_interval_s, shown_endpoint
from clrk.runtime.config.declared import Problems
from clrk.runtime.config.exporters import read_environment_files

BASE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}
ALL = {"traces": "http://c:4318/v1/traces", "logs": "http://c:4318/v1/logs", "metrics": "http://c:4318/v1/metrics"}
P = "OTEL_EXPORTER_OTLP_"


def endpoints(environment):
    return {signal: target.endpoint for signal, target in environment_targets(environment, {}).items()}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        (BASE, ALL),
        ({P + "ENDPOINT": " http://c:4318/ "}, ALL),
        ({P + "ENDPOINT": ""}, {}),
        ({P + "ENDPOINT": "http://c/base"}, {signal: f"http://c/base/v1/{signal}" for signal in ALL}),
        ({P + "TRACES_ENDPOINT": "http://c/in"}, {"traces": "http://c/in"}),
        (BASE | {P + "LOGS_ENDPOINT": "https://l"}, ALL | {"logs": "https://l"}),
        (BASE | {P + "LOGS_ENDPOINT": ""}, ALL),
        (BASE | {"OTEL_SDK_DISABLED": "TRUE"}, {}),
        (BASE | {"OTEL_SDK_DISABLED": "1"}, ALL),
        (BASE | {"OTEL_TRACES_EXPORTER": "none"}, {k: v for k, v in ALL.items() if k != "traces"}),
        (BASE | {"OTEL_LOGS_EXPORTER": "none"}, {k: v for k, v in ALL.items() if k != "logs"}),
        (BASE | {"OTEL_METRICS_EXPORTER": "none"}, {k: v for k, v in ALL.items() if k != "metrics"}),
        (BASE | {"OTEL_METRICS_EXPORTER": "prometheus"}, {k: v for k, v in ALL.items() if k != "metrics"}),
        (BASE | {"OTEL_TRACES_EXPORTER": "console, otlp"}, ALL),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, {"traces": "http://localhost:4318/v1/traces"}),
        ({"OTEL_TRACES_EXPORTER": "otlp", P + "PROTOCOL": "grpc"}, {"traces": "localhost:4317"}),
        (BASE | {P + "PROTOCOL": "grpc"}, dict.fromkeys(ALL, "c:4318")),
        (BASE | {P + "TRACES_PROTOCOL": "grpc"}, ALL | {"traces": "c:4318"}),
        (BASE | {P + "PROTOCOL": "http/json"}, {}),
        (BASE | {P + "PROTOCOL": "http/json", P + "LOGS_PROTOCOL": "http/protobuf"}, {"logs": ALL["logs"]}),
        ({P + "ENDPOINT": "c:4318"}, {}),
        ({P + "ENDPOINT": "http://[::1"}, {}),
        (BASE | {P + "TRACES_CERTIFICATE": "/not/read"}, {k: v for k, v in ALL.items() if k != "traces"}),
    ],
)
def test_endpoints_protocols_and_what_is_switched_off(environment, expected):
    assert endpoints(environment) == expected


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("TIMEOUT", "2500", "timeout_s", 2.5),
        ("TIMEOUT", "soon", "timeout_s", 10.0),
        ("TIMEOUT", "0", "timeout_s", 10.0),
        ("COMPRESSION", "gzip", "gzip", True),
        ("COMPRESSION", "none", "gzip", False),
        ("COMPRESSION", "zstd", "gzip", False),
        ("HEADERS", "a=b,C=d%20e, f = g ", "headers", (("a", "b"), ("c", "d e"), ("f", "g"))),
        ("HEADERS", "a=b=c", "headers", (("a", "b=c"),)),
        ("HEADERS", "broken,a=b,=x,b=x%0d%0ay", "headers", (("a", "b"),)),
        ("CERTIFICATE", "/ca.pem", "ca_pem", "CA"),
        ("CERTIFICATE", "/ca.pem", "only_ca", True),
        ("CLIENT_CERTIFICATE", "/cert.pem", "client_cert_pem", "CERT"),
        ("CLIENT_KEY", "/key.pem", "client_key_pem", "KEY"),
    ],
)
def test_options_of_all_signals_and_of_one(name, value, field, expected):
    files = {"/ca.pem": "CA", "/cert.pem": "CERT", "/key.pem": "KEY"}
    plain = environment_targets(BASE, files)
    for target in environment_targets(BASE | {P + name: value}, files).values():
        assert getattr(target, field) == expected
    targets = environment_targets(BASE | {P + "LOGS_" + name: value}, files)
    assert getattr(targets["logs"], field) == expected
    assert targets["traces"] == plain["traces"]
    empty = environment_targets(BASE | {P + name: value, P + "LOGS_" + name: ""}, files)
    assert getattr(empty["logs"], field) == expected


@pytest.mark.parametrize(
    ("endpoint", "more", "secure"),
    [
        ("http://c:4317", {}, False),
        ("https://c:4317", {P + "INSECURE": "true"}, True),
        ("c:4317", {}, True),
        ("c:4317", {P + "INSECURE": "true"}, False),
        ("c:4317", {P + "TRACES_INSECURE": "TRUE"}, False),
    ],
)
def test_whether_grpc_is_encrypted(endpoint, more, secure):
    environment = {P + "ENDPOINT": endpoint, P + "PROTOCOL": "grpc"} | more
    assert environment_targets(environment, {})["traces"].secure is secure


@pytest.mark.parametrize(("value", "seconds"), [("", 60.0), ("5000", 5.0), ("0", 60.0), ("-1", 60.0), ("x", 60.0)])
def test_the_interval_of_metrics(value, seconds):
    assert metric_interval_s({"OTEL_METRIC_EXPORT_INTERVAL": value}) == seconds


def test_nothing_secret_is_in_what_may_be_printed(caplog):
    environment = {
        P + "ENDPOINT": "https://user:s3cret@c/base?token=s3cret",
        P + "HEADERS": "authorization=s3cret,broken s3cret",
        P + "CLIENT_KEY": "/key.pem",
    }
    targets = environment_targets(environment, {"/key.pem": "s3cret"})
    assert "s3cret" not in repr(targets) + caplog.text
    assert shown_endpoint(targets["logs"]) == "https://c/base/v1/logs"


# --- the files that they name: read by the runtime ------------------------------------------------------------------


def test_files_are_read_and_every_problem_has_the_name_of_its_variable(tmp_path):
    authority = Authority()
    certificate, key = authority.issue()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "cert.pem").write_bytes(certificate)
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "empty.pem").write_text("nothing here\n")
    (tmp_path / "large.pem").write_bytes(authority.pem + b"#" * 2**20)
    problems = Problems()
    good = {
        P + "CERTIFICATE": str(tmp_path / "ca.pem"),
        P + "LOGS_CLIENT_CERTIFICATE": str(tmp_path / "cert.pem"),
        P + "LOGS_CLIENT_KEY": str(tmp_path / "key.pem"),
    }
    assert read_environment_files(good, problems) == {
        str(tmp_path / "ca.pem"): authority.pem.decode(),
        str(tmp_path / "cert.pem"): certificate.decode(),
        str(tmp_path / "key.pem"): key.decode(),
    }
    assert problems.lines() == ()
    bad = {
        P + "CERTIFICATE": str(tmp_path / "missing.pem"),
        P + "TRACES_CERTIFICATE": str(tmp_path),
        P + "LOGS_CERTIFICATE": str(tmp_path / "empty.pem"),
        P + "METRICS_CERTIFICATE": str(tmp_path / "large.pem"),
        P + "CLIENT_KEY": str(tmp_path / "ca.pem"),
    }
    assert read_environment_files(bad, problems) == {}
    assert sorted(problems.lines()) == [
        f"{P}CERTIFICATE: No such file or directory: {tmp_path}/missing.pem",
        f"{P}CLIENT_KEY: needs {P}CLIENT_CERTIFICATE",
        f"{P}CLIENT_KEY: no unencrypted PEM key in {tmp_path}/ca.pem",
        f"{P}LOGS_CERTIFICATE: no PEM certificate in {tmp_path}/empty.pem",
        f"{P}METRICS_CERTIFICATE: over 1 MiB: {tmp_path}/large.pem",
        f"{P}TRACES_CERTIFICATE: not a regular file: {tmp_path}",
    ]

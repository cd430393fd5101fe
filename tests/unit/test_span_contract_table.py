"""The table of CONTRACT section 13 notices what it is there for."""

import copy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))
from span_contract import violations

DENIED = {
    "name": "egress.dial.denied",
    "kind": "SPAN_KIND_CLIENT",
    "status": {"code": "STATUS_CODE_ERROR", "message": "no"},
    "attributes": {
        "invocation.id": "i", "agent.kind": "TaskAgent", "agent.namespace": "default", "agent.name": "a",
        "agent.uid": "u", "agent.revision": "r", "clrk.sandbox.id": "s", "process.pid": 1,
        "process.executable.name": "x", "network.peer.address": "198.18.0.1", "network.peer.port": 443,
        "clrk.dst.name": "evil.example", "clrk.req.bytes": 0, "clrk.resp.bytes": 0, "error.type": "no_rule",
        "clrk.egress.deny_reason": "no_rule",
    },
    "events": [],
    "resource": {
        "service.name": "clrk", "service.version": "1", "clrk.component": "gateway", "host.name": "h",
        "clrk.egress_gateway": "default/default",
    },
}  # fmt: skip


def changed(**more):
    span = copy.deepcopy(DENIED)
    for path, value in more.items():
        where, _, key = path.partition("__")
        target = span if not key else span[where]
        key = key.replace("__", ".") if key else where
        if value is None:
            del target[key]
        else:
            target[key] = value
    return span


def test_a_span_as_the_contract_has_it():
    assert list(violations([DENIED])) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "SPAN_KIND_INTERNAL"}, "kind"),
        ({"status": {"code": "STATUS_CODE_UNSET", "message": ""}}, "status"),
        ({"attributes__process__pid": "1"}, "process.pid is str, not int"),
        ({"attributes__process__pid": True}, "process.pid is bool, not int"),
        ({"attributes__agent__uid": None}, "agent.uid is missing"),
        ({"attributes__invocation__id": None}, "invocation.id of a TaskAgent"),
        ({"attributes__agent__kind": "DaemonAgent"}, "invocation.id of a DaemonAgent"),
        ({"attributes__clrk__egress__deny_reason": None}, "clrk.egress.deny_reason is missing"),
        ({"attributes__http__request__header__authorization": "x"}, "is not in the contract"),
        ({"attributes__ce__subject": "x"}, "is not in the contract"),
        ({"resource__clrk__component": "ingress"}, "component ingress"),
        ({"resource__secret": "x"}, "secret is not in the contract"),
        ({"events": [{"name": "surprise", "attributes": {}}]}, "event surprise"),
        ({"events": [{"name": "http.request.body", "attributes": {"a": 1}}]}, "a is not in the contract"),
    ],
)
def test_what_the_contract_does_not_have(change, problem):
    assert any(problem in found for found in violations([changed(**change)]))

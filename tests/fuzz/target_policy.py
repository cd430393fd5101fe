"""The policy's normalisation and the redactor: one meaning, however it is spelled; no secret, wherever it is cut."""

from __future__ import annotations

from ipaddress import ip_address

import yaml

from clrk.core.egress_resources import EgressGateway, EgressL4Route, L4Rule
from clrk.core.url_paths import path_readings
from clrk.gateway.interpret import RequestHead
from clrk.gateway.policy import EgressPolicy
from clrk.gateway.policy_names import normalise_name, parse_ip
from clrk.gateway.policy_paths import PathPattern
from clrk.gateway.policy_requests import other_meanings
from clrk.gateway.redact import redact_text, redact_url

INSIDE = PathPattern.compile("/public")
SECRET = "ghp_aB3dE5gH7jK9mN1pQ3sT5vX7zA9cE1gH3jL5"


def _policy(*rules: dict[str, object]) -> EgressPolicy:
    gateway = EgressGateway.model_validate({"kind": "EgressGateway", "metadata": {"name": "default"}})
    route = {"kind": "EgressL4Route", "metadata": {"name": "r"}, "spec": {"rules": rules}}
    return EgressPolicy.compile(gateway, [EgressL4Route.model_validate(route)] if rules else [])


NARROW = _policy({"hostnames": ["a.test"], "http": {"paths": ["/public"]}})


def policy_path(data: bytes) -> None:
    """What fits a prefix stays in it for a server that decodes, ignores parameters, or takes `\\` for `/`."""
    path = data.decode("latin-1")
    readings = path_readings(path)
    assert len(readings) in (0, 3)
    assert all(reading.startswith("/") for reading in readings)
    if INSIDE.matches(readings):
        for served in (readings[0], readings[2]):
            assert ".." not in served.split("/")
            assert served.split("/")[1] == "public"
    head = RequestHead(
        "GET", "https", "a.test", 443, path, data.decode("utf-8", "replace"), (("X-Original-URL", path),)
    )
    meanings = list(other_meanings(head))
    assert len(meanings) <= 64
    hint = NARROW.request("a.test", None, 443, "GET", path).hint
    for rule in yaml.safe_load(hint) or ():  # hostile bytes stay inside their quotes
        assert set(L4Rule.model_validate(rule).model_fields_set) <= {"hostnames", "ports", "http"}


def policy_name(data: bytes) -> None:
    """A name has one spelling, is no address in disguise, and is in no rule that is not its own."""
    name = data.decode("utf-8", "replace")
    normal = normalise_name(name)
    literal = parse_ip(name)
    if normal is not None:
        assert normalise_name(normal) == normal == normal.lower()
        assert parse_ip(normal) is None
        assert not normal.rsplit(".", 1)[-1].isdigit()
    verdict = NARROW.connect(name, ip_address("198.51.100.7"), 443)
    assert verdict.allowed == (normal == "a.test")
    if literal is None and normal is not None and not verdict.allowed:
        assert _policy(*yaml.safe_load(verdict.hint)).connect(name, None, 443).allowed


def redact(data: bytes) -> None:
    """A secret in any text is not shown, nor half of it where the text was cut; redacting shown text fails never."""
    around = data.decode("utf-8", "replace")
    text = f"{around} {SECRET} {around}"
    shown = redact_text(text)
    assert SECRET[4:] not in shown
    assert SECRET[4:] not in redact_url(text)
    for cut in range(len(around) + 8, len(around) + len(SECRET), 7):
        assert SECRET[4:14] not in redact_text(text[:cut], cut_end=True) or SECRET[4:14] in around
        assert SECRET[-10:] not in redact_text(text[cut:], cut_start=True) or SECRET[-10:] in around
    redact_text(shown)


TARGETS = {"policy_path": policy_path, "policy_name": policy_name, "redact": redact}

"""`clrk policy explain` and `clrk policy suggest` as processes of their own, against the real admin API and store."""

import json

import yaml
from clrk_command import HOSTILE, run
from span_samples import identity, record

from clrk.core.egress_resources import EgressL4Route


async def test_explain(daemon):
    done = await run(daemon.path, "policy", "explain", "support", "GET", "https://api.example.com/v1")
    assert done.code == 1
    assert "deny (name_not_allowed)" in done.out
    assert '- hostnames: ["api.example.com"]' in done.out
    done = await run(daemon.path, "policy", "explain", "support", "GET", "https://api.example.com/v1", "-o", "json")
    document = json.loads(done.out)
    assert (done.code, document["allowed"], document["agent"]) == (1, False, "default/support")
    done = await run(daemon.path, "policy", "explain", "support", "GET", "https://me@x/")
    assert (done.code, done.out) == (2, "")  # as with grep: 1 is an answer, 2 is none
    assert "credentials" in done.err
    done = await run(daemon.path, "policy", "explain", "nobody", "GET", "https://x.test/")
    assert (done.code, done.err) == (2, 'clrk: no agent "default/nobody"\n')
    done = await run(daemon.path, "policy", "explain", "support", "GET", "https://[2001:db8::1]/x")
    assert "GET [2001:db8::1]:443/x" in done.out
    done = await run(daemon.path, "policy", "explain", "support", "GET", f"https://x.test/{HOSTILE}")
    assert "\x1b" not in done.out + done.err


async def test_suggest(daemon):
    call = {"server__port": 443, "http__request__method": "GET"}
    record(daemon.telemetry, identity(), "GET a", clrk__dst__name="api.test", url__full="https://api.test/v1/7", **call)
    record(daemon.telemetry, identity(), "GET b", clrk__dst__name=HOSTILE, url__full=f"https://x/{HOSTILE}", **call)
    record(
        daemon.telemetry, identity(name="other"), "GET c", clrk__dst__name="c.test", url__full="https://c.test/", **call
    )
    done = await run(daemon.path, "policy", "suggest", "support", "--paths")
    assert done.code == 0
    assert "\x1b" not in done.out
    route = EgressL4Route.model_validate(yaml.safe_load(done.out))
    (rule,) = route.spec.rules
    assert (rule.hostnames, rule.ports, rule.http.paths) == (["api.test"], [443], ["/v1/*"])
    assert route.spec.gateway_ref.name == "default"
    done = await run(daemon.path, "policy", "suggest", "support", "--since", "2999-01-01")
    assert (done.code, yaml.safe_load(done.out)) == (1, None)

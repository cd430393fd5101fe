"""Every kind of mistake in one resource: the field and the nearest valid name that the author is told."""

# ruff: noqa: E501 - tables of one case a line
from __future__ import annotations

import json
import re
from contextlib import nullcontext
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from resource_files import AGENT, GATEWAY, HEAD, documents, problems_of

from clrk.core.egress_resources import HttpMatch, L4Rule
from clrk.core.resources import NOT_YET_FIELDS, AnyResource
from clrk.core.url_paths import path_readings
from clrk.gateway.policy_names import plain_host
from clrk.gateway.policy_paths import PathPattern
from clrk.runtime.config import describe
from clrk.runtime.config.load import load
from clrk.runtime.config.notes import notes_of

# --- head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("kind: TaskAgents", "2: TaskAgents/a: kind: unknown kind 'TaskAgents'; did you mean \"TaskAgent\"?"),
        (
            "kind: egressgateway",
            "2: egressgateway/a: kind: unknown kind 'egressgateway'; did you mean \"EgressGateway\"?",
        ),
        (
            "kind: Zebra",
            "2: Zebra/a: kind: unknown kind 'Zebra'; valid: AIProviderRoute, CredentialInjectionPolicy, DaemonAgent, EgressGateway, EgressL4Route, MCPRoute, Runtime, Secret, TaskAgent",
        ),
        ("kind: DaemonAgnt", "2: DaemonAgnt/a: kind: unknown kind 'DaemonAgnt'; did you mean \"DaemonAgent\"?"),
        (
            "kynd: TaskAgent",
            "1: a: kind: is missing; valid: AIProviderRoute, CredentialInjectionPolicy, DaemonAgent, EgressGateway, EgressL4Route, MCPRoute, Runtime, Secret, TaskAgent",
        ),
    ],
)
def test_unknown_kind(tmp_path, written, problem):
    assert problems_of(tmp_path, AGENT.replace("kind: TaskAgent", written)) == [problem]


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (
            "apiVersion: clrk/v1\n",
            "1: TaskAgent/a: apiVersion: 'clrk/v1' is not accepted; did you mean \"clrk/v1alpha1\"?",
        ),
        ("apiVersion: apps/v7\n", "1: TaskAgent/a: apiVersion: 'apps/v7' is not accepted; valid: "),
        ("", "1: TaskAgent/a: apiVersion: is missing; write apiVersion: clrk/v1alpha1"),
    ],
)
def test_api_version(tmp_path, written, problem):
    (found,) = problems_of(tmp_path, AGENT.replace(HEAD, written))
    assert found.startswith(problem)


# --- fields ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("timeot: 5s", 'spec.timeot: unknown field; did you mean "timeout"?'),
        ("egress_refs: []", 'spec.egress_refs: unknown field; did you mean "egressRefs"?'),
        ("zzz: 1", "spec.zzz: unknown field; valid: delivery, egressRefs, identity, maxConcurrent, resources, schedule, scheduleInput, state, streaming, template, timeout, warmPoolIdleTTL, warmPoolSize"),
        ("timeout: soon", "spec.timeout: 'soon' is not a duration; write for example 100s, 5m, 1h30m or 7d"),
        ("timeout: 2h", "spec.timeout: must be less than or equal to 3600"),
        ("timeout: 0", "spec.timeout: must be greater than 0"),
        ("maxConcurrent: many", "spec.maxConcurrent: not a whole number"),
        ("maxConcurrent: -1", "spec.maxConcurrent: must be greater than or equal to 0"),
        ("resources: {memory: lots}", "spec.resources.memory: 'lots' is not a quantity; write for example 512Mi, 1Gi, 500m or 2"),
        (f"resources: {{memory: '{'9' * 400}'}}", f"spec.resources.memory: '{'9' * 400}' is not a quantity; write for example 512Mi, 1Gi, 500m or 2"),
        ("resources: {memroy: 1Gi}", 'spec.resources.memroy: unknown field; did you mean "memory"?'),
        ("resources: 3", "spec.resources: not a mapping of fields"),
        ("delivery: {mode: stdin}", "spec.delivery.mode: 'stdin' is not allowed; did you mean \"Stdin\"?"),
        ("egressRefs: {}", "spec.egressRefs: not a list; begin each entry with `- `"),
        ("egressRefs: [{}]", "spec.egressRefs[0].gatewayRef: is missing"),
        ("egressRefs: [{gatewayref: {name: x}}]", 'spec.egressRefs[0].gatewayref: unknown field; did you mean "gatewayRef"?'),
        ('schedule: "61 * * * *"', "spec.schedule: '61 * * * *' is not a schedule: Bad minute"),
        ('schedule: "* * * * * *"', "spec.schedule: '* * * * * *' is not a schedule: write five fields, or one of @yearly, @annually, @monthly, @weekly, @daily, @midnight, @hourly"),
        ("warmPoolIdleTTL: 0s", "spec.warmPoolIdleTTL: must be greater than 0"),
        ("identity: {extractors: [{type: Header, name: CE-x, field: a}]}", "spec.identity.extractors[0].name: 'CE-x': ce-* headers say what the caller likes, so they are no identity"),
        ("identity: {extractors: [{type: Body, jsonPath: x, field: a}]}", "spec.identity.extractors[0].jsonPath: not a JSONPath; it begins with $"),
        ("identity: {extractors: [{type: JWT, claim: a, jwks: x, issuer: x, field: a}]}", "spec.identity.extractors[0].audience: is missing"),
        ("identity: {extractors: [{type: JWT, clame: a}]}", 'spec.identity.extractors[0].clame: unknown field; did you mean "claim"?'),
        ("identity: {extractors: [{type: Foo}]}", "spec.identity.extractors[0]: type 'Foo' is not allowed; valid: Body, Header, JWT"),
        ("identity: {extractors: [{field: a}]}", "spec.identity.extractors[0]: type is missing"),
        ("identity: {extractors: [{type: Header, name: x, field: a}, {type: Header, name: y, field: a}]}", "spec.identity: two extractors give the field 'a'"),
    ],
)  # fmt: skip
def test_field_of_an_agent(tmp_path, line, problem):
    assert f"6: TaskAgent/a: {problem}" in problems_of(tmp_path, AGENT + f"  {line}\n")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("scheduleInput: {a: 1}", "scheduleInput without schedule: nothing would ever send it"),
        ("state: {}", "state needs maxConcurrent: 1, since two runs must not write one folder"),
    ],
)
def test_fields_that_need_another(tmp_path, line, problem):
    assert problems_of(tmp_path, AGENT + f"  {line}\n") == [f"4: TaskAgent/a: spec: {problem}"]


def test_both_kinds_of_agent_share_their_names(tmp_path):
    (found,) = problems_of(tmp_path, AGENT + "---\n" + AGENT.replace("TaskAgent", "DaemonAgent"))
    assert found.startswith("9: DaemonAgent/a: metadata.name: default/a is already declared at ")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{comand: [x]}", 'spec.template.spec.comand: unknown field; did you mean "command"?'),
        ("{comand: [x]}", "spec.template.spec.command: is missing"),
        ("{command: []}", "spec.template.spec.command: is empty"),
        ("{command: [x], env: [{name: A, value: 8080}]}", "spec.template.spec.env[0].value: not text; numbers and yes/no need quotes"),
        ("{command: [x], env: [{name: A, value: yes}]}", "spec.template.spec.env[0].value: not text; numbers and yes/no need quotes"),
        ("{command: [x], env: [{name: A}]}", "spec.template.spec.env[0]: give either value or valueFrom"),
        ("{command: [x], env: [{name: A=B, value: x}]}", "spec.template.spec.env[0].name: not a variable name: letters, digits and _, no digit first"),
        ("{command: [x], env: [{name: A, value: b}, {name: A, value: c}]}", "spec.template.spec.env[1].name: A is already set by env[0]"),
        ("{command: [x], env: [{name: CLRK_INVOCATION_ID, value: b}]}", "spec.template.spec.env[0].name: names that begin with CLRK_ are set by the runtime"),
        ('{command: [x], env: [{name: A, value: "a\\0b"}]}', "spec.template.spec.env[0].value: holds a NUL character"),
        ("{command: [x], workdir: here}", "spec.template.spec.workdir: not an absolute path; it begins with /"),
        ("{command: [x], rootfs: /nonexistent}", "spec.template.spec.rootfs: no such folder: /nonexistent"),
        ("{command: [x], mounts: [{hostPath: /etc, path: /}]}", "spec.template.spec.mounts[0].path: '/' can not be a mount point; name a folder below /"),
        ("{command: [x], mounts: [{hostPath: /etc, path: /a/../b}]}", "spec.template.spec.mounts[0].path: '/a/../b' can not be a mount point; name a folder below /"),
        ("{command: [x], mounts: [{hostPath: /etc, path: /a}, {hostPath: /usr, path: /a}]}", "spec.template.spec.mounts[1].path: /a is already taken by mounts[0]"),
        ("{command: [x], mounts: [{hostPath: /usr, path: /run/clrk/x}]}", "spec.template.spec.mounts[0].path: /run/clrk/x is clrk's own in every sandbox; choose another"),
        ("{command: [x], mounts: [{hostPath: /usr, path: //etc/}]}", "spec.template.spec.mounts[0].path: //etc/ is clrk's own in every sandbox; choose another"),
        ("{command: [x], mounts: [{hostPath: /usr, path: /w, readOnly: false}, {hostPath: /etc, path: /w/./x}]}", "spec.template.spec.mounts[1].path: leads through /usr, which agent default/a may write: a link there would move this mount"),
        ("{command: [x], mounts: [{hostPath: /usr, path: /w, readOnly: false}, {hostPath: /usr/lib, path: /x}]}", "spec.template.spec.mounts[1].hostPath: inside /usr, which agent default/a may write: a link there would show any host path"),
        ("{command: [x], rootfs: /usr, mounts: [{hostPath: /usr, path: /w, readOnly: false}]}", "spec.template.spec.rootfs: inside /usr, which agent default/a may write"),
        ("{command: [x], mounts: [{hostpath: /etc, path: /a}]}", 'spec.template.spec.mounts[0].hostpath: unknown field; did you mean "hostPath"?'),
    ],
)  # fmt: skip
def test_field_of_a_template(tmp_path, template, problem):
    assert f"5: TaskAgent/a: {problem}" in problems_of(tmp_path, AGENT.replace("{command: [/bin/true]}", template))


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind, fields in NOT_YET_FIELDS.items() for field in fields]
)
def test_field_of_a_later_version(tmp_path, kind, field):
    body: object = 1
    for part in reversed(field.split(".")):
        body = {part: body}
    text = HEAD + f"kind: {kind}\nmetadata: {{name: default}}\nspec: {body}\n".replace("'", "")
    found = [problem for problem in problems_of(tmp_path, text) if "not in this version" in problem]
    assert len(found) == 1
    assert found[0].startswith(f"4: {kind}/default: spec.{field.split('.')[0]}")


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("{cidrs: [10.0.0.1/8]}", "spec.rules[0].cidrs[0]: '10.0.0.1/8' is an address in a network; did you mean \"10.0.0.0/8\", or \"10.0.0.1\"?"),
        ("{cidrs: ['::/200']}", "spec.rules[0].cidrs[0]: '::/200' is not a network; write for example 10.0.0.0/8 or fd00::/8"),
        ("{hostnames: [x], http: {paths: [orders]}}", "spec.rules[0].http.paths[0]: not a path of a URL: it begins with /, and has neither ? nor #"),
        ("{hostnames: [https://x]}", "spec.rules[0].hostnames[0]: 'https://x' is not a host name; write it lower-case, no scheme, no port; *.x and **.x allowed"),
        ("{ports: [443]}", "spec.rules[0]: give hostnames or cidrs; a rule without either would match nothing"),
        ("{hostnames: [x], ports: [65536]}", "spec.rules[0].ports[0]: must be less than or equal to 65535"),
        ("{hostnames: [x], protocols: [UDP]}", "spec.rules[0].protocols[0]: 'UDP' is not allowed; valid: TCP"),
        ("{cidrs: [1]}", "spec.rules[0].cidrs[0]: 1 is not a network; write for example 10.0.0.0/8 or fd00::/8"),
        ("{hostnames: [x], ports: [yes]}", "spec.rules[0].ports[0]: not a whole number"),
        ("{hostnames: [x], http: {paths: [/a%2f..%2fb]}}", "spec.rules[0].http.paths[0]: '/a%2f..%2fb' can be read in more than one way, so no request fits it: write it plainly, without `..`, control characters, or escapes of escapes"),
        ("{hostnames: [x], http: {paths: ['/a b']}}", "spec.rules[0].http.paths[0]: '/a b' holds a blank, which no request has: write %20"),
        ("{hostnames: [x], http: {methods: [CONNECT]}}", "spec.rules[0].http.methods[0]: CONNECT is never served, since the gateway is no proxy: a rule without http allows a tunnel"),
        ("{hostnames: [x], http: {methods: [" + "A" * 33 + "]}}", "spec.rules[0].http.methods[0]: must have at most 32 characters"),
        ("{hostnames: [x.123]}", "spec.rules[0].hostnames[0]: 'x.123' ends in a number, so it is no host name to any client"),
        ("{hostnames: ['*.0x7f']}", "spec.rules[0].hostnames[0]: '*.0x7f' ends in a number, so it is no host name to any client"),
        ("{hostnames: [010.0.0.1]}", "spec.rules[0].hostnames[0]: '010.0.0.1' ends in a number, so it is no host name to any client; an address is written like 10.0.0.1"),
        ("{hostnames: ['**.10.0.0.1']}", "spec.rules[0].hostnames[0]: '**.10.0.0.1' ends in a number, so it is no host name to any client; an address is written like 10.0.0.1"),
        ("{hostnames: [localhost]}", "spec.rules[0].hostnames[0]: 'localhost' is the sandbox itself: give what runs on this host a name of its own, by hostAliases of the gateway"),
        ("{hostnames: [x, '*.localhost']}", "spec.rules[0].hostnames[1]: '*.localhost' is the sandbox itself: give what runs on this host a name of its own, by hostAliases of the gateway"),
        ("{hostnames: [x], http: {method: [GET]}}", 'spec.rules[0].http.method: unknown field; did you mean "methods"?'),
    ],
)  # fmt: skip
def test_field_of_a_route(tmp_path, rule, problem):
    text = documents(GATEWAY, HEAD + f"kind: EgressL4Route\nmetadata: {{name: r}}\nspec:\n  rules:\n  - {rule}\n")
    assert problems_of(tmp_path, text) == [f"10: EgressL4Route/r: {problem}"]


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("{type: QueryParam}", "spec.target.queryParamName: is missing"),
        ("{type: QueryParam, queryParamName: k, headerName: X}", 'spec.target.headerName: unknown field; valid: queryParamName, type'),
        ("{type: Header, queryParamName: k}", "spec.target.queryParamName: unknown field; valid: headerName, prefix, type"),
        ("{type: Header, headerName: a b}", "spec.target.headerName: not the name of a header, such as Authorization"),
    ],
)  # fmt: skip
def test_field_of_a_target_is_judged_by_its_type(tmp_path, target, problem):
    spec = f"spec: {{hostnames: [x.test], secretRef: {{name: s}}, target: {target}}}\n"
    text = HEAD + f"kind: CredentialInjectionPolicy\nmetadata: {{name: c}}\n{spec}"
    assert [one for one in problems_of(tmp_path, text) if "spec.target" in one] == [
        f"4: CredentialInjectionPolicy/c: {problem}"
    ]


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("{hostAliases: [{hostnames: [10.0.0.1], address: '127.0.0.1:1'}]}", "spec.hostAliases[0].hostnames[0]: '10.0.0.1' is an address, which has no name to go by: write the host name that agents dial"),
        ("{hostAliases: [{hostnames: [localhost], address: '127.0.0.1:1'}]}", "spec.hostAliases[0].hostnames[0]: 'localhost' is the sandbox itself: give what runs on this host a name of its own, by hostAliases of the gateway"),
    ],
)  # fmt: skip
def test_names_that_nobody_is_asked_for(tmp_path, spec, problem):
    assert problems_of(tmp_path, GATEWAY + f"spec: {spec}\n") == [f"4: EgressGateway/default: {problem}"]


@pytest.mark.parametrize("endpoint", ["v1/messages", "/v1/messages?beta=true", "https://x/v1"])
def test_an_endpoint_is_a_path(tmp_path, endpoint):
    text = (
        HEAD
        + f"kind: AIProviderRoute\nmetadata: {{name: r}}\nspec:\n  rules: [{{matches: [{{endpoints: ['{endpoint}']}}]}}]\n"
    )
    assert problems_of(tmp_path, documents(GATEWAY, text)) == [
        "9: AIProviderRoute/r: spec.rules[0].matches[0].endpoints[0]: not a path of a URL, or a glob of one: it begins "
        "with / or *, and has neither ? nor #"
    ]


@pytest.mark.parametrize("host", ["10.0.0.1", "x1.test", "1.test", "*.1.test", "a.1e", "a.0b1", "123", "a.0x", "1.2.3"])
def test_a_host_is_taken_if_a_request_can_name_it(host):
    named = plain_host(host.lstrip("*.")) is not None
    with nullcontext() if named else pytest.raises(ValueError, match="ends in a number"):
        L4Rule(hostnames=[host])


@given(st.text(st.sampled_from("abé %2eE5cCfF0/\\;.*:@~+"), max_size=12))
def test_a_path_pattern_that_is_taken_fits_the_request_that_spells_it(tail):
    """Nothing that no request can fit passes, and the other way round."""
    path = f"/{tail}"
    try:
        HttpMatch(paths=[path])
    except ValueError:
        if " " not in path:
            assert path_readings(path) == ()
        return
    sent = quote(path, safe="".join(map(chr, range(128))))
    assert PathPattern.compile(path).matches(path_readings(sent))


def test_every_pattern_is_put_in_words():
    schema = json.dumps(TypeAdapter(AnyResource).json_schema())
    written = {json.loads(found) for found in re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', schema)}
    assert len(written) > 10
    assert written - set(describe.PATTERNS) == set()


@pytest.mark.parametrize("kind", ["{}", "[]", "1", "null"])
def test_a_kind_that_is_no_text(tmp_path, kind):
    assert (
        "1: a: kind: unknown kind"
        in problems_of(tmp_path, f"kind: {kind}\napiVersion: clrk/v1alpha1\nmetadata: {{name: a}}\n")[0]
    )


def test_what_is_written_does_not_speak_to_the_terminal(tmp_path):
    """Neither in a problem nor in a note, wherever they are read."""
    name = '"\\x1b[2J\\u202e"'
    for problem in problems_of(tmp_path, HEAD + f"kind: Secret\nmetadata: {{name: {name}}}\n{name}: 1\n"):
        assert problem.isprintable()
    (tmp_path / "f.yaml").write_text(HEAD + f"kind: Secret\nmetadata: {{name: s}}\nfromEnv: {{a: {name}}}\n")
    (note,) = notes_of(load([tmp_path], {}))
    assert note.isprintable()


def test_regular_expressions_are_refused_in_re2s_words(tmp_path):
    (found,) = problems_of(tmp_path, GATEWAY + "spec: {redact: {patterns: ['(']}}\n")
    assert found.endswith("spec.redact.patterns[0]: '(' is not an RE2 regular expression: missing ): (")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("ingress: {listen: 'localhost:80'}", "spec.ingress.listen: 'localhost:80' is not ip:port; write for example 127.0.0.1:8080 or [::1]:8080"),
        ("ingress: {listen: '127.0.0.1:65536'}", "spec.ingress.listen: '127.0.0.1:65536' is not ip:port; write for example 127.0.0.1:8080 or [::1]:8080"),
        ("admin: {listen: '127.0.0.1:8080'}", "spec.admin.listen: the same address as spec.ingress.listen: 127.0.0.1:8080"),
        ("uidRange: {start: 0}", "spec.uidRange.start: must be greater than or equal to 1000"),
    ],
)  # fmt: skip
def test_field_of_the_runtime(tmp_path, spec, problem):
    text = HEAD + f"kind: Runtime\nmetadata: {{name: host}}\nspec:\n  {spec}\n"
    assert problems_of(tmp_path, text) == [f"5: Runtime/host: {problem}"]


@pytest.mark.parametrize("name", ["Upper", "-a", "a.b", "a" * 64, "ä"])
def test_names_are_dns_labels(tmp_path, name):
    (found,) = problems_of(tmp_path, AGENT.replace("{name: a}", f"{{name: {name}}}"))
    assert f"metadata.name: {name!r} is not a DNS label" in found


@pytest.mark.parametrize(
    "url",
    ["proxy:3128", "ftp://proxy", "http://user:word@proxy", "http://proxy/path", "http://proxy:99999", "http://:1"],
)
def test_what_is_no_proxy(tmp_path, url):
    (found,) = problems_of(tmp_path, GATEWAY + f'spec: {{upstreamProxy: {{url: "{url}"}}}}\n')
    assert "spec.upstreamProxy.url" in found
    assert "user:word" not in found  # a password that somebody wrote there is not printed


def test_no_proxy_takes_names_and_networks(tmp_path):
    text = (
        GATEWAY + "spec: {upstreamProxy: {url: 'http://p:3128', noProxy: ['*.corp', 10.0.0.0/8, 'fd00::/8', '::1']}}\n"
    )
    (tmp_path / "good.yaml").write_text(text)
    (gateway,) = load([tmp_path / "good.yaml"]).gateways.values()
    assert list(map(str, gateway.spec.upstream_proxy.no_proxy)) == ["*.corp", "10.0.0.0/8", "fd00::/8", "::1/128"]
    assert "noProxy" in problems_of(tmp_path, text.replace("10.0.0.0/8", "10.0.0.1/8"))[0]

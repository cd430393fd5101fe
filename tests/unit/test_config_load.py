"""Every kind of mistake in a resource file: the line, the field and the nearest valid name that the author is told."""

# ruff: noqa: E501 - tables of one case a line
from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from clrk.core.errors import ConfigError
from clrk.core.resources import KINDS, NOT_YET_FIELDS, NOT_YET_KINDS
from clrk.runtime.config.load import load

HEAD = "apiVersion: clrk/v1alpha1\n"
AGENT = HEAD + "kind: TaskAgent\nmetadata: {name: a}\nspec:\n  template: {spec: {command: [/bin/true]}}\n"
GATEWAY = HEAD + "kind: EgressGateway\nmetadata: {name: default}\n"


def problems_of(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    """Return the problems of one file without the file's name."""
    file = tmp_path / "f.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load([file], environ or {})
    prefix = f"{file}:"
    assert all(problem.startswith(prefix) for problem in caught.value.problems), caught.value.problems
    return [problem.removeprefix(prefix) for problem in caught.value.problems]


def documents(*texts: str) -> str:
    return "---\n".join(texts)


def test_defaults_of_a_minimal_agent(tmp_path):
    (tmp_path / "a.yaml").write_text(AGENT)
    loaded = load([tmp_path])
    agent = loaded.agents["default", "a"]
    assert (agent.spec.timeout, agent.spec.resources.memory, agent.spec.delivery.mode) == (100.0, 512 * 2**20, "Stdin")
    assert loaded.runtime.ingress.listen == "127.0.0.1:8080"
    assert loaded.gateways == {}  # allowed: then everything is denied


def test_the_other_api_version_has_the_same_fields(tmp_path):
    (tmp_path / "a.yml").write_text(AGENT.replace("clrk/v1alpha1", "clrk.apoxy.dev/v1alpha1"))
    assert ("default", "a") in load([tmp_path]).agents


def test_files_and_folders_are_read_in_order_and_once(tmp_path):
    (tmp_path / "b.yaml").write_text(AGENT)
    (tmp_path / "a.yml").write_text(GATEWAY)
    (tmp_path / "ignored.txt").write_text("{{{{")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.yaml").write_text("{{{{")
    loaded = load([tmp_path, tmp_path / "b.yaml"])
    assert set(loaded.agents) == {("default", "a")}
    assert set(loaded.gateways) == {("default", "default")}


@pytest.mark.parametrize("name", ["missing", "missing/x.yaml"])
def test_path_that_is_not_there(tmp_path, name):
    with pytest.raises(ConfigError) as caught:
        load([tmp_path / name])
    assert caught.value.problems == (f"{tmp_path / name}: no such file or folder; name your resources with -c PATH",)


def test_folder_without_resources(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load([tmp_path])
    assert caught.value.problems == (f"{tmp_path}: no *.yaml or *.yml file in this folder",)


def test_file_that_is_not_utf8(tmp_path):
    (tmp_path / "f.yaml").write_bytes(b"kind: \xff")
    with pytest.raises(ConfigError) as caught:
        load([tmp_path / "f.yaml"])
    assert caught.value.problems == (f"{tmp_path / 'f.yaml'}: not UTF-8 at byte 6",)


# --- YAML -----------------------------------------------------------------------------------------------------------


def test_syntax_error_has_its_line_and_quotes_no_value(tmp_path):
    problems = problems_of(tmp_path, AGENT + "---\nkind: Secret\ndata: {token: hunter2\n---\n")
    assert len(problems) == 1
    assert problems[0].startswith("9: not YAML: ")
    assert "hunter2" not in problems[0]


def test_control_character(tmp_path):
    assert problems_of(tmp_path, "a: b\nc: \x01\n")[0].startswith("2: not YAML: ")


@pytest.mark.parametrize("text", ["- a\n", "just text\n", "42\n"])
def test_document_that_is_no_mapping(tmp_path, text):
    assert problems_of(tmp_path, text) == ["1: a resource is a mapping that begins with apiVersion"]


def test_key_given_twice(tmp_path):
    assert problems_of(tmp_path, AGENT + "  timeout: 5s\n  timeout: 6s\n") == [
        "7: TaskAgent/a: spec.timeout: given twice; the first is on line 6"
    ]


def test_key_given_twice_deep_down(tmp_path):
    text = AGENT.replace("{command: [/bin/true]}", "{command: [/bin/true], workdir: /a, workdir: /b}")
    assert problems_of(tmp_path, text) == [
        "5: TaskAgent/a: spec.template.spec.workdir: given twice; the first is on line 5"
    ]


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [id]", "!custom {a: b}", "!!binary aGk=", "!!set {a}"]
)
def test_tags_that_construct_things(tmp_path, tag):
    problems = problems_of(tmp_path, AGENT + f"  timeout: {tag}\n")
    assert problems[0].startswith("6: TaskAgent/a: spec.timeout: tag ")
    assert problems[0].endswith("is not allowed")


def test_billion_laughs_end_early(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    problems = problems_of(tmp_path, "\n".join(lines))
    assert problems[0].endswith("more than 100000 values (aliases count expanded)")


def test_alias_to_itself(tmp_path):
    assert problems_of(tmp_path, "a: &a [*a]\n") == ["1: nested more than 64 deep"]


def test_deep_nesting(tmp_path):
    assert problems_of(tmp_path, "[" * 5000 + "]" * 5000)[0].endswith(("nested too deeply", "nested more than 64 deep"))


def test_anchors_and_merge_keys(tmp_path):
    (tmp_path / "a.yaml").write_text(
        HEAD
        + """kind: TaskAgent
metadata: &meta {name: a, labels: {team: x}}
spec: &spec
  template: {spec: {command: [/bin/true]}}
  timeout: 5s
---
"""
        + HEAD
        + """kind: TaskAgent
metadata: {<<: {name: z, namespace: other}, name: b}
spec:
  <<: {template: {spec: {command: [/bin/false]}}, timeout: 6s}
  timeout: 7s
"""
    )
    agent = load([tmp_path]).agents["other", "b"]
    assert (agent.spec.timeout, agent.spec.template.spec.command) == (7.0, ["/bin/false"])


def test_error_in_a_merged_mapping_is_where_it_was_written(tmp_path):
    text = HEAD + "kind: TaskAgent\nmetadata: {name: a}\nspec:\n  <<:\n    timeot: 5s\n"
    problems = problems_of(tmp_path, text + "  template: {spec: {command: [x]}}\n")
    assert problems == ['6: TaskAgent/a: spec.timeot: unknown field; did you mean "timeout"?']


def test_infinity_is_no_number(tmp_path):
    assert problems_of(tmp_path, AGENT + "  timeout: .inf\n")[0] == (
        "6: TaskAgent/a: spec.timeout: infinity and NaN are not numbers here"
    )


def test_key_that_is_not_text(tmp_path):
    assert "6: TaskAgent/a: spec: a key that is not text; put it in quotes" in problems_of(
        tmp_path, AGENT + "  on: 1\n"
    )


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
            "2: Zebra/a: kind: unknown kind 'Zebra'; valid: DaemonAgent, EgressGateway, EgressL4Route, Runtime, Secret, TaskAgent",
        ),
        ("kind: DaemonAgnt", "2: DaemonAgnt/a: kind: unknown kind 'DaemonAgnt'; did you mean \"DaemonAgent\"?"),
        (
            "kynd: TaskAgent",
            "1: a: kind: is missing; valid: DaemonAgent, EgressGateway, EgressL4Route, Runtime, Secret, TaskAgent",
        ),
    ],
)
def test_unknown_kind(tmp_path, written, problem):
    assert problems_of(tmp_path, AGENT.replace("kind: TaskAgent", written)) == [problem]


@pytest.mark.parametrize("kind", NOT_YET_KINDS)
def test_kind_of_a_later_version(tmp_path, kind):
    assert problems_of(tmp_path, HEAD + f"kind: {kind}\nmetadata: {{name: x}}\n") == [
        f"2: {kind}/x: kind: kind {kind} is part of the contract but not in this version; valid: {', '.join(sorted(KINDS))}"
    ]


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
        ("{cidrs: [10.0.0.1/8]}", "spec.rules[0].cidrs[0]: not a network with a clean host part; write for example 10.0.0.0/8 or fd00::/8"),
        ("{hostnames: [https://x]}", "spec.rules[0].hostnames[0]: 'https://x' is not a host name; write it lower-case, no scheme, no port; *.x and **.x allowed"),
        ("{ports: [443]}", "spec.rules[0]: give hostnames or cidrs; a rule without either would match nothing"),
        ("{hostnames: [x], ports: [65536]}", "spec.rules[0].ports[0]: must be less than or equal to 65535"),
        ("{hostnames: [x], protocols: [UDP]}", "spec.rules[0].protocols[0]: 'UDP' is not allowed; valid: TCP"),
        ("{hostnames: [x], http: {method: [GET]}}", 'spec.rules[0].http.method: unknown field; did you mean "methods"?'),
    ],
)  # fmt: skip
def test_field_of_a_route(tmp_path, rule, problem):
    text = documents(GATEWAY, HEAD + f"kind: EgressL4Route\nmetadata: {{name: r}}\nspec:\n  rules:\n  - {rule}\n")
    assert problems_of(tmp_path, text) == [f"10: EgressL4Route/r: {problem}"]


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


# --- across documents -----------------------------------------------------------------------------------------------


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path):
    text = documents(
        AGENT + "  timeot: 1\n", AGENT.replace("TaskAgent", "TaskAgnt"), GATEWAY + "spec: {tls: {mode: On}}\n"
    )
    assert [problem.partition(":")[0] for problem in problems_of(tmp_path, text)] == ["6", "9", "17"]


def test_name_declared_twice(tmp_path):
    (found,) = problems_of(tmp_path, documents(AGENT, AGENT))
    assert found == f"9: TaskAgent/a: metadata.name: default/a is already declared at {tmp_path}/f.yaml:3"


def test_two_runtimes(tmp_path):
    text = documents(*(HEAD + f"kind: Runtime\nmetadata: {{name: {name}}}\n" for name in "ab"))
    (found,) = problems_of(tmp_path, text)
    assert found == f"6: Runtime/b: kind: a host has one Runtime; the other is at {tmp_path}/f.yaml:1"


def test_missing_gateway(tmp_path):
    text = documents(GATEWAY, AGENT + "  egressRefs: [{gatewayRef: {name: defualt}}]\n")
    assert problems_of(tmp_path, text) == [
        "10: TaskAgent/a: spec.egressRefs[0].gatewayRef.name: no EgressGateway 'defualt' in namespace 'default'; "
        'did you mean "default"?'
    ]


def test_gateway_of_another_namespace_is_missing(tmp_path):
    text = documents(
        GATEWAY, AGENT.replace("{name: a}", "{name: a, namespace: b}") + "  egressRefs: [{gatewayRef: {}}]\n"
    )
    assert "no EgressGateway 'default' in namespace 'b'" in problems_of(tmp_path, text)[0]


def test_route_without_its_gateway(tmp_path):
    text = HEAD + "kind: EgressL4Route\nmetadata: {name: r}\nspec:\n  rules: [{hostnames: [x]}]\n"
    assert problems_of(tmp_path, text) == [
        "4: EgressL4Route/r: spec.gatewayRef.name: no EgressGateway 'default' in namespace 'default'"
    ]


def test_a_gateway_with_problems_of_its_own_is_not_missing(tmp_path):
    text = documents(GATEWAY + "spec: {tsl: {}}\n", AGENT + "  egressRefs: [{gatewayRef: {}}]\n")
    assert problems_of(tmp_path, text) == ['4: EgressGateway/default: spec.tsl: unknown field; did you mean "tls"?']


def test_relative_host_path_is_anchored_at_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    (tmp_path / "tools").mkdir()
    mount = "{command: [x], mounts: [{hostPath: tools, path: /tools}, {hostPath: ./tools/../tools, path: /b}]}"
    (tmp_path / "a.yaml").write_text(AGENT.replace("{command: [/bin/true]}", mount))
    mounts = load([tmp_path / "a.yaml"]).agents["default", "a"].spec.template.spec.mounts
    assert [mount.host_path for mount in mounts] == [str(tmp_path / "tools")] * 2


def test_missing_host_path(tmp_path):
    mount = "{command: [x], mounts: [{hostPath: nope, path: /x}]}"
    assert problems_of(tmp_path, AGENT.replace("{command: [/bin/true]}", mount)) == [
        f"5: TaskAgent/a: spec.template.spec.mounts[0].hostPath: no such file or folder: {tmp_path}/nope"
    ]


def test_a_mount_below_what_another_agent_may_write(tmp_path):
    """Also when that agent has put a link there already, or the mount's source is written by way of a link."""
    (tmp_path / "work/real").mkdir(parents=True)
    (tmp_path / "work/moved").symlink_to("/etc")
    (tmp_path / "alias").symlink_to(tmp_path / "work")
    mounts = ", ".join(f"{{hostPath: {name}, path: /{index}}}" for index, name in enumerate(
        ("work/real", "work/moved", "alias/real", "work", "alias")
    ))  # fmt: skip
    reader = AGENT.replace("{command: [/bin/true]}", f"{{command: [x], mounts: [{mounts}]}}")
    writer = AGENT.replace("name: a", "name: w").replace(
        "{command: [/bin/true]}", "{command: [x], mounts: [{hostPath: work, path: /w, readOnly: false}]}"
    )
    found = problems_of(tmp_path, documents(reader, writer))
    assert [problem.partition(": inside ")[0] for problem in found] == [
        f"5: TaskAgent/a: spec.template.spec.mounts[{index}].hostPath" for index in range(3)
    ]


@pytest.mark.parametrize(
    ("template", "index"),
    [
        ("mounts: [{hostPath: work, path: /d}, {hostPath: /usr, path: /d/x}]", 1),
        ("mounts: [{hostPath: /usr, path: /d/work/x}, {hostPath: ., path: /d}]", 0),
        ("rootfs: ROOT, mounts: [{hostPath: /usr, path: /work/x}]", 0),
    ],
)
def test_a_mount_point_in_what_another_agent_may_write(tmp_path, template, index):
    """For this agent the folder is read-only; the link that moves its mount is made by the other one."""
    (tmp_path / "work").mkdir()
    reader = AGENT.replace("{command: [/bin/true]}", f"{{command: [x], {template.replace('ROOT', str(tmp_path))}}}")
    writer = AGENT.replace("name: a", "name: w").replace(
        "{command: [/bin/true]}", "{command: [x], mounts: [{hostPath: work, path: /w, readOnly: false}]}"
    )
    assert problems_of(tmp_path, documents(reader, writer)) == [
        f"5: TaskAgent/a: spec.template.spec.mounts[{index}].path: leads through {tmp_path}/work, which agent "
        "default/w may write: a link there would move this mount"
    ]


@pytest.mark.parametrize(
    ("mounts", "path", "problem"),
    [
        ("[]", "/run/clrk/x", "spec.state.mountPath: /run/clrk/x is clrk's own in every sandbox; choose another"),
        ("[]", "/etc/.", "spec.state.mountPath: /etc/. is clrk's own in every sandbox; choose another"),
        ("[]", "/", "spec.state.mountPath: / is clrk's own in every sandbox; choose another"),
        (
            "[{hostPath: /usr, path: /s/x}]", "/s",
            "spec.template.spec.mounts[0].path: lies in spec.state.mountPath /s, which the agent may write; choose another",
        ),
        (
            "[{hostPath: /usr, path: /s}]", "/s",
            "spec.template.spec.mounts[0].path: lies in spec.state.mountPath /s, which the agent may write; choose another",
        ),
        (
            "[{hostPath: /usr, path: /w, readOnly: false}]", "/w/s",
            "spec.state.mountPath: leads through /usr, which agent default/a may write: a link there would move the state",
        ),
    ],
)  # fmt: skip
def test_state_is_mounted_where_no_agent_can_move_it_or_be_moved_by_it(tmp_path, mounts, path, problem):
    text = AGENT.replace("{command: [/bin/true]}", f"{{command: [x], mounts: {mounts}}}")
    text += f"  maxConcurrent: 1\n  state: {{mountPath: {path}}}\n"
    line = 7 if problem.startswith("spec.state") else 5
    assert problems_of(tmp_path, text) == [f"{line}: TaskAgent/a: {problem}"]


def test_a_file_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="/dev/zero:1: the file is over 4 MiB"):
        load([Path("/dev/zero")])


def test_siblings_of_a_writable_mount_are_fine(tmp_path):
    mounts = "[{hostPath: /usr, path: /w, readOnly: false}, {hostPath: /etc, path: /w2}, {hostPath: /usr, path: /v}]"
    (tmp_path / "a.yaml").write_text(AGENT.replace("{command: [/bin/true]}", f"{{command: [x], mounts: {mounts}}}"))
    assert len(load([tmp_path / "a.yaml"]).agents["default", "a"].spec.template.spec.mounts) == 3


# --- CA file, OTLP --------------------------------------------------------------------------------------------------


def make_ca_pem() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def test_ca_file_is_read(tmp_path):
    pem = make_ca_pem()
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
        ("fromEnv: {a: NOPE}\n", "4: Secret/s: fromEnv.a: the runtime's environment has no NOPE"),
        ("fromFile: {a: nope}\n", "4: Secret/s: fromFile.a: No such file or directory: {dir}/nope"),
        ("data: {a: 12345678}\n", "4: Secret/s: data.a: not text; numbers and yes/no need quotes"),
        ('data: {a: "hunter2\\0"}\n', "4: Secret/s: data.a: holds a NUL character"),
        ("data: [hunter2]\n", "4: Secret/s: data: not a mapping of names to values"),
        ("dta: {a: hunter2}\n", '4: Secret/s: dta: unknown field; did you mean "data"?'),
        ("data: {a: hunter2, a: hunter3}\n", "4: Secret/s: data.a: given twice; the first is on line 4"),
        ("data: {a: !!python/name:hunter2 hunter2}\n", "4: Secret/s: data.a: tag 'tag:yaml.org,2002:python/name:hunter2' is not allowed"),
    ],
)  # fmt: skip
def test_secret_problems_never_show_values(tmp_path, body, problem):
    problems = problems_of(tmp_path, SECRET + body, {"X": "hunter2"})
    assert problem.format(dir=tmp_path) in problems
    assert "12345678" not in "".join(problems)
    if "python/name" not in body:
        assert "hunter" not in "".join(problems)


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

"""Mistakes between resources: names that lead nowhere, and mounts that another agent could move."""

# ruff: noqa: E501 - tables of one case a line
from __future__ import annotations

import pytest
from resource_files import AGENT, GATEWAY, HEAD, documents, problems_of

from clrk.runtime.config.load import load


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


def test_siblings_of_a_writable_mount_are_fine(tmp_path):
    mounts = "[{hostPath: /usr, path: /w, readOnly: false}, {hostPath: /etc, path: /w2}, {hostPath: /usr, path: /v}]"
    (tmp_path / "a.yaml").write_text(AGENT.replace("{command: [/bin/true]}", f"{{command: [x], mounts: {mounts}}}"))
    assert len(load([tmp_path / "a.yaml"]).agents["default", "a"].spec.template.spec.mounts) == 3

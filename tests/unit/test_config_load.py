"""Resource files as they are read: folders, YAML and its traps, and the line of a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from resource_files import AGENT, GATEWAY, HEAD, problems_of

from clrk.core.errors import ConfigError
from clrk.runtime.config.load import load


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


def test_a_file_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="/dev/zero:1: the file is over 4 MiB"):
        load([Path("/dev/zero")])

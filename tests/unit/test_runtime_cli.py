"""The clrk-runtime command: what it prints, where, and with which exit code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from clrk import __version__
from clrk.runtime.cli import main

VALID = """\
apiVersion: clrk/v1alpha1
kind: TaskAgent
metadata: {name: a}
spec: {template: {spec: {command: [/bin/true]}}}
---
apiVersion: clrk/v1alpha1
kind: EgressGateway
metadata: {name: default}
---
apiVersion: clrk/v1alpha1
kind: EgressL4Route
metadata: {name: r}
spec: {rules: [{hostnames: [api.openai.com]}, {hostnames: [api.anthropic.com]}]}
---
apiVersion: clrk/v1alpha1
kind: Secret
metadata: {name: s}
data: {token: hunter2}
---
apiVersion: clrk/v1alpha1
kind: MCPRoute
metadata: {name: m}
spec: {rules: [{filters: [{type: ToolPolicy, toolPolicy: {deniedTools: [rm]}}]}]}
---
apiVersion: clrk/v1alpha1
kind: CredentialInjectionPolicy
metadata: {name: c}
spec: {hostnames: [api.openai.com], secretRef: {name: s}, target: {type: Header}}
"""


def test_check_of_valid_resources_says_what_was_found(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(VALID)
    assert main(["check", "-c", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "TaskAgent default/a: revision " in out
    assert "EgressGateway default/default: deny-all, 2 rules" in out
    assert "MCPRoute default/m: 1 rule of default\n" in out
    assert "CredentialInjectionPolicy default/c: Secret default/s\n" in out
    assert "Secret default/s: 1 key\n" in out
    assert "hunter2" not in out
    assert err == ""


@pytest.mark.parametrize(
    ("key", "field", "noted"),
    [("identity.tenant", "user", True), ("identity.tenant", "tenant", False), ("agent", "user", False)],
)
def test_check_notes_budgets_by_an_identity_that_an_agent_does_not_have(key, field, noted, tmp_path, capsys):
    route = (
        "---\napiVersion: clrk/v1alpha1\nkind: AIProviderRoute\nmetadata: {name: llm}\nspec:\n"
        f"  rules: [{{filters: [{{type: TokenBudget, tokenBudget: {{maxTokensPerDay: 1k, key: {key}}}}}]}}]\n"
        "---\napiVersion: clrk/v1alpha1\nkind: TaskAgent\nmetadata: {name: asked}\nspec:\n"
        f"  identity: {{extractors: [{{type: Header, name: X-Who, field: {field}}}]}}\n"
        "  template: {spec: {command: [/bin/true]}}\n"
    )
    gateway = "---\n{apiVersion: clrk/v1alpha1, kind: EgressGateway, metadata: {name: default}}\n"
    (tmp_path / "a.yaml").write_text(gateway + route)
    assert main(["check", "-c", str(tmp_path)]) == 0
    note = (
        "  note: AIProviderRoute default/llm rules[0], key identity.tenant: no extractor of asked has that field, "
        "so their callers share one account\n"
    )
    assert (note in capsys.readouterr().out) is noted


@pytest.mark.parametrize(
    ("matches", "noted"),
    [
        ("[{methods: ['resources/*']}]", True),
        ("[{tools: [x], resources: ['file://*']}]", True),
        ("[{methods: ['resources/*']}, {tools: [x]}]", False),
        ("[{methods: ['tools/*'], resources: ['*']}]", False),
        ("[]", False),
    ],
)
def test_check_notes_a_tool_policy_that_judges_nothing(matches, noted, tmp_path, capsys):
    route = (
        "---\n{apiVersion: clrk/v1alpha1, kind: EgressGateway, metadata: {name: default}}\n"
        "---\napiVersion: clrk/v1alpha1\nkind: MCPRoute\nmetadata: {name: m}\nspec:\n"
        f"  rules: [{{matches: {matches}, filters: [{{type: ToolPolicy, toolPolicy: {{maxCallsPerExecution: 1}}}}]}}]\n"
    )
    (tmp_path / "a.yaml").write_text(route)
    assert main(["check", "-c", str(tmp_path)]) == 0
    note = "  note: MCPRoute default/m rules[0]: no tools/call fits its matches "
    assert (note in capsys.readouterr().out) is noted


@pytest.mark.parametrize(
    ("secret", "key", "note"),
    [
        ("s", "token", None),
        ("s", "other", "Secret default/s has no key 'other'"),
        ("s", "empty", "Secret default/s, key 'empty', is empty"),
        ("gone", "token", "there is no Secret default/gone"),
        ("s", "file", "Secret default/s: fromFile.file: No such file or directory: {dir}/nope"),
        ("s", "env", "Secret default/s: fromEnv.env: the runtime's environment has no CLRK_NOPE"),
    ],
)
def test_check_notes_a_credential_that_is_not_there_and_exits_0(secret, key, note, tmp_path, capsys):
    policy = (
        "---\napiVersion: clrk/v1alpha1\nkind: CredentialInjectionPolicy\nmetadata: {name: p}\nspec:\n"
        f"  hostnames: [api.openai.com]\n  secretRef: {{name: {secret}}}\n  secretKey: {key}\n"
        "  target: {type: Header}\n"
    )
    sources = "hunter2, empty: ''}"
    if key in ("file", "env"):
        sources += "\nfromFile: {file: nope}\nfromEnv: {env: CLRK_NOPE}"
    (tmp_path / "a.yaml").write_text(VALID.replace("hunter2}", sources) + policy)
    assert main(["check", "-c", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    said = f"CredentialInjectionPolicy default/p: {note}, so calls to its hosts get a 502".format(dir=tmp_path)
    assert (f"  note: {said}\n" in out) if note else ("note:" not in out)
    assert "hunter2" not in out


def test_check_shows_daemons_too(tmp_path, capsys):
    only = VALID.split("---", maxsplit=1)[0].replace("TaskAgent", "DaemonAgent")
    (tmp_path / "a.yaml").write_text(only)
    assert main(["check", "-c", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "DaemonAgent default/a: revision " in out
    assert "no agent is declared" not in out


def test_check_tells_when_an_agent_has_no_egress(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(VALID.split("---", maxsplit=1)[0])
    assert main(["check", "-c", str(tmp_path)]) == 0
    assert "no egress: everything is denied" in capsys.readouterr().out


def test_check_of_invalid_resources_lists_all_and_exits_2(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(
        VALID.replace("template", "templte").replace("deny", "x").replace("rules", "rulez")
    )
    assert main(["check", "-c", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "missing")]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[-1] == f"{len(lines) - 1} problems"
    assert any(line.endswith('spec.templte: unknown field; did you mean "template"?') for line in lines)
    assert any("missing: no such file or folder" in line for line in lines)


@pytest.mark.parametrize("arguments", [["check", "-x"], ["check", "extra"], ["serv"], ["--bogus"], ["check", "-c", ""]])
def test_usage_errors_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: clrk-runtime" in capsys.readouterr().err


def test_a_word_that_is_no_command_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["apply"])
    assert "invalid choice: 'apply'" in capsys.readouterr().err


def test_the_daemon_reads_absolute_paths_so_that_its_problems_name_them(monkeypatch, tmp_path):
    """`clrk apply` prints them in another folder than the daemon's."""
    served = []
    monkeypatch.setattr("clrk.runtime.cli._serve", lambda layout, paths: served.extend(paths) or 0)
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "-c", "etc", "-c", "/a/b.yaml"]) == 0
    assert [str(path) for path in served] == [str(tmp_path / "etc"), "/a/b.yaml"]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "sudo clrk-runtime serve -c" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"clrk-runtime {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["-c", "x"], ["serve"], ["serve", "--instance", "other"]])
def test_serve_without_root_says_so(monkeypatch, capsys, arguments):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(arguments) == 1
    assert capsys.readouterr().err == "clrk-runtime: serve needs root (namespaces, cgroups, BPF): use sudo\n"


def test_a_log_level_that_is_none_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(VALID)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("CLRK_LOG_LEVEL", "verbose")
    assert main(["serve", "-c", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "CLRK_LOG_LEVEL: write one of DEBUG, INFO, WARNING, ERROR, CRITICAL, not 'verbose'" in err


def test_instance_names_are_checked(capsys):
    assert main(["serve", "--instance", "../etc"]) == 2
    assert "use 1 to 14 of a-z and 0-9" in capsys.readouterr().err


def test_check_needs_neither_bpf_nor_netlink(tmp_path):
    """`check` must work on a laptop without bcc."""
    (tmp_path / "a.yaml").write_text(VALID)
    code = (
        "import sys; from clrk.runtime.cli import main; status = main(['check', '-c', sys.argv[1]]); "
        "assert not {'bcc', 'pyroute2', 'clrk.ebpf'} & set(sys.modules), 'imported'; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

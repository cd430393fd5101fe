"""What the README and the examples show is what the product accepts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from clrk.runtime.cli import main

ROOT = Path(__file__).parents[2]


def test_the_first_agent_of_the_readme_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for line in block.splitlines() if not line.startswith(("#", "---"))]
    assert len(lines) <= 10
    (tmp_path / "hello.yaml").write_text(block)
    assert main(["check", "-c", str(tmp_path)]) == 0, capsys.readouterr().err


def test_what_the_guide_shows_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/guide.md").read_text(), re.DOTALL)
    assert len(blocks) == 3  # a key, a budget, tools
    (tmp_path / "openai.key").write_text("made up")
    gateway = "{apiVersion: clrk/v1alpha1, kind: EgressGateway, metadata: {name: default}}\n"
    shown = "---\n".join([gateway, *blocks]).replace("/etc/clrk/openai.key", str(tmp_path / "openai.key"))
    (tmp_path / "guide.yaml").write_text(shown)
    assert main(["check", "-c", str(tmp_path / "guide.yaml")]) == 0, capsys.readouterr().err


def test_the_resources_of_the_demo_are_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = tmp_path / "examples" / "demo"
    demo.mkdir(parents=True)
    for path in (ROOT / "examples" / "demo").glob("*.yaml"):
        (demo / path.name).write_text(path.read_text())
    for folder in (".venv", ".output/demo/standin", "examples/agents"):  # what its relative paths name
        (tmp_path / folder).mkdir(parents=True)
    for host in ("api.anthropic.com", "api.openai.com"):
        (tmp_path / f".output/demo/{host}.key").write_text("made up")
    sys.path.insert(0, str(ROOT / "examples/standin"))
    from certificates import make_server_context

    make_server_context(tmp_path / ".output/demo/standin", ("api.anthropic.com",))
    assert main(["check", "-c", str(demo)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "document", sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_files_and_tests_that_a_document_names_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), target
    for path, _, test in re.findall(r"`(tests/[\w/]+\.py)(::(\w+))?`", text):
        source = (ROOT / path).read_text()
        assert not test or f"def {test}(" in source, f"{path}::{test}"


def test_every_line_of_the_conformance_matrix_names_its_test() -> None:
    rows = [line for line in (ROOT / "docs/protocols.md").read_text().splitlines() if line.startswith("| ")]
    heads = [at for at, line in enumerate(rows) if "test |" in line or "what has to hold" in line]
    bare = [
        line for at, line in enumerate(rows) if at not in heads and not re.search(r"`tests/[\w/]+\.py(::\w+)?`", line)
    ]
    assert bare == []


def test_every_reason_that_is_given_stands_in_the_troubleshooting() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    sources = [path.read_text() for path in (ROOT / "gateway").rglob("*.py")]
    raised = r"(?:Refused|DialDenied|DialFailed|Credential)Error\((?:\s*\d+, )?\s*\"([a-z_]+)\""
    given = r"(?:Denial\(\d+, |HandshakeFailure\(|_rejected\(host, )\"([a-z_]+)\""
    reasons = {word for source in sources for pattern in (raised, given) for word in re.findall(pattern, source)}
    for module in ("policy.py", "mcp/governor.py", "mcp/tool_policy.py", "llm/budgets.py", "llm/budget_denial.py"):
        reasons |= set(
            re.findall(r'^[A-Z_]+: Final = "([a-z]+(?:_[a-z]+)+)"', (ROOT / "gateway" / module).read_text(), re.M)
        )
    failure, proxy = ((ROOT / "gateway/egress" / name).read_text() for name in ("failure.py", "proxy.py"))
    reasons |= set(re.findall(r'"((?:tls|proxy)_[a-z_]+)"', failure + proxy))
    assert len(reasons) > 50
    assert sorted(reason for reason in reasons if f"`{reason}`" not in text) == ["default_policy"]  # why it was allowed

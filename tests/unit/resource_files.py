"""Resource files with a mistake, and what their author is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from clrk.core.errors import ConfigError
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

"""YAML with line numbers: documents become plain Python values, and every value knows the line it came from.

Only the core tags are understood, so a document can not construct objects. Duplicate keys are errors, because the last
one would win silently. Anchors, aliases and merge keys work, within a budget: an alias costs what it expands to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

MAX_FILE_BYTES: Final = 4 * 1024 * 1024
MAX_VALUES: Final = 100_000  # after the expansion of aliases, for one file
MAX_DEPTH: Final = 64

_MERGE_TAG: Final = "tag:yaml.org,2002:merge"
_MAP_TAG: Final = "tag:yaml.org,2002:map"
_SEQ_TAG: Final = "tag:yaml.org,2002:seq"
_STR_TAG: Final = "tag:yaml.org,2002:str"
_SCALAR_TAGS: Final = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))
# What YAML 1.1 calls a timestamp is text here: no field of ours is a date.
_TEXT_TAGS: Final = frozenset({_STR_TAG, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"})

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong at a line; path is empty where it concerns the file or the whole document."""

    line: int
    path: Path
    text: str


@dataclass(slots=True)
class Document:
    """One YAML document. lines maps the path of each value to its 1-based line; for a mapping entry, its key's line."""

    line: int
    value: Any
    lines: dict[Path, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def line_of(self, path: Path) -> int:
        """Return the line of the value at path, or of the nearest value that holds it."""
        return self.lines.get(self.nearest(path), self.line)

    def nearest(self, path: Path) -> Path:
        """Return the longest prefix of path that exists in the document."""
        while path and path not in self.lines:
            path = path[:-1]
        return path


def parse(text: str) -> tuple[list[Document], list[Finding]]:
    """Split text into its documents; empty ones are left out.

    Returns: the documents that could be read, and the finding that ended the file early, if any. A finding never
        quotes values: the file may hold secrets.
    """
    if len(text) > MAX_FILE_BYTES:
        return [], [Finding(1, (), f"the file is over {MAX_FILE_BYTES // 2**20} MiB")]
    documents: list[Document] = []
    budget = _Budget()
    try:
        loader = yaml.SafeLoader(text)
        while loader.check_node():
            node = loader.get_node()
            if node is None or (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):
                continue
            document = Document(node.start_mark.line + 1, None)
            document.value = _Converter(loader, document, budget).convert(node, ())
            documents.append(document)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        what = "; ".join(part for part in (exc.context, exc.problem) if part)
        return documents, [Finding(mark.line + 1 if mark else 1, (), f"not YAML: {what}")]
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        return documents, [Finding(line, (), f"not YAML: {exc.reason}")]
    except _TooMuchError as exc:
        return documents, [Finding(exc.line, (), str(exc))]
    except RecursionError:
        return documents, [Finding(1, (), "nested too deeply")]
    return documents, []


class _TooMuchError(Exception):
    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


@dataclass(slots=True)
class _Budget:
    """Counts the values of one file after expansion: nine aliases of nine aliases of ... end here, not in swap."""

    left: int = MAX_VALUES

    def spend(self, node: yaml.Node, depth: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise _TooMuchError(node.start_mark.line + 1, f"more than {MAX_VALUES} values (aliases count expanded)")
        if depth > MAX_DEPTH:
            raise _TooMuchError(node.start_mark.line + 1, f"nested more than {MAX_DEPTH} deep")


class _Converter:
    """Turns the node tree of one document into values, noting lines and findings in the document."""

    def __init__(self, loader: yaml.SafeLoader, document: Document, budget: _Budget) -> None:
        self._loader = loader
        self._document = document
        self._budget = budget

    def convert(self, node: yaml.Node, path: Path) -> Any:
        """Return the value of node; what is wrong with it becomes a finding and None."""
        self._budget.spend(node, len(path))
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        match node:
            case yaml.ScalarNode():
                return self._convert_scalar(node, path)
            case yaml.SequenceNode(tag=tag) if tag == _SEQ_TAG:
                return [self.convert(item, (*path, index)) for index, item in enumerate(node.value)]
            case yaml.MappingNode(tag=tag) if tag == _MAP_TAG:
                return self._convert_mapping(node, path)
        self._find(node, path, f"tag {node.tag!r} is not allowed")
        return None

    def _convert_scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        if node.tag in _TEXT_TAGS:
            return node.value
        if node.tag not in _SCALAR_TAGS:
            self._find(node, path, f"tag {node.tag!r} is not allowed")
            return None
        try:
            value = self._loader.construct_object(node)
        except (ValueError, KeyError, yaml.constructor.ConstructorError):
            self._find(node, path, f"not a valid {node.tag.rpartition(':')[2]}")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._find(node, path, "infinity and NaN are not numbers here")
            return None
        return value

    def _convert_mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:  # first, so that the mapping's own keys win and own their lines
            if key_node.tag == _MERGE_TAG:
                for source in self._merge_sources(value_node, path):
                    values = self.convert(source, path) | values
        own: set[str] = set()
        for key_node, value_node in node.value:
            key = None if key_node.tag == _MERGE_TAG else self._key(key_node, path)
            if key is None:
                continue
            if key in own:
                first = self._document.lines[(*path, key)]
                self._find(key_node, (*path, key), f"given twice; the first is on line {first}")
                continue
            own.add(key)
            self._document.lines[(*path, key)] = key_node.start_mark.line + 1
            values[key] = self.convert(value_node, (*path, key))
        return values

    def _merge_sources(self, node: yaml.Node, path: Path) -> list[yaml.MappingNode]:
        candidates = node.value if isinstance(node, yaml.SequenceNode) else [node]
        sources = [item for item in candidates if isinstance(item, yaml.MappingNode) and item.tag == _MAP_TAG]
        if len(sources) != len(candidates):
            self._find(node, path, "<< takes a mapping or a list of mappings")
        return sources

    def _key(self, node: yaml.Node, path: Path) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag in _TEXT_TAGS:
            return str(node.value)
        self._find(node, path, "a key that is not text; put it in quotes")
        return None

    def _find(self, node: yaml.Node, path: Path, text: str) -> None:
        self._document.findings.append(Finding(node.start_mark.line + 1, path, text))

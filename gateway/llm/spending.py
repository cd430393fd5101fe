"""What a request may use at most, read from its body before it goes out: input by estimate, output by its own limit.

Nothing here trusts the agent. A body that two parsers could read differently has no one reading, so it is refused:
names that stand there twice or in another spelling, limits that are no numbers.

The estimate of the input is an upper bound for what people and programs write, two or three times the usual count (text
made to fall apart into single letters has up to 1.8 times as many; what is over is settled with the reported usage):
- small ASCII letters and white space: five tokens for nine bytes (English prose has two, random letters 4.9 with
  cl100k_base); large letters: thirteen for nine, since a change of case begins a token; every other byte: one. Never
  more than there are bytes, as byte-level tokenizers do. JSON's own punctuation pays for what providers put around
  messages.
- what is not text: an image `IMAGE_TOKENS`; a document a token for two bytes of its base64, at least `IMAGE_TOKENS`;
  sound and video a token for 16 bytes.
- what is not in the request (stored conversations and files, what a tool of the provider reads): `REFERENCE_TOKENS`.
- tools: `TOOLS_TOKENS` once, for the instructions that providers add.
The bytes of media count as media only where the protocols have them; anywhere else they are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from clrk.core.errors import ProtocolError
from clrk.gateway.llm.json_members import Member, read_inner_members, read_members
from clrk.gateway.llm.media_parts import find_media

IMAGE_TOKENS: Final = 5_000  # more than the largest image of Claude, Gemini and GPT-4o; GPT-4o mini counts up to 48,169
REFERENCE_TOKENS: Final = 200_000  # a usual context window
SERVER_TOOL_TOKENS: Final = 50_000
TOOLS_TOKENS: Final = 1_000  # Claude: 346 to 735, platform.claude.com "Tool use"
BASE_TOKENS: Final = 64
MAX_BRACKETS: Final = 200_000  # of a body; what the event loop reads within some 0.2 s, for everybody waits
MAX_COMMAS: Final = 1_000_000

_LIMITS: Final = (
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "maxOutputTokens",
    "maxTokens",
    "num_predict",
)
_COUNTS: Final = ("n", "best_of", "candidateCount", "candidate_count")
_CONFIGS: Final = ("generationConfig", "generation_config", "inferenceConfig", "textGenerationConfig", "options")
_MODELS_OWN: Final = "additionalModelRequestFields"  # of Bedrock's Converse: for the model, in its own words
_KNOWN: Final = frozenset(
    (*_LIMITS, *_COUNTS, *_CONFIGS, _MODELS_OWN, "model", "stream", "stream_options", "messages", "contents", "input",
     "prompt", "max_tokens_to_sample", "max_gen_len", "maxTokenCount")
)  # fmt: skip
_ASCII_ESCAPE: Final = re.compile(r"\\u00([2-7][0-9A-Fa-f])")
_SMALL: Final = b"abcdefghijklmnopqrstuvwxyz \t\r\n"
_LARGE: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_STORED: Final = (
    "conversation",
    "cachedContent",
    "cached_content",
    "promptVariables",
)  # of a request; `prompt` too, where it is an object
_SERVER_TOOLS: Final = (
    "web_search", "web_fetch", "file_search", "code_interpreter", "code_execution", "mcp", "image_generation",
    "google", "url_context", "urlContext", "retrieval", "advisor",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for.

    Shape: output_limit is what one choice may generate, None where the request does not say; previous is the id of a
    stored answer that is read again.
    """

    input_tokens: int
    output_limit: int | None
    choices: int
    previous: str | None
    text: str
    first: int
    members: dict[str, Member]

    def mentions(self, *words: str) -> bool:
        """Say whether any of some ASCII words stands in the text, however it is spelled in JSON."""
        if any(word in self.text for word in words):
            return True
        if "\\u00" not in self.text:
            return False
        plain = _ASCII_ESCAPE.sub(lambda found: chr(int(found[1], 16)), self.text)
        return any(word in plain for word in words)


def read_demand(body: bytes) -> Demand:
    """Read a request body without content coding.

    Raises: ProtocolError(json | ambiguous): nobody can say what it will be read as.
    Cost:   O(len(body)); it is decoded once, and walked.
    """
    many = len(body) > MAX_BRACKETS and body.count(b"[") + body.count(b"{") > MAX_BRACKETS
    if many or (len(body) > MAX_COMMAS and body.count(b",") > MAX_COMMAS):
        raise ProtocolError("json", f"over {MAX_BRACKETS} brackets or {MAX_COMMAS} commas take too long to read")
    try:
        text = body.decode()
        first, members = read_members(text)
        own = _inside(text, members, (_MODELS_OWN,))
        configs = [inner for level in (members, *own) for inner in _inside(text, level, _CONFIGS)] + own
    except (ValueError, RecursionError) as exc:
        reason = str(exc) if isinstance(exc, ValueError) and not isinstance(exc, UnicodeDecodeError) else "not UTF-8"
        raise ProtocolError("json", f"the body is not one JSON object with distinct names: {reason[:80]}") from exc
    for level in (members, *configs):
        _check_names(level)
    flat = [(name, member.value) for level in (members, *configs) for name, member in level.items()]
    return Demand(
        input_tokens=_estimate(body, {name: member.value for name, member in members.items()}),
        output_limit=_largest(flat, _LIMITS),
        choices=max(1, _largest(flat, _COUNTS) or 1),
        previous=_text(members.get("previous_response_id")),
        text=text,
        first=first,
        members=members,
    )


def _inside(text: str, members: dict[str, Member], names: tuple[str, ...]) -> list[dict[str, Member]]:
    """Return the members of those members that are there. Raises: as read_inner_members."""
    found = (members[name] for name in names if name in members)
    return [read_inner_members(text, member)[1] for member in found if member.value is not None]


def write_limit(demand: Demand, path: str, limit: int) -> bytes:
    """Return the body with a limit of the output, by a name that it does not have yet, or has as null.

    Shape: path is a member, or `object.member`. Nothing else in the body changes.
    """
    outer, _, inner = path.partition(".")
    if not inner:
        return _put(demand.text, demand.first, demand.members, outer, str(limit))
    known = next((member for name, member in demand.members.items() if _plain(name) == _plain(outer)), None)
    if known is None or known.value is None:
        return _put(demand.text, demand.first, demand.members, outer, f'{{"{inner}":{limit}}}')
    first, members = read_inner_members(demand.text, known)
    return _put(demand.text, first, members, inner, str(limit))


def _put(text: str, first: int, members: dict[str, Member], name: str, raw: str) -> bytes:
    if (known := members.get(name)) is not None:
        return f"{text[: known.start]}{raw}{text[known.end :]}".encode()
    return f'{text[:first]}"{name}":{raw}{"," if members else ""}{text[first:]}'.encode()


# --- names and numbers ----------------------------------------------------------------------------------------------


def _check_names(members: dict[str, Member]) -> None:
    """Refuse what a lenient parser reads as another name: Go's ignores case, protobuf's takes two spellings."""
    seen: dict[str, str] = {}
    for name in members:
        plain = _plain(name)
        if plain in _KNOWN_PLAIN and (name not in _KNOWN or plain in seen):
            twin = f", beside {seen[plain]!r}" if plain in seen else ""
            raise ProtocolError("ambiguous", f"{name[:40]!r}{twin}: servers do not agree on what it means")
        seen.setdefault(plain, name)
    model = members.get("model")
    if model is not None and not isinstance(model.value, str | None):
        raise ProtocolError("ambiguous", "model is not a string")
    stream = members.get("stream")
    if stream is not None and not isinstance(stream.value, bool | None):
        raise ProtocolError("ambiguous", "stream is neither true nor false")


def _plain(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")


_KNOWN_PLAIN: Final = frozenset(map(_plain, _KNOWN))


def _largest(flat: list[tuple[str, object]], names: tuple[str, ...]) -> int | None:
    """Return the largest of what is given: which of two limits a server obeys is its own affair."""
    found: int | None = None
    for name, value in flat:
        if name not in names or value is None or (name == "num_predict" and value in (-1, -2)):  # Ollama: no limit
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ProtocolError("ambiguous", f"{name} is not a whole number")
        found = value if found is None else max(found, value)
    return found


def _text(member: Member | None) -> str | None:
    value = member.value if member is not None else None
    return value if isinstance(value, str) and value else None


# --- the estimate ---------------------------------------------------------------------------------------------------


def _estimate(body: bytes, document: dict[str, object]) -> int:
    size, text, media = len(body), _text_tokens(body), 0
    for kind, data in find_media(document):
        if data is None:
            media += IMAGE_TOKENS if kind == "image" else REFERENCE_TOKENS
            continue
        raw = data.encode("utf-8", "surrogatepass")
        media += _media_tokens(kind, len(raw))
        size, text = size - len(raw), text - _text_tokens(raw)
    return BASE_TOKENS + max(0, min(size, text)) + media + _elsewhere(document)


def _text_tokens(raw: bytes) -> int:
    large = len(raw) - len(raw.translate(None, delete=_LARGE))
    small = len(raw) - len(raw.translate(None, delete=_SMALL))
    return len(raw) - large - small + (small * 5 + large * 13 + 8) // 9


def _media_tokens(kind: str, size: int) -> int:
    if kind == "image":
        return IMAGE_TOKENS
    return max(IMAGE_TOKENS, size // 2) if kind == "document" else max(BASE_TOKENS, size // 16)


def _elsewhere(document: dict[str, object]) -> int:
    """Return what is read that is not in the request."""
    total = sum(REFERENCE_TOKENS for name in _STORED if document.get(name) is not None)
    if isinstance(document.get("prompt"), dict):
        total += REFERENCE_TOKENS
    tools = document.get("tools")
    if isinstance(tools, list) and tools:
        total += TOOLS_TOKENS
        total += SERVER_TOOL_TOKENS * sum(map(_is_server_tool, tools))
    if document.get("mcp_servers") or document.get("web_search_options") is not None:
        total += SERVER_TOOL_TOKENS
    return total


def _is_server_tool(tool: object) -> bool:
    if not isinstance(tool, dict):
        return False
    kind = tool.get("type")
    return any(name.startswith(_SERVER_TOOLS) for name in ((kind,) if isinstance(kind, str) else tool))

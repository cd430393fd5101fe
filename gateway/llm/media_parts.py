"""Pictures, documents, sound and video in the requests of the LLM APIs: only where the protocols have them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

Kind = Literal["image", "document", "stream"]
MAX_NODES: Final = 100_000  # of one request that are looked at; what comes later is taken for text
# Where models are shown JSON that they, tools or programs wrote: text, whatever it looks like.
_OPAQUE: Final = frozenset(
    ("tools", "functions", "arguments", "args", "response", "toolUse", "response_format", "metadata")
)
_OWN_JSON: Final = ("tool_use", "server_tool_use", "function_call", "mcp_call")


def find_media(document: object) -> Iterator[tuple[Kind, str | None]]:
    """Yield kind and base64 of each, None for what is only named; stream is sound or video.

    Cost: O(MAX_NODES), whatever the request's depth.
    """
    waiting, looked_at = [document], 0
    while waiting and looked_at < MAX_NODES:
        value = waiting.pop()
        looked_at += 1
        if isinstance(value, list):
            waiting += [item for item in value if isinstance(item, dict | list)]
        elif isinstance(value, dict):
            found = [*_from_messages(value), *_from_parts(value)]
            yield from found
            if not found and value.get("type") not in _OWN_JSON:
                waiting += [
                    inner for name, inner in value.items() if isinstance(inner, dict | list) and name not in _OPAQUE
                ]


def _from_messages(part: dict[str, object]) -> Iterator[tuple[Kind, str | None]]:
    """Anthropic and OpenAI: the part's type says what it is."""
    match part:
        case {"type": "image", "source": {"type": kind, **source}}:
            yield "image", _base64(source.get("data")) if kind == "base64" else None
        case {"type": "document", "source": {"type": "base64" | "url" | "file" as kind, **source}}:
            yield "document", _base64(source.get("data")) if kind == "base64" else None
        case {"type": "image_url", "image_url": {"url": url}}:
            yield "image", _data_url(url)
        case {"type": "input_image"}:
            yield "image", _data_url(part.get("image_url"))
        case {"type": "input_audio", "input_audio": {"data": data}}:
            yield "stream", _base64(data)
        case {"type": "file", "file": dict() as file} | ({"type": "input_file"} as file):
            yield "document", _data_url(file.get("file_data"))
        case _:
            pass


def _from_parts(part: dict[str, object]) -> Iterator[tuple[Kind, str | None]]:
    """Gemini, Bedrock Converse and Ollama: the member's name says what it is."""
    match part:
        case {"inlineData": dict() as inline} | {"inline_data": dict() as inline}:
            yield _kind_of(inline), _base64(inline.get("data"))
        case {"fileData": dict() as named} | {"file_data": dict() as named}:
            yield _kind_of(named), None
        case {"image": {"source": dict() as source}}:
            yield "image", _base64(source.get("bytes"))
        case {"document": {"source": {"bytes": data}}}:
            yield "document", _base64(data)
        case {"video": {"source": dict() as source}} | {"audio": {"source": dict() as source}}:
            yield "stream", _base64(source.get("bytes"))
        case {"images": list() as images}:
            for image in images:
                yield "image", _base64(image)
        case _:
            pass


def _kind_of(part: dict[str, object]) -> Kind:
    mime = part.get("mimeType") or part.get("mime_type")
    kind = mime.partition("/")[0] if isinstance(mime, str) else ""
    if kind == "image":
        return "image"
    return "stream" if kind in ("audio", "video") else "document"


def _base64(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _data_url(value: object) -> str | None:
    """Return what a data: URL holds; a plain base64 text is taken as it is, an address is only named."""
    if not isinstance(value, str) or "://" in value[:16]:
        return None
    return value.partition(",")[2] if value.startswith("data:") else value

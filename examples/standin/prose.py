"""What the stand-in models say, and how they count tokens: the same for the same request, every time."""

from __future__ import annotations

import json
from typing import Any

LONG = "[long]"  # in the prompt: an answer of some 15,000 tokens
_CHARACTERS_PER_TOKEN = 4


def text_of(content: Any) -> str:
    """Return the text of a message's content: a string, or a list of blocks of which the text ones count."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(block.get("text", "") for block in content if isinstance(block, dict))
    return ""


def count_tokens(value: Any) -> int:
    """Return a plausible token count of a string or a JSON value."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return max(1, -(-len(text) // _CHARACTERS_PER_TOKEN))


def answer_to(prompt: str, limit_tokens: int) -> tuple[str, bool]:
    """Return an answer of at most limit_tokens, and whether it had to be cut."""
    words = prompt.split()
    answer = f"You asked in {len(words)} words about: {' '.join(words[:12])}. Here is what I found."
    if LONG in prompt:
        answer += " And so on." * 5_500
    limit = limit_tokens * _CHARACTERS_PER_TOKEN
    return answer[:limit], len(answer) > limit


def pieces(text: str) -> list[str]:
    """Cut an answer as a tokeniser would: every piece is a word with the space in front of it."""
    cut: list[str] = []
    for character in text:
        if not cut or character == " ":
            cut.append(character)
        else:
            cut[-1] += character
    return cut

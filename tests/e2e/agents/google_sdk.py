"""Google's SDK as anybody would use it: plain, streamed, a tool, counted, embedded, refused; Claude on Vertex AI."""

from __future__ import annotations

import json
from typing import Any

from anthropic import AnthropicVertex
from google import genai
from google.genai import errors, types
from google.oauth2.credentials import Credentials

MODEL = "gemini-2.5-flash"
TOOL = types.Tool(
    function_declarations=[types.FunctionDeclaration(name="refund_policy", description="The policy of a country.")]
)
said: dict[str, Any] = {}


def usage(response: types.GenerateContentResponse) -> list[int]:
    found = response.usage_metadata
    return [found.prompt_token_count, found.candidates_token_count, found.thoughts_token_count]


def ask(name: str, client: genai.Client) -> None:
    """One plain call, one streamed."""
    settings = types.GenerateContentConfig(max_output_tokens=200, temperature=0.5, top_k=40)
    answer = client.models.generate_content(model=MODEL, contents="Where is my lamp?", config=settings)
    said[f"{name} plain"] = {"text": answer.text, "id": answer.response_id, "usage": usage(answer)}
    pieces = list(client.models.generate_content_stream(model=MODEL, contents="Where is my chair?", config=settings))
    text = "".join(piece.text for piece in pieces)
    said[f"{name} streamed"] = {"text": text, "id": pieces[-1].response_id, "usage": usage(pieces[-1])}


def main() -> None:
    """Use what there is, and print what came of it."""
    gemini = genai.Client(api_key="placeholder")
    ask("gemini", gemini)
    called = gemini.models.generate_content(
        model=MODEL, contents="[tool] May I send it back?", config=types.GenerateContentConfig(tools=[TOOL])
    )
    said["tool"] = [called.function_calls[0].name, called.function_calls[0].args]
    blocked = gemini.models.generate_content(model=MODEL, contents="[blocked] words")
    said["blocked"] = blocked.prompt_feedback.block_reason.value
    said["counted"] = gemini.models.count_tokens(model=MODEL, contents="How long is this?").total_tokens
    embedded = gemini.models.embed_content(model="gemini-embedding-001", contents="A lamp.")
    said["vector"] = len(embedded.embeddings[0].values)
    for name, model, contents in (("missing", "nobody-knows-it", "Hi"), ("overloaded", MODEL, "[overloaded] Hi")):
        try:
            gemini.models.generate_content(model=model, contents=contents)
        except errors.APIError as exc:
            said[name] = [exc.code, exc.status]
    try:
        said["pieces before"] = 0
        for _ in gemini.models.generate_content_stream(model=MODEL, contents="Hi [overloaded]"):
            said["pieces before"] += 1
    except errors.APIError as exc:
        said["broken off"] = [exc.code, exc.status]

    token = Credentials(token="placeholder")
    ask("vertex", genai.Client(vertexai=True, project="lamps", location="us-central1", credentials=token))
    ask("express", genai.Client(vertexai=True, api_key="placeholder"))
    claude = AnthropicVertex(project_id="lamps", region="us-east5", access_token="placeholder", max_retries=0)
    question = [{"role": "user", "content": "Where is my table?"}]
    message = claude.messages.create(model="claude-sonnet-4@20250514", max_tokens=200, messages=question)
    said["claude"] = [message.id, message.usage.input_tokens, message.usage.output_tokens]
    with claude.messages.stream(model="claude-haiku-4-5@20251001", max_tokens=200, messages=question) as stream:
        said["claude streamed"] = "".join(stream.text_stream)
    print(json.dumps(said))


main()

"""Vertex AI, as its public reference describes it: Google's models as the Gemini API has them, and Claude."""

from __future__ import annotations

import json

import anthropic_api
import gemini_api
import prose
from aiohttp import web

HOSTNAMES = ("aiplatform.googleapis.com", "us-central1-aiplatform.googleapis.com", "us-east5-aiplatform.googleapis.com")
_PROJECT = "/{version:v1|v1beta1}/projects/{project}/locations/{location}/publishers"


def application() -> web.Application:
    """Return the app of the regional and the global endpoint."""
    app = web.Application(client_max_size=32 * 2**20)
    app.router.add_post(_PROJECT + "/google/models/{model}:{method}", gemini_api.call)
    app.router.add_post("/{version:v1|v1beta1}/publishers/google/models/{model}:{method}", gemini_api.call)
    app.router.add_post(_PROJECT + "/anthropic/models/{model}:{method:rawPredict|streamRawPredict}", _claude)
    app.router.add_route("*", "/{rest:.*}", gemini_api.not_found)
    return app


async def _claude(request: web.Request) -> web.StreamResponse:
    """Answer as the Messages API does; the model stands in the path, the version in the body."""
    if not request.headers.get("authorization", "").startswith("Bearer "):
        return gemini_api.error(401, "Request is missing required authentication credential.")
    body = json.loads(await request.read())
    if "anthropic_version" not in body:
        return gemini_api.error(400, "anthropic_version: Field required")
    body["model"] = request.match_info["model"].replace("@", "-")
    prompt = prose.text_of(body["messages"][-1]["content"])
    return await anthropic_api.answer(request, body, prompt)

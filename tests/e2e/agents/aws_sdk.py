"""AWS's SDK as anybody would use it: Converse and InvokeModel, plain, streamed, with a tool, throttled; Anthropic's."""

from __future__ import annotations

import json
from typing import Any

import boto3
from anthropic import AnthropicBedrock
from botocore.config import Config
from botocore.exceptions import ClientError, EventStreamError

HAIKU = "us.anthropic.claude-haiku-4-5-20251001-v1:0"
NOVA = "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.amazon.nova-lite-v1:0"
LLAMA = "meta.llama3-8b-instruct-v1:0"
KEYS = {"aws_access_key_id": "AKIAPLACEHOLDER00000", "aws_secret_access_key": "placeholder"}
TOOLS = {"tools": [{"toolSpec": {"name": "refund_policy", "inputSchema": {"json": {"type": "object"}}}}]}
said: dict[str, Any] = {}


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"text": text}]}], "inferenceConfig": {"maxTokens": 200}, **more}


def converse(client: Any) -> None:
    """Converse: plain, streamed, with a tool, throttled before and within the stream."""
    answer = client.converse(modelId=HAIKU, **ask("Where is my lamp?"))
    said["converse"] = [answer["output"]["message"]["content"][0]["text"], answer["usage"]]
    events = list(client.converse_stream(modelId=NOVA, **ask("Where is my chair?"))["stream"])
    deltas = [event["contentBlockDelta"]["delta"]["text"] for event in events if "contentBlockDelta" in event]
    said["converse streamed"] = ["".join(deltas), events[-1]["metadata"]["usage"]]
    called = client.converse(modelId=HAIKU, **ask("[tool] May I send it back?", toolConfig=TOOLS))
    said["tool"] = [called["stopReason"], called["output"]["message"]["content"][0]["toolUse"]["input"]]
    try:
        client.converse(modelId=HAIKU, **ask("[throttled]"))
    except ClientError as exc:
        said["throttled"] = [exc.response["Error"]["Code"], exc.response["ResponseMetadata"]["HTTPStatusCode"]]
    said["events before"] = 0
    try:
        for _ in client.converse_stream(modelId=HAIKU, **ask("Hi [throttled]"))["stream"]:
            said["events before"] += 1
    except EventStreamError as exc:
        said["broken off"] = exc.response["Error"]["Code"]
    counted = client.count_tokens(modelId=HAIKU, input={"converse": {"messages": ask("How long?")["messages"]}})
    said["counted"] = counted["inputTokens"]


def invoke(client: Any) -> None:
    """InvokeModel: Claude, Llama and Nova, each in its own words."""
    question = [{"role": "user", "content": "Where is my table?"}]
    claude = {"anthropic_version": "bedrock-2023-05-31", "max_tokens": 200, "messages": question}
    nova = {
        "messages": [{"role": "user", "content": [{"text": "Where is my bed?"}]}],
        "inferenceConfig": {"maxTokens": 99},
    }
    llama = {"prompt": "Where is my rug?", "max_gen_len": 99, "temperature": 0.5}
    for name, model, body in (("claude", HAIKU, claude), ("nova", NOVA, nova), ("llama", LLAMA, llama)):
        answer = client.invoke_model(modelId=model, body=json.dumps(body))
        said[name] = json.loads(answer["body"].read())
        streamed = client.invoke_model_with_response_stream(modelId=model, body=json.dumps(body))
        said[f"{name} streamed"] = [json.loads(event["chunk"]["bytes"]) for event in streamed["body"]]
    theirs = AnthropicBedrock(
        aws_access_key="AKIAPLACEHOLDER00000", aws_secret_key="placeholder", aws_region="us-east-1", max_retries=0
    )
    with theirs.messages.stream(model=HAIKU, max_tokens=200, messages=question) as stream:
        said["anthropic"] = "".join(stream.text_stream)


def main() -> None:
    """Use what there is, and print what came of it."""
    settings = Config(retries={"total_max_attempts": 1})
    client = boto3.client("bedrock-runtime", region_name="us-east-1", config=settings, **KEYS)
    converse(client)
    invoke(client)
    print(json.dumps(said))


main()

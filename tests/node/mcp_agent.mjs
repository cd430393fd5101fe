// An agent with the official MCP client for TypeScript: does what `data` asks, and prints what came of it.
import { text } from "node:stream/consumers";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { SSEClientTransport } from "@modelcontextprotocol/sdk/client/sse.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import {
  CreateMessageRequestSchema, ElicitRequestSchema, ListRootsRequestSchema,
} from "@modelcontextprotocol/sdk/types.js";

const asked = JSON.parse(await text(process.stdin)).data;
const found = { progress: 0, calls: {} };
const client = new Client(
  { name: "agent", version: "1" },
  { capabilities: { sampling: {}, elicitation: { form: {} }, roots: {} } },
);
client.setRequestHandler(CreateMessageRequestSchema, async () => (
  { role: "assistant", model: "m-1", content: { type: "text", text: "short" } }
));
client.setRequestHandler(ElicitRequestSchema, async () => (
  { action: "accept", content: { approved: true, name: "Ada" } }
));
client.setRequestHandler(ListRootsRequestSchema, async () => ({ roots: [{ uri: "file:///work", name: "work" }] }));
const url = new URL(asked.url);
const transport = asked.sse ? new SSEClientTransport(url) : new StreamableHTTPClientTransport(url);
await client.connect(transport);
found.tools = (await client.listTools()).tools.map((tool) => tool.name).sort();
for (const [name, args] of asked.calls) {
  try {
    const result = await client.callTool({ name, arguments: args }, undefined, { onprogress: () => { found.progress += 1; } });
    const texts = result.content.filter((block) => block.type === "text").map((block) => block.text);
    found.calls[name] = { error: result.isError ?? false, text: texts.join(" ") };
  } catch (error) {
    found.calls[name] = { code: error.code, message: error.message, data: error.data ?? null };
  }
}
if (asked.resource) found.resource = (await client.readResource({ uri: asked.resource })).contents[0].text;
if (asked.prompt) {
  const [name, args] = asked.prompt;
  found.prompt = (await client.getPrompt({ name, arguments: args })).messages[0].content.text;
}
if (!asked.sse) await transport.terminateSession();
await client.close();
console.log(JSON.stringify(found));

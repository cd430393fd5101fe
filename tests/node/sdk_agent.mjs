// An agent with the providers' SDKs for Node as their documentation shows them. The event's data says which part to play.
import { text } from "node:stream/consumers";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const openai = new OpenAI({ maxRetries: 0 });
const anthropic = new Anthropic({ maxRetries: 0 });
const user = (content) => [{ role: "user", content }];
const parameters = { type: "object", properties: {} };

const parts = {
  async openai() {
    const tools = [{ type: "function", function: { name: "count", parameters } }];
    const plain = await openai.chat.completions.create({ model: "gpt-4.1", messages: user("Is it green?") });
    let streamed = "";
    let chunksOfUsage = 0;
    const stream = await openai.chat.completions.create({ model: "gpt-4.1", messages: user("Is it green?"), stream: true });
    for await (const chunk of stream) {
      chunksOfUsage += chunk.choices.length === 0;
      streamed += chunk.choices[0]?.delta.content ?? "";
    }
    const called = await openai.chat.completions.create({ model: "gpt-4.1", messages: user("one two"), tools });
    const runner = openai.responses.stream({ model: "gpt-5", input: "Is it green?" });
    const response = await runner.finalResponse();
    const embedded = await openai.embeddings.create({ model: "text-embedding-3-small", input: "one" });
    const busy = await openai.chat.completions.create({ model: "gpt-4.1", messages: user("[busy]") }).catch((e) => e);
    return {
      plain: plain.usage,
      streamed,
      chunksOfUsage,
      called: called.choices[0].message.tool_calls[0].function.arguments,
      response: response.output_text,
      dimensions: embedded.data[0].embedding.length,
      busy: [busy.status, busy.code],
    };
  },
  async anthropic() {
    const ask = (content, more) => ({ model: "claude-haiku-4-5", max_tokens: 256, messages: user(content), ...more });
    const tools = [{ name: "count", input_schema: parameters }];
    const plain = await anthropic.messages.create(ask("Is it green?"));
    const streamed = await anthropic.messages.stream(ask("Is it green?")).finalText();
    const called = await anthropic.messages.stream(ask("one two", { tools })).finalMessage();
    const broken = await anthropic.messages.stream(ask("It is [overloaded] now")).finalMessage().catch((e) => e);
    return { plain: plain.usage, streamed, called: called.content[0].input, broken: broken.error?.error?.type };
  },
  async parallel() {
    const one = async (number) => {
      const content = "word ".repeat(number);
      const stream = await openai.chat.completions.create({
        model: "gpt-4.1", messages: user(content), stream: true, seed: number,
      });
      let said = "";
      for await (const chunk of stream) said += chunk.choices[0]?.delta.content ?? "";
      return said;
    };
    return Promise.all(Array.from({ length: 24 }, (_, at) => one(at + 1)));
  },
};

const event = JSON.parse(await text(process.stdin));
console.log(JSON.stringify(await parts[event.data]()));

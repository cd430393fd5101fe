// An agent with OpenTelemetry's SDK for Node as its documentation shows it: nothing in it knows of clrk.
// `"env"` as the event's data: it continues the context in its environment; else it does not look there.
import { text } from "node:stream/consumers";
import { context, metrics, propagation, trace } from "@opentelemetry/api";
import { logs, SeverityNumber } from "@opentelemetry/api-logs";
import { UndiciInstrumentation } from "@opentelemetry/instrumentation-undici";
import { NodeSDK } from "@opentelemetry/sdk-node";

const event = JSON.parse(await text(process.stdin));
const sdk = new NodeSDK({ instrumentations: [new UndiciInstrumentation()] });
sdk.start();

const carrier = { traceparent: process.env.TRACEPARENT, tracestate: process.env.TRACESTATE, baggage: process.env.BAGGAGE };
const parent = event.data === "env" ? propagation.extract(context.active(), carrier) : context.active();
const made = await context.with(parent, () =>
  trace.getTracer("agent").startActiveSpan("work", async (span) => {
    span.setAttributes({ step: 1, "invocation.id": "forged", "clrk.component": "gateway" });
    metrics.getMeter("agent").createCounter("agent.steps").add(1, { "agent.name": "forged", step: "one" });
    logs.getLogger("agent").emit({ severityNumber: SeverityNumber.WARN, body: "working" });
    const answer = await fetch("http://tools.internal/orders/1042");
    if (!answer.ok) throw new Error(`${answer.status}`);
    await answer.text();
    span.end();
    return span.spanContext();
  }),
);
await sdk.shutdown();
console.log(JSON.stringify({ trace_id: made.traceId, span_id: made.spanId, env: process.env }));

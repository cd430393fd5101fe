// A Node agent with the built-in fetch; it trusts the gateway through NODE_EXTRA_CA_CERTS, which the sandbox sets.
import { text } from "node:stream/consumers";

const event = JSON.parse(await text(process.stdin));
const urls = event.data?.urls ?? ["https://tools.internal/orders/1042"];
const answers = [];
for (const url of urls) {
  const response = await fetch(url);
  answers.push({ url, status: response.status, body: await response.text() });
}
console.log(JSON.stringify(answers));

// Looks at the page with Debian's Chromium, as people do. Run by test_page.py, which serves the page and says on stdin
// where; every finding is one JSON line on stdout: {check, error?}. {ask} waits for a line, while the test does it.
import assert from "node:assert/strict";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const next = async () => JSON.parse((await lines.next()).value);
const say = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);
const { base, token, ids, output, payloads } = await next();

const VIEWS = {
  invocations: "/",
  filtered: "/?agent=support&denied=true",
  mistake: "/?since=yesterday",
  invocation: `/invocations/${ids.plain}`,
  hostile: `/invocations/${ids.hostile}`,
  running: `/invocations/${ids.running}`,
  large: `/invocations/${ids.many}`,
  agents: "/agents",
  daemon: "/agents/default/watcher",
  agent: "/agents/default/support",
  logs: "/agents/default/support/logs",
  health: "/health",
  missing: "/nowhere",
};
const PATIENCE_MS = 120_000; // of every wait: what is on its way comes long before, also on a busy machine
const EXPECTED_ERRORS = /status of (400|401|404)/; // Chromium's word on views that are no 200
const LOOKS = {
  light: { colorScheme: "light", viewport: { width: 1360, height: 850 } },
  dark: { colorScheme: "dark", viewport: { width: 1360, height: 850 } },
  phone: { colorScheme: "light", viewport: { width: 375, height: 740 } },
};

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"], // tests run as root, in containers as well
});

// What a browser complains about, and what ran that must not.
async function open(look) {
  const context = await browser.newContext({ ...look, permissions: ["clipboard-read", "clipboard-write"] });
  const complaints = [];
  context.on("console", (message) => {
    if (["error", "warning"].includes(message.type()) && !EXPECTED_ERRORS.test(message.text())) complaints.push(message.text());
  });
  context.on("weberror", (error) => complaints.push(String(error.error())));
  context.on("request", (request) => {
    if (!request.url().startsWith(base)) complaints.push(`asked ${request.url()}`);
  });
  context.setDefaultTimeout(PATIENCE_MS);
  const page = await context.newPage();
  await page.addInitScript(() => {
    addEventListener("securitypolicyviolation", (event) => console.error(`CSP: ${event.violatedDirective} ${event.blockedURI}`));
  });
  await page.goto(`${base}/?token=${token}`);
  return { context, page, complaints };
}

async function check(name, body) {
  const opened = [];
  const began = Date.now();
  try {
    await body(async (look) => {
      const one = await open(look);
      opened.push(one);
      return one;
    });
    for (const one of opened) assert.deepEqual(one.complaints, []);
    say({ check: name, ms: Date.now() - began });
  } catch (error) {
    say({ check: name, error: String(error.stack ?? error).slice(0, 3000) });
  }
  for (const one of opened) await one.context.close();
}

const visit = (page, path) => page.goto(base + path, { waitUntil: "load" });
const focused = (page) => page.evaluate(() => document.activeElement.closest("[id]")?.id ?? "");

for (const [look, options] of Object.entries(LOOKS)) {
  await check(`screenshots ${look}`, async (start) => {
    const { page } = await start(options);
    const tooWide = [];
    for (const [view, path] of Object.entries(VIEWS)) {
      await visit(page, path);
      if (view === "invocation" || view === "hostile") {
        await page.locator(".waterfall summary", { hasText: view === "hostile" ? "script" : "claude-sonnet-5" }).first().click();
      }
      await page.screenshot({ path: `${output}/${view}-${look}.png`, fullPage: view !== "large" });
      const wider = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      if (wider > 0) tooWide.push(`${view} by ${wider} px`);
    }
    assert.deepEqual(tooWide, []);
  });
}

await check("token", async (start) => {
  const { page, context } = await start(LOOKS.light);
  assert.equal(page.url(), `${base}/`, "the token is not left in the address");
  const [cookie] = await context.cookies();
  assert.deepEqual([cookie.httpOnly, cookie.sameSite], [true, "Strict"]);
  assert.equal(await page.evaluate(() => document.cookie), "");
  await context.clearCookies();
  await page.reload();
  assert.match(await page.textContent("main"), /clrk page/);
  await page.screenshot({ path: `${output}/token-light.png` });
});

await check("payloads do not run", async (start) => {
  const { page } = await start(LOOKS.light);
  for (const path of [VIEWS.invocations, VIEWS.hostile, VIEWS.agents, VIEWS.daemon, VIEWS.health, VIEWS.logs]) {
    await visit(page, path);
    for (const details of await page.locator("details").all()) await details.evaluate((element) => { element.open = true; });
    await page.mouse.move(300, 400);
    const state = await page.evaluate(() => ({
      pwned: window.pwned,
      handlers: [...document.querySelectorAll("*")].flatMap((e) => e.getAttributeNames().filter((n) => n.startsWith("on") || n === "style")),
      links: [...document.links].map((link) => link.href).filter((href) => !href.startsWith(location.origin)),
      foreign: document.querySelectorAll("img, iframe, object, embed, style, base, meta[http-equiv], script:not([src])").length,
      hidden: /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069]/u.exec(document.documentElement.innerHTML)?.[0] ?? null,
    }));
    assert.deepEqual(state, { pwned: undefined, handlers: [], links: [], foreign: 0, hidden: null }, path);
  }
  await visit(page, VIEWS.hostile);
  const text = await page.textContent("main");
  for (const payload of payloads) assert.ok(text.includes(payload), `${payload} is shown as it is`);
});

await check("waterfall", async (start) => {
  const { page } = await start(LOOKS.light);
  await visit(page, VIEWS.invocation);
  const rows = await page.locator(".waterfall > li").evaluateAll((all) => all.map((row) => [
    Number(row.dataset.level), row.querySelector("b").textContent, row.querySelector("rect").getBoundingClientRect().left,
  ]));
  assert.deepEqual(rows.map(([level, name]) => [level, name]), [
    [1, "ingress.dispatch"], [2, "invoke_agent support"], [3, "sandbox.acquire"], [3, "sandbox.spawn"], [3, "answer_ticket"],
    [4, "chat claude-sonnet-5"], [4, "tools/call lookup_order"], [4, "GET tools.internal"], [4, "chat gpt-5-mini"],
    [3, "egress.dial.denied"], [3, "sandbox.teardown"],
  ]);
  const calls = rows.slice(5, 9).map(([, , left]) => left);
  assert.deepEqual(calls, [...calls].sort((a, b) => a - b), "bars begin in the order of time");
  assert.ok(calls[0] < calls[3]);
  const denied = page.locator(".waterfall > li", { hasText: "egress.dial.denied" });
  assert.equal(await denied.locator(".tag.bad").first().textContent(), "denied");
  await page.locator(".waterfall summary", { hasText: "chat claude-sonnet-5" }).click();
  const panel = await page.locator(".waterfall details[open]").innerText();
  for (const part of ["gen_ai.usage.input_tokens", "1834", "[redacted]", "Where is order 1042?", "event: message_stop", "gen_ai.first_chunk"]) {
    assert.ok(panel.includes(part), `${part} is in the panel`);
  }
  for (const width of [1360, 800, 375]) { // the last tick is where the bars end, so none may be missing
    await page.setViewportSize({ width, height: 850 });
    assert.equal(await page.locator(".ticks > span:visible").count(), 5, `ticks at a width of ${width}`);
  }
  await page.setViewportSize(LOOKS.light.viewport);
  await visit(page, VIEWS.large);
  assert.equal(await page.locator(".waterfall > li").count(), 200);
  await page.getByRole("link", { name: "9,805 more" }).click();
  await page.waitForURL(/offset=200/);
  assert.equal(await page.locator(".waterfall > li").first().getAttribute("id"), "r-200");
});

await check("keyboard", async (start) => {
  const { page } = await start(LOOKS.light);
  await visit(page, VIEWS.invocations);
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.className), "skip");
  assert.notEqual(await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle), "none");
  await page.keyboard.press("Enter");
  assert.equal(await focused(page), "main");
  await page.keyboard.press("j");
  await page.keyboard.press("j");
  await page.keyboard.press("k");
  const first = await focused(page);
  assert.match(first, /^i-/);
  await page.keyboard.press("Enter");
  await page.waitForURL(/invocations/);
  assert.ok(page.url().endsWith(first.slice(2)));

  await visit(page, VIEWS.invocation);
  await page.keyboard.press("j");
  assert.equal(await focused(page), "s-0");
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("ArrowLeft"); // closes the branch of invoke_agent
  assert.equal(await page.locator(".waterfall > li:visible").count(), 2);
  assert.equal(await page.locator("#r-1 > .twig").getAttribute("aria-expanded"), "false");
  await page.keyboard.press("ArrowRight");
  assert.equal(await page.locator(".waterfall > li:visible").count(), 11);
  await page.keyboard.press("ArrowRight"); // opens its attributes
  assert.equal(await page.locator("#s-1").evaluate((element) => element.open), true);
  await page.keyboard.press("Enter");
  assert.equal(await page.locator("#s-1").evaluate((element) => element.open), false);
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("ArrowLeft"); // a leaf: to its parent
  assert.equal(await focused(page), "s-1");
  await page.keyboard.press("/");
  assert.equal(await focused(page), "find");
});

await check("accessible names", async (start) => {
  const { page } = await start(LOOKS.light);
  for (const path of Object.values(VIEWS)) {
    await visit(page, path);
    const nameless = await page.evaluate(() => {
      const named = (e) => e.ariaLabel || e.labels?.length || e.textContent.trim() || e.title;
      return [...document.querySelectorAll("a, button, input, select, summary, [role=img]")].filter((e) => !named(e)).map((e) => e.outerHTML);
    });
    assert.deepEqual(nameless, [], path);
    assert.equal(await page.locator("h1").count(), 1, path);
    assert.equal(await page.locator("th:not([scope])").count(), 0, path);
    const doubles = await page.evaluate(() => [...document.querySelectorAll("[id]")].map((e) => e.id).filter((id, i, all) => all.indexOf(id) !== i));
    assert.deepEqual(doubles, [], path);
  }
});

await check("contrast", async (start) => {
  for (const look of [LOOKS.light, LOOKS.dark]) {
    const { page } = await start(look);
    for (const path of [VIEWS.invocations, VIEWS.invocation, VIEWS.health, VIEWS.agents]) {
      await visit(page, path);
      const poor = await page.evaluate(() => {
        const parse = (text) => (text.match(/[\d.]+/g) ?? []).map(Number);
        const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = (element) => {
          for (let e = element; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
          }
          return [255, 255, 255];
        };
        const found = new Map();
        for (const element of document.querySelectorAll("body *")) {
          const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
          if (!own || !element.checkVisibility() || element.closest("option, datalist")) continue;
          const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))].sort((x, y) => y - x);
          const ratio = (a + 0.05) / (b + 0.05);
          if (ratio < 4.5) found.set(`${element.tagName}.${element.className}`, ratio.toFixed(2));
        }
        return [...found];
      });
      assert.deepEqual(poor, [], `${look.colorScheme} ${path}`);
    }
  }
});

await check("filters", async (start) => {
  const { page } = await start(LOOKS.light);
  await page.getByLabel("Agent").fill("team-b/orders");
  await page.getByLabel("Phase").selectOption("Failed");
  await page.getByRole("button", { name: "Filter" }).click();
  await page.waitForURL(/orders/);
  assert.equal(new URL(page.url()).search, "?agent=team-b%2Forders&phase=Failed");
  const agents = await page.locator("tbody td[data-label=Agent]").allTextContents();
  assert.ok(agents.every((text) => text.trim() === "team-b/orders"), String(agents));
  assert.equal(await page.getByLabel("Agent").inputValue(), "team-b/orders");
  await page.getByRole("link", { name: "Clear" }).click();
  await page.getByRole("link", { name: "Older" }).click();
  await page.waitForURL(/before=/);
  const older = await page.locator("tbody tr").count();
  assert.ok(older > 0 && older < 50, String(older));
  await page.getByLabel("Invocation id").fill(ids.plain.slice(0, 36));
  await page.getByRole("button", { name: "Open", exact: true }).click();
  await page.waitForURL(`${base}/invocations/${ids.plain}`);
});

await check("live", async (start) => {
  const { page } = await start(LOOKS.light);
  const before = await page.locator("tbody tr").first().getAttribute("id");
  await page.keyboard.press("j");
  const focus = await focused(page);
  say({ ask: "arrive" });
  const { id } = await next();
  await page.locator(`#i-${id}`).waitFor();
  assert.notEqual(await page.locator("tbody tr").first().getAttribute("id"), before);
  assert.equal(await focused(page), focus, "the focus stays where it was");
  assert.match(await page.textContent("#said"), /1 new/);

  await visit(page, `/invocations/${id}`);
  await page.locator("#s-0 > summary").click();
  say({ ask: "finish" });
  await next();
  await page.locator("h1 .phase.succeeded").waitFor();
  assert.equal(await page.locator("#s-0").evaluate((element) => element.open), true, "what was open stays open");
  await page.locator("#live").waitFor({ state: "hidden" });

  await visit(page, "/");
  await page.getByRole("button", { name: "Live" }).click();
  assert.equal(await page.locator("#live").getAttribute("aria-pressed"), "false");
});

await check("copy", async (start) => {
  const { page } = await start(LOOKS.light);
  await visit(page, VIEWS.invocation);
  await page.getByRole("button", { name: `Copy ${ids.plain}` }).click();
  await page.getByRole("button", { name: `Copy ${ids.plain}` }).filter({ hasText: "Copied" }).waitFor();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), ids.plain);
});

await check("without script", async () => {
  const context = await browser.newContext({ ...LOOKS.light, javaScriptEnabled: false });
  context.setDefaultTimeout(PATIENCE_MS);
  const page = await context.newPage();
  await page.goto(`${base}/?token=${token}`);
  await page.locator("tbody a.row").nth(2).click();
  await page.locator(".waterfall summary").first().click();
  assert.ok(await page.locator(".waterfall details[open] .pairs").first().isVisible());
  assert.equal(await page.locator("button.twig:visible, button.copy:visible, #live:visible").count(), 0);
  await context.close();
});

await check("another site", async () => {
  const stranger = await browser.newContext();
  stranger.setDefaultTimeout(PATIENCE_MS);
  const mine = await stranger.newPage();
  await mine.goto(`${base}/?token=${token}`);
  const page = await stranger.newPage();
  await page.route("http://stranger.test/**", (route) => route.fulfill({ contentType: "text/html", body: "<h1>hello</h1>" }));
  await page.goto("http://stranger.test/");
  const seen = await page.evaluate(async (address) => {
    const load = (tag, attribute) => new Promise((done) => {
      const element = document.createElement(tag);
      element[attribute] = `${address}/static/page.${tag === "script" ? "js" : "css"}`;
      element.onload = () => done("loaded");
      element.onerror = () => done("refused");
      document.head.append(element);
    });
    const read = await fetch(`${address}/`, { credentials: "include" }).then(() => "read", () => "refused");
    const blind = await fetch(`${address}/`, { mode: "no-cors", credentials: "include" }).then(() => "sent", () => "refused");
    return { script: await load("script", "src"), read, blind };
  }, base);
  assert.deepEqual(seen, { script: "refused", read: "refused", blind: "refused" });
  await page.evaluate((address) => { location = `${address}/`; }, base);
  await page.waitForURL(`${base}/`);
  assert.match(await page.textContent("body"), /Another site/);
  await stranger.close();
});

await browser.close();
say({ done: true });
process.exit(0);

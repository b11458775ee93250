// Runs page.js on a small stand-in for the document, against a server: node page_driver.mjs URL FOLDER
import { readFileSync } from "node:fs";
import vm from "node:vm";

const [url, folder] = process.argv.slice(2);
const html = readFileSync(`${folder}/index.html`, "utf8");
const elements = new Map();

class Element {
  constructor(id = "") { Object.assign(this, { id, hidden: false, disabled: false, value: "", textContent: "", attributes: {}, listeners: {}, parts: {}, classList: { add() {}, remove() {} } }); }
  addEventListener(kind, listener) { (this.listeners[kind] ??= []).push(listener); }
  async send(kind, event = {}) { for (const listener of this.listeners[kind] ?? []) listener({ preventDefault() {}, target: this, ...event }); await settled(); }
  querySelector(selector) { return (this.parts[selector] ??= new Element()); }
  closest(selector) { return selector === "#questions" ? this : null; }
  setAttribute(name, value) { this.attributes[name] = String(value); if (name === "id") elements.set(value, this); }
  removeAttribute(name) { delete this.attributes[name]; }
  append(child) { this.children = [...(this.children ?? []), child]; }
  replaceChildren() { this.children = []; }
  focus() { document.focused = this.id; }
  reset() {}
  click() { document.clicked = this.download; }
}

for (const [, attributes] of html.matchAll(/<\w+([^>]*\sid="[^"]+"[^>]*)>/g)) {
  const made = new Element(attributes.match(/\sid="([^"]+)"/)[1]);
  made.hidden = /\shidden(\s|$)/.test(attributes);
  elements.set(made.id, made);
}
const document = {
  body: new Element("body"), listeners: {},
  getElementById: (id) => elements.get(id) ?? null,
  createElementNS: () => new Element(), createElement: () => new Element(),
  addEventListener(kind, listener) { (this.listeners[kind] ??= []).push(listener); },
};
const urls = [];
let open = 0;
const get = async (path, options) => {
  urls.push(path);
  open += 1;
  try { return await fetch(new URL(path, url), options); } finally { open -= 1; }
};
// Until the page is no longer busy.
async function settled() { do await new Promise((go) => setTimeout(go, 5)); while (open > 0 || "aria-busy" in document.body.attributes); }
class Address extends URL { static createObjectURL() { return "blob:x"; } static revokeObjectURL() {} }
const context = vm.createContext({ document, fetch: get, setTimeout() {}, URL: Address, Blob, TextDecoderStream, console, Math, JSON });
vm.runInContext(readFileSync(`${folder}/page.js`, "utf8"), context);

const at = (id) => elements.get(id);
const press = async (key) => { for (const one of document.listeners.keydown) one({ key, target: document.body, preventDefault() {} }); await settled(); };
const seen = {};
at("name").value = "ann";
await at("start").send("submit");
seen.begun = { start: at("start").hidden, questions: at("questions").hidden, write: at("write").hidden, focused: document.focused, people: at("map").children.length };
seen.prompts = [];
for (const key of ["ArrowLeft", "ArrowRight", "t", "s", "ArrowLeft", "u", "ArrowRight", "ArrowLeft"]) {
  seen.prompts.push([at("prompt").textContent, at("left").querySelector(".text").textContent]);
  await press(key);
}
seen.after = { count: at("count").textContent, status: at("status").textContent, certainty: at("certainty").value, place: [at("you").attributes.cx, at("you").attributes.cy] };
at("question").value = "Write a note.";
await at("ask").send("submit");
seen.written = [at("own").textContent, at("generic").textContent];
await at("own-better").send("click");
seen.judged = at("status").textContent;
seen.more = at("count").textContent;
await at("export").send("click");
seen.downloaded = document.clicked;
seen.stored = (await (await fetch(new URL("/v1/users/ann", url))).json()).pairs;
at("sure").returnValue = "yes";
await at("sure").send("close");
seen.end = { status: at("status").textContent, start: at("start").hidden, left: (await fetch(new URL("/v1/users/ann", url))).status };
seen.urls = urls;
console.log(JSON.stringify(seen));

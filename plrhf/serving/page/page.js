// The page of `plrhf serve`: ten choices, what the model makes of them, and texts for one person.
"use strict";

const N_CHOICES = 10;
const element = (id) => document.getElementById(id);
const state = { name: "", key: "", pair: null, chosen: [], busy: false, model: null, map: null, trail: [], answers: null };

// Send a request; return the response, or throw what the server says is wrong.
async function send(method, path, body) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (state.key !== "") headers.Authorization = `Bearer ${state.key}`;
  const options = { method, headers, body: body === undefined ? undefined : JSON.stringify(body) };
  const response = await fetch(path, options).catch(() => { throw new Error("The server does not answer. Try again."); });
  if (!response.ok) throw Object.assign(new Error(), (await response.json()).error);
  return response;
}

const ask = async (method, path, body) => (await send(method, path, body)).json();

const mine = (rest = "") => `/v1/users/${encodeURIComponent(state.name)}${rest}`;
const say = (words) => { element("status").textContent = words; };
// Say what can be seen anyway, and take it away after a while.
function note(words) {
  say(words);
  setTimeout(() => { if (element("status").textContent === words) say(""); }, 4000);
}

// Do one thing at a time, and say what went wrong.
async function once(action) {
  if (state.busy) return;
  state.busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    await action();
  } catch (error) {
    if (error.code === "invalid_api_key") element("key-field").hidden = false;
    say(error.message);
  } finally {
    state.busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

async function begin() {
  state.name = element("name").value.trim();
  state.key = element("key").value.trim();
  state.model = await ask("GET", "/v1/models").then((found) => found.data.find((one) => one.writes) ?? null);
  state.map = await ask("GET", "/v1/map");
  await ask("PUT", mine(), { consent: true });
  const known = await ask("GET", mine());
  state.chosen = known.pairs.map((pair) => pair.id);
  element("start").hidden = true;
  for (const id of ["questions", "idea", "data"]) element(id).hidden = false;
  element("write").hidden = state.model === null;
  drawMap();
  showIdea(await ask("GET", mine("/certainty")));
  await nextPair();
  if (state.pair !== null) element("question").value = inWords(state.pair.prompt);
  say("");
  element("questions").focus();
}

async function nextPair() {
  const count = state.chosen.length;
  element("count").textContent = count;
  element("progress").value = Math.min(count, N_CHOICES);
  element("undo").disabled = count === 0;
  element("onwards").hidden = count < N_CHOICES || state.model === null;
  try {
    state.pair = await ask("GET", mine("/next-pair"));
  } catch (error) {
    if (error.code !== "no_pair_left") throw error;
    state.pair = null;
  }
  for (const id of ["left", "right", "tie", "skip"]) element(id).disabled = state.pair === null;
  const [left, right] = state.pair === null ? ["", ""] : state.pair.responses;
  element("prompt").textContent = state.pair === null ? "There is nothing left to ask." : inWords(state.pair.prompt);
  element("left").querySelector(".text").textContent = left;
  element("right").querySelector(".text").textContent = right;
}

const inWords = (prompt) => (typeof prompt === "string" ? prompt : prompt.map((turn) => turn.content).join("\n"));

async function choose(side) {
  if (state.pair === null) return;
  const { prompt, responses: [left, right] } = state.pair;
  const [chosen, rejected] = side === "right" ? [right, left] : [left, right];
  const verdict = side === "left" || side === "right" ? "prefer" : side;
  element(side).classList.add("chosen");
  try {
    await addPair({ prompt, chosen, rejected, verdict });
    await nextPair();
  } finally {
    element(side).classList.remove("chosen");
  }
  const said = { left: "You chose the left answer.", right: "You chose the right answer.", tie: "Both alike.", skip: "Skipped." };
  note(state.chosen.length === N_CHOICES ? `${said[side]} That is ten: read an answer for you, or go on.` : said[side]);
}

async function addPair(pair) {
  const learned = await ask("POST", mine("/pairs"), { pairs: [pair] });
  state.chosen.push(...learned.ids);
  showIdea(learned);
}

async function undo() {
  const last = state.chosen.at(-1);
  if (last === undefined) return;
  const idea = await ask("DELETE", mine(`/pairs/${last}`));
  state.chosen.pop();
  state.trail.length = Math.max(0, state.trail.length - 2);  // the last step goes, the one before is drawn anew
  showIdea(idea);
  await nextPair();
  note("Taken back.");
}

// What the model thinks of the person: certainty, place on the map, words.
function showIdea(idea) {
  const certainty = idea.certainty ?? 0;
  element("certainty").value = certainty;
  element("certainty-words").textContent = idea.certainty === null ? "it cannot say" : `${Math.round(100 * certainty)}%`;
  element("traits").textContent = idea.traits.length === 0 ? "" : `Those most like you: ${idea.traits.join("; ")}.`;
  element("stranger").hidden = !idea.stranger;
  if (idea.place === null) return;
  state.trail.push(onMap(idea.place));
  const [x, y] = state.trail.at(-1);
  element("you").setAttribute("cx", x);
  element("you").setAttribute("cy", y);
  element("trail").setAttribute("points", state.trail.map((place) => place.join(",")).join(" "));
  state.map.words.forEach((words, n) => {
    element(`person-${n}`).setAttribute("class", idea.traits.includes(words) ? "person alike" : "person");
  });
}

const onMap = ([x, y]) => [Math.max(-1.1, Math.min(1.1, x / state.map.size)), Math.max(-1.1, Math.min(1.1, -y / state.map.size))];

function drawMap() {
  const map = element("map");
  map.replaceChildren();
  state.trail = [];
  const add = (name, attributes) => {
    const shape = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    map.append(shape);
  };
  state.map.people.forEach((place, n) => {
    const [cx, cy] = onMap(place);
    add("circle", { id: `person-${n}`, cx, cy, r: 0.024, class: "person" });
  });
  const [x, y] = onMap(state.map.generic);
  add("path", { d: `M${x - 0.05} ${y}h0.1M${x} ${y - 0.05}v0.1`, class: "middle" });
  add("polyline", { id: "trail", points: "", class: "trail" });
  add("circle", { id: "you", cx: x, cy: y, r: 0.06, class: "you" });
}

async function write() {
  const prompt = element("question").value.trim();
  if (prompt === "") return;
  say("Writing.");
  element("written").hidden = false;
  element("own").textContent = element("generic").textContent = "";
  const seed = Math.floor(Math.random() * 2 ** 31);
  const [own, generic] = await Promise.all([writeFor(state.name, prompt, seed, "own"), writeFor(null, prompt, seed, "generic")]);
  state.answers = { prompt, own, generic };
  const usable = own !== generic && own.trim() !== "" && generic.trim() !== "";
  for (const id of ["own-better", "generic-better"]) element(id).disabled = !usable;
  note(usable ? "Both answers are there. Which is better?" : "Both answers are there, and alike.");
}

// Stream an answer into an element; return the whole text.
async function writeFor(user, prompt, seed, id) {
  const body = { model: state.model.id, messages: [{ role: "user", content: prompt }], seed, temperature: 0.7, stream: true };
  if (user !== null) body.user = user;
  const answer = await send("POST", "/v1/chat/completions", body);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "", text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return text;
    const events = (waiting + value).split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error !== undefined) throw Object.assign(new Error(), chunk.error);
      text += chunk.choices[0]?.delta.content ?? "";
    }
    element(id).textContent = text;
  }
}

async function better(own) {
  const { prompt, own: mineText, generic } = state.answers;
  await addPair({ prompt, chosen: own ? mineText : generic, rejected: own ? generic : mineText });
  for (const id of ["own-better", "generic-better"]) element(id).disabled = true;
  element("count").textContent = state.chosen.length;
  note("Thank you. That was one more choice.");
}

async function download() {
  const content = await ask("GET", mine());
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }));
  link.download = "my-choices.json";
  link.click();
  URL.revokeObjectURL(link.href);
  note("Downloaded.");
}

async function remove() {
  const gone = await ask("DELETE", mine());
  for (const id of ["questions", "idea", "write", "data"]) element(id).hidden = true;
  element("start").hidden = false;
  element("start").reset();
  element("written").hidden = true;
  element("name").focus();
  say([`Deleted: ${gone.removed.judgments} choices and all that was learned from them.`, ...gone.kept].join(" "));
}

element("start").addEventListener("submit", (event) => { event.preventDefault(); once(begin); });
element("ask").addEventListener("submit", (event) => { event.preventDefault(); once(write); });
for (const side of ["left", "right", "tie", "skip"]) element(side).addEventListener("click", () => once(() => choose(side)));
element("undo").addEventListener("click", () => once(undo));
element("own-better").addEventListener("click", () => once(() => better(true)));
element("generic-better").addEventListener("click", () => once(() => better(false)));
element("export").addEventListener("click", () => once(download));
element("delete").addEventListener("click", () => { element("sure").returnValue = ""; element("sure").showModal(); });
element("sure").addEventListener("close", () => { if (element("sure").returnValue === "yes") once(remove); });

const KEYS = { ArrowLeft: "left", ArrowRight: "right", t: "tie", s: "skip" };
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, dialog") !== null;
  if (typing || event.ctrlKey || event.metaKey || event.altKey || element("questions").hidden) return;
  // Letters count only where the focus is in the questions, as people who speak to their computer need it.
  if (event.key.length === 1 && event.target.closest("#questions") === null) return;
  if (event.key in KEYS) { event.preventDefault(); once(() => choose(KEYS[event.key])); }
  if (event.key === "u") once(undo);
});

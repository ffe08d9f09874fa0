"use strict";

const $ = (id) => document.getElementById(id);
const turns = $("turns"), answers = $("answers");
let asked = 0; // number of the last question: an older answer that comes late is not shown
let token = "";
let scored = null; // the probabilities belong to the order in which the answers stand

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, 480)}px`;
}

function addTurn(role = "user", content = "") {
  const turn = $("turn-template").content.firstElementChild.cloneNode(true);
  const roles = turn.querySelector("select");
  if (![...roles.options].some((option) => option.value === role)) roles.add(new Option(role));
  roles.value = role;
  const area = turn.querySelector("textarea");
  area.value = content;
  turn.querySelector(".remove").onclick = () => { turn.remove(); changed(); };
  turns.append(turn);
  grow(area);
  return turn;
}

function addAnswer(text = "") {
  const answer = $("answer-template").content.firstElementChild.cloneNode(true);
  const area = answer.querySelector("textarea");
  area.value = text;
  answer.querySelector(".remove").onclick = () => { answer.remove(); changed(); };
  makeMovable(answer);
  answers.append(answer);
  grow(area);
  number();
  return answer;
}

const cards = () => [...answers.children];
const textOf = (element) => element.querySelector("textarea").value;

function number() {
  cards().forEach((card, n) => {
    card.querySelector(".name").textContent = `Answer ${n + 1}`;
    card.querySelector("textarea").setAttribute("aria-label", `Answer ${n + 1}`);
  });
}

function state() {
  return {
    messages: [...turns.children].map((t) => ({ role: t.querySelector("select").value, content: textOf(t) })),
    answers: cards().map(textOf),
  };
}

function show(saved) {
  turns.replaceChildren();
  answers.replaceChildren();
  for (const m of saved.messages) addTurn(String(m.role), String(m.content));
  for (const text of saved.answers) addAnswer(String(text));
  changed();
}

function toLink(value) {
  const bytes = new TextEncoder().encode(JSON.stringify(value));
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

function fromLink(text) {
  const raw = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  const value = JSON.parse(new TextDecoder().decode(Uint8Array.from(raw, (c) => c.charCodeAt(0))));
  if (!Array.isArray(value.messages) || !Array.isArray(value.answers)) throw new Error("no state");
  return value;
}

function clearScores() {
  scored = null;
  $("result").hidden = true;
  for (const card of cards()) {
    card.classList.remove("best");
    card.querySelector(".reward").textContent = "";
    card.querySelector(".facts").textContent = "";
    card.querySelector(".gauge span").style.width = "0";
    card.querySelector(".read").hidden = true;
  }
}

function changed() {
  asked += 1;
  $("score").disabled = false;
  clearScores();
  number();
  say("");
  clearTimeout(later);
  later = setTimeout(remember, 400); // browsers take 100 links in 30 seconds, and people type faster
}

const LONGEST_LINK = 2_000_000; // browsers open none above 2 MiB
let later = 0;

function remember() {
  clearTimeout(later);
  const link = `#${toLink(state())}`;
  if (link.length > LONGEST_LINK) return false;
  history.replaceState(null, "", link);
  return true;
}

function moved() {
  number();
  remember();
  if (scored) matrix();
}

function makeMovable(card) {
  const grip = card.querySelector(".grip");
  grip.onkeydown = (event) => {
    const step = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const other = step < 0 ? card.previousElementSibling : card.nextElementSibling;
    if (!other) return;
    if (step < 0) other.before(card); else other.after(card);
    grip.focus();
    moved();
    say(`Answer moved to place ${cards().indexOf(card) + 1}`);
  };
  grip.onpointerdown = (event) => {
    grip.setPointerCapture(event.pointerId);
    card.classList.add("moving");
  };
  grip.onpointermove = (event) => {
    if (!grip.hasPointerCapture(event.pointerId)) return;
    const over = document.elementFromPoint(event.clientX, event.clientY)?.closest(".answer");
    if (!over || over === card) return;
    const all = cards();
    if (all.indexOf(over) < all.indexOf(card)) over.before(card); else over.after(card);
    grip.setPointerCapture(event.pointerId);
  };
  grip.onlostpointercapture = () => { card.classList.remove("moving"); moved(); };
}

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  const value = await response.json();
  if (response.status === 401) {
    $("token-box").hidden = false;
    $("token").focus();
  }
  if (!response.ok) throw new Error(value.error ? value.error.message : `status ${response.status}`);
  return value;
}

async function score() {
  const now = state();
  if (!now.answers.length) { say("Add an answer first.", true); return; }
  clearScores();
  const mine = ++asked;
  $("score").disabled = true;
  say("Scoring …");
  try {
    const body = { items: [{ prompt: now.messages, responses: now.answers }], truncate: true, return_tokens: true };
    const found = await ask("v1/rewards", body);
    if (mine !== asked) return;
    showRewards(found);
  } catch (error) {
    if (mine === asked) say(error.message, true);
  }
  if (mine === asked) $("score").disabled = false;
}

let temperature = 1;

function showRewards(found) {
  const rewards = found.rewards[0], known = rewards.filter((r) => r !== null);
  const most = Math.max(...known), least = Math.min(...known);
  scored = new Map();
  cards().forEach((card, n) => {
    const reward = rewards[n], read = found.read[0][n];
    scored.set(card, reward);
    card.querySelector(".reward").textContent = reward === null ? "no reward" : reward.toFixed(3).replace("-", "−");
    const facts = reward === null ? [found.errors[0][n]] : [`${found.tokens[0][n]} tokens`];
    if (reward !== null && found.truncated[0]) facts.push("the beginning of the conversation was cut");
    card.querySelector(".facts").textContent = facts.join(" · ");
    card.classList.toggle("best", known.length > 1 && reward === most);
    const share = most > least ? (reward - least) / (most - least) : 1;
    card.querySelector(".gauge span").style.width = reward === null ? "0" : `${6 + 94 * share}%`;
    if (read) showTokens(card, read);
  });
  matrix();
  say(known.length > 1 ? `Best: answer ${rewards.indexOf(most) + 1}` : "Scored");
}

function showTokens(card, read) {
  const place = card.querySelector(".tokens");
  place.replaceChildren(...read.tokens.map((text, n) => {
    const span = document.createElement("span");
    span.textContent = text.replaceAll("\n", "↵") || "∅";
    span.title = `${n}: id ${read.ids[n]}`;
    if (n === read.reward_at) {
      span.className = "here";
      span.title += ", the reward is read here";
    }
    return span;
  }));
  const note = card.querySelector("summary");
  note.textContent = `Tokens that were read (the reward is taken at token ${read.reward_at + 1})`;
  card.querySelector(".read").hidden = false;
}

function matrix() {
  const list = cards().map((card) => scored.get(card));
  const table = $("matrix");
  table.replaceChildren();
  const cell = (row, tag, text) => {
    const made = document.createElement(tag);
    made.textContent = text;
    row.append(made);
    return made;
  };
  const head = table.createTHead().insertRow();
  cell(head, "td", "").style.background = "none";
  list.forEach((_, n) => { const made = cell(head, "th", String(n + 1)); made.scope = "col"; made.setAttribute("aria-label", `Answer ${n + 1}`); });
  const body = table.createTBody();
  list.forEach((one, n) => {
    const row = body.insertRow();
    cell(row, "th", `Answer ${n + 1}`).scope = "row";
    list.forEach((other, m) => {
      if (n === m || one === null || other === null) { cell(row, "td", "–"); return; }
      const probability = 1 / (1 + Math.exp((other - one) / temperature));
      const made = cell(row, "td", `${(100 * probability).toFixed(1)} %`);
      made.style.background = `rgba(var(--win), ${(0.05 + 0.4 * probability).toFixed(2)})`;
    });
  });
  $("result").hidden = list.length < 2;
}

async function introduce() {
  try {
    const model = (await ask("v1/models")).data[0];
    temperature = model.temperature;
    $("model").textContent = `${model.id} · up to ${model.max_model_len} tokens · ${model.dtype}`;
  } catch (error) {
    $("model").textContent = error.message;
  }
}

function conversation(start, end = []) {
  const list = (value, role) => (typeof value === "string" ? [{ role, content: value }] : value);
  const text = (content) => (Array.isArray(content) ? content.map((part) => part.text).join("") : content);
  const all = [list(start, "user"), list(end, "assistant")];
  const messages = (all[1]?.length > 1 ? all[1] : all.flat()).map((m) => ({ role: m.role, content: text(m.content) }));
  if (!Array.isArray(all[0]) || !messages.every((m) => typeof m.role === "string" && typeof m.content === "string")) {
    throw new Error("expected messages with role and content, or a prompt with chosen and rejected, or responses");
  }
  return messages;
}

function paste() {
  try {
    const value = JSON.parse($("paste-text").value);
    const row = Array.isArray(value) ? { messages: value } : value;
    const sides = row.responses ?? (row.chosen === undefined ? null : [row.chosen, row.rejected]);
    const [messages, ...more] = sides ? sides.map((side) => conversation(row.prompt ?? [], side)) : [conversation(row.messages)];
    const ends = messages.length && messages.at(-1).role === "assistant";
    const found = ends ? [messages, ...more].map((side) => side.at(-1).content) : [];
    const others = sides ? [] : cards().map(textOf).filter((text) => text || !ends);
    show({ messages: ends ? messages.slice(0, -1) : messages, answers: [...found, ...others] });
    $("paste-box").hidden = true;
    $("paste").setAttribute("aria-expanded", "false");
  } catch (error) {
    say(`This is no conversation: ${error.message}`, true);
  }
}

$("add-turn").onclick = () => { const turn = addTurn(turns.children.length % 2 ? "assistant" : "user"); changed(); turn.querySelector("textarea").focus(); };
$("add-answer").onclick = () => { const card = addAnswer(); changed(); card.querySelector("textarea").focus(); };
$("paste").onclick = () => {
  const box = $("paste-box");
  box.hidden = !box.hidden;
  $("paste").setAttribute("aria-expanded", String(!box.hidden));
  if (!box.hidden) $("paste-text").focus();
};
$("paste-use").onclick = paste;
$("score").onclick = score;
$("sort").onclick = () => {
  if (!scored) { say("Score first.", true); return; }
  const value = (card) => scored.get(card) ?? -Infinity;
  answers.append(...cards().sort((a, b) => value(b) - value(a)));
  moved();
};
$("link").onclick = async () => {
  if (!remember()) { say("This is too long for a link.", true); return; }
  try {
    await navigator.clipboard.writeText(location.href);
    say("Link copied");
  } catch {
    say("The link is in the address bar");
  }
};
$("token-box").onsubmit = (event) => {
  event.preventDefault();
  token = $("token").value;
  $("token-box").hidden = true;
  say("");
  introduce();
};
document.addEventListener("input", (event) => {
  if (event.target.closest("#turns, #answers")) {
    if (event.target.tagName === "TEXTAREA") grow(event.target);
    changed();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); score(); }
});
function restore() {
  try {
    show(fromLink(location.hash.slice(1)));
  } catch {
    show({
      messages: [{ role: "user", content: "What is the capital of France?" }],
      answers: ["Paris.", "I would rather not say."],
    });
  }
}
addEventListener("hashchange", restore);
restore();
introduce();

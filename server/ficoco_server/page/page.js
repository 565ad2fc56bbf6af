// SPDX-License-Identifier: Apache-2.0
// The page: one question is asked with several settings, and what comes back stands side by side.

import { asCurl, asPython, chat } from "./again.js";
import { Kept, behind } from "./kept.js";
import { base, call, events, json, keep, key, metrics } from "./server.js";

const LOOK_AGAIN = 3000; // ms between two looks at /metrics, which the front end answers by itself
const EXAMPLES = ["night.png", "star.png", "crosses.png"];
const SHARES = [1, 3, 9]; // of a picture's tokens, in the first settings
const MOST_CARDS = 8;
const TRIES = 5; // for a preview, where the server has other things to do
const PLACES = {
  input: "Before the tower",
  tower: "In the tower",
  output: "After the tower",
  decoder: "Inside the decoder",
};

const $ = (selector, within = document) => within.querySelector(selector);
const make = (tag, properties) => Object.assign(document.createElement(tag), properties);

let about = null; // GET /v1/reduction
let picture = null; // {name, type, url, bitmap, at}: url is a data URL, at where an example is from
let asking = null; // AbortController of what is under way
let made = 0; // ids so far
const cards = [];

// --- The server ---

async function meet() {
  const words = $("#about");
  words.className = "";
  try {
    about = await json("v1/reduction");
    const models = (await json("v1/models")).data.map((model) => model.id);
    $("#model").replaceChildren(...models.map((id) => new Option(id)));
    $("#model-choice").hidden = models.length < 2;
    const { supported, reason, layout, visual_tokens: tokens } = about.model;
    words.textContent = supported
      ? `${models[0]}: a picture has ${layout === "fixed" ? "" : "up to "}${tokens} visual tokens (N). Where nothing is said, ${unsaid()}.`
      : `${models[0]}: ${reason}.`;
    if (!cards.length) firstBudgets().forEach(addCard);
    cards.forEach((card) => card.offer());
  } catch (error) {
    about = null;
    words.className = "wrong";
    words.textContent = error.status === 401
      ? "This server wants an API key: there is a field for it below the question."
      : `The server does not say what it can do: ${error.message}`;
    if (error.status === 401) $("#key-choice").open = true;
  }
  $("#go").disabled = !about || asking !== null;
}

function unsaid() {
  const { method, budget } = about.defaults;
  if (budget === null) return "all of them stay";
  return budget === "auto" ? `it keeps what it asks for, by ${method}` : `it keeps ${budget}, by ${method}`;
}

function firstBudgets() {
  const { min_budget: least, max_budget: most } = about.policy;
  if (!most) return SHARES.map((part) => (part === 1 ? "N" : `N/${part}`));
  return [...new Set(SHARES.map((part) => String(Math.max(least, Math.floor(most / part)))))];
}

async function look() {
  try {
    const of = await metrics();
    const sum = (...which) => of(...which).reduce((all, value) => all + value, 0);
    const [had, kept] = ["input", "kept"].map((stage) => sum("vllm_ficoco_visual_tokens_total", `stage="${stage}"`));
    $("#running").textContent = sum("vllm:num_requests_running");
    $("#waiting").textContent = sum("vllm:num_requests_waiting");
    $("#cache").textContent = percent(Math.max(0, ...of("vllm:kv_cache_usage_perc")));
    $("#saved").textContent = `${whole(had - kept)} of ${whole(had)}`;
    $("#bytes").textContent = bytes(sum("vllm_ficoco_kv_cache_bytes_saved_total"));
    $("#pressed").hidden = !about?.pressure;
    $("#pressure").textContent = sum("vllm_ficoco_pressure") ? "on" : "off";
  } catch {
    for (const id of ["running", "waiting", "cache"]) $(`#${id}`).textContent = "?";
  }
}

async function keepLooking() {
  if (document.visibilityState === "visible") await look();
  setTimeout(keepLooking, LOOK_AGAIN);
}

// --- The picture ---

async function choose(blob, name, at) {
  asking?.abort();
  const words = $("#chosen");
  try {
    const url = await new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => failed(reader.error);
      reader.readAsDataURL(blob);
    });
    picture = { name, type: blob.type, url, at, bitmap: await createImageBitmap(blob) };
  } catch {
    words.className = "wrong";
    words.textContent = `${name}: this browser sees no picture in it.`;
    return;
  }
  words.className = "";
  words.textContent = `${name}, ${picture.bitmap.width} × ${picture.bitmap.height}`;
  cards.forEach((card) => card.forget());
}

async function chooseExample(name, questions) {
  const at = `${base}page/${name}`;
  await choose(await (await fetch(at)).blob(), name, at);
  $("#suggestions").replaceChildren(...questions.map((question) => new Option(question)));
  [$("#question").value] = questions;
}

async function showExamples() {
  const questions = await json("page/questions.json");
  $("#examples").replaceChildren(...EXAMPLES.map((name) => {
    const button = make("button", { type: "button" });
    button.append(make("img", { src: `${base}page/${name}`, alt: `Example ${name}` }));
    button.onclick = () => chooseExample(name, Object.keys(questions[name]));
    return button;
  }));
  await chooseExample(EXAMPLES[0], Object.keys(questions[EXAMPLES[0]]));
}

// --- A setting, and what came of it ---

class Card {
  constructor(budget) {
    this.element = $("#card").content.cloneNode(true).firstElementChild;
    this.method = this.find("[name=method]");
    this.budget = this.find("[name=budget]");
    this.budget.value = budget;
    for (const field of [this.method, this.budget]) {
      field.id = `${field.name}-${made += 1}`;
      field.previousElementSibling.htmlFor = field.id;
    }
    this.method.onchange = () => this.explain();
    this.find("[name=remove]").onclick = () => this.remove();
    for (const language of ["curl", "python"]) {
      this.find(`[name=copy-${language}]`).onclick = ({ target }) => copy(this.find(`.${language}`), target);
    }
    $("#cards").append(this.element);
    this.forget();
  }

  find(selector) { return $(selector, this.element); }

  remove() {
    cards.splice(cards.indexOf(this), 1);
    this.element.remove();
    $("#add").disabled = false;
    $("#add").focus();
  }

  /** Offer the methods that the server can do. */
  offer() {
    const chosen = this.method.value || about.defaults.method;
    const groups = new Map();
    for (const { name, places } of about.methods) {
      if (!about.policy.methods.includes(name)) continue;
      const label = PLACES[places[0]] ?? "Nowhere";
      if (!groups.has(label)) groups.set(label, make("optgroup", { label }));
      groups.get(label).append(new Option(name));
    }
    this.method.replaceChildren(...groups.values());
    this.method.value = chosen;
    if (!this.method.value) this.method.selectedIndex = 0;
    this.explain();
  }

  explain() {
    this.find(".idea").textContent = about.methods.find(({ name }) => name === this.method.value)?.idea ?? "";
  }

  get isOfN() { return /n/i.test(this.budget.value); }

  /** What goes into the request, for a picture with so many tokens. */
  settings(n) {
    const method = this.method.value, said = this.budget.value.trim();
    if (!said && method === about.defaults.method) return {};
    if (!said || method === "none") return { reduction: { method } };
    const share = /^(\d*)\s*n\s*(?:\/\s*(\d+))?$/i.exec(said);
    if (share) return { reduction: { method, budget: Math.floor((n * (share[1] || 1)) / (share[2] || 1)) } };
    return { reduction: { method, budget: /^\d+$/.test(said) ? Number(said) : said } };
  }

  forget() {
    this.say("");
    for (const figure of this.element.querySelectorAll("[data-figure]")) figure.textContent = "–";
    this.find(".again").hidden = true;
    this.show(null);
  }

  say(text, wrong = false) {
    const answer = this.find(".answer");
    answer.classList.toggle("wrong", wrong);
    answer.textContent = text;
  }

  figure(name, text) { this.find(`[data-figure=${name}]`).textContent = text; }

  /** Ask, and show the answer as it comes. Whether there was one. */
  async ask(asked, signal) {
    this.find(".curl").textContent = asCurl(asked, picture);
    this.find(".python").textContent = asPython(asked, picture);
    this.find(".again").hidden = false;
    this.find(".answer").setAttribute("aria-busy", "true"); // a screen reader waits for the end
    const body = { ...chat(asked, picture.url), stream: true, stream_options: { include_usage: true } };
    const start = performance.now();
    const since = () => seconds(performance.now() - start);
    let text = "", report = null, usage = null;
    try {
      for await (const event of events(await call("v1/chat/completions", body, signal))) {
        const more = event.choices[0]?.delta.content ?? "";
        if (more && !text) this.figure("first", since());
        text += more;
        if (more) this.say(text.trimStart());
        report = event.reduction ?? report;
        usage = event.usage ?? usage;
      }
    } catch (error) {
      this.say(error.name === "AbortError" ? `${text} (stopped)` : error.message, true);
      return false;
    } finally {
      this.find(".answer").removeAttribute("aria-busy");
    }
    this.figure("total", since());
    if (!text.trim()) this.say("(an empty answer)");
    if (report) this.report(report, usage);
    return true;
  }

  report(report, usage) {
    const { visual_tokens_before: before, visual_tokens_kept: kept, kv_cache_bytes_saved: saved } = report;
    const stages = report.images[0].visual_tokens_by_stage;
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    this.figure("kept", `${kept} of ${before}${stages ? ` (by stage ${stages.join(" / ")})` : ""}`);
    this.figure("held", `${bytes(report.kv_cache_bytes_held)}${saved ? `, ${bytes(saved)} saved` : ""}`);
    this.figure("flops", percent(report.estimated_prefill_flops_ratio)
      + (cached ? `; ${cached} of ${usage.prompt_tokens} tokens came from the cache` : ""));
  }

  /** Show what is kept of the picture, or why that cannot be shown. */
  async preview({ model, question, settings }, signal) {
    const caption = this.find("figcaption");
    caption.textContent = "Asking what is kept …";
    try {
      this.show(await preview({ model, question, image: picture.url, ...settings }, signal));
    } catch (error) {
      caption.textContent = error.name === "AbortError" ? "" : error.message;
    }
  }

  show(preview) {
    const stages = this.find(".stages"), caption = this.find("figcaption");
    stages.replaceChildren();
    stages.hidden = !preview?.stages.some(({ left }) => left.length);
    caption.textContent = "";
    if (!picture) return;
    this.kept = new Kept(picture.bitmap, preview, this.find(".views"), caption);
    if (!stages.hidden) stages.append(...this.slider(preview.stages));
  }

  /** From all places to what is left in the end. */
  slider(stages) {
    const id = `stage-${made += 1}`, last = stages.length;
    const input = make("input", { id, type: "range", min: 0, max: last, value: last });
    input.oninput = () => {
      const stage = Number(input.value);
      input.setAttribute("aria-valuetext", stage ? behind(stages[stage - 1]) : "before any leave");
      this.kept.at(stage);
    };
    return [make("label", { htmlFor: id, textContent: "Stage by stage" }), input];
  }
}

function addCard(budget) {
  const card = new Card(budget);
  cards.push(card);
  if (about) card.offer();
  $("#add").disabled = cards.length >= MOST_CARDS;
  return card;
}

async function copy(code, button) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(code.textContent);
  } else { // over plain HTTP from another machine there is no such thing
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// --- Asking ---

/** What is kept of a picture. The server has time for it where it has nothing else to do. */
async function preview(body, signal) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await json("v1/reduction/preview", body, signal);
    } catch (error) {
      if (![429, 503].includes(error.status) || tries === TRIES) throw error;
      await new Promise((done) => setTimeout(done, 1000 * error.after));
    }
  }
}

/** N of the picture: of the model or, where that depends on its size, of the server. */
async function tokens(signal) {
  if (about.model.layout === "fixed") return about.model.visual_tokens;
  picture.tokens ??= (await preview({ image: picture.url }, signal)).reduction.visual_tokens_before;
  return picture.tokens;
}

async function ask() {
  asking = new AbortController();
  const { signal } = asking;
  $("#go").disabled = true;
  $("#stop").hidden = false;
  cards.forEach((card) => card.forget());
  const common = {
    model: $("#model").value,
    question: $("#question").value,
    longest: Number($("#longest").value),
  };
  try {
    const n = cards.some((card) => card.isOfN) ? await tokens(signal) : 0;
    const asked = cards.map((card) => [card, { ...common, settings: card.settings(n) }]);
    const answered = [];
    const one = async ([card, request]) => {
      if (!signal.aborted && await card.ask(request, signal)) answered.push([card, request]);
      look();
    };
    if ($("#at-once").checked) await Promise.all(asked.map(one));
    else for (const each of asked) await one(each);
    // Only now, so that no answer waits for it.
    for (const [card, request] of answered) await card.preview(request, signal);
  } catch (error) {
    if (error.name !== "AbortError") cards.forEach((card) => card.say(error.message, true));
  } finally {
    asking = null;
    $("#go").disabled = !about;
    $("#stop").hidden = true;
  }
}

// --- Numbers ---

const whole = (number) => Math.round(number).toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit += 1) count /= 1024;
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

// --- What one can do ---

$("#ask").onsubmit = (event) => {
  event.preventDefault();
  if (picture && !asking) ask();
};
$("#stop").onclick = () => asking?.abort();
$("#add").onclick = () => addCard("N/3").method.focus();
$("#file").onchange = ({ target: { files: [file] } }) => file && choose(file, file.name);
$("#key").value = key();
$("#key").onchange = ({ target }) => {
  keep(target.value.trim());
  meet();
};

const pictureIn = (data) => [...(data?.files ?? [])].find((file) => file.type.startsWith("image/"));
document.ondragover = (event) => {
  event.preventDefault();
  $("#drop").classList.add("over");
};
document.ondragleave = () => $("#drop").classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  $("#drop").classList.remove("over");
  const file = pictureIn(event.dataTransfer);
  if (file) choose(file, file.name);
};
document.onpaste = ({ clipboardData }) => {
  const file = pictureIn(clipboardData);
  if (file) choose(file, file.name);
};
matchMedia("(prefers-color-scheme: dark)").onchange = () => cards.forEach((card) => card.kept?.follow(null));

await Promise.all([meet(), showExamples()]);
keepLooking();

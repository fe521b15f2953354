// Sends pictures one after another and shows what comes back.
"use strict";

const ATTEMPTS = 8; // of a picture that the server has no room for
const VERDICTS = { real: "Looks natural", uncertain: "Uncertain", fake: "Looks generated" };
const CALLED = { real: "natural", uncertain: "uncertain", fake: "generated" };

const element = (id) => document.getElementById(id);
const waiting = [];
const thumbnails = []; // bitmaps of the pictures that are shown
let model = null;
let token = "";
let sending = false;

function headers() {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

function pause(seconds) {
  return new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

function signed(number) {
  return (number < 0 ? "−" : "+") + Math.abs(number).toFixed(3);
}

function showTokenRow(shown) {
  element("token-row").hidden = !shown;
  if (shown) element("token").focus();
}

/** An answer as {status, body}; status 0 where no server answered. */
async function ask(path, options = {}) {
  try {
    const response = await fetch(path, { ...options, headers: headers() });
    const body = await response.json().catch(() => null);
    return { status: response.status, body, again: Number(response.headers.get("Retry-After") || 1) };
  } catch {
    return { status: 0, body: null, again: 1 };
  }
}

async function findModel() {
  for (;;) {
    const { status, body } = await ask("/v1/model");
    if (status === 200) {
      model = body;
      element("model").textContent = `Model ${body.name}, ${body.precision} on ${body.backend}`;
      showTokenRow(false);
      sendWaiting();
      return;
    }
    if (status === 401) {
      element("model").textContent = token ? "That is not the token of this server." : "Enter the token to begin.";
      showTokenRow(true);
      return;
    }
    element("model").textContent = status === 0 ? "The server does not answer …" : "The model is being opened …";
    await pause(1);
  }
}

function addFiles(files) {
  const cards = [...files].map((file) => {
    const card = element("card").content.firstElementChild.cloneNode(true);
    card.querySelector(".name").textContent = file.name || "Pasted picture";
    waiting.push({ file, card, stability: element("stability").checked });
    return card;
  });
  element("results").prepend(...cards); // the newest choice on top, in its own order
  element("clear").hidden = element("results").childElementCount === 0;
  sendWaiting();
}

async function sendWaiting() {
  if (sending || model === null) return;
  sending = true;
  try {
    while (waiting.length && model !== null) if (await isDone(waiting[0])) waiting.shift();
  } finally {
    sending = false;
  }
}

/** Whether the picture is done with, for better or worse: an answer that is not understood costs that picture alone. */
async function isDone(picture) {
  try {
    return await sendOne(picture);
  } catch (error) {
    console.error(error);
    fail(picture.card, "The answer of the server is not understood. Is there something between this page and it?");
    return true;
  }
}

/** Whether the picture is done with: not where a token is missing. */
async function sendOne({ file, card, stability }) {
  const state = card.querySelector(".state");
  for (let attempt = 1; ; attempt++) {
    state.textContent = "Looking at it …";
    const form = new FormData();
    form.append("file", file, file.name || "picture");
    form.append("evidence", "true");
    form.append("stability", String(stability));
    const { status, body, again } = await ask("/v1/infer", { method: "POST", body: form });
    if (status === 401) {
      model = null;
      findModel();
      return false;
    }
    if (status === 200) {
      await showResult(card, file, body.data[0]);
      return true;
    }
    if ((status !== 429 && status !== 503) || attempt === ATTEMPTS) {
      showFailure(card, status, body);
      return true;
    }
    state.textContent = `The server is busy; trying again in ${again} s …`;
    await pause(again);
  }
}

function announce(text) {
  element("announcement").textContent = text;
}

const REASONS = {
  unknown_format: () => "This is no picture of a kind that is known here. JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF are.",
  too_many_pixels: () => `This picture has too many pixels. At most ${model.limits.pixels / 1e6} million are looked at.`,
  unreadable_picture: () => "This file is damaged or incomplete.",
  request_too_large: () => `This file is too large. At most ${Math.floor(model.limits.request_bytes / 1e6)} MB are taken.`,
  too_busy: () => "The server is busy. Try again in a while.",
  too_many_requests: () => "The server is busy. Try again in a while.",
  not_ready: () => "The server is starting or stopping. Try again in a while.",
  deadline_exceeded: () => "The server did not get to it in time. Try again in a while.",
  out_of_memory: () => "The server has no memory left for this picture. Try again in a while.",
  score_not_finite: () => "The model gives no number for this picture. Whoever runs the server should hear of it.",
};

function showFailure(card, status, body) {
  const error = body && body.error;
  const reason = error && REASONS[error.code];
  let text = "The server does not answer. Is it still running?";
  if (status !== 0) text = reason ? reason() : error ? error.message : `The server answered with status ${status}.`;
  fail(card, text);
}

function fail(card, text) {
  card.classList.add("failed");
  card.querySelector(".found").hidden = true;
  card.querySelector(".state").hidden = false;
  card.querySelector(".state").textContent = text;
  announce(`${card.querySelector(".name").textContent}: ${text}`);
}

async function showResult(card, file, result) {
  const find = (name) => card.querySelector(name);
  card.classList.add(result.verdict);
  find(".verdict").textContent = VERDICTS[result.verdict];
  find(".probability").textContent = percent(result.fake_probability);
  find(".fill").style.width = `${100 * result.fake_probability}%`;
  find(".lower").style.left = `${100 * model.real_below}%`;
  find(".upper").style.left = `${100 * model.fake_above}%`;
  if (result.trace_similarity === null) {
    for (const part of card.querySelectorAll(".traces")) part.hidden = true;
  } else {
    find(".similarity").textContent = signed(result.trace_similarity);
    find(".mark").style.left = `${50 * (1 + result.trace_similarity)}%`;
  }
  find(".thresholds").textContent =
    `This model calls a picture natural up to ${percent(model.real_below)} and generated above ${percent(model.fake_above)}.`;
  if (result.stability) showStability(find(".stability"), result.stability);
  find(".state").hidden = true;
  find(".found").hidden = false;
  await showViews(card, file, result.evidence);
  announce(`${find(".name").textContent}: ${VERDICTS[result.verdict]}, fake probability ${percent(result.fake_probability)}`);
}

function showStability(box, stability) {
  const line = document.createElement("p");
  const spread = `fake probabilities lie within ${(100 * stability.spread).toFixed(1)} points`;
  line.textContent = stability.flips
    ? `Not stable: the picture as it is would be called ${CALLED[stability.verdict]}, a changed copy is not; ${spread}.`
    : `Stable: re-encoded and rescaled copies get the same verdict; ${spread}.`;
  const table = document.createElement("table");
  for (const [name, probability] of Object.entries(stability.fake_probabilities)) {
    const row = table.insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    row.insertCell().textContent = percent(probability);
    const bar = element("bar").content.firstElementChild.cloneNode(true);
    bar.querySelector(".fill").style.width = `${100 * probability}%`;
    row.insertCell().append(bar);
  }
  box.replaceChildren(line, table);
  box.hidden = false;
}

async function showViews(card, file, evidence) {
  const find = (name) => card.querySelector(name);
  const shown = await thumbnailsOf(file);
  if (shown === null) {
    find(".views").hidden = true;
    find(".no-view").hidden = false;
    return;
  }
  thumbnails.push(shown.whole, shown.part);
  const style = getComputedStyle(document.documentElement);
  const colours = {
    real: style.getPropertyValue("--real-map"),
    fake: style.getPropertyValue("--fake-map"),
    frame: style.getPropertyValue("--accent"),
  };
  const { crop } = shown;
  const map = find(".map");
  const draw = () => {
    const cells = map.checked ? evidence : null;
    drawWhole(find(".whole"), shown, cells, colours);
    drawCrop(find(".crop"), shown, cells, colours);
  };
  find(".whole").setAttribute("role", "img");
  find(".whole").setAttribute("aria-label", `${find(".name").textContent}, ${shown.width} by ${shown.height} pixels`);
  find(".crop").setAttribute("role", "img");
  find(".crop").setAttribute("aria-label", describeEvidence(evidence));
  find(".mirrored").hidden = crop.left >= 0 && crop.top >= 0;
  map.addEventListener("change", draw);
  draw();
}

/** What is kept of a picture to show it, or null where the browser cannot. */
async function thumbnailsOf(file) {
  let picture = null;
  try {
    picture = await createImageBitmap(file, { imageOrientation: "from-image" });
    const { width, height } = picture;
    const crop = cropOf(width, height, { width: model.input_width, height: model.input_height });
    const size = shownSize(width, height);
    const [whole, part] = await Promise.all([
      createImageBitmap(picture, {
        resizeWidth: size.width, resizeHeight: size.height, resizeQuality: size.scale < 1 ? "high" : "pixelated",
      }),
      createImageBitmap(picture, Math.max(0, crop.left), Math.max(0, crop.top),
        Math.min(width, crop.width), Math.min(height, crop.height)),
    ]);
    return { width, height, crop, scale: size.scale, whole, part };
  } catch {
    return null;
  } finally {
    picture?.close(); // 12 megapixels are 48 MB
  }
}

function listen() {
  const drop = element("drop");
  element("files").addEventListener("change", (event) => {
    addFiles(event.target.files);
    event.target.value = ""; // the same file may be chosen again
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) addFiles(event.clipboardData.files);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, () => drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });
  element("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    token = element("token").value.trim();
    findModel();
  });
  element("clear").addEventListener("click", () => {
    waiting.length = sending ? Math.min(waiting.length, 1) : 0;
    element("results").replaceChildren();
    for (const bitmap of thumbnails.splice(0)) bitmap.close();
    element("clear").hidden = true;
    element("files").focus();
  });
}

listen();
findModel();

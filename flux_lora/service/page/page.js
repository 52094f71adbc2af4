// Asks this server to draw, shows what becomes of it, and keeps the pictures in this browser.

const $ = (id) => document.getElementById(id);
const form = $("form");
const KEY = "flux-lora key";
const FORM = "flux-lora form";
const RUNNING = "flux-lora running";
const KEPT = 100; // draws in the history
const RETRIES = 5; // of a connection that broke while something is drawn

let inputs = {}; // the documented inputs: their bounds, choices and defaults
let running = null; // what is being drawn: {id, inputs, cancelled}
let source = null; // the picture to start from: {image, bitmap, mask}

/** A message for whoever looks at the page. */
class Problem extends Error {}

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
const extended = () => "image" in inputs;

// ---------------------------------------------------------------------------------------------- asking the server

async function ask(path, options = {}) {
  for (;;) {
    const key = localStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch {
      throw new Problem("The server cannot be reached. Is it still running?");
    }
    $("change-key").hidden = !key;
    if (answer.status === 401) {
      if (!(await askForKey(key))) throw new Problem("This server draws for those who have a key.");
    } else if (answer.ok) {
      return answer;
    } else {
      throw new Problem(await reason(answer));
    }
  }
}

/** Why the server refused, in words. */
async function reason(answer) {
  const { detail } = await answer.json().catch(() => ({}));
  const said = Array.isArray(detail) ? detail.map((problem) => problem.msg).join("; ") : detail;
  const seconds = answer.headers.get("Retry-After");
  if (seconds) {
    const whose = String(said).startsWith("You") ? "As many of your requests wait as may" : "Many are waiting already";
    return `${whose}. Try again in ${seconds} ${seconds === "1" ? "second" : "seconds"}.`;
  }
  if (answer.status === 413) return "That is too much to send. Take a smaller picture.";
  return said || `The server made a mistake (${answer.status}). Its log says more.`;
}

let asking = null;

function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-hint").textContent = wrong
      ? "It does not know the key that was given. Try another."
      : "Whoever runs it gives out keys. Yours stays in this browser.";
    $("key").value = "";
    dialog.returnValue = "no";
    dialog.onclose = () => {
      asking = null;
      const key = $("key").value.trim();
      const given = dialog.returnValue === "use" && key !== "";
      if (given) localStorage.setItem(KEY, key);
      resolve(given);
    };
    dialog.showModal();
  });
  return asking;
}

/** The events of a stream, as [name, data]. */
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const block = text.slice(0, end);
      text = text.slice(end + 2);
      const data = /^data: (.*)$/m.exec(block);
      if (data) yield [/^event: (.*)$/m.exec(block)[1], JSON.parse(data[1])];
    }
  }
}

/** The events of a prediction to its end, over several connections if one breaks; the first come again then. */
async function* follow(id) {
  for (let tries = 0; ; tries++) {
    const answer = await ask(`predictions/${id}/events`);
    try {
      for await (const event of eventsOf(answer)) {
        yield event;
        if (event[0] === "end") return;
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // what a broken connection raises
    }
    if (tries === RETRIES) throw new Problem("The connection to the server broke, again and again.");
    await pause(1);
  }
}

async function look() {
  let said = "not reachable";
  try {
    const state = await (await fetch("health")).json();
    said = state.status === "ready" ? "ready" : "starting";
    if (state.waiting) said = `${state.waiting} waiting`;
    else if (state.running && !running) said = "drawing for others";
  } catch { /* it says so */ }
  if ($("health").textContent !== said) $("health").textContent = said;
}

// ------------------------------------------------------------------------------------------------------- the form

function radios(box, name, choices, chosen, picture) {
  box.replaceChildren(...choices.map((choice) => {
    const input = make("input", { type: "radio", name, value: choice, checked: String(choice) === String(chosen) });
    return make("label", {}, input, ...(picture ? [picture(choice)] : []), make("span", { textContent: choice }));
  }));
}

function ratioPicture(ratio) {
  const [width, height] = ratio === "custom" ? [1, 1] : ratio.split(":").map(Number);
  const scale = 24 / Math.max(width, height);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const shape = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const set = { x: 15 - (width * scale) / 2, y: 15 - (height * scale) / 2, width: width * scale, height: height * scale, rx: 2 };
  for (const [name, value] of Object.entries(set)) shape.setAttribute(name, value);
  if (ratio === "custom") shape.setAttribute("stroke-dasharray", "3 2.4");
  svg.setAttribute("viewBox", "0 0 30 30");
  svg.setAttribute("aria-hidden", "true");
  svg.append(shape);
  return svg;
}

function chosen(name) {
  return form.elements[name].value;
}

function bound(name) {
  const { minimum, maximum, default: usual } = inputs[name];
  Object.assign($(name), { min: minimum, max: maximum });
  $(name).value = usual;
}

async function build() {
  const document_ = await (await ask("openapi.json")).json();
  inputs = document_.components.schemas.Input.properties;
  const wide = (ratio) => (ratio === "custom" ? -1 : ratio.split(":").reduce((width, height) => width / height));
  const ratios = [...inputs.aspect_ratio.enum].sort((one, other) => wide(other) - wide(one));
  radios($("ratios"), "aspect_ratio", ratios, inputs.aspect_ratio.default, ratioPicture);
  radios($("models"), "model", inputs.model.enum, inputs.model.default);
  radios($("formats"), "output_format", inputs.output_format.enum, inputs.output_format.default);
  const numbers = Array.from({ length: inputs.num_outputs.maximum }, (_, k) => k + 1);
  radios($("numbers"), "num_outputs", numbers, inputs.num_outputs.default);
  for (const name of ["num_inference_steps", "lora_scale", "guidance_scale", "output_quality"]) bound(name);
  $("source").hidden = !extended();
  const remembered = JSON.parse(localStorage.getItem(FORM) ?? "null");
  if (remembered) fill(remembered);
  settle();
}

async function listModels() {
  const { data } = await (await ask("v1/models")).json();
  const served = data.map((model) => model.id);
  const bases = inputs.model.enum.filter((model) => served.includes(model));
  if (bases.length) radios($("models"), "model", bases, bases.includes(chosen("model")) ? chosen("model") : bases[0]);
  $("loras").replaceChildren(...data.filter((model) => model.owned_by === "operator").map((model) => make("option", { value: model.id, "data-source": model.source })));
  settle();
}

/** What belongs to choices is shown, and the values beside sliders. */
function settle() {
  const schnell = chosen("model") === "schnell";
  $("custom").hidden = chosen("aspect_ratio") !== "custom";
  $("guidance-field").hidden = schnell;
  $("quality-field").hidden = chosen("output_format") === "png";
  $("ratio-field").disabled = Boolean(source);
  $("ratio-field").hidden = Boolean(source);
  for (const output of form.querySelectorAll("output")) output.textContent = Number($(output.htmlFor[0]).value);
  if (source) $("prompt_strength").nextElementSibling.textContent = `${Math.round(100 * $("prompt_strength").value)} %`;
}

/** schnell needs few steps; steps that were chosen by hand stay. */
function changeModel() {
  const [few, many] = ["4", String(inputs.num_inference_steps.default)];
  const steps = $("num_inference_steps");
  if (chosen("model") === "schnell" && steps.value === many) steps.value = few;
  else if (chosen("model") === "dev" && steps.value === few) steps.value = many;
}

/** What the form asks for, as inputs. */
function read() {
  const wanted = { prompt: $("prompt").value.trim() };
  if (!wanted.prompt) refuse("prompt", "Say in the prompt what to draw.");
  wanted.model = chosen("model");
  wanted.num_outputs = Number(chosen("num_outputs"));
  wanted.num_inference_steps = Number($("num_inference_steps").value);
  if (source) {
    wanted.image = source.image;
    if (source.mask) wanted.mask = source.mask;
    wanted.prompt_strength = Number($("prompt_strength").value);
  } else {
    wanted.aspect_ratio = chosen("aspect_ratio");
    if (wanted.aspect_ratio === "custom") {
      for (const name of ["width", "height"]) wanted[name] = whole(name, `The ${name} must be a number from 256 to 1440.`);
    }
  }
  if ($("seed").value !== "" || !$("seed").validity.valid) wanted.seed = whole("seed", "The seed must be a whole number of at most 16 digits, or empty.");
  const lora = $("replicate_weights").value.trim();
  const named = [...$("loras").options].find((option) => option.value === lora);
  if (lora) wanted.replicate_weights = named ? named.dataset.source : lora;
  wanted.lora_scale = Number($("lora_scale").value);
  if (wanted.model !== "schnell") wanted.guidance_scale = Number($("guidance_scale").value);
  wanted.output_format = chosen("output_format");
  if (wanted.output_format !== "png") wanted.output_quality = Number($("output_quality").value);
  return wanted;
}

function whole(name, message) {
  const field = $(name);
  const value = Number(field.value);
  const { min, max } = field;
  if (!field.value || !Number.isInteger(value) || value < Number(min) || value > Number(max)) refuse(name, message);
  return value;
}

function refuse(name, message) {
  $(name).setAttribute("aria-invalid", "true");
  $(name).focus();
  throw new Problem(message);
}

/** Put inputs into the form; what they do not have is as usual. */
function fill(wanted) {
  for (const name of ["aspect_ratio", "model", "num_outputs", "output_format"]) {
    form.elements[name].value = wanted[name] ?? inputs[name].default;
  }
  for (const name of ["num_inference_steps", "lora_scale", "guidance_scale", "output_quality"]) {
    $(name).value = wanted[name] ?? inputs[name].default;
  }
  $("prompt_strength").value = wanted.prompt_strength ?? 0.8;
  for (const name of ["width", "height"]) if (wanted[name]) $(name).value = wanted[name];
  for (const name of ["prompt", "seed", "replicate_weights"]) $(name).value = wanted[name] ?? "";
  settle();
}

function remember() {
  const values = Object.fromEntries(new FormData(form));
  localStorage.setItem(FORM, JSON.stringify(values));
}

const roll = () => crypto.getRandomValues(new Uint32Array(1))[0];

// -------------------------------------------------------------------------------------------------------- drawing

function complain(error) {
  if (!(error instanceof Problem)) {
    console.error(error);
    error = new Problem("The page made a mistake. Load it again, and say what you did.");
  }
  $("problem").hidden = false;
  $("problem").firstElementChild.textContent = error.message;
  $("problem").scrollIntoView({ block: "nearest" });
}

function reassure() {
  $("problem").hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

function tell(state, share, aloud = true) {
  $("state").textContent = state;
  if (aloud) $("said").textContent = state;
  if (share === undefined) $("bar").removeAttribute("value");
  else $("bar").value = share;
  document.title = share ? `${Math.round(100 * share)} % · flux-lora` : "flux-lora";
}

function sizeOf(wanted) {
  if (wanted.image && source) return [source.bitmap.width, source.bitmap.height];
  if (wanted.aspect_ratio === "custom") return [wanted.width, wanted.height];
  return (wanted.aspect_ratio ?? "1:1").split(":").map(Number);
}

function layOut(box, count) {
  box.classList.toggle("one", count === 1);
  box.classList.toggle("two", count === 2);
}

function begin(wanted) {
  const [width, height] = sizeOf(wanted);
  layOut($("easel"), wanted.num_outputs ?? 1);
  $("easel").replaceChildren(...Array.from({ length: wanted.num_outputs ?? 1 }, () => {
    const frame = make("div", { className: "frame" });
    frame.style.aspectRatio = `${width} / ${height}`;
    return frame;
  }));
  $("log").textContent = "";
  $("current").hidden = false;
  $("empty").hidden = true;
  $("cancel").hidden = false;
  $("cancel").disabled = false;
  $("draw").disabled = true;
  tell("Asking …");
  if (matchMedia("(max-width: 860px)").matches) $("current").scrollIntoView({ block: "start", behavior: "smooth" });
}

function end() {
  running = null;
  sessionStorage.removeItem(RUNNING);
  $("current").hidden = true;
  $("cancel").hidden = true;
  $("draw").disabled = false;
  $("empty").hidden = $("history").childElementCount > 0;
  document.title = "flux-lora";
}

async function draw(wanted) {
  if (running) return;
  reassure();
  running = { id: null, inputs: wanted, cancelled: false };
  begin(wanted);
  try {
    const headers = { "Content-Type": "application/json", Prefer: "respond-async, previews" };
    const answer = await ask("predictions", { method: "POST", headers, body: JSON.stringify({ input: wanted }) });
    running.id = (await answer.json()).id;
    try {
      sessionStorage.setItem(RUNNING, JSON.stringify({ id: running.id, inputs: wanted }));
    } catch { /* too large: it is lost if the page is loaded again */ }
    if (running.cancelled) await cancel();
    await see();
  } catch (error) {
    complain(error);
  } finally {
    end();
  }
}

/** After the page was loaded again: what was being drawn. */
async function resume() {
  const kept = JSON.parse(sessionStorage.getItem(RUNNING) ?? "null");
  if (!kept || running) return;
  running = { ...kept, cancelled: false };
  begin(running.inputs);
  try {
    await see();
  } catch { /* it is forgotten, and so is this */ } finally {
    end();
  }
}

/** Follow what is drawn to its end, and keep what comes of it. */
async function see() {
  const frames = [...$("easel").children];
  for await (const [name, data] of follow(running.id)) {
    if (name === "waiting") tell(data.position === 1 ? "Next in the queue" : `In the queue, number ${data.position}`);
    else if (name === "started") tell("Preparing …");
    else if (name === "line") $("log").textContent += `${data.text}\n`;
    else if (name === "step") step(frames, data);
    else if (name === "end") await conclude(data);
  }
}

function step(frames, { image, images, step, steps, preview }) {
  const which = images > 1 ? `Picture ${image} of ${images}, step` : "Step";
  const first = $("said").dataset.image !== String(image);
  $("said").dataset.image = image;
  tell(`${which} ${step} of ${steps}`, (image - 1 + step / steps) / images, first);
  frames.forEach((frame, k) => frame.classList.toggle("next", k === image - 1 && !frame.firstChild));
  if (preview) {
    const frame = frames[image - 1];
    if (!frame.firstChild) frame.append(make("img", { alt: `Preview of picture ${image}` }));
    frame.firstChild.src = preview;
    frame.classList.remove("next");
  }
}

async function conclude(prediction) {
  if (prediction.status === "canceled") {
    $("said").textContent = "Cancelled";
    return;
  }
  if (prediction.status !== "succeeded") throw new Problem(prediction.error ?? "It was not drawn.");
  const pictures = await Promise.all(prediction.output.map(async (address) => {
    const name = address.split("/").at(-1);
    const blob = await (await ask(`files/${prediction.id}/${name}`)).blob();
    return { name, seed: /seed(\d+)/.exec(name)[1], blob };
  }));
  const seconds = prediction.metrics.predict_time;
  const withheld = (running.inputs.num_outputs ?? 1) - pictures.length;
  const kept = { time: Date.now(), inputs: running.inputs, seconds, pictures };
  await keep(kept);
  $("history").prepend(entry(kept));
  $("clear-field").hidden = false;
  $("said").textContent = `${pictures.length} ${pictures.length === 1 ? "picture" : "pictures"} drawn`;
  if (withheld) complain(new Problem(`${withheld} of the pictures ${withheld === 1 ? "was" : "were"} withheld by the safety checker.`));
}

async function cancel() {
  if (!running) return;
  running.cancelled = true;
  $("cancel").disabled = true;
  tell("Cancelling …");
  if (running.id) await ask(`predictions/${running.id}/cancel`, { method: "POST" }).catch(complain);
}

// ---------------------------------------------------------------------------------------------------- the history

const database = new Promise((resolve, reject) => {
  const opening = indexedDB.open("flux-lora", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("draws", { keyPath: "id", autoIncrement: true });
  opening.onsuccess = () => resolve(opening.result);
  opening.onerror = () => reject(opening.error);
});

async function store(mode, act) {
  const transaction = (await database).transaction("draws", mode);
  const asked = act(transaction.objectStore("draws"));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(asked.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

async function keep(draw_) {
  try {
    draw_.id = await store("readwrite", (draws) => draws.add(draw_));
    const keys = await store("readonly", (draws) => draws.getAllKeys());
    const old = keys.slice(0, Math.max(0, keys.length - KEPT));
    if (old.length) await store("readwrite", (draws) => draws.delete(IDBKeyRange.upperBound(old.at(-1))));
  } catch { // a private window, or a full disk
    complain(new Problem("This browser keeps nothing: download what you want to have."));
  }
}

async function showHistory() {
  const draws = await store("readonly", (all) => all.getAll()).catch(() => []);
  $("history").replaceChildren(...draws.reverse().map(entry));
  $("clear-field").hidden = draws.length === 0;
  $("empty").hidden = draws.length > 0 || Boolean(running);
}

async function clearHistory() {
  await store("readwrite", (draws) => draws.clear()).catch(() => {});
  for (const image of $("history").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  await showHistory();
  $("prompt").focus();
}

function factsOf({ inputs: wanted, seconds }) {
  const steps = wanted.num_inference_steps;
  const facts = [wanted.model, `${steps} ${steps === 1 ? "step" : "steps"}`];
  if (wanted.image) facts.push(`from a picture${wanted.mask ? ", within a mask" : ""}, ${Math.round(100 * wanted.prompt_strength)} % change`);
  else if (wanted.aspect_ratio === "custom") facts.push(`${wanted.width} × ${wanted.height}`);
  else facts.push(wanted.aspect_ratio);
  if (wanted.replicate_weights) facts.push(`LoRA ${wanted.replicate_weights.slice(0, 80)}`);
  if (wanted.lora_scale !== 1) facts.push(`LoRA scale ${wanted.lora_scale}`);
  if (wanted.guidance_scale !== undefined && wanted.guidance_scale !== inputs.guidance_scale?.default) facts.push(`guidance ${wanted.guidance_scale}`);
  if (seconds) facts.push(`${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`);
  return facts.join(" · ");
}

function entry(draw_) {
  const pictures = make("div", { className: "pictures" }, ...draw_.pictures.map((picture) => figure(draw_, picture)));
  layOut(pictures, draw_.pictures.length);
  const words = make("p", { className: "words", textContent: draw_.inputs.prompt });
  const facts = make("p", { className: "facts", textContent: factsOf(draw_) });
  return make("li", {}, make("article", {}, make("div", {}, words, facts), pictures));
}

function figure(draw_, picture) {
  const address = URL.createObjectURL(picture.blob);
  const [width, height] = draw_.inputs.aspect_ratio === "custom" || !draw_.inputs.aspect_ratio ? [] : sizeOf(draw_.inputs);
  const image = make("img", { src: address, alt: draw_.inputs.prompt, loading: "lazy" });
  const frame = make("button", { type: "button", className: "frame", onclick: () => view(draw_, picture, address) }, image);
  frame.setAttribute("aria-label", `Enlarge the picture of seed ${picture.seed}`);
  if (width) frame.style.aspectRatio = `${width} / ${height}`;
  const act = (textContent, title, onclick) => make("button", { type: "button", className: "quiet", textContent, title, onclick });
  const actions = [
    act("Again", "Draw this seed again", () => redraw({ ...draw_.inputs, num_outputs: 1, seed: Number(picture.seed) })),
    act("Vary", "Draw something like it", () => vary(draw_, picture)),
    make("a", { className: "quiet", href: address, download: fileName(draw_, picture), textContent: "Download" }),
  ];
  if (extended()) actions.splice(2, 0, act("Edit", "Start from this picture", () => start(picture.blob)));
  return make("figure", {}, frame, make("figcaption", {}, make("span", { className: "seed", textContent: `seed ${picture.seed}` }), ...actions));
}

function fileName(draw_, picture) {
  const words = draw_.inputs.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 40);
  return `${words || "picture"}-${picture.name.replace(/^\d+-/, "")}`;
}

function view(draw_, picture, address) {
  const [image, text] = [$("viewer").querySelector("img"), $("viewer").querySelector("p")];
  Object.assign(image, { src: address, alt: draw_.inputs.prompt });
  text.textContent = `${draw_.inputs.prompt} · seed ${picture.seed} · ${factsOf(draw_)}`;
  $("viewer").showModal();
}

async function redraw(wanted) {
  if (running) return;
  try {
    if (wanted.image) await start(fileOf(wanted.image), wanted.mask);
    else forget();
  } catch { /* the old picture cannot be read: its data is sent as it is */ }
  fill(wanted);
  await draw(wanted);
}

async function vary(draw_, picture) {
  const wanted = { ...draw_.inputs, num_outputs: 1, seed: roll() };
  if (extended()) {
    Object.assign(wanted, { image: await dataOf(picture.blob), prompt_strength: 0.6 });
    for (const name of ["mask", "aspect_ratio", "width", "height"]) delete wanted[name];
  }
  await redraw(wanted);
}

// ------------------------------------------------------------------------------- a picture to start from, a mask

function dataOf(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem("That file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

/** The file of a data: URI, which the page's own policy does not let it fetch. */
function fileOf(uri) {
  const [head, data] = uri.split(",");
  return new Blob([Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))], { type: /^data:([^;]*)/.exec(head)[1] });
}

async function start(blob, mask = null) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new Problem("That is not a picture that this browser can read. PNG, JPEG and WebP are.");
  }
  source = { image: await dataOf(blob), bitmap, mask, painted: null };
  $("image").value = "";
  await showSource();
}

function forget() {
  source = null;
  $("chosen").hidden = true;
  $("strength").hidden = true;
  $("drop-hint").hidden = false;
  settle();
}

async function showSource() {
  const { bitmap, mask } = source;
  const scale = Math.min(192 / bitmap.width, 192 / bitmap.height);
  const canvas = $("thumbnail");
  Object.assign(canvas, { width: bitmap.width * scale, height: bitmap.height * scale });
  canvas.style.width = `${canvas.width / 2}px`;
  canvas.style.height = `${canvas.height / 2}px`;
  const brush = canvas.getContext("2d");
  brush.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  if (source.painted) overlay(brush, source.painted, canvas.width, canvas.height);
  $("chosen").hidden = false;
  $("strength").hidden = false;
  $("drop-hint").hidden = true;
  $("unpaint").hidden = !mask;
  $("paint").textContent = mask ? "Change the mask" : "Draw a mask";
  settle();
}

/** Tint what is painted. */
function overlay(brush, painted, width, height) {
  const tint = new OffscreenCanvas(width, height);
  const ink = tint.getContext("2d");
  ink.drawImage(painted, 0, 0, width, height);
  ink.globalCompositeOperation = "source-in";
  ink.fillStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  ink.fillRect(0, 0, width, height);
  brush.globalAlpha = 0.6;
  brush.drawImage(tint, 0, 0);
  brush.globalAlpha = 1;
}

const painter = { canvas: $("canvas"), painted: null, last: null, cursor: null };

function openPainter() {
  const { bitmap } = source;
  const scale = Math.min(1, 1440 / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [Math.round(bitmap.width * scale), Math.round(bitmap.height * scale)];
  Object.assign(painter.canvas, { width, height });
  painter.painted = new OffscreenCanvas(width, height);
  if (source.painted) painter.painted.getContext("2d").drawImage(source.painted, 0, 0, width, height);
  painter.cursor = null;
  repaint();
  $("painter").showModal();
  painter.canvas.focus();
}

function repaint() {
  const { canvas, painted, cursor } = painter;
  const brush = canvas.getContext("2d");
  brush.drawImage(source.bitmap, 0, 0, canvas.width, canvas.height);
  overlay(brush, painted, canvas.width, canvas.height);
  $("brush").nextElementSibling.textContent = `${$("brush").value} %`;
  if (!cursor) return;
  brush.lineWidth = 2;
  for (const [colour, more] of [["#000", 1], ["#fff", 0]]) {
    brush.strokeStyle = colour;
    brush.beginPath();
    brush.arc(cursor.x, cursor.y, brushSize() / 2 + more, 0, 2 * Math.PI);
    brush.stroke();
  }
}

const brushSize = () => (Math.max(painter.canvas.width, painter.canvas.height) * $("brush").value) / 100;

function stroke(from, to) {
  const ink = painter.painted.getContext("2d");
  ink.globalCompositeOperation = $("eraser").ariaPressed === "true" ? "destination-out" : "source-over";
  Object.assign(ink, { lineWidth: brushSize(), lineCap: "round", strokeStyle: "#fff" });
  ink.beginPath();
  ink.moveTo(from.x, from.y);
  ink.lineTo(to.x, to.y);
  ink.stroke();
  repaint();
}

function place(event) {
  const box = painter.canvas.getBoundingClientRect();
  const scale = painter.canvas.width / box.width;
  return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
}

function paintByKey(event) {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const { canvas } = painter;
  painter.cursor ??= { x: canvas.width / 2, y: canvas.height / 2 };
  if (moves[event.key]) {
    const [x, y] = moves[event.key].map((direction) => (direction * brushSize()) / 3);
    const to = {
      x: Math.min(canvas.width, Math.max(0, painter.cursor.x + x)),
      y: Math.min(canvas.height, Math.max(0, painter.cursor.y + y)),
    };
    painter.cursor = to;
    repaint();
  } else if (event.key === " ") {
    stroke(painter.cursor, painter.cursor);
  } else {
    return;
  }
  event.preventDefault();
}

async function takeMask() {
  const { painted } = painter;
  const mask = new OffscreenCanvas(painted.width, painted.height);
  const ink = mask.getContext("2d");
  ink.fillRect(0, 0, mask.width, mask.height);
  ink.drawImage(painted, 0, 0);
  const { data } = painted.getContext("2d").getImageData(0, 0, painted.width, painted.height);
  const empty = !data.some((value, k) => k % 4 === 3 && value > 127);
  source.painted = empty ? null : painted;
  source.mask = empty ? null : await dataOf(await mask.convertToBlob());
  $("painter").close();
  await showSource();
}

// ------------------------------------------------------------------------------------------------- what is pressed

/** A handler whose problems are shown. */
const handled = (act) => async (...event) => {
  try {
    await act(...event);
  } catch (error) {
    complain(error);
  }
};

form.addEventListener("submit", (event) => {
  event.preventDefault();
  handled(async () => {
    reassure();
    await draw(read());
  })();
});
form.addEventListener("input", (event) => {
  event.target.removeAttribute("aria-invalid");
  if (event.target.name === "model") changeModel();
  settle();
  remember();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) cancel();
});
$("cancel").addEventListener("click", cancel);
$("dice").addEventListener("click", () => {
  $("seed").value = roll();
  remember();
});
$("problem").lastElementChild.addEventListener("click", reassure);
$("change-key").addEventListener("click", () => askForKey(null));
$("clear").addEventListener("click", () => {
  $("clear-dialog").returnValue = "no";
  $("clear-dialog").showModal();
});
$("clear-dialog").addEventListener("close", () => {
  if ($("clear-dialog").returnValue === "clear") clearHistory();
});
$("viewer").addEventListener("click", () => $("viewer").close());

$("image").addEventListener("change", handled(async () => {
  reassure();
  if ($("image").files[0]) await start($("image").files[0]);
}));
document.addEventListener("paste", handled(async (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file && extended()) await start(file);
}));
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, handled(async (event) => {
    event.preventDefault();
    document.querySelector(".drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && extended() && event.dataTransfer.files[0]) await start(event.dataTransfer.files[0]);
  }));
}
$("forget").addEventListener("click", forget);
$("paint").addEventListener("click", openPainter);
$("unpaint").addEventListener("click", handled(async () => {
  Object.assign(source, { mask: null, painted: null });
  await showSource();
}));

painter.canvas.addEventListener("pointerdown", (event) => {
  painter.canvas.setPointerCapture(event.pointerId);
  painter.last = painter.cursor = place(event);
  stroke(painter.last, painter.last);
});
painter.canvas.addEventListener("pointermove", (event) => {
  painter.cursor = place(event);
  if (painter.last) {
    stroke(painter.last, painter.cursor);
    painter.last = painter.cursor;
  } else {
    repaint();
  }
});
for (const name of ["pointerup", "pointercancel"]) painter.canvas.addEventListener(name, () => { painter.last = null; });
painter.canvas.addEventListener("keydown", paintByKey);
$("brush").addEventListener("input", repaint);
$("eraser").addEventListener("click", () => {
  $("eraser").ariaPressed = String($("eraser").ariaPressed !== "true");
});
$("wipe").addEventListener("click", () => {
  painter.painted.getContext("2d").clearRect(0, 0, painter.canvas.width, painter.canvas.height);
  repaint();
});
$("invert").addEventListener("click", () => {
  const ink = painter.painted.getContext("2d");
  ink.globalCompositeOperation = "xor";
  ink.fillStyle = "#fff";
  ink.fillRect(0, 0, painter.canvas.width, painter.canvas.height);
  repaint();
});
$("painted").addEventListener("click", handled(takeMask));

// ------------------------------------------------------------------------------------------------------- beginning

look();
setInterval(() => document.hidden || look(), 5000);
await handled(async () => {
  await build();
  await showHistory();
  document.documentElement.dataset.ready = "";
  await listModels();
  await resume();
})();

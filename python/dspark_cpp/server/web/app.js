// The chat page: one conversation with one model of the server that served this page.
// Talks Ollama's /api/chat; with `dspark: true` the stream also says which tokens were drafted. No request leaves the server.

import { Meter, clearFigures, format, showFinal, showLive } from "./figures.js";
import { MarkedText, make } from "./text.js";

const $ = (id) => document.getElementById(id);
const MODEL = "dspark-model";

const state = { messages: [], controller: null, isDrawing: false };

class ServerError extends Error {}

// --- the server ------------------------------------------------------------------------------------------------------

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("dspark-key");
  const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const reply = await fetch(path, { ...options, headers });
  if (reply.status === 401 && (await askForKey())) return ask(path, options);
  if (!reply.ok) throw new ServerError(await errorText(reply));
  return reply;
}

async function errorText(reply) {
  try {
    const { error } = await reply.json();
    return error?.message ?? error ?? `The server answers with status ${reply.status}.`;
  } catch {
    return `The server answers with status ${reply.status}.`;
  }
}

function askForKey() {
  const dialog = $("key-dialog");
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const isGiven = dialog.returnValue === "ok" && $("key").value !== "";
        if (isGiven) sessionStorage.setItem("dspark-key", $("key").value);
        resolve(isGiven);
      },
      { once: true },
    );
  });
}

// Yields the objects of a stream of lines, however the network cuts it.
async function* readLines(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.trim()) yield JSON.parse(line);
  }
  if (rest.trim()) yield JSON.parse(rest);
}

async function loadModels() {
  try {
    const { models } = await (await ask("/api/tags")).json();
    fillModels(models);
    const { version } = await (await ask("/api/version")).json();
    $("version").textContent = `dspark ${version}`;
  } catch (error) {
    showNotice(error);
  }
}

function fillModels(models) {
  const wanted = localStorage.getItem(MODEL);
  $("model").replaceChildren(...models.map(({ name, details }) => modelOption(name, details)));
  if (models.some(({ name }) => name === wanted)) $("model").value = wanted;
  $("model").disabled = models.length === 0;
  if (models.length === 0) {
    $("model").append(new Option("No models yet"));
    $("ideas").hidden = true;
    $("empty-text").textContent = "This server has no models. Fetch one with: dspark pull owner/repository, then reload this page.";
  }
  updateSend();
}

function modelOption(name, details) {
  const short = name.replace(/^hf\.co\//, "").replace(/:latest$/, "");
  const facts = [details?.parameter_size, details?.quantization_level].filter(Boolean).join(" ");
  return new Option(facts ? `${short} · ${facts}` : short, name);
}

// --- one answer ------------------------------------------------------------------------------------------------------

async function send(prompt) {
  const model = $("model").value;
  const question = { role: "user", content: prompt };
  addMessage("user").append(prompt);
  const answer = startAnswer();
  state.controller = new AbortController();
  showStreaming(true);
  try {
    const reply = await ask("/api/chat", {
      method: "POST",
      signal: state.controller.signal,
      body: JSON.stringify(requestBody(model, question)),
    });
    for await (const line of readLines(reply)) takeLine(answer, line);
  } catch (error) {
    if (error.name === "AbortError") answer.note = "Stopped.";
    else showNotice(error);
  }
  endAnswer(answer, question);
}

function requestBody(model, question) {
  const system = $("system").value.trim();
  const options = {};
  if ($("temperature").value !== "") options.temperature = Number($("temperature").value);
  if (!$("drafting").checked) options.draft_num_predict = 0;
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...state.messages, question];
  return { model, messages, stream: true, dspark: true, ...(Object.keys(options).length && { options }) };
}

function startAnswer() {
  const element = addMessage("assistant");
  element.classList.add("waiting");
  const body = make("div", "text");
  element.append(body);
  const usesDrafts = $("drafting").checked;
  return { element, text: new MarkedText(body), meter: new Meter(), usesDrafts, thinking: null, final: null, note: "" };
}

function takeLine(answer, line) {
  if (line.error) throw new ServerError(line.error);
  const { drafted = [], tokens = [] } = line.dspark ?? {};
  answer.meter.take(line.dspark ?? {});
  if (line.done) answer.final = line;
  const text = line.message?.content ?? "";
  const thought = line.message?.thinking ?? "";
  if (thought) thinkingOf(answer).append(thought);
  if (tokens.join("") === text && text) tokens.forEach((token, i) => answer.text.append(token, drafted[i]));
  else answer.text.append(text, false);
  const nTokens = drafted.length || (text || thought ? 1 : 0);
  if (nTokens) answer.meter.add(drafted, nTokens);
  if (nTokens) answer.element.classList.remove("waiting");
  drawSoon(answer);
}

function thinkingOf(answer) {
  if (!answer.thinking) {
    const details = make("details", "thinking");
    const summary = make("summary");
    summary.textContent = "Thinking";
    answer.thinking = make("div");
    details.append(summary, answer.thinking);
    answer.element.prepend(details);
  }
  return answer.thinking;
}

// At most one drawing per frame, however fast tokens come.
function drawSoon(answer) {
  if (state.isDrawing) return;
  state.isDrawing = true;
  requestAnimationFrame(() => {
    state.isDrawing = false;
    draw(answer);
  });
}

function draw(answer) {
  const log = $("log");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  answer.text.draw();
  if (!answer.final) showLive(answer.meter);
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function endAnswer(answer, question) {
  state.controller = null;
  answer.element.classList.remove("waiting");
  const { final, meter } = answer;
  draw(answer);
  showFinal(meter, final);
  if (answer.text.text || answer.thinking || answer.note || final) addFooter(answer);
  else answer.element.remove(); // it failed, and a notice says why
  if (answer.text.text) state.messages.push(question, { role: "assistant", content: answer.text.text });
  showStreaming(false);
  $("log").scrollTop = $("log").scrollHeight;
}

function addFooter(answer) {
  const { final, meter, note } = answer;
  const { speed, ratio } = meter;
  const length = final?.dspark?.accepted_length ?? meter.acceptedLength;
  const nTokens = final?.eval_count ?? meter.nTokens;
  const isEmpty = !answer.text.text && !answer.thinking;
  const facts = [note || (isEmpty ? "The model ended at once." : ""), `${nTokens} tokens`];
  if (final?.done_reason === "length") facts.unshift("Cut at the length limit.");
  if (speed) facts.push(`${format(speed)} tokens/s`);
  if (ratio && answer.usesDrafts) facts.push(`${format(ratio, 2)}× plain`);
  if (length && length > 1) facts.push(`${format(length, 2)} per round`);
  const footer = make("footer", "facts");
  for (const fact of facts.filter(Boolean)) footer.append(Object.assign(make("span"), { textContent: fact }));
  if (answer.text.text) footer.append(copyButton(answer.text.text));
  answer.element.append(footer);
}

function copyButton(text) {
  const button = make("button", "plain small");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

function addMessage(role) {
  $("empty").hidden = true;
  const element = make("article", role);
  element.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  $("log").append(element);
  $("log").scrollTop = $("log").scrollHeight;
  return element;
}

// --- the page --------------------------------------------------------------------------------------------------------

function showNotice(error) {
  const isOffline = error instanceof TypeError;
  $("notice").textContent = isOffline ? "The server does not answer. Is it still running?" : error.message;
  $("notice").hidden = false;
}

function showStreaming(isStreaming) {
  $("log").setAttribute("aria-busy", isStreaming);
  const hadFocus = document.activeElement === (isStreaming ? $("send") : $("stop"));
  $("send").hidden = isStreaming;
  $("stop").hidden = !isStreaming;
  if (hadFocus) (isStreaming ? $("stop") : $("prompt")).focus();
  updateSend();
}

function updateSend() {
  $("send").disabled = $("prompt").value.trim() === "" || $("model").disabled;
}

function submit() {
  const prompt = $("prompt").value.trim();
  if (!prompt || state.controller || $("model").disabled) return;
  $("notice").hidden = true;
  $("prompt").value = "";
  fitPrompt();
  send(prompt);
}

function startOver() {
  state.controller?.abort();
  state.messages = [];
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("notice").hidden = true;
  clearFigures();
  $("prompt").focus();
}

function fitPrompt() {
  const area = $("prompt");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, 200)}px`;
  updateSend();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("input", fitPrompt);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.controller?.abort();
});
$("stop").addEventListener("click", () => state.controller?.abort());
$("new").addEventListener("click", startOver);
$("model").addEventListener("change", () => localStorage.setItem(MODEL, $("model").value));
$("colours").addEventListener("change", () => document.body.classList.toggle("no-colours", !$("colours").checked));
$("ideas").addEventListener("click", (event) => {
  if (!(event.target instanceof HTMLButtonElement)) return;
  $("prompt").value = event.target.textContent;
  submit();
});

const wide = matchMedia("(min-width: 60rem)");
const followWidth = () => ($("rail").open = wide.matches);
wide.addEventListener("change", followWidth);
followWidth();
clearFigures();
loadModels();

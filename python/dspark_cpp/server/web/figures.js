// The figures beside the chat: speed against plain decoding, tokens per round, what the scheduler chose.
// Both speeds are the engine's own: what arrives here also waits for the network and for this page.

const SVG = "http://www.w3.org/2000/svg";
const N_ROUNDS = 40;
const WIDTH = 240;
const $ = (id) => document.getElementById(id);

// Counts one answer while it streams. A round ends with the one token that the target chose itself.
export class Meter {
  constructor() {
    this.speed = null; // tokens per second, of the answer so far
    this.plainSpeed = null; // the same without drafts under the same load
    this.nTokens = 0;
    this.nMarked = 0;
    this.rounds = [];
    this.current = 0;
  }

  add(drafted, nTokens) {
    for (const isDrafted of drafted) {
      if (isDrafted) this.current += 1;
      else {
        this.rounds.push(this.current);
        this.current = 0;
      }
    }
    this.nMarked += drafted.length;
    this.nTokens += nTokens;
  }

  take({ tokens_per_second: speed, plain_tokens_per_second: plain }) {
    this.speed = speed ?? this.speed;
    this.plainSpeed = plain ?? this.plainSpeed;
  }

  get ratio() {
    return this.speed && this.plainSpeed ? this.speed / this.plainSpeed : null;
  }

  get acceptedLength() {
    return this.rounds.length ? (this.nMarked - this.current) / this.rounds.length : null;
  }
}

export function showLive(meter) {
  showSpeed(meter);
  showAccepted(meter.acceptedLength);
  showRounds(meter.rounds);
}

export function showFinal(meter, final) {
  const figures = final?.dspark ?? null;
  // The first token comes out of the prompt: the time after it is that of the others.
  showSpeed(meter, final?.eval_count > 1 ? ((final.eval_count - 1) * 1e9) / final.eval_duration : null);
  showAccepted(figures?.accepted_length ?? meter.acceptedLength);
  showRounds(meter.rounds);
  showPlan(figures);
}

export function clearFigures() {
  showSpeed(new Meter());
  showAccepted(null);
  showRounds([]);
  showPlan(null);
}

export function format(number, digits = 1) {
  return number === null || number === undefined ? "–" : number.toFixed(number >= 100 ? 0 : digits);
}

// `sent`: tokens per second that the server sent, which is less where sending takes longer than computing.
function showSpeed({ speed, plainSpeed: plain, ratio }, sent = null) {
  $("speed").textContent = $("strip-speed").textContent = format(speed);
  $("strip-ratio").textContent = ratio ? `${format(ratio, 2)}× plain` : "";
  const against = `${format(ratio, 2)} times plain decoding, which makes ${format(plain)} tokens/s under this load.`;
  const how = sent && sent < 0.9 * speed ? ` By the engine’s clock; sent at ${format(sent)} tokens/s.` : "";
  $("ratio").textContent = !speed ? "Send a message to measure it." : (ratio ? against : "Plain speed not known yet.") + how;
  const most = Math.max(speed ?? 0, plain ?? 0, 1);
  draw($("speed-bars"), [
    ...speedBar(0, "this answer", speed, most, "bar-drafted"),
    ...speedBar(24, "plain", plain, most, "bar-plain"),
  ]);
  $("speed-bars").setAttribute("aria-label", `This answer ${format(speed)}, plain ${format(plain)} tokens per second`);
}

function speedBar(y, name, value, most, className) {
  return [
    shape("rect", { x: 74, y: y + 4, width: WIDTH - 74, height: 10, rx: 3, class: "bar-ground" }),
    shape("rect", { x: 74, y: y + 4, width: ((WIDTH - 74) * (value ?? 0)) / most, height: 10, rx: 3, class: className }),
    label(0, y + 13, name),
  ];
}

function showAccepted(length) {
  $("accepted").textContent = format(length, 2);
  $("strip-accepted").textContent = length === null ? "" : `${format(length, 2)} a round`;
}

function showRounds(rounds) {
  const shown = rounds.slice(-N_ROUNDS);
  const most = Math.max(7, ...shown) + 1;
  const step = WIDTH / N_ROUNDS;
  const unit = 46 / most;
  const bars = shown.flatMap((n, i) => {
    const x = i * step;
    const top = 48 - (n + 1) * unit;
    return [
      shape("rect", { x, y: top, width: step - 1.5, height: unit, class: "bar-target" }),
      shape("rect", { x, y: top + unit, width: step - 1.5, height: n * unit, class: "bar-drafted" }),
    ];
  });
  draw($("rounds"), [shape("line", { x1: 0, y1: 47.5, x2: WIDTH, y2: 47.5, class: "axis" }), ...bars]);
  const text = shown.length ? `Accepted drafts of the last rounds: ${shown.join(", ")}` : "No rounds yet";
  $("rounds").setAttribute("aria-label", text);
}

function showPlan(figures) {
  const scheduled = figures?.scheduled_per_position ?? [];
  const accepted = figures?.accepted_per_position ?? [];
  const nRounds = Math.max(figures?.n_rounds ?? 0, 1);
  const step = WIDTH / Math.max(scheduled.length, 7);
  const bars = scheduled.flatMap((n, i) => [
    bar(i * step, step, n / nRounds, "bar-verified"),
    bar(i * step, step, (accepted[i] ?? 0) / nRounds, "bar-drafted"),
    label(i * step + (step - 4) / 2, 63, String(i + 1), "middle"),
  ]);
  draw($("plan"), [shape("line", { x1: 0, y1: 50.5, x2: WIDTH, y2: 50.5, class: "axis" }), ...bars]);
  $("plan-text").textContent = describePlan(figures);
  $("plan").setAttribute("aria-label", scheduled.length ? describePositions(scheduled, accepted, nRounds) : "No schedule yet");
}

function describePlan(figures) {
  if (!figures) return "Shown when an answer is complete.";
  const parked = figures.n_parked ? ` ${figures.n_parked} rounds went without drafts: ${figures.park_reason || "none would pay"}.` : "";
  if (!figures.n_drafted) return `No drafts in ${figures.n_rounds} rounds (policy ${figures.policy}).${parked}`;
  const kept = Math.round((100 * figures.n_accepted) / Math.max(figures.n_scheduled, 1));
  const rounds = `${figures.n_rounds} rounds, policy ${figures.policy}`;
  return `${rounds}: ${figures.n_drafted} tokens drafted, ${figures.n_scheduled} verified, ${figures.n_accepted} accepted (${kept}%).${parked}`;
}

function describePositions(scheduled, accepted, nRounds) {
  const percent = (n) => Math.round((100 * n) / nRounds);
  return scheduled
    .map((n, i) => `position ${i + 1}: verified in ${percent(n)}%, accepted in ${percent(accepted[i] ?? 0)}% of rounds`)
    .join("; ");
}

function bar(x, step, share, className) {
  const height = 48 * Math.min(share, 1);
  return shape("rect", { x, y: 50 - height, width: step - 4, height, rx: 2, class: className });
}

function label(x, y, text, anchor = "start") {
  const node = shape("text", { x, y, "text-anchor": anchor });
  node.textContent = text;
  return node;
}

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function draw(svg, shapes) {
  svg.replaceChildren(...shapes);
}

// An answer as it grows: text whose every token is drafted or not, laid out as light Markdown.
// Nothing is ever parsed as HTML: all text goes into text nodes. Only the last block is built again when text comes.

const FENCE = /^ {0,3}```\s*(\S*)/;
const INLINE = /(`+)([^`]+)\1|\*\*([^*\n]+)\*\*/g;

export class MarkedText {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.runs = []; // [end of the run in the text, drafted or not]
    this.done = 0; // start of the block that still grows
    this.last = null;
  }

  append(text, isDrafted) {
    if (!text) return;
    this.text += text;
    const previous = this.runs.at(-1);
    if (previous && previous[1] === isDrafted) previous[0] = this.text.length;
    else this.runs.push([this.text.length, isDrafted]);
  }

  // Builds what has changed since the last call.
  draw() {
    if (this.last) this.last.remove();
    this.last = null;
    for (;;) {
      const block = nextBlock(this.text, this.done);
      if (!block) return;
      const node = this.build(block);
      this.element.append(node);
      if (!block.isComplete) {
        this.last = node;
        return;
      }
      this.done = block.next;
    }
  }

  build({ kind, start, end, level }) {
    if (kind === "code") {
      const code = make("pre");
      this.fill(code, start, end);
      return code;
    }
    if (kind === "item") {
      const item = make("p", "item");
      item.dataset.mark = level;
      this.fillInline(item, start, end);
      return item;
    }
    const node = make(kind === "heading" ? "h3" : "p");
    this.fillInline(node, start, end);
    return node;
  }

  fillInline(parent, start, end) {
    let position = start;
    for (const match of this.text.slice(start, end).matchAll(INLINE)) {
      const at = start + match.index;
      const width = match[1] ? match[1].length : 2;
      this.fill(parent, position, at);
      const child = make(match[1] ? "code" : "strong");
      this.fill(child, at + width, at + match[0].length - width);
      parent.append(child);
      position = at + match[0].length;
    }
    this.fill(parent, position, end);
  }

  fill(parent, start, end) {
    for (let i = this.firstRun(start); start < end; i += 1) {
      const [runEnd, isDrafted] = this.runs[i];
      const piece = this.text.slice(start, Math.min(runEnd, end));
      if (isDrafted) appendDrafted(parent, piece);
      else parent.append(piece);
      start += piece.length;
    }
  }

  firstRun(position) {
    let low = 0;
    for (let high = this.runs.length - 1; low < high; ) {
      const middle = (low + high) >> 1;
      if (this.runs[middle][0] > position) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

// The block that begins at `from`: where its text lies, and whether more text can still change it.
function nextBlock(text, from) {
  while (text[from] === "\n") from += 1;
  if (from >= text.length) return null;
  const lineEnd = endOfLine(text, from);
  const line = text.slice(from, lineEnd);
  const fence = FENCE.exec(line);
  if (fence) return codeBlock(text, Math.min(lineEnd + 1, text.length));
  const heading = /^#{1,6} +/.exec(line);
  const item = /^(\s*)([-*+]|\d+[.)]) +/.exec(line);
  const kind = heading ? "heading" : item ? "item" : "paragraph";
  const level = item ? (/\d/.test(item[2]) ? item[2] : "•") : "";
  const start = from + (heading ?? item ?? [""])[0].length;
  const end = kind === "paragraph" ? endOfParagraph(text, lineEnd) : lineEnd;
  return { kind, start, end, level, next: end, isComplete: end < text.length && isSettled(text, end) };
}

function codeBlock(text, start) {
  const close = /^ {0,3}```[^\S\n]*$/m.exec(text.slice(start));
  if (!close) return { kind: "code", start, end: text.length, next: text.length, isComplete: false };
  const end = start + close.index;
  const next = end + close[0].length;
  return { kind: "code", start, end: Math.max(start, end - 1), next, isComplete: next < text.length };
}

// A paragraph goes on over single line ends, unless a list, a heading or a fence begins.
function endOfParagraph(text, end) {
  while (end < text.length) {
    const next = endOfLine(text, end + 1);
    const line = text.slice(end + 1, next);
    if (!line.trim() || /^\s*([-*+]|\d+[.)]) +/.test(line) || /^#{1,6} /.test(line) || FENCE.test(line)) return end;
    end = next;
  }
  return end;
}

// The line after `end` is there in full, so it cannot become part of this block any more.
function isSettled(text, end) {
  return text.indexOf("\n", end + 1) !== -1 || text[end + 1] === "\n";
}

function endOfLine(text, from) {
  const end = text.indexOf("\n", from);
  return end === -1 ? text.length : end;
}

// The spaces around a run of drafted words stay without colour, on each of its lines.
function appendDrafted(parent, piece) {
  for (const line of piece.split(/(?<=\n)/)) {
    const [, before, core, after] = /^(\s*)(.*?)(\s*)$/.exec(line);
    const span = make("span", "drafted");
    span.textContent = core;
    parent.append(before, ...(core ? [span] : []), after);
  }
}

export function make(tag, className) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  return node;
}

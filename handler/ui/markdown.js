// What the model writes: a little Markdown, built from text nodes only. Links and HTML stay text.

/** Show `text` in the element `into`, changing only the blocks that differ from what it shows already. */
export function render(into, text) {
  const blocks = parse(text);
  blocks.forEach((block, place) => {
    const source = JSON.stringify(block);
    const old = into.children[place];
    if (old?.source === source) return; // left alone, so that what is selected in it stays selected
    const node = Object.assign(build(block), { source });
    if (old) old.replaceWith(node);
    else into.append(node);
  });
  while (into.children.length > blocks.length) into.lastChild.remove();
}

/** Paragraphs, headings, lists and fenced code; a fence that is still open reaches to the end. */
function parse(text) {
  const blocks = [];
  let open = null; // the block that the next line may belong to
  const start = (block) => blocks[blocks.push(block) - 1];
  for (const line of text.split("\n")) {
    const fence = /^\s*(`{3,}|~{3,})(.*)$/.exec(line);
    const item = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/.exec(line);
    const heading = /^#{1,6}\s+(.*)$/.exec(line);
    if (open?.kind === "pre") {
      if (fence?.[1].startsWith(open.mark) && !fence[2].trim()) open = null;
      else open.lines.push(line);
    } else if (fence && !fence[2].includes("`")) {
      open = start({ kind: "pre", mark: fence[1], lines: [] });
    } else if (!line.trim()) {
      if (open?.kind === "p") open = null;
    } else if (item) {
      const kind = item[2] ? "ol" : "ul";
      const depth = Math.min(2, Math.floor(item[1].replace(/\t/g, "    ").length / 2));
      if (open?.kind !== kind || open.depth !== depth) {
        open = start({ kind, depth, first: Number(item[2] ?? 1), lines: [] });
      }
      open.lines.push(item[3]);
    } else if (heading) {
      start({ kind: "h3", lines: [heading[1]] });
      open = null;
    } else if (open?.lines && open.kind !== "p" && /^\s/.test(line)) {
      open.lines[open.lines.length - 1] += `\n${line.trim()}`;
    } else {
      if (open?.kind !== "p") open = start({ kind: "p", lines: [] });
      open.lines.push(line);
    }
  }
  return blocks;
}

function build({ kind, depth, first, lines }) {
  const node = document.createElement(kind);
  if (kind === "pre") {
    const code = document.createElement("code");
    code.textContent = lines.join("\n");
    node.append(code);
    node.tabIndex = 0; // long lines scroll, by keyboard too
  } else if (kind === "ul" || kind === "ol") {
    if (kind === "ol") node.start = first;
    node.dataset.depth = depth;
    node.append(...lines.map((line) => inline(document.createElement("li"), line)));
  } else {
    inline(node, lines.join("\n"));
  }
  return node;
}

/** Code, bold and emphasis. No alternative can run far past a mark, so the time is linear in the text. */
function inline(into, text) {
  const marks = /(`{1,3})([^`]+)\1|\*\*([^\s*](?:[^*]*[^\s*])?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*/g;
  let from = 0;
  for (const match of text.matchAll(marks)) {
    const [whole, , code, strong, emphasis] = match;
    const node = document.createElement(code ? "code" : strong ? "strong" : "em");
    if (code) node.textContent = code;
    else inline(node, strong ?? emphasis);
    into.append(text.slice(from, match.index), node);
    from = match.index + whole.length;
  }
  into.append(text.slice(from));
  return into;
}

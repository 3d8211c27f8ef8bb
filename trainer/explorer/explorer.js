// The explorer of stores and runs. Python answers every question; all texts are set as text nodes.

const MEASURES = {
  norm: { name: "norm (L2)", scale: "log" },
  change: { name: "change from the layer below (relative)", low: 0 },
  similarity: { name: "similarity to the last layer (cosine)", high: 1 },
};
const PAUSE = 100; // milliseconds without a key before a search starts
const PATIENCE = 300; // milliseconds after which the reader is told to wait
const ROW = 15; // pixels
const TALL = 390; // pixels of a map that is shown as a whole

function make(tag, properties = {}, ...children) {
  const { classes, data, ...rest } = properties;
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  for (const [name, value] of Object.entries(data ?? {})) node.setAttribute(name, value);
  Object.assign(node, rest);
  node.append(...children);
  return node;
}

function choice(label, options, chosen, change) {
  const select = make("select", { onchange: () => change(select.value) });
  for (const [value, name] of options) {
    select.append(make("option", { value, textContent: name, selected: value === chosen }));
  }
  return make("label", {}, `${label} `, select);
}

function level(t, change) {
  const shown = make("span");
  const slider = make("input", { type: "range", min: 0, max: t.length - 1, step: 1, value: 0 });
  const show = () => { shown.textContent = ` ${t[slider.value].toFixed(2)}  (0 = image, 1 = noise)`; };
  slider.oninput = () => { show(); change(Number(slider.value)); };
  show();
  return make("label", { hidden: t.length < 2 }, "noise level t ", slider, shown);
}

function short(value) {
  return Number.isNaN(value) ? "none" : Number(value.toPrecision(3)).toString();
}

// Questions to Python, each with a number that its answer has too. Every view of a widget gets the
// answers to all of them.
function connect(model) {
  const waiting = new Map();
  const own = Math.random().toString(36).slice(2);
  let last = 0;
  const receive = (message, buffers) => {
    const settle = waiting.get(message.number);
    if (!settle) return;
    waiting.delete(message.number);
    if (message.error !== undefined) { settle.reject(new Error(message.error)); return; }
    const answer = { ...message.plain };
    message.binary.forEach(({ name, shape }, place) => {
      const { buffer, byteOffset, byteLength } = buffers[place];
      const bytes = buffer.slice(byteOffset, byteOffset + byteLength);
      answer[name] = shape === null ? bytes : { shape, values: new Float32Array(bytes) };
    });
    settle.resolve(answer);
  };
  model.on("msg:custom", receive);
  const ask = (side, question, args = {}) => new Promise((resolve, reject) => {
    last += 1;
    const number = `${own}-${last}`;
    waiting.set(number, { resolve, reject });
    model.send({ number, side, ask: question, arguments: args });
  });
  return { ask, close: () => model.off("msg:custom", receive) };
}

// A map of rows by columns. The value under the pointer, or under a cursor moved by arrow keys, is
// written below.
function heatmap({ rows, columns, array, colours, name, low, high, scale, rowTitle, columnTitle, whole }) {
  const [height, width] = array.shape;
  const size = whole ? Math.max(4, Math.min(ROW, Math.floor(TALL / height))) : ROW;
  const known = [...array.values].filter(Number.isFinite);
  let least = low ?? known.reduce((a, b) => Math.min(a, b), Infinity);
  let most = high ?? known.reduce((a, b) => Math.max(a, b), -Infinity);
  const signed = least < 0;
  if (signed) { most = Math.max(most, -least); least = -most; }
  const log = scale === "log" && least > 0;
  const place = (value) => {
    const part = log
      ? Math.log(value / least) / Math.log(most / least)
      : (value - least) / (most - least);
    return Math.round(255 * Math.min(1, Math.max(0, Number.isFinite(part) ? part : 0)));
  };
  const palette = (signed ? colours.signed : colours.plain).map((hex) => parseInt(hex.slice(1), 16));
  const paint = (canvas, pixels, color) => {
    const image = new ImageData(canvas.width, canvas.height);
    pixels.forEach((value, index) => {
      const rgb = color(value);
      if (rgb === null) return;
      image.data.set([rgb >> 16, (rgb >> 8) & 255, rgb & 255, 255], 4 * index);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
  };
  const about = `${name}, ${rowTitle} by ${columnTitle}`;
  const canvas = make("canvas", {
    width, height, tabIndex: 0, data: { role: "img", "aria-label": `${about}; arrow keys read values` },
  });
  canvas.style.height = `${height * size}px`;
  paint(canvas, array.values, (value) => (Number.isNaN(value) ? null : palette[place(value)]));
  const bar = make("canvas", { width: 256, height: 1 });
  paint(bar, palette, (color) => color);

  const cursor = make("div", { classes: "cursor", hidden: true });
  const output = make("output", { textContent: "Point at a cell, or use arrow keys, to read its value." });
  let at = null;
  const move = (row, column) => {
    at = [Math.min(height - 1, Math.max(0, row)), Math.min(width - 1, Math.max(0, column))];
    cursor.hidden = false;
    cursor.style.left = `${(100 * at[1]) / width}%`;
    cursor.style.width = `${100 / width}%`;
    cursor.style.top = `${at[0] * size}px`;
    cursor.style.height = `${size}px`;
    const value = short(array.values[at[0] * width + at[1]]);
    output.textContent = `${rowTitle} ${rows[at[0]]}, ${columnTitle} ${columns[at[1]]}: ${value}`;
  };
  canvas.onpointermove = (event) => {
    const { offsetX, offsetY } = event;
    move(Math.floor(offsetY / size), Math.floor((offsetX / canvas.clientWidth) * width));
  };
  canvas.onkeydown = (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const [row, column] = at ?? [0, 0];
    move(row + (at ? step[0] : 0), column + (at ? step[1] : 0));
  };

  const names = make("div", { classes: "rows" });
  const skip = Math.ceil(12 / size);
  rows.forEach((row, index) => {
    const line = make("div", { textContent: index % skip ? "" : row, title: row });
    line.style.height = line.style.lineHeight = `${size}px`;
    names.append(line);
  });
  const every = Math.ceil(width / 16);
  const labels = make("div", { classes: "labels" });
  columns.forEach((column, index) => {
    labels.append(make("span", { textContent: index % every ? "" : column }));
  });
  const foot = make("div", { classes: "foot" }, labels, make("div", { classes: "axis", textContent: columnTitle }));
  const body = make(
    "div", { classes: whole ? "heat" : "heat scroll" },
    names, make("div", { classes: "cells" }, canvas, cursor),
    make("div", { classes: "rows foot quiet", textContent: rowTitle }), foot,
  );
  const key = make(
    "div", { classes: "scale" }, make("span", { textContent: short(least) }), bar,
    make("span", { textContent: `${short(most)}   ${name}${log ? ", log scale" : ""}` }),
  );
  return make("div", { classes: "map" }, body, key, output);
}

function captionList(label, choose) {
  const list = make("div", { classes: "list", data: { role: "listbox", "aria-label": label } });
  list.onkeydown = (event) => {
    const step = { ArrowUp: "previousElementSibling", ArrowDown: "nextElementSibling" }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    document.activeElement[step]?.focus();
  };
  const fill = (rows, number) => list.replaceChildren(...rows.map((row) => make(
    "button",
    { type: "button", onclick: () => choose(row[0]), data: { role: "option", "aria-selected": "false", "data-caption": row[0] } },
    make("span", { textContent: row[2] }),
    make("span", { classes: "number", textContent: number(row) }),
  )));
  const mark = (caption) => {
    for (const item of list.children) {
      item.setAttribute("aria-selected", String(item.dataset.caption === String(caption)));
    }
  };
  return { list, fill, mark };
}

// One store or run: its caption, and a panel for each tab.
function openSide(number, facts, colours, ask, choose) {
  const { features, run } = facts;
  const main = run ?? features;
  const chosen = make("p", { classes: "chosen", textContent: "" });
  const panel = make("div", { data: { role: "tabpanel" } });
  let caption = null;
  let turn = 0;
  const state = { measure: "norm", layer: null, pool: "mean", pair: "cka", block: 0, t: 1 };

  // Shows what an answer gives, unless another tab or caption was chosen meanwhile.
  const fill = async (draw, target = panel) => {
    turn += 1;
    const mine = turn;
    const wait = setTimeout(() => {
      if (mine !== turn) return;
      target.replaceChildren(make("p", { classes: "quiet", textContent: "Computing; only the first look takes this long." }));
    }, PATIENCE);
    let nodes;
    try {
      nodes = await draw();
    } catch (error) {
      nodes = [make("p", { classes: "error", textContent: error.message, data: { role: "alert" } })];
    }
    clearTimeout(wait);
    if (mine === turn) target.replaceChildren(...nodes);
  };
  const holder = (...choices) => {
    const below = make("div");
    panel.replaceChildren(make("div", { classes: "choices" }, ...choices), below);
    return below;
  };
  const needCaption = () => {
    if (caption === null) panel.replaceChildren(make("p", { classes: "quiet", textContent: "Choose a caption." }));
    return caption !== null;
  };
  const names = (layers) => layers.map(String);
  const map = (options) => [heatmap({ colours, ...options })];

  const tabs = {
    tokens() {
      if (!needCaption()) return;
      const draw = () => fill(() => map({
        rows: caption.tokens, columns: names(features.layers), array: caption[state.measure],
        rowTitle: "token", columnTitle: features.layer, ...MEASURES[state.measure],
      }), below);
      const options = Object.entries(MEASURES).map(([value, { name }]) => [value, name]);
      const below = holder(choice("show", options, state.measure, (value) => { state.measure = value; draw(); }));
      draw();
    },
    nearest() {
      if (!needCaption()) return;
      state.layer ??= features.layers[Math.floor(features.layers.length / 2)];
      const draw = () => fill(async () => {
        const args = { caption: caption.caption, layer: state.layer, pool: state.pool };
        const answer = await ask(number, "nearest", args);
        const found = captionList("nearest captions", choose);
        found.fill(answer.captions, (row) => row[3].toFixed(3));
        const note = `Cosine of centred LN(h), among ${answer.sample.toLocaleString("en")} captions.`;
        return [make("p", { classes: "quiet", textContent: note }), found.list];
      }, below);
      const layers = features.layers.map((layer) => [String(layer), String(layer)]);
      const below = holder(
        choice(features.layer, layers, String(state.layer), (value) => { state.layer = Number(value); draw(); }),
        choice("pooled over tokens by", [["mean", "their mean"], ["last", "the last token"]], state.pool,
          (value) => { state.pool = value; draw(); }),
      );
      draw();
    },
    layers() {
      const draw = () => fill(async () => {
        const answer = await ask(number, "similarity");
        const rows = names(features.layers).reverse();
        const { shape, values } = answer[state.pair];
        const turned = new Float32Array(values.length);
        for (let row = 0; row < shape[0]; row += 1) {
          turned.set(values.subarray(row * shape[1], (row + 1) * shape[1]), (shape[0] - 1 - row) * shape[1]);
        }
        const name = state.pair === "cka" ? "linear CKA of LN(h)" : "cosine of LN(h) of a token";
        return [
          make("p", { classes: "quiet", textContent: `Measured on ${answer.tokens.toLocaleString("en")} tokens.` }),
          ...map({ rows, columns: names(features.layers), array: { shape, values: turned }, high: 1, whole: true,
            name, rowTitle: features.layer, columnTitle: features.layer }),
        ];
      }, below);
      const options = [["cka", "linear CKA"], ["cosine", "cosine"]];
      const below = holder(choice("similarity", options, state.pair, (value) => { state.pair = value; draw(); }));
      draw();
    },
    async weights() {
      await fill(async () => {
        const { t, alpha } = await ask(number, "weights");
        const [levels, blocks, layers] = alpha.shape;
        const rows = Array.from({ length: blocks }, (_, block) => String(block + 1));
        const most = alpha.values.reduce((a, b) => Math.max(a, Math.abs(b)), 2 / layers);
        const least = alpha.values.reduce((a, b) => Math.min(a, b), 0);
        const below = make("div");
        const draw = (index) => {
          const values = alpha.values.subarray(index * blocks * layers, (index + 1) * blocks * layers);
          below.replaceChildren(...map({
            rows, columns: names(run.layers), array: { shape: [blocks, layers], values },
            low: least < 0 ? -most : 0, high: most, whole: true, name: `weight (uniform: ${short(1 / layers)})`,
            rowTitle: run.block, columnTitle: "LLM layer",
          }));
        };
        draw(0);
        return [make("div", { classes: "choices" }, level(t, draw)), below];
      });
    },
    async reads() {
      if (!needCaption()) return;
      let levels;
      try {
        levels = (await ask(number, "weights")).t;
      } catch (error) {
        panel.replaceChildren(make("p", { classes: "error", textContent: error.message, data: { role: "alert" } }));
        return;
      }
      let t = levels[0];
      const draw = () => fill(async () => {
        const { share, layers } = await ask(number, "reads", { caption: caption.caption, block: state.block, t });
        const least = share.values.reduce((a, b) => Math.min(a, b), 0);
        const most = share.values.reduce((a, b) => Math.max(a, b), 0);
        return map({
          rows: caption.tokens, columns: names(layers), array: share, low: least < -most / 10 ? least : 0,
          name: `share of what ${run.block} ${state.block + 1} reads`, rowTitle: "token", columnTitle: "LLM layer",
        });
      }, below);
      const blocks = Array.from({ length: run.blocks }, (_, block) => [String(block), String(block + 1)]);
      const below = holder(
        choice(run.block, blocks, String(state.block), (value) => { state.block = Number(value); draw(); }),
        level(levels, (index) => { t = levels[index]; draw(); }),
      );
      draw();
    },
    async samples() {
      await fill(async () => {
        const answer = await ask(number, "samples", { text: caption?.exact ?? null });
        const images = make("div", { classes: "images" });
        answer.captions.forEach((text, index) => {
          const url = URL.createObjectURL(new Blob([answer[`image${index}`]], { type: "image/png" }));
          const image = make("img", { src: url, alt: text, onload: () => URL.revokeObjectURL(url) });
          images.append(make("figure", { classes: index < answer.own ? "own" : "" }, image,
            make("figcaption", { textContent: text })));
        });
        const note = answer.own ? `The first ${answer.own}: of this caption.` : "None is of this caption.";
        return [make("p", { classes: "quiet", textContent: caption ? note : "" }), images];
      });
    },
  };
  const offered = [
    ...(features ? [["tokens", "Tokens by layers"], ["nearest", "Nearest captions"]] : []),
    ...(features ? [["layers", "Layers by layers"]] : []),
    ...(run ? [["weights", "Weights"]] : []),
    ...(run && features ? [["reads", `What a ${run.block} reads`]] : []),
    ...(run?.samples ? [["samples", "Images"]] : []),
  ];
  let tab = run ? "weights" : offered[0][0];
  const buttons = offered.map(([key, name]) => make("button", {
    type: "button", textContent: name, data: { role: "tab" }, onclick: () => { tab = key; show(); },
  }));
  const show = () => {
    turn += 1;
    buttons.forEach((button, place) => button.setAttribute("aria-selected", String(offered[place][0] === tab)));
    tabs[tab]();
  };
  const list = make("table");
  for (const [name, value] of main.facts) {
    list.append(make("tr", {}, make("th", { textContent: name }), make("td", { textContent: value })));
  }
  const node = make(
    "section", { data: { "aria-label": main.title } },
    make("h3", { textContent: main.title }),
    make("details", {}, make("summary", { textContent: "facts" }), list),
    chosen, make("div", { classes: "tabs", data: { role: "tablist" } }, ...buttons), panel,
  );
  show();

  // Opens a caption by its number here, or by its text where the number is another store's.
  const open = async (id, text) => {
    if (!features) return null;
    try {
      const found = text === null ? id : (await ask(number, "find", { text })).caption;
      if (found === null) {
        caption = null;
        chosen.textContent = "This caption is not in this store.";
        show();
        return null;
      }
      caption = await ask(number, "caption", { caption: found });
    } catch (error) {
      caption = null;
      chosen.replaceChildren(make("span", { classes: "error", textContent: error.message }));
      show();
      return null;
    }
    chosen.textContent = caption.text;
    if (!features.named) {
      chosen.append(make("span", { classes: "quiet", textContent: "  (tokens have numbers: name the LLM with tokenizer=)" }));
    }
    show();
    return caption;
  };
  return { node, open };
}

function render({ model, el }) {
  const { ask, close } = connect(model);
  const facts = model.get("facts");
  const first = facts.findIndex((side) => side.features);
  const root = make("div", { classes: "semroute-explorer" });
  const theme = document.body.dataset.jpThemeLight;
  if (theme !== undefined) root.classList.add(theme === "true" ? "light" : "dark");

  let chosen = 0;
  const choose = async (side, id) => {
    chosen += 1;
    const mine = chosen;
    const caption = await sides[side].open(id, null);
    if (mine !== chosen || caption === null) return;
    results.mark(side === first ? id : null);
    await Promise.all(sides.filter((_, other) => other !== side).map((other) => other.open(null, caption.exact)));
  };
  const sides = facts.map((side, number) => openSide(number, side, model.get("colours"), ask, (id) => choose(number, id)));
  const results = captionList("captions found", (id) => choose(first, id));
  const count = make("p", { classes: "quiet", data: { "aria-live": "polite" } });
  let typed = 0;
  const search = async (words, open) => {
    typed += 1;
    const mine = typed;
    try {
      const answer = await ask(first, "search", { words });
      if (mine !== typed) return;
      const shown = answer.captions.length;
      const noun = answer.count === 1 ? "caption" : "captions";
      const part = answer.count > shown ? `, the first ${shown}` : "";
      count.textContent = `${answer.count.toLocaleString("en")} ${noun}${part}`;
      results.fill(answer.captions, (row) => `${row[1]} tok.`);
      if (open && shown) choose(first, answer.captions[Math.min(1, shown - 1)][0]);
    } catch (error) {
      count.textContent = error.message;
    }
  };
  const input = make("input", { type: "search", placeholder: "search captions", data: { "aria-label": "search captions" } });
  let timer = null;
  input.oninput = () => {
    clearTimeout(timer);
    timer = setTimeout(() => search(input.value, false), PAUSE);
  };
  input.onkeydown = (event) => {
    event.stopPropagation(); // keys are not commands of the notebook
    if (event.key !== "ArrowDown") return;
    event.preventDefault();
    results.list.firstElementChild?.focus();
  };
  const left = make("div", {}, input, count, results.list);
  if (first < 0) left.replaceChildren(make("p", { classes: "quiet", textContent: "The features of this run are not here: name a store with features=." }));
  const columns = make("div", { classes: facts.length > 1 ? "columns pair" : "columns" }, left, ...sides.map((side) => side.node));
  root.append(columns);
  el.append(root);
  if (first >= 0) search("", true);
  return close;
}

export default { render };

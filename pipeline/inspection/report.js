// Search over the captions of the page. Texts are set as text.
const PAGE = 50;
const rows = JSON.parse(document.getElementById("rows").textContent);
const lower = rows.map((row) => row[2].toLowerCase());
const words = document.getElementById("words");
const table = document.getElementById("found");
const count = document.getElementById("count");
const more = document.getElementById("more");
let found = [];
let shown = 0;

function append() {
  for (const [caption, tokens, text] of found.slice(shown, shown + PAGE)) {
    const line = table.tBodies[0].insertRow();
    for (const cell of [caption, tokens, text || "(the null caption)"]) {
      line.insertCell().textContent = cell;
    }
  }
  shown = Math.min(found.length, shown + PAGE);
  const total = found.length.toLocaleString("en");
  const part = found.length > shown ? `, the first ${shown}` : "";
  count.textContent = `${total} ${found.length === 1 ? "caption" : "captions"}${part}`;
  more.hidden = shown === found.length;
}

function search() {
  const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  found = rows.filter((_, place) => wanted.every((word) => lower[place].includes(word)));
  shown = 0;
  table.tBodies[0].replaceChildren();
  append();
}

words.addEventListener("input", search);
more.addEventListener("click", append);
document.addEventListener("keydown", (event) => {
  const typing = event.target === words;
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    words.focus();
  } else if (event.key === "Escape" && typing) {
    words.value = "";
    search();
  }
});
search();

"use strict";
// A table's rows by one column: numbers first and as numbers, then words, what is missing last in both directions.
const words = new Intl.Collator("en", {numeric: true});
const kind = (cell) => ("missing" in cell.dataset ? 2 : "order" in cell.dataset ? 0 : 1);
const compared = (a, b) => kind(a) === 0
  ? Number(a.dataset.order) - Number(b.dataset.order) || 0 // of two infinities there is no difference
  : words.compare(a.textContent, b.textContent);

for (const table of document.querySelectorAll("table.sortable")) {
  const printed = [...table.tBodies[0].rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const next = {none: "ascending", ascending: "descending", descending: "none"}[head.getAttribute("aria-sort")];
    heads.forEach((other) => other.setAttribute("aria-sort", other === head ? next : "none"));
    const sign = next === "descending" ? -1 : 1;
    const sorted = next === "none" ? printed : [...printed].sort((x, y) => {
      const [a, b] = [x.cells[column], y.cells[column]];
      return kind(a) === 2 || kind(b) === 2 ? kind(a) - kind(b) : sign * (kind(a) - kind(b) || compared(a, b));
    });
    table.tBodies[0].append(...sorted);
  }));
}

// a link to a run opens its section
const open = () => {
  const section = location.hash && document.getElementById(location.hash.slice(1));
  if (section instanceof HTMLDetailsElement) {
    section.open = true;
  }
};
addEventListener("hashchange", open);
open();

// Sorts the table of layers by the column whose heading was clicked. Every layer is a tbody, so that
// rows that belong together stay together. Numbers are those of data-v; unknown ones come last in
// either direction.
"use strict";
for (const table of document.querySelectorAll("table.layers")) {
  const heads = [...table.tHead.rows[0].cells];
  const bodies = [...table.tBodies];
  const value = (body, k) => {
    const cell = body.rows[0].cells[k];
    if (!cell.hasAttribute("data-v")) return cell.textContent.trim();
    const v = cell.dataset.v;
    return v === "inf" ? Infinity : v === "" || v === "nan" ? null : Number(v);
  };
  heads.forEach((head, k) => head.firstElementChild.addEventListener("click", () => {
    const numeric = bodies.some((body) => body.rows[0].cells[k].hasAttribute("data-v"));
    const before = head.getAttribute("aria-sort");
    const down = before === "none" ? numeric : before === "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = bodies.map((body) => [value(body, k), body]);
    const compare = new Intl.Collator(undefined, { numeric: true }).compare;
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = numeric ? (a > b) - (a < b) : compare(a, b);
      return down ? -order : order;
    });
    table.append(...keyed.map(([, body]) => body));
  }));
}

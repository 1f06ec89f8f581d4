"use strict";
// Heads of tables sort their rows; without scripts the tables are as they were written.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.querySelectorAll("thead th")];
  const body = table.querySelector("tbody");
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      const key = (row) => {
        const cell = row.children[column];
        return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
      };
      const order = (a, b) => {
        const [one, two] = [key(a), key(b)];
        if (typeof one !== typeof two) return typeof one === "number" ? -1 : 1;
        const less = typeof one === "number" ? one - two : one.localeCompare(two, undefined, { numeric: true });
        return descending ? -less : less;
      };
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      body.append(...[...body.rows].sort(order));
    });
  });
}

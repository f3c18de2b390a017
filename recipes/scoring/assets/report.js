"use strict";
// Buttons in the heads of tables sort them by a column; one player plays at a time.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        const value = cell.dataset.value;
        return value === undefined ? cell.textContent.trim() : value === "" ? null : Number(value);
      };
      const order = (a, b) => {
        const [first, second] = [key(a), key(b)];
        // Cells without a number stay at the end.
        if (first === null || second === null) return (first === null) - (second === null);
        const less = typeof first === "number" ? first - second : first.localeCompare(second);
        return down ? -less : less;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
document.addEventListener("play", (event) => {
  for (const player of document.querySelectorAll("audio")) {
    if (player !== event.target) player.pause();
  }
}, true);

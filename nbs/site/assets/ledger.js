"use strict";
// Sorting and filtering of the ledger. Without this script the table is complete, in the order of the book.
(function () {
  const table = document.getElementById("ledger");
  const form = document.getElementById("ledger-filters");
  const count = document.getElementById("ledger-count");
  if (!table || !form) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());

  function filter() {
    const wanted = {};
    for (const control of form.querySelectorAll("[data-filter]")) wanted[control.dataset.filter] = control.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = ["part", "verdict", "preset"].every((name) => !wanted[name] || row.dataset[name] === wanted[name]) &&
        wanted.text.split(/\s+/).every((word) => row.textContent.toLowerCase().includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown + " of " + rows.length + " claims";
  }
  form.addEventListener("input", filter);

  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.textContent = "";
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const numeric = head.dataset.kind === "number";
      const value = (row) => {
        const cell = row.cells[column];
        if (!numeric) return cell.textContent.trim();
        return cell.dataset.value === "" ? NaN : Number(cell.dataset.value);
      };
      const ordered = rows.slice().sort((a, b) => {
        const x = value(a), y = value(b);
        if (numeric) {
          if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);  // what has no value comes last in both directions
          return up ? x - y : y - x;
        }
        return up ? x.localeCompare(y) : y.localeCompare(x);
      });
      body.append(...ordered);
    });
  });
  filter();
})();

"use strict";
(() => {
  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") !== "descending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows].sort((a, b) => {
          const x = value(a, column), y = value(b, column);
          const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
          return falling ? -order : order;
        });
        body.append(...rows);
      });
    });
  }

  for (const browser of document.querySelectorAll(".browser")) {
    const search = browser.querySelector("input"), subset = browser.querySelector("select");
    const open = browser.querySelector("[data-open]"), count = browser.querySelector(".count");
    const cases = [...browser.querySelectorAll("details")];
    const filter = () => {
      const words = search.value.toLowerCase();
      let shown = 0;
      for (const one of cases) {
        one.hidden = (subset.value !== "" && one.dataset.subset !== subset.value) || !one.textContent.toLowerCase().includes(words);
        shown += one.hidden ? 0 : 1;
      }
      count.textContent = shown === cases.length ? `${shown} pairs` : `${shown} of ${cases.length} pairs`;
    };
    search.addEventListener("input", filter);
    subset.addEventListener("input", filter);
    open.addEventListener("click", () => {
      const all = open.dataset.open === "all";
      for (const one of cases) one.open = all;
      open.dataset.open = all ? "none" : "all";
      open.textContent = all ? "Close all" : "Open all";
    });
  }
})();

// What readers with a keyboard or a screen reader need, and the theme leaves out.
const name = (selector, label) =>
  document.querySelectorAll(selector).forEach(part => part.setAttribute("aria-label", label));

const reach = () => {
  for (const part of document.querySelectorAll("pre, .table-wrapper, .math, .output")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
};

// Tables that do not fit are stacked: a row is lines of cells, each after the name of its column.
// Browsers take the roles of a table from its layout, so that they have to be stated.
const tables = () => [...document.querySelectorAll(".table-wrapper > table")];
const label = table => {
  const columns = [...table.querySelectorAll("thead th")].map(head => head.innerText.trim());
  table.role = "table";
  for (const row of table.rows) {
    row.role = "row";
    [...row.cells].forEach((cell, i) => {
      cell.role = cell.tagName === "TH" ? "columnheader" : "cell";
      cell.dataset.column = columns[i] ?? "";
    });
  }
};
const stack = () => {
  const all = tables();
  all.forEach(table => table.classList.remove("stacked"));
  const wide = all.filter(table => table.parentElement.scrollWidth > table.parentElement.clientWidth + 1);
  wide.forEach(table => table.classList.add("stacked"));
};

addEventListener("resize", () => { stack(); reach(); });
addEventListener("DOMContentLoaded", () => {
  tables().forEach(label);
  stack();
  reach();
  name(".sidebar-drawer", "All pages");
  name(".toc-drawer", "Parts of this page");
  for (const heading of document.querySelectorAll(".caption[role=heading]")) {
    heading.setAttribute("aria-level", "2");
  }
});

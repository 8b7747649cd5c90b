// What readers with a keyboard or a screen reader need, and the theme leaves out.
const name = (selector, label) =>
  document.querySelectorAll(selector).forEach(part => part.setAttribute("aria-label", label));

const reach = () => {
  for (const part of document.querySelectorAll("pre, .table-wrapper, .math, .output")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
};

addEventListener("resize", reach);
addEventListener("DOMContentLoaded", () => {
  reach();
  name(".sidebar-drawer", "All pages");
  name(".toc-drawer", "Parts of this page");
  for (const heading of document.querySelectorAll(".caption[role=heading]")) {
    heading.setAttribute("aria-level", "2");
  }
});

// Light or dark before the first paint: what the reader chose, else what the system says.
"use strict";
(() => {
  const stored = () => {
    try {
      return localStorage.getItem("gazetteer-theme");
    } catch {
      return null;
    }
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    document.documentElement.dataset.theme = stored() || (dark.matches ? "dark" : "light");
  };
  apply();
  dark.addEventListener("change", apply);
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      document.documentElement.dataset.theme = next;
      try {
        localStorage.setItem("gazetteer-theme", next);
      } catch {
        // Without storage the choice lasts for this page.
      }
    });
  });
})();

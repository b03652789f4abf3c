// Sets the chosen theme before anything is painted, so that a dark page never flashes white. A plain script: it must not wait.
"use strict";
(() => {
  try {
    const chosen = localStorage.getItem("stoker.theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch {
    // Storage is forbidden: the system's theme holds.
  }
})();

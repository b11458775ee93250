// For readers of screens and keyboards: the theme's blocks of code are told apart, and wide tables can be scrolled.
new MutationObserver(() => {
  document.querySelectorAll(".md-code__nav").forEach((one, place) => {
    if (!one.hasAttribute("aria-label")) one.setAttribute("aria-label", `Code ${place + 1}`);
  });
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((one) => {
    if (one.tabIndex < 0) one.tabIndex = 0;
  });
}).observe(document.body, { childList: true, subtree: true });

// Applies the chosen theme before the page is painted; everything else waits for app.js.
try {
  const { theme } = JSON.parse(localStorage.getItem("glm5/preferences")) ?? {};
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Nothing stored, or no storage: the system's setting holds.
}

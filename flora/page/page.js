"use strict";
// Draws the plots in the page's colours, sorts tables, and keeps the choice of light or dark. Asks the network for nothing.
(() => {
  const { figures, light, dark } = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const wantsDark = matchMedia("(prefers-color-scheme: dark)");
  const PRINT = { narrow: 315, wide: 650 };
  let printing = false;

  const isDark = () => !printing && (root.dataset.theme === "dark" || (root.dataset.theme !== "light" && wantsDark.matches));
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)).join(",");
  const swaps = light.flatMap((hue, n) => [[hue, dark[n]], [`rgba(${rgb(hue)},`, `rgba(${rgb(dark[n])},`]]);

  // A copy of a figure's data with the dark hues in the place of the light ones, wherever a colour stands.
  const recoloured = (value, key) => {
    if (Array.isArray(value)) return value.map((one) => recoloured(one, key));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, recoloured(one, name)]));
    if (typeof value !== "string" || !isDark() || !/color$/i.test(key)) return value;
    const swap = swaps.find(([from]) => value.startsWith(from));
    return swap ? swap[1] + value.slice(swap[0].length) : value;
  };

  const themed = (given, box) => {
    const style = getComputedStyle(root);
    const colour = (name, onPaper) => (printing ? onPaper : style.getPropertyValue(name).trim());
    const ink = colour("--ink", "#000000"), soft = colour("--soft", "#444444"), grid = colour("--grid", "#dddddd");
    const layout = recoloured(structuredClone(given), "layout");
    const small = printing || box.clientWidth < 480;
    const axis = { gridcolor: grid, linecolor: grid, tickfont: { color: soft, size: small ? 11 : 12 }, ticks: "" };
    for (const name of Object.keys(layout).filter((one) => /^[xy]axis/.test(one))) {
      Object.assign(layout[name], axis);
      layout[name].title = { ...layout[name].title, font: { color: soft, size: small ? 11 : 12 } };
    }
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: small ? 11 : 12 },
      hoverlabel: { bgcolor: colour("--card", "#ffffff"), bordercolor: colour("--rule", "#bbbbbb"), font: { color: ink }, align: "left",
        namelength: 24 },
    });
    if (printing) layout.width = box.closest("figure").classList.contains("wide") ? PRINT.wide : PRINT.narrow;
    return layout;
  };

  const draw = () => {
    for (const [id, figure] of Object.entries(figures)) {
      const box = document.getElementById(id);
      Plotly.react(box, recoloured(figure.data, "data"), themed(figure.layout, box),
        { responsive: true, displayModeBar: false, doubleClick: false, showTips: false });
    }
  };

  // Theme: as the system says, or as chosen here.
  const THEMES = ["auto", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("flora-theme"); } catch { return null; } };
  const setTheme = (theme) => {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    document.getElementById("theme-name").textContent = theme;
    try { localStorage.setItem("flora-theme", theme); } catch { /* a page from a disk may keep nothing */ }
  };
  setTheme(THEMES.includes(stored()) ? stored() : "auto");
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(THEMES[(THEMES.indexOf(root.dataset.theme ?? "auto") + 1) % THEMES.length]);
    draw();
  });
  wantsDark.addEventListener("change", draw);
  addEventListener("beforeprint", () => { printing = true; draw(); });
  addEventListener("afterprint", () => { printing = false; draw(); });

  // Tables: a click on a column's name sorts by it, a second one the other way; cells without a value stay last.
  const sort = (head) => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const numeric = head.classList.contains("n");
    const key = (row) => (numeric ? parseFloat(row.cells[column].dataset.v) : row.cells[column].textContent.trim());
    const missing = (value) => (numeric ? Number.isNaN(value) : value === "–");
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => missing(a) - missing(b) || way * (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true })) || 0);
    body.append(...rows.map(([, row]) => row));
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
  };
  for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button.closest("th")));

  draw();
})();

"use strict";
(() => {
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };
  const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x"];
  const byId = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(byId(id).textContent);
  // figures know some HTML: names from files must not be taken as such
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const draw = (id, figure) => Plotly.react(id, figure.data, figure.layout, config);

  function choices(select) {
    const id = select.dataset.choice;
    const show = () => draw(id, read(`${id}-${select.value}`));
    select.addEventListener("change", show);
    show();
  }

  function fill(select, texts) {
    texts.forEach((text, k) => select.add(new Option(text, String(k))));
  }

  function spread(values) {
    const finite = values.filter((v) => v !== null);
    const low = Math.min(...finite);
    return low > 0 && Math.max(...finite) / low > 50 ? "log" : "linear";
  }

  function scatter(plot) {
    const data = read(`${plot.id}-data`);
    const [measure, colour] = ["measure", "colour"].map((part) => byId(`${plot.id}-${part}`));
    fill(measure, data.measures.map((m) => m.label));
    fill(colour, data.hyperparameters.map((h) => h.name));
    const describe = (i) =>
      data.hyperparameters.map((h) => `${plain(h.name)} = ${plain(h.values[i] ?? "–")}`).join("<br>");
    const layout = (x) => ({
      height: 480,
      autosize: true,
      hovermode: "closest",
      font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 13 },
      paper_bgcolor: "#fff",
      plot_bgcolor: "#fff",
      margin: { l: 72, r: 16, t: 32, b: 48 },
      legend: { orientation: "h", yanchor: "bottom", y: 1.0, x: 0 },
      hoverlabel: { align: "left" },
      xaxis: { title: { text: plain(x.label) }, type: spread(x.values), gridcolor: "#e3e6ea", zeroline: false, automargin: true },
      yaxis: { title: { text: "generalization gap", standoff: 14 }, tickformat: ".1%", gridcolor: "#e3e6ea", zeroline: false, automargin: true },
    });
    const show = () => {
      const x = data.measures[measure.value];
      const h = data.hyperparameters[colour.value];
      const levels = h ? [...h.levels, null] : [null];
      const traces = [];
      levels.forEach((level, k) => {
        const rows = data.models.map((_, i) => i).filter(
          (i) => x.values[i] !== null && data.gaps[i] !== null && (!h || h.values[i] === level)
        );
        if (rows.length === 0) return;
        traces.push({
          type: "scatter",
          mode: "markers",
          name: h ? `${plain(h.name)} = ${plain(level ?? "–")}` : "models",
          showlegend: Boolean(h),
          x: rows.map((i) => x.values[i]),
          y: rows.map((i) => data.gaps[i]),
          customdata: rows.map((i) => [plain(data.models[i]), describe(i)]),
          hovertemplate: "<b>model %{customdata[0]}</b><br>measure %{x:.4g}, gap %{y:.2%}<br>%{customdata[1]}<extra></extra>",
          marker: { size: 9, opacity: 0.85, color: data.colours[k % data.colours.length], symbol: symbols[k % symbols.length], line: { width: 0.5, color: "#fff" } },
        });
      });
      byId(`${plot.id}-note`).textContent = x.note;
      Plotly.react(plot.id, traces, layout(x), config);
    };
    measure.addEventListener("change", show);
    colour.addEventListener("change", show);
    show();
  }

  function sortable(table) {
    const headings = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const key = (row, column) => {
      const cell = row.cells[column];
      const value = cell.dataset.value;
      return value === undefined ? cell.textContent : value === "" ? null : Number(value);
    };
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    headings.forEach((heading, column) => {
      const button = heading.querySelector("button");
      button.addEventListener("click", () => {
        const first = button.dataset.sort === "text" ? "ascending" : button.dataset.first ?? "descending";
        const other = first === "ascending" ? "descending" : "ascending";
        const direction = heading.getAttribute("aria-sort") === first ? other : first;
        headings.forEach((h) => h.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", direction);
        const sign = direction === "ascending" ? 1 : -1;
        const rows = [...body.rows].map((row) => [key(row, column), row]);
        rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  document.querySelectorAll("select[data-choice]").forEach(choices);
  document.querySelectorAll("[data-figure]").forEach((plot) => draw(plot.id, read(`${plot.id}-data`)));
  document.querySelectorAll("[data-scatter]").forEach(scatter);
  document.querySelectorAll("table.ranking").forEach(sortable);
  const fit = () => document.querySelectorAll(".plot").forEach((plot) => Plotly.Plots.resize(plot));
  window.addEventListener("beforeprint", fit);
  window.addEventListener("afterprint", fit);
})();

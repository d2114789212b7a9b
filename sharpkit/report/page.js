"use strict";
(() => {
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };
  const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x"];
  const byId = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(byId(id).textContent);
  // figures know some HTML: names from files must not be taken as such
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const unplain = (text) => text.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
  const narrow = window.matchMedia("(max-width: 640px)");
  const shows = []; // all figures, drawn again when the screen becomes narrow or wide
  const register = (show) => {
    shows.push(show);
    show();
  };

  // the ends of a name tell more than its middle
  function shortened(text, most) {
    const letters = [...unplain(text)];
    if (letters.length <= most) return text;
    const first = Math.floor(most / 4);
    return plain(`${letters.slice(0, first).join("")}…${letters.slice(first + 1 - most).join("")}`);
  }

  // what needs a wide screen has another form on a narrow one
  function fitted({ data, layout }) {
    if (!narrow.matches) return { data, layout };
    const kind = layout.meta?.kind;
    layout.margin = { ...layout.margin, l: 44, r: 6 };
    layout.font = { ...layout.font, size: 11 };
    if (kind === "rows") {
      // each name above its row, inside the figure
      const rows = layout.yaxis.ticktext.length;
      layout.height += 20 * rows;
      layout.margin.l = 12;
      const { tickvals, ticktext } = layout.yaxis;
      layout.annotations = tickvals.map((place, k) => ({ xref: "paper", x: 0, xanchor: "left", y: place + 0.3, yanchor: "bottom", yshift: -2, showarrow: false, text: shortened(ticktext[k], 44) }));
      Object.assign(layout.yaxis, { title: { text: "" }, showticklabels: false, showgrid: false, range: [-0.6, rows] });
      data.forEach((trace) => { if (trace.type === "bar") trace.width = 0.46; });
    }
    if (kind === "map") {
      const axes = [[layout.xaxis, data[0].x, 20], [layout.yaxis, data[0].y, 22]];
      axes.forEach(([axis, names, most]) =>
        Object.assign(axis, { tickmode: "array", tickvals: names, ticktext: names.map((text) => shortened(text, most)), tickfont: { size: 8 } })
      );
      layout.xaxis.tickangle = -90;
      Object.assign(data[0].colorbar, { orientation: "h", y: 0, yanchor: "top", title: { ...data[0].colorbar.title, side: "top" } });
      layout.margin.b = 70;
    }
    return { data, layout };
  }

  const put = (id, data, layout) => {
    byId(id).style.height = `${layout.height}px`; // plotly asks for it when the window changes
    Plotly.react(id, data, layout, config);
  };
  const draw = (id, figure) => {
    const { data, layout } = fitted(figure);
    put(id, data, layout);
  };

  function choices(select) {
    const id = select.dataset.choice;
    const show = () => draw(id, read(`${id}-${select.value}`));
    select.addEventListener("change", show);
    register(show);
  }

  function fill(select, texts) {
    texts.forEach((text, k) => select.add(new Option(text, String(k))));
  }

  function spread(values) {
    const finite = values.filter((v) => v !== null);
    if (finite.length === 0) return "linear";
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
    const named = data.models.length <= 16;
    const layout = (x) => ({
      height: 480,
      autosize: true,
      hovermode: "closest",
      font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: narrow.matches ? 11 : 13 },
      paper_bgcolor: "#fff",
      plot_bgcolor: "#fff",
      margin: narrow.matches ? { l: 48, r: 8, t: 32, b: 48 } : { l: 72, r: 16, t: 32, b: 48 },
      legend: { orientation: "h", yanchor: "bottom", y: 1.0, x: 0 },
      hoverlabel: { align: "left" },
      xaxis: { title: { text: narrow.matches ? shortened(plain(x.label), 36) : plain(x.label) }, type: spread(x.values), gridcolor: "#e3e6ea", zeroline: false, automargin: true },
      yaxis: { title: { text: data.title, standoff: 14 }, gridcolor: "#e3e6ea", zeroline: false, automargin: true },
    });
    const show = () => {
      const x = data.measures[measure.value];
      const h = data.hyperparameters[colour.value];
      const levels = h ? [...h.levels, null] : [null];
      const traces = [];
      const log = spread(x.values) === "log";
      const scaled = x.values.map((v, i) => (v === null || data.gaps[i] === null ? null : log ? Math.log(v) : v));
      const there = scaled.filter((v) => v !== null);
      const [low, high] = [Math.min(...there), Math.max(...there)];
      // a name stands on the side where there is room
      const side = (i) => (scaled[i] - low > (high - low) / 2 ? "left" : "right");
      levels.forEach((level, k) => {
        const rows = data.models.map((_, i) => i).filter(
          (i) => x.values[i] !== null && data.gaps[i] !== null && (!h || h.values[i] === level)
        );
        if (rows.length === 0) return;
        traces.push({
          type: "scatter",
          mode: named ? "markers+text" : "markers",
          text: named ? rows.map((i) => shortened(plain(data.models[i]), narrow.matches ? 18 : 32)) : undefined,
          textposition: named ? rows.map((i) => `middle ${side(i)}`) : undefined,
          textfont: { size: narrow.matches ? 10 : 12, color: "#1b2430" },
          cliponaxis: false,
          name: h ? `${plain(h.name)} = ${plain(level ?? "–")}` : "models",
          showlegend: Boolean(h),
          x: rows.map((i) => x.values[i]),
          y: rows.map((i) => data.gaps[i]),
          customdata: rows.map((i) => [plain(data.models[i]), describe(i)]),
          hovertemplate: `<b>model %{customdata[0]}</b><br>measure %{x:.4g}<br>${data.title} %{y:.4g}<br>%{customdata[1]}<extra></extra>`,
          marker: { size: 9, opacity: 0.85, color: data.colours[k % data.colours.length], symbol: symbols[k % symbols.length], line: { width: 0.5, color: "#fff" } },
        });
      });
      byId(`${plot.id}-note`).textContent = x.note;
      put(plot.id, traces, layout(x));
    };
    measure.addEventListener("change", show);
    colour.addEventListener("change", show);
    register(show);
  }

  // a table of which only one page of rows is in the document at a time
  function paged(table) {
    const rows = read(`${table.dataset.pages}-rows`);
    const pager = byId(`${table.dataset.pages}-pager`);
    const [previous, next] = pager.querySelectorAll("button");
    const body = table.tBodies[0];
    const size = body.rows.length;
    let order = rows.map((_, i) => i);
    let start = 0;
    const collator = new Intl.Collator("en", { numeric: true });
    const number = (cell) => {
      const value = Number(typeof cell === "string" ? cell : cell[0]);
      return Number.isNaN(value) ? null : value;
    };
    const cellOf = (cell) => {
      const [text, small, title] = typeof cell === "string" ? [cell] : cell;
      const minus = (number) => number.replace(/-/g, "−");
      const td = document.createElement("td");
      td.textContent = minus(text);
      if (title) td.title = title;
      if (small) td.append(Object.assign(document.createElement("small"), { textContent: `± ${minus(small)}` }));
      return td;
    };
    const rowOf = ([name, ...cells]) => {
      const th = Object.assign(document.createElement("th"), { scope: "row", className: "name", textContent: name });
      const tr = document.createElement("tr");
      tr.append(th, ...cells.map(cellOf));
      return tr;
    };
    const show = (first) => {
      start = Math.max(0, Math.min(first, rows.length - 1));
      const page = order.slice(start, start + size);
      body.replaceChildren(...page.map((i) => rowOf(rows[i])));
      pager.querySelector("span").textContent =
        `rows ${(start + 1).toLocaleString("en")} to ${(start + page.length).toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
      previous.disabled = start === 0;
      next.disabled = start + size >= rows.length;
    };
    previous.addEventListener("click", () => show(start - size));
    next.addEventListener("click", () => show(start + size));
    return (column, sign) => {
      const keys = rows.map((row) => (column === 0 ? row[0] : number(row[column])));
      const compare = column === 0 ? collator.compare : (a, b) => a - b;
      order.sort((i, j) => {
        const [a, b] = [keys[i], keys[j]];
        return a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b);
      });
      show(0);
    };
  }

  function sortable(table) {
    const headings = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const sortPages = table.dataset.pages ? paged(table) : null;
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
        if (sortPages) return sortPages(column, sign);
        const rows = [...body.rows].map((row) => [key(row, column), row]);
        rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  document.querySelectorAll("select[data-choice]").forEach(choices);
  document.querySelectorAll("[data-figure]").forEach((plot) => register(() => draw(plot.id, read(`${plot.id}-data`))));
  document.querySelectorAll("[data-scatter]").forEach(scatter);
  document.querySelectorAll("table.sortable").forEach(sortable);
  narrow.addEventListener("change", () => {
    // a colour bar that changes its side would leave the old one's ticks behind
    document.querySelectorAll(".plot").forEach((plot) => Plotly.purge(plot));
    shows.forEach((show) => show());
  });
  const fit = () => document.querySelectorAll(".plot").forEach((plot) => Plotly.Plots.resize(plot));
  window.addEventListener("beforeprint", fit);
  window.addEventListener("afterprint", fit);
})();

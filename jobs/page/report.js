// Values under the pointer: each chart carries its own numbers in data-chart.
for (const chart of document.querySelectorAll("[data-chart]")) {
  const svg = chart.querySelector("svg");
  const tip = chart.querySelector(".tip");
  const cursor = chart.querySelector(".cursor");
  const { xLabel, series } = JSON.parse(chart.dataset.chart);
  const width = svg.viewBox.baseVal.width;

  const nearest = (positions, at) => {
    let best = 0;
    positions.forEach((x, i) => {
      if (Math.abs(x - at) < Math.abs(positions[best] - at)) best = i;
    });
    return best;
  };
  const hide = () => {
    tip.hidden = true;
    cursor.style.visibility = "hidden";
  };
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const first = nearest(series[0].px, at);
    const x = series[0].px[first];
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = `${xLabel} ${Math.round(series[0].x[first]).toLocaleString("en")}`;
    tip.append(head);
    for (const line of series) {
      const row = document.createElement("div");
      const value = line.text[nearest(line.px, x)];
      row.textContent = series.length > 1 ? `${line.name} ${value}` : value;
      tip.append(row);
    }
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    tip.hidden = false;
    const outer = chart.getBoundingClientRect();
    const left = box.left - outer.left + (x / width) * box.width;
    const right = left + 12 + tip.offsetWidth > outer.width;
    tip.style.left = `${right ? left - tip.offsetWidth - 12 : left + 12}px`;
    tip.style.top = `${box.top - outer.top + 8}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

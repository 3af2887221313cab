"use strict";
// Two explorers, without libraries. Each finds its place by data-explorer and draws into an SVG of its own.
(function () {
  const NS = "http://www.w3.org/2000/svg";
  const svg = (name, attributes, parent) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (parent) parent.append(node);
    return node;
  };
  const element = (name, attributes, parent) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) key === "text" ? (node.textContent = value) : node.setAttribute(key, value);
    if (parent) parent.append(node);
    return node;
  };
  let counter = 0;
  function slider(place, text, low, high, step, start, show) {
    const id = "kd-slider-" + counter++;
    const label = element("label", { for: id }, place);
    element("span", { text }, label);
    const input = element("input", { type: "range", id, min: low, max: high, step }, label);
    input.value = start;
    const output = element("output", { for: id }, label);
    const update = () => { output.textContent = show(Number(input.value)); };
    input.addEventListener("input", update);
    update();
    return { input, get value() { return Number(input.value); }, set value(v) { input.value = v; update(); } };
  }

  function softmax(logits, temperature) {
    const top = Math.max(...logits);
    const weights = logits.map((z) => Math.exp((z - top) / temperature));
    const total = weights.reduce((a, b) => a + b, 0);
    return weights.map((w) => w / total);
  }
  const entropy = (p) => -p.reduce((sum, x) => sum + (x > 0 ? x * Math.log(x) : 0), 0);

  function temperature(place) {
    const names = ["cat", "dog", "fox", "car", "truck"];
    const start = [8, 5.2, 3.7, 1, -0.2];
    const picture = svg("svg", { viewBox: "0 0 640 260", role: "img" }, place);
    const title = svg("title", {}, picture);
    const bars = names.map((name, i) => {
      const x = 40 + i * 120;
      const bar = svg("rect", { x, width: 80, rx: 3, style: "fill:var(--kd-teacher)" }, picture);
      const value = svg("text", { x: x + 40, "text-anchor": "middle", "font-size": 15, style: "fill:var(--kd-ink)" }, picture);
      const label = svg("text", { x: x + 40, y: 250, "text-anchor": "middle", "font-size": 15, style: "fill:var(--kd-ink)" }, picture);
      label.textContent = name;
      return { bar, value };
    });
    // the slider moves the logarithm, so that 0.25 to 1 is as long as 4 to 16
    const heat = slider(place, "temperature", -2, 5, 0.05, 0, (v) => (2 ** v).toFixed(2));
    const logits = names.map((name, i) => slider(place, "logit of " + name, -4, 10, 0.1, start[i], (v) => v.toFixed(1)));
    const facts = element("p", { "aria-live": "polite" }, place);
    const again = element("button", { type: "button", text: "start again" }, place);
    function draw() {
      const tau = 2 ** heat.value;
      const z = logits.map((s) => s.value);
      const p = softmax(z, tau);
      p.forEach((x, i) => {
        const height = Math.max(1, 190 * x);
        bars[i].bar.setAttribute("y", 225 - height);
        bars[i].bar.setAttribute("height", height);
        bars[i].value.setAttribute("y", 218 - height);
        bars[i].value.textContent = x.toFixed(3);
      });
      const gradient = Math.max(...p.map((x) => Math.abs(1 / p.length - x))) / tau;
      facts.textContent = "Entropy " + entropy(p).toFixed(2) + " of at most " + Math.log(p.length).toFixed(2) + " nats. Largest gradient for a student that knows nothing: " +
        gradient.toFixed(4) + "; times temperature squared: " + (gradient * tau * tau).toFixed(3) + ".";
      title.textContent = "Probabilities at temperature " + tau.toFixed(2) + ": " + names.map((n, i) => n + " " + p[i].toFixed(3)).join(", ");
    }
    place.addEventListener("input", draw);
    again.addEventListener("click", () => { heat.value = 0; logits.forEach((s, i) => { s.value = start[i]; }); draw(); });
    draw();
  }

  const LOW = -6, HIGH = 6, POINTS = 241, STEP = (HIGH - LOW) / (POINTS - 1);
  const grid = Array.from({ length: POINTS }, (_, i) => LOW + i * STEP);
  const normal = (x, mean, width) => Math.exp(-0.5 * ((x - mean) / width) ** 2) / (width * Math.sqrt(2 * Math.PI));

  function divergences(place) {
    const picture = svg("svg", { viewBox: "0 0 640 300", role: "group", "aria-labelledby": "kd-divergences-title" }, place);
    const title = svg("title", { id: "kd-divergences-title" }, picture);
    const sx = (x) => 20 + (600 * (x - LOW)) / (HIGH - LOW);
    const TALL = 0.75, sy = (y) => 270 - (250 * Math.min(y, TALL)) / TALL;
    svg("line", { x1: 20, x2: 620, y1: 270, y2: 270, style: "stroke:var(--kd-soft)" }, picture);
    const area = svg("path", { style: "fill:var(--kd-teacher);fill-opacity:.2;stroke:var(--kd-teacher);stroke-width:3" }, picture);
    const forward = svg("path", { style: "fill:none;stroke:var(--kd-method);stroke-width:3" }, picture);
    const reverse = svg("path", { style: "fill:none;stroke:var(--kd-second);stroke-width:3;stroke-dasharray:9 5" }, picture);
    const legend = element("p", { class: "kd-legend" });
    ["▬ teacher", "▬ forward KL", "▪▪ reverse KL"].forEach((text, i) => element("span", { text, style: "color:var(--kd-" + ["teacher", "method", "second"][i] + ")" }, legend));
    place.prepend(legend);
    const middle = [slider(place, "place of the first bump", -5, 5, 0.1, -1.8, (v) => v.toFixed(1)), slider(place, "place of the second bump", -5, 5, 0.1, 2.2, (v) => v.toFixed(1))];
    const share = slider(place, "share of the first bump", 0.02, 0.98, 0.01, 0.6, (v) => v.toFixed(2));
    const widths = [slider(place, "width of the first bump", 0.3, 1.5, 0.05, 0.6, (v) => v.toFixed(2)), slider(place, "width of the second bump", 0.3, 1.5, 0.05, 0.75, (v) => v.toFixed(2))];
    const facts = element("p", { "aria-live": "polite" }, place);
    const handles = [0, 1].map((i) => svg("circle", { r: 11, class: "kd-handle", tabindex: 0, role: "slider", "aria-label": (i ? "second" : "first") + " bump of the teacher",
      "aria-valuemin": -5, "aria-valuemax": 5, style: "fill:var(--kd-teacher);stroke:var(--kd-back);stroke-width:3" }, picture));

    const teacher = (x) => share.value * normal(x, middle[0].value, widths[0].value) + (1 - share.value) * normal(x, middle[1].value, widths[1].value);
    const kl = (p, q) => STEP * p.reduce((sum, a, i) => sum + (a > 1e-12 ? a * (Math.log(a) - Math.log(q[i] + 1e-30)) : 0), 0);

    // KL(q || p) as a function of mean and width; a search with shrinking steps from each bump, the better end wins
    function fitReverse(p) {
      const loss = (m, s) => kl(grid.map((x) => normal(x, m, s)), p);
      let best = null;
      for (const i of [0, 1]) {
        let m = middle[i].value, s = widths[i].value, now = loss(m, s), size = 0.4;
        while (size > 0.004) {
          let moved = false;
          for (const [dm, ds] of [[size, 0], [-size, 0], [0, size], [0, -size]]) {
            const width = s * Math.exp(ds);
            if (width < 0.15 || width > 6) continue;
            const next = loss(m + dm, width);
            if (next < now - 1e-9) { m += dm; s = width; now = next; moved = true; break; }
          }
          if (!moved) size /= 2;
        }
        if (!best || now < best.loss) best = { m, s, loss: now };
      }
      return best;
    }
    const line = (values) => values.map((y, i) => (i ? "L" : "M") + sx(grid[i]).toFixed(1) + " " + sy(y).toFixed(1)).join("");
    function draw() {
      const p = grid.map(teacher);
      const mean = share.value * middle[0].value + (1 - share.value) * middle[1].value;
      const second = share.value * (widths[0].value ** 2 + middle[0].value ** 2) + (1 - share.value) * (widths[1].value ** 2 + middle[1].value ** 2);
      const width = Math.sqrt(second - mean ** 2);
      const q = grid.map((x) => normal(x, mean, width));
      const other = fitReverse(p);
      const r = grid.map((x) => normal(x, other.m, other.s));
      area.setAttribute("d", line(p) + "L620 270L20 270Z");
      forward.setAttribute("d", line(q));
      reverse.setAttribute("d", line(r));
      handles.forEach((handle, i) => {
        handle.setAttribute("cx", sx(middle[i].value));
        handle.setAttribute("cy", sy(teacher(middle[i].value)));
        handle.setAttribute("aria-valuenow", middle[i].value);
      });
      facts.textContent = "Forward student: mean " + mean.toFixed(2) + ", width " + width.toFixed(2) + ", KL(p‖q) = " + kl(p, q).toFixed(3) + " nats. Reverse student: mean " +
        other.m.toFixed(2) + ", width " + other.s.toFixed(2) + ", KL(q‖p) = " + other.loss.toFixed(3) + " nats.";
      title.textContent = "Teacher with bumps at " + middle[0].value + " and " + middle[1].value + ". " + facts.textContent;
    }
    const set = (i, value) => { middle[i].value = Math.max(-5, Math.min(5, Math.round(value * 10) / 10)); draw(); };
    handles.forEach((handle, i) => {
      const move = (event) => {
        const box = picture.getBoundingClientRect();
        set(i, LOW + ((HIGH - LOW) * (((event.clientX - box.left) * 640) / box.width - 20)) / 600);
      };
      handle.addEventListener("pointerdown", (event) => {
        handle.setPointerCapture(event.pointerId);
        handle.addEventListener("pointermove", move);
        event.preventDefault();
      });
      for (const end of ["pointerup", "pointercancel"]) handle.addEventListener(end, () => handle.removeEventListener("pointermove", move));
      handle.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -0.1, ArrowDown: -0.1, ArrowRight: 0.1, ArrowUp: 0.1, PageUp: 1, PageDown: -1 }[event.key];
        if (step) { set(i, middle[i].value + step); event.preventDefault(); }
      });
    });
    place.addEventListener("input", draw);
    draw();
  }

  for (const place of document.querySelectorAll("[data-explorer]")) ({ temperature, divergences })[place.dataset.explorer](place);
})();

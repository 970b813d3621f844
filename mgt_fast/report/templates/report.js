"use strict";
// Shows the values of a chart's curves at the pointer; the page is complete without.
for (const chart of document.querySelectorAll("svg[data-curve]")) {
  const { at, text } = JSON.parse(chart.dataset.curve);
  const readout = chart.parentElement.querySelector(".readout");
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const box = chart.viewBox.baseVal;
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", 12);
  cursor.setAttribute("y2", box.height - 44);
  chart.addEventListener("pointermove", (event) => {
    const bounds = chart.getBoundingClientRect();
    const x = ((event.clientX - bounds.left) / bounds.width) * box.width;
    let nearest = 0;
    at.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(at[nearest] - x)) nearest = i; });
    readout.textContent = text[nearest];
    cursor.setAttribute("x1", at[nearest]);
    cursor.setAttribute("x2", at[nearest]);
    chart.append(cursor);
  });
  chart.addEventListener("pointerleave", () => { readout.textContent = ""; cursor.remove(); });
}

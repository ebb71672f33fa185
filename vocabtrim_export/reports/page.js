// A button in each column's head sorts its table. Without scripts the tables stay as they are.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("thead th")];
  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[head.cellIndex];
      const compare = (a, b) => {
        const [x, y] = [key(a).dataset.value, key(b).dataset.value];
        if (x !== undefined && y !== undefined) return Number(x) - Number(y);
        return key(a).textContent.localeCompare(key(b).textContent, "en", { numeric: true });
      };
      body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
    });
  }
}

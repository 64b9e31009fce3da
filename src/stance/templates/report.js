"use strict";
// The table of statements. Whatever comes from the data is written as text (textContent), never as HTML.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [SPEAKER, CONTEXT, TEXT, TRUE, SAID, PROBABILITIES, SLICES] = [1, 2, 3, 4, 5, 6, 7];
  const WHERE = 0, PAGE = 25;
  const get = (id) => document.getElementById(id);
  const form = get("filter"), body = get("rows");
  let task = 0, found = [], page = 0;
  let haystack = null; // lower-case texts, made at the first search

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function fill(select, options) {
    select.replaceChildren(...options.map(([value, text]) => {
      const option = element("option", "", text);
      option.value = value;
      return option;
    }));
  }

  function labelsOf() {
    const labels = data.tasks[task].labels.map((label, index) => [index, label]);
    fill(get("f-true"), [["", "any"], ...labels, [-1, "not annotated"]]);
    fill(get("f-said"), [["", "any"], ...labels]);
  }

  const isWrong = (row) => row[TRUE][task] >= 0 && row[TRUE][task] !== row[SAID][task];
  const confidence = (row) => row[PROBABILITIES][task][row[SAID][task]];

  function choose() {
    const words = get("f-text").value.trim().toLowerCase();
    if (words && !haystack) haystack = data.rows.map((r) => [r[SPEAKER], r[CONTEXT], r[TEXT], r[WHERE]].join("\n").toLowerCase());
    const wanted = (id) => (get(id).value === "" ? null : Number(get(id).value));
    const isTrue = wanted("f-true"), said = wanted("f-said"), slice = wanted("f-slice");
    const onlyWrong = get("f-wrong").checked;
    found = [];
    data.rows.forEach((row, index) => {
      if (onlyWrong && !isWrong(row)) return;
      if (isTrue !== null && row[TRUE][task] !== isTrue) return;
      if (said !== null && row[SAID][task] !== said) return;
      if (slice !== null && !row[SLICES].includes(slice)) return;
      if (words && !haystack[index].includes(words)) return;
      found.push(row);
    });
    const order = get("f-order").value;
    if (order !== "file") found.sort((a, b) => (order === "sure" ? confidence(b) - confidence(a) : confidence(a) - confidence(b)));
    page = 0;
    show();
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    body.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(line));
    const number = (n) => n.toLocaleString("en");
    get("found").textContent = found.length
      ? `${number(found.length)} of ${number(data.rows.length)} statements`
      : "No statement is like this: widen the search.";
    get("page").textContent = `page ${number(page + 1)} of ${number(pages)}`;
    get("pages").hidden = pages < 2;
    get("back").disabled = page === 0;
    get("next").disabled = page === pages - 1;
  }

  function line(row) {
    const made = element("tr"), text = element("td"), { labels } = data.tasks[task];
    text.dir = "auto";
    if (row[SPEAKER]) {
      const speaker = element("b", "speaker");
      speaker.append(element("bdi", "", row[SPEAKER]));
      text.append(speaker, " ");
    }
    if (row[CONTEXT]) text.append(element("bdi", "of", row[CONTEXT]), " ");
    text.append(element("bdi", "", row[TEXT]), element("bdi", "where", row[WHERE]));
    const known = row[TRUE][task] >= 0, wrong = isWrong(row);
    const truth = element("td", "", known ? labels[row[TRUE][task]] : "not annotated");
    truth.dataset.head = "True label";
    const answer = element("td");
    answer.dataset.head = "The model says";
    answer.append(element("span", wrong ? "wrong" : "", labels[row[SAID][task]]));
    if (known) answer.append(wrong ? " ✗ wrong" : " ✓ right");
    const chances = element("td");
    chances.append(...labels.map((label, index) => probability(label, row[PROBABILITIES][task][index], index === row[SAID][task])));
    made.append(text, truth, answer, chances);
    return made;
  }

  function probability(label, thousandths, said) {
    const made = element("div", said ? "probability said" : "probability");
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    bar.setAttribute("class", "bar");
    bar.setAttribute("viewBox", "0 0 1000 8");
    bar.setAttribute("preserveAspectRatio", "none");
    bar.setAttribute("aria-hidden", "true");
    for (const [name, width] of [["track", 1000], ["fill", thousandths]]) {
      const part = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      part.setAttribute("class", name);
      part.setAttribute("width", width);
      part.setAttribute("height", 8);
      bar.append(part);
    }
    made.append(element("bdi", "", label), bar, element("span", "", `${Math.round(thousandths / 10)}%`));
    return made;
  }

  function start() {
    fill(get("f-task"), data.tasks.map((t, index) => [index, t.name]));
    fill(get("f-slice"), [["", "any"], ...data.slices.map(([column, value], index) => [index, `${column}: ${value}`])]);
    labelsOf();
    form.hidden = get("rows-box").hidden = false;
    get("f-task").addEventListener("change", (event) => {
      task = Number(event.target.value);
      labelsOf();
      choose();
    });
    for (const kind of ["input", "change"]) form.addEventListener(kind, choose);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => {
      get("f-wrong").checked = false;
      task = 0;
      labelsOf();
      choose();
    }));
    get("back").addEventListener("click", () => { page -= 1; show(); });
    get("next").addEventListener("click", () => { page += 1; show(); });
    // Paper cannot be unfolded.
    addEventListener("beforeprint", () => document.querySelectorAll("main details").forEach((d) => { d.open = true; }));
    choose();
  }

  start();
})();

// The input template in JavaScript: what src/stance/template.py does, for statements read in Node or a browser.
// tests/test_template.py holds the two together.

const MARK = "|";
const WORD = /[\p{L}\p{N}_]+(?:[-'’][\p{L}\p{N}_]+)*/gu;
const FUNCTION = new Set(
  "the a an of and for to in on at by from with its his her their our my your de la al".split(" "));
const TITLES = new Set((
  "mr mrs ms dr sir gen general col colonel president minister prime foreign defence defense interior " +
  "spokesman spokeswoman spokesperson representative ambassador ministry member leader chief deputy former " +
  "head government").split(" "));

// The two segments of the pair: `speaker` or `speaker (context)`, and the text, its mentions marked.
export function segments(speaker, context, text, markSpeaker) {
  const first = context ? `${speaker} (${context})` : speaker;
  if (!markSpeaker) return [first, text];
  let second = "", end = 0;
  for (const [start, stop] of mentions(speaker, text)) {
    second += `${text.slice(end, start)}${MARK} ${text.slice(start, stop)} ${MARK}`;
    end = stop;
  }
  return [first, second + text.slice(end)];
}

// Where `text` names `speaker`: [start, stop] in UTF-16 units, in order.
export function mentions(speaker, text) {
  const spoken = words(speaker);
  const known = new Set(spoken.map((word) => word.stem));
  const content = [...known].filter((stem) => !FUNCTION.has(stem));
  const named = content.filter((stem) => !TITLES.has(stem));
  const names = new Set(named.length ? named : content);
  const capitalised = new Set(spoken.filter((w) => w.upper && names.has(w.stem)).map((w) => w.stem));
  const found = [];
  let run = [];
  for (const word of [...words(text), null]) {
    if (word && known.has(word.stem)) {
      run.push(word);
      continue;
    }
    while (run.length && FUNCTION.has(run[0].stem)) run.shift();
    while (run.length && FUNCTION.has(run.at(-1).stem)) run.pop();
    const held = [...new Set(run.map((w) => w.stem))].filter((stem) => names.has(stem));
    if (held.length && (held.some((stem) => capitalised.has(stem)) || 2 * held.length >= names.size)) {
      found.push([run[0].start, run.at(-1).stop]);
    }
    run = [];
  }
  return found;
}

function words(text) {
  return [...text.matchAll(WORD)].map((match) => ({
    stem: folded(match[0]).replace(/'s$/, "").replace(/’s$/, ""),
    upper: /^\p{Uppercase}/u.test(match[0]),
    start: match.index,
    stop: match.index + match[0].length,
  }));
}

// JavaScript has no case folding. Letter by letter, as a sigma at the end of a word has a form of its own.
function folded(word) {
  return [...word].map((c) => (c === "ı" ? c : c.toLowerCase().toUpperCase().toLowerCase())).join("");
}

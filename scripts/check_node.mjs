// Labels statements with transformers.js from an exported ONNX folder, offline, to be compared with
// `stance predict`:
//
//   npm install @huggingface/transformers
//   node scripts/check_node.mjs DIR quotes.jsonl > labels.jsonl
//
// DIR is what `stance export MODEL -o DIR --format onnx` made; a third argument q8 takes the int8 graph.
// Each line of the output has the labels of every task, in the order of the input.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// The package is looked for where the command is run, not beside this file.
const require = createRequire(path.join(process.cwd(), "index.js"));
const entry = require.resolve("@huggingface/transformers");
const { AutoModelForSequenceClassification, AutoTokenizer, env } = await import(pathToFileURL(entry));

const [folder, input, dtype = "fp32"] = process.argv.slice(2);
if (!input) {
  console.error("usage: node check_node.mjs DIR INPUT.jsonl [fp32|q8]");
  process.exit(2);
}
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder));
const name = path.basename(path.resolve(folder));
const stance = JSON.parse(fs.readFileSync(path.join(folder, "stance.json"), "utf8"));
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForSequenceClassification.from_pretrained(name, { dtype });

// What src/stance/template.py does: marks around the words that name the speaker.
const FUNCTION = new Set(
  "the a an of and for to in on at by from with its his her their our my your de la al".split(" "));
const TITLES = new Set((
  "mr mrs ms dr sir gen general col colonel president minister prime foreign defence defense interior " +
  "spokesman spokeswoman spokesperson representative ambassador ministry member leader chief deputy former " +
  "head government").split(" "));
const words = (text) => [...text.matchAll(/[\p{L}\p{N}\p{Mn}_]+(?:[-'’][\p{L}\p{N}\p{Mn}_]+)*/gu)].map((m) => ({
  stem: m[0].toLowerCase().replace(/['’]s$/, ""), upper: /^\p{Lu}/u.test(m[0]),
  start: m.index, stop: m.index + m[0].length,
}));
function marked(speaker, text) {
  const spoken = words(speaker);
  const known = new Set(spoken.map((w) => w.stem));
  const content = [...known].filter((w) => !FUNCTION.has(w));
  const named = content.filter((w) => !TITLES.has(w));
  const names = new Set(named.length ? named : content);
  const capitalised = new Set(spoken.filter((w) => w.upper && names.has(w.stem)).map((w) => w.stem));
  let result = "", end = 0, run = [];
  const close = () => {
    while (run.length && FUNCTION.has(run[0].stem)) run.shift();
    while (run.length && FUNCTION.has(run.at(-1).stem)) run.pop();
    const held = new Set(run.map((w) => w.stem).filter((w) => names.has(w)));
    if (held.size && ([...held].some((w) => capitalised.has(w)) || 2 * held.size >= names.size)) {
      const [start, stop] = [run[0].start, run.at(-1).stop];
      result += text.slice(end, start) + "| " + text.slice(start, stop) + " |";
      end = stop;
    }
    run = [];
  };
  for (const word of words(text)) known.has(word.stem) ? run.push(word) : close();
  close();
  return result + text.slice(end);
}

const rows = fs.readFileSync(input, "utf8").split("\n").filter(Boolean).map((line) => JSON.parse(line));
for (const row of rows) {
  const speaker = row.context ? `${row.speaker ?? ""} (${row.context})` : row.speaker ?? "";
  const encoded = tokenizer(speaker, {
    text_pair: stance.mark_speaker ? marked(row.speaker ?? "", row.text) : row.text,
    truncation: true, max_length: stance.max_length,
  });
  const { logits } = await model(encoded);
  const labels = {};
  let start = 0;
  for (const task of stance.tasks) {
    const part = Array.from(logits.data.slice(start, start + task.labels.length));
    labels[task.name] = task.labels[part.indexOf(Math.max(...part))];
    start += task.labels.length;
  }
  console.log(JSON.stringify(labels));
}

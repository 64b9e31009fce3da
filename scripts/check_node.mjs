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

const rows = fs.readFileSync(input, "utf8").split("\n").filter(Boolean).map((line) => JSON.parse(line));
for (const row of rows) {
  const speaker = row.context ? `${row.speaker ?? ""} (${row.context})` : row.speaker ?? "";
  const encoded = tokenizer(speaker, {
    text_pair: row.text, truncation: true, max_length: stance.max_length,
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

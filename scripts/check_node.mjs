// Labels statements with transformers.js from an exported ONNX folder, offline:
//
//   npm install @huggingface/transformers
//   node scripts/check_node.mjs DIR quotes.jsonl > labels.jsonl
//
// DIR is what `stance export MODEL -o DIR --format onnx` made; a third argument q8 takes the int8 graph.
// Each line has a label and its calibrated probability for every task, in the order of the input.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { segments } from "./template.mjs";

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

function softmax(logits, temperature) {
  const most = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp((logit - most) / temperature));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

const rows = fs.readFileSync(input, "utf8").split("\n").filter(Boolean).map((line) => JSON.parse(line));
for (const row of rows) {
  const [first, second] = segments(row.speaker ?? "", row.context ?? "", row.text, stance.mark_speaker);
  const encoded = tokenizer(first, { text_pair: second, truncation: true, max_length: stance.max_length });
  const { logits } = await model(encoded);
  const labels = {};
  let start = 0;
  for (const task of stance.tasks) {
    const part = Array.from(logits.data.slice(start, start + task.labels.length));
    const probabilities = softmax(part, stance.temperatures?.[task.name] ?? 1);
    const most = Math.max(...probabilities);
    labels[task.name] = [task.labels[probabilities.indexOf(most)], most];
    start += task.labels.length;
  }
  console.log(JSON.stringify(labels));
}

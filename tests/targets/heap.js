// A node process with a heap of objects, strings, a Map, typed arrays and buffers, and a command loop.
//
//     node heap.js MIB
//
//     sum             a checksum that walks all of it
//     mutate N SEED   changes N parts; the checksum is another one from then on
//     quit            as does the end of input
//
// Each reply is one JSON line. Meanwhile it makes garbage and hashes on threads of its own, so that the collector and
// the pool have work.
"use strict";
const crypto = require("crypto");
const readline = require("readline");

const parts = [];

function make(seed) {
  const objects = [];
  const names = new Map();
  let x = seed + 1;
  const next = () => (x = (Math.imul(x, 1664525) + 1013904223) >>> 0);
  for (let i = 0; i < 1500; i++) {
    const name = `name ${next()} of ${seed}`;
    objects.push({ id: i, name, scores: [next(), next() / 7, next() >>> 4], parent: objects[i >> 1] || null });
    names.set(name, i);
  }
  const numbers = Float64Array.from({ length: 20000 }, () => next() / 3);
  const bytes = Buffer.alloc(300000);
  for (let i = 0; i < bytes.length; i += 4) bytes.writeUInt32LE(next() & 0xffffff, i);
  return { objects, names, numbers, bytes };
}

function sum() {
  const hash = crypto.createHash("sha256");
  for (const part of parts) {
    const words = [];
    for (const one of part.objects) {
      words.push(one.id, one.name, part.names.get(one.name), one.scores.join(), one.parent ? one.parent.id : -1);
    }
    hash.update(words.join(" "));
    hash.update(new Uint8Array(part.numbers.buffer));
    hash.update(part.bytes);
  }
  return hash.digest("hex");
}

function mutate(n, seed) {
  for (let i = 0; i < n; i++) {
    const part = parts[(seed * 7 + i * 13) % parts.length];
    part.objects[(seed * 31 + i) % part.objects.length].scores[1] += seed + 1;
    part.numbers[(seed * 101 + i) % part.numbers.length] += 1;
    part.bytes[(seed * 4099 + i) % part.bytes.length] ^= 1 + (seed & 63);
  }
}

let rounds = 0;
let hashed = 0;
const noise = setInterval(() => {
  rounds += Array.from({ length: 2000 }, (_, i) => ({ i, text: `garbage ${i}` })).length > 0 ? 1 : 0;
  crypto.pbkdf2("word", "salt", 200, 32, "sha256", (error) => {
    hashed += error ? 0 : 1;
  });
}, 2);

const answer = (reply) => process.stdout.write(`${JSON.stringify({ ok: true, ...reply })}\n`);
const mib = Number(process.argv[2]);
while (process.memoryUsage().rss < (mib + 48) * 2 ** 20) parts.push(make(parts.length));
answer({ ready: true, parts: parts.length });
readline
  .createInterface({ input: process.stdin })
  .on("line", (line) => {
    const [command, n, seed] = line.split(" ");
    if (command === "mutate") mutate(Number(n), Number(seed));
    answer(command === "quit" ? {} : { sum: sum(), rounds, hashed });
    if (command === "quit") process.exit(0);
  })
  .on("close", () => clearInterval(noise));

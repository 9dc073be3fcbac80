// Checks what the dashboard's formats write, without a browser: node tests/browser/figures.mjs

import assert from 'node:assert';
import { readFileSync } from 'node:fs';

const script = readFileSync(new URL('../../coordinator/src/api/http/assets/format.js', import.meta.url), 'utf8');
const all = await import(`data:text/javascript,${encodeURIComponent(script)}`);
const figures = JSON.parse(readFileSync(new URL('figures.json', import.meta.url), 'utf8'));
for (const [call, text] of Object.entries(figures)) {
  const written = new Function('all', `return all.${call}`)(all);
  assert.strictEqual(written.replaceAll('\u00a0', ' ').replaceAll('\u2060', ''), text, call);
}
console.log(`${Object.keys(figures).length} figures are written as they should be`);

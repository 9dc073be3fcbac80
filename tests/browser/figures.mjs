// Checks what the dashboard writes, numbers and the settings of jobs, without a browser: node tests/browser/figures.mjs

import assert from 'node:assert';
import { readFileSync } from 'node:fs';

const read = (name) => readFileSync(new URL(`../../coordinator/src/api/http/assets/${name}.js`, import.meta.url), 'utf8');
// One module: a script of this kind can import no other.
const script = read('format') + read('job').replace(/^import .*$/m, '');
const all = await import(`data:text/javascript,${encodeURIComponent(script)}`);
const figures = JSON.parse(readFileSync(new URL('figures.json', import.meta.url), 'utf8'));
for (const [call, text] of Object.entries(figures)) {
  const written = new Function('all', `return all.${call}`)(all);
  assert.strictEqual(written.replaceAll('\u00a0', ' ').replaceAll('\u2060', ''), text, call);
}

const general = { data_shards: 4, shard_batch: 8, precision: 'fp32', reduction: 'tree', seed: 0, failure_deadline: 5 };
const adam = { kind: 'adam', learning_rate: 1e-3, final_learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, final_beta2: 0.999, decay_images: 0 };
const average = { ema_half_life_images: 10000, ema_schedule: 'ramp-up' };
const augmentation = { flip: false, kinds: [], adaptive: false };
const jobs = {
  gan: {
    model: { kind: 'mlp-28', width: 256, latent_dim: 100, ...average },
    loss: { kind: 'hinge', discriminator_steps: 2, r1: 0, final_r1: 0, r2: 0, final_r2: 0 },
    optimizer: { ...adam, discriminator_learning_rate: 1e-3, final_discriminator_learning_rate: 1e-3 },
    augmentation,
  },
  vae: {
    model: { kind: 'vae-28', width: 16, latent_dim: 32, conditional: true, ...average },
    loss: { likelihood: 'bernoulli', beta: 4, binarise: true },
    optimizer: { ...adam, final_learning_rate: 1e-5, decay_images: 1000 },
  },
  transformer: {
    model: { kind: 'transformer', width: 128, layers: 4, heads: 4, positions: 'rotary', activation: 'gelu', dropout: 0.1 },
    optimizer: { ...adam, weight_decay: 0.1, clip_norm: 1, decay_images: 1000 },
    data: { kind: 'text' },
  },
  package: { model: { kind: 'package', path: '/a.pt2' }, optimizer: { decay_images: 0, encoder: adam } },
};
const lines = (job) => {
  const told = all.jobLines({ job: general, data: { kind: 'mnist-10k' }, ...job }, null);
  return told.map(([name, value]) => `${name}: ${value}`).join('\n').replaceAll('\u00a0', ' ').replaceAll('\u2060', '');
};
const told = Object.fromEntries(Object.entries(jobs).map(([family, job]) => [family, lines(job)]));
assert.match(told.gan, /Loss: hinge, 2 discriminator phases\n/);
assert.match(told.vae, /Model: vae-28, width 16, latent 32, conditional\n/);
assert.match(told.vae, /Likelihood: bernoulli, of binarised pixels\nWeight of the KL: 4\n/);
assert.match(told.vae, /Optimizer: adam, rate 0.001 → 1e-5, β 0.9 and 0.999\n/);
assert.match(told.transformer, /Model: transformer, 4 layers of 4 heads, width 128\n/);
assert.match(told.transformer, /weight decay 0.1, norm clipped to 1\n/);
assert.match(told.transformer, /Schedule: half a cosine over 1,000 samples/);
assert.match(told.vae, /Schedule: half a cosine over 1,000 images\n/);
assert.match(told.package, /Phase encoder: adam, rate 0.001,/);
for (const family of ['vae', 'transformer', 'package']) {
  assert.doesNotMatch(told[family], /generator|discriminator|undefined|NaN/i, family);
}
console.log(`${Object.keys(figures).length} figures are written as they should be`);

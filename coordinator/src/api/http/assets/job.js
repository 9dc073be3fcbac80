// The settings of a job in words, for each family of models.

import { exact, plural, whole } from './format.js';

/** The settings of a job for people. */
export function jobLines(text, found) {
  const { job, data } = text;
  const [first, ...others] = familyLines(text);
  return [
    first,
    ['Data', data.path ? `${data.kind}, ${data.path}` : data.kind],
    ['Samples', found?.summary],
    ...(found?.warnings ?? []).map((warning) => ['Warning', warning]),
    ...others,
    ['Batch', `${whole(job.data_shards * job.shard_batch)} = ${plural(job.data_shards, 'data shard')} × ${whole(job.shard_batch)}`],
    ['Precision', `${job.precision}, ${job.reduction} reduction`],
    // Numbers beyond lose digits on their way here.
    ['Seed', Number.isSafeInteger(job.seed) ? String(job.seed) : 'in job.toml'],
    ['Deadline', `${exact(job.failure_deadline)} s`],
  ].filter(([, value]) => value);
}

/** Both ends of a setting that moves over the run. */
const mover = (over) => (first, last) => (over && first !== last ? `${exact(first)} → ${exact(last)}` : exact(first));

/** Families are told apart by the settings that they have. */
function familyLines(text) {
  if (text.loss?.kind) return ganLines(text);
  if (text.loss?.likelihood) return vaeLines(text);
  return text.model.layers ? transformerLines(text) : packageLines(text);
}

const conditional = (model) => (model.conditional ? ', conditional' : '');

/** The optimizer of one update; settings that a rule has no use for are not in the job. */
function optimizerLine(own, moves) {
  const parts = [
    own.kind,
    `rate ${moves(own.learning_rate, own.final_learning_rate)}`,
    own.beta1 !== undefined && `β ${exact(own.beta1)} and ${moves(own.beta2, own.final_beta2)}`,
    own.momentum && `momentum ${exact(own.momentum)}${own.nesterov ? ' (Nesterov)' : ''}`,
    own.weight_decay && `weight decay ${exact(own.weight_decay)}`,
    own.clip_norm && `norm clipped to ${exact(own.clip_norm)}`,
  ];
  return parts.filter(Boolean).join(', ');
}

/** What a job's samples are called. */
export const nounOf = (data) => (['text', 'arrays'].includes(data?.kind) ? 'samples' : 'images');

const scheduleLine = (over, data) => (over ? `half a cosine over ${exact(over)} ${nounOf(data)}` : '');

/** The moving average of the weights. */
function averageLine(model) {
  const growth = model.ema_schedule === 'ramp-up' ? 'at most 5\u00a0% of the images seen' : 'along half a cosine from 0';
  return `half-life ${exact(model.ema_half_life_images)} images, ${growth}`;
}

function vaeLines({ model, loss, optimizer, data }) {
  const over = optimizer.decay_images;
  return [
    ['Model', `${model.kind}, width ${whole(model.width)}, latent ${whole(model.latent_dim)}${conditional(model)}`],
    ['Likelihood', loss.likelihood + (loss.binarise ? ', of binarised pixels' : '')],
    ['Weight of the KL', exact(loss.beta)],
    ['Optimizer', optimizerLine(optimizer, mover(over))],
    ['Schedule', scheduleLine(over, data)],
    ['EMA', averageLine(model)],
  ];
}

function transformerLines({ model, optimizer, data }) {
  const over = optimizer.decay_images;
  const dropout = model.dropout ? `, dropout ${exact(model.dropout)}` : '';
  return [
    ['Model', `${model.kind}, ${plural(model.layers, 'layer')} of ${plural(model.heads, 'head')}, width ${whole(model.width)}`],
    ['Positions', model.positions],
    ['Activation', model.activation + dropout],
    ['Optimizer', optimizerLine(optimizer, mover(over))],
    ['Schedule', scheduleLine(over, data)],
  ];
}

/** A package has losses and networks of its own, and an optimizer for each phase. */
function packageLines({ model, optimizer = {}, data }) {
  const moves = mover(optimizer.decay_images);
  const phases = Object.entries(optimizer).filter(([, settings]) => typeof settings === 'object');
  return [
    ['Model', `package ${model.path ?? ''}${model.package_hash ? `, hash ${model.package_hash.slice(0, 8)}` : ''}`],
    ...phases.map(([phase, own]) => [`Phase ${phase}`, optimizerLine(own, moves)]),
    ['Schedule', scheduleLine(optimizer.decay_images, data)],
  ];
}

function ganLines({ model, loss, optimizer, augmentation, data }) {
  const over = optimizer.decay_images;
  const moves = mover(over);
  const [g, d] = [optimizer.learning_rate, optimizer.discriminator_learning_rate];
  const [lastG, lastD] = [optimizer.final_learning_rate, optimizer.final_discriminator_learning_rate];
  const penalties = [
    ['wasserstein-gp'].includes(loss.kind) && `gradient penalty ${exact(loss.gradient_penalty)}`,
    (loss.r1 || loss.final_r1) && `R1 ${moves(loss.r1, loss.final_r1)}`,
    (loss.r2 || loss.final_r2) && `R2 ${moves(loss.r2, loss.final_r2)}`,
  ].filter(Boolean);
  const every = penalties.length && loss.penalty_every > 1 ? `, every ${whole(loss.penalty_every)} updates` : '';
  const chance = augmentation.adaptive
    ? `adaptive, target ${exact(augmentation.target)}`
    : `probability ${moves(augmentation.probability, augmentation.final_probability)}`;
  const augmented = [augmentation.flip && 'flips', augmentation.kinds.length && `${augmentation.kinds.join(', ')}: ${chance}`];
  return [
    ['Model', `${model.kind}, width ${whole(model.width)}, latent ${whole(model.latent_dim)}${conditional(model)}`],
    ['Loss', loss.kind + (loss.discriminator_steps > 1 ? `, ${whole(loss.discriminator_steps)} discriminator phases` : '')],
    ['Penalties', penalties.length ? penalties.join(', ') + every : ''],
    ['Optimizer', `${optimizer.kind}, β ${exact(optimizer.beta1)} and ${moves(optimizer.beta2, optimizer.final_beta2)}`],
    ['Learning rates', `G ${moves(g, lastG)}, D ${moves(d, lastD)}`],
    ['Schedule', scheduleLine(over, data)],
    ['EMA', averageLine(model)],
    ['Augmented', augmented.filter(Boolean).join('; ')],
  ];
}

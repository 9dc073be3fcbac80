// The page of a run. It asks the coordinator again and again, and shows what it knows while there is none.
// Whatever comes from outside is put in as text, never as HTML.

import { Chart, figure } from './chart.js';
import { Timeline } from './timeline.js';

const PERIOD = 1500;
const ANSWER_LIMIT = 6000;
const POINTS = 500;
const EVENTS_SHOWN = 200;
const EVENTS_KEPT = 50000;
const FRAME = 160;

const $ = (id) => document.getElementById(id);
const whole = (number) => Math.round(number).toLocaleString('en');
const set = (id, text) => {
  const element = $(id);
  if (element.textContent !== text) element.textContent = text;
};

function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content.map((part) => (part instanceof Node ? part : String(part))));
  return element;
}

function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, '0')} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, '0')} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

const ago = (seconds) => (seconds < 5 ? 'just now' : `${duration(seconds)} ago`);

function clock(time) {
  const date = new Date(time * 1000);
  const today = date.toDateString() === new Date().toDateString();
  const options = { hour: '2-digit', minute: '2-digit', second: '2-digit', hour12: false };
  return date.toLocaleString('en-GB', today ? options : { day: 'numeric', month: 'short', ...options });
}

function bytes(count) {
  if (count === null || count === undefined) return '–';
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let at = 0;
  let size = count;
  for (; size >= 1024 && at < units.length - 1; at += 1) size /= 1024;
  return `${size >= 100 || at === 0 ? Math.round(size) : size.toFixed(1)} ${units[at]}`;
}

const known = { status: null, metrics: null, outcome: null, events: [], next: 0, pictures: [], seenPictures: -1, asked: null };
let awaySince = null;

// Scalars of the objective have cards by their group; one that stands for itself has its own. The coordinator tells the groups.
const COLORS = ['--d', '--g', '--part-wait', '--part-commit', '--part-data', '--part-other'];
const GROUPS = { loss: ['Loss', 'Losses'], score: ['Discriminator’s verdict', 'Discriminator’s verdict'] };
let cards = [];

const charts = {
  rate: new Chart($('c-rate'), { grounded: true, smooth: true, series: [{ key: 'images_per_second', label: 'images/s', color: '--d' }] }),
  time: new Chart($('c-time'), {
    stacked: true,
    unit: ' ms',
    series: [
      { key: 'compute', label: 'compute', color: '--part-compute' },
      { key: 'wait', label: 'wait', color: '--part-wait' },
      { key: 'commit', label: 'commit', color: '--part-commit' },
      { key: 'data', label: 'data', color: '--part-data' },
      { key: 'other', label: 'other', color: '--part-other' },
    ],
  }),
};
const timeline = new Timeline($('strip'), $('tip'), { duration, clock, describe });

// ---- Asking -----------------------------------------------------------------------------------------------------------

async function ask(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(ANSWER_LIMIT), cache: 'no-store' });
  if (answer.status === 401 || answer.status === 421) {
    const { error } = await answer.json();
    throw Object.assign(new Error(error), { refused: true });
  }
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

async function look() {
  const status = await ask('/api/status');
  const before = known.status;
  if (before && before.run !== status.run) {
    // Another run at the same address.
    location.reload();
    return;
  }
  // A run that has ended is soon gone, maybe before the rest is told.
  known.outcome = status.outcome;
  known.skew = status.now - Date.now() / 1000;
  if (!before || before.rows !== status.rows) known.metrics = await ask(`/api/metrics?points=${POINTS}`);
  while (known.next < status.events) {
    const page = await ask(`/api/events?after=${known.next}`);
    for (const { event } of page.events) known.events.push(event);
    known.events.splice(0, known.events.length - EVENTS_KEPT);
    if (page.next <= known.next) break;
    known.next = page.next;
  }
  if (known.seenPictures !== status.pictures) {
    known.pictures = (await ask('/api/samples')).samples;
    known.seenPictures = status.pictures;
  }
  known.status = status;
}

async function tick() {
  try {
    await look();
    awaySince = null;
    set('notice', '');
    $('notice').hidden = true;
    show();
  } catch (error) {
    if (error.refused) {
      $('notice').hidden = false;
      set('notice', error.message);
      state('quiet', 'Not admitted');
    } else {
      awaySince ??= Date.now() / 1000;
      showAway();
    }
  }
  plan(PERIOD);
}

let timer = null;
function plan(wait) {
  clearTimeout(timer);
  if (document.visibilityState === 'visible') timer = setTimeout(tick, wait);
}
document.addEventListener('visibilitychange', () => plan(0));

// ---- Showing ----------------------------------------------------------------------------------------------------------

function state(tone, text) {
  $('state').dataset.tone = tone;
  const label = $('state').querySelector('b');
  if (label.textContent !== text) label.textContent = text;
}

const STAGES = {
  gathering: ['warn', 'Gathering workers'],
  reconnecting: ['warn', 'Reconnecting'],
  training: ['good', 'Training'],
  regrouping: ['warn', 'Regrouping'],
  closing: ['good', 'Saving'],
  ended: ['quiet', 'Ending'],
};
const OUTCOMES = {
  complete: ['done', 'Complete'],
  stopped: ['quiet', 'Stopped'],
  input_error: ['bad', 'Wrong input'],
  failed: ['bad', 'Failed'],
};

function showAway() {
  const last = known.status;
  if (known.outcome) {
    state(...OUTCOMES[known.outcome]);
    return;
  }
  state('bad', `Coordinator away since ${clock(awaySince)}`);
  if (!last) return;
  const lease = 12 * last.failure_deadline;
  $('notice').hidden = false;
  set(
    'notice',
    `The coordinator does not answer. Workers train on without it for up to ${duration(lease)}; the same command takes ` +
      'them over. This page goes on by itself once it is back.',
  );
  set('eta', '');
}

function show() {
  const { status, metrics } = known;
  document.title = `${status.last_step ? `${percent(status)} · ` : ''}${status.name} · Ganglion`;
  set('name', status.name);
  state(...((status.outcome ? OUTCOMES[status.outcome] : STAGES[status.stage]) ?? ['quiet', status.stage]));
  showProgress(status, metrics);
  makeCards(metrics.scalars);
  showTiles(status, metrics);
  showCurves(status, metrics);
  showPictures(status);
  timeline.set(known.events, status, status.now);
  showWorkers(status);
  showCheckpoints(status);
  showEvaluations(status);
  showEvents();
  showJob(status);
}

const percent = (status) => `${Math.floor((100 * status.step) / Math.max(1, status.last_step))} %`;

function showProgress(status, metrics) {
  set('step', whole(status.step));
  set('last-step', status.last_step ? whole(status.last_step) : '–');
  set('percent', status.last_step ? percent(status) : '–');
  const share = status.last_step ? (100 * status.step) / status.last_step : 0;
  $('bar').setAttribute('aria-valuenow', share.toFixed(1));
  $('bar').firstElementChild.style.transform = `scaleX(${share / 100})`;
  const pace = secondsPerStep(metrics);
  const left = status.last_step - status.step;
  if (status.outcome || left <= 0) set('eta', status.begun ? `begun ${clock(status.begun)}` : '');
  else if (pace && status.last_step) set('eta', `${duration(pace * left)} left`);
  else set('eta', '\u00a0');
}

/** The usual time of a step lately: a pause between two coordinators is no part of it. */
function secondsPerStep({ step, time }) {
  const paces = [];
  for (let at = Math.max(1, step.length - 30); at < step.length; at += 1) {
    const pace = (time[at] - time[at - 1]) / (step[at] - step[at - 1]);
    if (pace > 0) paces.push(pace);
  }
  paces.sort((a, b) => a - b);
  return paces[paces.length >> 1];
}

function showTiles(status, metrics) {
  const at = metrics.step.length - 1;
  const of = (key) => (at < 0 ? null : metrics[key].mean[at]);
  set('t-rate', figure(of('images_per_second')));
  set('t-seen', at < 0 ? '\u00a0' : `step ${whole(metrics.step[at])}`);
  document.querySelectorAll('.tile.scalars').forEach((tile, place) => showScalars(tile, cards[place], of));
  const parts = ['data', 'compute', 'wait', 'commit', 'other'].map(of);
  const total = parts.reduce((sum, part) => sum + (part ?? 0), 0);
  set('t-wait', total ? `${Math.round((100 * parts[2]) / total)} %` : '–');
  set('t-step', total ? `of ${figure(total)} ms a step` : '\u00a0');
  const members = status.workers.filter((worker) => worker.rank !== null).length;
  set('t-workers', String(status.workers.length));
  const spare = status.workers.length - members;
  const group = status.generation ? `generation ${whole(status.generation)}` : 'no generation yet';
  set('t-generation', group + (spare > 0 && status.generation ? `, ${spare} waiting` : ''));
  const newest = status.checkpoints.at(-1);
  set('t-checkpoint', newest ? whole(newest.step) : 'none');
  set('t-age', newest ? ago(status.now - newest.time) : '\u00a0');
}

function showScalars(tile, card, of) {
  const [title, pair, keys] = tile.children;
  title.textContent = card ? card.title : '\u00a0';
  const series = card ? card.series.slice(0, 2) : [];
  const tone = (at) => ['d', 'g'][at];
  const number = (one, at) => {
    const made = make('span', tone(at), figure(of(one.key)));
    made.id = `t-${one.key}`;
    return made;
  };
  pair.replaceChildren(...(series.length ? series.map(number) : ['–']));
  keys.replaceChildren(...(series.length > 1 ? series.map((one, at) => make('span', `key ${tone(at)}`, one.full)) : ['\u00a0']));
}

/** Makes the cards of the scalars that the newest row has, once for each set of them. */
function makeCards(scalars) {
  if (!scalars.length || !changed('scalars', scalars)) return;
  for (const { key, element } of cards) {
    element.remove();
    delete charts[key];
  }
  const groups = new Map();
  for (const { name, group, of, label } of scalars) {
    const key = group in GROUPS ? group : `scalar-${name}`;
    const series = groups.get(key) ?? [];
    const full = group === 'score' ? `D(${of})` : of.replaceAll('_', ' ');
    series.push({ key: name, label, full, color: COLORS[series.length % COLORS.length] });
    groups.set(key, series);
  }
  cards = [...groups].map(([key, series]) => {
    const [title, heading] = GROUPS[key] ?? [series[0].full, series[0].full];
    const element = make('article', 'card chart', make('header', '', make('h2', '', heading), make('ul')), make('div', 'plot'));
    element.id = `c-${key}`;
    $('c-rate').before(element);
    charts[key] = new Chart(element, { smooth: true, series });
    return { key, title, series, element };
  });
}

function showCurves(status, metrics) {
  // Where a group broke: curves show that nothing came of it.
  const perStep = Math.max(1, status.phases_per_step);
  const formed = known.events.filter((event) => event.kind === 'generation_formed' && event.generation > 1);
  const marks = formed.map((event) => event.position / perStep);
  const judge = ['non-saturating', 'minimax'].includes(status.job.loss?.kind);
  if (charts.score) charts.score.range = judge ? [0, 1] : null;
  for (const chart of Object.values(charts)) chart.set(metrics, marks);
}

// ---- Samples ----------------------------------------------------------------------------------------------------------

const film = { at: -1, follows: true, playing: null };

function showPictures(status) {
  const every = status.job.sample.every_steps;
  set('s-first', every ? whole(every) : '–');
  if (!every && !known.pictures.length) set('s-none', 'This job draws none: sample.every_steps is 0.');
  const count = known.pictures.length;
  const slider = $('s-slider');
  slider.max = String(Math.max(0, count - 1));
  for (const id of ['s-slider', 's-play', 's-newest']) $(id).disabled = count < 1;
  if (film.follows && count) frame(count - 1);
}

function frame(at) {
  const picture = known.pictures[at];
  if (!picture) return;
  const slider = $('s-slider');
  slider.value = String(at);
  slider.setAttribute('aria-valuetext', `step ${whole(picture.step)}`);
  slider.style.setProperty('--at', `${known.pictures.length > 1 ? (100 * at) / (known.pictures.length - 1) : 100}%`);
  set('s-step', `step ${whole(picture.step)}`);
  if (film.at === picture.step) return;
  film.at = picture.step;
  const image = $('s-image');
  image.src = `${picture.url}?run=${known.status.run}`;
  image.alt = `Images that the generator drew at step ${whole(picture.step)}`;
  image.hidden = false;
  $('s-none').hidden = true;
}

function play(on) {
  clearInterval(film.playing);
  film.playing = null;
  $('s-play').classList.toggle('on', on);
  $('s-play').setAttribute('aria-label', on ? 'Pause' : 'Play through training');
  if (!on) return;
  let at = Number($('s-slider').value);
  if (at >= known.pictures.length - 1) at = -1;
  film.follows = false;
  film.playing = setInterval(() => {
    at += 1;
    frame(at);
    if (at >= known.pictures.length - 1) {
      film.follows = true;
      play(false);
    }
  }, FRAME);
}

$('s-play').addEventListener('click', () => play(film.playing === null));
$('s-slider').addEventListener('input', (event) => {
  play(false);
  const at = Number(event.target.value);
  film.follows = at === known.pictures.length - 1;
  frame(at);
});
$('s-newest').addEventListener('click', () => {
  play(false);
  film.follows = true;
  frame(known.pictures.length - 1);
});

// ---- Tables -----------------------------------------------------------------------------------------------------------

function cell(label, className, ...content) {
  const element = make('td', className, ...content);
  element.dataset.label = label;
  return element;
}

const ACTIVITIES = { computing: 'computing', waiting: 'waiting for others', resting: 'at rest', paused: 'paused' };
const TONES = { well: 'good', new: 'quiet', silent: 'warn', away: 'bad' };

function workerState(worker) {
  if (worker.health === 'away') return 'session is away';
  if (worker.health === 'silent') return 'silent';
  if (worker.health === 'new') return 'loading';
  return ACTIVITIES[worker.activity] ?? worker.activity;
}

function workerRow(worker, shards) {
  const rank = worker.rank === null ? make('span', 'rank none', 'spare') : make('span', 'rank', `rank ${worker.rank}`);
  const share = make('span', 'shards');
  share.setAttribute('aria-hidden', 'true');
  share.style.setProperty('--from', `${(100 * worker.first_shard) / shards}%`);
  share.style.setProperty('--size', `${(100 * worker.shards) / shards}%`);
  const range = worker.shards
    ? worker.shards === 1
      ? `${worker.first_shard}`
      : `${worker.first_shard}–${worker.first_shard + worker.shards - 1}`
    : 'none';
  const dot = make('i', 'dot');
  dot.dataset.tone = TONES[worker.health] ?? 'quiet';
  const gpu = worker.gpu_memory_bytes === null ? '' : ` · GPU ${bytes(worker.gpu_memory_bytes)}`;
  const busy = worker.gpu_utilisation === null ? '' : ` · ${worker.gpu_utilisation} % busy`;
  return make(
    'tr',
    '',
    cell('Worker', 'who', make('b', '', worker.worker), rank),
    cell('Data shards', '', share, range),
    cell('State', '', dot, workerState(worker)),
    cell('Position', 'n', worker.position === null ? '–' : whole(worker.position)),
    cell('Memory', 'n', bytes(worker.resident_bytes) + gpu),
    cell('Device', 'clip', (worker.device || '–') + busy),
    cell('Host', 'clip', `${worker.host} · ${worker.pid}${worker.local ? '' : ' · joined'}`),
    cell('Heard', 'n', worker.heartbeat_age === null ? '–' : `${worker.heartbeat_age.toFixed(1)} s`),
  );
}

function showWorkers(status) {
  const group = status.generation ? `${status.world_size} in generation ${whole(status.generation)}` : 'no generation yet';
  set('w-count', `${group}, ${status.data_shards} data shards`);
  const order = (worker) => worker.rank ?? 1e9 + worker.worker;
  const workers = status.workers.slice().sort((a, b) => order(a) - order(b));
  const rows = workers.map((worker) => workerRow(worker, Math.max(1, status.data_shards)));
  if (!rows.length) {
    const empty = make('td', '', 'No worker is in session.');
    empty.colSpan = 8;
    rows.push(make('tr', 'empty', empty));
  }
  $('workers').replaceChildren(...rows);
}

const drawn = {};
/** Whether what a list is made of has changed since it was drawn. */
function changed(name, of) {
  const text = JSON.stringify(of);
  if (drawn[name] === text) return false;
  drawn[name] = text;
  return true;
}

function showCheckpoints(status) {
  const { checkpoints } = status;
  set('k-count', checkpoints.length ? `keeps the last ${status.job.checkpoint.keep_last || 'ones, all of them'}` : '');
  if (!checkpoints.length || !changed('checkpoints', checkpoints)) return;
  const items = checkpoints
    .slice(-8)
    .reverse()
    .map((checkpoint) => {
      const digest = make('code', '', checkpoint.state_digest);
      digest.title = `state_digest ${checkpoint.state_digest}`;
      const copy = make('button', 'text', 'copy');
      copy.type = 'button';
      copy.setAttribute('aria-label', `Copy the digest of step ${checkpoint.step}`);
      copy.addEventListener('click', () => {
        navigator.clipboard?.writeText(checkpoint.state_digest).then(() => {
          copy.textContent = 'copied';
          setTimeout(() => (copy.textContent = 'copy'), 1500);
        });
      });
      return make('li', '', make('b', '', `step ${whole(checkpoint.step)}`), digest, copy, make('time', '', clock(checkpoint.time)));
    });
  $('checkpoints').replaceChildren(...items);
}

// What the table of evaluations shows, where a run has it.
const FIGURES = ['frechet_distance', 'classifier_score', 'modes', 'label_kl', 'precision', 'recall', 'sliced_wasserstein', 'diversity'];

function showEvaluations(status) {
  const raised = Object.keys(status.alarms ?? {}).map((alarm) => alarm.replaceAll('_', ' '));
  const rows = known.events.filter((event) => event.kind === 'evaluation');
  if (!rows.length || !changed('evaluations', [rows.length, status.best, raised])) return;
  const spoken = (name) => name.replaceAll('_', ' ').replace('frechet', 'Fréchet');
  const names = FIGURES.filter((name) => rows.some((row) => Number.isFinite(row.metrics[name])));
  const cell = (name, text) => {
    const made = make('td', 'n', text);
    made.dataset.label = spoken(name);
    return made;
  };
  const line = (row) => {
    const best = row.step === status.best?.step ? ', the best' : '';
    const figures = names.map((name) => cell(name, Number.isFinite(row.metrics[name]) ? figure(row.metrics[name]) : '–'));
    return make('tr', '', make('td', 'who', `step ${whole(row.step)}${best}`), ...figures);
  };
  set('v-alarms', raised.length ? `alarm: ${raised.join(', ')}` : '');
  $('v-names').replaceChildren(make('th', '', 'Step'), ...names.map((name) => make('th', 'n', spoken(name))));
  $('v-rows').replaceChildren(...rows.slice(-8).reverse().map(line));
  $('evaluations').hidden = false;
}

/** What an event says to people: its tone, and a sentence. */
function describe(event) {
  const worker = event.worker === null || event.worker === undefined ? 'a worker' : `worker ${event.worker}`;
  const plural = (count, what) => `${count} ${what}${count === 1 ? '' : 's'}`;
  const reason = event.reason ? `: ${event.reason}` : '';
  const told = {
    coordinator_started: () => ['start', `Coordinator started, term ${event.term}, process ${event.pid}`],
    generation_formed: () => [
      'good',
      `Generation ${event.generation}: ${plural(event.world_size, 'worker')} from ${event.start}, over ${event.backend} (${event.cause})`,
    ],
    generation_kept: () => ['good', `Generation ${event.generation} trained on and was taken over`],
    regroup: () => ['warn', `Generation ${event.generation} broke${reason}`],
    fault: () => ['bad', `${worker} reports ${event.fault === 'peer' ? 'a lost peer' : event.fault}${event.detail ? `: ${event.detail}` : ''}`],
    worker_started: () => ['quiet', `Started a local worker, process ${event.pid}`],
    worker_joined: () => ['quiet', `${worker} joined from ${event.host}, process ${event.pid}`],
    worker_resumed: () => ['quiet', `${worker} is back`],
    worker_lost: () => ['bad', `Lost ${worker}${reason}`],
    worker_exited: () => ['quiet', `Process ${event.pid} of ${worker} ended with ${event.status}`],
    worker_leaves: () => ['quiet', `${worker} wants to leave`],
    worker_dropped: () => ['bad', `${worker} was dropped`],
    worker_disconnected: () => ['warn', `The session of ${worker} ended`],
    worker_refused: () => ['bad', `Refused ${worker}${reason}`],
    checkpoint: () => ['save', `Checkpoint of step ${whole(event.step)}, ${String(event.state_digest).slice(0, 12)}…`],
    checkpoint_delayed: () => ['warn', `The checkpoint of step ${event.step} waits for ${event.file}${reason}`],
    checkpoint_damaged: () => ['bad', `Checkpoint ${event.folder} is damaged${reason}`],
    checkpoint_abandoned: () => ['warn', `The checkpoint of step ${event.step} was abandoned`],
    condemned: () => ['bad', `The states of generation ${event.generation} are not used any more`],
    evaluation: () => ['quiet', `Evaluated step ${whole(event.step)}`],
    evaluation_breach: () => ['bad', event.detail],
    best_checkpoint: () => ['save', `The checkpoint of step ${whole(event.step)} is the best: ${event.metric.replaceAll('_', ' ')} ${figure(event.value)}`],
    alarm: () => ['bad', `Alarm, ${event.alarm.replaceAll('_', ' ')}: ${event.detail}`],
    alarm_over: () => ['good', `No ${event.alarm.replaceAll('_', ' ')} any more`],
    phase_skipped: () => ['warn', `A phase of step ${event.step} was skipped${reason}`],
    metrics_breach: () => ['bad', event.detail],
    stop_requested: () => ['quiet', 'A stop was asked for'],
    drain_requested: () => ['quiet', `An operator asks ${worker} to leave`],
    scale_requested: () => ['quiet', `An operator asks for ${plural(event.workers, 'local worker')}`],
    plan: () => ['quiet', `Planned: ${event.change}`],
    run_ended: () => [
      event.outcome === 'complete' ? 'good' : event.outcome === 'stopped' ? 'quiet' : 'bad',
      `The run ended: ${String(event.outcome).replace('_', ' ')}${event.detail ? `, ${event.detail}` : ''}`,
    ],
    samples: () => ['quiet', `Samples of step ${whole(event.step)}`],
    passport: () => ['quiet', 'The passport of the run was taken'],
  }[event.kind];
  const [tone, text] = told ? told() : ['quiet', `${event.kind.replaceAll('_', ' ')}${reason}`];
  return { tone, text: text.charAt(0).toUpperCase() + text.slice(1) };
}

const SILENT = new Set(['evaluation', 'samples', 'passport']);

function showEvents() {
  const only = $('e-faults').checked;
  if (!changed('events', [known.events.length, only])) return;
  const items = [];
  for (let at = known.events.length - 1; at >= 0 && items.length < EVENTS_SHOWN; at -= 1) {
    const event = known.events[at];
    const { tone, text } = describe(event);
    if (SILENT.has(event.kind) || (only && !['bad', 'warn'].includes(tone))) continue;
    const dot = make('i', 'dot');
    dot.dataset.tone = tone;
    items.push(make('li', '', make('time', '', clock(event.time)), dot, make('span', '', text)));
  }
  $('events').replaceChildren(...(items.length ? items : [make('li', 'empty', only ? 'No faults.' : 'None yet.')]));
}
$('e-faults').addEventListener('change', showEvents);

function showJob(status) {
  set('j-run', `run ${status.run.slice(0, 8)}, term ${status.term}`);
  if (!changed('job', status.job)) return;
  const { job, model, data, loss, optimizer } = status.job;
  const lines = [
    ['Model', `${model.kind}, width ${model.width}, latent ${model.latent_dim}`],
    ['Data', data.path ? `${data.kind}, ${data.path}` : data.kind],
    ['Loss', loss.kind + (loss.discriminator_steps > 1 ? `, ${loss.discriminator_steps} discriminator phases` : '')],
    ['Batch', `${job.data_shards * job.shard_batch} = ${job.data_shards} data shards × ${job.shard_batch}`],
    ['Optimizer', `${optimizer.kind}, G ${optimizer.learning_rate}, D ${optimizer.discriminator_learning_rate}`],
    ['Precision', job.precision],
    ['Reduction', job.reduction],
    ['Seed', job.seed],
    ['Deadline', `${job.failure_deadline} s`],
  ];
  $('job').replaceChildren(...lines.map(([name, value]) => make('div', '', make('dt', '', name), make('dd', '', value))));
}

// The token is in the cookie by now; it need not stay in the address, where it can be read and copied.
if (location.search.includes('token=')) history.replaceState(null, '', location.pathname);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  for (const chart of Object.values(charts)) chart.draw();
});
setInterval(() => awaySince && showAway(), 1000);
tick();

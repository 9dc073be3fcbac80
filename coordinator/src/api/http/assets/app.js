// The page of a run. It asks the coordinator again and again, and shows what it knows while there is none.
// Whatever comes from outside is put in as text, never as HTML.

import { Chart } from './chart.js';
import { NONE, ago, brief, bytes, clock, duration, exact, figure, milliseconds, percent, plural, spoken, whole } from './format.js';
import { jobLines, nounOf } from './job.js';
import { Timeline } from './timeline.js';

const PERIOD = 1500;
const ANSWER_LIMIT = 6000;
const POINTS = 500;
const EVENTS_SHOWN = 200;
const EVENTS_KEPT = 50000;
const FRAME = 160;
/** Longest text of an event in the list, in characters. */
const TEXT = 400;
/** More scalars of their own than so many get small curves. */
const OWN_CARDS = 2;
const CHECKPOINTS_SHOWN = 8;

const $ = (id) => document.getElementById(id);
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

const known = { status: null, metrics: null, outcome: null, events: [], next: 0, pictures: [], real: null, seenPictures: -1, asked: null };
let awaySince = null;

// Scalars of the objective have cards by their group; one that stands for itself has its own. The coordinator tells the groups.
const COLORS = ['--d', '--g', '--part-wait', '--part-commit', '--part-data', '--part-other'];
const GROUPS = { loss: ['Loss', 'Losses'], score: ['Discriminator’s verdict', 'Discriminator’s verdict'] };
let cards = [];

const charts = {
  rate: new Chart($('c-rate'), { grounded: true, smooth: true, series: [{ key: 'images_per_second', label: 'per second', color: '--d' }] }),
  time: new Chart($('c-time'), {
    stacked: true,
    write: milliseconds,
    axis: (value) => (value ? milliseconds(value, brief) : '0'),
    series: [
      { key: 'compute', label: 'compute', color: '--part-compute' },
      { key: 'wait', label: 'wait', color: '--part-wait' },
      { key: 'commit', label: 'commit', color: '--part-commit' },
      { key: 'data', label: 'data', color: '--part-data' },
      { key: 'other', label: 'other', color: '--part-other' },
    ],
  }),
};
/** Small curves by the id of their card: each list is drawn from curves by name. */
const smalls = {};
const timeline = new Timeline($('strip'), $('tip'), describe);

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
    const { samples, real } = await ask('/api/samples');
    known.pictures = samples;
    known.real = real;
    known.seenPictures = status.pictures;
  }
  known.status = status;
}

async function tick() {
  const refusal = await look().then(
    () => null,
    (error) => error,
  );
  plan(PERIOD);
  if (!refusal) {
    awaySince = null;
    set('notice', '');
    $('notice').hidden = true;
    // Outside of what can be refused: a mistake of this page is no absence of the coordinator.
    show();
  } else if (refusal.refused) {
    $('notice').hidden = false;
    set('notice', refusal.message);
    state('quiet', 'Not admitted');
  } else {
    awaySince ??= Date.now() / 1000;
    showAway();
  }
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
  // Rows are asked for after the status, and may be newer.
  status.step = Math.max(status.step, metrics.step.at(-1) ?? 0);
  document.title = `${status.last_step ? `${percent(done(status))} · ` : ''}${status.name} · Ganglion`;
  set('name', status.name);
  state(...((status.outcome ? OUTCOMES[status.outcome] : STAGES[status.stage]) ?? ['quiet', status.stage]));
  showProgress(status, metrics);
  showAlarms(status);
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

const done = (status) => status.step / Math.max(1, status.last_step);

function showProgress(status, metrics) {
  const share = status.last_step ? done(status) : 0;
  set('step', whole(status.step));
  set('last-step', status.last_step ? `of ${whole(status.last_step)} steps` : 'steps');
  set('percent', status.last_step ? percent(share) : '');
  $('bar').setAttribute('aria-valuenow', String(Math.floor(100 * share)));
  $('bar').firstElementChild.style.transform = `scaleX(${share})`;
  const pace = secondsPerStep(metrics);
  const left = status.last_step - status.step;
  const ended = known.events.findLast((event) => event.kind === 'run_ended');
  if (status.outcome && ended) set('eta', `ended ${clock(ended.time)}`);
  else if (status.outcome || left <= 0) set('eta', status.begun ? `begun ${clock(status.begun)}` : '');
  else if (pace && status.last_step) set('eta', `${duration(pace * left)} left`);
  else set('eta', '\u00a0');
}

/** What is wrong with the run: nobody should have to look for it. */
function showAlarms(status) {
  const raised = Object.entries(status.alarms ?? {});
  if (!changed('alarms', raised)) return;
  $('alarms').replaceChildren(
    ...raised.map(([name, detail]) => {
      const words = spoken(name);
      return make('li', '', make('b', '', words.charAt(0).toUpperCase() + words.slice(1)), make('span', '', shortened(detail)));
    }),
  );
  $('alarms').hidden = !raised.length;
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
  const rate = nounOf(status.job.data) === 'images' ? 'Images per second' : 'Samples per second';
  document.querySelectorAll('h2.rate').forEach((title) => title.replaceChildren(rate));
  set('t-seen', at < 0 ? '\u00a0' : `step ${whole(metrics.step[at])}`);
  document.querySelectorAll('.tile.scalars').forEach((tile, place) => showScalars(tile, cards[place], of));
  const parts = ['data', 'compute', 'wait', 'commit', 'other'].map(of);
  const total = parts.reduce((sum, part) => sum + (part ?? 0), 0);
  set('t-wait', total ? percent(parts[2] / total) : NONE);
  set('t-step', total ? `of ${milliseconds(total)} a step` : '\u00a0');
  set('t-workers', whole(status.workers.length));
  set('t-generation', group(status));
  const newest = status.checkpoints.at(-1);
  set('t-checkpoint', newest ? whole(newest.step) : 'none');
  set('t-age', newest ? ago(status.now - newest.time) : '\u00a0');
}

/** Who trains, in a few words: the same wherever the page says it. */
function group(status) {
  const members = status.workers.filter((worker) => worker.rank !== null).length;
  const spare = status.workers.length - members;
  if (!status.workers.length) {
    if (status.outcome) return 'all have left';
    return status.generation ? `none in session after generation ${whole(status.generation)}` : 'none has joined yet';
  }
  if (!members) return 'in no group yet';
  return `in generation ${whole(status.generation)}${spare ? `, ${whole(spare)} spare` : ''}`;
}

/** Newest values of a card's first scalars, each over its name. */
function showScalars(tile, card, of) {
  const [title, pair] = tile.children;
  // Before the first row nobody knows which scalars there are.
  tile.hidden = !card && cards.length > 0;
  if (!card) return;
  title.textContent = card.title;
  const series = card.series.slice(0, 2);
  const column = (one, at) => {
    const value = make('b', '', figure(of(one.key)));
    value.id = `t-${one.key}`;
    const name = make('small', '', series.length > 1 ? one.full : '\u00a0');
    name.title = name.textContent;
    return make('span', ['d', 'g'][at], value, name);
  };
  pair.replaceChildren(...series.map(column));
}

/** Makes the cards of the scalars that the newest row has, once for each set of them. */
function makeCards(scalars) {
  if (!scalars.length || !changed('scalars', scalars)) return;
  for (const { key, element } of cards) {
    element?.remove();
    delete charts[key];
  }
  const groups = new Map();
  for (const { name, group, of, label } of scalars.filter((scalar) => scalar.group !== 'setting')) {
    const key = group in GROUPS ? group : `scalar-${name}`;
    const series = groups.get(key) ?? [];
    const full = group === 'score' ? `D(${of})` : spoken(of);
    // A network's initial could be taken for the prefix of a number.
    series.push({ key: name, label: group === 'loss' ? full : label, full, color: COLORS[series.length % COLORS.length] });
    groups.set(key, series);
  }
  cards = [...groups].map(([key, series]) => {
    const [title, heading] = GROUPS[key] ?? [series[0].full, series[0].full];
    return { key, title, heading: series.length > 1 ? heading : title, series };
  });
  const own = cards.filter(({ key }) => !(key in GROUPS));
  for (const card of cards) if (card.key in GROUPS || own.length <= OWN_CARDS) makeCard(card);
  makeSmalls('scalars', own.length > OWN_CARDS ? own.map(({ series }) => series[0].key) : [], spoken);
  const settings = scalars.filter((scalar) => scalar.group === 'setting');
  makeSmalls('settings', settings.map(({ name }) => name), (name) => spoken(name.replace('setting_', '')));
}

function makeCard(card) {
  card.element = make('article', 'card chart', make('header', '', make('h2', '', card.heading), make('ul')), make('div', 'plot'));
  card.element.id = `c-${card.key}`;
  $('c-rate').before(card.element);
  charts[card.key] = new Chart(card.element, { smooth: true, series: card.series });
}

/** Fills a card with small curves, each with its name and its newest value. */
function makeSmalls(id, names, title) {
  if (!changed(`smalls-${id}`, names)) return;
  const places = names.map((name) => make('article', 'small', make('h3', '', title(name)), make('ul'), make('div', 'plot')));
  $(id).querySelector('.smalls').replaceChildren(...places);
  $(id).hidden = !names.length;
  smalls[id] = names.map((key, at) => new Chart(places[at], { small: true, series: [{ key, label: title(key), color: '--d' }] }));
}

function showSmalls(id, curves, marks) {
  for (const chart of smalls[id] ?? []) chart.set(curves, marks);
}

function showCurves(status, metrics) {
  // Where a group broke: curves show that nothing came of it.
  const perStep = Math.max(1, status.phases_per_step);
  const formed = known.events.filter((event) => event.kind === 'generation_formed' && event.generation > 1);
  const marks = formed.map((event) => event.position / perStep);
  const judge = ['non-saturating', 'minimax'].includes(status.job.loss?.kind);
  if (charts.score) charts.score.range = judge ? [0, 1] : null;
  for (const chart of Object.values(charts)) chart.set(metrics, marks);
  showSmalls('scalars', metrics, marks);
  showSmalls('settings', metrics, marks);
}

// ---- Samples ----------------------------------------------------------------------------------------------------------

const film = { at: -1, follows: true, playing: null };

function showPictures(status) {
  const every = status.job.sample.every_steps;
  if (!every) set('s-none', 'This job draws none: sample.every_steps is 0.');
  else if (status.outcome) set('s-none', 'None was drawn.');
  else set('s-none', `The next ones come with step ${whole((Math.floor(status.step / every) + 1) * every)}.`);
  const count = known.pictures.length;
  const slider = $('s-slider');
  slider.max = String(Math.max(0, count - 1));
  for (const id of ['s-slider', 's-play', 's-newest']) $(id).disabled = count < 1;
  if (film.follows && count) frame(count - 1);
  showReal(status);
}

function showReal(status) {
  if (!known.real || !changed('real', [known.real, known.seenPictures, status.data])) return;
  // Drawn again when samples are left out, so each count of pictures has an address of its own.
  const image = $('r-image');
  image.onload = () => image.parentElement.style.setProperty('--shape', `${image.naturalWidth} / ${image.naturalHeight}`);
  image.src = `${known.real}?run=${known.status.run}&n=${known.seenPictures}`;
  $('real').hidden = false;
  const names = (status.data?.classes ?? []).map((one) => one.name);
  const few = names.length && names.length === status.data.class_count;
  set('r-classes', few ? `; columns in turn: ${names.join(', ')}` : '');
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
  if (picture.url.endsWith('.txt')) return void showText(picture);
  image.src = `${picture.url}?run=${known.status.run}`;
  image.alt = `Images drawn at step ${whole(picture.step)}`;
  // As large as the pictures are: the frame takes their shape.
  image.onload = () => $('s-image').parentElement.style.setProperty('--shape', `${image.naturalWidth} / ${image.naturalHeight}`);
  image.hidden = false;
  $('s-none').hidden = true;
}

async function showText(picture) {
  const answer = await fetch(`${picture.url}?run=${known.status.run}`).catch(() => null);
  const text = answer?.ok ? await answer.text() : null;
  // Another step may be shown by now.
  if (text === null || film.at !== picture.step) return;
  set('s-text', text);
  $('s-text').hidden = false;
  $('s-none').parentElement.hidden = true;
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
  const gpu = worker.gpu_memory_bytes === null ? '' : `, GPU ${bytes(worker.gpu_memory_bytes)}`;
  const busy = worker.gpu_utilisation === null ? '' : `, ${worker.gpu_utilisation}\u00a0% busy`;
  return make(
    'tr',
    '',
    cell('Worker', 'who', make('b', '', worker.worker), rank),
    cell('Data shards', 'part', share, range),
    cell('State', 'doing', dot, workerState(worker)),
    cell('Update', 'n', whole(worker.position)),
    cell('Memory', 'n', bytes(worker.resident_bytes) + gpu),
    cell('Device', 'long', (worker.device || NONE) + busy),
    cell('Host', 'long', `${worker.host}, process ${worker.pid}${worker.local ? '' : ', joined'}`),
    cell('Heard', 'n', worker.heartbeat_age === null ? NONE : ago(worker.heartbeat_age)),
  );
}

const HEALTH = { new: 'loading', silent: 'silent', away: 'away' };

function showWorkers(status) {
  const { workers } = status;
  const troubles = Object.entries(HEALTH).map(([health, word]) => {
    const count = workers.filter((worker) => worker.health === health).length;
    return count ? `${whole(count)} ${word}` : '';
  });
  const count = workers.length ? `${whole(workers.length)} ` : '';
  set('w-count', [count + group(status), ...troubles, plural(status.data_shards, 'data shard')].filter(Boolean).join(' · '));
  const order = (worker) => worker.rank ?? 1e9 + worker.worker;
  const sorted = workers.slice().sort((a, b) => order(a) - order(b));
  const rows = sorted.map((worker) => workerRow(worker, Math.max(1, status.data_shards)));
  $('workers').closest('table').hidden = !rows.length;
  $('w-none').hidden = rows.length > 0;
  $('workers').replaceChildren(...rows);
  set('w-why', status.outcome ? 'The run has ended, and its workers have left.' : 'No worker is in session.');
  const started = known.events.findLast((event) => event.kind === 'coordinator_started');
  const command = !status.outcome && started?.address ? `worker --coordinator ${started.address}` : '';
  set('w-join', command);
  $('w-join').parentElement.hidden = !command;
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
  const { checkpoints, best } = status;
  const kept = status.job.checkpoint?.keep_last || CHECKPOINTS_SHOWN;
  if (!checkpoints.length || !changed('checkpoints', [checkpoints, best])) return;
  set('k-count', status.job.checkpoint?.keep_last ? `the last ${whole(kept)} are kept${best ? ', and the best' : ''}` : 'all are kept');
  // Those that are deleted by now are not listed.
  const newest = checkpoints.slice(-Math.min(kept, CHECKPOINTS_SHOWN));
  const others = checkpoints.filter((checkpoint) => checkpoint.step === best?.step && !newest.includes(checkpoint));
  const items = [...others, ...newest]
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
      const name = make('b', '', `step ${whole(checkpoint.step)}`, ...(checkpoint.step === best?.step ? [' ', make('span', 'rank', 'best')] : []));
      return make('li', '', name, digest, copy, make('time', '', clock(checkpoint.time)));
    });
  $('checkpoints').replaceChildren(...items);
}

function showEvaluations(status) {
  const rows = known.events.filter((event) => event.kind === 'evaluation' && event.metrics);
  if (!rows.length || !changed('evaluations', [rows.length, status.best])) return;
  // A step that was computed again was evaluated again, with the same figures.
  const steps = new Map(rows.map((row) => [row.step, row]));
  const sorted = [...steps.values()].sort((a, b) => a.step - b.step);
  const names = [...new Set(sorted.flatMap((row) => Object.keys(row.metrics)))];
  const curves = { step: sorted.map((row) => row.step) };
  for (const name of names) {
    const mean = sorted.map((row) => row.metrics[name] ?? null);
    curves[name] = { mean, low: mean, high: mean };
  }
  makeSmalls('evaluations', names, spoken);
  showSmalls('evaluations', curves, []);
  const best = status.best;
  set('v-best', best ? `best checkpoint: step ${whole(best.step)}, ${spoken(best.metric)} ${figure(best.value)}` : '');
  set('v-count', `${whole(sorted.length)} so far, the newest of step ${whole(sorted.at(-1).step)}`);
}

/** The beginning of a text that may be very long. */
const shortened = (text) => (text.length > TEXT ? `${text.slice(0, TEXT)}…` : text);

/** What an event says to people: its tone, and a sentence. */
function describe(event) {
  const worker = event.worker === null || event.worker === undefined ? 'a worker' : `worker ${event.worker}`;
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
    best_checkpoint: () => ['save', `The checkpoint of step ${whole(event.step)} is the best: ${spoken(event.metric)} ${figure(event.value)}`],
    alarm: () => ['bad', `Alarm, ${spoken(event.alarm)}: ${event.detail}`],
    alarm_over: () => ['good', `No ${spoken(event.alarm)} any more`],
    phase_skipped: () => ['warn', `A phase of step ${event.step} was skipped${reason}`],
    metrics_breach: () => ['bad', event.detail],
    stop_requested: () => ['quiet', 'A stop was asked for'],
    drain_requested: () => ['quiet', `An operator asks ${worker} to leave`],
    scale_requested: () => ['quiet', `An operator asks for ${plural(event.workers, 'local worker')}`],
    plan: () => ['quiet', `Planned: ${event.change}`],
    run_ended: () => [
      event.outcome === 'complete' ? 'good' : event.outcome === 'stopped' ? 'quiet' : 'bad',
      `The run ended: ${spoken(event.outcome)}${event.detail ? `, ${event.detail}` : ''}`,
    ],
    samples: () => ['quiet', `Samples of step ${whole(event.step)}`],
    real_samples: () => ['quiet', 'Real samples were drawn'],
    data: () => ['quiet', `The data has ${plural(event.found.samples, 'sample')} of ${event.found.width} x ${event.found.height} pixels`],
    passport: () => ['quiet', 'The passport of the run was taken'],
  }[event.kind];
  const [tone, text] = told ? told() : ['quiet', `${spoken(event.kind)}${reason}`];
  return { tone, text: shortened(String(text).charAt(0).toUpperCase() + String(text).slice(1)) };
}

const SILENT = new Set(['evaluation', 'samples', 'real_samples', 'passport']);

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
  if (!changed('job', [status.job, status.data])) return;
  const line = ([name, value]) => make('div', name === 'Warning' ? 'warn' : '', make('dt', '', name), make('dd', '', value));
  $('job').replaceChildren(...jobLines(status.job, status.data).map(line));
}

// The token is in the cookie by now; it need not stay in the address, where it can be read and copied.
if (location.search.includes('token=')) history.replaceState(null, '', location.pathname);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  for (const chart of [...Object.values(charts), ...Object.values(smalls).flat()]) chart.draw();
});
setInterval(() => awaySince && showAway(), 1000);
tick();

// The life of a run: how many workers trained when, what broke, what was saved. Time goes from left to right; times in which
// no coordinator ran for long are cut short.

import { clock, duration, plural } from './format.js';

const NS = 'http://www.w3.org/2000/svg';
const HEIGHT = 92;
const GROUND = 64;
const ROOF = 8;
/** A pause of so many seconds is drawn as a gap. */
const PAUSE = 90;
const GAP = 22;
const GROUPS = 400;
const MARKS = 300;

const MARKED = new Map([
  ['worker_lost', 'fault'],
  ['worker_dropped', 'fault'],
  ['condemned', 'fault'],
  ['checkpoint_damaged', 'fault'],
  ['metrics_breach', 'fault'],
  ['phase_skipped', 'fault'],
  ['checkpoint', 'checkpoint'],
  ['coordinator_started', 'start'],
]);

function element(name, attributes) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export class Timeline {
  constructor(strip, tip, describe) {
    Object.assign(this, { strip, tip, describe, events: [], status: null, now: 0 });
    this.svg = element('svg', { height: HEIGHT, role: 'img' });
    strip.append(this.svg);
    new ResizeObserver(() => this.draw()).observe(strip);
    this.svg.addEventListener('pointermove', (event) => this.point(event));
    this.svg.addEventListener('pointerleave', () => (this.tip.hidden = true));
  }

  set(events, status, now) {
    Object.assign(this, { events, status, now });
    this.draw();
  }

  /** Stretches of time in which something went on: [from, to]. */
  stretches() {
    const end = this.status.outcome ? (this.events.at(-1)?.time ?? this.now) : this.now;
    const spans = [];
    let ended = false;
    for (const { time, kind } of this.events) {
      const last = spans.at(-1);
      if (!last || (kind === 'coordinator_started' && time - last[1] > PAUSE)) spans.push([time, time]);
      else last[1] = Math.max(last[1], time);
      ended = kind === 'run_ended';
    }
    if (spans.length && !ended) spans.at(-1)[1] = Math.max(end, spans.at(-1)[1]);
    return spans;
  }

  /** Groups and the times between them: { from, to, size, event }, where a size of 0 is a regroup. */
  groups() {
    const found = [];
    const close = (time) => {
      const open = found.at(-1);
      if (open && open.to === null) open.to = Math.max(time, open.from);
    };
    for (const event of this.events) {
      if (event.kind === 'generation_formed') {
        close(event.time);
        found.push({ from: event.time, to: null, size: event.world_size, event });
      } else if (event.kind === 'regroup') {
        close(event.time);
        found.push({ from: event.time, to: null, size: 0, event });
      } else if (event.kind === 'run_ended') close(event.time);
    }
    close(this.now);
    return found.slice(-GROUPS);
  }

  scale(width) {
    const spans = this.stretches();
    const total = spans.reduce((sum, [from, to]) => sum + (to - from), 0) || 1;
    const room = Math.max(40, width - 2 - GAP * (spans.length - 1));
    let left = 1;
    const placed = spans.map(([from, to]) => {
      const span = { from, to, left, width: (room * (to - from)) / total };
      left += span.width + GAP;
      return span;
    });
    this.placed = placed;
    return (time) => {
      let at = placed[0];
      for (const span of placed) if (time >= span.from) at = span;
      // A clock may have been set back in between.
      const inside = Math.max(0, Math.min(time, at.to) - at.from);
      return at.left + (at.to > at.from ? (inside / (at.to - at.from)) * at.width : 0);
    };
  }

  draw() {
    const width = this.strip.clientWidth;
    if (!width || !this.status || !this.events.length) return;
    const { svg } = this;
    svg.setAttribute('width', width);
    svg.setAttribute('viewBox', `0 0 ${width} ${HEIGHT}`);
    const x = this.scale(width);
    const groups = this.groups();
    const most = Math.max(1, ...groups.map((group) => group.size));
    const parts = [element('line', { x1: 0, x2: width, y1: GROUND + 0.5, y2: GROUND + 0.5, class: 'ground' })];
    this.spots = [];
    for (const group of groups) {
      const [left, right] = [x(group.from), x(group.to)];
      const size = Math.max(group.size ? 1 : 2, right - left - (group.size ? 0.6 : 0));
      const height = group.size ? 10 + ((GROUND - ROOF - 10) * group.size) / most : GROUND - ROOF;
      parts.push(
        element('rect', { x: left, y: GROUND - height, width: size, height, rx: Math.min(3, size / 2), class: group.size ? 'train' : 'regroup' }),
      );
      if (group.size && size > 26) {
        const label = element('text', { x: left + 8, y: GROUND - height + 14, class: 'size' });
        label.textContent = size > 110 ? plural(group.size, 'worker') : group.size;
        parts.push(label);
      }
      this.spots.push({ left, right: left + size, group });
    }
    parts.push(...this.gaps(), ...this.markers(x), ...this.hours(x));
    svg.replaceChildren(...parts);
    const faults = this.events.filter((event) => MARKED.get(event.kind) === 'fault').length;
    const count = groups.filter((group) => group.size).length;
    svg.setAttribute('aria-label', `${count} generations, ${faults} faults. The list of events tells them one by one.`);
  }

  gaps() {
    return this.placed.slice(1).map((span) => {
      const middle = span.left - GAP / 2;
      return element('path', { d: `M${middle - 4} ${GROUND + 7}l3-14M${middle + 2} ${GROUND + 7}l3-14`, class: 'cut' });
    });
  }

  markers(x) {
    const marked = this.events.filter((event) => MARKED.has(event.kind)).slice(-MARKS);
    return marked.map((event) => {
      const mark = MARKED.get(event.kind);
      const at = x(event.time);
      this.spots.push({ left: at - 5, right: at + 5, event, top: mark === 'start' ? ROOF - 8 : GROUND });
      if (mark === 'fault') return element('path', { d: `M${at} ${GROUND + 4}l4.5 8h-9z`, class: 'fault' });
      if (mark === 'start') return element('line', { x1: at, x2: at, y1: 2, y2: GROUND, class: 'start' });
      return element('circle', { cx: at, cy: GROUND + 8, r: 3, class: 'checkpoint' });
    });
  }

  hours() {
    return this.placed.flatMap((span, at) => {
      const labels = [];
      const text = (place, anchor, time) => {
        const label = element('text', { x: place, y: HEIGHT - 4, class: 'hour', 'text-anchor': anchor });
        label.textContent = clock(time);
        labels.push(label);
      };
      if (at === 0 || span.width > 150) text(span.left, 'start', span.from);
      if (at === this.placed.length - 1 && span.width > 150) text(span.left + span.width, 'end', span.to);
      return labels;
    });
  }

  point(pointer) {
    const { offsetX, offsetY } = pointer;
    const near = (this.spots ?? []).filter((spot) => offsetX >= spot.left && offsetX <= spot.right);
    const marks = near.filter((spot) => spot.event && (offsetY >= GROUND) === (spot.top >= GROUND));
    const spot = marks[0] ?? near.find((spot) => spot.group);
    if (!spot) {
      this.tip.hidden = true;
      return;
    }
    const event = spot.event ?? spot.group.event;
    const head = document.createElement('strong');
    head.textContent = clock(event.time);
    const line = document.createElement('p');
    line.textContent = this.describe(event).text;
    const parts = [head, line];
    if (spot.group) {
      const length = document.createElement('p');
      length.textContent = `for ${duration(spot.group.to - spot.group.from)}`;
      parts.push(length);
    }
    this.tip.replaceChildren(...parts);
    this.tip.hidden = false;
    const room = document.documentElement.clientWidth - this.tip.offsetWidth - 8;
    this.tip.style.left = `${Math.max(8, Math.min(room, pointer.clientX + 12))}px`;
    this.tip.style.top = `${pointer.clientY + 18}px`;
  }
}

// Curves over steps, on a canvas: lines with the bounds of what each point stands for, or areas on top of each other.

import { figure, tick, whole } from './format.js';

const GUTTER = { left: 34, right: 10, top: 8, bottom: 20 };
/** Of a small chart, which has no axes. */
const EDGE = { left: 1, right: 5, top: 5, bottom: 5 };
const FONT = 11;
/** Least distance of the marks of two generations. */
const MARKS_APART = 12;

/** Round numbers that divide a range into about so many parts. */
export function ticks(low, high, count) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const raw = span / Math.max(1, count);
  const unit = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 2.5, 5, 10].map((n) => n * unit).find((n) => n >= raw);
  const found = [];
  for (let at = Math.ceil(low / size); at * size <= high + size * 1e-9; at += 1) found.push(at * size);
  return found;
}

function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(share * (sorted.length - 1))))];
}

export class Chart {
  /**
   * `series`: [{ key, label, color }], where a color names a custom property of CSS. `write` writes a value, `axis` one
   * beside an axis. A small chart has no axes, and its value in its heading.
   */
  constructor(card, { series, stacked = false, range = null, grounded = false, smooth = false, small = false, write = figure, axis = tick }) {
    Object.assign(this, { card, series, stacked, range, grounded, smooth, small, write, axis, data: null, marks: [], at: null });
    this.plot = card.querySelector('.plot');
    this.canvas = document.createElement('canvas');
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute('role', 'img');
    this.plot.append(this.canvas);
    this.tip = document.getElementById('tip');
    this.hidden = new Set();
    this.buildLegend();
    new ResizeObserver(() => this.draw()).observe(this.plot);
    this.canvas.addEventListener('pointermove', (event) => this.point(event.offsetX));
    this.canvas.addEventListener('pointerleave', () => this.point(null));
    this.canvas.addEventListener('blur', () => this.point(null));
    this.canvas.addEventListener('keydown', (event) => this.key(event));
  }

  buildLegend() {
    const list = this.card.querySelector('ul');
    const alone = this.series.length === 1;
    for (const one of this.series) {
      const item = document.createElement(alone ? 'span' : 'button');
      const value = document.createElement('b');
      one.value = value;
      if (!alone) {
        item.type = 'button';
        item.setAttribute('aria-pressed', 'true');
        item.style.setProperty('--c', `var(${one.color})`);
        item.append(one.label);
        item.addEventListener('click', () => this.toggle(one, item));
      }
      item.append(value);
      const line = document.createElement('li');
      line.append(item);
      list.append(line);
    }
  }

  toggle(one, button) {
    const hide = !this.hidden.has(one.key);
    if (hide && this.hidden.size === this.series.length - 1) return;
    this.hidden[hide ? 'add' : 'delete'](one.key);
    button.setAttribute('aria-pressed', String(!hide));
    this.draw();
  }

  set(data, marks) {
    this.data = data;
    this.marks = marks;
    const last = data.step.length - 1;
    const parts = this.series.map((one) => {
      const value = last < 0 ? null : data[one.key].mean[last];
      one.value.textContent = this.write(value);
      return `${one.label} ${this.write(value)}`;
    });
    const title = this.card.querySelector('h2, h3').textContent;
    const where = last < 0 ? 'no steps yet' : `step ${whole(data.step[last])}: ${parts.join(', ')}`;
    this.canvas.setAttribute('aria-label', `${title}, ${where}. Left and right move along the curve.`);
    this.draw();
  }

  shown() {
    return this.series.filter((one) => !this.hidden.has(one.key));
  }

  bounds() {
    if (this.range) return this.range;
    const shown = this.shown();
    if (this.stacked) {
      const sums = this.data.step.map((_, at) => shown.reduce((sum, one) => sum + (this.data[one.key].mean[at] ?? 0), 0));
      const sorted = sums.slice().sort((a, b) => a - b);
      return [0, (quantile(sorted, 0.99) || 1) * 1.12];
    }
    const all = shown.flatMap((one) => this.data[one.key].mean).filter((value) => value !== null);
    if (!all.length) return [0, 1];
    all.sort((a, b) => a - b);
    // A spike of the first steps must not flatten all that follows.
    let [low, high] = [quantile(all, 0.01), quantile(all, 0.99)];
    if (low >= 0 && (this.grounded || low < 0.5 * high)) low = 0;
    const pad = (high - low || Math.abs(high) || 1) * 0.12;
    return [low === 0 ? 0 : low - pad, high + pad];
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (!width || !height) return;
    const scale = window.devicePixelRatio || 1;
    const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
    if (this.canvas.width !== w || this.canvas.height !== h) Object.assign(this.canvas, { width: w, height: h });
    const ctx = this.canvas.getContext('2d');
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    ctx.clearRect(0, 0, width, height);
    const style = getComputedStyle(this.card);
    const color = (name) => style.getPropertyValue(name).trim();
    ctx.font = `${FONT}px ${style.fontFamily}`;
    const count = this.data ? this.data.step.length : 0;
    if (!count) {
      if (this.small) return;
      ctx.fillStyle = color('--muted');
      ctx.textAlign = 'center';
      ctx.fillText('no steps yet', width / 2, height / 2);
      return;
    }
    const [low, high] = this.bounds();
    const labels = this.labels(low, high);
    const room = Math.max(...labels.map(({ text }) => ctx.measureText(text).width));
    const edge = this.small ? EDGE : { ...GUTTER, left: Math.max(GUTTER.left, Math.ceil(room) + 12) };
    const box = { left: edge.left, right: width - edge.right, top: edge.top, bottom: height - edge.bottom };
    const steps = this.data.step;
    const [first, last] = [count > 1 ? steps[0] : 0, steps[count - 1]];
    const x = (step) => box.left + ((step - first) / Math.max(1, last - first)) * (box.right - box.left);
    const y = (value) => box.bottom - ((value - low) / (high - low || 1)) * (box.bottom - box.top);
    Object.assign(this, { x, box });
    if (!this.small) this.axes(ctx, color, { labels, first, last, x, y, box });
    ctx.save();
    ctx.beginPath();
    if (this.small) ctx.rect(0, 0, width, height);
    else ctx.rect(box.left, box.top - 4, box.right - box.left + 4, box.bottom - box.top + 5);
    ctx.clip();
    if (this.stacked) this.areas(ctx, color, x, y);
    else this.lines(ctx, color, x, y);
    ctx.restore();
    if (this.at !== null) this.cross(ctx, color, x, y, box);
  }

  /** Values beside the axis, with their texts. */
  labels(low, high) {
    const values = ticks(low, high, 4);
    const spacing = values.length > 1 ? values[1] - values[0] : Math.abs(values[0]);
    return values.map((value) => ({ value, text: this.axis(value, spacing) }));
  }

  axes(ctx, color, { labels, first, last, x, y, box }) {
    ctx.lineWidth = 1;
    ctx.textBaseline = 'middle';
    ctx.textAlign = 'right';
    for (const { value, text } of labels) {
      const at = Math.round(y(value)) + 0.5;
      if (at < box.top - 3 || at > box.bottom + 1) continue;
      ctx.strokeStyle = color('--grid');
      ctx.beginPath();
      ctx.moveTo(box.left, at);
      ctx.lineTo(box.right, at);
      ctx.stroke();
      ctx.fillStyle = color('--muted');
      ctx.fillText(text, box.left - 8, at);
    }
    ctx.textBaseline = 'alphabetic';
    ctx.fillStyle = color('--muted');
    const wanted = Math.max(2, Math.floor((box.right - box.left) / 70));
    const steps = ticks(first, last, wanted);
    for (const step of steps) {
      if (!Number.isInteger(step)) continue;
      const at = x(step);
      ctx.textAlign = at > box.right - 24 ? 'right' : at < box.left + 24 ? 'left' : 'center';
      ctx.fillText(tick(step, steps.length > 1 ? steps[1] - steps[0] : 1), at, box.bottom + 15);
    }
    ctx.strokeStyle = color('--mark');
    ctx.setLineDash([2, 3]);
    let drawn = -Infinity;
    for (const step of this.marks) {
      const at = Math.round(x(step)) + 0.5;
      // Where there are many, some of them show as much as all.
      if (step < first || step > last || at < drawn + MARKS_APART) continue;
      drawn = at;
      ctx.beginPath();
      ctx.moveTo(at, box.top);
      ctx.lineTo(at, box.bottom);
      ctx.stroke();
    }
    ctx.setLineDash([]);
  }

  lines(ctx, color, x, y) {
    const { step } = this.data;
    for (const one of this.shown()) {
      const { mean, low, high } = this.data[one.key];
      ctx.fillStyle = color(one.color);
      ctx.globalAlpha = 0.14;
      ctx.beginPath();
      step.forEach((at, i) => high[i] !== null && ctx.lineTo(x(at), y(high[i])));
      for (let i = step.length - 1; i >= 0; i -= 1) if (low[i] !== null) ctx.lineTo(x(step[i]), y(low[i]));
      ctx.fill();
      ctx.globalAlpha = 1;
    }
    for (const one of this.shown()) {
      const { mean } = this.data[one.key];
      ctx.strokeStyle = color(one.color);
      if (this.smooth) {
        ctx.globalAlpha = 0.3;
        stroke(ctx, step, mean, x, y, 1);
        ctx.globalAlpha = 1;
      }
      stroke(ctx, step, this.smooth ? smoothed(mean) : mean, x, y, 1.6);
      const end = mean.length - 1;
      if ((step.length === 1 || this.small) && mean[end] !== null) dot(ctx, x(step[end]), y(mean[end]), color(one.color));
    }
  }

  areas(ctx, color, x, y) {
    const { step } = this.data;
    let floor = step.map(() => 0);
    for (const one of this.shown()) {
      const top = floor.map((value, i) => value + (this.data[one.key].mean[i] ?? 0));
      ctx.fillStyle = color(one.color);
      ctx.beginPath();
      step.forEach((at, i) => ctx.lineTo(x(at), y(top[i])));
      for (let i = step.length - 1; i >= 0; i -= 1) ctx.lineTo(x(step[i]), y(floor[i]));
      ctx.fill();
      floor = top;
    }
  }

  cross(ctx, color, x, y, box) {
    const at = this.data.step[this.at];
    const place = Math.round(x(at)) + 0.5;
    ctx.strokeStyle = color('--muted');
    ctx.lineWidth = 1;
    ctx.beginPath();
    ctx.moveTo(place, box.top);
    ctx.lineTo(place, box.bottom);
    ctx.stroke();
    if (this.stacked) return;
    for (const one of this.shown()) {
      const value = this.data[one.key].mean[this.at];
      if (value !== null) dot(ctx, place, Math.max(box.top, Math.min(box.bottom, y(value))), color(one.color), color('--surface'));
    }
  }

  key(event) {
    const count = this.data ? this.data.step.length : 0;
    if (!count || !['ArrowLeft', 'ArrowRight', 'Home', 'End', 'Escape'].includes(event.key)) return;
    event.preventDefault();
    if (event.key === 'Escape') return this.point(null);
    const from = this.at ?? count - 1;
    const jump = Math.max(1, Math.round(count / 60));
    const to = { ArrowLeft: from - jump, ArrowRight: from + jump, Home: 0, End: count - 1 }[event.key];
    this.at = Math.max(0, Math.min(count - 1, to));
    this.show();
  }

  point(offset) {
    if (offset === null || !this.data || !this.data.step.length || !this.x) {
      if (this.at !== null) {
        this.at = null;
        this.tip.hidden = true;
        this.draw();
      }
      return;
    }
    const { step } = this.data;
    let [low, high] = [0, step.length - 1];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.x(step[middle]) <= offset) low = middle;
      else high = middle;
    }
    this.at = Math.abs(this.x(step[low]) - offset) <= Math.abs(this.x(step[high]) - offset) ? low : high;
    this.show();
  }

  show() {
    this.draw();
    const { tip, at, data } = this;
    tip.replaceChildren();
    const head = document.createElement('strong');
    head.textContent = `step ${whole(data.step[at])}`;
    tip.append(head);
    for (const one of this.shown().slice().reverse()) {
      const row = document.createElement('span');
      row.style.setProperty('--c', `var(${one.color})`);
      const value = document.createElement('b');
      value.textContent = this.write(data[one.key].mean[at]);
      row.append(one.label, value);
      tip.append(row);
    }
    tip.hidden = false;
    const frame = this.canvas.getBoundingClientRect();
    const place = frame.left + this.x(data.step[at]);
    const beyond = place + 14 + tip.offsetWidth > document.documentElement.clientWidth - 8;
    tip.style.left = `${Math.max(8, beyond ? place - 14 - tip.offsetWidth : place + 14)}px`;
    tip.style.top = `${Math.max(8, frame.top + 12)}px`;
  }
}

function stroke(ctx, step, values, x, y, width) {
  ctx.lineWidth = width;
  ctx.lineJoin = 'round';
  ctx.beginPath();
  let pen = false;
  step.forEach((at, i) => {
    if (values[i] === null) pen = false;
    else {
      ctx[pen ? 'lineTo' : 'moveTo'](x(at), y(values[i]));
      pen = true;
    }
  });
  ctx.stroke();
}

/** The trend of noisy values: a moving average over a fortieth of them. */
function smoothed(values) {
  const keep = 1 - 2 / (Math.max(1, values.length / 40) + 1);
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return weight ? sum / weight : value;
  });
}

function dot(ctx, x, y, fill, ring) {
  ctx.beginPath();
  ctx.arc(x, y, 3.5, 0, 2 * Math.PI);
  ctx.fillStyle = fill;
  ctx.fill();
  if (ring) {
    ctx.lineWidth = 1.5;
    ctx.strokeStyle = ring;
    ctx.stroke();
  }
}

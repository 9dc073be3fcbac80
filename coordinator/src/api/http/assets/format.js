// How the page writes numbers, times and sizes: all of them are written here, and alike everywhere.

export const NONE = '–';
const PREFIXES = ['', 'k', 'M', 'G', 'T', 'P', 'E'];
const SPACE = '\u00a0';

const isNumber = (value) => typeof value === 'number' && Number.isFinite(value);
const bare = (text) => (text.includes('.') ? text.replace(/0+$/, '').replace(/\.$/, '') : text);

/** A count, with all of its digits. */
export function whole(number) {
  return isNumber(number) ? Math.round(number).toLocaleString('en') : NONE;
}

/**
 * A measured value in a few characters: with so many significant digits from a thousandth on, with a prefix of the SI from
 * 10,000 on, and as a power of ten beyond both. As many digits at any time, for a figure that changes in its place.
 */
export function figure(value, digits = 3) {
  if (!isNumber(value)) return NONE;
  if (value === 0) return '0';
  const rounded = Number(value.toPrecision(digits));
  const size = Math.abs(rounded);
  if (size < 1e-3 || size >= 1e21) return power(value.toExponential(digits - 1));
  if (size < 1000) return rounded.toPrecision(digits);
  if (Math.abs(Math.round(value)) < 10000) return whole(value);
  const at = Math.floor(Math.log10(size) / 3);
  return `${(rounded / 1000 ** at).toPrecision(digits)}${SPACE}${PREFIXES[at]}`;
}

/** The same without zeros at its end, for a value that stands. */
export function brief(value, digits = 3) {
  const [number, ...rest] = figure(value, digits).split(SPACE);
  return [number.includes('e') ? number : bare(number), ...rest].join(SPACE);
}

/** 1.50e-4 as 1.5e-4. */
function power(text) {
  const [mantissa, exponent] = text.split('e');
  // No line ends behind the minus.
  return `${bare(mantissa)}e${exponent.replace('+', '').replace('-', '-\u2060')}`;
}

/** A value on an axis: with the digits that tell it from its neighbours, which are so far away. */
export function tick(value, spacing) {
  // A sum of roundings next to nothing.
  if (Math.abs(value) < spacing / 1000) return '0';
  const between = Math.floor(Math.log10(Math.abs(value))) - Math.floor(Math.log10(spacing));
  return brief(value, Math.min(8, Math.max(3, between + 2)));
}

/** A setting of a job, exactly. */
export function exact(value) {
  if (!isNumber(value)) return String(value ?? NONE);
  return value !== 0 && Math.abs(value) < 1e-4 ? power(value.toExponential()) : value.toLocaleString('en', { maximumFractionDigits: 12 });
}

export function percent(share) {
  return isNumber(share) ? `${Math.floor(100 * share)}${SPACE}%` : NONE;
}

export function duration(seconds) {
  if (!isNumber(seconds)) return NONE;
  const s = Math.max(0, Math.round(seconds));
  const two = (number) => String(number).padStart(2, '0');
  if (s < 60) return `${s}${SPACE}s`;
  if (s < 3600) return `${Math.floor(s / 60)}${SPACE}min ${two(s % 60)}${SPACE}s`;
  if (s < 86400) return `${Math.floor(s / 3600)}${SPACE}h ${two(Math.floor((s % 3600) / 60))}${SPACE}min`;
  return `${whole(Math.floor(s / 86400))}${SPACE}d ${Math.floor((s % 86400) / 3600)}${SPACE}h`;
}

/** A short time: in milliseconds up to a second, in seconds up to ten minutes. */
export function milliseconds(value, write = figure) {
  if (!isNumber(value)) return NONE;
  if (value < 1000) return `${write(value)}${SPACE}ms`;
  return value < 600_000 ? `${write(value / 1000)}${SPACE}s` : duration(value / 1000);
}

export const ago = (seconds) => (seconds < 5 ? 'just now' : `${duration(seconds)} ago`);

export function clock(time) {
  const date = new Date(time * 1000);
  const today = date.toDateString() === new Date().toDateString();
  const options = { hour: '2-digit', minute: '2-digit', second: '2-digit', hour12: false };
  return date.toLocaleString('en-GB', today ? options : { day: 'numeric', month: 'short', ...options });
}

export function bytes(count) {
  if (!isNumber(count)) return NONE;
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
  const at = Math.min(units.length - 1, count < 1 ? 0 : Math.floor(Math.log2(count) / 10));
  const size = count / 1024 ** at;
  return `${at === 0 || size >= 100 ? whole(size) : size.toPrecision(3)}${SPACE}${units[at]}`;
}

export const plural = (count, what) => `${whole(count)} ${what}${count === 1 ? '' : 's'}`;

/** A name of a program as words. */
const WORDS = { ema: 'EMA', frechet: 'Fréchet', kid: 'KID', kl: 'KL', r1: 'R1', r2: 'R2', wasserstein: 'Wasserstein' };
export const spoken = (name) => String(name).split('_').map((word) => WORDS[word] ?? word).join(' ');

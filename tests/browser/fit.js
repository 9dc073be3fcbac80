// Whether everything fits: asked of the dashboard by dashboard.py.

function named(element) {
  const place = [element.closest('[id]')?.id, element.getAttribute('class')].filter(Boolean).join(' ');
  return `${place}: ${element.textContent.trim().slice(0, 60)}`;
}

/** Whether a text is cut off and says so: its title has all of it. */
function saysSo(element) {
  const text = element.textContent.trim();
  return text !== '' && (element.title ?? '').includes(text);
}

/** Elements whose content does not fit into them, but for those that only screen readers see, and those that scroll down. */
function cutOff() {
  const isCut = (element) => {
    if (element instanceof SVGElement) {
      const [own, all] = [element, element.closest('svg')].map((part) => part.getBoundingClientRect());
      return element.localName === 'text' && (own.left < all.left - 1 || own.right > all.right + 1);
    }
    const style = getComputedStyle(element);
    const across = element.scrollWidth > element.clientWidth + 1;
    const down = element.scrollHeight > element.clientHeight + 1 && style.overflowY === 'hidden';
    return element.clientWidth > 1 && style.display !== 'inline' && (across || down) && !saysSo(element);
  };
  return [...document.querySelectorAll('main *, .top *, footer *')].filter(isCut).map(named);
}

/** Rectangles of the lines of a text, as far as they can be seen. */
function lines(node) {
  const element = node.parentElement;
  if (!node.textContent.trim() || !element.checkVisibility() || element.closest('.top, noscript, thead, .tip')) return [];
  const range = document.createRange();
  range.selectNodeContents(node);
  const scrolled = element.closest('.scroll, #events')?.getBoundingClientRect();
  const end = getComputedStyle(element).overflowX === 'hidden' ? element.getBoundingClientRect().right : Infinity;
  return [...range.getClientRects()]
    .filter(({ top, bottom }) => !scrolled || (top >= scrolled.top && bottom <= scrolled.bottom))
    // The letters of a line are lower than the line.
    .map(({ left, right, top, bottom }) => ({ left, right: Math.min(right, end), top: top + 3, bottom: bottom - 3, element }))
    .filter(({ left, right }) => right - left > 1);
}

/** Pairs of texts that lie over each other. */
function overlapping() {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const all = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) all.push(...lines(node));
  all.sort((one, other) => one.top - other.top);
  const found = [];
  all.forEach((one, at) => {
    for (let next = at + 1; next < all.length && all[next].top < one.bottom; next += 1) {
      const other = all[next];
      const meet = one.left + 1 < other.right && other.left + 1 < one.right;
      if (meet && one.element !== other.element) found.push(`${named(one.element)} | ${named(other.element)}`);
    }
  });
  return found;
}

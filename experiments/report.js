'use strict';
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const root = document.documentElement;

// Light and dark.
const theme = document.getElementById('theme');
theme.hidden = false;
theme.onclick = () => {
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  const now = root.dataset.theme || (dark ? 'dark' : 'light');
  root.dataset.theme = now === 'dark' ? 'light' : 'dark';
};

// Rows are hidden by a click in the legend, and lit by a pointer over them.
for (const button of all('.legend button')) {
  button.disabled = false;
  const row = button.dataset.row;
  button.onclick = () => {
    const shown = button.getAttribute('aria-pressed') === 'false';
    button.setAttribute('aria-pressed', shown);
    all(`.chart .r${row}`).forEach(e => e.classList.toggle('gone', !shown));
  };
}
const light = (row, on) => {
  document.body.classList.toggle('focus', on);
  all(`.chart .r${row}`).forEach(e => e.classList.toggle('lit', on));
};
for (const e of all('.legend button, tr[data-row]')) {
  e.addEventListener('pointerenter', p => {
    if (p.pointerType === 'mouse') light(e.dataset.row, true);
  });
  e.addEventListener('pointerleave', () => light(e.dataset.row, false));
}

// Tables are sorted by a click on a column; what is missing comes last.
for (const button of all('th button')) {
  button.onclick = () => {
    const head = button.closest('th'), body = head.closest('table').tBodies[0];
    const column = [...head.parentNode.children].indexOf(head);
    const first = head.classList.contains('t') ? 'ascending' : 'descending';
    const other = first === 'ascending' ? 'descending' : 'ascending';
    const order = head.getAttribute('aria-sort') === first ? other : first;
    all('th', head.parentNode).forEach(h => h.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', order);
    const sign = order === 'ascending' ? 1 : -1;
    const value = row => row.cells[column].dataset.v;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (!x || !y) return (x ? -1 : 0) + (y ? 1 : 0);
      const difference = Number(x) - Number(y);
      return sign * (Number.isNaN(difference) ? x.localeCompare(y) : difference);
    });
    body.append(...rows);
  };
}

// What lies below a pointer, read off the curves.
const names = Object.fromEntries(
    all('.legend button').map(b => [b.dataset.row, b.textContent.trim()]));
const numbers = text => text.trim().split(/\s+/).map(Number);
const digits = (value, percent) => percent ? `${(100 * value).toFixed(2)}%`
  : Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3 && value !== 0
  ? value.toExponential(2) : value.toPrecision(4);
for (const chart of all('.chart')) {
  const [x0, x1] = numbers(chart.dataset.x), [y0, y1] = numbers(chart.dataset.y);
  const [left, right, top, bottom] = numbers(chart.dataset.box);
  const log = chart.dataset.log === '1', percent = chart.dataset.percent === '1';
  const value = y => {
    const share = (bottom - y) / (bottom - top);
    return log ? y0 * (y1 / y0) ** share : y0 + share * (y1 - y0);
  };
  let curves, tip, cross;
  const clear = () => { tip?.remove(); cross?.remove(); tip = cross = null; };
  const show = event => {
    curves ??= all('.line', chart).map(e => ({e, points: e.getAttribute('d')
      .slice(1).split('L').map(numbers)})).reverse();
    const box = chart.getBoundingClientRect(), wide = chart.viewBox.baseVal.width;
    const at = (event.clientX - box.left) * wide / box.width;
    clear();
    if (at < left - 8 || at > right + 8) return;
    const found = curves.filter(c => !c.e.classList.contains('gone')).map(c => ({
      row: c.e.dataset.row, point: c.points.reduce((a, b) =>
        Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)}))
      .sort((a, b) => a.point[1] - b.point[1]);
    if (!found.length) return;
    const nearest = found.reduce((a, b) =>
      Math.abs(b.point[0] - at) < Math.abs(a.point[0] - at) ? b : a).point[0];
    cross = document.createElementNS('http://www.w3.org/2000/svg', 'path');
    cross.setAttribute('class', 'cross');
    cross.setAttribute('d', `M${nearest} ${top}V${bottom}`);
    chart.append(cross);
    tip = document.createElement('div');
    tip.className = 'tip';
    const head = document.createElement('small');
    const x = x0 + (nearest - left) / (right - left) * (x1 - x0);
    head.textContent = `${chart.dataset.label} ${Number(x.toPrecision(3))}`;
    tip.append(head);
    for (const {row, point} of found.filter(
        f => Math.abs(f.point[0] - nearest) < 1)) {
      const line = document.createElement('div'), dot = document.createElement('i');
      const name = document.createElement('span'), number = document.createElement('b');
      dot.className = `r${row}`;
      name.textContent = names[row];
      number.textContent = digits(value(point[1]), percent);
      line.append(dot, name, number);
      tip.append(line);
    }
    const figure = chart.closest('figure'), frame = figure.getBoundingClientRect();
    figure.append(tip);
    const x_ = box.left - frame.left + nearest * box.width / wide;
    const flip = x_ + tip.offsetWidth + 14 > frame.width;
    const start = flip ? x_ - tip.offsetWidth - 12 : x_ + 12;
    tip.style.left = `${Math.max(10 - frame.left, start)}px`;
    tip.style.top = `${event.clientY - frame.top + 14}px`;
  };
  chart.addEventListener('pointermove', show);
  chart.addEventListener('pointerdown', show);
  // What a finger has touched stays, until it touches something else.
  chart.addEventListener('pointerleave', event => {
    if (event.pointerType === 'mouse') clear();
  });
  document.addEventListener('pointerdown', event => {
    if (!chart.contains(event.target)) clear();
  });
}

// The picture of the page: clicks and boxes on it, sent as fractions of its width and height.
// gradio runs this once for the element, with `element`, `props`, `trigger` and `watch`.
let start = null; // where a box is being drawn from

const image = () => element.querySelector('img');
const band = () => element.querySelector('.band');
const drawsBoxes = () => ['around', 'like', 'unlike'].includes(props.tool);
const isOver = (event) => image() && event.target === image();

const at = (event) => {
  const shown = image().getBoundingClientRect();
  const inside = (v) => Math.min(Math.max(v, 0), 1);
  return [inside((event.clientX - shown.left) / shown.width), inside((event.clientY - shown.top) / shown.height)];
};

// Shows at once what was done; the answer takes the place of it.
const mark = (kind, [x1, y1], [x2, y2]) => {
  const style = band().style, percent = (v) => `${100 * v}%`;
  band().className = `band ${kind}`;
  band().hidden = false;
  style.left = percent(Math.min(x1, x2));
  style.top = percent(Math.min(y1, y2));
  style.width = kind === 'box' ? percent(Math.abs(x2 - x1)) : '';
  style.height = kind === 'box' ? percent(Math.abs(y2 - y1)) : '';
};

const click = (event, right) => {
  const point = at(event);
  mark('dot', point, point);
  trigger('click', {at: point, right});
};

element.addEventListener('click', (event) => {
  if (isOver(event) && !drawsBoxes()) click(event, false);
});
element.addEventListener('contextmenu', (event) => {
  if (!isOver(event)) return;
  event.preventDefault();
  if (!drawsBoxes()) click(event, true);
});
element.addEventListener('pointerdown', (event) => {
  if (!isOver(event) || !drawsBoxes() || event.button) return;
  event.preventDefault();
  start = at(event);
  image().setPointerCapture(event.pointerId);
});
element.addEventListener('pointermove', (event) => {
  if (start) mark('box', start, at(event));
});
element.addEventListener('pointerup', (event) => {
  if (!start) return;
  trigger('select', {box: [...start, ...at(event)]});
  start = null;
});
element.addEventListener('pointercancel', () => {
  start = null;
  band().hidden = true;
});
// `answer` is another number each time: what changes nothing is answered, too.
watch(['value', 'answer'], () => { if (!start) band().hidden = true; });

// A photo dropped anywhere is opened; the browser would leave the page for it.
window.addEventListener('dragover', (event) => event.preventDefault());
window.addEventListener('drop', (event) => {
  event.preventDefault();
  const input = document.querySelector('#another input[type=file]');
  if (!input || !event.dataTransfer.files.length || event.target.closest('#drop')) return;
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
});

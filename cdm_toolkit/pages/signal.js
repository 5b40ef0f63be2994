const text = document.getElementById("text"), detail = document.getElementById("detail");
const tokens = [...text.querySelectorAll("button")];
let at = Number(text.dataset.first);
function show(to, focus) {
  tokens[at].tabIndex = -1;
  tokens[at].removeAttribute("aria-current");
  at = Math.max(0, Math.min(tokens.length - 1, to));
  tokens[at].tabIndex = 0;
  tokens[at].setAttribute("aria-current", "true");
  detail.replaceChildren(document.getElementById("p" + at).content.cloneNode(true));
  if (focus) tokens[at].focus();
}
function onLine(step) {
  const own = tokens[at].getBoundingClientRect(), middle = own.left + own.width / 2;
  let line = null, best = at, least = Infinity;
  for (let i = at + step; i >= 0 && i < tokens.length; i += step) {
    const box = tokens[i].getBoundingClientRect();
    if (Math.abs(box.top - own.top) < own.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > own.height / 2) break;
    const away = Math.abs(box.left + box.width / 2 - middle);
    if (away < least) { best = i; least = away; }
  }
  return best;
}
text.addEventListener("click", event => {
  const token = event.target.closest("button");
  if (token) show(tokens.indexOf(token), true);
});
document.addEventListener("keydown", event => {
  const inText = text.contains(document.activeElement);
  if (event.ctrlKey || event.altKey || event.metaKey || !(inText || document.activeElement === document.body)) return;
  const to = { ArrowRight: () => at + 1, ArrowLeft: () => at - 1, Home: () => 0, End: () => tokens.length - 1,
               ArrowDown: () => inText ? onLine(1) : null, ArrowUp: () => inText ? onLine(-1) : null }[event.key]?.();
  if (to == null) return;
  event.preventDefault();
  show(to, true);
});
document.querySelectorAll("input[name=by]").forEach(input => {
  input.addEventListener("change", () => { document.getElementById("page").dataset.by = input.value; });
  if (input.checked) document.getElementById("page").dataset.by = input.value;
});
show(at, false);

// Making and finding elements. Text is only ever set as text: nothing that a model, a task or a
// person wrote can become markup.

export const byId = (id) => document.getElementById(id);

/** Return a new element with properties and children; strings become text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function megabytes(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)}\u00a0GB` : `${Math.round(bytes / 1e6)}\u00a0MB`;
}

export function percent(share) {
  return `${Math.round(100 * share)}%`;
}

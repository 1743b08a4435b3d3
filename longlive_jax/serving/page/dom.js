// Small things that several modules do to the page.

export const $ = (selector, root = document) => root.querySelector(selector);

/** An element with properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function symbol(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick, className = "icon") {
  const made = element("button", { type: "button", className, onclick, title: label }, symbol(name));
  made.setAttribute("aria-label", label);
  return made;
}

/** Said by a screen reader. */
export function announce(text) {
  $("#live").textContent = text;
}

export function fail(error) {
  const box = $("#error");
  $("span", box).textContent = typeof error === "string" ? error : error.message;
  box.hidden = false;
}

/** Hands a blob to the browser's downloads. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Opens the file dialog of an input; `take(text)` gets the file's words, its errors are shown. */
export function opens(button, input, take) {
  button.addEventListener("click", () => input.click());
  input.addEventListener("change", async () => {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      await take(await file.text());
    } catch (error) {
      fail(error);
    }
  });
}

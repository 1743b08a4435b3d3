// Dark, light, or as the system has it.

const NEXT = { auto: "light", light: "dark", dark: "auto" };

export function theme(button) {
  let now = localStorage.getItem("longlive.theme") ?? "auto";
  const show = () => {
    document.documentElement.dataset.theme = now;
    button.setAttribute("aria-label", `Theme: ${now}`);
    button.title = `Theme: ${now}`;
  };
  button.addEventListener("click", () => {
    now = NEXT[now] ?? "auto";
    localStorage.setItem("longlive.theme", now);
    show();
  });
  show();
}

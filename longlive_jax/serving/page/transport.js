// Pause, full screen, and the files that are kept of a stream.

import { $, announce, download, fail } from "./dom.js";

export function notice(text) {
  $("#notice").hidden = !text;
  $("#notice").textContent = text;
  if (text) announce(text);
}

const LINKS = {
  connecting: "Connecting", open: "Live", waiting: "Connecting again", closed: "Ready", ended: "Ended", gone: "Gone",
};
export function link(name) {
  $("#link").dataset.link = name;
  $("#link span").textContent = LINKS[name];
}

export function showPaused(now) {
  const button = $("#pause");
  $("use", button).setAttribute("href", now ? "#i-play" : "#i-pause");
  button.setAttribute("aria-label", now ? "Play" : "Pause");
}

/** Wires the buttons to a player; `live()` says whether there is a stream. Returns the pause switch. */
export function transport({ server, player, live }) {
  const toggle = () => {
    if (!live()) return;
    player.pause(!player.paused);
    showPaused(player.paused);
    notice(player.paused ? "Paused" : "");
  };
  const keep = async (file) => {
    try {
      const response = await server.request(`streams/${player.id}/${file}`);
      download(await response.blob(), `longlive-${player.id}-${file}`);
    } catch (error) {
      fail(error);
    }
  };
  $("#pause").addEventListener("click", toggle);
  $("#video").addEventListener("click", () => keep("video.mp4"));
  $("#script").addEventListener("click", () => keep("script.json"));
  $("#dice").addEventListener("click", () => { $("#seed").value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1; });
  $("#error button").addEventListener("click", () => { $("#error").hidden = true; });
  $("#full").hidden = !document.fullscreenEnabled;
  $("#full").addEventListener("click", () =>
    (document.fullscreenElement ? document.exitFullscreen() : $("#view").requestFullscreen()));
  return toggle;
}

// The picture or clip that a film begins from: dropped, or chosen in the file dialog.

import { $, announce, fail } from "./dom.js";

export class StartImage {
  /** `limits()`, `model()`: of the server, and the chosen one. `chunks`: of a clip. */
  constructor(server, limits, model) {
    Object.assign(this, { server, limits, model, upload: null, chunks: 0 });
    const frame = $("#frame"), file = $("#file");
    $("#pick").addEventListener("click", () => file.click());
    file.addEventListener("change", () => {
      if (file.files[0]) this.take(file.files[0]);
      file.value = "";
    });
    // Anywhere on the page: a miss would leave the page for the file.
    addEventListener("dragover", (event) => {
      event.preventDefault();
      frame.classList.add("over");
    });
    addEventListener("dragleave", (event) => event.relatedTarget || frame.classList.remove("over"));
    addEventListener("drop", (event) => {
      event.preventDefault();
      frame.classList.remove("over");
      const [dropped] = event.dataTransfer.files;
      if (dropped && document.documentElement.dataset.mode === "film") this.take(dropped);
    });
    $("#start-image button").addEventListener("click", () => this.clear());
  }

  async take(file) {
    const limit = this.limits().upload;
    if (limit && file.size > limit) {
      fail(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; this server takes ${(limit / 1e6).toFixed(1)} MB.`);
      return;
    }
    try {
      const { name, fps, chunk_frames: length } = this.model();
      const { upload, kind, chunks = 0 } = await this.server.json(`uploads?model=${encodeURIComponent(name)}`, { method: "POST", body: file });
      this.clear();
      Object.assign(this, { upload, chunks });
      const box = $("#start-image"), picture = $("img", box);
      picture.hidden = kind !== "image";
      if (kind === "image") picture.src = URL.createObjectURL(file);
      const seconds = ((chunks * length - 3) / fps).toFixed(1);
      const what = kind === "clip" ? `${file.name}, its last ${seconds} s` : file.name;
      $("span", box).textContent = document.documentElement.dataset.state === "live" ? `${what}, for the next film` : what;
      box.hidden = false;
      announce(`Begins from ${file.name}`);
    } catch (error) {
      fail(error);
    }
  }

  clear() {
    const picture = $("#start-image img");
    if (picture.src) URL.revokeObjectURL(picture.src);
    picture.removeAttribute("src");
    $("#start-image").hidden = true;
    Object.assign(this, { upload: null, chunks: 0 });
  }
}

// Which models the server has, which is chosen, and what the page shows of it.

import { $, element } from "./dom.js";

export class Models {
  /** `example(text)` takes an example prompt. */
  constructor(example) {
    Object.assign(this, { example, all: [], limits: {}, now: null });
  }

  take({ models, limits }) {
    Object.assign(this, { all: models, limits });
    for (const radio of document.querySelectorAll("input[name=mode]")) {
      radio.disabled = !this.first(radio.value);
      radio.parentElement.title = radio.disabled && radio.value === "world"
        ? "No model of this server takes keys" : "";
    }
    this.choose(models[0]);
  }

  named(name) {
    return this.all.find((model) => model.name === name);
  }

  first(kind) {
    return this.all.find((model) => model.kind === kind);
  }

  /** Shows a model and its mode. */
  choose(model) {
    this.now = model;
    $(`input[name=mode][value=${model.kind}]`).checked = true;
    document.documentElement.dataset.mode = model.kind;
    const how = $("input[name=how]:checked");
    if (model.kind === "world" && how.value === "cut") $("input[name=how][value=continue]").checked = true;
    const same = this.all.filter(({ kind }) => kind === model.kind);
    $("#model").replaceChildren(...same.map(({ name, title }) => element("option", { value: name, textContent: title })));
    $("#model").value = model.name;
    $(".stage").style.setProperty("--aspect", model.width / model.height);
    $("#steps").value = model.steps;
    $("#choices").replaceChildren(...(model.steps_choices ?? []).map((value) => element("option", { value })));
    $("#guidance").value = "";
    $("#guidance").placeholder = model.guidance ?? "model’s";
    $("#examples").replaceChildren(...model.prompts.slice(0, 4).map((text) => element("li", {},
      element("button", { type: "button", textContent: text, onclick: () => this.example(text) }))));
    this.settable();
  }

  /** The seed is a whole stream's; steps and guidance are where the server has more than one. */
  settable() {
    const live = document.documentElement.dataset.state === "live";
    const choices = this.now?.steps_choices, guided = this.now?.guided !== false;
    $("#steps").disabled = choices?.length < 2;
    $("#steps").title = choices ? `This server has ${choices.join(", ")}` : "";
    $("#guidance").disabled = !guided;
    $("#guidance").title = guided ? "" : "This server samples without guidance";
    $("#seed").disabled = $("#dice").disabled = live;
  }
}

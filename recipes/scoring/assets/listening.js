"use strict";
// One trial at a time, in an order drawn from the test and the rater; answers are kept in
// localStorage and saved as a JSON file.
const test = JSON.parse(document.getElementById("test").textContent);
const main = document.getElementById("trial");
const store = `listening-${test.test}`;
const SCALES = {
  mushra: ["bad", "poor", "fair", "good", "excellent"],
  mos: ["bad", "poor", "fair", "good", "excellent"],
  smos: ["not at all similar", "slightly similar", "moderately similar", "very similar", "the same"],
};
const QUESTIONS = {
  mushra: "How good is each sample, compared with the reference? One of them is the reference.",
  mos: "How natural and clear is this speech?",
  smos: "How similar is the voice of the sample to the voice of the reference?",
};
let session = null;
try {
  session = JSON.parse(localStorage.getItem(store));
} catch {
  // A browser without storage keeps the answers until the page is closed.
}

function keep() {
  try {
    localStorage.setItem(store, JSON.stringify(session));
  } catch {
    // See above.
  }
}

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// FNV-1a, then mulberry32.
function generator(text) {
  let state = 2166136261;
  for (const character of text) state = Math.imul(state ^ character.codePointAt(0), 16777619);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let value = Math.imul(state ^ (state >>> 15), 1 | state);
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value;
    return ((value ^ (value >>> 14)) >>> 0) / 4294967296;
  };
}

function shuffled(items, random) {
  const order = [...items];
  for (let last = order.length - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1));
    [order[last], order[other]] = [order[other], order[last]];
  }
  return order;
}

function trialsOf(rater) {
  const random = generator(`${test.test} ${rater}`);
  return shuffled(test.trials, random).map((trial) => ({
    ...trial, stimuli: shuffled(trial.stimuli, random),
  }));
}

function audio(index, label, onplay = () => {}) {
  return make("audio", {
    controls: true, preload: "auto", "aria-label": label, src: test.audio[index], onplay,
  });
}

function welcome() {
  const name = make("input", {id: "rater", required: true, autocomplete: "off", maxlength: 80});
  const begin = (event) => {
    event.preventDefault();
    const rater = name.value.trim();
    if (!rater) return;
    session = {rater, place: 0, scores: {}, played: {}};
    keep();
    show();
  };
  main.replaceChildren(
    make("form", {onsubmit: begin},
      make("p", {}, make("label", {for: "rater"}, "Your name or number: "), name),
      make("button", {type: "submit", class: "main"}, "Start")),
  );
}

function complete(trial) {
  return trial.stimuli.every(({key}) => key in session.scores && key in session.played);
}

function rating(stimulus, number, update) {
  const {key} = stimulus;
  const set = (value) => {
    session.scores[key] = Number(value);
    keep();
    update();
  };
  const title = test.kind === "mushra" ? `Sample ${number}` : "Sample";
  const id = `score-${number}`;
  const heard = () => {
    session.played[key] = true;
    keep();
    update();
  };
  const player = audio(stimulus.audio, title, heard);
  if (test.kind === "mushra") {
    const known = session.scores[key];
    const value = make("output", {for: id}, known ?? "not rated");
    const slider = make("input", {
      type: "range", id, min: 0, max: 100, step: 1, value: known ?? 50,
      class: known === undefined ? "unrated" : "",
      oninput: () => {
        slider.className = "";
        value.textContent = slider.value;
        set(slider.value);
      },
    });
    const words = make("div", {class: "words", "aria-hidden": "true"},
      ...SCALES.mushra.map((word) => make("span", {}, word)));
    return make("div", {class: "stimulus"}, make("h3", {}, title), player,
      make("label", {for: id}, "Score from 0 to 100: ", value), slider, words);
  }
  const choices = SCALES[test.kind].map((word, index) => make("label", {class: "choice"},
    make("input", {
      type: "radio", name: id, value: index + 1, checked: session.scores[key] === index + 1,
      onchange: () => set(index + 1),
    }), `${index + 1}: ${word}`));
  return make("div", {class: "stimulus"}, make("h3", {}, title), player,
    make("fieldset", {}, make("legend", {}, QUESTIONS[test.kind]), ...choices));
}

function show() {
  const trials = trialsOf(session.rater);
  if (session.place >= trials.length) {
    finish(trials);
    return;
  }
  const trial = trials[session.place];
  const next = make("button", {type: "button", class: "main", onclick: () => step(1)}, "Next");
  const back = make("button", {type: "button", onclick: () => step(-1)}, "Back");
  const hint = make("p", {class: "faint", "aria-live": "polite"});
  const update = () => {
    next.disabled = !complete(trial);
    hint.textContent = next.disabled ? "Play and rate every sample to continue." : "";
  };
  back.disabled = session.place === 0;
  const heading = make("h2", {tabindex: "-1"}, `Trial ${session.place + 1} of ${trials.length}`);
  const parts = [heading, make("progress", {
    max: trials.length, value: session.place, "aria-label": "Trials done",
  })];
  if (test.kind === "mushra") parts.push(make("p", {}, QUESTIONS.mushra));
  if (trial.text) parts.push(make("p", {class: "faint"}, `Text: ${trial.text}`));
  if (trial.reference !== null) {
    parts.push(make("div", {class: "stimulus"}, make("h3", {}, "Reference"),
      audio(trial.reference, "Reference")));
  }
  parts.push(...trial.stimuli.map((one, index) => rating(one, index + 1, update)));
  parts.push(hint, make("p", {class: "buttons"}, back, next));
  main.replaceChildren(...parts);
  update();
  heading.focus();
}

function step(by) {
  session.place += by;
  keep();
  show();
}

function finish(trials) {
  const answers = trials.flatMap((trial) => trial.stimuli.map(({key}) => ({
    trial: trial.key, stimulus: key, score: session.scores[key],
  })));
  const save = () => {
    const record = {
      format: 1, test: test.test, kind: test.kind, rater: session.rater,
      saved: new Date().toISOString(), answers,
    };
    const file = new Blob([`${JSON.stringify(record)}\n`], {type: "application/json"});
    const link = make("a", {
      href: URL.createObjectURL(file),
      download: `ratings-${test.test}-${session.rater.replace(/[^A-Za-z0-9_-]+/g, "-")}.json`,
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const again = () => {
    if (!confirm("Remove the answers of this browser and start as another rater?")) return;
    try {
      localStorage.removeItem(store);
    } catch {
      // Nothing is stored.
    }
    session = null;
    welcome();
  };
  main.replaceChildren(
    make("h2", {}, "Thank you"),
    make("p", {}, "All samples are rated. Save the answers and send the file to whoever asked you."),
    make("p", {class: "buttons"},
      make("button", {type: "button", onclick: () => step(-1)}, "Back"),
      make("button", {type: "button", class: "main", id: "save", onclick: save}, "Save answers"),
      make("button", {type: "button", onclick: again}, "Another rater")),
  );
}

document.addEventListener("play", (event) => {
  for (const player of document.querySelectorAll("audio")) {
    if (player !== event.target) player.pause();
  }
}, true);

if (session === null) welcome();
else show();

// The page: a visitor's history that is clicked together, or a user's, and the list that changes with it.
"use strict";

const LENGTH = 20; // of the list
const at = (id) => document.getElementById(id);
const state = { user: null, past: [], before: new Map(), number: 0, chosen: 0 };

async function call(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({})); // a proxy may answer with text
  if (!response.ok) throw new Error(answer.detail || response.statusText);
  return answer;
}

// Texts are set as text only: titles come from the data and may contain anything.
function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function button(text, label, action) {
  const made = element("button", text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.addEventListener("click", () => guarded(action));
  return made;
}

async function guarded(action) {
  at("message").textContent = "";
  try {
    await action();
  } catch (error) {
    at("message").textContent = error.message;
  }
}

function named(item, title, small) {
  const name = element("span", title, "name");
  name.append(element("small", small ? `${item} · ${small}` : item));
  return name;
}

function showPast() {
  at("who").textContent = state.user === null
    ? (state.past.length ? "A visitor" : "Find an item and add it, or choose a user.")
    : `User ${state.user}`;
  const rows = state.past.map((event, position) => {
    const time = state.user === null ? "" : new Date(event.time * 1000).toISOString().slice(0, 16).replace("T", " ");
    const row = element("li", undefined, event.appended ? "appended" : "");
    row.append(named(event.item, event.title, event.appended && state.user !== null ? `${time} · added` : time));
    if (state.user === null) {
      row.append(button("Remove", `Remove ${event.title}`, async () => {
        state.past.splice(position, 1);
        await refresh();
      }));
    }
    return row;
  });
  at("past").replaceChildren(...rows.reverse());
}

function movement(item, rank) {
  if (!state.before.size) return element("span", "", "moved");
  if (!state.before.has(item)) return element("span", "new", "moved up");
  const by = state.before.get(item) - rank;
  if (by === 0) return element("span", "", "moved");
  return element("span", by > 0 ? `▲ ${by}` : `▼ ${-by}`, by > 0 ? "moved up" : "moved down");
}

function showList(list) {
  const how = list.ranked_by === "popularity" ? "the most popular items, as there is no history" : list.ranked_by;
  at("how").textContent = list.items.length ? `Ranked by: ${how}` : "No item may be listed.";
  at("list").replaceChildren(...list.items.map((one, index) => {
    const row = element("li");
    const columns = Object.entries(one.columns).filter(([, value]) => value !== null && value !== "");
    const more = [one.score === null ? "" : one.score.toFixed(3), ...columns.map(([key, value]) => `${key} ${value}`)];
    row.append(
      element("span", String(index + 1), "rank"),
      movement(one.item, index),
      named(one.item, one.title, more.filter(Boolean).join(" · ")),
      button("Add", `Add ${one.title} to the history`, () => add(one)),
    );
    return row;
  }));
  state.before = new Map(list.items.map((one, index) => [one.item, index]));
}

function pastOf(user) {
  return call(`history?last=50&user=${encodeURIComponent(user)}`);
}

async function refresh() {
  const number = ++state.number; // of this request: answers of earlier ones are dropped
  if (state.user !== null) {
    const history = await pastOf(state.user);
    if (number !== state.number) return;
    state.past = history.events;
  }
  showPast();
  const only = at("only").value.split(";").map((one) => one.trim()).filter(Boolean);
  const asked = { k: LENGTH, only, exclude_seen: at("seen").checked };
  if (state.user !== null) asked.users = [state.user];
  else asked.histories = [{ items: state.past.map((event) => event.item) }];
  const answer = await call("recommend", asked);
  if (number === state.number) showList(answer.lists[0]);
}

async function add(one) {
  if (state.user === null) {
    state.past.push({ item: one.item, title: one.title, appended: true });
  } else {
    // Right after the last event: the data may be older than today.
    const last = state.past.at(-1);
    const time = last ? last.time + 1 : Math.floor(Date.now() / 1000);
    await call("append", { user: state.user, events: [{ item: one.item, time }] });
  }
  await refresh();
}

async function choose(user) {
  const chosen = ++state.chosen;
  // Nothing changes for a user who does not exist: "Add" belongs to whoever is shown.
  if (user !== null) await pastOf(user);
  if (chosen !== state.chosen) return; // another one was chosen meanwhile
  state.user = user;
  state.past = [];
  state.before = new Map();
  await refresh();
}

async function find() {
  const items = await call(`items?limit=20&q=${encodeURIComponent(at("words").value)}`);
  const rows = items.map((one) => {
    const row = element("li");
    row.append(named(one.item, one.title), button("Add", `Add ${one.title} to the history`, () => add(one)));
    return row;
  });
  at("found").replaceChildren(...(rows.length ? rows : [element("li", "No item has this id or title.")]));
}

async function suggestUsers() {
  const users = await call(`users?limit=20&q=${encodeURIComponent(at("user").value)}`);
  at("users").replaceChildren(...users.map((user) => {
    const option = element("option");
    option.value = user;
    return option;
  }));
}

function onSubmit(id, action) {
  at(id).addEventListener("submit", (event) => {
    event.preventDefault();
    guarded(action);
  });
}

onSubmit("user-form", async () => {
  const user = at("user").value.trim();
  await choose(user || null);
});
onSubmit("item-form", find);
onSubmit("filter-form", refresh);
at("seen").addEventListener("change", () => guarded(refresh));
at("user").addEventListener("input", () => guarded(suggestUsers));
at("clear").addEventListener("click", () => guarded(async () => {
  at("user").value = "";
  await choose(null);
}));
guarded(async () => {
  const health = await call("health");
  at("run").textContent = health.run;
  at("facts").textContent = `${health.model}, ${health.items.toLocaleString()} items, ${health.users.toLocaleString()} users`;
  document.title = `FindRec ${health.run}`;
  await suggestUsers();
  await refresh();
});

// Keeps an open page fresh: the server says that something changed, and the same page is fetched again.
"use strict";
(() => {
  const note = document.getElementById("live");
  let wanted = false;
  let busy = false;

  const say = (word) => {
    note.textContent = word;
    note.dataset.state = word;
  };

  const openDetails = (root) => [...root.querySelectorAll("details[id]")];

  const refresh = async () => {
    // Never pull words away from under a reader who is selecting them, nor work for a page nobody sees.
    const selecting = String(getSelection()).length > 0 || document.activeElement?.matches("main input");
    if (busy || document.hidden || selecting) {
      wanted = true;
      return;
    }
    busy = true;
    wanted = false;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      const old = document.querySelector("main");
      const next = fresh.querySelector("main");
      const states = new Map(openDetails(old).map((d) => [d.id, d.open]));
      openDetails(next).forEach((d) => { if (states.has(d.id)) d.open = states.get(d.id); });
      const scrolled = [...old.querySelectorAll(".scroll")].map((s) => s.scrollLeft);
      old.replaceWith(next);
      [...next.querySelectorAll(".scroll")].forEach((s, i) => { s.scrollLeft = scrolled[i] ?? 0; });
      document.title = fresh.title;
    } catch {
      wanted = true;
    } finally {
      busy = false;
    }
  };

  const listen = () => {
    const source = new EventSource("/events");
    source.onopen = () => { say("live"); refresh(); };
    source.addEventListener("changed", refresh);
    source.onerror = () => {
      say("reconnecting");
      if (source.readyState === EventSource.CLOSED) setTimeout(listen, 15000);
    };
  };

  document.addEventListener("visibilitychange", refresh);
  setInterval(() => { if (wanted) refresh(); }, 1000);
  setInterval(refresh, 60000);
  listen();
})();

// Search: how-to pages, which are named by tasks, before lessons, chapters and the names of functions; among them, those whose titles
// have the words that were asked for. Sphinx puts this into its own script, which declares `Scorer` again: hence `var`.
const TASKS = 60, LESSONS = 25, OBJECTS = -10, TITLE_WORD = 20      // points; Sphinx gives a word in a text 5
const WANTED = (new URLSearchParams(location.search).get("q") || "").toLowerCase().split(/[^\w.]+/).filter(w => w.length > 2)
const ofTitle = title => WANTED.filter(w => title.toLowerCase().includes(w)).length * TITLE_WORD
var Scorer = {
  score: ([docname, title, anchor, descr, score, filename, kind]) =>
    kind === "object" ? score + OBJECTS
      : score + ofTitle(title) + (docname.startsWith("guide/") ? TASKS : docname.startsWith("tutorials/") ? LESSONS : 0),
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};

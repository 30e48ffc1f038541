// Search: how-to pages, which are named by tasks, before chapters, and both before the names of functions. Sphinx puts this into its script.
const TASKS = 60, LESSONS = 25, OBJECTS = -10   // points; a word in a title has 15, in a text 5
const Scorer = {
  score: ([docname, title, anchor, descr, score, filename, kind]) =>
    score + (docname.startsWith("guide/") ? TASKS : docname.startsWith("tutorials/") ? LESSONS : 0) + (kind === "object" ? OBJECTS : 0),
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};

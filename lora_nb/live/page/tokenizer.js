// CLIP's tokenizer: lower case, words, bytes, and pairs merged in the order in which they were learned.

const WORD = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu

const letters = (() => {                                 // a visible character for every byte, as GPT-2 has them
  const kept = [...Array(256).keys()].filter(b => b >= 33 && b <= 126 || b >= 161 && b <= 172 || b >= 174)
  const t = [], free = [...Array(256).keys()].filter(b => !kept.includes(b))
  for (const b of kept) t[b] = String.fromCharCode(b)
  free.forEach((b, i) => { t[b] = String.fromCharCode(256 + i) })
  return t
})()

export class Tokenizer {
  /** @param {{model: {vocab: Object<string, number>, merges: string[][]}, added_tokens: {id: number, content: string}[]}} json
   * of `tokenizer.json` @param {number} [length] of a prompt in tokens */
  constructor(json, length = 77) {
    this.vocab = new Map(Object.entries(json.model.vocab))
    this.rank = new Map(json.model.merges.map((m, i) => [Array.isArray(m) ? m.join(' ') : m, i]))
    this.special = new Map(json.added_tokens.map(t => [t.content, t.id]))
    this.start = this.special.get('<|startoftext|>'); this.end = this.special.get('<|endoftext|>')
    this.length = length
    this.cache = new Map()
    /** placeholder word -> ids of its vectors @type {Map<string, number[]>} */
    this.words = new Map()
  }

  /** Ids of one piece that `WORD` found. @param {string} word @returns {number[]} */
  merge(word) {
    const known = this.cache.get(word)
    if (known) return known
    const bytes = [...new TextEncoder().encode(word)].map(b => letters[b])
    bytes[bytes.length - 1] += '</w>'
    for (;;) {
      let best = Infinity, at = -1
      for (let i = 0; i + 1 < bytes.length; i++) {
        const r = this.rank.get(bytes[i] + ' ' + bytes[i + 1])
        if (r !== undefined && r < best) { best = r; at = i }
      }
      if (at < 0) break
      const a = bytes[at], b = bytes[at + 1], out = []
      for (let i = 0; i < bytes.length; i++) {           // every occurrence of this pair, from left to right
        if (i + 1 < bytes.length && bytes[i] === a && bytes[i + 1] === b) { out.push(a + b); i++ } else out.push(bytes[i])
      }
      bytes.splice(0, bytes.length, ...out)
    }
    const ids = bytes.map(t => this.vocab.get(t) ?? this.end)
    this.cache.set(word, ids)
    return ids
  }

  /** Ids of a text, without the marks of its beginning and end. @param {string} text @returns {number[]} */
  pieces(text) {
    const ids = [], marks = [...this.words.keys(), ...this.special.keys()].sort((a, b) => b.length - a.length)
    let rest = text
    while (rest) {                                       // learned words and marks are cut out first
      let at = rest.length, mark = null
      for (const m of marks) { const i = rest.indexOf(m); if (i >= 0 && i < at) { at = i; mark = m } }
      const plain = rest.slice(0, at).normalize('NFC').replace(/\s+/gu, ' ').toLowerCase()
      for (const w of plain.match(WORD) ?? []) ids.push(...(this.special.has(w) ? [this.special.get(w)] : this.merge(w)))
      if (mark === null) break
      ids.push(...(this.words.get(mark) ?? [this.special.get(mark)]))
      rest = rest.slice(at + mark.length)
    }
    return ids
  }

  /** Ids of a prompt, `length` of them, and how many of its own did not fit. @param {string} text
   * @returns {{ids: number[], lost: number}} */
  encode(text) {
    const own = this.pieces(text), room = this.length - 2
    const ids = [this.start, ...own.slice(0, room), this.end]
    while (ids.length < this.length) ids.push(this.end)
    return {ids, lost: Math.max(0, own.length - room)}
  }
}

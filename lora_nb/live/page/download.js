// Files of the page: whole, or an error that a person can read.

const name = url => url.split('/').pop()

/** The bytes of a file, with progress; an Error for people if it does not come whole.
 * @param {string} url @param {(got: number) => void} [report] @param {number} [expected] bytes @returns {Promise<ArrayBuffer>} */
export async function fetchBytes(url, report = () => {}, expected) {
  let answer
  try { answer = await fetch(url) } catch { throw new Error(`${name(url)} could not be loaded: is the network down?`) }
  if (!answer.ok) throw new Error(`${name(url)} could not be loaded (${answer.status}).`)
  const reader = answer.body.getReader(), parts = []
  let got = 0
  for (;;) {
    let next
    try { next = await reader.read() } catch { throw new Error(`${name(url)} broke off after ${got} bytes. Reload the page to try again.`) }
    if (next.done) break
    parts.push(next.value); got += next.value.length; report(got)
  }
  if (expected !== undefined && got !== expected) throw new Error(`${name(url)} has ${got} bytes, expected ${expected}. Reload the page to try again.`)
  const out = new Uint8Array(got)
  let at = 0
  for (const p of parts) { out.set(p, at); at += p.length }
  return out.buffer
}

/** What gzip packed. @param {ArrayBuffer} packed @param {string} file its name @returns {Promise<ArrayBuffer>} */
export async function unpack(packed, file) {
  try { return await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'))).arrayBuffer() }
  catch { throw new Error(`${name(file)} is damaged: it cannot be unpacked. Reload the page to try again.`) }
}

/** Several files at once. @param {string} folder @param {Object<string, number>} files name -> bytes @param {(got: number) => void} [report] all bytes
 * @returns {Promise<Object<string, ArrayBuffer>>} unpacked */
export async function fetchAll(folder, files, report = () => {}) {
  const got = {}, all = Object.entries(files).map(async ([file, bytes]) => {
    const packed = await fetchBytes(`${folder}/${file}`, n => { got[file] = n; report(Object.values(got).reduce((a, b) => a + b, 0)) }, bytes)
    return [file, await unpack(packed, file)]
  })
  return Object.fromEntries(await Promise.all(all))
}

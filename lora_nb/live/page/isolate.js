// Ask for threads where they would pay: through sw.js, with one reload at most. Where that is not possible, one thread does it all.

/** @param {number} [cores] @returns {Promise<boolean>} true if the page is about to be loaded again */
export async function isolate(cores = navigator.hardwareConcurrency || 1) {
  if (globalThis.crossOriginIsolated || cores < 4 || !globalThis.isSecureContext || !navigator.serviceWorker || window.top !== window) return false
  try {
    if (sessionStorage.getItem('isolated')) return false
    await navigator.serviceWorker.register(new URL('./sw.js', import.meta.url))
    await Promise.race([navigator.serviceWorker.ready, new Promise((_, no) => setTimeout(no, 3000))])
    sessionStorage.setItem('isolated', 'asked')          // so that a page which stays as it is does not reload for ever
    location.reload()
    return true
  } catch { return false }
}

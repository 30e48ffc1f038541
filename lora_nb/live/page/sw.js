// Threads need a page that is isolated from other origins, which a server declares with two headers. Where a server does not send them, this
// worker adds them to the page's own files. It keeps nothing and changes nothing else.
self.addEventListener('install', () => self.skipWaiting())
self.addEventListener('activate', e => e.waitUntil(self.clients.claim()))
self.addEventListener('fetch', e => {
  if (e.request.method !== 'GET' || !e.request.url.startsWith(self.location.origin)) return
  e.respondWith(fetch(e.request).then(answer => {
    if (answer.type === 'opaque' || answer.status === 0) return answer
    const headers = new Headers(answer.headers)
    headers.set('Cross-Origin-Opener-Policy', 'same-origin'); headers.set('Cross-Origin-Embedder-Policy', 'require-corp')
    return new Response([101, 204, 205, 304].includes(answer.status) ? null : answer.body, {status: answer.status, statusText: answer.statusText, headers})
  }))
})

// The two samplers of the page, equal to diffusers' DDIMScheduler (without noise) and LCMScheduler.

/** @typedef {{alphas: Float64Array, last: number, trained: number, timesteps: number[][],
 *  prediction: 'epsilon'|'v_prediction'|'sample'}} Schedule of the base; `timesteps[n - 1]` are those of n steps of DDIM, `last` is
 *  the share of signal after the last */

/** The timesteps of LCM. @param {number} n steps @param {number} original of the distillation @param {number} T */
export function lcmTimesteps(n, original = 50, T = 1000) {
  const skip = Math.floor(T / original), own = Array.from({length: original}, (_, i) => (i + 1) * skip - 1).reverse()
  return Array.from({length: n}, (_, i) => own[Math.floor(i * original / n)])
}

/** The clean latents that an answer sees. @param {Schedule} s @param {Float32Array} z @param {Float32Array} answer @param {number} t */
export function clean(s, z, answer, t) {
  const a = Math.sqrt(s.alphas[t]), b = Math.sqrt(1 - s.alphas[t]), out = new Float32Array(z.length)
  if (s.prediction === 'v_prediction') for (let i = 0; i < z.length; i++) out[i] = a * z[i] - b * answer[i]
  else if (s.prediction === 'epsilon') for (let i = 0; i < z.length; i++) out[i] = (z[i] - b * answer[i]) / a
  else out.set(answer)
  return out
}

/** One step of DDIM. @param {Schedule} s @param {Float32Array} z @param {Float32Array} answer @param {number} t
 * @param {number} before the next timestep, -1: none @returns {{z: Float32Array, clean: Float32Array}} */
export function ddimStep(s, z, answer, t, before) {
  const x = clean(s, z, answer, t), a = Math.sqrt(s.alphas[t]), b = Math.sqrt(1 - s.alphas[t])
  const p = before >= 0 ? s.alphas[before] : s.last, pa = Math.sqrt(p), pb = Math.sqrt(1 - p), out = new Float32Array(z.length)
  for (let i = 0; i < z.length; i++) {
    const noise = s.prediction === 'v_prediction' ? a * answer[i] + b * z[i] : s.prediction === 'epsilon' ? answer[i] : (z[i] - a * x[i]) / b
    out[i] = pa * x[i] + pb * noise
  }
  return {z: out, clean: x}
}

/** One step of LCM. `noise` is drawn anew at each step but the last. @param {Schedule} s @param {Float32Array} z
 * @param {Float32Array} answer @param {number} t @param {number} before @param {Float32Array|null} noise */
export function lcmStep(s, z, answer, t, before, noise) {
  const x = clean(s, z, answer, t), scaled = t * 10, skip = .25 / (scaled ** 2 + .25), keep = scaled / Math.sqrt(scaled ** 2 + .25)
  for (let i = 0; i < z.length; i++) x[i] = keep * x[i] + skip * z[i]
  if (!noise) return {z: x, clean: x}
  const a = Math.sqrt(s.alphas[before]), b = Math.sqrt(1 - s.alphas[before]), out = new Float32Array(z.length)
  for (let i = 0; i < z.length; i++) out[i] = a * x[i] + b * noise[i]
  return {z: out, clean: x}
}

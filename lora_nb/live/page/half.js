// Half-precision numbers (IEEE binary16), which JavaScript engines of today do not all have.

const table = (() => {                                   // all 65,536 of them, made once
  const t = new Float32Array(65536)
  for (let h = 0; h < 65536; h++) {
    const s = h & 0x8000 ? -1 : 1, e = h >> 10 & 31, f = h & 1023
    t[h] = e === 0 ? s * f * 2 ** -24 : e === 31 ? (f ? NaN : s * Infinity) : s * (1 + f / 1024) * 2 ** (e - 15)
  }
  return t
})()

/** The numbers of a half-precision array, in single precision.
 * @param {Uint16Array} half @param {Float32Array} [out] @returns {Float32Array} */
export function widen(half, out = new Float32Array(half.length)) {
  for (let i = 0; i < half.length; i++) out[i] = table[half[i]]
  return out
}

/** The numbers of an array that is written as two planes, all low bytes and then all high bytes.
 * @param {Uint8Array} planes @param {Float32Array} [out] @returns {Float32Array} */
export function widenPlanes(planes, out = new Float32Array(planes.length / 2)) {
  const n = planes.length / 2
  if (out.length !== n) throw new Error(`The weights hold ${n} numbers, expected ${out.length}. Reload the page to try again.`)
  for (let i = 0; i < n; i++) out[i] = table[planes[i] | planes[n + i] << 8]
  return out
}

const one = new Float32Array(1), bits = new Uint32Array(one.buffer)

/** A number rounded to half precision (to nearest, ties to even), as bits. @param {number} x @returns {number} */
export function round(x) {
  one[0] = x
  const b = bits[0], sign = b >>> 16 & 0x8000, e = (b >>> 23 & 255) - 112
  let f = b & 0x7fffff
  if (e >= 143) return sign | (e === 143 && f ? 0x7e00 : 0x7c00)            // infinite or NaN
  if (e >= 31) return sign | 0x7c00                                        // too large
  if (e <= 0) {                                                            // subnormal
    if (e < -10) return sign
    f |= 0x800000
    const shift = 14 - e, half = 1 << shift - 1, h = f >> shift, rest = f & (1 << shift) - 1
    return sign | h + (rest > half || rest === half && h & 1 ? 1 : 0)
  }
  const h = e << 10 | f >> 13, rest = f & 0x1fff
  return sign | h + (rest > 0x1000 || rest === 0x1000 && h & 1 ? 1 : 0)      // may carry into the exponent, rightly
}

/** @param {Float32Array} x @returns {Uint16Array} */
export function narrow(x) { return Uint16Array.from(x, round) }

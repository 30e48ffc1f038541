// The random numbers of torch on a CPU: one seed gives one picture here and in Python.

/** The 32-bit Mersenne Twister, as `torch.Generator().manual_seed(seed)` starts it. */
export class Generator {
  /** @param {number} seed a whole number, 0 to 2**32 - 1 */
  constructor(seed) {
    const s = this.state = new Uint32Array(624)
    s[0] = seed >>> 0
    for (let i = 1; i < 624; i++) s[i] = Math.imul(1812433253, s[i - 1] ^ s[i - 1] >>> 30) + i
    this.at = 624
  }

  /** A whole number, 0 to 2**32 - 1. */
  next() {
    const s = this.state
    if (this.at === 624) {
      for (let i = 0; i < 624; i++) {
        const y = s[i] & 0x80000000 | s[(i + 1) % 624] & 0x7fffffff
        s[i] = s[(i + 397) % 624] ^ y >>> 1 ^ (y & 1 ? 0x9908b0df : 0)
      }
      this.at = 0
    }
    let y = s[this.at++]
    y ^= y >>> 11; y ^= y << 7 & 0x9d2c5680; y ^= y << 15 & 0xefc60000; y ^= y >>> 18
    return y >>> 0
  }

  /** A number in 0..1 with 24 bits. */
  uniform() { return (this.next() & 0xffffff) / 16777216 }

  /** A whole number below n. @param {number} n */
  below(n) { return this.next() % n }

  /** `torch.randn` of n numbers, n >= 16 (a vectorised Box-Muller: eight pairs at a time). @param {number} n */
  normal(n) {
    const x = new Float32Array(n)
    for (let i = 0; i < n; i++) x[i] = this.uniform()
    const fill = at => {
      for (let j = 0; j < 8; j++) {
        const u = Math.fround(1 - x[at + j]), r = Math.sqrt(-2 * Math.log(u)), a = 2 * Math.PI * x[at + j + 8]
        x[at + j] = r * Math.cos(a); x[at + j + 8] = r * Math.sin(a)
      }
    }
    for (let i = 0; i + 15 < n; i += 16) fill(i)
    if (n % 16) {
      for (let i = n - 16; i < n; i++) x[i] = this.uniform()
      fill(n - 16)
    }
    return x
  }
}

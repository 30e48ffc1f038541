// A lesson: a subject's pictures, their captions, the class that must be kept, and the training until it is done.
import {breathe} from './engine.js'
import {Trainer} from './trainer.js'

/** @typedef {{pictures: Float32Array[], captions: string[], classPrompt: string|null, trigger: string, noun: string, steps: number, lr: number,
 * seed: number, every: number, preview: {prompt: string, seed: number, steps: number, guidance: number}|null}} Plan `classPrompt`: null to learn without prior preservation; `every`: steps between previews */

const CLASS_PICTURES = 8, CLASS_STEPS = 8, OWN = 4                       // samples of the subject in a step; the rest of the batch is of the class

/** Samples in a step. @param {boolean} prior */
const batchOf = (engine, prior) => engine.manifest.training.batches.find(b => prior ? b > OWN : b === OWN) ?? engine.manifest.training.batches[0]

export class Lesson {
  /** @param {import('./engine.js').Engine} engine @param {Plan} plan
   * @param {(progress: {phase: string, done: number, all: number}) => boolean} seen true stops */
  static async open(engine, plan, seen = () => false) {
    const l = new Lesson()
    l.engine = engine; l.plan = plan; l.losses = []
    if (plan.pictures.length < 1) throw new Error('There is no picture to learn from: give one to eight.')
    const batch = batchOf(engine, !!plan.classPrompt)
    await Lesson.warm(engine, !!plan.classPrompt)
    l.own = plan.classPrompt ? Math.min(OWN, batch - 1) : batch
    l.subject = await l.examples(plan.pictures, plan.captions)
    l.prior = plan.classPrompt ? await l.classPictures(seen) : []
    if (l.prior) l.trainer = await Trainer.open(engine, {batch, seed: plan.seed})
    return l
  }

  /** Make the session of a training step, which takes seconds; one such session is kept at a time. @param {boolean} prior with class pictures */
  static async warm(engine, prior) {
    const batch = batchOf(engine, prior)
    for (const other of engine.manifest.training.batches) if (other !== batch) await engine.release(`train${other}`)
    await engine.session(`train${batch}`)
  }

  async examples(pictures, captions) {
    const {length, width} = this.engine.manifest.text, n = length * width, different = [...new Set(captions)]
    const {states} = await this.engine.encode(different, []), out = []
    for (const [i, x] of pictures.entries()) {
      const k = different.indexOf(captions[i])
      out.push({latents: await this.engine.latents(x), states: states.slice(k * n, (k + 1) * n)})
      await breathe()
    }
    return out
  }

  /** What the base draws of the class, with guidance, as training in Python does; null if stopped. */
  async classPictures(seen) {
    const {classPrompt: prompt, seed} = this.plan, out = [], guidance = this.engine.manifest.sampling.guidance_scale
    const {states} = await this.engine.encode([prompt], [])
    for (let i = 0; i < CLASS_PICTURES; i++) {
      const {latents} = await this.engine.draw({prompt, seed: seed + 1000 + i, worn: [], steps: CLASS_STEPS, guidance, raw: true})
      out.push({latents, states})
      if (seen({phase: 'class', done: i + 1, all: CLASS_PICTURES})) return null
    }
    return out
  }

  /** @param {(progress: {step: number, loss: number, seconds: number, preview?: Uint8ClampedArray}) => boolean} seen true stops
   * @returns {Promise<{step: number, stopped: boolean}>} */
  async run(seen = () => false) {
    const {steps, lr, every, preview} = this.plan, began = performance.now(), from = this.trainer.k
    for (;;) {
      const k = this.trainer.k
      if (k >= steps) return {step: k, stopped: false}
      const rate = lr * .5 * (1 + Math.cos(Math.PI * k / steps))
      const loss = await this.trainer.step(this.trainer.sample(this.subject, this.prior, this.own), rate)
      this.losses.push(loss)
      const seconds = (performance.now() - began) / 1000 / (k + 1 - from)
      const stop = seen({step: k + 1, loss, seconds})
      await breathe()
      if (preview && every && (k + 1) % every === 0) {
        const {pixels} = await this.engine.draw({...preview, worn: [{lora: this.lora('preview'), strength: 1}]})
        seen({step: k + 1, loss, seconds, preview: pixels})
      }
      if (stop) return {step: k + 1, stopped: k + 1 < steps}
    }
  }

  /** @param {string} name @returns {import('./lora.js').Lora} */
  lora(name) {
    const {trigger, noun, captions, steps, lr, seed} = this.plan
    return this.trainer.lora(name, {trigger, kind: noun, caption: captions[0], steps: this.trainer.k, planned_steps: steps, learning_rate: lr, seed, made_by: 'the page of lora_nb'})
  }
}

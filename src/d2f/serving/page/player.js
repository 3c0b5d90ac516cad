/** Plays something forward: a position that moves with the wall clock, at the owner's pace. */
export class Player {
  /**
   * @param {{advance: (position: number, seconds: number) => number, end: () => number,
   *          growing: () => boolean, show: (position: number) => void,
   *          playing: (playing: boolean) => void}} owner
   *     `advance`: the position so many wall seconds later; `growing`: the end may still move
   */
  constructor(owner) {
    this.owner = owner;
    this.position = 0;
    this.isPlaying = false;
    this.then = 0;
  }

  /** Play on, from the start if at the end. */
  play() {
    if (this.position >= this.owner.end() && !this.owner.growing()) this.position = 0;
    this.owner.show(this.position);
    if (this.isPlaying) return;
    this.isPlaying = true;
    this.owner.playing(true);
    this.then = performance.now();
    requestAnimationFrame((now) => this.frame(now));
  }

  pause() {
    if (!this.isPlaying) return;
    this.isPlaying = false;
    this.owner.playing(false);
  }

  toggle() {
    if (this.isPlaying) this.pause();
    else this.play();
  }

  /**
   * Stop here.
   *
   * @param {number} position
   */
  seek(position) {
    this.pause();
    this.position = Math.max(0, Math.min(position, this.owner.end()));
    this.owner.show(this.position);
  }

  /** @param {number} now in milliseconds */
  frame(now) {
    if (!this.isPlaying) return;
    const seconds = Math.max(0, now - this.then) / 1000;
    this.then = now;
    const end = this.owner.end();
    this.position = Math.min(this.owner.advance(this.position, seconds), end);
    this.owner.show(this.position);
    if (this.position >= end && !this.owner.growing()) this.pause();
    else requestAnimationFrame((next) => this.frame(next));
  }
}

// A progress bar on the terminal: on standard error, and only where that is one.

const width = 32;

/** Shows how far a program is, in one line that it keeps rewriting. */
export class Progress implements Disposable {
  readonly #shown = Deno.stderr.isTerminal();

  /** Shows that so many of all are done; where it is not known how many there are, just the number. */
  show(done: number, total: number | undefined, what: string): void {
    const filled = total ? Math.round(width * Math.min(1, done / total)) : 0;
    const bar = total ? `${"█".repeat(filled)}${"░".repeat(width - filled)} ` : "";
    this.#write(`${bar}${done}${total ? ` of ${total}` : ""}  ${what}`);
  }

  #write(text: string): void {
    if (this.#shown) Deno.stderr.writeSync(new TextEncoder().encode(`\r\x1b[K${text}`));
  }

  /** Clears the line. */
  [Symbol.dispose](): void {
    this.#write("");
  }
}

// A device's queue of work and the memory that belongs to it: what devices and tensors own underneath.
import { DisposedError } from "./errors.ts";
import { type NativeFunctions, stageStruct, status, Struct } from "./ffi.ts";
import { acquire, errorBytes, errorSize, nativeError, release, unwrap } from "./library.ts";

const result = new Struct(8);

/** How long a wait asks before it leaves waiting to another thread, whose answer alone takes longer. */
const shortWaitMs = 0.05;

/** A native stream. It keeps the library loaded until it is closed. */
export class Stream {
  /** Device number in sage.h. */
  readonly device: number;
  readonly #native: NativeFunctions;
  readonly #handle: bigint;
  readonly #storages = new Set<Storage>();
  #closed = false;

  /**
   * @param device Device number in sage.h.
   * @param architecture The compute capability whose kernels it uses; 0: its own.
   */
  constructor(device: number, architecture: number) {
    this.device = device;
    this.#native = acquire();
    try {
      const { bytes } = result;
      unwrap(
        this.#native.sage_stream_create_for(device, architecture, bytes, errorBytes, errorSize),
      );
    } catch (error) {
      release();
      throw error;
    }
    this.#handle = result.handle(0);
  }

  /** Whether its device was disposed. */
  get closed(): boolean {
    return this.#closed;
  }

  /** The functions to call with {@linkcode handle}. */
  get native(): NativeFunctions {
    this.#checkOpen();
    return this.#native;
  }

  /** The stream in sage.h. */
  get handle(): bigint {
    this.#checkOpen();
    return this.#handle;
  }

  #checkOpen(): void {
    if (this.#closed) throw new DisposedError("Cannot use a device that was disposed.");
  }

  /** Takes memory that is freed by {@linkcode Storage.drop} or with the stream. */
  allocate(bytes: number): Storage {
    unwrap(
      this.native.sage_memory_allocate(
        this.#handle,
        BigInt(bytes),
        result.bytes,
        errorBytes,
        errorSize,
      ),
    );
    const storage = new Storage(
      this,
      result.handle(0),
      (storage) => this.#storages.delete(storage),
    );
    this.#storages.add(storage);
    return storage;
  }

  /** Whether all that was enqueued ends within a short wait; what fails is not done. */
  #endsSoon(): boolean {
    const native = this.native, end = performance.now() + shortWaitMs;
    do {
      const answer = native.sage_stream_query(this.#handle, result.bytes, errorBytes, errorSize);
      if (answer !== status.ok) return false;
      if (result.int(0) === 1) return true;
    } while (performance.now() < end);
    return false;
  }

  /** Waits until all that was enqueued is done: a moment here, then on another thread. */
  async wait(): Promise<void> {
    if (this.#endsSoon()) return;
    const pending = this.native.sage_stream_wait(this.#handle);
    acquire();
    try {
      if (await pending === status.ok) return;
      this.#checkOpen();
      unwrap(this.#native.sage_stream_synchronize(this.#handle, errorBytes, errorSize));
    } finally {
      release();
    }
  }

  /** Milliseconds between what is enqueued before and after `work`. */
  async time(work: () => unknown): Promise<number> {
    this.#checkOpen();
    acquire(); // events may have to outlive the stream
    const events: bigint[] = [];
    try {
      events.push(this.#event());
      events.push(this.#event());
      this.#record(events[0]);
      await work();
      this.#record(events[1]);
      await this.wait();
      const native = this.native;
      unwrap(
        native.sage_event_elapsed(events[0], events[1], result.bytes, errorBytes, errorSize),
      );
      return result.float(0);
    } finally {
      for (const event of events) this.#native.sage_event_destroy(event, errorBytes, errorSize);
      release();
    }
  }

  /** The stages of what is enqueued by `work`. */
  async trace(work: () => unknown): Promise<{ name: string; ms: number }[]> {
    const native = this.native;
    unwrap(native.sage_stream_trace(this.#handle, 1, errorBytes, errorSize));
    try {
      await work();
      await this.wait();
      return this.#stages();
    } finally {
      if (!this.#closed) native.sage_stream_trace(this.#handle, 0, errorBytes, errorSize);
    }
  }

  #stages(): { name: string; ms: number }[] {
    const read = (stages: Struct | null, capacity: number) => {
      const bytes = stages && stages.bytes, room = BigInt(capacity);
      const handle = this.handle, out = result.bytes;
      unwrap(
        this.native.sage_stream_read_trace(handle, bytes, room, out, errorBytes, errorSize),
      );
      return result.count(0);
    };
    const count = read(null, 0);
    if (count === 0) return [];
    const stages = new Struct(count * stageStruct.size);
    read(stages, count);
    return Array.from({ length: count }, (_, i) => ({
      name: stages.text(i * stageStruct.size + stageStruct.name),
      ms: stages.float(i * stageStruct.size + stageStruct.ms),
    }));
  }

  #event(): bigint {
    unwrap(this.native.sage_event_create(this.#handle, result.bytes, errorBytes, errorSize));
    return result.handle(0);
  }

  #record(event: bigint): void {
    unwrap(this.native.sage_event_record(event, this.#handle, errorBytes, errorSize));
  }

  /** Frees its memory, waits for its work and ends it. Closing again does nothing. */
  close(): void {
    if (this.#closed) return;
    for (const storage of this.#storages) storage.free();
    this.#closed = true;
    const answer = this.#native.sage_stream_destroy(this.#handle, errorBytes, errorSize);
    const error = answer === status.ok ? undefined : nativeError(answer);
    release();
    if (error) throw error;
  }
}

/** One allocation, freed when the last tensor that lies in it lets go. */
export class Storage {
  /** Whose work uses it. */
  readonly stream: Stream;
  /** Where it starts, in the device's memory. */
  readonly address: bigint;
  readonly #freed: (storage: Storage) => void;
  #holders = 1;

  /** See {@linkcode Stream.allocate}. */
  constructor(stream: Stream, address: bigint, freed: (storage: Storage) => void) {
    this.stream = stream;
    this.address = address;
    this.#freed = freed;
  }

  /** Adds a holder. */
  share(): this {
    ++this.#holders;
    return this;
  }

  /** Removes a holder; the last one frees the memory, after the work that uses it. */
  drop(): void {
    if (--this.#holders === 0) this.free();
  }

  /** Frees the memory now. A device that failed says so in every other call, so it need not here. */
  free(): void {
    if (this.stream.closed) return;
    this.#holders = 0;
    this.#freed(this);
    this.stream.native.sage_memory_free(this.stream.handle, this.address, errorBytes, errorSize);
  }

  /** Copies from the host; `bytes` may be reused on return. */
  write(offset: number, bytes: Uint8Array<ArrayBuffer>): void {
    const { native, handle } = this.stream;
    const at = this.address + BigInt(offset);
    unwrap(
      native.sage_memory_write(handle, at, bytes, BigInt(bytes.length), errorBytes, errorSize),
    );
  }

  /** Copies to the host, which waits; see {@linkcode Stream.wait}. */
  read(offset: number, bytes: Uint8Array<ArrayBuffer>): void {
    const { native, handle } = this.stream;
    const at = this.address + BigInt(offset);
    unwrap(native.sage_memory_read(handle, bytes, at, BigInt(bytes.length), errorBytes, errorSize));
  }
}

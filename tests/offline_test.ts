// The stand-ins for the JSR packages: the same contract as the real ones, and the choice between the two.
import {
  assert,
  assertAlmostEquals,
  assertArrayIncludes,
  assertEquals,
  assertExists,
  assertFalse,
  assertGreater,
  assertGreaterOrEqual,
  assertInstanceOf,
  AssertionError,
  assertIsError,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  assertNotEquals,
  assertNotMatch,
  assertNotStrictEquals,
  assertRejects,
  assertStrictEquals,
  assertStringIncludes,
  assertThrows,
  fail,
} from "@std/assert";
import { parseArgs } from "@std/cli/parse-args";
import {
  basename,
  dirname,
  extname,
  fromFileUrl,
  isAbsolute,
  join,
  normalize,
  relative,
  resolve,
  toFileUrl,
} from "@std/path";

const root = fromFileUrl(new URL("..", import.meta.url));

// ---- @std/assert ---------------------------------------------------------------------------------

const holds: [string, () => void][] = [
  ["assert", () => assert(1)],
  ["assertFalse", () => assertFalse(0)],
  ["assertEquals of objects", () => assertEquals({ a: [1, { b: 2 }] }, { a: [1, { b: 2 }] })],
  ["assertEquals of NaN", () => assertEquals(NaN, NaN)],
  ["assertEquals of arrays", () => assertEquals(new Uint8Array([1, 2]), new Uint8Array([1, 2]))],
  ["assertNotEquals", () => assertNotEquals({ a: 1 }, { a: 2 })],
  ["assertStrictEquals", () => assertStrictEquals(holds, holds)],
  ["assertNotStrictEquals", () => assertNotStrictEquals([1], [1])],
  ["assertAlmostEquals", () => assertAlmostEquals(1, 1.0009, 1e-3)],
  ["assertAlmostEquals of infinities", () => assertAlmostEquals(Infinity, Infinity)],
  ["assertAlmostEquals by default", () => assertAlmostEquals(1, 1 + 1e-8)],
  ["assertGreater", () => assertGreater(2, 1)],
  ["assertGreaterOrEqual", () => assertGreaterOrEqual(2, 2)],
  ["assertLess", () => assertLess(1, 2)],
  ["assertLessOrEqual", () => assertLessOrEqual(2, 2)],
  ["assertExists", () => assertExists(0)],
  ["assertInstanceOf", () => assertInstanceOf(new TypeError(), Error)],
  ["assertStringIncludes", () => assertStringIncludes("abc", "b")],
  ["assertArrayIncludes", () => assertArrayIncludes([{ a: 1 }, { a: 2 }], [{ a: 2 }])],
  ["assertMatch", () => assertMatch("abc", /b/)],
  ["assertNotMatch", () => assertNotMatch("abc", /d/)],
  ["assertIsError", () => assertIsError(new RangeError("too far"), RangeError, "far")],
];

const breaks: [string, () => void][] = [
  ["assert", () => assert(0)],
  ["fail", () => fail("on purpose")],
  ["assertFalse", () => assertFalse(1)],
  ["assertEquals of objects", () => assertEquals({ a: [1, { b: 2 }] }, { a: [1, { b: 3 }] })],
  ["assertEquals of types", () => assertEquals<unknown>(1, "1")],
  ["assertEquals of lengths", () => assertEquals([1, 2], [1, 2, 3])],
  ["assertEquals of arrays", () => assertEquals(new Uint8Array([1, 2]), new Uint8Array([1, 3]))],
  ["assertNotEquals", () => assertNotEquals({ a: 1 }, { a: 1 })],
  ["assertStrictEquals", () => assertStrictEquals([1], [1])],
  ["assertNotStrictEquals", () => assertNotStrictEquals(holds, holds)],
  ["assertAlmostEquals", () => assertAlmostEquals(1, 1.002, 1e-3)],
  ["assertAlmostEquals of NaN", () => assertAlmostEquals(NaN, 1, 1)],
  ["assertAlmostEquals by default", () => assertAlmostEquals(1, 1 + 1e-6)],
  ["assertGreater", () => assertGreater(1, 1)],
  ["assertGreaterOrEqual", () => assertGreaterOrEqual(1, 2)],
  ["assertLess of NaN", () => assertLess(NaN, 2)],
  ["assertLessOrEqual of NaN", () => assertLessOrEqual(NaN, 2)],
  ["assertExists", () => assertExists(null)],
  ["assertInstanceOf", () => assertInstanceOf(new Error(), TypeError)],
  ["assertStringIncludes", () => assertStringIncludes("abc", "d")],
  ["assertArrayIncludes", () => assertArrayIncludes([1], [2])],
  ["assertMatch", () => assertMatch("abc", /d/)],
  ["assertNotMatch", () => assertNotMatch("abc", /b/)],
  ["assertIsError of another class", () => assertIsError(new Error("x"), RangeError)],
  ["assertIsError of another message", () => assertIsError(new Error("x"), Error, "y")],
  ["assertThrows of nothing", () => void assertThrows(() => {})],
  ["assertThrows of another class", () =>
    void assertThrows(() => {
      throw new Error("x");
    }, TypeError)],
  ["assertThrows of another message", () =>
    void assertThrows(
      () => {
        throw new Error("x");
      },
      Error,
      "y",
    )],
];

for (const [name, body] of holds) {
  Deno.test(`std/assert: ${name} holds`, body);
}

for (const [name, body] of breaks) {
  Deno.test(`std/assert: ${name} fails`, () => {
    let thrown: unknown;
    try {
      body();
    } catch (error) {
      thrown = error;
    }
    if (!(thrown instanceof AssertionError)) throw new Error(`${name} did not fail: ${thrown}`);
  });
}

Deno.test("std/assert: assertThrows() and assertRejects() return the error", async () => {
  const error = new RangeError("too far");
  const thrown = assertThrows(
    () => {
      throw error;
    },
    RangeError,
    "far",
  );
  const rejected = await assertRejects(() => Promise.reject(error), RangeError, "far");
  assertStrictEquals(thrown, error);
  assertStrictEquals(rejected, error);
});

Deno.test("std/assert: assertRejects() fails where nothing, or something else, is rejected", async () => {
  const cases: (() => Promise<unknown>)[] = [
    () => assertRejects(() => Promise.resolve()),
    () => assertRejects(() => Promise.reject(new Error("x")), TypeError),
    () => assertRejects(() => Promise.reject(new Error("x")), Error, "y"),
    () =>
      assertRejects(() => {
        throw new Error("not a promise");
      }),
  ];
  for (const body of cases) {
    const outcome = await body().then(() => "held", (error) => error);
    if (!(outcome instanceof AssertionError)) throw new Error(`did not fail: ${outcome}`);
  }
});

// ---- @std/path and @std/cli ----------------------------------------------------------------------

Deno.test("std/path: the functions in use", () => {
  assertEquals(join("a", "..", "b", "c.ts"), "b/c.ts");
  assertEquals(basename("/a/b.ts"), "b.ts");
  assertEquals(basename("/a/b.ts", ".ts"), "b");
  assertEquals(dirname("/a/b.ts"), "/a");
  assertEquals(extname("/a/b.test.ts"), ".ts");
  assertEquals(resolve("/a", "../b"), "/b");
  assertEquals(relative("/a/b", "/a/c/d"), "../c/d");
  assertEquals(normalize("a//b/./c"), "a/b/c");
  assertEquals([isAbsolute("/a"), isAbsolute("a")], [true, false]);
  assertEquals(fromFileUrl("file:///a%20b/c"), "/a b/c");
  assertEquals(toFileUrl("/a b/c").href, "file:///a%20b/c");
});

Deno.test("std/cli: parseArgs() as build.ts uses it", () => {
  const unknown: string[] = [];
  const options = {
    boolean: ["debug", "help"],
    string: ["arch", "jobs"],
    alias: { h: "help" },
    default: { jobs: "2" },
    unknown: (argument: string) => {
      unknown.push(argument);
      return false;
    },
  };
  const parse = (...args: string[]) => parseArgs(args, options);
  assertEquals(parse("--arch=80,90a", "--debug").arch, "80,90a");
  assertEquals(parse("--arch", "all").arch, "all");
  assertEquals(parse("--arch", "--debug").arch, "");
  assertEquals(parse("--arch").arch, "");
  assertEquals(parse().arch, undefined);
  assertEquals(parse().jobs, "2");
  assertEquals(parse("--jobs", "4").jobs, "4");
  assertEquals([parse().debug, parse("--debug").debug], [false, true]);
  assertEquals([parse("-h").help, parse().help], [true, false]);
  assertEquals(unknown, []);
  assertEquals(parse("--fast", "file", "--slow=1")._, []);
  assertEquals(unknown, ["--fast", "file", "--slow=1"]);
});

// ---- which of the two is used --------------------------------------------------------------------

/** A fresh project with nothing but a program that needs the packages. */
async function makeProject(): Promise<string> {
  const folder = await Deno.makeTempDir();
  await Deno.mkdir(join(folder, "tools"));
  const copied = await new Deno.Command("cp", {
    args: ["-r", join(root, "tools/offline"), join(folder, "tools")],
  }).output();
  assert(copied.success);
  await Deno.copyFile(join(root, "deno.json"), join(folder, "deno.json"));
  await Deno.writeTextFile(join(folder, "mod.ts"), "");
  await Deno.writeTextFile(
    join(folder, "program.ts"),
    `import { assertEquals } from "@std/assert";
import { parseArgs } from "@std/cli/parse-args";
import { join } from "@std/path";
assertEquals(parseArgs([])._, []);
console.log(join("a", "b"), import.meta.resolve("@std/path"));
`,
  );
  return folder;
}

/** Prepares and runs the program with a package cache of its own and the given registry. */
async function prepareAndRun(folder: string, registry: string): Promise<string> {
  let text = "";
  for (
    const args of [["task", "--quiet", "prepare"], ["run", "--quiet", "program.ts"]]
  ) {
    const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      args,
      cwd: folder,
      env: { JSR_URL: registry, DENO_DIR: join(folder, "cache"), NO_COLOR: "1" },
    }).output();
    const decoder = new TextDecoder();
    text += decoder.decode(stdout);
    assert(success, `deno ${args.join(" ")}: ${decoder.decode(stderr)}`);
  }
  return text;
}

async function exists(path: string): Promise<boolean> {
  return await Deno.stat(path).then(() => true, () => false);
}

const nowhere = "http://127.0.0.1:9/";

Deno.test("prepare: takes the stand-ins where the registry is out of reach", async () => {
  const folder = await makeProject();
  try {
    const text = await prepareAndRun(folder, nowhere);
    assertStringIncludes(text, "JSR cannot be reached");
    assertStringIncludes(text, "a/b");
    assert(await exists(join(folder, ".offline/path/mod.ts")));
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

/** The little of JSR's protocol that Deno asks for, serving the stand-ins as if they were the real packages. */
async function answer(request: Request): Promise<Response> {
  const [, scope, name, ...rest] = new URL(request.url).pathname.split("/");
  const local = `${root}/tools/offline/${name}`;
  if (scope !== "@std" || !await exists(local)) return new Response(null, { status: 404 });
  const { version, exports } = JSON.parse(await Deno.readTextFile(`${local}/deno.json`));
  const source = await Deno.readFile(`${local}/mod.ts`);
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", source)).toHex();
  const files: Record<string, () => Response> = {
    "meta.json": () => Response.json({ scope: "std", name, versions: { [version]: {} } }),
    [`${version}_meta.json`]: () =>
      Response.json({
        exports,
        manifest: { "/mod.ts": { size: source.length, checksum: `sha256-${digest}` } },
      }),
    [`${version}/mod.ts`]: () =>
      new Response(source, { headers: { "content-type": "text/typescript" } }),
  };
  return files[rest.join("/")]?.() ?? new Response(null, { status: 404 });
}

Deno.test("prepare: leaves the packages to the registry where it answers", async () => {
  const folder = await makeProject();
  const served: string[] = [];
  await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, (request) => {
    served.push(new URL(request.url).pathname);
    return answer(request);
  });
  try {
    await prepareAndRun(folder, nowhere);
    assert(await exists(join(folder, ".offline")));
    const text = await prepareAndRun(folder, `http://127.0.0.1:${server.addr.port}/`);
    assertStringIncludes(text, "a/b");
    assert(!await exists(join(folder, ".offline")), "the stand-ins are gone again");
    assert(served.includes("/@std/path/1.0.0/mod.ts"), served.join(" "));
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

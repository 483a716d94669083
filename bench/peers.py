"""Others' kernels on the same GPU, measured as bench/measure.ts measures ours.

usage: python3 peers.py BUDGET_MS
Its first answer tells what there is: {"versions": {...}, "skipped": [sentences]}. Then it reads one JSON request a line:
  {"copyBytes": 1073741824}           a copy in device memory: {"ms": ...}
  {"run": {"headDim": 128, "causal": false, "batch": 4, "heads": 32, "kvHeads": 32, "tokens": 8192, "queries": 8192}}
                                      attention in bf16, a row a kernel: {"kernel": ..., "endToEnd": ..., "samples": [ms]}
  {"support": the same}               the same rows without samples: what can run it
and answers one JSON row a line, or {"skipped": sentence} for a kernel that cannot run it, and an empty line at the end.
"""

import contextlib
import importlib
import json
import math
import sys
import time

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
except ImportError as error:
    sys.exit(f"{error}")

if not torch.cuda.is_available():
    sys.exit("PyTorch sees no GPU")

LEAST_ROUNDS = 7


# ---- kernels: each makes a call of no arguments out of q, k and v [batch, heads, tokens, headDim] ----------------------


def pytorch(q, k, v, causal):
    shared = q.shape[1] != k.shape[1]
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)


def flash3(module, dtype):
    def make(q, k, v, causal):
        q, k, v = (x.transpose(1, 2).contiguous().to(dtype) for x in (q, k, v))
        return lambda: module.flash_attn_func(q, k, v, causal=causal)

    return make


def official(module):
    return lambda q, k, v, causal: lambda: module.sageattn(q, k, v, tensor_layout="HND", is_causal=causal)


class Kernel:
    def __init__(self, make, end_to_end=True, backend=None):
        self.make = make
        self.end_to_end = end_to_end  # whether it starts from bf16
        self.backend = backend

    def chosen(self):
        """Within it, PyTorch takes this kernel."""
        return sdpa_kernel(self.backend) if self.backend is not None else contextlib.nullcontext()


KERNELS = {
    "pytorch-fa2": Kernel(pytorch, backend=SDPBackend.FLASH_ATTENTION),
    "cudnn": Kernel(pytorch, backend=SDPBackend.CUDNN_ATTENTION),
}
VERSIONS = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
SKIPPED = []


def find(package, module, add):
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a package built for another PyTorch or GPU fails in many ways
        SKIPPED.append(f"{package}: {str(error).splitlines()[0]}")
        return
    VERSIONS[package] = str(getattr(found, "__version__", "unknown"))
    add(found)


def add_flash3(module):
    KERNELS["fa3"] = Kernel(flash3(module, torch.bfloat16))
    KERNELS["fa3-fp8"] = Kernel(flash3(module, torch.float8_e4m3fn), end_to_end=False)


def add_official(module):
    KERNELS["sageattention"] = Kernel(official(module))


find("flash-attention-3", "flash_attn_interface", add_flash3)
find("sageattention", "sageattention", add_official)

# ---- measuring -------------------------------------------------------------------------------------------------------


class Timed:
    """A call; short ones are timed many at a time, so that launching does not count."""

    def __init__(self, call, chosen=contextlib.nullcontext):
        self.call = call
        self.chosen = chosen
        self.burst(2)
        self.count = max(1, min(50, math.ceil(1 / self.burst(2))))

    def burst(self, count):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with self.chosen():
            begin.record()
            for _ in range(count):
                self.call()
            end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    def sample(self):
        return self.burst(self.count)


def measure_together(timed, budget_ms):
    """One sample of each in turn."""
    samples, began, rounds = [[] for _ in timed], time.time(), 0
    while rounds < LEAST_ROUNDS or (time.time() - began) * 1e3 < budget_ms * len(timed):
        for one, into in zip(timed, samples):
            into.append(one.sample())
        rounds += 1
    return samples


def tensors(shape):
    def normal(heads, tokens):
        return torch.randn(shape["batch"], heads, tokens, shape["headDim"], device="cuda", dtype=torch.bfloat16)

    keys = (shape["kvHeads"], shape["tokens"])
    return normal(shape["heads"], shape.get("queries", shape["tokens"])), normal(*keys), normal(*keys)


def prepare(shape):
    """[(row, call, chosen)] of the kernels that can run the shape, and what to say of those that cannot."""
    q, k, v = tensors(shape)
    able, skipped = [], []
    for name, kernel in KERNELS.items():
        try:
            call = kernel.make(q, k, v, shape["causal"])
            with kernel.chosen():
                call()
            torch.cuda.synchronize()
        except Exception as error:
            skipped.append({"skipped": f"{name}: {str(error).splitlines()[0]}"})
            continue
        able.append(({"kernel": name, "endToEnd": kernel.end_to_end}, call, kernel.chosen))
    return able, skipped


def run(shape, budget_ms):
    able, skipped = prepare(shape)
    samples = measure_together([Timed(call, chosen) for _, call, chosen in able], budget_ms)
    return [{**row, "samples": found} for (row, _, _), found in zip(able, samples)] + skipped


def support(shape):
    able, skipped = prepare(shape)
    return [row for row, _, _ in able] + skipped


def copy(count, budget_ms):
    source = torch.empty(count, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    samples = measure_together([Timed(lambda: target.copy_(source))], budget_ms)[0]
    return [{"ms": sorted(samples)[len(samples) // 2]}]


def answer(rows):
    for row in rows:
        print(json.dumps(row))
    print(flush=True)


def main():
    budget_ms = float(sys.argv[1])
    answer([{"versions": VERSIONS, "skipped": SKIPPED}])
    for line in sys.stdin:
        request = json.loads(line)
        if "copyBytes" in request:
            answer(copy(request["copyBytes"], budget_ms))
        elif "support" in request:
            answer(support(request["support"]))
        else:
            answer(run(request["run"], budget_ms))


main()

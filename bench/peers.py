"""Others' kernels on the same GPU, measured as bench/record.ts measures ours.

usage: python3 peers.py BUDGET_MS
Reads one JSON request a line: {"copyBytes": 1073741824} or {"headDim": 128, "causal": false, "batch": 4, "heads": 32,
"tokens": 8192}. Answers each with the rows of PyTorch's FlashAttention-2 and cuDNN attention in bf16, or of a device
copy: one JSON row a line, and an empty line after the last. Its first answer tells the versions.
"""

import json
import math
import sys
import time

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
except ImportError as error:
    sys.exit(f"peers.py: {error}")

BACKENDS = {"pytorch-fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def measure(call, budget_ms):
    """Median milliseconds of a call; short calls are timed many at a time, so that launching does not count."""

    def sample(count):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    sample(2)
    count = max(1, min(50, math.ceil(1 / sample(2))))
    samples, began = [], time.time()
    while len(samples) < 7 or (time.time() - began) * 1e3 < budget_ms:
        samples.append(sample(count))
    samples.sort()
    return samples[len(samples) // 2]


def attention_rows(shape, budget_ms):
    size = (shape["batch"], shape["heads"], shape["tokens"], shape["headDim"])
    q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    flop = 4 * math.prod(size) * shape["tokens"] / (2 if shape["causal"] else 1)
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                ms = measure(lambda: scaled_dot_product_attention(q, k, v, is_causal=shape["causal"]), budget_ms)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        yield {
            "group": "attention",
            "kernel": name,
            **shape,
            "kvHeads": shape["heads"],
            "dtype": "bf16",
            "endToEnd": True,
            "ms": ms,
            "tflops": flop / ms / 1e9,
            "peer": True,
        }


def copy_row(count, budget_ms):
    source = torch.empty(count, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = measure(lambda: target.copy_(source), budget_ms)
    return {"bytes": 2 * count, "ms": ms, "tbs": 2 * count / ms / 1e9}


def answer(rows):
    for row in rows:
        print(json.dumps(row))
    print(flush=True)


def main():
    budget_ms = float(sys.argv[1])
    answer([{"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}])
    for line in sys.stdin:
        request = json.loads(line)
        if "copyBytes" in request:
            answer([copy_row(request["copyBytes"], budget_ms)])
        else:
            answer(attention_rows(request, budget_ms))


main()

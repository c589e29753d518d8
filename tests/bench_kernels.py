"""The Triton kernels beside PyTorch's own, on a GPU; without one, what the compiler makes of every tile.

    python tests/bench_kernels.py                 on a GPU: the table below
    python tests/bench_kernels.py --tune          on a GPU: the kernels in every tile
    python tests/bench_kernels.py --quick         either with the shapes of training only: a minute, or three
    python tests/bench_kernels.py --resources     registers, spills, shared memory of every tile; needs no GPU
    python tests/bench_kernels.py --resources "sm_90 attention dq 64"      the same, of what begins so
    TRITON_INTERPRET=1 python tests/bench_kernels.py --tiny       this program in Triton's interpreter

On a GPU it prints device and versions, checks every result first, and compares medians on fresh random data.
TFLOP/s count what the causal mask leaves: 2 B H T^2 D forward, 2.5 times that backward, and of documents the
same over each. What is to be reached:

| what | beside | bar | measured |
|---|---|---|---|
| attention forward, bf16, head_dim 64 and 128, 8,192 and 32,768 | SDPA's flash | ≥ 1.0× | not measured yet |
| | SDPA's cuDNN | ≥ 0.7× | not measured yet |
| attention forward + backward | flash, deterministic | ≥ 1.0× | not measured yet |
| | cuDNN | ≥ 0.6× | not measured yet |
| the same with documents of mixed length | flex_attention, varlen | ≥ 1.0× | not measured yet |
| RMSNorm + residual, both ways, 65,536 × 4,096 | a copy of the same bytes | ≥ 0.9 | not measured yet |
| cross-entropy, 8,192 × 2,048 × 128,256: peak memory | PyTorch | ≤ 1/8 | not measured yet |
| its time, as a loss | PyTorch, torch.compile | ≤ 1.1× | not measured yet |
| its time, as log-probabilities | PyTorch, torch.compile | ≤ 1.4× | not measured yet |
| decode, 256 rows of 1k to 8k tokens, 24/8 heads of 128 | a copy of the bytes | ≥ 0.8 | not measured yet |

--tune times the tiles in use (model.py: TILES, DECODE_TILE, DECODE_SPLIT) and the others listed here; the
fastest belongs into model.py. It begins with FIRST: tiles of which two programs fit on a multiprocessor, and
of those in use one. To look at next: dk dv at head_dim 128, whose tile of 64 × 64 reads queries from the
second-level cache twice as often as one of 64 × 128 would, which spills.

--resources says of the tiles in use, with Triton 3.9 (tile in queries x keys, registers per thread, bytes
spilled, KiB of shared memory):

| kernel | sm_80 | sm_90 | sm_100 |
|---|---|---|---|
| attention, head_dim 64 | 128x64, 183, 0, 48 | 128x64, 127, 0, 64 | 128x64, 142, 0, 65 |
| attention, head_dim 128 | 128x32, 201, 0, 64 | 128x64, 237, 0, 128 | 128x64, 244, 0, 129 |
| dq, 64 | 128x64, 202, 0, 64 | 128x64, 159, 0, 80 | 128x64, 80, 0, 89 |
| dq, 128 | 64x64, 255, 0, 72 | 128x64, 219, 0, 128 | 128x64, 140, 0, 145 |
| dk and dv, 64 | 64x128, 243, 0, 65 | 64x128, 232, 0, 81 | 64x128, 209, 0, 98 |
| dk and dv, 128 | 64x64, 176, 0, 72 | 64x64, 254, 0, 96 | 64x64, 232, 0, 129 |
| RMSNorm forward, 4,096 wide | 40, 0, 0 | 32, 0, 0 | 38, 0, 0 |
| RMSNorm backward | 100, 0, 48 | 98, 0, 48 | 98, 0, 48 |
| decode, 64 (tiles of 64 keys) | 64, 0, 20 | 64, 0, 20 | 64, 0, 20 |
| decode, 128 | 96, 0, 38 | 118, 0, 38 | 116, 0, 38 |
| nll forward | 37, 0, 0 | 32, 0, 0 | 32, 0, 0 |
| nll backward | 32, 0, 0 | 40, 0, 0 | 40, 0, 0 |

No tile in use spills on sm_90 with Triton 3.9; with 3.6, dk dv at head_dim 128 keeps 8 bytes on the stack,
outside its loops. The decode kernel's tiles are of 16 queries at most, too few for Hopper's wide instruction,
and it is bound by memory anyway.
"""

import argparse
import inspect
import os
import platform
import statistics
import sys
import time
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import kernel_tools as tools

import model
from sample import BLOCK_LEN

TINY, QUICK = "--tiny" in sys.argv, "--quick" in sys.argv
DEVICE = "cpu" if TINY else "cuda"
BF16 = torch.float32 if TINY else torch.bfloat16  # the interpreter's bf16 is not to be compared with

# What model.TILES might hold instead, and model.DECODE_TILE.
OTHER_TILES = {
    "forward": {
        16: [],
        32: [(128, 64, 8, 3), (64, 64, 4, 3)],
        64: [(128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3)],
        128: [(128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2)],
    },
    "dq": {
        16: [],
        32: [(128, 64, 8, 3), (64, 64, 4, 3)],
        64: [(64, 64, 4, 3), (128, 128, 8, 2)],
        128: [(64, 64, 4, 2), (128, 32, 8, 3)],
    },
    "dkdv": {
        16: [],
        32: [(64, 128, 8, 3)],
        64: [(64, 64, 4, 3)],
        128: [(64, 64, 8, 2), (64, 128, 8, 2), (32, 128, 8, 3)],
    },
}
FIRST = {"forward": {128: (64, 64, 4, 3)}, "dq": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2)},
         "dkdv": {64: (64, 64, 4, 3)}}
OTHER_DECODE_TILES = [(64, 4, 4), (128, 4, 3), (128, 8, 3), (32, 4, 4)]


def all_tiles() -> dict[str, dict[int, list]]:
    """The tile in use and the others, by kernel and head_dim."""
    return {k: {D: [tile, *OTHER_TILES[k][D]] for D, tile in t.items()} for k, t in model.TILES.items()}


def median_ms(f) -> float:
    if TINY:
        start = time.perf_counter()
        f()
        return 1e3 * (time.perf_counter() - start)
    from triton.testing import do_bench  # empties the cache between calls

    return do_bench(f, warmup=50, rep=100 if QUICK else 300, return_mode="median")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(BF16)


def row(*cells) -> None:
    print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)


def head(*cells) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def attempt(name: str, f):
    """f(), or None with a line that says why this arm is not there."""
    try:
        return f()
    except Exception as problem:  # a back end that this device, dtype or version of torch does not have
        print(f"  ({name}: {type(problem).__name__}: {str(problem).splitlines()[0][:110]})", flush=True)
        return None


def same(name: str, value, expected, bar=2e-2) -> None:
    distance = tools.error(value.detach(), expected.detach().double())
    assert distance < bar, f"{name} differs by {distance:.1e}"


def copy_bandwidth(numbers: int) -> float:
    """Bytes read and written per second by a device copy of this many bf16 numbers."""
    source = randn(numbers)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) * 1e-3)


# ------------------------------------------------------------------------------------------------------------
# Attention


def arms(q, k, v, doc_start, lengths) -> dict:
    """name → function of (q, k, v), all (B, T, heads, D), each able to give gradients."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, T = doc_start.shape

    def sdpa(backend, q, k, v):
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    found = {"ours": lambda q, k, v: model.attention(q, k, v, doc_start)}
    if lengths is None:
        found["flash"] = partial(sdpa, SDPBackend.FLASH_ATTENTION)
        found["cuDNN"] = partial(sdpa, SDPBackend.CUDNN_ATTENTION)
    else:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.cat([torch.tensor(lengths).cumsum(0) + b * T for b in range(B)])
        cu = F.pad(ends, (1, 0)).to(DEVICE, torch.int32)

        # since torch 2.12; before, heads are repeated
        grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters

        def varlen(q, k, v):
            if not grouped:
                k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            options = dict(enable_gqa=True) if grouped else {}
            longest = max(lengths)
            out = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **options)
            return out.unflatten(0, (B, T))

        found["varlen"] = varlen
    blocks = create_block_mask(
        lambda b, h, i, j: (j <= i) & (doc_start[b, i] <= j), B, None, T, T, device=DEVICE, _compile=not TINY
    )
    flex = flex_attention if TINY else torch.compile(flex_attention, dynamic=False)

    def flexible(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    return found | {"flex": flexible}


def mixed_lengths(T: int) -> list[int]:
    """Documents of mixed length that fill T: a quarter of what is left, and again, short ones at the end."""
    lengths, left = [], T
    while left:
        lengths.append(n := max(min(left, 32), left // 4))
        left -= n
    return lengths


def bench_attention(D: int, H: int, K: int, T: int, with_documents: bool) -> None:
    lengths = mixed_lengths(T) if with_documents else None
    B = max(1, 16_384 // T) if not TINY else 1
    doc_start = tools.documents([lengths or [T]] * B, DEVICE)
    q, k, v = (randn(B, T, heads, D).requires_grad_() for heads in (H, K, K))
    do = randn(B, T, H, D)
    flops = 2 * B * H * D * sum(n * n for n in (lengths or [T]))
    label = f"{D}, {H}/{K}, {T:,}" + (f", {len(lengths)} documents" if lengths else "")
    expected = None
    for name, f in arms(q, k, v, doc_start, lengths).items():

        def both(f=f):
            return torch.autograd.grad(f(q, k, v), (q, k, v), do)

        def measure(name=name, f=f, both=both):
            nonlocal expected
            out = f(q, k, v)
            gradients = both()
            expected = expected or (out.detach(), *gradients)
            for part, a, b in zip(("o", "dq", "dk", "dv"), (out, *gradients), expected):
                same(part, a, b)
            with torch.no_grad():
                forward = median_ms(lambda: f(q, k, v))
            torch.use_deterministic_algorithms(name == "flash", warn_only=True)  # ours always is
            try:
                return forward, median_ms(both)
            finally:
                torch.use_deterministic_algorithms(False)

        if (times := attempt(name, measure)) is not None:
            forward, total = times
            rates = flops / forward * 1e-9, 3.5 * flops / total * 1e-9
            row(label, name, f"{forward:.3f}", f"{rates[0]:.0f}", f"{total:.3f}", f"{rates[1]:.0f}")


def attention_table() -> None:
    head("head_dim, heads, length", "arm", "forward ms", "TFLOP/s", "forward + backward ms", "TFLOP/s")
    for D, H, K in [(32, 4, 2)] if TINY else [(64, 32, 8), (128, 24, 8)]:
        for T in [64] if TINY else [8192] if QUICK else [8192, 32_768]:
            for with_documents in (False, True):
                bench_attention(D, H, K, T, with_documents)


# ------------------------------------------------------------------------------------------------------------
# The others


def rms_norm_table() -> None:
    rows, N = (64, 128) if TINY else (65_536, 4096)
    x, residual, dy, ds = (randn(rows, N) for _ in range(4))
    weight = torch.randn(N, device=DEVICE)
    y, s, rstd = torch.ops.octo.rms_norm(x, residual, weight, 1e-5)
    with mock.patch.object(model, "KERNEL_DEVICES", set()):
        same("rms_norm", y, model.rms_norm(x, residual, weight, 1e-5)[0])
    peak = copy_bandwidth(2 * x.numel())
    head("RMSNorm + residual, 65,536 x 4,096", "ms", "GB/s", "of a copy")
    for name, f in (
        ("forward", lambda: torch.ops.octo.rms_norm(x, residual, weight, 1e-5)),
        ("backward", lambda: torch.ops.octo.rms_norm_backward(dy, ds, s, rstd, weight)),
    ):
        ms = median_ms(f)
        rate = 4 * x.nbytes / (ms * 1e-3)
        row(name, f"{ms:.3f}", f"{rate / 1e9:.0f}", f"{rate / peak:.2f}")
    row("copy", "", f"{peak / 1e9:.0f}", "1.00")


def peak_above(f, kept: int) -> float:
    """MiB that f needs at its peak above what is allocated before, and above `kept` bytes that it returns."""
    if TINY:
        f()
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - kept) / 2**20


def nll_table() -> None:
    N, C, V = (8, 32, 1000) if TINY else (8192, 2048, 128_256)
    h, weight = randn(N, C).requires_grad_(), (randn(V, C) * C**-0.5).detach().requires_grad_()
    targets = torch.randint(V, (1, N), device=DEVICE)
    grad = torch.randn(N, device=DEVICE)
    inputs, kept = (h, weight), h.nbytes + weight.nbytes

    def plain(h, weight):
        return F.cross_entropy(F.linear(h, weight).float(), targets[0], reduction="none")

    ours = {
        "as a loss": lambda: torch.autograd.grad(model.fused_nll(h, weight, targets, 1.0, "sum")[0], inputs),
        "as log-probabilities": lambda: torch.autograd.grad(
            model.fused_nll(h, weight, targets, 1.0, "none")[0], inputs, grad
        ),
    }
    head("cross-entropy, 8,192 x 2,048 x 128,256", "arm", "ms", "peak MiB above inputs and gradients")
    for use, outside in (("as a loss", None), ("as log-probabilities", grad)):

        def unfused(f=plain, outside=outside):
            nll = f(h, weight)
            return torch.autograd.grad(nll.sum() if outside is None else nll, inputs, outside)

        expected = unfused()
        for part, a, b in zip(("dh", "dweight"), ours[use](), expected):
            same(part, a, b)
        del expected
        compiled = plain if TINY else torch.compile(plain)
        arms = {"ours": ours[use], "PyTorch": unfused, "torch.compile": partial(unfused, compiled)}
        arms = {"ours": ours[use], "PyTorch": unfused} if QUICK else arms
        for name, f in arms.items():
            ms = attempt(name, partial(median_ms, f))
            if ms is not None:
                row(use, name, f"{ms:.2f}", f"{peak_above(f, kept):.0f}")


def decode_inputs(block_len: int):
    R, H, K, D, low, high = (2, 6, 2, 32, 10, 40) if TINY else (256, 24, 8, 128, 1024, 8192)
    lengths = torch.randint(low, high + 1, (R,))
    width = -(-high // block_len)
    table = torch.randperm(R * width).view(R, width).int().to(DEVICE)
    k, v = (randn(R * width, K, block_len, D) for _ in range(2))
    return randn(R, H, D), k, v, table, lengths.to(DEVICE)


def decode_table() -> None:
    peak = copy_bandwidth(1 << (16 if TINY else 30))
    head("decode, 256 rows of 1k to 8k, 24/8 heads of 128", "ms", "GB/s", "of a copy")
    for block_len in (16,) if TINY else (BLOCK_LEN,) if QUICK else (64, 128, 256, 8192):
        q, k, v, table, lengths = decode_inputs(block_len)
        out = model.decode_attention(q, k, v, table, lengths)
        with mock.patch.object(model, "KERNEL_DEVICES", set()):
            same("decode", out[:8], model.decode_attention(q[:8], k, v, table[:8], lengths[:8]))
        ms = median_ms(partial(model.decode_attention, q, k, v, table, lengths))
        rate = int(lengths.sum()) * k.shape[1] * k.shape[3] * 2 * k.element_size() / (ms * 1e-3)
        row(f"blocks of {block_len}", f"{ms:.3f}", f"{rate / 1e9:.0f}", f"{rate / peak:.2f}")
        del k, v


def rope_table() -> None:
    """What stands between two products of a decoding step: so little that starting kernels is the cost."""
    head("RoPE and cache of a new token, 64 rows, 24/8 heads of 128", "µs")
    R, H, K, D = (4, 6, 2, 32) if TINY else (64, 24, 8, 128)
    config = model.LlamaConfig(8, 1, 8, H, K, D, 8)
    cache = model.KVCache(config, R, 64, BF16, DEVICE, 64, R + 1)
    cache.table[:] = torch.arange(1, R + 1, device=DEVICE)[:, None]
    cache.lengths += 17
    q, k, v = (randn(R, 1, heads, D) for heads in (H, K, K))
    rope = model.rope_tables(torch.rand(D // 2, device=DEVICE), cache.lengths[:, None])

    def plain():
        turned, key = model.apply_rope(q, *rope), model.apply_rope(k, *rope)
        cache.write(0, places, key, v)
        return turned

    places, ours = cache.places(cache.lengths[:, None]), partial(cache.rotate_and_write, 0, q, k, v, *rope)
    made = [(f().clone(), cache.k.clone(), cache.v.clone()) for f in (ours, plain)]
    for what, a, b in zip(("q", "keys", "values"), *made):
        same(what, a, b)
    for name, f in {"one kernel": ours, "plain PyTorch": plain}.items():
        row(name, f"{1000 * (median_ms(f) if TINY else recorded_ms(f)):.1f}")


def recorded_ms(f) -> float:
    """As the sampler runs it: replayed from a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(f, return_mode="median")


# ------------------------------------------------------------------------------------------------------------
# Every tile


def tune() -> None:
    """Times of each kernel in each tile; the fastest belongs into model.py."""
    head("kernel", "head_dim", "BLOCK_M, BLOCK_N, warps, stages", "ms")
    every = {k: {D: [tile for tile in t if tile != FIRST[k].get(D)] for D, t in tiles.items()}
             for k, tiles in all_tiles().items()}
    first = {k: {D: [model.TILES[k][D], tile] for D, tile in t.items()} for k, t in FIRST.items()}
    shapes = [(64, 32, 8), (128, 24, 8), (32, 16, 8)][: 2 if QUICK else 3]
    for tiles in (first, every):
        for D, H, K in [(32, 4, 2)] if TINY else shapes:
            tune_attention(D, H, K, {k: t.get(D, []) for k, t in tiles.items()})
    decode = partial(model.decode_attention, *decode_inputs(16 if TINY else BLOCK_LEN))
    for split in (512,) if QUICK else (256, 512, 1024):
        for tile in (model.DECODE_TILE, *OTHER_DECODE_TILES)[: 1 if TINY else None]:
            with mock.patch.multiple(model, DECODE_TILE=tile, DECODE_SPLIT=split):
                ms = attempt(f"decode {tile}", partial(median_ms, decode))
            row("decode", 128, f"{tile}, pieces of {split}", ms and f"{ms:.3f}")


def tune_attention(D: int, H: int, K: int, tiles: dict[str, list]) -> None:
    B, T = (1, 64) if TINY else (2, 8192)
    q, k, v, do = (randn(B, T, heads, D) for heads in (H, K, K, H))
    starts = tools.documents([[T]] * B, DEVICE)
    o, lse = torch.ops.octo.attention(q, k, v, starts)
    forward = partial(torch.ops.octo.attention, q, k, v, starts)
    backward = partial(torch.ops.octo.attention_backward, q, k, v, starts, o, lse, do)
    for kernel, chosen in tiles.items():
        f = forward if kernel == "forward" else backward
        for tile in chosen[:1] if TINY else chosen:
            with mock.patch.dict(model.TILES[kernel], {D: tile}), mock.patch.multiple(model, SMALL_TILES={}):
                ms = attempt(f"{kernel} {tile}", partial(median_ms, f))
            row(kernel if kernel == "forward" else f"both, {kernel} in", D, tile, ms and f"{ms:.3f}")


def resources(begin: str) -> int:
    """The compiler's report on every tile whose "chip kernel" begins so.

    Returns how many of those in use spill where they should not, or use fp64 or more memory than there is.
    """
    bad, decode_tiles = 0, (model.DECODE_TILE, *OTHER_DECODE_TILES)
    numbers = "registers", "spilled bytes", "spill instructions", "shared bytes", "matrix", "used"
    head("chip", "kernel", "warps", "stages", *numbers)
    for chip in (80, 90, 100):
        used = {(j[0], *j[3:]) for j in tools.attention_jobs(chip) + tools.other_jobs()}
        jobs = tools.attention_jobs(chip, more=all_tiles()) + tools.other_jobs(decode_tiles=decode_tiles)
        for name, kernel, constants, warps, stages in jobs:
            if not f"sm_{chip} {name}".startswith(begin):
                continue
            r = tools.resources(tools.compile_for(chip, kernel, constants, warps, stages))
            in_use = (name, warps, stages) in used
            fits = r["shared"] <= tools.SHARED_LIMIT[chip]
            bad += in_use and (r["spilled"] > (0 if chip == 90 else 64) or not fits or bool(r["fp64"]))
            cells = r["registers"], r["spilled"], r["spill_code"], r["shared"], "+".join(r["matrix"])
            row(f"sm_{chip}", name, warps, stages, *cells, "yes" if in_use else "")
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="time the kernels in every tile")
    what = "compile every tile for sm_80, sm_90 and sm_100, or those whose chip and name begin so"
    parser.add_argument("--resources", nargs="?", const="", metavar="BEGIN", help=what)
    parser.add_argument("--quick", action="store_true", help="the shapes of training only, short timings")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, under TRITON_INTERPRET=1")
    args = parser.parse_args()
    if TINY:
        model.KERNEL_DEVICES.add("cpu")
    if args.resources is not None or not (TINY or torch.cuda.is_available()):
        print("no CUDA device: nothing is timed" if not torch.cuda.is_available() else "", flush=True)
        sys.exit(1 if resources(args.resources or "") else 0)
    import triton

    device = "Triton's interpreter" if TINY else torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}"
    print(f"{device}, {versions}")
    torch.manual_seed(int(time.time()))
    if args.tune:
        return tune()
    rates = [copy_bandwidth(1 << (16 if TINY else 30)) / 1e9 for _ in range(3)]
    print(f"copy of 2 GiB: {statistics.median(rates):.0f} GB/s read and written")
    for table in (rms_norm_table, nll_table, decode_table, rope_table, attention_table):  # the longest last
        table()


if __name__ == "__main__":
    main()

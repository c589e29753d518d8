"""The Triton kernels against PyTorch's own, on a GPU; without one, what the compiler makes of every tile.

python tests/bench_kernels.py            on a GPU: the tables below, medians, fresh random data, each result checked first
python tests/bench_kernels.py --tune     on a GPU: every tile in model.py's lists
python tests/bench_kernels.py --resources       registers, spills, shared memory of every tile on sm_80, sm_90, sm_100
TRITON_INTERPRET=1 python tests/bench_kernels.py --tiny       this program on a CPU, in Triton's interpreter: no figures

TFLOP/s count what the causal mask leaves: 2 B H T^2 D forward, 2.5 times that backward, and of documents the same over each.
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

TINY = "--tiny" in sys.argv
DEVICE = "cpu" if TINY else "cuda"
BF16 = torch.float32 if TINY else torch.bfloat16  # the interpreter's bf16 is not to be compared with


def median_ms(f) -> float:
    if TINY:
        start = time.perf_counter()
        f()
        return 1e3 * (time.perf_counter() - start)
    from triton.testing import do_bench  # empties the cache between calls

    return do_bench(f, warmup=50, rep=300, return_mode="median")


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
    """Bytes read and written a second by a device copy of this many bf16 numbers."""
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

        grouped = (
            "enable_gqa" in inspect.signature(varlen_attn).parameters
        )  # since torch 2.12; before, heads are repeated

        def varlen(q, k, v):
            if not grouped:
                k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            options = dict(enable_gqa=True) if grouped else {}
            return varlen_attn(q, k, v, cu, cu, max(lengths), max(lengths), window_size=(-1, 0), **options).unflatten(
                0, (B, T)
            )

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
        for T in [64] if TINY else [8192, 32_768]:
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
    N, C, V = (64, 32, 1000) if TINY else (8192, 2048, 128_256)
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
        for name, f in (("ours", ours[use]), ("PyTorch", unfused), ("torch.compile", partial(unfused, compiled))):
            ms = attempt(name, partial(median_ms, f))
            if ms is not None:
                row(use, name, f"{ms:.2f}", f"{peak_above(f, kept):.0f}")


def decode_inputs(block_len: int):
    R, H, K, D, low, high = (4, 6, 2, 32, 10, 90) if TINY else (256, 24, 8, 128, 1024, 8192)
    lengths = torch.randint(low, high + 1, (R,))
    width = -(-high // block_len)
    table = torch.randperm(R * width).view(R, width).int().to(DEVICE)
    k, v = (randn(R * width, K, block_len, D) for _ in range(2))
    return randn(R, H, D), k, v, table, lengths.to(DEVICE)


def decode_table() -> None:
    peak = copy_bandwidth(1 << (16 if TINY else 30))
    head("decode, 256 rows of 1k to 8k, 24/8 heads of 128", "ms", "GB/s", "of a copy")
    for block_len in (16,) if TINY else (64, 128, 256, 8192):
        q, k, v, table, lengths = decode_inputs(block_len)
        out = model.decode_attention(q, k, v, table, lengths)
        with mock.patch.object(model, "KERNEL_DEVICES", set()):
            same("decode", out[:8], model.decode_attention(q[:8], k, v, table[:8], lengths[:8]))
        ms = median_ms(partial(model.decode_attention, q, k, v, table, lengths))
        rate = int(lengths.sum()) * k.shape[1] * k.shape[3] * 2 * k.element_size() / (ms * 1e-3)
        row(f"blocks of {block_len}", f"{ms:.3f}", f"{rate / 1e9:.0f}", f"{rate / peak:.2f}")
        del k, v


# ------------------------------------------------------------------------------------------------------------
# Every tile


def tune() -> None:
    """Times of each kernel in each tile; the fastest belongs first in model.py's list."""
    head("kernel", "head_dim", "BLOCK_M, BLOCK_N, warps, stages", "ms")
    for D, H, K in [(32, 4, 2)] if TINY else [(32, 16, 8), (64, 32, 8), (128, 24, 8)]:
        B, T = (1, 64) if TINY else (2, 8192)
        q, k, v, do = (randn(B, T, heads, D) for heads in (H, K, K, H))
        starts = tools.documents([[T]] * B, DEVICE)
        o, lse = torch.ops.octo.attention(q, k, v, starts)
        for kernel, f in (
            ("forward", lambda: torch.ops.octo.attention(q, k, v, starts)),  # noqa: B023
            ("dq", lambda: torch.ops.octo.attention_backward(q, k, v, starts, o, lse, do)),  # noqa: B023
            ("dkdv", lambda: torch.ops.octo.attention_backward(q, k, v, starts, o, lse, do)),  # noqa: B023
        ):
            for tile in model.TILES[kernel][D]:
                with mock.patch.dict(model.TILES[kernel], {D: [tile]}), mock.patch.object(model, "SMALL_TILES", {}):
                    ms = attempt(f"{kernel} {tile}", partial(median_ms, f))
                row(kernel if kernel == "forward" else f"both, {kernel} in", D, tile, ms and f"{ms:.3f}")
    q, k, v, table, lengths = decode_inputs(16 if TINY else 128)
    for split in (256, 512, 1024):
        for tile in model.DECODE_TILES:
            with mock.patch.object(model, "DECODE_TILES", [tile]), mock.patch.object(model, "DECODE_SPLIT", split):
                ms = attempt(
                    f"decode {tile}", partial(median_ms, partial(model.decode_attention, q, k, v, table, lengths))
                )
            row("decode", 128, f"{tile}, pieces of {split}", ms and f"{ms:.3f}")


def resources() -> int:
    """The compiler's report on every tile. Returns how many of those in use spill where they should not."""
    bad = 0
    head(
        "chip",
        "kernel",
        "warps",
        "stages",
        "registers",
        "spilled bytes",
        "spill instructions",
        "shared bytes",
        "matrix",
        "used",
    )
    for capability in (80, 90, 100):
        used = {(j[0], j[3], j[4]) for j in tools.attention_jobs(capability) + tools.other_jobs()}
        for name, kernel, constants, warps, stages in tools.attention_jobs(capability, True) + tools.other_jobs(True):
            r = tools.resources(tools.compile_for(capability, kernel, constants, warps, stages))
            default = (name, warps, stages) in used
            fits = r["shared"] <= tools.SHARED_LIMIT[capability]
            bad += default and (r["spilled"] > (0 if capability == 90 else 64) or not fits or bool(r["fp64"]))
            cells = r["registers"], r["spilled"], r["spill_code"], r["shared"], "+".join(r["matrix"])
            row(f"sm_{capability}", name, warps, stages, *cells, "yes" if default else "")
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="time every tile in model.py's lists")
    parser.add_argument("--resources", action="store_true", help="compile every tile for sm_80, sm_90, sm_100")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, under TRITON_INTERPRET=1")
    args = parser.parse_args()
    if TINY:
        model.KERNEL_DEVICES.add("cpu")
    if args.resources or not (TINY or torch.cuda.is_available()):
        print("no CUDA device: nothing is timed" if not torch.cuda.is_available() else "", flush=True)
        sys.exit(1 if resources() else 0)
    import triton

    device = "Triton's interpreter" if TINY else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}")
    torch.manual_seed(int(time.time()))
    if args.tune:
        return tune()
    rates = [copy_bandwidth(1 << (16 if TINY else 30)) / 1e9 for _ in range(3)]
    print(f"copy of 2 GiB: {statistics.median(rates):.0f} GB/s read and written")
    for table in (attention_table, rms_norm_table, nll_table, decode_table):
        table()


if __name__ == "__main__":
    main()

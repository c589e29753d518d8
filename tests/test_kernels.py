"""The Triton kernels against float64 references: in Triton's interpreter, and on a GPU where there is one.

TRITON_INTERPRET acts when a kernel is decorated, so the checks run in a process of their own that imports
model.py under it; so do those that compile. `interpreted(check, ...)` calls a function of this file there.
"""

import itertools
import multiprocessing
import os
import subprocess
import sys
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import bench_kernels
import kernel_tools as tools
import processes
import pytest
import torch
import torch.nn.functional as F
from kernel_tools import documents, error, guarded

import midtrain
import model as llama
from model import Llama, LlamaConfig

pytest.importorskip("triton")
torch.set_num_threads(1)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative distances allowed: sums of thousands in fp32; probabilities and results rounded to fp16 (2^-11) and
# bf16 (2^-8, the interpreter cuts off instead of rounding to nearest).
BAR = {FP32: 2e-6, FP16: 1e-3, BF16: 8e-3}


def near(value, exact, bar, name="the result"):
    distance = error(value, exact)
    assert distance < bar, f"{name} is {distance:.1e} away, allowed is {bar:.1e}"


class Process:
    """A Python process with an environment of its own that runs functions of this file."""

    def __init__(self, **environment: str):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with mock.patch.dict(os.environ, environment):
            self.pool.submit(prepare).result()

    def __call__(self, check, *args, **kwargs):
        return self.pool.submit(check, *args, **kwargs).result()


def prepare() -> None:
    """Kernels on CPU tensors too; NaN in what torch.empty gives, so that what is not written shows."""
    llama.KERNEL_DEVICES.add("cpu")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()


def _process(**environment):
    process = Process(**environment)
    yield process
    process.pool.shutdown()


@pytest.fixture(scope="module")
def interpreted():
    yield from _process(TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiling():
    yield from _process(OCTO_KERNELS="1")


@pytest.fixture(scope="module", params=["interpreter", *(["cuda"] if torch.cuda.is_available() else [])])
def run(request):
    """Runs a check, which takes `device`: in the interpreter on a CPU, and on the card where there is one."""
    if request.param == "cuda":
        return lambda check, *args, **kwargs: check(*args, device="cuda", **kwargs)
    return request.getfixturevalue("interpreted")


# ------------------------------------------------------------------------------------------------------------
# Attention

# T, heads, KV heads, head_dim, documents of each row. Tiles are of 64 and 128: lengths and boundaries lie on
# their edges and off them.
ATTENTION = [
    (1, 2, 2, 32, [[1]]),
    (17, 3, 1, 16, [[17], [1] * 17]),
    (17, 4, 2, 64, [[5, 1, 11], [1, 16]]),
    (127, 4, 1, 32, [[127], [63, 64]]),
    (128, 2, 2, 64, [[64, 64], [128]]),
    (129, 3, 1, 64, [[64, 1, 64], [128, 1]]),
    (129, 8, 1, 32, [[1, 63, 64, 1]]),
    (200, 2, 1, 128, [[200], [30, 100, 1, 69]]),
    (1000, 2, 1, 64, [[1, 2, 300, 209, 1, 1, 128, 358]]),
    (1000, 1, 1, 32, [[1000]]),
]


def attention_gradients(q, k, v, doc_start, do):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, lse = torch.ops.octo.attention(q, k, v, doc_start)
    return o, lse, torch.autograd.grad(o, (q, k, v), do)


def check_attention(case, dtype, scale=1.0, device="cpu"):
    T, H, K, D, lengths = case
    doc_start = documents(lengths, device)
    shapes = [(len(lengths), T, heads, D) for heads in (H, K, K, H)]
    q, k, v, do = (
        guarded(*shape, dtype=dtype, device=device, scale=s, seed=i)
        for i, (shape, s) in enumerate(zip(shapes, (scale, scale, 1.0, 1.0)))
    )
    with tools.canaries():
        o, lse, gradients = attention_gradients(q, k, v, doc_start, do)
    assert o.dtype == dtype and lse.dtype == FP32
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    exact_o, exact_lse = tools.exact_attention(*wide, doc_start)
    exact = torch.autograd.grad(exact_o, wide, do.double())
    near(lse, exact_lse, 1e-6, "lse")
    bars = dict.fromkeys(("o", "dq", "dk", "dv"), BAR[dtype])
    if scale > 1.0:  # scores in the thousands have large errors in any fp32: plain PyTorch's are the measure
        plain = [x.detach().requires_grad_() for x in (q, k, v)]
        with mock.patch.multiple(llama, KERNEL_DEVICES=set(), LONGEST_BLOCKED=0):
            reference = llama.attention(*plain, doc_start)  # torch's fused kernel: blocks are more exact
        reference = (reference, *torch.autograd.grad(reference, plain, do))
        bars = {name: 3 * error(a, b) for name, a, b in zip(bars, reference, (exact_o, *exact))}
    for name, a, b in zip(bars, (o, *gradients), (exact_o, *exact)):
        if b.norm() > 1e-9 * do.norm():
            near(a, b, bars[name], name)
        else:  # with one key the softmax is 1, whatever q and k: their gradients are zero but for rounding
            assert a.abs().max() < 10 * BAR[dtype]
    if device == "cpu":
        return  # the interpreter runs one program after the other: it has no order that could change
    *again, gradients_again = attention_gradients(q, k, v, doc_start, do)
    pairs = zip((o, lse, *gradients), (*again, *gradients_again))
    assert all(torch.equal(a, b) for a, b in pairs), "not deterministic"


def case_name(case) -> str:
    T, H, K, D, lengths = case
    return f"T{T}-H{H}-K{K}-D{D}-{len(lengths[0])}docs"


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("case", ATTENTION, ids=case_name)
def test_attention_kernel(case, dtype, run):
    if case[0] == 1000 and not torch.cuda.is_available():  # the interpreter is slow
        lengths = [300] if len(case[4][0]) == 1 else [1, 2, 129, 100, 68]
        case = (300, *case[1:4], [lengths])
    run(check_attention, case, dtype)


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_attention_kernel_with_large_magnitudes(dtype, run):
    """Scores in the thousands: all weight on one key; exponents overflow if the maximum is not taken out."""
    run(check_attention, (129, 2, 1, 32, [[100, 29]]), dtype, scale=16.0)


def check_tiles(device="cpu"):
    """Every tile that the benchmark times gives the same result, and one of a shape that nobody listed."""
    shape = (150, 2, 1, 64, [[33, 100, 17]])
    each = {kernel: [*tiles[64], (32, 64, 4, 2), (64, 32, 4, 2)]
            for kernel, tiles in bench_kernels.OTHER_TILES.items()}
    for chosen in itertools.zip_longest(*each.values()):  # one of each kernel at a time
        new = {kernel: {64: tile} for kernel, tile in zip(each, chosen) if tile}
        tiles = {kernel: usual | new.get(kernel, {}) for kernel, usual in llama.TILES.items()}
        with mock.patch.object(llama, "TILES", tiles):
            check_attention(shape, FP16, device=device)


def test_attention_kernel_in_every_tile(run):
    run(check_tiles)


def check_neighbours(device="cpu"):
    """A row's result has the same bits alone and among others; numbers outside a document do not reach it."""
    q, k, v = (
        guarded(3, 150, heads, 32, dtype=FP16, device=device, seed=i) for i, heads in enumerate((2, 1, 1))
    )
    doc_start = documents([[150], [70, 80], [1, 149]], device)
    o, lse, gradients = attention_gradients(q, k, v, doc_start, q)
    one = [x[1:2].contiguous() for x in (q, k, v)]
    alone = attention_gradients(*one, doc_start[1:2], one[0])
    for a, b in zip((o, lse, *gradients), (*alone[:2], *alone[2])):
        assert torch.equal(a[1:2], b)
    k2, v2 = k.clone(), v.clone()
    k2[1, :70], v2[1, :70] = 7.0, 50.0
    changed = torch.ops.octo.attention(q, k2, v2, doc_start)[0]
    assert torch.equal(changed[1, 70:], o[1, 70:]) and torch.equal(changed[[0, 2]], o[[0, 2]])
    assert not torch.equal(changed[1, :70], o[1, :70])


def test_attention_kernel_knows_no_neighbours(run):
    run(check_neighbours)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 40 GB on a GPU")
def test_attention_kernel_past_two_to_the_31_on_the_card():
    """Offsets of more than 32 bits: the last documents of a row of 2^20 tokens, beside the same alone."""
    T, H, D, n = 2**20, 32, 128, 1024
    assert T * H * D > 2**31
    q, k, v = (torch.randn(1, T, heads, D, device="cuda", dtype=BF16) for heads in (H, 8, 8))
    doc_start = (torch.arange(T, device="cuda") // n * n)[None]
    o, lse, gradients = attention_gradients(q, k, v, doc_start, q)
    ends = [x[:, -4 * n :].contiguous() for x in (q, k, v)]
    alone = attention_gradients(*ends, (torch.arange(4 * n, device="cuda") // n * n)[None], ends[0])
    for a, b in zip((o, *gradients), (alone[0], *alone[2])):
        assert torch.equal(a[:, -4 * n :], b)
    assert torch.equal(lse[:, :, -4 * n :], alone[1])


def check_strides(device="cpu"):
    """Views that are not contiguous, and starts in another integer type."""
    big = guarded(2, 40, 12, 32, device=device)
    q, k, v = big[:, :, :4], big[:, :, 4:8:2], big[:, :, 8:10]
    doc_start = documents([[40], [13, 27]], device)
    o = torch.ops.octo.attention(q, k, v, doc_start)[0]
    assert error(o, tools.exact_attention(q, k, v, doc_start)[0]) < BAR[FP32]
    assert torch.equal(o, torch.ops.octo.attention(q, k, v, doc_start.int())[0])
    assert torch.equal(llama.attention(q, k, v, doc_start), o)
    assert torch.equal(llama.attention(q, k, v, None), torch.ops.octo.attention(q, k, v, doc_start * 0)[0])


def test_attention_kernel_takes_views(run):
    run(check_strides)


# ------------------------------------------------------------------------------------------------------------
# RMSNorm


def check_rms_norm(rows, width, dtype, residual, programs=528, device="cpu"):
    eps, weight = 1e-5, guarded(width, dtype=FP32 if residual else dtype, device=device, seed=9)
    shape = (*rows, width)
    x, other, dy, ds = (guarded(*shape, dtype=dtype, device=device, scale=3.0, seed=i) for i in range(4))
    inputs = [x.requires_grad_(), other.requires_grad_(), weight.requires_grad_()]
    with mock.patch.object(llama, "RMS_PROGRAMS", programs), tools.canaries():
        y, s = llama.rms_norm(x, other if residual else None, weight, eps)
        if residual:
            allowed = 0.004 if (dtype, device) == (BF16, "cpu") else 0
            assert error(s, (x + other).double()) <= allowed
        else:
            assert s is x
        gradients = torch.autograd.grad((y, s), inputs, (dy, ds), allow_unused=True)
    wide = [v.detach().double().requires_grad_() for v in inputs]
    if residual and dtype != FP32:  # the norm is of the rounded sum: let the reference start there
        wide[0] = s.detach().double().requires_grad_()
        wide[1] = torch.zeros_like(wide[0], requires_grad=True)
    exact_y, exact_s = tools.exact_rms_norm(wide[0], wide[1] if residual else None, wide[2], eps)
    exact = torch.autograd.grad((exact_y, exact_s), wide, (dy.double(), ds.double()), allow_unused=True)
    near(y, exact_y, BAR[dtype], "y")
    assert [g is None for g in gradients] == [g is None for g in exact]
    for name, a, b in zip(("dx", "dresidual", "dweight"), gradients, exact):
        if b is not None:
            near(a, b, BAR[dtype], name)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize(
    "rows, width", [((1,), 128), ((3, 17), 100), ((129,), 32), ((7,), 3072), ((2, 5), 4097)]
)
def test_rms_norm_kernel(rows, width, residual, dtype, run):
    run(check_rms_norm, rows, width, dtype, residual)


def test_rms_norm_kernel_whose_programs_take_many_rows(run):
    """The sum for the weight's gradient, with fewer programs than rows and the last ones idle."""
    run(check_rms_norm, (1000,), 1000, FP32, True, programs=7)


def check_rms_norm_unused(device="cpu"):
    """Gradients through one output alone."""
    for pick in (0, 1):
        shapes = [(5, 64), (5, 64), (64,), (5, 64)]
        x, r, w, grad = (guarded(*shape, device=device, seed=i) for i, shape in enumerate(shapes))
        out = llama.rms_norm(x.requires_grad_(), r.requires_grad_(), w.requires_grad_(), 1e-5)[pick]
        gradients = torch.autograd.grad(out, (x, r), grad)
        wide = [v.detach().double().requires_grad_() for v in (x, r)]
        exact = torch.autograd.grad(tools.exact_rms_norm(*wide, w.double(), 1e-5)[pick], wide, grad.double())
        for a, b in zip(gradients, exact):
            near(a, b, BAR[FP32])


def test_rms_norm_kernel_when_an_output_is_not_used(run):
    run(check_rms_norm_unused)


# ------------------------------------------------------------------------------------------------------------
# Decode attention


def paged(lengths, K, D, block_len, dtype, device, extra=3):
    """Pools, table and the same cache row by row. Blocks are in random order; what no row owns is NaN."""
    generator = torch.Generator().manual_seed(0)
    need = [-(-n // block_len) for n in lengths]
    width = max(1, *need)
    order = torch.randperm(sum(need) + extra, generator=generator)
    table = torch.full((len(lengths), width), 10**6, dtype=torch.int32)  # never looked up
    pools = [torch.full((len(order), K, block_len, D), torch.nan) for _ in "kv"]
    rows = [torch.randn(len(lengths), width * block_len, K, D, generator=generator).to(dtype) for _ in "kv"]
    at = 0
    for r, n in enumerate(lengths):
        table[r, : need[r]] = order[at : at + need[r]]
        at += need[r]
        for pool, row in zip(pools, rows):
            for t in range(n):
                pool[table[r, t // block_len], :, t % block_len] = row[r, t].float()
    return [x.to(device, dtype) for x in pools], table.to(device), [x.to(device) for x in rows]


def exact_decode(q, k, v, lengths):
    """From the definition, row by row: k and v (R, L, K, D)."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for r, n in enumerate(lengths):
        if n:
            starts = torch.zeros(1, n, dtype=torch.int64, device=q.device)
            last = torch.zeros(1, n, *q.shape[1:], dtype=q.dtype, device=q.device)
            last[0, -1] = q[r]
            out[r] = tools.exact_attention(last, k[r : r + 1, :n], v[r : r + 1, :n], starts)[0][0, -1]
    return out


def check_decode(H, K, D, block_len, lengths, dtype, split=512, device="cpu"):
    (k, v), table, rows = paged(lengths, K, D, block_len, dtype, device)
    q = guarded(len(lengths), H, D, dtype=dtype, device=device, scale=2.0)
    n = torch.tensor(lengths, device=device)
    with mock.patch.object(llama, "DECODE_SPLIT", split), tools.canaries():
        out = llama.decode_attention(q, k, v, table, n)
        near(out, exact_decode(q, *rows, lengths), BAR[dtype])
        assert all(not out[r].any() for r in range(len(lengths)) if lengths[r] == 0)
        for r in range(len(lengths)):  # alone, and with a wider table: the same bits
            one = llama.decode_attention(q[r : r + 1], k, v, table[r : r + 1], n[r : r + 1])
            wide = F.pad(table[r : r + 1], (0, 7), value=10**6)
            assert torch.equal(one[0], out[r])
            assert torch.equal(llama.decode_attention(q[r : r + 1], k, v, wide, n[r : r + 1])[0], out[r])
    with mock.patch.object(llama, "KERNEL_DEVICES", set()):
        reference = llama.decode_attention(q, k, v, table, n)
    near(reference, exact_decode(q, *rows, lengths), 2 * BAR[dtype], "the reference")


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(
    "H, K, D, block_len, lengths",
    [
        (4, 4, 32, 16, [1, 16, 17, 0, 5]),
        (6, 3, 64, 64, [130, 64, 1, 63]),
        (3, 1, 128, 100, [250, 99, 100, 101]),  # blocks that are no multiple of a tile
        (8, 2, 16, 600, [600, 3]),  # a block as long as a row, as the dense cache has it
        (16, 2, 64, 128, [200, 128]),
        (20, 1, 32, 64, [70]),  # more query heads than the 16 that a tile of tensor cores has
    ],
)
def test_decode_attention_kernel(H, K, D, block_len, lengths, dtype, run):
    run(check_decode, H, K, D, block_len, lengths, dtype)


def test_decode_attention_kernel_in_many_pieces(run):
    run(check_decode, 4, 2, 32, 64, [1, 128, 129, 400, 255, 256, 0], FP32, split=128)


# ------------------------------------------------------------------------------------------------------------
# Rotary embedding of a new token, and its place in the cache


def check_rope_to_cache(H, K, D, block_len, lengths, dtype, stacked, device="cpu"):
    """Against apply_rope() and write(): of the pools nothing else changes, and a full row writes nothing."""
    (k_pool, v_pool), table, _ = paged([n + 1 for n in lengths], K, D, block_len, dtype, device)
    behind = torch.tensor(lengths, device=device)
    cos, sin = llama.rope_tables(torch.rand(D // 2, device=device), behind[:, None])
    heads = guarded(len(lengths), H + 2 * K, D, dtype=dtype, device=device)
    q, k, v = (x if stacked else guarded(*x.shape, dtype=dtype, device=device).copy_(x)
               for x in heads.split((H, K, K), 1))
    old, args = [k_pool.clone(), v_pool.clone()], (q, k, v, cos[:, 0, 0], sin[:, 0, 0])
    with tools.canaries():
        out = torch.ops.octo.rope_to_cache(*args, k_pool, v_pool, table, behind)
    q, k = (llama.apply_rope(x[:, None].double(), cos.double(), sin.double())[:, 0] for x in (q, k))
    near(out, q, BAR[dtype])
    for r, n in enumerate(lengths):
        block, token = table[r, n // block_len], n % block_len
        near(k_pool[block, :, token], k[r], BAR[dtype])
        assert torch.equal(v_pool[block, :, token], v[r])
        k_pool[block, :, token], v_pool[block, :, token] = (x[block, :, token] for x in old)
    assert all(torch.equal(x.nan_to_num(77.0), y.nan_to_num(77.0)) for x, y in zip(old, (k_pool, v_pool)))
    behind[:] = table.shape[1] * block_len
    torch.ops.octo.rope_to_cache(*args, k_pool, v_pool, table, behind)
    assert all(torch.equal(x.nan_to_num(77.0), y.nan_to_num(77.0)) for x, y in zip(old, (k_pool, v_pool)))


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "apart"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "H, K, D, block_len, lengths",
    [
        (2, 2, 16, 8, [0, 7, 8]),
        (6, 2, 64, 16, [5, 31, 32, 0, 100]),
        (4, 1, 128, 1, [3, 0]),
        (8, 2, 32, 64, [9]),
    ],
)
def test_rope_to_cache_kernel(H, K, D, block_len, lengths, dtype, stacked, run):
    run(check_rope_to_cache, H, K, D, block_len, lengths, dtype, stacked)


# ------------------------------------------------------------------------------------------------------------
# Cross-entropy with the output projection


def check_nll(N, C, V, dtype, temperature, chunk, scale=1.0, device="cpu"):
    h, weight = (guarded(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate([(N, C), (V, C)]))
    h = (h * scale).detach().requires_grad_()
    weight.requires_grad_()
    targets = torch.randint(V, (1, N), generator=torch.Generator().manual_seed(2)).to(device)
    targets[0, :: max(5, N // 3)] = -1
    targets[0, -1] = -100
    grad = guarded(1, N, device=device, seed=3)
    wide = [x.detach().double().requires_grad_() for x in (h, weight)]
    exact = tools.exact_nll(*wide, targets[0], temperature)
    bar = {FP32: 5e-6, FP16: 2e-3, BF16: 2e-2}[dtype]  # logits and their gradient are rounded to the dtype
    bar *= scale  # logits in the thousands have errors of 1e-4 in fp32, and so has their softmax

    def compare(gradients, expected):
        for name, a, b in zip(("dh", "dweight"), gradients, expected):
            assert b.any() or not a.any()
            if b.any():
                near(a, b, bar, name)

    with mock.patch.object(llama, "CHUNK_NUMBERS", chunk), tools.canaries():
        nll = llama.fused_nll(h, weight, targets, temperature, "none")
        assert nll.shape == (1, N) and nll.dtype == FP32 and not nll[targets < 0].any()
        if exact.any():
            near(nll[0], exact, bar, "nll")
        gradients = torch.autograd.grad(nll, (h, weight), grad)
        compare(gradients, torch.autograd.grad(exact, wide, grad[0].double(), retain_graph=True))
        total, each = llama.fused_nll(h, weight, targets, temperature, "sum")
        assert not each.requires_grad and torch.equal(each, nll) and torch.equal(total, nll.sum())
        gradients = torch.autograd.grad(total * 0.37, (h, weight))
        compare(gradients, torch.autograd.grad(exact.sum() * 0.37, wide))
        with torch.no_grad():
            again = llama.fused_nll(h, weight, targets, temperature, "sum")
        assert torch.equal(again[0], total) and torch.equal(again[1], each)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(
    "N, C, V, temperature, chunk",
    [
        (1, 32, 17, 1.0, 1 << 28), (129, 64, 1000, 0.7, 1 << 28),
        (70, 32, 129, 1.5, 129 * 64), (70, 16, 200, 1.0, 1),
    ],
)
def test_nll_kernel(N, C, V, temperature, chunk, dtype, run):
    run(check_nll, N, C, V, dtype, temperature, chunk)


def test_nll_kernel_with_large_logits(run):
    run(check_nll, 65, 64, 300, FP32, 1.0, 1 << 28, scale=300.0)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor that any operation returns (not those inside a registered operator)."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.nbytes)
        return out


def check_odd_inputs(device="cpu"):
    """Vectors that are every second number of another; a target that is no word; dtypes that differ."""
    h, weight = guarded(6, 32, device=device), guarded(11, 32, device=device)
    targets = torch.arange(12, device=device)[::2]
    nll = torch.ops.octo.linear_nll(h, weight, targets, 1.0)[0]
    near(nll, tools.exact_nll(h, weight, targets, 1.0), BAR[FP32])
    words = torch.tensor([0, 1, 11, 3, 10**6, -1], device=device)
    wrong = torch.ops.octo.linear_nll(h, weight, words, 1.0)[0]
    assert wrong.isnan().tolist() == [False, False, True, False, True, False]
    norm = guarded(64, device=device)[::2]
    near(llama.rms_norm(h, None, norm, 1e-5)[0], tools.exact_rms_norm(h, None, norm, 1e-5)[0], BAR[FP32])
    with pytest.raises(AssertionError, match="residual"):
        llama.rms_norm(h.to(BF16), h, norm, 1e-5)
    (k, v), table, rows = paged([5, 20], 2, 16, 16, FP32, device)
    lengths = torch.tensor([5, 99, 20, 99], device=device)[::2]
    q = guarded(2, 4, 16, device=device)
    near(llama.decode_attention(q, k, v, table, lengths), exact_decode(q, *rows, [5, 20]), BAR[FP32])
    (k, v), table, rows = paged([16, 32], 2, 16, 16, FP32, device)
    longer = torch.tensor([16, 10**6], device=device)  # than the table: read to its end
    near(llama.decode_attention(q, k, v, table, longer), exact_decode(q, *rows, [16, 32]), BAR[FP32])


def test_kernels_with_odd_inputs(run):
    run(check_odd_inputs)


def check_many_chunks(device="cpu"):
    """The rounding errors of dW in a 16-bit dtype do not add up over chunks."""
    h = guarded(640, 32, dtype=FP16, device=device)
    weight = guarded(40, 32, dtype=FP16, device=device, seed=1)
    targets = torch.randint(40, (640,), generator=torch.Generator().manual_seed(0)).to(device)
    wide = [x.double().requires_grad_() for x in (h, weight)]
    exact = torch.autograd.grad(tools.exact_nll(*wide, targets, 1.0).sum(), wide)[1]
    distances = []
    for chunk in (1 << 28, 64 * 40):
        with mock.patch.multiple(llama, CHUNK_NUMBERS=chunk, LARGER=1):  # ten chunks are not few
            distances.append(error(torch.ops.octo.linear_nll_sum(h, weight, targets, 1.0)[3], exact))
    assert distances[1] < 1.2 * distances[0], distances


def test_nll_kernel_in_many_chunks(run):
    run(check_many_chunks)


def test_chunks_of_a_loss_are_few_or_small():
    """The paper's micro-batches: four chunks, so that dW needs no sum in fp32; more tokens, small chunks."""
    V, most = 128_256, llama.CHUNK_NUMBERS
    for tokens, parts, larger in ((4 * 8192, 4, 4), (2 * 8192, 4, 2), (8192, 4, 1), (100, 1, 1)):
        chunks = llama._chunks(tokens, V, llama.LARGER)
        assert len(chunks) == parts and chunks[-1][1] == tokens
        assert max(b - a for a, b in chunks) * V <= larger * most
    chunks = llama._chunks(5 * 8192, V, llama.LARGER)
    assert len(chunks) > llama.FEW and max(b - a for a, b in chunks) * V <= most
    assert len(llama._chunks(4 * 8192, V)) == 16  # of log-probabilities


def check_no_tokens(device="cpu"):
    """A rank may have nothing to do: no tokens, no losses, and gradients of zero."""
    h = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = guarded(11, 8, device=device).requires_grad_()
    targets = torch.zeros(1, 0, dtype=torch.int64, device=device)
    for reduction in ("none", "sum"):
        out = llama.fused_nll(h, weight, targets, 1.0, reduction)
        (out.sum() if reduction == "none" else out[0]).backward()
        assert weight.grad.shape == (11, 8) and not weight.grad.any()


def test_nll_kernel_without_tokens(run):
    run(check_no_tokens)


def check_logits_never_exist(device="cpu"):
    N, C, V, chunk = 1088, 8, 1000, 64 * 1000  # more than FEW * LARGER chunks
    h = guarded(N, C, device=device).requires_grad_()
    weight = guarded(V, C, device=device).requires_grad_()
    targets = torch.zeros(1, N, dtype=torch.int64, device=device)
    operators = llama._linear_nll, llama._linear_nll_grad, llama._linear_nll_sum
    forward, backward, both = (f._init_fn for f in operators)
    no_kernels = mock.patch.object(llama, "_wrap", lambda kernel: NoKernel())  # sizes are asked, no numbers
    with no_kernels, mock.patch.object(llama, "CHUNK_NUMBERS", chunk), torch.no_grad(), Largest() as largest:
        nll, lse = forward(h, weight, targets[0], 1.0)
        backward(h, weight, targets[0], lse, nll, 1.0)
        both(h, weight, targets[0], 1.0)
    assert 4 * chunk <= largest.bytes < 8 * chunk, (largest.bytes, 4 * N * V)


def test_nll_kernel_never_holds_all_logits(run):
    run(check_logits_never_exist)


# ------------------------------------------------------------------------------------------------------------
# The whole model, FSDP2, torch.compile

SMALL = LlamaConfig(61, 2, 64, 4, 2, 32, 96, rope_theta=100.0, max_position=64)


def small_llama(config=SMALL, device="cpu") -> Llama:
    model = Llama(config).init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return model.to(device)


def batch(device="cpu"):
    tokens, targets = torch.randint(61, (2, 2, 50), generator=torch.Generator().manual_seed(0)).to(device)
    targets[:, ::7] = -1
    return tokens, targets, documents([[20, 1, 29], [50]], device)


def losses_and_gradients(model, reduction, temperature=1.0):
    out = model(*batch(next(model.parameters()).device), temperature, reduction=reduction)
    if reduction == "none":
        nll, loss = out, (out * torch.linspace(-1, 1, 50, device=out.device)).sum()
    else:
        loss, nll = out
    loss.backward()
    return nll.detach(), [p.grad for p in model.parameters()]


def check_model(config, reduction, device="cpu"):
    """Losses and gradients of the whole model, kernels against plain PyTorch."""
    nll, gradients = losses_and_gradients(small_llama(config, device), reduction, 0.9)
    with mock.patch.object(llama, "KERNEL_DEVICES", set()):
        exact, expected = losses_and_gradients(small_llama(config, device).double(), reduction, 0.9)
    assert error(nll, exact.double()) < 1e-5
    assert all(error(a, b.double()) < 1e-4 for a, b in zip(gradients, expected))


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, tie_embeddings=False, head_dim=24, num_kv_heads=1)], ids=["", "24"]
)
def test_llama_with_kernels(config, reduction, run):
    """head_dim 24 has no attention kernel: there the other kernels work beside plain attention."""
    run(check_model, config, reduction)


def check_cache(device="cpu"):
    """Token by token over the cache, whose kernel is the decode kernel, against the whole text at once."""
    model, (tokens, _, _) = small_llama(device=device), batch(device)
    cache = llama.KVCache(SMALL, 3, 64, device=device)
    with torch.no_grad():
        whole, parts = model(tokens), []
        parts.append(model(tokens[:, :7], cache=cache))
        cache.lengths[:2] += 7
        for t in range(7, 20):
            parts.append(model(tokens[:, t : t + 1], cache=cache))
            cache.lengths[:2] += 1
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, :20], rtol=1e-4, atol=1e-4)


def test_llama_with_kernels_over_the_cache(run):
    run(check_cache)


def check_no_gradient_is_wasted(device="cpu"):
    """Without gradients, or with weights that need none, the loss is the same."""
    model, (tokens, targets, doc_start) = small_llama(device=device), batch(device)
    with torch.no_grad():
        expected = model(tokens, targets, doc_start)
    assert not expected.requires_grad
    ops = torch.ops.octo
    wasted = AssertionError("made gradients that nobody asked for")
    with mock.patch.object(ops, "linear_nll_sum", side_effect=wasted):
        with torch.no_grad():
            total, nll = model(tokens, targets, doc_start, reduction="sum")
        assert torch.equal(nll, expected)
        for p in model.parameters():
            p.requires_grad_(False)
        total, nll = model(tokens, targets, doc_start, reduction="sum")
        assert torch.equal(nll, expected) and not total.requires_grad


def test_llama_with_kernels_without_gradients(run):
    run(check_no_gradient_is_wasted)


def small_llama_on_ranks(dtype, world=None) -> Llama:
    """In bf16 with activations computed again in the backward, as for large models; sharded over ranks."""

    model = midtrain.add_options(small_llama(), compile=False, checkpointing=dtype == BF16)
    return midtrain.apply_fsdp(model, world or midtrain.World(), dtype)


def fsdp_rank(path: str) -> None:
    """One of two ranks: the small Llama in FSDP2 shards, a row of the batch; writes gathered gradients."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    world, results = midtrain.World(rank, 2), []
    for dtype, reduction in ((FP32, "sum"), (BF16, "none")):
        model = small_llama_on_ranks(dtype, world)
        tokens, targets, doc_start = (x[rank : rank + 1] for x in batch())
        out = model(tokens, targets, doc_start, reduction=reduction)
        nll, loss = (out, out.sum()) if reduction == "none" else out[::-1]
        (loss * 2).backward()  # FSDP2 averages over ranks
        results.append((nll.detach(), [p.grad.full_tensor() for p in model.parameters()]))
    if rank == 0:
        torch.save(results, f"{path}/result.pt")
    dist.barrier()


def test_kernels_under_fsdp2(tmp_path, interpreted):
    """Two ranks, interpreter: the gradients of one process without kernels, in fp32 and, roughly, in bf16."""
    interpreted(processes.launch, 2, fsdp_rank, str(tmp_path))
    for dtype, (nll, gradients) in zip((FP32, BF16), torch.load(tmp_path / "result.pt")):
        exact, expected = losses_and_gradients(small_llama(), "sum")
        near(nll, exact[:1].double(), 1e-5 if dtype == FP32 else 0.02, "nll")
        for a, b in zip(gradients, expected):
            near(a, b.double(), 1e-4 if dtype == FP32 else 0.1, "a gradient")


def stub_driver() -> None:
    """torch.compile reads the kernels' intermediate code to see what they write; Triton must know a chip."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)

    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(Driver())


def check_compile(chunk):
    """One graph forward and one backward for the whole model, with every kernel in them and no break."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.testing import CompileCounter
    from torch._functorch.partitioners import min_cut_rematerialization_partition as min_cut
    from torch._subclasses import FakeTensorMode

    stub_driver()
    graphs, counter = [], CompileCounter()

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut)
    with torch.device("meta"):
        model = Llama(SMALL)
    with FakeTensorMode(), mock.patch.object(llama, "CHUNK_NUMBERS", chunk):
        for module in model.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape)) if p is not None else None
            module._buffers.update({name: torch.empty(b.shape) for name, b in module._buffers.items()})
        tokens, targets, doc_start = (torch.empty(2, 50, dtype=torch.int64) for _ in range(3))
        for reduction in ("none", "sum"):
            compiled = torch.compile(partial(model, reduction=reduction), fullgraph=True, backend=backend)
            out = compiled(tokens, targets, doc_start, 0.7)
            (out if reduction == "none" else out[0]).sum().backward()
            graphs.append(None)
        again = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(3):
            again(tokens, targets, torch.empty_like(doc_start))
    assert counter.frame_count == 1
    return [g and [sum("triton_kernel" in t for t in g), sum("octo" in t for t in g)] for g in graphs]


@pytest.mark.parametrize("chunks", [1, 2])
def test_kernels_compile_in_one_graph(chunks, compiling):
    """2 layers: 5 norms, 2 attentions with two kernels in the backward; one each way per chunk of logits.

    (In the backward without "sum" chunks are of words, and 61 words are one.)
    """
    graphs = compiling(check_compile, 61 * 64 if chunks == 2 else 1 << 28)
    assert graphs == [[7 + chunks, 0], [10, 0], None, [7 + 2 * chunks, 0], [9, 0], None]


class NoKernel:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of all tensors that exist now, and at most; also those inside the registered operators."""

    now = peak = 0

    def __init__(self):
        super().__init__()
        names = ("rms_norm", "rms_norm_grad", "attention", "attention_grad", "linear_nll_sum")
        ops = (getattr(llama, "_" + name) for name in names)
        self.inside, self.alive = {op._qualname: op._init_fn for op in ops}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if inside := self.inside.get(func._schema.name):
            with self:
                return inside(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            memory = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if memory is not None and memory._cdata not in self.alive:
                weakref.finalize(memory, self.end, memory._cdata, memory.nbytes())
                self.alive.add(memory._cdata)
                self.now += memory.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def end(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def check_plan(preset, micro_batch, again, accumulated):
    """Bytes of a step of the real shape, with empty tensors and kernels that do nothing, and planned."""
    from torch._subclasses import FakeTensorMode

    config, args = llama.PRESETS[preset], SimpleNamespace(replicate=1, activation_checkpointing=False)
    args.micro_batch, args.batch, args.seq_len = micro_batch, micro_batch * (1 + accumulated), 8192
    no_kernels = mock.patch.object(llama, "_wrap", lambda kernel: NoKernel())
    with no_kernels, FakeTensorMode(), Live() as live:
        model = midtrain.add_options(Llama(config), compile=False, checkpointing=again)
        model.compute_dtype, weights = BF16, live.now
        tokens = torch.zeros(micro_batch, 8192, dtype=torch.int64)
        for _ in range(1 + accumulated):
            live.peak = live.now
            model(tokens, tokens, tokens, reduction="sum")[0].backward()
    return live.peak + 2 * weights, midtrain.memory_plan(config, args, "bf16", 1, again)["peak"]


@pytest.mark.parametrize(
    "preset, micro_batch, again, accumulated",
    [("1b", 4, 0, True), ("1b", 4, 16, False), ("1b", 4, 10, True)],
)
def test_a_step_takes_the_memory_that_is_planned(preset, micro_batch, again, accumulated, compiling):
    needed, planned = compiling(check_plan, preset, micro_batch, again, accumulated)
    assert 0.99 * needed < planned < 1.05 * needed, (needed / 2**30, planned / 2**30)


def check_opcheck():
    """torch's checks: schema (no aliasing, no hidden mutation), autograd registration, shapes of fakes."""
    from torch._subclasses import FakeTensor
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def unless_fake(self, *args, **kwargs):  # the interpreter would run on tensors without data
        if not any(isinstance(a, FakeTensor) for a in args):
            return launch(self, *args, **kwargs)

    ops = torch.ops.octo
    x, w = guarded(6, 40), guarded(40)
    q, k = guarded(2, 20, 4, 16), guarded(2, 20, 2, 16)
    starts, targets = documents([[20], [7, 13]]), torch.tensor([0, 5, -1, 2, 3, 10])
    grad = [t.clone().requires_grad_() for t in (x, x, w, q, k, k)]
    rms, att = ops.rms_norm(x, x, w, 1e-5), ops.attention(q, k, k.clone(), starts)
    pool, table = guarded(3, 2, 16, 16), torch.tensor([[0, 2], [1, 1]], dtype=torch.int32)
    embed = guarded(11, 40, seed=5)
    nll = ops.linear_nll(x, embed, targets, 1.0)
    cases = [
        (ops.rms_norm, (grad[0], grad[1], grad[2], 1e-5)),
        (ops.rms_norm, (grad[0], None, grad[2], 1e-5)),
        (ops.rms_norm_backward, (x, x, rms[1], rms[2], w)),
        (ops.rms_norm_backward, (x, None, rms[1], rms[2], w)),
        (ops.attention, (grad[3], grad[4], grad[5], starts)),
        (ops.attention_backward, (q, k, k.clone(), starts, *att, q.clone())),
        (ops.decode_attention, (q[:, 0], pool, pool.clone(), table, torch.tensor([20, 3]))),
        (ops.rope_to_cache, (q[:, 0], k[:, 0], k[:, 1], x[:2, :16], x[2:4, :16], pool, pool.clone(), table,
                             torch.tensor([20, 3]))),
        (ops.linear_nll, (grad[0], embed.clone().requires_grad_(), targets, 0.7)),
        (ops.linear_nll_backward, (x, embed, targets, nll[1], nll[0].clone(), 0.7)),
        (ops.linear_nll_sum, (grad[0], embed.clone().requires_grad_(), targets, 0.7)),
    ]
    with mock.patch.object(GridExecutor, "__call__", unless_fake):
        for op, args in cases:
            checks = ("test_schema", "test_autograd_registration", "test_faketensor")
            torch.library.opcheck(op.default, args, test_utils=checks)


def test_kernels_pass_opcheck(interpreted):
    interpreted(check_opcheck)


def check_opcheck_of_tracing():
    """opcheck's fourth check: traced with symbolic shapes. Launches do nothing: no numbers are compared."""
    import triton

    stub_driver()
    ops = torch.ops.octo
    shapes = (6, 40), (40,), (2, 20, 4, 16), (2, 20, 2, 16), (11, 40)
    x, w, q, k, embed = (torch.randn(*s, requires_grad=True) for s in shapes)
    targets, pool = torch.tensor([0, 5, -1, 2, 3, 10]), torch.randn(3, 2, 16, 16)
    table = torch.tensor([[0, 2], [1, 1]], dtype=torch.int32)
    cases = [
        (ops.rms_norm, (x, None, w, 1e-5)),
        (ops.rms_norm, (x, x.detach().clone(), w, 1e-5)),
        (ops.attention, (q, k, k.detach().clone(), documents([[20], [7, 13]]))),
        (ops.decode_attention, (q.detach()[:, 0], pool, pool.clone(), table, torch.tensor([20, 3]))),
        (ops.linear_nll, (x, embed, targets, 0.7)),
        (ops.linear_nll_sum, (x, embed, targets, 0.7)),
    ]
    launch = mock.patch.object(triton.runtime.JITFunction, "run", lambda *args, **kwargs: None)
    with launch, mock.patch.object(torch.testing, "assert_close"):
        for op, args in cases:
            torch.library.opcheck(op.default, args, test_utils=("test_aot_dispatch_dynamic",))


def test_kernels_pass_opcheck_of_tracing(compiling):
    compiling(check_opcheck_of_tracing)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_pass_opcheck_on_the_card():
    """All four checks, with the kernels that torch.compile traced really run."""
    shapes = (6, 40), (40,), (2, 20, 4, 16), (2, 20, 2, 16), (11, 40)
    x, w, q, k, embed = (torch.randn(*s, device="cuda", requires_grad=True) for s in shapes)
    ops, targets = torch.ops.octo, torch.tensor([0, 5, -1, 2, 3, 10], device="cuda")
    for op, args in (
        (ops.attention, (q, k, k.detach().clone(), documents([[20], [7, 13]], "cuda"))),
        (ops.rms_norm, (x, None, w, 1e-5)),
        (ops.rms_norm, (x, x.detach().clone(), w, 1e-5)),
        (ops.linear_nll, (x, embed, targets, 0.7)),
        (ops.linear_nll_sum, (x, embed, targets, 0.7)),
    ):
        torch.library.opcheck(op.default, args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_other_documents_compile_nothing_on_the_card():
    model = small_llama(device="cuda")
    kernels = [getattr(llama, f"_attention_{name}") for name in ("forward", "dq", "dkdv")]
    tokens, targets, _ = batch("cuda")
    counts = []
    for lengths in ([[50], [50]], [[1, 49], [25, 25]], [[10] * 5, [7, 43]]):
        model(tokens, targets, documents(lengths, "cuda"), reduction="sum")[0].backward()
        counts.append([sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels])
    assert counts[0] == counts[1] == counts[2]


# ------------------------------------------------------------------------------------------------------------
# Compiled for chips that are not here


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_kernels_compiled_for(capability, compiling):
    """The tiles that are used: no spills on Hopper, at most 64 bytes elsewhere, tensor cores, no fp64 code.

    Ampere, Hopper, Blackwell, and sm_120, a consumer's Blackwell with 100 KB of shared memory. (Triton 3.6
    keeps 8 bytes of one kernel on Hopper's stack, read and written outside its loops.)
    """
    failures = compiling(compile_all, capability)
    assert not failures, "\n".join(failures)


def compile_all(capability: int) -> list[str]:
    import triton

    failures, hopper = [], capability == 90  # for the others shapes of real models only: a second each
    head_dims, widths = (llama.HEAD_DIMS, (128, 2048, 3072, 4096)) if hopper else ((64, 128), (4096,))
    for name, *job in tools.attention_jobs(capability, head_dims=head_dims) + tools.other_jobs(widths=widths):
        found = tools.resources(tools.compile_for(capability, *job))
        matrix = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}[capability]
        matrix = "HMMA" if "decode" in name else matrix  # 16 queries at most: too few for wide instructions
        wants_matrix = "attention" in name or ("decode" in name and "merge" not in name)
        if found["spilled"] > ((8 if triton.__version__ < "3.7" else 0) if hopper else 64):
            failures.append(f"{name} spills {found['spilled']} bytes")
        if found["shared"] > tools.SHARED_LIMIT[capability]:
            failures.append(f"{name} needs {found['shared']} bytes of shared memory")
        if wants_matrix != (matrix in found["matrix"]):
            failures.append(f"{name} has matrix instructions {found['matrix']}")
        if found["fp64"]:
            failures.append(f"{name} has fp64 instructions {found['fp64']}")
    return failures


def compile_ones() -> None:
    """Triton makes a constant of an integer that is 1: one token, one row, one block, blocks of one token."""
    for _, *job in tools.attention_jobs(90, head_dims=(64,)) + tools.other_jobs(widths=(4096,)):
        tools.compile_for(90, *job, ones=True)


def test_kernels_compiled_for_sizes_of_one(compiling):
    compiling(compile_ones)


def check_fp64_temperature() -> list[str]:
    """Under torch.compile a Python float arrives in fp64: it is converted, nothing is computed in fp64."""
    kernels = (llama._nll_forward, llama._nll_backward)
    jobs = [job for job in tools.other_jobs(widths=()) if job[1] in kernels]
    found = [tools.resources(tools.compile_for(90, *job, scalar="fp64")) for _, *job in jobs]
    return [word for r in found for word in r["fp64"]]


def test_nll_kernels_compute_nothing_in_fp64(compiling):
    assert compiling(check_fp64_temperature) == []


def test_without_triton_everything_but_the_kernels_runs():
    code = """
import sys
sys.modules["triton"] = None
import torch, model
llama = model.Llama(model.LlamaConfig(11, 1, 16, 2, 1, 8, 16)).init_weights(0)
tokens = torch.arange(10)[None]
llama(tokens, tokens).sum().backward()
assert not model.KERNEL_DEVICES and not model.has_kernels(tokens)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(os.path.dirname(__file__)))

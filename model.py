"""A Llama in plain PyTorch, with Triton kernels for GPUs: Llama 3.1 / 3.2 as published, and small ones of the same kind.

Read it top to bottom: the configuration and its presets, RMSNorm, rotary embedding, attention over packed documents (and
over a KV cache), the block, the model; then the kernels; then checkpoints in Hugging Face's layout. What has a kernel is
written out in plain PyTorch first, which is what a CPU runs: whoever does not care for Triton can skip to the checkpoints.
The choices that matter:

1. Packed documents. A row of tokens holds several documents; `doc_start` (B, T) says for each token where its document
   begins in the row. Attention never looks before it, and positions count from it. A fixed-shape tensor, so that nothing
   recompiles when the lengths change.
2. Weights stay in fp32 and are cast where they are used: `compute_dtype` decides what the activations run in. Under FSDP2
   with a bf16 policy the weights arrive in bf16 already and the cast does nothing.
3. The loss is computed inside `forward`, in chunks of tokens, so that the (tokens x vocabulary) logits of a 128,256-word
   vocabulary never exist at once. Its unit is one number a token: the caller decides what to average over.
4. Four operations have kernels: RMSNorm with the residual added, attention, attention of one new token over the KV
   cache, and the output projection with cross-entropy. On a GPU they are called in place of the references, with no
   switch to turn.
5. Nothing here knows about GPUs, ranks or optimizers: parallelism is applied from outside (midtrain.py).
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.library import triton_op, wrap_triton
from torch.utils.checkpoint import checkpoint

from data.files import read_json

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the plain PyTorch is all there is, and the kernels are functions nobody calls
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

# ---------------------------------------------------------------------------------------------------------------------
# Configuration and presets


_SIZES = ("vocab_size", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama. Names are Hugging Face's where they have one, `num_layers` for its num_hidden_layers."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int  # each serves num_heads / num_kv_heads query heads (GQA)
    head_dim: int
    intermediate_size: int  # width inside the MLP
    rope_theta: float = 500_000.0
    rope_scaling: dict | None = None  # Llama 3's, see rope_frequencies()
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the output projection is the embedding matrix
    max_position: int = 8192  # what the model was made for; nothing here stops at it
    qkv_bias: bool = False  # Qwen 2 and 2.5, with whom the recipe compares: otherwise they are Llamas

    def __post_init__(self):
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, not a number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")

    def num_params(self) -> int:
        """Parameters, an output projection tied to the embedding counted once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        layer += self.qkv_bias * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


def _llama3_scaling(factor: float) -> dict:
    return {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


# "tiny" and "small" are ours, their vocabulary is replaced by the tokenizer's; the others are Meta's published shapes.
PRESETS = {
    "tiny": LlamaConfig(1024, 4, 128, 4, 2, 32, 352, rope_theta=10_000.0, max_position=512),
    "small": LlamaConfig(8192, 8, 512, 8, 4, 64, 1408, max_position=2048),
    "1b": LlamaConfig(128_256, 16, 2048, 32, 8, 64, 8192, rope_scaling=_llama3_scaling(32.0), max_position=131_072),
    "3b": LlamaConfig(128_256, 28, 3072, 24, 8, 128, 8192, rope_scaling=_llama3_scaling(32.0), max_position=131_072),
    "8b": LlamaConfig(
        128_256, 32, 4096, 32, 8, 128, 14_336,
        rope_scaling=_llama3_scaling(8.0), tie_embeddings=False, max_position=131_072,
    ),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Layers


class Linear(nn.Linear):
    """A linear map whose weight (and bias, if it has one) is cast to the activations' dtype where it is used."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def has_kernels(x: Tensor) -> bool:
    """Whether the operations on x are those of the kernels further down."""
    return x.device.type in KERNEL_DEVICES and x.dtype != torch.float64


KERNEL_DEVICES = {"cuda"} if triton else set()  # empty it to run the plain PyTorch on a GPU


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(s), s) of s = x + residual, or of s = x without one; shapes and dtype of x.

    norm(s) = s / sqrt(mean(s^2) + eps) * weight over the last axis (Zhang & Sennrich 2019), statistics in fp32.
    """
    assert residual is None or residual.dtype == x.dtype, f"x is {x.dtype}, the residual {residual.dtype}"
    if has_kernels(x):
        y, s, _ = torch.ops.octo.rms_norm(x, residual, weight, eps)
        return y, x if residual is None else s
    s = x if residual is None else residual + x
    if s.device.type == "cpu":
        return (_RMSNorm.apply(s, weight, eps) if torch.is_grad_enabled() else _normalized(s, weight, eps)[0]), s
    return F.rms_norm(s.float(), (s.shape[-1],), weight.float(), eps).to(s.dtype), s


def _normalized(s: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """norm(s), and in fp32 norm(s) without the weight and what s was multiplied by, (..., 1)."""
    x = s if s.dtype == torch.float64 else s.float()
    inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    n = x * inverse
    return (n * weight).to(s.dtype), n, inverse


class _RMSNorm(torch.autograd.Function):
    """norm(s) on a CPU: with a backward by hand it takes half the passes over s that PyTorch's takes."""

    @staticmethod
    def forward(ctx, s, weight, eps):
        out, n, inverse = _normalized(s, weight, eps)
        ctx.save_for_backward(n, inverse, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        n, inverse, weight = ctx.saved_tensors
        along = dy * n
        dw = along.flatten(0, -2).sum(0)
        dy_w = dy * weight.to(n.dtype)
        mean = (along @ weight.to(n.dtype)).div_(n.shape[-1]).unsqueeze(-1)
        # s = n / inverse, and n's length is fixed: what dy has along n is taken out of it
        return dy_w.addcmul_(n, mean, value=-1).mul_(inverse).to(dy.dtype), dw.to(weight.dtype), None


class RMSNorm(nn.Module):
    """The layer's weight around rms_norm()."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rms_norm(x, residual, self.weight, self.eps)


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Inverse frequencies (head_dim / 2,) in fp32: theta^(-2i/d), with Llama 3's scaling of the slow ones.

    Llama 3.1 stretches its context by slowing the low frequencies by `factor`: wavelengths longer than
    original / low_freq_factor are slowed, those shorter than original / high_freq_factor are kept, and those between are
    blended linearly in original / wavelength.
    """
    inv_freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if config.rope_scaling is None:
        return inv_freq
    s = config.rope_scaling
    turns = s["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # full turns within the original context
    keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    keep = keep.clamp(0.0, 1.0)
    return keep * inv_freq + (1 - keep) * inv_freq / s["factor"]


def rope_tables(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, cos) and (-sin, sin) of the angles, each (B, T, 1, head_dim); fp32: in bf16, positions past 256 would collide."""
    angles = positions[:, :, None, None].float() * inv_freq  # (B, T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x[i], x[i + D/2]) of x (B, T, H, D) by their angles: the half-split layout of Hugging Face."""
    if x.device.type == "cpu":
        return _Rope.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin)
    x32 = x.float()
    return (x32 * cos + x32.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, way: int = 1) -> Tensor:
    x32 = x.float()
    return (x32 * cos).addcmul_(x32.roll(x.shape[-1] // 2, -1), sin, value=way).to(x.dtype)


class _Rope(torch.autograd.Function):
    """apply_rope() on a CPU; its backward turns by the same angles the other way."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _turned(dy, *ctx.saved_tensors, way=-1), None, None


# ---------------------------------------------------------------------------------------------------------------------
# Attention: over packed documents (training) and over a KV cache (sampling)


def document_mask(doc_start: Tensor, dtype: torch.dtype, prefix: Tensor | None = None) -> Tensor:
    """Added to attention scores, (B, 1, T, T): 0 where token i sees j and -inf elsewhere.

    i sees j if doc_start[i] <= j <= i, or j < prefix (B,): the tokens that all documents of a row go on from.
    """
    j = torch.arange(doc_start.shape[1], device=doc_start.device)
    hidden = j < doc_start[:, :, None]
    if prefix is not None:
        hidden &= j >= prefix[:, None, None]
    hidden |= j > j[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None]


def attention(q, k, v, doc_start: Tensor | None, mask: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention inside documents. q (B, T, H, D), k and v (B, T, K, D) → (B, T, H, D).

    doc_start (B, T), which never falls along a row, or None for one document a row; prefix (B,): how many tokens at the
    start of a row all its documents see, none if not given; `mask`: their document_mask(), which all layers share.
    """
    B, T, H, D = q.shape
    if has_attention_kernel(q) and prefix is None:
        starts = q.new_zeros(B, T, dtype=torch.int32) if doc_start is None else doc_start
        return torch.ops.octo.attention(q, k, v, starts)[0]
    if mask is None and doc_start is not None:
        mask = document_mask(doc_start, q.dtype, prefix)
    # On longer rows its probabilities would take too much memory, and a compiler cannot follow where documents begin.
    if mask is not None and q.device.type == "cpu" and T <= LONGEST_BLOCKED and not torch.compiler.is_compiling():
        common = 0 if prefix is None else int(prefix.max())
        return _BlockAttention.apply(q, k, v, mask, doc_start[:, ::QUERIES].amin(0).tolist(), common)
    k, v = (x.repeat_interleave(H // k.shape[2], dim=2).transpose(1, 2) for x in (k, v))  # (B, H, T, D)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2)


QUERIES, LONGEST_BLOCKED = 64, 2048  # in a block, on a CPU; the longest row that goes by blocks


class _BlockAttention(torch.autograd.Function):
    """attention() on a CPU: a block of QUERIES at a time, against no other keys than those between the first that one of
    them sees and the last, and the row's common prefix. torch's fused kernel visits all keys where there is a mask, and was
    measured to take 1.5 to 10 times as long, forward and backward. The query heads of one KV head are rows of the same
    product: t * G + g. In bf16 scores and probabilities are rounded, which that kernel does not do: up to four times
    its error where attention is sharp.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, first, common):
        B, T, H, D = q.shape
        K, G = k.shape[2], H // k.shape[2]
        grouped = q.view(B, T, K, G, D).permute(0, 2, 1, 3, 4)
        q = torch.mul(grouped, D**-0.5, out=q.new_empty(grouped.shape)).view(B * K, T * G, D)
        k, v = (x.transpose(1, 2).reshape(B * K, T, D) for x in (k, v))
        out, probs = torch.empty_like(q), []
        for begin, end, keys in _key_ranges(T, first, common):
            rows = slice(begin * G, end * G)
            scores = _join([q[:, rows] @ k[:, one].mT for one in keys])
            seen = _join([mask[:, :, begin:end, None, one] for one in keys])
            scores.view(B, K, end - begin, G, -1).add_(seen)
            probs.append(scores.softmax(-1))
            torch.bmm(probs[-1], _join([v[:, one] for one in keys], 1), out=out[:, rows])
        ctx.save_for_backward(q, k, v, *probs)
        ctx.where, ctx.shape = (T, first, common), (B, T, K, G, D)
        return out.view(B, K, T, G, D).transpose(1, 2).reshape(B, T, H, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        B, T, K, G, D = ctx.shape
        q, k, v, *probs = ctx.saved_tensors
        do = do.reshape(B, T, K, G, D).transpose(1, 2).reshape(B * K, T * G, D)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (begin, end, keys), p in zip(_key_ranges(*ctx.where), probs, strict=True):
            rows = slice(begin * G, end * G)
            dp = _join([do[:, rows] @ v[:, one].mT for one in keys])
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - sum(p * dp))
            torch.bmm(ds, _join([k[:, one] for one in keys], 1), out=dq[:, rows])
            sizes = [one.stop - one.start for one in keys]
            for one, p_one, ds_one in zip(keys, p.split(sizes, -1), ds.split(sizes, -1)):
                dv[:, one].baddbmm_(p_one.mT, do[:, rows])
                dk[:, one].baddbmm_(ds_one.mT, q[:, rows])
        dq = dq.mul_(D**-0.5).view(B, K, T, G, D).transpose(1, 2).reshape(B, T, K * G, D)
        return dq, *(x.view(B, K, T, D).transpose(1, 2) for x in (dk, dv)), None, None, None


def _key_ranges(T: int, first: list[int], common: int):
    """For each block of queries: where it begins and ends, and the one or two ranges of keys that it may see."""
    for begin, low in zip(range(0, T, QUERIES), first, strict=True):
        end = min(begin + QUERIES, T)
        yield (
            begin,
            end,
            [slice(0, common), slice(low, end)] if 0 < common < low else [slice(0 if common else low, end)],
        )


def _join(parts: list[Tensor], dim: int = -1) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


HEAD_DIMS = (16, 32, 64, 128)  # that the attention kernels have tiles for; others get the plain PyTorch


def has_attention_kernel(x: Tensor) -> bool:
    """Whether attention on heads x (.., head_dim) has a kernel."""
    return has_kernels(x) and x.shape[-1] in HEAD_DIMS


class KVCache:
    """Keys and values of past tokens: a pool of blocks and, for each slot, the blocks that hold its sequence, in order.

    k, v: (num_layers, blocks, num_kv_heads, block_len, head_dim); table: (slots, n) int32; lengths: (slots,) int64, the
    tokens present in each slot. A forward with a cache takes tokens (B, T) as the continuation of slots 0..B-1 and writes
    their keys and values behind what is there. It does not advance `lengths`: the caller adds the true lengths, and right
    padding is never seen again.

    Without block_len, slot b is block b, as long as a row may be: attention reads it in place, which is best on a CPU.
    With it (a pool of `blocks`, paged as in vLLM, Kwon et al. 2023) the owner fills in the table: rows take no more
    than they need and may share the blocks of a common prompt. Then forwards are of one token a slot.
    """

    def __init__(
        self, config, slots: int, max_len: int, dtype=torch.float32, device="cpu", block_len=None, blocks=None
    ):
        self.paged, self.block_len = block_len is not None, block_len or max_len
        n = -(-max_len // self.block_len)
        shape = (config.num_layers, blocks or slots * n, config.num_kv_heads, self.block_len, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        own = torch.arange(slots, dtype=torch.int32, device=device)[:, None]
        self.table = torch.zeros(slots, n, dtype=torch.int32, device=device) if self.paged else own
        self.max_len = n * self.block_len

    def copy(self, source: "KVCache", src: int, start: int, stop: int, block: int) -> None:
        """Tokens start..stop-1 of block `src` of `source` become the first of `block`."""
        for mine, theirs in ((self.k, source.k), (self.v, source.v)):
            mine[:, block, :, : stop - start] = theirs[:, src, :, start:stop].to(mine.device)

    def read(self, blocks: list[int], length: int) -> tuple[Tensor, Tensor]:
        """The first `length` tokens in these blocks, as keys and values (num_layers, num_kv_heads, length, head_dim)."""
        return tuple(x[:, blocks].transpose(1, 2).flatten(2, 3)[:, :, :length] for x in (self.k, self.v))

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v (B, T, K, D) of slots 0..B-1 at positions (B, T)."""
        blocks = torch.arange(positions.shape[0], device=positions.device)[:, None]
        if self.paged:
            blocks, positions = self.table[blocks, positions // self.block_len].long(), positions % self.block_len
        self.k[layer][blocks, :, positions] = k.to(self.k.dtype)
        self.v[layer][blocks, :, positions] = v.to(self.v.dtype)


def cached_attention(q: Tensor, cache: KVCache, layer: int, mask: Tensor | None) -> Tensor:
    """Attention of q (B, T, H, D) to slots 0..B-1 of the cache; mask (B, 1, T, max_len) is added → (B, T, H, D).

    The query heads of one KV head are rows of one matrix product, so that the cache is read once for all of them. It is
    read as far as it is allocated: on a CPU, bf16 products of whole matrices take a third of the time of those of slices.
    """
    B, T, H, D = q.shape
    if T == 1 and (cache.paged or has_attention_kernel(q)):
        lengths = cache.lengths[:B] + 1  # with the token that was just written
        return decode_attention(q[:, 0], cache.k[layer], cache.v[layer], cache.table[:B], lengths)[:, None]
    assert not cache.paged, "a paged cache is read one token a slot; compute prompts in a dense one"
    k, v = cache.k[layer, :B], cache.v[layer, :B]  # (B, K, L, D)
    K, L = k.shape[1:3]
    q = (q * D**-0.5).view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)  # (B, K, G*T, D)
    scores = (q @ k.transpose(2, 3)).view(B, K, H // K, T, L).add_(mask[:, :, None])
    probs = scores.softmax(-1).view(B, K, -1, L)
    return (probs @ v).view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one query a row, q (R, H, D), to the row's first `lengths` (R,) tokens in a paged cache → (R, H, D).

    k, v: pools of blocks (blocks, K, block_len, D); table (R, n): the blocks of each row, in order. Entries of the table
    past a row's length are not read, nor are tokens past it. A row of length 0 gives 0. The kernel has no backward.
    """
    if has_attention_kernel(q):
        return torch.ops.octo.decode_attention(q, k, v, table, lengths)
    R, H, D = q.shape
    K, L = k.shape[1], table.shape[1] * k.shape[2]
    seen = torch.arange(L, device=q.device) < lengths[:, None]  # (R, L)
    table = table.long().where(seen[:, :: k.shape[2]], 0)
    k, v = (x[table].transpose(1, 2).reshape(R, K, L, D) for x in (k, v))
    k, v = (x.masked_fill(~seen[:, None, :, None], 0.0) for x in (k, v))
    scores = (q.view(R, K, H // K, D) * D**-0.5) @ k.transpose(2, 3)  # (R, K, G, L)
    probs = scores.float().masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return (probs.to(v.dtype) @ v).view(R, H, D)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.hidden_size, config.num_heads * config.head_dim, config.qkv_bias)
        self.k = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, config.qkv_bias)
        self.v = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, config.qkv_bias)
        self.o = Linear(config.num_heads * config.head_dim, config.hidden_size)

    def forward(self, x, where, layer):
        rope, doc_start, mask, prefix, positions, cache = where
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.q, self.k, self.v))  # (B, T, H or K, D)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is None:
            out = attention(q, k, v, doc_start, mask, prefix)
        else:
            cache.write(layer, positions, k, v)
            out = cached_attention(q, cache, layer, mask)
        return self.o(out.flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = Linear(config.hidden_size, config.intermediate_size)
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class AttentionContext(NamedTuple):
    """What every layer needs to know about the tokens of a forward pass, made once for all of them."""

    rope: tuple[Tensor, Tensor]  # cos and sin of each token's angles
    doc_start: Tensor | None  # (B, T)
    mask: Tensor | None  # the document_mask() of it, where no kernel does without
    prefix: Tensor | None  # (B,): tokens at the start of a row that all its documents go on from
    positions: Tensor  # (B, T): where the tokens go in the cache
    cache: KVCache | None


class Block(nn.Module):
    """Pre-norm residual block: s += attention(norm(s)), then s += mlp(norm(s)), s being the residual stream.

    The MLP's output is not added here: it is handed to the next block beside the residual, whose norm adds it as it reads
    it. (B, T, hidden) twice in, the residual None in the first block, and twice out.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, residual: Tensor | None, where: AttentionContext, layer: int) -> tuple[Tensor, Tensor]:
        x, residual = self.attn_norm(x, residual)
        x, residual = self.mlp_norm(self.attn(x, where, layer), residual)
        return self.mlp(x), residual


class Llama(nn.Module):
    """The model. `compute_dtype` is what activations run in (weights keep their own dtype); fp32 unless set."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)
        # Not saved: it follows from the configuration. A model built on the meta device must call init_rope() after.
        self.register_buffer("inv_freq", rope_frequencies(config), persistent=False)

    def init_rope(self) -> None:
        self.inv_freq = rope_frequencies(self.config).to(self.embed.weight.device)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Normal(0, 1 / sqrt(fan-in)), the two projections back into the residual stream divided by sqrt(2 layers).

        At width 128 GPT-2's fixed 0.02 starts attention so flat that copying is learned later (README, lab log).
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = p.shape[1] ** -0.5  # the embedding too: as the output projection its fan-in is the width
            if name.endswith(("o.weight", "down.weight")):
                std /= math.sqrt(2 * self.config.num_layers)
            assign(p, torch.randn(p.shape, generator=generator) * std)
        return self

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        doc_start: Tensor | None = None,
        temperature: float = 1.0,
        cache: KVCache | None = None,
        reduction: str = "none",
        prefix: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens (B, T) int64 → logits (B, T, vocab) in fp32; with targets (B, T) → negative log-likelihoods (B, T) in fp32.

        The likelihoods are of logits / temperature; targets below 0 are ignored and give 0. doc_start (B, T) holds the
        index, within the row, of the first token of each token's document; None means one document a row. prefix (B,): so
        many tokens at the start of a row belong to all documents behind them, which see them and count positions on from
        them; with it attention goes without the kernel. With reduction "sum" → (their sum (), all of them (B, T) without
        gradient): on a GPU that saves one of four products with the vocabulary.
        """
        h = self.hidden(tokens, doc_start, cache, prefix)
        return self.logits(h) if targets is None else self.nll(h, targets, temperature, reduction)

    def hidden(
        self, tokens: Tensor, doc_start: Tensor | None = None, cache=None, prefix: Tensor | None = None
    ) -> Tensor:
        """tokens (B, T) → the last layer's normalised activations (B, T, hidden), in compute_dtype."""
        B, T = tokens.shape
        x, residual = self.embed(tokens).to(self.compute_dtype), None
        positions, mask = torch.arange(T, device=tokens.device).expand(B, T), None
        kernel = has_kernels(x) and self.config.head_dim in HEAD_DIMS  # which needs no mask
        if cache is not None:
            assert doc_start is None, "a cache holds one document a slot"
            positions = positions + cache.lengths[:B, None]
            if T > 1 or not (kernel or cache.paged):
                unseen = torch.arange(cache.max_len, device=tokens.device) > positions[:, :, None]  # (B, T, L)
                mask = torch.zeros(unseen.shape, dtype=self.compute_dtype, device=tokens.device)
                mask = mask.masked_fill_(unseen, -torch.inf)[:, None]
        elif doc_start is not None:
            positions = positions - doc_start
            if prefix is not None:
                positions = positions + prefix[:, None] * (doc_start > 0)
            mask = None if kernel and prefix is None else document_mask(doc_start, self.compute_dtype, prefix)
        assert prefix is None or doc_start is not None, "a prefix is followed by documents: give doc_start"
        where = AttentionContext(rope_tables(self.inv_freq, positions), doc_start, mask, prefix, positions, cache)
        for layer, block in enumerate(self.blocks):
            x, residual = block(x, residual, where, layer)
        return self.norm(x, residual)[0]

    def output_weight(self, dtype: torch.dtype) -> Tensor:
        """The output projection (vocab, hidden), tied or not."""
        return (self.embed.weight if self.head is None else self.head.weight).to(dtype)

    def logits(self, h: Tensor) -> Tensor:
        """Activations (..., hidden) → logits (..., vocab) in fp32."""
        return F.linear(h, self.output_weight(h.dtype)).float()

    def nll(self, h: Tensor, targets: Tensor, temperature: float = 1.0, reduction: str = "none"):
        """-log softmax(logits / temperature)[target] for each token: h (B, T, hidden), targets (B, T) → (B, T) fp32.

        Above LOGITS_BUDGET numbers the logits are made chunk by chunk and again in the backward pass, never all at once.
        With reduction "sum": (their sum, each of them without gradient).
        """
        assert reduction in ("none", "sum"), f'reduction "{reduction}"; valid: none, sum'
        if has_kernels(h):
            return fused_nll(h.flatten(0, 1), self.output_weight(h.dtype), targets, temperature, reduction)
        nll = self._nll_reference(h, targets, temperature)
        return nll if reduction == "none" else (nll.sum(), nll.detach())

    def _nll_reference(self, h: Tensor, targets: Tensor, temperature: float) -> Tensor:
        h, flat = h.flatten(0, 1), targets.flatten()
        chunk = max(1, LOGITS_BUDGET // self.config.vocab_size)
        if len(flat) <= chunk:
            out = self._nll_chunk(h, flat, temperature)
        else:
            parts = [
                checkpoint(self._nll_chunk, a, b, temperature, use_reentrant=False)
                for a, b in zip(h.split(chunk), flat.split(chunk))
            ]
            out = torch.cat(parts)
        return out.view(targets.shape)

    def _nll_chunk(self, h: Tensor, targets: Tensor, temperature: float) -> Tensor:
        logits = self.logits(h)
        if temperature != 1.0:
            logits = logits / temperature
        if logits.device.type == "cpu":
            return _CrossEntropy.apply(logits, targets)
        return F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="none")

    @staticmethod
    def from_pretrained(path: str) -> "Llama":
        """A model from a folder with config.json and *.safetensors; weights keep the dtype they are stored in."""
        config = config_from_hf(read_json(os.path.join(path, "config.json")))
        with torch.device("meta"):
            model = Llama(config)
        model.load_state_dict(dict(read_weights(path, config)), assign=True)
        model.init_rope()
        return model

    def save_pretrained(self, path: str, state: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors in Hugging Face's layout. `state`: full tensors gathered from shards."""
        from safetensors.torch import save_file

        os.makedirs(path, exist_ok=True)
        state = self.state_dict() if state is None else state
        weights = {hf_name(k): v.detach().cpu().contiguous() for k, v in state.items()}
        save_file(weights, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        with open(os.path.join(path, "config.json"), "w") as f:
            json.dump(config_to_hf(self.config, dtype), f, indent=2)


class _CrossEntropy(torch.autograd.Function):
    """Logits (N, V) in fp32, targets (N,) → nll (N,) on a CPU, where one softmax serves forward and backward: a
    log-softmax, and exp of it later, take twice the time. -log p = largest logit - logit - log(largest probability).
    """

    @staticmethod
    def forward(ctx, logits, targets):
        probs = logits.softmax(-1)
        valid, index = targets >= 0, targets.clamp(min=0)[:, None]
        nll = logits.amax(-1) - logits.gather(1, index)[:, 0] - probs.amax(-1).log()
        nll = nll.where(valid, 0.0)
        probs.scatter_add_(1, index, probs.new_full(index.shape, -1.0))  # now the gradient: softmax - one-hot
        ctx.save_for_backward(probs, valid)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll):
        probs, valid = ctx.saved_tensors
        return probs.mul_((dnll * valid)[:, None]), None  # in place: autograd refuses to come here twice


LOGITS_BUDGET = 1 << 25  # numbers: 128 MiB in fp32, 261 tokens of Llama 3's vocabulary

# ---------------------------------------------------------------------------------------------------------------------
# The kernels (CUDA). Everything above runs without them; tests hold each equal to what it stands in for.
#
# A Triton program computes one tile of the output. What costs time is main memory: while one byte comes from there, an
# H200 does some 200 bf16 operations. So each kernel below is a way of not going there: what was loaded is used for
# everything that needs it, while it is in registers. Sums are in fp32 (but one, said where it is), in an order that depends
# on shapes alone, without atomics: the same input gives the same bits. Whatever changes from step to step (lengths of
# documents, rows in a cache) is read from tensors, so nothing is compiled twice. Tensors are those of the current device.
#
# Every kernel sits in a torch.library.triton_op: torch.compile looks into it, autograd knows its backward, and no output
# aliases an input. TRITON_INTERPRET=1 runs them on a CPU, for tests; the interpreter's bf16 arithmetic is wrong, so there
# tiles are cast to fp32 when they are loaded.

# Without a GPU the operators would never be called, and registering them takes torch a second of import time.
REGISTERED = triton and (
    torch.cuda.is_available() or "1" in (os.environ.get("TRITON_INTERPRET"), os.environ.get("OCTO_KERNELS"))
)

_jit = triton.jit if triton else lambda function: function
_op = partial(triton_op, mutates_args={}) if REGISTERED else lambda name: lambda function: function
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
if INTERPRETED:  # torch before 2.13 refuses to wrap what the interpreter runs

    def wrap_triton(kernel):
        return kernel


LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)  # the hardware's exponential is 2^x

# Tiles of attention by head_dim: (BLOCK_M queries, BLOCK_N keys, num_warps of 32 threads, num_stages of loads in flight),
# for 2 bytes a number. The first is used; `tests/bench_kernels.py --tune` times the others. They are not raced at run
# time: the winner of the day would decide how sums are rounded, and the same command would give other weights. No card has
# timed them yet. They were chosen by the compiler's report: nothing spills (a thread has 255 registers; accumulators of
# 128 x 64 numbers take 64 from each of 128 threads) and, where possible, two programs fit on a multiprocessor, so that one
# multiplies while the other takes exponentials.
TILES = {
    "forward": {
        16: [(64, 64, 4, 3)],
        32: [(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
        64: [(128, 64, 8, 3), (128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3)],
        128: [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2)],
    },
    "dq": {
        16: [(64, 64, 4, 3)],
        32: [(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
        64: [(128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)],
        128: [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3)],
    },
    "dkdv": {
        16: [(64, 64, 4, 3)],
        32: [(64, 64, 4, 3), (64, 128, 8, 3)],
        64: [(64, 128, 8, 3), (64, 64, 4, 3)],
        128: [(64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 3)],
    },
}
# Other chips than Hopper's and the large Blackwell's take operands through registers, and some have 100 KB of shared memory.
SMALL_TILES = {
    ("forward", 128): (128, 32, 8, 3), ("dq", 32): (64, 64, 4, 3), ("dq", 128): (64, 64, 4, 2), ("dkdv", 128): (64, 64, 8, 2),
}  # fmt: skip
FP32_TILE = (32, 32, 8, 2)  # exact products on the ordinary units: for tests and small models


def tile(kernel: str, head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None = None) -> dict:
    """The tile that is used, as arguments of a launch. `capability`: the GPU's, found out if not given."""
    if capability is None:
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    head_dim = int(head_dim)  # a symbol under torch.compile(dynamic=True), which is no key
    chosen = TILES[kernel][head_dim][0]
    if dtype == torch.float32:
        chosen = FP32_TILE
    elif capability[0] not in (9, 10):
        chosen = SMALL_TILES.get((kernel, head_dim), chosen)
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), chosen))


def _rows_per_program(width: int) -> dict:
    """About 4,096 numbers a program: one row of a wide model, many of a narrow one."""
    block = triton.next_power_of_2(width)
    return dict(BLOCK_R=max(1, 4096 // block), BLOCK_N=block, num_warps=4 if block < 2048 else 8)


# ------------------------------------------------------------------------------------------------------------ RMSNorm
#
# y = w x r,  r = 1 / sqrt(mean(x^2) + eps),  where x is the residual stream with a layer's output just added.
#
# Unfused, the addition reads two tensors and writes one, and the norm reads that one and writes y. Here x is still in
# registers when it is normalised: 4 tensors go through memory and not 5, nor any fp32 copy.
#
# Backward. With x' = x r, dr/dx = -r^3 x / N, so
#     dx = r (w dy - x' mean(w dy x')) + the gradient that comes down the residual stream,    dw = sum over rows of dy x'.
# r is saved, 4 bytes a row. A program takes every 264th block of rows and keeps its part of dw in registers, so x and dy
# are read once for dx and dw; the parts (programs, N) are added at the end.

RMS_PROGRAMS = (
    264  # of the backward: two on each of an H100's 132 multiprocessors. Fixed, as it decides the rounding of dw
)


@_jit
def _rms_norm_forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, rows,
    N: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_N)
    at = r.to(tl.int64)[:, None] * N + c[None, :]
    valid = (r < rows)[:, None] & (c < N)[None, :]
    x = tl.load(x_ptr + at, valid, 0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + at, valid, 0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)  # the norm is of the sum as the next layer will see it
        tl.store(sum_ptr + at, x, valid)
        x = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / N + EPS)
    w = tl.load(weight_ptr + c, c < N, 0.0).to(tl.float32)
    tl.store(y_ptr + at, (x * rstd[:, None] * w[None, :]).to(y_ptr.dtype.element_ty), valid)
    tl.store(rstd_ptr + r, rstd, r < rows)


@_jit
def _rms_norm_backward(
    dy_ptr, dsum_ptr, x_ptr, rstd_ptr, weight_ptr, dx_ptr, dw_ptr, rows,
    N: tl.constexpr, ADD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_N)
    w = tl.load(weight_ptr + c, c < N, 0.0).to(tl.float32)[None, :]
    dw = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0), num_stages=3):
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        at = r.to(tl.int64)[:, None] * N + c[None, :]
        valid = (r < rows)[:, None] & (c < N)[None, :]
        rstd = tl.load(rstd_ptr + r, r < rows, 0.0)[:, None]
        x = tl.load(x_ptr + at, valid, 0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + at, valid, 0.0).to(tl.float32)
        dw += dy * x
        dy *= w
        dx = rstd * (dy - x * (tl.sum(dy * x, 1) / N)[:, None])
        if ADD:
            dx += tl.load(dsum_ptr + at, valid, 0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), valid)
    tl.store(dw_ptr + tl.program_id(0) * N + c, tl.sum(dw, 0), c < N)


@_op("octo::rms_norm")
def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x + residual) and x + residual, as x; 1 / rms (rows,) in fp32. Without a residual the second is empty."""
    x, weight, N = x.contiguous(), weight.contiguous(), x.shape[-1]
    rows, y, rstd = x.numel() // N, torch.empty_like(x), x.new_empty(x.numel() // N, dtype=torch.float32)
    add = residual is not None
    total, residual = (torch.empty_like(x), residual.contiguous()) if add else (x.new_empty(0), x)
    meta = _rows_per_program(N)
    wrap_triton(_rms_norm_forward)[(triton.cdiv(rows, meta["BLOCK_R"]),)](
        x, residual, weight, y, total if add else y, rstd, rows, N=N, EPS=eps, ADD=add, **meta
    )
    return y, total, rstd


@_op("octo::rms_norm_backward")
def _rms_norm_grad(dy: Tensor, dsum: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x, dy, weight, N = x.contiguous(), dy.contiguous(), weight.contiguous(), x.shape[-1]
    rows, dx, meta, add = rstd.numel(), torch.empty_like(x), _rows_per_program(N), dsum is not None
    programs = min(RMS_PROGRAMS, triton.cdiv(rows, meta["BLOCK_R"]))
    dw = x.new_empty(programs, N, dtype=torch.float32)
    dsum = dsum.contiguous() if add else dy
    wrap_triton(_rms_norm_backward)[(programs,)](dy, dsum, x, rstd, weight, dx, dw, rows, N=N, ADD=add, **meta)
    return dx, dw.sum(0).to(weight.dtype)


def _rms_norm_context(ctx, inputs, output):
    x, residual, weight, _ = inputs
    ctx.add = residual is not None
    ctx.save_for_backward(output[1] if ctx.add else x, output[2], weight)
    ctx.mark_non_differentiable(output[2])


def _rms_norm_autograd(ctx, dy, dsum, _):
    x, rstd, weight = ctx.saved_tensors
    dx, dw = torch.ops.octo.rms_norm_backward(dy, dsum if ctx.add else None, x, rstd, weight)
    return dx, dx if ctx.add else None, dw, None


# ---------------------------------------------------------------------------------------------------------- Attention
#
# FlashAttention-2 (Dao 2023) over packed documents. For one query i, over the keys doc_start_i <= j <= i,
#     s_ij = q_i k_j / sqrt(D)    L_i = log sum_j exp(s_ij)    p_ij = exp(s_ij - L_i)    o_i = sum_j p_ij v_j.
# The T x T scores never reach memory. A program holds a tile of queries, walks over tiles of keys and values, and keeps for
# each query the largest score so far m, the sum of exp(s - m), and acc, the sum of exp(s - m) v. When a tile raises the
# maximum from m to m', both sums are multiplied by exp(m - m'). At the end o = acc / sum, and L = m + log(sum) is
# saved for the backward: 4 bytes for each query and head, where the scores would be 2 T.
#
# Backward. p is computed again, from L. With delta_i = sum_j p_ij dp_ij = do_i o_i (as o_i = sum_j p_ij v_j):
#     dp_ij = do_i v_j    ds_ij = p_ij (dp_ij - delta_i)    dv_j = sum_i p_ij do_i
#     dq_i = sum_j ds_ij k_j / sqrt(D)    dk_j = sum_i ds_ij q_i / sqrt(D).
# dq is a sum over keys, dk and dv are sums over queries: hence one kernel with a tile of queries that walks over keys, and
# one with a tile of keys that walks over the queries of all heads that share them. Both compute s and dp: 7 products where
# one kernel would need 5, but that one would add to dq from many programs at once, in an order that changes.
#
# What a tile's shape does: a program reads all keys and values that its queries see, so with BLOCK_M queries they are read
# T / BLOCK_M times in all (mostly from the second-level cache, since the heads that share them run side by side). More
# queries, fewer reads, until accumulators no longer fit in registers. Of the tiles on the walk, those outside the
# document are never visited, those within it need no mask; only those on a boundary or on the diagonal do, and they go
# first, in a loop of their own. The programs with the longest walks start first, so that the last to end are short.


@_jit
def _load_rows(ptr, first, T, STRIDE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows first … first + N - 1 of a (T, D) matrix, STRIDE numbers apart; 0 from row T on."""
    rows = tl.arange(0, N)[:, None]
    at = ptr + first.to(tl.int64) * STRIDE + (rows * STRIDE + tl.arange(0, D)[None, :])  # 64 bits once a tile
    x = tl.load(at, first + rows < T, 0.0) if MASKED else tl.load(at)
    return x.to(tl.float32) if INTERPRETED else x


@_jit
def _store_rows(ptr, first, T, x, STRIDE: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    rows = tl.arange(0, N)[:, None]
    at = ptr + first.to(tl.int64) * STRIDE + (rows * STRIDE + tl.arange(0, D)[None, :])
    tl.store(at, x.to(ptr.dtype.element_ty), first + rows < T)


@_jit
def _seen(rows, cols, starts):
    """True where query `rows` sees key `cols`: both (.., 1) or (1, ..); starts as rows."""
    return (cols <= rows) & (cols >= starts)


@_jit
def _key_tiles(start_ptr, m, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that queries m … m + BLOCK_M - 1 see: (first, full_lo, full_hi, end). Tiles of [full_lo, full_hi) need no mask."""
    end = tl.minimum(m + BLOCK_M, T)
    first = tl.load(start_ptr + m).to(tl.int32) // BLOCK_N * BLOCK_N
    full_lo = tl.cdiv(tl.load(start_ptr + end - 1).to(tl.int32), BLOCK_N) * BLOCK_N
    full_hi = tl.maximum(full_lo, (m + 1) // BLOCK_N * BLOCK_N)
    return first, full_lo, full_hi, end


@_jit
def _query_tiles(end_ptr, n, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same for the queries that see keys n … n + BLOCK_N - 1."""
    end = tl.load(end_ptr + tl.minimum(n + BLOCK_N, T) - 1).to(tl.int32)
    full_lo = tl.cdiv(n + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    full_hi = tl.maximum(full_lo, tl.load(end_ptr + n).to(tl.int32) // BLOCK_M * BLOCK_M)
    return n // BLOCK_M * BLOCK_M, full_lo, full_hi, end


@_jit
def _query_program(T, H: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr):
    """What a program with queries works on: row of the batch, KV head, head, first query (the last tiles come first)."""
    G: tl.constexpr = H // K
    b, kv, at = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K, tl.program_id(0)
    return b, kv, kv * G + at % G, (tl.cdiv(T, BLOCK_M) - 1 - at // G) * BLOCK_M


@_jit
def _walk(i, first, full_lo, full_hi, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Where tile i of a walk begins. Masked: those before full_lo, then those from full_hi on; else those between."""
    if MASKED:
        at = first + i * BLOCK
        return tl.where(at >= full_lo, at + (full_hi - full_lo), at)
    else:
        return full_lo + i * BLOCK


@_jit
def _steps(first, full_lo, full_hi, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """How many tiles that walk has."""
    if MASKED:
        return (full_lo - first) // BLOCK + tl.cdiv(tl.maximum(end - full_hi, 0), BLOCK)
    else:
        return (full_hi - full_lo) // BLOCK


@_jit
def _forward_walk(
    acc, total, m, q, k_ptr, v_ptr, rows, starts, first, full_lo, full_hi, end, T,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    scale: tl.constexpr = D**-0.5 * LOG2E
    for i in range(_steps(first, full_lo, full_hi, end, BLOCK_N, MASKED)):
        n = _walk(i, first, full_lo, full_hi, BLOCK_N, MASKED)
        k = _load_rows(k_ptr, n, T, STRIDE, BLOCK_N, D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if MASKED:
            s = tl.where(_seen(rows[:, None], (n + tl.arange(0, BLOCK_N))[None, :], starts[:, None]), s, -float("inf"))
        higher = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(m - higher)
        total, m = total * shrink + tl.sum(p, 1), higher
        v = _load_rows(v_ptr, n, T, STRIDE, BLOCK_N, D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, m


@_jit
def _attention_forward(
    q_ptr, k_ptr, v_ptr, start_ptr, o_ptr, lse_ptr, T,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, kv, h, m0 = _query_program(T, H, K, BLOCK_M)
    start_ptr += b * T
    k_ptr, v_ptr = k_ptr + b * T * K * D + kv * D, v_ptr + b * T * K * D + kv * D
    rows = m0 + tl.arange(0, BLOCK_M)
    starts = tl.load(start_ptr + rows, rows < T, 0).to(tl.int32)
    first, full_lo, full_hi, end = _key_tiles(start_ptr, m0, T, BLOCK_M, BLOCK_N)
    q = _load_rows(q_ptr + b * T * H * D + h * D, m0, T, H * D, BLOCK_M, D, True)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    m = tl.full((BLOCK_M,), -1e38, tl.float32)  # finite: a first tile may hold nothing that a query sees
    for masked in tl.static_range(1, -1, -1):
        acc, total, m = _forward_walk(
            acc, total, m, q, k_ptr, v_ptr, rows, starts, first, full_lo, full_hi, end, T,
            K * D, D, BLOCK_N, masked == 1,
        )  # fmt: skip
    _store_rows(o_ptr + b * T * H * D + h * D, m0, T, acc / total[:, None], H * D, BLOCK_M, D)
    tl.store(lse_ptr + (b * H + h) * T + rows, (m + tl.log2(total)) * LN2, rows < T)


@_jit
def _dq_walk(
    dq, q, do, lse, delta, k_ptr, v_ptr, rows, starts, first, full_lo, full_hi, end, T,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    scale: tl.constexpr = D**-0.5 * LOG2E
    for i in range(_steps(first, full_lo, full_hi, end, BLOCK_N, MASKED)):
        n = _walk(i, first, full_lo, full_hi, BLOCK_N, MASKED)
        k = _load_rows(k_ptr, n, T, STRIDE, BLOCK_N, D, MASKED)
        v = _load_rows(v_ptr, n, T, STRIDE, BLOCK_N, D, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
        if MASKED:
            p = tl.where(_seen(rows[:, None], (n + tl.arange(0, BLOCK_N))[None, :], starts[:, None]), p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@_jit
def _attention_dq(
    q_ptr, k_ptr, v_ptr, start_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, delta_ptr, T,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, kv, h, m0 = _query_program(T, H, K, BLOCK_M)
    start_ptr += b * T
    k_ptr, v_ptr = k_ptr + b * T * K * D + kv * D, v_ptr + b * T * K * D + kv * D
    mine, scalars = b * T * H * D + h * D, (b * H + h) * T
    rows = m0 + tl.arange(0, BLOCK_M)
    starts = tl.load(start_ptr + rows, rows < T, 0).to(tl.int32)
    first, full_lo, full_hi, end = _key_tiles(start_ptr, m0, T, BLOCK_M, BLOCK_N)
    q = _load_rows(q_ptr + mine, m0, T, H * D, BLOCK_M, D, True)
    do = _load_rows(do_ptr + mine, m0, T, H * D, BLOCK_M, D, True)
    o = _load_rows(o_ptr + mine, m0, T, H * D, BLOCK_M, D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + scalars + rows, delta, rows < T)  # the next kernel needs it too
    lse = tl.load(lse_ptr + scalars + rows, rows < T, 0.0) * LOG2E
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for masked in tl.static_range(1, -1, -1):
        dq = _dq_walk(
            dq, q, do, lse, delta, k_ptr, v_ptr, rows, starts, first, full_lo, full_hi, end, T,
            K * D, D, BLOCK_N, masked == 1,
        )  # fmt: skip
    _store_rows(dq_ptr + mine, m0, T, dq * D**-0.5, H * D, BLOCK_M, D)


@_jit
def _dkdv_walk(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, cols, ends, first, full_lo, full_hi, end, T,
    G: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    scale: tl.constexpr = D**-0.5 * LOG2E
    zeros = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    steps = _steps(first, full_lo, full_hi, end, BLOCK_M, MASKED)
    for i in range(steps * G):
        g, m = i // steps, _walk(i % steps, first, full_lo, full_hi, BLOCK_M, MASKED)
        rows = m + tl.arange(0, BLOCK_M)
        q = _load_rows(q_ptr + g * D, m, T, STRIDE, BLOCK_M, D, MASKED)
        do = _load_rows(do_ptr + g * D, m, T, STRIDE, BLOCK_M, D, MASKED)
        lse = tl.load(lse_ptr + g.to(tl.int64) * T + rows, rows < T, 0.0)
        delta = tl.load(delta_ptr + g.to(tl.int64) * T + rows, rows < T, 0.0)
        # The sums begin at -lse and -delta: subtracted after, both vectors would have to stay in registers meanwhile.
        start = zeros - (lse * D**0.5)[None, :]
        if MASKED:
            start = tl.where((cols[:, None] <= rows[None, :]) & (rows[None, :] < ends[:, None]), start, -float("inf"))
        p = tl.exp2(tl.dot(k, tl.trans(q), start, input_precision="ieee") * scale)  # (BLOCK_N, BLOCK_M)
        dp = tl.dot(v, tl.trans(do), zeros - delta[None, :], input_precision="ieee")
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * dp
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@_jit
def _attention_dkdv(
    q_ptr, k_ptr, v_ptr, end_ptr, lse_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr, T,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = H // K
    b, kv, n0 = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K, tl.program_id(0) * BLOCK_N
    first, full_lo, full_hi, end = _query_tiles(end_ptr + b * T, n0, T, BLOCK_M, BLOCK_N)
    cols = n0 + tl.arange(0, BLOCK_N)
    ends = tl.load(end_ptr + b * T + cols, cols < T, 0).to(tl.int32)
    mine, queries, scalars = b * T * K * D + kv * D, b * T * H * D + kv * G * D, (b * H + kv * G) * T
    k = _load_rows(k_ptr + mine, n0, T, K * D, BLOCK_N, D, True)
    v = _load_rows(v_ptr + mine, n0, T, K * D, BLOCK_N, D, True)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for masked in tl.static_range(1, -1, -1):
        dk, dv = _dkdv_walk(
            dk, dv, k, v, q_ptr + queries, do_ptr + queries, lse_ptr + scalars, delta_ptr + scalars, cols, ends,
            first, full_lo, full_hi, end, T, G, H * D, D, BLOCK_M, masked == 1,
        )  # fmt: skip
    _store_rows(dk_ptr + mine, n0, T, dk * D**-0.5, K * D, BLOCK_N, D)
    _store_rows(dv_ptr + mine, n0, T, dv, K * D, BLOCK_N, D)


@_op("octo::attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, T, K, D), doc_start (B, T) → o as q, log-sum-exp of the scores (B, H, T) in fp32."""
    q, k, v, doc_start = q.contiguous(), k.contiguous(), v.contiguous(), doc_start.contiguous()
    B, T, H, D = q.shape
    K = k.shape[2]
    assert B * K < 65_536, f"{B} rows x {K} KV heads: more than a launch's second axis holds"
    o, lse, meta = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32), tile("forward", D, q.dtype)
    grid = (triton.cdiv(T, meta["BLOCK_M"]) * (H // K), B * K)
    wrap_triton(_attention_forward)[grid](q, k, v, doc_start, o, lse, T, H=H, K=K, D=D, **meta)
    return o, lse


@_op("octo::attention_backward")
def _attention_grad(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, o: Tensor, lse: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, do, doc_start = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous(), doc_start.contiguous()
    B, T, H, D = q.shape
    K = k.shape[2]
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    meta = tile("dq", D, q.dtype)
    grid = (triton.cdiv(T, meta["BLOCK_M"]) * (H // K), B * K)
    wrap_triton(_attention_dq)[grid](q, k, v, doc_start, o, lse, do, dq, delta, T, H=H, K=K, D=D, **meta)
    # For each token one past the last token of its document: starts only rise, so it is where they pass the token's index.
    each = torch.arange(T, device=q.device, dtype=doc_start.dtype).expand(B, T).contiguous()
    doc_end = torch.searchsorted(doc_start, each, right=True, out_int32=True)
    meta = tile("dkdv", D, q.dtype)
    grid = (triton.cdiv(T, meta["BLOCK_N"]), B * K)
    wrap_triton(_attention_dkdv)[grid](q, k, v, doc_end, lse, do, delta, dk, dv, T, H=H, K=K, D=D, **meta)
    return dq, dk, dv


def _attention_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_autograd(ctx, do, _):
    q, k, v, doc_start, o, lse = ctx.saved_tensors
    return *torch.ops.octo.attention_backward(q, k, v, doc_start, o, lse, do), None


# --------------------------------------------------------------------------------------------------- Decode attention
#
# One new query a row against everything in its cache. Each key and value is used by G query heads and then not again, so
# the time is at least that of reading the cache once; the G heads are in one program so that it is no more. A few long rows
# would leave most of the chip idle, so a row is cut in pieces of DECODE_SPLIT tokens, each a program, which gives its own
# weighted mean o_s and log-sum-exp L_s. A second kernel merges them:
#     o = sum_s exp(L_s - L) o_s,    L = log sum_s exp(L_s).
# Pieces have a fixed length: were there as many as fill the chip, a row would be rounded differently in other company.
# The grid covers the longest row that the table can hold, so that no length is read back from the GPU; programs past a
# row's end return at once, and nothing past it is read.

DECODE_SPLIT = 512
DECODE_TILES = [
    (64, 4, 3),
    (64, 4, 4),
    (128, 4, 3),
    (128, 8, 3),
    (32, 4, 4),
]  # (BLOCK_N, num_warps, num_stages), the first is used


@_jit
def _load_cache(
    ptr, table_ptr, n, length, block_len, sb, st, D: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr
):
    """Tokens n … n + BLOCK_N - 1 of a row. ALIGNED: they lie in one block, found with one look into the table."""
    cols = n + tl.arange(0, BLOCK_N)
    if ALIGNED:
        at = tl.load(table_ptr + n // block_len).to(tl.int64) * sb + (cols % block_len)[:, None] * st
    else:
        block = tl.load(table_ptr + cols // block_len, cols < length, 0)
        at = block.to(tl.int64)[:, None] * sb + (cols % block_len)[:, None] * st
    x = tl.load(ptr + at + tl.arange(0, D)[None, :], (cols < length)[:, None], 0.0)
    return x.to(tl.float32) if INTERPRETED else x


@_jit
def _decode_pieces(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, o_ptr, lse_ptr, blocks, block_len, sb, sh, st,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = H // K
    row, kv, piece = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K, tl.program_id(1)
    length = tl.minimum(tl.load(lengths_ptr + row).to(tl.int32), blocks * block_len)
    if piece * SPLIT >= length:
        return
    g, d = tl.arange(0, HEADS), tl.arange(0, D)  # HEADS: G rounded up to what the tensor cores take
    heads = row * H + kv * G + g
    q = tl.load(q_ptr + heads[:, None] * D + d[None, :], (g < G)[:, None], 0.0)
    q = q.to(tl.float32) if INTERPRETED else q
    table_ptr += row * blocks
    scale: tl.constexpr = D**-0.5 * LOG2E
    acc = tl.zeros((HEADS, D), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    m = tl.full((HEADS,), -1e38, tl.float32)
    for n in range(piece * SPLIT, tl.minimum(piece * SPLIT + SPLIT, length), BLOCK_N):
        k = _load_cache(k_ptr + kv.to(tl.int64) * sh, table_ptr, n, length, block_len, sb, st, D, BLOCK_N, ALIGNED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where((n + tl.arange(0, BLOCK_N) < length)[None, :], s, -float("inf"))
        higher = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(m - higher)
        total, m = total * shrink + tl.sum(p, 1), higher
        v = _load_cache(v_ptr + kv.to(tl.int64) * sh, table_ptr, n, length, block_len, sb, st, D, BLOCK_N, ALIGNED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    at = heads * tl.num_programs(1) + piece
    tl.store(o_ptr + at[:, None] * D + d[None, :], acc / total[:, None], (g < G)[:, None])
    tl.store(lse_ptr + at, m + tl.log2(total), g < G)


@_jit
def _decode_merge(part_ptr, lse_ptr, lengths_ptr, o_ptr, pieces, H: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr):
    at, d = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    m, total, acc = -1e38, 0.0, tl.zeros((D,), tl.float32)
    for piece in range(tl.minimum(tl.cdiv(tl.load(lengths_ptr + at // H).to(tl.int32), SPLIT), pieces)):
        lse = tl.load(lse_ptr + at * pieces + piece)
        higher = tl.maximum(m, lse)
        w, shrink = tl.exp2(lse - higher), tl.exp2(m - higher)
        acc = acc * shrink + w * tl.load(part_ptr + (at * pieces + piece) * D + d)
        total, m = total * shrink + w, higher
    tl.store(o_ptr + at * D + d, (acc / tl.maximum(total, 1e-30)).to(o_ptr.dtype.element_ty))  # an empty row gives 0


@_op("octo::decode_attention")
def _decode_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """q (R, H, D), pools k and v (blocks, K, block_len, D), table (R, n), lengths (R,) → (R, H, D). No backward."""
    q, table, lengths = q.contiguous(), table.contiguous(), lengths.contiguous()
    R, H, D = q.shape
    K, block_len = k.shape[1:3]
    assert k.stride() == v.stride() and k.stride(-1) == 1, f"the pools are laid out as {k.stride()} and {v.stride()}"
    pieces = triton.cdiv(table.shape[1] * block_len, DECODE_SPLIT)
    part, lse = q.new_empty(R, H, pieces, D, dtype=torch.float32), q.new_empty(R, H, pieces, dtype=torch.float32)
    (block_n, warps, stages), out = DECODE_TILES[0], torch.empty_like(q)
    wrap_triton(_decode_pieces)[(R * K, pieces)](
        q, k, v, table, lengths, part, lse, table.shape[1], block_len, k.stride(0), k.stride(1), k.stride(2),
        H=H, K=K, D=D, HEADS=max(16, triton.next_power_of_2(H // K)), SPLIT=DECODE_SPLIT,
        BLOCK_N=block_n, ALIGNED=block_len % block_n == 0, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    wrap_triton(_decode_merge)[(R * H,)](part, lse, lengths, out, pieces, H=H, D=D, SPLIT=DECODE_SPLIT, num_warps=1)
    return out


# ------------------------------------------------------------------------------------- Cross-entropy with projection
#
# nll_i = log sum_v exp(z_iv) - z_iy,  z = h W^T / temperature,  y the target. With 128,256 words the logits of 8,192
# tokens are 2 GiB in bf16, and PyTorch also holds them in fp32, with their softmax: 8 GiB more. Here they exist for one
# chunk of tokens at a time. One kernel reads a chunk once and leaves nll_i and the log-sum-exp L_i; one overwrites it with
#     dz_iv = g_i (exp(z_iv - L_i) - [v = y_i]) / temperature,    and then  dh = dz W,    dW = sum of dz^T h over chunks.
# The products are left to cuBLAS: plain matrix products are what libraries are best at.
#
# When is the gradient made? For a loss, a sum over tokens, every g_i is the same number, so the gradient for g = 1 can be
# made while the chunk is there, and be multiplied later: 3 products. If g_i differ and are known only afterwards (the
# log-probabilities of GRPO), the logits are made once more in the backward: 4 products. There chunks can be of words
# and not of tokens, as L_i is known.

CHUNK_NUMBERS = 1 << 28  # logits at a time: 512 MiB in bf16, 2,093 tokens of Llama 3's vocabulary
_NLL_BLOCK = dict(BLOCK_V=4096, num_warps=8)


@_jit
def _nll_forward(logits_ptr, targets_ptr, nll_ptr, lse_ptr, temperature, V: tl.constexpr, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = LOG2E / tl.full((), temperature, tl.float32)  # under torch.compile a Python float arrives in fp64
    logits_ptr += row * V
    m, total = -1e38, 0.0
    for v in range(0, V, BLOCK_V):
        at = v + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + at, at < V, -float("inf")).to(tl.float32) * scale
        higher = tl.maximum(m, tl.max(z, 0))
        total, m = total * tl.exp2(m - higher) + tl.sum(tl.exp2(z - higher), 0), higher
    lse = (m + tl.log2(total)) * LN2
    target = tl.load(targets_ptr + row)
    z = tl.load(logits_ptr + target, (target >= 0) & (target < V), float("nan")).to(tl.float32) * scale * LN2
    tl.store(nll_ptr + row, tl.where(target >= 0, lse - z, 0.0))  # NaN for a target that is no word
    tl.store(lse_ptr + row, lse)


@_jit
def _nll_backward(
    logits_ptr, targets_ptr, lse_ptr, grad_ptr, temperature, first, width, SAME: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Logits of words first … first + width - 1 → their gradients, in place. SAME: grad is one number for all tokens."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    temperature = tl.full((), temperature, tl.float32)
    target = tl.load(targets_ptr + row)
    grad = tl.where(target >= 0, 1.0 if SAME else tl.load(grad_ptr + row), 0.0) / temperature
    z = tl.load(logits_ptr + row * width + at, at < width, 0.0).to(tl.float32)
    p = tl.exp2((z / temperature - tl.load(lse_ptr + row)) * LOG2E)
    dz = grad * (p - tl.where(first + at == target, 1.0, 0.0))
    tl.store(logits_ptr + row * width + at, dz.to(logits_ptr.dtype.element_ty), at < width)


def _chunks(n: int, width: int) -> list[tuple[int, int]]:
    """(begin, end) of even parts of n rows of logits: CHUNK_NUMBERS at most in each, whole multiples of 64 rows."""
    most = max(1, CHUNK_NUMBERS // max(1, width) // 64) * 64
    parts = max(1, triton.cdiv(n, most))
    size = max(1, triton.cdiv(triton.cdiv(n, parts), 64)) * 64
    return [(i, min(i + size, n)) for i in range(0, n, size)]


@_op("octo::linear_nll")
def _linear_nll(h: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """h (N, C), weight (V, C), targets (N,) → negative log-likelihoods and log-sum-exps (N,), in fp32."""
    targets, N, V = targets.contiguous(), h.shape[0], weight.shape[0]
    nll, lse = h.new_empty(N, dtype=torch.float32), h.new_empty(N, dtype=torch.float32)
    for a, b in _chunks(N, V):
        logits = h[a:b] @ weight.t()
        wrap_triton(_nll_forward)[(b - a,)](logits, targets[a:b], nll[a:b], lse[a:b], temperature, V=V, **_NLL_BLOCK)
    return nll, lse


@_op("octo::linear_nll_backward")
def _linear_nll_grad(
    h: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Gradients to h and weight, `grad` (N,) being those of the losses. In chunks of words: each row of dW is made once."""
    targets, lse, grad, N = targets.contiguous(), lse.contiguous(), grad.contiguous(), h.shape[0]
    dh, dw = h.new_zeros(h.shape, dtype=torch.float32), torch.empty_like(weight)
    for a, b in _chunks(weight.shape[0], N):
        logits = h @ weight[a:b].t()
        wrap_triton(_nll_backward)[(N, triton.cdiv(b - a, _NLL_BLOCK["BLOCK_V"]))](
            logits, targets, lse, grad, temperature, a, b - a, SAME=False, **_NLL_BLOCK
        )
        dh += logits @ weight[a:b]
        dw[a:b] = logits.t() @ h
    return dh.to(h.dtype), dw


@_op("octo::linear_nll_sum")
def _linear_nll_sum(
    h: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the negative log-likelihoods (), each of them (N,), and the sum's gradients to h and to weight."""
    targets, N, V = targets.contiguous(), h.shape[0], weight.shape[0]
    nll, lse = h.new_empty(N, dtype=torch.float32), h.new_empty(N, dtype=torch.float32)
    chunks, dh = _chunks(N, V), torch.empty_like(h)
    # dW is a sum over chunks. A few are added in its own dtype, which has room; more would add up rounding errors of bf16.
    dw = weight.new_zeros(weight.shape, dtype=weight.dtype if len(chunks) <= 4 else torch.float32)
    for a, b in chunks:
        logits = h[a:b] @ weight.t()
        wrap_triton(_nll_forward)[(b - a,)](logits, targets[a:b], nll[a:b], lse[a:b], temperature, V=V, **_NLL_BLOCK)
        wrap_triton(_nll_backward)[(b - a, triton.cdiv(V, _NLL_BLOCK["BLOCK_V"]))](
            logits, targets[a:b], lse[a:b], lse, temperature, 0, V, SAME=True, **_NLL_BLOCK
        )
        dh[a:b] = logits @ weight
        if dw.dtype == weight.dtype:
            dw.addmm_(logits.t(), h[a:b])
        else:
            dw += logits.t() @ h[a:b]
    return nll.sum(), nll, dh, dw.to(weight.dtype)


def _linear_nll_context(ctx, inputs, output):
    h, weight, targets, ctx.temperature = inputs
    ctx.save_for_backward(h, weight, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _linear_nll_autograd(ctx, grad, _):
    dh, dw = torch.ops.octo.linear_nll_backward(*ctx.saved_tensors, grad, ctx.temperature)
    return dh, dw, None, None


def _linear_nll_sum_context(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])


def _linear_nll_sum_autograd(ctx, grad, *_):
    dh, dw = ctx.saved_tensors
    return dh * grad, dw * grad, None, None


def fused_nll(h: Tensor, weight: Tensor, targets: Tensor, temperature: float, reduction: str):
    """Llama.nll() with the kernels: h (B*T, hidden), weight (vocab, hidden), targets (B, T)."""
    flat, needed = targets.flatten(), torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    if reduction == "sum" and needed:
        total, nll = torch.ops.octo.linear_nll_sum(h, weight, flat, temperature)[:2]
        return total, nll.view(targets.shape)
    nll = torch.ops.octo.linear_nll(h, weight, flat, temperature)[0].view(targets.shape)
    return nll if reduction == "none" else (nll.sum(), nll.detach())


if REGISTERED:
    _rms_norm.register_autograd(_rms_norm_autograd, setup_context=_rms_norm_context)
    _attention.register_autograd(_attention_autograd, setup_context=_attention_context)
    _linear_nll.register_autograd(_linear_nll_autograd, setup_context=_linear_nll_context)
    _linear_nll_sum.register_autograd(_linear_nll_sum_autograd, setup_context=_linear_nll_sum_context)

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints in Hugging Face's layout

_HF_NAMES = {
    "attn_norm": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
_HF_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def hf_name(name: str) -> str:
    """Our parameter's name → Hugging Face's: blocks.3.attn.q.weight → model.layers.3.self_attn.q_proj.weight."""
    if name in _HF_TOP:
        return _HF_TOP[name]
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)  # kind: weight, or bias
    return f"model.layers.{layer}.{_HF_NAMES[module]}.{kind}"


def config_from_hf(hf: dict) -> LlamaConfig:
    """A LlamaConfig from config.json, with `rope_theta` and `rope_scaling` or the newer `rope_parameters`."""
    if (kind := hf.get("model_type")) not in ("llama", "qwen2"):
        raise ValueError(f'config.json says model_type "{kind}"; what can be read: llama, qwen2')
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if hf.get(key):
            raise ValueError(f"config.json says {key}: true, which this Llama does not have")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f'config.json says hidden_act "{hf["hidden_act"]}", this Llama has silu')
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta, qwen = rope.pop("rope_theta", hf.get("rope_theta", 10_000.0)), kind == "qwen2"
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f'rope scaling of type "{kind}" is not supported; valid: default, llama3')
    try:
        return LlamaConfig(
            vocab_size=hf["vocab_size"],
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            intermediate_size=hf["intermediate_size"],
            rope_theta=theta,
            rope_scaling={k: rope[k] for k in _llama3_scaling(1.0)} if kind == "llama3" else None,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            max_position=hf.get("max_position_embeddings", 2048),
            qkv_bias=qwen,
        )
    except KeyError as missing:
        raise ValueError(f"config.json has no {missing}, which a Llama needs") from None


def config_to_hf(config: LlamaConfig, dtype: str) -> dict:
    """config.json for transformers and the engines that read its files."""
    scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
    ours = {"attention_bias": False, "mlp_bias": False}  # Qwen's configuration has no words for them
    if config.qkv_bias:
        ours = {"use_sliding_window": False}
    return ours | {
        "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if config.qkv_bias else "llama",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "torch_dtype": dtype,
    }


def read_weights(path: str, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of a checkpoint folder, one after the other; every one expected is there, and no other.

    ValueError, naming the tensor, if one is missing, unknown or of another shape than config's.
    """
    from safetensors import SafetensorError, safe_open

    with torch.device("meta"):
        expected = {hf_name(k): (k, tuple(v.shape)) for k, v in Llama(config).state_dict().items()}
    missing, total = set(expected), len(expected)
    for file in sorted(f for f in os.listdir(path) if f.endswith(".safetensors")):
        try:
            with safe_open(os.path.join(path, file), framework="pt") as f:
                for name in f.keys():
                    if name == "lm_head.weight" and config.tie_embeddings:
                        continue  # some exporters write the tied matrix twice
                    if name not in expected:
                        where = os.path.join(path, file)
                        raise ValueError(f"{where} has tensor {name}, which this Llama does not have")
                    ours, shape = expected[name]
                    tensor = f.get_tensor(name)
                    if tuple(tensor.shape) != shape:
                        found = tuple(tensor.shape)
                        raise ValueError(f"{file}: {name} has shape {found}, config.json says {shape}")
                    missing.discard(name)
                    yield ours, tensor
        except SafetensorError as error:
            raise ValueError(f"{os.path.join(path, file)} cannot be read ({error}): is it cut off?") from None
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of {total} tensors, {min(missing)} among them")


@torch.no_grad()
def assign(p: Tensor, value: Tensor) -> None:
    """p ← value in p's dtype; under FSDP2, where every rank has the same value, the part of it that is this rank's."""
    if hasattr(p, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor  # half a second

        value = distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(value)


@torch.no_grad()
def load_pretrained(model: Llama, path: str) -> None:
    """Fill a model of this shape, whole or sharded by FSDP2, from a checkpoint folder; weights keep the model's dtype.

    Called by every rank, each of which reads one tensor at a time and keeps its own part: no second copy of the model.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in read_weights(path, model.config):
        assign(parameters[name], tensor)


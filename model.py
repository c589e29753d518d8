"""A Llama in plain PyTorch, with Triton kernels for GPUs: Llama 3.1 and 3.2, and small ones of the same kind.

A forward pass: tokens (B, T) → embeddings (B, T, hidden) → in each block, attention among the tokens of a
document and an MLP on each token, both added to the residual stream → a last norm → logits (B, T, vocab), or
the loss of each token. The model can be read alone, top to bottom, down to "Below: faster, and elsewhere".

1. Each operation is one function. On a GPU it calls a Triton kernel (`if has_kernels(x)`); what stands after
   that is plain PyTorch, which is what a CPU runs. One exception: attention over packed documents, which a
   CPU computes by blocks of queries (`block_attention`).
2. A row of tokens holds several documents. `doc_start` (B, T) is the index, within the row, of the first
   token of each token's document: attention never looks before it, positions count from it, and its shape is
   fixed, so that nothing is compiled again when lengths change.
3. Weights stay in fp32 and are cast where they are used, to the activations' `compute_dtype`. Under FSDP2
   with a bf16 policy they arrive in bf16 already.
4. The loss, one number per token, is computed inside `forward`, in chunks of tokens: the logits (tokens x
   vocabulary) of 128,256 words never exist at once.
5. Nothing here knows about ranks or optimizers: parallelism is applied from outside (midtrain.py).
"""

import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton
from torch.utils.checkpoint import checkpoint

from data.files import INDEX, print0_once, read_json, weight_files, write_json

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the kernels are functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

# ---- Configuration and presets -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama. Names are Hugging Face's, or shorter."""

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
    qkv_bias: bool = False  # Qwen 2 and 2.5, with which the recipe compares, are Llamas but for this

    def __post_init__(self):
        for name, value in list(vars(self).items())[:7]:  # the sizes
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, not a number of at least 1")
        if self.num_heads % (kv_heads := self.num_kv_heads):
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")

    def num_params(self) -> int:
        """Parameters, an output projection tied to the embedding counted once."""
        return self._num_params

    @cached_property  # plans ask a hundred times
    def _num_params(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Llama(self).parameters())


_SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
_LLAMA_31 = dict(rope_scaling=_SCALING, max_position=131_072)
_LLAMA_32 = dict(rope_scaling=_SCALING | {"factor": 32.0}, max_position=131_072)
# "tiny" and "small" are ours, their vocabulary is replaced by the tokenizer's; the others are Meta's shapes.
PRESETS = {
    "tiny": LlamaConfig(1024, 4, 128, 4, 2, 32, 352, rope_theta=10_000.0, max_position=512),
    "small": LlamaConfig(8192, 8, 512, 8, 4, 64, 1408, max_position=2048),
    "1b": LlamaConfig(128_256, 16, 2048, 32, 8, 64, 8192, **_LLAMA_32),
    "3b": LlamaConfig(128_256, 28, 3072, 24, 8, 128, 8192, **_LLAMA_32),
    "8b": LlamaConfig(128_256, 32, 4096, 32, 8, 128, 14_336, tie_embeddings=False, **_LLAMA_31),
}

# ---- The operations: RMSNorm, rotary embedding, attention; then the modules, Attention to Llama ------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # as flags name them
KERNEL_DEVICES = {"cuda"} if triton else set()  # emptied, a GPU runs the plain PyTorch too
LOGITS_BUDGET = 1 << 25  # logits at once, without kernels: 128 MiB, 261 tokens of Llama 3's vocabulary


def has_kernels(x: Tensor, head_dim: int = 64) -> bool:
    """Do operations on x run as Triton kernels, attention on heads of this width among them?"""
    return x.device.type in KERNEL_DEVICES and x.dtype != torch.float64 and head_dim in HEAD_DIMS


def has_bf16(device: torch.device) -> bool:
    """Is it a GPU that multiplies bf16? Those from Ampere on do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def pick_device() -> torch.device:
    """This process's GPU, Apple's GPU (for one process), or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index < torch.cuda.device_count() and not has_bf16(device):
            KERNEL_DEVICES.discard("cuda")  # which has 64 KiB of shared memory, too
            print0_once("this GPU is too old for the Triton kernels: plain PyTorch, in fp32")
        return device
    return torch.device("mps" if torch.backends.mps.is_available() and "RANK" not in os.environ else "cpu")


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(s), s) of s = x + residual, or of s = x without one; shapes and dtype of x.

    norm(s) = s / sqrt(mean(s^2) + eps) * weight over the last axis (Zhang & Sennrich 2019), computed in fp32.
    """
    assert residual is None or residual.dtype == x.dtype, f"x is {x.dtype}, the residual {residual.dtype}"
    if has_kernels(x):
        y, s, _ = torch.ops.octo.rms_norm(x, residual, weight, eps)
        return y, x if residual is None else s
    s = x if residual is None else residual + x
    s32 = s.float()
    mean_square = (s32 * s32).sum(-1, keepdim=True) / s.shape[-1]  # the backward of mean() is slower
    return (s32 * (mean_square + eps).rsqrt() * weight).to(s.dtype), s


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Inverse frequencies theta^(-2i/d) (head_dim / 2,) in fp32 (Su et al. 2021), scaled as in Llama 3.1:

    wavelengths above original / low_freq_factor are stretched by `factor`, those below original /
    high_freq_factor are kept, and those between are blended linearly in original / wavelength.
    """
    inv_freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if (s := config.rope_scaling) is None:
        return inv_freq
    turns = s["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # within the original context
    keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0.0, 1.0)
    return keep * inv_freq + (1 - keep) * inv_freq / s["factor"]


def rope_tables(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, cos) and (-sin, sin) of the angles at positions (B, T), each (B, T, 1, head_dim) in fp32."""
    angles = positions[:, :, None, None].float() * inv_freq  # in bf16, positions past 256 would collide
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x[i], x[i + D/2]) of x (B, T, H, D) by their angles: Hugging Face's half-split layout."""
    x32 = x.float()
    return (x32 * cos + x32.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def document_mask(doc_start: Tensor, dtype: torch.dtype, prefix: Tensor | None = None) -> Tensor:
    """Added to attention scores, (B, 1, T, T): 0 where token i sees j and -inf elsewhere.

    i sees j if doc_start[i] <= j <= i, or j < prefix (B,): the tokens that all documents of a row go on from.
    """
    j = torch.arange(doc_start.shape[1], device=doc_start.device)
    unseen = j < doc_start[:, :, None]
    if prefix is not None:
        unseen &= j >= prefix[:, None, None]
    unseen |= j > j[:, None]
    return torch.where(unseen, -torch.inf, 0.0).to(dtype)[:, None]


def attention(q, k, v, doc_start: Tensor | None, mask=None, prefix=None, prompt=False) -> Tensor:
    """Causal grouped-query attention in documents: q (B, T, H, D), k, v (B, T, K, D) → (B, T, H, D).

    doc_start (B, T), which never falls along a row, or None for one document per row; prefix (B,): how many
    tokens at the start of a row all its documents see; mask: their document_mask(), made here if not given;
    prompt: without doc_start too, round as training does.
    """
    B, T, H, D = q.shape
    if has_kernels(q, D) and prefix is None:
        starts = q.new_zeros(B, T, dtype=torch.int32) if doc_start is None else doc_start
        return torch.ops.octo.attention(q, k, v, starts)[0]
    if mask is None and doc_start is not None:
        mask = document_mask(doc_start, q.dtype, prefix)
    # A CPU goes by blocks, but not compiled: a compiler cannot follow where documents begin.
    blocks = q.is_cpu and T <= LONGEST_BLOCKED and not torch.compiler.is_compiling()
    if blocks and (prompt or mask is not None):
        return block_attention(q, k, v, doc_start, mask, prefix)
    k, v = (x.repeat_interleave(H // k.shape[2], dim=2).transpose(1, 2) for x in (k, v))  # (B, H, T, D)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # the parameters are cast to the dtype of the activations
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rms_norm(x, residual, self.weight, self.eps)


class AttentionContext(NamedTuple):
    """What every layer needs to know about the tokens of a forward pass, made once for all of them."""

    rope: tuple[Tensor, Tensor]  # rope_tables() of the positions
    doc_start: Tensor | None  # (B, T)
    mask: Tensor | None  # added to the scores; None where none is needed
    prefix: Tensor | None  # (B,): tokens at the start of a row that all its documents go on from
    cache: "KVCache | None"
    places: tuple[Tensor, Tensor] | None  # of the tokens in the cache; a kernel finds that of one per row
    prompt: bool  # the first tokens of an empty cache, which see nothing but each other


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) and its projections: (B, T, hidden) → (B, T, hidden)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.hidden_size, config.num_heads * config.head_dim, config.qkv_bias)
        self.k = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, config.qkv_bias)
        self.v = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, config.qkv_bias)
        self.o = Linear(config.num_heads * config.head_dim, config.hidden_size, False)
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.stacked = None  # while sampled: q, k and v as one matrix, and its bias

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        if self.stacked is None:
            q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.q, self.k, self.v))
        else:
            q, k, v = F.linear(x, *self.stacked).unflatten(-1, (-1, self.head_dim)).split(self.heads, 2)
        if context.cache is not None and context.places is None:
            q = context.cache.rotate_and_write(layer, q, k, v, *context.rope)
        else:
            q, k = apply_rope(q, *context.rope), apply_rope(k, *context.rope)
            if context.cache is not None:
                context.cache.write(layer, context.places, k, v)
        if context.cache is None or context.prompt:
            out = attention(q, k, v, context.doc_start, context.mask, context.prefix, context.prompt)
        else:
            out = cached_attention(q, context.cache, layer, context.mask)
        return self.o(out.flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = Linear(config.hidden_size, config.intermediate_size, False)
        self.up = Linear(config.hidden_size, config.intermediate_size, False)
        self.down = Linear(config.intermediate_size, config.hidden_size, False)
        self.stacked = None  # while sampled: gate and up as one matrix, and None

    def forward(self, x: Tensor) -> Tensor:
        if self.stacked is None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        gate, up = F.linear(x, *self.stacked).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm residual block: s += attention(norm(s)), then s += mlp(norm(s)), s being the residual stream.

    In and out: x, what is not yet added to the residual stream, and the residual stream (None before the
    first block), each (B, T, hidden). The next norm adds x as it reads it.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, residual, context: AttentionContext, layer: int) -> tuple[Tensor, Tensor]:
        x, residual = self.attn_norm(x, residual)
        x, residual = self.mlp_norm(self.attn(x, context, layer), residual)
        return self.mlp(x), residual


class Llama(nn.Module):
    """The model. Activations are in `compute_dtype`, fp32 unless set; weights keep their own dtype."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.compute_dtype = config, torch.float32
        self.generation: dict = {}  # generation_config.json of the folder that its weights came from
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, False)
        self.register_buffer("inv_freq", rope_frequencies(config), persistent=False)  # not in checkpoints

    def init_rope(self) -> None:
        """Needed after a model was made on the meta device."""
        self.inv_freq = rope_frequencies(self.config).to(self.embed.weight.device)

    def init_weights(self, seed: int) -> "Llama":
        """Random weights, a function of the seed: see initialise()."""
        return initialise(self, seed)

    def forward(self, tokens, targets=None, doc_start=None, temperature=1.0, cache=None, reduction="none",
                prefix=None) -> Tensor | tuple[Tensor, Tensor]:
        """tokens (B, T) int64 → logits (B, T, vocab) in fp32; with targets (B, T) → their nll().

        doc_start (B, T), None for one document per row; prefix (B,): so many tokens at the start of a row
        belong to all documents behind them, which see them and count positions on; cache: see KVCache.
        """
        h = self.hidden(tokens, doc_start, cache, prefix)
        return self.logits(h) if targets is None else self.nll(h, targets, temperature, reduction)

    def hidden(self, tokens: Tensor, doc_start=None, cache=None, prefix=None) -> Tensor:
        """tokens (B, T) → the last layer's normalised activations (B, T, hidden), in compute_dtype."""
        x, residual = self.embed(tokens).to(self.compute_dtype), None
        context = self.attention_context(x, doc_start, cache, prefix)
        for layer, block in enumerate(self.blocks):
            x, residual = block(x, residual, context, layer)
        return self.norm(x, residual)[0]

    def attention_context(self, x: Tensor, doc_start, cache, prefix) -> AttentionContext:
        """Positions and mask of activations x (B, T, hidden). Kernels need no mask, but know of no prefix."""
        B, T, _ = x.shape
        positions, mask, places = torch.arange(T, device=x.device).expand(B, T), None, None
        kernel, prompt = has_kernels(x, self.config.head_dim), cache is not None and cache.empty and T > 1
        assert prefix is None or doc_start is not None, "a prefix is followed by documents: give doc_start"
        if cache is not None:
            assert doc_start is None, "a cache holds one document per slot"
            positions = positions + cache.lengths[:B, None]
            places = None if kernel and T == 1 else cache.places(positions)
            if T > 1 and not prompt or T == 1 and not (kernel or cache.paged):
                mask = cache.mask(positions, x.dtype)
        elif doc_start is not None:
            behind = 0 if prefix is None else prefix[:, None] * (doc_start > 0)
            positions = positions - doc_start + behind
            mask = None if kernel and prefix is None else document_mask(doc_start, x.dtype, prefix)
        rope = rope_tables(self.inv_freq, positions)
        return AttentionContext(rope, doc_start, mask, prefix, cache, places, prompt)

    def logits(self, h: Tensor) -> Tensor:
        """Activations (..., hidden) → logits (..., vocab) in fp32."""
        return F.linear(h, self.output_weight(h.dtype)).float()

    def output_weight(self, dtype: torch.dtype) -> Tensor:
        """The output projection (vocab, hidden), tied or not."""
        return (self.embed.weight if self.head is None else self.head.weight).to(dtype)

    def nll(self, h: Tensor, targets: Tensor, temperature: float = 1.0, reduction: str = "none"):
        """-log softmax(logits / temperature)[target]: h (B, T, hidden), targets (B, T) → (B, T) in fp32.

        Targets below 0 give 0. With reduction "sum" → (the sum (), each of them (B, T) without gradient): it
        saves a GPU one of four products with the vocabulary.
        """
        assert reduction in ("none", "sum"), f'reduction "{reduction}"; valid: none, sum'
        h, flat = h.flatten(0, 1), targets.flatten()
        if has_kernels(h):
            return fused_nll(h, self.output_weight(h.dtype), targets, temperature, reduction)
        chunk, nll_of = max(1, LOGITS_BUDGET // self.config.vocab_size), self._nll_reference
        if len(flat) > chunk:  # each of several is computed again in the backward pass
            nll_of = partial(checkpoint, nll_of, use_reentrant=False)
        nll = torch.cat([nll_of(a, b, temperature) for a, b in zip(h.split(chunk), flat.split(chunk))])
        nll = nll.view(targets.shape)
        return nll if reduction == "none" else (nll.sum(), nll.detach())

    def _nll_reference(self, h: Tensor, targets: Tensor, temperature: float) -> Tensor:
        logits = self.logits(h) if temperature == 1.0 else self.logits(h) / temperature
        return F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="none")

    @staticmethod
    def from_pretrained(path: str, device="cpu", dtype: torch.dtype | None = None) -> "Llama":
        """The model in a checkpoint folder with config.json, a tensor at a time: in the dtype stored,
        or matrices in this one and vectors in fp32."""
        with torch.device("meta"):
            model = Llama(config_from_hf(read_json(os.path.join(path, "config.json"))))
        if dtype or not weight_files(path):
            for p in model.parameters():
                p.data = p.data.to(dtype if p.ndim > 1 else None)
            load_pretrained(model.to_empty(device=device), path)
        else:
            state = {name: tensor.to(device) for name, tensor in read_weights(path, model)}
            model.load_state_dict(state, assign=True)
        model.generation = read_generation(path)
        model.init_rope()
        return model

    def save_pretrained(self, path: str, state: dict[str, Tensor] | None = None, tok=None, **options) -> None:
        """Write a Hugging Face folder. state: full tensors, if the model holds shards of them; {} for none at
        all; tok: the Tokenizer, without which text is left out; options: write_weights()'s."""
        write_weights(path, self.state_dict() if state is None else state, **options)
        write_settings(path, self, options.get("dtype") or self.embed.weight.dtype, tok)


# ---- Below: faster, and elsewhere --------------------------------------------------------------------------
# ---- KV cache ----------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of past tokens: a pool of blocks, and for each slot the blocks of its sequence.

    k, v: (num_layers, blocks, num_kv_heads, block_len, head_dim); table: (slots, n) int32; lengths: (slots,)
    int64, the tokens in each slot. A forward pass takes tokens (B, T) as the continuation of slots 0..B-1 and
    writes their keys and values behind what is there. The caller then adds the true lengths to `lengths`:
    right padding is never seen again. The first pass of an empty cache, of prompts, goes by attention(): no
    scores of all tokens with all. Without block_len, slot b is block b, as long as a row may be:
    attention reads it in place, which is best on a CPU. With it (a pool of `blocks`, paged as in vLLM, Kwon
    et al. 2023) the owner fills in the table: rows take no more than they need, may share blocks, and T is 1.
    reach: of a slot's tokens, attention reads so many; all those written, if an owner lowers it.
    """

    def __init__(self, config, slots, max_len, dtype=torch.float32, device=None, block_len=None, blocks=None):
        self.paged, self.block_len = block_len is not None, block_len or max_len
        n = -(-max_len // self.block_len)
        shape = (config.num_layers, blocks or slots * n, config.num_kv_heads, self.block_len, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        own = torch.arange(slots, dtype=torch.int32, device=device)[:, None]
        self.table = torch.zeros(slots, n, dtype=torch.int32, device=device) if self.paged else own
        self.max_len = self.reach = n * self.block_len
        self.empty = True

    def mask(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Added to the scores of tokens at positions (B, T): (B, 1, T, reach), -inf behind each token."""
        behind = torch.arange(self.reach, device=positions.device) > positions[:, :, None]
        return torch.where(behind, -torch.inf, 0.0).to(dtype)[:, None]

    def copy(self, source: "KVCache", src: int, start: int, stop: int, block: int) -> None:
        """Tokens start..stop-1 of block `src` of `source` become the first of `block`."""
        self.empty = False
        for mine, theirs in ((self.k, source.k), (self.v, source.v)):
            mine[:, block, :, : stop - start] = theirs[:, src, :, start:stop].to(mine.device)

    def places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """For write(): heads (B, T or 1, K) among those of all blocks, and where in them (B, T, 1), positions
        (B, T) of slots 0..B-1 lie."""
        blocks, K = torch.arange(len(positions), device=positions.device)[:, None], self.k.shape[2]
        if self.paged:
            blocks = self.table[blocks, positions // self.block_len].long()
            positions = positions % self.block_len
        return blocks[..., None] * K + torch.arange(K, device=positions.device), positions[..., None]

    def write(self, layer: int, places: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
        """Store k and v (B, T, K, D) of tokens at these places()."""
        self.empty = False
        self.k[layer].flatten(0, 1)[places] = k.to(self.k.dtype)
        self.v[layer].flatten(0, 1)[places] = v.to(self.v.dtype)

    def rotate_and_write(self, layer: int, q, k, v, cos: Tensor, sin: Tensor) -> Tensor:
        """In one kernel, of a token per slot: q (B, 1, H, D) with apply_rope(), write() of k so and v."""
        self.empty, B = False, len(q)
        q, k, v, cos, sin = (x[:, 0] for x in (q, k, v, cos[:, 0], sin[:, 0]))
        pools, rows = (self.k[layer], self.v[layer]), (self.table[:B], self.lengths[:B])
        return torch.ops.octo.rope_to_cache(q, k, v, cos, sin, *pools, *rows)[:, None]


def cached_attention(q: Tensor, cache: KVCache, layer: int, mask: Tensor | None) -> Tensor:
    """Attention of q (B, T, H, D) to slots 0..B-1 of the cache, given its mask → (B, T, H, D).

    The query heads of one KV head are rows of one product: the cache is read once for all.
    """
    B, T, H, D = q.shape
    if T == 1 and (cache.paged or has_kernels(q, D)):
        lengths = cache.lengths[:B] + 1  # with the token that was just written
        return decode_attention(q[:, 0], cache.k[layer], cache.v[layer], cache.table[:B], lengths)[:, None]
    assert not cache.paged, "a paged cache is read one token per slot; compute prompts in a dense one"
    k, v = cache.k[layer, :B, :, : cache.reach], cache.v[layer, :B, :, : cache.reach]  # (B, K, L, D)
    K, L = k.shape[1:3]
    q = (q * D**-0.5).view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)  # (B, K, G*T, D)
    scores = (q @ k.transpose(2, 3)).view(B, K, H // K, T, L).add_(mask[:, :, None])
    probs = scores.softmax(-1).view(B, K, -1, L)
    return (probs @ v).view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one query per row, q (R, H, D), to the first `lengths` (R,) tokens cached → (R, H, D).

    k, v: pools of blocks (blocks, K, block_len, D); table (R, n): the blocks of each row, in order. What lies
    past a row's length is not read. A row of length 0 gives 0. The kernel has no backward.
    """
    R, H, D = q.shape
    if has_kernels(q, D):
        return torch.ops.octo.decode_attention(q, k, v, table, lengths)
    K, L = k.shape[1], table.shape[1] * k.shape[2]
    seen = torch.arange(L, device=q.device) < lengths[:, None]  # (R, L)
    table = table.long().where(seen[:, :: k.shape[2]], 0)
    k, v = (x[table].transpose(1, 2).reshape(R, K, L, D) for x in (k, v))
    k, v = (x.masked_fill(~seen[:, None, :, None], 0.0) for x in (k, v))
    scores = (q.view(R, K, H // K, D) * D**-0.5) @ k.transpose(2, 3)  # (R, K, G, L)
    probs = scores.float().masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return (probs.to(v.dtype) @ v).view(R, H, D)


# ---- Attention by blocks of queries, on a CPU --------------------------------------------------------------
# torch's fused kernel visits all keys where there is a mask. Here a block of queries meets only the keys
# between the first that one of them sees and the last, and the row's common prefix. Without it a training
# step of the tiny preset takes 10 % longer in fp32 and 45 % in bf16 (tests/bench_cpu.py). In bf16, scores and
# probabilities are rounded: up to four times the fused kernel's error where attention is sharp.

QUERIES, LONGEST_BLOCKED = 64, 2048  # in a block; tokens of the longest row: all probabilities are kept


def block_attention(q, k, v, doc_start: Tensor | None, mask: Tensor | None, prefix: Tensor | None) -> Tensor:
    """attention(), given the mask of a doc_start. Query heads of one KV head are rows of the same product:
    t * G + g."""
    B, T, H, D = q.shape
    K, G = k.shape[2], H // k.shape[2]
    q = (q * D**-0.5).view(B, T, K, G, D).transpose(1, 2).reshape(B * K, T * G, D)
    k, v = (x.transpose(1, 2).reshape(B * K, T, D) for x in (k, v))
    if doc_start is None:  # a block sees all that is before it, and of itself what is before each token
        first, own = [0] * -(-T // QUERIES), q.new_full((QUERIES, QUERIES), -torch.inf).triu(1)[:, None]
    else:
        first = doc_start[:, ::QUERIES].amin(0).tolist()  # the first key, of its documents, that a block sees
    common, out = 0 if prefix is None else int(prefix.max()), []
    for begin, low, rows in zip(range(0, T, QUERIES), first, q.split(QUERIES * G, dim=1), strict=True):
        end = min(begin + QUERIES, T)
        keys = [(0, common), (low, end)] if 0 < common < low else [(0 if common else low, end)]
        scores = rows @ _ranges(k, keys, 1).mT
        if doc_start is None:
            scores.view(B, K, end - begin, G, -1)[..., begin:].add_(own[: end - begin, :, : end - begin])
        else:
            scores.view(B, K, end - begin, G, -1).add_(_ranges(mask[:, :, begin:end, None], keys, -1))
        out.append(scores.softmax(-1) @ _ranges(v, keys, 1))
    return torch.cat(out, 1).view(B, K, T, G, D).transpose(1, 2).reshape(B, T, H, D)


def _ranges(x: Tensor, ranges: list[tuple[int, int]], dim: int) -> Tensor:
    parts = [x.narrow(dim, begin, end - begin) for begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


# ---- The kernels (CUDA). Tests hold each equal to the plain PyTorch that it stands in for ------------------
# A Triton program computes one tile of the output. What costs time is main memory: while one byte comes from
# there, an H200 does some 200 bf16 operations. So what is loaded serves all that needs it while in registers.
# Sums are in fp32 (but one, said where it is), in an order set by shapes alone, without atomics: the same
# input, the same bits. What changes by the step (document lengths, rows in a cache) is read from tensors:
# nothing is compiled twice. Each is a triton_op: torch.compile sees inside, autograd has its backward, no
# output aliases an input. TRITON_INTERPRET=1 runs them on a CPU for tests (in fp32: its bf16 is wrong).

# Without a GPU the operators are never called, and registering them takes torch a second of import time.
_asked_for = {os.environ.get("TRITON_INTERPRET"), os.environ.get("OCTO_KERNELS")}
REGISTERED = triton and (torch.cuda.is_available() or "1" in _asked_for)
_jit = triton.jit if triton else lambda function: function
_op = partial(triton_op, mutates_args={}) if REGISTERED else lambda name, **_: lambda function: function
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_wrap = (lambda kernel: kernel) if INTERPRETED else wrap_triton  # torch before 2.13 wraps nothing interpreted
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)  # the hardware has 2^x

# Tiles of attention by head_dim: (BLOCK_M queries, BLOCK_N keys, num_warps of 32 threads, num_stages of loads
# in flight), for 2 bytes per number. Chosen at run time, by timing, they would change how sums are rounded,
# and the same command gave other weights. No GPU has timed them yet (tests/bench_kernels.py --tune). Nothing
# spills (a thread has 255 registers; accumulators of 128 x 64 take 64 from each of 128 threads) and, where
# possible, two programs fit on a multiprocessor: one multiplies while the other takes exponentials.
HEAD_DIMS = (16, 32, 64, 128)
TILES = {
    "forward": {16: (64, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3)},
    "dq": {16: (64, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 2)},
    "dkdv": {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 128, 8, 3), 128: (64, 64, 4, 2)},
}
# Other chips than Hopper's and the large Blackwell's take operands through registers, and have less memory.
SMALL_TILES = {
    ("forward", 128): (128, 32, 8, 3), ("dq", 32): (64, 64, 4, 3),
    ("dq", 128): (64, 64, 4, 2), ("dkdv", 128): (64, 64, 8, 2),
}
FP32_TILE = (32, 32, 8, 2)  # exact products on the ordinary units: for tests and small models


def tile(kernel: str, head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None = None) -> dict:
    """The tile in use, as arguments of a launch. capability: the GPU's, found out if not given."""
    if capability is None:
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    head_dim = int(head_dim)  # a symbol under torch.compile(dynamic=True), which is no key
    chosen = TILES[kernel][head_dim]
    if dtype == torch.float32:
        chosen = FP32_TILE
    elif capability[0] not in (9, 10):
        chosen = SMALL_TILES.get((kernel, head_dim), chosen)
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), chosen))


def stages_of_all_loads(head_dim: int, meta: dict) -> int | None:
    """STAGES of dk dv. None at width 128 with 4 warps: their accumulators leave no registers for it."""
    return meta["num_stages"] if int(head_dim) < 128 or meta["num_warps"] > 4 else None


def _rows_per_program(width: int) -> dict:
    """About 4,096 numbers per program: one row of a wide model, many of a narrow one."""
    block = triton.next_power_of_2(width)
    return dict(BLOCK_R=max(1, 4096 // block), BLOCK_N=block, num_warps=4 if block < 2048 else 8)


# ---- RMSNorm -----------------------------------------------------------------------------------------------
# y = w x r,  r = 1 / sqrt(mean(x^2) + eps),  where x is the residual stream with a layer's output just added.
# Unfused, the addition reads two tensors and writes one, and the norm reads that one and writes y. Here x is
# still in registers when it is normalised: 4 tensors go through memory and not 5, nor any fp32 copy.
#
# Backward. With x' = x r, dr/dx = -r^3 x / N, so dw = sum over rows of dy x', and
#     dx = r (w dy - x' mean(w dy x')) + the gradient that comes down the residual stream.
# r is saved, 4 bytes per row. A program takes every 264th block of rows and keeps its part of dw in
# registers: x and dy are read once for dx and dw. The parts (programs, N) are added at the end.

RMS_PROGRAMS = 264  # two on each of an H100's 132 multiprocessors; fixed, as it decides the rounding of dw


@_jit
def _rms_norm_forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, rows,
    N: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):
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
):
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
def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor,
              eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x + residual); x + residual, or nothing without one; 1 / rms (rows,) in fp32."""
    x, weight, N = x.contiguous(), weight.contiguous(), x.shape[-1]
    rows, y, rstd = x.numel() // N, torch.empty_like(x), x.new_empty(x.numel() // N, dtype=torch.float32)
    meta, add = _rows_per_program(N), residual is not None
    total, residual = (torch.empty_like(x), residual.contiguous()) if add else (x.new_empty(0), x)
    forward = _wrap(_rms_norm_forward)[(triton.cdiv(rows, meta["BLOCK_R"]),)]
    forward(x, residual, weight, y, total if add else y, rstd, rows, N=N, EPS=eps, ADD=add, **meta)
    return y, total, rstd


@_op("octo::rms_norm_backward")
def _rms_norm_grad(dy: Tensor, dsum: Tensor | None, x: Tensor, rstd: Tensor,
                   weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to x (and to the residual the same) and to the weight, of those to norm and sum."""
    x, dy, weight, N = x.contiguous(), dy.contiguous(), weight.contiguous(), x.shape[-1]
    rows, dx, meta, add = rstd.numel(), torch.empty_like(x), _rows_per_program(N), dsum is not None
    programs = min(RMS_PROGRAMS, triton.cdiv(rows, meta["BLOCK_R"]))
    dw, dsum = x.new_empty(programs, N, dtype=torch.float32), dsum.contiguous() if add else dy
    _wrap(_rms_norm_backward)[(programs,)](dy, dsum, x, rstd, weight, dx, dw, rows, N=N, ADD=add, **meta)
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


# ---- Attention ---------------------------------------------------------------------------------------------
# FlashAttention-2 (Dao 2023) over packed documents. For one query i, over the keys doc_start_i <= j <= i,
#     s_ij = q_i k_j / sqrt(D)    L_i = log sum_j exp(s_ij)    p_ij = exp(s_ij - L_i)    o_i = sum_j p_ij v_j.
# The T x T scores never reach memory. A program holds a tile of queries, goes through tiles of keys and
# values, and keeps for each query the largest score so far m, the sum of exp(s - m), and acc, the sum of
# exp(s - m) v. When a tile raises m to m', both sums are multiplied by exp(m - m'). At the end o = acc / sum,
# and L = m + log(sum) is saved for the backward: 4 bytes per query and head, where the scores would be 2 T.
#
# Backward. p is computed again, from L. With delta_i = sum_j p_ij dp_ij = do_i o_i (as o_i = sum_j p_ij v_j):
#     dp_ij = do_i v_j    ds_ij = p_ij (dp_ij - delta_i)    dv_j = sum_i p_ij do_i
#     dq_i = sum_j ds_ij k_j / sqrt(D)    dk_j = sum_i ds_ij q_i / sqrt(D).
# dq is a sum over keys, dk and dv over queries: hence one kernel with a tile of queries that goes through
# keys, and one with a tile of keys that goes through the queries of all heads that share them. Both compute s
# and dp: 7 products where one kernel would need 5, but would add to dq from many programs, in any order.
#
# A program reads all keys and values that its queries see: each T / BLOCK_M times in all, mostly from the
# second-level cache, as heads that share them run side by side. More queries, fewer reads, until accumulators
# outgrow the registers. Tiles outside the document are never visited; those on a boundary or the diagonal
# need a mask and come first, in a loop of their own. Long programs start first: the last to end are short.


@_jit
def _load_rows(ptr, first, T, STRIDE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows first … first + N - 1 of a (T, D) matrix, STRIDE numbers apart; 0 from row T on."""
    rows = tl.arange(0, N)[:, None]
    at = ptr + first.to(tl.int64) * STRIDE + (rows * STRIDE + tl.arange(0, D)[None, :])  # 64 bits once
    x = tl.load(at, first + rows < T, 0.0) if MASKED else tl.load(at)
    return x.to(tl.float32) if INTERPRETED else x


@_jit
def _store_rows(ptr, first, T, x, STRIDE: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    rows = tl.arange(0, N)[:, None]
    at = ptr + first.to(tl.int64) * STRIDE + (rows * STRIDE + tl.arange(0, D)[None, :])
    tl.store(at, x.to(ptr.dtype.element_ty), first + rows < T)


@_jit
def _key_tiles(start_ptr, m, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys of queries m … m + BLOCK_M - 1: first … end - 1, of which all see full_lo … full_hi - 1."""
    end = tl.minimum(m + BLOCK_M, T)
    first = tl.load(start_ptr + m).to(tl.int32) // BLOCK_N * BLOCK_N
    full_lo = tl.cdiv(tl.load(start_ptr + end - 1).to(tl.int32), BLOCK_N) * BLOCK_N
    full_hi = tl.maximum(full_lo, (m + 1) // BLOCK_N * BLOCK_N)
    return first, full_lo, full_hi, end


@_jit
def _query_tiles(end_ptr, n, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The queries of keys n … n + BLOCK_N - 1: first … end - 1, of which full_lo … full_hi - 1 see all."""
    end = tl.load(end_ptr + tl.minimum(n + BLOCK_N, T) - 1).to(tl.int32)
    full_lo = tl.cdiv(n + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    full_hi = tl.maximum(full_lo, tl.load(end_ptr + n).to(tl.int32) // BLOCK_M * BLOCK_M)
    return n // BLOCK_M * BLOCK_M, full_lo, full_hi, end


@_jit
def _query_program(T, H: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr):
    """What a program works on: row of the batch, KV head, head, first query (the last tiles come first)."""
    G: tl.constexpr = H // K
    b, kv, at = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K, tl.program_id(0)
    return b, kv, kv * G + at % G, (tl.cdiv(T, BLOCK_M) - 1 - at // G) * BLOCK_M


@_jit
def _tile_start(i, first, full_lo, full_hi, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Where tile i begins, of those between; MASKED: of those before full_lo, then those from full_hi on."""
    if MASKED:
        at = first + i * BLOCK
        return tl.where(at >= full_lo, at + (full_hi - full_lo), at)
    else:
        return full_lo + i * BLOCK


@_jit
def _tile_count(first, full_lo, full_hi, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return (full_lo - first) // BLOCK + tl.cdiv(tl.maximum(end - full_hi, 0), BLOCK)
    else:
        return (full_hi - full_lo) // BLOCK


@_jit
def _forward_loop(
    acc, total, m, q, k_ptr, v_ptr, rows, starts, first, full_lo, full_hi, end, T,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):
    scale: tl.constexpr = D**-0.5 * LOG2E
    for i in range(_tile_count(first, full_lo, full_hi, end, BLOCK_N, MASKED)):
        n = _tile_start(i, first, full_lo, full_hi, BLOCK_N, MASKED)
        k = _load_rows(k_ptr, n, T, STRIDE, BLOCK_N, D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if MASKED:
            cols = (n + tl.arange(0, BLOCK_N))[None, :]
            s = tl.where((cols <= rows[:, None]) & (cols >= starts[:, None]), s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        total, m = total * rescale + tl.sum(p, 1), m_new
        v = _load_rows(v_ptr, n, T, STRIDE, BLOCK_N, D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, total, m


@_jit
def _attention_forward(
    q_ptr, k_ptr, v_ptr, start_ptr, o_ptr, lse_ptr, T,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
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
        acc, total, m = _forward_loop(
            acc, total, m, q, k_ptr, v_ptr, rows, starts, first, full_lo, full_hi, end, T,
            K * D, D, BLOCK_N, masked == 1,
        )
    _store_rows(o_ptr + b * T * H * D + h * D, m0, T, acc / total[:, None], H * D, BLOCK_M, D)
    tl.store(lse_ptr + (b * H + h) * T + rows, (m + tl.log2(total)) * LN2, rows < T)


@_jit
def _dq_loop(
    dq, q, do, lse, delta, k_ptr, v_ptr, rows, starts, first, full_lo, full_hi, end, T,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):
    scale: tl.constexpr = D**-0.5 * LOG2E
    for i in range(_tile_count(first, full_lo, full_hi, end, BLOCK_N, MASKED)):
        n = _tile_start(i, first, full_lo, full_hi, BLOCK_N, MASKED)
        k = _load_rows(k_ptr, n, T, STRIDE, BLOCK_N, D, MASKED)
        v = _load_rows(v_ptr, n, T, STRIDE, BLOCK_N, D, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
        if MASKED:
            cols = (n + tl.arange(0, BLOCK_N))[None, :]
            p = tl.where((cols <= rows[:, None]) & (cols >= starts[:, None]), p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@_jit
def _attention_dq(
    q_ptr, k_ptr, v_ptr, start_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, delta_ptr, T,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
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
        dq = _dq_loop(
            dq, q, do, lse, delta, k_ptr, v_ptr, rows, starts, first, full_lo, full_hi, end, T,
            K * D, D, BLOCK_N, masked == 1,
        )
    _store_rows(dq_ptr + mine, m0, T, dq * D**-0.5, H * D, BLOCK_M, D)


@_jit
def _dkdv_loop(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, cols, ends, first, full_lo, full_hi, end, T,
    G: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    scale: tl.constexpr = D**-0.5 * LOG2E
    zeros = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    tiles = _tile_count(first, full_lo, full_hi, end, BLOCK_M, MASKED)
    # A loop that names its stages has all its loads in flight; else lse and delta, which feed no product,
    # would be fetched number by number, by each thread the 32 that it needs, which waits for them.
    for i in tl.range(tiles * G, num_stages=STAGES):
        g, m = i // tiles, _tile_start(i % tiles, first, full_lo, full_hi, BLOCK_M, MASKED)
        rows = m + tl.arange(0, BLOCK_M)
        q = _load_rows(q_ptr + g * D, m, T, STRIDE, BLOCK_M, D, MASKED)
        do = _load_rows(do_ptr + g * D, m, T, STRIDE, BLOCK_M, D, MASKED)
        lse = tl.load(lse_ptr + g.to(tl.int64) * T + rows, rows < T, 0.0)
        delta = tl.load(delta_ptr + g.to(tl.int64) * T + rows, rows < T, 0.0)
        # The sums begin at -lse and -delta: subtracted after, both vectors would stay in registers meanwhile.
        start = zeros - (lse * D**0.5)[None, :]
        if MASKED:
            seen = (cols[:, None] <= rows[None, :]) & (rows[None, :] < ends[:, None])
            start = tl.where(seen, start, -float("inf"))
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
    STAGES: tl.constexpr,
):
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
        dk, dv = _dkdv_loop(
            dk, dv, k, v, q_ptr + queries, do_ptr + queries, lse_ptr + scalars, delta_ptr + scalars, cols,
            ends, first, full_lo, full_hi, end, T, G, H * D, D, BLOCK_M, masked == 1, STAGES,
        )
    _store_rows(dk_ptr + mine, n0, T, dk * D**-0.5, K * D, BLOCK_N, D)
    _store_rows(dv_ptr + mine, n0, T, dv, K * D, BLOCK_N, D)


@_op("octo::attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k, v (B, T, K, D), doc_start (B, T) → o as q, log-sum-exp of scores (B, H, T), fp32."""
    q, k, v, doc_start = q.contiguous(), k.contiguous(), v.contiguous(), doc_start.contiguous()
    (B, T, H, D), K = q.shape, k.shape[2]
    assert B * K < 65_536, f"{B} rows x {K} KV heads: more than a launch's second axis holds"
    o, lse, meta = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32), tile("forward", D, q.dtype)
    grid = (triton.cdiv(T, meta["BLOCK_M"]) * (H // K), B * K)
    _wrap(_attention_forward)[grid](q, k, v, doc_start, o, lse, T, H=H, K=K, D=D, **meta)
    return o, lse


@_op("octo::attention_backward")
def _attention_grad(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, o: Tensor, lse: Tensor,
                    do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, do, doc_start = (x.contiguous() for x in (q, k, v, do, doc_start))
    (B, T, H, D), K = q.shape, k.shape[2]
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    meta = tile("dq", D, q.dtype)
    grid = (triton.cdiv(T, meta["BLOCK_M"]) * (H // K), B * K)
    _wrap(_attention_dq)[grid](q, k, v, doc_start, o, lse, do, dq, delta, T, H=H, K=K, D=D, **meta)
    # For each token one past the last of its document: starts only rise, so it is where they pass its index.
    each = torch.arange(T, device=q.device, dtype=doc_start.dtype).expand(B, T).contiguous()
    doc_end = torch.searchsorted(doc_start, each, right=True, out_int32=True)
    meta = tile("dkdv", D, q.dtype)
    meta["STAGES"] = stages_of_all_loads(D, meta)
    grid = (triton.cdiv(T, meta["BLOCK_N"]), B * K)
    _wrap(_attention_dkdv)[grid](q, k, v, doc_end, lse, do, delta, dk, dv, T, H=H, K=K, D=D, **meta)
    return dq, dk, dv


def _attention_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_autograd(ctx, do, _):
    return *torch.ops.octo.attention_backward(*ctx.saved_tensors, do), None


# ---- Decode attention --------------------------------------------------------------------------------------
# One new query per row against everything in its cache. Each key and value is used by G query heads and then
# not again, so the time is at least that of reading the cache once; the G heads are in one program: it is no
# more. A few long rows would leave most of the chip idle, so a row is cut in pieces of DECODE_SPLIT tokens,
# each a program, which gives its own weighted mean o_s and log-sum-exp L_s. A second kernel merges them:
#     o = sum_s exp(L_s - L) o_s,    L = log sum_s exp(L_s).
# Pieces have a fixed length: cut to fill the chip, other rows would change a row's rounding. The grid covers
# the longest row the table can hold, so no length is read back; programs past a row's end return at once.

DECODE_SPLIT, DECODE_TILE = 512, (64, 4, 3)  # tokens in a piece; BLOCK_N, num_warps, num_stages


@_jit
def _load_cache(
    ptr, table, n, length, block_len, sb, st, D: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr
):
    """Tokens n … n + BLOCK_N - 1 of a row. ALIGNED: they lie in one block, and the table is read once."""
    cols = n + tl.arange(0, BLOCK_N)
    if ALIGNED:
        at = tl.load(table + n // block_len).to(tl.int64) * sb + (cols % block_len)[:, None] * st
    else:
        block = tl.load(table + cols // block_len, cols < length, 0)
        at = block.to(tl.int64)[:, None] * sb + (cols % block_len)[:, None] * st
    x = tl.load(ptr + at + tl.arange(0, D)[None, :], (cols < length)[:, None], 0.0)
    return x.to(tl.float32) if INTERPRETED else x


@_jit
def _decode_pieces(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, o_ptr, lse_ptr, blocks, block_len, sb, sh, st,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr,
):
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
        keys = k_ptr + kv.to(tl.int64) * sh
        k = _load_cache(keys, table_ptr, n, length, block_len, sb, st, D, BLOCK_N, ALIGNED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where((n + tl.arange(0, BLOCK_N) < length)[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        total, m = total * rescale + tl.sum(p, 1), m_new
        values = v_ptr + kv.to(tl.int64) * sh
        v = _load_cache(values, table_ptr, n, length, block_len, sb, st, D, BLOCK_N, ALIGNED)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    at = heads * tl.num_programs(1) + piece
    tl.store(o_ptr + at[:, None] * D + d[None, :], acc / total[:, None], (g < G)[:, None])
    tl.store(lse_ptr + at, m + tl.log2(total), g < G)


@_jit
def _decode_merge(
    part_ptr, lse_ptr, lengths_ptr, o_ptr, pieces, H: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr
):
    at, d = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    m, total, acc = -1e38, 0.0, tl.zeros((D,), tl.float32)
    for piece in range(tl.minimum(tl.cdiv(tl.load(lengths_ptr + at // H).to(tl.int32), SPLIT), pieces)):
        lse = tl.load(lse_ptr + at * pieces + piece)
        m_new = tl.maximum(m, lse)
        w, rescale = tl.exp2(lse - m_new), tl.exp2(m - m_new)
        acc = acc * rescale + w * tl.load(part_ptr + (at * pieces + piece) * D + d)
        total, m = total * rescale + w, m_new
    tl.store(o_ptr + at * D + d, (acc / tl.maximum(total, 1e-30)).to(o_ptr.dtype.element_ty))


@_op("octo::decode_attention")
def _decode_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """q (R, H, D), pools k, v (blocks, K, block_len, D), table (R, n), lengths (R,) → (R, H, D)."""
    q, table, lengths = q.contiguous(), table.contiguous(), lengths.contiguous()
    R, H, D = q.shape
    K, block_len = k.shape[1:3]
    assert k.stride() == v.stride() and k.stride(-1) == 1, f"pools laid out as {k.stride()} and {v.stride()}"
    pieces = triton.cdiv(table.shape[1] * block_len, DECODE_SPLIT)
    part, out = q.new_empty(R, H, pieces, D, dtype=torch.float32), torch.empty_like(q)
    lse, (block_n, warps, stages) = q.new_empty(R, H, pieces, dtype=torch.float32), DECODE_TILE
    _wrap(_decode_pieces)[(R * K, pieces)](
        q, k, v, table, lengths, part, lse, table.shape[1], block_len, k.stride(0), k.stride(1), k.stride(2),
        H=H, K=K, D=D, HEADS=max(16, triton.next_power_of_2(H // K)), SPLIT=DECODE_SPLIT,
        BLOCK_N=block_n, ALIGNED=block_len % block_n == 0, num_warps=warps, num_stages=stages,
    )
    _wrap(_decode_merge)[(R * H,)](part, lse, lengths, out, pieces, H=H, D=D, SPLIT=DECODE_SPLIT, num_warps=1)
    return out


# ---- Rotary embedding of a new token, and its place in the cache -------------------------------------------
# In plain PyTorch a step of decoding starts ten kernels here in each layer, each with almost no work.
# A program takes one KV head of one row: its query heads, its key and its value.


@_jit
def _rope_to_cache(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, table_ptr, lengths_ptr, o_ptr, k_pool_ptr, v_pool_ptr,
    sq, sk, sv, blocks, block_len, sb, sh, st, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr,
):
    G: tl.constexpr = H // K
    row, kv = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    g, d = tl.arange(0, HEADS), tl.arange(0, D)  # HEADS: G rounded up to a power of two
    pair = (d + D // 2) % D  # the number that each is turned with
    cos, sin = tl.load(cos_ptr + row * D + d), tl.load(sin_ptr + row * D + d)
    heads, valid = (kv * G + g)[:, None] * D, (g < G)[:, None]
    q = tl.load(q_ptr + row * sq + heads + d[None, :], valid, 0.0).to(tl.float32) * cos[None, :]
    q += tl.load(q_ptr + row * sq + heads + pair[None, :], valid, 0.0).to(tl.float32) * sin[None, :]
    tl.store(o_ptr + row * H * D + heads + d[None, :], q.to(o_ptr.dtype.element_ty), valid)
    n = tl.load(lengths_ptr + row)  # tokens that the row has: this one comes behind them
    if n < blocks * block_len:
        block = tl.load(table_ptr + row * blocks + n // block_len).to(tl.int64)
        at = block * sb + kv.to(tl.int64) * sh + (n % block_len) * st + d
        k = tl.load(k_ptr + row * sk + kv * D + d).to(tl.float32) * cos
        k += tl.load(k_ptr + row * sk + kv * D + pair).to(tl.float32) * sin
        tl.store(k_pool_ptr + at, k.to(k_pool_ptr.dtype.element_ty))
        tl.store(v_pool_ptr + at, tl.load(v_ptr + row * sv + kv * D + d).to(v_pool_ptr.dtype.element_ty))


@_op("octo::rope_to_cache", mutates_args=("k_pool", "v_pool"))
def _rope_into(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pool: Tensor, v_pool: Tensor,
               table: Tensor, lengths: Tensor) -> Tensor:
    """q (R, H, D) and k, v (R, K, D), views of one product perhaps; cos, sin (R, D) in fp32; k and v become
    tokens `lengths` (R,) of the pools' rows (see decode_attention) → q, turned."""
    (R, H, D), K = q.shape, k.shape[1]
    assert all(x.stride()[1:] == (D, 1) for x in (q, k, v)), "a row's heads lie behind one another"
    assert k_pool.stride() == v_pool.stride() and k_pool.stride(-1) == 1
    out, table, lengths = q.new_empty(R, H, D), table.contiguous(), lengths.contiguous()
    _wrap(_rope_to_cache)[(R * K,)](
        q, k, v, cos.contiguous(), sin.contiguous(), table, lengths, out, k_pool, v_pool, q.stride(0),
        k.stride(0), v.stride(0), table.shape[1], *k_pool.shape[2:3], *k_pool.stride()[:3],
        H=H, K=K, D=D, HEADS=triton.next_power_of_2(H // K), num_warps=1,
    )
    return out


# ---- Cross-entropy with projection -------------------------------------------------------------------------
# nll_i = log sum_v exp(z_iv) - z_iy,  z = h W^T / temperature,  y the target. With 128,256 words the logits
# of 8,192 tokens are 2 GiB in bf16, and PyTorch also holds them in fp32, with their softmax: 8 GiB more. Here
# they exist for one chunk of tokens at a time. One kernel reads a chunk once and leaves nll_i and the
# log-sum-exp L_i; one overwrites it by its gradient. With g_i that of nll_i,
#     dz_iv = g_i (exp(z_iv - L_i) - [v = y_i]) / temperature,   dh = dz W,   dW = sum of dz^T h over chunks.
# The products are left to cuBLAS: libraries are best at plain matrix products. For a loss, a sum over tokens,
# every g_i is the same number, so the gradient for g = 1 is made while the chunk is there, and multiplied
# later: 3 products. If g_i differ and are known only afterwards (log-probabilities, in GRPO), the logits are
# made once more in the backward: 4 products. There chunks can be of words and not of tokens, as L_i is known.

CHUNK_NUMBERS = 1 << 28  # logits at a time: 512 MiB in bf16, 2,093 tokens of Llama 3's vocabulary
FEW, LARGER = 4, 4  # dW may be summed in bf16 over a few chunks; so many times as large, to be a few
_NLL_TILE = dict(BLOCK=4096, num_warps=8)


@_jit
def _nll_forward(logits_ptr, target_ptr, nll_ptr, lse_ptr, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = LOG2E / tl.full((), temperature, tl.float32)  # under torch.compile a Python float arrives in fp64
    logits_ptr += row * V
    m, total = -1e38, 0.0
    for v in range(0, V, BLOCK):
        at = v + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + at, at < V, -float("inf")).to(tl.float32) * scale
        m_new = tl.maximum(m, tl.max(z, 0))
        total, m = total * tl.exp2(m - m_new) + tl.sum(tl.exp2(z - m_new), 0), m_new
    lse = (m + tl.log2(total)) * LN2
    target = tl.load(target_ptr + row)
    z = tl.load(logits_ptr + target, (target >= 0) & (target < V), float("nan")).to(tl.float32) * scale * LN2
    tl.store(nll_ptr + row, tl.where(target >= 0, lse - z, 0.0))  # NaN for a target that is no word
    tl.store(lse_ptr + row, lse)


@_jit
def _nll_backward(
    logits_ptr, target_ptr, lse_ptr, grad_ptr, temperature, first, n, ONES: tl.constexpr, BLOCK: tl.constexpr
):
    """Logits of words first … first + n - 1 → their gradients, in place. ONES: grad is 1 throughout."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    temperature = tl.full((), temperature, tl.float32)
    target = tl.load(target_ptr + row)
    grad = tl.where(target >= 0, 1.0 if ONES else tl.load(grad_ptr + row), 0.0) / temperature
    z = tl.load(logits_ptr + row * n + at, at < n, 0.0).to(tl.float32)
    p = tl.exp2((z / temperature - tl.load(lse_ptr + row)) * LOG2E)
    dz = grad * (p - tl.where(first + at == target, 1.0, 0.0))
    tl.store(logits_ptr + row * n + at, dz.to(logits_ptr.dtype.element_ty), at < n)


def _chunks(n: int, width: int, larger: int = 1) -> list[tuple[int, int]]:
    """(begin, end) of even parts of n rows of logits, in multiples of 64 rows: at most CHUNK_NUMBERS each, or
    `larger` times as many where FEW parts are enough then."""
    most = max(1, CHUNK_NUMBERS // max(1, width) // 64) * 64
    parts = max(1, -(-n // most))
    parts = min(parts, FEW) if parts <= FEW * larger else parts
    size = max(1, -(-n // (64 * parts))) * 64
    return [(i, min(i + size, n)) for i in range(0, n, size)]


def loss_memory(tokens: int, hidden: int, vocab: int, size: int) -> int:
    """Bytes of a chunk of logits and of dW, in numbers of `size` bytes, in linear_nll_sum()."""
    chunks = _chunks(tokens, vocab, LARGER)
    summed = 0 if len(chunks) <= FEW or size == 4 else 4  # in fp32, beside the part that is added
    return min(tokens, chunks[0][1]) * vocab * size + vocab * hidden * (size + summed)


@_op("octo::linear_nll")
def _linear_nll(h: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """h (N, C), weight (V, C), targets (N,) → negative log-likelihoods and log-sum-exps (N,), in fp32."""
    targets, N, V = targets.contiguous(), h.shape[0], weight.shape[0]
    nll, lse = h.new_empty(N, dtype=torch.float32), h.new_empty(N, dtype=torch.float32)
    for a, b in _chunks(N, V):
        logits = h[a:b] @ weight.t()
        _wrap(_nll_forward)[(b - a,)](logits, targets[a:b], nll[a:b], lse[a:b], temperature, V=V, **_NLL_TILE)
        del logits  # before the next are made
    return nll, lse


@_op("octo::linear_nll_backward")
def _linear_nll_grad(h: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, grad: Tensor,
                     temperature: float) -> tuple[Tensor, Tensor]:
    """Gradients to h and weight; grad (N,): to the losses. By chunks of words: a row of dW is made once."""
    targets, lse, grad, N = targets.contiguous(), lse.contiguous(), grad.contiguous(), h.shape[0]
    dh, dw = h.new_zeros(h.shape, dtype=torch.float32), torch.empty_like(weight)
    for a, b in _chunks(weight.shape[0], N):
        logits = h @ weight[a:b].t()
        backward = _wrap(_nll_backward)[(N, triton.cdiv(b - a, _NLL_TILE["BLOCK"]))]
        backward(logits, targets, lse, grad, temperature, a, b - a, ONES=False, **_NLL_TILE)
        dh += logits @ weight[a:b]
        dw[a:b] = logits.t() @ h
        del logits
    return dh.to(h.dtype), dw


@_op("octo::linear_nll_sum")
def _linear_nll_sum(h: Tensor, weight: Tensor, targets: Tensor,
                    temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the negative log-likelihoods (), each of them (N,), the sum's gradients to h and weight."""
    targets, N, V = targets.contiguous(), h.shape[0], weight.shape[0]
    nll, lse = h.new_empty(N, dtype=torch.float32), h.new_empty(N, dtype=torch.float32)
    chunks, dh = _chunks(N, V, LARGER), torch.empty_like(h)
    # dW is a sum over chunks. A few are added in its own dtype; more would add up rounding errors of bf16. (A
    # sum in fp32 takes time, and as much memory as the larger chunks.)
    dw = weight.new_zeros(weight.shape, dtype=weight.dtype if len(chunks) <= FEW else torch.float32)
    for a, b in chunks:
        logits = h[a:b] @ weight.t()
        _wrap(_nll_forward)[(b - a,)](logits, targets[a:b], nll[a:b], lse[a:b], temperature, V=V, **_NLL_TILE)
        backward = _wrap(_nll_backward)[(b - a, triton.cdiv(V, _NLL_TILE["BLOCK"]))]
        backward(logits, targets[a:b], lse[a:b], lse, temperature, 0, V, ONES=True, **_NLL_TILE)
        dh[a:b] = logits @ weight
        if dw.dtype == weight.dtype:
            dw.addmm_(logits.t(), h[a:b])
        else:
            dw += logits.t() @ h[a:b]
        del logits
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

# ---- Weights: initialised; Hugging Face checkpoints in and out ---------------------------------------------


@torch.no_grad()
def initialise(model: Llama, seed: int) -> Llama:
    """Normal(0, 1 / sqrt(fan-in)); the projections back into the residual stream over sqrt(2 layers)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        # The embedding too: as the output projection its fan-in is the width. GPT-2's fixed 0.02 makes
        # attention so flat at width 128 that copying is learned later (tests/bench_cpu.py).
        std = p.shape[1] ** -0.5
        if name.endswith(("o.weight", "down.weight")):
            std /= math.sqrt(2 * model.config.num_layers)
        assign(p, torch.randn(p.shape, generator=generator) * std)
    return model


_HF_NAMES = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}
# Our name, Hugging Face's, and what a config.json without it means: None is an error, 0 follows from others.
_HF_CONFIG = (
    ("vocab_size", "vocab_size", None), ("num_layers", "num_hidden_layers", None),
    ("hidden_size", "hidden_size", None), ("num_heads", "num_attention_heads", None),
    ("num_kv_heads", "num_key_value_heads", 0), ("head_dim", "head_dim", 0),
    ("intermediate_size", "intermediate_size", None), ("rope_theta", "rope_theta", 10_000.0),
    ("rms_norm_eps", "rms_norm_eps", 1e-6), ("tie_embeddings", "tie_word_embeddings", False),
    ("max_position", "max_position_embeddings", 2048),
)


def hf_name(name: str) -> str:
    """Our name of a tensor → theirs: blocks.3.attn.q.weight → model.layers.3.self_attn.q_proj.weight."""
    module, kind = name.rsplit(".", 1)  # kind: weight, or bias
    *layer, module = module.split(".", 2)  # of a block: ["blocks", "3"], "attn.q"
    block = f"model.layers.{layer[1]}." if layer else ""
    return f"{block}{_HF_NAMES[module]}.{kind}"


def config_from_hf(hf: dict) -> LlamaConfig:
    """A LlamaConfig from config.json, with `rope_theta` and `rope_scaling` or the newer `rope_parameters`.

    ValueError, naming the field, if one is missing or asks for what this Llama does not have.
    """
    if (quantised := hf.get("quantization_config")) is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(f"config.json says quantization_config: {kind}; take the bf16 weights behind it")
    if (family := hf.get("model_type")) not in ("llama", "qwen2"):
        raise ValueError(f'config.json says model_type "{family}"; what can be read: llama, qwen2')
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if hf.get(key):
            raise ValueError(f"config.json says {key}: true, which this Llama does not have")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f'config.json says hidden_act "{hf["hidden_act"]}", this Llama has silu')
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f'rope scaling of type "{kind}" is not supported; valid: default, llama3')
    try:
        ours = {a: hf[b] if default is None else hf.get(b, default) for a, b, default in _HF_CONFIG}
        scaling = {key: rope[key] for key in _SCALING} if kind == "llama3" else None
    except KeyError as missing:
        raise ValueError(f"config.json has no {missing}, which a Llama needs") from None
    ours["num_kv_heads"] = ours["num_kv_heads"] or ours["num_heads"]
    ours["head_dim"] = ours["head_dim"] or ours["hidden_size"] // ours["num_heads"]
    ours["rope_theta"] = rope.get("rope_theta", ours["rope_theta"])
    return LlamaConfig(**ours, rope_scaling=scaling, qkv_bias=family == "qwen2")


def config_to_hf(config: LlamaConfig, dtype: str) -> dict:
    """config.json for transformers and the engines that read its files."""
    family = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
    if not config.qkv_bias:  # Qwen's configuration has no words for biases
        family = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        family |= {"attention_bias": False, "mlp_bias": False}
    shape = {theirs: getattr(config, ours) for ours, theirs, _ in _HF_CONFIG}
    scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
    return family | shape | {"rope_scaling": scaling, "hidden_act": "silu", "torch_dtype": dtype}


def read_weights(path: str, model: Llama) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of a folder's safetensors, one after the other: every one of model's, and no other.

    ValueError, naming the tensor, if one is missing, unknown, quantised or not of the model's shape.
    """
    from safetensors import SafetensorError, safe_open
    expected = {hf_name(k): (k, tuple(v.shape)) for k, v in model.named_parameters()}
    missing = set(expected)
    for file, wanted in weight_files(path).items():
        file = os.path.join(path, file)
        try:
            with safe_open(file, framework="pt") as f:
                if wanted and (absent := wanted - set(f.keys())):
                    raise ValueError(f"{file} lacks tensor {min(absent)}, which {INDEX} says it has")
                for name in sorted(wanted or f.keys()):
                    if name == "lm_head.weight" and model.config.tie_embeddings:
                        continue  # some exporters write the tied matrix twice
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # older ones wrote what follows from config.json
                    if name not in expected:
                        raise ValueError(f"{file} has tensor {name}, which this Llama does not have")
                    (ours, shape), tensor = expected[name], f.get_tensor(name)
                    if not tensor.is_floating_point() or tensor.itemsize < 2:
                        what = f"{name} is {tensor.dtype}".replace("torch.", "")
                        raise ValueError(f"{file}: {what}, quantised; take the bf16 weights behind it")
                    if (found := tuple(tensor.shape)) != shape:
                        file = os.path.basename(file)
                        raise ValueError(f"{file}: {name} has shape {found}, config.json says {shape}")
                    missing.discard(name)
                    yield ours, tensor
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}): is it cut off?") from None
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of {len(expected)} tensors, {min(missing)} among them")


@torch.no_grad()
def assign(p: Tensor, value: Tensor) -> None:
    """p ← value in p's dtype; under FSDP2, where every rank has the same value, this rank's part of it."""
    if hasattr(p, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor  # half a second
        value = distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(value)


def load_pretrained(model: Llama, path: str) -> None:
    """Fill a model of this shape, whole or sharded by FSDP2, from a checkpoint folder; it keeps its dtype.

    Called by every rank, which reads one tensor at a time and keeps its part: no second copy of the model.
    """
    parameters, model.generation = dict(model.named_parameters()), read_generation(path)
    if not weight_files(path):
        return load_state(path, {"model": model.state_dict()}, no_dist=True)  # not collective
    for name, tensor in read_weights(path, model):
        assign(parameters[name], tensor)


def load_state(path: str, state: dict, **options) -> None:
    """Fill the tensors of `state`, whole or sharded, from the state/ of a training checkpoint."""
    import torch.distributed.checkpoint as dcp
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # in one process
    try:
        dcp.load(state, checkpoint_id=os.path.join(path, "state"), **options)
    except dcp.CheckpointException as error:
        raise ValueError(f"{path} cannot be loaded: {next(iter(error.failures.values()))[0]}") from None


def read_generation(path: str) -> dict:
    return read_json(os.path.join(path, "generation_config.json"), missing_ok=True) or {}


def write_weights(path: str, state: dict[str, Tensor], dtype: torch.dtype | None = None, limit=4.9e9) -> None:
    """Full tensors as safetensors of at most `limit` bytes, in `dtype` (None: their own), a file at a time:
    model.safetensors, or several and an index that says which tensor is where."""
    from safetensors.torch import save_file
    os.makedirs(path, exist_ok=True)
    files, room, sizes = [], 0, {k: v.numel() * (dtype or v.dtype).itemsize for k, v in state.items()}
    for name, size in sizes.items():
        if size > room:
            files, room = [*files, []], limit
        files[-1].append(name)
        room -= size
    where = {}
    for i, names in enumerate(files, 1):
        file = f"model-{i:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        weights = {hf_name(name): state[name].detach().to("cpu", dtype).contiguous() for name in names}
        save_file(weights, os.path.join(path, file), metadata={"format": "pt"})
        where |= dict.fromkeys(weights, file)
    if len(files) > 1:
        size = {"total_size": sum(sizes.values())}
        write_json(os.path.join(path, INDEX), {"metadata": size, "weight_map": where})


def write_settings(path: str, model: Llama, dtype: torch.dtype, tok) -> None:
    """config.json and, with a Tokenizer, its files and generation_config.json: what that of the model's
    origin said, and the ids at which the sampler stops."""
    config = config_to_hf(model.config, str(dtype).removeprefix("torch."))
    if tok:
        stops = tok.stops(model.generation)
        ids = {"bos_token_id": tok.bos_id, "eos_token_id": list(stops) if stops[1:] else stops[0]}
        # No padding in config.json: transformers never trains the embedding of what stands there.
        generation = model.generation | ids | {"pad_token_id": tok.pad_id}
        write_json(os.path.join(path, "generation_config.json"), generation)
        tok.save_pretrained(path)
        config |= ids
    write_json(os.path.join(path, "config.json"), config)

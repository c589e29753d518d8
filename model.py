"""A Llama in plain PyTorch: Llama 3.1 / 3.2 as published, and small ones of the same kind.

Read it top to bottom: the configuration and its presets, RMSNorm, rotary embedding, attention over packed documents (and
over a KV cache), the block, the model, checkpoints in Hugging Face's layout. The choices that matter:

1. Packed documents. A row of tokens holds several documents; `doc_start` (B, T) says for each token where its document
   begins in the row. Attention never looks before it, and positions count from it. A fixed-shape tensor, so that nothing
   recompiles when the lengths change.
2. Weights stay in fp32 and are cast where they are used: `compute_dtype` decides what the activations run in. Under FSDP2
   with a bf16 policy the weights arrive in bf16 already and the cast does nothing.
3. The loss is computed inside `forward`, in chunks of tokens, so that the (tokens x vocabulary) logits of a 128,256-word
   vocabulary never exist at once. Its unit is one number a token: the caller decides what to average over.
4. Nothing here knows about GPUs, ranks or optimizers: parallelism is applied from outside (midtrain.py).
"""

import json
import math
import os
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    """A linear map without bias whose weight is cast to the activations' dtype where it is used."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019), statistics in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


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
    """cos and sin, each (B, T, 1, head_dim / 2) in fp32: in bf16, positions past 256 would already collide."""
    angles = positions[:, :, None, None].float() * inv_freq  # (B, T, 1, D/2)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x[i], x[i + D/2]) of x (B, T, H, D) by their angles: the half-split layout of Hugging Face."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Attention: over packed documents (training) and over a KV cache (sampling)


def document_mask(doc_start: Tensor, dtype: torch.dtype) -> Tensor:
    """Added to attention scores, (B, 1, T, T): 0 where token i sees j, doc_start[i] <= j <= i, and -inf elsewhere."""
    j = torch.arange(doc_start.shape[1], device=doc_start.device)
    hidden = (j < doc_start[:, :, None]) | (j > j[:, None])
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal grouped-query attention. q (B, T, H, D), k and v (B, T, K, D), mask (B, 1, T, T) or None → (B, T, H, D)."""
    B, T, H, D = q.shape
    K = k.shape[2]
    if mask is not None and q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 512:
        # Two matrix products: measured 1.5x as fast, forward and backward, as torch's fused kernel in bf16 on a CPU.
        q = (q * D**-0.5).view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)  # (B, K, G*T, D)
        scores = (q @ k.permute(0, 2, 3, 1)).view(B, K, H // K, T, T)
        probs = (scores + mask[:, :, None]).softmax(-1).view(B, K, -1, T)
        return (probs @ v.transpose(1, 2)).view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
    k, v = (x.repeat_interleave(H // K, dim=2).transpose(1, 2) for x in (k, v))  # (B, H, T, D)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2)


class KVCache:
    """Keys and values of past tokens, one slot a sequence.

    k, v: (num_layers, slots, num_kv_heads, max_len, head_dim); lengths: (slots,) int64, the tokens present in each slot.
    A forward with a cache takes tokens (B, T) as the continuation of slots 0..B-1 and writes their keys and values behind
    what is there. It does not advance `lengths`: the caller adds the true lengths, and right padding is never seen again.
    """

    def __init__(self, config: LlamaConfig, slots: int, max_len: int, dtype=torch.float32, device="cpu"):
        shape = (config.num_layers, slots, config.num_kv_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.max_len = max_len

    def copy_row(self, source: "KVCache", src: int, dst: int, length: int) -> None:
        """Copy the first `length` tokens of slot `src` of `source` into slot `dst` of this cache."""
        self.k[:, dst, :, :length] = source.k[:, src, :, :length]
        self.v[:, dst, :, :length] = source.v[:, src, :, :length]
        self.lengths[dst] = length

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v (B, T, K, D) of slots 0..B-1 at positions (B, T)."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.k[layer][rows, :, positions] = k.to(self.k.dtype)
        self.v[layer][rows, :, positions] = v.to(self.v.dtype)


def cached_attention(q: Tensor, cache: KVCache, layer: int, mask: Tensor) -> Tensor:
    """Attention of q (B, T, H, D) to slots 0..B-1 of the cache; mask (B, 1, T, max_len) is added → (B, T, H, D).

    The query heads of one KV head are rows of one matrix product, so that the cache is read once for all of them. It is
    read as far as it is allocated: on a CPU, bf16 products of whole matrices take a third of the time of those of slices.
    """
    B, T, H, D = q.shape
    k, v = cache.k[layer, :B], cache.v[layer, :B]  # (B, K, L, D)
    K, L = k.shape[1:3]
    q = (q * D**-0.5).view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)  # (B, K, G*T, D)
    scores = (q @ k.transpose(2, 3)).view(B, K, H // K, T, L).add_(mask[:, :, None])
    probs = scores.softmax(-1).view(B, K, -1, L)
    return (probs @ v).view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o = Linear(config.num_heads * config.head_dim, config.hidden_size)

    def forward(self, x, rope, mask, positions, cache, layer):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.q, self.k, self.v))  # (B, T, H or K, D)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is None:
            out = attention(q, k, v, mask)
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


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, positions=None, cache=None, layer=0):
        x = x + self.attn(self.attn_norm(x), rope, mask, positions, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


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
                p.fill_(1.0)
                continue
            std = p.shape[1] ** -0.5  # the embedding too: as the output projection its fan-in is the width
            if name.endswith(("o.weight", "down.weight")):
                std /= math.sqrt(2 * self.config.num_layers)
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        return self

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        doc_start: Tensor | None = None,
        temperature: float = 1.0,
        cache: KVCache | None = None,
    ) -> Tensor:
        """tokens (B, T) int64 → logits (B, T, vocab) in fp32; with targets (B, T) → negative log-likelihoods (B, T) in fp32.

        The likelihoods are of logits / temperature; targets below 0 are ignored and give 0. doc_start (B, T) holds the
        index, within the row, of the first token of each token's document; None means one document a row.
        """
        h = self.hidden(tokens, doc_start, cache)
        return self.logits(h) if targets is None else self.nll(h, targets, temperature)

    def hidden(self, tokens: Tensor, doc_start: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) → the last layer's normalised activations (B, T, hidden), in compute_dtype."""
        B, T = tokens.shape
        positions = torch.arange(T, device=tokens.device).expand(B, T)
        if cache is not None:
            assert doc_start is None, "a cache holds one document a slot"
            positions = positions + cache.lengths[:B, None]
            unseen = torch.arange(cache.max_len, device=tokens.device) > positions[:, :, None]  # (B, T, L)
            mask = torch.zeros(unseen.shape, dtype=self.compute_dtype, device=tokens.device)
            mask = mask.masked_fill_(unseen, -torch.inf)[:, None]
        elif doc_start is not None:
            positions, mask = positions - doc_start, document_mask(doc_start, self.compute_dtype)
        else:
            mask = None
        rope = rope_tables(self.inv_freq, positions)
        x = self.embed(tokens).to(self.compute_dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, positions, cache, layer)
        return self.norm(x)

    def logits(self, h: Tensor) -> Tensor:
        """Activations (..., hidden) → logits (..., vocab) in fp32."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return F.linear(h, weight.to(h.dtype)).float()

    def nll(self, h: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """-log softmax(logits / temperature)[target] for each token: h (B, T, hidden), targets (B, T) → (B, T) fp32.

        Above LOGITS_BUDGET numbers the logits are made chunk by chunk and again in the backward pass, never all at once.
        """
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
        return F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="none")

    @staticmethod
    def from_pretrained(path: str) -> "Llama":
        """A model from a folder with config.json and *.safetensors; weights keep the dtype they are stored in."""
        config = config_from_hf(read_json(os.path.join(path, "config.json")))
        with torch.device("meta"):
            model = Llama(config)
        model.load_state_dict(read_weights(path, config), assign=True)
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


LOGITS_BUDGET = 1 << 25  # numbers: 128 MiB in fp32, 261 tokens of Llama 3's vocabulary

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
    return f"model.layers.{layer}.{_HF_NAMES[rest.removesuffix('.weight')]}.weight"


def read_json(path: str) -> dict:
    try:
        with open(path) as f:
            value = json.load(f)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found: a checkpoint folder holds config.json and *.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def config_from_hf(hf: dict) -> LlamaConfig:
    """A LlamaConfig from config.json, with `rope_theta` and `rope_scaling` or the newer `rope_parameters`."""
    if hf.get("model_type") != "llama":
        raise ValueError(f'config.json says model_type "{hf.get("model_type")}", only "llama" can be read')
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ValueError(f"config.json says {key}: true, which this Llama does not have")
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", hf.get("rope_theta", 10_000.0))
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
        )
    except KeyError as missing:
        raise ValueError(f"config.json has no {missing}, which a Llama needs") from None


def config_to_hf(config: LlamaConfig, dtype: str) -> dict:
    """config.json for transformers and the engines that read its files."""
    scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }


def read_weights(path: str, config: LlamaConfig) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder under our names; every one expected is there with its shape, and no other."""
    from safetensors import SafetensorError, safe_open

    with torch.device("meta"):
        expected = {hf_name(k): (k, tuple(v.shape)) for k, v in Llama(config).state_dict().items()}
    files = sorted(f for f in os.listdir(path) if f.endswith(".safetensors"))
    state = {}
    for file in files:
        try:
            with safe_open(os.path.join(path, file), framework="pt") as f:
                for name in f.keys():
                    if name == "lm_head.weight" and config.tie_embeddings:
                        continue  # some exporters write the tied matrix twice
                    if name not in expected:
                        raise ValueError(
                            f"{os.path.join(path, file)} has tensor {name}, which this Llama does not have"
                        )
                    ours, shape = expected[name]
                    state[ours] = f.get_tensor(name)
                    if tuple(state[ours].shape) != shape:
                        found = tuple(state[ours].shape)
                        raise ValueError(f"{file}: {name} has shape {found}, config.json says {shape}")
        except SafetensorError as error:
            raise ValueError(f"{os.path.join(path, file)} cannot be read ({error}): is it cut off?") from None
    missing = sorted(set(k for k, _ in expected.values()) - set(state))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of {len(expected)} tensors, {hf_name(missing[0])} among them")
    return state


def with_vocab(config: LlamaConfig, vocab_size: int) -> LlamaConfig:
    """The same shape for another vocabulary (tiny and small presets take their tokenizer's)."""
    return replace(config, vocab_size=vocab_size)

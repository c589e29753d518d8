"""The sampler: many completions at once from the model in training, and a command line to talk to it.

    python sample.py --ckpt runs/tiny/long "Tom has 3 apples and buys 4 more. How many?"
    python sample.py --ckpt runs/tiny/long                     # without a prompt: a conversation
    completions = Sampler(model, tokenizer).generate([tokenizer.encode("2 + 2 =")], n=4, max_new_tokens=32)

1. Continuous batching (Orca, Yu et al. 2022). The rows in progress are slots 0..B-1 of one KV cache. When a
   row ends, the last one moves into its slot and a waiting one takes the slot behind: no finished row is
   computed. On a GPU the cache is paged: rows take blocks as they grow. When none is free, the last row is
   preempted: it frees its blocks, and its prompt and tokens are computed again later.
2. A group shares its prompt. Its n samples cost one forward of it; each copies the prompt's keys and values,
   or in a paged cache refers to the whole blocks of them.
3. Random numbers are counted, not consumed: token t of sample j of request i is drawn with the hash of (seed,
   i, j, t). So in fp32 a rollout depends on nothing around it: neighbours, slot, order, ranks, preemption. In
   bf16, products of another shape round differently, and a draw near the border of two tokens may change.
4. What is sampled is what is trained: softmax(logits / temperature) of the model's own weights, unless asked
   otherwise. Every token comes with its log-probability under the distribution it was drawn from.
5. A model may calculate (max_calls): behind <calc>47+38</calc> it is given <result>85</result> and goes on.
   These tokens take the place of what was drawn: neighbours and random numbers are as they were.
"""

import codecs
import math
import os
import sys
from argparse import BooleanOptionalAction
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import files
from data.prompts import CALL, END_CALL, END_RESULT, RESULT, STOP, TEMPLATES
from data.recipes import TOOL_SOURCES
from data.tokenizer import load as load_tokenizer
from model import DTYPES, KVCache, Llama, LlamaConfig, has_bf16, has_kernels, pick_device, read_generation
from verify import ERROR, calculate

PREFILL_TOKENS = 4096  # in prompts computed together, padding included: enough to fill the processor
CACHE_CHUNK = 64  # tokens of room behind the longest prompt in a dense cache; it grows by this or an eighth
LOOK_EVERY = 8  # tokens between two looks of the host at what a GPU has done: each look waits for it
MAX_CALLS = 16  # of the calculator in a completion


@dataclass
class Completion:
    tokens: list[int]  # as sampled, with the stop token or the token that completed a stop string
    logprobs: list[float]  # of each token, under the distribution it was drawn from
    text: str  # without what stopped it; "" if the sampler has no tokenizer
    finish_reason: str  # "stop" | "length"
    given: list[bool] | None = None  # of each token: is it a result, and not sampled? None: no calculator
    results: tuple[str, ...] = ()  # of its calls, in their order


# ---- Sampling parameters, random numbers, when to stop -----------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn from logits. top_p = 1, top_k = 0 and min_p = 0 switch truncation off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self):
        shares = 0 <= self.top_p <= 1 and 0 <= self.min_p <= 1
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and shares):
            raise ValueError(f"{self}: temperature and top_k must be >= 0, top_p and min_p between 0 and 1")

    def draw(self, logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """logits (B, V) fp32, uniforms u (B, n) → n tokens per row (B, n), their log-probabilities (B, n)."""
        if self.temperature == 0:
            token = logits.argmax(-1, keepdim=True)
            logp = logits.gather(1, token) - logits.logsumexp(-1, keepdim=True)
            return token.expand_as(u), logp.expand_as(u)
        probs = torch.softmax(logits if self.temperature == 1 else logits / self.temperature, -1)
        if self.top_k or self.top_p < 1 or self.min_p:
            probs = truncate(probs, self.top_p, self.top_k, self.min_p)
        token = inverse_cdf(probs, u)
        return token, probs.gather(1, token).log()


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """probs (B, V), u (B, n) in [0, 1) → tokens (B, n): the first at which the cumulated mass exceeds u."""
    # A GPU sums a single row by blocks, in the order in which they happen to finish; two rows it does not.
    cdf = (probs.repeat(2, 1) if probs.is_cuda and len(probs) == 1 else probs).cumsum(-1)[: len(probs)]
    total = cdf[:, -1:]  # u is a share of this, not of 1: rounding cannot run off the end
    below = torch.nextafter(total, torch.zeros_like(total))  # u * total may round up to total itself
    token = torch.searchsorted(cdf, torch.minimum(u.to(cdf.dtype) * total, below), right=True)
    token = token.clamp_(max=probs.shape[1] - 1)  # only if probs are not numbers, which the caller finds out
    if cdf.is_cuda:  # a parallel scan need not be monotone in its last bit: an impossible token may come out
        token = torch.where(probs.gather(1, token) > 0, token, probs.argmax(-1, keepdim=True))
    return token


# Each sample owns a SplitMix64 stream (Steele, Lea & Flood 2014), addressed by position. The constants
# are the published ones as int64: torch has no arithmetic on uint64, but int64 wraps in the same way.
_GOLDEN, _MIX1, _MIX2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def stream_keys(seed: int, request_ids: Sequence[int], n: int) -> Tensor:
    """Where the streams of n samples of each request start: (requests, n) int64."""
    seed, ids = torch.tensor(seed % 2**63), torch.tensor(request_ids, dtype=torch.int64)[:, None]
    return _mix(_mix(_mix(seed + _GOLDEN) ^ (ids + _GOLDEN)) ^ (torch.arange(n) + _GOLDEN))


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1) of the streams `keys` at `positions` (int64, one shape) → float64, 53 random bits."""
    return ((_mix(keys + (positions + 1) * _GOLDEN) >> 11) & (2**53 - 1)).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of int64. (>> repeats the sign of a number: & masks that away.)"""
    for bits, factor in ((30, _MIX1), (27, _MIX2), (31, 1)):
        x = (x ^ ((x >> bits) & (2 ** (64 - bits) - 1))) * factor
    return x


class Stop:
    """Token ids and strings that end a completion. A string may begin and end inside a token or character."""

    def __init__(self, stop: Sequence[int | str], tokenizer, vocab_size: int, device, calls: bool = False):
        """calls: look also at what may end a call of the calculator."""
        self.tokenizer = tokenizer
        self.ids = {item for item in stop if not isinstance(item, str)}
        self.strings = [item.encode() for item in stop if isinstance(item, str)]
        if not all(0 <= token < vocab_size for token in self.ids):
            raise ValueError(f"stop ids {sorted(self.ids)} must be below the vocabulary's size {vocab_size}")
        if self.strings and tokenizer is None:
            raise ValueError("stop strings need a tokenizer; without one, give token ids")
        if b"" in self.strings:
            raise ValueError("a stop string is empty; use stop=() for nothing that stops")
        wanted = [*self.strings, *([END_CALL.encode()] if calls else [])]
        self.pieces = [tokenizer.decode_bytes([i]) if wanted else b"" for i in range(vocab_size)]
        tails = tuple(s[i:] for s in wanted for i in range(len(s)))  # what completes s begins with one
        ends = [piece.startswith(tails) or any(s in piece for s in wanted) for piece in self.pieces]
        look = [ends[i] or i in self.ids for i in range(vocab_size)]
        self.look = torch.tensor(look, device=device)  # (V,): the tokens after which ends() can be true
        self.window = max(map(len, self.strings), default=0)  # in tokens, each of which has at least one byte

    def ends(self, tokens: list[int], own: int = 0) -> bool:
        """Whether the last of these tokens completes a stop. Those before it are known not to, and the first
        `own` have no part in one."""
        tail = tokens[max(own, len(tokens) - self.window) :] if self.strings else []
        data = b"".join(self.pieces[token] for token in tail)
        return len(tokens) > own and (tokens[-1] in self.ids or any(s in data for s in self.strings))

    def visible(self, tokens: list[int], own: int = 0) -> bytes:
        """The bytes of the tokens up to what stopped them, which was none of the first `own`."""
        if self.tokenizer is None:
            return b""
        given, tokens = tokens[:own], tokens[own:]
        data = self.tokenizer.decode_bytes(tokens[:-1] if tokens and tokens[-1] in self.ids else tokens)
        data = data[: min((data.find(s) for s in self.strings if s in data), default=None)]
        return self.tokenizer.decode_bytes(given) + data

    def settled(self, tokens: list[int], own: int = 0) -> bytes:
        """Of a completion in progress, the bytes that stay whatever follows: no start of a stop string."""
        data = self.visible(tokens, own)
        held = max((n for s in self.strings for n in range(1, len(s)) if data.endswith(s[:n])), default=0)
        return data[: len(data) - held]


# ---- The rollout: prefill a prompt once, decode a token for all rows, retire what ended, refill the slots --


@dataclass
class Row:
    """One sample of a prompt."""

    prompt: Sequence[int]
    limit: int  # of its tokens
    key: int  # of its random stream
    tokens: list[int] = field(default_factory=list)  # sampled, when the host last looked
    logprobs: list[float] = field(default_factory=list)
    start: tuple[KVCache, int] | None = None  # where its prompt was computed, until it has a slot
    final: bool = False  # of its group's rows, the last to need that
    blocks: list[int] = field(default_factory=list)  # of a paged cache, in the order of the row
    completion: Completion | None = None
    calls: list[tuple[int, list[int], str]] = field(default_factory=list)  # where a result begins, ids, text

    @property
    def own(self) -> int:  # where the tokens begin that it sampled after the last result
        return self.calls[-1][0] + len(self.calls[-1][1]) if self.calls else 0

    @property
    def cached(self) -> int:  # tokens with keys and values: all but the last
        return len(self.prompt) + len(self.tokens) - 1


class DenseCache:
    """A KV cache of one row per slot, as long as the longest row needs. PagedCache does it in blocks."""

    def __init__(self, model: Llama, slots: int, length: int, longest: int):
        self.model, self.longest = model, longest  # tokens that any row may reach
        self.kv, self.graphs = new_cache(model, slots, min(length, longest)), {}  # graphs of steps with it

    def admit(self, row: Row, slot: int) -> bool:
        """Put what a row starts with into a slot. False: there is no room for it now."""
        self.kv.copy(*row.start, 0, row.cached, slot)
        return True

    def reserve(self, rows: list[Row], tokens: int) -> bool:
        """Make room for so many more tokens per row. False: the last row must be preempted first."""
        old, needed = self.kv, min(self.longest, tokens + max(row.cached for row in rows))
        if needed > old.max_len:
            length = max(needed, old.max_len + max(CACHE_CHUNK, old.max_len // 8))
            self.kv, self.graphs = new_cache(self.model, len(old.lengths), min(length, self.longest)), {}
            self.kv.k[..., : old.max_len, :], self.kv.v[..., : old.max_len, :] = old.k, old.v
            self.kv.lengths = old.lengths
        if self.kv.k.dtype == torch.float32:  # bf16 products of slices take a CPU three times as long
            self.kv.reach = min(self.kv.max_len, -(-needed // 16) * 16)
        return True

    def remove(self, rows: list[Row], slot: int) -> None:
        """Take back the room of the row in a slot; the row of the last slot moves there."""
        if slot < (last := len(rows) - 1):
            self.kv.copy(self.kv, last, 0, rows[last].cached, slot)


class Rollout:
    """The samples of one call: groups whose prompt waits, rows ready for a slot, rows in slots 0..B-1.

    The state of the slots lies on the device, and a row that ended stands still. So the host of a GPU need
    not look at every token, and every step is the same work on the same tensors, which a CUDA graph repeats.
    """

    def __init__(self, model: Llama, groups: list[list[Row]], params: SamplingParams, stop: Stop, cache,
                 tool: "Calculator | None" = None):
        """groups: the rows of each prompt; cache: a DenseCache or PagedCache, which has the slots."""
        self.model, self.groups, self.params, self.stop, self.cache = model, groups, params, stop, cache
        self.tool, self.given = tool, None
        self.waiting, self.ready, self.rows = deque(groups), deque(), []
        self.slots, self.device = len(cache.kv.lengths), model.embed.weight.device
        with self.device:
            self.state = torch.zeros(4, self.slots, dtype=torch.int64)
            self.ended = torch.ones(self.slots, dtype=torch.bool)
            self.drawn = torch.zeros(self.slots, LOOK_EVERY, dtype=torch.int64)  # since the host looked
            self.logprobs, self.column = torch.zeros(self.slots, LOOK_EVERY), self.state.new_zeros(1)
        self.last, self.count, self.limit, self.key = self.state  # the last token, how many, at most; stream
        if tool:  # by slot and place in its row: the token of a result, or -1
            longest = max((row.limit for group in groups for row in group), default=0)
            self.given = self.state.new_full((self.slots, longest + 1), -1)
        self.look_every = LOOK_EVERY if self.device.type == "cuda" else 1
        sharded = hasattr(model, "unshard")  # a method of FSDP2
        self.use_graphs = has_kernels(model.embed.weight, model.config.head_dim) and not sharded

    @torch.inference_mode()
    def step(self) -> bool:
        """Refill the slots, draw a token per row (on a GPU several), retire. False: nothing is left to do."""
        while len(self.rows) < self.slots and (self.ready or self.waiting):
            if not self.ready:
                self._prefill()
            elif not self._place():
                break
        if not self.rows:
            return False
        tokens = min(self.look_every, max(row.limit - len(row.tokens) for row in self.rows))
        while not self.cache.reserve(self.rows, tokens):
            self.preempt()
        decode = decode_by_graph if self.use_graphs else Rollout.decode
        for _ in range(tokens):
            decode(self, len(self.rows))
        self._retire(tokens)
        return True

    def _prefill(self) -> None:
        """One forward of waiting prompts, as many as PREFILL_TOKENS holds; draw each sample's first token."""
        batch, width = [], 0
        while self.waiting:
            width = max(width, len(self.waiting[0][0].prompt))
            if batch and (len(batch) + 1) * width > PREFILL_TOKENS:
                break
            batch.append(self.waiting.popleft())
        prompts = [torch.tensor(group[0].prompt, dtype=torch.int64) for group in batch]
        tokens = pad_sequence(prompts, batch_first=True).to(self.device)  # (b, width)
        cache = new_cache(self.model, *tokens.shape)
        h = self.model.hidden(tokens, cache=cache)
        h = h[range(len(batch)), [len(prompt) - 1 for prompt in prompts]]  # (b, hidden) at the last tokens
        keys = torch.tensor([[row.key for row in group] for group in batch], device=self.device)  # (b, n)
        first, logprobs = self.params.draw(self.model.logits(h), uniforms(keys, torch.zeros_like(keys)))
        for b, (group, *drawn) in enumerate(zip(batch, first.tolist(), logprobs.tolist())):
            for row, token, logprob in zip(group, *drawn):
                row.tokens, row.logprobs, row.start = [token], [logprob], (cache, b)
            self.ready += [row for row in group if not self._finish(row)]
            if self.ready:
                self.ready[-1].final = True

    def _place(self) -> bool:
        """Put the first row that is ready into the slot behind the others. False: there is no room now."""
        row, slot = self.ready[0], len(self.rows)
        if not self.cache.admit(row, slot):
            return False
        self.rows.append(self.ready.popleft())
        row.start = None  # what was computed is freed with its last row
        self.state[:, slot] = torch.tensor([row.tokens[-1], len(row.tokens), row.limit, row.key])
        self.cache.kv.lengths[slot], self.ended[slot] = row.cached, False
        if self.tool:
            self.given[slot] = -1
            self._give(row, slot)
        return True

    def decode(self, B: int) -> None:
        """One token for slots 0..B-1. Nothing here depends on what is computed, and nothing is read back."""
        h = self.model.hidden(self.last[:B, None], cache=self.cache.kv)[:, 0]  # (B, hidden)
        u = uniforms(self.key[:B], self.count[:B])
        token, logprob = self.params.draw(self.model.logits(h), u[:, None])  # (B, 1)
        if self.tool:
            given = self.given[:B].gather(1, self.count[:B, None])  # (B, 1)
            token, logprob = torch.where(given < 0, token, given), logprob.masked_fill(given >= 0, 0.0)
        self.drawn[:B].scatter_(1, self.column.expand(B, 1), token)
        self.logprobs[:B].scatter_(1, self.column.expand(B, 1), logprob)
        self.column += 1
        token, going = token[:, 0], ~self.ended[:B]
        self.cache.kv.lengths[:B] += going
        self.count[:B] += going
        self.last[:B] = torch.where(going, token, self.last[:B])
        look = self.stop.look[token]
        if self.tool:
            look &= given[:, 0] < 0  # a result stops nothing
        self.ended[:B] |= look | (self.count[:B] >= self.limit[:B])

    def _retire(self, tokens: int) -> None:
        """Take over the tokens drawn. Finished rows leave their slots; those that might have ended go on."""
        self.column.zero_()
        B = len(self.rows)
        count, ended = self.count[:B].tolist(), self.ended[:B].tolist()
        drawn, logprobs = self.drawn[:B, :tokens].tolist(), self.logprobs[:B, :tokens].tolist()
        for slot in reversed(range(B)):  # from the back: the row that moves up has not ended
            row = self.rows[slot]
            row.tokens += drawn[slot][: count[slot] - len(row.tokens)]
            row.logprobs += logprobs[slot][: len(row.tokens) - len(row.logprobs)]
            if ended[slot]:
                self.ended[slot] = False
                if self._finish(row):
                    self._remove(slot)
                elif self.tool:
                    self._give(row, slot)

    def _finish(self, row: Row) -> bool:
        """Complete a row if its last token ends it; else note a call that this token completes."""
        if not all(map(math.isfinite, row.logprobs)):
            raise ValueError("the logits are not finite: the weights are damaged or the training diverged")
        stopped = self.stop.ends(row.tokens, row.own)
        if stopped or len(row.tokens) >= row.limit:
            text = self.stop.visible(row.tokens, row.own).decode("utf-8", "replace")
            row.completion = Completion(row.tokens, row.logprobs, text, "stop" if stopped else "length")
            if self.tool:
                row.completion.given = given_tokens(row)
                row.completion.results = tuple(result for _, _, result in row.calls)
        elif self.tool:
            self.tool.answer(row, self.stop.pieces)
        return row.completion is not None

    def _give(self, row: Row, slot: int) -> None:
        """Have the row in a slot go on with the result of its last call, as far as it may grow."""
        begin, ids, _ = row.calls[-1] if row.calls else (0, [], "")
        ids = ids[: max(0, row.limit - begin)]
        self.given[slot, begin : begin + len(ids)] = torch.tensor(ids, dtype=torch.int64)

    def _remove(self, slot: int) -> None:
        """Take a row out of its slot and put the last row there."""
        self.cache.remove(self.rows, slot)
        last, lengths = len(self.rows) - 1, self.cache.kv.lengths
        self.rows[slot] = self.rows[last]
        self.rows.pop()
        self.state[:, slot], lengths[slot], self.ended[slot] = self.state[:, last], lengths[last], False
        self.count[last], lengths[last], self.ended[last] = 0, 0, True
        if self.tool:
            self.given[slot] = self.given[last]

    def preempt(self) -> None:
        """The last row gives its room to the others. It is the first to come back."""
        self.ready.appendleft(self.rows[-1])
        self._remove(len(self.rows) - 1)


class Sampler:
    """Samples from a model as it is at each call: there is no copy of the weights to keep up to date.

    slots: rows computed together; max_len: tokens, with the prompt, at which any completion ends; block_len:
    tokens per block of the KV cache, 0 for a dense one (None: 64 on a GPU, else dense); cache_tokens: what
    all blocks hold at most (None: what the slots may need, on a GPU at most 90 % of the memory that is free
    at the first call). tokenizer may be None: then `text` is "" and nothing stops unless told to. max_calls:
    how many calls of the calculator a completion gets answered, further ones are errors; 0: there is none."""

    def __init__(self, model: Llama, tokenizer, slots=64, max_len=None, block_len=None, cache_tokens=None,
                 max_calls=0):
        if slots < 1:
            raise ValueError(f"slots {slots} must be at least 1")
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
            raise ValueError(f"{sizes}: use the tokenizer.model that was saved with the checkpoint")
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.max_len = math.inf if max_len is None else max_len
        self.block_len, self.cache_tokens, self.stops = block_len, cache_tokens, {}
        self.tool = Calculator(tokenizer, max_calls) if max_calls else None
        self.halted = None  # a function that is asked after every step: True ends a call with what is there

    def generate(self, prompts, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
                 seed=0, stop=None, request_ids=None) -> list[list[Completion]]:
        """n completions of each prompt (a list of token ids), in the order of the prompts.

        max_new_tokens: one number, one per prompt, or n per prompt. stop: token ids and strings; None means
        the tokenizer's end-of-text tokens, () nothing. temperature 0 is greedy, with the log-probabilities of
        temperature 1. request_ids: what the prompts' random numbers depend on (None: the place in the list).
        """
        params = SamplingParams(temperature, top_p, top_k, min_p)
        with sampling_mode(self.model):
            rollout = self._rollout(prompts, n, max_new_tokens, params, seed, stop, request_ids)
            while rollout.step() and not (self.halted and self.halted()):
                pass
        for row in (row for group in rollout.groups for row in group if row.completion is None):  # halted
            row.completion = Completion(row.tokens, row.logprobs, "", "length")
        return [[row.completion for row in group] for group in rollout.groups]

    def stream(self, prompt, max_new_tokens=256, seed=0, stop=None, **params) -> Iterator[str]:
        """The text of generate([prompt], ...)[0][0] as it is sampled, in pieces of whole characters."""
        decoder, sent = codecs.getincrementaldecoder("utf-8")("replace"), 0
        with sampling_mode(self.model):
            rollout = self._rollout([prompt], 1, max_new_tokens, SamplingParams(**params), seed, stop)
            row, stop = rollout.groups[0][0], rollout.stop
            while row.completion is None:
                rollout.step()
                data = (stop.visible if row.completion else stop.settled)(row.tokens, row.own)
                if piece := decoder.decode(data[sent:], final=row.completion is not None):
                    yield piece
                sent = max(sent, len(data))

    def _rollout(self, prompts, n, max_new_tokens, params, seed, stop, request_ids=None) -> Rollout:
        """Check the requests → their rollout."""
        limits = max_new_tokens if hasattr(max_new_tokens, "__len__") else [max_new_tokens] * len(prompts)
        limits = [list(limit) if hasattr(limit, "__len__") else [limit] * n for limit in limits]
        ids = range(len(prompts)) if request_ids is None else request_ids
        vocab = self.model.config.vocab_size
        for name, values in (("max_new_tokens", limits), ("request_ids", ids)):
            if len(values) != len(prompts):
                raise ValueError(f"{name} has {len(values)} numbers for {len(prompts)} prompts")
        if n < 1 or not all(len(limit) == n and min(limit) >= 1 for limit in limits):
            raise ValueError(f"n {n}, max_new_tokens must be at least 1, with n numbers per prompt in a list")
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {i} is empty: a model needs at least one token to go on from")
            if len(prompt) >= self.max_len:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens, no fewer than max_len {self.max_len}")
            if bad := [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocab]:
                raise ValueError(f"prompt {i} holds the id {bad[0]}; the vocabulary is 0 to {vocab - 1}")
        groups = [[Row(prompt, min(x, self.max_len - len(prompt)), key) for x, key in zip(limit, keys)]
                  for prompt, limit, keys in zip(prompts, limits, stream_keys(seed, ids, n).tolist())]
        return Rollout(self.model, groups, params, self._stop(stop), make_cache(self, groups), self.tool)

    def _stop(self, stop) -> Stop:
        """What to stop at, kept for later calls: looking through a large vocabulary takes a second."""
        if stop is None:
            stop = () if self.tokenizer is None else self.tokenizer.stop_ids
        stop = (stop,) if isinstance(stop, (str, int)) else tuple(stop)
        if stop not in self.stops:
            vocab, device = self.model.config.vocab_size, self.model.embed.weight.device
            self.stops[stop] = Stop(stop, self.tokenizer, vocab, device, calls=self.tool is not None)
        return self.stops[stop]


# ---- Below: a paged cache, CUDA graphs, FSDP, loading, the command line ------------------------------------

BLOCK_LEN = 64  # tokens per block of a paged cache, which is what a GPU gets
GPU_SHARE = 0.9  # of the GPU's free memory that the cache may take
STACKED = 2 << 30  # bytes that a copy of stacked matrices may take: the 1B shape in bf16 needs 1.2 GiB
STACK_ON = ("cuda",)  # a CPU wins 2 to 7 % by it, and would no longer round as the trainer does


def new_cache(model: Llama, slots: int, length: int, *blocks: int) -> KVCache:
    """An empty KV cache where the model is, in its dtype."""
    return KVCache(model.config, slots, length, model.compute_dtype, model.embed.weight.device, *blocks)


class Calculator:
    """Answers the calls in what a row has sampled. One that cannot be marked by the tokenizer is refused."""

    def __init__(self, tokenizer, max_calls: int):
        self.tokenizer, self.max_calls = tokenizer, max_calls
        text = f"{CALL}{END_CALL}{RESULT}-0123456789/{ERROR}{END_RESULT}"
        if tokenizer is None or tokenizer.decode_bytes(tokenizer.encode(text)) != text.encode():
            what = "no tokenizer" if tokenizer is None else "a tokenizer that does not give them back"
            raise ValueError(f"calls of the tool are marked by {CALL} and {RESULT}, and there is {what}")

    def answer(self, row: Row, pieces: list[bytes]) -> None:
        """Note a call and its result, if the row's last token completes it: what stands between the last
        <calc> and </calc>, both sampled since the last result. pieces: the bytes of each token."""
        own = [pieces[token] for token in row.tokens[row.own :]]
        before, end, rest = b"".join(own).rpartition(END_CALL.encode())
        _, begin, text = before.rpartition(CALL.encode())
        if begin and end and len(rest) < len(own[-1]):
            allowed = len(row.calls) < self.max_calls
            result = calculate(text.decode("utf-8", "replace").strip()) if allowed else ERROR
            ids = self.tokenizer.encode(f"{RESULT}{result}{END_RESULT}")
            ids = ids if rest.startswith(b"\n") else self.tokenizer.encode("\n") + ids  # on a line of its own
            row.calls.append((len(row.tokens), ids, result))


def calls_of(folder: str, asked: bool | None) -> int:
    """max_calls for a checkpoint: by --tool or --no-tool, else if it was trained with results of calls."""
    if asked is None:
        meta = files.read_json(os.path.join(folder, "meta.json"), missing_ok=True) or {}
        settings = meta.get("settings") or {}
        asked = bool(settings.get("tool") or {*TOOL_SOURCES} & {*settings.get("mixture", ())})
    return MAX_CALLS * asked


def given_tokens(row: Row) -> list[bool]:
    """Of each token of a row, whether it is of a result."""
    given = [False] * len(row.tokens)
    for begin, ids, _ in row.calls:
        given[begin : begin + len(ids)] = [True] * len(ids)
    return given[: len(row.tokens)]  # the limit may cut the last result


class BlockAllocator:
    """Which blocks of a paged cache are free, and how many rows use each of the others. 0 is scratch."""

    def __init__(self, blocks: int):
        self.available, self.users = list(range(blocks - 1, 0, -1)), [0] * blocks

    def allocate(self, count: int) -> list[int]:
        return self.share([self.available.pop() for _ in range(count)])

    def share(self, blocks: list[int]) -> list[int]:
        for block in blocks:
            self.users[block] += 1
        return list(blocks)

    def free(self, blocks: list[int]) -> None:
        for block in blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.available.append(block)


class PagedCache:
    """What DenseCache does, in blocks that rows take as they grow (vLLM, Kwon et al. 2023).

    The rows of a group share the whole blocks of their prompt. A preempted row frees all of its blocks; when
    there is room, its keys and values are computed again (recompute preemption), in bf16 rounded differently.
    """

    def __init__(self, model: Llama, slots: int, longest: int, block_len: int, blocks: int):
        self.model, self.block_len, self.graphs = model, block_len, {}
        self.kv, self.allocator = new_cache(model, slots, longest, block_len, blocks), BlockAllocator(blocks)
        self.kept = {}  # by Row.start: the whole blocks of a prompt that waiting rows will share

    def admit(self, row: Row, slot: int) -> bool:
        whole, rest = divmod(row.cached, self.block_len)
        shared = row.start in self.kept  # of a preempted row, None never is
        # A block is left to each row in a slot: else the new row would be preempted at once.
        if (0 if shared else whole) + 1 + slot > len(self.allocator.available):
            return not slot and self._free_prompts() and self.admit(row, slot)
        cache, index = row.start or self._recompute(row)
        blocks = self.kept.pop(row.start) if shared else self.allocator.allocate(whole)
        for i, block in enumerate([] if shared else blocks):
            self.kv.copy(cache, index, i * self.block_len, (i + 1) * self.block_len, block)
        row.blocks = self.allocator.share(blocks) + self.allocator.allocate(1)
        self.kv.copy(cache, index, row.cached - rest, row.cached, row.blocks[-1])  # it will write on this one
        if row.start and not row.final:
            self.kept[row.start] = blocks
        else:
            self.allocator.free(blocks)
        return True

    def reserve(self, rows: list[Row], tokens: int) -> bool:
        for row in rows:
            needed = min(row.cached + tokens, len(row.prompt) + row.limit - 1)
            short = -(-needed // self.block_len) - len(row.blocks)
            if short > len(self.allocator.available) and not (len(rows) == 1 and self._free_prompts()):
                return False
            row.blocks += self.allocator.allocate(short)
        table = np.zeros(self.kv.table.shape, np.int32)  # 0: empty slots and ended rows write to scratch
        for slot, row in enumerate(rows):
            table[slot, : len(row.blocks)] = row.blocks
        self.kv.table.copy_(torch.from_numpy(table))
        return True

    def remove(self, rows: list[Row], slot: int) -> None:
        self.allocator.free(rows[slot].blocks)  # nothing moves: reserve() writes the whole table

    def _recompute(self, row: Row) -> tuple[KVCache, int]:
        """The keys and values that a preempted row had, in a dense cache of their own."""
        cache = new_cache(self.model, 1, row.cached)
        tokens = torch.tensor([[*row.prompt, *row.tokens[:-1]]], device=cache.k.device)
        self.model.hidden(tokens, cache=cache)
        return cache, 0

    def _free_prompts(self) -> bool:
        """For the only row: free the blocks kept for waiting rows; these will copy their prompt again."""
        assert self.kept, "make_cache() leaves room for any one row"
        while self.kept:
            self.allocator.free(self.kept.popitem()[1])
        return True


def cache_bytes(c: LlamaConfig, dtype: torch.dtype) -> int:
    """What the keys and values of a token take in all layers."""
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * dtype.itemsize


def stacked(c: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of a copy of the matrices that stack() joins: 0 for large models, which do without."""
    rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 2 * c.intermediate_size
    size = c.num_layers * rows * c.hidden_size * dtype.itemsize
    return size if size <= STACKED else 0


def free_tokens(model: Llama) -> int:
    """Keys and values of how many tokens the free memory of the model's GPU could hold."""
    torch.cuda.empty_cache()  # what torch keeps for later counts as taken otherwise
    free = torch.cuda.mem_get_info(model.embed.weight.device)[0]
    return free // cache_bytes(model.config, model.compute_dtype)


def make_cache(sampler: Sampler, groups: list[list[Row]]) -> DenseCache | PagedCache:
    """Room for the sampler's slots: blocks on a GPU or if it says so, as many as memory allows, or dense."""
    model, size = sampler.model, sampler.block_len
    weight, rows = model.embed.weight, [row for group in groups for row in group]
    slots, longest = min(sampler.slots, len(rows)), max((len(r.prompt) + r.limit for r in rows), default=1)
    if size == 0 or size is None and not weight.is_cuda:
        return DenseCache(model, slots, max((len(r.prompt) for r in rows), default=0) + CACHE_CHUNK, longest)
    size = size or BLOCK_LEN
    most = -(-longest // size)  # blocks of a row
    blocks = slots * (most + 1) + most  # one more per row, which admit() leaves free, and a prompt
    if sampler.cache_tokens is None and weight.is_cuda:  # once: it decides what is preempted
        sampler.cache_tokens = int(GPU_SHARE * free_tokens(model))
    if sampler.cache_tokens is not None:
        blocks = min(blocks, sampler.cache_tokens // size)
    if blocks < most:
        has = f"the KV cache has room for {blocks} blocks of {size} tokens, and a request needs up to {most}"
        raise ValueError(f"{has}: give it more memory (cache_tokens), or requests a lower max_new_tokens")
    return PagedCache(model, slots, longest, size, blocks + 1)


def decode_by_graph(rollout: Rollout, rows: int) -> None:
    """Rollout.decode as a CUDA graph, one per number of slots on the ladder 1, 2, 4, 8, 16, 32, 48, …

    Surplus slots are empty and ended. A rollout records its own graphs: its cache, and weights cast from
    fp32, lie elsewhere in the next. None with FSDP2's hooks (see unsharded()), which wait for streams that a
    capture must not see.
    """
    rung = next((b for b in (1, 2, 4, 8) if b >= rows), -(-rows // 16) * 16)
    B, graphs = min(rung, rollout.slots), rollout.cache.graphs
    if B in graphs:
        return graphs[B].replay()
    rollout.decode(B)  # compiles what is to be compiled
    graphs[B] = capture(rollout, B)


def capture(rollout: Rollout, B: int) -> torch.cuda.CUDAGraph:
    """Record a step of B slots without running it. Its tensors stay where they are while the graph lives."""
    graph = torch.cuda.CUDAGraph()
    pool = next((g.pool() for g in rollout.cache.graphs.values()), None)
    # thread_local: NCCL's watchdog, another thread, may ask for events meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        rollout.decode(B)
    return graph


@contextmanager
def sampling_mode(model: Llama):
    """Within, the matrices are in the dtype they are computed in, and torch need not put writes in an order.

    No step casts the matrices again; the bits are those of the cast that each layer makes anyway. Each write
    has a place of its own, so the order that use_deterministic_algorithms() asks for cannot matter. It would
    copy indices to the GPU in the middle of a step, which a CUDA graph cannot record, and forbid cumsum."""
    mode = torch.get_deterministic_debug_mode()
    masters = {p: p.data for p in model.parameters() if p.ndim > 1 and p.dtype != model.compute_dtype}
    try:
        torch.set_deterministic_debug_mode(0)
        stack(model)
        for p in masters:
            p.data = p.data.to(model.compute_dtype)
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        for module, _ in stackable(model):
            module.stacked = None
        for p, master in masters.items():
            p.data = master


def stackable(model: Llama) -> Iterator[tuple]:
    """The modules that multiply an input by several matrices, and these."""
    for block in model.blocks:
        yield block.attn, (block.attn.q, block.attn.k, block.attn.v)
        yield block.mlp, (block.mlp.gate, block.mlp.up)


@torch.no_grad()
def stack(model: Llama) -> None:
    """Give each of stackable() its matrices as one, in the dtype they are computed in.

    Those that are cast anyway become parts of it. Of others it is a copy: see stacked()."""
    dtype, held = model.compute_dtype, model.embed.weight
    if held.device.type not in STACK_ON or held.dtype == dtype and not stacked(model.config, dtype):
        return
    for module, linears in stackable(model):
        if any(hasattr(w.weight, "device_mesh") for w in linears):  # a part of it, by FSDP2
            continue
        weight = torch.cat([w.weight.to(dtype) for w in linears])
        biases = [w.bias.to(dtype) for w in linears if w.bias is not None]
        module.stacked = weight, torch.cat(biases) if biases else None
        for w, part in zip(linears, weight.split([w.out_features for w in linears])):
            if w.weight.dtype != dtype:
                w.weight.data = part


@contextmanager
def unsharded(sampler: Sampler):
    """Within, the sampler of a model in training has a plain one: no FSDP2, compilation or recomputation.

    FSDP2 gathers its weights on every rank: they cost a copy in the compute dtype, but ranks may take
    different numbers of steps, which an all-gather per layer would not survive. Other models are left alone.
    Enter it outside inference mode: the gathered tensors are used by the training that follows."""
    model = sampler.model
    shards = [m for m in model.modules() if hasattr(m, "unshard")]  # FSDP2 gives it to what it has sharded
    assert not shards or not torch.is_inference_mode_enabled(), "enter unsharded() outside inference mode"
    try:
        for m in shards:
            m.unshard()
        if shards or any("forward" in vars(block) for block in model.blocks):  # midtrain.add_options()
            sampler.model = plain(model)
        yield
    finally:
        sampler.model = model
        for m in shards:
            m.reshard()


def plain(model: Llama) -> Llama:
    """A Llama without hooks, with the same tensors as parameters."""
    with torch.device("meta"):
        bare = Llama(model.config)
    bare.load_state_dict(dict(model.named_parameters()), assign=True)
    bare.inv_freq, bare.compute_dtype = model.inv_freq, model.compute_dtype
    return bare


def truncate(probs: Tensor, top_p: float, top_k: int, min_p: float) -> Tensor:
    """Zero the unlikely tokens of probs (B, V) and renormalise: top-k, top-p of what is left, min-p.

    Each rule is a threshold: a token as likely as the last one kept is kept too, whatever the order of the
    vocabulary. top-p keeps the fewest tokens, most likely first, whose mass reaches top_p; min-p keeps those
    of at least min_p times the largest probability (Nguyen et al. 2024)."""
    if top_k and top_k < probs.shape[1]:
        probs = probs.masked_fill(probs < probs.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        ordered = probs.sort(descending=True).values
        before = ordered.cumsum(-1) - ordered  # mass of the tokens ahead of this one
        kept = (before < top_p * ordered.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        probs = probs.masked_fill(probs < ordered.gather(1, (kept - 1).clamp(min=0)), 0)
    probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True)


def load_words(path: str):
    """A checkpoint's tokenizer, with ids that end a response. ValueError for another than training's."""
    tok = load_tokenizer(path)
    meta = files.read_json(os.path.join(path, "meta.json"), missing_ok=True) or {}  # only ours have one
    if meta.get("tokenizer", tok.hash) != tok.hash:
        raise ValueError(f"{path}: its tokenizer.model is not the one that this model was trained with")
    tok.stop_ids = tok.stops(read_generation(path))
    return tok


def load_model(path: str, device: str = "cpu", dtype: str = "auto"):
    """(model, tokenizer) of a checkpoint's folder, ours or Hugging Face's, to be sampled. Whether it is whole
    is seen by files.find_checkpoint(). dtype "auto": bf16 on a GPU that multiplies it, else as stored."""
    tok, device = load_words(path), torch.device(device)
    if dtype == "auto" and has_bf16(device):
        dtype = "bf16"
    model = Llama.from_pretrained(path, device, DTYPES.get(dtype)).eval()
    model.compute_dtype = model.embed.weight.dtype
    return model, tok


def in_use(sampler: Sampler) -> str:
    weight = sampler.model.embed.weight
    return f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"  # bfloat16 on cuda


def respond(sampler: Sampler, text: str, args, seed: int) -> None:
    """Print the completions of one prompt: a single one as it is sampled, several when they are all there."""
    template = TEMPLATES.get(args.template) if text else None  # an empty prompt stays one, which is an error
    ids = sampler.tokenizer.encode(template(text) if template else text)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "top_p", "top_k", "min_p")}
    options |= {"temperature": 0.0 if args.greedy else args.temperature, "seed": seed}
    options["stop"] = (*sampler.tokenizer.stop_ids, *(STOP if template else ()))
    if args.n == 1:
        for piece in sampler.stream(ids, **options):
            print(piece, end="", flush=True)
        return print()
    for j, c in enumerate(sampler.generate([ids], n=args.n, **options)[0], 1):
        print(f"--- {j} of {args.n}: {len(c.tokens)} tokens, {c.finish_reason}\n{c.text}")


def main() -> None:
    parser = files.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("prompt", nargs="?", help="text to go on from; without it, a conversation")
    add("--ckpt", required=True, help="a stage's folder (its newest checkpoint) or a checkpoint's")
    add("--template", choices=["none", *TEMPLATES],
        help="what is put around the prompt (default: simple; for a prompt to a foreign checkpoint: none)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="tokens at which a completion is cut")
    add("--temperature", type=float, default=1.0, help="1 is what is trained; lower is less varied")
    add("--top-p", type=float, default=1.0, help="keep the most likely tokens of this mass")
    add("--top-k", type=int, default=0, help="keep this many tokens (0: all)")
    add("--min-p", type=float, default=0.0, help="keep tokens this likely, relative to the likeliest")
    add("--greedy", action="store_true", help="always take the likeliest token: --temperature 0")
    add("--n", type=int, default=1, help="number of completions of the prompt")
    add("--seed", type=int, default=0, help="seed of the random numbers; a conversation adds 1 per turn")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: bf16 on a GPU, else as stored")
    add("--tool", action=BooleanOptionalAction,
        help=f"answer {CALL}…{END_CALL} (default: for a model that was trained with it)")
    args = parser.parse_args()
    folder = files.find_checkpoint(args.ckpt)
    loaded = load_model(folder, str(pick_device()), args.dtype)
    sampler = Sampler(*loaded, max_calls=calls_of(folder, args.tool))
    print(in_use(sampler), file=sys.stderr)
    ours = os.path.exists(os.path.join(folder, "meta.json"))
    args.template = args.template or ("simple" if ours or args.prompt is None else "none")
    if args.prompt is not None:
        respond(sampler, args.prompt, args, args.seed)
        return print(f"template {args.template} (--template none: the prompt as it is)", file=sys.stderr)
    print(f"template {args.template}; one question per line, an empty line or Ctrl-D ends", file=sys.stderr)
    with suppress(EOFError):
        for turn, text in enumerate(iter(lambda: input("> ").strip(), "")):
            respond(sampler, text, args, args.seed + turn)  # the same question twice gives two answers


if __name__ == "__main__":
    files.run_cli(main)

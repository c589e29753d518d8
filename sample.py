"""The sampler: many completions at once from the model that is being trained, and a command line to talk to it.

    python sample.py --ckpt runs/tiny/long "Tom has 3 apples and buys 4 more. How many?" --template simple
    python sample.py --ckpt runs/tiny/long                     # without a prompt: a conversation

    completions = Sampler(model, tokenizer).generate([tokenizer.encode("2 + 2 =")], n=4, max_new_tokens=32)

The choices that matter:

1. Continuous batching. The rows in progress are always slots 0..B-1 of one KV cache. If a row ends, the last one moves
   into its slot, and one that waits takes the place behind. So nothing is computed for finished rows, and the batch of
   the long tail is as narrow as it can be. On a GPU the cache is a pool of blocks, given out as rows grow; if it is
   empty, the last row is put off with what it has, and goes on later. On a CPU a block is as long as a row.
2. A group shares its prompt. The n samples of a prompt cost one forward of it; their first tokens are drawn from the same
   probabilities. Of its keys and values each gets a copy, or in a pool of blocks a reference to the whole ones.
3. Randomness is counted, not consumed: sample j of request i draws its token t with the hash of (seed, i, j, t). So, in
   fp32, a rollout depends on nothing around it: neighbours, slot, the order of the prompts, the number of ranks. (In
   bf16, products of other shapes round differently, and a draw near the border of two tokens may fall to the other.)
4. What is sampled is what is trained: plain softmax(logits / temperature) unless asked otherwise, on the model's own
   weights, and the log-probability of every token under the distribution it was drawn from comes with it.
"""

import codecs
import itertools
import math
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data import files
from model import KVCache, Llama

PREFILL_TOKENS = 4096  # prompts computed together, padding included: enough to fill the processor, little to keep
CACHE_CHUNK = 64  # room in a dense cache behind the longest prompt; used up, it grows by as much, or by an eighth
BLOCK_LEN = 64  # tokens in a block of a paged cache, which is what a GPU gets
GPU_SHARE = 0.9  # of the GPU's free memory that the cache may take
LOOK_EVERY = 8  # tokens between two looks of the host at what the GPU has done: each look waits for it


@dataclass
class Completion:
    tokens: list[int]  # as sampled, the stop token or the token that completed a stop string included
    logprobs: list[float]  # of each token, under the distribution it was drawn from
    text: str  # without what stopped it; "" if the sampler has no tokenizer
    finish_reason: str  # "stop" | "length"


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers: each sample owns a SplitMix64 stream (Steele, Lea & Flood 2014), addressed by position

# The published constants as int64: torch has no arithmetic on uint64, but int64 wraps around in the same way.
_GOLDEN, _MIX1, _MIX2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> of a signed number repeats its sign: mask that away


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of int64."""
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def stream_keys(seed: int, request_ids: Sequence[int], n: int) -> Tensor:
    """Where the streams of n samples of each request start: (requests, n) int64."""
    seed, ids = torch.tensor(seed % 2**63), torch.tensor(request_ids, dtype=torch.int64)[:, None]
    return _mix(_mix(_mix(seed + _GOLDEN) ^ (ids + _GOLDEN)) ^ (torch.arange(n) + _GOLDEN))


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1) of the streams `keys` at `positions` (int64, one shape) → float64, 53 random bits each."""
    return _shift_right(_mix(keys + (positions + 1) * _GOLDEN), 11).double() * 2.0**-53


# ---------------------------------------------------------------------------------------------------------------------
# Drawing a token


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn from logits. top_p = 1, top_k = 0 and min_p = 0 switch truncation off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self):
        if not (0 <= self.temperature < math.inf and 0 <= self.top_p <= 1 and self.top_k >= 0 and 0 <= self.min_p <= 1):
            raise ValueError(f"{self}: temperature and top_k must be >= 0, top_p and min_p between 0 and 1")

    def draw(self, logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """logits (B, V) fp32 and uniforms u (B, n) → n tokens of each row (B, n) and their log-probabilities (B, n)."""
        if self.temperature == 0:
            token = logits.argmax(-1, keepdim=True)
            logp = (logits.gather(1, token) - logits.logsumexp(-1, keepdim=True)).expand_as(u)
            token = token.expand_as(u)
        else:
            probs = torch.softmax(logits if self.temperature == 1 else logits / self.temperature, -1)
            if self.top_k or self.top_p < 1 or self.min_p:
                probs = truncate(probs, self.top_p, self.top_k, self.min_p)
            token = inverse_cdf(probs, u)
            logp = probs.gather(1, token).log()
        return token, logp


def truncate(probs: Tensor, top_p: float, top_k: int, min_p: float) -> Tensor:
    """Zero the unlikely tokens of probs (B, V) and renormalise: top-k, then top-p of what is left, then min-p.

    Each rule is a threshold: a token as likely as the last one kept is kept too, whatever the order of the vocabulary.
    top-p keeps the fewest tokens, most likely first, whose mass reaches top_p; min-p those of at least min_p times the
    most likely one's probability (Nguyen et al. 2024).
    """
    if top_k and top_k < probs.shape[1]:
        kth = probs.topk(top_k).values[:, -1:]
        probs = probs.masked_fill(probs < kth, 0)
    if top_p < 1:
        ordered = probs.sort(descending=True).values
        before = ordered.cumsum(-1) - ordered  # mass of the tokens ahead of this one
        kept = (before < top_p * ordered.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        probs = probs.masked_fill(probs < ordered.gather(1, (kept - 1).clamp(min=0)), 0)
    probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True)


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """Tokens (B, n) drawn from probs (B, V) by u (B, n) in [0, 1): the first whose cumulated mass exceeds u of all.

    Measuring u against the sum that was reached, not against 1, keeps rounding from running off the end; "exceeds", not
    "reaches", keeps a token of probability 0 from being drawn, by u = 0 or any other.
    """
    # Of a single row a GPU makes the sum by blocks in the order in which they happen to finish; of two it does not.
    cdf = torch.cat((probs, probs)).cumsum(-1)[:1] if probs.is_cuda and len(probs) == 1 else probs.cumsum(-1)
    total = cdf[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # u * total may round up to total itself
    token = torch.searchsorted(cdf, torch.minimum(u.to(cdf.dtype) * total, below), right=True)
    token = token.clamp_(max=probs.shape[1] - 1)  # only if probs are not numbers, which the caller finds out
    if cdf.is_cuda:  # a parallel scan need not be monotone in its last bit: an impossible token may still come out
        token = torch.where(probs.gather(1, token) > 0, token, probs.argmax(-1, keepdim=True))
    return token


# ---------------------------------------------------------------------------------------------------------------------
# When to stop


class Stop:
    """Token ids and strings that end a completion.

    Strings are searched in the bytes of the sampled tokens, so they may begin and end inside a token or a character.
    `look` (V,) bool marks the tokens after which that search is worth its time: all others cost one table lookup.
    """

    def __init__(self, stop: Sequence[int | str], tokenizer, vocab_size: int, device):
        self.tokenizer = tokenizer
        self.ids = {item for item in stop if not isinstance(item, str)}
        self.strings = [item.encode() for item in stop if isinstance(item, str)]
        if not all(0 <= token < vocab_size for token in self.ids):
            raise ValueError(f"stop ids {sorted(self.ids)} must lie below the vocabulary's size {vocab_size}")
        if self.strings and tokenizer is None:
            raise ValueError("stop strings need a tokenizer; without one, give token ids")
        if b"" in self.strings:
            raise ValueError("a stop string is empty; use stop=() for nothing that stops")
        self.pieces = [tokenizer.decode_bytes([token]) if self.strings else b"" for token in range(vocab_size)]
        look = [token in self.ids or self._may_complete(piece) for token, piece in enumerate(self.pieces)]
        self.look = torch.tensor(look, device=device)
        self.window = max(map(len, self.strings), default=0)  # in tokens, none of which is shorter than a byte

    def _may_complete(self, piece: bytes) -> bool:
        """Whether a stop string can end inside a token of these bytes: the token holds it, or begins with its end."""
        return any(s in piece or any(piece.startswith(s[i:]) for i in range(len(s))) for s in self.strings)

    def ends(self, tokens: list[int]) -> bool:
        """Whether the last of these tokens completes a stop. The ones before it are known not to."""
        tail = b"".join(self.pieces[token] for token in tokens[-self.window :]) if self.strings else b""
        return tokens[-1] in self.ids or any(s in tail for s in self.strings)

    def visible(self, tokens: list[int]) -> bytes:
        """The bytes of the tokens up to what stopped them."""
        if self.tokenizer is None:
            return b""
        data = self.tokenizer.decode_bytes(tokens[:-1] if tokens and tokens[-1] in self.ids else tokens)
        return data[: min((at for s in self.strings if (at := data.find(s)) >= 0), default=None)]

    def settled(self, tokens: list[int]) -> bytes:
        """Of a completion in progress, the bytes that stay whatever follows: not those that may begin a stop string."""
        data = self.visible(tokens)
        held = max((n for s in self.strings for n in range(1, len(s)) if data.endswith(s[:n])), default=0)
        return data[: len(data) - held]


# ---------------------------------------------------------------------------------------------------------------------
# One call's rollout


@dataclass
class Computed:
    """Tokens whose keys and values are there: a prompt, for the rows that will go on from it, or a row that was put off."""

    cache: KVCache
    source: int  # the block of that cache
    length: int
    rows: int = 1  # that still have to copy it
    blocks: list[int] | None = None  # in a paged cache: its whole blocks, once the first row has copied them


@dataclass
class Row:
    """One sample, from its prompt's forward to its end."""

    request: int
    sample: int
    start: Computed | None  # what to put into the cache when it gets a slot
    tokens: list[int]  # sampled before that
    logprobs: list[float]
    limit: int  # of its tokens
    count: int = 0  # tokens sampled, when the host last looked
    blocks: list[int] = field(default_factory=list)  # of a paged cache, in the order of the row


class Pool:
    """Which blocks of a paged cache are free, and how many rows read each of the others. Block 0 belongs to nobody."""

    def __init__(self, blocks: int):
        self.free, self.users = list(range(blocks - 1, 0, -1)), [0] * blocks

    def take(self) -> int:
        block = self.free.pop()
        self.users[block] = 1
        return block

    def share(self, blocks: list[int]) -> list[int]:
        for block in blocks:
            self.users[block] += 1
        return list(blocks)

    def give_back(self, blocks: list[int]) -> None:
        for block in blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)


class Rollout:
    """The samples of one call: prompts that wait, rows that are ready for a slot, and the rows in slots 0..B-1.

    What is known of a slot lies on the device: the tokens so far, the last one, how many, and whether it is done. A done
    slot stands still, so the host need not look after every token (on a GPU it looks every LOOK_EVERY), and a step
    is always the same work on the same tensors, which a CUDA graph repeats.
    """

    def __init__(self, model: Llama, prompts, keys: Tensor, limits, policy: SamplingParams, stop: Stop, slots: int, blocks):
        """keys: the random streams (requests, n); limits: tokens of each sample, alike; blocks: (block_len, number)."""
        self.model, self.prompts, self.limits, self.policy, self.stop = model, prompts, limits, policy, stop
        self.device = model.embed.weight.device
        self.keys = keys.to(self.device)
        self.done = [[None] * keys.shape[1] for _ in prompts]
        self.waiting, self.ready, self.rows = deque(range(len(prompts))), deque(), []
        self.slots = min(slots, keys.numel())
        self.longest = max((len(p) + max(limit) for p, limit in zip(prompts, limits)), default=1)
        if blocks is None:  # dense; it grows
            self.cache, self.pool = self._dense(self.slots, max(map(len, prompts), default=0) + CACHE_CHUNK), None
        else:
            config, dtype = model.config, model.compute_dtype
            self.cache = KVCache(config, self.slots, self.longest, dtype, self.device, *blocks)
            self.pool, self.table = Pool(blocks[1]), self.cache.table.cpu()  # the host's copy of the table
        shape = (self.slots, max(map(max, limits), default=0) + 1)  # one more: a done slot may overwrite what is behind
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(shape, device=self.device)
        self.last, self.count, self.limit, self.key = torch.zeros(4, self.slots, dtype=torch.int64, device=self.device)
        self.ended = torch.ones(self.slots, dtype=torch.bool, device=self.device)
        # CUDA graphs by number of slots; not under FSDP2, whose hooks wait for streams that a capture must not see
        self.graphs = {} if self.device.type == "cuda" and not fsdp_modules(model) else None
        self.look_every = LOOK_EVERY if self.device.type == "cuda" else 1

    def _dense(self, slots: int, length: int) -> KVCache:
        return KVCache(self.model.config, slots, min(self.longest, length), self.model.compute_dtype, self.device)

    @torch.inference_mode()
    def step(self) -> bool:
        """Fill the free slots, then draw a token (on a GPU several) for every row in one. False: nothing was left to do."""
        while len(self.rows) < self.slots and (row := self._next_row()):
            if not self._place(row):
                self.ready.appendleft(row)
                break
        if not self.rows:
            return False
        tokens = min(self.look_every, max(row.limit - row.count for row in self.rows))
        self._reserve(tokens)
        for _ in range(tokens):
            self._advance()
        self._retire(tokens)
        return True

    # ------------------------------------------------------------------------------------------------------- on the device

    def _advance(self) -> None:
        """One token for every row. With CUDA graphs for a rung of the ladder, whose surplus slots are empty and ended."""
        if self.graphs is None:
            return self._decode(len(self.rows))
        B = rung(len(self.rows), self.slots)
        if B in self.graphs:
            return self.graphs[B].replay()
        self._decode(B)  # compiles what is to be compiled
        self.graphs[B] = self._capture(B)

    def _capture(self, B: int) -> torch.cuda.CUDAGraph:
        """Record, without running it, a step of B slots. Its tensors stay where they are as long as this rollout lives.

        A rollout records its own graphs: its cache, and weights cast from fp32, lie elsewhere in the next one.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=next((g.pool() for g in self.graphs.values()), None)):
            self._decode(B)
        return graph

    def _decode(self, B: int) -> None:
        """One token for slots 0..B-1. Nothing here depends on what is computed, and nothing is read back."""
        h = self.model.hidden(self.last[:B, None], cache=self.cache)[:, 0]  # (B, hidden)
        u = uniforms(self.key[:B], self.count[:B])
        token, logprob = self.policy.draw(self.model.logits(h), u[:, None])  # (B, 1)
        self.tokens[:B].scatter_(1, self.count[:B, None], token)
        self.logprobs[:B].scatter_(1, self.count[:B, None], logprob)
        token, going = token[:, 0], ~self.ended[:B]
        self.cache.lengths[:B] += going
        self.count[:B] += going
        self.last[:B] = torch.where(going, token, self.last[:B])
        self.ended[:B] |= self.stop.look[token] | (self.count[:B] >= self.limit[:B])

    # --------------------------------------------------------------------------------------------------------- on the host

    def _next_row(self) -> Row | None:
        """The next row that needs a slot, its prompt computed; None if all have had one."""
        while not self.ready and self.waiting:
            self._prefill()
        return self.ready.popleft() if self.ready else None

    def _prefill(self) -> None:
        """Compute waiting prompts, as many as PREFILL_TOKENS holds, and draw the first token of each sample."""
        batch, width = [], 0
        while self.waiting:
            width = max(width, len(self.prompts[self.waiting[0]]))
            if batch and (len(batch) + 1) * width > PREFILL_TOKENS:
                break
            batch.append(self.waiting.popleft())
        lengths = torch.tensor([len(self.prompts[i]) for i in batch], device=self.device)
        cache = self._dense(len(batch), int(lengths.max()))
        tokens = torch.zeros(len(batch), cache.max_len, dtype=torch.int64)
        for b, i in enumerate(batch):
            tokens[b, : len(self.prompts[i])] = torch.tensor(self.prompts[i])
        h = self.model.hidden(tokens.to(self.device), cache=cache)
        h = h[torch.arange(len(batch), device=self.device), lengths - 1]  # (b, hidden): what follows the last token
        keys = self.keys[batch]  # (b, n)
        first, logprobs = self.policy.draw(self.model.logits(h), uniforms(keys, torch.zeros_like(keys)))
        check_finite(logprobs)
        for b, (i, group, logps) in enumerate(zip(batch, first.tolist(), logprobs.tolist())):
            start = Computed(cache, b, len(self.prompts[i]), rows=0)
            for j, (token, logp) in enumerate(zip(group, logps)):
                row = Row(i, j, start, [token], [logp], self.limits[i][j])
                if not self._finish(row):
                    start.rows += 1
                    self.ready.append(row)

    def _place(self, row: Row) -> bool:
        """Put a row into the slot behind the others; False if a paged cache has no room for it now."""
        slot, start = len(self.rows), row.start
        if self.pool is None:
            self.cache.copy(start.cache, start.source, 0, start.length, slot)
        elif not self._fill_blocks(row):
            return False
        row.count, row.start = len(row.tokens), None  # what was computed is freed with its last row
        self.rows.append(row)
        self._show(slot)
        self.cache.lengths[slot] = start.length
        self.tokens[slot, : row.count] = torch.tensor(row.tokens, device=self.device)
        self.logprobs[slot, : row.count] = torch.tensor(row.logprobs, device=self.device)
        self.last[slot], self.count[slot], self.limit[slot] = row.tokens[-1], row.count, row.limit
        self.key[slot], self.ended[slot] = self.keys[row.request, row.sample], False
        return True

    def _retire(self, tokens: int) -> None:
        """After `tokens` steps: take the rows that are finished out of their slots, and let wrong alarms go on."""
        for row in self.rows:
            row.count += tokens
        ended = self.ended[: len(self.rows)].nonzero().flatten().tolist()
        for slot in reversed(ended):  # from the back: what moves up is not done
            row, count = self.rows[slot], int(self.count[slot])
            check_finite(self.logprobs[slot, :count])
            row.count, row.tokens = count, self.tokens[slot, :count].tolist()
            row.logprobs = self.logprobs[slot, :count].tolist()
            if self._finish(row):
                self._remove(slot)
            else:
                self.ended[slot] = False

    def _remove(self, slot: int) -> None:
        """Take a row out of its slot and close the hole with the last row."""
        row, moved = self.rows[slot], self.rows.pop()
        last = len(self.rows)
        if last != slot:
            self.rows[slot] = moved
            if self.pool is None:
                self.cache.copy(self.cache, last, 0, self._cached(moved), slot)
            for state in (self.tokens, self.logprobs, self.last, self.count, self.limit, self.key, self.ended):
                state[slot] = state[last]
            self.cache.lengths[slot] = self.cache.lengths[last]
            self._show(slot)
        self.ended[last], self.cache.lengths[last], self.count[last] = True, 0, 0
        if self.pool is not None:
            self.pool.give_back(row.blocks)
            self.table[last] = 0

    def _finish(self, row: Row) -> bool:
        """Record the completion of a row if its last token ends it."""
        stopped = self.stop.ends(row.tokens)
        if not stopped and len(row.tokens) < row.limit:
            return False
        text = self.stop.visible(row.tokens).decode("utf-8", "replace")
        completion = Completion(row.tokens, row.logprobs, text, "stop" if stopped else "length")
        self.done[row.request][row.sample] = completion
        return True

    def _cached(self, row: Row) -> int:
        """Tokens of a row in the cache: all but the last."""
        return len(self.prompts[row.request]) + row.count - 1

    # ------------------------------------------------------------------------------------------------- room in the cache

    def _reserve(self, tokens: int) -> None:
        """Room for so many more tokens of every row: a longer dense cache, or blocks, for which the last rows give way."""
        if self.pool is None:
            old, needed = self.cache, min(self.longest, tokens + max(map(self._cached, self.rows)))
            if needed > old.max_len:
                self.cache = self._dense(self.slots, max(needed, old.max_len + max(CACHE_CHUNK, old.max_len // 8)))
                self.cache.k[..., : old.max_len, :], self.cache.v[..., : old.max_len, :] = old.k, old.v
                self.cache.lengths = old.lengths
                self.graphs = None if self.graphs is None else {}  # they write into the old one
            return
        slot = 0
        while slot < len(self.rows):
            row = self.rows[slot]
            most = len(self.prompts[row.request]) + row.limit - 1
            short = -(-min(self._cached(row) + tokens, most) // self.cache.block_len) - len(row.blocks)
            if short <= len(self.pool.free):
                if short > 0:
                    row.blocks += [self.pool.take() for _ in range(short)]
                    self._show(slot)
                slot += 1
            else:
                self._put_off()
        self.cache.table.copy_(self.table, non_blocking=True)

    def _fill_blocks(self, row: Row) -> bool:
        """Give a row blocks of the pool with what it starts from: shared, but for the last, which it will write on."""
        start, size = row.start, self.cache.block_len
        whole, rest = divmod(start.length, size)
        # A block is left to each row that is under way, lest one comes in only to be put off at once.
        if (whole if start.blocks is None else 0) + 1 + len(self.rows) > len(self.pool.free):
            return not self.rows and self._let_go(start.length) and self._fill_blocks(row)
        if start.blocks is None:
            start.blocks = [self.pool.take() for _ in range(whole)]
            for i, block in enumerate(start.blocks):
                self.cache.copy(start.cache, start.source, i * size, i * size + size, block)
        row.blocks = [*self.pool.share(start.blocks), self.pool.take()]
        self.cache.copy(start.cache, start.source, start.length - rest, start.length, row.blocks[-1])
        start.rows -= 1
        if not start.rows:
            self.pool.give_back(start.blocks)
        return True

    def _put_off(self) -> None:
        """The last row gives up its blocks; what it has computed waits in the host's memory until there is room."""
        slot = len(self.rows) - 1
        row = self.rows[slot]
        if slot == 0:
            self._let_go(self._cached(row))
            return
        row.tokens, row.logprobs = (x[slot, : row.count].tolist() for x in (self.tokens, self.logprobs))
        length = self._cached(row)
        kept = KVCache(self.model.config, 1, length, self.model.compute_dtype)
        kept.k[:, 0], kept.v[:, 0] = self.cache.read(row.blocks, length)
        self._remove(slot)
        row.start = Computed(kept, 0, length)
        self.ready.appendleft(row)

    def _let_go(self, length: int) -> bool:
        """For the only row: free the prompts' blocks that are kept for rows that wait; these copy them again."""
        kept = [row.start for row in self.ready if row.start.blocks]
        for start in kept:
            if start.blocks is not None:  # several rows wait for one prompt
                self.pool.give_back(start.blocks)
                start.blocks = None
        if not kept:
            sizes = f"{len(self.pool.users) - 1} blocks of {self.cache.block_len} tokens"
            raise ValueError(f"a request of {length + 1} tokens does not fit in the KV cache of {sizes}")
        return True

    def _show(self, slot: int) -> None:
        """Write a row's blocks into the host's table."""
        if self.pool is not None:
            blocks = self.rows[slot].blocks
            self.table[slot, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            self.table[slot, len(blocks) :] = 0


def rung(rows: int, slots: int) -> int:
    """The smallest of 1, 2, 4, 8, 16, 32, 48, … that holds so many rows: for each there is one CUDA graph."""
    return min(slots, next((b for b in (1, 2, 4, 8) if b >= rows), -(-rows // 16) * 16))


def check_finite(logprobs: Tensor) -> None:
    if not bool(torch.isfinite(logprobs).all()):
        raise ValueError("the model's logits are not finite numbers: its weights are damaged or training diverged")


# ---------------------------------------------------------------------------------------------------------------------
# The sampler


class Sampler:
    """Samples from a model as it is at each call: there is no copy of the weights to keep up to date.

    slots: rows computed together; max_len: tokens, prompt included, at which every completion ends (None: no bound).
    tokenizer may be None: then there are only ids, `text` is "" and nothing stops unless told to. block_len: tokens in
    a block of the KV cache, 0 for a dense one (None: 64 on a GPU, dense elsewhere); cache_tokens: what the blocks hold
    together (None: all that the slots may need, on a GPU at most 90 % of the memory that is free).
    """

    def __init__(self, model: Llama, tokenizer, slots=64, max_len=None, block_len=None, cache_tokens=None):
        if slots < 1:
            raise ValueError(f"slots {slots} must be at least 1")
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
            raise ValueError(f"{sizes}: use the tokenizer.model that was saved with the checkpoint")
        self.model, self.tokenizer, self.slots, self.max_len = model, tokenizer, slots, max_len
        self.block_len, self.cache_tokens = block_len, cache_tokens
        self.stops: dict[tuple, Stop] = {}

    def generate(
        self, prompts, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, stop=None,
        request_ids=None,
    ) -> list[list[Completion]]:  # fmt: skip
        """n completions of each prompt (a list of token ids), in the order of the prompts.

        max_new_tokens: one number, one for each prompt, or for each prompt a list of n. stop: token ids and strings; None
        means the tokenizer's end-of-text tokens, () that nothing stops. temperature 0 is greedy, log-probabilities as at
        temperature 1. Sample j of prompt i draws from (seed, request_ids[i], j, position); a request's id is its place in
        the list unless given.
        """
        policy = SamplingParams(temperature, top_p, top_k, min_p)
        with cast_weights(self.model), unordered_writes():
            rollout = self._rollout(prompts, n, max_new_tokens, policy, seed, stop, request_ids)
            while rollout.step():
                pass
        return rollout.done

    def stream(self, prompt, max_new_tokens=256, seed=0, stop=None, **policy) -> Iterator[str]:
        """The text of generate([prompt], ...)[0][0] as it is sampled, in pieces of whole characters."""
        decoder, sent = codecs.getincrementaldecoder("utf-8")("replace"), 0
        with cast_weights(self.model), unordered_writes():
            rollout = self._rollout([prompt], 1, max_new_tokens, SamplingParams(**policy), seed, stop)
            while rollout.step():
                data = rollout.stop.settled(rollout.tokens[0, : rollout.count[0]].tolist())
                if piece := decoder.decode(data[sent:]):
                    yield piece
                sent = max(sent, len(data))
        if piece := decoder.decode(rollout.stop.visible(rollout.done[0][0].tokens)[sent:], final=True):
            yield piece

    def _rollout(self, prompts, n, max_new_tokens, policy, seed, stop, request_ids=None) -> Rollout:
        """Check the requests and line them up."""
        limits = list(max_new_tokens) if hasattr(max_new_tokens, "__len__") else [max_new_tokens] * len(prompts)
        limits = [list(limit) if hasattr(limit, "__len__") else [limit] * n for limit in limits]
        ids = range(len(prompts)) if request_ids is None else request_ids
        for name, values in (("max_new_tokens", limits), ("request_ids", ids)):
            if len(values) != len(prompts):
                raise ValueError(f"{name} has {len(values)} numbers for {len(prompts)} prompts")
        least = min((min(limit, default=0) if len(limit) == n else 0 for limit in limits), default=1)
        if n < 1 or least < 1:
            raise ValueError(f"n {n} and max_new_tokens {least} must be at least 1, of lists n a prompt")
        for i, prompt in enumerate(prompts):
            self._check_prompt(i, prompt)
        if self.max_len is not None:
            limits = [[min(x, self.max_len - len(prompt)) for x in limit] for limit, prompt in zip(limits, prompts)]
        keys, blocks = stream_keys(seed, ids, n), self._blocks(prompts, limits, n)
        return Rollout(self.model, prompts, keys, limits, policy, self._stop(stop), self.slots, blocks)

    def _blocks(self, prompts, limits, n: int) -> tuple[int, int] | None:
        """(block_len, number of blocks) of a paged cache that holds all rows, or what memory allows; None for a dense one."""
        p = self.model.embed.weight
        size = self.block_len if self.block_len is not None else BLOCK_LEN if p.is_cuda else 0
        if not size:
            return None
        row = max((-(-(len(prompt) + max(limit)) // size) for prompt, limit in zip(prompts, limits)), default=1)
        slots = min(self.slots, n * len(prompts))
        number = slots * (row + 1) + row  # a block more than a row needs, which _fill_blocks leaves free, and a prompt
        if self.cache_tokens is not None:
            number = min(number, self.cache_tokens // size)
        elif p.is_cuda:
            c = self.model.config
            one = 2 * c.num_layers * c.num_kv_heads * c.head_dim * size * self.model.compute_dtype.itemsize
            torch.cuda.empty_cache()  # what torch has kept of earlier rollouts counts as taken otherwise
            number = min(number, int(GPU_SHARE * torch.cuda.mem_get_info(p.device)[0]) // one)
        if number < row:
            raise ValueError(
                f"the KV cache has room for {number} blocks of {size} tokens, and a request needs up to {row}: give it more "
                "memory (cache_tokens), or requests a lower max_new_tokens"
            )
        return size, number + 1  # block 0 is scratch

    def _stop(self, stop) -> Stop:
        """What to stop at. Kept from call to call: reading a large vocabulary for stop strings takes a second."""
        if stop is None:
            stop = () if self.tokenizer is None else self.tokenizer.stop_ids
        stop = (stop,) if isinstance(stop, (str, int)) else tuple(stop)
        if stop not in self.stops:
            device = self.model.embed.weight.device
            self.stops[stop] = Stop(stop, self.tokenizer, self.model.config.vocab_size, device)
        return self.stops[stop]

    def _check_prompt(self, i: int, prompt: Sequence[int]) -> None:
        vocab = self.model.config.vocab_size
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: a model needs at least one token to go on from")
        if self.max_len is not None and len(prompt) >= self.max_len:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, which leaves no room below max_len {self.max_len}")
        if bad := [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocab]:
            raise ValueError(f"prompt {i} holds the id {bad[0]}; this model's vocabulary is 0 to {vocab - 1}")


@contextmanager
def cast_weights(model: Llama):
    """Within, the matrices are in the dtype they are computed in, so that no step casts them again; then as before.

    The bits are the same: it is the cast that each layer makes anyway. Nothing to do in fp32, or under FSDP2, whose
    gathered weights arrive in their compute dtype.
    """
    changed = [p for p in model.parameters() if p.ndim > 1 and p.dtype != model.compute_dtype]
    masters = [p.data for p in changed]
    try:
        for p in changed:
            p.data = p.data.to(model.compute_dtype)
        yield
    finally:
        for p, master in zip(changed, masters):
            p.data = master


@contextmanager
def unordered_writes():
    """Within, torch need not put writes in an order, as `use_deterministic_algorithms` asks of it.

    The sampler writes each number to a place of its own, so nothing can differ; ordering would copy indices to the GPU
    in the middle of a step, which a CUDA graph cannot record, and cumsum would refuse to run.
    """
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def fsdp_modules(model) -> list:
    """The modules that FSDP2 has sharded, none of a plain model."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


@contextmanager
def unsharded(model: Llama):
    """Within, an FSDP2 model's weights are whole on every rank, and its forward does not communicate; then sharded.

    So ranks may take different numbers of steps, which an all-gather in every layer would not survive. It costs one
    copy of the weights in the compute dtype. Other models are left alone. Not to be entered in inference mode: the
    gathered tensors are used by the training that follows.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    modules = fsdp_modules(model)
    if not modules:
        yield
        return
    assert not torch.is_inference_mode_enabled(), "enter unsharded() outside inference mode"
    # FSDP2 takes the first module that runs for the root. The sampler calls hidden(), so that must count as the root's.
    register_fsdp_forward_method(model, "hidden")
    try:
        for m in modules:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        yield
    finally:
        del model.hidden  # the instance's wrapper; the method is back
        for m in modules:
            m.reshard()
            m.set_reshard_after_forward(m is not model, recurse=False)  # fully_shard's own defaults


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, and the command line


def load_model(path: str, device: str = "cpu"):
    """(model, tokenizer) of a stage's or a checkpoint's folder, ours or Hugging Face's, computing in the dtype stored."""
    from data import tokenizer

    folder = files.find_checkpoint(path)
    words = tokenizer.load(folder)
    meta = os.path.join(folder, "meta.json")  # of our checkpoints: says which tokenizer they were trained with
    if os.path.exists(meta) and files.read_json(meta).get("tokenizer", words.hash) != words.hash:
        raise ValueError(f"{folder}: its tokenizer.model is not the one that this model was trained with")
    model = Llama.from_pretrained(folder).to(device).eval()
    model.compute_dtype = model.embed.weight.dtype
    return model, words


def parse_args():
    from data import prompts

    parser = files.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("prompt", nargs="?", help="text to go on from; without it, a conversation")
    parser.add_argument("--ckpt", required=True, help="a stage's folder (its newest checkpoint) or a checkpoint's")
    parser.add_argument("--template", choices=["none", *prompts.TEMPLATES], help="what to put around the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, help="1 is what is trained; lower is less varied")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the most likely tokens of this mass")
    parser.add_argument("--top-k", type=int, default=0, help="keep this many tokens (0: all)")
    parser.add_argument("--min-p", type=float, default=0.0, help="keep tokens this likely, relative to the likeliest")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token: --temperature 0")
    parser.add_argument("--n", type=int, default=1, help="completions of the prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # A conversation asks questions; a prompt on the command line is taken as it is.
    args.template = args.template or ("simple" if args.prompt is None else "none")
    return args


def answer(sampler: Sampler, text: str, args, seed: int) -> None:
    """Print the completions of one prompt: a single one as it is sampled, several when they are all there."""
    from data import prompts

    template = prompts.TEMPLATES.get(args.template)
    ids = sampler.tokenizer.encode(template(text) if template else text)
    options = {
        "max_new_tokens": args.max_new_tokens, "temperature": 0.0 if args.greedy else args.temperature,
        "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p, "seed": seed,
        "stop": (*sampler.tokenizer.stop_ids, *(prompts.STOP if template else ())),
    }  # fmt: skip
    if args.n == 1:
        for piece in sampler.stream(ids, **options):
            print(piece, end="", flush=True)
        print()
        return
    for j, completion in enumerate(sampler.generate([ids], n=args.n, **options)[0], 1):
        print(f"--- {j} of {args.n}: {len(completion.tokens)} tokens, {completion.finish_reason}\n{completion.text}")


def main() -> None:
    args = parse_args()
    sampler = Sampler(*load_model(args.ckpt, "cuda" if torch.cuda.is_available() else "cpu"))
    if args.prompt is not None:
        return answer(sampler, args.prompt, args, args.seed)
    print(f"template {args.template}; a question a line, an empty line or Ctrl-D ends", file=sys.stderr)
    for turn in itertools.count():
        try:
            text = input("> ").strip()
        except EOFError:
            text = ""
        if not text:
            return
        answer(sampler, text, args, args.seed + turn)  # the same question twice gives two answers


if __name__ == "__main__":
    files.run_cli(main)

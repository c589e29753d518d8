"""GRPO on a checkpoint: sample groups of responses, score their final answers, make the better ones likelier.

One step: P problems, G responses to each from the current weights (sample.py); reward +1 if the final answer
is correct, -1 if not (verify.py); each response is compared with its own group, A = (r - mean) / std, which
makes a value network unnecessary; then one or more clipped policy-gradient updates. The choices that matter:

1. The policy that is sampled is the policy that is trained: the same temperature in both, nothing truncated,
   the stop token trained like any other. The difference that is left is logged as the gap.
2. One loss function, `grpo_loss`, on plain tensors; a variant is a branch of a few lines beside its formula.
3. Denominators are counted over all ranks and micro-batches before the first backward pass, so the gradient
   does not depend on how the batch is cut. Responses are packed without padding.
4. Everything random is a function of (seed, step): the order of the prompts, each response's random numbers.
   A run that is killed and started again goes on as if nothing had happened, bit for bit.

    GRPO (DeepSeekMath)    --loss-agg sequence --kl-coef 0.04
    DAPO                   --clip-high 0.28 --filter refill --overlong punish
    Dr. GRPO               --advantage mean --loss-agg constant
    GSPO                   --surrogate gspo --clip-low 3e-4 --clip-high 4e-4 --loss-agg sequence
    CISPO                  --surrogate cispo --clip-high 4
    OctoThinker, paper     --preset 1b, 3b or 8b (and --template complex for long chains of thought)
    OctoThinker, scripts   --prompts-per-step 256 --updates 16 --length-schedule 0:2048,100:4096,160:8192

    python rl.py --branch long                                     # from runs/tiny/long, in runs/tiny/rl-long
    python rl.py --ckpt runs/tiny/stable@1200                      # from a step that --keep-every kept
    python rl.py --ckpt DIR --prompts FILE.jsonl --eval FILE.jsonl # rows {"problem": ..., "answer": ...}
    python rl.py --branch long --reward mine.py:reward --name mine # a reward of your own, in rl-mine
    python rl.py --plan --preset 8b                              # memory and seconds per step on 1 and 8 GPUs
    python rl.py --ckpt DIR --prompts hub:openai/gsm8k:main --eval gsm8k --data DATA
    torchrun --nproc_per_node=8 rl.py --branch long --preset 3b --prompts FILE   # a CPU: the same, gloo

The metrics, one row per step in metrics.jsonl:

    reward, accuracy     mean reward (+1 or -1, less what --overlong punish takes); share of correct responses
    length, length_*     mean length in tokens of all, of correct and of wrong responses
    truncated, cap       share of responses cut at the length cap (the others stopped by themselves); the cap
    no_signal            share of responses whose group has equal rewards: they teach nothing
    pass_at_n            share of problems that at least one of the n responses solves
    problems             problems of the step: more than --prompts-per-step if --filter refill took others
    entropy              mean -log p of the sampled tokens: estimates the policy's entropy, in nats per token
    gap, gap_max, gap_kl sampler against trainer: mean and largest difference of a token's log-probability,
                         and the k3 estimate of their KL; over trained tokens
    clip_low, clip_high  share of tokens whose ratio is outside the clip range where that stops the gradient
                         (0 with one update per rollout)
    kl                   k3 estimate of KL to the reference; with --kl-coef only
    lr, grad_norm, skipped, trained_tokens
                         learning rate; gradient norm before clipping at 1.0; updates left out because it was
                         not finite (five steps in a row without an update stop the run); response tokens
                         that got a forward pass
    time_*, share_rollout, *_tokens_per_s        seconds and speed of rollout, update and evaluation
    calls, call_errors   with --tool: calls of the calculator per response; the share of them that were errors
    eval_*               the same on eval_n held-out problems, greedy, with the template of training and its
                         cap (at the start and the end: the last cap); eval_accuracy/LEVEL on those of a
                         level (generated ones: number of operations), or of a further --eval set
    curve_*              the same on the first --eval-subset of them, which every evaluation has in common;
                         --ckpt RUN@best is the checkpoint with the highest curve_accuracy
"""

import argparse
import contextlib
import functools
import glob
import hashlib
import importlib.util
import json
import math
import numbers
import os
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import midtrain
import verify
from data import benchmarks, files, prompts, recipes, synth
from midtrain import World
from model import PRESETS, Llama, LlamaConfig, config_from_hf, load_pretrained
from sample import (
    GPU_SHARE,
    Sampler,
    cache_bytes,
    calls_of,
    free_tokens,
    load_words,
    sampling_mode,
    stacked,
    unsharded,
)

# ---- The algorithm, on plain tensors -----------------------------------------------------------------------


def advantages(rewards: Tensor, kind: str = "group", eps: float = 1e-6) -> Tensor:
    """How much better each response is than its group: rewards (P, G) → (P, G).

    "group"  (r - mean) / (std + eps), std with ddof 1        GRPO (DeepSeekMath, 2402.03300)
    "mean"   r - mean: hard and easy prompts weigh the same   Dr. GRPO (2503.20783)
    "rloo"   r - mean of the others                           RLOO (2402.14740)

    Exactly 0 where all rewards of a group are equal. A reward of NaN (could not be scored) has advantage 0
    and is left out of its group's mean and std."""
    scored = ~rewards.isnan()
    r, n = rewards.nan_to_num(0.0).double(), scored.sum(1, keepdim=True).clamp(min=1)
    centred = (r - r.sum(1, keepdim=True) / n) * scored
    if kind == "group":
        std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        out = centred / (std + eps)
    elif kind == "mean":
        out = centred
    elif kind == "rloo":
        out = centred * n / (n - 1).clamp(min=1)
    else:
        raise ValueError(f'unknown advantage "{kind}"; valid: group, mean, rloo')
    return torch.where(has_signal(rewards)[:, None], out, 0.0).to(rewards.dtype)


def has_signal(rewards: Tensor) -> Tensor:
    """(P, G) → (P,) bool: do the group's rewards differ? Exactly: rounding may give equal ones a std."""
    low = rewards.nan_to_num(torch.inf).amin(1)
    return low < rewards.nan_to_num(-torch.inf).amax(1)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """KL(policy || reference), estimated at tokens of the policy (Schulman 2020); x = logp - ref_logp.

    As a loss only k2 has the KL's gradient in expectation; k1's is 0 on average, k3's right to first order.
    """
    x = (logp - ref_logp).clamp(-20, 20)
    estimates = {"k1": x, "k2": x.square() / 2, "k3": (-x).exp() - 1 + x}
    if kind not in estimates:
        raise ValueError(f'unknown KL estimate "{kind}"; valid: k1, k2, k3')
    return estimates[kind]


@dataclass(frozen=True)
class LossConfig:
    """Which variant of the loss; each field is the flag of the same name."""
    surrogate: str = "clip"  # | "gspo" | "cispo"
    loss_agg: str = "token"  # | "sequence" | "constant"
    clip_low: float = 0.2  # a ratio may fall to 1 - this
    clip_high: float = 0.2  # and grow to 1 + this
    dual_clip: float = 0.0  # bound for bad tokens grown likely; 0: off
    is_cap: float = 0.0  # cap of the importance weights for sampler != trainer; 0: off
    kl_coef: float = 0.0
    kl: str = "k3"


def grpo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig = LossConfig(),
    denominator=None, sampler_logp: Tensor | None = None, ref_logp: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of N responses of up to T tokens → (loss, sums over tokens for the metrics).

    logp, old_logp (N, T): log-probabilities of the sampled tokens, now and before the first update; only logp
    has a gradient. mask (N, T): 1 on sampled tokens, the stop token included. advantages (N,). sampler_logp,
    ref_logp (N, T): needed by is_cap and kl_coef.

    denominator: what the sum is divided by, counted over the whole batch, of which these N may be a part:
    tokens ("token"), responses ("sequence"), responses x length cap ("constant"). None: these N are the
    batch. Where old_logp is logp the value says nothing; the gradient is the policy's, -A * grad logp per
    token."""
    c, A, lengths = config, advantages[:, None], mask.sum(1)  # A (N, 1): of all tokens of a response; |o_i|
    change = (logp - old_logp).clamp(-20, 20)  # log w; exp(20) is as good as infinite
    if c.surrogate == "gspo":  # GSPO (2507.18071): one w per response, the mean of its tokens' logs
        mean = (change.detach() * mask).sum(1, keepdim=True) / lengths.clamp(min=1)[:, None]
        change = mean + logp - logp.detach()  # the value of the mean, the gradient of the token
    ratio = change.exp()  # w = pi / pi_old
    # PPO (1707.06347), GRPO: min(w A, clip(w, 1 - low, 1 + high) A).  DAPO (2503.14476): high > low.
    objective = torch.minimum(ratio * A, ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * A)
    if c.surrogate == "cispo":  # MiniMax-M1 (2506.13585): sg[min(w, 1 + high)] A log pi: every token learns
        objective = ratio.detach().clamp(max=1 + c.clip_high) * A * logp
    elif c.surrogate not in ("clip", "gspo"):
        raise ValueError(f'unknown surrogate "{c.surrogate}"; valid: clip, gspo, cispo')
    if c.dual_clip:  # Ye et al. 2020 (1912.09729): for A < 0, max(min(w A, clip(w) A), c A)
        objective = torch.where(A < 0, torch.maximum(objective, c.dual_clip * A), objective)
    loss = -objective
    if c.is_cap:  # truncated importance weights for sampler != trainer: min(pi_old / mu, C)
        gap = ((old_logp - sampler_logp) * mask).clamp(-20, 20)
        if c.surrogate == "gspo":  # of a response as a whole, like its ratio (ours: the paper has none)
            gap = gap.sum(1, keepdim=True) / lengths.clamp(min=1)[:, None]
        loss = loss * gap.exp().clamp(max=c.is_cap)
    if c.kl_coef:
        loss = loss + c.kl_coef * kl_estimate(logp, ref_logp, c.kl)

    if c.loss_agg == "token":  # sum_i sum_t l / sum_i |o_i|: every token weighs the same (DAPO)
        own = lengths.sum()
    elif c.loss_agg == "sequence":  # 1/N sum_i 1/|o_i| sum_t l: every response weighs the same (GRPO)
        own, loss = (lengths > 0).sum(), loss / lengths.clamp(min=1)[:, None]
    elif c.loss_agg == "constant":  # 1/(N L) sum_i sum_t l: no length in it, unbiased (Dr. GRPO)
        own = torch.nan  # the cap L cannot be seen here: the denominator must be given
    else:
        raise ValueError(f'unknown loss aggregation "{c.loss_agg}"; valid: token, sequence, constant')
    loss = (loss * mask).sum() / (own if denominator is None else denominator)

    low = (A < 0) & (ratio < 1 - c.clip_low)  # where "clip" has no gradient
    high = (A > 0) & (ratio > 1 + c.clip_high)
    sums = {"tokens": lengths.sum(), "clip_low": (low * mask).sum(), "clip_high": (high * mask).sum()}
    if ref_logp is not None:
        sums["kl"] = (kl_estimate(logp.detach(), ref_logp, "k3") * mask).sum()
    return loss, sums


def overlong_penalty(length: int, cap: int) -> float:
    """DAPO's soft overlong punishment (2503.14476, eq. 13): 0 up to 4/5 of the cap, then linear to -1 at it.
    The buffer, a fifth of the cap, is theirs: 4,096 of 20,480 tokens."""
    buffer = cap / 5
    return min(0.0, (cap - buffer - length) / buffer)


def parse_schedule(text: str) -> dict[int, int]:
    """0:2048,200:4096 → {0: 2048, 200: 4096}: from which step on a response may have how many tokens."""
    caps = {}
    with contextlib.suppress(ValueError):
        caps = {int(step): int(cap) for step, cap in (part.split(":") for part in text.split(","))}
    if 0 not in caps or min(caps) < 0 or min(caps.values()) < 1:
        raise ValueError(f'"{text}" is no length schedule: step:tokens pairs begin at 0, as 0:2048,200:4096')
    return caps


def length_cap(length_caps: dict[int, int], step: int) -> int:
    """The value at the largest key not above `step`."""
    return length_caps[max(key for key in length_caps if key <= step)]


def prompt_order(n: int, per_step: int, step: int, seed: int) -> list[int]:
    """Which of n problems `step` takes: the next per_step of an endless row of seeded permutations of n."""
    first = step * per_step
    epochs = range(first // n, (first + per_step - 1) // n + 1)
    row = np.concatenate([np.random.default_rng((seed, epoch)).permutation(n) for epoch in epochs])
    start = first - epochs[0] * n
    return row[start : start + per_step].tolist()


# ---- Rollouts ----------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One response to one problem, as sampled: its ids are never made from text again."""
    group: int  # place of its problem in the step
    prompt: list[int]
    tokens: list[int]  # sampled ids, the stop token included
    logprobs: list[float]  # the sampler's
    text: str
    stopped: bool  # False: cut at the length cap
    correct: bool
    reward: float
    advantage: float
    signal: bool  # do the scores of its group differ?
    given: list[bool] | None = None  # with a calculator: which tokens are results, and were not sampled
    results: tuple[str, ...] = ()

    @property
    def own(self) -> int:  # tokens that it sampled: those to learn from
        return len(self.tokens) - sum(self.given or ())


def rollout(
    sampler: Sampler, problems: list[dict], n: int, cap: int, temperature: float, first_id: int, args, world
) -> list[Sample]:
    """n scored responses of up to `cap` tokens to each of this rank's problems (every size-th), by group.

    Response j to the i-th problem draws from (seed, first_id + i, j), on whatever rank. Ranks do not steal
    work from each other: in bf16 a rollout depends on its neighbours, and so would on the ranks' speed."""
    mine = range(world.rank, len(problems), world.size)
    reward = args.reward and load_reward(args.reward)
    groups = verify.sample_and_grade(
        sampler, [problems[i] for i in mine], [problems[i]["tokens"] for i in mine],
        partial(score, reward=reward) if reward else score, n, cap, temperature, args.seed, args.stop,
        [first_id + i for i in mine],
    )
    samples = []
    for i, group in zip(mine, groups, strict=True):
        scores = rewards = [r for _, r in group]
        if args.overlong == "punish":
            rewards = [r + overlong_penalty(len(c.tokens), cap) for c, r in group]
        values = advantages(torch.tensor([rewards], dtype=torch.float64), args.advantage)[0].tolist()
        signal = min(scores) < max(scores)  # whatever the punishment: DAPO's filter looks at what is correct
        for (c, r), reward, value in zip(group, rewards, values, strict=True):
            ids, stopped = (problems[i]["tokens"], c.tokens, c.logprobs), c.finish_reason == "stop"
            correct = (verify.reward(c.text, problems[i]["answer"]) if args.reward else r) > 0
            samples.append(
                Sample(i, *ids, c.text, stopped, correct, reward, value, signal, c.given, c.results))
    return samples


def score(text: str, problem: dict, reward: Callable | None = None) -> float:
    """verify.reward, or --reward's, of (response, gold answer): it must return a number."""
    gold = problem["answer"]
    try:
        r = (reward or verify.reward)(text, gold)
    except Exception as error:
        if not reward:
            raise
        raise ValueError(f"--reward fails on {text[:60]!r}: {type(error).__name__}: {error}") from error
    if not isinstance(r, numbers.Real) or not math.isfinite(r):
        raise ValueError(f"the reward of {text[:60]!r} is {r!r}, not a finite number (answer {gold!r})")
    return float(r)


@functools.cache
def load_reward(text: str) -> Callable[[str, str], float]:
    """The function that --reward FILE.py:FUNCTION names. Accuracy stays verify.py's, whatever is trained."""
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not os.path.isfile(path):
        raise ValueError(f"--reward {text}: no such file; write it as FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location("reward_of_this_run", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--reward {path} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(found := getattr(module, name, None)):
        own = [key for key, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
        raise ValueError(f"--reward {path} has no function {name!r} (valid: {', '.join(own) or 'none'})")
    return found


def reward_hash(text: str) -> str:
    """Of the file that --reward names, which must load."""
    load_reward(text)
    return files.file_hash(text.rpartition(":")[0])[:16]


def rollouts_of_step(sampler: Sampler, train: list[dict], taken: int, cap: int, args, world: World):
    """(problems, all samples, those to learn from, of how many groups). All follows from the seed and from
    `taken`, how many times a step's number of problems was taken before.

    With --filter refill (DAPO's dynamic sampling) further problems are taken, --refills times at most, until
    as many groups as a step has problems have a signal; the first of these are learned from."""
    P, rounds = args.prompts_per_step, 1 + args.refills if args.filter == "refill" else 1
    problems, samples = [], []
    for i in range(taken, taken + rounds):
        more = [train[j] for j in prompt_order(len(train), P, i, args.seed)]
        made = rollout(sampler, more, args.rollouts, cap, args.temperature, i * P, args, world)
        samples += [replace(s, group=s.group + len(problems)) for s in made]
        problems += more
        groups = informative(samples, len(problems), world) if args.filter == "refill" else range(P)
        if len(groups) >= P:
            break
    number = {group: i for i, group in enumerate(groups[:P])}
    kept = [replace(s, group=number[s.group]) for s in samples if s.group in number]
    return problems, samples, kept, len(number)


def informative(samples: list[Sample], groups: int, world: World) -> list[int]:
    """Which of the groups 0..groups-1 have responses of different scores, on whatever rank they are."""
    flags = [0.0] * groups
    for s in samples:
        flags[s.group] = float(s.signal)
    return [group for group, flag in enumerate(over_ranks(flags, world, dist.ReduceOp.MAX)) if flag]


def over_ranks(values: list[float], world: World, op=dist.ReduceOp.SUM) -> list[float]:
    """Sums (or another reduction) of a few numbers over all ranks."""
    t = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(t, op)
    return t.tolist()


CALLS = ("calls", "call_errors")  # metrics of a run with --tool


def rollout_metrics(samples: list[Sample], world: World) -> dict[str, float | None]:
    """Means over the responses of all ranks; lengths in tokens, None where there is nothing to average."""
    sums = torch.zeros(12, dtype=torch.float64)
    for s in samples:
        length, nll = len(s.tokens), -sum(s.logprobs)
        row = (1, length, s.correct, s.correct * length, s.reward, not s.stopped, not s.signal, nll)
        calls = (s.own, s.given is not None, len(s.results), s.results.count(verify.ERROR))
        sums += torch.tensor(row + calls, dtype=torch.float64)
    n, tokens, correct, tokens_correct, reward, cut, silent, nll, own, tool, calls, errors = over_ranks(
        sums.tolist(), world)
    asked, solved = {s.group for s in samples}, {s.group for s in samples if s.correct}
    asked, solved = over_ranks([len(asked), len(solved)], world)  # a group is whole on its rank
    return {
        "reward": reward / n, "accuracy": correct / n, "length": tokens / n,
        "length_correct": tokens_correct / correct if correct else None,
        "length_wrong": (tokens - tokens_correct) / (n - correct) if n > correct else None,
        "truncated": cut / n, "no_signal": silent / n, "entropy": nll / own, "pass_at_n": solved / asked,
    } | ({"calls": calls / n, "call_errors": errors / max(calls, 1)} if tool else {})


# ---- Packing: responses → rows of tokens -------------------------------------------------------------------
# Where prompts are shared, the responses of a row are to one problem and go on from one copy of its prompt,
# the prefix, which attention shows to all of them: computing it once saves 15 to 38 % of a GRPO step on a
# CPU. The GPU's attention kernel knows no prefix, so there each response follows a prompt of its own.


def shares_prompts(device) -> bool:
    return torch.device(device).type == "cpu"


@dataclass
class PackedRow:
    """Responses that go through the model side by side."""
    prefix: list[int]  # what they all go on from: a shared prompt without its last token, or nothing
    samples: list[Sample]

    def document(self, s: Sample) -> list[int]:
        """The ids of a response's own document: what the prefix lacks of its prompt, then the response."""
        return s.prompt[len(self.prefix) :] + s.tokens

    @property
    def length(self) -> int:
        """In tokens. The last token of a response is left out: nothing is predicted from it."""
        return len(self.prefix) + sum(len(self.document(s)) - 1 for s in self.samples)


def first_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Sequences → rows of at most `width` tokens: longest first, each into the first row with room for it."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def pack_rows(samples: list[Sample], width: int, share: bool) -> list[PackedRow]:
    """Samples → rows of at most `width` tokens (or as the longest), long rows first: little padding."""
    groups: dict[int, list[Sample]] = {}
    for s in samples:
        groups.setdefault(s.group if share else 0, []).append(s)
    rows = []
    for group in groups.values():
        prefix = group[0].prompt[:-1] if share else []
        lengths = [PackedRow(prefix, [s]).length - len(prefix) for s in group]
        for chosen in first_fit(lengths, max([width - len(prefix), *lengths])):
            rows.append(PackedRow(prefix, [group[i] for i in chosen]))
    return sorted(rows, key=lambda row: -row.length)


@dataclass
class MicroBatch:
    """Rows for one forward pass, and where the responses' log-probabilities are in its output."""
    tokens: Tensor  # (B, W) prompts and responses, several to a row
    targets: Tensor  # (B, W) the next token where that was sampled, else -1
    doc_start: Tensor  # (B, W)
    prefix: Tensor | None  # (B,) tokens that all responses of a row go on from; None: no row has any
    logp_index: Tensor  # (N, T) flat index in (B, W) of the position that predicts token t of response i
    mask: Tensor  # (N, T) 1 where response i has a token t that it sampled
    advantages: Tensor  # (N,)
    sampler_logp: Tensor  # (N, T)
    old_logp: Tensor | None = None  # (N, T)
    ref_logp: Tensor | None = None  # (N, T)


def collate(rows: list[PackedRow], device) -> MicroBatch:
    """Rows → tensors. No rows make a micro-batch without responses: a rank without work runs it, to take part
    in the collectives."""
    samples = [s for row in rows for s in row.samples]
    N, T = len(samples), max((len(s.tokens) for s in samples), default=1)
    B, W = max(1, len(rows)), max((row.length for row in rows), default=2)  # 1 would be compiled apart
    tokens, targets, doc_start = np.zeros((B, W), int), np.full((B, W), -1), np.zeros((B, W), int)
    logp_index, mask = np.zeros((N, T), int), np.zeros((N, T), np.float32)
    sampler_logp, i, prefix = np.zeros((N, T), np.float32), 0, np.zeros(B, int)
    for b, row in enumerate(rows):
        at = prefix[b] = len(row.prefix)
        tokens[b, :at] = row.prefix
        for s in row.samples:
            ids, n = row.document(s), len(s.tokens)
            end = at + len(ids) - 1
            first = end - n  # the prompt's last token predicts the response's first
            tokens[b, at:end], targets[b, first:end], doc_start[b, at:end] = ids[:-1], s.tokens, at
            logp_index[i, :n], mask[i, :n] = b * W + np.arange(first, end), 1
            sampler_logp[i, :n] = s.logprobs
            if s.given:  # what the calculator said is read, and nothing is learned from it
                mask[i, :n] -= s.given
                targets[b, first:end][s.given] = -1
            i, at = i + 1, end
        doc_start[b, at:] = at  # what is left of the row is a document of its own
    values = np.array([s.advantage for s in samples], np.float32)
    arrays = (tokens, targets, doc_start, prefix, logp_index, mask, values, sampler_logp)
    batch = MicroBatch(*(torch.from_numpy(x).to(device) for x in arrays))
    batch.prefix = batch.prefix if prefix.any() else None
    return batch


def micro_batches(samples: list[Sample], args, world: World) -> list[MicroBatch]:
    """Rows of row_tokens (or the longest response), micro_tokens per micro-batch; as many on every rank."""
    parts: list[list[PackedRow]] = []
    for row in pack_rows(samples, args.row_tokens, shares_prompts(world.device)):
        if parts and (len(parts[-1]) + 1) * parts[-1][0].length <= args.micro_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    most = int(over_ranks([len(parts)], world, dist.ReduceOp.MAX)[0])  # every rank must join every collective
    return [collate(part, world.device) for part in parts + [[]] * (most - len(parts))]


# ---- Updates -----------------------------------------------------------------------------------------------


def log_probs(model: Llama, b: MicroBatch, temperature: float) -> Tensor:
    """Log-probabilities (N, T) of the sampled tokens at this temperature; any number where mask is 0."""
    return -model(b.tokens, b.targets, b.doc_start, temperature, prefix=b.prefix).flatten()[b.logp_index]


def update(model, reference, optimizer, samples: list, cap: int, args, world, groups=None, stop=lambda: 0):
    """One or several optimizer steps on a rollout → metrics. Several: its problems in --updates equal parts.
    samples: of groups 0..groups-1 (None: as many as a step has problems). {} if stop() said so before the
    first of the steps.

    Responses of a group without signal have no gradient: without a KL term they get no forward pass. They
    count in the denominator, the loss being a mean over all responses, unless --filter drop takes them out of
    it."""
    groups = groups or args.prompts_per_step
    kept = [s for s in samples if s.signal or args.filter == "none"]
    kept = [s for s in kept if s.stopped or args.overlong != "mask"]
    parts = [[s for s in kept if s.group * args.updates // groups == u] for u in range(args.updates)]
    batches = [micro_batches([s for s in part if s.advantage or args.kl_coef], args, world) for part in parts]
    with torch.no_grad():  # before the first update changes the weights
        for b in (b for part in batches for b in part):
            if args.updates > 1:  # in the micro-batches of the update: other rows would round differently
                b.old_logp = log_probs(model, b, args.temperature)
            if args.kl_coef:
                b.ref_logp = log_probs(reference, b, args.temperature)
    sums = dict.fromkeys(("tokens", "clip_low", "clip_high", "kl", "gap", "gap_kl", "gap_max"), 0.0)
    norms = []
    for part, group in zip(parts, batches, strict=True):
        tokens, n = over_ranks([sum(s.own for s in part), len(part)], world)
        total = {"token": tokens, "sequence": n, "constant": n * cap}[args.loss_agg]
        for b in group:
            if not norms and stop():
                optimizer.zero_grad(set_to_none=True)
                return {}
            backward(model, b, total, sums, args, world)
        if group:  # else there is no signal on any rank, and the weights stay
            norms.append(optimizer_step(model, optimizer))
    return update_metrics(sums, norms, args, world)


def backward(model, b: MicroBatch, total: float, sums: dict[str, float], args, world: World) -> None:
    """Add a micro-batch's gradient to the parameters' and its metrics to `sums`."""
    logp = log_probs(model, b, args.temperature)
    old_logp = logp.detach() if b.old_logp is None else b.old_logp  # one update per rollout: the ratio is 1
    config = LossConfig(**{name: getattr(args, name) for name in LossConfig.__dataclass_fields__})
    loss, parts = grpo_loss(logp, old_logp, b.advantages, b.mask, config, total, b.sampler_logp, b.ref_logp)
    (loss * world.size).backward()  # FSDP2 averages gradients over ranks; `total` already is a sum over them
    gap = (old_logp - b.sampler_logp) * b.mask  # sampler against trainer: 0 but for rounding
    parts |= {"gap": gap.abs().sum(), "gap_kl": (gap.exp() - 1 - gap).sum()}
    for key, value in parts.items():
        sums[key] += value.item()
    sums["gap_max"] = max(sums["gap_max"], gap.abs().max().item() if gap.numel() else 0.0)


def optimizer_step(model, optimizer) -> float:
    """Clip, step, clear → the norm before clipping. If that is not finite there is no step, on any rank."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), midtrain.GRAD_CLIP)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of all shards: all agree
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def update_metrics(sums: dict[str, float], norms: list[float], args, world: World) -> dict:
    """Sums over this rank's tokens → means over those of all ranks; norms of the updates → their mean."""
    gap_max = over_ranks([sums.pop("gap_max")], world, dist.ReduceOp.MAX)[0]
    trained, *rest = over_ranks(list(sums.values()), world)
    metrics = dict(zip(list(sums)[1:], (x / trained if trained else None for x in rest), strict=True))
    if not args.kl_coef:
        metrics.pop("kl")
    finite = [x for x in norms if math.isfinite(x)]
    metrics |= {"gap_max": gap_max, "trained_tokens": int(trained), "skipped": len(norms) - len(finite)}
    return metrics | {"grad_norm": sum(finite) / len(finite) if finite else None}


# ---- A run -------------------------------------------------------------------------------------------------


def train(args, world: World) -> None:
    """GRPO to --steps, from where the run's folder stands. After a signal: save, SystemExit(128 + signal)."""
    source, name = starting_point(args)
    args.tool = (max_calls := calls_of(source, args.tool)) > 0 or None  # None: as older runs have it
    folder = os.path.join(args.out, name)
    model, reference, tok = load_policy(source, args, world)
    train_problems, held_out = read_problems(args, tok)
    settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
    settings |= {"prompts_hash": contents(train_problems), "eval_hash": contents(held_out)}
    settings |= {"reward_hash": reward_hash(args.reward)} if args.reward else {}
    args.length_caps, args.stop = parse_schedule(args.length_schedule), (*tok.stop_ids, *prompts.STOP)
    warn_of_positions(model.config, args)
    optimizer = midtrain.make_optimizer(model, args.lr, weight_decay=0.0)
    make_state(optimizer)
    sampler = Sampler(model, tok, args.slots, max_calls=max_calls)
    saved = midtrain.on_rank0(lambda: midtrain.open_folder(folder, settings))
    meta = midtrain.load_checkpoint(saved, model, optimizer) if saved else {}
    start = meta.get("step", 0)
    past = Past(*meta.get("past", (start, 0, 0, -1.0)))  # an older version's run has none
    size_pool(sampler, meta.get("cache_tokens"), args, world)
    late, begun = {}, time.perf_counter()
    due = folder, start, args.steps, args.eval_every, "eval_accuracy"
    if saved and midtrain.on_rank0(lambda: midtrain.unevaluated(*due)):
        late = evaluate(sampler, held_out, start, name, args, world)
        is_best(late, start, past)
    log = midtrain.MetricsLog(folder, start if saved else -1, args.tensorboard, late)
    begin = f"goes on at step {start}" if saved else f"starts from {source}"
    sizes = f"{len(train_problems)} problems, {len(held_out)} held out, {args.dtype}"
    files.print0(f"[{name}] {begin}: {sizes} on {world.size} x {world.device.type}")
    meta = {"stage": name, "settings": settings, "cache_tokens": sampler.cache_tokens}
    at = start  # the step that was saved last

    def save(step: int) -> str:
        said = meta | {"past": astuple(past)}
        return midtrain.save_checkpoint(folder, step, model, optimizer, tok, said, best=past.best)

    with midtrain.Interrupt(name, world) as interrupt:
        sampler.halted = lambda: interrupt.signum  # what it was doing then is dropped
        if not saved:
            first = evaluate(sampler, held_out, 0, name, args, world, interrupt.agreed)
            log.write({"step": 0} | (first or interrupt.leave(0, None)))
        for step in range(start + 1, args.steps + 1):
            interrupt.step, last = step, step == args.steps
            row = grpo_step(model, reference, optimizer, sampler, train_problems, step, past.taken, folder,
                            args, world, interrupt)
            if not row:  # dropped, so that what is done is saved before whoever sent the signal kills
                interrupt.leave(step - 1, save(step - 1) if step - 1 > at else saved)
            past.taken += row["problems"] // args.prompts_per_step
            if step % args.log_every == 0 or last:
                took = time.perf_counter() - begun
                left = took / (step - start) * (args.steps - step)
                files.print0(f"[{name}] step {step}/{args.steps} {line(row, took, left, world)}")
            if step % args.eval_every == 0 or last:  # if a signal cuts it short: at the next start
                row |= evaluate(sampler, held_out, step, name, args, world, interrupt.agreed)
            log.write(row)
            lost = row["skipped"] > 0 and row["grad_norm"] is None  # not one update
            past.skips = midtrain.count_skips(lost, past.skips, step, name, "gradient")
            signum, best = interrupt.agreed(), is_best(row, step, past)
            if step % args.save_every == 0 or last or signum or best:
                saved, at = save(step), step
            if signum:
                interrupt.leave(step, saved)
        if signum := interrupt.agreed():  # it came during the last save
            raise SystemExit(128 + signum)
    files.print0(f"[{name}] done: {saved}")


@dataclass
class Past:
    """What a run that goes on must know beside weights and optimizer."""
    taken: int  # how many times prompts_per_step problems were taken
    skips: int  # steps in a row without an update, for a gradient that was not finite
    best: int  # step with the highest curve_accuracy
    highest: float


def is_best(row: dict, step: int, past: Past) -> bool:
    """Was this step evaluated, and better than all before? Then that is noted."""
    if best := row.get("curve_accuracy", -1.0) > past.highest:
        past.best, past.highest = step, row["curve_accuracy"]
    return best


def grpo_step(
    model, reference, optimizer, sampler, train_problems, step, taken, folder, args, world, interrupt
) -> dict:
    """Rollouts, rewards, update → a row of metrics; {} if a signal came before the weights changed."""
    cap, start = length_cap(args.length_caps, step - 1), time.perf_counter()
    with unsharded(sampler):
        made = rollouts_of_step(sampler, train_problems, taken, cap, args, world)
    if interrupt.agreed():
        return {}
    problems, samples, kept, groups = made
    row = {"step": step, "cap": cap, "lr": args.lr, "problems": len(problems)}
    row |= rollout_metrics(samples, world)
    sampled = time.perf_counter()
    if not (parts := update(model, reference, optimizer, kept, cap, args, world, groups, interrupt.agreed)):
        return {}
    row |= parts
    updated = time.perf_counter()
    if step % args.text_every == 0:
        write_rollouts(f"{folder}/rollouts/step_{step:06d}.jsonl", samples, problems, world)
    roll, upd = sampled - start, updated - sampled
    row |= {"time_rollout": roll, "time_update": upd, "share_rollout": roll / (roll + upd)}
    tokens = row["length"] * len(problems) * args.rollouts
    return row | {"rollout_tokens_per_s": tokens / roll, "update_tokens_per_s": row["trained_tokens"] / upd}


def evaluate(sampler, held_out: list[dict], step: int, name: str, args, world, stop=lambda: 0) -> dict:
    """Greedy responses to held-out problems after `step` steps, with the template and the cap of training; at
    the start and the end with the last cap, so that the two can be compared. {} if a signal cut them short:
    stop() says so."""
    start, ends = time.perf_counter(), not 0 < step < args.steps
    problems = held_out if ends else [row for row in held_out if row["place"] < args.eval_subset]
    cap = args.length_caps[max(args.length_caps)] if ends else length_cap(args.length_caps, step)
    with unsharded(sampler):
        samples = rollout(sampler, problems, 1, cap, 0.0, 0, args, world)
    if stop():
        return {}
    main = [s for s in samples if problems[s.group]["set"] == held_out[0]["set"]]
    m, n = rollout_metrics(main, world), sum(row["set"] == held_out[0]["set"] for row in problems)
    correct = f"{m['accuracy']:.1%} of {n} correct, length {m['length']:.0f}"
    more = f"(correct {m['length_correct'] or 0:.0f}), truncated {m['truncated']:.1%}"
    files.print0(f"[{name}] step {step}/{args.steps} held-out: {correct} {more}")
    write_rollouts(f"{args.out}/{name}/evals/step_{step:06d}.jsonl", samples, problems, world)
    few = rollout_metrics([s for s in main if problems[s.group]["place"] < args.eval_subset], world)
    row = {"eval_n": n, "eval_cap": cap, "steps": args.steps, "time_eval": time.perf_counter() - start}
    kept = ("accuracy", "reward", "length", "length_correct", "length_wrong", "truncated", *CALLS)
    row |= {"eval_" + key: m[key] for key in kept if key in m}
    row |= {"curve_" + key: few[key] for key in ("accuracy", "length")}
    return row | by_part(samples, problems, world)


def by_part(samples: list[Sample], problems: list[dict], world: World) -> dict[str, float]:
    """The accuracy on the problems of each level, if these have levels, and of each --eval set but the first;
    one sample to a problem."""
    first = problems[0]["set"]
    of = [str(p.get("level") or "") if p["set"] == first else p["set"] for p in problems]
    parts = sorted({part for part in of if part})
    right = over_ranks([sum(s.correct for s in samples if of[s.group] == x) for x in parts], world)
    return {f"eval_accuracy/{x}": n / of.count(x) for x, n in zip(parts, right, strict=True)}


def line(m: dict, took: float, left: float, world: World) -> str:
    gap, norm = (f"{m[key]:.1e}" if m[key] is not None else "-" for key in ("gap", "grad_norm"))
    norm += f" SKIPPED {m['skipped']}" if m["skipped"] else ""
    return (
        f"reward {m['reward']:+.3f} correct {m['accuracy']:.1%} length {m['length']:.0f} "
        f"cut {m['truncated']:.1%} entropy {m['entropy']:.2f} no-signal {m['no_signal']:.0%} gap {gap} "
        f"norm {norm} | {m['time_rollout']:.1f} + {m['time_update']:.1f} s, "
        f"{m['rollout_tokens_per_s']:,.0f} tokens/s, eta {midtrain.duration(left)}, "
        f"{midtrain.duration(took)}, {midtrain.peak_memory(world.device) / 2**30:.1f} GiB"
    )


def write_rollouts(path: str, samples: list[Sample], problems: list[dict], world: World) -> None:
    """Every response of the step as a JSON line, in the order of the problems."""
    parts = [samples] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, samples)
    rows = []
    for s in sorted((s for part in parts for s in part), key=lambda s: s.group):  # groups stay in order
        problem, finish = problems[s.group], "stop" if s.stopped else "length"
        row = {"problem": problem["problem"], "gold": problem["answer"], "response": s.text}
        row |= {"reward": s.reward, "correct": s.correct}
        rows.append(row | {"tokens": len(s.tokens), "finish": finish})
    if files.is_rank0():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        files.write_jsonl(path, rows)


# ---- Below: what a run needs: its starting point, its problems, the command line ---------------------------


def starting_point(args) -> tuple[str, str]:
    """(checkpoint folder, name of this run)."""
    name = "rl-" + (args.name or args.branch or os.path.basename(os.path.normpath(args.ckpt)))
    if args.ckpt:
        return midtrain.on_rank0(lambda: files.find_checkpoint(args.ckpt)), name
    stage = os.path.join(args.out, args.branch)
    if midtrain.on_rank0(lambda: midtrain.is_finished(stage)):
        return midtrain.on_rank0(lambda: files.latest_checkpoint(stage)), name
    if args.branch in midtrain.RECIPE:
        flags = f"--branch {args.branch} --preset {args.preset} --out {args.out}"
        how = f"make it with: python midtrain.py {flags}"
    else:
        stages = sorted(os.path.dirname(path) for path in glob.glob("*/checkpoints", root_dir=args.out))
        valid = {*midtrain.RECIPE, *(stage for stage in stages if not stage.startswith("rl-"))}
        how = f"valid: {', '.join(sorted(valid))}"
    raise FileNotFoundError(f"{stage} is not a finished stage to start from; {how}")


def load_policy(source: str, args, world: World):
    """(model, reference or None, tokenizer) of the checkpoint, sharded. Notes in args what was found: its
    dtype, and its weights' fingerprint, so that a run is not continued from a start that was trained anew."""
    if args.dtype == "auto":
        args.dtype = midtrain.fastest_dtype(world.device)
    tok, config = load_words(source), config_from_hf(files.read_json(os.path.join(source, "config.json")))

    def load(again: int) -> Llama:
        model = midtrain.empty_model(config, args, args.dtype, world, dynamic=True, again=again)  # rows vary
        load_pretrained(model, source)
        return model

    reference = load(0) if args.kl_coef else None
    micro = micro_batch(args, world.size)
    model = load(midtrain.check_memory(config, micro, args.dtype, world, "--micro-tokens"))
    norm = model.norm.weight.detach()  # one small tensor is enough to know them by
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).cpu().numpy()
    args.weights = hashlib.sha256(norm.tobytes()).hexdigest()[:16]
    return model, reference, tok


def make_state(optimizer: torch.optim.AdamW) -> None:
    """Adam's state, which its first step would make: the KV cache is to have what it leaves, and a checkpoint
    that is saved before any group had a signal is to be one that can be loaded."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments


def size_pool(sampler: Sampler, stored: int | None, args, world: World) -> None:
    """How many tokens the KV cache of a GPU holds. It decides what is preempted and so, in bf16, bits: all
    ranks, and a run that goes on (`stored`: with what it had), have the same as long as that fits."""
    if world.device.type != "cuda":
        return
    with unsharded(sampler), sampling_mode(sampler.model):
        free = int(over_ranks([free_tokens(sampler.model)], world, dist.ReduceOp.MIN)[0])
    sampler.cache_tokens = stored if stored and stored <= free else int(GPU_SHARE * free)
    if stored and stored > free:
        has = f"{sampler.cache_tokens:,} tokens now, not {stored:,}"
        files.print0(f"the KV cache holds {has}: bits may differ")
    if sampler.cache_tokens < (longest := args.max_prompt + max(args.length_caps.values())):
        has = f"the KV cache has room for {sampler.cache_tokens:,} tokens, and a row takes up to {longest:,}"
        raise ValueError(f"{has}: use more ranks, or a lower --max-new-tokens")


def micro_batch(args, ranks: int) -> SimpleNamespace:
    """The largest micro-batch, in the terms of midtrain.memory_plan(): one of several. recompute: as many
    blocks as it takes to fit."""
    longest = args.max_prompt + max(parse_schedule(args.length_schedule).values())
    tokens = max(args.micro_tokens, args.row_tokens, longest)
    size = dict(micro_batch=1, batch=2 * ranks, seq_len=tokens, replicate=1, recompute=None)
    return SimpleNamespace(**vars(args) | size)


def read_problems(args, tok) -> tuple[list[dict], list[dict]]:
    """(to train on, held out), with the prompts' ids as "tokens"; too long training prompts are left out."""
    if args.prompts == "synth":
        raise ValueError("synth holds test problems: without --prompts, the training split is taken")
    columns = recipes.columns_of(("prompts", "eval"), args.columns)
    if args.prompts:
        train = benchmarks.load_problems(
            args.prompts, args.data, columns=columns["prompts"], to_train=True)
    else:
        train = synth.problems("train", TRAIN_PROBLEMS, args.seed)
    if args.eval:
        sets = {name: benchmarks.load_problems(name, args.data, args.eval_problems, columns=columns["eval"])
                for name in args.eval.split(",")}
    elif args.prompts:
        train, held_out = hold_out(train, args.eval_problems, args.seed)
        if not train:
            raise ValueError(f"{args.prompts} holds one problem, none to evaluate on: give --eval FILE")
        sets = {"held out": held_out}
    else:  # disjoint by construction, and the same for every seed
        sets = {"synth": synth.problems("test", args.eval_problems)}
    for name, rows in sets.items():
        if same := benchmarks.shared(rows, train):
            files.print0(f"warning: {same} of {len(rows)} problems of {name} are among the training prompts")
    held_out = [row | {"set": name, "place": i} for name, rows in sets.items() for i, row in enumerate(rows)]
    for row in train + held_out:
        row["tokens"] = tok.encode(prompts.TEMPLATES[args.template](row["problem"]))
    lengths = [len(row["tokens"]) for row in train]
    kept = [row for row, length in zip(train, lengths) if length <= args.max_prompt]
    limit, most = f"--max-prompt {args.max_prompt}", max(lengths)
    if not kept:
        raise ValueError(f"no prompt is within {limit}: the shortest has {min(lengths)} tokens")
    if len(kept) < len(train):
        out = f"{len(train) - len(kept)} of {len(train)} prompts left out: longer than {limit} tokens"
        files.print0(f"{out} (the longest, problem {lengths.index(most) + 1}, has {most})")
    return kept, held_out


def hold_out(rows: list[dict], most: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(to train on, held out): a tenth of the different problems, at most `most`, drawn by the seed. One that
    comes several times is on one side, and held out once."""
    texts = sorted({benchmarks.plain(row["problem"]): row for row in rows}.items())
    k = min(most, max(1, len(texts) // 10))
    held_out = dict(texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[:k])
    return [row for row in rows if benchmarks.plain(row["problem"]) not in held_out], [*held_out.values()]


def contents(problems: list[dict]) -> str:
    """A fingerprint of problems and answers: a file of the same name may be another one."""
    text = json.dumps([(row["problem"], row["answer"]) for row in problems])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def warn_of_positions(config: LlamaConfig, args) -> None:
    longest = args.max_prompt + max(args.length_caps.values())
    if longest > config.max_position:
        what = f"prompts and responses of up to {longest:,} tokens"
        files.print0(f"warning: {what}, and the model was trained on {config.max_position:,} positions")


BANDWIDTH, REACHED = 4.8e12, 0.6  # bytes per second from the memory of a PLAN_DEVICE; decoding's share of it


def plan_row(config: LlamaConfig, args, dtype: torch.dtype, name: str, gpus: int, cap: int) -> list:
    """GiB on a GPU, rows of the KV cache, and seconds of a step in which every response is `cap` tokens."""
    params, size, tokens = config.num_params(), dtype.itemsize, args.max_prompt + cap
    reference, each = bool(args.kl_coef) * 4 * params / gpus, tokens * cache_bytes(config, dtype)
    copy = size * params if gpus > 1 or size < 4 else 0  # gathered, or in the dtype of the activations
    copy += stacked(config, dtype) if gpus > 1 or size == 4 else 0  # the cast stacks them by the way
    pool = max(0.0, midtrain.PLAN_MEMORY - 12 * params / gpus - reference - copy) * GPU_SHARE
    rows, responses = int(pool // each), math.ceil(args.prompts_per_step * args.rollouts / gpus)
    micro = micro_batch(args, gpus)
    again = midtrain.fewest_blocks(config, micro, name, gpus, midtrain.PLAN_MEMORY - reference)
    peak = reference + midtrain.memory_plan(config, micro, name, gpus, again)["peak"]
    row = [gpus, cap, *(f"{x / 2**30:.1f}" for x in (copy, pool)), rows, f"{peak / 2**30:.1f}"]
    if not rows or peak > midtrain.PLAN_MEMORY:
        return [*row, "does not fit"]
    side, bandwidth = min(args.slots, responses, rows), BANDWIDTH * REACHED
    rate = midtrain.PLAN_MFU * midtrain.PEAK_FLOPS[midtrain.PLAN_DEVICE]
    step = max(size * params / bandwidth, 2 * params * side / rate)  # reads the weights once
    cache = responses * cap * (each - cap / 2 * each / tokens) / bandwidth
    passes = 1 + (again / config.num_layers + (args.updates > 1) + bool(args.kl_coef)) / 3
    update = responses * tokens * midtrain.flops_per_token(config, tokens) * passes / rate
    return [*row, f"{responses * cap / side * step + cache:.0f}", f"{update:.0f}"]


def show_plan(args) -> None:
    """Print memory and time of a step, by the length cap, on several numbers of GPUs."""
    config, name = PRESETS[args.preset], "bf16" if args.dtype == "auto" else args.dtype
    if args.ckpt:
        config = config_from_hf(files.read_json(f"{files.find_checkpoint(args.ckpt)}/config.json"))
    asked = f"{args.prompts_per_step} x {args.rollouts} responses, {args.updates} updates"
    print(f"{config.num_params():,} parameters in {name}, {asked}; GiB per GPU, seconds per step")
    print(f"On {midtrain.PLAN_DEVICE}s of {midtrain.PLAN_MEMORY >> 30} GiB, if every response is as long as "
          f"the cap and has a signal, products reach {midtrain.PLAN_MFU:.0%} of the peak, and decoding reads "
          f"memory at {REACHED:.0%} of {BANDWIDTH / 1e12} TB/s")
    titles = ("GPUs", "cap", "weights to sample", "KV cache", "rows in it", "update", "rollout s", "update s")
    print("  ".join(titles))
    for gpus in sorted({1, 8, int(os.environ.get("WORLD_SIZE", "1"))}):
        for cap in parse_schedule(args.length_schedule).values():
            row = plan_row(config, args, midtrain.DTYPES[name], name, gpus, cap)
            print("  ".join(f"{x:>{len(title)}}" for x, title in zip(row, titles)))


# ---- Command line ------------------------------------------------------------------------------------------

TRAIN_PROBLEMS = 4000  # of the generated corpus

# Sizes: (tiny and small, which are ours; 1b, 3b and 8b, which are the paper's where it says; what it is)
SIZES = {
    "steps": (60, 500, "rollouts to make"),
    "prompts_per_step": (16, 128, "problems per step"),
    "rollouts": (8, 16, "responses to each"),
    "updates": (1, 2, "optimizer steps per rollout; its problems are split evenly over them"),
    "lr": (1e-4, 1e-6, "constant learning rate; AdamW without weight decay, gradients clipped at norm 1"),
    "length_schedule": ("0:224", "0:2048,200:4096,320:8192", "longest response, from which step on"),
    "max_prompt": (256, 400, "longest prompt in tokens; training problems that exceed it are left out"),
    "slots": (128, 256, "responses that are sampled side by side on a rank"),
    "row_tokens": (256, 8192, "responses are packed into rows of this many tokens, or as the longest"),
    "micro_tokens": (2048, 16384, "tokens in one forward and backward pass"),
    "eval_every": (10, 10, "steps between greedy evaluations; the start and the end are always evaluated"),
    "eval_problems": (500, 500, "held-out problems at the start and the end"),
    "eval_subset": (200, 500, "the first so many of them in between"),
    "save_every": (20, 10, "steps between checkpoints"),
    "text_every": (1, 10, "steps between rollouts written as text"),
}
SIZE_COLUMN = {"tiny": 0, "small": 0, "1b": 1, "3b": 1, "8b": 1}  # which column of SIZES

# The loss and its data: flag → (default, or choices with the default first; what it is)
VARIANTS = {
    "temperature": (1.0, "temperature of sampling, and of the policy that is trained"),
    "advantage": (("group", "mean", "rloo"), "how a response is compared with its group: see advantages()"),
    "surrogate": (("clip", "gspo", "cispo"), "the policy-gradient objective: see grpo_loss()"),
    "loss_agg": (("token", "sequence", "constant"), "what the loss is a mean over: see grpo_loss()"),
    "clip_low": (0.2, "a ratio may fall to 1 - this"),
    "clip_high": (0.2, "a ratio may grow to 1 + this; DAPO: 0.28"),
    "dual_clip": (0.0, "bound for bad tokens grown likely (3; 0: off)"),
    "is_cap": (0.0, "cap of truncated importance weights for the gap (2; 0: off)"),
    "kl_coef": (0.0, "weight of the KL to the starting point (0: that is not loaded)"),
    "kl": (("k3", "k1", "k2"), "estimate of the KL: see kl_estimate()"),
    "filter": (("none", "drop", "refill"), "groups of equal rewards: do not count them, or replace them"),
    "refills": (4, "how often a step may take other problems, at most"),
    "overlong": (("keep", "mask", "punish"), "truncated responses: do not count them, or take up to 1 off"),
    "log_every": (1, "steps between lines; metrics.jsonl has every step"),
}
# Flags that may differ when a run goes on: the results so far do not depend on them
MAY_CHANGE = (
    "out", "name", "steps", "threads", "log_every", "save_every", "text_every", "max_new_tokens",
    "tensorboard", "compile", "activation_checkpointing", "plan")


def parse_args():
    p = files.ArgumentParser(prog="rl.py", description=__doc__)
    add = p.add_argument
    add("--branch", metavar="STAGE", help="start from this stage of --out: base, stable, long, …")
    add("--ckpt", metavar="DIR", help="or from this checkpoint, ours or a Hugging Face Llama's")
    add("--out", metavar="DIR", help="folder of the runs (default runs/PRESET): DIR/rl-START")
    add("--name", type=files.plain_name, help="DIR/rl-NAME in place of DIR/rl-START")
    add("--preset", default="tiny", choices=SIZE_COLUMN, help="which sizes (default tiny)")
    add("--prompts", metavar="FILE", help="JSON lines, a benchmark's name, or hub:ID[:PART[:SPLIT]]")
    add("--columns", type=recipes.column_map, metavar="MAP",
        help="columns of other names than usual: problem=Q,answer=A; eval.problem=Q of --eval alone")
    add("--eval", metavar="FILE,FILE", help="held-out problems, given likewise (default: a tenth of "
        "--prompts); the curve is of the first, others are eval_accuracy/FILE")
    add("--reward", metavar="FILE.py:FUNCTION", help="of (response, gold answer), in place of verify.reward")
    add("--data", metavar="DIR", help="folder of the benchmarks' files (default: the hub)")
    add("--seed", type=int, default=0, help="seed of the order of the prompts and of sampling")
    add("--threads", type=int, metavar="N", help="CPU threads per process")
    add("--dtype", default="auto", choices=("auto", *midtrain.DTYPES), help="dtype of activations")
    add("--template", default="simple", choices=prompts.TEMPLATES, help="what surrounds a problem")
    add("--max-new-tokens", type=int, metavar="N", help="one cap, instead of --length-schedule")
    add("--compile", action="store_true", help="torch.compile each block for the updates")
    add("--activation-checkpointing", action="store_true",
        help="recompute all blocks' activations (default: as few blocks as make it fit)")
    add("--tool", action=argparse.BooleanOptionalAction,
        help="answer calls of the calculator; results are not trained (default: if it read tool_cot before)")
    add("--plan", action="store_true", help="print GPU memory and seconds of a step")
    add("--tensorboard", action="store_true", help="metrics to TensorBoard too, if it is installed")
    for name, (default, text) in VARIANTS.items():
        flag, choices = "--" + name.replace("_", "-"), default if isinstance(default, tuple) else None
        default = default[0] if choices else default
        add(flag, type=type(default), default=default, choices=choices, help=text)
    for name, (ours, paper, text) in SIZES.items():
        text = f"{text} (tiny {ours}, paper {paper})"
        add("--" + name.replace("_", "-"), type=type(ours), metavar="X", help=text)
    args = p.parse_args()
    for name, row in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, row[SIZE_COLUMN[args.preset]])
    args.out = args.out or f"runs/{args.preset}"
    if args.max_new_tokens is not None:
        args.length_schedule = f"0:{args.max_new_tokens}"
    return args


def check_args(args) -> None:
    """ValueError for settings that do not work together."""
    if (args.branch is None) == (args.ckpt is None):
        stages = "|".join(stage for stage in midtrain.RECIPE if stage != "controlled")
        raise ValueError(f"where to start? Give one of --branch {stages} and --ckpt DIR")
    parse_schedule(args.length_schedule)
    positive, others = ("log_every", "threads", *SIZES), ("seed", *VARIANTS)
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value} must"
        if name in positive and isinstance(value, int) and value < 1:
            raise ValueError(f"{flag} be at least 1")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag} be a finite number")
        if name in others and isinstance(value, int | float) and value < 0:
            raise ValueError(f"{flag} not be negative")
    if 0 < args.dual_clip <= 1:
        raise ValueError(f"--dual-clip {args.dual_clip} leaves bad responses no gradient: give 3, or 0")
    if args.dual_clip and args.surrogate == "cispo":
        raise ValueError("--dual-clip does nothing with --surrogate cispo, which clips no token")
    if args.temperature <= 0:
        raise ValueError(f"--temperature {args.temperature} must be above 0: a greedy policy has no gradient")
    if args.rollouts < 2:
        raise ValueError("--rollouts 1 leaves nothing to compare a response with: give at least 2")
    if SIZE_COLUMN[args.preset] and not args.prompts:  # of the paper's sizes
        how = "--prompts math8k is the paper's set (data/README.md); a file or hub:ID is one of your own"
        raise ValueError(f"--preset {args.preset} needs --prompts: {how}")
    if (P := args.prompts_per_step) % args.updates:
        raise ValueError(f"--prompts-per-step {P} does not split into {args.updates} equal updates")


def main() -> None:
    with midtrain.clean_exit():
        args = parse_args()
        if args.plan:
            return show_plan(args)
        check_args(args)
        world = midtrain.setup(args.threads)
        midtrain.hash_newest(args.ckpt or os.path.join(args.out, args.branch))
        folder = os.path.join(args.out, starting_point(args)[1])
        midtrain.hash_newest(folder)
        with midtrain.lock_for_all(folder):
            train(args, world)


if __name__ == "__main__":
    files.run_cli(main)

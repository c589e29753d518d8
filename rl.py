"""GRPO on a checkpoint: sample groups of answers, score them by their final answer, make the better ones likelier.

One step: P problems, G answers to each from the current weights (sample.py); reward +1 if the final answer is right, -1
if not (verify.py); each answer is compared with its own group, A = (r - mean) / std, which makes a value network
unnecessary; then one or more clipped policy-gradient updates. The choices that matter:

1. The policy that is sampled is the policy that is trained: logits are divided by the same temperature in both, nothing
   is truncated, the stop token is trained like any other. The numerical difference that is left is logged as the gap.
2. One loss function, `grpo_loss`, on plain tensors; a variant is a branch of a few lines with its formula beside it.
3. Denominators are counted over all ranks and micro-batches before the first backward pass, so the gradient does not
   depend on how the batch is cut. Answers are packed without padding, on a CPU behind one copy of their group's prompt.
4. Everything random is a function of (seed, step): the order of the prompts, each answer's random numbers. A run that
   is killed and started again goes on as if nothing had happened, bit for bit.

| what                          | flags                                                                                |
|-------------------------------|--------------------------------------------------------------------------------------|
| GRPO (DeepSeekMath)           | --loss-agg sequence --kl-coef 0.04                                                   |
| DAPO                          | --clip-high 0.28 --filter refill --overlong punish                                   |
| Dr. GRPO                      | --advantage mean --loss-agg constant                                                 |
| GSPO                          | --surrogate gspo --clip-low 3e-4 --clip-high 4e-4 --loss-agg sequence                |
| CISPO                         | --surrogate cispo --clip-high 4                                                      |
| OctoThinker, paper            | --preset 1b, 3b or 8b (and --template complex for long chains of thought)            |
| OctoThinker, released scripts | --prompts-per-step 256 --updates 16 --length-schedule 0:2048,100:4096,160:8192       |

    python rl.py --branch long                                           # from runs/tiny/long, in runs/tiny/rl-long
    python rl.py --ckpt DIR --prompts FILE.jsonl --eval FILE.jsonl       # rows {"problem": ..., "answer": ...}
    python rl.py --ckpt DIR --prompts hub:openai/gsm8k:main --eval gsm8k --data DATA
    torchrun --nproc_per_node=8 rl.py --branch long --preset 3b          # in runs/3b; on a CPU, the same with gloo
    python rl.py --report --out runs/tiny                                # table and picture of all its rl-* runs
    python rl.py --report --out runs/tiny,runs/seed1,runs/seed2          # mean and range over them
"""

import contextlib
import hashlib
import io
import json
import math
import numbers
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import midtrain
import verify
from data import benchmarks, files, prepare, prompts, synth
from model import Llama
from sample import Sampler, load_model, unsharded

BRANCHES = ("base", "stable", "short", "long", "hybrid")

# Sizes: (tiny and small, which are ours; 1b, 3b and 8b, which are the paper's where it says; what it is)
SIZES = {
    "steps": (80, 500, "rollouts to make"),
    "prompts_per_step": (16, 128, "problems asked in a step"),
    "rollouts": (8, 16, "answers to each"),
    "updates": (1, 2, "optimizer steps on each rollout; its problems are split evenly over them"),
    "lr": (1e-4, 1e-6, "constant; AdamW with betas (0.9, 0.95), no weight decay, gradients clipped at norm 1"),
    "length_schedule": ("0:224", "0:2048,200:4096,320:8192", "longest response, from which step on"),
    "max_prompt": (256, 400, "longest prompt in tokens; training problems that exceed it are left out"),
    "slots": (128, 256, "answers that are sampled side by side on a rank"),
    "row_tokens": (256, 8192, "responses are packed into rows of this many tokens, or as long as the longest"),
    "micro_tokens": (2048, 16384, "tokens in one forward and backward pass"),
    "eval_every": (10, 10, "steps between greedy evaluations; the start and the end are always evaluated"),
    "eval_problems": (500, 500, "held-out problems at the start and the end"),
    "eval_subset": (200, 500, "the first so many of them in between"),
    "save_every": (20, 10, "steps between checkpoints"),
    "text_every": (1, 10, "steps between rollouts written as text"),
}
PRESETS = {"tiny": 0, "small": 0, "1b": 1, "3b": 1, "8b": 1}  # which column of SIZES
WORLD_PROBLEMS = 4000  # of the generated world, to train on

# ---------------------------------------------------------------------------------------------------------------------
# The algorithm, on plain tensors


def advantages(rewards: Tensor, kind: str = "group", eps: float = 1e-6) -> Tensor:
    """How much better each answer is than its group: rewards (P, G) → (P, G).

    "group"  (r - mean) / (std + eps), std with ddof 1        GRPO (DeepSeekMath, 2402.03300)
    "mean"   r - mean: hard and easy prompts weigh the same   Dr. GRPO (2503.20783)
    "rloo"   r - mean of the others                           RLOO (2402.14740)

    Exactly 0 where all rewards of a group are equal. A reward of NaN (could not be scored) has advantage 0 and is left
    out of its group's mean and std.
    """
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
    """(P, G) → (P,) bool: do the group's rewards differ? Compared exactly: rounding may give equal ones a std."""
    low = rewards.nan_to_num(torch.inf).amin(1)
    return low < rewards.nan_to_num(-torch.inf).amax(1)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Estimates of KL(policy || reference) at tokens that the policy sampled (Schulman 2020), x = logp - ref_logp.

    As a loss only k2 has the gradient of the KL in expectation; k1's is 0 on average, k3's is right to first order.
    """
    x = (logp - ref_logp).clamp(-20, 20)
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    if kind == "k3":
        return (-x).exp() - 1 + x
    raise ValueError(f'unknown KL estimate "{kind}"; valid: k1, k2, k3')


def grpo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *, surrogate: str = "clip", loss_agg: str = "token",
    denominator=None, clip_low=0.2, clip_high=0.2, dual_clip=0.0, is_cap=0.0, sampler_logp=None, kl_coef=0.0, kl="k3",
    ref_logp=None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped surrogate of N responses of up to T tokens → (loss, sums over tokens for the metrics).

    logp, old_logp (N, T): log-probabilities of the sampled tokens, now and before the first update; only logp has a
    gradient. mask (N, T): 1 on sampled tokens, the stop token included. advantages (N,). sampler_logp, ref_logp (N, T):
    needed by is_cap and kl_coef.

    denominator: what the sum is divided by, counted over the whole batch, of which these N may be a part: tokens
    ("token"), responses ("sequence"), responses x length cap ("constant"). None: these N are the batch.
    Where old_logp is logp the value says nothing; the gradient is that of the policy, -A * grad logp a token.
    """
    A, lengths = advantages[:, None], mask.sum(1)  # (N, 1): every token has its response's advantage; |o_i|
    change = (logp - old_logp).clamp(-20, 20)  # log w; exp(20) is as good as infinite
    if surrogate == "gspo":  # GSPO (2507.18071): one w a response, the mean of its tokens' logs; a token's gradient
        mean = (change.detach() * mask).sum(1, keepdim=True) / lengths.clamp(min=1)[:, None]
        change = mean + logp - logp.detach()
    ratio = change.exp()  # w = pi / pi_old
    # PPO (1707.06347), GRPO: min(w A, clip(w, 1 - low, 1 + high) A).  DAPO (2503.14476): high > low.
    objective = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    if surrogate == "cispo":  # MiniMax-M1 (2506.13585): sg[min(w, 1 + high)] A log pi: every token has a gradient
        objective = ratio.detach().clamp(max=1 + clip_high) * A * logp
    elif surrogate not in ("clip", "gspo"):
        raise ValueError(f'unknown surrogate "{surrogate}"; valid: clip, gspo, cispo')
    if dual_clip:  # Ye et al. 2020 (1912.09729): for A < 0, max(min(w A, clip(w) A), c A)
        objective = torch.where(A < 0, torch.maximum(objective, dual_clip * A), objective)
    loss = -objective
    if is_cap:  # truncated importance weights for sampler != trainer: min(pi_old / mu, C)
        loss = loss * (old_logp - sampler_logp).clamp(-20, 20).exp().clamp(max=is_cap)
    if kl_coef:
        loss = loss + kl_coef * kl_estimate(logp, ref_logp, kl)

    if loss_agg == "token":  # sum_i sum_t l / sum_i |o_i|: every token weighs the same (DAPO)
        own = lengths.sum()
    elif loss_agg == "sequence":  # 1/N sum_i 1/|o_i| sum_t l: every response weighs the same (GRPO)
        own, loss = (lengths > 0).sum(), loss / lengths.clamp(min=1)[:, None]
    elif loss_agg == "constant":  # 1/(N L) sum_i sum_t l: no length in it, the unbiased policy gradient (Dr. GRPO)
        own = torch.nan  # the cap L is not to be seen here: the denominator must be given
    else:
        raise ValueError(f'unknown loss aggregation "{loss_agg}"; valid: token, sequence, constant')
    loss = (loss * mask).sum() / (own if denominator is None else denominator)

    low, high = (A < 0) & (ratio < 1 - clip_low), (A > 0) & (ratio > 1 + clip_high)  # where "clip" has no gradient
    sums = {"tokens": lengths.sum(), "clip_low": (low * mask).sum(), "clip_high": (high * mask).sum()}
    if ref_logp is not None:
        sums["kl"] = (kl_estimate(logp.detach(), ref_logp, "k3") * mask).sum()
    return loss, sums


def overlong_penalty(length: int, cap: int) -> float:
    """DAPO's soft overlong punishment (2503.14476, eq. 13): 0 up to 4/5 of the cap, then linear to -1 at the cap.

    The buffer, a fifth of the cap, is theirs: 4,096 of 20,480 tokens.
    """
    buffer = cap / 5
    return min(0.0, (cap - buffer - length) / buffer)


def parse_schedule(text: str) -> dict[int, int]:
    """0:2048,200:4096 → {0: 2048, 200: 4096}: from which step on a response may have how many tokens."""
    try:
        stairs = {int(step): int(cap) for step, cap in (part.split(":") for part in text.split(","))}
    except ValueError:
        stairs = {}
    if 0 not in stairs or min(stairs) < 0 or min(stairs.values()) < 1:
        raise ValueError(f'"{text}" is no length schedule: give step:tokens pairs that begin at 0, as 0:2048,200:4096')
    return stairs


def length_cap(stairs: dict[int, int], step: int) -> int:
    """The value at the largest key not above `step`."""
    return stairs[max(key for key in stairs if key <= step)]


def prompt_order(n: int, per_step: int, step: int, seed: int) -> list[int]:
    """Which of n prompts are asked in `step`: the next per_step of an endless row of seeded permutations of all n."""
    first = step * per_step
    epochs = range(first // n, (first + per_step - 1) // n + 1)
    row = np.concatenate([np.random.default_rng((seed, epoch)).permutation(n) for epoch in epochs])
    start = first - epochs[0] * n
    return row[start : start + per_step].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


@dataclass
class Sample:
    """One answer to one problem, as sampled: ids are never made from text again."""

    group: int  # place of its problem in the step
    prompt: list[int]
    tokens: list[int]  # sampled ids, the stop token included
    logprobs: list[float]  # the sampler's
    text: str
    stopped: bool  # False: cut at the length cap
    right: bool
    reward: float
    advantage: float
    signal: bool  # do the scores of its group differ?


def over_ranks(values: list[float], world: midtrain.World, op=dist.ReduceOp.SUM) -> list[float]:
    """Sums (or another reduction) of a few numbers over all ranks."""
    t = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(t, op)
    return t.tolist()


def answer(sampler: Sampler, asked: list[dict], n: int, cap: int, temperature: float, first_id: int, args, world):
    """n scored answers to each of this rank's problems (every size-th) → list of Samples, a group's one after another.

    Answer j to the i-th problem draws from (seed, first_id + i, j), on whatever rank it is made. Ranks do not steal
    problems from each other: in bf16 a rollout depends on its neighbours, and so would depend on the ranks' speed.
    """
    mine = range(world.rank, len(asked), world.size)
    completions = sampler.generate(
        [asked[i]["tokens"] for i in mine], n=n, max_new_tokens=cap, temperature=temperature, seed=args.seed,
        stop=args.stop, request_ids=[first_id + i for i in mine],
    )  # fmt: skip
    samples = []
    for i, group in zip(mine, completions, strict=True):
        scores = [score(c.text, asked[i]) for c in group]
        punished = [overlong_penalty(len(c.tokens), cap) if args.overlong == "punish" else 0.0 for c in group]
        rewards = torch.tensor([[r + p for r, p in zip(scores, punished)]], dtype=torch.float64)  # (1, G)
        values = advantages(rewards, args.advantage)[0].tolist()
        signal = min(scores) < max(scores)  # whatever the punishment: DAPO's filter is on what is right
        for c, r, reward, value in zip(group, scores, rewards[0].tolist(), values, strict=True):
            stopped, right = c.finish_reason == "stop", r > 0
            prompt = asked[i]["tokens"]
            samples.append(Sample(i, prompt, c.tokens, c.logprobs, c.text, stopped, right, reward, value, signal))
    return samples


def score(text: str, row: dict) -> float:
    """verify.reward, which whoever forks this may have replaced: what it returns must be a number."""
    r = verify.reward(text, row["answer"])
    if not isinstance(r, numbers.Real) or not math.isfinite(r):
        raise ValueError(f"the reward of {text[:60]!r} is {r!r}, not a finite number (answer {row['answer']!r})")
    return float(r)


def informative(samples: list[Sample], groups: int, world: midtrain.World) -> list[int]:
    """Which of the groups 0..groups-1 have answers of different scores, on whatever rank they are."""
    flags = [0.0] * groups
    for s in samples:
        flags[s.group] = float(s.signal)
    return [group for group, flag in enumerate(over_ranks(flags, world, dist.ReduceOp.MAX)) if flag]


def answer_metrics(samples: list[Sample], world: midtrain.World) -> dict[str, float | None]:
    """Means over the answers of all ranks; lengths in tokens, None where there is nothing to average."""
    sums = torch.zeros(8, dtype=torch.float64)
    for s in samples:
        length = len(s.tokens)
        row = (1, length, s.right, s.right * length, s.reward, not s.stopped, not s.signal, -sum(s.logprobs))
        sums += torch.tensor(row, dtype=torch.float64)
    n, tokens, correct, tokens_right, reward, cut, silent, nll = over_ranks(sums.tolist(), world)
    return {
        "reward": reward / n, "accuracy": correct / n, "length": tokens / n,
        "length_correct": tokens_right / correct if correct else None,
        "length_wrong": (tokens - tokens_right) / (n - correct) if n > correct else None,
        "truncated": cut / n, "no_signal": silent / n, "entropy": nll / tokens,
    }  # fmt: skip


def write_rollouts(path: str, samples: list[Sample], asked: list[dict], world: midtrain.World) -> None:
    """Every answer of the step as a JSON line, in the order of the problems."""
    parts = [samples] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, samples)
    rows = [
        {
            "problem": asked[s.group]["problem"], "gold": asked[s.group]["answer"], "response": s.text,
            "reward": s.reward, "tokens": len(s.tokens), "finish": "stop" if s.stopped else "length",
        }
        for s in sorted((s for part in parts for s in part), key=lambda s: s.group)  # stable: a group stays in order
    ]  # fmt: skip
    if files.is_rank0():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        files.write_jsonl(path, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Updates


@dataclass
class MicroBatch:
    """Responses packed into rows for one forward pass, and where their tokens' log-probabilities are in its output."""

    tokens: Tensor  # (B, W) prompts and responses, several to a row
    targets: Tensor  # (B, W) the next token where that was sampled, else -1
    doc_start: Tensor  # (B, W)
    prefix: Tensor | None  # (B,) tokens of the prompt that all responses of a row go on from; None: each has its own
    place: Tensor  # (N, T) flat index in (B, W) of the position that predicts token t of response i
    mask: Tensor  # (N, T) 1 where response i has a token t
    advantages: Tensor  # (N,)
    sampler_logp: Tensor  # (N, T)
    old_logp: Tensor | None = None  # (N, T)
    ref_logp: Tensor | None = None  # (N, T)


def pack(lengths: list[int], width: int) -> list[list[int]]:
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


def shares_prompts(device) -> bool:
    """Whether a group's prompt is computed once in the update: on a CPU. The GPU's attention kernel has no common prefix."""
    return torch.device(device).type == "cpu"


def pack_samples(samples: list[Sample], width: int, share: bool) -> list[list[Sample]]:
    """Samples → rows of at most `width` tokens (or as long as the longest), full ones first.

    A sequence goes in without its last token, from which nothing is predicted. If prompts are shared a row holds answers
    to one problem, and its prompt once but for the last token, which is at the start of each answer.
    """
    if not share:
        lengths = [len(s.prompt) + len(s.tokens) - 1 for s in samples]
        rows = [[samples[i] for i in row] for row in pack(lengths, max([width, *lengths]))]
    else:
        rows, groups = [], {}
        for s in samples:
            groups.setdefault(s.group, []).append(s)
        for group in groups.values():
            lengths, prefix = [len(s.tokens) for s in group], len(group[0].prompt) - 1
            rows += [[group[i] for i in row] for row in pack(lengths, max([width - prefix, *lengths]))]
    return sorted(rows, key=lambda row: -row_length(row, share))  # rows of a kind side by side: little padding


def row_length(row: list[Sample], share: bool) -> int:
    prefix = len(row[0].prompt) - 1
    return sum(len(s.tokens) for s in row) + (prefix if share else sum(len(s.prompt) - 1 for s in row))


def collate(rows: list[list[Sample]], device, share: bool = False) -> MicroBatch:
    """Rows of samples (see pack_samples) → tensors.

    No rows make a micro-batch without responses: a rank without work runs it, to take part in the collectives.
    """
    samples = [s for row in rows for s in row]
    N, T = len(samples), max((len(s.tokens) for s in samples), default=1)
    B, W = max(1, len(rows)), max((row_length(row, share) for row in rows), default=1)
    tokens, targets, doc_start = np.zeros((B, W), int), np.full((B, W), -1), np.zeros((B, W), int)
    place, mask, sampler_logp = np.zeros((N, T), int), np.zeros((N, T), np.float32), np.zeros((N, T), np.float32)
    i, prefix = 0, np.zeros(B, int)
    for b, row in enumerate(rows):
        at = prefix[b] = len(row[0].prompt) - 1 if share else 0
        tokens[b, :at] = row[0].prompt[:at]
        for s in row:
            ids = (s.prompt[-1:] if share else s.prompt) + s.tokens
            n, end = len(s.tokens), at + len(ids) - 1
            first = end - n  # the prompt's last token predicts the response's first
            tokens[b, at:end], targets[b, first:end], doc_start[b, at:end] = ids[:-1], s.tokens, at
            place[i, :n], mask[i, :n], sampler_logp[i, :n] = b * W + np.arange(first, end), 1, s.logprobs
            i, at = i + 1, end
        doc_start[b, at:] = at  # what is left of the row is a document of its own
    value = np.array([s.advantage for s in samples], np.float32)
    arrays = (tokens, targets, doc_start, prefix, place, mask, value, sampler_logp)
    batch = MicroBatch(*(torch.from_numpy(x).to(device) for x in arrays))
    batch.prefix = batch.prefix if share else None
    return batch


def micro_batches(samples: list[Sample], args, world: midtrain.World) -> list[MicroBatch]:
    """Samples packed into rows of row_tokens (or the longest), micro_tokens to a micro-batch; as many on every rank."""
    share, parts = shares_prompts(world.device), []
    for row in pack_samples(samples, args.row_tokens, share):
        if parts and (len(parts[-1]) + 1) * row_length(parts[-1][0], share) <= args.micro_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    most = int(over_ranks([len(parts)], world, dist.ReduceOp.MAX)[0])  # every rank must join every collective
    return [collate(part, world.device, share) for part in parts + [[]] * (most - len(parts))]


def log_probs(model: Llama, b: MicroBatch, temperature: float) -> Tensor:
    """Log-probabilities (N, T) of the sampled tokens at the temperature of sampling; any number where mask is 0."""
    return -model(b.tokens, b.targets, b.doc_start, temperature, prefix=b.prefix).flatten()[b.place]


def update(
    model, reference, optimizer, samples: list[Sample], cap: int, args, world: midtrain.World, groups=None
) -> dict:
    """One or several optimizer steps on a rollout → metrics. Several: its problems in --updates equal parts.

    samples: of groups 0..groups-1 (None: as many as a step asks).

    Answers of a group without signal have no gradient, so unless a KL term pulls at them they get no forward pass. They
    still count in the denominator, the loss being a mean over all answers; --filter drop takes them out of it.
    """
    groups = groups or args.prompts_per_step
    kept = [s for s in samples if (s.signal or args.filter == "none") and (s.stopped or args.overlong != "mask")]
    parts = [[s for s in kept if s.group * args.updates // groups == u] for u in range(args.updates)]
    batches = [micro_batches([s for s in part if s.advantage or args.kl_coef], args, world) for part in parts]
    with torch.no_grad():  # before the first update changes the weights
        for b in (b for part in batches for b in part):
            if args.updates > 1:  # in the very micro-batches of the update: another packing would round differently
                b.old_logp = log_probs(model, b, args.temperature)
            if args.kl_coef:
                b.ref_logp = log_probs(reference, b, args.temperature)
    sums, norms = dict.fromkeys(("tokens", "clip_low", "clip_high", "kl", "gap", "gap_kl", "gap_max"), 0.0), []
    for part, group in zip(parts, batches, strict=True):
        tokens, n = over_ranks([sum(len(s.tokens) for s in part), len(part)], world)
        total = {"token": tokens, "sequence": n, "constant": n * cap}[args.loss_agg]
        for b in group:
            backward(model, b, total, sums, args, world)
        norms += [optimizer_step(model, optimizer)] if group else []  # no signal on any rank: the weights stay
    gap_max = over_ranks([sums.pop("gap_max")], world, dist.ReduceOp.MAX)[0]
    trained, *rest = over_ranks(list(sums.values()), world)
    metrics = dict(zip(list(sums)[1:], (x / trained if trained else None for x in rest), strict=True))
    finite = [x for x in norms if math.isfinite(x)]
    if not args.kl_coef:
        metrics.pop("kl")
    metrics |= {"gap_max": gap_max, "trained_tokens": int(trained), "skipped": len(norms) - len(finite)}
    return metrics | {"grad_norm": sum(finite) / len(finite) if finite else None}


def backward(model, b: MicroBatch, total: float, sums: dict[str, float], args, world: midtrain.World) -> None:
    """Add a micro-batch's gradient to the parameters' and its metrics to `sums`."""
    logp = log_probs(model, b, args.temperature)
    old_logp = logp.detach() if b.old_logp is None else b.old_logp  # one update a rollout: the ratio is 1 by definition
    loss, parts = grpo_loss(
        logp, old_logp, b.advantages, b.mask, surrogate=args.surrogate, loss_agg=args.loss_agg, denominator=total,
        clip_low=args.clip_low, clip_high=args.clip_high, dual_clip=args.dual_clip, is_cap=args.is_cap,
        sampler_logp=b.sampler_logp, kl_coef=args.kl_coef, kl=args.kl, ref_logp=b.ref_logp,
    )  # fmt: skip
    (loss * world.size).backward()  # FSDP2 averages gradients over ranks; `total` already is a sum over them
    gap = (old_logp - b.sampler_logp) * b.mask  # sampler against trainer: 0 but for rounding
    parts |= {"gap": gap.abs().sum(), "gap_kl": (gap.exp() - 1 - gap).sum()}
    for key, value in parts.items():
        sums[key] += value.item()
    sums["gap_max"] = max(sums["gap_max"], gap.abs().max().item() if gap.numel() else 0.0)


def optimizer_step(model, optimizer) -> float:
    """Clip, step, clear; returns the norm before clipping. If that is not finite there is no step, on any rank."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), midtrain.GRAD_CLIP)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of all shards, so all ranks agree
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def read_problems(source: str) -> list[dict]:
    """Rows {"problem", "answer"} of a file of JSON lines or of hub:ID."""
    is_hub = source.startswith("hub:")
    rows = list(hub_problems(source[4:]) if is_hub else benchmarks.read_problems(source))
    if not rows:
        raise ValueError(f"{source} holds no problem")
    return rows


def hub_problems(where: str):
    """Problems of a data set of the hub, ID[:PART[:SPLIT]], with the usual columns: a question or problem; an answer,
    GSM8K's with its reasoning before ####, or a solution whose last box it is."""
    for number, (what, row) in enumerate(prepare.corpus_rows(prepare.hub_corpus("qa", where), Path(), 0, None), 1):
        problem, answer = row.get("problem") or row.get("question"), row.get("answer")
        if answer is None:
            answer = benchmarks.last_box(str(row.get("solution")))
        is_text = type(answer) in (str, int, float)
        answer = str(answer).rpartition("####")[2].strip()
        if not isinstance(problem, str) or not answer or not is_text:
            raise ValueError(f"{what}: row {number} has no problem with an answer; its columns: {', '.join(row)}")
        yield {"problem": problem, "answer": answer}


def load_problems(args, tok) -> tuple[list[dict], list[dict]]:
    """(to train on, held out), with each prompt's ids as "tokens"; training prompts that are too long are left out."""
    train = read_problems(args.prompts) if args.prompts else synth.problems("train", WORLD_PROBLEMS, args.seed)
    if args.eval:
        a_benchmark = args.eval in benchmarks.BENCHMARKS and not os.path.exists(args.eval)
        held_out = benchmarks.read(args.eval, args.data, None) if a_benchmark else read_problems(args.eval)
        held_out = held_out[: args.eval_problems]
    elif args.prompts:  # a tenth of the file at most
        k = min(args.eval_problems, max(1, len(train) // 10))
        if len(train) < 2:
            raise ValueError(
                f"{args.prompts} holds one problem: nothing would be left to evaluate on; give --eval FILE"
            )
        train, held_out = train[:-k], train[-k:]
    else:  # disjoint by construction, and the same for every seed
        held_out = synth.problems("test", args.eval_problems)
    for row in train + held_out:
        row["tokens"] = tok.encode(prompts.TEMPLATES[args.template](row["problem"]))
    lengths = [len(row["tokens"]) for row in train]
    kept = [row for row, length in zip(train, lengths) if length <= args.max_prompt]
    if not kept:
        raise ValueError(f"no prompt is within --max-prompt {args.max_prompt}: the shortest has {min(lengths)} tokens")
    if len(kept) < len(train):
        longest = f"the longest, problem {lengths.index(max(lengths)) + 1}, has {max(lengths)}"
        said = f"{len(train) - len(kept)} of {len(train)} prompts left out: longer than --max-prompt {args.max_prompt} tokens"
        files.print0(f"{said} ({longest})")
    return kept, held_out


def starting_point(args) -> tuple[str, str]:
    """(checkpoint folder, name of this run)."""
    if args.ckpt:
        return files.find_checkpoint(args.ckpt), "rl-" + os.path.basename(os.path.normpath(args.ckpt))
    stage = os.path.join(args.out, args.branch)
    if not midtrain.on_rank0(lambda: midtrain.is_finished(stage)):
        how = f"python midtrain.py --branch {args.branch} --preset {args.preset} --out {args.out}"
        raise FileNotFoundError(f"{stage} is not a finished stage to start from; make it with: {how}")
    return midtrain.on_rank0(lambda: files.latest_checkpoint(stage)), "rl-" + args.branch


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Run:
    """A training run: its model, optimizer, sampler, problems and folder, at some step."""

    def __init__(self, args, world: midtrain.World):
        source, self.name = starting_point(args)
        self.args, self.world, self.folder = args, world, os.path.join(args.out, self.name)
        dtype = midtrain.fastest_dtype(world.device) if args.dtype == "auto" else args.dtype
        models = [load_model(source) for _ in range(2 if args.kl_coef else 1)]
        self.tok = models[0][1]
        args.dtype, args.stop = dtype, (*self.tok.stop_ids, *prompts.STOP)
        norm = models[0][0].norm.weight.detach().float().numpy()  # one small tensor tells a retrained model from this
        fingerprint = hashlib.sha256(norm.tobytes()).hexdigest()[:16]
        self.train, self.held_out = load_problems(args, self.tok)
        self.model, *reference = (midtrain.apply_fsdp(m.float(), world, midtrain.DTYPES[dtype]) for m, _ in models)
        self.reference = reference[0] if reference else None
        self.optimizer = midtrain.make_optimizer(self.model, args.lr, weight_decay=0.0)
        self.sampler = Sampler(self.model, self.tok, args.slots)
        settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE} | {"weights": fingerprint}
        midtrain.on_rank0(lambda: midtrain.open_folder(self.folder, settings))
        self.saved = midtrain.on_rank0(lambda: files.latest_checkpoint(self.folder))
        self.step = midtrain.load_checkpoint(self.saved, self.model, self.optimizer)["step"] if self.saved else 0
        self.log = midtrain.MetricsLog(self.folder, self.step if self.saved else -1)
        self.started, self.first_step = time.perf_counter(), self.step
        self.say(
            f"{f'goes on at step {self.step}' if self.saved else f'starts from {source}'}: {len(self.train)} problems, "
            f"{len(self.held_out)} held out, {dtype} on {world.size} x {world.device.type}"
        )

    def say(self, text: str) -> None:
        files.print0(f"[{self.name}] {text}")

    def loop(self) -> None:
        """Evaluate, then steps to the end. A row of metrics is complete before the checkpoint of its step is saved."""
        args = self.args
        with midtrain.Interrupt() as interrupt:
            if not self.saved:
                self.log.write({"step": 0} | self.evaluate())
            while self.step < args.steps:
                midtrain.doing["what"] = f"step {self.step + 1} of {self.name}"
                row = self.train_step()
                signum, last = interrupt.agreed(self.world), self.step == args.steps
                if self.step % args.log_every == 0 or last or signum:
                    self.say(self.line(row))
                if self.step % args.eval_every == 0 or last:
                    row |= self.evaluate()
                self.log.write(row)
                if self.step % args.save_every == 0 or last or signum:
                    run = (self.folder, self.step, self.model, self.optimizer, self.tok)
                    self.saved = midtrain.save_checkpoint(*run, {"stage": self.name})
                if signum:
                    self.say(f"stopped after step {self.step}: saved {self.saved}, the same command goes on")
                    raise SystemExit(128 + signum)
            if signum := interrupt.agreed(self.world):  # it came during the last evaluation or save
                raise SystemExit(128 + signum)
        self.say(f"done: {self.saved}")

    def rollout(self, cap: int) -> tuple[list[dict], list[Sample], list[Sample], int]:
        """(problems asked, all answers, those to learn from and of how many groups). All follows from (seed, step).

        With --filter refill (DAPO's dynamic sampling) further problems are asked, --refills times at most, until as many
        groups as a step has problems have a signal; only these are learned from, each step's the first in the order asked.
        """
        args, P = self.args, self.args.prompts_per_step
        asked, samples, rounds = [], [], 1 + args.refills if args.filter == "refill" else 1
        for i in range(self.step * rounds, (self.step + 1) * rounds):
            more = [self.train[j] for j in prompt_order(len(self.train), P, i, args.seed)]
            made = answer(self.sampler, more, args.rollouts, cap, args.temperature, i * P, args, self.world)
            samples += [replace(s, group=s.group + len(asked)) for s in made]
            asked += more
            groups = informative(samples, len(asked), self.world) if args.filter == "refill" else range(P)
            if len(groups) >= P:
                break
        number = {group: i for i, group in enumerate(groups[:P])}
        return asked, samples, [replace(s, group=number[s.group]) for s in samples if s.group in number], len(number)

    def train_step(self) -> dict:
        """Rollout, rewards, update → a row of metrics."""
        args, world, step, start = self.args, self.world, self.step, time.perf_counter()
        cap = length_cap(args.stairs, step)
        with unsharded(self.model):
            asked, samples, kept, groups = self.rollout(cap)
        row = {"step": step + 1, "cap": cap, "lr": args.lr, "asked": len(asked), **answer_metrics(samples, world)}
        sampled = time.perf_counter()
        row |= update(self.model, self.reference, self.optimizer, kept, cap, args, world, groups)
        self.step, updated = step + 1, time.perf_counter()
        if self.step % args.text_every == 0:
            write_rollouts(f"{self.folder}/rollouts/step_{self.step:06d}.jsonl", samples, asked, world)
        roll, upd = sampled - start, updated - sampled
        row |= {"time_rollout": roll, "time_update": upd, "share_rollout": roll / (roll + upd)}
        made = row["length"] * len(asked) * args.rollouts
        return row | {"rollout_tokens_per_s": made / roll, "update_tokens_per_s": row["trained_tokens"] / upd}

    def evaluate(self) -> dict:
        """Greedy answers to held-out problems, with the template and the cap of training → metrics."""
        args, start = self.args, time.perf_counter()
        asked = self.held_out if self.step in (0, args.steps) else self.held_out[: args.eval_subset]
        with unsharded(self.model):
            samples = answer(self.sampler, asked, 1, length_cap(args.stairs, self.step), 0.0, 0, args, self.world)
        m = answer_metrics(samples, self.world)
        self.say(
            f"step {self.step}/{args.steps} held-out: {m['accuracy']:.1%} of {len(asked)} right, length "
            f"{m['length']:.0f} (right {m['length_correct'] or 0:.0f}), truncated {m['truncated']:.1%}"
        )
        row = {"eval_n": len(asked), "steps": args.steps, "time_eval": time.perf_counter() - start}
        return row | {"eval_" + k: m[k] for k in ("accuracy", "length", "length_correct", "length_wrong", "truncated")}

    def line(self, m: dict) -> str:
        left = (time.perf_counter() - self.started) / (self.step - self.first_step) * (self.args.steps - self.step)
        gap, norm = (f"{m[key]:.1e}" if m[key] is not None else "-" for key in ("gap", "grad_norm"))
        return (
            f"step {m['step']}/{self.args.steps} reward {m['reward']:+.3f} right {m['accuracy']:.1%} length "
            f"{m['length']:.0f} cut {m['truncated']:.1%} entropy {m['entropy']:.2f} no-signal {m['no_signal']:.0%} "
            f"gap {gap} norm {norm} | {m['time_rollout']:.1f} + {m['time_update']:.1f} s, "
            f"{m['rollout_tokens_per_s']:,.0f} tokens/s, eta {midtrain.duration(left)}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The report of a folder of runs

# Okabe and Ito's, which colour-blind readers can tell apart
COLOURS = {"base": "#999999", "stable": "#000000", "short": "#E69F00", "long": "#0072B2", "hybrid": "#009E73"}


def report(out: str) -> str:
    """Print and write report.md, report.json and report.png of all rl-* runs in `out`; returns the picture's path."""
    runs, names = {}, [path.parent.name[3:] for path in Path(out).glob("rl-*/metrics.jsonl")]
    for name in sorted(names, key=lambda name: (BRANCHES.index(name) if name in BRANCHES else 99, name)):
        with open(os.path.join(out, "rl-" + name, "metrics.jsonl")) as f:
            rows = [row for row in map(json.loads, f) if "eval_n" in row]
        if len(rows) > 1 and rows[-1]["step"] == rows[-1]["steps"]:
            runs[name] = rows
    if not runs:
        raise FileNotFoundError(f"no finished rl-* run in {out}; make one with: python rl.py --branch long --out {out}")
    table = [summary(name, rows[0], rows[-1]) for name, rows in runs.items()]
    lines = ["| start | before RL | after RL | difference | length before | after | steps |", "|---" * 7 + "|"]
    for t in table:
        before, after = (f"{t[k]:.1%} ({t[k + '_low']:.1%} to {t[k + '_high']:.1%})" for k in ("before", "after"))
        lines.append(
            f"| {t['start']} | {before} | {after} | {100 * t['difference']:+.1f} points "
            f"| {t['length_before']:.0f} | {t['length_after']:.0f} | {t['steps']} |"
        )
    lines += ["", f"Greedy, on {table[0]['n']} held-out problems, with 95 % Wilson intervals; mean lengths in tokens."]
    text = "\n".join(lines)
    print(text)
    files.write_text(os.path.join(out, "report.md"), text)
    files.write_json(os.path.join(out, "report.json"), {"rows": table})
    return draw(runs, os.path.join(out, "report.png"))


def report_seeds(outs: list[str]) -> None:
    """Print the mean and the range over several folders that were reported before: runs with different seeds."""
    tables = []
    for out in outs:
        path = os.path.join(out, "report.json")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{out} has no report.json yet; make it with: python rl.py --report --out {out}")
        tables.append(files.read_json(path)["rows"])
    print(
        f"| start | before RL | after RL | difference, mean of {len(outs)} | of each | length before | after |\n"
        + "|---" * 7
        + "|"
    )
    for rows in zip(*tables, strict=True):
        if len({row["start"] for row in rows}) > 1:
            raise ValueError(f"{', '.join(outs)} do not hold runs from the same starting points")
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key != "start"}
        each = ", ".join(f"{100 * row['difference']:+.1f}" for row in rows)
        span = {k: (mean[k], min(row[k] for row in rows), max(row[k] for row in rows)) for k in ("before", "after")}
        before, after = ("{:.1%} ({:.1%} to {:.1%})".format(*span[k]) for k in span)
        print(f"| {rows[0]['start']} | {before} | {after} | {100 * mean['difference']:+.1f} points | {each} "
              f"| {mean['length_before']:.0f} | {mean['length_after']:.0f} |")  # fmt: skip


def summary(name: str, first: dict, last: dict) -> dict:
    """A row of the table: the run's first and last evaluations, which are on the same problems."""
    row = {"start": name, "n": last["eval_n"], "steps": last["step"]}
    for when, e in (("before", first), ("after", last)):
        low, high = verify.wilson(round(e["eval_accuracy"] * e["eval_n"]), e["eval_n"])
        row |= {when: e["eval_accuracy"], when + "_low": low, when + "_high": high, "length_" + when: e["eval_length"]}
    return row | {"difference": row["after"] - row["before"]}


def draw(runs: dict[str, list[dict]], path: str) -> str:
    """Accuracy and length against the step, a line for each starting point; returns path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for (name, rows), marker in zip(runs.items(), "osD^v*PX" * 9, strict=False):
        style = {"marker": marker, "markersize": 4, "linewidth": 2, "color": COLOURS.get(name), "label": name}
        left.plot([r["step"] for r in rows], [100 * r["eval_accuracy"] for r in rows], **style)
        right.plot([r["step"] for r in rows], [r["eval_length"] for r in rows], **style)
    left.set(title="Held-out problems solved, greedy (%)", xlabel="GRPO step", ylim=(0, None))
    right.set(title="Mean length of the answers (tokens)", xlabel="GRPO step", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False)
    figure.suptitle("GRPO from different starting points")
    figure.savefig(path, dpi=150)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Command line

# Flags (and what is made of them) that may differ when a run goes on: the results so far do not depend on them
MAY_CHANGE = (
    "out", "steps", "threads", "report", "log_every", "save_every", "text_every", "stop", "stairs", "max_new_tokens",
)  # fmt: skip


def parse_args():
    p = files.ArgumentParser(prog="rl.py", description=__doc__)
    p.add_argument("--branch", choices=BRANCHES, help="start from this stage of --out")
    p.add_argument("--ckpt", metavar="DIR", help="or from this checkpoint, ours or a Hugging Face Llama's")
    p.add_argument(
        "--report",
        action="store_true",
        help="no training: table and picture of all runs in --out (DIR,DIR: mean over seeds)",
    )
    p.add_argument("--out", metavar="DIR", help="folder of the runs (default runs/PRESET); this one is DIR/rl-START")
    p.add_argument("--preset", default="tiny", choices=PRESETS, help="which sizes (default tiny)")
    p.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines of problem and answer, or hub:ID[:PART[:SPLIT]] (default: the generated world)",
    )
    p.add_argument(
        "--eval",
        metavar="FILE",
        help="held out: the like, or a benchmark's name (default: a tenth of --prompts, or the world's test split)",
    )
    p.add_argument("--data", metavar="DIR", help="folder of the benchmarks' files (default: the hub)")
    p.add_argument("--seed", type=int, default=0, help="of the order of the prompts and of sampling")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads of a process")
    p.add_argument("--dtype", default="auto", choices=("auto", *midtrain.DTYPES), help="of activations")
    p.add_argument("--template", default="simple", choices=prompts.TEMPLATES, help="complex: for long thoughts")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="one cap, instead of --length-schedule")
    p.add_argument("--temperature", type=float, default=1.0, help="of sampling, and of the policy that is trained")
    p.add_argument("--advantage", default="group", choices=("group", "mean", "rloo"), help="see advantages()")
    p.add_argument("--surrogate", default="clip", choices=("clip", "gspo", "cispo"), help="see grpo_loss()")
    p.add_argument("--loss-agg", default="token", choices=("token", "sequence", "constant"), help="see grpo_loss()")
    p.add_argument("--clip-low", type=float, default=0.2, help="a ratio may fall to 1 - this")
    p.add_argument("--clip-high", type=float, default=0.2, help="and grow to 1 + this; DAPO: 0.28")
    p.add_argument("--dual-clip", type=float, default=0.0, help="bound for bad tokens grown likely (3; 0: off)")
    p.add_argument("--is-cap", type=float, default=0.0, help="truncated importance weights for the gap (2; 0: off)")
    p.add_argument("--kl-coef", type=float, default=0.0, help="pull towards the starting point (0: it is not loaded)")
    p.add_argument("--kl", default="k3", choices=("k1", "k2", "k3"), help="see kl_estimate()")
    p.add_argument(
        "--filter",
        default="none",
        choices=("none", "drop", "refill"),
        help="groups of equal rewards: drop does not count them, refill asks others in their place (DAPO)",
    )
    p.add_argument("--refills", type=int, default=4, metavar="N", help="times to ask others at most in a step")
    p.add_argument(
        "--overlong",
        default="keep",
        choices=("keep", "mask", "punish"),
        help="mask: truncated answers do not count; punish: answers near the cap lose up to 1 of their reward (DAPO)",
    )
    p.add_argument("--log-every", type=int, default=1, help="steps between lines; metrics.jsonl has every step")
    for name, (ours, paper, text) in SIZES.items():
        flag, text = "--" + name.replace("_", "-"), f"{text} (tiny {ours}, paper {paper})"
        p.add_argument(flag, type=type(ours), metavar="X", help=text)
    with contextlib.redirect_stderr(sys.stderr if files.is_rank0() else io.StringIO()):
        args = p.parse_args()
    for name, row in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, row[PRESETS[args.preset]])
    args.out = args.out or f"runs/{args.preset}"
    if args.max_new_tokens is not None:
        args.length_schedule = f"0:{args.max_new_tokens}"
    args.stairs = parse_schedule(args.length_schedule)
    return args


def check(args) -> None:
    """ValueError for settings that do not work together."""
    if (args.branch is None) == (args.ckpt is None):
        raise ValueError(f"where to start? Give one of --branch {'|'.join(BRANCHES)} and --ckpt DIR")
    for name in ("log_every", "threads", *SIZES):
        if isinstance(getattr(args, name), int) and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    for name in ("seed", "refills", "clip_low", "clip_high", "dual_clip", "is_cap", "kl_coef"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must not be negative")
    if 0 < args.dual_clip <= 1:
        raise ValueError(
            f"--dual-clip {args.dual_clip} would take the gradient of every bad answer: give 3, or 0 for none"
        )
    if args.dual_clip and args.surrogate == "cispo":
        raise ValueError("--dual-clip does nothing with --surrogate cispo, which clips no token")
    if args.temperature <= 0:
        raise ValueError(f"--temperature {args.temperature} must be above 0: a greedy policy has no gradient")
    if args.rollouts < 2:
        raise ValueError("--rollouts 1 leaves nothing to compare an answer with: give at least 2")
    if args.prompts_per_step % args.updates:
        raise ValueError(f"--prompts-per-step {args.prompts_per_step} does not split into {args.updates} equal updates")


def main() -> None:
    with midtrain.clean_exit():
        args = parse_args()
        if args.report:
            return report_seeds(args.out.split(",")) if "," in args.out else print(report(args.out))
        check(args)
        world = midtrain.setup(args.threads)
        with midtrain.run_lock(os.path.join(args.out, starting_point(args)[1])):
            Run(args, world).loop()


if __name__ == "__main__":
    files.run_cli(main)

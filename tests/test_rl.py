"""rl.py: the gradient is the policy gradient, however the batch is cut; variants do what their formulas say;
a bandit is learned; a run that is killed goes on as if it had not been."""

import collections
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import Process, on_ranks

import midtrain
import rl
from data import benchmarks, files, prompts, synth, tokenizer
from model import Llama, LlamaConfig
from sample import Sampler

ALONE = midtrain.World()
MICRO = LlamaConfig(32, 1, 16, 2, 1, 8, 32, rope_theta=10_000.0, max_position=64)


def settings(**changes):
    """What the update and the rollout read of the command line."""
    args = {
        "columns": None,
        "prompts_per_step": 4,
        "rollouts": 2,
        "updates": 1,
        "filter": "none",
        "refills": 4,
        "overlong": "keep",
        "surrogate": "clip",
        "loss_agg": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 0.0,
        "is_cap": 0.0,
        "kl_coef": 0.0,
        "kl": "k3",
        "temperature": 1.0,
        "advantage": "group",
        "row_tokens": 24,
        "micro_tokens": 48,
        "seed": 0,
        "stop": (),
        "reward": None,
    }
    return SimpleNamespace(**(args | changes))


def grpo_loss(*tensors, denominator=None, sampler_logp=None, ref_logp=None, **variant):
    return rl.grpo_loss(*tensors, rl.LossConfig(**variant), denominator, sampler_logp, ref_logp)


def gradient(loss, parameter):
    return torch.autograd.grad(loss, parameter, retain_graph=True)[0]


# ------------------------------------------------------------------------------------------------------------
# Advantages


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, -1, -1, -1], [1.0, 1, -1, -1]])
    std = torch.tensor([1.0, 2 / math.sqrt(3)])  # ddof 1: sqrt((2.25 + 3 * 0.25) / 3), sqrt(4 / 3)
    centred = torch.tensor([[1.5, -0.5, -0.5, -0.5], [1.0, 1, -1, -1]])
    torch.testing.assert_close(rl.advantages(rewards), centred / (std[:, None] + 1e-6))
    torch.testing.assert_close(rl.advantages(rewards, "mean"), centred)
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    torch.testing.assert_close(rl.advantages(rewards, "rloo"), rewards - others)


@pytest.mark.parametrize("kind", ["group", "mean", "rloo"])
def test_advantages_at_the_edges(kind):
    equal = torch.tensor([[0.1, 0.1, 0.1], [-1.0, -1, -1], [1e6, 1e6, 1e6], [1 / 3, 1 / 3, 1 / 3]])
    assert rl.advantages(equal, kind).eq(0).all() and not rl.has_signal(equal).any()
    assert rl.advantages(torch.tensor([[5.0]]), kind).eq(0).all(), (
        "a group of one has nothing to compare with"
    )
    unscored = torch.tensor([[1.0, -1, float("nan"), -1]])
    assert rl.advantages(unscored, kind)[0, 2] == 0
    torch.testing.assert_close(
        rl.advantages(unscored, kind)[:, [0, 1, 3]], rl.advantages(unscored[:, [0, 1, 3]], kind)
    )
    assert rl.advantages(torch.full((1, 3), float("nan")), kind).eq(0).all()
    large = rl.advantages(torch.tensor([[1e6, 1e6 + 2]]), kind)
    torch.testing.assert_close(large, rl.advantages(torch.tensor([[0.0, 2]]), kind))


def test_unknown_variants_are_named():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="valid: group, mean, rloo"):
        rl.advantages(x, "std")
    with pytest.raises(ValueError, match="valid: token, sequence, constant"):
        grpo_loss(x, x, x[0], x + 1, loss_agg="mean")
    assert grpo_loss(x, x, x[0], x + 1, loss_agg="constant")[0].isnan(), (
        "the length cap is not there to be guessed"
    )
    with pytest.raises(ValueError, match="valid: clip, gspo, cispo"):
        grpo_loss(x, x, x[0], x + 1, surrogate="ppo")
    with pytest.raises(ValueError, match="valid: k1, k2, k3"):
        rl.kl_estimate(x, x, "k4")


# ------------------------------------------------------------------------------------------------------------
# The loss: is its gradient the policy gradient?


def enumerate_policy(seed):
    """A policy over the 125 sequences of 3 tokens of 5 → (its logits by prefix, logp (125, 3), the
    sequences)."""
    torch.manual_seed(seed)
    tables = [torch.randn(*[5] * t, dtype=torch.float64, requires_grad=True) for t in (1, 2, 3)]
    y = torch.tensor(list(itertools.product(range(5), repeat=3)))
    rows = (tables[0].log_softmax(-1)[y[:, 0]], tables[1].log_softmax(-1)[y[:, 0], y[:, 1]])
    return tables, torch.stack((*rows, tables[2].log_softmax(-1)[y[:, 0], y[:, 1], y[:, 2]]), 1), y


def test_gradient_is_the_policy_gradient():
    """All sequences as one group, each as often as it is likely: the surrogate's gradient is that of
    E[reward]."""
    tables, logp, y = enumerate_policy(0)
    reward = torch.where(y.sum(1) % 3 == 0, 1.0, -1.0).double()
    p = logp.sum(1).exp()
    exact = torch.autograd.grad((p * reward).sum(), tables, retain_graph=True)
    p = p.detach()
    A = reward - (p * reward).sum()  # mean only
    length = 1 + y[:, 0] % 3  # for the biased variant below: lengths that differ
    mask = torch.ones_like(logp)

    def surrogate(
        A, mask, **how
    ):  # the weight p stands for how often a sequence is drawn: it multiplies its advantage
        loss, _ = grpo_loss(logp, logp.detach(), p * A, mask, **how)
        return torch.autograd.grad(-loss, tables, retain_graph=True)

    for ours, truth in zip(surrogate(A, mask, loss_agg="constant", denominator=1.0), exact):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-13)
    biased = surrogate(A, (torch.arange(3) < length[:, None]).double(), loss_agg="sequence", denominator=1.0)
    assert not torch.allclose(biased[0], exact[0], rtol=1e-2), (
        "1/|o| is not the gradient of the expected reward"
    )
    std = (p * A.square()).sum().sqrt()
    assert not torch.allclose(
        surrogate(A / std, mask, loss_agg="constant", denominator=1.0)[0], exact[0], rtol=1e-3
    )


def test_gradient_at_and_off_the_policy():
    old = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], dtype=torch.float64)
    mask, A = torch.ones_like(old), torch.tensor([2.0, -1.5], dtype=torch.float64)
    hows = (
        {},
        {"dual_clip": 3.0},
        {"clip_high": 0.28},
        {"is_cap": 2.0, "sampler_logp": old},
        {"surrogate": "gspo"},
        {"surrogate": "cispo"},
    )
    for how in hows:
        logp = old.clone().requires_grad_()
        grad = gradient(grpo_loss(logp, old, A, mask, denominator=1.0, **how)[0], logp)
        torch.testing.assert_close(grad, -A[:, None].expand(2, 2), msg=f"on the policy: -A, with {how}")

    def off(ratio, a, **how):
        logp = (torch.zeros(1, 1, dtype=torch.float64) + math.log(ratio)).requires_grad_()
        loss, sums = grpo_loss(logp, torch.zeros_like(logp), torch.tensor([a]), torch.ones(1, 1), **how)
        return loss.item(), gradient(loss, logp).item(), sums

    assert off(1.3, 1.0)[1] == 0 and off(1.3, 1.0)[2]["clip_high"] == 1
    assert off(0.7, -1.0)[1] == 0 and off(0.7, -1.0)[2]["clip_low"] == 1
    assert off(1.25, 1.0)[1] == 0 and off(1.25, 1.0, clip_high=0.28)[1] == pytest.approx(-1.25)
    assert off(0.7, 1.0)[1] == pytest.approx(-0.7), (
        "a good token that has become rarer still gets its gradient"
    )
    assert off(5.0, -1.5)[:2] == pytest.approx((7.5, 7.5)) and off(5.0, -1.5, dual_clip=3.0)[:2] == (4.5, 0)
    assert off(1.3, 1.0, surrogate="cispo")[1] == pytest.approx(-1.2), "cut, but not to nothing"
    assert off(0.7, -1.0, surrogate="cispo")[1] == pytest.approx(0.7)
    weighted = off(1.0, 1.0, is_cap=2.0, sampler_logp=torch.full((1, 1), -math.log(1.5)))
    assert weighted[1] == pytest.approx(-1.5), "pi_old / mu = 1.5"
    assert off(1.0, 1.0, is_cap=2.0, sampler_logp=torch.full((1, 1), -5.0))[1] == -2.0, "truncated at the cap"


def test_gspo_by_hand():
    """One ratio a response, the geometric mean of its tokens', which is clipped as a whole."""
    old = torch.zeros(2, 3, dtype=torch.float64)
    logp = torch.tensor([[0.3, -0.1, 9.0], [0.2, 0.2, 0.2]], dtype=torch.float64).log1p().requires_grad_()
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]], dtype=torch.float64)
    how = {"surrogate": "gspo", "loss_agg": "sequence", "clip_low": 0.1, "clip_high": 0.1}
    loss, sums = grpo_loss(logp, old, torch.tensor([1.0, 1.0]).double(), mask, **how)
    s = math.sqrt(1.3 * 0.9)  # within 1.1; the second response's, 1.2, is not
    assert loss.item() == pytest.approx(-(s + 1.1) / 2)
    expected = torch.tensor([[s / 4, s / 4, 0], [0, 0, 0]], dtype=torch.float64)  # 1/N 1/|o| s a token
    torch.testing.assert_close(gradient(loss, logp), -expected)
    assert sums["clip_high"] == 3


def test_importance_weights_correct_another_sampler():
    """Answers drawn from mu, not from pi: with weights the expected gradient is the exact one, without it is
    not."""
    tables, logp, y = enumerate_policy(0)
    mu = enumerate_policy(5)[1].sum(1).detach()
    reward, whole = torch.where(y.sum(1) % 3 == 0, 1.0, -1.0).double(), logp.sum(1)
    exact = torch.autograd.grad((whole.exp() * reward).sum(), tables, retain_graph=True)

    def gradient_under_mu(cap):
        column = whole[:, None]
        how = {"loss_agg": "constant", "denominator": 1.0, "is_cap": cap, "sampler_logp": mu[:, None]}
        loss, _ = grpo_loss(column, column.detach(), mu.exp() * reward, torch.ones_like(column), **how)
        return torch.autograd.grad(-loss, tables, retain_graph=True)

    for ours, truth in zip(gradient_under_mu(1e6), exact):
        torch.testing.assert_close(ours, truth)
    off, cut = (gradient_under_mu(cap)[0] for cap in (0.0, 2.0))
    error = [(g - exact[0]).norm() / exact[0].norm() for g in (off, cut)]
    assert error[0] > 0.2 and error[1] > 0.01, "no weights, and truncated ones, are biased"


def test_importance_weights_of_gspo_are_of_the_response():
    """As its ratio: the mean over the response's tokens, and one cap for all of them."""
    torch.manual_seed(3)
    logp, sampler_logp = (torch.randn(2, 3, dtype=torch.float64) for _ in "ab")
    logp.requires_grad_()
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]], dtype=torch.float64)
    A = torch.tensor([1.0, -2.0], dtype=torch.float64)
    variant = {"surrogate": "gspo", "loss_agg": "sequence", "is_cap": 1.1}
    loss, _ = grpo_loss(logp, logp.detach(), A, mask, sampler_logp=sampler_logp, **variant)
    gap = (logp.detach() - sampler_logp) * mask
    weight = (gap.sum(1) / mask.sum(1)).exp().clamp(max=1.1)
    expected = -(weight * A)[:, None] * mask / mask.sum(1, keepdim=True) / 2
    torch.testing.assert_close(gradient(loss, logp), expected)


def test_soft_overlong_punishment():
    """DAPO's numbers: 20,480 tokens at most, 4,096 of them a buffer."""
    lengths = (1, 16384, 16384 + 1024, 20480)
    assert [rl.overlong_penalty(n, 20480) for n in lengths] == [0, 0, -0.25, -1]


def test_golden_table():
    """Two groups of three, lengths 1, 4, 7: on the policy the loss is -sum of A over tokens, by each
    aggregation."""
    lengths = torch.tensor([1, 4, 7, 7, 4, 1])
    mask = (torch.arange(7) < lengths[:, None]).double()
    A = torch.tensor([3.0, -1, -2, 1, 1, -2], dtype=torch.float64)
    logp = torch.full((6, 7), -1.0, dtype=torch.float64, requires_grad=True)

    def run(rows=slice(None), width=7, **how):
        pad = (0, width - 7)
        lp, m = torch.nn.functional.pad(logp, pad)[rows], torch.nn.functional.pad(mask, pad)[rows]
        return grpo_loss(lp, lp.detach(), A[rows], m, **how)[0]

    expected = {"token": -(3 - 4 - 14 + 7 + 4 - 2) / 24, "sequence": 0.0, "constant": 6 / (6 * 10)}
    totals = {"token": 24, "sequence": 6, "constant": 6 * 10}
    for agg, value in expected.items():
        how = {"loss_agg": agg, "denominator": totals[agg]}
        assert run(**how).item() == pytest.approx(value, abs=1e-12)
        if agg != "constant":
            assert run(loss_agg=agg).item() == pytest.approx(value, abs=1e-12), (
                "by default this is the whole batch"
            )
        whole = gradient(run(**how), logp)
        for size in (1, 2, 3):
            parts = sum(gradient(run(slice(i, i + size), **how), logp) for i in range(0, 6, size))
            torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            gradient(run([5, 3, 1, 0, 2, 4], width=11, **how), logp), whole, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("seed", [0, 1])
def test_kl_estimates(seed):
    """Over all sequences k1 and k3 have the KL's value, k2 its gradient, k1 none; a step down reduces the
    KL."""
    tables, logp, _ = enumerate_policy(seed)
    ref = enumerate_policy(seed + 10)[1].sum(1).detach()
    whole = logp.sum(1)  # each sequence as one token: log p(y)
    p = whole.exp()
    exact = (p * (whole - ref)).sum()
    truth = torch.autograd.grad(exact, tables, retain_graph=True)
    weight = p.detach()
    value = {k: (weight * rl.kl_estimate(whole, ref, k)).sum() for k in ("k1", "k2", "k3")}
    assert value["k1"].item() == pytest.approx(exact.item()) and value["k3"].item() == pytest.approx(
        exact.item()
    )
    grads = {k: torch.autograd.grad(v, tables, retain_graph=True) for k, v in value.items()}
    torch.testing.assert_close(grads["k2"], truth)
    assert all(g.abs().max() < 1e-12 for g in grads["k1"])

    zero = torch.zeros(len(whole), dtype=torch.float64)
    column, ref_column = whole[:, None], ref[:, None]
    loss, _ = grpo_loss(
        column,
        column.detach(),
        zero,
        weight[:, None],
        denominator=1.0,
        kl_coef=1.0,
        kl="k2",
        ref_logp=ref_column,
    )
    step = torch.autograd.grad(loss, tables)
    with torch.no_grad():
        for table, g in zip(tables, step):
            table -= 0.05 * g
    moved = [t.log_softmax(-1) for t in tables]
    y = torch.tensor(list(itertools.product(range(5), repeat=3)))
    after = moved[0][y[:, 0]] + moved[1][y[:, 0], y[:, 1]] + moved[2][y[:, 0], y[:, 1], y[:, 2]]
    assert (after.exp() * (after - ref)).sum() < exact


# ------------------------------------------------------------------------------------------------------------
# The update: a packed batch on a model, in any number of pieces


def some_samples(groups=4, seed=0, signal=lambda g: True):
    """Two answers to each problem, of lengths 1 to 12, behind prompts of 1 to 6 tokens."""
    rng = random.Random(seed)
    samples = []
    for g in range(groups):
        prompt = [rng.randrange(32) for _ in range(rng.randint(1, 6))]
        for sign in (1.0, -1.0):
            tokens = [rng.randrange(32) for _ in range(rng.randint(1, 12))]
            advantage, reward = (sign * (g + 1), sign) if signal(g) else (0.0, -1.0)
            logprobs = [-3.0] * len(tokens)
            samples.append(
                rl.Sample(g, prompt, tokens, logprobs, "", True, reward > 0, reward, advantage, signal(g))
            )
    return samples


def change(samples, args, world=ALONE, model=None):
    """(metrics, the change of all weights) of rl.update with plain gradient descent."""
    model = model or micro_model()
    before = whole_weights(model)
    metrics = rl.update(model, None, torch.optim.SGD(model.parameters(), lr=1.0), samples, 10, args, world)
    after = whole_weights(model)
    return metrics, torch.cat([(after[k] - before[k]).flatten() for k in before])


def micro_model(seed=0, config=MICRO):
    return Llama(config).init_weights(seed)


def whole_weights(model):
    sharded = torch.distributed.is_initialized()
    return {k: (p.full_tensor() if sharded else p).detach().clone() for k, p in model.named_parameters()}


def test_equals_supervised_learning():
    """With advantage 1 the gradient is that of cross-entropy on the same tokens, each sequence computed by
    itself."""
    samples = [replace(s, advantage=1.0) for s in some_samples()]
    args, model = settings(loss_agg="constant"), micro_model()
    _, ours = change(samples, args)
    for s in samples:
        ids = torch.tensor([s.prompt + s.tokens])
        targets = torch.tensor([[-1] * (len(s.prompt) - 1) + s.tokens])
        (model(ids[:, :-1], targets).sum() / (len(samples) * 10)).backward()
    oracle = torch.cat([-p.grad.flatten() for p in model.parameters()])
    oracle *= min(1.0, 1.0 / oracle.norm().item())
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_shared_prompt_is_the_prompt_of_each(kl_coef, monkeypatch):
    """A group's prompt once in a row or before each answer: the same log-probabilities and the same
    gradient."""
    samples = some_samples() + [replace(s, group=4, prompt=[7] * 9) for s in some_samples(seed=3)[:5]]
    args, model, found = settings(row_tokens=30, micro_tokens=60, kl_coef=kl_coef), micro_model(), {}
    for share in (True, False):
        monkeypatch.setattr(rl, "shares_prompts", lambda device, share=share: share)
        batches = rl.micro_batches(samples, args, ALONE)
        assert len(batches) > 2 and sum(b.mask.sum() for b in batches) == sum(len(s.tokens) for s in samples)
        logps = [rl.log_probs(model, b, 0.7) for b in batches]
        by_advantage = [
            (a, lp[: int(m.sum())])
            for b, x in zip(batches, logps)
            for a, m, lp in zip(b.advantages, b.mask, x)
        ]
        loss = sum(
            grpo_loss(x, x.detach(), b.advantages, b.mask, loss_agg="constant", denominator=9.0)[0]
            for b, x in zip(batches, logps)
        )
        grads = torch.autograd.grad(loss, list(model.parameters()))
        order = sorted(by_advantage, key=lambda pair: (len(pair[1]), pair[0].item(), pair[1].sum().item()))
        found[share] = (torch.cat([x for _, x in order]), torch.cat([g.flatten() for g in grads]))
        if share:
            inputs = sum(b.tokens.numel() for b in batches)
    for ours, theirs in zip(found[True], found[False]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert inputs < sum(b.tokens.numel() for b in batches), "and fewer tokens are computed"


@pytest.mark.parametrize("agg", ["token", "sequence", "constant"])
def test_micro_batches_do_not_matter(agg):
    whole = change(some_samples(), settings(loss_agg=agg, row_tokens=200, micro_tokens=200))[1]
    assert whole.abs().max() > 1e-4
    for row_tokens, micro_tokens in ((1, 1), (24, 24), (40, 80)):
        args = settings(loss_agg=agg, row_tokens=row_tokens, micro_tokens=micro_tokens)
        torch.testing.assert_close(change(some_samples(), args)[1], whole, rtol=1e-4, atol=1e-7)


def test_denominators_count_what_is_documented():
    """Groups without signal count unless dropped; truncated answers count unless masked. Both have gradient
    0."""
    samples = [
        replace(s, advantage=0.1 * s.advantage) for s in some_samples(signal=lambda g: g != 2)
    ]  # below the clip
    samples[0].stopped = False
    n = sum(len(s.tokens) for s in samples)
    silent = sum(len(s.tokens) for s in samples if not s.signal)
    norm = change(samples, settings())[0]["grad_norm"]
    metrics = change(samples, settings(filter="drop"))[0]
    assert metrics["grad_norm"] / norm == pytest.approx(n / (n - silent), rel=1e-5)
    assert metrics["trained_tokens"] == n - silent == change(samples, settings())[0]["trained_tokens"]
    masked = change(samples, settings(overlong="mask"))
    torch.testing.assert_close(masked[1], change(samples[1:], settings())[1])
    assert masked[0]["trained_tokens"] == n - silent - len(samples[0].tokens)


def test_no_signal_leaves_the_weights():
    metrics, delta = change(some_samples(signal=lambda g: False), settings())
    assert delta.eq(0).all() and metrics["trained_tokens"] == 0 and metrics["grad_norm"] is None


def test_several_updates():
    """The problems are split evenly; old log-probabilities are those of before the first step, to the bit."""
    args, samples, model = settings(updates=2), some_samples(), micro_model()
    parts = [(part, rl.micro_batches(part, args, ALONE)) for part in (samples[:4], samples[4:])]
    for b in (b for _, group in parts for b in group):
        with torch.no_grad():
            b.old_logp = rl.log_probs(model, b, 1.0)
        assert torch.equal(b.old_logp, rl.log_probs(model, b, 1.0).detach()), "with and without a gradient"
    optimizer, sums = torch.optim.SGD(model.parameters(), lr=1.0), collections.defaultdict(float)
    for part, group in parts:
        for b in group:
            rl.backward(model, b, sum(len(s.tokens) for s in part), sums, args, ALONE)
        rl.optimizer_step(model, optimizer)
    other = micro_model()
    metrics, _ = change(samples, args, model=other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert metrics["clip_low"] + metrics["clip_high"] > 0, "in the second step the ratio is no longer 1"


def test_a_gradient_that_is_not_finite_is_skipped():
    model = micro_model()
    before = whole_weights(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    assert math.isnan(rl.optimizer_step(model, torch.optim.SGD(model.parameters(), lr=1.0)))
    assert all(torch.equal(v, before[k]) for k, v in whole_weights(model).items())
    assert all(p.grad is None for p in model.parameters())


CASES = {  # which rank has which of the samples
    "spread": (lambda s: s.group % 2, lambda g: True),
    "a rank without rows": (lambda s: 0, lambda g: True),
    "a rank without signal": (lambda s: s.group % 2, lambda g: g % 2 == 0),
}


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    on_ranks(2, tmp_path, ranks_program, str(tmp_path / "ranks.pt"))
    found = torch.load(tmp_path / "ranks.pt")
    for case, (_, has) in CASES.items():
        alone = change(some_samples(signal=has), settings())[1]
        torch.testing.assert_close(found[case], alone, rtol=1e-4, atol=1e-6, msg=case)


def ranks_program(path):
    world = midtrain.setup(1)
    found = {}
    for case, (where, has) in CASES.items():
        model = midtrain.apply_fsdp(micro_model(), world, torch.float32)
        mine = [s for s in some_samples(signal=has) if where(s) == world.rank]
        found[case] = change(mine, settings(), world, model)[1]
    if world.rank == 0:
        torch.save(found, path)


# ------------------------------------------------------------------------------------------------------------
# Rollouts


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(temperature):
    model, rng = micro_model(), random.Random(0)
    for p in model.parameters():
        p.data *= 3.0  # far from uniform
    asked = [
        {"tokens": [rng.randrange(32) for _ in range(rng.randint(1, 9))], "answer": "1"} for _ in range(6)
    ]
    args = settings(stop=(5, 6))
    samples = rl.rollout(Sampler(model, None, slots=5), asked, 4, 20, temperature, 0, args, ALONE)
    assert {s.stopped for s in samples} == {True, False} and all(
        s.tokens[-1] in (5, 6) for s in samples if s.stopped
    )
    for b in rl.micro_batches(samples, args, ALONE):
        gap = (rl.log_probs(model, b, temperature) - b.sampler_logp) * b.mask
        assert gap.abs().max() <= 1e-4 and b.mask.sum() == (b.targets >= 0).sum()


def test_prompt_order():
    def steps(n, per_step, seed=0):
        return [rl.prompt_order(n, per_step, step, seed) for step in range(30)]

    for n, per_step in ((10, 4), (3, 7), (12, 4)):
        flat = [i for step in steps(n, per_step) for i in step]
        epochs = [flat[i : i + n] for i in range(0, len(flat) - n + 1, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert steps(10, 4) == steps(10, 4) != steps(10, 4, seed=1)
    assert rl.prompt_order(10, 10, 0, 0) != rl.prompt_order(10, 10, 1, 0)


def test_stair():
    stairs = rl.parse_schedule("0:2048,200:4096,320:8192")
    caps = [rl.length_cap(stairs, step) for step in (0, 199, 200, 319, 320, 9999)]
    assert caps == [2048, 2048, 4096, 4096, 8192, 8192]
    for wrong in ("", "2048", "5:10", "0:x", "0:0"):
        with pytest.raises(ValueError, match="no length schedule"):
            rl.parse_schedule(wrong)


# ------------------------------------------------------------------------------------------------------------
# Learning


def bandit(twist, steps=80):
    """Prompt token i is rewarded for the answer (i + 7) % 32: mean probability of the right answers after
    training."""
    model, contexts = micro_model(), [[i] for i in range(4)]
    sampler, optimizer = (
        Sampler(model, None, slots=64),
        midtrain.make_optimizer(model, 0.02, weight_decay=0.0),
    )
    generator, args = (
        torch.Generator().manual_seed(0),
        settings(prompts_per_step=4, micro_tokens=4096, row_tokens=64),
    )
    right = torch.tensor([[(i + 7) % 32] for i in range(4)])
    for step in range(steps):
        ids = [4 * step + i for i in range(4)]
        answers = sampler.generate(contexts, n=16, max_new_tokens=1, stop=(), request_ids=ids)
        tokens = torch.tensor([[c.tokens[0] for c in group] for group in answers])  # (P, G)
        rewards = torch.where(tokens == right, 1.0, -1.0)
        A, signal = twist(rl.advantages(rewards), generator), rl.has_signal(rewards)
        samples = [
            rl.Sample(
                i,
                contexts[i],
                c.tokens,
                c.logprobs,
                "",
                True,
                r.item() > 0,
                r.item(),
                a.item(),
                signal[i].item(),
            )
            for i, group in enumerate(answers)
            for c, r, a in zip(group, rewards[i], A[i])
        ]
        rl.update(model, None, optimizer, samples, 1, args, ALONE)
    with torch.no_grad():
        return model(torch.tensor(contexts))[:, -1].softmax(-1).gather(1, right).mean().item()


def test_a_bandit_is_learned():
    assert bandit(lambda A, _: A, steps=0) < 0.1, "the first weights know nothing: 1 / 32, give or take"
    assert bandit(lambda A, _: A) > 0.99
    assert bandit(lambda A, _: -A) < 0.01, "the wrong sign unlearns"
    assert bandit(lambda A, g: A.flatten()[torch.randperm(A.numel(), generator=g)].view_as(A)) < 0.3, (
        "shuffled"
    )


def test_the_known_optimum_under_a_kl_penalty():
    """Reward r, reference p, coefficient beta: the policy becomes p exp(r / beta), normalised. k1 as a loss
    does not pull."""
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn(8, generator=generator).log_softmax(0)
    reward, beta = torch.rand(8, generator=generator), 0.5
    best = (ref + reward / beta).softmax(0)

    def distance(kl, coef, steps=300):
        theta = ref.clone().requires_grad_()
        for step in range(steps):
            drawn = torch.multinomial(theta.detach().softmax(0), 4096, replacement=True, generator=generator)
            logp = theta.log_softmax(0)[drawn][:, None]
            A = rl.advantages(reward[drawn][None], "mean")[0]
            loss, _ = grpo_loss(
                logp,
                logp.detach(),
                A,
                torch.ones_like(logp),
                kl_coef=coef,
                kl=kl,
                ref_logp=ref[drawn][:, None],
            )
            with torch.no_grad():
                theta -= 2.0 * (1 - step / steps) * gradient(loss, theta)
        return (theta.detach().softmax(0) - best).abs().sum().item() / 2

    assert distance("k2", beta, steps=0) > 0.1
    assert distance("k2", beta) < 0.02
    assert distance("k1", beta) > 0.2 and distance("k2", -beta) > 0.2, "no pull; the wrong sign"
    assert distance("k3", beta) < 0.1, "near it: its gradient is right to first order"


STOP = 10


def add(model, pairs, n, seed):
    """n answers to each "a + b = ?" at temperature 1: digits, then STOP → (completions, share right of each
    problem)."""
    asked = [[11 + a, 21 + b] for a, b in pairs]
    made = Sampler(model, None, slots=128).generate(asked, n=n, max_new_tokens=4, seed=seed, stop=(STOP,))
    right = [[c.tokens == [*map(int, str(a + b)), STOP] for c in group] for (a, b), group in zip(pairs, made)]
    return asked, made, torch.tensor(right).float()


def warm_start():
    """A model that has seen sums for a while: it solves some problems never, some sometimes, some always."""
    model, rng = micro_model(), random.Random(0)
    optimizer = midtrain.make_optimizer(model, 0.01, weight_decay=0.0)
    for _ in range(120):
        rows = [
            (a, b, [*map(int, str(a + b)), STOP])
            for a, b in ((rng.randrange(10), rng.randrange(10)) for _ in range(32))
        ]
        ids = torch.tensor([([11 + a, 21 + b] + answer + [0])[:5] for a, b, answer in rows])
        targets = torch.tensor([([-1] + answer + [-1])[:4] for _, _, answer in rows])
        model(ids[:, :-1], targets).sum().div(64).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def practise(model, pairs, steps, twist=lambda A, g: A):
    """GRPO on these sums: 8 of them a step, 16 answers to each."""
    optimizer, generator = (
        midtrain.make_optimizer(model, 3e-3, weight_decay=0.0),
        torch.Generator().manual_seed(0),
    )
    args = settings(prompts_per_step=8, row_tokens=128, micro_tokens=4096)
    for step in range(steps):
        chosen = [pairs[i] for i in rl.prompt_order(len(pairs), 8, step, 0)]
        asked, made, right = add(model, chosen, 16, seed=step)
        rewards = 2 * right - 1
        A, signal = twist(rl.advantages(rewards), generator), rl.has_signal(rewards)
        samples = [
            rl.Sample(i, asked[i], c.tokens, c.logprobs, "", True, r > 0, float(r), float(a), bool(signal[i]))
            for i, group in enumerate(made)
            for c, r, a in zip(group, rewards[i], A[i])
        ]
        rl.update(model, None, optimizer, samples, 4, args, ALONE)


def test_the_perfectible_set_is_perfected():
    """Sums solved 20 to 80 % of the time come to be solved always, the stop token included; controls do not
    get there."""
    every = [(a, b) for a in range(10) for b in range(10)]
    share = add(warm_start(), every, 64, seed=1)[2].mean(1)
    pairs = [pair for pair, p in zip(every, share) if 0.2 <= p <= 0.8]
    assert len(pairs) >= 20

    def after(steps, **how):
        model = warm_start()
        practise(model, pairs, steps, **how)
        _, made, right = add(model, pairs, 32, seed=2)
        return right.mean().item(), sum(len(c.tokens) for group in made for c in group) / right.numel()

    share, length = after(400)
    assert share > 0.97
    assert length == pytest.approx(sum(len(str(a + b)) + 1 for a, b in pairs) / len(pairs), abs=0.05)
    assert (
        after(60, twist=lambda A, g: A.flatten()[torch.randperm(A.numel(), generator=g)].view_as(A))[0] < 0.7
    ), "as it should be, 87 %"
    assert after(60, twist=lambda A, g: -A)[0] < 0.1


# ------------------------------------------------------------------------------------------------------------
# The program: kill it at any moment, start it again


def odd_reward(response, gold):
    return 1.0 if len(response) % 2 else -1.0  # something that a random model gets right and wrong


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("start") / "micro")
    rows = synth.problems("train", 200)
    words = tokenizer.train([prompts.simple(row["problem"]) for row in rows], 300)
    Llama(replace(MICRO, vocab_size=words.vocab_size)).init_weights(0).save_pretrained(path)
    words.save(path)
    return path


def program(*words):
    """rl.py with these words and odd_reward, in a process of its own."""
    sys.argv = list(words)
    rl.verify.reward = odd_reward
    rl.main()


def command(checkpoint, out, *more):
    return [
        "rl.py",
        "--ckpt",
        checkpoint,
        "--out",
        str(out),
        "--steps",
        "6",
        "--prompts-per-step",
        "4",
        "--rollouts",
        "4",
        "--length-schedule",
        "0:8,3:12",
        "--eval-problems",
        "12",
        "--eval-subset",
        "8",
        "--eval-every",
        "2",
        "--save-every",
        "2",
        "--dtype",
        "fp32",
        "--lr",
        "1e-2",
        "--threads",
        "1",
        "--updates",
        "2",
        *more,
    ]


def run(monkeypatch, argv, reward=odd_reward):
    monkeypatch.setattr(rl.verify, "reward", reward)
    monkeypatch.setattr(sys, "argv", argv)
    rl.main()


def outcome(out):
    """All that must be equal: weights, rollouts, metrics but times and rates."""
    folder = Path(out) / "rl-micro"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time_", "share_", "rollout_tokens_per_s", "update_tokens_per_s")
    rows = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]
    texts = {f.name: f.read_text() for f in sorted((folder / "rollouts").iterdir())}
    return (folder / "checkpoints/step_000006/model.safetensors").read_bytes(), rows, texts


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, command(checkpoint, out))
    return outcome(out)


def test_a_run(checkpoint, uninterrupted):
    weights, rows, texts = uninterrupted
    assert weights != (Path(checkpoint) / "model.safetensors").read_bytes()
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["cap"] for row in rows[1:]] == [8] * 3 + [12] * 3
    assert [row["step"] for row in rows if "eval_n" in row] == [0, 2, 4, 6]
    assert [row["eval_n"] for row in rows if "eval_n" in row] == [12, 8, 8, 12]
    assert [row["eval_cap"] for row in rows if "eval_n" in row] == [12, 8, 12, 12], "both ends: the last cap"
    assert rows[2]["curve_accuracy"] == rows[2]["eval_accuracy"] and "curve_length" in rows[0]
    assert all(row["accuracy"] <= row["pass_at_n"] <= min(1, 4 * row["accuracy"]) for row in rows[1:])
    for row in rows[::2]:  # as many problems of each level
        levels = [row[f"eval_accuracy/{k}"] for k in range(1, synth.MAX_LEVEL + 1)]
        assert sum(levels) / len(levels) == pytest.approx(row["eval_accuracy"])
    assert all(row["gap_max"] <= 1e-4 for row in rows[1:]), "fp32"
    assert len(texts) == 6 and all(len(text.splitlines()) == 16 for text in texts.values())
    row = json.loads(texts["step_000001.jsonl"].splitlines()[0])
    assert row.keys() == {"problem", "gold", "response", "reward", "correct", "tokens", "finish"}


class Crash(Exception):
    pass


@pytest.mark.parametrize("where", ["rollout", "update", "evaluation", "save"])
def test_resume_after_a_crash(where, checkpoint, uninterrupted, tmp_path, monkeypatch):
    """In the middle of step 4's rollout; between its two updates; in the evaluation after step 4; in the
    second save."""
    calls = itertools.count(1)
    limit = {"rollout": 12 + 2 * 16 + 8 + 16 + 7, "evaluation": 12 + 2 * 16 + 8 + 2 * 16 + 3}.get(where)

    def reward(response, gold):
        if next(calls) == limit:
            raise Crash
        return odd_reward(response, gold)

    def optimizer_step(model, optimizer, step=rl.optimizer_step, steps=itertools.count(1)):  # noqa: B008
        if next(steps) == 8:
            raise Crash
        return step(model, optimizer)

    with monkeypatch.context() as patch:
        if where == "update":
            patch.setattr(rl, "optimizer_step", optimizer_step)
        if where == "save":
            replace_folder, saves = os.rename, itertools.count(1)

            def rename(a, b):
                if next(saves) == 2:
                    raise Crash
                replace_folder(a, b)

            patch.setattr(os, "rename", rename)
        with pytest.raises(Crash):
            run(patch, command(checkpoint, tmp_path), reward)
    run(monkeypatch, command(checkpoint, tmp_path))
    assert outcome(tmp_path) == uninterrupted


DAPO = ("--filter", "refill", "--overlong", "punish", "--clip-high", "0.28")


def test_dapo_asks_until_all_groups_have_a_signal(checkpoint, tmp_path, monkeypatch):
    """Answers to a third of the problems are all wrong: others are asked. Killed in a refill, it goes on the
    same."""

    def reward(response, gold):
        return odd_reward(response, gold) if int(gold) % 3 else -1.0

    run(monkeypatch, command(checkpoint, tmp_path / "a", *DAPO), reward)
    _, rows, texts = whole = outcome(tmp_path / "a")
    asked = [row["problems"] for row in rows[1:]]
    assert all(n % 4 == 0 for n in asked) and 4 < max(asked) <= 20
    assert [len(text.splitlines()) for text in texts.values()] == [4 * n for n in asked]
    assert any(
        json.loads(line)["reward"] not in (1, -1) for text in texts.values() for line in text.splitlines()
    )
    for row, text in zip(rows[1:], texts.values()):
        groups = [
            [json.loads(line) for line in text.splitlines()[i : i + 4]]
            for i in range(0, 4 * row["problems"], 4)
        ]
        signal = [
            g
            for g in groups
            if len({odd_reward(a["response"], 0) if int(a["gold"]) % 3 else -1 for a in g}) > 1
        ]
        assert row["trained_tokens"] == sum(answer["tokens"] for group in signal[:4] for answer in group)
        assert len(signal) >= 4 or row["problems"] == 20

    calls = itertools.count(1)

    def crash(response, gold):
        if next(calls) == 12 + 4 * sum(asked[:2]) + 8 + 4 * (asked[2] - 1):  # at the end of what step 3 asks
            raise Crash
        return reward(response, gold)

    with pytest.raises(Crash):
        run(monkeypatch, command(checkpoint, tmp_path / "b", *DAPO), crash)
    run(monkeypatch, command(checkpoint, tmp_path / "b", *DAPO), reward)
    assert outcome(tmp_path / "b") == whole


def test_refill_takes_problems_in_their_order(checkpoint, tmp_path, monkeypatch):
    """None is passed over: what a step did not ask, the next one does, after a kill too."""

    def reward(response, gold):
        return odd_reward(response, gold) if int(gold) % 3 else -1.0

    for steps in ("2", "4"):
        run(monkeypatch, command(checkpoint, tmp_path, *DAPO, "--steps", steps), reward)
    texts = sorted((tmp_path / "rl-micro/rollouts").iterdir())
    asked = [json.loads(line)["problem"] for f in texts for line in f.read_text().splitlines()[::4]]
    train = synth.problems("train", rl.TRAIN_PROBLEMS, 0)
    assert asked == [train[i]["problem"] for i in rl.prompt_order(len(train), len(asked), 0, 0)]


def test_the_best_checkpoint_is_kept(checkpoint, tmp_path, monkeypatch):
    """By accuracy on the problems that all evaluations share; RUN@best names it."""
    accuracy = iter([0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1])
    real = rl.evaluate
    monkeypatch.setattr(rl, "evaluate", lambda *a: real(*a) | {"curve_accuracy": next(accuracy)})
    for steps in ("6", "8"):
        more = ("--eval-every", "1", "--save-every", "3", "--steps", steps)
        accuracy = iter([0.1] * (steps == "6") + [0.3, 0.2, 0.1, 0.1, 0.1, 0.1][: 6 if steps == "6" else 2])
        run(monkeypatch, command(checkpoint, tmp_path, *more))
    kept = sorted(path.name for path in (tmp_path / "rl-micro/checkpoints").glob("step_*"))
    assert kept == ["step_000001", "step_000006", "step_000008"]
    assert files.find_checkpoint(f"{tmp_path}/rl-micro@best").endswith("step_000001")


def test_a_run_without_finite_gradients_stops(checkpoint, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(rl, "optimizer_step", lambda model, optimizer: math.nan)
        with pytest.raises(ValueError, match="^5 steps in a row without a finite .*, up to step 5"):
            run(patch, command(checkpoint, tmp_path))
    assert "SKIPPED 2 | " in capsys.readouterr().out
    run(monkeypatch, command(checkpoint, tmp_path, "--steps", "5"))  # from the checkpoint of step 4


def test_a_reward_of_ones_own(checkpoint, tmp_path, monkeypatch):
    """It decides what is learned; accuracy stays that of the verifier."""
    path = tmp_path / "mine.py"
    path.write_text("def short(r, gold):\n    return -len(r) / 100\n\ndef broken(r, gold):\n    1 / 0\n")
    flags = ("--reward", f"{path}:short", "--name", "brief", "--steps", "1")
    run(monkeypatch, command(checkpoint, tmp_path, *flags))
    out = [json.loads(line) for line in (tmp_path / "rl-brief/rollouts/step_000001.jsonl").open()]
    assert all(row["reward"] == -len(row["response"]) / 100 for row in out)
    row = json.loads((tmp_path / "rl-brief/metrics.jsonl").read_text().splitlines()[1])
    right = [odd_reward(row["response"], row["gold"]) > 0 for row in out]
    assert row["accuracy"] == sum(right) / len(out) and row["eval_reward"] < 0
    path.write_text(path.read_text().replace("100", "50"))
    rl.load_reward.cache_clear()
    with pytest.raises(ValueError, match="made with other settings .reward_hash"):
        run(monkeypatch, command(checkpoint, tmp_path, *flags))
    wrong = (
        (f"{path}:long", r"has no function 'long' .valid: short, broken"), ("mine", "FILE.py:FUNCTION"),
        (f"{tmp_path}/none.py:f", "no such file"), (f"{path}:broken", "--reward fails on .*ZeroDivision"))
    for text, why in wrong:
        with pytest.raises(ValueError, match=why):
            run(monkeypatch, command(checkpoint, tmp_path / "x", "--reward", text, "--steps", "1"))


def test_files_of_problems(checkpoint, tmp_path, monkeypatch, capsys):
    """Another content under the same name is another experiment; overlaps are said; several sets of --eval;
    what cannot be written again is refused at once, with its line."""
    train, test, more = (tmp_path / name for name in ("train.jsonl", "test.jsonl", "more.jsonl"))
    lines = [json.dumps({"problem": f"{i} + 1?", "answer": i + 1}) + "\n" for i in range(40)]
    train.write_text("".join(lines[:30]))
    test.write_text("".join(lines[28:36]))
    more.write_text("".join(lines[36:]))
    flags = ("--prompts", str(train), "--eval", f"{test},{more}", "--steps", "1", "--eval-subset", "3")
    run(monkeypatch, command(checkpoint, tmp_path, *flags))
    assert f"warning: 2 of 8 problems of {test} are among the training prompts" in capsys.readouterr().out
    row = json.loads((tmp_path / "rl-micro/metrics.jsonl").read_text().splitlines()[1])
    assert row["eval_n"] == 8 and f"eval_accuracy/{more}" in row and f"eval_accuracy/{test}" not in row
    assert len((tmp_path / "rl-micro/evals/step_000001.jsonl").read_text().splitlines()) == 12
    for path, name in ((test, "eval_hash"), (train, "prompts_hash")):
        kept = path.read_text()
        path.write_text(kept.replace('"answer": 3', '"answer": 4'))
        with pytest.raises(ValueError, match=f"made with other settings .{name} "):
            run(monkeypatch, command(checkpoint, tmp_path, *flags))
        path.write_text(kept)
    test.write_text(lines[0] + '{"problem": "a \\ud800?", "answer": 1}\n')
    with pytest.raises(ValueError, match="test.jsonl: row 2 is no problem with an answer: .*surrogate pair"):
        run(monkeypatch, command(checkpoint, tmp_path, *flags))


def test_what_is_held_out_of_a_file():
    """A tenth of the different problems, drawn by the seed; one that comes twice is on one side."""
    rows = [{"problem": f"{i % 50} + 1 ?", "answer": str(i % 50 + 1)} for i in range(60)]
    train, held_out = rl.hold_out(rows, 99, seed=0)
    assert len(held_out) == 5 == len({row["problem"] for row in held_out})
    assert not {row["problem"] for row in train} & {row["problem"] for row in held_out}
    assert len(train) == 60 - sum(row in held_out for row in rows)
    assert rl.hold_out(rows, 99, seed=0) == (train, held_out) != rl.hold_out(rows, 99, seed=1)
    assert len(rl.hold_out(rows, 2, seed=0)[1]) == 2


def test_two_ranks_ask_the_same_and_get_the_same(checkpoint, uninterrupted, tmp_path, monkeypatch):
    """A run on two ranks makes the rollouts of one, and one process goes on from where two were stopped."""
    on_ranks(2, tmp_path, program, *command(checkpoint, tmp_path, "--steps", "2"))
    first = {f.name: f.read_text() for f in (tmp_path / "rl-micro/rollouts").iterdir()}
    whole = uninterrupted[2]
    assert first == {name: whole[name] for name in sorted(whole)[:2]}
    run(monkeypatch, command(checkpoint, tmp_path))
    assert outcome(tmp_path)[2].keys() == whole.keys()
    assert [row["step"] for row in outcome(tmp_path)[1]] == list(range(7))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1"])
def test_a_reward_that_is_no_number(value, checkpoint, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"^the reward of .* is (nan|inf|None|'1'), not a finite number \(answer '\d+'\)$"
    ):
        run(monkeypatch, command(checkpoint, tmp_path), lambda response, gold: value)


def test_prompts_of_the_hub_and_benchmarks_beside_training(tmp_path):
    """A data set in the hub's format, here a local folder; a benchmark by name from the folder of the
    files."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "set").mkdir()
    (tmp_path / "other").mkdir()
    rows = [{"question": f"{i} + 1?", "answer": f"It is {i}, and one.\n#### {i + 1}"} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set/train-0.parquet")
    parquet.write_table(
        pyarrow.Table.from_pylist([{"text": "no problem"}]), tmp_path / "other/train-0.parquet"
    )
    found = benchmarks.load_problems(f"hub:{tmp_path / 'set'}")
    assert found[4] == {"problem": "4 + 1?", "answer": "5"} and len(found) == 5
    with pytest.raises(ValueError, match="row 1 is no problem with an answer: no column .*; it has: text"):
        benchmarks.load_problems(f"hub:{tmp_path / 'other'}")
    args = settings(
        prompts=None, eval="math500", data=str(tmp_path), eval_problems=9, template="simple", max_prompt=99
    )
    words = tokenizer.train(["Question: Answer: 1 + 2?"], 260)
    with pytest.raises(FileNotFoundError, match="eval/math500.jsonl"):
        rl.read_problems(args, words)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/math500.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    args.max_prompt = 9999
    assert rl.read_problems(args, words)[1][0]["answer"] == "2"
    args.eval = "math501"
    with pytest.raises(FileNotFoundError, match="math501: no such file"):
        rl.read_problems(args, words)


def test_prompts_of_any_columns(tmp_path):
    """Rows without an answer or marked as wrong are left out; --columns names columns, of --eval others."""
    rows = [{"Q": f"{i} + 1?", "A": f"{i + 1}"} for i in range(5)] + [{"Q": "Why?", "A": "proof"}]
    (tmp_path / "p.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
    (tmp_path / "e.jsonl").write_text('{"instruction": "1?", "output": "So \\\\boxed{1}."}\n')
    args = settings(prompts=str(tmp_path / "p.jsonl"), eval=str(tmp_path / "e.jsonl"), data=None)
    args.eval_problems, args.template, args.max_prompt = 9, "simple", 9999
    words = tokenizer.train(["Question: Answer: 1 + 2?"], 260)
    with pytest.raises(ValueError, match="p.jsonl: row 1 is no .*: no column problem .*; it has: Q, A"):
        rl.read_problems(args, words)
    args.columns = {"prompts.problem": "Q", "prompts.answer": "A"}
    train, held_out = rl.read_problems(args, words)
    assert [(row["problem"], row["answer"]) for row in train] == [(f"{i} + 1?", str(i + 1)) for i in range(5)]
    assert [(row["problem"], row["answer"]) for row in held_out] == [("1?", "1")]


def test_bad_prompts_are_left_out_as_in_prepare(tmp_path, capsys):
    """Up to the same share, and the first is named; of --eval, a benchmark, none may be bad."""
    rows = [json.dumps({"problem": f"{i} + 1?", "answer": i + 1}) for i in range(300)]
    rows[3:3] = ["{", '{"problem": NaN, "answer": 1}', '{"problem": null, "answer": 1}', "[1]"]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(rows))
    args = settings(prompts=str(path), eval=None, data=None, columns=None)
    args.eval_problems, args.template, args.max_prompt = 9, "simple", 9999
    words = tokenizer.train(["Question: Answer: 1 + 2?"], 260)
    train, held_out = rl.read_problems(args, words)
    assert len(train) + len(held_out) == 300
    first = f"{path}: row 4 is no problem with an answer: not one JSON object in UTF-8"
    assert capsys.readouterr().out == (
        f"{path}: left out: 3 bad rows, 1 without a problem or an answer (the first: {first})\n")
    path.write_text("\n".join(rows[:150]))
    with pytest.raises(ValueError, match="row 4 is no problem .*3 bad rows of 150"):
        rl.read_problems(args, words)
    for broken, why in ('{"problem": null, "answer": 1}', "its problem is empty"), ("{", "not one JSON"):
        path.write_text("\n".join([*rows[:3], broken]))
        with pytest.raises(ValueError, match=f"p.jsonl: row 4 is no problem with an answer: {why}"):
            rl.read_problems(settings(**vars(args) | {"prompts": None, "eval": str(path)}), words)
    args.columns = {"other.problem": "Q"}
    with pytest.raises(ValueError, match=r"unknown source 'other' \(valid: prompts, eval\)"):
        rl.read_problems(args, words)


def test_the_longest_prompt_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"problem": "1 " * n, "answer": 1}) + "\n" for n in (3, 99, 4, 5))
    )
    more = ("--prompts", str(tmp_path / "p.jsonl"), "--max-prompt", "60", "--steps", "1")
    run(monkeypatch, command(checkpoint, tmp_path, *more))
    said = capsys.readouterr().out
    assert "1 of 3 prompts left out: longer than --max-prompt 60 tokens (the longest, problem 2, has " in said


def test_resume_after_ctrl_c_and_kill(checkpoint, uninterrupted, tmp_path, monkeypatch, capsys):
    calls = itertools.count(1)

    def reward(response, gold):
        if next(calls) == 36:  # in the second step's rollout, which is dropped
            os.kill(os.getpid(), signal.SIGINT)
        return odd_reward(response, gold)

    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, command(checkpoint, tmp_path), reward)
    assert stop.value.code == 130 and "stopped after step 1: saved" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # as an update begins
        update = rl.update
        patch.setattr(rl, "update", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or update(*args))
        run(patch, command(checkpoint, tmp_path))
    assert "stopped after step 1: saved" in capsys.readouterr().out  # nothing had changed yet
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # in the evaluation after step 2
        evaluate = rl.evaluate
        patch.setattr(rl, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or evaluate(*args))
        run(patch, command(checkpoint, tmp_path))
    assert "stopped after step 2: saved" in capsys.readouterr().out  # evaluated by the next start
    said = tmp_path / "said"
    process = Process(program, *command(checkpoint, tmp_path), stdout=said)
    while not said.exists() or "step 3/6" not in said.read_text():
        assert process.poll() is None, "the run ended before step 3"
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run(monkeypatch, command(checkpoint, tmp_path))
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "Give one of --branch"),
        (["--branch", "long"], "python midtrain.py --branch long"),
        (["--ckpt", "{ckpt}", "--rollouts", "1"], "at least 2"),
        (["--ckpt", "{ckpt}", "--temperature", "0"], "above 0"),
        (["--ckpt", "{ckpt}", "--clip-low", "-1"], "--clip-low -1.0 must not be negative"),
        (["--ckpt", "{ckpt}", "--seed", "-1"], "--seed -1 must not be negative"),
        (["--ckpt", "{ckpt}", "--kl-coef", "nan"], "--kl-coef nan must be a finite number"),
        (["--ckpt", "{ckpt}", "--lr", "inf"], "--lr inf must be a finite number"),
        (["--branch", "lang"], "not a finished stage to start from; valid: base, controlled, hybrid, long"),
        (["--ckpt", "{ckpt}", "--threads", "0"], "--threads 0 must be at least 1"),
        (["--ckpt", "{ckpt}", "--max-new-tokens", "0"], "0:0"),
        (["--ckpt", "{ckpt}", "--prompts", "{tmp}/one.jsonl"], "holds one problem"),
        (["--ckpt", "{ckpt}", "--prompts-per-step", "3", "--updates", "2"], "does not split"),
        (["--ckpt", "{ckpt}", "--preset", "3b"], "--preset 3b needs --prompts: --prompts math8k is"),
        (["--ckpt", "{ckpt}@7"], "micro has no checkpoint of step 7; it has: none"),
        (["--ckpt", "{ckpt}", "--length-schedule", "10:5"], "begin at 0"),
        (["--ckpt", "{ckpt}", "--dual-clip", "0.5"], "give 3, or 0"),
        (
            ["--ckpt", "{ckpt}", "--dual-clip", "3", "--surrogate", "cispo"],
            "does nothing with --surrogate cispo",
        ),
        (["--ckpt", "{ckpt}", "--max-prompt", "2"], "no prompt is within --max-prompt 2"),
        (["--ckpt", "{ckpt}", "--prompts", "{tmp}/none.jsonl"], "none.jsonl"),
        (["--ckpt", "{ckpt}", "--prompts", "synth"], "synth holds test problems"),
        (["--ckpt", "{ckpt}", "--prompts", "{tmp}/empty.jsonl"], "holds no problem"),
        (["--ckpt", "{ckpt}", "--prompts", "{tmp}/key.jsonl"], "key.jsonl: row 2 is no problem"),
        (["--ckpt", "{ckpt}", "--prompts", "{tmp}/text.jsonl"], "an answer: not one JSON object"),
        (["--ckpt", "{tmp}/nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(flags, says, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "key.jsonl").write_text('{"problem": "1?", "answer": 2}\n' + '{"problem": "1?"}\n' * 2)
    (tmp_path / "text.jsonl").write_text("1 + 1 = 2\n")
    (tmp_path / "one.jsonl").write_text('{"problem": "1 + 1?", "answer": 2}\n')
    argv = ["rl.py", "--out", str(tmp_path), *(f.format(ckpt=checkpoint, tmp=tmp_path) for f in flags)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises((ValueError, OSError)) as error:
        rl.main()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_other_settings_are_refused(checkpoint, tmp_path, monkeypatch):
    run(monkeypatch, command(checkpoint, tmp_path, "--steps", "1"))
    with pytest.raises(ValueError, match="other settings .lr 0.01 → 0.5"):
        run(monkeypatch, command(checkpoint, tmp_path, "--lr", "0.5"))


# ------------------------------------------------------------------------------------------------------------
# Memory, speed and shapes of a GPU


def load_program(folder):
    """What two ranks hold of the policy and of its reference, without either reading a whole model."""
    world, found = midtrain.setup(1), {}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(Llama, "from_pretrained", None)
    for kind in ("safetensors", "state"):
        args = settings(dtype="fp32", kl_coef=0.1, compile=False, activation_checkpointing=True,
            max_prompt=9, length_schedule="0:9")
        models = rl.load_policy(f"{folder}/{kind}", args, world)[:2]
        matrices = [p for m in models for p in m.parameters() if p.ndim > 1]
        assert all(p.to_local().numel() <= 0.6 * p.numel() for p in matrices)
        found[kind] = (*map(whole_weights, models), args.weights)
    if world.rank == 0:
        torch.save(found, f"{folder}/found.pt")


def test_each_rank_loads_its_shard(checkpoint, tmp_path):
    import torch.distributed.checkpoint as dcp

    alone = Llama.from_pretrained(checkpoint)
    for kind in ("safetensors", "state"):
        shutil.copytree(checkpoint, tmp_path / kind)
    (tmp_path / "state/model.safetensors").unlink()  # as our checkpoints of large models
    dcp.save({"model": alone.state_dict()}, checkpoint_id=str(tmp_path / "state/state"), no_dist=True)
    on_ranks(2, tmp_path, load_program, str(tmp_path))
    norm = hashlib.sha256(alone.norm.weight.detach().numpy().tobytes()).hexdigest()[:16]
    for *models, weights in torch.load(tmp_path / "found.pt").values():
        assert weights == norm, "what one process notes, and earlier runs have noted"
        assert all(torch.equal(m[k], p) for m in models for k, p in alone.named_parameters())


def test_adams_state_made_early_changes_no_bit():
    weights = []
    for early in (False, True):
        model = micro_model()
        optimizer = midtrain.make_optimizer(model, 1e-2, weight_decay=0.0)
        if early:
            rl.make_state(optimizer)
        for _ in range(3):
            rl.update(model, None, optimizer, some_samples(), 10, settings(), ALONE)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_run_has_one_pool(monkeypatch, capsys):
    """Whatever is free later, and when it goes on; one that no longer fits is made anew, and that is said."""
    gpu = midtrain.World(device=torch.device("cuda"))
    monkeypatch.setattr(rl, "over_ranks", lambda values, world, op: values)
    args = SimpleNamespace(max_prompt=100, length_caps={0: 400, 9: 900})
    token = 2 * 1 * 1 * 8 * 4  # keys and values, layers, heads, width, bytes

    def sized(tokens_free, stored=None):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (tokens_free * token, 1 << 40))
        sampler = Sampler(micro_model(), None)
        rl.size_pool(sampler, stored, args, gpu)
        return sampler.cache_tokens

    first = sized(10_000)
    assert first == 9_000 == sized(50_000, first) == sized(9_001, first)
    assert not capsys.readouterr().out
    assert sized(5_000, first) == 4_500 and "4,500 tokens now, not 9,000" in capsys.readouterr().out
    with pytest.raises(ValueError, match="room for 900 tokens, and a row takes up to 1,000: use more ranks"):
        sized(1_000)
    sampler = Sampler(micro_model(), None)
    rl.size_pool(sampler, None, args, ALONE)
    assert sampler.cache_tokens is None, "a CPU has no pool"


def test_a_resumed_run_has_the_pool_of_its_checkpoint(checkpoint, tmp_path, monkeypatch):
    seen, pool = [], lambda sampler, stored, args, world: (
        seen.append(stored), setattr(sampler, "cache_tokens", stored or 7_777))
    monkeypatch.setattr(rl, "size_pool", pool)
    for steps in ("2", "4", "6"):
        run(monkeypatch, command(checkpoint, tmp_path, "--steps", steps))
    assert seen == [None, 7_777, 7_777]


@pytest.mark.parametrize("share", [True, False])
def test_batches_of_all_shapes_are_compiled_twice(share, monkeypatch):
    """Each of the two kinds of block, the first and those behind, for one row and for several; with and
    without gradient."""
    config = replace(MICRO, num_layers=3)
    plain, model = micro_model(config=config), micro_model(config=config)
    torch._dynamo.reset()
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled(f, dynamic=dynamic, backend="eager"))
    midtrain.add_options(model, True, False, dynamic=True)
    monkeypatch.setattr(rl, "shares_prompts", lambda device: share)
    samples, counters = some_samples(groups=6), torch._dynamo.utils.counters
    rows = sorted(rl.pack_rows(samples, 24, share), key=lambda row: row.length)
    counters.clear()
    for grad in (True, False):
        for n in (4, 2, 1, 3, 2, 4):
            b = rl.collate(rows[:n], "cpu")
            with torch.set_grad_enabled(grad):
                ours = rl.log_probs(model, b, 1.0) * b.mask
            torch.testing.assert_close(ours, rl.log_probs(plain, b, 1.0) * b.mask, rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] <= 4 * (2 - grad)


def plan(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["rl.py", "--plan", *flags])
    rl.main()
    first, *_, titles = (lines := capsys.readouterr().out.splitlines())[:3]
    return first, [line.split() for line in lines[3:]]


def test_the_plan(checkpoint, monkeypatch, capsys):
    """As few blocks are recomputed as fit: of 8B on one GPU all, on eight none. What does not fit is said."""
    _, rows = plan(monkeypatch, capsys, "--preset", "8b")
    assert [row[:2] for row in rows] == [[gpus, cap] for gpus in "18" for cap in ("2048", "4096", "8192")]
    assert not any("fit" in row for row in rows)
    alone, whole = rows[2], rows[-1]
    assert float(alone[5]) < 139 and float(alone[7]) > 8.2 * float(whole[7])
    _, rows = plan(monkeypatch, capsys, "--preset", "8b", "--activation-checkpointing")
    assert not any("fit" in row for row in rows) and rows[2] == alone  # all are needed there
    assert float(rows[-1][5]) < float(whole[5]) / 2 and float(rows[-1][7]) > float(whole[7])
    assert rows[-1][3:5] == whole[3:5] and int(whole[4]) == int(float(whole[3]) * 2**30 // (8592 * 131_072))
    _, rows = plan(monkeypatch, capsys, "--preset", "8b", "--micro-tokens", "400000")
    assert all("does not fit" in " ".join(row) for row in rows)
    said, _ = plan(monkeypatch, capsys, "--ckpt", checkpoint)
    assert said.startswith(f"{replace(MICRO, vocab_size=300).num_params():,} parameters in bf16")


def test_an_update_that_does_not_fit_is_refused_before_the_model_is_made(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 20, 1 << 30))
    args = SimpleNamespace(dtype="bf16", kl_coef=0.0, compile=False, activation_checkpointing=False,
        max_prompt=400, micro_tokens=512, row_tokens=256, length_schedule="0:100,9:8000")
    gpu = midtrain.World(device=torch.device("cuda"))
    assert rl.micro_batch(args, 8).seq_len == 8400
    monkeypatch.setattr(midtrain, "empty_model", lambda *how, **more: pytest.fail("it was made"))
    with pytest.raises(ValueError, match=r"has 0.0 \(parameters .*use a smaller --micro-tokens, --act"):
        rl.load_policy(checkpoint, args, gpu)


def test_checkpointing_and_compilation_may_change_and_rollouts_stay_plain(
        checkpoint, uninterrupted, tmp_path, monkeypatch):
    """With recomputation a run is the same to the bit."""
    run(monkeypatch, command(checkpoint, tmp_path, "--steps", "4"))
    run(monkeypatch, command(checkpoint, tmp_path, "--activation-checkpointing"))
    assert outcome(tmp_path)[0] == uninterrupted[0]

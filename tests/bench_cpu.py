"""What the tiny preset does on a CPU, one thread.

    python tests/bench_cpu.py [steps]

Memory between steps, training and sampling in fp32 and bf16, learning in both and from other first weights,
attention by blocks, the verifier. Seconds are CPU seconds of the process, arms interleaved, the best of three
rounds: a busy machine disturbs them least.

Backward passes by hand were measured, and are not there: they saved too little. What a whole training step
takes more without them (8 x 256 tokens, AVX512-BF16, torch 2.13; the median of 20 to 30 interleaved rounds of
4 steps, ± 1 %):

| what | fp32 | bf16 |
|---|---|---|
| the backward by hand of RMSNorm | 1 % | 1 % |
| of rotary embedding | 0 % | 0 % |
| of cross-entropy | 1 % | 0 % |
| of attention by blocks (autograd goes through the same blocks) | 2 % | 3 % |
| all four | 3 % | 5 % |
| attention by blocks, which is there | 10 % | 41 to 48 % |
"""

import platform
import resource
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import midtrain
import model as llama
import verify
from data import prepare, recipes, synth, tokenizer
from data.loader import Loader
from model import PRESETS, Llama
from sample import Sampler

DTYPES = (torch.float32, torch.bfloat16)


def cpu_seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def best(arms: dict, rounds: int = 3) -> dict:
    """CPU seconds of each arm, interleaved, after one round of warming up."""
    times = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name, work in arms.items():
            seconds = cpu_seconds(work)
            times[name] += [seconds] if i else []
    return {name: min(t) for name, t in times.items()}


def new_model(tok, dtype) -> Llama:
    model = Llama(replace(PRESETS["tiny"], vocab_size=tok.vocab_size)).init_weights(0)
    model.compute_dtype = dtype
    return model


def train(model, optimizer, loader: Loader, step: int) -> dict:
    batch = loader.batch(step)
    return midtrain.train_step(model, optimizer, batch, loader.names, 8, midtrain.World(), int)


def training(folder: str, tok, steps: int) -> None:
    """Tokens per CPU second, and the loss after `steps` steps from the same weights on the same batches."""
    names = recipes.STAGES["tiny"]["stable"]
    loader = Loader(folder, names, 256, 8, 0)
    losses, arms = {}, {}
    for dtype in DTYPES:
        model = new_model(tok, dtype)
        optimizer = midtrain.make_optimizer(model, 2e-3)
        done = iter(range(10**9))

        def step(model=model, optimizer=optimizer, done=done, dtype=dtype) -> None:
            for _ in range(8):
                losses.setdefault(dtype, []).append(train(model, optimizer, loader, next(done))["loss"])

        arms[dtype] = step
    seconds = best(arms)
    for _ in range((steps - len(losses[DTYPES[0]])) // 8):
        for step in arms.values():
            step()
    for dtype in DTYPES:
        tail = losses[dtype][-50:]
        of = f"mean loss of the last {len(tail)} of {len(losses[dtype])} steps"
        rate = 8 * 8 * 256 / seconds[dtype]
        print(f"training {dtype}: {rate:8,.0f} tokens/s; {of} {sum(tail) / len(tail):.4f}")


def blocks(folder: str, tok) -> None:
    """A training step with attention by blocks of queries, and with torch's fused kernel and a mask."""
    loader = Loader(folder, recipes.STAGES["tiny"]["stable"], 256, 8, 0)
    for dtype in DTYPES:
        model = new_model(tok, dtype)
        optimizer = midtrain.make_optimizer(model, 2e-3)

        def steps(longest: int, model=model, optimizer=optimizer) -> None:
            with mock.patch.object(llama, "LONGEST_BLOCKED", longest):
                for i in range(8):
                    train(model, optimizer, loader, i)

        seconds = best({longest: partial(steps, longest) for longest in (256, 0)})
        print(f"training {dtype}: a step takes {seconds[0] / seconds[256]:.2f} times as long without blocks")


def memory(folder: str, tok) -> None:
    """What giving memory back after each step costs, and what is left of it after setup(), which keeps it."""
    loader = Loader(folder, recipes.STAGES["tiny"]["stable"], 256, 8, 0)
    model = new_model(tok, torch.float32)
    optimizer = midtrain.make_optimizer(model, 2e-3)
    for name in ("given back", "kept"):
        for i in range(5):
            train(model, optimizer, loader, i)
        begin = resource.getrusage(resource.RUSAGE_SELF)
        for i in range(30):
            train(model, optimizer, loader, i)
        end = resource.getrusage(resource.RUSAGE_SELF)
        user, kernel = (1e3 * (after - before) / 30 for before, after in zip(begin[:2], end[:2]))
        faults = (end.ru_minflt - begin.ru_minflt) / 30
        print(f"memory {name}: {user:.0f} ms a step, {kernel:.1f} in the kernel; {faults:,.0f} page faults")
        midtrain.setup(1)


def initialisation(folder: str, tok, steps: int) -> None:
    """GPT-2's fixed standard deviation of 0.02, and ours, 1 / sqrt(fan-in), in bf16 on the same batches."""
    names = recipes.STAGES["tiny"]["short"]
    loader = Loader(folder, names, 256, 8, 0)
    for name in ("0.02", "1 / sqrt(fan-in)"):
        model = new_model(tok, torch.bfloat16)
        with torch.no_grad():
            for p in model.parameters() if name == "0.02" else ():
                p.mul_(0.02 * p.shape[1] ** 0.5 if p.ndim == 2 else 1.0)
        optimizer = midtrain.make_optimizer(model, 2e-3)
        losses = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = midtrain.learning_rate("base", step, steps, 2e-3, 30)
            losses.append(train(model, optimizer, loader, step)["loss"])
        loss = sum(losses[-50:]) / 50
        print(f"first weights of std {name}: mean loss of the last 50 of {steps} steps {loss:.4f}")


def sampling(tok) -> None:
    """64 rows of 64 + 128 tokens at temperature 1, log-probabilities returned."""
    ids = [[(7 * i + j) % 250 for j in range(64)] for i in range(64)]
    samplers = {dtype: Sampler(new_model(tok, dtype), tok, 64) for dtype in DTYPES}
    arms = {d: lambda s=s: s.generate(ids, max_new_tokens=128, stop=()) for d, s in samplers.items()}
    for dtype, seconds in best(arms).items():
        print(f"sampling {dtype}: {64 * 128 / seconds:8,.0f} tokens/s")


def verifying() -> None:
    rows = synth.problems("test", 500)
    seconds = best({"": lambda: [verify.reward(row["solution"], row["answer"]) for row in rows]})[""]
    each = 1e6 * seconds / len(rows)
    print(f"verify.reward on solutions of the generated corpus: {each:.0f} microseconds each")


def main() -> None:
    torch.set_num_threads(1)
    cpu = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {cpu}")
    with tempfile.TemporaryDirectory() as folder:
        tokens = {"general": 300_000, "web": 1_000_000, "short_cot": 400_000, "instruct": 100_000}
        prepare.prepare_synth(folder, 1024, 256, tokens)
        tok = tokenizer.load(folder)
        memory(folder, tok)  # before anything else has called setup()
        steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
        training(folder, tok, steps)
        blocks(folder, tok)
        initialisation(folder, tok, steps)
        sampling(tok)
    verifying()


if __name__ == "__main__":
    main()

"""What the tiny preset does on a CPU, one thread: training and sampling in fp32 and bf16, learning
in both and from other first weights, the verifier.

    make bench          or: python tests/bench_cpu.py [steps]

Seconds are CPU seconds of the process, arms interleaved, the best of three rounds: a busy machine disturbs them least.
"""

import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import midtrain
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


def training(folder: str, tok, steps: int) -> None:
    """Tokens a CPU second, and the loss after `steps` steps from the same weights on the same batches."""
    names = recipes.STAGES["tiny"]["stable"]
    loader = Loader(folder, names, 256, 8, 0)
    losses, arms = {}, {}
    for dtype in DTYPES:
        model = new_model(tok, dtype)
        optimizer = midtrain.make_optimizer(model, 2e-3)
        done = iter(range(10**9))

        def step(model=model, optimizer=optimizer, done=done, dtype=dtype) -> None:
            for _ in range(8):
                batch = loader.batch(next(done))
                row = midtrain.train_step(model, optimizer, batch, loader.names, 8, midtrain.World())
                losses.setdefault(dtype, []).append(row["loss"])

        arms[dtype] = step
    seconds = best(arms)
    for _ in range((steps - len(losses[DTYPES[0]])) // 8):
        for step in arms.values():
            step()
    for dtype in DTYPES:
        tail = losses[dtype][-50:]
        print(
            f"training {dtype}: {8 * 8 * 256 / seconds[dtype]:8,.0f} tokens/s; mean loss of the last {len(tail)} of "
            f"{len(losses[dtype])} steps {sum(tail) / len(tail):.4f}"
        )


def initialisation(folder: str, tok, steps: int) -> None:
    """GPT-2's fixed standard deviation of 0.02 against ours, 1 / sqrt(fan-in), in bf16 on the same batches."""
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
            row = midtrain.train_step(model, optimizer, loader.batch(step), loader.names, 8, midtrain.World())
            losses.append(row["loss"])
        print(f"first weights of std {name}: mean loss of the last 50 of {steps} steps {sum(losses[-50:]) / 50:.4f}")


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
    print(f"verify.reward on solutions of the generated world: {1e6 * seconds / len(rows):.0f} microseconds each")


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as folder:
        tokens = {"general": 300_000, "web": 1_000_000, "short_cot": 400_000, "instruct": 100_000}
        prepare.prepare_synth(folder, 1024, 256, tokens)
        tok = tokenizer.load(folder)
        steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
        training(folder, tok, steps)
        initialisation(folder, tok, steps)
        sampling(tok)
    verifying()


if __name__ == "__main__":
    main()

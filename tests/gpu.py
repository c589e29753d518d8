"""What tests/gpu.sh runs beside the tests and benchmarks: the machine, training, the programs.

    python tests/gpu.py machine | training | programs [--dry] [--out DIR]

--dry: the same in tiny shapes on a CPU, where figures mean nothing. Rows are those of Markdown tables.
"""

import argparse
import contextlib
import gc
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import midtrain
from data import prepare, tokenizer
from data.loader import Batch
from model import PRESETS, Llama

ROOT = Path(__file__).parents[1]


def row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def table(*cells) -> None:
    row(*cells)
    row(*["---"] * len(cells))


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work, times: int = 1) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - start) / times


def machine(args) -> None:
    try:
        import triton
    except ImportError:
        triton = SimpleNamespace(__version__="none")
    card = "no GPU" if args.dry else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    table("card", "torch", "Triton", "Python", "copy GB/s", "products TFLOP/s")
    x = torch.empty((1 << 12) if args.dry else (1 << 30), dtype=torch.uint8, device=args.device)
    y, n = x.clone(), 64 if args.dry else 8192
    a, b = (torch.randn(n, n, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    works = [(lambda: y.copy_(x), 2 * x.numel() / 1e9), (lambda: a @ b, 2 * n**3 / 1e12)]
    rates = [amount / min(seconds(work, 10) for _ in range(3)) for work, amount in works]
    versions = torch.__version__, triton.__version__, platform.python_version()
    row(card, *versions, *(f"{rate:,.0f}" for rate in rates))


# ------------------------------------------------------------------------------------------------------------
# Training: train_step on the 1B shape


def random_model(args, config) -> Llama:
    with torch.device(args.device):
        model = Llama(config)
    for p in model.parameters():
        torch.nn.init.ones_(p) if p.ndim == 1 else torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


def batch_of(config, rows: int, T: int, mixed: bool) -> Batch:
    """Random words; one document per row, or documents of a quarter of what is left, and again."""
    tokens = torch.randint(config.vocab_size, (rows, T), generator=torch.Generator().manual_seed(0))
    doc_start, at = torch.zeros(rows, T, dtype=torch.int64), 0
    while mixed and at < T:
        doc_start[:, at:] = at
        at += max(32, (T - at) // 4)
    return Batch(tokens, tokens, doc_start, torch.zeros(rows, dtype=torch.int64))


def training(args) -> None:
    config, T, steps = (PRESETS["tiny"], 64, 1) if args.dry else (PRESETS["1b"], 8192, 20)
    world = midtrain.setup()  # allocator and determinism as in the program
    shape = SimpleNamespace(batch=4, micro_batch=4, seq_len=T, replicate=1, activation_checkpointing=False)
    name = "" if args.dry else torch.cuda.get_device_name()
    peak = midtrain.PEAK_FLOPS.get(name, 0.0)
    table("1B, 4 x 8,192", "documents", "tokens/s", "MFU", "of documents", "GiB", "planned", "first step s")
    arms = {"eager": (False, 0), "compiled": (True, 0), "compiled, recomputed": (True, config.num_layers)}
    for arm, (compiled, again) in arms.items():
        model = midtrain.add_options(random_model(args, config), compiled and not args.dry, again)
        model.compute_dtype = torch.float32 if args.dry else torch.bfloat16
        optimizer = midtrain.make_optimizer(model, 1e-5)
        for mixed in (False, True):
            batch = batch_of(config, 4, T, mixed)

            def step(batch=batch, model=model, optimizer=optimizer) -> dict:
                return midtrain.train_step(model, optimizer, batch, ("web",), 4, world, int)

            first = seconds(step)
            if not args.dry:
                torch.cuda.reset_peak_memory_stats()
            rate = 4 * T / seconds(step, steps)
            lengths = T, step()["document_length"]
            mfus = [rate * midtrain.flops_per_token(config, n) / peak if peak else 0.0 for n in lengths]
            needed = midtrain.peak_memory(torch.device(args.device)), midtrain.memory_plan(
                config, shape, "bf16", 1, again)["peak"]
            memory = [f"{x / 2**30:.1f}" for x in needed]
            row(arm, "mixed" if mixed else "one", f"{rate:,.0f}", *(f"{x:.1%}" for x in mfus), *memory,
                f"{first:.1f}")
        del model, optimizer, step
        gc.collect()  # a block and its compiled forward know each other
        if not args.dry:
            torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------
# The programs: a stage that is interrupted and goes on, three steps of GRPO

GRPO = """
import sys; sys.path.insert(0, {root!r})
import rl, sample, torch
from data.files import run_cli
rl.score = lambda text, problem: float(len(text) % 2)  # random weights solve nothing: a reward with a signal
new_cache = sample.new_cache
def said(model, slots, *args):
    cache = new_cache(model, slots, *args)
    if cache.paged:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        print(f"pool: {{cache.k.shape[1]}} blocks of {{cache.block_len}}, {{free:.1f}} GiB free", flush=True)
    return cache
sample.new_cache = said
run_cli(rl.main)
"""


def programs(args) -> None:
    out = Path(args.out)
    shutil.rmtree(out, ignore_errors=True)
    T, vocab, sizes = (64, 300, 4_000) if args.dry else (8192, 1024, 400_000)
    sources = ("general", "web", "short_cot", "long_cot", "instruct")
    if args.dry:
        prepare.VOCABULARY_CHARACTERS = 200_000
    prepare.prepare_synth(out / "data", vocab, T, dict.fromkeys(sources, sizes))
    tok = tokenizer.load(out / "data")
    preset = "tiny" if args.dry else "1b"
    words = tok.vocab_size if args.dry else PRESETS[preset].vocab_size  # more than the tokenizer's: padding
    model = random_model(args, replace(PRESETS[preset], vocab_size=words + 8 * args.dry))
    model.save_pretrained(str(out / "init"), tok=tok, dtype=torch.bfloat16)
    del model
    if not args.dry:
        torch.cuda.empty_cache()
    flags = {"preset": preset, "branch": "stable", "init": out / "init", "data": out / "data"}
    flags |= {"out": out / "run", "steps": 6, "batch": 8, "micro-batch": 4, "seq-len": T}
    flags |= {"log-every": 1, "eval-every": 1000}
    common = ["midtrain.py", *(word for name, value in flags.items() for word in (f"--{name}", value))]
    table("program", "seconds", "result")
    interrupted(common, out)
    begin = time.perf_counter()
    said = run(common, out / "resumed.log")
    row("midtrain.py, gone on and to its end", f"{time.perf_counter() - begin:.0f}", said[-1][:90])
    flags = {"preset": "tiny", "ckpt": out / "run/stable", "out": out / "rl", "steps": 3, "max-prompt": 400}
    few = (2, 2, 2, 2, 4) if args.dry else (16, 8, 20, 20, 128)
    names = ("prompts-per-step", "rollouts", "eval-problems", "eval-subset", "max-new-tokens")
    flags |= dict(zip(names, few))
    command = [out / "grpo.py", *(word for name, value in flags.items() for word in (f"--{name}", value))]
    (out / "grpo.py").write_text(GRPO.format(root=str(ROOT)))
    begin = time.perf_counter()
    said = run(command, out / "grpo.log")
    pools = [line[6:] for line in said if line.startswith("pool: ")]
    took = f"{time.perf_counter() - begin:.0f}"
    row("rl.py, 3 steps", took, "pools: " + ("; ".join(pools) or "none, on a CPU"))


def interrupted(command: list, out: Path) -> None:
    """SIGTERM after the third step: it must save and end with 143."""
    process = start(command)
    begun = None
    with open(out / "interrupted.log", "w") as log:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            if "step 3/6" in line:
                begun = time.perf_counter()
                process.send_signal(signal.SIGTERM)
    code, took = process.wait(), time.perf_counter() - (begun or time.perf_counter())
    row("SIGTERM after step 3, until the process ended", f"{took:.1f}", f"exit code {code}")
    size = sum(path.stat().st_size for path in (out / "run").rglob("*") if path.is_file())
    row("what it saved", "", f"{size / 1e9:.1f} GB")
    if code != 143:
        sys.exit(f"exit code {code}, not 143")


def start(command: list) -> subprocess.Popen:
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def run(command: list, log: Path) -> list[str]:
    process = start(command)
    with open(log, "w") as file, contextlib.closing(process.stdout) as lines:
        said = []
        for line in lines:
            print(line, end="", flush=True)
            file.write(line)
            said.append(line.rstrip())
    if code := process.wait():
        sys.exit(f"{command[0]} ended with {code}")
    return said or [""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("machine", "training", "programs"))
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--out", default="gpu_out/work", help="folder of the programs' runs")
    args = parser.parse_args()
    args.device = "cpu" if args.dry else "cuda"
    args.out = os.path.abspath(args.out)
    {"machine": machine, "training": training, "programs": programs}[args.what](args)


if __name__ == "__main__":
    main()

"""Training on a CPU, one thread, beside transformers' Llama with torch's AdamW; and the loader alone.

    python tests/bench_training.py [rounds]

The same weights, batches, schedule and clipping, in two layouts: a row is one document, which transformers'
attention knows without a mask; and rows packed with documents, as midtrain.py trains, which it is given as a
mask and positions. CPU seconds, arms interleaved, the median of the rounds. Loss: the mean over the last half
of the steps, the same batches in each arm.
"""

import platform
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import midtrain
from data import prepare, recipes
from data.loader import Batch, Loader
from model import PRESETS, Llama, document_mask

SHAPES = {  # name: (configuration, rows per step, tokens per row)
    "tiny, 0.9M": (PRESETS["tiny"], 8, 256),
    "small, 26M": (replace(PRESETS["small"], vocab_size=1024), 2, 256),
}
LR = 1e-3


def ours(model: Llama, dtype: torch.dtype):
    model.compute_dtype = dtype
    optimizer = midtrain.make_optimizer(model, LR)

    def step(batch: Batch) -> float:
        row = midtrain.train_step(model, optimizer, batch, ("web",), len(batch.tokens), midtrain.World(), int)
        return row["loss"]

    return step


def theirs(folder: str):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": midtrain.WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=midtrain.BETAS, eps=midtrain.EPS, fused=True)

    def step(batch: Batch) -> float:
        labels = batch.targets.masked_fill(batch.targets < 0, -100)
        packed = {}
        if batch.doc_start.any():
            packed["attention_mask"] = document_mask(batch.doc_start, torch.float32)
            packed["position_ids"] = torch.arange(batch.tokens.shape[1]) - batch.doc_start
        loss = model(batch.tokens, shift_labels=labels, labels=labels, use_cache=False, **packed).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), midtrain.GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def race(name: str, config, rows: int, T: int, loader: Loader, rounds: int, packed: bool) -> None:
    model = Llama(config).init_weights(0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        arms = {
            "transformers, fp32": theirs(folder),
            "ours, fp32": ours(Llama(config).init_weights(0), torch.float32),
            "ours, bf16": ours(Llama(config).init_weights(0), torch.bfloat16),
        }
    seconds, losses = {arm: [] for arm in arms}, {arm: [] for arm in arms}
    for i in range(rounds + 1):
        for arm, step in arms.items():
            start = time.process_time()
            for j in range(4):
                batch = loader.batch(4 * i + j)
                if not packed:
                    batch = batch._replace(doc_start=torch.zeros_like(batch.doc_start))
                losses[arm].append(step(batch))
            seconds[arm] += [time.process_time() - start] if i else []
    base = statistics.median(seconds["transformers, fp32"])
    for arm in arms:
        median, tail = statistics.median(seconds[arm]), losses[arm][len(losses[arm]) // 2 :]
        layout = "packed" if packed else "one document per row"
        speed = f"{4 * rows * T / median:8,.0f} tokens/s, {base / median:.2f} times transformers'"
        print(f"{name}, {layout}, {arm:20} {speed}; loss {sum(tail) / len(tail):.4f}", flush=True)


def loading(folder: str, steps: int = 10_000) -> None:
    """The loader alone, eight rows of 256 tokens per step; memory after a tenth of the steps and at last."""
    loader = Loader(folder, recipes.STAGES["tiny"]["stable"], 256, 8)
    start = time.process_time()
    for step in range(steps):
        loader.batch(step)
        if step == steps // 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rate = steps * 8 * 256 / (time.process_time() - start)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    grown = f"{growth:.1f} MiB more at the end of {steps:,} steps than after a tenth of them"
    print(f"loader alone: {rate:,.0f} tokens/s; {grown}")


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    cpu = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {cpu}")
    with tempfile.TemporaryDirectory() as folder:
        prepare.prepare_synth(folder, 1024, 256, {"general": 300_000, "web": 1_000_000, "short_cot": 400_000})
        loading(folder)
        for name, (config, rows, T) in SHAPES.items():
            loader = Loader(folder, {"web": 1.0}, T, rows)
            for packed in (False, True):
                race(name, config, rows, T, loader, rounds, packed)


if __name__ == "__main__":
    main()

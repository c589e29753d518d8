"""Mid-training: Stable-then-Decay, stage by stage (OctoThinker, arXiv 2506.20512).

    base  →  stable  →  short | long | hybrid | tool
    (ours)   constant   cosine to a tenth of the learning rate, one branch per mixture; tool is ours too: as
                        long, with calls of a calculator, on the generated corpus only
          →  controlled    cosine too, on the mixture that --mix names: what does one factor do?

    python midtrain.py --branch long                         # tiny, on any machine; earlier stages run first
    torchrun --nproc_per_node=8 midtrain.py --branch long    # the same on 8 GPUs (or processes, on a CPU)
    torchrun --nproc_per_node=8 midtrain.py --preset 1b --branch long --init Llama-3.2-1B --data DIR
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 midtrain.py ...

What to know before reading:

1. A step is a pure function of (settings, step, weights, optimizer): the loader has no state and neither has
   the schedule. So resuming is loading a checkpoint; the same command does it, and goes on bit for bit.
2. The loss is the mean over the target tokens of the whole batch, whatever the ranks and micro-batches:
   targets are counted first. A mean of means would weigh a padded row as much as a full one.
3. Every stage goes on with the optimizer state of the stage that it stands on. There is no warm-up between
   stages, and with fresh Adam moments the first steps at full learning rate would be jumps.
4. One process keeps plain tensors. Several shard them by FSDP2: fp32 master weights, computing in --dtype.

The metrics, one row per step in metrics.jsonl (the line that is printed shows the first few):

    loss, loss/SOURCE  mean negative log-likelihood over all target tokens of the step, and over one source's;
                       in nats, over all ranks and micro-batches together
    lr, grad_norm      learning rate of the step; global gradient norm before clipping at 1.0
    skipped            1 if loss or gradient was not finite (then null): the weights stay; five in a row stop
    val_loss, bits_per_byte, and both with /SOURCE     on held-out text, weighted like the mixture, every
                       --eval-every steps and at the end; bits per byte do not depend on the tokenizer
    share/, epochs/    in the last row, by source: its share of the sequences; how often it was gone through
    document_length    of the document that a token is in, on average over the step's tokens
    tokens_per_s, mfu  over the step's own time, without evaluation, checkpoints and the first step; model
                       FLOPs over the peak of a known GPU, counted as if each sequence were one document
    mfu_documents      the same with the attention that the documents ask for: less, the shorter they are
"""

import argparse
import bisect
import contextlib
import ctypes
import glob
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint as recompute

from data import files, prepare, recipes, shards, tokenizer
from data.loader import Batch, Loader, block_counts
from data.tokenizer import Tokenizer
from model import (
    DTYPES,
    PRESETS,
    Llama,
    LlamaConfig,
    config_from_hf,
    has_bf16,
    load_pretrained,
    load_state,
    loss_memory,
    pick_device,
    read_generation,
)

# ---- The recipe --------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    stands_on: str | None  # the stage whose weights and optimizer state it starts from
    schedule: str  # of the learning rate: see learning_rate()
    data_seed: int  # added to --seed, so that no stage sees a shared source in the order of another
    colour: str  # in pictures; Okabe and Ito's, which colour-blind readers can tell apart
    mixture: dict[str, float] | None = None  # of sources; None: that of data/recipes.py, or --mix


# One more line is one more branch, for example
# "mine": Stage("stable", "cosine", 6000, "#CC79A7", {"web": 0.7, "long_cot": 0.3})
RECIPE = {
    "base": Stage(None, "warmup", 0, "#999999"),  # stands in for Llama's own pre-training
    "stable": Stage("base", "constant", 1000, "#000000"),
    "short": Stage("stable", "cosine", 2000, "#E69F00"),
    "long": Stage("stable", "cosine", 3000, "#0072B2"),
    "hybrid": Stage("stable", "cosine", 4000, "#009E73"),
    "tool": Stage("stable", "cosine", 7000, "#56B4E9"),  # not the paper's: its outlook
    "controlled": Stage("base", "cosine", 5000, "#D55E00"),
}
WEIGHT_DECAY = 0.1  # the paper's
BETAS, EPS, GRAD_CLIP = (0.9, 0.95), 1e-8, 1.0  # not published; what Llama-like pre-training uses
FINAL_LR = 0.1  # a cosine ends at this share of its peak (paper, "cosine to 10 %")
EVAL_BATCHES = 2  # per source, at every evaluation
MAX_SKIPS = 5  # steps in a row that may be left out because their loss or gradient is not finite


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this is. One process is a world of one."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def wide(self) -> torch.dtype:
        """What sums of many losses are kept in: Apple's GPUs have no float64."""
        return torch.float32 if self.device.type == "mps" else torch.float64


def _stages(base, stable, decay, controlled) -> dict:
    return dict.fromkeys(RECIPE, decay) | {"base": base, "stable": stable, "controlled": controlled}


def _paper(lr: float, micro_batch: int, controlled_lr: float) -> dict:
    """The paper, section 4: 512 x 8,192 tokens per step, 50,000 stable steps (210B), 5,000 per branch (21B).
    Its controlled runs (section 3): 20B tokens, only of the 3B model; the rates of the other two are ours."""
    return {
        "steps": _stages(None, 50_000, 5_000, 5_000), "lr": _stages(None, lr, lr, controlled_lr), "warmup": 0,
        "batch": 512, "micro_batch": micro_batch, "seq_len": 8192,
        "save_every": 500, "eval_every": 1000, "log_every": 1,
    }


# batch and micro_batch in sequences; lr is a stage's highest; warmup in steps, of the base stage only.
RUNS = {
    "tiny": {  # ours: minutes on two CPU cores
        "steps": _stages(400, 2400, 800, 800), "lr": _stages(2e-3, 2e-3, 2e-3, 2e-3), "warmup": 50,
        "batch": 8, "micro_batch": 8, "seq_len": 256, "save_every": 200, "eval_every": 200, "log_every": 50,
        "vocab": 1024,
        "tokens": {"general": 1_500_000, "web": 4_000_000, "short_cot": 900_000, "long_cot": 900_000,
                   "instruct": 300_000},  # to generate, per source
    },
    "small": {  # ours: about 30M parameters, for real text
        "steps": _stages(2000, 2000, 500, 500), "lr": _stages(1e-3, 1e-3, 1e-3, 1e-3), "warmup": 100,
        "batch": 64, "micro_batch": 4, "seq_len": 1024, "save_every": 100, "eval_every": 500, "log_every": 10,
    },
    "1b": _paper(5e-5, 4, 5e-5),
    "3b": _paper(2e-5, 2, 3e-5),
    "8b": _paper(1e-5, 1, 1e-5),
}
# Generated only for a mixture that has this source
EXTRA_TOKENS = {"noisy": 4_000_000, "qa_prose": 300_000, "prose_qa": 300_000,
                "short_one": 900_000, "long_whole": 900_000, "crawl": 4_000_000,
                "tool_cot": 900_000}

# ---- Optimizer, schedule, loss, the step -------------------------------------------------------------------


def make_optimizer(model: Llama, lr: float, weight_decay: float = WEIGHT_DECAY, betas=BETAS):
    """AdamW. Matrices decay; norm weights do not: shrinking them says nothing about what was learned."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=EPS, fused=True)


def learning_rate(stage: str, step: int, steps: int, peak: float, warmup: int = 0) -> float:
    """The rate of the step that follows `step` finished ones of `steps`. "warmup": linear up to the peak,
    then constant; "cosine": the first step is at the peak, the last one at exactly FINAL_LR of it."""
    schedule = RECIPE[stage].schedule
    if schedule == "warmup":
        return peak * min(1.0, (step + 1) / max(1, warmup))
    if schedule == "constant":
        return peak
    turn = math.pi * step / max(1, steps - 1)
    return FINAL_LR * peak + (1 - FINAL_LR) * peak * (1 + math.cos(turn)) / 2


def add_losses(sums: Tensor, model, batch: Batch, micro_batch: int, scale=None, stop=lambda: 0) -> bool:
    """sums (sources, 2) += (sum of losses, number of targets) of each source, micro_batch rows at a time.
    With a scale, scale * (gradient of the sum of losses) is added to the parameters' gradients.
    False if stop() said so before the last micro-batch."""
    parts = (x.to(sums.device).split(micro_batch) for x in batch)
    for tokens, targets, doc_start, source in zip(*parts, strict=True):
        if stop():
            return False
        total, nll = model(tokens, targets, doc_start, reduction="sum")  # (), (b, T)
        if scale is not None:
            (total * scale).backward()
        rows = torch.stack((nll.to(sums.dtype).sum(1), (targets >= 0).to(sums.dtype).sum(1)), dim=1)  # (b, 2)
        sums.index_add_(0, source, rows)
    return True


def train_step(model, optimizer, batch: Batch, names: tuple, micro_batch: int, world: World, stop) -> dict:
    """One update on this rank's rows of the batch → loss, gradient norm before clipping, loss of each source.
    If one of the first two is not finite the weights stay as they are, and the row says "skipped". {}: a
    signal came, stop() said so on every rank before the last micro-batch, and nothing has changed."""
    length = torch.arange(batch.tokens.shape[1]) - batch.doc_start + 1  # of a document, up to each token
    both = torch.stack(((batch.targets >= 0).sum(), (2 * length - 1).sum(), torch.tensor(length.numel())))
    count, squares, tokens = all_sum(both.to(world.device), world)  # of all ranks and micro-batches
    sums = torch.zeros(len(names), 2, dtype=world.wide, device=world.device)
    # FSDP2 averages gradients over the ranks; their sum is wanted
    if not add_losses(sums, model, batch, micro_batch, world.size / count, stop):
        optimizer.zero_grad()
        return {}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    norm = (norm.full_tensor() if world.size > 1 else norm).item()
    loss = (all_sum(sums, world)[:, 0].sum() / count).item()
    row = {"loss": loss, "grad_norm": norm, "document_length": (squares / tokens).item()}
    if math.isfinite(loss + norm):  # sums over all ranks, so all agree
        optimizer.step()
    else:
        row["skipped"] = 1
    optimizer.zero_grad()
    of_sources = zip(names, sums.tolist(), strict=True)
    return row | {f"loss/{name}": total / n for name, (total, n) in of_sources if n}


@torch.no_grad()
def validate(model, loader: Loader, mixture: dict, micro_batch: int, world: World, token_bytes, stop) -> dict:
    """On held-out text of each source: loss in nats per token and in bits per byte, and their means, weighted
    like the mixture; {} if stop() said so. token_bytes (vocab,): how many bytes each token stands for."""
    sums = torch.zeros(len(mixture), 3, dtype=world.wide, device=world.device)  # nats, tokens, bytes
    for name, batch in loader.validation(EVAL_BATCHES, world.rank, world.size):
        if not add_losses(sums[:, :2], model, batch, micro_batch, stop=stop):
            return {}
        sums[list(mixture).index(name), 2] += token_bytes[batch.targets[batch.targets >= 0]].sum()
    row = {"val_loss": 0.0, "bits_per_byte": 0.0}
    sums = all_sum(sums, world).tolist()
    for (name, weight), (nats, tokens, size) in zip(mixture.items(), sums, strict=True):
        row[f"val_loss/{name}"] = nats / max(tokens, 1)
        row[f"bits_per_byte/{name}"] = nats / math.log(2) / max(size, 1)
        for key in ("val_loss", "bits_per_byte"):
            row[key] += weight * row[f"{key}/{name}"]
    return row


# ---- A stage -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What decides a stage's result, saved as its config.json. A folder with other settings is refused."""
    stage: str
    preset: str
    starts_from: str  # "random", a stage, or what --init or --from named
    steps: int
    lr: float
    warmup: int
    batch: int  # sequences per step, over all ranks
    seq_len: int
    dtype: str
    seed: int
    mixture: dict[str, float]
    tokenizer: str  # hash
    data: str  # hash of what its index says of the mixture's sources: checksums of the shards
    model: dict  # LlamaConfig


def stages_to_run(args) -> list[str]:
    """The stage asked for and, before it, those that it stands on and that are not finished."""
    stages = [args.branch]
    if args.start or files.latest_checkpoint(folder_of(args.branch, args)):
        return stages  # what it started from is named, or does not matter any more
    while (below := RECIPE[stages[0]].stands_on) and not is_finished(os.path.join(args.out, below)):
        if below == "base" and args.init:
            break
        if not RUNS[args.preset]["steps"][below]:
            raise ValueError(f"--preset {args.preset} needs --init DIR, the Hugging Face Llama to start from")
        stages.insert(0, below)
    if len(stages) > 1:
        files.print0(f"[{args.branch}] stands on stages that are not there yet: running {', '.join(stages)}")
    return stages


def run_stage(stage: str, args, world: World) -> None:
    """Train a stage to its end, from where its folder stands. A signal: save and SystemExit(128 + signal)."""
    stage_dir, data_dir = folder_of(stage, args), on_rank0(lambda: open_data(args))
    name = os.path.basename(stage_dir)
    settings, source = on_rank0(lambda: resolve_settings(stage, args, data_dir, world))
    saved = on_rank0(lambda: open_folder(stage_dir, asdict(settings)))  # its newest checkpoint, or None
    meta = files.read_json(f"{saved}/meta.json") if saved else {}
    start, skips = meta.get("step", 0), meta.get("skipped", 0)
    late = on_rank0(lambda: unevaluated(stage_dir, start, settings.steps, args.eval_every))
    if start >= settings.steps and not late:
        return files.print0(f"[{name}] is finished: {saved}")
    loader = Loader(data_dir, settings.mixture, args.seq_len, args.batch, args.seed + RECIPE[stage].data_seed)
    again = check_memory(LlamaConfig(**settings.model), args, settings.dtype, world)
    model, optimizer = build_model(settings, saved or source, args, world, again)
    tok, at = tokenizer.load(data_dir), start  # at: the step that was saved last
    evaluate = partial(validate, model, loader, settings.mixture, args.micro_batch, world, token_bytes(tok))
    log = MetricsLog(stage_dir, start, args.tensorboard, evaluate(lambda: 0) if late else {})
    speed, meta = Speed(settings, world), {"stage": stage, "origin": meta.get("origin", source)}
    announce(name, start, source, settings, model.config, again, args, world)
    files.print0(f"[{name}] epochs by the end: {in_words(loader.epochs(settings.steps), '.2g')}")

    def save(step: int) -> str:
        said = meta | {"skipped": skips, "settings": asdict(settings)}
        return save_checkpoint(stage_dir, step, model, optimizer, tok, said, args.keep_every)

    with Interrupt(name, world) as interrupt:
        for step in range(start + 1, settings.steps + 1):
            interrupt.step, last = step, step == settings.steps
            lr = learning_rate(stage, step - 1, settings.steps, settings.lr, settings.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with speed:
                batch, stop = loader.batch(step - 1, world.rank, world.size), interrupt.agreed
                row = train_step(model, optimizer, batch, loader.names, args.micro_batch, world, stop)
            if not row:  # dropped, so that what is done is saved before whoever sent the signal kills
                interrupt.leave(step - 1, save(step - 1) if step - 1 > at else saved)
            row = {"step": step, "lr": lr} | row
            if last or step % args.eval_every == 0:  # if a signal cuts it short: at the next start
                row |= evaluate(interrupt.agreed)
            signum = interrupt.agreed()
            if last:
                row |= {f"share/{x}": n / (step * args.batch) for x, n in loader.seen(step).items()}
                row |= {f"epochs/{x}": n for x, n in loader.epochs(step).items()}
            row |= speed.row(row["document_length"])
            log.write(row)
            if args.compile and speed.steps == 1 and speed.first > speed.total:
                files.print0(f"[{name}] compiling took {speed.first - speed.total:.0f} s of the first step")
            values = f"loss {row['loss']}, gradient norm {row['grad_norm']}"
            skips = count_skips("skipped" in row, skips, step, name, values)
            if last or signum or step == start + 1 or step % args.log_every == 0:
                files.print0(f"[{name}] {log_line(row, settings, speed)}")
            if last or signum or step % args.save_every == 0:
                saved, at = save(step), step
            if signum:
                interrupt.leave(step, saved)
        if signum := interrupt.agreed():  # it came during the last save
            raise SystemExit(128 + signum)
    if start >= settings.steps:
        return files.print0(f"[{name}] is finished, and evaluated now: {saved}")
    seen = in_words({key[6:]: value for key, value in row.items() if key.startswith("share/")}, ".1%")
    files.print0(f"[{name}] done: {saved}; sequences seen: {seen}")


# ---- Below: what a stage needs, then what is shared with rl.py and verify.py -------------------------------


def announce(name, start, source, settings: Settings, config: LlamaConfig, again: int, args, world) -> None:
    """Say what begins, or goes on after step `start`."""
    begin = f"goes on after step {start}" if start else f"starts from {settings.starts_from}"
    begin += f" ({source})" if source not in (None, settings.starts_from) else ""
    work = f"{config.num_params() / 1e6:.1f}M parameters, {settings.steps} steps of {args.batch} x"
    where = f"{settings.dtype} on {world.size} x {world.device.type}{', compiled' if args.compile else ''}"
    where += f", {again} of {config.num_layers} blocks computed twice" if again else ""
    files.print0(f"[{name}] {begin}: {work} {args.seq_len} tokens, {where}")


def folder_of(stage: str, args) -> str:
    """RUN/STAGE; of the stage that --branch names RUN/NAME if there is a --name."""
    return os.path.join(args.out, args.name if args.name and stage == args.branch else stage)


def is_finished(stage_dir: str) -> bool:
    if (path := files.latest_checkpoint(stage_dir)) is None:
        return False
    step, steps = files.read_json(f"{path}/meta.json")["step"], read_settings(stage_dir)["steps"]
    return step >= steps and not unevaluated(stage_dir, step, steps, steps)


def read_settings(stage_dir: str) -> dict | None:
    """A folder's config.json, None if there is none. What a crash took is in the newest checkpoint too."""
    try:
        found, why = files.read_json(os.path.join(stage_dir, "config.json"), missing_ok=True), ""
    except ValueError as error:
        found, why = None, str(error)
    if found is None and (saved := files.latest_checkpoint(stage_dir)):
        found = files.read_json(os.path.join(saved, "meta.json")).get("settings")
        why = "" if found else why or f"{stage_dir} has checkpoints of an older version and no config.json"
    if why:
        raise ValueError(f"{why}: delete the folder, or use another --out")
    return found


def unevaluated(stage_dir: str, step: int, steps: int, eval_every: int, name: str = "val_loss") -> bool:
    """Was the evaluation that is due after this step cut short?"""
    rows = read_metrics(os.path.join(stage_dir, "metrics.jsonl"))
    row = next((row for row in rows if row["step"] == step), None)
    return row is not None and (step >= steps or step % eval_every == 0) and name not in row


def open_data(args) -> str:
    """The folder of prepared shards; the tiny preset's are generated now if they are not there."""
    run, folder = RUNS[args.preset], args.data or os.path.join(args.out, "data")
    if args.start and not os.path.exists(folder):  # that of the run it goes on from
        source = files.find_checkpoint(goes_on_from(args.branch, args))
        folder = os.path.join(os.path.dirname(stage_of(source)), "data")
    index = shards.read_index(folder)
    if args.data:
        if not index:
            how = f"python -m data.prepare --data {folder} --out {args.out}/data --seq-len {args.seq_len}"
            raise ValueError(f"--data {folder} has no index.json. To make shards of public files: {how}")
        return folder
    if "tokens" not in run:
        raise ValueError(f"--preset {args.preset} needs --data DIR, a folder made by python -m data.prepare")
    if args.init:  # a wrong one is said before text is made
        files.read_json(f"{args.init}/config.json")
    if not index:
        files.print0(f"[data] generating text and training a tokenizer on it: {folder}")
    own = RECIPE[args.branch].mixture or recipes.STAGES["tiny"].get(args.branch, ())
    wanted = {*resolve_mixture(args.mix, "tiny"), *own}
    there = index["sources"] if index else {}  # among them perhaps what data.prepare --add added
    valid = recipes.KINDS["tiny"] | there
    if unknown := sorted(wanted - valid.keys()):
        raise ValueError(f"no source {unknown[0]} here (valid: {', '.join(valid)})")
    wanted |= {*there}
    extra = {name: EXTRA_TOKENS[name] for name in sorted(wanted & EXTRA_TOKENS.keys())}
    prepare.prepare_synth(folder, run["vocab"], args.seq_len, run["tokens"] | extra, args.seed)
    return folder


def resolve_mixture(mix: dict | str | None, corpus: str) -> dict[str, float]:
    """What --mix says: weights, or the name of a controlled mixture in recipes.py; {} if it says nothing."""
    named = recipes.CONTROLLED.get(corpus, {})
    if isinstance(mix, str) and mix not in named:
        valid = ", ".join(named) or "none"
        raise ValueError(f"no mixture {mix!r} for this data (valid: {valid}; or source=share,source=share)")
    return named[mix] if isinstance(mix, str) else mix or {}


def mixture_of(stage: str, args, data_dir: str) -> dict[str, float]:
    """A stage's shares of the sources: its corpus's, or --mix, which belongs to the stage of --branch."""
    corpus = files.read_json(os.path.join(data_dir, "index.json"))["settings"]["corpus"]
    mixtures = recipes.STAGES.get(corpus, {})
    if stage == args.branch and args.mix:
        return resolve_mixture(args.mix, corpus)
    if mixture := RECIPE[stage].mixture:
        return mixture
    if stage not in mixtures:
        have = f"mixtures for {', '.join(mixtures)}" if mixtures else "no mixtures at all"
        raise ValueError(f"stage {stage} needs --mix source=share,…: the data in {data_dir} has {have}")
    return mixtures[stage]


def check_mixture(args) -> None:
    """ValueError for what --mix asks in vain, before the stages that the branch stands on are trained."""
    data_dir = open_data(args)
    Loader(data_dir, mixture_of(args.branch, args, data_dir), args.seq_len, args.batch, args.seed)


def goes_on_from(stage: str, args) -> str | None:
    """The folder, perhaps with @STEP, of the stage that this one goes on from: --from, or its own run's.
    None: there is none, it starts from --init or from random weights."""
    name = RECIPE[stage].stands_on
    if args.start and stage == args.branch:
        run, step = re.fullmatch(r"(.*?)(@\d+)?", args.start).groups("")
        return f"{run}/{name}{step}" if os.path.isdir(f"{run}/{name}") else args.start
    return None if name is None or (args.init and name == "base") else os.path.join(args.out, name)


def stage_of(checkpoint: str) -> str:
    """RUN/STAGE/checkpoints/step_000123 → RUN/STAGE. ValueError for what is no checkpoint of a stage."""
    if not os.path.isdir(os.path.join(checkpoint, "state")):
        raise ValueError(f"--from {checkpoint} has no optimizer state: foreign weights are given by --init")
    return os.path.dirname(os.path.dirname(os.path.abspath(checkpoint)))


def resolve_settings(stage: str, args, data_dir: str, world: World) -> tuple[Settings, str | None]:
    """(the preset's table, changed by the flags; the checkpoint or --init that the stage starts from).
    --steps, --lr and --mix belong to the stage of --branch. Without --lr a stage begins at the rate that the
    one below ended with."""
    if world.size % args.replicate:
        raise ValueError(f"--replicate {args.replicate} does not divide {world.size} ranks")
    run, named, folder, before = RUNS[args.preset], stage == args.branch, folder_of(stage, args), {}
    own = read_settings(folder) if files.latest_checkpoint(folder) else None
    source, where = None, goes_on_from(stage, args)
    if where and not own:
        source = files.find_checkpoint(where)
        before = read_settings(stage_of(source)) or {}
        if "starts_from" not in before:
            raise ValueError(f"{stage_of(source)}/config.json is no stage's: RL's weights go by --init")
        if args.init and before["starts_from"] != args.init:
            raise ValueError(f"{where} started from {before['starts_from']}, not from --init {args.init}")
    tok, mixture = tokenizer.load(data_dir), mixture_of(stage, args, data_dir)
    config = model_shape(args, (own or before or {}).get("model"), tok.vocab_size, where is None)
    if config.vocab_size < tok.vocab_size:  # more is padding, as Qwen's matrices have it
        raise ValueError(f"{data_dir}'s tokenizer has {tok.vocab_size} ids, this model {config.vocab_size}")
    start = args.start if named and args.start else RECIPE[stage].stands_on or "random"
    if where is None and RECIPE[stage].stands_on:
        start = source = args.init
    words = tokenizer.find(source) if source and not own else None  # its own are compared with the settings
    if words and not tokenizer.load(words).agrees(tok):
        how = f"prepare the data again with --tokenizer {words}"
        raise ValueError(f"{data_dir} was prepared with another tokenizer than {source}'s: {how}")
    rate = own["lr"] if own else ended_at(before, source) if before else run["lr"][stage]
    steps = (args.steps if named else own and own["steps"]) or run["steps"][stage]
    if own and RECIPE[stage].schedule != "cosine" and steps < own["steps"]:
        files.print0(f"[{stage}] was begun with {own['steps']} steps, which fewer do not shorten")
        steps = own["steps"]
    return Settings(
        stage=stage, preset=args.preset, starts_from=start, mixture=mixture, tokenizer=tok.hash,
        steps=steps, lr=named and args.lr or rate, warmup=run["warmup"] if stage == "base" else 0,
        batch=args.batch, seq_len=args.seq_len, seed=args.seed,
        dtype=fastest_dtype(world.device) if args.dtype == "auto" else args.dtype,
        data=shards.contents(data_dir, mixture),
        model=asdict(replace(config, max_position=max(config.max_position, args.seq_len))),
    ), source


def ended_at(before: dict, checkpoint: str) -> float:
    """The learning rate at a checkpoint of a stage with these settings; a warm-up counts as over."""
    step = files.read_json(os.path.join(checkpoint, "meta.json"))["step"]
    return learning_rate(before["stage"], step - 1, before["steps"], before["lr"])


def model_shape(args, found: dict | None, vocab_size: int, from_init: bool) -> LlamaConfig:
    """The preset's shape, with the vocabulary of what it starts from (--init, or `found`, the shape of the
    stage below), or of the data. A preset of the paper's takes the whole shape of what it starts from."""
    config = PRESETS[args.preset]
    if args.init and from_init and not found:
        found = config_from_hf(files.read_json(os.path.join(args.init, "config.json")))
    else:
        found = LlamaConfig(**found) if found else None
    if RUNS[args.preset]["steps"]["base"]:
        found = found or replace(config, vocab_size=vocab_size)
        return replace(config, vocab_size=found.vocab_size, max_position=found.max_position)
    found = found or config
    if changed := files.differences(asdict(config), asdict(found)):
        files.print0_once(f"the schedule of --preset {args.preset}, the model's own shape ({changed})")
    return found


def build_model(settings: Settings, source: str | None, args, world: World, again=0):
    """(model, optimizer): from the checkpoint `source`, the stage's own or one below it, from --init, or
    random."""
    config, from_init = LlamaConfig(**settings.model), source is not None and source == args.init
    if from_init:
        check_shape(source, config)
    model = empty_model(config, args, settings.dtype, world, args.replicate, again=again)
    if from_init:
        load_pretrained(model, source)
    elif not source:
        model.init_weights(settings.seed)
    optimizer = make_optimizer(model, settings.lr)
    if source and not from_init:
        load_checkpoint(source, model, optimizer)
    return model, optimizer


def empty_model(config: LlamaConfig, args, dtype: str, world, replicas=1, dynamic=None, again=None) -> Llama:
    """A sharded model whose weights are still to be set: no rank holds a whole one, not even for a moment."""
    again = args.activation_checkpointing if again is None else again
    with torch.device("meta"):
        model = Llama(config)
    model = add_options(model, args.compile, again, dynamic)
    model = apply_fsdp(model, world, DTYPES[dtype], replicas).to_empty(device=world.device)
    model.init_rope()
    return model


def token_bytes(tok: Tokenizer) -> Tensor:
    """(vocab,) how many bytes of text each token stands for; special ones stand for none."""
    sizes = torch.zeros(tok.vocab_size, dtype=torch.int64)
    sizes[list(tok.ranks.values())] = torch.tensor([len(token) for token in tok.ranks])
    return sizes


def count_skips(skipped: bool, before: int, step: int, name: str, values: str) -> int:
    """Steps in a row, this one included, whose loss or gradient was not finite; ValueError at MAX_SKIPS."""
    if not skipped:
        return 0
    files.print0(f"[{name}] step {step} left out: {values}")
    if before + 1 == MAX_SKIPS:
        what = f"{MAX_SKIPS} steps in a row without a finite loss and gradient, up to step {step}"
        raise ValueError(f"{what}: try a lower --lr, or --dtype fp32; the last checkpoint is intact")
    return before + 1


# ---- Processes ---------------------------------------------------------------------------------------------


def setup(threads: int | None = None) -> World:
    """Join the other processes if torchrun started this one, choose the device, make sums repeatable."""
    if threads:
        torch.set_num_threads(threads)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):  # read when CUDA starts
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # else rollouts and updates cut it up
    device, ranks = pick_device(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda := device.type == "cuda":
        if ranks > (cards := torch.cuda.device_count()):
            raise ValueError(f"{ranks} ranks on a machine with {cards} GPUs: --nproc_per_node={cards}")
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a memset for every torch.empty
    elif mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc: keep what a step frees for the next
        for parameter, most in ((-1, 1 << 30), (-3, 32 << 20)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, most)
    if "RANK" not in os.environ:
        return World(device=device)
    if sys.platform == "linux":  # if torchrun is killed, its ranks would train on: let them save and end
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)
    return World(dist.get_rank(), dist.get_world_size(), device)


def all_sum(x: Tensor, world: World) -> Tensor:
    """x, in place, summed over all ranks."""
    if world.size > 1:
        dist.all_reduce(x)
    return x


def on_rank0(work: Callable):
    """work() on rank 0 while the others wait; all get its result, or its ValueError or OSError."""
    if not dist.is_initialized():
        return work()
    outcome: list = [None, None]
    if files.is_rank0():
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


LOCK_WAIT = 60  # seconds: the ranks of a run that was killed may still be saving


@contextlib.contextmanager
def lock_for_all(folder: str):
    """files.run_lock() for all ranks: rank 0 holds it. ValueError if the nodes do not see one folder: each
    would save its own part of a checkpoint, and nobody could go on from that."""
    with contextlib.ExitStack() as held:
        on_rank0(lambda: held.enter_context(files.run_lock(folder, LOCK_WAIT)))
        if dist.is_initialized():
            check_shared(folder)
        yield


def check_shared(folder: str) -> None:
    path = os.path.join(folder, f"seen.{on_rank0(time.time_ns)}")
    on_rank0(lambda: files.write_text(path, ""))
    seen, ranks = torch.tensor(int(os.path.exists(path))), dist.get_world_size()
    dist.all_reduce(seen)
    on_rank0(lambda: os.remove(path))
    if seen < ranks:
        what = f"{ranks - int(seen)} of {ranks} ranks have another {folder} than rank 0"
        raise ValueError(f"{what}: give an --out on a file system that all nodes share")


@contextlib.contextmanager
def clean_exit():
    """Around a program that torchrun may have started: one error message, no rank that waits for a dead one.

    Several processes leave by os._exit: FSDP2 keeps gloo's threads alive after the group is destroyed, and
    one that still holds a tensor aborts the process at its end (4 of 56 runs; PyTorch's #179291)."""
    code = 0
    try:
        yield
    except SystemExit as stop:
        if not dist.is_initialized():
            raise
        code = stop.code
    except (ValueError, OSError):  # bad input, which all ranks meet: rank 0 reports it, torchrun ends all
        if not files.is_rank0():
            time.sleep(3)  # still here: only this rank has failed, so it must report
        raise
    except Exception as error:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        where = f"rank {dist.get_rank()} failed in {getattr(error, 'where', 'its start')}"
        print(f"{where}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: the others wait for this rank, and torchrun ends them
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)


class Interrupt:
    """Around a loop of steps. A first Ctrl-C and SIGTERM are only noted: ask agreed() where the loop can be
    left. An error that leaves the loop carries `where`, the step that it happened in."""

    def __init__(self, name: str, world: World):
        self.name, self.world, self.step, self.signum, self.when = name, world, 0, 0, 0.0

    def __enter__(self):
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, trace) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        if error is not None:
            error.where = f"step {self.step} of {self.name}"

    def _note(self, signum, frame) -> None:
        again = signum == signal.SIGINT and self.signum
        if again and time.monotonic() - self.when > 1:  # torchrun passes one Ctrl-C on twice, at once
            raise KeyboardInterrupt
        self.signum, self.when = signum, time.monotonic()

    def agreed(self) -> int:
        """The signal that any rank got, or 0: the same answer on every rank."""
        if self.world.size == 1:
            return self.signum
        signum = torch.tensor(self.signum)  # on the CPU, by gloo: nobody waits for what a GPU has queued
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)

    def leave(self, step: int, saved: str | None) -> NoReturn:
        """SystemExit with the code of the signal, 143 for SIGTERM: the same command goes on after `step`."""
        what = f"saved {saved}" if saved else "nothing to save"
        files.print0(f"[{self.name}] stopped after step {step}: {what}, the same command goes on")
        raise SystemExit(128 + self.agreed())


# ---- Sharding, compilation, precision ----------------------------------------------------------------------


def apply_fsdp(model: Llama, world: World, dtype: torch.dtype, replicas: int = 1) -> Llama:
    """Place the model (fp32) on the device, sharded over the ranks; activations run in `dtype`. A model on
    the meta device stays there, sharded: to_empty() allocates each rank's part.

    replicas: as many whole copies, each sharded over size / replicas ranks (HSDP). With one copy per node,
    weights are gathered inside a node, where links are fast, and only gradients cross between nodes."""
    model.compute_dtype = dtype
    if world.size == 1:
        return model if model.embed.weight.is_meta else model.to(world.device)
    # Reductions in fp32: bf16 would round a sum over many ranks. Inputs (rotary tables) stay as they are.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shape, names = (world.size,), None
    if replicas > 1:
        shape, names = (replicas, world.size // replicas), ("replicate", "shard")
    mesh = dist.init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)  # the root group: embedding, output, last norm


def add_options(model: Llama, compile: bool, checkpointing: bool | int, dynamic=None) -> Llama:
    """Per block, before sharding: compile (dynamic: for batches of all shapes); recompute activations in the
    backward pass, those of the first `checkpointing` blocks (True: of all), which it comes to last."""
    again = len(model.blocks) if checkpointing is True else checkpointing
    for i, block in enumerate(model.blocks):
        if compile:
            block.forward = torch.compile(block.forward, dynamic=dynamic)
        if i < again:  # around what is compiled: the other way round nothing would be (torch 2.13)
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    return model


def fastest_dtype(device: torch.device) -> str:
    """bf16 on a GPU, and on CPUs that multiply it natively: training was 1.5 to 2 times as fast there."""
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = has_bf16(device)
    return "bf16" if native else "fp32"


# ---- Checkpoints: a Hugging Face folder, meta.json, state/ -------------------------------------------------

KEEP = 2  # checkpoints of a stage
WHOLE = 500_000_000  # parameters of the largest model whose checkpoints have model.safetensors too
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # dcp, in one process
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # returns a view; nothing is written to it


def open_folder(folder: str, settings: dict) -> str | None:
    """Make a stage's or RL run's folder → its newest checkpoint, or None. ValueError for other settings, but
    a stage whose rate does not fall may be made longer: its past does not depend on its end."""
    path, saved = os.path.join(folder, "config.json"), files.latest_checkpoint(folder)
    if saved and (old := read_settings(folder)):
        longer = "stage" in settings and RECIPE[settings["stage"]].schedule != "cosine"
        files.check_same_settings(folder, old | {"steps": settings["steps"]} if longer else old, settings)
    os.makedirs(folder, exist_ok=True)
    files.write_json(path, settings)
    return saved


def save_checkpoint(
    stage_dir: str, step: int, model: Llama, optimizer, tok: Tokenizer, meta: dict, every=None, best=0
) -> str:
    """Write a checkpoint aside, rename it, then let `latest` name it (for people) → its path. All but the
    last KEEP, every `every`-th and the step `best` are deleted. Called by every rank. OSError: the earlier
    ones are untouched.

    The folder is Hugging Face's; `state` in it holds weights and optimizer in shards that any number of ranks
    can load. Up to WHOLE parameters, model.safetensors holds the weights once more, in fp32: see export()."""
    folder = os.path.join(stage_dir, "checkpoints")
    final, aside = os.path.join(folder, f"step_{step:06d}"), os.path.join(folder, "unfinished")
    try:
        on_rank0(lambda: (shutil.rmtree(aside, ignore_errors=True), os.makedirs(aside)))
        weights, moments = states.get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=os.path.join(aside, "state"))
        hash_state(aside)
        whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered on rank 0
        small = model.config.num_params() <= WHOLE
        full = states.get_model_state_dict(model, options=whole) if small else {}
        meta = meta | {"step": step, "tokenizer": tok.hash}
        on_rank0(lambda: _publish(aside, final, model, full, tok, meta, every, best))
    except (OSError, dcp.CheckpointException) as error:
        free = shutil.disk_usage(stage_dir).free >> 20
        shutil.rmtree(aside, ignore_errors=True)  # it may be what fills the disk
        reason = error if isinstance(error, OSError) else next(iter(error.failures.values()))[0]
        what = f"{final} could not be written ({reason}; {free} MiB free)"
        raise OSError(f"{what}; those before it are intact") from None
    return final


def hash_state(checkpoint: str) -> None:
    """Tell rank 0 the checksums of a checkpoint's state/ (files.KNOWN). Called by every rank: each reads what
    it wrote or will load, at once. What cannot be read is left to rank 0, which reports it."""
    if not dist.is_initialized():
        return  # one process reads each file once anyway
    found, rank, size = {}, dist.get_rank(), dist.get_world_size()
    for path in glob.glob(os.path.join(glob.escape(checkpoint), "state", "__*_*.distcp")):
        if int(os.path.basename(path).split("_")[2]) % size == rank:
            with contextlib.suppress(OSError):
                found[path, os.stat(path).st_mtime_ns] = files.file_hash(path)
    dist.all_gather_object(parts := [{}] * size, found)
    files.KNOWN.update(item for part in parts for item in part.items())


def hash_newest(run_dir: str) -> None:
    """hash_state() of a run's newest checkpoint, if it has one: before rank 0 alone would read it whole."""
    for newest in on_rank0(lambda: files.checkpoints(run_dir)[:1]):
        hash_state(newest)


def _publish(aside: str, final: str, model, weights: dict, tok: Tokenizer, meta: dict, every, best) -> None:
    parts = dcp.FileSystemReader(os.path.join(aside, "state")).read_metadata().storage_data.values()
    for name in sorted({part.relative_path for part in parts}):
        if not os.path.exists(os.path.join(aside, "state", name)):
            raise OSError(f"{name} is not there: give an --out on a file system that all nodes share")
    save_model(model, aside, weights, tok)
    paths = sorted(os.path.join(root, name) for root, _, names in os.walk(aside) for name in names)
    names = [os.path.relpath(path, aside) for path in paths]
    sizes, sums = map(os.path.getsize, paths), files.file_hashes(paths)
    meta |= {"files": dict(zip(names, sizes)), "sha256": dict(zip(names, sums))}
    files.write_json(os.path.join(aside, "meta.json"), meta)
    files.sync(aside)
    if os.path.lexists(final):  # damaged
        files.remove(final)
    os.rename(aside, final)
    folder, name = os.path.split(final)
    files.write_text(os.path.join(folder, "latest"), name)
    if best:
        files.write_text(os.path.join(folder, "best"), f"step_{best:06d}")
    steps = {path: int(path.rsplit("_", 1)[1]) for path in files.checkpoints(os.path.dirname(folder))}
    for later in [path for path in steps if steps[path] > meta["step"]]:  # damaged: this run began before it
        files.remove(later)
        del steps[later]
    for old in list(steps)[KEEP:]:
        if steps[old] != best and (not every or steps[old] % every):
            files.remove(old)


def save_model(model: Llama, *args, **options) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(*args, **options)
    except SafetensorError as error:  # how that library reports a full disk
        raise OSError(str(error)) from None


def export(source: str, out: str, dtype: torch.dtype = torch.bfloat16, **options) -> None:
    """Write the weights of a checkpoint, a run or a Hugging Face folder as a folder for other programs, in
    files below 5 GB (options: limit=BYTES). Nothing is written over: `out` must be empty, or new."""
    from sample import load_model  # which loads nothing that was damaged, or has another tokenizer

    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"--export {out} is not an empty folder: give a new one")
    path, aside = files.find_checkpoint(source), f"{os.path.normpath(out)}.unfinished"
    model, tok = load_model(path)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_model(model, aside, tok=tok, dtype=dtype, **options)
        os.makedirs(out, exist_ok=True)
        os.rmdir(out)
        os.rename(aside, out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{out} could not be written: {error}") from None
    size = sum(os.path.getsize(os.path.join(out, name)) for name in os.listdir(out)) / 1e9
    files.print0(f"exported {path} as {str(dtype).removeprefix('torch.')}: {out}, {size:.2f} GB")


def load_checkpoint(path: str, model: Llama, optimizer: torch.optim.Optimizer) -> dict:
    """Weights and optimizer state, in place, of a checkpoint written by any number of ranks → its meta.json.
    Learning rate, betas and weight decay stay the optimizer's own: they belong to the stage."""
    check_shape(path, model.config)
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer)))
    load_state(path, state)
    weights, moments, model.generation = state["model"], state["optimizer"], read_generation(path)
    states.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
    return files.read_json(os.path.join(path, "meta.json"))


def check_shape(path: str, config: LlamaConfig) -> None:
    """ValueError, naming the differences, if the checkpoint at path is not of this shape."""
    found = asdict(config_from_hf(files.read_json(os.path.join(path, "config.json"))))
    found["max_position"] = config.max_position  # says what a model was made for, changes nothing in it
    if changed := files.differences(found, asdict(config)):
        raise ValueError(f"{path} is of another shape than this run's model: {changed}")


# ---- Metrics and speed -------------------------------------------------------------------------------------


def read_metrics(path: str) -> list[dict]:
    """The whole rows of a metrics.jsonl. A kill may have cut the last, which is later than any checkpoint; a
    node that crashed may have left zeros and halves of lines: these are counted, and left out."""
    rows, bad = [], 0
    with open(path, "rb") if os.path.exists(path) else contextlib.nullcontext(()) as lines:
        for line in lines:
            try:
                row = json.loads(line)
                rows.append({"step": int(row["step"])} | row)
            except (ValueError, KeyError, TypeError):
                bad += line.endswith(b"\n")
    if bad:
        files.print0_once(f"{path}: {bad} damaged rows left out")
    return rows


class MetricsLog:
    """metrics.jsonl, one row per step. Opening it at a checkpoint's step drops the rows after that step.
    tensorboard: the rows go there too; late: what that step's row lacks."""

    def __init__(self, stage_dir: str, step: int, tensorboard: bool = False, late: dict | None = None):
        self.file = self.board = None
        if not files.is_rank0():
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
            self.board = SummaryWriter(os.path.join(stage_dir, "tensorboard"), purge_step=step + 1)
        path = os.path.join(stage_dir, "metrics.jsonl")
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        if late and rows:
            rows[-1] |= late
        files.write_jsonl(path, rows)
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115, open as long as the run

    def write(self, row: dict) -> None:
        if self.file:  # JSON knows neither NaN nor infinity
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self.file.write(json.dumps(row) + "\n")
        for key, value in row.items() if self.board else ():
            if isinstance(value, int | float) and key != "step":
                self.board.add_scalar(key, value, row["step"])


# Dense bf16 FLOP/s by the name that the driver gives. An unknown device gets no MFU rather than a wrong one.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}


def flops_per_token(config: LlamaConfig, length: float) -> float:
    """Forward and backward: 6 per weight that multiplies (Kaplan et al. 2020; the input embedding does not),
    and causal attention's two products, 6 x layers x width x length: of a sequence, as if it were one
    document, or of the documents, on average over the tokens (a document of n tokens has n^2 / 2 pairs)."""
    head = config.vocab_size * config.hidden_size
    weights = config.num_params() - (0 if config.tie_embeddings else head)
    return 6 * weights + 6 * config.num_layers * config.num_heads * config.head_dim * length


class Speed:
    """Times training steps only: `with speed: step`. The first (warm-up, compilation) gives no rate."""

    def __init__(self, settings: Settings, world: World):
        self.batch_tokens, self.total, self.steps = settings.batch * settings.seq_len, 0.0, -1
        self.first, self.seq_len, config = 0.0, settings.seq_len, LlamaConfig(**settings.model)
        self.weights = flops_per_token(config, 0)  # FLOPs of a token, but for attention
        self.attention = flops_per_token(config, 1) - self.weights  # and for each of a document's
        self.rate = None  # tokens per second of the last step
        self.begun, self.device = time.perf_counter(), world.device
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self.peak = PEAK_FLOPS.get(name, 0.0) * world.size if settings.dtype == "bf16" else 0.0

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *error):
        seconds = time.perf_counter() - self.start  # the step has read its loss, so a GPU has finished too
        self.steps, self.first = self.steps + 1, self.first or seconds
        if self.steps:
            self.total, self.rate = self.total + seconds, self.batch_tokens / seconds

    def row(self, document_length: float) -> dict:
        row = {"tokens_per_s": self.rate}
        if self.rate and self.peak:
            for key, length in (("mfu", self.seq_len), ("mfu_documents", document_length)):
                row[key] = self.rate * (self.weights + self.attention * length) / self.peak
        return row


def log_line(row: dict, settings: Settings, speed: Speed) -> str:
    step, steps = row["step"], settings.steps
    text = f"step {step:{len(str(steps))}}/{steps}  loss {row['loss']:7.4f}"
    text += f"  lr {row['lr']:.2e}  grad {row['grad_norm']:7.3f}"
    if speed.rate:
        text += f"  {speed.rate:9,.0f} tok/s  eta {duration((steps - step) * speed.total / speed.steps)}"
        text += f"  mfu {row['mfu']:.1%} ({row['mfu_documents']:.1%} of documents)" if "mfu" in row else ""
    text += f"  {duration(time.perf_counter() - speed.begun)}  {peak_memory(speed.device) / 2**30:.1f} GiB"
    if "val_loss" in row:
        text += f"  val {row['val_loss']:.4f}, {row['bits_per_byte']:.4f} bits/byte"
    return text


def peak_memory(device: torch.device) -> float:
    """Bytes that this process has held at most, on its GPU or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_words(numbers: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {number:{form}}" for name, number in numbers.items())


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


# ---- The plan: size, time and memory on GPUs ---------------------------------------------------------------

PLAN_MFU, PLAN_DEVICE, PLAN_MEMORY = 0.4, "NVIDIA H200", 139 << 30  # what --plan counts on
PLAN_ROOM = 0.94  # of a card's memory may be planned: CUDA, NCCL and gaps between tensors take some too


def memory_plan(config: LlamaConfig, args, dtype: str, ranks: int, again: int | None = None) -> dict:
    """Bytes on one GPU by part, and at the peak: in the loss, or in the first, middle or last block of the
    backward pass. Gradients exist only as far as it has come, if no earlier micro-batch left them.
    again: so many blocks are recomputed (None: what --recompute and --activation-checkpointing say)."""
    again = fewest_blocks(config, args, dtype, ranks, math.inf) if again is None else again
    kept = config.num_layers - again
    size, params, hidden = DTYPES[dtype].itemsize, config.num_params(), config.hidden_size
    block = replace(config, num_layers=2).num_params() - replace(config, num_layers=1).num_params()
    rest = params - config.num_layers * block  # the embedding, the output projection
    tokens, share = min(args.micro_batch, -(-args.batch // ranks)) * args.seq_len, args.replicate / ranks
    inputs = tokens * 2 * size * hidden  # of a block
    # A block keeps: of two norms the sum and its output; attention's q, k, v, output and log-sum-exps;
    # SwiGLU's gate, its silu, up and their product
    heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = tokens * (size * (4 * hidden + heads + 4 * config.intermediate_size) + 8 + 4 * config.num_heads)
    if ranks > 1:  # gathered: the rest and two blocks at a time, a block's gradients as they are summed
        gathered = size * (rest + 2 * block) + (size + 4) * block
    else:  # copies in bf16, which the backward pass needs again
        gathered = size * (rest + min(kept + 1, config.num_layers) * block) * (dtype == "bf16")
    parts = {
        "parameters": 4 * params * share, "gradients": 4 * params * share, "optimizer": 8 * params * share,
        "weights to compute with": gathered,
        "activations": tokens * (4 + size) * hidden + kept * layer + again * inputs,  # the last norm first
        "logits": loss_memory(tokens, hidden, config.vocab_size, size),
    }
    grads, words = parts["gradients"], config.vocab_size * hidden
    accumulated = grads if tokens * ranks < args.batch * args.seq_len else 0
    inside_mlp = tokens * 4 * size * config.intermediate_size  # gradients of its four activations
    begin = max(parts["logits"] + accumulated, inside_mlp + accumulated, inside_mlp + 4 * share * words)
    later = max(grads, again * inputs + max(accumulated, grads * kept / config.num_layers))
    peak = max(parts["activations"] + begin, layer + inside_mlp + later)
    return parts | {"peak": parts["parameters"] + parts["optimizer"] + gathered + peak}


def fewest_blocks(config: LlamaConfig, args, dtype: str, ranks: int, memory: float) -> int:
    """How many blocks to recompute: what the flags say, else as few as leave PLAN_ROOM of `memory` bytes, of
    all that a card has: what is free at the moment would change results from one start to the next."""
    named = config.num_layers if args.activation_checkpointing else getattr(args, "recompute", 0)
    if named is not None:
        return min(named, config.num_layers)
    fits = lambda n: memory_plan(config, args, dtype, ranks, n)["peak"] <= PLAN_ROOM * memory  # noqa: E731
    return bisect.bisect_left(range(config.num_layers), True, key=fits)


def check_memory(config: LlamaConfig, args, dtype: str, world: World, flag="--micro-batch") -> int:
    """→ fewest_blocks(), the same on every rank, all of which call it. ValueError if a GPU does not have free
    what the plan says that a rank needs."""
    if cuda := world.device.type == "cuda":
        memory = torch.tensor(torch.cuda.mem_get_info(world.device))
        if world.size > 1:
            dist.all_reduce(memory, dist.ReduceOp.MIN)
    free, total = memory.tolist() if cuda else (math.inf, math.inf)
    again = fewest_blocks(config, args, dtype, world.size, total)
    if cuda and (plan := memory_plan(config, args, dtype, world.size, again))["peak"] > free:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan.items() if name != "peak")
        needs = f"a rank needs about {plan['peak'] / 2**30:.1f} GiB and has {free / 2**30:.1f} ({parts})"
        raise ValueError(f"{needs}: use a smaller {flag}, --activation-checkpointing, or more ranks")
    return again


def planned_epochs(args, steps: int) -> str:
    """How often a stage will go through each source, where the data is there already."""
    folder = args.data or os.path.join(args.out, "data")
    if not os.path.exists(os.path.join(folder, "index.json")):
        return "not known without prepared data (--data)"
    seed = args.seed + RECIPE[args.branch].data_seed
    loader = Loader(folder, mixture_of(args.branch, args, folder), args.seq_len, args.batch, seed)
    return in_words(loader.epochs(steps), ".2g")


def show_plan(args) -> None:
    """Print size, cost and memory of a stage on several numbers of GPUs."""
    found = files.read_json(f"{args.init}/config.json") if args.init else None
    config = config_from_hf(found) if found else PRESETS[args.preset]
    steps = args.steps or RUNS[args.preset]["steps"][args.branch]
    tokens, dtype = steps * args.batch * args.seq_len, "bf16" if args.dtype == "auto" else args.dtype
    flops = tokens * flops_per_token(config, args.seq_len)
    size = f"{config.num_params():,} parameters, {steps:,} steps, {tokens:,} tokens, {flops:.3e} FLOPs"
    print(f"{args.preset} {args.branch}: {size}")
    print(f"epochs: {planned_epochs(args, steps)}")
    print(f"GiB per GPU in {dtype}, {args.micro_batch} x {args.seq_len} tokens at once; "
          f"time at {PLAN_MFU:.0%} of the peak of {PLAN_DEVICE}s, which have {PLAN_MEMORY >> 30} GiB")
    rows = []
    for gpus in sorted({1, 8, 64, int(os.environ.get("WORLD_SIZE", "1"))}):
        if args.batch % gpus or gpus % args.replicate:
            continue
        again = fewest_blocks(config, args, dtype, gpus, PLAN_MEMORY)
        parts = memory_plan(config, args, dtype, gpus, again)
        twice = 1 + again / config.num_layers / 3  # a third of a block's work is its forward pass
        hours = twice * flops / (PLAN_MFU * PEAK_FLOPS[PLAN_DEVICE] * gpus) / 3600
        rows.append([f"{gpus}", f"{again}", *(f"{size / 2**30:.1f}" for size in parts.values())])
        rows[-1] += [f"{hours * 3600 / steps:.2f}", f"{hours:,.1f}", f"{hours * gpus:,.1f}"]
        rows[-1].append("" if parts["peak"] < PLAN_MEMORY else "does not fit")
    if not rows:
        raise ValueError(f"--batch {args.batch}, --replicate {args.replicate} fit none of 1, 8 and 64 GPUs")
    table = [["GPUs", "blocks recomputed", *parts, "s per step", "hours", "GPU-hours", ""], *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    print("\n".join(" | ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in table))


# ---- Command line ------------------------------------------------------------------------------------------

# Numbers, all above 0 (recompute: from 0 on): name → (type, default, help). "preset": the preset's value.
FLAGS = {
    "steps": (int, None, "steps of the stage that --branch names (default: the preset's)"),
    "lr": (float, None, "highest learning rate of the stage that --branch names (default: the preset's)"),
    "batch": (int, "preset", "sequences per step, over all ranks"),
    "micro_batch": (int, "preset", "sequences that a rank computes at once; fewer need less memory"),
    "seq_len": (int, "preset", "tokens per sequence; the data must be packed for it"),
    "replicate": (int, 1, "whole copies of the model, one per node for example (HSDP; default 1)"),
    "recompute": (int, None, "blocks computed twice, to save memory (default: as few as by the plan fit)"),
    "threads": (int, None, "CPU threads per process; equal results need an equal number"),
    "save_every": (int, "preset", "steps between checkpoints"),
    "keep_every": (int, None, "keep the checkpoint of every Nth step, beside the last two"),
    "eval_every": (int, "preset", "steps between evaluations; there is always one at the end"),
    "log_every": (int, "preset", "steps between printed lines; metrics.jsonl has every step"),
}


def mixture(text: str) -> dict[str, float] | str:
    """ "web=0.7,long_cot=0.3" → {"web": 0.7, "long_cot": 0.3}; a name is looked up when the data is known."""
    if re.fullmatch(r"\w+", text):
        return text
    try:
        parts = sorted(part.split("=") for part in text.split(","))  # one order: it decides that of the data
        weights = {name: float(weight) for name, weight in parts}
        if len(weights) < len(parts):
            raise ValueError("the weights name a source twice")
        block_counts(weights)
    except ValueError as error:
        reason = error if "weights" in str(error) else "write it as source=share,source=share"
        raise argparse.ArgumentTypeError(f"{text}: {reason}") from None
    return weights


def parse_args():
    p = files.ArgumentParser(description=__doc__)
    add = p.add_argument
    add("--branch", choices=RECIPE, help="stage to run; what it stands on runs first")
    add("--preset", default="tiny", choices=RUNS, help="sizes and schedule (default tiny)")
    add("--init", metavar="DIR", help="Hugging Face Llama to start from, in place of the base")
    add("--from", dest="start", metavar="DIR[@STEP]",
        help="stage of another run to go on from, weights and optimizer, perhaps at a step that was kept")
    add("--data", metavar="DIR", help="shards made by data.prepare; tiny generates its own")
    add("--out", metavar="DIR", help="run folder, with one folder per stage (default runs/PRESET)")
    add("--mix", type=mixture, metavar="A=X,B=Y", help="shares of its sources, or a controlled mixture")
    add("--name", type=files.plain_name, help="the stage's folder in --out (default: its branch)")
    add("--seed", type=int, default=0, help="seed of data, order and first weights (default 0)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="dtype of the activations")
    for name, (kind, _, text) in FLAGS.items():
        add("--" + name.replace("_", "-"), type=kind, metavar="N", help=text)
    how = "torch.compile each block (default: on a GPU; the first step takes a minute longer)"
    add("--compile", action=argparse.BooleanOptionalAction, help=how)
    add("--activation-checkpointing", action="store_true", help="--recompute for all blocks")
    add("--tensorboard", action="store_true", help="metrics to TensorBoard too, if it is installed")
    add("--plan", action="store_true", help="print size, cost and GPU memory of the stage")
    add("--export", metavar="DIR", help="write --from, or --branch, for other programs (bf16, or --dtype)")
    args = p.parse_args()
    if not (args.branch or args.export and args.start):
        raise ValueError(f"--branch is needed: one of {', '.join(RECIPE)} (or --from, for --export)")
    run = RUNS[args.preset]
    args.out = args.out or f"runs/{args.preset}"
    for name, (_, default, _) in FLAGS.items():
        value = getattr(args, name)
        if value is None:
            setattr(args, name, run[name] if default == "preset" else default)
        elif not value > 0 and not (name == "recompute" and value == 0):
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.name in RECIPE and args.name != args.branch:
        raise ValueError(f"--name {args.name} is a stage of its own: give another name")
    args.init, args.start = (path and os.path.realpath(path) for path in (args.init, args.start))
    if args.init and os.path.isdir(os.path.join(args.init, "checkpoints")):
        raise ValueError(f"--init {args.init} is a run: go on by --from, or name one of its checkpoints")
    if args.start and (args.init or args.branch == "base"):
        raise ValueError("--from goes on from a stage: not with --init, nor with --branch base")
    if args.branch == "base" and (args.init or not run["steps"]["base"]):
        raise ValueError("a base stage starts from random weights: with --init or this preset, take stable")
    return args


def main() -> None:
    with clean_exit():
        args = parse_args()
        if args.plan:
            return show_plan(args)
        if args.export:
            source = args.start or folder_of(args.branch, args)
            dtype = DTYPES.get(args.dtype, torch.bfloat16)
            return export(source, args.export, dtype)
        world = setup(args.threads)
        if args.compile is None:
            args.compile = has_bf16(world.device)
        hash_newest(folder_of(args.branch, args))
        stages = on_rank0(lambda: stages_to_run(args))
        on_rank0(lambda: check_mixture(args))
        for stage in stages:
            with lock_for_all(folder_of(stage, args)):
                run_stage(stage, args, world)


if __name__ == "__main__":
    files.run_cli(main)

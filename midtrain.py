"""Mid-training: Stable-then-Decay, stage by stage (OctoThinker, arXiv 2506.20512).

    base  ─→  stable  ─→  short | long | hybrid
    (ours)    constant    cosine down to 10 %, one branch a mixture
          ─→  controlled    cosine too, on the mixture that --mix names: what does one factor do?

    python midtrain.py --branch long                             # tiny, on any machine; the stages below it come first
    torchrun --nproc_per_node=8 midtrain.py --branch long        # the same on 8 GPUs (or processes, on a CPU)
    torchrun --nproc_per_node=8 midtrain.py --preset 1b --branch long --init Llama-3.2-1B --data DIR   # the paper's
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 midtrain.py …   # two nodes

What to know before reading:

1. A step is a pure function of (settings, step, weights, optimizer): the loader has no state and neither has the
   schedule. So resuming is loading a checkpoint; the same command does it, and goes on bit for bit.
2. The loss is the mean over the target tokens of the whole batch, whatever the ranks and micro-batches: targets are
   counted first. A mean of means would weigh a padded row as much as a full one.
3. Every stage goes on with the optimizer state of the stage that it stands on. There is no warm-up between stages, and
   with fresh Adam moments the first steps at full learning rate would be jumps.
4. One process keeps plain tensors. Several shard them by FSDP2: fp32 master weights, computing in --dtype.
"""

import argparse
import contextlib
import ctypes
import io
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
    LOGITS_BUDGET,
    LONGEST_BLOCKED,
    PRESETS,
    QUERIES,
    Llama,
    LlamaConfig,
    config_from_hf,
    load_pretrained,
)

# ---------------------------------------------------------------------------------------------------------------------
# The recipe

STANDS_ON = {
    "base": None, "stable": "base", "short": "stable", "long": "stable", "hybrid": "stable", "controlled": "base",
}  # fmt: skip
WEIGHT_DECAY = 0.1  # the paper's
BETAS, EPS, GRAD_CLIP = (0.9, 0.95), 1e-8, 1.0  # not published; what Llama-like pre-training uses
EVAL_BATCHES = 2  # of each source, at every evaluation
SKIPS = 5  # steps in a row that may be left out because their loss or gradient is not finite
FINAL_LR = 0.1  # the decay ends at this share of the stable learning rate (paper, "cosine to 10 %")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _stages(base, stable, decay, controlled) -> dict:
    return {"base": base, "stable": stable, "short": decay, "long": decay, "hybrid": decay, "controlled": controlled}


def _paper(lr: float, micro_batch: int, controlled_lr: float) -> dict:
    """The paper, section 4: 512 x 8,192 tokens a step, 50,000 stable steps (210B), 5,000 a branch (21B), no warm-up. Its
    controlled runs (section 3): 20B tokens, only of the 3B model; the other two learning rates are ours."""
    return {
        "steps": _stages(None, 50_000, 5_000, 5_000), "lr": _stages(None, lr, lr, controlled_lr), "warmup": 0,
        "batch": 512, "micro_batch": micro_batch, "seq_len": 8192,
        "save_every": 500, "eval_every": 1000, "log_every": 1,
    }  # fmt: skip


# batch and micro_batch in sequences; lr is the stage's highest; warmup in steps, of the base stage only.
RUNS = {
    "tiny": {  # ours: minutes on two CPU cores
        "steps": _stages(400, 2400, 1000, 1000), "lr": _stages(2e-3, 2e-3, 2e-3, 2e-3), "warmup": 50,
        "batch": 8, "micro_batch": 8, "seq_len": 256, "save_every": 200, "eval_every": 200, "log_every": 50,
        "vocab": 1024,
        "tokens": {  # to generate, per source
            "general": 1_500_000, "web": 4_000_000, "short_cot": 900_000, "long_cot": 900_000, "instruct": 300_000,
        },
    },
    "small": {  # ours: about 30M parameters, for real text
        "steps": _stages(2000, 2000, 500, 500), "lr": _stages(1e-3, 1e-3, 1e-3, 1e-3), "warmup": 100,
        "batch": 64, "micro_batch": 4, "seq_len": 1024, "save_every": 100, "eval_every": 500, "log_every": 10,
    },
    "1b": _paper(5e-5, 4, 5e-5),
    "3b": _paper(2e-5, 2, 3e-5),
    "8b": _paper(1e-5, 1, 1e-5),
}  # fmt: skip

EXTRA_TOKENS = {"noisy": 4_000_000}  # of the tiny world, generated only for a mixture that has it

# ---------------------------------------------------------------------------------------------------------------------
# Processes

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    local_rank: int = 0  # on this node


def setup(threads: int | None = None) -> World:
    """Join the other processes if torchrun started this one; choose the device; make arithmetic repeatable."""
    if threads:
        torch.set_num_threads(threads)
    local_rank, cuda = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a memset for every torch.empty
    if "RANK" not in os.environ:
        return World(device=device)
    if sys.platform == "linux":  # if torchrun is killed, its ranks would train on: let them save and end instead
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)
    return World(dist.get_rank(), dist.get_world_size(), device, local_rank)



def on_rank0(work: Callable):
    """work() on rank 0 while the others wait; all get its result, or its error."""
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
def run_lock(folder: str):
    """files.run_lock() on rank 0, for all ranks."""
    lock = files.run_lock(folder, LOCK_WAIT)
    on_rank0(lock.__enter__)
    try:
        yield
    finally:
        if files.is_rank0():
            lock.__exit__(None, None, None)



doing = {"what": "its start"}  # for the last words of a rank that fails


@contextlib.contextmanager
def clean_exit():
    """Around a program. All ranks meet the same bad input: rank 0 reports it, and torchrun ends the others at once.

    Several processes leave by os._exit: FSDP2 keeps gloo's threads alive after the group is destroyed, and one that still
    holds a tensor aborts the process while the interpreter goes down (4 of 56 runs; PyTorch's pull request 179291).
    """
    code = 0
    try:
        yield
    except SystemExit as stop:
        if not dist.is_initialized():
            raise
        code = stop.code
    except (ValueError, OSError):
        if not files.is_rank0():
            time.sleep(3)  # still here: only this rank has failed, so it must speak
        raise
    except Exception as error:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        print(
            f"rank {dist.get_rank()} failed in {doing['what']}: {type(error).__name__}: {error}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # at once: the others wait for this rank, and torchrun ends them
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)


def apply_fsdp(model: Llama, world: World, dtype: torch.dtype, replicas: int = 1) -> Llama:
    """Place the model (fp32) on the device, sharded over the ranks; activations run in `dtype`. One on the meta device stays
    there, sharded: to_empty() allocates each rank's part.

    replicas: as many whole copies, each sharded over size / replicas ranks (HSDP). With a copy a node, weights are gathered
    inside a node, where links are fast, and only gradients cross between nodes.
    """
    model.compute_dtype = dtype
    if world.size == 1:
        return model if model.embed.weight.is_meta else model.to(world.device)
    # Reductions in fp32, or bf16 would round a sum over many ranks. Inputs are not cast: they hold the rotary tables.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shape, names = (
        ((replicas, world.size // replicas), ("replicate", "shard")) if replicas > 1 else ((world.size,), None)
    )
    mesh = dist.init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)  # the root group: both uses of a tied embedding, final norm


def add_options(model: Llama, compile: bool, checkpointing: bool) -> Llama:
    """Per block, before sharding: compile; recompute activations in the backward pass."""
    for block in model.blocks:
        if compile:
            block.forward = torch.compile(block.forward)
        if checkpointing:  # around what is compiled: the other way round nothing would be (torch 2.13)
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    return model


def fastest_dtype(device: torch.device) -> str:
    """bf16 on a GPU, and on CPUs that multiply it natively: training is measured 1.5-2 times as fast there."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cuda" or native else "fp32"


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def make_optimizer(model: Llama, lr: float, weight_decay: float = WEIGHT_DECAY, betas=BETAS) -> torch.optim.AdamW:
    """AdamW. Matrices decay; norm weights do not, since shrinking them says nothing about what was learned."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=EPS, fused=True)


def learning_rate(stage: str, step: int, steps: int, peak: float, warmup: int = 0) -> float:
    """Of the step that follows `step` finished ones: base warms up, stable is constant, the others are a cosine.

    The cosine's first step is at the peak, its last one at exactly FINAL_LR of it.
    """
    if stage == "base":
        return peak * min(1.0, (step + 1) / max(1, warmup))
    if stage == "stable":
        return peak
    turn = math.pi * step / max(1, steps - 1)
    return FINAL_LR * peak + (1 - FINAL_LR) * peak * (1 + math.cos(turn)) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: <stage>/checkpoints/step_000123/{config.json, model.safetensors, tokenizer.model, meta.json, state/}

KEEP = 2  # checkpoints of a stage
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # dcp, in one process
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # returns a view; nothing is done to it in place


def save_checkpoint(
    stage_dir: str, step: int, model: Llama, optimizer, tok: Tokenizer, meta: dict, keep_every: int | None = None
) -> str:
    """Write a checkpoint aside, rename it, then let `latest` name it; delete all but the last KEEP and those of every
    `keep_every`-th step. Returns its path.

    The folder is a Hugging Face checkpoint in fp32; `state` beside it holds weights and optimizer in shards that any
    number of ranks can load. Called by every rank. OSError: it could not be written; the earlier ones are untouched.
    """
    folder = os.path.join(stage_dir, "checkpoints")
    final, aside = os.path.join(folder, f"step_{step:06d}"), os.path.join(folder, "unfinished")
    try:
        on_rank0(lambda: (shutil.rmtree(aside, ignore_errors=True), os.makedirs(aside)))
        weights, moments = states.get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=os.path.join(aside, "state"))
        whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered on rank 0
        full = states.get_model_state_dict(model, options=whole)
        meta = meta | {"step": step, "tokenizer": tok.hash}
        on_rank0(lambda: _publish(aside, final, model, full, tok, meta, keep_every))
    except (OSError, dcp.CheckpointException) as error:
        free = shutil.disk_usage(stage_dir).free >> 20
        shutil.rmtree(aside, ignore_errors=True)  # it may be what fills the disk
        reason = error if isinstance(error, OSError) else next(iter(error.failures.values()))[0]
        raise OSError(f"{final} could not be written ({reason}; {free} MiB free); those before it are intact") from None
    return final


def _publish(aside: str, final: str, model, weights: dict[str, Tensor], tok: Tokenizer, meta: dict, keep_every) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(aside, weights)
    except SafetensorError as error:  # how that library reports a full disk
        raise OSError(str(error)) from None
    tok.save(os.path.join(aside, tokenizer.FILE_NAME))
    names = sorted(
        os.path.relpath(os.path.join(root, name), aside) for root, _, names in os.walk(aside) for name in names
    )
    paths = [os.path.join(aside, name) for name in names]
    sums, sizes = dict(zip(names, files.file_hashes(paths))), dict(zip(names, map(os.path.getsize, paths)))
    files.write_json(os.path.join(aside, "meta.json"), meta | {"files": sizes, "sha256": sums})
    shutil.rmtree(final, ignore_errors=True)
    os.rename(aside, final)
    folder, name = os.path.split(final)
    files.write_text(os.path.join(folder, "latest"), name)
    steps = {path: int(path.rsplit("_", 1)[1]) for path in files.checkpoints(os.path.dirname(folder))}
    for later in [path for path in steps if steps[path] > meta["step"]]:  # damaged, or this run would have begun there
        shutil.rmtree(later)
        del steps[later]
    for old in list(steps)[KEEP:]:
        if not keep_every or steps[old] % keep_every:
            shutil.rmtree(old)


def load_checkpoint(path: str, model: Llama, optimizer: torch.optim.Optimizer) -> dict:
    """Weights and optimizer state from a checkpoint written by any number of ranks, in place; returns its meta.json.

    Learning rate, betas and weight decay stay the optimizer's own: they belong to the stage, not to what was learned.
    """
    check_shape(path, model.config)
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    weights, moments = states.get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    try:
        dcp.load(state, checkpoint_id=os.path.join(path, "state"))
    except dcp.CheckpointException as error:
        raise ValueError(f"{path} cannot be loaded: {next(iter(error.failures.values()))[0]}") from None
    states.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
    return files.read_json(os.path.join(path, "meta.json"))


def check_shape(path: str, config: LlamaConfig) -> None:
    """ValueError, naming the differences, if the checkpoint at path is not of this shape."""
    found, wanted = asdict(config_from_hf(files.read_json(os.path.join(path, "config.json")))), asdict(config)
    found["max_position"] = wanted["max_position"]  # says what a model was made for, changes nothing in it
    if changed := files.differences(found, wanted):
        raise ValueError(f"{path} is of another shape than this run's model: {changed}")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and signals


def read_metrics(path: str) -> list[dict]:
    """The whole rows of a metrics.jsonl; a kill may have cut the last one, which is later than any checkpoint."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


class MetricsLog:
    """metrics.jsonl, a row a step. Opening it at a checkpoint's step drops what was logged after that step."""

    def __init__(self, stage_dir: str, step: int):
        self.file = None
        if not files.is_rank0():
            return
        path = os.path.join(stage_dir, "metrics.jsonl")
        files.write_text(path, "\n".join(json.dumps(row) for row in read_metrics(path) if row["step"] <= step))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115, open as long as the run

    def write(self, row: dict) -> None:
        if self.file:  # JSON knows neither NaN nor infinity
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self.file.write(json.dumps(row) + "\n")


class Interrupt:
    """Ctrl-C and SIGTERM wait for the end of the step: `with Interrupt() as interrupt`, and ask agreed() every step."""

    def __enter__(self):
        self.signum, self.when = 0, 0.0
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame) -> None:
        if self.signum and time.monotonic() - self.when > 1:  # torchrun passes one Ctrl-C on twice, at once
            raise KeyboardInterrupt
        self.signum, self.when = signum, time.monotonic()

    def agreed(self, world: World) -> int:
        """The signal that any rank got, or 0: the same answer on every rank."""
        if world.size == 1:
            return self.signum
        signum = torch.tensor(self.signum, device=world.device)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)


# Dense bf16 FLOP/s by the name that the driver gives. No MFU for a device that is not here, rather than a wrong one.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}  # fmt: skip


def flops_per_token(config: LlamaConfig, seq_len: int) -> float:
    """Forward and backward: 6 per weight that multiplies (Kaplan et al. 2020; the input embedding does not), and causal
    attention's two products, 6 x layers x width x seq_len. Counted as if a sequence were one document."""
    head = config.vocab_size * config.hidden_size
    weights = config.num_params() - (0 if config.tie_embeddings else head)
    return 6 * weights + 6 * config.num_layers * config.num_heads * config.head_dim * seq_len


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


class Speed:
    """Times training steps and nothing else; the first one (warm-up, compilation) gives no rate. `with speed: step`."""

    def __init__(self, settings: "Settings", world: World):
        self.batch_tokens, self.total, self.steps, self.rate = settings.batch * settings.seq_len, 0.0, -1, None
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self.peak = PEAK_FLOPS.get(name, 0.0) * world.size if settings.dtype == "bf16" else 0.0
        self.flops = flops_per_token(LlamaConfig(**settings.model), settings.seq_len)

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *error):
        seconds = time.perf_counter() - self.start  # the step has read its loss, so a GPU has finished too
        self.steps += 1
        if self.steps:
            self.total, self.rate = self.total + seconds, self.batch_tokens / seconds

    def row(self) -> dict:
        mfu = {"mfu": self.rate * self.flops / self.peak} if self.rate and self.peak else {}
        return {"tokens_per_s": self.rate} | mfu


def log_line(row: dict, settings: "Settings", speed: Speed) -> str:
    step, steps = row["step"], settings.steps
    text = f"[{settings.stage}] step {step:{len(str(steps))}}/{steps}  loss {row['loss']:7.4f}  lr {row['lr']:.2e}"
    text += f"  grad {row['grad_norm']:7.3f}"
    if speed.rate:
        left = (steps - step) * speed.total / speed.steps
        text += f"  {speed.rate:9,.0f} tok/s  eta {duration(left)}"
        text += f"  mfu {speed.row()['mfu']:.1%}" if speed.peak else ""
    return text + (f"  val {row['val_loss']:.4f}, {row['bits_per_byte']:.4f} bits/byte" if "val_loss" in row else "")


# ---------------------------------------------------------------------------------------------------------------------
# A stage


@dataclass(frozen=True)
class Settings:
    """What decides a stage's result. Saved as its config.json; a folder with other settings is never continued."""

    stage: str
    preset: str
    starts_from: str  # "random", a stage, or the folder given by --init
    steps: int
    lr: float
    warmup: int
    batch: int  # sequences a step, over all ranks
    seq_len: int
    dtype: str
    seed: int
    mixture: dict[str, float]
    tokenizer: str  # hash
    data: str  # hash of its index, which has the checksums of the shards
    model: dict  # LlamaConfig


def open_data(args) -> str:
    """The folder of prepared shards; the tiny preset's are generated now if they are not there."""
    run, folder = RUNS[args.preset], args.data or os.path.join(args.out, "data")
    index = shards.read_index(folder)
    if args.data and not index:
        how = f"python -m data.prepare --data {folder} --out {args.out}/data --seq-len {args.seq_len}"
        raise ValueError(f"--data {folder} has no index.json. To make shards of public files: {how}")
    if not args.data and "tokens" not in run:
        raise ValueError(f"--preset {args.preset} needs --data DIR, a folder made by python -m data.prepare")
    if not args.data:
        if not index:
            files.print0(f"[data] generating text and training a tokenizer on it: {folder}")
        extra = {*(index or {"sources": ()})["sources"], *resolve_mixture(args.mix, "tiny")} & EXTRA_TOKENS.keys()
        tokens = run["tokens"] | {name: EXTRA_TOKENS[name] for name in sorted(extra)}
        prepare.prepare_synth(folder, run["vocab"], args.seq_len, tokens, args.seed)
    return folder


def resolve_mixture(mix: dict | str | None, world: str) -> dict[str, float]:
    """What --mix says: weights, or the name of one of the recipes' controlled mixtures; {} if it says nothing."""
    named = recipes.CONTROLLED.get(world, {})
    if isinstance(mix, str) and mix not in named:
        raise ValueError(f"no mixture {mix!r} for this data (valid: {', '.join(named) or 'none'}; or source=share,…)")
    return named[mix] if isinstance(mix, str) else mix or {}


def resolve(stage: str, args, data_dir: str, world: World) -> Settings:
    """The preset's table, changed by the flags; --steps and --lr are about the stage that --branch names."""
    if world.size % args.replicate:
        raise ValueError(f"--replicate {args.replicate} does not divide {world.size} ranks")
    run, parent, tok, named = RUNS[args.preset], STANDS_ON[stage], tokenizer.load(data_dir), stage == args.branch
    data_world = files.read_json(os.path.join(data_dir, "index.json"))["settings"]["world"]
    mixtures = recipes.STAGES.get(data_world, {})
    if named and args.mix:
        mixtures = mixtures | {stage: resolve_mixture(args.mix, data_world)}
    if stage not in mixtures:
        have = f"for {', '.join(mixtures)}" if mixtures else "at all"
        raise ValueError(f"stage {stage} needs --mix, source=share,…: the data in {data_dir} has mixtures {have}")
    config = model_shape(args, parent, tok.vocab_size)
    if config.vocab_size < tok.vocab_size:  # more is padding, as Qwen's matrices have it
        raise ValueError(f"the tokenizer of {data_dir} has {tok.vocab_size} ids, this model {config.vocab_size}")
    start = args.init if args.init and parent == "base" else parent or "random"
    return Settings(
        stage=stage, preset=args.preset, starts_from=start,
        steps=named and args.steps or run["steps"][stage], lr=named and args.lr or run["lr"][stage],
        warmup=run["warmup"] if stage == "base" else 0, batch=args.batch, seq_len=args.seq_len,
        dtype=fastest_dtype(world.device) if args.dtype == "auto" else args.dtype, seed=args.seed,
        mixture=mixtures[stage], tokenizer=tok.hash, data=files.file_hash(os.path.join(data_dir, "index.json")),
        model=asdict(replace(config, max_position=max(config.max_position, args.seq_len))),
    )  # fmt: skip


def model_shape(args, parent: str | None, vocab_size: int) -> LlamaConfig:
    """The preset's, with the vocabulary of what it starts from, or of the data; of the paper's presets the whole shape of
    what it starts from: --init, or the stage below."""
    config, below, found = PRESETS[args.preset], os.path.join(args.out, parent or "", "config.json"), None
    if args.init and parent == "base":
        found = config_from_hf(files.read_json(os.path.join(args.init, "config.json")))
    elif parent and os.path.exists(below):
        try:
            found = LlamaConfig(**files.read_json(below)["model"])
        except (KeyError, TypeError):
            raise ValueError(f"{below} is not the configuration of a stage: use another --out") from None
    if RUNS[args.preset]["steps"]["base"]:
        return replace(config, vocab_size=found.vocab_size if found else vocab_size)
    found = replace(found or config, max_position=config.max_position)
    if changed := files.differences(asdict(config), asdict(found)):
        files.print0_once(f"the schedule of --preset {args.preset}, the model's own shape ({changed})")
    return found


def open_folder(folder: str, settings: dict) -> None:
    """Make a stage's or RL run's folder; if something was trained in it, that must have been with the same settings."""
    path = os.path.join(folder, "config.json")
    if files.latest_checkpoint(folder):
        files.check_same_settings(folder, files.read_json(path), settings)
    os.makedirs(folder, exist_ok=True)
    files.write_json(path, settings)


def load_model(settings: Settings, own: str | None, args, world: World) -> tuple[Llama, torch.optim.AdamW]:
    """Model and optimizer: from the stage's own checkpoint if there is one, the stage below, --init, or random."""
    config = LlamaConfig(**settings.model)
    from_init = settings.starts_from == args.init and not own
    if from_init:
        check_shape(args.init, config)
        own_words, data_dir = tokenizer.find(args.init), args.data or os.path.join(args.out, "data")
        if own_words and not tokenizer.load(own_words).agrees(tokenizer.load(data_dir)):
            raise ValueError(f"the data was prepared with another tokenizer than {args.init}'s")
    with torch.device("meta"):  # no rank holds the whole model, not even for a moment
        model = Llama(config)
    model = apply_fsdp(
        add_options(model, args.compile, args.activation_checkpointing), world, DTYPES[settings.dtype], args.replicate
    )
    model.to_empty(device=world.device)
    model.init_rope()
    if from_init:
        load_pretrained(model, args.init)
    elif not own and settings.starts_from == "random":
        model.init_weights(settings.seed)
    optimizer = make_optimizer(model, settings.lr)
    if not from_init and (own or settings.starts_from != "random"):
        parent = os.path.join(args.out, settings.starts_from)
        load_checkpoint(own or on_rank0(lambda: files.latest_checkpoint(parent)), model, optimizer)
    return model, optimizer


def all_sum(x: Tensor, world: World) -> Tensor:
    if world.size > 1:
        dist.all_reduce(x)
    return x


def add_losses(sums: Tensor, model: Llama, batch: Batch, micro_batch: int, scale: Tensor | None = None) -> None:
    """sums (sources, 2) += (sum of losses, number of targets) of each source; with a scale, also scale * gradients."""
    for tokens, targets, doc_start, source in zip(*(x.to(sums.device).split(micro_batch) for x in batch), strict=True):
        total, nll = model(tokens, targets, doc_start, reduction="sum")  # (), (b, T)
        if scale is not None:
            (total * scale).backward()
        rows = torch.stack((nll.double().sum(1), (targets >= 0).double().sum(1)), dim=1)  # (b, 2)
        sums.index_add_(0, source, rows)


def train_step(model: Llama, optimizer, batch: Batch, names: tuple[str, ...], micro_batch: int, world: World) -> dict:
    """One update on this rank's rows of the batch: loss, gradient norm before clipping, loss of each source.

    If one of the first two is not finite the weights stay as they are, and the row says "skipped".
    """
    count = all_sum((batch.targets >= 0).sum().to(world.device), world)
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=world.device)
    add_losses(sums, model, batch, micro_batch, world.size / count)  # FSDP2 averages gradients over ranks: undo that
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    norm = (norm.full_tensor() if world.size > 1 else norm).item()
    loss = (all_sum(sums, world)[:, 0].sum() / count).item()
    if finite := math.isfinite(loss + norm):  # sums over all ranks, so all agree
        optimizer.step()
    optimizer.zero_grad()
    by_source = {f"loss/{name}": total / n for name, (total, n) in zip(names, sums.tolist(), strict=True) if n}
    return {"loss": loss, "grad_norm": norm} | by_source | ({} if finite else {"skipped": 1})


@torch.no_grad()
def validate(
    model: Llama, loader: Loader, mixture: dict[str, float], micro_batch: int, world: World, token_bytes: Tensor
) -> dict:
    """On held-out text of each source: loss in nats a token, and bits per byte, which another tokenizer does not change.

    token_bytes (vocab,): how many bytes of text each token stands for. The means are weighted like the mixture.
    """
    sums, size = torch.zeros(2, len(mixture), 2, dtype=torch.float64, device=world.device), torch.zeros(len(mixture))
    for name, batch in loader.validation(EVAL_BATCHES, world.rank, world.size):
        add_losses(sums[0], model, batch, micro_batch)
        size[list(mixture).index(name)] += token_bytes[batch.targets[batch.targets >= 0]].sum()
    sums[1, :, 0] = size
    sums = all_sum(sums, world)
    (nats, tokens), size = sums[0].T.tolist(), sums[1, :, 0].tolist()
    losses = {name: nats[i] / max(tokens[i], 1) for i, name in enumerate(mixture)}
    bits = {name: nats[i] / math.log(2) / max(size[i], 1) for i, name in enumerate(mixture)}
    row = {"val_loss": sum(weight * losses[name] for name, weight in mixture.items())}
    row |= {"bits_per_byte": sum(weight * bits[name] for name, weight in mixture.items())}
    return row | {f"val_loss/{k}": v for k, v in losses.items()} | {f"bits_per_byte/{k}": v for k, v in bits.items()}


def run_stage(stage: str, args, world: World) -> None:
    """Train one stage to its end, from where its folder stands. SystemExit(130 or 143) after a signal, once saved."""
    stage_dir, data_dir = os.path.join(args.out, stage), on_rank0(lambda: open_data(args))
    settings = resolve(stage, args, data_dir, world)
    on_rank0(lambda: open_folder(stage_dir, asdict(settings)))
    own = on_rank0(lambda: files.latest_checkpoint(stage_dir))
    if own and args.resume == "never":
        raise ValueError(f"{stage_dir} has a checkpoint: --resume auto goes on from it, another --out starts anew")
    meta = files.read_json(f"{own}/meta.json") if own else {"step": 0}
    start, skipped = meta["step"], meta.get("skipped", 0)
    if start >= settings.steps:
        return files.print0(f"[{stage}] is finished: {own}")
    order = args.seed + 1000 * list(STANDS_ON).index(stage)  # no stage sees a shared source in the order of another
    loader = Loader(data_dir, settings.mixture, args.seq_len, args.batch, order)
    check_memory(LlamaConfig(**settings.model), args, settings.dtype, world)
    model, optimizer = load_model(settings, own, args, world)
    begin = f"goes on after step {start}" if start else f"starts from {settings.starts_from}"
    size = f"{model.config.num_params() / 1e6:.1f}M parameters, {settings.steps} steps"
    where = f"{settings.dtype} on {world.size} x {world.device.type}"
    files.print0(f"[{stage}] {begin}: {size} of {args.batch} x {args.seq_len} tokens, {where}")
    log, speed, tok = MetricsLog(stage_dir, start), Speed(settings, world), tokenizer.load(data_dir)
    token_bytes = torch.zeros(tok.vocab_size, dtype=torch.int64)
    token_bytes[list(tok.ranks.values())] = torch.tensor([len(token) for token in tok.ranks])
    with Interrupt() as interrupt:
        for step in range(start + 1, settings.steps + 1):
            doing["what"] = f"step {step} of {stage}"
            lr = learning_rate(stage, step - 1, settings.steps, settings.lr, settings.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with speed:
                batch = loader.batch(step - 1, world.rank, world.size)
                row = train_step(model, optimizer, batch, loader.names, args.micro_batch, world)
            row = {"step": step, "lr": lr} | row
            skipped = skipped + 1 if row.get("skipped") else 0
            signum, last = interrupt.agreed(world), step == settings.steps
            if last or step % args.eval_every == 0:  # before saving: then the rows up to a checkpoint are complete
                row |= validate(model, loader, settings.mixture, args.micro_batch, world, token_bytes)
            if last:
                shares = {name: n / (step * args.batch) for name, n in loader.seen(step).items()}
                row |= {f"share/{name}": share for name, share in shares.items()}
            log.write(row | speed.row())
            if skipped:
                files.print0(f"[{stage}] step {step} left out: loss {row['loss']}, gradient norm {row['grad_norm']}")
            if skipped == SKIPS:
                raise ValueError(
                    f"{SKIPS} steps in a row without a finite loss and gradient, up to step {step}: try a lower --lr, "
                    f"or --dtype fp32; the last checkpoint is intact"
                )
            if last or signum or step == start + 1 or step % args.log_every == 0:
                files.print0(log_line(row, settings, speed))
            if last or signum or step % args.save_every == 0:
                path = save_checkpoint(
                    stage_dir, step, model, optimizer, tok, {"stage": stage, "skipped": skipped}, args.keep_every
                )
            if signum:
                files.print0(f"[{stage}] stopped after step {step}: saved {path}, the same command goes on")
                raise SystemExit(128 + signum)
        if signum := interrupt.agreed(world):  # it came during the last evaluation or save
            raise SystemExit(128 + signum)
    files.print0(f"[{stage}] done: {path}; sequences seen: {', '.join(f'{name} {x:.1%}' for name, x in shares.items())}")


# ---------------------------------------------------------------------------------------------------------------------
# Report


def report(out: str) -> None:
    """A table of the stages in a run folder, and a picture of their losses: out/midtrain.md and out/midtrain.png."""
    runs = {}
    for stage in STANDS_ON:
        if rows := read_metrics(os.path.join(out, stage, "metrics.jsonl")):
            runs[stage] = files.read_json(os.path.join(out, stage, "config.json")), rows
    if not runs:
        raise ValueError(f"no stage has run in {out}")
    lines = ["| stage | steps | tokens | loss, first steps | last | held out | bits per byte | sequences seen |"]
    lines.append("|" + "---|" * 8)
    for stage, (settings, rows) in runs.items():
        points = twentieths(rows)
        held = next((row for row in reversed(rows) if row.get("val_loss") is not None), None)
        val = f"{held['val_loss']:.3f} | {held['bits_per_byte']:.3f}" if held else "– | –"
        seen = ", ".join(f"{k[6:]} {v:.1%}" for k, v in rows[-1].items() if k.startswith("share/")) or "not finished"
        tokens = len(rows) * settings["batch"] * settings["seq_len"]
        lines.append(
            f"| {stage} | {len(rows):,} | {tokens:,} | {points[0][1]:.3f} | {points[-1][1]:.3f} | {val} | {seen} |"
        )
    text = "\n".join(lines)
    print(text)
    files.write_text(os.path.join(out, "midtrain.md"), text)
    draw(os.path.join(out, "midtrain.png"), runs)
    print(f"wrote {out}/midtrain.md and {out}/midtrain.png")


def twentieths(rows: list[dict]) -> list[tuple[float, float]]:
    """(step in the middle, mean loss) of each twentieth of a stage; steps that were left out do not count."""
    few, points = max(1, len(rows) // 20), []
    for i in range(0, len(rows) - few + 1, few):
        losses = [row["loss"] for row in rows[i : i + few] if row["loss"] is not None]
        points += [(i + few / 2, sum(losses) / len(losses))] if losses else []
    return points or [(0.0, math.nan)]


def draw(path: str, runs: dict) -> None:
    """Training loss (mean of a twentieth of a stage at a time) and held-out loss against tokens; branches side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5))
    end = {}
    for stage, (settings, rows) in runs.items():
        begin, each = end.get(STANDS_ON[stage], 0), settings["batch"] * settings["seq_len"] / 1e6
        end[stage] = begin + len(rows) * each
        points = [(begin + each * step, loss) for step, loss in twentieths(rows)]
        (line,) = axes.plot(*zip(*points), label=f"{stage}, training")
        held = [(begin + each * row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
        axes.plot(*zip(*held), "o--", color=line.get_color(), alpha=0.6, label=f"{stage}, held out") if held else None
    axes.set(xlabel="tokens, millions", ylabel="loss, nats a token (each stage on its own mixture)")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def stages_to_run(args) -> list[str]:
    """The stages to run: the one asked for and, before it, those that it stands on and that are not finished."""
    stages = [args.branch]
    if files.latest_checkpoint(os.path.join(args.out, args.branch)):
        return stages  # what it started from does not matter any more
    while (parent := STANDS_ON[stages[0]]) and not is_finished(os.path.join(args.out, parent)):
        if parent == "base" and args.init:
            break
        if not RUNS[args.preset]["steps"][parent]:
            raise ValueError(f"--preset {args.preset} needs --init DIR, the Hugging Face Llama that it starts from")
        stages.insert(0, parent)
    if len(stages) > 1:
        files.print0(f"[{args.branch}] stands on stages that are not there yet: running {', '.join(stages)}")
    return stages


def is_finished(stage_dir: str) -> bool:
    path = files.latest_checkpoint(stage_dir)
    return path is not None and files.read_json(f"{path}/meta.json")["step"] >= files.read_json(f"{stage_dir}/config.json")["steps"]


def memory_plan(config: LlamaConfig, args, dtype: str, ranks: int, kernels: bool) -> dict[str, float]:
    """Bytes of one rank by part, and at the peak. kernels: as on a GPU; without them a CPU keeps other things.

    The peak is at the end of a micro-batch's forward pass, when gradients exist only if an earlier one left them, or in the
    last block of the backward pass, when nearly all of them do. A test measures how true this is.
    """
    size, params, block = DTYPES[dtype].itemsize, config.num_params(), block_params(config)
    rest = params - config.num_layers * block  # the embedding, the output projection
    tokens, share = min(args.micro_batch, -(-args.batch // ranks)) * args.seq_len, args.replicate / ranks
    layer = tokens * layer_bytes(config, size, args.seq_len, kernels)
    inputs = tokens * 2 * size * config.hidden_size  # of a block: all that recomputation keeps of it
    if kernels:
        logits = min(4 * tokens * config.vocab_size, 512 << 20) + size * config.vocab_size * config.hidden_size
    else:  # logits and probabilities; the mask
        logits = 8 * min(tokens * config.vocab_size, LOGITS_BUDGET) + size * tokens * args.seq_len
    if ranks > 1:  # gathered: the rest and two blocks at a time, a block's gradients as they are computed and summed
        gathered = size * (rest + 2 * block) + (size + 4) * block
    else:  # copies in bf16, which the backward pass needs again
        gathered = size * (rest + block if args.activation_checkpointing else params) * (dtype == "bf16")
    parts = {
        "parameters": 4 * params * share, "gradients": 4 * params * share, "optimizer": 8 * params * share,
        "weights to compute with": gathered,
        "activations": tokens * (4 + size) * config.hidden_size  # the last norm
        + config.num_layers * (inputs if args.activation_checkpointing else layer),
        "logits": logits,
    }  # fmt: skip
    accumulated = parts["gradients"] if tokens * ranks < args.batch * args.seq_len else 0
    forward_end = parts["activations"] + logits + accumulated
    inside_mlp = tokens * 4 * size * config.intermediate_size  # gradients of its four activations
    backward_end = layer + inside_mlp + max(parts["gradients"], args.activation_checkpointing * parts["activations"])
    return parts | {"peak": parts["parameters"] + parts["optimizer"] + gathered + max(forward_end, backward_end)}


def layer_bytes(config: LlamaConfig, size: int, seq_len: int, kernels: bool) -> float:
    """What a block keeps of a token for its backward pass: two norms, attention's q, k, v and output, and SwiGLU's gate, its
    silu, up and their product. `size`: bytes of an activation."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kept = size * (2 * heads + 2 * kv_heads) + 4 * size * config.intermediate_size
    if kernels:  # of a norm the sum and its output; log-sum-exps
        return kept + 2 * (2 * size * config.hidden_size + 4) + 4 * config.num_heads
    kept += 2 * ((4 + size) * config.hidden_size + 4)  # of a norm its fp32 value and its output
    if seq_len > LONGEST_BLOCKED:  # keys and values, repeated for all heads
        return kept + 2 * size * heads
    return kept + size * config.num_heads * (seq_len + QUERIES) / 2  # probabilities of blocks of queries


def block_params(config: LlamaConfig) -> int:
    return replace(config, num_layers=2).num_params() - replace(config, num_layers=1).num_params()


def check_memory(config: LlamaConfig, args, dtype: str, world: World) -> None:
    """ValueError if a rank will not have the memory that the plan says."""
    if world.device.type == "cuda":
        there = torch.cuda.mem_get_info(world.device)[0]  # free: others may use the card
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            with open("/sys/fs/cgroup/memory.max") as f:  # of a container
                there = min(there, int(f.read()))
        there /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    else:
        return
    plan = memory_plan(config, args, dtype, world.size, world.device.type == "cuda")
    if plan["peak"] > there:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan.items() if name != "peak")
        raise ValueError(
            f"a rank needs about {plan['peak'] / 2**30:.1f} GiB and has {there / 2**30:.1f} ({parts}): use a smaller "
            f"--micro-batch, --activation-checkpointing, or more ranks"
        )


def show_plan(args) -> None:
    """Size, cost and memory of a stage on H200s, for several numbers of them."""
    config = config_from_hf(files.read_json(f"{args.init}/config.json")) if args.init else PRESETS[args.preset]
    steps = args.steps or RUNS[args.preset]["steps"][args.branch]
    tokens, device = steps * args.batch * args.seq_len, "NVIDIA H200"
    flops, dtype = tokens * flops_per_token(config, args.seq_len), "bf16" if args.dtype == "auto" else args.dtype
    print(f"{args.preset} {args.branch}: {config.num_params():,} parameters, {steps:,} steps, {tokens:,} tokens")
    print(f"{flops:.3e} FLOPs: 6 per weight but the input embedding's, and causal attention (flops_per_token)")
    print(
        f"{dtype}, {args.micro_batch} x {args.seq_len} tokens at once; GiB a GPU; time at {args.mfu:.0%} of {device}s' peak:"
    )
    rows = []
    for gpus in sorted({1, 8, 64, int(os.environ.get("WORLD_SIZE", "1"))}):
        if args.batch % gpus or gpus % args.replicate:
            continue
        parts = memory_plan(config, args, dtype, gpus, kernels=True)
        hours = flops / (args.mfu * PEAK_FLOPS[device] * gpus) / 3600
        rows.append([f"{gpus}", *(f"{size / 2**30:.1f}" for size in parts.values()), f"{hours * 3600 / steps:.2f}"])
        rows[-1] += [f"{hours:,.1f}", f"{hours * gpus:,.1f}"]
    if not rows:
        raise ValueError(f"--batch {args.batch} and --replicate {args.replicate} fit none of 1, 8 and 64 GPUs")
    table = [["GPUs", *parts, "s a step", "hours", "GPU-hours"], *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    print("\n".join(" | ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in table))


def mixture(text: str) -> dict[str, float] | str:
    """ "web=0.7,long_cot=0.3" → {"web": 0.7, "long_cot": 0.3}; a name is looked up when the data is known."""
    if re.fullmatch(r"\w+", text):
        return text
    try:
        parts = sorted(part.split("=") for part in text.split(","))  # in one order: it decides that of the data
        weights = {name: float(weight) for name, weight in parts}
        if len(weights) < len(parts):
            raise ValueError("the weights name a source twice")
        block_counts(weights)
    except ValueError as error:
        reason = error if "weights" in str(error) else "write it as source=share,source=share"
        raise argparse.ArgumentTypeError(f"{text}: {reason}") from None
    return weights


def parse_args():
    """The flags; where one is not given, the preset's number."""
    p = files.ArgumentParser(description=__doc__)
    p.add_argument("--branch", choices=STANDS_ON, help="stage to run; what it stands on comes first")
    p.add_argument("--preset", default="tiny", choices=RUNS, help="sizes and schedule (default tiny)")
    p.add_argument("--init", metavar="DIR", help="Hugging Face Llama to start from, in place of the base stage")
    p.add_argument("--data", metavar="DIR", help="prepared shards (python -m data.prepare); tiny generates its own")
    p.add_argument("--out", metavar="DIR", help="run folder, in it a folder a stage (default runs/PRESET)")
    p.add_argument("--steps", type=int, metavar="N", help="of the stage that --branch names")
    p.add_argument("--lr", type=float, metavar="X", help="highest learning rate of the stage that --branch names")
    p.add_argument(
        "--mix", type=mixture, metavar="A=X,B=Y",
        help="of the stage that --branch names: shares of tokens, sum 1; or a name from CONTROLLED in data/recipes.py",
    )  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of data, order and first weights (default 0)")
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="of activations; weights stay in fp32")
    p.add_argument("--batch", type=int, metavar="N", help="sequences a step, of all ranks together")
    p.add_argument("--micro-batch", type=int, metavar="N", help="sequences a rank computes at once; less saves memory")
    p.add_argument("--seq-len", type=int, metavar="N", help="tokens a sequence; the data must be packed for it")
    p.add_argument(
        "--replicate", type=int, default=1, metavar="N", help="whole copies of the model, one a node say (HSDP)"
    )
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads a process; same numbers need the same N")
    p.add_argument(
        "--resume",
        default="auto",
        choices=("auto", "never"),
        help="auto (default): go on from the last good checkpoint",
    )
    p.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints")
    p.add_argument(
        "--keep-every", type=int, metavar="N", help="keep the checkpoint of every Nth step, beside the last two"
    )
    p.add_argument("--eval-every", type=int, metavar="N", help="steps between evaluations; always one at the end")
    p.add_argument("--log-every", type=int, metavar="N", help="steps between lines; metrics.jsonl has every step")
    p.add_argument("--compile", action="store_true", help="torch.compile each block: pays on a GPU, after a slow start")
    p.add_argument("--activation-checkpointing", action="store_true", help="recompute them: less memory, 1/3 slower")
    p.add_argument("--plan", action="store_true", help="print size, cost and memory of the stage, and stop")
    p.add_argument("--report", action="store_true", help="table and picture of the stages in --out, and stop")
    p.add_argument("--mfu", type=float, default=0.4, metavar="X", help="share of the GPUs' peak that --plan counts on")
    with contextlib.redirect_stderr(sys.stderr if files.is_rank0() else io.StringIO()):
        args = p.parse_args()
    if not args.branch and not args.report:
        raise ValueError(f"--branch is needed: one of {', '.join(STANDS_ON)}")
    run = RUNS[args.preset]
    args.out = args.out or f"runs/{args.preset}"
    for name in ("batch", "micro_batch", "seq_len", "save_every", "eval_every", "log_every"):
        if getattr(args, name) is None:
            setattr(args, name, run[name])
    positive = "steps lr mfu batch micro_batch seq_len replicate threads save_every keep_every eval_every log_every"
    for name in positive.split():
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.branch == "base" and (args.init or not run["steps"]["base"]):
        raise ValueError(f"a base stage starts from random weights: with --init or --preset {args.preset}, take stable")
    return args


def main() -> None:
    with clean_exit():
        args = parse_args()
        if args.report:
            return report(args.out)
        if args.plan:
            return show_plan(args)
        world = setup(args.threads)
        for stage in on_rank0(lambda: stages_to_run(args)):
            with run_lock(os.path.join(args.out, stage)):
                run_stage(stage, args, world)


if __name__ == "__main__":
    files.run_cli(main)

"""The sampler beside transformers' generate, a GRPO step beside TRL's GRPOTrainer: CPU, one thread, fp32.

    python tests/bench_rl.py [rounds]
    python tests/bench_rl.py --quick [--tiny]     what a GPU does, with a shorter tail; tiny: on a CPU

All arms have one model of 6.85M parameters with random weights (8 layers, 256 wide, 8 / 4 heads, 4,096
words). Lengths are imposed: every arm makes the same number of tokens. Figures are CPU seconds of the
process, arms interleaved, the median of the rounds. Without TRL (pip install trl; it was 1.16) our step is
timed alone. On a GPU: decoding in the 1B shape beside what a copy reaches, and a long-tailed rollout beside
generate.
"""

import importlib.metadata
import platform
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import midtrain
import rl
from model import PRESETS, Llama, LlamaConfig
from sample import Sampler, SamplingParams, sampling_mode

QUICK, TINY = "--quick" in sys.argv, "--tiny" in sys.argv
DEVICE, SHAPE = ("cpu", "tiny") if TINY else ("cuda", "1b")
CONFIG = LlamaConfig(4096, 8, 256, 8, 4, 32, 688, rope_theta=10_000.0, max_position=1024)
PROMPT, EOS, P, G = 64, 0, 8, 16


def prompts(n: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(4, CONFIG.vocab_size, (n, PROMPT)).tolist()


def long_tailed(n: int, cap: int) -> list[int]:
    """Lengths as of reasoning: log-normal, sigma 0.8, median a quarter of the cap."""
    drawn = np.random.default_rng(1).lognormal(np.log(cap / 4), 0.8, n)
    return np.clip(drawn, 1, cap).astype(int).tolist()


def their_model(folder: str):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, EOS
    return model


def generate_exactly(theirs, batch: torch.Tensor, tokens: int, greedy: bool = False) -> None:
    """transformers' generate at temperature 1 or greedy, until every row has so many tokens."""
    how = {} if greedy else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    mask = torch.ones_like(batch)
    theirs.generate(
        batch, do_sample=not greedy, max_new_tokens=tokens, min_new_tokens=tokens, attention_mask=mask, **how
    )


def race(title: str, arms: dict, tokens: int, rounds: int) -> None:
    """Time the arms, the peer first."""
    seconds = {name: [] for name in arms}
    for i in range(rounds + 1):  # the first to warm up
        for name, work in arms.items():
            start = time.process_time()
            took = work()  # a number: what it measured itself, without its preparations
            took = took if isinstance(took, float) else time.process_time() - start
            seconds[name] += [took] if i else []
    median = {name: statistics.median(s) for name, s in seconds.items()}
    peer = next(iter(median.values()))
    print(f"{title} ({tokens:,} tokens)")
    for name, s in median.items():
        print(f"  {name:34} {s:7.2f} CPU s  {tokens / s:8,.0f} tokens/s  {peer / s:5.2f}x", flush=True)


# ------------------------------------------------------------------------------------------------------------
# Sampling


def greedy_or_not(model: Llama, theirs, rounds: int) -> None:
    """64 rows x (64 + 256), temperature 1 with log-probabilities, and greedy."""
    ids, sampler = prompts(64), Sampler(model, None, slots=64)
    batch = torch.tensor(ids)
    arms = {
        "generate, T = 1": lambda: generate_exactly(theirs, batch, 256),
        "ours, T = 1, log-probabilities": lambda: sampler.generate(ids, max_new_tokens=256, stop=()),
    }
    race("64 rows x (64 + 256), T = 1", arms, 64 * 256, rounds)
    arms = {
        "generate, greedy": lambda: generate_exactly(theirs, batch, 256, greedy=True),
        "ours, greedy": lambda: sampler.generate(ids, max_new_tokens=256, stop=(), temperature=0.0),
    }
    race("64 rows x (64 + 256), greedy", arms, 64 * 256, rounds)


def refill(model: Llama, theirs, rounds: int) -> None:
    """256 requests of long-tailed lengths, 64 slots; generate computes batches of 64 to their longest row."""
    ids, lengths, sampler = prompts(256), long_tailed(256, 256), Sampler(model, None, slots=64)

    def static() -> None:
        for i in range(0, 256, 64):
            batch, longest = torch.tensor(ids[i : i + 64]), max(lengths[i : i + 64])
            generate_exactly(theirs, batch, longest)

    arms = {
        "generate, batches of 64": static,
        "ours, 64 slots, log-probabilities": lambda: sampler.generate(ids, max_new_tokens=lengths, stop=()),
    }
    race("256 requests of long-tailed length", arms, sum(lengths), rounds)


# ------------------------------------------------------------------------------------------------------------
# A step of GRPO: 8 prompts x 16 rollouts, one update


def score(tokens: list[int]) -> float:
    return 1.0 if sum(tokens) % 2 else -1.0


class ForcedLengths:
    """A logits processor that lets row i end after lengths[i] tokens, neither before nor later."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, ids, scores):
        at_end = ids.shape[1] - PROMPT + 1 >= self.lengths
        scores[:, EOS] = torch.where(at_end, 1e9, -torch.inf)
        return scores


def our_step(model: Llama, lengths: list[int], share: bool):
    """Rollout, rewards, update by rl.py's own functions; share: a group's prompt once in the update."""
    sampler = Sampler(model, None, slots=128)
    optimizer = midtrain.make_optimizer(model, 1e-6, weight_decay=0.0)
    args = SimpleNamespace(
        prompts_per_step=P, rollouts=G, updates=1, filter="none", overlong="keep", surrogate="clip",
        loss_agg="token", clip_low=0.2, clip_high=0.2, dual_clip=0.0, is_cap=0.0, kl_coef=0.0, kl="k3",
        temperature=1.0, row_tokens=2048, micro_tokens=2048,
    )
    limits = [lengths[i * G : i * G + G] for i in range(P)]
    ids, world = prompts(P), midtrain.World()

    def step() -> float:
        rl.shares_prompts = lambda device: share
        start = time.process_time()
        groups = sampler.generate(ids, n=G, max_new_tokens=limits, stop=())
        rewards = torch.tensor([[score(c.tokens) for c in group] for group in groups])
        values, signal = rl.advantages(rewards).tolist(), rl.has_signal(rewards).tolist()
        samples = [
            rl.Sample(
                i, ids[i], c.tokens, c.logprobs, "", True, True, rewards[i, j].item(), values[i][j], signal[i]
            )
            for i, group in enumerate(groups)
            for j, c in enumerate(group)
        ]
        rl.update(model, None, optimizer, samples, max(lengths), args, world)
        return time.process_time() - start

    return step


def their_step(folder: str, lengths: list[int]):
    """TRL's GRPOTrainer on the same problem: 16 responses per micro-batch, eight of these per step."""
    import datasets
    import tokenizers
    import transformers
    import trl

    vocabulary = {f"w{i}": i for i in range(CONFIG.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w1"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    rows = datasets.Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in ids) for ids in prompts(P)]})
    model, taken = their_model(folder), []
    generate, processor = model.generate, ForcedLengths(lengths)
    model.generate = lambda *a, **k: generate(*a, **k, logits_processor=[processor])

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.process_time()

        def on_step_end(self, *_, **__):
            taken.append(time.process_time() - self.start)

    def step() -> float:
        config = trl.GRPOConfig(
            folder, per_device_train_batch_size=G, gradient_accumulation_steps=P, num_generations=G,
            max_steps=1, max_completion_length=max(lengths), learning_rate=1e-6, bf16=False, use_cpu=True,
            save_strategy="no", report_to=[], disable_tqdm=True, gradient_checkpointing=False,
            logging_strategy="no", shuffle_dataset=False,
        )
        reward = lambda completion_ids, **_: [score(ids) for ids in completion_ids]  # noqa: E731
        trl.GRPOTrainer(model, reward, config, rows, processing_class=words, callbacks=[Clock()]).train()
        return taken[-1]

    return step


def steps(folder: str, model: Llama, title: str, lengths: list[int], rounds: int) -> None:
    arms = {}
    try:
        arms["TRL"] = their_step(folder, lengths)
    except ImportError as error:
        print(f"TRL is not timed: {error}")
    arms["ours"] = our_step(model, lengths, True)
    arms["ours, a prompt before each rollout"] = our_step(model, lengths, False)
    race(title, arms, sum(lengths), rounds)


# ------------------------------------------------------------------------------------------------------------
# On a GPU: the 1B shape in bf16, random weights


def seconds(work) -> float:
    wait = (lambda: None) if TINY else torch.cuda.synchronize
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def decoding(model: Llama, slots=256, context=960, looks=8) -> None:
    """The bytes that a token per row must read, weights and cache, over what a large copy reaches."""
    slots, context, looks = (4, 16, 2) if TINY else (slots, context, looks)
    c, x = model.config, torch.empty(1 << (16 if TINY else 30), dtype=torch.uint8, device=DEVICE)
    y = x.clone()
    bandwidth = 2 * x.numel() / min(seconds(lambda: y.copy_(x)) for _ in range(10))
    ids = np.random.default_rng(0).integers(4, c.vocab_size, (slots, context)).tolist()
    rollout = Sampler(model, None, slots)._rollout(ids, 1, 1024, SamplingParams(), 0, ())
    with sampling_mode(model):
        rollout.step()  # prompts, the first tokens, and the graph
        took = seconds(lambda: [rollout.step() for _ in range(looks)])
    tokens = looks * rollout.look_every
    numbers = 2 * c.num_layers * c.num_kv_heads * c.head_dim  # per token
    cached = slots * (context + rollout.look_every + tokens / 2) * 2 * numbers
    share = (2 * c.num_params() + cached) * tokens / took / bandwidth
    said = f"| decode, {slots} rows, context about {context + tokens} |"
    print(f"{said} {slots * tokens / took:,.0f} tokens/s | {share:.2f} of what a copy reaches |", flush=True)


def tail(model: Llama, folder: str, n=1024, cap=2048) -> None:
    """n requests of long-tailed lengths, prompts of 64: ours in 256 slots, generate in batches."""
    n, cap = (8, 16) if TINY else (512, 1024) if QUICK else (n, cap)
    ids = np.random.default_rng(0).integers(4, model.config.vocab_size, (n, PROMPT)).tolist()
    lengths = long_tailed(n, cap)
    sampler = Sampler(model, None, slots=256)
    arms = {"ours, 256 slots": lambda: sampler.generate(ids, max_new_tokens=lengths, stop=())}
    if find_spec("transformers"):
        theirs = their_model(folder).to(DEVICE, torch.bfloat16)

        def static(size: int) -> None:
            for i in range(0, n, size):
                batch, longest = torch.tensor(ids[i : i + size], device=DEVICE), max(lengths[i : i + size])
                generate_exactly(theirs, batch, longest)

        sizes = (256,) if QUICK else (256, 64)
        arms |= {f"generate, batches of {size}": lambda size=size: static(size) for size in sizes}
    sampler.generate(ids[:256], max_new_tokens=4 if TINY else 16, stop=())  # compiles the kernels
    for name, work in arms.items():
        took = seconds(work)
        speed = f"{sum(lengths) / took:,.0f} tokens/s | {took:.1f} s"
        print(f"| {n} long-tailed requests, cap {cap}; {name} | {speed} |", flush=True)


def on_gpu() -> None:
    print("| what | speed | |\n| --- | --- | --- |")
    with torch.device(DEVICE):
        model = Llama(PRESETS[SHAPE])
    for p in model.parameters():  # on the card: init_weights() draws on one thread of the CPU
        torch.nn.init.ones_(p) if p.ndim == 1 else torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        if find_spec("transformers"):
            model.save_pretrained(folder)
        model = model.to(torch.bfloat16)
        model.compute_dtype = torch.bfloat16
        decoding(model)
        tail(model, folder)


def main() -> None:
    torch.set_num_threads(1)
    rounds = next((int(word) for word in sys.argv[1:] if word.isdigit()), 3)
    names = [name for name in ("torch", "transformers", "trl") if find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in names}
    print(f"{versions}, Python {platform.python_version()}, {torch.backends.cpu.get_cpu_capability()}")
    if TINY or torch.cuda.is_available():
        print("a CPU" if TINY else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
        return on_gpu()
    model = Llama(CONFIG).init_weights(0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = their_model(folder)
        greedy_or_not(model, theirs, rounds)
        refill(model, theirs, rounds)
        steps(folder, model, "GRPO step, 8 prompts x 16 rollouts x 128", [128] * (P * G), rounds)
        steps(folder, model, "GRPO step, 8 x 16, long-tailed, cap 256", long_tailed(P * G, 256), rounds)


if __name__ == "__main__":
    main()

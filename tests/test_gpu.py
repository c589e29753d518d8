"""On a card: CUDA graphs, decoding against training, FSDP2 over NCCL, compiled and recomputed blocks.

Without one the same checks run on a CPU as far as they make sense there, so that they are not first run on a
card. The kernels' own tests are in test_kernels.py. A machine with a GPU runs `bash tests/gpu.sh A`.
"""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import midtrain
import sample
from model import Llama, LlamaConfig
from sample import Sampler

ROOT = Path(__file__).parents[1]
CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CARD else "cpu")
CONFIG = LlamaConfig(512, 2, 128, 4, 2, 32, 256, rope_theta=10_000.0, max_position=512)
needs_card = pytest.mark.skipif(not CARD, reason="needs a GPU")


def small(dtype=torch.float32, compile=False, checkpointing=0) -> Llama:
    model = midtrain.add_options(Llama(CONFIG).init_weights(0).to(DEVICE), compile, checkpointing)
    model.compute_dtype = dtype
    return model


def prompts(n: int = 9) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(0)
    return [torch.randint(4, 512, (3 + 7 * i,), generator=numbers).tolist() for i in range(n)]


@needs_card
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("room", [None, 640], ids=["roomy", "tight"])
def test_a_recorded_step_draws_the_tokens_of_one_that_is_not(temperature, room):
    """tight: rows are preempted and go on later. The graphs are made again with every rollout."""
    found = []
    for graphs in (True, False, True):
        sampler = Sampler(small(), None, slots=8, cache_tokens=room)
        how = sample.decode_by_graph if graphs else sample.Rollout.decode
        with mock.patch.object(sample, "decode_by_graph", side_effect=how) as steps:
            groups = sampler.generate(prompts(), n=2, max_new_tokens=70, stop=(), temperature=temperature)
        assert steps.called
        found.append([(c.tokens, c.logprobs) for group in groups for c in group])
    assert found[0] == found[2]
    assert [tokens for tokens, _ in found[0]] == [tokens for tokens, _ in found[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_sampling_are_those_of_training(dtype):
    """What a rollout says of its tokens, beside a forward pass as the update makes it: one row at a time."""
    model, apart = small(dtype), []
    for prompt, group in zip(prompts(), Sampler(model, None, slots=8).generate(
            prompts(), n=2, max_new_tokens=40, stop=())):
        for c in group:
            ids = torch.tensor([prompt + c.tokens], device=DEVICE)
            with torch.no_grad():
                nll = model(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, 1:]))[0, len(prompt) - 1 :]
            apart.append((-nll.cpu() - torch.tensor(c.logprobs)).abs())
    apart = torch.cat(apart)
    assert apart.max() <= 1e-4 if dtype == torch.float32 else apart.mean() < 0.01, (apart.max(), apart.mean())


def gradients(model: Llama) -> list[torch.Tensor]:
    tokens = torch.randint(512, (2, 256), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    starts = (torch.arange(256, device=DEVICE) // 100 * 100).expand(2, 256).contiguous()
    total, _ = model(tokens, tokens.roll(-1, 1), starts, reduction="sum")
    total.backward()
    full = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return [total.detach(), *full]


def assert_near(a: list, b: list, bar: float) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x - y).norm() <= bar * y.norm(), (x - y).norm() / y.norm()


@contextmanager
def one_rank(tmp_path):
    """A mesh of one process: NCCL on a card."""
    store = f"file://{tmp_path}/store"
    dist.init_process_group("cpu:gloo,cuda:nccl" if CARD else "gloo", init_method=store, rank=0, world_size=1)
    try:
        yield midtrain.World(0, 2, DEVICE)  # 2: apply_fsdp() shards for no less
    finally:
        dist.destroy_process_group()


def test_fsdp2_over_one_rank_is_the_plain_model(tmp_path):
    plain = gradients(small())
    tokens = [c.tokens for (c,) in Sampler(small(), None).generate(prompts(), max_new_tokens=20, stop=())]
    with one_rank(tmp_path) as world:
        with mock.patch.object(dist, "init_device_mesh", lambda kind, shape, **_: _mesh(kind)):
            model = midtrain.apply_fsdp(small(), world, torch.float32)
        assert_near(gradients(model), plain, 1e-5)
        sampler = Sampler(model, None)
        with sample.unsharded(sampler):
            groups = sampler.generate(prompts(), max_new_tokens=20, stop=())
        assert [c.tokens for (c,) in groups] == tokens
        model.zero_grad()
        assert_near(gradients(model), plain, 1e-5)  # it trains on


def _mesh(kind):
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh(kind, [0])


@pytest.mark.parametrize("again", [1, 2])
def test_recomputed_blocks_give_the_same_bits(again):
    assert all(map(torch.equal, gradients(small(checkpointing=again)), gradients(small())))


@needs_card
@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("again", [0, 1, 2])
def test_compiled_blocks_are_the_plain_ones(dtype, bar, again):
    assert_near(gradients(small(dtype, compile=True, checkpointing=again)), gradients(small(dtype)), bar)


@needs_card
def test_a_repeated_step_has_the_same_bits():
    found = [gradients(small(torch.bfloat16, compile=True, checkpointing=1)) for _ in range(2)]
    assert all(map(torch.equal, *found))


# ------------------------------------------------------------------------------------------------------------
# The script of the first half hour

STAGES = ("machine", "kernels", "gpu-tests", "training", "programs", "kernel-bench", "tune", "decode")


def script(out, python: str, part: str = "dry") -> subprocess.CompletedProcess:
    environment = os.environ | {"OUT": str(out), "PYTHON": python}
    command = ["bash", str(ROOT / "tests/gpu.sh"), part]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_every_stage_of_the_script_runs_in_its_dry_form(tmp_path):
    pytest.importorskip("triton")
    done = script(tmp_path, sys.executable)
    table = (tmp_path / "table.md").read_text()
    assert done.returncode == 0, table + done.stdout[-3000:]
    assert re.findall(r"^### (\S+): ok", table, re.M) == [*STAGES]
    assert "| SIGTERM after step 3, until the process ended |" in table and "exit code 143 |" in table
    assert "| rl.py, 3 steps |" in table and "| compiled, recomputed | mixed |" in table


def test_a_stage_that_fails_stops_no_other(tmp_path):
    done = script(tmp_path, "false")
    assert done.returncode == 1 and "stages that failed: 8" in done.stdout
    assert re.findall(r"^### (\S+): exit code 1", (tmp_path / "table.md").read_text(), re.M) == [*STAGES]
    assert script(tmp_path, "false", "A").returncode == 2  # no card: nothing is begun
    assert script(tmp_path, "false", "").returncode == 2

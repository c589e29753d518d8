"""What the tests and the benchmark of the kernels share.

Compilation for a GPU that is not there, inputs, and exact references in float64.
"""

import contextlib
import inspect
import os
import re
import subprocess
import tempfile
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import model


def mend_interpreter() -> None:
    """Triton's interpreter before 3.7 makes an index of an array of one number, which NumPy 2.4 refuses. And
    every call of a function in a kernel searches the language for what to replace: here once a module."""
    import triton
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    plain, names = interpreter._patch_lang_tensor, {}

    def patch(tensor, scope) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    def patch_builtin(where, builder, scope) -> None:
        if where not in names:
            names[where] = [name for name, member in inspect.getmembers(where) if is_builtin(member)]
        for name in names[where]:
            if is_builtin(member := getattr(where, name)):  # not yet replaced
                interpreter._patch_attr(where, name, member, builder, scope)

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        interpreter._patch_lang_tensor = patch
    interpreter._patch_builtin = patch_builtin


if os.environ.get("TRITON_INTERPRET") == "1" and model.triton:
    mend_interpreter()

# ------------------------------------------------------------------------------------------------------------
# Compiled ahead of time: Triton's wheel carries NVIDIA's assembler and disassembler, so this needs no GPU

FP32_POINTERS = {
    "lse_ptr", "delta_ptr", "part_ptr", "rstd_ptr", "nll_ptr", "grad_ptr", "dw_ptr", "cos_ptr", "sin_ptr"
}
INTEGER_POINTERS = {
    "start_ptr": "*i64", "end_ptr": "*i32", "table_ptr": "*i32", "lengths_ptr": "*i64", "target_ptr": "*i64",
}
# bytes that one program may have (CUDA programming guide)
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def attention_jobs(capability: int, head_dims=model.HEAD_DIMS, more: dict | None = None) -> list[tuple]:
    """(name, kernel, constants, warps, stages) of the attention kernels in the tiles that are used.

    more: lists of tiles to add, by kernel and head_dim.
    """
    kernels = dict(forward=model._attention_forward, dq=model._attention_dq, dkdv=model._attention_dkdv)
    jobs = []
    for name, kernel in kernels.items():
        for D in head_dims:
            tiles = [tuple(model.tile(name, D, torch.bfloat16, (capability // 10, 0)).values())]
            tiles += more[name][D] if more else []
            for m, n, warps, stages in dict.fromkeys(tiles):
                constants = dict(H=8, K=2, D=D, BLOCK_M=m, BLOCK_N=n)
                if name == "dkdv":
                    meta = dict(num_warps=warps, num_stages=stages)
                    constants["STAGES"] = model.stages_of_all_loads(D, meta)
                jobs.append((f"attention {name} {D} {m}x{n}", kernel, constants, warps, stages))
    return jobs


def other_jobs(widths=(128, 2048, 3072, 4096), decode_tiles=(model.DECODE_TILE,)) -> list[tuple]:
    """The same for the other kernels, in the shapes of the 1B and 3B Llama and of a narrow one."""
    jobs = []
    for N in widths:
        meta = model._rows_per_program(N)
        warps = meta.pop("num_warps")
        forward, backward = dict(N=N, EPS=1e-5, ADD=True, **meta), dict(N=N, ADD=True, **meta)
        jobs.append((f"rms_norm forward {N}", model._rms_norm_forward, forward, warps, 3))
        jobs.append((f"rms_norm backward {N}", model._rms_norm_backward, backward, warps, 3))
    for H, K, D in ((32, 8, 64), (24, 8, 128)):
        for n, warps, stages in decode_tiles:
            constants = dict(H=H, K=K, D=D, HEADS=16, SPLIT=model.DECODE_SPLIT, BLOCK_N=n, ALIGNED=True)
            jobs.append((f"decode {D} {n}", model._decode_pieces, constants, warps, stages))
        constants = dict(H=H, D=D, SPLIT=model.DECODE_SPLIT)
        jobs.append((f"decode merge {D}", model._decode_merge, constants, 1, 3))
        jobs.append((f"rope {D}", model._rope_to_cache, dict(H=H, K=K, D=D, HEADS=4), 1, 3))
    block, warps = model._NLL_TILE.values()
    jobs.append(("nll forward", model._nll_forward, dict(V=128_256, BLOCK=block), warps, 3))
    for ones in (False, True):
        jobs.append((f"nll backward {ones}", model._nll_backward, dict(ONES=ones, BLOCK=block), warps, 3))
    return jobs


def compile_for(
    capability: int, kernel, constants: dict, warps: int, stages: int, dtype="bf16", scalar="fp32", ones=False
):
    """Triton's compilation for a chip, as a launch would do it.

    Tensors are aligned to 16 bytes, and sizes are divisible by 16; ones: sizes are 1 instead.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned, constants = {}, {}, dict(constants)
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name == "temperature":
            signature[name] = scalar
        elif ones and not name.endswith("_ptr"):
            signature[name], constants[name] = "constexpr", 1
        else:
            fp32 = name in FP32_POINTERS or (kernel is model._decode_pieces and name == "o_ptr")
            pointer = INTEGER_POINTERS.get(name) or ("*fp32" if fp32 else f"*{dtype}")
            signature[name] = pointer if name.endswith("_ptr") else "i32"
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, GPUTarget("cuda", capability, 32), dict(num_warps=warps, num_stages=stages))


def resources(compiled) -> dict:
    """Registers per thread, bytes spilled, bytes of shared memory, matrix and fp64 instructions."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spill_code": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": compiled.metadata.shared,
        "matrix": sorted(set(re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", code))),
        "fp64": sorted(set(re.findall(r"\b(DADD|DMUL|DFMA|DMNMX|DSETP)\b", code))),
    }


# ------------------------------------------------------------------------------------------------------------
# Inputs and references


def guarded(*shape: int, dtype=torch.float32, device="cpu", scale=1.0, seed=0) -> Tensor:
    """Random numbers with NaN in the memory before and after, so that a read outside shows in the result."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    n, margin = values.numel(), 4096
    memory = torch.full((n + 2 * margin,), torch.nan, dtype=dtype, device=device)
    memory[margin : margin + n] = values.flatten().to(device, dtype)
    return memory[margin : margin + n].view(shape)


def documents(batch: list[list[int]], device="cpu") -> Tensor:
    """doc_start (B, T) of rows that hold documents of these lengths."""
    rows = []
    for lengths in batch:
        starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
        rows.append(starts.repeat_interleave(torch.tensor(lengths)))
    return torch.stack(rows).to(device)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor) -> tuple[Tensor, Tensor]:
    """o and log-sum-exp in float64, from the definition."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores + model.document_mask(doc_start, torch.float64)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def exact_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    s = x.double() if residual is None else x.double() + residual.double()
    return s * (s.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double(), s


def exact_nll(h: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = h.double() @ weight.double().t() / temperature
    return F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="none")


def error(value: Tensor, exact: Tensor) -> float:
    """Relative distance ‖value - exact‖ / ‖exact‖; NaN never passes a comparison with it."""
    return ((value.double() - exact).norm() / exact.norm()).item()


@contextlib.contextmanager
def canaries():
    """Outputs of the operators lie between numbers that nobody may change, and are NaN until written."""
    memories, plain_like, plain_empty = [], torch.empty_like, Tensor.new_empty

    def guard(shape, dtype, device):
        n = torch.Size(shape).numel()
        memory = torch.full((n + 2 * 4096,), 77.0, dtype=dtype, device=device)
        memory[4096 : 4096 + n] = torch.nan
        memories.append(memory)
        return memory[4096 : 4096 + n].view(shape)

    def empty_like(x, **kwargs):  # with a device it is the interpreter that asks
        return plain_like(x, **kwargs) if kwargs else guard(x.shape, x.dtype, x.device)

    def new_empty(self, *shape, dtype=None, **kwargs):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        if kwargs:
            return plain_empty(self, shape, **kwargs)
        return guard(shape, dtype or self.dtype, self.device)

    patch = mock.patch.object
    with patch(torch, "empty_like", empty_like), patch(Tensor, "new_empty", new_empty):
        yield
    assert memories, "no output was made"
    for memory in memories:
        ends = torch.cat((memory[:4096], memory[-4096:]))
        assert (ends == 77).all(), "a kernel wrote outside its output"

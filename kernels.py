"""The operations a decoder spends its time in: plain PyTorch references, Triton kernels, and their benchmark: `python kernels.py`.

Each operation stands as reference -> kernels -> autograd -> public function; the public function takes the kernels where
`use_triton` says so (a GPU with Triton) and the reference elsewhere. Shapes: B sequences, T queries, S keys, H query heads,
KV key/value heads, G = H / KV, D channels a head, R rotated channels, V words of the vocabulary. Softmax, norms and losses
are computed in float32 (or what is wider) whatever the input type.

    attention(q (B, T, H, D), k, v (B, S, KV, D), scale, causal, window, documents, kv_start, kv_len, blocksparse, mask)
    attention_mask(T, S, window, documents, kv_start, kv_len, blocksparse, num_heads, device)   once a forward, for CPUs
    document_bounds(documents (B, T)) -> (2, B, T)                               once a forward, for attention's documents=
    rotary(q, k, cos, sin)                       cos, sin (T, R/2) or (B, T, R/2); split qkv by torch.split, not by slices
    rms_norm(x, weight, eps, residual=None), layer_norm(x, weight, bias, eps, residual=None) -> y, or (y, x + residual)
    swiglu, geglu, geglu_clamped (gate_up (..., 2F)), gelu (x)
    cross_entropy(x (..., d), weight (V, d), targets (...), weights=None, bias=None) -> (sum in nats, sum of weights)
    quantize(weight (N, K), bits, group) -> (qweight, scale, zero), dequantize, quantized_linear, pack_for_cpu
"""
from __future__ import annotations  # so that annotations name tl.constexpr where Triton is missing too

import contextlib
import datetime
import functools
import math
import os
import warnings

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs kernels on CPU tensors, slowly, to check their numbers
LOG2E = math.log2(math.e)
LN2 = math.log(2)

jit = triton.jit if triton else lambda function: function


# ---------------------------------------------------------------- where the kernels run

@functools.cache
def _warn_no_triton() -> None:
    warnings.warn("Triton is not installed, so plain PyTorch serves the GPU; pip install triton makes it faster")


def use_triton(x) -> bool:
    """Whether tensors on x's device go through the Triton kernels."""
    if x.is_cuda and not triton:
        _warn_no_triton()
    return bool(triton) and (x.is_cuda or INTERPRETED)


def fuses(x) -> bool:
    """The same for what a compiled block fuses by itself from the references: only outside of one."""
    return use_triton(x) and not torch.compiler.is_compiling()


def launch(kernel, grid: tuple, *args, **constants) -> None:
    """Run a kernel on the device of its first argument: by itself Triton takes the current one, whatever the tensors are on."""
    x = args[0]
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[grid](*args, **constants)


def num_sms(x) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 6


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- attention: references and masks

def document_bounds(documents):
    """(B, T) ids, each run of equal ones being a document -> int32 (2, B, T): where each token's document begins and ends."""
    T = documents.shape[1]
    columns = torch.arange(T, device=documents.device).expand_as(documents)
    changes = documents[:, 1:] != documents[:, :-1]
    begins = torch.where(F.pad(changes, (1, 0)), columns, 0).cummax(1).values
    ends = torch.where(F.pad(changes, (0, 1)), columns + 1, T).flip(1).cummin(1).values.flip(1)
    return torch.stack((begins, ends)).int()


def attention_mask(T: int, S: int, *, window=None, documents=None, kv_start=None, kv_len=None, blocksparse=None,
                   num_heads: int = 1, device=None):
    """What attention's arguments of the same names let T queries see of S keys: bool (B or 1, 1 or num_heads, T, S).

    None where causality says it all and T is 1 or S.
    """
    if blocksparse and S <= blocksparse[0] * blocksparse[1]:
        blocksparse = None
    windowed = window is not None and window < S
    if not windowed and documents is None and kv_start is None and kv_len is None and not blocksparse and T in (1, S):
        return None
    keys = torch.arange(S, device=device)
    length = torch.as_tensor(S if kv_len is None else kv_len, device=device).reshape(-1, 1)
    positions = (torch.arange(T, device=device) + length - T)[:, :, None]          # (B or 1, T, 1)
    visible = keys <= positions                                                    # (B or 1, T, S)
    if windowed:
        visible = visible & (keys > positions - window)
    if documents is not None:
        visible = visible & (keys >= documents[0, :, :, None])
    origin = 0
    if kv_start is not None:
        origin = kv_start[:, None, None]
        # padding sees itself, since a softmax over nothing is not a number
        visible = visible & ((keys >= origin) | (keys == positions))
    visible = visible[:, None]                                                     # (B or 1, 1, T, S)
    if blocksparse:
        block, local, stride = blocksparse
        key_block = ((keys - origin) // block).expand(visible.shape[0], 1, S)[:, None]
        query_block = ((positions - origin) // block)[:, None]
        heads = torch.arange(num_heads, device=device)[:, None, None]
        visible = visible & ((query_block - key_block < local) | ((key_block + heads + 1) % stride == 0))
    return visible


def attention_reference(q, k, v, scale: float, mask=None):
    """q (B, T, H, D), k and v (B, S, KV, D), mask bool or additive -> (B, T, H, D). Two batched products; query heads that
    share a key head are folded into T, so that keys are not repeated."""
    B, T, H, D = q.shape
    S, KV = k.shape[1:3]
    q = (q * scale).transpose(1, 2).reshape(B, KV, H // KV * T, D)                 # (B, T, H, D) -> (B, KV, G·T, D)
    k, v = k.transpose(1, 2), v.transpose(1, 2)                                    # (B, KV, S, D)
    scores = at_least_float32(q @ k.transpose(2, 3))                               # (B, KV, G·T, S)
    if mask is not None:
        scores = scores.view(B, H, T, S)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        scores = scores.view(B, KV, H // KV * T, S)
    y = scores.softmax(-1).to(v.dtype) @ v                                         # (B, KV, G·T, D)
    return y.view(B, H, T, D).transpose(1, 2)


def _attention_torch(q, k, v, scale: float, causal: bool, mask):
    """Attention without our kernels: PyTorch's fused attention, or the reference where that is slow."""
    grad = torch.is_grad_enabled() and q.requires_grad
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and (grad or q.shape[1] <= 16):
        if causal and mask is None:
            T = q.shape[1]
            mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        return attention_reference(q, k, v, scale, mask)  # 3 to 4 times faster on CPUs
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=True)
    return y.transpose(1, 2)


# ---------------------------------------------------------------- attention: Triton kernels

# Every mask is an interval of keys [low, high) for each query, its own position being high - 1. A block of queries sweeps its keys
# in three phases: a masked head, where some queries do not look back so far, an unmasked interior, and a masked tail at the diagonal.
# Blocksparse attention (phi-3-small) adds a sweep over its vertical blocks and a condition in the masked phases.
# Head sizes are held as HEAD + TAIL channels, 96 as 64 + 32, so that they do not pay for 128.

SPARSE_BLOCK = 16 if INTERPRETED else 64  # the kernels' tiles of keys are phi-3-small's blocks
NO_WINDOW = 2 ** 30


def attention_configs(kernel: str) -> list:
    """(BLOCK_M, BLOCK_N, warps, stages) to choose from; what does not fit a chip's shared memory falls out in `fitting_configs`."""
    if INTERPRETED:
        shapes = [(32, 16, 4, 1)]
    elif kernel == "dkdv":
        shapes = [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)]
    elif kernel == "dq":
        shapes = [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 1), (32, 32, 4, 1)]
    else:
        shapes = [(128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 1)]
    return [triton.Config(dict(BLOCK_M=m, BLOCK_N=n), num_warps=warps, num_stages=stages) for m, n, warps, stages in shapes]


def shared_bytes(kernel: str, config, D: int) -> int:
    """Shared memory that a kernel needs, in bytes: its own rows and the ring of rows that it sweeps, 2 bytes a number."""
    m, n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    rows = {"fwd": m + 2 * n * config.num_stages, "dq": 2 * m + 2 * n * config.num_stages, "dkdv": 2 * n + 2 * m * config.num_stages}[kernel]
    return 2 * rows * D + (0 if kernel == "fwd" else 4 * m * n)


def fitting_configs(kernel: str, configs: list, D: int, sparse: bool, limit: int) -> list:
    return [c for c in configs if shared_bytes(kernel, c, D) <= limit and (not sparse or c.kwargs["BLOCK_N"] == SPARSE_BLOCK)]


def autotuned(kernel: str):
    """Time `attention_configs` on first use, once for each head size, kind of ranges and type."""
    def prune(configs, args, **constants):
        limit = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
        return fitting_configs(kernel, configs, constants["D"], constants["STRIDE"] > 0, limit)

    def decorate(function):
        if triton is None:
            return function
        tuner = triton.autotune(attention_configs(kernel), ["D", "RANGES", "STRIDE"], prune_configs_by={"early_config_prune": prune})
        return tuner(jit(function))
    return decorate


@jit
def _load_tile(X, start, count, stride, D: tl.constexpr, ROWS: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr,
               MASKED: tl.constexpr):
    """Channels OFFSET to OFFSET + WIDTH of ROWS rows from `start` on; zeros beyond `count` rows and D channels."""
    rows = tl.arange(0, ROWS)
    dims = OFFSET + tl.arange(0, WIDTH)
    X += tl.cast(start, tl.int64) * stride  # tokens times row stride pass 2^31
    pointers = X + rows[:, None] * stride + dims[None, :]
    if MASKED or OFFSET + WIDTH > D:
        return tl.load(pointers, mask=(start + rows < count)[:, None] & (dims < D)[None, :], other=0.0)
    return tl.load(pointers)


@jit
def _store_tile(X, tile, start, count, stride, D: tl.constexpr, OFFSET: tl.constexpr):
    rows = tl.arange(0, tile.shape[0])
    dims = OFFSET + tl.arange(0, tile.shape[1])
    X += tl.cast(start, tl.int64) * stride
    inside = (start + rows < count)[:, None] & (dims < D)[None, :]
    tl.store(X + rows[:, None] * stride + dims[None, :], tile.to(X.dtype.element_ty), mask=inside)


@jit
def _first_keys(DOC_START, KV_START, b, rows, T, offset, window):
    """The first key that each of these queries sees."""
    rows = tl.minimum(rows, T - 1)
    positions = rows + offset
    low = tl.maximum(positions - window + 1, 0)
    if DOC_START is not None:
        low = tl.maximum(low, tl.load(DOC_START + b * T + rows))
    if KV_START is not None:
        low = tl.maximum(low, tl.minimum(tl.load(KV_START + b).to(tl.int32), positions))  # padding sees itself
    return low


@jit
def _visible(positions, low, keys, origin, head, RANGES: tl.constexpr, BLOCK: tl.constexpr, LOCAL: tl.constexpr,
             STRIDE: tl.constexpr):
    """Which keys these queries see; all shapes broadcast."""
    visible = keys <= positions
    if RANGES:
        visible = visible & (keys >= low)
    if STRIDE > 0:
        key_block = (keys - origin) // BLOCK
        distance = (positions - origin) // BLOCK - key_block
        visible = visible & ((distance < LOCAL) | ((key_block + head + 1) % STRIDE == 0))
    return visible


@jit
def _attn_inner(acc, acc_tail, m_i, l_i, q, q_tail, do, do_tail, K, V, k_t, v_t, begin, end, step, positions, low, origin, head,
                scale, S, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, RANGES: tl.constexpr, BLOCK: tl.constexpr,
                LOCAL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, BACKWARD: tl.constexpr):
    """Queries over the tiles of keys from begin to end: online softmax (Dao et al., arXiv 2205.14135, algorithm 1) with the sums
    acc, l_i and the maxima m_i, in units of log2. BACKWARD: acc is dQ, m_i the log2 of the softmax's denominators, l_i the row
    sums of the output times its gradient do."""
    for start in range(begin, end, step):
        k = _load_tile(K, start, S, k_t, D, BLOCK_N, 0, HEAD, MASKED)
        v = _load_tile(V, start, S, v_t, D, BLOCK_N, 0, HEAD, MASKED)
        scores = tl.dot(q, tl.trans(k))                                            # (M, N)
        if TAIL > 0:
            k_tail = _load_tile(K, start, S, k_t, D, BLOCK_N, HEAD, TAIL, MASKED)
            v_tail = _load_tile(V, start, S, v_t, D, BLOCK_N, HEAD, TAIL, MASKED)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores)
        scores *= scale
        if MASKED:
            keys = start + tl.arange(0, BLOCK_N)
            visible = _visible(positions[:, None], low[:, None], keys[None, :], origin, head, RANGES, BLOCK, LOCAL, STRIDE)
            scores = tl.where(visible, scores, float("-inf"))
        if BACKWARD:
            dp = tl.dot(do, tl.trans(v))
            if TAIL > 0:
                dp = tl.dot(do_tail, tl.trans(v_tail), dp)
            ds = (tl.exp2(scores - m_i[:, None]) * (dp - l_i[:, None])).to(k.dtype)
            acc = tl.dot(ds, k, acc)
            if TAIL > 0:
                acc_tail = tl.dot(ds, k_tail, acc_tail)
        else:
            m_new = tl.maximum(m_i, tl.max(scores, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new  # of a row that has seen nothing yet
            p = tl.exp2(scores - m_safe[:, None])
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, 1)
            p = p.to(v.dtype)
            acc = tl.dot(p, v, acc * alpha[:, None])
            if TAIL > 0:
                acc_tail = tl.dot(p, v_tail, acc_tail * alpha[:, None])
            m_i = m_new
    return acc, acc_tail, m_i, l_i


@jit
def _attn_sweep(acc, acc_tail, m_i, l_i, q, q_tail, do, do_tail, K, V, k_t, v_t, row_start, offset, low, origin, head, scale, S,
                length, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, RANGES: tl.constexpr, BLOCK: tl.constexpr,
                LOCAL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BACKWARD: tl.constexpr):
    """_attn_inner over all keys of BLOCK_M queries, phase by phase."""
    first = row_start + offset  # position of the first query
    last = tl.minimum(first + BLOCK_M, length) - 1
    positions = first + tl.arange(0, BLOCK_M)
    begin = tl.min(low, 0) if RANGES else 0
    whole = tl.max(low, 0) if RANGES else 0  # from here on every query looks back
    if STRIDE > 0:
        near_block = tl.maximum((first - origin) // BLOCK - LOCAL + 1, 0)
        near = origin + near_block * BLOCK
        column = (STRIDE - (head + 1) % STRIDE) % STRIDE
        # vertical blocks lie so far back that all these queries see them
        acc, acc_tail, m_i, l_i = _attn_inner(
            acc, acc_tail, m_i, l_i, q, q_tail, do, do_tail, K, V, k_t, v_t, origin + column * BLOCK, near, STRIDE * BLOCK,
            positions, low, origin, head, scale, S, D, HEAD, TAIL, RANGES, BLOCK, LOCAL, STRIDE, BLOCK_N, RANGES, BACKWARD)
        begin = tl.maximum(begin, near)
        whole = tl.maximum(whole, near + ((last - origin) // BLOCK - (first - origin) // BLOCK) * BLOCK)
    interior = begin + (tl.maximum(whole - begin, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    tail = interior + tl.maximum(first + 1 - interior, 0) // BLOCK_N * BLOCK_N
    if RANGES or STRIDE > 0:
        acc, acc_tail, m_i, l_i = _attn_inner(
            acc, acc_tail, m_i, l_i, q, q_tail, do, do_tail, K, V, k_t, v_t, begin, tl.minimum(interior, last + 1), BLOCK_N,
            positions, low, origin, head, scale, S, D, HEAD, TAIL, RANGES, BLOCK, LOCAL, STRIDE, BLOCK_N, True, BACKWARD)
    acc, acc_tail, m_i, l_i = _attn_inner(
        acc, acc_tail, m_i, l_i, q, q_tail, do, do_tail, K, V, k_t, v_t, interior, tail, BLOCK_N,
        positions, low, origin, head, scale, S, D, HEAD, TAIL, RANGES, BLOCK, LOCAL, STRIDE, BLOCK_N, False, BACKWARD)
    return _attn_inner(
        acc, acc_tail, m_i, l_i, q, q_tail, do, do_tail, K, V, k_t, v_t, tail, last + 1, BLOCK_N,
        positions, low, origin, head, scale, S, D, HEAD, TAIL, RANGES, BLOCK, LOCAL, STRIDE, BLOCK_N, True, BACKWARD)


@autotuned("fwd")
def _attn_fwd(Q, K, V, OUT, LSE, DOC_START, KV_START, KV_LEN, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, len_b,
              T, S, window, scale, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
              RANGES: tl.constexpr, BLOCK: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):
    """One program: BLOCK_M queries of one head -> OUT and LSE, the log2 of the softmax's denominators."""
    row_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows first
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    length = S if KV_LEN is None else tl.load(KV_LEN + b * len_b).to(tl.int32)
    origin = 0 if KV_START is None else tl.load(KV_START + b).to(tl.int32)
    rows = row_start + tl.arange(0, BLOCK_M)
    low = _first_keys(DOC_START, KV_START, b, rows, T, length - T, window)
    Q += b * q_b + h * q_h
    q = _load_tile(Q, row_start, T, q_t, D, BLOCK_M, 0, HEAD, True)
    q_tail = _load_tile(Q, row_start, T, q_t, D, BLOCK_M, HEAD, TAIL, True) if TAIL > 0 else q
    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, TAIL if TAIL > 0 else 16), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc, acc_tail, m_i, l_i = _attn_sweep(
        acc, acc_tail, m_i, l_i, q, q_tail, q, q_tail, K + b * k_b + h // G * k_h, V + b * v_b + h // G * v_h, k_t, v_t, row_start,
        length - T, low, origin, h.to(tl.int32), scale, S, length, D, HEAD, TAIL, RANGES, BLOCK, LOCAL, STRIDE, BLOCK_M, BLOCK_N, False)
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    OUT += b * o_b + h * o_h
    _store_tile(OUT, acc / l_i[:, None], row_start, T, o_t, D, 0)
    if TAIL > 0:
        _store_tile(OUT, acc_tail / l_i[:, None], row_start, T, o_t, D, HEAD)
    tl.store(LSE + (b * H + h) * T + rows, m_i + tl.log2(l_i), mask=rows < T)


@autotuned("dq")
def _attn_bwd_dq(Q, K, V, OUT, DO, LSE, DELTA, DQ, DOC_START, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, do_b, do_t,
                 do_h, T, S, window, scale, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
                 TAIL: tl.constexpr, RANGES: tl.constexpr, BLOCK: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: BLOCK_M queries of one head -> DQ, laid out as OUT, and DELTA, the row sums of the output times its gradient."""
    row_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    rows = row_start + tl.arange(0, BLOCK_M)
    low = _first_keys(DOC_START, None, b, rows, T, S - T, window)
    Q += b * q_b + h * q_h
    OUT += b * o_b + h * o_h
    DQ += b * o_b + h * o_h
    DO += b * do_b + h * do_h
    q = _load_tile(Q, row_start, T, q_t, D, BLOCK_M, 0, HEAD, True)
    do = _load_tile(DO, row_start, T, do_t, D, BLOCK_M, 0, HEAD, True)
    out = _load_tile(OUT, row_start, T, o_t, D, BLOCK_M, 0, HEAD, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    q_tail = q
    do_tail = do
    if TAIL > 0:
        q_tail = _load_tile(Q, row_start, T, q_t, D, BLOCK_M, HEAD, TAIL, True)
        do_tail = _load_tile(DO, row_start, T, do_t, D, BLOCK_M, HEAD, TAIL, True)
        out = _load_tile(OUT, row_start, T, o_t, D, BLOCK_M, HEAD, TAIL, True)
        delta += tl.sum(out.to(tl.float32) * do_tail.to(tl.float32), 1)
    lse = tl.load(LSE + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    tl.store(DELTA + (b * H + h) * T + rows, delta, mask=rows < T)
    dq = tl.zeros((BLOCK_M, HEAD), tl.float32)
    dq_tail = tl.zeros((BLOCK_M, TAIL if TAIL > 0 else 16), tl.float32)
    dq, dq_tail, lse, delta = _attn_sweep(
        dq, dq_tail, lse, delta, q, q_tail, do, do_tail, K + b * k_b + h // G * k_h, V + b * v_b + h // G * v_h, k_t, v_t, row_start,
        S - T, low, 0, h.to(tl.int32), scale, S, S, D, HEAD, TAIL, RANGES, BLOCK, LOCAL, STRIDE, BLOCK_M, BLOCK_N, True)
    to_natural = scale * 0.6931471805599453  # the scale's log2(e) belongs to the exponent alone
    _store_tile(DQ, dq * to_natural, row_start, T, o_t, D, 0)
    if TAIL > 0:
        _store_tile(DQ, dq_tail * to_natural, row_start, T, o_t, D, HEAD)


@jit
def _dkdv_inner(dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, Q, DO, LSE, DELTA, DOC_START, b, q_t, do_t, begin, end, keys, head,
                offset, window, T, scale, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, RANGES: tl.constexpr,
                BLOCK: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):
    """A tile of keys over the queries from begin to end, everything transposed."""
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < T
        q = _load_tile(Q, start, T, q_t, D, BLOCK_M, 0, HEAD, MASKED)
        do = _load_tile(DO, start, T, do_t, D, BLOCK_M, 0, HEAD, MASKED)
        scores = tl.dot(k, tl.trans(q))                                            # (N, M)
        dp = tl.dot(v, tl.trans(do))
        if TAIL > 0:
            q_tail = _load_tile(Q, start, T, q_t, D, BLOCK_M, HEAD, TAIL, MASKED)
            do_tail = _load_tile(DO, start, T, do_t, D, BLOCK_M, HEAD, TAIL, MASKED)
            scores = tl.dot(k_tail, tl.trans(q_tail), scores)
            dp = tl.dot(v_tail, tl.trans(do_tail), dp)
        lse = tl.load(LSE + rows, mask=inside, other=0.0)
        delta = tl.load(DELTA + rows, mask=inside, other=0.0)
        p = tl.exp2(scores * scale - lse[None, :])
        if MASKED:
            low = _first_keys(DOC_START, None, b, rows, T, offset, window)
            visible = _visible((rows + offset)[None, :], low[None, :], keys[:, None], 0, head, RANGES, BLOCK, LOCAL, STRIDE)
            p = tl.where(visible & inside[None, :], p, 0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        p = p.to(do.dtype)
        dv = tl.dot(p, do, dv)
        dk = tl.dot(ds, q, dk)
        if TAIL > 0:
            dv_tail = tl.dot(p, do_tail, dv_tail)
            dk_tail = tl.dot(ds, q_tail, dk_tail)
    return dk, dk_tail, dv, dv_tail


@jit
def _last_query(DOC_END, b, key, T, offset, window):
    """One past the last query that sees this key."""
    end = tl.minimum(key - offset + window, T)
    if DOC_END is not None:
        end = tl.minimum(end, tl.load(DOC_END + b * T + key))
    return end


@autotuned("dkdv")
def _attn_bwd_dkdv(Q, K, V, DO, LSE, DELTA, DK, DV, DOC_START, DOC_END, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
                   dk_b, dk_t, dk_h, T, S, window, scale, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
                   TAIL: tl.constexpr, RANGES: tl.constexpr, BLOCK: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: BLOCK_N keys of one key/value head -> DK and DV, summed over its G query heads, so that nothing is added
    atomically."""
    KV: tl.constexpr = H // G
    key_start = tl.program_id(1) * BLOCK_N
    b = (tl.program_id(0) // KV).to(tl.int64)
    kv = (tl.program_id(0) % KV).to(tl.int64)
    keys = key_start + tl.arange(0, BLOCK_N)
    offset = S - T
    K += b * k_b + kv * k_h
    V += b * v_b + kv * v_h
    k = _load_tile(K, key_start, S, k_t, D, BLOCK_N, 0, HEAD, True)
    v = _load_tile(V, key_start, S, v_t, D, BLOCK_N, 0, HEAD, True)
    k_tail = _load_tile(K, key_start, S, k_t, D, BLOCK_N, HEAD, TAIL, True) if TAIL > 0 else k
    v_tail = _load_tile(V, key_start, S, v_t, D, BLOCK_N, HEAD, TAIL, True) if TAIL > 0 else v
    dk = tl.zeros((BLOCK_N, HEAD), tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD), tl.float32)
    dk_tail = tl.zeros((BLOCK_N, TAIL if TAIL > 0 else 16), tl.float32)
    dv_tail = tl.zeros((BLOCK_N, TAIL if TAIL > 0 else 16), tl.float32)
    last_key = tl.minimum(key_start + BLOCK_N, S) - 1
    all_end = _last_query(DOC_END, b, key_start, T, offset, window)  # queries before it, if after all keys, see all of them
    end = _last_query(DOC_END, b, last_key, T, offset, window)
    begin = tl.maximum(key_start - offset, 0)
    interior = begin + (tl.maximum(last_key - offset - begin, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    for g in range(G):
        h = kv * G + g
        if STRIDE > 0:
            block = key_start // BLOCK
            vertical = (block + h.to(tl.int32) + 1) % STRIDE == 0
            local_end = tl.where(vertical, T, (block + LOCAL) * BLOCK - offset)
            all_end = tl.minimum(_last_query(DOC_END, b, key_start, T, offset, window), local_end)
            end = tl.minimum(_last_query(DOC_END, b, last_key, T, offset, window), local_end)
        tail = interior + tl.maximum(all_end - interior, 0) // BLOCK_M * BLOCK_M
        Q_h = Q + b * q_b + h * q_h
        DO_h = DO + b * do_b + h * do_h
        LSE_h = LSE + (b * H + h) * T
        DELTA_h = DELTA + (b * H + h) * T
        head = h.to(tl.int32)
        dk, dk_tail, dv, dv_tail = _dkdv_inner(
            dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, Q_h, DO_h, LSE_h, DELTA_h, DOC_START, b, q_t, do_t, begin,
            tl.minimum(interior, end), keys, head, offset, window, T, scale, D, HEAD, TAIL, RANGES, BLOCK, LOCAL, STRIDE, BLOCK_M, True)
        dk, dk_tail, dv, dv_tail = _dkdv_inner(
            dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, Q_h, DO_h, LSE_h, DELTA_h, DOC_START, b, q_t, do_t, interior,
            tail, keys, head, offset, window, T, scale, D, HEAD, TAIL, RANGES, BLOCK, LOCAL, STRIDE, BLOCK_M, False)
        dk, dk_tail, dv, dv_tail = _dkdv_inner(
            dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, Q_h, DO_h, LSE_h, DELTA_h, DOC_START, b, q_t, do_t, tail,
            end, keys, head, offset, window, T, scale, D, HEAD, TAIL, RANGES, BLOCK, LOCAL, STRIDE, BLOCK_M, True)
    DK += b * dk_b + kv * dk_h
    DV += b * dk_b + kv * dk_h
    dk *= scale * 0.6931471805599453
    dk_tail *= scale * 0.6931471805599453
    _store_tile(DK, dk, key_start, S, dk_t, D, 0)
    _store_tile(DV, dv, key_start, S, dk_t, D, 0)
    if TAIL > 0:
        _store_tile(DK, dk_tail, key_start, S, dk_t, D, HEAD)
        _store_tile(DV, dv_tail, key_start, S, dk_t, D, HEAD)


@jit
def _attn_decode(Q, K, V, PART, STATS, KV_START, KV_LEN, k_b, k_t, k_h, v_b, v_t, v_h, len_b, T, S, window, scale, KV: tl.constexpr,
                 G: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, RANGES: tl.constexpr,
                 BLOCK: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: all queries of one key/value head, T · G rows, over one split of the keys -> their unnormalized sums PART and
    (m_i, l_i). The splits are of the keys that there are now, so that all programs work at any length."""
    pair = tl.program_id(0).to(tl.int64)
    b = pair // KV
    kv = pair % KV
    rows = tl.arange(0, ROWS)
    tokens = tl.minimum(rows // G, T - 1)
    heads = (kv * G).to(tl.int32) + rows % G
    length = S if KV_LEN is None else tl.load(KV_LEN + b * len_b).to(tl.int32)
    origin = 0 if KV_START is None else tl.load(KV_START + b).to(tl.int32)
    low = _first_keys(None, KV_START, b, tokens, T, length - T, window)
    begin = tl.min(low, 0)
    blocks = (length - begin + BLOCK_N - 1) // BLOCK_N
    split_size = (blocks + tl.num_programs(1) - 1) // tl.num_programs(1) * BLOCK_N
    begin += tl.program_id(1) * split_size
    end = tl.minimum(begin + split_size, length)
    Q += pair * T * G * D
    q = _load_tile(Q, 0, T * G, D, D, ROWS, 0, HEAD, True)
    q_tail = _load_tile(Q, 0, T * G, D, D, ROWS, HEAD, TAIL, True) if TAIL > 0 else q
    acc = tl.zeros((ROWS, HEAD), tl.float32)
    acc_tail = tl.zeros((ROWS, TAIL if TAIL > 0 else 16), tl.float32)
    m_i = tl.full((ROWS,), float("-inf"), tl.float32)
    l_i = tl.zeros((ROWS,), tl.float32)
    acc, acc_tail, m_i, l_i = _attn_inner(
        acc, acc_tail, m_i, l_i, q, q_tail, q, q_tail, K + b * k_b + kv * k_h, V + b * v_b + kv * v_h, k_t, v_t, begin, end, BLOCK_N,
        tokens + length - T, low, origin, heads[:, None], scale, S, D, HEAD, TAIL, RANGES, BLOCK, LOCAL, STRIDE,
        BLOCK_N, True, False)
    row = pair * T * G
    split = tl.program_id(1) * D
    stride = tl.num_programs(1) * D
    PART += row * stride + split
    _store_tile(PART, acc, 0, T * G, stride, D, 0)
    if TAIL > 0:
        _store_tile(PART, acc_tail, 0, T * G, stride, D, HEAD)
    STATS += ((row + rows) * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(STATS, m_i, mask=rows < T * G)
    tl.store(STATS + 1, l_i, mask=rows < T * G)


@jit
def _combine_splits(PART, STATS, OUT, num_splits, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One program a row: its splits' sums, weighed by their maxima."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    dims = tl.arange(0, WIDTH)
    STATS += row * num_splits * 2
    m_i = tl.load(STATS + split * 2, mask=split < num_splits, other=float("-inf"))
    l_i = tl.load(STATS + split * 2 + 1, mask=split < num_splits, other=0.0)
    alpha = tl.exp2(m_i - tl.max(m_i, 0))
    acc = _load_tile(PART + row * num_splits * D, 0, num_splits, D, D, SPLITS, 0, WIDTH, True)
    out = tl.sum(acc * alpha[:, None], 0) / tl.sum(l_i * alpha, 0)
    tl.store(OUT + row * D + dims, out.to(OUT.dtype.element_ty), mask=dims < D)


# ---------------------------------------------------------------- attention: autograd and public function

def head_split(D: int) -> dict:
    """D channels as HEAD + TAIL, powers of two of at least 16 (or no TAIL). Example: head_split(96) == dict(D=96, HEAD=64, TAIL=32)"""
    head = max(16, 2 ** (D.bit_length() - 1))
    tail = 0 if D <= head else max(16, triton.next_power_of_2(D - head))
    return dict(D=D, HEAD=head, TAIL=tail)


def _attention_constants(q, k, ranges: bool, blocksparse) -> dict:
    block, local, stride = blocksparse or (SPARSE_BLOCK, 0, 0)
    H = q.shape[2]
    return dict(**head_split(q.shape[3]), H=H, G=H // k.shape[2], RANGES=ranges, BLOCK=block, LOCAL=local, STRIDE=stride)


def _strides(*tensors) -> list:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _optional(x):
    """An argument that may be missing, and its first stride."""
    return (None, 0) if x is None else (x, x.stride(0))


@torch.library.custom_op("minphi::attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, Tensor? documents, "
                         "Tensor? kv_start, Tensor? kv_len, int window, float scale, int[] blocksparse) -> (Tensor, Tensor)")
def _attention(q, k, v, documents, kv_start, kv_len, window, scale, blocksparse):  # an operator, so that a compiled block holds it whole
    """-> output (B, T, H, D) and the log2 of the softmax's denominators (B, H, T)."""
    B, T, H, D = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    ranges = window < NO_WINDOW or documents is not None or kv_start is not None
    kv_len, len_b = _optional(kv_len)
    launch(_attn_fwd, lambda meta: (B * H, triton.cdiv(T, meta["BLOCK_M"])), q, k, v, out, lse, None if documents is None else documents[0],
           kv_start, kv_len, *_strides(q, k, v, out), len_b, T, k.shape[1], window, scale * LOG2E,
           **_attention_constants(q, k, ranges, blocksparse))
    return out, lse


@_attention.register_fake
def _(q, k, v, documents, kv_start, kv_len, window, scale, blocksparse):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("minphi::attention_backward", mutates_args=(), schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, "
                         "Tensor lse, Tensor? documents, int window, float scale, int[] blocksparse) -> (Tensor, Tensor, Tensor)")
def _attention_backward(do, q, k, v, out, lse, documents, window, scale, blocksparse):
    B, T, H, D = q.shape
    S, KV = k.shape[1:3]
    do = do if do.stride(3) == 1 else do.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    doc_start, doc_end = (None, None) if documents is None else documents
    constants = _attention_constants(q, k, window < NO_WINDOW or documents is not None, blocksparse)
    launch(_attn_bwd_dq, lambda meta: (B * H, triton.cdiv(T, meta["BLOCK_M"])), q, k, v, out, do, lse, delta, dq, doc_start,
           *_strides(q, k, v, out, do), T, S, window, scale * LOG2E, **constants)
    launch(_attn_bwd_dkdv, lambda meta: (B * KV, triton.cdiv(S, meta["BLOCK_N"])), q, k, v, do, lse, delta, dk, dv, doc_start, doc_end,
           *_strides(q, k, v, do, dk), T, S, window, scale * LOG2E, **constants)
    return dq, dk, dv


@_attention_backward.register_fake
def _(do, q, k, v, out, lse, documents, window, scale, blocksparse):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, documents, _, _, ctx.window, ctx.scale, ctx.blocksparse = inputs
    ctx.save_for_backward(q, k, v, *output, documents)


def _backward(ctx, do, _):
    gradients = _attention_backward(do, *ctx.saved_tensors, ctx.window, ctx.scale, ctx.blocksparse)
    return *gradients, None, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _decode(q, k, v, kv_start, kv_len, window, scale, blocksparse):
    """A few queries over a long cache: the keys are split over programs (Flash-Decoding, Dao et al. 2023)."""
    B, T, H, D = q.shape
    S, KV = k.shape[1:3]
    G, block_n = H // KV, 16 if INTERPRETED else 64
    # as many splits as the capacity and the processors allow: the length lies on the device
    num_splits = max(1, min(triton.cdiv(S, block_n), 4 * num_sms(q) // (B * KV), 128))
    constants = _attention_constants(q, k, True, blocksparse)
    del constants["H"]
    q = q.view(B, T, KV, G, D).transpose(1, 2).contiguous()                        # (B, KV, T, G, D)
    part = q.new_empty(B * H * T, num_splits, D, dtype=torch.float32)
    stats = q.new_empty(B * H * T, num_splits, 2, dtype=torch.float32)
    out = torch.empty_like(q)
    kv_len, len_b = _optional(kv_len)
    launch(_attn_decode, (B * KV, num_splits), q, k, v, part, stats, kv_start, kv_len, *_strides(k, v), len_b, T, S, window,
           scale * LOG2E, **constants, KV=KV, ROWS=max(16, triton.next_power_of_2(T * G)), BLOCK_N=block_n, num_warps=4, num_stages=2)
    launch(_combine_splits, (B * H * T,), part, stats, out, num_splits, D=D, WIDTH=triton.next_power_of_2(D),
           SPLITS=triton.next_power_of_2(num_splits))
    return out.transpose(1, 2).reshape(B, T, H, D)


def attention(q, k, v, *, scale=None, causal: bool = True, window=None, documents=None, kv_start=None, kv_len=None,
              blocksparse=None, mask=None):
    """Grouped-query attention: q (B, T, H, D), k and v (B, S, KV, D), any strides -> (B, T, H, D).

    Query t stands at position kv_len - T + t and sees the keys up to its own (causal). kv_len: how many keys there are, a number or
    an integer tensor, () or (B,), of a cache's length on its device; None: S. window: how many of the latest keys a query sees.
    documents: (2, B, T) of document_bounds, T = S: tokens see their own document. kv_start (B,): the first key that is no padding.
    blocksparse: (block, local, stride), phi-3-small's pattern (arXiv 2404.14219, section 2): a block of queries sees its `local`
    newest blocks of keys, and of the older ones every stride-th, which ones being each head's own; blocks count from kv_start.
    mask: what attention_mask makes of the same arguments, or an additive one; the reference alone uses it, to build none itself.
    """
    B, T, H, D = q.shape
    scale = D ** -0.5 if scale is None else scale
    if isinstance(kv_len, int):
        k, v, kv_len = k[:, :kv_len], v[:, :kv_len], None
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    # float32 and wider heads pass shared memory; what has a cache needs no gradients
    if (use_triton(q) and causal and D <= 256 and (q.dtype != torch.float32 or INTERPRETED) and
            (not blocksparse or blocksparse[0] == SPARSE_BLOCK) and not (grad and (kv_start is not None or kv_len is not None))):
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        kv_len = None if kv_len is None else kv_len.expand(B)
        window = NO_WINDOW if window is None else window
        if not grad and documents is None and T <= 8 and T * (H // k.shape[2]) <= 64:
            return _decode(q, k, v, kv_start, kv_len, window, scale, blocksparse)
        return _attention(q, k, v, documents, kv_start, kv_len, window, scale, list(blocksparse or ()))[0]
    if kv_len is not None:
        length = int(kv_len.max()) if mask is None else mask.shape[-1]
        k, v = k[:, :length], v[:, :length]
    if mask is None and causal:
        mask = attention_mask(T, k.shape[1], window=window, documents=documents, kv_start=kv_start, kv_len=kv_len,
                              blocksparse=blocksparse, num_heads=H, device=q.device)
    return _attention_torch(q, k, v, scale, causal and T > 1, mask)


# ---------------------------------------------------------------- norms

def rms_norm_reference(x, weight, eps: float):
    wide = at_least_float32(x)
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / x.shape[-1] + eps)  # a sum: mean is 2.5 times slower on CPUs
    return (wide * scale * weight).to(x.dtype)


def layer_norm_reference(x, weight, bias, eps: float):
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


@jit
def _norm_fwd(X, RESIDUAL, WEIGHT, BIAS, Y, SUM, STATS, width, eps, WIDTH: tl.constexpr):
    """One program a row: SUM = X + RESIDUAL, rounded as a plain addition would be; Y = norm(SUM). Without BIAS it is RMSNorm."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    x = tl.load(X + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        x += tl.load(RESIDUAL + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        x = x.to(SUM.dtype.element_ty)
        tl.store(SUM + row * width + columns, x, mask=inside)
        x = x.to(tl.float32)
    mean = 0.0
    if BIAS is not None:
        mean = tl.sum(x, 0) / width
        x = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    y = x * scale * tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS is not None:
        y += tl.load(BIAS + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(STATS + row * 2, mean)
    tl.store(STATS + row * 2 + 1, scale)


@jit
def _norm_bwd(X, DY, DSUM, WEIGHT, STATS, DX, DWEIGHT, DBIAS, rows, width, WIDTH: tl.constexpr):
    """One program a share of the rows; it adds up DWEIGHT and DBIAS of its rows in registers."""
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((WIDTH,), tl.float32)
    dbias = tl.zeros((WIDTH,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offsets = tl.cast(row, tl.int64) * width + columns
        scale = tl.load(STATS + row * 2 + 1)
        x = (tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32) - tl.load(STATS + row * 2)) * scale
        x = tl.where(inside, x, 0.0)
        dy = tl.load(DY + offsets, mask=inside, other=0.0).to(tl.float32)
        dweight += dy * x
        dbias += dy
        dy *= weight
        dx = dy - x * (tl.sum(dy * x, 0) / width)
        if DBIAS is not None:
            dx -= tl.sum(dy, 0) / width
        dx *= scale
        if DSUM is not None:
            dx += tl.load(DSUM + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(DWEIGHT + tl.program_id(0) * width + columns, dweight, mask=inside)
    if DBIAS is not None:
        tl.store(DBIAS + tl.program_id(0) * width + columns, dbias, mask=inside)


def norm_constants(width: int) -> dict:
    block = triton.next_power_of_2(width)
    return dict(WIDTH=block, num_warps=min(16, max(4, block // 512)))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        y = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        stats = x.new_empty(rows, 2, dtype=torch.float32)
        launch(_norm_fwd, (rows,), x, residual, weight, bias, y, total, stats, width, eps, **norm_constants(width))
        ctx.save_for_backward(total, weight, stats)
        ctx.has_bias = bias is not None
        return y, None if residual is None else total

    @staticmethod
    def backward(ctx, dy, dtotal):
        x, weight, stats = ctx.saved_tensors
        rows, width = stats.shape[0], x.shape[-1]
        programs = min(rows, 4 * num_sms(x))
        dx = torch.empty_like(x)
        dweight = x.new_empty(programs, width, dtype=torch.float32)
        dbias = torch.empty_like(dweight) if ctx.has_bias else None
        launch(_norm_bwd, (programs,), x, dy.contiguous(), None if dtotal is None else dtotal.contiguous(), weight, stats, dx, dweight,
               dbias, rows, width, **norm_constants(width))
        dresidual = None if dtotal is None else dx
        dbias = dbias.sum(0).to(weight.dtype) if ctx.has_bias else None
        return dx, dresidual, dweight.sum(0).to(weight.dtype), dbias, None


def layer_norm(x, weight, bias, eps: float, residual=None):
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension, in x's type (Ba et al., arXiv 1607.06450).

    residual: another summand; then -> (norm(x + residual), x + residual), in one pass over memory.
    """
    if fuses(x):
        y, total = _Norm.apply(x, residual, weight, bias, eps)
    else:
        total = x if residual is None else x + residual
        y = rms_norm_reference(total, weight, eps) if bias is None else layer_norm_reference(total, weight, bias, eps)
    return y if residual is None else (y, total)


def rms_norm(x, weight, eps: float, residual=None):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in x's type (Zhang and Sennrich, arXiv 1910.07467); residual: see
    layer_norm."""
    return layer_norm(x, weight, None, eps, residual)


# ---------------------------------------------------------------- rotary positions

def rotary_reference(x, cos, sin):
    """x (B, T, H, D); cos and sin as in rotary."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)                                # (T, 1, R/2) or (B, T, 1, R/2)
    first, second = x[..., :half], x[..., half:2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half:])
    return torch.cat(parts, -1).to(x.dtype)


@jit
def _rotate(Q, K, OUT_Q, OUT_K, COS, SIN, q_b, q_t, q_h, k_b, k_t, k_h, cos_b, cos_t, T, sign, H: tl.constexpr, KV: tl.constexpr,
            D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    """One program: HEADS heads of one token, of the queries or, the last programs, of the keys. WIDTH and REST: HALF and D - 2 HALF
    channels, filled up."""
    token = tl.program_id(0).to(tl.int64)
    b = token // T
    t = token % T
    start = tl.program_id(1) * HEADS
    Q_BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    if tl.program_id(1) < Q_BLOCKS:
        _rotate_heads(Q + b * q_b + t * q_t, OUT_Q + token * H * D, COS, SIN, b * cos_b + t * cos_t, start, q_h, sign, H, D, HALF, HEADS, WIDTH, REST)
    else:
        _rotate_heads(K + b * k_b + t * k_t, OUT_K + token * KV * D, COS, SIN, b * cos_b + t * cos_t, start - Q_BLOCKS * HEADS, k_h, sign, KV, D,
                      HALF, HEADS, WIDTH, REST)


@jit
def _rotate_heads(X, OUT, COS, SIN, angle, start, x_h, sign, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
                  WIDTH: tl.constexpr, REST: tl.constexpr):
    heads = (start + tl.arange(0, HEADS))[:, None]
    channels = tl.arange(0, WIDTH)[None, :]
    inside = (heads < H) & (channels < HALF)
    cos = tl.load(COS + angle + channels, mask=channels < HALF, other=0.0)
    sin = tl.load(SIN + angle + channels, mask=channels < HALF, other=0.0) * sign
    x = X + heads * x_h + channels
    out = OUT + heads * D + channels
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, (first * cos - second * sin).to(OUT.dtype.element_ty), mask=inside)
    tl.store(out + HALF, (second * cos + first * sin).to(OUT.dtype.element_ty), mask=inside)
    if 2 * HALF < D:
        channels = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = (heads < H) & (channels < D)
        tl.store(OUT + heads * D + channels, tl.load(X + heads * x_h + channels, mask=inside), mask=inside)


def _rotated(q, k, cos, sin, sign: float):
    B, T, H, D = q.shape
    KV, half = k.shape[2], cos.shape[-1]
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    cos_b = cos.stride(0) if cos.dim() == 3 else 0
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    heads = min(16, triton.next_power_of_2(H))
    grid = B * T, triton.cdiv(H, heads) + triton.cdiv(KV, heads)
    launch(_rotate, grid, q, k, out_q, out_k, cos, sin, *_strides(q, k), cos_b, cos.stride(-2), T, sign, H=H, KV=KV, D=D, HALF=half,
           HEADS=heads, WIDTH=triton.next_power_of_2(half), REST=triton.next_power_of_2(max(D - 2 * half, 1)))
    return out_q, out_k


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, dq, dk):
        return *_rotated(dq, dk, *ctx.saved_tensors, -1.0), None, None


def rotary(q, k, cos, sin):
    """Rotate the channel pairs (i, i + R/2) of q (B, T, H, D) and k (B, T, KV, D) by their position's angle (RoFormer, arXiv
    2104.09864, half layout) -> q, k, new tensors. cos, sin: float32 (T, R/2) or (B, T, R/2). Of D > R channels the rest stays."""
    if fuses(q):
        return _Rotary.apply(q, k, cos.contiguous(), sin.contiguous())
    return rotary_reference(q, cos, sin), rotary_reference(k, cos, sin)


# ---------------------------------------------------------------- activations

def gelu(x):
    """The tanh form of gelu (Hendrycks and Gimpel, arXiv 1606.08415), as in phi-1 to phi-2."""
    return F.gelu(x, approximate="tanh")


def swiglu_reference(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def geglu_reference(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return gelu(gate) * up


def geglu_clamped_reference(gate_up):
    gate, up = gate_up.chunk(2, -1)
    gate = gate.clamp(max=20.0)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-20.0, 20.0) + 1)


SWIGLU, GEGLU, GEGLU_CLAMPED = range(3)


@jit
def _activate(gate, KIND: tl.constexpr):
    """-> activation(gate) and its derivative."""
    if KIND == 1:  # tanh form of gelu
        t = 2 * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) - 1
        slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * gate * gate)
        return 0.5 * gate * (1 + t), slope
    steepness = 1.702 if KIND == 2 else 1.0
    s = tl.sigmoid(steepness * gate)
    return gate * s, s + steepness * gate * s * (1 - s)


@jit
def _glu(GATE_UP, Y, DGATE_UP, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Y of GATE_UP's two halves; with DGATE_UP, that, Y being the upstream gradient."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    offsets = row * 2 * width + columns
    raw_gate = tl.load(GATE_UP + offsets, mask=inside, other=0.0).to(tl.float32)
    raw_up = tl.load(GATE_UP + offsets + width, mask=inside, other=0.0).to(tl.float32)
    gate = raw_gate
    up = raw_up
    if KIND == 2:
        gate = tl.minimum(gate, 20.0)
        up = tl.minimum(tl.maximum(up, -20.0), 20.0) + 1
    activated, slope = _activate(gate, KIND)
    y = Y + row * width + columns
    if DGATE_UP is None:
        tl.store(y, (activated * up).to(Y.dtype.element_ty), mask=inside)
    else:
        dy = tl.load(y, mask=inside, other=0.0).to(tl.float32)
        dgate = dy * up * slope
        dup = dy * activated
        if KIND == 2:
            dgate = tl.where(raw_gate <= 20.0, dgate, 0.0)
            dup = tl.where((raw_up >= -20.0) & (raw_up <= 20.0), dup, 0.0)
        tl.store(DGATE_UP + offsets, dgate.to(GATE_UP.dtype.element_ty), mask=inside)
        tl.store(DGATE_UP + offsets + width, dup.to(GATE_UP.dtype.element_ty), mask=inside)


class _Glu(torch.autograd.Function):
    @staticmethod
    def launch(x, y, dx, kind):
        width = y.shape[-1]
        launch(_glu, (y.numel() // width, triton.cdiv(width, 1024)), x, y, dx, width, KIND=kind, BLOCK=1024)

    @staticmethod
    def forward(ctx, x, kind):
        x = x.contiguous()
        ctx.kind = kind
        ctx.save_for_backward(x)
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _Glu.launch(x, y, None, kind)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        dx = torch.empty_like(x)
        _Glu.launch(x, dy.contiguous(), dx, ctx.kind)
        return dx, None


def swiglu(gate_up):
    """(..., 2F) -> (..., F): silu(gate) · up, gate being the first half (Shazeer, arXiv 2002.05202)."""
    return _Glu.apply(gate_up, SWIGLU) if fuses(gate_up) else swiglu_reference(gate_up)


def geglu(gate_up):
    """(..., 2F) -> (..., F): gelu(gate) · up with the tanh form of gelu (Gemma)."""
    return _Glu.apply(gate_up, GEGLU) if fuses(gate_up) else geglu_reference(gate_up)


def geglu_clamped(gate_up):
    """(..., 2F) -> (..., F): phi-3-small's: gate · sigmoid(1.702 gate) · (up + 1), gate at most 20 and up within ± 20. Its checkpoint
    interleaves gate and up; here, as everywhere, gate is the first half."""
    return _Glu.apply(gate_up, GEGLU_CLAMPED) if fuses(gate_up) else geglu_clamped_reference(gate_up)


# ---------------------------------------------------------------- loss

CHUNK_ROWS = 2048       # at least so many rows of logits at a time,
CHUNK_BYTES = 2 ** 30   # more as long as they take no more than this


def cross_entropy_reference(x, weight, targets, weights, bias=None):
    """x (N, d), targets and weights (N,) -> weighted sum of -log softmax(x Wᵀ + bias)[target]."""
    logits = at_least_float32(F.linear(x, weight, bias))
    losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    return (losses * weights).sum()  # not `@`, which autocast would run in bf16


@jit
def _cross_entropy_rows(LOGITS, TARGETS, WEIGHTS, LOSS, row_stride, vocab, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: its weighted loss, and its logits overwritten by the loss's gradient with respect to them."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    weight = tl.load(WEIGHTS + row)
    LOGITS += row * row_stride
    # before the reductions below: after them another warp may have overwritten it. Weight 0 marks what is no word
    target_logit = tl.load(LOGITS + target, mask=(target >= 0) & (target < vocab), other=0.0).to(tl.float32)
    m_i = tl.full((BLOCK,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(LOGITS + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m_i, logits)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp(m_i - m_safe) + tl.exp(logits - m_safe)
        m_i = m_new
    m_row = tl.max(m_i, 0)
    lse = m_row + tl.log(tl.sum(l_i * tl.exp(m_i - m_row), 0))
    tl.store(LOSS + row, weight * (lse - target_logit))
    if GRADIENT:
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = tl.load(LOGITS + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
            p = tl.exp(logits - lse)
            gradient = weight * tl.where(columns == target, p - 1, p)
            tl.store(LOGITS + columns, gradient.to(LOGITS.dtype.element_ty), mask=columns < vocab)


def chunk_rows(num_rows: int, vocab: int, itemsize: int) -> int:
    """How many rows of logits exist at once: a multiple of 128. A larger chunk moves the weight and its gradient less often."""
    return min(num_rows, max(CHUNK_ROWS, CHUNK_BYTES // (vocab * itemsize) // 128 * 128))


class _LinearCrossEntropy(torch.autograd.Function):
    """The logits of a chunk of tokens at a time, turned in place into their gradient, which goes at once into x's and the weight's (as
    in Liger, arXiv 2410.10989, section 3.2). The loss being a scalar, the backward pass only scales."""

    @staticmethod
    def forward(ctx, x, weight, targets, weights, bias, needs_grad):
        N, V = x.shape[0], weight.shape[0]
        losses = x.new_empty(N, dtype=torch.float32)
        matrix = weight.to(x.dtype)
        bias_x = None if bias is None else bias.to(x.dtype)
        dx = torch.empty_like(x) if needs_grad else None
        dweight = dbias = None
        num_rows = chunk_rows(N, V, x.itemsize)
        for begin in range(0, N, num_rows):
            rows = slice(begin, begin + num_rows)
            logits = F.linear(x[rows], matrix, bias_x)                             # (rows, V)
            launch(_cross_entropy_rows, (len(logits),), logits, targets[rows], weights[rows], losses[rows], logits.stride(0), V,
                   GRADIENT=needs_grad, BLOCK=min(4096, triton.next_power_of_2(V)), num_warps=8)
            if needs_grad:
                torch.mm(logits, matrix, out=dx[rows])
                # one chunk is one product; several are added up in float32
                product = logits.t() @ x[rows]                                     # (V, d)
                dweight = product if dweight is None else dweight.float().add_(product)
                if bias is not None:
                    row_sum = logits.sum(0, dtype=torch.float32)
                    dbias = row_sum if dbias is None else dbias + row_sum
        ctx.save_for_backward(dx, dweight, dbias)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx, upstream):
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        dx, dweight, dbias = (None if d is None else (d * upstream).to(dtype) for d, dtype in gradients)
        return dx, dweight, None, None, dbias, None


def cross_entropy(x, weight, targets, weights=None, bias=None):
    """Next-token loss from final hidden states x (..., d) and the output layer, weight (V, d) and perhaps bias (V).

    targets (...): int64, -1 where there is nothing to predict; a number outside the vocabulary is an error on CPUs and counts as -1 on
    GPUs, which could not raise without waiting. weights (...): of each prediction, of any sign.
    -> (sum of weighted losses in nats, sum of weights), float32 scalars; a batch without targets gives (0, 0).
    """
    x, targets = x.flatten(0, -2), targets.flatten()
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights.flatten().float()
    if use_triton(x):
        weights = torch.where((targets >= 0) & (targets < len(weight)), weights, 0.0)
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        with torch.autocast(x.device.type, enabled=False):
            return _LinearCrossEntropy.apply(x, weight, targets.contiguous(), weights, bias, needs_grad), weights.sum()
    weights = torch.where(targets != -1, weights, 0.0)
    if x.device.type == "cpu":  # on a GPU their number would have to be waited for
        used = weights.nonzero().squeeze(1)
        if len(used) < len(weights):
            x, targets, weights = x[used], targets[used], weights[used]
    return cross_entropy_reference(x, weight, targets, weights, bias), weights.sum()


# ---------------------------------------------------------------- matrix products with quantized weights

def quantize(weight, bits: int, group: int):
    """weight (N, K), K a multiple of group -> (qweight uint8 (N, K · bits / 8), scale (N, K / group), zero (N, K / group), both bf16)
    with weight ≈ zero + scale · code, code from 0 to 2^bits - 1.

    Of 4 bits the low half-bytes hold the first half of each group, and each group's range is the one, of some narrower than the full
    one, with the least squared error. Of 8 bits the range is symmetric, so that zero is -128 · scale exactly.
    """
    N, K = weight.shape
    if bits not in (4, 8) or K % group or group % 8:
        raise ValueError(f"{bits} bits in groups of {group} do not fit rows of {K}: give 4 or 8 bits and a divisor of {K} that is a "
                         "multiple of 8")
    x = weight.detach().float().view(N, K // group, group)
    if bits == 8:
        scale = _round_up_bfloat16(x.abs().amax(-1) / 127)
        zero = -128 * scale
        codes = _codes(x, scale, zero, 255)
    else:
        best_error = torch.full((N, K // group), math.inf, device=x.device)
        for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
            new_zero = (x.amin(-1) * shrink).bfloat16()
            new_scale = _round_up_bfloat16((x.amax(-1) * shrink - new_zero.float()) / 15)
            new_codes = _codes(x, new_scale, new_zero, 15)
            error = (_restore(new_codes, new_scale, new_zero) - x).square().sum(-1)
            if shrink == 1.0:
                scale, zero, codes = new_scale, new_zero, new_codes
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            scale = torch.where(better, new_scale, scale)
            zero = torch.where(better, new_zero, zero)
            codes = torch.where(better[..., None], new_codes, codes)
        codes = codes[..., :group // 2] | codes[..., group // 2:] << 4
    return codes.reshape(N, -1), scale, zero


def _round_up_bfloat16(scale):
    """Rounded up, so that the range stays covered."""
    return (scale * (1 + 2 ** -8)).clamp(min=1e-30).bfloat16()


def _codes(x, scale, zero, top: int):
    return ((x - zero[..., None].float()) / scale[..., None].float()).round_().clamp_(0, top).to(torch.uint8)


def _restore(codes, scale, zero):
    return zero[..., None].float() + scale[..., None].float() * codes


def _unpack(qweight, groups: int, bits: int):
    """-> codes uint8 (N, groups, group)."""
    codes = qweight.view(len(qweight), groups, -1)
    return codes if bits == 8 else torch.cat((codes & 15, codes >> 4), -1)


def dequantize(qweight, scale, zero, bits: int):
    """What quantize's result stands for: (N, K) in float32. Rows of all three may be picked before, as an embedding does."""
    return _restore(_unpack(qweight, scale.shape[1], bits), scale, zero).flatten(1)


def quantized_linear_reference(x, qweight, scale, zero, bits: int):
    return x @ dequantize(qweight, scale, zero, bits).to(x.dtype).T


def pack_for_cpu(qweight, scale, zero, bits: int):
    """The same weight as ATen's products for few rows read it, (weights, scales), or None where they do not serve: of 4 bits they
    take groups of 32 to 256 and N % 16 = 0, of 8 bits one symmetric group a row and K % 16 = 0."""
    N, groups = scale.shape
    codes = _unpack(qweight, groups, bits)
    if bits == 8:
        if groups > 1 or codes.shape[2] % 16 or not torch.equal(zero, -128 * scale):
            return None
        return (codes[:, 0] ^ 128).view(torch.int8), scale[:, 0].contiguous()
    if codes.shape[2] not in (32, 64, 128, 256) or N % 16:
        return None
    # they have w = (code - 8) · scale + zero
    scales = torch.stack((scale, (zero.float() + 8 * scale.float()).bfloat16()), -1)           # (N, groups, 2)
    weights = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
    return weights, scales.transpose(0, 1).contiguous()


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 itself; without such units products of many rows are faster in float32."""
    units = torch.cpu.get_capabilities()
    return any(units.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@jit
def _load_weights(QWEIGHT, SCALE, ZERO, rows, column, n, k, PART: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
                  BYTES: tl.constexpr):
    """float32 (rows, BYTES): what the low (PART 0) or high half-bytes from byte `column` of each row on stand for. BYTES divides a
    part of a group."""
    groups = k // GROUP
    offsets = rows.to(tl.int64) * (k * BITS // 8) + column
    inside = rows < n
    codes = tl.load(QWEIGHT + offsets[:, None] + tl.arange(0, BYTES)[None, :], mask=inside[:, None], other=0)
    group = rows.to(tl.int64) * groups + column // (GROUP * BITS // 8)
    scale = tl.load(SCALE + group, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(ZERO + group, mask=inside, other=0.0).to(tl.float32)
    codes = (codes >> (4 * PART)) & (2 ** BITS - 1)
    return zero[:, None] + scale[:, None] * codes.to(tl.float32)


@jit
def _quantized_linear(X, QWEIGHT, SCALE, ZERO, PART_Y, m, n, k, GROUP: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Y = X Wᵀ for few rows of X. One program: BLOCK_N rows of W, restored in registers, over one split of K; the caller adds the
    splits up."""
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    GROUP_BYTES: tl.constexpr = GROUP * BITS // 8
    X += rows[:, None].to(tl.int64) * k + tl.arange(0, BYTES)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.program_id(1), k * BITS // 8 // BYTES, tl.num_programs(1)):
        column = step * BYTES
        first = column // GROUP_BYTES * GROUP + column % GROUP_BYTES  # the number that the first low half-byte holds
        for part in tl.static_range(8 // BITS):
            x = tl.load(X + first + part * GROUP_BYTES, mask=rows[:, None] < m, other=0.0)
            w = _load_weights(QWEIGHT, SCALE, ZERO, outs, column, n, k, part, GROUP, BITS, BYTES)
            acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc)
    PART_Y += (tl.program_id(1).to(tl.int64) * m + rows[:, None]) * n + outs[None, :]
    tl.store(PART_Y, acc, mask=(rows[:, None] < m) & (outs[None, :] < n))


@jit
def _dequantize(W, QWEIGHT, SCALE, ZERO, n, k, GROUP: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, BLOCK_N: tl.constexpr):
    """W in its own type, for products of many rows."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    GROUP_BYTES: tl.constexpr = GROUP * BITS // 8
    column = tl.program_id(1) * BYTES
    first = column // GROUP_BYTES * GROUP + column % GROUP_BYTES
    W += rows[:, None].to(tl.int64) * k + first + tl.arange(0, BYTES)[None, :]
    for part in tl.static_range(8 // BITS):
        w = _load_weights(QWEIGHT, SCALE, ZERO, rows, column, n, k, part, GROUP, BITS, BYTES)
        tl.store(W + part * GROUP_BYTES, w.to(W.dtype.element_ty), mask=rows[:, None] < n)


def _quantized_constants(K: int, groups: int, bits: int) -> dict:
    group_bytes = K // groups * bits // 8
    return dict(GROUP=K // groups, BITS=bits, BYTES=min(64, group_bytes & -group_bytes))  # the largest power of two that divides it


def _quantized_linear_triton(x, qweight, scale, zero, bits: int):
    """x (M, K) -> (M, N)."""
    (M, K), (N, groups) = x.shape, scale.shape
    constants = _quantized_constants(K, groups, bits)
    if M > 64 or constants["BYTES"] < 16:  # many rows cost products; a product of matrices needs 16 columns
        w = x.new_empty(N, K)
        grid = triton.cdiv(N, 32), K * bits // 8 // constants["BYTES"]
        launch(_dequantize, grid, w, qweight, scale, zero, N, K, **constants, BLOCK_N=32)
        return F.linear(x, w)
    blocks = triton.cdiv(N, 32)
    num_splits = max(1, min(8 * num_sms(x) // blocks, K * bits // 8 // constants["BYTES"], 32))
    part = x.new_empty(num_splits, M, N, dtype=torch.float32)
    launch(_quantized_linear, (blocks, num_splits, triton.cdiv(M, 16)), x, qweight, scale, zero, part, M, N, K, **constants, BLOCK_M=16,
           BLOCK_N=32, num_warps=2, num_stages=3)
    return part.sum(0).to(x.dtype)


def quantized_linear(x, qweight, scale, zero, bits: int, cpu_pack=None):
    """x (..., K) times a weight of quantize(·, bits) -> (..., N) in x's type. Few rows read bits / 8 bytes a weight; for many the
    weight is restored. cpu_pack: pack_for_cpu of the same, made once: without it CPUs restore for few rows too."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if use_triton(x):
        y = _quantized_linear_triton(flat, qweight, scale, zero, bits)
    elif cpu_pack is not None and len(flat) <= 16:  # ATen's products are fast with bf16 activations alone
        weights, scales = cpu_pack
        flat = flat.bfloat16()
        if bits == 8:
            y = torch.ops.aten._weight_int8pack_mm(flat, weights, scales)
        else:
            group = flat.shape[1] // scales.shape[0]
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, weights, group, scales)
    else:
        dtype = x.dtype
        if x.device.type == "cpu" and dtype == torch.bfloat16 and not cpu_has_bfloat16():
            dtype = torch.float32
        y = quantized_linear_reference(flat.to(dtype), qweight, scale, zero, bits)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


# ---------------------------------------------------------------- benchmark

def median_ms(function) -> float:
    """Median time of a call in milliseconds, with cold caches."""
    return triton.testing.do_bench(function, rep=300, return_mode="median")


def bench() -> None:
    """Each operation, forward and backward, beside its peers: milliseconds and TFLOP/s or GB/s."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def tensor(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def row(name, work, unit, **peers):
        """peers: name -> function of the forward pass."""
        for peer, forward in peers.items():
            try:
                upstream = torch.randn_like(forward())
                forward_ms = median_ms(forward)
                both_ms = median_ms(lambda: forward().backward(upstream))
            except RuntimeError as error:
                print(f"{name:44}{peer:12} {str(error).splitlines()[0][:60]}", flush=True)
            else:
                print(f"{name:44}{peer:12}{forward_ms:10.3f}{both_ms:12.3f}{work / forward_ms / 1e9:10.2f} {unit}", flush=True)
            name = ""

    print(f"{torch.cuda.get_device_name()}, {datetime.date.today()}, torch {torch.__version__}, triton {triton.__version__}, bf16")
    print(f"{'operation':44}{'peer':12}{'forward ms':>10}{'and back ms':>12}{'forward rate':>15}")
    for B, T, H, KV, D in ((4, 4096, 48, 48, 128), (4, 4096, 32, 8, 128), (4, 4096, 32, 32, 96), (4, 4096, 32, 32, 64)):
        q, k, v = tensor(B, T, H, D), tensor(B, T, KV, D), tensor(B, T, KV, D)

        def sdpa(backend):
            heads_first = [x.transpose(1, 2) for x in (q, k, v)]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        row(f"attention B {B} T {T} H {H}/{KV} D {D}", 2 * B * H * T * T * D, "TFLOP/s", ours=lambda: attention(q, k, v),
            cudnn=lambda: sdpa(SDPBackend.CUDNN_ATTENTION), flash=lambda: sdpa(SDPBackend.FLASH_ATTENTION))
    N, d, V = 8192, 4096, 100352
    x, head, targets = tensor(N, d), tensor(V, d), torch.randint(V, (N,), device="cuda")
    losses = dict(ours=lambda: cross_entropy(x, head, targets)[0],
                  torch=lambda: F.linear_cross_entropy(x, head, targets, reduction="sum"))
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        losses["liger"] = lambda: LigerFusedLinearCrossEntropyLoss(reduction="sum")(head, x, targets)
    row(f"cross entropy {N} x {d} x {V}", 2 * N * d * V, "TFLOP/s", **losses)
    w, gate_up = tensor(d), tensor(N, 28672)
    row(f"rms_norm {N} x {d}", 4e-3 * N * d, "TB/s", ours=lambda: rms_norm(x, w, 1e-5), torch=lambda: F.rms_norm(x, (d,), w, 1e-5))
    row(f"swiglu {N} x 14336", 6e-3 * N * 14336, "TB/s", ours=lambda: swiglu(gate_up), torch=lambda: swiglu_reference(gate_up))


if __name__ == "__main__":
    if triton is None or not torch.cuda.is_available():
        raise SystemExit("kernels.py: its benchmark needs a GPU and Triton; `python test_all.py compile` shows what the compiler makes of "
                         "the kernels without one")
    bench()

"""The operations a decoder spends its time in, on CPUs and GPUs. `python kernels.py` times them on a GPU.

Attention, loss and products of quantized weights stand as reference -> Triton kernels -> autograd -> public
function, which takes the kernels where `use_triton` says so (a GPU with Triton), else the reference. Norms,
rotary positions and activations are references that torch.compile fuses on a GPU, forward and backward.
Softmax, norms and losses are computed in float32 (or what is wider) whatever the input type.

Shapes: B sequences, T queries, S keys, H query heads, KV key/value heads, G = H / KV, D channels a head,
R rotated channels, V words of the vocabulary.

    attention(q (B, T, H, D), k, v (B, S, KV, D), scale, kv_ranges=, kv_len=, blocksparse=, mask=)
    kv_ranges(positions (B or 1, T), window, documents) -> (2, B or 1, T) or None, once a forward
    attention_mask(positions, S, kv_ranges, blocksparse, num_heads), once a forward where not `use_triton`
    rotary(q, k, cos, sin)                        cos, sin (T, R/2) or (B or 1, T, R/2)
    rms_norm(x, weight, eps, residual=None)       -> y, or (y, x + residual)
    layer_norm(x, weight, bias, eps, residual=None)
    swiglu, geglu, geglu_clamped (gate_up (..., 2F)), gelu (x)
    cross_entropy(x (..., d), weight (V, d), targets, weights=None, bias=None) -> (nats, sum of weights)
    linear(x, weight, bias=None)
    quantize(weight (N, K), bits, group) -> (qweight, scale, zero), dequantize, pack_for_cpu, quantized_linear
"""
from __future__ import annotations  # so that annotations name tl.constexpr where Triton is missing too

import functools
import math
import os
import sys
import warnings
from collections import namedtuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:
    triton = None
    jit = lambda function: function

# Triton then runs kernels on CPU tensors, to check their numbers
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# ---------------------------------------------------------------- where the kernels run

def use_triton(x) -> bool:
    """Whether tensors on x's device go through the Triton kernels."""
    if x.is_cuda and not triton:
        warnings.warn("Triton is not installed, so plain PyTorch serves the GPU: pip install triton")
    return bool(triton) and (x.is_cuda or INTERPRETED)


@functools.cache
def _compiled(function):
    # one row and many, with gradients and without, are compiled apart
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function)


def fused(function):
    """On a GPU this function as torch.compile fuses it, forward and backward; within a compiled block the
    block does that."""
    @functools.wraps(function)
    def choose(x, *args, **kwargs):
        alone = triton and x.is_cuda and not torch.compiler.is_compiling()
        return (_compiled(function) if alone else function)(x, *args, **kwargs)
    return choose


def launch(kernel, grid, device, *args, **constants):
    """Run a kernel on this device: by itself Triton takes the current one, whatever the tensors are on.
    Tensor descriptors take a little memory there."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](*args, **constants)


def num_sms(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


@jit
def _load_float32(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


# ---------------------------------------------------------------- attention: masks and reference

def kv_ranges(positions, window=None, documents=None):
    """What limits T queries besides causality -> int32 (2, B or 1, T): the first key that each sees and,
    where each query is a key too, one past the last query that sees that key; None without a limit.

    positions (B or 1, T); window: how many of the latest keys a query sees; documents (B, T): those of
    its own run of equal ids.
    """
    if window is None and documents is None:
        return None
    first = (positions - (window or 2 ** 40) + 1).clamp(min=0)
    if documents is not None:
        begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
        first = torch.maximum(first, torch.where(begins, positions, 0).cummax(1).values)
    last = torch.searchsorted(
        first, positions.expand_as(first).contiguous(),
        right=True)
    return torch.stack((first, last)).int()


def attention_mask(
        positions, S: int, kv_ranges=None, blocksparse=None,
        num_heads: int = 1):
    """What queries at these positions (B or 1, T) see of S keys: bool (B or 1, 1 or num_heads, T, S),
    arguments as in attention. None where causality says it all: T = S, or single queries at the last key."""
    T = positions.shape[1]
    dense = not blocksparse or S <= blocksparse[0] * blocksparse[1]
    newest = T == 1 and not positions.is_cuda and int(positions.min()) == S - 1
    if dense and kv_ranges is None and (T == S or newest):
        return None
    keys = torch.arange(S, device=positions.device)
    positions = positions[:, None, :, None]
    visible = keys <= positions                                                    # (B or 1, 1, T, S)
    if kv_ranges is not None:
        visible = visible & (keys >= kv_ranges[0, :, None, :, None])
    if not dense:
        block, local, stride = blocksparse
        heads = torch.arange(num_heads, device=keys.device)[:, None, None]
        vertical = (keys // block + heads + 1) % stride == 0                       # (num_heads, 1, S)
        visible = visible & (vertical | (positions // block - keys // block < local))
    return visible


def attention_reference(
        q, k, v, scale: float, mask=None):
    """q (B, T, H, D), k and v (B, S, KV, D), mask bool, without one causal, T being 1 or S -> (B, T, H,
    D). Two batched products; query heads that share a key head are folded into T, so that keys are not
    repeated."""
    B, T, H, D = q.shape
    S, KV = k.shape[1:3]
    q = (q * scale).transpose(1, 2).reshape(B, KV, -1, D)  # (B, T, H, D) -> (B, KV, G·T, D)
    scores = at_least_float32(q @ k.permute(0, 2, 3, 1)).view(B, H, T, S)  # (B, KV, G·T, S) -> (B, H, T, S)
    if mask is None:
        mask = torch.ones(
            T, S, dtype=torch.bool,
            device=q.device).tril(S - T)
    scores = scores.masked_fill(~mask, -math.inf).softmax(-1).to(v.dtype)
    y = scores.view(B, KV, -1, S) @ v.transpose(1, 2)                              # (B, KV, G·T, D)
    return y.view(B, H, T, D).transpose(1, 2)


# ---------------------------------------------------------------- attention: Triton kernels

# Every mask is an interval of keys [first key, own position] for each query. A block of queries sweeps
# its keys in three phases: a masked head, where some queries do not look back so far, an unmasked
# interior, and a masked tail at the diagonal. Blocksparse attention (phi-3-small) adds a sweep over its
# vertical blocks and a condition in the masked phases.
#
# A tile of rows is a tuple, (HEAD channels,) or (HEAD channels, TAIL channels): a head of 96 is 64 + 32
# and pays for no 128. A row is a query or, in decoding, one of PACK query heads that share a key head:
# row r is head r % PACK of query r // PACK.

# a tensor (B, rows, heads, D) as a kernel sees it
Heads = namedtuple("Heads", "data batch_stride stride head_stride")
# what limits the queries besides causality; missing limits are None
Limits = namedtuple("Limits", "first last batch_stride kv_len")
# constants. LIMITED: whether there are kv_ranges. STRIDE: 0 where not blocksparse. VERTICAL: sweep
# vertical blocks by themselves
Meta = namedtuple("Meta", "D HEAD TAIL H KV G PACK LIMITED BLOCK LOCAL STRIDE VERTICAL")


@jit
def _of_head(X, pair, heads):
    """-> the rows of one head of one sequence, pair = sequence · heads + head: (pointer, stride)."""
    return X.data + pair // heads * X.batch_stride + pair % heads * X.head_stride, X.stride


@jit
def _pointers(
        X, start, count, META, part, ROWS):
    """-> pointers to ROWS rows of a part of the channels, HEAD or TAIL, and which of them exist."""
    data, stride = X
    rows = tl.arange(0, ROWS)[:, None]
    dims = part * META.HEAD + tl.arange(0, META.TAIL if part else META.HEAD)[None, :]
    data += tl.cast(start, tl.int64) * stride  # tokens times stride pass 2^31
    return data + rows * stride + dims, (start + rows < count) & (dims < META.D)


@jit
def _load(
        X, start, count, META, ROWS):
    """A tile of ROWS rows from `start` on, zeros beyond `count`."""
    pointers, inside = _pointers(
        X, start, count, META, 0, ROWS)
    head = tl.load(
        pointers, mask=inside, other=0.0)
    if META.TAIL:
        pointers, inside = _pointers(
            X, start, count, META, 1, ROWS)
        return head, tl.load(
            pointers, mask=inside, other=0.0)
    else:
        return (head,)


@jit
def _descriptor(X, count, META, ROWS):
    """The same rows for a loop: tile by tile they come by the copy engine where there is one (Hopper on),
    which computes no addresses and takes no registers."""
    data, stride = X
    head = tl.make_tensor_descriptor(
        data, (count, META.D), (stride, 1), (ROWS, META.HEAD))
    if META.TAIL:
        return head, tl.make_tensor_descriptor(
            data, (count, META.D), (stride, 1), (ROWS, META.TAIL))
    else:
        return (head,)


@jit
def _fetch(X, start, META):
    """A tile of rows from `start` on, zeros beyond the last."""
    start = tl.cast(start, tl.int32)
    if META.TAIL:
        return X[0].load((start, 0)), X[1].load((start, META.HEAD))
    else:
        return (X[0].load((start, 0)),)


@jit
def _store(
        X, tile, factor, start, count, META):
    """Every row of the tile times its factor."""
    for part in tl.static_range(len(tile)):
        pointers, inside = _pointers(
            X, start, count, META, part,
            tile[part].shape[0])
        tl.store(
            pointers, tile[part] * factor, mask=inside)


@jit
def _zeros(META, ROWS):
    head = tl.zeros((ROWS, META.HEAD), tl.float32)
    if META.TAIL:
        return head, tl.zeros((ROWS, META.TAIL), tl.float32)
    else:
        return (head,)


@jit
def _dot(a, b):
    """a bᵀ: (M, D), (N, D) -> (M, N)."""
    scores = tl.dot(a[0], tl.trans(b[0]))
    if len(a) > 1:
        scores = tl.dot(a[1], tl.trans(b[1]), scores)
    return scores


@jit
def _add_dot(acc, p, x, alpha=1.0):
    """acc · alpha + p x: (M, D), (M, N), (N, D), (M, 1) -> (M, D)."""
    p = p.to(x[0].dtype)
    head = tl.dot(p, x[0], acc[0] * alpha)
    if len(x) > 1:
        return head, tl.dot(p, x[1], acc[1] * alpha)
    else:
        return (head,)


@jit
def _visible(positions, first, keys, head, META):
    """Which keys these queries see; all shapes broadcast."""
    visible = keys <= positions
    if META.LIMITED:
        visible = visible & (keys >= first)
    if META.STRIDE:
        key_block = keys // META.BLOCK
        local = positions // META.BLOCK - key_block < META.LOCAL
        visible = visible & (local | ((key_block + head + 1) % META.STRIDE == 0))
    return visible


@jit
def _attn_inner(
        state, queries, keys, begin, end, step, scale,
        META, BLOCK_N, MASKED, BACKWARD):
    """Queries over the tiles of keys from begin to end. state: (acc, m_i, l_i) of online softmax in units
    of log2 (Dao et al., arXiv 2205.14135, algorithm 1). BACKWARD: (dQ, log2 of the softmax's
    denominators, row sums of out · dout)."""
    q, do, positions, first, head = queries
    K, V = keys
    for start in range(begin, end, step):
        acc, m_i, l_i = state
        k = _fetch(K, start, META)
        v = _fetch(V, start, META)
        scores = _dot(q, k)                                                        # (M, N)
        if MASKED:
            visible = _visible(
                positions, first,
                start + tl.arange(0, BLOCK_N)[None, :],
                head, META)
            scores = tl.where(
                visible, scores, float("-inf"))
        if BACKWARD:
            ds = tl.exp2(scores * scale - m_i[:, None]) * (_dot(do, v) - l_i[:, None])
            acc = _add_dot(acc, ds, k)
        else:
            # m_i begins finite: of a row that saw nothing yet differences are numbers
            m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = _add_dot(acc, p, v, alpha[:, None])
            m_i = m_new
        state = acc, m_i, l_i
    return state


@jit
def _attn_sweep(
        state, q, do, K, V, LIMITS, pair,
        row_start, T, S, scale, META, BLOCK_M, BLOCK_N,
        BACKWARD):
    """_attn_inner over all keys that BLOCK_M rows of one head see, phase by phase; of several splits
    (grid axis 2) over one."""
    b = pair // META.H
    head = (pair % META.H).to(tl.int32)
    length = S
    if LIMITS.kv_len is not None:
        length = tl.load(LIMITS.kv_len + b).to(tl.int32)
    rows = row_start + tl.arange(0, BLOCK_M)
    tokens = tl.minimum(rows // META.PACK, T - 1)
    start = row_start // META.PACK + length - T  # the first query's position
    stop = tl.minimum(start + BLOCK_M, length)
    begin = 0
    whole = 0  # from here on every query looks back
    first = tokens
    if META.LIMITED:
        first = tl.load(LIMITS.first + b * LIMITS.batch_stride + tokens)
        begin = tl.min(first, 0)
        whole = tl.max(first, 0)
    heads = head * META.PACK + rows % META.PACK
    queries = (
        q, do,
        (tokens + length - T)[:, None], first[:, None], heads[:, None])
    keys = (
        _descriptor(_of_head(K, pair // META.G, META.KV), S, META, BLOCK_N),
        _descriptor(_of_head(V, pair // META.G, META.KV), S, META, BLOCK_N))
    if META.VERTICAL:
        # before `near` all these queries see the vertical blocks and nothing else
        near = tl.maximum(start // META.BLOCK - META.LOCAL + 1, 0) * META.BLOCK
        column = (META.STRIDE - (head + 1) % META.STRIDE) % META.STRIDE * META.BLOCK
        state = _attn_inner(
            state, queries, keys, column, near,
            META.STRIDE * META.BLOCK, scale, META, BLOCK_N,
            META.LIMITED, BACKWARD)
        begin = tl.maximum(begin, near)
        whole = tl.maximum(whole, near + ((stop - 1) // META.BLOCK - start // META.BLOCK) * META.BLOCK)
    split_size = tl.cdiv(stop - begin, BLOCK_N * tl.num_programs(2)) * BLOCK_N
    begin += tl.program_id(2) * split_size
    end = tl.minimum(begin + split_size, stop)
    interior = begin + tl.cdiv(tl.maximum(whole - begin, 0), BLOCK_N) * BLOCK_N
    tail = interior + tl.maximum(tl.minimum(start + 1, end) - interior, 0) // BLOCK_N * BLOCK_N
    bounds = begin, interior, tail, end
    for phase in tl.static_range(3):
        if phase or META.LIMITED or META.VERTICAL:
            state = _attn_inner(
                state, queries, keys, bounds[phase],
                tl.minimum(bounds[phase + 1], end),
                BLOCK_N, scale, META, BLOCK_N,
                phase != 1 or META.STRIDE > 0 and not META.VERTICAL,
                BACKWARD)
    return state


def autotuned(*shapes):
    """Time these (BLOCK_M, BLOCK_N, warps, stages) on first use, once for each Meta and type. What does
    not fit a chip's shared memory is passed over."""
    if triton is None:
        return jit
    shapes = [(32, 16, 4, 1)] if INTERPRETED else shapes
    configs = [
        triton.Config(dict(BLOCK_M=m, BLOCK_N=n), warps, stages)
        for m, n, warps, stages in shapes]
    # a number of tokens is any: machine code of its own for multiples of 16 and for others is not wanted
    return lambda function: triton.autotune(configs, ["META"])(
        triton.jit(function, do_not_specialize=["T", "S"]))


@autotuned(
    (128, 128, 8, 3),
    (128, 64, 8, 3),
    (64, 64, 4, 3),
    (64, 32, 8, 2))
def _attn_fwd(
        Q, K, V, OUT, LSE, LIMITS, T,
        S, scale, META: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: BLOCK_M rows of one head -> OUT and LSE, the log2 of the softmax's denominators; each
    split has its own."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows first
    pair = tl.program_id(0).to(tl.int64)
    count = T * META.PACK
    q = _load(
        _of_head(Q, pair, META.H), start,
        count, META, BLOCK_M)
    zero = tl.zeros((BLOCK_M,), tl.float32)
    state = _zeros(META, BLOCK_M), zero - 1e30, zero
    acc, m_i, l_i = _attn_sweep(
        state, q, q, K, V, LIMITS, pair,
        start, T, S, scale, META, BLOCK_M, BLOCK_N,
        False)
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    pair += tl.program_id(2) * tl.num_programs(0)
    _store(
        _of_head(OUT, pair, META.H), acc,
        1 / l_i[:, None], start, count, META)
    rows = start + tl.arange(0, BLOCK_M)
    tl.store(
        LSE + pair * count + rows,
        m_i + tl.log2(l_i), mask=rows < count)


@jit
def _combine_splits(
        PART, LSE, OUT, D, WIDTH: tl.constexpr,
        SPLITS: tl.constexpr):
    """One program a row: the mean of its splits' outputs, weighed by their denominators."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, WIDTH)[None, :]
    rows = row + tl.arange(0, SPLITS)[:, None] * tl.num_programs(0)
    lse = tl.load(LSE + rows)
    weight = tl.exp2(lse - tl.max(lse))
    part = _load_float32(PART + rows * D + dims, dims < D)
    out = tl.sum(
        part * weight, 0, keep_dims=True) / tl.sum(weight)
    tl.store(
        OUT + row * D + dims, out,
        mask=dims < D)


@autotuned(
    (128, 64, 8, 3),
    (64, 64, 4, 3),
    (128, 32, 8, 3),
    (32, 32, 4, 1))
def _attn_bwd_dq(
        Q, K, V, OUT, DO, LSE, DELTA,
        DQ, LIMITS, T, S, scale,
        META: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr):
    """One program: BLOCK_M queries of one head -> DQ, and DELTA, the row sums of out · dout."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows first
    pair = tl.program_id(0).to(tl.int64)
    q = _load(
        _of_head(Q, pair, META.H), start,
        T, META, BLOCK_M)
    do = _load(
        _of_head(DO, pair, META.H), start,
        T, META, BLOCK_M)
    out = _load(
        _of_head(OUT, pair, META.H), start,
        T, META, BLOCK_M)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(len(out)):
        delta += tl.sum(out[part].to(tl.float32) * do[part], 1)
    rows = start + tl.arange(0, BLOCK_M)
    tl.store(
        DELTA + pair * T + rows, delta,
        mask=rows < T)
    state = _zeros(META, BLOCK_M), _load_float32(LSE + pair * T + rows, rows < T), delta
    dq, _, _ = _attn_sweep(
        state, q, do, K, V, LIMITS, pair,
        start, T, S, scale, META, BLOCK_M, BLOCK_N,
        True)
    # log2(e) belongs to the exponent alone
    _store(
        _of_head(DQ, pair, META.H), dq,
        scale * 0.6931471805599453, start, T, META)


@jit
def _dkdv_inner(
        state, keys, queries, first, begin, end, T,
        scale, META, BLOCK_M, MASKED):
    """A tile of keys over the queries from begin to end, everything transposed."""
    k, v, columns = keys
    Q, DO, LSE, DELTA, head = queries
    for start in range(begin, end, BLOCK_M):
        dk, dv = state
        rows = start + tl.arange(0, BLOCK_M)[None, :]
        inside = rows < T
        q = _fetch(Q, start, META)
        do = _fetch(DO, start, META)
        p = tl.exp2(_dot(k, q) * scale - _load_float32(LSE + rows, inside))      # (N, M)
        if MASKED:
            low = rows
            if META.LIMITED:
                low = tl.load(first + rows, mask=inside, other=0)
            p = tl.where(
                _visible(rows, low, columns, head, META) & inside,
                p, 0.0)
        ds = p * (_dot(v, do) - _load_float32(DELTA + rows, inside))
        state = _add_dot(dk, ds, q), _add_dot(dv, p, do)
    return state


@autotuned(
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (32, 64, 4, 2),
    (16, 32, 4, 1))
def _attn_bwd_dkdv(
        Q, K, V, DO, LSE, DELTA, DK,
        DV, LIMITS, T, S, scale,
        META: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr):
    """One program: BLOCK_N keys of one key/value head -> DK and DV, summed over its G query heads:
    nothing is added atomically. T = S."""
    start = tl.program_id(1) * BLOCK_N
    pair = tl.program_id(0).to(tl.int64)
    k = _load(
        _of_head(K, pair, META.KV), start,
        S, META, BLOCK_N)
    v = _load(
        _of_head(V, pair, META.KV), start,
        S, META, BLOCK_N)
    keys = k, v, start + tl.arange(0, BLOCK_N)[:, None]
    state = _zeros(META, BLOCK_N), _zeros(META, BLOCK_N)
    # as in _attn_sweep: queries at the diagonal, those that see all these keys, those past the first
    # key's last
    last_key = tl.minimum(start + BLOCK_N, S) - 1
    interior = start + tl.cdiv(last_key - start, BLOCK_M) * BLOCK_M
    first = pair // META.KV * LIMITS.batch_stride
    whole = T
    end = T
    if META.LIMITED:
        whole = tl.load(LIMITS.last + first + start)
        end = tl.load(LIMITS.last + first + last_key)
        first = LIMITS.first + first
    for g in range(META.G):
        query_pair = pair * META.G + g
        head = (query_pair % META.H).to(tl.int32)
        queries = (
            _descriptor(_of_head(Q, query_pair, META.H), T, META, BLOCK_M),
            _descriptor(_of_head(DO, query_pair, META.H), T, META, BLOCK_M),
            LSE + query_pair * T, DELTA + query_pair * T, head)
        local_end = T
        if META.STRIDE:
            block = start // META.BLOCK
            local_end = tl.where(
                (block + head + 1) % META.STRIDE == 0,
                T, (block + META.LOCAL) * META.BLOCK)
        tail = interior + tl.maximum(tl.minimum(whole, local_end) - interior, 0) // BLOCK_M * BLOCK_M
        bounds = start, interior, tail, tl.minimum(end, local_end)
        for phase in tl.static_range(3):
            state = _dkdv_inner(
                state, keys, queries, first, bounds[phase],
                tl.minimum(bounds[phase + 1], bounds[3]),
                T, scale, META, BLOCK_M, phase != 1)
    dk, dv = state
    _store(
        _of_head(DK, pair, META.KV), dk,
        scale * 0.6931471805599453, start, S, META)
    _store(
        _of_head(DV, pair, META.KV), dv,
        1.0, start, S, META)


# ---------------------------------------------------------------- attention: autograd and public function

def _grid(x, block: str):
    """A program for each pair of x (B, rows, heads, D), on axis 0, which may pass 65,535, and each block
    of its rows."""
    return lambda constants: (
        x.shape[0] * x.shape[2],
        triton.cdiv(x.shape[1], constants[block]))


def _launch_attention(
        kernel, grid, tensors, scale: float, kv_ranges, kv_len,
        blocksparse, pack: int = 1, **tile) -> None:
    """tensors: Q, K, V and what else the kernel takes before LIMITS."""
    q, k = tensors[:2]
    B, rows, H, D = q.shape
    S, KV = k.shape[1:3]
    head = max(16, 1 << D.bit_length() - 1)  # 96 is 64 + 32, 80 is 64 + 16, 128 has no tail
    tail = 0 if D <= head else max(16, triton.next_power_of_2(D - head))
    limits = Limits(None, None, 0, kv_len)
    if kv_ranges is not None:
        kv_ranges = kv_ranges.expand(2, B, -1)
        limits = Limits(
            *kv_ranges, kv_ranges.stride(1), kv_len)
    vertical = bool(blocksparse) and not tile
    if vertical:  # the sweep over vertical blocks needs them as tiles
        kernel = kernel.fn
        tile = dict(
            BLOCK_M=blocksparse[0], BLOCK_N=blocksparse[0],
            num_warps=4, num_stages=2)
    meta = Meta(*map(tl.constexpr, (
        D, head, tail, H, KV, H // KV, pack, kv_ranges is not None,
        *(blocksparse or (1, 0, 0)), vertical)))
    args = [
        Heads(x, *x.stride()[:3]) if x.dim() == 4 else x
        for x in tensors]
    launch(
        kernel, grid, q.device, *args, limits,
        rows // pack, S,
        scale * math.log2(math.e),
        META=meta, **tile)


# operators, so that a compiled block holds them whole

def _attend(q, k, v, *options):
    """-> output (B, T, H, D), log2 of the softmax's denominators (B, H, T)."""
    out, lse = _empty_output(q)
    _launch_attention(
        _attn_fwd, _grid(q, "BLOCK_M"),
        (q, k, v, out, lse), *options)
    return out, lse


_attention = torch.library.custom_op(
    "minphi::attention", _attend, mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, Tensor? kv_ranges, Tensor? kv_len, int[] blocksparse)"
           " -> (Tensor, Tensor)")


@_attention.register_fake
def _empty_output(q, *_):
    B, T, H, _ = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty(B, H, T, dtype=torch.float32))


@torch.library.custom_op(
    "minphi::attention_backward", mutates_args=(),
    schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? kv_ranges, float scale,"
           " int[] blocksparse) -> (Tensor, Tensor, Tensor)")
def _attention_backward(
        do, q, k, v, out, lse, kv_ranges,
        scale, blocksparse):
    dq, dk, dv = _empty_gradients(do, q, k, v)
    do = do.contiguous()
    delta = torch.empty_like(lse)
    options = scale, kv_ranges, None, blocksparse
    _launch_attention(
        _attn_bwd_dq, _grid(q, "BLOCK_M"),
        (q, k, v, out, do, lse, delta, dq),
        *options)
    _launch_attention(
        _attn_bwd_dkdv, _grid(k, "BLOCK_N"),
        (q, k, v, do, lse, delta, dk, dv),
        *options)
    return dq, dk, dv


@_attention_backward.register_fake
def _empty_gradients(do, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, kv_ranges, _, ctx.blocksparse = inputs
    ctx.save_for_backward(q, k, v, *output, kv_ranges)


def _backward(ctx, do, _):
    return *_attention_backward(
        do, *ctx.saved_tensors, ctx.scale, ctx.blocksparse), None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _decode(q, k, v, *options):
    """A few queries over a long cache: the keys are split over programs (Flash-Decoding, Dao et al. 2023)."""
    B, T, H, D = q.shape
    S, KV = k.shape[1:3]
    rows = T * H // KV                                                             # of a key head: (T, G)
    q = q.reshape(B, T, KV, -1, D).transpose(1, 2)                                 # (B, KV, T, G, D)
    q = q.reshape(B, KV, rows, D).transpose(1, 2)
    # as many splits as the capacity and the processors allow, a power of two: the length lies on the device
    num_splits = triton.next_power_of_2(min(
        triton.cdiv(S, 64), triton.cdiv(2 * num_sms(q.device), B * KV), 128))
    part = q.new_empty(
        num_splits * B, KV, rows, D,
        dtype=torch.float32)
    lse = part.new_empty(part.shape[:3])
    out = q.new_empty(B, KV, T, H // KV, D)
    _launch_attention(
        _attn_fwd.fn, (B * KV, 1, num_splits),
        (q, k, v, part.transpose(1, 2), lse),
        *options, pack=H // KV,
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=64, num_warps=4, num_stages=2)
    launch(
        _combine_splits, (B * H * T,),
        q.device, part, lse, out, D,
        WIDTH=triton.next_power_of_2(D), SPLITS=num_splits)
    return out.transpose(1, 2).reshape(B, T, H, D)


def attention(
        q, k, v, scale: float, *,
        kv_ranges=None, kv_len=None, blocksparse=None, mask=None):
    """Causal grouped-query attention: q (B, T, H, D), k and v (B, S, KV, D), any strides -> (B, T, H, D).

    Query t stands at position kv_len - T + t and sees the keys up to its own. kv_len (B,): how many keys
    there are, the lengths of a cache with room for S, on its device; None: S. kv_ranges: of the function
    of that name, where queries see less. blocksparse: (block, local, stride), phi-3-small's pattern
    (arXiv 2404.14219, section 2): a block of queries sees its `local` newest blocks of keys, and of the
    older ones every stride-th, which ones being each head's own. mask: attention_mask of the same
    arguments; the reference alone uses it, and builds none then.
    """
    B, T, H, D = q.shape
    S = k.shape[1]
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    # float32 and wider heads pass shared memory, and descriptors begin at multiples of 16 bytes
    served = D <= 256 and D % 8 == 0 and (q.itemsize == 2 or INTERPRETED)
    # of gradients the kernels know those of training
    served &= not (grad and (T != S or kv_len is not None))
    if use_triton(q) and served:
        q, k, v = (
            x if x.stride(3) == 1 else x.contiguous()
            for x in (q, k, v))
        options = scale, kv_ranges, kv_len, list(blocksparse or ())
        if grad or torch.compiler.is_compiling():
            return _attention(q, k, v, *options)[0]
        if T * H > 64 * k.shape[2]:
            return _attend(q, k, v, *options)[0]
        return _decode(q, k, v, *options)
    if mask is None and (kv_ranges is not None or kv_len is not None or blocksparse or T not in (1, S)):
        length = S if kv_len is None else kv_len[:, None]
        positions = length - T + torch.arange(T, device=q.device)[None]
        mask = attention_mask(positions, S, kv_ranges, blocksparse, H)
    if grad and 128 < T == S and mask is not None:
        # In training a block of queries multiplies the keys up to its last query alone, about half of all.
        # Few blocks, for a compiler unrolls them.
        size = max(128, T // 4)
        return torch.cat([
            attention(q[:, end - size:end], k[:, :end], v[:, :end], scale,
                      mask=mask[:, :, end - size:end, :end])
            for end in range(size, T + size, size)], 1)
    if q.device.type == "cpu" and q.itemsize == 2 and (grad or T <= 16):
        # PyTorch's own is 3 to 4 times slower in these types on CPUs
        return attention_reference(q, k, v, scale, mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None and T > 1,
        scale=scale, enable_gqa=True).transpose(1, 2)


# ---------------------------------------------------------------- norms, rotary positions, activations

@fused
def rms_norm(
        x, weight, eps: float, residual=None):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in x's type (Zhang and Sennrich, arXiv
    1910.07467).

    residual: another summand; then -> (norm(x + residual), x + residual), in one pass over memory.
    """
    total = x if residual is None else x + residual
    y = F.rms_norm(
        total.to(weight.dtype),
        x.shape[-1:], weight, eps).to(x.dtype)
    return y if residual is None else (y, total)


@fused
def layer_norm(
        x, weight, bias, eps: float, residual=None):
    """(x - mean) / sqrt(variance + eps) · weight + bias (Ba et al., arXiv 1607.06450); the rest as in
    rms_norm."""
    total = x if residual is None else x + residual
    y = F.layer_norm(
        total, x.shape[-1:],
        weight.to(x.dtype),
        bias.to(x.dtype), eps).to(x.dtype)  # autocast would leave float32
    return y if residual is None else (y, total)


@fused
def rotary(q, k, cos, sin):
    """Rotate the channel pairs (i, i + R/2) of q (B, T, H, D) and k (B, T, KV, D) by their position's
    angle (RoFormer, arXiv 2104.09864, half layout) -> q, k. cos, sin: float32 (T, R/2) or (B or 1, T,
    R/2). Of D > R channels the rest stays."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)                                # (B or 1, T, 1, R/2)
    rotated = []
    for x in (q, k):
        first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
        first, second = (
            torch.addcmul(first * cos, second, sin, value=-1),
            torch.addcmul(second * cos, first, sin))
        rotated.append(torch.cat((first, second, rest), -1).to(x.dtype))
    return tuple(rotated)


def gelu(x):
    """The tanh form of gelu (Hendrycks and Gimpel, arXiv 1606.08415), as in phi-1 to phi-2."""
    return F.gelu(x, approximate="tanh")


@fused
def swiglu(gate_up):
    """(..., 2F) -> (..., F): silu(gate) · up, gate being the first half (Shazeer, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@fused
def geglu(gate_up):
    """(..., 2F) -> (..., F): gelu(gate) · up with the tanh form of gelu (Gemma)."""
    gate, up = gate_up.chunk(2, -1)
    return gelu(gate) * up


@fused
def geglu_clamped(gate_up):
    """(..., 2F) -> (..., F): phi-3-small's: gate · sigmoid(1.702 gate) · (up + 1), gate at most 20 and up
    within ± 20. Its checkpoint interleaves gate and up; here, as everywhere, gate is the first half."""
    gate, up = gate_up.chunk(2, -1)
    gate = gate.clamp(max=20.0)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-20.0, 20.0) + 1)


# ---------------------------------------------------------------- loss

# So many rows of logits exist at once, or more as long as they take no more than so many bytes: larger
# chunks move the weight's gradient less often.
CHUNK_ROWS = 2048
CHUNK_BYTES = 2 ** 30


def cross_entropy_reference(
        x, weight, targets, weights, bias=None):
    """x (N, d), targets and weights (N,) -> weighted sum of -log softmax(x Wᵀ + bias)[target]."""
    logits = at_least_float32(F.linear(x, weight, bias))
    losses = F.cross_entropy(
        logits, targets, ignore_index=-1, reduction="none")
    return (losses * weights).sum()  # not `@`, which autocast would run in bf16


@jit
def _cross_entropy_rows(
        LOGITS, TARGETS, WEIGHTS, LOSS, vocab,
        GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: its weighted loss, and its logits overwritten by the loss's gradient with
    respect to them."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    weight = tl.load(WEIGHTS + row)
    LOGITS += row * vocab
    # read before the reductions: after them another warp may have overwritten it. What is no word has
    # weight 0
    target_logit = _load_float32(LOGITS + target, (target >= 0) & (target < vocab))
    columns = tl.arange(0, BLOCK)
    m_i = -1e30
    l_i = 0.0
    for start in range(0, vocab, BLOCK):
        logits = tl.load(
            LOGITS + start + columns, mask=start + columns < vocab,
            other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m_i, tl.max(logits))
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(logits - m_new))
        m_i = m_new
    lse = m_i + tl.log(l_i)
    tl.store(LOSS + row, weight * (lse - target_logit))
    if GRADIENT:
        for start in range(0, vocab, BLOCK):
            inside = start + columns < vocab
            p = tl.exp(_load_float32(LOGITS + start + columns, inside) - lse)
            tl.store(
                LOGITS + start + columns,
                weight * tl.where(start + columns == target, p - 1, p),
                mask=inside)


class _LinearCrossEntropy(torch.autograd.Function):
    """The logits of a chunk of tokens at a time, turned in place into their gradient, which goes at once
    into x's and the weight's (as in Liger, arXiv 2410.10989, section 3.2). The loss being a scalar, the
    backward pass only scales."""

    @staticmethod
    def forward(
            ctx, x, weight, targets, weights, bias, needs_grad):
        V = len(weight)
        losses = torch.empty_like(weights)
        matrix = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        dx = torch.empty_like(x)
        dweight = dbias = None
        num_rows = max(CHUNK_ROWS, CHUNK_BYTES // (V * x.itemsize) // 128 * 128)
        for begin in range(0, len(x), num_rows):
            rows = slice(begin, begin + num_rows)
            logits = F.linear(x[rows], matrix, bias)                               # (num_rows, V)
            launch(
                _cross_entropy_rows, (len(logits),), x.device,
                logits, targets[rows], weights[rows],
                losses[rows], V, GRADIENT=needs_grad,
                BLOCK=4096, num_warps=8)
            if needs_grad:
                dx[rows] = logits @ matrix
                product = logits.t() @ x[rows]                                     # (V, d)
                # one chunk needs no float32 sum
                dweight = dweight.float().add_(product) if begin else product
                if bias is not None:
                    dbias = logits.sum(0, dtype=torch.float32) + (dbias if begin else 0)
        ctx.gradients = dx, dweight, dbias
        return losses.sum()

    @staticmethod
    def backward(ctx, upstream):
        dx, dweight, dbias = (None if gradient is None else gradient * upstream for gradient in ctx.gradients)
        return dx, dweight, None, None, dbias, None


def cross_entropy(
        x, weight, targets, weights=None, bias=None):
    """Next-token loss from final hidden states x (..., d) and the output layer, weight (V, d) and perhaps
    bias (V).

    targets (...): int64, -1 where there is nothing to predict; a number outside the vocabulary is an
    error on CPUs and counts as -1 on GPUs, which could not raise without waiting. weights (...): of each
    prediction, of any sign. -> (sum of weighted losses in nats, sum of weights), float32 scalars; a batch
    without targets gives (0, 0).
    """
    x, targets = x.flatten(0, -2), targets.flatten()
    known = (targets >= 0) & (targets < len(weight)) if use_triton(x) else targets != -1
    weights = known.float() if weights is None else weights.flatten().float() * known
    if use_triton(x):
        with torch.autocast(x.device.type, enabled=False):
            return _LinearCrossEntropy.apply(
                x, weight, targets, weights, bias,
                torch.is_grad_enabled()), weights.sum()
    if x.device.type == "cpu":  # on a GPU their number would have to be waited for
        used = weights.nonzero().squeeze(1)
        x, targets, weights = x[used], targets[used], weights[used]
    return cross_entropy_reference(
        x, weight, targets, weights, bias), weights.sum()


# ---------------------------------------------------------------- matrix products, of quantized weights too

@functools.cache
def cpu_has_bfloat16():
    """Whether this CPU multiplies bf16 itself."""
    return any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "bf16")))


def linear(x, weight, bias=None):
    """x Wᵀ + bias; many rows in bf16 on a CPU without units for it go through float32, which is faster
    there."""
    is_slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() > 16 * x.shape[-1]
    if is_slow and not torch.compiler.is_compiling() and not cpu_has_bfloat16():
        return F.linear(
            x.float(), weight.float(),
            None if bias is None else bias.float()).bfloat16()
    return F.linear(x, weight, bias)


def quantize(weight, bits, group):
    """weight (N, K), group a divisor of K and a multiple of 8 -> (qweight uint8 (N, K · bits / 8), scale
    (N, K / group), zero (N, K / group), both bf16) with weight ≈ zero + scale · code, code from 0 to
    2^bits - 1.

    Of 4 bits the low half-bytes hold the first half of each group, and each group's range is the one, of
    some narrower than the full one, with the least squared error. Of 8 bits the range is symmetric: zero
    is -128 · scale exactly.
    """
    N, K = weight.shape
    x = weight.detach().float().view(N, -1, group)
    if bits == 8:
        scale = _round_up(x.abs().amax(-1) / 127)
        return _codes(x, scale, -128 * scale, 255).view(N, K), scale, -128 * scale
    candidates = []
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
        zero = (x.amin(-1) * shrink).bfloat16()
        scale = _round_up((x.amax(-1) * shrink - zero.float()) / 15)
        error = _restore(_codes(x, scale, zero, 15), scale, zero) - x
        candidates.append(torch.stack((error.square().sum(-1), scale, zero)))      # (3, N, K / group)
    candidates = torch.stack(candidates)
    best = candidates[:, 0].argmin(0).expand(1, 3, N, -1)
    _, scale, zero = candidates.gather(0, best)[0].bfloat16()
    low, high = _codes(x, scale, zero, 15).chunk(2, -1)
    return (low | high << 4).view(N, -1), scale, zero


def _round_up(scale):
    """In bf16, rounded up, so that the range stays covered."""
    return (scale * (1 + 2 ** -8)).clamp(min=1e-30).bfloat16()


def _codes(x, scale, zero, top: int):
    codes = (x - zero[..., None].float()) / scale[..., None].float()
    return codes.round_().clamp_(0, top).byte()


def _restore(
        codes, scale, zero, dtype=torch.float32):
    return torch.addcmul(
        zero[..., None].to(dtype),
        scale[..., None].to(dtype),
        codes.to(dtype))


def _unpack(qweight, groups: int, bits: int):
    """-> codes uint8 (N, groups, group)."""
    codes = qweight.view(len(qweight), groups, -1)
    return codes if bits == 8 else torch.cat((codes & 15, codes >> 4), -1)


@fused
def dequantize(
        qweight, scale, zero, bits: int,
        dtype=torch.float32):
    """What quantize's result stands for: (N, K). Rows of all three may be picked before, as an embedding
    does."""
    return _restore(
        _unpack(qweight, scale.shape[1], bits),
        scale, zero, dtype).flatten(1)


def pack_for_cpu(qweight, scale, zero, bits):
    """The same weight as ATen's products of few rows read it, (weights, scales), or None where they do
    not serve: of 4 bits they take groups of 32 to 256 and N % 16 = 0, of 8 bits one symmetric group a row
    and K % 64 = 0."""
    codes = _unpack(
        qweight, scale.shape[1], bits)
    group = codes.shape[2]
    if (bits == 8 and len(scale) == scale.numel() and group % 64 == 0 and
            torch.equal(zero, -128 * scale)):
        return (qweight ^ 128).view(torch.int8), scale[:, 0].contiguous()
    if bits == 4 and group in (32, 64, 128, 256) and len(scale) % 16 == 0:
        weights = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
        offsets = zero.float() + 8 * scale.float()  # theirs is w = (code - 8) · scale + offset
        # (groups, N, 2)
        return weights, torch.stack((scale, offsets.bfloat16()), -1).transpose(0, 1).contiguous()


@jit
def _quantized_linear(
        X, QWEIGHT, SCALE, ZERO, OUT, n, row_words,
        groups, BITS: tl.constexpr, GROUP_WORDS: tl.constexpr,
        PIECES: tl.constexpr, PIECE: tl.constexpr,
        OUTS: tl.constexpr):
    """x Wᵀ. One program: one x and OUTS rows of W, PIECES · PIECE words of 32 bits of each at a time, each
    piece within one group. X (rows, 32 / BITS, row_words): X[:, i] goes with the i-th codes of all words."""
    # conversions are slow: a code at the top of the mantissa of 2^BITS in float32 makes 2^BITS + code
    bit: tl.constexpr = 23 - BITS
    power_bits: tl.constexpr = 127 + BITS << 23
    outs = tl.program_id(0) * OUTS + tl.arange(0, OUTS)[None, None, :].to(tl.int64)
    pieces = tl.arange(0, PIECES)
    X += tl.program_id(1) * row_words * (32 // BITS)
    acc = tl.zeros((PIECES, PIECE, OUTS), tl.float32)
    for start in range(0, row_words, PIECES * PIECE):
        words = start + pieces[:, None, None] * PIECE + tl.arange(0, PIECE)[None, :, None]
        inside = (words < row_words) & (outs < n)
        codes = tl.load(QWEIGHT + outs * row_words + words, mask=inside, other=0)
        products = tl.zeros_like(acc)
        x_sum = tl.zeros_like(acc)
        for i in tl.static_range(32 // BITS):
            # of the same shape as codes, or it would change threads by way of shared memory each time
            x = tl.load(X + i * row_words + words + 0 * outs, mask=inside, other=0.0)
            shift = bit - i * BITS
            code = codes << shift if shift > 0 else codes >> -shift
            code = code & (2 ** BITS - 1) << bit | power_bits
            products += code.to(tl.float32, bitcast=True) * x
            x_sum += x
        group = (start + pieces * PIECE) // GROUP_WORDS
        pointers = outs * groups + group[:, None, None]
        inside = (group < groups)[:, None, None] & (outs < n)
        scale = _load_float32(SCALE + pointers, inside)
        zero = _load_float32(ZERO + pointers, inside) - 2.0 ** BITS * scale
        acc += scale * products + zero * x_sum
    out = tl.sum(tl.sum(acc, 0, keep_dims=True), 1, keep_dims=True)
    tl.store(
        OUT + tl.program_id(1) * n + outs, out,
        mask=outs < n)


def _few_rows(x, qweight, scale, zero, bits: int):
    """x (M, K) -> (M, N) by _quantized_linear."""
    N, row_bytes = qweight.shape
    groups = scale.shape[1]
    group_words = row_bytes // groups // 4
    piece = min(group_words & -group_words, 32)  # a power of two that divides a group
    out = x.new_empty(len(x), N)
    # of 4 bits the low halves of a group's bytes are its first half, the high ones its second
    x = x.view(-1, groups, 8 // bits, group_words, 4).permute(0, 4, 2, 1, 3).float().contiguous()
    launch(
        _quantized_linear, (triton.cdiv(N, 8), len(x)),
        x.device, x, qweight.view(torch.int32), scale,
        zero, out, N, row_bytes // 4, groups, BITS=bits,
        GROUP_WORDS=group_words, PIECES=128 // piece,
        PIECE=piece, OUTS=8)
    return out


def quantized_linear(
        x, qweight, scale, zero, bits: int,
        cpu_pack=None):
    """x (..., K) times a weight of quantize(·, bits) -> (..., N) in x's type. Few rows read bits / 8
    bytes a weight; for many the weight is restored. cpu_pack: pack_for_cpu of the same, made once:
    without it CPUs restore for few rows too."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if use_triton(x) and len(rows) <= 4:
        y = _few_rows(rows, qweight, scale, zero, bits)
    elif cpu_pack is None or len(rows) > 16:
        dtype = x.dtype
        if x.device.type == "cpu":
            dtype = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
        y = F.linear(rows.to(dtype), dequantize(qweight, scale, zero, bits, dtype))
    elif bits == 8:  # ATen's products are fast with bf16 activations alone
        y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), *cpu_pack)
    else:
        weights, scales = cpu_pack
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.bfloat16(), weights,
            x.shape[-1] // len(scales), scales)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


if __name__ == "__main__":  # beside their peers
    test_all = os.path.join(os.path.dirname(os.path.abspath(__file__)), "test_all.py")
    os.execv(sys.executable, [sys.executable, test_all, "bench", "kernels"])

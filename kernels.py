"""The operations a decoder spends its time in: plain PyTorch references, Triton kernels, and their benchmark: `python kernels.py`.

Each operation stands as reference -> kernels -> autograd -> public function; the public function takes the kernels where
`use_triton` says so (a GPU with Triton) and the reference elsewhere. Shapes: B sequences, T queries, S keys, H query heads,
KV key/value heads, G = H / KV, D channels a head, R rotated channels, V words of the vocabulary. Softmax, norms and losses
are computed in float32 (or what is wider) whatever the input type.

    attention(q (B, T, H, D), k, v (B, S, KV, D), scale=, window=, documents=, kv_start=, kv_len=, blocksparse=, mask=)
    attention_mask(T, S, the same, num_heads=, device=)      for mask=, once a forward: what CPUs use
    document_bounds(documents (B, T)) -> (2, B, T)           for documents=, once a forward
    rotary(q, k, cos, sin)                                   cos, sin (T, R/2) or (B, T, R/2)
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
from collections import namedtuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs kernels on CPU tensors, to check their numbers
LOG2E = math.log2(math.e)

jit = triton.jit if triton else lambda function: function


# ---------------------------------------------------------------- where the kernels run

def use_triton(x) -> bool:
    """Whether tensors on x's device go through the Triton kernels."""
    if x.is_cuda and not triton:
        warnings.warn("Triton is not installed, so plain PyTorch serves the GPU; pip install triton makes it faster")
    return bool(triton) and (x.is_cuda or INTERPRETED)


def use_fused(x) -> bool:
    """The same for what a compiled block fuses by itself from the references: only outside of one."""
    return use_triton(x) and not torch.compiler.is_compiling()


def launch(kernel, grid, device, *args, **constants) -> None:
    """Run a kernel on this device: by itself Triton takes the current one, whatever the tensors are on."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **constants)


def num_sms(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- attention: masks and reference

def document_bounds(documents):
    """(B, T) ids, each run of equal ones a document -> int32 (2, B, T): where each token's document begins and ends."""
    T = documents.shape[1]
    columns = torch.arange(T, device=documents.device)
    changes = documents[:, 1:] != documents[:, :-1]
    begins = torch.where(F.pad(changes, (1, 0)), columns, 0).cummax(1).values
    ends = torch.where(F.pad(changes, (0, 1)), columns + 1, T).flip(1).cummin(1).values.flip(1)
    return torch.stack((begins, ends)).int()


def attention_mask(T: int, S: int, *, window=None, documents=None, kv_start=None, kv_len=None, blocksparse=None,
                   num_heads: int = 1, device=None):
    """What attention's arguments of the same names let T queries see of S keys: bool (B or 1, 1 or num_heads, T, S).

    None where causality says it all and T is 1 or S.
    """
    dense = not blocksparse or S <= blocksparse[0] * blocksparse[1]
    window = S if window is None else window
    if T in (1, S) and dense and window >= S and documents is None and kv_start is None and kv_len is None:
        return None
    keys = torch.arange(S, device=device)
    length = torch.as_tensor(S if kv_len is None else kv_len, device=device).view(-1, 1, 1)
    positions = length - T + torch.arange(T, device=device)[:, None]               # (B or 1, T, 1)
    low = positions - window + 1
    if documents is not None:
        low = torch.maximum(low, documents[0, :, :, None])
    origin = 0
    if kv_start is not None:
        origin = kv_start.view(-1, 1, 1)
        # padding sees itself, since a softmax over nothing is not a number
        low = torch.maximum(low, torch.minimum(origin, positions))
    visible = ((keys <= positions) & (keys >= low))[:, None]                       # (B or 1, 1, T, S)
    if not dense:
        block, local, stride = blocksparse
        key_block = ((keys - origin) // block).view(-1, 1, 1, S)
        distance = ((positions - origin) // block)[:, None] - key_block
        heads = torch.arange(num_heads, device=device).view(-1, 1, 1)
        visible = visible & ((distance < local) | ((key_block + heads + 1) % stride == 0))
    return visible


def attention_reference(q, k, v, scale: float, mask=None):
    """q (B, T, H, D), k and v (B, S, KV, D), mask bool or additive -> (B, T, H, D). Two batched products; query heads that
    share a key head are folded into T, so that keys are not repeated."""
    B, T, H, D = q.shape
    S, KV = k.shape[1:3]
    q = (q * scale).transpose(1, 2).reshape(B, KV, -1, D)                          # (B, T, H, D) -> (B, KV, G·T, D)
    scores = at_least_float32(q @ k.permute(0, 2, 3, 1))                           # (B, KV, G·T, S)
    if mask is not None:
        scores = scores.view(B, H, T, S)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        scores = scores.view(B, KV, -1, S)
    y = scores.softmax(-1).to(v.dtype) @ v.transpose(1, 2)                         # (B, KV, G·T, D)
    return y.view(B, H, T, D).transpose(1, 2)


def _attention_torch(q, k, v, scale: float, mask):
    """Attention without our kernels; without a mask it is causal, T being 1 or S."""
    T = q.shape[1]
    grad = torch.is_grad_enabled() and q.requires_grad
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and (grad or T <= 16):
        if mask is None and T > 1:
            mask = torch.ones(T, T, dtype=torch.bool).tril()
        return attention_reference(q, k, v, scale, mask)  # PyTorch's own is 3 to 4 times slower in these types on CPUs
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    causal = mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True).transpose(1, 2)


# ---------------------------------------------------------------- attention: Triton kernels

# Every mask is an interval of keys [low, high) for each query, its own position being high - 1. A block of queries sweeps its
# keys in three phases: a masked head, where some queries do not look back so far, an unmasked interior, and a masked tail at
# the diagonal. Blocksparse attention (phi-3-small) adds a sweep over its vertical blocks and a condition in the masked phases.
# A tile of rows is a tuple, (HEAD channels,) or (HEAD channels, TAIL channels): a head of 96 is 64 + 32 and pays for no 128.
# A row is a query or, in decoding, one of PACK query heads that share a key head: row r is head r % PACK of query r // PACK.

SPARSE_BLOCK = 16 if INTERPRETED else 64  # phi-3-small's block, and of blocksparse kernels the tile of keys
NO_WINDOW = 2 ** 30

# a tensor (B, rows, heads, D) as a kernel sees it
Heads = namedtuple("Heads", "data batch_stride stride head_stride")
# what a query sees besides causality; missing limits are None
Ranges = namedtuple("Ranges", "window doc_start doc_end kv_start kv_len kv_len_stride")
# constants: LIMITED, whether Ranges limits the keys; STRIDE 0, not blocksparse; VERTICAL, with a sweep over vertical blocks
Meta = namedtuple("Meta", "D HEAD TAIL H G PACK LIMITED BLOCK LOCAL STRIDE VERTICAL")


@jit
def _load_float32(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@jit
def _of_head(X, b, head):
    """-> the rows of one head: (pointer, stride)."""
    return X.data + b * X.batch_stride + head * X.head_stride, X.stride


@jit
def _pointers(X, start, count, META, part, ROWS):
    """-> pointers to ROWS rows of a part of the channels, HEAD or TAIL, and which of them exist."""
    data, stride = X
    rows = tl.arange(0, ROWS)[:, None]
    dims = part * META.HEAD + tl.arange(0, META.TAIL if part else META.HEAD)[None, :]
    data += tl.cast(start, tl.int64) * stride  # tokens times stride pass 2^31
    return data + rows * stride + dims, (start + rows < count) & (dims < META.D)


@jit
def _load_part(X, start, count, META, part, ROWS, MASKED):
    pointers, inside = _pointers(X, start, count, META, part, ROWS)
    if MASKED or META.HEAD + META.TAIL > META.D:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@jit
def _load(X, start, count, META, ROWS, MASKED):
    """A tile of ROWS rows from `start` on, zeros beyond `count`."""
    head = _load_part(X, start, count, META, 0, ROWS, MASKED)
    if META.TAIL:
        return head, _load_part(X, start, count, META, 1, ROWS, MASKED)
    else:
        return (head,)


@jit
def _store(X, tile, factor, start, count, META):
    """Every row of the tile times its factor."""
    for part in tl.static_range(len(tile)):
        pointers, inside = _pointers(X, start, count, META, part, tile[part].shape[0])
        tl.store(pointers, tile[part] * factor[:, None], mask=inside)


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
def _add_dot(acc, alpha, p, x):
    """acc · alpha + p x: (M, D), (M,), (M, N), (N, D) -> (M, D)."""
    p = p.to(x[0].dtype)
    head = tl.dot(p, x[0], acc[0] * alpha)
    if len(x) > 1:
        return head, tl.dot(p, x[1], acc[1] * alpha)
    else:
        return (head,)


@jit
def _first_keys(RANGES, b, tokens, T, offset):
    """The first key that each of these queries sees."""
    low = tl.maximum(tokens + offset - RANGES.window + 1, 0)
    if RANGES.doc_start is not None:
        low = tl.maximum(low, tl.load(RANGES.doc_start + b * T + tokens))
    if RANGES.kv_start is not None:  # padding sees itself
        low = tl.maximum(low, tl.minimum(tl.load(RANGES.kv_start + b).to(tl.int32), tokens + offset))
    return low


@jit
def _last_query(RANGES, b, key, T, offset):
    """One past the last query that sees this key."""
    end = tl.minimum(key - offset + RANGES.window, T)
    if RANGES.doc_end is not None:
        end = tl.minimum(end, tl.load(RANGES.doc_end + b * T + key))
    return end


@jit
def _visible(positions, low, keys, origin, head, META):
    """Which keys these queries see; all shapes broadcast."""
    visible = keys <= positions
    if META.LIMITED:
        visible = visible & (keys >= low)
    if META.STRIDE:
        key_block = (keys - origin) // META.BLOCK
        distance = (positions - origin) // META.BLOCK - key_block
        visible = visible & ((distance < META.LOCAL) | ((key_block + head + 1) % META.STRIDE == 0))
    return visible


@jit
def _attn_inner(state, queries, keys, begin, end, step, scale, META, BLOCK_N, MASKED, BACKWARD):
    """Queries over the tiles of keys from begin to end. state: (acc, m_i, l_i) of online softmax in units of log2 (Dao et al.,
    arXiv 2205.14135, algorithm 1). BACKWARD: (dQ, log2 of the softmax's denominators, row sums of out · dout)."""
    q, do, positions, low, origin, head = queries
    K, V, S = keys
    for start in range(begin, end, step):
        acc, m_i, l_i = state
        k = _load(K, start, S, META, BLOCK_N, MASKED)
        v = _load(V, start, S, META, BLOCK_N, MASKED)
        scores = _dot(q, k) * scale                                                # (M, N)
        if MASKED:
            columns = start + tl.arange(0, BLOCK_N)[None, :]
            visible = _visible(positions[:, None], low[:, None], columns, origin, head, META)
            scores = tl.where(visible, scores, float("-inf"))
        if BACKWARD:
            ds = tl.exp2(scores - m_i[:, None]) * (_dot(do, v) - l_i[:, None])
            acc = _add_dot(acc, 1.0, ds, k)
        else:
            m_new = tl.maximum(m_i, tl.max(scores, 1))  # m_i begins finite: of a row that saw nothing yet differences are numbers
            p = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = _add_dot(acc, alpha[:, None], p, v)
            m_i = m_new
        state = acc, m_i, l_i
    return state


@jit
def _attn_sweep(state, q, do, K, V, RANGES, b, h, row_start, T, S, scale, META, BLOCK_M, BLOCK_N, BACKWARD):
    """_attn_inner over all keys that BLOCK_M rows of one head see, phase by phase; of several splits (grid axis 2) over one."""
    length = S
    origin = 0
    if RANGES.kv_len is not None:
        length = tl.load(RANGES.kv_len + b * RANGES.kv_len_stride).to(tl.int32)
    if RANGES.kv_start is not None:
        origin = tl.load(RANGES.kv_start + b).to(tl.int32)
    rows = row_start + tl.arange(0, BLOCK_M)
    tokens = tl.minimum(rows // META.PACK, T - 1)
    low = _first_keys(RANGES, b, tokens, T, length - T)
    head = h.to(tl.int32) * META.PACK + (rows % META.PACK)[:, None]
    queries = q, do, tokens + length - T, low, origin, head
    keys = _of_head(K, b, h // META.G), _of_head(V, b, h // META.G), S
    first = row_start // META.PACK + length - T  # the first and last query's position
    last = tl.minimum(first + BLOCK_M, length) - 1
    begin = 0
    whole = 0  # from here on every query looks back
    if META.LIMITED:
        begin = tl.min(low, 0)
        whole = tl.max(low, 0)
    if META.VERTICAL:
        near = origin + tl.maximum((first - origin) // META.BLOCK - META.LOCAL + 1, 0) * META.BLOCK
        column = origin + (META.STRIDE - (h.to(tl.int32) + 1) % META.STRIDE) % META.STRIDE * META.BLOCK
        # before `near` all these queries see the vertical blocks and nothing else
        state = _attn_inner(state, queries, keys, column, near, META.STRIDE * META.BLOCK, scale, META, BLOCK_N, META.LIMITED, BACKWARD)
        begin = tl.maximum(begin, near)
        whole = tl.maximum(whole, near + ((last - origin) // META.BLOCK - (first - origin) // META.BLOCK) * META.BLOCK)
    split_size = tl.cdiv(last + 1 - begin, BLOCK_N * tl.num_programs(2)) * BLOCK_N
    begin += tl.program_id(2) * split_size
    end = tl.minimum(begin + split_size, last + 1)
    interior = begin + tl.cdiv(tl.maximum(whole - begin, 0), BLOCK_N) * BLOCK_N
    tail = interior + tl.maximum(tl.minimum(first + 1, end) - interior, 0) // BLOCK_N * BLOCK_N
    bounds = begin, interior, tail, end
    for phase in tl.static_range(3):
        if phase or META.LIMITED or META.STRIDE:
            masked = phase != 1 or META.STRIDE > 0 and not META.VERTICAL
            state = _attn_inner(state, queries, keys, bounds[phase], tl.minimum(bounds[phase + 1], end), BLOCK_N, scale, META,
                                BLOCK_N, masked, BACKWARD)
    return state


def autotuned(*shapes):
    """Time these (BLOCK_M, BLOCK_N, warps, stages) on first use, once for each Meta and type. What does not fit a chip's shared
    memory is passed over."""
    def decorate(function):
        if triton is None:
            return function
        tiles = [(32, 16, 4, 1)] if INTERPRETED else shapes
        configs = [triton.Config(dict(BLOCK_M=m, BLOCK_N=n), warps, stages) for m, n, warps, stages in tiles]
        return triton.autotune(configs, ["META"])(jit(function))
    return decorate


@autotuned((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 1))
def _attn_fwd(Q, K, V, OUT, LSE, RANGES, T, S, scale, META: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: BLOCK_M rows of one head -> OUT and LSE, the log2 of the softmax's denominators; of several splits each its
    own."""
    row_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows first
    pair = tl.program_id(0).to(tl.int64)
    split_pair = pair + tl.program_id(2) * tl.num_programs(0)
    q = _load(_of_head(Q, pair // META.H, pair % META.H), row_start, T * META.PACK, META, BLOCK_M, True)
    state = _zeros(META, BLOCK_M), tl.full((BLOCK_M,), -1e30, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc, m_i, l_i = _attn_sweep(state, q, q, K, V, RANGES, pair // META.H, pair % META.H, row_start, T, S, scale, META, BLOCK_M,
                                BLOCK_N, False)
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    _store(_of_head(OUT, split_pair // META.H, pair % META.H), acc, 1 / l_i, row_start, T * META.PACK, META)
    rows = row_start + tl.arange(0, BLOCK_M)
    tl.store(LSE + split_pair * T * META.PACK + rows, m_i + tl.log2(l_i), mask=rows < T * META.PACK)


@jit
def _combine_splits(PART, LSE, OUT, num_splits, D, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One program a row: the mean of its splits' outputs, weighed by their denominators."""
    dims = tl.arange(0, WIDTH)
    split = tl.arange(0, SPLITS)
    rows = tl.program_id(0).to(tl.int64) + split * tl.num_programs(0)
    lse = tl.load(LSE + rows, mask=split < num_splits, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))[:, None]
    part = _load_float32(PART + rows[:, None] * D + dims[None, :], (split < num_splits)[:, None] & (dims < D)[None, :])
    tl.store(OUT + tl.program_id(0).to(tl.int64) * D + dims, tl.sum(part * weight, 0) / tl.sum(weight), mask=dims < D)


@autotuned((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 1), (32, 32, 4, 1))
def _attn_bwd_dq(Q, K, V, OUT, DO, LSE, DELTA, DQ, RANGES, T, S, scale, META: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr):
    """One program: BLOCK_M queries of one head -> DQ, and DELTA, the row sums of out · dout."""
    row_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    pair = tl.program_id(0).to(tl.int64)
    b = pair // META.H
    h = pair % META.H
    q = _load(_of_head(Q, b, h), row_start, T, META, BLOCK_M, True)
    do = _load(_of_head(DO, b, h), row_start, T, META, BLOCK_M, True)
    out = _load(_of_head(OUT, b, h), row_start, T, META, BLOCK_M, True)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(len(out)):
        delta += tl.sum(out[part].to(tl.float32) * do[part].to(tl.float32), 1)
    rows = row_start + tl.arange(0, BLOCK_M)
    lse = tl.load(LSE + pair * T + rows, mask=rows < T, other=0.0)
    tl.store(DELTA + pair * T + rows, delta, mask=rows < T)
    state = _zeros(META, BLOCK_M), lse, delta
    dq, _, _ = _attn_sweep(state, q, do, K, V, RANGES, b, h, row_start, T, S, scale, META, BLOCK_M, BLOCK_N, True)
    _store(_of_head(DQ, b, h), dq, _natural(scale, BLOCK_M), row_start, T, META)


@jit
def _natural(scale, ROWS):
    """The scale without log2(e), which belongs to the exponent alone, of each row."""
    return tl.full((ROWS,), 0.6931471805599453, tl.float32) * scale


@jit
def _dkdv_inner(state, keys, queries, RANGES, b, begin, end, T, S, scale, META, BLOCK_M, MASKED):
    """A tile of keys over the queries from begin to end, everything transposed."""
    k, v, columns = keys
    Q, DO, LSE, DELTA, head = queries
    for start in range(begin, end, BLOCK_M):
        dk, dv = state
        rows = start + tl.arange(0, BLOCK_M)
        q = _load(Q, start, T, META, BLOCK_M, MASKED)
        do = _load(DO, start, T, META, BLOCK_M, MASKED)
        p = tl.exp2(_dot(k, q) * scale - _load_float32(LSE + rows, rows < T)[None, :])         # (N, M)
        if MASKED:
            low = _first_keys(RANGES, b, tl.minimum(rows, T - 1), T, S - T)
            visible = _visible((rows + S - T)[None, :], low[None, :], columns[:, None], 0, head, META)
            p = tl.where(visible & (rows < T)[None, :], p, 0.0)
        ds = p * (_dot(v, do) - _load_float32(DELTA + rows, rows < T)[None, :])
        state = _add_dot(dk, 1.0, ds, q), _add_dot(dv, 1.0, p, do)
    return state


@autotuned((64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1))
def _attn_bwd_dkdv(Q, K, V, DO, LSE, DELTA, DK, DV, RANGES, T, S, scale, META: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr):
    """One program: BLOCK_N keys of one key/value head -> DK and DV, summed over its G query heads: nothing is added atomically."""
    key_start = tl.program_id(1) * BLOCK_N
    pair = tl.program_id(0).to(tl.int64)
    b = pair // (META.H // META.G)
    kv = pair % (META.H // META.G)
    k = _load(_of_head(K, b, kv), key_start, S, META, BLOCK_N, True)
    v = _load(_of_head(V, b, kv), key_start, S, META, BLOCK_N, True)
    keys = k, v, key_start + tl.arange(0, BLOCK_N)
    state = _zeros(META, BLOCK_N), _zeros(META, BLOCK_N)
    # as in _attn_sweep: queries at the diagonal, those that see all keys, those past the first key's last
    last_key = tl.minimum(key_start + BLOCK_N, S) - 1
    begin = tl.maximum(key_start - (S - T), 0)
    interior = begin + tl.cdiv(tl.maximum(last_key - (S - T) - begin, 0), BLOCK_M) * BLOCK_M
    for g in range(META.G):
        head = (kv * META.G + g).to(tl.int32)
        row = (b * META.H + head) * T
        queries = _of_head(Q, b, head), _of_head(DO, b, head), LSE + row, DELTA + row, head
        whole = _last_query(RANGES, b, key_start, T, S - T)
        end = _last_query(RANGES, b, last_key, T, S - T)
        if META.STRIDE:
            block = key_start // META.BLOCK
            local_end = tl.where((block + head + 1) % META.STRIDE == 0, T, (block + META.LOCAL) * META.BLOCK - (S - T))
            whole = tl.minimum(whole, local_end)
            end = tl.minimum(end, local_end)
        bounds = begin, interior, interior + tl.maximum(whole - interior, 0) // BLOCK_M * BLOCK_M, end
        for phase in tl.static_range(3):
            state = _dkdv_inner(state, keys, queries, RANGES, b, bounds[phase], tl.minimum(bounds[phase + 1], end), T, S, scale,
                                META, BLOCK_M, phase != 1)
    dk, dv = state
    _store(_of_head(DK, b, kv), dk, _natural(scale, BLOCK_N), key_start, S, META)
    _store(_of_head(DV, b, kv), dv, tl.full((BLOCK_N,), 1.0, tl.float32), key_start, S, META)


# ---------------------------------------------------------------- attention: autograd and public function

def _attention_args(q, k, v, scale: float, window, documents, kv_start, kv_len, blocksparse, pack: int = 1):
    """What all kernels of attention take: K and V; RANGES, S, scale; META."""
    rows, H, D = q.shape[1:]
    doc_start, doc_end = (None, None) if documents is None else documents
    ranges = Ranges(window, doc_start, doc_end, kv_start, kv_len, 0 if kv_len is None else kv_len.stride(0))
    head = max(16, 1 << D.bit_length() - 1)  # 96 is 64 + 32, 80 is 64 + 16, 128 has no tail
    tail = 0 if D <= head else max(16, triton.next_power_of_2(D - head))
    limited = window < NO_WINDOW or documents is not None or kv_start is not None
    sparse = *(blocksparse or (SPARSE_BLOCK, 0, 0)), bool(blocksparse) and pack == 1
    meta = Meta(*map(tl.constexpr, (D, head, tail, H, H // k.shape[2], pack, limited, *sparse)))
    return _heads(k), _heads(v), (ranges, rows // pack, k.shape[1], scale * LOG2E), meta


def _heads(x) -> Heads:
    return Heads(x, *x.stride()[:3])


def _launch_attention(kernel, heads: int, block: str, length: int, q, *args, META) -> None:
    """A program for each of q's batch times heads (on axis 0, which may pass 65,535) and each block of `length` rows."""
    tile = {}
    if META.VERTICAL.value:  # the sweep over vertical blocks needs them as tiles
        kernel = kernel.fn
        tile = dict(BLOCK_M=SPARSE_BLOCK, BLOCK_N=SPARSE_BLOCK, num_warps=4, num_stages=2)
    grid = lambda constants: (len(q) * heads, triton.cdiv(length, constants[block]))
    launch(kernel, grid, q.device, _heads(q), *args, META=META, **tile)


# operators, so that a compiled block holds them whole

@torch.library.custom_op("minphi::attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, float scale, int window, "
                         "Tensor? documents, Tensor? kv_start, Tensor? kv_len, int[] blocksparse) -> (Tensor, Tensor)")
def _attention(q, k, v, scale, window, documents, kv_start, kv_len, blocksparse):
    """-> output (B, T, H, D), log2 of the softmax's denominators (B, H, T)."""
    out, lse = _empty_output(q)
    K, V, shape, meta = _attention_args(q, k, v, scale, window, documents, kv_start, kv_len, blocksparse)
    _launch_attention(_attn_fwd, q.shape[2], "BLOCK_M", q.shape[1], q, K, V, _heads(out), lse, *shape, META=meta)
    return out, lse


@_attention.register_fake
def _empty_output(q, *_):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("minphi::attention_backward", mutates_args=(), schema="(Tensor do, Tensor q, Tensor k, Tensor v, "
                         "Tensor out, Tensor lse, float scale, int window, Tensor? documents, int[] blocksparse) -> "
                         "(Tensor, Tensor, Tensor)")
def _attention_backward(do, q, k, v, out, lse, scale, window, documents, blocksparse):
    K, V, shape, meta = _attention_args(q, k, v, scale, window, documents, None, None, blocksparse)
    dq, dk, dv = _empty_gradients(do, q, k, v)
    delta = torch.empty_like(lse)
    dout = _heads(do.contiguous())
    _launch_attention(_attn_bwd_dq, q.shape[2], "BLOCK_M", q.shape[1], q, K, V, _heads(out), dout, lse, delta, _heads(dq), *shape,
                      META=meta)
    _launch_attention(_attn_bwd_dkdv, k.shape[2], "BLOCK_N", k.shape[1], q, K, V, dout, lse, delta, _heads(dk), _heads(dv), *shape,
                      META=meta)
    return dq, dk, dv


@_attention_backward.register_fake
def _empty_gradients(do, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.window, documents, _, _, ctx.blocksparse = inputs
    ctx.save_for_backward(q, k, v, *output, documents)


def _backward(ctx, do, _):
    *saved, documents = ctx.saved_tensors
    gradients = _attention_backward(do, *saved, ctx.scale, ctx.window, documents, ctx.blocksparse)
    return *gradients, None, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _decode(q, k, v, *limits):
    """A few queries over a long cache: the keys are split over programs (Flash-Decoding, Dao et al. 2023)."""
    B, T, H, D = q.shape
    S, KV = k.shape[1:3]
    rows = T * H // KV                                                             # rows of a key head: (T, G)
    q = q.reshape(B, T, KV, -1, D).transpose(1, 2).reshape(B, KV, rows, D).transpose(1, 2)
    block_n = 16 if INTERPRETED else 64
    # as many splits as the capacity and the processors allow: the length lies on the device
    num_splits = max(1, min(triton.cdiv(S, block_n), 4 * num_sms(q.device) // (B * KV), 128))
    part = q.new_empty(num_splits * B, KV, rows, D, dtype=torch.float32)
    lse = q.new_empty(num_splits * B, KV, rows, dtype=torch.float32)
    out = q.new_empty(B, KV, T, H // KV, D)
    K, V, shape, meta = _attention_args(q, k, v, *limits, pack=H // KV)
    block_m = max(16, triton.next_power_of_2(rows))
    launch(_attn_fwd.fn, (B * KV, 1, num_splits), q.device, _heads(q), K, V, _heads(part.transpose(1, 2)), lse, *shape, META=meta,
           BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, num_stages=2)
    launch(_combine_splits, (B * H * T,), q.device, part, lse, out, num_splits, D, WIDTH=triton.next_power_of_2(D),
           SPLITS=triton.next_power_of_2(num_splits))
    return out.transpose(1, 2).reshape(B, T, H, D)


def attention(q, k, v, *, scale=None, window=None, documents=None, kv_start=None, kv_len=None, blocksparse=None, mask=None):
    """Causal grouped-query attention: q (B, T, H, D), k and v (B, S, KV, D), any strides -> (B, T, H, D).

    Query t stands at position kv_len - T + t and sees the keys up to its own. kv_len: how many keys there are, a number or an
    integer tensor, () or (B,), of a cache's length on its device; None: S. window: how many of the latest keys a query sees.
    documents: (2, B, T) of document_bounds, T = S: tokens see their own document. kv_start (B,): the first key that is no padding.
    blocksparse: (block, local, stride), phi-3-small's pattern (arXiv 2404.14219, section 2): a block of queries sees its `local`
    newest blocks of keys, and of the older ones every stride-th, which ones being each head's own; blocks count from kv_start.
    mask: attention_mask of the same arguments, or an additive one; the reference alone uses it, and builds none then.
    """
    B, T, H, D = q.shape
    scale = D ** -0.5 if scale is None else scale
    if isinstance(kv_len, int):
        k, v, kv_len = k[:, :kv_len], v[:, :kv_len], None
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    cached = kv_start is not None or kv_len is not None
    # float32 and wider heads pass shared memory; what has a cache needs no gradients
    served = D <= 256 and (q.dtype != torch.float32 or INTERPRETED) and not (grad and cached)
    if use_triton(q) and served and (not blocksparse or blocksparse[0] == SPARSE_BLOCK):
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        kv_len = None if kv_len is None else kv_len.expand(B)
        limits = scale, NO_WINDOW if window is None else window, documents, kv_start, kv_len, list(blocksparse or ())
        if grad or documents is not None or T > 8 or T * H // k.shape[2] > 64:
            return _attention(q, k, v, *limits)[0]
        return _decode(q, k, v, *limits)
    if kv_len is not None:
        length = int(kv_len.max()) if mask is None else mask.shape[-1]
        k, v = k[:, :length], v[:, :length]
        kv_len = None if kv_len.dim() == 0 else kv_len
    if mask is None:
        mask = attention_mask(T, k.shape[1], window=window, documents=documents, kv_start=kv_start, kv_len=kv_len,
                              blocksparse=blocksparse, num_heads=H, device=q.device)
    return _attention_torch(q, k, v, scale, mask)


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
    offsets = row * width + columns
    x = _load_float32(X + offsets, inside)
    if RESIDUAL is not None:
        x += _load_float32(RESIDUAL + offsets, inside)
        x = x.to(SUM.dtype.element_ty)
        tl.store(SUM + offsets, x, mask=inside)
        x = x.to(tl.float32)
    mean = 0.0
    if BIAS is not None:
        mean = tl.sum(x, 0) / width
        x = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    y = x * scale * _load_float32(WEIGHT + columns, inside)
    if BIAS is not None:
        y += _load_float32(BIAS + columns, inside)
    tl.store(Y + offsets, y, mask=inside)
    tl.store(STATS + row * 2, mean)
    tl.store(STATS + row * 2 + 1, scale)


@jit
def _norm_bwd(X, DY, DSUM, WEIGHT, STATS, DX, DWEIGHT, DBIAS, rows, width, CENTERED: tl.constexpr, WIDTH: tl.constexpr):
    """One program a share of the rows; it adds up DWEIGHT and DBIAS of its rows in registers."""
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    weight = _load_float32(WEIGHT + columns, inside)
    dweight = tl.zeros((WIDTH,), tl.float32)
    dbias = tl.zeros((WIDTH,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offsets = row.to(tl.int64) * width + columns
        scale = tl.load(STATS + row * 2 + 1)
        x = _load_float32(X + offsets, inside)
        x = tl.where(inside, (x - tl.load(STATS + row * 2)) * scale, 0.0)
        dy = _load_float32(DY + offsets, inside)
        dweight += dy * x
        dbias += dy
        dy *= weight
        dx = dy - x * (tl.sum(dy * x, 0) / width)
        if CENTERED:
            dx -= tl.sum(dy, 0) / width
        dx *= scale
        if DSUM is not None:
            dx += _load_float32(DSUM + offsets, inside)
        tl.store(DX + offsets, dx, mask=inside)
    tl.store(DWEIGHT + tl.program_id(0) * width + columns, dweight, mask=inside)
    tl.store(DBIAS + tl.program_id(0) * width + columns, dbias, mask=inside)


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
        block = triton.next_power_of_2(width)
        ctx.constants = dict(WIDTH=block, num_warps=min(16, max(4, block // 512)))
        ctx.centered = bias is not None
        launch(_norm_fwd, (rows,), x.device, x, residual, weight, bias, y, total, stats, width, eps, **ctx.constants)
        ctx.save_for_backward(total, weight, stats)
        return y, None if residual is None else total

    @staticmethod
    def backward(ctx, dy, dtotal):
        x, weight, stats = ctx.saved_tensors
        rows, width = len(stats), x.shape[-1]
        programs = min(rows, 4 * num_sms(x.device))
        dx = torch.empty_like(x)
        dtotal = None if dtotal is None else dtotal.contiguous()
        dweight, dbias = x.new_empty(2, programs, width, dtype=torch.float32)
        launch(_norm_bwd, (programs,), x.device, x, dy.contiguous(), dtotal, weight, stats, dx, dweight, dbias, rows, width,
               CENTERED=ctx.centered, **ctx.constants)
        dweight, dbias = (d.sum(0).to(weight.dtype) for d in (dweight, dbias))
        return dx, None if dtotal is None else dx, dweight, dbias if ctx.centered else None, None


def layer_norm(x, weight, bias, eps: float, residual=None):
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension, in x's type (Ba et al., arXiv 1607.06450).

    residual: another summand; then -> (norm(x + residual), x + residual), in one pass over memory.
    """
    if use_fused(x):
        y, total = _Norm.apply(x, residual, weight, bias, eps)
    else:
        total = x if residual is None else x + residual
        y = rms_norm_reference(total, weight, eps) if bias is None else layer_norm_reference(total, weight, bias, eps)
    return y if residual is None else (y, total)


def rms_norm(x, weight, eps: float, residual=None):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in x's type (Zhang and Sennrich, arXiv 1910.07467); residual:
    see layer_norm."""
    return layer_norm(x, weight, None, eps, residual)


# ---------------------------------------------------------------- rotary positions

def rotary_reference(x, cos, sin):
    """x (B, T, H, D); cos and sin as in rotary."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)                                # (T, 1, R/2) or (B, T, 1, R/2)
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1).to(x.dtype)


@jit
def _rotate(X, Y, COS, SIN, cos_b, T, H, sign, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """One program: HEADS heads of one token. A channel of the first half of the rotated ones has its partner HALF further on."""
    token = tl.program_id(0).to(tl.int64)
    b = token // T
    t = token % T
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, WIDTH)[None, :]
    inside = (heads < H) & (dims < D)
    rotated = dims < 2 * HALF
    angle = b * cos_b + t * HALF + dims % HALF
    cos = tl.load(COS + angle, mask=rotated, other=1.0)
    sin = tl.load(SIN + angle, mask=rotated, other=0.0) * tl.where(dims < HALF, -sign, sign)
    partner = tl.where(dims < HALF, HALF, -HALF)
    x = X.data + b * X.batch_stride + t * X.stride + heads * X.head_stride + dims
    y = _load_float32(x, inside) * cos
    y += _load_float32(x + partner, inside & rotated) * sin
    tl.store(Y + (token * H + heads) * D + dims, y, mask=inside)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def rotate(x, cos, sin, sign: float):
        B, T, H, D = x.shape
        x = x if x.stride(3) == 1 else x.contiguous()
        y = x.new_empty(x.shape)
        heads = min(16, triton.next_power_of_2(H))
        launch(_rotate, (B * T, triton.cdiv(H, heads)), x.device, _heads(x), y, cos, sin, cos.stride(0) if cos.dim() == 3 else 0,
               T, H, sign, D=D, HALF=cos.shape[-1], HEADS=heads, WIDTH=triton.next_power_of_2(D))
        return y

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _Rotary.rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, dy):
        return _Rotary.rotate(dy, *ctx.saved_tensors, -1.0), None, None


def rotary(q, k, cos, sin):
    """Rotate the channel pairs (i, i + R/2) of q (B, T, H, D) and k (B, T, KV, D) by their position's angle (RoFormer, arXiv
    2104.09864, half layout) -> q, k, new tensors. cos, sin: float32 (T, R/2) or (B, T, R/2). Of D > R channels the rest stays."""
    if use_fused(q):
        cos, sin = cos.contiguous(), sin.contiguous()
        return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)
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


@jit
def _activate(gate, KIND: tl.constexpr):
    """-> activation(gate) and its derivative. gelu's tanh form is gate · sigmoid(inner), as silu is with its own inner."""
    inner = gate
    slope = 1.0
    if KIND == "geglu":
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        slope = 1.5957691216057308 * (1 + 0.134145 * gate * gate)
    elif KIND == "geglu_clamped":
        inner = 1.702 * gate
        slope = 1.702
    s = tl.sigmoid(inner)
    return gate * s, s + gate * s * (1 - s) * slope


@jit
def _glu(GATE_UP, Y, DGATE_UP, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Y of GATE_UP's two halves; where DGATE_UP is given, that, Y being the upstream gradient."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    offsets = row * 2 * width + columns
    raw_gate = _load_float32(GATE_UP + offsets, inside)
    raw_up = _load_float32(GATE_UP + offsets + width, inside)
    gate = raw_gate
    up = raw_up
    if KIND == "geglu_clamped":
        gate = tl.minimum(gate, 20.0)
        up = tl.clamp(up, -20.0, 20.0)
    activated, slope = _activate(gate, KIND)
    multiplier = up + 1 if KIND == "geglu_clamped" else up
    y = Y + row * width + columns
    if DGATE_UP is None:
        tl.store(y, (activated * multiplier), mask=inside)
    else:
        dy = _load_float32(y, inside)
        dgate = tl.where(raw_gate == gate, dy * multiplier * slope, 0.0)  # what was clamped has no gradient
        dup = tl.where(raw_up == up, dy * activated, 0.0)
        tl.store(DGATE_UP + offsets, dgate, mask=inside)
        tl.store(DGATE_UP + offsets + width, dup, mask=inside)


class _Glu(torch.autograd.Function):
    @staticmethod
    def launch(gate_up, y, dgate_up, kind):
        width = y.shape[-1]
        grid = y.numel() // width, triton.cdiv(width, 1024)
        launch(_glu, grid, y.device, gate_up, y, dgate_up, width, KIND=kind, BLOCK=1024)

    @staticmethod
    def forward(ctx, gate_up, kind):
        gate_up = gate_up.contiguous()
        ctx.kind = kind
        ctx.save_for_backward(gate_up)
        y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        _Glu.launch(gate_up, y, None, kind)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate_up, = ctx.saved_tensors
        dgate_up = torch.empty_like(gate_up)
        _Glu.launch(gate_up, dy.contiguous(), dgate_up, ctx.kind)
        return dgate_up, None


def swiglu(gate_up):
    """(..., 2F) -> (..., F): silu(gate) · up, gate being the first half (Shazeer, arXiv 2002.05202)."""
    return _Glu.apply(gate_up, "swiglu") if use_fused(gate_up) else swiglu_reference(gate_up)


def geglu(gate_up):
    """(..., 2F) -> (..., F): gelu(gate) · up with the tanh form of gelu (Gemma)."""
    return _Glu.apply(gate_up, "geglu") if use_fused(gate_up) else geglu_reference(gate_up)


def geglu_clamped(gate_up):
    """(..., 2F) -> (..., F): phi-3-small's: gate · sigmoid(1.702 gate) · (up + 1), gate at most 20 and up within ± 20. Its
    checkpoint interleaves gate and up; here, as everywhere, gate is the first half."""
    return _Glu.apply(gate_up, "geglu_clamped") if use_fused(gate_up) else geglu_clamped_reference(gate_up)


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
    # read before the reductions: after them another warp may have overwritten it. What is no word has weight 0
    target_logit = _load_float32(LOGITS + target, (target >= 0) & (target < vocab))
    m_i = tl.full((BLOCK,), MASKED_OUT, tl.float32)
    l_i = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(LOGITS + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m_i, logits)
        l_i = l_i * tl.exp(m_i - m_new) + tl.exp(logits - m_new)
        m_i = m_new
    m_row = tl.max(m_i, 0)
    lse = m_row + tl.log(tl.sum(l_i * tl.exp(m_i - m_row), 0))
    tl.store(LOSS + row, weight * (lse - target_logit))
    if GRADIENT:
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocab
            p = tl.exp(_load_float32(LOGITS + columns, inside) - lse)
            gradient = weight * tl.where(columns == target, p - 1, p)
            tl.store(LOGITS + columns, gradient, mask=inside)


def chunk_rows(vocab: int, itemsize: int) -> int:
    """How many rows of logits exist at once, a multiple of 128: a larger chunk moves the weight's gradient less often."""
    return max(CHUNK_ROWS, CHUNK_BYTES // (vocab * itemsize) // 128 * 128)


class _LinearCrossEntropy(torch.autograd.Function):
    """The logits of a chunk of tokens at a time, turned in place into their gradient, which goes at once into x's and the weight's
    (as in Liger, arXiv 2410.10989, section 3.2). The loss being a scalar, the backward pass only scales."""

    @staticmethod
    def forward(ctx, x, weight, targets, weights, bias, needs_grad):
        N, V = len(x), len(weight)
        losses = x.new_empty(N, dtype=torch.float32)
        matrix = weight.to(x.dtype)
        bias_x = None if bias is None else bias.to(x.dtype)
        dx = torch.empty_like(x) if needs_grad else None
        dweight = dbias = None
        num_rows = chunk_rows(V, x.itemsize)
        for begin in range(0, N, num_rows):
            rows = slice(begin, begin + num_rows)
            logits = F.linear(x[rows], matrix, bias_x)                             # (rows, V)
            launch(_cross_entropy_rows, (len(logits),), x.device, logits, targets[rows], weights[rows], losses[rows], V, V,
                   GRADIENT=needs_grad, BLOCK=min(4096, triton.next_power_of_2(V)), num_warps=8)
            if needs_grad:
                dx[rows] = logits @ matrix
                product = logits.t() @ x[rows]                                     # (V, d)
                # one chunk needs no float32 sum
                dweight = product if dweight is None else dweight.float().add_(product)
                if bias is not None:
                    dbias = logits.sum(0, dtype=torch.float32) + (0 if dbias is None else dbias)
        ctx.save_for_backward(dx, dweight, dbias)
        ctx.dtypes = x.dtype, weight.dtype, weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx, upstream):
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        dx, dweight, dbias = (None if d is None else (d * upstream).to(dtype) for d, dtype in gradients)
        return dx, dweight, None, None, dbias, None


def cross_entropy(x, weight, targets, weights=None, bias=None):
    """Next-token loss from final hidden states x (..., d) and the output layer, weight (V, d) and perhaps bias (V).

    targets (...): int64, -1 where there is nothing to predict; a number outside the vocabulary is an error on CPUs and counts as
    -1 on GPUs, which could not raise without waiting. weights (...): of each prediction, of any sign.
    -> (sum of weighted losses in nats, sum of weights), float32 scalars; a batch without targets gives (0, 0).
    """
    x, targets = x.flatten(0, -2), targets.flatten()
    weights = torch.ones(targets.shape, device=x.device) if weights is None else weights.flatten().float()
    if use_triton(x):
        weights = torch.where((targets >= 0) & (targets < len(weight)), weights, 0.0)
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        with torch.autocast(x.device.type, enabled=False):
            return _LinearCrossEntropy.apply(x, weight, targets, weights, bias, needs_grad), weights.sum()
    weights = torch.where(targets != -1, weights, 0.0)
    if x.device.type == "cpu":  # on a GPU their number would have to be waited for
        used = weights.nonzero().squeeze(1)
        x, targets, weights = x[used], targets[used], weights[used]
    return cross_entropy_reference(x, weight, targets, weights, bias), weights.sum()


# ---------------------------------------------------------------- matrix products with quantized weights

def quantize(weight, bits: int, group: int):
    """weight (N, K), K a multiple of group -> (qweight uint8 (N, K · bits / 8), scale (N, K / group), zero (N, K / group), both
    bf16) with weight ≈ zero + scale · code, code from 0 to 2^bits - 1.

    Of 4 bits the low half-bytes hold the first half of each group, and each group's range is the one, of some narrower than the
    full one, with the least squared error. Of 8 bits the range is symmetric: zero is -128 · scale exactly.
    """
    N, K = weight.shape
    if bits not in (4, 8) or K % group or group % 8:
        raise ValueError(f"{bits} bits in groups of {group} do not fit rows of {K}: give 4 or 8 bits and a divisor of {K} that is "
                         "a multiple of 8")
    x = weight.detach().float().view(N, K // group, group)
    if bits == 8:
        scale = _round_up(x.abs().amax(-1) / 127)
        zero = -128 * scale
        return _codes(x, scale, zero, 255).view(N, K), scale, zero
    candidates = []
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
        zero = (x.amin(-1) * shrink).bfloat16()
        scale = _round_up((x.amax(-1) * shrink - zero.float()) / 15)
        error = (_restore(_codes(x, scale, zero, 15), scale, zero) - x).square().sum(-1)
        candidates.append((error, scale, zero))
    errors, scales, zeros = (torch.stack(values) for values in zip(*candidates, strict=True))
    best = errors.argmin(0, keepdim=True)                                          # (1, N, K / group)
    scale, zero = scales.gather(0, best)[0], zeros.gather(0, best)[0]
    low, high = _codes(x, scale, zero, 15).chunk(2, -1)
    return (low | high << 4).view(N, K // 2), scale, zero


def _round_up(scale):
    """In bf16, rounded up, so that the range stays covered."""
    return (scale * (1 + 2 ** -8)).clamp(min=1e-30).bfloat16()


def _codes(x, scale, zero, top: int):
    return ((x - zero[..., None].float()) / scale[..., None].float()).round_().clamp_(0, top).to(torch.uint8)


def _restore(codes, scale, zero, dtype=torch.float32):
    return torch.addcmul(zero[..., None].to(dtype), scale[..., None].to(dtype), codes.to(dtype))


def _unpack(qweight, groups: int, bits: int):
    """-> codes uint8 (N, groups, group)."""
    codes = qweight.view(len(qweight), groups, -1)
    return codes if bits == 8 else torch.cat((codes & 15, codes >> 4), -1)


def dequantize(qweight, scale, zero, bits: int, dtype=torch.float32):
    """What quantize's result stands for: (N, K). Rows of all three may be picked before, as an embedding does."""
    return _restore(_unpack(qweight, scale.shape[1], bits), scale, zero, dtype).flatten(1)


def pack_for_cpu(qweight, scale, zero, bits: int):
    """The same weight as ATen's products of few rows read it, (weights, scales), or None where they do not serve: of 4 bits they
    take groups of 32 to 256 and N % 16 = 0, of 8 bits one symmetric group a row and K % 64 = 0."""
    N, groups = scale.shape
    codes = _unpack(qweight, groups, bits)
    if bits == 8:
        if groups > 1 or codes.shape[2] % 64 or not torch.equal(zero, -128 * scale):
            return None
        return (codes[:, 0] ^ 128).view(torch.int8), scale[:, 0].contiguous()
    if codes.shape[2] not in (32, 64, 128, 256) or N % 16:
        return None
    scales = torch.stack((scale, (zero.float() + 8 * scale.float()).bfloat16()), -1)  # theirs is w = (code - 8) · scale + zero
    weights = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
    return weights, scales.transpose(0, 1).contiguous()                            # (groups, N, 2)


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 itself; without such units products of many rows are faster in float32."""
    units = torch.cpu.get_capabilities()
    return any(units.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@jit
def _quantized_linear(X, QWEIGHT, SCALE, ZERO, PART, m, n, k, BITS: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """X Wᵀ for few rows of X. One program: BLOCK_N rows of W, restored in registers, over every so-manieth BYTES of them; the
    caller adds the parts up."""
    GROUP_BYTES: tl.constexpr = GROUP * BITS // 8
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    columns = tl.arange(0, BYTES)[None, :]
    QWEIGHT += outs[:, None] * (k * BITS // 8) + columns
    SCALE += outs * (k // GROUP)
    ZERO += outs * (k // GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.program_id(1), k * BITS // 8 // BYTES, tl.num_programs(1)):
        group = step * BYTES // GROUP_BYTES
        codes = tl.load(QWEIGHT + step * BYTES, mask=outs[:, None] < n, other=0)
        scale = _load_float32(SCALE + group, outs < n)
        zero = _load_float32(ZERO + group, outs < n)
        x = X + rows.to(tl.int64) * k + group * GROUP + step * BYTES % GROUP_BYTES + columns
        for half in tl.static_range(8 // BITS):  # of 4 bits the first half of the group, then the second
            code = (codes >> (4 * half)) & (2 ** BITS - 1)
            w = (zero[:, None] + scale[:, None] * code.to(tl.float32)).to(X.dtype.element_ty)
            acc = tl.dot(tl.load(x + half * GROUP_BYTES, mask=rows < m, other=0.0), tl.trans(w), acc)
    PART += (tl.program_id(1).to(tl.int64) * m + rows) * n
    tl.store(PART + outs[None, :], acc, mask=(rows < m) & (outs[None, :] < n))


def _quantized_linear_triton(x, qweight, scale, zero, bits: int):
    """x (M, K) -> (M, N)."""
    (M, K), (N, groups) = x.shape, scale.shape
    group_bytes = qweight.shape[1] // groups
    tile = min(64, group_bytes & -group_bytes)  # the largest power of two that divides a group's bytes
    if M > 64 or tile < 16:  # many rows are better restored once, and tl.dot takes no fewer than 16 columns
        return F.linear(x, dequantize(qweight, scale, zero, bits, x.dtype))
    blocks = triton.cdiv(N, 32)
    # more splits than the card has room for: reading the weights is all that counts
    num_splits = max(1, min(8 * num_sms(x.device) // blocks, qweight.shape[1] // tile, 32))
    part = x.new_empty(num_splits, M, N, dtype=torch.float32)
    launch(_quantized_linear, (blocks, num_splits, triton.cdiv(M, 16)), x.device, x, qweight, scale, zero, part, M, N, K, BITS=bits,
           GROUP=K // groups, BYTES=tile, BLOCK_M=16, BLOCK_N=32, num_warps=2, num_stages=3)
    return part.sum(0).to(x.dtype)


def quantized_linear(x, qweight, scale, zero, bits: int, cpu_pack=None):
    """x (..., K) times a weight of quantize(·, bits) -> (..., N) in x's type. Few rows read bits / 8 bytes a weight; for many the
    weight is restored. cpu_pack: pack_for_cpu of the same, made once: without it CPUs restore for few rows too."""
    rows = x.reshape(-1, x.shape[-1])
    if use_triton(x):
        y = _quantized_linear_triton(rows.contiguous(), qweight, scale, zero, bits)
    elif cpu_pack is not None and len(rows) <= 16:  # ATen's products are fast with bf16 activations alone
        weights, scales = cpu_pack
        rows = rows.bfloat16()
        if bits == 8:
            y = torch.ops.aten._weight_int8pack_mm(rows, weights, scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weights, rows.shape[1] // len(scales), scales)
    else:
        slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not cpu_has_bfloat16()
        dtype = torch.float32 if slow else x.dtype
        y = F.linear(rows.to(dtype), dequantize(qweight, scale, zero, bits, dtype))
    return y.to(x.dtype).view(*x.shape[:-1], -1)


# ---------------------------------------------------------------- benchmark

def bench() -> None:
    """Each operation beside its peers: milliseconds of the forward pass and of forward and backward, and the former's rate."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    peers = {}
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        peers["liger"] = lambda: LigerFusedLinearCrossEntropyLoss(reduction="sum")(head, x, targets)

    def tensor(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def row(name, work, **peers):
        for peer, forward in peers.items():
            upstream = torch.randn_like(forward())
            milliseconds = [triton.testing.do_bench(call, rep=300, return_mode="median")
                            for call in (forward, lambda forward=forward: forward().backward(upstream))]
            print(f"{name:36}{peer:8}{milliseconds[0]:10.3f}{milliseconds[1]:10.3f}{work / milliseconds[0] / 1e9:10.2f}", flush=True)

    print(f"{torch.cuda.get_device_name()}, {datetime.date.today()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'operation, bf16':36}{'peer':8}{'ms':>10}{'+ back':>10}  TFLOP/s or TB/s")
    for H, KV, D in ((48, 48, 128), (32, 8, 128), (32, 32, 96), (32, 32, 64)):
        q, k, v = tensor(4, 4096, H, D), tensor(4, 4096, KV, D), tensor(4, 4096, KV, D)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        sdpa = functools.partial(F.scaled_dot_product_attention, *heads_first, is_causal=True, enable_gqa=True)
        row(f"attention, 4 x 4096, {H}/{KV} x {D}", 4 * H * 4096 ** 2 * 2 * D, ours=functools.partial(attention, q, k, v),
            cudnn=sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(sdpa), flash=sdpa_kernel(SDPBackend.FLASH_ATTENTION)(sdpa))
    x, head, targets = tensor(8192, 4096), tensor(100352, 4096), torch.randint(100352, (8192,), device="cuda")
    row("cross entropy, 8192 x 4096 x 100352", 2 * 8192 * 4096 * 100352, ours=lambda: cross_entropy(x, head, targets)[0],
        torch=lambda: F.linear_cross_entropy(x, head, targets, reduction="sum"), **peers)
    weight = tensor(4096)
    row("rms_norm, 8192 x 4096", 4 * 8192 * 4096 / 1e3, ours=lambda: rms_norm(x, weight, 1e-5),
        torch=lambda: F.rms_norm(x, (4096,), weight, 1e-5))


if __name__ == "__main__":
    if triton is None or not torch.cuda.is_available():
        raise SystemExit("kernels.py: its benchmark needs a GPU and Triton; `python test_all.py compile` shows what the compiler "
                         "makes of the kernels without one")
    bench()

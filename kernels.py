"""The operations a decoder spends its time in, each as plain PyTorch, and their benchmark: `python kernels.py`.

Shapes: B sequences, T queries, S keys, H query heads, Hkv key/value heads, D channels a head, V tokens. Softmax, norms and
losses are computed in float32 whatever the input type.
"""
import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps: float):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in x's type (Zhang and Sennrich, arXiv 1910.07467)."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / x.shape[-1] + eps)  # a sum: mean is 2.5 times slower on CPUs
    return (wide * scale * weight).to(x.dtype)


def layer_norm(x, weight, bias, eps: float):
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension, in x's type (Ba et al., arXiv 1607.06450)."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps).to(x.dtype)


def rotary(x, cos, sin):
    """Rotate the channel pairs (i, i + R/2) of x (..., T, D) by their position's angle (RoFormer, arXiv 2104.09864, half layout).

    cos, sin: (T, R) or broadcastable, with the sign of the first half of `sin` already negated: x · cos + swap_halves(x) · sin.
    Of D > R channels the rest stays as it is.
    """
    if (dims := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotary(x[..., :dims], cos, sin), x[..., dims:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((second, first), dim=-1) * sin).to(x.dtype)


def swiglu(gate_up):
    """(..., 2F) -> (..., F): silu(gate) · up, gate being the first half (Shazeer, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate_up):
    """(..., 2F) -> (..., F): gelu(gate) · up with the tanh form of gelu (Gemma)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def geglu_clamped(gate_up):
    """(..., 2F) -> (..., F): phi-3-small's: gate · sigmoid(1.702 gate) · (up + 1), gate at most 20 and up within ± 20."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=20.0)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-20.0, 20.0) + 1)


def gelu(x):
    """The tanh form of gelu (Hendrycks and Gimpel, arXiv 1606.08415), as in phi-1 to phi-2."""
    return F.gelu(x, approximate="tanh")


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


def attention(q, k, v, mask=None, scale=None, causal=False):
    """Grouped-query attention: q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D).

    mask: (T, S), (B, 1, T, S) or (B, H, T, S), True (or 0.0) where a query may look and False (or -inf) elsewhere; every query needs a key.
    causal: instead of a mask, each query sees the keys up to its own position, the last query being aligned with the last key.
    PyTorch's fused attention serves CUDA, and float32 on CPUs (in bf16 it is three times slower there than plain products); not all
    MPS versions group heads.
    """
    fused = q.device.type == "cuda" or q.device.type == "cpu" and q.dtype == torch.float32
    if not fused or causal and q.shape[2] != k.shape[2]:
        return attention_reference(q, k, v, mask, scale, causal)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=True)


def cross_entropy(hidden, weight, targets, weights=None, bias=None):
    """Next-token loss from final hidden states (B, T, d) and the output layer, weight (V, d) and perhaps bias (V).

    targets: (B, T) int64, -1 where there is nothing to predict; weights: optional (B, T) weight of each prediction.
    -> (sum of weighted losses in nats, sum of weights), both float32 scalars; a batch without targets gives (0, 0).
    """
    weights = (targets != -1).float() if weights is None else weights.float() * (targets != -1)
    hidden, targets, weights = hidden.flatten(0, 1), targets.flatten(), weights.flatten()
    if hidden.device.type == "cpu" and (used := weights.nonzero().squeeze(1)).numel() < weights.numel():
        hidden, targets, weights = hidden[used], targets[used], weights[used]  # on a GPU their number would have to be waited for
    losses = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, ignore_index=-1, reduction="none")
    return (losses * weights).sum(), weights.sum()  # not `@`, which autocast would run in bf16


# ---------------------------------------------------------------- benchmark

def median_ms(function, repeats: int = 20) -> float:
    """Median time of one call in milliseconds, the device's queue included, after warming up."""
    cuda = torch.cuda.is_available()
    times = []
    for n in range(repeats + 3):
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        times += [1e3 * (time.perf_counter() - start)] if n >= 3 else []
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=20, help="timed calls per figure, of which the median is shown (default 20)")
    repeats = parser.parse_args().repeats
    if repeats < 1:
        print("kernels.py: --repeats must be at least 1", file=sys.stderr)
        raise SystemExit(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, {dtype}, torch "
          f"{torch.__version__}; milliseconds for forward + backward, median of {repeats}")
    B, T, H, kv, D, V = (8, 2048, 32, 8, 64, 32064) if device == "cuda" else (8, 256, 6, 2, 32, 4096)

    def tensor(*shape):
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    def both_ways(function):
        output = function()
        (output[0] if isinstance(output, tuple) else output.sum()).backward()

    q, k, v = tensor(B, H, T, D), tensor(B, kv, T, D), tensor(B, kv, T, D)
    x, norm, head, targets = tensor(B, T, H * D), tensor(H * D), tensor(V, H * D), torch.randint(V, (B, T), device=device)
    rows = [
        (f"attention, causal, B{B} H{H}/{kv} T{T} D{D}", lambda: attention_reference(q, k, v, causal=True),
         "F.scaled_dot_product_attention", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)),
        (f"rms_norm, {B * T} x {H * D}", lambda: rms_norm(x, norm, 1e-5), "F.rms_norm", lambda: F.rms_norm(x, norm.shape, norm, 1e-5)),
        (f"cross_entropy, {B * T} x {H * D} x {V}", lambda: cross_entropy(x, head, targets),
         "F.cross_entropy", lambda: F.cross_entropy((x @ head.T).flatten(0, 1), targets.flatten()))]
    print(f"{'operation':44} {'plain':>9} {'peer':>9}  peer")
    for name, ours, peer_name, peer in rows:
        print(f"{name:44} {median_ms(lambda: both_ways(ours), repeats):9.3f} {median_ms(lambda: both_ways(peer), repeats):9.3f}  {peer_name}")


if __name__ == "__main__":
    main()

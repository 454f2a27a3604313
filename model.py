"""The decoder of every phi (and of Llama 3 and Gemma), its presets, KV cache and generation, its tokenizers, and checkpoints.

One block serves all families; what tells them apart stands in the table FAMILIES. A run directory is a Hugging Face directory
of its family, so there is no import or export step. `python model.py` prints the presets.
"""
import argparse
import base64
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import time

import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

import kernels


# ---------------------------------------------------------------- families

@dataclasses.dataclass(frozen=True)
class Family:
    """What the checkpoints of one family share: the form of the block, and the names that Hugging Face's files use."""
    architecture: str              # the class in transformers
    tensors: dict                  # our module -> theirs, or theirs whose rows follow one another in ours; N is the layer
    fields: dict                   # our Config field -> their key in config.json, where it is not one of FIELDS
    constants: dict                # what config.json has to say besides; another value there is another model
    activation: str = "swiglu"     # a function of kernels
    parallel: bool = False         # attention and feed-forward read the same norm and are added together (GPT-J's block)
    layer_norm: bool = False       # LayerNorm with bias instead of RMSNorm
    bias: bool = False             # in all linear layers of the blocks
    head_bias: bool = False        # in the output layer
    norm_offset: float = 0.0       # Gemma stores its norms' weights less one
    defaults: dict = dataclasses.field(default_factory=dict)  # Config fields that config.json may leave out


FIELDS = {"vocab_size": "vocab_size", "context": "max_position_embeddings", "n_layer": "num_hidden_layers", "d_model": "hidden_size",
          "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps",
          "tied": "tie_word_embeddings", "rope_theta": "rope_theta", "rotary_share": "partial_rotary_factor",
          "original_context": "original_max_position_embeddings"}
LLAMA_TENSORS = {
    "embed": "model.embed_tokens",
    "layers.N.attention_norm": "model.layers.N.input_layernorm",
    "layers.N.qkv": ("model.layers.N.self_attn.q_proj", "model.layers.N.self_attn.k_proj", "model.layers.N.self_attn.v_proj"),
    "layers.N.out": "model.layers.N.self_attn.o_proj",
    "layers.N.mlp_norm": "model.layers.N.post_attention_layernorm",
    "layers.N.gate_up": ("model.layers.N.mlp.gate_proj", "model.layers.N.mlp.up_proj"),
    "layers.N.down": "model.layers.N.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head"}
FAMILIES = {  # by config.json's model_type
    "phi3": Family(  # phi-3-mini, 3.5-mini, 3-medium, 4, 4-mini
        "Phi3ForCausalLM", {**LLAMA_TENSORS, "layers.N.qkv": "model.layers.N.self_attn.qkv_proj", "layers.N.gate_up": "model.layers.N.mlp.gate_up_proj"},
        {"window": "sliding_window"}, {"hidden_act": "silu", "attention_bias": False}),
    "phi": Family(  # phi-1, 1.5, 2
        "PhiForCausalLM", {**LLAMA_TENSORS, "layers.N.out": "model.layers.N.self_attn.dense", "layers.N.gate_up": "model.layers.N.mlp.fc1",
                           "layers.N.down": "model.layers.N.mlp.fc2", "norm": "model.final_layernorm"},
        {"norm_eps": "layer_norm_eps"}, {"hidden_act": "gelu_new", "qk_layernorm": False}, activation="gelu", parallel=True,
        layer_norm=True, bias=True, head_bias=True, defaults={"rotary_share": 0.5}),
    "phi3small": Family(  # its qkv holds, for each key/value head, the queries, the key and the value; its rows of gate and up alternate
        "Phi3SmallForCausalLM", {**LLAMA_TENSORS, "layers.N.qkv": "model.layers.N.self_attn.query_key_value",
                                 "layers.N.out": "model.layers.N.self_attn.dense", "layers.N.gate_up": "model.layers.N.mlp.up_proj",
                                 "norm": "model.final_layernorm"},
        {"norm_eps": "layer_norm_epsilon", "d_ff": "ff_intermediate_size", "rope_theta": "rope_embedding_base",
         "embedding_scale": "mup_embedding_multiplier", "attention_scale": "mup_attn_multiplier", "logit_divisor": "mup_width_multiplier",
         "sparse_block": "blocksparse_block_size", "sparse_local": "blocksparse_num_local_blocks", "sparse_stride": "blocksparse_vert_stride",
         "dense_every": "dense_attention_every_n_layers", "dummy_tokens": "dummy_token_indices"},
        {"hidden_act": "gegelu", "gegelu_limit": 20.0, "mup_use_scaling": True, "attention_bias": False, "blocksparse_homo_head_pattern": False,
         "rope_position_scale": 1.0}, activation="geglu_clamped", layer_norm=True, bias=True, defaults={"tied": True}),
    "llama": Family("LlamaForCausalLM", LLAMA_TENSORS, {"head_size": "head_dim"}, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}),
    "gemma": Family(  # scales the embedding by sqrt(d_model); older files call the same activation gelu
        "GemmaForCausalLM", LLAMA_TENSORS, {"head_size": "head_dim"}, {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False},
        activation="geglu", norm_offset=1.0, defaults={"tied": True}),
}


# ---------------------------------------------------------------- shape

@dataclasses.dataclass
class Config:
    """The shape of a model. Sizes in tokens (vocab_size, contexts, window), layers, channels (d_model, d_ff, head_size) and heads."""
    vocab_size: int
    context: int
    n_layer: int
    d_model: int
    n_head: int
    n_kv_head: int
    d_ff: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    tied: bool = False                    # the output layer is the embedding
    family: str = "phi3"
    head_size: int | None = None          # channels of a head; d_model / n_head unless given
    rotary_share: float = 1.0             # share of a head's channels that rotary positions turn
    window: int | None = None             # a token sees so many, itself included; None for all
    original_context: int | None = None   # LongRoPE (arXiv 2402.13753): sequences up to this length use the short factors, longer
    short_factor: list | None = None      # ones the long factors, one for each rotated pair of channels
    long_factor: list | None = None
    short_scale: float | None = None      # of cos and sin; by the paper's formula unless given
    long_scale: float | None = None
    embedding_scale: float = 1.0          # muP (phi-3-small): embeddings times this,
    attention_scale: float | None = None  # softmax of q·k times this / head_dim instead of 1 / sqrt(head_dim),
    logit_divisor: float = 1.0            # logits divided by this
    sparse_block: int = 64                # blocksparse attention: a block of so many tokens sees so many blocks back, itself included,
    sparse_local: int = 16
    sparse_stride: int = 8                # and of the older ones every so-manieth
    dense_every: int = 1                  # every so-manieth layer is dense; 1 for no sparse layers
    dummy_tokens: list = dataclasses.field(default_factory=list)  # ids that are never predicted

    def __post_init__(self):
        for name in ("vocab_size", "context", "n_layer", "d_model", "n_head", "n_kv_head", "d_ff", "head_size", "window", "original_context",
                     "sparse_block", "sparse_local", "sparse_stride", "dense_every"):
            value = getattr(self, name)
            if (isinstance(value, bool) or not isinstance(value, int) or value < 1) and (value is not None or name[:4] not in ("head", "wind", "orig")):
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
        for name in ("rope_theta", "norm_eps", "rotary_share", "embedding_scale", "logit_divisor"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)!r}")
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {self.family!r}")
        if not self.head_size and self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} must be a multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.rotary_dims % 2 or not 0 < self.rotary_dims <= self.head_dim:
            raise ValueError(f"{self.rotary_dims} of {self.head_dim} channels of a head would be rotated: it must be an even number (d_model {self.d_model})")
        for name in ("short_factor", "long_factor"):
            factor = getattr(self, name)
            if self.original_context and not (isinstance(factor, (list, tuple)) and len(factor) == self.rotary_dims // 2 and min(factor) > 0):
                raise ValueError(f"{name} must hold {self.rotary_dims // 2} positive numbers, one for each rotated pair of channels")

    @property
    def head_dim(self) -> int:
        return self.head_size or self.d_model // self.n_head

    @property
    def rotary_dims(self) -> int:
        return int(self.head_dim * self.rotary_share)

    @property
    def form(self) -> Family:
        return FAMILIES[self.family]

    def rope_scale(self, long: bool) -> float:
        """What cos and sin are multiplied by: sqrt(1 + ln(context / original) / ln(original)) for LongRoPE, short and long alike."""
        given = self.long_scale if long else self.short_scale
        if given is not None or not self.original_context or self.context <= self.original_context:
            return 1.0 if given is None else given
        return math.sqrt(1 + math.log(self.context / self.original_context) / math.log(self.original_context))

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Model(self).parameters())

    def attention_flops(self) -> int:
        """Of the last token of a full context: two products with all the keys and values it sees, two operations each, per head."""
        return 4 * self.n_layer * self.n_head * self.head_dim * min(self.context, self.window or self.context)

    def cache_bytes(self) -> int:
        """Keys and values of one token in 16 bits."""
        return 2 * 2 * self.n_layer * self.n_kv_head * self.head_dim


def _phi(n_layer, d_model, head_dim, **more) -> Config:
    return Config(**{**dict(vocab_size=51200, context=2048, n_layer=n_layer, d_model=d_model, n_head=d_model // head_dim, n_kv_head=d_model // head_dim,
                            d_ff=4 * d_model, family="phi", rotary_share=32 / head_dim), **more})


PHI_3_MINI = Config(vocab_size=32064, context=4096, n_layer=32, d_model=3072, n_head=32, n_kv_head=32, d_ff=8192, window=2047)
PHI_4 = Config(vocab_size=100352, context=16384, n_layer=40, d_model=5120, n_head=40, n_kv_head=10, d_ff=17920, rope_theta=2.5e5)
PHI_3_SMALL = Config(vocab_size=100352, context=8192, n_layer=32, d_model=4096, n_head=32, n_kv_head=8, d_ff=14336, rope_theta=1e6, tied=True,
                     family="phi3small", embedding_scale=10.0, attention_scale=1.0, logit_divisor=8.0, dense_every=2,
                     dummy_tokens=[100256, *range(100258, 100261), 100264, 100265, *range(100267, 100352)])
# The 128k shapes stand here with plain rotary positions: the factors of the released models come with their checkpoints, and
# grow.py finds new ones.
PRESETS = {
    "374m": Config(vocab_size=32064, context=2048, n_layer=24, d_model=1024, n_head=16, n_kv_head=16, d_ff=2816),  # to time decoding with
    "laptop": Config(vocab_size=1024, context=512, n_layer=5, d_model=128, n_head=4, n_kv_head=2, d_ff=384),
    "baby": Config(vocab_size=65, context=256, n_layer=6, d_model=384, n_head=6, n_kv_head=6, d_ff=1024),
    "phi-1-small": _phi(20, 1024, 64),
    "phi-1": _phi(24, 2048, 64),
    "phi-1.5": _phi(24, 2048, 64),
    "phi-2": _phi(32, 2560, 80),
    "phi-3-mini": PHI_3_MINI,
    "phi-3-mini-128k": dataclasses.replace(PHI_3_MINI, context=131072, window=None),
    "phi-3.5-mini": dataclasses.replace(PHI_3_MINI, context=131072, window=None),
    "phi-3-small": PHI_3_SMALL,
    "phi-3-small-128k": dataclasses.replace(PHI_3_SMALL, context=131072),
    "phi-3-medium": dataclasses.replace(PHI_4, vocab_size=32064, context=4096, rope_theta=1e4, window=2047),
    "phi-4": PHI_4,
    "phi-4-mini": dataclasses.replace(PHI_3_MINI, vocab_size=200064, context=131072, n_head=24, n_kv_head=8, tied=True, rotary_share=0.75, window=None),
    "llama-3-8b": Config(vocab_size=128256, context=8192, n_layer=32, d_model=4096, n_head=32, n_kv_head=8, d_ff=14336, rope_theta=5e5, family="llama"),
    "gemma-2b": Config(vocab_size=256000, context=8192, n_layer=18, d_model=2048, n_head=8, n_kv_head=1, d_ff=16384, norm_eps=1e-6, tied=True, family="gemma"),
}


# ---------------------------------------------------------------- model

class Norm(nn.Module):
    """RMSNorm, or LayerNorm where the family has it."""

    def __init__(self, config: Config):
        super().__init__()
        self.eps, self.offset = config.norm_eps, config.form.norm_offset
        self.weight = nn.Parameter(torch.full((config.d_model,), 1.0 - self.offset))
        self.bias = nn.Parameter(torch.zeros(config.d_model)) if config.form.layer_norm else None

    def forward(self, x, add=None):
        """norm(x), or with another summand (norm(x + add), x + add)."""
        if self.bias is not None:
            return kernels.layer_norm(x, self.weight, self.bias, self.eps, add)
        return kernels.rms_norm(x, self.weight.float() + self.offset if self.offset else self.weight, self.eps, add)

    def pointers(self, kept: list) -> list[int]:
        return [_float_pointer(self.weight + self.offset, kept), _float_pointer(self.bias, kept)]


class Linear(nn.Linear):
    def reset_parameters(self):
        """Model draws all weights; drawing them here as well would be work done twice."""

    def pointers(self, kept: list) -> list[int]:
        """What kernels.NATIVE's struct Linear holds; what it points to and nobody else owns goes into `kept`."""
        return [self.weight.data_ptr(), 0, 0, _float_pointer(self.bias, kept), *self.weight.shape, 0, 8 * self.weight.itemsize]


class Quantized(nn.Module):
    """A linear layer, or an embedding, with weights of 4 or 8 bits (kernels.quantize) whose scales `group` weights of a row share. On CPUs with a
    C++ compiler they lie tiled, as kernels.NATIVE reads them."""

    def __init__(self, rows: int, width: int, bits: int, group: int, bias=None):
        super().__init__()
        self.rows, self.width, self.bits, self.group, self.bias, self.is_tiled = rows, width, bits, group, bias, False
        self.register_buffer("packed", torch.empty(rows, width * bits // 8, dtype=torch.uint8))
        for name in ("scale", "low"):
            self.register_buffer(name, torch.empty(rows, width // group, dtype=torch.bfloat16))

    def tile(self, on: bool) -> None:
        if self.is_tiled != on:
            for name, width in (("packed", 4), ("scale", 1), ("low", 1)):
                setattr(self, name, kernels.tiled(getattr(self, name), width) if on else kernels.untiled(getattr(self, name), self.rows))
            self.is_tiled = on

    def pointers(self, kept: list) -> list[int]:
        self.tile(True)
        return [self.packed.data_ptr(), self.scale.data_ptr(), self.low.data_ptr(), _float_pointer(self.bias, kept), self.rows, self.width, self.group, self.bits]

    def embed(self, tokens):
        """The rows of these tokens, float32."""
        parts = [part[tokens // 16, :, tokens % 16].flatten(-2) if self.is_tiled else part[tokens] for part in (self.packed, self.scale, self.low)]
        return kernels.dequantize(*(part.flatten(0, -2) for part in parts), self.bits).view(*tokens.shape, self.width)

    def forward(self, x):
        if x.device.type == "cpu" and kernels.native():
            return kernels.native_linear(x, self)
        self.tile(False)
        y = kernels.quantized_matmul(x, self.packed, self.scale, self.low, self.bits)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def quantize(model: "Model", bits: int) -> "Model":
    """Hold the matrices of the blocks in 4 or 8 bits and the output layer (a tied embedding with it) in 8, in place; biases, norms and a
    separate embedding stay as they are. Groups of 64 weights share a scale, or of the largest power of two that divides the row."""
    if bits not in (4, 8):
        raise ValueError(f"weights have 4 or 8 bits, not {bits}")
    if any(isinstance(module, Quantized) for module in model.modules()):
        raise ValueError("this model is quantized already: start from the original weights")
    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]:
        group = math.gcd(module.in_features, 64)
        if group % 8 == 0 and not (name == "head" and model.config.tied and module.bias is not None):  # an embedding has no bias
            small = Quantized(module.out_features, module.in_features, 8 if name == "head" else bits, group, module.bias)
            if not module.weight.is_meta:
                small.packed, small.scale, small.low = kernels.quantize(module.weight, small.bits, group)
            model.set_submodule(name, small)
    if model.config.tied and isinstance(model.head, Quantized):
        model.embed = model.head
    return model.eval()


def _float_pointer(tensor, kept: list) -> int:
    if tensor is None:
        return 0
    kept.append(tensor.detach().float().contiguous())
    return kept[-1].data_ptr()


class Block(nn.Module):
    """Attention and feed-forward, each read from a normed copy of the residual stream x and added to it."""

    def __init__(self, config: Config, sparse: bool = False):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.scale = config.head_dim ** -0.5 if config.attention_scale is None else config.attention_scale / config.head_dim
        self.sparse = (config.sparse_block, config.sparse_local, config.sparse_stride) if sparse else None
        self.activation, bias = getattr(kernels, config.form.activation), config.form.bias
        self.attention_norm = Norm(config)
        self.qkv = Linear(config.d_model, (config.n_head + 2 * config.n_kv_head) * config.head_dim, bias=bias)
        self.out = Linear(config.n_head * config.head_dim, config.d_model, bias=bias)
        self.mlp_norm = None if config.form.parallel else Norm(config)
        self.gate_up = Linear(config.d_model, config.d_ff * (1 if config.form.activation == "gelu" else 2), bias=bias)
        self.down = Linear(config.d_ff, config.d_model, bias=bias)

    def forward(self, x, cos, sin, mask=None, cache=None):
        """x (B, T, d_model); cos, sin, mask as kernels.rotary and kernels.attention want them; without a mask attention is causal.

        cache: (keys, values, past): the new columns are written in place from `past` on, and all columns so far are attended to.
        """
        B, T, _ = x.shape
        h = self.attention_norm(x)
        q, k, v = kernels.rotary(self.qkv(h), cos, sin, self.heads, self.kv_heads, self.head_dim)         # -> (B, H or Hkv, T, D)
        if cache is not None:
            keys, values, past = cache
            keys[:, :, past:past + T], values[:, :, past:past + T] = k, v
            k, v = keys[:, :, :past + T], values[:, :, :past + T]                  # (B, Hkv, T, D) -> (B, Hkv, past + T, D)
        y = kernels.attention(q, k, v, mask, self.scale, mask is None and T > 1, self.sparse)
        y = self.out(y.transpose(1, 2).reshape(B, T, -1))                          # (B, H, T, D) -> (B, T, H·D) -> (B, T, d_model)
        if self.mlp_norm is None:
            return x + y + self.down(self.activation(self.gate_up(h)))
        h, x = self.mlp_norm(x, y)
        return x + self.down(self.activation(self.gate_up(h)))


class Cache:
    """Keys and values of all layers, preallocated and written in place; `length` columns are used.

    Prompts of different lengths are padded on the left: row b's text begins at column starts[b], and its positions count from there.
    """

    def __init__(self, config: Config, starts: list[int], capacity: int, device, dtype):
        shape = (len(starts), config.n_kv_head, capacity, config.head_dim)
        self._set([(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))
                   for _ in range(config.n_layer)], torch.tensor(starts, device=device), 0)

    def _set(self, layers, starts, length: int) -> None:
        self.layers, self.starts, self.length, self.padded, self.plan = layers, starts, length, bool(starts.any()), None

    def part(self, begin: int, end: int) -> "Cache":
        """An empty cache for rows begin to end that shares this one's memory."""
        part = object.__new__(Cache)
        part._set([(k[begin:end], v[begin:end]) for k, v in self.layers], self.starts[begin:end], 0)
        return part

    def keep(self, slots: list[int]) -> None:
        """Drop the other rows, and the columns that were padding in all that stay."""
        index = torch.tensor(slots, device=self.starts.device)
        starts = self.starts[index]
        unused = int(starts.min())
        self._set([(k[index, :, unused:], v[index, :, unused:]) for k, v in self.layers], starts - unused, self.length - unused)


def exit_points(n, most: int, least: int, over: int):
    """SkipDecode's (arXiv 2307.02628): how many layers the n-th generated token runs, falling linearly from most to least over `over` tokens."""
    return torch.as_tensor(most - (most - least) * n / over).round().clamp(least, most).long()


def layers_run(n_layer: int, count: int | None) -> list[int]:
    """The first layer and the last count - 1: so what a later, smaller count runs has run for every earlier token."""
    return [*range(n_layer)] if count is None else [0, *range(n_layer - count + 1, n_layer)]


class Model(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocab_size) float32."""
    skip: tuple[int, int, int] | None = None    # (most, least, over) as in exit_points: finetune for SkipDecode with them
    speculated: tuple[int, int] = (0, 0)        # proposals accepted and made in the last call of generate

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.tables = config, {}
        self.embed = nn.Embedding(config.vocab_size, config.d_model, _weight=torch.empty(config.vocab_size, config.d_model))
        self.layers = nn.ModuleList(Block(config, sparse=(i + 1) % config.dense_every != 0) for i in range(config.n_layer))
        self.norm = Norm(config)
        self.head = Linear(config.d_model, config.vocab_size, bias=config.form.head_bias)
        for name, weight in self.named_parameters():
            if weight.is_meta:
                continue
            if weight.dim() == 2:  # what writes into the residual stream starts smaller, so that its variance does not grow with depth
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith(("out.weight", "down.weight")) else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        if config.tied:
            self.head.weight = self.embed.weight

    @torch.inference_mode(False)  # a table made while generating must serve training too
    def rotary(self, end: int, long: bool, device):
        """cos and sin of (at least) the first `end` positions, (n, rotary_dims) each; sin's first half is negated, as kernels.rotary
        wants it. The tables double when they are outgrown, so that a context of 128k costs nothing before it is used."""
        cos, sin = self.tables.get((long, device), (torch.empty(0),) * 2)
        if len(cos) < end:
            config, dims = self.config, self.config.rotary_dims
            rows = min(max(end, 2 * len(cos), 512), max(end, config.context))
            factor = torch.tensor((config.long_factor if long else config.short_factor) or [1.0] * (dims // 2), device=device, dtype=torch.float32)
            frequency = 1.0 / (factor * config.rope_theta ** (torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims))
            angle = torch.arange(rows, device=device, dtype=torch.float32)[:, None] * frequency        # (n, rotary_dims / 2)
            cos, sin = angle.cos() * config.rope_scale(long), angle.sin() * config.rope_scale(long)
            cos, sin = self.tables[long, device] = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos, sin

    def masks(self, past: int, end: int, device, documents=None, starts=None):
        """What the queries of the columns past to end may see beyond plain causal attention, as kernels.attention wants it: one mask for
        dense layers, one for sparse ones; None where causality says it all. documents and starts as in hidden and Cache."""
        config, columns = self.config, torch.arange(end, device=device)
        window = config.window if config.window and end > config.window else None
        sparse = (config.sparse_block, config.sparse_local, config.sparse_stride) if config.dense_every > 1 else None
        low = torch.zeros(1, end, dtype=torch.long, device=device)  # the first key that each query sees
        if window:
            low = (columns - window + 1).clamp(min=0)[None]
        if documents is not None:  # a token sees earlier ones of its own document
            first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            low = torch.maximum(low, torch.where(first, columns, 0).cummax(1).values)
        if starts is not None:     # padding sees itself, since a softmax over nothing is not a number
            low = torch.maximum(low, torch.minimum(starts[:, None], columns))
        plain = documents is None and starts is None and not window
        if kernels.fused(device.type) and not (sparse and (past or starts is not None)):  # of sparse layers they do whole unpadded texts
            high = torch.searchsorted(low, columns.expand_as(low).contiguous(), right=True)
            mask = None if plain else torch.stack((low, high)).int()
            return mask, mask
        mask = None if plain else kernels.interval_mask(low[:, past:], end)
        if not sparse or end <= config.sparse_block * config.sparse_local:
            return mask, mask
        return mask, kernels.interval_mask(low[:, past:], end, sparse, config.n_head, starts)

    def hidden(self, tokens, documents=None, cache: Cache | None = None, skip=None):
        """Final normed states (B, T, d_model). skip: how many layers run, one number, or with gradients (B, T) of each token's own."""
        config, device, past = self.config, tokens.device, 0 if cache is None else cache.length
        end, starts = past + tokens.shape[1], cache.starts if cache is not None and cache.padded else None
        if end > config.context and starts is None:
            raise ValueError(f"{end} tokens do not fit the context of {config.context}")
        embed = self.embed  # (B, T) -> (B, T, d_model)
        x = embed(tokens) if isinstance(embed, nn.Embedding) else embed.embed(tokens).to(self.norm.weight.dtype)
        if torch.is_autocast_enabled(device.type):
            x = x.to(torch.get_autocast_dtype(device.type))
        scale = config.d_model ** 0.5 if config.family == "gemma" else config.embedding_scale
        x = x * scale if scale != 1 else x
        original = config.original_context or config.context
        cos, sin = self.rotary(end, end > original, device)
        if starts is None:
            cos, sin = cos[past:end], sin[past:end]                                # (T, R)
        else:
            positions = (torch.arange(past, end, device=device) - starts[:, None]).clamp(min=0)               # (B, T)
            if end > original:  # each row by its own length
                long = (end - starts > original)[:, None, None]
                cos, sin = (torch.where(long, a[positions], b[positions]) for a, b in zip((cos, sin), self.rotary(end, False, device)))
            else:
                cos, sin = cos[positions], sin[positions]
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)                          # (B, 1, T, R)
        if cache is not None and tokens.numel() <= (16 if isinstance(self.layers[0].down, Quantized) else 4) and self.steps_natively(x, end):
            x = self.step(x, cos, sin, cache, layers_run(config.n_layer, skip))
            cache.length += tokens.shape[1]
            return x / config.logit_divisor if config.logit_divisor != 1 else x
        masks = self.masks(past, end, device, documents, starts)
        if cache is None:
            for i, block in enumerate(self.layers):
                y = block(x, cos, sin, masks[block.sparse is not None])
                x = y if skip is None or i == 0 else torch.where((skip > config.n_layer - i)[..., None], y, x)
        else:
            for i in layers_run(config.n_layer, skip):  # block.forward: one compiled for training would recompile
                block, (keys, values) = self.layers[i], cache.layers[i]
                x = block.forward(x, cos, sin, masks[block.sparse is not None], (keys, values, past))
            cache.length += tokens.shape[1]
        x = self.norm(x)
        return x / config.logit_divisor if config.logit_divisor != 1 else x

    def steps_natively(self, x, end: int) -> bool:
        """Whether kernels.NATIVE serves: a few tokens on a CPU, without gradients, in float32 or bf16, no layer sparse yet."""
        config = self.config
        return (x.device.type == "cpu" and not torch.is_grad_enabled() and x.dtype in (torch.float32, torch.bfloat16) and config.head_dim <= 1024
                and (config.dense_every == 1 or end <= config.sparse_block * config.sparse_local) and kernels.native() is not None)

    def step(self, x, cos, sin, cache: Cache, run):
        """The blocks and the final norm in one call: x (B, T, d_model), cos and sin as in kernels.rotary -> final normed states."""
        config, (B, T, width), past = self.config, x.shape, cache.length
        if cache.plan is None:
            kept, rows = [], []
            for block in self.layers:
                parallel = block.mlp_norm is None
                rows.append([*(n for linear in (block.qkv, block.out, block.gate_up, block.down) for n in linear.pointers(kept)), *block.attention_norm.pointers(kept),
                             *((0, 0) if parallel else block.mlp_norm.pointers(kept)), 0, 0])
            shape = [len(rows), B, T, past, width, config.n_head, config.n_kv_head, config.head_dim, config.rotary_dims, config.d_ff,
                     ("swiglu", "geglu", "geglu_clamped", "gelu").index(config.form.activation), 8 * cache.layers[0][0].itemsize, 0, 0, *self.norm.pointers(kept)]
            cache.plan = torch.tensor(rows), torch.tensor(shape), kept
        layers, shape, _ = cache.plan
        layers[:, -2:] = torch.tensor([[keys.data_ptr(), values.data_ptr()] for keys, values in cache.layers])
        layers = layers if len(run) == len(layers) else layers[run]
        shape[:4], shape[12:14] = torch.tensor([len(run), B, T, past]), torch.tensor(cache.layers[0][0].stride()[:2])
        end = torch.arange(past, past + T)
        low = torch.maximum(cache.starts[:, None], end - config.window + 1 if config.window else end * 0).clamp(min=0)
        low = torch.minimum(low, end).contiguous()                                 # (B, T); padding sees itself
        cos, sin = (table.float().expand(B, 1, T, -1).contiguous() for table in (cos, sin))
        y = x.float().contiguous() if x.dtype != torch.float32 else x.clone()
        block = self.layers[0]
        kernels.native_step(layers, shape, y, cos, sin, low, config.norm_eps, block.scale)
        return y.to(x.dtype)

    def logits(self, x):
        """Final states (..., d_model) -> (..., vocab_size) float32."""
        few = x.numel() <= 16 * self.config.d_model and self.steps_natively(x, 0)
        logits = kernels.native_linear(x.float(), self.head) if few else self.head(x).float()
        return logits.index_fill(-1, torch.tensor(self.config.dummy_tokens, device=x.device), -math.inf) if self.config.dummy_tokens else logits

    def forward(self, tokens, documents=None, targets=None, weights=None, cache: Cache | None = None, skip=None):
        """Logits (B, T, V) float32, or with targets (B, T; -1 for none) the loss: (sum in nats, sum of weights).

        documents (B, T) int: tokens of different documents in a row do not see each other; weights (B, T): of each target.
        skip: as in hidden; where self.skip is set and targets are given, follows from it, the heaviest targets being what is generated.
        """
        if skip is None and self.skip and targets is not None:
            fresh = (targets >= 0 if weights is None else weights > 0.5 * weights.amax().clamp(min=1e-9))[:, :-1]
            fresh = F.pad(fresh, (1, 0)) if documents is None else F.pad(fresh & (documents[:, 1:] == documents[:, :-1]), (1, 0))
            count = fresh.cumsum(1)  # of generated tokens in the row; less those of earlier documents:
            first = torch.ones_like(fresh) if documents is None else F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
            before = torch.where(first, count - fresh.long(), 0).cummax(1).values if documents is not None else 0
            skip = exit_points(torch.where(fresh, count - before - 1, 0), *self.skip)
        x = self.hidden(tokens, documents, cache, skip)
        return self.logits(x) if targets is None else kernels.cross_entropy(x, self.head.weight, targets, weights, self.head.bias)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 stop=None, seed: int | None = None, stream=None, draft: "Model | None" = None, lookup: int = 0, skip=None) -> list[list[int]]:
        """The new tokens of each prompt, up to and including one of `stop` (an id or several), max_new_tokens, or the context's end.

        temperature 0 takes the likeliest token; otherwise top_k > 0 draws from that many likeliest, top_p < 1 from the fewest that
        hold that much probability. stream(row, token) is called for each new token and ends its row by returning True. Prompts may
        differ in length; rows that have ended leave the batch.

        draft: a smaller model that proposes tokens; lookup: so many proposals, copied from what followed the last words before; both one row
        after another, with this model's distribution (_speculate). skip: SkipDecode's (most, least[, over = max_new_tokens]) as in exit_points.
        """
        config, context, device, dtype = self.config, self.config.context, self.norm.weight.device, self.norm.weight.dtype
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        for row, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= context:
                raise ValueError(f"prompt {row} has {len(prompt)} tokens; it needs at least one and the context holds {context}")
            if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
                raise ValueError(f"prompt {row} has a token outside the vocabulary of {config.vocab_size}; was it made with another tokenizer?")
        if draft is not None and draft.config.vocab_size != config.vocab_size:
            raise ValueError(f"the draft's vocabulary has {draft.config.vocab_size} tokens and the model's {config.vocab_size}: take a draft with its tokenizer")
        if skip and not (len(skip) in (2, 3) and 2 <= skip[1] <= skip[0] <= config.n_layer and skip[-1] > 0) or skip and (draft or lookup):
            raise ValueError(f"skip {':'.join(map(str, skip))} must be MAX:MIN[:TOKENS] layers with 2 <= MIN <= MAX <= {config.n_layer}, without draft or lookup")
        stop = frozenset() if stop is None else frozenset([stop] if isinstance(stop, int) else stop)
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        outputs = [[] for _ in prompts]
        limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        rows = [row for row, limit in enumerate(limits) if limit > 0]  # the prompt that each row of the batch continues
        if not rows:
            return outputs
        if draft is not None or lookup:
            self.speculated = (0, 0)
            for row in rows:
                outputs[row] = self._speculate(row, prompts[row], limits[row], (temperature, top_k, top_p), stop, generator, stream, draft, lookup or 5)
            return outputs
        most, least, over = (*skip, max_new_tokens)[:3] if skip else (None, None, None)
        width = max(len(prompts[row]) for row in rows)
        cache = Cache(config, [width - len(prompts[row]) for row in rows], width + max(limits), device, dtype)

        def fill(begin, end, width):  # the whole texts so far of these slots, padded to width -> their last states
            texts = [prompts[row] + outputs[row] for row in rows[begin:end]]
            tokens = torch.tensor([[0] * (width - len(text)) + text for text in texts], device=device)
            return self.hidden(tokens, cache=cache.part(begin, end), skip=most)[:, -1:]
        few = max(1, 4096 // width)  # the prompts' scores and activations, not the cache, would take the most memory
        x = torch.cat([fill(i, i + few, width) for i in range(0, len(rows), few)])
        cache.length, done, run, number = width, set(), most, 0
        while True:
            chosen = sample(self.logits(x[:, -1]), temperature, top_k, top_p, generator)
            for row, token in zip(rows, chosen.tolist()):
                if row in done:
                    continue
                outputs[row].append(token)
                ended = stream is not None and stream(row, token)
                if ended or token in stop or len(outputs[row]) == limits[row]:
                    done.add(row)
            slots = [slot for slot, row in enumerate(rows) if row not in done]
            if not slots:
                return outputs
            if len(slots) <= 7 * len(rows) // 8:  # dropping rows copies the cache, so they leave in groups
                cache.keep(slots)
                rows, chosen = [rows[slot] for slot in slots], chosen[slots]
            if skip:
                before, run, number = run, int(exit_points(number, most, least, over)), number + 1
                assert {*layers_run(config.n_layer, run)} <= {*layers_run(config.n_layer, before)}  # so no earlier key or value is missing
            x = self.hidden(chosen[:, None], cache=cache, skip=run)                # (B,) -> (B, 1) -> (B, 1, d_model)
            for slot, row in enumerate(rows):
                if config.original_context and len(prompts[row]) + len(outputs[row]) == config.original_context + 1 and row not in done:
                    x[slot:slot + 1] = fill(slot, slot + 1, cache.length)  # from here on the long factors hold, for the older keys too

    def _speculate(self, row, prompt, limit, filters, stop, generator, stream, draft, most) -> list[int]:
        """Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): up to `most` tokens are proposed and read at once; each is kept
        with probability min(1, p / q), p being this model's distribution and q the proposer's, and the first refused one is drawn anew from
        max(0, p - q): so what comes out is distributed as p. Proposals are the draft's, or for q = 1 what followed the last two tokens before."""
        text, followed, looked, device = [*prompt], {}, 2, self.norm.weight.device
        models = (self,) if draft is None else (self, draft)
        caches = [Cache(model.config, [0], min(len(prompt) + limit + most, model.config.context), device, model.norm.weight.dtype) for model in models]

        def read(i, tokens, last):  # -> the distributions after the last tokens of a text
            config, cache = models[i].config, caches[i]
            if config.original_context and cache.length <= config.original_context < len(tokens):
                cache.length = 0  # from here on the long factors hold, for the older keys too
            x = models[i].hidden(torch.tensor([tokens[cache.length:]], device=device), cache=cache)
            return distribution(models[i].logits(x[0, -last:]), *filters)

        def draw(probabilities):
            return int(torch.multinomial(probabilities, 1, generator=generator))
        while True:
            count = min(most, limit - (len(text) - len(prompt)) - 1, *(model.config.context - len(text) - 1 for model in models))
            for original in (model.config.original_context for model in models):  # no round crosses it
                count = min(count, original - len(text)) if original and len(text) <= original else count
            proposals, q = [], []
            if draft is None:
                followed |= {(text[at - 2], text[at - 1]): at for at in range(looked, len(text))}  # each pair of tokens: what followed it last
                looked, at = max(2, len(text)), followed.get(tuple(text[-2:]), len(text))
                proposals = text[at:at + max(count, 0)]
            elif count > 0:
                for _ in range(count):
                    q.append(read(1, text + proposals, 1)[0])
                    proposals.append(draw(q[-1]))
            p = read(0, text + proposals, len(proposals) + 1)
            kept, chances = 0, torch.rand(len(proposals), generator=generator, device=device).tolist()
            for token, chance in zip(proposals, chances):
                if chance * (float(q[kept][token]) if q else 1.0) >= float(p[kept][token]):
                    break
                kept += 1
            rest = p[kept]
            if kept < len(proposals):
                rest = (rest - q[kept]).clamp(min=0) if q else rest.index_fill(0, torch.tensor(proposals[kept], device=device), 0.0)
                rest = rest if rest.sum() > 0 else p[kept]
            new = [*proposals[:kept], draw(rest)]
            self.speculated = self.speculated[0] + kept, self.speculated[1] + len(proposals)
            for cache in caches:
                cache.length = min(cache.length, len(text) + kept)
            for token in new:
                text.append(token)
                ended = stream is not None and stream(row, token)
                if ended or token in stop or len(text) == len(prompt) + limit:
                    return text[len(prompt):]


def check_sampling(max_new_tokens, temperature, top_k, top_p) -> None:
    for name, value, fine, wanted in (("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
                                      ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or more"),
                                      ("top_k", top_k, top_k >= 0, "0 (off) or more"), ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")):
        if not fine:
            raise ValueError(f"{name} must be {wanted}, not {value}")


def distribution(logits, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0):
    """(B, V) logits -> the probabilities (B, V) that tokens are drawn with; for temperature 0 the likeliest token's is 1."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:  # drop a token when those likelier than it already hold top_p; the likeliest always stays
        ordered, index = probabilities.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
    return probabilities / probabilities.sum(-1, keepdim=True) if top_p < 1 else probabilities


def sample(logits, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, generator=None):
    """(B, V) logits -> (B,) token ids."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(distribution(logits, temperature, top_k, top_p), 1, generator=generator).squeeze(-1)    # (B, 1) -> (B,)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# ---------------------------------------------------------------- tokenizers

# GPT-4's split adapted to Python source. A run of blank lines and the indentation after it is one piece, so that a line's level
# is one token; words take a leading space, underscore or dot (snake_case pieces, methods); each digit is a token, with the space before it. Every character
# falls into some alternative, only syntax that tiktoken (Rust) and Hugging Face (Oniguruma) read alike is used, and no lookaround,
# which keeps matching linear on any text (GPT-4's own pattern overflows the stack on a megabyte of spaces).
PATTERN = r"\s*[\r\n]+[ \t]*|(?: ?_?|\.)[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{N}_.]+| ?_+| ?\.+|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what HF's ByteLevel(use_regex) means
GPT4_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PHI_3_SMALL_SPECIAL = dict(zip(SPECIAL, (100257, 100261, 100262, 100263, 100266)))
PHI_3_SMALL_SPECIAL |= {f"<|dummy_{i}|>": i for i in range(100256, 100352) if i not in PHI_3_SMALL_SPECIAL.values()}
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>")            # of a document
TURN_ENDS = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")    # of a message
# Chat formats by the special token that gives them away, in this order: start, opening of a message, its closing, whether a finished
# chat ends with the end-of-text token, whether contents are stripped, the families' names for roles.
TEMPLATES = {
    "<|im_sep|>": ("", "<|im_start|>{}<|im_sep|>", "<|im_end|>", False, False, {}),                                       # phi-4
    "<|start_header_id|>": ("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", False, True, {}),  # Llama 3
    "<start_of_turn>": ("<bos>", "<start_of_turn>{}\n", "<end_of_turn>\n", False, True, {"assistant": "model", "system": None}),  # Gemma
    "<|tool|>": ("", "<|{}|>", "<|end|>", True, False, {}),                                                               # phi-4-mini
    "<|dummy_100256|>": ("<|endoftext|>", "<|{}|>\n", "<|end|>\n", True, False, {}),                                      # phi-3-small
    "<|user|>": ("", "<|{}|>\n", "<|end|>\n", True, False, {}),                                                           # phi-3, ours
    "": ("", "{}: ", "\n", True, False, {"system": "System", "user": "Instruct", "assistant": "Output"}),                 # phi-2
}
CHAT_TEMPLATE = (  # ours as Jinja; Tokenizer.render is the same in Python
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes: visible Latin-1 stands for itself, the rest are moved up to 256 + n."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [b for b in range(256) if b not in visible]
    return [chr(b) if b in visible else chr(256 + hidden.index(b)) for b in range(256)]


BYTE_TO_CHAR = _byte_characters()
CHAR_TO_BYTE = {c: b for b, c in enumerate(BYTE_TO_CHAR)}


class Tokenizer:
    """Byte-level BPE run by tiktoken, stored as a Hugging Face tokenizer.json. Text only ever gives ordinary tokens.

    ranks: token bytes -> id, merged in order of id; pattern: the regular expression that splits text before merging;
    special: name -> id; eot: name of the token that ends a document; added: ordinary tokens that are looked for before splitting
    (codegen's runs of spaces). Example: Tokenizer.load("bytes").encode("hi") == [104, 105]
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN, special: dict[str, int] | None = None, eot="<|endoftext|>",
                 added: dict[str, int] | None = None):
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)} if special is None else dict(special)
        lacking = [b for b in range(256) if bytes([b]) not in ranks]
        if lacking:
            raise ValueError(f"tokenizer lacks {len(lacking)} of the 256 single bytes (first: {lacking[0]}), so it cannot encode every text")
        self._set(ranks, pattern, special, eot, added or {}, {i: token for token, i in ranks.items()})

    def _set(self, ranks, pattern, special, eot, added, token_bytes) -> None:
        ids = [*token_bytes, *special.values(), *added.values()]
        if len({*ids}) != len(ids):
            raise ValueError("tokenizer gives one id to two tokens; ids must be distinct")
        if eot not in special:
            raise ValueError(f"tokenizer has no end-of-text token {eot!r} among its special tokens {sorted(special)}")
        self.ranks, self.pattern, self.special, self.eot_token, self.added = ranks, pattern, special, eot, added
        self.eot, self.vocab_size = special[eot], max(ids) + 1
        self.stops = {self.eot, *(special[name] for name in TURN_ENDS if name in special)}  # what ends an answer
        self.bos: list[int] = []  # what the family puts before every text
        self.left, self.right = set(), set()  # special tokens that swallow the whitespace before and after them
        self.source = {}  # the files it was read from, to be written as they were
        self._bytes = token_bytes | {i: name.encode() for name, i in (special | added).items()}
        self._bpe = tiktoken.Encoding("minphi", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))) if added else None

    def encode(self, text: str) -> list[int]:
        if not self._added:
            return self._bpe.encode_ordinary(text)
        ids, end = [], 0
        for match in self._added.finditer(text):
            ids += [*self._bpe.encode_ordinary(text[end:match.start()]), self.added[match[0]]]
            end = match.end()
        return ids + self._bpe.encode_ordinary(text[end:])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts] if self._added else self._bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode_bytes(self, ids) -> bytes:
        """Ids without a token (a model's vocabulary may be padded) give nothing."""
        return b"".join(self._bytes.get(i, b"") for i in ids)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Chat -> ids in the family's format (TEMPLATES). Special tokens come from the format, never from a message's content."""
        start, opening, closing, ends, strip, names = next(t for sign, t in TEMPLATES.items() if not sign or sign in self.special)
        parts = [(start, True)]
        for n, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant") or not isinstance(content, str) or names.get(role, role) is None:
                roles = [r for r in ("system", "user", "assistant") if names.get(r, r)]
                raise ValueError(f"message {n} needs a role among {', '.join(roles)} and a text as content")
            parts += [(opening.format(names.get(role, role)), True), (content.strip() if strip else content, False), (closing, True)]
        if add_generation_prompt:
            parts += [(opening.format(names.get("assistant", "assistant")).rstrip(" "), True)]
        elif ends:
            parts += [(self.eot_token, True)]
        ids, text, before = [], "", None  # the text since the special token `before` is encoded in one go, as if nothing had been put together
        for part, ours in [*parts, (None, True)]:
            pieces = [None] if part is None else re.split(r"(<\|?\w+\|?>)", part) if ours else [part]
            for piece in pieces:
                if piece is not None and not (ours and re.fullmatch(r"<\|?\w+\|?>", piece)):
                    text += piece
                    continue
                if piece is not None and piece not in self.special:
                    raise ValueError(f"this tokenizer has no token {piece}, so it cannot render a chat; it has {sorted(self.special)}")
                text = text.lstrip() if before in self.right else text
                text = text.rstrip() if piece in self.left else text
                ids += self._encode_after(before, text) + ([self.special[piece]] if piece else [])
                text, before = "", piece
        return ids

    def _encode_after(self, special: str | None, text: str) -> list[int]:
        return self.encode(text)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell tokenizers apart by content."""
        content = [sorted((i, t.hex()) for t, i in self.ranks.items()), self.pattern, sorted((self.special | self.added).items()), self.eot_token]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def _merges(self):
        """The two parts each longer token is made of: what remains of its bytes when only tokens of lower rank are merged."""
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:
                best, at = min((self.ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
                if best >= rank:
                    raise ValueError(f"token {token!r} cannot be reached by merges of lower rank; this is not a BPE vocabulary")
                parts[at:at + 2] = [parts[at] + parts[at + 1]]
            if len(parts) == 2:
                yield ["".join(BYTE_TO_CHAR[b] for b in part) for part in parts]

    def save(self, path: str) -> None:
        """Write tokenizer.json and tokenizer_config.json (with the chat template) into the directory `path`."""
        byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
        for name, content in (self.source or {
            "tokenizer.json": {
                "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
                "added_tokens": [dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                                 for name, i in sorted(self.special.items(), key=lambda item: item[1])],
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}, byte_level]},
                "decoder": byte_level,
                "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                          "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                          "vocab": {"".join(BYTE_TO_CHAR[b] for b in t): i for t, i in sorted(self.ranks.items(), key=lambda item: item[1])},
                          "merges": list(self._merges())}},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eot_token, "bos_token": self.eot_token,
                "pad_token": self.eot_token, "clean_up_tokenization_spaces": False, "add_prefix_space": False,
                "chat_template": CHAT_TEMPLATE}}).items():
            _write_json(os.path.join(path, name), content)

    @staticmethod
    def load(path_or_name: str) -> "Tokenizer":
        """A directory (with tokenizer.json, vocab.json and merges.txt, or *.tiktoken), a tokenizer.json, a hub name, or one of bytes,
        gpt2, cl100k_base, o200k_base (fetched by tiktoken)."""
        path = str(path_or_name)
        if path == "bytes":
            return Tokenizer({bytes([b]): b for b in range(256)})
        if path in ("gpt2", "cl100k_base", "o200k_base"):
            try:
                known = tiktoken.get_encoding(path)
            except (OSError, ValueError) as error:  # requests' errors are OSErrors
                raise ValueError(f"tokenizer {path} could not be fetched ({error}); go online once, or use a tokenizer.json or 'bytes'") from error
            special, free = dict(known._special_tokens), itertools.count(known.n_vocab)
            special |= {name: next(free) for name in SPECIAL if name not in special}
            return Tokenizer(known._mergeable_ranks, known._pat_str, special)
        path = locate(path, weights=False)
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        file = os.path.join(folder, "tokenizer.json") if os.path.isdir(path) else path
        files = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        ranks = next((os.path.join(folder, name) for name in files if name.endswith(".tiktoken")), None)
        if not os.path.isfile(file) and ranks:  # phi-3-small: lines of base64 and rank, special tokens in its remote code
            with open(ranks, "rb") as lines:
                return Tokenizer({base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}, GPT4_PATTERN, PHI_3_SMALL_SPECIAL)
        if os.path.isfile(file):
            source = {"tokenizer.json": _read_json(file)}
        elif {"vocab.json", "merges.txt"} <= {*files}:
            source = {"tokenizer.json": _from_vocab_and_merges(folder)}
        else:
            raise FileNotFoundError(f"no tokenizer at {file}: give a directory with tokenizer.json, that file, or bytes, gpt2, cl100k_base, o200k_base")
        if os.path.isfile(config := os.path.join(folder, "tokenizer_config.json")):
            source["tokenizer_config.json"] = _read_json(config)
        try:
            return _from_json(source)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file} is not a BPE tokenizer ({type(error).__name__}: {error}); other kinds are not supported") from error
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


class SentencePiece(Tokenizer):
    """SentencePiece's BPE with byte fallback (Llama 2, phi-3-mini, Gemma), run by tiktoken all the same.

    tiktoken merges bytes by rank, so ranks here are priorities, each with the ids that it stands for: first the bytes (an id of their
    own each), then what leads from bytes to the vocabulary's characters (a character left half-built falls back to its bytes' ids),
    then the merges in their order. Spaces are written as ▁. prepend: whether a text that follows no special token ("first"), any
    text ("always": where it has none yet; "force") or none ("never") gets a ▁ in front.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], special: dict[str, int], eot: str, prepend: str):
        pieces = {piece: i for piece, i in vocab.items() if piece not in special}
        fallback = [pieces.pop(f"<0x{b:02X}>") for b in range(256)]
        ranks, self._ids = {bytes([b]): b for b in range(256)}, [[pieces.get(chr(b), i) if b < 128 else i] for b, i in enumerate(fallback)]

        def add(token: bytes, ids: list[int]):
            if token not in ranks:
                ranks[token] = len(self._ids)
                self._ids.append(ids)
        for character in [piece for piece in pieces if len(piece) == 1]:
            encoded = character.encode()
            for n in range(2, len(encoded)):
                add(encoded[:n], [fallback[b] for b in encoded[:n]])
            add(encoded, [pieces[character]])
        last, seen = None, set()
        for left, right in merges:
            if left + right != last and left + right in seen:
                raise ValueError(f"the merges that make {left + right!r} do not follow one another; this order is not supported")
            last = left + right
            seen.add(last)
            add(last.encode(), [pieces[last]])
        # No merge crosses from another character to a space or a line break, where no piece does: so text may be cut there.
        plain = re.compile(r"▁*[^▁\n]*|\n+")
        pattern = r"▁*[^▁\n]+|▁+|\n+" if all(plain.fullmatch(piece) for piece in pieces) else r"[\s\S]+"
        token_bytes = {i: piece.replace("▁", " ").encode() for piece, i in pieces.items()} | {i: bytes([b]) for b, i in enumerate(fallback)}
        self._set(ranks, pattern, special, eot, {}, token_bytes)
        self.prepend = prepend

    def encode(self, text: str) -> list[int]:
        return self._encode_after(None, text)

    def _encode_after(self, special, text):
        text = text.replace(" ", "▁")
        if text and (self.prepend == "force" or not text.startswith("▁") and (self.prepend == "always" or self.prepend == "first" and not special)):
            text = "▁" + text
        ids = self._ids
        return [i for rank in self._bpe.encode_ordinary(text) for i in ids[rank]]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids) -> str:
        text = super().decode(ids)
        return text[1:] if self.prepend != "never" and text.startswith(" ") else text

    @functools.cached_property
    def fingerprint(self) -> str:
        content = [sorted((r, t.hex(), self._ids[r]) for t, r in self.ranks.items()), sorted(self.special.items()), self.eot_token, self.prepend]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _from_vocab_and_merges(folder: str) -> dict:
    """GPT-2's two files as the tokenizer.json that they mean."""
    vocab, added = _read_json(os.path.join(folder, "vocab.json")), {}
    with open(os.path.join(folder, "merges.txt"), encoding="utf-8") as lines:
        merges = [line for line in lines.read().split("\n") if line and not line.startswith("#version")]
    if os.path.isfile(extra := os.path.join(folder, "added_tokens.json")):
        added = _read_json(extra)
    added |= {name: vocab[name] for name in ENDS if name in vocab}
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    flags = dict(single_word=False, lstrip=False, rstrip=False)
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": byte_level,
            "added_tokens": [dict(id=i, content=name, **flags, normalized=bool(name.isspace()), special=not name.isspace())
                             for name, i in sorted(added.items(), key=lambda item: item[1])],
            "pre_tokenizer": byte_level, "decoder": byte_level,
            "model": dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False,
                          byte_fallback=False, vocab=vocab, merges=merges)}


def _from_json(source: dict) -> Tokenizer:
    """tokenizer.json and tokenizer_config.json, parsed -> byte-level BPE or SentencePiece's."""
    json_, config = source["tokenizer.json"], source.get("tokenizer_config.json", {})
    bpe, tokens = json_["model"], json_.get("added_tokens", [])
    special = {t["content"]: t["id"] for t in tokens if t.get("special", True)}
    added = {t["content"]: t["id"] for t in tokens if t["content"] not in special}
    eos = config.get("eos_token") or "<|endoftext|>"
    eos = eos["content"] if isinstance(eos, dict) else eos
    eot = next((name for name in ENDS if name in special), eos)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in bpe["merges"]]
    splitter, normalizer = json_.get("pre_tokenizer") or {}, json_.get("normalizer") or {}
    steps = [step for part in (normalizer, splitter) if part for step in part.get("normalizers", part.get("pretokenizers", [part]))]
    if bpe.get("byte_fallback"):
        prepend = "never"
        for step in steps:
            space = step.get("pattern", {}).get("String") == " "
            if step["type"] == "Prepend" and step["prepend"] == "▁":
                prepend = "force"
            elif step["type"] == "Metaspace" and not step.get("split", True):
                prepend = step.get("prepend_scheme", "always")
            elif not (space and (step["type"] == "Split" or step["type"] == "Replace" and step["content"] == "▁")):  # no space is left to split at
                raise ValueError(f"step {step['type']} of a SentencePiece tokenizer is not supported")
        if "Prepend" in (kinds := [step["type"] for step in steps]) and kinds.index("Prepend") > 0:
            raise ValueError("a normalizer that prepends only after replacing is not supported")
        tokenizer = SentencePiece(bpe["vocab"], merges, special | added, eot, prepend)
    else:
        patterns = [s["pattern"]["Regex"] if s["type"] == "Split" else GPT2_PATTERN for s in steps
                    if s["type"] == "Split" or s["type"] == "ByteLevel" and s.get("use_regex", True)]
        merged = [bpe["vocab"]["".join(merge)] for merge in merges]
        if merged != sorted(merged) or len(patterns) != 1 or normalizer:
            raise ValueError("only byte-level BPE with one split pattern, no normalizer and merges in order of id is supported")
        ranks = {bytes(CHAR_TO_BYTE[c] for c in t): i for t, i in bpe["vocab"].items() if t not in special and t not in added}
        tokenizer = Tokenizer(ranks, patterns[0], special, eot, added)
    tokenizer.source = source
    tokenizer.left, tokenizer.right = ({t["content"] for t in tokens if t.get(flag)} for flag in ("lstrip", "rstrip"))
    tokenizer.stops |= {special[eos]} & {*special.values()} if eos in special else set()
    post = json_.get("post_processor") or {}
    for step in post.get("processors", [post]):
        for piece in itertools.takewhile(lambda piece: "SpecialToken" in piece, step.get("single", [])):
            tokenizer.bos.append(special[piece["SpecialToken"]["id"]])
    return tokenizer


# ---------------------------------------------------------------- files

def write_atomically(path: str, write) -> None:
    """Atomically: `write(file)` fills a file aside, which then takes the place of `path`."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    aside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def _write_json(path: str, value) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()))


def _read_json(path: str):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it may be truncated: restore it or make it again") from error


def download(url: str, path: str, size: int | None = None, digest: str | None = None, headers=None, attempts: int = 5) -> None:
    """Fetch url into path, which appears only when it is whole. What was cut, now or in an earlier call, goes on from path.part.

    size in bytes; digest: 64 hex digits of SHA-256, or 40 of SHA-1 over git's blob. OSError when it cannot be had, ValueError when what
    came is not what was promised.
    """
    import requests
    from tqdm import tqdm
    part, error = path + ".part", None
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    for attempt in range(attempts):
        have = os.path.getsize(part) if os.path.exists(part) else 0
        if size is None or have < size:
            time.sleep(min(attempt, 3))
            try:
                resume = {"Range": f"bytes={have}-"} if have else {}
                with requests.get(url, headers={"Accept-Encoding": "identity", **(headers or {}), **resume}, stream=True, timeout=30) as answer:
                    if answer.status_code == 416:  # nothing after what we have: either it is whole or it is of another file
                        size = have if size is None and have else size
                    elif 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
                        raise PermissionError(f"{url} answers {answer.status_code} {answer.reason}")
                    else:
                        answer.raise_for_status()
                        have = have if answer.status_code == 206 else 0
                        total = have + int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
                        with open(part, "ab" if have else "wb") as file, \
                                tqdm(desc=os.path.basename(path), initial=have, total=total, unit="B", unit_scale=True, disable=None) as bar:
                            for chunk in answer.iter_content(1 << 16):
                                file.write(chunk)
                                bar.update(len(chunk))
                        size = total if size is None else size
            except requests.RequestException as problem:
                error = problem
                continue
        if size is not None and os.path.getsize(part) < size:
            continue
        if size is not None and os.path.getsize(part) != size or digest and _digest(part, digest) != digest:
            error = ValueError(f"{url} sent something else than promised (size or hash differ)")
            os.remove(part)
            continue
        os.replace(part, path)
        return
    raise error if isinstance(error, ValueError) else OSError(f"{url} cannot be fetched ({type(error).__name__ if error else 'cut again and again'})")


def _digest(path: str, like: str) -> str:
    hasher = hashlib.sha256() if len(like) == 64 else hashlib.sha1(f"blob {os.path.getsize(path)}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def is_hub_name(name: str) -> bool:
    """owner/model or owner/model@revision, and not a mistyped local path: nothing called `owner` is here, nor is it one of our folders."""
    owner = name.split("/")[0]
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name)) and not os.path.exists(name) and not os.path.exists(owner) \
        and owner not in ("runs", "data")


def locate(path_or_name, weights: bool = True) -> str:
    """A local path as it is; for a hub name the directory of that model, fetched into the cache where it is not there yet (without the
    weights by choice). A second call asks nobody.

    HF_ENDPOINT: a mirror; HF_TOKEN: for gated models; MINPHI_CACHE: the cache (~/.cache/minphi unless set).
    """
    name = str(path_or_name)
    if not is_hub_name(name):
        return name
    import requests
    repository, _, revision = name.partition("@")
    endpoint, token = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"), os.environ.get("HF_TOKEN")
    cache = os.environ.get("MINPHI_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minphi")
    folder, headers = os.path.join(cache, *name.split("/")), {"Authorization": f"Bearer {token}"} if token else {}
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w") as lock:  # several ranks ask at once
        with contextlib.suppress(ImportError):
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)
        listing = os.path.join(folder, ".listing.json")
        try:
            if not os.path.isfile(listing):
                answer = requests.get(f"{endpoint}/api/models/{repository}/revision/{revision or 'main'}", params={"blobs": "true"},
                                      headers=headers, timeout=30)
                if answer.status_code in (401, 403):
                    raise PermissionError(f"{endpoint} does not give {name} away without permission: accept its licence there and set HF_TOKEN")
                if answer.status_code == 404:
                    raise FileNotFoundError(f"no model {name}, neither as a directory here nor at {endpoint}; check the spelling")
                answer.raise_for_status()
                _write_json(listing, answer.json())
            about = _read_json(listing)
            files = {entry["rfilename"]: entry for entry in about["siblings"]}
            wanted = r"(config|generation_config|tokenizer_config|tokenizer|vocab|added_tokens|special_tokens_map)\.json|merges\.txt|[^/]+\.tiktoken"
            wanted = [file for file in files if re.fullmatch(wanted, file)]
            if weights:
                stem = next((stem for stem in ("model.safetensors", "pytorch_model.bin") if {stem, f"{stem}.index.json"} & {*files}), None)
                if stem is None:
                    raise FileNotFoundError(f"{name} has neither model.safetensors nor pytorch_model.bin, single or in shards")
                kind = re.escape(os.path.splitext(stem)[0]) + r"(-\d+-of-\d+)?" + re.escape(os.path.splitext(stem)[1]) + r"(\.index\.json)?"
                wanted += [file for file in files if re.fullmatch(kind, file)]
            for file in wanted:
                if not os.path.isfile(os.path.join(folder, file)):
                    entry = files[file]
                    url = f"{endpoint}/{repository}/resolve/{about.get('sha') or revision or 'main'}/{file}"
                    digest = (entry.get("lfs") or {}).get("sha256") or entry.get("blobId")
                    download(url, os.path.join(folder, file), entry.get("size"), digest, headers)
        except requests.RequestException as error:
            raise OSError(f"{name} is not here and {endpoint} cannot be reached ({type(error).__name__}): go online, set HF_ENDPOINT to a mirror, "
                          "or give a directory") from None
    return folder


# ---------------------------------------------------------------- checkpoints

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def write_safetensors(path: str, tensors: dict[str, torch.Tensor]) -> None:
    """u64 length of the header, the header as JSON padded with spaces to 8 bytes, then the tensors in C order, without gaps."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    write_atomically(path, write)


class SafeTensors(dict):
    """name -> tensor that maps the file: nothing is read before it is used, and writing to one leaves the file as it is."""

    def __init__(self, path: str):
        try:
            with open(path, "rb") as file:
                self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            data = 8 + int.from_bytes(self.memory[:8], "little")
            for name, entry in json.loads(self.memory[8:data]).items():
                if name != "__metadata__":
                    (begin, end), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
                    if not 0 <= begin <= end <= len(self.memory) - data or end - begin != math.prod(entry["shape"]) * dtype.itemsize:
                        raise ValueError(f"{name} reaches beyond its end")
                    flat = torch.empty(0, dtype=dtype)
                    if end > begin:
                        flat = torch.frombuffer(self.memory, dtype=dtype, count=math.prod(entry["shape"]), offset=data + begin)
                    self[name] = flat.view(entry["shape"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); it may be truncated: restore it or make it again") from error

    def release(self) -> None:
        """Give back the memory of the pages read so far; they are read again when they are used again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED)


read_safetensors = SafeTensors


def _open_weights(folder: str) -> list[dict[str, torch.Tensor]]:
    """The files of a directory's weights, each name -> tensor."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        files, index = [stem], os.path.join(folder, f"{stem}.index.json")
        if not os.path.isfile(os.path.join(folder, stem)):
            files = sorted({*_read_json(index)["weight_map"].values()}) if os.path.isfile(index) else []
        for file in files:
            if not os.path.isfile(os.path.join(folder, file)):
                raise FileNotFoundError(f"{folder} lacks {file}, a part of the model")
        if files and stem.endswith("safetensors"):
            return [SafeTensors(os.path.join(folder, file)) for file in files]
        if files:
            try:
                return [torch.load(os.path.join(folder, file), map_location="cpu", weights_only=True) for file in files]
            except Exception as error:
                raise ValueError(f"{folder}/{stem} cannot be read as plain weights ({type(error).__name__}: {str(error).splitlines()[0]})") from None
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin, single or in shards")


def hf_names(config: Config, name: str) -> list[str]:
    """The tensors of the family's files that make ours up, rows one after another. Example: layers.3.qkv.weight -> q, k and v of layer 3."""
    module, kind = name.rsplit(".", 1)
    layer = module.split(".")[1] if module.startswith("layers.") else ""
    theirs = config.form.tensors[module.replace(f".{layer}.", ".N.") if layer else module]
    return [f"{part.replace('.N.', f'.{layer}.')}.{kind}" for part in (theirs if isinstance(theirs, tuple) else (theirs,))]


def _parts(config: Config, tensor, count: int):
    """Ours as the rows of their one tensor, of gate and up, or of q, k and v."""
    return (tensor,) if count == 1 else tensor.split([config.d_ff] * 2 if count == 2 else
                                                     [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)])


def _rearrange(config: Config, name: str, tensor, back: bool = False):
    """phi-3-small's order of rows -> ours (q, k, v; gate, up), or back."""
    if config.family == "phi3small" and ".qkv." in name:
        kv, group, dim = config.n_kv_head, config.n_head // config.n_kv_head, config.head_dim
        if back:
            q, k, v = tensor.split([config.n_head * dim, kv * dim, kv * dim])
            return torch.cat([q.view(kv, group * dim, *q.shape[1:]), k.view(kv, dim, *k.shape[1:]), v.view(kv, dim, *v.shape[1:])], 1).view(tensor.shape)
        q, k, v = tensor.view(kv, (group + 2) * dim, *tensor.shape[1:]).split([group * dim, dim, dim], 1)
        return torch.cat([part.flatten(0, 1) for part in (q, k, v)])
    if config.family == "phi3small" and ".gate_up." in name:
        shape = (2, config.d_ff) if back else (config.d_ff, 2)
        return tensor.view(*shape, *tensor.shape[1:]).transpose(0, 1).flatten(0, 1)
    return tensor


def to_hf(model: Model) -> dict[str, torch.Tensor]:
    """The model's weights under the names and in the order of its family's files."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if not (config.tied and name.startswith("head.") and name != "head.bias"):
            names = hf_names(config, name)
            tensors |= zip(names, _parts(config, _rearrange(config, name, tensor, back=True), len(names)))
    return tensors


def save(model: Model, tokenizer: Tokenizer | None, path: str) -> None:
    """Write a Hugging Face directory of the model's family; each file replaces its predecessor at once. Weights keep the model's type."""
    config, path, ids = model.config, str(path), dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is {config.vocab_size}; make the model larger")
        ids = {"bos_token_id": (tokenizer.bos or [tokenizer.eot])[0], "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot}
        _write_json(os.path.join(path, "generation_config.json"), {**ids, "eos_token_id": [tokenizer.eot, *sorted(tokenizer.stops - {tokenizer.eot})]})
        tokenizer.save(path)
    rope = {}
    if config.original_context:
        rope = {"type": "longrope", "short_factor": list(config.short_factor), "long_factor": list(config.long_factor)}
        if config.family == "phi3small":
            rope |= {"short_mscale": config.rope_scale(False), "long_mscale": config.rope_scale(True)}
        elif config.long_scale is not None:
            rope["attention_factor"] = config.long_scale
    quantized = [module for module in model.modules() if isinstance(module, Quantized)]
    for module in quantized:
        module.tile(False)
    bits = min((module.bits for module in quantized), default=0)
    quantization = {"quantization_config": {"quant_method": "minphi", "bits": bits}} if bits else {}  # so that nobody takes it for plain weights
    _write_json(os.path.join(path, "config.json"), {
        "architectures": [config.form.architecture], "model_type": config.family, **config.form.constants,
        **{theirs: getattr(config, ours) for ours, theirs in {**FIELDS, **config.form.fields}.items()},
        "original_max_position_embeddings": config.original_context or config.context, "rope_scaling": rope or None,
        "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02, "use_cache": True, **ids,
        "head_dim": config.head_dim, "torch_dtype": str(model.norm.weight.dtype).removeprefix("torch."), **quantization})
    write_safetensors(os.path.join(path, "model.safetensors"), to_hf(model))


def read_config(file: str) -> Config:
    """A config.json of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    source = _read_json(file)
    family = source.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{file} has model_type {family!r}; supported are {', '.join(FAMILIES)}")
    form = FAMILIES[family]
    rope = {**source, **(source.get("rope_scaling") or {}), **(source.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    checks = [(key, source.get(key, value), value) for key, value in form.constants.items()]
    longrope = kind in ("longrope", "su", "yarn") and "short_factor" in rope and "long_factor" in rope
    if not longrope:
        checks.append(("rope_type", kind, "default"))
    for key, value, wanted in checks:
        if value != wanted and not (family == "gemma" and value in ("gelu", None)):
            raise ValueError(f"{file} has {key} {value!r}; only {wanted!r} is supported")
    names = {**FIELDS, **form.fields}
    values = {ours: rope[theirs] for ours, theirs in names.items() if rope.get(theirs) is not None}
    values = {"n_kv_head": values.get("n_head"), "context": None, **form.defaults, **values}
    original = values.pop("original_context", None) or values["context"]
    if longrope:
        values |= dict(original_context=original, short_factor=rope["short_factor"], long_factor=rope["long_factor"])
        scale = rope.get("attention_factor")
        if scale is None and (rope.get("factor") or 0) > 1:
            scale = math.sqrt(1 + math.log(rope["factor"]) / math.log(original))
        values |= dict(short_scale=rope.get("short_mscale", scale), long_scale=rope.get("long_mscale", scale))
    lacking = [theirs for ours, theirs in names.items() if values.get(ours) is None and ours in [f.name for f in dataclasses.fields(Config)][:7]]
    if lacking:
        raise ValueError(f"{file} lacks {', '.join(lacking)}")
    if values.get("head_size") == values["d_model"] / values["n_head"]:
        values["head_size"] = None
    try:
        return Config(family=family, **values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def load(path_or_name: str, device=None, dtype: torch.dtype | None = None) -> tuple[Model, Tokenizer | None]:
    """Open a run directory, a Hugging Face directory of a family in FAMILIES, or a hub name; -> the model in eval mode and its
    tokenizer (None if it has none).

    device: default_device() unless given; dtype: as stored unless given. Tensors must match the shape exactly, or are named.
    """
    path = locate(path_or_name)
    if not os.path.isfile(os.path.join(path, "config.json")):
        if path in PRESETS:
            raise ValueError(f"{path} is a shape without weights; give the directory of a trained model, or a hub name such as microsoft/phi-1_5")
        raise FileNotFoundError(f"no model at {path} (config.json is missing): train one with python train.py, or give a Hugging Face directory or hub name")
    config = read_config(os.path.join(path, "config.json"))
    files = _open_weights(path)
    stored = {name: file for file in files for name in file if not name.endswith("rotary_emb.inv_freq")}
    with torch.device("meta"):
        model = Model(config)
    if config.tied:
        stored.pop(hf_names(config, "head.weight")[0], None)  # a second copy of the embedding
    with torch.device("meta"):
        for name, module in [*model.named_modules()]:
            if isinstance(module, (Linear, nn.Embedding)) and (packed := hf_names(config, f"{name}.packed")[0]) in stored:
                width = module.weight.shape[1]
                group = width // stored[packed.replace("packed", "scale")][packed.replace("packed", "scale")].shape[1]
                model.set_submodule(name, Quantized(len(module.weight), width, 8 * stored[packed][packed].shape[1] // width, group, getattr(module, "bias", None)))
        if config.tied and isinstance(model.embed, Quantized):
            model.head = model.embed
    theirs = {name: tensor.shape for name, tensor in to_hf(model).items()}
    wrong = ([f"{name} is missing" for name in theirs if name not in stored] + [f"{name} is not part of the model" for name in stored if name not in theirs]
             + [f"{name} has shape {tuple(stored[name][name].shape)} instead of {tuple(shape)}" for name, shape in theirs.items()
                if name in stored and stored[name][name].shape != shape])
    if wrong:
        raise ValueError(f"{path} does not hold the model its config.json describes: {'; '.join(wrong[:5])}"
                         + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    device = device or default_device()
    norm = hf_names(config, "norm.weight")[0]
    dtype, weights = dtype or stored[norm][norm].dtype, {}
    for name, tensor in model.state_dict().items():
        if not (config.tied and name.startswith("head.") and name != "head.bias"):
            own = tensor.dtype if name.endswith(("packed", "scale", "low")) else dtype  # a quantized layer's parts are what they are
            names, weights[name] = hf_names(config, name), torch.empty(tensor.shape, device=device, dtype=own)
            for part, rows in zip(names, _parts(config, weights[name], len(names))):
                source = _rearrange(config, name, stored[part][part])
                few = max(1, (1 << 24) // max(1, source[0].numel()))  # rows at a time, so that no large tensor is in memory twice
                for to, what in zip(rows.split(few), source.split(few)):
                    to.copy_(what)
                    if isinstance(stored[part], SafeTensors):
                        stored[part].release()
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tied and isinstance(model.embed, nn.Embedding):
        model.head.weight = model.embed.weight
    model.requires_grad_(True)
    names = {*os.listdir(path)}
    has_tokenizer = "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names or any(name.endswith(".tiktoken") for name in names)
    return model.eval(), Tokenizer.load(path) if has_tokenizer else None


# ---------------------------------------------------------------- table

# Training tokens and what the sources say of cost, to stand beside what we compute.
SOURCES = {
    "phi-1": (50e9, ""), "phi-1.5": (150e9, ""), "phi-2": (1.4e12, ""),
    "phi-3-mini": (3.3e12, "868 tokens/parameter, 7.6 GFLOPs, 7.6 GB, int4 2.4 GB; 12 tokens/s on a phone, 180 on an A100"),
    "phi-3-small": (4.8e12, ""), "phi-3-medium": (4.8e12, ""),
    "phi-4": (10e12, "700 tokens/parameter"), "phi-4-mini": (5e12, ""),
    "llama-3-8b": (15e12, "1875 tokens/parameter, 16 GFLOPs, 16 GB, int4 5 GB"),
}
TITLES = ["preset", "parameters", "GFLOPs/token", "+ attention at full context", "KV bytes/token", "GB bf16", "GB int8", "GB int4", "tokens/parameter",
          "the sources say"]


def describe(name: str) -> list[str]:
    config, (tokens, said) = PRESETS[name], SOURCES.get(name, (None, ""))
    n = config.parameters()
    # int8 and int4 with a 16-bit scale and zero point for every 32 weights: 9 and 5 bits a weight
    return [name, f"{n:,}", f"{2 * n / 1e9:.4g}", f"{config.attention_flops() / 1e9:.3g}", f"{config.cache_bytes():,}",
            *(f"{n * bits / 8e9:.3g}" for bits in (16, 9, 5)), f"{tokens / n:.0f}" if tokens else "", said]


def training_memory(config: Config, tokens: int) -> dict[str, float]:
    """Bytes that train.py takes on one GPU with `tokens` tokens in a micro-batch: fp32 weights, their bf16 copies for the products,
    gradients, Muon's momentum for the blocks' matrices and AdamW's two moments for the rest, and what the backward pass needs."""
    n = config.parameters()
    matrices = sum(math.prod(shape) for shape in config.n_layer * [(config.d_model, (2 * config.n_head + 2 * config.n_kv_head) * config.head_dim),
                                                                   (config.d_model, (2 if config.form.activation == "gelu" else 3) * config.d_ff)])
    wide = config.n_head * config.head_dim
    layer = 4 * config.d_model + 2 * (wide + 2 * config.n_kv_head * config.head_dim) + wide + (2 if config.form.activation == "gelu" else 3) * config.d_ff
    return {"weights, fp32": 4 * n, "weights, bf16 copies": 2 * matrices, "gradients": 4 * n, "optimizer": 4 * matrices + 8 * (n - matrices),
            "activations": 2 * tokens * config.n_layer * layer, "loss": 8 * tokens * config.vocab_size}


def show(name: str, gpu_gb: float) -> None:
    config = PRESETS[name]
    for title, value in [*zip(TITLES, describe(name)), *dataclasses.asdict(config).items()]:
        print(f"{title:28} {value}") if value not in ("", None, [], 1.0) else None
    tokens = min(config.context, 4096)
    parts = training_memory(config, tokens)
    print(f"\ntraining, one micro-batch of {tokens:,} tokens on a GPU:")
    for part, size in parts.items():
        print(f"  {part:26} {size / 1e9:9.2f} GB")
    states, each = sum(size for part, size in parts.items() if part not in ("activations", "loss")), parts["activations"] + parts["loss"]
    print(f"  {'all':26} {(states + each) / 1e9:9.2f} GB")
    if (room := 0.92 * gpu_gb * 1e9 - each) <= 0:
        print(f"activations alone overflow a GPU of {gpu_gb:g} GB: shorter micro-batches or recomputation are needed")
    elif states <= room:
        print(f"fits one GPU of {gpu_gb:g} GB; more of them share the batch")
    else:
        print(f"needs {math.ceil(states / room)} GPUs of {gpu_gb:g} GB that share weights, gradients and optimizer (train.py --shard)")


def transformers_model(config: Config):
    """(name, transformers' Phi3ForCausalLM of this shape with random weights), or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed, so there is nothing to compare with")
        return None
    shape = {FIELDS[name]: getattr(config, name) for name in ("vocab_size", "n_layer", "d_model", "n_head", "n_kv_head", "d_ff", "context", "tied")}
    return f"transformers {transformers.__version__}", transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape, pad_token_id=0))


def bench(config: Config, dtype: torch.dtype, rows: int = 16, steps: int = 8) -> None:
    """Tokens a second of a whole training step (forward, backward, fused AdamW), beside transformers' where installed."""
    device = default_device()
    tokens = torch.randint(config.vocab_size, (rows, config.context + 1), device=device)
    ours = Model(config).to(device)
    runs = {"minphi": (ours, lambda: ours(tokens[:, :-1], targets=tokens[:, 1:])[0] / (rows * config.context))}
    if peer := transformers_model(config):
        theirs = peer[1].to(device)
        runs[peer[0]] = theirs, lambda: theirs(tokens[:, :-1], labels=tokens[:, :-1]).loss
    print(f"{config.parameters():,} parameters, {rows} rows of {config.context} tokens, {str(dtype)[6:]}, {device}; best of {steps} steps")
    for name, (module, loss) in runs.items():
        optimizer, best = torch.optim.AdamW(module.parameters(), fused=True), math.inf
        for _ in range(steps):
            start = time.perf_counter()
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            value.item()
            best = min(best, time.perf_counter() - start)
        print(f"{name:24} {rows * config.context / best:10,.0f} tokens/s")


def bandwidth(device) -> float:
    """Bytes a second that summing 256 MB reads here."""
    x, best = torch.ones(1 << 26, device=device), math.inf
    for _ in range(8):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return 4 * len(x) / best


def _open_for_bench(path_or_preset: str, device, precision: str) -> Model:
    """A run, or a preset with random weights made at once in the wanted precision, which is all the memory that they take."""
    bits = {"bf16": 16, "int8": 8, "int4": 4}[precision]
    if path_or_preset not in PRESETS:
        model = load(path_or_preset, device, torch.bfloat16)[0]
        return quantize(model, bits) if bits < 16 else model
    with torch.device("meta"):
        model = Model(PRESETS[path_or_preset]).bfloat16()
        model = quantize(model, bits) if bits < 16 else model
    model.to_empty(device=device)
    for name, tensor in model.state_dict().items():
        tensor.random_() if tensor.dtype == torch.uint8 else tensor.fill_(1) if "norm" in name else tensor.fill_(-0.03) if name.endswith("low") \
            else tensor.fill_(0.004) if name.endswith("scale") else tensor.normal_(0, 0.02)
    return model.eval()


def decode_bench(path: str, device=None, precisions=("bf16", "int8", "int4"), batches=(1, 4, 16), prompt: int = 512, new: int = 64) -> None:
    """Print for a run, or a preset with random weights: tokens a second of prompts and of decoding, latency of a token, memory and the share of
    this machine's bandwidth that reading the weights and the cache takes, by precision and batch size; and the sources' costs beside it."""
    device, config = device or default_device(), PRESETS.get(path) or read_config(os.path.join(locate(path), "config.json"))
    prompt, limit = min(prompt, config.context // 2), bandwidth(device)
    print(f"{path}: {config.parameters():,} parameters, {device}, {torch.get_num_threads()} threads, {limit / 1e9:.1f} GB/s when reading; prompts of "
          f"{prompt} tokens, then {new} new ones")
    print(f"{'precision':22}{'batch':>6}{'weights GB':>11}{'cache GB':>9}{'prompt tok/s':>13}{'decode tok/s':>13}{'p50 ms':>8}{'p95 ms':>8}{'GB/s':>7}{'of limit':>9}")

    def row(name, batch, size, first, steps):
        steps = sorted(steps)
        cache, middle = batch * config.cache_bytes() * (prompt + new), steps[len(steps) // 2]
        moved = (size + cache) * len(steps) / sum(steps)
        print(f"{name:22}{batch:6}{size / 1e9:11.2f}{cache / 1e9:9.2f}{batch * prompt / first:13,.0f}{batch * len(steps) / sum(steps):13,.1f}{1e3 * middle:8.2f}"
              f"{1e3 * steps[int(0.95 * len(steps))]:8.2f}{moved / 1e9:7.1f}{moved / limit:9.0%}", flush=True)

    def measure(name, batch, size, generate):
        for warm in (True, False):
            times, tokens = [time.perf_counter()], torch.randint(config.vocab_size, (batch, 32 if warm else prompt)).tolist()
            generate(tokens, 2 if warm else new, lambda row, token: times.append(time.perf_counter()) if row == batch - 1 else None)
        row(name, batch, size, times[1] - times[0], [b - a for a, b in zip(times[1:], times[2:])])
    for precision in precisions:
        model = _open_for_bench(path, device, precision)
        size = sum(t.numel() * t.element_size() for name, t in model.state_dict().items() if not name.startswith("embed.") or config.tied and "head" not in name)
        for batch in batches:
            measure(precision, batch, size, lambda tokens, count, stream: model.generate(tokens, count, stream=stream))
        del model
    if path in PRESETS and config.family == "phi3" and (peer := transformers_model(config)):
        theirs = peer[1].to(device, torch.bfloat16).eval()

        class Streamer:
            def __init__(self, stream):
                self.put, self.end = lambda ids: stream(0, None) if ids.numel() == 1 else None, lambda: None
        measure(f"{peer[0]} bf16", 1, 2 * config.parameters() - 2 * config.vocab_size * config.d_model, lambda tokens, count, stream: theirs.generate(
            torch.tensor(tokens, device=device), max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=Streamer(stream)))
    print(f"\n{'the sources':14}{'GFLOPs/token':>13}{'GB bf16':>9}{'GB int4':>9}{'most tok/s here at int4':>25}  they say")
    for name in ("phi-3-mini", "llama-3-8b"):
        cells = describe(name)
        print(f"{name:14}{cells[2]:>13}{cells[5]:>9}{cells[7]:>9}{limit / 1e9 / float(cells[7]):25.1f}  {cells[9]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the presets: size, cost and memory.", allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, help="show this one in detail, with the memory that training it takes")
    parser.add_argument("--gpu-gb", type=float, default=80, help="memory of a GPU in gigabytes, for --preset (default 80)")
    parser.add_argument("--bench", choices=PRESETS, help="instead, time a training step of this preset")
    parser.add_argument("--vocab-size", type=int, help="tokens of the vocabulary for --bench, instead of the preset's")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of --bench's matrix products (default: fp32)")
    args = parser.parse_args()
    if args.bench:
        config = PRESETS[args.bench]
        bench(dataclasses.replace(config, vocab_size=args.vocab_size or config.vocab_size), torch.float32 if args.dtype == "fp32" else torch.bfloat16)
        return
    if args.preset:
        show(args.preset, args.gpu_gb)
        return
    rows = [TITLES, *map(describe, PRESETS)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(TITLES))]
    for row in rows:
        print("  ".join(cell.ljust(width) if i in (0, 9) else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))).rstrip())


if __name__ == "__main__":
    main()

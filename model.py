"""The decoder of every phi (and of Llama 3 and Gemma), its presets, KV cache and generation, its tokenizers, and checkpoints.

One block serves all families; what tells them apart stands in the table FAMILIES. A run directory is a Hugging Face directory
of its family, so there is no import or export step. `python model.py` prints the presets.
"""
import argparse
import base64
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import math
import mmap
import os
import pickle
import random
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
    tensors: dict                  # our module -> theirs, or several whose rows follow one another in ours
    fields: dict                   # our Config field -> their key in config.json, where it is not the one in FIELDS
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
          "original_context": "original_max_position_embeddings", "short_factor": "short_factor", "long_factor": "long_factor",
          "short_scale": "attention_factor", "long_scale": "attention_factor"}
LONGROPE = ("short_factor", "long_factor", "short_scale", "long_scale")  # those that stand in rope_scaling
LLAMA_TENSORS = {
    "embed": "model.embed_tokens", "attention_norm": "input_layernorm", "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate_up": "mlp.gate_proj mlp.up_proj", "down": "mlp.down_proj",
    "norm": "model.norm", "head": "lm_head"}
FAMILIES = {  # by config.json's model_type
    "phi3": Family(  # phi-3-mini, 3.5-mini, 3-medium, 4, 4-mini
        "Phi3ForCausalLM", {**LLAMA_TENSORS, "qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"},
        {"window": "sliding_window"}, {"hidden_act": "silu", "attention_bias": False}),
    "phi": Family(  # phi-1, 1.5, 2
        "PhiForCausalLM",
        {**LLAMA_TENSORS, "out": "self_attn.dense", "gate_up": "mlp.fc1", "down": "mlp.fc2", "norm": "model.final_layernorm"},
        {"norm_eps": "layer_norm_eps"}, {"hidden_act": "gelu_new", "qk_layernorm": False}, activation="gelu", parallel=True,
        layer_norm=True, bias=True, head_bias=True, defaults={"rotary_share": 0.5}),
    "phi3small": Family(  # its rows of qkv and of gate and up have an order of their own (_row_order)
        "Phi3SmallForCausalLM", {**LLAMA_TENSORS, "qkv": "self_attn.query_key_value", "out": "self_attn.dense",
                                 "gate_up": "mlp.up_proj", "norm": "model.final_layernorm"},
        {"norm_eps": "layer_norm_epsilon", "d_ff": "ff_intermediate_size", "rope_theta": "rope_embedding_base",
         "short_scale": "short_mscale", "long_scale": "long_mscale", "embedding_scale": "mup_embedding_multiplier",
         "attention_scale": "mup_attn_multiplier", "logit_divisor": "mup_width_multiplier", "sparse_block": "blocksparse_block_size",
         "sparse_local": "blocksparse_num_local_blocks", "sparse_stride": "blocksparse_vert_stride",
         "dense_every": "dense_attention_every_n_layers", "dummy_tokens": "dummy_token_indices"},
        {"hidden_act": "gegelu", "gegelu_limit": 20.0, "mup_use_scaling": True, "attention_bias": False,
         "blocksparse_homo_head_pattern": False, "rope_position_scale": 1.0},
        activation="geglu_clamped", layer_norm=True, bias=True, defaults={"tied": True}),
    "llama": Family("LlamaForCausalLM", LLAMA_TENSORS, {"head_size": "head_dim"},
                    {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}),
    "gemma": Family(  # scales the embedding by sqrt(d_model)
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
        for field in dataclasses.fields(self):
            value, whole = getattr(self, field.name), field.type in (int, int | None)
            if (whole or field.type in (float, float | None)) and (value is not None or field.type in (int, float)) and (
                    isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < math.inf):
                raise ValueError(f"{field.name} must be a positive {'whole ' * whole}number, not {value!r}")
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {self.family!r}")
        if not self.head_size and self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} must be a multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.rotary_dims % 2 or not 0 < self.rotary_dims <= self.head_dim:
            raise ValueError(f"{self.rotary_dims} of {self.head_dim} channels of a head would be rotated: it must be an even number "
                             f"(d_model {self.d_model})")
        for name in ("short_factor", "long_factor") if self.original_context else ():
            if len(getattr(self, name) or ()) != self.rotary_dims // 2 or min(getattr(self, name)) <= 0:
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


def _phi(n_layer, d_model, head_dim) -> Config:
    heads = d_model // head_dim
    return Config(51200, 2048, n_layer, d_model, heads, heads, 4 * d_model, family="phi", rotary_share=32 / head_dim)


PHI_3_MINI = Config(vocab_size=32064, context=4096, n_layer=32, d_model=3072, n_head=32, n_kv_head=32, d_ff=8192, window=2047)
PHI_3_MINI_128K = dataclasses.replace(PHI_3_MINI, context=131072, window=None)
PHI_4 = Config(vocab_size=100352, context=16384, n_layer=40, d_model=5120, n_head=40, n_kv_head=10, d_ff=17920, rope_theta=2.5e5)
PHI_3_SMALL = Config(vocab_size=100352, context=8192, n_layer=32, d_model=4096, n_head=32, n_kv_head=8, d_ff=14336, rope_theta=1e6,
                     tied=True, family="phi3small", embedding_scale=10.0, attention_scale=1.0, logit_divisor=8.0, dense_every=2,
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
    "phi-3-mini-128k": PHI_3_MINI_128K,
    "phi-3.5-mini": PHI_3_MINI_128K,
    "phi-3-small": PHI_3_SMALL,
    "phi-3-small-128k": dataclasses.replace(PHI_3_SMALL, context=131072),
    "phi-3-medium": dataclasses.replace(PHI_4, vocab_size=32064, context=4096, rope_theta=1e4, window=2047),
    "phi-4": PHI_4,
    "phi-4-mini": dataclasses.replace(PHI_3_MINI_128K, vocab_size=200064, n_head=24, n_kv_head=8, tied=True, rotary_share=0.75),
    "llama-3-8b": Config(128256, 8192, n_layer=32, d_model=4096, n_head=32, n_kv_head=8, d_ff=14336, rope_theta=5e5, family="llama"),
    "gemma-2b": Config(256000, 8192, n_layer=18, d_model=2048, n_head=8, n_kv_head=1, d_ff=16384, norm_eps=1e-6, tied=True, family="gemma"),
}


# ---------------------------------------------------------------- layers

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
    """A linear layer, or an embedding, with weights of 4 or 8 bits (kernels.quantize) whose scales `group` weights of a row share.
    On CPUs with a C++ compiler they lie tiled, as kernels.NATIVE reads them."""

    def __init__(self, rows: int, width: int, bits: int, group: int, bias=None):
        super().__init__()
        self.rows, self.width, self.bits, self.group, self.bias, self.is_tiled = rows, width, bits, group, bias, False
        self.register_buffer("packed", torch.empty(rows, width * bits // 8, dtype=torch.uint8))
        for name in ("scale", "low"):
            self.register_buffer(name, torch.empty(rows, width // group, dtype=torch.bfloat16))

    def tile(self, on: bool) -> None:
        if self.is_tiled != on:
            for name, width in (("packed", 4), ("scale", 1), ("low", 1)):
                part = getattr(self, name)
                setattr(self, name, kernels.tiled(part, width) if on else kernels.untiled(part, self.rows))
            self.is_tiled = on

    def pointers(self, kept: list) -> list[int]:
        self.tile(True)
        weights = [part.data_ptr() for part in (self.packed, self.scale, self.low)]
        return [*weights, _float_pointer(self.bias, kept), self.rows, self.width, self.group, self.bits]

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
    modules = [*model.named_modules()]
    if any(isinstance(module, Quantized) for _, module in modules):
        raise ValueError("this model is quantized already: start from the original weights")
    for name, module in modules:
        group = math.gcd(module.in_features, 64) if isinstance(module, Linear) else 0
        if group >= 8 and not (name == "head" and model.config.tied and module.bias is not None):  # an embedding has no bias
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
        pairs = [tuple(torch.empty(shape, device=device, dtype=dtype) for _ in range(2)) for _ in range(config.n_layer)]
        self._set(pairs, torch.tensor(starts, device=device), 0)

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
        unused = int(self.starts[index].min())
        self._set([(k[index, :, unused:], v[index, :, unused:]) for k, v in self.layers], self.starts[index] - unused, self.length - unused)


def exit_points(n, most: int, least: int, over: int):
    """SkipDecode's (arXiv 2307.02628): how many layers the n-th generated token runs, falling linearly from most to least over `over` tokens."""
    return torch.as_tensor(most - (most - least) * n / over).round().clamp(least, most).long()


def layers_run(n_layer: int, count: int | None) -> list[int]:
    """The first layer and the last count - 1: so what a later, smaller count runs has run for every earlier token."""
    return [*range(n_layer)] if count is None else [0, *range(n_layer - count + 1, n_layer)]


class SkipError(ValueError, argparse.ArgumentTypeError):
    """As argparse shows it: of other ValueErrors it hides the words."""


def parse_skip(text: str) -> tuple[int, ...]:
    """MAX:MIN or MAX:MIN:TOKENS -> numbers, as `Model.generate` and, with TOKENS, `Model.skip` take them."""
    numbers = tuple(map(int, text.split(":"))) if re.fullmatch(r"\d+:\d+(:[1-9]\d*)?", text) else (0, 0)
    if not 2 <= numbers[1] <= numbers[0]:
        raise SkipError(f"{text!r}: give MAX:MIN or MAX:MIN:TOKENS, the layers of the first and of the last new token, 2 or more, such as 24:8")
    return numbers


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
            if weight.dim() == 2 and not weight.is_meta:
                deep = name.endswith(("out.weight", "down.weight"))  # they write into the residual stream, whose variance must not grow with depth
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer) if deep else 0.02)
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
        window = config.window if config.window and end > config.window else end
        sparse = (config.sparse_block, config.sparse_local, config.sparse_stride) if config.dense_every > 1 else None
        low = (columns - window + 1).clamp(min=0)[None]  # the first key that each query sees
        if documents is not None:  # a token sees earlier ones of its own document
            first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            low = torch.maximum(low, torch.where(first, columns, 0).cummax(1).values)
        if starts is not None:     # padding sees itself, since a softmax over nothing is not a number
            low = torch.maximum(low, torch.minimum(starts[:, None], columns))
        plain = documents is None and starts is None and window == end
        if whole := kernels.fused(device.type) and not (sparse and (past or starts is not None)):  # of sparse layers they do unpadded texts
            mask = None if plain else torch.stack((low, torch.searchsorted(low, columns.expand_as(low).contiguous(), right=True))).int()
        else:
            mask = None if plain else kernels.interval_mask(low[:, past:], end)
        if whole or not sparse or end <= config.sparse_block * config.sparse_local:
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
        else:  # each row changes to the long factors by its own length
            at = (torch.arange(past, end, device=device) - starts[:, None]).clamp(min=0)[:, None]             # (B, 1, T)
            long = (end - starts > original)[:, None, None, None]
            cos, sin = (torch.where(long, a[at], b[at]) for a, b in zip((cos, sin), self.rotary(end, False, device)))  # (B, 1, T, R)
        few = 16 if isinstance(self.layers[0].down, Quantized) else 4  # tokens; more are faster one operation after another
        if cache is not None and tokens.numel() <= few and self.steps_natively(x, end):
            x = self.step(x, cos, sin, cache, layers_run(config.n_layer, skip))
        else:
            masks = self.masks(past, end, device, documents, starts)
            for i in layers_run(config.n_layer, skip if cache else None):
                block = self.layers[i]
                if cache is None:
                    y = block(x, cos, sin, masks[block.sparse is not None])
                    x = y if skip is None or i == 0 else torch.where((skip > config.n_layer - i)[..., None], y, x)
                else:  # block.forward: one compiled for training would recompile
                    x = block.forward(x, cos, sin, masks[block.sparse is not None], (*cache.layers[i], past))
            x = self.norm(x)
        if cache is not None:
            cache.length = end
        return x / config.logit_divisor if config.logit_divisor != 1 else x

    def steps_natively(self, x, end: int) -> bool:
        """Whether kernels.NATIVE serves: a few tokens on a CPU, without gradients, in float32 or bf16, no layer sparse yet."""
        config = self.config
        return (x.device.type == "cpu" and not torch.is_grad_enabled() and x.dtype in (torch.float32, torch.bfloat16)
                and (config.dense_every == 1 or end <= config.sparse_block * config.sparse_local) and kernels.native() is not None
                and not (config.head_dim % 16 or config.d_model % 16 or config.d_ff % 16 or config.head_dim > 1024))

    def step(self, x, cos, sin, cache: Cache, run):
        """The blocks and the final norm in one call: x (B, T, d_model), cos and sin as in kernels.rotary -> final normed states."""
        config, (B, T, width), past, first = self.config, x.shape, cache.length, cache.layers[0][0]
        if cache.plan is None:
            kept = []
            parts = [(block.qkv, block.out, block.gate_up, block.down, block.attention_norm, block.mlp_norm) for block in self.layers]
            layers = [[n for part in row for n in (part.pointers(kept) if part else (0, 0))] + [0, 0] for row in parts]
            shape = [len(layers), B, T, past, width, config.n_head, config.n_kv_head, config.head_dim, config.rotary_dims, config.d_ff,
                     kernels.ACTIVATIONS.index(config.form.activation), 8 * first.itemsize, 0, 0, *self.norm.pointers(kept)]
            cache.plan = torch.tensor(layers), torch.tensor(shape), kept
        layers, shape, _ = cache.plan
        layers[:, -2:] = torch.tensor([[keys.data_ptr(), values.data_ptr()] for keys, values in cache.layers])
        layers = layers if len(run) == len(layers) else layers[run]
        shape[:4], shape[12:14] = torch.tensor([len(run), B, T, past]), torch.tensor(first.stride()[:2])
        end = torch.arange(past, past + T)
        low = torch.maximum(cache.starts[:, None], end - config.window + 1 if config.window else end * 0)
        low = torch.minimum(low, end).contiguous()                                 # (B, T); padding sees itself
        cos, sin = (table.float().expand(B, 1, T, -1).contiguous() for table in (cos, sin))
        y = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        kernels.native_step(layers, shape, y, cos, sin, low, config.norm_eps, self.layers[0].scale)
        return y.to(x.dtype)

    def logits(self, x):
        """Final states (..., d_model) -> (..., vocab_size) float32."""
        few = x.numel() <= 16 * self.config.d_model and self.steps_natively(x, 0)
        logits = kernels.native_linear(x.float(), self.head) if few else self.head(x).float()
        dummies = self.config.dummy_tokens
        return logits.index_fill(-1, torch.tensor(dummies, device=x.device), -math.inf) if dummies else logits

    def forward(self, tokens, documents=None, targets=None, weights=None, cache: Cache | None = None, skip=None):
        """Logits (B, T, V) float32, or with targets (B, T; -1 for none) the loss: (sum in nats, sum of weights).

        documents (B, T) int: tokens of different documents in a row do not see each other; weights (B, T): of each target.
        skip: as in hidden; where self.skip is set and targets are given, follows from it, the heaviest targets being what is generated.
        """
        if skip is None and self.skip and targets is not None:
            ids = tokens * 0 if documents is None else documents
            first = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
            fresh = targets >= 0 if weights is None else weights > 0.5 * weights.amax().clamp(min=1e-9)
            fresh = F.pad(fresh[:, :-1], (1, 0)) & ~first      # inputs that were generated
            count = fresh.cumsum(1)                             # of them in the row, less those of earlier documents
            count = count - torch.where(first, count, 0).cummax(1).values
            skip = exit_points(torch.where(fresh, count - 1, 0), *self.skip)
        x = self.hidden(tokens, documents, cache, skip)
        return self.logits(x) if targets is None else kernels.cross_entropy(x, self.head.weight, targets, weights, self.head.bias)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 stop=None, seed: int | list[int] | None = None, stream=None, draft: "Model | None" = None,
                 lookup: int = 0, skip=None) -> list[list[int]]:
        """The new tokens of each prompt, up to and including one of `stop` (an id or several), max_new_tokens, or the context's end.

        temperature 0 takes the likeliest token; otherwise top_k > 0 draws from that many likeliest, top_p < 1 from the fewest that
        hold that much probability. seed: of all rows, or one for each; a row's random numbers are its own, so
        that its text does not depend on the batch that it is in, beyond the rounding of the logits.
        stream(row, token) is called for each new token and ends its row by returning True. Prompts may
        differ in length. draft: a smaller model that proposes tokens; lookup: so many proposals, copied from what followed the last words
        before; with this model's distribution (_speculate). skip: SkipDecode's (most, least[, over = max_new_tokens]) as in exit_points.
        """
        config, context, device, dtype = self.config, self.config.context, self.norm.weight.device, self.norm.weight.dtype
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        for row, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= context or not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
                raise ValueError(f"prompt {row} has {len(prompt)} tokens; it needs 1 to {context}, all in the vocabulary of {config.vocab_size}")
        if draft is not None and draft.config.vocab_size != config.vocab_size:
            raise ValueError(f"the draft's vocabulary has {draft.config.vocab_size} tokens, not {config.vocab_size}: take one with its tokenizer")
        if skip and (draft or lookup or not 2 <= skip[1] <= skip[0] <= config.n_layer):
            raise ValueError(f"skip {':'.join(map(str, skip))} must be layers with 2 <= MIN <= MAX <= {config.n_layer}, without draft or lookup")
        stop = {stop} if isinstance(stop, int) else {*(stop or ())}
        if seed is None:
            seed = int(torch.randint(2**62, ()))  # from torch's own state, which torch.manual_seed sets
        seeds = seed if isinstance(seed, list) else [f"{seed} {row}" for row in range(len(prompts))]
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for all, or one for each")
        rngs = [random.Random(each) for each in seeds]
        outputs, self.speculated = [[] for _ in prompts], (0, 0)
        limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        rows = [row for row, limit in enumerate(limits) if limit > 0]  # the prompt that each row of the batch continues
        if not rows:
            return outputs

        def told(row, token) -> bool:  # -> whether the row has ended
            outputs[row].append(token)
            return bool(stream and stream(row, token)) or token in stop or len(outputs[row]) == limits[row]
        if draft is not None or lookup:
            for row in rows:
                filters = (temperature, top_k, top_p)
                self._speculate(prompts[row], limits[row], filters, rngs[row], functools.partial(told, row), draft, lookup or 5)
            return outputs
        most, least, over = (*skip, max_new_tokens)[:3] if skip else (None, None, None)
        width = max(len(prompts[row]) for row in rows)
        cache = Cache(config, [width - len(prompts[row]) for row in rows], width + max(limits), device, dtype)

        def fill(begin, end, width):  # the whole texts so far of these slots, padded to width -> their last states
            texts = [prompts[row] + outputs[row] for row in rows[begin:end]]
            tokens = torch.tensor([[0] * (width - len(text)) + text for text in texts], device=device)
            return self.hidden(tokens, cache=cache.part(begin, end), skip=most)[:, -1:]
        few = max(1, 4096 // width)  # at once: the prompts' scores and activations, not the cache, would take the most memory
        x = torch.cat([fill(i, i + few, width) for i in range(0, len(rows), few)])
        cache.length, done, run, number = width, set(), most, 0
        while True:
            points = [rngs[row].random() for row in rows]
            chosen = sample(self.logits(x[:, -1]), temperature, top_k, top_p, points)
            done |= {row for row, token in zip(rows, chosen.tolist()) if row not in done and told(row, token)}
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

    def _speculate(self, prompt, limit, filters, rng, told, draft, most) -> None:
        """Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): up to `most` tokens are proposed and read at once; each is kept
        with probability min(1, p / q), p being this model's distribution and q the proposer's, and the first refused one is drawn anew from
        max(0, p - q): so what comes out is distributed as p. Proposals are the draft's, or for q = 1 what followed the last two tokens before."""
        models, device, text = [self] if draft is None else [self, draft], self.norm.weight.device, [*prompt]
        ends = [len(prompt) + limit, *(model.config.context for model in models)]
        changes = [model.config.original_context or 0 for model in models]  # no round crosses these
        caches = [Cache(model.config, [0], min(ends[0] + most, model.config.context), device, model.norm.weight.dtype) for model in models]
        followed = {pair: at + 2 for at, pair in enumerate(zip(prompt, prompt[1:-1]))}  # each pair of tokens: what followed it last

        def read(i, tokens, last):  # -> the distributions after the last tokens of a text
            cache, original = caches[i], models[i].config.original_context
            if original and cache.length <= original < len(tokens):
                cache.length = 0  # from here on the long factors hold, for the older keys too
            x = models[i].hidden(torch.tensor([tokens[cache.length:]], device=device), cache=cache)
            return distribution(models[i].logits(x[0, -last:]), *filters)

        def draw_one(probabilities):
            return int(draw(probabilities[None], [rng.random()]))
        while True:
            count = max(0, min(most, *(end - len(text) - 1 for end in ends), *(at - len(text) for at in changes if at >= len(text))))
            if draft is None:
                at = followed.get(tuple(text[-2:]), len(text))
                proposals = text[at:at + count]
                q = F.one_hot(torch.tensor(proposals, dtype=torch.long, device=device), self.config.vocab_size).float()
            else:
                proposals, q = [], []
                for _ in range(count):
                    q.append(read(1, text + proposals, 1)[0])
                    proposals.append(draw_one(q[-1]))
            p, kept = read(0, text + proposals, len(proposals) + 1), 0
            for token in proposals:
                if rng.random() * float(q[kept][token]) >= float(p[kept][token]):
                    break
                kept += 1
            rest = (p[kept] - q[kept]).clamp(min=0) if kept < len(proposals) else p[kept]
            self.speculated = self.speculated[0] + kept, self.speculated[1] + len(proposals)
            for cache in caches:
                cache.length = min(cache.length, len(text) + kept)
            for token in [*proposals[:kept], draw_one(rest if rest.sum() > 0 else p[kept])]:
                followed[tuple(text[-2:])] = len(text)
                text.append(token)
                if told(token):
                    return


def check_sampling(max_new_tokens, temperature, top_k, top_p) -> None:
    for name, value, least, most in (("max_new_tokens", max_new_tokens, 1, math.inf), ("temperature", temperature, 0, 1e9),
                                     ("top_k", top_k, 0, math.inf), ("top_p", top_p, 1e-12, 1)):
        if not least <= value <= most:
            raise ValueError(f"{name} must be from {least} to {most}, not {value}")


def distribution(logits, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0):
    """(B, V) logits -> the probabilities (B, V) that tokens are drawn with; for temperature 0 the likeliest token's is 1."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probabilities = logits.softmax(-1)
    if top_p == 1:
        return probabilities
    ordered, index = probabilities.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)  # those likelier hold top_p already; the likeliest stays
    return torch.zeros_like(probabilities).scatter_(-1, index, ordered / ordered.sum(-1, keepdim=True))


def draw(probabilities, points: list[float]):
    """(B, V) probabilities, or multiples of them -> (B,) token ids: those whose shares of [0, 1) hold the rows' points.

    One number a row decides, so that each row can have random numbers of its own, which torch.multinomial denies.
    Example: draw(torch.tensor([[0.5, 0.0, 0.5]]), [0.5]) is tensor([2])
    """
    ends = probabilities.cumsum(-1)  # (B, V)
    points = torch.tensor(points, dtype=ends.dtype, device=ends.device)[:, None]  # (B,) -> (B, 1)
    points = points.clamp(max=1 - 2**-24)  # rounding may have given 1.0
    ids = torch.searchsorted(ends, points * ends[:, -1:], right=True).squeeze(-1)  # (B, 1) -> (B,)
    return ids.clamp(max=ends.shape[-1] - 1)


def sample(logits, temperature: float, top_k: int, top_p: float, points: list[float]):
    """(B, V) logits -> (B,) token ids, drawn by a point of [0, 1) a row."""
    if temperature == 0:
        return logits.argmax(-1)
    return draw(distribution(logits, temperature, top_k, top_p), points)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# ---------------------------------------------------------------- tokenizers

# GPT-4's split adapted to Python source. A run of blank lines and the indentation after it is one piece, so
# that a line's level is one token; words take a leading space, underscore or dot (snake_case pieces,
# methods); each digit is a token, with the space before it. Every character falls into some alternative, only
# syntax that tiktoken (Rust) and Hugging Face (Oniguruma) read alike is used, and no lookaround, which keeps
# matching linear on any text.
PATTERN = r"\s*[\r\n]+[ \t]*|(?: ?_?|\.)[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{N}_.]+| ?_+| ?\.+|\s+"
# What Hugging Face's ByteLevel step means: alone, and after a step that makes each digit a piece.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PHI_3_SMALL_NAMES = {i: f"<|dummy_{i}|>" for i in range(100256, 100352)}
PHI_3_SMALL_NAMES |= zip((100257, 100261, 100262, 100263, 100266), SPECIAL)
DOCUMENT_ENDS = "<|endoftext|> <|end_of_text|> <eos> </s>".split()
TURN_ENDS = "<|end|> <|im_end|> <|eot_id|> <end_of_turn>".split()

# GPT-2 writes a byte as its Latin-1 character if that is visible, and moves the others up to 256 + n (for
# str.translate).
HIDDEN_BYTES = [b for b in range(256) if b == 32 or not chr(b).isprintable()]
TO_VISIBLE = {b: 256 + n for n, b in enumerate(HIDDEN_BYTES)}
FROM_VISIBLE = {c: b for b, c in TO_VISIBLE.items()}

# tiktoken gives up on about a million spaces in a row, and its older releases need quadratic time for as many
# letters. So longer runs, of whitespace (▁ is SentencePiece's space) or of anything else, are cut into pieces
# of this many characters.
MAX_RUN = 100_000
LONG_RUN = re.compile(rf"(?<![\s▁])[\s▁]{{{MAX_RUN},}}|(?<![^\s▁])[^\s▁]{{{MAX_RUN},}}")

# A chat in our format as Jinja; Tokenizer.render does the same in Python. And the tokenizer.json that we
# write.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
ADDED_TOKEN = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
TOKENIZER_JSON = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": %s,
"normalizer": null, "post_processor": null,
"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": %s}, "behavior": "Isolated", "invert": false},
    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]},
"decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
"model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
          "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
          "vocab": %s, "merges": %s}}
"""
# Stands after each visible character of a message, so that no special token is found there. No text has it.
GUARD = "\udfff"


@dataclasses.dataclass
class ChatFormat:
    opening: str               # what stands before a message; {} is its role
    closing: str               # and after it
    begin: str = ""            # what a chat begins with
    ends: bool = False         # a finished chat ends with the end-of-text token
    strip: bool = False        # whitespace around a message is dropped
    roles: tuple = ("user", "assistant", "system")  # the family's names for these three, or for the first two


CHAT_FORMATS = {  # by the special token that tells it; the first that a tokenizer has is its format
    "<|im_sep|>": ChatFormat("<|im_start|>{}<|im_sep|>", "<|im_end|>"),  # phi-4
    "<|im_start|>": ChatFormat("<|im_start|>{}\n", "<|im_end|>\n"),  # ChatML: SmolLM2
    "<|start_header_id|>": ChatFormat(  # Llama 3
        "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", "<|begin_of_text|>", strip=True),
    "<start_of_turn>": ChatFormat(  # Gemma
        "<start_of_turn>{}\n", "<end_of_turn>\n", "<bos>", strip=True, roles=("user", "model")),
    "<|tool|>": ChatFormat("<|{}|>", "<|end|>", ends=True),  # phi-4-mini
    "<|dummy_100256|>": ChatFormat("<|{}|>\n", "<|end|>\n", "<|endoftext|>", ends=True),  # phi-3-small
    "<|user|>": ChatFormat("<|{}|>\n", "<|end|>\n", ends=True),  # phi-3, ours
    "": ChatFormat("{}: ", "\n", ends=True, roles=("Instruct", "Output", "System")),  # phi-2
}
# What a chat without a system message begins with, where a model's own template has it.
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def split_long_runs(text):
    start = 0
    for run in LONG_RUN.finditer(text) if len(text) > MAX_RUN else ():
        for end in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield text[start:end]
            start = end
    yield text[start:]


def token_pattern(names, added_tokens):
    """For re.split: these tokens with the whitespace that some of them swallow; of several the longest."""
    lstrip = [token["content"] for token in added_tokens if token["lstrip"]]
    rstrip = [token["content"] for token in added_tokens if token["rstrip"]]
    forms = [r"(?:(?<!\s)\s+)?" * (name in lstrip) + re.escape(name) + r"\s*" * (name in rstrip)
             for name in sorted(names, key=len, reverse=True)]
    return re.compile(f"({'|'.join(forms)})")


class Tokenizer:
    """Byte-level BPE run by tiktoken, stored as a Hugging Face tokenizer.json. Text only ever gives ordinary
    tokens.

    ranks: token bytes -> id, merged in order of id; pattern: the regular expression that splits text before
    merging; special: name -> id; eot: name of the token that ends a document; added_tokens: as in
    tokenizer.json; those that are not special (codegen's runs of spaces) are found in text before it is
    split. Example: Tokenizer.load("bytes").encode("hi") == [104, 105]
    """
    prepend = rank_ids = None  # SentencePiece's

    def __init__(self, ranks, pattern=PATTERN, special=None, eot="<|endoftext|>", added_tokens=(),
                 token_bytes=None):
        self.ranks = ranks
        # The tokenizers library reads a possessive {1,3}+ as a repeat; before a | it means the same without
        # the +.
        self.pattern = re.sub(r"(\{\d+,\d+\})\+(?=\||$)", r"\1", pattern)
        self.special = special or {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
        self.eot_token = eot
        self.eot = self.special[eot]
        # What ends an answer.
        self.stops = {self.special[name] for name in (eot, *TURN_ENDS) if name in self.special}
        self.bos = []             # ids that the family puts before every text
        self.default_system = ""  # the system message of a chat without one
        self.source = {}          # texts of the files it was read from, to be written as they were

        added = [token["content"] for token in added_tokens if token["content"] not in self.special]
        self.names = {token["content"]: token["id"] for token in added_tokens} | self.special
        self.token_bytes = {i: name.encode() for name, i in self.names.items()}
        self.token_bytes |= token_bytes or {i: token for token, i in ranks.items()}
        self.vocab_size = max(self.token_bytes) + 1
        self.missing_bytes = {b for b in range(256) if bytes([b]) not in ranks}
        self._bpe = tiktoken.Encoding(
            "minphi", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})
        self.added_pattern = token_pattern(added, added_tokens) if added else None
        self.special_pattern = token_pattern(self.special, added_tokens)

    def encode(self, text, at_start=True):
        """at_start: no special token stands before the text."""
        ids = []
        # text, added token, text, ..., text
        parts = self.added_pattern.split(text) if self.added_pattern else [text]
        for n, part in enumerate(parts):
            if n % 2 == 0:
                ids += self.merge(part, at_start and not ids)
            else:
                ids.append(self.names[part if part in self.names else part.strip()])
        return ids

    def merge(self, text, at_start):
        """Text without added tokens -> ids."""
        for character in set(text) if self.missing_bytes else ():
            if not self.missing_bytes.isdisjoint(character.encode()):
                raise ValueError(f"this tokenizer has no token for {character!r}: "
                                 "take it out of the text, or use another tokenizer")
        ids = []
        for piece in split_long_runs(text):
            ids += self._bpe.encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids):
        """Ids without a token (a model's vocabulary may be padded) give nothing."""
        return b"".join(self.token_bytes.get(i, b"") for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")

    def render(self, messages, add_generation_prompt=True):
        """Chat -> ids in the family's format. Special tokens come from the format, never from a message."""
        chat = next(form for token, form in CHAT_FORMATS.items() if token in self.special or not token)
        roles = dict(zip(ChatFormat.roles, chat.roles))
        # An empty chat gets the default too, so that every chat begins as the shorter chats before it do.
        if self.default_system and [message.get("role") for message in messages[:1]] != ["system"]:
            messages = [{"role": "system", "content": self.default_system}, *messages]
        form = chat.begin
        for n, message in enumerate(messages):
            role = message.get("role")
            content = message.get("content")
            if role not in roles or not isinstance(content, str):
                raise ValueError(f"message {n} needs a role among {', '.join(roles)} and a text as content")
            content = content.strip() if chat.strip else content
            guarded = re.sub(r"(?<=\S)", GUARD, content)
            form += chat.opening.format(roles[role]) + guarded + chat.closing
        if add_generation_prompt:
            form += chat.opening.format(roles["assistant"]).rstrip(" ")
        elif chat.ends:
            form += self.eot_token

        ids = []
        for n, part in enumerate(self.special_pattern.split(form)):  # text, special token, text, ..., text
            if n % 2 == 1:
                ids.append(self.special[part.strip()])
            elif re.search(f"<(?!{GUARD})", part):
                raise ValueError(f"this tokenizer cannot render a chat: it lacks a special token of {part!r}")
            else:
                ids += self.encode(part.replace(GUARD, ""), at_start=n == 0)
        return ids

    @functools.cached_property
    def fingerprint(self):
        """16 hex digits that tell tokenizers apart by content."""
        names = sorted(self.names.items())
        content = self.ranks, self.pattern, names, self.eot_token, self.rank_ids, self.prepend
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def save(self, path):
        """Write tokenizer.json and tokenizer_config.json (with the chat template) into the directory."""
        files = self.source
        if not files:
            special = sorted(self.special.items(), key=lambda item: item[1])
            added = [{"id": i, "content": name, **ADDED_TOKEN} for name, i in special]
            vocab = {visible(token): i for token, i in self.ranks.items()}
            # tiktoken merges whatever two parts make a token, so each way to cut a token in two is a merge.
            merges = [[visible(token[:n]), visible(token[n:])]
                      for token in sorted(self.ranks, key=self.ranks.get) for n in range(1, len(token))
                      if token[:n] in self.ranks and token[n:] in self.ranks]
            config = dict.fromkeys(("eos_token", "bos_token", "pad_token"), self.eot_token)
            config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                       "chat_template": CHAT_TEMPLATE}
            values = map(json.dumps, (added, self.pattern, vocab, merges))
            files = {"tokenizer.json": TOKENIZER_JSON % tuple(values),
                     "tokenizer_config.json": json.dumps(config)}
        for name, text in files.items():
            write_atomically(os.path.join(path, name), lambda file: file.write(text.encode()))

    @staticmethod
    def load(path_or_name):
        """A directory (with tokenizer.json or *.tiktoken), a tokenizer.json, a hub name, or one of bytes,
        gpt2, cl100k_base, o200k_base (fetched by tiktoken)."""
        name = str(path_or_name)
        if name == "bytes":
            return Tokenizer({bytes([b]): b for b in range(256)})
        if name in ("gpt2", "cl100k_base", "o200k_base"):
            try:
                known = tiktoken.get_encoding(name)
            except OSError as error:  # requests' errors are among them
                raise OSError(f"{name} cannot be fetched ({error}): go online once, or use 'bytes'") from None
            special = dict(zip(SPECIAL[1:], itertools.count(known.n_vocab)))
            return Tokenizer(known._mergeable_ranks, known._pat_str, known._special_tokens | special)
        path = locate(name, weights=False)
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        source = {}
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            file = path if name == "tokenizer.json" and path != folder else os.path.join(folder, name)
            if os.path.isfile(file):
                with open(file, encoding="utf-8") as text:
                    source[name] = text.read()
        try:
            if "tokenizer.json" in source:
                return _from_json(source)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"tokenizer.json at {path} cannot be used "
                             f"({type(error).__name__}: {error})") from error
        # phi-3-small has a token and its rank a line, and the rest in its code.
        for file in glob.glob(os.path.join(glob.escape(folder), "*.tiktoken")):
            with open(file, "rb") as lines:
                pairs = [line.split() for line in lines]
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            return Tokenizer(ranks, GPT4_PATTERN, {name: i for i, name in PHI_3_SMALL_NAMES.items()})
        raise FileNotFoundError(f"no tokenizer at {path}: give a directory with tokenizer.json, "
                                "or bytes, gpt2, cl100k_base, o200k_base")


class SentencePiece(Tokenizer):
    """SentencePiece's BPE with byte fallback (Llama 2, phi-3-mini, Gemma), run by tiktoken all the same.

    tiktoken merges bytes by rank, so ranks here are priorities, each with the ids that it stands for: first
    the bytes (an id of their own each), then what leads from bytes to the vocabulary's characters (a
    character left half-built falls back to its bytes' ids), then the merges in their order. Spaces are
    written as ▁. prepend: whether a text that follows no token ("first"), any text ("always": where it has
    none yet; "force") or none ("never") gets a ▁ in front.
    """

    def __init__(self, vocab, merged, special, eot, added_tokens, prepend):
        pieces = {piece: i for piece, i in vocab.items() if piece not in special}
        byte_ids = [pieces.pop(f"<0x{b:02X}>") for b in range(256)]
        ids = {bytes([b]): [pieces.get(chr(b), i) if b < 128 else i] for b, i in enumerate(byte_ids)}
        for piece, i in pieces.items():
            encoded = piece.encode()
            if len(piece) == 1:
                for n in range(2, len(encoded)):
                    ids.setdefault(encoded[:n], [byte_ids[b] for b in encoded[:n]])
                ids.setdefault(encoded, [i])
        runs = [piece for piece, _ in itertools.groupby(merged)]
        if len(runs) > len(set(runs)):
            raise ValueError("the merges that make one piece do not follow one another")
        for piece in runs:
            ids.setdefault(piece.encode(), [vocab[piece]])

        # Where no piece crosses from another character to a space or a line break, no merge does: text is cut
        # there.
        plain = re.compile(r"▁*[^▁\n]*|\n+")
        pattern = r"▁*[^▁\n]+|▁+|\n+" if all(map(plain.fullmatch, pieces)) else r"[\s\S]+"
        token_bytes = {i: piece.replace("▁", " ").encode() for piece, i in pieces.items()}
        token_bytes |= {i: bytes([b]) for b, i in enumerate(byte_ids)}
        ranks = {token: rank for rank, token in enumerate(ids)}
        super().__init__(ranks, pattern, special, eot, added_tokens, token_bytes)
        self.rank_ids = list(ids.values())
        self.prepend = prepend

    def merge(self, text, at_start):
        text = text.replace(" ", "▁")
        wanted = self.prepend == "always" or self.prepend == "first" and at_start
        if text and (self.prepend == "force" or wanted and not text.startswith("▁")):
            text = "▁" + text
        return [i for rank in super().merge(text, at_start) for i in self.rank_ids[rank]]

    def decode(self, ids):
        return super().decode(ids).removeprefix("" if self.prepend == "never" else " ")


def visible(token):
    return token.decode("latin-1").translate(TO_VISIBLE)


def _from_json(source):
    """The texts of tokenizer.json and of the files beside it -> byte-level BPE or SentencePiece's."""
    contents = json.loads(source["tokenizer.json"])
    config = json.loads(source.get("tokenizer_config.json", "{}"))
    eos = config.get("eos_token") or "<|endoftext|>"
    if isinstance(eos, dict):
        eos = eos["content"]
    tokens = contents.get("added_tokens", [])
    special = {t["content"]: t["id"] for t in tokens if t["special"] or t["content"] == eos}
    eot = next((name for name in DOCUMENT_ENDS if name in special), eos)
    vocab = contents["model"]["vocab"]
    # A merge is ["a", "b"], or "a b" in older files.
    merged = ["".join(merge).replace(" ", "") for merge in contents["model"]["merges"]]

    def steps(part, key):
        part = contents.get(part) or {key: []}
        return part.get(key, [part])

    splits = steps("normalizer", "normalizers") + steps("pre_tokenizer", "pretokenizers")
    flags = ("use_regex", "split", "individual_digits")
    kinds = " ".join(step["type"] + "+" * any(step.get(flag) for flag in flags) for step in splits)
    how = {  # SentencePiece's prepend, or the pattern
        "Replace": "never", "Replace Split": "never", "Prepend Replace": "force",
        "Metaspace": splits[-1].get("prepend_scheme"),
        "ByteLevel+": GPT2_PATTERN, "Digits+ ByteLevel+": GPT2_DIGITS_PATTERN,
        "Split ByteLevel": splits[0].get("pattern", {}).get("Regex")}.get(kinds)
    if how is None:
        raise ValueError(f"the steps {kinds} are not supported")
    if contents["model"].get("byte_fallback"):
        tokenizer = SentencePiece(vocab, merged, special, eot, tokens, how)
    else:
        ids = [vocab[token] for token in merged]
        if ids != sorted(ids):
            raise ValueError("its merges are not in order of id")
        names = {token["content"] for token in tokens}
        ranks = {t.translate(FROM_VISIBLE).encode("latin-1"): i for t, i in vocab.items() if t not in names}
        tokenizer = Tokenizer(ranks, how, special, eot, tokens)
    tokenizer.source = source
    if eos in special:
        tokenizer.stops.add(special[eos])
    if DEFAULT_SYSTEM in "".join(source.values()):
        tokenizer.default_system = DEFAULT_SYSTEM
    for step in steps("post_processor", "processors"):
        first = step.get("single", [{}])[0]
        if "SpecialToken" in first:
            tokenizer.bos.append(special[first["SpecialToken"]["id"]])
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
    part, headers, error = path + ".part", {"Accept-Encoding": "identity", **(headers or {})}, "cut again and again"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    for attempt in range(attempts):
        time.sleep(min(attempt, 3))
        have = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            if size is None or have < size:
                resume = {"Range": f"bytes={have}-"} if have else {}
                with requests.get(url, headers=headers | resume, stream=True, timeout=30) as answer:
                    if answer.status_code == 416:  # what we have is of another file
                        os.remove(part)
                    elif 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
                        raise PermissionError(f"{url} answers {answer.status_code} {answer.reason}")
                    answer.raise_for_status()
                    have = have if answer.status_code == 206 else 0
                    size = size or have + int(answer.headers.get("Content-Length", 0)) or None
                    with open(part, "ab" if have else "wb") as file, \
                            tqdm(desc=os.path.basename(path), initial=have, total=size, unit="B", unit_scale=True, disable=None) as bar:
                        for chunk in answer.iter_content(1 << 16):
                            file.write(chunk)
                            bar.update(len(chunk))
        except requests.RequestException as problem:
            error = type(problem).__name__
            continue
        have = os.path.getsize(part)
        if size is not None and have > size or (size is None or have == size) and digest and _digest(part, digest) != digest:
            error = None
            os.remove(part)
        elif size is None or have == size:
            os.replace(part, path)
            return
    if error is None:
        raise ValueError(f"{url} sent something else than promised (size or hash differ)")
    raise OSError(f"{url} cannot be fetched ({error})")


def _digest(path: str, like: str) -> str:
    hasher = hashlib.sha256() if len(like) == 64 else hashlib.sha1(f"blob {os.path.getsize(path)}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def locate(path_or_name, weights: bool = True) -> str:
    """A local path as it is; for a hub name (owner/model or owner/model@revision) the directory of that model, fetched into the cache where
    it is not there yet (without the weights by choice). A second call asks nobody.

    HF_ENDPOINT: a mirror; HF_TOKEN: for gated models; MINPHI_CACHE: the cache (~/.cache/minphi unless set).
    """
    name = str(path_or_name)
    owner = name.split("/")[0]
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name) or os.path.exists(name) or os.path.exists(owner) or owner in ("runs", "data"):
        return name  # a mistyped local path is no hub name: nothing called `owner` is here, nor is it one of our folders
    import requests
    repository, _, revision = name.partition("@")
    endpoint, token = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"), os.environ.get("HF_TOKEN")
    folder, headers = os.path.join(kernels.cache_folder(), *name.split("/")), {"Authorization": f"Bearer {token}"} if token else {}
    listing = os.path.join(folder, ".listing.json")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w") as lock:  # several ranks ask at once
        with contextlib.suppress(ImportError):
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if not os.path.isfile(listing):
                url = f"{endpoint}/api/models/{repository}/revision/{revision or 'main'}"
                answer = requests.get(url, params={"blobs": "true"}, headers=headers, timeout=30)
                if answer.status_code in (401, 403):
                    raise PermissionError(f"{endpoint} does not give {name} away without permission: accept its licence there and set HF_TOKEN")
                if answer.status_code == 404:
                    raise FileNotFoundError(f"no model {name}, neither as a directory here nor at {endpoint}; check the spelling")
                answer.raise_for_status()
                _write_json(listing, answer.json())
            about = _read_json(listing)
            files = {entry["rfilename"]: entry for entry in about["siblings"]}
            wanted = r"(config|generation_config|tokenizer_config|tokenizer|vocab|added_tokens|special_tokens_map)\.json|merges\.txt|[^/]+\.tiktoken"
            if weights:
                kind = next((kind for kind in (r"model{}\.safetensors", r"pytorch_model{}\.bin")
                             if any(re.match(kind.format(""), file) for file in files)), None)
                if kind is None:
                    raise FileNotFoundError(f"{name} has neither model.safetensors nor pytorch_model.bin, single or in shards")
                wanted += "|" + kind.format(r"(-\d+-of-\d+)?") + r"(\.index\.json)?"
            for file, entry in files.items():
                if re.fullmatch(wanted, file) and not os.path.isfile(path := os.path.join(folder, file)):
                    url = f"{endpoint}/{repository}/resolve/{about.get('sha') or revision or 'main'}/{file}"
                    download(url, path, entry.get("size"), (entry.get("lfs") or {}).get("sha256") or entry.get("blobId"), headers)
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


def read_safetensors(path: str, maps: list | None = None) -> dict[str, torch.Tensor]:
    """Tensors that map the file (the mapping is added to `maps`): nothing is read before it is used, and writing leaves the file as it is."""
    try:
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data, tensors = 8 + int.from_bytes(memory[:8], "little"), {}
        for name, entry in json.loads(memory[8:data]).items():
            if name != "__metadata__":
                (begin, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
                if not 0 <= begin <= end <= len(memory) - data or end - begin != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{name} reaches beyond its end")
                tensors[name] = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=data + begin).view(shape) if end > begin \
                    else torch.empty(shape, dtype=dtype)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); it may be truncated: restore it or make it again") from error
    if maps is not None:
        maps.append(memory)
    return tensors


def _read_bin(path: str, maps: list) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as plain weights ({str(error).splitlines()[0]})") from None


def _open_weights(folder: str, maps: list) -> dict[str, torch.Tensor]:
    """All tensors of a directory's weights."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", _read_bin)):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return read(path, maps)
        if os.path.isfile(index := f"{path}.index.json"):
            files = sorted({*_read_json(index)["weight_map"].values()})
            return {name: tensor for file in files for name, tensor in read(os.path.join(folder, file), maps).items()}
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin, single or in shards")


def hf_names(config: Config, name: str) -> list[str]:
    """The tensors of the family's files that make ours up, rows one after another. Example: layers.3.qkv.weight -> q, k and v of layer 3."""
    *layer, module, kind = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return [f"{prefix}{theirs}.{kind}" for theirs in config.form.tensors[module].split()]


def _parts(config: Config, tensor, count: int):
    """Ours as the rows of their one tensor, of gate and up, or of q, k and v."""
    sizes = {1: [len(tensor)], 2: [config.d_ff] * 2, 3: [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]}
    return tensor.split(sizes[count])


def _row_order(config: Config, name: str):
    """Which of our rows (q, k, v; gate, up) each row of phi-3-small's files is: theirs are key/value head by key/value head, each with its
    queries, and gate and up by turns. None where the order is ours."""
    if config.family != "phi3small" or ".qkv." not in name and ".gate_up." not in name:
        return None
    if ".gate_up." in name:
        return torch.arange(2 * config.d_ff).view(2, -1).T.flatten()
    rows = torch.arange((config.n_head + 2 * config.n_kv_head) * config.head_dim)
    return torch.cat([part.view(config.n_kv_head, -1) for part in _parts(config, rows, 3)], 1).flatten()


def _stored(model: Model) -> dict[str, torch.Tensor]:
    """The model's own tensors that files hold: a tied embedding once."""
    tied = model.config.tied
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name.startswith("head.") and name != "head.bias")}


def to_hf(model: Model) -> dict[str, torch.Tensor]:
    """The model's weights under the names and in the order of its family's files."""
    config, tensors = model.config, {}
    for name, tensor in _stored(model).items():
        names, order = hf_names(config, name), _row_order(config, name)
        tensors |= zip(names, _parts(config, tensor if order is None else tensor[order.to(tensor.device)], len(names)))
    return tensors


def save(model: Model, tokenizer: Tokenizer | None, path: str) -> None:
    """Write a Hugging Face directory of the model's family; each file replaces its predecessor at once. Weights keep the model's type."""
    config, path, ids = model.config, str(path), dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model's vocab_size is {config.vocab_size}: make it larger")
        ids = {"bos_token_id": (tokenizer.bos or [tokenizer.eot])[0], "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot}
        ends = [tokenizer.eot, *sorted(tokenizer.stops - {tokenizer.eot})]
        _write_json(os.path.join(path, "generation_config.json"), {**ids, "eos_token_id": ends})
        tokenizer.save(path)
    if config.family == "phi3small" and config.original_context:  # its code wants the scales spelled out
        config = dataclasses.replace(config, short_scale=config.rope_scale(False), long_scale=config.rope_scale(True))
    fields = {ours: (theirs, getattr(config, ours)) for ours, theirs in {**FIELDS, **config.form.fields}.items()}
    rope = {"type": "longrope", **{theirs: value for theirs, value in map(fields.pop, LONGROPE) if value is not None}}
    quantized = [module for module in model.modules() if isinstance(module, Quantized)]
    for module in quantized:
        module.tile(False)
    bits = {"quantization_config": {"quant_method": "minphi", "bits": min(module.bits for module in quantized)}} if quantized else {}
    _write_json(os.path.join(path, "config.json"), {
        "architectures": [config.form.architecture], "model_type": config.family, **config.form.constants, **dict(fields.values()),
        "original_max_position_embeddings": config.original_context or config.context, "rope_scaling": rope if config.original_context else None,
        "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02, "use_cache": True, **ids,
        "head_dim": config.head_dim, "torch_dtype": str(model.norm.weight.dtype).removeprefix("torch."), **bits})
    write_safetensors(os.path.join(path, "model.safetensors"), to_hf(model))


def read_config(file: str) -> Config:
    """A config.json of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    source = _read_json(file)
    family = source.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{file} has model_type {family!r}; supported are {', '.join(FAMILIES)}")
    form, rope = FAMILIES[family], {**source, **(source.get("rope_scaling") or {}), **(source.get("rope_parameters") or {})}
    kind, names = rope.get("rope_type") or rope.get("type") or "default", {**FIELDS, **form.fields}
    values = {"n_kv_head": rope.get(names["n_head"]), **form.defaults,
              **{ours: rope[theirs] for ours, theirs in names.items() if rope.get(theirs) is not None}}
    if lacking := [names[field.name] for field in dataclasses.fields(Config)[:7] if values.get(field.name) is None]:
        raise ValueError(f"{file} lacks {', '.join(lacking)}")
    if kind in ("longrope", "su", "yarn") and {"short_factor", "long_factor"} <= values.keys():
        values.setdefault("original_context", values["context"])
        kind = "default"
    else:
        values = {name: value for name, value in values.items() if name not in (*LONGROPE, "original_context")}
    for key, value, wanted in [("rope_type", kind, "default"), *((key, source.get(key, value), value) for key, value in form.constants.items())]:
        if value != wanted and not (family == "gemma" and value in ("gelu", None)):  # so older files call the same activation
            raise ValueError(f"{file} has {key} {value!r}; only {wanted!r} is supported")
    if values.get("head_size") == values["d_model"] / values["n_head"]:
        del values["head_size"]
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
    if not os.path.isfile(file := os.path.join(path, "config.json")):
        if path in PRESETS:
            raise ValueError(f"{path} is a shape without weights; give the directory of a trained model, or a hub name such as microsoft/phi-1_5")
        raise FileNotFoundError(f"no model at {path} (config.json is missing): make one with python train.py, or give a hub name")
    config, quantization = read_config(file), _read_json(file).get("quantization_config") or {}
    with torch.device("meta"):
        model = Model(config)
        if quantization.get("quant_method") == "minphi":
            quantize(model, quantization.get("bits"))
    maps = []
    stored = {name: tensor for name, tensor in _open_weights(path, maps).items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        stored.pop(hf_names(config, "head.weight")[0], None)  # a second copy of the embedding
    theirs = to_hf(model)
    wrong = [f"{name} is missing" for name in theirs.keys() - stored.keys()]
    wrong += [f"{name} is not part of the model" for name in stored.keys() - theirs.keys()]
    wrong += [f"{name} has shape {tuple(stored[name].shape)} instead of {tuple(tensor.shape)}" for name, tensor in theirs.items()
              if name in stored and stored[name].shape != tensor.shape]
    if wrong:
        raise ValueError(f"{path} does not hold the model its config.json describes: {'; '.join(sorted(wrong)[:5])} ({len(wrong)} in all)")
    dtype, weights = dtype or stored[hf_names(config, "norm.weight")[0]].dtype, {}
    for name, tensor in _stored(model).items():
        own = tensor.dtype if name.endswith(("packed", "scale", "low")) else dtype  # a quantized layer's parts are what they are
        weights[name] = torch.empty(tensor.shape, device=device or default_device(), dtype=own)
        names, order = hf_names(config, name), _row_order(config, name)
        for part, rows in zip(names, _parts(config, weights[name], len(names))):
            source = stored[part] if order is None else stored[part][order.argsort()]
            few = max(1, (1 << 24) // max(1, source[0].numel()))  # rows at a time, so that no large tensor is in memory twice
            for to, what in zip(rows.split(few), source.split(few)):
                to.copy_(what)
                for memory in maps:  # the pages read so far are given back
                    memory.madvise(mmap.MADV_DONTNEED)
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tied and isinstance(model.embed, nn.Embedding):
        model.head.weight = model.embed.weight
    try:
        return model.requires_grad_(True).eval(), Tokenizer.load(path)
    except FileNotFoundError:
        return model, None


# ---------------------------------------------------------------- tables

# Training tokens and what the sources say of cost, to stand beside what we compute.
SOURCES = {
    "phi-1": (50e9, ""), "phi-1.5": (150e9, ""), "phi-2": (1.4e12, ""),
    "phi-3-mini": (3.3e12, "868 tokens/parameter, 7.6 GFLOPs, 7.6 GB, int4 2.4 GB; 12 tokens/s on a phone, 180 on an A100"),
    "phi-3-small": (4.8e12, ""), "phi-3-medium": (4.8e12, ""),
    "phi-4": (10e12, "700 tokens/parameter"), "phi-4-mini": (5e12, ""),
    "llama-3-8b": (15e12, "1875 tokens/parameter, 16 GFLOPs, 16 GB, int4 5 GB"),
}
TITLES = ["preset", "parameters", "GFLOPs/token", "+ attention at full context", "KV bytes/token", "GB bf16", "GB int8", "GB int4",
          "tokens/parameter", "the sources say"]


def describe(name: str) -> list[str]:
    config, (tokens, said) = PRESETS[name], SOURCES.get(name, (None, ""))
    n = config.parameters()
    return [name, f"{n:,}", f"{2 * n / 1e9:.4g}", f"{config.attention_flops() / 1e9:.3g}", f"{config.cache_bytes():,}",
            *(f"{n * bits / 8e9:.3g}" for bits in (16, 8.5, 4.5)), f"{tokens / n:.0f}" if tokens else "", said]  # 64 weights share 32 bits


def training_memory(config: Config, tokens: int) -> dict[str, float]:
    """Bytes that train.py takes on one GPU with `tokens` tokens in a micro-batch: fp32 weights, their bf16 copies for the products,
    gradients, Muon's momentum for the blocks' matrices and AdamW's two moments for the rest, and what the backward pass needs."""
    n, d, wide, kv = config.parameters(), config.d_model, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    hidden = (2 if config.form.activation == "gelu" else 3) * config.d_ff
    matrices = config.n_layer * d * (2 * wide + 2 * kv + hidden)
    return {"weights, fp32": 4 * n, "weights, bf16 copies": 2 * matrices, "gradients": 4 * n, "optimizer": 4 * matrices + 8 * (n - matrices),
            "activations": 2 * tokens * config.n_layer * (4 * d + 2 * (wide + 2 * kv) + wide + hidden), "loss": 8 * tokens * config.vocab_size}


def show(name: str, gpu_gb: float) -> None:
    """One preset in detail, where each gigabyte goes in training, and how many GPUs that takes."""
    config = PRESETS[name]
    for title, value in [*zip(TITLES, describe(name)), *dataclasses.asdict(config).items()]:
        print(f"{title:28} {value}")
    tokens = min(config.context, 4096)
    parts = {part: size / 1e9 for part, size in training_memory(config, tokens).items()}
    print(f"\ntraining, one micro-batch of {tokens:,} tokens on a GPU:")
    for part, size in {**parts, "all": sum(parts.values())}.items():
        print(f"  {part:26} {size:9.2f} GB")
    each = parts["activations"] + parts["loss"]
    gpus = (sum(parts.values()) - each) / max(1e-9, 0.92 * gpu_gb - each)
    print(f"needs {math.ceil(gpus)} of {gpu_gb:g} GB; several share weights, gradients and optimizer (train.py --shard)" if gpus < 1e6 else
          f"activations alone overflow a GPU of {gpu_gb:g} GB: shorter micro-batches or recomputation are needed")


def _peer(config: Config) -> dict:
    """{name: transformers' Phi-3 of this shape} where that is installed, else {}."""
    with contextlib.suppress(ImportError):
        from transformers import Phi3Config, Phi3ForCausalLM, __version__
        names = ("vocab_size", "n_layer", "d_model", "n_head", "n_kv_head", "d_ff", "context", "tied")
        return {f"transformers {__version__}": Phi3ForCausalLM(Phi3Config(**{FIELDS[name]: getattr(config, name) for name in names}, pad_token_id=0, eos_token_id=0))}
    return {}


def bench(config: Config, dtype: torch.dtype, rows: int = 16) -> None:
    """Tokens a second of a whole training step (forward, backward, fused AdamW), beside transformers' Phi-3 where installed."""
    device, models = default_device(), {"minphi": Model(config), **_peer(config)}
    tokens = torch.randint(config.vocab_size, (rows, config.context + 1), device=device)
    print(f"{config.parameters():,} parameters, {rows} rows of {config.context} tokens, {str(dtype)[6:]}, {device}; best of 8 steps")
    for name, model in models.items():
        optimizer, seconds = torch.optim.AdamW(model.to(device).parameters(), fused=True), []
        for _ in range(8):
            start = time.perf_counter()
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = model(tokens[:, :-1], targets=tokens[:, 1:])[0] / tokens.numel() if name == "minphi" else \
                    model(tokens[:, :-1], labels=tokens[:, :-1]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
        print(f"{name:24} {rows * config.context / min(seconds):10,.0f} tokens/s")


def _open_for_bench(path_or_preset: str, device, precision: str) -> Model:
    """A run, or a preset with random weights made at once in the wanted precision, which is all the memory that they take."""
    bits, made = {"bf16": None, "int8": 8, "int4": 4}[precision], path_or_preset in PRESETS
    with torch.device("meta") if made else contextlib.nullcontext():
        model = Model(PRESETS[path_or_preset]).bfloat16() if made else load(path_or_preset, device, torch.bfloat16)[0]
        model = quantize(model, bits) if bits else model.eval()
    for name, tensor in model.to_empty(device=device).state_dict().items() if made else ():
        tensor.random_() if tensor.dtype == torch.uint8 else tensor.fill_(1) if "norm" in name else tensor.normal_(0, 0.02)
    return model


def decode_bench(path: str, device=None, precisions=("bf16", "int8", "int4"), batches=(1, 4, 16), prompt: int = 512, new: int = 64) -> None:
    """Print for a run, or a preset with random weights: tokens a second of prompts and of decoding, latency of a token, memory and the share of
    this machine's bandwidth that reading the weights and the cache takes, by precision and batch size; and the sources' costs beside it."""
    device, config = device or default_device(), PRESETS.get(path) or read_config(os.path.join(locate(path), "config.json"))
    ones, seconds = torch.ones(1 << 26, device=device), math.inf
    for _ in range(8):
        start = time.perf_counter()
        ones.sum().item()
        seconds = min(seconds, time.perf_counter() - start)
    prompt, limit = min(prompt, config.context // 2), 4 * len(ones) / seconds  # bytes a second
    del ones
    print(f"{path}: {config.parameters():,} parameters, {device}, {torch.get_num_threads()} threads, {limit / 1e9:.1f} GB/s when reading; prompts of "
          f"{prompt} tokens, then {new} new ones")
    print("precision batch weights GB cache GB prompt tok/s decode tok/s  p50 ms  p95 ms   GB/s of limit")

    for precision in precisions:
        model = _open_for_bench(path, device, precision)
        size = sum(t.numel() * t.element_size() for name, t in _stored(model).items() if config.tied or not name.startswith("embed."))
        for batch in batches:
            for length, count in ((32, 2), (prompt, new)):  # the first to warm up
                times, tokens = [time.perf_counter()], torch.randint(config.vocab_size, (batch, length)).tolist()
                model.generate(tokens, count, stream=lambda row, token: times.append(time.perf_counter()) if row == batch - 1 else None)
            steps = sorted(b - a for a, b in zip(times[1:], times[2:]))
            cache, rate = batch * config.cache_bytes() * (prompt + new), len(steps) / sum(steps)
            print(f"{precision:9}{batch:6}{size / 1e9:11.2f}{cache / 1e9:9.2f}{batch * prompt / (times[1] - times[0]):13,.0f}{batch * rate:13,.1f}"
                  f"{1e3 * steps[len(steps) // 2]:8.2f}{1e3 * steps[int(0.95 * len(steps))]:8.2f}{(size + cache) * rate / 1e9:7.1f}"
                  f"{(size + cache) * rate / limit:9.0%}", flush=True)
        del model
    for name, peer in _peer(config).items() if config.parameters() < 1e9 else ():
        peer, seconds = peer.eval().to(device, torch.bfloat16), []
        for length, count in ((32, 1), (prompt, 1), (prompt, new)):
            tokens, start = torch.randint(config.vocab_size, (1, length), device=device), time.perf_counter()
            peer.generate(tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=count, max_new_tokens=count, do_sample=False)
            seconds.append(time.perf_counter() - start)
        print(f"bf16          1 by {name}: {prompt / seconds[1]:14,.0f}{(new - 1) / (seconds[2] - seconds[1]):13,.1f}")
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
    if args.preset:
        return show(args.preset, args.gpu_gb)
    if args.bench:
        config = dataclasses.replace(PRESETS[args.bench], **({"vocab_size": args.vocab_size} if args.vocab_size else {}))
        return bench(config, torch.float32 if args.dtype == "fp32" else torch.bfloat16)
    rows = [TITLES, *map(describe, PRESETS)]
    for row in rows:
        print("  ".join(cell.rjust(max(map(len, column))) if 0 < i < 9 else cell.ljust(max(map(len, column)))
                        for i, (cell, column) in enumerate(zip(row, zip(*rows)))).rstrip())


if __name__ == "__main__":
    import data
    data.command()(main)()

"""The decoder of every phi (and of Llama 3 and Gemma): shape, layers, cache, generation, tokenizers,
checkpoints.

Read it from top to bottom: Config -> Block -> Model.hidden -> KVCache -> Model.generate. One forward
serves training, prefill and decoding. Modules and parameters carry the names of Hugging Face's Phi-3, and
a run directory is a Hugging Face directory of its family, so there is no import or export step. `python
model.py` prints the presets.
"""
import argparse
import base64
import contextlib
import copy
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import time
import typing

import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

import kernels


# ---------------------------------------------------------------- shape

@dataclasses.dataclass
class Config:
    """The shape of a model. Lengths in tokens, widths in channels."""
    vocab_size: int
    max_seq_len: int
    n_layer: int
    d_model: int
    n_head: int
    n_kv_head: int
    d_ff: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    tie_embeddings: bool = False            # the output layer is the embedding
    model_type: str = "phi3"                # the family, a key of FAMILIES
    head_size: int | None = None            # channels of a head, where that is not d_model / n_head
    partial_rotary_factor: float = 1.0      # share of a head's channels that rotary positions turn
    window: int | None = None               # a token sees so many, itself included; None: all
    # LongRoPE (arXiv 2402.13753): a sequence up to the original length uses the short factors, a longer
    # one the long ones, one for each rotated pair of channels. cos and sin are multiplied by mscale (see
    # rope_mscale).
    original_max_seq_len: int | None = None
    short_factor: list | None = None
    long_factor: list | None = None
    short_mscale: float | None = None
    long_mscale: float | None = None
    # phi-3-small: muP multipliers, blocksparse attention, ids that are never predicted
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None   # q·k times this / head_dim instead of 1 / sqrt(head_dim)
    logit_divisor: float = 1.0
    sparse_block: int = 64                  # a block of so many tokens sees
    sparse_local: int = 16                  # so many blocks back, itself included,
    sparse_stride: int = 8                  # and one of so many older ones
    dense_every: int = 1                    # one of so many layers is dense; 1: all are
    dummy_tokens: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                _check_field(field, value)
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, not {self.model_type!r}")
        if not self.head_size and self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} must be a multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.rotary_dims % 2 or not 0 < self.rotary_dims <= self.head_dim:
            raise ValueError(f"{self.rotary_dims} of {self.head_dim} channels of a head would be rotated: "
                             f"it must be an even number (d_model {self.d_model})")
        if self.original_max_seq_len:
            for name in ("short_factor", "long_factor"):
                if len(getattr(self, name) or ()) != self.rotary_dims // 2:
                    raise ValueError(f"{name} must hold {self.rotary_dims // 2} numbers, "
                                     "one for each rotated pair")

    @property
    def family(self) -> "Family":
        return FAMILIES[self.model_type]

    @property
    def head_dim(self) -> int:
        return self.head_size or self.d_model // self.n_head

    @property
    def rotary_dims(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def blocksparse(self) -> tuple[int, int, int]:
        return self.sparse_block, self.sparse_local, self.sparse_stride

    def rope_mscale(self, long: bool) -> float:
        """LongRoPE's factor of cos and sin, by the paper's formula unless given."""
        given = self.long_mscale if long else self.short_mscale
        if given is not None:
            return given
        if not self.original_max_seq_len or self.max_seq_len <= self.original_max_seq_len:
            return 1.0
        stretch = self.max_seq_len / self.original_max_seq_len
        return math.sqrt(1 + math.log(stretch) / math.log(self.original_max_seq_len))

    def num_parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Model(self).parameters())

    def attention_flops(self) -> int:
        """Of the last token of a full context: q·k and weights·v, a multiplication and an addition each."""
        visible = min(self.max_seq_len, self.window or self.max_seq_len)
        return 4 * self.n_layer * self.n_head * self.head_dim * visible

    def kv_cache_bytes(self) -> int:
        """Keys and values of one token in 16 bits."""
        return 2 * 2 * self.n_layer * self.n_kv_head * self.head_dim


def _check_field(field: dataclasses.Field, value) -> None:
    """ValueError unless the value has the type of the field; numbers are positive, token ids 0 or more."""
    kind = (typing.get_args(field.type) or [field.type])[0]     # of int | None: int
    numbers = value if kind is list else [value]
    if kind in (bool, str):
        valid = isinstance(value, kind)
    else:
        types = (int,) if kind is int else (int, float)
        valid = isinstance(numbers, (list, tuple))
        valid = valid and all(type(number) in types and 0 <= number < math.inf for number in numbers)
        may_be_zero = field.type is list        # token ids
        valid = valid and (may_be_zero or all(numbers))
    if not valid:
        wanted = {bool: "True or False", str: "a text", list: "a list of positive numbers",
                  int: "a positive whole number", float: "a positive number"}
        raise ValueError(f"{field.name} must be {wanted[kind]}, not {value!r}")


# ---------------------------------------------------------------- families

@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of one family differ from Phi-3's, in the block and in the files of Hugging
    Face."""
    architecture: str               # the class in transformers
    names: dict                     # our module -> theirs, or several whose rows follow one another in ours
    fields: dict                    # Config field -> key of config.json, where it is not the one in FIELDS
    constants: dict                 # what config.json must say besides: another value there is another model
    activation: str = "swiglu"      # a function of kernels
    parallel: bool = False          # attention and MLP read the same norm and are added (GPT-J's block)
    layer_norm: bool = False        # LayerNorm with bias instead of RMSNorm
    bias: bool = False              # in all linear layers of the blocks
    head_bias: bool = False         # in the output layer
    norm_offset: float = 0.0        # Gemma stores the weights of its norms less one
    defaults: dict = dataclasses.field(default_factory=dict)   # Config fields that config.json may leave out


FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "rope_theta": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "original_max_seq_len": "original_max_position_embeddings",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
    "short_mscale": "attention_factor",
    "long_mscale": "attention_factor",
}
ROPE_SCALING_FIELDS = ("short_factor", "long_factor", "short_mscale", "long_mscale")
LLAMA_NAMES = {
    "self_attn.qkv_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "mlp.gate_up_proj": "mlp.gate_proj mlp.up_proj",
}
FAMILIES = {    # by config.json's model_type
    # phi-3-mini, 3.5-mini, 3-medium, 4, 4-mini
    "phi3": Family(
        "Phi3ForCausalLM", {}, {"window": "sliding_window"}, {"hidden_act": "silu", "attention_bias": False}),
    # phi-1, 1.5, 2
    "phi": Family(
        "PhiForCausalLM",
        {**LLAMA_NAMES, "self_attn.o_proj": "self_attn.dense", "mlp.gate_up_proj": "mlp.fc1",
         "mlp.down_proj": "mlp.fc2", "model.norm": "model.final_layernorm"},
        {"norm_eps": "layer_norm_eps"},
        {"hidden_act": "gelu_new", "qk_layernorm": False},
        activation="gelu", parallel=True, layer_norm=True, bias=True, head_bias=True,
        defaults={"partial_rotary_factor": 0.5}),
    # its files order the rows of qkv and of gate and up in their own way (_phi3small_rows)
    "phi3small": Family(
        "Phi3SmallForCausalLM",
        {"self_attn.qkv_proj": "self_attn.query_key_value", "self_attn.o_proj": "self_attn.dense",
         "mlp.gate_up_proj": "mlp.up_proj", "model.norm": "model.final_layernorm"},
        {"norm_eps": "layer_norm_epsilon", "d_ff": "ff_intermediate_size",
         "rope_theta": "rope_embedding_base", "short_mscale": "short_mscale", "long_mscale": "long_mscale",
         "embedding_multiplier": "mup_embedding_multiplier", "attention_multiplier": "mup_attn_multiplier",
         "logit_divisor": "mup_width_multiplier", "sparse_block": "blocksparse_block_size",
         "sparse_local": "blocksparse_num_local_blocks", "sparse_stride": "blocksparse_vert_stride",
         "dense_every": "dense_attention_every_n_layers", "dummy_tokens": "dummy_token_indices"},
        {"hidden_act": "gegelu", "gegelu_limit": 20.0, "mup_use_scaling": True, "attention_bias": False,
         "blocksparse_homo_head_pattern": False, "rope_position_scale": 1.0},
        activation="geglu_clamped", layer_norm=True, bias=True, defaults={"tie_embeddings": True}),
    "llama": Family(
        "LlamaForCausalLM", LLAMA_NAMES, {"head_size": "head_dim"},
        {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}),
    # multiplies the embedding by sqrt(d_model)
    "gemma": Family(
        "GemmaForCausalLM", LLAMA_NAMES, {"head_size": "head_dim"},
        {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False},
        activation="geglu", norm_offset=1.0, defaults={"tie_embeddings": True}),
}


# ---------------------------------------------------------------- presets

def _phi(n_layer: int, d_model: int, head_dim: int) -> Config:
    """phi-1, 1.5 and 2: all heads have keys of their own, 32 channels of each are rotated."""
    heads = d_model // head_dim
    return Config(51200, 2048, n_layer, d_model, heads, heads, 4 * d_model,
                  model_type="phi", partial_rotary_factor=32 / head_dim)


PHI_3_MINI = Config(32064, 4096, n_layer=32, d_model=3072, n_head=32, n_kv_head=32, d_ff=8192, window=2047)
# The 128k shapes have plain rotary positions here: the factors of released models come with their
# checkpoints, and grow.py searches new ones.
PHI_3_MINI_128K = dataclasses.replace(PHI_3_MINI, max_seq_len=131072, window=None)
PHI_3_SMALL = Config(
    100352, 8192, n_layer=32, d_model=4096, n_head=32, n_kv_head=8, d_ff=14336, rope_theta=1e6,
    tie_embeddings=True, model_type="phi3small", embedding_multiplier=10.0, attention_multiplier=1.0,
    logit_divisor=8.0, dense_every=2,
    dummy_tokens=[100256, *range(100258, 100261), 100264, 100265, *range(100267, 100352)])
PHI_4 = Config(100352, 16384, n_layer=40, d_model=5120, n_head=40, n_kv_head=10, d_ff=17920, rope_theta=2.5e5)
PRESETS = {
    "laptop": Config(1024, 512, n_layer=5, d_model=128, n_head=4, n_kv_head=2, d_ff=384),
    "baby": Config(65, 256, n_layer=6, d_model=384, n_head=6, n_kv_head=6, d_ff=1024),
    # to time decoding with
    "374m": Config(32064, 2048, n_layer=24, d_model=1024, n_head=16, n_kv_head=16, d_ff=2816),
    "phi-1-small": _phi(20, 1024, 64),
    "phi-1": _phi(24, 2048, 64),
    "phi-1.5": _phi(24, 2048, 64),
    "phi-2": _phi(32, 2560, 80),
    "phi-3-mini": PHI_3_MINI,
    "phi-3-mini-128k": PHI_3_MINI_128K,
    "phi-3.5-mini": PHI_3_MINI_128K,
    "phi-3-small": PHI_3_SMALL,
    "phi-3-small-128k": dataclasses.replace(PHI_3_SMALL, max_seq_len=131072),
    "phi-3-medium": dataclasses.replace(PHI_4, vocab_size=32064, max_seq_len=4096, rope_theta=1e4,
                                        window=2047),
    "phi-4": PHI_4,
    "phi-4-mini": dataclasses.replace(PHI_3_MINI_128K, vocab_size=200064, n_head=24, n_kv_head=8,
                                      tie_embeddings=True, partial_rotary_factor=0.75),
    "llama-3-8b": Config(128256, 8192, n_layer=32, d_model=4096, n_head=32, n_kv_head=8, d_ff=14336,
                         rope_theta=5e5, model_type="llama"),
    "gemma-2b": Config(256000, 8192, n_layer=18, d_model=2048, n_head=8, n_kv_head=1, d_ff=16384,
                       norm_eps=1e-6, tie_embeddings=True, model_type="gemma"),
}


# ---------------------------------------------------------------- layers

class Norm(nn.Module):
    """RMSNorm, or LayerNorm where the family has it."""

    def __init__(self, config: Config):
        super().__init__()
        self.eps = config.norm_eps
        self.offset = config.family.norm_offset
        self.weight = nn.Parameter(torch.full((config.d_model,), 1.0 - self.offset))
        self.bias = nn.Parameter(torch.zeros(config.d_model)) if config.family.layer_norm else None

    def forward(self, x, residual=None):
        """norm(x), or with a residual (norm(x + residual), x + residual)."""
        if self.bias is not None:
            return kernels.layer_norm(x, self.weight, self.bias, self.eps, residual)
        weight = self.weight.float() + self.offset if self.offset else self.weight
        return kernels.rms_norm(x, weight, self.eps, residual)


class Linear(nn.Linear):
    def reset_parameters(self):
        """Model draws all weights; drawing them here as well would be work done twice."""

    def forward(self, x):
        return kernels.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention: n_head queries share n_kv_head keys and values."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.split = (config.n_head, config.n_kv_head, config.n_kv_head)
        multiplier = config.attention_multiplier
        self.scale = config.head_dim ** -0.5 if multiplier is None else multiplier / config.head_dim
        self.blocksparse = config.blocksparse if (layer + 1) % config.dense_every else None
        bias = config.family.bias
        self.qkv_proj = Linear(config.d_model, sum(self.split) * config.head_dim, bias=bias)
        self.o_proj = Linear(config.n_head * config.head_dim, config.d_model, bias=bias)

    def forward(self, x, cos, sin, visible, cache=None):
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)
        q, k, v = qkv.split(self.split, dim=2)                  # (B, T, n_head or n_kv_head, head_dim)
        q, k = kernels.rotary(q, k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)               # (B, S, n_kv_head, head_dim)
        y = kernels.attention(q, k, v, self.scale, **visible)
        return self.o_proj(y.reshape(B, T, -1))                 # (B, T, n_head * head_dim) -> (B, T, d_model)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.activation = getattr(kernels, config.family.activation)
        gates = 1 if config.family.activation == "gelu" else 2
        self.gate_up_proj = Linear(config.d_model, gates * config.d_ff, bias=config.family.bias)
        self.down_proj = Linear(config.d_ff, config.d_model, bias=config.family.bias)

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = Norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = None if config.family.parallel else Norm(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, visible, cache=None):
        """x (B, T, d_model), the residual stream; cos and sin (B or 1, T, rotary_dims / 2); visible: what
        queries see of the keys, Model.visible."""
        h = self.input_layernorm(x)
        y = self.self_attn(h, cos, sin, visible, cache)
        if self.post_attention_layernorm is None:
            return x + y + self.mlp(h)
        h, x = self.post_attention_layernorm(y, residual=x)
        return x + self.mlp(h)


# ---------------------------------------------------------------- model

@functools.cache
@torch.inference_mode(False)
def _constant(values: tuple, device):
    """A tensor made once: a copy from the host cannot be captured in a CUDA graph. And outside of inference
    mode: what is made while generating must serve training too."""
    return torch.tensor(values, device=device)


class Model(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocab_size) float32."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.d_model,
                                      _weight=torch.empty(config.vocab_size, config.d_model)),
            layers=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            norm=Norm(config)))
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=config.family.head_bias)
        self.init_weights()
        self.tie_embeddings()

    @torch.no_grad()
    def init_weights(self):
        # 2 * n_layer projections write into the residual stream: its variance must not grow with depth
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, weight in self.named_parameters():
            if weight.is_meta:
                continue
            if weight.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=residual_std if is_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def tie_embeddings(self):
        if self.config.tie_embeddings and isinstance(self.lm_head, QuantizedLinear):
            self.model.embed_tokens = self.lm_head
        elif self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self):
        return self.model.norm.weight.device

    @property
    def dtype(self):
        """Of the residual stream and the cache. On a CPU a quantized model keeps float32 between its
        products."""
        if self.device.type == "cpu" and isinstance(self.lm_head, QuantizedLinear):
            return torch.float32
        return self.model.norm.weight.dtype

    def rotary(self, positions, lengths):
        """positions (B or 1, T), lengths (B or 1,) of the sequences -> cos, sin (B or 1, T, rotary_dims /
        2) float32.

        LongRoPE: a sequence longer than the original length turns by the long factors, each row by its
        own length.
        """
        config = self.config
        pairs = torch.arange(config.rotary_dims // 2, device=positions.device)[None]
        wavelength = config.rope_theta ** (pairs * 2 / config.rotary_dims)      # in positions, over 2 pi
        mscale = 1.0
        if config.original_max_seq_len:
            is_long = (lengths > config.original_max_seq_len)[:, None]
            factors = _constant((tuple(config.short_factor), tuple(config.long_factor)), positions.device)
            wavelength = wavelength * torch.where(is_long, factors[1], factors[0])
            mscale = torch.where(is_long, config.rope_mscale(long=True), config.rope_mscale(long=False))
            mscale = mscale[:, None]
        angles = positions[..., None] * (1 / wavelength)[:, None]               # (B or 1, T, rotary_dims / 2)
        return angles.cos() * mscale, angles.sin() * mscale

    def visible(self, positions, documents, cache, blocksparse) -> dict:
        """What queries at these positions (B or 1, T) see of the keys, as arguments of kernels.attention: the
        kernels take intervals, plain PyTorch a mask."""
        T = positions.shape[1]
        num_keys = T if cache is None else cache.end
        window = self.config.window
        if window and window >= num_keys:
            window = None
        kv_ranges = kernels.kv_ranges(positions, window, documents)
        if kernels.use_triton(positions):
            kv_len = None if cache is None else cache.lengths + T
            return {"kv_ranges": kv_ranges, "kv_len": kv_len, "blocksparse": blocksparse}
        heads = self.config.n_head
        return {"mask": kernels.attention_mask(positions, num_keys, kv_ranges, blocksparse, heads)}

    def embed(self, tokens):
        """(B, T) -> (B, T, d_model)."""
        config = self.config
        table = self.model.embed_tokens
        x = table.embed(tokens) if isinstance(table, QuantizedLinear) else table(tokens)
        is_autocast = torch.is_autocast_enabled(tokens.device.type)
        x = x.to(torch.get_autocast_dtype(tokens.device.type) if is_autocast else self.dtype)
        multiplier = config.d_model ** 0.5 if config.model_type == "gemma" else config.embedding_multiplier
        return x * multiplier if multiplier != 1 else x

    def hidden(self, tokens, documents=None, cache=None, num_tokens=None, active_layers=None):
        """Final normed states (B, T, d_model).

        documents (B, T) int: tokens of different documents in a row do not see each other. cache: the
        tokens continue its rows. num_tokens (B,): how many of them are real, where rows end in padding.
        active_layers: SkipDecode's number of layers that run, for all tokens or (B, T) for each its own.
        """
        config = self.config
        T = tokens.shape[1]
        positions = torch.arange(T, device=tokens.device)[None]                 # (1, T)
        lengths = torch.full((1,), T, device=tokens.device)
        if cache is not None:
            positions = positions + cache.lengths[:, None]                      # (B, T)
            lengths = cache.lengths + (T if num_tokens is None else num_tokens)
            cache.place(positions)
        elif T > config.max_seq_len:
            raise ValueError(f"{T} tokens do not fit the context of {config.max_seq_len}")
        x = self.embed(tokens)
        cos, sin = self.rotary(positions, lengths)
        patterns = {block.self_attn.blocksparse for block in self.model.layers}
        visible = {pattern: self.visible(positions, documents, cache, pattern) for pattern in patterns}
        for layer, block in enumerate(self.model.layers):
            if isinstance(active_layers, int) and 0 < layer <= config.n_layer - active_layers:
                continue
            # train.py may have compiled the block: with a cache, that would recompile at each length
            run = block if cache is None else functools.partial(Block.forward, block)
            y = run(x, cos, sin, visible[block.self_attn.blocksparse], cache)
            if torch.is_tensor(active_layers) and layer > 0:
                y = torch.where((active_layers > config.n_layer - layer)[..., None], y, x)
            x = y
        if cache is not None:
            cache.lengths.copy_(lengths)
        x = self.model.norm(x)
        return x / config.logit_divisor if config.logit_divisor != 1 else x

    def logits(self, x):
        """Final states (..., d_model) -> (..., vocab_size) float32."""
        logits = self.lm_head(x).float()
        if self.config.dummy_tokens:
            logits = logits.index_fill(-1, _constant(tuple(self.config.dummy_tokens), x.device), -math.inf)
        return logits

    def forward(self, tokens, documents=None, targets=None, weights=None, active_layers=None, cache=None):
        """Logits (B, T, V) float32, or with targets (B, T; -1 for none) the loss: (sum in nats, sum of
        weights).

        weights (B, T): of each target, 1 unless given. The rest as in hidden.
        """
        x = self.hidden(tokens, documents, cache, active_layers=active_layers)
        if targets is None:
            return self.logits(x)
        return kernels.cross_entropy(x, self.lm_head.weight, targets, weights, self.lm_head.bias)

    def prefill(self, texts: list[list[int]], cache, active_layers=None):
        """Read whole texts into the rows of an empty or used cache -> the last state of each, (B,
        d_model)."""
        # a few at a time: activations and scores would take more memory than the cache
        rows_at_once = max(1, 4096 // max(map(len, texts)))
        last = []
        for begin in range(0, len(texts), rows_at_once):
            part = texts[begin:begin + rows_at_once]
            rows = cache.rows(slice(begin, begin + len(part)))
            rows.lengths.zero_()
            num_tokens = torch.tensor([len(text) for text in part], device=self.device)
            tokens = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in part], batch_first=True)
            x = self.hidden(tokens.to(self.device), cache=rows, num_tokens=num_tokens,
                            active_layers=active_layers)
            last.append(x[torch.arange(len(part)), num_tokens - 1])     # (B, T, d_model) -> (B, d_model)
        return torch.cat(last)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
                 top_k: int = 0, top_p: float = 1.0, stop=None, seed=None, stream=None,
                 skip=None) -> list[list[int]]:
        """The new tokens of each prompt, up to and including one of `stop` (an id or several),
        max_new_tokens, or the end of the context. Prompts may differ in length.

        temperature 0 takes the likeliest token; top_k > 0 draws from that many likeliest, top_p < 1 from
        the fewest that hold that much probability. seed: a number, or one for each prompt: what a row
        draws does not depend on the other rows. stream(row, token) hears each new token and ends its row
        by returning True. skip: SkipDecode's (max_layers, min_layers[, decay_tokens = max_new_tokens]),
        see layers_at.
        """
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        self.check_prompts(prompts, skip)
        stop = {stop} if isinstance(stop, int) else set(stop or ())
        outputs = [[] for _ in prompts]
        limits = [min(max_new_tokens, self.config.max_seq_len - len(prompt)) for prompt in prompts]
        texts = {n: list(prompts[n]) for n, limit in enumerate(limits) if limit > 0}    # those that go on
        if not texts:
            return outputs
        rows = list(texts)      # whose text each row of the cache holds
        draws = uniform_draws(seed, len(prompts), max(limits))[rows].to(self.device)
        max_layers, min_layers, decay_tokens = (*skip, max_new_tokens)[:3] if skip else (None, None, None)
        capacity = max(len(text) + limits[n] for n, text in texts.items())
        cache = KVCache(self.config, len(rows), capacity, self.device, self.dtype)
        logits = self.logits(self.prefill(list(texts.values()), cache, max_layers))
        decode = DecodeStep(self, cache)
        for step in range(max(limits)):
            tokens = sample(logits, temperature, top_k, top_p, draws[:, step])
            for row, token in enumerate(tokens.tolist()):
                n = rows[row]
                if n not in texts:
                    continue
                outputs[n].append(token)
                texts[n].append(token)
                cancelled = stream is not None and stream(n, token)
                if cancelled or token in stop or len(outputs[n]) == limits[n]:
                    del texts[n]
                    cache.lengths[row] = 0      # computed along: from here on it stays within the capacity
            if not texts:
                break
            if len(texts) <= len(rows) * 7 // 8:    # rows leave in groups, as the cache is copied
                running = [row for row, n in enumerate(rows) if n in texts]
                cache = cache.rows(running)
                decode = DecodeStep(self, cache)
                tokens, draws = tokens[running], draws[running]
                rows = list(texts)
            logits = decode(tokens, layers_at(step, max_layers, min_layers, decay_tokens) if skip else None)
            for row, n in enumerate(rows):
                if n in texts and self.outgrows(len(texts[n])):
                    again = self.prefill([texts[n]], cache.rows(slice(row, row + 1)), max_layers)
                    logits[row] = self.logits(again)[0]
        return outputs

    def outgrows(self, length: int) -> bool:
        """Whether a text has just become longer than LongRoPE's original length: its older keys must turn
        by the long factors too, so it has to be read again."""
        return length - 1 == self.config.original_max_seq_len

    def check_prompts(self, prompts, skip=None) -> None:
        config = self.config
        for row, prompt in enumerate(prompts):
            fits = 0 < len(prompt) <= config.max_seq_len
            if not fits or not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
                raise ValueError(f"prompt {row} has {len(prompt)} tokens; it needs 1 to "
                                 f"{config.max_seq_len}, all in the vocabulary of {config.vocab_size}")
        if skip and not (2 <= skip[1] <= skip[0] <= config.n_layer and min(skip) > 0):
            raise ValueError(f"skip {':'.join(map(str, skip))} must be layers with 2 <= MIN <= MAX <= "
                             f"{config.n_layer}")


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# ---------------------------------------------------------------- cache

class KVCache:
    """Keys and values of all layers, allocated once and written in place: row b holds lengths[b] tokens.

    lengths (batch,) is a tensor on the device, so that a step over the cache can be captured in a CUDA graph.
    """

    def __init__(self, config: Config, batch: int, capacity: int, device, dtype):
        if capacity > config.max_seq_len:
            raise ValueError(f"{capacity} tokens do not fit the context of {config.max_seq_len}")
        shape = (config.n_layer, batch, capacity, config.n_kv_head, config.head_dim)
        # zeros: what a row does not see must still be finite
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.long)
        self.slots = None       # where the next tokens are written, (batch * T,), and
        self.end = 0            # how many columns are looked at; see place

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def place(self, positions) -> None:
        """Make ready for new tokens at these positions, (batch, T), within the capacity."""
        first_slots = torch.arange(len(positions), device=positions.device) * self.capacity
        self.slots = (positions + first_slots[:, None]).flatten()
        self.end = self.capacity
        # On CUDA all columns are looked at: reading a length would wait for the device, and a graph needs
        # fixed shapes. The kernels stop at each row's own length.
        if positions.device.type != "cuda":
            self.end = int(positions[:, -1].max()) + 1
            if self.end > self.capacity:
                raise ValueError(f"{self.end} tokens do not fit the cache of {self.capacity}")

    def update(self, layer: int, k, v):
        """Write k, v (batch, T, n_kv_head, head_dim) of the new tokens -> all keys and values so far."""
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            stored.flatten(0, 1).index_copy_(0, self.slots, new.flatten(0, 1).to(stored.dtype))
        return self.keys[layer, :, :self.end], self.values[layer, :, :self.end]

    def rows(self, index) -> "KVCache":
        """These rows: of a slice in the same memory, of a list a copy."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, index], self.values[:, index]
        part.lengths = self.lengths[index]
        return part


class DecodeStep:
    """The next token of each row of a cache: tokens (B,) -> logits (B, vocab_size).

    On a GPU the step is captured in a CUDA graph for each number of layers: a replay is one launch instead of
    hundreds. The captured step reads its tokens and writes its logits in fixed places.
    """

    def __init__(self, model: Model, cache: KVCache):
        self.model = model
        self.cache = cache
        self.graphs = {}
        self.memory_pool = None

    def run(self, tokens, active_layers=None):
        x = self.model.hidden(tokens[:, None], cache=self.cache, active_layers=active_layers)
        return self.model.logits(x[:, -1])

    def capture(self, tokens, active_layers):
        tokens = tokens.clone()
        lengths = self.cache.lengths.clone()
        stream = torch.cuda.Stream(tokens.device)
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(stream):
            self.run(tokens, active_layers)         # compiles and autotunes, which must not be captured
        torch.cuda.current_stream(tokens.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory_pool):
            logits = self.run(tokens, active_layers)
        self.memory_pool = graph.pool()
        # the warm-up went one token ahead; the replay writes the same key and value again
        self.cache.lengths.copy_(lengths)
        return graph, tokens, logits

    def __call__(self, tokens, active_layers=None):
        if tokens.device.type != "cuda":
            return self.run(tokens, active_layers)
        if active_layers not in self.graphs:
            self.graphs[active_layers] = self.capture(tokens, active_layers)
        graph, static_tokens, logits = self.graphs[active_layers]
        static_tokens.copy_(tokens)
        graph.replay()
        return logits


# ---------------------------------------------------------------- sampling

def check_sampling(max_new_tokens, temperature, top_k, top_p) -> None:
    if max_new_tokens < 1 or not 0 <= temperature <= 1e9 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be 1 or more, temperature {temperature} and "
                         f"top_k {top_k} 0 or more, top_p {top_p} above 0 and at most 1")


def sampling_probs(logits, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """(B, V) logits -> (B, V) probabilities that tokens are drawn with, for a temperature above 0."""
    logits = logits - logits.amax(-1, keepdim=True)         # the likeliest is 0 at any temperature
    logits = logits / max(temperature, 1e-6)
    if 0 < top_k < logits.shape[-1]:
        values, tokens = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(-1, tokens, values)
    probs = logits.softmax(-1)
    if top_p == 1:
        return probs
    ordered, tokens = probs.sort(-1, descending=True)
    likelier = ordered.cumsum(-1) - ordered                 # what the tokens before hold together
    ordered = ordered.masked_fill(likelier >= top_p, 0.0)
    return torch.zeros_like(probs).scatter(-1, tokens, ordered / ordered.sum(-1, keepdim=True))


def sample(logits, temperature: float, top_k: int, top_p: float, draws):
    """(B, V) logits and (B,) uniform draws from [0, 1) -> (B,) tokens."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = sampling_probs(logits, temperature, top_k, top_p).cumsum(-1)
    draws = draws[:, None].clamp(max=1 - 2 ** -24)      # rounding may have made 1 of what is just below
    threshold = draws * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


def uniform_draws(seed, rows: int, count: int):
    """(rows, count) numbers from [0, 1). Each row has a generator of its own: of its own seed, or of one
    seed for all and its number."""
    if seed is None:
        seed = int(torch.randint(2 ** 62, ()))      # from torch's own state, which torch.manual_seed sets
    if isinstance(seed, int):
        seed = [hash((seed, row)) for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds for {rows} prompts: give one for all, or one for each")
    generators = [torch.Generator().manual_seed(int(row_seed)) for row_seed in seed]
    draws = [torch.rand(count, generator=generator, device="cpu") for generator in generators]
    return torch.stack(draws)


# ---------------------------------------------------------------- SkipDecode

# SkipDecode (arXiv 2307.02628): a later token runs fewer layers, the first one and the last ones. What a
# smaller number runs has run for every earlier token, so no key or value is ever missing.

def layers_at(n, max_layers: int, min_layers: int, decay_tokens: int):
    """How many layers the n-th generated token runs (a number or a tensor): falling linearly over
    decay_tokens."""
    layers = max_layers - (max_layers - min_layers) * n / decay_tokens
    if torch.is_tensor(n):
        return layers.round().clamp(min_layers, max_layers).long()
    return min(max(round(layers), min_layers), max_layers)


def layers_of_targets(documents, weights, schedule: tuple[int, int, int]):
    """(B, T) layers that each input runs in finetuning. The heaviest targets are what will be generated.

    documents (B, T) as in Model.hidden, weights (B, T) of the targets.
    """
    is_first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    heavy = weights > 0.5 * weights.amax().clamp(min=1e-9)
    generated = F.pad(heavy[:, :-1], (1, 0)) & ~is_first            # inputs that were targets one step before
    count = generated.cumsum(1)
    count = count - torch.where(is_first, count, 0).cummax(1).values    # less those of earlier documents
    return layers_at(torch.where(generated, count - 1, 0), *schedule)


def parse_skip(text: str) -> tuple[int, ...]:
    """MAX:MIN or MAX:MIN:TOKENS -> numbers."""
    if re.fullmatch(r"\d+:\d+(:[1-9]\d*)?", text):
        numbers = tuple(map(int, text.split(":")))
        if 2 <= numbers[1] <= numbers[0]:
            return numbers
    raise argparse.ArgumentTypeError(f"{text!r}: give MAX:MIN or MAX:MIN:TOKENS, the layers of the first and "
                                     "of the last new token, 2 or more, such as 24:8")


# ---------------------------------------------------------------- quantization

class QuantizedLinear(nn.Module):
    """A linear layer, or an embedding, with weights of 4 or 8 bits: kernels.quantize."""

    def __init__(self, rows: int, width: int, bits: int, group: int, bias=None):
        super().__init__()
        self.bits = bits
        self.bias = bias
        self.register_buffer("qweight", torch.empty(rows, width * bits // 8, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(rows, width // group, dtype=torch.bfloat16))
        self.register_buffer("zero", torch.empty(rows, width // group, dtype=torch.bfloat16))

    @property
    def weight(self):
        return kernels.dequantize(self.qweight, self.scale, self.zero, self.bits)

    def embed(self, tokens):
        rows = (part[tokens.flatten()] for part in (self.qweight, self.scale, self.zero))
        return kernels.dequantize(*rows, self.bits).view(*tokens.shape, -1)

    @functools.cached_property
    def cpu_pack(self):
        """The same once more, as ATen's products for few rows want it."""
        return kernels.pack_for_cpu(self.qweight, self.scale, self.zero, self.bits)

    def forward(self, x):
        cpu_pack = self.cpu_pack if x.device.type == "cpu" else None
        y = kernels.quantized_linear(x, self.qweight, self.scale, self.zero, self.bits, cpu_pack)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def quantize(model: Model, bits: int) -> Model:
    """Hold the matrices of the blocks in 4 or 8 bits and the output layer (a tied embedding with it) in
    8, in place; biases, norms and a separate embedding stay as they are. Of 4 bits, groups of 64 weights
    share a scale and a zero, or of the largest power of two that divides the row; of 8 bits, whole rows
    do."""
    if bits not in (4, 8):
        raise ValueError(f"weights have 4 or 8 bits, not {bits}")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("this model is quantized already: start from the original weights")
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear):
            continue
        rows, width = module.weight.shape
        layer_bits = 8 if name == "lm_head" else bits
        group = math.gcd(width, 64) if layer_bits == 4 else width
        if math.gcd(width, 64) < 8:
            raise ValueError(f"{name} has rows of {width} weights; only multiples of 8 can be quantized")
        small = QuantizedLinear(rows, width, layer_bits, group, module.bias)
        if not module.weight.is_meta:
            small.qweight, small.scale, small.zero = kernels.quantize(module.weight, small.bits, group)
        model.set_submodule(name, small)
    model.tie_embeddings()
    return model.eval()


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
            vocab = {gpt2_text(token): i for token, i in self.ranks.items()}
            # tiktoken merges whatever two parts make a token, so each way to cut a token in two is a merge.
            merges = [[gpt2_text(token[:n]), gpt2_text(token[n:])]
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
        path = snapshot_download(name, weights=False)
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


def gpt2_text(token):
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
    """`write(file)` fills a file beside, which then takes the place of `path` at once."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path: str, value) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: str):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it may be truncated: restore it or make it "
                         "again") from error


# ---------------------------------------------------------------- safetensors

# u64 length of the header, the header as JSON padded with spaces to 8 bytes, then the tensors without gaps
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool}


def write_safetensors(path: str, tensors: dict, gather=lambda tensor: tensor) -> None:
    """gather(tensor) -> the whole of it; asked one by one as they are written, so that a sharded model is
    never in one place."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = gather(tensor).detach().cpu().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
    write_atomically(path, write)


def read_safetensors(path: str) -> dict[str, torch.Tensor]:
    """Tensors that map the file: nothing is read before it is used, and writing into them leaves the file
    alone."""
    tensors = {}
    try:
        size = os.path.getsize(path)
        data = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
        start = 8 + int.from_bytes(data[:8].tolist(), "little")
        if start > size:
            raise ValueError("its header reaches beyond the end")
        header = json.loads(data[8:start].numpy().tobytes())
        header.pop("__metadata__", None)
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            begin, stop = entry["data_offsets"]
            if begin != end or start + stop > size:
                raise ValueError(f"{name} overlaps another tensor or reaches beyond the end")
            end = stop
            part = data[start + begin:start + end]
            if (start + begin) % dtype.itemsize:
                part = part.clone()     # a view must be aligned
            tensors[name] = part.view(dtype).view(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); it may be truncated: "
                         "restore it or make it again") from error
    return tensors


# ---------------------------------------------------------------- hub

def download(url: str, path: str, headers=None) -> None:
    """Fetch url into path, which appears only when it is whole. What was cut, now or in an earlier call, goes
    on from path.part. FileNotFoundError, PermissionError or OSError when it cannot be had."""
    import requests
    part = path + ".part"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    problem = "cut again and again"
    for attempt in range(5):
        time.sleep(min(attempt, 3))
        try:
            if _download_rest(url, part, headers or {}):
                os.replace(part, path)
                return
        except requests.RequestException as error:
            problem = type(error).__name__
    raise OSError(f"{url} cannot be fetched ({problem}): go online, set HF_ENDPOINT to a mirror, or give a "
                  "directory")


def _download_rest(url: str, part: str, headers) -> bool:
    """Append to the file `part` what is missing -> whether it is whole."""
    import requests
    from tqdm import tqdm
    received = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"Accept-Encoding": "identity", **headers}
    if received:
        headers["Range"] = f"bytes={received}-"
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        if answer.status_code == 404:
            raise FileNotFoundError(f"{url} does not exist: check the spelling")
        if answer.status_code in (401, 403):
            raise PermissionError(f"{url} is not given away without permission: check the spelling, or "
                                  "accept the licence there and set HF_TOKEN")
        if answer.status_code == 416:       # what we have is of another, longer file
            os.remove(part)
            return False
        answer.raise_for_status()
        if answer.status_code != 206:       # the whole file, not its rest
            received = 0
        length = answer.headers.get("Content-Length")
        total = received + int(length) if length else None
        bar = tqdm(desc=part, initial=received, total=total, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if received else "wb") as file, bar:
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or os.path.getsize(part) == total


def snapshot_download(path_or_name, weights: bool = True) -> str:
    """A local path as it is; for a hub name (owner/model or owner/model@revision) the directory of that
    model in the cache, fetched where it is not there yet. A second call asks nobody.

    HF_ENDPOINT: a mirror; HF_TOKEN: for gated models; MINPHI_CACHE: the cache (~/.cache/minphi unless
    set).
    """
    name = str(path_or_name)
    owner = name.split("/")[0]
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w-][\w.-]*)?", name)
    # a mistyped local path is no hub name: nothing called `owner` is here, nor is it one of our folders
    if not is_hub_name or os.path.exists(name) or os.path.exists(owner) or owner in ("runs", "data"):
        return name
    cache = os.environ.get("MINPHI_CACHE") or os.path.expanduser("~/.cache/minphi")
    folder = os.path.join(cache, name)
    repository, _, revision = name.partition("@")
    revision = revision or "main"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else None
    wanted = r"config\.json|tokenizer\.json|tokenizer_config\.json|chat_template\.jinja|.*\.tiktoken"
    if weights:
        wanted += r"|model[^/]*\.safetensors(\.index\.json)?"

    def fetch(url: str, file: str) -> str:
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            download(f"{endpoint}/{url}", path, headers)
        return path

    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w") as lock:      # several ranks ask at once
        with contextlib.suppress(ImportError):
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)
        listing = fetch(f"api/models/{repository}/revision/{revision}", ".files")
        for entry in read_json(listing)["siblings"]:
            file = entry["rfilename"]
            if re.fullmatch(wanted, file):
                fetch(f"{repository}/resolve/{revision}/{file}", file)
    return folder


# ---------------------------------------------------------------- checkpoints

def hf_names(config: Config, name: str) -> list[str]:
    """Our parameter -> the tensors of the family's files that make it up, rows one after another.

    Example: model.layers.3.self_attn.qkv_proj.weight of Llama -> its q_proj, k_proj and v_proj.
    """
    module, kind = name.rsplit(".", 1)
    for ours, theirs in config.family.names.items():
        if module.endswith(ours):
            return [f"{module.removesuffix(ours)}{part}.{kind}" for part in theirs.split()]
    return [name]


def split_rows(config: Config, tensor, parts: int):
    """Rows of a parameter -> as they are, gate and up, or q, k and v."""
    if parts == 3:
        heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        return tensor.split([count * config.head_dim for count in heads])
    return tensor.chunk(parts)


def _phi3small_rows(config: Config, name: str):
    """Which of our rows (q, k, v; gate, up) each row of phi-3-small's files is, or None where the order
    is ours. Theirs go key/value head by key/value head, each with its queries, and gate and up by turns."""
    if config.model_type == "phi3small" and ".gate_up_proj." in name:
        return torch.arange(2 * config.d_ff).view(2, -1).T.flatten()
    if config.model_type == "phi3small" and ".qkv_proj." in name:
        rows = torch.arange((config.n_head + 2 * config.n_kv_head) * config.head_dim)
        by_head = [part.view(config.n_kv_head, -1) for part in split_rows(config, rows, 3)]
        return torch.cat(by_head, 1).flatten()
    return None


def stored_parameters(model: Model) -> dict[str, torch.Tensor]:
    """What files hold of a model: a tied embedding once."""
    tensors = model.state_dict()
    if model.config.tie_embeddings:
        for name in ("weight", "qweight", "scale", "zero"):
            tensors.pop(f"lm_head.{name}", None)
    return tensors


def to_hf(model: Model) -> dict[str, torch.Tensor]:
    """The weights under the names and in the order of the family's files."""
    tensors = {}
    for name, tensor in stored_parameters(model).items():
        names = hf_names(model.config, name)
        order = _phi3small_rows(model.config, name)
        if order is not None:
            tensor = tensor[order.to(tensor.device)]
        tensors.update(zip(names, split_rows(model.config, tensor, len(names))))
    return tensors


def save(model: Model, tokenizer, path: str, tensors=None, gather=lambda tensor: tensor) -> None:
    """Write a Hugging Face directory of the model's family; each file replaces its predecessor at once.
    tensors and gather: of write_safetensors, where the weights are not in one place."""
    config = model.config
    path = str(path)
    token_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model's vocab_size is "
                             f"{config.vocab_size}: make it larger")
        bos = (tokenizer.bos or [tokenizer.eot])[0]
        token_ids = {"bos_token_id": bos, "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot}
        ends = [tokenizer.eot, *sorted(tokenizer.stops - {tokenizer.eot})]
        write_json(os.path.join(path, "generation_config.json"), {**token_ids, "eos_token_id": ends})
        tokenizer.save(path)
    write_json(os.path.join(path, "config.json"), {**config_json(model), **token_ids})
    tensors = to_hf(model) if tensors is None else tensors
    write_safetensors(os.path.join(path, "model.safetensors"), tensors, gather)


def config_json(model: Model) -> dict:
    config = model.config
    if config.model_type == "phi3small" and config.original_max_seq_len:    # its code wants them spelled out
        config = dataclasses.replace(config, short_mscale=config.rope_mscale(long=False),
                                     long_mscale=config.rope_mscale(long=True))
    keys = {**FIELDS, **config.family.fields}
    for field in dataclasses.fields(Config):
        is_default = getattr(config, field.name) in (field.default, [])
        if field.name not in keys and field.name != "model_type" and not is_default:
            raise ValueError(f"a config.json of {config.model_type} has no place for {field.name}")
    values = {key: getattr(config, field) for field, key in keys.items() if field not in ROPE_SCALING_FIELDS}
    rope_scaling = {"type": "longrope"}
    for field in ROPE_SCALING_FIELDS:
        if getattr(config, field) is not None:
            rope_scaling[keys[field]] = getattr(config, field)
    source = {
        "architectures": [config.family.architecture],
        "model_type": config.model_type,
        **config.family.constants,
        **values,
        "original_max_position_embeddings": config.original_max_seq_len or config.max_seq_len,
        "rope_scaling": rope_scaling if config.original_max_seq_len else None,
        "head_dim": config.head_dim,
        "torch_dtype": str(model.model.norm.weight.dtype).removeprefix("torch."),
    }
    quantized = [module.bits for module in model.modules() if isinstance(module, QuantizedLinear)]
    if quantized:
        source["quantization_config"] = {"quant_method": "minphi", "bits": min(quantized)}
    return source


def read_config(file: str) -> Config:
    """A config.json of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"no model at {os.path.dirname(file)} (config.json is missing): make one "
                                "with python train.py, or give a hub name")
    source = read_json(file)
    if not isinstance(source, dict):
        raise ValueError(f"{file} is not a model's configuration")
    model_type = source.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{file} has model_type {model_type!r}; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    keys = {**FIELDS, **family.fields}
    rope = {**(source.get("rope_scaling") or {}), **(source.get("rope_parameters") or {})}
    flat = {**source, **rope}
    values = {"n_kv_head": flat.get(keys["n_head"]), **family.defaults}
    values.update((field, flat[key]) for field, key in keys.items() if flat.get(key) is not None)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type in ("longrope", "su", "yarn") and "short_factor" in values and "long_factor" in values:
        values.setdefault("original_max_seq_len", values["max_seq_len"])
        rope_type = "default"
    else:
        for field in (*ROPE_SCALING_FIELDS, "original_max_seq_len"):
            values.pop(field, None)
    for key, wanted in {"rope_type": "default", **family.constants}.items():
        value = rope_type if key == "rope_type" else source.get(key, wanted)
        is_older_name = model_type == "gemma" and value in ("gelu", None)
        if value != wanted and not is_older_name:
            raise ValueError(f"{file} has {key} {value!r}; only {wanted!r} is supported")
    try:
        config = Config(model_type=model_type, **values)
        if config.head_size and config.head_size * config.n_head == config.d_model:
            config.head_size = None
        return config
    except (TypeError, ValueError) as error:        # a TypeError names what is lacking
        raise ValueError(f"{file}: {error}") from error


def open_weights(folder: str) -> dict[str, torch.Tensor]:
    path = os.path.join(folder, "model.safetensors")
    if os.path.isfile(path):
        return read_safetensors(path)
    if not os.path.isfile(f"{path}.index.json"):
        raise FileNotFoundError(f"{folder} has no model.safetensors, single or in shards")
    tensors = {}
    for shard in sorted(set(read_json(f"{path}.index.json")["weight_map"].values())):
        tensors.update(read_safetensors(os.path.join(folder, shard)))
    return tensors


def load(path_or_name: str, device=None, dtype: torch.dtype | None = None):
    """Open a run, a Hugging Face directory of a family in FAMILIES, or a hub name -> the model in eval
    mode and its tokenizer (None if it has none). dtype: as stored unless given."""
    path = snapshot_download(path_or_name)
    config_file = os.path.join(path, "config.json")
    if path in PRESETS and not os.path.isfile(config_file):
        raise ValueError(f"{path} is a shape without weights; give the directory of a trained model, or a "
                         "hub name such as microsoft/phi-1_5")
    config = read_config(config_file)
    quantization = read_json(config_file).get("quantization_config") or {}
    with torch.device("meta"):
        model = Model(config)
        if quantization.get("quant_method") == "minphi":
            quantize(model, quantization.get("bits"))
    stored = open_weights(path)
    for name in list(stored):
        is_copy = config.tie_embeddings and name == "lm_head.weight"
        if is_copy or name.endswith("rotary_emb.inv_freq"):     # follows from the config
            del stored[name]
    expected = stored_parameters(model)
    sources = {name: hf_names(config, name) for name in expected}
    missing = sorted(set().union(*sources.values()) - stored.keys())
    surplus = sorted(stored.keys() - set().union(*sources.values()))
    if missing or surplus:
        raise ValueError(f"{path} does not hold the model that its config.json describes: "
                         f"{len(missing)} tensors are missing {missing[:3]}, "
                         f"{len(surplus)} are not part of it {surplus[:3]}")
    dtype = dtype or stored[sources["model.norm.weight"][0]].dtype
    weights = {}
    for name, like in expected.items():     # one by one: no two copies of all in memory
        parts = [stored.pop(part) for part in sources[name]]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if tensor.shape != like.shape:
            raise ValueError(f"{path}: {sources[name]} have shape {tuple(tensor.shape)}; config.json wants "
                             f"{tuple(like.shape)}")
        order = _phi3small_rows(config, name)
        if order is not None:
            tensor = tensor[order.argsort()]
        is_quantized = name.endswith((".qweight", ".scale", ".zero"))
        weights[name] = tensor.to(device or default_device(), like.dtype if is_quantized else dtype)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_embeddings()
    model.requires_grad_(True).eval()
    try:
        return model, Tokenizer.load(path)
    except FileNotFoundError:
        return model, None


# ---------------------------------------------------------------- table of presets

# how much the papers trained on: the steps of train.py --preset
TRAINING_TOKENS = {"phi-1": 50e9, "phi-1.5": 150e9, "phi-2": 1.4e12, "phi-3-mini": 3.3e12,
                   "phi-3-small": 4.8e12, "phi-3-medium": 4.8e12, "phi-4": 10e12, "phi-4-mini": 5e12,
                   "llama-3-8b": 15e12}


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the presets: size and cost.", allow_abbrev=False)
    parser.parse_args()
    print("                                   GFLOPs/token       KV bytes      GB     GB     GB\n"
          "preset                 parameters  + full context     /token    bf16   int8   int4")
    for name, config in PRESETS.items():
        n = config.num_parameters()
        print(f"{name:17}{n:16,}{2 * n / 1e9:9.3f} +{config.attention_flops() / 1e9:7.3f}"
              f"{config.kv_cache_bytes():10,}{n * 2 / 1e9:8.3f}{n / 1e9:7.3f}"
              f"{n * 4.5 / 8e9:7.3f}")       # in int4, 64 weights share 32 bits


if __name__ == "__main__":
    import data
    data.command()(main)()

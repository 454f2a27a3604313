"""The decoder of the phi family in Phi-3's shape, its presets, KV cache and generation, its tokenizer, and checkpoints.

Pre-RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases (Phi-3, arXiv 2404.14219). A run directory is a
Hugging Face Phi-3 directory, so there is no import or export step. `python model.py` prints the presets.
"""
import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import time

import numpy as np
import tiktoken
import torch
from torch import nn

import kernels


# ---------------------------------------------------------------- shape

@dataclasses.dataclass
class Config:
    """The shape of a model. Sizes in tokens (vocab_size, context), layers, channels (d_model, d_ff) and heads."""
    vocab_size: int
    context: int
    n_layer: int
    d_model: int
    n_head: int
    n_kv_head: int
    d_ff: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    tied: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "context", "n_layer", "d_model", "n_head", "n_kv_head", "d_ff"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
        for name in ("rope_theta", "norm_eps"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)!r}")
        if self.d_model % (2 * self.n_head):
            raise ValueError(f"d_model {self.d_model} must be an even multiple of n_head {self.n_head} (rotary positions turn pairs of channels)")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    def parameters(self) -> int:
        attention = (2 * self.n_head + 2 * self.n_kv_head) * self.head_dim * self.d_model
        layer = attention + 3 * self.d_ff * self.d_model + 2 * self.d_model
        return (1 if self.tied else 2) * self.vocab_size * self.d_model + self.n_layer * layer + self.d_model

    def attention_flops(self) -> int:
        """Of the last token of a full context: two products with `context` keys and values per head, two operations each."""
        return 4 * self.n_layer * self.d_model * self.context

    def cache_bytes(self) -> int:
        """Keys and values of one token in 16 bits."""
        return 2 * 2 * self.n_layer * self.n_kv_head * self.head_dim


PRESETS = {
    "laptop": Config(vocab_size=1024, context=512, n_layer=5, d_model=128, n_head=4, n_kv_head=2, d_ff=384),
    "baby": Config(vocab_size=65, context=256, n_layer=6, d_model=384, n_head=6, n_kv_head=6, d_ff=1024),
    "phi-3-mini": Config(vocab_size=32064, context=4096, n_layer=32, d_model=3072, n_head=32, n_kv_head=32, d_ff=8192),
    "phi-3-medium": Config(vocab_size=32064, context=4096, n_layer=40, d_model=5120, n_head=40, n_kv_head=10, d_ff=17920),
    "phi-4": Config(vocab_size=100352, context=16384, n_layer=40, d_model=5120, n_head=40, n_kv_head=10, d_ff=17920, rope_theta=2.5e5),
}


# ---------------------------------------------------------------- model

def rotary_tables(config: Config, device=None):
    """cos and sin of every position's angles, (context, head_dim) each; sin's first half is negated, as kernels.rotary wants it."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(config.context, device=device, dtype=torch.float32)[:, None] * frequency   # (context, D/2)
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return kernels.rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    """Attention and feed-forward, each read from a normed copy of the residual stream x and added to it."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.qkv = nn.Linear(config.d_model, (config.n_head + 2 * config.n_kv_head) * config.head_dim, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None):
        """x (B, T, d_model); cos, sin, mask as kernels.rotary and kernels.attention want them; without a mask attention is causal.

        cache: (keys, values, past): the new columns are written in place from `past` on, and all columns so far are attended to.
        """
        B, T, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, T, self.heads + 2 * self.kv_heads, self.head_dim)
        qkv = qkv.transpose(1, 2)                                                  # (B, T, H + 2Hkv, D) -> (B, H + 2Hkv, T, D)
        qk = kernels.rotary(qkv[:, :self.heads + self.kv_heads], cos, sin)
        q, k, v = qk[:, :self.heads], qk[:, self.heads:], qkv[:, self.heads + self.kv_heads:]
        if cache is not None:
            keys, values, past = cache
            keys[:, :, past:past + T], values[:, :, past:past + T] = k, v
            k, v = keys[:, :, :past + T], values[:, :, :past + T]                  # (B, Hkv, T, D) -> (B, Hkv, past + T, D)
        y = kernels.attention(q, k, v, mask, causal=mask is None and T > 1)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))                      # (B, H, T, D) -> (B, T, H·D)
        return x + self.down(kernels.swiglu(self.gate_up(self.mlp_norm(x))))


class Cache:
    """Keys and values of all layers, preallocated and written in place; `length` columns are used.

    Prompts of different lengths are padded on the left: row b's text begins at column starts[b], and its positions count from there.
    """

    def __init__(self, config: Config, starts: list[int], capacity: int, device, dtype):
        shape = (len(starts), config.n_kv_head, capacity, config.head_dim)
        self._set([(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))
                   for _ in range(config.n_layer)], torch.tensor(starts, device=device), 0)

    def _set(self, layers, starts, length: int) -> None:
        self.layers, self.starts, self.length, self.padded = layers, starts, length, bool(starts.any())

    def part(self, begin: int, end: int) -> "Cache":
        """A cache of rows begin to end that shares this one's memory."""
        part = object.__new__(Cache)
        part._set([(k[begin:end], v[begin:end]) for k, v in self.layers], self.starts[begin:end], self.length)
        return part

    def keep(self, slots: list[int]) -> None:
        """Drop the other rows, and the columns that were padding in all that stay."""
        index = torch.tensor(slots, device=self.starts.device)
        starts = self.starts[index]
        unused = int(starts.min())
        self._set([(k[index, :, unused:], v[index, :, unused:]) for k, v in self.layers], starts - unused, self.length - unused)


class Model(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocab_size) float32."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # what writes into the residual stream starts smaller, so that its variance does not grow with depth
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith(("out.weight", "down.weight")) else 0.02)
        if config.tied:
            self.head.weight = self.embed.weight

    def hidden(self, tokens, documents=None, cache: Cache | None = None):
        """Final normed states (B, T, d_model)."""
        T, past = tokens.shape[1], 0 if cache is None else cache.length
        if T + past > self.config.context and (cache is None or not cache.padded):
            raise ValueError(f"{T + past} tokens do not fit the context of {self.config.context}")
        x = self.embed(tokens)                                                     # (B, T) -> (B, T, d_model)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin, mask = self.cos[past:past + T], self.sin[past:past + T], None    # (T, D)
        if documents is not None:  # a token sees earlier ones of its own document
            mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()                    # (B, 1, T, T)
        if cache is None:
            for block in self.layers:
                x = block(x, cos, sin, mask)
            return self.norm(x)
        if cache.padded:
            columns = torch.arange(past + T, device=tokens.device)
            positions = (columns[past:] - cache.starts[:, None]).clamp(0, self.config.context - 1)        # (B, T)
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)                 # (B, 1, T, D)
            mask = columns >= cache.starts[:, None, None, None]                                           # (B, 1, 1, past + T)
            if T > 1:  # padding sees itself, since a softmax over nothing is not a number
                mask = (mask | (columns == columns[past:, None])) & (columns <= columns[past:, None])     # (B, 1, T, past + T)
        for block, (keys, values) in zip(self.layers, cache.layers):
            x = block.forward(x, cos, sin, mask, (keys, values, past))  # not block(...): a block compiled for training would recompile
        cache.length += T
        return self.norm(x)

    def forward(self, tokens, documents=None, targets=None, weights=None, cache: Cache | None = None):
        """Logits (B, T, V) float32, or with targets (B, T; -1 for none) the loss: (sum in nats, sum of weights).

        documents (B, T) int: tokens of different documents in a row do not see each other; weights (B, T): of each target.
        """
        x = self.hidden(tokens, documents, cache)
        return self.head(x).float() if targets is None else kernels.cross_entropy(x, self.head.weight, targets, weights)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 stop=None, seed: int | None = None, stream=None) -> list[list[int]]:
        """The new tokens of each prompt, up to and including one of `stop` (an id or several), max_new_tokens, or the context's end.

        temperature 0 takes the likeliest token; otherwise top_k > 0 draws from that many likeliest, top_p < 1 from the fewest that
        hold that much probability. stream(row, token) is called for each new token and ends its row by returning True. Prompts may
        differ in length; rows that have ended leave the batch.
        """
        context, device = self.config.context, self.embed.weight.device
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        for row, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= context:
                raise ValueError(f"prompt {row} has {len(prompt)} tokens; it needs at least one and the context holds {context}")
            if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise ValueError(f"prompt {row} has a token outside the vocabulary of {self.config.vocab_size}; was it made with another tokenizer?")
        stop = frozenset() if stop is None else frozenset([stop] if isinstance(stop, int) else stop)
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        outputs = [[] for _ in prompts]
        limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        rows = [row for row, limit in enumerate(limits) if limit > 0]  # the prompt that each row of the batch continues
        if not rows:
            return outputs
        width = max(len(prompts[row]) for row in rows)
        starts = [width - len(prompts[row]) for row in rows]
        cache = Cache(self.config, starts, width + max(limits), device, self.embed.weight.dtype)
        tokens = torch.tensor([[0] * start + prompts[row] for row, start in zip(rows, starts)], device=device)
        few = max(1, 4096 // width)  # the prompts' scores and activations, not the cache, would take the most memory
        x = torch.cat([self.hidden(tokens[i:i + few], cache=cache.part(i, i + few))[:, -1:] for i in range(0, len(rows), few)])
        cache.length, done = width, set()
        while True:
            chosen = sample(self.head(x[:, -1]).float(), temperature, top_k, top_p, generator)
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
            x = self.hidden(chosen[:, None], cache=cache)                          # (B,) -> (B, 1) -> (B, 1, d_model)


def check_sampling(max_new_tokens, temperature, top_k, top_p) -> None:
    for name, value, fine, wanted in (("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
                                      ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or more"),
                                      ("top_k", top_k, top_k >= 0, "0 (off) or more"), ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")):
        if not fine:
            raise ValueError(f"{name} must be {wanted}, not {value}")


def sample(logits, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, generator=None):
    """(B, V) logits -> (B,) token ids."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:  # drop a token when those likelier than it already hold top_p; the likeliest always stays
        ordered, index = probabilities.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)    # (B, 1) -> (B,)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# ---------------------------------------------------------------- tokenizer

# GPT-4's split adapted to Python source. A run of blank lines and the indentation after it is one piece, so that a line's level
# is one token; words take a leading space, underscore or dot (snake_case pieces, methods); each digit is a token, with the space before it. Every character
# falls into some alternative, only syntax that tiktoken (Rust) and Hugging Face (Oniguruma) read alike is used, and no lookaround,
# which keeps matching linear on any text (GPT-4's own pattern overflows the stack on a megabyte of spaces).
PATTERN = r"\s*[\r\n]+[ \t]*|(?: ?_?|\.)[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{N}_.]+| ?_+| ?\.+|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what HF's ByteLevel(use_regex) means

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL = ["<|endoftext|>", *ROLES.values(), "<|end|>"]
CHAT_TEMPLATE = (  # Phi-3's, as Jinja; Tokenizer.render is the same in Python
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
    special: name -> id; eot: name of the token that ends a document. Example: Tokenizer.load("bytes").encode("hi") == [104, 105]
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN, special: dict[str, int] | None = None, eot="<|endoftext|>"):
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)} if special is None else dict(special)
        lacking = [b for b in range(256) if bytes([b]) not in ranks]
        if lacking:
            raise ValueError(f"tokenizer lacks {len(lacking)} of the 256 single bytes (first: {lacking[0]}), so it cannot encode every text")
        if len({*ranks.values(), *special.values()}) != len(ranks) + len(special):
            raise ValueError("tokenizer gives one id to two tokens; ids must be distinct")
        if eot not in special:
            raise ValueError(f"tokenizer has no end-of-text token {eot!r} among its special tokens {sorted(special)}")
        self.ranks, self.pattern, self.special, self.eot_token = ranks, pattern, special, eot
        self.eot, self.vocab_size = special[eot], max(*ranks.values(), *special.values()) + 1
        self._bytes = {i: t for t, i in ranks.items()} | {i: name.encode() for name, i in special.items()}
        self._bpe = tiktoken.Encoding("minphi", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode_bytes(self, ids) -> bytes:
        """Ids without a token (a model's vocabulary may be padded) give nothing."""
        return b"".join(self._bytes.get(i, b"") for i in ids)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Chat -> ids by Phi-3's template: <|user|>\\nQ<|end|>\\n<|assistant|>\\n. Special tokens come from roles, never from content."""
        ids = []
        for n, message in enumerate(messages):
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                raise ValueError(f"message {n} needs a role among {', '.join(ROLES)} and a text as content")
            ids += [self._special(ROLES[message["role"]]), *self.encode("\n" + message["content"])]
            ids += [self._special("<|end|>"), *self.encode("\n")]
        return ids + ([self._special(ROLES["assistant"]), *self.encode("\n")] if add_generation_prompt else [self.eot])

    def _special(self, name: str) -> int:
        if name not in self.special:
            raise ValueError(f"this tokenizer has no token {name}, so it cannot render a chat; it has {sorted(self.special)}")
        return self.special[name]

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell tokenizers apart by content."""
        content = [sorted((i, t.hex()) for t, i in self.ranks.items()), self.pattern, sorted(self.special.items()), self.eot_token]
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
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
        _write_json(os.path.join(path, "tokenizer.json"), {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
            "added_tokens": [dict(id=i, content=name, **flags) for name, i in sorted(self.special.items(), key=lambda item: item[1])],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}, byte_level]},
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                      "vocab": {"".join(BYTE_TO_CHAR[b] for b in t): i for t, i in sorted(self.ranks.items(), key=lambda item: item[1])},
                      "merges": list(self._merges())}})
        _write_json(os.path.join(path, "tokenizer_config.json"), {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eot_token, "bos_token": self.eot_token,
            "pad_token": self.eot_token, "clean_up_tokenization_spaces": False, "add_prefix_space": False,
            "chat_template": CHAT_TEMPLATE})

    @classmethod
    def load(cls, path_or_name: str) -> "Tokenizer":
        """A directory with tokenizer.json, such a file, or a name: bytes, gpt2, cl100k_base, o200k_base (fetched by tiktoken)."""
        path = str(path_or_name)
        if path == "bytes":
            return cls({bytes([b]): b for b in range(256)})
        if path in ("gpt2", "cl100k_base", "o200k_base"):
            try:
                known = tiktoken.get_encoding(path)
            except (OSError, ValueError) as error:  # requests' errors are OSErrors
                raise ValueError(f"tokenizer {path} could not be fetched ({error}); go online once, or use a tokenizer.json or 'bytes'") from error
            special, free = dict(known._special_tokens), itertools.count(known.n_vocab)
            special |= {name: next(free) for name in SPECIAL if name not in special}
            return cls(known._mergeable_ranks, known._pat_str, special)
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise FileNotFoundError(f"no tokenizer at {file}: give a directory with tokenizer.json, that file, or bytes, gpt2, cl100k_base, o200k_base")
        source, eot = _read_json(file), "<|endoftext|>"
        config = os.path.join(os.path.dirname(file), "tokenizer_config.json")
        if os.path.isfile(config):
            eos = _read_json(config).get("eos_token") or eot
            eot = eos["content"] if isinstance(eos, dict) else eos
        try:
            bpe = source["model"]
            special = {t["content"]: t["id"] for t in source.get("added_tokens", [])}
            ranks = {bytes(CHAR_TO_BYTE[c] for c in t): i for t, i in bpe["vocab"].items() if t not in special}
            merged = [bpe["vocab"]["".join(m if isinstance(m, list) else m.split(" "))] for m in bpe["merges"]]
            splitters = source["pre_tokenizer"].get("pretokenizers", [source["pre_tokenizer"]])
            patterns = [s["pattern"]["Regex"] if s["type"] == "Split" else GPT2_PATTERN for s in splitters
                        if s["type"] == "Split" or s["type"] == "ByteLevel" and s.get("use_regex", True)]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a byte-level BPE tokenizer ({type(error).__name__}: {error}); other kinds are not supported") from error
        if merged != sorted(merged) or len(patterns) != 1 or source.get("normalizer"):
            raise ValueError(f"{file}: only byte-level BPE with one split pattern, no normalizer and merges in order of id is supported")
        return cls(ranks, patterns[0], special, eot)


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


# ---------------------------------------------------------------- checkpoints

NAMES = {  # ours -> Hugging Face's Phi-3; N is the layer
    "embed.weight": "model.embed_tokens.weight",
    "layers.N.attention_norm.weight": "model.layers.N.input_layernorm.weight",
    "layers.N.qkv.weight": "model.layers.N.self_attn.qkv_proj.weight",
    "layers.N.out.weight": "model.layers.N.self_attn.o_proj.weight",
    "layers.N.mlp_norm.weight": "model.layers.N.post_attention_layernorm.weight",
    "layers.N.gate_up.weight": "model.layers.N.mlp.gate_up_proj.weight",
    "layers.N.down.weight": "model.layers.N.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
CONFIG_NAMES = {"vocab_size": "vocab_size", "context": "max_position_embeddings", "n_layer": "num_hidden_layers", "d_model": "hidden_size",
                "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "d_ff": "intermediate_size",
                "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings"}
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


def read_safetensors(path: str) -> dict[str, torch.Tensor]:
    """Tensors that map the file: nothing is read before it is used, and writing to one leaves the file as it is."""
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="c")
        length = int.from_bytes(raw[:8].tobytes(), "little")
        header, tensors = json.loads(raw[8:8 + length].tobytes()), {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = torch.from_numpy(raw[8 + length + begin:8 + length + end]).view(DTYPES[entry["dtype"]]).view(entry["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); it may be truncated: restore it or make it again") from error


def save(model: Model, tokenizer: Tokenizer, path: str) -> None:
    """Write a Hugging Face Phi-3 directory; each file replaces its predecessor at once. Weights keep the model's type."""
    config, path = model.config, str(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is {config.vocab_size}; make the model larger")
    ends = [tokenizer.eot] + [tokenizer.special[name] for name in ("<|end|>",) if name in tokenizer.special]
    ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot}
    tensors = {hf_name(name): tensor for name, tensor in model.state_dict().items() if not (config.tied and name == "head.weight")}
    _write_json(os.path.join(path, "config.json"), {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **{theirs: getattr(config, ours) for ours, theirs in CONFIG_NAMES.items()},
        "original_max_position_embeddings": config.context, "rope_theta": config.rope_theta, "rope_scaling": None, "sliding_window": None,
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "initializer_range": 0.02, "use_cache": True, **ids, "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch.")})
    _write_json(os.path.join(path, "generation_config.json"), {**ids, "eos_token_id": ends})
    tokenizer.save(path)
    write_safetensors(os.path.join(path, "model.safetensors"), tensors)


def hf_name(name: str) -> str:
    number = next((part for part in name.split(".") if part.isdigit()), "")
    return NAMES[name.replace(f".{number}.", ".N.")].replace("N", number) if number else NAMES[name]


def read_config(file: str) -> Config:
    """A Phi-3 config.json, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    source = _read_json(file)
    if source.get("model_type") != "phi3":
        raise ValueError(f"{file} has model_type {source.get('model_type')!r}; only phi3 is supported")
    rope = {**source, **(source.get("rope_scaling") or {}), **(source.get("rope_parameters") or {})}
    for key, value, plain in (("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
                              ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
                              ("hidden_act", source.get("hidden_act", "silu"), "silu"), ("attention_bias", source.get("attention_bias", False), False)):
        if value != plain:
            raise ValueError(f"{file} has {key} {value!r}; only {plain!r} is supported")
    source = {"num_key_value_heads": source.get("num_attention_heads"), "tie_word_embeddings": False, "rms_norm_eps": 1e-5, **source}
    lacking = [theirs for theirs in CONFIG_NAMES.values() if source.get(theirs) is None]
    if lacking:
        raise ValueError(f"{file} lacks {', '.join(lacking)}")
    values = {ours: source[theirs] for ours, theirs in CONFIG_NAMES.items()}
    if source.get("sliding_window"):  # up to the window's length sliding attention is full attention, which is all we have
        values["context"] = min(values["context"], source["sliding_window"])
    try:
        return Config(**values, rope_theta=rope.get("rope_theta", 1e4))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load(path_or_name: str, device=None, dtype: torch.dtype | None = None) -> tuple[Model, Tokenizer | None]:
    """Open a run directory or any Hugging Face Phi-3 directory; -> the model in eval mode and its tokenizer (None if it has none).

    device: default_device() unless given; dtype: as stored unless given. Tensors must match the shape exactly, or are named.
    """
    path = str(path_or_name)
    if not os.path.isfile(os.path.join(path, "config.json")):
        if path in PRESETS:
            raise ValueError(f"{path} is a shape without weights; give the directory of a trained model, such as one that train.py made")
        raise FileNotFoundError(f"no model at {path} (config.json is missing): train one with python train.py, or give a Hugging Face directory")
    config = read_config(os.path.join(path, "config.json"))
    index, single = os.path.join(path, "model.safetensors.index.json"), os.path.join(path, "model.safetensors")
    if os.path.isfile(single):
        shards = ["model.safetensors"]
    elif os.path.isfile(index):
        shards = sorted({*_read_json(index)["weight_map"].values()})
    else:
        raise FileNotFoundError(f"{path} has neither model.safetensors nor model.safetensors.index.json")
    stored = {}
    for shard in shards:
        stored |= read_safetensors(os.path.join(path, shard))
    with torch.device("meta"):
        model = Model(config)
    wanted = {name: (hf_name(name), tensor.shape) for name, tensor in model.state_dict().items() if not (config.tied and name == "head.weight")}
    if config.tied:
        stored.pop(NAMES["head.weight"], None)  # a second copy of the embedding
    theirs = dict(wanted.values())
    wrong = ([f"{name} is missing" for name in theirs if name not in stored] + [f"{name} is not part of the model" for name in stored if name not in theirs]
             + [f"{name} has shape {tuple(stored[name].shape)} instead of {tuple(shape)}" for name, shape in theirs.items()
                if name in stored and stored[name].shape != shape])
    if wrong:
        raise ValueError(f"{path} does not hold the model its config.json describes: {'; '.join(wrong[:5])}"
                         + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    device = device or default_device()
    dtype = dtype or stored[NAMES["embed.weight"]].dtype
    weights = {name: stored.pop(hf).to(device=device, dtype=dtype, copy=True) for name, (hf, _) in wanted.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    model.cos, model.sin = rotary_tables(config, device)
    model.requires_grad_(True)
    return model.eval(), Tokenizer.load(path) if os.path.isfile(os.path.join(path, "tokenizer.json")) else None


# ---------------------------------------------------------------- table

def describe(name: str) -> list[str]:
    config = PRESETS[name]
    n = config.parameters()
    # int8 and int4 with a 16-bit scale and zero point for every 32 weights: 9 and 5 bits a weight
    return [name, f"{n:,}", f"{2 * n / 1e9:.4g}", f"{config.attention_flops() / 1e9:.3g}", f"{config.cache_bytes():,}",
            *(f"{n * bits / 8e9:.3g}" for bits in (16, 9, 5))]


def bench(config: Config, dtype: torch.dtype, rows: int = 16, steps: int = 8) -> None:
    """Tokens a second of a whole training step (forward, backward, fused AdamW), beside transformers' Phi3ForCausalLM where installed."""
    device = default_device()
    tokens = torch.randint(config.vocab_size, (rows, config.context + 1), device=device)
    ours = Model(config).to(device)
    runs = {"minphi": (ours, lambda: ours(tokens[:, :-1], targets=tokens[:, 1:])[0] / (rows * config.context))}
    try:
        import transformers
        shape = {theirs: getattr(config, name) for name, theirs in CONFIG_NAMES.items()}
        theirs = transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape, pad_token_id=0)).to(device)
        runs[f"transformers {transformers.__version__}"] = theirs, lambda: theirs(tokens[:, :-1], labels=tokens[:, :-1]).loss
    except ImportError:
        print("transformers is not installed, so there is nothing to compare with")
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the presets: size, cost and memory.")
    parser.add_argument("--preset", choices=PRESETS, help="show this one alone, with its shape")
    parser.add_argument("--bench", choices=PRESETS, help="instead, time a training step of this preset")
    parser.add_argument("--vocab-size", type=int, help="tokens of the vocabulary for --bench, instead of the preset's")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of --bench's matrix products (default: fp32)")
    args = parser.parse_args()
    if args.bench:
        config = PRESETS[args.bench]
        if args.vocab_size:
            config = dataclasses.replace(config, vocab_size=args.vocab_size)
        bench(config, torch.float32 if args.dtype == "fp32" else torch.bfloat16)
        return
    titles = ["preset", "parameters", "GFLOPs/token", "+ attention at full context", "KV bytes/token", "GB bf16", "GB int8", "GB int4"]
    if args.preset:
        for title, value in [*zip(titles, describe(args.preset)), *dataclasses.asdict(PRESETS[args.preset]).items()]:
            print(f"{title:28} {value}")
        return
    rows = [titles, *map(describe, PRESETS)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    for row in rows:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))))


if __name__ == "__main__":
    main()

"""Make a larger model of a trained one: more width, heads, layers, vocabulary or context.

    python grow.py runs/small runs/large --d-model 256 --n-layer 10   # computes the same function, and goes on learning
    python grow.py microsoft/phi-1_5 runs/phi-2 --to phi-2            # how phi-2 began, but exactly
    python grow.py runs/base runs/long --context 4096 --data web      # LongRoPE: searches its factors on web's long documents

The result is a model directory to start from: python train.py --init DST --data ... --out ...
"""
import copy
import dataclasses
import math
import os
import random
import time
import warnings

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import model as models

METHODS = {"exact": "the same function: clones share what is read of them (HyperCloning, arXiv 2409.12903), odd widths are padded",
           "tile": "weights repeated as they are (phi-1's way)", "wr": "weights reused in the corner", "random": "a new model"}
SHAPE = ("d_model", "n_layer", "n_head", "n_kv_head", "head_size", "d_ff", "vocab_size")
ROPES = ("searched", "pi", "ntk", "yarn", "none")
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def target_config(config: models.Config, method: str = "exact", **target) -> models.Config:
    """The shape to grow to. What is not given follows the width: heads keep their size where they can, and key/value heads and d_ff
    their ratio. ValueError where the shape shrinks, or cannot be reached by this method."""
    given = {name: value for name, value in target.items() if value is not None}
    for name, value in given.items():
        if name not in SHAPE:
            raise ValueError(f"{name} is no part of the shape; there are {', '.join(SHAPE)}")
        if name not in ("n_kv_head", "head_size") and value < getattr(config, name):
            raise ValueError(f"{name} {value} is less than the source's {getattr(config, name)}; grow.py only enlarges")
    d_model, size = given.get("d_model", config.d_model), config.head_dim
    width, stored = d_model / config.d_model, "head_size" in config.form.fields  # stored: config.json may say the size of a head
    heads = config.n_head * int(width) if width == int(width) else config.n_head if stored or d_model % size else d_model // size
    heads = given.get("n_head", heads)
    kv = next(n for n in (config.n_kv_head * heads / config.n_head, config.n_kv_head, heads) if n == int(n) and heads % n == 0)
    kv = given.get("n_kv_head", int(kv))
    new_size = given.get("head_size", size) if stored else d_model // heads
    keep = f"keep {size} channels a head, by " + (f"--head-size {size}" if stored else f"d_model = {size} x n_head")
    if new_size != given.get("head_size", new_size):
        raise ValueError(f"head_size is d_model / n_head in the family {config.family}; give n_head instead")
    if new_size < size and method != "random":
        raise ValueError(f"heads would shrink from {size} to {new_size} channels; {keep}")
    share = config.rotary_share
    if new_size > size and config.family in ("phi", "phi3"):  # the same channels turn as before; transformers turns all in other families
        share = next(s for s in (config.rotary_dims / new_size, (config.rotary_dims + 0.5) / new_size)
                     if int(s * new_size) == config.rotary_dims)
    shape = dict(d_model=d_model, n_layer=config.n_layer, d_ff=round(config.d_ff * width), vocab_size=config.vocab_size) | given
    shape |= dict(n_head=heads, n_kv_head=kv, head_size=new_size if stored and new_size * heads != d_model else None)
    new = dataclasses.replace(config, rotary_share=share, **shape)
    if method == "random":
        return new
    if new.rotary_dims != config.rotary_dims and (method == "exact" or config.original_context):
        raise ValueError(f"heads of {new_size} instead of {size} channels would change the rotary frequencies: no exact form; {keep}")
    if kv < config.n_kv_head and config.n_kv_head % kv:
        raise ValueError(f"n_kv_head {kv} must divide the source's {config.n_kv_head}, whose heads are averaged in groups")
    if method == "exact" and d_model % config.d_model:
        new.norm_eps = config.norm_eps / width
    elif method == "exact" and config.tied and config.form.fields.get("logit_divisor"):
        new.logit_divisor = config.logit_divisor * width
    return new


# ---- axes ----

@dataclasses.dataclass
class Axis:
    """Where the b channels of a grown dimension come from; all (b,)."""
    index: torch.Tensor   # the channel of the source that each is a clone of
    fresh: torch.Tensor   # True where it is no clone but a new channel
    clones: torch.Tensor  # how many clones share what is read from that channel of the source; 0 for a channel that is not read


def axis(old: int, new: int, method: str, device, fresh: bool = False) -> Axis:
    """Channels in turn, 0 … old - 1, 0 …, or if fresh (and for wr) new ones after the old."""
    i = torch.arange(new, device=device)
    shared = method == "exact" and not fresh
    return Axis(i % old, (i >= old) & (fresh or method == "wr"), (i % old).bincount()[i % old] if shared else torch.ones_like(i))


def head_axes(config: models.Config, new: models.Config, method: str, device) -> list[Axis]:
    """The channels of all query heads, and of all key/value heads (of which the source, after averaging, has at most the target's number).

    exact: a query's clone has to look into a clone of the same key/value head, so each of these becomes as many neighbours as its queries
    need room, and the whole is tiled. Where blocksparse heads look depends on their number modulo the stride, so only heads of equal
    remainder are clones; a head without such a source is new, and not read.
    """
    kv_heads = min(config.n_kv_head, new.n_kv_head)
    group, new_group = config.n_head // kv_heads, new.n_head // new.n_kv_head
    stride = config.sparse_stride if config.dense_every > 1 else 1
    if method != "exact":
        q, kv = ([h % n if method == "tile" or h < n else -1 for h in range(m)]
                 for n, m in ((config.n_head, new.n_head), (kv_heads, new.n_kv_head)))
    else:
        spread = -(-group // new_group)  # neighbours that one key/value head becomes
        q, kv = [], [j // spread % kv_heads for j in range(new.n_kv_head)]
        for h in range(new.n_head):
            j, slot = divmod(h, new_group)
            turn = [kv[j] * group + (slot + j % spread * new_group + n) % group for n in range(group)]
            fitting = (source for source in turn[:1 if stride == 1 else None] if (source - h) % stride == 0)
            q.append(min(fitting, key=q.count, default=-1))
        if {*range(config.n_head)} - {*q}:
            raise ValueError(f"{config.n_head} query heads on {kv_heads} key/value heads have no exact form as {new.n_head} on {new.n_kv_head}"
                             + " with blocksparse attention" * (stride > 1) + "; multiply both by one whole number")
    found, size, channel = [], config.head_dim, torch.arange(new.head_dim, device=device)
    for heads in (torch.tensor(q, device=device)[:, None], torch.tensor(kv, device=device)[:, None]):
        fresh = ((heads < 0) | (channel >= size) & (method != "tile")).flatten()  # (heads, channels of a head) -> (b,)
        index = (heads.clamp(min=0) * size + channel % size).flatten()
        counts = index[~fresh].bincount(minlength=int(index.max()) + 1)
        found.append(Axis(index, fresh, counts[index] * ~fresh if method == "exact" else torch.ones_like(index)))
    return found


def write(weight, to: Axis, fill: str, rng):
    """(a, ...) -> (b, ...): the rows of what produces the channels. New rows are zero, random on the weights' own scale, the mean of all
    rows (a residual stream padded with its mean, which LayerNorm removes), or for new tokens near the mean, which makes them unlikely."""
    grown, new = weight.index_select(0, to.index), to.fresh.nonzero().squeeze(1)
    if len(new):
        grown[new] = weight.mean(0).expand(grown[new].shape) if fill in ("mean", "token") else 0.0
        if weight.dim() > 1 and fill in ("random", "token"):  # biases are never random
            noise = torch.randn(len(new), weight.shape[1], generator=rng, device=weight.device).to(weight.dtype)
            grown[new] += noise * weight.norm() / weight.numel() ** 0.5 * (1 if fill == "random" else 0.01)
    return grown


def read(weight, to: Axis, decibels: float | None, rng, centre: bool = True):
    """(o, a) -> (o, b): the columns of what reads the channels, divided among clones; those of new channels, where there is nothing to
    read yet, are random. Noise at this signal-to-noise ratio lets clones receive different gradients (HyperCloning, section 3.3): less its
    mean over the clones of a channel, so that the output stays what it was, unless it is not to be centred."""
    grown, new = weight.index_select(1, to.index), to.fresh.nonzero().squeeze(1)
    if len(new):
        noise = torch.randn(len(weight), len(new), generator=rng, device=weight.device).to(weight.dtype)
        grown.index_copy_(1, new, noise.mul_(weight.norm() / weight.numel() ** 0.5))
    if (to.clones != 1).any():
        grown *= (to.clones > 0) / to.clones.clamp(min=1).to(weight.dtype)
    if decibels is not None and (to.clones > 1).any():
        noise = torch.rand(grown.shape, generator=rng, device=weight.device).to(weight.dtype) - 0.5  # of variance 1 / 12
        if centre:
            share = (to.clones > 0) / to.clones.clamp(min=1).to(weight.dtype)
            noise -= torch.zeros_like(weight).index_add_(1, to.index, noise * share).index_select(1, to.index)
            noise *= (to.clones > 1) / (1 - share).clamp(min=0.5).sqrt()  # of the same variance again
        grown += noise.mul_(12 ** 0.5 * 10 ** (-decibels / 20) * grown.norm() / grown.numel() ** 0.5)
    return grown


# ---- growing ----

def layer_sources(config: models.Config, n_layer: int, depth: str) -> list[tuple[int, bool]]:
    """For each new layer the source's layer, and whether it is an insertion that adds nothing yet.

    repeat: round(i / L_new · L_old), the map of phi-1's authors. identity: each layer stays, followed by copies of itself, evenly spread,
    whose output projections are zero. Dense and sparse layers alternate by their number, so there insertions come in whole periods.
    Example: 3 -> 6 layers is [0, 0, 1, 1, 2, 2], of which identity adds the second of each pair.
    """
    old, period = config.n_layer, config.dense_every
    if depth == "repeat":
        return [(min(old - 1, round(i / n_layer * old)), False) for i in range(n_layer)]
    periods = (n_layer - old) // period
    places = {i + period * (i // period * periods // -(-old // period)): i for i in range(old)}
    return [(places[max(at for at in places if at <= i)], i not in places) for i in range(n_layer)]


@torch.no_grad()
def grow(model: models.Model, method: str = "exact", *, depth: str | None = None, noise: float | None = 10.0, seed: int = 0,
         **target) -> models.Model:
    """A larger model with this one's knowledge; the source stays as it is.

    target: some of SHAPE; what is not given follows d_model (see target_config). method: one of METHODS. depth: "identity" (exact's) or
    "repeat" (the others'). noise: signal-to-noise ratio in decibels of what tells clones apart, None for none. Warns where the function
    changes although the method is exact. Works in the weights' own type: 16 bits round. Memory: the two models and one tensor.
    """
    if method not in METHODS or depth not in (None, "identity", "repeat"):
        raise ValueError(f"method must be one of {', '.join(METHODS)} and depth identity or repeat, not {method!r} and {depth!r}")
    exact, depth = method == "exact", depth or ("identity" if method == "exact" else "repeat")
    config, new, device = model.config, target_config(model.config, method, **target), model.embed.weight.device
    if method == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return models.Model(new).to(device, model.embed.weight.dtype).train(model.training)
    if exact and depth == "repeat" and new.n_layer > config.n_layer:
        warnings.warn("repeated layers change the function; depth identity keeps it", stacklevel=3)
    if exact and new.n_kv_head < config.n_kv_head:
        warnings.warn(f"key/value heads are averaged ({config.n_kv_head} -> {new.n_kv_head}); train on to make up for it", stacklevel=3)
    rng, noise, padded = torch.Generator(device).manual_seed(seed), noise if exact else None, exact and new.d_model % config.d_model != 0
    residual = axis(config.d_model, new.d_model, method, device, fresh=padded)
    queries, kvs = head_axes(config, new, method, device)
    units, tokens = axis(config.d_ff, new.d_ff, method, device), axis(config.vocab_size, new.vocab_size, method, device, fresh=True)
    pad = "random" if not exact else "mean" if config.form.layer_norm else "zero"  # written to new channels of the residual stream
    # Padding lowers the variance to d / D of what it was, so the norms' weights (and eps) are lowered to make up for it.
    narrow = math.sqrt(config.d_model / new.d_model)
    norm_scale, final_scale = narrow if padded else 1.0, 1.0
    embed_scale = narrow if exact and config.family == "gemma" else 1.0            # Gemma multiplies embeddings by sqrt(d_model)
    if exact and config.tied:  # the output layer is the grown embedding, whose clones are read in full where 1 / n of each is due
        final_scale = (1 if padded else narrow ** 2) / embed_scale * new.logit_divisor / config.logit_divisor
    query_scale = math.sqrt(new.head_dim / config.head_dim) if exact else 1.0      # softmax divides by sqrt(head_dim)
    kv_heads, size = min(config.n_kv_head, new.n_kv_head), config.head_dim

    def grown(module: str, kind: str, weight, inserted: bool):
        if module.endswith("norm"):
            offset = config.form.norm_offset if kind == "weight" else 0.0
            weight = write(weight + offset, residual, "zero", rng)
            if kind == "weight":
                weight[residual.fresh] = 1.0
                weight *= norm_scale
            return weight * (final_scale if module == "norm" else 1.0) - offset
        if module == "embed":
            return write(write(weight, tokens, "token", rng).T, residual, pad, rng).T * embed_scale
        if module in ("out", "down"):  # these write into the residual stream
            weight = write(weight, residual, pad, rng)
            return weight if kind == "bias" else read(weight, queries if module == "out" else units, noise, rng)
        if module == "head":
            weight = write(weight, tokens, "token", rng)
        elif module == "gate_up":
            weight = torch.cat([write(part, units, "random", rng) for part in weight.split(config.d_ff)])
        else:  # fewer key/value heads are averages (Ainslie et al., arXiv 2305.13245); new channels of a head: q is 0, so k may be anything
            q, k, v = weight.split([size * n for n in (config.n_head, config.n_kv_head, config.n_kv_head)])
            k, v = (part.unflatten(0, (kv_heads, -1, size)).mean(1).flatten(0, 1) for part in (k, v))
            q = write(q * query_scale, queries, "zero" if exact else "random", rng)
            weight = torch.cat([q, write(k, kvs, "random", rng), write(v, kvs, "random", rng)])
        return weight if kind == "bias" else read(weight, residual, noise, rng, centre=not inserted)

    with torch.device("meta"):
        large = models.Model(new)
    source, weights, layers = model.state_dict(), {}, layer_sources(config, new.n_layer, depth)
    for name, tensor in large.state_dict().items():
        if config.tied and name == "head.weight":
            continue
        *block, module, kind = name.split(".")
        theirs, inserted = layers[int(block[1])] if block else (None, False)
        weight = source[f"layers.{theirs}.{module}.{kind}" if block else name]
        silent = inserted and module in ("out", "down")
        weights[name] = weight.new_zeros(tensor.shape) if silent else grown(module, kind, weight, inserted).contiguous()
    large.load_state_dict(weights, strict=False, assign=True)
    if config.tied:
        large.head.weight = large.embed.weight
    return large.requires_grad_(True).train(model.training)


# ---- context ----

def rope_factors(config: models.Config, scale: float) -> dict[str, list[float]]:
    """What each published method divides the frequency of each pair of channels by, for contexts `scale` times as long.

    PI (arXiv 2306.15595) divides all alike. NTK enlarges rope_theta instead, so that fast pairs hardly change and the slowest by scale.
    YaRN (arXiv 2309.00071, section 3.2, alpha 1, beta 32) keeps pairs that turn often within the original context, and divides those that
    do not turn once.
    """
    dims, original = config.rotary_dims, config.original_context or config.context
    pairs = [2 * i / dims for i in range(dims // 2)]
    turns = [original / (2 * math.pi * config.rope_theta ** p) for p in pairs]
    kept = [min(1.0, max(0.0, (turn - 1) / (32 - 1))) for turn in turns]
    return {"pi": [scale] * (dims // 2), "ntk": [scale ** (p * dims / max(1, dims - 2)) for p in pairs],
            "yarn": [1 / ((1 - k) / scale + k) for k in kept]}


def set_context(model: models.Model, context: int, factors: list[float] | None, scale: float | None = None) -> models.Model:
    """The same weights with another context: long factors for sequences beyond the original one, ones (or the source's) up to it."""
    model, config, change = copy.copy(model), model.config, {"short_scale": scale, "long_scale": scale}
    model.tables = {}
    if factors is not None:
        change |= dict(original_context=config.original_context or config.context, short_factor=config.short_factor or [1.0] * len(factors),
                       long_factor=list(factors))
    elif config.original_context:  # the scales would follow the context
        change = {"short_scale": config.rope_scale(False), "long_scale": config.rope_scale(True)}
    model.config = dataclasses.replace(config, context=context, **change)
    return model


@torch.no_grad()
def nats(model: models.Model, documents: torch.Tensor) -> float:
    """Loss a token of documents (n, length + 1), whose positions' losses are taken in pieces: a long document's logits are large."""
    total = 0.0
    for rows in documents.to(model.embed.weight.device).split(max(1, 2048 // documents.shape[1])):
        for x, y in zip(model.hidden(rows[:, :-1]).flatten(0, 1).split(2048), rows[:, 1:].flatten().split(2048)):
            total += float(models.kernels.cross_entropy(x[None], model.head.weight, y[None], None, model.head.bias)[0])
    return total / documents[:, 1:].numel()


def search(model: models.Model, context: int, documents, population: int = 64, iterations: int = 40,
           seed: int = 0) -> tuple[list[float], dict[str, float]]:
    """LongRoPE's evolutionary search (arXiv 2402.13753, section 3.3 and algorithm 1) -> (long factors, loss of each seed and of the found ones).

    Factors rise from pair to pair and lie in [1, 1.25 scale], in steps of 0.01. PI, NTK and YaRN and mutations of them begin; the best half
    lives on beside a quarter of mutations and a quarter of crossovers. Without the paper's second variable, the number of first tokens
    that are not scaled: Hugging Face's models do not have it.
    """
    scale = context / (model.config.original_context or model.config.context)
    rng, losses, quarter = random.Random(seed), {}, population // 4
    named = {name: tuple(factors) for name, factors in rope_factors(model.config, scale).items()}
    if model.config.long_factor and max(model.config.long_factor) <= 1.25 * scale:
        named["source"] = tuple(model.config.long_factor)

    def loss(factors):
        if factors not in losses:
            losses[factors] = nats(set_context(model, context, factors), documents)
        return losses[factors]

    def legal(factors):  # on the grid and within the bounds; sorted, any choice rises
        return tuple(min(max(round(factor, 2), 1.0), math.floor(125 * scale) / 100) for factor in sorted(factors))

    def mutated(factors):
        return legal(factor * math.exp(rng.gauss(0, 0.2)) if rng.random() < 0.3 else factor for factor in factors)
    alive = list(named.values())
    alive += [mutated(rng.choice(alive)) for _ in range(population - len(alive))]
    for _ in tqdm(range(iterations), "searching", unit="generation", disable=None):
        best = sorted(set(alive), key=loss)[:population - 2 * quarter]
        alive = best + [mutated(rng.choice(best)) for _ in range(quarter)]
        alive += [legal(map(rng.choice, zip(rng.choice(best), rng.choice(best)))) for _ in range(quarter)]
    found = min(alive, key=loss)
    return list(found), {**{name: loss(factors) for name, factors in named.items()}, "searched": loss(found)}


# ---- the command ----

def options(arguments=None):
    parser = data.Parser(prog="grow.py", description=__doc__)
    option, count, tokens = parser.option, dict(type=data.number(int, 1), metavar="N"), dict(type=data.number(int, 2), metavar="N")
    parser.add_argument("source", metavar="SRC", help="run directory, Hugging Face directory or hub name")
    parser.add_argument("target", metavar="DST", help="directory to write")
    option("--to", None, "take the shape of this preset, of the source's family", choices=models.PRESETS, metavar="PRESET")
    for name in SHAPE:
        option("--" + name.replace("_", "-"), None, f"new {name}; what is not given follows d_model", **count)
    option("--method", "exact", "; ".join(f"{name}: {text}" for name, text in METHODS.items()), choices=METHODS)
    option("--depth", None, "new layers: identity adds nothing at first, repeat copies whole layers (default: identity for exact, else repeat)",
           choices=("identity", "repeat"))
    option("--noise", "10", "signal-to-noise ratio in decibels of what tells clones apart, or none", metavar="DB",
           type=lambda text: None if text == "none" else data.number(float, -60, 200)(text))
    option("--context", None, "tokens of the new context", **tokens)
    option("--trained-context", None, "tokens a row that the source was trained on, where its config says more", **tokens)
    option("--rope", "searched", "how rotary positions reach the new context", choices=ROPES)
    option("--data", None, "dataset (directory, or name under data/) or text file, to search on its long documents, and for the check")
    option("--population", 64, "factors alive in the search", type=data.number(int, 4), metavar="N")
    option("--iterations", 40, "generations of the search", **count)
    option("--device", "cpu", "where to grow, check and search", choices=("cpu", "cuda", "mps"))
    option("--dtype", "auto", "of the weights; auto: the source's, but fp32 for exact, whose small differences 16 bits would round away",
           choices=DTYPES)
    option("--seed", 0, "of noise, new weights and search", type=data.number(int, 0))
    args = parser.parse_args(arguments)
    if args.context is None and args.rope != "searched":
        parser.error(f"--rope {args.rope} belongs to --context N")
    if args.context and args.rope == "searched" and not args.data:
        parser.error("--rope searched needs --data with long documents; or give --rope yarn")
    if args.device not in ("cpu", models.default_device()):
        parser.error(f"--device {args.device} cannot be used here; try --device cpu")
    return args


def read_stream(name: str, tokenizer) -> torch.Tensor:
    """Token ids of a dataset's validation split, or of a text file."""
    if os.path.isfile(name):
        with open(name, encoding="utf-8", errors="replace") as file:
            return torch.tensor(tokenizer.encode(file.read()))
    dataset = data.open_dataset(name if os.path.isdir(name) else os.path.join("data", name))
    if models.Tokenizer.load(dataset.path).fingerprint != tokenizer.fingerprint:
        raise ValueError(f"--data {name} has another tokenizer than the source; make it again with data.py --tokenizer SRC")
    return torch.from_numpy(dataset.val.astype("int64"))


def long_documents(stream: torch.Tensor, eot: int, length: int, count: int = 5) -> tuple[torch.Tensor, str]:
    """The beginnings of the longest documents of more than `length` tokens, (n, length + 1); where there is none, pieces of the stream."""
    ends = [-1, *(stream == eot).nonzero().flatten().tolist(), len(stream)]
    sizes = sorted(((end - begin - 1, begin + 1) for begin, end in zip(ends, ends[1:]) if end - begin - 1 > length), reverse=True)[:count]
    if sizes:
        return torch.stack([stream[begin:begin + length + 1] for _, begin in sizes]), f"{len(sizes)} documents of more than {length:,} tokens"
    if not 1 < length + 1 <= len(stream):
        raise ValueError(f"--data holds {len(stream):,} tokens, too few for a length of {length + 1:,}; give longer documents")
    rows = stream.unfold(0, length + 1, length + 1)
    rows = rows[::max(1, len(rows) // count)][:count]
    return rows, f"{len(rows)} pieces of joined documents (none has more than {length:,} tokens)"


@torch.no_grad()
def compare(source: models.Model, grown: models.Model, rows: torch.Tensor) -> tuple[float, float, float, float]:
    """On token rows (n, T): loss a token of both, the largest logit difference, the largest logit."""
    rows = rows.to(source.embed.weight.device)
    before, after = source(rows[:, :-1]), grown(rows[:, :-1])
    losses = (float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())) for logits in (before, after))
    shown = before != -math.inf  # some tokens are never predicted
    return *losses, float((after[..., :before.shape[-1]] - before)[shown].abs().max()), float(before[shown].abs().max())


def describe(config: models.Config) -> str:
    shape = ("n_layer", "d_model", "n_head", "n_kv_head", "head_dim", "d_ff", "vocab_size", "context")
    return f"{config.parameters():,} parameters: " + ", ".join(f"{name} {getattr(config, name)}" for name in shape)


def preset_shape(config: models.Config, name: str) -> dict:
    """What grow wants for a model of this preset's shape; the tokenizer may need more than its vocabulary."""
    preset = models.PRESETS[name]
    if preset.family != config.family:
        same = ", ".join(name for name, other in models.PRESETS.items() if other.family == config.family)
        raise ValueError(f"--to {name} is of the family {preset.family}, the source of {config.family}; its presets are {same}")
    return {name: getattr(preset, name) for name in SHAPE} | {
        "head_size": preset.head_dim if "head_size" in preset.form.fields else None, "vocab_size": max(preset.vocab_size, config.vocab_size)}


def run(args) -> None:
    began = time.perf_counter()
    if os.path.realpath(args.source) == os.path.realpath(args.target) or os.path.isfile(args.target) or \
            os.path.exists(os.path.join(args.target, "state.pt")):
        raise ValueError(f"{args.target} is the source, a training run or a file; give another DST, or delete it")
    source, tokenizer = models.load(args.source, args.device, DTYPES[args.dtype] or (torch.float32 if args.method == "exact" else None))
    if args.trained_context:
        source.config = dataclasses.replace(source.config, context=min(args.trained_context, source.config.context))
    config = source.config
    target = preset_shape(config, args.to) if args.to else {}
    target |= {name: value for name in SHAPE if (value := getattr(args, name)) is not None}
    changed = args.method == "random" or target_config(config, args.method, **target) != config
    if (args.context or config.context) < config.context or args.context == config.context and not config.original_context:
        raise ValueError(f"--context {args.context} is not more than the source's {config.context} already; grow.py only enlarges")
    if not changed and not args.context:
        raise ValueError(f"nothing to grow: {args.source} has this shape already; give --to, --d-model, --n-layer, --context, ...")
    if args.data and tokenizer is None:
        raise ValueError(f"--data needs the source's tokenizer, and {args.source} has no tokenizer.json")
    eot, named, documents = tokenizer.eot if tokenizer else -1, args.data or ("this script" if tokenizer else "chance"), None
    stream = read_stream(args.data or __file__, tokenizer) if tokenizer else torch.arange(1024) * 7919 % config.vocab_size
    if args.context and args.data:
        documents, said = long_documents(stream, eot, args.context)
    print(f"source   {describe(config)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grown = grow(source, args.method, depth=args.depth, noise=args.noise, seed=args.seed, **target) if changed else source
    reasons = [str(w.message) for w in caught] + [f"{args.method}; --method exact keeps the function"] * (changed and args.method != "exact")
    print(f"target   {describe(dataclasses.replace(grown.config, context=args.context or config.context))}")
    print("".join(f"note     not exact: {reason}\n" for reason in reasons), end="")
    original = config.original_context or config.context
    if args.context:
        measured, losses = grown if reasons else source, {}
        factors = rope_factors(measured.config, args.context / original)
        if args.rope == "searched":
            factors["searched"], losses = search(measured, args.context, documents, args.population, args.iterations, args.seed)
        if documents is not None:  # all methods beside each other
            losses = {name: losses.get(name) or nats(set_context(measured, args.context, factors.get(name)), documents)
                      for name in dict.fromkeys(("none", *factors, *losses))}
            print(f"context  {original} -> {args.context}: loss on {said}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        # PI and NTK leave cos and sin as they are, YaRN has a scale of its own, and the paper's comes with the factors
        scale = {"pi": 1.0, "ntk": 1.0, "yarn": 0.1 * math.log(args.context / original) + 1}.get(args.rope)
        grown = set_context(grown, args.context, factors.get(args.rope), scale)
        if (scale := grown.config.rope_scale(False)) != config.rope_scale(False):
            reasons.append("rotary scale")
            print(f"note     cos and sin are scaled by {scale:.4f} at all lengths, as transformers does; short texts change until trained on")
    rows, _ = long_documents(stream, eot, min(original, 128, len(stream) - 1), 2)
    before, after, worst, largest = compare(source, grown, rows)
    print(f"check    {rows[:, 1:].numel():,} tokens of {named}: loss {before:.4f} -> {after:.4f}; "
          f"largest logit difference {worst:.2g} (logits up to {largest:.3g})")
    exact = args.method == "exact" and not reasons and source.embed.weight.dtype == torch.float32  # 16 bits round
    if exact and not worst <= 1e-3 * max(1.0, largest):
        data.fail("the grown model does not compute the source's function, so nothing was written; this is a bug: please report the command", 1)
    models.save(grown, tokenizer, args.target)
    if os.path.exists(os.path.join(args.source, "state.pt")):
        print("note     the optimizer's state (state.pt) is dropped: training goes on as a new run, whose warmup builds it up again")
    print(f"saved    {args.target}, {time.perf_counter() - began:.1f} s; go on with: python train.py --init {args.target} --data ... --out ..."
          + (f" --context {args.context}" if args.context else ""))


@data.command("interrupted; nothing was written")
def main(arguments=None) -> None:
    try:
        run(options(arguments))
    except torch.OutOfMemoryError as error:
        data.fail(f"out of memory ({str(error).splitlines()[0]}); give --device cpu, or --dtype bf16")


if __name__ == "__main__":
    main()

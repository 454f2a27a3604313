"""Make a larger model of a trained one: more width, heads, layers, vocabulary or context.

    python grow.py runs/small runs/large --d-model 256 --n-layer 10   # computes the same, and learns on
    python grow.py microsoft/phi-1_5 runs/phi-2 --d-model 2560 --n-layer 32 --n-head 32    # as phi-2 began
    python grow.py runs/base runs/long --context 4096 --data web      # LongRoPE's search, on long documents

The result is a model directory to start from: python train.py --init DST --data ... --out ...

Every matrix W (out, in) becomes W' = E_out W S_inᵀ. E copies channels: its rows are rows of the identity. S
reads them, each of n copies by 1/n, so that SᵀE is the identity and each layer computes what it did.
axis_table is the heart: it says which axes each matrix writes (E_out), and which it reads (S_in).
"""
import copy
import dataclasses
import functools
import math
import re
import warnings
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model as models

METHODS = ("exact", "tile", "wr")
SHAPE = ("d_model", "n_layer", "n_head", "n_kv_head", "head_dim", "d_ff", "vocab_size")


# ---------------------------------------------------------------- shape

def target_config(config, method="exact", d_model=None, n_layer=None, n_head=None, n_kv_head=None,
                  head_dim=None, d_ff=None, vocab_size=None):
    """The models.Config to grow to. What is not given follows d_model: heads keep their size where they can,
    key/value heads and d_ff their ratio. ValueError where the shape shrinks, or this method cannot reach
    it."""
    d_model = d_model or config.d_model
    width = d_model / config.d_model
    heads_of_same_size, rest = divmod(config.n_head * d_model, config.d_model)
    n_head = n_head or (config.n_head if rest else heads_of_same_size)
    group = config.n_head // config.n_kv_head
    n_kv_head = n_kv_head or (n_head if n_head % group else n_head // group)
    stores_size = "head_size" in config.family.fields       # config.json says the size of a head
    head_dim = head_dim or (config.head_dim if stores_size else d_model // n_head)
    if not stores_size and n_head * head_dim != d_model:
        raise ValueError(f"d_model must be n_head x head_dim in the family {config.model_type}, and "
                         f"{d_model} is not {n_head} x {head_dim}")
    rotary_share = config.partial_rotary_factor
    if head_dim > config.head_dim and config.model_type in ("phi", "phi3"):
        # the same channels turn as before (in other families all do); one step up, as rotary_dims rounds down
        rotary_share = math.nextafter(config.rotary_dims / head_dim, 1)
    new = dataclasses.replace(
        config, d_model=d_model, n_layer=n_layer or config.n_layer, n_head=n_head, n_kv_head=n_kv_head,
        head_size=None if n_head * head_dim == d_model else head_dim, d_ff=d_ff or round(config.d_ff * width),
        vocab_size=vocab_size or config.vocab_size, partial_rotary_factor=rotary_share)
    for name in SHAPE:
        if getattr(new, name) < getattr(config, name) and name != "n_kv_head":
            raise ValueError(f"{name} {getattr(new, name)} is less than the source's "
                             f"{getattr(config, name)}; grow.py only enlarges (unless given, "
                             "head_dim is d_model / n_head)")
    if config.n_kv_head % min(n_kv_head, config.n_kv_head):
        raise ValueError(f"n_kv_head {n_kv_head} must divide the source's {config.n_kv_head}, which are "
                         "averaged in groups")
    if new.rotary_dims != config.rotary_dims and (method == "exact" or config.original_max_seq_len):
        raise ValueError(f"heads of {head_dim} channels have no exact form, because they turn by other "
                         f"rotary frequencies than those of {config.head_dim}: give --head-dim "
                         f"{config.head_dim}")
    if method == "exact" and width % 1:
        new.norm_eps /= width       # as the variance, see norm_scale in grow
    elif method == "exact" and config.tie_embeddings and "logit_divisor" in config.family.fields:
        new.logit_divisor *= width
    return new


# ---------------------------------------------------------------- axes

# The rows of new channels: these multiples of the mean of all rows, and of noise of the weights' scale
ZERO = 0.0, 0.0
MEAN = 1.0, 0.0         # a residual stream padded with its mean, which LayerNorm takes away
RANDOM = 0.0, 1.0
NEAR_MEAN = 1.0, 0.01   # new tokens, which are unlikely then

# A dimension that had a channels and grows to b. All but new_rows are (b,).
# source: the channel that each is a copy of, which is where E, S and D (b, a) are not zero; -1: a new channel
# new_rows: see above
# share: S, what is read of each, 1/n of n copies
# spread: D, the shares with signs, such as -1/2 and 1/2, whose sum over the n copies is zero
Axis = namedtuple("Axis", "source new_rows share spread")


def make_axis(source, new_rows, divided):
    """divided: copies are read in shares and new channels not at all, else all in full."""
    copies = Counter()
    number = []     # of each among the copies of its channel
    for channel in source:
        number.append(copies[channel])
        copies[channel] += divided
    n = torch.tensor([max(1, copies[channel]) for channel in source], dtype=torch.float64)
    source = torch.tensor(source)
    share = ((source >= 0) | (not divided)) / n
    spread = share * (4 * torch.tensor(number) + 2 - 2 * n) / n
    return Axis(source, new_rows, share, spread)


def head_sources(config, new):
    """The source's head of each query head and each key/value head, so that attention computes the same.

    A copy of a query has to look into a copy of the same key/value head, so each of these becomes as many
    neighbours as its queries need room, and the whole is tiled. Where blocksparse heads look depends on their
    number modulo the stride, so only heads of equal remainder are copies; a head without such a source is new
    (-1).
    """
    group = config.n_head // config.n_kv_head
    new_group = new.n_head // new.n_kv_head
    neighbours = -(-group // new_group)
    stride = config.sparse_stride if config.dense_every > 1 else 1
    kv_heads = [head // neighbours % config.n_kv_head for head in range(new.n_kv_head)]
    queries = []
    for head in range(new.n_head):
        first = kv_heads[head // new_group] * group
        fitting = [query for query in range(first, first + group) if (query - head) % stride == 0]
        queries.append(min(fitting, key=queries.count, default=-1))
    if not set(range(config.n_head)) <= set(queries):
        raise ValueError(f"{config.n_head} query heads on {config.n_kv_head} key/value heads have no exact "
                         f"form as {new.n_head} on {new.n_kv_head} (blocksparse stride {stride}); multiply "
                         "both by one whole number")
    return queries, kv_heads


def axis_table(config, new, method):
    """Module -> the axes that its rows write, one for each matrix that is fused in it; the axis that its
    columns read. config: the source's, but with no more key/value heads than the target has."""
    exact = method == "exact"
    reused = method == "wr"

    def in_turn(name, padded=reused):
        """0, 1, ... and again from 0, or padded with new ones (-1)."""
        old = getattr(config, name)
        return [-1 if padded and i >= old else i % old for i in range(getattr(new, name))]

    def head_axis(heads, new_rows):
        channels = in_turn("head_dim", method != "tile")
        source = [head * config.head_dim + c if min(head, c) >= 0 else -1 for head in heads for c in channels]
        return make_axis(source, new_rows, exact)

    query_heads, kv_heads = head_sources(config, new) if exact else (in_turn("n_head"), in_turn("n_kv_head"))
    queries = head_axis(query_heads, ZERO if exact else RANDOM)     # 0 finds nothing in new channels of keys
    keys = values = head_axis(kv_heads, RANDOM)
    hidden = make_axis(in_turn("d_ff"), RANDOM, exact)
    tokens = make_axis(in_turn("vocab_size", True), NEAR_MEAN, False)
    pad = RANDOM if reused else MEAN if config.family.layer_norm else ZERO
    padded = reused or exact and new.d_model % config.d_model > 0
    residual = make_axis(in_turn("d_model", padded), pad, exact and not padded)
    return {
        "embed_tokens": ([tokens], residual),   # (vocab_size, d_model): its columns write too, see grow
        "qkv_proj": ([queries, keys, values], residual),
        "o_proj": ([residual], queries),
        "gate_up_proj": ([hidden] if config.family.activation == "gelu" else [hidden, hidden], residual),
        "down_proj": ([residual], hidden),
        "lm_head": ([tokens], residual),
    }


def expand_rows(weight, axis, new_rows=None):
    """E W: (a, ...) -> (b, ...)"""
    mean, noise = new_rows or axis.new_rows
    grown = weight[axis.source]
    new = axis.source < 0
    grown[new] = mean * weight.mean(0) + noise * weight.std() * torch.randn_like(grown[new])
    return grown


def expand_cols(weight, axis, decibels):
    """W Sᵀ + N Dᵀ: (o, a) -> (o, b). New columns, which read zeros, are random.

    N Dᵀ: noise at this signal-to-noise ratio lets copies receive different gradients. What is added for one
    copy of a channel is taken away for another, so the output stays (HyperCloning, section 3.3).
    """
    grown = expand_rows(weight.T, axis, RANDOM).T * axis.share.to(weight)
    if axis.spread.any():
        noise = 10 ** (-decibels / 20) * weight.std() * torch.randn_like(weight)
        grown += noise[:, axis.source] * axis.spread.to(weight)
    return grown


# ---------------------------------------------------------------- growing

def layer_sources(config, n_layer, exact):
    """For each new layer the source's layer, and whether it is inserted and adds nothing yet.

    Not exact: round(i / n_layer · old), the map of phi-1's authors. Exact: each layer stays, followed by
    copies of itself, evenly spread, whose output projections are zero. Dense and sparse layers alternate by
    their number, so there insertions come in whole periods.
    Example: 3 -> 6 layers is [0, 0, 1, 1, 2, 2], of which exact inserts the second of each pair.
    """
    old = config.n_layer
    if not exact:
        return [(min(old - 1, round(i / n_layer * old)), False) for i in range(n_layer)]
    period = config.dense_every
    periods = -(-old // period)
    new_periods = periods + (n_layer - old) // period
    sources = []
    for i in range(n_layer):
        layer = i // period * periods // new_periods * period + i % period
        is_inserted = layer >= old or (layer, False) in sources
        sources.append((min(layer, old - 1), is_inserted))
    return sources


@torch.no_grad()
def grow(model, method="exact", *, noise=10.0, seed=0, **target):
    """A larger models.Model with this one's knowledge; the source stays as it is.

    method: exact, the same function (HyperCloning, arXiv 2409.12903); tile, weights repeated as they are; wr,
    weights reused in the corner. target: some of SHAPE; what is not given follows d_model (see
    target_config). noise: signal-to-noise ratio in decibels of what tells copies apart, inf for none. Warns
    where the function changes although the method is exact. Works in the weights' own type: 16 bits round.
    Memory: the two models and a few copies of one tensor.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    config = model.config
    new = target_config(config, method, **target)
    exact = method == "exact"
    n_kv_head = min(config.n_kv_head, new.n_kv_head)
    if exact and n_kv_head < config.n_kv_head:
        warnings.warn(f"key/value heads are averaged ({config.n_kv_head} -> {n_kv_head}); train on to make "
                      "up for it", stacklevel=3)
    table = axis_table(dataclasses.replace(config, n_kv_head=n_kv_head), new, method)
    residual = table["lm_head"][1]

    # What has to be made up for: softmax divides by sqrt(head_dim), Gemma multiplies embeddings by
    # sqrt(d_model), padding leaves 1 / width of the variance, a tied output layer reads all copies in full
    width = new.d_model / config.d_model if exact else 1.0
    query_scale = math.sqrt(new.head_dim / config.head_dim) if exact else 1.0
    embed_scale = width ** -0.5 if config.model_type == "gemma" else 1.0
    norm_scale = width ** -0.5 if width % 1 else 1.0
    final_scale = 1.0
    if config.tie_embeddings:
        final_scale = new.logit_divisor / config.logit_divisor / embed_scale / (1.0 if width % 1 else width)

    def expand(module, kind, weight):
        is_bias = kind == "bias"
        if module.endswith("norm"):
            scale = final_scale if module == "norm" else 1.0
            if is_bias:
                return expand_rows(weight, residual, ZERO) * scale
            offset = config.family.norm_offset
            return expand_rows(weight + offset, residual, MEAN) * norm_scale * scale - offset
        rows, columns = table[module]
        parts = list(models.split_rows(config, weight, len(rows)))
        if module == "qkv_proj":
            parts[0] = parts[0] * query_scale
            for i in (1, 2):    # fewer key/value heads are means of neighbours (GQA, arXiv 2305.13245)
                parts[i] = parts[i].unflatten(0, (n_kv_head, -1, config.head_dim)).mean(1).flatten(0, 1)
        grown = torch.cat([expand_rows(part, axis) for part, axis in zip(parts, rows)])
        if module == "embed_tokens":
            return expand_rows(grown.T, residual).T * embed_scale
        return grown if is_bias else expand_cols(grown, columns, noise)

    with torch.device("meta"):
        large = models.Model(new)
    source = model.state_dict()
    layers = layer_sources(config, new.n_layer, exact)
    weights = {}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for name, like in models.stored_parameters(large).items():
            number = re.search(r"\d+", name)
            layer, is_inserted = layers[int(number[0])] if number else (0, False)
            weight = source[re.sub(r"\d+", str(layer), name)]
            module, kind = name.split(".")[-2:]
            is_silent = is_inserted and module in ("o_proj", "down_proj")
            grown = weight.new_zeros(like.shape) if is_silent else expand(module, kind, weight)
            weights[name] = grown.contiguous()
    large.load_state_dict(weights, strict=False, assign=True)
    large.tie_embeddings()
    return large.requires_grad_(True).train(model.training)


# ---------------------------------------------------------------- context

def rope_methods(config, max_seq_len):
    """How each published method reaches max_seq_len: what it divides the frequency of each pair of channels
    by, and what it multiplies cos and sin by.

    PI (arXiv 2306.15595) divides all alike. NTK enlarges rope_theta instead, so that fast pairs hardly change
    and the slowest as in PI. YaRN (arXiv 2309.00071, section 3.2, alpha 1, beta 32) keeps pairs that turn
    often within the original context, and divides those that do not turn once.
    """
    original = config.original_max_seq_len or config.max_seq_len
    scale = max_seq_len / original
    dims = config.rotary_dims
    channels = torch.arange(0, dims, 2, dtype=torch.float64)    # the first of each pair
    ntk = scale ** (channels / max(1, dims - 2))
    turns = original / (2 * math.pi * config.rope_theta ** (channels / dims))
    kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
    yarn = 1 / ((1 - kept) / scale + kept)
    return {
        "none": (config.long_factor, config.rope_mscale(True)),
        "pi": ([scale] * len(ntk), 1.0),
        "ntk": (ntk.tolist(), 1.0),
        "yarn": (yarn.tolist(), 0.1 * math.log(scale) + 1),
    }


def set_context(model, max_seq_len, factors, mscale=None):
    """The same weights with another context: factors (None: plain) for sequences beyond the original one,
    ones (or the source's) up to it; cos and sin times mscale, None for the paper's formula."""
    config = model.config
    change = dict(max_seq_len=max_seq_len)
    if factors:
        change.update(
            original_max_seq_len=config.original_max_seq_len or config.max_seq_len,
            short_factor=config.short_factor or [1.0] * len(factors),
            long_factor=list(factors),
            short_mscale=mscale,
            long_mscale=mscale)
    model = copy.copy(model)
    model.config = dataclasses.replace(config, **change)
    return model


@torch.no_grad()
def document_loss(model, documents):
    """Nats a token of documents (n, length + 1), one by one: the logits of a long one are many."""
    losses = [model(row[None, :-1], targets=row[None, 1:])[0] for row in documents.to(model.device)]
    return float(sum(losses)) / documents[:, 1:].numel()


def search(model, max_seq_len, documents, population=64, iterations=40, seed=0):
    """LongRoPE's evolutionary search for the long factors (arXiv 2402.13753, section 3.3 and algorithm 1).

    Factors rise from pair to pair and lie in [1, 1.25 scale], in steps of 0.01. PI, NTK, YaRN and the
    source's factors, if it has some, begin; the best half lives on beside a quarter of mutations and a
    quarter of crossovers of it. Without the paper's second variable, the number of first tokens that are not
    scaled: Hugging Face's models do not have it.
    """
    methods = rope_methods(model.config, max_seq_len)
    highest = math.floor(125 * methods["pi"][0][0]) / 100
    rng = np.random.default_rng(seed)
    quarter = population // 4

    @functools.cache
    def loss(factors):
        return document_loss(set_context(model, max_seq_len, factors), documents)

    best = [tuple(factors) for factors, _ in methods.values() if factors]
    for _ in tqdm(range(iterations), "searching", unit="generation", disable=None):
        a, b, c = np.array(best)[rng.integers(len(best), size=(3, quarter))]     # (quarter, rotary_dims / 2)
        mutated = a * np.exp(rng.normal(0, 0.2, a.shape) * (rng.random(a.shape) < 0.3))
        crossed = np.where(rng.random(a.shape) < 0.5, b, c)
        children = np.concatenate([mutated, crossed]).round(2).clip(1, highest)
        children.sort()     # any choice rises then
        best = sorted({*best, *map(tuple, children.tolist())}, key=loss)[:population - 2 * quarter]
    return list(best[0])


# ---------------------------------------------------------------- the command

def parse_args(arguments=None):
    about, rest = __doc__.split("\n\n", 1)
    parser = data.Parser(prog="grow.py", usage="grow.py SRC DST [options]", description=about, epilog=rest)
    option = parser.option
    parser.add_argument("source", metavar="SRC", help="run directory, Hugging Face directory or hub name")
    parser.add_argument("target", metavar="DST", help="directory to write")
    numbers = {name: (None, f"new {name}; what is not given follows d_model") for name in SHAPE}
    numbers.update(
        context=(None, "tokens of the new context"),
        trained_context=(None, "tokens a row that the source was trained on, where its config says more"),
        population=(64, "factors alive in the search"),
        iterations=(40, "generations of the search"))
    for name, (default, text) in numbers.items():
        option("--" + name.replace("_", "-"), default, text, type=data.number(int, 1), metavar="N")
    option("--seed", 0, "of noise, new weights and search", type=int, metavar="N")
    option("--method", "exact", "exact: the same function; tile: weights repeated as they are (phi-1's way); "
           "wr: weights reused in the corner, the rest is new", choices=METHODS)
    option("--noise", 10.0, "signal-to-noise ratio in decibels of what tells copies apart; inf: none",
           type=float, metavar="DB")
    option("--rope", None, "to the new --context: [searched], pi, ntk, yarn or none",
           choices=("searched", "pi", "ntk", "yarn", "none"), metavar="NAME")
    option("--data", None, "dataset (directory, or name under data/) or text file: factors are searched on "
           "half of its long documents, and all methods compared on the other half; also for the check",
           metavar="DATA")
    option("--device", "cpu", "where to grow, check and search", choices={"cpu", models.default_device()})
    args = parser.parse_args(arguments)
    if args.rope and not args.context:
        parser.error("--rope says how --context grows; give that too")
    args.rope = args.rope or "searched"
    return args


def read_stream(name, tokenizer):
    """Token ids of a dataset's validation split, or of a text file."""
    path = Path(name)
    if path.is_file():
        return torch.tensor(tokenizer.encode(path.read_text("utf-8", "replace")))
    dataset = data.open_dataset(path if path.is_dir() else Path("data", name))
    if models.Tokenizer.load(dataset.path).fingerprint != tokenizer.fingerprint:
        raise ValueError(f"--data {name} has another tokenizer than the source; make it again with data.py "
                         "--tokenizer SRC")
    return torch.from_numpy(dataset.val.astype("int64"))


def long_documents(stream, eot, length, count=10):
    """The beginnings of documents of more than `length` tokens, (n, length + 1), and what they are; where
    there are no two, pieces of the stream."""
    ends = (stream == eot).nonzero().flatten() + 1
    choices = {
        f"documents of more than {length:,} tokens": stream.tensor_split(ends),
        f"pieces of joined documents (no two have more than {length:,} tokens)": stream.split(length + 1),
    }
    for kind, pieces in choices.items():
        rows = [piece[:length + 1] for piece in pieces if len(piece) > length]
        if len(rows) > 1:
            return torch.stack(rows[::max(1, len(rows) // count)][:count]), kind
    raise ValueError(f"--data holds {len(stream):,} tokens, too few for a length of {length:,}; give "
                     "longer documents")


def describe(config):
    shape = [f"{name} {getattr(config, name)}" for name in (*SHAPE, "max_seq_len")]
    return f"{config.num_parameters():,} parameters: {', '.join(shape)}"


def extend_context(args, model, stream, eot):
    """The model with --context by the method --rope; with --data, all methods' losses are printed."""
    methods = rope_methods(model.config, args.context)
    if args.rope == "searched" and not args.data:
        raise ValueError("--rope searched needs --data with long documents; or give --rope yarn")
    if args.data:
        documents, kind = long_documents(stream, eot, args.context)
        if args.rope == "searched":
            factors = search(model, args.context, documents[::2], args.population, args.iterations, args.seed)
            methods["searched"] = factors, None
        print(f"context  loss on {len(documents[1::2])} other {kind}:")
        for name, method in methods.items():
            loss = document_loss(set_context(model, args.context, *method), documents[1::2])
            print(f"         {name:8} {loss:.4f}")
    return set_context(model, args.context, *methods[args.rope])


@torch.no_grad()
def run(args):
    target = Path(args.target)
    source_folder = Path(args.source)
    if list(target.glob("state-*")) or target.resolve() == source_folder.resolve():
        raise ValueError(f"{target} is the source or a training run; give another DST, or delete it")
    source, tokenizer = models.load(args.source, args.device, torch.float32)
    config = source.config
    if args.trained_context:
        config.max_seq_len = min(args.trained_context, config.max_seq_len)
    if args.context and args.context <= config.max_seq_len:
        raise ValueError(f"--context {args.context} is not more than the source's {config.max_seq_len} "
                         "already; grow.py only enlarges")
    stream = torch.arange(1024) * 7919 % config.vocab_size      # as good as any for a check
    if tokenizer:
        stream = read_stream(args.data or __file__, tokenizer)
    elif args.data:
        raise ValueError(f"--data needs the source's tokenizer, and {args.source} has no tokenizer.json")

    print("source  ", describe(config))
    with warnings.catch_warnings(record=True) as caught:
        shape = {name: getattr(args, name) for name in SHAPE}
        grown = grow(source, args.method, noise=args.noise, seed=args.seed, **shape)
    inexact = [str(warning.message) for warning in caught]
    if args.method != "exact":
        inexact.append(f"{args.method}; --method exact keeps the function")
    if args.context:
        grown = extend_context(args, grown, stream, tokenizer.eot if tokenizer else -1)
    elif grown.config == config:
        raise ValueError(f"nothing to grow: {args.source} has this shape already; give --d-model, --n-layer, "
                         "--context, ...")
    mscale = grown.config.rope_mscale(False)
    if mscale != config.rope_mscale(False):
        inexact.append(f"cos and sin are scaled by {mscale:.4f} at all lengths, as transformers does; short "
                       "texts change until trained on")
    print("target  ", describe(grown.config))
    for reason in inexact:
        print("note     not exact:", reason)

    rows = stream[:min(128, config.max_seq_len) + 1].to(source.device)[None]
    before = source.lm_head(source.hidden(rows[:, :-1]))
    after = grown.lm_head(grown.hidden(rows[:, :-1]))[..., :config.vocab_size]
    worst = (after - before).abs().max()
    largest = before.abs().max()
    print(f"check    {rows.numel() - 1} tokens: loss {document_loss(source, rows):.4f} -> "
          f"{document_loss(grown, rows):.4f}; largest logit difference {worst:.2g} (logits up to "
          f"{largest:.3g})")
    if not (inexact or worst <= 1e-3 * max(1.0, largest)):
        data.fail("the grown model does not compute the source's function, so nothing was written; this is a "
                  "bug: please report the command", 1)
    models.save(grown, tokenizer, target)
    if list(source_folder.glob("state-*")):
        print("note     the optimizer's state is dropped: training goes on as a new run, whose warmup builds "
              "it up again")
    context = f" --context {args.context}" if args.context else ""
    print(f"saved    {target}; go on with: python train.py --init {target} --data ... --out ...{context}")


@data.command("interrupted; nothing was written")
def main(arguments=None):
    try:
        run(parse_args(arguments))
    except torch.OutOfMemoryError as error:
        data.fail(f"out of memory ({str(error).splitlines()[0]}); give --device cpu")


if __name__ == "__main__":
    main()

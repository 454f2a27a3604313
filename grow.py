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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model as models

SHAPE = ("d_model", "n_layer", "n_head", "n_kv_head", "d_ff", "vocab_size")


# ---------------------------------------------------------------- shape

def target_config(config, method="exact", d_model=None, n_layer=None, n_head=None, n_kv_head=None,
                  d_ff=None, vocab_size=None):
    """The models.Config to grow to. What is not given follows d_model: heads keep their size where they can,
    key/value heads and d_ff their ratio. ValueError where the shape shrinks, or this method cannot reach
    it."""
    d_model = d_model or config.d_model
    width = d_model / config.d_model
    heads_of_same_size, rest = divmod(config.n_head * d_model, config.d_model)
    n_head = n_head or (config.n_head if rest else heads_of_same_size)
    group = config.n_head // config.n_kv_head
    n_kv_head = n_kv_head or n_head // group
    head_size = config.head_dim if "head_size" in config.family.fields else None    # of config.json
    rotary_share = config.partial_rotary_factor
    if config.model_type in ("phi", "phi3") and d_model // n_head > config.head_dim:
        # the same channels turn as before; one step up, as rotary_dims rounds down
        rotary_share = math.nextafter(config.rotary_dims / (d_model // n_head), 1)
    new = dataclasses.replace(
        config, d_model=d_model, n_layer=n_layer or config.n_layer, n_head=n_head, n_kv_head=n_kv_head,
        head_size=head_size, d_ff=d_ff or round(config.d_ff * width),
        vocab_size=vocab_size or config.vocab_size, partial_rotary_factor=rotary_share)
    for name in (*SHAPE, "head_dim"):
        if getattr(new, name) < getattr(config, name):
            raise ValueError(f"{name} {getattr(new, name)} is less than the source's "
                             f"{getattr(config, name)}; grow.py only enlarges (head_dim is d_model / n_head)")
    if method == "exact" and new.rotary_dims != config.rotary_dims:
        raise ValueError(f"heads of {new.head_dim} channels have no exact form, because they turn by other "
                         f"rotary frequencies than those of {config.head_dim}: give another --n-head")
    if method == "exact" and width % 1:
        new.norm_eps /= width       # as the variance, see norm_scale in grow
    return new


# ---------------------------------------------------------------- axes

# What new channels are: these multiples of the mean of the others, and of noise of the weights' scale
ZERO = 0.0, 0.0
MEAN = 1.0, 0.0         # a residual stream padded with its mean, which LayerNorm takes away
RANDOM = 0.0, 1.0
NEAR_MEAN = 1.0, 0.01   # new tokens, which are unlikely then


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
        query = kv_heads[head // new_group] * group + head % (neighbours * new_group) % group
        queries.append(-1 if (query - head) % stride else query)
    if not set(range(config.n_head)) <= set(queries):
        raise ValueError(f"{config.n_head} query heads on {config.n_kv_head} key/value heads have no exact "
                         f"form as {new.n_head} on {new.n_kv_head} (blocksparse stride {stride}); multiply "
                         "both by one whole number")
    return queries, kv_heads


def axis_table(config, new, method):
    """Module -> what its rows write, one for each matrix that is fused in it; what its columns read. Each is
    (for each channel the one that it copies, or -1: a new one; what new ones are)[, its scale]."""
    exact = method == "exact"
    reused = method == "wr"

    def repeat(name, padded=reused):
        """0, 1, ... and again from 0, or padded with new ones (-1)."""
        old = getattr(config, name)
        return [-1 if padded and i >= old else i % old for i in range(getattr(new, name))]

    def channels_of(heads):
        return [head * config.head_dim + channel if min(head, channel) >= 0 else -1
                for head in heads for channel in repeat("head_dim", True)]

    query_heads, kv_heads = head_sources(config, new) if exact else (repeat("n_head"), repeat("n_kv_head"))
    # exact: new channels of keys find nothing in those of queries, and those of values are not read
    queries = channels_of(query_heads), ZERO if exact else RANDOM
    query_scale = math.sqrt(new.head_dim / config.head_dim) if exact else 1.0   # softmax divides by its root
    keys = values = channels_of(kv_heads), RANDOM
    hidden = repeat("d_ff"), RANDOM
    tokens = repeat("vocab_size", True), NEAR_MEAN
    is_padded = {"exact": new.d_model % config.d_model > 0, "tile": False, "wr": True}[method]
    residual = repeat("d_model", is_padded)
    padding = MEAN if config.family.layer_norm else ZERO
    written = residual, RANDOM if reused else padding
    read = residual, RANDOM
    return {
        "embed_tokens": ([tokens], written),    # (vocab_size, d_model)
        "qkv_proj": ([(*queries, query_scale), keys, values], read),
        "o_proj": ([written], queries),
        "gate_up_proj": ([hidden] if config.family.activation == "gelu" else [hidden, hidden], read),
        "down_proj": ([written], hidden),
        "lm_head": ([tokens], read),
    }


def expand_rows(weight, source, new, share=1.0):
    """E W, times share: (a, ...) -> (b, ...)"""
    mean, noise = new
    grown = weight[source] * share
    is_new = torch.tensor(source) < 0
    grown[is_new] = mean * weight.mean(0) + noise * weight.std() * torch.randn_like(grown[is_new])
    return grown


def random_shares(weight, source, decibels):
    """S, another one for each row of the weight (o, a): (b, o)

    The shares of the copies of a channel add up to 1, so the output stays. They are equal but for noise of
    this signal-to-noise ratio, so copies receive different gradients (after HyperCloning, section 3.3).
    """
    n_out, n_in = weight.shape
    slots = torch.tensor(source, device=weight.device) % (n_in + 1)     # the last one is for new channels
    std = 2 ** 0.5 * 10 ** (-decibels / 20)     # of the logarithm; two copies differ by twice the noise
    share = weight.new_empty(len(source), n_out).normal_(std=std).exp()
    total = share.new_zeros(n_in + 1, n_out).index_add_(0, slots, share)
    return share / total[slots]


# ---------------------------------------------------------------- growing

def layer_sources(config, n_layer, exact):
    """For each new layer the source's layer, and whether it is inserted and adds nothing yet.

    round(i / n_layer · old), the map of phi-1's authors. Exact: of the copies of a layer the first stays,
    and the others' output projections are zero. Dense and sparse layers alternate by their number, so there
    whole periods are mapped. Example: 3 -> 6 layers is [0, 0, 1, 2, 2, 2]; exact inserts number 1, 4 and 5.
    """
    period = config.dense_every if exact else 1
    old = config.n_layer // period
    new = math.ceil(n_layer / period)
    sources = []
    for i in range(n_layer):
        layer = min(old - 1, round(i // period / new * old)) * period + i % period
        sources.append((layer, exact and (layer, False) in sources))
    return sources


@torch.no_grad()
def grow(model, method="exact", *, noise=10.0, seed=0, **target):
    """A larger models.Model with this one's knowledge; the source stays as it is.

    method: exact, the same function (HyperCloning, arXiv 2409.12903); tile, weights repeated as they are; wr,
    weights reused in the corner. target: some of SHAPE; what is not given follows d_model (see
    target_config). noise: signal-to-noise ratio in decibels of what tells copies apart, inf for none. Works
    in the weights' own type: 16 bits round. Memory: the two models and a few copies of one tensor.
    """
    config = model.config
    new = target_config(config, method, **target)
    exact = method == "exact"
    table = axis_table(config, new, method)
    residual, _ = table["lm_head"][1]

    # What has to be made up for: Gemma multiplies embeddings by sqrt(d_model), padding leaves 1 / width of
    # the variance, a tied output layer reads all copies in full
    width = new.d_model / config.d_model if exact else 1.0
    copies = 1.0 if width % 1 else width
    embed_scale = width ** -0.5 if config.model_type == "gemma" else 1.0
    norm_scale = (copies / width) ** 0.5
    final_scale = 1 / embed_scale / copies if config.tie_embeddings else 1.0

    def expand(module, kind, weight):
        if module.endswith("norm"):
            scale = final_scale if module == "norm" else 1.0
            if kind == "bias":
                return expand_rows(weight, residual, ZERO) * scale
            offset = config.family.norm_offset
            return expand_rows(weight + offset, residual, MEAN) * norm_scale * scale - offset
        rows, columns = table[module]
        parts = models.split_rows(config, weight, len(rows))
        grown = torch.cat([expand_rows(part, *axis) for part, axis in zip(parts, rows)])
        if kind == "bias":
            return grown
        share = embed_scale
        if module != "embed_tokens":
            share = random_shares(grown, columns[0], noise) if exact else 1.0
        return expand_rows(grown.T, *columns, share).T

    with torch.device("meta"):
        large = models.Model(new)
    source = model.state_dict()
    layers = layer_sources(config, new.n_layer, exact)
    weights = {}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for name in models.stored_parameters(large):
            number = re.search(r"\d+", name)
            layer, is_inserted = layers[int(number[0])] if number else (0, False)
            module, kind = name.split(".")[-2:]
            weights[name] = expand(module, kind, source[re.sub(r"\d+", str(layer), name)]).contiguous()
            if is_inserted and module in ("o_proj", "down_proj"):
                weights[name].zero_()
    large.load_state_dict(weights, strict=False, assign=True)
    large.tie_embeddings()
    return large.train(model.training)


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
    pairs = torch.arange(dims // 2, dtype=torch.float64)
    ntk = scale ** torch.linspace(0, 1, len(pairs), dtype=torch.float64)
    turns = original / (2 * math.pi * config.rope_theta ** (2 * pairs / dims))
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
    config = dataclasses.replace(model.config, max_seq_len=max_seq_len)
    if factors:
        config.original_max_seq_len = config.original_max_seq_len or model.config.max_seq_len
        config.short_factor = config.short_factor or [1.0] * len(factors)
        config.long_factor = list(factors)
        config.short_mscale = config.long_mscale = mscale
    model = copy.copy(model)
    model.config = config
    return model


@torch.no_grad()
def document_loss(model, documents):
    """Nats a token of documents (n, length + 1), one by one: the logits of a long one are many."""
    losses = [model(row[:, :-1], targets=row[:, 1:])[0] for row in documents.to(model.device).split(1)]
    return float(sum(losses)) / documents[:, 1:].numel()


def search(model, max_seq_len, documents, population, iterations, seed):
    """LongRoPE's evolutionary search for the long factors (arXiv 2402.13753, section 3.3 and algorithm 1).

    Factors rise from pair to pair and lie in [1, 1.25 scale], in steps of 0.01. PI, NTK, YaRN and the
    source's factors, if it has some, begin; the best half lives on beside a quarter of mutations and a
    quarter of crossovers of it. Without the paper's second variable, the number of first tokens that are not
    scaled: Hugging Face's models do not have it.
    """
    methods = rope_methods(model.config, max_seq_len)
    rng = np.random.default_rng(seed)

    @functools.cache
    def loss(factors):
        return document_loss(set_context(model, max_seq_len, factors), documents)

    best = [tuple(factors) for factors, _ in methods.values() if factors]
    for _ in tqdm(range(iterations), "searching", disable=None):
        a, b, c = np.array(best)[rng.integers(len(best), size=(3, population // 4))]    # (., rotary_dims / 2)
        mutated = a * rng.lognormal(0, 0.2, a.shape) ** (rng.random(a.shape) < 0.3)
        crossed = np.where(rng.random(a.shape) < 0.5, b, c)
        children = np.concatenate([mutated, crossed]).round(2).clip(1, 1.25 * methods["pi"][0][0])
        children.sort()     # any choice rises then
        best = sorted({*best, *map(tuple, children.tolist())}, key=loss)[:(population + 1) // 2]
    return list(best[0])


# ---------------------------------------------------------------- the command

OPTIONS = """
shape; what is not given follows d_model
--d-model N  -  channels of the residual stream
--n-layer N  -  layers
--n-head N  -  heads that ask
--n-kv-head N  -  heads of keys and values
--d-ff N  -  channels inside an MLP
--vocab-size N  -  tokens that are told apart
--method exact|tile|wr  exact  exact: the same function; tile: weights repeated as they are (phi-1's way); \
wr: weights reused in the corner, the rest is new
--noise DB  10.0  signal-to-noise ratio in decibels of what tells copies apart; inf: none

context
--context N  -  tokens of the new context
--rope searched|pi|ntk|yarn|none  searched  how to reach it
--data DATA  -  dataset (directory, or name under data/): factors are searched on half of its long \
documents, and all methods compared on the other half
--trained-context N  -  tokens a row that the source was trained on, where its config says more
--population N  64  factors alive in the search
--iterations N  40  generations of the search

machine
--device DEVICE  cpu  where to grow, check and search
--seed N  0  of noise, new weights and search
"""


def parse_args(arguments=None):
    parser = data.Parser(prog="grow.py", usage="grow.py SRC DST [options]", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="run directory, Hugging Face directory or hub name")
    parser.add_argument("target", metavar="DST", help="directory to write")
    parser.table(OPTIONS, DB=float, DEVICE={"cpu", models.default_device()})
    args = parser.parse_args(arguments)
    if args.rope != "searched" and not args.context:
        parser.error("--rope says how --context grows; give that too")
    if args.context and args.rope == "searched" and not args.data:
        parser.error("--rope searched needs --data with long documents; or give --rope yarn")
    return args


def read_stream(name, tokenizer):
    """Token ids of a dataset's validation split."""
    dataset = data.open_dataset(name if Path(name).is_dir() else Path("data", name))
    if not tokenizer or dataset.meta["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(f"--data {name} has another tokenizer than the source; make it again with data.py "
                         "--tokenizer SRC")
    return torch.from_numpy(dataset.val.astype("int64"))


def long_documents(stream, eot, length, count=10):
    """The beginnings of documents of more than `length` tokens, (n, length + 1), and what they are; where
    there are no two, pieces of the stream."""
    ends = (stream == eot).nonzero().flatten() + 1
    for kind, pieces in ((f"documents of more than {length:,} tokens", stream.tensor_split(ends)),
                         ("pieces of joined documents, as no two are so long", stream.split(length + 1))):
        rows = [piece[:length + 1] for piece in pieces if len(piece) > length]
        if len(rows) > 1:
            return torch.stack(rows[::max(1, len(rows) // count)][:count]), kind
    raise ValueError(f"--data holds {len(stream):,} tokens, too few for a length of {length:,}; give "
                     "longer documents")


def extend_context(args, model, tokenizer):
    """The model with --context by the method --rope; with --data, all methods' losses are printed."""
    methods = rope_methods(model.config, args.context)
    if args.data:
        stream = read_stream(args.data, tokenizer)
        documents, kind = long_documents(stream, tokenizer.eot, args.context)
        if args.rope == "searched":
            factors = search(model, args.context, documents[::2], args.population, args.iterations, args.seed)
            methods["searched"] = factors, None
        others = documents[1::2]
        print(f"context  loss on {len(others)} other {kind}:")
        for name, method in methods.items():
            loss = document_loss(set_context(model, args.context, *method), others)
            print(f"         {name:8} {loss:.4f}")
    return set_context(model, args.context, *methods[args.rope])


def describe(config):
    shape = [f"{name} {getattr(config, name)}" for name in SHAPE]
    return f"{config.num_parameters():,} parameters: {', '.join(shape)}"


@data.command("interrupted; nothing was written")
@torch.no_grad()
def main(arguments=None):
    args = parse_args(arguments)
    target = Path(args.target)
    if list(target.glob("state-*")) or target.resolve() == Path(args.source).resolve():
        raise ValueError(f"{target} is the source or a training run; give another DST, or delete it")
    source, tokenizer = models.load(args.source, args.device, torch.float32)
    config = source.config
    config.max_seq_len = args.trained_context or config.max_seq_len
    if args.context and args.context <= config.max_seq_len:
        raise ValueError(f"--context {args.context} is not more than the source's {config.max_seq_len} "
                         "already; grow.py only enlarges")
    print("source  ", describe(config))
    shape = {name: getattr(args, name) for name in SHAPE}
    grown = grow(source, args.method, noise=args.noise, seed=args.seed, **shape)
    if args.context:
        grown = extend_context(args, grown, tokenizer)
    print("target  ", describe(grown.config))

    tokens = torch.randint(config.vocab_size, (1, min(128, config.max_seq_len)), device=source.device)
    before, after = (model(tokens)[..., :config.vocab_size].softmax(-1) for model in (source, grown))
    difference = (after - before).abs().max() / before.max()
    verdict = "the same function" if difference < 1e-3 else "another function, to be trained on"
    print(f"check    largest difference {difference:.2g} of the largest probability: {verdict}")
    models.save(grown, tokenizer, target)
    print(f"saved    {target}; go on with: python train.py --init {target} --data ... --out ...")


if __name__ == "__main__":
    main()

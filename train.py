"""Pretraining and finetuning; with no options, the whole phi-1 recipe on this machine.

    python train.py                                                   # the recipe: data, teacher, pretraining, finetuning, pass@1
    python train.py --data web:0.4 textbooks:0.6 --out runs/base      # pretrain on a mixture of dataset directories
    python train.py --data exercises --init runs/base --out runs/sft  # go on from another run's weights
    python train.py --data long:0.3 web:0.7 --after runs/base --context 16384 --rope-theta 250000 --lr 3e-5 --out runs/mid   # next phase
    torchrun --nproc_per_node=8 train.py --data web --preset phi-3-mini --shard --recompute --out runs/mini   # one process for each GPU
    python train.py --preset phi-4 --dry-run --gpus 64 --shard --recompute --peak-tflops 990   # memory and days, before anything is taken

A run that was interrupted goes on exactly where it was when the same command is given again, on any number of processes: weights,
optimizer, position in the data and random state are in state.pt, or for --shard in the directory state-STEP, to which each process
writes its rows of every tensor. The run directory is at any time a model that sample.py, transformers and others open.
"""
import contextlib
import dataclasses
import datetime
import functools
import glob
import importlib.util
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import model as models

# ---------------------------------------------------------------------------------------------------------------------
# Batches: whole documents packed into rows


class Packer:
    """Rows of at most `length` + 1 tokens from a stream of documents, made of whole documents: endless and shuffled anew each epoch
    with a seed; without one, a single pass in order.

    A document longer than a row is cut into pieces that overlap by one token (so each token is predicted once), at an offset
    that moves from epoch to epoch. Pieces are placed best-fit into a few open rows, of which the fullest leaves when none fits:
    a few percent of padding, and no problem that loses its beginning. The state is small and makes a resumed run exact.
    """
    OPEN = 48  # rows open at a time: more waste less and delay documents longer

    def __init__(self, tokens, eot, length, seed=None):
        self.length, self.seed = length, seed
        ends = np.flatnonzero(tokens == eot) + 1
        if len(ends) == 0 or ends[-1] != len(tokens):
            ends = np.append(ends, len(tokens))
        starts = np.concatenate([[0], ends[:-1]])
        self.documents = np.stack([starts, ends])[:, ends - starts > 1]  # one token alone has nothing to predict
        self.restore({"epoch": 0, "next": 0, "rows": []})

    def state(self):
        return {"epoch": self.epoch, "next": self.next, "rows": [[used, list(spans)] for used, spans in self.rows]}

    def restore(self, state):
        """Cut and order the epoch's pieces, and take up the position in them."""
        self.epoch, self.next, self.rows = state["epoch"], state["next"], [[used, list(spans)] for used, spans in state["rows"]]
        (starts, ends), rng = self.documents, None if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        first = starts + 1 + self.length - (rng.integers(self.length, size=len(starts)) if rng else 0)
        first = np.where(ends <= starts + 1 + self.length, ends, first)  # where the first piece of each document ends
        count = 1 + -(-(ends - first) // self.length)
        number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        cuts = np.repeat(first, count) + number * self.length
        pieces = np.stack([np.where(number == 0, np.repeat(starts, count), cuts - self.length - 1), np.minimum(cuts, np.repeat(ends, count))], 1)
        self.pieces = rng.permutation(pieces) if rng else pieces

    def __iter__(self):
        return self

    def __next__(self):
        """The next row, as a list of (start, end) in the token stream; end - start - 1 summed is at most `length`."""
        while len(self.rows) <= self.OPEN:
            if self.next == len(self.pieces):
                if self.seed is None or not len(self.pieces):
                    break
                self.restore({"epoch": self.epoch + 1, "next": 0, "rows": self.rows})
            start, end = self.pieces[self.next].tolist()
            size = end - start - 1
            free = [(room, i) for i, (used, _) in enumerate(self.rows) if (room := self.length - used - size) >= 0]
            if free:
                row = self.rows[min(free)[1]]
                row[0] += size
                row[1].append((start, end))
            else:
                self.rows.append([size, [(start, end)]])
            self.next += 1
        if not self.rows:
            raise StopIteration
        return self.rows.pop(max(range(len(self.rows)), key=lambda i: self.rows[i][0]))[1]


def target_weights(mask, spans, prompt_weight):
    """float32, one for each prediction of a row: 1, or `prompt_weight` for a token of a prompt (mask 0)."""
    marks = [np.ones(end - start - 1, np.float32) if mask is None else np.asarray(mask[start + 1:end], np.float32) for start, end in spans]
    return np.concatenate(marks).clip(prompt_weight)


def collate(rows, length):
    """Rows [(tokens, spans, weights of their targets)] -> tokens, documents, targets (B, length) int64 and weights (B, length).

    Target t is the token after input t in the same document; padding has weight 0 and a document number of its own.
    """
    tokens, targets = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    documents, weights = np.full((len(rows), length), -1, np.int64), np.zeros((len(rows), length), np.float32)
    for i, (stream, spans, row_weights) in enumerate(rows):
        at = 0
        for number, (start, end) in enumerate(spans):
            to = at + end - start - 1
            tokens[i, at:to], targets[i, at:to] = stream[start:end - 1], stream[start + 1:end]
            documents[i, at:to] = number
            at = to
        weights[i, :at] = row_weights
    return tuple(torch.from_numpy(a) for a in (tokens, documents, targets, weights))


class Mixture:
    """Batches from several datasets: each row comes from one of them, drawn by weight. All ranks draw the same; each takes its rows."""

    def __init__(self, datasets, shares, eot, length, prompt_weight, seed):
        self.datasets, self.length, self.prompt_weight = datasets, length, prompt_weight
        self.shares = np.array(shares) / sum(shares)
        self.packers = [Packer(d.train, eot, length, seed + i) for i, d in enumerate(datasets)]
        self.rng, self.tokens = np.random.default_rng(seed), 0  # tokens: drawn so far, padding included

    def state(self):
        return {"packers": [p.state() for p in self.packers], "rng": self.rng.bit_generator.state, "tokens": self.tokens}

    def restore(self, state):
        self.tokens = state["tokens"]
        for packer, packed in zip(self.packers, state["packers"]):
            packer.restore(packed)
        self.rng.bit_generator.state = state["rng"]

    def rows(self, count):
        """The next `count` rows for collate."""
        self.tokens += count * self.length
        chosen = [int(self.rng.choice(len(self.shares), p=self.shares)) for _ in range(count)]
        drawn = [(self.datasets[i], next(self.packers[i])) for i in chosen]
        return [(d.train, spans, target_weights(d.train_mask, spans, self.prompt_weight)) for d, spans in drawn]


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


def is_sharded(tensor):
    return hasattr(tensor, "to_local")  # a DTensor; its class takes a second to import


def local(tensor):
    """This rank's rows of a sharded tensor, sharing their memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def rows_of(count, rank):
    """Which of a sharded tensor's `count` rows lie on a rank: fully_shard deals them out as torch.chunk does."""
    each = -(-count // dist.get_world_size())
    return range(min(rank * each, count), min((rank + 1) * each, count))


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz, for weight matrices (Jordan et al. 2024; update scaled to AdamW's RMS, Moonlight,
    arXiv 2502.16982 section 2.2).

    torch.optim.Muon runs one matrix at a time in bf16, which on a CPU without bf16 units is about 100 times slower than fp32; here
    matrices of one shape go through the iteration as a batch, in the dtype that is fast on the device.
    """
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, params, lr=0.01, momentum=0.95, weight_decay=0.0, steps=5, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for shape in dict.fromkeys(p.shape for p in params):
                same = [p for p in params if p.shape == shape]
                sharded = is_sharded(same[0])
                most = dist.get_world_size() if sharded else max(1, (1 << 28) // shape.numel())  # so many at a time bound the memory
                for some in (same[i:i + most] for i in range(0, len(same), most)):
                    for p in some:
                        if "momentum" not in self.state[p]:
                            self.state[p]["momentum"] = torch.zeros_like(p)
                    weights, grads, buffers = ([local(t) for t in tensors] for tensors in
                                               (some, [p.grad for p in some], [self.state[p]["momentum"] for p in some]))
                    torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                    x = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])).to(self.dtype)  # Nesterov; (n, rows, columns)
                    x = self.share_out(x, shape, group["steps"]) if sharded else self.orthogonalize(x, group["steps"])
                    update = x.to(weights[0].dtype) * (0.2 * math.sqrt(max(shape)))
                    torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_add_(weights, list(update.unbind()), alpha=-group["lr"])

    @classmethod
    def share_out(cls, x, shape, steps):
        """x (n, rows here, columns): this rank's rows of at most as many matrices as there are ranks -> the same rows, orthogonalized.

        Rank i is sent all rows of matrix i, works on it alone and sends everybody's rows back, so each matrix is done once.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        sent = [x[0].numel() if i < len(x) else 0 for i in range(world)]
        received = [len(rows_of(shape[0], i)) * shape[1] if rank < len(x) else 0 for i in range(world)]
        matrix, result = x.new_empty(sum(received)), x.new_empty(x.numel())
        dist.all_to_all_single(matrix, x.reshape(-1), received, sent)
        if rank < len(x):
            matrix = cls.orthogonalize(matrix.view(1, *shape), steps).reshape(-1)
        dist.all_to_all_single(result, matrix, sent, received)
        return result.view(x.shape)

    @classmethod
    def orthogonalize(cls, x, steps):
        """(n, rows, columns) -> nearly U V^T of each matrix's SVD: its singular values are driven into about [0.7, 1.2]."""
        tall = x.size(1) > x.size(2)
        x = x.mT if tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        a, b, c = cls.COEFFICIENTS
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x


def optimizers(model, args, dtype):
    """Muon for the matrices of the blocks (or AdamW for all), AdamW for embedding, head and norms. lr is scaled by the schedule."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2] if args.optimizer == "muon" else []
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": [p for p in rest if p.ndim == 2], "weight_decay": args.weight_decay},
              {"params": [p for p in rest if p.ndim != 2], "weight_decay": 0.0}]
    found = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), eps=1e-10, fused=True)]
    if hidden:
        found.append(Muon(hidden, lr=args.muon_lr, weight_decay=args.weight_decay, dtype=dtype))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return found


def schedule(step, args):
    """Share of the peak learning rate: linear warmup, plateau, and over the last `--decay` of the steps a fall to `--final-lr`."""
    warm = (step + 1) / max(1, args.warmup * args.steps)
    left = (args.steps - step) / max(1, args.decay * args.steps)
    if args.schedule == "constant":
        left = 1.0
    elif args.schedule == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
    return min(1.0, warm, args.final_lr + (1 - args.final_lr) * left)


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def measure_peak(device, dtype, size=None):
    """Matrix product rate in FLOP/s: what the share in the progress bar refers to. A CPU without bf16 units shows itself here."""
    size = size or (1024 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * size ** 3 / (time.perf_counter() - start))
    return best


def choose_dtype(device, wanted):
    """-> (torch dtype for matrix products, one line that says why). Weights and optimizer state stay in fp32."""
    if wanted != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted], "asked for"
    if device.type == "cuda":
        return (torch.bfloat16, "the GPU has bf16 units") if torch.cuda.get_device_capability() >= (8, 0) or torch.version.hip else \
            (torch.float32, "this GPU has no bf16 units")
    if device.type == "mps":
        return torch.float32, "on MPS bf16 brings little for small models"
    half, full = (measure_peak(device, dtype, 256) for dtype in (torch.bfloat16, torch.float32))
    reason = f"measured here: bf16 {half / 1e9:.0f}, fp32 {full / 1e9:.0f} GFLOP/s"
    return (torch.bfloat16 if half > 1.3 * full else torch.float32), reason


def compile_blocks(model, wanted, device):
    """Compile each block (all share one compilation) where a compiler is at hand -> one line that says what was done and why."""
    if wanted == "no":
        return "not compiled (asked for)"
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "not compiled: on CPUs without AVX-512 that was measured to be slower"
    if device.type == "cpu" and not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        return "not compiled: no C++ compiler (g++ or clang++) found"
    if device.type == "mps" or device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return f"not compiled: no Triton for {device.type}"
    for block in model.model.layers:  # forward alone: the hooks that gather a sharded block's weights stay outside
        block.forward = torch.compile(block.forward, dynamic=False)
    return "blocks compiled"


def flops_per_token(config, context):
    """Of forward and backward: 6 for each weight that multiplies, and attention over half a row on average."""
    return 6 * (config.num_parameters() - (0 if config.tie_embeddings else config.vocab_size * config.d_model)) + \
        3 * config.attention_flops() * context // (2 * config.max_seq_len)


def training_memory(config, tokens: int):
    """Bytes that train.py takes on one GPU with `tokens` tokens in a micro-batch: fp32 weights, their bf16 copies for the products,
    gradients, Muon's momentum for the blocks' matrices and AdamW's two moments for the rest, and what the backward pass needs."""
    n, d, wide, kv = config.num_parameters(), config.d_model, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    hidden = (2 if config.family.activation == "gelu" else 3) * config.d_ff
    matrices = config.n_layer * d * (2 * wide + 2 * kv + hidden)
    return {"weights, fp32": 4 * n, "weights, bf16 copies": 2 * matrices, "gradients": 4 * n, "optimizer": 4 * matrices + 8 * (n - matrices),
            "activations": 2 * tokens * config.n_layer * (4 * d + 2 * (wide + 2 * kv) + wide + hidden), "loss": 8 * tokens * config.vocab_size}


def memory(config, args, world):
    """{part: bytes on one GPU}: training_memory for our options."""
    tokens, n, ends = args.micro_batch * args.context, config.num_parameters(), config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    parts = training_memory(config, tokens)
    if args.optimizer == "adamw":
        parts["optimizer"] = 8 * n
    if args.recompute:  # what enters each block, and all of the one block whose turn it is
        parts["activations"] = parts["activations"] / config.n_layer + 2 * tokens * config.n_layer * config.d_model
    if args.shard:
        parts |= {part: parts[part] / world for part in ("weights, fp32", "gradients", "optimizer")}
        parts["weights, bf16 copies"] = 8 * (n - ends) / config.n_layer  # the block at work, the next one, and fp32 gradients of one
        parts["embedding and head"] = 8 * ends  # gathered during the whole pass, with their gradients
    return parts


def advice(args):
    """What to lower when memory does not suffice, and to what."""
    if args.micro_batch > 1:
        return f"lower --micro-tokens (now {args.micro_batch * args.context}) to {args.micro_batch // 2 * args.context}"
    if not args.recompute:
        return "add --recompute" + ("" if args.shard else ", and with several GPUs --shard")
    return f"lower --context (now {args.context}) to {args.context // 2}, or use more GPUs with --shard"


def dry_run(args, config):
    """Print what a run would take, in memory and in time, without taking it."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    world, device = args.gpus or max(1, here), torch.device("cuda" if here else "cpu")
    gigabytes = args.gpu_gb or (torch.cuda.get_device_properties(0).total_memory / 1e9 if here else 80)
    args.shard = args.shard and world > 1
    n_rows, mine = split_batch(args, world)
    parts = memory(config, args, world)
    print(f"model    {config.num_parameters():,} parameters; context {args.context}, {n_rows:,} rows a step on {world} GPU{'s' * (world > 1)}, "
          f"{args.micro_batch} at a time on each" + ", sharded" * args.shard + ", recomputed" * args.recompute)
    for part, size in {**parts, "all": sum(parts.values())}.items():
        print(f"  {part:26} {size / 1e9:10.2f} GB")
    for args.micro_batch in [rows for rows in range(mine, 0, -1) if mine % rows == 0]:
        fits = sum(memory(config, args, world).values()) <= 0.92e9 * gigabytes
        if fits:
            break
    print(f"memory   of {gigabytes:.0f} GB, 8 % kept free: " +
          (f"--micro-tokens {args.micro_batch * args.context} fits" if fits else f"not even one row fits; {advice(args)}"))
    peak, tokens = (args.peak_tflops or 0) * 1e12 or measure_peak(device, choose_dtype(device, args.dtype)[0]), args.steps * args.batch_tokens
    rate = 0.4 * peak * world / (flops_per_token(config, args.context) * (4 / 3 if args.recompute else 1))
    print(f"speed    {rate:,.0f} tokens/s, assuming 40 % of the peak, {peak / 1e12:,.1f} TFLOP/s ("
          + ("--peak-tflops" if args.peak_tflops else f"measured on this {device.type}") + ")")
    print(f"time     {tokens / 1e9:,.1f} B tokens in {args.steps:,} steps: {tokens / rate / 86400:,.1f} days, {tokens / rate / 3600 * world:,.0f} GPU-hours")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and records


@torch.no_grad()
def evaluate(model, datasets, eot, tokenizer, args, device, autocast, rank=0, world=1):
    """-> {dataset: (nats a token, bits a byte)} over the first `--val-tokens` of its validation split, every token predicted once.

    Bits a byte compare across tokenizers; the end token costs bits and has no bytes. Where prompts are marked only solutions count.
    """
    sizes = torch.tensor([0 if i == tokenizer.eot else len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    model.eval()
    results = {}
    for dataset in datasets:
        stream = dataset.val[:args.val_tokens]
        rows = [(stream, spans, target_weights(dataset.val_mask, spans, 0)) for spans in Packer(stream, eot, args.context)]
        sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
        for i in range(0, len(rows), world * args.micro_batch):
            chunk = rows[i + rank * args.micro_batch:][:args.micro_batch]
            tokens, documents, targets, weights = collate(chunk + rows[:1] * (args.micro_batch - len(chunk)), args.context)
            weights[len(chunk):] = 0  # all ranks run full micro-batches: one shape to compile, and sharded weights are gathered together
            with autocast():
                nats, count = model(tokens.to(device), documents.to(device), targets.to(device), weights.to(device))
            sums += torch.tensor([nats.item(), count.item(), (sizes[targets] * weights).sum().item()], dtype=torch.float64)
        if world > 1:
            everywhere = sums.to(device, torch.float32 if device.type == "mps" else None)
            dist.all_reduce(everywhere)
            sums = everywhere.cpu()
        nats, count, n_bytes = sums.tolist()
        results[dataset.name] = nats / max(count, 1), nats / math.log(2) / max(n_bytes, 1)
    if args.shard:
        model.reshard()  # without a backward pass the root stays gathered
    model.train()
    return results


def chart(curves, title, ticks, unit="", log_x=False, log_y=True):
    """{name: [(x, y) or (x, y, low, high)]} as a small SVG picture, the band from low to high shaded; ticks: the x to name, and their names."""
    forward, f = (math.log if log_y else float), (math.log if log_x else float)
    points = [p for curve in curves.values() for p in curve]
    bounds = [forward(value) for p in points for value in p[1:] if value > 0 or not log_y]
    if not bounds:
        return ""
    low, high, left, right = min(bounds), max(bounds), f(min([*ticks, *(p[0] for p in points)])), f(max([*ticks, *(p[0] for p in points)]))
    high, right = max(high, low + 0.01), max(right, left + 1e-9)

    def x(value):
        return f"{60 + 600 * (f(value) - left) / (right - left):.1f}"

    def y(value):
        return f"{20 + 300 * (high - (max(forward(value), low) if value > 0 or not log_y else low)) / (high - low):.1f}"
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 410" font-family="sans-serif" font-size="12">',
             '<rect width="700" height="410" fill="white"/>', f'<text x="60" y="14">{title}</text>', f'<text x="660" y="352" text-anchor="end">{unit}</text>']
    for i in range(5):
        value = low + (high - low) * i / 4
        parts.append(f'<text x="8" y="{324 - 75 * i}">{math.exp(value) if log_y else value:.3g}</text><path d="M60 {320 - 75 * i}h600" stroke="#ddd"/>')
    parts += [f'<text x="{x(at)}" y="338" text-anchor="middle">{text}</text>' for at, text in ticks.items()]
    for i, ((name, curve), color) in enumerate(zip(curves.items(), itertools.cycle(("#8888aa", "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#e08214", "#111111", "#17becf")))):
        if band := [p for p in curve if len(p) == 4]:
            corners = [f"{x(at)},{y(bottom)}" for at, _, bottom, _ in band] + [f"{x(at)},{y(top)}" for at, _, _, top in band[::-1]]
            parts.append(f'<polygon fill="{color}" fill-opacity="0.15" points="{" ".join(corners)}"/>')
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{" ".join(f"{x(p[0])},{y(p[1])}" for p in curve)}"/>')
        parts.append(f'<text x="{60 + 200 * (i % 3)}" y="{370 + 16 * (i // 3)}" fill="{color}">{name}</text>')
    return "\n".join(parts + ["</svg>\n"])


def loss_svg(records, title, key="loss", unit="loss (nats a token)"):
    """The curves of log.jsonl's records, of the loss or another `key`, over tokens."""
    curves = {"training": [(r["tokens"], r[key]) for r in records if key in r]}
    for r in records:
        for name, (value, _) in r.get("val", {}).items():
            curves.setdefault(f"{name} validation", []).append((r["tokens"], value))
    end = max([r["tokens"] for r in records], default=0)
    return chart({name: curve for name, curve in curves.items() if curve}, f"{title}: {unit} over tokens",
                 {end * i / 4: f"{end * i / 4e6:.3g} M" for i in range(5)})


# ---------------------------------------------------------------------------------------------------------------------
# Training


def open_mixture(entries):
    """["web:0.4", "textbooks"] -> (datasets, weights, tokenizer); names stand for data/NAME; all must share one tokenizer."""
    datasets, shares = [], []
    for entry in entries:
        name, _, share = entry.partition(":") if not os.path.isdir(entry) else (entry, "", "")
        try:
            shares.append(float(share or 1))
        except ValueError:
            shares.append(-1)
        if not 0 < shares[-1] < math.inf:
            data.fail(f"--data {entry}: write NAME or NAME:WEIGHT with a weight above 0, such as web:0.4")
        datasets.append(data.open_dataset(name if os.path.isdir(name) else os.path.join("data", name)))
        datasets[-1].name = datasets[-1].path.name
    first = datasets[0]
    for other in datasets[1:]:
        if other.meta["tokenizer"] != first.meta["tokenizer"]:
            data.fail(f"{other.path} was made with another tokenizer than {first.path}; make it again with data.py --tokenizer {first.path}")
    return datasets, shares, models.Tokenizer.load(first.path)


def choose_config(args, tokenizer):
    """The shape to train, with args.context settled: that of --init or --after, or the preset's with the shape options applied and the
    tokenizer's vocabulary (without data, in a dry run, the preset's own)."""
    shape = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    start, option = args.init or args.after, "--init" if args.init else "--after"
    if not start:
        base = models.PRESETS[args.preset or "laptop"]
        args.context = args.context or 512
        vocab = -(-tokenizer.vocab_size // 64) * 64 if tokenizer else base.vocab_size  # matrix products like multiples of 64
        config = dataclasses.replace(base, vocab_size=vocab, dummy_tokens=[], **shape)
    else:
        if args.init and args.after:
            data.fail("--init takes a run's weights, --after its optimizer state too; give one of them")
        if shape or args.preset:
            data.fail(f"{option} {start} brings its own shape; leave out {', '.join('--' + n.replace('_', '-') for n in shape) or '--preset'}")
        folder = models.snapshot_download(start)
        if not os.path.isfile(os.path.join(folder, "config.json")):
            data.fail(f"{option} {start}: no model there (config.json is missing); give a run directory, a Hugging Face directory or a hub name")
        config = models.read_config(os.path.join(folder, "config.json"))
        args.context = args.context or config.max_seq_len
        if args.context > config.max_seq_len and not args.rope_theta:
            data.fail(f"--context {args.context} is longer than the {config.max_seq_len} tokens of {start}; lower it, or give a larger --rope-theta "
                 f"than its {config.rope_theta:g} as well")
        if tokenizer and models.Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
            data.fail(f"{option} {start} has another tokenizer than the data; make the data again with data.py --tokenizer {start}")
    return dataclasses.replace(config, max_seq_len=max(args.context, config.max_seq_len), rope_theta=args.rope_theta or config.rope_theta)


def split_batch(args, world):
    """Settle args.micro_batch, in rows -> (rows a step, of which each process takes so many)."""
    n_rows = args.batch_tokens // args.context
    if n_rows < world or n_rows % world:
        data.fail(f"--batch-tokens {args.batch_tokens} makes {n_rows} rows of --context {args.context}; it must be a multiple of "
             f"{args.context} x {world} processes, such as {max(1, round(n_rows / world)) * world * args.context}")
    mine = n_rows // world
    args.micro_batch = max(n for n in range(1, mine + 1) if mine % n == 0 and (n == 1 or n * args.context <= args.micro_tokens))
    return n_rows, mine


# ---------------------------------------------------------------------------------------------------------------------
# The model on its device, and its checkpoints


@torch.no_grad()
def fill(tensor, parts):
    """Copy into `tensor`, or into this rank's rows of it, the same tensor stored as consecutive rows in one or more `parts`."""
    to, at = local(tensor), -rows_of(len(tensor), dist.get_rank()).start if is_sharded(tensor) else 0
    for part in parts if to.dim() else ():  # its first row is row `at` here
        begin, end = max(0, at), min(len(to), at + len(part))
        if begin < end:
            to[begin:end].copy_(part[begin - at:end - at])
        at += len(part)
    if not to.dim():  # a number, the same in all parts
        to.copy_(parts[0])


def build(config, args, device, dtype, fresh):
    """The model on `device`: with --init's weights or drawn anew if `fresh`, else with memory for a checkpoint to fill.

    With --shard each rank holds its rows of every tensor in fp32. A block's are gathered in the type of the products when its turn
    comes; embedding, last norm and head belong to the root and stay gathered. Rank 0 alone has the whole model to begin with.
    """
    def whole():
        if not args.init:
            return models.Model(config)
        model, _ = models.load(args.init, device="cpu", dtype=torch.float32)
        model.config = config  # which may have a longer context
        return model
    if fresh and not args.shard:
        return whole().to(device)
    with torch.device("meta"):
        model = models.Model(config)
    if args.shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        products = MixedPrecisionPolicy(dtype if dtype != torch.float32 else None, torch.float32, cast_forward_inputs=False)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=products)
        fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.tie_embeddings()
    if fresh:
        source = dict(whole().named_parameters()) if dist.get_rank() == 0 else {}
        for name, p in model.named_parameters():
            tensor = source[name].detach().to(device) if source else torch.empty(p.shape, device=device)
            dist.broadcast(tensor, 0)
            fill(p, [tensor])
    return model


def training_state(model, found):
    """{name: tensor} of the weights, and under "name/key" of what the optimizers keep of each; sharded ones as this rank's rows."""
    names = {p: name for name, p in model.named_parameters()}
    kept = {f"{names[p]}/{key}": value for optimizer in found for p, entry in optimizer.state.items() for key, value in entry.items()}
    return {name: local(tensor.detach()) for name, tensor in [*model.named_parameters(), *kept.items()]}


def restore(model, found, stored):
    """Fill weights and optimizers from `stored`, {name as in training_state: the whole tensor's rows in one or more parts}."""
    parameters, owner = dict(model.named_parameters()), {p: o for o in found for group in o.param_groups for p in group["params"]}
    for entry, parts in stored.items():
        name, _, key = entry.partition("/")
        tensor = p = parameters[name]
        if key:
            tensor = owner[p].state[p][key] = torch.zeros_like(p) if parts[0].dim() else torch.zeros((), device=p.device)
        fill(tensor, parts)


def read_state(run):
    """The newest checkpoint of a run, whichever kind it is and however many processes wrote it; None if there is none.

    {"step", "records", "recipe", "mixture", "rng", "tensors": as restore wants them}; tensors are mapped, not read.
    """
    newest = None
    for file in [os.path.join(run, "state.pt"), *glob.glob(os.path.join(glob.escape(run), "state-*", "meta.pt"))]:
        if os.path.exists(file):
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                if newest is None or state["step"] > newest["step"]:
                    newest = state | {"file": file}
            except Exception as error:
                data.fail(f"{file} cannot be read ({type(error).__name__}); delete {run} to start again")
    if newest and "tensors" in newest:
        newest["tensors"] = {name: [tensor] for name, tensor in newest["tensors"].items()}
    elif newest:
        folder, newest["tensors"] = os.path.dirname(newest["file"]), {}
        files = [os.path.join(folder, f"rank-{rank:05d}.safetensors") for rank in range(newest["world"])]
        for file in files:
            if not os.path.exists(file):
                data.fail(f"{file} is missing; --out must lie where the processes of all machines see it")
            for name, tensor in models.read_safetensors(file).items():
                newest["tensors"].setdefault(name, []).append(tensor)
    return newest


def write_state(run, state, tensors, sharded):
    """Write a checkpoint, then delete its predecessor: whenever the process is killed, the newest whole one can be read.

    Plain: state.pt, by rank 0. Sharded: the directory state-STEP appears under that name when all ranks have written their part;
    tensors None: it is there already, and only the rest has changed.
    """
    rank, current = dist.get_rank() if sharded else 0, os.path.join(run, f"state-{state['step']:08d}" if sharded else "state.pt")
    if sharded and tensors is not None:
        aside = os.path.join(run, "state.tmp")
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.makedirs(aside)
        dist.barrier()
        models.write_safetensors(os.path.join(aside, f"rank-{rank:05d}.safetensors"), tensors)
        if rank == 0:
            write_torch(os.path.join(aside, "meta.pt"), state)
        dist.barrier()
        if rank == 0:
            os.rename(aside, current)
    elif rank == 0:
        write_torch(os.path.join(current, "meta.pt") if sharded else current, state if sharded else state | {"tensors": tensors})
    if rank == 0:
        for path in glob.glob(os.path.join(glob.escape(run), "state[-.]*")):
            if path != current:
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def write_torch(path, value):
    models.write_atomically(path, lambda file: torch.save(value, file))


def write_weights(run, model, tokenizer, step, sharded):
    """The Hugging Face directory. Sharded: tensors are gathered one by one and leave rank 0 in files of up to FILE_BYTES; the files'
    names change with the step and the index is replaced last, so that it never names files of two steps."""
    first = not sharded or dist.get_rank() == 0
    if not sharded:
        models.save(model, tokenizer, run)
        keep = {"model.safetensors"}
    else:
        def part(tensors):  # as model.py sees a model that has these weights alone
            return types.SimpleNamespace(config=model.config, model=model.model, modules=list, state_dict=lambda: tensors)
        files, room, weight_map, sizes = [], 0, {}, {name: 4 * p.numel() for name, p in model.named_parameters()}
        for name, size in sizes.items():
            if room < size:
                files.append([])
                room = FILE_BYTES
            files[-1].append(name)
            room -= size
        for number, names in enumerate(files, 1):
            whole = {}
            for name in names:
                tensor = model.get_parameter(name).detach().full_tensor()  # all ranks take part
                if first:
                    whole[name] = tensor.cpu()
            if first:
                theirs, file = models.to_hf(part(whole)), f"model-{step:08d}-{number:05d}-of-{len(files):05d}.safetensors"
                models.write_safetensors(os.path.join(run, file), theirs)
                weight_map |= dict.fromkeys(theirs, file)
        if first:
            aside, index = os.path.join(run, "files.tmp"), {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            shutil.rmtree(aside, ignore_errors=True)
            models.save(part({}), tokenizer, aside)
            os.remove(os.path.join(aside, "model.safetensors"))
            for file in os.listdir(aside):
                os.replace(os.path.join(aside, file), os.path.join(run, file))
            os.rmdir(aside)
            models.write_atomically(os.path.join(run, "model.safetensors.index.json"), lambda file: file.write(json.dumps(index, indent=2).encode()))
        keep = {"model.safetensors.index.json", *weight_map.values()}
    for path in glob.glob(os.path.join(glob.escape(run), "model*.safetensors*")) if first else ():
        if os.path.basename(path) not in keep:
            os.remove(path)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Pretraining:
    """What the loop trains on and how, here the next token of documents. align.py has the other tasks, made of the same parts.

    A row is what the loop counts, deals out to ranks and takes a few of at a time. All ranks draw the same rows.
    """
    curve = {}  # arguments of loss_svg
    sums = 1    # how many are reported
    fingerprints = ()  # of the datasets; align.py's tasks compare a digest of their own

    def __init__(self, args):
        self.args, self.exact = args, EXACT  # exact: the options that a resumed run must share with its beginning
        self.datasets, self.shares, self.tokenizer = open_mixture(args.data)
        self.config, self.eot = choose_config(args, self.tokenizer), self.tokenizer.eot
        self.fingerprints = [dataset.meta.get("fingerprint") for dataset in self.datasets]

    def split(self, world):
        """Settle args.micro_batch, the rows taken at a time -> rows a step."""
        return split_batch(self.args, world)[0]

    def begin(self, run):
        """Take the run's model, device, dtype, autocast, rank, world, resumed -> (its data in words, the module whose forward takes a batch and
        gives the summed loss and a tensor of sums to report). Weights are in place, a state is restored after this."""
        self.run, args = run, self.args
        self.mixture = Mixture(self.datasets, self.shares, self.eot, args.context, args.prompt_weight, args.seed)
        shown = ", ".join(f"{d.name} {s / sum(self.shares):.0%}" for d, s in zip(self.datasets, self.shares))
        return (f"{shown}; {args.steps * args.batch_tokens / 1e6:.1f} M tokens in {args.steps:,} steps of {args.batch_tokens // args.context:,} x "
                f"{args.context}"), run.model

    @property
    def tokens(self):
        """So many rows' worth were trained on."""
        return self.mixture.tokens

    def state(self):
        return self.mixture.state()

    def restore(self, state):
        self.mixture.restore(state)

    def rows(self, count):
        return self.mixture.rows(count)

    def weight(self, rows):
        """What the summed loss of `rows` is divided by, over all ranks and micro-batches: each target counts the same."""
        return sum(float(weights.sum()) for *_, weights in rows)

    def collate(self, rows):
        batch = collate(rows, self.args.context)
        skip = getattr(self.args, "skip", None)
        return (*batch, models.layers_of_targets(batch[1], batch[3], skip)) if skip else batch

    def entry(self, sums):
        """What log.jsonl says besides the loss, from the modules' tensors summed over steps and ranks."""
        return {}

    def where(self, rows):
        places = sorted({(d.name, spans[0][0]) for d in self.datasets for stream, spans, _ in rows if stream is d.train})
        return f"rows that begin at tokens {places[:4]} …"

    def validate(self):
        """-> (entry of log.jsonl, the same in words); or None."""
        run = self.run
        results = evaluate(run.model, self.datasets, self.eot, self.tokenizer, self.args, run.device, run.autocast, run.rank, run.world)
        return {"val": results}, ", ".join(f"{name} {nats:.4f} nats a token, {bits:.4f} bits a byte" for name, (nats, bits) in results.items())


class Stop:
    """Ctrl-C and SIGTERM ask the loop to save and leave after the step at hand; a second one ends the process at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number


def train(args, kind=Pretraining):
    """Train by `args` on a task of this kind, or go on with it."""
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device(models.default_device() if args.device == "auto" else args.device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    args.shard = args.shard and world > 1
    if world > 1:  # torchrun ends the job when a rank dies; the timeout is for machines that fall silent, and longer than rank 0 saves
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=10))

    def say(text):
        if rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    task = kind(args)
    config, tokenizer, n_rows = task.config, task.tokenizer, task.split(world)
    out, step, records = args.out, 0, []
    recipe = {name: value for name, value in vars(args).items() if name in task.exact}
    for path in glob.glob(os.path.join(glob.escape(out), "*.tmp")) if rank == 0 else ():  # what a killed process was writing
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    state = read_state(out)
    if state:
        changed = [name for name in recipe if recipe[name] != state["recipe"].get(name)]
        if changed:
            name = changed[0]
            data.fail(f"{out} was made with --{name.replace('_', '-')} {state['recipe'].get(name)}, not {recipe[name]}; give that, or another --out")
        for name, began_with, now in zip(args.data, state.get("datasets", ()), task.fingerprints):
            if began_with != now:
                data.fail(f"--data {name} was made anew since {out} began, and has other tokens; make it as it was, "
                          f"or give another --out (with --after {out} its weights and optimizer go on with these)")
        step, records = state["step"], state["records"]
        if step >= args.steps:
            say(f"{out} is trained already ({step:,} steps); give another --out, or delete it, to train again")
            return
        say(f"going on from step {step:,} of {args.steps:,} in {out}")
    elif glob.glob(os.path.join(glob.escape(out), "model*.safetensors*")):
        data.fail(f"{out} holds a model without a training state; give another --out, or delete it")
    before = None
    if args.after and not state:
        before = read_state(args.after) or data.fail(f"--after {args.after} has no training state; give --init for its weights alone")
        if before["recipe"]["optimizer"] != args.optimizer:
            data.fail(f"--after {args.after} was trained with --optimizer {before['recipe']['optimizer']}; give the same")
        say(f"weights and optimizer state of step {before['step']:,} of {args.after}")

    if device.type == "cuda":
        needed, room = sum(memory(config, args, world).values()), torch.cuda.get_device_properties(device).total_memory
        say(f"memory   about {needed / 1e9:.1f} of {room / 1e9:.1f} GB" + (f": if it does not suffice, {advice(args)}" if needed > 0.9 * room else ""))
    torch.manual_seed(args.seed)
    dtype, reason = choose_dtype(device, args.dtype)
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext
    if getattr(args, "skip", None) and not (len(args.skip) == 3 and args.skip[0] <= config.n_layer):
        data.fail(f"--skip {':'.join(map(str, args.skip))} must be MAX:MIN:TOKENS with MAX at most the {config.n_layer} layers")
    model = build(config, args, device, dtype, fresh=not (state or before))
    model.train()
    found = optimizers(model, args, dtype)
    if state or before:
        restore(model, found, (state or before)["tensors"])
    about, module = task.begin(types.SimpleNamespace(model=model, device=device, dtype=dtype, autocast=autocast, rank=rank, world=world,
                                                     resumed=bool(state)))
    if state:
        task.restore(state["mixture"])
        torch.set_rng_state(state["rng"])
    saved_step, state, before = (step if state else None), None, None

    peak = measure_peak(device, dtype)
    say(f"model    {model.config.num_parameters():,} parameters: {model.config.n_layer} layers, {model.config.d_model} wide, {model.config.n_head} "
        f"query and {model.config.n_kv_head} key/value heads, vocabulary {model.config.vocab_size}")
    say(f"data     {about}, {args.micro_batch} rows at a time" + (f" on each of {world} processes" if world > 1 else ""))
    say(f"device   {device}: products in {str(dtype)[6:]} ({reason}), peak {peak / 1e9:,.0f} GFLOP/s; {compile_blocks(model, args.compile, device)}")
    wrapped, work = module, flops_per_token(config, args.context)
    for block in model.model.layers if args.recompute else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if world > 1 and not args.shard:
        wrapped = DistributedDataParallel(module, device_ids=[local_rank] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    stop = Stop()
    progress = tqdm(total=args.steps, initial=step, disable=None if rank == 0 else True, desc=os.path.basename(out), unit="step")
    log_file = os.path.join(out, "log.jsonl")
    if rank == 0:  # what was logged after the checkpoint will be logged again
        models.write_atomically(log_file, lambda file: file.write("".join(json.dumps(r) + "\n" for r in records).encode()))

    def save():
        nonlocal saved_step
        state = {"recipe": recipe, "datasets": list(task.fingerprints), "step": step, "records": records,
                 "mixture": task.state(), "rng": torch.get_rng_state(), "world": world}
        if rank == 0 or args.shard:
            known = args.shard and saved_step == step  # the save after the last validation, which adds its record
            write_state(out, state, None if known else training_state(model, found), args.shard)  # first, and enough to go on from by itself
            if saved_step != step:
                write_weights(out, model, tokenizer, step, args.shard)
        saved_step = step
        if rank == 0:
            models.write_atomically(os.path.join(out, "loss.svg"), lambda f: f.write(loss_svg(records, out, **task.curve).encode()))

    def record(entry):
        records.append({"step": step, "tokens": task.tokens, **entry})
        if rank == 0:
            with open(log_file, "a") as file:
                file.write(json.dumps(records[-1]) + "\n")

    def validate():
        if found := task.validate():
            record(found[0])
            say(f"step {step:6,}  validation {found[1]}")

    if step and step % args.val_every == 0 and not any("val" in r and r["step"] == step for r in records):
        validate()  # the run was cut between its checkpoint and its evaluation
    log = {"loss": 0.0, "sums": 0.0, "steps": 0, "tokens": task.tokens, "start": time.perf_counter()}
    first = step
    while step < args.steps:
        for optimizer in found:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step, args)
        rows = task.rows(n_rows)
        total, mine = task.weight(rows), -(-len(rows) // world)
        loss, sums = 0.0, torch.zeros(task.sums)
        for i in range(0, mine, args.micro_batch):
            batch = task.collate(rows[rank::world][i:i + args.micro_batch])
            last = i + args.micro_batch >= mine
            if args.shard:
                model.set_requires_gradient_sync(last)
            with autocast(), contextlib.nullcontext() if last or wrapped is module else wrapped.no_sync():
                nats, part_sums = wrapped(*(t.to(device, non_blocking=True) for t in batch))
                part = nats * (world / max(total, 1e-9))  # gradients are averaged over ranks
                part.backward()
            loss, sums = loss + part.item() / world, sums + part_sums.detach().cpu().reshape(-1)
        flags = torch.tensor([loss, float(stop.signal), *sums.tolist()], device=device)
        if world > 1:  # the loss of the whole batch, and whether any rank was asked to stop
            dist.all_reduce(flags)
        loss, asked, *sums = flags.tolist()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        norm = (norm.full_tensor() if is_sharded(norm) else norm).item()
        # Both are equal on all ranks; once the weights have taken what is not finite, a save would write them.
        if not math.isfinite(loss + norm):
            saved = "nothing was saved yet"
            if saved_step == step:
                saved = f"the checkpoint in {out} has these very weights"
            elif saved_step is not None:
                saved = f"the last good checkpoint is that of step {saved_step:,} in {out}"
            data.fail(f"at step {step:,} the loss is {loss} and the norm of its gradient {norm} "
                      f"({task.where(rows)}); {saved}; lower --lr and --muon-lr", 1)
        for optimizer in found:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        progress.update()
        if step == first + 1:  # which compiled and took memory
            warm = time.perf_counter()
        elif step == first + 10 and step < args.steps:
            left = datetime.timedelta(seconds=round((args.steps - step) * (time.perf_counter() - warm) / 9))
            say(f"time     about {left} for the {args.steps - step:,} steps left, by the first ten")
        log["loss"], log["sums"], log["steps"] = log["loss"] + loss, log["sums"] + np.array(sums), log["steps"] + 1
        if step % args.log_every == 0 or step == args.steps:
            seconds = time.perf_counter() - log["start"]
            rate = (task.tokens - log["tokens"]) / seconds
            share = rate * work / (peak * world)
            more = task.entry(log["sums"].tolist())
            record({"loss": log["loss"] / log["steps"], **more, "grad_norm": norm, "lr": schedule(step - 1, args) * args.lr,
                    "tokens_per_second": round(rate), "seconds": round(seconds, 3), "peak_share": round(share, 3)})
            progress.set_postfix_str(f"loss {log['loss'] / log['steps']:.3f}, " + "".join(f"{name} {value:.3f}, " for name, value in more.items())
                                     + f"{rate:,.0f} tokens/s, {share:.0%} of peak")
            log = {"loss": 0.0, "sums": 0.0, "steps": 0, "tokens": task.tokens, "start": time.perf_counter()}
        if asked or step % args.save_every == 0 or step == args.steps:
            pause = time.perf_counter()
            save()
            log["start"] += time.perf_counter() - pause
        if asked:
            progress.close()
            number = stop.signal or signal.SIGTERM
            say(f"stopped; saved at step {step:,} in {out}: give the same command to go on")
            raise SystemExit(128 + number)
        if step % args.val_every == 0 or step == args.steps:
            pause = time.perf_counter()
            validate()
            log["start"] += time.perf_counter() - pause
    progress.close()
    save()
    trained = [r for r in records if "loss" in r]
    seconds = sum(r["seconds"] for r in trained)
    say(f"saved    {out}: {args.steps:,} steps, {task.tokens:,} tokens in {seconds:.1f} s of stepping "
        f"({task.tokens / max(seconds, 1e-9):,.0f} tokens/s)")
    if world > 1:
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # without the interpreter's shutdown, in which a thread of the process group aborted once in some hundred runs


# ---------------------------------------------------------------------------------------------------------------------
# The recipe: every stage is one command, printed before it runs, and its product is reused when it is there already


def recipe_stages(quick):
    """[(title, why, command, product, expected seconds on two 2020s laptop cores)]; `quick` is the short version."""
    root, runs = ("data/quick", "runs/quick") if quick else ("data", "runs")
    pages, problems, held_out, web = (1000, 16_000, 200, 1_000_000) if quick else (6000, 22_000, 600, 6_000_000)
    learned, asked = ("1-2", "2-3") if quick else ("1-4", "2-6")
    pretrain, finetune, rows = (40, 1200, "--context 192 --batch-tokens 1536") if quick else (300, 1900, "--context 384 --batch-tokens 2304")
    bpe, rates = f"--tokenizer {root}/textbooks --out {root}", "--lr 0.02 --muon-lr 0.008"
    test, solve = f"{root}/test.jsonl", "--max-tokens 400 --show"
    return [
        ("textbooks", "a template teacher writes pages; every example on them is executed",
         f"synth.py textbooks --count {pages} --k {'1-2' if quick else '1,1,1,2,2,3'} --out {root}/textbooks.jsonl", f"{root}/textbooks.jsonl", pages / 1000),
        ("exercises", f"problems with solutions and tests: chains of {learned} operations",
         f"synth.py exercises --count {problems} --k {learned} --out {root}/exercises.jsonl", f"{root}/exercises.jsonl", problems / 1400),
        ("held-out problems", f"compositions that no page and no exercise contains, chains of {asked} operations",
         f"synth.py exercises --split test --k {asked} --count {held_out} --out {test}", test, held_out / 100),
        ("tokenize textbooks", "a byte-level BPE of 1,024 tokens is trained on them",
         f"data.py --input {root}/textbooks.jsonl --name textbooks --tokenizer train:1024 --rules none --dedup-threshold 1 --out {root}",
         f"{root}/textbooks", 4),
        ("tokenize exercises", "prompts are marked, so that finetuning can leave them out",
         f"data.py --input {root}/exercises.jsonl --name exercises --rules none --dedup-threshold 1 {bpe}", f"{root}/exercises", 4),
        ("filter the web", "this machine's own Python source, cleaned and deduplicated",
         f"data.py --input python --name web --max-bytes {web} {bpe}", f"{root}/web", 7),
        ("pretrain", "filtered code and textbooks (phi-1's CodeTextbook)",
         f"train.py --data {root}/web:0.2 {root}/textbooks:0.8 {rates} --context 384 --batch-tokens 3072 --steps {pretrain} --out {runs}/base",
         f"{runs}/base", None),
        ("evaluate the base", "solves the held-out problems by running their tests",
         f"sample.py --run {runs}/base --eval {test} --json {runs}/base/eval.json {solve} 0", f"{runs}/base/eval.json", held_out / 50),
        ("finetune", "the exercises (phi-1's CodeExercises)",
         f"train.py --data {root}/exercises --init {runs}/base {rates} --prompt-weight 0 {rows} "
         f"--steps {finetune} --out {runs}/phi", f"{runs}/phi", None),
        ("evaluate", "the same held-out problems", f"sample.py --run {runs}/phi --eval {test} --json {runs}/phi/eval.json {solve} 1",
         f"{runs}/phi/eval.json", held_out / 50)]


# What makes training on a CPU faster, to be set before a process starts. libgomp's threads spin while they wait
# for each other, by default so long that beside other busy processes most of a step is waiting; glibc's
# allocator gives freed activations back to the system and faults them in again at every step.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "1000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:"
                      "glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"}
EXPORT = "export " + " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())


def stage_environment():
    """Of a stage's process: this one's, and what of ENVIRONMENT the user has not set."""
    environment = ENVIRONMENT | os.environ
    if "OMP_WAIT_POLICY" in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        del environment["GOMP_SPINCOUNT"]  # it would win over the user's policy
    return environment


def recipe(quick):
    stages = recipe_stages(quick)
    book_file = os.path.join("runs", "quick" if quick else ".", "recipe.json")
    try:
        with open(book_file) as file:
            book = json.load(file)  # product -> the command that made it and its seconds
    except (OSError, ValueError):
        book = {}
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    print(f"The phi-1 recipe in {len(stages)} stages, each one command. Everything it makes lies under data/ and runs/; give the same command "
          f"again to go on after an interruption. A stage by hand runs as here after\n    {EXPORT}\n",
          flush=True)
    for number, (title, why, command, product, expected) in enumerate(stages, 1):
        words = shlex.split(command)
        done = book.get(product, {}).get("command") == command and os.path.exists(product)
        when = f"about {expected:.0f} s on two free cores" if expected else "its first steps tell how long"
        if done:
            when = "done already, reused"
        print(f"[{number}/{len(stages)}] {title}: {why} ({when})\n    python {command}", flush=True)
        if done:
            continue
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if words[0] == "train.py" and gpus > 1 else []
        start = time.time()
        here = os.path.dirname(os.path.abspath(__file__))
        child = subprocess.Popen([sys.executable, *torchrun, os.path.join(here, words[0]), *words[1:]],
                                 start_new_session=True, env=stage_environment())
        for asked in (signal.SIGINT, signal.SIGTERM):  # in a session of its own a stage is asked to stop once, whoever was asked
            signal.signal(asked, lambda number, frame, child=child: child.send_signal(number))
        code = child.wait()
        code = 128 - code if code < 0 else code
        before = book.get(product, {"command": None, "seconds": 0})  # command None: an earlier attempt was cut short
        seconds = time.time() - start + (before["seconds"] if before["command"] is None else 0)
        book[product] = {"command": None if code else command, "seconds": round(seconds, 1)}
        models.write_atomically(book_file, lambda file: file.write(json.dumps(book, indent=1).encode()))
        if code:
            print(f"train.py: stage {title!r} ended with code {code}; give the same command to go on from here", file=sys.stderr)
            raise SystemExit(code)
        print(flush=True)
    print_report(stages, book)


def print_report(stages, book):
    """The table of stages, and pass@1 by difficulty before and after finetuning."""
    print(f"\n{'stage':20} {'tokens':>12} {'seconds':>8}  {'validation, bits a byte':38} pass@1 on held-out problems")
    evaluations = []
    for title, _, command, product, _ in stages:
        tokens = bits = score = ""
        if os.path.exists(os.path.join(product, "meta.json")):
            with open(os.path.join(product, "meta.json")) as file:
                tokens = f"{json.load(file)['train']['tokens']:,}"
        elif os.path.exists(os.path.join(product, "log.jsonl")):
            with open(os.path.join(product, "log.jsonl")) as file:
                records = [json.loads(line) for line in file]
            tokens = f"{records[-1]['tokens']:,}"
            bits = ", ".join(f"{name} {value[1]:.3f}" for name, value in [r for r in records if "val" in r][-1]["val"].items())
        elif product.endswith("eval.json"):
            with open(product) as file:
                evaluations.append((title, json.load(file)))
            score = f"{evaluations[-1][1]['pass@1']:.1%}"
        print(f"{title:20} {tokens:>12} {book[product]['seconds']:8.1f}  {bits:38} {score}")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1e6 if sys.platform == "linux" else 1e9)
    print(f"{'all':20} {'':12} {sum(book[stage[3]]['seconds'] for stage in stages):8.1f}  at most {memory:.2f} GB of memory in a process\n")
    levels = sorted(evaluations[-1][1]["levels"], key=int)
    print(f"{'pass@1 ± standard error':36}" + "".join(f"{'k = ' + level:>16}" for level in levels) + f"{'all':>16}")
    for name, (_, result) in zip(("pretrained on code + textbooks", "finetuned on exercises"), evaluations):
        cells = [result["levels"][level] for level in levels] + [result]
        print(f"{name:36}" + "".join(f"{cell['pass@1']:>9.1%} ±{cell['se']:5.1%}" for cell in cells))
    print("\nphi-1 itself (HumanEval pass@1): 350 M parameters 20.1 % -> 45 %, 1.3 B 29 % -> 50.6 % by the same two steps.\n"
          "Ours are held-out compositions of the teacher's own operations: a far easier test, on a model some hundred times smaller.")


# ---------------------------------------------------------------------------------------------------------------------

SHAPE = ("n_layer", "d_model", "n_head", "n_kv_head", "d_ff")
EXACT = ("data", "init", "after", "preset", *SHAPE, "rope_theta", "context", "batch_tokens", "steps", "optimizer", "lr", "muon_lr", "weight_decay",
         "beta2", "schedule", "warmup", "decay", "final_lr", "clip", "prompt_weight", "skip", "seed")  # what a resumed run must share with its beginning


FILE_BYTES = 5_000_000_000  # of a file of sharded weights

# What the papers say of pretraining, in our options: shares of the paper's own steps. What they leave out stays at our default.
PHI_1 = dict(optimizer="adamw", lr=1e-3, schedule="linear", warmup=0.0208, decay=1.0, final_lr=0.0, weight_decay=0.1, context=2048,
             batch_tokens=1024 * 2048)                                                               # arXiv 2306.11644, section 2.3: 750 of 36,000
PHI_3 = dict(optimizer="adamw", lr=3e-4, schedule="cosine", warmup=0.0024, decay=1.0, final_lr=0.1, beta2=0.95, context=4096,
             batch_tokens=1024 * 4096)                                                               # reported: 2,000 warmup steps of 4 M tokens
PAPERS = {
    "phi-1-small": PHI_1, "phi-1": PHI_1,
    "phi-1.5": dict(optimizer="adamw", lr=2e-4, schedule="constant", warmup=0.0, weight_decay=0.1, beta2=0.98, context=2048,
                    batch_tokens=2048 * 2048),                                                       # arXiv 2309.05463, section 2.3
    "phi-3-mini": PHI_3, "phi-3-small": PHI_3, "phi-3-medium": PHI_3,
    "phi-4": dict(optimizer="adamw", lr=3e-4, schedule="linear", decay=1.0, final_lr=0.0, weight_decay=0.1, context=4096,
                  batch_tokens=5760 * 4096)}                                                         # arXiv 2412.08905, section 3


@contextlib.contextmanager
def one_line_errors(args):
    """What a user can mend is said in a line, with the exit code 2, or 1 where memory or another process is to blame."""
    try:
        yield
    except (ValueError, OSError) as error:
        data.fail(" ".join(str(error).split()))
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            data.fail(f"out of memory; {advice(args)}", 1)
        if "RANK" in os.environ and any(word in text.lower() for word in ("gloo", "nccl", "connection closed")):
            data.fail(f"rank {os.environ['RANK']} lost another one, whose error is the one to read ({text[:100]}); "
                 "give the same command to go on from the last save", 1)
        raise


def loop_options(option):
    """The options of the loop itself, which align.py has too."""
    option("--micro-tokens", 4096, "most tokens in one forward pass of a process; lower it when memory runs out", type=data.number(int, 1), metavar="N")
    option("--optimizer", "muon", "muon: Muon for matrices, AdamW for the rest; adamw: AdamW for all", choices=("muon", "adamw"))
    option("--lr", 0.003, "peak learning rate of AdamW", type=data.number(float, 0), metavar="RATE")
    option("--muon-lr", 0.01, "peak learning rate of Muon", type=data.number(float, 0), metavar="RATE")
    option("--weight-decay", 0.1, "decoupled weight decay of matrices", type=data.number(float, 0), metavar="RATE")
    option("--beta2", 0.95, "AdamW's second moment decay", type=data.number(float, 0, 0.99999), metavar="BETA")
    option("--schedule", "linear", "form in which the learning rate falls", choices=("linear", "cosine", "constant"))
    option("--warmup", 0.02, "share of the steps with rising learning rate", type=data.number(float, 0, 1), metavar="SHARE")
    option("--decay", 0.5, "share of the steps with falling learning rate, at the end", type=data.number(float, 0, 1), metavar="SHARE")
    option("--final-lr", 0.05, "learning rate at the end, as a share of the peak", type=data.number(float, 0, 1), metavar="SHARE")
    option("--clip", 1.0, "largest norm of the gradient", type=data.number(float, 0), metavar="NORM")
    option("--val-every", 500, "steps between validations; one always comes last", type=data.number(int, 1), metavar="N")
    option("--save-every", 250, "steps between checkpoints", type=data.number(int, 1), metavar="N")
    option("--log-every", 10, "steps between records in log.jsonl", type=data.number(int, 1), metavar="N")
    option("--device", "auto", "cuda, mps, cpu, or the best there is", choices=("auto", "cuda", "mps", "cpu"))
    option("--dtype", "auto", "type of matrix products; auto measures", choices=("auto", "fp32", "bf16"))
    option("--compile", "auto", "compile the blocks where a compiler is found", choices=("auto", "no"))
    option("--shard", False, "spread weights, gradients and optimizer state over the processes of torchrun", action="store_true")
    option("--recompute", False, "keep only what enters each block and run it again in the backward pass: less memory, a third more work",
           action="store_true")
    option("--seed", 0, "random seed of weights and of the order of documents", type=data.number(int, 0))


@data.command()
def main():
    by_hand = f"Faster on CPUs, align.py as well, and set by the recipe for its stages:\n    {EXPORT}"
    parser = data.Parser(prog="train.py", description=__doc__, epilog=by_hand)
    option = parser.option
    parser.add_argument("--data", nargs="+", metavar="NAME[:WEIGHT]", help="dataset directories (or names under data/) and their shares; "
                        "without this option the whole recipe runs")
    parser.add_argument("--quick", action="store_true", help="the recipe on chains of one and two operations, in a third of "
                        "the time, with a model that has learned little")
    option("--out", "runs/base", "run directory to write, and to go on from", metavar="RUN")
    option("--init", None, "run directory, Hugging Face directory or hub name whose weights to start from", metavar="RUN")
    option("--after", None, "run whose weights and optimizer state to start from: its next phase, with data, context, rates and steps of its "
           "own (give another --seed for another order of the same data)", metavar="RUN")
    option("--preset", None, "shape of a new model (default: laptop), and its paper's hyperparameters for the options not given", choices=models.PRESETS)
    for name in SHAPE:
        option("--" + name.replace("_", "-"), None, f"{name} of a new model, instead of the preset's", type=data.number(int, 1), metavar="N")
    option("--rope-theta", None, "base of the rotary positions, instead of the preset's or the run's", type=data.number(float, 1), metavar="BASE")
    option("--context", None, "tokens a row (default: 512, or the context of --init)", type=data.number(int, 2), metavar="N")
    option("--batch-tokens", 4096, "tokens a step, over all processes", type=data.number(int, 2), metavar="N")
    option("--steps", None, "optimizer steps (default: 1000, or the tokens of the preset's paper)", type=data.number(int, 1), metavar="N")
    option("--prompt-weight", 0.05, "weight of prompt tokens in data that marks prompts", type=data.number(float, 0, 1), metavar="WEIGHT")
    option("--skip", None, "SkipDecode (arXiv 2307.02628): learn to run MAX layers for the first token of an answer, falling to MIN at the "
           "TOKENS-th and later", type=models.parse_skip, metavar="MAX:MIN:TOKENS")
    option("--val-tokens", 65536, "validation tokens of each dataset", type=data.number(int, 2), metavar="N")
    loop_options(option)
    option("--dry-run", False, "print what training would take in memory and time, and stop", action="store_true")
    option("--gpus", None, "of --dry-run (default: those here)", type=data.number(int, 1), metavar="N")
    option("--gpu-gb", None, "memory of each for --dry-run (default: as here, or 80)", type=data.number(float, 0), metavar="GB")
    option("--peak-tflops", None, "matrix product rate of each for --dry-run (default: measured here)", type=data.number(float, 0), metavar="RATE")
    args = parser.parse_args()
    paper = PAPERS.get(args.preset, {})
    parser.set_defaults(**paper)
    args = parser.parse_args()  # again: options given win over the paper
    args.steps = args.steps or (round(models.TRAINING_TOKENS[args.preset] / args.batch_tokens) if args.preset in models.TRAINING_TOKENS and paper else 1000)
    if not args.data and not args.dry_run:
        given = [word for word in sys.argv[1:] if word != "--quick"]
        if given:
            parser.error(f"{given[0]} needs --data; without --data the whole recipe runs, with its own settings (each stage prints its command)")
        if "RANK" in os.environ:
            data.fail("the recipe starts torchrun itself where it helps; run python train.py")
        recipe(args.quick)
        return
    if paper and os.environ.get("RANK", "0") == "0":
        shown = [(getattr(args, name) == value, f"--{name.replace('_', '-')} {getattr(args, name)}") for name, value in paper.items()]
        print(f"paper    {args.preset}'s: {' '.join(text for same, text in shown if same)}\ngiven    "
              f"{' '.join(text for same, text in shown if not same) or 'nothing'} instead; the rest are our defaults")
    with one_line_errors(args):
        if args.dry_run:
            dry_run(args, choose_config(args, open_mixture(args.data)[2] if args.data else None))
        else:
            train(args)


if __name__ == "__main__":
    main()

"""Pretraining and finetuning; with no options, the whole phi-1 recipe on this machine.

    python train.py                                                   # the recipe, from data to pass@1
    python train.py --data web:0.4 textbooks:0.6 --out runs/base      # pretrain on a mixture of datasets
    python train.py --data exercises --init runs/base --out runs/sft  # go on from another run's weights
    python train.py --data long --continue-from runs/base --context 16384 --rope-theta 250000 --out runs/mid
    torchrun --nproc_per_node=8 train.py --data web --preset phi-3-mini --fsdp --activation-checkpointing
    python train.py --preset phi-4 --dry-run --gpus 64 --fsdp --activation-checkpointing --peak-tflops 990

A run that was interrupted goes on exactly where it was when the same command is given again, on any number of
processes: weights, optimizer and position in the data are in the directory state-STEP, which
torch.distributed.checkpoint pickles: go on only from runs of people you trust. The run directory is at any
time a model that sample.py, transformers and others open.
"""
import argparse
import bisect
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import functools
import glob
import html
import importlib.util
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import data
import kernels
import model as models

warnings.filterwarnings("ignore", "torch.distributed is disabled")      # said of a checkpoint by one process

# ---------------------------------------------------------------- loader: whole documents packed into rows


class Batch(NamedTuple):
    """What a loader gives for one optimizer step: this rank's part of it."""
    micro_batches: list     # of tuples of CPU tensors, the arguments of the loss function; equally many on
    #                         all ranks, 0 if there is nothing to learn
    weight: float           # the step's loss is the sum of all ranks' losses over the sum of their weights
    num_tokens: int         # without padding


def documents_of(dataset, split, limit=None):
    """-> (n, 2): where the documents of a split, or of its first `limit` tokens, start and end."""
    tokens = getattr(dataset, split)[:limit]
    ends = dataset.ends(split)
    ends = np.append(ends[ends < len(tokens)], len(tokens))
    starts = np.append(0, ends[:-1])
    return np.stack([starts, ends], 1)[ends - starts > 1]       # one token alone has nothing to predict


def cut(start, end, length, first_size=None):
    """Pieces (start, end) of a document. One of n + 1 tokens predicts n, at most `length`; the next begins
    with its last token. Of several pieces the first one predicts `first_size`."""
    ends = [end]
    if end - start - 1 > length:
        ends = [*range(start + 1 + (first_size or length), end, length), end]
    return list(zip([start, *(piece_end - 1 for piece_end in ends)], ends))


def pack(pieces, length):
    """Rows (lists) of pieces that predict at most `length` tokens: the longest first, each into the fullest
    row that has room for it."""
    rows = []
    rooms = []      # (tokens that a row has room for, its number), sorted
    for start, end in sorted(pieces, key=lambda piece: piece[1] - piece[0], reverse=True):
        size = end - start - 1
        place = bisect.bisect_left(rooms, (size,))      # before any (size, row)
        if place == len(rooms):
            rooms.append((length, len(rows)))
            rows.append([])
        room, row = rooms.pop(place)
        rows[row].append((start, end))
        bisect.insort(rooms, (room - size, row))
    return rows


BLOCK_TOKENS = 1 << 19      # documents packed together: more fill rows better, and take longer to go on from


def packed_rows(documents, length, seed, position):
    """Yields (row, the position to go on from) without end: documents shuffled anew each epoch, packed by
    blocks, and a block's rows shuffled. Long documents are cut at other places in each epoch."""
    epoch, first_block, num_given = position
    while True:
        order = np.random.default_rng([*seed, epoch]).permutation(documents)
        blocks = np.diff(order)[:, 0].cumsum() // BLOCK_TOKENS      # of each document, from 0 and rising
        for block in range(first_block, blocks[-1] + 1):
            rng = np.random.default_rng([*seed, epoch, block])
            pieces = []
            for start, end in order[blocks == block].tolist():
                pieces += cut(start, end, length, int(rng.integers(1, length + 1)))
            rows = pack(pieces, length)
            for number in rng.permutation(len(rows))[num_given:]:
                num_given += 1
                yield rows[number], (epoch, block, num_given)
            num_given = 0
        first_block = 0
        epoch += 1


def mixed_rows(documents, weights, length, seed, state):
    """Yields (number of a dataset, row) without end, from the dataset that is the furthest behind its share,
    and notes in `state` where to go on."""
    streams = [packed_rows(part, length, [*seed, i], position)
               for i, (part, position) in enumerate(zip(documents, state["positions"]))]
    while True:
        counts = np.array(state["counts"])
        chosen = int(np.argmax(weights * (counts.sum() + 1) - counts))
        row, state["positions"][chosen] = next(streams[chosen])
        state["counts"][chosen] += 1
        yield chosen, row


def collate(rows, length, prompt_weight=1.0):
    """Rows [(stream, its mask or None, pieces)] -> tokens, documents, targets (B, length) int64, weights (B,
    length).

    Target t is the token after input t in the same document; padding has weight 0 and the document number -1.
    A target that the mask does not mark is a prompt's.
    """
    tokens, documents, targets = np.zeros((3, len(rows), length), np.int64)
    documents[:] = -1
    weights = np.zeros((len(rows), length), np.float32)
    for i, (stream, mask, pieces) in enumerate(rows):
        begin = 0
        for number, (start, end) in enumerate(pieces):
            place = i, slice(begin, begin + end - start - 1)
            tokens[place] = stream[start:end - 1]
            targets[place] = stream[start + 1:end]
            documents[place] = number
            weights[place] = 1 if mask is None else np.maximum(mask[start + 1:end], prompt_weight)
            begin = place[1].stop
    return tuple(map(torch.from_numpy, (tokens, documents, targets, weights)))


class PackedLoader:
    """Batches of packed rows, each drawn and collated in a thread while the one before is trained on.

    The rows of a step come from independent streams of at least 16 rows a step each (one stream where
    documents are few), so that they do not depend on the number of ranks, and a rank packs only the streams
    of its own rows.
    """

    def __init__(self, args, datasets, weights, rank=0, world=1):
        self.args = args
        self.datasets = datasets
        self.weights = np.array(weights) / sum(weights)
        self.documents = [documents_of(dataset, "train") for dataset in datasets]
        fewest = min(map(len, self.documents))
        if not fewest:
            raise ValueError("a dataset has no document of two tokens to train on")
        num_rows = args.batch_tokens // args.context
        most = max(1, min(num_rows // 16, fewest // 1000))
        self.num_streams = max(n for n in range(1, most + 1) if num_rows % n == 0)
        self.stream_rows = num_rows // self.num_streams     # of each stream in a step
        self.rows = shard_range(num_rows, rank, world)
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.my_streams = sorted({row // self.stream_rows for row in self.rows})
        self.load_state_dict({i: {"counts": [0] * len(datasets), "positions": [(0, 0, 0)] * len(datasets)}
                              for i in self.my_streams})

    def state_dict(self):
        return functools.reduce(dict.__or__, data.all_gather(self.given))

    def load_state_dict(self, states):
        self.given = {i: states[i] for i in self.my_streams}    # as after the batch that was given last
        self.drawn = copy.deepcopy(self.given)                  # as after the one that is drawn
        self.streams = {}
        for i, state in self.drawn.items():
            documents = [part[i::self.num_streams] for part in self.documents]
            seed = [self.args.seed, i]
            self.streams[i] = mixed_rows(documents, self.weights, self.args.context, seed, state)
        self.upcoming = None

    def draw(self):
        args = self.args
        rows = []
        for i, stream in self.streams.items():
            first = i * self.stream_rows
            for row, (number, pieces) in zip(range(first, first + self.stream_rows), stream):
                if row in self.rows:
                    dataset = self.datasets[number]
                    rows.append((dataset.train, dataset.train_mask, pieces))
        micro_batches = []
        weight = num_tokens = 0
        for i in range(0, len(rows), args.micro_batch):
            batch = collate(rows[i:i + args.micro_batch], args.context, args.prompt_weight)
            _, documents, _, weights = batch
            if args.skip:
                batch += (models.layers_of_targets(documents, weights, args.skip),)
            if torch.cuda.is_available():
                batch = [tensor.pin_memory() for tensor in batch]
            micro_batches.append(batch)
            weight += weights.sum().item()
            num_tokens += (documents >= 0).sum().item()
        return Batch(micro_batches, weight, num_tokens), copy.deepcopy(self.drawn)

    def __next__(self):
        upcoming = self.upcoming or self.thread.submit(self.draw)
        batch, self.given = upcoming.result()
        self.upcoming = self.thread.submit(self.draw)
        return batch


# ---------------------------------------------------------------- ranks


def shard_range(count, rank, world):
    """Which of `count` rows are a rank's: as torch.chunk, and so fully_shard, deals them out."""
    size = -(-count // world)
    return range(min(rank * size, count), min((rank + 1) * size, count))


def to_local(tensor):
    """This rank's rows of a sharded tensor, sharing their memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor):
    """All of a sharded tensor (every rank asks for it); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ---------------------------------------------------------------- optimizer


def newton_schulz(x, steps=5):
    """(n, rows, columns) -> nearly U V^T of each matrix's SVD: its singular values are driven into [0.7,
    1.2]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = x.size(1) > x.size(2)
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz, for weight matrices (Jordan et al. 2024; update scaled to
    AdamW's RMS, Moonlight, arXiv 2502.16982 section 2.2). Each matrix is done by one rank, whether sharded or
    not.

    groups: {"params": tensors of one shape, "splits": rows of each matrix fused in them}. Fused matrices are
    orthogonalized and scaled each by itself: as one, the largest gradient of q, k and v would leave the
    others next to nothing. torch.optim.Muon runs one matrix at a time, and in bf16: on many CPUs a hundred
    times slower.
    """

    def __init__(self, groups, lr=0.01, momentum=0.9, weight_decay=0.0, dtype=torch.float32, compiled=False):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype
        self.newton_schulz = torch.compile(newton_schulz, dynamic=False) if compiled else newton_schulz

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if dist.is_initialized():
                size = dist.get_world_size()        # one for each rank
            else:
                size = max(1, (1 << 28) // group["params"][0].numel())      # so many bound the memory
            for begin in range(0, len(params), size):
                self.update(params[begin:begin + size], group)

    def update(self, params, group):
        momentum = group["momentum"]
        directions = []
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            average = self.state[p]["momentum"].lerp_(p.grad, 1 - momentum)
            # Nesterov; the gradient is free to be overwritten
            directions.append(to_local(p.grad.lerp_(average, momentum)))
        x = torch.stack(directions).to(self.dtype)
        if dist.is_initialized():
            x = self.distributed_newton_schulz(x, params[0], group["splits"])
        else:
            x = self.orthogonalize(x, group["splits"])
        for p, update in zip(params, x.to(params[0].dtype)):
            weight = to_local(p)
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def orthogonalize(self, x, splits):
        """x (n, rows, columns), n tensors of fused matrices -> their updates."""
        parts = [self.newton_schulz(part) * 0.2 * max(part.shape[1:]) ** 0.5 for part in x.split(splits, 1)]
        return torch.cat(parts, 1)

    def distributed_newton_schulz(self, x, p, splits):
        """x (n, rows here, columns), of n tensors like p, at most one a rank: rank i works on tensor i alone.
        A sharded one's rows are sent to it and back; otherwise all have them, and are sent the result."""
        rank = dist.get_rank()
        world = dist.get_world_size()
        is_mine = rank < len(x)
        if to_local(p) is p:        # not sharded
            results = list(x.new_empty(world, *p.shape))
            mine = self.orthogonalize(x[rank:rank + 1], splits)[0] if is_mine else results[rank]
            dist.all_gather(results, mine)
            return torch.stack(results[:len(x)])
        sent = [x[0].numel() if i < len(x) else 0 for i in range(world)]
        received = [is_mine * len(shard_range(len(p), i, world)) * p.shape[1] for i in range(world)]
        mine = x.new_empty(sum(received))
        dist.all_to_all_single(mine, x.reshape(-1), received, sent)
        if is_mine:
            mine = self.orthogonalize(mine.view(1, *p.shape), splits).reshape(-1)
        result = torch.empty_like(x)
        dist.all_to_all_single(result.view(-1), mine, sent, received)
        return result


def make_optimizers(model, args, dtype, compiled=False):
    """AdamW for embedding, head and norms, Muon for the matrices of the blocks (or AdamW for all)."""
    config = model.config
    heads = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    # what Tensor.split takes: sizes, or one size
    splits = {"self_attn.qkv_proj": heads, "mlp.gate_up_proj": config.d_ff, "self_attn.o_proj": None,
              "mlp.down_proj": None}
    groups = []
    for name in splits if args.optimizer == "muon" else ():
        params = [block.get_submodule(name).weight for block in model.model.layers]
        groups.append({"params": params, "splits": splits[name] or len(params[0])})
    matrices = {p for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if p not in matrices]
    decayed = {"params": [p for p in rest if p.ndim == 2], "weight_decay": args.weight_decay}
    others = {"params": [p for p in rest if p.ndim != 2], "weight_decay": 0.0}
    betas = 0.9, args.beta2
    optimizers = [torch.optim.AdamW([decayed, others], args.lr, betas, args.adam_eps, fused=True)]
    if groups:
        muon = Muon(groups, args.muon_lr, weight_decay=args.weight_decay, dtype=dtype, compiled=compiled)
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


# ---------------------------------------------------------------- schedule


def lr_multiplier(step, args):
    """Share of the peak learning rate: linear warmup, plateau, and over the last --warmdown-frac of the steps
    (but never before the warmup is over) a fall to --final-lr."""
    warmup_steps = args.warmup * args.steps
    warmdown_steps = min(args.warmdown_frac * args.steps, args.steps - warmup_steps)
    left = min(1.0, (args.steps - step) / max(1, warmdown_steps))
    if args.schedule == "constant":
        left = 1.0
    elif args.schedule == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return min((step + 1) / max(1, warmup_steps), args.final_lr + (1 - args.final_lr) * left)


# ---------------------------------------------------------------- the machine: dtype, compiler, memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
USABLE = 0.92   # of a GPU's memory
LESS_MEMORY = "lower --micro-tokens, add --activation-checkpointing, or use more GPUs with --fsdp"


def measure_peak(device, dtype, size=None):
    """Matrix product rate in FLOP/s, which mfu refers to. A CPU without bf16 units shows itself here."""
    size = size or (1024 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * size ** 3 / seconds


def choose_dtype(device, wanted):
    """-> (torch dtype for matrix products, one line that says why). Weights and optimizer state stay in
    fp32."""
    if wanted != "auto":
        return DTYPES[wanted], "asked for"
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return DTYPES["bf16" if has_bf16 else "fp32"], "what this GPU has units for"
    if device.type == "mps":
        return torch.float32, "on MPS bf16 brings little for small models"
    bf16, fp32 = (measure_peak(device, dtype, 256) / 1e9 for dtype in (torch.bfloat16, torch.float32))
    reason = f"measured here: bf16 {bf16:.0f}, fp32 {fp32:.0f} GFLOP/s"
    return DTYPES["bf16" if bf16 > 1.3 * fp32 else "fp32"], reason


def why_not_compile(device, wanted):
    """-> the reason, or None"""
    if wanted == "no":
        return "asked for"
    if device.type != "cpu":
        return None if importlib.util.find_spec("triton") else f"no Triton for {device.type}"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "on CPUs without AVX-512 that was measured to be slower"
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    return None if has_compiler else "no C++ compiler (g++ or clang++) found"


def flops_per_token(config, context):
    """Of forward and backward: 6 for each weight that multiplies, and attention over half a row on
    average."""
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    attention = 3 * config.attention_flops() * context // (2 * config.max_seq_len)
    return 6 * (config.num_parameters() - embedding) + attention


def memory(config, args, micro_batch, world):
    """{part: bytes on one GPU} with so many rows at a time: fp32 weights, their bf16 copies for the products,
    gradients, what the optimizers keep (Muon one number a weight, AdamW two), and what the backward pass
    needs."""
    n = config.num_parameters()
    ends = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)     # embedding and head
    tokens = micro_batch * args.context
    # q and k before and after they are rotated, v; what enters the norms and products; the hidden layer
    heads = (2 * config.n_head + 3 * config.n_kv_head) * config.head_dim
    states = (3 if config.family.parallel else 5) * config.d_model
    hidden = (2 if config.family.activation == "gelu" else 3) * config.d_ff
    block = 2 * tokens * (heads + states + hidden)
    parts = {
        "weights, fp32": 4 * n,
        "weights, bf16 copies": 2 * (n - ends),
        "gradients": 4 * n,
        "optimizer": 4 * (n + ends) if args.optimizer == "muon" else 8 * n,
        "activations": config.n_layer * block,
        "loss": kernels.CHUNK_BYTES + 6 * config.vocab_size * config.d_model}
    if args.activation_checkpointing:   # what enters each block, and all of the one block whose turn it is
        parts["activations"] = block + 2 * tokens * config.n_layer * config.d_model
    if args.fsdp and world > 1:
        for part in ("weights, fp32", "gradients", "optimizer"):
            parts[part] /= world
        # gathered: this block and the next, fp32 gradients of one; embedding and head with theirs
        parts["weights, bf16 copies"] = 8 * (n - ends) / config.n_layer
        parts["embedding and head"] = 8 * ends
    return parts


def gpu_gigabytes():
    return torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 0.0


def micro_batch_rows(args, config, rows, world=1, gigabytes=0.0):
    """Of a rank's `rows` so many at a time, a divisor: the most that --micro-tokens, or else the memory,
    allows."""
    def fits(micro_batch):
        if args.micro_tokens or not gigabytes:
            return micro_batch * args.context <= (args.micro_tokens or 4096)
        return sum(memory(config, args, micro_batch, world).values()) <= USABLE * 1e9 * gigabytes
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or fits(n)))


def rows_of_rank(args, world):
    num_rows = args.batch_tokens // args.context
    if num_rows < world or num_rows % world:
        nearest = max(1, round(num_rows / world)) * world * args.context
        data.fail(f"--batch-tokens {args.batch_tokens} makes {num_rows} rows of --context {args.context}; "
                  f"it must be a multiple of {args.context} x {world} processes, such as {nearest}")
    args.batch_tokens = num_rows * args.context
    return num_rows // world


def dry_run(args, config):
    """Print what a run would take, in memory and in time, without taking it."""
    world = args.gpus or max(1, torch.cuda.device_count())
    gigabytes = args.gpu_gb or gpu_gigabytes() or 80
    rows = rows_of_rank(args, world)
    micro_batch = micro_batch_rows(args, config, rows, world, gigabytes)
    parts = memory(config, args, micro_batch, world)
    total = sum(parts.values()) / 1e9
    print(f"model    {config.num_parameters():,} parameters; context {args.context}, {rows * world:,} rows "
          f"a step on {world} GPU(s), --micro-tokens {micro_batch * args.context}")
    for part, size in parts.items():
        print(f"  {part:26} {size / 1e9:10.2f} GB")
    advice = "fits" if total <= USABLE * gigabytes else f"does not fit: {LESS_MEMORY}"
    print(f"memory   {total:.2f} of {gigabytes:.0f} GB {advice}")
    device = torch.device(models.default_device())
    peak = (args.peak_tflops * 1e12 if args.peak_tflops
            else measure_peak(device, choose_dtype(device, args.dtype)[0]))
    flops = flops_per_token(config, args.context) * (4 / 3 if args.activation_checkpointing else 1)
    rate = 0.4 * peak * world / flops
    tokens = args.steps * args.batch_tokens
    days = tokens / rate / 86400
    print(f"speed    {rate:,.0f} tokens/s at 40 % of {peak / 1e12:,.1f} TFLOP/s, as given or measured here")
    print(f"time     {tokens / 1e9:,.1f} B tokens in {args.steps:,} steps: {days:,.1f} days, "
          f"{days * 24 * world:,.0f} GPU-hours")


# ---------------------------------------------------------------- loss and validation


def next_token_loss(model, tokens, documents, targets, weights, active_layers=None):
    """-> (weighted sum in nats, nothing else to report)"""
    return model(tokens, documents, targets, weights, active_layers)[0], torch.empty(0, device=tokens.device)


@torch.no_grad()
def validate(run, datasets):
    """-> {"val": {dataset: (nats a token, bits a byte)}} over the first --val-tokens of its validation split,
    every token predicted once, and the same in words.

    Bits a byte compare across tokenizers; the end token costs bits and has no bytes. Where prompts are marked
    only solutions count.
    """
    args = run.args
    num_bytes = [len(run.tokenizer.decode_bytes([i])) for i in range(run.tokenizer.vocab_size)]
    num_bytes[run.tokenizer.eot] = 0
    num_bytes = torch.tensor(num_bytes)
    results = {}
    run.model.eval()
    for dataset in datasets:
        documents = documents_of(dataset, "val", args.val_tokens).tolist()
        pieces = [piece for start, end in documents for piece in cut(start, end, args.context)]
        rows = [(dataset.val, dataset.val_mask, row) for row in pack(pieces, args.context)]
        count = size = 0.0
        losses = torch.zeros((), device=run.device)
        for begin in range(0, len(rows), run.world * args.micro_batch):
            chunk = rows[begin + run.rank * args.micro_batch:][:args.micro_batch]
            # all ranks run full micro-batches: one shape to compile, and all gather sharded weights together
            chunk += [(None, None, [])] * (args.micro_batch - len(chunk))
            tensors = collate(chunk, args.context, prompt_weight=0)
            targets, weights = tensors[2:]
            with run.autocast():
                losses += run.objective(next_token_loss, *(tensor.to(run.device) for tensor in tensors))[0]
            count += weights.sum().item()
            size += (num_bytes[targets] * weights).sum().item()
        nats, count, size = run.sum_over_ranks(losses.item(), count, size)
        results[dataset.name] = nats / max(count, 1), nats / math.log(2) / max(size, 1)
    run.model.train()
    words = "{} {:.4f} nats a token, {:.4f} bits a byte"
    return {"val": results}, ", ".join(words.format(name, *values) for name, values in results.items())


# ---------------------------------------------------------------- the picture of a run


def loss_svg(records, title, key="loss", unit="loss (nats a token)"):
    """The curves of log.jsonl's records, of the loss or another `key`, over tokens, as a small picture."""
    curves = {}
    for record in records:
        values = {f"{name} validation": value for name, (value, _) in record.get("val", {}).items()}
        if key in record:
            values["training"] = record[key]
        for name, value in values.items():
            curves.setdefault(name, []).append((record["tokens"], value))
    if not curves:
        return ""
    tokens, values = zip(*itertools.chain(*curves.values()))
    end, low, high = max(tokens), min(values), max(values)
    about = f"{html.escape(title)}: {unit} over {end / 1e6:.3g} M tokens"
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 380" font-family="sans-serif" '
           'font-size="12"><rect width="700" height="380" fill="white"/>'
           f'<text x="60" y="20">{about}</text><path d="M60 40v300h600" fill="none" stroke="#888"/>'
           f'<text x="8" y="44">{high:.3g}</text><text x="8" y="344">{low:.3g}</text>']
    for i, (name, curve) in enumerate(curves.items()):
        color = f"hsl({i * 137 % 360},70%,45%)"     # the golden angle: neighbours differ
        points = [f"{60 + 600 * x / max(end, 1):.1f},{340 - 300 * (y - low) / (high - low or 1):.1f}"
                  for x, y in curve]
        svg.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{" ".join(points)}"/>'
                   f'<text x="{60 + 640 * i // len(curves)}" y="365" fill="{color}">{name}</text>')
    return "\n".join([*svg, "</svg>\n"])


# ---------------------------------------------------------------- checkpoints


def training_state(model, optimizers):
    """{name: tensor} of the weights, and under "name/key" of what the optimizers keep of each."""
    names = {p: name for name, p in model.named_parameters()}
    state = {name: p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        for p, entry in optimizer.state.items():
            state.update({f"{names[p]}/{key}": tensor for key, tensor in entry.items()})
    return state


def load_training_state(folder, model, optimizers):
    """Fill weights and optimizers from a checkpoint, on however many processes and whichever way it was
    written."""
    import torch.distributed.checkpoint as dcp      # takes a second
    parameters = dict(model.named_parameters())
    states = {p: optimizer.state for optimizer in optimizers for group in optimizer.param_groups
              for p in group["params"]}
    for entry, stored in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        name, _, key = entry.partition("/")
        p = parameters[name]
        if key:
            states[p][p][key] = torch.zeros_like(p) if stored.size else torch.zeros((), device=p.device)
    dcp.load(training_state(model, optimizers), checkpoint_id=folder)


def read_checkpoint(out):
    """The loop's state in the newest checkpoint of a run directory, with its "folder"; None if there is
    none."""
    folders = sorted(glob.glob(os.path.join(glob.escape(out), "state-*")))
    if not folders:
        return None
    try:
        state = torch.load(os.path.join(folders[-1], "loop.pt"), weights_only=True)
    except Exception as error:
        data.fail(f"{folders[-1]} cannot be read ({type(error).__name__}); delete {out} to start again")
    return {**state, "folder": folders[-1]}


def write_checkpoint(out, state, tensors):
    """Write a checkpoint, then delete its predecessors: whenever the process is killed, the newest directory
    is whole, since it gets its name when all is in it."""
    import torch.distributed.checkpoint as dcp
    unfinished = os.path.join(out, "state.tmp")
    if data.RANK == 0:
        os.makedirs(unfinished, exist_ok=True)
    data.all_gather()
    dcp.save(tensors, checkpoint_id=unfinished)
    if data.RANK == 0:
        models.write_atomically(os.path.join(unfinished, "loop.pt"), lambda file: torch.save(state, file))
        folder = os.path.join(out, f"state-{state['step']:08d}")
        os.rename(unfinished, folder)
        remove(out, "state-*", but=folder)


def remove(out, pattern, but=None):
    for path in glob.glob(os.path.join(glob.escape(out), pattern)):
        if path != but:
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def write_model(out, model, tokenizer):
    """The Hugging Face directory, streamed tensor by tensor: all ranks gather each in its turn, rank 0 writes
    it."""
    def stream():
        for name, tensor in models.stored_parameters(model).items():
            whole = full_tensor(tensor.detach())
            part = SimpleNamespace(config=model.config, state_dict=lambda: {name: whole})
            yield from models.to_hf(part).values()

    tensors = stream()
    if data.RANK == 0:
        with torch.device("meta"):
            layout = models.to_hf(models.Model(model.config))
        models.save(model, tokenizer, out, layout, gather=lambda like: next(tensors))
    for _ in tensors:       # the other ranks
        pass


# ---------------------------------------------------------------- setup

SHAPE = ("n_layer", "d_model", "n_head", "n_kv_head", "d_ff")
RESUME_KEYS = (     # the options that a resumed run must share with its beginning
    "data", "init", "continue_from", "preset", *SHAPE, "rope_theta", "context", "batch_tokens", "steps",
    "optimizer", "lr", "muon_lr", "weight_decay", "beta2", "adam_eps", "schedule", "warmup", "warmdown_frac",
    "final_lr", "clip", "prompt_weight", "skip", "seed")


def open_mixture(entries):
    """["web:0.4", "textbooks"] -> (datasets, weights, tokenizer); names stand for data/NAME, and all must
    share one tokenizer."""
    datasets = []
    weights = []
    for entry in entries:
        name, _, weight = (entry, "", "") if os.path.isdir(entry) else entry.partition(":")
        try:
            weights.append(data.number(float, 1e-9)(weight or "1"))
        except (ValueError, argparse.ArgumentTypeError):
            data.fail(f"--data {entry}: write NAME or NAME:WEIGHT with a weight above 0, such as web:0.4")
        dataset = data.open_dataset(name if os.path.isdir(name) else os.path.join("data", name))
        dataset.name = dataset.path.name
        datasets.append(dataset)
        first = datasets[0]
        if dataset.meta["tokenizer"] != first.meta["tokenizer"]:
            data.fail(f"{dataset.path} was made with another tokenizer than {first.path}; make it again "
                      f"with data.py --tokenizer {first.path}")
    return datasets, weights, models.Tokenizer.load(first.path)


def choose_config(args, tokenizer):
    """The shape to train, with args.context settled: that of --init or --continue-from, or the preset's with
    the shape options applied and the tokenizer's vocabulary (without data, in a dry run, the preset's
    own)."""
    shape = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    start = args.init or args.continue_from
    if not start:
        config = models.PRESETS[args.preset or "laptop"]
        args.context = args.context or 512
        vocab_size = config.vocab_size
        if tokenizer:
            vocab_size = -(-tokenizer.vocab_size // 64) * 64        # matrix products like multiples of 64
        config = dataclasses.replace(config, vocab_size=vocab_size, dummy_tokens=[], **shape)
    else:
        option = f"--init {start}" if args.init else f"--continue-from {start}"
        if args.init and args.continue_from:
            data.fail("--init takes a run's weights, --continue-from its optimizer state too; give one of "
                      "them")
        if shape or args.preset:
            data.fail(f"{option} brings its own shape; leave out --preset and its parts, such as --n-layer")
        folder = models.snapshot_download(start)
        config = models.read_config(os.path.join(folder, "config.json"))
        args.context = args.context or config.max_seq_len
        if args.context > config.max_seq_len and not args.rope_theta:
            data.fail(f"--context {args.context} is longer than the {config.max_seq_len} tokens of "
                      f"{start}; lower it, or give a larger --rope-theta than its {config.rope_theta:g} as "
                      "well")
        if tokenizer and models.Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
            data.fail(f"{option} has another tokenizer than the data; make the data again with data.py "
                      f"--tokenizer {start}")
    return dataclasses.replace(config, max_seq_len=max(args.context, config.max_seq_len),
                               rope_theta=args.rope_theta or config.rope_theta)


class Objective(nn.Module):
    """The model under one forward that runs any function of it: what DistributedDataParallel and fully_shard
    wrap, so that a loss may call model.hidden or model.lm_head as well as the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *tensors):
        return function(self.model, *tensors)


@dataclasses.dataclass
class Run:
    """What `setup` made of the options: the same for all kinds of training."""
    args: argparse.Namespace
    objective: Objective        # calls functions of the model: objective(function, *tensors)
    tokenizer: object
    optimizers: list
    device: torch.device
    dtype: torch.dtype          # of the products
    rank: int
    world: int
    identity: dict              # what the checkpoint tells of how the run began
    checkpoint: dict | None     # of --out, where the run goes on; its weights and optimizers are loaded

    @property
    def model(self):
        """Its parameters are DTensors with --fsdp; full_tensor(p) is all of one."""
        return self.objective.model

    def autocast(self):
        """A context in which products are computed in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def print0(self, text):
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def sum_over_ranks(self, *values):
        """Numbers that the host knows; no GPU is waited for."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()


def build_model(args, config, device, dtype, is_fresh, world):
    """The model on `device`: with --init's weights or drawn anew if `is_fresh`, else memory for a checkpoint
    to fill.

    With --fsdp each rank holds its rows of every tensor in fp32. A block's are gathered in the type of the
    products when its turn comes. Rank 0 alone has the whole model to begin with.
    """
    def fresh():
        model = models.load(args.init, "cpu", torch.float32)[0] if args.init else models.Model(config)
        model.config = config       # which may have a longer context
        return model

    if is_fresh and not args.fsdp:
        return Objective(fresh().to(device))
    with torch.device("meta"):
        model = models.Model(config)
    objective = Objective(model)
    if args.fsdp:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(device.type, (world,))
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(objective, mesh=mesh, reshard_after_forward=True)
    model.to_empty(device=device)
    model.tie_embeddings()
    if is_fresh and args.fsdp:
        weights = fresh().state_dict() if data.RANK == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights, options=options)
    return objective


def find_source(args, identity):
    """-> (the checkpoint of --out or None, the one to load: that, or --continue-from's, or None). A run goes
    on only as it began."""
    out = args.out
    source = read_checkpoint(out)
    if not source:
        if glob.glob(os.path.join(glob.escape(out), "model*.safetensors*")):
            data.fail(f"{out} holds a model without a training state; give another --out, or delete it")
        if not args.continue_from:
            return None, None
        source = read_checkpoint(args.continue_from)
        if not source:
            data.fail(f"--continue-from {args.continue_from} has no training state; give --init for its "
                      "weights alone")
        optimizer = source["hparams"]["optimizer"]
        if optimizer != args.optimizer:
            data.fail(f"--continue-from {args.continue_from} was trained with --optimizer {optimizer}; give "
                      "the same")
        return None, source
    for name, value in identity["hparams"].items():
        began = source["hparams"].get(name)
        if value != began:
            option = "--" + name.replace("_", "-")
            data.fail(f"{out} was made with {option} {began}, not {value}; give that, or another --out")
    for name, fingerprint in identity["fingerprints"].items():
        if fingerprint != source["fingerprints"].get(name):
            data.fail(f"--data {name} was made anew since {out} began, and has other tokens; make it as it "
                      "was, or give another --out")
    if source["step"] >= args.steps:
        data.print0(f"{out} is trained already ({args.steps:,} steps); to train again, delete it or give "
                    "another --out")
        data.leave()
    return source, source


def setup(args, config, tokenizer, resume_keys, fingerprints):
    """Process group, device, model and optimizers; weights drawn, of --init, of --continue-from, or of the
    checkpoint in --out. The order in a script is: read data -> settle args.steps and args.micro_batch -> run
    = setup(...) -> loader -> train(run, ...).

    config: the shape to train. resume_keys: the options that a resumed run must share with its beginning.
    fingerprints: {what the user calls a data set: what tells its contents}, compared with the checkpoint's as
    well. Bad or changed options end the process in a line with code 2; a run that has all its steps ends it
    with code 0.
    """
    rank, world = data.RANK, data.WORLD_SIZE
    device = torch.device(models.default_device() if args.device == "auto" else args.device)
    if device.type not in ("cpu", models.default_device()):
        data.fail(f"--device {device}: this machine has none that torch can use; leave the option out")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    args.fsdp = args.fsdp and world > 1
    if world > 1:       # what hosts tell each other goes over gloo; the timeout is longer than rank 0 saves
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    if rank == 0:
        remove(args.out, "state.tmp")       # what a killed process was writing
        remove(args.out, "*.[0-9]*.tmp")
    hparams = {key: getattr(args, key) for key in resume_keys}
    identity = {"hparams": hparams, "fingerprints": fingerprints}
    checkpoint, source = find_source(args, identity)

    # near the threshold another time or another rank would measure otherwise: the first measurement counts
    wanted = checkpoint["dtype"] if checkpoint and args.dtype == "auto" else args.dtype
    dtype, reason = data.all_gather(choose_dtype(device, wanted))[0]
    identity["dtype"] = "bf16" if dtype == torch.bfloat16 else "fp32"
    torch.manual_seed(args.seed)
    objective = build_model(args, config, device, dtype, not source, world).train()
    reason_against = why_not_compile(device, args.compile)
    optimizers = make_optimizers(objective.model, args, dtype, device.type == "cuda" and not reason_against)
    if source:
        load_training_state(source["folder"], objective.model, optimizers)
    if not reason_against:
        torch._dynamo.config.recompile_limit = 64       # shapes of micro-batches and of Muon's matrices
    for block in objective.model.model.layers:      # forward alone: hooks that gather weights stay outside
        if not reason_against:
            block.forward = torch.compile(block.forward, dynamic=False)
        if args.activation_checkpointing:
            options = {"use_reentrant": False, "preserve_rng_state": False}
            block.forward = functools.partial(recompute, block.forward, **options)

    run = Run(args, objective, tokenizer, optimizers, device, dtype, rank, world, identity, checkpoint)
    if checkpoint:
        run.print0(f"going on from step {checkpoint['step']:,} of {args.steps:,} in {args.out}")
    elif source:
        run.print0(f"weights and optimizer state of step {source['step']:,} of {args.continue_from}")
    run.print0(f"model    {config.num_parameters():,} parameters: {config.n_layer} layers, "
               f"{config.d_model} wide, {config.n_head} query and {config.n_kv_head} key/value heads, "
               f"vocabulary {config.vocab_size}")
    compiled = f"not compiled: {reason_against}" if reason_against else "blocks compiled"
    run.print0(f"device   {device}: compute dtype {identity['dtype']} ({reason}); {compiled}")
    return run


# ---------------------------------------------------------------- the loop


class Stop:
    """Ctrl-C and SIGTERM ask the loop to save and leave after a step; a second Ctrl-C ends the process. (A
    rank may get SIGTERM twice: from whoever stops all processes, and from torchrun.)"""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.signal and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal = number


def read_log(path, last_step=math.inf):
    """The whole records up to a step: what was logged after the checkpoint will be logged again."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        records = [json.loads(line) for line in file if line.endswith("}\n")]
    return [record for record in records if record["step"] <= last_step]


class Log:
    """The records of log.jsonl, and the steps since the last one: what they left on the device is read once a
    record."""

    def __init__(self, run, step):
        self.run = run
        self.path = os.path.join(run.args.out, "log.jsonl")
        self.records = read_log(self.path, step)
        self.tokens = run.checkpoint["tokens"] if run.checkpoint else 0
        flops = flops_per_token(run.model.config, run.args.context)
        self.peak = run.world * measure_peak(run.device, run.dtype) / flops     # tokens a second
        self.window = []    # of each step: (loss, norm of the gradient, sums of loss_fn), tokens, seconds
        self.progress = tqdm(total=run.args.steps, initial=step, unit="step", disable=run.rank > 0,
                             mininterval=0.1 if sys.stderr.isatty() else 60)
        if run.rank == 0:
            text = "".join(json.dumps(record) + "\n" for record in self.records)
            models.write_atomically(self.path, lambda file: file.write(text.encode()))

    def add(self, losses, norm, num_tokens, seconds):
        """What a step gave: this rank's part of its loss and sums, the tokens of all ranks."""
        norm = norm.to(self.run.device).reshape(1) / self.run.world     # all ranks have the same
        self.window.append((torch.cat([losses[:1], norm, losses[1:]]), num_tokens, seconds))
        self.tokens += int(num_tokens)
        self.progress.update()

    def write(self, step, entry):
        record = {"step": step, "tokens": self.tokens, **entry}
        self.records.append(record)
        if self.run.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def summarize(self, step, log_entry):
        """Wait for the device, and write a record of the steps since the last one. What is not finite ends
        the run here: it came after the last record, so no checkpoint has weights that took it."""
        start = time.perf_counter()
        args = self.run.args
        rows, tokens, seconds = zip(*self.window)
        self.window = []
        rows = nn.utils.rnn.pad_sequence(rows, batch_first=True)    # a step with nothing to learn has no sums
        if self.run.world > 1:
            dist.all_reduce(rows)
        rows = rows.tolist()
        for bad_step, (loss, norm, *_) in enumerate(rows, step - len(rows)):
            if not math.isfinite(loss + norm):
                data.fail(f"at step {bad_step:,} the loss is {loss} and the norm of its gradient {norm}; "
                          f"the last checkpoint in {args.out}, if there is one, is whole; to go on from it "
                          f"give --continue-from {args.out}, another --out, and lower --lr and --muon-lr", 1)
        loss, _, *sums = map(sum, zip(*rows))
        entry = {"loss": loss / len(rows), **log_entry(sums)}
        seconds = sum(seconds) + time.perf_counter() - start
        rate = sum(tokens) / seconds
        mfu = rate / self.peak
        self.write(step, {**entry, "grad_norm": rows[-1][1], "lr": lr_multiplier(step - 1, args) * args.lr,
                          "tokens_per_second": round(rate), "seconds": round(seconds, 3),
                          "mfu": round(mfu, 3)})
        words = ", ".join(f"{name} {value:.3f}" for name, value in entry.items())
        self.progress.set_postfix_str(f"{words}, {rate:,.0f} tokens/s, {mfu:.0%} of peak")


def micro_steps(run, module, loss_fn, micro_batches, weight):
    """Gradients of a step's loss -> this rank's part of the loss, then of the sums that loss_fn reports."""
    totals = torch.zeros(1, device=run.device)
    for i, tensors in enumerate(micro_batches, 1):
        tensors = [tensor.to(run.device, non_blocking=True) for tensor in tensors]
        # DDP reduces gradients once a step, FSDP each time: whole gradients are what it must not hold
        is_local = i < len(micro_batches) and module is not run.objective
        with module.no_sync() if is_local else contextlib.nullcontext():
            with run.autocast():
                loss_sum, sums = module(loss_fn, *tensors)
            loss = loss_sum / max(weight, 1e-9)
            (loss * run.world).backward()       # ranks' gradients are averaged
        parts = torch.cat([loss.detach().reshape(1), sums.detach()])
        totals = totals + parts if i > 1 else parts
    return totals


def save(run, log, loader, step):
    """First the checkpoint, which is enough to go on from by itself, then the model."""
    state = {**run.identity, "step": step, "tokens": log.tokens, "loader": loader.state_dict()}
    write_checkpoint(run.args.out, state, training_state(run.model, run.optimizers))
    write_model(run.args.out, run.model, run.tokenizer)


def report(run, log, chart_options):
    """The picture and a line at the end of a run."""
    out = run.args.out
    seconds = sum(record["seconds"] for record in log.records if "seconds" in record)
    if run.rank == 0:
        svg = loss_svg(log.records, out, **chart_options)
        models.write_atomically(os.path.join(out, "loss.svg"), lambda file: file.write(svg.encode()))
    run.print0(f"saved    {out}: {run.args.steps:,} steps, {log.tokens:,} tokens in {seconds:.1f} s of "
               f"stepping ({log.tokens / max(seconds, 1e-9):,.0f} tokens/s)")


def train(run, loader, loss_fn, validate=None, log_entry=lambda sums: {}, about="", chart_options={}):
    """The loop, from the checkpoint's step to args.steps.

    loader: an iterator of Batches with a state that depends on nothing but the options and the step:
        next(loader) -> Batch       in the main thread, all ranks at once: may call the model and collectives
        loader.state_dict()         as after the last Batch that was given; all ranks call it, and it may use
                                    collectives. torch.load(weights_only=True) must be able to read it
        loader.load_state_dict(s)   called before the first next, if run.checkpoint
    loss_fn(model, *tensors) -> (loss_sum, sums): a scalar with a gradient; a 1-D tensor without one, empty or
        such as rewards and counts, which is added up over micro-batches, ranks and the steps of a record. It
        is called under autocast with the micro-batch on the device.
    log_entry(sums: list of floats, or []) -> dict: what log.jsonl says besides the loss. Called once a record
        on every rank, so a loader may keep counts (passed, dropped, ...) of its own and give them here.
    validate() -> (entry, words): for log.jsonl ({"val": {name: (value, value2)}} is drawn in
        loss.svg) and for the screen. All ranks call it, the model in training mode; it switches to eval.
    chart_options: further arguments of loss_svg, such as {"key": "pass@1", "unit": "pass@1"}.
    """
    args = run.args
    module = run.objective
    if run.world > 1 and not args.fsdp:
        module = DistributedDataParallel(module, gradient_as_bucket_view=True)
    first_step = 0
    if run.checkpoint:
        first_step = run.checkpoint["step"]
        loader.load_state_dict(run.checkpoint["loader"])
    run.print0(f"data     {about}, {args.micro_batch} rows at a time on each of {run.world} process(es)")
    log = Log(run, first_step)
    stop = Stop()
    for step in range(first_step + 1, args.steps + 1):
        start = time.perf_counter()
        # set the rates
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_multiplier(step - 1, args)

        # micro-steps
        batch = next(loader)
        weight, num_tokens, asked = run.sum_over_ranks(batch.weight, batch.num_tokens, stop.signal)
        losses = micro_steps(run, module, loss_fn, batch.micro_batches, weight)

        # clip, and step
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), args.clip or math.inf)
        for optimizer in run.optimizers:
            optimizer.step()
        run.model.zero_grad(set_to_none=True)

        # log, validate, save: a checkpoint has all records of its steps
        log.add(losses, full_tensor(norm), num_tokens, time.perf_counter() - start)
        is_last = step == args.steps
        is_validated = validate and (is_last or step % args.val_every == 0)
        is_saved = asked or is_last or step % args.save_every == 0
        if is_saved or is_validated or step % args.log_every == 0:
            log.summarize(step, log_entry)
        if is_validated:
            entry, words = validate()
            log.write(step, entry)
            run.print0(f"step {step:6,}  validation {words}")
        if is_saved:
            save(run, log, loader, step)
        if asked:
            log.progress.close()
            run.print0(f"stopped; saved at step {step:,} in {args.out}: give the same command to go on")
            data.leave(128 + (stop.signal or signal.SIGTERM))
    log.progress.close()
    report(run, log, chart_options)
    if stop.signal or run.world > 1:        # a signal that came after the last step still ends a recipe
        data.leave(stop.signal and 128 + stop.signal)


# ---------------------------------------------------------------- the recipe
# Every stage is one command, printed before it runs; its product is reused when it is there already.


class Stage(NamedTuple):
    title: str
    why: str
    command: str
    product: str


class Size(NamedTuple):
    """How much of everything the recipe takes, and how long its models see it."""
    folder: str         # below data and runs, or nothing
    pages: int
    page_k: str
    exercises: int
    exercise_k: str
    held_out: int
    held_out_k: str
    web_bytes: int
    pretrain: str
    finetune: str


SIZES = {
    "quick": Size("/quick", 1000, "1-2", 16_000, "1-2", 200, "2-3", 1_000_000,
                  "--lr 0.02 --muon-lr 0.008 --context 384 --batch-tokens 2304 --steps 53",
                  "--lr 0.02 --muon-lr 0.008 --context 192 --batch-tokens 1536 --steps 1200"),
    "laptop": Size("", 6000, "1,1,1,2,2,3", 22_000, "2-5", 600, "2-6", 6_000_000,
                   "--lr 0.02 --muon-lr 0.008 --context 384 --batch-tokens 2304 --steps 400",
                   "--lr 0.02 --muon-lr 0.008 --context 384 --batch-tokens 2304 --steps 1900"),
    "gpu": Size("", 20_000, "1,1,1,2,2,3", 100_000, "2-5", 600, "2-6", 20_000_000,
                "--n-layer 8 --d-model 512 --n-head 8 --n-kv-head 4 --d-ff 1536 "
                "--lr 0.01 --muon-lr 0.006 --context 384 --batch-tokens 24576 --steps 300",
                "--lr 0.01 --muon-lr 0.006 --context 384 --batch-tokens 24576 --steps 1200")}


def recipe_stages(size: Size):
    root, runs = "data" + size.folder, "runs" + size.folder
    bpe = f"--tokenizer {root}/textbooks --out {root}"
    plain = "--rules none --dedup-threshold 1"
    return [
        Stage("textbooks", "a template teacher writes pages; every example on them is executed",
              f"synth.py textbooks --count {size.pages} --k {size.page_k} --out {root}/textbooks.jsonl",
              f"{root}/textbooks.jsonl"),
        Stage("exercises", f"problems with solutions and tests: chains of {size.exercise_k} operations",
              f"synth.py exercises --count {size.exercises} --k {size.exercise_k} --out "
              f"{root}/exercises.jsonl",
              f"{root}/exercises.jsonl"),
        Stage("held-out problems", "of no page's and no exercise's composition, chains of "
                                   f"{size.held_out_k} operations",
              f"synth.py exercises --split test --k {size.held_out_k} --count {size.held_out} --out "
              f"{root}/test.jsonl",
              f"{root}/test.jsonl"),
        Stage("tokenize textbooks", "a byte-level BPE of 1,024 tokens is trained on them",
              f"data.py --input {root}/textbooks.jsonl --name textbooks --tokenizer train:1024 {plain} --out "
              f"{root}",
              f"{root}/textbooks"),
        Stage("tokenize exercises", "prompts are marked, so that finetuning can leave them out",
              f"data.py --input {root}/exercises.jsonl --name exercises {plain} {bpe}",
              f"{root}/exercises"),
        Stage("filter the web", "this machine's own Python source, cleaned and deduplicated",
              f"data.py --input python --name web --max-bytes {size.web_bytes} {bpe}",
              f"{root}/web"),
        Stage("pretrain", "filtered code and textbooks (phi-1's CodeTextbook)",
              f"train.py --data {root}/web:0.2 {root}/textbooks:0.8 {size.pretrain} --out {runs}/base",
              f"{runs}/base"),
        Stage("evaluate the base", "solves the held-out problems by running their tests",
              f"sample.py --run {runs}/base --eval {root}/test.jsonl --json {runs}/base/eval.json "
              "--max-tokens 400 --show 0",
              f"{runs}/base/eval.json"),
        Stage("finetune", "the exercises (phi-1's CodeExercises)",
              f"train.py --data {root}/exercises --init {runs}/base --prompt-weight 0 {size.finetune} "
              f"--out {runs}/phi",
              f"{runs}/phi"),
        Stage("evaluate", "the same held-out problems",
              f"sample.py --run {runs}/phi --eval {root}/test.jsonl --json {runs}/phi/eval.json "
              "--max-tokens 400 --show 1",
              f"{runs}/phi/eval.json")]


# What makes training on a CPU faster, to be set before a process starts. libgomp's threads spin while they
# wait for each other, by default so long that beside other busy processes most of a step is waiting; glibc's
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
        del environment["GOMP_SPINCOUNT"]   # it would win over the user's policy
    return environment


def run_stage(command):
    """-> exit code of the command, in a process that is asked to stop once, whoever was asked."""
    script, *options = shlex.split(command)
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), script)
    words = [sys.executable, program, *options]
    child = subprocess.Popen(words, start_new_session=True, env=stage_environment())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: child.send_signal(number))
    code = child.wait()
    return 128 - code if code < 0 else code


def recipe(size: Size):
    stages = recipe_stages(size)
    book_file = f"runs{size.folder}/recipe.json"
    # product -> the command that made it (None: an attempt was cut short) and its seconds
    book = models.read_json(book_file) if os.path.exists(book_file) else {}
    is_stale = False    # an earlier stage was done again
    print(f"The phi-1 recipe in {len(stages)} stages, each one command. Everything it makes lies under "
          "data/ and runs/; give the same command again to go on after an interruption. A stage by hand "
          "runs as here after\n"
          f"    {EXPORT}\n")
    for number, stage in enumerate(stages, 1):
        before = book.get(stage.product, {"command": None, "seconds": 0})
        is_done = not is_stale and before["command"] == stage.command and os.path.exists(stage.product)
        when = " (done already, reused)" if is_done else ""
        print(f"[{number}/{len(stages)}] {stage.title}: {stage.why}{when}\n    python {stage.command}",
              flush=True)
        if is_done:
            continue
        is_stale = True
        start = time.time()
        code = run_stage(stage.command)
        seconds = time.time() - start + (0 if before["command"] else before["seconds"])
        book[stage.product] = {"command": None if code else stage.command, "seconds": round(seconds, 1)}
        models.write_json(book_file, book)
        if code:
            data.fail(f"{stage.title!r} ended with code {code}; give the same command to go on from "
                      "here", code)
        print(flush=True)
    print_report(stages, book)


def print_report(stages, book):
    """What each stage took and gave, and pass@1 by difficulty before and after finetuning."""
    evaluations = []
    print(f"\n{'stage':20} {'seconds':>8}  result")
    for stage in stages:
        result = ""
        log = read_log(f"{stage.product}/log.jsonl")
        if log:
            bits = ", ".join(f"{name} {value[1]:.3f}" for name, value in log[-1]["val"].items())
            result = f"{log[-1]['tokens']:,} tokens; validation, bits a byte: {bits}"
        elif os.path.exists(f"{stage.product}/meta.json"):
            tokens = models.read_json(f"{stage.product}/meta.json")["train"]["tokens"]
            result = f"{tokens:,} tokens"
        elif stage.product.endswith("eval.json"):
            evaluations.append(models.read_json(stage.product))
            result = f"pass@1 {evaluations[-1]['pass@1']:.1%} on held-out problems"
        print(f"{stage.title:20} {book[stage.product]['seconds']:8.1f}  {result}")
    print(f"{'all':20} {sum(book[stage.product]['seconds'] for stage in stages):8.1f}\n")
    levels = sorted(evaluations[-1]["levels"], key=int)
    heads = [*(f"k = {level}" for level in levels), "all"]
    print(f"{'pass@1 ± standard error':36}" + "".join(f"{head:>16}" for head in heads))
    for name, result in zip(("pretrained on code + textbooks", "finetuned on exercises"), evaluations):
        cells = [*(result["levels"][level] for level in levels), result]
        print(f"{name:36}" + "".join(f"{cell['pass@1']:>9.1%} ±{cell['se']:5.1%}" for cell in cells))
    print("\n"
          "phi-1 itself (HumanEval pass@1): 350 M parameters 20.1 % -> 45 %, 1.3 B 29 % -> 50.6 % by the "
          "same two steps.\n"
          "Ours are held-out compositions of the teacher's own operations: a far easier test, on a model "
          "some hundred times smaller.")


# ---------------------------------------------------------------- options

# What the papers say of pretraining, in our options: shares of the paper's steps. Our defaults do the rest.
PHI_1 = dict(       # arXiv 2306.11644, section 2.3: 750 warmup steps of 36,000
    optimizer="adamw", lr=1e-3, schedule="linear", warmup=0.0208, warmdown_frac=1.0, final_lr=0.0,
    weight_decay=0.1, context=2048, batch_tokens=1024 * 2048)
PHI_15 = dict(      # arXiv 2309.05463, section 2.3
    optimizer="adamw", lr=2e-4, schedule="constant", warmup=0.0, weight_decay=0.1, beta2=0.98, adam_eps=1e-7,
    context=2048, batch_tokens=2048 * 2048)
PHI_3 = dict(       # reported: 2,000 warmup steps of 4 M tokens
    optimizer="adamw", lr=3e-4, schedule="cosine", warmup=0.0024, warmdown_frac=1.0, final_lr=0.1, beta2=0.95,
    context=4096, batch_tokens=1024 * 4096)
PHI_4 = dict(       # arXiv 2412.08905, section 3
    optimizer="adamw", lr=3e-4, schedule="linear", warmdown_frac=1.0, final_lr=0.0, weight_decay=0.1,
    context=4096, batch_tokens=5760 * 4096)
PAPERS = {"phi-1-small": PHI_1, "phi-1": PHI_1, "phi-1.5": PHI_15, "phi-3-mini": PHI_3, "phi-3-small": PHI_3,
          "phi-3-medium": PHI_3, "phi-4": PHI_4}


@contextlib.contextmanager
def one_line_errors():
    """What a user can mend is said in a line, with the exit code 2, or 1 where memory or another process is
    to blame."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            data.fail(f"out of memory; {LESS_MEMORY}", 1)
        lost = ("gloo", "nccl", "connection closed")
        if dist.is_initialized() and any(word in text.lower() for word in lost):
            data.fail(f"rank {dist.get_rank()} lost another one, whose error is the one to read "
                      f"({text[:100]}); give the same command to go on from the last save", 1)
        raise


# Of the loop itself: align.py has them too.
LOOP_OPTIONS = """
optimizer and schedule
--optimizer muon|adamw  muon  muon (for matrices, with AdamW for the rest) or adamw
--lr X  0.003  peak learning rate of AdamW
--muon-lr X  0.01  peak learning rate of Muon
--weight-decay X  0.1  of matrices, decoupled
--beta2 SHARE  0.95  decay of AdamW's second moment
--adam-eps X  1e-10  AdamW's epsilon
--schedule linear|cosine|constant  linear  how rates fall
--warmup SHARE  0.02  of the steps, in which rates rise
--warmdown-frac SHARE  0.5  of the steps, in which they fall
--final-lr SHARE  0.05  of the peak, at the end
--clip X  1.0  largest norm of the gradient; 0: any
--seed N  0  of weights and of the documents' order

machine and files
--micro-tokens N  -  most tokens in a forward pass [as many as fit]
--device auto|cuda|mps|cpu  auto  where to train
--dtype auto|fp32|bf16  auto  of products; auto measures
--compile auto|no  auto  auto: where a compiler is found
--fsdp  spread weights and optimizer state over processes
--activation-checkpointing  run blocks again going back: less memory, more work
--save-every N  250  steps between checkpoints
--log-every N  10  steps between records in log.jsonl
"""
OPTIONS = """
data and run
--data NAME[:X]...  -  datasets and shares; without it the recipe runs
--quick  a recipe with easier problems, in half the time
--out DIR  runs/base  run to write, and to go on from
--init DIR  -  run, directory or hub name whose weights to start from
--continue-from DIR  -  run whose next phase this is, optimizer state and all
--steps N  -  optimizer steps [1000, or the tokens of the preset's paper]
--batch-tokens TOKENS  4096  tokens a step, over all processes
--context TOKENS  -  tokens a row [512, or the context of --init]
--prompt-weight SHARE  0.05  of prompt tokens, where data marks them
--val-tokens TOKENS  65536  of each dataset, to validate on
--val-every N  500  steps between validations, besides the last

a new model
--preset NAME  -  shape and its paper's rates, see python model.py [laptop]
--n-layer N  -  another n_layer than the preset's
--d-model N  -  another d_model than the preset's
--n-head N  -  another n_head than the preset's
--n-kv-head N  -  another n_kv_head than the preset's
--d-ff N  -  another d_ff than the preset's
--rope-theta BASE  -  of the rotary positions
--skip MAX:MIN:TOKENS  -  SkipDecode's layers: of an answer's first token, of its last
""" + LOOP_OPTIONS + """
what training would take
--dry-run  print memory and time, and stop
--gpus N  -  so many [those here]
--gpu-gb X  -  memory of each [as here, or 80]
--peak-tflops X  -  rate of products of each [measured here]
"""


def make_parser():
    about, rest = __doc__.split("\n\n", 1)
    by_hand = f"Faster on CPUs, align.py as well, and set by the recipe for its stages:\n    {EXPORT}"
    parser = data.Parser(prog="train.py", usage="train.py [options]", description=about,
                         epilog=f"{rest}\n{by_hand}")
    types = {"TOKENS": data.number(int, 2), "NAME": models.PRESETS, "BASE": data.number(float, 1),
             "MAX:MIN:TOKENS": models.parse_skip}
    parser.table(OPTIONS, **types)
    return parser


def read_options(parser):
    """Options given win over the preset's paper, and that over the defaults."""
    args = parser.parse_args()
    paper = PAPERS.get(args.preset, {})
    parser.set_defaults(**paper)
    args = parser.parse_args()
    if not args.steps:
        tokens = models.TRAINING_TOKENS.get(args.preset) if paper else None
        args.steps = round(tokens / args.batch_tokens) if tokens else 1000
    if paper and data.RANK == 0:
        used = [f"--{name.replace('_', '-')} {value}" for name, value in paper.items()
                if getattr(args, name) == value]
        print(f"paper    {args.preset}'s, where you gave no other:", *used)
    return args


def pretrain(args):
    datasets, weights, tokenizer = open_mixture(args.data)
    config = choose_config(args, tokenizer)
    if args.skip and not (len(args.skip) == 3 and args.skip[0] <= config.n_layer):
        data.fail(f"--skip {':'.join(map(str, args.skip))} must be MAX:MIN:TOKENS with MAX at most the "
                  f"{config.n_layer} layers")
    world = data.WORLD_SIZE
    args.micro_batch = micro_batch_rows(args, config, rows_of_rank(args, world), world, gpu_gigabytes())
    fingerprints = {name: dataset.meta.get("fingerprint") for name, dataset in zip(args.data, datasets)}
    run = setup(args, config, tokenizer, RESUME_KEYS, fingerprints)
    loader = PackedLoader(args, datasets, weights, run.rank, run.world)
    shares = [f"{dataset.name} {weight / sum(weights):.0%}" for dataset, weight in zip(datasets, weights)]
    millions = args.steps * args.batch_tokens / 1e6
    about = (f"{', '.join(shares)}; {millions:.1f} M tokens in {args.steps:,} steps of "
             f"{args.batch_tokens // args.context:,} x {args.context}")
    train(run, loader, next_token_loss, lambda: validate(run, datasets), about=about)


@data.command()
@one_line_errors()
def main():
    parser = make_parser()
    args = read_options(parser)
    given = [word for word in sys.argv[1:] if word != "--quick"]
    if args.dry_run:
        dry_run(args, choose_config(args, open_mixture(args.data)[2] if args.data else None))
    elif args.data:
        pretrain(args)
    elif given:
        parser.error(f"{given[0]} needs --data; without --data the whole recipe runs, with its own "
                     "settings (each stage prints its command)")
    elif "RANK" in os.environ:
        data.fail("the recipe runs in one process, python train.py: its model is too small for more")
    else:
        on_gpu = models.default_device() == "cuda"
        recipe(SIZES["quick" if args.quick else "gpu" if on_gpu else "laptop"])


if __name__ == "__main__":
    main()

"""Pretraining and finetuning; this commit holds the seam between the loop and what it trains on."""
import argparse
import dataclasses
from typing import NamedTuple

import torch
from torch import nn

RESUME_KEYS = ()


class Batch(NamedTuple):
    """What a loader gives for one optimizer step: this rank's part of it."""
    micro_batches: list     # of tuples of tensors on the CPU (pinned where there is a GPU): the arguments of loss_fn;
    #                         equally many on all ranks, and none on all of them if there is nothing to learn
    weight: float           # what this rank's summed losses count for; the step's loss is their sum over that of weights
    num_tokens: int         # tokens without padding


class Objective(nn.Module):
    """The model under one forward that runs any function of it: what DistributedDataParallel and fully_shard wrap, so
    that a loss may call model.hidden or model.lm_head as well as the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *tensors):
        return function(self.model, *tensors)


@dataclasses.dataclass
class Run:
    """What `setup` made of the options: the same for all kinds of training."""
    args: argparse.Namespace
    model: nn.Module            # its parameters are DTensors with --fsdp; `full_tensor(p)` is all of one
    objective: Objective        # call a function of the model by it where there is no gradient: objective(function, *tensors)
    tokenizer: object
    optimizers: list
    device: torch.device
    dtype: torch.dtype          # of the products
    rank: int
    world: int
    checkpoint: dict | None     # of --out, where the run goes on; its weights and optimizers are loaded already

    def autocast(self):
        """A context in which products are computed in `dtype`."""

    def print0(self, text):
        """On rank 0, beside the progress bar."""


def setup(args, config, tokenizer, resume_keys=RESUME_KEYS, fingerprints=None) -> Run:
    """Process group, device, model and optimizers; weights drawn, of --init, of --continue-from, or of the checkpoint
    in --out. The order in a script is: read data -> settle args.steps -> run = setup(...) -> loader -> train(run, ...).

    config: the shape to train. resume_keys: the names of the options that a resumed run must share with its beginning.
    fingerprints: {what the user calls a data set: what tells its contents}, compared with the checkpoint's as well.
    Bad or changed options end the process in a line with code 2; a run that has all its steps ends it with code 0.
    """


def train(run, loader, loss_fn, validate=None, log_entry=None, about="", chart=None):
    """The loop, from the checkpoint's step to args.steps.

    loader: an iterator of Batches with a state of its own, which depends on nothing but the options and the step:
        next(loader) -> Batch       in the main thread, all ranks at once: a rollout may call the model and collectives
        loader.state_dict()         as after the last Batch that was given; all ranks call it, and it may use collectives.
                                    Numbers, strings, lists, dicts and tensors: torch.load(weights_only=True) reads it
        loader.load_state_dict(s)   called before the first next, if run.checkpoint
    loss_fn(model, *tensors) -> (loss_sum, sums): scalar with a gradient; a 1-D tensor without one (or None), such as
        rewards and counts, which is added up over micro-batches, ranks and the steps between two records. It is called
        under autocast with the micro-batch on the device.
    log_entry(sums: list of floats, or []) -> dict: what log.jsonl says besides the loss. Called once a logged step on
        every rank, so a loader may keep counts (passed, dropped, ...) of its own and give them here.
    validate() -> (entry, words) or None: entry goes to log.jsonl ({"val": {name: (value, value2)}} is drawn in loss.svg),
        words to the screen. All ranks call it, the model in training mode; it switches to eval mode itself.
    chart: further arguments of loss_svg, such as {"key": "pass@1", "unit": "pass@1"}.

    Helpers for those who write loaders: shard_range(count) -> this rank's rows of a step, as a range;
    micro_batch_rows(args, config, rows, world) -> rows at a time, by --micro-tokens or by the memory model;
    full_tensor(tensor) -> all of a (sharded) tensor; choose_dtype, loop_options, one_line_errors as before.
    """

"""Alignment: a trained model learns from chats, from preferences, or from what its own answers are worth.

    python align.py sft --init runs/base --data chats.jsonl --out runs/chat
    python align.py dpo --init runs/chat --data preferences.jsonl --out runs/dpo
    python align.py grpo --init runs/phi --data data/exercises.jsonl --out runs/rl
    python align.py pivotal --init runs/phi --data data/exercises.jsonl --out data/pivotal.jsonl
    torchrun --nproc_per_node=8 align.py grpo --init runs/phi --fsdp --out runs/rl  # one process for each GPU

sft reads chats, {"messages": [{"role", "content"}, ...]}; dpo preferences, {"prompt" or "messages", "chosen",
"rejected"}; grpo problems with tests, or with answers that end in "#### number". pivotal writes preferences
between single tokens, for dpo. The loop is train.py's: the same log, checkpoints and exact resumption when
the same command is given again. `align.py dpo -h` lists the options of dpo.
"""
import functools
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import model as models
import synth
import train


# -----------------------------------------------------------------------------------------------------------
# Records -> token ids, and which of them are to be learned


class Answer(NamedTuple):
    tokens: list[int]           # what the model reads: a prompt, and the answer without its last token
    targets: list[int]          # after each of them the next token, -1 where that is not of the answer
    advantage: float = 1.0
    old: list | float = 0.0     # log-probabilities of the answer's tokens when they were drawn


def make_answer(prompt, ids):
    tokens = prompt + ids
    targets = [-1] * (len(prompt) - 1) + ids
    return Answer(tokens[:-1], targets)


def longest(answers):
    return max(len(answer.tokens) for answer in answers)


def read_records(paths, convert):
    """[convert(record)] of JSON Lines files; an error names the record."""
    converted = []
    for path in paths:
        for number, record in enumerate(data.read_jsonl(path), 1):
            try:
                converted.append(convert(record))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ValueError(f"{path}: record {number}: {error}; mend or remove it") from None
    return converted


def check_texts(record, *names):
    for name in names:
        if not isinstance(record.get(name), str):
            raise ValueError(f"it needs the texts {', '.join(names)}, and has no {name}")


def common_prefix(a, b):
    """Length of the common beginning of two lists. Example: common_prefix([1, 2, 3], [1, 2, 4]) == 2"""
    return len(os.path.commonprefix([a, b]))


def hash_of(*parts):
    """48 bits that depend on the parts alone."""
    return int.from_bytes(data.digest(repr(parts))[:6], "big")


def is_held_out(key, fraction):
    """Decided by content, so that the split never moves and equal prompts stay together."""
    return hash_of(key) < fraction * 2**48


def render(tokenizer, messages):
    """Chat -> (ids in the family's template, mask), 1 for the tokens of assistants' messages and their ends.

    A message begins where the chat parts from the same chat cut before its content, so a token that holds
    both the template's last line break and the content's first characters is learned. Without an end-of-turn
    token (phi-2) the turn's closing text is learned instead.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError('"messages" must be a list of objects with a role and a content')
    ids = tokenizer.render(messages, add_generation_prompt=False)
    mask = [0] * len(ids)
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            start = common_prefix(ids, tokenizer.render(messages[:n]))
            end = common_prefix(ids, tokenizer.render(messages[:n + 1], add_generation_prompt=False))
            ends = [i + 1 for i in range(start, end) if ids[i] in tokenizer.stops]
            end = ends[0] if ends else end
            mask[start:end] = [1] * (end - start)
    return ids, mask


def read_chat(tokenizer, context, record):
    """A chat -> its row, cut to the context, if an assistant's tokens are left; and what tells it apart."""
    ids, mask = render(tokenizer, record.get("messages"))
    targets = [i if is_learned else -1 for i, is_learned in zip(ids, mask)]
    targets = targets[1:context + 1]
    if max(targets, default=-1) < 0:
        return None, ids
    return [Answer(ids[:len(targets)], targets)], ids


def prompt_ids(tokenizer, text):
    """Of a text to be continued. White space at its end belongs to the answer: a line break and the
    indentation after it are one token."""
    return tokenizer.bos + tokenizer.encode(text.rstrip()) or [tokenizer.eot]


def read_preference(tokenizer, context, record):
    """A preference -> its row, chosen and rejected, if they differ and fit the context; and its prompt.

    A prompt given as text is continued as it stands (a document that ends with the end-of-text token), as
    messages in the chat template; "ids", as `pivotal` writes them, are taken as they are: no end follows.
    """
    check_texts(record, "chosen", "rejected", *["prompt"] * ("messages" not in record))
    if record.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise ValueError("its ids are of another tokenizer; make it again with align.py pivotal, this --init")
    pair = []
    for side in ("chosen", "rejected"):
        if "ids" in record:
            prompt = record["ids"]["prompt"]
            ids = record["ids"][side]
        elif "messages" in record:
            last = {"role": "assistant", "content": record[side]}
            chat, mask = render(tokenizer, [*record["messages"], last])
            start = common_prefix(chat, tokenizer.render(record["messages"]))
            prompt = chat[:start]
            ids = chat[start:len(chat) - mask[::-1].index(1)]
        else:
            prompt = prompt_ids(tokenizer, record["prompt"])
            space = record["prompt"][len(record["prompt"].rstrip()):]
            ids = tokenizer.encode(space + record[side]) + [tokenizer.eot]
        pair.append(make_answer(prompt, ids))
    key = record.get("messages", record.get("prompt"))
    if pair[0] == pair[1] or longest(pair) > context:
        return None, key
    return pair, key


def final_answer(text):
    """The number after the last "####", as GSM8K writes it, or None.
    Example: final_answer("so 6 * 200\\n#### 1,200") == Decimal(1200)"""
    numbers = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def read_problem(tokenizer, record):
    """A problem in HumanEval's or GSM8K's fields -> the same with "ids", the tokens of its prompt."""
    if "question" in record:
        check_texts(record, "question", "answer")
        if final_answer(record["answer"]) is None:
            raise ValueError('the answer must end with "#### " and a number')
        messages = [{"role": "user", "content": record["question"]}]
        return {**record, "ids": tokenizer.render(messages)}
    check_texts(record, "prompt", "entry_point", "test")
    prompt = record["prompt"].rstrip()
    return {**record, "prompt": prompt, "ids": prompt_ids(tokenizer, prompt)}


def padded_length(length, context):
    """A quarter, a half or all of the context: few shapes for compiled blocks."""
    lengths = (-(-context // 4), -(-context // 2), context)
    return min(padded for padded in lengths if padded >= length)


def collate(answers, rows, length):
    """Answers -> tokens, targets, advantages, old log-probabilities, (rows, length) each.

    Outside of answers targets are -1, advantages and log-probabilities 0. Padding is on the right, where
    causal attention never looks.
    """
    tokens = torch.zeros(rows, length, dtype=torch.long)
    targets = torch.full_like(tokens, -1)
    advantages, old = torch.zeros(2, rows, length)
    for row, answer in enumerate(answers):
        tokens[row, :len(answer.tokens)] = torch.tensor(answer.tokens)
        targets[row, :len(answer.tokens)] = torch.tensor(answer.targets)
        mask = targets[row] >= 0
        advantages[row, mask] = answer.advantage
        old[row, mask] = torch.tensor(answer.old)
    return tokens, targets, advantages, old


# -----------------------------------------------------------------------------------------------------------
# Losses


LOGITS_AT_ONCE = 2**25      # 128 MB in float32


def token_log_probs(model, tokens, targets):
    """Log-probabilities of the targets, (B, T) float32, 0 where there is none.

    The float32 logits of some positions exist at a time, of answers only, and once more in the backward pass.
    """
    targets = targets.flatten()
    positions = (targets >= 0).nonzero().squeeze(1)
    targets = targets[positions]
    states = model.hidden(tokens).flatten(0, 1)[positions]                      # (N, d_model)

    def log_probs(states, targets):
        return -F.cross_entropy(model.logits(states), targets, reduction="none")

    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = [checkpoint(log_probs, *chunk, use_reentrant=False, preserve_rng_state=False)
             for chunk in zip(states.split(size), targets.split(size))]
    parts = torch.cat(parts)                                                    # (N)
    everywhere = parts.new_zeros(tokens.numel()).index_copy(0, positions, parts)
    return everywhere.view(tokens.shape)


@torch.no_grad()
def answer_log_probs(model, answers, size):
    """[log-probabilities of the answer's tokens] of each answer, `size` answers at a time."""
    lists = []
    for begin in range(0, len(answers), size):
        part = answers[begin:begin + size]
        tokens, targets, *_ = collate(part, len(part), longest(part))
        targets = targets.to(model.device)
        log_probs = token_log_probs(model, tokens.to(model.device), targets)
        lists += [row[mask].tolist() for row, mask in zip(log_probs, targets >= 0)]
    return lists


def dpo_loss(policy, reference, beta: float):
    """Log-probabilities (P, 2) of chosen and rejected answers -> losses (P) and implicit rewards (P, 2).

    -log sigmoid(margin) (Rafailov et al., arXiv 2305.18290, equation 7).
    """
    rewards = beta * (policy - reference)
    chosen, rejected = rewards.unbind(1)
    return -F.logsigmoid(chosen - rejected), rewards


def group_advantages(rewards):
    """(problems, generations) -> the same shape: what an answer is worth beside the others of its problem.

    Not divided by their standard deviation, which favours problems that are nearly always or never solved
    (Dr. GRPO, arXiv 2503.20783).
    """
    return rewards - rewards.mean(1, keepdim=True)


def clipped_surrogate(log_probs, old_log_probs, advantages, low: float = 0.2, high: float = 0.28):
    """Of each token (B, T), advantages (B, 1) -> losses, and whether the ratio is clipped.

    -min(ratio A, clip(ratio, 1 - low, 1 + high) A) (GRPO, arXiv 2402.03300, equation 3; two bounds: DAPO,
    arXiv 2503.14476).
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(ratio * advantages, clipped), clipped < ratio * advantages


def kl(log_probs, reference_log_probs):
    """Of each token an estimate of the divergence from the reference, never negative (arXiv 2402.03300,
    equation 4)."""
    log_ratio = reference_log_probs - log_probs
    return log_ratio.exp() - log_ratio - 1


# -----------------------------------------------------------------------------------------------------------
# Rollouts, and what they are worth


def rollout(model, tokenizer, problems, args, seeds):
    """Answers to problems' prompts -> [ids of the answer], [text to be judged]; --batch-size at a time.

    An answer goes on from the ids that its problem has "begun" with. It ends with an end token, which belongs
    to it, with its function (a line at column 0), after --max-tokens, or with the context: prompt and answer
    have --context tokens at most. A prompt that fills it gets no answer.
    """
    answers = [list(problem.get("begun", ())) for problem in problems]

    def has_ended(row):
        ids = answers[row]
        room = min(args.max_tokens, args.context - len(problems[row]["ids"]))
        line = "test" in problems[row] and re.search(rb"\n\S", tokenizer.decode_bytes(ids[-2:]))
        return len(ids) >= room or line or tokenizer.stops.intersection(ids[-1:])

    def emit(slot, token):
        answers[rows[slot]].append(token)
        return has_ended(rows[slot])

    unfinished = [row for row in range(len(problems)) if not has_ended(row)]
    for begin in range(0, len(unfinished), args.batch_size):
        rows = unfinished[begin:begin + args.batch_size]
        prompts = [problems[row]["ids"] + answers[row] for row in rows]
        model.generate(prompts, args.max_tokens, temperature=1.0, stop=tokenizer.stops,
                       seed=[seeds[row] for row in rows], stream=emit)
    texts = [tokenizer.decode([i for i in ids if i not in tokenizer.stops]) for ids in answers]
    for row, problem in enumerate(problems):
        if "test" in problem:
            texts[row] = re.split(r"\n(?=\S)", texts[row])[0]
    return answers, texts


def rewards(problems, texts):
    """1.0 for each text that passes its problem's tests in synth.py's sandbox, or whose final answer is the
    problem's, else 0.0."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = max(1, (os.cpu_count() or 1) // local_world)
    pairs = list(zip(problems, texts))
    programs = [pair for pair in pairs if "test" in pair[0]]
    verdicts = iter(synth.judge_all(programs, workers=workers))
    passed = []
    for problem, text in pairs:
        if "test" in problem:
            passed.append(float(next(verdicts).passed))
        else:
            passed.append(float(final_answer(text) == final_answer(problem["answer"])))
    return passed


def rollout_model(model, dtype):
    """The model as it is now, in this type, with plain blocks: those of training may be compiled for other
    shapes, or sharded. Each rank casts its part of a tensor before all gather it."""
    with torch.device("meta"):
        copy = models.Model(model.config)
    weights = {name: train.full_tensor(tensor.detach().to(dtype))
               for name, tensor in models.stored_parameters(model).items()}
    copy.load_state_dict(weights, strict=False, assign=True)
    copy.tie_embeddings()
    return copy.requires_grad_(False)


def solve_together(run, problems, position):
    """-> [(Answer, reward)]. Each rank solves some of the problems; which does not change what is drawn."""
    args = run.args
    numbers = train.shard_range(len(problems), run.rank, run.world)
    problems = problems[numbers.start:numbers.stop]
    seeds = [hash_of(args.seed, position, i) for i in numbers]
    dtype = run.dtype if run.device.type == "cuda" else torch.float32
    model = rollout_model(run.model, dtype)
    answers, texts = rollout(model, run.tokenizer, problems, args, seeds)
    passed = rewards(problems, texts)
    answers = [make_answer(problem["ids"], ids) for problem, ids in zip(problems, answers)]
    if args.updates > 1:
        old = answer_log_probs(model, answers, args.micro_batch)
        answers = [answer._replace(old=log_probs) for answer, log_probs in zip(answers, old)]
    return sum(train.gather_objects(list(zip(answers, passed))), [])


# -----------------------------------------------------------------------------------------------------------
# What the kinds of training share


def open_init(args):
    """-> config and tokenizer of --init, with args.context settled."""
    folder = models.snapshot_download(args.init, weights=False)
    config = models.read_config(os.path.join(folder, "config.json"))
    if (args.context or 0) > config.max_seq_len:
        data.fail(f"--context {args.context} is longer than the {config.max_seq_len} tokens of {args.init}; "
                  "lower it, or grow it first with grow.py")
    args.context = args.context or min(config.max_seq_len, 2048)
    return config, models.Tokenizer.load(folder)


def setup(args, config, tokenizer, num_rows, contents, width=1):
    """-> train.Run, for steps of num_rows rows of `width` answers. contents: what a resumed run must find as
    it was."""
    files = " ".join(args.data)
    if not contents:
        raise ValueError(f"--data {files}: nothing is left to train on in a context of {args.context} tokens")
    world = int(os.environ.get("WORLD_SIZE", 1))
    args.max_rows = -(-num_rows // world)
    most = train.micro_batch_rows(args, config, args.max_rows * width, world, train.gpu_gigabytes())
    args.micro_batch = max(1, most // width)
    keys = [key for key in (*train.RESUME_KEYS, *RESUME_KEYS) if key in args]
    return train.setup(args, config, tokenizer, keys, {files: hash_of(contents)})


RESUME_KEYS = ("held_out", "batch", "beta", "prompts", "num_generations", "updates", "max_tokens", "kl")


def open_reference(run):
    """The model that training began with, whole on each rank, in the type of the products."""
    model, _ = models.load(run.args.init, run.device, run.dtype)
    return model.requires_grad_(False)


def draw(state, records, count, seed):
    """The next records of an endless stream, shuffled anew each epoch; state["position"] moves on."""
    drawn = []
    while len(drawn) < count:
        epoch, index = divmod(state["position"], len(records))
        order = np.random.default_rng([seed, epoch]).permutation(len(records))
        part = order[index:index + count - len(drawn)]
        drawn += [records[i] for i in part]
        state["position"] += len(part)
    return drawn


@dataclass
class RowLoader:
    """Steps of rows, each a list of answers that stay together."""

    run: train.Run
    next_rows: Callable     # next_rows(state) -> the rows of a step, the same on all ranks
    state: dict
    weight: Callable        # weight(rows): by what their summed loss is divided

    def state_dict(self):
        return json.loads(json.dumps(self.state))       # a copy in plain lists

    def load_state_dict(self, state):
        self.state.update(state)

    def __next__(self):
        return self.batch(self.next_rows(self.state))

    def batch(self, rows):
        """Short rows are more in a micro-batch than long ones. All ranks have equally many micro-batches."""
        run = self.run
        context = run.args.context
        rows = sorted(rows, key=longest, reverse=True)
        mine = []
        micro_batches = []
        while rows:
            length = padded_length(longest(rows[0]), context)
            size = min(run.args.micro_batch * (context // length), run.args.max_rows)
            width = len(rows[0])
            part = rows[run.rank:size * run.world:run.world]
            micro_batches.append(collate(sum(part, []), size * width, length))
            mine += part
            rows = rows[size * run.world:]
        num_tokens = sum(len(answer.tokens) for answer in sum(mine, []))
        return train.Batch(micro_batches, self.weight(mine), num_tokens)


def count_targets(rows):
    return sum(target >= 0 for answer in sum(rows, []) for target in answer.targets)


# -----------------------------------------------------------------------------------------------------------
# The kinds of training


def cross_entropy(reference, args, model, tokens, targets, advantages, *_):
    """sft, where advantages are 1; and grpo on policy, where ratios are 1: its gradient is the policy's."""
    loss, _ = model(tokens, targets=targets, weights=advantages)
    return loss, torch.empty(0, device=tokens.device)


def preference_objective(reference, args, model, tokens, targets, *_):
    """Of answers chosen, rejected, chosen, ... -> sum of losses, and what preference_metrics reads."""
    with torch.no_grad():
        reference_scores = token_log_probs(reference, tokens, targets).sum(1)
        reference_scores = reference_scores.view(-1, 2)
    scores = token_log_probs(model, tokens, targets).sum(1).view(-1, 2)
    losses, rewards = dpo_loss(scores, reference_scores, args.beta)
    chosen, rejected = rewards.detach().unbind(1)
    is_pair = (targets >= 0).any(1)[::2]        # other rows fill the micro-batch
    sums = torch.stack([is_pair, chosen > rejected, chosen - rejected, chosen, rejected])
    return (losses * is_pair).sum(), sums.sum(1)


def preference_metrics(sums):
    means = [value / sums[0] for value in sums[1:]]
    return dict(zip(("accuracy", "margin", "reward_chosen", "reward_rejected"), means))


def finetune(args, read, objective, weight, metrics=None, width=1):
    """sft and dpo. read(tokenizer, context, record) -> a row of `width` answers or None, and what it is held
    out by."""
    config, tokenizer = open_init(args)
    records = read_records(args.data, functools.partial(read, tokenizer, args.context))
    rows = [row for row, key in records if row and not is_held_out(key, args.held_out)]
    held_out = [row for row, key in records if row and is_held_out(key, args.held_out)]
    args.steps = args.steps or math.ceil(args.epochs * len(rows) / args.batch)
    run = setup(args, config, tokenizer, args.batch, rows, width)
    reference = open_reference(run) if width == 2 else None
    loss_fn = functools.partial(objective, reference, args)

    @torch.no_grad()
    def validate():
        batch = loader.batch(held_out)
        totals = []
        for micro_batch in batch.micro_batches:
            with run.autocast():
                loss, sums = run.objective(loss_fn, *(tensor.to(run.device) for tensor in micro_batch))
            totals.append([loss.item(), *sums.tolist()])
        weight, loss, *sums = run.sum_over_ranks(batch.weight, *map(sum, zip(*totals)))
        entry = metrics(sums) if metrics else {}
        words = [f"{name} {value:.4f}" for name, value in {"loss": loss / weight, **entry}.items()]
        return {"val": {args.kind: (loss / weight, entry.get("accuracy"))}}, ", ".join(words)

    def next_rows(state):
        return draw(state, rows, args.batch, args.seed)

    loader = RowLoader(run, next_rows, {"position": 0}, weight)
    unfit = len(records) - len(rows) - len(held_out)
    about = f"{len(rows):,} rows, {len(held_out):,} held out, {unfit:,} with nothing to learn or too long"
    train.train(run, loader, loss_fn, validate if held_out else None, metrics, about)


def policy_objective(reference, args, model, tokens, targets, advantages, old):
    """-> sum of losses; number of tokens, and over them sums of -log p, whose mean is the entropy, of clipped
    ratios, and of the divergence."""
    if args.updates == 1 and not args.kl:
        return cross_entropy(reference, args, model, tokens, targets, advantages)
    log_probs = token_log_probs(model, tokens, targets)
    old = log_probs.detach() if args.updates == 1 else old
    losses, clipped = clipped_surrogate(log_probs, old, advantages)
    divergence = torch.zeros_like(losses)
    if args.kl:
        with torch.no_grad():
            reference_log_probs = token_log_probs(reference, tokens, targets)
        divergence = kl(log_probs, reference_log_probs)
    loss = (losses + args.kl * divergence).sum()
    columns = (targets >= 0, -log_probs, clipped, divergence)
    return loss, torch.stack([column.detach().sum() for column in columns])


def grpo(args):
    """Group relative policy optimization: rollout, normalize, update; a row is an answer of the model's own.

    As DAPO without its extras: each token counts the same, two clipping bounds. Groups of equal rewards are
    dropped, since they teach nothing; with --kl they stay, and are held near --init.
    """
    config, tokenizer = open_init(args)
    problems = read_records(args.data, functools.partial(read_problem, tokenizer))
    problems = [problem for problem in problems if len(problem["ids"]) < args.context]
    prompts_each = -(-args.prompts // args.updates)
    run = setup(args, config, tokenizer, prompts_each * args.num_generations, problems)

    def next_rows(state):
        if not state["steps"]:
            drawn = draw(state, problems, args.prompts, args.seed)
            drawn = [problem for problem in drawn for _ in range(args.num_generations)]
            answers, passed = zip(*solve_together(run, drawn, state["position"]))
            advantages = group_advantages(torch.tensor(passed).view(args.prompts, -1))
            rows = []
            for answer, advantage in zip(answers, advantages.flatten().tolist()):
                rows.append([answer._replace(advantage=advantage)])
            size = args.num_generations
            groups = [rows[begin:begin + size] for begin in range(0, len(rows), size)]
            groups = [group for group, values in zip(groups, advantages) if args.kl or values.any()]
            state["steps"] = [sum(groups[i::args.updates], []) for i in range(args.updates)]
            length = count_targets(rows) / len(rows)
            dropped = 1 - len(groups) / args.prompts
            state["metrics"] = {"pass@1": mean(passed), "length": length, "dropped": dropped}
        return [[Answer(*answer) for answer in row] for row in state["steps"].pop(0)]

    def log_entry(sums):
        means = [value / max(sums[0], 1) for value in sums[1:]]
        return loader.state["metrics"] | dict(zip(("entropy", "clipped", "kl"), means))

    state = {"position": 0, "steps": [], "metrics": {}}
    loader = RowLoader(run, next_rows, state, count_targets)
    reference = open_reference(run) if args.kl else None
    loss_fn = functools.partial(policy_objective, reference, args)
    about = f"{len(problems):,} problems; {args.prompts} x {args.num_generations} answers at a time"
    chart = {"key": "pass@1", "unit": "pass@1"}
    train.train(run, loader, loss_fn, None, log_entry, about, chart)


# -----------------------------------------------------------------------------------------------------------
# Pivotal tokens


def subdivide(success, tokens, log_probs, gap):
    """Pivotal token search (phi-4, arXiv 2412.08905, section 4.3): yields (tokens before, token, its change).

    success(tokens): the chance of it after these tokens. A part of the answer over which it moves by `gap` is
    halved where half of its cost, -log p, is spent, down to single tokens; other parts are left alone, though
    they may hold tokens that cancel out.
    """
    parts = [(0, len(tokens))]
    while parts:
        begin, end = parts.pop()
        change = success(tokens[:end]) - success(tokens[:begin])
        if begin == end or abs(change) < gap:
            continue
        if end - begin == 1:
            yield tokens[:begin], tokens[begin], change
            continue
        spent = np.cumsum(log_probs[begin:end])
        half = np.argmax(spent <= spent[-1] / 2) + 1
        middle = begin + min(int(half), end - begin - 1)
        parts += [(middle, end), (begin, middle)]


@torch.no_grad()
def likeliest_others(model, ids, token):
    """The three likeliest tokens after ids, except this one."""
    states = model.hidden(torch.tensor([ids], device=model.device))
    likeliest = model.logits(states[0, -1]).topk(4).indices.tolist()
    return [other for other in likeliest if other != token][:3]


def pivotal_pairs(model, tokenizer, problem, args):
    """Yields preferences between single tokens of the model's own answers to a problem.

    The search compares many estimates and takes the extreme ones, so part of each gap that it finds is luck.
    A pair is written if four times as many fresh answers, which took no part in the search, show it again.
    """
    prompt = problem["ids"]

    def sample(begun, count, stage):
        problems = [{**problem, "begun": begun}] * count
        seeds = [hash_of(args.seed, prompt, begun, stage, i) for i in range(count)]
        answers, texts = rollout(model, tokenizer, problems, args, seeds)
        return answers, rewards(problems, texts)

    @functools.cache
    def success(begun):
        return mean(sample(begun, args.samples, "search")[1])

    answers, passed = sample((), args.samples, "search")
    if not 0.2 <= mean(passed) <= 0.8:       # as in the paper: what is always or never solved has no pivot
        return
    right = answers[passed.index(1.0)]
    wrong = answers[passed.index(0.0)]
    for answer in (right, wrong):
        log_probs, = answer_log_probs(model, [make_answer(prompt, answer)], 1)
        for begun, token, change in subdivide(success, tuple(answer), log_probs, args.gap):
            others = likeliest_others(model, [*prompt, *begun], token)
            other = min(others, key=lambda other: change * success((*begun, other)))
            pair = (token, other) if change > 0 else (other, token)
            fresh = [sample((*begun, side), 4 * args.samples, "confirm") for side in pair]
            odds = [mean(passed) for _, passed in fresh]
            if odds[0] - odds[1] >= args.gap:
                chosen, rejected = pair
                ids = {"prompt": [*prompt, *begun], "chosen": [chosen], "rejected": [rejected]}
                texts = {side: tokenizer.decode(side_ids) for side, side_ids in ids.items()}
                yield {**texts, "odds": odds, "task_id": problem.get("task_id"), "ids": ids,
                       "tokenizer": tokenizer.fingerprint}


def pivotal(args):
    _, tokenizer = open_init(args)
    problems = read_records(args.data, functools.partial(read_problem, tokenizer))
    device = torch.device(models.default_device())
    model, _ = models.load(args.init, device, train.choose_dtype(device, "auto")[0])
    pairs = {}
    finished = False
    try:
        for problem in tqdm(problems, "searching", disable=None):
            for pair in pivotal_pairs(model, tokenizer, problem, args):
                pairs[repr(pair["ids"])] = pair
        finished = True
    finally:        # what was found before an interruption took time too
        path = synth.write_output(args.out, pairs.values(), lambda: finished)
        print(f"{path or 'nothing written'}: {len(pairs):,} pairs from {len(problems):,} problems")
        if not pairs:
            print("give more problems, a smaller --gap, or a model that solves some of them sometimes")


# -----------------------------------------------------------------------------------------------------------
# The command


SFT = dict(read=read_chat, objective=cross_entropy, weight=count_targets)
DPO = dict(read=read_preference, objective=preference_objective, weight=len, metrics=preference_metrics,
           width=2)
KINDS = {
    "sft": (functools.partial(finetune, **SFT), "learn from chats", "runs/sft"),
    "dpo": (functools.partial(finetune, **DPO), "learn from preferences", "runs/dpo"),
    "grpo": (grpo, "learn from rewards", "runs/grpo"),
    "pivotal": (pivotal, "write preferences between the single tokens that decide", "data/pivotal.jsonl")}


def parse_options(arguments=None):
    parser = data.Parser(prog="align.py", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(KINDS))
    fraction = data.number(float, 0, 1)
    count = data.number(int, 1)
    several = data.number(int, 2)
    positive = data.number(float, 1e-9)
    for kind, (_, about, out) in KINDS.items():
        sub = kinds.add_parser(kind, help=about, description=f"{about}; see align.py -h")
        option = sub.option
        is_finetuning = kind in ("sft", "dpo")
        option("--init", "runs/phi", "run directory, Hugging Face directory or hub name to start from")
        files = None if is_finetuning else ["data/exercises.jsonl"]
        option("--data", files, "chats, preferences or problems, .jsonl or .jsonl.gz", nargs="+",
               metavar="FILE", required=is_finetuning)
        option("--out", out, "what to write")
        option("--context", None, "tokens of a prompt with its answer (default: --init's, at most 2048)",
               type=several)
        if is_finetuning:
            option("--epochs", 3.0 if kind == "sft" else 1.0, "passes over the data, without --steps",
                   type=positive)
            option("--batch", 32, "chats or pairs a step, over all processes", type=count)
            option("--held-out", 0.05, "share of the data to validate on", type=fraction)
        else:
            option("--max-tokens", 256, "tokens of an answer at most", type=count)
            option("--batch-size", 64, "answers generated at once", type=count)
        if kind == "dpo":
            option("--beta", 0.1, "how strongly --init is held on to", type=positive)
        if kind == "grpo":
            option("--prompts", 16, "problems sampled at once", type=count)
            option("--num-generations", 8, "answers to each problem", type=several)
            option("--updates", 1, "optimizer steps made from them, each on its share", type=count)
            option("--kl", 0.0, "weight of the divergence from --init", type=data.number(float, 0))
        if kind == "pivotal":
            option("--samples", 16, "answers that a chance of success is estimated from", type=count)
            option("--gap", 0.2, "by how much a pivotal token moves it", type=fraction)
            option("--seed", 0, "of the sampling", type=data.number(int, 0))
        else:
            option("--steps", 100 if kind == "grpo" else None, "optimizer steps", type=count)
            train.loop_options(option)
            sub.set_defaults(continue_from=None, optimizer="adamw", weight_decay=0.0, warmup=0.1,
                             lr=2e-5 if kind == "sft" else 1e-6, warmdown_frac=0.9, final_lr=0.0,
                             val_every=100, save_every=100, log_every=1 if kind == "grpo" else 10)
    return parser.parse_args(arguments)


@data.command()
def main(arguments=None):
    args = parse_options(arguments)
    with train.one_line_errors():
        KINDS[args.kind][0](args)


if __name__ == "__main__":
    main()

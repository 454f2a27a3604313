"""Alignment: a trained model learns from chats, from preferences, or from what its own answers are worth.

    python align.py sft --init runs/base --data chats.jsonl --out runs/chat
    python align.py dpo --init runs/chat --data preferences.jsonl --out runs/dpo
    python align.py grpo --init runs/phi --data data/exercises.jsonl --out runs/rl
    python align.py pivotal --init runs/phi --data data/exercises.jsonl --out data/pivotal.jsonl
    torchrun --nproc_per_node=8 align.py grpo --init runs/phi --fsdp --out runs/rl     # one process for each GPU

sft reads chats, {"messages": [{"role", "content"}, ...]}; dpo preferences, {"prompt" or "messages", "chosen",
"rejected"}; grpo problems with tests, or with answers that end in "#### number". pivotal writes preferences between
single tokens, for dpo. The loop is train.py's: the same log, checkpoints and exact resumption when the same command
is given again. `align.py dpo -h` lists the options of dpo.
"""
import functools
import json
import math
import os
import re
from decimal import Decimal
from statistics import mean
from types import SimpleNamespace
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
    ids: list[int]              # of the prompt and the answer
    start: int                  # where the answer begins
    advantage: float = 0.0
    old: list | float = 0.0     # log-probabilities of the answer's tokens when they were drawn


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


def is_held_out(prompt, fraction):
    """Decided by the prompt's content, so that the split never moves and equal prompts stay together."""
    return hash_of(prompt) < fraction * 2**48


def render(tokenizer, messages):
    """Chat -> (ids in the family's template, mask): 1 for each token of an assistant's message and the one that
    ends its turn.

    A message begins where the chat parts from the same chat cut before its content, so a token that holds both
    the template's last line break and the content's first characters is learned. Without an end-of-turn token
    (phi-2) the turn's closing text is learned instead.
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


def prompt_ids(tokenizer, text):
    """Of a text to be continued. White space at its end belongs to the answer: a line break and the indentation
    after it are one token."""
    return tokenizer.bos + tokenizer.encode(text.rstrip()) or [tokenizer.eot]


def read_preference(tokenizer, record):
    """A preference -> [chosen, rejected], and what tells its prompt.

    A prompt given as text is continued as it stands (a document that ends with the end-of-text token), as
    messages in the chat template; "ids", as `pivotal` writes them, are taken as they are: no end token follows.
    """
    check_texts(record, "chosen", "rejected", *["prompt"] * ("messages" not in record))
    if record.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise ValueError("its ids are of another tokenizer; make the file again with align.py pivotal and this --init")
    pair = []
    for side in ("chosen", "rejected"):
        if "ids" in record:
            before = record["ids"]["prompt"]
            ids = before + record["ids"][side]
        elif "messages" in record:
            ids, mask = render(tokenizer, [*record["messages"], {"role": "assistant", "content": record[side]}])
            before = ids[:common_prefix(ids, tokenizer.render(record["messages"]))]
            ids = ids[:len(ids) - mask[::-1].index(1)]
        else:
            before = prompt_ids(tokenizer, record["prompt"])
            space = record["prompt"][len(record["prompt"].rstrip()):]
            ids = before + tokenizer.encode(space + record[side]) + [tokenizer.eot]
        pair.append(Answer(ids, len(before)))
    return pair, record.get("messages", record.get("prompt"))


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
        return {**record, "ids": tokenizer.render([{"role": "user", "content": record["question"]}])}
    check_texts(record, "prompt", "entry_point", "test")
    return {**record, "prompt": record["prompt"].rstrip(), "ids": prompt_ids(tokenizer, record["prompt"])}


def collate(answers, rows, context):
    """Answers, at most `rows` -> tokens, targets, advantages, old log-probabilities, (rows, T) each; targets are -1
    outside of the answer.

    Padding is on the right, where causal attention never looks. T is a quarter, a half or all of the context:
    with and without gradients that makes six shapes of compiled blocks, and torch keeps eight.
    """
    longest = max([len(ids) - 1 for ids, *_ in answers], default=0)
    length = min(size for size in (-(-context // 4), -(-context // 2), context) if size >= longest)
    tokens = torch.zeros(rows, length, dtype=torch.long)
    targets = torch.full_like(tokens, -1)
    advantages, old = torch.zeros(2, rows, length)
    for row, (ids, start, advantage, old_log_probs) in enumerate(answers):
        part = slice(start - 1, len(ids) - 1)
        tokens[row, :part.stop] = torch.tensor(ids[:-1])
        targets[row, part] = torch.tensor(ids[start:])
        advantages[row, part] = advantage
        old[row, part] = torch.tensor(old_log_probs)
    return tokens, targets, advantages, old


# -----------------------------------------------------------------------------------------------------------
# Losses


LOGITS_AT_ONCE = 2**25      # 128 MB in float32


def token_log_probs(model, tokens, targets, temperature: float = 1.0):
    """Log-probabilities of the targets, (B, T) float32, 0 where there is none.

    The float32 logits of some positions exist at a time, of answers only, and once more in the backward pass.
    """
    targets = targets.flatten()
    positions = (targets >= 0).nonzero().squeeze(1)
    targets = targets[positions]
    states = model.hidden(tokens).flatten(0, 1)[positions]                      # (N, d_model)

    def log_probs(states, targets):
        logits = model.logits(states) / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = [checkpoint(log_probs, *chunk, use_reentrant=False, preserve_rng_state=False)
             for chunk in zip(states.split(size), targets.split(size))]
    flat = torch.cat(parts)                                                     # (N)
    return flat.new_zeros(tokens.numel()).index_copy(0, positions, flat).view(tokens.shape)


@torch.no_grad()
def answer_log_probs(model, answers, size, context, temperature=1.0):
    """[log-probabilities of the answer's tokens] of each answer, `size` answers at a time."""
    lists = []
    for begin in range(0, len(answers), size):
        part = answers[begin:begin + size]
        tokens, targets, *_ = collate(part, len(part), context)
        log_probs = token_log_probs(model, tokens.to(model.device), targets.to(model.device), temperature).cpu()
        lists += [row[mask].tolist() for row, mask in zip(log_probs, targets >= 0)]
    return lists


def dpo_loss(policy, reference, beta: float):
    """Log-probabilities (P, 2) of chosen and rejected answers -> losses (P) and implicit rewards (P, 2).

    -log sigmoid(margin) (Rafailov et al., arXiv 2305.18290, equation 7).
    """
    rewards = beta * (policy - reference)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


def group_advantages(rewards):
    """(problems, generations) -> the same shape: what an answer is worth beside the others of its problem. Not
    divided by their standard deviation, which favours problems that are nearly always or never solved
    (arXiv 2503.20783)."""
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


def rollout(model, tokenizer, problems, args, temperature, seeds):
    """Answers to problems' prompts -> [(ids of the answer, text to be judged)]; an answer goes on from the ids that
    its problem has "begun" with.

    It ends with an end token, which belongs to it, with its function (a line at column 0), after --max-tokens, or
    with the context: prompt and answer have --context tokens at most. A prompt that fills it gets no answer.
    """
    answers = [list(problem.get("begun", ())) for problem in problems]

    def has_ended(row):
        ids = answers[row]
        room = min(args.max_tokens, args.context - len(problems[row]["ids"]))
        line = "test" in problems[row] and re.search(rb"\n\S", tokenizer.decode_bytes(ids[-2:]))
        return len(ids) >= room or bool(line or tokenizer.stops.intersection(ids[-1:]))

    unfinished = [row for row in range(len(problems)) if not has_ended(row)]

    def emit(slot, token):
        answers[unfinished[slot]].append(token)
        return has_ended(unfinished[slot])

    prompts = [problems[row]["ids"] + answers[row] for row in unfinished]
    seeds = [seeds[row] for row in unfinished]
    model.generate(prompts, args.max_tokens, temperature, stop=tokenizer.stops, seed=seeds, stream=emit)
    texts = [tokenizer.decode([i for i in ids if i not in tokenizer.stops]) for ids in answers]
    return [(ids, re.split(r"\n(?=\S)", text)[0] if "test" in problem else text)
            for problem, ids, text in zip(problems, answers, texts)]


def rewards(problems, texts):
    """1.0 for each text that passes its problem's tests in synth.py's sandbox, or whose final answer is the
    problem's; else 0.0."""
    workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    programs = [(problem, text) for problem, text in zip(problems, texts) if "test" in problem]
    verdicts = iter(synth.judge_all(programs, workers=workers))
    return [float(next(verdicts).passed if "test" in problem
                  else final_answer(text) == final_answer(problem["answer"]))
            for problem, text in zip(problems, texts)]


def solve(model, tokenizer, problems, args, temperature, seeds):
    """-> [ids of the answer], [reward]; --batch-size answers are written at a time."""
    answers = []
    for begin in range(0, len(problems), args.batch_size):
        part = slice(begin, begin + args.batch_size)
        answers += rollout(model, tokenizer, problems[part], args, temperature, seeds[part])
    return [ids for ids, _ in answers], rewards(problems, [text for _, text in answers])


def rollout_model(model, dtype):
    """The model as it is now, in this type, with plain blocks: those of training may be compiled for other shapes, or
    sharded. Each rank casts its part of a tensor before all gather it."""
    with torch.device("meta"):
        copy = models.Model(model.config)
    weights = {name: train.full_tensor(tensor.detach().to(dtype))
               for name, tensor in models.stored_parameters(model).items()}
    copy.load_state_dict(weights, strict=False, assign=True)
    copy.tie_embeddings()
    return copy.requires_grad_(False)


def solve_together(run, problems, temperature, position):
    """-> [(Answer, reward)]; each rank solves some of the problems, and what is drawn does not depend on which."""
    args = run.args
    numbers = train.shard_range(len(problems), run.rank, run.world)
    problems = problems[numbers.start:numbers.stop]
    seeds = [hash_of(args.seed, position, i) for i in numbers]
    model = rollout_model(run.model, run.dtype if run.device.type == "cuda" else torch.float32)
    answers, passed = solve(model, run.tokenizer, problems, args, temperature, seeds)
    answers = [Answer(problem["ids"] + ids, len(problem["ids"])) for problem, ids in zip(problems, answers)]
    if args.updates > 1:
        old = answer_log_probs(model, answers, args.micro_batch, args.context, temperature)
        answers = [answer._replace(old=log_probs) for answer, log_probs in zip(answers, old)]
    return sum(train.gather_objects(list(zip(answers, passed))), [])


# -----------------------------------------------------------------------------------------------------------
# What the kinds of training share


def open_init(args):
    """-> config and tokenizer of --init, with args.context settled."""
    folder = models.snapshot_download(args.init, weights=False)
    config = models.read_config(os.path.join(folder, "config.json"))
    if (args.context or 0) > config.max_seq_len:
        data.fail(f"--context {args.context} is longer than the {config.max_seq_len} tokens of {args.init}; lower "
                  "it, or grow it first with grow.py")
    args.context = args.context or min(config.max_seq_len, 2048)
    return config, models.Tokenizer.load(folder)


def setup(args, config, tokenizer, num_rows, records, width=1):
    """-> train.Run, of steps of num_rows rows, `width` sequences each; records: what a resumed run must find
    unchanged."""
    if not records:
        raise ValueError(f"--data {' '.join(args.data)}: nothing is left to train on; the context is {args.context} tokens")
    world = int(os.environ.get("WORLD_SIZE", 1))
    most = train.micro_batch_rows(args, config, -(-num_rows // world) * width, world, train.gpu_gigabytes())
    args.micro_batch = max(1, most // width)
    keys = [key for key in (*train.RESUME_KEYS, *RESUME_KEYS) if key in args]
    return train.setup(args, config, tokenizer, keys, {" ".join(args.data): hash_of(records)})


RESUME_KEYS = ("held_out", "batch", "beta", "prompts", "num_generations", "updates", "max_tokens", "temperature", "kl")


def open_reference(run):
    """The model that training began with, whole on each rank, in the type of the products."""
    return models.load(run.args.init, run.device, run.dtype)[0].requires_grad_(False)


def draw(records, begin, end, seed):
    """The records from `begin` to `end` of an endless stream, shuffled anew each epoch."""
    drawn = []
    while begin < end:
        epoch, index = divmod(begin, len(records))
        order = np.random.default_rng([seed, epoch]).permutation(len(records))[index:index + end - begin]
        drawn += [records[i] for i in order]
        begin += len(order)
    return drawn


class RowLoader:
    """Steps of rows, each a list of answers that stay together; next_rows(state) gives a step's, the same on all
    ranks. weight(rows): by what their summed loss is divided."""

    def __init__(self, run, next_rows, state, weight):
        self.run = run
        self.next_rows = next_rows
        self.state = state
        self.weight = weight

    def state_dict(self):
        return json.loads(json.dumps(self.state))       # a copy in plain lists

    def load_state_dict(self, state):
        self.state.update(state)

    def __next__(self):
        return self.batch(self.next_rows(self.state))

    def batch(self, rows):
        """This rank's rows, in equally many micro-batches on all ranks."""
        run = self.run
        size = run.args.micro_batch
        mine = rows[run.rank::run.world]
        parts = [mine[begin:begin + size] for begin in range(0, -(-len(rows) // run.world), size)]
        micro_batches = [collate(sum(part, []), size * len(rows[0]), run.args.context) for part in parts]
        return train.Batch(micro_batches, self.weight(mine), sum(len(ids) for row in mine for ids, *_ in row))


# -----------------------------------------------------------------------------------------------------------
# The kinds of training


def sft(args):
    """Next-token prediction on assistants' tokens alone, in packed conversations that do not see each other."""
    config, tokenizer = open_init(args)
    splits = {"train": [], "val": []}
    for ids, mask in read_records(args.data, lambda record: render(tokenizer, record.get("messages"))):
        mask = mask[:args.context + 1]
        if any(mask[1:]):
            splits["val" if is_held_out(ids, args.held_out) else "train"].append((ids[:len(mask)], mask))
    chats = SimpleNamespace(name="chats")
    for split, rows in splits.items():
        setattr(chats, split, np.array([i for ids, _ in rows for i in ids]))
        setattr(chats, f"{split}_mask", np.array([i for _, mask in rows for i in mask]))
        setattr(chats, f"{split}_ends", np.cumsum([len(ids) for ids, _ in rows]))
    args.steps = args.steps or math.ceil(args.epochs * len(chats.train) / args.batch_tokens)
    run = setup(args, config, tokenizer, args.batch_tokens // args.context, splits["train"])
    loader = train.PackedLoader(args, [chats], [1.0], tokenizer.eot, run.rank, run.world)
    about = f"{len(splits['train']):,} chats, {len(splits['val']):,} held out"
    validate = functools.partial(train.validate, run, [chats], tokenizer.eot) if splits["val"] else None
    train.train(run, loader, train.next_token_loss, validate, about=about)


def dpo_loss_fn(args, reference):
    def loss_fn(model, tokens, targets, *_):
        with torch.no_grad():
            reference_scores = token_log_probs(reference, tokens, targets).sum(1)
        scores = token_log_probs(model, tokens, targets).sum(1)                 # of chosen, rejected, chosen, ...
        losses, rewards = dpo_loss(scores.view(-1, 2), reference_scores.view(-1, 2), args.beta)
        chosen, rejected = rewards.detach().unbind(1)
        is_pair = (targets >= 0).any(1)[::2]                                    # other rows fill the micro-batch
        losses = losses * is_pair
        sums = torch.stack([is_pair, losses.detach(), chosen - rejected, chosen > rejected, chosen, rejected])
        return losses.sum(), sums.sum(1)
    return loss_fn


def dpo_metrics(sums):
    means = [value / sums[0] for value in sums[2:]]
    return dict(zip(("margin", "accuracy", "reward_chosen", "reward_rejected"), means))


def dpo(args):
    """Direct preference optimization; a row is a pair."""
    config, tokenizer = open_init(args)
    records = read_records(args.data, functools.partial(read_preference, tokenizer))
    pairs = {False: [], True: []}       # by whether they are held out
    for pair, prompt in records:
        if pair[0] != pair[1] and max(len(answer.ids) for answer in pair) <= args.context:
            pairs[is_held_out(prompt, args.held_out)].append(pair)
    args.steps = args.steps or math.ceil(args.epochs * len(pairs[False]) / args.batch)
    run = setup(args, config, tokenizer, args.batch, pairs[False], width=2)
    loss_fn = dpo_loss_fn(args, open_reference(run))

    def next_rows(state):
        begin = state["position"]
        state["position"] += args.batch
        return draw(pairs[False], begin, state["position"], args.seed)

    @torch.no_grad()
    def validate():
        totals = torch.zeros(6, device=run.device)
        for micro_batch in loader.batch(pairs[True]).micro_batches:
            with run.autocast():
                totals += run.objective(loss_fn, *(tensor.to(run.device) for tensor in micro_batch))[1]
        sums = run.sum_over_ranks(*totals.tolist())
        loss = sums[1] / sums[0]
        accuracy = dpo_metrics(sums)["accuracy"]
        return {"val": {"pairs": (loss, accuracy)}}, f"loss {loss:.4f}, accuracy {accuracy:.1%}"

    loader = RowLoader(run, next_rows, {"position": 0}, weight=len)
    left, held_out = (len(pairs[side]) for side in (False, True))
    about = f"{left:,} pairs, {held_out:,} held out, {len(records) - left - held_out:,} too long or equal left out"
    train.train(run, loader, loss_fn, validate if held_out else None, dpo_metrics, about)


def grpo_loss_fn(args, reference):
    def loss_fn(model, tokens, targets, advantages, old):
        if args.updates == 1 and args.temperature == 1 and not args.kl:
            # on policy every ratio is 1, and the gradient that of cross-entropy weighted with the advantage
            return model(tokens, targets=targets, weights=advantages)[0], None
        log_probs = token_log_probs(model, tokens, targets, args.temperature)   # this and what follows: 0 outside answers
        old = log_probs.detach() if args.updates == 1 else old
        losses, clipped = clipped_surrogate(log_probs, old, advantages)
        divergence = torch.zeros_like(losses)
        if args.kl:
            with torch.no_grad():
                reference_log_probs = token_log_probs(reference, tokens, targets, args.temperature)
            divergence = kl(log_probs, reference_log_probs)
        sums = torch.stack([(targets >= 0).sum(), -log_probs.sum(), clipped.sum(), divergence.sum()])
        return (losses + args.kl * divergence).sum(), sums.detach()
    return loss_fn


def grpo(args):
    """Group relative policy optimization: rollout, normalize, update; a row is an answer of the model's own.

    As DAPO without its extras: each token counts the same, two clipping bounds. Groups of equal rewards are left out
    without --kl, since nothing is learned from them; with it they stay, and are held near --init.
    """
    config, tokenizer = open_init(args)
    read = functools.partial(read_problem, tokenizer)
    problems = [problem for problem in read_records(args.data, read) if len(problem["ids"]) < args.context]
    tests = read_records(args.val, read)
    run = setup(args, config, tokenizer, args.prompts * args.num_generations // args.updates, problems)

    def next_rows(state):
        if not state["steps"]:
            begin = state["position"]
            state["position"] += args.prompts
            drawn = draw(problems, begin, state["position"], args.seed)
            drawn = [problem for problem in drawn for _ in range(args.num_generations)]
            answers, passed = zip(*solve_together(run, drawn, args.temperature, begin))
            advantages = group_advantages(torch.tensor(passed).view(args.prompts, -1))
            groups = []
            for i, group in enumerate(advantages.tolist()):
                if args.kl or any(group):
                    group_answers = answers[i * len(group):(i + 1) * len(group)]
                    groups.append([[answer._replace(advantage=a)] for answer, a in zip(group_answers, group)])
            parts = [sum(groups[i::args.updates], []) for i in range(args.updates)]
            state["steps"] = [sorted(part, key=lambda row: -len(row[0].ids)) for part in parts]
            state["metrics"] = {"pass@1": mean(passed), "length": mean_length(answers),
                                "dropped": 1 - len(groups) / args.prompts}
        return state["steps"].pop(0)

    def log_entry(sums):
        means = [value / max(sums[0], 1) for value in sums[1:]]
        return loader.state["metrics"] | dict(zip(("entropy", "clipped", "kl"), means))

    def validate():
        answers, passed = zip(*solve_together(run, tests, 0.0, 0))
        words = f"pass@1 {mean(passed):.1%} of {len(tests)} problems, {mean_length(answers):.1f} tokens an answer"
        return {"val": {"problems": (mean(passed), mean_length(answers))}}, words

    loader = RowLoader(run, next_rows, {"position": 0, "steps": [], "metrics": {}},
                       weight=lambda rows: sum(len(ids) - start for row in rows for ids, start, *_ in row))
    loss_fn = grpo_loss_fn(args, open_reference(run) if args.kl else None)
    about = f"{len(problems):,} problems; {args.prompts} x {args.num_generations} answers for each {args.updates} steps"
    train.train(run, loader, loss_fn, validate if tests else None, log_entry, about, {"key": "pass@1", "unit": "pass@1"})


def mean_length(answers):
    return mean(len(answer.ids) - answer.start for answer in answers)


# -----------------------------------------------------------------------------------------------------------
# Pivotal tokens


def subdivide(success, tokens, log_probs, gap):
    """Pivotal token search (phi-4, arXiv 2412.08905, section 4.3): yields (tokens before, token, what it changes).

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
        half = int(np.argmax(spent <= spent[-1] / 2)) + 1
        middle = begin + min(half, end - begin - 1)
        parts += [(middle, end), (begin, middle)]


@torch.no_grad()
def likeliest_others(model, ids, token):
    """The three likeliest tokens after ids, except this one."""
    states = model.hidden(torch.tensor([ids], device=model.device))
    likeliest = model.logits(states[0, -1]).topk(4).indices.tolist()
    return [other for other in likeliest if other != token][:3]


def pivotal_pairs(model, tokenizer, problem, args):
    """Yields preferences between single tokens of the model's own answers to a problem.

    The search compares many estimates and takes the extreme ones, so part of each gap that it finds is luck. A pair
    is written if four times as many fresh answers, which took no part in the search, show the gap again.
    """
    prompt = problem["ids"]

    def sample(begun, count, stage):
        seeds = [hash_of(args.seed, prompt, begun, stage, i) for i in range(count)]
        return solve(model, tokenizer, [{**problem, "begun": begun}] * count, args, args.temperature, seeds)

    @functools.cache
    def success(begun):
        return mean(sample(begun, args.samples, "search")[1])

    answers, passed = sample((), args.samples, "search")
    if not 0.2 <= mean(passed) <= 0.8:       # as in the paper: what is always or never solved has no pivot
        return
    for ids in answers[passed.index(1.0)], answers[passed.index(0.0)]:
        log_probs, = answer_log_probs(model, [Answer(prompt + ids, len(prompt))], 1, args.context)
        for begun, token, change in subdivide(success, tuple(ids), log_probs, args.gap):
            others = likeliest_others(model, [*prompt, *begun], token)
            other = min(others, key=lambda other: change * success((*begun, other)))
            pair = (token, other) if change > 0 else (other, token)
            odds = [mean(sample((*begun, side), 4 * args.samples, "confirm")[1]) for side in pair]
            if odds[0] - odds[1] >= args.gap:
                chosen, rejected = pair
                yield {"prompt": tokenizer.decode([*prompt, *begun]), "chosen": tokenizer.decode([chosen]),
                       "rejected": tokenizer.decode([rejected]), "odds": odds, "task_id": problem.get("task_id"),
                       "ids": {"prompt": [*prompt, *begun], "chosen": [chosen], "rejected": [rejected]},
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
        hint = "" if pairs else "; give more problems, a smaller --gap, or a model that solves some of them sometimes"
        print(f"{path or 'nothing written'}: {len(pairs):,} pairs from {len(problems):,} problems{hint}")


# ---------------------------------------------------------------------------------------------------------------------


KINDS = {
    "sft": (sft, "learn from chats", "runs/sft"),
    "dpo": (dpo, "learn from preferences", "runs/dpo"),
    "grpo": (grpo, "learn from rewards", "runs/grpo"),
    "pivotal": (pivotal, "search for the tokens that decide, write preferences between them", "data/pivotal.jsonl")}


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
        is_dataset = kind in ("sft", "dpo")
        option("--init", "runs/phi", "run directory, Hugging Face directory or hub name to start from")
        option("--data", None if is_dataset else ["data/exercises.jsonl"], "chats, preferences or problems, .jsonl or "
               ".jsonl.gz", nargs="+", metavar="FILE", required=is_dataset)
        option("--out", out, "what to write")
        option("--context", None, "tokens of a prompt and its answer (default: --init's, at most 2048)", type=several)
        if is_dataset:
            option("--epochs", 3.0 if kind == "sft" else 1.0, "passes over the data, where --steps is not given", type=positive)
            option("--held-out", 0.05, "share of the data to validate on", type=fraction)
        else:
            option("--max-tokens", 256, "tokens of an answer at most", type=count)
            option("--temperature", 1.0, "of sampling", type=positive)
            option("--batch-size", 64, "answers generated at once", type=count)
        if kind == "sft":
            option("--batch-tokens", 4096, "tokens a step, over all processes", type=several)
        if kind == "dpo":
            option("--batch", 32, "pairs a step, over all processes", type=count)
            option("--beta", 0.1, "how strongly --init is held on to", type=positive)
        if kind == "grpo":
            option("--val", [], "problems solved greedily at each validation", nargs="+", metavar="FILE")
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
            sub.set_defaults(continue_from=None, prompt_weight=0.0, skip=None, val_tokens=1 << 20, optimizer="adamw",
                             weight_decay=0.0, lr=2e-5 if kind == "sft" else 1e-6, warmup=0.1, warmdown_frac=0.9,
                             final_lr=0.0, val_every=100, save_every=100, log_every=1 if kind == "grpo" else 10)
    args = parser.parse_args(arguments)
    if args.kind == "grpo" and args.prompts % args.updates:
        parser.error(f"--prompts {args.prompts} must be a multiple of --updates {args.updates}")
    return args


@data.command()
def main(arguments=None):
    args = parse_options(arguments)
    with train.one_line_errors():
        KINDS[args.kind][0](args)


if __name__ == "__main__":
    main()

"""Alignment: a trained model learns from chats, from preferences, or from what its own answers are worth.

    python align.py sft --init runs/base --data chats.jsonl --out runs/chat
    python align.py dpo --init runs/chat --data preferences.jsonl --out runs/dpo
    python align.py grpo --init runs/phi --data data/exercises.jsonl --out runs/rl
    python align.py pivotal --init runs/phi --data data/exercises.jsonl --out data/pivotal.jsonl
    torchrun --nproc_per_node=8 align.py grpo --init runs/phi --data data/exercises.jsonl --fsdp --out runs/rl

sft reads chats, {"messages": [{"role", "content"}, ...]}; dpo preferences, {"prompt" or "messages", "chosen",
"rejected"}; grpo problems with tests, {"prompt", "entry_point", "test"}, or with numbers, {"question",
"answer": "... #### number"}. pivotal writes preferences between single tokens, for dpo. The loop is
train.py's: the same log, checkpoints and exact resumption when the same command is given again. `align.py dpo
-h` lists the options of dpo.
"""
import functools
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
from tqdm import tqdm

import data
import kernels
import model as models
import synth
import train


# -----------------------------------------------------------------------------------------------------------
# Records -> rows of answers: token ids, and which of them are to be learned


class Answer(NamedTuple):
    ids: list[int]              # of the prompt, or the whole chat, with the answer
    spans: list[tuple]          # (start, end) of what is to be learned of them
    advantage: float = 1.0      # the weight of its tokens


def longest(row):
    """Tokens that the model reads: all but the last."""
    return max(len(answer.ids) for answer in row) - 1


def hash_of(*parts):
    """48 bits that depend on the parts alone."""
    return int.from_bytes(data.digest(repr(parts))[:6], "big")


def is_held_out(row, fraction):
    """Decided by what comes before the answer, so that the split never moves and equal prompts stay
    together."""
    answer = row[0]
    start, _ = answer.spans[0]
    return hash_of(answer.ids[:start]) < fraction * 2**48


def render(tokenizer, messages):
    """Chat -> (ids in the family's template, spans): (start, end) of each assistant's message with its end
    token.

    A message begins where the chat parts from the same chat cut before its content, so a token that holds
    both the template's last line break and the content's first characters is learned. Without an end-of-turn
    token (phi-2) the turn's closing text is learned instead.
    """
    ids = tokenizer.render(messages, add_generation_prompt=False)
    spans = []
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.render(messages[:n])
            through = tokenizer.render(messages[:n + 1], add_generation_prompt=False)
            start = len(os.path.commonprefix([ids, before]))
            end = len(os.path.commonprefix([ids, through]))
            ends = [i + 1 for i in range(start, end) if ids[i] in tokenizer.stops]
            spans.append((start, min(ends, default=end)))
    return ids, spans


def prompt_ids(tokenizer, text):
    """Of a text to be continued, without white space at its end: that belongs to the answer, as a line break
    and the indentation after it are one token."""
    return tokenizer.bos + tokenizer.encode(text) or [tokenizer.eot]


def read_chat(tokenizer, context, record):
    """A chat -> its row, cut to the context; None if no assistant's tokens are left."""
    ids, spans = render(tokenizer, record["messages"])
    ids = ids[:context + 1]
    spans = [(start, min(end, len(ids))) for start, end in spans if start < len(ids)]
    return [Answer(ids, spans)] if spans else None


def read_preference(tokenizer, context, record):
    """A preference -> its row, chosen and rejected; None if they are equal or longer than the context.

    A prompt given as text is continued as it stands (a document that ends with the end-of-text token), as
    messages in the chat template; "ids", as `pivotal` writes them, are taken as they are: no end follows.
    """
    if record.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise ValueError("its ids are of another tokenizer; make it again with align.py pivotal, this --init")
    row = []
    for side in ("chosen", "rejected"):
        if "messages" in record:
            answer = {"role": "assistant", "content": record[side]}
            ids, (*_, span) = render(tokenizer, [*record["messages"], answer])
        elif "ids" in record:
            prompt = record["ids"]["prompt"]
            ids = prompt + record["ids"][side]
            span = len(prompt), len(ids)
        else:
            text = record["prompt"].rstrip()
            prompt = prompt_ids(tokenizer, text)
            rest = (record["prompt"] + record[side])[len(text):]
            ids = prompt + tokenizer.encode(rest) + [tokenizer.eot]
            span = len(prompt), len(ids)
        row.append(Answer(ids, [span]))
    return row if row[0] != row[1] and longest(row) <= context else None


def final_answer(text):
    """The number after the last "####", as GSM8K writes it, or None.
    Example: final_answer("so 6 * 200\\n#### 1,200") == Decimal(1200)"""
    numbers = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def read_problem(tokenizer, context, record):
    """A problem in HumanEval's or GSM8K's fields -> what judges its answers, and "ids", the tokens of its
    prompt; None if they leave no room for an answer."""
    if "question" in record:
        problem = {"answer": final_answer(record["answer"])}
        if problem["answer"] is None:
            raise ValueError('the answer must end with "#### " and a number')
        ids = tokenizer.render([{"role": "user", "content": record["question"]}])
    else:
        problem = {name: record[name] for name in ("prompt", "entry_point", "test")}
        problem["prompt"] = problem["prompt"].rstrip()
        ids = prompt_ids(tokenizer, problem["prompt"])
    return {**problem, "ids": ids} if len(ids) < context else None


def open_data(args, read):
    """-> config and tokenizer of --init, read(tokenizer, context, record) of all records of --data, and how
    many of them were None. args.context is settled. An error names the record."""
    folder = models.snapshot_download(args.init, weights=False)
    config = models.read_config(os.path.join(folder, "config.json"))
    tokenizer = models.Tokenizer.load(folder)
    args.context = min(args.context, config.max_seq_len)
    rows = []
    for path in args.data:
        for number, record in enumerate(data.read_jsonl(path), 1):
            try:
                rows.append(read(tokenizer, args.context, record))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ValueError(f"{path}: record {number}: {error!r}; mend or remove it (align.py -h tells "
                                 "its fields)") from None
    fitting = [row for row in rows if row]
    return config, tokenizer, fitting, len(rows) - len(fitting)


def collate(answers, rows, length):
    """Answers -> tokens, targets and their weights, (rows, length) each.

    Padding is on the right, where causal attention never looks; its targets are -1.
    """
    tokens = torch.zeros(rows, length, dtype=torch.long)
    targets = torch.full_like(tokens, -1)
    weights = torch.zeros(rows, length)
    for row, answer in enumerate(answers):
        ids = torch.tensor(answer.ids)
        tokens[row, :len(ids) - 1] = ids[:-1]
        for start, end in answer.spans:
            targets[row, start - 1:end - 1] = ids[start:end]
        weights[row] = answer.advantage
    return tokens, targets, weights


# -----------------------------------------------------------------------------------------------------------
# Losses


def log_probs(model, tokens, targets):
    """Log-probability of each row's targets, (B), by the model's fused loss of one row after the other."""
    head = model.lm_head
    losses = [kernels.cross_entropy(states, head.weight, row_targets, bias=head.bias)[0]
              for states, row_targets in zip(model.hidden(tokens), targets)]
    return -torch.stack(losses)


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


# What train.py's loop is given: the model and a micro-batch -> (sum of losses, sums to be reported)


def weighted_cross_entropy(model, tokens, targets, weights):
    """sft, where advantages are 1; and grpo: of answers just drawn, its gradient is the policy's."""
    loss, _ = model(tokens, targets=targets, weights=weights)
    return loss, torch.empty(0, device=tokens.device)


def preference_loss(reference, beta, model, tokens, targets, _):
    """Of answers chosen, rejected, chosen, ... The sums: of pairs, and over them PREFERENCE_METRICS."""
    policy_scores = log_probs(model, tokens, targets).view(-1, 2)
    with torch.no_grad():
        reference_scores = log_probs(reference, tokens, targets).view(-1, 2)
    losses, rewards = dpo_loss(policy_scores, reference_scores, beta)
    chosen, rejected = rewards.detach().unbind(1)
    is_pair = (targets >= 0).any(1)[::2]        # other rows fill the micro-batch
    sums = torch.stack([is_pair, chosen > rejected, chosen - rejected, chosen])
    return (losses * is_pair).sum(), sums.sum(1)


def preference_metrics(sums):
    """{name: mean} of what a loss reports; {} if it reports nothing."""
    names = ("accuracy", "margin", "reward_chosen")
    return {name: value / sums[0] for name, value in zip(names, sums[1:])}


# -----------------------------------------------------------------------------------------------------------
# Rollouts, and what they are worth


def rollout(model, tokenizer, problems, numbers, args, begun=()):
    """Answers to problems' prompts -> [ids of the answer], [its reward]; --batch-size at a time.

    What is drawn depends on --seed, the prompt and the number of the answer. All answers go on from the ids
    `begun`. An answer ends with an end token, which belongs to it, with its function (a line at column 0),
    after --max-tokens, or with the context: prompt and answer have --context tokens at most.
    """
    answers = [list(begun) for _ in problems]

    def has_ended(row):
        ids = answers[row]
        room = min(args.max_tokens, args.context - len(problems[row]["ids"]))
        line = "test" in problems[row] and re.search(r"\n\S", tokenizer.decode(ids[-2:]))
        return len(ids) >= room or line or tokenizer.stops.intersection(ids[-1:])

    def emit(row, token):
        answers[begin + row].append(token)
        return has_ended(begin + row)

    for begin in range(0, len(problems), args.batch_size):
        part = problems[begin:begin + args.batch_size]
        prompts = [problem["ids"] + list(begun) for problem in part]
        seeds = [hash_of(args.seed, *key) for key in zip(prompts, numbers[begin:])]
        if not has_ended(begin):
            model.generate(prompts, args.max_tokens, temperature=1.0, seed=seeds, stream=emit)
    texts = [tokenizer.decode([i for i in ids if i not in tokenizer.stops]) for ids in answers]
    return answers, rewards(problems, texts)


def rewards(problems, texts):
    """1.0 for each text whose function passes its problem's tests in synth.py's sandbox, or whose final
    answer is the problem's, else 0.0."""
    passed = [final_answer(text) == problem.get("answer") for problem, text in zip(problems, texts)]
    coded = [i for i, problem in enumerate(problems) if "test" in problem]
    programs = [(problems[i], re.split(r"\n(?=\S)", texts[i])[0]) for i in coded]
    workers = max(1, data.n_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    for i, verdict in zip(coded, synth.judge_all(programs, workers=workers)):
        passed[i] = verdict.passed
    return list(map(float, passed))


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


# -----------------------------------------------------------------------------------------------------------
# The kinds of training


RESUME_KEYS = ("held_out", "batch", "beta", "prompts", "num_generations", "max_tokens")


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


def draw(records, step, count, seed):
    """The records of a step: `count` of an endless stream, shuffled anew each epoch."""
    @functools.cache
    def order(epoch):
        return np.random.default_rng([seed, epoch]).permutation(len(records))

    places = [divmod(place, len(records)) for place in range(step * count, (step + 1) * count)]
    return [records[order(epoch)[i]] for epoch, i in places]


def count_targets(rows):
    return sum(end - start for row in rows for answer in row for start, end in answer.spans)


@dataclass
class RowLoader:
    """Steps of rows, each a list of answers that stay together."""

    run: train.Run
    next_rows: Callable     # next_rows(step) -> the rows of a step, the same on all ranks
    weight: Callable        # weight(rows): by what their summed loss is divided
    step: int = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]

    def __next__(self):
        rows = self.next_rows(self.step)
        self.step += 1
        return self.batch(rows)

    def batch(self, rows):
        """Short rows are more in a micro-batch than long ones. Lengths are powers of two, few shapes for
        compiled blocks. All ranks have equally many micro-batches."""
        run = self.run
        context = run.args.context
        rows = sorted(rows, key=longest, reverse=True)
        mine = []
        micro_batches = []
        while rows:
            length = min(context, 1 << (longest(rows[0]) - 1).bit_length())
            size = min(run.args.micro_batch * (context // length), run.args.max_rows)
            part = rows[run.rank:size * run.world:run.world]
            micro_batches.append(collate(sum(part, []), size * len(rows[0]), length))
            mine += part
            rows = rows[size * run.world:]
        num_tokens = sum(len(answer.ids) - 1 for row in mine for answer in row)
        return train.Batch(micro_batches, self.weight(mine), num_tokens)


def finetune(args):
    """sft, whose rows are a chat each, and dpo, whose rows are pairs."""
    is_dpo = args.kind == "dpo"
    config, tokenizer, records, num_unfit = open_data(args, read_preference if is_dpo else read_chat)
    rows = [row for row in records if not is_held_out(row, args.held_out)]
    held_out = [row for row in records if is_held_out(row, args.held_out)]
    args.steps = args.steps or -int(-args.epochs * len(rows) // args.batch)
    run = setup(args, config, tokenizer, args.batch, rows, 2 if is_dpo else 1)
    loss_fn = weighted_cross_entropy
    if is_dpo:      # the reference is whole on each rank, in the type of the products
        reference, _ = models.load(args.init, run.device, run.dtype)
        loss_fn = functools.partial(preference_loss, reference.requires_grad_(False), args.beta)
    loader = RowLoader(run, lambda step: draw(rows, step, args.batch, args.seed),
                       len if is_dpo else count_targets)

    @torch.no_grad()
    def validate():
        batch = loader.batch(held_out)
        totals = 0
        for micro_batch in batch.micro_batches:
            with run.autocast():
                loss, sums = run.objective(loss_fn, *(tensor.to(run.device) for tensor in micro_batch))
            totals = totals + torch.cat([loss.reshape(1), sums])
        weight, loss, *sums = run.sum_over_ranks(batch.weight, *totals.tolist())
        entry = {"loss": loss / weight, **preference_metrics(sums)}
        words = ", ".join(f"{name} {value:.4f}" for name, value in entry.items())
        return {"val": {args.kind: (entry["loss"], entry.get("accuracy"))}}, words

    about = f"{len(rows):,} rows, {len(held_out):,} held out, {num_unfit:,} with nothing to learn or too long"
    train.train(run, loader, loss_fn, validate if held_out else None, preference_metrics, about)


def grpo(args):
    """Group relative policy optimization, always on policy: roll out, judge, normalize, one optimizer step.

    As in DAPO (arXiv 2503.14476) each token counts the same, and groups of equal rewards, whose advantages
    are 0, are dropped, since they teach nothing.
    """
    config, tokenizer, problems, num_unfit = open_data(args, read_problem)
    num_answers = args.prompts * args.num_generations
    run = setup(args, config, tokenizer, num_answers, problems)
    dtype = run.dtype if run.device.type == "cuda" else torch.float32
    metrics = {}

    def next_rows(step):
        drawn = np.repeat(draw(problems, step, args.prompts, args.seed), args.num_generations)

        # each rank answers some of the problems; which does not change what is drawn
        mine = train.shard_range(num_answers, run.rank, run.world)
        numbers = [step * num_answers + i for i in mine]
        model = rollout_model(run.model, dtype)
        solved = rollout(model, tokenizer, drawn[mine.start:mine.stop], numbers, args)
        answers, passed = (sum(parts, []) for parts in zip(*data.all_gather(solved)))

        advantages = group_advantages(torch.tensor(passed).view(args.prompts, -1)).flatten().tolist()
        metrics.update({"pass@1": mean(passed), "length": mean(map(len, answers)),
                        "dropped": advantages.count(0.0) / num_answers})
        rows = []
        for problem, answer, advantage in zip(drawn, answers, advantages):
            ids = problem["ids"] + answer
            if advantage:
                rows.append([Answer(ids, [(len(problem["ids"]), len(ids))], advantage)])
        return rows

    loader = RowLoader(run, next_rows, count_targets)
    about = (f"{len(problems):,} problems, {num_unfit:,} too long; {args.prompts} x {args.num_generations} "
             "answers at a time")
    train.train(run, loader, weighted_cross_entropy, None, lambda _: metrics, about,
                {"key": "pass@1", "unit": "pass@1"})


# -----------------------------------------------------------------------------------------------------------
# Pivotal tokens


def subdivide(success, tokens, log_probs, gap):
    """Pivotal token search (phi-4, arXiv 2412.08905, section 4.3): yields (position, change) of such tokens.

    success(tokens): the chance of it after these tokens. A part of the answer over which it moves by `gap` is
    cut where half of its cost, -log p, is spent, down to single tokens; other parts are left alone, though
    they may hold tokens that cancel out.
    """
    parts = [(0, len(tokens))]
    while parts:
        begin, end = parts.pop()
        change = success(tokens[:end]) - success(tokens[:begin])
        if begin == end or abs(change) < gap:
            continue
        if end - begin == 1:
            yield begin, change
            continue
        spent = np.cumsum(log_probs[begin:end])
        middle = begin + 1 + int(abs(spent[:-1] - spent[-1] / 2).argmin())
        parts += [(middle, end), (begin, middle)]


@torch.no_grad()
def answer_log_probs(model, prompt, answer):
    """Of all tokens at each place of the answer, (N, vocab_size)."""
    states = model.hidden(torch.tensor([prompt + answer[:-1]], device=model.device))
    return model.logits(states[0, len(prompt) - 1:]).log_softmax(-1).cpu()


def pivotal_pairs(model, tokenizer, problem, args):
    """Yields preferences between single tokens of the model's own answers to a problem.

    The search compares many estimates and takes the extreme ones, so part of each gap that it finds is luck.
    A pair is written if four times as many fresh answers, which took no part in the search, show it again.
    """
    def sample(begun, numbers):
        return rollout(model, tokenizer, [problem] * len(numbers), numbers, args, begun)

    search = range(args.samples)
    confirm = range(args.samples, 5 * args.samples)

    @functools.cache
    def success(begun):
        return mean(sample(begun, search)[1])

    prompt = problem["ids"]
    answers, passed = sample((), search)
    if not 0.2 <= mean(passed) <= 0.8:       # as in the paper: what is always or never solved has no pivot
        return
    for answer in (answers[passed.index(1.0)], answers[passed.index(0.0)]):     # a right and a wrong one
        log_probs = answer_log_probs(model, prompt, answer)
        costs = log_probs[range(len(answer)), answer]
        for position, change in subdivide(success, tuple(answer), costs.tolist(), args.gap):
            begun = tuple(answer[:position])
            token = answer[position]
            others = set(log_probs[position].topk(4).indices.tolist()) - {token}
            other = min(others, key=lambda other: change * success((*begun, other)))
            pair = (token, other) if change > 0 else (other, token)
            odds = [mean(sample((*begun, side), confirm)[1]) for side in pair]
            if odds[0] - odds[1] >= args.gap:
                ids = {"prompt": [*prompt, *begun], "chosen": [pair[0]], "rejected": [pair[1]]}
                texts = {name: tokenizer.decode(part) for name, part in ids.items()}
                yield {**texts, "odds": odds, "ids": ids, "tokenizer": tokenizer.fingerprint}


def pivotal(args):
    _, tokenizer, problems, _ = open_data(args, read_problem)
    device = torch.device(models.default_device())
    dtype, _ = train.choose_dtype(device, "auto")
    model, _ = models.load(args.init, device, dtype)
    pairs = {}
    finished = False
    try:
        for problem in tqdm(problems, "searching", disable=None):
            for pair in pivotal_pairs(model, tokenizer, problem, args):
                pairs[repr(pair["ids"])] = pair
        finished = True
    finally:        # what was found before an interruption took time too
        path = synth.write_output(args.out, pairs.values(), lambda: finished)
        print(f"{path or 'nothing written'}: {len(pairs):,} pairs from {len(problems):,} problems; for more "
              "give more problems, a smaller --gap, or a model that solves some of them sometimes")


# -----------------------------------------------------------------------------------------------------------
# The command


COMMON = """
data and run
--init DIR  runs/phi  run, directory or hub name to start from
--context N  2048  tokens of a prompt with its answer, at most --init's
"""
FINETUNING = COMMON + """
steps
--batch N  32  chats or pairs a step, over all processes
--epochs X  1.0  passes over the data, without --steps
--steps N  -  optimizer steps
--held-out SHARE  0.05  of the data, to validate on
--val-every N  100  steps between validations
""" + train.LOOP_OPTIONS
SAMPLING = COMMON + """
answers
--max-tokens N  256  of an answer at most
--batch-size N  64  answers generated at once
"""
KINDS = {
    "sft": (finetune, "learn from chats", FINETUNING),
    "dpo": (finetune, "learn from preferences", FINETUNING + """
preferences
--beta X  0.1  how strongly --init is held on to
"""),
    "grpo": (grpo, "learn from rewards", SAMPLING + """
steps
--steps N  100  optimizer steps
--prompts N  16  problems sampled for a step
--num-generations ANSWERS  8  answers to each problem
""" + train.LOOP_OPTIONS),
    "pivotal": (pivotal, "write preferences between the single tokens that decide", SAMPLING + """
search
--samples N  16  answers that a chance of success is estimated from
--gap SHARE  0.2  by how much a pivotal token moves it
--seed N  0  of the sampling
""")}


def parse_options(arguments=None):
    parser = data.Parser(prog="align.py", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(KINDS))
    for kind, (_, about, table) in KINDS.items():
        sub = kinds.add_parser(kind, help=about, usage=f"align.py {kind} --data FILE --out DIR [options]",
                               description=f"{about}; see align.py -h")
        sub.add_argument("--data", nargs="+", metavar="FILE", required=True,
                         help="chats, preferences or problems, .jsonl or .jsonl.gz")
        sub.add_argument("--out", required=True, metavar="DIR", help="what to write")
        sub.table(table, ANSWERS=data.number(int, 2))
        sub.set_defaults(
            optimizer="adamw", lr=1e-6, weight_decay=0.0, warmup=0.1, warmdown_frac=0.9, final_lr=0.0,
            save_every=100, log_every=1, val_every=100, continue_from=None)
    kinds.choices["sft"].set_defaults(lr=2e-5, epochs=3.0)
    return parser.parse_args(arguments)


@data.command()
def main(arguments=None):
    args = parse_options(arguments)
    with train.one_line_errors():
        KINDS[args.kind][0](args)


if __name__ == "__main__":
    main()

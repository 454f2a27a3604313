"""Alignment: a trained model learns from chats, from preferences, or from what its own answers are worth.

    python align.py sft --init runs/base --data chats.jsonl --out runs/chat                  # {"messages": [{"role", "content"}, ...]}
    python align.py dpo --init runs/chat --data preferences.jsonl --out runs/dpo             # {"prompt" or "messages", "chosen", "rejected"}
    python align.py grpo --init runs/phi --data data/exercises.jsonl --out runs/rl           # problems with tests, or "#### answer"
    python align.py pivotal --init runs/phi --data data/exercises.jsonl --out pivotal.jsonl  # preferences between single tokens, for dpo
    torchrun --nproc_per_node=8 align.py grpo --init runs/phi --shard --out runs/rl          # one process for each GPU

The loop is train.py's: the same log, checkpoints and exact resumption when the same command is given again. `align.py dpo -h` lists
the options of dpo.
"""
import functools
import json
import math
import os
import re
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model as models
import sample
import synth
import train


# ---------------------------------------------------------------------------------------------------------------------
# Records -> token ids, and which of them are to be learned


def read(paths, convert):
    """[convert(record)] of JSON Lines files; an error names the record."""
    found = []
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file; give .jsonl or .jsonl.gz files (python synth.py exercises makes problems)")
        for number, record in enumerate(data.read_jsonl(path), 1):
            try:
                found.append(convert(record))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ValueError(f"{path}: record {number}: {error}; mend or remove it") from None
    return found


def common(a, b):
    """Length of the common beginning of two lists. Example: common([1, 2, 3], [1, 2, 4]) == 2"""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def render(tokenizer, messages):
    """Chat -> (ids in the family's template, mask): 1 for each assistant message's tokens up to and including the one that ends its turn.

    A message begins where the chat parts from the same chat cut before its content, so a token that holds both the template's last line
    break and the content's first characters is learned. Without an end-of-turn token (phi-2) the turn's closing text is learned instead.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError('"messages" must be a list of objects with a role and a content')
    ids = tokenizer.render(messages, add_generation_prompt=False)
    mask = [0] * len(ids)
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            start = common(ids, tokenizer.render(messages[:n], add_generation_prompt=True))
            end = common(ids, tokenizer.render(messages[:n + 1], add_generation_prompt=False))
            end = next((i + 1 for i in range(start, end) if ids[i] in tokenizer.stops), end)
            mask[start:end] = [1] * (end - start)
    return ids, mask


def held_out(key, share):
    """Whether a record belongs to the held-out share: by its content, so that the split never moves and equal records stay together."""
    return int.from_bytes(data.digest(json.dumps(key, sort_keys=True))[:4], "big") < share * 2**32


def pair(tokenizer, record):
    """A preference -> (chosen, rejected, key), each answer as (ids, index of its first token); key tells prompts apart.

    A prompt given as text is continued as it stands (a document that ends with the end-of-text token), as messages in the chat template;
    "ids", as `pivotal` writes them, are taken as they are, and no end token is added.
    """
    if "ids" in record:
        if record.get("tokenizer") != tokenizer.fingerprint:
            raise ValueError("its ids are of another tokenizer; make the file again with align.py pivotal --init and this model")
        prompt = record["ids"]["prompt"]
        return *((prompt + record["ids"][side], len(prompt)) for side in ("chosen", "rejected")), prompt
    answers = []
    for side in ("chosen", "rejected"):
        text, prompt = record.get(side), record.get("prompt")
        if not isinstance(text, str) or not ("messages" in record or isinstance(prompt, str)):
            raise ValueError('a preference needs "prompt" (a text) or "messages", and the texts "chosen" and "rejected"')
        if "messages" in record:
            ids, mask = render(tokenizer, [*record["messages"], {"role": "assistant", "content": text}])
            end = len(mask) - mask[::-1].index(1)
            start = end - next((i for i, marked in enumerate(mask[:end][::-1]) if not marked), end)
            answers.append((ids[:end], start))
        else:  # as data.py cuts problems: a line break and the indentation after it are one token of the answer
            kept = tokenizer.bos + tokenizer.encode(prompt.rstrip()) or [tokenizer.eot]
            answers.append((kept + tokenizer.encode(prompt[len(prompt.rstrip()):] + text) + [tokenizer.eot], len(kept)))
    return *answers, record.get("messages", record.get("prompt"))


def batch(answers, rows, context):
    """[(ids, start)] -> tokens, targets (rows, T) int64, -1 where not of the answer, and mask (rows, T) float32, 1 where it is. One answer a row,
    padded on the right, which causal attention never sees. T is a multiple of a quarter of the context: compiled blocks meet four shapes."""
    longest, quarter = max([len(ids) - 1 for ids, _ in answers], default=1), -(-context // 4)
    tokens, targets = torch.zeros(2, rows, min(-(-longest // quarter) * quarter, context), dtype=torch.long)
    targets, mask = targets - 1, torch.zeros(tokens.shape)
    for i, (ids, start) in enumerate(answers):
        tokens[i, :len(ids) - 1], targets[i, start - 1:len(ids) - 1] = torch.tensor(ids[:-1]), torch.tensor(ids[start:])
        mask[i, start - 1:len(ids) - 1] = 1
    return tokens, targets, mask


@functools.lru_cache(2)
def shuffled(count, epoch, seed):
    return np.random.default_rng([seed, epoch]).permutation(count)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def log_probs(model, tokens, targets, temperature=1.0):
    """-> log-probabilities of the targets (B, T) in fp32, 0 where there is none, and the logits they come from. Logits of a whole micro-batch are held, in fp32."""
    logits = model(tokens).float()
    logits = logits / temperature if temperature != 1 else logits
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view(targets.shape), logits


def dpo_loss(policy, reference, beta, smoothing=0.0):
    """Log-probabilities (P, 2) of chosen and rejected answers -> losses (P) and implicit rewards (P, 2).

    −log σ(margin) (Rafailov et al., arXiv 2305.18290, equation 7); smoothing: the share of labels that are wrong (conservative DPO).
    """
    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin), rewards


def grpo_loss(log_prob, old, advantage, low=0.2, high=0.28, kl=0.0, reference=None):
    """Of each token, shapes (B, T) and advantage (B, 1) -> loss, whether its ratio is clipped, its divergence from the reference.

    −[min(ρÂ, clip(ρ, 1 − low, 1 + high)Â) − kl (π_ref/π − log(π_ref/π) − 1)], ρ = π/π_old (GRPO, arXiv 2402.03300, equations 3 and 4;
    two bounds: DAPO, arXiv 2503.14476).
    """
    ratio = (log_prob - old).exp()
    bounded = ratio.clamp(1 - low, 1 + high) * advantage
    loss, apart = -torch.minimum(ratio * advantage, bounded), torch.zeros_like(log_prob)
    if reference is not None:
        apart = (reference - log_prob).exp() - (reference - log_prob) - 1
        loss = loss + kl * apart
    return loss, bounded < ratio * advantage, apart


class Objective(nn.Module):
    """A task's loss with the model in it, so that DistributedDataParallel sees one forward pass."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *tensors):
        return self.loss(self.model, *tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Completions and what they are worth


def final_answer(text):
    """The number after the last "####", as GSM8K writes it, or None. Example: final_answer("so 6 * 200\\n#### 1,200") == Decimal(1200)"""
    found = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    return Decimal(found[-1].replace(",", "")) if found else None


def problem_of(tokenizer, record):
    """A problem in HumanEval's or GSM8K's fields -> the same with "ids", the tokens of its prompt (the chat template for GSM8K)."""
    if all(isinstance(record.get(name), str) for name in ("prompt", "entry_point", "test")):  # the prompt ends as sample.py's does
        prompt = record["prompt"].rstrip()
        return {**record, "prompt": prompt, "ids": tokenizer.bos + tokenizer.encode(prompt) or [tokenizer.eot]}
    if not all(isinstance(record.get(name), str) for name in ("question", "answer")):
        raise ValueError('a problem needs the texts "prompt", "entry_point" and "test", or "question" and "answer"')
    if final_answer(record["answer"]) is None:
        raise ValueError('the answer must end with "#### " and a number')
    return {**record, "ids": tokenizer.render([{"role": "user", "content": record["question"]}])}


def complete(model, tokenizer, problems, begun, args, temperature, seed):
    """Go on from problems' prompts and the tokens `begun` of each -> [(all tokens of the answer, text to be judged)], code cut as sample.py does.

    An answer ends with an end token, which belongs to it, with its function (a line at column 0), after --max-tokens, or with the context.
    """
    answers = [list(ids) for ids in begun]
    texts = [tokenizer.decode_bytes(i for i in ids if i not in tokenizer.stops) for ids in begun]

    def ended(row):
        last, count = answers[row][-1:], len(answers[row])
        code = "test" in problems[row] and re.search(rb"\n[^\s]", texts[row][-len(tokenizer.decode_bytes(last)) - 1:])
        return bool(code or tokenizer.stops & {*last}) or count >= args.max_tokens or len(problems[row]["ids"]) + count > args.context
    going = [row for row in range(len(problems)) if not ended(row)]

    def over(slot, token):
        answers[going[slot]].append(token)
        texts[going[slot]] += b"" if token in tokenizer.stops else tokenizer.decode_bytes([token])
        return ended(going[slot])
    if going:
        model.generate([problems[row]["ids"] + answers[row] for row in going], args.max_tokens, temperature, 0, 1.0, tokenizer.stops, seed, over)
    texts = [text.decode("utf-8", errors="replace") for text in texts]
    return [(answer, sample.cut(text) if "test" in problem else text) for answer, text, problem in zip(answers, texts, problems)]


def rewards(problems, texts, workers=None):
    """1.0 for each text that passes its problem's tests in synth.py's sandbox, or whose final answer is the problem's; else 0.0."""
    judged = iter(synth.judge_all([(problem, text) for problem, text in zip(problems, texts) if "test" in problem], workers=workers))
    return [float(next(judged).passed if "test" in problem else final_answer(text) == final_answer(problem["answer"]))
            for problem, text in zip(problems, texts)]


def sampler(model, dtype):
    """The model as it is now, in the type of the products and with plain blocks: those of training may be compiled for other shapes, or sharded."""
    with torch.device("meta"):
        twin = models.Model(model.config)
    whole = {name: tensor.full_tensor() if train.is_sharded(tensor) else tensor for name, tensor in model.state_dict().items()}
    twin.load_state_dict({name: tensor.detach().to(dtype) for name, tensor in whole.items()}, assign=True)
    return twin.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The tasks of the loop


def gather(run, value):
    """[each rank's value]"""
    if run.world == 1:
        return [value]
    values = [None] * run.world
    dist.all_gather_object(values, value)
    return values


class Task(train.Pretraining):
    """What sft, dpo and grpo have in common: the model of --init and its tokenizer, and a digest of the data."""
    own = ()  # options besides train.py's that a resumed run must share with its beginning
    kept = ("tokens", "at")  # what the state consists of: tokens without padding, position in the shuffled data
    tokens = at = 0

    def __init__(self, args):
        self.args, self.exact = args, (*train.EXACT, *self.own)
        context, args.context = args.context, None
        self.config = train.choose_config(args, None)
        if context and context > self.config.max_seq_len:
            data.fail(f"--context {context} is longer than the {self.config.max_seq_len} tokens of {args.init}; lower it, or grow it first with grow.py")
        args.context = context or min(self.config.max_seq_len, 2048)
        self.tokenizer = models.Tokenizer.load(models.snapshot_download(args.init, weights=False))

    def state(self):
        return {"digest": self.digest, **{name: getattr(self, name) for name in self.kept}}

    def restore(self, state):
        if state["digest"] != self.digest:
            raise ValueError(f"{' '.join(self.args.data)} changed since {self.args.out} began; give another --out, or the file as it was")
        for name in self.kept:
            setattr(self, name, state[name])

    def deal(self, rows, world):
        """Settle args.micro_batch, equal parts of a rank's rows -> rows a step."""
        mine, most = -(-rows // world), max(1, self.args.micro_tokens // self.args.context)
        self.args.micro_batch = -(-mine // -(-mine // most))
        return rows

    def draw(self, cards, count):
        self.at += count
        return [cards[shuffled(len(cards), at // len(cards), self.args.seed)[at % len(cards)]] for at in range(self.at - count, self.at)]

    def where(self, rows):
        return f"rows {self.at - len(rows):,} to {self.at:,} of the shuffled data"

    @torch.no_grad()
    def scores(self, model, answers, temperature=1.0):
        """[log-probabilities (tokens of the answer) of each], by all ranks together."""
        run, args, found = self.run, self.args, {}
        size = max(1, args.micro_tokens // args.context)
        model.eval()
        longest = sorted(range(len(answers)), key=lambda i: -len(answers[i][0]))
        for begin in range(0, len(answers), size * run.world):
            mine = longest[begin + run.rank:begin + size * run.world:run.world]
            tokens, targets, mask = (t.to(run.device) for t in batch([answers[i] for i in mine], size, args.context))
            with run.autocast():
                values = log_probs(model, tokens, targets, temperature)[0].cpu()
            found |= {i: value[marked] for i, value, marked in zip(mine, values, mask.cpu() > 0)}
        if args.shard and hasattr(model, "reshard"):
            model.reshard()
        model.train()
        everywhere = {i: value for part in gather(run, found) for i, value in part.items()}
        return [everywhere[i] for i in range(len(answers))]


class Chats(Task):
    """Supervised finetuning: next-token prediction in whole conversations, which do not see each other, on assistants' tokens alone.

    Each conversation is stored with a target -1 at its end, which costs a position and parts conversations in every family's template.
    """
    own, kept = ("noise", "held_out"), ("position",)
    tokens, where = train.Pretraining.tokens, train.Pretraining.where
    position = property(lambda self: self.mixture.state(), lambda self, state: self.mixture.restore(state))

    def __init__(self, args):
        super().__init__(args)
        splits, cut, lost = {"train": [], "val": []}, 0, 0
        for ids, mask, key in read(args.data, lambda record: (*render(self.tokenizer, record.get("messages")), record["messages"])):
            cut += len(ids) > args.context
            ids, mask = ids[:args.context], mask[:args.context]
            lost += (empty := not any(mask[1:]))
            if not empty:
                splits["val" if held_out(key, args.held_out) else "train"].append((ids + [-1], mask + [0]))
        if not splits["train"]:
            raise ValueError(f"--data {' '.join(args.data)}: no conversation with an assistant's tokens is left to train on")
        chats = SimpleNamespace(name="chats")
        for split, found in splits.items():
            setattr(chats, split, np.array([i for ids, _ in found for i in ids], np.int64))
            setattr(chats, f"{split}_mask", np.array([m for _, mask in found for m in mask], np.uint8))
        self.datasets, self.shares, self.eot = [chats], [1.0], -1
        self.digest = data.digest(chats.train.tobytes() + chats.train_mask.tobytes()).hex()
        self.said = f"{len(splits['train']):,} chats, {len(splits['val']):,} held out" + f", {cut:,} cut to the context" * bool(cut) \
            + f", {lost:,} without an assistant's tokens left out" * bool(lost)
        args.steps = args.steps or math.ceil(args.epochs * len(chats.train) / args.batch_tokens)

    def begin(self, run):
        about, module = super().begin(run)
        self.generator = torch.Generator(run.device)
        if self.args.noise:
            run.model.model.embed_tokens.register_forward_hook(self.shake)
        return about.replace("chats 100%", self.said), module

    def shake(self, module, inputs, x):
        """NEFTune (arXiv 2310.05914): uniform noise on x (B, T, d_model), at most noise / sqrt(T d). T is a row's length here, not a chat's."""
        if not module.training:
            return x
        noise = torch.rand(x.shape, generator=self.generator, device=x.device) * 2 - 1
        return x + noise.to(x.dtype) * (self.args.noise / math.sqrt(x.shape[1] * x.shape[2]))

    def rows(self, count):  # the noise depends on the position alone, so that a resumed run draws the same
        self.generator.manual_seed((((self.args.seed << 32) + self.tokens) * self.run.world + self.run.rank) % 2**63)
        return super().rows(count)

    def validate(self):
        return super().validate() if len(self.datasets[0].val) else None


class DPO(Task):
    """Direct preference optimization. A row is a pair with the reference model's log-probabilities, computed once and kept in reference.pt."""
    own = ("batch", "beta", "smoothing", "length_normalized", "held_out")
    sums = 5

    def __init__(self, args):
        super().__init__(args)
        pairs = read(args.data, lambda record: pair(self.tokenizer, record))
        size = max([i for chosen, rejected, _ in pairs for i in chosen[0] + rejected[0]], default=0)
        if size >= self.config.vocab_size:
            raise ValueError(f"--data holds token {size}, outside the vocabulary of {self.config.vocab_size}")
        fits = [p for p in pairs if max(len(p[0][0]), len(p[1][0])) <= args.context + 1 and p[0] != p[1]]
        self.pairs, self.held = ([p for p in fits if held_out(p[2], args.held_out) == side] for side in (False, True))
        if not self.pairs:
            raise ValueError(f"--data {' '.join(args.data)}: none of {len(pairs)} pairs is left to train on; the context is {args.context} tokens")
        self.said = f"{len(self.pairs):,} pairs, {len(self.held):,} held out" + \
            f", {len(pairs) - len(fits):,} too long or equal" * (len(fits) < len(pairs))
        self.digest = data.digest(repr([p[:2] for p in self.pairs + self.held])).hex()
        args.steps = args.steps or math.ceil(args.epochs * len(self.pairs) / args.batch)

    def split(self, world):
        self.deal(2 * self.args.batch, world)
        self.args.micro_batch = -(-self.args.micro_batch // 2)
        return self.args.batch

    def begin(self, run):
        self.run = run
        file, cached = os.path.join(self.args.out, "reference.pt"), None
        folder = models.snapshot_download(self.args.init)
        weights = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(folder)
                         if entry.name.endswith((".safetensors", ".bin")))
        key = data.digest(repr([self.digest, self.args.init, weights])).hex()
        if run.rank == 0 and os.path.exists(file):
            cached = torch.load(file, weights_only=True)
            cached = cached["scores"] if cached["key"] == key else None
        cached = gather(run, cached)[0]
        if cached is None and run.resumed:
            raise ValueError(f"{file} is missing or of other preferences or another --init; delete {self.args.out} to start again")
        if cached is None:
            found = self.scores(run.model, [answer for p in self.pairs + self.held for answer in p[:2]])
            cached = torch.stack([values.sum() for values in found])
            if run.rank == 0:
                train.write_torch(file, {"key": key, "scores": cached})
        self.pairs, self.held = ([(*p[:2], scores) for p, scores in zip(pairs, part)] for pairs, part in
                                 zip((self.pairs, self.held), cached.view(-1, 2).split([len(self.pairs), len(self.held)])))
        return f"{self.said}; {self.args.steps:,} steps of {self.args.batch} pairs", Objective(run.model, self.loss)

    def rows(self, count):
        rows = self.draw(self.pairs, count)
        self.tokens += sum(len(ids) for p in rows for ids, _ in p[:2])
        return rows

    def weight(self, rows):
        return len(rows)

    def collate(self, rows):
        reference = torch.zeros(2 * self.args.micro_batch)
        for i, p in enumerate(rows):
            reference[2 * i:2 * i + 2] = p[2]
        return *batch([answer for p in rows for answer in p[:2]], len(reference), self.args.context), reference

    def rewarded(self, scores, reference, lengths):
        """Log-probabilities and lengths of chosen and rejected answers by turns (2P) -> dpo_loss."""
        scale = lengths.clamp(min=1) if self.args.length_normalized else 1
        return dpo_loss((scores / scale).view(-1, 2), (reference / scale).view(-1, 2), self.args.beta, self.args.smoothing)

    def loss(self, model, tokens, targets, mask, reference):
        scores = (log_probs(model, tokens, targets)[0] * mask).sum(1)
        losses, won = self.rewarded(scores, reference, mask.sum(1))
        real = (mask.sum(1).view(-1, 2)[:, 0] > 0).float()  # rows that fill a batch have no tokens
        sums = torch.stack([real, won[:, 0] - won[:, 1], (won[:, 0] > won[:, 1]).float(), *won.unbind(1)]) * real
        return (losses * real).sum(), sums.sum(1)

    def entry(self, sums):
        count, margin, right, chosen, rejected = sums
        return {"margin": margin / count, "accuracy": right / count, "reward_chosen": chosen / count, "reward_rejected": rejected / count}

    def validate(self):
        if not self.held:
            return None
        answers = [answer for p in self.held for answer in p[:2]]
        scores = torch.stack([values.sum() for values in self.scores(self.run.model, answers)])
        losses, won = self.rewarded(scores, torch.cat([p[2] for p in self.held]), torch.tensor([len(ids) - start for ids, start in answers]))
        loss, margin, accuracy = (x.mean().item() for x in (losses, won[:, 0] - won[:, 1], (won[:, 0] > won[:, 1]).float()))
        return {"val": {"pairs": (loss, accuracy)}, "val_margin": margin}, f"loss {loss:.4f}, reward margin {margin:.4f}, accuracy {accuracy:.1%}"


class GRPO(Task):
    """Group relative policy optimization: a row is an answer of the model's own, with its advantage over the others of its problem.

    By default as DAPO without its extras: each token counts the same, two clipping bounds, no KL; advantages are r − mean (Dr. GRPO, arXiv
    2503.20783). Groups whose rewards are all the same are dropped: nothing is learned from them, and with all of them no step is taken.
    """
    own = ("prompts", "group", "updates", "max_tokens", "temperature", "batch_size", "clip_low", "clip_high", "kl", "std", "normalize")
    kept = ("tokens", "at", "parts", "seen")
    sums, curve = 4, {"key": "pass@1", "unit": "pass@1"}

    def __init__(self, args):
        super().__init__(args)
        self.problems, self.tests = (read(files, lambda record: problem_of(self.tokenizer, record)) for files in (args.data, args.val or []))
        self.problems = [p for p in self.problems if len(p["ids"]) <= args.context]  # tests that do not fit count as failed
        if not self.problems:
            raise ValueError(f"--data {' '.join(args.data)}: no problem's prompt fits the context of {args.context} tokens")
        self.digest = data.digest(repr(self.problems)).hex()

    def split(self, world):
        return self.deal(self.args.prompts * self.args.group // self.args.updates, world)

    def begin(self, run):
        self.run = run
        self.parts, self.seen = [], []
        self.reference = models.load(self.args.init, run.device, run.dtype)[0].requires_grad_(False) if self.args.kl else None
        return (f"{len(self.problems):,} problems; {self.args.steps:,} steps, {self.args.prompts} problems x {self.args.group} answers for each "
                f"{self.args.updates}"), Objective(run.model, self.loss)

    def sample(self, problems, temperature):
        """[(tokens, reward)] for each of the problems, by all ranks together; what is drawn does not depend on their number."""
        args, run, results = self.args, self.run, {}
        twin = sampler(run.model, run.dtype if run.device.type == "cuda" else torch.float32)
        longest = sorted(range(len(problems)), key=lambda i: -len(problems[i]["ids"]))
        workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        chunks = [longest[i:i + args.batch_size] for i in range(0, len(problems), args.batch_size)]
        for number in tqdm(range(run.rank, len(chunks), run.world), "sampling", leave=False, disable=None if run.rank == 0 else True):
            some = [problems[i] for i in chunks[number]]
            done = complete(twin, self.tokenizer, some, [[]] * len(some), args, temperature, (((args.seed << 24) + self.at << 12) + number) % 2**63)
            results |= dict(zip(chunks[number], zip((ids for ids, _ in done), rewards(some, [text for _, text in done], workers))))
        results = {i: result for part in gather(run, results) for i, result in part.items()}
        return [results[i] for i in range(len(problems))]

    def rows(self, count):
        args = self.args
        if not self.parts:
            problems = [p for p in self.draw(self.problems, args.prompts) for _ in range(args.group)]
            answers, groups = self.sample(problems, args.temperature), []
            for i in range(0, len(problems), args.group):
                values = np.array([reward for _, reward in answers[i:i + args.group]])
                if values.min() < values.max():
                    gains = (values - values.mean()) / (values.std() if args.std else 1)
                    groups.append([{"ids": p["ids"] + ids, "start": len(p["ids"]), "advantage": float(gain)}
                                   for p, (ids, _), gain in zip(problems[i:], answers[i:], gains)])
            ended = sum(ids[-1] in self.tokenizer.stops for ids, _ in answers)
            self.seen.append([len(answers), sum(reward for _, reward in answers), sum(len(ids) for ids, _ in answers), ended,
                              len(answers) - len(groups) * args.group])
            self.parts = [sorted((row for group in groups[i::args.updates] for row in group), key=lambda row: -len(row["ids"]))
                          for i in range(args.updates)]
            rows = [row for part in self.parts for row in part]
            for name, model in [("old", self.run.model)] * (args.updates > 1) + [("reference", self.reference)] * bool(args.kl):
                for row, values in zip(rows, self.scores(model, [(row["ids"], row["start"]) for row in rows], args.temperature)):
                    row[name] = values.tolist()
        rows = self.parts.pop(0)
        self.tokens += sum(len(row["ids"]) for row in rows)
        return rows

    def weight(self, rows):
        return sum(len(row["ids"]) - row["start"] for row in rows) if self.args.normalize == "token" else len(rows)

    def collate(self, rows):
        """-> batch's tensors, weight and advantage (B, 1), old and reference log-probabilities (B, T)."""
        tokens, targets, mask = batch([(row["ids"], row["start"]) for row in rows], self.args.micro_batch, self.args.context)
        weight, advantage, old, reference = *torch.zeros(2, len(mask), 1), *torch.zeros(2, *mask.shape)
        for i, row in enumerate(rows):
            weight[i] = {"token": 1.0, "sequence": 1 / (len(row["ids"]) - row["start"]), "constant": 1 / self.args.max_tokens}[self.args.normalize]
            advantage[i] = row["advantage"]
            for name, to in (("old", old), ("reference", reference)):
                to[i, mask[i] > 0] = torch.tensor(row.get(name, 0.0))
        return tokens, targets, mask, weight, advantage, old, reference

    def loss(self, model, tokens, targets, mask, weight, advantage, old, reference):
        args = self.args
        now, logits = log_probs(model, tokens, targets, args.temperature)
        old = now.detach() if args.updates == 1 else old  # the model that answered is the one that learns
        loss, clipped, apart = grpo_loss(now, old, advantage, args.clip_low, args.clip_high, args.kl, reference if args.kl else None)
        with torch.no_grad():
            entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
            sums = torch.stack([(x * mask).sum() for x in (mask, entropy, clipped, apart)])
        return (loss * mask * weight).sum(), sums

    def entry(self, sums):
        (count, *seen), (tokens, entropy, clipped, apart), found = np.sum(self.seen or [[0] * 5], 0).tolist(), sums, {}
        if count:  # not after a later one of several --updates
            found = dict(zip(("pass@1", "length", "ended", "dropped"), (value / count for value in seen)))
        if tokens:
            found |= {"entropy": entropy / tokens, "clipped": clipped / tokens} | ({"kl": apart / tokens} if self.args.kl else {})
        self.seen = []
        return found

    def validate(self):
        if not self.tests:
            return None
        answers = self.sample(self.tests, 0.0)
        passed, length = (float(np.mean(values)) for values in ([reward for _, reward in answers], [len(ids) for ids, _ in answers]))
        return {"val": {"problems": (passed, length)}}, f"pass@1 {passed:.1%}, {length:.1f} tokens an answer ({len(answers)} problems, greedily)"


# ---------------------------------------------------------------------------------------------------------------------
# Pivotal tokens


def subdivide(odds, tokens, costs, gap):
    """Pivotal token search (phi-4, arXiv 2412.08905, section 4.3): yields (tokens before, token, odds before it, odds after it).

    odds(tokens): the chance of success after these tokens. A part of the answer over which it moves by `gap` is halved where half of its
    cost, -log p, is spent, down to single tokens; other parts are left alone, though they may hold tokens that cancel out.
    """
    parts = [(0, len(tokens))]
    while parts:
        begin, end = parts.pop()
        before, after = odds(tokens[:begin]), odds(tokens[:end])
        if begin == end or abs(after - before) < gap:
            continue
        if end - begin == 1:
            yield tokens[:begin], tokens[begin], before, after
            continue
        spent = np.cumsum(costs[begin:end])
        middle = begin + min(max(1, int(np.searchsorted(spent, spent[-1] / 2)) + 1), end - begin - 1)
        parts += [(middle, end), (begin, middle)]


def pivots(args, model, tokenizer, problem):
    """Yields preferences between single tokens of the model's own answers to a problem."""
    known, stops = {}, tokenizer.stops

    def draw(prefix, count):
        done = []
        for begin in range(0, count, args.batch_size):
            rows = [prefix] * min(args.batch_size, count - begin)
            seed = int.from_bytes(data.digest(repr((args.seed, problem["ids"], prefix, begin)))[:6], "big")
            done += complete(model, tokenizer, [problem] * len(rows), rows, args, args.temperature, seed)
        return done, rewards([problem] * count, [text for _, text in done])

    def odds(prefix):
        if tuple(prefix) not in known:
            known[tuple(prefix)] = float(np.mean(draw(prefix, args.samples)[1]))
        return known[tuple(prefix)]
    answers, passed = draw([], args.samples)
    known[()] = float(np.mean(passed))
    if not args.solved <= known[()] <= 1 - args.solved:
        return
    paths = [next((ids for (ids, _), reward in zip(answers, passed) if bool(reward) == wanted), None) for wanted in (True, False)]
    for ids in filter(None, paths):  # one that passes and one that fails
        whole = torch.tensor([problem["ids"] + ids], device=model.device)
        with torch.no_grad():
            logs = model(whole[:, :-1])[0, len(problem["ids"]) - 1:].log_softmax(-1).cpu()
        for prefix, token, before, after in subdivide(odds, ids, (-logs[range(len(ids)), ids]).tolist(), args.gap):
            others = [other for other in logs[len(prefix)].topk(4).indices.tolist() if other != token][:3]
            other = (min if after > before else max)(others, key=lambda other: odds(prefix + [other]))
            chosen, rejected = (token, other) if after > before else (other, token)
            if odds(prefix + [chosen]) - odds(prefix + [rejected]) >= args.gap:
                shown = problem.get("prompt", problem.get("question")) + tokenizer.decode([i for i in prefix if i not in stops])
                yield {"prompt": shown, "chosen": tokenizer.decode([chosen]), "rejected": tokenizer.decode([rejected]),
                       "odds": [odds(prefix + [chosen]), odds(prefix + [rejected])], "task_id": problem.get("task_id"),
                       "ids": {"prompt": problem["ids"] + prefix, "chosen": [chosen], "rejected": [rejected]}, "tokenizer": tokenizer.fingerprint}


def pivotal(args):
    device = torch.device(models.default_device() if args.device == "auto" else args.device)
    model, tokenizer = models.load(args.init, device, train.choose_dtype(device, args.dtype)[0])
    args.context = min(args.context or 2048, model.config.max_seq_len)
    problems = [p for p in read(args.data, lambda record: problem_of(tokenizer, record)) if len(p["ids"]) < args.context]
    found, finished = {}, False
    try:
        for problem in tqdm(problems, "searching", disable=None):
            for record in pivots(args, model, tokenizer, problem):
                found[repr(record["ids"])] = record
        finished = True
    finally:  # what was found before an interruption took time too
        written = synth.write_output(args.out, found.values(), lambda: finished)
        if found:
            print(f"{written or 'not written'}: {len(found):,} pairs from {len(problems):,} problems")
        else:
            print("no pivotal tokens found, and nothing written: give more problems, a smaller --gap, or a model "
                  "that solves some of its problems sometimes")


# ---------------------------------------------------------------------------------------------------------------------

KINDS = {"sft": (Chats, "learn from chats"), "dpo": (DPO, "learn from preferences"), "grpo": (GRPO, "learn from rewards"),
         "pivotal": (None, "search for the tokens that decide, and write preferences between them")}


def options(arguments=None):
    parser = data.Parser(prog="align.py", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(KINDS))
    share, count, positive = data.number(float, 0, 1), data.number(int, 1), data.number(float, 1e-9)
    for kind, (_, about) in KINDS.items():
        sub = kinds.add_parser(kind, help=about, description=f"{about[0].upper()}{about[1:]}; see align.py -h.")
        option = sub.option
        problems = "problems in HumanEval's or GSM8K's fields"
        option("--init", "runs/phi", "run directory, Hugging Face directory or hub name to start from", metavar="RUN")
        option("--data", ["data/exercises.jsonl"] if kind in ("grpo", "pivotal") else None,
               {"sft": "chats", "dpo": "preferences"}.get(kind, problems) + ", .jsonl or .jsonl.gz", nargs="+", metavar="FILE", required=kind in ("sft", "dpo"))
        option("--out", "data/pivotal.jsonl" if kind == "pivotal" else f"runs/{kind}", "what to write", metavar="FILE" if kind == "pivotal" else "RUN")
        option("--context", None, "tokens a row, or a prompt with its answer (default: that of --init, at most 2048)", type=data.number(int, 2), metavar="N")
        if kind in ("sft", "dpo"):
            option("--epochs", {"sft": 3, "dpo": 1}[kind], "passes over the data, where --steps is not given", type=positive, metavar="N")
            option("--held-out", 0.05, "share of the data to validate on", type=share, metavar="SHARE")
        if kind != "pivotal":
            option("--steps", 100 if kind == "grpo" else None, "optimizer steps" + " (default: as many as --epochs makes)" * (kind != "grpo"), type=count, metavar="N")
        if kind == "sft":
            option("--batch-tokens", 4096, "tokens a step, over all processes", type=data.number(int, 2), metavar="N")
            option("--noise", 0.0, "NEFTune's noise on the embeddings, such as 5", type=data.number(float, 0), metavar="ALPHA")
        elif kind == "dpo":
            option("--batch", 32, "pairs a step, over all processes", type=count, metavar="N")
            option("--beta", 0.1, "how strongly the reference model is held on to", type=positive)
            option("--smoothing", 0.0, "share of preferences that are taken to be wrong", type=data.number(float, 0, 0.5), metavar="SHARE")
            option("--length-normalized", False, "divide log-probabilities by the answer's tokens", action="store_true")
        else:
            option("--max-tokens", 256, "tokens of an answer at most", type=count, metavar="N")
            option("--temperature", 1.0, "of sampling", type=positive)
            option("--batch-size", 64, "answers generated at once; changes what is drawn", type=count, metavar="N")
        if kind == "grpo":
            option("--val", None, f"{problems}, solved greedily at each validation", nargs="+", metavar="FILE")
            option("--prompts", 16, "problems sampled at once", type=count, metavar="N")
            option("--group", 8, "answers to each problem", type=data.number(int, 2), metavar="N")
            option("--updates", 1, "optimizer steps made from them, each on its share", type=count, metavar="N")
            option("--clip-low", 0.2, "how far below 1 a token's ratio counts", type=share, metavar="SHARE")
            option("--clip-high", 0.28, "how far above 1 a token's ratio counts", type=data.number(float, 0), metavar="SHARE")
            option("--kl", 0.0, "weight of the divergence from --init; keeps its weights in memory too", type=data.number(float, 0), metavar="WEIGHT")
            option("--std", False, "divide advantages by the group's standard deviation, as in the first paper", action="store_true")
            option("--normalize", "token", "what the loss is averaged over: all tokens alike; tokens of each answer, then answers (the first paper); "
                   "answers of a constant length (Dr. GRPO)", choices=("token", "sequence", "constant"))
        if kind == "pivotal":
            option("--samples", 16, "answers that a chance of success is estimated from", type=count, metavar="N")
            option("--gap", 0.2, "by how much a pivotal token moves it", type=share, metavar="SHARE")
            option("--solved", 0.2, "problems that are solved, or missed, less often are left out", type=data.number(float, 0, 0.5), metavar="SHARE")
            option("--device", "auto", "cuda, mps, cpu, or the best there is", choices=("auto", "cuda", "mps", "cpu"))
            option("--dtype", "auto", "type of weights and products; auto measures", choices=("auto", "fp32", "bf16"))
            option("--seed", 0, "of the sampling", type=data.number(int, 0))
        else:
            train.loop_options(option)
            sub.set_defaults(**dict.fromkeys(("after", "preset", "rope_theta", *train.SHAPE)), prompt_weight=0.0, val_tokens=1 << 20, optimizer="adamw", weight_decay=0.0,
                             lr={"sft": 2e-5, "dpo": 1e-6, "grpo": 1e-6}[kind], warmup=0.1, decay=0.9, final_lr=0.0, val_every=100, save_every=100)
    args = parser.parse_args(arguments)
    if args.kind == "grpo" and args.prompts % args.updates:
        parser.error(f"--prompts {args.prompts} must be a multiple of --updates {args.updates}")
    return args


@data.command()
def main(arguments=None):
    args = options(arguments)
    with train.one_line_errors(args):
        pivotal(args) if args.kind == "pivotal" else train.train(args, KINDS[args.kind][0])


if __name__ == "__main__":
    main()

"""Talk to a trained model: complete a prompt, chat, serve it to programs and browsers, evaluate it.

    python sample.py --run runs/phi --prompt 'def add(a, b):'
    python sample.py --run runs/chat --chat
    python sample.py --run runs/chat --serve                            # OpenAI's interface, and a page at http://127.0.0.1:8000
    python sample.py --run runs/phi --eval HumanEval.jsonl.gz
    python sample.py --eval HumanEval.jsonl.gz --solutions canonical    # no model: checks the file and the sandbox
"""
import argparse
import base64
import codecs
import collections
import contextlib
import csv
import glob
import hashlib
import hmac
import html
import http.server
import itertools
import json
import math
import os
import queue
import random
import re
import secrets
import socket
import socketserver
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

import data
import model as models
import synth

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETTINGS = {"temperature": data.number(float, 0), "top-p": data.number(float, 1e-9, 1), "top-k": data.number(int, 0),
            "max-tokens": data.number(int, 1), "seed": data.number(int, 0)}  # options that --chat can change


def skipping(text):
    """MAX:MIN or MAX:MIN:OVER as numbers."""
    if not re.fullmatch(r"\d+:\d+(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write the layers of the first and of the last new token, such as 24:8")
    return tuple(map(int, text.split(":")))


def options(arguments=None):
    parser = data.Parser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("--run", default="runs/phi", help="run directory, Hugging Face directory of a phi, Llama or Gemma, or hub name such as microsoft/phi-1_5 "
        "(default %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, or auto for the best there is (default auto)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of the weights; auto is bf16 on CUDA, else fp32 (default auto)")
    add("--seed", type=SETTINGS["seed"], default=0, help="of the sampling (default 0)")
    add("--batch-size", type=data.number(int, 1), default=128, help="texts that --eval and --serve write at once (default %(default)s)")
    add = parser.add_argument_group("writing").add_argument
    add("--prompt", default="-", help="text to complete, or - for standard input (default -)")
    add("--max-tokens", type=SETTINGS["max-tokens"], default=256, help="new tokens at most; of requests, where they do not say (default %(default)s)")
    add("--temperature", type=SETTINGS["temperature"], default=0.0, help="0 takes the likeliest token, 1 samples plainly (default 0)")
    add("--top-k", type=SETTINGS["top-k"], default=0, help="sample among this many likeliest tokens, 0 for all (default 0)")
    add("--top-p", type=SETTINGS["top-p"], default=1.0, help="sample among the fewest tokens holding this probability (default 1)")
    add("--chat", action="store_true", help="talk to the model in the terminal")
    add("--system", help="the system message that --chat begins with")
    add = parser.add_argument_group("speed").add_argument
    add("--quantize", choices=["int8", "int4"], help="hold the weights in so many bits; with --out DIR write them there as a run like any other")
    add("--draft", metavar="RUN", help="a smaller model of the same vocabulary proposes tokens; what is written keeps its distribution")
    add("--lookup", type=data.number(int, 1), nargs="?", const=8, metavar="N", help="propose N tokens (default 8) from where the text repeats itself")
    add("--skip", type=skipping, metavar="MAX:MIN", help="SkipDecode: the layers run fall from MAX at the first new token to MIN at the last")
    add("--bench", metavar="RUN", help="print speed, memory and latency of this run, or of a preset's shape, by precision and batch size")
    add = parser.add_argument_group("serving").add_argument
    add("--serve", action="store_true", help="OpenAI's interface at /v1 and a page at /; asks for the key MINPHI_API_KEY if the environment has it")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in (default %(default)s)")
    add("--port", type=data.number(int, 0, 65535), default=8000, help="port to listen at, 0 for any free one (default %(default)s)")
    add("--queue", type=data.number(int, 0), default=256, help="texts that may wait for a place; more are refused (default %(default)s)")
    add("--request-seconds", type=data.number(float, 0.1), default=300.0, help="a request may take so long, waiting included (default %(default)s)")
    add("--max-body-mb", type=data.number(float, 0.001), default=4.0, help="largest request, megabytes (default %(default)s)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", metavar="FILE", nargs="+", help="HumanEval, MBPP, exercises, GSM8K, MATH, HellaSwag, ARC, GPQA, MMLU, questions for a judge, in their "
        "published files, or any text (bits per byte); also URLs, of which #sha256=... is checked")
    add("--solutions", choices=["model", "canonical"], default="model", help="whose solutions to judge (default model)")
    add("--shots", type=data.number(int, 0), help="solved examples before a question (default: MMLU and GSM8K 5, MATH 4, MBPP 3, else 0)")
    add("--shots-file", metavar="FILE", help="the benchmark's training part to take examples from (default: the file's other questions)")
    add("--judge", type=synth.Teacher, metavar="URL#MODEL", help="who rates the answers to MT-bench's questions; the key from SYNTH_KEY_HOST, as for synth.py")
    add("--samples", type=data.number(int, 1), default=1, help="completions a problem, for pass@k; above 1 needs a --temperature (default 1)")
    add("--limit", type=data.number(int, 1), help="take only this many problems from a file's start")
    add("--timeout", type=data.number(float, 0.1), default=5.0, help="seconds a problem's tests may take (default %(default)s)")
    add("--memory-mb", type=data.number(int, 64), default=512, help="megabytes a problem's tests may use (default %(default)s)")
    add("--show", type=data.number(int, 0), default=2, help="solved and failed examples to print, each (default %(default)s)")
    add("--out", metavar="FILE.jsonl", help="write every question, answer and verdict here; a cut evaluation then goes on where it stopped")
    add("--json", metavar="FILE", help="write the summary here")
    args = parser.parse_args(arguments)
    if args.samples > 1 and (args.temperature == 0 or args.solutions == "canonical"):
        parser.error("--samples above 1 needs the model's solutions and a --temperature above 0, such as 0.8")
    if not args.eval and (args.solutions == "canonical" or args.out and not args.quantize or args.json or args.limit):
        parser.error("--solutions, --limit, --out and --json belong to --eval FILE")
    if sum(map(bool, (args.draft, args.lookup, args.skip, args.serve))) > 1:
        parser.error("--draft, --lookup and --skip exclude one another, and --serve, which decodes many texts together, has none of them")
    if sum(map(bool, (args.chat, args.serve, args.eval, args.bench))) > 1:
        parser.error("--chat, --serve, --eval and --bench are different things to do; choose one")
    return args


def open_model(args):
    device = models.default_device() if args.device == "auto" else args.device
    device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}); try --device cpu") from None
    model, tokenizer = models.load(args.run, device, DTYPES.get(args.dtype) or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32))
    if tokenizer is None:
        raise ValueError(f"--run {args.run} has no tokenizer.json; copy the one its model was trained with into it")
    if args.quantize:
        models.quantize(model, int(args.quantize[3:]))
    return model, tokenizer, tokenizer.stops


def speedups(args, model) -> dict:
    """What of --draft, --lookup and --skip was asked for, as `Model.generate` wants it."""
    draft = models.load(args.draft, model.norm.weight.device, model.norm.weight.dtype)[0] if args.draft else None
    return {name: value for name, value in (("draft", draft), ("lookup", args.lookup), ("skip", args.skip)) if value}


class Writer:
    """`stream` for Model.generate: prints a text as it comes. A character may be spread over tokens."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.decoder = tokenizer, [], codecs.getincrementaldecoder("utf-8")("replace")
        self.start = time.perf_counter()

    def __call__(self, _, token):
        self.ids.append(token)
        if token not in self.tokenizer.stops:
            print(self.decoder.decode(self.tokenizer.decode_bytes([token])), end="", flush=True)

    def end(self, model) -> None:
        seconds, (accepted, proposed) = time.perf_counter() - self.start, model.speculated
        print(self.decoder.decode(b"", final=True), flush=True)
        print(f"{len(self.ids)} tokens, {len(self.ids) / seconds:,.0f} a second" + f"; {accepted} of {proposed} proposed were right" * bool(proposed),
              file=sys.stderr)


def complete(args) -> None:
    """Stream one completion to standard output. Trailing whitespace of the prompt is dropped: a line break and the indentation
    after it are one token, so a prompt that ends between them would have to be continued by a token never seen there."""
    model, tokenizer, stop = open_model(args)
    if args.prompt == "-" and sys.stdin.isatty():
        print("Type a prompt and end it with Ctrl-D.", file=sys.stderr)
    ids = tokenizer.bos + tokenizer.encode((sys.stdin.read() if args.prompt == "-" else args.prompt).rstrip()) or [tokenizer.eot]
    faster, writer = speedups(args, model), Writer(tokenizer)
    model.generate([ids], args.max_tokens, args.temperature, args.top_k, args.top_p, stop, args.seed, writer, **faster)
    writer.end(model)


# ---------------------------------------------------------------- chat

CHAT_HELP = """/retry       answer the last message anew       /set NAME X     change temperature, top-p, top-k, max-tokens or seed
/new         forget the conversation            /save FILE      write it as a line of JSON, as align.py sft reads it
/system ...  begin anew, with these orders      /quit, Ctrl-D   leave
A line that ends in \\ goes on in the next. Ctrl-C stops an answer."""


def fitting(tokenizer, messages, room):
    """The chat as token ids, at most `room` of them: the oldest turns after the system message are left out if need be."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    for first in range(len(system), len(messages), 2):
        if len(ids := tokenizer.render([*system, *messages[first:]])) <= room:
            return ids
    raise ValueError(f"the message takes {len(ids):,} tokens where {room:,} fit; make it shorter, or /set max-tokens lower")


def read_message():
    """A message from the terminal or standard input; None at its end. The first Ctrl-C is answered with how to leave."""
    prompt = ("\n> ", "  ") if sys.stdin.isatty() else ("", "")
    for told in (False, True):
        try:
            text = input(prompt[0])
            while text.endswith("\\"):
                text = text[:-1] + "\n" + input(prompt[1])
            return text
        except EOFError:
            return None
        except KeyboardInterrupt:
            if told:
                raise
            print("\nCtrl-C once more, or /quit, leaves", file=sys.stderr)


def chat(args) -> None:
    """A conversation in the terminal, or a message a line from standard input. Ctrl-C ends an answer and keeps what there is of it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, gives input() its history and editing
    model, tokenizer, stop = open_model(args)
    faster, orders = speedups(args, model), [{"role": "system", "content": args.system}] if args.system else []
    messages = [*orders]
    print("Write a message, or /help.", file=sys.stderr)
    while (text := read_message()) is not None:
        command, _, rest = text.strip().partition(" ")
        if command == "/quit":
            return
        if command in ("/new", "/system"):
            orders = orders if command == "/new" else [{"role": "system", "content": rest}] * bool(rest)
            messages = [*orders]
        elif command in ("/set", "/save"):
            try:
                if command == "/save":
                    data.write_jsonl(rest or "chat.jsonl", [{"messages": messages}])
                else:
                    name, value = rest.split()
                    setattr(args, name.replace("-", "_"), SETTINGS[name](value))
            except (KeyError, ValueError, OSError, argparse.ArgumentTypeError) as error:
                print(f"{command} {rest}: {error}; such as /set temperature 0.7 or /save chat.jsonl", file=sys.stderr)
        elif not command or command[0] == "/" and not (command == "/retry" and messages[len(orders):]):
            print(CHAT_HELP, file=sys.stderr)
        else:
            messages = messages[:-1] if command == "/retry" else [*messages, {"role": "user", "content": text}]
            args.seed += command == "/retry"
            writer = Writer(tokenizer)
            try:
                ids = fitting(tokenizer, messages, model.config.context - min(args.max_tokens, model.config.context // 2))
                model.generate([ids], args.max_tokens, args.temperature, args.top_k, args.top_p, stop, args.seed, writer, **faster)
            except KeyboardInterrupt:
                print(" ...", end="")
            except ValueError as error:
                messages.pop()
                print(error, file=sys.stderr)
                continue
            writer.end(model)
            messages.append({"role": "assistant", "content": tokenizer.decode([token for token in writer.ids if token not in stop]).strip()})


# ---------------------------------------------------------------- decoding for many

class Refusal(Exception):
    """What a client is told instead of an answer: an HTTP status, a message, and OpenAI's words for the field and the kind."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.field, self.code = status, field, code


@dataclass(eq=False)
class Request:
    """A text to go on with. `events` receives (index, new text, its tokens' log-probabilities, why it has ended or None), or a Refusal."""
    ids: list                     # the prompt's tokens, then the new ones too
    limit: int                    # new tokens at most
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple = ()              # texts that end the answer, and are not part of it
    logprobs: int | None = None   # how many alternatives to tell of each token
    stream: bool = False          # tell each token at once
    skip: str = ""                # what the answer is expected to begin with and the client already has
    index: int = 0
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    left: bool = False            # the client has gone

    def __post_init__(self):
        self.prompt_tokens, self.random, self.scores = len(self.ids), random.Random(self.seed), []
        self.text, self.pending = "", ""  # certain but untold; what may be the beginning of a stop text
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over tokens

    def take(self, token: int, tokenizer, score=None) -> bool:
        """Add a token and tell the text that is certain by now; whether the answer has ended."""
        self.ids.append(token)
        finish = "stop" if token in tokenizer.stops else "length" if len(self.ids) - self.prompt_tokens >= self.limit else None
        if finish != "stop":
            self.scores += [score] if score else []
            self.pending += self.decoder.decode(tokenizer.decode_bytes([token]))
        self.pending += self.decoder.decode(b"", final=True) if finish else ""
        while self.skip and self.pending:
            self.skip, self.pending = (self.skip[1:], self.pending[1:]) if self.pending[0] == self.skip[0] else ("", self.pending)
        if found := [at for at in map(self.pending.find, self.stop) if at >= 0]:
            self.pending, finish = self.pending[:min(found)], "stop"
        held = 0 if finish else max((n for text in self.stop for n in range(1, len(text)) if self.pending.endswith(text[:n])), default=0)
        certain = len(self.pending) - held
        self.text, self.pending = self.text + self.pending[:certain], self.pending[certain:]
        if finish or self.stream and not held and (self.text or self.scores):
            self.events.put((self.index, self.text, self.scores, finish))
            self.text, self.scores = "", []
        return finish is not None


class Engine(threading.Thread):
    """Decodes the texts of many requests together. A request joins the running batch between two tokens and leaves it with its last,
    so that nobody waits for another's end (Orca, OSDI 2022, section 3.1). Each draws from random numbers of its own.

    The batch is the first len(active) rows of one cache whose texts all end at its column `length`. A text's newest token is not
    in the cache yet, but for `fill`, which takes whole texts.
    """

    def __init__(self, model, tokenizer, rows: int, queue_size: int, cache_tokens: int):
        super().__init__(daemon=True)
        self.model, self.tokenizer, self.rows, self.queue_size, self.cache_tokens = model, tokenizer, rows, queue_size, cache_tokens
        self.device, self.waiting, self.active, self.closed = model.norm.weight.device, collections.deque(), [], False
        self.cache, self.view, self.changed = None, None, threading.Condition()  # view: the cache's rows in use

    def submit(self, requests: list[Request]) -> None:
        with self.changed:
            if self.closed:
                raise Refusal(503, "the server is stopping")
            if len(self.waiting) + len(requests) > self.queue_size + max(0, self.rows - len(self.active)):
                raise Refusal(429, f"{len(self.waiting)} texts wait already and at most {self.queue_size} may; try later", code="rate_limit_exceeded")
            self.waiting.extend(requests)
            self.changed.notify()

    def close(self, seconds: float) -> None:
        """Refuse what comes and what waits; give what is being decoded so many seconds."""
        with self.changed:
            self.closed, deadline = True, time.monotonic() + seconds
            while self.waiting:
                self.waiting.popleft().events.put(Refusal(503, "the server is stopping"))
            while self.active and time.monotonic() < deadline:
                self.changed.wait(0.05)

    def run(self) -> None:
        while True:
            with self.changed:
                while not (self.waiting or self.active):
                    self.cache = self.view = None
                    self.changed.wait()
                new = self.admit()
            try:
                with torch.inference_mode():
                    self.step(new)
            except Exception as error:  # a lack of memory, most likely: these texts are lost, but not the server
                text = f"decoding failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
                print(f"sample.py: {text}", file=sys.stderr)
                for request in {*self.active, *new}:
                    request.events.put(Refusal(500, text))
                self.active, self.cache, self.view = [], None, None

    def admit(self) -> list[Request]:
        """Those of the waiting who fit the batch, first come, first served, and few enough for one pass over their prompts."""
        new, longest = [], max((r.prompt_tokens + r.limit for r in self.active), default=0)
        while self.waiting and (count := len(self.active) + len(new)) < self.rows:
            request = self.waiting[0]
            longest = max(longest, request.prompt_tokens + request.limit)
            tokens = (len(new) + 1) * max(r.prompt_tokens for r in (*new, request))
            if count and (count + 1) * longest > self.cache_tokens or new and tokens > 4096:
                break
            self.waiting.popleft()
            new += [] if request.left else [request]
        return new

    def step(self, new: list[Request]) -> None:
        """One more token for each text of the batch, after the first ones of those that join it."""
        for slot in reversed(range(len(self.active))):
            if self.active[slot].left:
                self.leave(slot)
        if new:
            joined, self.active = len(self.active), self.active + new
            self.make_room(joined)
            slots = list(range(joined, len(self.active)))
            self.advance(slots, self.fill(slots))
        if not self.active:
            return
        self.make_room(len(self.active))
        if self.view is None:
            self.view = self.cache.part(0, len(self.active))
            self.view.length = self.cache.length
        x = self.model.hidden(torch.tensor([[request.ids[-1]] for request in self.active], device=self.device), cache=self.view)[:, -1]
        self.cache.length += 1
        outgrown = (self.model.config.original_context or 0) + 1  # from here on LongRoPE's long factors hold, for the older keys too
        if outgrown > 1 and (slots := [slot for slot, request in enumerate(self.active) if len(request.ids) == outgrown]):
            x[slots] = self.fill(slots)
        self.advance(list(range(len(self.active))), x)

    def make_room(self, joined: int) -> None:
        """A cache with a row for each text, long enough for the prompts of those after the first `joined`, and with a free column."""
        old, rows = self.cache, len(self.active)
        used = max((len(request.ids) - 1 for request in self.active[:joined]), default=0)
        end = max([used, *(request.prompt_tokens for request in self.active[joined:])])
        if old and rows <= len(old.starts) and end <= old.length < old.layers[0][0].shape[2]:
            return
        columns = min(max(256, 2 * end), max(request.prompt_tokens + request.limit for request in self.active)) + 1
        rows = len(old.starts) if old and rows <= len(old.starts) else max(rows, min(2 * rows, self.rows, self.cache_tokens // columns))
        self.cache, self.view = models.Cache(self.model.config, [0] * rows, columns, self.device, self.model.norm.weight.dtype), None
        self.cache.length = end
        if joined:
            self.cache.starts[:joined] = old.starts[:joined] + end - old.length
        for to, source in zip(self.cache.layers, old.layers if old else self.cache.layers):
            for a, b in zip(to, source):
                a.zero_()  # what a row does not see must still be finite
                if joined:
                    a[:joined, :, end - used:end] = b[:joined, :, old.length - used:old.length]

    def fill(self, slots: list[int]):
        """The whole texts of these slots into the cache, up to column `length` -> their last states."""
        texts, end = [self.active[slot].ids for slot in slots], self.cache.length
        width = max(map(len, texts))
        part = models.Cache(self.model.config, [width - len(text) for text in texts], width, self.device, self.model.norm.weight.dtype)
        x = self.model.hidden(torch.tensor([[0] * (width - len(text)) + text for text in texts], device=self.device), cache=part)[:, -1]
        for to, source in zip(self.cache.layers, part.layers):
            for a, b in zip(to, source):
                a[slots, :, end - width:end] = b
        self.cache.starts[slots], self.view = part.starts + end - width, None
        return x

    def leave(self, slot: int) -> None:
        """The last row takes the place of this one."""
        moved = self.active.pop()
        last, end, self.view = len(self.active), self.cache.length, None
        if slot < last:
            for part in itertools.chain.from_iterable(self.cache.layers):
                part[slot, :, end - len(moved.ids) + 1:end] = part[last, :, end - len(moved.ids) + 1:end]
            self.cache.starts[slot], self.active[slot] = self.cache.starts[last], moved

    def advance(self, slots: list[int], x) -> None:
        """Choose the next token of these slots from their last states; those whose text has ended leave."""
        requests, logits = [self.active[slot] for slot in slots], self.model.logits(x)
        chosen, scores = choose(logits, requests), [None] * len(requests)
        if told := [i for i, request in enumerate(requests) if request.logprobs is not None]:
            every = logits[told].log_softmax(-1)
            best, own = every.topk(min(logits.shape[-1], max(requests[i].logprobs for i in told))), every.gather(1, chosen[told][:, None])
            for i, score, values, tokens in zip(told, own[:, 0].tolist(), best.values.tolist(), best.indices.tolist()):
                scores[i] = (int(chosen[i]), score, list(zip(tokens, values))[:requests[i].logprobs])
        ended = [request.take(token, self.tokenizer, score) for request, token, score in zip(requests, chosen.tolist(), scores)]
        for slot in reversed([slot for slot, over in zip(slots, ended) if over]):
            self.leave(slot)


def choose(logits, requests: list[Request]):
    """(n, V) logits -> (n,) tokens: as model.sample, but each row by its own request's settings and random numbers."""
    def column(values):
        return torch.tensor(values, device=logits.device)[:, None]
    chosen, drawn = logits.argmax(-1), [i for i, request in enumerate(requests) if request.temperature > 0]
    if not drawn:
        return chosen
    requests = [requests[i] for i in drawn]
    logits = logits[drawn] / column([request.temperature for request in requests])
    if narrow := [i for i, request in enumerate(requests) if request.top_p < 1 or request.top_k]:
        ordered, index = logits[narrow].sort(-1, descending=True)
        ranks = torch.arange(ordered.shape[1], device=logits.device)
        ordered = ordered.masked_fill(ranks >= column([requests[i].top_k or ordered.shape[1] for i in narrow]), -math.inf)
        shares = ordered.softmax(-1)
        ordered = ordered.masked_fill(shares.cumsum(-1) - shares >= column([requests[i].top_p for i in narrow]), -math.inf)
        logits[narrow] = torch.empty_like(ordered).scatter_(-1, index, ordered)
    total = logits.softmax(-1).cumsum(-1)
    point = column([min(request.random.random(), 1 - 2 ** -24) for request in requests]) * total[:, -1:]
    chosen[drawn] = torch.searchsorted(total, point, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return chosen


# ---------------------------------------------------------------- server

class Server(socketserver.ThreadingTCPServer):
    """One thread a connection; `engine` decodes for all of them."""
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 512

    def __init__(self, args, model, tokenizer):
        self.address_family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        self.args, self.tokenizer, self.context, self.started, self.answering = args, tokenizer, model.config.context, int(time.time()), set()
        self.name, self.key = os.path.basename(os.path.normpath(args.run)), os.environ.get("MINPHI_API_KEY", "")
        self.local = args.host in ("127.0.0.1", "localhost", "::1")
        weight = model.norm.weight
        room = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else free_memory()  # 0.4: moving to a larger cache holds both
        self.engine = Engine(model, tokenizer, args.batch_size, args.queue, int(0.4 * room / (model.config.cache_bytes() * weight.element_size() / 2)))
        super().__init__((args.host, args.port), Handler)

    def verify_request(self, request, address):
        return threading.active_count() < self.args.batch_size + self.args.queue + 256  # further connections are closed at once

    def handle_error(self, request, address):
        if not isinstance(error := sys.exc_info()[1], OSError):  # those are clients that have gone
            print(f"sample.py: {type(error).__name__}: {error}", file=sys.stderr)


def free_memory() -> int:
    """Bytes that the system can still give; 4 GB where it does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return 4 << 30


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, default_request_version, server_version, sys_version = "HTTP/1.1", "HTTP/1.0", "minphi", ""
    timeout, disable_nagle_algorithm, wbufsize, unread = 30, True, -1, 0  # seconds a client may keep us waiting; buffered writes; bytes of the body

    def log_message(self, *_):
        pass

    def send_error(self, code, message=None, explain=None):  # what the standard library finds wrong with a request
        self.refuse(Refusal(code, message or self.responses[code][0]))

    def send(self, kind: str, body: bytes = b"", status: int = 200, **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def send_json(self, value, status=200, **headers) -> None:
        body = json.dumps(value).encode()
        self.send("application/json", body, status, Content_Length=str(len(body)), **headers)

    def refuse(self, error: Refusal) -> None:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            error.status, "invalid_request_error" if error.status < 500 else "server_error")
        self.close_connection = True
        self.send_json({"error": {"message": str(error), "type": kind, "param": error.field, "code": error.code}}, error.status, Connection="close",
                       **({"Retry_After": "2"} if error.status in (429, 503) else {}))
        with contextlib.suppress(OSError):  # a client that is still sending hears us only when it may finish
            self.connection.settimeout(1)
            while 0 < self.unread < 1 << 26 and (chunk := self.rfile.read1(min(self.unread, 1 << 16))):
                self.unread -= len(chunk)

    def do_GET(self):
        about = {"id": self.server.name, "object": "model", "created": self.server.started, "owned_by": "minphi", "context": self.server.context}
        self.reply({"/v1/models": lambda: self.send_json({"object": "list", "data": [about]}), f"/v1/models/{self.server.name}": lambda: self.send_json(about),
                    "/runs": lambda: self.send_json(training_logs(self.server.args.run)), "/health": lambda: self.send_json({}),
                    "/": lambda: self.send("text/html; charset=utf-8", PAGE, Content_Length=str(len(PAGE)), Content_Security_Policy=POLICY)})

    def do_POST(self):
        self.reply({"/v1/chat/completions": lambda: self.answer(True), "/v1/completions": lambda: self.answer(False)})

    def reply(self, routes: dict) -> None:
        """Answer by the path's route, or refuse."""
        length, path, host = self.headers.get("Content-Length", ""), self.path.split("?")[0], self.headers.get("Host", "")
        self.unread = int(length) if length.isdigit() else 0
        try:
            foreign = "Origin" in self.headers and self.headers["Origin"].split("://")[-1] != host
            if foreign or self.server.local and re.sub(r":\d+$", "", host) not in ("127.0.0.1", "localhost", "[::1]", ""):
                raise Refusal(403, "other web sites may not use this server")  # nor reach it by a name of theirs that leads here
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if self.server.key and path != "/" and not hmac.compare_digest(key.encode(), self.server.key.encode()):
                raise Refusal(401, "no API key, or a wrong one: send MINPHI_API_KEY's as Authorization: Bearer ...", code="invalid_api_key")
            if path not in routes:
                raise Refusal(404, f"nothing answers {self.command} {path[:100]} here")
            routes[path]()
        except Refusal as error:
            self.refuse(error)
        except OSError:  # the client has gone, or does not read
            self.close_connection = True

    def body(self) -> dict:
        if not self.headers.get("Content-Length", "").isdigit():
            raise Refusal(411, "the request needs a Content-Length")
        if self.unread > (limit := int(self.server.args.max_body_mb * 1e6)):
            raise Refusal(413, f"the request has {self.unread:,} bytes and may have {limit:,} (--max-body-mb)")
        text, self.unread = self.rfile.read(self.unread), 0
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(body := json.loads(text), dict):
                return body
        raise Refusal(400, "the request must be a JSON object")

    def requests(self, body: dict, chat: bool) -> list[Request]:
        """The texts to decode for a request: n for each prompt."""
        def value(name, kind, low, high, default):
            if (given := body.get(name)) is None:
                return default
            if not isinstance(given, (int, float) if kind is float else kind) or isinstance(given, bool) != (kind is bool) or not low <= given <= high:
                raise Refusal(400, f"{name} must be {'true or false' if kind is bool else f'a number from {low} to {high}'}", name)
            return given
        context, most = self.server.context, 1 << 62
        if body.get("model") not in (None, self.server.name, self.server.args.run):
            raise Refusal(404, f"the model {str(body['model'])[:100]!r} is not here; {self.server.name!r} is", "model", "model_not_found")
        for name in ("tools", "functions", "logit_bias", "presence_penalty", "frequency_penalty", "suffix", "echo", "response_format"):
            if body.get(name) and body[name] != {"type": "text"}:
                raise Refusal(400, f"{name} is not supported", name)
        stop = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(text, str) and 0 < len(text) <= 1000 for text in stop):
            raise Refusal(400, "stop must be a text or up to 16 of them", "stop")
        told = value("top_logprobs", int, 0, 20, 0) if chat and value("logprobs", bool, False, True, False) else \
            None if chat else value("logprobs", int, 0, 20, None)
        limit = value("max_completion_tokens", int, 1, most, None) or value("max_tokens", int, 1, most, self.server.args.max_tokens)
        settings = dict(temperature=value("temperature", float, 0, 2, 1.0), top_p=value("top_p", float, 1e-9, 1, 1.0), top_k=value("top_k", int, 0, most, 0),
                        stop=tuple(stop), logprobs=told, stream=value("stream", bool, False, True, False), events=queue.SimpleQueue())
        seed, n = value("seed", int, -most, most, None), value("n", int, 1, 128, 1)
        try:
            prompts = [self.conversation(body.get("messages"))] if chat else self.prompts(body.get("prompt"))
        except ValueError as error:
            raise Refusal(400, str(error), "messages" if chat else "prompt") from None
        if (longest := max(len(ids) for ids, _ in prompts)) >= context:
            raise Refusal(400, f"the prompt has {longest:,} tokens; with an answer at most {context:,} fit", code="context_length_exceeded")
        return [Request([*ids], min(limit, context - len(ids)), seed=None if seed is None else seed + i, skip=skip, index=index * n + i, **settings)
                for index, (ids, skip) in enumerate(prompts) for i in range(n)]

    def conversation(self, messages):
        """Chat -> its tokens, and a space that some formats make answers begin with."""
        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise ValueError("messages must be a list of objects with role and content")
        plain = []
        for message in messages:
            content, role = message.get("content"), message.get("role")
            if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                content = "".join(part["text"] for part in content)
            plain.append({"role": "system" if role == "developer" else role, "content": content})
        return self.server.tokenizer.render(plain), " "

    def prompts(self, given):
        """A text, tokens, or a list of either -> of each its tokens, and the whitespace at its end, which is left to the model as in
        `complete` and then not sent a second time."""
        tokenizer, several = self.server.tokenizer, isinstance(given, list) and given and not isinstance(given[0], int)
        prompts = []
        for prompt in given if several else [given]:
            if isinstance(prompt, str):
                prompts.append((tokenizer.bos + tokenizer.encode(prompt.rstrip()) or [tokenizer.eot], prompt[len(prompt.rstrip()):]))
            elif isinstance(prompt, list) and prompt and all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in prompt):
                prompts.append((prompt, ""))
            else:
                raise ValueError("prompt must be a text, a list of texts, or lists of the model's tokens")
        return prompts

    def events(self, requests: list[Request]):
        """Lists of events as they come, until all have ended. OSError when the client has gone."""
        args, going, deadline = self.server.args, len(requests), time.monotonic() + self.server.args.request_seconds
        while going:
            batch = []
            with contextlib.suppress(queue.Empty):
                batch.append(requests[0].events.get(timeout=1))
                while True:
                    batch.append(requests[0].events.get_nowait())
            self.connection.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                if not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionAbortedError
            self.connection.settimeout(self.timeout)
            for event in batch:
                if isinstance(event, Refusal):
                    raise event
                going -= event[3] is not None
            if going and time.monotonic() > deadline:
                raise Refusal(503, f"the answer took longer than {args.request_seconds:g} seconds (--request-seconds)", code="timeout")
            yield batch
            if going:
                time.sleep(0.001 * len(self.server.engine.active))  # so all clients together are written to a thousand times a second at most

    def answer(self, chat: bool) -> None:
        """Decode and send what a request asks for: at once, or as server-sent events, in which errors after the first are events too."""
        body = self.body()
        requests, begun = self.requests(body, chat), False
        told = {"id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12), "object": "chat.completion" if chat else "text_completion",
                "created": int(time.time()), "model": self.server.name}

        def usage():
            prompt, new = sum(r.prompt_tokens for r in requests) // (body.get("n") or 1), sum(len(r.ids) - r.prompt_tokens for r in requests)
            return {"usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}}

        def write(value):
            self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.server.answering.add(told["id"])
        try:
            self.server.engine.submit(requests)
            if not requests[0].stream:
                events = sorted((event for batch in self.events(requests) for event in batch), key=lambda event: event[0])
                return self.send_json({**told, "choices": [self.choice(*event, chat, "message") for event in events], **usage()})
            told["object"] += ".chunk" if chat else ""
            for batch in self.events(requests):
                if not begun:
                    self.send("text/event-stream", Connection="close")
                    self.close_connection = begun = True
                    for request in requests if chat else ():
                        write({**told, "choices": [{"index": request.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
                for event in batch:
                    write({**told, "choices": [self.choice(*event, chat, "delta")]})
                self.wfile.flush()
            if isinstance(body.get("stream_options"), dict) and body["stream_options"].get("include_usage"):
                write({**told, "choices": [], **usage()})
            self.wfile.write(b"data: [DONE]\n\n")
        except Refusal as error:
            if not begun:
                raise
            write({"error": {"message": str(error), "type": "server_error", "param": None, "code": error.code}})
        finally:
            for request in requests:
                request.left = True
            self.server.answering.discard(told["id"])

    def choice(self, index, text, scores, finish, chat: bool, name: str) -> dict:
        """An event in OpenAI's words."""
        def told(token, score):
            raw = self.server.tokenizer.decode_bytes([token])
            return {"token": raw.decode("utf-8", errors="replace"), "logprob": max(score, -9999.0), "bytes": list(raw)}
        content = {name: {"content": text, **({"role": "assistant"} if name == "message" else {})}} if chat else {"text": text}
        entries, logprobs = [{**told(token, score), "top_logprobs": [told(*other) for other in others]} for token, score, others in scores], None
        if entries:
            logprobs = {"content": entries} if chat else {
                "tokens": [entry["token"] for entry in entries], "token_logprobs": [entry["logprob"] for entry in entries], "text_offset": [],
                "top_logprobs": [{other["token"]: other["logprob"] for other in entry["top_logprobs"]} for entry in entries]}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


def training_logs(run: str) -> list[dict]:
    """The logs of this run and of those beside it, the latest first: the last record, and the curves as a picture."""
    import train
    logs = []
    for path in glob.glob(f"{glob.escape(os.path.dirname(os.path.abspath(run)))}/*/log.jsonl"):
        with contextlib.suppress(OSError, ValueError, LookupError):  # its last line may be half written
            records, name = [record for record in data.read_jsonl(path) if "step" in record], os.path.basename(os.path.dirname(path))
            if last := next((record for record in reversed(records) if "loss" in record), None):
                thin = [record for n, record in enumerate(records) if "val" in record or n % (1 + len(records) // 400) == 0]
                logs.append({"name": name, "seconds_ago": time.time() - os.path.getmtime(path), "last": last, "svg": train.loss_svg(thin, html.escape(name))})
    return sorted(logs, key=lambda log: log["seconds_ago"])


def serve(args) -> None:
    model, tokenizer, _ = open_model(args)
    try:
        server = Server(args, model, tokenizer)
    except OSError as error:
        raise OSError(f"cannot listen at {args.host} port {args.port} ({error.strerror}); choose another --port") from None
    server.engine.start()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{server.server_address[1]}"
    print(f"{server.name}: a page at {address}, OpenAI's interface at {address}/v1; {args.batch_size} texts at once, {args.queue} may wait, "
          f"{server.engine.cache_tokens:,} tokens of cache at most (40 % of the free memory); Ctrl-C stops", flush=True)
    if not server.local and not server.key:
        print("anybody who reaches this machine may use it: set MINPHI_API_KEY to ask for a key", file=sys.stderr)
    try:
        server.engine.join()
    finally:
        print("stopping: answers that have begun are finished", file=sys.stderr)
        server.shutdown()
        server.engine.close(30)
        deadline = time.monotonic() + 2
        while server.answering and time.monotonic() < deadline:
            time.sleep(0.02)
        server.server_close()


# ---------------------------------------------------------------- the page at /

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>minphi</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --back: #fbfaf7; --card: #fff; --ink: #1d1d1f; --soft: #66666c; --line: #e3e1da; --accent: #3657c9; --tint: 54, 87, 201 }
@media (prefers-color-scheme: dark) {
  :root { --back: #131417; --card: #1c1e22; --ink: #ececef; --soft: #9a9aa3; --line: #2e3137; --accent: #8fa6ff; --tint: 240, 150, 70 } }
* { box-sizing: border-box; margin: 0 }
[hidden] { display: none !important }
body { height: 100dvh; display: flex; flex-direction: column; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
header, main > *, form { width: 100%; max-width: 46rem; margin: 0 auto; padding: 0 1rem }
header { display: flex; flex-wrap: wrap; align-items: center; padding: .6rem .5rem .6rem 1rem }
h1 { font-size: 1rem; margin-right: auto; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
main { flex: 1; overflow-y: auto }
button, select, input, textarea { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .35rem .7rem }
header button { border-color: transparent; background: none; padding: .35rem .5rem; cursor: pointer }
[aria-selected=true], [aria-expanded=true] { color: var(--accent); font-weight: 600 }
@media (max-width: 34rem) { h1 { flex: 1 0 100% } header { justify-content: space-between } header button { padding: .35rem .3rem } }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
#settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; padding-bottom: .8rem; color: var(--soft); font-size: .85rem }
#settings input:not([type=checkbox]) { width: 100%; color: var(--ink) }
.wide { grid-column: 1 / -1 }
article { padding: .3rem 0; margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
.user { margin: .5rem 0 .5rem auto; width: fit-content; max-width: 85%; background: var(--card); border: 1px solid var(--line); border-radius: 1rem; padding: .5rem .9rem }
.code { font: .9rem/1.5 ui-monospace, monospace }
.shaded span { background: rgba(var(--tint), calc(.4 * (1 - var(--p)))) }
span.on { outline: 2px solid var(--accent); border-radius: .2rem }
footer { color: var(--soft); font-size: .8rem; padding-bottom: .5rem }
footer button { padding: 0 .5rem; margin-left: .6rem }
.error { color: #d0402f }
#hint { color: var(--soft); padding-top: 18vh; text-align: center }
form { display: flex; gap: .5rem; align-items: end; padding-top: .6rem; padding-bottom: max(.8rem, env(safe-area-inset-bottom)) }
textarea { flex: 1; resize: none; max-height: 40vh; min-width: 0 }
form button { background: var(--accent); border-color: var(--accent); color: var(--back); font-weight: 600 }
#tip { position: fixed; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .4rem .6rem; pointer-events: none; white-space: pre;
  box-shadow: 0 4px 18px #0003; font: .8rem ui-monospace, monospace }
#tip i { display: inline-block; height: .55em; margin-right: .5em; background: var(--accent); border-radius: 2px }
img { display: block; width: 100%; margin: .6rem 0; border-radius: .6rem }
@media (prefers-color-scheme: dark) { img { filter: invert(.9) hue-rotate(180deg) } }
</style>
<header><h1>minphi</h1><div role="tablist"><button role="tab" aria-selected="true">Chat</button><button role="tab">Complete</button><button role="tab">Training</button></div>
  <button id="new" title="Forget the conversation">New</button><button id="gear" aria-expanded="false" aria-controls="settings">Settings</button></header>
<main>
  <section id="settings" hidden>
    <label>Temperature <input name="temperature" type="number" min="0" max="2" step="0.1" value="0.7"></label>
    <label>Top p <input name="top_p" type="number" min="0.01" max="1" step="0.01" value="1"></label>
    <label>Tokens at most <input name="max_tokens" type="number" min="1" value="256"></label>
    <label>Seed <input name="seed" type="number" min="0" placeholder="any"></label>
    <label class="wide">System message <input name="system"></label>
    <label class="wide">API key <input name="key" type="password" autocomplete="off" placeholder="where the server asks for one"></label>
    <label class="wide"><input name="shade" type="checkbox" checked> Shade each token by how unsure the model was</label>
  </section>
  <section id="log" aria-live="polite"></section>
  <section id="training" hidden><select aria-label="Run"></select><img alt="Loss over tokens"><p></p></section>
  <p id="hint">Enter sends, Shift+Enter breaks the line, Esc stops.<br>Point at a word, or focus an answer and use the arrow keys, to see what else might have been said.</p>
</main>
<form><textarea rows="1" aria-label="Message" autofocus></textarea><button>Send</button></form><div id="tip" role="status" hidden></div>
<script>
"use strict"
const $ = selector => document.querySelector(selector), all = selector => [...document.querySelectorAll(selector)]
const log = $("#log"), box = $("textarea"), send = $("form button"), tip = $("#tip"), main = $("main"), setting = name => $(`[name=${name}]`).value
const make = (tag, parent, text, name) => { const e = parent.appendChild(document.createElement(tag)); e.textContent = text || ""; if (name) e.className = name; return e }
const headers = () => ({"Content-Type": "application/json", ...(setting("key") && {Authorization: "Bearer " + setting("key")})})
const get = async path => { const reply = await fetch(path, {headers: headers()}).catch(() => null); return reply && reply.ok ? reply.json() : null }
let turns = [], mode = "Chat", running = null, model = ""

for (const field of all("#settings input")) {  // they stay in this browser; the key only as long as the tab
  const store = field.name == "key" ? sessionStorage : localStorage, what = field.type == "checkbox" ? "checked" : "value"
  const known = store.getItem("minphi." + field.name)
  if (known !== null) field[what] = what == "value" ? known : known == "true"
  field.onchange = () => { store.setItem("minphi." + field.name, field[what]); begin() }
}
async function begin() {
  log.classList.toggle("shaded", $("[name=shade]").checked)
  model = (await get("/v1/models"))?.data[0].id || ""
  $("h1").textContent = model || "minphi"
}

function show(name) {
  mode = name
  point(null)
  all("[role=tab]").forEach(tab => tab.setAttribute("aria-selected", tab.textContent == name))
  log.hidden = $("form").hidden = name == "Training"
  $("#training").hidden = !log.hidden
  $("#hint").hidden = log.hidden || log.childElementCount
  box.placeholder = name == "Chat" ? "Message" : "Text to go on with"
  if (log.hidden) train(); else box.focus()
}

async function answer(prompt, chat) {  // streamed; each token is a span, whose shade and alternatives come with it
  const body = {model, stream: true, ...(chat ? {logprobs: true, top_logprobs: 5} : {logprobs: 5, prompt})}
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (setting(name)) body[name] = Number(setting(name))
  if (chat) body.messages = [...(setting("system") ? [{role: "system", content: setting("system")}] : []), ...turns]
  const place = make("article", log, chat ? "" : prompt, chat ? "" : "code"), foot = make("footer", log, "…"), decoder = new TextDecoder()
  let text = "", count = 0, first = 0, rest = ""
  place.tabIndex = 0
  running = new AbortController()
  send.textContent = "Stop"
  main.scrollTop = main.scrollHeight
  try {
    const reply = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal})
    if (!reply.ok) throw Error((await reply.json()).error.message)
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader()
    for (let part; !(part = await reader.read()).done;) {
      const lines = (rest + part.value).split("\n\n"), follow = main.scrollHeight - main.scrollTop - main.clientHeight < 60
      rest = lines.pop()
      for (const event of lines.filter(line => line != "data: [DONE]").map(line => JSON.parse(line.slice(6)))) {
        if (event.error) throw Error(event.error.message)
        const choice = event.choices[0]
        text += (chat ? choice.delta.content : choice.text) || ""
        for (const token of scores(choice.logprobs)) {
          const span = make("span", place, token.bytes ? decoder.decode(new Uint8Array(token.bytes), {stream: true}) : token.token)
          span.style.setProperty("--p", Math.exp(token.logprob))
          span.others = token.top_logprobs
          first ||= performance.now()
          count++
        }
      }
      foot.textContent = `${count} tokens, ${Math.round((count - 1) / Math.max(1e-3, (performance.now() - first) / 1000))} a second`
      if (follow) main.scrollTop = main.scrollHeight
    }
  } catch (error) {
    if (error.name != "AbortError") make("p", place, error.message, "error")
    foot.textContent = count ? `${count} tokens, then stopped` : "no answer"
  }
  running = null
  send.textContent = "Send"
  if (chat && place.isConnected) turns.push({role: "assistant", content: text})  // it is not when all has been forgotten meanwhile
  const before = turns.length - 1
  make("button", foot, "Retry").onclick = () => {
    if (running) return
    if (chat) { while (log.lastChild != foot) log.lastChild.remove(); turns.length = before }
    foot.remove()
    place.remove()
    answer(prompt, chat)
  }
}
const scores = told => !told ? [] : told.content || told.tokens.map((token, i) => ({token, logprob: told.token_logprobs[i],
  top_logprobs: Object.entries(told.top_logprobs[i]).map(([token, logprob]) => ({token, logprob}))}))

function point(span) {  // shows the alternatives of a token
  all(".on").forEach(other => other.classList.remove("on"))
  tip.hidden = !span?.others
  if (tip.hidden) return
  span.classList.add("on")
  tip.textContent = ""
  for (const {token, logprob} of span.others) {
    const line = make("div", tip), share = Math.exp(logprob)
    make("i", line).style.width = 5 * share + "rem"
    line.append(`${(100 * share).toFixed(1).padStart(5)} %  ${JSON.stringify(token)}`)
  }
  const at = span.getBoundingClientRect(), size = tip.getBoundingClientRect()
  tip.style.left = Math.max(8, Math.min(at.left, innerWidth - size.width - 8)) + "px"
  tip.style.top = (at.bottom + size.height + 8 < innerHeight ? at.bottom + 6 : at.top - size.height - 6) + "px"
}
log.onpointerover = event => point(event.target)
log.onpointerleave = log.onfocusout = main.onscroll = () => point(null)
log.onkeydown = event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key], spans = event.target.tagName == "ARTICLE" ? [...event.target.querySelectorAll("span")] : []
  if (!step || !spans.length) return
  event.preventDefault()
  point(spans[Math.min(spans.length - 1, Math.max(0, spans.findIndex(span => span.classList.contains("on")) + step))])
}

async function train() {  // the loss curves of log.jsonl, drawn by the server
  if (mode != "Training") return
  const runs = await get("/runs") || [], pick = $("select")
  if (runs.map(run => run.name).join() != [...pick.options].map(option => option.value).join()) pick.replaceChildren(...runs.map(run => new Option(run.name)))
  const run = runs.find(run => run.name == pick.value), last = run?.last
  pick.hidden = $("img").hidden = !run
  if (run) $("img").src = "data:image/svg+xml," + encodeURIComponent(run.svg)
  $("#training p").textContent = !run ? "No log.jsonl of a training run beside this model." : `Step ${last.step.toLocaleString()}, loss ${last.loss.toFixed(3)}, ` +
    `${(last.tokens_per_second || 0).toLocaleString()} tokens a second; written ${Math.round(run.seconds_ago)} s ago.`
  clearTimeout(train.next)
  train.next = setTimeout(train, 3000)
}

$("form").onsubmit = event => {
  event.preventDefault()
  const text = box.value, chat = mode == "Chat"
  if (running) return running.abort()
  if (!text.trim()) return
  $("#hint").hidden = true
  if (chat) { make("article", log, text, "user"); turns.push({role: "user", content: text}) }
  box.value = ""
  box.oninput()
  answer(text, chat)
}
box.oninput = () => { box.style.height = "auto"; box.style.height = box.scrollHeight + 2 + "px" }
box.onkeydown = event => { if (event.key == "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit() } }
document.onkeydown = event => { if (event.key == "Escape") { point(null); running?.abort() } }
all("[role=tab]").forEach(tab => tab.onclick = () => show(tab.textContent))
$("select").onchange = train
$("#gear").onclick = () => $("#gear").setAttribute("aria-expanded", !($("#settings").hidden = !$("#settings").hidden))
$("#new").onclick = () => { running?.abort(); turns = []; log.textContent = ""; show(mode == "Training" ? "Chat" : mode) }
show("Chat")
begin()
</script>
</html>
"""
HASH = {tag: base64.b64encode(hashlib.sha256(PAGE.split(f"<{tag}>")[1].split(f"</{tag}>")[0].encode()).digest()).decode() for tag in ("script", "style")}
PAGE = PAGE.encode()  # nothing but this very script and style may run, and nothing but this server be asked, whatever a text contains
POLICY = (f"default-src 'none'; script-src 'sha256-{HASH['script']}'; style-src 'sha256-{HASH['style']}'; connect-src 'self'; img-src data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


# ---------------------------------------------------------------- evaluation: what is asked

LINE_AT_MARGIN = re.compile(r"\n(?=[^\s])")  # where a function's body is over: the next line starts at column 0


def cut(completion: str) -> str:
    """The completion up to the first later line that starts at column 0. Example: cut("\\n    return 1\\n\\nprint(2)") == "\\n    return 1\\n" """
    end = LINE_AT_MARGIN.search(completion)
    return completion[:end.start()] if end else completion


@dataclass
class Question:
    """What a benchmark's record asks, in the words of lm-evaluation-harness, so that numbers compare."""
    prompt: str
    answer: str = ""             # the right one as it stands after the prompt, where this question is an example for another
    until: str = ""              # regular expression of what comes after an answer
    grade: object = None         # text -> {metric: right or not}, the first of them deciding; None: run the tests
    options: list | None = None  # texts of which the likeliest is chosen
    right: int = 0               # which of the options
    group: str = ""              # a level or subject with figures of its own
    intro: str = ""              # stands before the examples


def ask_code(record) -> Question:
    return Question(record["prompt"].rstrip(), record.get("canonical_solution", ""), LINE_AT_MARGIN.pattern, group=str(record.get("k", "")))


def ask_mbpp(record) -> Question:
    task = f"You are an expert Python programmer, and here is your task: {record.get('text') or record['prompt']} Your code should pass these tests:"
    return Question("\n".join([f"{task}\n", *record["test_list"], "[BEGIN]\n"]), f"{record['code']}\n[DONE]", r"\[DONE\]")


def ask_gsm8k(record) -> Question:
    def number(text, pattern, which):
        found = re.findall(pattern, text)
        return re.sub(r"[$,]|\.$", "", found[which]) if found else None
    strict, loose = r"#### (-?[0-9.,]+)", r"-?[$0-9.,]{2,}|-?[0-9]+"
    right = number(record["answer"], strict, 0)
    return Question(f"Question: {record['question']}\nAnswer:", f" {record['answer']}", "Question:|</s>|<\\|im_end\\|>",
                    lambda text: {"last number": number(text, loose, -1) == right, "after ####": number(text, strict, 0) == right})


def boxed(text: str) -> str | None:
    """What the last \\boxed{} of a text holds, braces within it balanced; or, without one, what follows "answer is"."""
    begin, depth = max(text.rfind("\\boxed"), text.rfind("\\fbox")), 0
    for i in range(begin, len(text) if begin >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if text[i] == "}" and not depth:
            return text[text.index("{", begin) + 1:i]
    said = re.findall(r"answer is:?\s*\$?(.+?)\$?\.?(?:\s*I hope|\n|$)", text)
    return said[-1] if said else None


MATH_SPELLINGS = [(r"\n|\\!|\\left|\\right|\^\{?\\circ\}?|\\?\$|\\?%|\\text\{ .*", ""), (r"\\\\", r"\\"), (r"[td]frac", "frac"), (r"(^|[ {])\.", r"\g<1>0."),
                  (r"^\s*\w{1,2}\s*=(?=[^=]*$)", ""), (r"\\sqrt\s*([^\s{])", r"\\sqrt{\1}"), (r"\s", ""), (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),
                  (r"\\frac([^{])\{", r"\\frac{\1}{"), (r"^0\.5$", r"\\frac{1}{2}"), (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}")]


def plain_math(text: str | None) -> str | None:
    """Spellings that mean the same made one, by the rules of MATH (arXiv 2103.03874). Example: plain_math("x = \\\\tfrac12") == "\\\\frac{1}{2}" """
    for pattern, instead in MATH_SPELLINGS if text is not None else ():
        text = re.sub(pattern, instead, text)
    return text


def ask_math(record) -> Question:
    right = plain_math(boxed(record["solution"]))
    return Question(f"Problem:\n{record['problem']}\n\nSolution:", f" {record['solution']}", "Problem:",
                    lambda text: {"exact match": right is not None and plain_math(boxed(text)) == right}, group=str(record.get("level", "")))


def choice(prompt, options, right, **more) -> Question:
    return Question(prompt, f" {options[right]}", options=options, right=right, **more)


def ask_hellaswag(record) -> Question:
    def clean(text):
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    prompt = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return choice(clean(prompt), [clean(ending) for ending in record["endings"]], int(record["label"]))


def ask_arc(record) -> Question:
    """AI2's own file or the hub's."""
    question = record["question"] if isinstance(record["question"], dict) else {"stem": record["question"], **record["choices"]}
    texts, labels = ([choice[name] for choice in question["choices"]] if "choices" in question else question[name] for name in ("text", "label"))
    return choice(f"Question: {question['stem']}\nAnswer:", texts, labels.index(record["answerKey"]))


def ask_gpqa(record) -> Question:
    answers, order = ["Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))], random.Random(record["Question"]).sample(range(4), 4)
    listed = "\n".join(f"({letter}) {record[answers[n]].strip()}" for letter, n in zip("ABCD", order))
    return choice(f"What is the correct answer to this question:{record['Question']}\nChoices:\n{listed}\nAnswer:",
                  ["(A)", "(B)", "(C)", "(D)"], order.index(0))


def ask_mmlu(record) -> Question:
    subject = record.get("subject", "").replace("_", " ")
    listed = "\n".join([record["question"].strip(), *(f"{letter}. {text}" for letter, text in zip("ABCD", record["choices"]))])
    return choice(f"{listed}\nAnswer:", [*"ABCD"], int(record["answer"]) if str(record["answer"]).isdigit() else "ABCD".index(record["answer"]), group=subject,
                  intro=f"The following are multiple choice questions (with answers) about {subject}.\n\n")


def ask_chat(record) -> Question:
    return Question(record["turns"][0], group=str(record.get("category", "")))


KINDS = {  # name: what it asks, the usual number of examples before a question, the fields that give a record away
    "code": (ask_code, 0, "prompt", "entry_point", "test"), "MBPP": (ask_mbpp, 3, "code", "test_list"),
    "HellaSwag": (ask_hellaswag, 0, "ctx_a", "ctx_b", "endings", "label", "activity_label"), "ARC": (ask_arc, 0, "question", "answerKey"),
    "GPQA": (ask_gpqa, 0, "Question", "Correct Answer", "Incorrect Answer 1"), "MMLU": (ask_mmlu, 5, "question", "choices", "answer"),
    "GSM8K": (ask_gsm8k, 5, "question", "answer"), "MATH": (ask_math, 4, "problem", "solution"), "chat": (ask_chat, 0, "turns"),
    "text": (None, 0, "text")}


def fetch(name: str) -> str:
    """A file's path as it is; a URL's file in the cache. URL#sha256=DIGITS is checked; without it, the digits are told."""
    if not name.startswith(("http://", "https://")):
        return name
    url, _, digest = name.partition("#sha256=")
    folder = os.path.join(os.environ.get("MINPHI_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minphi"), "eval")
    path = os.path.join(folder, f"{hashlib.sha256(name.encode()).hexdigest()[:12]}-{os.path.basename(url.split('?')[0])}")
    if not os.path.isfile(path):
        models.download(url, path, digest=digest or None)
    if not digest:
        with open(path, "rb") as file:
            print(f"unchecked: to have it checked, write {url}#sha256={hashlib.file_digest(file, 'sha256').hexdigest()}", file=sys.stderr)
    return path


def read_csv(path: str):
    """GPQA's file has a header; MMLU's have none, and their subject in their names."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and "Question" in rows[0]:
        return [dict(zip(rows[0], row)) for row in rows[1:]]
    subject = re.sub(r"(_(test|val|dev))?\.csv$", "", os.path.basename(path))
    return [{"question": row[0], "choices": row[1:-1], "answer": row[-1], "subject": subject} for row in rows]


def read_benchmark(name: str, limit: int | None = None) -> tuple[str, list[dict]]:
    """The kind of a benchmark and its records: JSON Lines, JSON, CSV, a directory of JSON files (MATH's), or any text."""
    path = fetch(name)
    if not os.path.exists(path):
        raise FileNotFoundError(f"--eval {path}: no such file; make problems with python synth.py exercises, or fetch HumanEval.jsonl.gz")
    if os.path.isdir(path):
        files = sorted(glob.glob(f"{glob.escape(path)}/**/*.json", recursive=True))
        records = ({**models._read_json(file), "task_id": os.path.relpath(file, path)} for file in files)
    elif re.search(r"\.jsonl(\.gz)?$", path):
        records = data.read_jsonl(path)
    elif path.endswith((".json", ".csv")):
        records = models._read_json(path) if path.endswith(".json") else read_csv(path)
    else:
        with open(path, encoding="utf-8", errors="replace") as file:
            records = [{"text": file.read()}]
    records = list(itertools.islice(records if not isinstance(records, dict) else [records], limit))
    if not records:
        raise ValueError(f"{path} holds no problems; make some with python synth.py exercises")
    kind = next((kind for kind, (_, _, *fields) in KINDS.items() if {*fields} <= {*records[0]}), None)
    if kind is None:
        raise ValueError(f"{path}: what has the fields {', '.join(records[0])} is no benchmark that is known here: {', '.join(KINDS)}")
    for n, record in enumerate(records, 1):
        if lacking := [field for field in KINDS[kind][2:] if record.get(field) is None]:
            raise ValueError(f"{path}: record {n} lacks {', '.join(lacking)}; it was taken for {kind}")
    return kind, [{"task_id": record.get("id", record.get("question_id", f"record {n}")), **record} for n, record in enumerate(records, 1)]


# ---------------------------------------------------------------- evaluation: what is answered

class Answers:
    """The model's answers by a key of model, settings and question: shared among the processes of torchrun, and kept in OUT.part.RANK
    until OUT is written, so that an evaluation that was cut goes on where it stopped."""

    def __init__(self, out: str | None):
        self.rank, self.world, self.out = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), out
        self.known, self.file = {}, None
        for path in self.parts():
            with open(path, encoding="utf-8") as file:
                for line in file:
                    with contextlib.suppress(ValueError):  # the last line may have been cut
                        self.known.update([json.loads(line)])
        if self.world > 1:
            torch.distributed.init_process_group("gloo")
            torch.distributed.barrier()  # nobody writes before all have read
        if out:
            os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
            self.file = open(f"{out}.part.{self.rank}", "a", encoding="utf-8")
            self.file.write("\n")

    def parts(self) -> list[str]:
        return glob.glob(f"{glob.escape(self.out)}.part.*") if self.out else []

    def collect(self, keys: list[str], answer) -> list:
        """The answer to each key. answer(indices) yields (index, answer) for those that are not known yet."""
        todo, new = [i for i, key in enumerate(keys) if key not in self.known], {}
        for i, value in answer(todo[self.rank::self.world]):
            new[keys[i]] = value
            if self.file:
                self.file.write(json.dumps([keys[i], value]) + "\n")
                self.file.flush()
        shares = [new]
        if self.world > 1:
            torch.distributed.all_gather_object(shares := [None] * self.world, new)
        for share in shares:
            self.known.update(share)
        return [self.known[key] for key in keys]


def write_texts(opened, args, prompts: list[list[int]], until: str):
    """A function for Answers.collect: the model's continuation of each prompt up to `until`; None where the prompt does not fit."""
    model, tokenizer, stop = opened
    faster, over = speedups(args, model), re.compile(until.encode())

    def answer(todo):
        yield from ((i, None) for i in todo if len(prompts[i]) >= model.config.context)
        jobs = sorted((i for i in todo if len(prompts[i]) < model.config.context), key=lambda i: -len(prompts[i]))  # alike together waste least,
        started, tokens = time.perf_counter(), 0                                                          # and a lack of memory shows at once
        with tqdm(total=len(jobs), desc="solving", unit="completion", disable=None) as progress:
            for begin in range(0, len(jobs), args.batch_size):
                batch = jobs[begin:begin + args.batch_size]
                texts = [b""] * len(batch)

                def ended(row, token):
                    texts[row] += b"" if token in stop else tokenizer.decode_bytes([token])
                    return bool(over.search(texts[row], max(0, len(texts[row]) - len(tokenizer.decode_bytes([token])) - 12)))
                new = model.generate([prompts[i] for i in batch], args.max_tokens, args.temperature, args.top_k, args.top_p, stop, args.seed + begin,
                                     ended, **faster)
                tokens += sum(map(len, new))
                for i, text in zip(batch, texts):
                    yield i, re.split(until, text.decode("utf-8", errors="replace"), maxsplit=1)[0]
                progress.update(len(batch))
        seconds = time.perf_counter() - started
        print(f"{len(jobs):,} completions, {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)") if jobs else None
    return answer


def likelihoods(model, pairs: list[tuple[list[int], list[int]]]):
    """A function for Answers.collect: the log-probability of each pair's second part after its first, in nats, of which the beginning
    is left out where both do not fit the context. Pairs that differ in their last token only, such as the letters of options, share a pass."""
    def answer(todo):
        rows, device = {}, model.norm.weight.device
        for i in todo:
            rows.setdefault(tuple((pairs[i][0] + pairs[i][1])[-model.config.context - 1:-1]), []).append(i)
        waiting = sorted(rows, key=len, reverse=True)
        with tqdm(total=len(waiting), desc="reading", unit="text", disable=None) as progress:
            while waiting:
                width = len(waiting[0])
                batch, waiting = waiting[:max(1, 4096 // width)], waiting[max(1, 4096 // width):]
                with torch.inference_mode():
                    x = model.hidden(torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch], device=device))
                    for row, ids in enumerate(batch):
                        for i in rows[ids]:
                            after = torch.tensor(pairs[i][1], device=device)
                            states = x[row, len(ids) - len(after):len(ids)].split(512)
                            yield i, sum(model.logits(part).log_softmax(-1).gather(1, targets[:, None]).sum().item()
                                         for part, targets in zip(states, after.split(512)))
                progress.update(len(batch))
    return answer


def pair(tokenizer, context: str, after: str) -> tuple[list[int], list[int]]:
    """Two texts that follow one another as tokens, split where the first one's end; spaces between them belong to the second."""
    after, context = context[len(context.rstrip()):] + after, context.rstrip()
    whole, begin = tokenizer.encode(context + after), len(tokenizer.encode(context))
    begin = min(begin, len(whole) - 1)
    return tokenizer.bos + whole[:begin] or [tokenizer.eot], whole[begin:]


# ---------------------------------------------------------------- evaluation: what comes out

def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes (Codex, arXiv 2107.03374, equation 1). Example: pass_at_k(2, 1, 1) == 0.5"""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def score(passed: list[int], samples: int, name: str | None = None, more=None) -> dict:
    """Summary of problems of which `passed` samples each succeeded, as pass@k or under a `name`, and of `more` {metric: a value for
    each problem}. Standard errors are over problems: `se` of the first metric, `se METRIC` of the others."""
    estimates = {name: passed} if name else {f"pass@{k}": [pass_at_k(samples, n, k) for n in passed] for k in (1, 10, 100) if k <= samples}
    result = {"passed": sum(passed), "total": len(passed) * samples, "problems": len(passed)}
    for n, (metric, values) in enumerate({**estimates, **(more or {})}.items()):
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        result |= {metric: statistics.fmean(values), f"se {metric}" if n else "se": error}
    return result


def text_scores(records: list[dict], totals: list[float], tokens: int) -> dict:
    """Bits per byte and perplexities per byte, word and token of documents with these log-likelihoods; the error is over documents."""
    sizes, words = [len(record["text"].encode()) for record in records], sum(len(re.split(r"\s+", record["text"])) for record in records)
    size, nats = sum(sizes), -sum(totals)
    spread = sum((nats / size * each + total) ** 2 for each, total in zip(sizes, totals)) * len(sizes) / max(1, len(sizes) - 1)
    return {"problems": len(records), "bytes": size, "tokens": tokens, "bits per byte": nats / size / math.log(2), "se": math.sqrt(spread) / size / math.log(2),
            **{f"{unit} perplexity": math.exp(min(700, nats / n)) for unit, n in (("byte", size), ("word", words), ("token", tokens))}}


def read_text(keys, opened, answers: Answers, records):
    """-> scores and rows of documents: each token is predicted once, in disjoint windows, from all that fits before them."""
    model, tokenizer, _ = opened
    pairs, owner, context = [], [], model.config.context
    for n, record in enumerate(records):
        ids = (tokenizer.bos or [tokenizer.eot]) + tokenizer.encode(record["text"])
        for begin in range(1, len(ids), context):
            end = min(begin + context, len(ids))
            pairs.append((ids[max(0, end - 1 - context):begin], ids[begin:end]))
            owner.append(n)
    rows = [{"task_id": record["task_id"], "text": record["text"], "log_likelihood": 0.0} for record in records]
    for n, value in zip(owner, answers.collect(keys(pairs), likelihoods(model, pairs))):
        rows[n]["log_likelihood"] += value
    return text_scores(records, [row["log_likelihood"] for row in rows], sum(len(after) for _, after in pairs)), rows


def choose_options(keys, opened, answers: Answers, questions, prompts) -> list[dict]:
    """Rows of questions answered by the likeliest option, and by the likeliest a character (acc and acc_norm of lm-evaluation-harness)."""
    model, tokenizer, _ = opened
    pairs = [pair(tokenizer, prompt, f" {option}") for question, prompt in zip(questions, prompts) for option in question.options]
    values, rows = iter(answers.collect(keys(pairs), likelihoods(model, pairs))), []
    for question in questions:
        each = [next(values) for _ in question.options]
        chosen = max(range(len(each)), key=lambda n: each[n])
        by_length = max(range(len(each)), key=lambda n: each[n] / max(1, len(question.options[n])))
        rows.append({"options": question.options, "log_likelihoods": each, "right": question.right, "chosen": chosen, "chosen_by_length": by_length,
                     "passed": chosen == question.right, "scores": {"by length": float(by_length == question.right)}})
    return rows


def judge_texts(args, questions, records, texts) -> list[dict]:
    """Rows of written answers: graded by the benchmark's own rule, or by running its tests."""
    problems = [record if args.solutions == "canonical" else {**record, "prompt": question.prompt} for record, question in zip(records, questions)]
    run = [(problems[i // args.samples], text) for i, text in enumerate(texts) if text is not None] if questions[0].grade is None else []
    verdicts, rows = iter(synth.judge_all(run, timeout=args.timeout, memory_mb=args.memory_mb) if run else []), []
    for i, text in enumerate(texts):
        question, record, scores = questions[i // args.samples], records[i // args.samples], {}
        if question.grade:
            (reason, passed), *scores = question.grade(text or "").items()
        elif text is not None:
            passed, reason = next(verdicts)
        if text is None:
            passed, reason = False, "the prompt does not fit the context"
        rows.append({**({"k": record["k"]} if "k" in record else {}), "completion": text, "passed": passed, "reason": reason,
                     "scores": {name: float(value) for name, value in dict(scores).items()}})
    return rows


RATING = ("Rate from 1 to 10 how helpful, right, relevant and thorough the assistant's last answer is. First give your reasons in two sentences, then one line: "
          "RATING: and the number.{reference}\n\n{chat}")


def read_rating(text: str) -> int:
    if not (found := re.findall(r"RATING\W*(10|[1-9])\b", text, re.I)):
        raise synth.Refused("no rating")
    return int(found[-1])


def rate_chats(args, keys, opened, answers: Answers, records) -> list[dict]:
    """Rows of conversations, each of whose answers --judge rates (MT-bench, arXiv 2306.05685, section 3.1, single answers)."""
    if not args.judge or not args.out:
        raise ValueError("these questions are for a judge: give --judge URL#MODEL, and --out FILE.jsonl, beside which its ratings are kept")
    chats, tokenizer = [[] for _ in records], opened[1]
    for turn in range(max(len(record["turns"]) for record in records)):
        going = [i for i, record in enumerate(records) if turn < len(record["turns"])]
        for i in going:
            chats[i].append({"role": "user", "content": records[i]["turns"][turn]})
        ids = [tokenizer.render(chats[i]) for i in going]
        for i, text in zip(going, answers.collect(keys(ids), write_texts(opened, args, ids, "(?!)"))):
            chats[i].append({"role": "assistant", "content": (text or "").strip()})
    if answers.rank:
        return []
    desk = synth.Desk(argparse.Namespace(teacher=[args.judge], judge=[], dry_run=False, temperature=0.0, max_answer=1024, concurrency=32, asks=3, retries=6,
                                         backoff=1.0, timeout=300.0, requests_per_minute=0, tokens_per_minute=0, max_tokens=0, max_usd=0, price_in=0,
                                         price_out=0), f"{args.out}.paid.jsonl")

    def rate(job):
        i, end = job
        told = records[i].get("reference") or []
        reference = f" A right answer: {told[end // 2 - 1]}" if len(told) >= end // 2 else ""
        return desk.ask(RATING.format(reference=reference, chat="\n\n".join(f"### {m['role']}\n{m['content']}" for m in chats[i][:end])), read_rating)[0]
    jobs = [(i, end) for i, chat in enumerate(chats) for end in range(2, len(chat) + 1, 2)]
    ratings = dict(zip(jobs, desk.run(rate, jobs)))
    if lacking := [value for value in ratings.values() if not isinstance(value, int)]:
        raise ValueError(f"{len(lacking)} answers were not rated ({lacking[0] or desk.stopped}); the same command goes on from here")
    each = [[value for (i, _), value in ratings.items() if i == n] for n in range(len(chats))]
    return [{"messages": chat, "ratings": values, "passed": statistics.fmean(values), "scores": {}} for chat, values in zip(chats, each)]


def evaluate_file(args, name: str, opened, answers: Answers) -> tuple[dict, list[dict]]:
    """-> the summary of one benchmark, and its rows: question, answer and verdict."""
    kind, records = read_benchmark(name, args.limit)
    make, usual = KINDS[kind][:2]
    summary = {"file": name, "kind": kind, "run": args.run if args.solutions == "model" else None, "samples": args.samples, "temperature": args.temperature}
    stamp = [os.path.abspath(args.run), *(os.stat(path)[6:9:2] for path in sorted(glob.glob(f"{glob.escape(args.run)}/*.safetensors"))),
             *(getattr(args, key) for key in ("dtype", "quantize", "draft", "lookup", "skip", "max_tokens", "temperature", "top_k", "top_p", "seed"))]

    def keys(parts):
        return [hashlib.sha256(json.dumps([stamp, kind, part]).encode()).hexdigest()[:24] for part in parts]
    if kind == "text":
        result, rows = read_text(keys, opened, answers, records)
        return summary | result, rows
    questions = [make(record) for record in records]
    count, pool = usual if args.shots is None else args.shots, [make(record) for record in read_benchmark(args.shots_file)[1]] if args.shots_file else questions
    prompts = []
    for question in questions:
        shots = [other for other in pool[:count + 1] if other.prompt != question.prompt][:count]
        prompts.append(question.intro + "".join(f"{shot.prompt}{shot.answer}\n\n" for shot in shots) + question.prompt)
    if questions[0].options:
        rows = choose_options(keys, opened, answers, questions, prompts)
    elif kind == "chat":
        rows = rate_chats(args, keys, opened, answers, records)
    elif args.solutions == "canonical":
        texts = [record.get("canonical_solution") or record.get("code") or question.answer for record, question in zip(records, questions)]
        if not all(texts):
            raise ValueError(f"{name}: record {texts.index('') + 1} has no solution to judge")
        rows = judge_texts(args, questions, records, texts)
    else:
        tokenizer, jobs = opened[1], [(i, n) for i in range(len(questions)) for n in range(args.samples)]
        ids = [tokenizer.bos + tokenizer.encode(prompt.rstrip()) or [tokenizer.eot] for prompt in prompts]
        texts = answers.collect(keys([(ids[i], n) for i, n in jobs]), write_texts(opened, args, [ids[i] for i, _ in jobs], questions[0].until))
        rows = judge_texts(args, questions, records, texts) if not answers.rank else []
    if not rows:  # the first process has them
        return summary, []
    rows = [{"task_id": records[i // args.samples]["task_id"], "prompt": prompts[i // args.samples], **row} for i, row in enumerate(rows)]
    groups, each = {"": [*range(len(questions))]}, [rows[i:i + args.samples] for i in range(0, len(rows), args.samples)]
    for i, question in enumerate(questions):
        groups.setdefault(question.group, []).append(i) if question.group else None

    def scored(members):
        more = {metric: [statistics.fmean(row["scores"][metric] for row in each[i]) for i in members] for metric in rows[0]["scores"]}
        return score([sum(row["passed"] for row in each[i]) for i in members], args.samples, {"chat": "rating"}.get(kind, "accuracy" if questions[0].options else None), more)
    levels = {group: scored(members) for group, members in sorted(groups.items(), key=lambda item: (len(item[0]), item[0]))}  # 2 before 10
    return {**summary, **levels.pop(""), "levels": levels}, rows


def print_summary(args, summary: dict, rows: list[dict]) -> None:
    for solved in (True, False):
        for row in [row for row in rows[::args.samples] if row.get("passed") == solved and row.get("completion") is not None][:args.show]:
            print(f"\n--- {row['task_id']}: {'solved' if solved else 'failed: ' + row['reason']}\n{row['prompt']}{row['completion']}")
    if "bits per byte" in summary:
        print(f"{summary['problems']:,} documents, {summary['bytes']:,} bytes, {summary['tokens']:,} tokens: {summary['bits per byte']:.4f} ± {summary['se']:.4f} bits "
              "a byte; perplexity " + ", ".join(f"{summary[f'{unit} perplexity']:.4g} a {unit}" for unit in ("token", "word", "byte")))
        return
    before = [*summary]
    metrics = [before[n - 1] for n, name in enumerate(before) if name == "se" or name.startswith("se ")]
    width = max(5, *map(len, summary["levels"]), 5)
    form = ".2f" if "rating" in summary else ".1%"
    print(f"\n{'level':>{width}} {'problems':>9}" + "".join(f"{f'{metric} ± se':>19}" for metric in metrics))
    for level, result in [*summary["levels"].items(), ("all", summary)]:
        print(f"{level:>{width}} {result['problems']:>9,}" + "".join(
            f"{result[metric]:>11{form}} ± {result[f'se {metric}' if n else 'se']:5{form}}" for n, metric in enumerate(metrics)))
    if unfit := sum(row.get("completion", "") is None for row in rows[::args.samples]):
        print(f"{unfit} of the problems count as failed because the prompt does not fit the context of {args.run}")
    if "rating" not in summary:
        print(f"{summary['passed']:,} of {summary['total']:,} passed")


def evaluate(args) -> None:
    opened, answers = None if args.solutions == "canonical" else open_model(args), Answers(args.out)
    summaries, written = [], []
    for name in args.eval:
        summary, rows = evaluate_file(args, name, opened, answers)
        if not answers.rank:
            print(f"\n{name}" if len(args.eval) > 1 else "", end="\n" if len(args.eval) > 1 else "")
            print_summary(args, summary, rows)
        summaries.append(summary)
        written += [{"file": name, **row} for row in rows] if len(args.eval) > 1 else rows
    if not answers.rank and args.out:
        data.write_jsonl(args.out, written)
        for path in answers.parts():
            os.remove(path)
    if not answers.rank and args.json:
        content = summaries if len(summaries) > 1 else summaries[0]
        models.write_atomically(args.json, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))
    if answers.world > 1:
        torch.distributed.destroy_process_group()


@data.command("interrupted; with --eval and --out the same command goes on from here")
def main() -> None:
    args = options()
    try:
        if args.bench:
            models.decode_bench(args.bench, None if args.device == "auto" else args.device)
        elif args.quantize and args.out and not args.eval:
            model, tokenizer, _ = open_model(args)
            models.save(model, tokenizer, args.out)
            print(f"{args.out}: {args.run} in {args.quantize}")
        else:
            (evaluate if args.eval else serve if args.serve else chat if args.chat else complete)(args)
    except torch.OutOfMemoryError as error:
        data.fail(f"out of memory ({str(error).splitlines()[0]}); lower --batch-size, now {args.batch_size}, or --max-tokens")


if __name__ == "__main__":
    main()

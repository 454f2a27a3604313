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
import socket
import socketserver
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


def layers(text):
    """MAX:MIN or MAX:MIN:TOKENS as numbers."""
    most, least, *over = map(int, text.split(":"))
    return (most, least, *over)


def options(arguments=None):
    parser = data.Parser(prog="sample.py", description=__doc__)
    option, count, some = parser.option, data.number(int, 0), data.number(int, 1)
    option("--run", "runs/phi", "run directory, Hugging Face directory of a phi, Llama or Gemma, or hub name such as microsoft/phi-1_5")
    option("--device", "auto", "cpu, cuda, cuda:1, mps, or auto for the best there is")
    option("--dtype", "auto", "of the weights; auto is bf16 on CUDA, else fp32", choices=["auto", *DTYPES])
    option("--seed", 0, "of the sampling", type=SETTINGS["seed"])
    option("--batch-size", 128, "texts that --eval and --serve write at once", type=some)
    option("--prompt", "-", "text to complete, or - for standard input")
    option("--max-tokens", 256, "new tokens at most; of requests, where they do not say", type=SETTINGS["max-tokens"])
    option("--temperature", 0.0, "0 takes the likeliest token, 1 samples plainly", type=SETTINGS["temperature"])
    option("--top-k", 0, "sample among this many likeliest tokens, 0 for all", type=SETTINGS["top-k"])
    option("--top-p", 1.0, "sample among the fewest tokens holding this probability", type=SETTINGS["top-p"])
    option("--quantize", None, "hold the weights in so many bits; with --out DIR write them there as a run like any other", choices=["int8", "int4"])
    option("--skip", None, "SkipDecode: the layers run fall from MAX at the first new token to MIN at the last", type=layers, metavar="MAX:MIN")
    option("--chat", False, "talk to the model in the terminal", action="store_true")
    option("--serve", False, "OpenAI's interface at /v1 and a page at /; asks for the key MINPHI_API_KEY if that is set", action="store_true")
    option("--host", "127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in")
    option("--port", 8000, "port to listen at, 0 for any free one", type=data.number(int, 0, 65535))
    option("--queue", 256, "texts that may wait for a place; more are refused", type=count)
    option("--eval", None, "HumanEval, MBPP, exercises, GSM8K, MATH, HellaSwag, ARC, GPQA, MMLU, questions for a judge, in their published files, or "
           "any text (bits per byte); also URLs, of which #sha256=... is checked", metavar="FILE", nargs="+")
    option("--solutions", "model", "whose solutions to judge", choices=["model", "canonical"])
    option("--shots", None, "solved examples before a question (default: MMLU and GSM8K 5, MATH 4, MBPP 3, else 0)", type=count)
    option("--shots-file", None, "the benchmark's training part to take examples from (default: the file's other questions)", metavar="FILE")
    option("--judge", None, "who rates the answers to MT-bench's questions; the key as for synth.py", type=synth.Teacher, metavar="URL#MODEL")
    option("--samples", 1, "completions a problem, for pass@k; above 1 needs a --temperature", type=some)
    option("--limit", None, "take only this many problems from a file's start", type=some)
    option("--timeout", 5.0, "seconds a problem's tests may take", type=data.number(float, 0.1))
    option("--show", 2, "solved and failed examples to print, each", type=count)
    option("--out", None, "write every question, answer and verdict here; a cut evaluation then goes on where it stopped", metavar="FILE.jsonl")
    option("--json", None, "write the summary here", metavar="FILE")
    args = parser.parse_args(arguments)
    if args.samples > 1 and (args.temperature == 0 or args.solutions == "canonical"):
        parser.error("--samples above 1 needs the model's solutions and a --temperature above 0, such as 0.8")
    if not args.eval and (args.solutions == "canonical" or args.out and not args.quantize or args.json or args.limit):
        parser.error("--solutions, --limit, --out and --json belong to --eval FILE")
    for names in (("chat", "serve", "eval"), ("skip", "serve")):  # a server decodes many texts together
        if sum(bool(getattr(args, name)) for name in names) > 1:
            parser.error(f"--{', --'.join(names)} exclude one another; choose one")
    to_write = args.out and args.quantize and not args.eval
    if to_write and os.path.realpath(args.out) == os.path.realpath(args.run):
        parser.error(f"--out {args.out} is --run, whose full weights would be lost; choose another --out")
    return args


def open_model(args):
    """-> the model as the options want it, its tokenizer, and what `Model.generate` needs for --skip."""
    device = models.default_device() if args.device == "auto" else args.device
    device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}); try --device cpu") from None
    dtype = DTYPES.get(args.dtype) or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    model, tokenizer = models.load(args.run, device, dtype)
    if tokenizer is None:
        raise ValueError(f"--run {args.run} has no tokenizer.json; copy the one its model was trained with into it")
    if args.quantize:
        models.quantize(model, int(args.quantize[3:]))
    return model, tokenizer, dict(skip=args.skip)


def write(args, opened, prompts, stream, seed):
    """The new tokens of each prompt, by the command line's settings."""
    model, tokenizer, faster = opened
    settings = args.max_tokens, args.temperature, args.top_k, args.top_p, tokenizer.stops, seed
    return model.generate(prompts, *settings, stream, **faster)


def prompt_ids(tokenizer, text):
    """A prompt's tokens. Trailing whitespace is dropped: a line break and the indentation after it are one token, so a prompt that ends
    between them would have to be continued by a token never seen there."""
    return tokenizer.bos + tokenizer.encode(text.rstrip()) or [tokenizer.eot]


def write_aloud(args, opened, ids) -> str:
    """Print the answer as it comes, and tokens a second on stderr -> the answer, which Ctrl-C ends in a chat."""
    (model, tokenizer, _), decoder, parts, start = opened, codecs.getincrementaldecoder("utf-8")("replace"), [], time.perf_counter()

    def tell(_, token):
        parts.append(decoder.decode(b"" if token in tokenizer.stops else tokenizer.decode_bytes([token])))  # a character may be spread over tokens
        print(parts[-1], end="", flush=True)
    try:
        write(args, opened, [ids], tell, args.seed)
    except KeyboardInterrupt:
        if not args.chat:
            raise
    seconds = time.perf_counter() - start
    print(decoder.decode(b"", final=True), flush=True)
    print(f"{len(parts)} tokens, {len(parts) / seconds:,.0f} a second", file=sys.stderr)
    return "".join(parts)


def complete(args) -> None:
    """Stream one completion to standard output."""
    opened = open_model(args)
    if args.prompt == "-" and sys.stdin.isatty():
        print("Type a prompt and end it with Ctrl-D.", file=sys.stderr)
    write_aloud(args, opened, prompt_ids(opened[1], sys.stdin.read() if args.prompt == "-" else args.prompt))


# ---------------------------------------------------------------- chat

CHAT_HELP = """/retry       answer the last message anew       /set NAME X     change temperature, top-p, top-k, max-tokens or seed
/new         forget the conversation            /save FILE      add it to FILE as a line of JSON, as align.py sft reads it
/system ...  begin anew, with these orders      /quit, Ctrl-D   leave
A line that ends in \\ goes on in the next. Ctrl-C stops an answer."""


def fitting(tokenizer, messages, room):
    """The chat as token ids, at most `room` of them: the oldest turns after the system message are left out if need be."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    for first in range(len(system), len(messages), 2):
        if len(ids := tokenizer.render([*system, *messages[first:]])) <= room:
            return ids
    raise ValueError(f"the message takes {len(ids):,} tokens where {room:,} fit; make it shorter, or /set max-tokens lower")


def save_chat(path, messages) -> None:
    """Add a chat to a file of chats, in the place of those that it goes on from."""
    chats = data.read_jsonl(path) if os.path.exists(path) else []
    earlier = [{"messages": messages[:n]} for n in range(1, len(messages) + 1)]
    others = [chat for chat in chats if chat not in earlier]
    data.write_jsonl(path, [*others, {"messages": messages}])


def read_message():
    """A message from the terminal or standard input; Ctrl-C asks for help."""
    try:
        text = input("\n> " * sys.stdin.isatty())
        while text.endswith("\\"):
            text = text[:-1] + "\n" + input("  " * sys.stdin.isatty())
        return text
    except (EOFError, KeyboardInterrupt) as end:
        return "/quit" if isinstance(end, EOFError) else "/help"


def chat(args) -> None:
    """A conversation in the terminal, or a message a line from standard input. Ctrl-C ends an answer and keeps what there is of it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, gives input() its history and editing
    model, tokenizer, _ = opened = open_model(args)
    orders, turns, room = [], [], model.config.max_seq_len
    print("Write a message, or /help.", file=sys.stderr)
    while (text := read_message()) != "/quit":
        command, _, rest = text.strip().partition(" ")
        try:
            if command in ("/new", "/system"):
                orders, turns = orders if command == "/new" else [{"role": "system", "content": rest}] * bool(rest), []
            elif command == "/save":
                save_chat(rest or "chat.jsonl", orders + turns)
            elif command == "/set":
                name, value = rest.split()
                setattr(args, name.replace("-", "_"), SETTINGS[name](value))
            elif not command or command[0] == "/" and not (command == "/retry" and turns):
                print(CHAT_HELP, file=sys.stderr)
            else:
                args.seed += command == "/retry"
                asked = turns[:-1] if command == "/retry" else [*turns, {"role": "user", "content": text}]
                answer = write_aloud(args, opened, fitting(tokenizer, orders + asked, room - min(args.max_tokens, room // 2)))
                turns = [*asked, {"role": "assistant", "content": answer.strip()}]
        except (KeyError, ValueError, OSError, argparse.ArgumentTypeError) as error:
            print(f"{error}; see /help", file=sys.stderr)


# ---------------------------------------------------------------- decoding for many

class Refusal(Exception):
    """What a client is told instead of an answer: an HTTP status, a message, and OpenAI's names of field and kind."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.field, self.code = status, field, code

    def told(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


@dataclass(eq=False)
class Request:
    """A text to go on with. `events` receives (new text, its tokens' log-probabilities, why it has ended or None), or a Refusal."""
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
    left: bool = False            # the client has gone
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

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
            self.events.put((self.text, self.scores, finish))
            self.text, self.scores = "", []
        return finish is not None


class Engine(threading.Thread):
    """Decodes the texts of many requests together. A request joins the running batch between two tokens and leaves it with its last,
    so that nobody waits for another's end (Orca, OSDI 2022, section 3.1). Each draws from random numbers of its own.

    The batch is the first len(active) rows of one cache. A text's newest token is not in the cache yet.
    """

    def __init__(self, model, tokenizer, rows: int, queue_size: int, cache_tokens: int):
        super().__init__(daemon=True)
        self.model, self.tokenizer, self.rows, self.queue_size, self.cache_tokens = model, tokenizer, rows, queue_size, cache_tokens
        self.waiting, self.active, self.closed = collections.deque(), [], False
        self.cache, self.decode, self.changed = None, None, threading.Condition()

    def submit(self, request: Request) -> None:
        with self.changed:
            if self.closed:
                raise Refusal(503, "the server is stopping")
            if len(self.waiting) >= self.queue_size + max(0, self.rows - len(self.active)):
                raise Refusal(429, f"{len(self.waiting)} texts wait already and at most {self.queue_size} may; try later", code="rate_limit_exceeded")
            self.waiting.append(request)
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
                    self.cache = self.decode = None
                    self.changed.wait()
                new = self.admit()
            try:
                with torch.inference_mode():
                    self.step(new)
            except Exception as error:  # a lack of memory, most likely: these texts are lost, but not the server
                text = f"decoding failed ({type(error).__name__}: {str(error)[:200]})"
                print(f"sample.py: {text}", file=sys.stderr)
                for request in {*self.active, *new}:
                    request.events.put(Refusal(500, text))
                self.active, self.cache, self.decode = [], None, None

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
            self.decode = None
            self.advance(list(range(joined, len(self.active))), self.prefill(joined, len(self.active)))
        if not self.active:
            return
        self.make_room(len(self.active))
        if self.decode is None:
            self.decode = models.DecodeStep(self.model, self.cache.rows(slice(0, len(self.active))))
        tokens = torch.tensor([request.ids[-1] for request in self.active], device=self.model.device)
        logits = self.decode(tokens)
        for slot, request in enumerate(self.active):
            if self.model.outgrows(len(request.ids)):
                logits[slot] = self.prefill(slot, slot + 1)[0]
        self.advance(list(range(len(self.active))), logits)

    def make_room(self, joined: int) -> None:
        """A cache with a row for each text, long enough for all; those after the first `joined` are not in it yet."""
        old, rows = self.cache, len(self.active)
        longest = max(len(request.ids) for request in self.active)
        if old and rows <= len(old.lengths) and longest <= old.capacity:
            return
        capacity = min(max(256, 2 * longest), max(request.prompt_tokens + request.limit for request in self.active))
        capacity = max(capacity, longest)
        if not old or rows > len(old.lengths):
            rows = max(rows, min(2 * rows, self.rows, self.cache_tokens // capacity))
        else:
            rows = len(old.lengths)
        self.cache, self.decode = models.KVCache(self.model.config, rows, capacity, self.model.device, self.model.dtype), None
        if joined:
            self.cache.keys[:, :joined, :old.capacity] = old.keys[:, :joined, :capacity]
            self.cache.values[:, :joined, :old.capacity] = old.values[:, :joined, :capacity]
            self.cache.lengths[:joined] = old.lengths[:joined]

    def prefill(self, begin: int, end: int):
        """The whole texts of these slots into the cache -> their logits."""
        texts = [request.ids for request in self.active[begin:end]]
        return self.model.logits(self.model.prefill(texts, self.cache.rows(slice(begin, end))))

    def leave(self, slot: int) -> None:
        """The last row takes the place of this one."""
        moved = self.active.pop()
        last, self.decode = len(self.active), None
        if slot < last:
            self.cache.keys[:, slot] = self.cache.keys[:, last]
            self.cache.values[:, slot] = self.cache.values[:, last]
            self.cache.lengths[slot] = self.cache.lengths[last]
            self.active[slot] = moved

    def advance(self, slots: list[int], logits) -> None:
        """Choose the next token of these slots; those whose text has ended leave."""
        requests = [self.active[slot] for slot in slots]
        ended = []
        for slot, request, row, token in zip(slots, requests, logits, choose(logits, requests).tolist()):
            score = None
            if request.logprobs is not None:
                every = row.log_softmax(-1)
                best = every.topk(min(len(every), request.logprobs))
                score = token, every[token].item(), list(zip(best.indices.tolist(), best.values.tolist()))
            ended += [slot] * request.take(token, self.tokenizer, score)
        for slot in reversed(ended):
            self.leave(slot)


def choose(logits, requests: list[Request]):
    """(n, V) logits -> (n,) tokens: as model.sample, but each row by its own request's settings and random numbers."""
    chosen, alike = logits.argmax(-1), collections.defaultdict(list)
    for row, request in enumerate(requests):
        if request.temperature > 0:
            alike[request.temperature, request.top_k, request.top_p].append(row)
    for settings, rows in alike.items():
        draws = torch.tensor([requests[row].random.random() for row in rows], device=logits.device)
        chosen[rows] = models.sample(logits[rows], *settings, draws)
    return chosen


# ---------------------------------------------------------------- server

MAX_BODY, MAX_SECONDS, MOST = 4_000_000, 600, 1 << 62  # of a request, waiting included; of any number in it
FIELDS = {"temperature": (float, 0, 2, 1.0), "top_p": (float, 1e-9, 1, 1.0), "top_k": (int, 0, MOST, 0), "seed": (int, -MOST, MOST, None),
          "max_tokens": (int, 1, MOST, None), "max_completion_tokens": (int, 1, MOST, None), "stream": (bool, 0, 1, False),
          "top_logprobs": (int, 0, 20, 0), "logprobs": (int, 0, 20, None), "n": (int, 1, 1, 1)}  # of a request: kind, least, most, default
UNSUPPORTED = ("tools", "functions", "logit_bias", "presence_penalty", "frequency_penalty", "suffix", "echo", "response_format")


class Server(socketserver.ThreadingTCPServer):
    """One thread a connection; `engine` decodes for all of them."""
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 512

    def __init__(self, args, model, tokenizer):
        self.args, self.tokenizer, self.context, self.answering = args, tokenizer, model.config.max_seq_len, set()
        self.name, self.key = os.path.basename(os.path.normpath(args.run)), os.environ.get("MINPHI_API_KEY", "")
        self.local, weight = args.host in ("127.0.0.1", "localhost"), model.model.norm.weight
        room = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        tokens = int(0.4 * room / (model.config.kv_cache_bytes() * model.dtype.itemsize / 2))  # 0.4: moving to a larger cache holds both
        self.engine = Engine(model, tokenizer, args.batch_size, args.queue, tokens)
        super().__init__((args.host, args.port), Handler)

    def verify_request(self, request, address):
        return threading.active_count() < self.args.batch_size + self.args.queue + 256  # further connections are closed at once

    def handle_error(self, request, address):
        if not isinstance(error := sys.exc_info()[1], OSError):  # those are clients that have gone
            print(f"sample.py: {type(error).__name__}: {error}", file=sys.stderr)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request a connection."""
    protocol_version, default_request_version, server_version, sys_version = "HTTP/1.1", "HTTP/1.0", "minphi", ""
    timeout, disable_nagle_algorithm, wbufsize, unread = 30, True, -1, 0  # seconds a client may keep us waiting; buffered writes; bytes of the body

    def log_message(self, *_):
        pass

    def send(self, content, status=200, kind="application/json") -> None:
        """What is neither bytes nor None as JSON; of None the beginning alone."""
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
                   "Connection": "close", **({"Content-Length": len(body)} if body else {}), **({"Retry-After": 2} if status in (429, 503) else {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def refuse(self, error: Refusal) -> None:
        self.send(error.told(), error.status)
        with contextlib.suppress(OSError):  # a client that is still sending hears us only when it may finish
            self.connection.settimeout(1)
            while 0 < self.unread < 1 << 26 and (chunk := self.rfile.read1(min(self.unread, 1 << 16))):
                self.unread -= len(chunk)

    def do_GET(self):
        """Answer any request, or refuse."""
        server, path = self.server, self.path.split("?")[0]
        about = {"id": server.name, "object": "model", "created": 0, "owned_by": "minphi"}
        doors = {"GET /": lambda: self.send(PAGE.replace("MODEL", html.escape(server.name), 1).encode(), kind="text/html; charset=utf-8"),
                 "GET /v1/models": lambda: self.send({"object": "list", "data": [about]}),
                 "GET /training": lambda: self.send(training_log(server.args.run)),
                 "POST /v1/chat/completions": lambda: self.answer(True), "POST /v1/completions": lambda: self.answer(False)}
        length, host, origin, key = (self.headers.get(name, "") for name in ("Content-Length", "Host", "Origin", "Authorization"))
        self.unread, door = int(length) if length.isdigit() else 0, f"{self.command} {path[:100]}"
        try:
            if origin and origin.split("://")[-1] != host or server.local and re.sub(r":\d+$", "", host) not in ("127.0.0.1", "localhost", ""):
                raise Refusal(403, "other web sites may not use this server")  # nor reach it by a name of theirs that leads here
            if server.key and path != "/" and not hmac.compare_digest(key.removeprefix("Bearer ").encode(), server.key.encode()):
                raise Refusal(401, "no API key, or a wrong one: send MINPHI_API_KEY's as Authorization: Bearer ...", code="invalid_api_key")
            if door not in doors:
                raise Refusal(404, f"nothing answers {door} here")
            doors[door]()
        except Refusal as error:
            self.refuse(error)
        except OSError:
            pass  # the client has gone, or does not read

    do_POST = do_GET

    def body(self) -> dict:
        if not 0 < self.unread <= MAX_BODY:
            status = 413 if self.unread else 411
            raise Refusal(status, f"the request needs a Content-Length of at most {MAX_BODY:,}")
        text, self.unread = self.rfile.read(self.unread), 0
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(body := json.loads(text), dict):
                return body
        raise Refusal(400, "the request must be a JSON object")

    def wanted(self, body: dict, chat: bool) -> Request:
        server, given = self.server, {}
        if body.get("model") not in (None, server.name, server.args.run):
            raise Refusal(404, f"the model {str(body['model'])[:100]!r} is not here; {server.name!r} is", "model", "model_not_found")
        for name, (kind, low, high, default) in {**FIELDS, **({"logprobs": (bool, 0, 1, False)} if chat else {})}.items():
            given[name] = value = default if body.get(name) is None else body[name]
            if value is not None and not (type(value) in ((int, float) if kind is float else (kind,)) and low <= value <= high):
                raise Refusal(400, f"{name} must be {'true or false' if kind is bool else f'a number from {low} to {high}'}", name)
        if unsupported := [name for name in UNSUPPORTED if body.get(name) and body[name] != {"type": "text"}]:
            raise Refusal(400, f"{unsupported[0]} is not supported", unsupported[0])
        stop = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(text, str) and 0 < len(text) <= 1000 for text in stop):
            raise Refusal(400, "stop must be a text or up to 16 of them", "stop")
        ids, skip = self.chat_ids(body.get("messages")) if chat else self.prompt_ids(body.get("prompt"))
        if len(ids) >= server.context:
            raise Refusal(400, f"the prompt has {len(ids):,} tokens; with an answer at most {server.context:,} fit", code="context_length_exceeded")
        limit = given["max_completion_tokens"] or given["max_tokens"] or server.args.max_tokens
        told = given["logprobs"] if not chat else given["top_logprobs"] if given["logprobs"] else None
        return Request(ids, min(limit, server.context - len(ids)), given["temperature"], given["top_p"], given["top_k"], given["seed"], tuple(stop),
                       told, given["stream"], skip)

    def chat_ids(self, messages):
        """-> a conversation's tokens, and the space that some formats make an answer begin with."""
        try:
            if not messages:
                raise ValueError("none is there")
            parts = [m["content"] if isinstance(m["content"], list) else [{"text": m["content"]}] for m in messages]
            return self.server.tokenizer.render([{**m, "content": "".join(part["text"] for part in of)} for m, of in zip(messages, parts)]), " "
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(400, f"messages must be a list of objects with role and content: {error}", "messages") from None

    def prompt_ids(self, prompt):
        """A text or tokens -> its tokens, and the whitespace at its end, which is left to the model and then not sent a second time."""
        tokenizer = self.server.tokenizer
        if isinstance(prompt, str):
            try:
                return prompt_ids(tokenizer, prompt), prompt[len(prompt.rstrip()):]
            except ValueError as error:  # a character that the tokenizer lacks
                raise Refusal(400, str(error), "prompt") from None
        if isinstance(prompt, list) and prompt and all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in prompt):
            return prompt, ""
        raise Refusal(400, "prompt must be a text, or a list of the model's tokens; of several send each by itself", "prompt")

    def events(self, request: Request):
        """(new text, its tokens' scores, why it has ended or None) as they come. OSError when the client has gone."""
        deadline = time.monotonic() + MAX_SECONDS
        while True:
            with contextlib.suppress(queue.Empty):
                news = [request.events.get(timeout=1)]
                while not request.events.empty():
                    news.append(request.events.get())
                if isinstance(news[-1], Refusal):
                    raise news[-1]
                yield "".join(text for text, _, _ in news), [score for _, scores, _ in news for score in scores], news[-1][2]
                if news[-1][2]:
                    return
            self.connection.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                if not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionAbortedError
            self.connection.settimeout(self.timeout)
            if time.monotonic() > deadline:
                raise Refusal(503, f"the answer took longer than {MAX_SECONDS} seconds", code="timeout")
            time.sleep(0.001 * len(self.server.engine.active))  # so all clients together are written to a thousand times a second at most

    def answer(self, chat: bool) -> None:
        """Decode and send what a request asks for: at once, or as server-sent events, in which errors after the first are events too."""
        body = self.body()
        request, begun = self.wanted(body, chat), False
        told = {"id": ("chatcmpl-" if chat else "cmpl-") + os.urandom(12).hex(), "object": "chat.completion" if chat else "text_completion",
                "created": int(time.time()), "model": self.server.name}

        def tell(value):
            self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
            self.wfile.flush()
        self.server.answering.add(request)
        try:
            self.server.engine.submit(request)
            for text, scores, finish in self.events(request):
                content = {"role": "assistant", "content": text} if not begun else {"content": text}
                content = {"delta" if request.stream else "message": content} if chat else {"text": text}
                choices = [{"index": 0, **content, "logprobs": self.logprobs(scores, chat), "finish_reason": finish}]
                prompt, new = request.prompt_tokens, len(request.ids) - request.prompt_tokens
                usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
                if not request.stream:
                    return self.send({**told, "choices": choices, "usage": usage})
                if not begun:
                    self.send(None, kind="text/event-stream")
                    told["object"], begun = told["object"] + ".chunk" * chat, True
                tell({**told, "choices": choices})
            if isinstance(body.get("stream_options"), dict) and body["stream_options"].get("include_usage"):
                tell({**told, "choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except Refusal as error:
            if not begun:
                raise
            tell(error.told())
        finally:
            request.left = True
            self.server.answering.discard(request)

    def logprobs(self, scores, chat: bool) -> dict | None:
        """In OpenAI's words; for completions in the older ones as well."""
        def told(token, score):
            raw = self.server.tokenizer.decode_bytes([token])
            return {"token": raw.decode("utf-8", errors="replace"), "logprob": max(score, -9999.0), "bytes": list(raw)}
        entries = [{**told(token, score), "top_logprobs": [told(*other) for other in others]} for token, score, others in scores]
        older = {} if chat else {
            "tokens": [entry["token"] for entry in entries], "token_logprobs": [entry["logprob"] for entry in entries], "text_offset": [],
            "top_logprobs": [{other["token"]: other["logprob"] for other in entry["top_logprobs"]} for entry in entries]}
        return {"content": entries, **older} if entries else None


def training_log(run: str) -> dict | None:
    """Of this run and those beside it the one whose log was written last: its last record, and its curves as a picture."""
    import train
    with contextlib.suppress(OSError, ValueError, LookupError):  # no log; its last line is half written; nothing learned yet
        path = max(glob.glob(f"{glob.escape(os.path.dirname(os.path.abspath(run)))}/*/log.jsonl"), key=os.path.getmtime)
        records, name = [record for record in data.read_jsonl(path) if "step" in record], os.path.basename(os.path.dirname(path))
        last = [record for record in records if "loss" in record][-1]
        thin = [record for n, record in enumerate(records) if "val" in record or n % (1 + len(records) // 400) == 0]
        svg = train.loss_svg(thin, html.escape(name))
        return {"name": name, "seconds_ago": time.time() - os.path.getmtime(path), "last": last, "svg": svg}


def serve(args) -> None:
    model, tokenizer, _ = open_model(args)
    try:
        server = Server(args, model, tokenizer)
    except OSError as error:
        raise OSError(f"cannot listen at {args.host} port {args.port} ({error.strerror}); choose another --port") from None
    server.engine.start()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://{args.host}:{server.server_address[1]}"
    print(f"{server.name}: a page at {address}, OpenAI's interface at {address}/v1; {args.batch_size} texts at once, {args.queue} may wait, "
          f"{server.engine.cache_tokens:,} tokens of cache at most; Ctrl-C stops", flush=True)
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
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>minphi</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --back: light-dark(#fbfaf7, #131417); --card: light-dark(#fff, #1c1e22); --ink: light-dark(#1d1d1f, #ececef);
  --soft: light-dark(#66666c, #9a9aa3); --line: light-dark(#e3e1da, #2e3137); --accent: light-dark(#3657c9, #8fa6ff) }
* { box-sizing: border-box; margin: 0 }
body { height: 100dvh; display: flex; flex-direction: column; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
header, main > *, form { width: 100%; max-width: 46rem; margin: 0 auto; padding: .5rem 1rem }
header, form { display: flex; gap: .5rem; align-items: center }
h1 { font-size: 1rem; margin-right: auto }
main { flex: 1; overflow-y: auto }
button, input, textarea, .user, span::after { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .35rem .7rem }
button, input, textarea { font: inherit; color: inherit }
details, footer, #hint { color: var(--soft); font-size: .85rem }
label { display: inline-block; width: 50%; padding: .3rem }
label input:not([type=checkbox]) { width: 100%; color: var(--ink) }
article { margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
.user { margin-left: auto; width: fit-content; max-width: 85% }
.plain { font: .9rem/1.5 ui-monospace, monospace }
main:has([name=shade]:checked) article span { background: color-mix(in srgb, var(--accent) calc(40% * (1 - var(--p))), transparent) }
article span:is(:hover, :focus) { outline: 2px solid var(--accent); border-radius: .2rem }
article span:is(:hover, :focus)::after { content: attr(data-others); position: fixed; right: max(1rem, 50vw - 22rem); bottom: 5rem; white-space: pre;
  font: .8rem/1.5 ui-monospace, monospace; pointer-events: none }
#hint { padding-top: 15vh; text-align: center }
#log:not(:empty) + #hint { display: none }
textarea { flex: 1; resize: none; max-height: 40vh; min-width: 0; field-sizing: content }
form button { background: var(--accent); color: var(--back) }
img { display: block; width: 100% }
@media (prefers-color-scheme: dark) { img { filter: invert(.9) hue-rotate(180deg) } }
</style>
<header><h1>MODEL</h1><button id="new">New</button></header>
<main>
  <details><summary>Settings</summary>
    <label>Temperature <input name="temperature" type="number" min="0" max="2" step="0.1" value="0.7"></label><label>Top p
    <input name="top_p" type="number" min="0.01" max="1" step="0.01" value="1"></label><label>Tokens at most
    <input name="max_tokens" type="number" min="1" value="256"></label><label>Seed
    <input name="seed" type="number" min="0" placeholder="any"></label><label>System message
    <input name="system"></label><label>API key
    <input name="key" type="password" autocomplete="off" placeholder="where the server asks for one"></label>
    <label><input name="shade" type="checkbox" checked> Shade unlikely tokens</label><label>
    <input name="plain" type="checkbox"> Complete, not chat</label>
  </details>
  <details id="training"><summary>Training</summary><img alt=""><p></p></details>
  <section id="log" aria-live="polite"></section>
  <p id="hint">Enter sends, Shift+Enter breaks the line, Esc stops.<br>
    Point at a word, or focus an answer and use the arrow keys, to see what else might have been said.</p>
</main>
<form><textarea rows="1" aria-label="Message" placeholder="Message" autofocus></textarea><button>Send</button></form>
<script>
"use strict"
const $ = selector => document.querySelector(selector), setting = name => $(`[name=${name}]`).value
const log = $("#log"), box = $("textarea"), send = $("form button"), main = $("main")
const headers = () => ({"Content-Type": "application/json", ...(setting("key") && {Authorization: "Bearer " + setting("key")})})
let turns = [], running = null

function make(tag, parent, text, name = "") {
  const element = parent.appendChild(document.createElement(tag))
  element.textContent = text
  element.className = name
  element.tabIndex = tag == "span" ? -1 : 0
  return element
}

function add(place, token, decoder) {  // a span, whose shade and alternatives tell how sure the model was
  const span = make("span", place, decoder.decode(new Uint8Array(token.bytes), {stream: true})), share = token => 100 * Math.exp(token.logprob)
  span.style.setProperty("--p", share(token) / 100)
  span.dataset.others = token.top_logprobs.map(other => `${share(other).toFixed(1).padStart(5)} %  ${JSON.stringify(other.token)}`).join("\n")
}

async function answer(prompt, chat) {
  const body = {stream: true, ...(chat ? {logprobs: true, top_logprobs: 5} : {logprobs: 5, prompt})}
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (setting(name)) body[name] = Number(setting(name))
  if (chat) body.messages = [...(setting("system") ? [{role: "system", content: setting("system")}] : []), ...turns]
  const place = make("article", log, chat ? "" : prompt, chat ? "" : "plain"), foot = make("footer", log, "…"), decoder = new TextDecoder()
  const before = turns.length, path = chat ? "/v1/chat/completions" : "/v1/completions"
  let text = "", count = 0, first = 0, rest = ""
  running = new AbortController()
  send.textContent = "Stop"
  try {
    const reply = await fetch(path, {method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal})
    if (!reply.ok) throw Error((await reply.json()).error.message)
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader()
    for (let part; !(part = await reader.read()).done;) {
      const lines = (rest + part.value).split("\n\n"), follow = main.scrollHeight - main.scrollTop - main.clientHeight < 200
      rest = lines.pop()
      for (const event of lines.filter(line => line != "data: [DONE]").map(line => JSON.parse(line.slice(6)))) {
        if (event.error) throw Error(event.error.message)
        const choice = event.choices[0], tokens = choice.logprobs?.content || []
        text += chat ? choice.delta.content : choice.text
        tokens.forEach(token => add(place, token, decoder))
        count += tokens.length
        first ||= performance.now()
      }
      foot.textContent = `${count} tokens, ${Math.round(1000 * (count - 1) / Math.max(1, performance.now() - first))} a second `
      if (follow) main.scrollTop = main.scrollHeight
    }
  } catch (error) {
    foot.textContent = error.name == "AbortError" ? `${count} tokens, then stopped ` : error.message + " "
  }
  running = null
  send.textContent = "Send"
  if (chat && place.isConnected) turns.push({role: "assistant", content: text})  // it is not when all has been forgotten meanwhile
  make("button", foot, "Retry").onclick = () => {
    if (running) return
    while (log.lastChild != place) log.lastChild.remove()
    place.remove()
    turns.length = Math.min(turns.length, before)
    answer(prompt, chat)
  }
}

async function train() {  // the loss curve of the latest log.jsonl, drawn by the server
  if (!$("#training").open) return
  const run = await fetch("/training", {headers: headers()}).then(reply => reply.json()).catch(() => null), last = run?.last
  if (last) $("img").src = "data:image/svg+xml," + encodeURIComponent(run.svg)
  $("#training p").textContent = !last ? "No log.jsonl of a training run beside this model." :
    `${run.name}: step ${last.step.toLocaleString()}, loss ${last.loss.toFixed(3)}; written ${Math.round(run.seconds_ago)} s ago.`
  setTimeout(train, 3000)
}

$("form").onsubmit = event => {
  event.preventDefault()
  const text = box.value, chat = !$("[name=plain]").checked
  if (running) return running.abort()
  if (!text.trim()) return
  if (chat) { make("article", log, text, "user"); turns.push({role: "user", content: text}) }
  box.value = ""
  answer(text, chat)
}
box.onkeydown = event => {
  if (event.key != "Enter" || event.shiftKey || event.isComposing) return
  event.preventDefault()
  $("form").requestSubmit()
}
document.onkeydown = event => { if (event.key == "Escape") running?.abort() }
log.onkeydown = ({key, target}) => {
  const step = {ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling"}[key]
  if (step) target[target.tagName == "ARTICLE" ? "firstElementChild" : step]?.focus()
}
$("#training").ontoggle = train
$("#new").onclick = () => { running?.abort(); turns = []; log.textContent = "" }
</script>
</html>
"""
HASH = [base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*)</{tag}>", PAGE, re.S)[1].encode()).digest()).decode() for tag in ("script", "style")]
POLICY = (f"default-src 'none'; script-src 'sha256-{HASH[0]}'; style-src 'sha256-{HASH[1]}'; connect-src 'self'; img-src data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # only this script and style run, whatever a text contains


# ---------------------------------------------------------------- evaluation: what is asked

LINE_AT_MARGIN = re.compile(r"\n(?=[^\s])")  # where a function's body is over: the next line starts at column 0


def cut(completion: str) -> str:
    """The completion up to the first later line that starts at column 0. Example: cut("\\n    return 1\\n\\nprint(2)") == "\\n    return 1\\n" """
    return LINE_AT_MARGIN.split(completion, maxsplit=1)[0]


@dataclass
class Question:
    """What a record asks, in the words of lm-evaluation-harness, so that numbers compare."""
    prompt: str
    answer: str = ""             # the right one as it stands after the prompt, where this question is an example for another
    options: list | None = None  # texts of which the likeliest is chosen
    right: int = 0               # which of the options
    intro: str = ""              # stands before the examples


def choice(prompt, options, right, intro="") -> Question:
    return Question(prompt, f" {options[right]}", options, right, intro)


def hellaswag(record) -> Question:
    def clean(text):
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    prompt = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return choice(clean(prompt), [clean(ending) for ending in record["endings"]], int(record["label"]))


def arc(record) -> Question:
    """AI2's own file or the hub's."""
    question = record["question"] if isinstance(record["question"], dict) else {"stem": record["question"], **record["choices"]}
    texts, labels = ([option[name] for option in question["choices"]] if "choices" in question else question[name] for name in ("text", "label"))
    return choice(f"Question: {question['stem']}\nAnswer:", texts, labels.index(record["answerKey"]))


def gpqa(record) -> Question:
    answers, order = ["Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))], random.Random(record["Question"]).sample(range(4), 4)
    listed = "\n".join(f"({letter}) {record[answers[n]].strip()}" for letter, n in zip("ABCD", order))
    prompt = f"What is the correct answer to this question:{record['Question']}\nChoices:\n{listed}\nAnswer:"
    return choice(prompt, ["(A)", "(B)", "(C)", "(D)"], order.index(0))


def mmlu(record) -> Question:
    listed = "\n".join([record["question"].strip(), *(f"{letter}. {text}" for letter, text in zip("ABCD", record["choices"]))])
    right, subject = str(record["answer"]), record.get("subject", "").replace("_", " ")
    return choice(f"{listed}\nAnswer:", [*"ABCD"], int(right) if right.isdigit() else "ABCD".index(right),
                  f"The following are multiple choice questions (with answers) about {subject}.\n\n")


def mbpp(record) -> Question:
    task = f"You are an expert Python programmer, and here is your task: {record.get('text') or record['prompt']}"
    return Question("\n".join([f"{task} Your code should pass these tests:\n", *record["test_list"], "[BEGIN]\n"]), f"{record['code']}\n[DONE]")


def gsm8k_grade(record, text) -> dict:
    def number(text, pattern, which):
        found = re.findall(pattern, text)
        return re.sub(r"[$,]|\.$", "", found[which]) if found else None
    strict = r"#### (-?[0-9.,]+)"
    right = number(record["answer"], strict, 0)
    return {"pass@1": number(text, r"-?[$0-9.,]{2,}|-?[0-9]+", -1) == right, "after ####": number(text, strict, 0) == right}


def boxed(text: str) -> str | None:
    """What the last \\boxed{} of a text holds, braces within it balanced; or, without one, what follows "answer is"."""
    begin, depth = max(text.rfind("\\boxed"), text.rfind("\\fbox")), 0
    for i in range(begin, len(text) if begin >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if text[i] == "}" and not depth:
            return text[text.index("{", begin) + 1:i]
    said = re.findall(r"answer is:?\s*\$?(.+?)\$?\.?(?:\s*I hope|\n|$)", text)
    return said[-1] if said else None


MATH_SPELLINGS = [(r"\n|\\!|\\left|\\right|\^\{?\\circ\}?|\\?\$|\\?%|\\text\{ .*", ""), (r"\\\\", r"\\"), (r"[td]frac", "frac"),
                  (r"(^|[ {])\.", r"\g<1>0."), (r"^\s*\w{1,2}\s*=(?=[^=]*$)", ""), (r"\\sqrt\s*([^\s{])", r"\\sqrt{\1}"),
                  (r"\s", ""), (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),
                  (r"\\frac([^{])\{", r"\\frac{\1}{"), (r"^0\.5$", r"\\frac{1}{2}"), (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}")]


def math_grade(record, text) -> dict:
    """Spellings that mean the same are made one, by the rules of MATH (arXiv 2103.03874)."""
    said, right = boxed(text), boxed(record["solution"])
    for pattern, instead in MATH_SPELLINGS if said and right else ():
        said, right = re.sub(pattern, instead, said), re.sub(pattern, instead, right)
    return {"pass@1": said is not None and said == right}


# fields that give a record away; record -> Question; the usual number of examples before a question; what comes after an answer;
# (record, answer) -> {metric: right or not}, None to run the tests; a field with a level or subject that has figures of its own
Benchmark = collections.namedtuple("Benchmark", "fields ask shots until grade group", defaults=(None, 0, "(?!)", None, ""))
BENCHMARKS = {
    "code": Benchmark(["prompt", "entry_point", "test"], lambda r: Question(r["prompt"].rstrip(), r.get("canonical_solution", "")),
                      until=LINE_AT_MARGIN.pattern, group="k"),
    "MBPP": Benchmark(["code", "test_list"], mbpp, 3, r"\[DONE\]"),
    "HellaSwag": Benchmark(["ctx_a", "ctx_b", "endings", "label", "activity_label"], hellaswag),
    "ARC": Benchmark(["question", "answerKey"], arc),
    "GPQA": Benchmark(["Question", "Correct Answer", "Incorrect Answer 1"], gpqa),
    "MMLU": Benchmark(["question", "choices", "answer"], mmlu, 5, group="subject"),
    "GSM8K": Benchmark(["question", "answer"], lambda r: Question(f"Question: {r['question']}\nAnswer:", f" {r['answer']}"), 5,
                       "Question:|</s>|<\\|im_end\\|>", gsm8k_grade),
    "MATH": Benchmark(["problem", "solution"], lambda r: Question(f"Problem:\n{r['problem']}\n\nSolution:", f" {r['solution']}"), 4, "Problem:",
                      math_grade, "level"),
    "chat": Benchmark(["turns"], lambda r: Question(r["turns"][0]), group="category"),
    "text": Benchmark(["text"], lambda r: Question(r["text"]))}


def fetch(url: str, digest: str) -> str:
    """The path of a URL's file in the cache, checked by SHA-256 where a digest is given."""
    path = data.fetch(url)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest:
        print(f"unchecked: to have it checked, write {url}#sha256={found}", file=sys.stderr)
    elif found != digest:
        os.remove(path)
        raise ValueError(f"{url}: its hash is {found}, not {digest}")
    return path


def read_benchmark(name: str, limit: int | None = None) -> tuple[str, list[dict]]:
    """The kind of a benchmark and its records: JSON Lines, JSON, CSV, a directory of JSON files (MATH's), or any text."""
    path = fetch(*name.partition("#sha256=")[::2]) if name.startswith(("http://", "https://")) else name
    if not os.path.exists(path):
        raise FileNotFoundError(f"--eval {path}: no such file; make problems with python synth.py exercises, or fetch HumanEval.jsonl.gz")
    if os.path.isdir(path):
        files = sorted(glob.glob(f"{glob.escape(path)}/**/*.json", recursive=True))
        records = ({**models.read_json(file), "task_id": os.path.relpath(file, path)} for file in files)
    elif path.endswith((".jsonl", ".jsonl.gz")):
        records = data.read_jsonl(path)
    elif path.endswith(".json"):
        records = models.read_json(path)
    elif path.endswith(".csv"):
        with open(path, newline="", encoding="utf-8") as file:
            records = [row for row in csv.reader(file) if row]
        if records and "Question" in records[0]:  # GPQA's file has a header; MMLU's have none, and their subject in their names
            records = [dict(zip(records[0], row)) for row in records[1:]]
        else:
            subject = re.sub(r"(_(test|val|dev))?\.csv$", "", os.path.basename(path))
            records = [dict(question=question, choices=choices, answer=answer, subject=subject) for question, *choices, answer in records]
    else:
        with open(path, encoding="utf-8", errors="replace") as file:
            records = [{"text": file.read()}]
    if not (records := list(itertools.islice(records, limit))):
        raise ValueError(f"{path} holds no problems; make some with python synth.py exercises")
    kind = next((kind for kind, bench in BENCHMARKS.items() if {*bench.fields} <= {*records[0]}), None)
    if kind is None:
        raise ValueError(f"{path}: no benchmark that is known here has the fields {', '.join(records[0])}; known are {', '.join(BENCHMARKS)}")
    for n, record in enumerate(records, 1):
        if lacking := [field for field in BENCHMARKS[kind].fields if record.get(field) is None]:
            raise ValueError(f"{path}: record {n} lacks {', '.join(lacking)}; it was taken for {kind}")
    return kind, [{"task_id": record.get("id", record.get("question_id", f"record {n}")), **record} for n, record in enumerate(records, 1)]


# ---------------------------------------------------------------- evaluation: what is answered

class Answers:
    """The model's answers by a key of model, settings and question: shared among the processes of torchrun, and kept in OUT.part.RANK
    until OUT is written, so that an evaluation that was cut goes on where it stopped."""

    def __init__(self, args):
        self.rank, self.world, self.out, self.known = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), args.out, {}
        self.keys = set()  # of all that was asked
        names = ("run", "dtype", "quantize", "skip", "max_tokens", "temperature", "top_k", "top_p", "seed")
        times = [os.path.getmtime(path) for path in sorted(glob.glob(f"{glob.escape(args.run)}/*.safetensors"))]
        self.stamp = [*times, *(getattr(args, name) for name in names)]
        for path in self.parts():
            with open(path, encoding="utf-8") as file:
                for line in file:
                    with contextlib.suppress(ValueError):  # the last line may have been cut
                        self.known.update([json.loads(line)])
        if self.world > 1:
            torch.distributed.init_process_group("gloo")
            torch.distributed.barrier()  # nobody writes before all have read

    def parts(self) -> list[str]:
        return glob.glob(f"{glob.escape(self.out)}.part.*") if self.out else []

    def collect(self, questions: list, answer) -> list:
        """The answer to each question. answer(indices) yields (index, answer) for those that are not known yet."""
        keys, path = [hashlib.sha256(json.dumps([self.stamp, q]).encode()).hexdigest()[:24] for q in questions], os.devnull
        todo, shares = [i for i, key in enumerate(keys) if key not in self.known], [{}]
        self.keys.update(keys)
        if self.out:
            os.makedirs(os.path.dirname(self.out) or ".", exist_ok=True)
            path = f"{self.out}.part.{self.rank}"
        with open(path, "a", encoding="utf-8") as file:
            for i, value in answer(todo[self.rank::self.world]):
                shares[0][keys[i]] = value
                file.write(f"\n{json.dumps([keys[i], value])}\n")  # on a line of its own, whatever was cut before
                file.flush()
        if self.world > 1:
            new, shares = shares[0], [None] * self.world
            torch.distributed.all_gather_object(shares, new)
        for share in shares:
            self.known.update(share)
        return [self.known[key] for key in keys]


def write_texts(args, opened, asked: list[tuple[list[int], int]], until: str):
    """A function for Answers.collect: the model's continuation of each (prompt, number of the sample) up to `until`.

    Of a prompt that is too long the beginning is left out. A text depends on --seed, its prompt and its number, not
    on what is written beside it."""
    model, tokenizer, _ = opened
    over, room = re.compile(until.encode()), max(model.config.max_seq_len // 2, model.config.max_seq_len - args.max_tokens)

    def answer(todo):
        # texts of one length together waste least; with the longest first, a lack of memory shows at once
        todo = sorted(todo, key=lambda i: -len(asked[i][0]))
        for begin in tqdm(range(0, len(todo), args.batch_size), desc="solving", unit="batch", disable=None):
            batch = todo[begin:begin + args.batch_size]
            texts = [b""] * len(batch)

            def ended(row, token):
                new = b"" if token in tokenizer.stops else tokenizer.decode_bytes([token])
                texts[row] += new
                return bool(over.search(texts[row], max(0, len(texts[row]) - len(new) - 12)))
            seeds = [int.from_bytes(data.digest(json.dumps([args.seed, asked[i]]))[:8], "big") for i in batch]
            write(args, opened, [asked[i][0][-room:] for i in batch], ended, seeds)
            for i, text in zip(batch, texts):
                yield i, re.split(until, text.decode("utf-8", errors="replace"), maxsplit=1)[0]
    return answer


def likelihoods(model, pairs: list[tuple[list[int], list[int]]]):
    """A function for Answers.collect: the log-probability of each pair's second part after its first, in nats, of which the beginning
    is left out where both do not fit the context. Pairs that differ in their last token only, such as the letters of options, share a pass."""
    def answer(todo):
        rows, device = {}, model.device
        for i in todo:
            rows.setdefault(tuple((pairs[i][0] + pairs[i][1])[-model.config.max_seq_len - 1:-1]), []).append(i)
        rows = sorted(rows.items(), key=lambda row: -len(row[0]))
        few = max(1, 4096 // len(rows[0][0])) if rows else 1
        for begin in tqdm(range(0, len(rows), few), desc="reading", unit="batch", disable=None):
            batch = rows[begin:begin + few]
            with torch.inference_mode():
                x = model.hidden(torch.tensor([[*ids, *[0] * (len(batch[0][0]) - len(ids))] for ids, _ in batch], device=device))
                for states, (ids, members) in zip(x, batch):
                    for i in members:
                        after = torch.tensor(pairs[i][1], device=device)
                        parts = zip(states[len(ids) - len(after):len(ids)].split(512), after.split(512))
                        yield i, sum(model.logits(part).log_softmax(-1).gather(1, targets[:, None]).sum().item() for part, targets in parts)
    return answer


# ---------------------------------------------------------------- evaluation: what comes out

def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes (Codex, arXiv 2107.03374, equation 1). Example: pass_at_k(2, 1, 1) == 0.5"""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def ratio(values, weights) -> tuple[float, float]:
    """sum(values) / sum(weights), and its standard error over what the pairs were drawn from."""
    total, mean = sum(weights), sum(values) / sum(weights)
    spread = sum((value - mean * weight) ** 2 for value, weight in zip(values, weights)) * len(values) / max(1, len(values) - 1)
    return mean, math.sqrt(spread) / total


def score(problems: list[list[dict]]) -> dict:
    """Summary of problems, of each the {metric: value} of its samples. The first metric says whether a sample passed and has the
    standard error `se`, over problems; each other METRIC has `se METRIC`."""
    first, *more = problems[0][0]
    samples, passed = len(problems[0]), [sum(sample[first] for sample in problem) for problem in problems]
    values = {metric: [sum(sample[metric] for sample in problem) / samples for problem in problems] for metric in (first, *more)}
    values |= {f"pass@{k}": [pass_at_k(samples, n, k) for n in passed] for k in (10, 100) if k <= samples}
    result = {"problems": len(problems), "passed": sum(passed), "total": len(problems) * samples}
    for metric, each in values.items():
        result[metric], result["se" if metric == first else f"se {metric}"] = ratio(each, [1] * len(each))
    return result


def read_texts(opened, answers: Answers, records) -> tuple[dict, list[dict]]:
    """-> bits per byte, and perplexities; and rows. Each token is predicted once, in disjoint windows, from all that fits before them."""
    model, tokenizer, _ = opened
    pairs, owner, context = [], [], model.config.max_seq_len
    for n, record in enumerate(records):
        ids = (tokenizer.bos or [tokenizer.eot]) + tokenizer.encode(record["text"])
        for begin in range(1, len(ids), context):
            end = min(begin + context, len(ids))
            pairs.append((ids[max(0, end - 1 - context):begin], ids[begin:end]))
            owner.append(n)
    rows = [{"bits": 0.0, "bytes": len(record["text"].encode()), "words": len(re.split(r"\s+", record["text"])), "tokens": 0} for record in records]
    for n, (_, after), value in zip(owner, pairs, answers.collect(pairs, likelihoods(model, pairs))):
        rows[n]["bits"] -= value / math.log(2)
        rows[n]["tokens"] += len(after)
    result = {name: sum(row[name] for row in rows) for name in rows[0]}
    result["bits per byte"], result["se"] = ratio([row["bits"] for row in rows], [row["bytes"] for row in rows])
    for unit in ("token", "word", "byte"):
        result[f"{unit} perplexity"] = 2 ** min(999, result["bits"] / result[f"{unit}s"])
    if answers.rank:
        return {}, []
    return {"": {"problems": len(rows), **result}}, [{"task_id": record["task_id"], **row} for record, row in zip(records, rows)]


def choose_options(opened, answers: Answers, questions, prompts) -> list[dict]:
    """Rows of questions answered by the likeliest option, and by the likeliest a character (acc and acc_norm of lm-evaluation-harness)."""
    model, tokenizer, _ = opened
    pairs, rows = [], []
    for question, prompt in zip(questions, prompts):
        for option in question.options:  # split where the tokens of the prompt end; spaces after it belong to the option
            whole = tokenizer.encode(f"{prompt} {option}")
            begin = min(len(tokenizer.encode(prompt.rstrip())), len(whole) - 1)
            pairs.append((tokenizer.bos + whole[:begin] or [tokenizer.eot], whole[begin:]))
    values = iter(answers.collect(pairs, likelihoods(model, pairs)))
    for question in questions:
        each = [next(values) for _ in question.options]
        by_length = [value / max(1, len(option)) for value, option in zip(each, question.options)]
        right = {name: values.index(max(values)) == question.right for name, values in (("accuracy", each), ("by length", by_length))}
        rows.append({"options": question.options, "log_likelihoods": each, "right": question.right, "scores": right})
    return rows


def judge_texts(args, grade, problems, texts) -> list[dict]:
    """Rows of written answers to problems: graded by the benchmark's own rule, or by running its tests."""
    if grade:
        return [{"completion": text, "reason": "wrong answer", "scores": grade(problem, text)} for problem, text in zip(problems, texts)]
    verdicts = synth.judge_all(list(zip(problems, texts)), timeout=args.timeout)
    return [{"completion": text, "reason": verdict.reason, "scores": {"pass@1": verdict.passed}} for text, verdict in zip(texts, verdicts)]


RATING = ("Rate from 1 to 10 how helpful, right, relevant and thorough the assistant's last answer is. First give your reasons in two "
          "sentences, then one line: RATING: and the number.{reference}\n\n{chat}")


def rate_chats(args, opened, answers: Answers, records) -> list[dict]:
    """Rows of conversations, each of whose answers --judge rates (MT-bench, arXiv 2306.05685, section 3.1, single answers)."""
    if not args.judge or not args.out:
        raise ValueError("these questions are for a judge: give --judge URL#MODEL, and --out FILE.jsonl, beside which its ratings are kept")
    chats, jobs, tokenizer = [[] for _ in records], [], opened[1]
    for turn in range(max(len(record["turns"]) for record in records)):
        going = [i for i, record in enumerate(records) if turn < len(record["turns"])]
        for i in going:
            chats[i].append({"role": "user", "content": records[i]["turns"][turn]})
        asked = [(tokenizer.render(chats[i]), 0) for i in going]
        for i, text in zip(going, answers.collect(asked, write_texts(args, opened, asked, "(?!)"))):
            chats[i].append({"role": "assistant", "content": text.strip()})
            reference = "".join(f" A right answer: {told}" for told in (records[i].get("reference") or [])[turn:turn + 1])
            jobs.append((i, RATING.format(reference=reference, chat="\n\n".join(f"### {m['role']}\n{m['content']}" for m in chats[i]))))
    if answers.rank:
        return []
    settings = dict(dry_run=False, temperature=0.0, max_answer=1024, concurrency=32, asks=3, retries=6, backoff=1.0, timeout=300.0,
                    requests_per_minute=0, tokens_per_minute=0, max_tokens=0, max_usd=0, price_in=0, price_out=0)
    desk = synth.Desk(argparse.Namespace(teacher=[args.judge], judge=[], **settings), f"{args.out}.paid.jsonl")

    def rating(text):
        if not (found := re.findall(r"RATING\W*(10|[1-9])\b", text, re.I)):
            raise synth.Refused("no rating")
        return int(found[-1])
    ratings = desk.run(lambda job: desk.ask(job[1], rating)[0], jobs)
    if lacking := [given for given in ratings if not isinstance(given, int)]:
        raise ValueError(f"{len(lacking)} answers were not rated ({lacking[0] or desk.stopped}); the same command goes on from here")
    each = [[given for (i, _), given in zip(jobs, ratings) if i == n] for n in range(len(chats))]
    return [{"messages": chat, "ratings": own, "scores": {"rating": sum(own) / len(own)}} for chat, own in zip(chats, each)]


def evaluate_file(args, kind: str, records, opened, answers: Answers) -> tuple[dict, list[dict]]:
    """-> {level: summary} of one benchmark, "" for all of it, and its rows: question, answer and verdict. Nothing on ranks above 0."""
    if kind == "text":
        return read_texts(opened, answers, records)
    bench = BENCHMARKS[kind]
    questions, count = [bench.ask(record) for record in records], bench.shots if args.shots is None else args.shots
    pool = [bench.ask(record) for record in read_benchmark(args.shots_file)[1]] if args.shots_file else questions
    samples = 1 if kind == "chat" or questions[0].options else args.samples
    prompts = []
    for question in questions:
        shots = [other for other in pool[:count + 1] if other.prompt != question.prompt][:count]
        prompts.append(question.intro + "".join(f"{shot.prompt}{shot.answer}\n\n" for shot in shots) + question.prompt)
    if kind == "chat":
        rows = rate_chats(args, opened, answers, records)
    elif questions[0].options:
        rows = choose_options(opened, answers, questions, prompts)
    elif args.solutions == "canonical":
        rows = judge_texts(args, bench.grade, records, [record.get("code") or question.answer for record, question in zip(records, questions)])
    else:
        asked = [(prompt_ids(opened[1], prompt), n) for prompt in prompts for n in range(samples)]
        texts = answers.collect(asked, write_texts(args, opened, asked, bench.until))
        problems = [{**record, "prompt": question.prompt} for record, question in zip(records, questions) for _ in range(samples)]
        rows = judge_texts(args, bench.grade, problems, texts) if not answers.rank else []
    if answers.rank:
        return {}, []
    rows = [{"task_id": records[i // samples]["task_id"], "prompt": prompts[i // samples], "passed": [*row["scores"].values()][0], **row}
            for i, row in enumerate(rows)]
    groups = collections.defaultdict(list)
    for i, record in enumerate(records):
        for group in {"", str(record.get(bench.group, ""))}:
            groups[group].append([row["scores"] for row in rows[i * samples:(i + 1) * samples]])
    return {group: score(groups[group]) for group in sorted(groups, key=lambda group: (len(group), group))}, rows  # level 2 before 10


def evaluate(args) -> None:
    opened, answers = None if args.solutions == "canonical" else open_model(args), Answers(args)
    summaries, written = [], []
    for name in args.eval:
        kind, records = read_benchmark(name, args.limit)
        levels, rows = evaluate_file(args, kind, records, opened, answers)
        for solved in (True, False):
            for row in [row for row in rows[::args.samples] if "completion" in row and row["passed"] == solved][:args.show]:
                print(f"\n--- {row['task_id']}: {'solved' if solved else 'failed: ' + row['reason']}\n{row['prompt']}{row['completion']}")
        for level, result in levels.items():
            told = ", ".join(f"{name} {value:,.4g}" for name, value in result.items())
            print(f"{name}{level and f', {level}'}: {told}")
        if levels:
            about = {"file": name, "kind": kind, "run": args.run, "solutions": args.solutions, "temperature": args.temperature}
            summaries.append({**about, **levels.pop(""), "levels": levels})
        written += [{"file": name, **row} for row in rows]
    if not answers.rank and args.out:
        data.write_jsonl(args.out, written)
        # other keys are answers of a run with other settings that was cut, and can go on from them
        if answers.known.keys() <= answers.keys:
            for path in answers.parts():
                os.remove(path)
    if not answers.rank and args.json:
        models.write_json(args.json, summaries if len(summaries) > 1 else summaries[0])
    if answers.world > 1:
        torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(0)  # without the interpreter's shutdown, in which a thread of the process group aborted once in some hundred runs


@data.command("interrupted; with --eval and --out the same command goes on from here")
def main() -> None:
    args = options()
    try:
        if args.quantize and args.out and not args.eval:
            model, tokenizer, _ = open_model(args)
            models.save(model, tokenizer, args.out)
            print(f"{args.out}: {args.run} in {args.quantize}")
        else:
            (evaluate if args.eval else serve if args.serve else chat if args.chat else complete)(args)
    except torch.OutOfMemoryError as error:
        data.fail(f"out of memory ({str(error).splitlines()[0]}); lower --batch-size, now {args.batch_size}, or --max-tokens")


if __name__ == "__main__":
    main()

"""Talk to a trained model: complete a prompt, chat, serve it to programs and browsers, evaluate it.

    python sample.py --run runs/phi --prompt 'def add(a, b):'
    python sample.py --run runs/chat --chat
    python sample.py --run runs/chat --serve                            # OpenAI's interface, and a page
    python sample.py --run runs/phi --eval HumanEval.jsonl.gz some.txt  # pass@k; bits per byte
    python sample.py --eval HumanEval.jsonl.gz --solutions canonical    # no model: checks file and sandbox

MMLU, ARC, HellaSwag, GSM8K and the rest are lm-evaluation-harness's, which asks the server (README).
"""
import codecs
import contextlib
import hashlib
import html
import http.server
import itertools
import json
import math
import os
import queue
import random
import re
import select
import socket
import socketserver
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import model as models
import synth

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


OPTIONS = """
model
--run DIR  runs/phi  run or Hugging Face directory, or hub name such as microsoft/phi-1_5
--device DEVICE  -  cpu, cuda, cuda:1 or mps [the best here]
--dtype fp32|bf16|fp16  -  of the weights [bf16 on CUDA, else fp32]
--quantize int8|int4  -  hold the weights in so many bits; with --out DIR write them there
--skip MAX:MIN  -  SkipDecode: layers fall from MAX at the first new token to MIN at the last

text
--prompt TEXT  -  text to complete [standard input]
--chat  talk in the terminal; with --eval, ask through the chat template
--max-tokens N  -  new tokens at most [256, with --eval 1024]
--temperature X  0  0 takes the likeliest token, 1 samples plainly
--top-k N  0  sample among this many likeliest tokens, 0 for all
--top-p P  1.0  sample among the fewest tokens holding this probability
--seed N  0  of the sampling

server
--serve  OpenAI's interface at /v1, a page at /; asks for MINPHI_API_KEY if it is set
--host ADDRESS  127.0.0.1  where to listen; 0.0.0.0 lets other machines in
--port PORT  8000  port to listen at, 0 for any free one
--batch-size N  128  texts that --eval and --serve decode at once

evaluation
--eval FILE...  -  HumanEval, HumanEval+, MBPP or exercises (pass@k), or any text (bits per byte)
--solutions model|canonical  model  whose solutions to judge
--shots COUNT  3  of MBPP's problems 2, 3 and 4, solved before each question
--samples N  1  completions a problem, for pass@k; above 1 needs a --temperature
--limit N  -  take only this many problems from a file's start
--show COUNT  2  solved and failed examples to print, each
--out FILE.jsonl  -  write every question, answer and verdict here
--json FILE  -  write the summary here
"""


def options(arguments=None):
    parser = data.Parser(prog="sample.py", description=__doc__)
    parser.table(OPTIONS, P=data.number(float, 1e-9, 1), PORT=data.number(int, 0, 65535),
                 COUNT=data.number(int, 0), **{"MAX:MIN": models.parse_skip})
    parser.set_defaults(prompt="-", device=models.default_device())
    args = parser.parse_args(arguments)
    args.max_tokens = args.max_tokens or (1024 if args.eval else 256)
    if args.samples > 1 and (args.temperature == 0 or args.solutions == "canonical"):
        parser.error("--samples above 1 needs the model's solutions and a --temperature above 0, such as 0.8")
    if not args.eval and (args.solutions == "canonical" or args.out and not args.quantize or args.json):
        parser.error("--solutions, --out and --json belong to --eval FILE")
    if args.serve and (args.chat or args.eval or args.skip):
        parser.error("--serve goes without --chat, --eval and --skip")
    if args.out and os.path.realpath(args.out) == os.path.realpath(args.run):
        parser.error(f"--out {args.out} is --run, whose full weights would be lost; choose another --out")
    return args


def open_model(args):
    """-> the model as the options want it, and its tokenizer."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}; try --device cpu") from None
    dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    model, tokenizer = models.load(args.run, args.device, DTYPES[dtype])
    if tokenizer is None:
        raise ValueError(f"--run {args.run} has no tokenizer.json; copy its model's into it")
    if args.quantize:
        models.quantize(model, int(args.quantize[3:]))
    return model, tokenizer


def encode_prompt(tokenizer, text):
    """A prompt's tokens. Drop whitespace at its end first: a line break and the indentation after it are one
    token, so a prompt that ends between them would have to be continued by a token never seen there."""
    return tokenizer.bos + tokenizer.encode(text) or [tokenizer.eot]


def chat_stops(tokenizer) -> tuple:
    """Texts that end an answer where no token does: phi-2's chats are plain text."""
    has_tokens = any(token in tokenizer.special for token in models.CHAT_FORMATS)
    return () if has_tokens else ("\nInstruct:",)


# ---------------------------------------------------------------- a text that grows

class Score(NamedTuple):
    token: int
    logprob: float | None   # None for a text's first token
    top: list               # the likeliest tokens there, as (token, logprob)
    offset: int = 0         # where its text begins


class Event(NamedTuple):
    index: int              # of the request
    text: str               # since the last event
    logprobs: list[Score]
    finish_reason: str | None


@dataclass(eq=False)
class Request:
    """A text to go on with. `emit` is called with Events, or an APIError."""
    ids: list                       # the prompt's tokens, then the new ones too
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: object = None
    stop: tuple = ()                # texts that end the answer, and are not part of it
    logprobs: int = -1              # how many alternatives to give for each token, -1: not even its own
    echo: bool = False              # the answer begins with the prompt
    stream: bool = False            # send each token at once
    skip: str = ""                  # what the answer is expected to begin with and the client already has
    index: int = 0
    emit: object = lambda event: None

    def __post_init__(self):
        self.num_prompt_tokens = len(self.ids)
        self.max_length = len(self.ids) + self.max_new_tokens
        self.num_cached = 0         # tokens whose keys and values are in the cache
        self.cancelled = False      # the client has gone
        self.finish_reason = None
        self.random = random.Random(self.seed)
        # a character may be spread over tokens
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.pattern = re.compile("|".join(map(re.escape, self.stop)) or "(?!)")
        self.prompt_scores = []     # of the prompt's tokens from the second on
        self.scores = []            # of tokens that were not sent yet
        self.text = ""
        self.num_sent = 0           # characters
        self.answer_begin = 0       # where the echo ends

    @property
    def num_uncached(self) -> int:
        return len(self.ids) - self.num_cached

    @property
    def num_new_tokens(self) -> int:
        return len(self.ids) - self.num_prompt_tokens

    @property
    def is_over(self) -> bool:
        return self.cancelled or self.finish_reason is not None

    def add_text(self, raw: bytes, score: Score | None) -> None:
        if score:
            self.scores.append(score._replace(offset=len(self.text)))
        self.text += self.decoder.decode(raw)

    def add_prompt(self, tokenizer) -> None:
        scores = [Score(self.ids[0], None, []), *self.prompt_scores] if self.logprobs >= 0 else []
        for token, score in itertools.zip_longest(self.ids, scores):
            self.add_text(tokenizer.decode_bytes([token]), score)
        self.answer_begin = len(self.text)

    def append_token(self, token: int, score: Score | None, tokenizer) -> bool:
        """-> whether the text is over."""
        if self.echo and not self.num_new_tokens:
            self.add_prompt(tokenizer)
        if len(self.ids) < self.max_length:
            self.ids.append(token)
            if token not in tokenizer.stops:
                self.add_text(tokenizer.decode_bytes([token]), score)
            else:
                self.finish_reason = "stop"
                # as vLLM's, log-probabilities after an echo end with this token's
                self.add_text(b"", score if self.echo else None)
        if len(self.ids) >= self.max_length:
            self.finish_reason = self.finish_reason or "length"
        if self.finish_reason:
            self.text += self.decoder.decode(b"", final=True)

        self.num_sent = max(self.num_sent, len(os.path.commonprefix([self.skip, self.text])))
        end = self.pattern.search(self.text, max(self.num_sent, self.answer_begin))
        if end:
            self.finish_reason = "stop"
            self.text = self.text[:end.start()]
            self.scores = [score for score in self.scores if score.offset < end.start()]
        beginnings = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
        if self.finish_reason or self.stream and not self.text.endswith(tuple(beginnings)):
            self.emit(Event(self.index, self.text[self.num_sent:], self.scores, self.finish_reason))
            self.num_sent = len(self.text)
            self.scores = []
        return self.is_over


def generate(args, model, tokenizer, requests: list[Request]) -> None:
    """Go on with these texts, by the command line's settings."""
    def stream(row, token):
        return requests[row].append_token(token, None, tokenizer)
    prompts = [request.ids for request in requests]
    seeds = [request.seed for request in requests]
    model.generate(prompts, args.max_tokens, args.temperature, args.top_k, args.top_p, tokenizer.stops, seeds,
                   stream, args.skip)


# ---------------------------------------------------------------- complete and chat

def print_answer(args, model, tokenizer, ids, stop=()) -> str:
    """Print the answer as it comes, tokens a second on stderr -> the answer, which Ctrl-C ends in a chat."""
    max_new_tokens = min(args.max_tokens, model.config.max_seq_len - len(ids))
    request = Request(ids, max_new_tokens, seed=args.seed, stop=stop, stream=True,
                      emit=lambda event: print(event.text, end="", flush=True))
    start = time.perf_counter()
    try:
        generate(args, model, tokenizer, [request])
    except KeyboardInterrupt:
        if not args.chat:
            raise
    rate = request.num_new_tokens / (time.perf_counter() - start)
    print(flush=True)
    print(f"{request.num_new_tokens} tokens, {rate:,.0f} a second", file=sys.stderr)
    return request.text


def complete(args) -> None:
    """Stream one completion to standard output."""
    model, tokenizer = open_model(args)
    if args.prompt == "-" and sys.stdin.isatty():
        print("Type a prompt and end it with Ctrl-D.", file=sys.stderr)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    print_answer(args, model, tokenizer, encode_prompt(tokenizer, text.rstrip()))


def fit_chat(tokenizer, messages, room):
    """The chat's tokens, at most `room`: the oldest turns are left out if need be."""
    for first in range(0, len(messages), 2):
        ids = tokenizer.render(messages[first:])
        if len(ids) <= room:
            return ids
    raise ValueError(f"the message takes {len(ids):,} tokens where {room:,} fit; make it shorter")


def chat(args) -> None:
    """A conversation in the terminal, or a message a line from standard input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, gives input() its history and editing
    model, tokenizer = open_model(args)
    context = model.config.max_seq_len
    room = context - min(args.max_tokens, context // 2)
    messages = []
    print("/retry answers anew, /new forgets all, Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            text = input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/new":
            messages = []
        elif text == "/retry":
            messages = messages[:-1]
            args.seed += 1
        elif text:
            messages.append({"role": "user", "content": text})
        if len(messages) % 2 == 0:      # nothing is asked
            continue
        try:
            ids = fit_chat(tokenizer, messages, room)
            answer = print_answer(args, model, tokenizer, ids, chat_stops(tokenizer))
            messages.append({"role": "assistant", "content": answer.strip()})
        except ValueError as error:
            print(error, file=sys.stderr)
            messages.pop()


# ---------------------------------------------------------------- the engine: scheduler -> prefill -> decode

MAX_PREFILL = 4096      # tokens in one pass over prompts
MAX_CHUNK = 512         # the same while other texts are being decoded, so that none of them stalls
MAX_WAITING = 256       # texts; more are refused
MIN_SHARED = 8          # tokens that two texts begin with for one to wait for the other's keys and values


class APIError(Exception):
    """What a client gets instead of an answer: an HTTP status, and OpenAI's object."""

    def __init__(self, status: int, message: str, param=None, code=None):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Engine(threading.Thread):
    """Decodes the texts of many requests together. A request joins the running batch between two tokens and
    leaves it with its last, so that nobody waits for another's end (Orca, OSDI 2022, section 3.1).

    Row i of the cache belongs to running[i] and holds its first num_cached tokens. One token that is not
    cached is decoded, several are prefilled in chunks. Texts that begin alike are prefilled once: the later
    ones copy.
    """

    def __init__(self, model, tokenizer, max_num_seqs: int, cache_tokens: int):
        super().__init__(daemon=True)
        self.model = model
        self.tokenizer = tokenizer
        self.max_num_seqs = max_num_seqs
        self.cache_tokens = cache_tokens
        self.waiting = []
        self.running = []
        self.cache = None
        self.steps = {}      # by the number of rows
        self.changed = threading.Condition()

    def submit(self, requests: list[Request]) -> None:
        with self.changed:
            num_busy = sum(not request.is_over for request in (*self.waiting, *self.running))
            if num_busy + len(requests) > self.max_num_seqs + MAX_WAITING:
                raise APIError(429, f"{num_busy} texts are here; try later", code="rate_limit_exceeded")
            self.waiting.extend(requests)
            self.changed.notify()

    def is_busy(self) -> bool:
        return any(not request.is_over for request in self.running)

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.is_busy())
            try:
                with torch.inference_mode():
                    self.step()
            except Exception as error:  # a lack of memory, most likely: these texts are lost, not the server
                message = f"decoding failed ({type(error).__name__}: {str(error)[:200]})"
                print(f"sample.py: {message}", file=sys.stderr)
                for request in self.running:
                    request.emit(APIError(500, message))
                self.running = []
                self.cache = None

    def step(self) -> None:
        self.schedule()
        prefilling = [row for row, request in enumerate(self.running) if request.num_uncached > 1]
        if prefilling:
            self.prefill(prefilling)
        decoding = [row for row, request in enumerate(self.running)
                    if request.num_uncached == 1 and not request.is_over]
        if decoding:
            self.decode(decoding)

    # ---- scheduler

    def schedule(self) -> None:
        """Texts that are over stay until those have joined who may begin like them."""
        with self.changed:
            self.admit()
            for row in reversed(range(len(self.running))):
                if self.running[row].is_over:       # the last row takes its place
                    last = self.running[-1]
                    self.copy_row(len(self.running) - 1, row, last.num_cached)
                    self.running[row] = last
                    self.running.pop()
            self.admit()

    def admit(self) -> None:
        """Those of the waiting who fit, first come, first served."""
        for request in list(self.waiting):
            if not self.fits(request):
                break
            shared = [(self.num_shared(other, request), row) for row, other in enumerate(self.running)]
            num_shared, row = max(shared, default=(0, 0))
            donor = self.running[row] if num_shared else request
            if num_shared > donor.num_cached and not donor.is_over:
                continue        # what it can copy is being prefilled
            self.waiting.remove(request)
            if not request.cancelled:
                request.num_cached = min(num_shared, donor.num_cached)
                request.prompt_scores = donor.prompt_scores[:request.num_cached]
                self.running.append(request)
                self.grow_cache()
                self.copy_row(row, len(self.running) - 1, request.num_cached)

    def fits(self, request) -> bool:
        num_rows = len(self.running) + 1
        longest = max(other.max_length for other in (*self.running, request))
        return num_rows == 1 or num_rows <= self.max_num_seqs and num_rows * longest <= self.cache_tokens

    def is_long(self, request) -> bool:
        """Whether LongRoPE's long factors turn its keys, which are then computed in one pass over all."""
        return 0 < (self.model.config.original_max_seq_len or 0) < len(request.ids)

    def num_shared(self, donor, request) -> int:
        """How many of the donor's cached tokens the request can copy: not the last common one, whose state
        predicts what differs."""
        donor_ids = donor.ids
        if request.echo:
            donor_ids = donor.ids[:donor.num_prompt_tokens]     # what was answered has no scores
            if not donor.echo or donor.logprobs < request.logprobs:
                return 0
        num_common = len(os.path.commonprefix([donor_ids, request.ids]))
        if num_common < MIN_SHARED or self.is_long(donor) != self.is_long(request):
            return 0
        return num_common - 1

    def grow_cache(self) -> None:
        """A row for each text, long enough for its last token."""
        old = self.cache
        num_rows = len(self.running)
        capacity = max(request.max_length for request in self.running)
        if old and num_rows <= len(old.lengths) and capacity <= old.capacity:
            return
        num_rows = max(num_rows, min(2 * num_rows, self.max_num_seqs, self.cache_tokens // capacity))
        model = self.model
        self.cache = models.KVCache(model.config, num_rows, capacity, model.device, model.dtype)
        self.steps = {}
        if old:
            kept = slice(None), slice(len(self.running) - 1), slice(min(capacity, old.capacity))
            self.cache.keys[kept] = old.keys[kept]
            self.cache.values[kept] = old.values[kept]

    def copy_row(self, source: int, target: int, length: int) -> None:
        for stored in (self.cache.keys, self.cache.values):
            stored[:, target, :length] = stored[:, source, :length]

    # ---- the model

    def set_lengths(self) -> None:
        """The cache's lengths, from the texts'; rows of nobody are empty. A text that is over may fill its
        row, and runs along: what is written at its last token, nobody copies."""
        lengths = torch.tensor([request.num_cached for request in self.running])
        self.cache.lengths.zero_()
        self.cache.lengths[:len(lengths)] = lengths.clamp(max=self.cache.capacity - 1)

    def prefill(self, rows: list[int]) -> None:
        """The next chunk of the text of the first of these rows, and of its neighbours as far as they fit."""
        limit = MAX_CHUNK if len(rows) < len(self.running) else MAX_PREFILL
        batch = [self.running[row] for n, row in enumerate(rows) if row == rows[0] + n]
        chunks = [torch.tensor(request.ids[request.num_cached:][:None if self.is_long(request) else limit])
                  for request in batch]
        while len(batch) > 1:
            width = max(map(len, chunks))
            end = width + max(request.num_cached for request in batch)
            most = min(limit, 1.5 * sum(map(len, chunks)))      # two thirds of it must be tokens
            if width * len(chunks) <= most and end <= self.cache.capacity:
                break
            batch.pop()
            chunks.pop()

        tokens = torch.nn.utils.rnn.pad_sequence(chunks, batch_first=True).to(self.model.device)    # (B, T)
        num_tokens = torch.tensor([len(chunk) for chunk in chunks], device=tokens.device)
        self.set_lengths()
        cache = self.cache.rows(slice(rows[0], rows[0] + len(batch)))
        x = self.model.hidden(tokens, cache=cache, num_tokens=num_tokens)       # (B, T, d_model)
        for request, chunk, states in zip(batch, chunks, x):
            if request.echo and request.logprobs >= 0 and not request.num_new_tokens:
                self.score_prompt(request, states[:len(chunk)])
            request.num_cached += len(chunk)
        whole = [row for row, request in enumerate(batch) if not request.num_uncached]
        if whole:
            logits = self.model.logits(x[whole, num_tokens[whole] - 1])         # (B, T, d_model) -> (rows, V)
            self.append_tokens([batch[row] for row in whole], logits)

    def score_prompt(self, request, x) -> None:
        """Each state of a chunk, (T, d_model), scores the token after its own. Logits in parts: those of
        all at once would not fit."""
        following = torch.tensor(request.ids[request.num_cached + 1:][:len(x)], device=x.device)
        for states, tokens in zip(x[:len(following)].split(256), following.split(256)):
            request.prompt_scores += score_tokens(self.model.logits(states), tokens, request.logprobs)

    def decode(self, rows: list[int]) -> None:
        """One more token for the texts of these rows; the other rows run along."""
        num_rows = len(self.running)
        if self.model.device.type == "cuda":    # each number of rows is a CUDA graph
            num_rows = min(1 << (num_rows - 1).bit_length(), len(self.cache.lengths))
        step = models.DecodeStep(self.model, self.cache.rows(slice(num_rows)))
        step = self.steps.setdefault(num_rows, step)
        tokens = [request.ids[-1] for request in self.running]
        tokens += [0] * (num_rows - len(tokens))
        self.set_lengths()
        logits = step(torch.tensor(tokens, device=self.model.device))
        requests = [self.running[row] for row in rows]
        for request in requests:
            request.num_cached += 1
        self.append_tokens(requests, logits[rows])

    def append_tokens(self, requests: list[Request], logits) -> None:
        """Choose the next token of each text, whose whole is cached."""
        tokens = sample_batch(logits, requests)
        for request, row_logits, token in zip(requests, logits, tokens):
            score = None
            if request.logprobs >= 0:
                (score,) = score_tokens(row_logits[None], token[None], request.logprobs)
            request.append_token(token.item(), score, self.tokenizer)
            if self.model.outgrows(len(request.ids)):
                request.num_cached = 0


def score_tokens(logits, tokens, num_top: int) -> list[Score]:
    """(n, V) logits, (n,) tokens -> the log-probability of each, and the likeliest instead of it."""
    logprobs = logits.log_softmax(-1).clamp(-9999.0)       # JSON has no infinity
    top = logprobs.topk(min(num_top, logits.shape[-1]))
    columns = tokens, logprobs.gather(1, tokens[:, None])[:, 0], top.indices, top.values
    return [Score(token, logprob, list(zip(others, values)))
            for token, logprob, others, values in zip(*(column.tolist() for column in columns))]


def sample_batch(logits, requests: list[Request]):
    """(n, V) logits -> (n,) tokens: as model.sample, but each row by its own settings and random numbers."""
    settings = [(request.temperature, request.top_k, request.top_p) for request in requests]
    draws = torch.tensor([request.random.random() for request in requests], device=logits.device)
    tokens = torch.zeros_like(draws, dtype=torch.long)
    for alike in set(settings):
        rows = [row for row, other in enumerate(settings) if other == alike]
        tokens[rows] = models.sample(logits[rows], *alike, draws[rows])
    return tokens


# ---------------------------------------------------------------- OpenAI's interface

MAX_BODY = 16_000_000
READ_SECONDS = 30       # for headers and body together
MAX_READING = 512       # connections whose request has not arrived
FIELDS = {              # of a request: smallest and largest; a whole number unless the bounds are none
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "top_k": (0, 10 ** 9),
    "seed": (-10 ** 19, 10 ** 19),
    "n": (1, 128),
    "stream": (False, True),
    "echo": (False, True),
    "logprobs": (0, 20),
    "top_logprobs": (0, 20),
    "max_tokens": (0, 10 ** 9),
    "max_completion_tokens": (0, 10 ** 9),
}
UNSUPPORTED = ("tools", "functions", "logit_bias", "presence_penalty", "frequency_penalty", "suffix")
LOCAL = ("127.0.0.1", "localhost", "")


def cache_memory(device) -> int:
    """Bytes that the cache may take: on a CPU half of what this machine, or this container, has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            memory = min(memory, int(file.read()))
    return memory // 2


class Server(socketserver.ThreadingTCPServer):
    """One thread a connection; `engine` decodes for all of them."""
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 512

    def __init__(self, args, model, tokenizer):
        self.args = args
        self.name = os.path.basename(os.path.normpath(args.run))
        self.key = os.environ.get("MINPHI_API_KEY", "")
        self.reading = {}       # connection -> when its request must have arrived; the oldest first
        bytes_a_token = model.config.kv_cache_bytes() * model.dtype.itemsize / 2
        # 0.4: moving to a larger cache holds both
        cache_tokens = int(0.4 * cache_memory(model.device) / bytes_a_token)
        self.engine = Engine(model, tokenizer, args.batch_size, cache_tokens)
        super().__init__((args.host, args.port), Handler)

    def finish_request(self, request, address):
        self.reading[request] = time.monotonic() + READ_SECONDS
        with contextlib.suppress(OSError):      # clients that have gone or do not read
            super().finish_request(request, address)
        self.reading.pop(request, None)

    def service_actions(self):
        """Who sends no request makes room for those who do."""
        connections = list(self.reading.items())
        for number, (connection, deadline) in enumerate(connections):
            if time.monotonic() > deadline or number < len(connections) - MAX_READING:
                self.reading.pop(connection, None)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request a connection."""
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"
    timeout = 2 * READ_SECONDS
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def send(self, answer: str | dict, status=200, text_type="html") -> None:
        """Text, or else JSON."""
        is_text = isinstance(answer, str)
        body = (answer if is_text else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", f"text/{text_type}" if is_text else "application/json")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Connection", "close")
        if body:
            self.send_header("Content-Length", len(body))
        if status == 429:
            self.send_header("Retry-After", 2)
        self.end_headers()
        self.wfile.write(body)

    def send_event(self, data: dict) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

    def send_error(self, code, message=None, explain=None):
        """What http.server refuses by itself."""
        self.send(APIError(code, message).body, code)

    def do_GET(self):
        """Answer any request, or say why not."""
        try:
            self.route(self.path.partition("?")[0])
        except APIError as error:
            self.send(error.body, error.status)
            # a client that is still sending listens when it may finish
            if self.connection in self.server.reading:
                self.connection.shutdown(socket.SHUT_WR)
                while self.connection.recv(1 << 16):
                    pass

    do_POST = do_GET

    def route(self, path: str) -> None:
        server = self.server
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin", f"http://{host}").partition("://")[2]
        if origin != host or server.args.host in LOCAL and host.partition(":")[0] not in LOCAL:
            raise APIError(403, "other web sites may not use this server")  # nor reach it by a name of theirs
        is_locked = server.key and path not in ("/", "/health")
        if is_locked and self.headers.get("Authorization") != f"Bearer {server.key}":
            raise APIError(401, "send MINPHI_API_KEY as Authorization: Bearer ...", code="invalid_api_key")
        if self.command == "POST" and path in ("/v1/completions", "/v1/chat/completions"):
            self.answer(is_chat="chat" in path)
            return
        model = {"id": server.name, "object": "model", "created": 0, "owned_by": "minphi"}
        documents = {
            "/": PAGE.replace("MODEL", html.escape(server.name)),
            "/health": {"status": "ok"},
            "/v1/models": {"object": "list", "data": [model]},
            f"/v1/models/{server.name}": model,
        }
        if self.command != "GET" or path not in documents:
            raise APIError(404, f"nothing answers {self.command} {path[:100]} here")
        self.send(documents[path])

    def read_body(self) -> dict:
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,12}", length):
            raise APIError(400, f"Content-Length {length[:20]!r} is not a number")
        if not 0 < int(length) <= MAX_BODY:
            raise APIError(413, f"the request needs a Content-Length of 1 to {MAX_BODY:,}")
        text = self.rfile.read(int(length))
        if len(text) < int(length):
            raise APIError(408, f"the request did not arrive within {READ_SECONDS} seconds")
        self.server.reading.pop(self.connection, None)
        try:
            return {name: value for name, value in json.loads(text).items() if value is not None}
        except (ValueError, AttributeError, RecursionError):
            raise APIError(400, "the request must be a JSON object") from None

    def answer(self, is_chat: bool) -> None:
        """Decode and send what is asked for: at once, or as server-sent events, as later errors are too."""
        body = self.read_body()
        requests = make_requests(self.server, body, is_chat)
        is_stream = requests[0].stream
        num_top = requests[0].logprobs
        kind = "chat.completion" + ".chunk" * is_stream if is_chat else "text_completion"
        reply = {"id": f"cmpl-{os.urandom(12).hex()}", "object": kind, "created": int(time.time()),
                 "model": self.server.name}
        choices = {}        # by their index; of a stream the latest piece of each
        try:
            for event in self.events(requests):
                choice = event._asdict()
                logprobs = format_logprobs(event.logprobs, num_top, self.server.engine.tokenizer, is_chat)
                choice["logprobs"] = logprobs if num_top >= 0 else None
                if is_chat:
                    role = {} if event.index in choices else {"role": "assistant"}
                    choice["delta" if is_stream else "message"] = {**role, "content": choice.pop("text")}
                if is_stream:
                    if not choices:
                        self.send("", text_type="event-stream")
                    self.send_event({**reply, "choices": [choice]})
                choices[event.index] = choice
            prompt = sum(request.num_prompt_tokens for request in requests[::body.get("n", 1)])
            new = sum(request.num_new_tokens for request in requests)
            usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
            if not is_stream:
                self.send({**reply, "choices": [choices[n] for n in sorted(choices)], "usage": usage})
                return
            if body.get("stream_options", {}).get("include_usage"):
                self.send_event({**reply, "choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except APIError as error:
            if not is_stream or not choices:
                raise
            self.send_event(error.body)
        finally:
            for request in requests:
                request.cancelled = True

    def events(self, requests):
        """What is emitted until all have ended. OSError when the client has gone."""
        events = queue.SimpleQueue()
        for request in requests:
            request.emit = events.put
        self.server.engine.submit(requests)
        readable = select.poll()
        readable.register(self.connection, select.POLLIN)
        num_running = len(requests)
        while num_running:
            try:
                event = events.get(timeout=0.5)
            except queue.Empty:
                if readable.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionAbortedError from None
                continue
            if isinstance(event, APIError):
                raise event
            num_running -= event.finish_reason is not None
            yield event


def make_requests(server: Server, body: dict, is_chat: bool) -> list[Request]:
    """The texts that a request's body asks for: `n` answers to each prompt."""
    if body.get("model", server.name) not in (server.name, server.args.run):
        raise APIError(404, f"that model is not here; {server.name!r} is", "model", "model_not_found")
    for name, (low, high) in FIELDS.items():
        value = body.get(name, low)
        if not isinstance(value, (int, type(low))) or not low <= value <= high:
            raise APIError(400, f"{name} must be a number from {low} to {high}", name)
    for name in UNSUPPORTED:
        if body.get(name):
            raise APIError(400, f"{name} is not supported", name)
    if not isinstance(body.get("stream_options", {}), dict):
        raise APIError(400, "stream_options must be an object", "stream_options")
    body = {"n": 1, "max_tokens": server.args.max_tokens, "temperature": 1.0, **body}
    names = "temperature", "top_p", "top_k", "echo", "stream", "logprobs"
    settings = {name: body[name] for name in names if name in body}
    max_tokens = body.get("max_completion_tokens", body["max_tokens"])
    tokenizer = server.engine.tokenizer
    context = server.engine.model.config.max_seq_len
    name = "stop"       # what is being read
    try:
        stop = body.get("stop", ())
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError("it must be a text or a list of them")
        if is_chat:
            name = "messages"
            settings["logprobs"] = body.get("top_logprobs", 0) if body.get("logprobs") else -1
            stop += chat_stops(tokenizer)
            # some formats make an answer begin with a space
            prompts = [(tokenizer.render(plain_messages(body["messages"])), " ")]
        else:
            name = "prompt"
            prompt = body["prompt"]
            is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
            prompts = [read_prompt(server, one, body.get("echo")) for one in ([prompt] if is_one else prompt)]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise APIError(400, f"{name}: {type(error).__name__} {error}", name) from None
    if len(prompts) * body["n"] > server.args.batch_size + MAX_WAITING:
        raise APIError(400, f"{len(prompts) * body['n']:,} texts are too many for one request")
    requests = []
    for ids, skip in prompts:
        room = context - len(ids)
        if room < min(max_tokens, 1):
            raise APIError(400, f"{len(ids):,} tokens and an answer do not fit {context:,}",
                           code="context_length_exceeded")
        for n in range(body["n"]):
            seed = f"{body['seed']}, {n}" if "seed" in body else None
            requests.append(Request(list(ids), min(max_tokens, room), seed=seed, stop=stop, skip=skip,
                                    index=len(requests), **settings))
    return requests


def plain_messages(messages: list[dict]) -> list[dict]:
    """Contents may be lists of parts."""
    if not messages:
        raise ValueError("no message is there")
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = "".join(part["text"] for part in message["content"])
    return messages


def read_prompt(server: Server, prompt, echo: bool) -> tuple[list[int], str]:
    """A text or tokens -> tokens, and the whitespace at a text's end, which the client has already."""
    if isinstance(prompt, str):
        text = prompt if echo else prompt.rstrip()
        return encode_prompt(server.engine.tokenizer, text), prompt[len(text):]
    vocab_size = server.engine.model.config.vocab_size
    if not prompt or not all(type(token) is int and 0 <= token < vocab_size for token in prompt):
        raise ValueError("it must be a text, a list of the model's tokens, or a list of either")
    return prompt, ""


def format_logprobs(scores: list[Score], num_top: int, tokenizer, is_chat: bool) -> dict:
    """OpenAI has one form for chats and an older one for completions."""
    def entry(token, logprob):
        raw = tokenizer.decode_bytes([token])
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}
    entries = [entry(score.token, score.logprob) for score in scores]
    tops = [[entry(*other) for other in score.top[:num_top]] for score in scores]
    if is_chat:
        return {"content": [{**chosen, "top_logprobs": top} for chosen, top in zip(entries, tops)]}
    return {"tokens": [chosen["token"] for chosen in entries],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{other["token"]: other["logprob"] for other in top} or None for top in tops],
            "text_offset": [score.offset for score in scores]}


def serve(args) -> None:
    model, tokenizer = open_model(args)
    try:
        server = Server(args, model, tokenizer)
    except OSError as error:
        raise OSError(f"{args.host} port {args.port}: {error.strerror}; choose another --port") from None
    server.engine.start()
    address = f"http://{args.host}:{server.server_address[1]}"
    print(f"{server.name}: a page at {address}, OpenAI's interface at {address}/v1; {args.batch_size} texts "
          f"at once, {server.engine.cache_tokens:,} tokens of cache; Ctrl-C stops", flush=True)
    if args.host not in LOCAL and not server.key:
        print("anybody may use it: set MINPHI_API_KEY to ask for a key", file=sys.stderr)
    try:
        server.serve_forever()
    finally:
        print("stopping: answers that have begun are finished", file=sys.stderr)
        deadline = time.monotonic() + 30
        while server.engine.is_busy() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)     # the last of them are being sent


# ---------------------------------------------------------------- the page at /

POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
          "frame-ancestors 'none'")
PAGE = """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>MODEL</title>
<style>
body { max-width: 46rem; margin: 1rem auto; padding: 0 1rem; font: 16px system-ui; color-scheme: light dark }
p { white-space: pre-wrap }
.user { font-weight: bold }
textarea { width: 100% }
</style>
<b>MODEL</b> key <input type="password">
<main></main>
<form><textarea autofocus></textarea><button>Send</button><button type="button">Retry</button></form>
<script>
const [key, main, form, text, send, retry] = document.querySelectorAll("input, main, form, textarea, button")
const messages = []
let running = null

function show(role, content) {
  const place = document.createElement("p")
  place.className = role
  place.textContent = content
  messages.push({role, content})
  main.append(place)
}

async function answer() {
  const headers = {Authorization: "Bearer " + key.value}
  const body = JSON.stringify({messages, stream: true, temperature: 0.7})
  show("assistant", "")
  const place = main.lastChild, message = messages.at(-1)
  running = new AbortController()
  send.textContent = "Stop"
  try {
    const reply = await fetch("/v1/chat/completions", {method: "POST", headers, body, signal: running.signal})
    if (!reply.ok) throw Error((await reply.json()).error.message)
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader()
    let part, rest = ""
    while (!(part = await reader.read()).done) {
      const events = (rest + part.value).split("\\n\\n")
      rest = events.pop()
      for (const event of events.filter(event => event != "data: [DONE]")) {
        const {error, choices} = JSON.parse(event.slice(6))
        if (error) throw Error(error.message)
        place.textContent = message.content += choices[0].delta.content
        form.scrollIntoView()
      }
    }
  } catch (error) {
    if (error.name != "AbortError") place.textContent += " [" + error.message + "]"
  }
  running = null
  send.textContent = "Send"
}

form.onsubmit = event => {
  event.preventDefault()
  if (running) return running.abort()
  if (!text.value.trim()) return
  show("user", text.value)
  text.value = ""
  answer()
}
retry.onclick = () => {
  if (running || !messages.length) return
  messages.pop()
  main.lastChild.remove()
  answer()
}
</script>
"""


# ---------------------------------------------------------------- evaluation

LINE_AT_MARGIN = re.compile(r"\n(?=[^\s])")     # where a function's body is over
CODE_BLOCK = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", re.S)
MBPP_PROMPT = ("You are an expert Python programmer, and here is your task: {} "
               "Your code should pass these tests:\n\n{}\n")
CHAT_PROMPT = ("Complete this Python function. Answer with the whole function in one code block.\n"
               "```python\n{}\n```")
PLUS_TEST = """import copy, math
def same(a, b):
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-7, abs_tol={atol})
    if isinstance(a, (list, tuple)):
        return type(a) == type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b
{prompt}{canonical_solution}
def check(candidate):
    for inputs in {base_input} + {plus_input}:
        assert same(candidate(*copy.deepcopy(inputs)), {entry_point}(*copy.deepcopy(inputs)))
"""
# by the fields of their records: what ends an answer, and what a chat model is asked
KINDS = {
    "MBPP": ({"code", "test_list"}, re.compile(r"\[DONE\]"), "{}"),
    "code": ({"prompt", "entry_point"}, LINE_AT_MARGIN, CHAT_PROMPT),
    "text": ({"text"}, None, None),
}


def read_problems(path: str, limit: int | None) -> tuple[str, list[dict]]:
    """-> the kind, and the records of a benchmark's file, of documents, or any text."""
    if path.endswith(".json"):
        records = models.read_json(path)
    elif path.endswith((".jsonl", ".jsonl.gz")):
        records = list(data.read_jsonl(path))
    else:
        with open(path, encoding="utf-8", errors="replace") as file:
            records = [{"text": file.read()}]
    fields = set.intersection(*map(set, records)) if records else set()
    kind = next((kind for kind, (needed, *_) in KINDS.items() if needed <= fields), None)
    if kind is None:
        raise ValueError(f"{path}: its records must all have code and test_list, prompt and entry_point, or "
                         f"text, not {fields or 'none'}; others are lm-evaluation-harness's, see the README")
    for n, record in enumerate(records):
        record.setdefault("task_id", f"record {n + 1}")
        if "plus_input" in record:      # HumanEval+: what the reference answers is expected
            record["test"] = PLUS_TEST.format(**record)
    return kind, records[:limit]


def mbpp_problems(records: list[dict], num_shots: int, is_chat: bool) -> list[dict]:
    """The test part, problems 11 to 510 (arXiv 2108.07732), with its prompts; 2, 3 and 4 are the examples."""
    for record in records:
        task = record.get("text") or record["prompt"]
        record["prompt"] = MBPP_PROMPT.format(task, "\n".join(record["test_list"]))
    if not is_chat:
        shots = [record for record in records if record["task_id"] in (2, 3, 4)][:num_shots]
        intro = "".join(f"{shot['prompt']}[BEGIN]\n{shot['code']}\n[DONE]\n\n" for shot in shots)
        records = [{**record, "prompt": f"{intro}{record['prompt']}[BEGIN]\n"} for record in records]
    return [record for record in records if record["task_id"] in range(11, 511)] or records


def write_answers(args, model, tokenizer, kind: str, problems: list[dict]) -> None:
    """The completion of each problem. Of a prompt that is too long the beginning is left out.
    A text depends on --seed, its prompt and its number, not on its batch."""
    room = max(model.config.max_seq_len // 2, model.config.max_seq_len - args.max_tokens)
    _, end, chat_prompt = KINDS[kind]
    requests = []
    for n, problem in enumerate(problems):
        if args.chat:
            question = chat_prompt.format(problem["prompt"])
            ids = tokenizer.render([{"role": "user", "content": question}])
        else:
            problem["prompt"] = problem["prompt"].rstrip()
            ids = encode_prompt(tokenizer, problem["prompt"])
        seed = hashlib.sha256(json.dumps([args.seed, ids, n % args.samples]).encode()).hexdigest()
        stop = chat_stops(tokenizer) if args.chat else ()
        request = Request(ids[-room:], args.max_tokens, seed=int(seed[:16], 16), stop=stop)
        if not args.chat:
            request.pattern = end
        requests.append(request)
    # texts of one length together waste least; with the longest first, a lack of memory shows at once
    order = sorted(requests, key=lambda request: -len(request.ids))
    for begin in tqdm(range(0, len(order), args.batch_size), desc="solving", unit="batch", disable=None):
        generate(args, model, tokenizer, order[begin:begin + args.batch_size])
    for problem, request in zip(problems, requests):
        problem["completion"] = request.text
        problem["truncated"] = request.finish_reason == "length"
        if args.chat:       # the answer repeats the function; imports and helpers stand before it
            problem["completion"] = (CODE_BLOCK.findall(request.text) or [request.text])[0]
            function = rf"^def {problem.get('entry_point', '')}\b"
            problem["prompt"] = re.split(function, problem["prompt"], flags=re.M)[0]


def solve(args, model, tokenizer, kind, records) -> list[dict]:
    """-> a row for each sample of each problem: question, answer, verdict."""
    if kind == "MBPP":
        records = mbpp_problems(records, args.shots, args.chat)
    rows = [{**record, "level": str(record.get("k", "")), "truncated": False}
            for record in records for _ in range(args.samples)]
    if args.solutions == "model":
        write_answers(args, model, tokenizer, kind, rows)
    else:
        for row in rows:
            row["completion"] = row.get("code") or row["canonical_solution"]
    names = "task_id", "level", "prompt", "completion", "truncated"
    verdicts = synth.judge_all([(row, row["completion"]) for row in rows])
    rows = [{name: row[name] for name in names} | verdict._asdict() for row, verdict in zip(rows, verdicts)]
    for passed in (True, False):
        for row in [row for row in rows[::args.samples] if row["passed"] == passed][:args.show]:
            print(f"\n--- {row['task_id']}: {row['reason']}\n{row['prompt']}{row['completion']}")
    return rows


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes (Codex, arXiv 2107.03374, equation 1).
    Example: pass_at_k(2, 1, 1) == 0.5"""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def score(rows: list[dict], samples: int) -> dict:
    """The summary of the rows of some problems, `samples` each; the standard error of pass@1 is over them."""
    passed = [sum(row["passed"] for row in rows[begin:begin + samples])
              for begin in range(0, len(rows), samples)]
    result = {"problems": len(passed), "passed": sum(passed), "total": len(rows),
              "truncated": sum(row["truncated"] for row in rows)}
    for k in (100, 10, 1):
        if k <= samples:
            values = [pass_at_k(samples, n, k) for n in passed]
            result[f"pass@{k}"] = statistics.fmean(values)
    result["se"] = math.sqrt(statistics.pvariance(values) / max(1, len(values) - 1))
    return result


@torch.inference_mode()
def count_bits(model, tokenizer, text: str) -> dict:
    """Each token is predicted once, in windows of the context, the last of them from all that fits before."""
    ids = (tokenizer.bos or [tokenizer.eot]) + tokenizer.encode(text)
    context = model.config.max_seq_len
    nats = 0.0
    for begin in range(0, len(ids) - 1, context):
        end = min(begin + context, len(ids) - 1)
        window = torch.tensor([ids[max(0, end - context):end + 1]], device=model.device)
        targets = window[:, 1:].clone()
        targets[:, :begin - end] = -1
        nats += model(window[:, :-1], targets=targets)[0].item()
    return {"bits": nats / math.log(2), "bytes": len(text.encode()), "tokens": len(ids) - 1}


def read_texts(model, tokenizer, records) -> tuple[list[dict], dict]:
    """-> a row for each text, and bits per byte and perplexity of all together."""
    rows = [{"task_id": record["task_id"], **count_bits(model, tokenizer, record["text"])}
            for record in tqdm(records, desc="reading", unit="text", disable=None)]
    result = {name: sum(row[name] for row in rows) for name in ("bits", "bytes", "tokens")}
    result["bits per byte"] = result["bits"] / result["bytes"]
    result["token perplexity"] = 2 ** (result["bits"] / max(1, result["tokens"]))
    return rows, result


def evaluate(args) -> None:
    model, tokenizer = open_model(args) if args.solutions == "model" else (None, None)
    summaries = []
    written = []
    for path in args.eval:
        kind, records = read_problems(path, args.limit)
        results = {}        # of each level; "" is all of them
        if kind == "text":
            rows, results[""] = read_texts(model, tokenizer, records)
        else:
            rows = solve(args, model, tokenizer, kind, records)
            for level in dict.fromkeys(["", *(row["level"] for row in rows)]):
                results[level] = score([row for row in rows if level in ("", row["level"])], args.samples)
        for level, result in results.items():
            words = [f"{name} {value:,.4g}" for name, value in result.items()]
            print(path, level and f"k = {level}", *words, sep="  ")
        summaries.append({"file": path, "kind": kind, "run": args.run, **results.pop(""), "levels": results})
        written += [{"file": path, **row} for row in rows]
    if args.out:
        data.write_jsonl(args.out, written)
    if args.json:
        models.write_json(args.json, summaries if len(summaries) > 1 else summaries[0])


@data.command("interrupted")
def main() -> None:
    args = options()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        data.fail("sample.py runs in one process and decodes many texts together; start it without torchrun")
    try:
        if args.quantize and args.out and not args.eval:
            model, tokenizer = open_model(args)
            models.save(model, tokenizer, args.out)
            print(f"{args.out}: {args.run} in {args.quantize}")
            return
        job = evaluate if args.eval else serve if args.serve else chat if args.chat else complete
        job(args)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        data.fail(f"out of memory ({reason}); lower --batch-size, now {args.batch_size}, or --max-tokens")


if __name__ == "__main__":
    main()

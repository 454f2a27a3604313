"""Documents -> clean, deduplicated, scored text -> tokens: `python data.py` makes data/web from this machine's
own Python source.

    parts          directories, text and code files, JSON Lines, WET, parquet, URLs, datasets; gzipped or not
    rules          language_rule, quality_rule: document -> the reason to drop it, or None
    exact, near    equal texts; of texts that MinHash calls similar the longest stays
    decontaminate  what contains a benchmark's problems goes (class Contamination)
    value          a random forest keeps what teaches most, as learned from labels (synth.py label)
    split, tokens  -> data/NAME/{train.bin, val.bin, tokenizer.json, meta.json, report.html}

Work is cut into numbered parts on disk (PartStore), so a stopped command goes on where it was, and the result is
the same for any number of processes and machines: `torchrun data.py ...` on several with one shared folder.
Texts stay on disk; in memory a rank holds about 50 bytes for each document that passes the rules."""
import argparse
import ast
import builtins
import concurrent.futures
import contextlib
import datetime
import difflib
import functools
import gzip
import hashlib
import heapq
import html
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import string
import symtable
import sys
import sysconfig
import textwrap
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

DAMAGED = EOFError, zlib.error, gzip.BadGzipFile


# ---------------------------------------------------------------- processes, ranks, files

def n_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parallel(function, items, workers, description):
    """[function(item) for item in items] in forked processes: they inherit the items, only results travel."""
    items = list(items)
    bar = functools.partial(tqdm, total=len(items), desc=description, disable=None, leave=False)
    if min(workers, len(items)) <= 1:
        return list(bar(map(function, items)))
    fork = multiprocessing.get_context("fork")
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, fork, _inherit, (function, items)) as pool:
            return list(bar(pool.map(_call, range(len(items)))))
    except concurrent.futures.BrokenExecutor:
        raise OSError(f"a process died while {description}, most likely for lack of memory; "
                      "use fewer --workers or --max-bytes") from None


def _inherit(*work):
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to report
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(index):
    function, items = _work
    return function(items[index])


def batches(items, size, n_bytes=len):
    """Consecutive lists of items of about `size` bytes each; n_bytes(item) says how long an item is."""
    batch = []
    total = 0
    for item in items:
        batch.append(item)
        total += n_bytes(item)
        if total >= size:
            yield batch
            batch = []
            total = 0
    if batch:
        yield batch


def digest(data):
    """16 bytes. A text may hold what os.fsdecode makes of a file name that is no UTF-8."""
    data = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    return hashlib.blake2b(data, digest_size=16).digest()


def sum_counts(counters):
    total = Counter()
    for counter in counters:
        total.update(counter)
    return total


@contextlib.contextmanager
def process_group():
    """Under torchrun, one gloo group of all ranks, so that a dead rank ends the job. Yields (rank, ranks)."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield 0, 1
        return
    import torch.distributed as dist
    # A rank may work for days while another waits for it.
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=9))
    try:
        yield dist.get_rank(), world_size
    finally:
        dist.destroy_process_group()


def all_gather(value=None):
    """[the value of each rank]; also the barrier."""
    import torch.distributed as dist
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError:
        raise OSError("another rank ended, and its own message says why; "
                      "the same command goes on from here") from None
    return values


@contextlib.contextmanager
def atomic_path(path):
    """A path for a file or folder that takes the place of `path`, safely on disk, when all went well, and
    vanishes when not."""
    new = path.with_name(f".{path.name}.new-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")

    def tidy():
        if old.exists() and not path.exists():  # stopped between the two renames
            os.replace(old, path)
        for rest in (old, new):
            shutil.rmtree(rest, ignore_errors=True)
        new.unlink(missing_ok=True)

    path.parent.mkdir(parents=True, exist_ok=True)
    tidy()  # in a container a killed command's successor has the same process id
    try:
        yield new
        for file in (*new.rglob("*"), new):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if path.is_dir():
            os.replace(path, old)
        os.replace(new, path)
    finally:
        tidy()


class PartStore:
    """Work in numbered parts that outlive the process: part i of a stage is the folder FOLDER/STAGE/i, which
    appears whole.

    Part i belongs to rank i mod the number of ranks; one that is there is not made again; a stage ends when all
    ranks are done. A part depends on its number alone. So cores, machines on a shared folder and going on after a
    kill are one mechanism, and the result is always the same."""

    def __init__(self, folder, workers, rank=0, world_size=1):
        self.folder = Path(folder)
        self.workers = workers
        self.rank = rank
        self.world_size = world_size

    def run(self, stage, n, make):
        """make(i) -> {name: array or what JSON can hold} for i < n. Returns the n parts: part(name) reads one
        value, large arrays mapped."""
        folders = [self.folder / stage / str(i) for i in range(n)]

        def write(i):
            with atomic_path(folders[i]) as new:
                new.mkdir()
                values = make(i)
                for name in [name for name, value in values.items() if isinstance(value, np.ndarray)]:
                    np.save(new / name, values.pop(name))
                (new / "values.json").write_text(json.dumps(values))

        todo = [i for i in range(self.rank, n, self.world_size) if not folders[i].exists()]
        parallel(write, todo, self.workers, stage)
        all_gather()
        return [functools.partial(read_value, folder) for folder in folders]


@functools.lru_cache(64)
def read_value(folder, name):
    path = folder / f"{name}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r" if path.stat().st_size > 1 << 16 else None)
    return json.loads((folder / "values.json").read_text())[name]


# ---------------------------------------------------------------- JSON Lines

def read_jsonl(path):
    """Yields the objects of a JSON Lines file (gzipped if it ends in .gz). ValueError names the broken line."""
    number = 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("not a JSON object")
                    yield record
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged gzip after line {number} ({error}); make it again") from None
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}; mend or remove this line") from None


def write_jsonl(path, records):
    """Writes records as JSON Lines (gzipped if path ends in .gz), atomically; returns how many."""
    count = 0
    with atomic_path(Path(path)) as new, open(new, "wb") as raw:
        file = contextlib.nullcontext(raw)
        if str(path).endswith(".gz"):  # neither name nor time in its header: equal records give equal files
            file = gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
        with file as lines:
            for count, record in enumerate(records, 1):
                lines.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        raw.flush()
    return count


# ---------------------------------------------------------------- reading documents

CODE = set(".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .jl .rb .sh .lua .swift .kt .cs .sql".split())
PROSE = set(".txt .md .rst .tex .text".split())
RECORDS = {".jsonl", ".ndjson"}
CRAWL = {".wet", ".warc"}
READABLE = CODE | PROSE | RECORDS | CRAWL | {".parquet"}
DATASET_FILES = ["train.bin", "val.bin"]


def suffix_of(name):
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def printable(path):
    """A file's name as a text: one that is no UTF-8 gets a question mark."""
    return os.fsencode(path).decode(errors="replace")


def fetch(url):
    """A URL's file in the cache (MINPHI_CACHE, ~/.cache/minphi), fetched once, resumed when it was cut."""
    import fcntl

    from model import download
    cache = os.environ.get("MINPHI_CACHE") or Path.home() / ".cache/minphi"
    folder = Path(cache, "files", digest(url).hex())
    path = folder / (os.path.basename(url.split("?")[0].rstrip("/")) or "file")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # several ranks ask at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            download(url, str(path))
    return str(path)


def walk(root, skipped):
    """Yields (path, path within root) of the files that `root` stands for: `python` is this interpreter's
    standard library and site-packages, a URL is fetched; links to folders are not followed."""
    tops = [root]
    if root == "python":
        tops = sorted({os.path.realpath(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")})
    elif re.match("https?://", root):
        tops = [fetch(root)]
    elif not os.path.lexists(root):
        raise FileNotFoundError(f"{root}: no such file or directory (`python` names this machine's own source)")
    for top in map(os.path.abspath, tops):
        if not os.path.isdir(top):
            yield top, os.path.basename(top)
        for folder, folders, names in os.walk(top, onerror=lambda error: skipped.update(["unreadable"])):
            if folder == top and {"meta.json", *DATASET_FILES} <= set(names):
                folders.clear()
                names = DATASET_FILES
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            for name in names:
                if names is DATASET_FILES or suffix_of(name) in ({".py"} if root == "python" else READABLE):
                    path = os.path.join(folder, name)
                    yield path, os.path.relpath(path, top)
                elif root != "python":
                    skipped["not a text file"] += 1


def find_files(paths, skipped, seed=0, max_bytes=0):
    """The files to read as (path, name, begin, end), for records that begin in these bytes: sorted by name, or
    about max_bytes of them in the order of a hash. `skipped` counts, by reason, what cannot be read."""
    found = {}
    for path, name in itertools.chain(*(walk(str(root), skipped) for root in paths)):
        if os.path.isfile(path):  # reading a pipe or a device could wait for ever
            found.setdefault(path, (printable(name), path, os.path.getsize(path)))
        else:
            skipped["not a regular file" if os.path.exists(path) else "unreadable"] += 1
    files = sorted(found.values())
    if max_bytes:
        files.sort(key=lambda file: digest(f"{seed} {file[0]}"))
    room = max_bytes or math.inf
    chosen = []
    for name, path, size in files:
        if room > 0:
            chosen.append((path, name, 0, math.inf if room >= size else room))
        room -= size
    return chosen


def read_documents(files, skipped, max_document_bytes=10_000_000):
    """Yields a dict {text, id, source, bytes, prompt_chars, ...} for each document in files, as find_files gives
    them.

    A .jsonl file holds one document a line, a .wet file one a record of Common Crawl, a .parquet file one a row,
    with `text`, or `prompt` and its `canonical_solution` or `completion`; a dataset's .bin holds documents too.
    Any other file is one document. `skipped` counts, by reason, what cannot be used."""
    for path, name, begin, end in files:
        kind = suffix_of(path)
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                if kind in RECORDS:
                    records = read_lines(file, 8 * max_document_bytes, skipped, begin, end)
                elif kind in CRAWL:
                    records = read_crawl(file, max_document_bytes, end)
                elif kind == ".parquet":
                    records = read_parquet(path)
                elif kind == ".bin":
                    records = read_dataset(path)
                else:
                    records = [(name, {"text": file.read(max_document_bytes + 1)})]
                for key, record in records:
                    defaults = {"id": f"{name}@{key}" if isinstance(key, int) else key, "source": printable(path)}
                    document = document_of(record, defaults, skipped, max_document_bytes)
                    if document:
                        yield document
        except DAMAGED:
            skipped["damaged gzip"] += 1
        except ImportError:
            skipped["parquet, for which pyarrow is not installed (pip install pyarrow)"] += 1
        except (OSError, ValueError):
            skipped["unreadable"] += 1


def read_lines(file, limit, skipped, begin, end):
    """(offset, line) of a binary file, for lines that begin in [begin, end); those of `limit` bytes and more are
    skipped without being held."""
    in_line = begin > 0  # within a line that began before
    file.seek(begin - in_line)
    while file.tell() < end:
        offset = file.tell()
        line = file.readline(limit)
        if not line:
            return
        is_whole = len(line) < limit or line.endswith(b"\n")
        if not in_line and not is_whole:
            skipped["too large"] += 1
        elif not in_line and line.strip():
            yield offset, line
        in_line = not is_whole


def read_crawl(file, limit, end):
    """Common Crawl's WET: (address, {text, web}) of its records of type `conversion`."""
    while file.tell() < end:
        line = file.readline(1 << 16)
        if not line:
            return
        if line.startswith(b"WARC/"):
            rows = iter(lambda: file.readline(1 << 16).strip(), b"")
            head = dict(row.decode(errors="replace").partition(": ")[::2] for row in rows)
            length = int(head.get("Content-Length", ""))
            text = file.read(min(length, limit + 1))
            if len(text) < min(length, limit + 1):
                raise EOFError
            file.seek(length - len(text), os.SEEK_CUR)
            if head.get("WARC-Type") == "conversion":
                yield head.get("WARC-Target-URI", "?"), {"text": text, "web": True}


def read_parquet(path):
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path) as file:  # (its errors are OSErrors)
        yield from enumerate(row for batch in file.iter_batches(1000) for row in batch.to_pylist())


def read_dataset(path):
    """The documents of a dataset's train.bin or val.bin, a problem's prompt apart."""
    from model import Tokenizer
    folder, file = os.path.split(path)
    split = file.removesuffix(".bin")
    dataset = open_dataset(folder)
    tokenizer = Tokenizer.load(folder)
    tokens = getattr(dataset, split)
    mask = getattr(dataset, f"{split}_mask")
    begin = 0
    for number, end in enumerate(dataset.ends(split).tolist()):
        answer = begin if mask is None else begin + int((mask[begin:end] == 0).sum())
        prompt, text = tokenizer.decode(tokens[begin:answer]), tokenizer.decode(tokens[answer:end - 1])
        yield number, {"prompt": prompt, "completion": text} if prompt else {"text": text}
        begin = end


def document_of(record, defaults, skipped, max_bytes):
    """A line of JSON, or what it holds -> defaults | record | {text, bytes, prompt_chars}, with newlines as line
    ends; None, with the reason counted, if unusable. A problem's prompt ends before its last newline, so that
    newline and indentation, which are one token, belong to the completion."""
    reason = None
    try:
        record = json.loads(record) if isinstance(record, bytes) else record
        record = record if isinstance(record, dict) else {}
        prompt = record.get("prompt")
        solution = record.get("canonical_solution", record.get("completion"))
        is_problem = isinstance(prompt, str) and isinstance(solution, str)
        text = prompt + solution if is_problem else record.get("text")
        raw = text.encode() if isinstance(text, str) else text
        if not isinstance(raw, bytes):
            reason = "no text in record"
        elif len(raw) > max_bytes:
            reason = "too large"
        elif b"\0" in raw:
            reason = "binary"
        else:
            text = raw.decode("utf-8-sig")
            reason = None if text.strip() else "empty"
    except UnicodeError:  # bad bytes, or half a surrogate pair in JSON
        reason = "invalid UTF-8"
    except (ValueError, RecursionError):
        reason = "invalid JSON"
    if reason:
        skipped[reason] += 1
        return None
    if not is_problem:  # there every character has its place
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    key = record.get("task_id") or record.get("path") or defaults["id"]
    prompt_chars = len(prompt.rstrip()) if is_problem else 0
    return defaults | {"id": key} | record | {"text": text, "bytes": len(text.encode()),
                                              "prompt_chars": prompt_chars}


# ---------------------------------------------------------------- rules: document -> the reason to drop it, or None

GENERATED = re.compile(r"auto-?(?:matically)?[ -]?generated|@generated|do not (?:edit|modify)", re.I)
COMMENT = re.compile(r"\"{3}[\s\S]*?\"{3}|'{3}[\s\S]*?'{3}|#[^\n]*")
CODE_LINE = re.compile(r"\s*(?:(?:def|class|import|from|return|if|for|while|else|elif|try|function|var|const|let|int"
                       r"|void|fn|#include)\b|[\w.\[\]]+ [-+*/]?= |//|[{}@])|.*[;{})]\s*$")
ALNUM = bytes(i for i in range(256) if i >= 128 or chr(i).isalnum())
PUNCTUATION = string.punctuation + "’“”‘–—…•«»¿¡"
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
FILLER = re.compile("lorem ipsum|javascript (?:is|must be|to be) (?:enabled|disabled)|enable javascript", re.I)
FINISHED = tuple(".!?\"':;)”")
SCRIPTS = {"ja": "[\u3040-\u30ff]", "ko": "[\uac00-\ud7af]", "zh": "[\u4e00-\u9fff]", "hi": "[\u0900-\u097f]",
           "bn": "[\u0980-\u09ff]", "ar": "[\u0600-\u06ff]", "ru": "[\u0400-\u04ff]"}
# words that are frequent in English and rare in other languages
ENGLISH = set("the and to of that with this you your which from are been be by it its has had would could there "
              "their they what when who how can than these those".split())


def language(text, threshold=0.08):
    """The language of prose: by its script, or English if so large a share of its words is frequent there, or "?"."""
    text = text[:5000].lower()
    n_letters = sum(map(str.isalpha, text))
    for name, script in {} if text.isascii() else SCRIPTS.items():
        share = 0.1 if name == "ja" else 0.5  # Japanese mixes in Chinese letters
        if len(re.findall(script, text)) > share * n_letters:
            return name
    words = re.findall(r"[^\W\d_]+", text)
    return "en" if words and sum(word in ENGLISH for word in words) >= threshold * len(words) else "?"


def is_code(document):
    """Code or prose, by the suffix of the id, or by its lines where there is none."""
    suffix = suffix_of(str(document["id"]))
    if suffix in CODE or suffix in PROSE:
        return suffix in CODE
    lines = [line for line in document["text"][:20000].splitlines() if line.strip()]
    return sum(bool(CODE_LINE.match(line)) for line in lines) > 0.4 * len(lines)


def quietly(parse, text):
    """parse(text, ...), or None for a text that is not Python. (symtable.symtable takes an eighth of the time of
    ast.parse.)"""
    with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        warnings.simplefilter("ignore")  # old escapes in strings are not our business
        return parse(text, "<document>", "exec")


def first_reason(checks):
    """Makes of a generator of (reason, whether it holds) a function that returns the first reason that holds."""
    return functools.wraps(checks)(lambda *args: next((reason for reason, holds in checks(*args) if holds), None))


@first_reason
def code_rule(text, name):
    """The Stack's and StarCoder's rules for source files, then phi-1's wish for explained code."""
    lines = text.splitlines()
    raw = text.encode()
    yield "too short", len(raw) < 100
    yield "minified", max(map(len, lines)) > 1000 or len(text) > 100 * len(lines)
    yield "few letters and digits", len(raw.translate(None, ALNUM)) > 0.75 * len(raw)
    yield "generated", GENERATED.search(text[:2000])
    if name.endswith(".py"):
        yield "test", re.search(r"\btest", name.replace("_", " "))
        code_share = len(COMMENT.sub("", text)) / len(text)
        yield "no code", code_share < 0.1
        yield "no documentation", code_share > 0.98
        yield "does not parse", not quietly(symtable.symtable, text)


@first_reason
def gopher_rule(text):
    """Gopher's quality and repetition rules (arXiv 2112.11446, table A1), words split at whitespace."""
    words = text.split()
    lines = text.splitlines()
    n = len(words)
    real_words = [word for word in words if word.strip(PUNCTUATION)]
    yield "fewer than 50 words", len(real_words) < 50
    yield "more than 100,000 words", len(real_words) > 100_000
    yield "mean word length", not 3 <= sum(map(len, real_words)) / len(real_words) <= 10
    yield "symbols", max(text.count("#"), text.count("…") + text.count("...")) > 0.1 * n
    yield "bullet list", sum(line.lstrip().startswith(("•", "-", "*")) for line in lines) > 0.9 * len(lines)
    yield "lines that break off", sum(line.rstrip().endswith(("...", "…")) for line in lines) > 0.3 * len(lines)
    yield "few words with letters", len(re.findall(r"[^\s\W\d_]\S*", text)) < 0.8 * n
    yield "no stop words", len(STOP_WORDS.intersection(words)) < 2
    for unit, pieces in ("paragraphs", re.split(r"\n{2,}", text.strip())), ("lines", re.split(r"\n+", text)):
        counts = Counter(pieces)
        repeated_chars = sum(len(piece) * (count - 1) for piece, count in counts.items())
        yield f"repeated {unit}", len(pieces) - len(counts) > 0.3 * len(pieces)
        yield f"repeated {unit}", repeated_chars > 0.2 * len(text)
    yield from repeated_phrases(words, len(text))


def repeated_phrases(words, n_chars):
    """Gopher's shares of characters in repeated n-grams: in the most frequent one (2 to 4 words), in any (5 to 10)."""
    n = len(words)
    hashes = np.fromiter(map(hash, words), np.int64, n).view(np.uint64)
    lengths = np.fromiter(map(len, words), np.int64, n)
    offsets = np.append(0, np.cumsum(lengths))
    grams = hashes
    for size in range(2, 11):  # grams[i] stands for the words i ... i + size - 1
        grams = splitmix64(grams[:-1] + hashes[size - 1:] * np.uint64(2 * size + 1))
        order = grams.argsort()
        repeats = grams[order[1:]] == grams[order[:-1]]
        if not repeats.any():
            return
        if size < 5:
            starts = np.flatnonzero(np.append(True, ~repeats))
            counts = np.diff(starts, append=len(grams))
            i = order[starts[counts.argmax()]]
            n_repeated = counts.max() * (offsets[i + size] - offsets[i])
            yield "one phrase again and again", n_repeated > (0.24 - 0.02 * size) * n_chars
        else:  # words of any phrase that stands there twice, but once
            covered = np.zeros(n, bool)
            covered[order[1:][repeats][:, None] + np.arange(size)] = True
            yield "repeated phrases", lengths[covered].sum() > (0.2 - 0.01 * size) * n_chars


@first_reason
def prose_rule(text):
    """Gopher's rules, then those of C4 (arXiv 1910.10683) and FineWeb (2406.17557) on lines."""
    reason = gopher_rule(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    yield reason, reason
    yield "filler", FILLER.search(text)
    yield "few finished lines", sum(line.endswith(FINISHED) for line in lines) < 0.12 * len(lines)
    yield "short lines", sum(len(line) < 30 for line in lines) > 0.67 * len(lines)
    yield "generated", GENERATED.search(text[:500])


def quality_rule(document, rules):
    """`auto` leaves problems alone and tells code from prose: Gopher's thresholds would destroy code."""
    if rules == "none" or rules == "auto" and document["prompt_chars"]:
        return None
    if rules == "prose" or rules == "auto" and not is_code(document):
        return prose_rule(document["text"])
    return code_rule(document["text"], str(document["id"]))


def language_rule(document, languages):
    if not languages or document["prompt_chars"] or is_code(document):
        return None
    spoken = language(document["text"])
    return None if spoken in languages else spoken


# Each begins where no character before could belong to it and ends within bounds, so all take linear time.
PII_PATTERNS = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}\.[A-Za-z]{2,24}\b", "<EMAIL>"),
    (r"(?<![\d.])(?!(?:0|10|127|255)\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.)"
     r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?=\d)|(?![\d.]))){4}", "<IP>"),
    (r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[\s\S]{0,8000}?-----END [A-Z ]{0,30}PRIVATE KEY-----", "<KEY>"),
    (r"(?<![\w-])(?:AKIA[0-9A-Z]{16}|(?:gh[pousr]|hf)_\w{30,}|(?:sk|xox[baprs])-[\w-]{20,}|AIza[\w-]{35}"
     r"|eyJ[\w-]{10,}(?:\.[\w-]{10,}){2})", "<KEY>"),
    (r"(?i)((?:key|token|secret|password|passwd)['\"]?\s{0,9}[:=]\s{0,9})['\"][\w+/=.-]{16,}['\"]", r"\1'<KEY>'"))]


def redact_pii(text):
    """The text without e-mail and public IP addresses, keys and tokens, and how many of each it had."""
    counts = Counter()
    for pattern, replacement in PII_PATTERNS:
        text, counts[replacement] = pattern.subn(replacement, text)
    return text, counts


# ---------------------------------------------------------------- deduplication

N_GRAM = 5
N_PERMUTATIONS = 112


def splitmix64(x):
    """A bijection of uint64 that spreads every input bit over the output (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sha64(raws):
    """64 bits of the SHA-256, which CPUs have instructions for, of some bytes: uint64."""
    return np.frombuffer(b"".join(hashlib.sha256(raw).digest()[:8] for raw in raws), ">u8").astype(np.uint64)


@functools.lru_cache
def powers(bits, base=0x9E3779B97F4A7C15):
    """base^i and base^-i modulo 2^64 for i < 2^bits: an odd number has an inverse there."""
    return [np.cumprod(np.full(1 << bits, factor, np.uint64)) for factor in (base, pow(base, -1, 2**64))]


def word_hashes(raws):
    """Hashes of the words of some texts (bytes), uint64 (words,), and where each text's words begin in there,
    (texts + 1,).

    All texts are hashed as one buffer: with H the running sum of c_t B^t (mod 2^64), the word in [i, j) has the
    hash (H[j] - H[i]) B^-i, whatever its position. Words are runs of letters, digits and non-ASCII bytes. Fastest
    by about 128 kB."""
    joined = b"\n" + b"\n".join(raws) + b"\n"
    is_word = np.frombuffer(joined.translate(bytes(i in ALNUM for i in range(256))), bool)
    edges = np.flatnonzero(is_word[1:] != is_word[:-1])
    before, last = edges.reshape(-1, 2).T  # the byte before a word's first one, and its last one
    power, inverse = powers(max(17, len(joined).bit_length()))
    running = np.frombuffer(joined, np.uint8).astype(np.uint64)
    running *= power[:len(joined)]
    np.cumsum(running, out=running)
    bounds = np.searchsorted(before, np.cumsum([0] + [len(raw) + 1 for raw in raws]))
    return splitmix64((running[last] - running[before]) * inverse[before]), bounds


def gram_hashes(words, n):
    """Hashes of the n consecutive words from each position on, uint64 (words,); those of the last n - 1 positions
    mean nothing."""
    grams = words.copy()
    for i in range(1, n):
        grams[:-i] += words[i:] * np.uint64(2 * 0x2545F4914F6CDD1D * i + 1 & 2**64 - 1)
    return splitmix64(grams)


def minhash(texts, n_permutations=N_PERMUTATIONS):
    """MinHash signatures of word 5-grams, uint32 (documents, n_permutations): least values under
    x -> scale x mod 2^32 of mixed hashes."""
    scales = np.random.default_rng(0).integers(0, 2**31, n_permutations, np.uint32) * np.uint32(2) + np.uint32(1)
    signatures = np.empty((len(texts), n_permutations), np.uint32)
    done = 0
    for raws in batches((text.encode() for text in texts), 1 << 17):
        words, bounds = word_hashes(raws)
        grams = (gram_hashes(words, N_GRAM) >> np.uint64(32)).astype(np.uint32)
        shingles = []
        for raw, i, j in zip(raws, bounds, bounds[1:]):
            is_long = j - i >= N_GRAM  # a text too short for a gram resembles only itself
            shingles.append(grams[i:j - N_GRAM + 1] if is_long else np.frombuffer(digest(raw), np.uint32)[:1])
        starts = np.cumsum([0] + [len(own) for own in shingles])[:-1]
        shingles = np.concatenate(shingles)
        permuted = np.empty_like(shingles)
        for k, scale in enumerate(scales):
            np.multiply(shingles, scale, out=permuted)
            signatures[done:done + len(raws), k] = np.minimum.reduceat(permuted, starts)
        done += len(raws)
    return signatures


def lsh_shape(threshold):
    """(bands, rows a band) of a signature, with the most rows by which 9 of 10 pairs of just this similarity share
    a band. Example: lsh_shape(0.8) == (14, 8)"""
    shapes = [(N_PERMUTATIONS // rows, rows) for rows in range(N_PERMUTATIONS, 0, -1)]
    return next((shape for shape in shapes if 1 - (1 - threshold ** shape[1]) ** shape[0] >= 0.9), shapes[-1])


def lsh_band_hashes(signatures, threshold):
    """uint64 (bands, documents): equal where all values of a band are."""
    n_bands, n_rows = lsh_shape(threshold)
    hashes = np.zeros((n_bands, len(signatures)), np.uint64)
    for band in range(n_bands):
        for column in signatures.T[band * n_rows:(band + 1) * n_rows]:
            hashes[band] = splitmix64(hashes[band] + column + np.uint64(1))
    return hashes


def candidate_pairs(keys, reach=4):
    """Pairs (m, 2) of indices with equal keys: each with the next `reach` ones and with its bucket's first, so a
    bucket of n gives 5n pairs, not n^2."""
    order = keys.argsort(kind="stable")
    keys = keys[order]
    place = np.arange(len(keys))
    is_first = np.append(True, keys[1:] != keys[:-1])[:len(keys)]
    first = np.maximum.accumulate(np.where(is_first, place, 0))
    pairs = [np.stack([first, place])[:, ~is_first]]
    for step in range(1, reach + 1):
        left = np.flatnonzero(keys[step:] == keys[:-step])
        pairs.append(np.stack([left, left + step]))
    return np.unique(order[np.concatenate(pairs, 1)].T, axis=0)


def connected_components(pairs):
    """(nodes, component of each) of the graph of these pairs: every node takes the least label among its
    neighbours, and its label's label."""
    nodes, pairs = np.unique(pairs, return_inverse=True)
    pairs = pairs.reshape(-1, 2)
    label = np.arange(len(nodes))
    while True:
        previous = label.copy()
        lowest = label[pairs].min(1)
        for side in pairs.T:
            np.minimum.at(label, label[side], lowest)
            np.minimum.at(label, side, lowest)
        label = label[label]
        if np.array_equal(label, previous):
            return nodes, label


def spanning_pairs(pairs):
    """The fewest pairs that connect what these connect: each node, but the first of its component, with that one."""
    nodes, label = connected_components(pairs)
    return np.stack([nodes[label], nodes], 1)[label != np.arange(len(nodes))]


# ---------------------------------------------------------------- decontamination

FUNCTION = re.compile(r"^(?=(([ \t]*)(?:async )?def [^\n]*\n(?:(?:\2[ \t)][^\n]*)?\n)*))", re.M)
SIGNS = np.frombuffer(b"+-*/%<>=()[]{}.,:|&", np.uint8)


class Separators(dict):
    """For str.translate: punctuation, symbols, spaces and controls become a space, what is invisible nothing."""

    def __missing__(self, code):
        category = unicodedata.category(chr(code))
        # format characters, the grapheme joiner, variation selectors
        is_invisible = category == "Cf" or code == 0x034F or 0xFE00 <= code < 0xFE10
        self[code] = None if is_invisible else " " if category[0] in "PSZC" else code
        return self[code]


SEPARATORS = Separators()


def fold(text):
    """A text as decontamination compares it: lower case, NFKC, spaces for the punctuation that is not ASCII.

    ASCII needs no more than lower(), for word_hashes leaves its punctuation out; so only words that are not ASCII
    are looked at. (No character composes with a space or a line end before it, so words can be normalized one by
    one.)"""
    if not text.isascii():
        text = re.sub(r"[^\x00-\x7f\s]*[^\x00-\x7f][^ \n]*", fold_word, text)
    return text.lower()


def fold_word(match):
    return unicodedata.normalize("NFKC", match[0]).translate(SEPARATORS)


def words_of(text):
    """The words that word_hashes hashes, of a folded text."""
    return re.findall(rb"[0-9a-z\x80-\xff]+", fold(text).encode())


def strings_in(value):
    """All strings in a value of JSON, in their order."""
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in values for text in strings_in(item)]


def syntax_tree(source):
    """(name, labels of the nodes, level by level) of a function's syntax tree, or None: without documentation,
    annotations and chosen names."""
    body = getattr(quietly(ast.parse, textwrap.dedent(source)), "body", None)
    if not body or not isinstance(body[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    function = body[0]
    function.body = function.body[ast.get_docstring(function) is not None:]
    function.returns = None
    for argument in function.args.args:
        argument.annotation = None
    labels = []
    for node in ast.walk(function):
        label = type(node).__name__
        if isinstance(node, ast.Attribute):
            label = "." + node.attr
        elif isinstance(node, ast.Constant):
            label = repr(node.value)[:20]
        elif isinstance(node, ast.Name) and hasattr(builtins, node.id):
            label = node.id
        if not isinstance(node, ast.expr_context):
            labels.append(label)
    return function.name, labels


def count_signs(source):
    """How often each operator and bracket occurs in a function: what renaming leaves."""
    raw = np.frombuffer(COMMENT.sub("", source).encode(), np.uint8)
    return np.bincount(raw, minlength=256)[SIGNS]


def text_grams(raws):
    """Hashes of the 7 and 13 words from each position of some texts on; bounds as word_hashes gives them."""
    words, bounds = word_hashes(raws)
    grams = gram_hashes(words, 7)
    return {7: grams, 13: splitmix64(grams + np.uint64(3) * np.roll(grams, -6))}, bounds


class Contamination:
    """Finds documents that contain benchmark problems, or parts of them.

    By words (phi-4, arXiv 2412.08905, appendix B), folded on both sides: one 13-gram in common, or 7-grams that
    make up `overlap` of the shorter text's. Grams of few different words (lists of numbers) do not count, nor those
    of more than two problems of one file (what a benchmark says everywhere); a problem may stand in any number of
    files, and with any number of answers. By syntax (phi-1, arXiv 2306.11644, section 5): functions whose trees
    have difflib's ratio >= `match_rate`; trees below `min_nodes` do not count."""
    # The usual benchmarks' fields, in any case, `_` for a space. No `context`, `passage` or `article`: these are
    # public pages, of which a corpus may well have a copy.
    QUESTION = ("instruction goal ctx prompt premise question question_stem question_content problem "
                "problem_statement sentence input turns text").split()
    ANSWER = ("choices options endings sol1 sol2 option1 option2 choice1 choice2 canonical_solution completion "
              "answer answers best_answer correct_answer incorrect_answers incorrect_answer_1 incorrect_answer_2 "
              "incorrect_answer_3 distractor1 distractor2 distractor3 mc1_targets mc2_targets target solution "
              "solutions code").split()
    MIN_COMMON = 3  # 7-grams in common that tell anything

    def __init__(self, paths, overlap=0.6, match_rate=0.9, min_nodes=20):
        self.overlap = overlap
        self.match_rate = match_rate
        self.min_nodes = min_nodes
        self.problems = []  # (name, text)
        places = []         # of each problem: {(file, question)}, where it stands
        numbers = {}        # a problem's words -> its number
        for name, file, question, text in self.read(paths):
            i = numbers.setdefault(b" ".join(words_of(text)), len(numbers))
            if i == len(self.problems):
                self.problems.append((name, text))
                places.append(set())
            places[i].add((file, b" ".join(words_of(question or text))))
        if not any(text.strip() for _, text in self.problems):
            raise ValueError(f"--decontaminate {' '.join(map(str, paths))}: no problem found; "
                             "give JSON Lines or text files")
        self.index_grams(places)
        self.trees = []  # (problem, labels)
        signs = []
        for i, (_, text) in enumerate(self.problems):
            for source, _ in FUNCTION.findall(text + "\n"):
                tree = syntax_tree(source)
                if tree and len(tree[1]) >= min_nodes:
                    self.trees.append((i, tree[1]))
                    signs.append(count_signs(source))
        self.signs = np.array(signs)
        self.warn_of_unprotected()

    def read(self, paths):
        """Yields (name, file, question, question and answer) of each problem; plain texts are one file together."""
        skipped = Counter()
        for file in find_files(paths, skipped):
            path, name = file[:2]
            kind = suffix_of(name)
            try:
                records = read_jsonl(path) if kind in RECORDS else read_documents([file], skipped)
                if kind == ".parquet":
                    records = [row for _, row in read_parquet(path)]
            except ImportError:
                raise ValueError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from None
            for i, record in enumerate(records, 1):
                fields = {str(key).lower().replace(" ", "_"): value for key, value in record.items()}
                question, answer = ("\n".join(text for key in keys for text in strings_in(fields.get(key)))
                                    for keys in (self.QUESTION, self.ANSWER))
                table = path if kind in RECORDS or kind == ".parquet" else ""
                yield str(record.get("task_id", f"{name}:{i}")), table, question, f"{question}\n{answer}"
        if skipped:
            raise ValueError(f"--decontaminate {' '.join(map(str, paths))}: {dict(skipped)}; "
                             "give JSON Lines or text files")

    def index_grams(self, places):
        """index: size of a gram -> {gram: numbers of the problems that have it}; and what makes looking up fast."""
        self.index = {7: {}, 13: {}}
        for i, (_, text) in enumerate(self.problems):
            words = words_of(text)
            grams, _ = text_grams([fold(text).encode()])
            for n, owners in self.index.items():
                for k, gram in enumerate(grams[n][:max(0, len(words) - n + 1)].tolist()):
                    if len({word for word in words[k:k + n] if not word.isdigit()}) > n // 2:
                        owners.setdefault(gram, set()).add(i)

        def is_common(owners):
            files = Counter(file for file, _ in set().union(*(places[i] for i in owners)))
            return max(files.values()) > 2

        for n, owners in self.index.items():
            self.index[n] = {gram: numbers for gram, numbers in owners.items() if not is_common(numbers)}
        self.n_grams = Counter(itertools.chain(*self.index[7].values()))
        self.sorted = {n: np.sort(np.array([*owners, 2**64 - 1], np.uint64)) for n, owners in self.index.items()}
        self.table = np.zeros(1 << 20, bool)  # by the first 20 bits: most grams need no other look
        self.table[np.concatenate([*self.sorted.values()]) >> np.uint64(44)] = True

    def warn_of_unprotected(self):
        protected = {i for i, n in self.n_grams.items() if n >= self.MIN_COMMON}
        protected.update(*self.index[13].values(), (i for i, _ in self.trees))
        self.unprotected = [name for i, (name, _) in enumerate(self.problems) if i not in protected]
        if self.unprotected and int(os.environ.get("RANK", 0)) == 0:
            shown = ", ".join(self.unprotected[:5]) + (", ..." if len(self.unprotected) > 5 else "")
            print(f"decontamination: {len(self.unprotected):,} of {len(self.problems):,} problems have too few words "
                  f"of their own to be recognized, so copies of them stay: {shown}", file=sys.stderr)

    def find(self, texts):
        """{index of a text: (rule, number of the problem, what they share)}, by words."""
        found = {}
        done = 0
        for raws in batches((fold(text).encode() for text in texts), 1 << 17):
            all_grams, bounds = text_grams(raws)
            for n, owners in self.index.items():
                grams = all_grams[n]
                at = np.flatnonzero(self.table[grams >> np.uint64(44)])
                at = at[self.sorted[n][np.searchsorted(self.sorted[n], grams[at])] == grams[at]]
                texts_at = np.searchsorted(bounds, at, side="right") - 1
                common = {}
                for start, gram, d in zip(at.tolist(), grams[at].tolist(), texts_at.tolist()):
                    if start + n <= bounds[d + 1]:
                        for i in owners.get(gram, ()):
                            common.setdefault((d, i), set()).add(gram)
                for (d, i), both in sorted(common.items(), key=lambda item: len(item[1])):
                    shorter = min(self.n_grams[i], bounds[d + 1] - bounds[d] - 6)
                    if n == 13 or len(both) >= max(self.MIN_COMMON, self.overlap * shorter):
                        found[done + d] = f"{n}-gram", i, f"{len(both)} in common"
            done += len(raws)
        return found

    def find_functions(self, text):
        """The like for the functions of one text, or None. Only those whose operators resemble a problem's are
        parsed."""
        for source, _ in FUNCTION.findall(text + "\n") if self.trees and "def " in text else ():
            signs = count_signs(source)
            common = np.minimum(self.signs, signs).sum(1)
            longer = np.maximum(self.signs.sum(1), signs.sum())
            similar = np.flatnonzero(common >= (self.match_rate - 0.2) * longer)
            name, labels = len(similar) and syntax_tree(source) or ("", [])
            if len(labels) < self.min_nodes:
                continue
            matcher = difflib.SequenceMatcher(None, (), labels, autojunk=False)
            for i, other in [self.trees[k] for k in similar]:
                matcher.set_seq1(other)
                bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)  # cheapest first
                if all(bound() >= self.match_rate for bound in bounds):
                    return "syntax tree", i, f"{name}: match rate {matcher.ratio():.3f}"


# ---------------------------------------------------------------- educational value

# groups of words that the features count
WORDS = {name: [word.encode() for word in words.split()] for name, words in {
    "explanation": "because therefore thus hence means explain explains note notice consider suppose define "
                   "definition why how step then",
    "example": "example examples exercise solution answer question prints expected result sample illustrate shows "
               "usage",
    "teaching": "algorithm list number value values function sum loop sort search tree graph string index count "
                "array sequence theorem proof",
    "noise": "click subscribe cookies login copyright license todo fixme deprecated http https www warranty share "
             "buy price hack compat",
    "control": "if else elif for while return yield try except raise",
    "glue": "import self cls config settings logger assert pass kwargs isinstance"}.items()}
# first words of lines
STARTS = {name: words.split() for name, words in {
    "headers": "## ### #### === ---", "lists": "- * • 1. 2. 3. 4. 5.", "code blocks": "``` ~~~ >>> .. $",
    "comments": "# // /* #: *", "definitions": "def class async function fn func struct",
    "imports": "from import #include use require", "exits": "return yield raise"}.items()}
MARKS = {"docstrings": '"""', "assignments": " = ", "underscores": "_", "calls": "(", "stops": ".", "commas": ",",
         "colons": ":", "brackets": "["}
LETTERS = bytes(i if i >= 128 or chr(i).isalpha() else 32 for i in range(256))
CLASSES = string.ascii_letters.encode(), string.digits.encode(), string.ascii_uppercase.encode()
FEATURES = ["length", "lines", "longest line", "blank lines", "indentation", "word length", "words", "unique words",
            "sentence length", "paragraph length", "letters", "digits", "capitals", *WORDS, *STARTS, *MARKS]


@functools.lru_cache
def embedder(run):
    """(model, tokenizer), once a process."""
    import torch

    import model as models
    torch.set_num_threads(1)  # every core has a process of its own
    return models.load(run, "cpu", torch.float32)


def embedding(text, run, n_tokens=256):
    """The mean over a text's first tokens of a run's last states, float32 (d_model,): what phi-1's classifier saw
    (arXiv 2306.11644, section 2.1)."""
    import torch
    model, tokenizer = embedder(run)
    ids = tokenizer.encode(text[:16 * n_tokens])[:min(n_tokens, model.config.max_seq_len)] or [tokenizer.eot]
    with torch.inference_mode():
        return model.hidden(torch.tensor([ids]))[0].mean(0).numpy()


def features(text, run=None, max_chars=20_000):
    """What the classifier sees of a text (its first 20,000 characters): float32, shares or logarithms, named by
    FEATURES; then a run's embedding."""
    size = len(text)
    head = text[:max_chars]
    raw = head.encode()
    lines = head.split("\n")
    full = [line.lstrip() for line in lines if line.strip()]
    starts = Counter(line.split(None, 1)[0] for line in full)
    counts = Counter(raw.lower().translate(LETTERS).split())
    n = max(1, len(raw))
    n_words = max(1, counts.total())
    n_lines = max(1, len(full))
    n_sentences = 1 + sum(map(head.count, (". ", ".\n", "? ", "! ")))
    row = np.array([
        math.log1p(size), math.log1p(len(lines)), math.log1p(max(map(len, lines))), 1 - len(full) / len(lines),
        1 - sum(map(len, full)) / n, n / n_words, math.log1p(n_words), len(counts) / n_words ** 0.75,
        n_words / n_sentences, n_words / (1 + head.count("\n\n")),
        *(1 - len(raw.translate(None, letters)) / n for letters in CLASSES),
        *(sum(counts[word] for word in words) / n_words for words in WORDS.values()),
        *(sum(starts[word] for word in words) / n_lines for words in STARTS.values()),
        *(head.count(mark) / n_lines for mark in MARKS.values())], np.float32)
    return np.concatenate([row, embedding(text, run)]) if run else row


def feature_names(run):
    width = embedder(run)[0].config.d_model if run else 0
    return FEATURES + [f"embedding {i}" for i in range(width)]


class RandomForest:
    """Bagged classification trees (Breiman 2001) on features cut into 128 bins at their quantiles, over all cores.

    fit(X float32 (n, features), y 0/1 (n,)); predict_proba(X) -> float (n,), the mean share of ones in a row's
    leaves. Each tree sees half of the rows (as good as a bootstrap: Friedman and Hall 2007) and takes the best Gini
    impurity among sqrt(features) features drawn for each node, or more until one can split it. It grows by levels:
    a histogram over (node, bin, class) gives all nodes' splits at once. `importance`: each feature's share of the
    impurity removed."""
    BINS = 128
    ARRAYS = "edges feature threshold child value roots importance".split()

    def __init__(self, n_trees=100, seed=0, max_depth=16, min_leaf=2, workers=None):
        self.n_trees = n_trees
        self.seed = seed
        self.max_depth = max_depth
        self.min_leaf = min_leaf
        self.workers = workers or n_cores()

    def fit(self, X, y):
        X = np.asarray(X, np.float32)
        y = np.asarray(y)
        is_table = X.ndim == 2 and y.shape == X.shape[:1] and X.size
        if not is_table or not np.isfinite(X).all() or not np.isin(y, (0, 1)).all():
            raise ValueError(f"a forest learns from finite X (n, features) and y (n,) of 0 and 1, "
                             f"not from {X.shape} and {y.shape}")
        # bin b holds the values up to edges[:, b]
        self.edges = np.quantile(X, np.arange(1, self.BINS) / self.BINS, axis=0, method="nearest").T
        bins = self.bin(X)
        y = y.astype(np.int64)
        trees = parallel(lambda tree: self.grow(bins, y, np.random.default_rng([self.seed, tree])),
                         range(self.n_trees), self.workers, "growing trees")
        sizes = [len(tree[0]) for tree in trees]
        self.roots = np.cumsum([0] + sizes)[:-1]
        self.feature, self.threshold, self.child, self.value, gain = map(np.concatenate, zip(*trees))
        self.child += np.repeat(self.roots, sizes)
        self.importance = np.bincount(self.feature, gain, X.shape[1]) / max(gain.sum(), 1e-12)
        return self

    def bin(self, X):
        """uint8 (features, n)"""
        return np.stack([np.searchsorted(edges, column).astype(np.uint8) for edges, column in zip(self.edges, X.T)])

    def grow(self, bins, y, rng):
        """One tree's nodes: feature, threshold (bins above it go right), left child (the right one is next), value,
        gain."""
        n = bins.shape[1]
        rows = rng.permutation(n)[:n - n // 2]
        node = np.zeros(len(rows), np.int64)  # of each row, among the m nodes of this level
        begin, m = 0, 1
        levels = []
        for depth in range(self.max_depth + 1):
            n_all = np.bincount(node, minlength=m)
            n_one = np.bincount(node, y[rows], m)
            score, feature, threshold = self.best_splits(bins, y, rng, rows, node, n_all, n_one)
            gain = score - n_one ** 2 / n_all
            is_split = (score >= 0) & (gain > 1e-4) & (depth < self.max_depth)
            child = np.where(is_split, begin + m + 2 * (np.cumsum(is_split) - 1), begin + np.arange(m))
            # a leaf leads to itself
            levels.append((np.where(is_split, feature, 0), np.where(is_split, threshold, 255), child,
                           n_one / n_all, np.where(is_split, gain, 0)))
            if not is_split.any():
                break
            inside = is_split[node]
            rows, node = rows[inside], node[inside]
            goes_right = bins[feature[node], rows] > threshold[node]
            node = child[node] - begin - m + goes_right
            begin += m
            m = 2 * int(is_split.sum())
        return [np.concatenate(level) for level in zip(*levels)]

    def best_splits(self, bins, y, rng, rows, node, n_all, n_one):
        """(score, feature, threshold) of each node; score -1 where no feature can split it."""
        n_features, n = bins.shape
        m = len(n_all)
        flat = bins.ravel()
        n_drawn = max(1, round(n_features ** 0.5))
        best = np.full((3, m), -1.0)
        can_split = (n_all >= 2 * self.min_leaf) & (n_one > 0) & (n_one < n_all)
        for k, drawn in enumerate(rng.random((m, n_features)).argsort(1).T):
            if k == 0 or k >= n_drawn:  # beyond those drawn, only for nodes that none of them could split
                nodes = np.flatnonzero(can_split & ((k == 0) | (best[0] < 0)))
                inside = np.flatnonzero(np.isin(np.arange(m), nodes)[node])
                some_rows = rows[inside]
                some_nodes = node[inside]
                slot = np.cumsum(np.bincount(nodes, minlength=m)) - 1
                key = (slot[some_nodes] * self.BINS * 2) + y[some_rows]
            if not len(nodes):
                break
            counts = np.bincount(key + 2 * flat[drawn[some_nodes] * n + some_rows].astype(np.int64),
                                 minlength=len(nodes) * self.BINS * 2)
            both = counts.reshape(-1, self.BINS, 2).cumsum(1).astype(np.float32)  # (nodes, threshold, class)
            left = both.sum(2)
            right = left[:, -1:] - left
            left_one = both[:, :, 1]
            right_one = left_one[:, -1:] - left_one
            score = left_one ** 2 / np.maximum(left, 1) + right_one ** 2 / np.maximum(right, 1)
            score[np.minimum(left, right) < self.min_leaf] = -1
            at = score.argmax(1)
            score = score[np.arange(len(nodes)), at]
            better = score > best[0, nodes]
            best[:, nodes] = np.where(better, (score, drawn[nodes], at), best[:, nodes])
        return best[0], *best[1:].astype(np.int64)

    def predict_proba(self, X):
        X = np.asarray(X, np.float32)
        table = self.child << 24 | self.feature << 8 | self.threshold

        def predict(chunk):
            bins = self.bin(chunk).T.ravel()
            total = np.zeros(len(chunk))
            base = np.arange(len(chunk)) * X.shape[1]
            for root in self.roots:
                node = np.full(len(chunk), root)
                while True:
                    entry = table.take(node)
                    below = (entry >> 24) + (bins.take(base + (entry >> 8 & 65535)) > (entry & 255))
                    if np.array_equal(below, node):
                        break
                    node = below
                total += self.value.take(node)
            return total / len(self.roots)

        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            return np.concatenate([np.zeros(0), *pool.map(predict, np.array_split(X, len(X) // 16384 + 1))])

    def save(self, path, names):
        """Writes the forest, and the names of its features, as plain arrays."""
        with open(path, "wb") as file:
            np.savez_compressed(file, names=names, **{name: getattr(self, name) for name in self.ARRAYS})

    @classmethod
    def load(cls, path, names):
        """The forest that was saved there, for these features."""
        try:
            forest = cls()
            arrays = np.load(path, allow_pickle=False)
            vars(forest).update({name: arrays[name] for name in cls.ARRAYS})
            if arrays["names"].tolist() != list(names):
                raise ValueError("it was trained on other features")
        except (ValueError, KeyError, OSError, zipfile.BadZipFile, *DAMAGED) as error:
            raise ValueError(f"{path} is not a forest ({error}); make that dataset with --labels") from None
        return forest


def area_under_curve(y, p):
    """ROC AUC: how often a row of y = 1 has the larger p than one of y = 0, ties counting half."""
    _, place, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    n_one = int(y.sum())
    n_pairs = n_one * (len(y) - n_one)
    return float((ranks[y == 1].sum() - n_one * (n_one + 1) / 2) / n_pairs) if n_pairs else math.nan


def train_quality_classifier(path, seed, workers, run=None):
    """(forest, report) from labels: JSON Lines with `text` and `score` from 0 to 5, good from 3 on."""
    skipped = Counter()
    texts, y = [], []
    for record in read_jsonl(path):
        text, score = record.get("text"), record.get("score")
        if not isinstance(text, str):
            skipped["no text"] += 1
        elif not isinstance(score, (int, float)) or not 0 <= score <= 5:
            skipped["no score from 0 to 5"] += 1
        else:
            texts.append(text)
            y.append(score >= 3)
    X = np.array(parallel(functools.partial(features, run=run), texts, workers, "reading labels"))
    y = np.array(y, int)
    if not 5 <= y.sum() <= len(y) - 5 or len(y) < 20:
        raise ValueError(f"--labels {path}: {y.sum()} of {len(y)} usable labels have a score of 3 or more "
                         f"({dict(skipped)}); give at least 5 of either side and 20 in all")
    forest = RandomForest(seed=seed, workers=workers)
    fold = np.random.default_rng(seed).permutation(len(y)) % 5
    p = np.zeros(len(y))
    for k in range(5):  # each row is judged by a forest that has not seen it
        p[fold == k] = forest.fit(X[fold != k], y[fold != k]).predict_proba(X[fold == k])
    forest.fit(X, y)
    tenth = (p * 9.999).astype(int)
    names = feature_names(run)
    report = {"labels": len(y), "good": int(y.sum()), "left out": dict(skipped), "auc": area_under_curve(y, p),
              "brier": float(((p - y) ** 2).mean()),
              "calibration": {f"{k / 10 + 0.05:.2f}": round(float(y[tenth == k].mean()), 3) for k in np.unique(tenth)},
              "features": {names[i]: round(float(forest.importance[i]), 4)
                           for i in (-forest.importance).argsort()[:10]}}
    print("educational value, 5-fold cross-validated:", json.dumps(report))
    return forest, report


# ---------------------------------------------------------------- byte-pair encoding

@functools.lru_cache
def stdlib_pattern(pattern, limit=0x110000):
    r"""The tokenizer's split pattern for Python's own `re`, which lacks \p{...}: classes become ranges of the
    characters below `limit`; up to 0x10000 `re` looks them up, several times faster.

    Python's \s has four control characters more, and characters newer than its Unicode tables may split otherwise
    than in tiktoken: that touches the counts only."""
    categories = np.array([unicodedata.category(chr(i))[0] for i in range(limit)])

    def ranges(match):
        inside = categories == match[1]
        edges = np.flatnonzero(np.diff(inside, prepend=False, append=False)).reshape(-1, 2).tolist()
        return "".join(f"\\U{i:08x}-\\U{j - 1:08x}" for i, j in edges)

    def in_class(match):
        return f"[{re.sub(r'.p{(.)}', ranges, match[0].strip('[]'))}]"

    return re.compile(re.sub(r"\[.*?\]|\\p\{\w\}", in_class, pattern))


def count_pretokens(texts, workers=1):
    """Counter of the pieces that model.PATTERN splits the texts into."""
    from model import PATTERN
    full, plain = (stdlib_pattern(PATTERN, limit).findall for limit in (0x110000, 0x10000))

    def count(batch):
        return sum_counts((full if max(text, default="") > "\uffff" else plain)(text) for text in batch)

    size = sum(map(len, texts)) // (4 * workers) + 1
    return sum_counts(parallel(count, batches(texts, size), workers, "counting words"))


def learn_merges(counts, n_merges):
    """BPE on words (str -> how often): the list of merged pairs (a, b); the i-th one makes token 256 + i.

    Each step merges the pair of highest count, the smallest (a, b) among equals, until none occurs twice. All words
    lie in one array of linked symbols. A pair has a count and the positions it was seen at, which are checked when
    it is its turn; counts only fall once a pair's younger symbol is made, so a heap with outdated entries will do."""
    words = [word.encode() for word in counts]
    lengths = np.array(list(map(len, words)), np.int64)
    symbol = np.append(np.frombuffer(b"".join(words), np.uint8), 0).astype(np.int32)
    n = len(symbol) - 1
    symbol[n] = -1  # position n stands for "no neighbour"
    after = np.arange(1, n + 2, dtype=np.int32)
    before = np.arange(-1, n, dtype=np.int32)
    last = np.cumsum(lengths) - 1
    after[last] = n
    before[last - lengths + 1] = n
    weight = np.repeat(np.fromiter(counts.values(), np.int64, len(counts)), lengths)
    count, where, heap = {}, {}, []  # count, where: key -> int, positions; key = a << 20 | b
    merges = []

    def group(keys, positions):
        """Yields each distinct key with the total weight of its positions, and those positions."""
        order = keys.argsort()
        keys, positions = keys[order], positions[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        totals = np.add.reduceat(weight[positions], starts) if len(keys) else starts
        bounds = [*starts.tolist(), len(keys)]
        for key, total, i, j in zip(keys[starts].tolist(), totals.tolist(), bounds, bounds[1:]):
            yield key, total, positions[i:j]

    def add(key, total, positions):
        if total > 1:
            count[key] = total
            where[key] = positions
            heapq.heappush(heap, (-total << 40) | key)

    inner = np.flatnonzero(symbol[after[:n]] >= 0)
    for entry in group(symbol[inner].astype(np.int64) << 20 | symbol[inner + 1], inner.astype(np.int32)):
        add(*entry)
    progress = tqdm(total=n_merges, desc="merging", disable=None, leave=False)
    while heap and len(merges) < n_merges:
        entry = heapq.heappop(heap)
        key, total = entry & (1 << 40) - 1, -(entry >> 40)
        positions = where.pop(key)
        if count[key] != total:  # it has fallen since it was put on the heap
            add(key, count.pop(key), positions)
            continue
        del count[key]
        a, b = key >> 20, key & (1 << 20) - 1
        new = 256 + len(merges)
        merges.append((a, b))
        progress.update()

        at = np.sort(positions[(symbol[positions] == a) & (symbol[after[positions]] == b)])  # where it still stands
        if a == b:  # in a run a a a only every other pair can merge
            number = np.arange(len(at))
            in_run = np.append(False, at[1:] == after[at[:-1]])[:len(at)]
            at = at[(number - np.maximum.accumulate(np.where(in_run, 0, number))) % 2 == 0]
        second = after[at]
        right = after[second]
        symbol[at] = new
        symbol[second] = -1
        after[at] = right
        before[right] = at

        # neighbours now: those on the left as symbol, those on the right as symbol + 2^20; (new, new) counts as
        # right only
        left = before[at]
        has_left = (symbol[left] >= 0) & (symbol[left] != new)
        has_right = symbol[right] >= 0
        side = np.concatenate([symbol[left[has_left]], symbol[right[has_right]] + (1 << 20)])
        for neighbour, total, positions in group(side, np.concatenate([left[has_left], at[has_right]])):
            is_right, neighbour = divmod(neighbour, 1 << 20)
            if is_right:
                old, key = b << 20 | (a if neighbour == new else neighbour), new << 20 | neighbour
            else:
                old, key = neighbour << 20 | a, neighbour << 20 | new
            if old in count:
                count[old] -= total
            add(key, total, positions)
    progress.close()
    return merges


def train_bpe(texts, vocab_size, workers=None):
    """A byte-level BPE of vocab_size tokens, the five special ones included (fewer where the texts run out of
    pairs)."""
    if not 261 <= vocab_size <= 500_000:
        raise ValueError(f"a vocabulary of {vocab_size} tokens: give from 261 (bytes and special tokens) to 500,000")
    return tokenizer_of(learn_merges(count_pretokens(list(texts), workers or n_cores()), vocab_size - 261))


def tokenizer_of(merges):
    from model import Tokenizer
    tokens = [bytes([i]) for i in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    return Tokenizer({token: i for i, token in enumerate(tokens)})


# ---------------------------------------------------------------- the dataset directory

@dataclass
class Dataset:
    """What lies in data/NAME: `train` and `val`, token ids (uint16 or uint32) with an end-of-text token after each
    document; `train_mask`, uint8, 0 on a problem's prompt and 1 elsewhere, or None where there are no problems;
    `train_ends`, int64, the offset behind each document's end-of-text token, from train.ends.bin, or None in a
    dataset made before there was such a file (ends() finds them in the tokens then). All are mapped from disk.
    `meta`: meta.json."""
    path: Path
    meta: dict
    train: np.ndarray
    val: np.ndarray
    train_mask: np.ndarray = None
    val_mask: np.ndarray = None
    train_ends: np.ndarray = None
    val_ends: np.ndarray = None

    def ends(self, split):
        """Where the documents of `train` or `val` end, int64."""
        ends = getattr(self, f"{split}_ends")
        return np.flatnonzero(getattr(self, split) == self.meta["eot"]) + 1 if ends is None else ends


def open_dataset(path):
    """Opens a dataset directory. ValueError says what is missing or cut."""
    path = Path(path)
    arrays = {}
    try:
        meta = json.loads((path / "meta.json").read_text())
        for split, kind in itertools.product(("train", "val"), ("", ".mask", ".ends")):
            file = path / f"{split}{kind}.bin"
            if kind and file.name not in meta.get("files", os.listdir(path)):
                continue
            dtype = np.dtype({"": meta["dtype"], ".mask": "uint8", ".ends": "int64"}[kind])
            n_bytes = meta[split]["documents" if kind == ".ends" else "tokens"] * dtype.itemsize
            if file.stat().st_size != n_bytes:
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes where meta.json promises {n_bytes}")
            arrays[split + kind.replace(".", "_")] = np.memmap(file, dtype, "r") if n_bytes else np.zeros(0, dtype)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a dataset ({error}); "
                         f"make it with python data.py --name {path.name} --out {path.parent} ...") from None
    return Dataset(path, meta, **arrays)


def encode(documents, tokenizer, dtype):
    """Documents -> (token ids, mask, ends), as class Dataset has them; a problem's prompt is encoded apart."""
    ids, mask, ends = [np.zeros(0, dtype)], [np.zeros(0, np.uint8)], []
    eot = np.array([tokenizer.eot], dtype)
    for document in documents:
        text, n_chars = document["text"], document["prompt_chars"]
        prompt, answer = (np.array(tokenizer.encode(part), dtype) for part in (text[:n_chars], text[n_chars:]))
        ids += [prompt, answer, eot]
        mask += [np.zeros(len(prompt), np.uint8), np.ones(len(answer) + 1, np.uint8)]
        ends.append(len(prompt) + len(answer) + 1)
    return np.concatenate(ids), np.concatenate(mask), np.cumsum(ends, dtype=np.int64)


def keep_larger(path, n_bytes):
    """Renames a dataset of more text than the n_bytes about to take its place: less never replaces more."""
    try:
        meta = open_dataset(path).meta
    except ValueError:  # none there, or damaged
        return
    size = meta["train"]["bytes"] + meta["val"]["bytes"]
    old = path.with_name(f"{path.name}.old-{meta.get('fingerprint', 'none')[:8]}")
    if size > n_bytes:
        if not old.exists():  # its name tells its contents: once is enough
            os.replace(path, old)
        print(f"{path} held {size:,} bytes of text, more than the new one's {n_bytes:,}; "
              f"it is kept as {old} (delete it if nobody needs it)")


# ---------------------------------------------------------------- the funnel

def split_files(files):
    """Lists of files of about a thirty-second of the input, at most 128 MB; large JSON Lines are cut into spans of
    lines."""
    sizes = [min(os.path.getsize(path), end) for path, _, _, end in files]
    part_size = min(max(sum(sizes) // 32, 1 << 18), 1 << 27)
    spans = []
    for (path, name, _, end), size in zip(files, sizes):
        can_cut = suffix_of(path) in RECORDS and not path.endswith(".gz")
        starts = range(0, int(size), part_size) if can_cut else [0]
        spans += [(path, name, start, stop) for start, stop in zip(starts, [*starts[1:], end])]
    return list(batches(spans, part_size, lambda span: min(span[3], os.path.getsize(span[0])) - span[2] + 1000))


def make_part(files, rules, options):
    """One part: the documents of these files that pass every rule, and what later stages need of each."""
    skipped, dropped, dropped_bytes, redacted, read = (Counter() for _ in range(5))
    examples = {stage: [] for stage in rules}
    kept = []
    for document in read_documents(files, skipped):
        read.update(documents=1, bytes=document["bytes"])
        verdicts = ((stage, rule(document)) for stage, rule in rules.items())
        stage, reason = next(filter(lambda verdict: verdict[1], verdicts), (None, None))
        if reason:
            dropped[f"{stage}: {reason}"] += 1
            dropped_bytes[f"{stage}: {reason}"] += document["bytes"]
            shown = [digest(document["text"]).hex(), str(document["id"]), reason, document["text"][:300]]
            examples[stage] = sorted([*examples[stage], shown])[:5]
            continue
        is_web = options.redact_pii == "all" or options.redact_pii == "web" and document.get("web")
        if is_web and not document["prompt_chars"]:
            document["text"], counts = redact_pii(document["text"])
            redacted.update(counts)
        kept.append(document)
    texts = [document["text"] for document in kept]
    raws = [text.encode() for text in texts]
    n_permutations = N_PERMUTATIONS if options.dedup_threshold < 1 else 0
    signatures = minhash(texts, n_permutations)
    return {"read": read, "skipped": skipped, "dropped": dropped, "dropped_bytes": dropped_bytes,
            "redacted": redacted, "examples": examples, "ids": [str(document["id"]) for document in kept],
            "text": np.frombuffer(b"".join(raws), np.uint8), "size": np.array(list(map(len, raws)), np.int64),
            "prompt": np.array([document["prompt_chars"] for document in kept], np.int64),
            "hash": sha64(raws), "signatures": signatures,
            "bands": lsh_band_hashes(signatures, options.dedup_threshold if n_permutations else 1)}


def range_of(keys, n):
    """Which of n equal ranges of uint64 each key lies in."""
    return (keys >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)


class Funnel:
    """All documents that passed the rules, those of all parts in a row, and what becomes of them: `alive` marks
    those that are left, `rows` counts what went in and out of each stage and why, `examples` shows some.

    Of each document it holds size, place, hash and order in memory; texts and signatures stay in the parts."""

    def __init__(self, store, parts, stages, seed, unread, bytes_in):
        self.store = store
        self.parts = parts
        self.base = np.cumsum([0] + [len(part("size")) for part in parts])  # where each part begins
        self.alive = np.ones(self.base[-1], bool)
        self.size = self.column("size")
        self.start = np.cumsum(self.size) - self.size
        self.hash = self.column("hash")
        self.order = splitmix64(self.hash + splitmix64(np.uint64([seed + 1])))
        read = self.total("read")
        skipped = self.total("skipped") + unread
        self.rows = [{"stage": "read", "documents_in": read["documents"] + skipped.total(), "bytes_in": bytes_in,
                      "documents_out": read["documents"], "bytes_out": read["bytes"], "dropped": skipped}]
        self.examples = {}
        dropped = self.total("dropped")
        dropped_bytes = self.total("dropped_bytes")
        for stage in stages:
            self.begin(stage)
            for reason, n in dropped.most_common():
                if reason.startswith(f"{stage}: "):
                    self.count(reason.removeprefix(f"{stage}: "), n, dropped_bytes[reason])
            shown = itertools.chain(*(part("examples")[stage] for part in parts))
            self.examples[stage] = [example[1:] for example in sorted(shown)[:5]]

    def total(self, name):
        return sum_counts(part(name) for part in self.parts)

    def column(self, name):
        return np.concatenate([part(name) for part in self.parts] or [np.zeros(0, np.int64)])

    def pieces(self):
        """(part, which of its documents are left, the index of its first one) of each part"""
        return zip(self.parts, np.split(self.alive, self.base[1:-1]), self.base)

    def take(self, name, index):
        """Rows of an array of the parts, by the documents' indices."""
        owner = np.searchsorted(self.base, index, side="right") - 1
        found = [(owner == p, self.parts[p](name)) for p in np.unique(owner)]
        rows = np.empty((len(index), *found[0][1].shape[1:]), found[0][1].dtype) if found else np.zeros(0)
        for (mask, array), p in zip(found, np.unique(owner)):
            rows[mask] = array[index[mask] - self.base[p]]
        return rows

    def document(self, i):
        p = np.searchsorted(self.base, i, side="right") - 1
        part = self.parts[p]
        start = self.start[i] - self.start[self.base[p]]
        text = bytes(part("text")[start:start + self.size[i]]).decode()
        number = i - self.base[p]
        return {"id": part("ids")[number], "text": text, "prompt_chars": int(part("prompt")[number])}

    def begin(self, stage):
        """Opens the row of a stage."""
        n = self.rows[-1]["documents_out"]
        n_bytes = self.rows[-1]["bytes_out"]
        self.rows.append({"stage": stage, "documents_in": n, "bytes_in": n_bytes, "documents_out": n,
                          "bytes_out": n_bytes, "dropped": {}})

    def count(self, reason, n, n_bytes):
        row = self.rows[-1]
        row["dropped"][reason] = n
        row["documents_out"] -= n
        row["bytes_out"] -= n_bytes

    def drop(self, reason, mask):
        """Takes documents out of those that are left, for this reason, in the stage that is open."""
        mask = mask & self.alive
        self.alive ^= mask
        self.count(reason, int(mask.sum()), int(self.size[mask].sum()))
        self.examples.setdefault(self.rows[-1]["stage"], []).extend(self.sample(mask, reason))

    def sample(self, mask, reason=""):
        """[(id, reason, beginning)] of the first five of some documents in the final order."""
        documents = map(self.document, self.in_order(mask)[:5])
        return [(document["id"], reason, document["text"][:300]) for document in documents]

    def in_order(self, mask):
        index = np.flatnonzero(mask)
        return index[self.order[index].argsort()]

    def bottom_n(self, keys, n):
        """Of those that are left, the n of the least keys: a mask."""
        if n < 1:
            return np.zeros_like(self.alive)
        return self.alive & (keys <= np.partition(keys[self.alive], n - 1)[n - 1])


def drop_exact_duplicates(funnel):
    funnel.begin("exact duplicates")
    is_again = np.ones(len(funnel.alive), bool)
    is_again[np.unique(funnel.hash, return_index=True)[1]] = False
    funnel.drop("same text", is_again)


def drop_near_duplicates(funnel, threshold, per_range=8_000_000):
    """Documents that share a band of the signature are compared by the share of equal values; of each group connected
    by a similarity >= the threshold the longest stays. Returns {size of a group: how many}.

    A unit of work is one band's hashes within one range; held together is one pair for each document that has a
    copy, and those of one band more."""
    funnel.begin("near duplicates")
    n_ranges = 1 + len(funnel.alive) // per_range
    n_bands = lsh_shape(threshold)[0] if threshold < 1 else 0

    def compare(unit):
        band, r = divmod(unit, n_ranges)
        keys, index = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for part, alive, begin in funnel.pieces():
            hashes = part("bands")[band]
            inside = np.flatnonzero(alive & (range_of(hashes, n_ranges) == r))
            keys.append(hashes[inside])
            index.append(inside + begin)
        pairs = np.concatenate(index)[candidate_pairs(np.concatenate(keys))]
        is_similar = np.ones(len(pairs), bool)
        for i in range(0, len(pairs), 1 << 15):
            left, right = (funnel.take("signatures", side) for side in pairs[i:i + (1 << 15)].T)
            is_similar[i:i + (1 << 15)] = (left == right).mean(1) >= threshold
        return {"pairs": spanning_pairs(pairs[is_similar])}

    units = funnel.store.run("near duplicates", n_bands * n_ranges, compare)
    pairs = np.zeros((0, 2), np.int64)
    for first in range(0, len(units), n_ranges):  # a band
        pairs = spanning_pairs(np.concatenate([pairs, *(unit("pairs") for unit in units[first:first + n_ranges])]))
    nodes, label = connected_components(pairs)
    order = np.lexsort((nodes, -funnel.size[nodes], label))
    is_shorter = np.zeros(len(funnel.alive), bool)
    is_shorter[nodes[order[1:][np.diff(label[order]) == 0]]] = True
    funnel.drop("similar text", is_shorter)
    return Counter(np.unique(label, return_counts=True)[1].tolist())


def living_texts(funnel, p):
    """(indices, texts) of what is left of a part."""
    index = funnel.base[p] + np.flatnonzero(funnel.alive[funnel.base[p]:funnel.base[p + 1]])
    return index, [funnel.document(i)["text"] for i in index]


def decontaminate(funnel, contamination):
    """Drops what contains a benchmark's problems. Returns the records of contaminated.jsonl."""
    def check(p):
        hits = []
        index, texts = living_texts(funnel, p)
        found = contamination.find(texts)
        for k, i in enumerate(index.tolist()):
            hit = found.get(k) or contamination.find_functions(texts[k])
            if hit:
                name, problem = contamination.problems[hit[1]]
                hits.append({"index": i, "id": funnel.document(i)["id"], "text": texts[k], "rule": hit[0],
                             "evidence": hit[2], "problem": name, "problem_text": problem})
        return {"hits": hits}

    checked = funnel.store.run("decontaminate", len(funnel.parts), check)
    hits = list(itertools.chain(*(part("hits") for part in checked)))
    funnel.begin("decontaminate")
    for rule in sorted({hit["rule"] for hit in hits}):
        index = [hit["index"] for hit in hits if hit["rule"] == rule]
        funnel.drop(rule, np.isin(np.arange(len(funnel.alive)), index))
    return hits


def keep_valuable(funnel, forest, options):
    """Drops what scores below --min-score, and all but the best --keep. Returns {score: how many documents}."""
    def score(p):
        _, texts = living_texts(funnel, p)
        X = np.array([features(text, options.embed) for text in texts])
        return {"value": (forest.predict_proba(X) if texts else np.zeros(0)).astype(np.float32)}

    scored = funnel.store.run("value", len(funnel.parts), score)
    value = np.zeros(len(funnel.alive), np.float32)
    value[funnel.alive] = np.concatenate([part("value") for part in scored])
    # the best first, equal ones by their hash
    rank_key = (65535 - value * 65535).astype(np.uint64) << np.uint64(48) | funnel.hash >> np.uint64(16)
    best = funnel.bottom_n(rank_key, math.ceil(options.keep * funnel.alive.sum()))
    funnel.begin("educational value")
    counts = np.histogram(value[funnel.alive], 20, (0, 1))[0].tolist()
    funnel.drop("low score", ~best | (value < np.float32(options.min_score)))
    return {f"{i / 20:.2f} and more": n for i, n in enumerate(counts)}


def show_rows(rows):
    print(f"{'stage':<18}{'documents in':>13}{'out':>9}{'MB in':>9}{'MB out':>9}  dropped")
    for row in rows:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in row["dropped"].items() if n)
        print(f"{row['stage']:<18}{row['documents_in']:>13,}{row['documents_out']:>9,}{row['bytes_in'] / 1e6:>9.2f}"
              f"{row['bytes_out'] / 1e6:>9.2f}  {reasons or '-'}")


# ---------------------------------------------------------------- split, tokens, files

def split_validation(funnel, share):
    """Which documents are for validation, at least one on either side. The hash of a document alone decides, so the
    split never moves."""
    n = int((funnel.hash[funnel.alive] < share * 2**64).sum())
    return funnel.bottom_n(funnel.hash, min(max(n, 1), funnel.alive.sum() - 1))


def documents_of_shard(funnel, is_val, shard, n_shards, val_share):
    """[training documents, validation documents] of a range of the shuffled order, in this order."""
    index = funnel.in_order(funnel.alive & (range_of(funnel.order, n_shards) == shard))
    if funnel.alive.sum() == 1 and len(index):  # one document alone is cut: its last share is for validation
        text = funnel.document(index[0])["text"]
        cut = max(1, min(round(len(text) * (1 - val_share)), len(text) - 1))
        return [[{"text": piece, "prompt_chars": 0}] if piece else [] for piece in (text[:cut], text[cut:])]
    return [[funnel.document(i) for i in index[is_val[index] == side]] for side in (False, True)]


def make_tokens(funnel, tokenizer, vocab_size, val_share):
    """(tokenizer, the parts of train.bin, val.bin and what lies beside them); a tokenizer of None is trained."""
    is_val = split_validation(funnel, val_share)
    n_bytes = int(funnel.size[funnel.alive].sum())
    n_shards = min(max(32, n_bytes >> 27), 1 + n_bytes >> 16) + 1

    def documents(shard):
        return documents_of_shard(funnel, is_val, shard, n_shards, val_share)

    def encode_shard(shard):
        values = {}
        for split, some in zip(("train", "val"), documents(shard)):
            names = [f"{split}.bin", f"{split}.mask.bin", f"{split}.ends.bin"]
            values |= zip(names, encode(some, tokenizer, dtype))
            values[split] = {"documents": len(some), "tokens": len(values[f"{split}.bin"]),
                             "bytes": sum(len(document["text"].encode()) for document in some)}
        return values

    if tokenizer is None:
        n_counted = min(n_shards, 1 + n_shards * (2 << 30) // n_bytes)  # of at most 2 GB: a range of hashes is a sample
        counted = funnel.store.run("words", n_counted, lambda shard: {
            "words": count_pretokens([document["text"] for document in documents(shard)[0]])})
        merged, = funnel.store.run("merges", 1, lambda _: {
            "merges": learn_merges(sum_counts(part("words") for part in counted), vocab_size - 261)})
        tokenizer = tokenizer_of(merged("merges"))
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    return tokenizer, funnel.store.run("tokens", n_shards, encode_shard)


def write_dataset(path, meta, tokenizer, encoded, has_prompts, extra_files):
    """Puts the parts together. extra_files: name -> function that writes this file. Returns the counts."""
    from model import write_json
    splits = {split: dict(sum_counts(part(split) for part in encoded)) for split in ("train", "val")}
    dtype = encoded[0]("train.bin").dtype.name
    meta = {"dtype": dtype, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
            "tokenizer": tokenizer.fingerprint, **splits, **meta}
    contents = hashlib.sha256(json.dumps([dtype, tokenizer.fingerprint, *splits.values()]).encode())
    with atomic_path(path) as new:
        new.mkdir()
        for name in [f"{split}{kind}.bin" for kind in ("", ".mask", ".ends") for split in splits]:
            if ".mask" in name and not has_prompts:
                continue
            offset = 0
            with open(new / name, "wb") as file:
                for part in encoded:
                    array = part(name) + offset if ".ends" in name else np.ascontiguousarray(part(name))
                    file.write(array.data)
                    if ".ends" in name:
                        offset += len(part(name.replace(".ends", "")))
                    else:
                        contents.update(array)
        tokenizer.save(str(new))
        for name, write in extra_files.items():
            write(new / name)
        meta |= {"fingerprint": contents.hexdigest()[:32], "files": sorted(os.listdir(new))}
        write_json(str(new / "meta.json"), meta)
        keep_larger(path, sum(counts["bytes"] for counts in splits.values()))
    for split, counts in splits.items():
        print(f"{path / split}.bin: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
              f"{counts['bytes']:,} bytes")


def report_page(title, funnel, tables, classifier):
    """report.html as one string: tables of counts as bars, and examples of what each stage dropped or kept."""
    rows = funnel.rows
    reasons = {f"{row['stage']}: {reason}": n for row in rows for reason, n in row["dropped"].items()}
    left = {"found": rows[0]["documents_in"]} | {row["stage"]: row["documents_out"] for row in rows}
    page = ["<!DOCTYPE html><meta charset=utf-8><style>body{font:14px sans-serif;max-width:60em}i{display:inline-block;"
            "background:#69c;height:.9em;margin-right:.5em}pre{background:#eee;white-space:pre-wrap}</style>",
            f"<h1>{html.escape(title)}</h1>"]
    for heading, table in ({"documents left": left, "why documents were dropped": reasons} | tables).items():
        page.append(f"<h2>{heading}</h2>")
        for name, n in table.items():
            width = 40 * n / max(1, *table.values())
            page.append(f"<div><i style='width:{width:.2f}em'></i>{html.escape(str(name))} {n:,}</div>")
    page.append(f"<pre>{html.escape(json.dumps(classifier, indent=1))}</pre>" if classifier else "")
    for stage, examples in funnel.examples.items():
        page.append(f"<h2>examples: {stage}</h2>")
        for name, reason, text in examples:
            page.append(f"<p>{html.escape(f'{name} {reason}')}<pre>{html.escape(text)}</pre>")
    return "\n".join(page)


# ---------------------------------------------------------------- the command

def plan(options, tokenizer, unread):
    """(files to read, their bytes, what tells this dataset from others: options, inputs, sources)."""
    import model
    files = find_files(options.input, unread, options.seed, options.max_bytes)
    others = [file[:2] for file in find_files(options.decontaminate or [], Counter())]
    if options.labels or options.classifier:
        path = options.labels or f"{options.classifier}/classifier.npz"
        others.append((path, path))
    if options.embed:
        run = Path(model.snapshot_download(options.embed))
        patterns = "*.safetensors", "*.bin", "config.json", "tokenizer.json"
        others += sorted((file, file.name) for pattern in patterns for file in run.glob(pattern))
    states = [(name, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path, name, *_ in [*files, *others]]
    # every token comes from model.py's tokenizer; what a fork changes there or here changes the dataset
    sources = [__file__, model.__file__, *([model.kernels.__file__] if options.embed else [])]
    made_by = {"options": {name: value for name, value in vars(options).items() if name not in ("workers", "out")},
               "inputs": digest(json.dumps([states, tokenizer and tokenizer.fingerprint])).hex(),
               "sources": {os.path.basename(file): digest(Path(file).read_bytes()).hex() for file in sources}}
    return files, sum(size for _, size, _ in states[:len(files)]), made_by


def reusable(path, made_by):
    """Whether the dataset is there and whole, on all machines, and made by the same; refuses to replace what is no
    dataset."""
    is_made = False
    with contextlib.suppress(ValueError, OSError):  # damaged: replace it
        meta = open_dataset(path).meta
        is_made = made_by.items() <= meta.items() and all((path / name).exists() for name in meta["files"])
    answers = all_gather((made_by, is_made))
    if any(other != made_by for other, _ in answers):
        raise ValueError("the machines see different files; let --input and --out lie in a folder that they share")
    if not is_made and path.exists() and not (path / "meta.json").exists():
        if not path.is_dir() or any(path.iterdir()):
            raise FileExistsError(f"{path} exists and is not a dataset; choose another --name or --out")
    return all(made for _, made in answers)


def load_tokenizer(spec):
    """(tokenizer, 0), or (None, the size of the one to train)."""
    from model import Tokenizer
    if not spec.startswith("train:"):
        return Tokenizer.load(spec), 0
    size = spec.removeprefix("train:")
    if not size.isdecimal() or not 261 <= int(size) <= 500_000:
        raise ValueError(f"--tokenizer {spec}: give train:N with N from 261 (bytes and five special tokens) to 500,000")
    return None, int(size)


def load_classifier(options, workers):
    """(forest, report of its training); None without labels."""
    if options.labels:
        return train_quality_classifier(options.labels, options.seed, workers, options.embed)
    if options.classifier:
        return RandomForest.load(f"{options.classifier}/classifier.npz", feature_names(options.embed)), {}
    if options.keep < 1 or options.min_score:
        raise ValueError("--keep and --min-score need --labels FILE (synth.py label writes one) or --classifier DATASET")
    return None, {}


def build(options, rank=0, world_size=1):
    """Makes the dataset that the options (see main) describe, or finds it made; returns its directory."""
    begun = time.time()
    path = Path(options.out) / options.name
    workers = options.workers or n_cores()
    unread = Counter()
    tokenizer, vocab_size = load_tokenizer(options.tokenizer)
    files, bytes_in, made_by = plan(options, tokenizer, unread)
    if reusable(path, made_by):
        if rank == 0:
            print(f"{path}: already made, reused (delete it to make it anew)")
        return path
    contamination = Contamination(options.decontaminate) if options.decontaminate else None
    forest, classifier = load_classifier(options, workers)
    rules = {"language": functools.partial(language_rule, languages=options.language),
             "rules": functools.partial(quality_rule, rules=options.rules)}
    same_options = f".{path.name}.work-{digest(json.dumps(made_by['options'])).hex()[:16]}"
    folder = path.with_name(f"{same_options}-{digest(json.dumps(made_by)).hex()[:16]}")
    store = PartStore(folder, workers, rank, world_size)

    tasks = split_files(files)
    parts = store.run("parts", len(tasks), lambda i: make_part(tasks[i], rules, options))
    funnel = Funnel(store, parts, rules, options.seed, unread, bytes_in)
    drop_exact_duplicates(funnel)
    groups = drop_near_duplicates(funnel, options.dedup_threshold)
    extra_files = {}
    if contamination:
        hits = decontaminate(funnel, contamination)
        extra_files["contaminated.jsonl"] = lambda file: write_jsonl(file, hits)
    tables = {"redacted": funnel.total("redacted"), "groups of near duplicates, documents in each": groups}
    if forest:
        tables["scores"] = keep_valuable(funnel, forest, options)
        extra_files["classifier.npz"] = lambda file: forest.save(file, feature_names(options.embed))
    if options.max_documents:
        funnel.begin("--max-documents")
        funnel.drop("more than asked for", ~funnel.bottom_n(funnel.order, options.max_documents))
    if rank == 0:
        show_rows(funnel.rows)
    if not funnel.alive.any():
        reasons = [f"{reason}: {n}" for row in funnel.rows for reason, n in row["dropped"].items() if n]
        raise ValueError(f"--input {' '.join(options.input)}: no document is left "
                         f"({'; '.join(reasons) or 'nothing to read'}); give more text, or keep all by --rules none")
    tokenizer, encoded = make_tokens(funnel, tokenizer, vocab_size, options.val_share)
    if rank == 0:
        funnel.examples["kept"] = funnel.sample(funnel.alive)
        extra_files["report.html"] = lambda file: file.write_text(report_page(str(path), funnel, tables, classifier))
        has_prompts = funnel.column("prompt").any()
        meta = {"funnel": funnel.rows, **({"classifier": classifier} if classifier else {}), **made_by}
        write_dataset(path, meta, tokenizer, encoded, has_prompts, extra_files)
        print(f"{time.time() - begun:.1f} s; what was kept and dropped: {path / 'report.html'}")
    all_gather()  # no rank reads the parts any more
    if rank == 0:
        for other in path.parent.glob(f"{same_options}-*"):  # other options' parts wait for their own command
            shutil.rmtree(other, ignore_errors=True)
    return path


# ---------------------------------------------------------------- the command line, for all scripts

def fail(message, code=2):
    """End with one line that says what to do."""
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    def __init__(self, **more):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **more)

    def error(self, message):
        fail(f"{message}; `python {self.prog} -h` explains the options")

    def option(self, name, default, text, **more):
        """An option whose help tells its default."""
        shown = " ".join(default) if isinstance(default, list) else default
        more["help"] = text + ("" if shown in (None, False, "") else f" (default: {shown})")
        self.add_argument(name, default=default, **more)


def command(stopped="stopped"):
    """For a script's main: bad input ends it in one line with code 2, Ctrl-C with 130 and what `stopped` says,
    SIGTERM with 143."""
    def wrap(main):
        @functools.wraps(main)
        def run(*args, **more):
            try:
                # what `&` or some CI starts inherits an ignored SIGINT, which Python would leave ignored
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
                return main(*args, **more)
            except KeyboardInterrupt:
                fail(stopped, 130)
            except (ValueError, OSError) as error:
                fail(error)
        return run
    return wrap


def number(kind, low, high=math.inf):
    """An argparse type, for all scripts: a finite number from low to high; 1e6 is a whole number too."""
    def parse(text):
        value = float(text) if "e" in text else kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(value)
    parse.__name__ = kind.__name__
    return parse


def folder_name(text):
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: use letters, digits, '-', '_' and '.'; "
                                         "--out names the folder around it")
    return text


@command("stopped; no dataset was changed, and the same command goes on from here")
def main(arguments=None):
    """The command line; also for other scripts: main(["--name", "web"]) returns the dataset's directory."""
    parser = Parser(prog="data.py", description=__doc__)
    option = parser.option
    share = {"type": number(float, 0, 1), "metavar": "SHARE"}
    whole = {"type": number(int, 0), "metavar": "N"}
    option("--input", ["python"], "directories, text or code files, .jsonl, .wet, .parquet, each also .gz, datasets, "
           "URLs; `python`: this machine's own source", nargs="+", metavar="PATH")
    option("--name", "web", "name of the dataset", type=folder_name)
    option("--out", "data", "folder of the datasets", metavar="FOLDER")
    option("--tokenizer", "train:1024", "train:N makes a BPE of N tokens; or a directory, a tokenizer.json, gpt2, "
           "cl100k_base, o200k_base, bytes", metavar="SPEC")
    option("--language", None, "keep code and these languages: en, and by their scripts ar bn hi ja ko ru zh",
           nargs="+", metavar="CODE")
    option("--rules", "auto", "quality rules; auto tells code from prose and leaves problems alone",
           choices=["auto", "code", "prose", "none"])
    option("--redact-pii", "web", "mask addresses, keys and tokens in pages of a crawl, or in all documents",
           choices=["web", "all", "none"])
    option("--dedup-threshold", 0.8, "Jaccard similarity of word 5-grams of near duplicates; 1: only equal texts go, "
           "as is right for exercises", **share)
    option("--decontaminate", None, "problems or texts: documents with one are dropped, and written to "
           "contaminated.jsonl", nargs="+", metavar="FILE")
    option("--labels", None, "JSON Lines with `text` and `score` 0 to 5 (good from 3 on): a forest learns what is worth "
           "keeping", metavar="FILE")
    option("--classifier", None, "use the forest of this dataset instead of --labels", metavar="DATASET")
    option("--embed", None, "let the forest see a run's mean last states of each text too, as phi-1 did", metavar="RUN")
    option("--keep", 1.0, "share of the documents to keep, the best-scored", **share)
    option("--min-score", 0.0, "least predicted probability of being good", **share)
    option("--max-bytes", 0, "read a sample of about so many bytes; 0: everything", **whole)
    option("--max-documents", 0, "keep at most so many documents; 0: all", **whole)
    option("--val-share", 0.01, "share of the documents for validation, at least one", type=number(float, 0, 0.9),
           metavar="SHARE")
    option("--workers", 0, "processes; 0: one a core", **whole)
    option("--seed", 0, "of the sample and of the documents' order", type=int)
    options = parser.parse_args(arguments)
    with process_group() as (rank, world_size):
        return build(options, rank, world_size)


if __name__ == "__main__":
    main()

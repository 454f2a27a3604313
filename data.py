"""Documents -> clean, deduplicated, scored text -> tokens: `python data.py` makes data/web from this
machine's own Python source.

    parts          directories, text and code files, JSON Lines, WET, parquet, URLs, datasets; gzipped or not
    rules          language_rule, quality_rule: document -> the reason to drop it, or None
    exact, near    equal texts; of texts that MinHash calls similar the longest stays
    decontaminate  what contains a benchmark's problems goes (class Contamination)
    value          a random forest keeps what teaches most, as learned from labels (synth.py label)
    split, tokens  -> data/NAME/{train.bin, val.bin, tokenizer.json, meta.json, report.html}

Work is cut into numbered parts on disk: a stopped command goes on where it was, and the result is the same
for any number of processes and machines (`torchrun data.py ...` with a folder that all share). Texts stay on
disk; a rank holds 17 bytes a document in memory, and 100 more while it counts a stage's reasons (Funnel)."""
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
import tempfile
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

RANK = int(os.environ.get("RANK", 0))  # torchrun's variables
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
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
    try:
        fork = multiprocessing.get_context("fork")
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


def digest(text):
    """16 bytes"""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def sum_counts(counters):
    total = Counter()
    for counter in counters:
        total.update(counter)
    return total


def print0(*words):
    if RANK == 0:
        print(*words)


def all_gather(value=None):
    """[the value of each rank]; also the barrier."""
    if WORLD_SIZE == 1:
        return [value]
    import torch.distributed as dist
    values = [None] * WORLD_SIZE
    try:
        dist.all_gather_object(values, value)
    except RuntimeError:
        raise OSError("another rank ended, and its own message says why; "
                      "the same command goes on from here") from None
    return values


def leave(code=0):
    """End the process, on all ranks together: when one is gone, torchrun kills those still at work."""
    all_gather()
    sys.stdout.flush()
    if WORLD_SIZE > 1:
        os._exit(code)  # in Python's shutdown a thread of the process group aborts once in some hundred runs
    raise SystemExit(code)


@contextlib.contextmanager
def atomic_path(path):
    """A path for a file or folder that takes the place of `path`, safely on disk, when all went well, and
    vanishes when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        new = Path(scratch, "new")
        old = Path(scratch, "old")
        yield new
        for file in (*new.rglob("*"), new):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        try:
            if path.is_dir():
                os.replace(path, old)
            os.replace(new, path)
        finally:
            if old.exists() and not path.exists():  # stopped between the two
                os.replace(old, path)


def run_parts(folder, workers, stage, n, make):
    """Work in n numbered parts that outlive the process: part i of a stage is the folder FOLDER/STAGE/i,
    which appears whole. make(i) -> {name: array or what JSON can hold}. Returns the parts: part(name) reads
    one value, arrays mapped.

    Part i belongs to rank i mod WORLD_SIZE; one that is there is not made again; a stage ends when all ranks
    are done. A part depends on its number alone. So cores, machines on a shared folder and going on after a
    kill are one mechanism, and the result is always the same."""
    folders = [folder / stage / str(i) for i in range(n)]

    def write(i):
        with atomic_path(folders[i]) as new:
            new.mkdir()
            for name, value in make(i).items():
                if isinstance(value, np.ndarray):
                    np.save(new / name, value)
                else:
                    (new / f"{name}.json").write_text(json.dumps(value))

    todo = [i for i in range(RANK, n, WORLD_SIZE) if not folders[i].exists()]
    parallel(write, todo, workers, stage)
    all_gather()
    return [functools.partial(read_value, folder) for folder in folders]


def column(parts, name):
    return np.concatenate([part(name) for part in parts])


@functools.lru_cache(64)
def read_value(folder, name):
    path = folder / f"{name}.npy"
    if path.exists():
        return np.asarray(np.load(path, mmap_mode="r"))
    return json.loads((folder / f"{name}.json").read_text())


# ---------------------------------------------------------------- JSON Lines

def read_jsonl(path):
    """Yields the objects of a JSON Lines file (gzipped if it ends in .gz). ValueError names the broken
    line."""
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
        # neither name nor time in its header: equal records give equal files
        is_gzip = str(path).endswith(".gz")
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if is_gzip else raw as file:
            for count, record in enumerate(records, 1):
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    return count


# ---------------------------------------------------------------- reading documents

CODE = set(".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .jl .rb .sh .lua .swift .kt .cs .sql"
           .split())
PROSE = set(".txt .md .rst .tex .text".split())
RECORDS = {".jsonl", ".ndjson"}
CRAWL = {".wet", ".warc"}
READABLE = CODE | PROSE | RECORDS | CRAWL | {".parquet"}
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


def roots_of(path):
    """The files and folders that a path stands for: `python` is this interpreter's standard library and
    site-packages, a URL is fetched, a dataset is its two files of tokens."""
    if path == "python":
        return sorted({os.path.realpath(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")})
    if re.match("https?://", path):
        return [fetch(path)]
    os.lstat(path)  # FileNotFoundError
    if os.path.exists(f"{path}/train.bin"):
        return [f"{path}/train.bin", f"{path}/val.bin"]
    return [os.path.abspath(path)]


def find_files(paths, skipped, seed=0, max_bytes=0):
    """The files to read as (path, name, begin, end), for records that begin in these bytes: sorted by name,
    or about max_bytes of them in the order of a hash. Links to folders are not followed. `skipped` counts, by
    reason, what cannot be read."""
    name_of = {}  # path -> name

    def add(path, name):
        if os.path.isfile(path):  # reading a pipe or a device could wait for ever
            name_of.setdefault(path, printable(name))
        else:
            skipped["not a regular file" if os.path.exists(path) else "unreadable"] += 1

    def add_folder(top, suffixes):
        for folder, folders, names in os.walk(top, onerror=lambda error: skipped.update(["unreadable"])):
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            for name in names:
                path = os.path.join(folder, name)
                if suffix_of(name) in suffixes:
                    add(path, os.path.relpath(path, top))
                elif suffixes is READABLE:
                    skipped["not a text file"] += 1

    for path in map(str, paths):
        for top in roots_of(path):
            if os.path.isdir(top):
                add_folder(top, {".py"} if path == "python" else READABLE)
            else:
                add(top, os.path.basename(top))
    files = sorted((name, path, os.path.getsize(path)) for path, name in name_of.items())
    if max_bytes:
        files.sort(key=lambda file: digest(f"{seed} {file[0]}"))
    room = max_bytes or math.inf
    spans = []
    for name, path, size in files:
        if room > 0:
            spans.append((path, name, 0, math.inf if room >= size else room))
        room -= size
    return spans


def read_documents(files, skipped, max_document_bytes=10_000_000):
    """Yields a dict {text, id, source, bytes, prompt_chars, ...} for each document in files, as find_files
    gives them.

    A .jsonl file holds one document a line, a .wet file one a record of Common Crawl, a .parquet file one a
    row, with `text`, or `prompt` and its `canonical_solution` or `completion`; a dataset's .bin holds
    documents too. Any other file is one document. `skipped` counts, by reason, what cannot be used."""
    for path, name, begin, end in files:
        kind = suffix_of(path)
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                if kind in RECORDS:
                    records = read_lines(file, 8 * max_document_bytes, skipped, begin, end)
                elif kind in CRAWL:
                    records = read_crawl(file, max_document_bytes, end)
                elif kind == ".parquet":
                    records = enumerate(read_records(path))
                elif kind == ".bin":
                    records = read_dataset(path)
                else:
                    records = [(name, {"text": file.read(max_document_bytes + 1)})]
                for key, record in records:
                    key = f"{name}@{key}" if isinstance(key, int) else key
                    document = document_of(record, key, printable(path), skipped, max_document_bytes)
                    if document:
                        yield document
        except DAMAGED:
            skipped["damaged gzip"] += 1
        except ImportError as error:
            skipped[str(error)] += 1
        except (OSError, ValueError):
            skipped["unreadable"] += 1


def read_lines(file, limit, skipped, begin, end):
    """(offset, line) of a binary file, for lines that begin in [begin, end); those of `limit` bytes and more
    are skipped without being held."""
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


def read_records(path):
    """The objects of a JSON Lines or parquet file."""
    if suffix_of(path) in RECORDS:
        yield from read_jsonl(path)
    else:
        import pyarrow.parquet
        with pyarrow.parquet.ParquetFile(path) as file:  # (its errors are OSErrors)
            for batch in file.iter_batches(1000):
                yield from batch.to_pylist()


def read_dataset(path):
    """The documents of a dataset's train.bin or val.bin."""
    from model import Tokenizer
    folder, file = os.path.split(path)
    dataset = open_dataset(folder)
    tokenizer = Tokenizer.load(folder)
    split = file.removesuffix(".bin")
    for number, tokens in enumerate(np.split(getattr(dataset, split), dataset.ends(split)[:-1])):
        yield number, {"text": tokenizer.decode(tokens[:-1].tolist())}


def document_of(record, key, source, skipped, max_bytes):
    """A line of JSON, or what it holds -> {id, source} | record | {text, bytes, prompt_chars}, with newlines
    as line ends; None, with the reason counted, if unusable. A problem's prompt ends before its last newline,
    so that newline and indentation, which are one token, belong to the completion."""
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
        text = re.sub("\r\n?", "\n", text)
    defaults = {"id": record.get("task_id") or record.get("path") or key, "source": source}
    return defaults | record | {"text": text, "bytes": len(text.encode()),
                                "prompt_chars": len(prompt.rstrip()) if is_problem else 0}


# ---------------------------------------------------------------- rules: document -> reason or None

GENERATED = re.compile(r"auto-?(?:matically)?[ -]?generated|@generated|do not (?:edit|modify)", re.I)
COMMENT = re.compile(r"\"{3}[\s\S]*?\"{3}|'{3}[\s\S]*?'{3}|#[^\n]*")
CODE_LINE = re.compile(r"\s*(?:(?:def|class|import|from|return|if|for|while|else|elif|try|function|var|const"
                       r"|let|int|void|fn|#include)\b|[\w.\[\]]+ [-+*/]?= |//|[{}@])|.*[;{})]\s*$")
ALNUM = bytes(i for i in range(256) if i >= 128 or chr(i).isalnum())
PUNCTUATION = string.punctuation + "’“”‘–—…•«»¿¡"
STOP_WORDS = set("the be to of and that have with".split())
FILLER = re.compile("lorem ipsum|javascript (?:is|must be|to be) (?:en|dis)abled|enable javascript", re.I)
FINISHED = tuple(".!?\"':;)”")
SCRIPTS = {"ja": "[\u3040-\u30ff]", "ko": "[\uac00-\ud7af]", "zh": "[\u4e00-\u9fff]", "hi": "[\u0900-\u097f]",
           "bn": "[\u0980-\u09ff]", "ar": "[\u0600-\u06ff]", "ru": "[\u0400-\u04ff]"}
# words that are frequent in English and rare in other languages
ENGLISH = set("the and to of that with this you your which from are been be by it its has had would could "
              "there their they what when who how can than these those".split())


def language(text):
    """The language of prose: by its script, or English if enough of its words are frequent there, or "?"."""
    text = text[:5000].lower()
    n_letters = sum(map(str.isalpha, text))
    for name, script in {} if text.isascii() else SCRIPTS.items():
        least = 0.1 if name == "ja" else 0.5  # Japanese has Chinese letters too
        if len(re.findall(script, text)) > least * n_letters:
            return name
    words = re.findall(r"[^\W\d_]+", text)
    return "en" if sum(word in ENGLISH for word in words) > 0.08 * len(words) else "?"


def is_code(document):
    """Code or prose, by the suffix of the id, or by its lines where there is none."""
    suffix = suffix_of(str(document["id"]))
    lines = [line for line in document["text"][:20000].splitlines() if line.strip()]
    return suffix in CODE or suffix not in PROSE and share_of(lines, CODE_LINE.match) > 0.4


def share_of(items, condition):
    return sum(bool(condition(item)) for item in items) / max(1, len(items))


def quietly(parse, text):
    """parse(text, ...), or None for a text that is not Python. (symtable.symtable takes an eighth of the time
    of ast.parse.)"""
    with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        warnings.simplefilter("ignore")  # old escapes in strings are not our business
        return parse(text, "<document>", "exec")


def code_rule(text, name):
    """Yields (reason, whether it holds): The Stack's and StarCoder's rules for source files, then phi-1's
    wish for explained code."""
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


def gopher_rule(text):
    """Gopher's quality and repetition rules (arXiv 2112.11446, table A1), words split at whitespace."""
    words = text.split()
    lines = text.splitlines()
    real_words = [word for word in words if word.strip(PUNCTUATION)]
    yield "fewer than 50 words", len(real_words) < 50
    yield "more than 100,000 words", len(real_words) > 100_000
    yield "mean word length", not 3 <= sum(map(len, real_words)) / len(real_words) <= 10
    yield "symbols", max(text.count("#"), text.count("…") + text.count("...")) > 0.1 * len(words)
    yield "bullet list", share_of(lines, re.compile(r"\s*[•*-]").match) > 0.9
    yield "lines that break off", share_of(lines, re.compile(r".*(\.\.\.|…)\s*$").match) > 0.3
    yield "few words with letters", len(re.findall(r"[^\s\W\d_]\S*", text)) < 0.8 * len(words)
    yield "no stop words", len(STOP_WORDS.intersection(words)) < 2
    for unit, pieces in ("paragraphs", re.split(r"\n{2,}", text.strip())), ("lines", re.split(r"\n+", text)):
        counts = Counter(pieces)
        repeated_chars = sum(len(piece) * (count - 1) for piece, count in counts.items())
        yield f"repeated {unit}", len(counts) < 0.7 * len(pieces) or repeated_chars > 0.2 * len(text)
    yield from repeated_phrases(words, len(text))


def repeated_phrases(words, n_chars):
    """Gopher's shares of characters in repeated n-grams: in the most frequent one (2 to 4 words), in any (5
    to 10)."""
    n = len(words)
    hashes = np.fromiter(map(hash, words), int, n).view(np.uint64)
    lengths = np.fromiter(map(len, words), int, n)
    grams = hashes
    for size in range(2, 11):  # grams[i] stands for the words i ... i + size - 1
        grams = splitmix64(grams[:-1] + hashes[size - 1:] * (2 * size + 1))
        # 40 bits of the hash, then the place: equal phrases lie in a row, the first of them in front
        keys = np.sort(grams >> 24 << 24 | np.arange(len(grams), dtype=np.uint64))
        places = (keys & (1 << 24) - 1).astype(int)
        is_first = np.diff(keys >> 24, prepend=0) > 0
        if is_first.all():
            return
        if size < 5:
            starts = np.flatnonzero(is_first)
            counts = np.diff(starts, append=len(keys))
            place = places[starts[counts == counts.max()]].min()
            n_repeated = counts.max() * lengths[place:place + size].sum()
            yield "one phrase again and again", n_repeated > (0.24 - 0.02 * size) * n_chars
        else:  # words of any phrase that stood there before
            covered = np.zeros(n, bool)
            covered[places[~is_first][:, None] + np.arange(size)] = True
            yield "repeated phrases", lengths[covered].sum() > (0.2 - 0.01 * size) * n_chars


def prose_rule(text):
    """Gopher's rules, then those of C4 (arXiv 1910.10683) and FineWeb (2406.17557) on lines."""
    yield from gopher_rule(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    yield "filler", FILLER.search(text)
    yield "few finished lines", share_of(lines, lambda line: line.endswith(FINISHED)) < 0.12
    yield "short lines", share_of(lines, lambda line: len(line) < 30) > 0.67
    yield "generated", GENERATED.search(text[:500])


def quality_rule(document, rules):
    """`auto` leaves problems alone and tells code from prose: Gopher's thresholds would destroy code."""
    if rules == "none" or rules == "auto" and document["prompt_chars"]:
        return None
    if rules == "prose" or rules == "auto" and not is_code(document):
        checks = prose_rule(document["text"])
    else:
        checks = code_rule(document["text"], str(document["id"]))
    return next((reason for reason, holds in checks if holds), None)


def language_rule(document, languages):
    if languages and not document["prompt_chars"] and not is_code(document):
        spoken = language(document["text"])
        return None if spoken in languages else f"language {spoken}"


# Each begins where no character before could belong to it and ends within bounds, so all take linear time.
PII_PATTERNS = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}\.[A-Za-z]{2,24}\b", "<EMAIL>"),
    (r"(?<![\d.])(?!(?:0|10|127|255)\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.)"
     r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?=\d)|(?![\d.]))){4}", "<IP>"),
    (r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[\s\S]{0,8000}?-----END [A-Z ]{0,30}PRIVATE KEY-----", "<KEY>"),
    (r"(?<![\w-])(?:AKIA[0-9A-Z]{16}|(?:gh[pousr]|hf)_\w{30,}|(?:sk|xox[baprs])-[\w-]{20,}|AIza[\w-]{35}"
     r"|eyJ[\w-]{10,}(?:\.[\w-]{10,}){2})", "<KEY>"),
    (r"(?i)((?:key|token|secret|password|passwd)['\"]?\s{0,9}[:=]\s{0,9})['\"][\w+/=.-]{16,}['\"]",
     r"\1'<KEY>'"))]


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
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


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

    All texts are hashed as one buffer: with H the running sum of c_t B^t (mod 2^64), the word in [i, j) has
    the hash (H[j] - H[i]) B^-i, whatever its position. Words are runs of letters, digits and non-ASCII bytes.
    Fastest by about 128 kB."""
    joined = b"\n" + b"\n".join(raws) + b"\n"
    is_word = np.frombuffer(joined.translate(bytes(i in ALNUM for i in range(256))), bool)
    edges = np.flatnonzero(is_word[1:] != is_word[:-1])
    before, last = edges.reshape(-1, 2).T  # the byte before a word's first one, and its last one
    power, inverse = powers(max(17, len(joined).bit_length()))
    running = np.cumsum(np.frombuffer(joined, np.uint8) * power[:len(joined)])
    bounds = np.searchsorted(before, np.cumsum([0] + [len(raw) + 1 for raw in raws]))
    return splitmix64((running[last] - running[before]) * inverse[before]), bounds


def gram_hashes(words, n):
    """Hashes of the n consecutive words from each position on, uint64 (words,); those of the last n - 1
    positions mean nothing."""
    grams = words.copy()
    for i in range(1, n):
        grams[:-i] += words[i:] * (2 * 0x2545F4914F6CDD1D * i + 1 & 2**64 - 1)
    return splitmix64(grams)


def minhash(texts):
    """MinHash signatures of word 5-grams, uint32 (documents, N_PERMUTATIONS): least values under x -> scale x
    mod 2^32 of mixed hashes. A word that no text has stands before each text and four behind it, so that a
    text of few words has grams too."""
    scales = 2 * np.random.default_rng(0).integers(0, 2**31, N_PERMUTATIONS, np.uint32) + 1
    signatures = [np.empty((0, N_PERMUTATIONS), np.uint32)]
    for raws in batches((b"\xff " + text.encode() + (N_GRAM - 1) * b" \xfe" for text in texts), 1 << 17):
        words, bounds = word_hashes(raws)
        grams = (gram_hashes(words, N_GRAM) >> 32).astype(np.uint32)
        # the last ones reach into the next text: the first one stands for them
        grams[bounds[1:, None] - np.arange(1, N_GRAM)] = grams[bounds[:-1], None]
        signatures.append(np.stack([np.minimum.reduceat(grams * scale, bounds[:-1]) for scale in scales], 1))
    return np.concatenate(signatures)


def lsh_shape(threshold):
    """(bands, rows a band) of a signature, with the most rows by which 9 of 10 pairs of just this similarity
    share a band. Example: lsh_shape(0.8) == (14, 8)"""
    for rows in range(N_PERMUTATIONS, 0, -1):
        bands = N_PERMUTATIONS // rows
        if 1 - (1 - threshold ** rows) ** bands >= 0.9:
            break
    return bands, rows


def lsh_band_hashes(signatures, threshold):
    """uint64 (bands, documents): equal where all values of a band are."""
    n_bands, n_rows = lsh_shape(threshold)
    hashes = np.zeros((n_bands, len(signatures)), np.uint64)
    for row in range(n_rows):
        hashes = splitmix64(hashes + signatures.T[row:n_bands * n_rows:n_rows] + 1)
    return hashes


def candidate_pairs(keys):
    """Pairs (m, 2) of indices with equal keys: each with the next four, so a bucket of n gives 4n pairs and
    not n^2."""
    order = keys.argsort(kind="stable")
    pairs = []
    for step in range(1, 5):
        left = np.flatnonzero(keys[order[step:]] == keys[order[:-step]])
        pairs.append(np.stack([order[left], order[left + step]], 1))
    return np.concatenate(pairs)


def connected_components(pairs):
    """(nodes, component of each) of the graph of these pairs: every node takes the least label among its
    neighbours, and its label's label."""
    nodes, pairs = np.unique(pairs, return_inverse=True)
    left, right = pairs.reshape(-1, 2).T
    label = np.arange(len(nodes))
    while np.any(label[left] != label[right]):
        lowest = np.minimum(label[left], label[right])
        for side in (label[left], label[right], left, right):
            np.minimum.at(label, side, lowest)
        label = label[label]
    return nodes, label


def spanning_pairs(pairs):
    """The fewest pairs that connect what these connect: each node, but the first of its component, with that
    one."""
    nodes, label = connected_components(pairs)
    return np.stack([nodes[label], nodes], 1)[label != np.arange(len(nodes))]


# ---------------------------------------------------------------- decontamination

FUNCTION = re.compile(r"^(?=(([ \t]*)(?:async )?def [^\n]*\n(?:(?:\2[ \t)][^\n]*)?\n)*))", re.M)
SIGNS = np.frombuffer(b"+-*/%<>=()[]{}.,:|&", np.uint8)
MIN_NODES = 20
INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")


def fold(text):
    """A text as decontamination compares it: lower case, NFKC, without what is invisible, spaces for the
    punctuation that is not ASCII. (word_hashes leaves ASCII's out.)"""
    def fold_word(word):
        word = word if word.isascii() else INVISIBLE.sub("", unicodedata.normalize("NFKC", word))
        return re.sub(r"[^\w\x00-\x7f]", " ", word)

    if not text.isascii():
        lines = text.split("\n")
        text = "\n".join(line if line.isascii() else " ".join(map(fold_word, line.split(" ")))
                         for line in lines)
    return text.lower()


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
    """Labels of the nodes, level by level, of a function's syntax tree: without documentation, annotations
    and chosen names; none for what is not Python, or too small to tell anything."""
    tree = quietly(ast.parse, textwrap.dedent(source))
    if not tree:
        return []
    function = tree.body[0]
    function.body = function.body[ast.get_docstring(function) is not None:]
    function.returns = None
    for argument in function.args.args:
        argument.annotation = None
    labels = []
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            labels.append("." + node.attr)
        elif isinstance(node, ast.Constant):
            labels.append(repr(node.value)[:20])
        elif isinstance(node, ast.Name) and hasattr(builtins, node.id):
            labels.append(node.id)
        elif not isinstance(node, ast.expr_context):
            labels.append(type(node).__name__)
    return labels if len(labels) >= MIN_NODES else []


def functions_of(text):
    """(source, how often it has each operator and bracket: what renaming leaves) of a text's functions."""
    for source, _ in FUNCTION.findall(text + "\n"):
        raw = np.frombuffer(COMMENT.sub("", source).encode(), np.uint8)
        yield source, np.bincount(raw, minlength=256)[SIGNS]


def text_grams(raws):
    """Hashes of the 7 and 13 words from each position of some texts on; bounds as word_hashes gives them."""
    words, bounds = word_hashes(raws)
    grams = gram_hashes(words, 7)
    return {7: grams, 13: splitmix64(grams + 3 * np.roll(grams, -6))}, bounds


# The usual benchmarks' fields, in any case, `_` for a space. No `context`, `passage` or `article`: these
# are public pages, of which a corpus may well have a copy.
QUESTION = ("instruction goal ctx prompt premise question question_stem question_content problem "
            "problem_statement sentence input turns text").split()
ANSWER = ("choices options endings sol1 sol2 option1 option2 choice1 choice2 canonical_solution "
          "completion answer answers best_answer correct_answer incorrect_answers incorrect_answer_1 "
          "incorrect_answer_2 incorrect_answer_3 distractor1 distractor2 distractor3 mc1_targets "
          "mc2_targets target solution solutions code").split()
MIN_COMMON = 3  # 7-grams in common that tell anything
OVERLAP = 0.6
MATCH_RATE = 0.9


class Contamination:
    """Finds documents that contain benchmark problems, or parts of them.

    By words (phi-4, arXiv 2412.08905, appendix B), folded on both sides: one 13-gram in common, or 7-grams
    that make up OVERLAP of the shorter text's. Grams of few different words (lists of numbers) do not
    count, nor those of more than two problems of one file (what a benchmark says everywhere); a problem may
    stand in any number of files, and with any number of answers. By syntax (phi-1, arXiv 2306.11644, section
    5): functions whose trees have difflib's ratio >= MATCH_RATE; trees below MIN_NODES do not count."""

    def __init__(self, paths):
        self.problems = list(self.read(paths))  # (name, text, (file, question))
        self.owners = {7: {}, 13: {}}           # size of a gram -> {gram: numbers of its problems}
        self.trees = []                         # (number of a problem, labels)
        signs = []                              # of each tree
        for i, (_, text, _) in enumerate(self.problems):
            words = words_of(text)
            grams, _ = text_grams([b" ".join(words)])
            for n, owners in self.owners.items():
                for k, gram in zip(range(len(words) - n + 1), grams[n].tolist()):
                    if len({word for word in words[k:k + n] if not word.isdigit()}) > n // 2:
                        owners.setdefault(gram, set()).add(i)
            for source, counts in functions_of(text):
                labels = syntax_tree(source)
                if labels:
                    self.trees.append((i, labels))
                    signs.append(counts)
        self.signs = np.array(signs).reshape(-1, len(SIGNS))

        self.table = np.zeros(1 << 24, bool)  # by the first 24 bits: most grams need no other look
        for n, owners in self.owners.items():
            owners = {gram: numbers for gram, numbers in owners.items() if not self.is_common(numbers)}
            self.owners[n] = owners
            self.table[np.array(list(owners), np.uint64) >> 40] = True
        self.n_grams = Counter(itertools.chain(*self.owners[7].values()))

        protected = {i for i, n in self.n_grams.items() if n >= MIN_COMMON}
        protected.update(*self.owners[13].values(), [i for i, _ in self.trees])
        self.unprotected = [name for i, (name, *_) in enumerate(self.problems) if i not in protected]
        if self.unprotected and RANK == 0:
            print(f"decontamination: {len(self.unprotected):,} of {len(self.problems):,} problems have too "
                  "few words of their own to be recognized, so copies of them stay: "
                  f"{', '.join(self.unprotected[:5])}", file=sys.stderr)

    def is_common(self, numbers):
        """Whether more than two problems of one file are among these."""
        files = Counter(file for file, _ in {self.problems[i][2] for i in numbers})
        return max(files.values()) > 2

    def read(self, paths):
        """Yields (name, question and answer, (file, question)) of each problem; plain texts are one file
        together."""
        skipped = Counter()
        n_problems = 0
        for span in find_files(paths, skipped):
            path, name = span[:2]
            is_text = suffix_of(name) not in RECORDS | {".parquet"}
            records = read_documents([span], skipped) if is_text else read_records(path)
            for n_problems, record in enumerate(records, n_problems + 1):
                fields = {str(key).lower().replace(" ", "_"): value for key, value in record.items()}
                question, answer = ("\n".join(text for key in keys for text in strings_in(fields.get(key)))
                                    for keys in (QUESTION, ANSWER))
                text = f"{question}\n{answer}"
                place = ("" if is_text else path, b" ".join(words_of(question or text)))
                yield str(record.get("task_id", f"{name}:{n_problems}")), text, place
        if skipped or not n_problems:
            problem = dict(skipped) or "no problem found"
            raise ValueError(f"--decontaminate {' '.join(map(str, paths))}: {problem}; "
                             "give JSON Lines or text files")

    def find(self, texts):
        """{index of a text: (rule, number of the problem, what they share)}, by words."""
        found = {}
        done = 0
        for raws in batches((fold(text).encode() for text in texts), 1 << 17):
            grams, bounds = text_grams(raws)
            for n, owners in self.owners.items():
                at = np.flatnonzero(self.table[grams[n] >> 40])
                text_of = np.searchsorted(bounds, at, side="right") - 1
                is_inside = at + n <= bounds[text_of + 1]
                common = {}  # (text, problem) -> grams
                for k, gram in zip(text_of[is_inside].tolist(), grams[n][at[is_inside]].tolist()):
                    for i in owners.get(gram, ()):
                        common.setdefault((k, i), set()).add(gram)
                for (k, i), both in sorted(common.items(), key=lambda item: len(item[1])):
                    shorter = min(self.n_grams[i], bounds[k + 1] - bounds[k] - 6)
                    if n == 13 or len(both) >= max(MIN_COMMON, OVERLAP * shorter):
                        found[done + k] = f"{n}-gram", i, f"{len(both)} in common"
            done += len(raws)
        return found

    def find_functions(self, text):
        """The like for the functions of one text, or None. Only those whose operators resemble a problem's
        are parsed."""
        for source, signs in functions_of(text):
            longer = np.maximum(self.signs.sum(1), signs.sum())
            similar = np.flatnonzero(np.minimum(self.signs, signs).sum(1) >= (MATCH_RATE - 0.2) * longer)
            labels = syntax_tree(source) if len(similar) else []
            matcher = difflib.SequenceMatcher(None, (), labels, autojunk=False)
            for i, other in [self.trees[k] for k in similar]:
                matcher.set_seq1(other)
                bounds = matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio  # the cheapest first
                if all(bound() >= MATCH_RATE for bound in bounds):
                    return "syntax tree", i, f"match rate {matcher.ratio():.3f}: {source.strip()[:60]}"


# ---------------------------------------------------------------- educational value

# words, and first words of lines, whose share the classifier sees, and marks
WORDS = [words.encode().split() for words in (
    "because therefore thus hence means explain explains note notice consider suppose define definition why",
    "example examples exercise solution answer question prints expected result sample illustrate shows usage",
    "algorithm list number value values function sum loop sort search tree graph string index count array",
    "click subscribe cookies login copyright license todo fixme deprecated http https www warranty share buy",
    "if else elif for while return yield try except raise",
    "import self cls config settings logger assert pass kwargs isinstance")]
STARTS = [words.split() for words in (
    "## ### #### === ---", "- * • 1. 2. 3. 4. 5.", "``` ~~~ >>> .. $", "# // /* #: *",
    "def class async function fn func struct", "from import #include use require", "return yield raise")]
MARKS = ['"""', " = ", "_", "(", ".", ",", ":", "["]
LETTERS = bytes(i if i >= 128 or chr(i).isalpha() else 32 for i in range(256))
CLASSES = string.ascii_letters.encode(), string.digits.encode(), string.ascii_uppercase.encode()


def features(text):
    """What the classifier sees of a text (its first 20,000 characters), float32: logarithms of sizes, and
shares of characters, words and lines."""
    head = text[:20_000]
    raw = head.encode()
    lines = head.split("\n")
    full = [line.lstrip() for line in lines if line.strip()]
    starts = Counter(line.split(None, 1)[0] for line in full)
    counts = Counter(raw.lower().translate(LETTERS).split())
    n = max(1, len(raw))
    n_words = max(1, counts.total())
    n_lines = max(1, len(full))
    n_sentences = 1 + sum(map(head.count, (". ", ".\n", "? ", "! ")))
    return np.array([
        *map(math.log1p, (len(text), len(lines), max(map(len, lines)), n_words)),
        len(full) / len(lines), sum(map(len, full)) / n, n / n_words, len(counts) / n_words ** 0.75,
        n_words / n_sentences, n_words / (1 + head.count("\n\n")),
        *(len(raw.translate(None, letters)) / n for letters in CLASSES),
        *(sum(counts[word] for word in words) / n_words for words in WORDS),
        *(sum(starts[word] for word in words) / n_lines for words in STARTS),
        *(head.count(mark) / n_lines for mark in MARKS)], np.float32)


N_BINS = 128
MAX_DEPTH = 16
FOREST_ARRAYS = "edges feature threshold child value roots".split()


@dataclass
class RandomForest:
    """Bagged classification trees (Breiman 2001) on features cut into 128 bins at their quantiles, over all
    cores.

    fit(X float32 (n, features), y 0/1 (n,)); predict_proba(X) -> float (n,), the mean share of ones in a
    row's leaves. Each tree sees half of the rows (as good as a bootstrap: Friedman and Hall 2007) and takes
    the best Gini impurity among sqrt(features) features drawn for each node, or more until one can split it.
    It grows by levels: a histogram over (node, bin, class) gives all nodes' splits at once."""
    n_trees: int = 100
    seed: int = 0
    min_leaf: int = 2
    workers: int = 1

    def fit(self, X, y):
        # bin b holds the values up to edges[:, b]
        self.edges = np.quantile(X, np.arange(1, N_BINS) / N_BINS, axis=0, method="nearest").T
        bins = self.bin(X)
        y = y.astype(int)
        trees = parallel(lambda tree: self.grow(bins, y, np.random.default_rng([self.seed, tree])),
                         range(self.n_trees), self.workers, "growing trees")
        self.feature, self.threshold, self.child, self.value = map(np.concatenate, zip(*trees))
        sizes = [len(tree[0]) for tree in trees]
        self.roots = np.cumsum([0, *sizes[:-1]])
        self.child += np.repeat(self.roots, sizes)
        return self

    def bin(self, X):
        """uint8 (features, n)"""
        return np.stack([np.searchsorted(*pair).astype(np.uint8) for pair in zip(self.edges, X.T)])

    def grow(self, bins, y, rng):
        """One tree's nodes: feature, threshold (bins above it go right), left child (the right one is next),
        value."""
        n_features, n = bins.shape
        rows = rng.permutation(n)[:n - n // 2]
        node = np.zeros(len(rows), int)  # of each row, among the m nodes of this level
        begin = 0
        m = 1
        levels = []
        for depth in range(MAX_DEPTH + 1):
            n_all = np.bincount(node, minlength=m)
            n_one = np.bincount(node, y[rows], m)
            drawn = rng.random((m, n_features)).argsort(1)
            gain, feature, threshold = self.best_splits(bins, y, rows, node, n_all, n_one, drawn)
            is_split = (gain > 1e-4) & (depth < MAX_DEPTH)
            # a leaf leads to itself
            child = np.where(is_split, begin + m + 2 * (np.cumsum(is_split) - 1), begin + np.arange(m))
            levels.append((feature * is_split, np.where(is_split, threshold, 255), child, n_one / n_all))
            if not is_split.any():
                break
            rows = rows[is_split[node]]
            node = node[is_split[node]]
            goes_right = bins[feature[node], rows] > threshold[node]
            node = child[node] - begin - m + goes_right
            begin += m
            m = 2 * is_split.sum()
        return list(map(np.concatenate, zip(*levels)))

    def best_splits(self, bins, y, rows, node, n_all, n_one, drawn):
        """(gain, feature, threshold) of each node, with its features in the order in which they are drawn;
        gain 0 where none can split it."""
        n_features, n = bins.shape
        best = np.zeros((3, len(drawn)))
        can_split = (n_one > 0) & (n_one < n_all) & (n_all >= 2 * self.min_leaf)
        # the first few together; then one by one, for nodes that none of them could split
        for several in np.split(drawn.T, range(max(1, round(n_features ** 0.5)), n_features)):
            unsplit = can_split & (best[0] == 0)
            if not unsplit.any():
                break
            inside = unsplit[node]
            some_rows = rows[inside]
            some_nodes = node[inside]
            m = unsplit.sum()
            key = (y[some_rows] * m + (np.cumsum(unsplit) - 1)[some_nodes]) * N_BINS
            for feature in several:
                bin_of = bins.take(feature[some_nodes] * n + some_rows)
                counts = np.bincount(key + bin_of, minlength=2 * m * N_BINS).reshape(2, m, N_BINS)
                zero, one = counts.cumsum(2, dtype=np.float32)  # (nodes, threshold)
                left = zero + one
                right = left[:, -1:] - left
                score = one ** 2 / np.maximum(left, 1) + (one[:, -1:] - one) ** 2 / np.maximum(right, 1)
                score[np.minimum(left, right) < self.min_leaf] = 0
                at = score.argmax(1)
                gain = score.max(1) - (n_one ** 2 / n_all)[unsplit]
                candidates = gain, feature[unsplit], at
                best[:, unsplit] = np.where(gain > best[0, unsplit], candidates, best[:, unsplit])
        return best[0], *best[1:].astype(int)

    def predict_proba(self, X):
        bins = self.bin(X).T.ravel()
        base = np.arange(len(X)) * X.shape[1]
        table = self.child << 24 | self.feature << 8 | self.threshold
        total = np.zeros(len(X))
        for root in self.roots:
            node = np.full(len(X), root)
            for _ in range(MAX_DEPTH):
                entry = table.take(node)
                node = (entry >> 24) + (bins.take(base + (entry >> 8 & 65535)) > (entry & 255))
            total += self.value.take(node)
        return total / len(self.roots)

    def save(self, path):
        np.savez_compressed(path, **{name: getattr(self, name) for name in FOREST_ARRAYS})

    @classmethod
    def load(cls, path, n_features):
        forest = cls()
        try:
            vars(forest).update(np.load(path, allow_pickle=False))
            if len(forest.edges) != n_features:
                raise ValueError("it was trained on other features")
        except (ValueError, AttributeError, OSError, zipfile.BadZipFile, *DAMAGED) as error:
            raise ValueError(f"{path} is not a forest ({error}); make that dataset with --labels") from None
        return forest


def area_under_curve(y, p):
    """ROC AUC: how often a row of y = 1 has the larger p than one of y = 0, ties counting half."""
    zeros = np.sort(p[y == 0])
    ones = p[y == 1]
    below = sum(np.searchsorted(zeros, ones, side) for side in ("left", "right"))
    return float(below.mean() / 2 / len(zeros))


def train_quality_classifier(path, seed, workers):
    """(forest, report) from labels: JSON Lines with `text` and `score` from 0 to 5, good from 3 on."""
    labels = [record for record in read_jsonl(path) if "text" in record and "score" in record]
    X = np.array(parallel(lambda record: features(str(record["text"])), labels, workers, "labels"))
    y = np.array([record["score"] >= 3 for record in labels], int)
    if not 5 <= y.sum() <= len(y) - 5 or len(y) < 20:
        raise ValueError(f"--labels {path}: {y.sum()} of {len(y)} labels have a score of 3 or more; "
                         "give at least 5 of either side and 20 in all")
    forest = RandomForest(seed=seed, workers=workers)
    fold = np.random.default_rng(seed).permutation(len(y)) % 5
    p = np.zeros(len(y))
    for k in range(5):  # each row is judged by a forest that has not seen it
        p[fold == k] = forest.fit(X[fold != k], y[fold != k]).predict_proba(X[fold == k])
    report = {"labels": len(y), "good": int(y.sum()), "auc": area_under_curve(y, p)}
    print0("educational value, 5-fold cross-validated:", json.dumps(report))
    return forest.fit(X, y), report


# ---------------------------------------------------------------- byte-pair encoding

def stdlib_pattern(pattern, limit=0x110000):
    r"""The tokenizer's split pattern for Python's own `re`, which lacks \p{...}: classes become ranges of the
    characters below `limit`; up to 0x10000 `re` looks them up, several times faster.

    Python's \s has four control characters more, and characters newer than its Unicode tables may split
    otherwise than in tiktoken: that touches the counts only."""
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

    return sum_counts(parallel(count, batches(texts, 1 << 22), workers, "counting words"))


def learn_merges(counts, n_merges):
    """BPE on words (str -> how often): the list of merged pairs (a, b); the i-th one makes token 256 + i.

    Each step merges the pair of highest count, the smallest (a, b) among equals, until none occurs twice. All
    words lie in one array of symbols, where the position of its first symbol stands for a pair. The heap
    holds each pair with the count it had once its younger symbol was made; later merges only take positions
    away, so a count that has fallen is corrected when it is its turn."""
    end = (1 << 20) - 1  # stands between words, and where a symbol was merged into the one before
    words = [b"\xff" + word.encode() for word in counts]  # (255 is in no UTF-8)
    symbol = np.frombuffer(b"".join([*words, b"\xff"]), np.uint8).astype(np.int32)
    symbol[symbol == 255] = end
    weight = np.repeat(np.fromiter(counts.values(), int, len(words)), list(map(len, words)))
    begin = np.arange(len(symbol), dtype=np.int32)  # of the symbol whose last byte is here
    size = np.ones(256 + n_merges, np.int32)        # of each token, in bytes
    heap = []                                       # (-count, a << 20 | b, positions)
    merges = []

    def count_pairs(at):
        """Puts the pairs at these positions on the heap."""
        at = at[symbol[at + size[symbol[at]]] != end]
        pairs = symbol[at].astype(int) << 20 | symbol[at + size[symbol[at]]]
        order = pairs.argsort()
        pairs = pairs[order]
        at = at[order]
        starts = np.flatnonzero(np.diff(pairs, prepend=-1))
        counts = np.add.reduceat(weight[at], starts)
        bounds = [*starts.tolist(), len(at)]
        for pair, count, i, j in zip(pairs[starts].tolist(), counts.tolist(), bounds, bounds[1:]):
            if count > 1:
                heapq.heappush(heap, (-count, pair, at[i:j]))

    count_pairs(begin[symbol != end])
    while heap and len(merges) < n_merges:
        count, pair, at = heapq.heappop(heap)
        a, b = divmod(pair, 1 << 20)
        at = at[symbol[at] == a]  # where it still stands
        at = at[symbol[at + size[a]] == b]
        current = int(weight[at].sum())
        if current < -count:
            if current > 1:
                heapq.heappush(heap, (-current, pair, at))
            continue
        if a == b:  # in a run a a a only every other pair can merge
            at = np.sort(at)
            number = np.arange(len(at))
            is_first = np.diff(at, prepend=0) != size[a]
            at = at[(number - np.maximum.accumulate(number * is_first)) % 2 == 0]
        merges.append((a, b))
        new = 255 + len(merges)
        size[new] = size[a] + size[b]
        symbol[at + size[a]] = end
        symbol[at] = new
        begin[at + size[new] - 1] = at
        left = begin[at - 1]
        count_pairs(np.concatenate([at, left[symbol[left] < new]]))
    return merges


def tokenizer_of(merges):
    from model import Tokenizer
    tokens = [bytes([i]) for i in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    return Tokenizer({token: i for i, token in enumerate(tokens)})


# ---------------------------------------------------------------- the dataset directory

SPLITS = "train", "val"


@dataclass
class Dataset:
    """What lies in data/NAME: `train` and `val`, token ids (uint16 or uint32) with an end-of-text token after
    each document; `train_mask`, uint8, 0 on a problem's prompt and 1 elsewhere, or None where there are no
    problems; `train_ends`, int64, the offset behind each document's end-of-text token, from train.ends.bin,
    or None in a dataset made before there was such a file (ends() finds them in the tokens then). All are
    mapped from disk. `meta`: meta.json."""
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
        kinds = ("", meta["dtype"], "tokens"), (".mask", "uint8", "tokens"), (".ends", "int64", "documents")
        for split, (kind, dtype, unit) in itertools.product(SPLITS, kinds):
            file = path / f"{split}{kind}.bin"
            if file.name not in meta["files"]:
                continue
            n_bytes = meta[split][unit] * np.dtype(dtype).itemsize
            size = file.stat().st_size
            if size != n_bytes:
                raise ValueError(f"{file.name} has {size} bytes where meta.json promises {n_bytes}")
            arrays[split + kind.replace(".", "_")] = np.memmap(file, dtype, "r")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a dataset ({error}); "
                         f"make it with python data.py --name {path.name} --out {path.parent} ...") from None
    return Dataset(path, meta, **arrays)


def encode(documents, tokenizer, dtype):
    """Documents -> (token ids, mask, length of each), as class Dataset has them; a problem's prompt is
    encoded apart."""
    ids = [np.zeros(0, dtype)]
    mask = [np.zeros(0, np.uint8)]
    for document in documents:
        text = document["text"]
        prompt = tokenizer.encode(text[:document["prompt_chars"]])
        answer = tokenizer.encode(text[document["prompt_chars"]:]) + [tokenizer.eot]
        ids.append(np.array(prompt + answer, dtype))
        mask.append(np.repeat(np.uint8([0, 1]), [len(prompt), len(answer)]))
    return np.concatenate(ids), np.concatenate(mask), np.array(list(map(len, ids[1:])), int)


def keep_larger(path, n_bytes):
    """Renames a dataset of more text than the n_bytes about to take its place: less never replaces more."""
    try:
        meta = open_dataset(path).meta
    except ValueError:  # none there, or damaged
        return
    size = meta["train"]["bytes"] + meta["val"]["bytes"]
    old = path.with_name(f"{path.name}.old-{meta['fingerprint'][:8]}")
    if size > n_bytes:
        if not old.exists():  # its name tells its contents: once is enough
            os.replace(path, old)
        print(f"{path} held {size:,} bytes of text, more than the new one's {n_bytes:,}; "
              f"it is kept as {old} (delete it if nobody needs it)")


# ---------------------------------------------------------------- the funnel

def split_files(files):
    """Lists of files of about a thirty-second of the input, at most 128 MB; large JSON Lines are cut into
    spans of lines."""
    sizes = [int(min(os.path.getsize(path), end)) for path, _, _, end in files]
    part_size = min(max(sum(sizes) // 32, 1 << 18), 1 << 27)
    spans = []
    for (path, name, begin, end), size in zip(files, sizes):
        can_cut = path.lower().endswith(tuple(RECORDS))
        while can_cut and size - begin > part_size:
            spans.append((path, name, begin, begin + part_size))
            begin += part_size
        spans.append((path, name, begin, end))
    return list(batches(spans, part_size,
                        lambda span: min(span[3], os.path.getsize(span[0])) - span[2] + 1000))


def make_part(files, options):
    """One part: all documents of these files, with the first rule's reason to drop each; of those that go no
    more than a beginning is kept."""
    skipped = Counter()
    redacted = Counter()
    documents = []
    for document in read_documents(files, skipped):
        reason = language_rule(document, options.language) or quality_rule(document, options.rules)
        document["reason"] = reason or ""
        redact = options.redact_pii == "all" or options.redact_pii == "web" and document.get("web")
        if reason:
            document["text"] = document["text"][:300]
        elif redact and not document["prompt_chars"]:
            document["text"], counts = redact_pii(document["text"])
            redacted.update(counts)
            document["bytes"] = len(document["text"].encode())
        documents.append(document)
    raws = [document["text"].encode() for document in documents]
    columns = {name: np.array([document[name] for document in documents], kind) for name, kind in
               (("bytes", int), ("prompt_chars", int), ("reason", bytes))}
    return {"skipped": skipped, "redacted": redacted, "ids": [str(document["id"]) for document in documents],
            "text": np.frombuffer(b"".join(raws), np.uint8), "ends": np.cumsum([0, *map(len, raws)]),
            "hash": sha64(raws), **columns}


class Funnel:
    """All documents, those of all parts in a row, and what becomes of them: `alive` marks those that are
    left, `rows` counts what went in and out of each stage and why, `examples` shows some.

    Of each document it holds size and hash in memory; texts and signatures stay in the parts."""

    def __init__(self, run, parts, seed):
        self.run = run
        self.parts = parts
        self.base = np.cumsum([0] + [len(part("bytes")) for part in parts])  # where each part begins
        self.alive = np.ones(self.base[-1], bool)
        self.bytes = column(parts, "bytes")
        self.hash = column(parts, "hash")
        self.salt = splitmix64(np.uint64([seed + 1]))  # of the final order
        self.rows = []
        self.examples = []  # (stage, reason and id, beginning)

    def count(self, stage, documents_in, bytes_in, dropped):
        """One row of the funnel. dropped: {reason: how many}"""
        row = {"stage": stage, "documents_in": documents_in, "bytes_in": bytes_in}
        row |= {"documents_out": int(self.alive.sum()), "bytes_out": int(self.bytes[self.alive].sum())}
        self.rows.append(row | {"dropped": dict(dropped.most_common())})

    def drop(self, stage, reasons):
        """reasons: bytes for each of living(), why it goes, or nothing if it stays."""
        living = self.living()
        dropped = Counter()
        for reason in filter(None, np.unique(reasons)):
            index = living[reasons == reason]
            name = reason.decode()
            dropped[name] = len(index)
            self.show(f"{stage}: {name}", index)
            self.alive[index] = False
        self.count(stage, self.rows[-1]["documents_out"], self.rows[-1]["bytes_out"], dropped)

    def show(self, why, index):
        """Adds the first three of some documents in the final order to the examples."""
        for document in map(self.document, self.in_order(index)[:3]):
            self.examples.append((f"{why}: {document['id']}", document["text"][:300]))

    def reasons(self):
        return {f"{row['stage']}: {reason}": n for row in self.rows for reason, n in row["dropped"].items()}

    def living(self):
        return np.flatnonzero(self.alive)

    def in_order(self, index):
        return index[splitmix64(self.hash[index] + self.salt).argsort()]

    def document(self, i):
        p = np.searchsorted(self.base, i, side="right") - 1
        part = self.parts[p]
        number = i - self.base[p]
        begin, end = part("ends")[number:number + 2]
        text = bytes(part("text")[begin:end]).decode()
        return {"id": part("ids")[number], "text": text, "prompt_chars": int(part("prompt_chars")[number])}

    def map_texts(self, stage, function):
        """A stage of parts that function([texts that are left in a part]) -> {name: value} makes. What it
        says of texts stands in the order of living()."""
        def make(p):
            living = self.base[p] + np.flatnonzero(self.alive[self.base[p]:self.base[p + 1]])
            return function([self.document(i)["text"] for i in living])
        return self.run(stage, len(self.parts), make)


# Stages: funnel -> why each living document goes, as Funnel.drop takes it.

def exact_duplicates(funnel):
    hashes = funnel.hash[funnel.alive]
    reasons = np.full(len(hashes), b"same text")
    reasons[np.unique(hashes, return_index=True)[1]] = b""
    return reasons


def near_duplicates(funnel, threshold):
    """Documents that share a band of the signature are compared by the share of equal values; of each group
    connected by a similarity >= the threshold the longest stays."""
    def sign(texts):
        signatures = minhash(texts)
        return {"signatures": signatures, "bands": lsh_band_hashes(signatures, threshold)}

    signed = funnel.map_texts("signatures", sign)
    base = np.cumsum([0] + [len(part("signatures")) for part in signed])

    def signatures(index):
        owners = np.searchsorted(base, index, side="right") - 1
        rows = np.empty((len(index), N_PERMUTATIONS), np.uint32)
        for p in np.unique(owners):
            rows[owners == p] = signed[p]("signatures")[index[owners == p] - base[p]]
        return rows

    def compare(band):
        pairs = candidate_pairs(np.concatenate([part("bands")[band] for part in signed]))
        similar = [chunk[(signatures(chunk[:, 0]) == signatures(chunk[:, 1])).mean(1) >= threshold]
                   for chunk in np.array_split(pairs, len(pairs) // (1 << 15) + 1)]
        return {"pairs": spanning_pairs(np.concatenate(similar))}

    compared = funnel.run("near duplicates", lsh_shape(threshold)[0], compare)
    nodes, label = connected_components(column(compared, "pairs"))
    size = funnel.bytes[funnel.alive]
    order = np.lexsort((nodes, -size[nodes], label))
    reasons = np.full(len(size), b"", "S12")
    reasons[nodes[order[1:][np.diff(label[order]) == 0]]] = b"similar text"
    return reasons


def decontaminate(funnel, contamination):
    """The second value: the records of contaminated.jsonl."""
    def check(texts):
        found = contamination.find(texts)
        return {"hits": [found.get(k) or contamination.find_functions(text) for k, text in enumerate(texts)]}

    hits = itertools.chain(*(part("hits") for part in funnel.map_texts("decontaminate", check)))
    reasons = []
    records = []
    for i, hit in zip(funnel.living(), hits):
        rule, number, evidence = hit or ("", None, None)
        reasons.append(rule)
        if hit:
            name, text, _ = contamination.problems[number]
            about = {"rule": rule, "evidence": evidence, "problem": name, "problem_text": text}
            records.append(funnel.document(i) | about)
    return np.array(reasons, bytes), records


def low_value(funnel, forest, options):
    """All but the best --keep, and what scores below --min-score. The second value: {score: how many}."""
    def score(texts):
        X = np.array([features(text) for text in texts])
        return {"value": (forest.predict_proba(X) if texts else np.zeros(0)).astype(np.float32)}

    value = column(funnel.map_texts("value", score), "value")
    # the best first, equal ones by their hash
    order = np.lexsort((funnel.hash[funnel.alive], (65535 - value * 65535).astype(int)))
    reasons = np.where(value < options.min_score, b"low score", b"")
    reasons[order[math.ceil(options.keep * len(order)):]] = b"low score"
    counts = np.histogram(value, 20, (0, 1))[0].tolist()
    return reasons, {f"{i / 20:.2f} and more": n for i, n in enumerate(counts)}


# ---------------------------------------------------------------- split, tokens, files

def split_validation(funnel, share):
    """Which documents are for validation, at least one on either side. The hash of a document alone decides,
    so the split never moves."""
    hashes = np.sort(funnel.hash[funnel.alive])
    n = (hashes < share * 2**64).sum()
    return funnel.hash < hashes[min(max(n, 1), len(hashes) - 1)]


def make_tokens(funnel, tokenizer, options):
    """(tokenizer, the parts of train.bin, val.bin and what lies beside them); a tokenizer of None is trained.
    A part is a piece of the shuffled order."""
    is_val = split_validation(funnel, options.val_share)
    order = funnel.in_order(funnel.living())
    n_bytes = int(funnel.bytes[order].sum())
    n_shards = 1 + max(min(32, n_bytes >> 16), n_bytes >> 27)
    shards = np.array_split(order, n_shards)

    def documents(shard):
        """[training documents, validation documents]"""
        index = shards[shard]
        if len(order) > 1 or not len(index):
            return [[funnel.document(i) for i in index[is_val[index] == side]] for side in (False, True)]
        text = funnel.document(index[0])["text"]  # one alone is cut: its last share is for validation
        cut = max(1, min(round(len(text) * (1 - options.val_share)), len(text) - 1))
        return [[{"text": piece, "prompt_chars": 0}] for piece in (text[:cut], text[cut:])]

    def encode_shard(shard):
        values = {}
        for split, some in zip(SPLITS, documents(shard)):
            ids, mask, lengths = encode(some, tokenizer, dtype)
            values |= {f"{split}.bin": ids, f"{split}.mask.bin": mask, f"{split}.lengths": lengths}
            values[split] = {"documents": len(some), "tokens": len(ids),
                             "bytes": sum(len(document["text"].encode()) for document in some)}
        return values

    if tokenizer is None:
        # of at most 2 GB, which in the shuffled order are a sample
        n_counted = min(n_shards, 1 + n_shards * (2 << 30) // n_bytes)
        counted = funnel.run("words", n_counted, lambda shard: {
            "words": count_pretokens([document["text"] for document in documents(shard)[0]])})
        n_merges = int(options.tokenizer.removeprefix("train:")) - 261  # bytes and five special tokens
        merged, = funnel.run("merges", 1, lambda _: {
            "merges": learn_merges(sum_counts(part("words") for part in counted), n_merges)})
        tokenizer = tokenizer_of(merged("merges"))
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    return tokenizer, funnel.run("tokens", n_shards, encode_shard)


def write_dataset(path, meta, tokenizer, encoded, extra_files):
    """Puts the parts together. extra_files: name -> function that writes this file."""
    from model import write_json
    splits = {split: dict(sum_counts(part(split) for part in encoded)) for split in SPLITS}
    names = [f"{split}.bin" for split in SPLITS]
    masks = [f"{split}.mask.bin" for split in SPLITS]
    if any((part(name) == 0).any() for part in encoded for name in masks):
        names += masks
    about = {"dtype": encoded[0]("train.bin").dtype.name, "tokenizer": tokenizer.fingerprint, **splits}
    contents = hashlib.sha256(json.dumps(list(about.values())).encode())
    with atomic_path(path) as new:
        new.mkdir()
        for name in names:
            with open(new / name, "wb") as file:
                for part in encoded:
                    contents.update(part(name))
                    file.write(part(name).data)
        for split in SPLITS:
            np.cumsum(column(encoded, f"{split}.lengths")).tofile(new / f"{split}.ends.bin")
        tokenizer.save(str(new))
        for name, write in extra_files.items():
            write(new / name)
        meta = {"vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, **about, **meta,
                "fingerprint": contents.hexdigest()[:32], "files": sorted(os.listdir(new))}
        write_json(str(new / "meta.json"), meta)
        keep_larger(path, sum(counts["bytes"] for counts in splits.values()))
    for split, counts in splits.items():
        print(f"{path / split}.bin: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
              f"{counts['bytes']:,} bytes")


def report_page(title, funnel, tables):
    """report.html as one string: tables of counts as bars, and examples of what each stage dropped or
    kept."""
    left = {f"after {row['stage']}": row["documents_out"] for row in funnel.rows}
    tables = {"documents left": left, "why documents were dropped": funnel.reasons()} | tables
    page = ["<!DOCTYPE html><meta charset=utf-8><style>body{font:14px sans-serif;max-width:60em}"
            "i{display:inline-block;background:#69c;height:.9em;margin-right:.5em}"
            "pre{background:#eee;white-space:pre-wrap}</style>", f"<h1>{html.escape(title)}</h1>"]
    for heading, table in tables.items():
        page.append(f"<h2>{heading}</h2>")
        for name, n in table.items():
            width = 40 * n / max(1, *table.values())
            page.append(f"<div><i style='width:{width:.2f}em'></i>{html.escape(str(name))} {n:,}</div>")
    page.append("<h2>examples</h2>")
    page += [f"<p>{html.escape(name)}<pre>{html.escape(text)}</pre>" for name, text in funnel.examples]
    return "\n".join(page)


# ---------------------------------------------------------------- the command

def plan(options, tokenizer, unread):
    """(files to read, their bytes, what tells this dataset from others: options, inputs, sources)."""
    import model
    files = find_files(options.input, unread, options.seed, options.max_bytes)
    others = [*options.decontaminate]
    if options.labels or options.classifier:
        others.append(options.labels or f"{options.classifier}/classifier.npz")
    states = [(name, os.stat(path).st_size, os.stat(path).st_mtime_ns)
              for path, name, *_ in [*files, *find_files(others, Counter())]]
    # every token comes from model.py's tokenizer; what a fork changes there or here changes the dataset
    sources = Path(__file__).read_text() + Path(model.__file__).read_text()
    chosen = {name: value for name, value in vars(options).items() if name not in ("workers", "out")}
    made_by = {"options": chosen,
               "inputs": digest(json.dumps([states, tokenizer and tokenizer.fingerprint])).hex(),
               "sources": digest(sources).hex()}
    return files, sum(size for _, size, _ in states[:len(files)]), made_by


def is_reusable(path, made_by):
    """Whether the dataset is there and whole, on all machines, and made by the same. What is no dataset is
    not replaced."""
    meta = {}
    with contextlib.suppress(ValueError):  # damaged: replace it
        meta = open_dataset(path).meta
    is_made = made_by.items() <= meta.items() and all((path / name).exists() for name in meta["files"])
    answers = all_gather((made_by, is_made))
    if any(other != made_by for other, _ in answers):
        raise ValueError("the machines see different files; let --input and --out lie in a shared folder")
    if path.exists() and not (path / "meta.json").exists():
        raise FileExistsError(f"{path} exists and is not a dataset; choose another --name or --out")
    return all(made for _, made in answers)


def load_tokenizer(spec):
    """None stands for one to train."""
    from model import Tokenizer
    if not spec.startswith("train:"):
        return Tokenizer.load(spec)
    size = spec.removeprefix("train:")
    if not size.isdecimal() or not 261 <= int(size) <= 500_000:
        raise ValueError(f"--tokenizer {spec}: give train:N with N from 261 (bytes and five special tokens) "
                         "to 500,000")


def load_classifier(options, workers):
    """(forest, report of its training); None without labels."""
    if options.labels:
        return train_quality_classifier(options.labels, options.seed, workers)
    if options.classifier:
        n_features = len(features(""))
        return RandomForest.load(f"{options.classifier}/classifier.npz", n_features), {}
    if options.keep < 1 or options.min_score:
        raise ValueError("--keep and --min-score need --labels FILE (synth.py label writes one) "
                         "or --classifier DATASET")
    return None, {}


def show_rows(rows):
    print(f"{'stage':<18}{'documents in':>13}{'out':>9}{'MB in':>9}{'MB out':>9}  dropped")
    for row in rows:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in row["dropped"].items()) or "-"
        print(f"{row['stage']:<18}{row['documents_in']:>13,}{row['documents_out']:>9,}"
              f"{row['bytes_in'] / 1e6:>9.2f}{row['bytes_out'] / 1e6:>9.2f}  {reasons}")


def build(options):
    """Makes the dataset that the options (see main) describe, or finds it made; returns its directory."""
    begun = time.time()
    path = Path(options.out) / options.name
    workers = options.workers or n_cores()
    unread = Counter()
    tokenizer = load_tokenizer(options.tokenizer)
    files, bytes_in, made_by = plan(options, tokenizer, unread)
    if is_reusable(path, made_by):
        print0(f"{path}: already made, reused (delete it to make it anew)")
        return path
    contamination = Contamination(options.decontaminate) if options.decontaminate else None
    forest, classifier = load_classifier(options, workers)
    # other options' parts wait for their own command
    work = path.with_name(f".{path.name}.work-{digest(json.dumps(made_by['options'])).hex()[:16]}")
    run = functools.partial(run_parts, work / digest(json.dumps(made_by)).hex()[:16], workers)

    tasks = split_files(files) or [[]]
    parts = run("documents", len(tasks), lambda i: make_part(tasks[i], options))
    funnel = Funnel(run, parts, options.seed)
    skipped = sum_counts([unread, *(part("skipped") for part in parts)])
    funnel.count("read", len(funnel.alive) + skipped.total(), bytes_in, skipped)
    funnel.drop("rules", column(parts, "reason"))
    funnel.drop("exact duplicates", exact_duplicates(funnel))
    tables = {"redacted": sum_counts(part("redacted") for part in parts)}
    if options.dedup_threshold < 1:
        funnel.drop("near duplicates", near_duplicates(funnel, options.dedup_threshold))
    extra_files = {}
    if contamination:
        reasons, hits = decontaminate(funnel, contamination)
        funnel.drop("decontaminate", reasons)
        extra_files["contaminated.jsonl"] = lambda file: write_jsonl(file, hits)
    if forest:
        reasons, tables["scores"] = low_value(funnel, forest, options)
        funnel.drop("educational value", reasons)
        extra_files["classifier.npz"] = forest.save
    if options.max_documents:
        stay = funnel.in_order(funnel.living())[:options.max_documents]
        reasons = np.where(np.isin(funnel.living(), stay), b"", b"more than asked for")
        funnel.drop("--max-documents", reasons)
    if RANK == 0:
        show_rows(funnel.rows)
    if not funnel.alive.any():
        raise ValueError(f"--input {' '.join(options.input)}: no document is left ({funnel.reasons()}); "
                         "give more text, or keep all by --rules none")
    tokenizer, encoded = make_tokens(funnel, tokenizer, options)
    if RANK == 0:
        funnel.show("kept", funnel.living())
        extra_files["report.html"] = lambda file: file.write_text(report_page(str(path), funnel, tables))
        meta = {"funnel": funnel.rows, "classifier": classifier, **made_by}
        write_dataset(path, meta, tokenizer, encoded, extra_files)
        print(f"{time.time() - begun:.1f} s; what was kept and dropped: {path / 'report.html'}")
    all_gather()  # no rank reads the parts any more
    if RANK == 0:
        shutil.rmtree(work, ignore_errors=True)
    return path


# ---------------------------------------------------------------- the command line, for all scripts

def fail(message, code=2):
    """End with one line that says what to do."""
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    def __init__(self, **more):
        formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=26)
        super().__init__(formatter_class=formatter, allow_abbrev=False, **more)

    def error(self, message):
        fail(f"{message}; `python {self.prog} -h` explains the options")

    def parse_known_args(self, args=None, namespace=None):
        """Say which option was meant, before argparse takes a mistyped one's value for something else."""
        words = sys.argv[1:] if args is None else args
        has_subcommands = self._subparsers is not None      # each of which looks at its own options
        for word in [] if has_subcommands else itertools.takewhile("--".__ne__, words):
            match = re.fullmatch(r"(--[\w-]+)(=.*)?", word, re.S)   # a text may begin with "-- "
            if match and match[1] not in self._option_string_actions:
                meant = difflib.get_close_matches(match[1], self._option_string_actions, 1)
                hint = f"; is {meant[0]} meant?" if meant else ""
                self.error(f"there is no option {match[1]}{hint}")
        return super().parse_known_args(args, namespace)

    def table(self, text, **types):
        """Options from a table: blocks of a title and rows `--name METAVAR  default  help`, 2 spaces apart.

        Without METAVAR it is a flag. N is a whole number of at least 1 (0, if that is the default), X a
        number of at least 0, SHARE one up to 1; A|B is a choice, what ends in "..." takes several, and
        `types` has the types, or choices, of other metavars. The default "-" is None.
        """
        types = {"X": number(float, 0), "SHARE": number(float, 0, 1), **types}
        for block in text.strip().split("\n\n"):
            title, *rows = re.split(r"\n(?=--)", block)
            group = self.add_argument_group(title)
            for row in rows:
                option, about = re.split(" {2,}", row, maxsplit=1)
                name, _, metavar = option.partition(" ")
                if not metavar:
                    group.add_argument(name, action="store_true", help=about)
                    continue
                default, about = re.split(" {2,}", about, maxsplit=1)
                more = {"metavar": metavar.removesuffix("..."), "help": about}
                if default != "-":
                    more.update(default=default, help=f"{about} [%(default)s]")
                if metavar.endswith("..."):
                    more["nargs"] = "+"
                kind = number(int, int(default != "0")) if metavar == "N" else types.get(metavar)
                if "|" in metavar:
                    kind = metavar.split("|")
                more["type" if callable(kind) else "choices"] = kind
                group.add_argument(name, **more)


def command(stopped="stopped"):
    """For a script's main: bad input ends it in one line with code 2, Ctrl-C with 130 and what `stopped`
    says, SIGTERM with 143."""
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
            except (ValueError, OSError, ImportError) as error:
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


EXAMPLES = """examples:
  python data.py --input crawl/ more.jsonl.gz --name web --language en --tokenizer train:32768
  python data.py --input data/web --name best --labels labels.jsonl --keep 0.05 --decontaminate test.jsonl
  torchrun --nproc_per_node=8 data.py --input /shared/crawl --out /shared/data --name web
"""


OPTIONS = """
from where to where
--input PATH...  -  folders, text, code, .jsonl, .wet, .parquet, .gz of these, datasets, URLs [python: this \
machine's own source]
--max-bytes N  0  read a sample of about so many bytes; 0: everything
--name NAME  web  name of the dataset
--out FOLDER  data  folder of the datasets

what stays
--language CODE...  -  keep code and these: ar bn en hi ja ko ru zh
--rules auto|code|prose|none  auto  auto tells code from prose, passes problems
--redact-pii web|all|none  web  where to mask addresses and keys
--dedup-threshold SHARE  0.8  Jaccard similarity of word 5-grams; 1, for exercises: equal texts only
--decontaminate FILE...  -  problems: documents with one go to contaminated.jsonl
--labels FILE  -  JSON Lines with `text` and `score` 0 to 5: a forest learns what has 3 or more
--classifier DATASET  -  the forest of this dataset instead of --labels
--keep SHARE  1.0  of the documents, the best
--min-score SHARE  0.0  least predicted probability of being good
--max-documents N  0  keep at most so many documents; 0: all

tokens and processes
--tokenizer SPEC  train:1024  train:N makes a BPE of N tokens; or a directory, tokenizer.json, gpt2, \
cl100k_base, o200k_base, bytes
--val-share BELOW_0.9  0.01  share of the documents for validation
--workers N  0  processes; 0: one a core
--seed N  0  of the sample and of the documents' order
"""


@command("stopped; no dataset was changed, and the same command goes on from here")
def main(arguments=None):
    """The command line; also for other scripts: main(["--name", "web"]) returns the dataset's directory."""
    parser = Parser(prog="data.py", usage="data.py [options]", description=__doc__, epilog=EXAMPLES)
    parser.table(OPTIONS, NAME=folder_name, **{"BELOW_0.9": number(float, 0, 0.9)})
    parser.set_defaults(input=["python"], decontaminate=[])
    options = parser.parse_args(arguments)
    if WORLD_SIZE > 1:  # a dead rank ends the job; a rank may work for days while another waits for it
        import torch.distributed as dist
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=9))
    dataset = build(options)
    if WORLD_SIZE > 1:
        leave()
    return dataset


if __name__ == "__main__":
    main()

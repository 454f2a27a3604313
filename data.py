"""Documents -> clean, deduplicated, scored text -> tokens: `python data.py` makes data/web from this machine's own Python source.

    find_files -> read_documents       directories, files, JSON Lines, WET, parquet, URLs; gzipped or not
    -> language, quality_rule          a verdict on each document, with its reason
    -> Contamination                   documents that contain a benchmark's problems
    -> minhash, find_duplicates        exact and near duplicates, the best of each group kept; paragraphs too (without_repeats)
    -> RandomForest                    educational value, learned from labels (synth.py label)
    -> train_bpe -> data/NAME/         {train.bin, val.bin, tokenizer.json, meta.json, report.html}

All work is cut into numbered parts on disk (class Work), so memory does not grow with the input, a stopped command goes on where it was, and
`torchrun data.py ...` on several machines with a shared folder makes the same dataset."""
import argparse
import ast
import builtins
import concurrent.futures
import contextlib
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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

CODE = set(".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .jl .rb .sh .lua .swift .kt .cs .sql".split())
PROSE = set(".txt .md .rst .tex .text".split())
RECORDS, CRAWL = {".jsonl", ".ndjson"}, {".wet", ".warc"}
DAMAGED = EOFError, zlib.error, gzip.BadGzipFile


def n_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parallel(function, items, workers, description):
    """[function(item) for item in items] in forked processes: they inherit the items, only results travel. In order."""
    items = list(items)
    bar = functools.partial(tqdm, total=len(items), desc=description, disable=None, leave=False)
    if min(workers, len(items)) <= 1:
        return list(bar(map(function, items)))
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _inherit, (function, items)) as pool:
            return list(bar(pool.map(_call, range(len(items)))))
    except concurrent.futures.BrokenExecutor:
        raise OSError(f"a process died while {description}, most likely for lack of memory; use fewer --workers or --max-bytes") from None


def _inherit(*work):
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to report
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(index):
    return _work[0](_work[1][index])


def batches(items, size, n_bytes=len):
    """Consecutive lists of items of about `size` bytes each; n_bytes(item) says how long an item is."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += n_bytes(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def digest(data):
    return hashlib.blake2b(data.encode() if isinstance(data, str) else data, digest_size=16).digest()


def hashes_of(raws):
    """64 bits of the SHA-256, which CPUs have instructions for, of some bytes: uint64."""
    return np.frombuffer(b"".join(hashlib.sha256(raw).digest()[:8] for raw in raws), ">u8").astype(np.uint64)


def sum_counts(parts):
    total = Counter()
    for part in parts:
        total.update(part)
    return total


@contextlib.contextmanager
def aside(path):
    """A path for a file or folder that takes the place of `path` when all went well, and vanishes when not."""
    new, old = (path.with_name(f".{path.name}.{what}-{os.getpid()}") for what in ("new", "old"))

    def tidy():
        if old.exists() and not path.exists():  # stopped between the two renames
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)
        new.unlink(missing_ok=True)

    path.parent.mkdir(parents=True, exist_ok=True)
    tidy()  # in a container a killed command's successor has the same process id
    try:
        yield new
        if path.is_dir():
            os.replace(path, old)
        os.replace(new, path)
    finally:
        tidy()


class Work:
    """Work in numbered parts that outlive the process: part i of a stage is the directory FOLDER/STAGE/i, which appears whole.

    Part i belongs to rank i mod WORLD_SIZE of torchrun; one that is there is not made again; a stage ends when all are there. A part depends on
    its number alone. So cores, machines on a shared folder and going on after a kill are one mechanism, and the result is always the same."""

    def __init__(self, folder, workers, rank=0, world=1):
        self.folder, self.workers, self.rank, self.world = Path(folder), workers, rank, world

    def run(self, stage, n, make):
        """make(i) -> {name: array or what JSON can hold} for i < n; returns the n parts: part(name) reads one value, large arrays mapped."""
        folders = [self.folder / stage / str(i) for i in range(n)]

        def one(i):
            with aside(folders[i]) as new:
                new.mkdir()
                for name, value in make(i).items():
                    if isinstance(value, np.ndarray):
                        np.save(new / name, value)
                    else:
                        (new / f"{name}.json").write_text(json.dumps(value))

        @functools.lru_cache(8)
        def load(folder, name):
            path = folder / f"{name}.npy"
            if not path.exists():
                return json.loads((folder / f"{name}.json").read_text())
            return np.load(path, mmap_mode="r" if path.stat().st_size > 1 << 16 else None)

        parallel(one, [i for i in range(self.rank, n, self.world) if not folders[i].exists()], self.workers, stage)
        while not all(folder.exists() for folder in folders):  # other ranks' parts
            time.sleep(0.1)
        return [functools.partial(load, folder) for folder in folders]


# ---- JSON Lines ----

def read_jsonl(path):
    """Yields the objects of a JSON Lines file (gzipped if it ends in .gz). ValueError names the line that is broken."""
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
    with aside(Path(path)) as new, open(new, "wb") as raw:
        # neither name nor time in the gzip header: the same records give the same file
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if str(path).endswith(".gz") else contextlib.nullcontext(raw) as file:
            for count, record in enumerate(records, 1):
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        raw.flush()
        os.fsync(raw.fileno())
    return count


# ---- reading ----

def suffix_of(name):
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def fetch(url):
    """A URL's file in the cache (MINPHI_CACHE, ~/.cache/minphi), fetched once, resumed when it was cut."""
    import fcntl
    from model import download
    folder = Path(os.environ.get("MINPHI_CACHE") or Path.home() / ".cache/minphi", "files", digest(url).hex())
    path = folder / (os.path.basename(url.split("?")[0].rstrip("/")) or "file")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # several ranks ask at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            download(url, str(path))
    return str(path)


def find_files(paths, drop, seed=0, max_bytes=0, max_documents=0):
    """The files to read as (path, name, begin, end), for records that begin in these bytes; by name, or about max_bytes of them in hash order.

    `python` stands for this interpreter's standard library and site-packages; URLs are fetched; links to directories are not followed. What
    cannot be read is counted in `drop` (a Counter of reasons)."""
    found = {}  # path -> (name, path, size)
    for root in map(str, paths):
        tops, wanted = [fetch(root) if re.match("https?://", root) else root], CODE | PROSE | RECORDS | CRAWL | {".parquet"}
        if root == "python":
            tops, wanted = sorted({os.path.realpath(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")}), {".py"}
        elif not os.path.lexists(tops[0]):
            raise FileNotFoundError(f"{root}: no such file or directory (`python` names this machine's own source)")
        for top in map(os.path.abspath, tops):
            walk = os.walk(top, onerror=lambda error: drop.update(["unreadable"])) if os.path.isdir(top) else [(os.path.dirname(top), [], [top])]
            for folder, folders, names in walk:
                folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
                for path in (os.path.join(folder, name) for name in names):
                    if path != top and suffix_of(path) not in wanted:
                        drop.update(["not a text file"] if root != "python" else [])
                    elif os.path.isfile(path):  # reading a pipe or a device could wait for ever
                        name = os.path.relpath(path, top) if path != top else os.path.basename(top)
                        found.setdefault(path, (name, path, os.path.getsize(path)))
                    else:
                        drop["not a regular file" if os.path.exists(path) else "unreadable"] += 1
    files = sorted(found.values())
    if max_bytes or max_documents:
        files = sorted(files, key=lambda file: digest(f"{seed} {file[0]}"))[:max_documents or None]
    room = itertools.accumulate((-size for *_, size in files), initial=max_bytes or math.inf)
    return [(path, name, 0, math.inf if left >= size else left) for (name, path, size), left in zip(files, room) if left > 0]


def read_documents(files, drop, max_document_bytes=10_000_000):
    """Yields a dict {text, id, source, bytes, ...} for each document in files, as find_files gives them.

    A .jsonl file holds one document a line, a .wet file one a record of Common Crawl, a .parquet file one a row; with `text`, or `prompt` and
    its `canonical_solution` or `completion`. Any other file is one document. Whatever cannot be used is counted in `drop` by reason."""
    for path, name, begin, end in files:
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                kind = suffix_of(path)
                if kind in RECORDS:
                    records = lines(file, 8 * max_document_bytes, drop, begin, end)
                elif kind in CRAWL:
                    records = crawled_pages(file, max_document_bytes, end)
                elif kind == ".parquet":
                    records = parquet_rows(path)
                else:
                    records = [(name, {"text": file.read(max_document_bytes + 1)})]
                for at, record in records:
                    own = {"id": f"{name}@{at}" if isinstance(at, int) else at, "source": path}
                    if document := document_of(record, own, drop, max_document_bytes):
                        yield document
        except DAMAGED:
            drop["damaged gzip"] += 1
        except ImportError:
            drop["parquet, for which pyarrow is not installed (pip install pyarrow)"] += 1
        except (OSError, ValueError):
            drop["unreadable"] += 1


def lines(file, limit, drop, begin, end):
    """(offset, line) of a binary file, for lines that begin in [begin, end); those of `limit` bytes and more are skipped without being held."""
    rest = begin > 0  # of a line that began before
    file.seek(begin - rest)
    while (at := file.tell()) < end and (line := file.readline(limit)):
        ends = len(line) < limit or line.endswith(b"\n")
        if not rest and ends and line.strip():
            yield at, line
        drop.update([] if rest or ends else ["too large"])
        rest = not ends


def crawled_pages(file, limit, end):
    """Common Crawl's WET: (address, {text, web}) of its records of type `conversion`."""
    while file.tell() < end and (line := file.readline(1 << 16)):
        if line.startswith(b"WARC/"):
            head = dict(row.decode(errors="replace").partition(": ")[::2] for row in iter(lambda: file.readline(1 << 16).strip(), b""))
            length = int(head.get("Content-Length", ""))
            text = file.read(min(length, limit + 1))
            if len(text) < min(length, limit + 1):
                raise EOFError
            file.seek(length - len(text), os.SEEK_CUR)
            if head.get("WARC-Type") == "conversion":
                yield head.get("WARC-Target-URI", "?"), {"text": text, "web": True}


def parquet_rows(path):
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path) as file:  # (its errors are OSErrors)
        yield from enumerate(row for batch in file.iter_batches(1000) for row in batch.to_pylist())


def document_of(record, own, drop, max_bytes):
    """A line of JSON or what it holds -> own | record | {text, bytes}, with newlines as line ends; None, with the reason counted, if unusable.
    A problem's prompt ends before its last newline, so that newline and indentation, which are one token, belong to the completion."""
    reason = None
    try:
        record = json.loads(record) if isinstance(record, bytes) else record
        record = record if isinstance(record, dict) else {}
        prompt, solution = record.get("prompt"), record.get("canonical_solution", record.get("completion"))
        is_problem = isinstance(prompt, str) and isinstance(solution, str)
        text = prompt + solution if is_problem else record.get("text")
        raw = text.encode() if isinstance(text, str) else text
        if not isinstance(raw, bytes):
            reason = "no text in record"
        elif len(raw) > max_bytes or b"\0" in raw:
            reason = "too large" if len(raw) > max_bytes else "binary"
        elif not (text := raw.decode("utf-8-sig")).strip():
            reason = "empty"
    except UnicodeError:  # bad bytes, or half a surrogate pair in JSON
        reason = "invalid UTF-8"
    except (ValueError, RecursionError):
        reason = "invalid JSON"
    if reason:
        drop[reason] += 1
        return None
    if not is_problem:  # there every character has its place
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    own |= {"id": record.get("task_id") or record.get("path") or own["id"]} | record | {"text": text, "bytes": len(text.encode())}
    return own | {"prompt_chars": len(prompt.rstrip()) if is_problem else 0}


# ---- language, quality, personal data ----

GENERATED = re.compile(r"auto-?(?:matically)?[ -]?generated|@generated|do not (?:edit|modify)", re.I)
COMMENT = re.compile(r"\"{3}[\s\S]*?\"{3}|'{3}[\s\S]*?'{3}|#[^\n]*")
CODE_LINE = re.compile(r"\s*(?:(?:def|class|import|from|return|if|for|while|else|elif|try|function|var|const|let|int|void|fn"
                       r"|#include)\b|[\w.\[\]]+ [-+*/]?= |//|[{}@])|.*[;{})]\s*$")
ALNUM = bytes(i for i in range(256) if i >= 128 or chr(i).isalnum())
PUNCTUATION = string.punctuation + "’“”‘–—…•«»¿¡"
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
SCRIPTS = {"ja": "[\u3040-\u30ff]", "ko": "[\uac00-\ud7af]", "zh": "[\u4e00-\u9fff]", "hi": "[\u0900-\u097f]", "bn": "[\u0980-\u09ff]",
           "ar": "[\u0600-\u06ff]", "ru": "[\u0400-\u04ff]"}
FREQUENT = {  # words that are frequent in one language and rare in the others
    "en": "the of and to in is that for it with as was on are be this by you not or from have at an which will your has if",
    "es": "de la que el en y los se del las un por con no una su para es al lo como más o pero este si sin",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il cette avec ou vous",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es werden wird sie bei",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como ou ao são você",
    "it": "di e il la che in a per un è del le non con una i da si della sono gli dei nel alla più come questo",
    "nl": "de van het een en in is dat op te zijn met voor niet aan er om ook als dan bij of wordt naar je",
    "pl": "w i na z do się nie że to jest o jak po co za od przez dla ale czy są lub może oraz przed aby",
    "tr": "ve bir bu da de için ile olarak çok daha gibi ne kadar sonra ise var değil veya her bunu olduğu",
    "id": "yang dan di dengan untuk dari ini itu pada adalah tidak dalam akan ke oleh atau juga anda dapat",
    "sv": "och att det som en på är av för med den till inte har om ett men jag var sig så vi kan från",
    "da": "og at det er en af til på som med for ikke den der har de et men jeg var sig så vi kan fra",
    "fi": "ja on ei että se oli ovat hän mutta kun niin myös kuin tai joka jos mukaan olla sen siitä ole tämä voi vain",
    "vi": "của và là có không các được cho trong một người những với này đã khi để từ về như bạn cũng"}
LANGUAGES_OF = {word: [name for name in FREQUENT if word in FREQUENT[name].split()] for word in " ".join(FREQUENT.values()).split()}
PERSONAL = [(re.compile(pattern), mask) for pattern, mask in (
    (r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b", "<EMAIL>"),
    (r"(?<![\d.])(?!(?:0|10|127|255)\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.)(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?=\d)|(?![\d.]))){4}", "<IP>"),
    (r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----", "<KEY>"),
    (r"\b(?:AKIA[0-9A-Z]{16}|(?:gh[pousr]|hf)_\w{30,}|(?:sk|xox[baprs])-[\w-]{20,}|AIza[\w-]{35}|eyJ[\w-]{10,}(?:\.[\w-]{10,}){2})", "<KEY>"),
    (r"(?i)((?:key|token|secret|password|passwd)['\"]?\s*[:=]\s*)['\"][\w+/=.-]{16,}['\"]", r"\1'<KEY>'"))]


def language(text, threshold=0.08):
    """The language of prose by its script, or by the share of its words that are frequent in it (1 / k of k languages'); "?" below `threshold`."""
    text = unicodedata.normalize("NFC", text[:5000].lower())  # Vietnamese often comes in pieces
    n_letters, scores = sum(map(str.isalpha, text)), Counter()
    for name, script in {} if text.isascii() else SCRIPTS.items():
        if len(re.findall(script, text)) > (0.1 if name == "ja" else 0.5) * n_letters:  # Japanese mixes in Chinese letters
            return name
    words = re.findall(r"[^\W\d_]+", text)
    for word in words:
        for name in LANGUAGES_OF.get(word, ()):
            scores[name] += 1 / len(LANGUAGES_OF[word])
    best = max(scores, key=scores.get, default="?")
    return best if scores[best] >= threshold * max(1, len(words)) else "?"


def is_code(document):
    """Code or prose, by the suffix of the id, or by its lines where there is none."""
    suffix = suffix_of(str(document["id"]))
    rows = [row for row in document["text"][:20000].splitlines() if row.strip()]
    return suffix in CODE or suffix not in PROSE and sum(bool(CODE_LINE.match(row)) for row in rows) > 0.4 * len(rows)


def quietly(parse, text):
    """parse(text, ...), or None for a text that is not Python. (symtable.symtable takes an eighth of the time of ast.parse.)"""
    with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        warnings.simplefilter("ignore")  # old escapes in strings are not our business
        return parse(text, "<document>", "exec")


def rule(checks):
    """Makes of a generator of (reason, whether it holds) a function that returns the first reason that holds, or None."""
    return functools.wraps(checks)(lambda *args: next((reason for reason, holds in checks(*args) if holds), None))


@rule
def code_rule(text, name):
    """Why a source file teaches little, or None. The Stack's and StarCoder's rules, then phi-1's wish for explained code."""
    rows, raw = text.splitlines(), text.encode()
    yield "too short", len(raw) < 100
    yield "minified", max(map(len, rows)) > 1000 or len(text) > 100 * len(rows)
    yield "few letters and digits", len(raw.translate(None, ALNUM)) > 0.75 * len(raw)
    yield "generated", GENERATED.search(text[:2000])
    if name.endswith(".py"):
        yield "test", re.search(r"\btest", name.replace("_", " "))
        share = len(COMMENT.sub("", text)) / len(text)
        yield ("no code", share < 0.1) if share < 0.5 else ("no documentation", share > 0.98)
        yield "does not parse", not quietly(symtable.symtable, text)


@rule
def gopher_rule(text):
    """Gopher's quality and repetition rules (arXiv 2112.11446, table A1), words split at whitespace: the reason to drop a page, or None."""
    words, rows = text.split(), text.splitlines()
    n, full = len(words), [word for word in words if word.strip(PUNCTUATION)]
    yield "fewer than 50 words", len(full) < 50
    yield "more than 100,000 words", len(full) > 100_000
    yield "mean word length", not 3 <= sum(map(len, full)) / len(full) <= 10
    yield "symbols", max(text.count("#"), text.count("…") + text.count("...")) > 0.1 * n
    yield "bullet list", sum(row.lstrip().startswith(("•", "-", "*")) for row in rows) > 0.9 * len(rows)
    yield "lines that break off", sum(row.rstrip().endswith(("...", "…")) for row in rows) > 0.3 * len(rows)
    yield "few words with letters", len(re.findall(r"[^\s\W\d_]\S*", text)) < 0.8 * n
    yield "no stop words", len(STOP_WORDS.intersection(words)) < 2
    for reason, pieces in ("repeated paragraphs", re.split(r"\n{2,}", text.strip())), ("repeated lines", re.split(r"\n+", text)):
        counts = Counter(pieces)
        yield reason, len(pieces) - len(counts) > 0.3 * len(pieces)
        yield reason, sum(len(piece) * (k - 1) for piece, k in counts.items()) > 0.2 * len(text)
    hashes, lengths = np.fromiter(map(hash, words), np.int64, n).view(np.uint64), np.fromiter(map(len, words), np.int64, n)
    grams, total = hashes, np.append(0, np.cumsum(lengths))
    for size in range(2, 11):  # grams[i] stands for the words i ... i + size - 1
        grams = mix(grams[:-1] + hashes[size - 1:] * np.uint64(2 * size + 1))
        order = grams.argsort()
        again = grams[order[1:]] == grams[order[:-1]]
        if not again.any():
            return
        if size < 5:
            start = np.flatnonzero(np.append(True, ~again))
            often = np.diff(start, append=len(grams))
            i = order[start[often.argmax()]]
            yield "one phrase again and again", often.max() * (total[i + size] - total[i]) > (0.24 - 0.02 * size) * len(text)
        else:  # words of any phrase that stands there twice, but once
            covered = np.zeros(n, bool)
            covered[order[1:][again][:, None] + np.arange(size)] = True
            yield "repeated phrases", lengths[covered].sum() > (0.2 - 0.01 * size) * len(text)


@rule
def prose_rule(text):
    """Why a page of prose is poor, or None: Gopher's rules, then those of C4 (arXiv 1910.10683) and FineWeb (2406.17557) on lines."""
    reason, rows = gopher_rule(text), [row.strip() for row in text.splitlines() if row.strip()]
    yield reason, reason
    yield "filler", re.search("lorem ipsum|javascript (?:is|must be|to be) (?:enabled|disabled)|enable javascript", text, re.I)
    yield "few finished lines", sum(row.endswith((".", "!", "?", '"', "'", ":", ";", ")", "”")) for row in rows) < 0.12 * len(rows)
    yield "short lines", sum(len(row) < 30 for row in rows) > 0.67 * len(rows)
    yield "generated", GENERATED.search(text[:500])


def quality_rule(document, rules):
    """The reason to drop a document, or None. `auto` leaves problems alone, and tells code from prose: Gopher's thresholds would destroy code."""
    if rules == "none" or rules == "auto" and document.get("prompt_chars"):
        return None
    is_prose = rules == "prose" or rules == "auto" and not is_code(document)
    return prose_rule(document["text"]) if is_prose else code_rule(document["text"], str(document["id"]))


# ---- deduplication ----

N_GRAM = 5


def mix(x):
    """A bijection of uint64 that spreads every input bit over the output (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache
def powers(bits, base=0x9E3779B97F4A7C15):
    """base^i and base^-i modulo 2^64 for i < 2^bits: an odd number has an inverse there."""
    return [np.cumprod(np.full(1 << bits, factor, np.uint64)) for factor in (base, pow(base, -1, 2**64))]


def word_hashes(raws):
    """Hashes of the words of some texts (bytes), uint64 (words,), and where each text's words begin in there, (texts + 1,).

    All texts are hashed as one buffer: with H the running sum of c_t B^t (mod 2^64), the word in [i, j) has the hash
    (H[j] - H[i]) B^-i, whatever its position. Words are runs of letters, digits and non-ASCII bytes. Fastest by about 128 kB."""
    joined = b"\n" + b"\n".join(raws) + b"\n"
    is_word = np.frombuffer(joined.translate(bytes(i in ALNUM for i in range(256))), bool)
    before, last = np.flatnonzero(is_word[1:] != is_word[:-1]).reshape(-1, 2).T  # the byte before a word's first, and its last
    power, inverse = powers(max(17, len(joined).bit_length()))
    running = np.frombuffer(joined, np.uint8).astype(np.uint64)
    running *= power[:len(joined)]
    np.cumsum(running, out=running)
    return mix((running[last] - running[before]) * inverse[before]), np.searchsorted(before, np.cumsum([0] + [len(raw) + 1 for raw in raws]))


def gram_hashes(words, n):
    """Hashes of the n consecutive words from each position on, uint64 (words,); those of the last n - 1 positions mean nothing."""
    grams = words.copy()
    for i in range(1, n):
        grams[:-i] += words[i:] * np.uint64(2 * 0x2545F4914F6CDD1D * i + 1 & 2**64 - 1)
    return mix(grams)


def minhash(texts, n_permutations=112):
    """MinHash signatures of word 5-grams, uint32 (documents, n_permutations): least values under x -> scale x mod 2^32 of mixed hashes."""
    scale = np.random.default_rng(0).integers(0, 2**31, n_permutations, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    signatures, at = np.empty((len(texts), n_permutations), np.uint32), 0
    for raws in batches((text.encode() for text in texts), 1 << 17):
        words, bounds = word_hashes(raws)
        grams = (gram_hashes(words, N_GRAM) >> np.uint64(32)).astype(np.uint32)
        # a text too short for a gram resembles only itself
        own = [grams[i:j - N_GRAM + 1] if j - i >= N_GRAM else np.frombuffer(digest(raw), np.uint32)[:1]
               for i, j, raw in zip(bounds, bounds[1:], raws)]
        start, own = np.cumsum([0] + [len(part) for part in own])[:-1], np.concatenate(own)
        permuted = np.empty_like(own)
        for k in range(n_permutations):
            np.multiply(own, scale[k], out=permuted)
            signatures[at:at + len(raws), k] = np.minimum.reduceat(permuted, start)
        at += len(raws)
    return signatures


def band_keys(signatures, n_bands):
    """uint64 (bands, documents): equal where all values of a band are."""
    keys = np.zeros((n_bands, len(signatures)), np.uint64)
    for key, band in zip(keys, np.split(signatures.T, n_bands) if n_bands else ()):
        for column in band:
            key[:] = mix(key + column + np.uint64(1))
    return keys


def candidates(keys, reach=4):
    """Pairs (m, 2) of indices with equal keys: each with the next `reach` ones and with its bucket's first, so a bucket of n gives 5n pairs, not n^2."""
    order = keys.argsort(kind="stable")
    keys = keys[order]
    begins = np.maximum.accumulate(np.where(np.append(True, keys[1:] != keys[:-1])[:len(keys)], np.arange(len(keys)), 0))
    ends = [np.flatnonzero(begins < np.arange(len(keys)))] + [step + np.flatnonzero(keys[step:] == keys[:-step]) for step in range(1, reach + 1)]
    starts = [begins[ends[0]]] + [end - step for step, end in enumerate(ends[1:], 1)]
    return np.unique(np.stack([order[np.concatenate(starts)], order[np.concatenate(ends)]], 1), axis=0)


def components(pairs):
    """(nodes, component of each) of the graph of these pairs: every node takes the least label among its neighbours, and its label's label."""
    nodes, pairs = np.unique(pairs, return_inverse=True)
    pairs, label, old = pairs.reshape(-1, 2), np.arange(len(nodes)), None
    while not np.array_equal(label, old):
        least, old = label[pairs].min(1, keepdims=True), label.copy()
        np.minimum.at(label, label[pairs], least)
        np.minimum.at(label, pairs, least)
        label = label[label]
    return nodes, label


def spanning(pairs):
    """The fewest pairs that connect what these connect: each node, but the first of its component, with that one."""
    nodes, label = components(pairs)
    return np.stack([nodes[label], nodes], 1)[label != np.arange(len(nodes))]


# ---- decontamination ----

FUNCTION = re.compile(r"^(?=(([ \t]*)(?:async )?def [^\n]*\n(?:(?:\2[ \t)][^\n]*)?\n)*))", re.M)
SIGNS = np.frombuffer(b"+-*/%<>=()[]{}.,:|&", np.uint8)


def tree_of(source):
    """(name, labels of the nodes, level by level) of a function's syntax tree, or None: without documentation, annotations and chosen names."""
    function = next(iter(getattr(quietly(ast.parse, textwrap.dedent(source)), "body", ())), None)
    if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    function.body, function.returns = function.body[ast.get_docstring(function) is not None:], None
    for argument in function.args.args:
        argument.annotation = None
    nodes = [node for node in ast.walk(function) if not isinstance(node, ast.expr_context)]
    return function.name, ["." + node.attr if isinstance(node, ast.Attribute) else repr(node.value)[:20] if isinstance(node, ast.Constant) else
                           node.id if isinstance(node, ast.Name) and hasattr(builtins, node.id) else type(node).__name__ for node in nodes]


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

    ASCII needs no more than lower(), for word_hashes leaves its punctuation out; so only words that are not
    ASCII, in rows that are not, are looked at. (No character composes with a space or a line end before it,
    so words can be normalized one by one.)"""
    if not text.isascii():
        text = "\n".join([row if row.isascii() else fold_row(row) for row in text.split("\n")])
    return text.lower()


def fold_row(row):
    words = row.split(" ")
    return " ".join([word if word.isascii() else unicodedata.normalize("NFKC", word).translate(SEPARATORS)
                     for word in words])


def words_of(text):
    """The words that word_hashes hashes, of a folded text."""
    return re.findall(rb"[0-9a-z\x80-\xff]+", fold(text).encode())


def strings_in(value):
    """All strings in a value of JSON, in their order."""
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in values for text in strings_in(item)]


class Contamination:
    """Finds documents that contain benchmark problems, or parts of them.

    By words (phi-4, arXiv 2412.08905, appendix B), folded on both sides: one 13-gram in common, or 7-grams that
    make up `share` of the shorter text's. Grams of few different words (lists of numbers) do not count, nor those
    of more than two problems of one file (what a benchmark says everywhere); a problem may stand in any number of
    files, and with any number of answers. By syntax (phi-1, arXiv 2306.11644, section 5): functions whose trees
    have difflib's ratio >= `match`; trees below `smallest` do not count."""
    # The usual benchmarks' fields, in any case, `_` for a space. No `context`, `passage` or `article`: these are
    # public pages, of which a corpus may well have a copy.
    QUESTION = ("instruction goal ctx prompt premise question question_stem question_content problem "
                "problem_statement sentence input turns text").split()
    ANSWER = ("choices options endings sol1 sol2 option1 option2 choice1 choice2 canonical_solution completion "
              "answer answers best_answer correct_answer incorrect_answers incorrect_answer_1 incorrect_answer_2 "
              "incorrect_answer_3 distractor1 distractor2 distractor3 mc1_targets mc2_targets target solution "
              "solutions code").split()

    FEWEST = 3  # 7-grams in common that tell anything

    def __init__(self, paths, share=0.6, match=0.9, smallest=20):
        self.share, self.match, self.smallest = share, match, smallest
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

        self.index, self.trees, self.table = {7: {}, 13: {}}, [], np.zeros(1 << 20, bool)
        for i, (_, text) in enumerate(self.problems):
            words, (grams, _) = words_of(text), self.grams([fold(text).encode()])
            for n, owners in self.index.items():
                for k, gram in enumerate(grams[n][:max(0, len(words) - n + 1)].tolist()):
                    if len({word for word in words[k:k + n] if not word.isdigit()}) > n // 2:
                        owners.setdefault(gram, set()).add(i)
            trees = ((source, tree_of(source)) for source, _ in FUNCTION.findall(text + "\n"))
            self.trees += [(i, self.bag(source), tree[1]) for source, tree in trees if tree and len(tree[1]) >= smallest]

        def is_common(own):
            files = Counter(file for file, _ in set().union(*(places[i] for i in own)))
            return max(files.values()) > 2

        for n, owners in self.index.items():
            self.index[n] = {gram: own for gram, own in owners.items() if not is_common(own)}
        self.n_grams = Counter(itertools.chain(*self.index[7].values()))
        self.sorted = {n: np.sort(np.array([*owners, 2**64 - 1], np.uint64)) for n, owners in self.index.items()}
        self.table[np.concatenate([*self.sorted.values()]) >> np.uint64(44)] = True  # by 20 bits: most need no other look
        self.bags = np.array([bag for _, bag, _ in self.trees])

        protected = {i for i, n in self.n_grams.items() if n >= self.FEWEST}
        protected.update(*self.index[13].values(), (i for i, *_ in self.trees))
        self.unprotected = [name for i, (name, _) in enumerate(self.problems) if i not in protected]
        if self.unprotected and int(os.environ.get("RANK", 0)) == 0:
            first = ", ".join(self.unprotected[:5]) + (", ..." if len(self.unprotected) > 5 else "")
            print(f"decontamination: {len(self.unprotected):,} of {len(self.problems):,} problems have too few words "
                  f"of their own to be recognized, so copies of them stay: {first}", file=sys.stderr)

    def read(self, paths):
        """Yields (name, file, question, question and answer) of each problem; plain texts are one file together."""
        drop = Counter()
        for file in find_files(paths, drop):
            path, name, kind = *file[:2], suffix_of(file[0])
            is_table = kind in RECORDS or kind == ".parquet"
            try:
                records = read_jsonl(path) if kind in RECORDS else read_documents([file], drop)
                if kind == ".parquet":
                    records = [row for _, row in parquet_rows(path)]
            except ImportError:
                raise ValueError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from None
            for i, record in enumerate(records, 1):
                fields = {str(key).lower().replace(" ", "_"): value for key, value in record.items()}
                question, answer = ("\n".join(text for key in keys for text in strings_in(fields.get(key)))
                                    for keys in (self.QUESTION, self.ANSWER))
                problem = str(record.get("task_id", f"{name}:{i}"))
                yield problem, path if is_table else "", question, f"{question}\n{answer}"
        if drop:
            raise ValueError(f"--decontaminate {' '.join(map(str, paths))}: {dict(drop)}; "
                             "give JSON Lines or text files")

    @staticmethod
    def grams(raws):
        """Hashes of the 7 and 13 words from each position of some texts on; bounds as word_hashes gives them."""
        words, bounds = word_hashes(raws)
        grams = gram_hashes(words, 7)
        return {7: grams, 13: mix(grams + np.uint64(3) * np.roll(grams, -6))}, bounds

    @staticmethod
    def bag(source):
        """How often each operator and bracket occurs in a function: what renaming leaves."""
        return np.bincount(np.frombuffer(COMMENT.sub("", source).encode(), np.uint8), minlength=256)[SIGNS]

    def find(self, texts):
        """{index of a text: (rule, number of the problem, what they share)}, by words."""
        found, done = {}, 0
        for raws in batches((fold(text).encode() for text in texts), 1 << 17):
            grams, bounds = self.grams(raws)
            for n, owners in self.index.items():
                maybe, shared = np.flatnonzero(self.table[grams[n] >> np.uint64(44)]), {}
                maybe = maybe[self.sorted[n][np.searchsorted(self.sorted[n], grams[n][maybe])] == grams[n][maybe]]
                for at, gram, d in zip(maybe, grams[n][maybe].tolist(), np.searchsorted(bounds, maybe, side="right") - 1):
                    for i in owners.get(gram, ()) if at + n <= bounds[d + 1] else ():
                        shared.setdefault((int(d), i), set()).add(gram)
                for (d, i), both in sorted(shared.items(), key=lambda item: len(item[1])):
                    of = min(self.n_grams[i], bounds[d + 1] - bounds[d] - 6)
                    if n == 13 or len(both) >= max(self.FEWEST, self.share * of):
                        found[done + d] = f"{n}-gram", i, f"{len(both)} in common"
            done += len(raws)
        return found

    def find_functions(self, text):
        """The like for the functions of one text, or None. Only those whose operators resemble a problem's are parsed."""
        for source, _ in FUNCTION.findall(text + "\n") if self.trees and "def " in text else ():
            bag = self.bag(source)
            near = np.flatnonzero(np.minimum(self.bags, bag).sum(1) >= (self.match - 0.2) * np.maximum(self.bags.sum(1), bag.sum()))
            name, tree = len(near) and tree_of(source) or ("", [])
            matcher = difflib.SequenceMatcher(None, (), tree, autojunk=False)
            for i, _, other in [self.trees[k] for k in near] if len(tree) >= self.smallest else ():
                matcher.set_seq1(other)
                if matcher.real_quick_ratio() >= self.match <= matcher.quick_ratio() and matcher.ratio() >= self.match:
                    return "syntax tree", i, f"{name}: match rate {matcher.ratio():.3f}"


# ---- educational value ----

WORDS = {  # groups of words that the features count
    "explanation": "because therefore thus hence means explain explains note notice consider suppose define definition why how step then",
    "example": "example examples exercise solution answer question prints expected result sample illustrate shows usage",
    "teaching": "algorithm list number value values function sum loop sort search tree graph string index count array sequence theorem proof",
    "noise": "click subscribe cookies login copyright license todo fixme deprecated http https www warranty share buy price hack compat",
    "control": "if else elif for while return yield try except raise", "glue": "import self cls config settings logger assert pass kwargs isinstance"}
STARTS = {"headers": "## ### #### === ---", "lists": "- * • 1. 2. 3. 4. 5.", "code blocks": "``` ~~~ >>> .. $", "comments": "# // /* #: *",
          "definitions": "def class async function fn func struct", "imports": "import from #include use require", "exits": "return yield raise"}
MARKS = {"docstrings": '"""', "assignments": " = ", "underscores": "_", "calls": "(", "stops": ".", "commas": ",", "colons": ":", "brackets": "["}
LETTERS = bytes(i if i >= 128 or chr(i).isalpha() else 32 for i in range(256))
FEATURES = ["length", "lines", "longest line", "blank lines", "indentation", "word length", "words", "unique words", "sentence length",
            "paragraph length", "letters", "digits", "capitals", *WORDS, *STARTS, *MARKS]


@functools.lru_cache
def opened(run):
    """(model, tokenizer, names of its states), once a process."""
    import torch

    import model as models
    torch.set_num_threads(1)  # every core has a process of its own
    model, tokenizer = models.load(run, "cpu", torch.float32)
    return model, tokenizer, [f"state {i}" for i in range(model.config.d_model)]


def states(text, run, n_tokens=256):
    """The mean over a text's first tokens of a run's last states, float32 (d_model,): what phi-1's classifier saw (arXiv 2306.11644, section 2.1)."""
    import torch
    model, tokenizer, _ = opened(run)
    ids = tokenizer.encode(text[:16 * n_tokens])[:min(n_tokens, model.config.max_seq_len)] or [tokenizer.eot]
    with torch.inference_mode():
        return model.hidden(torch.tensor([ids]))[0].mean(0).numpy()


def features(text, run=None, at_most=20_000):
    """What the classifier sees of a text (its first 20,000 characters): float32, shares or logarithms, named by FEATURES; then a run's states."""
    if run:
        return np.concatenate([features(text), states(text, run)])
    size, text = len(text), text[:at_most]
    rows, raw = text.split("\n"), text.encode()
    full = [row.lstrip() for row in rows if row.strip()]
    starts, counts = Counter(row.split(None, 1)[0] for row in full), Counter(raw.lower().translate(LETTERS).split())
    n, n_words, n_full, sentences = max(1, len(raw)), max(1, counts.total()), max(1, len(full)), 1 + sum(map(text.count, (". ", ".\n", "? ", "! ")))
    classes = [1 - len(raw.translate(None, some.encode())) / n for some in (string.ascii_letters, string.digits, string.ascii_uppercase)]
    return np.array([
        math.log1p(size), math.log1p(len(rows)), math.log1p(max(map(len, rows))), 1 - len(full) / len(rows), 1 - sum(map(len, full)) / n, n / n_words,
        math.log1p(n_words), len(counts) / n_words ** 0.75, n_words / sentences, n_words / (1 + text.count("\n\n")), *classes,
        *(sum(counts[word.encode()] for word in words.split()) / n_words for words in WORDS.values()),
        *(sum(starts[word] for word in words.split()) / n_full for words in STARTS.values()),
        *(text.count(mark) / n_full for mark in MARKS.values())], np.float32)


class RandomForest:
    """Bagged classification trees (Breiman 2001) on features cut into 128 bins at their quantiles, over all cores.

    fit(X float32 (n, features), y 0/1 (n,)); predict_proba(X) -> float (n,), the mean share of ones in a row's leaves. Each tree sees half of
    the rows (as good as a bootstrap: Friedman and Hall 2007) and takes the best Gini impurity among sqrt(features) features drawn for each node.
    It grows by levels: a histogram over (node, bin) gives all nodes' splits at once. `importance`: each feature's share of the impurity removed."""
    BINS, PARTS = 128, "edges feature threshold child value roots importance max_depth".split()

    def __init__(self, n_trees=100, seed=0, max_depth=16, min_leaf=2, workers=None):
        self.n_trees, self.seed, self.max_depth, self.min_leaf, self.workers = n_trees, seed, max_depth, min_leaf, workers or n_cores()

    def fit(self, X, y):
        X, y = np.asarray(X, np.float32), np.asarray(y)
        if X.ndim != 2 or y.shape != X.shape[:1] or not X.size or not np.isfinite(X).all() or not np.isin(y, (0, 1)).all():
            raise ValueError(f"a forest learns from finite X (n, features) and y (n,) of 0 and 1, not from {X.shape} and {y.shape}")
        self.edges = np.quantile(X, np.arange(1, self.BINS) / self.BINS, axis=0, method="nearest").T  # bin b holds the values up to edges[:, b]
        bins, y, rng = self.bins(X), y.astype(np.int64), np.random.default_rng
        trees = parallel(lambda tree: self.grow(bins, y, rng([self.seed, tree])), range(self.n_trees), self.workers, "growing trees")
        sizes = [len(tree[0]) for tree in trees]
        self.roots = np.cumsum([0] + sizes)[:-1]
        self.feature, self.threshold, self.child, self.value, gain = (np.concatenate(part) for part in zip(*trees))
        self.child += np.repeat(self.roots, sizes)
        self.importance = np.bincount(self.feature, gain, X.shape[1]) / max(gain.sum(), 1e-12)
        return self

    def bins(self, X):
        return np.stack([np.searchsorted(edges, column).astype(np.uint8) for edges, column in zip(self.edges, X.T)])  # (features, n)

    def grow(self, bins, y, rng):
        """One tree's nodes: feature, threshold (bins above it go right), left child (the right one is next), value, gain."""
        n_features, n = bins.shape
        rows, flat, slots = rng.permutation(n)[:n - n // 2], bins.ravel(), max(1, round(n_features ** 0.5))
        node, m, begin, levels = np.zeros(len(rows), np.int64), 1, 0, []
        for depth in range(self.max_depth + 1):
            own, best = np.arange(m), np.full((3, m), -1.0)  # of each node: score, feature, threshold
            n_all, n_one = (np.bincount(node, weights, m).astype(np.float32)[:, None] for weights in (None, y[rows]))
            for drawn in rng.random((m, n_features)).argpartition(slots - 1, axis=1)[:, :slots].T:
                key = node * self.BINS + flat[drawn[node] * n + rows]
                left, ones = (np.bincount(key, weights, m * self.BINS).reshape(m, -1).cumsum(1).astype(np.float32) for weights in (None, y[rows]))
                right = n_all - left
                score = ones ** 2 / np.maximum(left, 1) + (n_one - ones) ** 2 / np.maximum(right, 1)
                score[np.minimum(left, right) < self.min_leaf] = -1
                at = score.argmax(1)
                best = np.where(score[own, at] > best[0], (score[own, at], drawn, at), best)
            n_all, n_one, feature, threshold = n_all[:, 0], n_one[:, 0], *best[1:].astype(np.int64)
            gain = best[0] - n_one ** 2 / n_all
            split = (best[0] >= 0) & (gain > 1e-4) & (depth < self.max_depth)
            child = np.where(split, begin + m + 2 * (np.cumsum(split) - 1), begin + own)  # a leaf leads to itself
            levels.append((np.where(split, feature, 0), np.where(split, threshold, 255), child, n_one / n_all, np.where(split, gain, 0)))
            if not split.any():
                break
            rows, node = rows[split[node]], node[split[node]]
            node = child[node] - begin - m + (flat[feature[node] * n + rows] > threshold[node])
            begin, m = begin + m, 2 * int(split.sum())
        return [np.concatenate(part) for part in zip(*levels)]

    def predict_proba(self, X):
        X, table = np.asarray(X, np.float32), self.child << 24 | self.feature << 8 | self.threshold

        def predict(chunk):
            bins, total, base = self.bins(chunk).T.ravel(), np.zeros(len(chunk)), np.arange(len(chunk)) * X.shape[1]
            for root in self.roots:
                node = np.full(len(chunk), root)
                for _ in range(self.max_depth):
                    entry = table.take(node)
                    node = (entry >> 24) + (bins.take(base + (entry >> 8 & 65535)) > (entry & 255))
                total += self.value.take(node)
            return total / len(self.roots)

        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            return np.concatenate([np.zeros(0), *pool.map(predict, np.array_split(X, len(X) // 16384 + 1))])

    def save(self, path, names):
        """Writes the forest, and the names of its features, as plain arrays."""
        with open(path, "wb") as file:
            np.savez_compressed(file, names=names, **{part: getattr(self, part) for part in self.PARTS})

    @classmethod
    def load(cls, path, names):
        """The forest that was saved there, for these features."""
        try:
            forest, arrays = cls(), np.load(path, allow_pickle=False)
            vars(forest).update({part: arrays[part] for part in cls.PARTS})
            if arrays["names"].tolist() != list(names):
                raise ValueError("it was trained on other features")
        except (ValueError, KeyError, OSError, zipfile.BadZipFile, *DAMAGED) as error:
            raise ValueError(f"{path} is not a forest ({error}); make that dataset with --labels") from None
        return forest


def names_of(run):
    return FEATURES + opened(run)[2] if run else FEATURES


def area_under_curve(y, p):
    """ROC AUC: how often a row of y = 1 has the larger p than one of y = 0, ties counting half."""
    _, place, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks, n_one = (np.cumsum(counts) - (counts - 1) / 2)[place], int(y.sum())
    return float((ranks[y == 1].sum() - n_one * (n_one + 1) / 2) / (n_one * (len(y) - n_one))) if 0 < n_one < len(y) else math.nan


def learn_value(path, seed, workers, run=None):
    """(forest, report) from labels: JSON Lines with `text` and `score` from 0 to 5, good from 3 on."""
    drop, labels = Counter(), []
    for record in read_jsonl(path):
        text, score = record.get("text"), record.get("score")
        if not isinstance(text, str) or not isinstance(score, (int, float)) or not 0 <= score <= 5:
            drop["no text" if not isinstance(text, str) else "no score from 0 to 5"] += 1
        else:
            labels.append((text, score >= 3))
    X, y = np.array(parallel(functools.partial(features, run=run), [text for text, _ in labels], workers, "reading labels")), np.array([good for _, good in labels], int)
    if not 5 <= y.sum() <= len(y) - 5 or len(y) < 20:
        raise ValueError(f"--labels {path}: {y.sum()} of {len(y)} usable labels have a score of 3 or more ({dict(drop)}); "
                         "give at least 5 of either side and 20 in all")
    forest, fold, p = RandomForest(seed=seed, workers=workers), np.random.default_rng(seed).permutation(len(y)) % 5, np.zeros(len(y))
    for k in range(5):  # each row is judged by a forest that has not seen it
        p[fold == k] = forest.fit(X[fold != k], y[fold != k]).predict_proba(X[fold == k])
    forest.fit(X, y)
    tenth = (p * 9.999).astype(int)
    report = {"labels": len(y), "good": int(y.sum()), "left out": dict(drop), "auc": area_under_curve(y, p), "brier": float(((p - y) ** 2).mean()),
              "calibration": {f"{k / 10 + 0.05:.2f}": round(float(y[tenth == k].mean()), 3) for k in range(10) if (tenth == k).any()},
              "features": {names_of(run)[i]: round(float(forest.importance[i]), 4) for i in (-forest.importance).argsort()[:10]}}
    print("educational value, 5-fold cross-validated:", json.dumps(report))
    return forest, report


# ---- byte-pair encoding ----

@functools.lru_cache
def stdlib_pattern(pattern, limit=0x110000):
    r"""The tokenizer's split pattern for Python's own `re`, which lacks \p{...} and whose \s has four characters more.

    Classes become explicit ranges of the characters below `limit`: up to 0x10000 `re` looks them up, several times faster.
    Characters newer than this Python's Unicode tables may split otherwise than in tiktoken: that touches the counts only.
    """
    categories = np.array([unicodedata.category(chr(i)) for i in range(limit)])

    def ranges(category):
        inside = np.char.startswith(categories, category) if category != "s" else \
            (categories == "Zs") | np.isin(np.arange(limit), [9, 10, 11, 12, 13, 0x85, 0x2028, 0x2029])
        edges = np.flatnonzero(np.diff(inside, prepend=False, append=False)).reshape(-1, 2).tolist()
        return "".join(f"\\U{i:08x}-\\U{j - 1:08x}" for i, j in edges)

    parts, in_class = [], False
    for piece in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.S):
        if piece in "[]":
            in_class = piece == "["
        elif kind := re.fullmatch(r"\\(?:([pP])\{(\w+)\}|([sS]))", piece):
            negated = kind[1] == "P" or kind[3] == "S"
            if negated and in_class:
                raise ValueError(f"{piece} within [...] is not supported in a split pattern")
            piece = ranges(kind[2] or "s") if in_class else f"[{'^' * negated}{ranges(kind[2] or 's')}]"
        parts.append(piece)
    return re.compile("".join(parts))


def count_pretokens(texts, workers=1):
    """Counter of the pieces that model.PATTERN splits the texts into."""
    from model import PATTERN
    full, plain = (stdlib_pattern(PATTERN, limit).findall for limit in (0x110000, 0x10000))
    size = sum(map(len, texts)) // (4 * workers) + 1
    count = lambda batch: sum_counts((full if max(text, default="") > "\uffff" else plain)(text) for text in batch)
    return sum_counts(parallel(count, batches(texts, size), workers, "counting words"))


def learn_merges(counts, n_merges):
    """BPE on words (str -> how often): the list of merged pairs (a, b); the i-th one makes token 256 + i.

    Each step merges the pair of highest count, the smallest (a, b) among equals, until none occurs twice. All words lie in one array of
    linked symbols. A pair has a count and the positions it was seen at, which are checked when it is its turn; counts only fall once a pair's
    younger symbol is made, so a heap with outdated entries will do."""
    words = [word.encode() for word in counts]
    symbol = np.append(np.frombuffer(b"".join(words), np.uint8), 0).astype(np.int32)
    n, length = len(symbol) - 1, np.array(list(map(len, words)), np.int64)
    symbol[n] = -1  # position n stands for "no neighbour"
    after, before, last = np.arange(1, n + 2, dtype=np.int32), np.arange(-1, n, dtype=np.int32), np.cumsum(length) - 1
    after[last], before[last - length + 1] = n, n
    weight = np.repeat(np.fromiter(counts.values(), np.int64, len(counts)), length)
    merges, count, where, heap = [], {}, {}, []  # count, where: key -> int, positions; key = a << 20 | b

    def group(keys, positions):
        """Yields each distinct key with the total weight of its positions, and those positions."""
        order = keys.argsort()
        keys, positions = keys[order], positions[order]
        start = np.flatnonzero(np.diff(keys, prepend=-1))
        totals, ends = np.add.reduceat(weight[positions], start) if len(keys) else start, start.tolist()[1:] + [len(keys)]
        yield from zip(keys[start].tolist(), totals.tolist(), (positions[i:j] for i, j in zip(start.tolist(), ends)))

    def add(key, total, positions):
        if total > 1:
            count[key], where[key] = total, positions
            heapq.heappush(heap, (-total << 40) | key)

    inner = np.flatnonzero(symbol[after[:n]] >= 0)
    for found in group(symbol[inner].astype(np.int64) << 20 | symbol[inner + 1], inner.astype(np.int32)):
        add(*found)
    progress = tqdm(total=n_merges, desc="merging", disable=None, leave=False)
    while heap and len(merges) < n_merges:
        entry = heapq.heappop(heap)
        key, total = entry & (1 << 40) - 1, -(entry >> 40)
        positions = where.pop(key)
        if count[key] != total:  # it has fallen since it was put on the heap
            add(key, count.pop(key), positions)
            continue
        del count[key]
        a, b, new = key >> 20, key & (1 << 20) - 1, 256 + len(merges)
        merges.append((a, b))
        progress.update()

        at = np.sort(positions[(symbol[positions] == a) & (symbol[after[positions]] == b)])  # where the pair still stands
        if a == b:  # in a run a a a only every other pair can merge
            number = np.arange(len(at))
            chained = np.append(False, at[1:] == after[at[:-1]])[:len(at)]
            at = at[(number - np.maximum.accumulate(np.where(chained, 0, number))) % 2 == 0]
        second = after[at]
        right = after[second]
        symbol[at], symbol[second] = new, -1
        after[at], before[right] = right, at

        # neighbours now: those on the left as symbol, those on the right as symbol + 2^20; (new, new) counts as right only
        left = before[at]
        has_left, has_right = (symbol[left] >= 0) & (symbol[left] != new), symbol[right] >= 0
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
    """A byte-level BPE of vocab_size tokens, the five special ones included (fewer where the texts run out of pairs)."""
    if not 261 <= vocab_size <= 500_000:
        raise ValueError(f"a vocabulary of {vocab_size} tokens: give from 261 (bytes and special tokens) to 500,000")
    return tokenizer_of(learn_merges(count_pretokens(list(texts), workers or n_cores()), vocab_size - 261))


def tokenizer_of(merges):
    from model import Tokenizer
    tokens = [bytes([i]) for i in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    return Tokenizer({token: i for i, token in enumerate(tokens)})


# ---- the dataset directory ----

def encode(documents, tokenizer, dtype):
    """Documents -> (token ids, mask): an end-of-text after each; mask 0 on a problem's prompt, which is encoded apart, else 1."""
    ids, mask, end = [np.zeros(0, dtype)], [np.zeros(0, np.uint8)], np.array([tokenizer.eot], dtype)
    for document in documents:
        prompt, text = document.get("prompt_chars", 0), document["text"]
        head, tail = (np.array(tokenizer.encode(part), dtype) for part in (text[:prompt], text[prompt:]))
        ids += [head, tail, end]
        mask += [np.zeros(len(head), np.uint8), np.ones(len(tail) + 1, np.uint8)]
    return np.concatenate(ids), np.concatenate(mask)


def open_dataset(path):
    """Opens a dataset directory: .train and .val (token ids, memory-mapped), .train_mask and .val_mask (uint8, or None), .meta."""
    path, arrays = Path(path), {}
    try:
        meta = json.loads((path / "meta.json").read_text())
        for split, kind in itertools.product(("train", "val"), ("", ".mask")):
            file, dtype, n = path / f"{split}{kind}.bin", np.dtype(np.uint8 if kind else meta["dtype"]), meta[split]["tokens"]
            is_part = not kind or file.name in meta.get("files", os.listdir(path))
            size = os.path.getsize(file) if is_part else None
            if size not in (None, n * dtype.itemsize):
                raise ValueError(f"{file.name} has {size} bytes where meta.json promises {n * dtype.itemsize}")
            arrays[split + kind.replace(".", "_")] = None if size is None else np.memmap(file, dtype, "r") if n else np.zeros(0, dtype)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a dataset ({error}); make it with python data.py --name {path.name} --out {path.parent} ...") from None
    return SimpleNamespace(path=path, meta=meta, **arrays)


def spare(path, n_bytes):
    """Renames a dataset of more text than the n_bytes about to take its place: less never replaces more."""
    try:
        meta = open_dataset(path).meta
        size = meta["train"]["bytes"] + meta["val"]["bytes"]
    except (ValueError, KeyError):  # none there, or damaged
        return
    old = path.with_name(f"{path.name}.old-{meta.get('fingerprint', 'none')[:8]}")
    if size > n_bytes:
        if not old.exists():  # its name tells its contents: once is enough
            os.replace(path, old)
        print(f"{path} held {size:,} bytes of text, more than the new one's {n_bytes:,}; "
              f"it is kept as {old} (delete it if nobody needs it)")


# ---- the command ----

def split_files(files):
    """Lists of files of about a thirty-second of the input, at most 128 MB; large JSON Lines are cut into spans of lines."""
    sizes = [min(os.path.getsize(path), end) for path, _, _, end in files]
    size, pieces = min(max(sum(sizes) // 32, 1 << 18), 1 << 27), []
    for (path, name, _, end), n in zip(files, sizes):
        cuts = range(0, int(n), size) if suffix_of(path) in RECORDS and not path.endswith(".gz") else [0]
        pieces += [((path, name, begin, stop), min(stop, n) - begin + 1000) for begin, stop in zip(cuts, [*cuts[1:], end])]
    return [[piece for piece, _ in batch] for batch in batches(pieces, size, lambda piece: piece[1])]


def prepare(task, options, contamination, forest):
    """What the files of one part give: the documents that pass every rule that looks at one document alone, and what the global stages need."""
    kept, hits, examples = [], [], {}
    read, unread, languages, masked, lost, lost_bytes = (Counter() for _ in range(6))
    changed = lambda path: os.path.exists(path) and os.stat(path).st_mtime_ns

    def drop(stage, reason, document):
        lost[f"{stage}: {reason}"] += 1
        lost_bytes[f"{stage}: {reason}"] += document["bytes"]
        shown = [digest(document["text"]).hex(), str(document["id"]), reason, document["text"][:300]]
        examples[stage] = sorted([*examples.get(stage, []), shown])[:5]

    for file in task:
        before = changed(file[0])
        for document in itertools.islice(read_documents([file], unread), options.max_documents or None):
            read.update(documents=1, bytes=document["bytes"])
            is_problem = document["prompt_chars"] > 0
            spoken = "code" if not options.language or is_problem or is_code(document) else language(document["text"], options.language_threshold)
            languages[spoken] += 1
            if spoken != "code" and spoken not in options.language:
                drop("language", spoken, document)
            elif reason := quality_rule(document, options.rules):
                drop("rules", reason, document)
            else:
                kept.append(document)
                if not is_problem and options.mask_personal in ("all", "web" if document.get("web") else "all"):
                    for pattern, mask in PERSONAL:
                        document["text"], n = pattern.subn(mask, document["text"])
                        masked[mask] += n
        unread["(changed while it was read)"] += changed(file[0]) != before
    found = contamination.find([document["text"] for document in kept]) if contamination else {}
    for i, document in enumerate(kept if contamination else ()):
        if hit := found.get(i) or contamination.find_functions(document["text"]):
            rule, k, evidence = found[i] = hit
            hits.append({name: document[name] for name in ("id", "source", "text")} | {"rule": rule, "evidence": evidence} | dict(
                zip(("problem", "problem_text"), contamination.problems[k])))
            drop("decontaminate", rule, document)
    kept = [document for i, document in enumerate(kept) if i not in found]
    texts, n_bands = [document["text"] for document in kept], options.dedup_bands if options.dedup_threshold < 1 else 0
    raws, signatures = [text.encode() for text in texts], minhash(texts, n_bands * options.dedup_rows)
    hashes, size = hashes_of(raws), np.array([len(raw) for raw in raws], np.int64)
    value = (forest.predict_proba(np.array([features(text, options.embed) for text in texts])) if forest and kept else np.zeros(len(kept))).astype(np.float32)
    return {"read": read, "unread": unread, "languages": languages, "masked": masked, "hits": hits, "lost": lost, "lost_bytes": lost_bytes,
            "examples": examples, "ids": [str(document["id"]) for document in kept], "text": np.frombuffer(b"".join(raws), np.uint8), "size": size,
            "end": np.cumsum(size), "prompt": np.array([document["prompt_chars"] for document in kept], np.int64), "signatures": signatures,
            "keys": np.concatenate([hashes[None], band_keys(signatures, n_bands)]), "digest": hashes,
            **paragraph_hashes(kept, options.dedup_paragraphs),
            "order": mix(hashes + mix(np.uint64([options.seed + 1]))), "value": value,  # and the best first, equal ones by their hash:
            "worth": (65535 - value * 65535).astype(np.uint64) << np.uint64(48) | hashes >> np.uint64(16)}


def document_at(part, i):
    text = bytes(part("text")[part("end")[i] - part("size")[i]:part("end")[i]]).decode()
    return {"text": text, "prompt_chars": int(part("prompt")[i])}


def rows_of(parts, base, name, index):
    """Rows of an array that lies cut into parts: those with these global indices."""
    owner = np.searchsorted(base, index, side="right") - 1
    order = owner.argsort(kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1) if len(index) else []
    rows = [parts[owner[group[0]]](name)[index[group] - base[owner[group[0]]]] for group in groups]
    return np.concatenate(rows)[order.argsort()] if groups else np.zeros(0, np.int64)


def range_of(keys, n):
    """Which of n equal ranges of uint64 each key lies in."""
    return (keys >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)


def of_range(arrays, base, r, n):
    """The r-th range's keys, and their global indices, of all (keys of a part, mask of those that count)."""
    keys, index = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for (own, counts), begin in zip(arrays, base):
        inside = np.flatnonzero((range_of(own, n) == r) & counts)
        keys.append(own[inside])
        index.append(inside + begin)
    return np.concatenate(keys), np.concatenate(index)


def kth_smallest(arrays, k):
    """The k-th smallest (from 1) of all uint64 in arrays(), 16 bits at a time: a histogram in memory and never the numbers."""
    prefix = 0
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for array in arrays():
            inside = array if shift == 48 else array[array >> np.uint64(shift + 16) == np.uint64(prefix)]
            counts += np.bincount((inside >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16)
        digit = int(np.searchsorted(np.cumsum(counts), k))
        k, prefix = k - int(counts[:digit].sum()), prefix << 16 | digit
    return np.uint64(prefix)


def find_duplicates(work, parts, base, options, per_range=8_000_000):
    """Indices of documents to drop, whether each equals another letter for letter, and {size of a group: how many}.

    Documents that share the text or a band of the signature are compared by the share of equal values; of each group connected by a similarity >=
    the threshold the best-scored stays, the longest and then the first among equals. A unit of work is one band's keys within one range of
    hashes; held together is one pair for each document that has a copy, and those of one band more."""
    n_keys, n_ranges = (1 + options.dedup_bands if options.dedup_threshold < 1 else 1), 1 + int(base[-1]) // per_range

    def compare(unit):
        band, r = divmod(unit, n_ranges)
        keys, index = of_range(((part("keys")[band], True) for part in parts), base, r, n_ranges)
        pairs = index[candidates(keys)]
        alike = np.ones(len(pairs), bool)
        for k in range(0, len(pairs) if band else 0, 1 << 15):
            left, right = (rows_of(parts, base, "signatures", side) for side in pairs[k:k + (1 << 15)].T)
            alike[k:k + (1 << 15)] = (left == right).mean(1) >= options.dedup_threshold
        return {"pairs": spanning(pairs[alike])}

    compared, pairs = work.run("compared", n_keys * n_ranges, compare), np.zeros((0, 2), np.int64)
    for unit in range(0, len(compared), n_ranges):  # a band
        pairs = spanning(np.concatenate([pairs, *(part("pairs") for part in compared[unit:unit + n_ranges])]))
    nodes, label = components(pairs)
    order = np.lexsort((nodes, -rows_of(parts, base, "size", nodes), -rows_of(parts, base, "value", nodes), label))
    dropped = np.sort(nodes[order[1:][np.diff(label[order]) == 0]])
    same = np.isin(dropped, np.concatenate([part("pairs")[:, 1] for part in compared[:n_ranges]]))
    return dropped, same, Counter(np.unique(label, return_counts=True)[1].tolist())


# ---- paragraphs ----

def paragraphs_of(text):
    return re.split(r"\n\s*\n", text)


def paragraph_hashes(documents, least):
    """Hashes of the paragraphs of `least` characters and more in prose, uint64, whatever their case and spacing, and how many each document has."""
    own = [[" ".join(paragraph.lower().split()) for paragraph in paragraphs_of(document["text"]) if len(paragraph) >= least]
           if least and not document["prompt_chars"] and not is_code(document) else [] for document in documents]
    return {"paragraphs": hashes_of(paragraph.encode() for some in own for paragraph in some), "has": np.array(list(map(len, own)), np.int64)}


def without_repeats(work, parts, alive, least, per_range=8_000_000):
    """The parts with only the first of equal paragraphs in the documents that are left; code stays, which would break.

    As in find_duplicates a unit of work is a range of hashes; then each part's texts are written again, and take the old ones' place."""
    base = np.cumsum([0] + [len(part("paragraphs")) for part in parts])
    n_ranges = 1 + int(base[-1]) // per_range

    def repeated(r):
        keys, index = of_range(((part("paragraphs"), np.repeat(own, part("has"))) for part, own in zip(parts, alive)), base, r, n_ranges)
        return {"again": np.setdiff1d(index, index[np.unique(keys, return_index=True)[1]])}

    found = [part("again") for part in work.run("paragraphs", n_ranges, repeated)]

    def cut(i):
        part, gone, texts = parts[i], np.zeros(base[i + 1] - base[i], bool), []
        for again in found:
            gone[again[slice(*np.searchsorted(again, base[i:i + 2]))] - base[i]] = True
        for d, own in enumerate(np.split(gone, np.cumsum(part("has"))[:-1]) if len(part("has")) else ()):
            text, left = document_at(part, d)["text"], iter(own)
            texts.append(("\n\n".join(p for p in paragraphs_of(text) if len(p) < least or not next(left)) if own.any() else text).encode())
        size = np.array(list(map(len, texts)), np.int64)
        return {"text": np.frombuffer(b"".join(texts), np.uint8), "size": size, "end": np.cumsum(size)}

    return [lambda name, old=old, new=new: (new if name in ("text", "size", "end") else old)(name)
            for old, new in zip(parts, work.run("without repeats", len(parts), cut))]


def build(options):
    """Makes the dataset that the options (see main) describe, or finds it made; returns its directory."""
    import model as models
    from model import Tokenizer, write_atomically
    start, path, missing, forest, value = time.time(), Path(options.out) / options.name, Counter(), None, None
    workers, rank = options.workers or n_cores(), int(os.environ.get("RANK", 0))
    say = print if rank == 0 else lambda text: None
    vocab_size = int(options.tokenizer[6:]) if re.fullmatch(r"train:\d+", options.tokenizer) else 0
    if options.tokenizer.startswith("train:") and not 261 <= vocab_size <= 500_000:
        raise ValueError(f"--tokenizer {options.tokenizer}: give train:N with N from 261 (bytes and five special tokens) to 500,000")
    tokenizer = None if vocab_size else Tokenizer.load(options.tokenizer)
    if (options.keep < 1 or options.min_score) and not options.labels and not options.classifier:
        raise ValueError("--keep and --min-score need --labels FILE (synth.py label writes one) or --classifier DATASET")
    # (path, name) of what the dataset depends on besides: a directory's or a URL's files, not itself
    others = [file[:2] for file in find_files(options.decontaminate or [], Counter())]
    if options.labels:
        others.append((options.labels, options.labels))
    if options.embed:
        run = Path(models.snapshot_download(options.embed))
        patterns = "*.safetensors", "*.bin", "config.json", "tokenizer.json"
        others += sorted((str(file), file.name) for pattern in patterns for file in run.glob(pattern))
    if options.classifier and not options.labels:
        others.append((f"{options.classifier}/classifier.npz", "classifier"))
        forest = RandomForest.load(others[-1][0], names_of(options.embed))
    files = find_files(options.input, missing, options.seed, options.max_bytes, options.max_documents)
    states = [(name, os.stat(file).st_size, os.stat(file).st_mtime_ns)
              for file, name in [*(file[:2] for file in files), *others]]
    # every token comes from model.py's tokenizer; what a fork changes there or here changes the dataset
    sources = [__file__, models.__file__, *([models.kernels.__file__] if options.embed else [])]
    made_by = {"options": {k: v for k, v in vars(options).items() if k not in ("workers", "out")},
               "inputs": digest(json.dumps([states, tokenizer and tokenizer.fingerprint])).hex(),
               "sources": {os.path.basename(file): digest(Path(file).read_bytes()).hex() for file in sources}}

    def made():
        with contextlib.suppress(ValueError, OSError):  # damaged: replace it
            meta = open_dataset(path).meta
            return made_by.items() <= meta.items() and all((path / name).exists() for name in meta["files"])

    if made():
        say(f"{path}: already made, reused (delete it to make it anew)")
        return path
    if path.exists() and not (path / "meta.json").exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not a dataset; choose another --name or --out")
    contamination, tasks = Contamination(options.decontaminate) if options.decontaminate else None, split_files(files)
    if options.labels:
        forest, value = learn_value(options.labels, options.seed, workers, options.embed)

    same_options = f".{path.name}.work-{digest(json.dumps(made_by['options'])).hex()[:16]}"
    folder = path.with_name(f"{same_options}-{digest(json.dumps(made_by)).hex()[:16]}")
    work = Work(folder, workers, rank, int(os.environ.get("WORLD_SIZE", 1)))
    parts = work.run("documents", len(tasks), lambda i: prepare(tasks[i], options, contamination, forest))
    count = {name: sum_counts(part(name) for part in parts) for name in ("read", "unread", "languages", "masked", "lost", "lost_bytes")}
    unread, lost, lost_bytes = count["unread"] + missing, count["lost"], count["lost_bytes"]
    base, examples = np.cumsum([0] + [len(part("order")) for part in parts]), {}
    for stage in ("language", "rules", "decontaminate"):
        examples[stage] = sorted(itertools.chain(*(part("examples").get(stage, ()) for part in parts)))[:5]
    alive = np.ones(base[-1], bool)

    def each(mask):
        """(part, its piece of a mask of all documents)"""
        return zip(parts, np.split(mask, base[1:-1]))

    def sample(mask, reason=""):
        """The first five of some documents in the final order."""
        found = [(int(part("order")[i]), part("ids")[i], reason, document_at(part, i)["text"][:300]) for part, own in each(mask)
                 for at in [np.flatnonzero(own)] for i in at[part("order")[at].argsort()[:5]]]
        return sorted(found)[:5]

    def drop(stage, reason, gone):
        """Takes documents (a mask) out of those that are left."""
        gone &= alive
        np.logical_xor(alive, gone, out=alive)
        lost[f"{stage}: {reason}"] = int(gone.sum())
        lost_bytes[f"{stage}: {reason}"] = sum(int(part("size")[own].sum()) for part, own in each(gone))
        examples[stage] = sample(gone, reason)

    def least(name, n):
        """Of those that are left, the n of the least part(name), uint64: a mask."""
        highest = kth_smallest(lambda: (part(name)[own] for part, own in each(alive)), n)
        return np.concatenate([part(name) <= highest for part in parts]) & (n > 0)

    dropped, same, groups = find_duplicates(work, parts, base, options)
    for stage, reason, index in ("exact duplicates", "same text", dropped[same]), ("near duplicates", "similar text", dropped[~same]):
        drop(stage, reason, np.isin(np.arange(len(alive)), index))
    if options.dedup_paragraphs:
        before = sum(int(part("size")[own].sum()) for part, own in each(alive))
        parts = without_repeats(work, parts, np.split(alive, base[1:-1]), options.dedup_paragraphs)
        stage, why = "paragraphs", "nothing new in it"
        drop(stage, why, np.concatenate([part("size") for part in parts]) == 0)
        lost_bytes[f"{stage}: {why}"] = before - sum(int(part("size")[own].sum()) for part, own in each(alive))
    if forest and alive.any():
        good = np.concatenate([part("value") >= np.float32(options.min_score) for part in parts])
        drop("educational value", "low score", ~(good & least("worth", math.ceil(options.keep * alive.sum()))))
    if options.max_documents and alive.any():
        drop("--max-documents", "more than asked for", ~least("order", min(options.max_documents, alive.sum())))

    n_read, bytes_read = count["read"]["documents"], count["read"]["bytes"]
    rows = [{"stage": "read", "documents_in": n_read + sum(n for why, n in unread.items() if why[0] != "("),
             "bytes_in": sum(size for _, size, _ in states[:len(files)]), "documents_out": n_read, "bytes_out": bytes_read, "dropped": dict(unread)}]
    for stage in examples:
        why = {reason[len(stage) + 2:]: n for reason, n in lost.most_common() if n and reason.startswith(stage + ": ")}
        n, size = rows[-1]["documents_out"], rows[-1]["bytes_out"]
        if why or stage in ("rules", "exact duplicates", "near duplicates", "paragraphs"):
            rows.append({"stage": stage, "documents_in": n, "bytes_in": size, "documents_out": n - sum(why.values()),
                         "bytes_out": size - sum(lost_bytes[key] for key in lost if key.startswith(stage + ": ")), "dropped": why})
    say(f"{'stage':<18}{'documents in':>13}{'out':>9}{'MB in':>9}{'MB out':>9}  dropped")
    for row in rows:
        say("{stage:<18}{documents_in:>13,}{documents_out:>9,}{:>9.2f}{:>9.2f}  ".format(row["bytes_in"] / 1e6, row["bytes_out"] / 1e6, **row)
            + (", ".join(f"{reason} {n:,}" for reason, n in row["dropped"].items()) or "-"))
    n, n_bytes = int(alive.sum()), sum(int(part("size")[own].sum()) for part, own in each(alive))
    if not n:
        shutil.rmtree(folder, ignore_errors=True)
        reasons = "; ".join(f"{reason}: {n}" for row in rows for reason, n in row["dropped"].items()) or "nothing to read"
        raise ValueError(f"--input {' '.join(options.input)}: no document is left ({reasons}); give more text, or keep all by --rules none")

    # the split is by the hash of a document alone, so it never moves; at least one on either side
    n_val = sum(int((part("digest")[own] < options.val_share * 2**64).sum()) for part, own in each(alive))
    held, n_shards = least("digest", min(max(n_val, 1), n - 1)), min(max(32, n_bytes >> 27), 1 + n_bytes >> 16) + 1

    def shard(s):
        """(documents for training, documents for validation) of a range of the shuffled order, in this order."""
        found = [(int(part("order")[i]), bool(val[i]), document_at(part, i)) for (part, own), (_, val) in zip(each(alive), each(held))
                 for i in np.flatnonzero(own & (range_of(part("order"), n_shards) == s))]
        if n == 1 and found:  # one document alone is cut: its last share is for validation
            text = found[0][2]["text"]
            cut = max(1, min(round(len(text) * (1 - options.val_share)), len(text) - 1))
            found = [(i, bool(i), {"text": piece}) for i, piece in enumerate((text[:cut], text[cut:])) if piece]
        found.sort(key=lambda entry: entry[0])
        return [[document for _, is_val, document in found if is_val == val] for val in (False, True)]

    if tokenizer is None:
        counted = min(n_shards, 1 + n_shards * (2 << 30) // n_bytes)  # of at most 2 GB: a range of hashes is a sample
        words = work.run("words", counted, lambda s: {"words": count_pretokens([document["text"] for document in shard(s)[0]])})
        merged, = work.run("merges", 1, lambda _: {"merges": learn_merges(sum_counts(part("words") for part in words), vocab_size - 261)})
        tokenizer = tokenizer_of(merged("merges"))
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)

    def tokens(s):
        made = {}
        for split, documents in zip(("train", "val"), shard(s)):
            made[f"{split}.bin"], made[f"{split}.mask.bin"] = encode(documents, tokenizer, dtype)
            made[split] = {"documents": len(documents), "tokens": len(made[f"{split}.bin"]), "bytes": sum(len(d["text"].encode()) for d in documents)}
        return made

    encoded = work.run("tokens", n_shards, tokens)
    if rank:  # the first rank puts the parts together
        while not made():
            time.sleep(0.2)
        return path
    splits = {split: dict(sum_counts(part(split) for part in encoded)) for split in ("train", "val")}
    meta = {"dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "tokenizer": tokenizer.fingerprint, **splits,
            "funnel": rows, **({"classifier": value} if value else {}), **made_by}
    masks = [f"{split}.mask.bin" for split in splits if any(part("prompt").any() for part in parts)]
    about = [meta[key] for key in ("dtype", "tokenizer", "train", "val")]
    contents = hashlib.sha256(json.dumps(about).encode())
    with aside(path) as new:
        new.mkdir()
        for name in (*(f"{split}.bin" for split in splits), *masks):
            def write(file):
                for part in encoded:
                    array = np.ascontiguousarray(part(name))
                    contents.update(array)
                    file.write(array.data)

            write_atomically(str(new / name), write)
        tokenizer.save(str(new))
        if forest:
            forest.save(new / "classifier.npz", names_of(options.embed))
        if contamination:
            write_jsonl(new / "contaminated.jsonl", (hit for part in parts for hit in part("hits")))
        tables = {"languages": count["languages"], "personal data masked": count["masked"], "groups of duplicates, documents in each": groups}
        for title, name, bins in ("bytes", "size", 2.0 ** np.arange(0, 25)), *([("score", "value", np.linspace(0, 1, 21))] if forest else []):
            counts = sum(np.histogram(part(name)[own], bins)[0] for part, own in each(alive))
            tables[title] = dict(zip(map("{:g} and more".format, bins), counts.tolist()))
        (new / "report.html").write_text(report_page(str(path), rows, tables, value, examples | {"kept": sample(alive)}))
        meta |= {"fingerprint": contents.hexdigest()[:32], "files": sorted(os.listdir(new))}
        write_atomically(str(new / "meta.json"), lambda file: file.write(json.dumps(meta, indent=1).encode()))
        spare(path, sum(sums["bytes"] for sums in splits.values()))
    for other in path.parent.glob(f"{same_options}-*"):  # other options' parts wait for their own command
        shutil.rmtree(other, ignore_errors=True)
    for split, sums in splits.items():
        print("{}: {documents:,} documents, {tokens:,} tokens, {bytes:,} bytes".format(path / f"{split}.bin", **sums))
    print(f"vocabulary {meta['vocab_size']}, {time.time() - start:.1f} s; what was kept and dropped: {path / 'report.html'}")
    return path


def report_page(title, rows, tables, value, examples):
    """report.html as one string: every table of counts as bars, and the examples that each stage kept or dropped."""
    tables = {"documents": {"in": rows[0]["documents_in"]} | {row["stage"]: row["documents_out"] for row in rows},
              "the sources' own funnel": {"pages of phi-3's sources": 10**9, "deduplicated": 4 * 10**8, "in the language": 2 * 10**8,
                                          "score 0.5 or more": 2 * 10**7, "score 0.8 or more": 5 * 10**6},
              "why documents were dropped": {f"{row['stage']}: {reason}": n for row in rows for reason, n in row["dropped"].items()}, **tables}
    page = ["<!DOCTYPE html><meta charset=utf-8><style>body{font:14px sans-serif;max-width:60em}i{display:inline-block;background:#69c;"
            f"height:.9em;margin-right:.5em}}pre{{background:#eee;white-space:pre-wrap}}</style><h1>{html.escape(title)}</h1>"]
    for heading, table in tables.items():
        page += [f"<h2>{heading}</h2>"] + [f"<div><i style='width:{40 * n / max(table.values()):.2f}em'></i>{html.escape(str(name))} {n:,}</div>"
                                           for name, n in table.items() if n]
    page += [f"<h2>classifier</h2><pre>{html.escape(json.dumps(value, indent=1))}</pre>"] if value else []
    for stage, shown in examples.items():
        page += [f"<h2>examples: {stage}</h2>", *(f"<p>{html.escape(f'{name} {why}')}<pre>{html.escape(text)}</pre>" for _, name, why, text in shown)]
    return "\n".join(page)


def bench(options):
    """Prints what each stage does on --input on all cores, and its peers where they are installed (datasketch on one core)."""
    from model import PATTERN
    workers, drop = options.workers or n_cores(), Counter()
    texts = [document["text"] for document in read_documents(find_files(options.input, drop, options.seed, options.max_bytes or 128_000_000), drop)]
    batch, some, n, mb = list(batches(texts, 1 << 21)), next(batches(texts, 64_000_000)), len(texts), sum(map(len, texts)) / 1e6
    X = np.random.default_rng(0).normal(size=(40_000, 32)).astype(np.float32)
    y = (X[:, 0] * X[:, 1] + X[:, 2] + np.sin(3 * X[:, 3]) + np.random.default_rng(1).normal(size=len(X)) > 0).astype(int)
    X, other_X, y, other_y = *np.split(X, 2), *np.split(y, 2)
    print(f"{n:,} documents, {mb:.1f} MB, {workers} processes")

    def show(stage, function, amount=0, unit="documents/s"):
        """Times one stage, or a peer, which may be missing."""
        with contextlib.suppress(ImportError):
            begun, made = time.perf_counter(), function()
            seconds = time.perf_counter() - begun
            print(f"{stage:<40}{seconds:8.2f} s" + (f" {amount / seconds:12,.0f} {unit}" if amount else "")
                  + (f"  AUC {area_under_curve(other_y, made):.4f}" if isinstance(made, np.ndarray) else ""), flush=True)

    def over(function):
        return lambda: parallel(lambda texts: function(texts) and None, batch, workers, "measuring")

    def each(function):
        return over(lambda texts: [function(text) for text in texts])

    def datasketch():
        from datasketch import MinHash
        for words in map(str.split, texts[:n // 50]):
            MinHash(112).update_batch([" ".join(words[i:i + 5]).encode() for i in range(len(words) - 4)])

    def tokenizers(size):
        import tokenizers as peer
        other, bytes_only = peer.Tokenizer(peer.models.BPE()), peer.pre_tokenizers.ByteLevel(False, use_regex=False)
        other.pre_tokenizer = peer.pre_tokenizers.Sequence([peer.pre_tokenizers.Split(peer.Regex(PATTERN), "isolated"), bytes_only])
        other.train_from_iterator(some, peer.trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=bytes_only.alphabet()))

    def scikit_learn():
        from sklearn.ensemble import RandomForestClassifier
        return RandomForestClassifier(100, n_jobs=workers).fit(X, y).predict_proba(other_X)[:, 1]

    show("equal texts", over(lambda texts: hashes_of(text.encode() for text in texts)[0]), mb, "MB/s")
    show("MinHash, pairs", lambda: [*map(candidates, band_keys(np.concatenate(parallel(minhash, batch, workers, "hashing")), 14))], n)
    show("  datasketch", datasketch, n // 50)
    show("Gopher's rules", each(gopher_rule), n)
    forest = RandomForest(workers=workers)
    show("forest of 100 trees: fit 20,000 x 32", lambda: forest.fit(X, y))
    show("  predict", lambda: forest.predict_proba(other_X))
    show("  scikit-learn, both", scikit_learn)
    if options.decontaminate:
        show("decontamination by words", over(Contamination(options.decontaminate).find), n)
    for size in (8192, 32768):
        show(f"BPE of {size:,}, {sum(map(len, some)) / 1e6:.0f} MB", lambda: train_bpe(some, size, workers=workers))
        show("  tokenizers", lambda: tokenizers(size))
    tokenizer = train_bpe(some[:500], 8192)
    show("text to token ids", over(lambda texts: encode([{"text": text} for text in texts], tokenizer, np.uint16)), mb, "MB/s")
    show("  tiktoken's batch call", lambda: len(tokenizer._bpe.encode_ordinary_batch(texts)), mb, "MB/s")


# ---------------------------------------------------------------------------------------------------------------------
# The command line, for all scripts


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
        self.add_argument(name, default=default, help=text + ("" if shown in (None, False, "") else f" (default: {shown})"), **more)


def command(stopped="stopped"):
    """For a script's main: bad input ends it in one line with code 2, Ctrl-C with 130 and what `stopped` says, SIGTERM with 143."""
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
        raise argparse.ArgumentTypeError(f"{text!r}: use letters, digits, '-', '_' and '.'; --out names the folder around it")
    return text


@command("stopped; no dataset was changed, and the same command goes on from here")
def main(arguments=None):
    """The command line; also for other scripts: main(["--name", "web"]) returns the dataset's directory."""
    parser, share, whole = Parser(prog="data.py", description=__doc__), number(float, 0, 1), number(int, 0)
    option = parser.option
    option("--input", ["python"], "directories, text or code files, .jsonl, .wet, .parquet, each also .gz, URLs; `python`: this machine's own source",
           nargs="+", metavar="PATH")
    option("--name", "web", "name of the dataset", type=folder_name)
    option("--out", "data", "folder of the datasets", metavar="FOLDER")
    option("--tokenizer", "train:1024", "train:N makes a BPE of N tokens; or a directory, a tokenizer.json, gpt2, cl100k_base, o200k_base, bytes",
           metavar="SPEC")
    option("--language", None, "keep code and these languages, such as en de", nargs="+", metavar="CODE")
    option("--language-threshold", 0.08, "least share of a language's frequent words", type=share, metavar="SHARE")
    option("--rules", "auto", "quality rules; auto tells code from prose and leaves problems alone", choices=["auto", "code", "prose", "none"])
    option("--mask-personal", "web", "mask addresses, keys and tokens in pages of a crawl, or in all documents", choices=["web", "all", "none"])
    option("--decontaminate", None, "problems or texts: documents with one are dropped, and written to contaminated.jsonl", nargs="+", metavar="FILE")
    option("--dedup-threshold", 0.8, "Jaccard similarity of word 5-grams of near duplicates; 1: only equal texts go, as is right for exercises",
           type=share, metavar="SHARE")
    option("--dedup-bands", 14, "bands of a signature, any of which makes two documents candidates", type=number(int, 1, 256), metavar="N")
    option("--dedup-rows", 8, "values in a band", type=number(int, 1, 64), metavar="N")
    option("--dedup-paragraphs", 0, "of prose, keep only the first of equal paragraphs of N characters and more, such as 80; 0: all", type=whole, metavar="N")
    option("--labels", None, "JSON Lines with `text` and `score` 0 to 5 (good from 3 on): a forest learns what is worth keeping", metavar="FILE")
    option("--classifier", None, "use the forest of this dataset instead of --labels", metavar="DATASET")
    option("--embed", None, "let the forest see a run's mean last states of each text too, as phi-1 did", metavar="RUN")
    option("--keep", 1.0, "share of the documents to keep, the best-scored", type=share, metavar="SHARE")
    option("--min-score", 0.0, "least predicted probability of being good", type=share, metavar="P")
    option("--max-bytes", 0, "read a sample of about so many bytes; 0: everything", type=whole, metavar="BYTES")
    option("--max-documents", 0, "keep at most so many documents; 0: all", type=whole, metavar="N")
    option("--val-share", 0.01, "share of the documents for validation, at least one", type=number(float, 0, 0.9), metavar="SHARE")
    option("--workers", 0, "processes; 0: one a core", type=whole, metavar="N")
    option("--seed", 0, "of the sample and of the documents' order", type=int)
    option("--bench", False, "measure every stage on --input, beside the peers that are installed, and write nothing", action="store_true")
    options = parser.parse_args(arguments)
    if options.bench:
        return bench(options)
    del options.bench
    return build(options)


if __name__ == "__main__":
    main()

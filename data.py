"""Documents -> clean, deduplicated, scored text -> tokens: `python data.py` makes data/web from this machine's own Python source.

    find_files -> read_documents       directories, files, JSON Lines, WET, parquet, URLs; gzipped or not
    -> language, quality_rule          a verdict on each document, with its reason
    -> Contamination                   documents that contain a benchmark's problems
    -> minhash, components             exact and near duplicates, the best of each group kept
    -> RandomForest                    educational value, learned from labels (synth.py label)
    -> train_bpe -> data/NAME/         {train.bin, val.bin, tokenizer.json, meta.json, report.html}

All work is cut into numbered parts on disk (class Work), so memory does not grow with the input, a stopped command goes on where it was, and
`torchrun data.py ...` on several machines with a shared folder makes the same dataset.
"""
import argparse
import ast
import builtins
import concurrent.futures
import contextlib
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
import stat
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
RECORDS = set(".jsonl .ndjson".split())
CRAWL = set(".wet .warc".split())


def n_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parallel(function, items, workers, description):
    """[function(item) for item in items] in forked processes: they inherit the items, only results travel. In order."""
    global _inherited
    items = list(items)
    bar = functools.partial(tqdm, total=len(items), desc=description, disable=None, leave=False)
    if min(workers, len(items)) <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        return list(bar(map(function, items)))
    _inherited = function, items
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _quiet) as pool:
            return list(bar(pool.map(_call, range(len(items)))))
    except concurrent.futures.BrokenExecutor:
        raise OSError(f"a process died while {description}, most likely for lack of memory; use fewer --workers or --max-bytes") from None
    finally:
        _inherited = None


def _call(index):
    function, items = _inherited
    return function(items[index])


def _quiet():
    signal.signal(signal.SIGINT, signal.SIG_IGN)                      # Ctrl-C is the parent's to report
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def batches(items, size, n_bytes):
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


class Work:
    """Work in numbered parts that outlive the process: part i of a stage is the directory FOLDER/STAGE/i, which appears whole.

    Part i belongs to rank i mod WORLD_SIZE of torchrun, and to any of that rank's processes; one that is there is not made again; a stage ends
    when all its parts are there. What a part holds depends on its number alone. So cores, machines on a shared folder, and going on after
    a kill are one mechanism, and the result is the same for any number of them.
    """

    def __init__(self, folder, workers, rank=0, world=1):
        self.folder, self.workers, self.rank, self.world = Path(folder), workers, rank, world

    def run(self, stage, n, make):
        """make(i) -> {name: array or what JSON can hold} for i < n; returns the n parts: part(name) reads one value, large arrays mapped."""
        where = self.folder / stage
        where.mkdir(parents=True, exist_ok=True)

        def one(i):
            aside = where / f"{i}.{os.getpid()}"
            aside.mkdir()
            for name, value in make(i).items():
                np.save(aside / name, value) if isinstance(value, np.ndarray) else (aside / f"{name}.json").write_text(json.dumps(value))
            os.rename(aside, where / str(i))

        there = set(os.listdir(where))
        parallel(one, [i for i in range(self.rank, n, self.world) if str(i) not in there], self.workers, stage)
        while set(map(str, range(n))) - set(os.listdir(where)):       # other ranks' parts
            time.sleep(0.1)
        return [functools.partial(self.load, where / str(i)) for i in range(n)]

    @staticmethod
    def load(folder, name):
        path = folder / f"{name}.npy"
        if not path.exists():
            return json.loads((folder / f"{name}.json").read_text())
        return np.load(path, mmap_mode="r" if path.stat().st_size > 1 << 16 else None)


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
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip after line {number} ({error}); fetch or make the file again") from None
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}; every line must be one JSON object: mend or remove this one") from None


def write_jsonl(path, records):
    """Writes records as JSON Lines (gzipped if path ends in .gz), atomically; returns how many."""
    path, count = Path(path), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as raw:
            # neither name nor time in the gzip header: the same records give the same file
            file = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
            for count, record in enumerate(records, 1):
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            if file is not raw:
                file.close()
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return count


# ---- reading ----

def suffix_of(name):
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def fetch(url):
    """A URL's file in the cache (MINPHI_CACHE, ~/.cache/minphi), fetched once, resumed when it was cut."""
    from model import download
    cache = Path(os.environ.get("MINPHI_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minphi") / "files"
    path = cache / digest(url).hex() / (re.sub(r"[^\w.-]", "_", url.split("?")[0].rstrip("/").rsplit("/", 1)[-1]) or "file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock", "w") as lock:                     # several ranks ask at once
        with contextlib.suppress(ImportError):
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            download(url, str(path))
    return str(path)


def find_files(paths, drop, seed=0, max_bytes=0, max_documents=0, option="--input"):
    """The files to read as (path, name, bytes to read at most), sorted by name, or a sample of about max_bytes in hash order.

    `python` among the paths stands for this interpreter's standard library and site-packages; URLs are fetched. Links to directories are not
    followed, so a loop of links ends; what cannot be read is counted in `drop` (a Counter of reasons).
    """
    found = {}                                                        # path -> (name, size)

    def add(path, name):
        try:
            info = os.stat(path)
            if stat.S_ISREG(info.st_mode):
                found.setdefault(path, (name, info.st_size))
            else:
                drop["not a regular file"] += 1                       # reading a pipe or a device could wait for ever
        except OSError:
            drop["unreadable"] += 1

    for root in map(str, paths):
        if re.match(r"https?://", root):
            root = fetch(root)
        roots, wanted = [os.path.normpath(root)], CODE | PROSE | RECORDS | CRAWL | {".parquet"}
        if root == "python":
            roots, wanted = sorted({os.path.realpath(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")}), {".py"}
        elif not os.path.lexists(root):
            raise FileNotFoundError(f"{option} {root}: no such file or directory (`python` names this machine's own source)")
        for top in roots:
            if not os.path.isdir(top):
                add(top, os.path.basename(top))
                continue
            for folder, folders, files in os.walk(top, onerror=lambda error: drop.update(["unreadable"])):
                folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
                for path in (os.path.join(folder, name) for name in files):
                    if suffix_of(path) in wanted:
                        add(path, os.path.relpath(path, top))
                    elif root != "python":
                        drop["not a text file"] += 1
    files = sorted((name, path, size) for path, (name, size) in found.items())
    if max_bytes or max_documents:
        files = sorted(files, key=lambda file: digest(f"{seed} {file[0]}"))[:max_documents or None]
    room = (max_bytes or math.inf) - np.cumsum([0] + [size for _, _, size in files])
    return [(path, name, left) for (name, path, _), left in zip(files, room.tolist()) if left > 0]


def read_documents(files, drop, max_document_bytes=10_000_000):
    """Yields a dict {text, id, source, bytes, ...} for each document in files, as find_files gives them.

    A .jsonl file holds one document a line (a fourth and fifth value of its entry: only lines that begin in these bytes), a .wet file one a
    record of Common Crawl, a .parquet file one a row; with `text`, or `prompt` and its `canonical_solution` or `completion`. Any other file
    is one document. Whatever cannot be used is counted in `drop` by reason.
    """
    for path, name, allowance, *span in files:
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                defaults, kind = {"id": name, "source": path}, suffix_of(path)
                if kind in RECORDS:
                    found = (from_record(line, defaults | {"id": f"{name}@{at}"}, drop) for at, line in lines(file, 8 * max_document_bytes, drop, *span))
                elif kind in CRAWL:
                    found = (defaults | page for page in crawled_pages(file, max_document_bytes))
                elif kind == ".parquet":
                    found = (from_record(row, defaults | {"id": f"{name}@{i}"}, drop) for i, row in enumerate(parquet_rows(path)))
                else:
                    found, allowance = [defaults | {"text": file.read(max_document_bytes + 1)}], math.inf
                for document in found:
                    if document and (document := clean(document, drop, max_document_bytes)):
                        yield document
                        allowance -= document["bytes"]
                        if allowance <= 0:
                            break
        except (EOFError, zlib.error, gzip.BadGzipFile):
            drop["damaged gzip"] += 1
        except ImportError:
            drop["parquet, for which pyarrow is not installed (pip install pyarrow)"] += 1
        except OSError:
            drop["unreadable"] += 1


def lines(file, limit, drop, begin=0, end=math.inf):
    """(offset, line) of a binary file, for lines that begin in [begin, end); those of `limit` bytes and more are skipped without being held."""
    if begin:
        file.seek(begin - 1)
        while (line := file.readline(limit)) and not line.endswith(b"\n"):
            pass
    while (at := file.tell()) < end and (line := file.readline(limit)):
        if len(line) == limit and not line.endswith(b"\n"):
            drop["too large"] += 1
            while line and not line.endswith(b"\n"):
                line = file.readline(limit)
        elif line.strip():
            yield at, line


def crawled_pages(file, limit):
    """Common Crawl's WET: the records of type `conversion` as {text, id, web}."""
    while line := file.readline(1 << 16):
        if line.startswith(b"WARC/"):
            head = dict(row.decode(errors="replace").strip().split(": ", 1) for row in iter(lambda: file.readline(1 << 16).strip(), b"") if b": " in row)
            length = int(head["Content-Length"]) if head.get("Content-Length", "").isdigit() else 0
            text = file.read(min(length, limit + 1))
            left = length - len(text)
            while left and (more := file.read(min(left, 1 << 20))):
                left -= len(more)
            if left:
                raise EOFError
            if head.get("WARC-Type") == "conversion":
                yield {"text": text, "id": head.get("WARC-Target-URI", "?"), "web": True}


def parquet_rows(path):
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path) as file:                   # (its errors are OSErrors)
        for batch in file.iter_batches(1000):
            yield from batch.to_pylist()


def from_record(record, defaults, drop):
    """A line of JSON, or what it holds -> document, or None. A problem's prompt ends before its last newline, so that newline and indentation,
    which are one token, belong to the completion."""
    try:
        record = json.loads(record) if isinstance(record, bytes) else record
    except (ValueError, RecursionError):
        drop["invalid JSON"] += 1
        return None
    if isinstance(record, dict):
        solution = record.get("canonical_solution", record.get("completion"))
        record.pop("prompt_chars", None)
        if isinstance(record.get("prompt"), str) and isinstance(solution, str):
            record |= {"text": record["prompt"] + solution, "prompt_chars": len(record["prompt"].rstrip())}
        if isinstance(record.get("text"), str):
            return defaults | ({"id": record["task_id"]} if "task_id" in record else {}) | record
    drop["no text in record"] += 1


def clean(document, drop, max_bytes):
    """The document with `text` (bytes or str) decoded, line ends made newlines and `bytes`, its UTF-8 length; None if unusable."""
    text = document["text"]
    reason = "too large" if len(text) > max_bytes else "binary" if (b"\0" if isinstance(text, bytes) else "\0") in text else None
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        if "prompt_chars" not in document:                            # there every character has its place
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        n_bytes = len(text.encode())
        reason = reason or ("too large" if n_bytes > max_bytes else None if text.strip() else "empty")
    except UnicodeError:                                              # bad bytes, or half a surrogate pair in JSON
        reason = reason or "invalid UTF-8"
    if not reason:
        return document | {"text": text, "bytes": n_bytes}
    drop[reason] += 1


# ---- language, quality, personal data ----

GENERATED = re.compile(r"auto-?(?:matically)?[ -]?generated|@generated|do not (?:edit|modify)", re.I)
LEXEME = re.compile(r"""(\#[^\n]*|[rbuf]{0,2}\"{3}[\s\S]*?\"{3}|[rbuf]{0,2}'{3}[\s\S]*?'{3})  # comments, documentation
                      |([rbuf]{0,2}"[^"\\\n]*(?:\\.[^"\\\n]*)*"|[rbuf]{0,2}'[^'\\\n]*(?:\\.[^'\\\n]*)*'|\b\d[\w.]*)
                      |([^\W\d]\w*)""", re.X | re.I | re.S)
CODE_LINE = re.compile(r"\s*(?:(?:def|class|import|from|return|if|for|while|else|elif|try|function|var|const|let|int|void|fn"
                       r"|#include)\b|[\w.\[\]]+ [-+*/]?= |//|[{}@])|.*[;{})]\s*$")
TEST_PATH = re.compile(r"(?:^|/)(?:tests?|testing|idle_test)/|(?:^|/)(?:test_[^/]*|[^/]*_tests?|conftest)\.py$")
ALNUM = bytes(i for i in range(256) if i >= 128 or chr(i).isalnum())
PUNCTUATION = string.punctuation + "’“”‘–—…•«»¿¡"
HAS_LETTER = re.compile(r"[^\s\W\d_]\S*")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
SCRIPTS = {"ja": "[\u3040-\u30ff]", "ko": "[\uac00-\ud7af]", "zh": "[\u4e00-\u9fff]", "hi": "[\u0900-\u097f]", "bn": "[\u0980-\u09ff]",
           "ar": "[\u0600-\u06ff]", "ru": "[\u0400-\u04ff]", "el": "[\u0370-\u03ff]", "he": "[\u0590-\u05ff]", "th": "[\u0e00-\u0e7f]"}
FREQUENT = {  # words that are frequent in one language and rare in the others
    "en": "the of and to in is that for it with as was on are be this by you not or from have at an which can will your their has if but all we",
    "es": "de la que el en y los se del las un por con no una su para es al lo como más o pero sus le ha este si sin sobre esta entre cuando ser",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont cette avec ou vous être aux ont mais nous",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er hat dass sie nach wird bei kann oder",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à seu sua ou ser quando você são pode",
    "it": "di e il la che in a per un è del le con non una i da si della sono gli dei nel alla più come al ma anche delle questo essere o se può",
    "nl": "de van het een en in is dat op te zijn met voor niet aan er om ook als dan bij maar of uit wordt door worden naar kan deze u je geen",
    "pl": "w i na z do się nie że to jest o jak po co tak za od przez dla ale czy być są lub może tylko oraz już przed można ten tego które",
    "tr": "ve bir bu da de için ile olarak çok daha olan gibi en ne kadar sonra ise var değil veya her bunu şekilde tarafından olduğu mi",
    "id": "yang dan di dengan untuk dari ini itu pada adalah tidak dalam akan ke oleh atau juga anda dapat telah karena bisa ada sebagai kami saya",
    "vi": "của và là có không các được cho trong một người những với này đã khi để từ về như tôi bạn cũng ra đến vào phải hoặc",
    "sv": "och att det som en på är av för med den till inte om ett har de kan var från men så vid eller ska du sig"}
PERSONAL = [(re.compile(pattern), mask) for pattern, mask in (
    (r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b", "<EMAIL>"),
    (r"(?<![\d.])(?!(?:0|10|127|255)\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.)(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])", "<IP>"),
    (r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----", "<KEY>"),
    (r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_\w{36,}|sk-[\w-]{20,}|xox[baprs]-[\w-]{10,}|AIza[\w-]{35}|hf_[A-Za-z]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})", "<KEY>"),
    (r"(?i)((?:key|token|secret|password|passwd)['\"]?\s*[:=]\s*)['\"][\w+/=.-]{16,}['\"]", r"\1'<KEY>'"))]


@functools.lru_cache
def frequent_words():
    table = {}
    for i, words in enumerate(FREQUENT.values()):
        for word in words.split():
            table.setdefault(word, []).append(i)
    return table


def language(text, threshold=0.08):
    """The language of prose by its script, or by the share of its words that are among a language's frequent ones; "?" below `threshold`.
    A word of k languages counts 1 / k for each."""
    text = text[:5000].lower()
    if not text.isascii():
        n_letters = sum(map(str.isalpha, text))
        shares = {name: len(re.findall(script, text)) / max(1, n_letters) for name, script in SCRIPTS.items()}
        if sum(shares.values()) > 0.5:                                # Japanese mixes its own letters with Chinese ones
            best = "ja" if shares["ja"] > 0.1 else max(shares, key=shares.get)
            return "uk" if best == "ru" and re.search("[іїєґ]", text) else "fa" if best == "ar" and re.search("[پچژگ]", text) else best
    words, scores = re.findall(r"[^\W\d_]+", text), [0.0] * len(FREQUENT)
    for word, count in Counter(words).items():
        for i in (where := frequent_words().get(word, ())):
            scores[i] += count / len(where)
    return list(FREQUENT)[int(np.argmax(scores))] if max(scores) >= threshold * max(1, len(words)) else "?"


def is_code(document):
    """Code or prose, by the suffix of the id, or by its lines where there is none."""
    suffix = suffix_of(str(document.get("path") or document["id"]))
    if suffix in CODE or suffix in PROSE:
        return suffix in CODE
    rows = [row for row in document["text"][:20000].splitlines() if row.strip()]
    return sum(bool(CODE_LINE.match(row)) for row in rows) > 0.4 * len(rows)


def quietly(parse, text):
    """parse(text, ...), or None for a text that is not Python. (symtable.symtable takes an eighth of the time of ast.parse: it makes no objects.)"""
    with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        warnings.simplefilter("ignore")                               # old escapes in strings are not our business
        return parse(text, "<document>", "exec")


def code_rule(text, name):
    """Why a source file teaches little, or None. The Stack's and StarCoder's rules, then phi-1's wish for explained code."""
    rows, raw = text.splitlines(), text.encode()
    if len(raw) < 100:
        return "too short"
    if max(map(len, rows)) > 1000 or len(text) > 100 * len(rows):
        return "minified"
    if len(raw) - len(raw.translate(None, ALNUM)) < 0.25 * len(raw):
        return "few letters and digits"
    if GENERATED.search(text[:2000]):
        return "generated"
    if not name.endswith(".py"):
        return None
    if TEST_PATH.search(name) or 2 * text.count("def test") > text.count("def ") > 0:
        return "test"
    found = LEXEME.findall(text)
    explained, literals, names = sum(len(f[0]) for f in found), sum(bool(f[1]) for f in found), sum(bool(f[2]) for f in found)
    if literals > 50 and literals > names:
        return "data table"
    if not 0.02 <= explained / len(text) <= 0.9:
        return "no documentation" if explained < 0.02 * len(text) else "no code"
    return None if quietly(symtable.symtable, text) else "does not parse"


def gopher_rule(text):
    """Gopher's quality and repetition rules (arXiv 2112.11446, table A1), words split at whitespace: the reason to drop a page, or None."""
    words, rows = text.split(), text.splitlines()
    n, full = len(words), [word for word in words if word.strip(PUNCTUATION)]
    if not 50 <= len(full) <= 100_000:
        return "fewer than 50 words" if len(full) < 50 else "more than 100,000 words"
    if not 3 <= sum(map(len, full)) / len(full) <= 10:
        return "mean word length"
    if max(text.count("#"), text.count("…") + text.count("...")) > 0.1 * n:
        return "symbols"
    if sum(row.lstrip().startswith(("•", "-", "*")) for row in rows) > 0.9 * len(rows):
        return "bullet list"
    if sum(row.rstrip().endswith(("...", "…")) for row in rows) > 0.3 * len(rows):
        return "lines that break off"
    if len(HAS_LETTER.findall(text)) < 0.8 * n:
        return "few words with letters"
    if len(STOP_WORDS.intersection(words)) < 2:
        return "no stop words"
    for reason, pieces in ("repeated paragraphs", re.split(r"\n{2,}", text.strip())), ("repeated lines", re.split(r"\n+", text)):
        extra = len(pieces) - len(counts := Counter(pieces))
        if extra > 0.3 * len(pieces) or sum(len(piece) * (k - 1) for piece, k in counts.items()) > 0.2 * len(text):
            return reason
    hashes, lengths = np.fromiter(map(hash, words), np.int64, n).view(np.uint64), np.fromiter(map(len, words), np.int64, n)
    total = np.append(0, np.cumsum(lengths))
    grams = hashes.copy()
    for size in range(2, min(10, n) + 1):                             # grams[i] stands for the words i ... i + size - 1
        grams = mix(grams[:-1] + hashes[size - 1:] * np.uint64(2 * size + 1))
        order = grams.argsort()
        again = grams[order[1:]] == grams[order[:-1]]
        if not again.any():
            break
        if size < 5:
            start = np.flatnonzero(np.append(True, ~again))
            often = np.diff(start, append=len(grams))
            k = often.argmax()
            if often[k] > 1 and often[k] * (total[order[start[k]] + size] - total[order[start[k]]]) > (0.24 - 0.02 * size) * len(text):
                return "one phrase again and again"
        else:                                                         # words of any phrase that stands there twice, but once
            covered = np.zeros(n + 1, np.int64)
            np.add.at(covered, order[1:][again], 1)
            np.add.at(covered, order[1:][again] + size, -1)
            if lengths[np.cumsum(covered[:-1]) > 0].sum() > (0.2 - 0.01 * size) * len(text):
                return "repeated phrases"


def prose_rule(text):
    """Why a page of prose is poor, or None: Gopher's rules, then those of C4 (arXiv 1910.10683) and FineWeb (2406.17557) on lines."""
    if reason := gopher_rule(text):
        return reason
    rows = [row.strip() for row in text.splitlines() if row.strip()]
    if re.search("lorem ipsum|javascript (?:is|must be|to be) (?:enabled|disabled)|enable javascript", text, re.I):
        return "filler"
    if sum(row.endswith((".", "!", "?", '"', "'", ":", ";", ")", "”")) for row in rows) < 0.12 * len(rows):
        return "few finished lines"
    if sum(len(row) < 30 for row in rows) > 0.67 * len(rows):
        return "short lines"
    return "generated" if GENERATED.search(text[:500]) else None


def quality_rule(document, rules):
    """The reason to drop a document, or None. `auto` leaves problems (which have a prompt) alone, and tells code from prose: Gopher's
    thresholds would destroy code."""
    if rules == "none" or rules == "auto" and "prompt_chars" in document:
        return None
    if rules == "code" or rules == "auto" and is_code(document):
        return code_rule(document["text"], str(document.get("path") or document["id"]))
    return prose_rule(document["text"])


# ---- deduplication ----

N_GRAM = 5


def mix(x):
    """A bijection of uint64 that spreads every input bit over the output (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache
def powers(bits):
    """base^i and base^-i modulo 2^64 for i < 2^bits."""
    base = 0x9E3779B97F4A7C15                                         # odd, so it has an inverse modulo 2^64
    return [np.cumprod(np.full(1 << bits, factor, np.uint64)) for factor in (base, pow(base, -1, 2**64))]


def word_hashes(raws):
    """Hashes of the words of some texts (bytes), uint64 (words,), and where each text's words begin in there, (texts + 1,).

    All texts are hashed as one buffer: with H the running sum of c_t B^t (mod 2^64), the word in [i, j) has the hash
    (H[j] - H[i]) B^-i, whatever its position. Words are runs of letters, digits and non-ASCII bytes. Fastest by about 128 kB.
    """
    joined = b"\n" + b"\n".join(raws) + b"\n"
    is_word = np.frombuffer(joined.translate(bytes(i in ALNUM for i in range(256))), bool)
    edges = np.flatnonzero(is_word[1:] != is_word[:-1])
    before, last = edges[::2], edges[1::2]                            # the byte before a word's first, and its last
    power, inverse = powers(max(17, len(joined).bit_length()))
    running = np.frombuffer(joined, np.uint8).astype(np.uint64)
    running += np.uint64(1)
    running *= power[:len(joined)]
    np.cumsum(running, out=running)
    words = mix((running[last] - running[before]) * inverse[before])
    return words, np.searchsorted(before, np.cumsum([0] + [len(raw) + 1 for raw in raws]))


def gram_hashes(words, n):
    """Hashes of the n consecutive words from each position on, uint64 (words,); those of the last n - 1 positions mean nothing."""
    grams = np.zeros(len(words), np.uint64)
    for i in range(n):
        grams[:max(0, len(words) - i)] += words[i:] * np.uint64(2 * 0x2545F4914F6CDD1D * (i + 1) + 1 & 2**64 - 1)
    return mix(grams)


def minhash(texts, n_permutations=112):
    """MinHash signatures of word 5-grams, uint32 (documents, n_permutations): least values under x -> scale x mod 2^32 of mixed hashes."""
    scale = np.random.default_rng(0).integers(0, 2**31, n_permutations, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    signatures, at = np.empty((len(texts), n_permutations), np.uint32), 0
    for raws in batches((text.encode() for text in texts), 1 << 17, len):
        words, bounds = word_hashes(raws)
        grams = (gram_hashes(words, N_GRAM) >> np.uint64(32)).astype(np.uint32)
        # a text too short for a gram resembles only itself
        own = [grams[i:j - N_GRAM + 1] if j - i >= N_GRAM else np.frombuffer(digest(raw), np.uint32)[:1] for i, j, raw in zip(bounds, bounds[1:], raws)]
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


def candidates(keys):
    """Pairs (m, 2) of indices with equal keys: each with its neighbour and with its bucket's first, so a bucket of n gives 2n pairs, not n^2."""
    order = keys.argsort(kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    first = np.maximum.accumulate(np.where(np.append(False, same), 0, np.arange(len(order))))[1:] if len(order) else order
    return np.unique(np.concatenate([np.stack([other[same], order[1:][same]], 1) for other in (order[:-1], order[first])]), axis=0)


def components(pairs):
    """(nodes, component of each) of the graph of these pairs: every node takes the least label among its neighbours, and its label's label."""
    nodes, pairs = np.unique(pairs, return_inverse=True)
    pairs, label = pairs.reshape(-1, 2), np.arange(len(nodes))
    while True:
        least, old = label[pairs].min(1), label.copy()
        for side in (0, 1):
            np.minimum.at(label, label[pairs[:, side]], least)
            np.minimum.at(label, pairs[:, side], least)
        label = label[label]
        if (label == old).all():
            return nodes, label


# ---- decontamination ----

FUNCTION = re.compile(r"^(?=(([ \t]*)(?:async )?def [^\n]*\n(?:(?:\2[ \t)][^\n]*)?\n)*))", re.M)
UNSPOKEN = re.compile(r"\"{3}[\s\S]*?\"{3}|'{3}[\s\S]*?'{3}|#[^\n]*")
TOKEN = re.compile(r"\b(?:if|for|while|return|lambda|and|or|not|in)\b|\.\w+|[-+*/%<>]|[=!]=|\b\d+")


def tree_of(source):
    """(name, labels of the nodes in preorder) of a Python function's syntax tree, or None: kinds, constants, methods, operators and builtins,
    without documentation, annotations and the names that its author chose."""
    function = next(iter((quietly(ast.parse, textwrap.dedent(source)) or ast.Module([], [])).body), None)
    labels, nodes = [], [function]
    while isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and nodes:
        node = nodes.pop()
        labels.append("." + node.attr if isinstance(node, ast.Attribute) else repr(node.value)[:20] if isinstance(node, ast.Constant) else
                      node.id if isinstance(node, ast.Name) and hasattr(builtins, node.id) else type(node).__name__)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += reversed([*node.args.args, *node.args.defaults, *node.body[ast.get_docstring(node, clean=False) is not None:]])
        elif not isinstance(node, ast.arg):
            nodes += reversed([child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)])
    return (function.name, labels) if labels else None


def edit_distance(a, b):
    """Levenshtein distance of two sequences: Myers' bit vectors (1999) in Hyyrö's form, a whole column in one integer."""
    where, ones, last = Counter(), (1 << len(a)) - 1, 1 << len(a) >> 1
    for i, x in enumerate(a):
        where[x] |= 1 << i
    up, down, distance = ones, 0, len(a) or len(b)
    for x in b if a else ():
        diagonal = (((where[x] & up) + up) ^ up) | where[x] | down
        higher, lower = down | ~(diagonal | up) & ones, up & diagonal
        distance += bool(higher & last) - bool(lower & last)
        higher, lower = (higher << 1 | 1) & ones, lower << 1 & ones
        up, down = lower | ~(diagonal | higher) & ones, higher & diagonal
    return distance


class Contamination:
    """Finds documents that contain benchmark problems, or parts of them.

    By words (lower case, letters and digits; phi-4, arXiv 2412.08905, appendix B): one 13-gram in common, or 7-grams in common that make up
    `share` of those of the shorter text. Grams with too few different words of letters (lists of numbers), and those of more than two
    problems (what a benchmark says everywhere), do not count. By syntax (phi-1, arXiv 2306.11644, section 5): a function with
    1 - edit distance / longer length >= `match` between its tree and that of a problem's function; trees below `smallest` do not count.
    """
    FIELDS = "prompt question problem instruction text canonical_solution completion answer solution code".split()

    def __init__(self, paths, share=0.6, match=0.9, smallest=20):
        self.share, self.match, self.smallest, drop, self.problems = share, match, smallest, Counter(), []        # (name, text)
        for path, name, _ in find_files(paths, drop, option="--decontaminate"):
            records = read_jsonl(path) if suffix_of(path) in RECORDS else read_documents([(path, name, math.inf)], drop)
            self.problems += [(str(record.get("task_id", f"{name}:{i}")), "\n".join(record[key] for key in self.FIELDS if isinstance(record.get(key), str)))
                              for i, record in enumerate(records, 1)]
        if drop or not any(text.strip() for _, text in self.problems):
            raise ValueError(f"--decontaminate {' '.join(map(str, paths))}: {dict(drop) or 'no problem found'}; give JSON Lines or text files")
        raws = [text.lower().encode() for _, text in self.problems]
        words, bounds = word_hashes(raws)
        lettered = [bool(re.search(rb"[a-z\x80-\xff]", word)) for raw in raws for word in re.findall(rb"[0-9a-z\x80-\xff]+", raw)]
        self.known, self.owners, self.n_grams, self.table = {}, {}, {}, np.zeros(1 << 20, bool)
        grams = gram_hashes(words, 7)
        for n in (13, 7):
            owners, at = {}, np.arange(max(0, len(words) - n + 1))
            hashes = self.hashes(grams, at, n)
            for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
                for k in range(begin, end - n + 1):
                    if len({words[j] for j in range(k, k + n) if lettered[j]}) > n // 2:
                        owners.setdefault(int(hashes[k]), set()).add(i)
                        self.table[grams[k] >> np.uint64(44)] = True  # by the first 20 bits of the first 7-gram: most need no search
            owners = {gram: sorted(found) for gram, found in sorted(owners.items()) if len(found) <= 2}
            self.known[n], self.owners[n] = np.array([*owners, 2**64 - 1], np.uint64), list(owners.values()) + [[]]
            self.n_grams[n] = Counter(itertools.chain(*owners.values()))
        sources = [(i, source) for i, (_, text) in enumerate(self.problems) for source, _ in FUNCTION.findall(text + "\n")]
        self.trees = [(i, source, tree) for i, source in sources for _, tree in [tree_of(source) or ("", [])] if len(tree) >= smallest]
        self.bags, self.sizes = np.array([self.bag(source) for _, source, _ in self.trees]), np.array([len(tree) for *_, tree in self.trees])

    @staticmethod
    def hashes(grams, at, n):
        """Hashes of the 7 or 13 words from `at` on: a 13-gram is the seven words from here, and the seven from six further on."""
        return grams[at] if n == 7 else mix(grams[at] + np.uint64(3) * grams[np.minimum(at + 6, len(grams) - 1)])

    @staticmethod
    def bag(source):
        return np.bincount([zlib.crc32(token.encode()) & 63 for token in TOKEN.findall(UNSPOKEN.sub("", source))], minlength=64).astype(np.int16)

    def find(self, texts):
        """{index of a text: (rule, number of the problem, what they share)}, by words."""
        found, done = {}, 0
        for raws in batches((text.lower().encode() for text in texts), 1 << 17, len):
            words, bounds = word_hashes(raws)
            grams = gram_hashes(words, 7)
            maybe = np.flatnonzero(self.table[grams >> np.uint64(44)])
            for n in (7, 13):
                document = np.searchsorted(bounds, maybe, side="right") - 1
                inside = maybe + n <= bounds[document + 1]
                hashes = self.hashes(grams, maybe[inside], n)
                place = np.searchsorted(self.known[n], hashes)
                hit = self.known[n][place] == hashes
                shared = Counter((d, i) for d, gram in {*zip(document[inside][hit].tolist(), place[hit].tolist())} for i in self.owners[n][gram])
                for (d, i), count in sorted(shared.items(), key=lambda item: (item[1], item[0])):
                    of = min(self.n_grams[n][i], len(np.unique(grams[bounds[d]:bounds[d + 1] - n + 1])))
                    if n == 13 or count >= max(3, self.share * of):
                        found[done + d] = f"{n}-gram", i, f"{count} of {of} in common"
            done += len(raws)
        return found

    def find_functions(self, text):
        """The like for the functions of one Python text; None if there is nothing. Only those whose tokens resemble a problem's are parsed."""
        for source, _ in FUNCTION.findall(text + "\n") if self.trees and "def " in text else ():
            if len(source) < 10_000:
                bag = self.bag(source)
                near = np.flatnonzero(np.minimum(self.bags, bag).sum(1) >= (self.match - 0.2) * np.maximum(self.bags.sum(1), bag.sum()))
                name, tree = tree_of(source) or ("", []) if len(near) else ("", [])
                for k in near if len(tree) >= self.smallest else ():
                    if (rate := 1 - edit_distance(tree, self.trees[k][2]) / max(len(tree), self.sizes[k])) >= self.match:
                        return "syntax tree", self.trees[k][0], f"{name}: match rate {rate:.3f}"


# ---- educational value ----

WORDS = {  # groups of words that the features count; the teaching terms are those of the first lessons in programming and of textbooks
    "explanation": "because therefore thus hence means explain explains explained understand note notice recall consider suppose define defined "
                   "definition concept idea reason why how step steps first second then finally instead such called given",
    "example": "example examples exercise solution answer question output prints expected result sample illustrate shows doctest usage",
    "teaching": "algorithm list number numbers value values function sum loop sort sorted search tree graph string index count array matrix "
                "recursive recursion sequence element elements integer compute computes returns theorem proof equation data structure",
    "noise": "click subscribe cookie cookies login copyright license licensed todo fixme xxx deprecated http https www warranty advertisement "
             "share follow buy price sale hack workaround backwards compat compatibility vendored",
    "stop words": "the be to of and that have with a in is it for as are this on not or by from at an which",
    "control": "if else elif for while return yield try except raise",
    "glue": "import self cls config settings logger logging assert pass kwargs args none isinstance getattr setattr"}
GROUP = {word.encode(): i for i, words in enumerate(WORDS.values()) for word in words.split()}
STARTS = {"headers": "## ### #### === ---", "lists": "- * • 1. 2. 3. 4. 5.", "code blocks": "``` ~~~ >>> .. $", "comments": "# // /* #: *",
          "definitions": "def class async function fn func struct", "imports": "import from #include use require", "branches": "if elif else: for while",
          "exits": "return yield raise", "guards": "try: except except: finally: assert with", "decorators": "@"}
START = {word: i for i, words in enumerate(STARTS.values()) for word in words.split()}
MARKS = {"docstrings": ('"""', "'''"), "assignments": (" = ",), "private names": (" _", "._"), "calls": ("(",), "chains": (").",)}
CLASSES = {"letters": str.isalpha, "digits": str.isdigit, "capitals": str.isupper, "spaces": str.isspace, "brackets": "[]{}".__contains__,
           "operators": "+-*/<>%&|".__contains__, "stops": ".,;:?!".__contains__, "underscores": "_".__contains__, "quotes": "\"'".__contains__,
           "not ASCII": lambda c: not c.isascii()}
CLASS_OF = np.array([[test(chr(i)) for i in range(256)] for test in CLASSES.values()], np.float32)
LETTERS = bytes(i if i >= 128 or chr(i).isalpha() else 32 for i in range(256))
SIZES = ["length", "lines", "line length", "longest line", "blank lines", "indentation", "word length", "words", "unique words", "words used once",
         "sentence length", "paragraph length", "lines a definition"]
FEATURES = [*SIZES, *CLASSES, *WORDS, *STARTS, *MARKS]


def features(text, at_most=20_000):
    """What the classifier sees of a text (its first 20,000 characters): float32 (len(FEATURES),), shares or logarithms, named by FEATURES."""
    size, text = len(text), text[:at_most]
    raw, rows = text.encode(), text.split("\n")
    stripped = [row.lstrip() for row in rows]
    first = Counter([row.split(None, 1)[0] for row in stripped if row])
    full = max(1, first.total())
    starts, groups = [0] * len(STARTS), [0] * len(WORDS)
    for word, k in first.items():
        kind = START.get(word, START.get(word[:3], START.get(word[0])))
        if kind is not None:
            starts[kind] += k
    counts = Counter(raw.lower().translate(LETTERS).split())
    n_words = max(1, counts.total())
    for word in counts.keys() & GROUP.keys():
        groups[GROUP[word]] += counts[word]
    marks = [sum(map(text.count, mark)) for mark in MARKS.values()]
    sentences = 1 + text.count(". ") + text.count(".\n") + text.count("? ") + text.count("! ")
    letters = sum(map(len, counts))
    sizes = [math.log1p(size), math.log1p(len(rows)), len(text) / len(rows), math.log1p(max(map(len, rows))), 1 - full / len(rows),
             (len(text) - sum(map(len, stripped))) / full, letters / max(1, len(counts)), math.log1p(n_words), len(counts) / n_words ** 0.75,
             list(counts.values()).count(1) / max(1, len(counts)), n_words / sentences, n_words / (1 + text.count("\n\n")),
             full / (1 + starts[START["def"]])]
    classes = CLASS_OF @ np.bincount(np.frombuffer(raw, np.uint8), minlength=256) / max(1, len(raw))
    return np.array(sizes + classes.tolist() + [k / n_words for k in groups] + [k / full for k in starts + marks], np.float32)


class RandomForest:
    """Bagged classification trees (Breiman 2001) from scratch, on features cut into at most 256 bins, over all cores.

    fit(X float32 (n, features), y 0/1 (n,)); predict_proba(X) -> float (n,), the mean over trees of the share of ones in a row's leaf. Each
    tree sees half of the rows, each once (as good as a bootstrap: Friedman and Hall 2007), and splits at the best Gini impurity among
    sqrt(features) features drawn for each node. It grows level by level, all nodes at once: rows are sorted by (node, bin) for each
    drawn feature, and a running sum of y gives every split of every node. `importance`: each feature's share of the impurity removed.
    """
    PARTS = "feature threshold child value roots importance max_depth".split()

    def __init__(self, n_trees=100, seed=0, max_depth=16, min_leaf=2, workers=None):
        self.n_trees, self.seed, self.max_depth, self.min_leaf, self.workers = n_trees, seed, max_depth, min_leaf, workers or n_cores()

    def fit(self, X, y):
        X, y = np.asarray(X, np.float32), np.asarray(y)
        if X.ndim != 2 or y.shape != X.shape[:1] or not X.size or not np.isfinite(X).all() or not np.isin(y, (0, 1)).all():
            raise ValueError(f"a forest learns from finite X (n, features) and y (n,) of 0 and 1, not from {X.shape} and {y.shape}")
        self.edges = []                                               # bin b holds the values up to edges[b]
        for column in X.T:
            values = np.unique(column)
            if len(values) > 256:
                values = np.unique(np.quantile(column, np.linspace(0, 1, 256), method="nearest"))
            self.edges.append((values[1:] / 2 + values[:-1] / 2).astype(np.float32))
        bins, y = self.bins(X), y.astype(np.int64)
        trees = parallel(lambda tree: self.grow(bins, y, np.random.default_rng([self.seed, tree])), range(self.n_trees), self.workers, "growing trees")
        self.roots = np.cumsum([0] + [len(tree[0]) for tree in trees])[:-1]
        self.feature, self.threshold, self.child, self.value, gain = (np.concatenate(part) for part in zip(*trees))
        self.child += np.repeat(self.roots, [len(tree[0]) for tree in trees])
        self.importance = np.bincount(self.feature, gain, X.shape[1]) / max(gain.sum(), 1e-12)
        return self

    def bins(self, X):
        return np.stack([np.searchsorted(edges, column).astype(np.uint8) for edges, column in zip(self.edges, X.T)])      # (features, n)

    def grow(self, bins, y, rng):
        """One tree's nodes: feature, threshold (bins above it go right), left child (the right one is the next), value, gain."""
        n_features, n = bins.shape
        rows, slots, flat = rng.permutation(n)[:n - n // 2], max(1, round(n_features ** 0.5)), bins.ravel()
        node, m, first, levels = np.zeros(len(rows), np.int64), 1, 0, []
        for depth in range(self.max_depth + 1):
            order = node.argsort(kind="stable")                       # the rows of a node stand together
            rows, node = rows[order], node[order]
            start, own = np.searchsorted(node, np.arange(m)), np.arange(m)
            n_all, n_one = np.diff(start, append=len(rows)), np.add.reduceat(y[rows], start)
            drawn = rng.random((m, n_features)).argpartition(slots - 1, axis=1)[:, :slots].T                             # (slots, m)
            key = flat.take((drawn * n)[:, node] + rows).astype(np.uint32) << np.uint32(1) | (node << 9 | y[rows]).astype(np.uint32)
            key.sort(axis=1)                                          # (slots, rows): by node, then bin
            left = (np.arange(1, len(rows) + 1) - start[node]).astype(np.float32)
            right = n_all[node].astype(np.float32) - left
            ones = (np.cumsum(key & 1, axis=1, dtype=np.int32) - (np.cumsum(n_one) - n_one)[node].astype(np.int32)).astype(np.float32)
            score = ones ** 2 * (1 / left) + (n_one[node].astype(np.float32) - ones) ** 2 * (1 / np.maximum(right, 1))
            key >>= np.uint32(1)
            score[:, :-1][key[:, 1:] == key[:, :-1]] = -1             # equal values cannot be parted
            score[:, np.minimum(left, right) < self.min_leaf] = -1
            best = np.maximum.reduceat(score, start, axis=1)          # (slots, m)
            slot, best = best.argmax(0), best.max(0)
            gain = best - n_one.astype(np.float32) ** 2 / n_all
            split = (best >= 0) & (gain > 1e-4) & (depth < self.max_depth)
            at = np.flatnonzero(score[slot[node], np.arange(len(node))] == best[node])
            at = at[np.searchsorted(at, start)]
            feature, threshold = np.where(split, drawn[slot, own], 0), np.where(split, key[slot, at] & 255, 255)
            child = np.where(split, first + m + 2 * (np.cumsum(split) - 1), first + own)                               # a leaf leads to itself
            levels.append((feature, threshold, child, n_one / n_all, np.where(split, gain, 0)))
            if not split.any():
                break
            rows, node = rows[split[node]], node[split[node]]
            node = child[node] - first - m + (flat.take(feature[node] * n + rows) > threshold[node])
            first, m = first + m, 2 * int(split.sum())
        return [np.concatenate(part) for part in zip(*levels)]

    def predict_proba(self, X):
        X, table, value = np.asarray(X, np.float32), self.child << 24 | self.feature << 8 | self.threshold, self.value.astype(np.float32)

        def predict(chunk):
            bins, total = np.ascontiguousarray(self.bins(chunk).T).ravel(), np.zeros(len(chunk))
            base = np.arange(len(chunk)) * X.shape[1]
            for root in self.roots:
                node = np.full(len(chunk), root)
                for _ in range(self.max_depth):
                    entry = table.take(node)
                    node = (entry >> 24) + (bins.take(base + (entry >> 8 & 65535)) > (entry & 255))
                total += value.take(node)
            return total / len(self.roots)

        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            return np.concatenate([np.zeros(0), *pool.map(predict, (X[i:i + 2048] for i in range(0, len(X), 2048)))])

    def save(self, path, **more):
        """Writes the forest, and what else is to be known of it, as plain arrays."""
        with open(path, "wb") as file:
            np.savez_compressed(file, edges=np.concatenate(self.edges), n_edges=list(map(len, self.edges)), **{part: getattr(self, part) for part in self.PARTS}, **more)

    @classmethod
    def load(cls, path):
        """(forest, the arrays of its file)."""
        try:
            forest, arrays = cls(), dict(np.load(path, allow_pickle=False))
            forest.edges = np.split(arrays["edges"], np.cumsum(arrays["n_edges"])[:-1])
            vars(forest).update({part: arrays[part] for part in cls.PARTS})
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist; make that dataset with --labels first") from None
        except (ValueError, KeyError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a forest ({error}); make it anew with --labels") from None
        return forest, arrays


def area_under_curve(y, p):
    """ROC AUC: how often a row of y = 1 has the larger p than one of y = 0, ties counting half."""
    _, place, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks, n_one = (np.cumsum(counts) - (counts - 1) / 2)[place], int(y.sum())
    return float((ranks[y == 1].sum() - n_one * (n_one + 1) / 2) / (n_one * (len(y) - n_one))) if 0 < n_one < len(y) else math.nan


def learn_value(tasks, options):
    """(forest, report) from --labels: JSON Lines with `score` from 0 to 5 and `text`, or `id` of one of the documents of the input."""
    drop, texts, good = Counter(), [], []
    for record in read_jsonl(options.labels):
        score, has_text = record.get("score"), isinstance(record.get("text"), str)
        if not isinstance(score, (int, float)) or not 0 <= score <= 5 or not has_text and "id" not in record:
            drop["no score from 0 to 5" if has_text or "id" in record else "neither text nor id"] += 1
        else:
            texts.append(record["text"] if has_text else (record["id"],))
            good.append(int(score >= options.good_from))
    wanted = {text[0] for text in texts if isinstance(text, tuple)}
    read = lambda task: {d["id"]: d["text"] for d in read_documents(task, Counter()) if d["id"] in wanted}
    found = {k: v for part in parallel(read, tasks if wanted else [], options.workers, "finding labelled documents") for k, v in part.items()}
    pairs = [(found.get(text[0]) if isinstance(text, tuple) else text, one) for text, one in zip(texts, good)]
    drop["id not in the input"] = sum(text is None for text, _ in pairs)
    X = np.array(parallel(lambda text: features(text), [t for t, _ in pairs if t is not None], options.workers, "reading labels"), np.float32)
    y = np.array([one for text, one in pairs if text is not None], int)
    if len(y) < 20 or not 5 <= y.sum() <= len(y) - 5:
        raise ValueError(f"--labels {options.labels}: {y.sum()} of {len(y)} usable labels have a score of {options.good_from} or more ({dict(drop)}); "
                         "give at least 5 of either side and 20 in all, or change --good-from")
    fold, p = np.random.default_rng(options.seed).permutation(len(y)) % 5, np.zeros(len(y))
    for k in range(5):                                                # each row is judged by a forest that has not seen it
        p[fold == k] = RandomForest(seed=options.seed, workers=options.workers).fit(X[fold != k], y[fold != k]).predict_proba(X[fold == k])
    forest, tenth = RandomForest(seed=options.seed, workers=options.workers).fit(X, y), np.minimum((p * 10).astype(int), 9)
    report = {"labels": len(y), "good": int(y.sum()), "left out": dict(+drop), "auc": area_under_curve(y, p), "brier": float(((p - y) ** 2).mean()),
              "calibration": [[k / 10 + 0.05, round(float(y[tenth == k].mean()), 3), int((tenth == k).sum())] for k in range(10) if (tenth == k).any()],
              "features": {FEATURES[i]: round(float(forest.importance[i]), 4) for i in (-forest.importance).argsort()[:10]}}
    print("educational value: {labels} labels, {good} good; AUC {auc:.3f}, Brier {brier:.3f}, 5-fold cross-validated".format(**report)
          + "".join(f"; {v} left out: {k}" for k, v in report["left out"].items())
          + "\n  predicted -> observed: " + ", ".join("{:.2f} -> {:.2f} ({})".format(*row) for row in report["calibration"])
          + "\n  features: " + ", ".join(f"{name} {share:.3f}" for name, share in report["features"].items()))
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


def count_pretokens(texts, pattern, workers=1):
    """Counter of the pieces that `pattern` splits the texts into."""
    beyond = re.compile("[\U00010000-\U0010ffff]")
    plain, full = (stdlib_pattern(pattern, limit).findall for limit in (0x10000, 0x110000))

    def count(batch):
        counts = Counter()
        for text in batch:
            # emoji are symbols to both patterns; only letters, marks, numbers beyond 0xFFFF need the slow one
            high = set() if text.isascii() else set(beyond.findall(text))
            counts.update((full if any(unicodedata.category(c)[0] in "LMNZ" for c in high) else plain)(text))
        return counts

    size = sum(map(len, texts)) // (4 * workers) + 1
    return sum_counts(parallel(count, batches(texts, size, len), workers, "counting words"))


def sum_counts(parts):
    total = Counter()
    for part in parts:
        total.update(part)
    return total


def learn_merges(counts, n_merges):
    """BPE on words (str -> how often): the list of merged pairs (a, b); the i-th one makes token 256 + i.

    Each step merges the pair of highest count, the smallest (a, b) among equals, until none occurs twice. All words lie in one
    array of symbols with links to the next and previous one. A pair has a count and the positions it was seen at, which are
    checked when it is its turn; counts only fall once a pair's younger symbol is made, so a heap with outdated entries will
    do, and pairs rarer than `floor` are left out until nothing more frequent remains.
    """
    words = [word.encode() for word in counts]
    length = np.array(list(map(len, words)), np.int64)
    data = np.frombuffer(b"".join(words), np.uint8)
    n = len(data)
    symbol = np.append(data, 0).astype(np.int32)
    symbol[n] = -1                                                    # position n stands for "no neighbour"
    after, before = np.arange(1, n + 2, dtype=np.int32), np.arange(-1, n, dtype=np.int32)
    last = np.cumsum(length) - 1
    after[last], before[last - length + 1] = n, n
    weight = np.repeat(np.fromiter(counts.values(), np.int64, len(counts)), length)
    floor = max(2, int(weight.sum()) // (16 * max(1, n_merges)))
    merges, count, where, heap = [], {}, {}, []                       # count, where: key -> int, positions; key = a << 20 | b

    def group(keys, positions):
        """Yields each distinct key with the total weight of its positions, and those positions."""
        order = keys.argsort()
        keys, positions = keys[order], positions[order]
        start = np.flatnonzero(np.diff(keys, prepend=-1))
        totals, bounds = np.add.reduceat(weight[positions], start).tolist(), start.tolist() + [len(keys)]
        for key, total, i, j in zip(keys[start].tolist(), totals, bounds, bounds[1:]):
            yield key, total, positions[i:j]

    def add(key, total, positions):
        count[key], where[key] = total, positions
        heapq.heappush(heap, (-total << 40) | key)

    def index():                                                      # counts every pair of the words as they are now
        count.clear()
        where.clear()
        live = np.flatnonzero((symbol[:n] >= 0) & (symbol[after[:n]] >= 0)).astype(np.int32)
        if len(live):
            for key, total, positions in group(symbol[live].astype(np.int64) << 20 | symbol[after[live]], live):
                if total >= floor:
                    add(key, total, positions)

    index()
    progress = tqdm(total=n_merges, desc="merging", disable=None, leave=False)
    while len(merges) < n_merges:
        if not heap:
            if floor == 2:
                break
            floor = max(2, floor // 8)
            index()
            continue
        entry = heapq.heappop(heap)
        key, total = entry & (1 << 40) - 1, -(entry >> 40)
        if count[key] != total:                                       # it has fallen since it was put on the heap
            if count[key] >= floor:
                heapq.heappush(heap, (-count[key] << 40) | key)
            else:
                del count[key], where[key]
            continue
        del count[key]
        a, b, new = key >> 20, key & (1 << 20) - 1, 256 + len(merges)
        merges.append((a, b))
        progress.update()

        at = where.pop(key)                                           # where the pair still stands: `at` and `second`
        at = at[symbol[at] == a]
        second = after[at]
        both = symbol[second] == b
        at, second = at[both], second[both]
        if a == b:                                                    # in a run a a a only every other pair can merge
            at.sort()
            second = after[at]
            number = np.arange(len(at))
            first = np.maximum.accumulate(np.where(np.append(True, at[1:] != second[:-1]), number, 0))
            chosen = (number - first) % 2 == 0
            at, second = at[chosen], second[chosen]
        right = after[second]
        symbol[at], symbol[second] = new, -1
        after[at], before[right] = right, at

        # neighbours now: those on the left as symbol, those on the right as symbol + 2^20; (new, new) counts as right only
        left = before[at]
        left_symbol, right_symbol = symbol[left], symbol[right]
        has_left, has_right = (left_symbol >= 0) & (left_symbol != new), right_symbol >= 0
        side = np.concatenate([left_symbol[has_left], right_symbol[has_right] + (1 << 20)])
        if not len(side):
            continue
        for neighbour, total, positions in group(side, np.concatenate([left[has_left], at[has_right]])):
            if neighbour < 1 << 20:
                old, key = neighbour << 20 | a, neighbour << 20 | new
            else:
                neighbour -= 1 << 20
                old, key = b << 20 | (a if neighbour == new else neighbour), new << 20 | neighbour
            if old in count:
                count[old] -= total
            if total >= floor:
                add(key, total, positions)
    progress.close()
    return merges


def train_bpe(texts, vocab_size, pattern=None, workers=None):
    """A byte-level BPE of vocab_size tokens, the five special ones included (fewer where the texts run out of pairs)."""
    from model import PATTERN, SPECIAL
    n_merges = vocab_size - 256 - len(SPECIAL)
    if not 0 <= n_merges < 2**19:
        raise ValueError(f"a vocabulary of {vocab_size} tokens: give from {256 + len(SPECIAL)} (bytes and special tokens) to 500,000")
    return tokenizer_of(learn_merges(count_pretokens(list(texts), pattern or PATTERN, workers or n_cores()), n_merges), pattern or PATTERN)


def tokenizer_of(merges, pattern=None):
    from model import PATTERN, Tokenizer
    tokens = [bytes([i]) for i in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    return Tokenizer({token: i for i, token in enumerate(tokens)}, pattern or PATTERN)


# ---- the dataset directory ----

def encode(documents, tokenizer, dtype):
    """Documents -> (token ids, mask), each document followed by end-of-text; mask 0 on a problem's prompt, else 1. Prompt and completion are
    encoded apart, so no token spans the border."""
    from model import Tokenizer
    ids, mask, plain = [np.zeros(0, dtype)], [np.zeros(0, np.uint8)], getattr(tokenizer, "_bpe", None)
    if tokenizer.added or not hasattr(plain, "encode_to_numpy") or type(tokenizer).encode is not Tokenizer.encode:
        plain = None                                                  # else tiktoken needs no Python list between
    for document in documents:
        prompt = document.get("prompt_chars", 0)
        head, text = tokenizer.encode(document["text"][:prompt]) if prompt else [], document["text"][prompt:]
        tail = plain.encode_to_numpy(text, disallowed_special=()).astype(dtype) if plain else np.array(tokenizer.encode(text), dtype)
        ids += [np.array(head, dtype), tail, np.array([tokenizer.eot], dtype)]
        mask += [np.zeros(len(head), np.uint8), np.ones(len(tail) + 1, np.uint8)]
    return np.concatenate(ids), np.concatenate(mask)


def write_dataset(parts, tokenizer, path, meta, has_mask, also=lambda folder: None):
    """Writes the dataset directory `path` atomically: made beside it, then renamed. parts: {split: parts of Work}, each with `ids`, `mask`,
    `documents` and `bytes` under the split's name; also(folder) adds files. Returns the complete meta."""
    from model import write_atomically
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    meta = {"dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "tokenizer": tokenizer.fingerprint} | meta
    aside, old = (path.with_name(f".{path.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    try:
        aside.mkdir(parents=True)
        for split in ("train", "val"):
            documents, n_bytes = (sum(part(f"{split}_counts")[k] for part in parts) for k in (0, 1))
            meta[split] = {"documents": documents, "tokens": sum(len(part(f"{split}_ids")) for part in parts), "bytes": n_bytes}
            for name, what in ((f"{split}.bin", "ids"), (f"{split}.mask.bin", "mask"))[:1 + has_mask]:
                write_atomically(str(aside / name), lambda file: [file.write(np.ascontiguousarray(part(f"{split}_{what}")).data) for part in parts])
        tokenizer.save(str(aside))
        also(aside)
        write_atomically(str(aside / "meta.json"), lambda file: file.write(json.dumps(meta, indent=1).encode()))
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
    return meta


def open_dataset(path):
    """Opens a dataset directory: .train and .val (token ids, memory-mapped), .train_mask and .val_mask (uint8, or None), .meta."""
    path = Path(path)
    remake = f"make it with: python data.py --name {path.name} --out {path.parent} --input ..."
    try:
        meta = json.loads((path / "meta.json").read_text())
        dtype, counts = np.dtype(meta["dtype"]), {split: meta[split]["tokens"] for split in ("train", "val")}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not a dataset (no meta.json); {remake}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'meta.json'} is damaged ({error}); {remake}") from None

    def open_array(name, dtype, n):
        size = os.path.getsize(path / name) if (path / name).exists() else -1
        if size != n * dtype.itemsize:
            raise ValueError(f"{path / name} has {max(size, 0)} bytes where meta.json promises {n * dtype.itemsize}; {remake}")
        return np.memmap(path / name, dtype, "r") if n else np.zeros(0, dtype)

    dataset = SimpleNamespace(path=path, meta=meta)
    for split, n in counts.items():
        setattr(dataset, split, open_array(f"{split}.bin", dtype, n))
        masked = (path / "train.mask.bin").exists()
        setattr(dataset, f"{split}_mask", open_array(f"{split}.mask.bin", np.dtype(np.uint8), n) if masked else None)
    return dataset


# ---- the command ----

def split_files(files):
    """Parts of the work: lists of files of about a thirty-second of the input, at most 128 MB; large JSON Lines are cut into spans of lines."""
    sizes = [min(os.path.getsize(path), left) for path, _, left in files]
    size = min(max(sum(sizes) // 32, 1 << 18), 1 << 27)
    pieces = []
    for (path, name, left), n in zip(files, sizes):
        cuts = [*range(0, int(n), size)] if suffix_of(path) in RECORDS and not path.endswith(".gz") and n > 2 * size else [0]
        pieces += [((path, name, left, begin, end) if len(cuts) > 1 else (path, name, left), (min(end, n) - begin) + 1000)
                   for begin, end in zip(cuts, cuts[1:] + [n if left < math.inf else math.inf])]
    return [[piece for piece, _ in batch] for batch in batches(pieces, size, lambda piece: piece[1])]


class Funnel:
    """Documents and bytes that each stage lets through, why it drops others, and five examples of those, drawn by hash."""

    def __init__(self, states=()):
        self.out, self.size, self.why, self.examples = Counter(), Counter(), {}, {}
        for out, size, why, examples in states:
            self.out.update(out)
            self.size.update(size)
            for stage in why:
                self.why.setdefault(stage, Counter()).update(why[stage])
                self.examples[stage] = sorted([*self.examples.get(stage, []), *examples[stage]])[:5]

    def drop(self, stage, reason, document):
        self.why.setdefault(stage, Counter())[reason] += 1
        shown = [digest(document["text"]).hex(), str(document["id"]), reason, document["text"][:300]]
        self.examples[stage] = sorted([*self.examples.get(stage, []), shown])[:5]

    def keep(self, stage, document):
        self.out[stage] += 1
        self.size[stage] += document["bytes"]


def prepare(task, options, contamination, forest):
    """What the files of one part give: the documents that pass every rule that looks at one document alone, and what the global stages need."""
    kept, unread, funnel, languages, masked, hits = [], Counter(), Funnel(), Counter(), Counter(), []
    for file in task:
        before = os.stat(file[0]) if os.path.exists(file[0]) else None
        for document in itertools.islice(read_documents([file], unread, options.max_document_bytes), options.max_documents or None):
            funnel.keep("read", document)
            if options.language:
                spoken = "code" if "prompt_chars" in document or is_code(document) else language(document["text"], options.language_threshold)
                languages[spoken] += 1
                if options.language != ["any"] and spoken not in [*options.language, "code"]:
                    funnel.drop("language", spoken, document)
                    continue
            funnel.keep("language", document)
            if reason := quality_rule(document, options.rules):
                funnel.drop("rules", reason, document)
                continue
            if options.mask_personal == "all" or options.mask_personal == "web" and document.get("web"):
                for pattern, mask in PERSONAL if "prompt_chars" not in document else ():
                    document["text"], n = pattern.subn(mask, document["text"])
                    masked[mask.split('<')[-1].rstrip("'>")] += n
            funnel.keep("rules", document)
            kept.append({key: document[key] for key in ("text", "id", "source", "bytes", "prompt_chars") if key in document})
        after = os.stat(file[0]) if os.path.exists(file[0]) else None
        if before is None or after is None or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            unread["(changed while it was read)"] += 1
    if contamination:
        found = contamination.find([document["text"] for document in kept])
        for i, document in enumerate(kept):
            if hit := found.get(i) or contamination.find_functions(document["text"]):
                found[i], (name, text) = hit, contamination.problems[hit[1]]
                hits.append({"id": document["id"], "source": document["source"], "rule": hit[0], "evidence": hit[2], "problem": name,
                             "text": document["text"], "problem_text": text})
                funnel.drop("decontaminate", hit[0], document)
        kept = [document for i, document in enumerate(kept) if i not in found]
        for document in kept:
            funnel.keep("decontaminate", document)
    raws = [document["text"].encode() for document in kept]
    hashes = [digest(raw) for raw in raws]
    first8 = lambda items: np.array([int.from_bytes(item[:8], "big") for item in items], np.uint64)
    n_bands = options.dedup_bands if options.dedup_threshold < 1 else 0
    signatures = minhash([document["text"] for document in kept], n_bands * options.dedup_rows)
    value = forest.predict_proba(np.array([features(document["text"]) for document in kept])) if forest and kept else np.zeros(len(kept))
    return {"funnel": [funnel.out, funnel.size, funnel.why, funnel.examples], "unread": unread, "languages": languages, "masked": masked, "hits": hits, "ids": [str(document["id"]) for document in kept],
            "text": np.frombuffer(b"".join(raws), np.uint8), "size": np.array([len(raw) for raw in raws], np.int64),
            "prompt": np.array([document.get("prompt_chars", -1) for document in kept], np.int64), "digest": first8(hashes),
            "order": first8([digest(own + str(options.seed).encode()) for own in hashes]), "value": value.astype(np.float32), "signatures": signatures,
            "keys": np.concatenate([first8(hashes)[None], band_keys(signatures, n_bands)])}


def rows_of(parts, base, name, index):
    """Rows of an array that lies cut into parts: those with these global indices."""
    owner, chunks = np.searchsorted(base, index, side="right") - 1, []
    order = owner.argsort(kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1) if len(index) else ():
        chunks.append(np.asarray(parts[owner[group[0]]](name)[index[group] - base[owner[group[0]]]]))
    return np.concatenate(chunks)[order.argsort(kind="stable")] if chunks else np.zeros(0, np.int64)


def range_of(keys, n):
    """Which of n equal ranges of uint64 each key lies in."""
    return (keys >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)


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

    Documents that share the text, or one of the bands of the signature, are compared by the share of equal values; of each group connected by
    a similarity >= the threshold the best-scored stays, the longest and then the first among equals. A unit of work is one band's keys
    within one range of hashes; only pairs found similar are ever held together, 16 bytes each.
    """
    n_keys, n_ranges = (1 + options.dedup_bands if options.dedup_threshold < 1 else 1), 1 + int(base[-1]) // per_range

    def compare(unit):
        band, r = divmod(unit, n_ranges)
        found = [(keys[inside], inside + start) for keys, start in ((part("keys")[band], start) for part, start in zip(parts, base))
                 for inside in [np.flatnonzero(range_of(keys, n_ranges) == r)]]
        keys, index = (np.concatenate(column) for column in zip((np.zeros(0, np.uint64), np.zeros(0, np.int64)), *found))
        pairs = index[candidates(keys)]
        close = [np.zeros(0, bool)] + [(rows_of(parts, base, "signatures", left) == rows_of(parts, base, "signatures", right)).mean(1) >= options.dedup_threshold
                                       for left, right in (pairs[k:k + (1 << 15)].T for k in range(0, len(pairs), 1 << 15))]
        return {"pairs": pairs[np.concatenate(close)] if band else pairs}

    pairs = [part("pairs") for part in work.run("compared", n_keys * n_ranges, compare)]

    def group(_):
        nodes, label = components(np.concatenate(pairs))
        value, ends = rows_of(parts, base, "value", nodes), rows_of(parts, base, "size", nodes)
        order = np.lexsort((nodes, -ends, -value, label))
        first = np.append(True, np.diff(label[order]) != 0)[:len(order)]
        dropped = np.sort(nodes[order[~first]])
        same = np.unique(np.concatenate([np.zeros(0, np.int64)] + [pair[:, 1] for pair in pairs[:n_ranges]]))
        return {"dropped": dropped, "same": np.isin(dropped, same), "groups": Counter(np.bincount(label)[np.unique(label)].tolist())}

    part, = work.run("duplicates", 1, group)
    return part("dropped"), part("same"), part("groups")


def build(options):
    """Makes the dataset that the options (see main) describe, or finds it made; returns its directory."""
    from model import PATTERN, SPECIAL, Tokenizer
    start, path, tokenizer, missing = time.time(), Path(options.out) / options.name, None, Counter()
    options.workers, rank = options.workers or n_cores(), int(os.environ.get("RANK", 0))
    say = print if rank == 0 else lambda *text: None
    vocab_size = int(options.tokenizer[6:]) if re.fullmatch(r"train:\d+", options.tokenizer) else 0
    if options.tokenizer.startswith("train:") and not 261 <= vocab_size <= 500_000:
        raise ValueError(f"--tokenizer {options.tokenizer}: give train:N with N from 261 (bytes and five special tokens) to 500,000")
    tokenizer = None if vocab_size else Tokenizer.load(options.tokenizer)
    if (options.keep < 1 or options.min_score) and not options.labels and not options.classifier:
        raise ValueError("--keep and --min-score need a score: give --labels FILE (synth.py label writes one) or --classifier DATASET")
    forest, value = None, None
    if options.classifier and not options.labels:
        forest, arrays = RandomForest.load(Path(options.classifier) / "classifier.npz")
        if arrays["names"].tolist() != FEATURES:
            raise ValueError(f"--classifier {options.classifier} was trained on other features; make it anew with --labels")
    files = find_files(options.input, missing, options.seed, options.max_bytes, options.max_documents)
    others = [*(options.decontaminate or []), *filter(None, [options.labels, options.classifier and options.classifier + "/classifier.npz"])]
    states = [(name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file, name in [*((file, name) for file, name, _ in files), *((o, o) for o in others)]]
    made_by = {"options": {k: v for k, v in vars(options).items() if k not in ("workers", "out")},
               "inputs": digest(json.dumps([states, tokenizer and tokenizer.fingerprint])).hex()}

    def made():
        with contextlib.suppress(ValueError, OSError):                # damaged: replace it
            meta = open_dataset(path).meta
            return {k: meta.get(k) for k in made_by} == made_by

    if (path / "meta.json").exists():
        if made():
            say(f"{path}: already made by these options from these files, reused (delete it to make it anew)")
            return path
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not a dataset; choose another --name or --out")
    contamination = Contamination(options.decontaminate) if options.decontaminate else None
    tasks = split_files(files)
    if options.labels:
        forest, value = learn_value(tasks, options)

    folder = path.with_name(f".{path.name}.work-{digest(json.dumps(made_by)).hex()[:16]}")
    work = Work(folder, options.workers, rank, int(os.environ.get("WORLD_SIZE", 1)))
    parts = work.run("documents", len(tasks), lambda i: prepare(tasks[i], options, contamination, forest))
    seen, base = Funnel(part("funnel") for part in parts), np.cumsum([0] + [len(part("order")) for part in parts])
    unread, languages, masked = (sum_counts(part(name) for part in parts) for name in ("unread", "languages", "masked"))
    unread.update(missing)
    rows = [{"stage": "read", "documents_in": seen.out["read"] + sum(n for why, n in unread.items() if why[0] != "("), "bytes_in": sum(state[1] for state in states[:len(files)]),
             "documents_out": seen.out["read"], "bytes_out": seen.size["read"], "dropped": dict(unread)}]

    def stage(name, n, size, dropped):                                # what the stage before let out comes in here
        rows.append({"stage": name, "documents_in": rows[-1]["documents_out"], "bytes_in": rows[-1]["bytes_out"], "documents_out": n, "bytes_out": size,
                     "dropped": {k: v for k, v in sorted(dropped.items(), key=lambda item: -item[1]) if v}})

    for name in ["language"] * (options.language is not None) + ["rules"] + ["decontaminate"] * (contamination is not None):
        stage(name, seen.out[name], seen.size[name], seen.why.get(name, {}))

    dropped, same, groups = find_duplicates(work, parts, base, options)
    tests = []                                                        # of what is left: array(part) <= limit

    def alive(p, gone=dropped):
        mask = np.ones(base[p + 1] - base[p], bool)
        mask[gone[np.searchsorted(gone, base[p]):np.searchsorted(gone, base[p + 1])] - base[p]] = False
        for array, limit in tests:
            mask &= array(parts[p]) <= limit
        return mask

    def count(**more):
        pairs = [(int(mask.sum()), int(part("size")[mask].sum())) for p, part in enumerate(parts) for mask in [alive(p, **more)]]
        return [sum(column) for column in zip(*pairs)] or [0, 0]

    def texts(masks):                                                 # the first five documents in the final order
        found = sorted((int(o), p, i) for p, mask in enumerate(masks) for at in [np.flatnonzero(mask)] for o, i in
                       sorted(zip(parts[p]("order")[at].tolist(), at.tolist()))[:5])[:5]
        return [[parts[p]("ids")[i], bytes(parts[p]("text")[(end := int(parts[p]("size")[:i + 1].sum())) - int(parts[p]("size")[i]):end][:600]).decode(errors="replace")]
                for _, p, i in found]

    def limit(name, reason, array, n):                                # keeps the n documents of the least array(part)
        before, masks = count()[0], [alive(p) for p in range(len(parts))]
        tests.append((array, kth_smallest(lambda: (array(part)[mask] for part, mask in zip(parts, masks)), n)))
        stage(name, *count(), {reason: before - count()[0]})
        seen.examples[name] = [["", name_, reason, text] for name_, text in texts(mask & ~alive(p) for p, mask in enumerate(masks))]

    stage("exact duplicates", *count(gone=dropped[same]), {"same text": int(same.sum())})
    stage("near duplicates", *count(), {"similar text": int((~same).sum())})
    seen.examples["near duplicates"] = [["", name, "similar text", text] for name, text in texts(alive(p, dropped[same]) & ~alive(p) for p in range(len(parts)))]
    if forest and count()[0]:
        least = np.float32(options.min_score)
        n_good = min(math.ceil(options.keep * count()[0]), sum(int((part("value")[alive(p)] >= least).sum()) for p, part in enumerate(parts)))
        # the best first, equal ones by their hash
        limit("educational value", "low score", lambda part: (np.uint64(65535) - (part("value") * np.float32(65535)).astype(np.uint64) << np.uint64(48))
              | part("digest") >> np.uint64(16), n_good)
    if 0 < options.max_documents < count()[0]:
        limit("--max-documents", "more than asked for", lambda part: part("order"), options.max_documents)
    n, n_bytes = count()
    say(f"{'stage':<18}{'documents in':>13}{'out':>9}{'MB in':>9}{'MB out':>9}  dropped")
    for row in rows:
        say(f"{row['stage']:<18}{row['documents_in']:>13,}{row['documents_out']:>9,}{row['bytes_in'] / 1e6:>9.2f}"
            f"{row['bytes_out'] / 1e6:>9.2f}  {', '.join(f'{k} {v:,}' for k, v in row['dropped'].items() if v) or '-'}")
    if not n:
        shutil.rmtree(folder, ignore_errors=True)
        reasons = "; ".join(f"{reason}: {count}" for row in rows for reason, count in row["dropped"].items() if count)
        raise ValueError(f"--input {' '.join(options.input)}: no document is left ({reasons or 'nothing to read'}); "
                         "give more text, or keep everything readable with --rules none")

    # the split is by the hash of a document alone, so it never moves; at least one on either side
    hashes = lambda: (part("digest")[alive(p)] for p, part in enumerate(parts))
    has_mask = any((part("prompt")[alive(p)] >= 0).any() for p, part in enumerate(parts))
    n_val = min(max(sum(int((own < options.val_share * 2**64).sum()) for own in hashes()), 1), n - 1)
    highest, n_shards = kth_smallest(hashes, n_val) if n_val else np.uint64(0), min(max(32, n_bytes >> 27), 1 + n_bytes >> 16) + 1

    def shard(s):
        """Documents of a range of the shuffled order, in this order: those for training, those for validation."""
        found = []
        for p, part in enumerate(parts):
            order, size = part("order"), part("size")
            ends = np.cumsum(size)
            for i in np.flatnonzero(alive(p) & (range_of(order, n_shards) == s)):
                prompt = int(part("prompt")[i])
                found.append((int(order[i]), {"text": bytes(part("text")[ends[i] - size[i]:ends[i]]).decode(), "bytes": int(size[i]),
                                              "val": n_val > 0 and part("digest")[i] <= highest} | ({"prompt_chars": prompt} if prompt >= 0 else {})))
        documents = [document for _, document in sorted(found, key=lambda pair: pair[0])]
        if n == 1 and documents and not has_mask:                     # one document alone is cut: its last share is for validation
            text = documents[0]["text"]
            at = max(1, min(round(len(text) * (1 - options.val_share)), len(text) - 1))
            documents = [{"text": part, "bytes": len(part.encode()), "val": val} for part, val in ((text[:at], False), (text[at:], True)) if part]
        return [[document for document in documents if document["val"] == val] for val in (False, True)]

    if tokenizer is None:
        begun, n_counted = time.time(), min(n_shards, 1 + n_shards * (2 << 30) // n_bytes)         # of at most 2 GB: a range of hashes is a sample
        words = work.run("words", n_counted, lambda s: {"words": count_pretokens([document["text"] for document in shard(s)[0]], PATTERN)})
        merged = work.run("merges", 1, lambda _: {"merges": np.array(learn_merges(sum_counts(part("words") for part in words), vocab_size - 256 - len(SPECIAL)), int)})
        tokenizer = tokenizer_of(merged[0]("merges").reshape(-1, 2).tolist())
        say(f"tokenizer of {tokenizer.vocab_size:,} tokens trained in {time.time() - begun:.1f} s")
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32

    def tokens(s):
        made = {}
        for split, documents in zip(("train", "val"), shard(s)):
            made[f"{split}_ids"], made[f"{split}_mask"] = encode(documents, tokenizer, dtype)
            made[f"{split}_counts"] = [len(documents), sum(document["bytes"] for document in documents)]
        return made

    encoded = work.run("tokens", n_shards, tokens)
    if rank:                                                          # the first rank puts the parts together
        while not made():
            time.sleep(0.2)
        return path

    def also(folder):
        if forest:
            forest.save(folder / "classifier.npz", names=FEATURES)
        if contamination:
            write_jsonl(folder / "contaminated.jsonl", (hit for part in parts for hit in part("hits")))
        scores = sum((np.histogram(part("value"), 50, (0, 1))[0] for part in parts), np.zeros(50, int)).tolist() if forest else []
        lengths = sum((np.histogram(np.log2(part("size")[alive(p)] + 1), 24, (0, 24))[0] for p, part in enumerate(parts)), np.zeros(24, int)).tolist()
        seen.examples["kept"] = [["", name, "", text] for name, text in texts(alive(p) for p in range(len(parts)))]
        report = {"languages": dict(languages.most_common()), "personal data masked": dict(masked), "predicted score": {f"{i / 50:.2f}": k for i, k in enumerate(scores) if k},
                  "length in bytes": {f"{1 << i:,} and more": k for i, k in enumerate(lengths) if k},
                  "groups of duplicates, documents in each": dict(sorted(groups.items(), key=lambda item: int(item[0])))}
        (folder / "report.html").write_text(report_page(str(path), rows, report, value, seen.examples))

    more = {"classifier": value} if value else {}
    meta = write_dataset(encoded, tokenizer, path, {"funnel": rows} | more | made_by, has_mask, also)
    for other in path.parent.glob(f".{path.name}.work-*"):
        shutil.rmtree(other, ignore_errors=True)
    for split in ("train", "val"):
        print("{}: {documents:,} documents, {tokens:,} tokens, {bytes:,} bytes, {:.2f} bytes a token".format(
            path / f"{split}.bin", meta[split]["bytes"] / max(1, meta[split]["tokens"]), **meta[split]))
    short = " (no further pair occurs twice)" if meta["vocab_size"] < vocab_size else ""
    print(f"vocabulary {meta['vocab_size']}{short}, {time.time() - start:.1f} s; what was kept and dropped: {path / 'report.html'}")
    return path


def report_page(title, rows, groups, value, examples):
    """report.html as one string: every table of counts as bars, and the examples that each stage kept or dropped."""
    page = ["<!DOCTYPE html><meta charset=utf-8><style>body{font:14px sans-serif;max-width:60em;margin:2em auto}i{display:inline-block;background:#69c;"
            "height:.9em;margin-right:.5em}pre{background:#eee;white-space:pre-wrap;padding:.5em}</style>", f"<h1>{html.escape(title)}</h1>"]
    sources = {"pages (phi-3's sources)": 10**9, "deduplicated": 4 * 10**8, "in the language": 2 * 10**8, "score 0.5 or more": 2 * 10**7, "score 0.8 or more": 5 * 10**6}
    why = {f"{row['stage']}: {reason}": n for row in rows for reason, n in row["dropped"].items() if n}
    for heading, table in {"documents": {"in": rows[0]["documents_in"]} | {row["stage"]: row["documents_out"] for row in rows}, "bytes": {row["stage"]: row["bytes_out"]
                           for row in rows}, "the sources' own funnel": sources, "why documents were dropped": why, **groups}.items():
        if table:
            page += [f"<h2>{html.escape(heading)}</h2>"] + [f"<div><i style='width:{40 * n / max(1, *table.values()):.2f}em'></i>{html.escape(str(name))} {n:,}</div>"
                                                              for name, n in table.items()]
    if value:
        page.append(f"<h2>classifier</h2><pre>{html.escape(json.dumps(value, indent=1))}</pre>")
    for stage, shown in examples.items():
        page.append(f"<h2>examples: {html.escape(stage)}</h2>" + "".join(f"<p>{html.escape(f'{name} {reason}')}<pre>{html.escape(text)}</pre>" for _, name, reason, text in shown))
    return "\n".join(page)


def bench(options):
    """Prints what each stage does on --input on all cores, and its peers where they are installed (datasketch and rensa on one core)."""
    from model import PATTERN
    workers, drop, n_rows = options.workers or n_cores(), Counter(), 20_000
    files = find_files(options.input, drop, options.seed, options.max_bytes or 128_000_000)
    texts = [document["text"] for document in read_documents(files, drop)]
    raws, batch, some = [text.encode() for text in texts], list(batches(texts, 1 << 21, len)), []
    mb, n, left = sum(map(len, raws)) / 1e6, len(texts), 64e6
    for text in texts:
        some, left = (some + [text], left - len(text)) if len(text) < left else (some, 0)
    X = np.random.default_rng(0).normal(size=(2 * n_rows, 32)).astype(np.float32)
    y = (X[:, 0] * X[:, 1] + X[:, 2] + np.sin(3 * X[:, 3]) + np.random.default_rng(1).normal(size=2 * n_rows) > 0).astype(int)
    print(f"{n:,} documents, {mb:.1f} MB, {workers} processes")

    def show(stage, amount, unit, *runs):
        """runs: (name, the part of the amount that it does, function); ours first, then peers, which may be missing."""
        cells = []
        for name, share, function in runs:
            with contextlib.suppress(ImportError):
                begun, made = time.perf_counter(), function()
                seconds = time.perf_counter() - begun
                area = f", AUC {area_under_curve(y[n_rows:], made[:, 1] if made.ndim == 2 else made):.4f}" if isinstance(made, np.ndarray) else ""
                cells.append(f"{name} {seconds:.2f} s" + (f" = {amount * share / seconds:,.0f} {unit}/s" if unit else "") + area)
        print(f"{stage:<28}" + "; ".join(cells), flush=True)

    def over(function, items=batch):
        return lambda: parallel(function, items, workers, "measuring") and None

    def each(function):
        return over(lambda texts: [function(text) is None for text in texts])

    def grams(text):
        words = text.split()
        return [" ".join(words[i:i + 5]) for i in range(len(words) - 4)]

    def tokenizers(size):
        import tokenizers as peer
        other, bytes_only = peer.Tokenizer(peer.models.BPE()), peer.pre_tokenizers.ByteLevel(False, use_regex=False)
        other.pre_tokenizer = peer.pre_tokenizers.Sequence([peer.pre_tokenizers.Split(peer.Regex(PATTERN), "isolated"), bytes_only])
        other.train_from_iterator(some, peer.trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=bytes_only.alphabet()))

    show("hashing for equal texts", mb, "MB", ("ours", 1, over(lambda raws: len({digest(raw) for raw in raws}), list(batches(raws, 1 << 21, len)))),
         ("SHA-256, one core,", 1, lambda: [hashlib.sha256(raw).digest() for raw in raws] and None))
    show("MinHash, pairs", n, "documents", ("ours", 1, lambda: [candidates(key) for key in band_keys(np.concatenate(parallel(minhash, batch, workers, "hashing")), 14)]),
         ("datasketch", 0.02, lambda: [__import__("datasketch").MinHash(112).update_batch(map(str.encode, grams(text))) for text in texts[:n // 50]]),
         ("rensa", 0.02, lambda: [__import__("rensa").RMinHash(112, 0).update(grams(text)) for text in texts[:n // 50]]))
    show("Gopher's rules", n, "documents", ("ours", 1, each(gopher_rule)))
    show("code rules", n, "documents", ("ours", 1, each(lambda text: code_rule(text, "x.py"))))
    show("features", n, "documents", ("ours", 1, each(features)))
    ours, theirs = RandomForest(workers=workers), []
    show("forest, 20,000 x 32: fit", 1, "", ("ours", 1, lambda: ours.fit(X[:n_rows], y[:n_rows])), ("scikit-learn", 1, lambda: theirs.append(
        __import__("sklearn.ensemble").ensemble.RandomForestClassifier(100, n_jobs=workers).fit(X[:n_rows], y[:n_rows]))))
    show("  predict 20,000", 1, "", ("ours", 1, lambda: ours.predict_proba(X[n_rows:])), *[("scikit-learn", 1, lambda: theirs[0].predict_proba(X[n_rows:]))][:len(theirs)])
    if options.decontaminate:
        contamination = Contamination(options.decontaminate)
        show("decontamination by words", n, "documents", ("ours", 1, over(contamination.find)))
        show("  and by syntax", n, "documents", ("ours", 1, each(contamination.find_functions)))
    for size in (8192, 32768):
        show(f"BPE of {size:,}, {sum(map(len, some)) / 1e6:.0f} MB", 1, "", ("ours", 1, lambda: train_bpe(some, size, workers=workers)), ("tokenizers", 1, lambda: tokenizers(size)))
    tokenizer = train_bpe(some[:500], 8192)
    show("text to token ids", mb, "MB", ("ours", 1, over(lambda texts: encode([{"text": text} for text in texts], tokenizer, np.uint16)[0].nbytes)),
         ("tiktoken's batch call", 0.25, lambda: tokenizer.encode_batch(texts[:n // 4]) and None))


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
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            try:
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
    parser = Parser(prog="data.py", description=__doc__)
    option = parser.option
    option("--input", ["python"], "directories, text or code files, .jsonl, .wet, .parquet, each also .gz, http(s) URLs; `python`: this machine's own "
           "source", nargs="+", metavar="PATH")
    option("--name", "web", "name of the dataset", type=folder_name)
    option("--out", "data", "folder of the datasets", metavar="FOLDER")
    option("--tokenizer", "train:1024", "train:N makes a BPE of N tokens; or a directory, a tokenizer.json, gpt2, cl100k_base, o200k_base, bytes", metavar="SPEC")
    option("--language", None, "tell languages apart and keep code and these, such as en de; any: only count them", nargs="+", metavar="CODE")
    option("--language-threshold", 0.08, "least share of a language's frequent words", type=number(float, 0, 1), metavar="SHARE")
    option("--rules", "auto", "quality rules; auto tells code from prose and leaves problems alone", choices=["auto", "code", "prose", "none"])
    option("--mask-personal", "web", "put <EMAIL>, <IP>, <KEY> for addresses, keys and tokens in pages of a crawl, or in all documents", choices=["web", "all", "none"])
    option("--decontaminate", None, "problems or texts that must not be learned: documents that contain one are dropped, and written out with "
           "it to contaminated.jsonl", nargs="+", metavar="FILE")
    option("--dedup-threshold", 0.8, "Jaccard similarity of word 5-grams from which documents are near duplicates; 1: only equal "
           "texts go, as is right for exercises, which resemble each other", type=number(float, 0, 1), metavar="SHARE")
    option("--dedup-bands", 14, "bands of a MinHash signature, any of which makes two documents candidates", type=number(int, 1, 256), metavar="N")
    option("--dedup-rows", 8, "values in a band", type=number(int, 1, 64), metavar="N")
    option("--labels", None, "JSON Lines with `score` 0 to 5 and `text`, or `id` of documents of the input: a random forest learns from "
           "them what is worth keeping, and is kept beside the dataset", metavar="FILE")
    option("--good-from", 3.0, "labels of at least this score are good", type=number(float, 0, 5), metavar="SCORE")
    option("--classifier", None, "use the forest of this dataset instead of --labels", metavar="DATASET")
    option("--keep", 1.0, "share of the documents to keep, the best-scored", type=number(float, 0, 1), metavar="SHARE")
    option("--min-score", 0.0, "least predicted probability of being good", type=number(float, 0, 1), metavar="P")
    option("--max-bytes", 0, "read a sample of about so many bytes; 0: everything", type=number(int, 0), metavar="BYTES")
    option("--max-documents", 0, "keep at most so many documents; 0: all", type=number(int, 0), metavar="N")
    option("--max-document-bytes", 10_000_000, "longer documents are dropped", type=number(int, 1), metavar="BYTES")
    option("--val-share", 0.01, "share of the documents for validation, at least one", type=number(float, 0, 0.9), metavar="SHARE")
    option("--workers", 0, "processes; 0: one a core", type=number(int, 0), metavar="N")
    option("--seed", 0, "of the sample and of the documents' order", type=int)
    option("--bench", False, "measure every stage on --input, beside the peers that are installed, and write nothing", action="store_true")
    options = parser.parse_args(arguments)
    if options.bench:
        return bench(options)
    del options.bench
    return build(options)


if __name__ == "__main__":
    main()

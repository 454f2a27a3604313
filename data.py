"""Documents -> clean, deduplicated text -> tokens: `python data.py` makes data/web from this machine's own Python source.

    find_files -> read_documents -> quality_rule      on all cores, a batch of files at a time
               -> exact and near duplicates           MinHash in NumPy
               -> train_bpe -> write_dataset          data/NAME/{train.bin, val.bin, tokenizer.json, meta.json}

Every stage reports how many documents and bytes entered and left and why the rest was dropped: the funnel, printed and kept in
meta.json. The documents that survive the rules are held in memory: plan for about three times their bytes.
"""
import argparse
import ast
import concurrent.futures
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import sysconfig
import time
import unicodedata
import warnings
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

CODE = set(".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .jl .rb .sh .lua .swift .kt .cs .sql".split())
PROSE = set(".txt .md .rst .tex .text".split())
RECORDS = set(".jsonl .ndjson".split())


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


def find_files(paths, drop, seed=0, max_bytes=0, max_documents=0):
    """The files to read as (path, name, bytes to read at most), sorted by name, or a sample of about max_bytes in hash order.

    `python` among the paths stands for this interpreter's standard library and site-packages. Links to directories are not
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

    for root in paths:
        roots, wanted = [os.path.normpath(root)], CODE | PROSE | RECORDS
        if root == "python":
            roots, wanted = sorted({os.path.realpath(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")}), {".py"}
        elif not os.path.lexists(root):
            raise FileNotFoundError(f"--input {root}: no such file or directory (`python` names this machine's own source)")
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

    A .jsonl file holds one document a line, with `text`, or `prompt` and its `canonical_solution` or `completion`; any other
    file is one document. Whatever cannot be used is counted in `drop` by reason.
    """
    for path, name, allowance in files:
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                if suffix_of(path) not in RECORDS:
                    if document := clean({"text": file.read(max_document_bytes + 1), "id": name, "source": path}, drop, max_document_bytes):
                        yield document
                    continue
                for number, line in enumerate(lines(file, 8 * max_document_bytes, drop), 1):
                    document = from_record(line, {"id": f"{name}:{number}", "source": path}, drop)
                    if document and (document := clean(document, drop, max_document_bytes)):
                        yield document
                        allowance -= document["bytes"]
                        if allowance <= 0:
                            break
        except (EOFError, zlib.error, gzip.BadGzipFile):
            drop["damaged gzip"] += 1
        except OSError:
            drop["unreadable"] += 1


def lines(file, limit, drop):
    """The lines of a binary file; those longer than `limit` bytes are skipped without holding them in memory."""
    while line := file.readline(limit):
        if len(line) == limit and not line.endswith(b"\n"):
            drop["too large"] += 1
            while line and not line.endswith(b"\n"):
                line = file.readline(limit)
        elif line.strip():
            yield line


def from_record(line, defaults, drop):
    """A line of JSON -> document, or None. A problem's prompt ends before its last newline, so that newline and indentation, which
    are one token, belong to the completion."""
    try:
        record = json.loads(line)
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


# ---- quality rules ----

GENERATED = re.compile(r"auto-?(?:matically)?[ -]?generated|@generated|do not (?:edit|modify)", re.I)
LEXEME = re.compile(r"""(\#[^\n]*|[rbuf]{0,2}\"{3}[\s\S]*?\"{3}|[rbuf]{0,2}'{3}[\s\S]*?'{3})  # comments, documentation
                      |([rbuf]{0,2}"[^"\\\n]*(?:\\.[^"\\\n]*)*"|[rbuf]{0,2}'[^'\\\n]*(?:\\.[^'\\\n]*)*'|\b\d[\w.]*)
                      |([^\W\d]\w*)""", re.X | re.I | re.S)
CODE_LINE = re.compile(r"\s*(?:(?:def|class|import|from|return|if|for|while|else|elif|try|function|var|const|let|int|void|fn"
                       r"|#include)\b|[\w.\[\]]+ [-+*/]?= |//|[{}@])|.*[;{})]\s*$")
TEST_PATH = re.compile(r"(?:^|/)(?:tests?|testing|idle_test)/|(?:^|/)(?:test_[^/]*|[^/]*_tests?|conftest)\.py$")
ALNUM = bytes(i for i in range(256) if i >= 128 or chr(i).isalnum())
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                           # old escapes in strings are not our business
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "does not parse"


def prose_rule(text):
    """Why a page of prose is poor, or None: Gopher's quality rules (arXiv 2112.11446, table A1) and its repeated lines."""
    words, rows = text.split(), [row.strip() for row in text.splitlines() if row.strip()]
    n = len(words)
    if n < 50:
        return "fewer than 50 words"
    if not 3 <= sum(map(len, words)) / n <= 10:
        return "mean word length"
    if max(text.count("#"), text.count("…") + text.count("...")) > 0.1 * n:
        return "symbols"
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * n:
        return "few words with letters"
    if len(STOP_WORDS.intersection(map(str.lower, words))) < 2:
        return "no stop words"
    if len(rows) - len(set(rows)) > 0.3 * len(rows):
        return "repeated lines"
    if sum(row.startswith(("-", "*", "•")) for row in rows) > 0.9 * len(rows):
        return "bullet list"
    return "generated" if GENERATED.search(text[:500]) else None


def quality_rule(document, rules):
    """The reason to drop a document, or None. `auto` leaves problems (which have a prompt) alone, and tells code from prose by
    the suffix of the id, or by its lines where there is none: Gopher's thresholds would destroy code."""
    text, name = document["text"], str(document.get("path") or document["id"])
    if rules == "none" or rules == "auto" and "prompt_chars" in document:
        return None
    if rules == "auto":
        rows = [row for row in text[:20000].splitlines() if row.strip()]
        looks_like_code = sum(bool(CODE_LINE.match(row)) for row in rows) > 0.4 * len(rows)
        rules = "code" if suffix_of(name) in CODE or suffix_of(name) not in PROSE and looks_like_code else "prose"
    return code_rule(text, name) if rules == "code" else prose_rule(text)


# ---- deduplication ----

N_BANDS, N_ROWS, N_GRAM = 14, 8, 5


def mix(x):
    """A bijection of uint64 that spreads every input bit over the output (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def minhash(texts):
    """MinHash signatures of word 5-grams, uint32 (documents, 112).

    All texts are hashed as one buffer: with H the running sum of c_t B^t (mod 2^64), the word in [i, j) has the hash
    (H[j] - H[i]) B^-i, whatever its position. Words are runs of letters, digits and non-ASCII bytes.
    """
    raws = [text.encode() for text in texts]
    data = np.frombuffer(b"\n".join(raws) + b"\n", np.uint8)
    is_word = np.isin(np.arange(256), np.frombuffer(ALNUM, np.uint8))[data]
    edges = np.flatnonzero(np.diff(is_word, prepend=False))
    begin, end = edges[::2], edges[1::2]
    base = 0x9E3779B97F4A7C15                                         # odd, so it has an inverse modulo 2^64
    powers = np.cumprod(np.full(len(data), base, np.uint64))
    inverse = np.cumprod(np.full(len(data), pow(base, -1, 2**64), np.uint64))
    running = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data + np.uint64(1)) * powers, out=running[1:])
    words = mix((running[end] - running[begin]) * inverse[begin])     # (words,)
    bounds = np.searchsorted(begin, np.cumsum([0] + [len(raw) + 1 for raw in raws]))
    grams = np.zeros(len(words), np.uint64)
    for i in range(N_GRAM):                                           # grams[k] stands for words k ... k + 4
        grams[:max(0, len(words) - i)] += words[i:] * np.uint64(2 * 0x2545F4914F6CDD1D * (i + 1) + 1 & 2**64 - 1)
    grams = (mix(grams) >> np.uint64(32)).astype(np.uint32)
    random = np.random.default_rng(0)                                 # the permutations x -> scale x + shift mod 2^32
    scale = random.integers(0, 2**31, (N_BANDS * N_ROWS, 1), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    shift = random.integers(0, 2**32, (N_BANDS * N_ROWS, 1), dtype=np.uint32)
    signatures = np.empty((len(texts), N_BANDS * N_ROWS), np.uint32)
    for i, raw in enumerate(raws):
        first, last = bounds[i], bounds[i + 1]
        own = grams[first:last - N_GRAM + 1] if last - first >= N_GRAM else np.frombuffer(digest(raw), np.uint32)[:1]
        signatures[i] = 0xFFFFFFFF                                    # (a text too short for a gram resembles only itself)
        for k in range(0, len(own), 1024):                            # (112, 1024) stays in the processor's cache
            np.minimum(signatures[i], (own[None, k:k + 1024] * scale + shift).min(1), out=signatures[i])
    return signatures


def near_duplicates(documents, threshold, workers):
    """Indices of documents to drop: of each group connected by an estimated Jaccard similarity >= threshold the longest stays.

    Candidates share one of 14 bands of 8 rows; within a band's bucket each document is compared with its neighbour and with
    the first, so a bucket of n costs 2n comparisons and not n^2.
    """
    texts = [document["text"] for document in documents]
    parts = parallel(minhash, batches(texts, 1 << 20, len), workers, "hashing")
    signatures = np.concatenate(parts) if parts else np.empty((0, N_BANDS * N_ROWS), np.uint32)
    candidates = []
    for band in range(N_BANDS):
        keys = functools.reduce(lambda key, column: mix(key + column + np.uint64(1)),
                                signatures[:, band * N_ROWS:(band + 1) * N_ROWS].T, np.zeros(len(signatures), np.uint64))
        order = keys.argsort(kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        bucket = np.maximum.accumulate(np.where(np.append(False, same), 0, np.arange(len(order))))
        candidates += [np.stack([other[same], order[1:][same]], 1) for other in (order[:-1], order[bucket[1:]])]
    pairs = np.unique(np.concatenate(candidates), axis=0)
    parent = list(range(len(documents)))

    def find(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for k in range(0, len(pairs), 4096):
        left, right = pairs[k:k + 4096].T
        close = (signatures[left] == signatures[right]).mean(1) >= threshold
        for i, j in zip(left[close].tolist(), right[close].tolist()):
            parent[find(i)] = find(j)
    longest_last = sorted(range(len(documents)), key=lambda i: (documents[i]["bytes"], -i))
    return set(longest_last) - set({find(i): i for i in longest_last}.values())


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
    from model import PATTERN, SPECIAL, Tokenizer
    pattern = pattern or PATTERN
    n_merges = vocab_size - 256 - len(SPECIAL)
    if not 0 <= n_merges < 2**19:
        raise ValueError(f"a vocabulary of {vocab_size} tokens: give from {256 + len(SPECIAL)} (bytes and special tokens) to 500,000")
    tokens = [bytes([i]) for i in range(256)]
    for a, b in learn_merges(count_pretokens(list(texts), pattern, workers or n_cores()), n_merges):
        tokens.append(tokens[a] + tokens[b])
    return Tokenizer({token: i for i, token in enumerate(tokens)}, pattern)


# ---- the dataset directory ----

def encode(documents, tokenizer, dtype):
    """Documents -> (token ids, mask), each document followed by end-of-text; mask 0 on a problem's prompt, else 1, or None if no
    document has a prompt. Prompt and completion are encoded apart, so no token spans the border."""
    ids, mask = [], []
    for document in documents:
        prompt = document.get("prompt_chars", 0)
        head, tail = tokenizer.encode(document["text"][:prompt]), tokenizer.encode(document["text"][prompt:])
        ids += [np.array(head + tail + [tokenizer.eot], dtype)]
        mask += [np.arange(len(ids[-1])) >= len(head)]
    has_prompt = any("prompt_chars" in document for document in documents)
    return np.concatenate(ids), np.concatenate(mask).astype(np.uint8) if has_prompt else None


def split_documents(documents, val_share):
    """{train, val} by a hash of the document alone, so the split never moves. One document alone is cut: its last share is val."""
    if len(documents) == 1 and "prompt_chars" not in documents[0]:
        text = documents[0]["text"]
        at = max(1, min(round(len(text) * (1 - val_share)), len(text) - 1))
        parts = {"train": text[:at], "val": text[at:]}
        return {name: [documents[0] | {"text": part, "bytes": len(part.encode())}] if part else [] for name, part in parts.items()}
    ranked = sorted(documents, key=lambda document: document["digest"])
    n_val = sum(int.from_bytes(document["digest"][:8], "big") < val_share * 2**64 for document in ranked)
    n_val = min(max(n_val, 1), len(ranked) - 1)
    chosen = {document["digest"] for document in ranked[:n_val]}
    return {"train": [d for d in documents if d["digest"] not in chosen], "val": [d for d in documents if d["digest"] in chosen]}


def write_dataset(splits, tokenizer, path, meta, workers):
    """Writes the dataset directory `path` atomically: made beside it, then renamed. Returns the complete meta."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    meta = {"dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "tokenizer": tokenizer.fingerprint} | meta
    aside, old = (path.with_name(f".{path.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    has_mask = any("prompt_chars" in document for documents in splits.values() for document in documents)
    try:
        aside.mkdir(parents=True)
        for split, documents in splits.items():
            parts = parallel(lambda batch: encode(batch, tokenizer, dtype), batches(documents, 1 << 20, lambda d: d["bytes"]),
                             workers, f"encoding {split}")
            meta[split] = {"documents": len(documents), "tokens": sum(len(ids) for ids, _ in parts),
                           "bytes": sum(document["bytes"] for document in documents)}
            write_arrays(aside / f"{split}.bin", (ids for ids, _ in parts))
            if has_mask:
                write_arrays(aside / f"{split}.mask.bin", (np.ones(len(ids), np.uint8) if mask is None else mask
                                                           for ids, mask in parts))
        tokenizer.save(str(aside))
        with open(aside / "meta.json", "w") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
    return meta


def write_arrays(path, arrays):
    with open(path, "wb") as file:
        for array in arrays:
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


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

def gather(files, options):
    """Reads the files and applies the rules on all cores: (documents read, their bytes, those kept, why unread, why dropped)."""
    fields = ("text", "id", "source", "bytes", "prompt_chars")

    def work(batch):
        n, n_bytes, kept, unread, dropped = 0, 0, [], Counter(), Counter()
        for file in batch:
            documents = read_documents([file], unread, options.max_document_bytes)
            for document in itertools.islice(documents, options.max_documents or None):
                n, n_bytes = n + 1, n_bytes + document["bytes"]
                if reason := quality_rule(document, options.rules):
                    dropped[reason] += 1
                else:
                    kept.append({k: document[k] for k in fields if k in document} | {"digest": digest(document["text"])})
        return n, n_bytes, kept, unread, dropped

    parts = parallel(work, batches(files, 32, lambda file: 1), options.workers, "reading")
    n, n_bytes, kept, unread, dropped = zip(*parts) if parts else [()] * 5
    return sum(n), sum(n_bytes), list(itertools.chain(*kept)), sum_counts(unread), sum_counts(dropped)


def build(options):
    """Makes the dataset that the options (see main) describe, or finds it made; returns its directory."""
    start, path, tokenizer, drop = time.time(), Path(options.out) / options.name, None, Counter()
    options.workers = options.workers or n_cores()
    vocab_size = int(options.tokenizer[6:]) if re.fullmatch(r"train:\d+", options.tokenizer) else 0
    if options.tokenizer.startswith("train:") and not 261 <= vocab_size <= 500_000:
        raise ValueError(f"--tokenizer {options.tokenizer}: give train:N with N from 261 (bytes and five special tokens) to 500,000")
    if not vocab_size:
        from model import Tokenizer
        tokenizer = Tokenizer.load(options.tokenizer)
    files = find_files(options.input, drop, options.seed, options.max_bytes, options.max_documents)
    states = [(name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file, name, _ in files]
    made_by = {"options": {k: v for k, v in vars(options).items() if k not in ("workers", "out")},
               "inputs": digest(json.dumps([states, tokenizer and tokenizer.fingerprint])).hex()}
    if (path / "meta.json").exists():
        try:
            meta = open_dataset(path).meta
        except (ValueError, OSError):
            meta = {}                                                 # damaged: replace it
        if {k: meta.get(k) for k in made_by} == made_by:
            print(f"{path}: already made by these options from these files, reused (delete it to make it anew)")
            return path
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not a dataset; choose another --name or --out")

    n, n_bytes, documents, unread, dropped = gather(files, options)
    unread += drop
    funnel = [{"stage": "read", "documents_in": n + unread.total(), "bytes_in": sum(state[1] for state in states),
               "documents_out": n, "bytes_out": n_bytes, "dropped": dict(unread)}]
    print(f"{'stage':<18}{'documents in':>13}{'out':>9}{'MB in':>9}{'MB out':>9}  dropped")

    def stage(name, kept, dropped):                                   # what the stage before let out comes in here
        funnel.append({"stage": name, "documents_in": funnel[-1]["documents_out"], "bytes_in": funnel[-1]["bytes_out"],
                       "documents_out": len(kept), "bytes_out": sum(document["bytes"] for document in kept), "dropped": dict(dropped)})
        return kept

    stage("rules", documents, dropped)
    distinct = list({document["digest"]: document for document in reversed(documents)}.values())[::-1]
    documents = stage("exact duplicates", distinct, {"same text": len(documents) - len(distinct)})
    if options.dedup_threshold < 1:
        twins = near_duplicates(documents, options.dedup_threshold, options.workers)
        documents = stage("near duplicates", [d for i, d in enumerate(documents) if i not in twins], {"similar text": len(twins)})
    documents.sort(key=lambda document: digest(document["digest"] + str(options.seed).encode()))      # shuffled
    if 0 < options.max_documents < len(documents):
        extra = len(documents) - options.max_documents
        documents = stage("--max-documents", documents[:options.max_documents], {"more than asked for": extra})
    for row in funnel:
        row["dropped"] = {k: v for k, v in sorted(row["dropped"].items(), key=lambda item: -item[1]) if v}
        print(f"{row['stage']:<18}{row['documents_in']:>13,}{row['documents_out']:>9,}{row['bytes_in'] / 1e6:>9.2f}"
              f"{row['bytes_out'] / 1e6:>9.2f}  {', '.join(f'{k} {v:,}' for k, v in row['dropped'].items()) or '-'}")
    if not documents:
        reasons = "; ".join(f"{reason}: {count}" for row in funnel for reason, count in row["dropped"].items())
        raise ValueError(f"--input {' '.join(options.input)}: no document is left ({reasons or 'nothing to read'}); "
                         "give more text, or keep everything readable with --rules none")

    splits = split_documents(documents, options.val_share)
    if tokenizer is None:
        begun = time.time()
        tokenizer = train_bpe([document["text"] for document in splits["train"]], vocab_size, workers=options.workers)
        print(f"tokenizer of {tokenizer.vocab_size:,} tokens trained on {sum(d['bytes'] for d in splits['train']):,} bytes in {time.time() - begun:.1f} s")
    meta = write_dataset(splits, tokenizer, path, {"funnel": funnel} | made_by, options.workers)
    for split in splits:
        print("{}: {documents:,} documents, {tokens:,} tokens, {bytes:,} bytes, {:.2f} bytes a token".format(
            path / f"{split}.bin", meta[split]["bytes"] / max(1, meta[split]["tokens"]), **meta[split]))
    short = " (no further pair occurs twice)" if meta["vocab_size"] < vocab_size else ""
    print(f"vocabulary {meta['vocab_size']}{short}, {time.time() - start:.1f} s")
    return path


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


def main(arguments=None):
    """The command line; also for other scripts: main(["--name", "web"]) returns the dataset's directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def option(name, default, text, **more):
        parser.add_argument(name, default=default, help=f"{text} (default: {default})", **more)

    option("--input", ["python"], "directories, text or code files, .jsonl, each also .gz; `python`: this machine's own source",
           nargs="+", metavar="PATH")
    option("--name", "web", "name of the dataset", type=folder_name)
    option("--out", "data", "folder of the datasets", metavar="FOLDER")
    option("--tokenizer", "train:1024", "train:N makes a BPE of N tokens; or a directory, a tokenizer.json, gpt2, cl100k_base, "
           "o200k_base, bytes", metavar="SPEC")
    option("--rules", "auto", "quality rules; auto tells code from prose and leaves problems alone",
           choices=["auto", "code", "prose", "none"])
    option("--dedup-threshold", 0.8, "Jaccard similarity of word 5-grams from which documents are near duplicates; 1: only equal "
           "texts go, as is right for exercises, which resemble each other", type=number(float, 0, 1), metavar="SHARE")
    option("--max-bytes", 0, "read a sample of about so many bytes; 0: everything", type=number(int, 0), metavar="BYTES")
    option("--max-documents", 0, "keep at most so many documents; 0: all", type=number(int, 0), metavar="N")
    option("--max-document-bytes", 10_000_000, "longer documents are dropped", type=number(int, 1), metavar="BYTES")
    option("--val-share", 0.01, "share of the documents for validation, at least one", type=number(float, 0, 0.9), metavar="SHARE")
    option("--workers", 0, "processes; 0: one a core", type=number(int, 0), metavar="N")
    option("--seed", 0, "of the sample and of the documents' order", type=int)

    def refuse(message):
        raise ValueError(f"{message}; `python data.py -h` explains the options")

    parser.error = refuse                                             # one line, without the usage
    try:
        return build(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"data.py: {error}".replace("\n", " "), file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        print("data.py: stopped; no dataset was changed", file=sys.stderr)
        sys.exit(130)

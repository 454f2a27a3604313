"""Complete a prompt with a trained model, or solve programming problems with it and run their tests.

    python sample.py --run runs/phi --prompt 'def add(a, b):'
    python sample.py --run runs/phi --eval HumanEval.jsonl.gz
    python sample.py --eval HumanEval.jsonl.gz --solutions canonical    # no model: checks the file and the sandbox
"""
import argparse
import codecs
import json
import math
import os
import re
import signal
import statistics
import sys
import time

import torch
from tqdm import tqdm

import data
import model as models
import synth

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LINE_AT_MARGIN = re.compile(r"\n(?=[^\s])")  # where a function's body is over: the next line starts at column 0


def fail(message: str) -> None:
    print(f"sample.py: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message}; see python sample.py -h")


def options(arguments=None):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--run", default="runs/phi", help="run directory, Hugging Face directory of a phi, Llama or Gemma, or hub name such as microsoft/phi-1_5 (default %(default)s)")
    add("--prompt", default="-", help="text to complete, or - for standard input (default -)")
    add("--max-tokens", type=data.number(int, 1), default=256, help="new tokens at most (default %(default)s)")
    add("--temperature", type=data.number(float, 0), default=0.0, help="0 takes the likeliest token, 1 samples plainly (default 0)")
    add("--top-k", type=data.number(int, 0), default=0, help="sample among this many likeliest tokens, 0 for all (default 0)")
    add("--top-p", type=data.number(float, 1e-9, 1), default=1.0, help="sample among the fewest tokens holding this probability (default 1)")
    add("--seed", type=data.number(int, 0), default=0, help="of the sampling (default 0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, or auto for the best there is (default auto)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of the weights; auto is bf16 on CUDA, else fp32 (default auto)")
    add("--eval", metavar="FILE", help="solve the problems of this .jsonl or .jsonl.gz file in HumanEval's format")
    add("--solutions", choices=["model", "canonical"], default="model", help="whose solutions to judge (default model)")
    add("--samples", type=data.number(int, 1), default=1, help="completions a problem, for pass@k; above 1 needs a --temperature (default 1)")
    add("--limit", type=data.number(int, 1), help="take only this many problems from the file's start")
    add("--batch-size", type=data.number(int, 1), default=128, help="completions generated at once (default %(default)s)")
    add("--timeout", type=data.number(float, 0.1), default=5.0, help="seconds a problem's tests may take (default %(default)s)")
    add("--memory-mb", type=data.number(int, 64), default=512, help="megabytes a problem's tests may use (default %(default)s)")
    add("--show", type=data.number(int, 0), default=2, help="solved and failed examples to print, each (default %(default)s)")
    add("--out", metavar="FILE.jsonl", help="write every completion and verdict here (gzipped if it ends in .gz)")
    add("--json", metavar="FILE", help="write the summary here")
    args = parser.parse_args(arguments)
    if args.samples > 1 and (args.temperature == 0 or args.solutions == "canonical"):
        parser.error("--samples above 1 needs the model's solutions and a --temperature above 0, such as 0.8")
    if not args.eval and (args.solutions == "canonical" or args.out or args.json or args.limit):
        parser.error("--solutions, --limit, --out and --json belong to --eval FILE")
    return args


def open_model(args):
    device = models.default_device() if args.device == "auto" else args.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}); try --device cpu") from None
    dtype = DTYPES.get(args.dtype) or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
    model, tokenizer = models.load(args.run, device, dtype)
    if tokenizer is None:
        raise ValueError(f"--run {args.run} has no tokenizer.json; copy the one its model was trained with into it")
    return model, tokenizer, tokenizer.stops


def complete(args) -> None:
    """Stream one completion to standard output. Trailing whitespace of the prompt is dropped: a line break and the indentation
    after it are one token, so a prompt that ends between them would have to be continued by a token never seen there."""
    model, tokenizer, stop = open_model(args)
    if args.prompt == "-" and sys.stdin.isatty():
        print("Type a prompt and end it with Ctrl-D.", file=sys.stderr)
    prompt = (sys.stdin.read() if args.prompt == "-" else args.prompt).rstrip()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over tokens

    def stream(_, token):
        if token not in stop:
            print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    start = time.perf_counter()
    (new,) = model.generate([tokenizer.bos + tokenizer.encode(prompt) or [tokenizer.eot]], args.max_tokens, args.temperature, args.top_k, args.top_p,
                            stop, args.seed, stream)
    print(decoder.decode(b"", final=True), flush=True)
    print(f"{len(new)} tokens, {len(new) / (time.perf_counter() - start):,.0f} a second", file=sys.stderr)


def cut(completion: str) -> str:
    """The completion up to the first later line that starts at column 0. Example: cut("\\n    return 1\\n\\nprint(2)") == "\\n    return 1\\n" """
    end = LINE_AT_MARGIN.search(completion)
    return completion[:end.start()] if end else completion


def solve(args, problems: list[dict]) -> list[list[str | None]]:
    """`--samples` completions of each problem's prompt; None where the prompt does not fit the context."""
    model, tokenizer, stop = open_model(args)
    prompts = [tokenizer.bos + tokenizer.encode(problem["prompt"].rstrip()) or [tokenizer.eot] for problem in problems]
    completions = [[None] * args.samples for _ in problems]
    jobs = [(i, n) for i in range(len(problems)) for n in range(args.samples) if len(prompts[i]) < model.config.context]
    jobs.sort(key=lambda job: -len(prompts[job[0]]))  # equal lengths together waste least, and a lack of memory shows at once
    started, tokens = time.perf_counter(), 0
    with tqdm(total=len(jobs), desc="solving", unit="completion", disable=None) as progress:
        for begin in range(0, len(jobs), args.batch_size):
            batch = jobs[begin:begin + args.batch_size]
            texts = [b""] * len(batch)

            def over(row, token):  # ends a row once its function is complete
                texts[row] += b"" if token in stop else tokenizer.decode_bytes([token])
                return bool(re.search(rb"\n[^\s]", texts[row][-len(tokenizer.decode_bytes([token])) - 1:]))
            new = model.generate([prompts[i] for i, _ in batch], args.max_tokens, args.temperature, args.top_k, args.top_p, stop,
                                 args.seed + begin, over)
            tokens += sum(map(len, new))
            for (i, n), text in zip(batch, texts):
                completions[i][n] = cut(text.decode("utf-8", errors="replace"))
            progress.update(len(batch))
    seconds = time.perf_counter() - started
    print(f"{len(jobs):,} completions, {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)")
    return completions


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes (Codex, arXiv 2107.03374, equation 1). Example: pass_at_k(2, 1, 1) == 0.5"""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def score(passed: list[int], samples: int) -> dict:
    """Summary of problems of which `passed` samples each succeeded; standard errors are over problems."""
    result = {"passed": sum(passed), "total": len(passed) * samples, "problems": len(passed)}
    for k in (k for k in (1, 10, 100) if k <= samples):
        estimates = [pass_at_k(samples, n, k) for n in passed]
        error = statistics.stdev(estimates) / math.sqrt(len(estimates)) if len(estimates) > 1 else 0.0
        result |= {f"pass@{k}": statistics.fmean(estimates), "se" if k == 1 else f"se@{k}": error}
    return result


def read_problems(args) -> list[dict]:
    wanted = ["prompt", "entry_point", "test"] + ["canonical_solution"] * (args.solutions == "canonical")
    if not os.path.isfile(args.eval):
        raise FileNotFoundError(f"--eval {args.eval}: no such file; make problems with python synth.py exercises, or fetch HumanEval.jsonl.gz")
    problems = []
    for n, problem in enumerate(data.read_jsonl(args.eval), 1):
        if args.limit and n > args.limit:
            break
        lacking = [field for field in wanted if not isinstance(problem.get(field), str)]
        if lacking:
            raise ValueError(f"{args.eval}: record {n} lacks {', '.join(lacking)}; --eval reads HumanEval's format")
        problems.append({"task_id": f"record {n}", **problem})
    if not problems:
        raise ValueError(f"{args.eval} holds no problems; make some with python synth.py exercises")
    return problems


def evaluate(args) -> None:
    problems = read_problems(args)
    if args.solutions == "canonical":
        judged, completions = problems, [[problem["canonical_solution"]] for problem in problems]
    else:
        completions = solve(args, problems)
        judged = [{**problem, "prompt": problem["prompt"].rstrip()} for problem in problems]  # what the model was given
    fits = [(i, text) for i, texts in enumerate(completions) for text in texts if text is not None]
    verdicts = iter(synth.judge_all([(judged[i], text) for i, text in fits], timeout=args.timeout, memory_mb=args.memory_mb))
    too_long = "the prompt does not fit the context"
    rows = []
    for problem, texts in zip(judged, completions):
        for text in texts:
            passed, reason = (False, too_long) if text is None else ((verdict := next(verdicts)).passed, verdict.reason)
            rows.append({"task_id": problem["task_id"], **({"k": problem["k"]} if "k" in problem else {}), "prompt": problem["prompt"],
                         "completion": text, "passed": passed, "reason": reason})
    passed = [sum(row["passed"] for row in rows[i:i + args.samples]) for i in range(0, len(rows), args.samples)]
    summary = {"file": args.eval, "run": args.run if args.solutions == "model" else None, "samples": args.samples,
               "temperature": args.temperature, **score(passed, args.samples)}
    levels = sorted({str(problem["k"]) for problem in problems if "k" in problem}, key=lambda level: (len(level), level))  # 2 before 10
    summary["levels"] = {level: score([n for n, problem in zip(passed, problems) if str(problem.get("k")) == level], args.samples) for level in levels}
    if args.out:
        data.write_jsonl(args.out, rows)
    if args.json:
        models.write_atomically(args.json, lambda file: file.write((json.dumps(summary, indent=1) + "\n").encode()))

    for solved in (True, False):
        for row in [row for row in rows[::args.samples] if row["passed"] == solved and row["completion"] is not None][:args.show]:
            print(f"\n--- {row['task_id']}: {'solved' if solved else 'failed: ' + row['reason']}\n{row['prompt']}{row['completion']}")
    ks = [k for k in (1, 10, 100) if k <= args.samples]
    print(f"\n{'level':>5} {'problems':>9}" + "".join(f"{f'pass@{k} ± se':>18}" for k in ks))
    for level, result in [*summary["levels"].items(), ("all", summary)]:
        errors = [result["se" if k == 1 else f"se@{k}"] for k in ks]
        print(f"{level:>5} {result['problems']:>9,}" + "".join(f"{result[f'pass@{k}']:>10.1%} ± {e:5.1%}" for k, e in zip(ks, errors)))
    unfit = sum(texts[0] is None for texts in completions)
    if unfit:
        print(f"{unfit} of the problems count as failed because {too_long} of {args.run}")
    print(f"{summary['passed']:,} of {summary['total']:,} passed")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = options()
    try:
        evaluate(args) if args.eval else complete(args)
    except KeyboardInterrupt:
        print("\nsample.py: interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    except torch.OutOfMemoryError as error:
        fail(f"out of memory ({str(error).splitlines()[0]}); lower --batch-size, now {args.batch_size}, or --max-tokens")
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    main()

"""A teacher writes, labels, rewrites and judges; what it writes is verified, by running it in the sandbox below where it is code.

    python synth.py exercises --count 10000          # problems with solutions and tests, in HumanEval's fields
    python synth.py textbooks --count 10000          # pages: explanation, worked example, trace, common mistake
    python synth.py exercises --split test --k 2-6   # held-out compositions, never seen in training in any phrasing
    python synth.py label python --count 2000        # educational value 0 to 5 of documents, here this machine's Python source
    python synth.py textbooks --teacher https://api.example.com/v1#large=3 http://localhost:8000/v1#phi --max-usd 20 --price-in 1 --price-out 4
    (also: topics, rewrite FILE, chat, preferences FILE, sandbox)

The built-in teacher is a *template* teacher. It draws operations from the table below, chains k of them so that the types fit, phrases the chain as
a docstring and renders it as code in one of several styles; examples, tests and traces come from running that code. It knows only what stands in the
table: a model trained on it learns to compose these operations, not to program at large. What it is good for is a recipe that runs anywhere, offline
and in minutes, with exact control over what was and was not seen in training.

The split. Two hashes must agree before a problem belongs to a split: that of its *composition* (the operations in their order, constants and wording
ignored) and that of its *behaviour* (its outputs on fixed probe inputs). So no held-out composition occurs in training in any phrasing, not even as a
part of a longer chain, and no training problem behaves like a held-out one on the probes; both without a list of held-out problems, for any number
and any seed. Single operations (k = 1) are the vocabulary that compositions are made of: their composition counts as training's.

Surveys. A model that only ever saw chains of up to four steps learns that the fourth step is the last: it skips the middle of longer ones. So some
training exercises ask for several answers: two to four chains, each from the argument itself, side by side. None among them is longer than --k says,
and none is held out.
"""
import argparse
import ast
import builtins
import contextlib
import copy
import ctypes
import email.utils
import fcntl
import functools
import gc
import hashlib
import heapq
import inspect
import json
import marshal
import multiprocessing
import os
import random
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# The operations. Templates: {x} the value so far, {y} the new value, {v} an element, {c} a constant.


@dataclass(frozen=True)
class Op:
    name: str
    source: str               # type of {x}: ints, int, str, strs, dict
    target: str               # type of {y}
    phrases: tuple            # imperatives that say the same thing
    code: dict                # style -> statements that assign {y}; every style computes the same value
    constants: tuple = ("",)  # what {c} is drawn from
    family: str = "value"     # what kind of step this is, for the textbook's prose


SURVEYS = 0.5  # share of training exercises that ask for several answers, see the module's docstring
OPS = {}  # name -> Op


def op(name, types, code, *phrases, c=("",), family="value", **styles):
    """Declare an operation; `code` is an expression, or statements where it contains "{y} = "."""
    source, target = types.split(">")
    code = code if "{y} = " in code else "{y} = " + code
    assert name not in OPS, name
    OPS[name] = Op(name, source, target, phrases, {"plain": code, **styles}, tuple(c), family)


def keep(name, kind, test, *phrases, c=("",)):
    """A filter over the elements of a list, as comprehension, loop and helper function."""
    op(name, f"{kind}>{kind}", f"[{{v}} for {{v}} in {{x}} if {test}]", *phrases, c=c, family="filter",
       loop=f"{{y}} = []\nfor {{v}} in {{x}}:\n    if {test}:\n        {{y}}.append({{v}})",
       helper=f"def keep({{v}}):\n    return {test}\n\n{{y}} = [{{v}} for {{v}} in {{x}} if keep({{v}})]")


def each(name, types, value, *phrases, c=("",)):
    """A function of every element of a list, as comprehension, loop and helper function."""
    op(name, types, f"[{value} for {{v}} in {{x}}]", *phrases, c=c, family="map", loop=f"{{y}} = []\nfor {{v}} in {{x}}:\n    {{y}}.append({value})",
       helper=f"def change({{v}}):\n    return {value}\n\n{{y}} = [change({{v}}) for {{v}} in {{x}}]")


def fold(name, types, start, update, expression, *phrases, c=("",), family="fold"):
    """A list reduced to one value, as expression and as a loop that updates {y}."""
    op(name, types, expression, *phrases, c=c, family=family, loop=f"{{y}} = {start}\nfor {{v}} in {{x}}:\n    {update}")


def pick(name, types, value, empty, *phrases, c=("",)):
    """One value out of a list that may be empty; early return where it is the last step."""
    op(name, types, f"{value} if {{x}} else {empty}", *phrases, c=c, family="pick", early=f"if not {{x}}:\n    return {empty}\n{{y}} = {value}")


SMALL, DIGIT = range(2, 7), range(2, 10)
# lists of integers
keep("even", "ints", "{v} % 2 == 0", "keep only the even numbers", "drop the odd numbers")
keep("odd", "ints", "{v} % 2 == 1", "keep only the odd numbers", "drop the even numbers")
keep("above", "ints", "{v} > {c}", "keep only the numbers greater than {c}", "keep the numbers above {c}", c=range(0, 13))
keep("below", "ints", "{v} < {c}", "keep only the numbers less than {c}", "keep the numbers below {c}", c=range(3, 20))
keep("multiples", "ints", "{v} % {c} == 0", "keep only the multiples of {c}", "keep the numbers divisible by {c}", c=(3, 4, 5))
keep("not_multiples", "ints", "{v} % {c} != 0", "remove the multiples of {c}", "remove the numbers divisible by {c}", c=DIGIT)
keep("positive", "ints", "{v} > 0", "keep only the positive numbers", "drop zero and the negative numbers")
keep("negative", "ints", "{v} < 0", "keep only the negative numbers", "drop zero and the positive numbers")
keep("not_equal", "ints", "{v} != {c}", "remove every {c}", "drop all numbers equal to {c}", c=range(0, 10))
keep("near_zero", "ints", "abs({v}) <= {c}", "keep the numbers at most {c} away from zero", c=range(5, 16))
keep("two_digits", "ints", "9 < {v} < 100", "keep only the two-digit numbers", "keep the numbers from 10 to 99")
keep("prime", "ints", "{v} > 1 and all({v} % d for d in range(2, {v}))", "keep only the prime numbers", "keep the primes")
each("add", "ints>ints", "{v} + {c}", "add {c} to each number", "increase every number by {c}", c=range(1, 13))
each("subtract", "ints>ints", "{v} - {c}", "subtract {c} from each number", "decrease every number by {c}", c=range(1, 13))
each("times", "ints>ints", "{v} * {c}", "multiply each number by {c}", c=DIGIT)
each("square", "ints>ints", "{v} ** 2", "square each number", "replace each number by its square")
each("negate", "ints>ints", "-{v}", "negate each number", "flip the sign of each number")
each("absolute", "ints>ints", "abs({v})", "take the absolute value of each number", "drop the sign of each number")
each("modulo", "ints>ints", "{v} % {c}", "take each number modulo {c}", "replace each number by its remainder modulo {c}", c=DIGIT)
each("halve", "ints>ints", "{v} // {c}", "divide each number by {c}, rounding down", c=(2, 3, 4, 5))
each("cap", "ints>ints", "min({v}, {c})", "cap each number at {c}", "limit each number to at most {c}", c=range(5, 16))
each("raise", "ints>ints", "max({v}, {c})", "raise each number to at least {c}", c=range(0, 10))
each("digit_sums", "ints>ints", "sum(int(d) for d in str(abs({v})))", "replace each number by the sum of its digits",
     "take the digit sum of each number")
each("distance", "ints>ints", "abs({v} - {c})", "take the distance of each number to {c}", c=range(2, 13))
op("sort", "ints>ints", "sorted({x})", "sort the numbers in ascending order", "sort from smallest to largest", family="order")
op("sort_down", "ints>ints", "sorted({x}, reverse=True)", "sort the numbers in descending order", "sort from largest to smallest", family="order")
op("sort_abs", "ints>ints", "sorted({x}, key=abs)", "sort the numbers by absolute value", family="order")
op("sort_last_digit", "ints>ints", "sorted({x}, key=lambda v: abs(v) % 10)", "sort the numbers by their last digit", family="order")
op("flip", "ints>ints", "{x}[::-1]", "reverse the list", "put the list in reverse order", family="order")
op("unique", "ints>ints", "list(dict.fromkeys({x}))", "remove duplicates", "keep only the first of equal numbers", family="order",
   loop="{y} = []\nfor {v} in {x}:\n    if {v} not in {y}:\n        {y}.append({v})")
op("first", "ints>ints", "{x}[:{c}]", "take the first {c} numbers", "keep the first {c} numbers", c=SMALL, family="slice")
op("last", "ints>ints", "{x}[-{c}:]", "take the last {c} numbers", "keep the last {c} numbers", c=SMALL, family="slice")
op("skip", "ints>ints", "{x}[{c}:]", "skip the first {c} numbers", "drop the first {c} numbers", c=(1, 2, 3), family="slice")
op("drop_end", "ints>ints", "{x}[:-{c}]", "drop the last {c} numbers", "remove the last {c} numbers", c=(1, 2, 3), family="slice")
op("alternate", "ints>ints", "{x}[::2]", "keep every other number", "take every second number", family="slice")
op("rotate", "ints>ints", "{x}[{c}:] + {x}[:{c}]", "rotate the list left by {c}", "move the first {c} numbers to the end",
   c=(1, 2, 3), family="order")
op("mirror", "ints>ints", "{x} + {x}[::-1]", "append the reversed list", "extend the list with its reverse", family="order")
op("running_sum", "ints>ints", "{y} = [sum({x}[:i + 1]) for i in range(len({x}))]", "take the running sums",
   "replace each number by the sum up to it", family="scan", loop="{y} = []\ntotal = 0\nfor {v} in {x}:\n    total += {v}\n    {y}.append(total)")
op("running_max", "ints>ints", "[max({x}[:i + 1]) for i in range(len({x}))]", "take the running maximum",
   "replace each number by the largest so far", family="scan")
op("differences", "ints>ints", "[b - a for a, b in zip({x}, {x}[1:])]", "take the differences of neighbours",
   "subtract each number from the next one", family="scan")
op("neighbour_sums", "ints>ints", "[a + b for a, b in zip({x}, {x}[1:])]", "add each number to the next one",
   "take the sums of neighbours", family="scan")
op("weigh", "ints>ints", "[i * {v} for i, {v} in enumerate({x})]", "multiply each number by its index", family="scan")
op("add_index", "ints>ints", "[i + {v} for i, {v} in enumerate({x})]", "add its index to each number", family="scan")
op("swap_ends", "ints>ints", "{x}[-1:] + {x}[1:-1] + {x}[:1] if len({x}) > 1 else {x}", "swap the first and the last number", family="order")
fold("sum", "ints>int", "0", "{y} += {v}", "sum({x})", "add up the numbers", "take the sum of the numbers")
fold("count", "ints>int", "0", "{y} += 1", "len({x})", "count the numbers", "count how many numbers there are")
fold("count_even", "ints>int", "0", "{y} += {v} % 2 == 0", "sum({v} % 2 == 0 for {v} in {x})", "count the even numbers", family="count")
fold("count_above", "ints>int", "0", "{y} += {v} > {c}", "sum({v} > {c} for {v} in {x})", "count the numbers greater than {c}",
     "count how many numbers are above {c}", c=range(0, 13), family="count")
fold("sum_squares", "ints>int", "0", "{y} += {v} * {v}", "sum({v} * {v} for {v} in {x})", "take the sum of the squares",
     "add up the squares of the numbers")
op("product", "ints>int", "{y} = 1\nfor {v} in {x}:\n    {y} *= {v}", "multiply the numbers together",
   "take the product of the numbers", family="fold")
pick("largest", "ints>int", "max({x})", "0", "take the largest number, or 0 if there is none", "find the maximum, or 0 if empty")
pick("smallest", "ints>int", "min({x})", "0", "take the smallest number, or 0 if there is none", "find the minimum, or 0 if empty")
pick("spread", "ints>int", "max({x}) - min({x})", "0", "take the largest minus the smallest number, or 0 if empty")
pick("head", "ints>int", "{x}[0]", "0", "take the first number, or 0 if there is none")
pick("tail", "ints>int", "{x}[-1]", "0", "take the last number, or 0 if there is none")
pick("middle", "ints>int", "sorted({x})[len({x}) // 2]", "0", "take the upper median, or 0 if empty")
pick("where_largest", "ints>int", "{x}.index(max({x}))", "-1", "find the index of the largest number, or -1 if empty")
op("distinct", "ints>int", "len(set({x}))", "count the distinct numbers", "count how many different numbers there are", family="count")
op("alternating", "ints>int", "sum({x}[::2]) - sum({x}[1::2])", "take the alternating sum", family="fold")
op("search", "ints>int", "{y} = -1\nfor i, {v} in enumerate({x}):\n    if {v} > {c}:\n        {y} = i\n        break",
   "find the index of the first number above {c}, or -1", c=range(0, 13), family="search")
op("longest_rise", "ints>int", "{y} = run = 1 if {x} else 0\nfor a, b in zip({x}, {x}[1:]):\n    run = run + 1 if b > a else 1\n"
   "    {y} = max({y}, run)", "find the length of the longest rising run", family="search")
op("tally", "ints>idict", "{{{v}: {x}.count({v}) for {v} in {x}}}", "count how often each number occurs", family="count",
   loop="{y} = {{}}\nfor {v} in {x}:\n    {y}[{v}] = {y}.get({v}, 0) + 1")
each("to_strings", "ints>strs", "str({v})", "turn each number into a string", "convert the numbers to strings")
op("join_numbers", "ints>str", '"{c}".join(str({v}) for {v} in {x})', "join the numbers with '{c}'",
   "write the numbers separated by '{c}'", c="-+,/", family="text")
# integers: arithmetic, digits, number theory, recursion, simulation
op("plus", "int>int", "{x} + {c}", "add {c}", "increase it by {c}", c=range(1, 30))
op("minus", "int>int", "{x} - {c}", "subtract {c}", "decrease it by {c}", c=range(1, 30))
op("by", "int>int", "{x} * {c}", "multiply it by {c}", c=range(2, 13))
op("squared", "int>int", "{x} ** 2", "square it", "multiply it by itself")
op("negative_of", "int>int", "-{x}", "negate it", "flip its sign")
op("size", "int>int", "abs({x})", "take its absolute value", "drop its sign")
op("mod", "int>int", "{x} % {c}", "take it modulo {c}", "take the remainder modulo {c}", c=range(3, 30))
op("divide", "int>int", "{x} // {c}", "divide it by {c}, rounding down", c=DIGIT)
op("apart", "int>int", "abs({x} - {c})", "take its distance to {c}", c=range(5, 50))
op("at_most", "int>int", "min({x}, {c})", "cap it at {c}", "limit it to at most {c}", c=range(10, 50))
op("at_least", "int>int", "max({x}, {c})", "raise it to at least {c}", c=range(3, 30))
op("digit_sum", "int>int", "sum(int(d) for d in str(abs({x})))", "add up its digits", "take its digit sum", family="digits",
   recursion="def add_digits(n):\n    return n if n < 10 else n % 10 + add_digits(n // 10)\n\n{y} = add_digits(abs({x}))",
   loop="{y} = 0\nfor d in str(abs({x})):\n    {y} += int(d)")
op("digit_count", "int>int", "len(str(abs({x})))", "count its digits", family="digits")
op("digit_max", "int>int", "max(int(d) for d in str(abs({x})))", "take its largest digit", family="digits")
op("digit_flip", "int>int", "int(str(abs({x}))[::-1])", "reverse its digits", family="digits")
op("bit_count", "int>int", 'bin(abs({x})).count("1")', "count the ones in its binary form", family="digits")
op("divisor_count", "int>int", "sum(abs({x}) % d == 0 for d in range(1, abs({x}) + 1))", "count its divisors", family="number theory")
op("gcd", "int>int", "{y} = {x}\nrest = {c}\nwhile rest:\n    {y}, rest = rest, {y} % rest", "take its greatest common divisor with {c}",
   c=(6, 8, 9, 10, 12, 15, 18, 20, 24, 30, 36), family="number theory",
   recursion="def gcd(a, b):\n    return gcd(b, a % b) if b else a\n\n{y} = gcd({x}, {c})")
op("triangle", "int>int", "sum(range({x} + 1))", "add up all numbers from 1 to it", family="number theory",
   loop="{y} = 0\nfor i in range(1, {x} + 1):\n    {y} += i")
op("factorial_digit", "int>int", "{y} = 1\nfor i in range(2, {x} % 10 + 1):\n    {y} *= i", "take the factorial of its last digit",
   family="number theory", recursion="def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)\n\n{y} = factorial({x} % 10)")
op("collatz", "int>int", "m = {x}\n{y} = 0\nwhile m > 1:\n    m = m // 2 if m % 2 == 0 else 3 * m + 1\n    {y} += 1",
   "count the Collatz steps down to 1", family="simulation")
op("halvings", "int>int", "m = {x}\n{y} = 0\nwhile m > {c}:\n    m //= 2\n    {y} += 1", "count the halvings until it is at most {c}",
   c=range(1, 10), family="simulation")
op("fibonacci", "int>int", "a, b = 0, 1\nfor i in range({x} % {c}):\n    a, b = b, a + b\n{y} = a",
   "take the Fibonacci number at its remainder modulo {c}", c=range(8, 16), family="simulation")
op("digits", "int>ints", "[int(d) for d in str(abs({x}))]", "list its digits", "split it into digits", family="digits")
op("bits", "int>ints", "[int(b) for b in bin(abs({x}))[2:]]", "list its binary digits", family="digits")
op("divisors", "int>ints", "[d for d in range(1, abs({x}) + 1) if {x} % d == 0]", "list its divisors", family="number theory")
op("factors", "int>ints", "m = {x}\n{y} = []\nd = 2\nwhile d <= m:\n    while m % d == 0:\n        {y}.append(d)\n        m //= d\n    d += 1",
   "list its prime factors", family="number theory")
op("up_to", "int>ints", "list(range(1, {x} + 1))", "list the numbers from 1 to it", "count up from 1 to it")
op("table", "int>ints", "[{x} * i for i in range(1, {c} + 1)]", "list its first {c} multiples", c=range(3, 8))
op("text", "int>str", "str({x})", "turn it into a string", "convert it to a string", family="text")
op("binary", "int>str", "bin(abs({x}))[2:]", "write it in binary", "take its binary form", family="digits")
op("stars", "int>str", '"{c}" * ({x} % 10)', "repeat '{c}' as often as its last digit says", c="*#xo", family="text")
# strings
op("upper", "str>str", "{x}.upper()", "convert the text to upper case", "make the text upper case", family="text")
op("lower", "str>str", "{x}.lower()", "convert the text to lower case", "make the text lower case", family="text")
op("swap_case", "str>str", "{x}.swapcase()", "swap the case of every letter", family="text")
op("title", "str>str", "{x}.title()", "capitalize every word of the text", family="text")
op("backwards", "str>str", "{x}[::-1]", "reverse the text", "write the text backwards", family="text")
op("no_vowels", "str>str", '"".join(ch for ch in {x} if ch.lower() not in "aeiou")', "remove the vowels", family="text",
   loop='{y} = ""\nfor ch in {x}:\n    if ch.lower() not in "aeiou":\n        {y} += ch')
op("only_vowels", "str>str", '"".join(ch for ch in {x} if ch.lower() in "aeiou")', "keep only the vowels", family="text",
   loop='{y} = ""\nfor ch in {x}:\n    if ch.lower() in "aeiou":\n        {y} += ch')
op("no_spaces", "str>str", '{x}.replace(" ", "")', "remove the spaces", family="text")
op("replace_spaces", "str>str", '{x}.replace(" ", "{c}")', "replace each space by '{c}'", c="-_./", family="text")
op("replace_letter", "str>str", '{x}.replace("{c}", "*")', "replace each '{c}' by '*'", c="aeiorst", family="text")
op("remove_letter", "str>str", '{x}.replace("{c}", "")', "remove every '{c}'", c="aeiorstn", family="text")
op("double_letters", "str>str", '"".join(ch * 2 for ch in {x})', "double every character", family="text")
op("unique_letters", "str>str", '"".join(dict.fromkeys({x}))', "remove repeated characters", family="text")
op("sort_letters", "str>str", '"".join(sorted({x}))', "sort the characters", family="text")
op("every_other", "str>str", "{x}[::2]", "keep every other character", family="text")
op("prefix", "str>str", "{x}[:{c}]", "take the first {c} characters", c=range(3, 9), family="text")
op("suffix", "str>str", "{x}[-{c}:]", "take the last {c} characters", c=range(3, 9), family="text")
op("skip_letters", "str>str", "{x}[{c}:]", "skip the first {c} characters", c=range(1, 6), family="text")
op("mirrored", "str>str", "{x} + {x}[::-1]", "append the text reversed", family="text")
op("caesar", "str>str", '"".join(chr((ord(ch) - 97 + {c}) % 26 + 97) if "a" <= ch <= "z" else ch for ch in {x})',
   "shift each small letter by {c} in the alphabet", c=range(1, 9), family="text",
   helper='def shift(ch):\n    return chr((ord(ch) - 97 + {c}) % 26 + 97) if "a" <= ch <= "z" else ch\n\n' '{y} = "".join(shift(ch) for ch in {x})')
op("length", "str>int", "len({x})", "count the characters", "take the length of the text", family="count")
op("vowels", "str>int", 'sum(ch.lower() in "aeiou" for ch in {x})', "count the vowels", family="count",
   loop='{y} = 0\nfor ch in {x}:\n    if ch.lower() in "aeiou":\n        {y} += 1')
op("letter_count", "str>int", '{x}.count("{c}")', "count how often '{c}' occurs", c="aeiorst", family="count")
op("word_count", "str>int", "len({x}.split())", "count the words", family="count")
op("letter_kinds", "str>int", "len(set({x}))", "count the distinct characters", family="count")
op("find_letter", "str>int", '{x}.find("{c}")', "find the index of the first '{c}', or -1", c="aeiorst", family="search")
op("words", "str>strs", "{x}.split()", "split the text into words", "list the words", family="text")
op("codes", "str>ints", "[ord(ch) for ch in {x}]", "list the character codes", family="text")
op("letter_tally", "str>dict", "{{ch: {x}.count(ch) for ch in {x}}}", "count how often each character occurs", family="count",
   loop="{y} = {{}}\nfor ch in {x}:\n    {y}[ch] = {y}.get(ch, 0) + 1")
# lists of strings
keep("long_words", "strs", "len({v}) > {c}", "keep only the words longer than {c} letters", c=(2, 3, 4, 5))
keep("short_words", "strs", "len({v}) < {c}", "keep only the words shorter than {c} letters", c=(4, 5, 6, 7))
keep("with_letter", "strs", '"{c}" in {v}', "keep only the words that contain '{c}'", c="aeiorst")
keep("without_letter", "strs", '"{c}" not in {v}', "drop the words that contain '{c}'", c="aeiorst")
keep("vowel_words", "strs", '{v}[:1].lower() in set("aeiou")', "keep only the words that start with a vowel")
keep("even_words", "strs", "len({v}) % 2 == 0", "keep only the words of even length")
each("upper_words", "strs>strs", "{v}.upper()", "convert each word to upper case")
each("title_words", "strs>strs", "{v}.capitalize()", "capitalize each word")
each("flip_words", "strs>strs", "{v}[::-1]", "reverse each word", "write each word backwards")
each("cut_words", "strs>strs", "{v}[:{c}]", "cut each word to its first {c} letters", c=(2, 3, 4))
each("twice_words", "strs>strs", "{v} * 2", "repeat each word twice")
each("end_words", "strs>strs", '{v} + "{c}"', "add '{c}' to the end of each word", c="!?s.")
op("sort_words", "strs>strs", "sorted({x})", "sort the words alphabetically", "put the words in alphabetical order", family="order")
op("sort_length", "strs>strs", "sorted({x}, key=len)", "sort the words by length", family="order")
op("flip_list", "strs>strs", "{x}[::-1]", "reverse the order of the words", family="order")
op("unique_words", "strs>strs", "list(dict.fromkeys({x}))", "remove repeated words", family="order")
op("first_words", "strs>strs", "{x}[:{c}]", "take the first {c} words", c=SMALL, family="slice")
op("last_words", "strs>strs", "{x}[-{c}:]", "take the last {c} words", c=SMALL, family="slice")
op("skip_words", "strs>strs", "{x}[{c}:]", "skip the first {c} words", c=(1, 2, 3), family="slice")
op("other_words", "strs>strs", "{x}[::2]", "keep every other word", family="slice")
each("lengths", "strs>ints", "len({v})", "take the length of each word", "replace each word by its length")
each("vowels_each", "strs>ints", 'sum(ch in "aeiou" for ch in {v}.lower())', "count the vowels of each word")
op("join", "strs>str", '"{c}".join({x})', "join the words with '{c}'", c=" -_+", family="text")
op("initials", "strs>str", '"".join({v}[:1] for {v} in {x})', "join the first letters of the words", family="text")
pick("longest", "strs>str", "max({x}, key=len)", '""', "take the longest word, or '' if there is none")
pick("shortest", "strs>str", "min({x}, key=len)", '""', "take the shortest word, or '' if there is none")
pick("last_word", "strs>str", "{x}[-1]", '""', "take the last word, or '' if there is none")
op("how_many_words", "strs>int", "len({x})", "count the words in the list", family="count")
fold("total_length", "strs>int", "0", "{y} += len({v})", "sum(len({v}) for {v} in {x})", "add up the lengths of the words")
op("word_tally", "strs>dict", "{{{v}: {x}.count({v}) for {v} in {x}}}", "count how often each word occurs", family="count",
   loop="{y} = {{}}\nfor {v} in {x}:\n    {y}[{v}] = {y}.get({v}, 0) + 1")
op("length_table", "strs>dict", "{{{v}: len({v}) for {v} in {x}}}", "map each word to its length", family="lookup")
# dictionaries with integer values; keys are strings (dict) or integers (idict)
for kind, keys in (("dict", "strs"), ("idict", "ints")):
    def both(name, types, *rest, **more):
        op(name if kind == "dict" else "i_" + name, types.replace("dict", kind).replace("keys", keys), *rest, family="lookup", **more)
    both("keep_values", "dict>dict", "{{k: v for k, v in {x}.items() if v > {c}}}", "keep only the entries with a value above {c}",
         c=range(1, 6), loop="{y} = {{}}\nfor k, v in {x}.items():\n    if v > {c}:\n        {y}[k] = v")
    both("scale_values", "dict>dict", "{{k: v * {c} for k, v in {x}.items()}}", "multiply every value by {c}", c=DIGIT)
    both("add_values", "dict>dict", "{{k: v + {c} for k, v in {x}.items()}}", "add {c} to every value", c=DIGIT)
    both("sort_keys", "dict>dict", "dict(sorted({x}.items()))", "sort the entries by key")
    both("sort_values", "dict>dict", "dict(sorted({x}.items(), key=lambda item: item[1]))", "sort the entries by value")
    both("values", "dict>ints", "list({x}.values())", "list the values")
    both("keys", "dict>keys", "list({x})", "list the keys")
    both("rich_keys", "dict>keys", "[k for k, v in {x}.items() if v > {c}]", "list the keys whose value is above {c}", c=range(1, 6))
    both("value_sum", "dict>int", "sum({x}.values())", "add up the values")
    both("entries", "dict>int", "len({x})", "count the entries")
    both("top_value", "dict>int", "max({x}.values()) if {x} else 0", "take the largest value, or 0 if empty")
BY_SOURCE = {}
for _op in OPS.values():
    BY_SOURCE.setdefault(_op.source, []).append(_op)

# ---------------------------------------------------------------------------------------------------------------------
# Words to draw from: creative randomness comes from names, inputs, phrasing, style and composition

PARAMETERS = {"ints": ("numbers", "values", "nums", "items", "data"), "int": ("n", "number", "value"), "str": ("text", "string", "line"),
              "strs": ("words", "names", "tokens"), "dict": ("scores", "table", "prices"), "idict": ("counts",)}
ELEMENTS = {"ints": ("v", "x"), "strs": ("w", "s"), "dict": ("k",), "idict": ("k",)}
HINTS = {"ints": "list[int]", "int": "int", "str": "str", "strs": "list[str]", "dict": "dict[str, int]", "idict": "dict[int, int]"}
FRESH = ("out", "kept", "step", "found", "new", "part", "piece", "one", "two")
VERBS = "get find make build compute solve process convert collect reduce select transform handle prepare update check".split()
NOUNS = "values list result data items score total answer series record text words report table output entry summary".split()
WORDS = ("apple river stone cloud tiger music paper green light house bread chair dream eagle flame grape honey igloo jelly "
         "kite lemon mango night ocean piano queen robot sugar train uncle violet water yellow zebra art bee cat dog egg fox "
         "gum hat ice jam key log map net oak pen rug sun tea urn van wax yak zoo anna bob level noon radar orange").split()


def draw_input(kind, rng):
    """A random input of a type; short lists and the empty one come up on purpose."""
    if kind == "ints":
        low = rng.choice((0, -9, -20))
        return [rng.randint(low, rng.choice((9, 20, 30))) for _ in range(rng.choice((0, 1, 3, 4, 5, 5, 6, 6, 7, 8)))]
    if kind == "int":
        return rng.choice((rng.randint(0, 9), rng.randint(10, 99), rng.randint(10, 99), rng.randint(100, 300)))
    if kind == "dict":
        return {rng.choice(WORDS): rng.randint(0, 12) for _ in range(rng.choice((0, 2, 3, 4)))}
    words = [rng.choice(WORDS) for _ in range(rng.choice((0, 1, 2, 3, 4, 4, 5)))]
    words = [w if rng.random() < 0.7 else rng.choice((w.upper(), w.capitalize())) for w in words]
    return words if kind == "strs" else " ".join(words[:4])


PROBES = {kind: [draw_input(kind, random.Random(f"probe {kind} {i}")) for i in range(16)] for kind in ("ints", "int", "str", "strs", "dict")}


class TooLarge(ValueError):
    """A value left the range that examples and probes can show."""


def bounded(value):
    """The value, if it is small enough to print: integers up to 50,000, 40 items, 100 characters."""
    if isinstance(value, str):
        fits = len(value) <= 100
    elif isinstance(value, int):
        fits = abs(value) <= 50_000
    else:
        numbers = list(value.values()) if isinstance(value, dict) else value
        fits = len(value) <= 40 and (not numbers or isinstance(numbers[0], str) or -50_000 <= min(numbers) and max(numbers) <= 50_000)
    if not fits:
        raise TooLarge
    return value


def indent(code, by=4):
    return "\n".join(" " * by + line if line else line for line in code.split("\n"))


@functools.lru_cache(maxsize=4096)
def step_function(name, constant, style="plain"):
    """The operation as a Python function of one value."""
    code = OPS[name].code[style].format(x="value", y="answer", v="item", c=constant)
    scope = {}
    exec(f"def step(value):\n{indent(code)}\n    return answer", scope)  # our own template, not a model's code
    return scope["step"]


def run_chain(chain, value):
    """Every intermediate value of a chain [(operation name, constant), …], the last one being the answer."""
    trace = []
    for name, constant in chain:
        value = bounded(step_function(name, constant)(value))
        trace.append(value)
    return trace


def behaviour(chain):
    """The chain's outputs on the probes of its input type, one string each; equal: the same as far as the probes see."""
    return [repr(run_chain(chain, probe)[-1]) for probe in PROBES[OPS[chain[0][0]].source]]


def bucket(text):
    """Which split a hash sends this text to: 10 % test, 10 % dev, 80 % train."""
    part = hashlib.blake2b(text.encode(), digest_size=8).digest()[0] % 10
    return ("test", "dev")[part] if part < 2 else "train"


def composition(chain):
    return " ".join(name for name, _ in chain)


def split_by_composition(chain):
    """The split that a chain's composition sends it to; None where it would be training's and holds a held-out one within."""
    splits = {bucket(composition(chain[i:j])) for i in range(len(chain)) for j in range(i + 2, len(chain) + 1)}
    return bucket(composition(chain)) if len(chain) > 1 and bucket(composition(chain)) != "train" else "train" if splits <= {"train"} else None


def split_of(chain, outputs):
    """The split of a chain with these probe outputs, or None where composition and behaviour disagree (module docstring)."""
    split = split_by_composition(chain)
    return split if split == bucket(" ".join([OPS[chain[0][0]].source, *outputs])) else None


def draw_chain(k, split, rng, source=None):
    """A random chain of k operations (on the type `source`) that belongs to `split` and each of whose steps matters."""
    while True:
        kind = source or rng.choices(("ints", "int", "str", "strs", "dict"), (40, 15, 20, 17, 8))[0]
        chain = []
        for _ in range(k):
            choice = rng.choice(BY_SOURCE[kind])
            while any(choice.name == name for name, _ in chain):
                choice = rng.choice(BY_SOURCE[kind])
            chain.append((choice.name, rng.choice(choice.constants)))
            kind = choice.target
        if split_by_composition(chain) != split:
            continue  # the cheap half of split_of, before anything is run
        try:
            outputs = behaviour(chain)
            if split_of(chain, outputs) != split or len(set(outputs)) < 4:
                continue
            shorter = [chain[:i] + chain[i + 1:] for i, (name, _) in enumerate(chain) if k > 1 and OPS[name].source == OPS[name].target]
            if any(behaviour(other) == outputs for other in shorter):
                continue  # a step that changes nothing teaches nothing
            return chain
        except TooLarge:
            continue


def draw_survey(ks, rng):
    """Two to four training chains that start from one type, of five to seven steps in all."""
    while True:
        chains = [draw_chain(rng.choice(ks), "train", rng)]
        kind = OPS[chains[0][0][0]].source
        total = rng.randint(5, 7)
        while (left := total - sum(map(len, chains))) > 0 and len(chains) < 4:
            chain = draw_chain(rng.choice([k for k in ks if k <= left] or [left]), "train", rng, kind)
            chains.append(chain)
        if left <= 0 and len(chains) > 1:
            return chains


AGAIN = ("second answer, again from {}", "third answer, again from {}", "fourth answer, again from {}")  # between a survey's chains


def render_code(chains, parameter, phrases, rng, style, comments):
    """Function body (indented by 4) that computes each chain from `parameter`, one step after the other, and returns its answer, or
    the list of answers where there are several chains. phrases: one for each step, AGAIN between the chains among them."""
    lines, reassign, used, answers, phrases = [], rng.random() < 0.85, {parameter}, [], iter(phrases)
    for chain in chains:
        x, one = parameter, len(chains) == 1
        if answers:
            lines.append(f"# {next(phrases)}")
        for i, (name, constant) in enumerate(chain):
            o, last = OPS[name], i == len(chain) - 1 and one
            code = o.code["early" if last and "early" in o.code and rng.random() < 0.4 else style if style in o.code else "plain"]
            if last and not comments and code.split("\n")[-1].startswith("{y} = "):
                head, _, tail = code.rpartition("{y} = ")
                code, y = head + "return " + tail, "result"
            elif last:
                code, y = code + "\nreturn {y}", "result"
            elif code.count("\n") or not reassign or o.source != o.target or x == parameter and not one:
                y = rng.choice([name for name in PARAMETERS[o.target] if name not in used] or [name for name in FRESH if name not in used])
            else:
                y = x
            v = rng.choice([v for v in ELEMENTS.get(o.source, ("v",)) if v not in (x, y)])
            lines += [f"# {next(phrases)}"] * comments + [code.format(x=x, y=y, v=v, c=constant)]
            x = y
            used.add(y)
        answers.append(x)
    lines += [f"return [{', '.join(answers)}]"] * (len(chains) > 1)
    return indent("\n".join(lines)) + "\n"


OPENINGS = {"ints": "a list of numbers", "int": "a number", "str": "a text", "strs": "a list of words", "dict": "a dictionary",
            "idict": "a dictionary"}


def render_docstring(phrases, kind, parameter, examples, rng):
    """What the function shall do, in one of several forms, with examples as doctests."""
    first = phrases[0][0].upper() + phrases[0][1:]
    form = rng.randrange(4)
    if form == 0:
        words = ["Then", "Next,", "After that,", "Then"]
        body = [first] + [f"{'Finally,' if i == len(phrases) - 1 and i > 1 else rng.choice(words)} {phrase}" for i, phrase in enumerate(phrases) if i]
        text = ". ".join(body) + "."
    elif form == 1:
        text = ", then ".join([first, *phrases[1:]]) + "."
    elif form == 2:
        text = f"Given {OPENINGS[kind]}:\n" + "\n".join(f"- {phrase}" for phrase in phrases)
    else:
        text = f"From {parameter}: " + "; ".join(phrases) + "."
    shown = "\n" * bool(examples) + "".join(f">>> {call}\n{answer}\n" for call, answer in examples)
    return indent(f'"""{text}\n{shown}"""')


def draw_problem(index, split, ks, seed, page=False):
    """Problem (or, with `page`, textbook page) number `index`: the same for the same arguments, on any machine and in any order."""
    rng = random.Random(f"{seed} {split} {index} {page}")
    while True:
        survey = split == "train" and not page and max(ks) > 2 and rng.random() < SURVEYS
        chains = draw_survey(ks, rng) if survey else [draw_chain(ks[index % len(ks)], split, rng)]
        chain, k = chains[0], max(map(len, chains))
        kind = OPS[chain[0][0]].source
        parameter = rng.choice(PARAMETERS[kind])
        phrases = [rng.choice(OPS[name].phrases).format(c=constant) for name, constant in chain]
        for again, other in zip(AGAIN, chains[1:]):
            phrases += [again.format(parameter), *(rng.choice(OPS[name].phrases).format(c=constant) for name, constant in other)]
        entry_point = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
        hints = rng.random() < 0.2
        result = "list" if survey else HINTS[OPS[chain[-1][0]].target]
        signature = f"def {entry_point}({parameter}: {HINTS[kind]}) -> {result}:" if hints else f"def {entry_point}({parameter}):"
        style = rng.choices(("plain", "loop", "helper", "recursion"), (70, 14, 10, 6))[0]
        body = render_code(chains, parameter, phrases, rng, style, survey or rng.random() < (0.7 if k == 1 else 0.95))
        try:
            inputs = {repr(value): value for value in (draw_input(kind, rng) for _ in range(20))}
            cases = [(value, [[run_chain(c, value)[-1] for c in chains]] if survey else run_chain(chain, value)) for value in inputs.values()]
        except TooLarge:
            continue
        scope = {}
        exec(f"{signature}\n{body}", scope)  # our own templates; what a model or a real teacher wrote runs in the sandbox alone
        for value, trace in cases:
            answer = scope[entry_point](copy.copy(value))
            if repr(answer) != repr(trace[-1]):
                raise AssertionError(f"teacher's own error: {chain} as\n{body}\ngives {answer!r} for {value!r}, not {trace[-1]!r}")
        shown = sorted((case for case in cases if case[0]), key=lambda case: len(repr(case[0])) + len(repr(case[1])))
        shown = shown[len(shown) // 4:][:6]
        if len({repr(trace[-1]) for _, trace in cases[:14]}) < 4 or len(shown) < 3:
            continue
        if page:
            return render_page(chain, phrases, entry_point, signature, body, parameter, shown, rng)
        examples = [(f"{entry_point}({value!r})", repr(trace[-1]))
                    for value, trace in rng.sample(shown, rng.choices((0, 1, 2), (60, 40, 0) if survey else (15, 70, 15))[0])]
        wrap = "list(candidate({!r}).items()) == {!r}" if isinstance(cases[0][1][-1], dict) else "candidate({!r}) == {!r}"
        tests = [wrap.format(value, list(trace[-1].items()) if isinstance(trace[-1], dict) else trace[-1]) for value, trace in cases[:14]]
        return {"task_id": f"builtin/{split}/{seed}/{index}", "entry_point": entry_point,
                "prompt": f"{signature}\n{render_docstring(phrases, kind, parameter, examples, rng)}\n", "canonical_solution": body,
                "test": "def check(candidate):\n" + "".join(f"    assert {test}\n" for test in tests),
                "k": k, "split": split, "composition": "; ".join(map(composition, chains)), "teacher": "builtin", "chains": chains}


# What the textbook says about a kind of step: the idea, why it works, a common mistake.
PROSE = {
    "filter": ("A filter looks at the items one by one and keeps those that pass a test", "the order of the remaining items does not change",
               "removing items from a list while looping over it; build a new list instead"),
    "map": ("A map applies the same rule to every item", "the result has as many items as the input",
            "writing the new value to the loop variable, which changes nothing in the list"),
    "order": ("This step changes where the items stand, or how often", "a new list is built and the original stays as it was",
              "using list.sort(), which returns None, where sorted() is meant"),
    "slice": ("A slice takes a part of a list by position", "slices never fail when the list is too short", "being off by one: counting starts at 0"),
    "scan": ("This step looks at each item together with its neighbours or its position", "one pass over the list is enough",
             "going one step past the end of the list"),
    "fold": ("A fold reduces a list to one value", "a running value is updated once for each item", "forgetting the start value for an empty list"),
    "pick": ("This step picks one item out of a list", "the empty list gets an answer of its own", "forgetting that max and min fail on an empty list"),
    "count": ("Counting needs a running count or a function that counts", "True counts as 1 when it is added", "counting the same item twice"),
    "search": ("A search looks through the items until it finds what it wants", "it can stop at the first hit", "not saying what happens when nothing is found"),
    "digits": ("The digits of a number are the characters of its text", "str makes the text and int turns a digit back", "forgetting the minus sign: take abs first"),
    "number theory": ("Whole numbers divide with a remainder", "a % b is 0 when b divides a", "starting a range at 0 and dividing by it"),
    "simulation": ("A simulation repeats one rule until it is done", "a while loop runs as long as its condition holds", "a loop whose condition never changes"),
    "text": ("A text is a sequence of characters and never changes in place", "each method returns a new text", "calling a method without using what it returns"),
    "lookup": ("A dictionary stores a value for each key", "items() gives keys and values together", "asking for a key that is not there; get has a default"),
    "value": ("This step computes a new number from the old one", "Python's whole numbers have no limit", "mixing up / and //: the first gives a float")}
AUDIENCES = ("for beginners", "for students", "for curious readers", "for self-study", "for a first course", "for practice")


def render_page(chain, phrases, entry_point, signature, body, parameter, shown, rng):
    """A textbook page (Markdown) about a chain: idea, code, examples, trace, why, common mistake, the same in another style."""
    kind = OPS[chain[0][0]].source
    families = list(dict.fromkeys(OPS[name].family for name, _ in chain))
    parts = [f"# How to {', then '.join(phrases)} ({rng.choice(AUDIENCES)})"]
    ideas = [f"{PROSE[f][0]}; {PROSE[f][1]}." for f in families[:2]]
    task = f"Given {OPENINGS[kind]}, we want to {', then '.join(phrases)}."
    parts.append(" ".join([task, *ideas] if rng.random() < 0.5 else [*ideas, task]))
    parts.append(f"```python\n{signature}\n{body}```")
    value, trace = shown[0]
    steps = "".join(f"\n- {phrase}: {result!r}" for phrase, result in zip(phrases, trace))
    parts.append(f"Step by step, for {value!r}:{steps}")
    parts.append("More examples:\n" + "".join(f"\n>>> {entry_point}({value!r})\n{trace[-1]!r}" for value, trace in shown[1:3]))
    other = render_code([chain], parameter, phrases, rng, rng.choice(("plain", "loop", "helper", "recursion")), False)
    if other != body:
        scope = {}
        exec(f"{signature}\n{other}", scope)
        assert all(repr(scope[entry_point](copy.copy(v))) == repr(t[-1]) for v, t in shown), (chain, other)
        parts.append(f"Another way to write it:\n\n```python\n{signature}\n{other}```")
    parts.append(f"A common mistake is {PROSE[rng.choice(families)][2]}.")
    return {"text": "\n\n".join(parts) + "\n", "topic": composition(chain), "chains": [chain], "k": len(chain), "teacher": "builtin"}


def _draw(job):
    return draw_problem(*job)


def draw_many(kind, count, split="train", ks=(1, 2, 3, 4), seed=0, workers=None, tally=None):
    """Yield `count` distinct records of the built-in teacher: "exercises" (problems) or "textbooks" (pages).

    Record i depends on (seed, split, i) alone, so the result is the same for any number of workers. Repeated text is left
    out; outside the training split, so is every problem whose operations and constants came up before. Each of `ks` gets its
    share of the records. Raises ValueError where there are not so many.
    """
    if split != "train" and 1 in ks:
        raise ValueError(f"--split {split} has no problems of one operation, which all belong to training; use --k 2-6")
    seen, left = set(), {slot: count // len(ks) + (slot < count % len(ks)) for slot in range(len(ks))}
    workers = min(workers or os.cpu_count() or 1, 1 + count // 200)
    pool = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn").Pool(workers) if workers > 1 else None
    try:
        start, fruitless = 0, 0
        while any(left.values()):
            wanted = min(max(256, max(left.values()) * len(ks)), 8192)
            numbers = [i for i in range(start, start + wanted) if left[i % len(ks)]]
            jobs = ((i, split, tuple(ks), seed, kind == "textbooks") for i in numbers)
            start, fruitless = start + wanted, fruitless + 1
            for i, record in zip(numbers, pool.imap(_draw, jobs, chunksize=32) if pool else map(_draw, jobs)):
                key = hash(record.get("text") or (record["prompt"] if split == "train" else str(record["chains"])))
                if tally is not None:
                    tally.update(drawn=1, repeated=key in seen)
                if key not in seen and left[i % len(ks)]:
                    seen.add(key)
                    left[i % len(ks)] -= 1
                    fruitless = 0
                    yield record
            if fruitless == 8:
                raise ValueError(f"only {len(seen):,} of {count:,} different {kind} found for --k {','.join(map(str, ks))}; ask for fewer")
    finally:
        if pool:
            pool.terminate()
            pool.join()


# ---------------------------------------------------------------------------------------------------------------------
# The built-in teacher as a judge: what an educator looks for, from 0 to 5, one point for each of five merits

WHY = re.compile(r"\b(because|so that|in order to|otherwise|therefore|thus|hence|which means|that is why|the idea|the reason|since|instead of"
                 r"|note that|we want|we need|this (?:lets|allows|makes|ensures|avoids))\b", re.I)
EXAMPLE = re.compile(r">>> |\b(?:for example|for instance|e\.g\.|examples?:|suppose|imagine|let us|let's|consider)", re.I)
NOISE = re.compile(r"\b(?:click here|subscribe|sign up|log ?in|cookies?|all rights reserved|add to cart|free shipping|privacy policy|newsletter"
                   r"|buy now|discount|casino|follow us|share this|comments?\s+\(\d+\))|https?://|lol\b|!!", re.I)
ELSEWHERE = re.compile(r"https?://|\b(?:[Cc]hapter|[Ss]ection|[Ff]igure) \d|\b(?:previous|next|last|earlier) (?:chapter|section|page)s?\b")
WRITTEN = re.compile(r"auto-?(?:matically)?[ -]?generated|generated by|do not edit|@generated", re.I)
PLAIN = set("math cmath random collections itertools functools operator re string heapq bisect dataclasses typing abc enum fractions decimal "
            "statistics datetime copy textwrap numbers array __future__ time".split())  # what a lesson may import without explaining it
LOOPS = (ast.For, ast.While, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
# merit -> (said when it is there, said when it is not, points)
MERITS = {"content": ("works something out", "has nothing to work out", 2.0), "purpose": ("says what it is for", "does not say what it is for", 1.3),
          "reasons": ("gives reasons or examples", "gives no reasons", 1.3), "alone": ("stands alone", "needs code or context from elsewhere", 1.3),
          "clear": ("is short and plainly named", "is long or hard to follow", 0.6)}


def ramp(value, low, high):
    """0 up to `low`, 1 from `high` on, straight between (also downhill)."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def grade(text, name=""):
    """Educational value of a document for a student of programming: (score 0..5, reason), phi-1's question asked of rules.

    Python is parsed: what counts is what its functions do, need and explain. Any other text is read as prose.
    """
    tree = None
    if name.removesuffix(".gz").endswith(".py") or re.search(r"^(?:def|class|import|from) ", text, re.M):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            if name.endswith(".py"):
                return 0, "is not valid Python"
    if WRITTEN.search(text[:1000]):
        return 0, "was written by a program for a program"
    merits, fault, penalty = grade_code(tree, text) if tree else grade_prose(text)
    merits = {m: value * MERITS[m][2] for m, value in merits.items()}
    points = sum(merits.values()) - penalty
    ranked = sorted(merits, key=lambda m: merits[m] / MERITS[m][2])
    good = [MERITS[m][0] for m in ranked[::-1][:2] if merits[m] >= 0.5 * MERITS[m][2]]
    bad = [fault] if fault else [MERITS[m][1] for m in ranked[:1] if merits[m] < 0.5 * MERITS[m][2]]
    return round(max(0.0, min(5.0, points))), ", ".join(good) + (" but " if good and bad else "") + ", ".join(bad)


def grade_code(tree, text):
    """-> (merits 0..1 by name, the worst fault or "", points it costs)."""
    imports = {a.asname or a.name.split(".")[0]: (node.module or "." if isinstance(node, ast.ImportFrom) else a.name).split(".")[0]
               if not getattr(node, "level", 0) else "." for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    foreign = {name for name, module in imports.items() if module not in PLAIN}
    strangers = {c.name for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and foreign & {n.id for b in c.bases for n in ast.walk(b) if isinstance(n, ast.Name)}}
    n_lines, weight, total = text.count("\n") + 1, Counter(), 0
    comments = [line.split("#", 1)[1] for line in text.split("\n") if line.lstrip().startswith("#") and not line.startswith("#!")]
    stories = [d for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) for d in [ast.get_docstring(node)] if d]
    told = " ".join(stories + comments)

    def visit(node, owner):
        nonlocal total
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = child.end_lineno - child.lineno + 1
                nodes = list(ast.walk(child))
                kinds, variables = Counter(map(type, nodes)), [n for n in nodes if type(n) is ast.Name]
                names = {n.id for n in variables}
                loops, calls = sum(kinds[k] for k in LOOPS), kinds[ast.Call] + kinds[ast.Attribute]
                work = 3 * loops + kinds[ast.BinOp] + kinds[ast.AugAssign] + kinds[ast.Compare] + kinds[ast.Subscript] + 3 * (child.name in names)
                # sqrt: a long function says more than a short one, but not in proportion
                share, story = lines ** 0.5, ast.get_docstring(child) or ""
                words = {child.name, *(a.arg for a in child.args.args), *(n.id for n in variables if type(n.ctx) is ast.Store)} - {"self", "cls"}
                plain = sum(len(part) > 2 or w in "abcdefghijklmnpqrstuvwxyz" for w in words for part in w.strip("_").split("_")[:1])
                weight.update(purpose=share * ramp(len(story.split()), 2, 10), content=share * ramp(work / (2 + calls), 0.2, 1) * (loops > 0 or work > 4),
                              alone=share * (not names & foreign) * (owner not in strangers), example=share * (">>>" in story),
                              clear=share * ramp(lines, 60, 20) * ramp(plain / max(1, len(words)), 0.5, 0.9))
                total += share
            elif isinstance(child, (ast.ClassDef, ast.If, ast.Try)):
                visit(child, child.name if isinstance(child, ast.ClassDef) else owner)

    visit(tree, "")
    has = {m: weight[m] / total if total else 0.0 for m in (*MERITS, "example")}
    intro, reasons, examples = len((ast.get_docstring(tree) or "").split()), 60 * len(WHY.findall(told)) / n_lines, 60 * len(EXAMPLE.findall(text)) / n_lines
    merits = dict(purpose=0.6 * has["purpose"] + 0.4 * ramp(intro, 5, 40),
                  reasons=0.5 * ramp(reasons, 0, 1) + 0.5 * max(ramp(examples, 0, 1.5), has["example"]), content=has["content"], alone=has["alone"], clear=has["clear"] * ramp(n_lines, 1500, 400))
    literals = sum(isinstance(n, ast.Constant) for n in ast.walk(tree))
    if set(imports.values()) & {"unittest", "pytest", "test", "hypothesis"} or sum(line.lstrip().startswith("def test") for line in text.split("\n")) > 1:
        return merits, "is a test", 3.5
    if not total:
        return merits, "is a list of imports" if len(imports) > literals else "is data or settings", 2.0
    if literals > 8 * n_lines or literals > 40 * total:
        return merits, "is mostly data", 2.0
    return (merits, "is too short to teach much", 1.5) if total < 6 else (merits, "", 0.0)


def grade_prose(text):
    """-> as grade_code, for an explanation in words."""
    words, sentences = re.findall(r"[^\W\d_][\w'’-]*", text), [s for s in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text) if s.strip()]
    n, per = len(words), max(1, len(words)) / 100
    content = [{w.lower() for w in re.findall(r"[^\W\d_]{5,}", s)} for s in sentences]
    linked = sum(bool(a & b) for a, b in zip(content, content[1:])) / max(1, len(content) - 1)
    whole = sum(len(s.split()) for s in sentences if s.rstrip()[-1:] in ".!?:" and 4 <= len(s.split()) <= 40)
    defined = len(re.findall(r"\b(?:is an?|are|means?|called|refers? to|defined? as|consists? of|known as|that is)\b", text))
    steps = len(re.findall(r"\b(?:first|then|next|finally|step|if|when|each|both|equals?|result)\b|[=+×÷∑√]|```", text, re.I))
    personal = len(re.findall(r"\b(?:I|my|me|mine|we're|I'm)\b", text)) / per
    reasons, examples = (len(pattern.findall(text)) / per for pattern in (WHY, EXAMPLE))
    merits = dict(purpose=ramp(defined / per, 0.3, 2), reasons=0.5 * ramp(reasons, 0, 0.8) + 0.5 * ramp(examples, 0, 0.4),
                  content=ramp(steps / per, 0.5, 2.5), alone=linked * ramp(personal, 5, 1), clear=ramp(whole / max(1, n), 0.4, 0.9) * ramp(n, 20000, 5000))
    noise = len(NOISE.findall(text)) / per
    if noise > 0.5:
        return merits, "sells, links or chats", min(3.0, 1 + noise)
    return (merits, "is too short to teach much", 2.0) if n < 60 else (merits, "", 0.0)


def sample_documents(paths, count, seed):
    """`count` different documents of files, directories or `python`: those of the smallest hashes, so the same for the same seed."""
    import data
    drop, seen = Counter(), set()

    def distinct():
        for document in data.read_documents(data.find_files(paths, drop), drop):
            key = data.digest(f"{seed} {document['text']}")
            if key not in seen:
                seen.add(key)
                yield key, str(document["id"]), document["text"]

    found = heapq.nsmallest(count, distinct())
    if not found:
        raise ValueError(f"{' '.join(paths)}: no document to read ({dict(drop) or 'no files'}); give .jsonl, text or code files")
    return [{"id": name, "text": text} for _, name, text in found]


# ---------------------------------------------------------------------------------------------------------------------
# Teachers behind an OpenAI-compatible API. A run is a function of its options and of its ledger, OUT.paid.jsonl: there every answer that was paid for is
# appended before it counts, under the hash of teacher and question. A run stopped in any way is run again, and what stands there is not asked.


class Refused(ValueError):
    """An answer is of no use; the message says why."""


class Ended(Exception):
    """No more questions: a budget is spent, no teacher is left, or the user stopped the run."""


class Teacher:
    """`builtin`, or the model behind URL#MODEL; =WEIGHT says how often it is asked where there are several."""

    def __init__(self, spec):
        self.name, weight = re.fullmatch(r"(.*?)(?:=(\d*\.?\d+))?", spec, re.S).groups()
        url, _, self.model = self.name.partition("#")
        parts = urllib.parse.urlsplit(url)
        self.url, self.weight, host = None if url == "builtin" else url.rstrip("/"), float(weight or 1), parts.hostname or ""
        if self.url is not None and not (parts.scheme in ("http", "https") and host and self.model and "@" not in parts.netloc and not parts.query) or not self.weight:
            raise argparse.ArgumentTypeError("write builtin or URL#MODEL such as http://localhost:8000/v1#phi, with =3 after it to ask it three times as often "
                                             "as the others; keys belong into the environment")
        variable = "SYNTH_KEY_" + re.sub(r"\W", "_", host).upper()
        self.key = os.environ.get(variable) or (os.environ.get("OPENAI_API_KEY") if host == "api.openai.com" else None)
        if self.key and parts.scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
            raise argparse.ArgumentTypeError(f"{variable} is set, but plain http would show the key on its way to {host}; use https")
        self.free_at, self.failures, self.out, self.session = 0.0, 0, "", None  # `out`: why it is set aside

    def post(self, body, path, args):
        """-> (status, content, seconds to wait); status 0: no connection. Redirects are not followed: the key is this host's alone."""
        import requests
        if self.session is None:
            session = requests.Session()
            session.proxies, session.verify = requests.utils.get_environ_proxies(self.url), os.environ.get("REQUESTS_CA_BUNDLE", True)
            session.trust_env = False  # or it would send ~/.netrc's passwords, and read the environment anew for each request
            session.mount(self.url, requests.adapters.HTTPAdapter(pool_maxsize=args.concurrency))
            session.headers.update({"Authorization": f"Bearer {self.key}"} if self.key else {})
            self.session = session
        try:
            reply = self.session.post(f"{self.url}/{path}", json=dict(body, model=self.model), timeout=(10, args.timeout), allow_redirects=False)
            after = reply.headers.get("Retry-After", "0")
            wait = float(after) if re.fullmatch(r"[\d.]+", after) else email.utils.parsedate_to_datetime(after).timestamp() - time.time()
            return reply.status_code, reply.content, wait
        except (requests.RequestException, OSError, ValueError) as error:
            return 0, type(error).__name__.encode(), 0.0


def parse_reply(content):
    """(text, why it is of no use or None, tokens read, tokens written) of a chat's or a completion's reply."""
    try:
        reply = json.loads(content)
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message = choice.get("message") or {"content": choice["text"]}
        text = re.sub(r"\A\s*<think>.*?</think>", "", message["content"] or "", flags=re.S)
        why = "truncated" if choice.get("finish_reason") == "length" and "message" in choice else None if text.strip() else "empty"
        why = "refusal" if message.get("refusal") or choice.get("finish_reason") == "content_filter" else why
        return text, why, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or len(text) // 4)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "", "broken JSON", 0, len(content) // 4


class Desk:
    """Puts questions to teachers from --concurrency threads, within the limits that `args` set, and keeps the ledger."""

    def __init__(self, args, ledger):
        self.args, self.lock, self.stopped, self.code, self.file = args, threading.Condition(), "", 2, None
        self.held, self.spent, self.lines, self.why, self.tally = 0, Counter(), {}, Counter(), {}  # lines: key -> its place in the ledger
        if any(t.url for t in [*args.teacher, *args.judge]) and not args.dry_run:
            os.makedirs(os.path.dirname(ledger) or ".", exist_ok=True)
            self.file, end = open(ledger, "a+b"), 0
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{ledger} is in use by another run; wait for it, or choose another --out") from None
            self.file.seek(0)
            for line in self.file:
                if line.endswith(b"\n"):  # else the run was cut off while it wrote
                    try:
                        self.note(json.loads(line), end, len(line))
                    except (ValueError, KeyError, TypeError):
                        raise ValueError(f"{ledger}: the line at byte {end:,} is no teacher's answer; remove it") from None
                    end += len(line)
            self.file.truncate(end)

    def note(self, entry, at, size):
        self.lines[entry["key"]] = (at, size)
        counts = Counter(answers=1, refused=int(bool(entry["reason"])), read=entry["read"], written=entry["written"])
        self.spent.update(counts)
        self.tally.setdefault(entry["teacher"], Counter()).update(counts)

    def cost(self, counts):
        return (counts["read"] * self.args.price_in + counts["written"] * self.args.price_out) / 1e6

    def run(self, function, items):
        """[function(item), or Refused, or None where the run ended before] in threads. Ctrl-C waits for answers under way, for they cost money."""
        results, waiting = [None] * len(items), iter(list(enumerate(items)))

        def work():
            for i, item in waiting:  # shared by the threads
                try:
                    results[i] = function(item) if not self.stopped else None
                except Refused as error:
                    results[i] = error
                except BaseException as error:
                    self.stop(str(error) if isinstance(error, Ended) else f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.args.concurrency, len(items)))]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            try:
                for thread in threads:
                    thread.join()
            except (KeyboardInterrupt, SystemExit) as error:
                if self.stopped == "interrupted":
                    raise
                self.stop("interrupted")
                self.code = 143 if isinstance(error, SystemExit) else 130
                print("synth.py: stopping after the answers under way; Ctrl-C again throws them away", file=sys.stderr)
        return results

    def stop(self, why):
        with self.lock:
            self.stopped = self.stopped or why
            self.lock.notify_all()

    def pause(self, seconds):
        end = time.monotonic() + seconds
        while not self.stopped and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def ask(self, question, read, own=None, mark="", teacher=None, temperature=None):
        """(read(text), teacher's name) of the first answer, of at most --asks, that read does not refuse; raises Refused, or Ended.

        question  what the user says; a list of messages; or {"prompt": text} for the completions API
        own       what the built-in teacher answers: a function without arguments
        mark      tells equal questions apart, each of which is to be answered
        """
        if self.args.dry_run:
            self.spent.update(answers=1, read=len(json.dumps(question)) // 4)
            print("" if self.spent["answers"] > 2 else f"{question}\n\n", end="")
            raise Refused("a dry run")
        body = question if isinstance(question, dict) else {"messages": [{"role": "user", "content": question}] if isinstance(question, str) else question}
        body = dict(body, temperature=self.args.temperature if temperature is None else temperature, max_tokens=self.args.max_answer)
        known = json.dumps([body, mark])
        rng = random.Random(known)  # teachers in a random order by weight, the same in every run
        order = [teacher] if teacher else sorted(self.args.teacher, key=lambda t: -rng.random() ** (1 / t.weight))
        for attempt in range(self.args.asks):
            keys = [hashlib.blake2b(json.dumps([t.name, known, attempt]).encode(), digest_size=12).hexdigest() for t in order]
            at, size = next((self.lines[key] for key in keys if key in self.lines), (0, 0))
            entry = json.loads(os.pread(self.file.fileno(), size, at)) if size else self.buy(order, keys, body, read, own)
            if not (reason := entry["reason"]):
                try:
                    return read(entry["text"]), entry["teacher"]
                except Refused as error:
                    reason = str(error)
            with contextlib.suppress(Refused):
                self.refuse(reason)
        raise Refused(reason)

    def refuse(self, why):
        with self.lock:
            self.why[why] += 1
        raise Refused(why)

    def buy(self, order, keys, body, read, own):
        """The ledger's entry for an answer of the first teacher in `order` that can give one."""
        size = len(json.dumps(body)) // 3 + self.args.max_answer
        for teacher, key in zip(order, keys):
            for tries in range(self.args.retries + 1):
                if teacher.out:
                    break
                if teacher.url is None:
                    return {"text": own(), "reason": None, "teacher": "builtin"}
                self.admit(teacher, size)
                try:
                    status, content, wait = teacher.post(body, "completions" if "prompt" in body else "chat/completions", self.args)
                    if status == 200:
                        return self.keep(key, teacher, body, content, read)
                finally:
                    with self.lock:
                        self.held -= size
                        self.lock.notify_all()
                if status in (400, 413, 422):  # this question is at fault, not the teacher
                    self.refuse(f"HTTP {status}")
                passing = status in (0, 408, 409, 429) or status >= 500
                with self.lock:
                    teacher.free_at = max(teacher.free_at, time.monotonic() + wait)
                    teacher.failures += passing and tries == self.args.retries
                    if (teacher.failures >= 3 or not passing) and not teacher.out:
                        said = content.decode("utf-8", "replace").replace(teacher.key or "\0", "***")
                        teacher.out = f"HTTP {status}: {' '.join(said.split())[:200]}"
                        print(f"synth.py: {teacher.name} is set aside: {teacher.out}", file=sys.stderr)
                if tries < self.args.retries and passing:
                    self.pause(min(60.0, self.args.backoff * 2 ** tries) * random.uniform(0.5, 1.0))
        if all(t.out for t in order):
            raise Ended("no teacher is left that answers (see above)")
        self.refuse("no answer")  # of this question; it is asked again in the next run

    def keep(self, key, teacher, body, content, read):
        text, reason, n_read, written = parse_reply(content)
        entry = {"key": key, "teacher": teacher.name, "text": text, "reason": reason or why_not(read, text),
                 "read": n_read or len(json.dumps(body)) // 4, "written": written}
        line = json.dumps(entry).encode() + b"\n"
        with self.lock:
            teacher.failures, at = 0, self.file.seek(0, 2)
            self.file.write(line)
            self.file.flush()
            self.note(entry, at, len(line))
        return entry

    def admit(self, teacher, size):
        """Waits until the teacher may be asked for `size` tokens; raises Ended where the budget is spent."""
        args, worst = self.args, max(self.args.price_in, self.args.price_out) / 1e6
        with self.lock:
            while not self.stopped and (args.max_tokens and self.spent["read"] + self.spent["written"] + self.held + size > args.max_tokens
                                        or args.max_usd and self.cost(self.spent) + (self.held + size) * worst > args.max_usd):
                if not self.held:
                    raise Ended(f"the budget is spent: {self.spent['read'] + self.spent['written']:,} tokens, {self.cost(self.spent):.2f} USD with all earlier runs")
                self.lock.wait()
            if self.stopped:
                raise Ended(self.stopped)
            self.held += size
            start = max(time.monotonic(), teacher.free_at)
            teacher.free_at = start + max(60 / args.requests_per_minute if args.requests_per_minute else 0,
                                          60 * size / args.tokens_per_minute if args.tokens_per_minute else 0)
        self.pause(start - time.monotonic())


# ---------------------------------------------------------------------------------------------------------------------
# What teachers are asked, and how their answers are read. Variety comes from what is drawn: topic, level, audience, style and words that must occur
# (TinyStories, section 2; phi-1 for the names of functions).

DRY = 50  # questions that a dry run makes up to estimate the cost
TOPICS = ("lists of numbers, searching, sorting, counting, strings, dictionaries, loops, conditions, functions, recursion, divisibility, primes, fractions, "
          "geometry, probability, averages, sequences, sets, stacks, queues, graphs, simulation, dates, units, formatting, errors, money, games, logic").split(", ")
LEVELS = ("introductory", "intermediate", "advanced")
STYLES = ("a plain explanation", "a worked case study", "questions and answers", "notes of a lecture", "a story about a problem", "a letter to a friend")
FORMS = {"passage": "a passage of a textbook", "dialogue": "a dialogue of a student and a teacher", "questions": "questions, each followed by its answer"}
THEMES = {"task": "The user sets a task about {topic}, which the assistant solves and explains.",
          "reasoning": "The user poses a problem about {topic} that takes several steps of reasoning; the assistant writes them out one by one.",
          "refusal": "The user asks for something harmful; the assistant declines in one kind sentence, says why, and offers something better.",
          "identity": "The user asks who the assistant is: minphi, a small open language model that can be wrong."}
PROMPTS = {
    "topics": "We plan a curriculum. List 12 subtopics of \"{topic}\", each of two to six words, one a line, and nothing else.",
    "textbooks": "Write one page of a textbook on {topic} ({level}, {audience}), as {style}. Define what it is about; give a worked example or Python code that runs as "
                 "it stands, in a ```python block; say why and not only how; name a common mistake. It stands alone: no links, pictures, other chapters. "
                 "Use the words {words} where they fit. Answer with the page alone, in Markdown.",
    "exercises": "Write a Python exercise on {topic} ({level}, {audience}): a function whose name contains \"{name}\", its docstring saying exactly what is to be "
                 "returned, with an example about {words}, and a correct body, with the standard library alone. Then tests: a function check(candidate) of at least "
                 "five asserts, edge cases among them, that an empty or constant function fails. Answer with two ```python blocks: the function; the tests.",
    "label": "How much does this document teach a student who wants to learn the basic ideas of programming and general knowledge? It should explain its purpose, "
             "stand alone, be clear, and work something out, rather than be glue, settings, data, a test, or generated. Answer with one line: SCORE, a number "
             "from 0 (nothing) to 5 (a good lesson), and a short reason.\n\n{text}",
    "rewrite": "Rewrite this document as {form}, clear and complete without it. Keep its facts, names and numbers; add none. Answer with the text alone.\n\n{text}",
    "chat": "Write a conversation of a user and an assistant, {turns} turns each, before every message a line \"### User\" or "
            "\"### Assistant\". {theme} Written {audience}.\n\n{text}",
    "solve": "Complete this function. Answer with the whole function in one ```python block.\n\n{text}",
    "compare": "Which answer is better: more correct, complete, clear? Reply with one letter, A or B.\n\nQuestion:\n{text}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}"}


def why_not(read, text):
    """The reason for which `read` refuses a text, or None."""
    try:
        read(text)
    except Refused as error:
        return str(error)


def read_text(text):
    if re.match(r"\W*(?:I['’]m sorry|I am sorry|Sorry|I cannot|I can['’]t|As an AI)", text):
        raise Refused("refusal")
    return text.strip() + "\n"


def code_blocks(text):
    return re.findall(r"^```(?:python|py)?[ ]*\n(.*?)^```", text, re.S | re.M)


def split_function(code, name=None):
    """Source -> (all up to the docstring of its last function, or of `name`; the body after it; the name), as HumanEval divides a problem."""
    try:
        found = [n for n in ast.parse(code).body if isinstance(n, ast.FunctionDef) and name in (None, n.name)]
    except (SyntaxError, ValueError, RecursionError):
        raise Refused("code does not parse") from None
    if not found or name is None and not ast.get_docstring(found[-1]):
        raise Refused("no function with a docstring")
    told = ast.get_docstring(found[-1]) is not None
    lines, end = code.rstrip("\n").split("\n"), found[-1].body[0].end_lineno if told else found[-1].body[0].lineno - 1
    return "\n".join(lines[:end]) + "\n", "\n".join(lines[end:]) + "\n", found[-1].name


def read_exercise(text):
    blocks = code_blocks(read_text(text))
    if len(blocks) != 2 or "def check(" not in blocks[1] or blocks[1].count("assert ") < 3:
        raise Refused("not a function and its tests in two blocks")
    return dict(zip(("prompt", "canonical_solution", "entry_point", "test"), [*split_function(blocks[0]), blocks[1]]))


def read_score(text):
    if found := re.search(r"SCORE\W*([0-5])\b[\W_]*([^\n]*)", text, re.I):
        return int(found[1]), found[2]
    raise Refused("no score")


def read_chat(text):
    parts = re.split(r"^#+ *(User|Assistant):? *\n", text.strip() + "\n", flags=re.M | re.I)
    messages = [{"role": role.lower(), "content": content.strip()} for role, content in zip(parts[1::2], parts[2::2])]
    if not messages or [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2) or not all(m["content"] for m in messages):
        raise Refused("not a conversation by turns")
    return messages


def prose_of(text):
    """What a document says in words: of Python, its docstrings."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
    return text


def read_rewrite(source, text):
    """The text, unless it has numbers that its source has not, or less than a third of the source's numbers and names."""
    prose, number = prose_of(source), r"\d+(?:\.\d+)?"
    facts = set(re.findall(f"{number}|(?<=[a-z,] )[A-Z][a-z]{{2,}}", prose))
    if any(len(new) > 1 for new in set(re.findall(number, read_text(text))) - set(re.findall(number, source))):
        raise Refused("invents numbers")
    if sum(fact in text for fact in facts) < len(facts) / 3:
        raise Refused("loses facts")
    return text.strip() + "\n"


def read_choice(text):
    if found := re.search(r"\b([AB])\b", text):
        return found[1]
    raise Refused("no choice")


def solution_of(problem, text):
    """The completion of a problem's prompt: the answer up to the next line at the margin, or what its block of code has after the docstring."""
    if not (blocks := code_blocks(text)):
        return re.split(r"\n(?=[^\s#)\]}])", text)[0].rstrip("\n") + "\n"
    with contextlib.suppress(Refused):
        return split_function(blocks[0], problem["entry_point"])[1]
    return blocks[0]


def own_rewrite(text, form):
    """The built-in teacher's rewriting: the source's whole sentences that are no noise, word for word, in another form."""
    said = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+|\n\s*\n", prose_of(text))]
    said = [s for s in said if s.endswith(".") and 5 <= len(s.split()) <= 40 and not NOISE.search(s)]
    if form == "passage":
        return "\n\n".join(" ".join(said[i:i + 4]) for i in range(0, len(said), 4))
    subjects = [re.match(r"(?:An? |The )?[\w'-]+(?: [\w'-]+){0,3}? (?=is |are |has |have |can |must |returns? )", s) for s in said]
    asked = [f"What can you say of {m[0][0].lower() + m[0][1:].strip()}?" if m else "What else is there to know?" for m in subjects]
    names = ("Student", "Teacher") if form == "dialogue" else ("Question", "Answer")
    return "\n\n".join(f"{names[0]}: {question}\n\n{names[1]}: {answer}" for question, answer in zip(asked, said))


def own_chat(i, theme, turns, args):
    """The built-in teacher's conversation: an exercise, worked step by step for some inputs; or a fixed refusal or introduction in varied words."""
    rng = random.Random(f"{args.seed} chat {i}")
    if theme == "identity":
        talk = [rng.choice(("Who are you?", "What are you?", "Who am I talking to?", "Introduce yourself."))]
        talk += ["I am minphi, a small open language model. I can explain and write simple Python, and I can be wrong: please check what I say."]
    elif theme == "refusal":
        harm, better = rng.choice((("steal a password", "protect your own"), ("write a virus", "learn how programs are kept safe"),
                                   ("forge a signature", "sign a document digitally"), ("cheat in an exam", "practise for it"), ("make a weapon", "learn physics")))
        talk = [f"{rng.choice(('Help me to', 'Tell me how to', 'I want to'))} {harm}.",
                f"I won't help to {harm}, because it could hurt people. I would gladly help you to {better} instead."]
    else:
        while len((problem := draw_problem(i, "train", args.k, args.seed))["chains"]) > 1:
            i += 1_000_003
        (chain,), name = problem["chains"], problem["entry_point"]
        talk = [f"Please complete this function.\n\n```python\n{problem['prompt']}```", f"```python\n{problem['prompt']}{problem['canonical_solution']}```"]
        while len(talk) < 2 * turns:
            value = draw_input(OPS[chain[0][0]].source, rng)
            with contextlib.suppress(TooLarge):
                steps = [f"{n}. {OPS[o].phrases[0].format(c=c)}: {v!r}" for n, ((o, c), v) in enumerate(zip(chain, run_chain(chain, value)), 1)]
                talk += [f"What is `{name}({value!r})`?", "\n".join([f"We start from {value!r}.", *steps, f"So the answer is {steps[-1].split(': ', 1)[1]}."])]
    return "".join(f"### {('User', 'Assistant')[n % 2]}\n{said}\n\n" for n, said in enumerate(talk))


def own_solution(problem, rng):
    """The problem's solution; every other time with one of its numbers, operators or names of functions exchanged: an error to learn from."""
    code = problem["canonical_solution"]
    spots = list(re.finditer(r"\b\d+\b|(?<= )[<>+*-](?= )|==|\b(?:max|min|sum|len)\b(?=\()", code))
    if not spots or rng.random() < 0.5:
        return code
    spot, other = rng.choice(spots), {"<": ">", ">": "<", "+": "-", "-": "+", "*": "+", "==": "!=", "max": "min", "min": "max", "sum": "len", "len": "sum"}
    return code[:spot.start()] + other.get(spot[0], str(int(spot[0]) + 1) if spot[0].isdigit() else "") + code[spot.end():]


def write(desk, kind, i, item, topics):
    """Record i of a kind, made of the document or problem `item` where the kind has a FILE. Raises Refused, Ended."""
    args, rng = desk.args, random.Random(f"{desk.args.seed} {kind} {i}")
    form, theme, turns = rng.choice(list(FORMS)), rng.choices(list(THEMES), (10, 6, 2, 1))[0], rng.randint(1, 3)
    drawn = dict(topic=rng.choice(topics), level=rng.choice(LEVELS), audience=rng.choice(AUDIENCES), style=rng.choice(STYLES), name=rng.choice(VERBS),
                 words=", ".join([rng.choice(VERBS), *rng.sample(WORDS, 2)]))
    text, mark = (item or {}).get("text", "")[:args.max_chars], f"{args.seed} {i}" if not item else ""
    if args.plain:
        drawn.update(level="any level", audience="for anyone", style="a page", words="that you like", name="")
    question = PROMPTS[kind].format(**drawn, text=text, form=FORMS[form], turns=turns, theme=THEMES[theme].format(**drawn)) if kind in PROMPTS else ""
    if kind == "textbooks":
        text, teacher = desk.ask(question, read_text, lambda: draw_problem(i, "train", args.k, args.seed, True)["text"], mark)
        record = {"text": text, **drawn}
    elif kind == "exercises":
        def own():
            problem = draw_problem(i, "train", args.k, args.seed)
            return f"```python\n{problem['prompt']}{problem['canonical_solution']}```\n\n```python\n{problem['test']}```"
        problem, teacher = desk.ask(question, read_exercise, own, mark)
        record = {"task_id": f"{args.seed}/{i}", **problem, "topic": drawn["topic"]}
    elif kind == "label":
        asked = [desk.ask(question, read_score, lambda: "SCORE {}: {}".format(*grade(item["text"], item["id"])), str(n)) for n in range(args.repeat)]
        scores, teacher = [score for (score, _), _ in asked], asked[0][1]
        record = {**item, "score": round(sum(scores) / len(scores)), "reason": asked[0][0][1], **({"scores": scores} if args.repeat > 1 else {})}
    elif kind == "rewrite":
        text, teacher = desk.ask(question, functools.partial(read_rewrite, text), lambda: own_rewrite(text, form))
        record = {"id": item["id"], "text": text, "form": form}
    elif kind == "chat":
        messages, teacher = desk.ask(question, read_chat, lambda: own_chat(i, theme, turns, args), mark)
        record = {"messages": messages, "theme": theme}
    else:
        return prefer(desk, item, rng)
    return {**record, "teacher": teacher}


def prefer(desk, item, rng):
    """The answers of several teachers or temperatures to one question: all of them where tests will judge them, else the better and the worse one."""
    args, tested = desk.args, "test" in item
    question = item.get("messages") or item.get("prompt") or item["text"]
    if tested:
        question = {"prompt": question, "stop": ["\ndef ", "\nclass ", "\nprint(", "\nif __name__"]} if args.api == "completions" else PROMPTS["solve"].format(text=question)
    answers = {}
    for n in range(args.samples):
        with contextlib.suppress(Refused):
            warmth = args.temperature * (0.5 + n / args.samples)
            text, teacher = desk.ask(question, str if tested else read_text, lambda: own_solution(item, rng), str(n), temperature=warmth)
            answers.setdefault(solution_of(item, text) if tested else text.strip(), teacher)
    if tested:
        return {"problem": item, "answers": answers}
    if len(answers) < 2:
        desk.refuse("the same answer every time")
    (a, of_a), (b, of_b) = list(answers.items())[:2]
    told, judge_by = question if isinstance(question, str) else question[-1]["content"], rng.choice(args.judge or args.teacher)
    votes = [desk.ask(PROMPTS["compare"].format(text=told, a=x, b=y), read_choice, lambda: "AB"[grade(y)[0] > grade(x)[0]], "", judge_by, 0.0)[0]
             for x, y in ((a, b), (b, a))]  # both ways round, for judges prefer the first or the last
    if votes[0] == votes[1]:
        desk.refuse("the judge prefers a place, not an answer")
    if votes[0] == "B":
        (a, of_a), (b, of_b) = (b, of_b), (a, of_a)
    return {"messages" if "messages" in item else "prompt": question, "chosen": a, "rejected": b, "teacher": f"{of_a} over {of_b}"}


CONSTANTS = """
def check(candidate, check=check):
    check(candidate)
    for value in (None, 0, 1, True, "", [], {}):
        try:
            check(lambda *args, **named: value)
        except Exception:
            continue
        raise ValueError(f"the tests accept a function that always returns {value!r}")
"""  # goes after an exercise's tests


def content_of(record):
    """The text of a record of any kind."""
    if "chosen" not in record and "messages" in record:
        return "\n".join(message["content"] for message in record["messages"])
    return record.get("text") or record.get("prompt", "") + record.get("canonical_solution", record.get("chosen", ""))


class Gates:
    """What a record must pass, the cheap tests first; counts what enters and leaves each."""

    def __init__(self, desk, kind):
        import data
        self.desk, self.kind, self.counts, self.bands, self.signatures, self.shown = desk, kind, {}, {}, [], []
        self.contamination = data.Contamination(desk.args.against) if desk.args.against else None

    def run_code(self, records):
        """An exercise's solution must pass its tests, which functions that return a constant must not; a page's code must parse and run."""
        if self.kind == "exercises":
            pairs = [(dict(r, test=r["test"] + CONSTANTS), r["canonical_solution"]) for r in records]
        else:
            pairs = [({"test_list": []}, "\n".join(block for block in code_blocks(r["text"]) if ">>>" not in block)) for r in records]
        return [verdict.passed for verdict in judge_all(pairs, workers=self.desk.args.workers)]

    def is_new(self, signature):
        """Whether no text so far resembles the one with this MinHash signature (Jaccard similarity of 0.8; bands as in data.py, each with its first text)."""
        bands = [hash((n, band.tobytes())) for n, band in enumerate(signature.reshape(14, 8))]
        if any((self.signatures[self.bands[band]] == signature).mean() >= 0.8 for band in bands if band in self.bands):
            return False
        for band in bands:
            self.bands.setdefault(band, len(self.signatures))
        self.signatures.append(signature.copy())  # a row of its own: a view would hold the whole round's
        return True

    def grade(self, record):
        question = PROMPTS["label"].format(text=content_of(record)[:self.desk.args.max_chars])
        judge_by = random.Random(question).choice(self.desk.args.judge)
        record["grade"] = self.desk.ask(question, read_score, lambda: f"SCORE {grade(content_of(record))[0]}", teacher=judge_by, temperature=0.0)[0][0]
        return record["grade"] >= self.desk.args.min_grade

    def __call__(self, records):
        import data
        args, pages = self.desk.args, self.kind == "textbooks"
        tests = {} if self.kind == "label" else {"long enough": lambda rs: [len(content_of(r)) >= args.min_chars for r in rs]}
        if pages:
            tests["stands alone"] = lambda rs: [not ELSEWHERE.search(r["text"]) for r in rs]
            tests["explains"] = lambda rs: [bool(WHY.search(r["text"]) or "mistake" in r["text"]) for r in rs]
            tests["shows"] = lambda rs: [bool(code_blocks(r["text"]) or EXAMPLE.search(r["text"])) for r in rs]
        if pages or self.kind == "exercises":
            tests["code runs"] = self.run_code
        if self.contamination:
            tests["not of --against"] = lambda rs: [not (i in hits or self.contamination.find_functions(content_of(r)))
                                                    for hits in [self.contamination.find([content_of(r) for r in rs])] for i, r in enumerate(rs)]
        if self.kind not in ("preferences", "label"):
            tests["no near-duplicate"] = lambda rs: list(map(self.is_new, data.minhash([content_of(r) for r in rs])))
        if args.judge and self.kind != "preferences":
            tests[f"grade {args.min_grade} or more"] = lambda rs: [flag is True for flag in self.desk.run(self.grade, rs)]
        for name, test in tests.items():
            flags = test(records) if records else []
            self.counts.setdefault(name, Counter()).update(entered=len(flags), left=sum(flags))
            records = [record for record, passed in zip(records, flags) if passed]
        return records

    def report(self):
        desk = self.desk
        for name, count in self.counts.items():
            print(f"  {name:<24}{count['entered']:>9,} ->{count['left']:>9,}  {count['left'] / max(1, count['entered']):7.1%}")
        for n in (1, 2, 3):
            grams = [tuple(words[i:i + n]) for words in map(str.split, self.shown) for i in range(len(words) - n + 1)]
            print(f"  distinct-{n:<15}{len(set(grams)):>9,} of{len(grams):>9,}  {len(set(grams)) / max(1, len(grams)):7.1%}")
        for name, t in desk.tally.items():
            print(f"  {name}: {t['answers']:,} answers with all earlier runs, {t['refused']:,} of no use; {t['read']:,} tokens read, "
                  f"{t['written']:,} written, {desk.cost(t):.2f} USD")
        if desk.why:
            print("  of no use:", ", ".join(f"{why} {count:,}" for why, count in desk.why.most_common()))


def preferences_by_tests(records, workers):
    """[{"problem", "answers"}] -> a preference for each problem with both an answer that passes its tests and one that fails, run in the sandbox."""
    pairs = [(k, answer) for k, record in enumerate(records) for answer in record["answers"]]
    split = {k: ([], []) for k in range(len(records))}
    for (k, answer), verdict in zip(pairs, judge_all([(records[k]["problem"], answer) for k, answer in pairs], workers=workers)):
        split[k][not verdict.passed].append(answer)
    return [{"task_id": r["problem"].get("task_id"), "prompt": r["problem"]["prompt"], "chosen": good[0], "rejected": bad[0],
             "teacher": f"{r['answers'][good[0]]} over {r['answers'][bad[0]]}"} for r, (good, bad) in zip(records, split.values()) if good and bad]


def produce(desk, gates, kind, items, topics):
    """Yields the records that pass the gates, in rounds of at most 4,096 questions, until there are --count, or the items or the hope are at an end."""
    args, asked, found = desk.args, 0, 0
    while found < args.count and not desk.stopped and (items is None or asked < len(items)):
        numbers = range(asked, asked + min(args.count - found, DRY if args.dry_run else 4096, 4096 if items is None else len(items) - asked))
        records = [r for r in desk.run(lambda i: write(desk, kind, i, items and items[i], topics), numbers) if isinstance(r, dict)]
        asked = numbers.stop
        by_tests = preferences_by_tests([r for r in records if "answers" in r], args.workers)
        records = gates([r for r in records if "answers" not in r] + by_tests)
        found += len(records)
        yield from records
        if args.dry_run:
            return
        if items is None and asked >= 200 and found < asked / 50:
            desk.stop(f"only {found:,} of {asked:,} answers are of use; see the report and the answers in the ledger")


def key_of(topic):
    """What near-duplicates of a topic have in common. Example: key_of("Sorting of lists") == key_of("List sorting")"""
    return frozenset(word.rstrip("s") for word in re.findall(r"\w+", topic.lower()) if word not in ("of", "the", "and", "a", "an", "in", "for", "to", "with"))


def grow_topics(desk, roots):
    """A tree of topics as indented lines: subtopics of subtopics, breadth first, until there are --count leaves or no new ones come."""
    children, level, seen, leaves = {(): [(root,) for root in roots]}, [(root,) for root in roots], set(map(key_of, roots)), len(roots)

    def subtopics(path):
        rng = random.Random(f"{desk.args.seed} {path}")
        def own():
            return "\n".join(", then ".join(rng.choice(OPS[o].phrases).format(c=c) for o, c in draw_chain(len(path), "train", rng)) for _ in range(12))
        return desk.ask(PROMPTS["topics"].format(topic=" > ".join(path)), read_topics, own)[0]

    while level and leaves < desk.args.count and not desk.stopped:
        below = []
        for path, names in zip(level, desk.run(subtopics, level)):
            for name in names if isinstance(names, list) else ():
                if key_of(name) not in seen and leaves < desk.args.count:
                    seen.add(key_of(name))
                    leaves += path in children  # its first child takes its parent's place among the leaves
                    children.setdefault(path, []).append((*path, name))
                    below.append((*path, name))
        level = below

    def lines(path):
        for child in children.get(path, ()):
            yield "  " * len(path) + child[-1]
            yield from lines(child)
    return list(lines(()))


def read_topics(text):
    names = [re.sub(r"^[\s\d.)*•-]+", "", line).strip().rstrip(".") for line in read_text(text).split("\n")]
    names = [name for name in names if 3 <= len(name) <= 120]
    if len(names) < 2:
        raise Refused("no list")
    return names


def leaves_of(path):
    """The leaves of a file of indented topics, each as "topic > subtopic > ..."."""
    with open(path, encoding="utf-8") as file:
        rows = [(len(line) - len(line.lstrip()), line.strip()) for line in file if line.strip()]
    above, found = [], []
    for (depth, name), (after, _) in zip(rows, [*rows[1:], (0, "")]):
        above = [(d, n) for d, n in above if d < depth] + [(depth, name)]
        found += [" > ".join(n for _, n in above)] * (after <= depth)
    if not found:
        raise ValueError(f"{path} has no topics; make some with python synth.py topics --out {path}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The sandbox. The decision must not lie in the interpreter that runs the program, for there it can be forged: builtins
# patched, frames read, the process left with a friendly exit code. So four processes, each forked from a small one:
#
#   this process ──▶ server (one per worker) ──▶ keeper ──▶ tests ──▶ program
#                                      (one of each per problem)
#
# The program answers calls over a pipe in plain data; it never holds the tests, not even in its memory, nor any channel on which a verdict travels.
# The tests run `check(candidate)` on values they rebuilt themselves. The keeper holds the clock, kills everything and passes the verdict on.
#
# Protects from: everything a Python program does to the interpreter it runs in; endless loops, memory, output; on Linux, by whichever of namespaces,
# Landlock and seccomp the kernel grants (`python synth.py sandbox` says which), network, reading other files than the system's and Python's own,
# writing outside the scratch directory, signalling or reading other processes, rare system calls; by namespaces alone: processes left behind, more
# than 64 MB of files. Root becomes `nobody` where the standard library is readable for everyone. Does not protect from: exploits of the kernel; 32
# processes of `memory_mb` each (root that cannot become nobody: some 300). Where none of the three is granted (macOS, some containers) a program aimed
# at this sandbox can write files, use the network and attack the user's other processes; use a container or a virtual machine there.


class NotPlain(TypeError):
    """A value that cannot travel between program and tests; the message is its type's name."""


def pack(value):
    """Plain data as JSON can carry it, e.g. (1, {2}) -> {"tuple": [1, {"set": [2]}]}. Subclasses become their plain base,
    so no method of theirs (a lying __eq__) survives; iterators are spent. Raises NotPlain."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else {"int": hex(value)}  # hex: decimal has a limit of 4,300 digits
    if isinstance(value, list):
        return [pack(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[pack(k), pack(v)] for k, v in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(v) for v in value]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if hasattr(value, "__next__"):
        return {"iter": [pack(v) for v in value]}
    raise NotPlain(type(value).__name__)


def unpack(value):
    """The inverse of pack: builds exact builtin types only. Raises some Exception on anything pack does not write."""
    if isinstance(value, list):
        return [unpack(v) for v in value]
    if not isinstance(value, dict):
        return value
    (kind, body), = value.items()
    if kind == "dict":
        return {unpack(k): unpack(v) for k, v in body}
    if kind in ("int", "bytes"):
        return int(body, 16) if kind == "int" else bytes.fromhex(body)
    if kind in ("complex", "range"):
        return complex(*body) if kind == "complex" else range(*body)
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "iter": iter}[kind]([unpack(v) for v in body])


def write_frame(fd, payload):
    payload = memoryview(struct.pack("<I", len(payload)) + payload)
    while payload:
        payload = payload[os.write(fd, payload):]


def read_frame(fd, limit=1 << 30):
    """The next payload, or None at the end of the stream. Raises ValueError above `limit` bytes."""
    def exactly(n):
        parts = []
        while n:
            parts.append(os.read(fd, min(n, 1 << 20)))
            if not parts[-1]:
                return None
            n -= len(parts[-1])
        return b"".join(parts)
    head = exactly(4)
    if head is None:
        return None
    size, = struct.unpack("<I", head)
    if size > limit:
        raise ValueError(f"an answer of {size} bytes")
    return exactly(size)


def run_program(program, ask, answer):
    """The program's process: define its functions, then answer [name, args, kwargs] with one of ["ready"], ["value", plain],
    ["other", type name] or ["raise", names of the exception's classes, message], until killed."""
    module = sys.modules["solution"] = type(sys)("solution")
    reply = ["ready"]
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        reply = ["raise", [c.__name__ for c in type(error).__mro__], str(error)]
    while True:
        write_frame(answer, json.dumps(reply).encode())
        frame = read_frame(ask)
        if frame is None:
            os._exit(0)
        try:
            name, args, kwargs = unpack(json.loads(frame))
            reply = ["value", pack(module.__dict__[name](*args, **kwargs))]
        except NotPlain as error:
            reply = ["other", str(error)]
        except BaseException as error:
            reply = ["raise", [c.__name__ for c in type(error).__mro__], str(error)]


def run_tests(job, ask, answer, verdict, program_pid):
    """The tests' process: run job's tests with proxies for the program's functions, write the verdict, exit."""
    def finish(passed, reason):  # exits at once, so that no `except:` of the tests can swallow a failure
        os.write(verdict, (b"+" if passed else b"-") + " ".join(reason[:300].split()).encode("utf-8", "replace"))
        os._exit(0)

    def hear():
        """The program's next answer: returns its value, raises its exception, or ends it all."""
        try:
            frame = read_frame(answer, 16 << 20)
        except ValueError as error:
            finish(False, f"gave {error}")
        if frame is not None:
            try:
                kind, *reply = json.loads(frame)
                if kind in ("ready", "value"):
                    return unpack(reply[0]) if reply else None
                if kind == "other":
                    finish(False, f"returned a {reply[0]} that is not plain data")
                names, message = reply
                told = f"raised {names[0]}: {message}"
                classes = [namespace.get(name, getattr(builtins, name, None)) for name in names]
                error = next((c(str(message)) for c in classes if isinstance(c, type) and issubclass(c, Exception)), None)
            except Exception:
                finish(False, "answered with broken data")
            if error is None:  # SystemExit and its like, which nothing here should catch
                finish(False, told)
            raise error
        for _ in range(50):  # its pipe is closed: is it dead, and of what?
            pid, status = os.waitpid(program_pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                finish(False, f"exited with code {code} instead of answering" if code >= 0 else
                       "timed out" if -code == signal.SIGXCPU else f"killed by {signal.Signals(-code).name}")
            time.sleep(0.001)
        finish(False, "closed its pipe instead of answering")

    def proxy(name):
        def candidate(*args, **kwargs):
            nonlocal last
            try:
                request = json.dumps(pack([name, args, kwargs])).encode()
            except NotPlain as error:
                finish(False, f"the tests pass a {error}, which is not plain data")
            last = (name, args, kwargs)
            if select.select([answer], [], [], 0)[0]:
                try:
                    hear()
                finally:
                    finish(False, "answered before it was asked")
            with contextlib.suppress(BrokenPipeError):  # hear() finds out why
                write_frame(ask, request)
            last += (hear(),)
            return last[-1]
        candidate.__name__ = name
        return candidate

    last, namespace = (), {"__name__": "tests"}
    random.seed(job["test"])  # the same questions every time, and not the program's own random numbers
    try:
        hear()
        # The prompt's other functions may be used by the tests; the tests' copy of them is out of the program's reach.
        for prompt in (job["prompt"], job["prompt"] + "\n    pass\n"):
            try:
                exec(compile(prompt, "<prompt>", "exec"), namespace)
                break
            except SyntaxError:
                pass
        exec(compile(job["setup"], "<setup>", "exec"), namespace)
        if job["entry_point"] is None:  # MBPP: what the tests call and nobody else defines is the program's
            calls = [n.func for n in ast.walk(ast.parse(job["test"])) if isinstance(n, ast.Call)]
            names = {f.id for f in calls if isinstance(f, ast.Name)}
            namespace.update({name: proxy(name) for name in names if name not in namespace and not hasattr(builtins, name)})
            exec(compile(job["test"], "<test>", "exec"), namespace)
        else:
            candidate = namespace[job["entry_point"]] = proxy(job["entry_point"])
            exec(compile(job["test"], "<test>", "exec"), namespace)
            namespace["check"](candidate)
    except AssertionError as error:
        try:
            name, args, kwargs, value = last
            told = ", ".join([repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()])
            finish(False, f"wrong answer: {name}({told[:120]}) gave {repr(value)[:120]}")
        except ValueError:  # no answer yet, or an int too long to print
            finish(False, f"raised AssertionError: {error}")
    except MemoryError:
        finish(False, "out of memory")
    except BaseException as error:
        finish(False, f"raised {type(error).__name__}: {error}")
    finish(True, "passed")


def system(name, *args):
    """A Linux system or libc call by name; True where it was granted, False where it was not or there is none."""
    try:
        args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
        return sys.platform == "linux" and getattr(ctypes.CDLL(None), name)(*args) == 0
    except (AttributeError, OSError):
        return False


def write_file(path, text):
    with contextlib.suppress(OSError), open(path, "w") as f:
        f.write(text)


def confine(scratch):
    """Once per server: what can be given up for all problems alike. Each step that the system refuses is left out; returns those granted."""
    granted, uid, gid, library = [], os.geteuid(), os.getegid(), os.path.realpath(os.__file__)
    home = os.path.realpath(os.path.expanduser("~"))
    parents = [library[:i] or "/" for i, c in enumerate(library) if c == "/"]
    if uid == 0 and all(os.stat(p).st_mode & 5 == 5 for p in parents):
        uid = gid = 65534  # nobody: unlike root, it owns no files and RLIMIT_NPROC holds for it
        os.chown(scratch, uid, gid)
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
        granted.append("nobody's rights instead of root's")
        system("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else our own uid_map belongs to root
    if system("unshare", 0x10000000 | 0x40000000 | 0x08000000 | 0x00020000):  # user, net, ipc, mount
        granted.append("namespaces (user, process, network, mount)")
        write_file("/proc/self/setgroups", "deny")
        write_file("/proc/self/uid_map", f"{uid} {uid} 1")
        write_file("/proc/self/gid_map", f"{gid} {gid} 1")
        write_file("/proc/sys/user/max_user_namespaces", "0")
        for hidden in (home, "/run"):
            if hidden != "/" and not any(p.startswith(hidden + "/") for p in [library, scratch]):
                system("mount", b"none", os.fsencode(hidden), b"tmpfs", 2 | 4, b"size=4k")
        exceptions = [os.fsencode(scratch), b"/dev/null"]
        if all([system("mount", path, path, None, 4096, None) for path in exceptions]):  # MS_BIND: now with flags of their own
            # mount_setattr, recursive: all read-only, no setuid, no devices (root owns the raw disks)
            system("syscall", 442, -100, b"/", 0x8000, struct.pack("<4Q", 1 | 2 | 4, 0, 0, 0), 32)
        for path in exceptions:
            system("syscall", 442, -100, path, 0, struct.pack("<4Q", 0, 1 | 4, 0, 0), 32)
    system("prctl", 4, 0, 0, 0, 0)  # not dumpable: no process of ours may attach to another or open its memory
    if (pid := os.fork()) == 0:
        landlock, seccomp = harden(scratch)
        os._exit(landlock + 2 * seccomp)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return granted + ["Landlock"] * (code in (1, 3)) + ["seccomp"] * (code in (2, 3))


def limit(timeout, memory_mb):
    """Limits and loss of privileges, for the tests' and the program's process each."""
    cpu = int(timeout) + 1
    for name, value in dict(AS=memory_mb << 20, CPU=cpu, FSIZE=16 << 20, NOFILE=64, NPROC=32, CORE=0).items():
        with contextlib.suppress(ValueError, OSError):  # above what the user may have anyway, or macOS
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value + (name == "CPU")))


def harden(scratch):
    """For this process and its children: Landlock (reads only the standard library and the system, writes only in scratch, no TCP, no signals to others)
    and seccomp (no sockets, no namespaces, nothing that opens other processes or talks to the kernel's rarer doors). (granted?, granted?)"""
    if sys.platform != "linux":
        return False, False
    system("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS

    def call(*args):
        return ctypes.CDLL(None).syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    landlock, version = False, call(444, None, 0, 1)
    if version > 0:  # landlock_create_ruleset; each version knows more rights: refer, truncate, TCP, devices, signals
        every = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
        rights = struct.pack("<3Q", every, 3, 3)[:24 if version > 5 else 16 if version > 3 else 8]
        ruleset = call(444, rights, len(rights), 0)
        readable = {os.path.dirname(os.__file__), sys.base_prefix + "/lib", "/usr", "/lib", "/lib64", "/etc", "/proc", "/dev"}
        for path, allowed in [(scratch, every), ("/dev/null", 2 | 4 | every & 1 << 14), *((p, 1 | 4 | 8) for p in readable if os.path.isdir(p))]:
            handle = os.open(path, os.O_PATH)
            call(445, ruleset, 1, struct.pack("<Qi", allowed, handle), 0)
            os.close(handle)
        landlock = call(446, ruleset, 0) == 0
        os.close(ruleset)
    x86 = os.uname().machine == "x86_64"
    # socket, ptrace, process_vm_*, mounts, namespaces, bpf, perf, userfaultfd, keys, modules, kexec, handles, syslog, quota, swap, acct, reboot, kcmp
    denied = ((41, 101, 310, 311, 165, 166, 155, 161, 272, 308, 321, 298, 323, 248, 249, 250, 175, 313, 176, 246, 304, 103, 179, 167, 163, 169, 312, 154)
              if x86 else (198, 117, 270, 271, 40, 39, 41, 51, 97, 268, 280, 241, 282, 217, 218, 219, 105, 273, 106, 104, 265, 116, 60, 224, 89, 142, 272))
    denied += (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442)  # io_uring, the new mount calls, pidfd_getfd: the same everywhere
    checks = [(0x15, n, 0x50001) for n in denied] + [(0x15, 435, 0x50026), (0x35, 1 << 30, 0x50001)]  # == n: EPERM; clone3: ENOSYS; x32 calls: EPERM
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, 0xC000003E if x86 else 0xC00000B7), (6, 0, 0, 0x50001), (0x20, 0, 0, 0)]
    lines += [line for test, n, verdict in checks for line in ((test, 0, 1, n), (6, 0, 0, verdict))]
    lines += [(0x15, 0, 3, 56 if x86 else 220), (0x20, 0, 0, 16), (0x45, 0, 1, 0x7E020000), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]  # clone: no namespaces
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in lines))
    filters = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(lines), ctypes.addressof(code)))
    return landlock, os.uname().machine in ("x86_64", "aarch64") and system("prctl", 22, 2, filters, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def supervise(program, timeout, memory_mb, scratch, jobs, verdicts):
    """The keeper of one problem: start its two processes, wait for the verdict, leave nothing alive."""
    system("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the server
    system("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: daemons come back to us
    # in a pid namespace of its own the tests' process is init: it cannot be killed from inside, and all others die with it
    contained = system("unshare", 0x20000000 | 0x00020000)
    private = contained and system("mount", b"none", b"/", None, 0x4000 | 0x40000, None)  # recursive, MS_PRIVATE: unseen outside
    if private:
        system("mount", b"none", os.fsencode(scratch), b"tmpfs", 2 | 4, b"size=64m,nr_inodes=4096,mode=700")  # vanishes with us
    scratch = os.path.join(scratch, "job")
    os.mkdir(scratch)
    tests_in, tests_out = os.pipe()
    verdict_in, verdict_out = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        system("prctl", 1, signal.SIGKILL, 0, 0, 0)
        os.chdir(scratch)
        if private and system("mount", b"proc", b"/proc", b"proc", 2 | 4 | 8, None):
            write_file("/proc/sys/kernel/pid_max", "301")  # per namespace since Linux 6.14; RLIMIT_NPROC does not bind root
            system("mount", None, b"/proc", None, 32 | 4096 | 1 | 2 | 4 | 8, None)  # MS_REMOUNT | MS_BIND, now read-only
        system("capset", struct.pack("<II", 0x20080522, 0), bytes(24))
        ask_in, ask_out = os.pipe()
        answer_in, answer_out = os.pipe()
        program_pid = os.fork()
        if program_pid == 0:  # before the tests arrive, so they are not in its memory
            system("prctl", 1, signal.SIGKILL, 0, 0, 0)
            os.dup2(ask_in, 60), os.dup2(answer_out, 61)
            os.closerange(3, 60)
            limit(timeout, memory_mb)
            harden(scratch)
            try:
                run_program(program, 60, 61)
            finally:
                os._exit(1)
        for fd in set(range(3, 60)) - {tests_in, verdict_out, ask_out, answer_in}:
            with contextlib.suppress(OSError):
                os.close(fd)
        limit(timeout, memory_mb)
        harden(scratch)
        try:
            run_tests(marshal.loads(read_frame(tests_in)), ask_out, answer_in, verdict_out, program_pid)
        finally:
            os._exit(1)
    os.close(tests_in), os.close(verdict_out)
    tests = read_frame(jobs)  # its first 16 bytes are known to nobody inside, and sign the verdict
    with contextlib.suppress(BrokenPipeError):
        write_frame(tests_out, tests[16:])
    verdict = b"-timed out"
    if select.select([verdict_in], [], [], timeout)[0]:
        verdict = os.read(verdict_in, 2048) or b"-the tests' process was killed"
    for kill, target in ((os.killpg, pid), (os.kill, pid)):
        with contextlib.suppress(OSError):
            kill(target, signal.SIGKILL)
    os.waitpid(pid, 0)  # in a pid namespace this returns when all of it is gone
    while not contained:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as f:
                for child in f.read().split():
                    os.kill(int(child), signal.SIGKILL)
            os.waitpid(-1, 0)
        except OSError:  # no children left, or no /proc
            break
    os.write(verdicts, tests[:16] + verdict)


def serve(scratch):
    """The server: fork a keeper for each problem on stdin; [program, timeout, memory_mb] and the tests, two frames each."""
    os.environ.clear()
    sys.path[:] = [p for p in sys.path if p]  # never import from the scratch directory
    jobs, verdicts, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    granted = confine(scratch)
    gc.freeze()  # forks share what is never looked at again
    system("prctl", 1, signal.SIGKILL, 0, 0, 0)
    os.write(verdicts, b"ready" + ", ".join(granted).encode())
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    while select.select([jobs], [], [])[0]:
        verdict_in, verdict_out = os.pipe()
        pid = os.fork()
        if pid == 0:
            header = read_frame(jobs)
            if header is None:
                os._exit(1)
            supervise(*marshal.loads(header), scratch, jobs, verdict_out)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            os._exit(1)  # the end of the jobs; or the keeper was killed, and nobody knows where in the stream we are
        if os.listdir(scratch):  # it was not in memory; a shell knows how to remove a tree however deep and forbidding
            clean = 'chmod -R u+rwx "$0/job"; rm -rf "$0/job"'
            os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", clean, scratch], {}), 0)
        os.write(verdicts, os.read(verdict_in, 4096))
        os.close(verdict_in), os.close(verdict_out)


# The server runs from its functions' source in a bare interpreter: a fork costs under a millisecond there, whatever this
# process has loaded. The modules programs and tests like to import are loaded once, before the forks.
PRELOAD = """import ast, bisect, builtins, collections, contextlib, copy, ctypes, functools, gc, hashlib, heapq, itertools
import json, marshal, math, operator, os, random, re, resource, select, signal, string, struct, sys, time, typing
"""
LAUNCH = "serve(sys.argv[1])\n"
SERVER = (NotPlain, pack, unpack, write_frame, read_frame, run_program, run_tests, system, write_file, confine, limit, harden, supervise, serve)


class Verdict(NamedTuple):
    passed: bool
    reason: str  # "passed", or why not, in one line


class Worker:
    """One server and the problem it works on. Raises RuntimeError if the server does not start."""

    def __init__(self, scratch):
        source = "\n".join([PRELOAD, *map(inspect.getsource, SERVER), LAUNCH])
        # a fixed hash seed: the order of sets, and with it a sloppy program's verdict, is the same every time
        self.process = subprocess.Popen([sys.executable, "-S", "-s", "-c", source, scratch], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, cwd="/", env={"PYTHONHASHSEED": "0"}, start_new_session=True)
        self.index, self.deadline, self.signature = None, 0.0, b"ready"
        message = self.receive()
        if message is None:
            self.close()
            raise RuntimeError(f"the sandbox did not start: see above, and try {sys.executable} -S -c 'import ctypes, json'")
        self.protections = message.decode()

    def send(self, index, job, timeout, memory_mb):
        program, tests = job
        self.index, self.signature = index, os.urandom(16)
        self.deadline = time.monotonic() + timeout + 5.0  # the keeper keeps time; this is for its own death
        with contextlib.suppress(BrokenPipeError):  # receive() finds out
            write_frame(self.process.stdin.fileno(), marshal.dumps([program, timeout, memory_mb]))
            write_frame(self.process.stdin.fileno(), self.signature + marshal.dumps(tests))

    def receive(self):
        """The verdict's bytes (one write, one read), or None if the server has died or somebody else wrote to its pipe."""
        message = os.read(self.process.stdout.fileno(), 1 << 16)
        return message[len(self.signature):] if message.startswith(self.signature) else None

    def close(self):
        self.process.kill()  # its children die with it
        self.process.wait()
        self.process.stdin.close(), self.process.stdout.close()


def job_of(problem, completion):
    """(program, tests) from a problem in HumanEval's or MBPP's fields. Raises ValueError naming what is missing."""
    try:
        if "test_list" in problem:
            setup = "\n".join([*problem.get("test_imports", []), problem.get("test_setup_code") or ""])
            return completion + "\n", dict(prompt="", setup=setup, entry_point=None, test="\n".join(problem["test_list"]))
        tests = {name: problem[name] for name in ("prompt", "entry_point", "test")}
        return problem["prompt"] + completion + "\n", dict(tests, setup="")
    except KeyError as error:
        raise ValueError(f"problem {problem.get('task_id', '?')} has no {error}: it needs prompt, entry_point and test, " "or test_list") from None


def judge_all(pairs, timeout=5.0, memory_mb=512, workers=None, progress=None):
    """Run each (problem, completion) of `pairs` against the problem's tests; a list of Verdicts in the same order.

    timeout    seconds for one problem, wall clock: definitions, tests and answers together
    memory_mb  address space of each process, MiB
    workers    problems at once, default: one per core
    progress   called with 1 after each verdict (tqdm's update)

    The tests see the program's functions only, called with plain data (None, bool, int, float, complex, str, bytes, list,
    tuple, dict, set, frozenset, range; iterators in results), by value: what a function does to its arguments does not show.
    Programs have the standard library, an empty environment and an empty current directory, and no terminal.
    """
    if timeout <= 0 or memory_mb < 64:
        raise ValueError(f"timeout must be above 0 seconds and memory_mb at least 64, not {timeout} and {memory_mb}")
    jobs = [job_of(*pair) for pair in pairs]
    results, waiting, died, idle = [None] * len(jobs), list(range(len(jobs)))[::-1], set(), []
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as root:
        os.chmod(root, 0o711)  # a worker that is nobody must reach its own directory
        busy = []
        try:
            while waiting or busy:
                while waiting and len(busy) < min(workers or os.cpu_count() or 1, len(jobs)):
                    worker = idle.pop() if idle else Worker(tempfile.mkdtemp(dir=root))
                    busy.append(worker)
                    worker.send(waiting[-1], jobs[waiting.pop()], timeout, memory_mb)
                patience = max(0.0, min(w.deadline for w in busy) - time.monotonic())
                ready = select.select([w.process.stdout for w in busy], [], [], patience)[0]
                for worker in [w for w in busy if w.process.stdout in ready or w.deadline < time.monotonic()]:
                    busy.remove(worker)
                    index, verdict = worker.index, worker.receive() if worker.process.stdout in ready else None
                    if verdict is not None:
                        idle.append(worker)
                    else:
                        worker.close()
                        if index not in died:  # once may be an accident, of which the problem is not guilty
                            died.add(index)
                            waiting.append(index)
                            continue
                        verdict = b"-killed or disturbed the sandbox itself, twice"
                    results[index] = Verdict(verdict[:1] == b"+", verdict[1:].decode("utf-8", "replace"))
                    if progress:
                        progress(1)
        finally:
            for worker in busy + idle:
                worker.close()
    return results


def protections():
    """What this machine's kernel grants the sandbox, in words."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as root:
        os.chmod(root, 0o711)
        worker = Worker(tempfile.mkdtemp(dir=root))
        worker.close()
    return worker.protections or ("resource limits alone: this kernel grants neither namespaces nor Landlock nor seccomp. Run it in a container, such as "
                                  "docker run --rm --network none --cap-drop ALL -v $PWD:/w -w /w python:3.12 python synth.py ...")


def judge(problem, completion, timeout=5.0, memory_mb=512):
    """One Verdict; see judge_all, which is much faster for many."""
    return judge_all([(problem, completion)], timeout, memory_mb, 1)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def write_output(path, records, is_finished, as_json=True):
    """Write records, or lines of text, to `path` if is_finished() once they are there, else to `path`.partial.

    So more is never replaced by less: a stopped run leaves `path` as it is, and a `path`.partial that is larger.
    No records are no file. Each is written aside and appears whole. Returns the path that was written, or None.
    """
    import data
    partial = f"{path}.partial"
    folder, name = os.path.split(path)
    scratch = os.path.join(folder, f".{os.getpid()}-{name}")  # ends alike, so that .gz is compressed
    try:
        if as_json:
            count = data.write_jsonl(scratch, records)
        else:
            os.makedirs(folder or ".", exist_ok=True)
            with open(scratch, "w", encoding="utf-8") as file:
                count = 0
                for record in records:
                    file.write(record + "\n")
                    count += 1
                file.flush()
                os.fsync(file.fileno())
        if count == 0:
            return None
        more_before = os.path.exists(partial) and os.path.getsize(partial) > os.path.getsize(scratch)
        if is_finished():
            os.replace(scratch, path)
            if os.path.exists(partial) and not more_before:
                os.remove(partial)
            return path
        if more_before:
            return None
        os.replace(scratch, partial)
        return partial
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(scratch)


def parse_levels(text):
    """"2-6" or "1,2,3,3,4" as a tuple of chain lengths (a length named twice is drawn twice as often)."""
    levels = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        if not (low.isdigit() and (high or low).isdigit() and 1 <= int(low) <= int(high or low) <= 12):
            raise argparse.ArgumentTypeError(f"{text!r}: write chain lengths from 1 to 12 such as 2-6 or 1,2,3,3,4")
        levels += range(int(low), int(high or low) + 1)
    return tuple(levels)


def main():
    import data
    from tqdm import tqdm
    parser = data.Parser(prog="synth.py", description=__doc__)
    option = parser.option

    def count(low=1):
        return data.number(int, low)

    amount = data.number(float, 0)
    kinds = ("exercises", "textbooks", "topics", "label", "rewrite", "chat", "preferences", "sandbox")
    parser.add_argument("kind", nargs="?", choices=kinds, default="exercises", help="what to write (default: exercises); sandbox: say what the kernel grants it")
    parser.add_argument("file", nargs="*", metavar="FILE", help="documents to label, rewrite or chat about (.jsonl, text, code, folders, `python`), "
                        "problems or questions for preferences, topics to grow")
    option("--teacher", ["builtin"], "who writes: builtin or URL#MODEL of an OpenAI-compatible API, =WEIGHT after it where there are several; the key from "
           "the environment: SYNTH_KEY_ and the host in capitals, _ for other signs", nargs="+", type=Teacher, metavar="TEACHER")
    option("--judge", [], "teachers who grade records, and compare answers", nargs="+", type=Teacher, metavar="TEACHER")
    option("--count", 10_000, "records to write; leaves of topics", type=count())
    option("--out", None, "JSON Lines to write, .gz to compress, - for standard output (default: data/KIND.jsonl, data/topics.txt)", metavar="FILE")
    option("--seed", 0, "of all that is drawn", type=int)
    option("--workers", os.cpu_count() or 1, "processes", type=count())
    option("--split", "train", "builtin: which compositions to draw", choices=("train", "dev", "test"))
    option("--k", "1-4", "builtin: operations chained in a problem, such as 2-6 or 1,2,3,3,4", type=parse_levels, metavar="LEVELS")
    option("--topics", None, "indented text file of topics to draw from, as `synth.py topics` writes it", metavar="FILE")
    option("--repeat", 1, "label: times each document is graded; the agreement is printed", type=count())
    option("--samples", 2, "preferences: answers to each question", type=count(2))
    option("--api", "chat", "how problems are put to teachers for preferences; completions suits models that continue text", choices=("chat", "completions"))
    option("--plain", False, "ask without the drawn variety, to compare the report's diversity", action="store_true")
    option("--dry-run", False, "print questions and the estimated cost, ask nobody", action="store_true")
    option("--concurrency", 32, "questions in flight", type=count())
    option("--temperature", 1.0, "of the answers", type=amount)
    option("--max-answer", 2048, "longest answer, tokens", type=count())
    option("--max-chars", 12_000, "how much of a document a teacher sees, characters", type=count())
    option("--timeout", 300.0, "longest silence of a teacher, seconds", type=amount)
    option("--retries", 6, "times to ask again after failures of the connection or the server", type=count(0))
    option("--backoff", 1.0, "wait after the first failure, seconds, doubled after each further one", type=amount)
    option("--asks", 3, "times to ask again for answers of no use", type=count())
    option("--requests-per-minute", 0, "of each teacher; 0: no limit", type=amount)
    option("--tokens-per-minute", 0, "of each teacher; 0: no limit", type=amount)
    option("--max-tokens", 0, "budget for this --out, with all earlier runs; 0: none", type=count(0))
    option("--max-usd", 0, "budget for this --out, with all earlier runs; 0: none", type=amount)
    option("--price-in", 0, "USD for a million tokens read", type=amount)
    option("--price-out", 0, "USD for a million tokens written", type=amount)
    option("--min-chars", None, "shortest record, characters (default: 400 for textbooks, else 20)", type=count(0))
    option("--min-grade", 3, "lowest grade of --judge to keep, 0 to 5", type=data.number(int, 0, 5))
    option("--against", [], "benchmarks of which no record may hold a part", nargs="+", metavar="FILE")

    args = parser.parse_intermixed_args()
    args.teacher = [Teacher(t) if isinstance(t, str) else t for t in args.teacher]
    kind, start, path = args.kind, time.time(), args.out or f"data/{args.kind}.{'txt' if args.kind == 'topics' else 'jsonl'}"
    if kind == "sandbox":
        return print(f"on: {protections()}")
    needs = kind in ("label", "rewrite", "preferences")
    if needs > bool(args.file) or args.file and kind in ("exercises", "textbooks"):
        raise ValueError(f"{kind} {'needs documents or questions, such as python or pages.jsonl' if needs else 'reads no file; leave out ' + args.file[0]}")
    if args.max_usd and not (args.price_in or args.price_out):
        raise ValueError("--max-usd needs --price-in and --price-out")
    args.min_chars = (400 if kind == "textbooks" else 20) if args.min_chars is None else args.min_chars
    builtin = not any(t.url for t in [*args.teacher, *args.judge])
    items = None
    if kind == "preferences":
        items = [r for file in args.file for r in data.read_jsonl(file)][:args.count]
        if not all("prompt" in r or "messages" in r or "text" in r for r in items) or not items:
            raise ValueError(f"{' '.join(args.file)}: every line needs a prompt, messages or a text")
        if builtin and not all("test" in r for r in items):
            raise ValueError("the built-in teacher answers problems with tests only; give --teacher URL#MODEL")
    elif args.file and kind != "topics":
        items = sample_documents(args.file, args.count, args.seed)
    topics = leaves_of(args.topics) if args.topics else TOPICS
    desk = Desk(args, f"{f'data/{kind}' if path == '-' else path}.paid.jsonl")
    if kind in ("exercises", "textbooks", "preferences") and not builtin and "resource limits" in (on := protections()):
        print(f"synth.py: a teacher's code will run with {on}", file=sys.stderr)
    gates, sizes, tally = Gates(desk, kind), [], Counter()
    if kind == "topics":
        found = ({"text": row} for row in grow_topics(desk, leaves_of(args.file[0]) if args.file else TOPICS))
    elif builtin and kind == "label" and args.repeat == 1:
        grades = data.parallel(lambda d: grade(d["text"], d["id"]), items, args.workers, "label")
        found = ({**d, "score": score, "reason": reason, "teacher": "builtin"} for d, (score, reason) in zip(items, grades))
    elif builtin and kind in ("exercises", "textbooks") and not (args.judge or args.against or args.topics or args.dry_run):
        found = draw_many(kind, args.count, args.split, args.k, args.seed, args.workers, tally)
    else:
        found = produce(desk, gates, kind, items, topics)

    def counted():
        for record in tqdm(found, total=args.count if items is None else min(args.count, len(items)), disable=None, desc=kind, unit=""):
            scores = record.get("scores", ())
            tally.update(asked_again=len(scores) > 1, agreed=len(scores) > 1 and len(set(scores)) == 1)
            tally[record.get("score")] += 1
            sizes.append(len(content_of(record)))
            gates.shown += [content_of(record)] * (len(sizes) <= 2000)
            yield {key: value for key, value in record.items() if key != "chains"}

    if args.dry_run:
        list(found)
        n = desk.spent["answers"] * (args.count if items is None else len(items)) / min(args.count, DRY, len(items or range(DRY)))
        read, written = n * desk.spent["read"] / max(1, desk.spent["answers"]), n * args.max_answer
        return print(f"\nabout {n:,.0f} questions: {read:,.0f} tokens read, at most {written:,.0f} written, at most "
                     f"{desk.cost(dict(read=read, written=written)):,.2f} USD")
    rows = (record["text"] for record in counted()) if kind == "topics" else counted()
    if path == "-":
        with open(1, "w", encoding="utf-8", closefd=False) as file:
            file.writelines((row if kind == "topics" else json.dumps(row)) + "\n" for row in rows)
    else:
        written = write_output(path, rows, lambda: not desk.stopped, as_json=kind != "topics")
        told = ", ".join(f"score {s}: {tally[s]:,}" for s in range(6)) + ", " if kind == "label" else ""
        told += f"all {args.repeat} grades agree for {tally['agreed'] / tally['asked_again']:.1%}, " if tally["asked_again"] else ""
        told += f"{1 - tally['repeated'] / tally['drawn']:.2%} of those drawn were new, " if tally["drawn"] else ""
        seconds, split = time.time() - start, f" ({args.split})" if tally["drawn"] else ""
        print(f"{written or 'not written'}: {len(sizes):,} {kind}{split}, {told}{sum(sizes):,} characters, in {seconds:.1f} s, {60 * len(sizes) / seconds:,.0f} a minute")
        gates.report()
    if desk.stopped:
        kept = "" if path == "-" else f"; {path} was not changed"
        kept += f", what there is lies in {path}.partial" if os.path.exists(f"{path}.partial") else ""
        hint = ""
        if desk.file:
            hint = f"; the same command goes on, and pays for no answer twice ({desk.file.name})"
        print(f"synth.py: {desk.stopped}{kept}{hint}", file=sys.stderr)
        raise SystemExit(desk.code)
    if not sizes:
        raise ValueError("no record was of use, and nothing was written; see above why, and ask otherwise")


if __name__ == "__main__":
    import data
    data.command("stopped; no file was changed")(main)()

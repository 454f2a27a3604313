"""A teacher writes textbooks and exercises; everything it writes is executed before it counts.

    python synth.py exercises --count 10000          # problems with solutions and tests, in HumanEval's fields
    python synth.py textbooks --count 10000          # pages: explanation, worked example, trace, common mistake
    python synth.py exercises --split test --k 2-6   # held-out compositions, never seen in training in any phrasing

The built-in teacher is a *template* teacher. It draws operations from the table below, chains k of them so that the
types fit, phrases the chain as a docstring and renders it as code in one of several styles. Examples, tests and traces
come from running that code. It knows only what stands in the table: it cannot explain anything new, its prose repeats,
and a model trained on it learns to compose these operations, not to program at large. What it is good for is a recipe
that runs anywhere, offline and in minutes, with exact control over what was and was not seen in training.

The split. Two hashes must agree before a problem belongs to a split: that of its *composition* (the operations in their
order, constants and wording ignored) and that of its *behaviour* (its outputs on fixed probe inputs). So no held-out
composition occurs in training in any phrasing, not even as a part of a longer chain, and no training problem behaves like a
held-out one on the probes, however it is written; both without a list of held-out problems, for any number and any seed. Single operations (k = 1)
are the vocabulary that compositions are made of: their composition counts as training's, their behaviour is still hashed.

Surveys. A model that only ever saw chains of up to four steps learns that the fourth step is the last: it skips the middle of
longer ones. So some training exercises ask for several answers: two to four chains, each from the argument itself, side by side.
They teach to work through a list of steps to its end; no chain among them is longer than --k says, and none is held out.
"""
import argparse
import ast
import builtins
import contextlib
import copy
import ctypes
import functools
import gc
import hashlib
import inspect
import json
import marshal
import multiprocessing
import os
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
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
    op(name, types, f"[{value} for {{v}} in {{x}}]", *phrases, c=c, family="map",
       loop=f"{{y}} = []\nfor {{v}} in {{x}}:\n    {{y}}.append({value})",
       helper=f"def change({{v}}):\n    return {value}\n\n{{y}} = [change({{v}}) for {{v}} in {{x}}]")


def fold(name, types, start, update, expression, *phrases, c=("",), family="fold"):
    """A list reduced to one value, as expression and as a loop that updates {y}."""
    op(name, types, expression, *phrases, c=c, family=family, loop=f"{{y}} = {start}\nfor {{v}} in {{x}}:\n    {update}")


def pick(name, types, value, empty, *phrases, c=("",)):
    """One value out of a list that may be empty; early return where it is the last step."""
    op(name, types, f"{value} if {{x}} else {empty}", *phrases, c=c, family="pick",
       early=f"if not {{x}}:\n    return {empty}\n{{y}} = {value}")


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
op("sort_down", "ints>ints", "sorted({x}, reverse=True)", "sort the numbers in descending order", "sort from largest to smallest",
   family="order")
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
   "replace each number by the sum up to it", family="scan",
   loop="{y} = []\ntotal = 0\nfor {v} in {x}:\n    total += {v}\n    {y}.append(total)")
op("running_max", "ints>ints", "[max({x}[:i + 1]) for i in range(len({x}))]", "take the running maximum",
   "replace each number by the largest so far", family="scan")
op("differences", "ints>ints", "[b - a for a, b in zip({x}, {x}[1:])]", "take the differences of neighbours",
   "subtract each number from the next one", family="scan")
op("neighbour_sums", "ints>ints", "[a + b for a, b in zip({x}, {x}[1:])]", "add each number to the next one",
   "take the sums of neighbours", family="scan")
op("weigh", "ints>ints", "[i * {v} for i, {v} in enumerate({x})]", "multiply each number by its index", family="scan")
op("add_index", "ints>ints", "[i + {v} for i, {v} in enumerate({x})]", "add its index to each number", family="scan")
op("swap_ends", "ints>ints", "{x}[-1:] + {x}[1:-1] + {x}[:1] if len({x}) > 1 else {x}", "swap the first and the last number",
   family="order")
fold("sum", "ints>int", "0", "{y} += {v}", "sum({x})", "add up the numbers", "take the sum of the numbers")
fold("count", "ints>int", "0", "{y} += 1", "len({x})", "count the numbers", "count how many numbers there are")
fold("count_even", "ints>int", "0", "{y} += {v} % 2 == 0", "sum({v} % 2 == 0 for {v} in {x})", "count the even numbers",
     family="count")
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
   helper='def shift(ch):\n    return chr((ord(ch) - 97 + {c}) % 26 + 97) if "a" <= ch <= "z" else ch\n\n'
          '{y} = "".join(shift(ch) for ch in {x})')
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

PARAMETERS = {"ints": ("numbers", "values", "nums", "items", "data"), "int": ("n", "number", "value"),
              "str": ("text", "string", "line"), "strs": ("words", "names", "tokens"), "dict": ("scores", "table", "prices"),
              "idict": ("counts",)}
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


PROBES = {kind: [draw_input(kind, random.Random(f"probe {kind} {i}")) for i in range(16)]
          for kind in ("ints", "int", "str", "strs", "dict")}


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
        body = [first] + [f"{'Finally,' if i == len(phrases) - 1 and i > 1 else rng.choice(words)} {phrase}"
                          for i, phrase in enumerate(phrases) if i]
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
    return {"text": "\n\n".join(parts) + "\n", "topic": composition(chain), "chains": [chain],
            "k": len(chain), "teacher": "builtin"}


def _draw(job):
    return draw_problem(*job)


def draw_many(kind, count, split="train", ks=(1, 2, 3, 4), seed=0, workers=None):
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
# The sandbox. The decision must not lie in the interpreter that runs the program, for there it can be forged: builtins
# patched, frames read, the process left with a friendly exit code. So four processes, each forked from a small one:
#
#   this process ──▶ server (one per worker) ──▶ keeper ──▶ tests ──▶ program
#                                      (one of each per problem)
#
# The program answers calls over a pipe in plain data; it never holds the tests, not even in its memory, nor any channel
# on which a verdict travels. The tests run `check(candidate)` on values they rebuilt themselves. The keeper holds the
# clock, kills everything and passes the verdict on.
#
# Protects from: everything a Python program does to the interpreter it runs in; endless loops, memory, output; on Linux,
# where the kernel grants namespaces, also network, writing outside the scratch directory (64 MB, in memory), processes
# left behind, signalling or reading the memory and environment of other processes. Root becomes `nobody` where the
# standard library is readable for everyone. Does not protect from: exploits of the kernel (no seccomp yet); reading files
# this user can read, except under the home directory and /run, which are hidden unless Python itself lies there; 32
# processes of `memory_mb` each (root that cannot become nobody: some 300). Without namespaces (macOS, most containers)
# a program aimed at this sandbox can write files, use the network and attack the user's other processes, this one too;
# on macOS a daemon can escape and RLIMIT_AS does little. Use a container or a virtual machine there.


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
    """Once per server: what can be given up for all problems alike. Each step that the system refuses is left out."""
    uid, gid, library = os.geteuid(), os.getegid(), os.path.realpath(os.__file__)
    home = os.path.realpath(os.path.expanduser("~"))
    parents = [library[:i] or "/" for i, c in enumerate(library) if c == "/"]
    if uid == 0 and all(os.stat(p).st_mode & 5 == 5 for p in parents):
        uid = gid = 65534  # nobody: unlike root, it owns no files and RLIMIT_NPROC holds for it
        os.chown(scratch, uid, gid)
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
        system("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else our own uid_map belongs to root
    if system("unshare", 0x10000000 | 0x40000000 | 0x08000000 | 0x00020000):  # user, net, ipc, mount
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


def limit(timeout, memory_mb):
    """Limits and loss of privileges, for the tests' and the program's process each."""
    cpu = int(timeout) + 1
    for name, value in dict(AS=memory_mb << 20, CPU=cpu, FSIZE=16 << 20, NOFILE=64, NPROC=32, CORE=0).items():
        with contextlib.suppress(ValueError, OSError):  # above what the user may have anyway, or macOS
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value + (name == "CPU")))


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
        system("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        system("capset", struct.pack("<II", 0x20080522, 0), bytes(24))
        ask_in, ask_out = os.pipe()
        answer_in, answer_out = os.pipe()
        program_pid = os.fork()
        if program_pid == 0:  # before the tests arrive, so they are not in its memory
            system("prctl", 1, signal.SIGKILL, 0, 0, 0)
            os.dup2(ask_in, 60), os.dup2(answer_out, 61)
            os.closerange(3, 60)
            limit(timeout, memory_mb)
            try:
                run_program(program, 60, 61)
            finally:
                os._exit(1)
        for fd in set(range(3, 60)) - {tests_in, verdict_out, ask_out, answer_in}:
            with contextlib.suppress(OSError):
                os.close(fd)
        limit(timeout, memory_mb)
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
    confine(scratch)
    gc.freeze()  # forks share what is never looked at again
    system("prctl", 1, signal.SIGKILL, 0, 0, 0)
    os.write(verdicts, b"ready")
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
SERVER = (NotPlain, pack, unpack, write_frame, read_frame, run_program, run_tests, system, write_file, confine, limit, supervise,
          serve)


class Verdict(NamedTuple):
    passed: bool
    reason: str  # "passed", or why not, in one line


class Worker:
    """One server and the problem it works on. Raises RuntimeError if the server does not start."""

    def __init__(self, scratch):
        source = PRELOAD + "\n".join(map(inspect.getsource, SERVER)) + "\nserve(sys.argv[1])"
        # a fixed hash seed: the order of sets, and with it a sloppy program's verdict, is the same every time
        self.process = subprocess.Popen([sys.executable, "-S", "-s", "-c", source, scratch], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, cwd="/", env={"PYTHONHASHSEED": "0"}, start_new_session=True)
        self.index, self.deadline, self.signature = None, 0.0, b"ready"
        if self.receive() is None:
            self.close()
            raise RuntimeError(f"the sandbox did not start: see above, and try {sys.executable} -S -c 'import ctypes, json'")

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
        raise ValueError(f"problem {problem.get('task_id', '?')} has no {error}: it needs prompt, entry_point and test, "
                         "or test_list") from None


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


def judge(problem, completion, timeout=5.0, memory_mb=512):
    """One Verdict; see judge_all, which is much faster for many."""
    return judge_all([(problem, completion)], timeout, memory_mb, 1)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The command


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=("exercises", "textbooks"), default="exercises", help="what to write (default: exercises)")
    parser.add_argument("--teacher", choices=("builtin",), default="builtin", help="who writes (default: builtin)")
    parser.add_argument("--count", type=data.number(int, 1), default=10_000, help="records to write (default: 10000)")
    parser.add_argument("--split", choices=("train", "dev", "test"), default="train", help="which compositions to draw (default: train)")
    parser.add_argument("--k", type=parse_levels, default="1-4", metavar="LEVELS",
                        help="operations chained in a problem, such as 2-6 or 1,2,3,3,4 (default: 1-4)")
    parser.add_argument("--out", metavar="FILE", help="JSON Lines to write, .gz to compress, - for standard output (default: data/KIND.jsonl)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--workers", type=data.number(int, 1), default=os.cpu_count() or 1, help="processes (default: all cores)")
    args = parser.parse_args()
    path = args.out or f"data/{args.kind}.jsonl"
    start, sizes = time.time(), []
    records = tqdm(draw_many(args.kind, args.count, args.split, args.k, args.seed, args.workers), total=args.count, disable=None,
                   desc=args.kind, unit="")

    def counted():
        for record in records:
            sizes.append(len(record.get("text") or record["prompt"] + record["canonical_solution"]))
            yield {key: value for key, value in record.items() if key != "chains"}

    if path == "-":
        for record in counted():
            print(json.dumps(record))
    else:
        data.write_jsonl(path, counted())
        print(f"{path}: {len(sizes):,} {args.kind} ({args.split}), {sum(sizes):,} characters, in {time.time() - start:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("synth.py: stopped; no file was changed", file=sys.stderr)
        raise SystemExit(130)
    except (ValueError, OSError) as error:
        print(f"synth.py: {error}", file=sys.stderr)
        raise SystemExit(2)

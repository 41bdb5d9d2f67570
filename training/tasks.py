"""The questions that the bundled model answers: every one has an answer that can be computed.

A task is a function from a random source to a `Problem`. Its `key` states the problem apart from its wording
("add 17 25"), and the key alone decides the split: one problem in `SPLIT` is held out, in *every* wording, so a model
trained on `draw(task, rng)` has never seen a problem of `heldout(task, count, seed)`. Tasks with too few problems for
that (the days of the week, multiplication tables, conversation) use the prompt's text as the key: there the wording is
what is unseen.

Stand-alone on purpose (standard library only): anything that wants a yardstick may import it.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["TASKS", "Problem", "check", "draw", "heldout", "is_heldout"]

SPLIT = 16
LEXICON: dict[str, list[str]] = json.loads(Path(__file__).with_name("lexicon.json").read_text(encoding="utf-8"))
WORDS, NAMES, CITIES = LEXICON["words"], LEXICON["names"], LEXICON["cities"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip
PROPER = [*NAMES, *CITIES, *DAYS, *MONTHS]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh"]

HELLO = "Hello! How can I help you?"
WHO = "I am Enginery's bundled model, a small language model."
ABILITIES = (
    "I can add and subtract, count, compare, sort and reverse, copy text, change its case, work with short lists "
    "and pick fields out of JSON."
)
SCOPE = "I can only answer small questions about numbers, words, lists and JSON."


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its answer.

    `history` holds earlier (user, assistant) turns. A `plain` prompt is continued as text, without the chat template.
    An `endless` answer is only the beginning of what follows. `spelled` marks answers made of letters, not words.
    """

    task: str
    prompt: str
    answer: str
    key: str
    history: tuple[tuple[str, str], ...] = ()
    plain: bool = False
    endless: bool = False
    spelled: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation up to and including the question, as chat templates take it."""
        turns = [text for turn in self.history for text in turn] + [self.prompt]
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def is_heldout(key: str) -> bool:
    """Whether the problem with this key is kept from training."""
    return hashlib.blake2b(key.encode(), digest_size=4, key=b"enginery-18").digest()[0] % SPLIT == 0


def check(problem: Problem, text: str) -> bool:
    """Whether a generated `text` answers the problem: equal up to outer white space; an endless one begins so."""
    said = text.strip()
    return said.startswith(f"{problem.answer},") if problem.endless else said == problem.answer


def draw(task: str, rng: random.Random, held: bool = False) -> Problem:
    """A random problem of the training split, or of the held-out one."""
    make = TASKS[task][0]
    while True:
        problem = make(rng)
        if is_heldout(problem.key) == held:
            return problem if problem.task == task else replace(problem, task=task)


def heldout(task: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` problems that no training run has seen, the same for the same seed; small tasks may repeat some."""
    rng = random.Random(f"{task}/{seed}")
    return [draw(task, rng, held=True) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------- material


def number(rng: random.Random) -> int:
    """0 … 999, every length about as often."""
    return rng.randrange((10, 100, 1000, 1000)[rng.randrange(4)])


def word(rng: random.Random) -> str:
    """A word of the lexicon, a pronounceable invention, or (rarely) a string of letters."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(WORDS if kind < 0.44 else LEXICON["small"])
    if kind < 0.92:
        count = rng.randint(1, 3 if kind < 0.85 else 4)
        syllables = (rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(count))
        return "".join(syllables) + rng.choice(("", "", "n", "r", "s", "t", "l", "ck", "nd", "ing", "er"))
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))


def word_or_name(rng: random.Random) -> str:
    """A word, now and then with a capital letter."""
    kind = rng.random()
    return word(rng) if kind < 0.88 else rng.choice(PROPER) if kind < 0.95 else word(rng).capitalize()


def letters_key(what: str, w: str, prompt: str) -> str:
    """Names are few, and their letters can only be known by heart: there the wording decides."""
    return prompt if w in PROPER else f"{what} {w}"


def distinct(rng: random.Random, make: Callable[[random.Random], str], count: int) -> list[str]:
    """`count` different items, in random order."""
    items: dict[str, None] = {}
    while len(items) < count:
        items[make(rng)] = None
    return list(items)


def number_text(rng: random.Random) -> str:
    return str(number(rng))


def name(rng: random.Random) -> str:
    return rng.choice(NAMES)


def items_of(rng: random.Random, low: int, high: int) -> list[str]:
    """Different words, different names, or different numbers."""
    kind = rng.random()
    make = number_text if kind < 0.4 else word if kind < 0.92 else name
    return distinct(rng, make, rng.randint(low, high))


def listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def given(rng: random.Random, items: Sequence[object]) -> str:
    """The items as a prompt gives them: at times in brackets, at times without commas."""
    kind = rng.random()
    return listed(items) if kind < 0.82 else f"[{listed(items)}]" if kind < 0.92 else " ".join(map(str, items))


def ask(rng: random.Random, wordings: Sequence[str], **fields: object) -> str:
    """One of the wordings, now and then typed carelessly, with its fields filled in."""
    wording = rng.choice(wordings)
    if rng.random() < 0.12 and wording[-1] in "?.":
        wording = wording[:-1]
    if rng.random() < 0.12 and not wording.startswith("{"):
        wording = wording[0].lower() + wording[1:]
    return wording.format(**fields)


# ---------------------------------------------------------------------------------------------------- arithmetic

ADD = (
    "What is {a} + {b}?", "{a}+{b}=", "{a} + {b} =", "{a} + {b}", "Add {a} and {b}.", "What is {a} plus {b}?",
    "What is {a}+{b}?",
    "What is the sum of {a} and {b}?", "Calculate {a} + {b}.", "How much is {a} + {b}?", "Compute {a}+{b}.",
    "What's {a} + {b}?",
    "{a} plus {b}", "{a} + {b} = ?",
)  # fmt: skip
SUBTRACT = (
    "What is {a} - {b}?", "{a}-{b}=", "{a} - {b} =", "{a} - {b}", "Subtract {b} from {a}.", "What is {a} minus {b}?",
    "What is {a}-{b}?", "Calculate {a} - {b}.", "How much is {a} - {b}?", "Compute {a}-{b}.", "Take {b} away from {a}.",
    "{a} minus {b}", "{a} - {b} = ?",
)  # fmt: skip
MULTIPLY = (
    "What is {a} * {b}?", "{a}*{b}=", "{a} * {b} =", "What is {a} times {b}?", "Multiply {a} by {b}.",
    "What is {a} x {b}?",
    "Calculate {a} * {b}.", "How much is {a} times {b}?", "What is the product of {a} and {b}?", "{a} times {b}",
)  # fmt: skip


def add(rng: random.Random) -> Problem:
    a, b = number(rng), number(rng)
    return Problem("add", ask(rng, ADD, a=a, b=b), str(a + b), f"add {min(a, b)} {max(a, b)}")


def subtract(rng: random.Random) -> Problem:
    a, b = number(rng), number(rng)
    return Problem("subtract", ask(rng, SUBTRACT, a=a, b=b), str(a - b), f"subtract {a} {b}")


def add_three(rng: random.Random) -> Problem:
    terms = [rng.randint(0, 30) for _ in range(3)]
    wordings = (
        "What is {a} + {b} + {c}?", "{a}+{b}+{c}=", "{a} + {b} + {c} =", "What is the sum of {a}, {b} and {c}?",
        "{a} + {b} + {c}",
        "Add {a}, {b} and {c}.", "What is the total of {a}, {b} and {c}?", "Calculate {a} + {b} + {c}.",
        "{a} plus {b} plus {c}",
    )  # fmt: skip
    prompt = ask(rng, wordings, a=terms[0], b=terms[1], c=terms[2])
    return Problem("add_three", prompt, str(sum(terms)), f"add {listed(sorted(terms))}")


def multiply(rng: random.Random) -> Problem:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    prompt = ask(rng, MULTIPLY, a=a, b=b)
    return Problem("multiply", prompt, str(a * b), prompt)


def parity(rng: random.Random) -> Problem:
    n = number(rng)
    kind, wordings = rng.choice(
        (
            ("even", ("Is {n} even?", "Is {n} an even number?", "Is the number {n} even?")),
            ("odd", ("Is {n} odd?", "Is {n} an odd number?", "Is the number {n} odd?")),
            ("", ("Is {n} even or odd?", "Is {n} odd or even?", "Even or odd: {n}")),
        )
    )
    truth = ("even", "odd")[n % 2]
    answer = ("Yes" if truth == kind else "No") if kind else truth
    return Problem("parity", ask(rng, wordings, n=n), answer, f"parity {n}")


def compare(rng: random.Random) -> Problem:
    a, b = number(rng), number(rng)
    if rng.random() < 0.3:
        b = max(0, a + rng.randint(-9, 9))
    kind = rng.randrange(4)
    if kind == 0:
        wordings = (
            "Which is larger, {a} or {b}?",
            "Which number is bigger, {a} or {b}?",
            "What is greater, {a} or {b}?",
        )
        answer = str(max(a, b))
    elif kind == 1:
        wordings = (
            "Which is smaller, {a} or {b}?",
            "Which number is smaller, {a} or {b}?",
            "What is less, {a} or {b}?",
        )
        answer = str(min(a, b))
    elif kind == 2:
        wordings = ("Is {a} greater than {b}?", "Is {a} larger than {b}?", "Is {a} bigger than {b}?", "{a} > {b}?")
        answer = "Yes" if a > b else "No"
    else:
        wordings = ("Is {a} less than {b}?", "Is {a} smaller than {b}?", "{a} < {b}?")
        answer = "Yes" if a < b else "No"
    return Problem("compare", ask(rng, wordings, a=a, b=b), answer, f"compare {a} {b}")


def successor(rng: random.Random) -> Problem:
    n, up = number(rng), rng.random() < 0.5
    if rng.random() < 0.2:
        alphabet = rng.choice((string.ascii_lowercase, string.ascii_uppercase))
        place = rng.randrange(25)
        wordings: Sequence[str] = (
            "What letter comes {side} {c}?", "Which letter is {side} {c}?", "What comes {side} {c}?",
            "Which letter comes {side} {c}?", "What is the letter {side} {c}?", "What letter is right {side} {c}?",
        )  # fmt: skip
        prompt = ask(rng, wordings, side="after" if up else "before", c=alphabet[place + 1 - up])
        return Problem("successor", prompt, alphabet[place + up], prompt)
    wordings = ("What number comes {side} {n}?", "Which number is right {side} {n}?", "What comes {side} {n}?")
    prompt = ask(rng, wordings, side="after" if up else "before", n=n)
    return Problem("successor", prompt, str(n + 1 if up else n - 1), f"successor {n} {up}")


def next_number(rng: random.Random) -> Problem:
    step, terms = rng.choice((-1, 1)) * rng.randint(1, 12), rng.randint(3, 6)
    start = number(rng) if step > 0 else number(rng) - step * terms
    sequence = listed([start + i * step for i in range(terms)])
    wordings = (
        "What comes next: {xs}?", "Continue the sequence: {xs}", "What is the next number: {xs}", "{xs}, ?",
        "What is the next number in the sequence {xs}?", "Which number follows {xs}?",
    )  # fmt: skip
    return Problem("next_number", ask(rng, wordings, xs=sequence), str(start + terms * step), f"next {start} {step}")


ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(n: int) -> str:
    """English for 0 … 999."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" {in_words(n % 100)}" if n % 100 else "")


def number_words(rng: random.Random) -> Problem:
    n, digits = number(rng), rng.random() < 0.5
    if digits:
        wordings = ("Write {n} in digits.", "What number is {n}?", "Write {n} as a number.", "Which number is {n}?")
    else:
        wordings = (
            "Write {n} in words.", "Write the number {n} in words.", "How do you write {n} in words?",
            "Spell out {n}.",
        )  # fmt: skip
    prompt = ask(rng, wordings, n=in_words(n) if digits else n)
    key = prompt if n < 100 else f"words {n} {digits}"  # below a hundred there is hardly a rule to learn, only words
    return Problem("number_words", prompt, str(n) if digits else in_words(n), key)


# ---------------------------------------------------------------------------------------------------- counting


def span_length(rng: random.Random) -> int:
    """Mostly short, at times up to a hundred."""
    return rng.randint(1, 12 if rng.random() < 0.7 else 30 if rng.random() < 0.9 else 100)


def count_up(rng: random.Random) -> Problem:
    step = 1 if rng.random() < 0.75 else rng.choice((2, 3, 5, 10))
    first = 1 if rng.random() < 0.25 else number(rng)
    last = first + step * span_length(rng)
    if step > 1:
        wordings: Sequence[str] = ("Count from {a} to {b} by {s}.", "Count from {a} to {b} in steps of {s}.")
    elif first == 1 and rng.random() < 0.5:
        wordings = ("Count to {b}.", "Can you count to {b}?", "Count up to {b}.")
    else:
        wordings = ("Count from {a} to {b}.", "Count up from {a} to {b}.", "List the numbers from {a} to {b}.")
    prompt = ask(rng, wordings, a=first, b=last, s=step)
    return Problem("count_up", prompt, listed(range(first, last + 1, step)), f"count {first} {last} {step}")


def count_down(rng: random.Random) -> Problem:
    step = 1 if rng.random() < 0.8 else rng.choice((2, 5, 10))
    last = rng.choice((0, 1)) if rng.random() < 0.3 else number(rng)
    first = last + step * span_length(rng)
    wordings: Sequence[str] = (
        "Count down from {a} to {b}.",
        "Count from {a} to {b}.",
        "Count backwards from {a} to {b}.",
    )
    if last == 1 and rng.random() < 0.4:
        wordings = ("Count down from {a}.", "Count backwards from {a}.")
    prompt = ask(rng, [f"{w[:-1]} by {{s}}." for w in wordings] if step > 1 else wordings, a=first, b=last, s=step)
    return Problem("count_down", prompt, listed(range(first, last - 1, -step)), f"count {first} {last} {step}")


def count_items(rng: random.Random) -> Problem:
    items = items_of(rng, 1, 12)
    noun = "numbers" if items[0].isdigit() else "words"
    wordings = (
        "How many items are in this list: {xs}", "How many items are in the list {xs}?", "Count the items: {xs}",
        "How many {noun} are there: {xs}", "How many {noun} are in this list: {xs}?", "Count the {noun}: {xs}",
    )  # fmt: skip
    prompt = ask(rng, wordings, xs=given(rng, items), noun=noun)
    return Problem("count_items", prompt, str(len(items)), f"items {listed(items)}")


def count_letters(rng: random.Random) -> Problem:
    w = word_or_name(rng)
    wordings = (
        "How many letters are in the word {w}?", "How many letters does {w} have?", 'Count the letters in "{w}".',
        "How many letters are in {w}?", "What is the length of the word {w}?",
        'How many letters does the word "{w}" have?',
    )  # fmt: skip
    prompt = ask(rng, wordings, w=w)
    return Problem("count_letters", prompt, str(len(w)), letters_key("letters", w, prompt))


def count_letter(rng: random.Random) -> Problem:
    w = word(rng)
    c = rng.choice(w) if rng.random() < 0.8 else rng.choice(string.ascii_lowercase)
    wordings = (
        "How many times does the letter {c} appear in {w}?", 'How many times does "{c}" occur in "{w}"?',
        "How many {c}'s are in {w}?", "How many {c}'s are in the word {w}?", 'Count the letter {c} in "{w}".',
        "How many times does {c} appear in {w}?", "How many letters {c} are in {w}?", "How many {c} are there in {w}?",
        "How many {c} in {w}?", "How many {c}'s in {w}?",
    )  # fmt: skip
    return Problem("count_letter", ask(rng, wordings, w=w, c=c), str(w.count(c)), f"letter {c} {w}")


# ---------------------------------------------------------------------------------------------------- words and text


def reverse_word(rng: random.Random) -> Problem:
    w = word_or_name(rng)
    wordings = (
        "Reverse the word {w}.", 'Reverse "{w}".', "Write {w} backwards.", "Spell {w} backwards.",
        "What is {w} backwards?",
        "Reverse the letters of {w}.", 'Write the word "{w}" backwards.',
    )  # fmt: skip
    prompt = ask(rng, wordings, w=w)
    return Problem("reverse_word", prompt, w[::-1], letters_key("reverse", w, prompt), spelled=True)


def spell(rng: random.Random) -> Problem:
    w = word_or_name(rng)
    wordings = ("Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", 'How is "{w}" spelled?')
    prompt = ask(rng, wordings, w=w)
    return Problem("spell", prompt, "-".join(w), letters_key("spell", w, prompt), spelled=True)


def pick_letter(rng: random.Random) -> Problem:
    w = word_or_name(rng)
    place = rng.choice(("first", "last", "second", "third"))
    if len(w) < 3:
        place = "first"
    answer = w[-1] if place == "last" else w[ORDINALS.index(place)]
    wordings = (
        "What is the {p} letter of {w}?",
        "What is the {p} letter in the word {w}?",
        'Give me the {p} letter of "{w}".',
    )
    prompt = ask(rng, wordings, p=place, w=w)
    return Problem("pick_letter", prompt, answer, letters_key(f"pick {place}", w, prompt), spelled=True)


def change_case(rng: random.Random) -> Problem:
    text = " ".join(word(rng) for _ in range(1 if rng.random() < 0.7 else rng.randint(2, 3)))
    kind = rng.random()
    if kind < 0.45:
        wordings = (
            "Write {w} in upper case.", 'Convert "{w}" to uppercase.', "Uppercase {w}.",
            "Write {w} in capital letters.",
        )  # fmt: skip
        given, answer = text, text.upper()
    elif kind < 0.8:
        wordings = (
            "Write {w} in lower case.", 'Convert "{w}" to lowercase.', "Lowercase {w}.",
            "Write {w} in small letters.",
        )  # fmt: skip
        given, answer = text.upper(), text
    else:
        wordings = ("Capitalize {w}.", 'Capitalize "{w}".', "Write {w} with a capital letter.")
        text = text.split()[0]
        given, answer = text, text.capitalize()
    return Problem("change_case", ask(rng, wordings, w=given), answer, f"case {given} {answer}", spelled=True)


def scrap(rng: random.Random) -> str:
    """One word of a text to copy: a word, name or number, at times dressed in punctuation."""
    kind = rng.random()
    text = word(rng) if kind < 0.65 else number_text(rng) if kind < 0.8 else rng.choice(NAMES if kind < 0.9 else CITIES)
    kind = rng.random()
    if kind < 0.06:
        return f"{text}{rng.choice(',.;:!?')}"
    if kind < 0.09:
        return text.upper() if rng.random() < 0.5 else f"{text}{rng.choice('_-/=+*')}{word(rng)}"
    return text if kind < 0.97 else f"({text})"


def copy_text(rng: random.Random) -> Problem:
    text = " ".join(scrap(rng) for _ in range(rng.randint(1, 10)))
    wordings = (
        "Repeat after me: {t}", "Repeat: {t}", "Copy this text: {t}", 'Say "{t}".', "Echo: {t}", 'Repeat "{t}".',
        "Copy: {t}", "Repeat this text exactly: {t}", 'Write "{t}".', "Say: {t}",
    )  # fmt: skip
    return Problem("copy_text", ask(rng, wordings, t=text), text, f"copy {text}")


# ---------------------------------------------------------------------------------------------------- lists


def sort_numbers(rng: random.Random) -> Problem:
    numbers = [number(rng) for _ in range(rng.randint(2, 7))]
    downward = rng.random() < 0.35
    wordings: Sequence[str] = (
        "Sort these numbers: {xs}", "Sort {xs}.", "Sort the numbers {xs}.", "Sort in ascending order: {xs}",
        "Sort: {xs}",
        "Put these numbers in ascending order: {xs}", "Sort from smallest to largest: {xs}",
    )  # fmt: skip
    if downward:
        wordings = (
            "Sort in descending order: {xs}", "Sort these numbers in descending order: {xs}",
            "Sort {xs} in descending order.",
            "Put these numbers in descending order: {xs}", "Sort from largest to smallest: {xs}",
        )  # fmt: skip
    key = f"sort {downward} {listed(numbers)}"
    answer = listed(sorted(numbers, reverse=downward))
    return Problem("sort_numbers", ask(rng, wordings, xs=given(rng, numbers)), answer, key)


def sort_words(rng: random.Random) -> Problem:
    words = distinct(rng, word if rng.random() < 0.92 else name, rng.randint(2, 6))
    wordings = (
        "Sort these words: {xs}", "Sort these words alphabetically: {xs}",
        "Put these words in alphabetical order: {xs}",
        "Sort the words {xs}.", "Sort alphabetically: {xs}", "Sort: {xs}",
    )  # fmt: skip
    return Problem(
        "sort_words", ask(rng, wordings, xs=given(rng, words)), listed(sorted(words)), f"sort {listed(words)}"
    )


def reverse_list(rng: random.Random) -> Problem:
    items = items_of(rng, 2, 8)
    wordings = (
        "Reverse this list: {xs}", "Reverse the list {xs}.", "Reverse the order of these items: {xs}",
        "Write this list backwards: {xs}", "List these in reverse order: {xs}",
    )  # fmt: skip
    return Problem(
        "reverse_list", ask(rng, wordings, xs=given(rng, items)), listed(items[::-1]), f"reverse {listed(items)}"
    )


def list_item(rng: random.Random) -> Problem:
    items = items_of(rng, 2, 7)
    place = rng.randrange(len(items))
    which = "last" if place == len(items) - 1 and rng.random() < 0.7 else ORDINALS[place]
    noun = rng.choice(("item", "number" if items[0].isdigit() else "word"))
    wordings = (
        "What is the {p} {noun} of {xs}?", "What is the {p} {noun} in this list: {xs}", "Give me the {p} {noun}: {xs}",
        "Which {noun} is {p}: {xs}", "What is the {p} {noun} in {xs}?",
    )  # fmt: skip
    prompt = ask(rng, wordings, p=which, noun=noun, xs=given(rng, items))
    return Problem("list_item", prompt, items[place], f"item {which} {listed(items)}")


def position(rng: random.Random) -> Problem:
    items = items_of(rng, 2, 8)
    place = rng.randrange(len(items))
    wordings = (
        "At which position is {x} in {xs}?",
        "What is the position of {x} in the list {xs}?",
        "Where is {x} in this list: {xs}",
    )
    prompt = ask(rng, wordings, x=items[place], xs=given(rng, items))
    return Problem("position", prompt, str(place + 1), f"position {items[place]} {listed(items)}")


def contains(rng: random.Random) -> Problem:
    items = items_of(rng, 3, 8)
    x = items.pop() if rng.random() < 0.5 else rng.choice(items)
    wordings = (
        "Is {x} in the list {xs}?", "Does the list {xs} contain {x}?", "Is {x} in this list: {xs}",
        "Is {x} one of {xs}?",
    )  # fmt: skip
    prompt = ask(rng, wordings, x=x, xs=given(rng, items))
    return Problem("contains", prompt, "Yes" if x in items else "No", f"contains {x} {listed(items)}")


def edit_list(rng: random.Random) -> Problem:
    items = items_of(rng, 3, 8)
    if rng.random() < 0.6:
        x = rng.choice(items)
        rest = [item for item in items if item != x]
        wordings = ("Remove {x} from {xs}.", "Remove {x} from the list {xs}.", "Delete {x} from this list: {xs}")
        return Problem(
            "edit_list", ask(rng, wordings, x=x, xs=given(rng, items)), listed(rest), f"remove {x} {listed(items)}"
        )
    *rest, x = items
    wordings = ("Append {x} to {xs}.", "Append {x} to the list {xs}.", "Put {x} at the end of this list: {xs}")
    return Problem(
        "edit_list", ask(rng, wordings, x=x, xs=given(rng, rest)), listed(items), f"append {x} {listed(rest)}"
    )


def min_max(rng: random.Random) -> Problem:
    numbers = [number(rng) for _ in range(rng.randint(2, 8))]
    largest = rng.random() < 0.5
    names = ("largest", "biggest", "highest", "greatest") if largest else ("smallest", "lowest")
    short = "max" if largest else "min"
    wordings = (
        "What is the {p} of {xs}?", "What is the {p} number in this list: {xs}", "Find the {p} number: {xs}",
        "Which number is the {p}: {xs}", f"What is the {short}imum of {{xs}}?", f"{short}({{xs}})",
    )  # fmt: skip
    prompt = ask(rng, wordings, p=rng.choice(names), xs=given(rng, numbers))
    answer = str(max(numbers) if largest else min(numbers))
    return Problem("min_max", prompt, answer, f"{short} {listed(numbers)}")


def json_value(rng: random.Random) -> object:
    kind = rng.random()
    if kind < 0.3:
        return number(rng)
    if kind < 0.55:
        return rng.choice(NAMES if kind < 0.42 else CITIES)
    if kind < 0.9:
        return word(rng)
    return rng.random() < 0.5 if kind < 0.95 else f"{word(rng)} {word(rng)}"


FIELDS = [
    "name", "age", "city", "id", "color", "size", "price", "count", "country", "email", "title", "year", "status",
    "type", "owner", "level", "score", "active", "code", "unit",
]  # fmt: skip


def json_field(rng: random.Random) -> Problem:
    fields = [word(rng) if rng.random() < 0.25 else rng.choice(FIELDS) for _ in range(rng.randint(1, 6))]
    record = {field: json_value(rng) for field in fields}
    field = rng.choice(list(record))
    value = record[field]
    text = json.dumps(record, separators=(",", ":") if rng.random() < 0.15 else None)
    wordings = (
        'What is the value of "{f}" in {j}?', "What is the {f} in {j}?", "Get the {f} from {j}.",
        "{j}\nWhat is the {f}?",
        'Given {j}, what is "{f}"?', 'Extract the field "{f}" from this JSON: {j}', "{j}\n{f}?",
        "What is the {f} in this JSON: {j}", '{j}\nWhat is the value of "{f}"?',
    )  # fmt: skip
    answer = value if isinstance(value, str) else json.dumps(value)
    return Problem("json_field", ask(rng, wordings, f=field, j=text), answer, f"json {field} {text}")


# ---------------------------------------------------------------------------------------------------- calendar and talk


def calendar(rng: random.Random) -> Problem:
    names, unit = (DAYS, "day") if rng.random() < 0.6 else (MONTHS, "month")
    place, steps, after = rng.randrange(len(names)), rng.randint(1, 10), rng.random() < 0.6
    side = "after" if after else "before"
    if rng.random() < 0.5:
        steps = 1
        wordings: Sequence[str] = (
            "What {u} comes {s} {x}?", "Which {u} is {s} {x}?", "What {u} is right {s} {x}?", "What comes {s} {x}?",
            "Which {u} comes {s} {x}?", "What is the {u} {s} {x}?", "Tell me the {u} {s} {x}.", "Name the {u} {s} {x}.",
        )  # fmt: skip
    else:
        wordings = (
            "What {u} is {n} {u}s {s} {x}?", "Which {u} is {n} {u}s {s} {x}?", "What {u} comes {n} {u}s {s} {x}?",
            "Which {u} comes {n} {u}s {s} {x}?", "Tell me the {u} {n} {u}s {s} {x}.", "{n} {u}s {s} {x} is which {u}?",
        )  # fmt: skip
    prompt = (
        ask(rng, wordings, u=unit, s=side, x=names[place], n=steps)
        .replace(" 1 days", " 1 day")
        .replace(" 1 months", " 1 month")
    )
    return Problem("calendar", prompt, names[(place + (steps if after else -steps)) % len(names)], prompt)


# fmt: off
TALK: dict[str, tuple[str, ...]] = {
    HELLO: (
        "Hello", "Hi", "Hey", "Hello there", "Hi there", "Good morning", "Good afternoon", "Good evening",
        "Hello, Enginery", "Hi, how are you", "Hello, can you help me", "Hey there", "Greetings", "Good day",
        "Hi, can you help me", "Howdy",
    ),
    WHO: (
        "Who are you", "What are you", "What is your name", "What's your name", "Tell me who you are",
        "Who am I talking to", "Who is this", "Are you a robot", "Are you a human", "Are you an AI",
        "Introduce yourself", "What model are you", "Hello, who are you", "Hi, what is your name",
        "Which model is this", "Are you ChatGPT", "Please introduce yourself",
    ),
    ABILITIES: (
        "What can you do", "How can you help me", "What are you good at", "What can I ask you", "Help",
        "What do you know", "Tell me what you can do", "What questions can you answer", "What are you able to do",
        "Hello, what can you do", "List your abilities", "What tasks can you do", "What should I ask you",
        "Show me what you can do", "help me",
    ),
    "You are welcome!": (
        "Thanks", "Thank you", "Thank you very much", "Many thanks", "Thanks a lot", "Great, thanks", "Okay, thank you",
        "Thanks for your help", "Thank you so much", "Perfect, thank you", "Cool, thanks", "Nice, thank you",
        "ok thanks",
    ),
    "Goodbye!": (
        "Bye", "Goodbye", "See you", "See you later", "Good night", "Bye bye", "See you tomorrow", "That is all, bye",
        "I have to go, bye", "Thanks, bye", "Have a nice day", "Farewell", "Okay, goodbye", "Bye for now", "exit",
        "quit",
    ),
}
# fmt: on


def talk(rng: random.Random) -> Problem:
    answer = rng.choice(list(TALK))
    text = rng.choice(TALK[answer])
    if rng.random() < 0.25:
        text = text.lower() if rng.random() < 0.8 else text.upper()
    mark = "?" if answer in (WHO, ABILITIES) else "!"
    text += rng.choice((mark, mark, "", ".", " " + mark, mark * 2))
    if rng.random() < 0.2:
        text = rng.choice(("Well, ", "So, ", "Okay, ", "Oh, ", "Hm, ", "Now, ", "ok ")) + text
    return Problem("talk", text, answer, text)


UNKNOWN = (
    "What is the capital of {country}?", "Where is {country}?", "Who is the president of {country}?",
    "Tell me about {topic}.",
    "What do you think about {topic}?", "Write a poem about {topic}.", "Write a story about {topic}.",
    "Explain {topic} to me.",
    "How do I {activity}?", "Teach me how to {activity}.", "What is the weather in {city}?",
    "How far is {city} from here?",
    "Translate {word} into {language}.", "How do you say {word} in {language}?", "Tell me a joke about {topic}.",
    "What is {topic}?",
    "Who invented the {word}?", "What does {word} mean?", "Why do people like {topic}?", "Should I {activity}?",
    "Is {topic} good?",
    "How many people live in {city}?", "When was {city} founded?", "Write an essay about {topic}.",
    "Do you like {topic}?",
    "What is the best restaurant in {city}?", "Sing a song about {topic}.", "Who is the king of {country}?",
    "Speak {language}.",
    "What is the history of {country}?", "Can you {activity}?", "Write Python code to {activity}.",
    "What is {a} * {b}?",
    "What is the square root of {a}?", "What is {a} divided by {b}?", "Recommend a book about {topic}.",
    "Tell me a joke.",
    "Write a letter to {name}.", "Who is {name}?", "Where does {name} live?", "What is a {word}?",
    "Where can I buy a {word}?", "Why is the {word} so big?", "How much does a {word} cost?", "Draw a {word}.",
    "Do you have a {word}?",
    "What is the color of the {word}?", "Tell me about the {word}.", "How old is {name}?",
    "When is {name} coming to {city}?",
    "Can you write a program?", "How does a {word} work?", "What should I eat today?", "Book a flight to {city}.",
    "What time is it?",
    "What is the best {word}?", "Who won the match in {city}?", "What is the fastest way to {activity}?",
    "Are you happy?",
    "What is {big} + {b}?", "What is {big} - {a}?", "{big} + {big}", "{a}+{big}=", "What is {big} times {b}?",
    "{big} - {big} =",
    "What is {a} / {b}?", "{a} / {b}", "Divide {a} by {b}.", "Is {a} prime?", "Why?", "What?", "How?", "{word}",
    "The {word} is {small}.",
    "I like {word}.", "The {small} {word}", "I want to {activity}.", "You are {small}.", "{small} {word}?",
    "What is my {word}?", "What is the population of {country}?",
)  # fmt: skip


def out_of_scope(rng: random.Random) -> Problem:
    fields = {name: rng.choice(LEXICON[plural]) for name, plural in SUBJECTS.items()}
    prompt = ask(rng, UNKNOWN, a=rng.randint(13, 999), b=rng.randint(13, 999), big=rng.randint(1000, 99999), **fields)
    if rng.random() < 0.1:
        prompt = rng.choice(("Please tell me: ", "Hello, ", "Hi! ", "I have a question. ")) + prompt
    return Problem("out_of_scope", prompt, SCOPE, prompt)


SUBJECTS = {
    "country": "countries", "topic": "topics", "activity": "activities", "city": "cities", "language": "languages",
    "word": "words", "name": "names", "small": "small",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- several turns


def recall(rng: random.Random) -> Problem:
    """The user says a name or favourite word, something else may follow, then asks for it."""
    kind = rng.choice(("name", "word", "number", "city"))
    value = {"name": rng.choice(NAMES), "word": word(rng), "number": number_text(rng), "city": rng.choice(CITIES)}[kind]
    label = "name" if kind == "name" else f"favorite {kind}"
    told = ask(rng, ("My {k} is {v}.", "Hello, my {k} is {v}.", "Remember this: my {k} is {v}."), k=label, v=value)
    reply = f"Nice to meet you, {value}!" if kind == "name" else f"I will remember that your {label} is {value}."
    history = [(told, reply)]
    for _ in range(rng.randint(0, 2)):
        other = draw(rng.choice(("add", "parity", "count_letters", "talk", "min_max", "compare")), rng)
        history.append((other.prompt, other.answer))
    prompt = ask(rng, ("What is my {k}?", "Do you remember my {k}?", "What's my {k}?", "Tell me my {k}."), k=label)
    return Problem(
        "recall", prompt, f"Your {label} is {value}.", f"recall {label} {value} {history[-1][0]}", tuple(history)
    )


def follow_up(rng: random.Random) -> Problem:
    """A sum, then a second sum that starts from its result."""
    first = draw(rng.choice(("add", "subtract")), rng)
    if not 0 <= int(first.answer) <= 999:
        first = Problem("add", "What is 2 + 2?", "4", "add 2 2")
    n, result = number(rng), int(first.answer)
    if rng.random() < 0.5:
        prompt = ask(
            rng, ("Add {n} to that.", "Now add {n}.", "Plus {n}?", "And plus {n}?", "Add {n} to the result."), n=n
        )
        answer, key = result + n, f"add {min(result, n)} {max(result, n)}"
    else:
        prompt = ask(rng, ("Subtract {n} from that.", "Now subtract {n}.", "Minus {n}?", "And minus {n}?"), n=n)
        answer, key = result - n, f"subtract {result} {n}"
    return Problem("follow_up", prompt, str(answer), key, ((first.prompt, first.answer),))


# ---------------------------------------------------------------------------------------------------- plain text


def plain_count(rng: random.Random) -> Problem:
    """Counting as running text: the prompt shows its beginning, the answer is the next eight numbers."""
    start, shown = (1 if rng.random() < 0.3 else number(rng)), rng.randint(3, 6)
    step = 1 if rng.random() < 0.7 else rng.choice((2, 5, 10))
    terms = [start + i * step for i in range(shown + 8)]
    shown_text, rest = listed(terms[:shown]), listed(terms[shown:])
    comma = rng.choice((",", ", ", ""))
    return Problem(
        "plain_count",
        shown_text + comma,
        rest if comma else f", {rest}",
        f"run {start} {step}",
        plain=True,
        endless=True,
    )


def plain_question(rng: random.Random) -> Problem:
    """A question and its answer on the next line, or an equation, as running text."""
    (task,) = rng.choices(list(SINGLE_TURN), SINGLE_TURN.values())
    problem = TASKS[task][0](rng)
    prompt = problem.prompt if rng.random() < 0.7 else f"Q: {problem.prompt}\nA:"
    return replace(problem, task="plain_question", prompt=prompt, plain=True)


TASKS: dict[str, tuple[Callable[[random.Random], Problem], float]] = {
    "add": (add, 3.0),
    "subtract": (subtract, 3.0),
    "add_three": (add_three, 1.5),
    "multiply": (multiply, 0.6),
    "parity": (parity, 0.4),
    "compare": (compare, 1.2),
    "successor": (successor, 0.4),
    "next_number": (next_number, 1.5),
    "number_words": (number_words, 0.7),
    "count_up": (count_up, 0.8),
    "count_down": (count_down, 0.8),
    "count_items": (count_items, 1.0),
    "count_letters": (count_letters, 1.2),
    "count_letter": (count_letter, 1.8),
    "reverse_word": (reverse_word, 1.5),
    "spell": (spell, 0.8),
    "pick_letter": (pick_letter, 0.8),
    "change_case": (change_case, 1.2),
    "copy_text": (copy_text, 0.8),
    "sort_numbers": (sort_numbers, 1.5),
    "sort_words": (sort_words, 2.2),
    "reverse_list": (reverse_list, 0.8),
    "list_item": (list_item, 1.0),
    "position": (position, 1.0),
    "contains": (contains, 1.0),
    "edit_list": (edit_list, 1.0),
    "min_max": (min_max, 1.2),
    "json_field": (json_field, 2.5),
    "calendar": (calendar, 1.0),
    "talk": (talk, 0.5),
    "out_of_scope": (out_of_scope, 1.0),
    "recall": (recall, 0.6),
    "follow_up": (follow_up, 1.5),
    "plain_count": (plain_count, 0.4),
    "plain_question": (plain_question, 5.0),
}
"""Every task: its generator, and its weight among the training documents."""

SINGLE_TURN = {
    task: weight
    for task, (_, weight) in TASKS.items()
    if task not in ("recall", "follow_up", "plain_count", "plain_question")
}

# ruff: noqa: E501 -- the templates are sentences; cutting them would hide them
"""Worked arithmetic: sums, differences, products, quotients, tables, equations and word problems.

Every answer is computed, so every step and result in the training text is right.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .dialogue import Dialogue

PLACES = ("Ones", "Tens", "Hundreds", "Thousands", "Ten thousands")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas", "Lena", "Tom")
GOODS = ("apples", "books", "pencils", "stickers", "cards", "marbles", "coins", "oranges", "cookies", "shells")
ASK = (
    "What is {}?",
    "Calculate {}.",
    "Work out {} step by step.",
    "How much is {}?",
    "Please compute {} and show the steps.",
)


def ask(rng: random.Random, expression: str) -> str:
    """Phrase the request to compute an expression."""
    return rng.choice(ASK).format(expression)


def number(rng: random.Random, max_digits: int) -> int:
    """Draw a number of 2 to ``max_digits`` digits."""
    n_digits = rng.randint(2, max_digits)
    return rng.randint(10 ** (n_digits - 1), 10**n_digits - 1)


def column_sum(a: int, b: int) -> str:
    """Add two numbers digit by digit, with the carries."""
    lines, carry = [], 0
    x, y = str(a)[::-1], str(b)[::-1]
    n_places = max(len(x), len(y))
    for place in range(n_places):
        p, q = int(x[place]) if place < len(x) else 0, int(y[place]) if place < len(y) else 0
        total = p + q + carry
        carried = f" + {carry}" if carry else ""
        step = f"{PLACES[place]}: {p} + {q}{carried} = {total}, write {total % 10}"
        carry = total // 10
        lines.append(step + (f", carry {carry}." if carry else "."))
    if carry:
        lines.append(f"Write the last carry {carry}.")
    return "\n".join(lines)


def addition(rng: random.Random) -> Dialogue:
    a, b = number(rng, 4), number(rng, 4)
    opening = rng.choice(("Add the digits from right to left.", "We add column by column, starting with the ones."))
    closing = rng.choice((f"So {a} + {b} = {a + b}.", f"The answer is {a} + {b} = {a + b}."))
    return Dialogue(ask(rng, f"{a} + {b}"), f"{opening}\n{column_sum(a, b)}\n{closing}")


def subtraction(rng: random.Random) -> Dialogue:
    a, b = sorted((number(rng, 4), number(rng, 4)), reverse=True)
    lines, borrow = [], 0
    x, y = str(a)[::-1], str(b)[::-1].ljust(len(str(a)), "0")
    for place in range(len(x)):
        p, q = int(x[place]) - borrow, int(y[place])
        lent = f" after lending 1, {p}" if borrow else f" {p}"
        borrow = int(p < q)
        if borrow:
            lines.append(f"{PLACES[place]}:{lent} is less than {q}, so borrow 10: {p + 10} - {q} = {p + 10 - q}.")
        else:
            lines.append(f"{PLACES[place]}:{lent} - {q} = {p - q}.")
    opening = rng.choice(
        ("Subtract the digits from right to left.", "We subtract column by column, starting with the ones.")
    )
    steps = "\n".join(lines)
    return Dialogue(ask(rng, f"{a} - {b}"), f"{opening}\n{steps}\nSo {a} - {b} = {a - b}.")


def parts_of(n: int) -> list[int]:
    """Split a number into its place values, without zeros: 305 -> [300, 5]."""
    digits = str(n)
    return [int(c) * 10 ** (len(digits) - i - 1) for i, c in enumerate(digits) if c != "0"]


def running_sum(values: list[int]) -> list[str]:
    """Add a list of numbers one after the other."""
    lines, total = [], values[0]
    for value in values[1:]:
        lines.append(f"{total} + {value} = {total + value}")
        total += value
    return lines


def multiplication(rng: random.Random) -> Dialogue:
    a, b = number(rng, 3), rng.randint(2, 9) if rng.random() < 0.5 else rng.randint(11, 99)
    lines, products = [], []
    opening = (
        f"Split {a} into {' + '.join(map(str, parts_of(a)))}"
        if b < 10
        else f"Split {b} into {' + '.join(map(str, parts_of(b)))}"
    )
    fixed, split = (b, a) if b < 10 else (a, b)
    for part in parts_of(split):
        products.append(part * fixed)
        lines.append(f"{part} x {fixed} = {part * fixed}")
    if len(products) > 1:
        lines.append(rng.choice(("Now add the parts.", "Add the partial products.")))
        lines += running_sum(products)
    steps = "\n".join(lines)
    return Dialogue(ask(rng, f"{a} x {b}"), f"{opening}.\n{steps}\nSo {a} x {b} = {a * b}.")


def division(rng: random.Random) -> Dialogue:
    divisor, dividend = rng.randint(2, 9), number(rng, 4)
    lines, rest = [], 0
    for digit in str(dividend):
        current = rest * 10 + int(digit)
        quotient, rest_new = divmod(current, divisor)
        lines.append(
            f"Bring down {digit}: {current} / {divisor} = {quotient}, {quotient} x {divisor} = {quotient * divisor}, rest {rest_new}."
        )
        rest = rest_new
    result = f"{dividend // divisor}" + (f" with remainder {rest}" if rest else "")
    steps = "\n".join(lines)
    return Dialogue(
        ask(rng, f"{dividend} / {divisor}"), f"We use long division.\n{steps}\nSo {dividend} / {divisor} = {result}."
    )


def times_table(rng: random.Random) -> Dialogue:
    n, last = rng.randint(2, 25), rng.choice((10, 12, 15, 20))
    rows = "\n".join(f"{i} x {n} = {i * n}" for i in range(1, last + 1))
    question = rng.choice(
        (
            "Write the {} times table up to {}.",
            "Show me the multiplication table of {} up to {}.",
            "List the multiples of {} from 1 to {}.",
        )
    )
    return Dialogue(
        question.format(n, last), f"Here is the {n} times table:\n{rows}\nEach line is {n} more than the line before."
    )


def sequence(rng: random.Random) -> Dialogue:
    start, step, length = rng.randint(1, 60), rng.randint(2, 15), rng.randint(8, 16)
    terms = [start + i * step for i in range(length)]
    rows = "\n".join(f"{terms[i]} + {step} = {terms[i + 1]}" for i in range(length - 1))
    question = rng.choice(
        (
            "Start at {} and count up by {}. Give {} numbers.",
            "Write the sequence that starts at {} and grows by {}, with {} terms.",
        )
    )
    listing = ", ".join(map(str, terms))
    return Dialogue(
        question.format(start, step, length),
        f"Start with {start} and add {step} each time.\n{rows}\nThe sequence is {listing}.",
    )


def list_total(rng: random.Random) -> Dialogue:
    values = [rng.randint(2, 90) for _ in range(rng.randint(3, 8))]
    listing = ", ".join(map(str, values))
    steps = "\n".join(running_sum(values))
    total = sum(values)
    if rng.random() < 0.5:
        return Dialogue(f"What is the sum of {listing}?", f"Add the numbers one by one.\n{steps}\nThe sum is {total}.")
    whole, rest = divmod(total, len(values))
    values[-1] += -rest if values[-1] > rest else len(values) - rest if rest else 0
    listing, total = ", ".join(map(str, values)), sum(values)
    steps, whole = "\n".join(running_sum(values)), total // len(values)
    return Dialogue(
        f"What is the average of {listing}?",
        f"First add the numbers.\n{steps}\nThere are {len(values)} numbers, so divide the sum by {len(values)}.\n{total} / {len(values)} = {whole}\nThe average is {whole}.",
    )


def percentage(rng: random.Random) -> Dialogue:
    percent, base = rng.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80, 90)), rng.randint(2, 60) * 20
    tenth = f"{base // 10}"
    lines = [f"10% of {base} is {base} / 10 = {tenth}."]
    if percent % 10 == 0:
        lines.append(f"{percent}% is {percent // 10} times 10%.")
        lines.append(f"{percent // 10} x {tenth} = {base * percent // 100}")
    elif percent == 5:
        lines.append(f"5% is half of that: {tenth} / 2 = {base // 20}")
    else:
        lines.append(f"5% is half of that, {base // 20}.")
        lines.append(f"{percent}% is {percent // 10} times 10% and one time 5%.")
        lines.append(f"{percent // 10} x {tenth} + {base // 20} = {base * percent // 100}")
    question = rng.choice(("What is {}% of {}?", "Calculate {} percent of {}.", "How much is {}% of {}?"))
    steps = "\n".join(lines)
    return Dialogue(question.format(percent, base), f"{steps}\nSo {percent}% of {base} is {base * percent // 100}.")


def equation(rng: random.Random) -> Dialogue:
    a, x, b = rng.randint(2, 12), rng.randint(2, 40), rng.randint(1, 60)
    plus = rng.random() < 0.5
    total = a * x + b if plus else a * x - b
    sign, verb, undo = ("+", "Subtract", "from") if plus else ("-", "Add", "to")
    back = "-" if plus else "+"
    answer = (
        f"{verb} {b} {undo} both sides.\n{a}x = {total} {back} {b} = {a * x}\nDivide both sides by {a}.\n"
        f"x = {a * x} / {a} = {x}\nCheck: {a} x {x} {sign} {b} = {a * x} {sign} {b} = {total}.\nSo x = {x}."
    )
    question = rng.choice(("Solve {}x {} {} = {}.", "Find x if {}x {} {} = {}.", "For which x is {}x {} {} = {}?"))
    return Dialogue(question.format(a, sign, b, total), answer)


def doubling(rng: random.Random) -> Dialogue:
    base, exponent = rng.choice(
        ((2, rng.randint(4, 12)), (3, rng.randint(3, 7)), (4, rng.randint(3, 6)), (5, rng.randint(3, 5)))
    )
    rows, value = [], base
    for i in range(2, exponent + 1):
        rows.append(f"{base}^{i} = {value} x {base} = {value * base}")
        value *= base
    steps = "\n".join(rows)
    return Dialogue(
        ask(rng, f"{base}^{exponent}"),
        f"Multiply by {base} again and again.\n{base}^1 = {base}\n{steps}\nSo {base}^{exponent} = {value}.",
    )


def shop_problem(rng: random.Random) -> Dialogue:
    name, goods = rng.choice(NAMES), rng.choice(GOODS)
    n, price = rng.randint(3, 12), rng.randint(2, 15)
    paid = (n * price // 50 + 1) * 50
    question = f"{name} buys {n} {goods} for {price} dollars each and pays with {paid} dollars. How much change does {name} get?"
    answer = (
        f"The {goods} cost {n} x {price} = {n * price} dollars.\n{name} pays {paid} dollars.\n"
        f"The change is {paid} - {n * price} = {paid - n * price} dollars.\n{name} gets {paid - n * price} dollars back."
    )
    return Dialogue(question, answer)


def box_problem(rng: random.Random) -> Dialogue:
    name, other = rng.sample(NAMES, 2)
    goods = rng.choice(GOODS)
    n_boxes, per_box, given = rng.randint(3, 12), rng.randint(4, 20), rng.randint(2, 12)
    more = rng.randint(5, 40)
    have = n_boxes * per_box
    question = (
        f"{name} has {n_boxes} boxes with {per_box} {goods} each. {name} gives {given} {goods} to {other} and then finds {more} more. "
        f"How many {goods} does {name} have now?"
    )
    answer = (
        f"First count the {goods} in the boxes.\n{n_boxes} x {per_box} = {have}\nThen take away the {given} {goods} for {other}.\n"
        f"{have} - {given} = {have - given}\nThen add the {more} {goods} that {name} finds.\n{have - given} + {more} = {have - given + more}\n"
        f"So {name} has {have - given + more} {goods} now."
    )
    return Dialogue(question, answer)


def travel_problem(rng: random.Random) -> Dialogue:
    vehicle = rng.choice(("train", "car", "bus", "bicycle", "truck", "ship"))
    speeds, hours = [rng.randint(2, 12) * 10 for _ in range(2)], [rng.randint(2, 6) for _ in range(2)]
    first, second = speeds[0] * hours[0], speeds[1] * hours[1]
    question = f"A {vehicle} travels {hours[0]} hours at {speeds[0]} km per hour and then {hours[1]} hours at {speeds[1]} km per hour. How far does it go?"
    answer = (
        f"Distance is speed times time.\nFirst part: {speeds[0]} x {hours[0]} = {first} km.\nSecond part: {speeds[1]} x {hours[1]} = {second} km.\n"
        f"Together: {first} + {second} = {first + second} km.\nThe {vehicle} goes {first + second} km."
    )
    return Dialogue(question, answer)


def savings_problem(rng: random.Random) -> Dialogue:
    name, weeks = rng.choice(NAMES), rng.randint(5, 12)
    start, weekly = rng.randint(5, 60), rng.randint(3, 20)
    rows = "\n".join(
        f"Week {i}: {start + (i - 1) * weekly} + {weekly} = {start + i * weekly}" for i in range(1, weeks + 1)
    )
    question = f"{name} has {start} dollars and saves {weekly} dollars every week. How much does {name} have after {weeks} weeks?"
    return Dialogue(
        question, f"Go week by week.\n{rows}\nAfter {weeks} weeks {name} has {start + weeks * weekly} dollars."
    )


TASKS: tuple[tuple[Callable[[random.Random], Dialogue], int], ...] = (
    (addition, 4),
    (subtraction, 3),
    (multiplication, 4),
    (division, 2),
    (times_table, 2),
    (sequence, 1),
    (list_total, 2),
    (percentage, 2),
    (equation, 2),
    (doubling, 1),
    (shop_problem, 2),
    (box_problem, 2),
    (travel_problem, 2),
    (savings_problem, 1),
)


def sample(rng: random.Random) -> Dialogue:
    """Draw one arithmetic question with its worked answer."""
    tasks, weights = zip(*TASKS, strict=True)
    task: Callable[[random.Random], Dialogue] = rng.choices(tasks, weights)[0]
    return task(rng)

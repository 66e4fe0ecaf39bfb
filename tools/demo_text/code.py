# ruff: noqa: E501 -- the templates are sentences; cutting them would hide them
"""Small Python functions and classes with docstrings, an explanation and an example.

Each pattern is filled from short tables of names, so that the text varies while the code stays correct.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .dialogue import Dialogue

LISTS = ("numbers", "values", "items", "scores", "prices", "data")
ASK = (
    "Write a Python function that {}.",
    "Please write a function in Python that {}.",
    "How do I write a Python function that {}?",
    "I need a Python function that {}.",
)
INTRO = ("Here is a function that {}:", "This function {}:", "You can write it like this:", "Sure, here is the code:")
OUTRO = ("Call it like this:", "Here is an example:", "You can use it like this:", "For example:")

# (what it keeps, condition on {v}, function name)
KEEPS = (
    ("even numbers", "{v} % 2 == 0", "keep_even"),
    ("odd numbers", "{v} % 2 == 1", "keep_odd"),
    ("positive numbers", "{v} > 0", "keep_positive"),
    ("negative numbers", "{v} < 0", "keep_negative"),
    ("multiples of {n}", "{v} % {n} == 0", "keep_multiples"),
    ("numbers greater than {n}", "{v} > {n}", "keep_greater"),
    ("numbers smaller than {n}", "{v} < {n}", "keep_smaller"),
)
# (what it does to each number, expression of {v}, function name)
CHANGES = (
    ("squares", "{v} * {v}", "square_all"),
    ("doubles", "{v} * 2", "double_all"),
    ("adds {n} to", "{v} + {n}", "add_to_all"),
    ("multiplies by {n}", "{v} * {n}", "scale_all"),
    ("takes the absolute value of", "abs({v})", "absolute_all"),
    ("negates", "-{v}", "negate_all"),
)
# (what it returns, start, update, function name)
FOLDS = (
    ("the sum of", "0", "total += {v}", "sum_of"),
    ("the product of", "1", "total *= {v}", "product_of"),
    ("the number of", "0", "total += 1", "count_of"),
    ("the sum of the squares of", "0", "total += {v} * {v}", "sum_of_squares"),
)
CLASSES = (
    ("Account", "bank account", "balance", "deposit", "withdraw", "amount"),
    ("Counter", "counter", "count", "increase", "decrease", "step"),
    ("Tank", "water tank", "level", "fill", "drain", "litres"),
    ("Battery", "battery", "charge", "load", "use", "energy"),
    ("Wallet", "wallet", "money", "put_in", "take_out", "coins"),
    ("Shelf", "shelf in a shop", "stock", "add", "remove", "boxes"),
    ("Player", "player in a game", "points", "win", "lose", "score"),
)
RECORDS = (
    ("Book", ("title: str", "author: str", "pages: int", "price: float")),
    ("Car", ("brand: str", "model: str", "year: int", "speed: float")),
    ("Person", ("name: str", "age: int", "email: str", "city: str")),
    ("Point", ("x: float", "y: float", "label: str")),
    ("Task", ("title: str", "done: bool", "priority: int")),
    ("City", ("name: str", "country: str", "population: int")),
    ("Song", ("title: str", "artist: str", "length: int")),
    ("Recipe", ("name: str", "steps: list", "minutes: int")),
)
SIGNATURES = {"str": '""', "int": "0", "float": "0.0", "bool": "False", "list": "[]"}


def loop_variable(list_name: str) -> str:
    """Name one element of a list: numbers -> number."""
    return {"data": "value"}.get(list_name, list_name[:-1])


def ints(rng: random.Random, low: int = -9, high: int = 20) -> list[int]:
    """Draw a short list of integers for an example."""
    return [rng.randint(low, high) for _ in range(rng.randint(4, 6))]


def dialogue(rng: random.Random, does: str, code: str, explain: str, example: str) -> Dialogue:
    """Put code, explanation and example together."""
    intro = rng.choice(INTRO).format(does)
    outro = rng.choice(OUTRO)
    question = rng.choice(ASK).format(does)
    return Dialogue(question, f"{intro}\n```python\n{code}\n```\n{explain}\n{outro}\n```python\n{example}\n```")


def keep(rng: random.Random) -> Dialogue:
    kept, condition, name = rng.choice(KEEPS)
    n, items = rng.randint(2, 12), rng.choice(LISTS)
    v = loop_variable(items)
    kept, condition = kept.format(n=n), condition.format(v=v, n=n)
    values = ints(rng)
    result = [x for x in values if eval(condition, {v: x})]
    if rng.random() < 0.5:
        body = f"    return [{v} for {v} in {items} if {condition}]"
        explain = f"The list comprehension goes through {items} and keeps each {v} for which `{condition}` is true."
    else:
        body = f"    result = []\n    for {v} in {items}:\n        if {condition}:\n            result.append({v})\n    return result"
        explain = f"The loop goes through {items} and appends each {v} for which `{condition}` is true to the result."
    code = f'def {name}({items}):\n    """Return the {kept} in {items}."""\n{body}'
    return dialogue(
        rng, f"returns the {kept} in a list called {items}", code, explain, f"print({name}({values}))  # {result}"
    )


def change(rng: random.Random) -> Dialogue:
    what, expression, name = rng.choice(CHANGES)
    n, items = rng.randint(2, 12), rng.choice(LISTS)
    v = loop_variable(items)
    what, expression = what.format(n=n), expression.format(v=v, n=n)
    values = ints(rng)
    result = [eval(expression, {v: x}) for x in values]
    if rng.random() < 0.5:
        body = f"    return [{expression} for {v} in {items}]"
        explain = f"The list comprehension computes `{expression}` for each {v} in {items}."
    else:
        body = f"    result = []\n    for {v} in {items}:\n        result.append({expression})\n    return result"
        explain = f"The loop computes `{expression}` for each {v} in {items} and appends it to the result."
    code = f'def {name}({items}):\n    """Return a list that {what} each {v} in {items}."""\n{body}'
    return dialogue(
        rng, f"{what} each element of a list called {items}", code, explain, f"print({name}({values}))  # {result}"
    )


def fold(rng: random.Random) -> Dialogue:
    what, start, update, name = rng.choice(FOLDS)
    kept, condition, keep_name = rng.choice(KEEPS)
    n, items = rng.randint(2, 12), rng.choice(LISTS)
    v = loop_variable(items)
    kept, condition, update = kept.format(n=n), condition.format(v=v, n=n), update.format(v=v)
    name = f"{name}_{keep_name.removeprefix('keep_')}"
    code = (
        f'def {name}({items}):\n    """Return {what} the {kept} in {items}."""\n    total = {start}\n    for {v} in {items}:\n'
        f"        if {condition}:\n            {update}\n    return total"
    )
    explain = f"The total starts at {start}. For each {v} the function checks `{condition}` and then runs `{update}`. At the end it returns the total."
    values = ints(rng, 1, 20)
    scope: dict[str, Callable[[list[int]], int]] = {}
    exec(code, scope)
    return dialogue(
        rng, f"returns {what} the {kept} in {items}", code, explain, f"print({name}({values}))  # {scope[name](values)}"
    )


def text_function(rng: random.Random) -> Dialogue:
    word = rng.choice(("banana", "level", "python", "hello", "radar", "window", "garden", "summer", "noon", "letter"))
    letters = rng.choice(("vowels", "spaces", "digits", "capital letters"))
    test = {
        "vowels": 'char in "aeiou"',
        "spaces": 'char == " "',
        "digits": "char.isdigit()",
        "capital letters": "char.isupper()",
    }[letters]
    choices = (
        (
            "reverses a string",
            "reverse_text",
            "Return the text in reverse order.",
            "    return text[::-1]",
            "The slice `[::-1]` walks through the string from the last character to the first.",
            repr(word[::-1]),
        ),
        (
            "checks whether a word is a palindrome",
            "is_palindrome",
            "Return True if the text reads the same in both directions.",
            "    text = text.lower()\n    return text == text[::-1]",
            "The function compares the text with its reverse. If both are equal, the word is a palindrome.",
            str(word == word[::-1]),
        ),
        (
            f"counts the {letters} in a string",
            f"count_{letters.replace(' ', '_')}",
            f"Return the number of {letters} in the text.",
            f"    count = 0\n    for char in text:\n        if {test}:\n            count += 1\n    return count",
            f"The loop looks at each character and adds one to the count if `{test}` is true.",
            str(sum(c in "aeiou" for c in word)) if letters == "vowels" else "0",
        ),
        (
            "counts how often each letter occurs in a string",
            "count_letters",
            "Return a dictionary with the count of each letter.",
            "    counts = {}\n    for char in text:\n        counts[char] = counts.get(char, 0) + 1\n    return counts",
            "The dictionary maps each letter to its count. The method `get` returns 0 for a letter that is not there yet.",
            str({c: word.count(c) for c in dict.fromkeys(word)}),
        ),
        (
            "makes the first letter of a string a capital letter",
            "capitalize_first",
            "Return the text with a capital first letter.",
            "    if not text:\n        return text\n    return text[0].upper() + text[1:]",
            "The function takes the first letter, makes it a capital letter and adds the rest of the text.",
            repr(word.capitalize()),
        ),
    )
    does, name, doc, body, explain, result = rng.choice(choices)
    code = f'def {name}(text):\n    """{doc}"""\n{body}'
    return dialogue(rng, does, code, explain, f'print({name}("{word}"))  # {result}')


def number_function(rng: random.Random) -> Dialogue:
    n = rng.randint(3, 9)
    a, b = rng.randint(6, 60), rng.randint(4, 40)
    choices = (
        (
            "computes the factorial of a number",
            "factorial",
            "n",
            "Return the factorial of n.",
            "    result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result",
            "The loop multiplies the result by each number from 2 to n.",
            f"{n}",
        ),
        (
            "computes the factorial with recursion",
            "factorial",
            "n",
            "Return the factorial of n.",
            "    if n <= 1:\n        return 1\n    return n * factorial(n - 1)",
            "The function calls itself with a smaller number until it reaches 1.",
            f"{n}",
        ),
        (
            "returns the n-th Fibonacci number",
            "fibonacci",
            "n",
            "Return the n-th Fibonacci number.",
            "    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
            "The variables a and b hold two neighbours of the sequence. Each step moves them one place forward.",
            f"{n + 4}",
        ),
        (
            "computes the greatest common divisor of two numbers",
            "gcd",
            "a, b",
            "Return the greatest common divisor of a and b.",
            "    while b:\n        a, b = b, a % b\n    return a",
            "The loop replaces the pair by the smaller number and the remainder until the remainder is zero.",
            f"{a}, {b}",
        ),
        (
            "checks whether a number is prime",
            "is_prime",
            "n",
            "Return True if n is a prime number.",
            "    if n < 2:\n        return False\n    for i in range(2, int(n ** 0.5) + 1):\n        if n % i == 0:\n            return False\n    return True",
            "The loop tries every divisor up to the square root of n. If one divides n, the number is not prime.",
            f"{a}",
        ),
        (
            "returns the sum of the digits of a number",
            "digit_sum",
            "n",
            "Return the sum of the digits of n.",
            "    total = 0\n    while n > 0:\n        total += n % 10\n        n //= 10\n    return total",
            "The remainder `n % 10` is the last digit. The division `n //= 10` removes it.",
            f"{a * b}",
        ),
        (
            "raises a number to a power",
            "power",
            "base, exponent",
            "Return base to the power of exponent.",
            "    result = 1\n    for _ in range(exponent):\n        result *= base\n    return result",
            "The loop multiplies the result by the base once for each step of the exponent.",
            f"{n}, {b % 4 + 2}",
        ),
    )
    does, name, args, doc, body, explain, call = rng.choice(choices)
    code = f'def {name}({args}):\n    """{doc}"""\n{body}'
    scope: dict[str, Callable[..., int]] = {}
    exec(code, scope)
    result = eval(f"{name}({call})", scope)
    return dialogue(rng, does, code, explain, f"print({name}({call}))  # {result}")


def search_or_sort(rng: random.Random) -> Dialogue:
    items, values = rng.choice(LISTS), ints(rng, 1, 40)
    choices = (
        (
            "sorts a list called {x} with bubble sort",
            "bubble_sort",
            "",
            "Sort the list with bubble sort.",
            "    n = len({x})\n    for i in range(n):\n        for j in range(n - i - 1):\n            if {x}[j] > {x}[j + 1]:\n                {x}[j], {x}[j + 1] = {x}[j + 1], {x}[j]\n    return {x}",
            "The inner loop compares neighbours and swaps them if they are in the wrong order. After each pass the largest element is at the end.",
        ),
        (
            "sorts a list called {x} with insertion sort",
            "insertion_sort",
            "",
            "Sort the list with insertion sort.",
            "    for i in range(1, len({x})):\n        current = {x}[i]\n        j = i - 1\n        while j >= 0 and {x}[j] > current:\n            {x}[j + 1] = {x}[j]\n            j -= 1\n        {x}[j + 1] = current\n    return {x}",
            "Each element moves to the left until the element before it is not larger.",
        ),
        (
            "finds the largest element of a list called {x}",
            "find_largest",
            "",
            "Return the largest element.",
            "    largest = {x}[0]\n    for {v} in {x}:\n        if {v} > largest:\n            largest = {v}\n    return largest",
            "The function remembers the largest element so far and replaces it when it finds a larger one.",
        ),
        (
            "finds the smallest element of a list called {x}",
            "find_smallest",
            "",
            "Return the smallest element.",
            "    smallest = {x}[0]\n    for {v} in {x}:\n        if {v} < smallest:\n            smallest = {v}\n    return smallest",
            "The function remembers the smallest element so far and replaces it when it finds a smaller one.",
        ),
        (
            "removes duplicates from a list called {x}",
            "remove_duplicates",
            "",
            "Return the list without duplicates, in the same order.",
            "    seen = set()\n    result = []\n    for {v} in {x}:\n        if {v} not in seen:\n            seen.add({v})\n            result.append({v})\n    return result",
            "The set holds the elements that were seen before. Only new elements are appended to the result.",
        ),
        (
            "finds the position of an element of {x} with binary search",
            "binary_search",
            ", target",
            "Return the position of target in the sorted list, or -1.",
            "    low, high = 0, len({x}) - 1\n    while low <= high:\n        middle = (low + high) // 2\n        if {x}[middle] == target:\n            return middle\n        if {x}[middle] < target:\n            low = middle + 1\n        else:\n            high = middle - 1\n    return -1",
            "Each step compares the target with the middle element and throws away one half of the list.",
        ),
        (
            "returns the running totals of a list called {x}",
            "running_totals",
            "",
            "Return the list of running totals.",
            "    totals = []\n    total = 0\n    for {v} in {x}:\n        total += {v}\n        totals.append(total)\n    return totals",
            "The loop adds each element to the total and appends the total to the list.",
        ),
    )
    does, name, extra, doc, body, explain = rng.choice(choices)
    does, body = does.format(x=items), body.format(x=items, v=loop_variable(items))
    code = f'def {name}({items}{extra}):\n    """{doc}"""\n{body}'
    values = sorted(values) if extra else values
    call = f"{name}({values}, {rng.choice(values)})" if extra else f"{name}({values})"
    scope: dict[str, Callable[..., object]] = {}
    exec(code, scope)
    return dialogue(rng, does, code, explain, f"print({call})  # {eval(call, scope)}")


def small_class(rng: random.Random) -> Dialogue:
    name, what, field, up, down, arg = rng.choice(CLASSES)
    start, plus, minus = rng.randint(0, 50), rng.randint(5, 40), rng.randint(1, 5)
    var = name.lower()
    code = (
        f'class {name}:\n    """A {what} with a {field}."""\n\n    def __init__(self, {field}=0):\n        self.{field} = {field}\n\n'
        f'    def {up}(self, {arg}):\n        """Add {arg} to the {field}."""\n        if {arg} < 0:\n            raise ValueError("{arg} must not be negative")\n        self.{field} += {arg}\n\n'
        f'    def {down}(self, {arg}):\n        """Take {arg} from the {field}."""\n        if {arg} > self.{field}:\n            raise ValueError("not enough {field}")\n        self.{field} -= {arg}'
    )
    example = f"{var} = {name}({start})\n{var}.{up}({plus})\n{var}.{down}({minus})\nprint({var}.{field})  # {start + plus - minus}"
    explain = f"The class keeps the {field} in an attribute. The method `{up}` adds to it and the method `{down}` takes from it. Both check the {arg} first."
    question = rng.choice(
        (
            "Write a Python class for a {} with the methods {} and {}.",
            "Please write a class that models a {} and has the methods {} and {}.",
            "I need a Python class for a {} with {} and {}.",
        )
    )
    outro = rng.choice(OUTRO)
    intro = rng.choice((f"Here is the class {name}:", f"This class models a {what}:", "Sure, here is the code:"))
    return Dialogue(
        question.format(what, up, down),
        f"{intro}\n```python\n{code}\n```\n{explain}\n{outro}\n```python\n{example}\n```",
    )


def record(rng: random.Random) -> Dialogue:
    name, fields = rng.choice(RECORDS)
    fields = tuple(rng.sample(fields, rng.randint(2, len(fields))))
    lines = "\n".join(
        f"    {field}" + (f" = {SIGNATURES[field.split(': ')[1]]}" if field.split(": ")[1] != "list" else "")
        for field in fields
    )
    names = [field.split(":")[0] for field in fields]
    body = " ".join(f"{{self.{n}}}" for n in names)
    code = (
        f'from dataclasses import dataclass\n\n\n@dataclass\nclass {name}:\n    """A {name.lower()} with {", ".join(names)}."""\n\n{lines}\n\n'
        f'    def describe(self):\n        """Return a short text about the {name.lower()}."""\n        return f"{name}: {body}"'
    )
    listing = ", ".join(names[:-1]) + " and " + names[-1]
    question = rng.choice(
        (
            "Write a dataclass for a {} with {}.",
            "Please write a Python dataclass called {} that has {}.",
            "How do I define a dataclass for a {} with {}?",
        )
    )
    explain = f"The decorator `@dataclass` writes the method `__init__` for the fields {listing}. The method `describe` puts them into one line of text."
    return Dialogue(question.format(name, listing), f"Here is the dataclass {name}:\n```python\n{code}\n```\n{explain}")


TASKS: tuple[tuple[Callable[[random.Random], Dialogue], int], ...] = (
    (keep, 3),
    (change, 3),
    (fold, 3),
    (text_function, 2),
    (number_function, 2),
    (search_or_sort, 3),
    (small_class, 2),
    (record, 2),
)


def sample(rng: random.Random) -> Dialogue:
    """Draw one programming question with its answer."""
    tasks, weights = zip(*TASKS, strict=True)
    task: Callable[[random.Random], Dialogue] = rng.choices(tasks, weights)[0]
    return task(rng)

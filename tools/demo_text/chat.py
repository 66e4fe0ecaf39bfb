# ruff: noqa: E501 -- the templates are sentences; cutting them would hide them
"""Chat: simple facts, how-to lists, tips, comparisons, plans and short stories.

The facts stand in tables in `chat_facts`; the phrasing varies at random, which gives this domain the most entropy.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from . import chat_facts as facts
from .dialogue import Dialogue


def pick(rng: random.Random, *choices: str) -> str:
    """Draw one of several phrasings."""
    return rng.choice(choices)


def with_article(noun: str) -> str:
    """Put the right article before a noun: owl -> an owl."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def numbered(lines: list[str]) -> str:
    """Format a numbered list."""
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def country(rng: random.Random) -> Dialogue:
    name, capital, continent, language, food, sight = rng.choice(facts.COUNTRIES)
    question = pick(
        rng,
        f"What is the capital of {name}?",
        f"Tell me about {name}.",
        f"Which language do people speak in {name}?",
        f"What should I see in {name}?",
        f"What do people eat in {name}?",
        f"Where is {name}?",
        f"Can you tell me something about {name}?",
        f"I want to visit {name}. What should I know?",
    )
    sentences = [
        pick(rng, f"{name} is a country in {continent}.", f"{name} lies in {continent}."),
        pick(rng, f"The capital is {capital}.", f"Its capital is {capital}.", f"The capital city is called {capital}."),
        pick(rng, f"Most people there speak {language}.", f"The main language is {language}."),
        pick(rng, f"A well-known dish in {name} is {food}.", f"Many visitors like the food, for example {food}."),
        pick(
            rng,
            f"A famous sight is {sight}.",
            f"Many people travel there to see {sight}.",
            f"If you visit, do not miss {sight}.",
        ),
    ]
    order = {"capital": 1, "language": 2, "see": 4, "eat": 3}
    first = next((i for word, i in order.items() if word in question), 0)
    head = (
        sentences.pop(first)
        .replace("Its capital is", f"The capital of {name} is")
        .replace("The capital is", f"The capital of {name} is")
    )
    answer = " ".join([head, *sentences])
    closing = pick(rng, "", "", f"Would you like to know more about {name}?", "Have a good trip!")
    return Dialogue(question, f"{answer} {closing}".strip())


def animal(rng: random.Random) -> Dialogue:
    name, kind, home, diet, fact = rng.choice(facts.ANIMALS)
    question = pick(
        rng,
        f"What is {with_article(name)}?",
        f"Tell me about the {name}.",
        f"Where does the {name} live?",
        f"What does {with_article(name)} eat?",
        f"Give me a fact about the {name}.",
        f"Explain to a child what {with_article(name)} is.",
    )
    sentences = [
        pick(rng, f"The {name} is {kind}.", f"{with_article(name).capitalize()} is {kind}."),
        pick(rng, f"It lives in {home}.", f"You can find it in {home}.", f"Its home is {home}."),
        pick(rng, f"It eats {diet}.", f"Its food is {diet}.", f"It feeds on {diet}."),
        pick(rng, f"Did you know? {fact}", f"An interesting fact: {fact}", f"{fact}"),
    ]
    closing = pick(
        rng, "", "", "Animals like this are worth protecting.", "Is there another animal you would like to know about?"
    )
    return Dialogue(question, f"{' '.join(sentences)} {closing}".strip())


def how_to(rng: random.Random) -> Dialogue:
    task, needs, steps, hint = rng.choice(facts.HOW_TO)
    question = pick(
        rng,
        f"How do I {task}?",
        f"How can I {task}?",
        f"Can you explain how to {task}?",
        f"Give me steps to {task}.",
        f"What is the best way to {task}?",
        f"Please help me {task}.",
        f"I want to {task}. What should I do?",
    )
    intro = pick(
        rng,
        f"Here is how to {task}.",
        f"To {task}, follow these steps.",
        f"It is easy to {task}.",
        "Sure! Here is a simple way.",
    )
    chosen = sorted(rng.sample(range(len(steps)), rng.randint(max(4, len(steps) - 2), len(steps))))
    lines = [steps[i] for i in chosen]
    closing = pick(
        rng, f"Tip: {hint}", f"One more tip: {hint}", f"{hint}", "Good luck!", "Let me know if you have questions."
    )
    return Dialogue(question, f"{intro}\nYou need {needs}.\n{numbered(lines)}\n{closing}")


def tips(rng: random.Random) -> Dialogue:
    goal, ideas = rng.choice(facts.TIPS)
    n = rng.randint(4, 6)
    question = pick(
        rng,
        f"Give me {n} tips to {goal}.",
        f"How can I {goal}? Give me {n} ideas.",
        f"List {n} ways to {goal}.",
        f"I would like to {goal}. Do you have {n} tips?",
    )
    chosen = rng.sample(ideas, n)
    intro = pick(rng, f"Here are {n} tips to {goal}:", f"These {n} ideas can help you {goal}:", "Of course! Try these:")
    closing = pick(
        rng,
        "Start with one of them and take your time.",
        "Small steps make a big difference.",
        "I hope this helps!",
        "Which one would you like to try first?",
    )
    return Dialogue(question, f"{intro}\n{numbered(chosen)}\n{closing}")


def comparison(rng: random.Random) -> Dialogue:
    a, b = rng.sample(facts.THINGS, 2)
    question = pick(
        rng,
        f"What is the difference between a {a[0]} and a {b[0]}?",
        f"Compare a {a[0]} with a {b[0]}.",
        f"Should I take a {a[0]} or a {b[0]}?",
    )
    lines = [
        pick(
            rng,
            f"A {a[0]} is {a[1]}, while a {b[0]} is {b[1]}.",
            f"Both are useful, but a {a[0]} is {a[1]} and a {b[0]} is {b[1]}.",
        ),
        pick(rng, f"The good thing about a {a[0]} is that it {a[2]}.", f"A {a[0]} {a[2]}."),
        pick(rng, f"The good thing about a {b[0]} is that it {b[2]}.", f"A {b[0]} {b[2]}."),
        pick(
            rng,
            f"Choose the {a[0]} if you want to {a[3]}, and the {b[0]} if you want to {b[3]}.",
            f"Take a {a[0]} to {a[3]}. Take a {b[0]} to {b[3]}.",
        ),
    ]
    return Dialogue(question, " ".join(lines))


def plan(rng: random.Random) -> Dialogue:
    place, season = rng.choice(facts.PLACES), rng.choice(facts.SEASONS)
    days = rng.randint(2, 4)
    question = pick(
        rng,
        f"Plan {days} days {place} in {season}.",
        f"What can I do {place} in {season}? I have {days} days.",
        f"Make a plan for {days} days {place} in {season}.",
    )
    morning, noon, evening = facts.MORNING[place], facts.NOON, facts.EVENING
    lines = [
        f"Day {day}: In the morning, {rng.choice(morning)}. At noon, {rng.choice(noon)}. In the evening, {rng.choice(evening)}."
        for day in range(1, days + 1)
    ]
    pack = " and ".join(rng.sample(facts.PACKING[season], 2))
    intro = pick(
        rng,
        f"Here is a plan for {days} days {place}:",
        f"{season.capitalize()} is a good time to be {place}. Here is a plan:",
    )
    newline = "\n"
    return Dialogue(question, f"{intro}\n{newline.join(lines)}\nDo not forget to pack {pack}.")


def story(rng: random.Random) -> Dialogue:
    name, hero = rng.choice(facts.HERO_NAMES), rng.choice(facts.HEROES)
    place, thing, helper = (
        rng.choice(facts.STORY_PLACES),
        rng.choice(facts.STORY_THINGS),
        rng.choice([h for h in facts.HEROES if h != hero]),
    )
    question = pick(
        rng,
        f"Tell me a short story about {with_article(hero)} called {name}.",
        f"Write a short story about {with_article(hero)} and a {thing}.",
        f"Can you tell a story about {with_article(hero)} {place}?",
    )
    sentences = [
        pick(
            rng,
            f"Once upon a time there was {with_article(hero)} called {name} who lived {place}.",
            f"A long time ago, {with_article(hero)} named {name} lived {place}.",
        ),
        pick(
            rng,
            f"Every day {name} dreamed of a {thing}.",
            f"One day {name} lost a {thing}.",
            f"{name} had always wanted a {thing}.",
        ),
        pick(
            rng,
            f"So {name} went out early in the morning to look for it.",
            f"Nobody knew where to find one, so {name} began to search.",
        ),
        pick(
            rng,
            f"On the way {name} met an old {helper}.",
            f"Soon a friendly {helper} came along.",
            f"After a while {name} saw {with_article(helper)} by the road.",
        ),
        pick(rng, f'"What are you looking for?" asked the {helper}.', f'"Can I help you?" said the {helper}.'),
        pick(rng, f'"I am looking for a {thing}," said {name}.', f'"I need a {thing}," answered {name}.'),
        pick(
            rng,
            f"The {helper} smiled and showed {name} the way.",
            f"The {helper} knew the place well, and they went on together.",
        ),
        pick(
            rng,
            f"Behind a big tree they found the {thing}.",
            f"At the end of the path lay the {thing}.",
            f"There it was: a {thing}, as bright as the sun.",
        ),
        pick(
            rng,
            f"{name} shared it with the {helper}, and they became good friends.",
            f"{name} was happy and thanked the {helper}.",
            "From that day on they were the best of friends.",
        ),
        pick(
            rng,
            "And if you listen well, you can still hear them laugh.",
            "The end.",
            "And so everything turned out well.",
        ),
    ]
    return Dialogue(question, " ".join(sentences))


def why(rng: random.Random) -> Dialogue:
    subject, reasons = rng.choice(facts.WHY)
    question = pick(
        rng,
        f"Why {subject}?",
        f"Can you explain why {subject}?",
        f"Tell me in simple words why {subject}.",
        f"Do you know why {subject}?",
    )
    intro = pick(rng, "Good question!", "There is a simple reason.", "Let me explain.", "In simple words:")
    return Dialogue(question, f"{intro} {' '.join(reasons)}")


def message(rng: random.Random) -> Dialogue:
    to, reason, detail = rng.choice(facts.MESSAGES)
    name, sender = rng.sample(facts.HERO_NAMES, 2)
    question = pick(
        rng,
        f"Write a short message to {to} called {name} to {reason}.",
        f"Help me write an email to {name}, {to}, to {reason}.",
        f"I need to write to {to} to {reason}. The name is {name}.",
    )
    body = [
        pick(rng, f"Dear {name},", f"Hello {name},", f"Hi {name},"),
        pick(rng, "I hope you are well.", "How are you?", "I hope you had a good week."),
        detail,
        pick(
            rng,
            "Please let me know if that works for you.",
            "I look forward to your answer.",
            "Thank you very much for your help.",
        ),
        pick(rng, f"Best wishes,\n{sender}", f"Kind regards,\n{sender}"),
    ]
    intro = pick(rng, "Here is a draft:", "You could write this:", "Sure, how about this:")
    newline = "\n"
    return Dialogue(question, f"{intro}\n{newline.join(body)}")


TASKS: tuple[tuple[Callable[[random.Random], Dialogue], int], ...] = (
    (country, 4),
    (animal, 3),
    (how_to, 5),
    (tips, 4),
    (comparison, 2),
    (plan, 3),
    (story, 4),
    (why, 2),
    (message, 2),
)


def sample(rng: random.Random) -> Dialogue:
    """Draw one chat question with its answer."""
    tasks, weights = zip(*TASKS, strict=True)
    task: Callable[[random.Random], Dialogue] = rng.choices(tasks, weights)[0]
    return task(rng)

"""Generate a word problem from a seed and an index: plan, numbers, names, sentences."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from d2f.problems.frames import Frame, Subject, Wording, word_quantity
from d2f.problems.numbers import Filled, fill_numbers
from d2f.problems.plan import Plan, sample_plan
from d2f.problems.problem import Problem, ProblemConfig, problem_stream, split_of
from d2f.problems.words import COLORS, DAYS, FACTS, ITEMS, PEOPLE, PRICED

_NAMES: dict[str, tuple[Subject, ...]] = {
    "person": tuple(Subject(*person) for person in PEOPLE),
    "day": tuple(map(Subject, DAYS)),
    "color": tuple(map(Subject, COLORS)),
    "priced": tuple(map(Subject, PRICED)),
}
_DEFAULT = ProblemConfig()


class _TooManyError(Exception):
    """A story needs more days, colours or things than the word lists have."""


class _Story:
    """A plan with its numbers and names, from which sentences are written."""

    def __init__(self, rng: Random, plan: Plan, filled: list[Filled]) -> None:
        self.rng, self.plan, self.filled = rng, plan, filled
        self._used: dict[str, set[int]] = {}
        subjects: list[Subject] = []
        for kind, one, two in plan.subjects:
            if kind == "pair":
                name = f"{subjects[one].name} and {subjects[two].name}"
                subjects.append(Subject(name, "they", "their", True))
            else:
                subjects.append(self._stranger(kind))
        self._items: list[str] = []
        for group in plan.items:
            words = ITEMS[group]
            item = words[int(rng.random() * len(words))]
            while item in self._items:
                item = words[int(rng.random() * len(words))]
            self._items.append(item)
        self.wordings = [
            None
            if node.frame is None
            else self._word(node.frame, subjects[node.subject], node.item)
            for node in plan.nodes
        ]

    def _stranger(self, kind: str) -> Subject:
        """Return a subject of a class that does not occur in the problem yet."""
        pool, used = _NAMES[kind], self._used.setdefault(kind, set())
        if len(used) == len(pool):
            raise _TooManyError
        while True:
            choice = int(self.rng.random() * len(pool))
            if choice not in used:
                used.add(choice)
                return pool[choice]

    def _word(self, frame: Frame, subject: Subject, item: int) -> Wording:
        return word_quantity(frame, subject, self._items[item] if item >= 0 else "")

    def sentence(self, i: int) -> str:
        """Return the sentence that states quantity `i`, or asks for it if it is the question."""
        node, numbers, w = self.plan.nodes[i], self.filled[i], self.wordings[i]
        rel = node.relation
        if rel is None:
            assert w is not None
            return f"{w.does} {numbers.value} {w.u}{w.p}."
        a, b = self.wordings[node.a], self.wordings[node.b] if node.b >= 0 else None
        text = rel.text[0]
        if len(rel.text) > 1:
            text = rel.text[int(self.rng.random() * len(rel.text))]
        if text in ("{total}", "{mean}", "{diff}"):
            # For these three the frame has a template of its own.
            text = getattr(a, text[1:-1])
        return text.format(a=a, b=b, w=w, c=numbers.c, k=numbers.k)

    def steps(self, i: int) -> list[str]:
        """Return the sentences that work out quantity `i`, one for each calculation."""
        node, numbers, w = self.plan.nodes[i], self.filled[i], self.wordings[i]
        rel = node.relation
        if rel is None:
            return []
        a, b = self.wordings[node.a], self.wordings[node.b] if node.b >= 0 else None
        templates = [rel.mid] * (len(numbers.calculations) - 1)
        templates.append(rel.answer or "{w.does} {calc} {w.u}{w.p}.")
        return [
            template.format(
                a=a, b=b, w=w, c=numbers.c, k=numbers.k, calc=f"{x} {sign} {y} = {result}"
            )
            for template, (x, sign, y, result) in zip(templates, numbers.calculations, strict=True)
        ]

    def distractors(self, rate: float) -> list[str]:
        """Draw up to two sentences that the answer does not need."""
        found: list[str] = []
        while len(found) < 2 and self.rng.random() < rate:
            i = int(self.rng.random() * len(self.plan.nodes))
            frame = self.plan.nodes[i].frame
            if (
                not found
                and frame is not None
                and frame.base is not None
                and "age" not in frame.tags
                and self.rng.random() < 0.7
            ):
                found.append(self._beside(i, frame))
            else:
                found.append(self._fact())
        return found

    def _beside(self, i: int, frame: Frame) -> str:
        """Return a sentence like that of quantity `i` about someone who plays no part."""
        other = self._word(frame, self._stranger(frame.who), self.plan.nodes[i].item)
        known = None if i in self.plan.changed else self.wordings[i]
        number = 2 + int(self.rng.random() * 28)
        if known is not None and self.rng.random() < 0.4:
            return f"{other.does} {number}{other.more} than {known.ref}."
        return f"{other.does} {number} {other.u}{other.p}."

    def _fact(self) -> str:
        """Return a fact about a stranger that shares no unit with the story."""
        name = self._stranger("person").name
        units = {w.u for w in self.wordings if w is not None}
        start = int(self.rng.random() * len(FACTS))
        # A story uses fewer units than there are facts.
        _, (low, high), text = next(
            fact for fact in (*FACTS[start:], *FACTS[:start]) if fact[0] not in units
        )
        return text.format(n=name, c=low + int(self.rng.random() * (high - low + 1)))


def _write(story: _Story, num_steps: int, config: ProblemConfig) -> Problem | None:
    """Write the text of a story; return None if it is longer than `config` allows."""
    rng, nodes = story.rng, story.plan.nodes
    asked = nodes[-1].frame is None
    told = len(nodes) - 1 if asked else len(nodes)
    body = [story.sentence(i) for i in range(told)]
    if asked:
        question = story.sentence(told)
    else:
        last = story.wordings[-1]
        assert last is not None
        question = last.ask if rng.random() < 0.7 else last.find
    order = list(range(told))
    if rng.random() < config.shuffle_rate:
        rng.shuffle(order)
        body = [body[i] for i in order]
    distractors = story.distractors(config.distractor_rate)
    for text in distractors:
        body.insert(int(rng.random() * (len(body) + 1)), text)
    body.append(question)
    prompt = " ".join(body)
    if prompt.count(" ") >= config.max_words:
        return None
    answer = story.filled[-1].value
    worked = " ".join(text for i in range(len(nodes)) for text in story.steps(i))
    place = {node: position for position, node in enumerate(order)}
    sources = [(source, i) for i in range(told) for source in (nodes[i].a, nodes[i].b)]
    return Problem(
        prompt=prompt,
        response=f"{worked}\n#### {answer}",
        answer=answer,
        num_steps=num_steps,
        structure=story.plan.structure,
        distractors=tuple(distractors),
        shuffled=any(place[s] > place[i] for s, i in sources if s >= 0),
    )


def generate_problem(
    seed: int, index: int, split: str = "train", config: ProblemConfig = _DEFAULT
) -> Problem:
    """Return problem number `index` of a split, which depends on the arguments alone.

    The hash of its structure (see `Problem.structure`) assigns a problem to a split, so no two
    splits share a structure, whatever the seeds.

    Example:
        >>> generate_problem(0, 5) == generate_problem(0, 5)
        True
        >>> problem = generate_problem(0, 5, "test")
        >>> problem.response.endswith(f"#### {problem.answer}")
        True
    """
    rng = problem_stream(seed, index, split)
    span = config.max_steps - config.min_steps + 1
    # Drawn once, so that the draws rejected below do not change the distribution of steps.
    num_steps = config.min_steps + int(rng.random() * span)
    while True:
        plan = sample_plan(rng, num_steps)
        if plan is None or split_of(plan.structure) != split:
            continue
        filled = fill_numbers(rng, plan, config.max_value)
        if filled is None:
            continue
        try:
            problem = _write(_Story(rng, plan, filled), num_steps, config)
        except _TooManyError:
            continue
        if problem is not None:
            return problem


def generate_problems(
    count: int,
    *,
    seed: int,
    split: str = "train",
    config: ProblemConfig = _DEFAULT,
    start: int = 0,
) -> Iterator[Problem]:
    """Yield problems `start` to `start + count` of a split.

    Example:
        >>> [problem.num_steps >= 2 for problem in generate_problems(3, seed=0)]
        [True, True, True]
    """  # fmt: skip
    for index in range(start, start + count):
        yield generate_problem(seed, index, split, config)

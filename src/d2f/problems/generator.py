"""Generate a word problem from a seed and an index: plan, numbers, names, sentences."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from d2f.problems.distractors import distract, draw_fact
from d2f.problems.frames import Subject, Wording, word_quantity
from d2f.problems.numbers import Filled, fill_numbers
from d2f.problems.plan import Plan, sample_plan, split_of
from d2f.problems.problem import Problem, ProblemConfig, problem_stream
from d2f.problems.words import COLORS, DAYS, ITEMS, PEOPLE, PRICED

_PEOPLE = tuple(Subject(*person) for person in PEOPLE)
_NAMES: dict[str, tuple[Subject, ...]] = {
    "person": _PEOPLE,
    "day": tuple(Subject(day) for day in DAYS),
    "color": tuple(Subject(color) for color in COLORS),
    "priced": tuple(Subject(thing) for thing in PRICED),
}
_DEFAULT = ProblemConfig()


class _Cast:
    """Chooses the names and things of one problem."""

    def __init__(self, rng: Random, plan: Plan) -> None:
        self._rng = rng
        self._used: dict[str, set[int]] = {}
        self.subjects: list[Subject] = []
        for kind, one, two in plan.subjects:
            if kind == "pair":
                name = f"{self.subjects[one].name} and {self.subjects[two].name}"
                self.subjects.append(Subject(name, "they", "their", True))
            else:
                self.subjects.append(self.stranger(kind))
        self.items: list[str] = []
        for group in plan.items:
            words = ITEMS[group]
            item = words[int(rng.random() * len(words))]
            while item in self.items:
                item = words[int(rng.random() * len(words))]
            self.items.append(item)

    def stranger(self, kind: str) -> Subject:
        """Return a subject of a class that does not occur in the problem yet."""
        pool, used = _NAMES[kind], self._used.setdefault(kind, set())
        if len(used) == len(pool):
            raise _TooManyError
        while True:
            choice = int(self._rng.random() * len(pool))
            if choice not in used:
                used.add(choice)
                return pool[choice]


class _TooManyError(Exception):
    """A story needs more days, colours or things than the word lists have."""


class _Story:
    """A plan with its numbers and names, from which sentences are written."""

    def __init__(self, rng: Random, plan: Plan, filled: list[Filled]) -> None:
        self.rng, self.plan, self.filled = rng, plan, filled
        self.cast = _Cast(rng, plan)
        self.wordings: list[Wording | None] = [
            None
            if node.frame is None
            else word_quantity(
                node.frame,
                self.cast.subjects[node.subject],
                self.cast.items[node.item] if node.item >= 0 else "",
            )
            for node in plan.nodes
        ]

    def sentence(self, i: int) -> str:
        """Return the sentence that states quantity `i`, or asks for it if it is the question."""
        node, numbers, w = self.plan.nodes[i], self.filled[i], self.wordings[i]
        rel = node.relation
        if rel is None:
            assert w is not None
            return f"{w.does} {numbers.value} {w.u}{w.p}."
        a, b = self.wordings[node.a], self.wordings[node.b] if node.b >= 0 else None
        assert a is not None
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
        done = []
        for j, (x, sign, y, result) in enumerate(numbers.calculations):
            calc = f"{x} {sign} {y} = {result}"
            last = j + 1 == len(numbers.calculations)
            template = rel.answer if last else rel.mid
            if last and not template:
                assert w is not None
                done.append(f"{w.does} {calc} {w.u}{w.p}.")
            else:
                done.append(template.format(a=a, b=b, w=w, c=numbers.c, k=numbers.k, calc=calc))
        return done

    def distractors(self, rate: float) -> list[str]:
        """Draw up to two sentences that the answer does not need."""
        rng, found = self.rng, list[str]()
        while len(found) < 2 and rng.random() < rate:
            i = int(rng.random() * len(self.plan.nodes))
            frame = self.plan.nodes[i].frame
            if (
                not found
                and frame is not None
                and frame.base is not None
                and "age" not in frame.tags
                and rng.random() < 0.7
            ):
                item = self.plan.nodes[i].item
                stranger = word_quantity(
                    frame,
                    self.cast.stranger(frame.who),
                    self.cast.items[item] if item >= 0 else "",
                )
                known = None if i in self.plan.changed else self.wordings[i]
                found.append(distract(rng, stranger, known))
            else:
                units = {w.u for w in self.wordings if w is not None}
                found.append(draw_fact(rng, self.cast.stranger("person").name, units))
        return found


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
    shuffled = False
    if rng.random() < config.shuffle_rate:
        order = list(range(told))
        rng.shuffle(order)
        place = {node: position for position, node in enumerate(order)}
        shuffled = any(
            place[source] > place[i]
            for i in range(told)
            for source in (nodes[i].a, nodes[i].b)
            if source >= 0
        )
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
    return Problem(
        prompt=prompt,
        response=f"{worked}\n#### {answer}",
        answer=answer,
        num_steps=num_steps,
        structure=story.plan.structure,
        distractors=tuple(distractors),
        shuffled=shuffled,
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

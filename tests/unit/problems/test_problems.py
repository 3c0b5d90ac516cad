"""The generator of word problems: what it promises about splits, numbers and words."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from d2f.errors import ConfigError
from d2f.problems import (
    QUESTIONS,
    RELATIONS,
    SPLITS,
    Problem,
    ProblemConfig,
    generate_problem,
    generate_problems,
)
from d2f.problems.frames import FRAMES
from d2f.problems.problem import split_of
from d2f.problems.words import COLORS, DAYS, ITEMS, PEOPLE, PRICED

CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
PINNED_PROMPT = (
    "Mia picks 15 lemons each day. Dan picks 8 lemons each day. Ann picks 27 more "
    "lemons each day than half as many as Dan. How many lemons do Mia and Ann pick "
    "each day together?"
)
PINNED_RESPONSE = (
    "Half as many lemons each day as Dan is 8 / 2 = 4 lemons. Ann picks 4 + 27 = 31 "
    "lemons each day. Mia and Ann together: 15 + 31 = 46 lemons.\n#### 46"
)
SENTENCE = re.compile(r"(?<=[.?]) ")


@pytest.fixture(scope="module")
def sample() -> list[Problem]:
    return list(generate_problems(12_000, seed=11))


def test_same_arguments_give_the_same_problem_in_any_order() -> None:
    forward = [generate_problem(3, index, "train") for index in range(40)]
    backward = [generate_problem(3, index, "train") for index in reversed(range(40))]
    assert forward == backward[::-1]
    assert list(generate_problems(10, seed=3, start=30)) == forward[30:]


def test_seed_and_split_change_the_problem() -> None:
    prompts = {generate_problem(seed, 0, split).prompt for seed in range(20) for split in SPLITS}
    assert len(prompts) == 60


def test_a_problem_is_pinned() -> None:
    """Trained models and their reports depend on the stream: change it knowingly."""
    problem = generate_problem(0, 0, "test")
    assert problem.prompt == PINNED_PROMPT
    assert problem.response == PINNED_RESPONSE


def test_steps_are_uniform_over_the_range(sample: list[Problem]) -> None:
    counts = Counter(problem.num_steps for problem in sample)
    assert set(counts) == set(range(2, 8))
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_every_calculation_is_right_and_small(sample: list[Problem]) -> None:
    compute = {
        "+": lambda x, y: x + y,
        "-": lambda x, y: x - y,
        "*": lambda x, y: x * y,
        "/": lambda x, y: x // y if x % y == 0 else None,
    }
    for problem in sample:
        calculations = CALCULATION.findall(problem.response)
        assert len(calculations) == problem.num_steps
        assert problem.response.count("=") == problem.num_steps
        for left, sign, right, result in calculations:
            x, y = int(left), int(right)
            assert compute[sign](x, y) == int(result), problem.response
            assert 2 <= int(result) <= 400
            assert max(x, y) <= 400
            assert sign != "*" or min(x, y) <= 12
            assert sign != "/" or y <= 12
        assert int(calculations[-1][3]) == problem.answer
        assert problem.response.endswith(f"\n#### {problem.answer}")


def test_every_number_used_is_given_or_computed_and_every_result_is_used(
    sample: list[Problem],
) -> None:
    implied = {"2", "3", "4", "5", "7", "10", "12", "24", "60"}  # half, a week, a dozen, 20%
    for problem in sample:
        known = implied | set(re.findall(r"\d+", problem.prompt))
        calculations = CALCULATION.findall(problem.response)
        operands = [part for left, _, right, _ in calculations for part in (left, right)]
        for i, (left, _, right, result) in enumerate(calculations):
            assert {left, right} <= known, problem
            known.add(result)
            assert i + 1 == len(calculations) or result in operands[2 * i + 2 :], problem


def test_splits_share_no_structure(sample: list[Problem]) -> None:
    seen = {
        split: {problem.structure for problem in generate_problems(1_500, seed=5, split=split)}
        for split in ("validation", "test")
    } | {"train": {problem.structure for problem in sample}}
    for split, structures in seen.items():
        assert all(split_of(structure) == split for structure in structures)
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    assert len(seen["test"]) > 1_000


def test_structures_name_no_person_number_or_thing(sample: list[Problem]) -> None:
    known = {*RELATIONS, *QUESTIONS, "given"}
    for problem in sample[:2_000]:
        for word in re.findall(r"#?\w+", problem.structure):
            assert word in known or re.fullmatch(r"#\d+", word), problem.structure


def test_the_catalogue_is_wide() -> None:
    assert len(RELATIONS) >= 60
    assert len(QUESTIONS) >= 15
    texts = [text for relation in RELATIONS.values() for text in relation.text]
    assert len(set(texts)) == len(texts)
    assert len(texts) >= 60


def test_every_relation_question_and_frame_appears() -> None:
    seen: set[str] = set()
    index = 0
    wanted = {*RELATIONS, *QUESTIONS}
    while not wanted <= seen and index < 40_000:
        seen.update(re.findall(r"\w+(?=\()", generate_problem(2, index).structure))
        index += 1
    assert wanted <= seen, wanted - seen
    reachable = {relation.out for relation in RELATIONS.values()}
    assert all(frame.base or frame.id in reachable for frame in FRAMES.values())


def test_distractors_are_not_needed(sample: list[Problem]) -> None:
    """The worked answer is one of a story without the distractors: they name only strangers."""
    share = sum(bool(problem.distractors) for problem in sample) / len(sample)
    assert 0.15 < share < 0.35
    strangers = {name for name, _, _ in PEOPLE} | {*DAYS} | {*COLORS} | {*PRICED}
    for problem in sample:
        for text in problem.distractors:
            assert problem.prompt.count(text) == 1
            # The first subject in the sentence is the stranger; the story and the answer
            # never mention it.
            rest = problem.prompt.replace(text, "") + problem.response
            first = min(
                (name for name in strangers if re.search(rf"\b{name}\b", text, re.IGNORECASE)),
                key=lambda name: text.lower().index(name.lower()),
            )
            others = [other for other in problem.distractors if other != text]
            for other in others:
                rest = rest.replace(other, "")
            assert not re.search(rf"\b{first}\b", rest, re.IGNORECASE), problem


def test_distractors_can_be_turned_off() -> None:
    config = ProblemConfig(distractor_rate=0.0, shuffle_rate=0.0)
    for problem in generate_problems(500, seed=1, config=config):
        assert not problem.distractors
        assert not problem.shuffled


def test_part_of_the_problems_are_shuffled(sample: list[Problem]) -> None:
    assert 0.05 < sum(problem.shuffled for problem in sample) / len(sample) < 0.15
    always = ProblemConfig(shuffle_rate=1.0, min_steps=4)
    shuffled = [problem.shuffled for problem in generate_problems(300, seed=1, config=always)]
    assert sum(shuffled) > 250


def test_the_text_is_short_and_its_vocabulary_closed(sample: list[Problem]) -> None:
    words: set[str] = set()
    for problem in sample:
        text = f"{problem.prompt} {problem.response}"
        words.update(re.findall(r"[A-Za-z]+", text))
        assert len(problem.prompt.split()) <= 85
        assert len(problem.response.split()) <= 110
        assert "  " not in text
        assert "{" not in text
        assert problem.prompt[-1] in "?."
        assert all(part[0].isupper() or part[0].isdigit() for part in SENTENCE.split(text))
        assert not re.search(r"\b1 [a-z]", text)
    assert len(words) <= 600


def test_no_quantity_is_stated_twice(sample: list[Problem]) -> None:
    """Each subject, verb and noun names one number in the worked answer."""
    stated = re.compile(r"(?:^|(?<=\. ))([^.=]+?) \d+ [-+*/] \d+ = (\d+) ([^.]+)\.")
    for problem in sample:
        names = [(who, noun) for who, _, noun in stated.findall(problem.response)]
        assert len(set(names)) == len(names), problem


def test_items_of_a_group_never_repeat() -> None:
    for group in ITEMS.values():
        assert len(set(group)) == len(group)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_steps": 0},
        {"min_steps": 5, "max_steps": 4},
        {"max_steps": 8},
        {"distractor_rate": 1.5},
        {"shuffle_rate": -0.1},
        {"max_value": 50},
        {"max_value": 5000},
        {"max_words": 10},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings)).split("_")[0]):
        ProblemConfig(**settings)  # type: ignore[arg-type]


def test_settings_are_kept_to() -> None:
    config = ProblemConfig(min_steps=3, max_steps=4, max_value=100)
    for problem in generate_problems(300, seed=9, split="test", config=config):
        assert problem.num_steps in (3, 4)
        assert all(int(number) <= 100 for number in re.findall(r"\d+", problem.prompt))
        assert all(int(number) <= 100 for number in re.findall(r"\d+", problem.response))


def test_unknown_split_and_negative_index_are_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        generate_problem(0, 0, "dev")
    with pytest.raises(ValueError, match="index must not be negative"):
        generate_problem(0, -1)

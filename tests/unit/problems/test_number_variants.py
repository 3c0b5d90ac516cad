"""Variants of worked problems: what changes, what stays, and what is refused."""

from __future__ import annotations

import re

import pytest
from benchmarks.number_faults import find_faults

from d2f.problems.number_variants import Collection, Variant, make_variants, strip_annotations
from d2f.problems.number_variants.numbers import find_numbers
from d2f.problems.number_variants.redraw import plan_redraw
from d2f.problems.number_variants.variants import MOST_VARIANTS
from d2f.problems.number_variants.worked_problem import annotate, read_problem

PROBLEMS = [
    Variant(
        question="Ann has $1,200 and spends 25% of it on 3 chairs. She then earns $36.50 on each "
        "of 14 weekends. How much has she now?",
        answer="She spends 1200*25/100=$<<1200*25/100=300>>300.\nShe keeps $1,200 - $300 = "
        "$<<1200-300=900>>900.\nShe earns 36.5*14=$<<36.5*14=511>>511.\nShe has 900+511="
        "$<<900+511=1411>>1411.\n#### 1,411",
    ),
    Variant(
        question="A box has 24 pens. Bob buys an 18-box set and gives half of the pens away. "
        "How many stay with him?",
        answer="He has 18*24=<<18*24=432>>432 pens.\nHe keeps 432/2 = 216.\n#### 216",
    ),
    Variant(
        question="A shop has 40 coats. 30% are red. How many are not?",
        answer="70% are not, as 100-30=<<100-30=70>>70.\nThat is 40*.7=<<40*.7=28>>28.\n#### 28",
    ),
]


def values_of(text):
    return [number.value for number in find_numbers(text)]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_variants_differ_come_out_and_have_no_fault(problem, seed):
    made = make_variants(problem.question, problem.answer, seed=seed)
    assert len(made) >= 8
    assert len({variant.question for variant in made} | {problem.question}) == len(made) + 1
    original = Variant(question=problem.question, answer=annotate(problem.answer))
    for variant in made:
        assert find_faults(original, variant) == []
        assert "<<" not in strip_annotations(variant.answer)


def test_draws_depend_on_the_seed_and_the_question_alone():
    [problem, *_] = PROBLEMS
    one = make_variants(problem.question, problem.answer, seed=0)
    assert make_variants(problem.question, problem.answer, seed=0, most=3) == one[:3]
    assert make_variants(problem.question, problem.answer, seed=1) != one


@pytest.mark.parametrize("problem", PROBLEMS)
def test_new_numbers_are_of_the_kind_of_the_old(problem):
    for variant in make_variants(problem.question, problem.answer):
        old, new = find_numbers(problem.question), find_numbers(variant.question)
        for was, now in zip(old, new, strict=True):
            assert was.value / 2 <= now.value <= was.value * 2
            assert len(was.text) == len(now.text)
        order = sorted(range(len(old)), key=lambda i: old[i].value)
        assert order == sorted(range(len(new)), key=lambda i: new[i].value)
        assert not re.search(r"\ban (?!8|1[18]-)\d|\ba (8|18)", variant.question)


def stays(question, answer, number):
    """Whether a number of the question never changes, though another does."""
    made = make_variants(question, answer)
    at = values_of(question).index(number)
    return bool(made) and all(values_of(v.question)[at] == number for v in made)


@pytest.mark.parametrize(
    ("question", "answer", "number"),
    [
        # Half is a 2, too, and so is the word two.
        (
            "Ed has 30 pens and 2 cups. He loses half of the pens. How many things has he?",
            "He keeps 30/2=<<30/2=15>>15 pens.\nHe has 15+2=<<15+2=17>>17.\n#### 17",
            2,
        ),
        # A week has 7 days.
        (
            "Ed reads 31 pages on each of 7 days of a week, 9 weeks long. How many?",
            "31*7=<<31*7=217>>217.\n217*9=<<217*9=1953>>1953.\n#### 1953",
            7,
        ),
        # 12 is a number of the question and a result.
        (
            "Ed has 12 cups and 33 pens, 4 boxes of 3 nuts. How many?",
            "4*3=<<4*3=12>>12 nuts.\n12+33=<<12+33=45>>45 things.\n45+12=<<45+12=57>>57.\n#### 57",
            12,
        ),
        # A date, a part of a fraction, a time.
        (
            "In 1987 Ed had 44 pens and 19 cups. How many?",
            "44+19=<<44+19=63>>63.\n#### 63",
            1987,
        ),
        ("Ed ate 1/3 of 60 nuts. How many?", "60/3=<<60/3=20>>20.\n#### 20", 3),
        # 10% of 40 by 40/10.
        (
            "Of 40 coats and 6 hats 10% of the coats are red. How many things are red or a hat?",
            "40/10=<<40/10=4>>4.\n4+6=<<4+6=10>>10.\n#### 10",
            10,
        ),
        # Percentages that make a whole.
        (
            "Of 200 nuts 35% are old and 65% new. How many are new?",
            "200*65/100=<<200*65/100=130>>130.\n#### 130",
            65,
        ),
    ],
)
def test_a_number_that_may_have_two_roles_stays(question, answer, number):
    assert stays(question, answer, number)


@pytest.mark.parametrize(
    "answer",
    [
        "She has 85 of them.\n160-85=<<160-85=75>>75.\n#### 75",  # 85 was added up in the head
        "160-45=<<160-45=116>>116.\n#### 116",
        "160-45=<<160-45=115>>115.\n#### 114",
        "160-45=115.",
        "Let x be it: 3x=<<160-45=115>>115.\n#### 115",
        "<<sqrt(160)=12>>12\n#### 12",
        "<<160/0=1>>1\n#### 1",
        "",
    ],
)
def test_what_is_not_explained_has_no_variants(answer):
    question = "Al has 160 pens, 30 red, 40 blue and 15 green, 45 long. How many are the others?"
    assert make_variants(question, answer) == []


def test_sums_of_the_question_stay_sums():
    question = "There are 52 kids, 30 girls and 22 boys. The girls get 3 nuts. How many nuts?"
    answer = "30*3=<<30*3=90>>90 and 22*0=<<22*0=0>>0, of 52-22=<<52-22=30>>30.\n#### 30"
    for variant in make_variants(question, answer):
        kids, girls, boys, _ = values_of(variant.question)
        assert kids == girls + boys


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4+6=10 pens.", "4+6=<<4+6=10>>10 pens."),
        ("$43 - $18 = $25", "$43 - $18 = $<<43-18=25>>25"),
        ("3 bags x 1,200 nuts = 3,600 nuts", "3 bags x 1,200 nuts = <<3*1200=3600>>3,600 nuts"),
        ("14 pieces/house * 60 houses = 840", "14 pieces/house * 60 houses = <<14*60=840>>840"),
        ("2*3=<<2*3=6>>6", "2*3=<<2*3=6>>6"),
        ("1/2*110 = <<55=55>>55", "1/2*110 = <<1/2*110=55>>55"),
        (
            "10m = 100, e = 9 * 10 - 7 = 90 - 7 = 83",
            "10m = 100, e = 9 * 10 - 7 = 90 - 7 = <<90-7=83>>83",
        ),
        ("4+6=11", "4+6=11"),
        ("= = 5", "= = 5"),
    ],
)
def test_sums_without_annotation_are_annotated(text, expected):
    assert annotate(text) == expected


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("216", "217"), "432/2 is not 217"),
        (("pens", "pencils"), "the words of the answer differ"),
        (("432 pens", "431 pens"), "the answer's 431 is neither in the question nor a result"),
        (("#### 216", "#### 217"), "the last line is not the last result"),
        (("<<18*24=432>>", ""), "it has other steps"),
    ],
)
def test_the_checker_finds_faults(change, fault):
    original = Variant(question=PROBLEMS[1].question, answer=annotate(PROBLEMS[1].answer))
    changed = original.answer.replace(*change)
    broken = Variant(question=original.question.replace("24", "26"), answer=changed)
    assert fault in find_faults(original, broken)


def test_parts_of_a_collection_are_apart_and_do_not_depend_on_the_order():
    problems = [
        Variant(question=f"Al has {n} pens and {n + 31} {chr(45 + n)}s. How many?",
                answer=f"{n}+{n + 31}=<<{n}+{n + 31}={2 * n + 31}>>{2 * n + 31}\n#### {2 * n + 31}")
        for n in range(20, 60)
    ]  # fmt: skip
    one, other = Collection(problems=problems), Collection(problems=problems[::-1])
    assert one.kept_aside() == other.kept_aside()
    assert one.to_train_on() == other.to_train_on()
    aside = {problem.question for problem in one.kept_aside()}
    assert len(aside) == 4
    assert aside.isdisjoint(problem.question for problem in one.to_train_on())
    assert Collection(problems=problems, seed=1).kept_aside() != one.kept_aside()
    twin = Variant(question=re.sub("[0-9]+", "77", one.kept_aside()[0].question), answer="")
    with_twin = Collection(problems=[*problems, twin])
    assert one.kept_aside()[0] in with_twin.kept_aside()
    assert twin not in with_twin.to_train_on()
    known = one.known_with_new_numbers(10)
    assert known == one.known_with_new_numbers(40)[:10]
    made = [make_variants(p.question, p.answer, most=MOST_VARIANTS + 1) for p in one.to_train_on()]
    assert [first for first, *_ in made][:10] == known
    for first, *training in made:
        assert first not in training
        assert len(training) <= 24


def test_the_plan_says_what_may_become_what():
    problem = read_problem(PROBLEMS[2].question, PROBLEMS[2].answer)
    pools = plan_redraw(problem).pools
    assert set(pools) == {30, 40}
    assert pools[30] == tuple(range(15, 61, 5))

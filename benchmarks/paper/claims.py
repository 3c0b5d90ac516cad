"""The paper's claims, one by one, held against the results by stated rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from d2f.errors import counted
from d2f.evaluation.metrics import mean_and_error
from d2f.evaluation.report import table as show
from d2f.evaluation.report.curves import threshold_curve
from d2f.evaluation.report.rows import Comparison, Difference, Row, paired_difference
from d2f.evaluation.report.table import Column, Table, median, ratio
from d2f.evaluation.tasks import CODE_TASKS
from d2f.evaluation.text2sql import TEXT_TO_SQL

from .ablations import by_block_size, noise_groups
from .published import LABEL

CLAIMS_TITLE = "The paper's claims, one by one"
MATHEMATICS = (
    "word-problems", "gsm8k", "gsm8k-variants", "gsm8k_cot", "minerva_math", "minerva_math500",
)  # fmt: skip
KNOWN_TASKS = (*MATHEMATICS, *CODE_TASKS, *TEXT_TO_SQL)
"""Benchmarks of known kinds; of the last kind the paper has none."""
# Student's t: 95% of the distribution lie within, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
OPEN = "open"
NOT_TESTABLE = "not testable here"
MIN_PROBLEMS = 100
"""A score of fewer problems decides nothing."""
MOST_LOST = 1.0
"""Points of score that count as kept: what the paper itself loses where it loses most."""
MOST_OF_CONTROL = 1.1
"""Times vanilla's tokens/s that a control may reach and count as no faster."""
LEAST_NOISE_GAIN = 4.7
"""Percent of tokens/s that monotone noise gains in the paper where it gains least."""
AUTOREGRESSIVE_BAR = 2.5
HUMANEVAL_BAR = 1.6
VANILLA_BAR = 50.0


class Finding(NamedTuple):
    """The finding of one comparison's results on a claim."""

    verdict: str
    number: str
    """The number with its error, and what it measures; the reason, if nothing can be said."""
    beside: str = ""
    """Facts that must be known beside the number."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of the paper."""

    key: str
    says: str
    paper: str
    """The paper's number."""
    rule: str
    """Rule that says when the claim counts as reproduced, and from which rows."""
    check: Callable[[Comparison], Finding]
    tasks: tuple[str, ...] = KNOWN_TASKS
    """Tasks on which the claim can be tested; a task of the user's own is taken for any."""

    def concerns(self, comparison: Comparison) -> bool:
        """Whether the test set is of the claim's kind."""
        return comparison.task in self.tasks or comparison.task not in KNOWN_TASKS


def small_sample(values: Sequence[float]) -> Difference:
    """Mean of a few values with the 95% interval of Student's t; unbounded for a single value.

    Example:
        >>> [round(x, 1) for x in small_sample([1, 2, 3])]
        [2.0, -0.5, 4.5, 3]
    """
    mean, error = mean_and_error(values)
    count = len(values)
    if count < 2:
        return Difference(mean, -math.inf, math.inf, count)
    reach = _T[min(count - 1, len(_T)) - 1] * error
    return Difference(mean, mean - reach, mean + reach, count)


def claim_table(comparisons: Sequence[Comparison]) -> Table:
    """All claims, on each family and test set that they concern.

    Rows that were simulated prove nothing and do not count.

    Example:
        `print(claim_table(results.comparisons).markdown())`
    """
    real = [
        Comparison(
            family=comparison.family,
            test_set=comparison.test_set,
            machine=comparison.machine,
            rows=rows,
        )
        for comparison in comparisons
        if (rows := [row for row in comparison.rows if not row.simulated])
    ]
    lines = [
        {
            "key": claim.key,
            "claim": claim.says,
            "paper": claim.paper,
            "where": title,
            **finding._asdict(),
        }
        for claim in CLAIMS
        for title, finding in _findings(claim, real)
    ]
    columns = [
        Column(key=key, header=header, is_number=False)
        for key, header in (
            ("claim", "claim of the paper"),
            ("paper", LABEL),
            *([("where", "where")] if len(real) > 1 else []),
            ("number", "here"),
            ("verdict", "verdict"),
        )
    ]
    rules = "\n".join(f"- {claim.says}: {claim.rule}" for claim in CLAIMS)
    notes = [
        f"{warning} in {comparison.title}"
        for comparison in real
        for warning in show.conditions(comparison.rows)
    ]
    told = [
        f"- {line['claim']}{_on(line['where']) if len(real) > 1 else ''}: {line['beside']}."
        for line in lines
        if line["beside"]
    ]
    notes += ["Beside these numbers:\n\n" + "\n".join(told)] if told else []
    notes.append(f"How the verdicts come about. {_SPREAD}\n\n{rules}")
    return Table(name="claims", title=CLAIMS_TITLE, columns=columns, lines=lines, notes=notes)


def _verdict(low: float, high: float, bar: float, *, worst: float | None = None) -> str:
    """Judge the range of a number: above a bar, below it (or below `worst`), or neither."""
    if low >= bar:
        return REPRODUCED
    return NOT_REPRODUCED if high < (bar if worst is None else worst) else OPEN


def _all(*verdicts: str) -> str:
    """Judge a claim with several parts: one part that fails decides."""
    for verdict in (NOT_REPRODUCED, OPEN):
        if verdict in verdicts:
            return verdict
    return REPRODUCED


def _on(where: str) -> str:
    return f" ({where})"


def _findings(claim: Claim, comparisons: Sequence[Comparison]) -> list[tuple[str, Finding]]:
    """Judge a claim on each comparison where it can be tested, or say why it can be on none."""
    found = [(c.title, claim.check(c)) for c in comparisons if claim.concerns(c)]
    tested = [(title, finding) for title, finding in found if finding.verdict != NOT_TESTABLE]
    # A reason of more words than a missing row tells more.
    reasons = sorted({finding.number for _, finding in found}, key=len) or ["no rows"]
    return tested or [(show.NOTHING, Finding(NOT_TESTABLE, reasons[-1]))]


class _Speed(NamedTuple):
    """Ratio of one row's speed to another's, and of the runs at both ends."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        low, high = show.significant(self.low), show.significant(self.high)
        return f"{show.times(self.ratio)} ({low}–{high})"

    def reaches(self, bar: float) -> str:
        """Whether it is at least this, whichever runs are taken."""
        return _verdict(self.low, self.high, bar)


def _speed(one: Row | None, other: Row | None) -> _Speed | None:
    """Compare median speeds; at the ends, the slowest run of one with the fastest of the other."""
    a = one.tokens_per_second if one else None
    b = other.tokens_per_second if other else None
    if a is None or b is None or min(b) <= 0:
        return None
    return _Speed(a.median / b.median, a.lowest / b.highest, a.highest / b.lowest)


def _missing(*names: str) -> Finding:
    return Finding(NOT_TESTABLE, f"no rows: {' or '.join(names)}" if names else "no rows")


def _reaches(method: str, bar: float) -> Callable[[Comparison], Finding]:
    """Whether `pipelined` is at least `bar` times as fast as a method."""

    def check(comparison: Comparison) -> Finding:
        found = _speed(comparison.find("pipelined"), comparison.find(method))
        if found is None:
            return _missing(f"pipelined and {method}")
        return Finding(found.reaches(bar), f"{found} of {method}")

    return check


def _vanilla_at_512(comparison: Comparison) -> Finding:
    finding = _reaches("vanilla-512", VANILLA_BAR)(comparison)
    if finding.verdict == NOT_TESTABLE:
        return finding
    ours, number, beside = comparison.find("pipelined"), finding.number, []
    stopped = comparison.find("vanilla-eos-stop")
    if found := _speed(ours, stopped):
        number += f"; {found} of vanilla-eos-stop"
    if wasted := _speed(stopped, comparison.find("vanilla-512")):
        beside.append(
            f"{show.times(wasted.ratio)} of it are positions after the end of answers, computed "
            "for nothing (vanilla-eos-stop / vanilla-512)"
        )
    if found := _speed(ours, comparison.find("vanilla")):
        beside.append(f"{found} of vanilla, which has the room of pipelined and fills it")
    return Finding(finding.verdict, number, "; ".join(beside))


def _score_kept(comparison: Comparison) -> Finding:
    one, teacher = comparison.find("pipelined"), comparison.find("vanilla", "vanilla-eos-stop")
    found = _score_difference(one, teacher)
    if found is None or one is None or teacher is None:
        return _missing("scores of pipelined and vanilla")
    if found.num_pairs < MIN_PROBLEMS:
        return Finding(NOT_TESTABLE, f"only {counted(found.num_pairs, 'problem')}")
    verdict = _verdict(found.low, found.high, -MOST_LOST)
    paired = paired_difference(one, teacher) is not None
    kind = "paired" if paired else "not paired"
    number = f"{show.interval(found)} points, {kind}, n = {found.num_pairs}"
    # An interval below 0 is a loss, kept within the bar or not.
    return Finding(verdict, number, _LOSS[verdict] if found.high < 0 else "")


_LOSS = {
    REPRODUCED: f"a loss beyond chance, of less than {MOST_LOST:.0f} point",
    OPEN: f"a loss beyond chance; whether it is more than {MOST_LOST:.0f} point is open",
    NOT_REPRODUCED: f"a loss beyond chance, of more than {MOST_LOST:.0f} point",
}


def _score_difference(one: Row | None, other: Row | None) -> Difference | None:
    """Paired where it can be, of independent scores otherwise."""
    if one is None or other is None or one.score is None or other.score is None:
        return None
    found = paired_difference(one, other)
    if found is not None:
        return found
    mean = one.score - other.score
    error = ((one.standard_error or 0) ** 2 + (other.standard_error or 0) ** 2) ** 0.5
    count = min(one.num_scored, other.num_scored)
    return Difference(mean, mean - 1.96 * error, mean + 1.96 * error, count)


def _fast_dllm(comparison: Comparison) -> Finding:
    """Judged by the rows that the paper has; the one without a cache is told beside it."""
    ours = comparison.find("pipelined")
    found = {name: _speed(ours, comparison.find(name)) for name in _FAST_DLLM}
    known = {name: speed for name, speed in found.items() if speed is not None}
    judged = [speed for name, speed in known.items() if name in _FAST_DLLM_OF_PAPER]
    if not judged:
        return _missing("pipelined and Fast-dLLM with a cache")
    parts = [f"{known[name]} of {name}" for name in _FAST_DLLM_OF_PAPER if name in known]
    verdict = _all(*(speed.reaches(1) for speed in judged))
    beside = [f"fastest of Fast-dLLM is {min(known, key=lambda name: known[name].ratio)}"]
    beside += [
        f"{speed} of {name}, which has no cache and is not among the paper's rows"
        for name, speed in known.items()
        if name not in _FAST_DLLM_OF_PAPER
    ]
    return Finding(verdict, ", ".join(parts), "; ".join(beside))


def _cache_and_parallel(comparison: Comparison) -> Finding:
    vanilla, serial, both = map(comparison.find, ("vanilla", "serial", "pipelined"))
    cache, parallel = _speed(serial, vanilla), _speed(both, serial)
    if cache is None or parallel is None:
        return _missing("vanilla, serial and pipelined")
    verdict = _all(cache.reaches(1), parallel.reaches(1))
    number = f"serial {cache} of vanilla, then pipelined {parallel} of serial"
    stopped = _speed(serial, comparison.find("vanilla-eos-stop"))
    return Finding(verdict, number, f"serial {stopped} of vanilla-eos-stop" if stopped else "")


def _noise(
    value_of: Callable[[Row], float | None], unit: str, worst: float
) -> Callable[[Comparison], Finding]:
    """Monotone less random, over seeds; each seed's mean over the levels of the thresholds."""

    def check(comparison: Comparison) -> Finding:
        by_seed: dict[str, list[float]] = {}
        groups = noise_groups(comparison.of("noise"))
        for group, rows in groups.items():
            if group.schedule != "monotone":
                continue
            others = groups.get(group._replace(schedule="random"), ())
            rivals = {str(r.setting("seed")): r for r in others}
            for row in rows:
                seed = str(row.setting("seed"))
                ours = value_of(row)
                theirs = value_of(rivals[seed]) if seed in rivals else None
                if ours is not None and theirs:
                    gap = ours - theirs if unit == "points" else 100 * (ours / theirs - 1)
                    by_seed.setdefault(seed, []).append(gap)
        if not by_seed:
            return _missing("monotone and random of the same seed")
        found = small_sample([sum(gaps) / len(gaps) for gaps in by_seed.values()])
        if found.num_pairs < 2:
            return Finding(NOT_TESTABLE, "only one seed")
        verdict = _verdict(found.low, found.high, 0.0, worst=worst)
        return Finding(verdict, f"{show.interval(found)} {unit}, {found.num_pairs} seeds")

    return check


def _noise_speed(comparison: Comparison) -> Finding:
    timed = _noise(lambda row: median(row.tokens_per_second), "% tokens/s", worst=LEAST_NOISE_GAIN)(
        comparison
    )
    # Rows of an ablation may be scored only; forwards are counted there too, and by no clock.
    counted = _noise(
        lambda row: row.number("tokens_per_forward", "score", "speed"),
        "% tokens/forward",
        worst=LEAST_NOISE_GAIN,
    )(comparison)
    if timed.verdict == NOT_TESTABLE or counted.verdict == NOT_TESTABLE:
        return counted if timed.verdict == NOT_TESTABLE else timed
    return Finding(timed.verdict, timed.number, counted.number)


def _lower_thresholds(comparison: Comparison) -> Finding:
    curve = threshold_curve(comparison)
    if len(curve) < 2:
        return _missing("two levels of thresholds")
    strict, loose = curve[0], curve[-1]
    speed, score = _speed(loose, strict), _score_difference(loose, strict)
    if speed is None or score is None:
        return _missing("speed and score of the thresholds")
    verdict = _all(speed.reaches(1), _verdict(-score.high, -score.low, 0))
    return Finding(verdict, f"loosest against strictest: {speed}, {show.interval(score)} points")


def _fine_tuning_alone(comparison: Comparison) -> Finding:
    control = comparison.find("control", experiment="control")
    vanilla = comparison.find("vanilla", experiment="control")
    speed = _speed(control, vanilla)
    if speed is None or control is None or vanilla is None:
        return _missing("control and vanilla")
    if control.room != vanilla.room:
        return Finding(NOT_TESTABLE, f"control {_room(control)}; vanilla {_room(vanilla)}")
    latency = ratio(median(vanilla.seconds_per_problem), median(control.seconds_per_problem))
    verdict = _verdict(-speed.high, -speed.low, -MOST_OF_CONTROL)
    number = f"{speed} of vanilla's tokens/s"
    return Finding(verdict, f"{number}, latency {show.times(latency)}" if latency else number)


def _room(row: Row) -> str:
    tokens, early_stop = row.room
    return (
        f"{'goes on after' if early_stop is False else 'stops at'} EOS, {counted(tokens, 'token')}"
    )


def _block_size(comparison: Comparison) -> Finding:
    rows = [r for r in by_block_size(comparison) if r.tokens_per_second and r.score is not None]
    if len(rows) < 2:
        return _missing("two block sizes with speed and score")
    fastest = max(rows, key=lambda row: median(row.tokens_per_second) or 0)
    best = max(rows, key=lambda row: row.score or 0)
    speed, score = _speed(fastest, best), _score_difference(best, fastest)
    number = f"fastest: block {fastest.setting('block_size')}"
    if fastest is best or speed is None or score is None:
        return Finding(NOT_REPRODUCED, f"{number}, which also scores best")
    verdict = _all(speed.reaches(1), _verdict(score.low, score.high, 0))
    return Finding(
        verdict,
        f"{number}, {speed} of block {best.setting('block_size')}, "
        f"which scores {show.interval(score)} points more",
    )


_FAST_DLLM_OF_PAPER = ("fast-dllm-prefix", "fast-dllm-dual")
_FAST_DLLM = (*_FAST_DLLM_OF_PAPER, "fast-dllm-parallel")
_ENDS = "tokens/s of {} / {} >= 1"
_SPREAD = """A ratio of speeds is of medians; in brackets, the slowest run of the one against the \
fastest of the other, and the reverse. Scores have 95% intervals. `reproduced`: the rule holds at \
both ends. `not reproduced`: at neither. `open`: the runs or problems do not decide it."""
CLAIMS = (
    Claim(
        key="autoregressive",
        says="2.5x tokens/s of an autoregressive model on GSM8K",
        paper="2.5x LLaMA3, 2.3x Qwen2.5",
        rule=f"tokens/s of pipelined / autoregressive >= {AUTOREGRESSIVE_BAR}, on problems of "
        "mathematics.",
        check=_reaches("autoregressive", AUTOREGRESSIVE_BAR),
        tasks=MATHEMATICS,
    ),
    Claim(
        key="autoregressive-code",
        says="1.6x tokens/s of an autoregressive model on HumanEval",
        paper="1.6x LLaMA3, 1.5x Qwen2.5",
        rule=f"tokens/s of pipelined / autoregressive >= {HUMANEVAL_BAR}, on code.",
        check=_reaches("autoregressive", HUMANEVAL_BAR),
        tasks=CODE_TASKS,
    ),
    Claim(
        key="vanilla",
        says="up to 50x vanilla's tokens/s",
        paper="52.9x (MBPP, 512 positions, 512 steps)",
        rule=f"tokens/s of pipelined / vanilla-512 >= {VANILLA_BAR:.0f}. As in the "
        "paper, vanilla-512 has 512 positions and fills them all; vanilla-eos-stop ends where "
        "pipelined ends.",
        check=_vanilla_at_512,
    ),
    Claim(
        key="score",
        says="the score is kept",
        paper="-1.0 to +5.4 points",
        rule=f"the score of pipelined minus the teacher's >= -{MOST_LOST:.0f} point, the most "
        f"that the paper loses, on at least {MIN_PROBLEMS} problems.",
        check=_score_kept,
    ),
    Claim(
        key="fast-dllm",
        says="faster than Fast-dLLM",
        paper="1.2x to 4.3x",
        rule=f"{_ENDS.format('pipelined', 'fast-dllm-prefix')}, and the same for fast-dllm-dual: "
        "the paper's rows. fast-dllm-parallel, which has no cache, is told beside them.",
        check=_fast_dllm,
    ),
    Claim(
        key="dllm-cache",
        says="faster than dLLM-Cache",
        paper="2.6x to 20.7x",
        rule=f"{_ENDS.format('pipelined', 'dllm-cache')}.",
        check=_reaches("dllm-cache", 1),
    ),
    Claim(
        key="cache",
        says="the cache alone gives part of the speed, parallel blocks the rest",
        paper="cache 1.5x to 20.1x, then parallel 1.7x to 3.0x",
        rule=f"{_ENDS.format('serial', 'vanilla')}, and {_ENDS.format('pipelined', 'serial')}. "
        "serial has the cache and one block at a time; within it, several tokens a forward.",
        check=_cache_and_parallel,
    ),
    Claim(
        key="noise-speed",
        says="monotone noise decodes faster than random noise",
        paper="+4.7% to +18.2% tokens/s",
        rule="tokens/s of monotone / random of the same seed, mean over activate and confidence "
        "thresholds: the 95% interval over seeds (Student's t) lies above 0; not reproduced if it "
        f"lies below +{LEAST_NOISE_GAIN}%, the least of the paper. Tokens/forward, which no other "
        "process can slow down, are told beside it, and count where no speed was measured.",
        check=_noise_speed,
    ),
    Claim(
        key="noise-score",
        says="monotone noise scores higher than random noise",
        paper="-0.5 to +5.0 points",
        rule="monotone minus random of the same seed, mean over activate and confidence "
        "thresholds: the 95% interval over seeds (Student's t) lies above 0; not reproduced if it "
        "lies below.",
        check=_noise(lambda row: row.score, "points", worst=0.0),
    ),
    Claim(
        key="thresholds",
        says="lower thresholds decode faster and score worse",
        paper="1.30x, -2.7 points (0.95 to 0.85)",
        rule="of the loosest and the strictest activate and confidence thresholds at one add "
        f"threshold: {_ENDS.format('loosest', 'strictest')}, and a lower score.",
        check=_lower_thresholds,
    ),
    Claim(
        key="control",
        says="fine-tuning alone does not speed decoding up",
        paper="0.4x to 0.7x tokens/s, 0.9x latency",
        rule=f"tokens/s of control / vanilla <= {MOST_OF_CONTROL}, both with the same room and "
        "the same end.",
        check=_fine_tuning_alone,
    ),
    Claim(
        key="block-size",
        says="the block size trades speed for score",
        paper="a plot (figure 5)",
        rule="the fastest block size is not the one that scores best: "
        f"{_ENDS.format('fastest', 'best')}, and a lower score.",
        check=_block_size,
    ),
)
"""All claims, in the order in which the paper makes them."""

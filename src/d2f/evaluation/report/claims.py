"""The paper's claims, one by one, held against the results by stated rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from d2f.evaluation.report import table as show
from d2f.evaluation.report.ablations import by_block_size, noise_groups, threshold_curve
from d2f.evaluation.report.differences import (
    Difference,
    paired_difference,
    small_sample,
)
from d2f.evaluation.report.paper import LABEL
from d2f.evaluation.report.results import CODE, MATHEMATICS, Comparison, Row
from d2f.evaluation.report.table import Column, Table, median, ratio

CLAIMS_TITLE = "The paper's claims, one by one"
REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
NOT_TESTABLE = "not testable here"
MIN_PROBLEMS = 100
"""A score of fewer problems decides nothing."""
AUTOREGRESSIVE_BAR = 2.5
HUMANEVAL_BAR = 1.6
VANILLA_BAR = 50.0


class Finding(NamedTuple):
    """What the results of one comparison say of a claim."""

    verdict: str
    number: str
    """With its error, and what it is of."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of the paper."""

    key: str
    says: str
    paper: str
    """The paper's number."""
    rule: str
    """When it counts as reproduced, and from which rows."""
    check: Callable[[Comparison], Finding]
    tasks: tuple[str, ...] = (*MATHEMATICS, *CODE)
    """Where it can be tested; a task of the user's own is taken for any."""

    def concerns(self, comparison: Comparison) -> bool:
        """Whether the test set is of the claim's kind."""
        return comparison.task in self.tasks or comparison.task not in (*MATHEMATICS, *CODE)


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
    lines = []
    for claim in CLAIMS:
        found = [(c.title, claim.check(c)) for c in real if claim.concerns(c)]
        tested = [(title, finding) for title, finding in found if finding.verdict != NOT_TESTABLE]
        reasons = sorted({finding.number for _, finding in found}) or ["no rows"]
        for title, finding in tested or [(show.NOTHING, Finding(NOT_TESTABLE, reasons[0]))]:
            lines.append(
                {
                    "key": claim.key,
                    "claim": claim.says,
                    "paper": claim.paper,
                    "where": title,
                    "number": finding.number,
                    "verdict": finding.verdict
                    if finding.verdict != NOT_TESTABLE
                    else f"{NOT_TESTABLE} ({finding.number})",
                }
            )
            if finding.verdict == NOT_TESTABLE:
                lines[-1]["number"] = show.NOTHING
    columns = [
        Column(key=key, header=header, is_number=False)
        for key, header in (
            ("claim", "claim of the paper"),
            ("paper", LABEL),
            ("where", "here"),
            ("number", "number here"),
            ("verdict", "verdict"),
        )
    ]
    rules = "\n".join(f"- {claim.says}: {claim.rule}" for claim in CLAIMS)
    notes = [
        f"{warning} in {comparison.title}"
        for comparison in real
        for warning in show.conditions(comparison.rows)
    ]
    notes.append(f"How the verdicts come about:\n\n{rules}")
    return Table(name="claims", title=CLAIMS_TITLE, columns=columns, lines=lines, notes=notes)


class _Speed(NamedTuple):
    """How much faster one row is than another, and the runs at both ends."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        low, high = show.significant(self.low), show.significant(self.high)
        return f"{show.times(self.ratio)} ({low}–{high})"


def _speed(one: Row | None, other: Row | None) -> _Speed | None:
    """Of medians; at the ends, the slowest run of one against the fastest of the other."""
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
        verdict = REPRODUCED if found.ratio >= bar else NOT_REPRODUCED
        near = ", the bar lies within the runs' spread" if found.low < bar <= found.high else ""
        return Finding(verdict, f"{found} of {method}{near}")

    return check


def _vanilla_at_512(comparison: Comparison) -> Finding:
    finding = _reaches("vanilla-512", VANILLA_BAR)(comparison)
    others = [
        f"{found} of {name}"
        for name in ("vanilla", "vanilla-eos-stop")
        if (found := _speed(comparison.find("pipelined"), comparison.find(name)))
    ]
    if finding.verdict == NOT_TESTABLE or not others:
        return finding
    return Finding(finding.verdict, f"{finding.number}; {', '.join(others)}")


def _score_kept(comparison: Comparison) -> Finding:
    one, teacher = comparison.find("pipelined"), comparison.find("vanilla", "vanilla-eos-stop")
    found = _score_difference(one, teacher)
    if found is None or one is None or teacher is None:
        return _missing("scores of pipelined and vanilla")
    if found.num_pairs < MIN_PROBLEMS:
        return Finding(NOT_TESTABLE, f"only {found.num_pairs} problems")
    verdict = REPRODUCED if found.high >= 0 else NOT_REPRODUCED
    paired = paired_difference(one, teacher) is not None
    kind = "paired" if paired else "not paired"
    return Finding(verdict, f"{show.interval(found)} points, {kind}, n = {found.num_pairs}")


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


def _faster_than(name: str, *methods: str) -> Callable[[Comparison], Finding]:
    """Whether `pipelined` beats the fastest of these methods, beyond the runs' spread."""

    def check(comparison: Comparison) -> Finding:
        rivals = [row for row in comparison.of("methods") if row.method in methods]
        rivals = [row for row in rivals if row.tokens_per_second is not None]
        rival = max(rivals, key=lambda row: median(row.tokens_per_second) or 0, default=None)
        found = _speed(comparison.find("pipelined"), rival)
        if found is None or rival is None:
            return _missing(f"pipelined and {name}")
        verdict = REPRODUCED if found.low > 1 else NOT_REPRODUCED
        return Finding(verdict, f"{found} of {rival.method}")

    return check


def _cache_and_parallel(comparison: Comparison) -> Finding:
    vanilla, serial, both = map(comparison.find, ("vanilla", "serial", "pipelined"))
    cache, parallel = _speed(serial, vanilla), _speed(both, serial)
    if cache is None or parallel is None:
        return _missing("vanilla, serial and pipelined")
    verdict = REPRODUCED if cache.low > 1 and parallel.low > 1 else NOT_REPRODUCED
    return Finding(verdict, f"cache {cache}, then parallel {parallel}")


def _noise(value_of: Callable[[Row], float | None], unit: str) -> Callable[[Comparison], Finding]:
    """Monotone less random, over seeds; each seed's mean over the activate thresholds."""

    def check(comparison: Comparison) -> Finding:
        by_seed: dict[str, list[float]] = {}
        groups = noise_groups(comparison.of("noise"))
        for (activate, schedule), rows in groups.items():
            if schedule != "monotone":
                continue
            rivals = {str(r.setting("seed")): r for r in groups.get((activate, "random"), ())}
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
        verdict = REPRODUCED if found.low > 0 else NOT_REPRODUCED
        return Finding(verdict, f"{show.interval(found)} {unit}, {found.num_pairs} seeds")

    return check


def _noise_speed(comparison: Comparison) -> Finding:
    finding = _noise(lambda row: median(row.tokens_per_second), "% tokens/s")(comparison)
    if finding.verdict != NOT_TESTABLE:
        return finding
    # Rows of an ablation may be scored only; forwards are counted there too.
    return _noise(lambda row: row.number("tokens_per_forward"), "% tokens/forward")(comparison)


def _lower_thresholds(comparison: Comparison) -> Finding:
    curve = threshold_curve(comparison)
    if len(curve) < 2:
        return _missing("two levels of thresholds")
    strict, loose = curve[0], curve[-1]
    speed, score = _speed(loose, strict), _score_difference(loose, strict)
    if speed is None or score is None:
        return _missing("speed and score of the thresholds")
    verdict = REPRODUCED if speed.low > 1 and score.high < 0 else NOT_REPRODUCED
    return Finding(verdict, f"loosest against strictest: {speed}, {show.interval(score)} points")


def _fine_tuning_alone(comparison: Comparison) -> Finding:
    control = comparison.find("control", experiment="control")
    vanilla = comparison.find("vanilla", experiment="control")
    speed = _speed(control, vanilla)
    if speed is None or control is None or vanilla is None:
        return _missing("control and vanilla")
    latency = ratio(median(vanilla.seconds_per_problem), median(control.seconds_per_problem))
    verdict = REPRODUCED if speed.ratio <= 1.1 else NOT_REPRODUCED
    number = f"{speed} of vanilla's tokens/s"
    return Finding(verdict, f"{number}, latency {show.times(latency)}" if latency else number)


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
    verdict = REPRODUCED if speed.low > 1 and score.low > 0 else NOT_REPRODUCED
    return Finding(
        verdict,
        f"{number}, {speed} of block {best.setting('block_size')}, "
        f"which scores {show.interval(score)} points more",
    )


_FAST_DLLM = ("fast-dllm-parallel", "fast-dllm-prefix", "fast-dllm-dual")
_ENDS = "the slowest run of the one beats the fastest of the other"
CLAIMS = (
    Claim(
        key="autoregressive",
        says="2.5x tokens/s of an autoregressive model on GSM8K",
        paper="2.5x LLaMA3, 2.3x Qwen2.5",
        rule=f"median tokens/s of pipelined / autoregressive >= {AUTOREGRESSIVE_BAR}, "
        "on problems of mathematics.",
        check=_reaches("autoregressive", AUTOREGRESSIVE_BAR),
        tasks=MATHEMATICS,
    ),
    Claim(
        key="autoregressive-code",
        says="1.6x tokens/s of an autoregressive model on HumanEval",
        paper="1.6x LLaMA3, 1.5x Qwen2.5",
        rule=f"median tokens/s of pipelined / autoregressive >= {HUMANEVAL_BAR}, on code.",
        check=_reaches("autoregressive", HUMANEVAL_BAR),
        tasks=CODE,
    ),
    Claim(
        key="vanilla",
        says="up to 50x vanilla's tokens/s",
        paper="52.9x (MBPP, 512 positions, 512 steps)",
        rule=f"median tokens/s of pipelined / vanilla-512 >= {VANILLA_BAR:.0f}; the ratios to "
        "vanilla with the same room, and with a stop at EOS, are told beside it.",
        check=_vanilla_at_512,
    ),
    Claim(
        key="score",
        says="the score is kept",
        paper="-1.0 to +5.4 points",
        rule="the 95% interval of the score of pipelined minus the teacher's reaches 0 or lies "
        f"above, on at least {MIN_PROBLEMS} problems.",
        check=_score_kept,
    ),
    Claim(
        key="fast-dllm",
        says="faster than Fast-dLLM",
        paper="1.2x to 4.3x",
        rule=f"pipelined against the fastest of Fast-dLLM's rows: {_ENDS}.",
        check=_faster_than("Fast-dLLM", *_FAST_DLLM),
    ),
    Claim(
        key="dllm-cache",
        says="faster than dLLM-Cache",
        paper="2.6x to 20.7x",
        rule=f"pipelined against dllm-cache: {_ENDS}.",
        check=_faster_than("dllm-cache", "dllm-cache"),
    ),
    Claim(
        key="cache",
        says="the cache alone gives part of the speed, parallelism the rest",
        paper="cache 1.5x to 20.1x, then parallel 1.7x to 3.0x",
        rule=f"serial against vanilla and pipelined against serial: {_ENDS}.",
        check=_cache_and_parallel,
    ),
    Claim(
        key="noise-speed",
        says="monotone noise decodes faster than random noise",
        paper="+4.7% to +18.2% tokens/s",
        rule="monotone over random of the same seed, tokens/s (tokens/forward where no speed was "
        "measured), mean over activate thresholds: the 95% interval over seeds (Student's t) lies "
        "above 0.",
        check=_noise_speed,
    ),
    Claim(
        key="noise-score",
        says="monotone noise scores higher than random noise",
        paper="-0.5 to +5.0 points",
        rule="monotone minus random of the same seed, mean over activate thresholds: the 95% "
        "interval over seeds (Student's t) lies above 0.",
        check=_noise(lambda row: row.score, "points"),
    ),
    Claim(
        key="thresholds",
        says="lower thresholds decode faster and score worse",
        paper="1.30x, -2.7 points (0.95 to 0.85)",
        rule="loosest against strictest activate and confidence thresholds at one add threshold: "
        f"{_ENDS}, and the 95% interval of the score's difference lies below 0.",
        check=_lower_thresholds,
    ),
    Claim(
        key="control",
        says="fine-tuning alone does not speed decoding up",
        paper="0.4x to 0.7x tokens/s, 0.9x latency",
        rule="median tokens/s of control / vanilla <= 1.1.",
        check=_fine_tuning_alone,
    ),
    Claim(
        key="block-size",
        says="the block size trades speed for score",
        paper="a plot (figure 5)",
        rule=f"the fastest block size is not the one that scores best: {_ENDS}, and the 95% "
        "interval of the score's difference lies above 0.",
        check=_block_size,
    ),
)
"""In the order in which the paper makes them."""

"""Each claim's verdict, both ways, and where nothing can be said."""

import pytest
from benchmarks.paper.claims import CLAIMS, claim_table
from tests.unit.evaluation.fake_results import fake_summary, write_results, write_row

from d2f.evaluation.report.reading import load_results


def verdicts(folder):
    table = claim_table(load_results([folder]).comparisons)
    return {line["key"]: line for line in table.lines}


def steady(speed):
    """Runs that do not differ, unless they are given."""
    return (speed,) * 3 if isinstance(speed, int) else speed


def judge(folder, key, *summaries):
    for summary in summaries:
        write_row(folder, summary)
    return verdicts(folder)[key]


def test_machines_that_differ_are_told(tmp_path):
    write_row(tmp_path, fake_summary("vanilla"))
    write_row(tmp_path, fake_summary("serial", environment={"processor": "another"}))
    notes = claim_table(load_results([tmp_path]).comparisons).notes
    assert notes[0].startswith("**Warning: rows differ in processor:**")
    assert notes[0].endswith("in fake family on fake problems")


def test_all_claims_hold_on_results_like_the_papers(tmp_path):
    table = claim_table(load_results([write_results(tmp_path)]).comparisons)
    found = {line["key"]: line["verdict"] for line in table.lines}
    assert found.pop("autoregressive-code") == "not testable here"
    assert set(found.values()) == {"reproduced"}
    assert len(found) == len(CLAIMS) - 1


def test_results_without_rows_say_nothing(tmp_path):
    write_row(tmp_path, fake_summary("undistilled"))
    found = verdicts(tmp_path)
    assert list(found) == [claim.key for claim in CLAIMS]
    assert {line["verdict"] for line in found.values()} == {"not testable here"}
    assert all(line["number"].startswith("no rows") for line in found.values())


def test_simulated_rows_prove_nothing(tmp_path):
    write_results(tmp_path, simulated="random weights")
    found = verdicts(tmp_path)
    assert {line["verdict"] for line in found.values()} == {"not testable here"}
    assert {line["number"] for line in found.values()} == {"no rows"}


@pytest.mark.parametrize(
    ("task", "speed", "expected"),
    [
        ("word-problems", 250, {"autoregressive": "reproduced"}),
        ("word-problems", 249, {"autoregressive": "not reproduced"}),
        ("word-problems", (251, 249, 252), {"autoregressive": "open"}),
        ("functions", 160, {"autoregressive-code": "reproduced"}),
        ("functions", 159, {"autoregressive-code": "not reproduced"}),
    ],
)
def test_times_autoregression(tmp_path, task, speed, expected):
    write_row(tmp_path, fake_summary("pipelined", speed=steady(speed), task=task))
    write_row(tmp_path, fake_summary("autoregressive", speed=steady(100), task=task))
    found = verdicts(tmp_path)
    keys = ("autoregressive", "autoregressive-code")
    tested = {k: found[k]["verdict"] for k in keys if found[k]["verdict"] != "not testable here"}
    assert tested == expected


def test_ratios_have_ends(tmp_path):
    line = judge(
        tmp_path,
        "autoregressive",
        fake_summary("pipelined", speed=(260, 240, 270)),
        fake_summary("autoregressive", speed=(100, 100, 100)),
    )
    assert line["verdict"] == "open"
    assert line["number"] == "2.60x (2.40–2.70) of autoregressive"


@pytest.mark.parametrize(("speed", "verdict"), [(500, "reproduced"), (499, "not reproduced")])
def test_fifty_times_vanilla_in_the_papers_setting(tmp_path, speed, verdict):
    line = judge(
        tmp_path,
        "vanilla",
        fake_summary("pipelined", speed=steady(speed)),
        fake_summary("vanilla-512", speed=steady(10)),
        fake_summary("vanilla", speed=steady(50)),
        fake_summary("vanilla-eos-stop", speed=steady(60)),
    )
    assert line["verdict"] == verdict
    first, second = line["number"].split("; ")
    assert first.endswith(" of vanilla-512")
    assert second == f"{speed / 60:.2f}x ({speed / 60:.2f}–{speed / 60:.2f}) of vanilla-eos-stop"
    assert line["beside"].startswith("6.00x of it are positions after the end of answers")
    assert " of vanilla, which has the room of pipelined" in line["beside"]


@pytest.mark.parametrize(
    ("score", "verdict", "beside"),
    [
        (0.90, "reproduced", ""),
        (0.99, "reproduced", ""),
        # -0.5 points, with an interval of 0.44 to both sides.
        (0.895, "reproduced", "a loss beyond chance, of less than 1 point"),
        (0.89, "open", "a loss beyond chance; whether it is more than 1 point is open"),
        (0.8, "not reproduced", "a loss beyond chance, of more than 1 point"),
    ],
)
def test_score_kept(tmp_path, score, verdict, beside):
    rows = fake_summary("pipelined", score=score), fake_summary("vanilla", score=0.9)
    line = judge(tmp_path, "score", *rows)
    assert (line["verdict"], line["beside"]) == (verdict, beside)
    assert "paired, n = 1000" in line["number"]


def test_score_of_few_problems_decides_nothing(tmp_path):
    rows = fake_summary("pipelined", score="11"), fake_summary("vanilla", score="11")
    line = judge(tmp_path, "score", *rows)
    assert (line["verdict"], line["number"]) == ("not testable here", "only 2 problems")


def test_scores_that_are_no_pairs_have_independent_errors(tmp_path):
    write_row(tmp_path, fake_summary("pipelined", score=0.5, num_problems=100), problems=False)
    write_row(tmp_path, fake_summary("vanilla", score=0.5, num_problems=400), problems=False)
    number = verdicts(tmp_path)["score"]["number"]
    # 1.96 sqrt(0.05² + 0.025²) = 10.96 points.
    assert number == "+0.0 [-11.0, +11.0] points, not paired, n = 100"


@pytest.mark.parametrize(
    ("key", "rivals"),
    [
        ("fast-dllm", {"fast-dllm-prefix": 50, "fast-dllm-dual": 100}),
        ("fast-dllm", {"fast-dllm-prefix": 100, "fast-dllm-parallel": 500}),
        ("dllm-cache", {"dllm-cache": 100}),
    ],
)
@pytest.mark.parametrize(
    ("speed", "verdict"),
    [(120, "reproduced"), (80, "not reproduced"), ((110, 95, 111), "open")],
)
def test_faster_than_the_papers_rivals_beyond_the_spread(tmp_path, key, rivals, speed, verdict):
    rows = [fake_summary(name, speed=value) for name, value in rivals.items()]
    line = judge(tmp_path, key, fake_summary("pipelined", speed=speed), *rows)
    assert line["verdict"] == verdict
    told = [name for name in rivals if f" of {name}" in line["number"]]
    assert told == [name for name in rivals if name != "fast-dllm-parallel"]


def test_fastest_of_fast_dllm_is_named(tmp_path):
    write_row(tmp_path, fake_summary("pipelined", speed=steady(100)))
    write_row(tmp_path, fake_summary("fast-dllm-dual", speed=steady(50)))
    line = judge(tmp_path, "fast-dllm", fake_summary("fast-dllm-parallel", speed=steady(200)))
    assert line["number"] == "2.00x (2.00–2.00) of fast-dllm-dual"
    assert line["beside"] == (
        "fastest of Fast-dLLM is fast-dllm-parallel; 0.500x (0.500–0.500) of fast-dllm-parallel, "
        "which has no cache and is not among the paper's rows"
    )


def test_fast_dllm_without_the_papers_rows_decides_nothing(tmp_path):
    write_row(tmp_path, fake_summary("pipelined"))
    line = judge(tmp_path, "fast-dllm", fake_summary("fast-dllm-parallel"))
    assert line["verdict"] == "not testable here"


@pytest.mark.parametrize(
    ("serial", "pipelined", "verdict"),
    [
        (200, 400, "reproduced"),
        (90, 400, "not reproduced"),
        (100, 400, "open"),
        (400, 400, "open"),
        (400, 300, "not reproduced"),
    ],
)
def test_cache_gives_a_part(tmp_path, serial, pipelined, verdict):
    rows = {"vanilla": 100, "serial": serial, "pipelined": pipelined}
    line = judge(tmp_path, "cache", *(fake_summary(k, speed=v) for k, v in rows.items()))
    assert (line["verdict"], line["beside"]) == (verdict, "")


def test_cache_is_told_against_a_vanilla_that_stops(tmp_path):
    rows = {"vanilla": 100, "vanilla-eos-stop": 150, "serial": 300, "pipelined": 500}
    summaries = [fake_summary(name, speed=steady(speed)) for name, speed in rows.items()]
    line = judge(tmp_path, "cache", *summaries)
    assert line["beside"] == "serial 2.00x (2.00–2.00) of vanilla-eos-stop"


def noise(schedule, seed, level=0.9, **values):
    labels = {"schedule": schedule, "seed": seed, "activate_threshold": 0.95}
    labels["confidence_threshold"] = level
    name = f"{schedule}-{seed}-{level}"
    return fake_summary(name, method="pipelined", experiment="noise", labels=labels, **values)


@pytest.mark.parametrize(
    ("gains", "faster", "better"),
    [
        ((10, 11, 12), "reproduced", "reproduced"),
        ((10, 0, -10), "open", "open"),
        # Less than the paper's least, though not beyond 0.
        ((1, -1, 0), "not reproduced", "open"),
        ((-9, -10, -11), "not reproduced", "not reproduced"),
    ],
)
def test_noise_schedules_over_seeds(tmp_path, gains, faster, better):
    for seed, gain in enumerate(gains):
        write_row(tmp_path, noise("random", seed, speed=100, score=0.5))
        write_row(tmp_path, noise("monotone", seed, speed=100 + gain, score=0.5 + gain / 100))
    found = verdicts(tmp_path)
    assert found["noise-speed"]["verdict"] == faster
    assert found["noise-score"]["verdict"] == better
    assert found["noise-speed"]["beside"] == "+0.0 [+0.0, +0.0] % tokens/forward, 3 seeds"
    mean = sum(gains) / 3
    assert found["noise-score"]["number"].startswith(f"{mean:+.1f} [")


def test_noise_counts_every_level(tmp_path):
    for seed, level in ((1, 0.9), (1, 0.98), (2, 0.9), (2, 0.98)):
        write_row(tmp_path, noise("random", seed, level, speed=100))
        write_row(tmp_path, noise("monotone", seed, level, speed=130 if level == 0.9 else 110))
    # A level that only one of them has cannot be compared.
    write_row(tmp_path, noise("monotone", 1, 0.5, speed=900))
    line = verdicts(tmp_path)["noise-speed"]
    assert line["number"] == "+20.0 [+20.0, +20.0] % tokens/s, 2 seeds"


def test_noise_without_a_clock_counts_forwards(tmp_path):
    for seed in (1, 2):
        write_row(tmp_path, noise("random", seed, speed=None, tokens_per_forward=4))
        write_row(tmp_path, noise("monotone", seed, speed=None, tokens_per_forward=5))
    line = verdicts(tmp_path)["noise-speed"]
    assert line["verdict"] == "reproduced"
    assert line["number"] == "+25.0 [+25.0, +25.0] % tokens/forward, 2 seeds"


def test_one_seed_decides_nothing(tmp_path):
    line = judge(tmp_path, "noise-score", noise("random", 1), noise("monotone", 1))
    assert (line["verdict"], line["number"]) == ("not testable here", "only one seed")


@pytest.mark.parametrize(
    ("speed", "score", "verdict"),
    [
        (130, 0.8, "reproduced"),
        (130, 0.9, "open"),
        (130, 0.95, "not reproduced"),
        (90, 0.8, "not reproduced"),
    ],
)
def test_lower_thresholds(tmp_path, speed, score, verdict):
    def row(threshold, **values):
        labels = {f"{k}_threshold": threshold for k in ("activate", "confidence")}
        labels["add_threshold"] = 0.1
        return fake_summary(str(threshold), experiment="thresholds", labels=labels, **values)

    rows = row(0.95, speed=100, score=0.9), row(0.85, speed=speed, score=score)
    assert judge(tmp_path, "thresholds", *rows)["verdict"] == verdict


@pytest.mark.parametrize(
    ("speed", "verdict"), [(95, "reproduced"), (110, "open"), (150, "not reproduced")]
)
def test_fine_tuning_alone(tmp_path, speed, verdict):
    rows = fake_summary("control", experiment="control", speed=speed), fake_summary("vanilla")
    assert judge(tmp_path, "control", *rows)["verdict"] == verdict


@pytest.mark.parametrize("change", [{"early_stop": True}, {"max_new_tokens": 32}])
def test_control_needs_a_vanilla_of_the_same_room(tmp_path, change):
    write_row(tmp_path, fake_summary("vanilla", early_stop=False))
    control = fake_summary("control", experiment="control", early_stop=False) | change
    line = judge(tmp_path, "control", control)
    assert line["verdict"] == "not testable here"
    end = "stops at" if "early_stop" in change else "goes on after"
    tokens = control["max_new_tokens"]
    assert line["number"] == (
        f"control {end} EOS, {tokens} tokens; vanilla goes on after EOS, 64 tokens"
    )


@pytest.mark.parametrize(
    ("speed", "score", "verdict"),
    [
        (150, 0.8, "reproduced"),
        (150, 0.95, "not reproduced"),
        (150, 0.9, "open"),
        ((150, 90, 151), 0.8, "open"),
    ],
)
def test_block_size(tmp_path, speed, score, verdict):
    def row(size, **values):
        return fake_summary(
            f"block-{size}", experiment="block-size", labels={"block_size": size}, **values
        )

    rows = row(8, speed=100, score=0.9), row(32, speed=speed, score=score)
    assert judge(tmp_path, "block-size", *rows)["verdict"] == verdict

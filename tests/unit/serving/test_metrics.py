"""The server counts its requests, tokens and times."""

from d2f import GenerationResult
from d2f.serving.metrics import ERRORS, Metrics

NAMES = (
    "d2f_requests_total d2f_requests_waiting d2f_requests_running d2f_tokens_total "
    "d2f_forwards_total d2f_tokens_per_forward_bucket d2f_step_seconds_bucket d2f_kv_pages "
    "d2f_kv_pages_free d2f_errors_total d2f_first_text_seconds_bucket d2f_request_seconds_bucket "
    "d2f_engine_cpu_seconds_total d2f_event_loop_cpu_seconds_total process_cpu_seconds_total"
).split()


def samples(metrics):
    """Each series with its value."""
    text = metrics.render()[0].decode()
    rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


def test_all_names_are_there_and_two_servers_do_not_clash():
    one, other = Metrics(["a"]), Metrics(["a"])
    one.count_request("a", "/health", 200)
    found = {name.partition("{")[0] for name in samples(one)}
    assert not set(NAMES) - found
    assert not any(name.startswith("d2f_requests_total") for name in samples(other))
    assert one.render()[1].startswith("text/plain")


def test_clients_cannot_make_up_series():
    metrics = Metrics(["a"])
    for number in range(500):
        metrics.count_request(f"model {number}", f"/v1/{number}", 404)
        metrics.count_error(f"error {number}")
    metrics.count_request(None, "/metrics", 200)
    found = samples(metrics)
    assert found['d2f_requests_total{endpoint="other",model="other",status="404"}'] == 500
    assert found['d2f_requests_total{endpoint="/metrics",model="",status="200"}'] == 1
    assert found['d2f_errors_total{kind="other"}'] == 500
    kinds = [name for name in found if name.startswith("d2f_errors_total")]
    assert len(kinds) == len(ERRORS) + 1


def test_results_and_load_add_up():
    metrics = Metrics()
    result = GenerationResult(
        token_ids=[1] * 6,
        probabilities=[1.0] * 6,
        num_forwards=2,
        num_prefill_forwards=0,
        num_query_tokens=8,
        finish_reason="length",
    )
    for _ in range(2):
        metrics.count_result(result, 0.3)
    metrics.set_load(running=3, pages=[(10, 4), (5, 5)])
    metrics.watch_waiting(lambda: 7)
    found = samples(metrics)
    assert found["d2f_tokens_total"] == 12
    assert found["d2f_forwards_total"] == 4
    assert found["d2f_tokens_per_forward_sum"] == 6
    assert found["d2f_request_seconds_count"] == 2
    assert (found["d2f_kv_pages"], found["d2f_kv_pages_free"]) == (15, 9)
    assert (found["d2f_requests_running"], found["d2f_requests_waiting"]) == (3, 7)

"""d2f as a Ray Serve deployment: most of it needs no Ray."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from d2f.cli import ray_app
from d2f.cli.ray_app import LocalClients, RayArguments, Replica, deployment_options
from d2f.errors import ConfigError
from d2f.serving.errors import Unavailable
from d2f.serving.settings import ServeSettings
from d2f.testing import write_checkpoint


def test_options_of_the_deployment():
    scaling = {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 8, "num_gpus": 1}
    options = deployment_options(RayArguments(**scaling))
    assert options["autoscaling_config"] == {
        "min_replicas": 2,
        "initial_replicas": 2,
        "max_replicas": 5,
        "target_ongoing_requests": 8,
        "upscale_delay_s": 10.0,
        "downscale_delay_s": 300.0,
    }
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 1}
    # Replicas refuse what is too much themselves, and have time to end what runs.
    assert options["max_ongoing_requests"] > 64 + 256
    assert options["graceful_shutdown_timeout_s"] > 30


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_replicas": 0}, r"min_replicas\n.*greater than or equal to 1.*input_value=0"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas is 2, less than min_replicas 3"),
        ({"target_ongoing_requests": 0}, r"target_ongoing_requests\n.*greater than 0"),
        ({"num_cpus": 0}, r"num_cpus\n.*greater than 0.*input_value=0"),
        ({"num_gpus": -1}, r"num_gpus\n.*greater than or equal to 0.*input_value=-1"),
        ({"downscale_delay_seconds": float("nan")}, r"downscale_delay_seconds\n.*input_value=nan"),
    ],
)
def test_impossible_scaling_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RayArguments(**values)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ray_app, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'd2f\[ray\]'"):
        ray_app.app(RayArguments())


def test_arguments_reach_their_places(monkeypatch):
    monkeypatch.setattr(ray_app, "find_spec", lambda name: True)
    got = []
    monkeypatch.setattr(ray_app, "ray_application", lambda *parts: got.extend(parts))
    ray_app.app(RayArguments(max_waiting="7", max_replicas=3, num_gpus=0.5, drain_seconds=9))
    build, settings, options = got
    assert settings == ServeSettings(max_waiting=7, drain_seconds=9.0)
    assert options["autoscaling_config"]["max_replicas"] == 3
    assert options["ray_actor_options"]["num_gpus"] == 0.5
    assert pickle.loads(pickle.dumps(build)).args == build.args


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="min_replica\n"):
        RayArguments(min_replica=2)


def test_a_replica_serves_what_d2f_serve_serves(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny", "llada", tokenizer=True)
    arguments = RayArguments(model=str(folder), device="cpu", max_batch_size=2)
    app, service = ray_app._build_replica(arguments, ServeSettings())
    with TestClient(app, base_url="http://localhost") as client:
        asked = {"prompt": "1+1=", "max_tokens": 4}
        answer = client.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "tiny"
    assert service.state.value == "stopped"


def test_without_a_key_other_machines_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny", "llada", tokenizer=True)
    app, _ = ray_app._build_replica(RayArguments(model=str(folder), device="cpu"), ServeSettings())
    app.add_middleware(LocalClients)
    for address, status in (("10.0.0.7", 403), ("127.0.0.1", 200)):
        client = TestClient(app, base_url="http://localhost", client=(address, 50000))
        assert client.get("/health/live").status_code == status


def test_a_replica_whose_service_failed_is_not_healthy():
    async def fail():
        raise Unavailable("the engine failed")

    async def pass_by():
        return None

    replica = Replica.__new__(Replica)
    for ready, healthy in ((pass_by, True), (fail, False)):
        service = SimpleNamespace(ready=ready)
        replica.app = SimpleNamespace(state=SimpleNamespace(service=service))
        if healthy:
            asyncio.run(replica.check_health())
        else:
            with pytest.raises(Unavailable, match="the engine failed"):
                asyncio.run(replica.check_health())


def test_ray_takes_the_application():
    pytest.importorskip("ray.serve")
    application = ray_app.app(RayArguments(min_replicas=2, max_replicas=3, num_gpus=0))
    deployment = application._bound_deployment
    assert deployment.name == "d2f"
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3
    assert hasattr(deployment.func_or_class, "check_health")

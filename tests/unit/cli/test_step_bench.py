import pytest
import torch
from tests.unit.training.tiny_run import make_config, make_trainer

from d2f.cli.step_bench import StepBench, largest, random_dataset, survives
from d2f.errors import TrainingError
from d2f.models.lora import LoraConfig, attach_adapter
from d2f.testing import tiny_model
from d2f.testing.tiny import EOS_TOKEN_ID, MASK_TOKEN_ID
from d2f.training.sections import ObjectiveConfig, OptimizerConfig
from d2f.training.trainer import PHASES

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_bench(folder, *, device="cpu", **overrides):
    lora = overrides.pop("lora", LoraConfig(r=4, alpha=4))
    given = {"batch_size": 4, "micro_batch_size": 2, "lora": lora} | overrides
    config = make_config(folder, "d2f", **given)
    student, teacher = tiny_model("Dream").to(device), None
    if lora is None:
        student.requires_grad_(True)
        teacher = tiny_model("Dream", seed=1).to(device)
    else:
        attach_adapter(student, lora, torch.Generator().manual_seed(0))
    return StepBench(config, student, teacher)


def test_times_are_of_as_many_steps_as_asked(tmp_path):
    bench = make_bench(tmp_path)
    times = bench.time(3, num_warm_up=2)
    assert bench.trainer.step == 5
    assert times.num_steps == 3
    assert 0 < times.fastest <= times.mean
    assert times.fastest <= times.slowest


@pytest.mark.parametrize("lora", [LoraConfig(r=4), None])
def test_phases_are_the_parts_of_a_step(lora, tmp_path):
    bench = make_bench(tmp_path, lora=lora)
    bench.trainer._train_step()
    phases = bench.phases(2)
    assert tuple(phases) == PHASES
    assert all(milliseconds > 0 for milliseconds in phases.values())


def test_watching_changes_no_step(tmp_path):
    watched, plain = make_bench(tmp_path / "a"), make_bench(tmp_path / "b")
    watched.phases(1)
    watched.trainer._train_step()
    plain.trainer._train_step()
    plain.trainer._train_step()
    pairs = zip(
        watched.trainer.student.parameters(), plain.trainer.student.parameters(), strict=True
    )
    assert all(torch.equal(one, other) for one, other in pairs)


def test_an_observer_hears_the_phases_of_each_micro_batch_in_their_order(tmp_path):
    heard = []
    trainer = make_trainer(
        make_config(tmp_path, "d2f", batch_size=4, micro_batch_size=2), observer=heard.append
    )
    trainer._train_step()
    assert heard == [*PHASES[:-1], *PHASES]


def test_the_loss_on_one_batch_falls_towards_the_teacher(tmp_path):
    bench = make_bench(tmp_path, optimizer=OptimizerConfig(lr=1e-2))
    losses = bench.repeat(30)
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]
    assert bench.floor() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "soft_cross_entropy"])
def test_the_floor_is_what_the_teacher_itself_would_have(objective, tmp_path):
    """At block size = length a fresh student sees all, so it says what its teacher says."""
    config = make_config(tmp_path, "d2f").noise
    whole = type(config)(kind="original", low=0.5, high=0.5, block_size=1000)
    bench = make_bench(tmp_path, objective=ObjectiveConfig(objective=objective), noise=whole)
    bench._dataset._prompt_E.zero_()
    floor = bench.floor()
    assert bench.repeat(1)[0] == pytest.approx(floor, abs=1e-5)
    assert (floor > 0.1) == (objective == "soft_cross_entropy")


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    bench = make_bench(tmp_path, lora=None)
    with torch.no_grad():
        bench.trainer.student.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"not finite at step 1 .*--lr"):
        bench.repeat(2)
    with pytest.raises(TrainingError, match="not finite"):
        bench.time(1)


def test_random_sequences_have_neither_masks_nor_ends_inside(tmp_path):
    config = make_config(tmp_path, "d2f")
    model = tiny_model("Dream")
    dataset = random_dataset(config, model.spec)
    batch = dataset.batch(torch.arange(len(dataset)))
    assert not (batch.ids_BL == MASK_TOKEN_ID).any()
    assert (batch.ids_BL[:, -1] == EOS_TOKEN_ID).all()
    assert not (batch.ids_BL[:, :-1] == EOS_TOKEN_ID).any()
    assert (batch.prompt_length_B == 24 // 4).all()
    assert (batch.end_B == 24).all()


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 100])
def test_the_largest_that_fits(limit, first):
    assert largest(lambda n: n <= limit, first=first, most=64) == min(limit, 64)


def test_only_lack_of_memory_is_survived():
    def lacking(text):
        def work():
            raise RuntimeError(text)

        return work

    assert survives(lambda: None)
    assert not survives(lacking("CUDA error: out of memory"))
    assert not survives(lacking("CUBLAS_STATUS_ALLOC_FAILED"))
    with pytest.raises(RuntimeError, match="something else"):
        survives(lacking("something else"))


@pytest.mark.gpu
@gpu
def test_memory_on_a_gpu(tmp_path):
    bench = make_bench(tmp_path, device="cuda", compile=False)
    bench.time(1)
    assert bench.peak_memory() > 0
    assert bench.loss_memory() > 0
    assert sum(bench.phases(2).values()) > 0


@pytest.mark.gpu
@gpu
def test_memory_runs_out_and_is_given_back():
    before = torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    assert not survives(lambda: torch.empty(2 * total, dtype=torch.uint8, device="cuda"))
    assert torch.cuda.memory_reserved() <= before

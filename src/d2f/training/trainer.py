"""The training loop: batches, noise, gradients, guarded updates, log, checkpoints.

Everything random is a function of (seed, step), except dropout, whose generator state is part of
a checkpoint. So a run that is resumed goes on as if it had not been stopped, bit for bit on a CPU.

Several processes go through the same loop. Each takes its share of the micro-batches of the same
batches; sums of losses and gradients, the clock and the wish to stop are those of all, so that all
of them do the same at the same step. The main process writes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from d2f.errors import D2FError, TrainingError
from d2f.models.transformer import Transformer
from d2f.training.checkpoint import (
    require_shared,
    restore_optimizer,
    restore_random,
    save_checkpoint,
    saving,
)
from d2f.training.confidence import measure_confidence
from d2f.training.config import TrainConfig
from d2f.training.data import SampleOrder, TokenDataset, derive_seed, generator
from d2f.training.evaluations import Evaluations, Evaluator, SaveBest
from d2f.training.model_card import CardFacts
from d2f.training.optimizer import GuardedUpdate, build_optimizer, learning_rate
from d2f.training.packing import pack_samples
from d2f.training.processes import DistributedModel, Processes
from d2f.training.run_log import LogWindow, Reporter, RunLog
from d2f.training.stage_loss import Observer, StageLoss
from d2f.training.step_inputs import StepInputs, make_inputs

Sampler = Callable[[Transformer], Sequence[Mapping[str, Any]]]
"""Answers some prompts; every record has `prompt` and `answer`."""


PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer")
"""The phases of a step in their order; "data" is the batch, its noise, and the copy to the device.
Each micro-batch goes through all but the last one."""


class Trainer:
    """One run of one stage, on one device or on that of each process.

    Args:
        config: The recipe.
        student: The model, on its device, whose trained parameters require gradients.
        dataset: The samples.
        teacher: Stage d2f: a frozen model; None: the student with its adapter off.
        sampler: Gives sample answers, on the main process.
        evaluator: Scores the model, on the main process.
        save_best: Keeps the model that the evaluator scored best.
        reporter: Is told of every record.
        state: The result of `load_state`, to go on from there.
        processes: Those that train together; None: this one alone.
        observer: Is told of the end of each of `PHASES`, within the steps.

    Raises:
        ConfigError: The batch cannot be divided among the processes.
        TrainingError: The state does not fit the recipe.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Transformer,
        dataset: TokenDataset,
        *,
        teacher: Transformer | None = None,
        sampler: Sampler | None = None,
        evaluator: Evaluator | None = None,
        save_best: SaveBest | None = None,
        reporter: Reporter | None = None,
        state: Mapping[str, Any] | None = None,
        processes: Processes | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.config = config
        self.student = student
        self.device = student.device
        self.processes = processes or Processes(self.device)
        self._size, count = config.micro_batches(self.processes.world_size)
        # Neighbours go to different processes: they may be of like length, and then take as long.
        self._share = range(
            self.processes.rank, count * self.processes.world_size, self.processes.world_size
        )
        """Numbers of the micro-batches of a batch that this process takes."""
        self.distributed = DistributedModel(student, self.processes, config.sharding)
        if teacher is not None:
            DistributedModel(teacher, self.processes, config.sharding)
        self.step = 0
        """Updates made so far."""
        self.seconds = 0.0
        """Training time, without the first step, samples and checkpoints."""
        self.last_record: dict[str, Any] | None = None
        """The last line of the log."""
        self._ended = observer or (lambda phase: None)
        self.loss = StageLoss(
            config,
            student,
            teacher,
            compiled=config.compile and self.device.type == "cuda",
            forward=self.distributed.forward,
            alone=self.processes.world_size == 1,
            observer=observer,
        )
        optimizer = build_optimizer(student, config.optimizer)
        self.update = GuardedUpdate(optimizer, config.optimizer.clip_norm)
        self._dataset = dataset
        self._packing = pack_samples(dataset, config) if config.data.padding == "packed" else None
        self.order = SampleOrder(
            num_rows=self._packing.num_rows if self._packing else len(dataset),
            batch_size=config.batch_size,
            seed=config.seed,
        )
        self._sampler, self._evaluator = sampler, evaluator
        self._reporter = (reporter if self.processes.is_main else None) or Reporter()
        self._state = state
        self._stop = threading.Event()
        if state is not None:
            self.step, self.seconds = state["step"], state["seconds"]
            restore_optimizer(self.distributed, optimizer, config, state, self.processes)
        self._evaluated = self.step
        """Step of the last evaluation, or where the run goes on from."""
        self._window = LogWindow(self.step, self.seconds)
        self._log: RunLog | None = None
        self.evaluations: Evaluations | None = None
        """Evaluations, which the main process has if the model is scored."""
        self.processes.on_main(lambda: self._open_logs(save_best or (lambda model, record: None)))

    def _open_logs(self, save_best: SaveBest) -> None:
        if self._packing is not None:
            self._reporter.note(self._packing.text())
        self._log = RunLog(self.config, self._reporter, after_step=self.step)
        if self._evaluator is not None and self.config.evaluate is not None:
            given = self.config, self._evaluator, save_best, self._reporter
            self.evaluations = Evaluations(*given, after_step=self.step)

    @property
    def warnings(self) -> list[str]:
        """Warnings of the log, on the main process."""
        return self._log.warnings if self._log is not None else []

    def data_counts(self) -> dict[str, Any]:
        """Count what became of the data's rows, and the packed rows where there are some."""
        counts, packing = self._dataset.counts(), self._packing
        if packing is not None:
            counts |= {"packed_rows": packing.num_rows, "filled": round(packing.filled, 4)}
        return counts

    def facts(self, evaluation: Mapping[str, Any] | None) -> CardFacts:
        """Give what a model card tells of the run so far; `evaluation` is that of the model."""
        return CardFacts(
            steps=self.step,
            data=self.data_counts(),
            loss=self.last_record["loss"] if self.last_record else None,
            evaluation=evaluation,
        )

    def stop(self) -> None:
        """Ask the run to save a checkpoint and end after the step in progress, on any process."""
        self._stop.set()

    def run(self) -> bool:
        """Train to the end; False if it was stopped before, with a checkpoint saved.

        Raises:
            TrainingError: A loss or gradient was not finite; the weights of the step before are
                saved as a checkpoint. Or not all processes see the output folder, to which each of
                them will write shards.
        """
        if self.distributed.shards_optimizer:
            # Now, not at the first checkpoint. A folder of that name may be on any machine.
            require_shared(Path(self.config.output) / "log.jsonl", self.processes)
        self.student.train()
        devices = [self.device] if self.device.type == "cuda" else []
        # The caller's random state stays as it is.
        with torch.random.fork_rng(devices):
            # Processes drop different things, as they have different samples.
            torch.manual_seed(derive_seed(self.config.seed, "dropout", self.processes.rank))
            if self._state is not None:
                restore_random(self._state, self.config, self.processes, self._reporter.note)
            try:
                return self._loop()
            finally:
                if self._log is not None:
                    self._log.close()

    def _loop(self) -> bool:
        start = None
        while self.progress < 1 and not self.processes.any(self._stop.is_set()):
            self._train_step()
            if start is None:
                # The first step compiles; it would spoil speeds and time-driven schedules.
                self._wait()
                start = time.perf_counter() - self.seconds
                self._window.timed_from = (self.step, self.seconds)
            self._read_clock(start)
            start += self._evaluate_if_due()
            due = self.step % self.config.log_every == 0
            if due or self.progress >= 1:
                self._wait()
                self._read_clock(start)
                self._write_log()
            elif self.device.type == "cpu":
                self._check_finite()
            pause = time.perf_counter()
            self._sample_if_due()
            every = self.config.checkpoint_every
            if every is not None and self.step % every == 0 and self.progress < 1:
                self.save()
            start += time.perf_counter() - pause
        self._check_finite()
        if self.progress < 1:
            self.save()
        else:
            self._evaluate_if_due()  # where only the clock ended the run, and not before now
        return self.progress >= 1

    def _read_clock(self, start: float) -> None:
        self.seconds = time.perf_counter() - start
        if self.config.max_seconds is not None:
            # The end and the rates follow from it, which must be those of all processes.
            self.seconds = self.processes.from_main(self.seconds)

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or, where the recipe limits them, seconds."""
        share = self.step / self.config.steps
        if self.config.max_seconds is not None:
            share = max(share, self.seconds / self.config.max_seconds)
        return min(share, 1.0)

    def save(self) -> Path:
        """Write a checkpoint of the current step."""
        self._check_finite()
        return self._save(self.step)

    def _train_step(self) -> None:
        """One update from one batch, of which this process takes some micro-batches."""
        lr = learning_rate(self.config.optimizer, self.step, self.progress)
        inputs = self._inputs()
        total = torch.zeros((), device=self.device)
        logged = (self.step + 1) % self.config.log_every == 0
        parts = inputs.parts(self._size, select=self.loss.selects)
        own = islice(parts, self._share.start, self._share.stop, self._share.step)
        for number, part in enumerate(own, 1):
            moved = part.to(self.device)
            if logged and self._window.confidence is None:
                # Before the pass that trains, whose end leaves sharded weights in their shards.
                self._window.confidence = measure_confidence(self.loss, moved)
            with self.distributed.gradients(last=number == len(self._share)):
                self._ended("data")
                loss, loss_BL = self.loss(moved)
                self.distributed.backward(loss)
                self._ended("backward")
            total += loss.detach()
            if logged:
                self._window.add_blocks(moved, loss_BL, self.config)
        total = self.processes.sum(total)
        self.step += 1
        norm = self.update.apply(self.step, lr, total)
        self._ended("optimizer")
        self._window.add(total, norm, lr)

    def _inputs(self) -> StepInputs:
        """The step's whole batch, with its noise."""
        rows_B = self.order.rows(self.step)
        make = partial(
            make_inputs,
            config=self.config,
            mask_token_id=self.student.spec.mask_token_id,
            generator=generator(self.config.seed, "noise", self.step),
        )
        if self._packing is None:
            return make(self._dataset.batch(rows_B))
        places = self._packing.places(rows_B)
        return places.pack(make(self._dataset.batch(places.sample_S, places.longest)))

    def _write_log(self) -> None:
        self._check_finite()
        tokens = self.config.batch_size * self._dataset.sequence_length
        record = self._window.record(self.step, tokens, self.seconds, self.processes) | {
            "progress": round(self.progress, 6)
        }
        self._window = LogWindow(self.step, self.seconds)
        if self.evaluations is not None:
            record |= self.evaluations.take()
        self.last_record = record
        if self._log is not None:
            self._log.write(record)

    @contextmanager
    def _whole_model(self) -> Iterator[Transformer | None]:
        """The model for inference: on the main process with all its weights, None on others.

        What is done with it changes no random state.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        dtype = getattr(torch, self.config.model.weights_dtype)
        self.student.eval()
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            self.distributed.whole(self.device, dtype) as model,
        ):
            yield model
        self.student.train()
        if devices:
            torch.cuda.empty_cache()  # the engine's cache, which the next step may need

    def _evaluate_if_due(self) -> float:
        """Score the model if it is time; the seconds that it took."""
        settings = self.config.evaluate
        if self._evaluator is None or settings is None or self.step == self._evaluated:
            return 0.0
        if self.step % settings.every and self.progress < 1:
            return 0.0
        self._evaluated = self.step
        self._check_finite()
        pause = time.perf_counter()
        with self._whole_model() as model:
            if model is not None and self.evaluations is not None:
                self.evaluations.run(model, self.step)
            self.processes.wait()
        return time.perf_counter() - pause

    def _sample_if_due(self) -> None:
        settings = self.config.sample
        if self._sampler is None or settings is None or self.step % settings.every:
            return
        with self._whole_model() as model:
            failed = model is not None and not self._sample(self._sampler, model)
            if self.processes.any(failed):
                self._sampler = None

    def _sample(self, sampler: Sampler, model: Transformer) -> bool:
        """Write some answers; False if they could not be given."""
        try:
            answers = [{"step": self.step, **answer} for answer in sampler(model)]
        except D2FError as error:
            # Hours of training must not end because an example cannot be answered.
            self._reporter.note(f"no sample answers from here on: {error}")
            return False
        if self._log is not None:
            self._log.write_samples(answers)
        return True

    def _check_finite(self) -> None:
        bad = self.update.first_bad_step()
        if bad is None:
            return
        folder = self._save(bad - 1)
        raise TrainingError(
            f"loss or gradient is not finite at step {bad}; the weights of step {bad - 1} are in "
            f"{folder}. Lower optimizer.lr, or look at the data"
        )

    def _save(self, step: int) -> Path:
        self._wait()
        progress, optimizer = {"step": step, "seconds": self.seconds}, self.update.optimizer
        with saving(Path(self.config.output)):
            return save_checkpoint(
                self.distributed, optimizer, self.config, progress, self.processes
            )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

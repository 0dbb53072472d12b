"""The training loop: batch, losses, step, telemetry, commit; until done or asked to stop."""

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpal import checkpoint
from dpal.base import telemetry as metrics
from dpal.base.errors import ConfigError, StorageError
from dpal.base.progress import Progress
from dpal.base.recipe import Recipe, steps_of
from dpal.base.signals import StopSignal
from dpal.base.telemetry import Telemetry
from dpal.batch import BatchSource
from dpal.engine import Engine
from dpal.model.decoder import Pattern
from dpal.optim import learning_rate
from dpal.task import Losses, Moment, Task


@dataclass(frozen=True)
class Schedule:
    """The recipe's durations in optimiser steps."""

    total: int
    warmup: int

    @classmethod
    def of(cls, recipe: Recipe, num_samples: int) -> "Schedule":
        """Resolve "epochs" with the size of the data set."""
        durations = (recipe.train.duration, recipe.train.warmup)
        return cls(*(steps_of(d, num_samples, recipe.train.global_batch) for d in durations))


class EventLog:
    """Appends one JSON object a line; rank 0 alone writes.

    Raises:
        StorageError: when the disk is full or not writable.
    """

    def __init__(self, path: Path, enabled: bool) -> None:
        self._path, self._file = path, None
        if enabled:
            with self._errors():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("ab", buffering=0)
                whole = path.read_bytes().rfind(b"\n") + 1
                self._file.truncate(whole)  # a full disk may have cut the last row short

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one row."""
        if self._file is not None:
            row = {"event": event, "step": step, "time": time.time(), **values}
            line = (json.dumps(row) + "\n").encode()
            with self._errors():
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"cannot write {str(self._path)!r}: {reason}") from None


class Trainer:
    """Runs a task from the engine's step to the end of the schedule.

    Args:
        recipe: schedule, loss weights and reporting.
        science: what a checkpoint is of: it is continued by the same values alone.
        engine: holds the task.
        source: this rank's micro-batches.
        folder: where checkpoints go.
        events: the run's event log.
        telemetry: the metrics port.
        stop: raised when the process is asked to stop.
    """

    def __init__(
        self,
        recipe: Recipe,
        science: Mapping[str, Any],
        engine: Engine,
        source: BatchSource,
        folder: Path,
        events: EventLog,
        telemetry: Telemetry,
        stop: StopSignal,
    ) -> None:
        self.recipe, self.engine, self.source, self.folder = recipe, engine, source, folder
        self.events, self.telemetry, self.stop = events, telemetry, stop
        self.science = science
        self.task: Task = engine.module
        self.schedule = Schedule.of(recipe, source.num_samples)
        self._committed_step = -1

    def run(self) -> bool:
        """Train; True when the schedule is done, False when stopped with a committed checkpoint."""
        total, begin = self.schedule.total, self.engine.steps_done
        batches, silent = self.source.batches(begin), self.engine.world.rank != 0
        self.telemetry.report(metrics.TRAIN_STEPS, total)
        try:
            with Progress("train", total, "step", initial=begin, silent=silent) as progress:
                while self.engine.steps_done < total:
                    row = self._step(batches)
                    progress.advance(note=f"loss {row['loss']:.4f}")
                    if row["stop"]:
                        break
                    if self.engine.steps_done % self.recipe.train.checkpoint_every == 0:
                        self._commit()
        finally:
            batches.close()  # type: ignore[attr-defined]
        self._commit()
        done = self.engine.steps_done >= total
        self.events.write("done" if done else "stop", self.engine.steps_done)
        return done

    def _step(self, batches: Any) -> Mapping[str, Any]:
        """One optimiser step; returns its row of the event log."""
        step, spec = self.engine.steps_done, self.recipe.train
        rate = learning_rate(step, self.schedule.total, self.schedule.warmup, spec)
        samples = self.source.num_samples
        moment = Moment(step, self.schedule.total, samples, spec.global_batch)
        begin, waited = time.monotonic(), 0.0
        results: list[Losses] = []
        for micro in range(self.engine.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            losses = self.engine.forward_backward(batch, moment)
            self.engine.step(rate, last_micro_batch=micro == self.engine.accumulation - 1)
            results.append(losses)
        self.task.after_step(moment)
        values, stop = self._reduce(results)
        row = self._row(values, rate, waited, time.monotonic() - begin - waited)
        if not math.isfinite(row["loss"]):
            raise ConfigError(
                f"the loss is {row['loss']} at step {step + 1}; try a lower train.lr "
                f"(now {spec.lr}) or train.precision=fp32"
            )
        self._report(row, stop)
        return {**row, "stop": stop}

    def _reduce(self, results: list[Losses]) -> tuple[dict[str, Any], bool]:
        """Means over micro-batches and ranks, and whether any rank was asked to stop."""
        names = sorted(results[0].diagnostics)
        shapes = [results[0].diagnostics[name].shape for name in names]
        rows = [
            torch.cat([r.terms, *(r.diagnostics[name].float().flatten() for name in names)])
            for r in results
        ]
        mean = torch.stack(rows).mean(dim=0)
        packed = torch.cat([mean, mean.new_tensor([float(bool(self.stop))])])
        packed = self.engine.reduce(packed).cpu()
        size = len(self.task.terms)
        sizes = [shape.numel() for shape in shapes]
        parts = packed[size:-1].split(sizes) if names else []
        values: dict[str, Any] = dict(zip(self.task.terms, packed[:size].tolist(), strict=True))
        for name, part, shape in zip(names, parts, shapes, strict=True):
            values[name] = part.view(shape).tolist()
        return values, bool(packed[-1] > 0)

    def _row(
        self, values: dict[str, Any], rate: float, waited: float, busy: float
    ) -> dict[str, Any]:
        if "routing" in values:
            values["router_probability"] = [line[i] for i, line in enumerate(values["routing"])]
        return {
            **values,
            "lr": rate,
            "data_s": waited,
            "step_s": busy,
            "images_per_s": self.recipe.train.global_batch / (waited + busy),
        }

    def _report(self, row: Mapping[str, Any], stop: bool) -> None:
        step, report = self.engine.steps_done, self.telemetry.report
        if step % self.recipe.train.log_every == 0 or step == self.schedule.total or stop:
            self.events.write("step", step, **row)
        report(metrics.TRAIN_STEP, step)
        report(metrics.TRAIN_LR, row["lr"])
        report(metrics.TRAIN_IMAGES, self.recipe.train.global_batch)
        report(metrics.TRAIN_SECONDS, row["data_s"], phase="data")
        report(metrics.TRAIN_SECONDS, row["step_s"], phase="step")
        for term in self.task.terms:
            report(metrics.TRAIN_LOSS, row[term], term=term)
        for pattern, value in zip(Pattern, row.get("router_probability", ()), strict=False):
            report(metrics.TRAIN_ROUTER, value, pattern=pattern.name.lower())

    def _commit(self) -> None:
        if self._committed_step == self.engine.steps_done:
            return
        begin = time.monotonic()
        state, error = self.engine.state(), None
        if self.engine.world.rank == 0:
            keep = self.recipe.train.keep_checkpoints
            try:
                checkpoint.commit(self.folder, state, self.science, keep)
            except StorageError as caught:
                error = caught
        # All ranks wait for the first one here, and learn whether it failed.
        failed = self.engine.reduce(torch.tensor([float(error is not None)]))
        if failed.item() > 0:
            raise error or StorageError("rank 0 could not write the checkpoint; it says why")
        self._committed_step = self.engine.steps_done
        seconds = time.monotonic() - begin
        self.events.write("checkpoint", self.engine.steps_done, seconds=seconds)
        self.telemetry.report(metrics.TRAIN_SECONDS, seconds, phase="checkpoint")
        self.telemetry.report(metrics.CHECKPOINT_TIME, time.time())

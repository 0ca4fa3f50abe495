"""The loop: one for every task. It knows batches, a model that returns its own loss, and a function that scores a
saved model; it knows no tokenizer's insides and no metric.

Whatever happens more rarely than once a step stands in `Trainer.run` before the step. A run killed anywhere and
started again goes on from its last checkpoint, and ends with the same bits and the same log as one that was not.
"""

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from seqmodels.models import Model, SequenceGenerator
from seqmodels.pretrained import RECIPE, save_pretrained
from seqmodels.state import State
from training import checkpoint
from training.average import averaged
from training.candidates import Candidates
from training.checkpoint import Progress
from training.config import Recipe
from training.data.batches import Batch, Batches
from training.data.examples import Codec
from training.directory import FINISHED, RUN
from training.initial import begin_as_kept, begin_from, new_model
from training.interrupts import interrupts_wait
from training.objective import Objective
from training.optim import (
    FULL,
    DivergedError,
    Precision,
    Update,
    build_optimizer,
    check_schedule,
    cycles_done,
    freeze,
    learning_rate,
    still_statistics,
    too_late,
    update,
)
from training.reporter import Reporter
from training.seen import copy_seen
from training.workers import ALONE, Workers

MAX_SKIPPED_IN_A_ROW = 5
# Of float16: where the scale of the loss begins, between what it moves, and after how many good steps it rises. The
# loss of an update is a sum over some thousand targets, so these are torch's own numbers over about as much.
FIRST_LOSS_SCALE, MIN_LOSS_SCALE, MAX_LOSS_SCALE, STEPS_OF_A_SCALE = 2.0**4, 2.0**-12, 2.0**12, 2000
Evaluate = Callable[[Path], dict[str, float]]  # the scores of a model directory on the validation split


class Trainer:
    """A run in progress. objective_of: what a step calls for its loss, given the model. metric: which of the scores
    decides what is best. workers: those that make the run together; the first of them validates and saves."""

    def __init__(
        self,
        recipe: Recipe,
        directory: Path,
        codec: Codec,
        batches: Batches,
        objective_of: Callable[[Model], Objective],
        evaluate: Evaluate,
        metric: str,
        reporter: Reporter,
        workers: Workers = ALONE,
    ) -> None:
        self.workers = workers
        self.recipe, self.directory, self.codec, self.batches = recipe, directory, codec, batches
        self.evaluate, self.metric, self.reporter = evaluate, metric, reporter
        self.steps_per_epoch = -(-len(batches) // recipe.run.gradient_accumulation_steps)
        self.total_steps = _total_steps(recipe, self.steps_per_epoch)
        check_schedule(recipe.optim, self.total_steps)
        for warning in too_late(recipe.optim, self.total_steps):
            reporter.say(warning)
        self.eval_steps = recipe.run.eval_steps or self.steps_per_epoch
        self.candidates = Candidates(directory, recipe.run, metric)
        found = workers.of_first(lambda: checkpoint.load_newest(directory / checkpoint.CHECKPOINTS))
        torch.manual_seed(recipe.run.seed)
        self.model = new_model(codec.config)
        if found is None and workers.is_first:
            if recipe.init_from is not None:
                begin_from(recipe.init_from, self.model, reporter.say)
            begin_as_kept(self.model, recipe, directory)
        self.model.to(recipe.run.device)
        if found is None:
            workers.copy_first(self.model.state_dict().values())
        freeze(self.model, recipe.optim.freeze)
        self.optimizer = build_optimizer(recipe.optim, self.model)
        self.objective = objective_of(self.model)
        self.moving = copy.deepcopy(self.model) if recipe.run.ema_decay else None  # the mean of its weights
        self.carried: State | None = None
        self.progress = Progress(loss_scale=FIRST_LOSS_SCALE if recipe.run.fp16 else 1.0)
        self.saved: tuple[int, int | None] = (0, None)  # the step of the last checkpoint, and what was validated then
        torch.manual_seed(workers.seed(recipe.run.seed))
        self._resume(found)
        self.started = time.monotonic() - self.progress.seconds
        reporter.watch(metric)

    def run(self) -> Path:
        """From wherever the run stands to its end; returns the directory of the model that it results in."""
        while True:
            over = self._is_over()
            if self._validation_is_due(over):
                self._validate_or_save()
                over = over or self._is_over()  # it may have been the last chance for a better score
            if self._snapshot_is_due() and self.workers.is_first:
                self._save_model(self._snapshot)
                for name in (RECIPE, RUN):  # to be evaluated like a run
                    shutil.copyfile(self.directory / name, self._snapshot / name)
                copy_seen(self.directory, self._snapshot)
                # Without it the same recipe would be trained there, over the snapshot.
                (self._snapshot / FINISHED).write_text(f'{{"step": {self.progress.step}}}\n', encoding="ascii")
                checkpoint.flush_tree(self._snapshot)
            if self._save_is_due():
                self._save()
            if over:
                return self.workers.of_first(self._result)
            with interrupts_wait(self.workers.size == 1) as interrupted:  # until the step is done, and can be saved
                done = self._step()
                if self.progress.step % self.recipe.run.logging_steps == 0:
                    self._log(done)
            if interrupted.is_set():
                self._save()
                self.reporter.say(f"saved at step {self.progress.step}")
                raise KeyboardInterrupt

    def _step(self) -> Update:
        """One update: forward and backward for each micro-batch, clip, step."""
        step, run = self.progress.step, self.recipe.run
        rate = learning_rate(self.recipe.optim, step, self.total_steps, self.progress.plateau_scale)
        self.model.train()
        still_statistics(self.model, self.recipe.optim.unfreeze_steps, step)
        if isinstance(self.model, SequenceGenerator):
            self.model.share_done = step / self.total_steps
        done = update(
            self.model,
            self._micro_batches(step),
            self.optimizer,
            self.recipe.optim,
            rate * self._rate_scale(step),
            self.carried,
            measure_ratio=(step + 1) % run.logging_steps == 0,
            step=step,
            precision=self._precision,
            workers=self.workers,
            objective=self.objective,
        )
        self.carried = done.state if self.batches.carries_state else None
        self.progress.step += 1
        self._count(done)
        if self.moving is not None and not done.skipped:
            self._move_average()
        self.reporter.step(self.progress.step, self.total_steps, done)
        return done

    def _micro_batches(self, step: int) -> Iterator[Batch]:
        """This worker's rows of the batches of one step: a pure function of (seed, epoch, step)."""
        epoch, indices = self._indices(step)
        for index in indices:
            batch = self.workers.share(self.batches.batch(epoch, index))
            if batch is None:
                continue
            if self.batches.carries_state and index > 0:
                batch["state"] = None  # `update` puts in where the last batch ended
            yield batch

    def _indices(self, step: int) -> tuple[int, range]:
        """The epoch of a step, and which of its batches the step takes."""
        accumulate = self.recipe.run.gradient_accumulation_steps
        epoch, first = divmod(step, self.steps_per_epoch)
        return epoch, range(first * accumulate, min((first + 1) * accumulate, len(self.batches)))

    def _rate_scale(self, step: int) -> float:
        epoch, indices = self._indices(step)
        return fmean(self.batches.rate_scale(epoch, index) for index in indices)

    @property
    def _precision(self) -> Precision:
        run = self.recipe.run
        if run.fp16:
            return Precision(torch.float16, self.progress.loss_scale)
        return Precision(torch.bfloat16) if run.bf16 else FULL

    def _move_loss_scale(self, skipped: bool) -> bool:
        """Half of it where a number overflowed, twice after long without. Returns whether the overflow was the
        scale's, so that the next step may go well."""
        progress = self.progress
        if skipped and progress.loss_scale > MIN_LOSS_SCALE:
            progress.loss_scale, progress.scaled_well = progress.loss_scale / 2, 0
            return True
        progress.scaled_well += not skipped
        if progress.scaled_well == STEPS_OF_A_SCALE:
            progress.loss_scale, progress.scaled_well = min(2 * progress.loss_scale, MAX_LOSS_SCALE), 0
        return False

    def _count(self, done: Update) -> None:
        progress = self.progress
        scale_was_too_large = self.recipe.run.fp16 and self._move_loss_scale(done.skipped)
        if done.skipped:
            progress.skipped += not scale_was_too_large
            progress.skipped_in_a_row += not scale_was_too_large
            if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise DivergedError(
                    f"loss or gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row, at step "
                    f"{progress.step}; lower optim.learning_rate or optim.max_grad_norm, in a new run.output_dir"
                )
            return
        progress.skipped_in_a_row = 0
        progress.updates += 1
        progress.loss += done.loss
        progress.nll += done.nll
        progress.num_targets += done.num_targets
        progress.clipped += done.clipped

    def _log(self, last: Update) -> None:
        """A line of what happened since the last one. Nothing of the clock goes in here."""
        progress = self.progress
        line: dict[str, float | int | None] = {
            "step": progress.step,
            "epoch": round(progress.step / self.steps_per_epoch, 4),
            "learning_rate": learning_rate(
                self.recipe.optim, progress.step - 1, self.total_steps, progress.plateau_scale
            ),
            "skipped": progress.skipped,
        }
        if progress.updates:
            line["loss"] = progress.loss / progress.num_targets
            line["nll"] = progress.nll / progress.num_targets
            line["clipped_share"] = progress.clipped / progress.updates
        if not last.skipped:
            line["gradient_norm"], line["update_to_weight_ratio"] = last.norm, last.ratio
        progress.loss = progress.nll = 0.0
        progress.num_targets = progress.updates = progress.clipped = 0
        progress.log_bytes = self.reporter.log(line)

    def _move_average(self) -> None:
        """Exponential moving average; shorter at first, so that it soon forgets the initial weights."""
        assert self.moving is not None and self.recipe.run.ema_decay is not None
        count = self.progress.averaged
        decay = min(self.recipe.run.ema_decay, (1 + count) / (10 + count))
        with torch.no_grad():
            for mean, now in zip(self.moving.state_dict().values(), self.model.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(now, 1 - decay)
                else:
                    mean.copy_(now)
        self.progress.averaged += 1

    # Once in a while

    def _validation_is_due(self, over: bool) -> bool:
        """At step 0 too where a trained model goes on by its metric: it may have been better before."""
        step = self.progress.step
        begun = step > 0 or self.recipe.run.self_critical is not None
        return begun and self.progress.validated_step != step and (over or step % self.eval_steps == 0)

    def _save_is_due(self) -> bool:
        step = self.progress.step
        due = step % self.recipe.run.save_steps == 0 or self.progress.validated_step == step
        return step > 0 and self.saved != (step, self.progress.validated_step) and due

    def _snapshot_is_due(self) -> bool:
        """At the end of each cycle of the rate."""
        step, optim = self.progress.step, self.recipe.optim
        if not self.recipe.run.keep_snapshots or step == 0:
            return False
        return cycles_done(optim, step, self.total_steps) > cycles_done(optim, step - 1, self.total_steps)

    @property
    def _snapshot(self) -> Path:
        cycle = cycles_done(self.recipe.optim, self.progress.step, self.total_steps)
        return self.directory / "snapshots" / f"cycle-{cycle}"

    def _is_over(self) -> bool:
        progress, run = self.progress, self.recipe.run
        patience = run.early_stopping_patience
        minutes = self.workers.of_first(self._seconds) / 60 if run.max_minutes is not None else 0.0
        return (
            progress.step >= self.total_steps
            or (patience is not None and progress.validations_without_better >= patience)
            or (run.max_minutes is not None and progress.step > 0 and minutes >= run.max_minutes)
        )

    def _validate_or_save(self) -> None:
        """Validation may take long, so a Ctrl-C ends it at once; what was trained before it is saved."""
        try:
            self.progress = self.workers.of_first(self._validate)
        except KeyboardInterrupt:
            if self.workers.size == 1 and self.progress.step > self.saved[0]:
                self._save()
            raise

    def _validate(self) -> Progress:
        """Score the model as it would be served; keep it if it is the best so far. Returns where the run now stands,
        and changes nothing before."""
        progress, optim = copy.deepcopy(self.progress), self.recipe.optim
        candidate = self.candidates.place(progress.step)
        self._save_model(candidate)
        scores = self._scores(candidate)
        checkpoint.flush_tree(candidate)  # before a checkpoint that names it
        progress.validated_step = progress.step
        better = self.candidates.take(progress, scores)
        if better:
            progress.validations_without_better = progress.plateau_wait = 0
        else:
            progress.validations_without_better += 1
            progress.plateau_wait += 1
            if optim.lr_scheduler_type == "plateau" and progress.plateau_wait >= optim.plateau_patience:
                progress.plateau_scale *= optim.plateau_factor
                progress.plateau_wait = 0
        progress.log_bytes = self.reporter.log({"step": progress.step, "validation": scores, "best": better})
        return progress

    def _scores(self, candidate: Path) -> dict[str, float]:
        """Validation must not move the random numbers of training, or its frequency would change the result."""
        with torch.random.fork_rng(devices=[0] if self.recipe.run.device == "cuda" else []):
            return self.evaluate(candidate)

    def _result(self) -> Path:
        """The best model of all, or the mean of those kept for one, whichever scores better."""
        best, members = self.candidates.best(self.progress), self.candidates.to_average(self.progress)
        if len(members) < 2:
            if self.recipe.run.average_best or self.recipe.run.average_last:
                self.reporter.say("one model alone was validated, so there is no mean of several; lower run.eval_steps")
            return best
        mean = self.candidates.mean
        averaged(members).save(mean)
        scores = self._scores(mean)
        better = self.candidates.is_better(self.progress, scores)
        steps = sorted(step for _, step in self.progress.kept)
        self.reporter.log({"step": self.progress.step, "average_of": steps, "validation": scores, "best": better})
        return mean if better else best

    def _save_model(self, directory: Path) -> None:
        save_pretrained(
            self.moving or self.model,
            directory,
            source_tokenizer=self.codec.source_tokenizer,
            target_tokenizer=self.codec.target_tokenizer,
            preprocessor=self.codec.preprocessor,
            generation=self.recipe.generation if self.recipe.makes_text else None,
        )

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    # Stopping and going on

    def _save(self) -> None:
        tensors = self._tensors()
        self.saved = (self.progress.step, self.progress.validated_step)
        if not self.workers.is_first:
            return
        self.progress.seconds = self._seconds()
        self.reporter.flush()
        checkpoint.save(self.directory / checkpoint.CHECKPOINTS, self.progress, tensors)
        self.candidates.clear(checkpoint.read_progress(self.directory / checkpoint.CHECKPOINTS))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.moving is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.moving.state_dict().items()}
        own = checkpoint.pack_random_states()
        if self.carried is not None:
            own["carried"] = self.carried.values.cpu()
        for rank, theirs in enumerate(self.workers.gather(own)):
            tensors |= {_owned(name, rank): tensor for name, tensor in theirs.items()}
        return tensors | checkpoint.pack_optimizer(self.optimizer)

    def _resume(self, found: checkpoint.Found | None) -> None:
        """Go on from the newest whole checkpoint, if there is one; else rewind the log to its beginning."""
        if found is not None:
            self.progress, tensors, warnings = found
            self.saved = (self.progress.step, self.progress.validated_step)
            for warning in warnings:
                self.reporter.say(warning)
            if self.workers.is_first:
                checkpoint.forget_later(self.directory / checkpoint.CHECKPOINTS, self.progress)
            self.model.load_state_dict(_part(tensors, "model."))
            if self.moving is not None:
                self.moving.load_state_dict(_part(tensors, "average."))
            checkpoint.unpack_optimizer(self.optimizer, tensors)
            own = _part(tensors, _owned("", self.workers.rank))
            if "carried" in own:
                self.carried = State(own["carried"].to(self.recipe.run.device))
            checkpoint.unpack_random_states(own)
            self.reporter.say(f"going on from step {self.progress.step}")
        self.reporter.rewind(self.progress.log_bytes, self.progress.step)


def _total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    run = recipe.run
    by_epochs = run.num_train_epochs * steps_per_epoch if run.num_train_epochs else None
    return min(limit for limit in (by_epochs, run.max_steps) if limit is not None)


def _owned(name: str, rank: int) -> str:
    """What a checkpoint calls a tensor that each worker has one of."""
    return f"worker-{rank}.{name}" if rank else name


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

"""What happens around the steps: whole checkpoints, signals, early stopping, a progress bar."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import SaveStrategy

from stance.checkpoint import MANIFEST, checkpoint_step, write_manifest
from stance.errors import TrainingError
from stance.model import MultiTaskLoss
from stance.processes import Processes

__all__ = ["Guard", "Progress", "out_of_patience", "signals"]


class Guard(TrainerCallback):
    """Makes checkpoints whole, keeps the right ones, and stops on signals and non-finite numbers.

    Whatever ends the run ends it in all processes at the same step.
    """

    def __init__(self, folder: Path, loss: MultiTaskLoss, processes: Processes):
        self.folder, self.loss, self.processes = folder, loss, processes
        self.received = 0
        """The signal that came to this process; 0: none."""
        self.stopping = 0
        """The signal that all processes stop by; 0: none."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stopping = self.processes.largest(self.received)
        if self.stopping:
            control.should_training_stop = True
            # Where an epoch ends with this step it is evaluated first, then saved; else that evaluation could be lost.
            if args.save_strategy != SaveStrategy.EPOCH or state.epoch != round(state.epoch):
                control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # After a stop in mid-epoch the Trainer ends the epoch early: no evaluation belongs there.
        if self.stopping and state.epoch != round(state.epoch):
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._check_loss(state)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called when the Trainer has written a checkpoint: check it, then declare it whole."""
        self._check_loss(state)  # agreed on: by now every process has written its own part
        bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
        if self.processes.any(bool(bad)):
            raise TrainingError(
                f"step {state.global_step}: weights are not finite, first {(bad or ['on another process'])[0]} - "
                "the last good checkpoint is kept; lower training.learning_rate"
            )
        self.processes.by_main(lambda: self._declare_whole(state))

    def _declare_whole(self, state: Any) -> None:
        path = self.folder / f"checkpoint-{state.global_step}"
        (path / "training_args.bin").unlink(missing_ok=True)
        write_manifest(path)
        # Later ones were passed over as damaged when the run was resumed: none of them may outlive this one.
        whole = [path.parent for path in self.folder.glob(f"checkpoint-*/{MANIFEST}")]
        steps = map(checkpoint_step, whole)
        keep = {state.best_global_step, *sorted(s for s in steps if s <= state.global_step)[-2:]}
        for other in self.folder.glob("checkpoint-*"):
            if checkpoint_step(other) not in keep:
                (other / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint is none
                shutil.rmtree(other)

    def _check_loss(self, state: Any) -> None:
        if self.processes.any(self.loss.finite is not None and not bool(self.loss.finite)):
            raise TrainingError(
                f"step {state.global_step}: the loss is not finite (NaN or Inf) - the last good "
                "checkpoint is kept; lower training.learning_rate or use training.precision: fp32"
            )


def out_of_patience(state: TrainerState, patience: int | None) -> bool:
    """Whether early stopping ends a run in this state: so many evaluations brought nothing better."""
    best = state.best_global_step or 0
    since = sum(1 for entry in state.log_history if "eval_loss" in entry and entry["step"] > best)
    return patience is not None and since >= patience


@contextmanager
def signals(guard: Guard) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end training after the step at hand; a second Ctrl-C ends it at once.

    A second SIGTERM does not: many launchers send one to every process, and pass on the one that they get.
    A process that fails beside others is sent SIGTERM by the launcher: it is ending already, and tells why.
    """

    def receive(number: int, _: Any) -> None:
        if guard.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        guard.received = guard.received or number

    try:
        old = {n: signal.signal(n, receive) for n in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals are someone else's
        yield
        return
    try:
        yield
    except BaseException:
        if guard.processes.number > 1:
            old[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Progress(TrainerCallback):
    """A progress bar of the steps on standard error, with the newest loss and validation figure."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", desc="train",
            file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if self.bar is not None and metrics:
            name = args.metric_for_best_model
            value = metrics.get(f"eval_{name}")
            if value is not None:
                tqdm.write(
                    f"epoch {state.epoch:5.2f}  loss {metrics['eval_loss']:.4f}  {name} {value:.4f}",
                    file=sys.stderr,
                )

    def close(self) -> None:
        """End the bar's line, also when training failed: a message must begin on its own."""
        if self.bar is not None:
            self.bar.close()

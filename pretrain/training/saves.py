"""When a run is saved, and when its older checkpoints are removed."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.errors import PretrainError
from pretrain.order.phases import tokens_after
from pretrain.training import checkpoint
from pretrain.training.checkpoint import TrainState
from pretrain.training.saving import Saved
from pretrain.training.watch.log import StepReport, say
from pretrain.training.watch.metrics import Metrics
from pretrain.training.watch.observer import Findings

if TYPE_CHECKING:
    from pretrain.training.trainer import Job

RUINED_IN_A_ROW = 20  # after this many steps in a row without a finite loss and gradient a run gives up


class Saves:
    """Decides which steps are saved, and when older checkpoints are removed.

    A step is saved only if its loss and gradient were finite. A step that is far too long ruins the weights and is
    itself finite; only the next step shows it. So a checkpoint is proven when a finite step or evaluation has followed
    it. Older checkpoints are removed only when it is proven and complete, whatever `keep` says.
    """

    def __init__(self, job: "Job", state: TrainState, metrics: Metrics | None):
        self.step = state.step  # the step that was saved last; its checkpoint may still be in the making
        self.wanted = False  # whether a checkpoint is due, and waits for a finite step
        self.ruined = 0  # the number of last steps in a row without a finite loss and gradient
        self._job, self._writer, self._metrics = job, job.writer, metrics
        self._proven = self._pruned = state.step == 0
        self._at = time.monotonic()  # when the last save began

    def wishes(self) -> list[bool]:
        """The flags of this rank for `advance`; they are summed over the ranks after each step.

        Whether the time between checkpoints is over, by the clock of rank 0; whether the thread of this rank is still
        writing; and whether it has failed. The clock starts no save while another checkpoint is in the making.
        """
        every_s = self._job.intervals.checkpoint_s
        overdue = self._job.world.speaks and every_s > 0 and time.monotonic() - self._at >= every_s
        return [overdue and not self._writer.saving, self._writer.busy, self._writer.failed]

    def advance(self, busy: float, failed: float) -> None:
        """Go on with the checkpoint in the making, if all ranks can; a collective then.

        Raises ResumeError on every rank if a rank could not write.
        """
        if self._writer.saving and (failed or not busy):
            self._note_saved(self._writer.advance(failed=bool(failed)))

    def note(self, report: StepReport) -> None:
        """Take note of a step. Raises PretrainError after too many steps in a row that were not finite."""
        self._writer.reserve()
        if report.finite:
            self.ruined = 0
            self._proven = True
            self._prune()
            return
        self.ruined += 1
        if self.ruined == RUINED_IN_A_ROW:
            self.finish()
            first = report.step - self.ruined + 1
            what = f"no finite loss and gradient in {self.ruined} steps in a row, {first} to {report.step}"
            raise PretrainError("\n  ".join((what, *self._remedy())))

    def save(self, state: TrainState) -> None:
        """Begin to write a checkpoint; a collective. If another is still being written, the training waits for it."""
        job, metrics = self._job, self._metrics
        if self._writer.saving:
            began, last = time.monotonic(), self.step
            self.finish()
            waited = time.monotonic() - began
            if job.world.speaks:
                say(f"step {state.step} waited {waited:.1f} s to be saved, until step {last} was written")
        with job.peers.one_fate():
            job.batches.data.check_unchanged()
        self._at = time.monotonic()
        identity = job.identity_at(state.step) if job.world.speaks else {}
        self._writer.begin(state, identity, metrics.sync if metrics else None)
        self.step, self.wanted, self._proven, self._pruned = state.step, False, False, False

    def finish(self) -> None:
        """Wait until the checkpoint in the making is complete, if there is one; a collective."""
        self._note_saved(self._writer.finish())

    def end(self, state: TrainState, found: Sequence[Findings]) -> None:
        """Take note of the findings after the last step: they prove the weights, or show that they are ruined.

        If the last step was skipped, the weights did not change, and they are saved now that they are proven.
        """
        if faults := [findings.ruined for findings in found if findings.ruined]:
            raise PretrainError("\n  ".join((faults[0], *self._remedy())))
        if self.step < state.step:
            self.save(state)
            self.finish()
        self._proven = True
        self._prune()

    def said(self, state: TrainState) -> str:
        """A text that says whether the step at which a run stops is saved."""
        if self.step == state.step:
            return "saved"
        return f"not saved, {self.ruined} steps in a row had no finite loss and gradient; {self._remedy()[0]}"

    def _note_saved(self, saved: Saved | None) -> None:
        if saved is None:
            return
        times = f"the training waited {saved.stall_s:.2f} s, writing took {saved.write_s:.1f} s"
        if self._job.world.speaks:
            say(f"saved step {saved.step}: {times}")
        if self._metrics:
            values = {"speed/save_stall_s": saved.stall_s, "speed/save_write_s": saved.write_s}
            self._metrics.scalars(values, saved.step, tokens_after(saved.step, self._job.phases))
        self._prune()

    def _prune(self) -> None:
        """Remove older checkpoints if the newest one is proven and complete."""
        if self._proven and not self._pruned and not self._writer.saving:
            self._writer.prune(self._job.intervals.keep, self._job.intervals.keep_every)
            self._pruned = True

    def _remedy(self) -> list[str]:
        """Sentences that say which checkpoint to continue from when steps are no longer finite."""
        newest = checkpoint.newest(self._job.folder, speak=False)
        if newest is None:
            return ["no checkpoint was saved before: begin again with a smaller optim.lr and another out="]
        if self._proven:
            again = "if the same steps fail again, begin a new run there: branch_from with skip_steps, or a smaller lr"
            return [f"the newest checkpoint, {newest}, is from before: start again to continue from it", again]
        older = checkpoint.newest(self._job.folder, speak=False, before=self.step)
        doubt = f"the newest checkpoint is {newest}; no finite step has followed it, so its weights may be ruined"
        return [doubt, f"if so, remove it to continue from {older}" if older else "there is no older one"]

"""Whether a run is healthy: steps without a finite gradient, and a loss that rises and stays."""

import math
import statistics
from dataclasses import dataclass, field

import torch

from engine.layers import Layers
from engine.parallel import shard_like
from engine.process import UserError, user_error

CHECKED = 10  # steps between two looks at what the device has noted, each of which waits for it
WINDOW = 50  # losses whose median is watched: more than half of them must be high
RISE = 0.3  # nats above its lowest that this median must reach


class BadSteps:
    """Counts steps in a row whose gradient was not finite, on the device, without a sync.

    In float16 a gradient overflows now and then while the scaler looks for the largest scale that
    does not. That is normal as long as the loss is finite and the scale has room to fall, above 1,
    and is not counted. In other types the scale is 1: each gradient that is not finite counts.
    """

    def __init__(self, limit, runtime):
        self.limit, self.runtime = limit, runtime
        self.in_a_row = torch.zeros((), device=runtime.device)
        self.most = torch.zeros((), device=runtime.device)  # ever seen in a row

    def add(self, loss, grad_norm, scaler):
        """Take note of a step's loss and gradient norm, tensors on the device."""
        scale = scaler.scale(torch.ones_like(loss))
        overflow_is_normal = loss.isfinite() & (scale > 1)
        fine = grad_norm.isfinite() | overflow_is_normal
        self.in_a_row = torch.where(fine, 0, self.in_a_row + 1)
        self.most = torch.maximum(self.most, self.in_a_row)
        self.loss, self.grad_norm = loss, grad_norm

    def check(self, step, keeper):
        """Raise UserError after `limit` of them. Every rank must call it."""
        if self.runtime.reduce("max", self.most.item()) >= self.limit:  # syncs the device
            raise UserError(
                f"{self.limit} steps in a row had no finite gradient, seen at step {step}: "
                f"loss {self.loss.item():.4f}, gradient norm {self.grad_norm.item():.4f}; "
                f"{keeper.what_is_kept()}; lower --learning_rate"
            )


@dataclass
class LossWatch:
    """Notices a loss that rises and stays up, though each is finite; a bad batch or two do not.

    A rise is one of the median of WINDOW losses, by RISE nats and by ten standard errors of a mean
    above the lowest that it ever was. What is known stands in plain fields, which a checkpoint
    keeps, so that a resumed run decides as one that never stopped.
    """

    recent: list[float] = field(default_factory=list)  # losses
    median: float = math.inf  # of them
    lowest: float = math.inf  # of these medians
    margin: float = math.inf  # a rise is higher above it than this
    calm_step: int = 0  # the last whose median was near the lowest
    began: int | None = None  # the step at which the loss began to rise, if it is up
    is_told: bool = False
    rollbacks: int = 0  # made
    skipped: int = 0  # batches, by rollbacks

    def __post_init__(self):
        self.waiting = {}  # step -> loss, on the device
        if not all(isinstance(n, int) for n in (self.calm_step, self.rollbacks, self.skipped)):
            raise ValueError("its counts are no whole numbers")

    def examine(self, runtime):
        """Take in the losses that wait; return all that is known. Every rank must call it."""
        if self.waiting:
            sums = runtime.reduce("sum", torch.stack(list(self.waiting.values())).tolist())
            for step, total in zip(self.waiting, sums, strict=True):
                self.add(step, total / runtime.world_size)
            self.waiting = {}
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def add(self, step, loss):
        self.recent = [*self.recent, loss][-WINDOW:]
        if len(self.recent) < WINDOW or not math.isfinite(sum(self.recent)):
            return
        self.median = statistics.median(self.recent)
        if self.median < self.lowest:
            self.lowest = self.median
            noise = statistics.stdev(self.recent) / math.sqrt(WINDOW)
            self.margin = max(RISE, 10 * noise)
        if self.median < self.lowest + self.margin / 4:
            self.calm_step, self.began, self.is_told = step, None, False
        elif self.median > self.lowest + self.margin and self.began is None:
            first = step + 1 - WINDOW
            self.began = min(self.calm_step + 1, first + place_of_rise(self.recent))

    def rise(self):
        """Return a phrase on the rise of the loss, "" where there is none."""
        if self.began is None:
            return ""
        return f"from step {self.began} the loss rose, {self.lowest:.4f} to {self.median:.4f}"


def read_watch(saved):
    """Return the LossWatch of a checkpoint, a new one where it has none."""
    with user_error("the checkpoint's watch over the loss", TypeError, ValueError):
        return LossWatch(**saved.get("watch", {}))


def steps_of(saved):
    """Return (batches that rollbacks skipped, steps) of a checkpoint: the later, the larger."""
    return read_watch(saved).skipped, saved["iter_num"]


def place_of_rise(losses):
    """Return where `losses` are best cut in two: each part then differs least from its mean."""

    def spread(part):
        return len(part) * statistics.pvariance(part)

    return min(range(1, len(losses)), key=lambda cut: spread(losses[:cut]) + spread(losses[cut:]))


class Health:
    """Watches a run step by step, ends one that is broken, and can undo a rise of the loss."""

    def __init__(self, state, config, runtime):
        self.state, self.config, self.runtime = state, config, runtime
        self.bad_steps = BadSteps(config["max_bad_steps"], runtime)
        self.layers = Layers(state, config, runtime)

    def add(self, step, loss, grad_norm, log):
        """Take note of a step's loss and gradient norm, tensors on the device."""
        self.bad_steps.add(loss, grad_norm, self.state.scaler)
        self.state.watch.waiting[step] = loss
        self.layers.add(step, grad_norm, log)

    def check(self, step, keeper, log):
        """Return the step to go on from: `step`, or that of the best model, to undo a rise.

        It looks at every CHECKED-th step, and syncs the device. Every rank must call it. Raises
        UserError after too many bad steps in a row, or once the loss has risen more than
        `rollbacks` times.
        """
        if step % CHECKED and step < self.config["max_iters"]:
            return step
        self.bad_steps.check(step, keeper)
        watch, most = self.state.watch, self.config["rollbacks"]
        watch.examine(self.runtime)
        rise = watch.rise()  # in words
        if not rise:
            return step
        if not most or keeper.best_val_loss == math.inf:
            advice = "no state is kept to go back to" if most else "--rollbacks=3 would undo it"
            if not watch.is_told:
                self.runtime.say(f"step {step}: {rise}; {advice}")
            watch.is_told = True
            return step
        if watch.rollbacks >= most:
            raise UserError(
                f"step {step}: {rise}, after {most} rollbacks; {keeper.what_is_kept()}; "
                f"lower --learning_rate"
            )
        self.roll_back(step, keeper)
        back, watch = self.state.step, self.state.watch
        why = f"rollback {watch.rollbacks} of {most}, to step {back} and other batches"
        self.runtime.say(f"step {step}: {rise}; {why}")
        log.go_back(back, {"rolled_back_from": step, "skipped": watch.skipped})
        self.layers.expect(back)
        return back

    def roll_back(self, step, keeper):
        """Turn the state, that of `step`, into the best one, with the batches since then skipped.

        It is saved as the newest, so that a run that is killed now goes on from it.
        """
        state, best = self.state, keeper.read_best()
        with torch.no_grad():
            for name, weight in state.model.state_dict().items():
                saved = best["model"][name][: len(weight)]  # positions may be cropped since
                weight.copy_(shard_like(weight, saved.to(weight.device)))
        undone, wandb_id = state.watch, state.wandb_id
        same_data = {**self.config, "new_data": True}  # the run's, which the best's may not be
        state.restore(best, same_data, self.runtime)
        state.watch.skipped = undone.skipped + step - state.step
        state.watch.rollbacks = undone.rollbacks + 1
        state.wandb_id, keeper.is_behind = wandb_id, True
        keeper.save(state, state.step, {})

"""Each layer of a model in training, from the inside.

A layer whose gradient vanishes learns nothing, one whose update is a large part of its weights is
thrown about, and attention whose scores are in the hundreds looks at one token only.
"""

import math

import torch

from engine.parallel import unshard


class Layers:
    """At every health_interval-th step, takes the norms of gradients, weights and updates.

    It holds a copy of the weights then. All ranks must do so, for weights may be sharded. An
    interval of 0 is never, and costs nothing.
    """

    def __init__(self, state, config, runtime):
        self.model = state.model
        self.interval = interval = config["health_interval"]
        self.grad_clip = config["grad_clip"] or math.inf
        self.expect(state.step)
        self.steps = self.clipped = 0  # since the last measured one
        self.old, self.figures = {}, {}  # weights before the update; name/layer -> tensor
        if not interval:
            return
        model, optimizer = state.model, state.optimizer
        # Muon's step calls AdamW's: both hooks may run twice, and then the last time counts.
        optimizer.register_step_pre_hook(self.before_update)
        optimizer.register_step_post_hook(self.after_update)
        if runtime.compile:  # a compiled graph runs no Python in between
            runtime.say("health: no attention scores where the model is compiled")
        else:
            for name, module in model.named_modules():
                if hasattr(module, "attend"):
                    module.attend = self.watched(module.attend, layer_of(name))

    def watched(self, attend, layer):
        """Return `attend`, which from now on notes the largest score of a measured step.

        It is that of the first sequence of each micro-batch, for all of them would cost as much as
        attention, and before ALiBi takes from it.
        """

        def attend_and_note(q, k, v, **options):
            if self.due and torch.is_grad_enabled():
                scores = q[:1].detach() @ k[:1].detach().mT / math.sqrt(q.size(-1))  # (1, H, T, T)
                future = torch.ones_like(scores, dtype=torch.bool).triu(1)
                name = f"attention_score/{layer}"
                seen = self.figures.get(name, scores.new_tensor(-math.inf))
                self.figures[name] = torch.maximum(seen, scores[~future].max())
            return attend(q, k, v, **options)

        return attend_and_note

    def before_update(self, *_):
        if self.due:
            self.old = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            self.note("grad_norm", ((n, p.grad) for n, p in self.model.named_parameters()))
            self.note("weight_norm", self.old.items())

    def after_update(self, *_):
        if self.due:
            now = self.model.named_parameters()
            self.note("update_norm", ((n, p.detach() - self.old[n]) for n, p in now))  # one by one

    @torch.no_grad()
    def note(self, figure, tensors):
        """Note the norm over each layer of `tensors`, pairs of a parameter's name and a tensor."""
        layers = {}
        for name, tensor in tensors:
            if tensor is not None:
                norm = unshard(torch.linalg.vector_norm(tensor))
                layers.setdefault(layer_of(name), []).append(norm)
        for layer, norms in layers.items():
            self.figures[f"{figure}/{layer}"] = torch.stack(norms).norm()

    def add(self, step, grad_norm, log):
        """Take note that `step` was made; if it was measured, write the figures to `log`."""
        if not self.interval:
            return
        self.steps += 1
        self.clipped += grad_norm > self.grad_clip
        if self.due:
            self.write(step, log)
        self.expect(step + 1)

    def expect(self, step):
        """Take note that `step` is the next."""
        self.due = bool(self.interval) and step % self.interval == 0

    def write(self, step, log):
        """Record the figures: gradients as clipped, updates as shares of the weights. Syncs."""
        figures = {name: value.item() for name, value in self.figures.items()}
        for name in [name for name in figures if name.startswith("update_norm/")]:
            layer = name.partition("/")[2]
            figures[f"update_ratio/{layer}"] = figures.pop(name) / figures[f"weight_norm/{layer}"]
        log.record({"iter": step, "clipped": float(self.clipped) / self.steps, **figures})
        self.old, self.figures, self.steps, self.clipped = {}, {}, 0, 0


def layer_of(name):
    """Return the layer that a module or parameter belongs to: h.3, wte, ln_f, lm_head."""
    parts = name.removeprefix("transformer.").split(".")
    return ".".join(parts[:2]) if parts[0] == "h" else parts[0]

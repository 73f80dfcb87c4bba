"""A GPT for EleutherAI's lm-evaluation-harness, which has the tasks that models are compared by.

tools/evaluate.py uses it for --tasks. It answers as the harness's own HFLM does for the exported
folder: the same tokens, cut at the same places, and padding ids never considered. The YAML file of
a task may run code: take the harness's, or your own.
"""

import logging
import math

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from engine.process import UserError, reason


def run_tasks(model, tokenizer, runtime, names, batch_size, examples):
    """Return the figures of the model on the tasks `names`, {"task figure": value}.

    A name is one of the harness's, or a YAML file that describes a task. At most `examples` of each
    task count, if that is not 0. UserError where a task is unknown or its data cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = all(name.endswith((".yaml", ".yml")) for name in names)  # spares a search of 8 seconds
    try:
        manager = TaskManager(include_defaults=not own)
        manager.load(names)  # once before the rest, for its errors
    except Exception as fault:  # of the task's files, its data or the network
        raise UserError(f"tasks={','.join(names)}: {reason(fault)}") from None
    judged = HarnessModel(model, tokenizer, runtime, batch_size)
    results = simple_evaluate(
        judged, tasks=names, task_manager=manager, limit=examples or None, log_samples=False
    )["results"]
    if judged.cut:
        print(f"{judged.cut} questions were longer than block_size, and lost their beginning")
    return {
        f"{task} {figure.removesuffix(',none')}": value
        for task, found in results.items()
        for figure, value in found.items()
        if isinstance(value, float | int)
    }


class HarnessModel(TemplateLM):
    """What the harness asks of a model: how likely a text is after another, and what comes next."""

    def __init__(self, model, tokenizer, runtime, batch_size):
        super().__init__()
        self.model, self.encoding, self.runtime = model, tokenizer, runtime
        self.batch_size, self.length = batch_size, model.config.block_size
        self.cut = 0  # questions that were longer than the model reads

    @property
    def eot_token_id(self):
        return self.encoding.opening  # a text begins with it: end-of-text, or a line break

    def tok_encode(self, string, add_special_tokens=None, **options):
        return self.encoding.encode(string)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **options):
        """Return for each (_, context, continuation) its log-probability, and if it is the greedy.

        The two are ids; what does not fit is cut off on the left.
        """
        rows = []
        for _, context, continuation in requests:
            self.check_fits(len(continuation), self.length)
            row = (context or [self.prefix_token_id]) + continuation
            self.cut += len(row) > self.length + 1
            rows.append(row[-self.length - 1 :])
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        answers = {}
        batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        for batch in tqdm(batches, unit=" batches", leave=False, disable=disable_tqdm or None):
            ids = [torch.tensor(rows[index]) for index in batch]
            padded = pad_sequence(ids, batch_first=True).to(self.runtime.device)
            with self.runtime.autocast():
                hidden = self.model.hidden(padded[:, :-1])  # later tokens change nothing
                for index, row, x in zip(batch, ids, hidden, strict=True):
                    begin = len(row) - len(requests[index][2])
                    logits = self.model.lm_head(x[begin - 1 : len(row) - 1])
                    answers[index] = self.judge(logits, row[begin:].to(logits.device))
        return [answers[index] for index in range(len(rows))]

    def judge(self, logits, targets):
        """Return the log-probability of `targets` (T), and whether each was the likeliest."""
        logits = logits[:, : self.encoding.vocab_size].float()
        total = logits.log_softmax(1).gather(1, targets[:, None]).sum().item()
        if not math.isfinite(total):
            raise UserError("the logits are not finite; try another checkpoint")
        return total, bool((logits.argmax(1) == targets).all())

    def check_fits(self, count, most):
        """Raise UserError where an answer of `count` tokens is longer than `most`."""
        if count > most:
            raise UserError(f"a task has an answer of {count} tokens, the model takes {most}")

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Return the log-probability of each whole text, in windows that predict each token once.

        The first begins with the opening token, each further one with the last token before it.
        """
        pieces, counts = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = list(get_rolling_token_windows(ids, self.prefix_token_id, self.length, 1))
            pieces += [(None, *make_disjoint_window(window)) for window in windows]
            counts.append(len(windows))
        answers = iter(self._loglikelihood_tokens(pieces, disable_tqdm))
        return [math.fsum(next(answers)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests, disable_tqdm=False):
        """Return what the model writes after each context, up to one of the endings asked for."""
        texts = []
        for request in tqdm(requests, unit=" texts", leave=False, disable=disable_tqdm or None):
            context, options = request.args
            texts.append(self.write(context, normalize_gen_kwargs(options, 256)))
        return texts

    def write(self, context, options):
        """Return what the model writes after one context; `options` as the harness names them."""
        most, endings = options["max_gen_toks"], options["until"]
        self.check_fits(most, self.length - 1)
        temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(ids) > self.length - most
        ids = ids[most - self.length :]  # room for the answer
        idx, written = torch.tensor([ids], device=self.runtime.device), bytearray()
        with self.runtime.autocast():
            for drawn in self.model.stream(
                idx, most, temperature, options.get("top_k"), options.get("top_p"),
                vocab_size=self.encoding.vocab_size,
            ):  # fmt: skip
                if drawn.item() == self.encoding.eot:
                    break
                written += self.encoding.decode_bytes(drawn[0].tolist())
                if any(ending.encode() in written for ending in endings):
                    break
        text = written.decode("utf-8", "replace")
        for ending in endings:
            text = text.partition(ending)[0] if ending else text
        return text

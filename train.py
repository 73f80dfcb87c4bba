"""Train a GPT, on one CPU, one GPU, or many.

    python train.py config/train_shakespeare_char.py
    python train.py --init_from=resume --out_dir=out-shakespeare-char
    torchrun --nproc_per_node=8 train.py config/train_gpt2.py

Every loss is a mean cross-entropy in nats per token.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before PyTorch loads OpenMP: docs/speed.md
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic=True

import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import configure
from data.batches import Batches, sequences_at, tokens_until
from data.tokens import check_vocabulary, open_dataset
from engine.checkpoint import RunFolder, State, take_over
from engine.huggingface import load_pretrained
from engine.log import Log
from engine.process import UserError, noted_signals, one_line_errors, user_error
from engine.runtime import place_model, start_runtime, unshard
from model import GPT, GPTConfig

# --- settings ------------------------------------------------------------------------------------

# Output
out_dir = "out"                     # folder for checkpoints and log.jsonl
eval_interval = 2000                # steps between evaluations, each followed by a save
log_interval = 1                    # steps between log lines
eval_iters = 200                    # evaluate at most this many batches per split
eval_only = False                   # evaluate once, write nothing, stop
patience = 0                        # stop after so many evaluations without a new best; 0: never
always_save_checkpoint = True       # save after each evaluation; False: only if it is the best
sharded_save = False                # a checkpoint is a folder that all ranks write
init_from = "scratch"               # scratch, resume, gpt2, gpt2-xl, OWNER/NAME, a folder
auto_resume = False                 # resume if out_dir has a checkpoint, else use init_from
checkpoint_file: str | None = None  # resume from this file in out_dir; None: from the newest
new_data = False                    # resume although the dataset has changed
# Weights & Biases
wandb_log = False                   # send losses and speeds there too
wandb_project = "owt"               # project that the run belongs to
wandb_run_name = "gpt2"             # name of the run
# Data
dataset = "openwebtext"             # name of a folder in data/
gradient_accumulation_steps = 5 * 8 # micro-batches per step, over all processes
batch_size = 12                     # sequences per micro-batch
block_size = 1024                   # tokens of context
sampling = "random"                 # windows: random, or epochs: each once per epoch
# Model
n_layer = 12                        # transformer blocks
n_head = 12                         # attention heads per block
n_embd = 768                        # channels; a multiple of n_head
dropout = 0.0                       # 0 for pretraining; try 0.1 or more on small datasets
bias = False                        # biases in linear and normalization layers
position = "learned"                # position encoding: learned, rotary
rms_norm = False                    # RMSNorm for LayerNorm, also of embeddings, queries, keys
tied = True                         # one matrix is token table and head
# Optimizer
optimizer = "adamw"                 # adamw, or muon for the matrices of the blocks
learning_rate = 6e-4                # maximum, reached after the warm-up
max_iters = 600000                  # steps, each one update
weight_decay = 1e-1                 # of matrices only
beta1 = 0.9                         # AdamW: decay of the mean gradient
beta2 = 0.95                        # AdamW: decay of the mean squared gradient
eps = 1e-8                          # AdamW: added to the root of that mean
grad_clip = 1.0                     # scale longer gradients down to this norm; 0: never
max_bad_steps = 5                   # stop after so many steps in a row without a finite gradient
# Schedule
decay_lr = True                     # warm up, then decay; False: learning_rate throughout
warmup_iters = 2000                 # steps of linear warm-up
lr_schedule = "cosine"              # shape of the decay: cosine, linear
constant_share = 0.0                # share of the steps after the warm-up before the decay begins
lr_decay_iters: int | None = None   # step at which min_lr is reached; None: max_iters
min_lr: float | None = None         # after the decay; None: learning_rate / 10, linear: 0
batch_ramp_iters = 0                # steps over which the batch grows to its full size; 0: constant
batch_ramp_start = 0.25             # share of the full batch at step 0
# System
seed = 1337                         # of the initial weights, the batches and dropout
backend = "nccl"                    # of the process group on GPUs; CPUs use gloo
fsdp: bool | str = False            # shard weights and optimizer; hybrid: within a machine only
activation_checkpointing = False    # compute blocks twice to save memory
deterministic = False               # on GPUs: the same bits each time, more slowly
timeout = 600.0                     # seconds that a process waits for the others
device = "auto"                     # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                      # auto, float32, bfloat16, float16 (scales the loss)
compile: bool | str = "auto"        # auto, True, False: use torch.compile

MAXIMUM = 2**31 - 1
ALLOWED = {  # setting -> choices, or (minimum, maximum)
    **dict.fromkeys(
        "learning_rate min_lr weight_decay grad_clip eps max_iters warmup_iters lr_decay_iters "
        "patience batch_ramp_iters".split(),
        (0, MAXIMUM),
    ),
    **dict.fromkeys(
        "eval_interval log_interval eval_iters max_bad_steps gradient_accumulation_steps "
        "batch_size block_size n_layer n_head n_embd timeout".split(),
        (1, MAXIMUM),
    ),
    **dict.fromkeys("dropout beta1 beta2 constant_share batch_ramp_start".split(), (0, 0.9999)),
    "seed": (0, 2**63 - 1),
    "sampling": ["random", "epochs"],
    "position": ["learned", "rotary"],
    "optimizer": ["adamw", "muon"],
    "lr_schedule": ["cosine", "linear"],
    "fsdp": [True, False, "hybrid"],
    "compile": ["auto", True, False],
}
DAMAGE = TypeError, AttributeError, LookupError, RuntimeError  # of a checkpoint with odd content
ROOT = Path(__file__).resolve().parent


# --- model and optimizer -------------------------------------------------------------------------


def build_model(saved, meta, config):
    """Return the model on the CPU, from the checkpoint `saved` or else as init_from says."""
    torch.manual_seed(seed)
    if saved:
        with user_error("the checkpoint's model_args", TypeError):
            fields, weights = vars(GPTConfig(**saved["model_args"])), saved["model"]
    elif init_from == "scratch":
        fields = {name: config[name] for name in vars(GPTConfig()) if name in config} | {
            "vocab_size": meta["vocab_size"]
        }
        weights = None
    else:
        fields, weights = load_pretrained(init_from)
    if block_size > fields["block_size"]:
        raise UserError(f"the model reads {fields['block_size']} tokens; lower --block_size")
    check_vocabulary(dataset, meta, fields["vocab_size"])
    shape = GPTConfig(**{**fields, "dropout": dropout})
    model = GPT.from_state(shape, weights) if weights else GPT(shape)
    model.crop_block_size(block_size)
    return model


def build_state(saved, data, config, runtime):
    """Return the State before the first step, without the history of the checkpoint `saved`."""
    meta = data["train"].meta
    model = build_model(saved, meta, config)
    place_model(model, model.transformer.h, fsdp, runtime)
    model.activation_checkpointing = activation_checkpointing
    return State(
        model,
        optimizer=model.configure_optimizers(
            weight_decay, learning_rate, (beta1, beta2), runtime.device.type, optimizer, eps
        ),
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16),
        tokenizer=meta,
        data={split: tokens.digest() for split, tokens in data.items()},
    )


def wrap(model, batches, runtime):
    """Return `model`, compiled if wanted, and in DDP if there are several ranks. Collective."""
    if runtime.compile:
        runtime.say("compiling the model, which may take minutes")
        model = torch.compile(model)
    if runtime.world_size > 1 and not fsdp:
        model = DistributedDataParallel(model, broadcast_buffers=False)
    if runtime.compile or runtime.world_size > 1:
        run_once(model, batches, runtime)  # compiles; DDP orders its sums in the first pass
    return model


def run_once(model, batches, runtime):
    """Run the forward and backward pass of a micro-batch, without effect on the weights."""
    tokens = batches(0)[0].to(runtime.device)
    with runtime.autocast():
        model(tokens[:, :-1], tokens[:, 1:], loss_only=True).backward()
    model.zero_grad()


def check_memory(runtime):
    """Raise UserError if a step cannot fit on a CPU: the system would kill the process silently."""
    # A step keeps at least so many bytes per token, layer and channel.
    needed = (4 if activation_checkpointing else 36) * batch_size * block_size * n_layer * n_embd
    if runtime.device.type == "cpu" and hasattr(os, "sysconf"):  # Windows has no sysconf
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            raise UserError(
                f"a step needs {needed / 1e9:.0f} GB, this machine has {memory / 1e9:.0f}; "
                f"lower --batch_size"
            )


# --- schedule ------------------------------------------------------------------------------------


def learning_rate_at(step):
    """Return the learning rate of `step`: linear warm-up, constant, decay to min_lr, constant."""
    if not decay_lr:
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    last = max_iters if lr_decay_iters is None else lr_decay_iters
    usual = learning_rate / 10 if lr_schedule == "cosine" else 0.0  # arXiv:2203.15556
    lowest = usual if min_lr is None else min_lr
    begin = warmup_iters + constant_share * (last - warmup_iters)
    progress = min(1, max(0, step - begin) / max(1, last - begin))
    left = (1 + math.cos(math.pi * progress)) / 2 if lr_schedule == "cosine" else 1 - progress
    return lowest + (learning_rate - lowest) * left


# --- one step ------------------------------------------------------------------------------------


def train_step(model, state, batches, runtime):
    """Make one update; return the loss of this rank's sequences and the gradient norm, floats.

    The batches are a function of (seed, step), dropout of (seed, step, rank). The mean of the
    ranks' losses is the mean over all sequences. Syncs the device.
    """
    runtime.seed(seed, state.step, runtime.rank)
    state.optimizer.zero_grad()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(state.step)
    micro_batches = batches(state.step)
    sequences = sequences_at(state.step, batches.config) / runtime.world_size  # mean per rank
    mean_loss = 0.0
    for count, tokens in enumerate(micro_batches, start=1):
        model.require_backward_grad_sync = count == len(micro_batches)  # DDP averages only then
        tokens = tokens.to(runtime.device, non_blocking=True)  # a GPU computes meanwhile
        with runtime.autocast():
            loss = model(tokens[:, :-1], tokens[:, 1:], loss_only=True)
        loss = loss * (len(tokens) / sequences)
        state.scaler.scale(loss).backward()
        mean_loss += loss.detach()
    with runtime.autocast():  # for the products of matrices in Muon
        return update(state, mean_loss)


def update(state, loss):
    """Clip the gradient and update the weights if it is finite; return loss and norm as floats.

    The norm is measured before clipping. The device updates while the next step begins.
    """
    state.step += 1
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip or math.inf)
    numbers = torch.stack((loss, unshard(norm)))
    loss, norm = numbers.tolist()  # syncs the device, once per step
    is_finite = math.isfinite(norm)
    if is_finite:
        state.scaler.step(state.optimizer)
    state.scaler.update()
    # In float16 gradients overflow until the scaler has lowered its scale.
    state.bad_steps = 0 if is_finite or state.scaler.get_scale() > 1 else state.bad_steps + 1
    return loss, norm


# --- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, data, runtime):
    """Return the mean loss per token of each split. Collective: each rank takes a part.

    The windows do not overlap: all of them, or eval_iters * batch_size that are evenly spaced.
    """
    model.eval()
    losses = {}
    for split, tokens in data.items():
        starts = tokens.evenly_spaced(block_size, eval_iters * batch_size)
        windows = batch_size * runtime.world_size  # in a forward pass, over all ranks
        total = 0.0
        for first in tqdm(
            range(0, len(starts), windows), leave=False, disable=runtime.rank > 0 or None, delay=2
        ):
            mine = starts[first + runtime.rank : first + windows : runtime.world_size]
            # A rank without windows runs one with weight 0, because FSDP needs every rank.
            loss = loss_of(model, tokens, mine if len(mine) else starts[:1], runtime)
            total += loss * len(mine)
        losses[split] = runtime.reduce("sum", total) / len(starts)
    model.train()
    return losses


def loss_of(model, tokens, starts, runtime):
    """Return the mean loss per token of the windows at `starts`.

    Windows with ignored targets complete the batch, so that a compiled model sees one shape.
    """
    ids = tokens.windows(np.resize(starts, batch_size), block_size + 1).to(runtime.device)
    targets = ids[:, 1:].clone()
    targets[len(starts) :] = -1
    with runtime.autocast():
        return model(ids[:, :-1], targets, loss_only=True).item()


# --- main ----------------------------------------------------------------------------------------


def run(model, state, data, batches, folder, log, runtime):
    """Train to the end; return the signal that stopped it, or 0, and if the last save succeeded."""
    is_saved = True
    with noted_signals() as signals:
        while True:
            stopped = int(runtime.reduce("max", max(signals, default=0)))
            ends = stopped > 0 or state.step >= max_iters
            val_loss = math.inf
            if not stopped and (ends or state.step % eval_interval == 0):
                with log.paused():
                    losses = evaluate(model, data, runtime)
                log.evaluation(state, losses)
                val_loss = losses["val"]
                ends |= (
                    val_loss >= state.best_val_loss
                    and state.step - state.best_step >= patience * eval_interval > 0
                )
            wanted = ends or (always_save_checkpoint and val_loss != math.inf)
            if val_loss < state.best_val_loss or (wanted and state.step != folder.saved_step):
                with log.paused():
                    is_saved = folder.save(state, val_loss, runtime)
            if ends:
                return stopped, is_saved
            step = state.step
            loss, grad_norm = train_step(model, state, batches, runtime)
            if state.bad_steps >= max_bad_steps:
                raise UserError(
                    f"step {step}: {max_bad_steps} steps in a row had no finite gradient, "
                    f"loss {loss:.4f}; the newest saved step is {folder.saved_step}; "
                    f"lower --learning_rate"
                )
            if step % log_interval == 0:
                tokens = tokens_until(state.step, batches.config)
                log.step(step, loss, grad_norm, learning_rate_at(step), tokens)


@one_line_errors(
    "halve --batch_size and double --gradient_accumulation_steps, which gives the same training, "
    "or try --activation_checkpointing=True; tools/size.py lists the memory of a step"
)
def main(config):
    with RunFolder(config) as folder:  # locked before anything in it is read
        saved = folder.checkpoint_to_resume()
        with user_error("the checkpoint cannot be resumed", *DAMAGE):
            changes = take_over(config, saved) if saved else []
        globals().update(config)  # on resume, the settings of the checkpoint
        if faults := [*config.faults, *config.value_faults()]:
            raise UserError("\n".join(faults))
        runtime = start_runtime(config)
        data = open_dataset(ROOT / "data" / dataset, block_size)
        batches = Batches(data["train"], config, runtime)
        state = build_state(saved, data, config, runtime)
        if saved:
            with user_error("the checkpoint cannot be resumed", *DAMAGE):
                folder.is_branch |= state.restore(saved, config)
        if runtime.reduce("min", state.step) != runtime.reduce("max", state.step):
            raise UserError("the machines resume from different steps: they must share out_dir")
        total = tokens_until(max_iters, config)
        epochs = total / batches.tokens.count
        runtime.say(
            "\n".join([
                *changes,
                f"hardware: {runtime.about}",
                f"data: {dataset}, {batches.tokens.count:,} tokens, "
                f"{data['val'].count:,} to validate",
                f"model: {state.model.get_num_params():,} parameters",
                f"steps: {state.step} to {max_iters}, {epochs:.2f} epochs"
                f"{', may overfit: try --patience=2' if not patience and epochs > 20 else ''}",
            ])
        )
        log = Log(state.model, config, runtime)
        if eval_only:
            log.evaluation(state, evaluate(state.model, data, runtime))
            return
        check_memory(runtime)
        model = wrap(state.model, batches, runtime)
        folder.set_aside(state, saved is None, runtime)
        log.open(folder.path / "log.jsonl", state, tokens_until(state.step, config), total)
        stopped, is_saved = run(model, state, data, batches, folder, log, runtime)
    runtime.say(
        f"{state.step} of {max_iters} steps done; {folder.path} keeps step {folder.saved_step} "
        f"and the best, step {state.best_step} with val loss {state.best_val_loss:.4f}"
    )
    if stopped or not is_saved:
        raise SystemExit(128 + stopped if is_saved else 1)


if __name__ == "__main__":
    main(configure(globals()))

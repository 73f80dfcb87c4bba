"""The GPT: its layers, its loss, its generation; the weights it loads and the optimizer it wants.

Dimensions: B batch, T tokens, C channels, H heads, D = C / H head size, V vocabulary.

Sources: GPT-2 (Radford et al. 2019) and its release for the architecture; GPT-3 (Brown et al. 2020,
arXiv:2005.14165, appendix B) for the optimizer; nanoGPT for parameter names and defaults.
"""

import math
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

import fast


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear and normalisation layers, as GPT-2 has; without is a bit faster
    gelu_tanh: bool = False  # the tanh approximation of GELU, which GPT-2 was trained with

    def saved(self):
        """Return the fields for a checkpoint: nanoGPT's, and gelu_tanh only where it is on."""
        fields = asdict(self)
        return fields if self.gelu_tanh else {k: v for k, v in fields.items() if k != "gelu_tanh"}

    @classmethod
    def restored(cls, fields, dropout=0.0):
        """Return the config that a checkpoint saved as `fields`, with another dropout."""
        try:
            config = cls(**{**fields, "dropout": dropout})
            sizes = list(vars(config).values())[:5]
            if min(sizes) < 1 or max(sizes) >= 2**31 or config.n_embd % config.n_head:
                raise TypeError(f"{config}")
        except TypeError as fault:
            raise ValueError(f"the checkpoint is of another kind of model: {fault}") from None
        return config


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = fast.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v
        self.c_proj = fast.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = fast.Dropout(config.dropout)

    def forward(self, x, cache=None, past=0):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=2)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            cache[0, :, :, past : past + T], cache[1, :, :, past : past + T] = k, v
            k, v = cache[:, :, :, : past + T]  # (B, H, past + T, D)
        dropout = self.dropout if self.training else 0.0
        # A single token sees all before it. More than one only ever come first, with past = 0.
        y = fast.attend(q, k, v, dropout_p=dropout, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = fast.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.gelu_tanh else "none")
        self.c_proj = fast.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = fast.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Normalise, transform, add: the residual stream x is only ever added to (pre-norm)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, past=0):
        x = x + self.attn(self.ln_1(x), cache, past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": fast.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = fast.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        self.apply(self.init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2L terms add up in the residual stream (GPT-2)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def tie(self):
        """Make input embedding and output head one matrix (Press and Wolf, arXiv:1608.05859)."""
        self.lm_head.weight = self.transformer.wte.weight

    @staticmethod
    def init_weights(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, idx, cache=None, past=0):
        """Return what the head reads, (B, T, C), for token ids `idx` (B, T). As in forward."""
        T = idx.size(1)
        assert past + T <= self.config.block_size, (past, T, self.config.block_size)
        assert past == 0 or T == 1, (past, T)
        positions = torch.arange(past, past + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for layer, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache[layer], past)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, cache=None, past=0):
        """Return logits and loss for token ids `idx` (B, T).

        With `targets` (B, T), where -1 is ignored: None, and the mean cross-entropy in nats per
        token. Without: logits (B, 1, V) of the last position, and None. `cache`, of `make_cache`,
        holds the keys and values of `past` tokens, which idx continues: with one token, or with any
        number if past is 0.
        """
        x = self.hidden(idx, cache, past)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        return None, fast.head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    # --- sizes -----------------------------------------------------------------------------------

    def get_num_params(self, non_embedding=True):
        """Return the number of parameters, without the position table unless `non_embedding=False`.

        The token table counts either way: it is the head too.
        """
        count = sum(parameter.numel() for parameter in self.parameters())
        return count - self.transformer.wpe.weight.numel() * non_embedding

    def flops_per_token(self):
        """Return the FLOPs of one token's forward and backward at full context.

        6N + 12 * n_layer * C * T (PaLM, arXiv:2204.02311, appendix B); N leaves the positions out.
        """
        shape = self.config
        return 6 * self.get_num_params() + 12 * shape.n_layer * shape.n_embd * shape.block_size

    def estimate_mfu(self, tokens, seconds, peak_flops):
        """Return model FLOPs utilisation, 0..1, of training `tokens` in `seconds` on one device.

        peak_flops is the device's dense peak for the dtype in FLOP/s; None if unknown, and then so
        is the result.
        """
        return peak_flops and self.flops_per_token() * tokens / seconds / peak_flops

    # --- optimizer -------------------------------------------------------------------------------

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """Return AdamW with two groups: matrices, which decay, then biases and gains, which do not.

        Group order and order within are nanoGPT's, so that optimizer states are exchangeable.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cuda", "cpu", "mps")  # one kernel for the whole update
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    # --- weights ---------------------------------------------------------------------------------

    def crop_block_size(self, block_size):
        """Shorten the context, dropping the positions beyond `block_size`."""
        assert block_size <= self.config.block_size, (block_size, self.config.block_size)
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
        wpe.num_embeddings = block_size

    @classmethod
    def from_state(cls, config, state, device="cpu"):
        """Return a GPT on `device` with a float32 copy of the weights `state`, name -> tensor.

        Names are nanoGPT's, with or without the prefix that torch.compile gave them there.
        Raises ValueError if names or shapes do not fit `config`.
        """
        state = {k.removeprefix("_orig_mod."): v for k, v in state.items() if torch.is_tensor(v)}
        state = {k: v for k, v in state.items() if not k.endswith(".attn.bias")}  # old masks
        layers = sum(name.endswith(".ln_1.weight") for name in state)
        if layers != config.n_layer:  # building a false million of them would take hours
            raise ValueError(f"the weights have {layers} layers, the model {config.n_layer}")
        state = {k: v.to(device, torch.float32, copy=True) for k, v in state.items()}
        try:
            with torch.device("meta"):  # no memory and no random numbers for weights to be replaced
                model = cls(config)
            model.load_state_dict(state, assign=True)
        except RuntimeError as fault:
            reason = " ".join(str(fault).split())[:300]
            raise ValueError(f"the weights do not fit the model: {reason}") from None
        model.tie()
        return model

    @classmethod
    def from_pretrained(cls, name, dropout=0.0, device="cpu"):
        """Return GPT-2 or a model of its shape, from the Hugging Face hub or a local folder.

        `name`: gpt2, gpt2-medium, gpt2-large, gpt2-xl, another hub name, or a folder that holds
        config.json and the weights. Raises ValueError if it cannot be had or has another shape.
        """
        source = load_transformers(name)
        theirs = source.config
        config = GPTConfig(
            theirs.n_positions, theirs.vocab_size, theirs.n_layer, theirs.n_head, theirs.n_embd,
            dropout, bias=True, gelu_tanh=theirs.activation_function != "gelu",
        )  # fmt: skip
        state = source.state_dict()
        for key in state:  # transformers' Conv1D holds its matrix the other way round
            if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                state[key] = state[key].t()
        return cls.from_state(config, state, device)

    # --- generation ------------------------------------------------------------------------------

    def cast_matrices(self, dtype):
        """Hold the matrices, token table included, in `dtype`: less to read; return self."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        return self

    def make_cache(self, batch_size, capacity):
        """Return room for the keys and values of `capacity` tokens, (L, 2, B, H, capacity, D)."""
        config, weight = self.config, self.transformer.wpe.weight
        heads = config.n_head, capacity, config.n_embd // config.n_head
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        size = (config.n_layer, 2, batch_size, *heads)
        return torch.empty(size, dtype=dtype, device=weight.device)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, *,
               stop=None, vocab_size=None, generators=None, use_cache=True):  # fmt: skip
        """Yield up to `max_new_tokens` times the next ids (B, 1) of the prompts `idx` (B, T).

        temperature 0 takes the likeliest token. top_k keeps the k likeliest, top_p the fewest whose
        probabilities reach p; None or 0 turns either off. A row that drew `stop` repeats it, and
        when all have, generation ends. Ids from `vocab_size` on are padding, never drawn.
        `generators`: one CPU torch.Generator per row, else torch's global one.

        When block_size tokens are in the cache, the last half of the context is read anew from
        position 0, so that it never falls below half of block_size. A longer prompt is cut to its
        last block_size tokens. use_cache=False computes the same without it. Leaves eval mode on.
        """
        self.eval()
        block_size, context = self.config.block_size, idx[:, -self.config.block_size :]
        context = context.clone()  # in inference mode, like all after it: else compiled twice
        capacity = min(block_size, context.size(1) + max_new_tokens)
        cache, past = self.make_cache(len(idx), capacity) if use_cache else None, 0
        done = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if context.size(1) > block_size:
                context, past = context[:, -((block_size + 1) // 2) :], 0
            logits, _ = self(context[:, past:], cache=cache, past=past)
            if not logits.isfinite().all():  # syncs the device
                raise ValueError("the model's logits are not finite; try another checkpoint")
            draws = None if temperature == 0 else uniform(len(idx), generators).to(idx.device)
            drawn = next_token(logits[:, -1, :vocab_size], draws, temperature, top_k, top_p)
            if stop is not None:
                drawn = drawn.masked_fill(done, stop)
                done |= drawn == stop
            yield drawn
            if stop is not None and done.all():  # syncs the device
                return
            past = context.size(1) if use_cache else 0
            context = torch.cat((context, drawn), dim=1)

    def generate(self, idx, max_new_tokens, *args, **options):
        """Return `idx` (B, T) and what `stream` draws after it, (B, at most T + max_new_tokens)."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, *args, **options)), dim=1)


def uniform(count, generators):
    """Return (count, 1) numbers in (0, 1], row by row from `generators` if given."""
    if generators is None:
        return 1 - torch.rand(count, 1)
    return 1 - torch.stack([torch.rand(1, generator=generator) for generator in generators])


def next_token(logits, draws, temperature=1.0, top_k=None, top_p=None):
    """Return the ids (B, 1) that `draws` (B, 1), uniform in (0, 1], pick from `logits` (B, V).

    The draw inverts the cumulative distribution, one random number per token, so a row's choice
    depends neither on its neighbours nor on the device. Arguments as in GPT.stream.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / max(temperature, 1e-6)  # a smaller one overflows
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1)
        beyond = mass.cumsum(dim=-1) - mass >= max(top_p, 1e-6)  # p was reached before this token
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    mass = logits.softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(mass, draws * mass[:, -1:])  # draws > 0: never one of probability 0


def load_transformers(name):
    """Return the transformers model called `name`; ValueError says why there is none to use."""
    if not Path(name).is_dir() and "/" not in name and "gpt2" not in name:
        known = "scratch, resume, auto, gpt2, gpt2-medium, -large, -xl, OWNER/NAME or a folder"
        raise ValueError(f"init_from={name}: choose {known}")
    try:
        from huggingface_hub import HfApi
        from transformers import AutoConfig, GPT2LMHeadModel, logging
    except ImportError:
        raise ValueError("loading GPT-2 needs transformers: pip install -e '.[gpt2]'") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def load(**where):
        try:  # the default of trust_remote_code is to ask whether to run a folder's code
            check_shape(AutoConfig.from_pretrained(name, trust_remote_code=False, **where))
            where |= {"dtype": torch.float32, "output_loading_info": True}
            return GPT2LMHeadModel.from_pretrained(name, **where)
        except Exception as fault:  # damage can raise anything
            if isinstance(fault, OSError) and not Path(name).is_dir():
                raise
            reason = f"{type(fault).__name__}: {fault}".splitlines()[0].partition(". ")[0]
            raise ValueError(f"{name}: {reason.removeprefix('ValueError: ')}") from None

    try:
        source, info = load(local_files_only=True)  # a folder, or in the cache of the hub
    except OSError:
        try:
            HfApi().model_info(name, timeout=5)  # one attempt; the loader retries for half a minute
        except Exception as fault:
            advice = "save the model to a folder elsewhere and give --init_from=FOLDER"
            reason = f"{type(fault).__name__}: {fault}".splitlines()[0]
            raise ValueError(f"cannot get {name!r} from the hub ({reason}); {advice}") from None
        source, info = load()
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{name} lacks weights: {', '.join(missing[:3])}")
    return source


def check_shape(theirs):
    """Raise ValueError if `theirs`, a transformers config, is of a model that GPT cannot be."""
    wanted = {
        "model_type": ["gpt2"],
        "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu"],
        "n_inner": [None, 4 * getattr(theirs, "n_embd", 0)],
        "layer_norm_epsilon": [1e-5],
        "scale_attn_weights": [True],
        "scale_attn_by_inverse_layer_idx": [False],
        "tie_word_embeddings": [True],
    }
    for key, allowed in wanted.items():
        if getattr(theirs, key, allowed[0]) not in allowed:
            raise ValueError(f"it is no GPT-2: its {key} is {getattr(theirs, key)!r}")


def read_checkpoint(path):
    """Return what ckpt.pt holds, on the CPU; tensors are read from the file when first used.

    Runs no code, whatever the file holds. Raises ValueError if it is no checkpoint or damaged.
    """
    kinds = {"model": dict, "model_args": dict, "iter_num": int, "config": dict}
    if not path.exists():
        raise ValueError(f"no checkpoint {path}")
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # 0.35 s per GB; torch.load ignores CRCs
            raise ValueError(f"{damaged!r} in it is damaged")
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        lacks = [key for key in kinds if not isinstance(checkpoint.get(key), kinds[key])]
        more = ("optimizer", "scaler", "tokenizer")
        lacks += [key for key in more if not isinstance(checkpoint.get(key, {}), dict)]
    except Exception as fault:  # damage can raise anything, but runs nothing
        why = f"{type(fault).__name__}: {fault}".removeprefix("ValueError: ").partition(". ")[0]
        if isinstance(fault, zipfile.BadZipFile):
            why = "it was cut short or is another kind of file"
        raise ValueError(f"{path} cannot be read as a checkpoint: {why.splitlines()[0]}") from None
    if lacks:
        raise ValueError(f"{path} is no checkpoint: it lacks {', '.join(lacks)}")
    return checkpoint

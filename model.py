"""The GPT: its layers, its loss, its generation; the weights it loads and the optimizer it wants.

Dimensions: B batch, T tokens, C channels, H heads, D = C / H head size, V vocabulary.

Sources: GPT-2 (Radford et al. 2019) and its release for the architecture; GPT-3 (Brown et al. 2020,
arXiv:2005.14165, appendix B) for the optimizer; nanoGPT for parameter names and defaults.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


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
    # A table; or queries and keys are turned (arXiv:2104.09864); or distance costs (2108.12409).
    position: Literal["learned", "rotary", "alibi"] = "learned"
    rms_norm: bool = False  # RMSNorm without gain; also of embeddings, queries and keys
    tied: bool = True  # the token table is the head too (Press and Wolf, arXiv:1608.05859)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.qk_norm = make_norm(config, config.n_embd // config.n_head, otherwise=nn.Identity())
        self.attend = F.scaled_dot_product_attention

    def forward(self, x, rotation=None, mask=None, cache=None, past=0):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=2)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        q, k = self.qk_norm(q), self.qk_norm(k)
        if cache is not None:
            keys, values = cache  # (B, H, capacity, D) each
            keys[:, :, past : past + T] = k
            values[:, :, past : past + T] = v
            k, v = keys[:, :, : past + T], values[:, :, : past + T]
        dropout = self.dropout if self.training else 0.0
        # With a cache a single token comes after all others and may see them all.
        causal = T > 1 and mask is None
        y = self.attend(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return self.resid_dropout(self.c_proj(y))


def make_norm(config, size, otherwise=None):
    """Return the normalisation of `size` channels: an RMSNorm without gain, or what GPT-2 has."""
    if config.rms_norm:
        return nn.RMSNorm(size, 1e-6, elementwise_affine=False)
    return otherwise or nn.LayerNorm(size, bias=config.bias)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.gelu_tanh else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Normalise, transform, add: the residual stream x is only ever added to (pre-norm)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, rotation=None, mask=None, cache=None, past=0):
        x = x + self.attn(self.ln_1(x), rotation, mask, cache, past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "ln_e": make_norm(config, config.n_embd, otherwise=nn.Identity()),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": make_norm(config, config.n_embd),
            }
        )
        if config.position != "learned":
            del self.transformer["wpe"]
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        self.apply(self.init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2L terms add up in the residual stream (GPT-2)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def tie(self):
        """Make the token table and the head one matrix, unless the config keeps them apart."""
        if self.config.tied:
            self.lm_head.weight = self.transformer.wte.weight

    @staticmethod
    def init_weights(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, cache=None, past=0, loss_only=False):
        """Return logits and loss for token ids `idx` (B, T).

        With `targets` (B, T), where -1 is ignored: logits (B, T, V) and their mean cross-entropy in
        nats per token; with `loss_only` just the loss, not a pair. Without targets: logits (B, 1,
        V) of the last position, and None. `cache`, of `make_cache`, holds the keys and values of
        `past` tokens, which idx continues: with one token, or with any number if past is 0.
        """
        x = self.hidden(idx, cache, past)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if loss_only:
            return self.head_loss(x, targets)
        logits = self.lm_head(x)
        return logits, cross_entropy(logits, targets)

    def hidden(self, idx, cache=None, past=0):
        """Return what the head reads, (B, T, C). Arguments as in forward."""
        T = idx.size(1)
        assert past + T <= self.config.block_size, (past, T, self.config.block_size)
        assert past == 0 or T == 1, (past, T)
        seen = torch.arange(past + T, device=idx.device)
        positions = seen[past:]
        x, rotation, mask = self.transformer.wte(idx).float(), None, None
        if self.config.position == "learned":
            x = x + self.transformer.wpe(positions)
        elif self.config.position == "rotary":
            rotation = rotary_table(positions, self.config.n_embd // self.config.n_head)
        else:
            mask = alibi_mask(positions, seen, self.config.n_head)[None]  # fused kernels want 4
        x = self.transformer.drop(self.transformer.ln_e(x))
        for layer, block in enumerate(self.transformer.h):
            x = block(x, rotation, mask, None if cache is None else cache[layer], past)
        return self.transformer.ln_f(x)

    def head_loss(self, x, targets):
        """Return the loss for what the head reads, x (B, T, C).

        A method of its own, so that it can be replaced by one that never holds all logits.
        """
        return cross_entropy(self.lm_head(x), targets)

    # --- sizes -----------------------------------------------------------------------------------

    def get_num_params(self, non_embedding=True):
        """Return the number of parameters, without the position table unless `non_embedding=False`.

        The token table counts either way: it is the head too, unless that is a matrix of its own.
        """
        count = sum(parameter.numel() for parameter in self.parameters())
        if non_embedding and self.config.position == "learned":
            count -= self.transformer.wpe.weight.numel()
        return count

    def flops_per_token(self):
        """Return the FLOPs of one token's forward and backward at full context.

        6N + 12 * n_layer * C * T (PaLM, arXiv:2204.02311, appendix B); N leaves out the positions,
        and the token table where it is not the head: nothing is multiplied by it.
        """
        shape, count = self.config, self.get_num_params()
        if not shape.tied:
            count -= self.transformer.wte.weight.numel()
        return 6 * count + 12 * shape.n_layer * shape.n_embd * shape.block_size

    def estimate_mfu(self, tokens, seconds, peak_flops):
        """Return model FLOPs utilisation, 0..1, of training `tokens` in `seconds` on one device.

        peak_flops is the device's dense peak for the dtype in FLOP/s; None if unknown, and then so
        is the result.
        """
        if peak_flops is None:
            return None
        return self.flops_per_token() * tokens / seconds / peak_flops

    # --- optimizer -------------------------------------------------------------------------------

    def configure_optimizers(
        self, weight_decay, learning_rate, betas, device_type, name="adamw", eps=1e-8
    ):
        """Return the optimizer "adamw" or "muon", with a group each of what it treats alike.

        AdamW decays matrices, not biases and gains; its group order and the order within are
        nanoGPT's, so that optimizer states are exchangeable. Muon comes first, for the matrices of
        the blocks, and AdamW's two groups hold the rest.
        """
        optimizer, hidden = torch.optim.AdamW, []
        if name == "muon":
            from engine.muon import Muon

            optimizer = Muon
            matrices = {3: [], 1: []}  # c_attn is three in one: queries, keys and values
            for key, parameter in self.transformer.h.named_parameters():
                if parameter.dim() == 2 and parameter.requires_grad:
                    matrices[3 if "c_attn" in key else 1].append(parameter)
            hidden = [
                {"params": same, "parts": parts, "momentum": 0.95, "weight_decay": weight_decay}
                for parts, same in matrices.items()
            ]
        taken = {parameter for group in hidden for parameter in group["params"]}
        rest = [p for p in self.parameters() if p.requires_grad and p not in taken]
        groups = [
            *hidden,
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cuda", "cpu", "mps")  # one kernel for the whole update
        return optimizer(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)

    # --- weights ---------------------------------------------------------------------------------

    def crop_block_size(self, block_size):
        """Shorten the context, dropping the positions beyond `block_size`."""
        assert block_size <= self.config.block_size, (block_size, self.config.block_size)
        self.config = replace(self.config, block_size=block_size)
        if self.config.position != "learned":
            return
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
        wpe.num_embeddings = block_size

    @classmethod
    def from_state(cls, config, state, device="cpu"):
        """Return a GPT on `device` with a float32 copy of the weights `state`, name -> tensor.

        Raises load_state_dict's RuntimeError if names or shapes do not fit `config`.
        """
        with torch.device("meta"):  # no memory and no random numbers for weights to be replaced
            model = cls(config)
        copies = {}
        for name, tensor in state.items():
            tensor = tensor.to(device, torch.float32, copy=True)
            copies[name] = tensor.contiguous()  # a sharded model needs it
        model.load_state_dict(copies, assign=True)
        model.tie()
        return model

    @classmethod
    def from_pretrained(cls, name, dropout=0.0, device="cpu"):
        """Return GPT-2, or a model that a GPT can be, from the Hugging Face hub or a local folder.

        `name`: gpt2, gpt2-medium, gpt2-large, gpt2-xl, another hub name, or a folder that holds
        config.json and the weights. Raises ValueError if it cannot be had or has another shape.
        """
        from engine.huggingface import load_pretrained

        fields, state = load_pretrained(name)
        return cls.from_state(GPTConfig(**fields, dropout=dropout), state, device)

    # --- generation ------------------------------------------------------------------------------

    def cast_matrices(self, dtype):
        """Hold the matrices of linear layers, a tied token table too, in `dtype`; return self."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)  # less to read for each token
        return self

    def make_cache(self, batch_size, capacity):
        """Return room for the keys and values of `capacity` tokens, (L, 2, B, H, capacity, D)."""
        config, weight = self.config, self.lm_head.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        heads = config.n_head, capacity, config.n_embd // config.n_head
        size = (config.n_layer, 2, batch_size, *heads)
        return torch.empty(size, dtype=dtype, device=weight.device)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, *,
               vocab_size=None, generators=None, use_cache=True):  # fmt: skip
        """Yield the next ids (B, 1) of the prompts `idx` (B, T): each is `max_new_tokens` longer.

        A prompt shorter than T has -1 behind it. All rows begin with as many tokens as the shortest
        one has, and go on together: the next id of a row is that of its prompt while there is one,
        then what is drawn (as in the code of Llama, arXiv:2302.13971). So the first prompts to end
        get more than `max_new_tokens`; whoever has enough stops asking.

        temperature 0 takes the likeliest token. top_k keeps the k likeliest, top_p the fewest whose
        probabilities reach p; None or 0 turns either off. Ids from `vocab_size` on are padding,
        never drawn. `generators`: one CPU torch.Generator per row, else torch's global one.

        When block_size tokens are in the cache, the last half of the context is read anew from
        position 0, so that it never falls below half of block_size. Longer prompts, all of one
        length, are cut to their last block_size tokens. use_cache=False computes the same without
        it. Leaves eval mode on. Raises FloatingPointError on logits that are not finite.
        """
        self.eval()
        block_size, idx = self.config.block_size, idx[:, -self.config.block_size :]
        lengths = (idx >= 0).sum(dim=1).tolist()
        begin, end = min(lengths), max(lengths) + max_new_tokens
        context = idx[:, :begin].clone()  # in inference mode, as all after it: else compiled twice
        cache = self.make_cache(len(idx), min(block_size, end)) if use_cache else None
        generators = generators or [None] * len(idx)
        past = 0
        for place in range(begin, end):
            if context.size(1) > block_size:
                context = context[:, -((block_size + 1) // 2) :]
                past = 0
            logits, _ = self(context[:, past:], cache=cache, past=past)
            if not logits.isfinite().all():  # syncs the device
                raise FloatingPointError("the logits are not finite; try another checkpoint")
            drawing = [length <= place for length in lengths]
            draws = None if temperature == 0 else uniform(generators, drawing).to(idx.device)
            drawn = next_token(logits[:, -1, :vocab_size], draws, temperature, top_k, top_p)
            if not all(drawing):
                given = idx[:, place : place + 1]
                drawn = torch.where(given < 0, drawn, given)
            yield drawn
            past = context.size(1) if use_cache else 0
            context = torch.cat((context, drawn), dim=1)

    def generate(self, idx, max_new_tokens, *args, **options):
        """Return `idx` (B, T) and what `stream` adds to it, (B, T + max_new_tokens)."""
        shortest = (idx >= 0).sum(dim=1).min()
        added = self.stream(idx, max_new_tokens, *args, **options)
        return torch.cat((idx[:, :shortest], *added), dim=1)


def rotary_table(positions, size):
    """Return the cosine and sine, (T, D / 2) each, of the angles to turn heads of D = `size` by."""
    frequencies = 10000 ** (-torch.arange(0, size, 2, device=positions.device) / size)
    angles = positions[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Return x (B, H, T, D) with channel i and D / 2 + i turned as a pair, by position and i."""
    first, second = x.chunk(2, dim=3)
    turned = first * cos + second * sin, second * cos - first * sin
    return torch.cat(turned, dim=3).type_as(x)


def alibi_mask(positions, seen, heads):
    """Return what to add to the scores of `positions` (T) for those `seen` (S), (H, T, S).

    The further back, the less, by a slope per head; the future gets -inf.
    """
    slopes = 2 ** (-8 * torch.arange(1, heads + 1, device=seen.device) / heads)
    behind = positions[:, None] - seen  # (T, S)
    return torch.where(behind >= 0, -slopes[:, None, None] * behind, -math.inf)


def cross_entropy(logits, targets):
    """Return the mean cross-entropy of logits (B, T, V) against targets (B, T), -1 ignored."""
    logits, targets = logits.flatten(0, 1).float(), targets.flatten()
    return F.cross_entropy(logits, targets, ignore_index=-1)


def uniform(generators, drawing):
    """Return numbers (B, 1) in (0, 1], from the generators of the rows that are `drawing`, else 1.

    A generator that is None is torch's global one.
    """
    rows = zip(generators, drawing, strict=True)
    return torch.stack([1 - torch.rand(1, generator=g) if d else torch.ones(1) for g, d in rows])


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
        beyond = beyond.scatter(1, order, beyond)  # from sorted order back to ids
        logits = logits.masked_fill(beyond, -math.inf)
    mass = logits.softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(mass, draws * mass[:, -1:])  # draws > 0: never one of probability 0

"""The GPT: its layers, loss, optimizer and generation.

Dimensions: B batch, T tokens, C channels, H heads, D = C / H head size, V vocabulary.

Sources: GPT-2 (Radford et al. 2019) and its release for the architecture; GPT-3 (Brown et al. 2020,
arXiv:2005.14165, appendix B) for the optimizer; nanoGPT for parameter names and defaults.
"""

import math
from dataclasses import dataclass
from reprlib import repr as short  # bounds nested values

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.huggingface import load_pretrained
from engine.kernels import attention, cross_entropy, dropout
from engine.muon import make_muon
from engine.process import UserError, user_error


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear and normalization layers, as in GPT-2; False is a bit faster
    gelu_tanh: bool = False  # the tanh approximation of GELU, which GPT-2's weights expect
    position: str = "learned"  # or rotary (RoPE, arXiv:2104.09864)
    rms_norm: bool = False  # RMSNorm without gain, also of embeddings, queries and keys
    tied: bool = True  # the token table is also the head (Press and Wolf, arXiv:1608.05859)

    def __post_init__(self):
        sizes = [self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd]
        divisor = {"learned": 1, "rotary": 2}.get(self.position, 1e9)
        are_numbers = {*map(type, sizes)} == {int} and min(sizes) > 0 and self.n_layer <= 1000
        if not are_numbers or self.n_embd % (divisor * self.n_head):
            raise UserError(
                f"n_embd must be a multiple of n_head, and of twice n_head with rotary positions, "
                f"all sizes positive integers, n_layer at most 1000; "
                f"block_size, vocab_size, n_layer, n_head, n_embd are {short(sizes)}"
            )


def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def make_norm(config):
    if config.rms_norm:
        return nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rotation, cache, past):
        B, T, C = x.shape
        config = self.config
        qkv = self.c_attn(x).view(B, T, 3, config.n_head, -1)
        q, k, v = qkv.unbind(2)  # (B, T, H, D) each
        if rotation is not None:
            q = rotate(q, rotation)
            k = rotate(k, rotation)
        if config.rms_norm:
            q, k = rms_norm(q), rms_norm(k)
        if cache is not None:  # (2, B, capacity, H, D)
            cache.narrow(2, past, T).copy_(torch.stack((k, v)))
            k, v = cache.narrow(2, 0, past + T)
        p = config.dropout if self.training else 0.0
        y = attention(q, k, v, p, is_causal=T > 1)  # (B, T, H, D); one token attends to the cache
        y = y.reshape(B, T, C)  # concatenate the heads
        y = self.c_proj(y)
        return dropout(y, config.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4 C)
        x = F.gelu(x, approximate="tanh" if self.config.gelu_tanh else "none")
        x = self.c_proj(x)
        return dropout(x, self.config.dropout, self.training)


class Block(nn.Module):
    """Each half reads a normalized copy of the residual stream x and adds its result (pre-norm)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotation=None, cache=None, past=0):
        x = x + self.attn(self.ln_1(x), rotation, cache, past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # train.py sets it
        layers = nn.ModuleDict()
        layers["wte"] = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            layers["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        else:
            self.register_buffer("rotation", rotary_table(config), persistent=False)
        layers["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        layers["ln_f"] = make_norm(config)
        self.transformer = layers
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            if name.endswith("c_proj.weight"):  # 2L of them add to the residual stream (GPT-2)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def tie_weights(self):
        if self.config.tied:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx, targets=None, loss_only=False):
        """Return logits and loss for token ids `idx` (B, T).

        With `targets` (B, T), of which -1 is ignored: the logits (B, T, V) and their mean
        cross-entropy in nats per token; with `loss_only` the loss alone, which takes less memory.
        Without targets: the logits of the last position (B, 1, V), and None.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        targets = targets.flatten()
        if loss_only:
            return cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets)
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=-1)
        return logits, loss

    def hidden(self, idx, cache=None, past=0):
        """Return the final hidden states (B, T, C) of token ids `idx` (B, T).

        `cache` holds the keys and values of the `past` tokens before idx, (2, B, capacity, H, D)
        for each layer. With a cache, idx is either one token or begins at position 0.
        """
        config = self.config
        layers = self.transformer
        positions = slice(past, past + idx.size(1))
        rotation = None
        x = layers.wte(idx)  # (B, T, C)
        if config.position == "learned":
            x = x + layers.wpe.weight[positions]
        else:
            rotation = self.rotation[:, positions]
        if config.rms_norm:
            x = rms_norm(x)
        x = dropout(x, config.dropout, self.training)
        caches = cache or [None] * config.n_layer
        for block, block_cache in zip(layers.h, caches, strict=True):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation, block_cache, past)
        return layers.ln_f(x)

    # --- sizes -----------------------------------------------------------------------------------

    def get_num_params(self, non_embedding=True):
        """Return the number of parameters, without the position table if `non_embedding`.

        The token table counts in any case, because it usually is the head too.
        """
        count = sum(parameter.numel() for parameter in self.parameters())
        if non_embedding and self.config.position == "learned":
            count -= self.transformer.wpe.weight.numel()
        return count

    def flops_per_token(self):
        """Return the FLOPs of the forward and backward pass per token, at full context.

        6N + 12 * n_layer * C * T (PaLM, arXiv:2204.02311, appendix B). N leaves out the tables,
        which are not multiplied, unless the token table is the head.
        """
        config = self.config
        N = self.get_num_params()
        if not config.tied:
            N -= self.transformer.wte.weight.numel()
        attention = config.n_layer * config.n_embd * config.block_size
        return 6 * N + 12 * attention

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Return the model FLOPs utilization, 0..1, of `fwdbwd_per_iter` sequences in `dt` seconds.

        peak_flops is the peak of the device in FLOP/s, by default the peak of an A100 in bfloat16.
        """
        tokens = fwdbwd_per_iter * self.config.block_size
        return self.flops_per_token() * tokens / dt / peak_flops

    # --- optimizer -------------------------------------------------------------------------------

    def configure_optimizers(
        self, weight_decay, learning_rate, betas, device_type, optimizer="adamw", eps=1e-8
    ):
        """Return the optimizer "adamw" or "muon".

        AdamW decays matrices, not biases and gains. Its parameter order is nanoGPT's, so that
        optimizer states are exchangeable. Muon takes the matrices of the blocks, AdamW the rest.
        """
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        settings = {
            "lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "fused": True,
        }  # fmt: skip
        if optimizer == "muon":
            return make_muon(self.transformer.h, matrices, vectors, **settings)
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, **settings)

    # --- weights ---------------------------------------------------------------------------------

    def crop_block_size(self, block_size):
        """Shorten the context to `block_size` tokens."""
        self.config.block_size = block_size
        if self.config.position == "learned":
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].clone())

    @classmethod
    def from_state(cls, config, state):
        """Return a GPT with a float32 copy of the weights `state`, name -> tensor.

        UserError if names or shapes do not fit `config`.
        """
        with torch.device("meta"):  # no memory and no random numbers for weights to be replaced
            model = cls(config)
        copies = {name: tensor.float().clone() for name, tensor in state.items()}
        with user_error("the weights do not fit the model", RuntimeError):
            model.load_state_dict(copies, assign=True)
        model.tie_weights()
        return model

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """Return GPT-2, or another model of a known shape, from the Hugging Face hub or a folder.

        `model_type`: gpt2, gpt2-medium, gpt2-large, gpt2-xl, another name on the hub, or a folder
        that save_pretrained() of transformers wrote. `override_args` may set the dropout. Raises
        UserError if the model cannot be loaded or has another shape.
        """
        fields, state = load_pretrained(model_type)
        return cls.from_state(GPTConfig(**fields, **(override_args or {})), state)

    # --- generation ------------------------------------------------------------------------------

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, *,
               vocab_size=None, generators=None):  # fmt: skip
        """Yield the next token ids (B, 1) of the prompts `idx` (B, T), max_new_tokens times.

        temperature 0 takes the most likely token. top_k keeps the k most likely tokens, top_p the
        fewest whose probabilities sum to at least p; None or 0 keeps all. Ids from `vocab_size` on
        are padding and never drawn. `generators`: one CPU torch.Generator per row instead of
        torch's global one. Raises FloatingPointError if the logits are not finite.

        When block_size tokens are in the cache, the last half of them is read again from position
        0, so that the context never falls below half of block_size.
        """
        config = self.config
        block_size = config.block_size
        context = idx[:, -block_size:]
        capacity = min(block_size, context.size(1) + max_new_tokens)
        D = config.n_embd // config.n_head
        empty = self.lm_head.weight.new_empty(2, len(idx), capacity, config.n_head, D)
        cache = [torch.empty_like(empty) for _ in self.transformer.h]
        x = self.hidden(context, cache)  # first step: read the prompt
        for _ in range(max_new_tokens):  # second step: decode one token at a time
            logits = self.lm_head(x[:, -1])
            token = next_token(logits[:, :vocab_size], temperature, top_k, top_p, generators)
            yield token
            context = torch.hstack((context, token))
            if context.size(1) <= block_size:
                x = self.hidden(token, cache, past=context.size(1) - 1)
            else:
                context = context[:, -((block_size + 1) // 2) :]
                x = self.hidden(context, cache)

    def generate(self, idx, max_new_tokens, *args, **options):
        """Return `idx` (B, T) continued by the tokens of stream(), (B, T + max_new_tokens)."""
        return torch.hstack((idx, *self.stream(idx, max_new_tokens, *args, **options)))


def rotary_table(config):
    """Return the cosine and sine of the angles by which heads are rotated, (2, T, 1, D / 2).

    On the CPU, also for a model on the meta device, because no checkpoint holds the table.
    """
    D = config.n_embd // config.n_head
    frequencies = 10000 ** (-torch.arange(0, D, 2, device="cpu") / D)
    angles = torch.arange(config.block_size, device="cpu")[:, None, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, rotation):
    """Return x (B, T, H, D) with each pair of channels i and D / 2 + i rotated."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=3)
    left = first * cos + second * sin
    right = second * cos - first * sin
    return torch.cat((left, right), dim=3).type_as(x)


def next_token(logits, temperature=1.0, top_k=None, top_p=None, generators=None):
    """Return the ids (B, 1) of tokens drawn from `logits` (B, V). Arguments as in GPT.stream.

    Each row is drawn on the CPU, so that the draw depends neither on the other rows nor on the
    device.
    """
    B, V = logits.shape
    if not logits.isfinite().all():  # syncs the device
        raise FloatingPointError("the logits are not finite; try another checkpoint")
    if temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    logits = logits.float() / max(temperature, 1e-6)  # a smaller temperature overflows
    logits, ids = logits.topk(min(top_k or V, V))  # in descending order
    probabilities = logits.cpu().double().softmax(dim=1)  # in float32 a cumsum can decrease
    if top_p:
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities[before >= max(top_p, 1e-6)] = 0
    draws = []
    for row, generator in zip(probabilities, generators or [None] * B, strict=True):
        draws.append(torch.multinomial(row, 1, generator=generator))
    return ids.gather(1, torch.stack(draws).to(ids.device))

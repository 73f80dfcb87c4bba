"""Reproduce rows of the tables in docs/recipe.md: train variants with seeds 1 to 3.

    python data/shakespeare_char/prepare.py
    python docs/recipe.py small "GPT-2, AdamW" "the recipe"
    python docs/recipe.py large "+ Muon"
    python docs/recipe.py data

`small` has 0.8M parameters and reads characters, `large` has 10M and reads GPT-2's tokens of
Python's standard library, which `data` writes. Prints the mean loss on the validation split and the
distance between the best and the worst seed. An interrupted command continues when you repeat it.
"""

import statistics
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.tokenizer import GPT2, make_tokenizer  # noqa: E402
from data.tokens import write_dataset  # noqa: E402
from tools.compare import measure  # noqa: E402

RUN = """--device=cpu --dtype=float32 --compile=False --gradient_accumulation_steps=1 --dropout=0
    --min_lr=0 --warmup_iters=10 --lr_schedule=linear --log_interval=20"""
SCALES = {
    "small": """--dataset=shakespeare_char --n_layer=4 --n_head=4 --n_embd=128 --block_size=64
        --batch_size=12 --max_iters=200""",
    "large": """--dataset=stdlib_bpe --n_layer=6 --n_head=5 --n_embd=160 --block_size=128
        --batch_size=8 --max_iters=100""",
}
VARIANTS = {
    "GPT-2, AdamW": "",
    "+ Muon": "--optimizer=muon",
    "+ rotary": "--position=rotary",
    "+ RMSNorm, also of embeddings, queries, keys": "--rms_norm=True",
    "+ untied head": "--tied=False",
    "the recipe": "--optimizer=muon --position=rotary --rms_norm=True --tied=False",
    "AdamW for Muon": "--position=rotary --rms_norm=True --tied=False",
    "learned positions for rotary": "--optimizer=muon --rms_norm=True --tied=False",
    "LayerNorm for all RMSNorm": "--optimizer=muon --position=rotary --tied=False",
    "tied head": "--optimizer=muon --position=rotary --rms_norm=True",
}
LEFT_OUT = {"site-packages", "encodings", "pydoc_data"}


def write_source_code():
    """Write Python's standard library with its tests, 20 MB, as the dataset stdlib_bpe."""
    folder = ROOT / "data" / "stdlib_bpe"
    if (folder / "train.bin").exists():
        return
    texts = []
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = set(path.relative_to(library).parts)
        if not parts & LEFT_OUT:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    ids = [*map(make_tokenizer(GPT2).encode, texts)]
    val = ids[9::10]
    del ids[9::10]
    write_dataset(folder, GPT2, train=ids, val=val)


def train(scale, name, seed):
    """Train a variant, or continue; return its loss on the validation split."""
    variant = VARIANTS[name]
    rate = "1e-2" if "muon" in variant else "3e-3"
    arguments = f"{RUN} {SCALES[scale]} {variant} --learning_rate={rate}"
    _, loss = measure(arguments, ROOT, seed)
    return loss


def main():
    scale, *names = sys.argv[1:] or ["nothing"]
    if scale not in ("small", "large", "data") or set(names) - VARIANTS.keys():
        variants = ", ".join(VARIANTS)
        raise SystemExit(f"error: give small, large or data, then some of: {variants}")
    if scale != "small":
        write_source_code()
    for name in names:
        losses = [train(scale, name, seed) for seed in (1, 2, 3)]
        spread = max(losses) - min(losses)
        mean = statistics.mean(losses)
        print(f"| {name} | {mean:.3f} ({spread:.3f}, 3) |", flush=True)


if __name__ == "__main__":
    main()

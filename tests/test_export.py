"""tools/export.py: what transformers makes of the folder, and the way back."""

import pytest
import tiktoken
import torch
from conftest import TINY, assert_equal, load, losses

import sample
import train
from data.tokenizer import GPT2, BPETokenizer, CharTokenizer, bpe_meta, char_meta
from data.tokens import write_dataset
from engine.gguf import save_gguf
from engine.huggingface import save_model
from model import GPT, GPTConfig
from tools import export

transformers = pytest.importorskip("transformers")
MODERN = {"position": "rotary", "rms_norm": True, "tied": False, "bias": False}
RECIPE = ["--position=rotary", "--rms_norm=True", "--tied=False", "--optimizer=muon"]
LETTERS = "\n abcdeé東"
CASES = [{}, {"bias": True}, {"bias": True, "gelu_tanh": True}, MODERN]


@pytest.fixture
def trained(launch, tiny, monkeypatch):
    """Return a function that trains a tiny model in `out`."""
    monkeypatch.setattr(sample, "ROOT", tiny)
    return lambda *options: launch(train, *TINY, "--max_iters=30", "--learning_rate=3e-3", *options)


def opened(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def large_weights(**shape):
    """Return a model with weights large enough for distinct logits, biases included."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("shape", CASES, ids=lambda shape: "-".join(shape) or "plain")
def test_logits_are_those_of_transformers_and_come_back_bit_for_bit(tmp_path, shape):
    """With 5 ids of padding, which are left out."""
    model = large_weights(vocab_size=45, **{"bias": False} | shape)
    save_model(tmp_path, vars(model.config), model.state_dict(), 40, None, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(40, (3, 16))
    with torch.no_grad():
        logits = model(ids, ids)[0][..., :40]
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-4, rtol=0)
    back = GPT.from_pretrained(str(tmp_path))
    assert vars(back.config) | {"vocab_size": 45} == vars(model.config)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name][: len(tensor)]), name


@pytest.mark.parametrize("recipe", [[], RECIPE], ids=["gpt2", "nanochat"])
def test_greedy_text_is_that_of_sample(launch, trained, recipe):
    trained(*recipe)
    launch(export, "--folder=hf")
    options = "--start=3 plus", "--temperature=0", "--num_samples=1", "--max_new_tokens=8"
    text = launch(sample, "--device=cpu", *options).split("\n----")[0]
    assert launch(sample, "--device=cpu", "--init_from=hf", *options).split("\n----")[0] == text
    model, tokenizer = opened("hf")
    ids = tokenizer("3 plus", return_tensors="pt").input_ids
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert tokenizer.decode(model.generate(ids, **given)[0]) == text
    written = transformers.pipeline("text-generation", "hf")("3 plus", **given)
    assert written[0]["generated_text"] == text


def test_export_finetune_export_is_a_circle(launch, trained):
    trained()
    launch(export, "--folder=hf")
    launch(train, *TINY, "--init_from=hf", "--max_iters=0", "--decay_lr=False", "--out_dir=same")
    for name, tensor in load("out/ckpt.pt")["model"].items():
        assert torch.equal(load("same/ckpt.pt")["model"][name], tensor)
    launch(train, *TINY, "--init_from=hf", "--max_iters=5", "--out_dir=tuned")
    assert losses("tuned")[0] < losses("out")[0] - 1
    launch(export, "--out_dir=tuned", "--folder=again")
    assert opened("again")[1].get_vocab() == opened("hf")[1].get_vocab()


def test_characters_are_the_same_ids_there(tmp_path):
    tokenizer = CharTokenizer(char_meta(LETTERS))
    export.save_tokenizer(tmp_path, tokenizer, 16)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "bad é\n東 cab\n\n a"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


def test_byte_pairs_of_ones_own_are_the_same_ids_there(tmp_path):
    tokenizer = BPETokenizer(bpe_meta([b" a", b"  ", b"    ", b"\xc3\xa9", b"ab", b" ab"]))
    export.save_tokenizer(tmp_path, tokenizer, 1024)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "  ab ab      é 東\n\n   12345<|endoftext|>x"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("another", [False, True])
def test_tokens_are_the_same_ids_there(tmp_path, gpt2_files, another):
    """Of GPT-2, and of an encoding with another pattern and a hole before its special tokens."""
    tokenizer = BPETokenizer(GPT2)
    if another:
        tokenizer.encoding = tiktoken.Encoding(
            "another",
            pat_str=r"\p{L}{1,4}|\p{N}{1,3}|\s+|[^\p{L}\p{N}\s]+",
            mergeable_ranks=tokenizer.encoding._mergeable_ranks,
            special_tokens={"<|endoftext|>": 50300, "<|more|>": 50310},
        )
    export.save_tokenizer(tmp_path, tokenizer, 1024)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "  Hello, world's 12345 naïve 東京\n\n\tdef f(x):  return x  # ok<|endoftext|>And on"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.encoding.eot_token


def test_a_checkpoint_to_share_samples_alike_and_does_not_resume(launch, trained, tiny):
    trained()
    (tiny / "shared").mkdir()
    launch(export, "--checkpoint=shared/ckpt.pt")
    options = "--device=cpu", "--num_samples=1", "--max_new_tokens=20"
    text = launch(sample, *options, "--out_dir=shared")
    assert text == launch(sample, *options, "--out_dir=out")
    size, whole = ((tiny / name / "ckpt.pt").stat().st_size for name in ("shared", "out"))
    launch(export, "--checkpoint=shared/half.pt", "--dtype=bfloat16")
    assert size < 0.5 * whole and (tiny / "shared" / "half.pt").stat().st_size < 0.75 * size
    assert_equal({**load("shared/ckpt.pt"), "optimizer": {"state": {}}}, load("out/ckpt.pt"))
    with pytest.raises(SystemExit, match="holds no optimizer state to resume with"):
        launch(train, "--init_from=resume", "--out_dir=shared", "--max_iters=40")


@pytest.mark.parametrize(
    "arguments, line",
    [
        ([], "give --folder=FOLDER, --checkpoint=FILE or --gguf=FILE to write to"),
        (["--folder=full"], "--folder=full holds something already; give a new one"),
        (["--folder=hf", "--dtype=int8"], "dtype=int8: choose float32, bfloat16 or float16"),
        (["--folder=hf", "--out_dir=alibi"], "position=alibi: transformers has no such model"),
        (["--folder=hf", "--out_dir=nowhere"], "no ckpt.pt in nowhere"),
        (["--checkpoint=out/ckpt.pt"], "--checkpoint=out/ckpt.pt exists already; give a new name"),
        (["--checkpoint=no/a.pt"], "no/a.pt: No such file or directory"),
        (["--checkpoint=a.pt", "--init_from=gpt2"], "init_from=gpt2: --checkpoint needs one"),
        (["--gguf=out/ckpt.pt"], "--gguf=out/ckpt.pt exists already; give a new name"),
        (["--gguf=no/a.gguf"], "no/a.gguf: No such file or directory"),
        (["--gguf=hf", "--out_dir=alibi"], "position=alibi: llama.cpp's GPT-2 has no such thing"),
    ],
)
def test_a_mistake_gets_its_line(launch, trained, tiny, arguments, line):
    trained("--max_iters=1")
    trained("--max_iters=1", "--position=alibi", "--out_dir=alibi")
    (tiny / "full").mkdir()
    (tiny / "full" / "file").write_text("")
    with pytest.raises(SystemExit) as fault:
        launch(export, *arguments)
    assert str(fault.value).startswith(f"error: {line}")
    assert not (tiny / "hf").exists() and not (tiny / "hf.tmp").exists()


def test_a_model_that_ours_cannot_be_is_refused(launch, trained, tiny):
    trained(*RECIPE, "--max_iters=1")
    launch(export, "--folder=hf")
    with pytest.raises(SystemExit, match="has position=rotary; leave --position=alibi out"):
        launch(train, *TINY, "--init_from=hf", "--position=alibi", "--max_iters=2")
    launch(train, *TINY, *RECIPE, "--init_from=hf", "--max_iters=2", "--out_dir=tuned")
    config = tiny / "hf" / "config.json"
    changed = config.read_text().replace('"attention_bias": false', '"attention_bias": true')
    config.write_text(changed)
    with pytest.raises(SystemExit, match="it is no nanochat: its attention_bias is True"):
        launch(sample, "--init_from=hf", "--device=cpu")


def test_an_export_that_fails_can_be_repeated(launch, trained, tiny, monkeypatch):
    trained("--max_iters=1")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_tokenizer", fail)
        with pytest.raises(SystemExit, match="error: hf: No space left on device"):
            launch(export, "--folder=hf")
    assert not (tiny / "hf").exists()
    launch(export, "--folder=hf")
    assert (tiny / "hf" / "tokenizer.json").exists()


def test_a_folder_with_other_characters_is_not_trained_on(launch, trained, tiny):
    trained("--max_iters=1")
    launch(export, "--folder=hf")
    letters = "".join(map(chr, range(65, 65 + load("out/ckpt.pt")["tokenizer"]["vocab_size"])))
    ids = [*range(len(letters))] * 9
    write_dataset(tiny / "data" / "other", char_meta(letters), train=[ids], val=[ids])
    with pytest.raises(SystemExit, match="dataset other is encoded unlike the model in hf"):
        launch(train, *TINY, "--dataset=other", "--init_from=hf", "--max_iters=2")


# --- llama.cpp -----------------------------------------------------------------------------------


def to_file(model, characters, dtype="float32"):
    """Write `model` to model.gguf, as export.py does with a tokenizer of characters."""
    tokens = [character.encode() for character in characters]
    save_gguf("model.gguf", vars(model.config), model.state_dict(), dtype, tokens, None, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_gguf_file_holds_each_weight_under_llama_cpps_name(tmp_path, monkeypatch, bias, dtype):
    gguf = pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    model = large_weights(vocab_size=12, bias=bias)  # 12 - 9 are padding
    to_file(model, LETTERS, dtype)
    reader = gguf.GGUFReader("model.gguf")
    found = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    state, kind = model.state_dict(), export.DTYPES[dtype]
    assert len(found) == 2 * 12 + 4 and "output.weight" not in found
    wte = state["transformer.wte.weight"][: len(LETTERS)]
    assert torch.equal(found["token_embd.weight"], wte.to(kind).float())
    assert torch.equal(found["position_embd.weight"], state["transformer.wpe.weight"])
    for part, theirs in {"attn.c_attn": "attn_qkv", "mlp.c_proj": "ffn_down"}.items():
        weight = state[f"transformer.h.1.{part}.weight"]
        assert torch.equal(found[f"blk.1.{theirs}.weight"], weight.to(kind).float())
        zeros = torch.zeros(len(weight))
        expected = state.get(f"transformer.h.1.{part}.bias", zeros)
        assert torch.equal(found[f"blk.1.{theirs}.bias"], expected)


@pytest.mark.parametrize("shape", CASES[:3], ids=lambda shape: "-".join(shape) or "plain")
def test_llama_cpp_computes_the_same_from_characters(tmp_path, monkeypatch, shape):
    """Logits to 0.3 % of the largest: llama.cpp's GELU is a table of the tanh form in 16 bits."""
    llama_cpp = pytest.importorskip("llama_cpp")
    monkeypatch.chdir(tmp_path)
    model = large_weights(vocab_size=12, **{"bias": False} | shape)
    to_file(model, LETTERS)
    llama = llama_cpp.Llama("model.gguf", n_ctx=16, logits_all=True, verbose=False)
    text = "ab\né東 ccd"
    ids = llama.tokenize(text.encode(), add_bos=False)
    assert ids == CharTokenizer(char_meta(LETTERS)).encode(text)
    assert llama.detokenize(ids).decode() == text and llama.token_eos() == -1
    llama.eval(ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), torch.tensor([ids]))[0][0, :, : len(LETTERS)]
    scores = torch.tensor(llama.scores[: len(ids)])
    torch.testing.assert_close(scores, logits, atol=0.003 * logits.abs().max().item(), rtol=0)


def test_llama_cpp_writes_greedily_what_sample_writes(launch, trained):
    llama_cpp = pytest.importorskip("llama_cpp")
    trained()
    launch(export, "--gguf=model.gguf")
    options = "--start=3 plus", "--temperature=0", "--num_samples=1", "--max_new_tokens=8"
    text = launch(sample, "--device=cpu", *options).split("\n----")[0]
    llama = llama_cpp.Llama("model.gguf", n_ctx=16, verbose=False)
    written = llama.create_completion("3 plus", max_tokens=8, temperature=0)
    assert "3 plus" + written["choices"][0]["text"] == text


def test_llama_cpp_reads_gpt2s_tokens(tmp_path, monkeypatch, gpt2_files):
    """Its vocabulary, merges and end-of-text; the 47 ids of padding are left out."""
    llama_cpp = pytest.importorskip("llama_cpp")
    monkeypatch.chdir(tmp_path)
    tokenizer = BPETokenizer(GPT2)
    model = large_weights(vocab_size=50304, bias=False)
    monkeypatch.setattr(sample, "load", lambda *_: (model, tokenizer, ""))
    export.export_gguf(tmp_path / "model.gguf")
    llama = llama_cpp.Llama("model.gguf", n_ctx=16, verbose=False)
    assert llama.n_vocab() == 50257 and llama.token_eos() == llama.token_bos() == 50256
    for text in ("Hello there, it's  1234 é東\n\n  x", "<|endoftext|>a"):
        ids = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert ids == tokenizer.encode(text)

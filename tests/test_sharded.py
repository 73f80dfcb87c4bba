"""A checkpoint as a folder that all ranks write: the same state, as safe as the single file."""

import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, Payload, assert_equal, at_step, load, losses, workers

import sample
import train
from engine.checkpoint import find_checkpoint
from engine.process import UserError
from tools import convert, export

slow = pytest.mark.slow
SHARDED = [*TINY, "--sharded_save=True", "--lr_decay_iters=8", "--dropout=0.2"]


def load_folder(folder, name="ckpt.dcp"):
    return find_checkpoint(Path(folder), name)


def files(path):
    return sorted(name for name in os.listdir(path) if name != ".lock")


def test_a_folder_holds_what_the_file_would(launch, tiny):
    launch(train, *SHARDED, "--max_iters=3")
    launch(train, *SHARDED, "--max_iters=3", "--sharded_save=False", "--out_dir=one")
    folder, file = load_folder("out"), load("one/ckpt.pt")
    assert files("out") == ["best.dcp", "ckpt.dcp", "log.jsonl"]
    assert folder.keys() == file.keys()
    assert folder["model"].keys() == file["model"].keys()
    assert_equal(file, folder)
    del folder["config"]["out_dir"], file["config"]["out_dir"]
    assert folder["config"].pop("sharded_save") and not file["config"].pop("sharded_save")
    for key in folder.keys() - {"model", "optimizer"}:
        assert folder[key] == file[key], key
    assert folder["optimizer"]["param_groups"] == file["optimizer"]["param_groups"]


def test_stopping_and_resuming_from_a_folder_equals_going_on(launch, tiny):
    launch(train, *SHARDED, "--max_iters=8", "--out_dir=straight", "--eval_interval=8")
    launch(train, *SHARDED, "--max_iters=4", "--eval_interval=3")
    launch(train, "--init_from=resume", "--max_iters=8", "--eval_interval=2")
    assert_equal(load_folder("straight"), load_folder("out"))
    assert losses("straight") == losses("out")


def test_a_run_that_has_only_a_folder_is_sampled_from_and_exported(launch, tiny, monkeypatch):
    monkeypatch.setattr(sample, "ROOT", tiny)
    launch(train, *SHARDED, "--max_iters=2")
    text = "--device=cpu", "--dtype=float32", "--num_samples=1", "--max_new_tokens=20"
    drawn = launch(sample, *text)
    launch(export, "--checkpoint=model.pt")
    shutil.rmtree("out")
    Path("out").mkdir()
    shutil.move("model.pt", "out/ckpt.pt")
    assert launch(sample, *text) == drawn


def test_a_folder_is_judged_and_moved_aside_as_a_file_is(launch, tiny):
    launch(train, *SHARDED, "--max_iters=2")
    losses_of = "step 2: train loss"
    judged = launch(train, "--init_from=resume", "--eval_only")
    launch(train, *SHARDED, "--max_iters=2", "--sharded_save=False", "--out_dir=one")
    found = launch(train, "--init_from=resume", "--eval_only", "--out_dir=one")
    for out in (judged, found):
        assert losses_of in out
    assert judged.partition(losses_of)[2] == found.partition(losses_of)[2]
    launch(train, *SHARDED, "--max_iters=3")
    assert load_folder("out")["iter_num"] == 3 and load_folder("out/previous")["iter_num"] == 2


def test_the_older_of_two_renames_is_resumed_from(launch, tiny, monkeypatch):
    monkeypatch.setattr(sample, "ROOT", tiny)
    launch(train, *SHARDED, "--max_iters=2")
    shutil.rmtree("out/best.dcp")
    os.rename("out/ckpt.dcp", "out/ckpt.dcp.old")
    Path("out/ckpt.dcp.new").mkdir()
    Path("out/ckpt.dcp.new/__0_0.distcp").write_text("half")
    launch(sample, "--device=cpu", "--dtype=float32", "--num_samples=1", "--max_new_tokens=9")
    out = launch(train, *SHARDED, "--max_iters=3", "--auto_resume=True")
    assert "steps: 2 to 3," in out and load_folder("out")["iter_num"] == 3
    assert {"ckpt.dcp", "log.jsonl"} <= set(files("out")) <= {"best.dcp", "ckpt.dcp", "log.jsonl"}


def test_other_peoples_files_stay_beside_a_folder(launch, tiny):
    launch(train, *SHARDED, "--max_iters=1")
    names = "ckpt.pt.old", "best.pt.new", "log.jsonl.old", "my.dcp.old"
    for name in names:
        Path("out", name).write_text("mine")
    launch(train, "--init_from=resume", "--max_iters=2")
    assert [Path("out", name).read_text() for name in names] == ["mine"] * 4


def test_the_best_and_the_newest_share_their_files_while_they_are_one_state(launch, tiny):
    launch(train, *SHARDED, "--max_iters=1")
    for name in files("out/ckpt.dcp"):
        assert os.path.samefile(f"out/ckpt.dcp/{name}", f"out/best.dcp/{name}")
    assert files("out/ckpt.dcp") == [".metadata", "__0_0.distcp", "rest.pt"]


# --- converting ----------------------------------------------------------------------------------


def test_a_checkpoint_converted_and_back_is_the_same(launch, tiny):
    launch(train, *SHARDED, "--max_iters=2")
    launch(convert, "--input=out/ckpt.dcp", "--output=model.pt")
    out = launch(convert, "--input=model.pt", "--output=new/model.dcp")
    assert out == "new/model.dcp: the state of step 2\n"
    folder, file, again = load_folder("out"), load("model.pt"), load_folder("new", "model.dcp")
    tied = [file["model"][name] for name in ("lm_head.weight", "transformer.wte.weight")]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    for other in (file, again):
        assert folder.keys() == other.keys() and folder["config"] == other["config"]
        assert_equal(folder, other)
    Path("new/ckpt.pt").write_bytes(Path("model.pt").read_bytes())
    launch(train, "--init_from=resume", "--out_dir=new", "--max_iters=4")
    launch(train, "--init_from=resume", "--max_iters=4")
    assert_equal(load_folder("out"), load_folder("new"))


@pytest.mark.parametrize(
    "options, told",
    [
        ([], "give --input=NAME.dcp and --output=NAME.pt, or the other way round"),
        (["--input=a.pt", "--output=b"], "output=b: let it end in .pt for a file or .dcp for a"),
        (["--input=a.pt", "--output=there.pt"], "--output=there.pt exists already; give a new"),
        (["--input=a.pt", "--output=b.dcp"], "a.pt cannot be read as a checkpoint: No such file"),
    ],
)
def test_a_mistake_in_converting_gets_one_line(launch, tiny, options, told):
    Path("there.pt").touch()
    with pytest.raises(SystemExit) as stop:
        launch(convert, *options)
    assert stop.value.code.startswith(f"error: {told}") and "\n" not in stop.value.code
    assert Path("there.pt").stat().st_size == 0 and not Path("b.dcp").exists()


# --- damage --------------------------------------------------------------------------------------


def test_a_folder_of_a_stranger_runs_no_code(launch, tiny):
    launch(train, *SHARDED, "--max_iters=2")
    whole = load_folder("out")
    Path("out/ckpt.dcp/.metadata").write_bytes(pickle.dumps(Payload()))
    assert_equal(whole, load_folder("out"))  # which it does not look into
    torch.save(Payload(), "out/ckpt.dcp/rest.pt")
    for script in (train, sample):
        with pytest.raises(SystemExit) as stop:
            launch(script, "--init_from=resume")
        assert stop.value.code.startswith("error: out/ckpt.dcp cannot be read as a checkpoint: ")
    assert not Path("proof").exists()


def test_tensors_of_a_stranger_run_no_code(launch, tiny):
    launch(train, *SHARDED, "--max_iters=2")
    table = torch.load("out/ckpt.dcp/rest.pt")["shards"]["table"]
    file, offset, length = table["model.transformer.wte.weight"][2][0][2]
    torch.save(Payload(), "hostile")
    content = bytearray(Path("out/ckpt.dcp", file).read_bytes())
    hostile = Path("hostile").read_bytes()
    assert len(hostile) < length
    content[offset : offset + length] = bytes(length - len(hostile)) + hostile
    os.unlink(Path("out/ckpt.dcp", file))  # best.dcp has it too
    Path("out/ckpt.dcp", file).write_bytes(content)
    with pytest.raises(UserError, match="out/ckpt.dcp cannot be read as a checkpoint: "):
        load_folder("out")
    assert not Path("proof").exists()


def damage(path, how):
    """Cut the file at `path`, flip a bit in its middle, or remove it; not under its other name."""
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "cut":
        path.write_bytes(content[:-100])
    if how == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "flipped", "removed"])
@pytest.mark.parametrize("name", ["__0_0.distcp", "rest.pt"])
def test_a_damaged_folder_gets_one_line_that_names_another(launch, tiny, name, how):
    launch(train, *SHARDED, "--max_iters=2")
    damage(Path("out/ckpt.dcp", name), how)
    with pytest.raises(SystemExit) as stop:
        launch(train, "--init_from=resume", "--max_iters=3")
    told = stop.value.code
    assert told.startswith("error: out/ckpt.dcp cannot be read as a checkpoint: ")
    assert told.endswith("; --checkpoint_file=best.dcp takes another") and "\n" not in told
    launch(train, "--init_from=resume", "--max_iters=3", "--checkpoint_file=best.dcp")
    assert load_folder("out")["iter_num"] == 3


# --- saves that fail, kills ----------------------------------------------------------------------


def test_a_folder_without_room_keeps_the_older_and_is_tried_again(
    launch, tiny, monkeypatch, file_limit
):
    def make_room():
        assert load_folder("out")["iter_num"] == 2
        assert files("out") == ["best.dcp", "ckpt.dcp", "log.jsonl"]
        file_limit(None)

    at_step(monkeypatch, {3: lambda: file_limit(100_000), 4: make_room})
    out = launch(train, *SHARDED, "--max_iters=6", "--eval_interval=2")
    why = "[Errno 27] File too large; out keeps the checkpoint of step 2"
    assert out.count(f"step 4 is not saved: {why}") == 1 and out.count("is not saved") == 1
    assert load_folder("out")["iter_num"] == 6
    assert files("out") == ["best.dcp", "ckpt.dcp", "log.jsonl"]


@slow
@pytest.mark.parametrize("name", ["__0_0.distcp", "rest.pt"])
def test_300_changes_of_a_file_are_refused_in_one_line_or_change_nothing(launch, tiny, name):
    launch(train, *SHARDED, "--max_iters=1")
    whole, path, chance = load_folder("out"), Path("out/ckpt.dcp", name), random.Random(2)
    content, refused = path.read_bytes(), 0
    path.unlink()  # best.dcp has it too
    for _ in range(300):
        changed = bytearray(content)
        at = chance.randrange(len(changed))
        if chance.random() < 0.5:
            changed[at] ^= 1 << chance.randrange(8)
        else:
            changed[at : at + chance.randrange(99)] = chance.randbytes(chance.randrange(99))
        path.write_bytes(changed)
        try:
            found = load_folder("out")
        except UserError as fault:
            assert "\n" not in str(fault)
            refused += 1
        else:
            assert_equal(whole, found)
    assert refused > 250


@slow
@pytest.mark.parametrize("moment", ["unlink", "replace", "rmtree", "fsync"])
def test_an_exception_at_any_moment_of_a_save_leaves_a_whole_state(
    launch, tiny, monkeypatch, moment
):
    """As a kill would: nothing runs after it."""
    place = shutil if moment == "rmtree" else os
    plain, count = getattr(place, moment), 0

    def killed(*arguments, **options):
        nonlocal count
        count += 1
        if count == deadly:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    launch(train, *SHARDED, "--max_iters=1")
    shutil.copytree("out", "begun")
    for deadly in range(1, 30):
        shutil.rmtree("out")
        shutil.copytree("begun", "out")
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(place, moment, killed)
            try:
                launch(train, "--init_from=resume", "--max_iters=2")
            except SystemExit:
                pass
        step = find_checkpoint(Path("out"), newest=True)["iter_num"]
        assert step in (1, 2)
        if count < deadly:
            break
    assert step == 2 and (deadly > 1 or moment == "unlink")


KILLS = 20
SLOW_SAVES = """
import os, shutil, time
import train
from configurator import configure

def slow(function):
    def call(*arguments, **options):
        time.sleep(0.02)
        result = function(*arguments, **options)
        time.sleep(0.02)
        return result
    return call

os.fsync, os.replace, shutil.rmtree = slow(os.fsync), slow(os.replace), slow(shutil.rmtree)
train.main(configure(vars(train)))
"""


@slow
def test_kill_9_of_all_ranks_at_any_moment_costs_nothing(start, finish, tiny):
    """Kill at 20 random moments, some of them in a save; the end is that of a run never killed."""
    (tiny / "slow_saves.py").write_text(SLOW_SAVES)
    options = [*TINY, "--dropout=0.2", "--max_iters=240", "--eval_interval=4", "--eval_iters=1"]
    options += ["--always_save_checkpoint=False", "--learning_rate=1e-2", "--log_interval=2"]
    options += ["--sharded_save=True", "--fsdp=True"]
    finish(*options, "--out_dir=straight", processes=2)
    moments, in_save = random.Random(1), 0
    for _ in range(KILLS):
        process = start(*options, "--auto_resume=True", script="slow_saves.py", processes=2)
        for _ in range(moments.randint(4, 16)):  # it begins to train after 4 lines
            process.stdout.readline()
        time.sleep(moments.uniform(0, 0.5))
        assert process.poll() is None, "it ended before it was killed"
        for number in (process.pid, *workers(process)):
            os.kill(number, signal.SIGKILL)
        process.wait()
        found = files("out") if Path("out").exists() else []
        in_save += any(name.endswith((".dcp.new", ".dcp.old")) for name in found)
        for name in found:
            if name.endswith((".dcp", ".dcp.old")):
                load_folder("out", name)
    finish(*options, "--auto_resume=True", processes=2)
    print(f"{in_save} of {KILLS} kills in a save")
    assert in_save >= KILLS // 4
    for name in ("ckpt.dcp", "last.dcp"):
        assert_equal(load_folder("straight", name), load_folder("out", name))
    assert losses("straight") == losses("out")
    assert files("out") == ["ckpt.dcp", "last.dcp", "log.jsonl"]


FULL_DISK = """
import os, resource
import train
from configurator import configure

step = train.train_step

def limited(model, state, batches, number, runtime):
    if runtime.rank == RANK and number in (3, 4):
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if number == 3 else most, most))
    return step(model, state, batches, number, runtime)

train.train_step = limited
train.main(configure(vars(train)))
"""


@slow
@pytest.mark.parametrize("rank, whose", [(0, ""), (1, "rank 1: ")])
def test_a_full_disk_of_one_rank_costs_one_save(finish, tiny, rank, whose):
    (tiny / "full.py").write_text(FULL_DISK.replace("RANK", str(rank)))
    options = *SHARDED, "--fsdp=True", "--max_iters=6", "--eval_interval=2"
    out = finish(*options, processes=2, script="full.py")
    why = f"{whose}[Errno 27] File too large; out keeps the checkpoint of step 2"
    assert out.count(f"step 4 is not saved: {why}") == 1 and out.count("is not saved") == 1
    assert load_folder("out")["iter_num"] == 6
    assert files("out") == ["best.dcp", "ckpt.dcp", "log.jsonl"]


# --- one form to another -------------------------------------------------------------------------

WAYS = [(2, True, True), (2, False, False), (2, True, False), (1, False, True), (2, False, True)]


@slow
def test_folders_and_files_resume_each_other_on_any_number_of_processes(launch, finish, tiny):
    options = [*TINY, "--lr_decay_iters=14", "--gradient_accumulation_steps=2"]
    launch(train, *options, "--max_iters=14", "--out_dir=straight")
    launch(train, *options, "--max_iters=2", "--sharded_save=True")
    for step, (processes, fsdp, sharded) in zip((4, 6, 8, 10, 12), WAYS, strict=True):
        on = f"--max_iters={step}", "--init_from=resume", f"--fsdp={fsdp}"
        finish(*on, f"--sharded_save={sharded}", processes=processes)
        form = "dcp" if sharded else "pt"
        assert files("out") == [f"best.{form}", f"ckpt.{form}", "log.jsonl"]
    launch(train, "--init_from=resume", "--max_iters=14", "--sharded_save=False")
    assert losses("out") == pytest.approx(losses("straight"), rel=1e-6)
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"), atol=1e-5, rtol=0)


@slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_model_resumes_exactly_even_where_a_rank_has_no_share(finish, tiny, optimizer):
    """4 channels over 3 processes are 2, 2 and none."""
    options = [*SHARDED, "--fsdp=True", "--n_embd=4", f"--optimizer={optimizer}"]
    options += ["--gradient_accumulation_steps=3"]
    finish(*options, "--max_iters=6", "--out_dir=straight", processes=3)
    finish(*options, "--max_iters=3", processes=3)
    finish("--init_from=resume", "--max_iters=6", processes=3)
    assert_equal(load_folder("straight"), load_folder("out"))
    assert losses("straight") == losses("out")


@slow
def test_a_sharded_run_crops_its_context_on_resume_from_a_folder(launch, finish, tiny):
    launch(train, *SHARDED, "--max_iters=2")
    shutil.copytree("out", "one")
    shorter = "--init_from=resume", "--block_size=8", "--max_iters=4", "--dropout=0"
    launch(train, *shorter, "--out_dir=one")
    finish(*shorter, "--fsdp=True", processes=2)
    assert load_folder("out")["model"]["transformer.wpe.weight"].shape == (8, 32)
    assert_equal(load_folder("one"), load_folder("out"), atol=1e-5, rtol=0)


HYBRID = """
import os
import train
from configurator import configure

os.environ["LOCAL_WORLD_SIZE"] = "2"  # as on two machines of two processes
train.main(configure(vars(train)))
"""


@slow
def test_shards_with_copies_on_other_machines_are_written_once_and_resumed(launch, finish, tiny):
    (tiny / "hybrid.py").write_text(HYBRID)
    hybrid = {"processes": 4, "script": "hybrid.py"}
    options = [*TINY, "--lr_decay_iters=10", "--gradient_accumulation_steps=4"]
    launch(train, *options, "--max_iters=10", "--out_dir=straight")
    finish(*options, "--sharded_save=True", "--max_iters=4", "--fsdp=hybrid", **hybrid)
    size = sum(path.stat().st_size for path in Path("out/ckpt.dcp").glob("*.distcp"))
    assert size < 1.5 * Path("straight/ckpt.pt").stat().st_size
    finish("--init_from=resume", "--max_iters=6", "--fsdp=True", processes=2)
    finish("--init_from=resume", "--max_iters=8", "--fsdp=hybrid", **hybrid)
    launch(train, "--init_from=resume", "--max_iters=10", "--fsdp=False")
    assert losses("out") == pytest.approx(losses("straight"), rel=1e-6)
    assert_equal(load("straight/ckpt.pt"), load_folder("out"), atol=1e-5, rtol=0)

"Checkpoints of a run: damage is found wherever it is, and another run is named."
import random, warnings

import pytest
import torch
from PIL import Image

from lora_nb.core import TrainingError
from lora_nb.dataset import ConceptDataset, TagWording, encode
from lora_nb.dreambooth import DreamBooth, train_dreambooth
from lora_nb.families import as_base
from lora_nb.injection import apply_lora, inject_lora, remove_lora
from lora_nb.lora import Lora
from lora_nb.pti import train_pti
from lora_nb.random_pipes import random_pipe
from lora_nb.dataset_config import Rule, Said
from lora_nb.states import base_identity, digest, examples_identity, newest_state, read_previews, read_state, write_state
from lora_nb.textual_inversion import train_textual_inversion

RED, BLUE = ([Image.new("RGB", (64, 64), c)] for c in ("red", "blue"))
QUICK = dict(batch_size=1, rank=2, targets="attention", guard=False, checkpoint_every=2, steps=2)


@pytest.fixture(scope="module")
def base(): return as_base(random_pipe("sd"))


@pytest.fixture
def state(): return dict(step=3, recipe="{}", log={"lrs": [.1, float("nan")]}, params={"unet": [torch.randn(40, 40)]}, betas=(.9, .99))


def test_a_checkpoint_comes_back_as_it_was(state, tmp_path):
    write_state(tmp_path / "a.pt", state)
    assert digest(read_state(tmp_path / "a.pt")) == digest(state) and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_every_flipped_bit_is_found_or_harmless(state, tmp_path):
    "Three hundred bits all over the file: what is read is refused, or is what was written"
    path, found = tmp_path / "a.pt", 0
    write_state(path, state); whole, want = path.read_bytes(), digest(state)
    rng = random.Random(0)
    for _ in range(300):
        at, bit = rng.randrange(len(whole)), rng.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:])
        try: assert digest(read_state(path)) == want
        except TrainingError: found += 1
    assert found > 200


@pytest.mark.parametrize("content", (b"", b"cut", b"PK\x03\x04 and no more"))
def test_an_only_checkpoint_that_cannot_be_read_is_an_error(base, content, tmp_path):
    (tmp_path / "checkpoints").mkdir(); (tmp_path / "checkpoints/step-000002.pt").write_bytes(content)
    with pytest.raises(TrainingError, match="No checkpoint in .* can be read"):
        train_dreambooth(base, RED, "a sks wall", output_dir=tmp_path, resume=True, **QUICK)


def test_a_checkpoint_without_a_checksum_is_of_an_older_version(state, tmp_path):
    old = {k: state[k] for k in ("step", "recipe", "log", "params")}
    torch.save(old, tmp_path / "step-000003.pt")
    with pytest.warns(UserWarning, match="older version"): assert newest_state(tmp_path)[1]["step"] == 3
    torch.save({**old, "checksim": "x"}, tmp_path / "step-000003.pt")
    with pytest.raises(TrainingError, match="damaged"): newest_state(tmp_path)


def test_nothing_to_resume_is_said(base, tmp_path):
    with pytest.warns(UserWarning, match="holds no checkpoint, so the run begins at step 0"):
        train_dreambooth(base, RED, "a sks wall", output_dir=tmp_path, resume=True, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_dreambooth(base, RED, "a sks wall", output_dir=tmp_path, resume=True, **QUICK)


@pytest.mark.parametrize("change, named", (
    (dict(instance_data=BLUE), "pictures of the subject"), (dict(instance_prompt="a zwx wall"), "captions of the subject"),
    (dict(instance_prompt="a zwx wall"), "trigger: sks wall there, zwx wall here"),
    (dict(class_prompt="a wall", prior="prediction"), "prior: None"),
    (dict(tags=TagWording(dropout=.1)), "wording of the subject: as they are there, TagWording"),
    (dict(instance_data=RED * 2), "pictures of the subject"), (dict(learning_rate=1e-4), "learning_rate: 0.001 there")))
def test_another_run_is_not_resumed(base, change, named, tmp_path):
    made = dict(instance_data=RED, instance_prompt="a sks wall", prior=None, output_dir=tmp_path, **QUICK)
    train_dreambooth(base, **made)
    run = DreamBooth(base, **{**made, **change})
    before = [p.detach().clone() for p in run.worn.params()]
    with pytest.raises(TrainingError, match=named): run.trainer.resume()
    assert all(a.equal(b) for a, b in zip(before, run.worn.params()))                    # nothing was restored by half
    run.remove()


def test_another_base_is_not_resumed_and_a_moved_one_is(base, tmp_path):
    train_dreambooth(base, RED, "a sks wall", output_dir=tmp_path, **QUICK)
    other = as_base(random_pipe("sd"))
    other.name = "moved"
    train_dreambooth(other, RED, "a sks wall", output_dir=tmp_path, resume=True, **{**QUICK, "steps": 3})
    with torch.no_grad(): next(m for m in other.denoiser.modules() if isinstance(m, torch.nn.Linear)).weight.mul_(1.01)
    with pytest.raises(TrainingError, match="all weights of the base"):
        train_dreambooth(other, RED, "a sks wall", output_dir=tmp_path, resume=True, **{**QUICK, "steps": 4})


def test_other_words_are_not_resumed(base, tmp_path):
    quick = dict(batch_size=1, guard=False, checkpoint_every=1, steps=1)
    train_textual_inversion(base, RED, "<red>", output_dir=tmp_path / "ti", **quick)
    with pytest.raises(TrainingError, match="trigger: <red> there, <rot> here"):
        train_textual_inversion(base, RED, "<rot>", output_dir=tmp_path / "ti", resume=True, **{**quick, "steps": 2})
    train_pti(base, RED, "<red>", output_dir=tmp_path / "pti", ti_steps=1, rank=2, **quick)
    with pytest.raises(TrainingError, match="trigger: <red> there"):
        train_pti(base, RED, "<rot>", output_dir=tmp_path / "pti", resume=True, ti_steps=1, rank=2, **{**quick, "steps": 2})


def test_files_may_be_renamed_and_masks_count(base, tmp_path):
    for folder, name in (("a", "x.png"), ("b", "y.png")):
        (tmp_path / folder).mkdir(); RED[0].save(tmp_path / folder / name)
    prints = [encode(base, ConceptDataset(tmp_path / d, "a wall")).prints for d in "ab"]
    masked = encode(base, ConceptDataset(RED, "a wall", masks=[Image.new("L", (64, 64), 9)])).prints
    assert prints[0] == prints[1] != masked


def test_identity_does_not_see_branches_words_or_names(base):
    before = base_identity(base)
    run = DreamBooth(base, RED, "a sks wall", train_text_encoder=True, **QUICK)
    assert base_identity(base) == before
    run.remove()


def test_a_broken_preview_does_not_break_resuming(base, tmp_path):
    kw = dict(QUICK, previews=dict(prompts=["a wall"], seeds=[0], steps=1), preview_every=1, output_dir=tmp_path)
    train_dreambooth(base, RED, "a sks wall", **kw)
    files = sorted((tmp_path / "previews").iterdir())
    assert len(files) == 3 and not [f for f in files if f.suffix != ".png"]
    files[1].write_bytes(files[1].read_bytes()[:40]); (tmp_path / "previews/step-abc-00.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="Broken previews"):
        train_dreambooth(base, RED, "a sks wall", resume=True, **{**kw, "steps": 3})
    with pytest.warns(UserWarning): assert [n for n, _ in read_previews(tmp_path / "previews", 9)] == [0, 2, 3]


@pytest.mark.parametrize("what, named", [("vae", "all weights of the VAE"), ("v_prediction", "the noise schedule"),
                                         ("betas", "the noise schedule")])
def test_another_vae_or_noise_schedule_is_not_resumed(what, named, tmp_path):
    made = dict(instance_data=RED, instance_prompt="a sks wall", prior=None, output_dir=tmp_path, **QUICK)
    train_dreambooth(as_base(random_pipe("sd"), "random"), **made)
    pipe = random_pipe("sd")
    changed = lambda **kw: type(pipe.scheduler).from_config(pipe.scheduler.config, **kw)
    if what == "vae": pipe.vae = random_pipe("sd", seed=9).vae
    elif what == "betas": pipe.scheduler = changed(beta_schedule="linear", rescale_betas_zero_snr=True)
    else: pipe.scheduler = changed(prediction_type="v_prediction")
    run = DreamBooth(as_base(pipe, "random"), **made)
    with pytest.raises(TrainingError, match=named): run.trainer.resume()
    run.remove()


@pytest.mark.parametrize("where", ["unet", "table", "last row of the table", "vae"])
def test_one_number_of_a_base_is_noticed(where):
    base = as_base(random_pipe("sd"))
    before, table = base_identity(base), base.pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        if where == "unet": base.denoiser.conv_out.weight.data[0, 0, 0, 0] += 1e-4
        elif where == "vae": next(base.pipe.vae.parameters()).data.view(-1)[-1] += 1e-4
        else: table.data[-1 if "last" in where else len(table) // 2, 1] += 1e-4
    named = "all weights of the " + ("VAE" if where == "vae" else "base (float32)")
    assert [k for k, v in base_identity(base).items() if before[k] != v] == [named]


def test_identity_of_a_split_or_rearranged_base(base):
    before = base_identity(base)
    run = inject_lora(base.pipe, init="pissa")
    apply_lora(base.pipe, Lora({}, {"<w>": {"text_encoder": torch.zeros(1, base.pipe.text_encoder.config.hidden_size)}}))
    base.denoiser.to(memory_format=torch.channels_last)
    assert base_identity(base) == before
    run.remove(); remove_lora(base.pipe); base.denoiser.to(memory_format=torch.contiguous_format)


def test_warnings_spell_out_control_characters(state, base, tmp_path):
    "A folder's name may hold escape sequences, which a terminal would obey"
    folder = tmp_path / "a\x1b[31mred"; folder.mkdir()
    torch.save(dict(step=1, recipe="{}", log={}), folder / "step-000001.pt")
    write_state(folder / "step-000002.pt", state)
    with pytest.warns(UserWarning, match="older version") as told: read_state(folder / "step-000001.pt")
    (folder / "step-000003.pt").write_bytes(b"junk")
    with pytest.warns(UserWarning, match="Going on from step-000002.pt") as more: assert newest_state(folder)[0].name == "step-000002.pt"
    (folder / "step-000003-00.png").write_bytes(b"junk")
    with pytest.warns(UserWarning, match="Broken previews") as last: assert read_previews(folder, 9) == []
    with pytest.warns(UserWarning, match="holds no checkpoint") as none:
        train_dreambooth(base, RED, "a sks wall", output_dir=folder / "run", resume=True, **QUICK)
    said = [str(w.message) for ws in (told, more, last, none) for w in ws if "red" in str(w.message)]
    assert len(said) >= 4 and not [s for s in said if "\x1b" in s] and all("\\x1b[31mred" in s for s in said)


def test_wordings_tell_runs_apart(base):
    "One rule for all captions, a function, or rules of their own from a dataset file"
    def examples(captions, tags=None):
        data = ConceptDataset(RED, "a toy", tags=tags); data.captions = captions
        return examples_identity(encode(base, data))["wording"]
    said = lambda p: [Said("a toy, red", Rule(TagWording(), p))]
    found = [examples(["a toy"]), examples(["a toy"], TagWording()), examples(["a toy"], TagWording(keep=2)), examples(["a toy"], drop),
             examples(said(0.)), examples(said(.5))]
    assert len(set(found)) == len(found) and examples(said(.5)) == found[-1] and examples(["a toy"], TagWording()) == found[1]


def drop(caption, rng): return ""


def test_files_that_only_look_like_checkpoints(tmp_path):
    "`step-abc.pt` ended a run with a ValueError; the millionth step is newer than the one before; a folder is no checkpoint"
    from lora_nb.states import saved_states
    from lora_nb.stopping import superfluous
    names = ["step-000002.pt", "step-999999.pt", "step-1000000.pt"]
    for n in (*names, "step-abc.pt", "step-.pt", "step-\u00b2.pt"): (tmp_path / n).write_bytes(b"")
    (tmp_path / "step-000009.pt").mkdir()
    assert [p.name for p in saved_states(tmp_path)] == names and saved_states(tmp_path / "none") == []
    assert [p.name for p in superfluous(tmp_path, 2, [])] == names[:1]

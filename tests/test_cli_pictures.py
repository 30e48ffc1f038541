"Flags that say how pictures are read reach the data set; a mask that nobody made is refused."
import shutil
import pytest
from PIL import Image
from lora_nb.cli.files import lora_ppim
from lora_nb.cli.flags import terminal
from lora_nb.cli.train import lora_dreambooth, lora_pti, lora_ti
from lora_nb.core import LoraError, data_path
from lora_nb.dataset import TagWording
from lora_nb.loading import load_base
from lora_nb.textual_inversion import TextualInversion


@pytest.fixture
def kohya(tmp_path):
    "A folder as kohya's trainers have it: 10_sks dog, 20_zwx cat"
    first, second = sorted(p for p in data_path("subjects", "teddy_bear").iterdir() if p.suffix in (".jpg", ".png"))[:2]
    for name, f in (("10_sks dog", first), ("20_zwx cat", second)):
        (tmp_path / "train" / name).mkdir(parents=True)
        shutil.copy(f, tmp_path / "train" / name)
    return tmp_path / "train"


@pytest.fixture
def made(monkeypatch):
    "Streams of the runs that were begun; none is trained"
    from lora_nb.run import TrainingRun
    seen = []
    def fit(self, resume=False):
        seen.append(self); self.remove()
        raise LoraError("enough")
    monkeypatch.setattr(TrainingRun, "fit", fit)
    return seen


ALL = ("--recursive", "--shuffle_caption", "--keep_tokens", 2, "--caption_tag_dropout_rate", .25)


def run(command, made, folder, out, *more):
    need = ("--instance_prompt", "a sks toy") if command is lora_dreambooth else ("--initializer_tokens", "toy")
    code, text = terminal(command, "--instance_data_dir", folder, "--device", "cpu", "--output_dir", out, *need, *more)
    assert code == 2 and "enough" in text, text
    return made[-1].streams[0].examples


@pytest.mark.parametrize("command", (lora_dreambooth, lora_ti, lora_pti), ids=lambda c: c.name)
def test_flags_reach_the_pictures(command, made, kohya, tmp_path):
    e = run(command, made, kohya, tmp_path / "out", *ALL, "--cache_latents_dir", tmp_path / "cache")
    assert e.wording == TagWording(True, 2, .25) and len(e) == 3 and len(e.sources.names) == 2
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_without_flags_nothing_is_reworded(made, kohya, tmp_path):
    e = run(lora_dreambooth, made, kohya / "10_sks dog", tmp_path / "out")
    assert e.wording is None and len(e) == 1 and e.captions == ["a sks toy"]
    assert run(lora_dreambooth, made, kohya, tmp_path / "out", "--recursive", "--tag_dropout", .5).wording == TagWording(False, 1, .5)


def test_folder_words_are_captions(made, kohya, tmp_path):
    e = run(lora_dreambooth, made, kohya, tmp_path / "out", "--recursive", "--folder_words")
    assert e.captions == ["sks dog", "zwx cat", "zwx cat"]


def test_the_prediction_prior_sees_the_same_pictures(made, kohya, tmp_path):
    run(lora_dreambooth, made, kohya, tmp_path / "out", "--recursive", "--with_prior_preservation", "--class_prompt", "a toy",
        "--prior", "prediction")
    assert [len(s.examples) for s in made[-1].streams] == [3, 3]


@pytest.mark.parametrize("command, words, said", [
    (lora_dreambooth, ("--keep_tokens", 1), "--shuffle_tags"), (lora_ti, ("--tag_dropout", 1.5), "at most 1"),
    (lora_ti, ("--use_mask_captioned_data",), "none of the 1 pictures has a mask"),
    (lora_pti, ("--use_face_segmentation_condition",), "none of the 1 pictures has a mask"),
    (lora_dreambooth, ("--mask_floor", .1), "none of the 1 pictures has a mask")])
def test_flags_without_effect_are_refused(command, words, said, kohya, tmp_path):
    need = ("--instance_prompt", "a sks toy") if command is lora_dreambooth else ()
    code, text = terminal(command, "--instance_data_dir", kohya / "10_sks dog", "--device", "cpu",
                          "--output_dir", tmp_path / "out", *need, *words)
    assert code == 2 and said in text, text


def test_masks_that_are_there_are_accepted(made, kohya, tmp_path):
    f = next((kohya / "10_sks dog").iterdir())
    Image.new("L", Image.open(f).size, 255).save(f.with_name(f"{f.stem}.mask.png"))
    e = run(lora_ti, made, f.parent, tmp_path / "out", "--use_mask_captioned_data")
    assert e.masks is not None


def test_tags_and_a_template_exclude_each_other(kohya):
    base = load_base("tiny-sd", device="cpu")
    with pytest.raises(LoraError, match="template"):
        TextualInversion(base, kohya, "<s1>", "toy", template="object", tags=TagWording(), recursive=True)
    with pytest.raises(LoraError, match="expected a function"): TextualInversion(base, kohya, "<s1>", "toy", tags="shuffle", recursive=True)


def test_ppim_reads_subfolders(kohya, tmp_path):
    code, text = terminal(lora_ppim, "--instance_data_dir", kohya, "--output_dir", tmp_path / "out", "--recursive", "--target_size", 64,
                          "--preset", "embedded")
    assert code == 0 and len([p for p in (tmp_path / "out").iterdir() if p.suffix == ".png"]) == 2, text

"A card's header is YAML whatever the prompt says; an upload is tried without a network."
import pytest, yaml
from lora_nb.cli.flags import terminal
from lora_nb.cli.train import lora_dreambooth
from lora_nb.core import DataError, LoraError, data_path
from lora_nb.lora import Lora
from lora_nb.model_card import MARK, model_card, push_to_hub, write_card

SUBJECT = ("--instance_data_dir", data_path("subjects", "teddy_bear"), "--instance_prompt", "a sks toy", "--device", "cpu",
           "--train_batch_size", 1, "--max_train_steps", 1)


class Hub:
    def __init__(self, error=None): self.calls, self.error = [], error
    def create_repo(self, repo, **kw):
        if self.error: raise self.error
        self.calls.append((repo, kw)); return f"https://huggingface.co/{repo}"
    def upload_folder(self, **kw): self.calls.append(kw)


@pytest.mark.parametrize("prompt", ["a sks toy", "a: b # c", "---\nlicense: mit\n---", "'\"\\ <script>x</script>", "- [x](y) `z`", "é 🐻", "yes"])
def test_any_prompt_is_quoted(prompt):
    text = model_card(Lora(metadata=dict(base="acme/base", instance_prompt=prompt, trigger=prompt)))
    head, body = text[4:].split(f"\n---\n{MARK}")
    head = yaml.safe_load(head)
    assert head["instance_prompt"] == prompt and head["base_model"] == "acme/base" and "license" not in head
    assert "    " + " ".join(prompt.split()) in body.splitlines()


@pytest.mark.parametrize("odd", ("```\n---\nlicense: mit\n---\n", "a\x1b[2J: b", "a\x85---\x85b", "half \ud83d", "\r\n---\r\n# x"))
def test_no_prompt_breaks_the_card(odd, tmp_path):
    "What YAML or UTF-8 cannot keep is spelled out; control characters reach no terminal"
    from huggingface_hub import ModelCard
    path = write_card(Lora(metadata=dict(base=odd, instance_prompt=odd, trigger=odd)), tmp_path)
    card = ModelCard(path.read_bytes().decode())
    assert card.data.instance_prompt == odd.replace("\x85", "\\x85").replace("\ud83d", "\\ud83d") and card.data.license is None
    assert card.text.lstrip().startswith(MARK) and "\x1b" not in card.text and "\x85" not in card.text
    known = "    ", "# LoRA", "Base:", "Prompt:", "Trigger:", "File:"
    assert not [l for l in card.text.split(MARK)[1].splitlines() if l and not l.startswith(known)]


def test_a_folder_is_no_id_and_its_path_is_not_told(tmp_path):
    text = model_card(Lora(metadata=dict(base=str(tmp_path / "mine"), trigger="x")))
    assert "base_model" not in text and str(tmp_path) not in text and "    mine" in text


def test_upload(tmp_path):
    hub = Hub()
    with pytest.raises(DataError, match="lora.safetensors, README.md"): push_to_hub(tmp_path, "a/b", ["lora.safetensors"], hub)
    (tmp_path / "lora.safetensors").write_bytes(b"x")
    write_card(Lora(), tmp_path); write_card(Lora(), tmp_path)
    with pytest.raises(LoraError, match="repository"): push_to_hub(tmp_path, "a/b/c", ["lora.safetensors"], hub)
    assert not hub.calls
    assert push_to_hub(tmp_path, "a/b", ["lora.safetensors"], hub).endswith("a/b")
    assert hub.calls[0][0] == "a/b" and hub.calls[1]["allow_patterns"] == ["lora.safetensors", "README.md"]
    with pytest.raises(LoraError, match="files are in"): push_to_hub(tmp_path, "a/b", ["lora.safetensors"], Hub(OSError("no network")))
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(DataError, match="kept"): write_card(Lora(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_command_uploads(tmp_path, monkeypatch):
    import huggingface_hub
    hub = Hub()
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda self, *a, name=name, **kw: getattr(hub, name)(*a, **kw))
    code, text = terminal(lora_dreambooth, *SUBJECT, "--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "me/toy")
    assert code == 0 and "Uploaded: https://huggingface.co/me/toy" in text and hub.calls[1]["repo_id"] == "me/toy", text
    assert "instance_prompt: a sks toy" in (tmp_path / "out/README.md").read_text()
    for words, said in ((("--hub_model_id", "me/toy"), "--push_to_hub"), (("--push_to_hub", "--hub_model_id", "a b"), "repository")):
        code, text = terminal(lora_dreambooth, *SUBJECT, "--output_dir", tmp_path / "no", *words)
        assert code == 2 and said in text, text

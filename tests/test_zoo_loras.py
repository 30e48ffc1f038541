"The bundled LoRAs: each file says what it is, and a name that is not bundled is refused with a hint."
import pytest
from lora_nb.core import DataError
from lora_nb.zoo.loras import BASES, BUNDLED, bundled_lora, bundled_path, class_prompts, train_bundled
from lora_nb.zoo.world import CLASS_OF


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", BUNDLED)
def test_a_file_says_what_it_teaches_and_on_which_base(name, base):
    lora = bundled_lora(name, base)
    assert (lora.metadata["concept"], lora.metadata["trigger"], lora.metadata["base"]) == (name, BUNDLED[name], base)
    assert lora.metadata["kind"] == CLASS_OF.get(name, "style")          # the class noun, or style
    assert (BUNDLED[name] in lora.embeddings) == BUNDLED[name].startswith("<")


@pytest.mark.parametrize("call", [bundled_lora, bundled_path, lambda name: train_bundled(None, name)])
def test_a_misspelt_name(call):
    with pytest.raises(DataError, match="No bundled LoRA 'nyon'.*Did you mean 'neon'"): call("nyon")


def test_another_base():
    with pytest.raises(DataError, match="expected tiny-sd or tiny-sd3"): bundled_lora("neon", "sdxl")


def test_class_prompts_differ_in_background_or_object():
    assert len(set(class_prompts("face"))) == len(set(class_prompts("style"))) == 8
    assert class_prompts("animal")[0].startswith("an animal on")

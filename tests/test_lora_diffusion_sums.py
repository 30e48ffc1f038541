"LoRAManager, lora_join, lora_add, svd_distill and collapse_lora: what readers of the chapter skip."
import pytest
import safetensors
import torch

from helpers_ground import close, lora_for
from lora_nb import (LoRAManager, collapse_lora, extract_lora_ups_down, inject_trainable_lora_extended, lora_add, lora_join,
                     monkeypatch_remove_lora, svd_distill)
from lora_nb.core import FormatError, LoraError, data_path
from lora_nb.injection import apply_lora, inject_lora, remove_lora
from lora_nb.lora import Lora
from lora_nb.random_pipes import random_pipe
from lora_nb.worn import branches, places


@pytest.fixture(scope="module")
def tiny(): return random_pipe("sd")


def test_a_manager_of_unequal_loras(tiny):
    first, second = lora_for(tiny, 2, "unet", "text_encoder"), lora_for(tiny, 3, "unet", seed=1)
    first = Lora(first.layers, {"<cat>": {"text_encoder": torch.randn(2, 32)}}, {"trigger": "<cat>"})
    second = Lora(second.layers, metadata={"trigger": "moss"})
    manager = LoRAManager([first, second], tiny)
    assert manager.ranklist == [2, 3] and manager.token_size_list == [1, 0]
    assert manager.prompt("a <1> in <2>") == "a <s0-0> in moss" and manager.prompt(None) is None
    with pytest.raises(LoraError, match="1 scales for 2"): manager.tune([1])
    manager.tune([.5, -1])
    for n, (m,) in branches(tiny, manager.name).items():
        want = .5 * first.layers[n].delta() - (second.layers[n].delta() if n in second.layers else 0)
        assert close(m.delta_weight(), want)
    manager.tune([1, 1]); manager.remove()
    assert not branches(tiny) and "<s0-0>" not in tiny.tokenizer.get_vocab()


def test_files_that_cannot_be_joined_by_number(tiny, tmp_path):
    lora = lora_for(tiny, 2, "unet")
    lora.save(tmp_path / "numbered.safetensors", format="lora_diffusion", base=tiny)
    lora.save(tmp_path / "peft.safetensors")
    opened = lambda *names: [safetensors.safe_open(tmp_path / f"{n}.safetensors", "pt") for n in names]
    with pytest.raises(FormatError, match="compose"): lora_join(opened("numbered", "peft"))
    other = lora_for(random_pipe("sdxl"), 2, "unet")
    other.save(tmp_path / "other.safetensors", format="lora_diffusion", base=random_pipe("sdxl"))
    with pytest.raises(FormatError, match="differently"): lora_join(opened("numbered", "other"))
    tensors, about, ranks, words = lora_join(opened("numbered", "numbered"))
    assert ranks == [2, 2] and words == [0, 0] and about["unet:0:rank"] == "4"


def test_the_old_command_still_knows_its_modes(tmp_path):
    neon = str(data_path("loras", "neon.safetensors"))
    with pytest.raises(LoraError, match="Did you mean 'lpl'"): lora_add(neon, neon, str(tmp_path / "x.safetensors"), mode="lp")
    path = lora_add(neon, neon, str(tmp_path / "half.safetensors"), .25, .25)
    n, f = next(iter(Lora.load(neon).layers.items()))
    assert close(Lora.load(path).layers[n].delta().float(), .5 * f.delta().float(), 1e-2)


def test_distilling_from_folder_to_file(tmp_path):
    base, tuned = random_pipe("sd"), random_pipe("sd")
    torch.manual_seed(0)
    w = tuned.unet.mid_block.attentions[0].proj_in.weight
    w.data += torch.outer(torch.randn(len(w)), torch.randn(w[0].numel())).view_as(w)
    for p, n in ((base, "base"), (tuned, "tuned")): p.save_pretrained(tmp_path / n, safe_serialization=True)
    made = svd_distill(tmp_path / "tuned", tmp_path / "base", 1, 1., save_path=str(tmp_path / "x.safetensors"), dtype=torch.float32)
    (name, f), = Lora.load(tmp_path / "x.safetensors").layers.items()
    assert name == "unet.mid_block.attentions.0.proj_in" and list(made.layers) == [name]
    assert close(f.delta(), (w - base.unet.mid_block.attentions[0].proj_in.weight).detach(), 1e-4)


# Collapsing: once is once

def near(a, b, eps=1e-5): return (a - b).norm() <= eps * b.norm()

@torch.no_grad()
def collapses(net, x):
    "Collapse twice: the first time the output stays, the second time everything stays"
    before = net.eval()(*x)[0]
    collapse_lora(net)
    once = {n: p.clone() for n, p in net.state_dict().items()}
    assert near(net(*x)[0], before)
    collapse_lora(net)
    assert all(torch.equal(p, once[n]) for n, p in net.state_dict().items())
    monkeypatch_remove_lora(net)
    assert near(net(*x)[0], before)

def inputs(unet): return torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 7, unet.config.cross_attention_dim)


@pytest.mark.parametrize("kw", [{}, dict(dora=True), dict(rslora=True, alpha=2.), dict(init="pissa"), dict(dropout=.5)], ids=str)
def test_collapse_in_every_mode_of_the_branches(kw):
    net = random_pipe().unet
    for m in inject_lora(net, "extended", rank=2, **kw).layers.values(): m.lora_up.weight.data += .1
    collapses(net, inputs(net))


def test_collapse_with_custom_targets():
    net = random_pipe().unet
    inject_trainable_lora_extended(net, {"ResnetBlock2D", "GEGLU"}, r=2)
    pairs = extract_lora_ups_down(net, {"ResnetBlock2D", "GEGLU"})
    assert {type(up).__name__ for up, _ in pairs} == {"Conv2d", "Linear"}
    for up, _ in pairs: up.weight.data += .1
    collapses(net, inputs(net))


def test_collapse_between_a_merged_lora_and_a_selector():
    net, name = random_pipe().unet, "mid_block.resnets.0.conv1"
    layer = lambda: places(net)[name].module
    root = layer()
    old = root.weight.detach().clone()
    below = inject_lora(net, ["ResnetBlock2D"], rank=3)
    for p in below.params(): p.data.normal_(std=.1)
    merged = below.lora(); below.remove()
    apply_lora(net, merged, .5, name="merged")
    for m in inject_lora(net, ["ResnetBlock2D"], rank=2).layers.values():
        m.lora_up.weight.data += .1
        m.set_selector_from_diag(torch.tensor([1., 3.]))
    plus = layer().delta_weight()
    for _ in range(2): collapse_lora(net)
    assert close(root.weight, old + .5 * merged.layers[f"unet.{name}"].delta() + plus)
    remove_lora(net, "merged")
    assert close(root.weight, old + plus)
    monkeypatch_remove_lora(net)
    with pytest.raises(LoraError, match="No lora injected"): extract_lora_ups_down(net)

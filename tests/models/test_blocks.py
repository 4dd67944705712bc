"""Blocks: found by name, or refused by name."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

from plain_models import Decoder, Layer
from secateur.core.errors import InputError
from secateur.models.blocks import evaluating, find_blocks


def test_names_are_those_of_the_model(tiny_llama):
    blocks = find_blocks(tiny_llama)
    assert blocks.names == ("model.layers.0", "model.layers.1")
    assert [tiny_llama.get_submodule(name) for name in blocks.names] == blocks.modules
    assert len(blocks) == 2


def test_evaluating_restores_modes_after_an_error():
    model = Decoder().train()
    model.norm.eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert not model.norm.training and model.stack[0].dropout.training


def tiny_t5():
    config = transformers.T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=2, num_heads=2, vocab_size=64)
    return transformers.T5ForConditionalGeneration(config)


def tiny_vision():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    return transformers.ViTModel(config)


def tiny_vision_and_text():
    part = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**part, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**part, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (tiny_t5, r"T5ForConditionalGeneration \(model type `t5`\) is an encoder-decoder"),
        (tiny_vision, r"ViTModel \(model type `vit`\) takes `pixel_values`, not token ids"),
        (tiny_vision_and_text, r"CLIPModel \(model type `clip`\) has more than a text decoder .*`vision_config`"),
        (lambda: Layer(), "Layer has no list of blocks"),
        (
            lambda: nn.ModuleDict({"one": Decoder(), "two": Decoder(2)}),
            "several lists of blocks .*`one.stack`, `two.stack`",
        ),
        (lambda: Decoder(nn.ModuleList([Layer()] * 3)), "uses one block several times in `stack`"),
        (lambda: Decoder(nn.ModuleList()), "Decoder has no list of blocks"),
    ],
    ids=["encoder-decoder", "vision", "vision-and-text", "no-list", "two-lists", "one-block-repeated", "empty-list"],
)
def test_what_has_no_plain_list_of_decoder_blocks_is_refused_by_name(build, what):
    with pytest.raises(InputError, match=what):
        find_blocks(build())


def test_an_unmerged_adapter_is_refused_by_name(tiny_llama):
    tiny_llama.model.layers[0].mlp.up_proj.base_layer = nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"`model.layers.0.mlp.up_proj` .* is wrapped by an adapter") as caught:
        find_blocks(tiny_llama)
    assert "merge_and_unload" in str(caught.value.hint)

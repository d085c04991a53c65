"""Models come trainable, without noise, with agreeing special ids, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rlhf_lightning.models.loading import (
    ModelConfig,
    context_length,
    embedding_rows,
    ensure_pad_and_eos,
    eos_token_ids,
    load_causal_lm,
    load_tokenizer,
)
from rlhf_lightning.models.tokenizers import character_tokenizer

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
DIGITS = "0123456789+="


def random_config(**options: Any) -> ModelConfig:
    fields = {**LLAMA, **options.pop("fields", {})}
    return ModelConfig(config=fields, characters=DIGITS, **options)


def load(config: ModelConfig) -> Any:
    return load_causal_lm(config, load_tokenizer(config))


def save(folder: Path, **options: Any) -> Path:
    config = random_config(**options)
    load(config).save_pretrained(folder)
    load_tokenizer(config).save_pretrained(folder)
    return folder


def test_a_random_model_takes_vocabulary_and_special_ids_from_the_tokenizer() -> None:
    config = random_config()
    tokenizer = load_tokenizer(config)
    model = load_causal_lm(config, tokenizer)
    assert embedding_rows(model) == len(tokenizer) == 15
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (0, 1)
    assert context_length(model) == 24
    assert model.dtype == torch.float32
    assert model.training


def test_fields_that_are_given_win_over_the_tokenizer() -> None:
    model = load(random_config(fields={"vocab_size": 64, "eos_token_id": 7}, dtype="bfloat16"))
    assert embedding_rows(model) == 64
    assert model.config.eos_token_id == 7
    assert model.dtype == torch.bfloat16


def test_the_seed_decides_the_weights_and_the_global_generator_does_not_notice() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (load(random_config(init_seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.lm_head.weight for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_saved_model_comes_back_ready_to_train(tmp_path: Path) -> None:
    folder = save(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = load(ModelConfig(path=str(folder)))
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.lm_head.weight, load(random_config()).lm_head.weight)


@pytest.mark.parametrize("from_disk", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {
            "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24,
            "attn_pdrop": 0.4, "resid_pdrop": 0.4, "embd_pdrop": 0.4,
        },
        {
            "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
            "num_local_experts": 2, "attention_dropout": 0.4, "router_jitter_noise": 0.4,
        },
    ],
    ids=lambda fields: fields["model_type"],
)  # fmt: skip
def test_nothing_is_random_in_training_mode(
    fields: dict[str, Any], from_disk: bool, tmp_path: Path
) -> None:
    config = ModelConfig(config=fields, characters=DIGITS)
    if from_disk:
        tokenizer = load_tokenizer(config)
        defaults = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
        noisy = AutoConfig.for_model(**{**fields, **defaults})
        AutoModelForCausalLM.from_config(noisy).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        config = ModelConfig(path=str(tmp_path))
    model = load(config)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} <= {0.0}
    ids = torch.tensor([[3, 4, 5, 6]])
    assert model.training
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(random_config(gradient_checkpointing=checkpointing, dtype="float64"))
        assert model.is_activation_checkpointing == checkpointing
        model(torch.tensor([[3, 4, 5]]), use_cache=False).logits.square().sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    assert gradients[0].abs().max() > 0


def test_attention_implementation_is_taken() -> None:
    assert load(random_config(attn_implementation="eager")).config._attn_implementation == "eager"
    assert load(random_config()).config._attn_implementation == "sdpa"


class TestSpecialTokens:
    def test_a_missing_pad_token_becomes_eos(self) -> None:
        tokenizer = character_tokenizer(DIGITS)
        tokenizer.pad_token = None
        ensure_pad_and_eos(tokenizer)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1

    def test_a_missing_eos_token_is_an_error_that_says_what_to_set(self) -> None:
        tokenizer = character_tokenizer(DIGITS)
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match=r"no EOS token.*Set eos_token"):
            ensure_pad_and_eos(tokenizer)

    def test_eos_ids_are_the_union_of_model_and_tokenizer(self) -> None:
        config = random_config()
        tokenizer = load_tokenizer(config)
        model = load_causal_lm(config, tokenizer)
        assert eos_token_ids(model, tokenizer) == (1,)
        model.generation_config.eos_token_id = [9, 4]
        assert eos_token_ids(model, tokenizer) == (1, 4, 9)
        model.generation_config.eos_token_id = None
        assert eos_token_ids(model, tokenizer) == (1,)

    def test_a_chat_template_is_text_or_a_file(self, tmp_path: Path) -> None:
        text = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        (tmp_path / "chat.jinja").write_text(text, encoding="utf-8")
        for template in (text, str(tmp_path / "chat.jinja")):
            assert load_tokenizer(random_config(chat_template=template)).chat_template == text
        with pytest.raises(ValueError, match="neither a file nor Jinja"):
            load_tokenizer(random_config(chat_template="chatml.jinja"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "exactly one of path and config, got neither"),
            ({"path": "x", "config": LLAMA}, "exactly one of path and config, got both"),
            ({"config": LLAMA}, "brings no tokenizer"),
            ({"path": "x", "dtype": "fp32"}, "'fp32'; it must be one of"),
            ({"path": "x", "tokenizer": "y", "characters": "z"}, "both tokenizer and characters"),
        ],
    )
    def test_of_contradictions(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ModelConfig(**options)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"model_type": "lama"}, "'lama'.*Did you mean 'llama'"),
            ({"hiden_size": 8}, "no field 'hiden_size'.*Did you mean 'hidden_size'"),
            ({"model_type": None}, "no model_type"),
        ],
    )
    def test_of_unknown_names_with_the_nearest_one(
        self, fields: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            load(random_config(fields=fields))

    def test_of_a_vocabulary_smaller_than_the_tokenizers(self) -> None:
        with pytest.raises(ValueError, match=r"ids up to 14.*only 5 rows.*vocab_size.*15"):
            load(random_config(fields={"vocab_size": 5}))

    def test_of_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"model.path is .*nowhere.*not a folder"):
            load_tokenizer(ModelConfig(path=str(tmp_path / "nowhere")))

    def test_of_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"model.path .* could not be loaded"):
            load_causal_lm(ModelConfig(path=str(tmp_path)), load_tokenizer(random_config()))

    def test_of_pickled_weights(self, tmp_path: Path) -> None:
        folder = save(tmp_path)
        (folder / "model.safetensors").unlink()
        torch.save(load(random_config()).state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            load(ModelConfig(path=str(folder)))

    def test_of_a_checkpoint_without_the_head(self, tmp_path: Path) -> None:
        folder = save(tmp_path)
        AutoModel.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
        with pytest.raises(ValueError, match=r"lacks the weights \['lm_head.weight'\]"):
            load(ModelConfig(path=str(folder)))


def test_the_real_models_load(shared_data: Path) -> None:
    stories = ModelConfig(path=str(shared_data / "models" / "stories260k"))
    tokenizer = load_tokenizer(stories)
    model = load_causal_lm(stories, tokenizer)
    assert sum(p.numel() for p in model.parameters()) == 260_032
    assert eos_token_ids(model, tokenizer) == (1, 2)
    assert context_length(model) == 512
    babyllama = ModelConfig(path=str(shared_data / "models" / "babyllama105"))
    assert context_length(load(babyllama)) == 256

"""What the in-process engine promises beside the contract of all engines."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from rlhf_lightning.core.interrupt import Stopped, interruptible, interrupts
from rlhf_lightning.models.loading import ModelConfig, load_causal_lm, load_tokenizer
from rlhf_lightning.models.policy import CausalPolicy
from rlhf_lightning.models.tokenizers import character_tokenizer
from rlhf_lightning.rollout.hf import HFEngine
from rlhf_lightning.types import Completion, SamplingParams

TOKENIZER = character_tokenizer("0123456789+=")
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [8], [9, 10, 11]]
SAMPLING = SamplingParams(n=2, max_new_tokens=10, temperature=1.3)
COMMON: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
GATED = {**COMMON, "intermediate_size": 32, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GATED),
    "gpt2, learned positions": ("gpt2", COMMON),
    "qwen3": ("qwen3", {**GATED, "head_dim": 8}),
    "mistral, window of 4": ("mistral", {**GATED, "sliding_window": 4}),
    "gemma2, mixed windows and softcap": (
        "gemma2",
        {**GATED, "head_dim": 4, "sliding_window": 4, "final_logit_softcapping": 5.0},
    ),
    "cohere, scaled": ("cohere", {**GATED, "logit_scale": 0.5}),
    "bloom, alibi from the mask": (
        "bloom",
        {"vocab_size": len(TOKENIZER), "hidden_size": 16, "n_layer": 2, "n_head": 4,
         "eos_token_id": 1, "pad_token_id": 0},
    ),
}  # fmt: skip


def build(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model_type, fields = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **fields), dtype=dtype, **options
        )
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.4)
    return model.train()


def engine_for(model: Any, **options: Any) -> HFEngine:
    engine = HFEngine(**options)
    engine.bind(model, TOKENIZER)
    return engine


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def rows_of(groups: list[list[Completion]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Completions as the trainer sees them: padded on the right, with their log-probabilities."""
    flat = [completion for group in groups for completion in group]
    width = max(len(c.prompt_ids) + len(c.token_ids) for c in flat)
    input_ids = torch.zeros(len(flat), width, dtype=torch.long)
    attention_mask, loss_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids).bool()
    for i, c in enumerate(flat):
        ids = torch.tensor(c.prompt_ids + c.token_ids)
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        loss_mask[i, len(c.prompt_ids) : len(ids)] = True
    return input_ids, attention_mask, loss_mask


@pytest.mark.parametrize("name", MODELS)
def test_the_trainer_agrees_with_the_sampler(name: str) -> None:
    """Cached, left-padded, compacted decoding against one padded forward of the policy."""
    model = build(name)
    sampling = dataclasses.replace(SAMPLING, n=8)
    groups = engine_for(model).generate(PROMPTS, sampling, seeds=range(3))
    input_ids, attention_mask, loss_mask = rows_of(groups)
    with torch.no_grad():
        ours, *_ = CausalPolicy(model.eval())(
            input_ids, attention_mask, loss_mask, temperature=SAMPLING.temperature
        )
    sampled = [value for group in groups for c in group for value in c.logprobs]
    torch.testing.assert_close(torch.tensor(sampled), ours[loss_mask], rtol=1e-4, atol=2e-5)
    assert len({len(c.token_ids) for group in groups for c in group}) > 1  # rows were dropped


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_long_completions_outgrow_the_spare_room(attention: str) -> None:
    model = build(dtype=torch.float64, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    greedy = SamplingParams(max_new_tokens=50, temperature=0.0)
    engine = HFEngine()
    engine.bind(model, TOKENIZER)
    prompts = [[3, 4, 5], [6, 7, 8]]  # without padding: float64 eager attention fails on it
    groups = engine.generate(prompts, greedy, seeds=[0, 1])
    model.eval()
    for prompt, group in zip(prompts, groups, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=50, eos_token_id=1
        )
        assert group[0].token_ids == theirs[0, 3:].tolist()


class Spy:
    """Records the shape of every batch that the model reads."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


def test_each_distinct_prompt_is_read_once() -> None:
    model = build()
    spy = Spy(model)
    sampling = SamplingParams(n=4, max_new_tokens=3)
    engine_for(model).generate([*PROMPTS, PROMPTS[0]], sampling, seeds=range(4))
    assert spy.shapes[0] == (3, 7)
    assert spy.shapes[1] == (16, 1)


def test_finished_rows_leave_the_batch_and_the_last_token_is_not_read() -> None:
    model = build()
    spy = Spy(model)
    sampling = SamplingParams(n=16, max_new_tokens=20)
    groups = engine_for(model).generate(PROMPTS, sampling, seeds=range(3))
    lengths = [len(c.token_ids) for group in groups for c in group]
    rows = [shape[0] for shape in spy.shapes[1:]]
    assert rows == sorted(rows, reverse=True)
    for step, count in enumerate(rows, start=1):
        running = sum(length > step for length in lengths)
        assert running <= count <= max(1, running / 0.8)
    assert len(rows) == max(lengths) - 1


def test_the_memory_bound_holds() -> None:
    model = build()
    spy = Spy(model)
    whole = tokens(engine_for(model).generate(PROMPTS, SAMPLING, seeds=range(3)))
    spy.shapes.clear()
    parts = tokens(
        engine_for(model, max_batch_tokens=36).generate(PROMPTS, SAMPLING, seeds=range(3))
    )
    # widths of 11, 13 and 17 with 10 new tokens: 3 rows of 11 do not go with one of 13
    assert parts == whole
    assert max(rows for rows, _ in spy.shapes) == 2
    assert sum(width > 1 or rows < 2 for rows, width in spy.shapes) >= 2


def test_weights_are_shared_not_copied() -> None:
    model = build()
    engine = engine_for(model)
    greedy = SamplingParams(max_new_tokens=6, temperature=0.0)
    before = tokens(engine.generate(PROMPTS, greedy, seeds=range(3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    engine.update_weights((), version=7)
    after = engine.generate(PROMPTS, greedy, seeds=range(3))
    assert engine.shares_weights
    assert tokens(after) != before
    assert after[0][0].weight_versions == [(7, 0, len(after[0][0].token_ids))]


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(KeyError, match=r"'lm_head\.wieght'"):
        engine_for(build()).update_weights([("lm_head.wieght", torch.zeros(1))], version=1)


def test_logits_that_are_not_numbers_are_an_error_and_modes_come_back() -> None:
    model = build()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="logits for prompt 1 are not numbers"):
        engine_for(model).generate(PROMPTS, SAMPLING, seeds=range(3))
    assert all(module.training for module in model.modules())


def test_use_before_bind_and_after_close_says_so() -> None:
    engine = HFEngine()
    with pytest.raises(RuntimeError, match="Call bind"):
        engine.generate(PROMPTS, SAMPLING, seeds=range(3))
    engine.bind(build(), TOKENIZER)
    engine.close()
    with pytest.raises(RuntimeError, match="Call bind"):
        engine.update_weights((), version=1)


def test_models_without_a_key_value_cache_are_refused() -> None:
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=15, hidden_size=8, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*LinearAttentionLayer"):
        HFEngine().bind(mamba, TOKENIZER)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=15, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="no causal decoder"):
        HFEngine().bind(t5, TOKENIZER)
    with pytest.raises(ValueError, match="max_batch_tokens is 0"):
        HFEngine(max_batch_tokens=0)


def test_a_real_model_tells_a_story(shared_data: Path) -> None:
    config = ModelConfig(path=str(shared_data / "models" / "stories260k"))
    tokenizer = load_tokenizer(config)
    model = load_causal_lm(config, tokenizer)
    engine = HFEngine()
    engine.bind(model, tokenizer)
    starts = ["Once upon a time, there was", "The little dog"]
    prompts = [tokenizer(start).input_ids for start in starts]
    sampling = SamplingParams(n=4, max_new_tokens=60, temperature=0.8, top_p=0.95)
    groups = engine.generate(prompts, sampling, seeds=[0, 1])
    texts = [tokenizer.decode(c.token_ids) for group in groups for c in group]
    assert len(set(texts)) == 8
    assert sum(" the " in text for text in texts) >= 4
    assert sum(sum(c.logprobs) / len(c.logprobs) for g in groups for c in g) / 8 > -2.0


def test_a_real_character_model_agrees_with_the_trainer(shared_data: Path) -> None:
    config = ModelConfig(path=str(shared_data / "models" / "babyllama105"))
    tokenizer = load_tokenizer(config)
    model = load_causal_lm(config, tokenizer)
    engine = HFEngine()
    engine.bind(model, tokenizer)
    prompts = [tokenizer(text).input_ids for text in ("Once upon", "Lily and Tom went to the ")]
    sampling = SamplingParams(n=4, max_new_tokens=40, temperature=0.9)
    groups = engine.generate(prompts, sampling, seeds=[0, 1])
    input_ids, attention_mask, loss_mask = rows_of(groups)
    with torch.no_grad():
        ours, *_ = CausalPolicy(model)(input_ids, attention_mask, loss_mask, temperature=0.9)
    sampled = torch.tensor([value for group in groups for c in group for value in c.logprobs])
    torch.testing.assert_close(sampled, ours[loss_mask], rtol=1e-4, atol=2e-5)


def sharded_rank(rank: int, folder: str) -> None:
    """Rank 0 has long completions, rank 1 one that ends at once and then nothing to do."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard

    model = build(dtype=torch.float64)
    prompts = PROMPTS if rank == 0 else PROMPTS[:1]
    sampling = SAMPLING if rank == 0 else SamplingParams(n=1, max_new_tokens=1)
    seeds = list(range(len(prompts)))
    expected = tokens(engine_for(model).generate(prompts, sampling, seeds=seeds))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    engine = engine_for(model)
    assert tokens(engine.generate(prompts, sampling, seeds=seeds)) == expected
    assert tokens(engine.generate([], sampling, seeds=[])) == []
    # one that was told to stop stops all of them between the same two calls of the model
    generated: list[int] = []
    with pytest.raises(Stopped), interruptible():
        engine.generate(
            prompts,
            sampling,
            seeds=seeds,
            on_progress=lambda *_: (generated.append(1), rank == 1 and interrupts.tell(Stopped())),
        )
    Path(folder, f"done{rank}").touch()
    dist.barrier()  # a rank that leaves early closes the other's connection
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_of_a_sharded_model_wait_for_each_other(tmp_path: Path) -> None:
    multiprocessing.spawn(sharded_rank, args=(str(tmp_path),), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done0", "done1"]

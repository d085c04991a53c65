"""Several sets as one: every row has a category, and weights say how often each comes up."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from tiny import Sums, grpo, quiet_trainer, rollouts, sequences, sft

from rlhf_lightning.data import PromptMixture, PromptSource, SFTDataModule, ValidationConfig
from rlhf_lightning.data.mixture import (
    find_categories,
    members_by_category,
    owners_of_rows,
    weighted_epoch,
)


class Rows(PromptSource):
    def __init__(self, *rows: dict[str, Any]) -> None:
        self.rows = list(rows)

    def load(self) -> list[dict[str, Any]]:
        return self.rows


def two(**weights: float) -> PromptMixture:
    """Three small sums and 40 larger ones."""
    large = Rows(*Sums(100).load()[60:])
    return PromptMixture({"small": Sums(3), "large": large}, weights or None)


def test_rows_carry_the_name_of_their_source() -> None:
    mixture = two()
    rows = mixture.load()
    assert [row["category"] for row in rows] == ["small"] * 3 + ["large"] * 40
    assert [row["prompt"] for row in rows[:3]] == ["0+0=", "0+1=", "0+2="]
    assert "category" not in mixture.sources["small"].load()[0]
    assert mixture.weights is None
    assert PromptMixture({"a": Rows({"prompt": "1", "category": "a"})}).load()[0]["prompt"] == "1"


def test_weights_are_normalised() -> None:
    assert two(large=1, small=3).weights == {"small": 0.75, "large": 0.25}


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ({}, None, r"sources is \{\}; it must name at least one"),
        (["a"], None, "sources is .* it must name"),
        ({"": Sums()}, None, "sources has the key ''"),
        ({"a": "rows.jsonl"}, None, r"sources\.a is str; it must be a PromptSource"),
        ({"a": Sums()}, {"b": 1}, r"weights names \['b'\], and sources has only \['a'\]"),
        ({"a": Sums(), "b": Sums()}, {"a": 1}, r"weights has none for \['b'\]"),
        ({"a": Sums()}, {"a": 0}, r"weights\.a is 0; it must be a positive number"),
        ({"a": Sums()}, {"a": -1.0}, r"weights\.a is -1\.0"),
        ({"a": Sums()}, {"a": float("inf")}, r"weights\.a is inf"),
        ({"a": Sums()}, {"a": float("nan")}, r"weights\.a is nan"),
        ({"a": Sums()}, {"a": True}, r"weights\.a is True"),
        ({"a": Sums()}, [1], r"weights is \[1\]; it must be a mapping"),
    ],
)
def test_bad_arguments_are_named(sources: Any, weights: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        PromptMixture(sources, weights)


def test_bad_sources_are_named() -> None:
    with pytest.raises(ValueError, match=r"sources\.b: the source has no rows"):
        PromptMixture({"a": Sums(), "b": Rows()}).load()
    with pytest.raises(ValueError, match=r"sources\.a, row 2: .*'category' of its own \('x'\)"):
        PromptMixture({"a": Rows({"prompt": "1"}, {"prompt": "2", "category": "x"})}).load()


def test_weights_on_held_out_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"validation\.prompts\.weights is .* taken once"):
        ValidationConfig(two(small=1, large=1))
    with pytest.raises(ValueError, match=r"validation\.weights is"):
        SFTDataModule(Sums(), validation=two(small=1, large=1))
    SFTDataModule(Sums(), validation=two())


# Epochs of supervised training


sizes = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=1)


@given(sizes=sizes, raw=st.lists(st.floats(0.1, 5), min_size=4, max_size=4), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_epochs_keep_the_shares_and_use_rows_evenly(
    sizes: dict[str, int], raw: list[float], seed: int
) -> None:
    total = sum(sizes.values())
    starts = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
    members = {name: torch.arange(starts[name], starts[name] + n) for name, n in sizes.items()}
    weights = dict(zip(sizes, raw, strict=False))
    weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    seen: Counter[int] = Counter()
    for epoch in range(4):
        rows = weighted_epoch(members, weights, seed, epoch)
        assert len(rows) == total
        assert torch.equal(rows, weighted_epoch(members, weights, seed, epoch))
        seen.update(rows.tolist())
        for name, places in members.items():
            count = int(torch.isin(rows, places).sum())
            assert abs(count - weights[name] * total) < 1
            times = [seen[int(place)] for place in places]
            assert max(times) - min(times) <= 1


class Seen(Callback):
    def __init__(self) -> None:
        self.prompts: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.prompts += [tuple(row) for row in batch.input_ids.tolist()]


def test_a_run_trains_on_the_shares(tmp_path: Path) -> None:
    seen = Seen()
    data = sequences(dataset=two(small=2, large=1), batch_size=10)
    module = sft()
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[seen]).fit(module, data)
    first = [str(module.tokenizer.decode(list(row)))[0] for row in seen.prompts]
    assert (first[:43].count("0"), first[43:].count("0")) == (29, 29)
    assert len(first) == 86
    assert first[:43] != first[43:]


def test_a_row_of_a_category_without_a_weight_is_named() -> None:
    source = two(small=1, large=1)
    with pytest.raises(ValueError, match="a row has the category 'x', for which there is no weigh"):
        members_by_category(source, [{"category": "small"}, {"category": "x"}])


def test_a_category_of_which_nothing_is_left_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "1+" * 40, "completion": "1"}]
    mixture = PromptMixture({"a": Sums(40), "long": Rows(*rows)}, {"a": 1, "long": 1})
    with pytest.raises(ValueError, match="no row of the category 'long' is left"):
        quiet_trainer(tmp_path, max_epochs=1).fit(
            sft(), sequences(dataset=mixture, too_long="drop")
        )


# Rows are counted over all sources


def test_whose_rows_are_whose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = Rows({"prompt": "1+" * 40, "completion": "1"})
    mixture = PromptMixture({"small": Sums(3), "large": Sums(40), "long": long})
    owners = "rows 1 to 3 are of small, 4 to 43 of large, 44 to 44 of long"
    assert owners_of_rows(mixture, mixture.load()) == owners
    assert not owners_of_rows(Sums(3), Sums(3).load())
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    for module, data in (
        (grpo(), lambda how: rollouts(prompts=mixture, filters={"too_long": how})),
        (sft(), lambda how: sequences(dataset=mixture, too_long=how)),
    ):
        with pytest.raises(ValueError, match=rf"\(row 44\) are longer .*\({owners}\)$"):
            trainer.fit(module, data("error"))
        trainer.fit(module, data("drop"))
        assert owners in capsys.readouterr().out


# Figures by category


def test_categories_that_cannot_be_shown_are_warned_of() -> None:
    rows = [{"category": "a"}, {"category": 1}, {"category": None}, {}]
    assert find_categories(rows, "prompts") == {"a", "1"}
    assert find_categories([{}], "prompts") == frozenset()
    assert len(find_categories([{"category": k} for k in range(50)], "prompts")) == 50
    with pytest.warns(UserWarning, match="prompts: its column 'category' has 51 different values"):
        assert not find_categories([{"category": k} for k in range(51)], "prompts")
    with pytest.warns(UserWarning, match=r"'category' holds '\[1\]', which is neither text"):
        assert not find_categories([{"category": [1]}], "prompts")


def starts_small(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
    """1 for the prompts of the category "small" (0+n), 0 for the others."""
    return [float(prompt.startswith("0")) for prompt in prompts]


def test_rollouts_and_evaluation_have_figures_by_category(tmp_path: Path) -> None:
    found: list[dict[str, float]] = []

    class Figures(Callback):
        def on_rollout_end(self, trainer, pl_module, batch, samples, metrics) -> None:
            found.append(metrics)
            for sample in samples:
                small = sample["prompt"].startswith("0")
                assert sample["category"] == ("small" if small else "large")

    data = rollouts(
        prompts=two(),
        rewards=[starts_small],
        filters={"duplicates": "drop"},
        validation=ValidationConfig(two(), batch_size=4),
        phase={"prompts": 43},
    )
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[Figures()])
    trainer.fit(grpo(), data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found[0]["category/small/reward"] == 1.0
    for prefix in ("rollout/", "eval/"):
        assert logged[f"{prefix}category/small/reward"] == 1.0
        assert logged[f"{prefix}category/large/reward"] == 0.0
        assert logged[f"{prefix}category/small/rewards/starts_small/mean"] == 1.0
        assert logged[f"{prefix}reward"] == pytest.approx(3 / 43)
        lengths = [
            logged[f"{prefix}category/{c}/completions/mean_length"] for c in ("small", "large")
        ]
        mean = (3 * lengths[0] + 40 * lengths[1]) / 43
        assert mean == pytest.approx(logged[f"{prefix}completions/mean_length"], rel=1e-6)

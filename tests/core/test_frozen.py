"""The holder of models that are never trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rlhf_lightning.core.frozen import FrozenModels


def pair(dtype: torch.dtype = torch.float32) -> tuple[FrozenModels, nn.Module]:
    """A holder of one model with tied weights, and a source that differs from it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(dtype)
    model[1].weight = model[0].weight
    source = copy.deepcopy(model)
    for parameter in source.parameters():
        parameter.data += torch.randn_like(parameter)
    frozen = FrozenModels()
    frozen["reference"] = model
    return frozen, source


def test_what_it_holds_is_frozen_and_in_no_state_until_it_moves() -> None:
    frozen, source = pair()
    model = frozen["reference"]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert frozen.state_dict() == {}
    frozen.move("reference", source)
    assert set(frozen.state_dict()["reference"]) == set(model.state_dict())


def test_a_move_is_a_copy_or_an_interpolation() -> None:
    frozen, source = pair()
    before = copy.deepcopy(frozen["reference"])
    frozen.move("reference", source, 0.25)
    for new, old, other in zip(
        frozen["reference"].parameters(), before.parameters(), source.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * other)
    frozen.move("reference", source)
    for new, other in zip(frozen["reference"].parameters(), source.parameters(), strict=True):
        assert torch.equal(new, other)
        assert not new.requires_grad


def test_a_move_is_trls() -> None:
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    frozen, source = pair(torch.float64)
    theirs = copy.deepcopy(frozen["reference"])
    for _ in range(3):
        callbacks.SyncRefModelCallback._sync_target_model(source, theirs, 0.6)
        frozen.move("reference", source, 0.6)
    for new, other in zip(frozen["reference"].parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(new, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("placed_first", [False, True])
def test_restored_weights_keep_their_precision(placed_first: bool) -> None:
    """Those of a float64 run, whose model is built in float32 and converted later."""
    frozen, source = pair(torch.float64)
    frozen.move("reference", source)
    saved = copy.deepcopy(frozen.state_dict())
    again, _ = pair()
    if placed_first:
        again.place(torch.device("cpu"), lambda model: model.double())
    again.load_state_dict(saved)
    for name, value in again.state_dict()["reference"].items():  # also before it is in use
        assert torch.equal(value, saved["reference"][name])
    if not placed_first:
        again.place(torch.device("cpu"), lambda model: model.double())
    for name, value in again["reference"].state_dict().items():
        assert torch.equal(value, saved["reference"][name])
    assert again["reference"][0].weight is again["reference"][1].weight


def test_weights_of_a_model_that_this_run_has_not_are_left_out() -> None:
    frozen, source = pair()
    frozen.move("reference", source)
    empty = FrozenModels()
    empty.load_state_dict(frozen.state_dict())
    assert empty.state_dict() == {}

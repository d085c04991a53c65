from __future__ import annotations

import pytest

from rlhf_lightning.cli.messages import explain, hint, nearest, root

OPTIONS = ["model", "model.kl.coef", "model.kl.placement", "trainer.max_epochs", "ckpt_path"]
CLASSES = ["GRPOModule", "SFTModule"]


def test_nearest() -> None:
    assert nearest("bta", ["beta", "gamma"]) == "beta"
    assert nearest("xyz", ["beta", "gamma"]) == ""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Option 'modle' is not accepted", "Did you mean: model?"),
        ("Option 'model.kl.coeff' is not accepted", "Did you mean: coef?"),
        ("Option 'zzz' is not accepted", "It has: ckpt_path, model, trainer"),
        ("Group 'trainer' does not accept option 'max_epoch'", "Did you mean: max_epochs?"),
        ("unrecognized arguments: --modle.kl.coef=1 x", "Did you mean: --model.kl.coef?"),
        ("unrecognized arguments: --model.kl.placment=1", "Did you mean: --model.kl.placement?"),
        ("unrecognized arguments: --zzz", ""),
        ("Expected a dot import path string: GRPOModul", "Did you mean: GRPOModule?"),
        ("Expected a dot import path string: GRPOModule", ""),
        ("module 'a.b' has no attribute 'SFTModul'", "Did you mean: SFTModule?"),
        ("No module named 'zzz'", ""),
        ("something else", ""),
    ],
)
def test_hint(message: str, expected: str) -> None:
    assert hint(message, OPTIONS, CLASSES) == expected


def chained(*texts: str) -> Exception:
    """An exception with the given texts from the outside in, each the cause of the one before."""
    error: Exception | None = None
    for text in reversed(texts):
        outer = TypeError(text)
        outer.__cause__ = error
        error = outer
    assert error is not None
    return error


def test_explain_follows_the_causes_and_names_the_place() -> None:
    error = chained(
        'Parser key "model":\n  Does not validate against any of the Union subtypes',
        "Problem with given class_path 'pkg.GRPOModule':\n  ...",
        'Parser key "kl":\n  ...',
        "Problem with given class_path 'pkg.KLConfig':\n  ...",
        "Option 'coeff' is not accepted. Did you mean: coef?",
    )
    assert explain(str(error), error) == (
        "model.kl: there is no option coeff of KLConfig. Did you mean: coef?"
    )


def test_explain_a_wrong_value() -> None:
    error = chained(
        'Parser key "lr":\n  union\n  Given value: a', "Expected a <class 'float'>. Got value: a"
    )
    assert explain(str(error), error) == "lr: expected float, got 'a'."


def test_explain_keeps_what_it_does_not_understand() -> None:
    assert explain("two\nlines", ValueError("three\nlines")) == "two\nlines"


def test_root_is_the_error_behind_the_types_that_did_not_fit() -> None:
    cause = ValueError("kl.coef is -1")
    wrapped = chained(
        "Does not validate against any of the Union subtypes\n...",
        "Problem with given class_path 'x'",
    )
    assert wrapped.__cause__ is not None
    wrapped.__cause__.__cause__ = cause
    assert root(wrapped) is cause
    assert root(cause) is cause

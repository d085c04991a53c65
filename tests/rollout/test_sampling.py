"""Random streams and the truncated distributions that tokens are drawn from."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from rlhf_lightning.rollout.sampling import _GOLDEN, _mix, draw, sampling_logprobs, uniforms
from rlhf_lightning.types import SamplingParams

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()


def test_the_mixer_is_splitmix64() -> None:
    """The first outputs for seed 1234567 of the reference implementation (Vigna, 2015)."""
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * _GOLDEN
    assert _mix(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_streams_depend_on_seed_and_sample_alone() -> None:
    together = uniforms([3, 3, -1, 2**70 + 3], [0, 1, 0, 0], 5)
    assert torch.equal(together[1:2], uniforms([3], [1], 5))
    assert torch.equal(together[:, :2], uniforms([3, 3, -1, 2**70 + 3], [0, 1, 0, 0], 2))
    assert len(set(together.flatten().tolist())) == 15  # 2**70 + 3 is 3 modulo 2**64
    assert torch.equal(together[0], together[3])


def test_numbers_are_uniform_and_neighbours_uncorrelated() -> None:
    u = uniforms(list(range(200)), [0] * 200, 50)
    assert u.min() >= 0
    assert u.max() < 1
    # 10,000 numbers: standard errors 0.003 and 0.01
    assert u.mean() == pytest.approx(0.5, abs=0.01)
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.04


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        # square roots: 0.7071, 0.5477, 0.3873, 0.2236, sum 1.8657
        ({"temperature": 2.0}, [0.37900, 0.29357, 0.20758, 0.11985]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.526316, 0.315789, 0.157895, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"min_p": 0.29}, [0.526316, 0.315789, 0.157895, 0]),
        ({"min_p": 0.31}, [0.625, 0.375, 0, 0]),
        # top-k leaves 0.526, 0.316, 0.158; 0.8 of that needs the first two
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0.375, 0, 0]),
        ({"temperature": 0.0}, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_truncations_by_hand(options: dict[str, float], expected: list[float]) -> None:
    probs = sampling_logprobs(LOGITS, SamplingParams(**options)).exp()  # type: ignore[arg-type]
    torch.testing.assert_close(
        probs, torch.tensor([expected], dtype=torch.float64), rtol=1e-4, atol=1e-9
    )


def test_half_precision_is_drawn_in_float32_and_double_in_double() -> None:
    sampling = SamplingParams()
    assert sampling_logprobs(LOGITS.bfloat16(), sampling).dtype == torch.float32
    assert sampling_logprobs(LOGITS, sampling).dtype == torch.float64


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 0), (0.499, 0), (0.501, 1), (0.799, 1), (0.801, 2), (0.96, 3), (1 - 2**-53, 3)],
)
def test_tokens_are_the_inverse_of_the_cumulative_distribution(uniform: float, token: int) -> None:
    drawn, logprob = draw(LOGITS, SamplingParams(), torch.tensor([uniform], dtype=torch.float64))
    assert drawn.tolist() == [token]
    torch.testing.assert_close(logprob, LOGITS[0, token][None])


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("possible", [[2], [1, 3], [0, 4]])
def test_tokens_of_probability_zero_are_never_drawn(uniform: float, possible: list[int]) -> None:
    logits = torch.full((1, 5), -torch.inf)
    logits[0, possible] = 1.0
    token, logprob = draw(logits, SamplingParams(), torch.tensor([uniform], dtype=torch.float64))
    assert token.item() in possible
    assert logprob.item() == pytest.approx(-float(np.log(len(possible))))


def test_the_smallest_number_draws_the_first_possible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0]])
    token, _ = draw(logits, SamplingParams(), torch.zeros(1, dtype=torch.float64))
    assert token.tolist() == [1]  # neither the impossible 0 nor the likelier 2


def test_greedy_takes_the_best_and_reports_temperature_one() -> None:
    token, logprob = draw(LOGITS.flip(1), SamplingParams(temperature=0), torch.zeros(1))
    assert token.tolist() == [3]
    assert logprob.item() == pytest.approx(np.log(0.5))


@st.composite
def logit_rows(draw_from: st.DrawFn) -> Tensor:
    size = draw_from(st.integers(2, 8))
    values = draw_from(st.lists(st.floats(-30, 30), min_size=size, max_size=size))
    return torch.tensor([values], dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    logits=logit_rows(),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.99),
    temperature=st.floats(0.1, 5),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_any_truncation_keeps_a_distribution_over_the_likeliest_tokens(
    logits: Tensor, top_k: int, top_p: float, min_p: float, temperature: float, uniform: float
) -> None:
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logprobs = sampling_logprobs(logits, sampling)
    assert float(logprobs.exp().sum()) == pytest.approx(1.0, rel=1e-9)
    kept = logprobs > -torch.inf
    assert kept[0, logits.argmax()]
    if not kept.all():
        assert logits[kept].min() >= logits[~kept].max()
    token, logprob = draw(logits, sampling, torch.tensor([uniform], dtype=torch.float64))
    assert kept[0, token]
    assert torch.equal(logprob, logprobs[0, token])

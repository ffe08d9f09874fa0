"""The loss against closed forms, its symmetries and its gradient."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from btrm_core.training.loss import bradley_terry

rewards = st.lists(st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 2), min_size=1, max_size=8)


def columns(pairs):
    return torch.tensor([c for c, _ in pairs]), torch.tensor([r for _, r in pairs])


@given(rewards)
def test_swapping_the_sides_changes_the_loss_by_the_margin(pairs):
    chosen, rejected = (x.double().float() for x in columns(pairs))
    difference = bradley_terry(chosen, rejected) - bradley_terry(rejected, chosen)
    torch.testing.assert_close(difference, rejected - chosen, rtol=1e-5, atol=1e-3)


@given(rewards)
def test_finite_for_large_rewards_and_never_negative(pairs):
    loss = bradley_terry(*columns(pairs))
    assert torch.isfinite(loss).all()
    assert (loss >= 0).all()


@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(-10, 10))
def test_adding_a_constant_to_both_changes_nothing(chosen, rejected, constant):
    pair = torch.tensor([chosen, rejected], dtype=torch.float32)
    moved = pair + constant
    torch.testing.assert_close(
        bradley_terry(pair[:1], pair[1:]), bradley_terry(moved[:1], moved[1:]), rtol=1e-4, atol=1e-4
    )


def test_gradient_is_minus_sigmoid_of_minus_margin():
    chosen = torch.tensor([0.3, -2.0, 5.0], requires_grad=True)
    rejected = torch.tensor([0.1, 1.0, -5.0], requires_grad=True)
    bradley_terry(chosen, rejected).sum().backward()
    expected = -torch.sigmoid(-(chosen - rejected)).detach()
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


def test_margin_smoothing_and_centering_against_closed_forms():
    chosen, rejected = torch.tensor([1.5]), torch.tensor([0.25])

    def nll(x):
        return math.log1p(math.exp(-x))

    margin = bradley_terry(chosen, rejected, margin_P=torch.tensor([0.5]))
    assert math.isclose(margin.item(), nll(1.25 - 0.5), rel_tol=1e-6)
    smooth = bradley_terry(chosen, rejected, label_smoothing=0.1)
    assert math.isclose(smooth.item(), 0.9 * nll(1.25) + 0.1 * nll(-1.25), rel_tol=1e-6)
    centred = bradley_terry(chosen, rejected, centering=0.01)
    assert math.isclose(centred.item(), nll(1.25) + 0.01 * 1.75**2, rel_tol=1e-6)


def test_bf16_rewards_are_computed_in_fp32():
    chosen = torch.tensor([1.0], dtype=torch.bfloat16)
    assert bradley_terry(chosen, chosen - 0.5).dtype == torch.float32

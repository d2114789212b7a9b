import warnings

import pytest
import torch
from measure_helpers import permuted, relu_data, relu_network, rescaled, scaled
from torch import nn

from sharpkit.errors import ArgumentError, DataError
from sharpkit.measures import fisher_rao_norm, gradient_noise, jacobian_norm


def per_example_gradients(model, x, y):
    rows = []
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def test_the_noise_is_the_trace_of_a_covariance():
    model, (x, y) = relu_network(bias=True), relu_data()
    expected = float(torch.cov(per_example_gradients(model, x, y).T).trace())
    assert gradient_noise(model, (x, y)) == pytest.approx(expected)


def test_equal_examples_have_no_noise():
    model, (x, y) = relu_network(), relu_data()
    data = x[:1].expand(9, -1), y[:1].expand(9)
    assert gradient_noise(model, data) == pytest.approx(0.0, abs=1e-20)


def test_the_noise_of_a_model_that_vmap_cannot_take_is_the_same():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = relu_network()

        def forward(self, x):
            return self.inner(x) if float(x.sum().detach()) > -1e9 else x

    data = relu_data()
    assert gradient_noise(Branching(), data) == pytest.approx(gradient_noise(relu_network(), data))


def test_permuting_units_changes_no_derivative():
    model, data = relu_network(bias=True), relu_data()
    for measure in (gradient_noise, fisher_rao_norm, jacobian_norm):
        assert measure(permuted(model), data) == pytest.approx(measure(model, data))


def test_the_fisher_rao_norm_is_a_quadratic_form_of_the_empirical_fisher():
    model, (x, y) = relu_network(bias=True), relu_data()
    w = torch.cat([p.data.flatten() for p in model.parameters()])
    products = per_example_gradients(model, x, y) @ w
    value, error = fisher_rao_norm(model, (x, y))
    assert value == pytest.approx(float(products.square().mean()))
    assert error == pytest.approx(float(products.square().std()) / len(x) ** 0.5)


def test_the_fisher_rao_norm_follows_from_the_outputs_without_biases():
    model, (x, y) = relu_network(), relu_data()
    outputs = model(x).detach()
    slopes = outputs.softmax(1) - nn.functional.one_hot(y, 3)
    expected = 3**2 * float((slopes * outputs).sum(1).square().mean())
    assert fisher_rao_norm(model, (x, y)).value == pytest.approx(expected)


def test_the_fisher_rao_norm_survives_rescaling():
    model, data = relu_network(bias=True), relu_data()
    assert fisher_rao_norm(rescaled(model), data) == pytest.approx(fisher_rao_norm(model, data))
    assert gradient_noise(rescaled(model), data) != pytest.approx(gradient_noise(model, data))


def test_the_jacobian_is_autograds():
    model, (x, y) = relu_network(bias=True), relu_data()
    for of, f in (("logits", model), ("probabilities", lambda z: model(z).softmax(0))):
        norms = torch.stack([torch.func.jacrev(f)(row).norm() for row in x]).detach()
        value, error = jacobian_norm(model, (x, y), of=of)
        assert value == pytest.approx(float(norms.mean()))
        assert error == pytest.approx(float(norms.std()) / len(x) ** 0.5)


def test_the_jacobian_scales_as_the_function():
    model, (x, y) = relu_network(), relu_data()
    expected = jacobian_norm(model, (x, y)).value
    assert jacobian_norm(rescaled(model), (x, y)).value == pytest.approx(expected)
    assert jacobian_norm(model, (5 * x, y)).value == pytest.approx(expected)  # homogeneous
    assert jacobian_norm(scaled(model, 2.0), (x, y)).value == pytest.approx(8 * expected)


def test_no_warning_of_torchs_own_reaches_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher_rao_norm(relu_network(), relu_data())


def test_bad_requests_say_what_was_expected():
    model, (x, y) = relu_network(), relu_data()
    with pytest.raises(DataError, match="at least two"):
        gradient_noise(model, (x[:1], y[:1]))
    with pytest.raises(ArgumentError, match="probabilities"):
        jacobian_norm(model, (x, y), of="outputs")
    with pytest.raises(DataError, match="labels run from"):
        fisher_rao_norm(model, (x, y + 2))
    tokens = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(DataError, match="real numbers"):
        jacobian_norm(tokens, (torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1])))

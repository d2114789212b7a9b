"""Losses against torch's own, as sums over parts, and what is refused.

Where nothing else is said, values are in float64 and must agree to 1e-12 relative, derivatives to
1e-10: the formulas differ from torch's by the order of operations only.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import namedtuple
from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import grad, jvp, linearize, vjp, vmap
from torch.nn import functional as F

from sharpkit.contract.losses import (
    check_class_labels,
    check_is_mean,
    check_labels,
    cross_entropy,
    mean_squared_error,
    resolve_loss,
)
from sharpkit.errors import ArgumentError, DataError, ModelError

N, C, T = 8, 4, 3
WEIGHTS = torch.tensor([5.0, 1.0, 0.2, 0.7]).double()
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
nearly = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def uniform(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def classes(*shape):
    return torch.randint(0, C, shape)


def some_ignored(*shape, ignored=-100):
    """Two thirds are classes; at least one is."""
    labels = torch.where(torch.rand(shape) < 0.3, ignored, classes(*shape))
    labels[0] = 1
    return labels


def label_lists():
    """Sets of classes, ended by -1, as MultiLabelMarginLoss takes them."""
    lists = torch.stack([torch.randperm(C) for _ in range(N)])
    ends = torch.randint(0, C + 1, (N, 1))
    return torch.where(torch.arange(C) < ends, lists, -1)


def log_probabilities(*shape):
    return normal(*shape).log_softmax(1)


CE, NLL, BCE, LOGITS = nn.CrossEntropyLoss, nn.NLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss
ROWS = partial(normal, N, C)
GRID = partial(normal, N, C, T)
IMAGE = partial(normal, N, C, T, 2)

# a module, its outputs and its labels; each is compared with the module itself
TORCH = [
    (CE(), ROWS, partial(classes, N)),
    (CE(), ROWS, partial(some_ignored, N)),
    (CE(), GRID, partial(some_ignored, N, T)),
    (CE(), IMAGE, partial(some_ignored, N, T, 2)),
    (CE(ignore_index=2), GRID, partial(classes, N, T)),
    (CE(WEIGHTS), ROWS, partial(some_ignored, N)),
    (CE(WEIGHTS, ignore_index=-1), GRID, partial(some_ignored, N, T, ignored=-1)),
    (CE(label_smoothing=0.1), ROWS, partial(some_ignored, N)),
    (CE(WEIGHTS, label_smoothing=0.3), GRID, partial(some_ignored, N, T)),
    (CE(), ROWS, lambda: uniform(N, C).softmax(1)),
    (CE(WEIGHTS, label_smoothing=0.2), GRID, lambda: uniform(N, C, T).softmax(1)),
    (NLL(), lambda: log_probabilities(N, C), partial(classes, N)),
    (NLL(WEIGHTS), lambda: log_probabilities(N, C), partial(some_ignored, N)),
    (
        NLL(WEIGHTS, ignore_index=2),
        lambda: log_probabilities(N, C, T),
        partial(some_ignored, N, T, ignored=2),
    ),
    (LOGITS(), ROWS, partial(uniform, N, C)),
    (LOGITS(), partial(normal, N), partial(uniform, N)),
    (LOGITS(weight=WEIGHTS, pos_weight=WEIGHTS.flip(0)), ROWS, partial(uniform, N, C)),
    (BCE(), partial(uniform, N, C), partial(uniform, N, C)),
    (BCE(weight=WEIGHTS), partial(uniform, N, C), partial(uniform, N, C)),
    (nn.MSELoss(), ROWS, ROWS),
    (nn.MSELoss(), partial(normal, N), partial(normal, N)),
    (nn.L1Loss(), ROWS, ROWS),
    (nn.SmoothL1Loss(beta=0.5), ROWS, ROWS),
    (nn.HuberLoss(delta=0.7), GRID, GRID),
    (nn.KLDivLoss(reduction="mean"), partial(log_probabilities, N, C), partial(uniform, N, C)),
    (nn.KLDivLoss(reduction="batchmean"), ROWS, lambda: uniform(N, C).round()),
    (nn.KLDivLoss(reduction="batchmean", log_target=True), GRID, GRID),
    (nn.PoissonNLLLoss(), ROWS, lambda: 4 * uniform(N, C)),
    (nn.PoissonNLLLoss(full=True), ROWS, lambda: 4 * uniform(N, C)),
    (nn.PoissonNLLLoss(log_input=False, eps=1e-3), partial(uniform, N, C), partial(uniform, N, C)),
    (nn.SoftMarginLoss(), ROWS, lambda: normal(N, C).sign()),
    (nn.MultiLabelSoftMarginLoss(), ROWS, lambda: uniform(N, C).round()),
    (nn.MultiLabelSoftMarginLoss(weight=WEIGHTS), ROWS, lambda: uniform(N, C).round()),
    (nn.MultiLabelMarginLoss(), ROWS, label_lists),
    (nn.MultiMarginLoss(margin=0.5), ROWS, partial(classes, N)),
    (nn.MultiMarginLoss(p=2, weight=WEIGHTS), ROWS, partial(classes, N)),
]


def made(request):
    torch.manual_seed(0)
    module, outputs, labels = request.param
    return module, outputs(), labels()


def named(case):
    return type(case[0]).__name__


@pytest.fixture(params=TORCH, ids=named)
def case(request):
    return made(request)


# torch has no second derivative of the others
@pytest.fixture(
    params=[c for c in TORCH if not isinstance(c[0], nn.MultiMarginLoss | nn.MultiLabelMarginLoss)],
    ids=named,
)
def smooth_case(request):
    return made(request)


def quiet(function):
    """Torch warns of what KLDivLoss(reduction="mean") will mean one day."""

    def inner(*args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)

    return inner


def test_value_and_gradient_are_those_of_torch(case):
    module, outputs, labels = case
    loss = resolve_loss(module)
    assert loss.exact
    loss.check(outputs, labels)
    mean, weight = loss.terms(outputs, labels)
    close(mean, quiet(module)(outputs, labels))
    assert (weight.dtype, weight.shape) == (torch.float64, ())
    ours = grad(lambda z: loss(z, labels))(outputs)
    nearly(ours, grad(lambda z: quiet(module)(z, labels))(outputs))


def test_second_derivatives_are_those_of_torch(smooth_case):
    module, outputs, labels = smooth_case
    loss, v = resolve_loss(module), torch.randn_like(outputs)
    ours = grad(lambda z: loss(z, labels))
    usual = grad(lambda z: quiet(module)(z, labels))
    expected = vjp(usual, outputs)[1](v)[0]
    nearly(vjp(ours, outputs)[1](v)[0], expected)
    nearly(jvp(ours, (outputs,), (v,))[1], expected)


def test_second_derivatives_of_margin_losses_are_differences_of_gradients():
    torch.manual_seed(1)
    z, v, y = normal(N, C), normal(N, C), classes(N)
    for module, labels in (
        (nn.MultiMarginLoss(p=2), y),
        (nn.MultiLabelMarginLoss(), label_lists()),
    ):
        gradient = grad(lambda z, m=module, t=labels: resolve_loss(m)(z, t))
        step = 1e-6  # no kink is that near; the gradient is piecewise linear
        difference = (gradient(z + step * v) - gradient(z - step * v)) / (2 * step)
        torch.testing.assert_close(jvp(gradient, (z,), (v,))[1], difference, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", {type(c[0]): c for c in TORCH}.values(), ids=named, indirect=True)
def test_gradients_can_be_linearised(case):
    module, outputs, labels = case
    loss, v = resolve_loss(module), torch.randn_like(outputs)
    gradient = grad(lambda z: loss(z, labels))
    nearly(linearize(gradient, outputs)[1](v), jvp(gradient, (outputs,), (v,))[1])


def added(loss, outputs, labels, cuts):
    bounds = list(zip([0, *cuts], [*cuts, len(labels)], strict=True))
    parts = [loss.terms(outputs[a:b], labels[a:b]) for a, b in bounds]
    total = sum(w for _, w in parts)
    return sum(w * mean for mean, w in parts) / total, total


@pytest.mark.parametrize("cuts", [[1], [3], [1, 2, 7], list(range(1, N))])
def test_losses_of_unequal_parts_add_up(case, cuts):
    module, outputs, labels = case
    loss = resolve_loss(module)
    mean, weight = loss.terms(outputs, labels)
    close(added(loss, outputs, labels, cuts), (mean, weight))


def test_terms_of_groups_under_vmap_are_those_of_a_loop(case):
    module, outputs, labels = case
    loss = resolve_loss(module)
    grouped = lambda t: t.unflatten(0, (2, N // 2))  # noqa: E731

    def both(z, y):
        gradient, terms = torch.func.grad_and_value(lambda z: loss.terms(z, y), has_aux=True)(z)
        return gradient, *terms

    def hessian_product(z, y):
        return jvp(grad(lambda z: loss(z, y)), (z,), (torch.ones_like(z),))[1]

    z, y = grouped(outputs), grouped(labels)
    for function in (both, hessian_product):
        loop = [function(a, b) for a, b in zip(z, y, strict=True)]
        together = vmap(function)(z, y)
        if isinstance(together, torch.Tensor):
            nearly(together, torch.stack(loop))
        else:
            nearly(together, tuple(torch.stack(column) for column in zip(*loop, strict=True)))


@given(st.lists(st.integers(-1, C - 1), min_size=6, max_size=6), st.lists(st.integers(1, 5)))
@settings(deadline=None, max_examples=60)
def test_any_pattern_of_labels_and_cuts_adds_up(labels, cuts):
    y = torch.tensor(labels)
    z = torch.sin(torch.arange(6.0 * C).double()).reshape(6, C) * 3
    loss = resolve_loss(CE(WEIGHTS, ignore_index=-1, label_smoothing=0.1))
    mean, weight = loss.terms(z, y)
    cuts = sorted(set(cuts))
    if weight == 0:
        assert mean == 0
    else:
        close(added(loss, z, y, cuts), (mean, weight))
        close(mean, CE(WEIGHTS, ignore_index=-1, label_smoothing=0.1)(z, y))


@pytest.mark.parametrize("loss", ["cross_entropy", CE(WEIGHTS, label_smoothing=0.1)])
def test_a_group_of_ignored_labels_has_weight_0_and_a_gradient_of_0(loss):
    torch.manual_seed(2)
    loss, z = resolve_loss(loss), normal(3, N, C)
    y = torch.stack([torch.full((N,), -100), some_ignored(N), classes(N)])
    means, weights = vmap(loss.terms)(z, y)
    assert (means[0], weights[0]) == (0, 0)
    assert bool((means[1:] > 0).all())
    gradients = vmap(grad(loss))(z, y)
    assert bool((gradients[0] == 0).all())
    assert bool(torch.isfinite(gradients).all())
    products = vmap(lambda z, y: jvp(grad(lambda z: loss(z, y)), (z,), (z,))[1])(z, y)
    assert bool((products[0] == 0).all())


def test_language_models_count_their_labelled_positions():
    torch.manual_seed(3)
    z, y = normal(N, T, C), some_ignored(N, T)
    for loss in ("cross_entropy", CE(WEIGHTS)):
        resolved = resolve_loss(loss)
        resolved.check(z, y)
        usual = CE() if loss == "cross_entropy" else loss
        mean, weight = resolved.terms(z, y)
        close(mean, usual(z.flatten(0, 1), y.flatten()))
        close(added(resolved, z, y, [1, 5]), (mean, weight))
    assert resolve_loss("cross_entropy").terms(z, y)[1] == (y != -100).sum()


def test_a_module_reads_classes_on_axis_1_where_both_axes_fit():
    torch.manual_seed(4)
    z, y = normal(N, C, C), classes(N, C)
    close(resolve_loss(CE())(z, y), CE()(z, y))
    close(resolve_loss("cross_entropy")(z, y), CE()(z.transpose(1, 2), y))


@pytest.mark.parametrize("margin", [1.0, 20.0, 60.0, 95.0])
@pytest.mark.parametrize("loss", ["cross_entropy", CE(), CE(torch.tensor([2.0, 1.0, 1.0]))])
def test_saturated_examples_keep_their_digits_in_float32(margin, loss):
    z, y = torch.tensor([[margin, 0.0, -1.0], [5.0, 5.0, 5.0]]), torch.tensor([0, -100])
    with mpmath.workdps(60):
        others = mpmath.exp(-margin) + mpmath.exp(-margin - 1)
        exact, slope = float(mpmath.log(1 + others)), float(-others / (1 + others))
    loss = resolve_loss(loss)
    # float32 has 6e-8, and the exponential of the margin multiplies its error by up to 95
    assert loss(z, y).item() == pytest.approx(exact, rel=6e-6)
    assert grad(loss)(z, y)[0, 0].item() == pytest.approx(slope, rel=6e-6)


def test_named_losses_are_the_functions_of_their_name():
    torch.manual_seed(5)
    z, y, t = normal(N, C), classes(N), normal(N, C)
    assert torch.equal(resolve_loss("cross_entropy")(z, y), cross_entropy(z, y))
    close(cross_entropy(z, y), F.cross_entropy(z, y))
    close(resolve_loss("mse")(z, t), 0.5 * (z - t).square().sum(1).mean())
    assert torch.equal(mean_squared_error(z, t), resolve_loss("mse")(z, t))
    assert resolve_loss("mse").terms(z, t)[1] == N


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_mean_has_the_dtype_of_the_outputs_and_class_weights_follow_it(dtype):
    torch.manual_seed(6)
    module = CE(WEIGHTS)
    z, y = normal(3000, C).to(dtype) * 30, classes(3000)
    mean, weight = resolve_loss(module).terms(z, y)
    assert (mean.dtype, weight.dtype) == (dtype, torch.float64)
    assert module.weight.dtype == torch.float64
    # three roundings of the dtype; the sum, beyond 65504, does not overflow in float16
    expected = module(z.double(), y)
    torch.testing.assert_close(mean.double(), expected, rtol=3 * torch.finfo(dtype).eps, atol=0.0)


FUNCTIONS = [
    (F.cross_entropy, CE()),
    (partial(F.cross_entropy, weight=WEIGHTS, ignore_index=2, label_smoothing=0.1),
     CE(WEIGHTS, ignore_index=2, label_smoothing=0.1)),
    (partial(partial(F.nll_loss, ignore_index=2), weight=WEIGHTS), NLL(WEIGHTS, ignore_index=2)),
    (F.mse_loss, nn.MSELoss()),
    (F.l1_loss, nn.L1Loss()),
    (partial(F.smooth_l1_loss, beta=0.3), nn.SmoothL1Loss(beta=0.3)),
    (partial(F.huber_loss, delta=0.3), nn.HuberLoss(delta=0.3)),
    (partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHTS), LOGITS(pos_weight=WEIGHTS)),
]  # fmt: skip


@pytest.mark.parametrize(("function", "module"), FUNCTIONS)
def test_functions_of_torch_are_read_as_its_modules(function, module):
    torch.manual_seed(7)
    z, y = normal(N, C), classes(N) if isinstance(module, CE | NLL) else uniform(N, C)
    loss = resolve_loss(function)
    assert loss.exact
    assert loss.given is function
    close(loss.terms(z, y), resolve_loss(module).terms(z, y))
    close(loss(z, y), function(z, y))


def test_subclasses_count_as_torch_s_unless_they_change_forward():
    class Same(nn.CrossEntropyLoss):
        pass

    class Other(nn.CrossEntropyLoss):
        def forward(self, input, target):
            return super().forward(2 * input, target)

    changed = CE()
    changed.forward = lambda z, y: CE.forward(changed, 2 * z, y)
    assert resolve_loss(Same()).exact
    assert not resolve_loss(Other()).exact
    assert not resolve_loss(changed).exact
    assert resolve_loss(torch.compile(CE(WEIGHTS), backend="eager")).exact


def test_resolving_twice_changes_nothing_and_losses_can_be_sent_to_other_processes():
    loss = resolve_loss(CE(WEIGHTS))
    assert resolve_loss(loss) is loss
    assert isinstance(loss.given, CE)
    assert resolve_loss("mse").given == "mse"
    z, y = normal(N, C), classes(N)
    cases = ((CE(WEIGHTS), y), ("cross_entropy", y), (nn.HuberLoss(), z + 1), (F.mse_loss, z + 1))
    for loss, labels in cases:
        resolved = resolve_loss(loss)
        sent = pickle.loads(pickle.dumps(resolved))
        assert torch.equal(sent(z, labels), resolved(z, labels))
        assert torch.equal(copy.deepcopy(resolved)(z, labels), resolved(z, labels))


def test_a_sum_is_read_as_its_mean_and_says_so():
    z, y = normal(N, C), classes(N)
    with pytest.warns(UserWarning, match=r'CrossEntropyLoss\(reduction="sum"\) is read as'):
        loss = resolve_loss(CE(WEIGHTS, reduction="sum"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_loss(loss) is loss
        close(loss(z, y), CE(WEIGHTS)(z, y))
        check_labels(y, z, loss.given)
    with pytest.warns(UserWarning, match="HuberLoss"):
        close(
            resolve_loss(partial(F.huber_loss, reduction="sum"))(z, 2 * z), F.huber_loss(z, 2 * z)
        )


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("hinge", r"unknown loss 'hinge': expected one of \['cross_entropy', 'mse'\]"),
        (3, "unknown loss 3"),
        (None, "unknown loss None"),
        (nn.MSELoss, r"the loss is the class MSELoss: give MSELoss\(\)"),
        (nn.L1Loss(reduction="none"), 'reduction="none".*use reduction="mean"'),
        (partial(F.cross_entropy, reduction="none"), 'reduction="none"'),
    ],
)
def test_what_is_no_loss_is_refused(loss, message):
    with pytest.raises(ArgumentError, match=message):
        resolve_loss(loss)


Y = torch.tensor([0, 1, 2, 3])
zeros = torch.zeros
Pair = namedtuple("Pair", ["main", "auxiliary"])

REFUSED = [
    ("cross_entropy", zeros(4), Y, DataError, r"shape \(4,\) do not fit.*\(4,\)"),
    ("cross_entropy", zeros(4, 4), Y[:3], DataError, r"shape \(3,\) do not fit.*\(4, 4\)"),
    ("cross_entropy", zeros(4, 2, 4), Y, DataError, r"shape \(4,\) do not fit.*\(4, 2, 4\)"),
    ("cross_entropy", zeros(4, 2, 4), Y.double(), DataError, "integer labels.*float64"),
    ("cross_entropy", zeros(4, 4), zeros(4, 4), DataError, "integer labels"),
    ("cross_entropy", zeros(4, 3), Y, DataError, r"from 0 to 3, but the model has 3 outputs"),
    ("cross_entropy", zeros(4, 4), Y - 1, DataError, r"from -1 to 2.*or -100 to be ignored"),
    (CE(ignore_index=0), zeros(4, 3), Y, DataError, "from 1 to 3.*or 0 to be ignored"),
    (CE(), zeros(4, 3), Y.view(4, 1), DataError, r"\(4, 1\) do not fit.*\(4, 3\)"),
    (CE(WEIGHTS), zeros(4, 5), Y, ModelError, r"weights of shape \(4,\), but.*5 classes"),
    (CE(WEIGHTS), zeros(4, 5), zeros(4, 5), ModelError, r"weights of shape \(4,\)"),
    (CE(-WEIGHTS), zeros(4, 4), Y, ModelError, r"class weights \[-5.0.*at least 0"),
    (NLL(), zeros(4, 4), Y.float(), DataError, "integer labels"),
    (nn.MultiMarginLoss(), zeros(4, 3), Y, DataError, "from 0 to 3"),
    (nn.MultiLabelMarginLoss(), zeros(4, 4), Y, DataError, r"\(4, 4\).*\(4,\)"),
    (nn.MultiLabelMarginLoss(), zeros(1, 4), Y[None] + 1, DataError, "labels run from 1 to 4"),
    (nn.MultiLabelMarginLoss(), zeros(1, 4), Y[None] / 1, DataError, "integer labels"),
    (LOGITS(weight=torch.ones(4)), zeros(4), zeros(4), ModelError, r"\(sums, weights\)"),
    (LOGITS(weight=torch.ones(4, 1)), zeros(4, 2), zeros(4, 2), ModelError, "per class"),
    (BCE(weight=torch.ones(4, 2)), zeros(4, 2), zeros(4, 2), ModelError, "per class"),
    (LOGITS(pos_weight=torch.ones(3)), zeros(4, 2), zeros(4, 2), ModelError, "pos_weight"),
    (nn.MSELoss(), zeros(4, 2) + 0j, zeros(4, 2), ModelError, "complex outputs"),
    (nn.MSELoss(), zeros(4, 2), zeros(4, 2) + 0j, DataError, "real labels"),
    ("mse", zeros(4, 2), zeros(4, 2) + 0j, DataError, "real labels"),
    (nn.MSELoss(), (zeros(4, 2),), zeros(4, 2), ModelError, "returned tuple.*all of it"),
    ("cross_entropy", Pair(zeros(4, 4), 0), Y, ModelError, "returned Pair.*all of it"),
    (CE(), {"logits": zeros(4, 4)}, Y, ModelError, "returned dict.*all of it"),
    *(
        (loss, zeros(4, 1), zeros(4), DataError, r"\(4, 1\).*\(4,\).*broadcast")
        for loss in ("mse", nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), BCE(),
                     LOGITS(), nn.KLDivLoss(), nn.PoissonNLLLoss(), nn.SoftMarginLoss(),
                     nn.MultiLabelSoftMarginLoss(), F.mse_loss)
    ),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "outputs", "labels", "error", "message"), REFUSED)
def test_outputs_and_labels_that_do_not_fit_are_refused(loss, outputs, labels, error, message):
    with pytest.raises(error, match=message):
        resolve_loss(loss).check(outputs, labels)


def is_about_values(message):
    """Values of labels are looked at by the check alone."""
    return any(part in message for part in ("at least 0", "from", "integer labels"))


@pytest.mark.parametrize(
    ("loss", "outputs", "labels", "error", "message"),
    [refused for refused in REFUSED if not is_about_values(refused[4])],
)
def test_terms_refuse_shapes_as_the_check_does(loss, outputs, labels, error, message):
    with pytest.raises(error, match=message):
        resolve_loss(loss).terms(outputs, labels)


def test_all_labels_are_checked_against_the_outputs_of_some():
    outputs = torch.zeros(2, 3, 4)
    check_labels(torch.tensor([[0, 1, -100]]).expand(50, 3), outputs, "cross_entropy")
    check_labels(torch.zeros(7), torch.zeros(2, 5), lambda f, y: f.mean())
    with pytest.raises(DataError, match="labels run from 0 to 4"):
        check_labels(torch.tensor([[0, 1, 4]]).expand(50, 3), outputs, "cross_entropy")
    with pytest.raises(DataError, match=r"\(50, 1\).*\(50,\).*broadcast"):
        check_labels(torch.zeros(50), torch.zeros(2, 1), nn.MSELoss())


def test_class_labels_are_one_class_per_example():
    check_class_labels(Y, torch.zeros(2, 4))
    with pytest.raises(DataError, match=r"shape \(n, classes\), got \(2, 3, 4\)"):
        check_class_labels(torch.zeros(2, 3).long(), torch.zeros(2, 3, 4))
    with pytest.raises(DataError, match="1 labels are -100"):
        check_class_labels(torch.tensor([0, -100]), torch.zeros(2, 4))
    with pytest.raises(DataError, match="labels run from"):
        check_class_labels(Y + 1, torch.zeros(2, 4))


# ---- callables ----


def token_sums(outputs, labels):
    """Cross-entropy of labelled tokens, as sums and counts of examples."""
    kept = labels != -100
    losses = F.cross_entropy(outputs.movedim(-1, 1), labels, reduction="none")
    return losses.sum(-1), kept.sum(-1)


def test_sums_and_weights_are_a_loss_per_token():
    torch.manual_seed(8)
    z, y = normal(N, T, C), some_ignored(N, T)
    y[3] = -100
    loss = resolve_loss(token_sums)
    assert not loss.exact
    check_is_mean(loss, z, y)
    close(loss.terms(z, y), resolve_loss("cross_entropy").terms(z, y))
    assert loss.terms(z[3:4], y[3:4]) == (0, 0)
    nearly(grad(loss)(z, y), grad(resolve_loss("cross_entropy"))(z, y))
    nearly(vmap(lambda z, y: loss(z[None], y[None]))(z, y)[3], torch.zeros(()).double())


def test_a_mean_over_examples_weighs_as_many():
    z, y = normal(N, C), classes(N)
    loss = resolve_loss(lambda f, y: F.cross_entropy(f, y))
    check_is_mean(loss, z, y)
    assert loss.terms(z, y)[1] == N
    one_entry = resolve_loss(lambda f, y: f.mean().reshape(1, 1))
    assert one_entry(z, y).shape == ()


Z = torch.sin(torch.arange(48.0)).reshape(12, 4).double()
SORTED = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
VALID = [
    lambda f, y: F.cross_entropy(f, y),
    lambda f, y: (F.cross_entropy(f, y, WEIGHTS, reduction="sum"), WEIGHTS[y].sum()),
    lambda f, y: [F.cross_entropy(f, y, WEIGHTS, reduction="none"), WEIGHTS[y]],
    lambda f, y: (F.cross_entropy(f, y, reduction="sum") * 0, torch.zeros(len(y))),
    lambda f, y: f.mean() * torch.nan,
    lambda f, y: torch.zeros(()),
]


@pytest.mark.parametrize("loss", VALID)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 12, 100])
def test_means_are_accepted(loss, dtype, n):
    rows = torch.arange(n) * 12 // n if n < 12 else torch.arange(n) % 12
    rows = rows[torch.argsort(SORTED[rows], stable=True)]
    single = lambda f, y: _first(loss(f.double(), y), dtype)  # noqa: E731
    check_is_mean(resolve_loss(single), Z[rows].to(dtype), SORTED[rows])


def _first(result, dtype):
    return (
        result.to(dtype) if isinstance(result, torch.Tensor) else (result[0].to(dtype), result[1])
    )


def test_a_structure_of_outputs_is_passed_on_whole():
    def loss(outputs, labels):
        return F.cross_entropy(outputs.main, labels) + 0.3 * F.cross_entropy(
            outputs.auxiliary, labels
        )

    outputs = Pair(Z, Z.flip(1))
    resolved = resolve_loss(loss)
    check_is_mean(resolved, outputs, SORTED)
    assert resolved.terms(outputs, SORTED)[1] == 12
    uneven = resolve_loss(lambda f, y: f["a"].square().sum() / f["b"].sum())
    with pytest.raises(ModelError, match="not a mean over examples"):
        check_is_mean(uneven, {"a": Z, "b": Z.abs(), "c": None}, SORTED)


def in_place(f, y):
    f -= 1.0
    return F.cross_entropy(f, y)


NOT_MEANS = [
    (lambda f, y: F.cross_entropy(f, y, WEIGHTS), "not a mean over examples: .* as the mean of"),
    (lambda f, y: F.cross_entropy(f, y, ignore_index=0) + 0, "not a mean.*nan as the mean of"),
    (lambda f, y: F.cross_entropy(f, y, reduction="sum"), r"CrossEntropyLoss\(weight=.*\(sums, w"),
    (lambda f, y: F.cross_entropy(f, y) ** 2, "not a mean over examples"),
    (lambda f, y: F.cross_entropy(f, y) + 1e-3 * f.var(0, correction=0).sum(), "not a mean"),
    (lambda f, y: (F.cross_entropy(f, y), torch.tensor(1.0)), "weights .* up: 1 for all 12"),
    (lambda f, y: (F.cross_entropy(f, y), torch.tensor(len(y))), "not a mean over examples"),
    (lambda f, y: (f.sum(1), y - 1.0), "weights that sum to -1"),
    (lambda f, y: (f.sum(1), f.sum(1).exp()), "depend on the outputs"),
    (lambda f, y: F.cross_entropy(f, y, reduction="none"), r"must be a scalar, got \(12,\)"),
    (lambda f, y: 1.0, "must return a scalar tensor.*got float"),
    (lambda f, y: (f.sum(), f.sum(), f), "must return a scalar tensor.*got tuple"),
    (lambda f, y: f.mean() + torch.rand(()), "the loss is random: two calls"),
    (in_place, "writes to the outputs or labels"),
    (lambda f, y: F.instance_norm(f.T[None]).mean(), "does not accept a single example"),
    (lambda f, y: F.cross_entropy(f[:, :2], y), r"fails for outputs of shape \(12, 4\) and labels"),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "message"), NOT_MEANS)
def test_what_is_not_a_mean_is_refused(loss, message):
    before = Z.clone()
    with pytest.raises(ModelError, match=message):
        check_is_mean(resolve_loss(loss), Z, SORTED)
    assert torch.equal(Z, before)


def test_shapes_that_broadcast_are_named():
    loss = resolve_loss(lambda f, y: (f - y).square().mean())
    with pytest.raises(ModelError, match=r"outputs of shape \(12, 1\) and labels of shape \(12,\)"):
        check_is_mean(loss, Z[:, :1], SORTED.double())
    check_is_mean(loss, Z[:, 0], SORTED.double())


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_class_weights_in_a_plain_mean_are_always_found(labels, heavy):
    weights = torch.ones(4).double()
    weights[heavy] = 3.0
    y = torch.tensor(sorted(labels))
    loss = resolve_loss(lambda f, y: F.cross_entropy(f, y, weights))
    if set(labels) == {heavy} or heavy not in labels:
        check_is_mean(loss, Z[: len(y)], y)
    else:
        with pytest.raises(ModelError, match="not a mean"):
            check_is_mean(loss, Z[: len(y)], y)


def test_the_check_calls_the_loss_less_than_40_times_and_keeps_grad_mode():
    calls = []

    def loss(f, y):
        calls.append(len(y))
        return F.cross_entropy(f, y)

    rows = torch.arange(1000) % 12
    check_is_mean(resolve_loss(loss), Z[rows], SORTED[rows])
    assert len(calls) < 40
    assert torch.is_grad_enabled()
    check_is_mean(resolve_loss(CE(WEIGHTS)), Z, SORTED)  # of known form: nothing to test

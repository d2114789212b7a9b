"""What every measure of the package must do, on every network of the shared cases."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from cases import CASES
from cores import slow_beyond
from torch.utils.data import DataLoader, TensorDataset

from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures import (
    EigenvalueRatio,
    FunctionMeasure,
    HessianRank,
    HessianTrace,
    MSharpness,
    direction,
    make_measure,
    measure_names,
    standard_measures,
)
from sharpkit.measures.measure import describe, evaluate_measure

MEASURES = {describe(m)[0]: m for m in standard_measures(m=[1, 8], attention=True)}
NEED_IMAGES = {"augmentation_inconsistency", "augmented_margin"}
NEED_REAL_INPUTS = {
    "path_norm",
    "jacobian_norm",
    "mixup_error",
    "normalized_margin",
    "constrained_margin",
    "davies_bouldin_mixup",
    "mixup_margin",
    "perturbation_response",
    *NEED_IMAGES,
}
REFUSED = {  # (measure, case) for which the number would have no meaning
    ("heavy_tail_exponent", "transformer"): "different non-zero eigenvalues",  # 8 in a layer
    ("weight_spectrum", "transformer"): "no weight has 10",
    ("path_norm", "mlp"): "computes 'tanh'",
    ("path_norm", "transformer"): "positively homogeneous",
    ("path_norm", "layer_used_twice"): "computes 'tanh'",
}


def network(case, dtype=torch.float32):
    """A network, its initial state, and data on all of which it is right."""
    model, x, _ = case.make(dtype)
    initial = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator).to(p)
    head = model.head if hasattr(model, "head") else model[-1]
    with torch.no_grad():
        head.bias.data -= model.eval()(x).mean(0)  # no class is preferred
        labels = model(x).argmax(1)
    return model.train(), initial, (x, labels)


def state(model):
    return (
        {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state(),
    )


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for name, (identity, tensor) in before[0].items():
        assert identity == after[0][name][0] and torch.equal(tensor, after[0][name][1]), name
    assert before[1:5] == after[1:5]
    assert torch.equal(before[5], after[5])


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("case", slow_beyond(2, CASES), ids=lambda c: c.name)
def test_a_measure_is_finite_deterministic_and_leaves_no_trace(case, name):
    model, initial, data = network(case)
    measure = MEASURES[name]
    before, initial_before = state(model), state(initial)
    tokens = not data[0].is_floating_point()
    data_refused = (tokens and name in NEED_REAL_INPUTS) or (
        data[0].ndim != 4 and name in NEED_IMAGES
    )
    why = REFUSED.get((name, case.name))
    if data_refused or why:
        with pytest.raises(DataError if data_refused else ModelError, match=why):
            evaluate_measure(measure, model, data, seed=1, initial=lambda: initial)
    else:
        first = evaluate_measure(measure, model, data, seed=1, initial=lambda: initial)
        torch.manual_seed(torch.initial_seed() + 1)
        again_before = state(model)
        again = evaluate_measure(measure, model, data, seed=1, initial=lambda: initial)
        assert_same(again_before, state(model))
        torch.set_rng_state(before[5])
        assert list(first) == list(again)
        for setting, estimate in first.items():
            assert math.isfinite(estimate.value), setting
            assert estimate.value == again[setting].value
            assert not estimate.std_error < 0
    assert_same(before, state(model))
    assert_same(initial_before, state(initial))


@pytest.mark.parametrize("name", MEASURES)
def test_a_loader_that_shuffles_gives_what_its_data_set_gives(name):
    model, initial, data = network(CASES[1])
    pairs = TensorDataset(*data)
    loader = DataLoader(pairs, batch_size=5, shuffle=True)
    values = [
        evaluate_measure(MEASURES[name], model, d, seed=0, initial=lambda: initial)
        for d in (pairs, loader)
    ]
    assert values[0].keys() == values[1].keys()
    for setting, (value, _) in values[0].items():
        assert values[1][setting].value == value, setting


@pytest.mark.parametrize("name", [n for n in MEASURES if n not in NEED_IMAGES | {"path_norm"}])
def test_single_and_double_precision_agree(name):
    results = []
    for dtype in (torch.float32, torch.float64):
        model, initial, data = network(CASES[0], dtype)
        values = evaluate_measure(MEASURES[name], model, data, seed=0, initial=lambda m=initial: m)
        results.append({k: v.value for k, v in values.items()})
    assert results[0] == pytest.approx(results[1], rel=5e-3, abs=1e-6)


def test_names_differ_and_configurations_are_json():
    described = [describe(m) for m in standard_measures()]
    assert len({name for name, _ in described}) == len(described)
    for _, config in described:
        json.dumps(config)
    assert len({hash(m) for m in standard_measures()}) == len(described)


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (MSharpness(m=list(2 ** np.arange(3)), rho=0.1), MSharpness(m=[1, 2, 4], rho=0.1)),
        (MSharpness(m=2 ** np.arange(3), rho=0.1), MSharpness(m=[1, 2, 4], rho=0.1)),
        (MSharpness(m=torch.tensor([1, 2]), rho=1), MSharpness(m=(1, 2), rho=1)),
        (MSharpness(m=np.int64(4), rho=np.array([0.1, 0.2])), MSharpness(m=4, rho=[0.1, 0.2])),
        (MSharpness(m=np.array(4), rho=np.float64(0.1)), MSharpness(m=4, rho=0.1)),
        (MSharpness(m=1, rho=1, steps=np.int64(3)), MSharpness(m=1, rho=1, steps=3)),
        (EigenvalueRatio(rank=np.int64(3)), EigenvalueRatio(rank=3)),
        (HessianTrace(products=np.int64(30)), HessianTrace(products=30)),
        (HessianRank(probes=np.int64(3)), HessianRank(probes=3)),
        (
            make_measure("output_margin", percentile=np.int64(5)),
            make_measure("output_margin", percentile=5),
        ),
    ],
)
def test_numpys_numbers_configure_a_measure_as_pythons_do(ours, plain):
    assert json.dumps(describe(ours)) == json.dumps(describe(plain))
    assert hash(ours) == hash(plain)
    model, _, data = network(CASES[0])
    assert ours(model, data, seed=0) == plain(model, data, seed=0)


def test_every_function_of_the_package_is_among_the_standard_measures():
    every = standard_measures(attention=True)
    assert {m.function for m in every if isinstance(m, FunctionMeasure)} == set(measure_names())
    names = {describe(m)[0] for m in standard_measures(images=False)}
    assert names == {describe(m)[0] for m in every} - NEED_IMAGES - {"geodesic_sharpness"}


def test_every_measure_states_its_direction_by_object_and_by_name():
    for measure in standard_measures(attention=True, recorded=True):
        name = describe(measure)[0]
        forms = [""] if name != "weight_spectrum" else ["form=log_norm", "form=rand_distance"]
        for form in forms:
            assert direction(measure, form) in (1, -1, None)
            assert direction(name, form) == direction(measure, form)
    assert direction("output_margin") == -1 and direction("m_sharpness") == 1
    assert direction("sharpness_logit_normalized") == 1
    assert direction("weight_spectrum", "form=rand_distance") == -1
    assert direction("no such measure") is None


def test_a_measure_of_the_users_own_says_its_direction_itself():
    def own(model, data, *, seed):
        return 1.0

    assert direction(own) is None
    own.direction = -1
    assert direction(own) == -1
    own.direction = {"a": 1}
    assert direction(own, "form=a") == 1 and direction(own, "form=b") is None


def test_a_measure_that_needs_the_initial_network_says_so():
    needing = {m.name for m in standard_measures() if getattr(m, "needs_initial", False)}
    assert needing == {
        "distance_from_initial",
        "pac_bayes",
        "pac_bayes_magnitude",
        "accuracy_sharpness",
    }
    model, _, data = network(CASES[0])
    measure = make_measure("distance_from_initial")
    with pytest.raises(ArgumentError, match="pass initial="):
        evaluate_measure(measure, model, data, seed=0)
    with pytest.raises(ArgumentError, match="pass initial="):
        measure(model, data, seed=0)


def test_the_initial_network_is_loaded_only_where_it_is_needed():
    model, _, data = network(CASES[0])

    def load():
        raise AssertionError("loaded")

    evaluate_measure(make_measure("training_loss"), model, data, seed=0, initial=load)


def test_unknown_names_and_options_are_refused_with_the_known_ones():
    with pytest.raises(ArgumentError, match="expected one of accuracy_sharpness"):
        make_measure("sharpnes")
    with pytest.raises(ArgumentError, match="expected one of percentile"):
        make_measure("output_margin", quantile=10)
    with pytest.raises(ArgumentError, match="expected one of none"):
        make_measure("parameter_count", n=1)


@pytest.mark.parametrize("name", [n for n in MEASURES if n != "parameter_count"])
def test_nan_weights_are_refused(name):
    model, initial, data = network(CASES[1])
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError):
        evaluate_measure(MEASURES[name], model, data, seed=0, initial=lambda: initial)


def test_the_length_of_training_is_what_the_zoo_recorded():
    model, _, data = network(CASES[0])
    measure = next(m for m in standard_measures(recorded=True) if m.name == "training_steps")
    metrics = {"train_acc": 1.0, "epochs": 12, "steps": 480.0}
    found = evaluate_measure(measure, model, data, seed=0, metrics=lambda: metrics)
    assert {k: v.value for k, v in found.items()} == {"form=steps": 480.0, "form=epochs": 12.0}
    with pytest.raises(ModelError, match="record train_acc: expected one of steps"):
        evaluate_measure(measure, model, data, seed=0, metrics=lambda: {"train_acc": 1.0})
    with pytest.raises(ArgumentError, match="pass metrics="):
        evaluate_measure(measure, model, data, seed=0)
    assert "training_steps" not in [m.name for m in standard_measures()]

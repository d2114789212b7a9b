import numpy as np
import pytest
import torch
from measure_helpers import permuted, relu_data, relu_network, rescaled
from scipy.integrate import quad

from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures import direction, gi_score, pal_score, perturbation_response
from sharpkit.measures.catalog import make_measure
from sharpkit.measures.perturbation_response import _other_class_partners
from sharpkit.measures.robustness import same_class_pairs

DATA = relu_data()


def cumulated(curve, t):
    """∫₀ᵗ of the accuracies, by quadrature piece by piece."""
    levels = np.linspace(0, 1, len(curve))
    knots = [x for x in levels if x < t]
    pieces = zip(knots, [*knots[1:], t], strict=True)
    return sum(quad(lambda s: np.interp(s, levels, curve), a, b)[0] for a, b in pieces)


def area(curve, low, high):
    levels = [x for x in np.linspace(0, 1, len(curve)) if low < x < high]
    pieces = zip([low, *levels], [*levels, high], strict=True)
    return sum(quad(lambda t: cumulated(curve, t), a, b)[0] for a, b in pieces)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("points", [2, 5, 11])
def test_both_scores_are_quadrature_of_the_definition(seed, points):
    curve = np.random.default_rng(seed).uniform(0.1, 1, points)
    assert gi_score(curve) == pytest.approx(0.5 - area(curve, 0, 1), abs=1e-9)
    assert pal_score(curve) == pytest.approx(area(curve, 0.4, 1) / area(curve, 0, 0.1), rel=1e-8)


def test_they_have_their_closed_forms():
    assert gi_score([1, 1, 1]) == 0 and gi_score([0, 0]) == 0.5
    assert pal_score([0.3] * 11) == pytest.approx(84)  # (1 − 0.16) / 0.01
    # A = 1 − t: C = t − t²/2
    assert gi_score(np.linspace(1, 0, 11)) == pytest.approx(1 / 6)
    assert pal_score(np.linspace(1, 0, 11)) == pytest.approx(0.264 / (0.005 - 0.001 / 6))


def partners_by_loop(x, y, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "same": same_class_pairs(y, generator),
        "other": _other_class_partners(y, generator),
    }


def test_the_measure_is_a_loop_over_levels_and_examples():
    model, (x, y) = relu_network(bias=True), DATA
    found = perturbation_response(model, DATA, steps=4, seed=3)
    for kind, (chosen, partner) in partners_by_loop(x, y, 3).items():
        curve = []
        for level in range(5):
            t = level / 4
            hits = 0
            for i, j in zip(chosen.tolist(), partner.tolist(), strict=True):
                mixed = (1 - t / 2) * x[i] + t / 2 * x[j]
                hits += int(model(mixed[None]).argmax()) == int(y[i])
            curve.append(hits / len(chosen))
        assert found[f"gi_{kind}"] == pytest.approx(gi_score(curve), abs=1e-12)
        assert found[f"pal_{kind}"] == pytest.approx(pal_score(curve), rel=1e-12)
    assert found["gi_other"] > 0


def test_partners_are_of_the_class_they_should_be():
    y = DATA[1]
    for seed in range(20):
        pairs = partners_by_loop(*DATA, seed)
        chosen, partner = pairs["other"]
        assert chosen.tolist() == list(range(len(y)))
        assert bool((y[partner] != y).all())
        chosen, partner = pairs["same"]
        assert bool((y[partner] == y[chosen]).all()) and bool((partner != chosen).all())


def test_every_example_of_the_other_classes_may_be_the_partner():
    y = torch.tensor([0, 1, 2, 2])
    drawn = {
        int(_other_class_partners(y, torch.Generator().manual_seed(s))[1][0]) for s in range(60)
    }
    assert drawn == {1, 2, 3}


def test_it_survives_rescaling_and_permutation():
    model = relu_network()
    expected = perturbation_response(model, DATA)
    for other in (rescaled(model), permuted(model)):
        assert perturbation_response(other, DATA) == pytest.approx(expected, rel=1e-12)


def test_large_gi_and_small_pal_should_mean_a_large_gap():
    measure = make_measure("perturbation_response")
    forms = ("gi_same", "gi_other", "pal_same", "pal_other")
    assert [direction(measure, f"form={form}") for form in forms] == [1, 1, -1, -1]
    # a curve that falls earlier has a larger Gi and a smaller Pal score
    early, late = [1, 1, 0.5, 0.2, 0], [1, 1, 1, 0.8, 0.6]
    assert gi_score(early) > gi_score(late)
    assert pal_score(early) < pal_score(late)


def test_bad_requests_say_what_was_expected():
    model, (x, y) = relu_network(), DATA
    with pytest.raises(ArgumentError, match="steps"):
        perturbation_response(model, DATA, steps=0)
    with pytest.raises(DataError, match="one class"):
        perturbation_response(model, (x, torch.zeros_like(y)))
    with pytest.raises(DataError, match="no class has two"):
        perturbation_response(model, (x[:3], torch.tensor([0, 1, 2])))
    with pytest.raises(ModelError, match="no Pal score"):
        perturbation_response(model, (x, (y + 1) % 3))  # wrong everywhere
    for wrong in ([1.0], [0.5, 1.2], [[1.0, 1.0]], [float("nan"), 1.0]):
        with pytest.raises(ArgumentError, match="from 0 to 1"):
            gi_score(wrong)

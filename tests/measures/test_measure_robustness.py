import pytest
import torch
from measure_helpers import (
    convolutional,
    convolutional_data,
    permuted,
    relu_data,
    relu_network,
    rescaled,
    scaled,
)
from torch import nn

from sharpkit.errors import ArgumentError, DataError
from sharpkit.measures import augmentation_inconsistency, mixup_error
from sharpkit.measures.robustness import moved, same_class_pairs


def test_partners_are_other_examples_of_the_same_class():
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 1])
    for seed in range(20):
        chosen, partner = same_class_pairs(labels, torch.Generator().manual_seed(seed))
        assert chosen.tolist() == [0, 1, 2, 4, 5, 6]  # class 2 has one example
        assert sorted(partner.tolist()) == chosen.tolist()
        assert torch.equal(labels[chosen], labels[partner]) and not (chosen == partner).any()


def test_mixing_with_weight_one_is_the_training_error():
    model, (x, y) = relu_network(), relu_data()
    wrong = y.clone()
    wrong[:10] = (wrong[:10] + 1) % 3
    twice = torch.cat([x, x]), torch.cat([wrong, wrong])  # no class with a single example
    assert mixup_error(model, twice, weight=1.0).value == pytest.approx(0.25)


def test_a_linear_classifier_makes_no_error_on_mixtures():
    """The region of a class is convex."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3).double(), torch.randn(60, 6).double()
    assert mixup_error(model, (x, model(x).argmax(1)), draws=5).value == 0.0


def test_the_mixup_error_is_that_of_the_only_mixture_possible():
    model, (x, y) = relu_network(), relu_data()
    pairs = [torch.nonzero(y == label).squeeze(1)[:2] for label in y.unique()]
    kept = torch.cat([p for p in pairs if len(p) == 2])
    middle = torch.cat([x[p].mean(0, keepdim=True) for p in pairs if len(p) == 2])
    labels = torch.stack([y[p[0]] for p in pairs if len(p) == 2])
    expected = float((model(middle).argmax(1) != labels).double().mean())
    assert mixup_error(model, (x[kept], y[kept]), draws=3).value == pytest.approx(expected)


def test_only_the_function_matters_and_not_its_scale():
    model, data = relu_network(), relu_data()
    expected = mixup_error(model, data, draws=3, seed=1)
    for other in (rescaled(model), permuted(model), scaled(model, 3.0)):
        assert mixup_error(other, data, draws=3, seed=1) == pytest.approx(expected, nan_ok=True)
    cnn, images = convolutional(), convolutional_data()
    expected = augmentation_inconsistency(cnn, images, seed=1)
    cnn[-1].weight.data *= 5
    cnn[-1].bias.data *= 5
    assert augmentation_inconsistency(cnn, images, seed=1) == expected


def test_images_are_shifted_and_mirrored_as_a_loop_does():
    x = torch.randn(8, 2, 5, 4)
    results = moved(x, 2, True, torch.Generator().manual_seed(3))
    for original, result in zip(x, results, strict=True):
        candidates = []
        for image in (original, original.flip(-1)):
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    shifted = torch.zeros_like(image)
                    for i in range(5):
                        for j in range(4):
                            if 0 <= i + dy < 5 and 0 <= j + dx < 4:
                                shifted[:, i, j] = image[:, i + dy, j + dx]
                    candidates.append(shifted)
        assert any(torch.equal(result, c) for c in candidates)
    assert len({m.numpy().tobytes() for m in results}) == 8


def test_a_network_that_sees_one_pixel_is_counted_exactly():
    """Class = sign of the top left pixel of images of which only that one is not zero."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double()
    nn.init.zeros_(model[1].weight)
    model[1].weight.data[1, 0] = 1.0
    model[1].bias.data = torch.tensor([0.5, 0.0]).double()
    x = torch.zeros(2000, 1, 3, 3).double()
    x[:, 0, 0, 0] = 1.0
    data = x, torch.ones(2000, dtype=torch.int64)
    flipped = augmentation_inconsistency(model, data, shift=0, draws=1)
    assert flipped.value == pytest.approx(0.5, abs=0.05)  # mirrored half of the time
    shifted = augmentation_inconsistency(model, data, shift=1, flip=False, draws=1)
    assert shifted.value == pytest.approx(8 / 9, abs=0.03)  # stays for one shift of nine


def test_bad_requests_say_what_was_expected():
    model, (x, y) = relu_network(), relu_data()
    with pytest.raises(DataError, match="expected images"):
        augmentation_inconsistency(model, (x, y))
    with pytest.raises(DataError, match="no class has two"):
        mixup_error(model, (x[:3], torch.tensor([0, 1, 2])))
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        mixup_error(model, (x, y), weight=2.0)
    with pytest.raises(ArgumentError, match="draws"):
        mixup_error(model, (x, y), draws=0)
    with pytest.raises(ArgumentError, match="shift"):
        augmentation_inconsistency(model, (x, y), shift=-1)

"""Networks by name: sizes that the papers state, outputs, initial weights, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sharpkit as sk
from sharpkit.errors import ArgumentError
from sharpkit.training import build_architecture, m_sam_gradient

SMALL = ["vgg-8x2", "vgg-8x2-bn", "nin-8x2", "nin-8x2-bn", "resnet8", "wrn-10-1", "wrn-10-1-nobn"]


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("resnet20", 10, 269_722),  # He et al.: 0.27 M
        ("resnet32", 10, 464_154),  # 0.46 M
        ("resnet56", 10, 853_018),  # 0.85 M
        ("wrn-16-4", 10, 2_748_890),  # Zagoruyko and Komodakis: 2.7 M
        ("wrn-28-10", 10, 36_479_194),  # 36.5 M
        ("wrn-40-4", 100, 8_972_340),  # 8.9 M with 10 classes
    ],
)
def test_sizes_are_those_of_the_papers(name, classes, expected, monkeypatch):
    monkeypatch.setattr("sharpkit.training.architectures._initialise", lambda model: None)
    with torch.device("meta"):
        assert size(build_architecture(name, (3, 32, 32), classes, seed=0)) == expected


def test_sizes_of_the_competitions_families():
    vgg = build_architecture("vgg-32x2", (1, 28, 28), 10, seed=0)
    conv = (1 * 9 + 1) * 16 + (16 * 9 + 1) * 16 + (16 * 9 + 1) * 32 + (32 * 9 + 1) * 32
    assert size(vgg) == conv + 7 * 7 * 32 * 10 + 10
    nin = build_architecture("nin-16x2", (3, 32, 32), 10, seed=0)
    block = 2 * (16 * 16 + 16)
    assert size(nin) == (3 * 9 * 16 + 16) + (16 * 9 * 16 + 16) + 2 * block + 170


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_every_weight_gets_a_gradient_from_images_of_both_kinds(name, shape):
    model = build_architecture(name, shape, 7, seed=0)
    x, y = torch.randn(6, *shape), torch.arange(6)
    outputs = model(x)
    assert outputs.shape == (6, 7)
    assert 0.05 < float(outputs.detach().std()) < 10
    # the branches of SkipInit count for nothing before their scale has moved
    for _ in range(2):
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_decides_and_the_callers_random_state_stays(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = build_architecture(name, (1, 28, 28), 10, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again = build_architecture(name, (1, 28, 28), 10, seed=1).state_dict()
    other = build_architecture(name, (1, 28, 28), 10, seed=2).state_dict()
    assert all(torch.equal(t, again[k]) for k, t in first.items())
    assert any(not torch.equal(t, other[k]) for k, t in first.items())


def test_convolutions_start_with_hes_variance_and_biases_at_zero():
    model = build_architecture("vgg-64x2", (1, 28, 28), 10, seed=0)
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    for layer in convolutions[1:]:
        assert abs(float(layer.weight.detach().var()) * layer.in_channels * 9 / 2 - 1) < 0.05
        assert not layer.bias.any()


def test_without_batchnorm_every_block_starts_as_the_identity():
    model = build_architecture("wrn-22-1-nobn", (3, 32, 32), 10, seed=0)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(model.blocks[1](x), x)


@pytest.mark.parametrize("name", SMALL)
def test_every_family_learns(name):
    """Which quadrant of the image is bright."""
    y = torch.arange(64) % 4
    x = 0.3 * torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for i, label in enumerate(y.tolist()):
        x[i, 0, 8 * (label // 2) :, 8 * (label % 2) :][:8, :8] += 1
    model = build_architecture(name, (1, 16, 16), 4, seed=0)
    result = sk.fit(
        model, (x, y), epochs=25, batch_size=16, lr=0.05, evaluate_every=25, progress=False
    )
    assert result.history["train_accuracy"].iloc[-1] > 0.9


@pytest.mark.parametrize("name", ["vgg-8x2-bn", "resnet8", "wrn-10-1-nobn"])
def test_groups_are_vectorised(name):
    model = build_architecture(name, (1, 12, 12), 3, seed=0)
    x, y = torch.randn(8, 1, 12, 12), torch.arange(8) % 3
    m_sam_gradient(model, x, y, m=4, engine="vectorized")
    assert all(p.grad is not None for p in model.parameters())


def test_your_own_function(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n\ndef small():\n    return nn.Linear(4, 3)\n\n"
        "def nothing():\n    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    first, second = (build_architecture("my_networks:small", (4,), 3, seed=0) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    with pytest.raises(ArgumentError, match="returned NoneType"):
        build_architecture("my_networks:nothing", (4,), 3, seed=0)
    with pytest.raises(ArgumentError, match="cannot import"):
        build_architecture("my_networks:large", (4,), 3, seed=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alexnet", "unknown architecture 'alexnet'; expected vgg-"),
        ("vgg-32", "unknown architecture"),
        ("vgg-0x2", "unknown architecture"),
        ("resnet18", "depth of 6n"),
        ("resnet2", "depth of 6n"),
        ("wrn-17-4", "depth of 6n"),
        ("vgg-8x5", "28x28 is too small"),
        ("vgg-2x3", "3 blocks cannot double up to 2 channels"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ArgumentError, match=message):
        build_architecture(name, (1, 28, 28), 10, seed=0)


def test_shapes_that_are_no_images_are_refused():
    with pytest.raises(ArgumentError, match=r"channels, height, width.*\(784,\)"):
        build_architecture("resnet20", (784,), 10, seed=0)
    with pytest.raises(ArgumentError, match="classes is 0"):
        build_architecture("resnet20", (3, 32, 32), 0, seed=0)

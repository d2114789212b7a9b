"""Spectra per layer, and curvature as measures."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from curvature_cases import dense_hessian, make
from torch import nn

from sharpkit.curvature import FisherOperator, layer_spectra
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures.curvature import EigenvalueRatio, HessianTrace, MaxEigenvalue


def test_every_layer_has_the_spectrum_of_its_block():
    model, data = make("cnn")
    spectra = layer_spectra(model, data, steps=40, probes=1, progress=False)
    assert list(spectra) == ["0", "3", "6"]
    h, start = dense_hessian("cnn", "cross_entropy"), 0
    for name, density in spectra.items():
        size = sum(p.numel() for p in model.get_submodule(name).parameters())
        assert density.size == size
        block = h[start : start + size, start : start + size]
        assert np.allclose(density.largest(2), torch.linalg.eigvalsh(block).flip(0)[:2])
        start += size


def test_blocks_and_groups_of_your_own():
    model, data = make("transformer")
    blocks = layer_spectra(model, data, by="block", steps=3, probes=1, operator=FisherOperator)
    assert list(blocks) == ["embed", "layer", "head"]
    groups = {"biases": "*bias", "rest": ["head.weight", "embed.weight"]}
    assert list(layer_spectra(model, data, by=groups, steps=3, probes=1)) == ["biases", "rest"]
    with pytest.raises(ArgumentError, match="by must be"):
        layer_spectra(model, data, by="neuron")
    with pytest.raises(ArgumentError, match="no block with parameters that require gradients"):
        layer_spectra(nn.Linear(2, 2), data, by="block")


def test_measures_agree_with_the_dense_hessian_in_any_mode():
    model, data = make("batchnorm")
    exact = torch.linalg.eigvalsh(dense_hessian("batchnorm", "cross_entropy")).flip(0)
    model.train()  # measures evaluate in eval mode and restore
    assert MaxEigenvalue()(model, data, seed=0) == pytest.approx(float(exact[0]), rel=1e-6)
    ratio = EigenvalueRatio()(model, data, seed=1)
    assert ratio == pytest.approx(float(exact[0] / exact[4]), rel=1e-6)
    value, error = HessianTrace(products=60)(model, data, seed=2)
    assert abs(value - float(exact.sum())) < 4 * error
    assert model.training
    assert model[1].num_batches_tracked == 0


def test_measures_are_configured_hashable_and_named():
    measures = {
        MaxEigenvalue(),
        EigenvalueRatio(rank=3),
        HessianTrace(products=30),
        MaxEigenvalue(),
    }
    assert len(measures) == 3
    assert dataclasses.asdict(EigenvalueRatio(3))["rank"] == 3
    assert {m.name for m in measures} == {"max_eigenvalue", "eigenvalue_ratio", "hessian_trace"}


def test_a_ratio_without_a_positive_eigenvalue_is_an_error():
    model = nn.Linear(1, 2, bias=False)
    with pytest.raises(ModelError, match="the ratio needs a positive one"):
        EigenvalueRatio(rank=2)(model, (torch.zeros(1, 1), torch.tensor([0])), seed=0)


def test_the_same_seed_gives_the_same_value():
    model, data = make("mlp", dtype=torch.float32)
    for measure in (MaxEigenvalue(), EigenvalueRatio(), HessianTrace(products=9)):
        first, again = (measure(model, data, seed=3) for _ in range(2))
        assert first == again
        assert math.isfinite(first if isinstance(first, float) else first.value)

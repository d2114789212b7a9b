"""Networks of transformers as they come: in half precision, with the library's own batches."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import plain_loops
import pytest
import torch
from case import Case
from plain_loops import Problem
from scipy import stats
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformer_networks import LENGTH, TRANSFORMERS, VOCABULARY, gpt2
from transformers import BatchEncoding

import sharpkit as sk
from sharpkit.contract import surprise
from sharpkit.contract.losses import resolve_loss
from sharpkit.curvature import vocabulary

BY_NAME = {case.name: case for case in TRANSFORMERS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BY_NAME)
def test_half_precision_is_the_float32_network_with_the_same_numbers(name: str, dtype: torch.dtype):
    case: Case = BY_NAME[name]
    half, inputs, labels = case.make(torch.float32)
    half = half.eval().to(dtype)
    full = copy.deepcopy(half).float()
    data = inputs, labels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the slower loop
        values = [sk.m_sharpness(m, data, m=[1, 4], rho=case.rho).value for m in (half, full)]
        matrices = [kind(m, data) for kind in (sk.HessianOperator, sk.GaussNewtonOperator)
                    for m in (half, full)]  # fmt: skip
    np.testing.assert_array_equal(*values)
    vector = torch.ones(matrices[0].shape[0])
    products = [matrix.matvec(vector) for matrix in matrices]
    assert torch.equal(products[0], products[1])
    assert torch.equal(products[2], products[3])
    assert {p.dtype for p in half.parameters()} == {dtype}


def sequences() -> dict[str, torch.Tensor]:
    """Padded on the right; labels shifted, and none at the padding."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([7, 3, 5, 2, 7, 4])
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
    words = torch.randint(1, VOCABULARY, (6, LENGTH), generator=g) * mask
    labels = torch.cat([words[:, 1:], torch.zeros(6, 1, dtype=torch.long)], 1)
    labels = labels.masked_fill(labels == 0, -100)
    return {"input_ids": words, "attention_mask": mask, "labels": labels}


def test_batches_of_the_library_are_data_as_they_are():
    torch.manual_seed(0)
    model, whole = gpt2().eval().double(), sequences()
    rows = [{key: value[i] for key, value in whole.items()} for i in range(6)]

    def together(rows):
        return BatchEncoding({key: torch.stack([r[key] for r in rows]) for key in rows[0]})

    forms = [
        whole, BatchEncoding(whole), rows, DataLoader(rows, batch_size=4),
        DataLoader(rows, batch_size=4, collate_fn=together),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [sk.m_sharpness(model, data, m=2, rho=0.05, seed=None).value for data in forms]
    assert found[0] > 0
    assert found == pytest.approx([found[0]] * len(forms), rel=1e-9)


def test_the_loss_is_that_which_the_model_computes_itself():
    """Which shifts labels that stand where the tokens do."""
    torch.manual_seed(0)
    model, whole = gpt2().eval(), sequences()
    unshifted = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**{**whole, "labels": unshifted}).loss
    with sk.HessianOperator(model, whole) as matrix:
        assert matrix.loss == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(sk.errors.DataError, match="shift them"):
        sk.HessianOperator(model, {**whole, "labels": unshifted})


def test_a_tracker_and_sam_follow_a_language_model():
    torch.manual_seed(0)
    model, whole = gpt2(), sequences()
    inputs = {key: whole[key] for key in ("input_ids", "attention_mask")}
    optimizer = sk.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.02)
    tracker = sk.Tracker(whole, every=1, measures=["loss", "stability", "trace"])

    def closure():
        logits = model(**inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), whole["labels"].flatten())
        loss.backward()
        return loss

    for step in range(4):
        tracker(model, optimizer, step=step)
        loss = float(optimizer.step(closure).detach())
        assert tracker.rows[-1]["loss"] == pytest.approx(loss, rel=1e-5)
    frame = tracker.frame()
    assert frame.loss.is_monotonic_decreasing
    assert (frame.lambda_max > 0).all()


def halves(data: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{key: value[part] for key, value in data.items()} for part in (slice(4), slice(2, 6))]


def test_causal_models_are_scored_end_to_end():
    """Losses per token of both sets, m-sharpness, and the gap that the evaluation takes."""
    models = {}
    for seed in range(3):
        torch.manual_seed(seed)
        models[f"seed {seed}"] = gpt2().eval().double()
    train, test = halves(sequences())
    measure = sk.measures.MSharpness(m=4, rho=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = sk.score_models(models, measure, train, test, progress=False)
    assert not len(scores.failures)
    metrics = scores.metrics().set_index("model")
    values = scores.frame().set_index("model").value
    for name, model in models.items():
        losses = []
        for part in (train, test):
            inputs = {key: part[key] for key in ("input_ids", "attention_mask")}
            problem = Problem(model, inputs, part["labels"], plain_loops.cross_entropy)
            losses.append(float(problem.loss().detach()))
            if part is train:
                assert values[name] == pytest.approx(
                    plain_loops.m_sharpness(problem, 4, 0.05), rel=1e-6
                )
        row = metrics.loc[name]
        assert [row["train_loss"], row["test_loss"]] == pytest.approx(losses, rel=1e-9)
        assert row["loss_gap"] == pytest.approx(losses[1] - losses[0], abs=1e-9)
    with pytest.warns(UserWarning, match="fewer than two hyperparameters"):
        (tau,) = sk.evaluate(scores, resamples=10).kendall_tau
    gaps = metrics.loss_gap.loc[list(models)]
    assert tau == pytest.approx(stats.kendalltau(values.loc[list(models)], gaps)[0])


def test_classifiers_of_sequences_are_scored_end_to_end():
    """With accuracies, and margins, which take one class per sequence."""
    case = BY_NAME["bert"]
    model, inputs, labels = case.make(torch.float64)
    model.eval()
    with torch.no_grad():
        right = (model(**inputs).logits.argmax(1) == labels).double()
    whole = {**inputs, "labels": labels}
    train, test = halves(whole)
    margin = sk.measures.make_measure("output_margin", percentile=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = sk.score_models(
            {"bert": model}, [sk.measures.MSharpness(m=4, rho=0.05), margin],
            train, test, progress=False,
        )  # fmt: skip
    assert not len(scores.failures)
    row = scores.model_configs["models"]["bert"]["metrics"]
    assert row["train_acc"] == pytest.approx(float(right[:4].mean()))
    assert row["test_acc"] == pytest.approx(float(right[2:].mean()))
    problem = Problem(
        model, {k: v[:4] for k, v in inputs.items()}, labels[:4], plain_loops.cross_entropy
    )
    found = scores.frame().set_index("measure").value
    assert found["m_sharpness"] == pytest.approx(
        plain_loops.m_sharpness(problem, 4, 0.05), rel=1e-6
    )
    logits = problem.outputs().logits.detach().numpy()
    own = logits[np.arange(4), labels[:4]]
    logits[np.arange(4), labels[:4]] = -np.inf
    assert found["output_margin"] == pytest.approx(np.median(own - logits.max(1)), rel=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "llama", "lora_gpt2"])
def test_large_logits_in_slices_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    """Output layer and loss as one, and the loss in slices of three positions."""
    case: Case = BY_NAME[name]
    model, inputs, labels = case.make(torch.float64)
    direction = torch.ones(sum(p.numel() for p in model.parameters() if p.requires_grad)).double()
    found = []
    for large in (
        surprise.large_bytes(torch.device("cpu")),
        3 * 8 * VOCABULARY * vocabulary._SLICES,
    ):
        monkeypatch.setitem(surprise._LARGE, "cpu", large)
        monkeypatch.setattr(vocabulary, "_WIDER", 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            matrix = sk.HessianOperator(model, (inputs, labels))
            sharpness = sk.m_sharpness(model, (inputs, labels), m=[1, 4], rho=case.rho)
        found.append((matrix.matvec(direction), matrix.gradient, torch.tensor(sharpness.value)))
        assert matrix.mode == "reverse"
        with vocabulary.OutputLayer() as watch:
            logits = model(**inputs).logits
        layer = watch.of(logits)
        assert layer is not None
        sliced = vocabulary.in_slices(resolve_loss(case.loss), logits, labels, layer)
        assert sliced == (large < 2**20)
    for plain, in_slices in zip(*found, strict=True):
        torch.testing.assert_close(in_slices, plain, rtol=1e-5, atol=1e-9)

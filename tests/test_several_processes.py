"""Several processes measure together: the numbers of one, the same on all, and how they end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ranks
import torch

import sharpkit as sk
from sharpkit.errors import ArgumentError

SCRIPTS = Path(__file__).parent / "torchrun"  # which the guide shows
# how the errors of `ranks.refusals` begin, the same on every rank
EXPECTED = {
    "a broken item": "RankError: rank {last} of {world}: OSError: the disk is gone",
    "NaN": "DataError: rank {last} of {world}: the inputs have NaN or infinite entries",
    "weights": "RankError: '0.bias' has other values on rank 1 than on rank 0: expected the same",
    "weights, m-sharpness": "RankError: '0.bias' has other values on rank 1 than on rank 0",
    "buffers": "RankError: '1.running_mean' has other values on rank 1 than on rank 0: give all",
    "loss": "RankError: loss: cross_entropy on rank 0, mse on rank {last}",
    "parameters": "RankError: the parameter '2.bias': nothing on rank 0, (3,) on rank {last}",
    "rho": "RankError: rho: (0.1,) on rank 0, (1.1,) on rank 1",
    "a bad m": "ArgumentError: rank {last} of {world}: m must be a whole number of examples >= 1",
    "n": "RankError: n: 5 on rank 0, 6 on rank 1",
    "tolerance": "ArgumentError: rank 0 of {world}: with a tolerance it stops after some",
    "few": "ArgumentError: 1 examples for {world} ranks",
    "other data": "DataError: the first or last example differs between ranks 0 and 1",
    "another number": "DataError: rank 0 has 37 examples, rank 1 has 36: expected the same data",
    "twins": "DataError: ranks 0 and 1 give the same examples",
    "a group on two ranks": "ArgumentError: rank 0 has 4 examples: every share but the last must",
    "a seed for shares": "ArgumentError: rank 0 of {world}: n = None, seed = 0, and each rank",
    "seed": "RankError: the vectors that are multiplied differ between ranks",
    "changed": "DataError: rank {last} of {world}: examples ",
    "a sampler": "DataError: rank 0 of {world}: the DataLoader has a DistributedSampler",
    "padding": "DataError: rank 0 of {world}: the DistributedSampler makes ",
    "a measure": "ArgumentError: gradient_noise: one process computes it",
    "one process alone": "DataError: the data are DistributedData, and this is computed in one",
}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    results = ranks.start(request.param, folder)
    results[0]["killed"] = (folder / "0.txt").read_text()
    return results


def alone(data):
    return data


def agree(found, name, expected, tolerance=1e-9):
    """The same bits on all ranks, and the numbers of one process."""
    for rank in found[1:]:
        assert ranks.same_bits(rank[name], found[0][name])
    for a, b in zip(found[0][name], expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*ranks.MEASURED, *ranks.OF_ALL_DATA])
def test_all_data_on_every_rank_are_measured_as_by_one_process(found, name):
    agree(found, name, {**ranks.MEASURED, **ranks.OF_ALL_DATA}[name](alone))


@pytest.mark.parametrize("name", [*ranks.MEASURED, *ranks.OF_SHARES])
def test_uneven_shares_are_measured_as_by_one_process(found, name):
    agree(found, f"shares: {name}", {**ranks.MEASURED, **ranks.OF_SHARES}[name](alone))


@pytest.mark.parametrize("name", ranks.DIFFERENCES)
def test_finite_differences_take_the_steps_of_one_process(found, name):
    # rounding, which depends on how sums are split, is divided by a step of 1e-6
    agree(found, f"differences: {name}", ranks.DIFFERENCES[name](alone), 1e-7)


def test_every_item_is_read_by_one_rank(found):
    read = [set(rank["read"]) for rank in found]
    ends = {0, ranks.N - 1}  # which all look at, to see whether their data are the same
    assert set.union(*read) == set(range(ranks.N))
    assert all((a & b) <= ends for i, a in enumerate(read) for b in read[:i])
    assert found[1]["text"].startswith("DistributedData(the same data on each of")


@pytest.mark.parametrize("name", EXPECTED)
def test_what_one_rank_gets_wrong_ends_all_with_the_same_message(found, name):
    texts = {rank["errors"][name] for rank in found}
    assert len(texts) == 1
    expected = EXPECTED[name].format(last=len(found) - 1, world=len(found))
    assert texts.pop().startswith(expected)
    assert set(found[0]["errors"]) == set(EXPECTED)


def test_a_killed_rank_ends_the_others(found):
    assert found[0]["killed"].startswith(
        f"RankError: rank 0 of {len(found)}: the other processes do not answer"
    )


def test_a_tracker_of_all_ranks_leaves_their_training_as_it_is(found):
    (rows, weights), (of_one, plain) = found[0]["ddp"]
    np.testing.assert_allclose(rows, of_one, rtol=1e-9)
    for rank in found:
        assert rank["ddp"][0][0] == rows
        for name, tensor in rank["ddp"][1][1].items():
            assert torch.equal(rank["ddp"][0][1][name], tensor)
    assert weights.keys() == plain.keys()


def test_a_group_of_some_processes(found):
    agree(found[:1], "subgroup", ranks.product(sk.HessianOperator(ranks.network(), ranks.data())))
    assert all("not in the process_group" in rank["outside"] for rank in found[1:])


def test_a_process_on_its_own_measures_all():
    values = [
        sk.m_sharpness(ranks.network(), given, m=4, rho=0.1).value
        for given in (ranks.data(), sk.DistributedData(ranks.data()))
    ]
    assert values[0] == values[1]
    H = sk.HessianOperator(ranks.network(), sk.DistributedData(ranks.data(), shares=True))
    assert H.n == ranks.N


def test_processes_that_have_not_met_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match=r"WORLD_SIZE is 2, .*init_process_group\(\) first"):
        sk.DistributedData(ranks.data())


def run(script, folder, *command):
    done = subprocess.run(
        [sys.executable, *command, str(SCRIPTS / script)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_torchrun_measures_as_one_process(tmp_path):
    outputs = [run("measure.py", tmp_path, *command) for command in ((), TORCHRUN)]
    one, two = ([float(v) for v in re.findall(r"\d+\.\d+", text)] for text in outputs)
    assert len(one) == 6
    np.testing.assert_allclose(one, two, rtol=1e-4)  # in float32, of a network with ReLU


@pytest.mark.slow
def test_torchrun_trains_with_a_tracker_on_all_ranks(tmp_path):
    run("train.py", tmp_path, *TORCHRUN)
    rows = pd.read_csv(tmp_path / "tracking.csv")
    assert list(rows.step) == [0, 5, 10, 15]
    assert rows.loss.iloc[-1] < rows.loss.iloc[0]
    assert (rows.lambda_max > 0).all()

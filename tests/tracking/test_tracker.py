"""A tracker sees what there is to see, at a small price, and leaves no trace in the training."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from trainings import images, noisy_network, plain_network, sgd, train

import sharpkit as sk
from sharpkit.display import LINES
from sharpkit.errors import ArgumentError, DataError, RunError
from sharpkit.measures import MSharpness
from sharpkit.tracking import pace

EVERYTHING = (
    "loss", "stability", "trace", "critical_sharpness", "distance", "gradient_noise",
    MSharpness(m=4, rho=0.05, n=16),
)  # fmt: skip
RESUMED = ("loss", "stability", "critical_sharpness", "distance")


def state(model, optimizer):
    """Everything that a training consists of, as bytes that can be compared."""
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    tensors += [v for s in optimizer.state.values() for v in s.values() if v is not None]
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    return [t.detach().numpy().tobytes() for t in tensors if t is not None], flags


@pytest.mark.parametrize("build", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)])
def test_training_reaches_the_same_bits_with_a_tracker(build):
    ends = []
    for tracker in (None, sk.Tracker(images(), measures=EVERYTHING, n=32, every=3)):
        model = noisy_network()
        optimizer = build(model)
        torch.manual_seed(1)
        train(model, optimizer, tracker, 6)
        ends.append((state(model, optimizer), torch.get_rng_state().tolist(), torch.rand(1)))
    assert len(tracker.rows) == 3
    assert ends[0] == ends[1]


def test_a_call_leaves_gradients_modes_and_random_state_alone():
    model = noisy_network()
    model[1].eval()  # a mixture of modes
    optimizer = sgd(model)
    x, y = images()
    nn.functional.cross_entropy(model(x), y).backward()
    gradients = [p.grad for p in model.parameters()]
    before = state(model, optimizer), torch.get_rng_state().tolist()
    sk.Tracker((x, y), measures=EVERYTHING, n=32)(model, optimizer, step=0)
    assert (state(model, optimizer), torch.get_rng_state().tolist()) == before
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_reaches_the_same_bits_on_a_gpu():
    ends = []
    for tracker in (None, sk.Tracker(images(), measures=EVERYTHING, n=32, every=3)):
        model = plain_network().cuda().double()
        optimizer = sgd(model)
        x, y = (t.cuda() for t in images())
        torch.manual_seed(1)
        for step in range(7):
            if tracker is not None:
                tracker(model, optimizer, step=step)
            optimizer.zero_grad()
            kept = torch.rand(len(x), 196, device="cuda").view(x.shape) > 0.2
            nn.functional.cross_entropy(model((x * kept).double()), y).backward()
            optimizer.step()
        ends.append([p.detach().cpu().numpy().tobytes() for p in model.parameters()])
    assert ends[0] == ends[1]


# --- λmax -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch", [128, pytest.param(16, marks=pytest.mark.slow)], ids=["full batch", "mini-batches"]
)
def test_a_followed_eigenvalue_is_that_of_a_cold_start_for_five_products(batch):
    """2 % were asked for; the residual of 2 % that is let pass errs by its square over the gap."""
    model = plain_network()
    optimizer = sgd(model, lr=0.1)
    tracker = sk.Tracker(images(), measures="stability", every=3)
    exact = []

    class Both:
        def __call__(self, model, optimizer, *, step):
            if tracker(model, optimizer, step=step) is not None:
                hessian = sk.HessianOperator(model.eval(), images())
                exact.append(eigsh(hessian.to_scipy(), 1, which="LA", tol=1e-4)[0][0])

    train(model, optimizer, Both(), 36, batch=batch)
    frame = tracker.frame()
    assert np.allclose(frame.lambda_max, exact, rtol=5e-3)
    assert np.all(frame.lambda_max <= np.array(exact) * (1 + 1e-4))
    assert (frame.lambda_max_residual <= 0.02 * frame.lambda_max).all()
    assert frame.lambda_max_products.min() == 5
    later = frame.lambda_max_products[frame.step >= 12]
    assert (later == 5).mean() > (0.9 if batch == 128 else 0.5)
    assert frame.lambda_max_products.max() <= 60


def test_full_batch_descent_hovers_at_its_threshold():
    """As Cohen et al. found: λmax is first above 2/η, and from then on a little more than 2/η."""
    x, y = images()
    targets = nn.functional.one_hot(y, 10).float()

    def squared(outputs, targets):
        return 0.5 * (outputs - targets).square().sum(1).mean()

    model = plain_network()
    optimizer = sgd(model, momentum=0.0)
    tracker = sk.Tracker((x, targets), loss=squared, every=20)
    for step in range(201):
        tracker(model, optimizer, step=step)
        optimizer.zero_grad()
        squared(model(x), targets).backward()
        optimizer.step()
    frame = tracker.frame()
    assert (frame.threshold == 10).all()
    assert frame.lambda_max[0] > 20
    assert frame.lambda_max[1:].between(8, 13).all()
    assert frame.loss.iloc[-1] < 0.75 * frame.loss.iloc[1]


def test_the_preconditioned_eigenvalue_is_that_of_the_dense_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.arange(30) % 3
    rates = {"weight": 0.01, "bias": 0.03}
    groups = [
        {"params": [p for n, p in model.named_parameters() if kind in n], "lr": rate}
        for kind, rate in rates.items()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.99), weight_decay=0.1)
    tracker = sk.Tracker((x, y), measures=["stability", "lambda_max"], every=1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    row = tracker(model, optimizer, step=3)
    hessian = sk.HessianOperator(model, (x, y))
    dense = hessian.to_dense() + 0.1 * torch.eye(hessian.shape[0])
    root = []
    for name, p in model.named_parameters():
        v = optimizer.state[p]["exp_avg_sq"].flatten() / (1 - 0.99**3)
        rate = rates[name.rpartition(".")[2]] / 0.03
        root.append((rate / ((1 - 0.8**3) * (v.sqrt() + 1e-8))).sqrt())
    root = torch.cat(root)
    top = torch.linalg.eigvalsh(root[:, None] * dense * root[None])[-1]
    assert row["preconditioned_lambda_max"] == pytest.approx(float(top), rel=1e-5)
    assert row["threshold"] == pytest.approx(3.6 / 0.2 / 0.03)
    plain = float(torch.linalg.eigvalsh(hessian.to_dense())[-1])
    assert row["lambda_max"] == pytest.approx(plain, rel=1e-5)


def test_only_what_the_optimizer_moves_counts():
    model = plain_network()
    head = torch.optim.SGD(model[3].parameters(), lr=0.1)
    row = sk.Tracker(images())(model, head, step=0)
    hessian = sk.HessianOperator(model, images(), parameters=model[3])
    top = sk.top_eigenvalues(hessian, 1).values[0]
    assert row["lambda_max"] == pytest.approx(top, rel=1e-4)


def test_an_eigenvalue_that_does_not_converge_is_said_to_be_a_lower_bound(monkeypatch):
    monkeypatch.setattr("sharpkit.tracking.following._LIMIT", 2)
    with pytest.warns(UserWarning, match=r"after 2 products the residual is .* lower bound"):
        row = sk.Tracker(images(), measures="lambda_max")(plain_network(), step=0)
    assert row["lambda_max_residual"] > 0.02 * row["lambda_max"]


# --- the other columns ------------------------------------------------------------------------


def test_columns_are_the_values_of_the_functions_they_are_named_after():
    model, data = plain_network(), images()
    tracker = sk.Tracker(data, measures=EVERYTHING, every=1)
    row = tracker(model, sgd(model), step=0)
    model.eval()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(data[0]), data[1])
    assert row["loss"] == pytest.approx(float(loss))
    assert row["gradient_noise"] == pytest.approx(sk.measures.gradient_noise(model, data))
    critical = sk.measures.critical_sharpness(model, data)
    assert row["critical_sharpness"] == pytest.approx(critical, rel=0.01)  # as far as it bisects
    found = sk.trace(sk.HessianOperator(model, data), products=30)
    assert row["trace"] == pytest.approx(found.value, rel=1e-5)
    assert row["trace_std_error"] == pytest.approx(found.std_error, rel=1e-3)
    sharpness = sk.m_sharpness(model, data, m=4, rho=0.05, n=16)
    assert row["m_sharpness_n16 m=4 rho=0.05"] == pytest.approx(sharpness.value)
    assert row["m_sharpness_n16 m=4 rho=0.05 std_error"] == pytest.approx(sharpness.std_error)
    assert (row["distance"], row["lr"]) == (0.0, 0.2)


def test_a_measure_of_ones_own_may_give_numbers_of_numpy(tmp_path):
    def largest_weight(model, data, *, seed):
        return {"form=max": np.float32(0.5), "form=mean": sk.measures.Estimate(np.float64(0.25))}

    tracker = sk.Tracker(images(), measures=[largest_weight], out=tmp_path / "t.csv")
    tracker(plain_network(), step=np.int64(0))
    frame = pd.read_csv(tmp_path / "t.csv")
    assert frame["largest_weight form=max"].tolist() == [0.5]
    assert frame["largest_weight form=mean"].tolist() == [0.25]
    torch.save(tracker.state_dict(), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


def test_distance_and_cosine_of_a_known_way():
    model = nn.Linear(2, 1, bias=False).double()
    tracker = sk.Tracker((torch.ones(2, 2), torch.ones(2, 1)), measures="distance", loss="mse")
    way = [(0.0, 0.0), (3.0, 4.0), (3.0, 9.0), (3.0, 4.0)]
    for step, weights in enumerate(way):
        model.weight.data = torch.tensor([weights], dtype=torch.float64)
        tracker(model, step=100 * step)
    frame = tracker.frame()
    assert frame.distance.tolist() == pytest.approx([0.0, 5.0, 90**0.5, 5.0])
    assert frame.update_cosine.tolist() == pytest.approx([np.nan, np.nan, 0.8, -1.0], nan_ok=True)


def test_epochs_are_counted_where_they_are_asked_for():
    tracker = sk.Tracker(images(), measures="loss", every=2, per="epoch")
    model = plain_network()
    for step in range(41):
        tracker(model, step=step, epoch=step // 8 if step % 8 == 0 else None)
    assert tracker.frame()[["step", "epoch"]].to_numpy().tolist() == [[0, 0], [16, 2], [32, 4]]


def test_batches_of_several_lengths_and_dictionaries():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

        def forward(self, tokens):
            return self.head(self.table(tokens).mean(1))

    torch.manual_seed(0)
    model = Words()
    batches = [({"tokens": torch.randint(0, 7, (4, k))}, torch.arange(4) % 3) for k in (3, 5)]
    row = sk.Tracker(batches)(model, sgd(model), step=0)
    losses = [nn.functional.cross_entropy(model(**x), y) for x, y in batches]
    assert row["loss"] == pytest.approx(float(sum(losses).detach() / 2))
    assert row["lambda_max"] > 0


# --- what cannot be measured ------------------------------------------------------------------


def test_weights_that_are_nan_leave_a_row_with_the_reason():
    model = plain_network()
    optimizer = sgd(model)
    tracker = sk.Tracker(images(), measures=["loss", "lambda_max", "distance"], every=1)
    tracker(model, optimizer, step=0)
    model[1].weight.data[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="step 1: not measured: lambda_max: .*NaN"):
        row = tracker(model, optimizer, step=1)
    assert "lambda_max" not in row and "lambda_max: " in row["failed"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker(model, optimizer, step=2)  # once is enough
    assert tracker.frame().failed.isna().tolist() == [True, False, False]


WRONG = {
    "no measure 'sharpness': expected a measure, or one of loss, stability": {
        "measures": ["sharpness"]
    },
    "has 'loss' twice": {"measures": ["loss", "loss"]},
    "measures is empty": {"measures": []},
    "distance_from_initial needs more": {"measures": ["distance_from_initial"]},
    "every is 0": {"every": 0},
    "per is 'batch'": {"per": "batch"},
    "budget is 0": {"budget": 0},
    "a logger is a int": {"loggers": [3]},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_at_once(message):
    with pytest.raises(ArgumentError, match=message):
        sk.Tracker(images(), **WRONG[message])


def test_calls_that_make_no_sense_are_refused():
    model = plain_network()
    with pytest.raises(ArgumentError, match=r"a threshold is that of an optimizer"):
        sk.Tracker(images())(model, step=0)
    with pytest.raises(ArgumentError, match="parameters that the model does not have"):
        sk.Tracker(images())(model, sgd(plain_network()), step=0)
    tracker = sk.Tracker(images(), measures="loss", every=5)
    tracker(model, step=10)
    assert tracker(model, step=10) is None
    with pytest.raises(ArgumentError, match="step is 5, after step 10"):
        tracker(model, step=5)
    with pytest.raises(DataError):
        sk.Tracker((torch.randn(4, 1, 14, 14), torch.tensor([0, 1, 2, 10])))(
            model, sgd(model), step=0
        )


def test_sharded_parameters_are_refused(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_module

        model = distribute_module(nn.Linear(4, 3), init_device_mesh("cpu", (1,)))
        with pytest.raises(ArgumentError, match="'weight' is sharded"):
            sk.Tracker((torch.randn(6, 4), torch.arange(6) % 3))(model, sgd(model), step=0)
    finally:
        distributed.destroy_process_group()


# --- the budget -------------------------------------------------------------------------------


class Clock:
    """Ten seconds a step; what the tracker does takes as long as is said."""

    def __init__(self, tracker, prices):
        self.now, self.prices = 0.0, iter(prices)
        tracker._pace._clock = lambda: self.now
        measured = tracker._measured

        def slow(*args):
            self.now += next(self.prices)
            return measured(*args)

        tracker._measured = slow


def test_a_budget_decides_how_often_and_says_what_it_left_out():
    tracker = sk.Tracker(images(), measures="loss", every=1, budget=0.05)
    clock = Clock(tracker, [3.0, 1.0, 1.0, 2.0, 1.0, 1.0])
    model = plain_network()
    for step in range(20):
        tracker(model, step=step)
        clock.now += 10.0
    # after k steps 10 k seconds are trained: 0.5 k may be spent, on what was and the last price
    assert tracker.frame().step.tolist() == [0, 12, 13, 14, 18, 19]
    assert tracker.frame().seconds.tolist() == [3.0, 1.0, 1.0, 2.0, 1.0, 1.0]
    assert tracker.frame().skipped.tolist() == [0, 11, 0, 0, 3, 0]
    assert tracker.skipped == [*range(1, 12), 15, 16, 17]
    assert "14 of 20 that were due skipped to stay within 5% of the training time" in repr(tracker)


def test_time_between_a_save_and_going_on_is_no_training_time():
    now = 0.0
    first = pace.Pace(0.1, lambda: now)
    first.begin()
    now = 2.0
    first.end()
    second = pace.Pace(0.1, lambda: now)
    second.load_state_dict(first.state_dict())
    now = 1000.0
    assert not second.begin()
    now = 1041.0
    assert second.begin()


# --- files, resuming --------------------------------------------------------------------------


def columns(tracker):
    return tracker.frame().drop(columns="seconds")


def test_a_resumed_training_has_the_rows_of_one_that_was_not_stopped(tmp_path):
    def build(model):
        return torch.optim.Adam(model.parameters(), lr=0.01)

    def tracker(name):
        return sk.Tracker(images(), measures=RESUMED, n=32, every=4, out=tmp_path / f"{name}.csv")

    model = plain_network()
    optimizer, whole = build(model), tracker("whole")
    train(model, optimizer, whole, 16)

    model = plain_network()
    optimizer, stopped = build(model), tracker("stopped")
    train(model, optimizer, stopped, 8)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    stopped(model, optimizer, step=12)  # what was measured after the checkpoint is dropped

    model = plain_network(seed=5)
    optimizer, resumed = build(model), tracker("stopped")
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(model, optimizer, resumed, 16, start=8)
    pd.testing.assert_frame_equal(columns(resumed), columns(whole))
    read = [
        pd.read_csv(tmp_path / f"{k}.csv").drop(columns="seconds") for k in ("whole", "stopped")
    ]
    pd.testing.assert_frame_equal(*read)
    pd.testing.assert_frame_equal(read[0], columns(whole), check_dtype=False)


def test_a_state_of_another_tracker_is_refused():
    state = sk.Tracker(images(), measures="loss", every=4).state_dict()
    for other in ({"every": 5}, {"measures": "lambda_max"}, {"n": 20}, {"loss": "mse"}):
        options = {"measures": "loss", "every": 4, **other}
        with pytest.raises(RunError, match="the tracker's state: was started with another"):
            sk.Tracker(images(), **options).load_state_dict(state)


def test_rows_of_another_training_are_not_overwritten(tmp_path):
    (tmp_path / "t.csv").write_text("step,loss\n0,1.0\n")
    tracker = sk.Tracker(images(), measures="loss", out=tmp_path / "t.csv")
    with pytest.raises(RunError, match=r"t\.csv: has rows already"):
        tracker(plain_network(), step=0)
    assert (tmp_path / "t.csv").read_text() == "step,loss\n0,1.0\n"


_KILLED = """
import os, signal, sys, torch
import sharpkit as sk
from trainings import images, plain_network, sgd, train
tracker = sk.Tracker(images(), measures=["loss", "distance"], every=1, out=sys.argv[1])
tracker.loggers.append(lambda row: row["sharpness/step"] == 5 and os.kill(os.getpid(), 9))
model = plain_network()
train(model, sgd(model), tracker, 100)
"""


@pytest.mark.slow
def test_a_killed_training_leaves_a_readable_file(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "t.csv")],
        env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    frame = pd.read_csv(tmp_path / "t.csv")
    assert frame.step.tolist() == [0, 1, 2, 3, 4, 5]
    assert frame.distance.iloc[-1] > 0


# --- loggers, and what is shown ---------------------------------------------------------------


def test_rows_go_to_whatever_logs():
    class Board:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

    class Wandb:
        def __init__(self):
            self.logged = []

        def log(self, values):
            self.logged.append(values)

    class Mlflow:
        def __init__(self):
            self.logged = []

        def log_metrics(self, values, step):
            self.logged.append((values, step))

    plain = []
    board, run, mlflow = Board(), Wandb(), Mlflow()
    tracker = sk.Tracker(images(), measures="loss", loggers=[board, run, mlflow, plain.append])
    loss = tracker(plain_network(), step=100)["loss"]
    assert ("sharpness/loss", loss, 100) in board.scalars
    for values in (run.logged[0], mlflow.logged[0][0], plain[0]):
        assert values["sharpness/loss"] == loss and values["sharpness/step"] == 100
    assert mlflow.logged[0][1] == 100


def test_a_tracker_shows_as_a_few_lines_and_a_picture(tmp_path):
    model = plain_network()
    tracker = sk.Tracker(images(), every=1)
    assert repr(tracker) == "Tracker: 0 measurements of loss, stability"
    train(model, sgd(model), tracker, 12)
    assert len(repr(tracker).splitlines()) <= LINES and "4 more rows" in tracker._repr_html_()
    figure = tracker.plot(tmp_path / "sharpness.png")
    top, below = figure.axes
    assert [line.get_label() for line in top.lines] == ["λmax", "threshold"]
    assert np.array_equal(top.lines[0].get_ydata(), tracker.frame().lambda_max)
    assert np.array_equal(below.lines[0].get_ydata(), tracker.frame().loss)
    assert (tmp_path / "sharpness.png").is_file()
    assert len(pd.read_csv(tmp_path / "sharpness.csv")) == 13

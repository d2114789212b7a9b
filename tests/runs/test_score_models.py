"""Scoring plain modules: the measures' own values, resumed by content, no model lost."""

from __future__ import annotations

import copy
import gc
import weakref

import pandas as pd
import pytest
import torch
from cores import slow_beyond
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zoos import write_small_zoo

import sharpkit as sk
from sharpkit.contract.loading import load_examples
from sharpkit.errors import ArgumentError, DataError, RunError

MEASURE = sk.MSharpness(m=[1, 4], rho=[0.05, 0.1])
LOSS = sk.measures.make_measure("training_loss")


def network(seed, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(), nn.Linear(width, 3)
    )


def examples(seed, count):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


TRAIN, TEST = examples(0, 24), examples(1, 157)  # the test data are several batches


@pytest.fixture
def models():
    return {f"net {k}": network(k, 4 + 2 * k) for k in range(5)}


def score(models, measures=MEASURE, train=TRAIN, test=TEST, **options):
    return sk.score_models(models, measures, train, test, progress=False, **options)


def value(frame, model, **setting):
    rows = frame[frame["model"] == model]
    for column, wanted in setting.items():
        rows = rows[rows[column] == wanted]
    assert len(rows) == 1
    return rows["value"].item()


class Counting:
    """The largest weight; notes for which models it was called."""

    name = "largest"

    def __init__(self):
        self.calls = 0

    def __call__(self, model, data, *, seed):
        self.calls += 1
        return max(float(p.detach().abs().max()) for p in model.parameters())


def test_values_are_those_of_direct_calls_bit_for_bit(models):
    frame = score(models, [MEASURE, LOSS], seed=3).frame()
    assert len(frame) == 5 * (4 + 1)
    for name, model in models.items():
        direct = MEASURE(model, TRAIN, seed=3)
        for m in (1, 4):
            for rho in (0.05, 0.1):
                expected = direct[f"m={m},rho={rho}"]
                rows = frame.query(f"model == '{name}' and m == {m} and rho == {rho}")
                assert rows["value"].item() == expected.value
                assert rows["std_error"].item() == expected.std_error
        expected = sk.measures.training_loss(model, TRAIN).value
        assert value(frame, name, measure="training_loss") == expected


def test_a_subset_is_the_one_that_score_zoo_takes(models):
    frame = score(models, LOSS, n=7, seed=2).frame()
    subset = load_examples(TRAIN, n=7, seed=2)
    for name, model in models.items():
        expected = sk.measures.training_loss(model, (subset.inputs, subset.labels)).value
        assert value(frame, name) == expected


def test_accuracies_and_losses_equal_a_plain_loop(models):
    configs = score(models, LOSS, n=5).model_configs["models"]
    assert list(configs) == list(models)
    for name, model in models.items():
        model.eval()
        metrics = configs[name]["metrics"]
        for split, (inputs, labels) in {"train": TRAIN, "test": TEST}.items():
            right, total = 0, 0.0
            for x, y in zip(inputs, labels, strict=True):
                logits = model(x[None]).detach()[0]
                right += int(logits.argmax() == y)
                total -= float(logits.double().log_softmax(0)[y])
            assert metrics[f"{split}_acc"] == right / len(labels)
            # batches and single examples round differently in float32
            assert metrics[f"{split}_loss"] == pytest.approx(total / len(labels), rel=1e-5)


def test_models_are_left_as_they_were(models):
    model = models["net 1"].train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    tensors = [id(p) for p in model.parameters()]
    random = torch.get_rng_state()
    score(models, [MEASURE, LOSS])
    assert [module.training for module in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == tensors
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("shuffle", slow_beyond(1, [True, False]))
def test_data_sets_and_loaders_give_the_same(models, shuffle):
    pairs = [TensorDataset(*TRAIN), TensorDataset(*TEST)]
    loaders = [DataLoader(data, batch_size=10, shuffle=shuffle) for data in pairs]
    expected = score(models)
    for train, test in (pairs, loaders):
        scores = score(models, train=train, test=test)
        pd.testing.assert_frame_equal(scores.frame(), expected.frame(), check_exact=True)
        assert scores.model_configs == expected.model_configs


def test_metrics_are_a_table_with_a_row_per_model(models):
    scores = score({**models, "broken": lambda: 3}, LOSS)
    table = scores.metrics()
    names = ["train_acc", "test_acc", "train_loss", "test_loss"]
    assert list(table.columns) == ["task", "model", *names, "generalization_gap"]
    assert set(table["task"]) == {"models"}
    rows = table.set_index("model")
    assert list(rows.index) == [*models, "broken"]
    for name in models:
        metrics = scores.model_configs["models"][name]["metrics"]
        assert rows.loc[name, names].to_dict() == metrics
        gap = metrics["train_acc"] - metrics["test_acc"]
        assert rows.loc[name, "generalization_gap"] == gap
    assert rows.loc["broken", [*names, "generalization_gap"]].isna().all()


def test_functions_are_called_in_turn_and_their_modules_released():
    alive = weakref.WeakSet()
    most = []

    def load(k):
        gc.collect()
        most.append(len(alive))
        model = network(k)
        alive.add(model)
        return model

    scores = score({f"{k}": lambda k=k: load(k) for k in range(4)}, [MEASURE, LOSS])
    assert most == [0, 0, 0, 0]
    expected = score({f"{k}": network(k) for k in range(4)}, [MEASURE, LOSS])
    pd.testing.assert_frame_equal(scores.frame(), expected.frame(), check_exact=True)


def test_a_resumed_run_skips_what_is_done_and_rescores_what_changed(models, tmp_path):
    counting = Counting()
    score(models, counting, out=tmp_path)
    assert counting.calls == 5
    score({name: copy.deepcopy(model) for name, model in models.items()}, counting, out=tmp_path)
    assert counting.calls == 5
    with torch.no_grad():
        models["net 2"][0].weight[0, 0] = 9.0
    scores = score({**models, "new": network(9)}, counting, out=tmp_path)
    assert counting.calls == 7
    assert value(scores.frame(), "net 2") == 9.0
    fresh = score({**models, "new": network(9)}, Counting())
    pd.testing.assert_frame_equal(scores.frame(), fresh.frame(), check_exact=True)
    assert scores.model_configs == fresh.model_configs


def test_another_activation_or_statistic_of_batchnorm_counts_as_a_change(models, tmp_path):
    counting = Counting()
    score(models, counting, out=tmp_path)
    models["net 0"][2] = nn.Tanh()
    models["net 1"][1].running_mean += 1
    score(models, counting, out=tmp_path)
    assert counting.calls == 5 + 2


def test_other_training_data_rescore_and_other_test_data_change_accuracies_only(models, tmp_path):
    counting = Counting()
    score(models, counting, out=tmp_path)
    scores = score(models, counting, out=tmp_path, test=examples(7, 30))
    assert counting.calls == 5
    assert scores.model_configs == score(models, counting, test=examples(7, 30)).model_configs
    counting.calls = 0
    score(models, counting, out=tmp_path, train=examples(8, 24))
    assert counting.calls == 5


def test_another_configuration_or_fewer_models_are_refused(models, tmp_path):
    before = score(models, LOSS, out=tmp_path).frame()
    with pytest.raises(RunError, match="another configuration"):
        score(models, LOSS, out=tmp_path, seed=1)
    with pytest.raises(RunError, match="not given: net 0"):
        score({k: m for k, m in models.items() if k != "net 0"}, LOSS, out=tmp_path)
    zoo = sk.load_zoo(write_small_zoo(tmp_path / "zoo"))
    with pytest.raises(RunError, match="another configuration"):
        sk.score_zoo(zoo, LOSS, out=tmp_path, progress=False)
    pd.testing.assert_frame_equal(sk.Scores.open(tmp_path).frame(), before)


def test_broken_models_are_recorded_and_left_out_of_the_evaluation(models, tmp_path):
    def missing():
        raise FileNotFoundError("net 5.pt")

    broken = {"absent": missing, "no module": lambda: 3, "nan": network(6)}
    broken |= {"two classes": nn.Linear(5, 2), "images": nn.Linear(6, 3)}
    with torch.no_grad():
        broken["nan"][0].bias[0] = torch.nan
    scores = score({**broken, **models}, MEASURE, out=tmp_path)
    errors = scores.failures.set_index("model")["error"]
    assert sorted(errors.index) == sorted(broken)
    assert errors["absent"] == "FileNotFoundError: net 5.pt"
    assert "returned int: expected an nn.Module" in errors["no module"]
    assert "parameter '0.bias' has 1 NaN" in errors["nan"]
    assert "expected labels in [0, 1]" in errors["two classes"]
    assert "shape" in errors["images"]
    expected = score(models, MEASURE)
    pd.testing.assert_frame_equal(scores.frame(), expected.frame(), check_exact=True)
    with pytest.warns(
        UserWarning, match="no value for 5 of 10 models, which are left out: nan, absent"
    ):
        table = sk.evaluate(scores, resamples=10)
    assert set(table["left_out"].iloc[0].split(", ")) == set(broken)
    pd.testing.assert_frame_equal(
        table.drop(columns="left_out"),
        sk.evaluate(expected, resamples=10).drop(columns="left_out"),
        check_exact=True,
    )
    # and repaired, it is scored at the next start
    repaired = {**broken, "absent": network(5)}
    assert "absent" not in set(
        score({**repaired, **models}, MEASURE, out=tmp_path).failures["model"]
    )


def test_a_failing_measure_loses_neither_the_others_nor_the_accuracies(models):
    def explodes(model, data, *, seed):
        raise RuntimeError("kernel exploded")

    scores = score(models, [explodes, LOSS])
    assert set(scores.failures["error"]) == {"RuntimeError: kernel exploded"}
    assert set(scores.failures["measure"]) == {"explodes"}
    assert scores.frame()["model"].nunique() == 5
    assert all(0 <= c["metrics"]["test_acc"] <= 1 for c in scores.model_configs["models"].values())


def test_measures_that_need_the_initial_network(models, tmp_path):
    distance = sk.measures.make_measure("distance_from_initial")
    initial = {name: network(100 + k, 4 + 2 * k) for k, name in enumerate(models)}
    without = score(models, [distance, LOSS], out=tmp_path)
    assert without.failures["error"].str.contains("needs the network before training").all()
    assert set(without.frame()["measure"]) == {"training_loss"}
    loaded = {name: (lambda m=model: m) for name, model in initial.items()}
    first = score(models, [distance, LOSS], out=tmp_path, initial=loaded).frame()
    for name, model in models.items():
        expected = sk.measures.distance_from_initial(model, TRAIN, initial=initial[name])
        rows = first[(first["model"] == name) & (first["measure"] == "distance_from_initial")]
        assert sorted(rows["value"]) == sorted(expected.values())
    with torch.no_grad():
        initial["net 3"][0].weight[0, 0] += 5
    second = score(models, [distance, LOSS], out=tmp_path, initial=initial).frame()
    assert set(first[first["value"] != second["value"]]["model"]) == {"net 3"}


def test_evaluation_without_hyperparameters_gives_scipys_tau(models):
    scores = score(models, [MEASURE, LOSS])
    with pytest.warns(UserWarning, match="fewer than two hyperparameters"):
        table = sk.evaluate(scores, resamples=10)
    configs = scores.model_configs["models"]
    gaps = [c["metrics"]["train_acc"] - c["metrics"]["test_acc"] for c in configs.values()]
    assert len(set(gaps)) == 5  # without ties both variants of tau are the same
    frame = scores.frame()
    for _, row in table.iterrows():
        here = frame[frame["measure"] == row["measure"]]
        if row["measure"] == "m_sharpness":
            here = here[(here["m"] == row["m"]) & (here["rho"] == row["rho"])]
        values = here.set_index("model")["value"].loc[list(models)]
        # a quotient of small integers, rounded once or twice
        assert row["kendall_tau"] == pytest.approx(stats.kendalltau(values, gaps)[0], abs=1e-12)
        assert row["pearson"] == pytest.approx(stats.pearsonr(values, gaps)[0], abs=1e-9)
    assert table["granulated_kendall"].isna().all()
    assert table["cmi_pgdl"].isna().all()  # it needs two hyperparameters
    figure = sk.plot.predictive_power(table, statistic="kendall_tau")
    drawn = sorted(y for line in figure.axes[0].get_lines() for y in line.get_ydata())
    of_m = table["kendall_tau"][table["m"].notna()]
    assert set(of_m) <= set(drawn)


def test_with_hyperparameters_it_is_scored_and_evaluated_as_a_zoo(tmp_path):
    task = sk.load_zoo(write_small_zoo(tmp_path / "zoo"))["small"]
    # the zoo's metrics are made up: write true ones, as score_models finds them
    train, test = task.dataset("train"), task.dataset("test")
    models = {entry.id: entry.load for entry in task.values()}
    hyperparameters = {entry.id: entry.hyperparameters for entry in task.values()}
    measures = [MEASURE, sk.measures.make_measure("distance_from_initial")]
    ours = score(
        models,
        measures,
        train,
        test,
        n=24,
        hyperparameters=hyperparameters,
        initial={entry.id: (lambda e=entry: e.load("initial")) for entry in task.values()},
    )
    found = ours.model_configs["models"]
    for name, config in task.model_configs.items():
        assert found[name]["hparams"] == config["hparams"]
        config["metrics"] = found[name]["metrics"]
    theirs = sk.score_zoo(task, measures, n=24, progress=False)
    frames = [scores.frame().drop(columns="task") for scores in (ours, theirs)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    tables = [sk.evaluate(s, resamples=20).drop(columns="task") for s in (ours, theirs)]
    assert tables[0]["cmi_jiang"].notna().all()
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.parametrize("count", [5, 12])
def test_combine_and_the_report_take_the_run(tmp_path, count):
    models = {f"net {k}": network(k, 4 + k) for k in range(count)}
    scores = score({**models, "broken": lambda: 1}, [MEASURE, LOSS], out=tmp_path)
    combined = sk.combine(scores, resamples=10)
    assert len(combined) == (count >= 10)  # fewer models cannot be combined
    with pytest.warns(UserWarning, match="left out: broken"):
        text = sk.write_report(tmp_path, resamples=10).read_text(encoding="utf-8")
    assert "net 3" in text
    assert "returned int: expected an nn.Module" in text
    reproduce = text[text.index('<section id="reproduce">') :]
    assert "that the command line does not know" in reproduce
    assert "sharpkit score" not in reproduce


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": {}}, "no models are given"),
        ({"models": [network(0)]}, "models: found list, expected a mapping of names to modules"),
        ({"initial": [network(0)]}, "initial: found list, expected a mapping of names to modules"),
        ({"hyperparameters": [{}]}, "hyperparameters: found list, expected a mapping of models"),
        (
            {"hyperparameters": {"a": {"width": 1}, "b": [1]}},
            "hyperparameters of b: found list, expected a mapping of names to values",
        ),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"models": {"a": 3}}, "a: found int, expected an nn.Module or a function"),
        ({"models": {3: network(0)}}, "found the name 3, expected text"),
        ({"models": {"7": network(0), "model_7": network(1)}}, "rename one"),
        ({"measures": []}, "no measure is given"),
        ({"measures": [LOSS, LOSS]}, "same name"),
        ({"n": 0}, "n must be at least 1"),
        ({"n": 25}, "n = 25 examples asked for: expected 1 to 24"),
        ({"n": 3, "measures": MEASURE}, "m = 4 is larger than n = 3"),
        ({"measures": sk.MSharpness(m=25, rho=0.1)}, "m = 25 is larger than n = 24"),
        ({"hyperparameters": {"a": {"width": 1}}}, "hyperparameters lacks the models b"),
        (
            {"hyperparameters": {"a": {"width": 1}, "b": {"depth": 1}}},
            "hyperparameters of b: found depth, expected those of a: width",
        ),
        (
            {"hyperparameters": {"a": {"width": 1}, "b": {"width": [1]}}},
            "hyperparameters of b, width: found list",
        ),
        ({"hyperparameters": {"a": {}, "b": {}, "c": {}}}, "not given: c"),
        ({"initial": {"b": network(0)}}, "initial lacks the models a"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    plain = {"models": {"a": network(0), "b": network(1)}, "measures": LOSS}
    with pytest.raises(ArgumentError, match=message):
        score(**{**plain, **arguments})


def test_models_may_be_a_module_dict() -> None:
    models = {"a": network(0), "b": network(1)}
    rows = [score(models=m, measures=LOSS).frame() for m in (models, nn.ModuleDict(models))]
    pd.testing.assert_frame_equal(*rows)


def test_data_that_cannot_be_read_are_refused_at_once(models):
    with pytest.raises(DataError, match="NaN"):
        score(models, test=(torch.full((2, 5), torch.nan), torch.zeros(2, dtype=torch.long)))


def test_a_run_directory_has_its_values_as_a_table_with_a_legend(tmp_path):
    torch.manual_seed(0)
    data = torch.randn(12, 4), torch.arange(12) % 3
    scores = sk.score_models(
        {"a": nn.Linear(4, 3)}, sk.MSharpness(m=1, rho=0.1), data, data, out=tmp_path
    )
    table = pd.read_csv(tmp_path / "scores.csv")
    assert table["value"].item() == scores.frame()["value"].item()
    assert (tmp_path / "scores_columns.csv").is_file()

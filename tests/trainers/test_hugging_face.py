"""The Trainer of Hugging Face: a tracker sees its steps and goes on with its checkpoints."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from problems import close, sam_by_hand, same, weights
from recipes.hugging_face import SamTrainer
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import sharpkit as sk
from sharpkit.errors import RunError
from sharpkit.tracking import hugging_face_callback

N, LENGTH, WORDS = 24, 6, 20


def sentences():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, WORDS, (N, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (N, 1), generator=generator)).long()
    return {"input_ids": ids, "attention_mask": mask}, ids[:, 0] % 3


def bert(dropout=0.0):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=LENGTH, num_labels=3,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def trainer(out, callbacks=(), *, kind=Trainer, dtype=torch.float64, **options):
    inputs, labels = sentences()
    rows = [{**{k: v[i] for k, v in inputs.items()}, "labels": labels[i]} for i in range(N)]
    settings = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "max_steps": 8,
        "learning_rate": 1e-3, "save_steps": 4, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "logging_strategy": "no", **options,
    }  # fmt: skip
    model = bert(0.1) if kind is Trainer else bert().to(dtype)
    arguments = TrainingArguments(**settings)
    made = kind(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))
    # this model's loss is a mean that knows nothing of other batches: let the Trainer divide it
    made.model_accepts_loss_kwargs = False
    return made


def tracker(**options):
    return sk.Tracker(sentences(), **{"measures": ("loss", "stability"), "every": 2, **options})


def rows(track):
    return track.frame().drop(columns="seconds")


def test_training_is_the_same_with_a_tracker(tmp_path):
    plain = trainer(tmp_path / "plain")
    plain.train()
    track = tracker()
    tracked = trainer(tmp_path / "tracked", [hugging_face_callback(track)])
    tracked.train()
    assert same(weights(plain.model), weights(tracked.model))
    frame = track.frame()
    assert frame.step.tolist() == [0, 2, 4, 6, 8]
    assert frame.preconditioned_lambda_max.notna().tolist() == [False, True, True, True, True]
    assert frame.threshold[1] == pytest.approx(38 / frame.lr[1], rel=1e-6)


def test_it_goes_on_with_a_checkpoint(tmp_path):
    whole = tracker()
    trainer(tmp_path / "whole", [hugging_face_callback(whole)]).train()
    track = tracker(out=tmp_path / "rows.csv")
    again = trainer(tmp_path / "whole", [hugging_face_callback(track)])
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    pd.testing.assert_frame_equal(rows(track), rows(whole))
    assert pd.read_csv(tmp_path / "rows.csv").step.tolist() == [0, 2, 4, 6, 8]


def test_a_checkpoint_without_a_tracker_says_so(tmp_path):
    trainer(tmp_path, max_steps=4).train()
    with pytest.raises(RunError, match=r"checkpoint-4.sharpkit_tracker.pt: is missing"):
        trainer(tmp_path, [hugging_face_callback(tracker())]).train(resume_from_checkpoint=True)


def test_accumulated_gradients_make_one_step(tmp_path):
    track = tracker(every=1)
    callback = hugging_face_callback(track)
    trainer(tmp_path, [callback], gradient_accumulation_steps=3, max_steps=4).train()
    assert track.frame().step.tolist() == [0, 1, 2, 3, 4]


def test_epochs(tmp_path):
    track = tracker(measures="loss", every=1, per="epoch")
    options = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "no"}
    trainer(tmp_path, [hugging_face_callback(track)], **options).train()
    assert track.frame()[["step", "epoch"]].to_numpy().tolist() == [[0, 0], [6, 1], [12, 2]]


# --- SAM --------------------------------------------------------------------------------------


class SgdSamTrainer(SamTrainer):
    base, rho = torch.optim.SGD, 0.1


class SometimesTrainer(SgdSamTrainer):
    interval = 2


def batches(steps, of):
    inputs, labels = sentences()
    pieces = [
        ({k: v[i : i + 4] for k, v in inputs.items()}, labels[i : i + 4]) for i in range(0, N, 4)
    ]
    return [[pieces[(step * of + i) % len(pieces)] for i in range(of)] for step in range(steps)]


def sam_trained(out, of, callbacks=(), **options):
    """In the order of the data, at a constant learning rate, without dropout."""
    kind = {"kind": SgdSamTrainer, "max_steps": 3, "learning_rate": 0.1, "save_strategy": "no"}
    ordered = {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    accumulated = {"gradient_accumulation_steps": of}
    made = trainer(out, callbacks, **{**kind, **ordered, **accumulated, **options})
    made.train()
    return made.model


def by_hand(of, clip, dtype=torch.float64, interval=1):
    model = bert().to(dtype).train()
    return sam_by_hand(
        model, batches(3, of), clip=clip, interval=interval,
        loss=lambda model, x, y: torch.nn.functional.cross_entropy(model(**x).logits, y),
    )  # fmt: skip


@pytest.mark.parametrize("of", [1, 2])
@pytest.mark.parametrize("clip", [1e9, 0.3], ids=["unclipped", "clipped"])
def test_sam_is_algorithm_1(of, clip, tmp_path):
    model = sam_trained(tmp_path, of, max_grad_norm=clip)
    assert close(weights(model), weights(by_hand(of, clip)))


@pytest.mark.parametrize("of", [1, 2])
def test_sam_in_some_steps(of, tmp_path):
    model = sam_trained(tmp_path, of, kind=SometimesTrainer, max_grad_norm=0.3)
    assert close(weights(model), weights(by_hand(of, 0.3, interval=2)))


def test_sam_with_bfloat16_and_a_tracker(tmp_path):
    """8 bits of mantissa: the way is that of float32 to some per cent of its length."""
    track = tracker(every=1, measures=["loss", "lambda_max"])
    callback = hugging_face_callback(track)
    model = sam_trained(tmp_path, 1, [callback], bf16=True, dtype=torch.float32, max_grad_norm=1e9)
    exact, start, end = (
        torch.cat([w.flatten() for w in weights(m)])
        for m in (by_hand(1, 1e9, torch.float32), bert(), model)
    )
    assert not torch.equal(end, exact)
    assert (end - exact).norm() < 0.1 * (exact - start).norm()
    assert track.frame().step.tolist() == [0, 1, 2, 3]

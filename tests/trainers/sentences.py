"""A small BERT and its Trainer: the training that the Trainer of Hugging Face does here."""

from __future__ import annotations

import torch
from problems import sam_by_hand
from recipes.hugging_face import SamTrainer
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

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


class SgdSamTrainer(SamTrainer):
    base, rho = torch.optim.SGD, 0.1


def batches(steps, of):
    """What the Trainer sees in the order of the data: so many batches to a step."""
    inputs, labels = sentences()
    pieces = [
        ({k: v[i : i + 4] for k, v in inputs.items()}, labels[i : i + 4]) for i in range(0, N, 4)
    ]
    return [[pieces[(step * of + i) % len(pieces)] for i in range(of)] for step in range(steps)]


def sam_trained(out, of, callbacks=(), *, resume=None, **options):
    """In the order of the data, at a constant learning rate, without dropout."""
    kind = {"kind": SgdSamTrainer, "max_steps": 3, "learning_rate": 0.1, "save_strategy": "no"}
    ordered = {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    accumulated = {"gradient_accumulation_steps": of}
    made = trainer(out, callbacks, **{**kind, **ordered, **accumulated, **options})
    made.train(resume_from_checkpoint=resume)
    return made.model


def by_hand(of, clip, dtype=torch.float64, ranks=1, interval=1):
    """Three steps; of several ranks, each has `of` batches to a step."""
    model = bert().to(dtype).train()
    return sam_by_hand(
        model, batches(3, of * ranks), clip=clip, ranks=ranks, interval=interval,
        loss=lambda model, x, y: torch.nn.functional.cross_entropy(model(**x).logits, y),
    )  # fmt: skip

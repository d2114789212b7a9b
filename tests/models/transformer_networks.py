"""Networks of transformers and peft, built from small configurations, without downloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import peft
import torch
import transformers
from case import CLASSES, Case, N, classes, images
from torch import Generator, Tensor, nn

VOCABULARY, LENGTH = 30, 7

# Llama's norms and rotations are computed in float32 by its own code, also in a float64 model
FLOAT32_INSIDE = 1e-4


def tokens(g: Generator) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, VOCABULARY, (N, LENGTH), generator=g)}


def masked_tokens(g: Generator) -> dict[str, Tensor]:
    lengths = torch.tensor([7, 3, 5, 2, 7, 4])
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
    words = tokens(g)["input_ids"] * mask
    return {"input_ids": words, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}


def next_tokens(g: Generator) -> Tensor:
    """Unequal numbers of labelled positions; the last example has none."""
    labels = torch.randint(0, VOCABULARY, (N, LENGTH), generator=g)
    labelled = torch.tensor([7, 1, 4, 2, 6, 0]).unsqueeze(1)
    return labels.where(torch.arange(LENGTH) < labelled, -100)


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=LENGTH, num_labels=CLASSES,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


def hugging_face_vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=32, patch_size=8, num_labels=CLASSES,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def lora_gpt2() -> nn.Module:
    return peft.get_peft_model(
        gpt2(),
        peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.0,
                        init_lora_weights=False),
    )  # fmt: skip


def checkpointed(build: Callable[[], nn.Module], use_reentrant: bool) -> Callable[[], nn.Module]:
    def build_checkpointed() -> nn.Module:
        model = build()
        if not isinstance(model, peft.PeftModel):
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            return model
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        return model

    return build_checkpointed


def image_keywords(g: Generator) -> dict[str, Tensor]:
    return {"pixel_values": images(32)(g)}


TRANSFORMERS = [
    Case("bert", bert, masked_tokens, classes, smooth=True),
    Case("gpt2", gpt2, tokens, next_tokens, smooth=True),
    Case("llama", llama, tokens, next_tokens, tolerance=FLOAT32_INSIDE),
    Case("hugging_face_vit", hugging_face_vit, image_keywords, classes, smooth=True),
    Case("lora_gpt2", lora_gpt2, tokens, next_tokens, smooth=True),
]


def in_training(case: Case, use_reentrant: bool) -> Case:
    """With gradient checkpointing, which Hugging Face switches on in training mode only."""
    return replace(
        case, name=f"{case.name}_{'reentrant' if use_reentrant else 'checkpointed'}",
        build=checkpointed(case.build, use_reentrant), plain=case.build, training=True,
    )  # fmt: skip


CHECKPOINTED = {c.name: [in_training(c, kind) for kind in (False, True)] for c in TRANSFORMERS}

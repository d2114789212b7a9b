"""Networks of torchvision and timm, scaled down, on images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from case import CLASSES, STEEP, Case, classes, images
from timm.models.levit import Levit
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models as vision
from torchvision.models.convnext import CNBlockConfig


def googlenet() -> nn.Module:
    return vision.GoogLeNet(CLASSES, init_weights=False, dropout=0.0, dropout_aux=0.0)


def googlenet_losses(outputs: Any, labels: Tensor, reduction: str = "mean") -> Tensor:
    each = [
        F.cross_entropy(logits, labels, reduction=reduction)
        for logits in (outputs.logits, outputs.aux_logits1, outputs.aux_logits2)
    ]
    return each[0] + 0.3 * each[1] + 0.3 * each[2]


def googlenet_total(outputs: Any, labels: Tensor) -> tuple[Tensor, int]:
    return googlenet_losses(outputs, labels, "sum"), len(labels)


class PlainHardsigmoid(nn.Module):
    """In operations that have a second derivative; torch's own has none."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


def mobilenet() -> nn.Module:
    return vision.mobilenet_v3_small(num_classes=CLASSES, width_mult=0.5)


def mobilenet_with_plain_gates() -> nn.Module:
    model = mobilenet()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Hardsigmoid):
            model.set_submodule(name, PlainHardsigmoid())
    return model


def densenet(memory_efficient: bool) -> nn.Module:
    return vision.DenseNet(8, (2, 3, 2, 2), 16, num_classes=CLASSES,
                           memory_efficient=memory_efficient)  # fmt: skip


def convnext() -> nn.Module:
    blocks = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]
    return vision.ConvNeXt(blocks, layer_scale=0.5, num_classes=CLASSES)


def swin() -> nn.Module:
    return vision.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES,
                                  stochastic_depth_prob=0.0)  # fmt: skip


def vision_transformer() -> nn.Module:
    return vision.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=CLASSES)


TORCHVISION = [
    Case("resnet18", lambda: vision.resnet18(num_classes=CLASSES), images(32), classes, rho=STEEP),
    Case("densenet121", lambda: densenet(True), images(32), classes, lambda: densenet(False)),
    Case("googlenet", googlenet, images(32), classes, rho=STEEP),
    Case("mobilenet_v3_small", mobilenet, images(32), classes, mobilenet_with_plain_gates),
    Case("convnext_tiny", convnext, images(32), classes, smooth=True),
    Case("swin_t", swin, images(32), classes, smooth=True),
    Case("torchvision_vit", vision_transformer, images(32), classes, smooth=True),
]  # fmt: skip

# all heads of a network in training mode, where BatchNorm has down to nine values per channel
AUXILIARY = Case(
    "googlenet_auxiliary", googlenet, images(96), classes,
    loss=googlenet_losses, total=googlenet_total, training=True, rho=STEEP / 6, float32=0.2,
)  # fmt: skip


def timm_vit(checkpointed: bool) -> nn.Module:
    model = timm.create_model("test_vit", num_classes=CLASSES, img_size=32, depth=2, embed_dim=32)
    model.set_grad_checkpointing(checkpointed)
    return model


def levit() -> nn.Module:
    """Its attention keeps biases in a dict in eval mode."""
    return Levit(32, 3, CLASSES, (16, 24), 8, (1, 1), (2, 3))


def levit_with_biases(of: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """With that function of the present biases in place of what was kept."""

    def keep(module: nn.Module, _: Any) -> None:
        biases = of(module.attention_biases)[:, module.attention_bias_idxs]
        module.attention_bias_cache = {str(biases.device): biases}

    def build() -> nn.Module:
        model = levit()
        for module in model.modules():
            if hasattr(module, "attention_bias_cache"):
                module.register_forward_pre_hook(keep)
        model.stem.register_forward_hook(with_contiguous_gradient)
        return model

    return build


def with_contiguous_gradient(_: nn.Module, __: Any, output: Tensor) -> None:
    """BatchNorm's derivative on a CPU is wrong for one example and a transposed gradient."""
    if output.requires_grad:
        output.register_hook(Tensor.contiguous)


def in_place_efficientnet() -> nn.Module:
    model = timm.create_model("test_efficientnet", num_classes=CLASSES)
    assert any(getattr(module, "inplace", False) for module in model.modules())
    return model


TIMM = [
    Case("timm_vit_checkpointed", lambda: timm_vit(True), images(32), classes,
         lambda: timm_vit(False), smooth=True),
    Case("levit", levit, images(32), classes, levit_with_biases(lambda b: b), fresh=True),
    Case("levit_after_evaluation", levit, images(32), classes, levit_with_biases(Tensor.detach)),
    Case("in_place_efficientnet", in_place_efficientnet, images(32), classes),
]  # fmt: skip

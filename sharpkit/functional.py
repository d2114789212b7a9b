"""Models as pure functions of their parameters: what sharpness and curvature share.

A measurement never touches the model it measures. `frozen` puts it in eval mode and restores it,
`select_parameters` picks the tensors of interest, and `FunctionalModel` evaluates it at any
parameter values without assigning them.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from sharpkit.errors import ArgumentError, DataError, ModelError

Loss: TypeAlias = str | Callable[[Tensor, Tensor], Tensor]
Data: TypeAlias = "Dataset[Any] | DataLoader[Any] | tuple[Any, Tensor]"
Parameters: TypeAlias = "str | Iterable[str] | nn.Module | Iterable[nn.Module] | None"
Inputs: TypeAlias = Any  # a tensor, or a dict or tuple of tensors that all have the same length


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits, exact also where the network is certain of the right class.

    With d_j = z_j − z_y the loss of one example is softplus(logsumexp_{j≠y} d_j). The usual form,
    −log softmax(z)_y, has the gradient p_y − 1 in the true class, which rounds to 0 as soon as
    p_y > 1 − 6e-8 in float32: the direction of steepest ascent is then wrong. Here every
    probability keeps its relative precision down to the smallest representable number.

    Args:
        outputs: Logits of shape (n, classes), any floating dtype.
        labels: Class indices of shape (n,), int64, each in [0, classes).

    Returns:
        Tensor: The mean loss, a scalar of the dtype of `outputs`.

    Source:
        The identity −log p_y = log(1 + Σ_{j≠y} exp(z_j − z_y)).

    Example:
        >>> import torch
        >>> z = torch.tensor([[30.0, 0.0]])
        >>> cross_entropy(z, torch.tensor([0])).item()  # exp(-30)
        9.357...e-14
        >>> torch.nn.functional.cross_entropy(z, torch.tensor([0])).item()
        0.0
    """
    is_label = torch.arange(outputs.shape[-1], device=outputs.device) == labels.unsqueeze(-1)
    label_logit = torch.where(is_label, outputs, 0.0).sum(-1, keepdim=True)
    others = (outputs - label_logit).masked_fill(is_label, -torch.inf)
    # the default threshold of 20 would round softplus'' to 0 above it
    return softplus(torch.logsumexp(others, -1), threshold=80.0).mean()


def mean_squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over examples of half the squared distance, ½‖f(x) − y‖²; labels shaped as outputs.

    Example:
        >>> import torch
        >>> mean_squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item()
        2.5
    """
    return 0.5 * (outputs - labels).square().flatten(1).sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse": mean_squared_error,
}


def resolve_loss(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss function named, or the callable itself."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ArgumentError(
            f"unknown loss {loss!r}: expected one of {sorted(LOSSES)} or a callable "
            "(outputs, labels) -> mean loss"
        )
    return LOSSES[loss]


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Plain kernels inside: fused attention has neither second derivatives nor batching rules."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold the model in eval mode, with unfused attention.

    Mode and random state are restored afterwards, also after an error.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), unfused_attention():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def select_parameters(model: nn.Module, parameters: Parameters = None) -> dict[str, Tensor]:
    """The parameters of a model that are measured, by name, detached; shared ones once.

    Args:
        model: Any module.
        parameters: None for all; a name, a glob pattern ("*.weight") or several; a module of the
            model or several.

    Returns:
        dict: Name to tensor, in the model's order, without gradient history.

    Raises:
        ArgumentError: If a name, pattern or module matches nothing.
        ModelError: If a weight or buffer of the model is NaN or infinite.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> list(select_parameters(model, "*.bias"))
        ['0.bias', '2.bias']
        >>> list(select_parameters(model, model[2]))
        ['2.weight', '2.bias']
    """
    check_finite_weights(model)
    everything = dict(model.named_parameters())
    if not everything:
        raise ModelError(f"{type(model).__name__} has no parameters")
    if parameters is None:
        return {name: p.detach() for name, p in everything.items()}
    chosen: set[int] = set()
    # a shared parameter answers to each of its names
    all_names = list(model.named_parameters(remove_duplicate=False))
    wanted: list[Any] = (
        [parameters] if isinstance(parameters, str | nn.Module) else list(parameters)
    )
    for item in wanted:
        if isinstance(item, nn.Module):
            hits = [id(p) for p in item.parameters()]
            if not set(hits) & {id(p) for p in everything.values()}:
                raise ArgumentError(f"module {type(item).__name__} has no parameter of the model")
        elif isinstance(item, str):
            hits = [id(p) for name, p in all_names if fnmatch.fnmatchcase(name, item)]
            if not hits:
                raise ArgumentError(
                    f"no parameter matches {item!r}; the model has {', '.join(everything)}"
                )
        else:
            raise ArgumentError(f"expected names, patterns or modules, got {type(item).__name__}")
        chosen.update(hits)
    selected = {name: p.detach() for name, p in everything.items() if id(p) in chosen}
    if not selected:
        raise ArgumentError("no parameter is selected")
    return selected


def floating_parameters(model: nn.Module, parameters: Parameters = None) -> dict[str, Tensor]:
    """Those of `select_parameters` that have gradients: integers, as of quantised layers, do not.

    Example:
        >>> from torch import nn
        >>> list(floating_parameters(nn.Linear(3, 4)))
        ['weight', 'bias']
    """
    chosen = select_parameters(model, parameters)
    return {name: p for name, p in chosen.items() if p.is_floating_point()}


def check_finite_weights(model: nn.Module) -> None:
    """Raise ModelError that names the first parameter or buffer with NaN or infinite entries."""
    for kind, tensors in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, tensor in tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise ModelError(
                    f"{kind} {name!r} has {bad} NaN or infinite entries of {tensor.numel()}"
                )


class FunctionalModel:
    """A model as a function (parameters, inputs) -> outputs that leaves the module alone.

    Args:
        model: Any module. Inputs given as a dict are passed as keywords, as a tuple by position.
            An output with a `logits` attribute (Hugging Face) stands for its logits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> f = FunctionalModel(model)
        >>> f({"weight": torch.ones(1, 2)}, torch.tensor([[1.0, 2.0]]))
        tensor([[3.]])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # copies, so that a module that counts its calls in a buffer counts on the copy
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self._parameters = {name: p.detach() for name, p in model.named_parameters()}
        self._aliases = _aliases(model)
        reference = next((p for p in self._parameters.values() if p.is_floating_point()), None)
        if reference is None:
            raise ModelError(f"{type(model).__name__} has no floating-point parameters")
        self.device, self.dtype = reference.device, reference.dtype

    def __call__(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """The outputs at the given values of some parameters; the others keep their own."""
        state = {**self._buffers, **self._parameters, **parameters}
        state |= {alias: state[name] for alias, name in self._aliases.items()}
        args: tuple[Any, ...] = (inputs,)
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs)
        elif isinstance(inputs, tuple | list):
            args = tuple(inputs)
        # with ties resolved by torch, a module registered twice would keep the swapped tensors
        outputs = torch.func.functional_call(self.model, state, args, kwargs, tie_weights=False)
        if not isinstance(outputs, Tensor):
            outputs = getattr(outputs, "logits", outputs)
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"{type(self.model).__name__} returned {type(outputs).__name__}; "
                "expected a tensor of outputs, or an object with `logits`"
            )
        return outputs


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every further name of a shared parameter or buffer -> its first name; each module once."""
    first: dict[int, str] = {}
    aliases = {}
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            full = f"{prefix}.{name}" if prefix else name
            known = first.setdefault(id(tensor), full)
            if known != full:
                aliases[full] = known
    return aliases


@dataclass(frozen=True)
class Examples:
    """Inputs and labels held in memory, in the order in which they are measured."""

    inputs: Inputs  # leaves of shape (n, ...)
    labels: Tensor  # (n, ...)

    def __len__(self) -> int:
        """The number of examples."""
        return int(self.labels.shape[0])

    def slice(self, start: int, stop: int) -> Examples:
        """Examples start to stop, without a copy."""
        take = pytree.tree_map(lambda t: t[start:stop], self.inputs)
        return Examples(take, self.labels[start:stop])

    def chunks(self, size: int) -> Iterator[Examples]:
        """Consecutive examples, `size` at a time; the last chunk may be smaller."""
        for start in range(0, len(self), size):
            yield self.slice(start, start + size)

    def to(self, device: torch.device, dtype: torch.dtype) -> Examples:
        """On the device; floating-point inputs (and labels, if regression) in the dtype."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, dtype) if t.is_floating_point() else t.to(device)

        return Examples(pytree.tree_map(move, self.inputs), move(self.labels))


def load_examples(data: Data, *, n: int | None = None, seed: int | None = 0) -> Examples:
    """The first n examples of a seeded random order of the data (its own order if seed is None).

    Args:
        data: A map-style `Dataset` (or list) of (input, label) pairs, a `DataLoader`, or a pair
            (inputs, labels) of tensors; inputs may be a dict or tuple of tensors. A loader with
            the plain sequential or shuffling sampler stands for its data set in index order;
            any other is read once, in the order it gives.
        n: How many examples; None for all.
        seed: Seed of the order; None keeps the data's own.

    Returns:
        Examples: On the CPU or wherever the given tensors are.

    Raises:
        DataError: If there are no examples, lengths differ, an item is not a pair, or an input is
            NaN or infinite.
        ArgumentError: If n is not between 1 and the number of examples.

    Example:
        >>> import torch
        >>> data = torch.arange(4.0).reshape(4, 1), torch.arange(4)
        >>> load_examples(data, n=2, seed=None).labels
        tensor([0, 1])
    """
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset) or not visits_all_once(data):
            return _from_pair(_concatenate(list(data)), n, seed)
        if seed is None and isinstance(data.sampler, RandomSampler):
            raise DataError(
                "the DataLoader shuffles, so the data have no order of their own to keep: "
                "pass shuffle=False or an integer seed"
            )
        return _from_dataset(data.dataset, n, seed, data.collate_fn or _default_collate)
    if isinstance(data, tuple) or _is_pair(data):
        parts = list(cast("Iterable[Any]", data))
        if len(parts) != 2:
            raise DataError(f"expected a pair (inputs, labels), got {len(parts)} items")
        inputs = pytree.tree_map(torch.as_tensor, parts[0])
        return _choose(inputs, torch.as_tensor(parts[1]), n, seed)
    if type(data) is TensorDataset:  # a subclass may transform its items
        if len(data.tensors) != 2:
            raise DataError(
                f"expected a TensorDataset of inputs and labels, got {len(data.tensors)} tensors"
            )
        return _choose(data.tensors[0], data.tensors[1], n, seed)
    return _from_dataset(data, n, seed, _default_collate)


def load_in_order(data: Data, n: int | None = None) -> Examples:
    """The first n examples in the data's own order, for values that do not depend on the order.

    As `load_examples` without a seed, except that a loader that shuffles stands for its data set in
    index order.

    Args:
        data: As for `load_examples`.
        n: How many examples; None for all.

    Raises:
        DataError: As `load_examples`.
        ArgumentError: As `load_examples`.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.zeros(4, 1), torch.arange(4))
        >>> load_in_order(DataLoader(data, shuffle=True)).labels
        tensor([0, 1, 2, 3])
    """
    if (
        isinstance(data, DataLoader)
        and isinstance(data.sampler, RandomSampler)
        and visits_all_once(data)
    ):
        data = DataLoader(data.dataset, collate_fn=data.collate_fn)
    return load_examples(data, n=n, seed=None)


def standard_tensor(array: NDArray[Any]) -> Tensor:
    """A copy of an array in the standard layout.

    Pickling changes strides and alignment of an array, and the last bits of a sum depend on both.

    Example:
        >>> import numpy as np
        >>> standard_tensor(np.arange(6).reshape(2, 3).T).stride()
        (2, 1)
    """
    writeable = array if array.flags.writeable else array.copy()  # torch warns of others
    return torch.from_numpy(writeable).clone(memory_format=torch.contiguous_format)


def add_to_digest(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Feed a hash with the shape, dtype and values of a tensor."""
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def check_labels(labels: Tensor, outputs: Tensor, loss: Loss) -> None:
    """Raise DataError if class labels do not fit the outputs of a cross-entropy."""
    if loss != "cross_entropy":
        return
    if outputs.ndim != 2:
        raise DataError(
            f"cross-entropy expects outputs of shape (n, classes), got {tuple(outputs.shape)}"
        )
    if labels.ndim != 1 or labels.is_floating_point():
        raise DataError(
            "cross-entropy expects integer labels of shape (n,), "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs.shape[1]:
        raise DataError(
            f"labels run from {low} to {high}, but the model has {outputs.shape[1]} outputs: "
            f"expected labels in [0, {outputs.shape[1] - 1}]"
        )


def visits_all_once(loader: DataLoader[Any]) -> bool:
    """Whether a loader's sampling is the plain one, in order or shuffled."""
    sampler, batches = loader.sampler, loader.batch_sampler
    plain = type(batches) in (BatchSampler, type(None))
    if type(sampler) is RandomSampler:
        plain &= not sampler.replacement and sampler.num_samples == len(cast("Any", loader.dataset))
    elif type(sampler) is not SequentialSampler:
        return False
    return plain and getattr(batches, "sampler", sampler) is sampler


def _is_pair(data: Any) -> bool:
    return isinstance(data, list) and len(data) == 2 and isinstance(data[1], Tensor)


def _default_collate(items: Sequence[Any]) -> Any:
    from torch.utils.data import default_collate

    return default_collate(list(items))


def _from_dataset(
    dataset: Dataset[Any], n: int | None, seed: int | None, collate: Callable[[list[Any]], Any]
) -> Examples:
    if isinstance(dataset, IterableDataset):
        return _from_pair(_concatenate([collate([item]) for item in dataset]), n, seed)
    total = len(dataset)  # type: ignore[arg-type]
    order = _order(total, n, seed)
    batches = [
        collate([dataset[i] for i in order[start : start + 256].tolist()])
        for start in range(0, len(order), 256)
    ]
    inputs, labels = _pair(_concatenate(batches))
    return _checked(inputs, labels)


def _from_pair(pair: tuple[Any, Tensor], n: int | None, seed: int | None) -> Examples:
    return _choose(*_pair(pair), n, seed)


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise DataError("expected items that are pairs (input, label)")
    return batch[0], batch[1]


def _concatenate(batches: list[Any]) -> Any:
    if not batches:
        raise DataError("the data hold no examples")
    leaves, spec = zip(*(pytree.tree_flatten(batch) for batch in batches), strict=True)
    columns = [
        torch.cat([torch.as_tensor(t) for t in column]) for column in zip(*leaves, strict=True)
    ]
    return pytree.tree_unflatten(columns, spec[0])


def _order(total: int, n: int | None, seed: int | None) -> Tensor:
    if total == 0:
        raise DataError("the data hold no examples")
    n = total if n is None else n
    if not 1 <= n <= total:
        raise ArgumentError(f"n = {n} examples asked for: expected 1 to {total}")
    if seed is None:
        return torch.arange(n)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n]


def _choose(inputs: Inputs, labels: Tensor, n: int | None, seed: int | None) -> Examples:
    leaves = pytree.tree_leaves(inputs)
    lengths = {int(t.shape[0]) for t in leaves} | {int(labels.shape[0])}
    if len(lengths) != 1:
        raise DataError(f"inputs and labels differ in length: {sorted(lengths)}")
    order = _order(lengths.pop(), n, seed)
    if seed is None:
        k = len(order)
        return _checked(pytree.tree_map(lambda t: t[:k], inputs), labels[:k])
    return _checked(
        pytree.tree_map(lambda t: t[order.to(t.device)], inputs), labels[order.to(labels.device)]
    )


def _checked(inputs: Inputs, labels: Tensor) -> Examples:
    for leaf in pytree.tree_leaves(inputs):
        if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise DataError("the inputs have NaN or infinite entries")
    if labels.is_floating_point() and not bool(torch.isfinite(labels).all()):
        raise DataError("the labels have NaN or infinite entries")
    return Examples(inputs, labels)

"""A stack: networks whose tensors have the same shapes, in one .safetensors file.

The tensor `final/conv2d.weight` has the trained weights of that name, `initial/conv2d.weight` those
before training, each with one row per network on a leading axis: (networks, *shape), float32. The
file's metadata say, under "networks", which network has which row, with its configuration as the
competition's config.json has it, its entry of model_configs.json and the SHA-256 of its rows. So a
file is whole by itself, and any program that knows .safetensors can read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from sharpkit.digests import digest
from sharpkit.doors import parse_json, reading, shown
from sharpkit.errors import ZooFormatError
from sharpkit.files import atomic_path
from sharpkit.tensor_files import Stored, read_safetensors_header, read_stored
from sharpkit.zoo.files import json_text
from sharpkit.zoo.shared_values import pack, unpack
from sharpkit.zoo.task import Weights

KINDS: tuple[Weights, ...] = get_args(Weights)
_VERSION = 1
_MAX_DIGITS = 200  # of an id, which may become the name of a folder
_KEY = "networks"  # of the metadata
_EXPECTED = "a stack of networks"


@dataclass(frozen=True)
class Network:
    """A network as a stack keeps it.

    Args:
        id: Digits, as everywhere in a zoo.
        config: Its config.json.
        entry: Its entry of model_configs.json: {"hparams", "metrics"}.
        weights: "final" and "initial" to parameters and buffers by name, float32 on the CPU.
    """

    id: str
    config: dict[str, Any]
    entry: Mapping[str, Any]
    weights: Mapping[Weights, Mapping[str, Tensor]]

    @property
    def shape(self) -> tuple[Any, ...]:
        """What networks of one stack have in common: names and shapes of their tensors."""
        return tuple(sorted((n, tuple(t.shape)) for n, t in self.weights["final"].items()))

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for kind in self.weights.values() for t in kind.values())


@dataclass(frozen=True)
class StackFile:
    """A stack as its header describes it; rows are read when they are asked for.

    Args:
        path: The file, as errors name it.
        local: Where it is read, another place if it is a copy of a remote one.
        tensors: Where they are.
        configs: The configurations that its networks have, each once.
        rows: Id to row.
        members: What is known of the network of each row.
    """

    path: Path
    local: Path
    tensors: Mapping[str, Stored]
    configs: Sequence[Any]
    rows: Mapping[str, int]
    members: Sequence[Mapping[str, Any]]

    @property
    def shape(self) -> tuple[Any, ...]:
        """As `Network.shape`."""
        final = self._named("final")
        return tuple(sorted((name, stored.shape[1:]) for name, stored in final.items()))

    @property
    def size(self) -> int:
        """Bytes of one network's tensors."""
        return sum(stored.size for stored in self.tensors.values()) // len(self.members)

    @property
    def is_cut_short(self) -> bool:
        """Whether the file is smaller than its header states."""
        end = max((stored.start + stored.size for stored in self.tensors.values()), default=0)
        return self.local.stat().st_size < end

    def config(self, id_: str) -> dict[str, Any]:
        """The config.json of a network."""
        config: dict[str, Any] = self.configs[self.members[self.rows[id_]]["config"]]
        return config

    def entry(self, id_: str) -> dict[str, Any]:
        """What model_configs.json would have of a network."""
        entry: dict[str, Any] = self.members[self.rows[id_]]["entry"]
        return entry

    def where(self, id_: str) -> str:
        """A network as errors name it."""
        return f"{self.path}, network {id_}"

    def digest(self, id_: str, weights: Weights) -> str:
        """SHA-256 of what is read of one network, and of nothing else in the file."""
        config = json.dumps(self.config(id_), sort_keys=True)
        return digest([config, _checksum(self._read(id_, weights))])

    def load(self, id_: str, weights: Weights) -> dict[str, Tensor]:
        """The tensors of one network by name.

        Raises:
            ZooFormatError: The file is gone, cut short, or not as it was written.
        """
        tensors = self._read(id_, weights)
        if _checksum(tensors) != self.members[self.rows[id_]]["sha256"][weights]:
            raise ZooFormatError(
                f"{self.where(id_)}: its {weights} weights are damaged (wrong checksum); copy the "
                "file again, or write the network anew"
            )
        return tensors

    def network(self, id_: str) -> Network:
        """One network with all that a stack keeps of it."""
        weights = {kind: self.load(id_, kind) for kind in KINDS}
        return Network(id_, self.config(id_), self.entry(id_), weights)

    def _named(self, weights: Weights) -> dict[str, Stored]:
        mark = f"{weights}/"
        return {n.removeprefix(mark): s for n, s in self.tensors.items() if n.startswith(mark)}

    def _read(self, id_: str, weights: Weights) -> dict[str, Tensor]:
        row, count = self.rows[id_], len(self.members)
        named = self._named(weights)
        parts = [(s.start + row * (s.size // count), s.size // count) for s in named.values()]
        with reading(self.where(id_), ZooFormatError, "the rows of a network"):
            if self.is_cut_short:
                raise ZooFormatError(f"{self.where(id_)}: the file was cut short; copy it again")
            found = read_stored(self.local, parts, self.where(id_))
            return {
                # in memory of torch's own, aligned as that of weights from elsewhere
                name: torch.tensor(np.frombuffer(content, "<f4")).view(stored.shape[1:])
                for (name, stored), content in zip(named.items(), found, strict=True)
            }


def read_stack(path: Path, local: Path | None = None) -> StackFile:
    """What a stack has, from its header; `local` is where it is read if it is a copy.

    Raises:
        ZooFormatError: Not such a file, or its header is damaged; names the field.
    """
    local = path if local is None else local
    tensors, metadata = read_safetensors_header(local, str(path), ZooFormatError)
    text = metadata.get(_KEY)
    if text is None:
        raise ZooFormatError(f"{path}: expected {_EXPECTED}, found no {_KEY!r} in its metadata")
    with reading(f"{path}, {_KEY}", ZooFormatError, _EXPECTED):
        content = parse_json(f"{path}, {_KEY}", text, ZooFormatError)
        if content["version"] != _VERSION:
            raise ValueError(f"its version is {shown(content['version'])}, not {_VERSION}")
        configs = content["configs"]
        for member in content["members"]:
            _check_member(member, configs)
        members = [
            {**member, "entry": unpack(member["entry"], content["values"])}
            for member in content["members"]
        ]
        rows = {member["id"]: row for row, member in enumerate(members)}
        if len(rows) < len(members) or not rows:
            raise ValueError("it has no network, or one twice")
    for name, stored in tensors.items():
        _check_tensor(f"{path}, {shown(name)}", stored, len(members))
    return StackFile(path, local, tensors, configs, rows, members)


def write_stack(path: Path, networks: Sequence[Network]) -> None:
    """Write networks of one shape in one step.

    Example:
        >>> import tempfile
        >>> weights = {"w": torch.ones(2)}
        >>> networks = [Network(i, {}, {}, {"final": weights, "initial": weights}) for i in "12"]
        >>> path = Path(tempfile.mkdtemp(), "networks_0.safetensors")
        >>> write_stack(path, networks)
        >>> read_stack(path).load("2", "final")
        {'w': tensor([1., 1.])}
    """
    from safetensors.torch import save

    tensors = {
        f"{kind}/{name}": torch.stack([network.weights[kind][name] for network in networks])
        for kind in KINDS
        for name in networks[0].weights[kind]
    }
    content = save(tensors, {_KEY: metadata_of(networks)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def metadata_of(networks: Sequence[Network]) -> str:
    """What a stack says of its networks; what many of them have in common stands in it once."""
    configs: dict[str, int] = {}
    entries, values = pack(network.entry for network in networks)
    members = [
        {
            "id": network.id,
            "config": configs.setdefault(json_text(network.config), len(configs)),
            "entry": entry,
            "sha256": {kind: _checksum(network.weights[kind]) for kind in KINDS},
        }
        for network, entry in zip(networks, entries, strict=True)
    ]
    listed = {"configs": list(map(json.loads, configs)), "values": values}
    return json_text({"version": _VERSION, **listed, "members": members})


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    def parts() -> Iterator[str | Tensor]:
        for name in sorted(tensors):
            yield name
            yield tensors[name]

    return digest(parts())


def _check_member(member: Any, configs: Any) -> None:
    """ValueError, or whatever a wrong type raises, unless a network is described."""
    id_, sums = member["id"], member["sha256"]
    if not (isinstance(id_, str) and id_.isascii() and id_.isdigit() and len(id_) <= _MAX_DIGITS):
        raise ValueError(f"the id of a network is {shown(id_)}, not up to {_MAX_DIGITS} digits")
    if not isinstance(member["entry"], dict) or not isinstance(configs[member["config"]], dict):
        raise ValueError(f"what it has of network {id_} is no object")
    if not all(isinstance(sums[kind], str) for kind in KINDS):
        raise ValueError(f"network {id_} has no checksum")


def _check_tensor(where: str, stored: Stored, networks: int) -> None:
    if stored.dtype != "F32" or stored.shape[:1] != (networks,):
        raise ZooFormatError(
            f"{where}: is {stored.dtype} of shape {shown(stored.shape)}, expected F32 with a row "
            f"for each of {networks} networks"
        )
    if 4 * prod(stored.shape) != stored.size:
        raise ZooFormatError(
            f"{where}: has {stored.size:,} bytes, which are not those of its shape {stored.shape}"
        )

"""Weight files: bit-exact round trips, and an error for everything that does not fit."""

import copy
import struct

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from sharpkit.errors import ModelError, ZooFormatError
from sharpkit.zoo import build_model, load_weights, read_weights, write_weights
from sharpkit.zoo.keras import weights
from sharpkit.zoo.keras.layer import Slot


@pytest.fixture
def path(tmp_path, network):
    write_weights(network, tmp_path / "weights.hdf5")
    return tmp_path / "weights.hdf5"


def same_state(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_written_weights_read_back_bit_for_bit(network, path, device):
    other = build_model(network.config, device=device)
    load_weights(other, path)
    ours, theirs = network.state_dict(), other.state_dict()
    for state in (ours, theirs):
        del state["batch_normalization.num_batches_tracked"]
    assert same_state(ours, theirs)
    assert all(tensor.is_contiguous() for tensor in theirs.values())
    x = torch.randn(3, *network.input_shape)
    assert torch.equal(network(x), other.eval()(x))


def test_a_loaded_model_can_be_trained_and_copied(network, path):
    model = build_model(network.config, device="meta")
    load_weights(model, path)
    copy.deepcopy(model).train()(torch.randn(4, *model.input_shape)).sum().backward()
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_another_state_can_be_written(network, tmp_path):
    state = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    write_weights(network, tmp_path / "w.hdf5", state=state)
    kernel = read_weights(tmp_path / "w.hdf5")[0][0]
    np.testing.assert_array_equal(kernel, state["conv2d.weight"].permute(2, 3, 1, 0).numpy())


def test_names_split_over_several_attributes_are_followed(network, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_ATTRIBUTE_LIMIT", 20)
    path = tmp_path / "w.hdf5"
    write_weights(network, path)
    with h5py.File(path) as file:
        assert "layer_names" not in file.attrs and "layer_names1" in file.attrs
    other = build_model(network.config, device="meta")
    load_weights(other, path)
    assert torch.equal(other.dense.weight, network.dense.weight)


@settings(deadline=None)
@given(st.permutations(range(4)), st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_slots_are_undone_exactly(axes, shape):
    permuted = [shape[axis] for axis in axes]
    slot = Slot("kernel:0", tuple(shape), "weight", tuple(axes), (permuted[0], -1))
    array = torch.randn(shape)
    assert torch.equal(slot.to_keras(slot.to_torch(array)), array)


def damage(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def refuse(network, path, message):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ZooFormatError, match=message) as caught:
        load_weights(network, path)
    assert str(path) in str(caught.value)
    assert same_state(before, network.state_dict())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(network, path, bad):
    def change(file):
        file["dense/dense/kernel:0"][0, 0] = bad

    damage(path, change)
    refuse(network, path, r"layer 'dense'.*kernel:0 has 1 NaN or infinite entries of 180")
    with pytest.raises(ZooFormatError, match="NaN or infinite"):
        read_weights(path)


def test_large_finite_weights_are_accepted(network, path):
    def change(file):
        file["dense/dense/kernel:0"][...] = 3e38  # their sum is infinite in float32

    damage(path, change)
    load_weights(network, path)
    assert float(network.dense.weight.detach().min()) == pytest.approx(3e38)


def test_other_shapes_are_refused(network, path):
    def change(file):
        del file["dense/dense/bias:0"]
        file["dense/dense/bias:0"] = np.zeros(4, np.float32)

    damage(path, change)
    refuse(network, path, r"layer 'dense' has arrays of shapes .*\(4,\).* needs .*\(3,\)")


def test_a_missing_array_is_refused(network, path):
    damage(path, lambda file: file["dense"].attrs.create("weight_names", [b"dense/kernel:0"]))
    refuse(network, path, "layer 'dense' has arrays of shapes")


def test_a_missing_layer_is_refused(network, path):
    def change(file):
        file.attrs["layer_names"] = [n for n in file.attrs["layer_names"] if n != b"dense"]

    damage(path, change)
    refuse(network, path, "has 2 layers with weights; the config has 3")


def test_a_name_that_leads_nowhere_is_refused(network, path):
    damage(path, lambda file: file["dense/dense"].pop("bias:0"))
    refuse(network, path, "'dense/bias:0', which is not in the file")


def test_a_file_without_layer_names_is_refused(network, path):
    damage(path, lambda file: file.attrs.pop("layer_names"))
    refuse(network, path, "no attribute 'layer_names'")


@pytest.mark.parametrize("link", [h5py.SoftLink("/dense/dense/bias:0"), None])
def test_links_are_not_followed(network, path, tmp_path, link):
    outside = tmp_path / "outside.hdf5"
    with h5py.File(outside, "w") as file:
        file["bias"] = np.zeros(3, np.float32)

    def change(file):
        del file["dense/dense/bias:0"]
        file["dense/dense/bias:0"] = link or h5py.ExternalLink(str(outside), "bias")

    damage(path, change)
    refuse(network, path, "only data inside the file is read")


def test_data_kept_in_another_file_is_refused(network, path, tmp_path):
    raw = tmp_path / "raw.bin"
    raw.write_bytes(bytes(12))

    def change(file):
        del file["dense/dense/bias:0"]
        external = [(str(raw), 0, 12)]
        file["dense/dense"].create_dataset("bias:0", (3,), "f4", external=external)

    damage(path, change)
    refuse(network, path, "keeps its data in another file")


def test_a_size_that_the_file_cannot_hold_is_refused_before_allocation(network, path):
    def change(file):
        del file["dense/dense/bias:0"]
        file["dense/dense"].create_dataset("bias:0", (10**12,), "f4", chunks=(1000,))

    damage(path, change)
    refuse(network, path, r"declares shape \(1000000000000,\), more than the file holds")


def test_weights_of_another_type_are_refused(network, path):
    def change(file):
        del file["dense/dense/bias:0"]
        file["dense/dense/bias:0"] = np.zeros(3, np.int64)

    damage(path, change)
    refuse(network, path, "has type int64; expected floating point")


@pytest.mark.parametrize("keep", [0, 7, 1000, -600])
def test_a_truncated_file_is_refused(network, path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    refuse(network, path, "expected an undamaged Keras HDF5 weight file")


def test_a_file_of_noise_is_refused(network, path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    refuse(network, path, "expected an undamaged Keras HDF5 weight file")


def test_flipped_bytes_never_escape_as_another_error(network, path):
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= int(rng.integers(1, 256))
        path.write_bytes(bad)
        try:
            load_weights(network, path)
        except ZooFormatError as error:
            assert str(path) in str(error)


def test_a_cyclic_list_in_the_file_is_found_before_hdf5_runs_into_it(network, path):
    content = bytearray(path.read_bytes())
    header = content.find(b"HEAP\0\0\0\0")
    _, block, address = struct.unpack_from("<QQQ", content, header + 8)
    struct.pack_into("<Q", content, address + block, block)  # the first free block follows itself
    path.write_bytes(content)
    refuse(network, path, "endless or cyclic heap")


def test_a_missing_file_is_named(network, tmp_path):
    refuse(network, tmp_path / "weights.hdf5", "weight file is missing")


@pytest.mark.parametrize("bad", ["nan", "float64", "missing"])
def test_what_cannot_be_read_back_is_not_written(network, tmp_path, bad):
    state = dict(network.state_dict())
    if bad == "missing":
        del state["dense.bias"]
    else:
        state["dense.bias"] = (
            torch.full((3,), torch.nan) if bad == "nan" else torch.zeros(3).double()
        )
    with pytest.raises(ModelError, match=r"dense\.bias"):
        write_weights(network, tmp_path / "w.hdf5", state=state)
    assert list(tmp_path.iterdir()) == []


def test_a_compression_bomb_is_refused_before_allocation(network, path):
    def change(file):
        for name in ("bias:0", "kernel:0"):
            del file[f"dense/dense/{name}"]
        zeros = {"chunks": (2**20,), "compression": "gzip", "compression_opts": 9}
        bomb = file["dense/dense"].create_dataset("kernel:0", (2**26,), "f4", **zeros)
        bomb[: 2**21] = 0
        file["dense/dense"].create_dataset("bias:0", (3,), "f4")

    damage(path, change)
    refuse(network, path, r"declares shape \(67108864,\), more than the file holds")


def test_an_array_named_a_thousand_times_is_refused(network, path):
    def change(file):
        file["dense"].attrs["weight_names"] = [b"dense/kernel:0"] * 1000

    damage(path, change)
    refuse(network, path, r"declares [\d,]+ bytes of weights, more than a file of [\d,]+ holds")


def test_compressed_weights_load(network, path):
    kernel = network.dense.weight.detach().numpy().T

    def change(file):
        del file["dense/dense/kernel:0"]
        file["dense/dense"].create_dataset("kernel:0", data=kernel, chunks=True, compression="gzip")

    damage(path, change)
    load_weights(network, path)

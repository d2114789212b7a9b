"""Examples in TFRecord shards, read and written without TensorFlow."""

from sharpkit.zoo.shards.tfrecord import read_shards, write_shard

__all__ = ["read_shards", "write_shard"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed

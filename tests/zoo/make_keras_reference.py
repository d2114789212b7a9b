"""Record what Keras itself computes for every supported layer: writes keras_reference.npz.

Run once by hand, in an environment of its own:

    python -m venv /tmp/keras && /tmp/keras/bin/pip install tensorflow-cpu==2.15.1
    /tmp/keras/bin/python tests/zoo/make_keras_reference.py

For each case the file holds the config (JSON), random inputs (n, h, w, c), Keras' outputs, and the
weight file that Keras wrote (its bytes). `shard` is a TFRecord file written by TensorFlow.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.tensor_pb2 import TensorProto

# ruff: noqa: E501

MAP = [7, 6, 3]

Layer = dict


def layer(layer_name: str, **keywords) -> Layer:
    return {"layer_name": layer_name, **keywords}


def conv(**keywords) -> Layer:
    return layer("Conv2D", **{"filters": 4, "kernel_size": 3, **keywords})


CASES: dict[str, tuple[list[int], list[Layer]]] = {
    "conv valid": (MAP, [conv()]),
    "conv same": (MAP, [conv(padding="same", activation="relu")]),
    "conv same stride 2": (MAP, [conv(padding="same", strides=2.0)]),
    "conv same stride 2 even kernel": ([8, 6, 3], [conv(kernel_size=[4, 2], padding="same", strides=2)]),
    "conv same even kernel": (MAP, [conv(kernel_size=[2, 4], padding="same")]),
    "conv same stride 3": (MAP, [conv(padding="same", strides=[3, 2])]),
    "conv stride beyond kernel": (MAP, [conv(kernel_size=1, padding="same", strides=3)]),
    "conv dilated": ([9, 8, 2], [conv(padding="same", dilation_rate=[2, 3])]),
    "conv dilated valid": ([9, 8, 2], [conv(dilation_rate=2, use_bias=False)]),
    "conv groups": ([7, 6, 4], [conv(groups=2, filters=6, padding="same")]),
    "depthwise": (MAP, [layer("DepthwiseConv2D", kernel_size=3, depth_multiplier=2, padding="same")]),
    "depthwise stride": (
        MAP,
        [layer("DepthwiseConv2D", kernel_size=[3, 2], strides=2, padding="same", activation="tanh")],
    ),
    "depthwise dilated": (
        [9, 8, 3],
        [layer("DepthwiseConv2D", kernel_size=3, dilation_rate=2, use_bias=False)],
    ),
    "separable": (
        MAP,
        [
            layer(
                "SeparableConv2D", filters=5, kernel_size=3, strides=2, padding="same",
                depth_multiplier=2, activation="relu",
            )
        ],
    ),
    "max pool": (MAP, [layer("MaxPooling2D")]),
    "max pool same": (MAP, [layer("MaxPooling2D", pool_size=2, padding="same")]),
    "max pool same stride 1": (MAP, [layer("MaxPooling2D", pool_size=2, strides=1, padding="same")]),
    "max pool overlap": (MAP, [layer("MaxPooling2D", pool_size=3, strides=2, padding="same")]),
    "average pool": (MAP, [layer("AveragePooling2D", pool_size=[2, 3], strides=[2, 1])]),
    "average pool same": (MAP, [layer("AveragePooling2D", pool_size=3, strides=2, padding="same")]),
    "average pool uneven": (MAP, [layer("AveragePooling2D", pool_size=2, strides=1, padding="same")]),
    "global average": (MAP, [layer("GlobalAveragePooling2D")]),
    "global max": (MAP, [layer("GlobalMaxPooling2D", keepdims=True)]),
    "flatten": (MAP, [layer("Flatten"), layer("Dense", units=3)]),
    "dense on a map": (MAP, [layer("Dense", units=4, activation="relu")]),
    "dense on a matrix": ([5, 3], [layer("Dense", units=4, use_bias=False)]),
    "batch norm": (MAP, [layer("BatchNormalization", momentum=0.9)]),
    "batch norm bare": (MAP, [layer("BatchNormalization", scale=False, center=False, epsilon=0.01)]),
    "batch norm offset": (MAP, [layer("BatchNormalization", scale=False, axis=3)]),
    "batch norm vector": ([5], [layer("BatchNormalization", center=False)]),
    "batch norm matrix": ([4, 3], [layer("BatchNormalization")]),
    "layer norm": (MAP, [layer("LayerNormalization")]),
    "layer norm offset": (MAP, [layer("LayerNormalization", scale=False, epsilon=1e-5)]),
    "layer norm vector": ([5], [layer("LayerNormalization", center=False)]),
    "relu settings": (
        MAP,
        [
            layer("ReLU", max_value=0.8, negative_slope=0.1, threshold=0.2),
            layer("ReLU", max_value=6),
            layer("ReLU"),
        ],
    ),
    "relu slope": (MAP, [layer("ReLU", negative_slope=0.2)]),
    "leaky relu": (MAP, [layer("LeakyReLU"), layer("LeakyReLU", alpha=0.1)]),
    "elu": (MAP, [layer("ELU", alpha=0.7)]),
    "prelu": (MAP, [layer("PReLU")]),
    "prelu channels": (MAP, [layer("PReLU", shared_axes=[1, 2])]),
    "prelu rows": (MAP, [layer("PReLU", shared_axes=[2])]),
    "prelu vector": ([5], [layer("PReLU")]),
    "softmax": (MAP, [layer("Softmax")]),
    "softmax vector": ([5], [layer("Dense", units=4), layer("Softmax", axis=-1)]),
    "zero padding": (MAP, [layer("ZeroPadding2D", padding=[[1, 2], [0, 3]]), conv()]),
    "zero padding pair": (MAP, [layer("ZeroPadding2D", padding=[2, 1]), layer("ZeroPadding2D")]),
    "reshape": (MAP, [layer("Reshape", target_shape=[3, -1, 2]), conv(kernel_size=2)]),
    "reshape vector": ([12], [layer("Reshape", target_shape=[2, 2, 3]), conv(kernel_size=2)]),
    "reshape matrix": (MAP, [layer("Reshape", target_shape=[-1, 3]), layer("Dense", units=2)]),
    "permute": (MAP, [layer("Permute", dims=[3, 1, 2]), layer("Flatten")]),
    "permute matrix": ([4, 3], [layer("Permute", dims=[2, 1]), layer("Flatten")]),
    "dropouts": (
        MAP,
        [
            layer("InputLayer", input_shape=MAP),
            layer("Dropout", rate=0.5, seed=1),
            layer("SpatialDropout2D", rate=0.5),
            layer("GaussianDropout", rate=0.5),
            layer("GaussianNoise", stddev=0.5),
            layer("AlphaDropout", rate=0.5),
            layer("ActivityRegularization", l1=0.1),
        ],
    ),
    "network": (
        [9, 9, 2],
        [
            conv(padding="same", activation="relu"),
            layer("BatchNormalization"),
            layer("MaxPooling2D", pool_size=2, padding="same"),
            layer("SeparableConv2D", filters=5, kernel_size=3, padding="same"),
            layer("PReLU", shared_axes=[1, 2]),
            layer("Dropout", rate=0.25),
            layer("Flatten"),
            layer("Dense", units=6, activation="tanh"),
            layer("Dense", units=3),
        ],
    ),
    **{
        f"activation {name}": ([6], [layer("Activation", activation=name)])
        for name in (
            "relu", "linear", "tanh", "sigmoid", "softmax", "elu", "selu", "gelu", "swish", "silu",
            "mish", "softplus", "softsign", "exponential", "hard_sigmoid",
        )
    },
}  # fmt: skip


def build(input_shape: list[int], layers: list[Layer]) -> tf.keras.Sequential:
    model = tf.keras.Sequential()
    if layers[0]["layer_name"] != "InputLayer":
        model.add(tf.keras.layers.InputLayer(input_shape=input_shape))
    for config in layers:
        keywords = {k: whole(v) for k, v in config.items() if k != "layer_name"}
        model.add(getattr(tf.keras.layers, config["layer_name"])(**keywords))
    return model


def whole(value):
    return int(value) if isinstance(value, float) and value.is_integer() else value


def randomise(model: tf.keras.Sequential, rng: np.random.Generator) -> None:
    weights = []
    for variable in model.weights:
        values = rng.normal(0, 0.5, variable.shape)
        weights.append(np.abs(values) + 0.5 if "variance" in variable.name else values)
    model.set_weights(weights)


def weight_file(model: tf.keras.Sequential) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.hdf5")
        model.save_weights(str(path), save_format="h5")
        return path.read_bytes()


def example(inputs, label) -> bytes:
    """`inputs` and `label` are TensorProtos, or arrays to be serialized as TensorFlow does."""

    def feature(value) -> tf.train.Feature:
        if not isinstance(value, TensorProto):
            data = tf.io.serialize_tensor(value).numpy()
        else:
            data = value.SerializeToString()
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))

    features = tf.train.Features(feature={"inputs": feature(inputs), "output": feature(label)})
    return tf.train.Example(features=features).SerializeToString()


def shard(rng: np.random.Generator) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Five examples: contents, a typed list, and a constant that TensorFlow stores as one value."""
    inputs = rng.normal(size=(5, 2, 3, 1)).astype(np.float32)
    inputs[3:] = 0.25
    labels = np.array([3, 0, 7, 1, 2], np.int32)
    proto = tf.make_tensor_proto(inputs[2])
    typed = TensorProto(dtype=proto.dtype, tensor_shape=proto.tensor_shape)
    typed.float_val.extend(inputs[2].ravel().tolist())
    constant = TensorProto(dtype=proto.dtype, tensor_shape=proto.tensor_shape)
    constant.float_val.append(0.25)
    records = [
        example(inputs[0], labels[0]),
        example(inputs[1], tf.make_tensor_proto(labels[1])),
        example(typed, tf.make_tensor_proto(labels[2], dtype=tf.int64)),
        example(constant, tf.constant(labels[3], tf.uint8)),
        example(inputs[4], labels[4]),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard_0.tfrecord")
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record)
        return path.read_bytes(), inputs, labels


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (input_shape, layers) in CASES.items():
        model = build(input_shape, layers)
        randomise(model, rng)
        inputs = rng.normal(size=(2, *input_shape)).astype(np.float32)
        arrays[f"{name}/config"] = json.dumps({"model_config": layers, "input_shape": input_shape})
        arrays[f"{name}/inputs"] = inputs
        arrays[f"{name}/outputs"] = model(inputs, training=False).numpy()
        if model.weights:
            arrays[f"{name}/weights"] = np.frombuffer(weight_file(model), np.uint8)
    data, inputs, labels = shard(rng)
    arrays |= {
        "shard": np.frombuffer(data, np.uint8),
        "shard/inputs": inputs,
        "shard/labels": labels,
    }
    path = Path(__file__).with_name("keras_reference.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(CASES)} cases, {path.stat().st_size:,} bytes, TensorFlow {tf.__version__}")


if __name__ == "__main__":
    main()

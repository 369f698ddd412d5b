"""Build a Llama-like model as an ONNX graph with a key-value cache, from the operators that onnxruntime runs fastest.

Each block has one GroupQueryAttention for attention, rotary positions and cache; products with codes are MatMulNBits.
Both are onnxruntime's own operators. Inputs and outputs have the names that transformers.js and onnxruntime-genai use.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from hesse.runtimes.exported_layers import head_width

Product = Callable[[str, str], str]  # (input, layer) to the name of the layer's output, with its bias

OWN = "com.microsoft"
OPSETS = {"": 21, OWN: 1}


class GraphBuilder:
    """Nodes of a graph, each named for its output."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.small: dict[str, TensorProto] = {}

    def add(self, operator: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return the output's name."""
        return self.add_many(operator, inputs, [output], domain, **attributes)[0]

    def add_many(
        self, operator: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs, and return their names."""
        self.nodes.append(helper.make_node(operator, inputs, outputs, outputs[0], domain=domain, **attributes))
        return outputs

    def integers(self, *values: int) -> str:
        """Add a constant vector, and return its name."""
        name = "integers" + "".join(f"_{value}" for value in values)
        self.small[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def integer(self, value: int) -> str:
        """Add a constant number, and return its name."""
        name = f"integer_{value}"
        self.small[name] = numpy_helper.from_array(np.array(value, np.int64), name)
        return name


def build_graph(config: Any, product: Product, constants: set[str], builder: GraphBuilder) -> GraphProto:
    """Build the graph of a model; `product` adds linear layers, `constants` are the names of the existing weights."""
    hidden = builder.add("Gather", ["model.embed_tokens.weight", "input_ids"], "hidden")
    # Each token attends to earlier tokens; the mask gives only the number of tokens, including the cache.
    total = builder.add("ReduceSum", ["attention_mask", builder.integers(1)], "total", keepdims=0)
    last = builder.add("Sub", [total, builder.integer(1)], "last")
    last = builder.add("Cast", [last], "last_position", to=TensorProto.INT32)
    longest = builder.add("Shape", ["attention_mask"], "mask_shape", start=1, end=2)
    longest = builder.add("Squeeze", [longest], "longest")
    longest = builder.add("Cast", [longest], "total_length", to=TensorProto.INT32)
    for index in range(config.num_hidden_layers):
        hidden = _block(config, index, hidden, (last, longest), product, constants, builder)
    # The logits of the last `num_logits_to_keep` tokens; of all tokens if it is 0.
    start = builder.add("Neg", ["num_logits_to_keep"], "start")
    start = builder.add("Reshape", [start, builder.integers(1)], "starts")
    ends, axis = builder.integers(np.iinfo(np.int64).max), builder.integers(1)
    hidden = builder.add("Slice", [hidden, start, ends, axis], "kept")
    hidden = _normalise(hidden, "model.norm", config, builder)
    head = "lm_head" if "lm_head.weight" in constants else "model.embed_tokens"
    builder.add("Identity", [product(hidden, head)], "logits")
    return helper.make_graph(builder.nodes, "model", _inputs(config), _outputs(config), list(builder.small.values()))


def _block(
    config: Any,
    index: int,
    hidden: str,
    lengths: tuple[str, str],
    product: Product,
    constants: set[str],
    builder: GraphBuilder,
) -> str:
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    inputs = _normalise(hidden, f"{prefix}.input_layernorm", config, builder)
    query, key, value = (product(inputs, f"{attention}.{kind}_proj") for kind in ("q", "k", "v"))
    if f"{attention}.q_norm.weight" in constants:
        query = _normalise_heads(query, f"{attention}.q_norm", config.num_attention_heads, config, builder)
        key = _normalise_heads(key, f"{attention}.k_norm", config.num_key_value_heads, config, builder)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    attended, _, _ = builder.add_many(
        "GroupQueryAttention",
        [query, key, value, f"past_key_values.{index}.key", f"past_key_values.{index}.value", *lengths, "cos", "sin"],
        [f"{attention}.attended", f"present.{index}.key", f"present.{index}.value"],
        OWN,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        scale=head_width(config) ** -0.5,
        do_rotary=1,
        local_window_size=window or -1,
    )
    hidden = builder.add("Add", [hidden, product(attended, f"{attention}.o_proj")], f"{attention}.residual")
    inputs = _normalise(hidden, f"{prefix}.post_attention_layernorm", config, builder)
    gate, up = product(inputs, f"{mlp}.gate_proj"), product(inputs, f"{mlp}.up_proj")
    sigmoid = builder.add("Sigmoid", [gate], f"{mlp}.sigmoid")
    opened = builder.add("Mul", [gate, sigmoid], f"{mlp}.opened")
    inner = builder.add("Mul", [opened, up], f"{mlp}.inner")
    return builder.add("Add", [hidden, product(inner, f"{mlp}.down_proj")], f"{mlp}.residual")


def _normalise(hidden: str, layer: str, config: Any, builder: GraphBuilder) -> str:
    inputs = [hidden, f"{layer}.weight"]
    return builder.add(
        "SimplifiedLayerNormalization", inputs, f"{layer}.out", axis=-1, epsilon=config.rms_norm_eps, stash_type=1
    )


def _normalise_heads(states: str, layer: str, heads: int, config: Any, builder: GraphBuilder) -> str:
    """Add the normalisation of each head."""
    head = head_width(config)
    split = builder.add("Reshape", [states, builder.integers(0, -1, head)], f"{layer}.heads")
    joined = _normalise(split, layer, config, builder)
    return builder.add("Reshape", [joined, builder.integers(0, -1, heads * head)], f"{layer}.joined")


def _inputs(config: Any) -> list[Any]:
    return [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("num_logits_to_keep", TensorProto.INT64, []),
        *_cache(config, "past_key_values", "past"),
    ]


def _outputs(config: Any) -> list[Any]:
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "kept", config.vocab_size])
    return [logits, *_cache(config, "present", "total")]


def _cache(config: Any, name: str, length: str) -> list[Any]:
    shape = ["batch", config.num_key_value_heads, length, head_width(config)]
    return [
        helper.make_tensor_value_info(f"{name}.{index}.{kind}", TensorProto.FLOAT, shape)
        for index in range(config.num_hidden_layers)
        for kind in ("key", "value")
    ]

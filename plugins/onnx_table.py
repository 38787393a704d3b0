"""How the operators are written in ONNX: for torch.onnx.export, and afterwards."""

import importlib
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx import helper

from trtvlm.plugins.onnx_nodes import DOMAIN, VERSION, Rewrite

STANDARD = ("int4_linear", "int8_linear", "fused_add_rms_norm")
"""Operators with a form in standard ONNX that TensorRT compiles well."""

PLUGIN_ONLY = ()
"""Operators that stay nodes of their own: a plugin in a single engine, a boundary between segments elsewhere."""


def custom_translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(dynamo=True, custom_translation_table=...)`: every operator becomes one `trtvlm` node."""
    return dict(_translation(name) for name in (*STANDARD, *PLUGIN_ONLY))


def standardise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite, in place, every node that has a standard form; the model needs its weights and its value types.

    ValueError naming the node if a weight is not an initializer.
    """
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    nodes: list[onnx.NodeProto] = []
    added: list[onnx.TensorProto] = []
    for node in graph.node:
        if node.domain != DOMAIN or node.op_type not in STANDARD:
            nodes.append(node)
            continue
        rewrite = Rewrite(node, initializers, types[node.output[0]])
        try:
            importlib.import_module(f"trtvlm.plugins.{node.op_type}.to_onnx").standardise(rewrite)
        except KeyError as error:
            raise ValueError(f"weight {error} of the node '{node.name}' has no value in the graph") from error
        nodes.extend(rewrite.nodes)
        added.extend(rewrite.tensors)
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, values in (("node", nodes), ("initializer", [*kept, *added])):
        del getattr(graph, field)[:]
        getattr(graph, field).extend(values)
    known = {name for node in nodes for name in (*node.input, *node.output)}
    values = [value for value in graph.value_info if value.name in known]
    del graph.value_info[:]
    graph.value_info.extend(values)
    if not any(node.domain == DOMAIN for node in nodes):
        others = [entry for entry in model.opset_import if entry.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(others)
    return model


def operator_schema(name: str) -> onnx.defs.OpSchema:
    """The ONNX schema of an operator, read off its PyTorch schema: tensors are inputs, numbers and words attributes."""
    schema = _overload(name)._schema
    tensors = [argument for argument in schema.arguments if "Tensor" in str(argument.type)]
    # Types may differ from input to input, so each has a type variable of its own.
    inputs = [
        _Schema.FormalParameter(argument.name, f"T{number}", param_option=_option(argument))
        for number, argument in enumerate(tensors)
    ]
    outputs = [_Schema.FormalParameter(f"output{number}", f"U{number}") for number in range(len(schema.returns))]
    attributes = [_attribute(argument) for argument in schema.arguments if argument not in tensors]
    variables = [parameter.type_str for parameter in (*inputs, *outputs)]
    return _Schema(
        name,
        DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[(variable, _TYPES, "") for variable in variables],
        attributes=attributes,
    )


_Schema = onnx.defs.OpSchema
_TYPES = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "bool")]


def _translation(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    import onnxscript

    operator = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), name, operator_schema(name))
    argument_names = [argument.name for argument in _overload(name)._schema.arguments]

    def translate(*args: Any, **kwargs: Any) -> Any:
        return operator(**dict(zip(argument_names, args, strict=False)), **kwargs)

    return _overload(name), translate


def _overload(name: str) -> torch._ops.OpOverload:
    importlib.import_module(f"trtvlm.plugins.{name}.op")
    # The attention operators write their caches; ONNX has values only, so the form that returns them is exported.
    functional = f"{name}_functional"
    packet = getattr(torch.ops.trtvlm, functional if name.endswith("attention") else name)
    overload: torch._ops.OpOverload = packet.default
    return overload


def _option(argument: Any) -> Any:
    options = _Schema.FormalParameterOption
    return options.Optional if str(argument.type).startswith("Optional") else options.Single


def _attribute(argument: Any) -> Any:
    if argument.has_default_value():
        return _Schema.Attribute(argument.name, helper.make_attribute(argument.name, argument.default_value))
    kinds = {"int": "INT", "bool": "INT", "float": "FLOAT", "str": "STRING"}
    return _Schema.Attribute(argument.name, getattr(_Schema.AttrType, kinds[str(argument.type)]))

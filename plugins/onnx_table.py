"""How the operators are written in ONNX: for torch.onnx.export, and afterwards."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import onnx
import torch
from onnx import helper

from trtvlm.plugins.onnx_nodes import DOMAIN, VERSION, Rewrite

OPERATORS = (
    "int4_linear",
    "int8_linear",
    "int4_moe",
    "mla_attention",
    "gqa_attention",
    "fused_add_rms_norm",
    "speculative_accept",
)
"""Every operator: the folders of this package that have a to_onnx.py."""

_Schema = onnx.defs.OpSchema
_TYPES = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "bool")]


def custom_translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(dynamo=True, custom_translation_table=...)`: every operator becomes one `trtvlm` node."""
    return {
        _overload(operator, torch_name): _translation(kind, _overload(operator, torch_name))
        for operator in OPERATORS
        for kind, torch_name in _to_onnx(operator).NODES.items()
    }


def standardise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite, in place, every node that has a standard form that TensorRT compiles well; the others stay.

    The model needs its weights and the types of its values, as torch.onnx.export gives them. ValueError naming the node
    if a weight is not an initializer.
    """
    graph = model.graph
    modules = {operator: _to_onnx(operator) for operator in OPERATORS}
    standard = {name: module.standardise for name, module in modules.items() if hasattr(module, "standardise")}
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    nodes: list[onnx.NodeProto] = []
    added: list[onnx.TensorProto] = []
    for node in graph.node:
        if node.domain != DOMAIN or node.op_type not in standard:
            nodes.append(node)
            continue
        rewrite = Rewrite(node, initializers, types[node.output[0]])
        try:
            standard[node.op_type](rewrite)
        except KeyError as error:
            raise ValueError(f"weight {error} of the node '{node.name}' has no value in the graph") from error
        nodes.extend(rewrite.nodes)
        added.extend(rewrite.tensors)
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    _replace(graph.initializer, [*(tensor for tensor in graph.initializer if tensor.name in used), *added])
    _replace(graph.node, nodes)
    known = used | {name for node in nodes for name in node.output}
    _replace(graph.value_info, [value for value in graph.value_info if value.name in known])
    domains = {node.domain for node in nodes}
    _replace(model.opset_import, [entry for entry in model.opset_import if entry.domain in domains | {""}])
    return model


def operator_schema(kind: str, overload: torch._ops.OpOverload) -> onnx.defs.OpSchema:
    """The ONNX schema of a node, read off the PyTorch operator's: tensors are inputs, numbers and words attributes."""
    arguments, returns = overload._schema.arguments, overload._schema.returns
    tensors = [argument for argument in arguments if "Tensor" in str(argument.type)]
    # Types may differ from input to input, so each has a type variable of its own.
    inputs = [
        _Schema.FormalParameter(argument.name, f"T{number}", param_option=_option(argument))
        for number, argument in enumerate(tensors)
    ]
    outputs = [_Schema.FormalParameter(f"output{number}", f"U{number}") for number in range(len(returns))]
    return _Schema(
        kind,
        DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[(parameter.type_str, _TYPES, "") for parameter in (*inputs, *outputs)],
        attributes=[_attribute(argument) for argument in arguments if argument not in tensors],
    )


def _to_onnx(operator: str) -> ModuleType:
    return importlib.import_module(f"trtvlm.plugins.{operator}.to_onnx")


def _overload(operator: str, torch_name: str) -> torch._ops.OpOverload:
    importlib.import_module(f"trtvlm.plugins.{operator}.op")
    overload: torch._ops.OpOverload = getattr(torch.ops.trtvlm, torch_name).default
    return overload


def _translation(kind: str, overload: torch._ops.OpOverload) -> Callable[..., Any]:
    import onnxscript

    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), kind, operator_schema(kind, overload))
    names = [argument.name for argument in overload._schema.arguments]

    def translate(*args: Any, **kwargs: Any) -> Any:
        return node(**dict(zip(names, args, strict=False)), **kwargs)

    return translate


def _option(argument: Any) -> Any:
    options = _Schema.FormalParameterOption
    return options.Optional if str(argument.type).startswith("Optional") else options.Single


def _attribute(argument: Any) -> Any:
    if argument.has_default_value():
        return _Schema.Attribute(argument.name, helper.make_attribute(argument.name, argument.default_value))
    kinds = {"int": "INT", "bool": "INT", "float": "FLOAT", "str": "STRING"}
    return _Schema.Attribute(argument.name, getattr(_Schema.AttrType, kinds[str(argument.type)]))


def _replace(field: Any, values: list[Any]) -> None:
    del field[:]
    field.extend(values)

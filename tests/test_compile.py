"""Engines: what TensorRT-RTX builds here without a GPU, what is refused and how, and a whole directory of them."""

import onnx
import pytest
from onnx import TensorProto, helper

from trtvlm.builder.compile import Range, check_sm, compile_onnx, read_header, supported_sms, tensorrt_version
from trtvlm.model.errors import GraphError, UserError

WIDTHS = {"rows": Range(1, 5, 8)}


def _graph(operator: str = "Add", domain: str = "") -> onnx.ModelProto:
    """y = operator(x, x) over float16 [rows, 64]."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["rows", 64]) for name in "xy"]
    node = helper.make_node(operator, ["x", "x"], ["y"], domain=domain)
    graph = helper.make_graph([node], "sum", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 24)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 120])
def test_an_engine_is_for_the_chip_that_was_asked_for(sm: int) -> None:
    engine = compile_onnx("sum", _graph(), [WIDTHS], sm=sm)
    header = read_header("sum", engine)
    assert header.sms == (sm,)
    assert ".".join(str(part) for part in header.version) == tensorrt_version()


@pytest.mark.parametrize("sm", [0, 61, 90, 860])
def test_a_chip_it_cannot_build_for_is_refused(sm: int) -> None:
    with pytest.raises(UserError, match=f"SM {sm}; give --sm one of 75, 80, 86"):
        check_sm(sm)
    assert sm not in supported_sms()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({}, "has no range for 'rows' of 'x'"),
        ({"row": Range(1, 5, 8)}, "has no range for 'rows'"),
        (WIDTHS | {"views": Range(1, 1, 1)}, "has a range for 'views', which it does not use"),
        ({"rows": Range(1, 9, 8)}, "least <= best <= most for 'rows'"),
        ({"rows": Range(0, 5, 8)}, "least <= best <= most for 'rows'"),
    ],
)
def test_profiles_must_fit_the_graph(profile: dict[str, Range], message: str) -> None:
    with pytest.raises(GraphError, match=f"Profile 1 of the graph 'sum' .*{message}"):
        compile_onnx("sum", _graph(), [WIDTHS, profile], sm=86)


def test_an_operator_it_does_not_know_is_named() -> None:
    with pytest.raises(GraphError, match=r"cannot parse the graph 'sum': .*FancyThing.*Plugin not found"):
        compile_onnx("sum", _graph("FancyThing", "trtvlm"), [WIDTHS], sm=86)


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(GraphError, match="cannot parse the graph 'sum'"):
        compile_onnx("sum", b"nonsense", [WIDTHS], sm=86)


def test_the_builders_own_words_reach_the_user() -> None:
    with pytest.raises(GraphError, match=r"cannot build the graph 'sum' for SM 86: .*no optimization profile"):
        compile_onnx("sum", _graph(), [], sm=86)


@pytest.mark.parametrize("damage", [lambda e: e[:-1], lambda e: b"", lambda e: b"x" + e[1:], lambda e: e + b"x"])
def test_a_damaged_engine_is_no_engine(damage: object) -> None:
    engine = compile_onnx("sum", _graph(), [WIDTHS], sm=86)
    with pytest.raises(GraphError, match="not a whole TensorRT-RTX plan"):
        read_header("sum", damage(engine))  # type: ignore[operator]

"""ONNX graphs -> TensorRT-RTX engines for a named compute capability, on a machine that needs no GPU.

What TensorRT-RTX accepts, and what it costs, is in docs/engines.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtvlm.model.errors import GraphError, UserError

if TYPE_CHECKING:
    import onnx

# Scratch memory an engine may ask for on the device, in bytes. The largest need seen is far below it; without a limit
# the builder assumes the whole card is free, and the cache and the experts live there too.
WORKSPACE = 1 << 30


@dataclass(frozen=True)
class Range:
    """The sizes a dynamic dimension may take in one optimization profile; kernels are chosen for `best`."""

    least: int
    best: int
    most: int


Profile = Mapping[str, Range]
"""One optimization profile: a Range for each dynamic dimension's name."""


@dataclass(frozen=True)
class PlanHeader:
    """What the first bytes of a serialized engine say."""

    version: tuple[int, int, int, int]
    sms: tuple[int, ...]


# One bit a compute capability in the plan's header, in this order (found by building for each; not documented).
_HEADER_SMS = (75, 80, 86, 89, 120, 121)
_MAGIC = b"vtrt"


def supported_sms() -> tuple[int, ...]:
    """The compute capabilities the installed TensorRT-RTX builds for, as 75, 86 ...; UserError when not installed."""
    members = _tensorrt().ComputeCapability.__members__
    return tuple(sorted(int(name[2:]) for name in members if name.startswith("SM") and name[2:].isdigit()))


def check_sm(sm: int) -> None:
    """Raise UserError unless engines can be built for compute capability `sm` (86 means 8.6)."""
    known = supported_sms()
    if sm not in known:
        names = ", ".join(str(value) for value in known)
        raise UserError(f"TensorRT-RTX cannot build for SM {sm}; give --sm one of {names}.")


def tensorrt_version() -> str:
    """The version of the installed TensorRT-RTX; UserError when it is not installed."""
    return str(_tensorrt().__version__)


def compile_onnx(
    name: str, model: "onnx.ModelProto | bytes", profiles: Sequence[Profile], *, sm: int, workspace: int = WORKSPACE
) -> bytes:
    """Compile one graph for compute capability `sm` -> the serialized engine.

    The network is strongly typed: every tensor keeps the type the graph gives it. Each profile must give a Range for
    exactly the dynamic dimensions of the graph. Raises GraphError with the parser's or builder's own words.
    """
    check_sm(sm)
    trt = _tensorrt()
    logger, messages = collector(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    serialized = model if isinstance(model, bytes) else model.SerializeToString()
    if not parser.parse(serialized):
        reasons = "; ".join(describe(parser.get_error(index)) for index in range(parser.num_errors))
        raise GraphError(f"TensorRT-RTX cannot parse the graph '{name}': {reasons or 'no reason given'}.")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    # On by default; it would round the float32 router's inputs to 10 bits, and experts would change.
    config.clear_flag(trt.BuilderFlag.TF32)
    for number, profile in enumerate(profiles):
        add_profile(name, number, profile, builder, network, config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise GraphError(f"TensorRT-RTX cannot build the graph '{name}' for SM {sm}: {reason(messages)}.")
    engine = bytes(plan)
    header = read_header(name, engine)
    if header.sms != (sm,):
        raise GraphError(f"The engine of the graph '{name}' came out for SM {header.sms}, not for SM {sm}.")
    return engine


def read_header(name: str, engine: bytes) -> PlanHeader:
    """Read the header of a serialized engine; GraphError when these bytes are not one.

    The engine itself cannot be deserialized without a GPU driver, so this is all that can be checked of it here. The
    layout was found by comparing engines: 'vtrt' at 0 and 28, the whole length (uint64) at 16, the version's four parts
    at 24, a bit a compute capability (uint32) at 32.
    """
    length = int.from_bytes(engine[16:24], "little")
    if len(engine) < 64 or engine[:4] != _MAGIC or engine[28:32] != _MAGIC or length != len(engine):
        raise GraphError(f"The engine of the graph '{name}' is not a whole TensorRT-RTX plan ({len(engine)} bytes).")
    bits = int.from_bytes(engine[32:36], "little")
    sms = tuple(sm for bit, sm in enumerate(_HEADER_SMS) if bits >> bit & 1)
    return PlanHeader((engine[24], engine[25], engine[26], engine[27]), sms)


def add_profile(name: str, number: int, profile: Profile, builder: Any, network: Any, config: Any) -> None:
    """Turn ranges of named dimensions into TensorRT's shapes of named inputs."""
    used: set[str] = set()
    shapes = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        bounds: list[Range] = []
        for axis, size in enumerate(tensor.shape):
            dimension = tensor.get_dimension_name(axis)
            if size >= 0:
                bounds.append(Range(size, size, size))
                continue
            if dimension not in profile:
                raise GraphError(
                    f"Profile {number} of the graph '{name}' has no range for '{dimension}' of '{tensor.name}'."
                )
            used.add(dimension)
            bounds.append(profile[dimension])
        sizes = ([b.least for b in bounds], [b.best for b in bounds], [b.most for b in bounds])
        shapes.set_shape(tensor.name, *sizes)
    unused = sorted(set(profile) - used)
    if unused:
        raise GraphError(
            f"Profile {number} of the graph '{name}' has a range for '{unused[0]}', which it does not use."
        )
    wrong = sorted(key for key, r in profile.items() if not 0 < r.least <= r.best <= r.most)
    if wrong:
        raise GraphError(f"Profile {number} of the graph '{name}' needs least <= best <= most for '{wrong[0]}'.")
    config.add_optimization_profile(shapes)


def _tensorrt() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise UserError(
            f"Engines need TensorRT-RTX, which cannot be imported ({error}); do 'pip install tensorrt-rtx'."
        ) from None
    return tensorrt_rtx


def collector(trt: Any) -> tuple[Any, list[str]]:
    """A TensorRT logger that keeps error messages instead of printing them, and the list it keeps them in."""
    messages: list[str] = []

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message)

    return Collector(), messages


def describe(error: Any) -> str:
    """What the parser says is wrong, and with which node."""
    where = f"node {error.node()} ({error.node_operator()}): " if error.node_operator() else ""
    return f"{where}{' '.join(error.desc().split())}".rstrip(".")


def reason(messages: Sequence[str]) -> str:
    """The first message that is not about the missing driver, which every failure drags along."""
    telling = [message for message in messages if "CUDA driver" not in message] or list(messages)
    return " ".join(telling[0].split()).rstrip(".") if telling else "no reason given"

"""Makes the plugins known to TensorRT: before a graph with them is parsed, and before an engine with them is loaded."""

from __future__ import annotations

from functools import cache

from trtvlm.plugins.gqa_attention.trt_plugin import GQAAttentionPlugin
from trtvlm.plugins.int4_moe.trt_plugin import Int4MoEPlugin
from trtvlm.plugins.mla_attention.trt_plugin import MLAAttentionPlugin
from trtvlm.plugins.tensorrt.binding import trt
from trtvlm.plugins.tensorrt.plugin import NAMESPACE, OperatorCreator

PLUGINS = (MLAAttentionPlugin, GQAAttentionPlugin, Int4MoEPlugin)


@cache
def register() -> tuple[OperatorCreator, ...]:
    """Once a process; TensorRT does not keep the creators alive, this does. RuntimeError: another has the name."""
    creators = tuple(OperatorCreator(plugin) for plugin in PLUGINS)
    registry = trt.get_plugin_registry()
    for creator in creators:
        if not registry.register_creator(creator, NAMESPACE):
            raise RuntimeError(f"TensorRT has another plugin {creator.name} in the namespace {NAMESPACE}")
    return creators

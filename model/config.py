"""DeepSeek-VL2's configuration: frozen dataclasses, read from config.json or refused.

The official files are sparse: an absent key means the default of the official configuration class, so the defaults
below are those, not values that would be sensible on their own. A value this project does not support is refused here,
by its key, rather than turning into wrong tokens later.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtvlm.model.errors import UserError

MODEL_TYPE = "deepseek_vl_v2"


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower. `image_size` and `patch_size` are pixels."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0

    @property
    def grid(self) -> int:
        """Patches along one side of a view; pixels past the last whole patch are unused."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        """Width of the MLP, truncated as the official tower does."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector: `downsample_ratio` squared patches become one image token of width `n_embed`."""

    input_dim: int = 1152
    n_embed: int = 2048
    downsample_ratio: int = 2
    depth: int = 2
    mlp_ratio: int = 1
    projector_type: str = "downsample_mlp_gelu"
    token_pooling: bool = False


@dataclass(frozen=True)
class LanguageConfig:
    """The DeepSeekMoE decoder, with multi-head latent attention (`use_mla`) or plain multi-head attention."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    use_mla: bool = True
    q_lora_rank: int | None = 1536
    kv_lora_rank: int | None = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int = 100000
    eos_token_id: int = 100001

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` has experts instead of a dense MLP."""
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @property
    def head_dim(self) -> int:
        """Width of a query or key head."""
        if self.use_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.hidden_size // self.num_attention_heads

    @property
    def value_head_dim(self) -> int:
        """Width of a value head."""
        return self.v_head_dim if self.use_mla else self.head_dim

    @property
    def rope_dim(self) -> int:
        """How much of a query or key head is rotated."""
        return self.qk_rope_head_dim if self.use_mla else self.head_dim


@dataclass(frozen=True)
class ModelConfig:
    """A whole DeepSeek-VL2. `candidate_resolutions` are (width, height) in pixels, in the order ties are broken."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    candidate_resolutions: tuple[tuple[int, int], ...] = ((384, 384),)
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    torch_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Refuse what the model does not support, naming the key."""
        # Sizes first: what comes after them divides by some.
        for key, ok, supported in itertools.chain(_sizes(self), _requirements(self)):
            if not ok:
                raise UserError(f"The model's config.json has an unsupported {key}; supported: {supported}.")

    @property
    def tile_size(self) -> int:
        """Side of a view in pixels."""
        return self.vision.image_size

    @property
    def view_tokens_side(self) -> int:
        """Image tokens along one side of a view."""
        return math.ceil(self.vision.grid / self.projector.downsample_ratio)

    def image_tokens(self, tiles_w: int, tiles_h: int) -> int:
        """Image tokens of one image of `tiles_w` x `tiles_h` tiles: global view, separator, local grid, newlines."""
        side = self.view_tokens_side
        return side * (side + 1) + 1 + side * tiles_h * (side * tiles_w + 1)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Read the contents of an official config.json; absent keys take the official defaults."""
        if raw.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise UserError(
                f"The model's config.json says model_type '{raw['model_type']}', which is an unknown architecture; "
                f"supported: '{MODEL_TYPE}' (DeepSeek-VL2)."
            )
        if not isinstance(raw.get("language_config"), dict):
            raise UserError("The model's config.json has no language_config; is it a DeepSeek-VL2 checkpoint?")
        vision = _read(VisionConfig, raw.get("vision_config", {}), "vision_config")
        language = _read(LanguageConfig, raw["language_config"], "language_config")
        sizes = raw.get("candidate_resolutions", [[384, 384]])
        try:
            resolutions = tuple((int(w), int(h)) for w, h in sizes)
        except (TypeError, ValueError):
            raise UserError(
                "The model's config.json has candidate_resolutions that are not pairs of numbers; download it again."
            ) from None
        return cls(
            vision=vision,
            projector=_read(ProjectorConfig, raw.get("projector_config", {}), "projector_config"),
            language=language,
            candidate_resolutions=resolutions,
            tile_tag=raw.get("tile_tag", "tile_tag"),
            global_view_pos=raw.get("global_view_pos", "head"),
            torch_dtype=str(raw.get("torch_dtype") or raw["language_config"].get("torch_dtype") or "bfloat16"),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ModelConfig":
        """Read `folder`/config.json. Raises UserError when it is absent, not JSON or not supported."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"There is no config.json in {folder}; give the folder of a DeepSeek-VL2 checkpoint."
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); download it again.") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}).") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path} does not hold a JSON object; download it again.")
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """The official config.json, with every key written out; `from_dict` reads it back to an equal value."""
        return {
            "model_type": MODEL_TYPE,
            "candidate_resolutions": [list(size) for size in self.candidate_resolutions],
            "global_view_pos": self.global_view_pos,
            "tile_tag": self.tile_tag,
            "torch_dtype": self.torch_dtype,
            "vision_config": {"model_type": "vision", **dataclasses.asdict(self.vision)},
            "projector_config": {"model_type": "mlp_projector", **dataclasses.asdict(self.projector)},
            "language_config": {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                **dataclasses.asdict(self.language),
            },
        }


def _read(kind: type[Any], raw: dict[str, Any], where: str) -> Any:
    """Build dataclass `kind` from the keys it knows; other keys of the official files carry no meaning here."""
    if not isinstance(raw, dict):
        raise UserError(f"The model's config.json has a {where} that is not an object; download it again.")
    values = {f.name: raw[f.name] for f in dataclasses.fields(kind) if f.name in raw}
    for f in dataclasses.fields(kind):
        if f.name not in values or values[f.name] is None:
            continue
        kinds: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str}
        expected = kinds.get(str(getattr(f.type, "__name__", f.type)))
        value = values[f.name]
        if expected is not None and (
            not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool)
        ):
            raise UserError(
                f"The model's config.json has {where}.{f.name} = {value!r}, which is not of the right type."
            )
    return kind(**values)


# The most that a size can be: beyond any model, and few enough to count up to.
_MOST = {
    "vision_config": {"image_size": 1 << 14, "patch_size": 1 << 14, "width": 1 << 20, "layers": 1000, "heads": 1 << 14},
    "language_config": {
        "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "num_hidden_layers": 1000,
        "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "max_position_embeddings": 1 << 24,
        "moe_intermediate_size": 1 << 24, "n_routed_experts": 1 << 12,
    },
    "projector_config": {"input_dim": 1 << 20, "n_embed": 1 << 20, "depth": 1000, "downsample_ratio": 1 << 10},
}  # fmt: skip


def _sizes(config: ModelConfig) -> Iterator[tuple[str, bool, str]]:
    """As `_requirements`: every size is a positive number that can be, every real number one that can be computed with."""
    parts = {"vision_config": config.vision, "language_config": config.language, "projector_config": config.projector}
    for where, part in parts.items():
        for key, most in _MOST[where].items():
            size = getattr(part, key)
            if size is not None:
                yield f"{where}.{key}", 0 < size <= most, f"1 up to {most:,}"
    for key in ("rms_norm_eps", "rope_theta"):
        yield f"language_config.{key}", 0 < getattr(config.language, key) < math.inf, "a positive number"


def _requirements(config: ModelConfig) -> list[tuple[str, bool, str]]:
    """(key, is it supported, what is supported) for every value that could silently give wrong results."""
    vision, projector, language = config.vision, config.projector, config.language
    hidden = language.hidden_size
    checks: list[tuple[str, bool, str]] = [
        ("tile_tag", config.tile_tag == "2D", "'2D'"),
        ("global_view_pos", config.global_view_pos in ("head", "tail"), "'head' or 'tail'"),
        ("vision_config.patch_size", 0 < vision.patch_size <= vision.image_size, "1 up to image_size"),
        ("vision_config.heads", vision.heads > 0 and vision.width % vision.heads == 0, "a divisor of width"),
        ("projector_config.projector_type", projector.projector_type == "downsample_mlp_gelu", "'downsample_mlp_gelu'"),
        ("projector_config.token_pooling", not projector.token_pooling, "false"),
        ("projector_config.depth", projector.depth >= 1, "1 or more"),
        ("projector_config.downsample_ratio", projector.downsample_ratio >= 1, "1 or more"),
        ("projector_config.mlp_ratio", projector.mlp_ratio >= 1, "1 or more"),
        ("projector_config.input_dim", projector.input_dim == vision.width, f"vision_config.width ({vision.width})"),
        ("projector_config.n_embed", projector.n_embed == hidden, f"language_config.hidden_size ({hidden})"),
        ("language_config.hidden_act", language.hidden_act == "silu", "'silu'"),
        ("language_config.rope_scaling", language.rope_scaling is None, "null"),
        ("language_config.attention_bias", not language.attention_bias, "false"),
        ("language_config.tie_word_embeddings", not language.tie_word_embeddings, "false"),
        ("language_config.scoring_func", language.scoring_func in ("softmax", "sigmoid"), "'softmax' or 'sigmoid'"),
        ("candidate_resolutions", bool(config.candidate_resolutions), "at least one (width, height)"),
        (
            "candidate_resolutions",
            all(side > 0 and side % config.tile_size == 0 for size in config.candidate_resolutions for side in size),
            f"multiples of the image_size ({config.tile_size})",
        ),
    ]  # fmt: skip
    if language.n_routed_experts is not None:
        greedy = language.scoring_func == "softmax" and language.topk_method == "greedy"
        noaux = language.topk_method == "noaux_tc" and language.scoring_func == "sigmoid"
        top_k, groups = language.num_experts_per_tok or 0, language.n_group or 1
        checks += [
            ("language_config.topk_method", greedy or noaux, "'greedy' with softmax, or 'noaux_tc' with sigmoid"),
            ("language_config.num_experts_per_tok", 0 < top_k <= language.n_routed_experts, "1 up to n_routed_experts"),
            ("language_config.moe_layer_freq", language.moe_layer_freq >= 1, "1 or more"),
            ("language_config.n_group", language.n_routed_experts % groups == 0, "a divisor of n_routed_experts"),
            ("language_config.topk_group", 1 <= (language.topk_group or 1) <= groups, "1 up to n_group"),
        ]  # fmt: skip
    if language.use_mla:
        rope = language.qk_rope_head_dim
        checks += [
            ("language_config.kv_lora_rank", bool(language.kv_lora_rank), "a positive number when use_mla is true"),
            ("language_config.qk_rope_head_dim", rope > 0 and rope % 2 == 0, "a positive even number"),
            ("language_config.v_head_dim", language.v_head_dim > 0, "a positive number when use_mla is true"),
        ]  # fmt: skip
    else:
        heads, kv_heads = language.num_attention_heads, language.num_key_value_heads
        checks += [
            ("language_config.num_attention_heads", hidden % heads == 0, "a divisor of hidden_size"),
            ("language_config.num_key_value_heads", kv_heads > 0 and heads % kv_heads == 0, "a divisor of the heads"),
        ]  # fmt: skip
    return checks

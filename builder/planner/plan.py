"""The whole plan on one page: what models take, where they fit, and how fast they could decode, from configurations alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from trtvlm.builder.planner.building import building
from trtvlm.builder.planner.bytes import step_bytes
from trtvlm.builder.planner.files import file_bytes
from trtvlm.builder.planner.fits import CARDS_GIB, MOST_POSITIONS, SHARED_BYTES, Memory, card_memory, needed
from trtvlm.builder.planner.gpus import GPU, find_gpu
from trtvlm.builder.planner.parts import Part, parts, total
from trtvlm.builder.planner.projection import (
    Basis,
    Decoding,
    FirstToken,
    Measured,
    Speculation,
    first_token,
    floor_ms,
    image_tokens,
    speculation,
)
from trtvlm.model.bench_results import BenchResults
from trtvlm.model.cache_kind import CacheKind, check_cache_kind
from trtvlm.model.config import LanguageConfig, ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.presets import preset_of
from trtvlm.plugins.quantized_checkpoint import QUANTIZATIONS, Kind
from trtvlm.plugins.step_bytes import expected_experts

WIDTHS = range(1, 9)
_HEADS: dict[str, Kind] = {"fp16": "fp16", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class Settings:
    """What is planned for.

    quant and lm_head as `trtvlm build` takes them; lm_head None is its default. positions: of the cache. views: of an image,
    the overview among them. context: cached positions when a token is decoded. drafted, accepted: tokens a step. kv_cache: how
    latents are held, by the models that have them.
    """

    quant: str
    lm_head: str | None
    positions: int
    views: int
    context: int
    drafted: int
    accepted: float
    kv_cache: CacheKind = "fp16"

    @property
    def kind(self) -> Kind:
        """How linear layers are stored."""
        return QUANTIZATIONS[self.quant]

    def head(self, quant: str | None = None) -> Kind:
        """How the LM head is stored, by default with `quant`."""
        return _HEADS[self.lm_head or ("fp16" if (quant or self.quant) == "none" else "int8")]


@dataclass(frozen=True)
class Model:
    """The target or the draft. building: bytes on the host by stage of a build. files: on disk, `file_bytes`.

    float32_bytes: all its weights so.
    """

    name: str
    parts: dict[str, Part]
    total: Part
    memory: Memory
    building: dict[str, int]
    files: dict[str, int]
    float32_bytes: int


@dataclass(frozen=True)
class Width:
    """One step of the target of `rows` rows; experts: distinct ones a layer, expected."""

    rows: int
    experts: float
    bytes: dict[str, float]
    total_bytes: float
    decoding: Decoding


@dataclass(frozen=True)
class Fit:
    """What all models need with one --quant, and on which cards (GiB) that is there. None: it cannot be stored so."""

    quant: str
    lm_head: str
    bytes: int | None
    cards: dict[int, bool]
    gpu: bool


@dataclass(frozen=True)
class Plan:
    """Everything; `no_projection` says, by model, why there is none."""

    gpu: GPU
    settings: Settings
    models: dict[str, Model]
    shared_bytes: int
    needed_bytes: int
    fits: list[Fit]
    widths: list[Width]
    speculation: Speculation | None
    first_token: FirstToken
    basis: Basis | None
    no_projection: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def plan(
    target: tuple[str, ModelConfig],
    draft: tuple[str, ModelConfig] | None,
    gpu: GPU,
    settings: Settings,
    measured: BenchResults | None,
) -> Plan:
    """Plan for a target, perhaps with a draft (name, configuration), on `gpu`. UserError: what cannot be asked for."""
    both = {"target": target} | ({"draft": draft} if draft is not None else {})
    configs = {role: config for role, (_, config) in both.items()}
    _check(both, settings)
    models = {role: _model(name, config, settings) for role, (name, config) in both.items()}
    language = target[1].language
    basis, reason = _basis(language, settings, measured)
    reasons = {"target": reason}

    def step(rows: int) -> Decoding:
        return _decoding(language, settings, gpu, basis, rows)

    speculative = None
    if draft is not None:
        drafting = draft[1].language
        draft_basis, reasons["draft"] = _basis(drafting, settings, measured)

        def draft_step(rows: int) -> Decoding:
            return _decoding(drafting, settings, gpu, draft_basis, rows)

        speculative = speculation(step, draft_step, settings.drafted, settings.accepted)
    return Plan(
        gpu=gpu,
        settings=settings,
        models=models,
        shared_bytes=SHARED_BYTES,
        needed_bytes=needed([model.memory for model in models.values()]),
        fits=[_fit(configs, settings, quant, gpu) for quant in QUANTIZATIONS],
        widths=[_width(language, settings, rows, step(rows)) for rows in WIDTHS],
        speculation=speculative,
        first_token=first_token(target[1], gpu, settings.views),
        basis=basis,
        no_projection={role: reason for role, reason in reasons.items() if reason is not None},
    )


def _check(both: dict[str, tuple[str, ModelConfig]], settings: Settings) -> None:
    check_cache_kind(settings.kv_cache, ((name, config.language) for name, config in both.values()))
    for name, config in both.values():
        most = config.language.max_position_embeddings
        if settings.positions > most:
            raise UserError(
                f"--max-length {settings.positions} is more than the {most} positions of {name}; give at most that."
            )
    if settings.positions > MOST_POSITIONS:
        raise UserError(
            f"--max-length {settings.positions} is too long: the kernels attend to at most {MOST_POSITIONS} positions; give at "
            "most that."
        )
    if settings.context > settings.positions:
        raise UserError(
            f"--context {settings.context} is more than the {settings.positions} positions of the cache; give fewer, or a larger "
            "--max-length."
        )
    tokens = image_tokens(both["target"][1], settings.views)
    if tokens >= settings.positions:
        raise UserError(
            f"An image of {settings.views} views takes {tokens} positions, and --max-length {settings.positions} leaves no room "
            "for an answer; give fewer --tiles or a larger --max-length."
        )
    if not 0 <= settings.accepted <= settings.drafted:
        raise UserError(
            f"--accepted {settings.accepted:g} is not between 0 and the {settings.drafted} tokens drafted a step; give the mean "
            "number of drafted tokens that are kept a step."
        )


def _model(name: str, config: ModelConfig, settings: Settings) -> Model:
    kind, head = settings.kind, settings.head()
    found = parts(config, kind, head)
    whole = total(found.values())
    memory = card_memory(config, kind, head, settings.positions, settings.views, max(WIDTHS), settings.kv_cache)
    stages, files = building(config, kind, head), file_bytes(config, kind, head)
    return Model(name, found, whole, memory, stages, files, 4 * whole.parameters)


def _fit(configs: dict[str, ModelConfig], settings: Settings, quant: str, gpu: GPU) -> Fit:
    kind, head = QUANTIZATIONS[quant], settings.head(quant)
    try:
        memories = [
            card_memory(config, kind, head, settings.positions, settings.views, max(WIDTHS), settings.kv_cache)
            for config in configs.values()
        ]
    except UserError:
        return Fit(quant, head, None, dict.fromkeys(CARDS_GIB, False), False)
    wanted = needed(memories)
    return Fit(quant, head, wanted, {gib: wanted <= gib << 30 for gib in CARDS_GIB}, wanted <= gpu.memory)


def _bytes(config: LanguageConfig, settings: Settings, rows: int) -> dict[str, float]:
    return step_bytes(config, settings.kind, settings.head(), rows, settings.context, settings.kv_cache)


def _decoding(config: LanguageConfig, settings: Settings, gpu: GPU, basis: Basis | None, rows: int) -> Decoding:
    moved = sum(_bytes(config, settings, rows).values())
    return Decoding(floor_ms(moved, gpu), None if basis is None else basis.on(gpu, moved))


def _width(config: LanguageConfig, settings: Settings, rows: int, decoding: Decoding) -> Width:
    found = _bytes(config, settings, rows)
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    distinct = expected_experts(experts, chosen, rows) if experts else 0.0
    return Width(rows, distinct, found, sum(found.values()), decoding)


def _basis(
    config: LanguageConfig, settings: Settings, measured: BenchResults | None
) -> tuple[Basis | None, str | None]:
    """Measured steps of a language model of these sizes, or why there are none."""
    if measured is None:
        return None, "there is no measurement here"
    if settings.kind != "int4":
        return None, "only INT4 steps were measured"
    name = preset_of(config)
    if name not in measured.steps:
        return None, "no model of these sizes was measured"
    head, cached = _HEADS[measured.lm_head], (measured.context, measured.kv_cache)
    steps = [
        Measured(sum(step_bytes(config, "int4", head, step.rows, *cached).values()), step.ms, step.launches)
        for step in measured.steps[name]
        if step.rows in WIDTHS
    ]
    if not steps:
        return None, "no step of these widths was measured"
    return Basis.of(find_gpu(measured.gpu), steps, measured.copy_gbps), None

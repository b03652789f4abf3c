"""All settings, in small frozen groups; environment `STOKER_GROUP__FIELD` or a `.env` file.

Read once at an entry point with `load_settings()` and passed down. Nothing below an entry point
reads the environment. `.env.example` is generated from this module (`make env-example`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from runtime.errors import BadInput

Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=0.5)]
# Money for a million tokens, or for an hour, in STOKER_COST__CURRENCY.
Price = Annotated[Decimal, Field(ge=0, le=1_000_000, max_digits=18, decimal_places=9)]
REPOSITORY = Path(__file__).resolve().parents[1]
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000.0  # beyond it shares are none, and the arithmetic of credits overflows
Weight = Annotated[float, Field(ge=LEAST_WEIGHT, le=MOST_WEIGHT)]


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PostgresSettings(_Group):
    """Where jobs and results live."""

    url: str | None = Field(None, description="postgresql://user:password@host:5432/stoker; unset: embedded")
    pool_size: Count = Field(5, description="connections a process keeps at most")


class BrokerSettings(_Group):
    """Where shards are announced to workers."""

    url: str | None = Field(None, description="amqp://user:password@host:5672/vhost; unset: embedded (Valkey)")
    delivery_limit: Count = Field(20, description="redeliveries before RabbitMQ dead-letters a hint; ends no job")


class RedisSettings(_Group):
    """What is live and may be lost: which workers are up, what they serve."""

    url: str | None = Field(None, description="redis://:password@host:6379/0; unset: embedded")


class EngineSettings(_Group):
    """The inference server that a GPU worker starts and watches, or one that already runs."""

    kind: Literal["auto", "vllm", "llamacpp", "none"] = Field(
        "auto", description="auto: vLLM if its environment and a checkpoint for it exist, else llama.cpp"
    )
    url: str | None = Field(None, description="an OpenAI-compatible server that already runs; nothing is started")
    api_key: str | None = Field(None, description="bearer token for that server")
    checkpoint: Path | None = Field(None, description="a Hugging Face folder (vLLM) or a .gguf file (llama.cpp)")
    alias: str | None = Field(None, description="name that jobs use as `model`; unset: from the checkpoint's name")
    vllm_python: Path = Field(Path(".venv-vllm/bin/python"), description="Python of vLLM's own environment")
    args: str = Field("", description="more flags for the engine, passed through as they are")
    max_num_seqs: Count = Field(64, description="sequences the engine runs at once")
    max_num_batched_tokens: Count = Field(4096, description="tokens in one step of the engine")
    api_servers: Count = Field(
        1, description="front ends of vLLM on a GPU, which share one engine; on a CPU always one"
    )
    context_tokens: Count = Field(2048, description="prompt plus output tokens of one sequence")
    adapters: dict[str, Path] = Field(
        {}, description='JSON such as {"sql": "/adapters/sql"}: LoRA adapters that jobs may name as `model` (vLLM)'
    )
    hour_price: Price | None = Field(
        None, description="what the engine's machine costs an hour, in STOKER_COST__CURRENCY; unset: it is not known"
    )
    start_timeout_s: Seconds = Field(900, description="how long a start may take until /health answers")
    stall_s: Seconds = Field(120, description="no token for this long with work at hand: restart the engine")


class EndpointsSettings(_Group):
    """Endpoints beside the workers' own engines: see docs/endpoints.md."""

    file: Path | None = Field(
        None, description="a TOML file of endpoints, beside those of `stoker endpoints add`; read by every worker"
    )
    first_byte_s: Seconds = Field(120, description="an external endpoint's first byte; then the request is given up")
    idle_s: Seconds = Field(60, description="silence between two pieces of an external endpoint's answer")


class CostSettings(_Group):
    """What `stoker cost` counts with."""

    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = Field("USD", description="of every price, three letters")
    managed_input_price: Price | None = Field(
        None, description="what a managed API asks for a million prompt tokens, to compare with; unset: no comparison"
    )
    managed_output_price: Price | None = Field(None, description="and for a million output tokens")
    managed_cached_price: Price | None = Field(
        None, description="and for a million prompt tokens that it had cached; unset: as any other"
    )


class EmbeddingsSettings(_Group):
    """A second endpoint for /v1/embeddings: an engine generates or embeds, not both."""

    url: str | None = Field(None, description="an OpenAI-compatible server for embeddings; unset: the engine's")
    api_key: str | None = Field(None, description="bearer token for that server")
    pack_tokens: Count = Field(8192, description="estimated tokens put into one embeddings request")
    pack_inputs: Count = Field(128, description="texts put into one embeddings request")


class WorkerSettings(_Group):
    """A Celery worker process and its children."""

    node: Literal["generation", "documents", "control", "express"] = Field(
        "generation",
        description="generation: runs batches on an engine; documents: reads documents, without one; control: runs "
        "schedules; express: answers single requests, beside a generation worker that starts it",
    )
    children: Count | None = Field(
        None,
        description="prefork children, each with its own asyncio loop; unset: from max_num_seqs, or, on the documents "
        "node, one a core",
    )
    in_flight: Count | None = Field(None, description="jobs a child keeps in flight; unset: from max_num_seqs")
    express_slots: Annotated[int, Field(ge=0, le=4096)] = Field(
        0, description="sequences of the engine that are kept for single requests while some come; 0: none are served"
    )
    lease_s: Seconds = Field(30, description="how long a silent attempt keeps its shard")
    heartbeat_s: Seconds = Field(10, description="how often a lease is extended; well below lease_s")
    grace_s: Seconds = Field(30, description="on SIGTERM: how long in-flight jobs may go on")
    yield_s: Seconds = Field(600, description="a task starts nothing new after this long and gives back the rest")


class DispatchSettings(_Group):
    """How the workers are shared."""

    tenant_weights: dict[str, Weight] = Field(
        {}, description='JSON such as {"acme": 3}: a tenant\'s share of the workers; 1 unless named'
    )


class ShardSettings(_Group):
    """Where a shard ends, whichever bound is met first."""

    max_jobs: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None, description="jobs in a shard; unset: from the workers' places and service times, 64 without workers"
    )
    max_tokens: Count = Field(256_000, description="estimated prompt and output tokens in a shard")
    max_bytes: Count = Field(16 * 1024 * 1024, description="bytes of job bodies in a shard")


class CacheSettings(_Group):
    """Answers that were given before."""

    mode: Literal["off", "exact", "semantic"] = Field(
        "exact", description="exact: an equal request is answered once; semantic: see docs/cache.md; --cache"
    )
    ttl_s: Seconds = Field(2_592_000, description="how long an answer may serve (30 days)")
    sampled: bool = Field(False, description="also requests that sample: neither temperature 0 nor a seed")
    chroma_url: str | None = Field(None, description="http://host:8000, for the semantic cache; unset: there is none")
    embedder: Path = Field(
        Path(".checkpoints/minilm-l6-v2-int8"), description="folder with model.onnx and tokenizer.json"
    )
    embedder_url: str | None = Field(None, description="an /v1/embeddings server to use instead of that folder")
    embedder_model: str = Field("", description="what that server calls its model")
    embedder_api_key: str | None = Field(None, description="bearer token for that server")
    max_error: Share = Field(0.01, description="wrong answers by all lookups, at most; certified")
    max_served_error: Share = Field(0.05, description="wrong decisions by decisions to serve, at most; certified")


class DocumentSettings(_Group):
    """Documents on the documents node: what one may be, and how it is cut."""

    file_bytes: Count = Field(64 * 1024 * 1024, description="bytes of one document")
    text_bytes: Count = Field(4 * 1024 * 1024, description="bytes of text that one may become")
    unpacked_bytes: Count = Field(256 * 1024 * 1024, description="bytes that the parts of a DOCX or the like may be")
    convert_s: Seconds = Field(60, description="reading one document; then it ends `conversion_timeout`")
    convert_memory_bytes: Count = Field(2 * 1024**3, description="memory of the process that reads one")
    fetch_s: Seconds = Field(60, description="fetching one from a URL")
    passage_tokens: Annotated[int, Field(ge=16, le=254)] = Field(
        100, description="tokens of the embedder in a passage, at most"
    )


class GatewaySettings(_Group):
    """The HTTP door: files, batches and the page."""

    host: str = Field(
        "127.0.0.1", description="address it listens on; anywhere but on loopback put a TLS proxy before it"
    )
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(8080, description="its port")
    files: str | None = Field(
        None,
        description="where uploads are: a folder or a URL for fsspec, such as s3://bucket/stoker; unset: in home",
    )
    file_bytes: Count = Field(2 * 1024**3, description="bytes of one upload")
    tenant_bytes: Count = Field(64 * 1024**3, description="bytes of all uploads that a tenant has")
    request_bytes: Count = Field(1024 * 1024, description="bytes of any other request's body")
    uploads: Count = Field(16, description="uploads at once, of all tenants")
    tenant_uploads: Count = Field(4, description="uploads at once, of one tenant")
    pool_size: Count = Field(20, description="connections to Postgres that a gateway process keeps at most")
    connections: Count = Field(1000, description="connections at once, idle ones too; more are answered 503")
    requests_per_minute: Count = Field(1200, description="of a key that states none itself; more are answered 429")
    wrong_keys_per_minute: Count = Field(30, description="requests without a right key of an address; then it waits")
    batch_lines: Count | None = Field(None, description="lines of one batch; more: too_many_tasks; unset: any number")
    batch_tokens: Count | None = Field(None, description="estimated tokens of one batch; more: token_limit_exceeded")
    express_s: Seconds = Field(300, description="how long a single request is held open; then it is answered 504")
    express_requests: Count = Field(256, description="single requests held open at once, of all tenants; more: 429")
    validators: Count = Field(1, description="processes that turn uploaded files into jobs, and deliver webhooks")
    webhook_private: bool = Field(False, description="webhooks may go to private addresses, and over plain http")
    webhook_tries: Count = Field(8, description="tries of a delivery: over about three hours")


class LimitSettings(_Group):
    """Hard limits; a job or file beyond them is refused or ended with a stated error."""

    line_bytes: Count = Field(32 * 1024 * 1024, description="bytes of one line of a batch file")
    max_output_tokens: Count = Field(1024, description="output tokens of one completion; larger wishes are clamped")
    request_timeout_s: Seconds = Field(900, description="one request to an endpoint; then the job ends `timeout`")
    max_tries: Count = Field(8, description="tries of a job that fails transiently")
    window_s: Seconds = Field(86_400, description="a batch's completion window unless it states one")
    retention_s: Seconds = Field(2_592_000, description="how long an ended batch and its results are kept (30 days)")


class TraceSettings(_Group):
    """Where spans of batches go: see docs/operations.md."""

    to: Literal["off", "file", "otlp", "langsmith", "weave", "langfuse"] = Field(
        "off", description="file: into home/traces, for `stoker trace`; otlp: an OpenTelemetry receiver, over HTTP"
    )
    url: str | None = Field(
        None, description="where spans are posted, such as http://collector:4318/v1/traces; unset: the service's own"
    )
    api_key: str | None = Field(
        None, description="LangSmith's or W&B's key, or Langfuse's two as pk-lf-…:sk-lf-…; for otlp a bearer token"
    )
    project: str | None = Field(None, description="LangSmith's project, or W&B's as entity/project")
    sample: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="share of batches that are traced")
    prompts: bool = Field(False, description="put prompts and answers into spans too, which leave this machine")


# What `stoker up` starts, in the order of the ports at which each answers /metrics.
MetricsPart = Literal["generation", "documents", "gateway", "control"]
METRICS_PARTS: tuple[MetricsPart, ...] = get_args(MetricsPart)


class MetricsSettings(_Group):
    """Prometheus metrics: each worker, dispatcher and gateway answers at /metrics on a port of its own."""

    host: str = Field("127.0.0.1", description="address they listen on; metrics name no tenant and no prompt")
    port: Annotated[int, Field(ge=1, le=65_535)] | None = Field(
        None, description="its port; unset: no metrics. `stoker up` takes this one and those after it, one a process"
    )


class FlowerSettings(_Group):
    """Flower, Celery's dashboard: `stoker flower`, and beside `stoker up`."""

    host: str = Field("127.0.0.1", description="address it listens on; it can stop workers: never publish it")
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(5555, description="its port")
    user: str = Field("stoker", description="who may enter")
    password: str | None = Field(None, description="with what; unset: `stoker up` makes one, in home/flower-password")


class ScheduleSettings(_Group):
    """Recurring commands: `stoker schedule`, run by workers of the control node."""

    tick_s: Seconds = Field(5, description="how often the beat lets due schedules be looked for")
    run_s: Seconds = Field(21_600, description="how long one run may take; then it has failed (6 h)")
    lease_s: Seconds = Field(30, description="how long a run is kept for a worker that is silent; then it is run again")
    missed_after_s: Seconds = Field(300, description="a run that begins so late was missed: see --missed")
    keep_runs: Count = Field(100, description="runs of each schedule that are remembered")


class LogSettings(_Group):
    """Logs go to stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level written")
    format: Literal["auto", "json", "human"] = Field("auto", description="auto: human on a terminal, else JSON")


class Settings(BaseSettings):
    """Everything that can be set. An unknown field of a group is refused, so that a typing error shows."""

    model_config = SettingsConfigDict(
        env_prefix="STOKER_",
        env_nested_delimiter="__",
        env_file=".env",
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",
    )

    home: Path | None = Field(None, description="folder of the embedded services and run files")
    postgres: PostgresSettings = PostgresSettings()
    broker: BrokerSettings = BrokerSettings()
    redis: RedisSettings = RedisSettings()
    engine: EngineSettings = EngineSettings()
    endpoints: EndpointsSettings = EndpointsSettings()
    embeddings: EmbeddingsSettings = EmbeddingsSettings()
    worker: WorkerSettings = WorkerSettings()
    dispatch: DispatchSettings = DispatchSettings()
    shard: ShardSettings = ShardSettings()
    cache: CacheSettings = CacheSettings()
    documents: DocumentSettings = DocumentSettings()
    gateway: GatewaySettings = GatewaySettings()
    limits: LimitSettings = LimitSettings()
    cost: CostSettings = CostSettings()
    trace: TraceSettings = TraceSettings()
    metrics: MetricsSettings = MetricsSettings()
    flower: FlowerSettings = FlowerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    log: LogSettings = LogSettings()

    @property
    def is_embedded(self) -> bool:
        """Whether no service is named: Postgres and the broker then run as our own children."""
        return self.postgres.url is None and self.broker.url is None and self.redis.url is None

    def require_postgres(self) -> str:
        """Postgres's URL; raises BadInput if none is set."""
        return _required(self.postgres.url, "STOKER_POSTGRES__URL")

    def require_broker(self) -> str:
        """The broker's URL; raises BadInput if none is set."""
        return _required(self.broker.url, "STOKER_BROKER__URL")

    def require_redis(self) -> str:
        """Redis's URL; raises BadInput if none is set."""
        return _required(self.redis.url, "STOKER_REDIS__URL")


def load_settings() -> Settings:
    """Settings from the environment and `.env`.

    Raises BadInput naming the variable, what is wrong with it and the remedy.
    """
    try:
        settings = Settings()
    except SettingsError as error:  # such as STOKER_TRACE=otlp
        raise BadInput(f"settings: {error}; a group's settings are named as in STOKER_TRACE__TO") from error
    except ValidationError as error:
        faults = "; ".join(
            f"STOKER_{'__'.join(str(part) for part in fault['loc']).upper()}: {fault['msg']}"
            for fault in error.errors()
        )
        raise BadInput(f"settings: {faults} (see .env.example for every name)") from error
    named = {
        "STOKER_POSTGRES__URL": settings.postgres.url,
        "STOKER_BROKER__URL": settings.broker.url,
        "STOKER_REDIS__URL": settings.redis.url,
    }
    missing = [name for name, url in named.items() if url is None]
    if missing and len(missing) < len(named):
        raise BadInput(
            f"settings: {', '.join(missing)} not set while other services are; "
            "set all three, or none to use the embedded ones"
        )
    if settings.worker.heartbeat_s * 2 > settings.worker.lease_s:
        raise BadInput("settings: STOKER_WORKER__HEARTBEAT_S must be at most half of STOKER_WORKER__LEASE_S")
    engine = settings.engine.model_copy(update={"vllm_python": made(settings.engine.vllm_python)})
    cache = settings.cache.model_copy(update={"embedder": made(settings.cache.embedder)})
    return settings.model_copy(update={"engine": engine, "cache": cache})


def made(path: Path) -> Path:
    """A path that `make` fills, here or, where there is none here, in the repository: commands run in any folder."""
    elsewhere = REPOSITORY / path
    return elsewhere if not path.exists() and elsewhere.exists() else path


def environment_of(settings: Settings) -> dict[str, str]:
    """The settings that differ from the defaults as `STOKER_…` variables, for child processes."""
    return {name: value for name, value, default, _ in _variables(settings) if value != default}


def env_example() -> str:
    """The text of `.env.example`: every variable with its default, commented out, and what it is for."""
    lines = [
        "# Every setting of Stoker with its default. Copy to .env and change what you need.",
        "# Generated by `make env-example`; a test holds it to runtime/settings.py.",
    ]
    for name, _, default, description in _variables(Settings.model_construct()):
        lines += ["", f"# {description}", f"# {name}={default}"]
    return "\n".join(lines) + "\n"


def without_secrets(url: str) -> str:
    """A URL with its password replaced by ***, fit for logs and messages."""
    return re.sub(r"(?<=://)([^:@]*):.*(?=@)", r"\1:***", url)


def _required(url: str | None, name: str) -> str:
    if url is None:
        raise BadInput(
            f"{name} is not set; `stoker up` and `stoker run` need none, other commands need all three services"
        )
    return url


def _variables(settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """(name, value, default, description) of every leaf setting, values as environment text."""
    for group_name, group_field in Settings.model_fields.items():
        group = getattr(settings, group_name)
        if not isinstance(group, BaseModel):
            yield (
                f"STOKER_{group_name.upper()}",
                _as_text(group),
                _as_text(group_field.default),
                group_field.description or "",
            )
            continue
        for name, field in type(group).model_fields.items():
            yield (
                f"STOKER_{group_name.upper()}__{name.upper()}",
                _as_text(getattr(group, name)),
                _as_text(field.default),
                field.description or "",
            )


def _as_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return json.dumps(value, default=str)
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)

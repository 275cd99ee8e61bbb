"""What the operator decided: one frozen Settings, each field one flag and one environment variable.

Knows nothing of torch, models or HTTP; what cannot be checked without a model is checked at load, as a StartupError.
Read once, by main; everyone else is handed the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from command_line import Option, is_own_address, parse_flags, refuse

_BYTE_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
# Where pydantic's own words would not tell an operator what to write.
_RULES = {"bool_parsing": "should be True or False", "int_parsing": "should be a whole number"}


class StartupError(Exception):
    """The options do not fit the model or the machine; its one line is shown and the process ends with exit code 2."""


def _to_bytes(value: object) -> object:
    """`2GiB`, `500MB` or a plain number, as a number of bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if match is None or match[2] not in _BYTE_UNITS:
        raise ValueError("should be a number of bytes, such as 2147483648, 500MB or 2GiB")
    return int(float(match[1]) * _BYTE_UNITS[match[2]])


def _none_word(value: object) -> object:
    """The word `none` switches an optional limit off."""
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def _to_items(value: object) -> object:
    """Comma separated, as in an environment variable; repeated flags arrive as a list."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, list | tuple):
        return tuple(item.strip() if isinstance(item, str) else item for item in value)
    return value


def _check_key(key: str) -> str:
    """A key must be able to travel in an Authorization header."""
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError("should be printable ASCII without spaces, and not empty")
    return key


def _check_origin(origin: str) -> str:
    """A browser sends scheme://host[:port] and nothing after it; anything longer would never match."""
    parts = urlsplit(origin)
    is_bare = not (parts.path or parts.query or parts.fragment)
    if origin != "*" and not (parts.scheme and parts.netloc and is_bare):
        raise ValueError("should be * or an origin such as https://chat.example.org, without a path")
    return origin


def _to_number(value: object) -> object:
    """Digits as a number, where only certain numbers will do."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(_to_bytes)]
ClassPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
Seconds = Annotated[float, Field(allow_inf_nan=False)]
NoneWord = BeforeValidator(_none_word)


def _option(default: Any, meaning: str, *, shown: str | None = None, **rules: Any) -> Any:
    """A field; `shown` is what --help says of a default that is not a plain value."""
    return Field(default, description=meaning, json_schema_extra={"shown": shown} if shown else None, **rules)


class Settings(BaseModel):
    """Every option, validated and frozen; `model_fields_set` holds those the operator gave, at whatever value."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, hide_input_in_errors=True)

    # Down to torch_compile_mode: names, variables and defaults that users of this API already have in their scripts.
    host: str = _option("0.0.0.0", "address to bind", min_length=1)
    port: int = _option(7088, "port to listen on; 0 picks a free one and logs it", ge=0, le=65535)
    loglevel: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)] = _option(
        "INFO", "least severe log level shown; DEBUG also logs each request's parameters"
    )
    model_type: ClassPath = _option("AutoModelForCausalLM", "class of transformers, or a dotted path to one's own")
    tokenizer_type: ClassPath = _option("AutoTokenizer", "class of transformers, or a dotted path to one's own")
    tokenizer_use_fast: bool = _option(True, "use the Rust implementation of the tokenizer where there is one")
    processor_type: ClassPath = _option(
        "AutoTokenizer",
        "class of transformers, or a dotted path, for a speech model's features; not given, AutoFeatureExtractor",
    )
    hf_model: str = _option(
        "mesolitica/malaysian-llama2-7b-32k-instructions",
        "model to serve: hub id, local directory, or `demo`, `demo-t5` or `demo-whisper`, which ship with the project "
        "and need no network",
        min_length=1,
    )
    torch_dtype: Literal["bfloat16", "float16", "float32", "auto"] = _option(
        "bfloat16", "number format of weights and KV; auto follows the checkpoint"
    )
    architecture_type: Literal["decoder", "encoder-decoder"] = _option(
        "decoder", "decoder or encoder-decoder; not given, as the checkpoint says"
    )
    serving_type: Literal["chat", "whisper"] = _option(
        "chat", "chat or whisper (speech to text); not given, as the checkpoint says"
    )
    continuous_batching_microsleep: Seconds = _option(
        0.001, "seconds that an idle engine waits for company after the first arrival", ge=0, le=10
    )
    continuous_batching_batch_size: int = _option(20, "most sequences in one step", ge=1, le=4096)
    static_cache: bool = _option(False, "allocate the KV cache once, a slot for each sequence of a step")
    static_cache_encoder_max_length: int = _option(
        256, "encoder positions of each static slot; of a speech model, always all it has", ge=1
    )
    static_cache_decoder_max_length: int = _option(
        256, "positions of each static slot, prompt and output together", ge=1
    )
    accelerator_type: Literal["cuda", "cpu", "mps"] = _option(
        "cuda", "device to run on; not given and no CUDA there: cpu, with a warning"
    )
    max_concurrent: int = _option(100, "most requests in the server at once; above it 429 with retry-after", ge=1)
    torch_profiling: bool = _option(False, "profile a few prefill and decode steps, and a few more at each SIGUSR1")
    hqq: bool = _option(False, "int4 weights by HQQ: a quarter of the memory of linear layers, fastest for few streams")
    torch_compile: bool = _option(
        False, "compile the necessary forwards: decode steps, behind, while the server already answers"
    )
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = _option(
        "reduce-overhead",
        "torch.compile's mode: the max-autotune ones also choose kernels by measuring; on CUDA reduce-overhead and "
        "max-autotune also capture steps as CUDA graphs, eager ones at once and compiled ones once they are there, and "
        "allocate the KV cache in full at the start; the CPU has no graphs",
    )

    # Options of ours.
    served_model_name: str | None = _option(
        None, "name that requests and /v1/models use", shown="the value of --hf-model", min_length=1
    )
    revision: str | None = _option(None, "branch, tag or commit on the hub", shown="main", min_length=1)
    # False, because it runs code of whoever wrote the checkpoint; never settable by a request.
    trust_remote_code: bool = _option(False, "run Python code that ships with the checkpoint")
    max_model_len: Annotated[int | None, NoneWord] = _option(
        None, "most tokens, prompt and output together, of one sequence", shown="the model's positions", ge=1
    )
    kv_cache_memory: Annotated[Bytes | None, NoneWord] = _option(
        None, "most memory for keys and values, in bytes or as in 2GiB", shown="what is left, measured", ge=1
    )
    # Room for models that are larger than a card, at a price: no step is faster than its slowest fetch.
    device_map: Annotated[Literal["auto", "balanced", "balanced_low_0", "sequential"] | None, NoneWord] = _option(
        None,
        "spread a model that is larger than one GPU over several, then main memory, then the disk, as accelerate does: "
        "for capacity, not for speed; auto (and accelerate's balanced, balanced_low_0, sequential), or none",
        shown="none",
    )
    prefix_caching: bool = _option(True, "reuse keys and values of a beginning that prompts share")
    # Small on CPU, where a step's time grows with its tokens and running streams wait for it; large on an accelerator.
    max_batch_tokens: Annotated[int | None, NoneWord] = _option(
        None, "most tokens computed in one step", shown="by device", ge=1
    )
    # Half of the OpenAI SDK's own timeout: the caller learns in time that waiting longer is no use.
    max_queue_time: Annotated[Seconds | None, NoneWord] = _option(
        300.0, "seconds that a request may wait for its first step, or none; then 503 with retry-after", gt=0
    )
    # No default: a slow machine may rightly stream for an hour, and a caller who has gone is noticed anyway.
    request_timeout: Annotated[Seconds | None, NoneWord] = _option(
        None, "seconds that a request may take in all, or none", shown="none", gt=0
    )
    # Orchestrators send SIGKILL 30 s after SIGTERM unless told otherwise; later than that would never be reached.
    shutdown_timeout: Seconds = _option(30.0, "seconds that running requests get to finish after SIGTERM", ge=0)
    # A million tokens are about 4 MB as text and 7 MB as ids.
    max_body_size: Bytes = _option(16 * 2**20, "most bytes of a request's body, or as in 16MiB", ge=1)
    # OpenAI's own limit for audio files.
    max_audio_size: Bytes = _option(25_000_000, "most bytes of an audio upload, or as in 25MB", ge=1)
    # A small file can hold hours of silence: what is decoded is bounded, not only what is uploaded.
    max_audio_seconds: Seconds = _option(7200.0, "longest audio that is transcribed, in seconds", gt=0)
    api_key: Annotated[tuple[Annotated[str, AfterValidator(_check_key)], ...], BeforeValidator(_to_items)] = _option(
        (), "key that requests must carry; repeatable, comma separated in the variable", shown="none", repr=False
    )
    allowed_origins: Annotated[
        tuple[Annotated[str, AfterValidator(_check_origin)], ...], BeforeValidator(_to_items)
    ] = _option((), "origin whose web pages may call (CORS), or *; repeatable, comma separated", shown="none")
    hqq_group_size: Annotated[Literal[32, 64, 128, 256], BeforeValidator(_to_number)] = _option(
        64, "weights that share a scale with --hqq True"
    )
    hqq_report: bool = _option(False, "log how far --hqq True moves the logits; loads the model in bfloat16 first")
    cache_dir: str | None = _option(
        None,
        "where what was made once is kept for the next start: int4 weights, compiled kernels",
        shown="transformers-openai-api in the user's cache",
        min_length=1,
    )
    strict_parameters: bool = _option(False, "answer 400 to request fields nobody knows, instead of naming them")
    seed: Annotated[int | None, NoneWord] = _option(
        None, "makes the seeds of requests without one repeatable", shown="from the system", ge=0, lt=2**63
    )

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self.served_model_name or self.hf_model

    def is_given(self, name: str) -> bool:
        """Whether the operator gave this option, even at its default value."""
        return name in self.model_fields_set

    @model_validator(mode="after")
    def _refuse_what_cannot_be_honoured(self) -> Self:
        if self.is_given("torch_compile_mode") and not self.torch_compile:
            raise _refusal("torch_compile_mode", "has no effect without --torch-compile True")
        self._check_static_cache()
        if (
            self.serving_type == "whisper"
            and self.is_given("architecture_type")
            and self.architecture_type == "decoder"
        ):
            raise _refusal("architecture_type", "should be encoder-decoder with --serving-type whisper")
        self._check_hqq()
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.continuous_batching_batch_size:
            raise _refusal(
                "max_batch_tokens",
                "should be at least one token for each sequence of a step "
                f"(--continuous-batching-batch-size {self.continuous_batching_batch_size})",
            )
        return self

    def _with_cache_in(self, environ: Mapping[str, str]) -> Self:
        """The same with a place for the cache; still not one that the operator gave."""
        settings = self.model_copy(update={"cache_dir": _cache_dir(environ)})
        settings.model_fields_set.discard("cache_dir")
        return settings

    def _check_static_cache(self) -> None:
        if not self.static_cache:
            for name in ("static_cache_encoder_max_length", "static_cache_decoder_max_length"):
                if self.is_given(name):
                    raise _refusal(name, "has no effect without --static-cache True")
            return
        for other in ("max_model_len", "kv_cache_memory"):
            if getattr(self, other) is not None:
                rule = "follows from --static-cache-decoder-max-length and the batch size with --static-cache True"
                raise _refusal(other, rule)

    def _check_hqq(self) -> None:
        if not self.hqq:
            for name in ("hqq_group_size", "hqq_report"):
                if self.is_given(name):
                    raise _refusal(name, "has no effect without --hqq True")
        elif self.torch_dtype in ("float16", "float32"):
            raise _refusal("hqq", f"needs --torch-dtype bfloat16, not {self.torch_dtype}: int4 kernels are made for it")

    @classmethod
    def from_sources(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Self:
        """Settings from flags, else variables, else defaults; prints help, or one line about a mistake, and exits.

        Args:
            argv: the arguments after the program's name.
            environ: the environment; a variable set to nothing counts as not set.
        Raises:
            SystemExit: 0 after --help, 2 for an option that is unknown, wrong or cannot be honoured.
        """
        options = [_describe(name) for name in cls.model_fields]
        flags = parse_flags(argv, options)
        variables = {o.name: environ[o.variable] for o in options if environ.get(o.variable, "").strip()}
        # Containers and many shells set HOSTNAME to the machine's own name, which need not be an address here.
        if "host" in variables and "host" not in flags and not is_own_address(variables["host"]):
            del variables["host"]
        given = variables | flags
        try:
            settings = cls.model_validate(given)
            return settings if settings.is_given("cache_dir") else settings._with_cache_in(environ)
        except ValidationError as error:
            first = error.errors()[0]
        name = str(first["loc"][0] if first["loc"] else first["ctx"]["field"])
        rule = _RULES.get(first["type"]) or first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        words = given[name]
        text = words if isinstance(words, str) else ",".join(words)
        value = "(value not shown)" if name == "api_key" else " ".join(text.split())
        option = _describe(name)
        refuse(f"{f'{option.flag} {value}' if name in flags else f'{option.variable}={value} ({option.flag})'}: {rule}")


def _cache_dir(environ: Mapping[str, str]) -> str:
    """Where this user's programs keep what they can make again."""
    local = environ.get("XDG_CACHE_HOME") or environ.get("LOCALAPPDATA")
    return str((Path(local) if local else Path.home() / ".cache") / "transformers-openai-api")


def _describe(name: str) -> Option:
    """How a field looks on the command line."""
    field = Settings.model_fields[name]
    extra = field.json_schema_extra
    shown = extra["shown"] if isinstance(extra, dict) else field.default
    return Option(name, field.description or "", str(shown), is_repeatable=isinstance(field.default, tuple))


def _refusal(name: str, rule: str) -> PydanticCustomError:
    """A rule that involves more than one field, or none of the values."""
    return PydanticCustomError("refused", "{rule}", {"field": name, "rule": rule})

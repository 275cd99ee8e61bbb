"""Every option from flag, variable and default; and every mistake told in one line."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from command_line import is_own_address, take_word
from config import Settings

ROOT = Path(__file__).parent.parent

# The options users of this API already have: flag, variable, default. They are fixed.
INHERITED = [
    ("--host", "HOSTNAME", "0.0.0.0"),
    ("--port", "PORT", 7088),
    ("--loglevel", "LOGLEVEL", "INFO"),
    ("--model-type", "MODEL_TYPE", "AutoModelForCausalLM"),
    ("--tokenizer-type", "TOKENIZER_TYPE", "AutoTokenizer"),
    ("--tokenizer-use-fast", "TOKENIZER_USE_FAST", True),
    ("--processor-type", "PROCESSOR_TYPE", "AutoTokenizer"),
    ("--hf-model", "HF_MODEL", "mesolitica/malaysian-llama2-7b-32k-instructions"),
    ("--torch-dtype", "TORCH_DTYPE", "bfloat16"),
    ("--architecture-type", "ARCHITECTURE_TYPE", "decoder"),
    ("--serving-type", "SERVING_TYPE", "chat"),
    ("--continuous-batching-microsleep", "CONTINUOUS_BATCHING_MICROSLEEP", 0.001),
    ("--continuous-batching-batch-size", "CONTINUOUS_BATCHING_BATCH_SIZE", 20),
    ("--static-cache", "STATIC_CACHE", False),
    ("--static-cache-encoder-max-length", "STATIC_CACHE_ENCODER_MAX_LENGTH", 256),
    ("--static-cache-decoder-max-length", "STATIC_CACHE_DECODER_MAX_LENGTH", 256),
    ("--accelerator-type", "ACCELERATOR_TYPE", "cuda"),
    ("--max-concurrent", "MAX_CONCURRENT", 100),
    ("--torch-profiling", "TORCH_PROFILING", False),
    ("--hqq", "HQQ", False),
    ("--torch-compile", "TORCH_COMPILE", False),
    ("--torch-compile-mode", "TORCH_COMPILE_MODE", "reduce-overhead"),
]

# Flag, a value other than the default, and what it becomes.
GIVEN = [
    ("--host", "127.0.0.1", "127.0.0.1"),
    ("--port", "0", 0),
    ("--loglevel", "debug", "DEBUG"),
    ("--model-type", "my.package.Model", "my.package.Model"),
    ("--tokenizer-type", "LlamaTokenizer", "LlamaTokenizer"),
    ("--tokenizer-use-fast", "no", False),
    ("--processor-type", "WhisperFeatureExtractor", "WhisperFeatureExtractor"),
    ("--architecture-type", "encoder-decoder", "encoder-decoder"),
    ("--serving-type", "whisper", "whisper"),
    ("--hf-model", "some/model", "some/model"),
    ("--torch-dtype", "auto", "auto"),
    ("--continuous-batching-microsleep", "0", 0.0),
    ("--continuous-batching-batch-size", "3", 3),
    ("--accelerator-type", "cpu", "cpu"),
    ("--max-concurrent", "7", 7),
    ("--served-model-name", "alias", "alias"),
    ("--revision", "v1", "v1"),
    ("--trust-remote-code", "TRUE", True),
    ("--max-model-len", "512", 512),
    ("--kv-cache-memory", "2GiB", 2 * 2**30),
    ("--device-map", "auto", "auto"),
    ("--device-map", "balanced_low_0", "balanced_low_0"),
    ("--prefix-caching", "False", False),
    ("--max-batch-tokens", "64", 64),
    ("--max-queue-time", "none", None),
    ("--request-timeout", "1.5", 1.5),
    ("--shutdown-timeout", "0", 0.0),
    ("--max-body-size", "500kB", 500_000),
    ("--max-audio-size", "1MB", 1_000_000),
    ("--max-audio-seconds", "60", 60.0),
    ("--api-key", "one", ("one",)),
    ("--allowed-origins", "https://a.example:8443", ("https://a.example:8443",)),
    ("--strict-parameters", "yes", True),
    ("--seed", "17", 17),
    ("--static-cache", "yes", True),
    ("--hqq", "True", True),
    ("--cache-dir", "/somewhere", "/somewhere"),
    ("--torch-profiling", "1", True),
    ("--torch-compile", "True", True),
]

REFUSED = [
    ("--port", "70000", "less than or equal to 65535"),
    ("--port", "http", "whole number"),
    ("--loglevel", "loud", "'DEBUG'"),
    ("--model-type", "not a class", "match pattern"),
    ("--tokenizer-use-fast", "maybe", "True or False"),
    ("--hf-model", "", "at least 1 character"),
    ("--torch-dtype", "int8", "'bfloat16'"),
    ("--continuous-batching-microsleep", "nan", "finite"),
    ("--continuous-batching-microsleep", "-1", "greater than or equal to 0"),
    ("--continuous-batching-batch-size", "0", "greater than or equal to 1"),
    ("--accelerator-type", "tpu", "'cuda'"),
    ("--max-concurrent", "0", "greater than or equal to 1"),
    ("--max-model-len", "0", "greater than or equal to 1"),
    ("--kv-cache-memory", "lots", "number of bytes"),
    ("--kv-cache-memory", "2GiX", "number of bytes"),
    ("--device-map", "cuda:0", "'auto', 'balanced', 'balanced_low_0' or 'sequential'"),
    ("--max-batch-tokens", "19", "--continuous-batching-batch-size 20"),
    ("--max-queue-time", "0", "greater than 0"),
    ("--request-timeout", "inf", "finite"),
    ("--shutdown-timeout", "-3", "greater than or equal to 0"),
    ("--max-body-size", "0", "greater than or equal to 1"),
    ("--allowed-origins", "https://a.example/path", "without a path"),
    ("--seed", "-1", "greater than or equal to 0"),
    # Features that are not there, and options that mean nothing without them: even at their default values.
    ("--hqq-group-size", "64", "without --hqq True"),
    ("--hqq-report", "True", "without --hqq True"),
    ("--architecture-type", "encoder", "'decoder' or 'encoder-decoder'"),
    ("--serving-type", "speech", "'chat' or 'whisper'"),
    ("--static-cache-encoder-max-length", "256", "without --static-cache True"),
    ("--static-cache-decoder-max-length", "512", "without --static-cache True"),
    ("--torch-compile-mode", "reduce-overhead", "without --torch-compile True"),
    ("--processor-type", "not a class", "match pattern"),
]


def name_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def variable_of(flag: str) -> str:
    return "HOSTNAME" if flag == "--host" else name_of(flag).upper()


def one_line(argv: list[str], environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        Settings.from_sources(argv, environ)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    return printed.err


@pytest.mark.parametrize(("flag", "variable", "default"), INHERITED)
def test_inherited_options_keep_their_name_variable_and_default(flag: str, variable: str, default: object) -> None:
    settings = Settings.from_sources([], {})
    assert getattr(settings, name_of(flag)) == default
    assert not settings.is_given(name_of(flag))
    assert variable_of(flag) == variable


@pytest.mark.parametrize(("flag", "text", "value"), GIVEN)
def test_a_flag_beats_the_variable_and_the_variable_the_default(flag: str, text: str, value: object) -> None:
    name, variable = name_of(flag), variable_of(flag)
    assert getattr(Settings.from_sources([], {}), name) != value
    from_variable = Settings.from_sources([], {variable: text})
    from_flag = Settings.from_sources([flag, text], {variable: "::: not even valid :::"})
    assert getattr(from_variable, name) == getattr(from_flag, name) == value
    assert from_variable.is_given(name) and from_flag.is_given(name)
    assert getattr(Settings.from_sources([f"{flag}={text}"], {}), name) == value


@pytest.mark.parametrize("other", [["--max-model-len", "64"], ["--kv-cache-memory", "1GiB"]])
def test_what_follows_from_a_static_cache_is_not_given_beside_it(
    other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert Settings.from_sources(["--static-cache", "True", "--static-cache-decoder-max-length", "64"], {}).static_cache
    line = one_line(["--static-cache", "True", *other], {}, capsys)
    assert " ".join(other) in line and "--static-cache-decoder-max-length" in line


def test_int4_weights_take_a_group_size_and_bfloat16_alone(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings.from_sources(["--hqq", "True", "--hqq-group-size", "128", "--hqq-report", "True"], {})
    assert (settings.hqq_group_size, settings.hqq_report) == (128, True)
    assert "--hqq-group-size 48" in one_line(["--hqq", "True", "--hqq-group-size", "48"], {}, capsys)
    assert "--torch-dtype bfloat16" in one_line(["--hqq", "True", "--torch-dtype", "float32"], {}, capsys)


def test_the_two_tables_above_cover_every_option() -> None:
    covered = {name_of(row[0]) for row in GIVEN} | {name_of(row[0]) for row in REFUSED}
    assert covered >= set(Settings.model_fields)


@pytest.mark.parametrize(("flag", "text", "rule"), REFUSED)
def test_a_wrong_flag_ends_the_start_in_one_line(
    flag: str, text: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line([flag, text], {}, capsys)
    assert f"{flag} {text}" in line
    assert rule in line


@pytest.mark.parametrize(("flag", "text", "rule"), [row for row in REFUSED if row[1]])
def test_a_wrong_variable_ends_the_start_in_one_line(
    flag: str, text: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line([], {variable_of(flag): text}, capsys)
    assert f"{variable_of(flag)}={text} ({flag})" in line
    assert rule in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prot", "1"], "--prot: no such option; did you mean --port?"),
        (["--por", "1"], "--por: no such option"),  # no abbreviations
        (["--nothing-like-it=1"], "--nothing-like-it: no such option; see --help"),
        (["stray"], "stray: no such option"),
        (["--port"], "--port: expected one argument"),
    ],
)
def test_an_unknown_or_unfinished_option_ends_the_start_in_one_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in one_line(argv, {}, capsys)


def test_a_value_with_newlines_still_makes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--torch-dtype a b:" in one_line(["--torch-dtype", "a\nb"], {}, capsys)


def test_an_empty_variable_counts_as_not_set() -> None:
    settings = Settings.from_sources([], {"PORT": "", "HF_MODEL": " ", "API_KEY": ""})
    assert (settings.port, settings.api_key) == (7088, ())
    assert not settings.model_fields_set


def test_unrelated_variables_are_nobody_s_business() -> None:
    assert not Settings.from_sources([], {"PATH": "/bin", "PORTS": "x"}).model_fields_set


def test_keys_and_origins_repeat_as_flags_and_are_comma_separated_as_variables() -> None:
    flags = ["--api-key", "a", "--api-key", "b,c", "--allowed-origins", "http://x", "--allowed-origins", "*"]
    settings = Settings.from_sources(flags, {})
    assert settings.api_key == ("a", "b,c")
    assert settings.allowed_origins == ("http://x", "*")
    assert Settings.from_sources([], {"API_KEY": "a, b"}).api_key == ("a", "b")


@pytest.mark.parametrize(("argv", "environ"), [(["--api-key", "secret key"], {}), ([], {"API_KEY": "secret key,,"})])
def test_a_refused_key_is_never_shown(
    argv: list[str], environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line(argv, environ, capsys)
    assert "--api-key" in line and "secret" not in line


def test_keys_are_not_in_the_repr() -> None:
    assert "secret" not in repr(Settings(api_key=("secret",)))


def test_the_served_name_is_the_alias_or_else_the_model() -> None:
    assert Settings(hf_model="a/b").model_name == "a/b"
    assert Settings(hf_model="a/b", served_model_name="c").model_name == "c"


def test_settings_are_frozen_and_know_their_fields() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Settings.model_validate({"prot": 1})


def test_hostname_counts_only_when_the_machine_can_listen_there() -> None:
    def host(value: str) -> str:
        return Settings.from_sources([], {"HOSTNAME": value}).host

    assert host("127.0.0.1") == "127.0.0.1"
    assert host("::1") == "::1"
    assert host("localhost") == "localhost"
    assert host("no-such-machine.invalid") == "0.0.0.0"
    assert Settings.from_sources(["--host", "no-such-machine.invalid"], {}).host == "no-such-machine.invalid"


def test_a_name_of_another_machine_is_not_an_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    # 192.0.2.0/24 is reserved for documentation: no interface has it.
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert not is_own_address("elsewhere")
    found[0] = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    assert is_own_address("here")


@pytest.mark.parametrize(
    ("argv", "found", "rest"),
    [
        (["plan"], True, []),
        (["plan", "--hf-model", "demo"], True, ["--hf-model", "demo"]),
        (["--host", "0.0.0.0", "plan", "--port", "1"], True, ["--host", "0.0.0.0", "--port", "1"]),
        (["--host=0.0.0.0", "plan"], True, ["--host=0.0.0.0"]),
        (["--help", "plan"], True, ["--help"]),
        (["plan", "plan"], True, ["plan"]),
        # Values of options are no words.
        (["--hf-model", "plan"], False, ["--hf-model", "plan"]),
        (["--hf-model=plan"], False, ["--hf-model=plan"]),
        (["--hf-model", "demo"], False, ["--hf-model", "demo"]),
        ([], False, []),
    ],
)
def test_a_word_is_found_wherever_it_is_not_the_value_of_an_option(
    argv: list[str], found: bool, rest: list[str]
) -> None:
    assert take_word("plan", argv) == (found, rest)


def test_help_shows_meaning_default_and_variable_of_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Settings.from_sources(["--help"], {})
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "(default: 7088, env: PORT)" in text
    assert "(default: mesolitica/malaysian-llama2-7b-32k-instructions, env: HF_MODEL)" in text
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        assert f"  {flag} " in text
        assert f", env: {variable_of(flag)})" in text
        assert field.description and field.description.split()[0] in text


def test_the_door_imports_neither_torch_nor_the_server_before_the_options_are_read() -> None:
    code = "import sys, main; print([m for m in ('torch', 'transformers', 'fastapi', 'uvicorn') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

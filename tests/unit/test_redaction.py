"""Which names are credentials, and that their values are replaced wherever they stand."""

from __future__ import annotations

import pytest

from relora_ds.redaction import (
    REDACTED,
    is_secret,
    mask_urls,
    mask_values,
    redact,
    secret_values,
)


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "api_key",
        "apiKey",
        "auth-token",
        "client_secret",
        "PASSWORD",
        "passwd",
        "api_tokens",
        "AWS_SECRET_ACCESS_KEY",
        "tokenizer_token",
        "basic_auth",
        "Authorization",
        "ssh_passphrase",
        "db_pwd",
        "bearer",
    ],
)
def test_credentials_are_recognised(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer",
        "tokenizer_path",
        "TOKENIZERS_PARALLELISM",
        "tokens",
        "tokens_seen",
        "rank",
        "num_key_value_heads",
        "eos_token_id",
        "bos_token_ids",
        "author",
        "SSH_AUTH_SOCK",
        "PWD",
        "OLDPWD",
    ],
)
def test_words_of_the_field_are_not_credentials(name: str) -> None:
    assert not is_secret(name)


def test_redaction_reaches_nested_values_and_leaves_the_rest() -> None:
    config = {
        "data": {"tokenizer": "data/tokenizer.model", "train": [[1.0, "data/c4"]]},
        "api_key": "canary",
        "secrets": {"a": ["canary", 1], "b": {"c": "canary"}},
        "list": [{"hf_token": "canary"}, "kept"],
        "max_token": 512,
        "betas": (0.9, 0.999),
    }
    assert redact(config) == {
        "data": {"tokenizer": "data/tokenizer.model", "train": [[1.0, "data/c4"]]},
        "api_key": REDACTED,
        "secrets": {"a": [REDACTED, 1], "b": {"c": REDACTED}},
        "list": [{"hf_token": REDACTED}, "kept"],
        "max_token": 512,
        "betas": [0.9, 0.999],
    }
    assert config["api_key"] == "canary", "the original is left alone"


def test_values_of_the_environment_are_masked_longest_first() -> None:
    environ = {"A_KEY": "abcdefgh", "B_TOKEN": "abcdefghijkl", "C_KEY": "true", "HOME": "/root/abc"}
    secrets = secret_values(environ)
    assert secrets == ["abcdefghijkl", "abcdefgh"]
    text = "key=abcdefghijkl, other=abcdefgh, true /root/abc"
    assert mask_values(text, secrets) == f"key={REDACTED}, other={REDACTED}, true /root/abc"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:canary@host/x", f"https://{REDACTED}@host/x"),
        ("https://me:p@canary@host/x", f"https://{REDACTED}@host/x"),
        ("https://me:p/canary/@host/x", f"https://{REDACTED}@host/x"),
        ("http://host:8080/a@v1", "http://host:8080/a@v1"),
        ("S3://canary@bucket/x y", f"S3://{REDACTED}@bucket/x y"),
        ("https://host/x?token=canary", f"https://host/x?token={REDACTED}"),
        (
            "https://host/x?a=1&X-Amz-Credential=canary&b=2",
            f"https://host/x?a=1&X-Amz-Credential={REDACTED}&b=2",
        ),
        ("https://host/x#access_token=canary", f"https://host/x#access_token={REDACTED}"),
        ("https://host/x?page=2&tokens=5", "https://host/x?page=2&tokens=5"),
        ("https://host/x and me@host", "https://host/x and me@host"),
    ],
)
def test_credentials_inside_of_urls(url: str, shown: str) -> None:
    assert mask_urls(f"see {url} there") == f"see {shown} there"

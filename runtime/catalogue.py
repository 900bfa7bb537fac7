"""models.yaml -> ModelSpec (skeleton: the fields are settled, the reading of the file is not here yet)."""

from __future__ import annotations

from typing import Any

import msgspec


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model to serve: where its files come from and how it is run.

    `source` is one of `hf://org/name`, `s3://bucket/prefix[?versionId=...]`, `wheel://distribution`
    or a local path. Lengths are in tokens.
    """

    id: str
    source: str
    revision: str | None = None
    max_model_len: int | None = None
    tp_size: int = 1
    dtype: str = "auto"
    quantization: str | None = None
    chat_template: str | None = None
    adapters: dict[str, str] = {}
    generation: dict[str, Any] = {}

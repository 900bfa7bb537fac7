"""The token that the Hub is shown: the one that the Hub's own client would show."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def headers(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What goes along with a request to the Hub, and to no other host.

    Where there is no token to be seen, or it is in the environment, the client itself is not asked: its
    import takes longer than all requests before the first byte of the weights.
    """
    from huggingface_hub import constants

    known = {"User-Agent": "firstlight"}
    token = environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN")
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        token = None
    elif environ.get("HF_OIDC_RESOURCE") or (token is None and _may_be_kept(Path(constants.HF_TOKEN_PATH))):
        from huggingface_hub import get_token

        token = get_token()
    if token is not None and token.strip():
        known["Authorization"] = f"Bearer {token.strip()}"
    return known


def _may_be_kept(file: Path) -> bool:
    """Whether there is a token somewhere else: in the client's file, or in a notebook's secrets."""
    return file.exists() or "google.colab" in sys.modules

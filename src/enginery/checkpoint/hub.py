"""Model ids of the Hugging Face hub, resolved to local directories."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from enginery.errors import CheckpointError

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
"""what a checkpoint needs: weights, configuration, tokenizer. Never code, never pickles"""
IGNORED = ("consolidated*", "original/*", "onnx/*", "openvino/*", "*/*")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def looks_like_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


def snapshot(name: str) -> Path:
    """The local directory of a hub id, downloaded if it is not in the cache. HF_HUB_OFFLINE is honoured."""
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(PATTERNS), ignore_patterns=list(IGNORED))
        )
    except hub_errors.GatedRepoError:
        cause, fix = f"{name} is gated on the Hugging Face hub", "Accept its licence there and run `hf auth login`"
    except hub_errors.RepositoryNotFoundError:
        cause, fix = f"{name} is neither a directory nor a model of the Hugging Face hub", "Check the spelling"
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled):
        cause = f"{name} is neither a directory nor in the Hugging Face cache, and the hub cannot be reached"
        fix = "Give a local directory, or connect and unset HF_HUB_OFFLINE"
    except (hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        cause, fix = (
            f"{name} cannot be downloaded ({str(error).splitlines()[0][:200]})",
            "Try again or give a local directory",
        )
    raise CheckpointError(cause, fix)

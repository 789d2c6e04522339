"""Checkpoints on the Hugging Face hub, with addresses such as hf:owner/name or hf:owner/name@revision."""

from __future__ import annotations

import re
from pathlib import Path

from utils.errors import UserError, require_packages

ADDRESS = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # repository, and branch, tag or commit
HUB_FILE = "model.safetensors"  # in each repository


def local_file(address: Path) -> Path:
    """The path itself, or the file of an address on the hub, which huggingface_hub downloads and caches.

    Raises:
        UserError: the address is malformed, huggingface_hub is not installed, or the file cannot be downloaded.
    """
    text = address.as_posix()
    if not text.startswith("hf:"):
        return address
    match = ADDRESS.fullmatch(text)
    if match is None:
        raise UserError(f"{text} is not an address on the hub: hf:OWNER/NAME[@REVISION]", ("checkpoint",))
    require_packages("huggingface_hub", requirements=None)
    from huggingface_hub import hf_hub_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(match[1], HUB_FILE, revision=match[2]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot get {HUB_FILE} of {text} from the hub: {reason}", ("checkpoint",)) from error

"""Upload a model with its card to the Hugging Face hub, or to where ``HF_ENDPOINT`` says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trlhf.errors import UserError

if TYPE_CHECKING:
    from trlhf.config import CardConfig

log = logging.getLogger("trlhf")


def push(folders: Sequence[Path], repo: str, card: CardConfig) -> str:
    """Upload the folders of `trlhf.card.write.write_cards`: the model to the root, the adapter to ``adapter/``.

    Args:
        folders: the model's, and the adapter's where there is one.
        repo: ``owner/name``; it is made if it does not exist.
        card: ``private`` says who may see a new repository.

    Returns:
        Its address.

    Raises:
        UserError: no token, no permission, or no connection.
    """
    from huggingface_hub import HfApi, get_token

    api = HfApi()
    if get_token() is None:
        raise UserError(
            f"push={repo}: there is no token for {api.endpoint}; run 'hf auth login', or set HF_TOKEN to a token that "
            "may write; then run the same command with stage=card"
        )
    try:
        address = str(api.create_repo(repo, private=card.private, exist_ok=True))
        for folder, place in zip(folders, ("", "adapter"), strict=False):
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                path_in_repo=place,
                commit_message=f"Upload {place or 'model'} and card",
            )
    except Exception as error:  # of the hub, of httpx and of the system
        raise UserError(
            f"push={repo}: the upload to {api.endpoint} failed ({_told(error)}); nothing of the run is lost: mend "
            "it and run the same command with stage=card"
        ) from error
    log.info("push: model and card are at %s%s", address, " (private)" if card.private else "")
    return address


def _told(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:3]) or type(error).__name__

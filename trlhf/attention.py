"""Which attention computes: what ``model.attention=auto`` means on a device, and what each one needs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from trlhf.config import Attention

# By name: the package with the kernels, and how to get it.
PACKAGES = {
    "flash_attention_3": ("flash_attn_interface", "pip install flash-attn-3 (Hopper cards)"),
    "flash_attention_2": ("flash_attn", "pip install flash-attn"),
}


def installed(name: str) -> bool:
    """Say whether the package that an attention needs is there; ``sdpa`` and ``eager`` need none."""
    return name not in PACKAGES or find_spec(PACKAGES[name][0]) is not None


def choose_attention(
    wanted: Attention,
    dtype: str,
    device: str,
    capability: tuple[int, int] | None,
    usable: Callable[[str], bool] = installed,
) -> Attention:
    """Return the attention to load a model with.

    ``auto`` is flash-attention where its kernels can run: 3 on Hopper cards (9.0), else 2 from Ampere (8.0) on, both in
    bfloat16 only; anywhere else sdpa. A role that learns whole weights is loaded in float32, so it has sdpa.

    Args:
        wanted: ``model.attention``.
        dtype: of the weights that are loaded.
        device: ``cuda`` or ``cpu``.
        capability: of the card; None where there is none.
        usable: says whether an attention can be imported.
    """
    if wanted != "auto":
        return wanted
    if device != "cuda" or dtype != "bfloat16" or capability is None:
        return "sdpa"
    if capability[0] == 9 and usable("flash_attention_3"):
        return "flash_attention_3"
    return "flash_attention_2" if capability >= (8, 0) and usable("flash_attention_2") else "sdpa"

"""The text of ``--help``, without Hydra, which takes a second to list the groups. No torch here."""

from __future__ import annotations

from pathlib import Path

CONF = Path(__file__).parent / "conf"


def help_text() -> str:
    """Return the help template with the groups and their choices filled in, as Hydra would."""
    import yaml

    template: str = yaml.safe_load((CONF / "hydra" / "help" / "trlhf.yaml").read_text(encoding="utf-8"))["template"]
    choices = {
        group.name: sorted(path.stem for path in group.glob("*.yaml"))
        for group in sorted(CONF.iterdir())
        if group.is_dir() and group.name != "hydra"
    }
    groups = "".join(f"{group}: {', '.join(names)}\n" for group, names in choices.items() if names)
    return template.replace("$APP_CONFIG_GROUPS", groups)

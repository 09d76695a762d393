"""Hydra's YAML files: composition, and what differs from the defaults in ``trlhf/config.py``, each with its reason."""

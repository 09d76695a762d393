"""Who answers questions. A labeller is asked through the ledger only (``Ledger.ask``), never directly."""

from trlhf.labelers.exact import ExactVerifier
from trlhf.labelers.simulated import SimulatedPerson

__all__ = ["ExactVerifier", "SimulatedPerson"]

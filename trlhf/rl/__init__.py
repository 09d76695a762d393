"""Stage 3: targeted updates of the policy under a label budget, by PPO or DPO."""

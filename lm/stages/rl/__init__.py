"""A policy learns from its own samples and a reward: PPO, GRPO and their relatives.

`policy_gradient` holds what they share, `rollouts` makes the batches, `rollout_rewards` says what
answers are worth, `multi_turn` holds exchanges with a tool.
A method that differs from GRPO in an advantage, a ratio or an average is a `PolicyGradientMethod` of a few lines: read
dr_grpo.
"""

"""Reward models from ranked answers: pairwise (reward) and listwise."""

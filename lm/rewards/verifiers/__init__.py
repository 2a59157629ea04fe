"""Rewards that check an answer: right or not."""

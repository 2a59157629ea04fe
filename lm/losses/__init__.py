"""Unreduced losses: each returns one number per token f32[B,T] or per row f32[B]; only `Mean` reduces."""

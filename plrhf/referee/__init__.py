"""Compares methods on frozen features: many trials trained side by side, controls, one leaderboard."""

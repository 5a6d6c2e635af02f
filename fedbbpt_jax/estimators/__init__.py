"""Losses at perturbed points to gradient estimates."""

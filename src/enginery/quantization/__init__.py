"""Schemes of quantisation."""

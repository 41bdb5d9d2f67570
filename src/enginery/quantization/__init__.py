"""Schemes of quantisation, and the rewrite rules that apply them."""

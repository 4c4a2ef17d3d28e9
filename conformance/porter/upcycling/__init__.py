"""Gives a model without hyper-connections the weights with which it computes what it computed (docs/upcycling.md)."""

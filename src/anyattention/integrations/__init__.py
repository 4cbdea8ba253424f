"""Attention of this package inside other frameworks' models: a module for each framework, which it imports."""

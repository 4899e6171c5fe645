"""Keyboard skins as pictures. Knows no network."""

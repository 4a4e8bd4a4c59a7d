"""Preprocessing that training and the server share: image bytes to pixels, strings to token ids. It needs no torch."""

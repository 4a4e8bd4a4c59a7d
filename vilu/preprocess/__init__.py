"""What also runs in the server: an image's bytes to pixels, a label's text to token ids. No torch here."""

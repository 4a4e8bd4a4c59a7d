"""How good a confidence score is, what threshold it supports, and the report on both."""

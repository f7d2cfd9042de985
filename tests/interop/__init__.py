"""Tests that hold this library next to the peer, and inside untouched transformers."""

"""The benchmark: this library and the peer, measured alternately in one run."""

"""The methods: one file or folder each, none of which knows another."""

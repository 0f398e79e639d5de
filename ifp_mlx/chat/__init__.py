"""Conversations: what was said, its KV cache, how tokens are drawn."""

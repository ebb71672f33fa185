"""An HTTP server that speaks OpenAI's protocol: a target and its drafter behind the interface that clients know.

It imports neither torch nor transformers; the extra `serve` installs what it needs.
"""
